"""The sbatch scripts on a real SLURM of two hosts: they do what one process does, and a job that must go comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cluster.hosts import ADDRESSES, ROOT, SCRATCH, environment
from tests.cluster.slurm import Slurm
from tests.cluster.training import assert_close, options, rank_processes, steps_done, weights

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs slurm-wlm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
]
TRAIN, SWEEP = (ROOT / "cluster" / "slurm" / name for name in ("train.sbatch", "sweep.sbatch"))
SEARCH = [
    "--protocol", "digits", "--num-samples", "4", "--epochs", "8", "--report-every", "1", "--seeds", "0",
    "--no-early-stopping", "--final-epochs", "1", "--base.tracking.offline", "--base.encoder.width", "4",
    "--base.encoder.hidden-dim", "16", "--base.encoder.embedding-dim", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = Slurm(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


def submit(slurm: Slurm, folder: Path, script: Path, *arguments: str, cpus: int = 1) -> str:
    """The number of a job on both nodes."""
    return slurm.run(
        "sbatch", "--parsable", "--nodes=2", f"--cpus-per-task={cpus}", f"--output={folder}/job.log", str(script),
        *arguments, GRADMIX_ROOT=str(ROOT), GRADMIX_ENV=str(Path(sys.executable).parents[1]), **environment(),
    ).strip()  # fmt: skip


def submit_training(slurm: Slurm, digits, folder: Path) -> str:
    return submit(slurm, folder, TRAIN, *options(digits, folder))


def wait_for_end(slurm: Slurm, job: str, seconds: float = 300) -> str:
    slurm.wait(lambda: slurm.state(job).split()[0] in ("COMPLETED", "FAILED", "CANCELLED"), seconds, "end of the job")
    return slurm.state(job)


def log(folder: Path) -> str:
    return (folder / "job.log").read_text() if (folder / "job.log").exists() else ""


@pytest.fixture(scope="module")
def together(slurm, digits, tmp_path_factory) -> Path:
    """The folder of a job on both nodes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("together")
    assert wait_for_end(slurm, submit_training(slurm, digits, folder)) == "COMPLETED 0:0 restarts=0", log(folder)
    return folder


def test_two_nodes_train_what_one_process_does(together, alone):
    assert "2 x cpu" in log(together)
    assert_close(weights(together), alone)


def test_srun_alone_needs_no_launcher(slurm, digits, together, tmp_path):
    output = slurm.run(
        "srun", "--nodes=2", "--ntasks-per-node=1", "python", "-m", "trainer.train", *options(digits, tmp_path),
        seconds=180, **environment(),
    )  # fmt: skip
    assert "2 x cpu" in output
    undisturbed = weights(together)
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(tmp_path).items())


def test_a_job_that_must_make_room_is_queued_again_and_finishes(slurm, digits, together, tmp_path):
    job = submit_training(slurm, digits, tmp_path)
    slurm.wait(lambda: steps_done(tmp_path) >= 7, 120, "first checkpoint", tmp_path / "job.log")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: "restarts=1" in slurm.state(job), 60, "requeue", tmp_path / "job.log")
    assert "stopped by SIGUSR1" in log(tmp_path) and "back into the queue" in log(tmp_path)
    slurm.start_now(job)
    assert wait_for_end(slurm, job) == "COMPLETED 0:0 restarts=1", log(tmp_path)
    assert "going on from" in log(tmp_path)
    undisturbed = weights(together)
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(tmp_path).items())


def test_a_job_that_is_cancelled_does_not_come_back(slurm, digits, tmp_path):
    job = submit_training(slurm, digits, tmp_path)
    slurm.wait(lambda: steps_done(tmp_path) >= 7, 120, "first checkpoint", tmp_path / "job.log")
    slurm.run("scancel", job)
    assert wait_for_end(slurm, job).startswith("CANCELLED"), log(tmp_path)
    slurm.wait(lambda: not rank_processes(tmp_path), 30, "end of the ranks", tmp_path / "job.log")
    assert "restarts=0" in slurm.state(job) and "PENDING" not in slurm.state(job)


def test_a_rank_that_is_killed_ends_the_job_and_is_named(slurm, digits, tmp_path):
    job = submit_training(slurm, digits, tmp_path)
    slurm.wait(lambda: steps_done(tmp_path) >= 7, 120, "first checkpoint", tmp_path / "job.log")
    subprocess.run(["kill", "-9", str(rank_processes(tmp_path)[1])], check=True)
    assert wait_for_end(slurm, job, 60).startswith("FAILED"), log(tmp_path)
    assert re.search(r"n2: task 1: Killed", log(tmp_path)) and steps_done(tmp_path) >= 7


def test_a_job_that_loses_a_node_comes_back_when_the_node_does(slurm, digits, tmp_path):
    job = submit_training(slurm, digits, tmp_path)
    slurm.wait(lambda: steps_done(tmp_path) >= 7, 120, "first checkpoint", tmp_path / "job.log")
    slurm.hosts.cut()
    try:
        slurm.wait(lambda: "restarts=1" in slurm.state(job), 150, "requeue", tmp_path / "job.log")
        slurm.wait(lambda: not rank_processes(tmp_path), 90, "end of the ranks", tmp_path / "job.log")
    finally:
        slurm.hosts.mend()
    slurm.wait(lambda: slurm.run("sinfo", "-h", "-o", "%T").split() == ["idle"], 90, "two idle nodes")
    slurm.start_now(job)
    assert wait_for_end(slurm, job) == "COMPLETED 0:0 restarts=1", log(tmp_path)
    assert "going on from" in log(tmp_path)


def test_a_sweep_that_must_make_room_comes_back_and_finishes_on_both_nodes(slurm, tmp_path):
    folder, trials = tmp_path / "sweep", tmp_path / "sweep" / "tune" / "search"

    def reports() -> dict[str, list[int]]:
        """The epochs that each trial has reported since it began or went on."""
        files = {path.parent.name: path.read_text().splitlines() for path in trials.glob("*/result.json")}
        return {name: [json.loads(line)["epoch"] for line in lines] for name, lines in files.items()}

    given = ["--data", str(tmp_path / "data"), "--folder", str(folder), *SEARCH, "--restart"]
    job = submit(slurm, tmp_path, SWEEP, *given, cpus=2)
    slurm.wait(lambda: sum(map(len, reports().values())) >= 3, 240, "report of a trial", tmp_path / "job.log")
    assert "2 nodes, 4 CPUs" in log(tmp_path)
    # Whoever reaches the port needs the word that only the job knows.
    asked = slurm.hosts.run(
        "n2", sys.executable, "-c", "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)",
        f"{ADDRESSES['n1']}:{20000 + 2 * int(job)}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64, **environment(),
    )  # fmt: skip
    assert asked.returncode != 0 and "Unauthenticated" in asked.stderr, asked.stderr

    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: "restarts=1" in slurm.state(job), 60, "requeue", tmp_path / "job.log")
    before = reports()
    slurm.start_now(job)
    assert wait_for_end(slurm, job) == "COMPLETED 0:0 restarts=1", log(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert [trial["metrics"]["epoch"] for trial in result["trials"]] == [8] * 4 and result["final"]["auroc"] > 0
    for name, epochs in before.items():  # none of them is trained again
        after = reports()[name]
        assert after == epochs or after[0] >= max(epochs, default=1), (before, reports())
    for name in ADDRESSES:
        left = slurm.hosts.run(name, "ps", "axo", "args").stdout
        assert "ray" not in left and "gradmix-ray" not in slurm.hosts.run(name, "ls", SCRATCH).stdout, left


def test_the_ranks_of_a_trial_share_it_between_the_nodes(slurm, tmp_path):
    """And those that are stopped early leave their place to the next."""
    folder, before = tmp_path / "sweep", slurm.hosts.sent("n2")
    job = submit(
        slurm, tmp_path, SWEEP, "--data", str(tmp_path / "data"), "--folder", str(folder), *SEARCH, "--early-stopping",
        "--num-samples", "3", "--epochs", "4", "--final-epochs", "0", "--ranks", "2", "--cpus", "0.9",
        "--base.batch-size", "96",
    )  # fmt: skip
    assert wait_for_end(slurm, job, 900) == "COMPLETED 0:0 restarts=0", log(tmp_path)
    assert "2 nodes, 2 CPUs" in log(tmp_path)
    trials = json.loads((folder / "result.json").read_text())["trials"]
    epochs = [trial["metrics"]["epoch"] for trial in trials]
    assert len(epochs) == 3 and max(epochs) == 4 and not any(trial["error"] for trial in trials)
    assert slurm.hosts.sent("n2") - before > 1e6, "no gradients came from the second node"


def test_a_dry_run_prints_the_command_and_its_environment(tmp_path):
    done = subprocess.run(
        ["bash", str(TRAIN), "--dry-run", "--protocol", "cifar10"],
        env={**os.environ, "GRADMIX_RANKS_PER_NODE": "4", "MASTER_PORT": "29500"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "export MASTER_PORT=29500" in done.stdout and "slots=4" in done.stdout
    assert done.stdout.strip().endswith(f"{ROOT}/trainer/train.py --protocol cifar10")
    assert "--launcher slurm" in done.stdout and not list(tmp_path.iterdir())


def test_a_dry_run_of_a_sweep_prints_its_commands_and_starts_nothing(slurm):
    allocated = slurm.run("salloc", "--quiet", "--nodes=2", "bash", str(SWEEP), "--dry-run", "--protocol", "cifar10")
    head, worker, search = [line for line in allocated.splitlines() if not line.startswith("export")]
    assert "--nodelist=n1" in head and "--head" in head and f"--node-ip-address={ADDRESSES['n1']}" in head
    assert "--nodes=1 --ntasks=1 --exclude=n1" in worker and "--head" not in worker
    assert re.search(rf"sweep.py --address {ADDRESSES['n1']}:\d+ --protocol cifar10", search)
    assert "RAY_AUTH_MODE=token" in allocated and not re.search("[0-9a-f]{64}", allocated)
