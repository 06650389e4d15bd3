"""How fast the fused operations are, one table: `python -m tests.bench.gradmix --out gradmix.json`.

On a GPU, in bfloat16 and channels_last as in training: the time of a launch without the host, the bytes that it has to
move over this time, and that as a share of the bandwidth of a copy on the device; the time of a call on the host; the
ratios to PyTorch's body and to a loop over images. On the CPU, in float32 and one thread: PyTorch's bodies against a
loop over images and against the augmentations of others. Medians count. What is compared is measured in turns; on the
CPU the patches are also called again and again, as torch.utils.benchmark does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline import cli
from data_pipeline.dispatch import pytorch_body
from tests.bench.timing import (
    Figures,
    Row,
    copy_bandwidth,
    device_seconds,
    host_seconds,
    launch_seconds,
    repeated_seconds,
    spread,
)
from tests.bench.views import view_rows
from tests.loops import naive_gradmix
from trainer.gradmix import gradmix_views, layercam_peaks

GAMMA = 0.3
SHAPES = (1024, 3, 32, 32), (1024, 3, 64, 64), (256, 3, 224, 224)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Where to."""

    out: Path | None = None
    """JSON file that the figures are written to."""


def gradmix_rows() -> list[Row]:
    small = SHAPES[0]
    rows = [Row(f"gradmix_views {shape}", partial(views_kernel, shape, False)) for shape in SHAPES]
    rows += [Row(f"gradmix_views {shape}, γ per image", partial(views_kernel, shape, True)) for shape in SHAPES]
    rows += [
        Row("layercam_peaks (1024, 512, 4, 4)", partial(peaks, (1024, 512, 4, 4))),
        Row(f"gradmix_views {small}, the host's call (an empty kernel)", partial(views_call, small)),
        Row(f"gradmix_views {small} (PyTorch's body)", partial(views_and_pytorch, small)),
        Row(
            f"gradmix_views {small} with its call (loop over images)",
            partial(views_and_loop, small, GAMMA, partial(host_seconds, repeats=3), "cuda"),
        ),
    ]
    for gamma in (0.1, 0.3, 0.5):
        name = f"CPU: gradmix_views (256, 3, 32, 32), γ = {gamma}"
        measure = partial(views_and_loop, (256, 3, 32, 32), gamma)
        rows.append(Row(f"{name} (loop over images)", partial(measure, repeated_seconds), False))
        rows.append(Row(f"{name}, in turns with it", partial(measure, host_seconds), False))
    return rows


# Each entry gives the rows of one operation or group of them.
GROUPS: tuple[Callable[[], list[Row]], ...] = (gradmix_rows, view_rows)


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


def views_kernel(shape: tuple[int, ...], gamma_per_image: bool) -> Figures:
    moved = 2 * 2 * torch.Size(shape).numel()
    gamma = torch.full(shape[:1], GAMMA, device="cuda") if gamma_per_image else GAMMA
    return Figures(device_seconds(partial(gradmix_views, gamma=gamma), batches(shape, "cuda", spread(moved))), moved)


def peaks(shape: tuple[int, ...]) -> Figures:
    moved = 2 * 2 * torch.Size(shape).numel()
    # As training has them: maps in channels_last, and the gradients that autograd keeps of them contiguous.
    inputs = [(maps.relu(), maps.contiguous()) for maps, *_ in batches(shape, "cuda", spread(moved))]
    return Figures(device_seconds(layercam_peaks, inputs), moved)


def views_call(shape: tuple[int, ...]) -> Figures:
    (arguments,) = batches(shape, "cuda")
    empty = torch.empty(0, device="cuda")
    ours, reference = launch_seconds(lambda: gradmix_views(*arguments, GAMMA), lambda: empty.new_zeros(1))
    return Figures(ours, reference=reference)


def views_and_pytorch(shape: tuple[int, ...]) -> Figures:
    inputs = batches(shape, "cuda", 8)
    fused = device_seconds(partial(gradmix_views, gamma=GAMMA), inputs)
    with pytorch_body():
        return Figures(fused, reference=device_seconds(partial(gradmix_views, gamma=GAMMA), inputs))


def views_and_loop(
    shape: tuple[int, ...], gamma: float, seconds: Callable[..., list[float]], device: str = "cpu"
) -> Figures:
    (arguments,) = batches(shape, device)
    ours, reference = seconds(
        lambda: gradmix_views(*arguments, gamma), lambda: naive_gradmix(*arguments, [gamma] * shape[0])
    )
    return Figures(ours, reference=reference)


def record(figures: Figures) -> dict[str, float]:
    """What the table shows of a row."""
    made = {"microseconds": figures.seconds * 1e6}
    if figures.moved is not None:
        rate = figures.moved / figures.seconds
        made |= {"gb_per_s": rate / 1e9, "share_of_copy": rate / copy_bandwidth()}
    if figures.reference is not None:
        made |= {"reference_microseconds": figures.reference * 1e6, "ratio": figures.reference / figures.seconds}
    return made


_COLUMNS = {
    "microseconds": "{:,.1f}",
    "gb_per_s": "{:,.0f}",
    "share_of_copy": "{:.0%}",
    "reference_microseconds": "{:,.1f}",
    "ratio": "{:,.1f}",
}


def main() -> None:
    config = cli.parse(BenchConfig, prog="python -m tests.bench.gradmix", description=__doc__.split("\n")[0])
    # The C library gives memory back to the system after every use until it has seen a large piece come and go. A
    # process that has run for a while has; the page faults of one that has not are not what is compared.
    torch.empty(28 * 2**20, dtype=torch.uint8)
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "no GPU"
    copy = f", a copy moves {copy_bandwidth() / 1e9:,.0f} GB/s" if gpu else ""
    table = Table("(compared with)", "µs", "GB/s", "of a copy", "compared, µs", "ratio")
    table.title = f"{device}{copy}, one CPU thread, torch {torch.__version__}, γ = {GAMMA}"
    results: dict[str, dict[str, float]] = {}
    for rows in GROUPS:
        for row in rows():
            if row.needs_gpu and not gpu:
                table.add_row(row.name, "not measured (no GPU)")
                continue
            results[row.name] = made = record(row.measure())
            table.add_row(row.name, *(form.format(made[key]) if key in made else "" for key, form in _COLUMNS.items()))
    Console(width=None if Console().is_terminal else 150).print(table)
    if config.out is not None:
        header = {"device": device, "torch": torch.__version__, "gamma": GAMMA}
        if gpu:
            header["copy_gb_per_s"] = copy_bandwidth() / 1e9
        config.out.write_text(json.dumps({**header, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
