"""The sbatch script on a real SLURM: two nodes train what one process does, and a job that must go comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.slurm import Slurm

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs slurm-wlm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "train.sbatch"
OPTIONS = [
    "--epochs", "4", "--batch-size", "96", "--checkpoint-every", "1", "--log-every", "1", "--encoder.width", "4",
    "--encoder.hidden-dim", "16", "--encoder.embedding-dim", "16", "--optimizer.name", "sgd",
    "--optimizer.learning-rate", "1e-3", "--tracking.offline",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = Slurm(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights that one process trains."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "trainer.train", "--data", str(digits.folder), "--run-dir", str(run_dir), *OPTIONS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, capture_output=True)
    return load_file(run_dir / "model" / "encoder.safetensors")


def submit(slurm: Slurm, digits, folder: Path) -> str:
    job = slurm.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={folder}/job.log", str(SCRIPT),
        "--data", str(digits.folder), "--run-dir", str(folder / "run"), *OPTIONS,
        GRADMIX_ROOT=str(ROOT), GRADMIX_ENV=str(Path(sys.executable).parents[1]), DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    ).strip()  # fmt: skip
    return job


def steps_done(folder: Path) -> int:
    records = [json.loads(path.read_text()) for path in folder.glob("run/checkpoints/step-*/state.json")]
    return max((record["progress"]["total_steps"] for record in records), default=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "encoder.safetensors")


@pytest.fixture(scope="module")
def together(slurm, digits, tmp_path_factory) -> Path:
    """The folder of a job on both nodes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("together")
    job = submit(slurm, digits, folder)
    slurm.wait(lambda: slurm.state(job).split()[0] in ("COMPLETED", "FAILED"), 180, "end of the job")
    assert slurm.state(job) == "COMPLETED 0:0 restarts=0", log(folder)
    return folder


def log(folder: Path) -> str:
    return (folder / "job.log").read_text()


def test_two_nodes_train_what_one_process_does(together, alone):
    assert "2 x cpu" in log(together)
    for name, value in weights(together).items():
        # Rounding, which 28 steps at a temperature of 0.05 have made larger.
        torch.testing.assert_close(value, alone[name], atol=2e-3, rtol=2e-2, msg=name)


def test_a_job_that_must_make_room_is_queued_again_and_finishes(slurm, digits, together, tmp_path):
    job = submit(slurm, digits, tmp_path)
    slurm.wait(lambda: steps_done(tmp_path) >= 7, 120, "first checkpoint")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: "restarts=1" in slurm.state(job), 60, f"requeue: {log(tmp_path)}")
    assert "stopped by SIGUSR1" in log(tmp_path) and "back into the queue" in log(tmp_path)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm.wait(lambda: slurm.state(job).split()[0] in ("COMPLETED", "FAILED"), 240, "end of the job")
    assert slurm.state(job) == "COMPLETED 0:0 restarts=1", log(tmp_path)
    assert "going on from" in log(tmp_path)
    undisturbed = weights(together)
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(tmp_path).items())


def test_a_rank_that_is_killed_ends_the_job_instead_of_hanging_it(slurm, digits, tmp_path):
    job = submit(slurm, digits, tmp_path)
    slurm.wait(lambda: steps_done(tmp_path) >= 7, 120, "first checkpoint")
    ranks = subprocess.run(["pgrep", "-f", f"train.py.*{tmp_path}/run"], capture_output=True, text=True).stdout.split()
    pythons = [pid for pid in ranks if Path(f"/proc/{pid}/exe").resolve().name.startswith("python")]
    subprocess.run(["kill", "-9", pythons[-1]], check=True)
    slurm.wait(lambda: slurm.state(job).split()[0] == "FAILED", 60, f"end of the job: {slurm.state(job)}")
    assert steps_done(tmp_path) >= 7


def test_a_dry_run_prints_the_command_and_its_environment(tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", "--protocol", "cifar10"],
        env={**os.environ, "GRADMIX_RANKS_PER_NODE": "4", "MASTER_PORT": "29500"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "export MASTER_PORT=29500" in done.stdout and "slots=4" in done.stdout
    assert done.stdout.strip().endswith(f"{ROOT}/trainer/train.py --protocol cifar10")
    assert "--launcher slurm" in done.stdout and not list(tmp_path.iterdir())
