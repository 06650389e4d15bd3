"""A model whose answers can be computed by hand, and one of this project that nobody has trained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.loader import Batch
from data_pipeline.protocols import Protocol
from trainer.config import EncoderConfig
from trainer.encoder import Encoder
from trainer.evaluation.evaluators import FeatureModel
from trainer.registry import ModelCard, OpenSetModel

SIZE = 8
COLOURS = np.array([[220, 40, 40], [40, 200, 40], [40, 40, 210]])


class MeanColour(nn.Module):
    """Features are the means of the channels; the logit of class c is how much of channel c there is, times `scale`."""

    def __init__(self, with_logits: bool = True, scale: float = 10.0) -> None:
        super().__init__()
        self.identity, self.with_logits, self.scale = nn.Identity(), with_logits, scale

    def forward(self, views: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        means = self.identity(views).mean(dim=(2, 3))
        return (means, self.scale * means) if self.with_logits else means


def colour_model(with_logits: bool = True, scale: float = 10.0) -> FeatureModel:
    network = MeanColour(with_logits, scale)
    return FeatureModel(network, image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, layer=network.identity, batch_size=7)


class Diverged(MeanColour):
    """`MeanColour` that answers NaN to images of which a channel has a mean of `above` or more."""

    def __init__(self, above: float) -> None:
        super().__init__()
        self.above = above

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        views = self.identity(views)
        spoilt = views.mean(dim=(2, 3)).amax(dim=1) >= self.above
        return super().forward(views.masked_fill(spoilt.view(-1, 1, 1, 1), torch.nan))


def diverged_model(above: float = 0.0) -> FeatureModel:
    """Without a limit every answer is NaN; above 0.84 it is only that to red images of `colour_data`."""
    network = Diverged(above)
    return FeatureModel(network, image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, layer=network.identity, batch_size=7)


def batch_of(images: np.ndarray, labels: np.ndarray) -> Batch:
    return Batch(torch.from_numpy(images), torch.from_numpy(labels).long(), torch.arange(len(labels)))


def colour_data(seed: int = 0, size: int = SIZE) -> dict[str, Batch]:
    """Red, green and blue images; the unknown ones are grey."""
    rng = np.random.default_rng(seed)

    def images(colours: np.ndarray) -> np.ndarray:
        noise = rng.normal(0, 12, (len(colours), size, size, 3))
        return np.clip(colours[:, None, None] + noise, 0, 255).astype(np.uint8)

    labels = np.arange(60) % 3
    grey = np.full((40, 3), 95) + rng.integers(-20, 20, (40, 1))
    return {
        "train": batch_of(images(COLOURS[labels]), labels),
        "test_known": batch_of(images(COLOURS[labels[:31]]), labels[:31]),
        "test_unknown": batch_of(images(grey), np.full(40, -1)),
    }


def without_images(data: dict[str, Batch], partition: str) -> dict[str, Batch]:
    """The same data, in which the partition is there but empty."""
    return data | {partition: Batch(*(column[:0] for column in data[partition]))}


def open_set_model(k: int = 3, classifier: str | None = None) -> OpenSetModel:
    """Of digits, split 0, with random weights and a random gallery."""
    torch.manual_seed(0)
    protocol = Protocol("digits")
    card = ModelCard(
        protocol=protocol.to_dict(), split_hash=protocol.split_hash, class_names=tuple(map(str, protocol.known)),
        encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=8), image_size=16, channels=1,
        mean=protocol.info.mean, std=protocol.info.std, k=k, threshold=0.0, accept=0.95,
        classifier=classifier,
    )  # fmt: skip
    encoder = Encoder(card.encoder, 1, classifier, len(card.class_names))
    gallery = nn.functional.normalize(torch.randn(48, encoder.embedding_dim), dim=1)
    return OpenSetModel(card, encoder, gallery, torch.arange(48) % 6)
