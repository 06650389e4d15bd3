"""What the benchmarks of the fused operations share: how time is taken, and a row of their table."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

REPEATS = 20
# Inputs taken in turns, so that none is still in the cache of the GPU when it is read again.
SPREAD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Figures:
    """What a row measured: seconds of ours, the bytes it has to move, seconds of what it is compared with."""

    seconds: float
    moved: int | None = None
    reference: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    measure: Callable[[], Figures]
    needs_gpu: bool = True


def host_seconds(*actions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median time of each action, in turns, so that none finds its code and data in the caches; on a GPU until it has
    finished."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):
        for action, record in zip(actions, times):
            started = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append(time.perf_counter() - started)
    return [statistics.median(record[1:]) for record in times]


def repeated_seconds(*actions: Callable[[], object]) -> list[float]:
    """Median time of each action on the CPU, called again and again: what it needs is in the caches."""
    return [
        Timer("action()", globals={"action": action}).blocked_autorange(min_run_time=1).median for action in actions
    ]


def launch_seconds(*actions: Callable[[], object]) -> list[float]:
    """Median time until each action returns to the host, the GPU being idle."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(110):
        for action, record in zip(actions, times):
            torch.cuda.synchronize()
            started = time.perf_counter()
            action()
            record.append(time.perf_counter() - started)
    return [statistics.median(record[10:]) for record in times]


def device_seconds(action: Callable[..., object], inputs: list[tuple]) -> float:
    """Median time on the GPU of an action on one of `inputs`, without the host: a graph runs it on each in turn."""
    warm_up()
    for arguments in inputs[:2]:
        action(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, or all would be written to one place, which never leaves the cache.
        results = [action(*arguments) for arguments in inputs]
    times = []
    for _ in range(REPEATS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(results))
    return statistics.median(times[1:])


def spread(moved: int) -> int:
    """How many inputs to take in turns of an action that moves so many bytes."""
    return max(SPREAD_BYTES // moved, 2)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB on the device."""
    source = torch.randint(0, 256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return 2 * 2**31 / device_seconds(copy, [()] * 10)


def warm_up() -> None:
    """A GPU that was idle runs slowly at first."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    started = time.perf_counter()
    while time.perf_counter() - started < 0.3:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()
