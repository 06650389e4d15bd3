"""The rows of `tests.bench.gradmix` about `render_views`.

On a GPU the kernel alone, of parameters that are drawn, for two views and for all three; on the CPU two views with the
drawing of their parameters, against torchvision's transforms of one image after the other and, where kornia is
installed, its augmentation of the batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from data_pipeline.dispatch import pytorch_body
from data_pipeline.views import ViewConfig, ViewParameters, draw_parameters, render_views
from tests.bench.timing import Figures, Row, device_seconds, host_seconds, launch_seconds, spread

MEAN, STD = (0.5,) * 3, (0.25,) * 3
GAMMA = 0.3


def view_rows() -> list[Row]:
    shapes = (1024, 32), (1024, 64), (256, 224)
    rows = [
        Row(f"render_views ({n}, {size}, {size}, 3), {views} views", partial(kernel, n, size, views))
        for views in (3, 2)
        for n, size in shapes
    ]
    rows += [
        Row("render_views (1024, 32, 32, 3), the host's call (an empty kernel)", partial(call, 1024, 32)),
        Row("render_views (1024, 32, 32, 3) with its call (PyTorch's body)", partial(kernel_and_pytorch, 1024, 32)),
        Row("CPU: two views of (256, 32, 32, 3) (torchvision, image by image)", partial(cpu, torchvision_views), False),
    ]
    if importlib.util.find_spec("kornia"):
        measure = partial(cpu, kornia_augmentation(32))
        rows.append(Row("CPU: two views of (256, 32, 32, 3) (kornia, batched)", measure, False))
    return rows


def batch(n: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, size, size, 3) and their indices."""
    images = torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return images.to(device), torch.arange(n, device=device)


def parameters(size: int, indices: Tensor) -> tuple[ViewParameters, ViewParameters]:
    first, second = (
        draw_parameters(ViewConfig(), (size, size), indices, seed=0, epoch=0, view=view) for view in (0, 1)
    )
    return first, second


def renderer(n: int, size: int, views: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What renders so many views of images in bfloat16, and the images."""
    images, indices = batch(n, size, "cuda")
    options = {"size": size, "mean": MEAN, "std": STD, "dtype": torch.bfloat16}
    if views == 3:
        options |= {"partner": indices.roll(1), "centers": torch.rand(n, 1, 2, device="cuda"), "gamma": GAMMA}
    first, second = parameters(size, indices)
    return lambda source: render_views(source, first, second, **options), images


def kernel(n: int, size: int, views: int) -> Figures:
    render, images = renderer(n, size, views)
    moved = images.numel() * (1 + 2 * views)
    return Figures(device_seconds(render, [(images.clone(),) for _ in range(spread(moved))]), moved)


def call(n: int, size: int) -> Figures:
    render, images = renderer(n, size, 3)
    empty = torch.empty(0, device="cuda")
    ours, reference = launch_seconds(lambda: render(images), lambda: empty.new_zeros(1))
    return Figures(ours, reference=reference)


def kernel_and_pytorch(n: int, size: int) -> Figures:
    """Not in a graph, since PyTorch's body waits for the device."""
    render, images = renderer(n, size, 3)

    def in_pytorch() -> None:
        with pytorch_body():
            render(images)

    ours, reference = host_seconds(lambda: render(images), in_pytorch)
    return Figures(ours, reference=reference)


def cpu(reference_views: Callable[[Tensor], Tensor]) -> Figures:
    images, indices = batch(256, 32, "cpu")

    def two_views() -> Tensor:
        return render_views(images, *parameters(32, indices), size=32, mean=MEAN, std=STD)

    ours, reference = host_seconds(two_views, lambda: reference_views(images), repeats=9)
    return Figures(ours, reference=reference)


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
