"""The GradMix operations in plain PyTorch: what the fused kernels are tested against, and what runs without a GPU.

Shapes: N images; a feature map has K channels of h×w. Places are (y, x) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.patch import paste_patches


def gradmix_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> Tensor:
    """See `trainer.gradmix.gradmix_views`."""
    mixed = images.clone(memory_format=memory_format(images))
    paste_patches(mixed, images, partner, centers, gamma)
    return mixed


def activation_map(
    maps: Tensor | Sequence[Tensor], gradients: Tensor | Sequence[Tensor], kind: str = "layercam", sign: int = 1
) -> Tensor:
    """Where the layers drove the loss: (N, h, w) float32, 0 or more.

        layercam   M = ReLU( Σₖ ReLU(∂l/∂Aₖ) ⊙ Aₖ )                                                       (eqs. 6-7)
        gradcam    M = ReLU( Σₖ αₖ Aₖ ),  αₖ the mean of ∂l/∂Aₖ over the map                              (eqs. 4-5)

    The maps of several layers are each brought to [0, 1] per image, (M − min M) / (max M − min M), resized bilinearly
    to the one with most cells and added.

    Args:
        maps, gradients: (N, K, h, w), the layer's output A and the gradient of the loss with respect to it, or
            sequences of them, one for each layer.
        sign: 1 for the loss's gradient as it is, -1 for that of its negative.
    """
    if isinstance(maps, Tensor):
        return _layer_map(maps, gradients, kind, sign)
    layers = [_layer_map(*layer, kind, sign) for layer in zip(maps, gradients)]
    if len(layers) == 1:
        return layers[0]
    finest = finest_shape([tuple(layer.shape[1:]) for layer in layers])
    resized = [
        F.interpolate(_normalise(layer).unsqueeze(1), finest, mode="bilinear", align_corners=False) for layer in layers
    ]
    return torch.stack(resized).sum(dim=0).squeeze(1)


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
    near_height, near_width = nearness(suppress, height), nearness(suppress, width)
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
        near_y = (y - center[:, :1]).abs() < near_height
        near_x = (x - center[:, 1:]).abs() < near_width
        remaining = remaining.masked_fill(near_y.unsqueeze(2) & near_x.unsqueeze(1), 0.0)
    total = activation.flatten(1).sum(dim=1, keepdim=True)
    says_something = torch.isfinite(total) & (total > 0)
    score = torch.where(torch.isfinite(total), torch.stack(scores, dim=1), torch.nan)
    return torch.where(says_something.unsqueeze(2), torch.stack(centers, dim=1), torch.nan), score


def layercam_peaks(
    maps: Sequence[Tensor], gradients: Sequence[Tensor], num_peaks: int, kind: str, sign: int, suppress: float
) -> tuple[Tensor, Tensor]:
    """See `trainer.gradmix.layercam_peaks`."""
    return find_peaks(activation_map(maps, gradients, kind, sign), num_peaks, suppress)


def memory_format(images: Tensor) -> torch.memory_format:
    """The format of the mixed views: channels_last where the images are, otherwise contiguous."""
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def finest_shape(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the layers' (h, w), the first with most cells."""
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def nearness(suppress: float, size: int) -> float:
    """Peaks closer than this in both axes overlap.

    A quarter of a cell less than `suppress`: places on a grid are not exactly that far apart in floating point.
    """
    return suppress - 0.25 / size


def _layer_map(maps: Tensor, gradients: Tensor, kind: str, sign: int) -> Tensor:
    maps, gradients = maps.float(), sign * gradients.float()
    weights = gradients.relu() if kind == "layercam" else gradients.mean(dim=(2, 3), keepdim=True)
    return (weights * maps).sum(dim=1).relu()


def _normalise(activation: Tensor) -> Tensor:
    low, high = activation.amin(dim=(1, 2), keepdim=True), activation.amax(dim=(1, 2), keepdim=True)
    return (activation - low) / (high - low).clamp(min=torch.finfo(activation.dtype).tiny)
