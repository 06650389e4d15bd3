"""How the third view x̃ is made from the first: GradMix, and CutMix and Mixup for comparison.

The partner of an image is a random other image of its batch. Batches come in random order, so the next image of a small
group is one; and with groups of eight, an image's partner does not depend on how many ranks the batch is spread over.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.counter_rng import Stream, uniforms
from trainer.config import MixingConfig
from trainer.gradmix import gradmix_views

PARTNER_GROUP = 8
_STEPS_AT_ONCE = 256


class Mixed(NamedTuple):
    """The mixed views and how `losses.objective` weighs them.

    Attributes:
        views: (N, C, H, W).
        gamma: γ, a number or one per image (N,); 1 where the mixing has no patch that weighs the loss.
        share: (N,) the part of the own image where a mixed view has two positives; None where it has one.
        partner: (N,) int64, the image that each was mixed with.
    """

    views: Tensor
    gamma: float | Tensor
    share: Tensor | None
    partner: Tensor


@functools.lru_cache(maxsize=8)
def partners(n: int, device: torch.device) -> Tensor:
    """For each of N images another one (N,): the next within its group of eight, the last group taking what is left.

    >>> partners(11, torch.device("cpu")).tolist()
    [1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 8]
    """
    place = torch.arange(n, device=device)
    # A last group of a single image would be its own partner; it joins the group before.
    group = (place // PARTNER_GROUP).clamp(max=max((n - 2) // PARTNER_GROUP, 0))
    following = place + 1
    ends = (following == n) | ((following // PARTNER_GROUP).clamp(max=max((n - 2) // PARTNER_GROUP, 0)) != group)
    return torch.where(ends, group * PARTNER_GROUP, following)


def draw_gamma(config: MixingConfig, indices: Tensor, *, seed: int, epoch: int, step: int) -> float | Tensor:
    """γ ~ U(γ_min, γ_max): one number for the step, or one per image (N,)."""
    if config.gamma_per == "step":
        # On the host: a number in the loss and in the patch's size costs no synchronisation.
        draw = _step_draws(seed, epoch, step // _STEPS_AT_ONCE)[step % _STEPS_AT_ONCE]
        return config.gamma_min + (config.gamma_max - config.gamma_min) * draw
    draw = uniforms(seed, epoch, indices, Stream.GAMMA, 1).squeeze(1)
    return config.gamma_min + (config.gamma_max - config.gamma_min) * draw


@functools.lru_cache(maxsize=2)
def _step_draws(seed: int, epoch: int, block: int) -> list[float]:
    """The uniform numbers of a block of steps, since drawing one takes as long as drawing all."""
    steps = torch.arange(block * _STEPS_AT_ONCE, (block + 1) * _STEPS_AT_ONCE)
    return uniforms(seed, epoch, steps, Stream.GAMMA, 1).squeeze(1).tolist()


def mix(
    views: Tensor, indices: Tensor, centers: Tensor | None, config: MixingConfig, *, seed: int, epoch: int, step: int
) -> Mixed:
    """The mixed views of `views` (N, C, H, W).

    Args:
        indices: (N,) the images' places in the training set, by which random numbers are drawn.
        centers: (N, P, 2) where GradMix puts its patches, in view coordinates; the others do not use it.
        step: number of the step within the epoch.
    """
    partner = partners(len(views), views.device)
    if config.kind == "gradmix":
        gamma = draw_gamma(config, indices, seed=seed, epoch=epoch, step=step)
        return Mixed(gradmix_views(views, partner, centers, gamma), gamma, None, partner)
    # As in the originals, one share for the batch.
    share = float(np.random.default_rng([seed, epoch, step, Stream.SHARE]).beta(config.alpha, config.alpha))
    if config.kind == "mixup":
        mixed = share * views + (1.0 - share) * views[partner]
        kept = torch.full((len(views),), share, device=views.device)
        return Mixed(mixed, 1.0, kept, partner)
    mixed, kept = cutmix(views, partner, share, seed=seed, epoch=epoch, step=step)
    return Mixed(mixed, 1.0, kept, partner)


def cutmix(views: Tensor, partner: Tensor, share: float, *, seed: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019): a box of 1 − `share` of the image, anywhere, shows the same box of the partner.

    Returns the mixed views and the share (N,) that is really left of each image, since the box is cut at the border.
    """
    n, _, height, width = views.shape
    y, x = uniforms(seed, epoch, torch.tensor([step]), Stream.CUTMIX_BOX, 2)[0].tolist()
    side = (1.0 - share) ** 0.5
    top, bottom = _cut(y, side, height)
    left, right = _cut(x, side, width)
    mixed = views.clone()
    mixed[:, :, top:bottom, left:right] = views[partner][:, :, top:bottom, left:right]
    left_over = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, torch.full((n,), left_over, device=views.device)


def _cut(center: float, side: float, size: int) -> tuple[int, int]:
    middle, half = int(center * size), int(side * size) // 2
    return max(middle - half, 0), min(middle + half, size)
