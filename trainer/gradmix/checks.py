"""What the GradMix operations refuse, before anything is launched: one line that names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from data_pipeline.patch import check_patches, require_device, require_floats

KINDS = ("layercam", "gradcam")


def check_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Shapes, types and devices of the arguments of `gradmix_views`."""
    require_floats("images", images.dtype)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images is {tuple(images.shape)}; give (N, C, H, W), nothing of it empty")
    check_patches(images, partner, centers, gamma)


def check_layers(
    maps: Sequence[Tensor], gradients: Sequence[Tensor], num_peaks: int, kind: str, sign: int, suppress: float
) -> None:
    """The arguments of `layercam_peaks`."""
    if not maps or len(gradients) != len(maps):
        raise ValueError(f"gradients has {len(gradients)} layers and maps {len(maps)}; give as many, 1 or more")
    for layer, gradient in zip(maps, gradients):
        require_floats("maps", layer.dtype)
        require_floats("gradients", gradient.dtype)
        if layer.dim() != 4 or layer.numel() == 0 or len(layer) != len(maps[0]):
            raise ValueError(
                f"maps has a layer of {tuple(layer.shape)}; give (N, K, h, w) with one N, nothing of it empty"
            )
        if gradient.shape != layer.shape:
            raise ValueError(f"gradients has a layer of {tuple(gradient.shape)}; give {tuple(layer.shape)}, as its map")
        require_device("maps", layer, maps[0].device)
        require_device("gradients", gradient, maps[0].device)
    if num_peaks < 1:
        raise ValueError(f"num_peaks is {num_peaks}; set it to 1 or more")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; set it to one of {', '.join(KINDS)}")
    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}; set it to 1 or -1")
    if not math.isfinite(suppress):
        raise ValueError(f"suppress is {suppress}; set it to a finite share of the map's side")
