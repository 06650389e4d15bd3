"""How fast the parts are, as ratios measured in one run: `python -m tests.bench.pipeline --data data/mnist-0-32px-raw`.

1. FFCV's images/s against torch's DataLoader over the same images, both giving shuffled uint8 batches.
2. Our batched views against torchvision's transforms per image in a DataLoader with two workers.
3. A GradMix step against a SimCLR step of the same batch: three views against two, so 1.5 if all else were free.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data_pipeline import cli
from data_pipeline.beton import Build, read_build
from data_pipeline.loader import Partitions, StreamLoader, load_all
from data_pipeline.views import ViewConfig, draw_parameters, render_view
from trainer.config import EncoderConfig, MixingConfig
from trainer.engine import join_ranks
from trainer.recipes import recipe
from trainer.step import Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure on."""

    data: Path = Path("data/digits-0-16px-raw")
    """Folder of one build."""
    batch_size: int = 256
    """Images of a batch."""
    width: int = 16
    """Width of the encoder in the third measurement; 64 is the full network."""
    repeats: int = 5
    """Measurements of each; the median counts."""


class Images(Dataset):
    """The decoded images as a map-style data set, with transforms on each."""

    def __init__(self, images: torch.Tensor, transform: Callable | None = None) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = self.images[index].permute(2, 0, 1)
        return image if self.transform is None else (self.transform(image), self.transform(image))


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    action()  # compilation, caches and worker start-up of the first time are not what is compared
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def loading(config: BenchConfig, build: Build, images: torch.Tensor) -> tuple[float, float]:
    """Images/s of FFCV and of torch's DataLoader (two workers, started once)."""
    stream = StreamLoader(Partitions(build, CPU, workers=2), config.batch_size)
    torch_loader = DataLoader(
        Images(images), config.batch_size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )
    count = len(stream) * config.batch_size
    ours = median_seconds(lambda: sum(len(batch.labels) for batch in stream.epoch(0)), config.repeats)
    theirs = median_seconds(lambda: sum(len(batch) for batch in torch_loader), config.repeats)
    return count / ours, count / theirs


def views(config: BenchConfig, images: torch.Tensor) -> tuple[float, float]:
    """Images/s, two views each, of our batched augmentation and of torchvision's per image with two workers."""
    settings, size, channels = ViewConfig(), images.shape[1], images.shape[3]
    mean, std = [0.5] * channels, [0.25] * channels
    steps = max(len(images) // config.batch_size, 1)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1) if channels == 3 else v2.ColorJitter(0.4, 0.4)
    gray = [v2.RandomGrayscale(0.2)] if channels == 3 else []
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], 0.8),
            *gray,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    torch_loader = DataLoader(
        Images(images, transform), config.batch_size, num_workers=2, drop_last=True, persistent_workers=True
    )

    def ours() -> None:
        for step in range(steps):
            index = torch.arange(step * config.batch_size, min((step + 1) * config.batch_size, len(images)))
            for view in (0, 1):
                parameters = draw_parameters(settings, (size, size), index, seed=0, epoch=0, view=view)
                render_view(images[index], parameters, size=size, mean=mean, std=std)

    count = steps * min(config.batch_size, len(images))
    theirs = median_seconds(lambda: sum(1 for _ in torch_loader), config.repeats)
    return count / median_seconds(ours, config.repeats), count / theirs


def steps(config: BenchConfig, build: Build) -> tuple[float, float]:
    """Seconds of a GradMix step and of a SimCLR step (with SupCon, as in training) of the same batch, interleaved."""
    base = dataclasses.replace(
        recipe(build.protocol.name),
        batch_size=config.batch_size,
        encoder=EncoderConfig(width=config.width),
        data=config.data,
    )
    device = join_ranks()
    trainers = [
        Trainer(dataclasses.replace(base, mixing=MixingConfig(kind=kind)), Partitions(build, device))
        for kind in ("gradmix", "none")
    ]
    times: list[list[float]] = [[], []]
    for repeat in range(config.repeats + 1):
        for trainer, record in zip(trainers, times):
            batch = next(trainer.loader.epoch(repeat))
            started = time.perf_counter()
            float(trainer.train_step(batch, repeat, 0)[0])
            record.append(time.perf_counter() - started)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def main() -> None:
    config = cli.parse(BenchConfig, prog="python -m tests.bench.pipeline", description=__doc__.split("\n")[0])
    build = read_build(config.data)
    images = load_all(build, "train", device=CPU).images
    if len(images) < config.batch_size:
        config = dataclasses.replace(config, batch_size=len(images) // 2)
    np.random.seed(0)
    table = Table(
        "",
        "ours",
        "reference",
        "ratio",
        title=f"{config.data}: {len(images):,} images, {torch.get_num_threads()} threads",
    )
    ours, theirs = loading(config, build, images)
    table.add_row("decode and shuffle, images/s (DataLoader)", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}")
    ours, theirs = views(config, images)
    table.add_row("two views, images/s (torchvision)", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}")
    ours, theirs = steps(config, build)
    table.add_row("GradMix step, s (SimCLR step)", f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
