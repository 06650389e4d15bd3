"""The square patch of GradMix in plain PyTorch: where it goes, and how another image is resized into it.

    mixedᵢ[y, x] = resize(imagesₚ, pₕ×p_w)[y − top, x − left]   inside a patch, p the partner of i
                 = imagesᵢ[y, x]                                outside of all

with pₕ = ⌊γH + ½⌋ (at least 1), top = ⌊y_c·H − pₕ/2 + ½⌋ clamped so that the patch stays inside the image, and likewise
in x. Of overlapping patches the later one shows.

Shapes: N images, C channels of H×W, P patches. Places are (y, x) in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.dispatch import use_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def paste_patches(mixed: Tensor, images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Put into `mixed`, a copy of `images` (N, C, H, W) in the same memory format, the patches at `centers` (N, P, 2)
    that show the images `partner` (N,) int64; `gamma` is a number or (N,), in (0, 1]."""
    n, channels, height, width = images.shape
    pixels = mixed.view(n, channels, height * width)
    patch_height, row, row_weights = vertical = _patch_axis(gamma, height, images.device)
    patch_width, column, column_weights = vertical if width == height else _patch_axis(gamma, width, images.device)
    if isinstance(gamma, Tensor):
        patch = row_weights @ images[partner].float() @ column_weights.mT
    else:  # All are resized alike: small patches are less to look up than whole views.
        patch = _resize(images.float(), row_weights[0, 0], column_weights[0, 0])[partner]
    patch = patch.to(images.dtype).flatten(2)
    for center in centers.float().unbind(1):
        y = _corner(center[:, 0], patch_height, height).unsqueeze(1) + row
        x = _corner(center[:, 1], patch_width, width).unsqueeze(1) + column
        place = (y.unsqueeze(2) * width + x.unsqueeze(1)).flatten(1)
        pixels.scatter_(2, place.unsqueeze(1).expand(-1, channels, -1), patch)


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
    _require(
        (partner.clamp(0, n - 1) == partner).all(), f"partner has an index out of range; set it within 0 to {n - 1}"
    )
    _require(centers.isfinite().all(), "centers has a place that is not finite; give one within [0, 1] for each patch")
    if isinstance(gamma, Tensor):
        _require(((gamma > 0) & (gamma <= 1)).all(), "gamma has a value out of range; set it within (0, 1]")


def require_floats(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}; give torch.float32, torch.bfloat16 or torch.float16")


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; put it on {device}, where the rest is")


def _require(holds: Tensor, message: str) -> None:
    if holds.is_cuda:
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def _patch_axis(gamma: float | Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of the patch: its side (G,), its pixels 0, 1, … (G, S) and how they weigh the partner's (G, 1, S, size).

    G is N where each image has its own γ, otherwise 1. S is a bound of the side; past its last pixel a smaller patch
    repeats it, so that every image has the same shapes and writes nothing outside of its patch.

    Weights are a triangle as wide as the patch is smaller: 1 − |(s + ½)·side/size − (p + ½)|, made to sum to 1. Times
    2·size they are whole numbers.
    """
    on_host = gamma.max().item() if isinstance(gamma, Tensor) and gamma.device.type == "cpu" else gamma
    bound = largest_patch(on_host, size)
    gamma = gamma if isinstance(gamma, Tensor) else torch.full((1,), gamma, device=device)
    side = (gamma.float() * size + 0.5).floor().clamp(1, size).long()
    pixel = torch.arange(bound, device=device).minimum(side.unsqueeze(1) - 1)
    source = torch.arange(size, device=device)
    distance = ((2 * source + 1) * side.view(-1, 1, 1) - (2 * pixel.unsqueeze(2) + 1) * size).abs()
    weights = (2 * size - distance).clamp(min=0).float()
    return side, pixel, (weights / weights.sum(dim=2, keepdim=True)).unsqueeze(1)


def _resize(images: Tensor, row_weights: Tensor, column_weights: Tensor) -> Tensor:
    """rows (p, H) · images (N, C, H, W) · columnsᵀ (q, W): (N, C, p, q)."""
    n, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)
    if channels == 1 or channels > 4 or not pixels.is_contiguous():
        return row_weights @ images @ column_weights.mT
    # In channels_last a row of an image is W·C numbers: two large products instead of 2·N·C small ones.
    rows = row_weights @ pixels.reshape(n, height, width * channels)
    weights = torch.kron(column_weights, torch.eye(channels, device=images.device))
    return (rows.flatten(0, 1) @ weights.mT).view(n, -1, len(column_weights), channels).permute(0, 3, 1, 2)


def _corner(center: Tensor, side: Tensor, size: int) -> Tensor:
    return (center * size - side / 2 + 0.5).floor().long().clamp(min=0).minimum(size - side)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
