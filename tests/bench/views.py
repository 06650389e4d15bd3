"""How fast views are rendered: `python -m tests.bench.views`.

1. Two views of 256 images of 32 pixels by the PyTorch body on one CPU thread, against torchvision's transforms of one
   image after the other and, where kornia is installed, its augmentation of the batch.
2. On a GPU, all three views by the kernel, as a share of the time that a copy of as many bytes takes, and the memory
   that it needs besides its result.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import v2

from data_pipeline.views import ViewConfig, draw_parameters, render_views

MEAN, STD = (0.5,) * 3, (0.25,) * 3
REPEATS = 9


def batch(n: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, size, size, 3) and their indices."""
    images = torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return images.to(device), torch.arange(n, device=device)


def median_milliseconds(action: Callable[[], object]) -> float:
    action()  # caches and first allocations are not what is compared
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def two_views(images: Tensor, indices: Tensor) -> Tensor:
    size = images.shape[1]
    first, second = (
        draw_parameters(ViewConfig(), (size, size), indices, seed=0, epoch=0, view=view) for view in (0, 1)
    )
    return render_views(images, first, second, size=size, mean=MEAN, std=STD)


def torchvision_views(images: Tensor) -> Tensor:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(images.shape[1], (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return torch.stack([transform(image) for _ in range(2) for image in images.permute(0, 3, 1, 2)])


def kornia_augmentation(size: int) -> Callable[[Tensor], Tensor]:
    import kornia.augmentation as kornia

    augment = kornia.AugmentationSequential(
        kornia.RandomResizedCrop((size, size), (0.2, 1.0)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )

    def views(images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        return torch.cat([augment(pixels), augment(pixels)])

    return views


def on_the_cpu() -> Table:
    torch.set_num_threads(1)
    images, indices = batch(256, 32, "cpu")
    ours = median_milliseconds(lambda: two_views(images, indices))
    table = Table("", "ms", "ratio", title=f"two views of (256, 3, 32, 32), 1 CPU thread, median of {REPEATS}")
    table.add_row("render_views with its parameters", f"{ours:.0f}", "1.0")
    theirs = median_milliseconds(lambda: torchvision_views(images))
    table.add_row("torchvision, image by image", f"{theirs:.0f}", f"{theirs / ours:.1f}")
    if importlib.util.find_spec("kornia"):
        augment = kornia_augmentation(images.shape[1])
        theirs = median_milliseconds(lambda: augment(images))
        table.add_row("kornia, batched", f"{theirs:.0f}", f"{theirs / ours:.1f}")
    else:
        table.add_row("kornia, batched", "not installed", "")
    return table


def median_gpu_milliseconds(action: Callable[[], object]) -> float:
    for _ in range(3):
        action()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def on_the_gpu() -> Table:
    from data_pipeline.views_kernels import render_views as kernel

    title = f"three views in bfloat16, {torch.cuda.get_device_name()}, median of {REPEATS}"
    table = Table("", "ms", "share of a copy's bandwidth", "extra memory, MiB", title=title)
    for n, size in ((1024, 32), (1024, 64), (256, 224)):
        images, indices = batch(n, size, "cuda")
        first, second = (
            draw_parameters(ViewConfig(), (size, size), indices, seed=0, epoch=0, view=view) for view in (0, 1)
        )
        partner, centers = indices.roll(1), torch.rand(n, 1, 2, device="cuda")

        def render(
            arguments=(images, first, second, size, MEAN, STD, torch.bfloat16, partner, centers, 0.3),
        ) -> Tensor:
            return kernel(*arguments)

        milliseconds = median_gpu_milliseconds(render)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        views = render()
        bytes_written = views.numel() * views.element_size()
        extra = torch.cuda.max_memory_allocated() - before - bytes_written
        # A copy reads and writes: half of the bytes that rendering moves, its images and its views, are copied.
        half = torch.empty((images.numel() + bytes_written) // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(half)
        copy = median_gpu_milliseconds(lambda source=half, target=target: target.copy_(source))
        table.add_row(
            f"({n}, 3, {size}, {size})", f"{milliseconds:.3f}", f"{copy / milliseconds:.0%}", f"{extra / 2**20:.1f}"
        )
    return table


def main() -> None:
    console = Console()
    console.print(on_the_cpu())
    if torch.cuda.is_available():
        console.print(on_the_gpu())
    else:
        console.print("three views on a GPU: not measured (no GPU)")


if __name__ == "__main__":
    main()
