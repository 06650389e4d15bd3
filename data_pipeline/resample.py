"""Antialiased bilinear resizing as two small matrices per image, so that every image can have its own box.

Resizing is linear and separable: out = Wy · image · Wxᵀ, where row i of Wy holds the weights with which the source rows
enter output row i. With the triangle filter widened by the scale factor when shrinking, this is what Pillow and
`torch.nn.functional.interpolate(mode="bilinear", antialias=True)` compute.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resample_weights(
    start: Tensor, length: Tensor, source_size: int, target_size: int, target: Tensor | None = None
) -> Tensor:
    """Weights (N, target_size, source_size), float32, that resize source pixels [start, start + length) of one axis.

    Args:
        start, length: (N,) the interval of the source, in pixels; pixels outside of it get no weight.
        target: (N,) how many output pixels the interval is spread over; default all `target_size` of them. Rows past
            `target` are extrapolated and meant to be discarded.

    Every row sums to 1.
    """
    output = torch.arange(target_size, device=start.device, dtype=torch.float32) + 0.5
    pixel = torch.arange(source_size, device=start.device, dtype=torch.float32) + 0.5
    start, length = start.float().view(-1, 1, 1), length.float().view(-1, 1, 1)
    scale = length / (target_size if target is None else target.float().view(-1, 1, 1))
    support = scale.clamp(min=1.0)
    center = start + scale * output.view(1, -1, 1)
    distance = (pixel.view(1, 1, -1) - center).abs() / support
    inside = (pixel.view(1, 1, -1) > start) & (pixel.view(1, 1, -1) < start + length)
    weights = (1.0 - distance).clamp(min=0.0) * inside
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply `rows` (N, h, H) and `columns` (N, w, W) to images (N, C, H, W) float: (N, C, h, w)."""
    n, channels, height, width = images.shape
    shrunk = torch.bmm(images.reshape(n, channels * height, width), columns.transpose(1, 2).to(images.dtype))
    shrunk = shrunk.view(n, channels, height, -1).transpose(1, 2).reshape(n, height, -1)
    result = torch.bmm(rows.to(images.dtype), shrunk)
    return result.view(n, rows.shape[1], channels, -1).transpose(1, 2)
