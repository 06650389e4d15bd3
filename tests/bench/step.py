"""How fast a whole training step is on a GPU, one table: `python -m tests.bench.step --out step.json`.

ResNet-18 in bfloat16 and channels_last through the real trainer, on images that are resident on the device:

    encoder   forward, backward and optimizer alone on fixed views, as many as a SimCLR or a GradMix step has
    SimCLR    two views of each image, SupCon + SimCLR (eq. 3)
    GradMix   three views, the patch, the peaks (eq. 8)
    plain     GradMix as one would first write it: a DataLoader with torchvision's transforms, hooks for LayerCAM, a
              loop over the images for the patches

and where the time of a GradMix step goes, against what the arithmetic and the bytes of the convolutions cost at the
rates that this very GPU reaches. `--compile` compiles the encoder. Images are noise: nothing here depends on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from data_pipeline import cli
from data_pipeline.beton import Build, FileRecord, Manifest
from data_pipeline.loader import Batch, Partitions
from data_pipeline.protocols import Protocol
from trainer.config import EncoderConfig, MixingConfig
from trainer.engine import join_ranks
from trainer.losses import objective
from trainer.mixing import draw_gamma, partners
from trainer.recipes import recipe
from trainer.step import Trainer, new_encoder
from trainer.train import versions

# Steps before any that is timed, and how often so many are timed together.
WARM_UP, REPEATS = 5, 3


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What to measure."""

    batch_size: int = 1024
    """Images of a step."""
    image_size: int = 32
    """Their side, pixels."""
    width: int = 64
    """Width of the encoder."""
    compile: bool = False
    """Compile the encoder."""
    steps: int = 20
    """Steps that are timed together, three times; the median counts."""
    plain_steps: int = 3
    """Steps of the plain pipeline that are timed; 0 leaves it out."""
    plain_workers: int = os.cpu_count() or 1
    """Worker processes of the plain pipeline's DataLoader."""
    out: Path | None = None
    """JSON file that the figures are written to."""


class NoiseImages(Partitions):
    """Training images of a CIFAR-10 build that are noise of any size."""

    def __init__(self, device: torch.device, size: int, count: int) -> None:
        protocol = Protocol("cifar10", 0)
        classes = len(protocol.known)
        record = FileRecord(count=count, class_counts=(count // classes,) * classes, skipped=(), bytes=0, sha256="")
        manifest = Manifest(
            format=0,
            protocol=protocol.to_dict(),
            split_hash=protocol.split_hash,
            sources={},
            image_size=size,
            channels=3,
            write_mode="raw",
            quality=0,
            class_names=tuple(map(str, range(classes))),
            files={"train": record},
        )
        super().__init__(Build(Path("noise"), manifest), device)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
        indices = torch.arange(count)
        self._kept["train"] = Batch(*(t.to(device) for t in (images, indices % classes, indices)))


def forever(trainer: Trainer) -> Iterator[tuple[Batch, int, int]]:
    epoch = 0
    while True:
        for step, batch in enumerate(trainer.loader.epoch(epoch)):
            yield batch, epoch, step
        epoch += 1


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_step(step: Callable[[], object], steps: int, repeats: int = REPEATS) -> float:
    """Median over `repeats` of the time of `steps` steps, over their number."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(repeats):
        synchronise()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise()
        times.append((time.perf_counter() - started) / steps)
    return statistics.median(times)


def encoder_alone(trainer: Trainer, views: int) -> Callable[[], None]:
    """Forward, backward and optimizer on fixed views (views, 3, h, w)."""
    size = trainer.build.manifest.image_size
    dtype = trainer.autocast_dtype or torch.float32
    fixed = torch.randn(views, 3, size, size, device=trainer.device).to(dtype, memory_format=torch.channels_last)
    direction = torch.randn(views, trainer.config.encoder.embedding_dim, device=trainer.device)

    def step() -> None:
        embeddings = trainer.engine(fixed, ()).embeddings
        trainer.engine.backward((embeddings * direction).sum())
        trainer.engine.step()

    return step


def compile_patches(trainer: Trainer, steps: int) -> None:
    """Render the views of the first `steps` steps: patches of some sizes are a kernel of their own, and compiling one
    would otherwise be part of the step that is the first to have such a size."""
    for batch, epoch, step in itertools.islice(forever(trainer), steps):
        views = (trainer.parameters(batch, epoch, number) for number in (0, 1))
        trainer.mixed_views(batch, *views, epoch, step)


def training_step(trainer: Trainer) -> Callable[[], None]:
    batches = forever(trainer)
    return lambda: trainer.train_step(*next(batches))


class TransformedImages(Dataset):
    """Two views of each image by torchvision."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.cpu().permute(0, 3, 1, 2), labels.cpu()
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(images.shape[1], (0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        image = self.images[index]
        return self.transform(image), self.transform(image), self.labels[index], index


def plain_step(trainer: Trainer, workers: int) -> Callable[[], None]:
    """A GradMix step from the usual parts."""
    config, device, data = trainer.config, trainer.device, trainer.partitions["train"]
    encoder: nn.Module = new_encoder(config, trainer.build).to(device)
    optimizer = torch.optim.Adam(encoder.parameters(), config.optimizer.learning_rate)
    peaks = torch.rand(len(data.labels), 2)
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept["map"] = output
        output.register_hook(lambda gradient: kept.update(gradient=gradient))

    encoder.stages[-1].register_forward_hook(keep)
    loader = DataLoader(
        TransformedImages(data.images, data.labels),
        config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )

    def batches() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    source = batches()

    def step() -> None:
        first, second, labels, indices = next(source)
        first, second, labels = (tensor.to(device, non_blocking=True) for tensor in (first, second, labels))
        n, size = len(first), first.shape[2]
        gamma = draw_gamma(config.mixing, indices, seed=0, epoch=0, step=0)
        side = max(round(gamma * size), 1)
        mixed = first.clone()
        for i, partner in enumerate(partners(n, torch.device("cpu")).tolist()):
            patch = F.interpolate(first[partner : partner + 1], (side, side), mode="bilinear", antialias=True)
            top, left = (min(max(int(p * size - side / 2), 0), size - side) for p in peaks[indices[i]].tolist())
            mixed[i, :, top : top + side, left : left + side] = patch[0]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            encoded = encoder(torch.cat([first, second, mixed]))
        loss = objective(encoded.embeddings, labels, gamma, config.objective).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        activation = (kept["gradient"][:n].relu() * kept["map"][:n]).sum(dim=1).relu()
        best = activation.flatten(1).argmax(dim=1)
        width = activation.shape[2]
        peaks[indices] = torch.stack([(best // width + 0.5) / width, (best % width + 0.5) / width], dim=1).cpu()

    return step


def host_waits(step: Callable[[], None], steps: int) -> list[str]:
    """Where in so many steps the host waited for the device."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return [f"{place} ×{count}" for place, count in places.most_common()]


# By a part of the kernel's name, the first that fits.
_KINDS = {
    "views and patches": ("_render_views", "_gradmix_views"),
    "peaks": ("_layercam_peaks",),
    "random numbers": ("_uniforms",),
    "optimizer": ("multi_tensor", "Adam"),
    "batch norm, ReLU, addition": ("triton_", "batch_norm", "bn_", "threshold", "clamp_min"),
    "convolution": (
        "conv", "cudnn", "xmma", "implicit", "cutlass", "nvjet", "gemm", "wgrad", "dgrad", "fprop", "sm90_", "sm80_",
    ),
    "copies": ("Memcpy", "Memset", "copy_", "nchwToNhwc", "nhwcToNchw"),
}  # fmt: skip


def where_time_goes(
    step: Callable[[], None], steps: int
) -> tuple[dict[str, float], list[tuple[str, float, int]], float]:
    """Milliseconds a step of each kind of kernel, of the longest kernels with how often they run, and of all."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.name:  # not a range of kernels
            kernels[event.name] += event.self_device_time_total / 1e3 / steps
            calls[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, milliseconds in kernels.items():
        kind = next(
            (kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "losses and others"
        )
        kinds[kind] += milliseconds
    longest = [(name, milliseconds, calls[name] // steps) for name, milliseconds in kernels.most_common(25)]
    return dict(kinds.most_common()), longest, sum(kernels.values())


def rates() -> tuple[float, float]:
    """FLOP/s of a bfloat16 matrix product of side 8192 and bytes/s, read and written, of a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = seconds_per_step(lambda: a @ b, 10)
    copy = seconds_per_step(lambda: target.copy_(source), 10)
    return 2 * 8192**3 / product, 2 * 2**31 / copy


def floors(trainer: Trainer, views: int) -> tuple[float, float]:
    """FLOPs and fewest bytes of the encoder's forward and backward pass over so many views.

    Each convolution reads its input and writes its output once; backward it reads the output's gradient and the input,
    and writes the input's gradient; everything between convolutions is taken to be fused into them.
    """
    size, few = trainer.build.manifest.image_size, 4
    encoder = new_encoder(trainer.config, trainer.build)
    elements = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += 3 * inputs[0].numel() + 2 * output.numel()

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(few, 3, size, size)).embeddings.sum().backward()
    return counter.get_total_flops() / few * views, 2 * elements / few * views


def measure(config: StepConfig) -> dict[str, Any]:
    device = join_ranks()
    data = NoiseImages(device, config.image_size, 16 * config.batch_size)
    base = dataclasses.replace(
        recipe("cifar10"),
        batch_size=config.batch_size,
        encoder=EncoderConfig(width=config.width),
        compile=config.compile,
    )
    gradmix = Trainer(base, data)
    simclr = Trainer(dataclasses.replace(base, mixing=MixingConfig(kind="none")), data)
    n, steps = config.batch_size, config.steps
    compile_patches(gradmix, WARM_UP + REPEATS * steps)
    milliseconds = {
        "encoder alone, two views": 1e3 * seconds_per_step(encoder_alone(simclr, 2 * n), steps),
        "encoder alone, three views": 1e3 * seconds_per_step(encoder_alone(gradmix, 3 * n), steps),
        "SimCLR step": 1e3 * seconds_per_step(training_step(simclr), steps),
        "GradMix step": 1e3 * seconds_per_step(training_step(gradmix), steps),
    }
    result: dict[str, Any] = {"milliseconds": milliseconds}
    if device.type == "cuda":
        result["host_waits_in_10_steps"] = host_waits(training_step(gradmix), 10)
        kinds, longest, total = where_time_goes(training_step(gradmix), 5)
        result |= {"kernel_milliseconds": kinds, "all_kernels": total, "longest_kernels": longest}
        flops, moved = floors(gradmix, 3 * n)
        flop_rate, bandwidth = rates()
        result |= {
            "floor_arithmetic_milliseconds": 1e3 * flops / flop_rate,
            "floor_bytes_milliseconds": 1e3 * moved / bandwidth,
            "bf16_tflops": flop_rate / 1e12,
            "copy_gb_per_s": bandwidth / 1e9,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    if config.plain_steps:
        step = plain_step(gradmix, config.plain_workers)
        milliseconds["plain step"] = 1e3 * seconds_per_step(step, config.plain_steps, repeats=1)
    return result


def table(config: StepConfig, result: dict[str, Any], device: str) -> Table:
    shape = f"({config.batch_size}, 3, {config.image_size}, {config.image_size})"
    compiled = ", compiled" if config.compile else ""
    made = Table("", "ms a step", "images/s", "views/s", title=f"{shape}, width {config.width}{compiled}, {device}")
    views = {"encoder alone, two views": 2, "SimCLR step": 2}
    for name, milliseconds in result["milliseconds"].items():
        rate = config.batch_size / milliseconds * 1e3
        made.add_row(name, f"{milliseconds:.2f}", f"{rate:,.0f}", f"{views.get(name, 3) * rate:,.0f}")
    return made


def main() -> None:
    config = cli.parse(StepConfig, prog="python -m tests.bench.step", description=__doc__.split("\n")[0])
    result = measure(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    console = Console(width=130, soft_wrap=True)
    console.print(table(config, result, device))
    for name, value in result.items():
        if name == "longest_kernels":
            for kernel, milliseconds, calls in value:
                console.print(f"    {milliseconds:8.3f} ms  ×{calls:<4} {kernel[:100]}", markup=False)
        elif name != "milliseconds":
            console.print(f"{name}: {value}", markup=False)
    if config.out is not None:
        settings = {**dataclasses.asdict(config), "out": None}
        record = {"device": device, "versions": versions(), "config": settings, **result}
        config.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
