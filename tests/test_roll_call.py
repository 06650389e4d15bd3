"""A rank that dies, hangs or fails: the others end by themselves, and say which one it was."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.cli import Preempted
from tests.ranks import context
from trainer import roll_call as module
from trainer.roll_call import roll_call

RANKS = 3


def _on_a_rank(rank: int, port: int, folder: Path, happens: str, victim: int) -> None:
    sys.stderr = (folder / str(rank)).open("w")
    module._PERIOD, module._PATIENCE, module._HURRY = 0.3, 4, 3
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    with roll_call():
        if rank == victim:
            time.sleep(1)
            if happens == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            elif happens == "hangs":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif happens == "fails":
                raise ValueError("no such\nthing")
            raise Preempted  # or leaves in good order
        if happens == "leaves":
            time.sleep(6)
        else:
            dist.all_reduce(torch.ones(1))
    sys.stderr.write("left in peace")


def _run(folder: Path, happens: str, victim: int) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said, of the ranks that are left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [(rank, port, folder, happens, victim) for rank in range(RANKS)]
    ranks = [context().Process(target=_on_a_rank, args=args) for args in arguments]
    for process in ranks:
        process.start()
    try:
        others = [process for rank, process in enumerate(ranks) if rank != victim]
        for process in others:
            process.join(60)
        return [p.exitcode for p in others], [(folder / str(r)).read_text() for r in range(RANKS) if r != victim]
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize(("happens", "victim"), [("dies", 2), ("dies", 0), ("hangs", 1), ("hangs", 0), ("fails", 2)])
def test_the_others_end_and_name_the_rank(happens, victim, tmp_path):
    codes, said = _run(tmp_path, happens, victim)
    assert codes == [1, 1], (codes, said)
    name = f"error: rank {victim} on {socket.gethostname()} "
    lines = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(name)  # once, not by everyone
    reason = "stopped (ValueError: no such thing)" if happens == "fails" else "has died, or its host cannot be reached"
    assert reason in lines[0] and lines[0].endswith("the same command goes on from the last checkpoint")


def test_ranks_that_have_more_to_do_are_let_do_it(tmp_path):
    codes, said = _run(tmp_path, "leaves", 2)
    assert codes == [0, 0] and said == ["left in peace"] * 2


def test_one_process_alone_calls_nobody():
    before = threading.active_count()
    with roll_call():
        assert threading.active_count() == before
