"""The GradMix operations in plain PyTorch: what the fused kernels are tested against, and what runs without a GPU.

Shapes: N images, C channels of H×W, P patches; a feature map has K channels of h×w. Places are (y, x) in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.resample import resample, resample_weights


def gradmix_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> Tensor:
    """Each image with a square patch that shows the whole view of its partner, resized with antialiasing.

        mixedᵢ[y, x] = resize(images[partnerᵢ], pₕ×p_w)[y − top, x − left]   inside the patch
                     = imagesᵢ[y, x]                                         outside of it

    with pₕ = ⌊γH + ½⌋ (at least 1), top = ⌊y_c·H − pₕ/2 + ½⌋ clamped so that the patch stays inside the image, and
    likewise in x. Of overlapping patches the later one shows.

    Args:
        images: (N, C, H, W) float.
        partner: (N,) int64, whose view fills the patch.
        centers: (N, P, 2) in [0, 1].
        gamma: side of the patch as a share of the image's side, in (0, 1]; a number or (N,).

    Returns: (N, C, H, W), of the dtype and memory format of `images`.
    """
    n, _, height, width = images.shape
    gamma = torch.as_tensor(gamma, dtype=torch.float32, device=images.device).expand(n)
    patch_height, patch_width = _patch_side(gamma, height), _patch_side(gamma, width)
    mixed = images
    for center in centers.float().unbind(1):
        top, left = _corner(center[:, 0], patch_height, height), _corner(center[:, 1], patch_width, width)
        rows = _placed_weights(top, patch_height, height)
        columns = _placed_weights(left, patch_width, width)
        patch = resample(images[partner].float(), rows, columns).to(images.dtype)
        inside = _interval(top, patch_height, height).unsqueeze(2) & _interval(left, patch_width, width).unsqueeze(1)
        mixed = torch.where(inside.unsqueeze(1), patch, mixed)
    return mixed.contiguous(memory_format=_memory_format(images))


def activation_map(maps: Tensor, gradients: Tensor, kind: str = "layercam", sign: int = 1) -> Tensor:
    """Where the layer drove the loss: (N, h, w) float32, 0 or more.

        layercam   M = ReLU( Σₖ ReLU(∂l/∂Aₖ) ⊙ Aₖ )                                                       (eqs. 6-7)
        gradcam    M = ReLU( Σₖ αₖ Aₖ ),  αₖ the mean of ∂l/∂Aₖ over the map                              (eqs. 4-5)

    Args:
        maps, gradients: (N, K, h, w), the layer's output A and the gradient of the loss with respect to it.
        sign: 1 for the loss's gradient as it is, -1 for that of its negative.
    """
    maps, gradients = maps.float(), sign * gradients.float()
    weights = gradients.relu() if kind == "layercam" else gradients.mean(dim=(2, 3), keepdim=True)
    return (weights * maps).sum(dim=1).relu()


def find_peaks(activation: Tensor, num_peaks: int = 1, suppress: float = 0.5) -> tuple[Tensor, Tensor]:
    """The most activated places of each map: centers (N, P, 2), the middle of the cell, and scores (N, P).

    Each further peak lies at least `suppress` of the map's side from the earlier ones, in y or in x, so that patches of
    up to that size do not overlap; where nothing is left, the first peak stands again. A map without a positive value,
    or with one that is not finite, says nothing about a place: its centers are NaN, its scores 0 or NaN.

    Args:
        activation: (N, h, w), 0 or more.
    """
    _, height, width = activation.shape
    y = (torch.arange(height, device=activation.device) + 0.5) / height
    x = (torch.arange(width, device=activation.device) + 0.5) / width
    remaining = activation.clone()
    centers, scores = [], []
    for _ in range(num_peaks):
        score, cell = remaining.flatten(1).max(dim=1)
        center = torch.stack((y[cell // width], x[cell % width]), dim=1)
        if centers:
            exhausted = score <= 0
            center = torch.where(exhausted.unsqueeze(1), centers[0], center)
            score = torch.where(exhausted, scores[0], score)
        centers.append(center)
        scores.append(score)
        # Half a cell of tolerance: places on a grid are not exactly `suppress` apart in floating point.
        near_y = (y - center[:, :1]).abs() < suppress - 0.25 / height
        near_x = (x - center[:, 1:]).abs() < suppress - 0.25 / width
        remaining = remaining.masked_fill(near_y.unsqueeze(2) & near_x.unsqueeze(1), 0.0)
    total = activation.flatten(1).sum(dim=1, keepdim=True)
    says_something = torch.isfinite(total) & (total > 0)
    score = torch.where(torch.isfinite(total), torch.stack(scores, dim=1), torch.nan)
    return torch.where(says_something.unsqueeze(2), torch.stack(centers, dim=1), torch.nan), score


def layercam_peaks(
    maps: Tensor,
    gradients: Tensor,
    num_peaks: int = 1,
    *,
    kind: str = "layercam",
    sign: int = 1,
    suppress: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """`find_peaks` of `activation_map`: centers (N, P, 2) and scores (N, P)."""
    return find_peaks(activation_map(maps, gradients, kind, sign), num_peaks, suppress)


def _patch_side(gamma: Tensor, size: int) -> Tensor:
    return (gamma * size + 0.5).floor().clamp(1, size)


def _corner(center: Tensor, patch: Tensor, size: int) -> Tensor:
    return torch.minimum((center * size - patch / 2 + 0.5).floor().clamp(min=0), size - patch)


def _placed_weights(corner: Tensor, patch: Tensor, size: int) -> Tensor:
    """Weights (N, size, size) that resize the whole axis to `patch` pixels, moved so that they begin at `corner`."""
    whole = torch.full_like(patch, size)
    weights = resample_weights(torch.zeros_like(patch), whole, size, size, target=patch)
    row = torch.arange(size, device=patch.device) - corner.long().unsqueeze(1)
    return weights.gather(1, row.clamp(0, size - 1).unsqueeze(2).expand(-1, -1, size))


def _interval(start: Tensor, length: Tensor, size: int) -> Tensor:
    place = torch.arange(size, device=start.device)
    return (place >= start.unsqueeze(1)) & (place < (start + length).unsqueeze(1))


def _memory_format(images: Tensor) -> torch.memory_format:
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
