"""From the gradients of the training loss to the place of the next patch, and the memory of these places.

In the default mode the gradients are a by-product of the training step: the encoder's maps keep theirs in the one
backward pass, `peaks` reduces each image's to a place, and `PeakStore` remembers it, in source coordinates, until the
image comes again in the next epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipeline.counter_rng import Stream, uniforms
from trainer.distributed import sum_over_ranks, world_size
from trainer.gradmix import activation_map, find_peaks, layercam_peaks

if TYPE_CHECKING:
    from trainer.config import MixingConfig


def attribution(maps: Sequence[Tensor], gradients: Sequence[Tensor], config: MixingConfig) -> Tensor:
    """Activation map (N, h, w) of one layer, or the sum over several, to look at."""
    return activation_map(maps, gradients, config.attribution, config.gradient_sign)


def peaks(maps: Sequence[Tensor], gradients: Sequence[Tensor], config: MixingConfig) -> Tensor:
    """The most activated places (N, P, 2) in view coordinates; NaN for an image whose map says nothing."""
    return layercam_peaks(
        maps,
        gradients,
        config.num_patches,
        kind=config.attribution,
        sign=config.gradient_sign,
        suppress=config.gamma_max,
    )[0]


def places(
    maps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    config: MixingConfig,
    indices: Tensor,
    *,
    seed: int,
    epoch: int,
) -> Tensor:
    """Where the patches of the images `indices` (N,) go: `peaks`, or the least activated places where the configuration
    says so, (N, P, 2) in view coordinates.

    Most cells of a map are often not activated at all; which of them is then drawn by (seed, epoch, index).
    """
    if config.place != "least":
        return peaks(maps, gradients, config)
    activation = attribution(maps, gradients, config)
    largest = activation.amax(dim=(1, 2), keepdim=True)
    drawn = uniforms(seed, epoch, indices, Stream.TIES, activation[0].numel()).view_as(activation)
    # Small enough to decide between equal cells alone, which takes double precision, and above 0, as a peak has to be.
    inverted = torch.where(largest > 0, 1.0 - activation.double() / largest, torch.nan) + 1e-9 * (drawn + 1e-3)
    return find_peaks(inverted, config.num_patches, config.gamma_max)[0]


def first_view_gradients(maps: Mapping[str, Tensor], n: int) -> tuple[list[Tensor], list[Tensor]]:
    """Maps and gradients of the first N views after a backward pass over maps that retained their gradients."""
    return [a.detach()[:n] for a in maps.values()], [a.grad[:n] for a in maps.values()]


class PeakStore:
    """The places (y, x) in the source image where each training image was last most activated; NaN: not known yet.

    P·8 + 1 bytes an image, on the device.
    """

    def __init__(self, num_images: int, num_peaks: int, device: torch.device) -> None:
        self.places = torch.full((num_images, num_peaks, 2), torch.nan, device=device)
        self._updated = torch.zeros(num_images, dtype=torch.bool, device=device)

    def lookup(self, indices: Tensor) -> Tensor:
        """Places (N, P, 2) of the images `indices` (N,)."""
        return self.places[indices]

    def update(self, indices: Tensor, places: Tensor) -> None:
        """Remember `places` (N, P, 2) for `indices` (N,); NaN forgets."""
        self.places[indices] = places
        self._updated.index_fill_(0, indices, True)

    def state(self) -> dict[str, Tensor]:
        return {"places": self.places}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.places.copy_(state["places"])

    def synchronise(self) -> None:
        """Let all ranks know what each has learned since the last time; an image may come to another rank next.

        One collective of (P·2 + 1)·4 bytes an image. Every image was updated by at most one rank.
        """
        if world_size() > 1:
            mine = self._updated.view(-1, 1, 1)
            news = torch.where(mine, self.places, torch.zeros_like(self.places)).flatten(1)
            total = sum_over_ranks(torch.cat([news, self._updated.unsqueeze(1).float()], dim=1))
            updated = (total[:, -1] > 0).view(-1, 1, 1)
            self.places = torch.where(updated, total[:, :-1].view_as(self.places), self.places)
        self._updated.zero_()


def random_places(indices: Tensor, num_places: int, *, seed: int, epoch: int) -> Tensor:
    """Uniform places (N, P, 2), a function of (seed, epoch, index) only."""
    return uniforms(seed, epoch, indices, Stream.PLACE, 2 * num_places).view(-1, num_places, 2)


def else_random(places: Tensor, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
    """`places` (N, P, 2), and random ones where they are NaN."""
    return torch.where(places.isnan(), random_places(indices, places.shape[1], seed=seed, epoch=epoch), places)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch-norm layers normalise by the batch, as in training, but do not learn its statistics."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    tracked = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, was_tracked in zip(layers, tracked):
            layer.track_running_stats = was_tracked
