"""How much of an image a model goes by: attribution maps and S_M(τ) (the paper's figure 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.views import ViewConfig, draw_parameters, render_view
from trainer.evaluation.checks import check_finite
from trainer.evaluation.evaluators import TEMPERATURE, Evaluation, FeatureModel, Subject
from trainer.gradmix import activation_map
from trainer.losses import simclr_loss


def activated_share(maps: Tensor, thresholds: Sequence[float]) -> Tensor:
    """S_M(τ) (N, T): the share of each map's cells whose value is above each threshold.

        S_M(τ) = #{(i, j): M_ij > τ} / |M|

    Args:
        maps: (N, h, w).
        thresholds: τ, T of them.

    Raises:
        InputError: a map is not finite; NaN is above no threshold, as if the model looked nowhere.
    """
    check_finite(maps, "attribution maps", "images")
    limits = torch.as_tensor(thresholds, dtype=maps.dtype, device=maps.device)
    return (maps.flatten(1).unsqueeze(1) > limits.view(1, -1, 1)).float().mean(dim=2)


def _named(threshold: float) -> str:
    """With one digit where that is all of it: 1e-05, but 2.15e-04, which is not 2e-04."""
    short = f"{threshold:.0e}"
    return short if math.isclose(float(short), threshold, rel_tol=1e-6) else f"{threshold:.2e}"


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Attribution maps of known test images, and the share of them above a threshold.

    The loss is the self-supervised one of training (eq. 1) between the plain image and an augmented view of it, over
    batches of `batch_size`; the map is that of the plain image, in the resolution of the model's layer. Its values
    are those of the gradient of a mean over the batch, so they depend on the batch size.

    Numbers: activated_share/TAU for some of the thresholds, and activated_share, the mean over all of them. Arrays:
    threshold (T,), activated_share (T,), images uint8 (E, H, W, C) and maps (E, h, w) of the examples.
    """

    attribution: Literal["layercam", "gradcam"] = "layercam"
    """How the map is made: eqs. 6-7 of the paper, or eqs. 4-5."""
    gradient_sign: Literal[1, -1] = 1
    """1: gradient of the loss, as written in the paper; -1: of its negative, the class-activation reading."""
    lowest: float = 1e-5
    """Smallest τ; above 0."""
    highest: float = 1e-3
    """Largest τ; above the smallest."""
    thresholds: int = 41
    """How many τ, evenly on a logarithmic scale; 2 or more."""
    batch_size: int = 256
    """Images of a batch of the loss; 2 or more. What does not fill a batch is left out, unless it is all there is."""
    max_images: int | None = 2560
    """At most so many images, chosen at random with seed 0; 2 or more. None: all."""
    examples: int = 8
    """Images and maps to keep for pictures; 0 or more."""
    views: tyro.conf.Suppress[ViewConfig | None] = None
    """The augmentation of the second view. Default: SimCLR's, without colour where images are grey."""
    seed: int = 0
    """Seed of the augmentation."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest or self.thresholds < 2:
            raise InputError(
                f"attribution.lowest is {self.lowest}, highest {self.highest}, thresholds {self.thresholds}; set them "
                "ascending and above 0, and to 2 or more"
            )
        if self.batch_size < 2 or (self.max_images is not None and self.max_images < 2):
            raise InputError("attribution.batch-size and attribution.max-images contrast images: set them to 2 or more")

    def __call__(self, subject: Subject) -> Evaluation:
        batch = subject.some("test_known", self.max_images)
        count = len(batch.labels)
        whole = count // self.batch_size * self.batch_size or count
        parts = torch.arange(whole).split(self.batch_size)
        maps = torch.cat(
            [
                self.maps(subject.model, batch.images[part], batch.indices[part])
                for part in subject.track(parts, "attribution", len(parts))
            ]
        )
        thresholds = np.geomspace(self.lowest, self.highest, self.thresholds)
        share = activated_share(maps, thresholds.tolist()).mean(dim=0).numpy()
        marks = [0, self.thresholds // 2, self.thresholds - 1]
        return Evaluation(
            {
                "activated_share": float(share.mean()),
                **{f"activated_share/{_named(thresholds[mark])}": float(share[mark]) for mark in marks},
            },
            arrays={
                "threshold": thresholds,
                "activated_share": share,
                "images": batch.images[: self.examples].cpu().numpy(),
                "maps": maps[: self.examples].numpy(),
            },
            tested=whole,
        )

    def maps(self, model: FeatureModel, images: Tensor, indices: Tensor) -> Tensor:
        """Attribution maps (N, h, w) of uint8 images (N, H, W, C), N ≥ 2, on the CPU, 0 or more.

        Raises:
            InputError: there are fewer images, or the model has no layer to look at.
        """
        if len(images) < 2:
            # The loss of one image is 0 whatever the model does, and so is its map.
            raise InputError(
                f"attribution contrasts images with each other, but got {len(images)}: give 2 or more test_known ones"
            )
        images = images.to(model.device)
        channels = images.shape[3]
        views = self.views or (ViewConfig() if channels == 3 else ViewConfig(saturation=0, hue=0, grayscale=0))
        parameters = draw_parameters(
            views, tuple(images.shape[1:3]), indices.to(model.device), seed=self.seed, epoch=0, view=1
        )
        augmented = render_view(
            images, parameters, size=model.image_size, mean=(0.0,) * channels, std=(1.0,) * channels
        )
        outputs, layer = model.maps(torch.cat([model.pixels(images), augmented]))
        first, second = F.normalize(outputs.features, dim=1).chunk(2)
        (gradient,) = torch.autograd.grad(simclr_loss(first, second, TEMPERATURE), layer)
        n = len(images)
        return activation_map(layer[:n].detach(), gradient[:n], self.attribution, self.gradient_sign).float().cpu()
