"""Two hosts without SLURM: DeepSpeed over ssh, and torchrun; a rank that dies, and a cable that is pulled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest

from tests.cluster.hosts import ADDRESSES, Hosts, environment
from tests.cluster.training import assert_close, options, rank_processes, steps_done, weights

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and sshd need root"),
]
LONG = ["--epochs", "400"]


@pytest.fixture
def hosts(tmp_path):
    started = Hosts(tmp_path)
    # What DeepSpeed does not hand on by itself.
    (started.home / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    yield started
    started.stop()


def launch(hosts: Hosts, launcher: str, *arguments: str) -> list[subprocess.Popen]:
    """Training on both hosts, with what it says in log-*.txt."""
    if launcher == "deepspeed":
        command = ["deepspeed", "--hostfile", f"{hosts.folder}/hostfile", "--master_addr", ADDRESSES["n1"]]
        command += ["--module", "trainer.train", *arguments]
        return [hosts.start("n1", *command, log=hosts.folder / "log-n1.txt", **environment())]
    command = [
        "torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400", "-m",
        "trainer.train", *arguments,
    ]  # fmt: skip
    return [hosts.start(name, *command, log=hosts.folder / f"log-{name}.txt", **environment()) for name in ADDRESSES]


def said(hosts: Hosts) -> str:
    return "".join(path.read_text() for path in sorted(hosts.folder.glob("log-*.txt")))


def wait(condition, hosts: Hosts, what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s: {said(hosts)[-6000:]}"
        time.sleep(0.5)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_hosts_train_what_one_process_does(launcher, hosts, digits, alone):
    for process in launch(hosts, launcher, *options(digits, hosts.folder)):
        assert process.wait(240) == 0, said(hosts)
    assert "2 x cpu" in said(hosts)
    assert_close(weights(hosts.folder), alone)


@pytest.mark.parametrize(
    ("launcher", "victim", "named"),
    [
        ("deepspeed", 1, "error: rank 1 on n2 has died"),
        ("deepspeed", 0, "error: rank 0 on n1 has died"),
        # Of those on its own host torchrun is the first to know.
        ("torchrun", 0, r"host +: n1\n +rank +: 0 .*\n +exitcode +: -9"),
    ],
)
def test_a_rank_that_is_killed_ends_the_others_and_is_named(launcher, victim, named, hosts, digits):
    launched = launch(hosts, launcher, *options(digits, hosts.folder), *LONG)
    wait(lambda: steps_done(hosts.folder) >= 7, hosts, "first checkpoint", 180)
    subprocess.run(["kill", "-9", str(rank_processes(hosts.folder)[victim])], check=True)
    wait(lambda: all(process.poll() is not None for process in launched), hosts, "end", 60)
    assert all(process.returncode != 0 for process in launched)
    assert re.search(named, said(hosts)), said(hosts)
    assert not rank_processes(hosts.folder)


def test_when_the_cable_is_pulled_both_ranks_end_and_the_same_run_goes_on_alone(hosts, digits):
    launch(hosts, "deepspeed", *options(digits, hosts.folder), *LONG)
    wait(lambda: steps_done(hosts.folder) >= 7, hosts, "first checkpoint", 180)
    hosts.cut()
    # Neither host is told; without listening for each other they would wait for half an hour.
    wait(lambda: not rank_processes(hosts.folder), hosts, "end of the ranks", 90)
    assert "error: rank 1 on n2 has died, or its host cannot be reached" in said(hosts)
    done = steps_done(hosts.folder)
    command = ["python", "-m", "trainer.train", *options(digits, hosts.folder), *LONG]
    alone = hosts.start("n1", *command, log=hosts.folder / "log-alone.txt", **environment())
    wait(lambda: steps_done(hosts.folder) > done, hosts, "progress", 120)
    alone.kill()
    assert "going on from" in (hosts.folder / "log-alone.txt").read_text()
