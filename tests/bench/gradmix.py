"""How fast the fused operations are, one table: `python -m tests.bench.gradmix`.

On a GPU, in bfloat16 and channels_last as in training: the bytes an operation has to move over its time, as a share of
the bandwidth of a copy on the device; the time of a launch; the ratios to PyTorch's body and to a loop over images. On
the CPU, in float32: the ratio of PyTorch's body to the loop. Everything compared is measured in turns, medians count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline import cli
from data_pipeline.dispatch import pytorch_body
from tests.test_gradmix import naive_gradmix
from trainer.gradmix import gradmix_views, layercam_peaks

GAMMA = 0.3
REPEATS = 20
# Inputs taken in turns, so that none is still in the cache of the GPU when it is read again.
SPREAD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table; `measure` returns ours, what it is compared with, and the ratio."""

    name: str
    measure: Callable[[], tuple[str, str, str]]
    needs_gpu: bool


def gradmix_rows() -> list[Row]:
    small, *_ = shapes = [(1024, 3, 32, 32), (1024, 3, 64, 64), (256, 3, 224, 224)]
    rows = [Row(f"gradmix_views {shape}, GB/s (copy)", partial(views_and_copy, shape), True) for shape in shapes]
    rows += [
        Row("layercam_peaks (1024, 512, 4, 4), GB/s (copy)", partial(peaks_and_copy, (1024, 512, 4, 4)), True),
        Row(f"gradmix_views {small}, µs of the host for a call (of an empty kernel)", partial(launch, small), True),
        Row(f"gradmix_views {small}, µs (PyTorch's body)", partial(views_and_pytorch, small), True),
        Row(f"gradmix_views {small}, µs (loop over images)", partial(views_and_loop, small, GAMMA, "cuda"), True),
    ]
    for gamma in (0.1, 0.3, 0.5):
        measure = partial(views_and_loop, (256, 3, 32, 32), gamma, "cpu")
        rows.append(Row(f"CPU: gradmix_views (256, 3, 32, 32), γ = {gamma}, µs (loop over images)", measure, False))
    return rows


# Each entry gives the rows of one operation or group of them.
GROUPS: tuple[Callable[[], list[Row]], ...] = (gradmix_rows,)


def batches(shape: tuple[int, ...], device: str, count: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`count` times images, partners and centers."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    partner = torch.arange(shape[0], device=device).roll(1)
    return [
        (
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last),
            partner,
            torch.rand(shape[0], 1, 2, device=device),
        )
        for _ in range(count)
    ]


def host_seconds(*actions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median time of each action, in turns; on a GPU until it has finished."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):
        for action, record in zip(actions, times):
            started = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append(time.perf_counter() - started)
    return [statistics.median(record[1:]) for record in times]


def device_seconds(action: Callable[..., object], inputs: list[tuple]) -> float:
    """Median time on the GPU of an action on one of `inputs`, without the host: a graph runs it on each in turn."""
    for arguments in inputs[:2]:
        action(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            action(*arguments)
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(inputs))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / device_seconds(target.copy_, [(source,)])


def against_copy(moved: float, seconds: float) -> tuple[str, str, str]:
    bandwidth = copy_bandwidth()
    return f"{moved / seconds / 1e9:,.0f}", f"{bandwidth / 1e9:,.0f}", f"{moved / seconds / bandwidth:.0%}"


def views_and_copy(shape: tuple[int, ...]) -> tuple[str, str, str]:
    from trainer.gradmix import kernels

    size = 2 * torch.Size(shape).numel()
    inputs = batches(shape, "cuda", max(SPREAD_BYTES // size, 2))
    seconds = device_seconds(partial(kernels.gradmix_views, gamma=GAMMA), inputs)
    return against_copy(2 * size, seconds)


def peaks_and_copy(shape: tuple[int, ...]) -> tuple[str, str, str]:
    inputs = [
        (maps.relu(), maps) for maps, *_ in batches(shape, "cuda", SPREAD_BYTES // torch.Size(shape).numel() // 4)
    ]
    return against_copy(4 * torch.Size(shape).numel(), device_seconds(layercam_peaks, inputs))


def launch(shape: tuple[int, ...]) -> tuple[str, str, str]:
    """The time until a call returns, the GPU being idle; the checks of values on the device are part of it."""
    (arguments,) = batches(shape, "cuda")
    empty = torch.empty(0, device="cuda")
    times: list[list[float]] = [[], []]
    for _ in range(100):
        for action, record in zip((lambda: gradmix_views(*arguments, GAMMA), lambda: empty.new_zeros(1)), times):
            torch.cuda.synchronize()
            started = time.perf_counter()
            action()
            record.append(time.perf_counter() - started)
    return compared(*(statistics.median(record[10:]) for record in times))


def views_and_pytorch(shape: tuple[int, ...]) -> tuple[str, str, str]:
    inputs = batches(shape, "cuda", 8)
    fused = device_seconds(partial(gradmix_views, gamma=GAMMA), inputs)
    with pytorch_body():
        return compared(fused, device_seconds(partial(gradmix_views, gamma=GAMMA), inputs))


def views_and_loop(shape: tuple[int, ...], gamma: float, device: str) -> tuple[str, str, str]:
    (arguments,) = batches(shape, device)
    return compared(
        *host_seconds(
            lambda: gradmix_views(*arguments, gamma),
            lambda: naive_gradmix(*arguments, [gamma] * shape[0]),
            repeats=REPEATS if device == "cpu" else 3,
        )
    )


def compared(ours: float, reference: float) -> tuple[str, str, str]:
    return f"{ours * 1e6:,.0f}", f"{reference * 1e6:,.0f}", f"{reference / ours:.1f}"


def main() -> None:
    # The C library gives memory back to the system after every use until it has seen a large piece come and go. A
    # process that has run for a while has; the page faults of one that has not are not what is compared.
    torch.empty(28 * 2**20, dtype=torch.uint8)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "no GPU"
    threads = torch.get_num_threads()
    title = f"{device}, {threads} CPU thread{'s' if threads > 1 else ''}, torch {torch.__version__}, γ = {GAMMA}"
    table = Table("", "ours", "reference", "ratio", title=title)
    for rows in GROUPS:
        for row in rows():
            table.add_row(row.name, *(row.measure() if gpu or not row.needs_gpu else ("not measured (no GPU)", "", "")))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
