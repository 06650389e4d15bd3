"""The GradMix operations: where a view was most activated, and the view with that place covered by another image.

Each operation is one function with two bodies of the same results, the Triton kernels of `kernels` and the plain
PyTorch of `reference`; `data_pipeline.dispatch` says which runs. They are registered with torch.library, so that
torch.compile takes them whole. They have no gradient: neither a place nor a view is something that is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from data_pipeline.dispatch import use_triton
from data_pipeline.patch import check_patch_values
from trainer.gradmix import reference
from trainer.gradmix.checks import check_layers, check_views
from trainer.gradmix.reference import activation_map, find_peaks

__all__ = ["activation_map", "find_peaks", "gradmix_views", "layercam_peaks"]


def gradmix_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> Tensor:
    """Each image with square patches that show the whole view of its partner, resized with antialiasing.

        mixedᵢ[y, x] = resize(images[partnerᵢ], pₕ×p_w)[y − top, x − left]   inside a patch
                     = imagesᵢ[y, x]                                         outside of all

    with pₕ = ⌊γH + ½⌋ (at least 1), top = ⌊y_c·H − pₕ/2 + ½⌋ clamped so that the patch stays inside the image, and
    likewise in x. Of overlapping patches the later one shows.

    Args:
        images: (N, C, H, W) float32, bfloat16 or float16.
        partner: (N,) int64 within 0 to N − 1, whose view fills the patch.
        centers: (N, P, 2) float, places (y, x) in [0, 1].
        gamma: side of the patch as a share of the image's side, in (0, 1]; a number or (N,) float.

    Returns: (N, C, H, W), of the dtype of `images`, in channels_last where they are, otherwise contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. Values on a GPU are checked there, so that
            the host does not wait; what is wrong with them then stops the process at its next synchronisation.
    """
    if isinstance(gamma, Tensor):
        return torch.ops.gradmix.views(images, partner, centers, 1.0, gamma)
    return torch.ops.gradmix.views(images, partner, centers, float(gamma), None)


def layercam_peaks(
    maps: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor],
    num_peaks: int = 1,
    *,
    kind: str = "layercam",
    sign: int = 1,
    suppress: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The most activated places of each image: `find_peaks` of `activation_map`, which have the equations.

    Args:
        maps, gradients: (N, K, h, w) float32, bfloat16 or float16, a layer's output and the gradient of the loss with
            respect to it, or sequences of them, one for each layer.
        num_peaks: P, 1 or more.
        kind: "layercam" or "gradcam".
        sign: 1 for the loss's gradient as it is, -1 for that of its negative.
        suppress: how far further peaks stay away from earlier ones, as a share of the map's side.

    Returns: centers (N, P, 2) float32, (y, x) in [0, 1], and scores (N, P) float32. An image whose map has no positive
        value has no place: its centers are NaN and its scores 0. One whose map is not finite has NaN for both.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    if isinstance(maps, Tensor):
        maps = [maps]
    if isinstance(gradients, Tensor):
        gradients = [gradients]
    return torch.ops.gradmix.layercam_peaks(list(maps), list(gradients), num_peaks, kind, sign, suppress)


@torch.library.custom_op("gradmix::views", mutates_args=())
def _views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float, gammas: Tensor | None) -> Tensor:
    side = gamma if gammas is None else gammas
    check_views(images, partner, centers, side)
    check_patch_values(partner, centers, side)
    return _body(images).gradmix_views(images, partner, centers, side)


@_views.register_fake
def _(images: Tensor, partner: Tensor, centers: Tensor, gamma: float, gammas: Tensor | None) -> Tensor:
    check_views(images, partner, centers, gamma if gammas is None else gammas)
    return torch.empty_like(images, memory_format=reference.memory_format(images))


@torch.library.custom_op("gradmix::layercam_peaks", mutates_args=())
def _layercam_peaks(
    maps: Sequence[Tensor], gradients: Sequence[Tensor], num_peaks: int, kind: str, sign: int, suppress: float
) -> tuple[Tensor, Tensor]:
    check_layers(maps, gradients, num_peaks, kind, sign, suppress)
    return _body(maps[0]).layercam_peaks(maps, gradients, num_peaks, kind, sign, suppress)


@_layercam_peaks.register_fake
def _(
    maps: Sequence[Tensor], gradients: Sequence[Tensor], num_peaks: int, kind: str, sign: int, suppress: float
) -> tuple[Tensor, Tensor]:
    check_layers(maps, gradients, num_peaks, kind, sign, suppress)
    n = len(maps[0])
    new = maps[0].new_empty
    return new((n, num_peaks, 2), dtype=torch.float32), new((n, num_peaks), dtype=torch.float32)


def _body(tensor: Tensor) -> ModuleType:
    if use_triton(tensor):
        # Here, since it imports Triton, which a machine without a GPU need not have.
        from trainer.gradmix import kernels

        return kernels
    return reference
