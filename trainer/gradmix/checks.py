"""What the GradMix operations refuse, before anything is launched: one line that names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("layercam", "gradcam")


def check_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Shapes, types and devices of the arguments of `gradmix_views`."""
    _require_floats("images", images)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images is {_shape(images)}; give (N, C, H, W), nothing of it empty")
    n = len(images)
    if partner.shape != (n,) or partner.dtype != torch.int64:
        raise ValueError(f"partner is {_shape(partner)} {partner.dtype}; give ({n},) torch.int64, one for each image")
    if centers.dim() != 3 or centers.shape[0] != n or centers.shape[1] == 0 or centers.shape[2] != 2:
        raise ValueError(f"centers is {_shape(centers)}; give ({n}, P, 2), P patches of 1 or more for each image")
    _require_floats("centers", centers)
    _require_device(images, partner=partner, centers=centers)
    if isinstance(gamma, Tensor):
        if gamma.shape != (n,):
            raise ValueError(f"gamma is {_shape(gamma)}; give a number or ({n},), one for each image")
        _require_floats("gamma", gamma)
        _require_device(images, gamma=gamma)


def check_view_values(partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Values of the arguments of `gradmix_views`, whose shapes are right. On a GPU the host does not wait for them."""
    n = len(partner)
    _require(
        (partner.clamp(0, n - 1) == partner).all(), f"partner has an index out of range; set it within 0 to {n - 1}"
    )
    _require(centers.isfinite().all(), "centers has a place that is not finite; give one within [0, 1] for each patch")
    if isinstance(gamma, Tensor):
        _require(((gamma > 0) & (gamma <= 1)).all(), "gamma has a value out of range; set it within (0, 1]")
    elif not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; set it within (0, 1]")


def check_layers(
    maps: Sequence[Tensor], gradients: Sequence[Tensor], num_peaks: int, kind: str, sign: int, suppress: float
) -> None:
    """The arguments of `layercam_peaks`."""
    if not maps or len(gradients) != len(maps):
        raise ValueError(f"gradients has {len(gradients)} layers and maps {len(maps)}; give as many, 1 or more")
    for layer, gradient in zip(maps, gradients):
        _require_floats("maps", layer)
        _require_floats("gradients", gradient)
        if layer.dim() != 4 or layer.numel() == 0 or len(layer) != len(maps[0]):
            raise ValueError(f"maps has a layer of {_shape(layer)}; give (N, K, h, w) with one N, nothing of it empty")
        if gradient.shape != layer.shape:
            raise ValueError(f"gradients has a layer of {_shape(gradient)}; give {_shape(layer)}, as its map")
        _require_device(maps[0], maps=layer, gradients=gradient)
    if num_peaks < 1:
        raise ValueError(f"num_peaks is {num_peaks}; set it to 1 or more")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; set it to one of {', '.join(KINDS)}")
    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}; set it to 1 or -1")
    if not math.isfinite(suppress):
        raise ValueError(f"suppress is {suppress}; set it to a finite share of the map's side")


def _require(holds: Tensor, message: str) -> None:
    if holds.is_cuda:
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def _require_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; give torch.float32, torch.bfloat16 or torch.float16")


def _require_device(first: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; put it on {first.device}, where the rest is")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
