"""The square patch of GradMix in plain PyTorch: where it goes, and how another image is resized into it.

    mixedᵢ[y, x] = resize(imagesₚ, pₕ×p_w)[y − top, x − left]   inside a patch, p the partner of i
                 = imagesᵢ[y, x]                                outside of all

with pₕ = ⌊γH + ½⌋ (at least 1), top = ⌊y_c·H − pₕ/2 + ½⌋ clamped so that the patch stays inside the image, and likewise
in x. Of overlapping patches the later one shows.

Shapes: N images, C channels of H×W, P patches. Places are (y, x) in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.dispatch import use_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Channels that lie side by side are resized as one, of which more would mostly multiply with zeros.
LARGEST_DEPTH = 4


def paste_patches(mixed: Tensor, images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Put into `mixed`, a copy of `images` (N, C, H, W) in the same memory format, the patches at `centers` (N, P, 2)
    that show the images `partner` (N,) int64; `gamma` is a number or (N,), in (0, 1]."""
    n, channels, height, width = images.shape
    depth = _depth(images)
    if isinstance(gamma, Tensor):
        patches = _patches_of_each(gamma, channels, height, width, depth)
    else:
        patches = _patches_alike(
            _side(gamma, height), _side(gamma, width), channels, height, width, depth, images.device
        )
    if isinstance(gamma, Tensor) or depth > LARGEST_DEPTH:
        shown = patches.rows.unsqueeze(1) @ images[partner].float() @ patches.columns.unsqueeze(1).mT
        shown = _as_stored(shown, depth).reshape(n, -1)
    else:
        shown = _resize_alike(images.float(), partner, gamma, depth).view(n, -1)
    shown = shown.to(images.dtype)
    pixels = _as_stored(mixed, depth).view(n, -1)
    corners = (centers.float() * _sizes(height, width, images.device) - patches.half + 0.5).floor_().clamp_(min=0)
    top, left = corners.minimum(patches.last).long().unbind(2)
    for first in ((top * width + left) * depth).split(1, dim=1):
        pixels.scatter_(1, first + patches.places, shown)


def largest_patch(gamma: float | Tensor, size: int) -> int:
    """A bound of the patch's side in pixels, for which nothing waits for the device."""
    # The side is rounded in 32 bits, γ as the host has it in 64.
    return size if isinstance(gamma, Tensor) else min(size, max(int(gamma * size + 0.501), 1))


def check_patches(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Shapes, types and devices of the patches for images (N, …); raises ValueError."""
    n = len(images)
    if partner.shape != (n,) or partner.dtype != torch.int64:
        raise ValueError(f"partner is {_shape(partner)} {partner.dtype}; give ({n},) torch.int64, one for each image")
    if centers.dim() != 3 or centers.shape[0] != n or centers.shape[1] == 0 or centers.shape[2] != 2:
        raise ValueError(f"centers is {_shape(centers)}; give ({n}, P, 2), P patches of 1 or more for each image")
    require_floats("centers", centers.dtype)
    require_device("partner", partner, images.device)
    require_device("centers", centers, images.device)
    if isinstance(gamma, Tensor):
        if gamma.shape != (n,):
            raise ValueError(f"gamma is {_shape(gamma)}; give a number or ({n},), one for each image")
        require_floats("gamma", gamma.dtype)
        require_device("gamma", gamma, images.device)


def check_patch_values(partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Values of patches whose shapes are right; raises ValueError. On a GPU the host does not wait for them: what is
    wrong with them stops the process at its next synchronisation. There the Triton kernels check what they read."""
    n = len(partner)
    if not isinstance(gamma, Tensor) and not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; set it within (0, 1]")
    if use_triton(partner):
        return
    _require_range(
        partner,
        lambda low, high: (low >= 0) & (high < n),
        f"partner has an index out of range; set it within 0 to {n - 1}",
    )
    _require_range(
        centers,
        lambda low, high: (low > -math.inf) & (high < math.inf),
        "centers has a place that is not finite; give one within [0, 1] for each patch",
    )
    if isinstance(gamma, Tensor):
        _require_range(
            gamma, lambda low, high: (low > 0) & (high <= 1), "gamma has a value out of range; set it within (0, 1]"
        )


def require_floats(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}; give torch.float32, torch.bfloat16 or torch.float16")


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; put it on {device}, where the rest is")


def _require_range(values: Tensor, holds: Callable, message: str) -> None:
    """That `holds` of the smallest and the largest, which are NaN where one is."""
    smallest, largest = values.aminmax()
    if values.is_cuda:
        torch._assert_async(holds(smallest, largest), message)
    elif not holds(smallest.item(), largest.item()):
        raise ValueError(message)


class _Patches(NamedTuple):
    """Patches of G sizes, whatever they show and wherever they go: G is N where each image has its own γ, otherwise 1.

    S×T is a bound of the size; past its last row or column a smaller patch repeats it, so that every image has the same
    shapes and writes nothing outside of its patch.

    Attributes:
        half: (G, 1, 2) float32, half the height and the width.
        last: (G, 1, 2) float32, the furthest first row and column, at which a patch is still inside.
        places: (G, C·S·T) int64, where its values lie in an image as it is stored, counted from the first.
        rows, columns: (G, S, H) and (G, T, W) float32, how its pixels weigh those that it shows.
    """

    half: Tensor
    last: Tensor
    places: Tensor
    rows: Tensor
    columns: Tensor


def _patches(sides: Tensor, bounds: tuple[int, int], channels: int, height: int, width: int, depth: int) -> _Patches:
    """Patches of the heights and widths `sides`, (G, 2) int64, none larger than `bounds`."""
    row, rows = _resize_weights(sides[:, 0], bounds[0], height)
    column, columns = _resize_weights(sides[:, 1], bounds[1], width)
    plane, channel = (torch.arange(count, device=sides.device) for count in (channels // depth, depth))
    line = plane.view(-1, 1) * height + row.unsqueeze(1)
    pixel = line.unsqueeze(3) * width + column.view(len(sides), 1, 1, -1)
    places = (pixel.unsqueeze(4) * depth + channel).flatten(1)
    sides = sides.unsqueeze(1).float()
    return _Patches(sides / 2, _sizes(height, width, sides.device) - sides, places, rows, columns)


def _resize_weights(side: Tensor, bound: int, size: int) -> tuple[Tensor, Tensor]:
    """A patch's pixels 0, 1, … on one axis, (G, bound), and how they weigh the `size` pixels shown, (G, bound, size).

    Weights are a triangle as wide as the patch is smaller: 1 − |(s + ½)·side/size − (p + ½)|, made to sum to 1. Times
    2·size they are whole numbers.
    """
    pixel = torch.arange(bound, device=side.device).minimum(side.unsqueeze(1) - 1)
    source = torch.arange(size, device=side.device)
    distance = ((2 * source + 1) * side.view(-1, 1, 1) - (2 * pixel.unsqueeze(2) + 1) * size).abs()
    weights = (2 * size - distance).clamp(min=0).float()
    return pixel, weights / weights.sum(dim=2, keepdim=True)


def _patches_of_each(gamma: Tensor, channels: int, height: int, width: int, depth: int) -> _Patches:
    largest = gamma.max().item() if gamma.device.type == "cpu" else gamma
    bounds = largest_patch(largest, height), largest_patch(largest, width)
    sides = [(gamma.float() * size + 0.5).floor().clamp(1, size).long() for size in (height, width)]
    return _patches(torch.stack(sides, dim=1), bounds, channels, height, width, depth)


# Patches that are all of one size: there are few sizes, and what is made of one is kept.
_kept = functools.lru_cache(maxsize=64)


@_kept
def _patches_alike(
    patch_height: int, patch_width: int, channels: int, height: int, width: int, depth: int, device: torch.device
) -> _Patches:
    sides = torch.tensor([[patch_height, patch_width]], device=device)
    return _patches(sides, (patch_height, patch_width), channels, height, width, depth)


@_kept
def _row_taps(side: int, size: int, planes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The K lines of an image, planes·size of them, that enter each line of a patch, (planes·side, K) int64, and their
    weights."""
    _, (weights,) = _resize_weights(torch.tensor([side]), side, size)
    shares, taps = weights.topk(int((weights > 0).sum(dim=1).max()))
    taps = torch.arange(planes).view(-1, 1, 1) * size + taps
    return taps.flatten(0, 1).to(device), shares.repeat(planes, 1).to(device)


@_kept
def _column_weights(side: int, size: int, depth: int, device: torch.device) -> Tensor:
    """What a line of size·depth values is multiplied with: (size·depth, side·depth), and columns of zeros, since a
    product as wide as a multiple of 16 is faster."""
    _, (weights,) = _resize_weights(torch.tensor([side]), side, size)
    weights = torch.kron(weights, torch.eye(depth)).mT
    return F.pad(weights, (0, -weights.shape[1] % 16)).to(device)


@_kept
def _sizes(height: int, width: int, device: torch.device) -> Tensor:
    return torch.tensor([height, width], dtype=torch.float32, device=device)


def _side(gamma: float, size: int) -> int:
    """⌊γ·size + ½⌋, at least 1, in 32 bits as the kernels have it."""
    side = np.float32(gamma) * np.float32(size) + np.float32(0.5)
    return min(max(int(side), 1), size)


def _resize_alike(images: Tensor, partner: Tensor, gamma: float, depth: int) -> Tensor:
    """The partners of images (N, C, H, W), all resized to p×q: their lines, as those of this depth are stored."""
    n, channels, height, width = images.shape
    planes, patch_width = channels // depth, _side(gamma, width)
    # A line of a patch is a sum of few weighted ones, looked up and added at once.
    taps, shares = _row_taps(_side(gamma, height), height, planes, images.device)
    lines = F.embedding_bag(
        ((partner * (planes * height)).view(-1, 1, 1) + taps).flatten(0, 1),
        _as_stored(images, depth).reshape(-1, width * depth),
        per_sample_weights=shares.expand(n, -1, -1).flatten(0, 1),
        mode="sum",
    )
    return (lines @ _column_weights(patch_width, width, depth, images.device))[:, : patch_width * depth].contiguous()


def _depth(images: Tensor) -> int:
    """An image (C, H, W) is stored as C / depth planes of H lines of W·depth values: depth is C in channels_last, else
    1."""
    return images.shape[1] if images.is_contiguous(memory_format=torch.channels_last) else 1


def _as_stored(images: Tensor, depth: int) -> Tensor:
    return images.permute(0, 2, 3, 1) if depth > 1 else images


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
