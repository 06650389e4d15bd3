"""Run a function on several gloo ranks, each its own process, and collect what they return."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_IMPORTED = ["tests.ranks", "trainer.train", "deepspeed"]


def context() -> Any:
    """Where processes start with everything imported, which would take each of them several seconds of its own."""
    started = mp.get_context("forkserver")
    started.set_forkserver_preload(_IMPORTED)
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("DS_ACCELERATOR")
        if before is not None:
            os.environ["DS_ACCELERATOR"] = before
    return started


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on each rank; its results by rank. The function must be importable, not a lambda."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        context()
        arguments = (function, args, world_size, port, folder)
        mp.start_processes(_rank_main, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, function: Callable[..., Any], args: tuple, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
