# Everything a newcomer runs. Each target sets up what it needs; all may be interrupted and repeated.

PYTHON ?= python3
VENV := .venv
SETUP := $(VENV)/.setup-done
# DeepSpeed runs ninja by name.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Without a GPU, DeepSpeed has to be told.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export DS_ACCELERATOR ?= cpu
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster test-browser test-gpu lint doctor bench clean

help: ## what can be done here
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(SETUP) ## the environment .venv and the system libraries it needs

# The stamp is written last, so that a set-up that was interrupted is done again, from where it stopped.
$(SETUP): setup.py constraints.txt cluster/install_system_libraries.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: install a newer one and run make PYTHON=python3.12"; exit 1; }
	@PYTHON=$(PYTHON) sh cluster/install_system_libraries.sh
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the packages (6 GB, a few minutes)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## the main job on scikit-learn's digits, from images to a model that says "unknown"
	python -m data_pipeline.build --protocol digits --split 0 --out data
	python -m trainer.train --protocol digits --split 0 --data data --run-dir runs/demo
	python -m trainer.evaluate --model models:/gradmix-digits@champion --task osr --data data --examples 8
	@echo
	@echo "Where to look next:"
	@echo "  runs/demo                                              configuration, metrics, log, model, checkpoints"
	@echo "  runs/evaluate-osr-gradmix-digits@champion/report.html  the evaluation, with error bars and pictures"
	@echo "  mlflow ui --backend-store-uri sqlite:///mlruns.db      the run, its curves and the registered model"
	@echo "  python -m trainer.train --help                         every knob"
	@echo "  README.md                                              CIFAR-10, your own images, clusters"

test: setup ## the tests
	OMP_NUM_THREADS=1 python -m pytest -n 2

test-cluster: setup ## the tests on a real SLURM, sshd, Ray cluster, PostgreSQL and MLflow server, which they start (as root)
	@command -v slurmctld >/dev/null && command -v sshd >/dev/null && command -v pdsh >/dev/null && \
		command -v rsync >/dev/null && command -v ip >/dev/null && ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1 || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm openssh-server pdsh rsync iproute2 postgresql >/dev/null; }
	python -m pytest -m cluster

test-browser: setup ## the tests of the web page in a headless Chromium (as root, where it is not installed)
	@command -v chromium >/dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }
	python -m pytest -m browser

test-gpu: setup ## the tests that need a CUDA device
	python -m pytest -m gpu

lint: setup ## style
	ruff check .
	ruff format --check .

bench: setup ## how fast the parts are, as ratios
	python -m tests.bench.pipeline

doctor: ## what this machine has and lacks
	@if [ -x $(VENV)/bin/python ]; then $(VENV)/bin/python -m trainer.doctor; else $(PYTHON) -m trainer.doctor; fi

clean: ## remove the environment; data, runs and models stay
	rm -rf $(VENV) build *.egg-info
