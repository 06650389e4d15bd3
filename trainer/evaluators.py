"""What measures a model: one contract for every evaluator, and the evaluators that need nothing beyond it.

    model = FeatureModel.of(load_model("models:/gradmix-cifar10@champion"))      ours, or
    model = FeatureModel(network, image_size=32, mean=..., std=...)              any torch module
    subject = Subject(model, partitions)                                          with the images it is measured on
    evaluation = OutOfDistribution()(subject)                                     named numbers, and what plots need

An evaluator is a frozen dataclass, which is also its part of the command line, and is called with a `Subject`. Several
may be called with the same one: every partition goes through the model once.

Scores follow one convention: larger means more known. Logits too: the larger, the likelier the class. Numbers are
shares in [0, 1] unless their name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import InputError
from data_pipeline.loader import Batch
from data_pipeline.views import render_plain
from trainer.metrics import Interval
from trainer.registry import OpenSetModel

Features = Literal["embedding", "backbone"]

TEMPERATURE = 0.05
"""τ of the paper: what a mean cosine similarity is divided by to make a logit of it."""


class Outputs(NamedTuple):
    """What a model makes of M images.

    Attributes:
        features: (M, D) float32.
        logits: (M, C) float32, one for each known class; None from a model that knows features only.
    """

    features: Tensor
    logits: Tensor | None


class FeatureModel:
    """A network and how images are shown to it.

    Args:
        network: from normalised views (M, C, h, w) to features (M, D), or to a pair of features and logits (M, K). It is
            put into evaluation mode.
        image_size: h = w of the views, pixels; images of another size are resized.
        mean, std: per channel, of pixel values in [0, 1]; their number is that of the channels.
        layer: the module of `network` whose output (M, K, h', w') attribution maps are made of; None: no maps.
        batch_size: images at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layer: nn.Module | None = None,
        batch_size: int = 256,
    ) -> None:
        self.network, self.layer = network.eval(), layer
        self.image_size, self.batch_size = image_size, batch_size
        self.mean, self.std = tuple(mean), tuple(std)
        tensors = [*network.parameters(), *network.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")

    @classmethod
    def of(cls, model: OpenSetModel, features: Features = "embedding") -> FeatureModel:
        """A model of this project. Its logits are `gallery_logits` of its embeddings, so that the largest of them, over
        all images, orders as algorithm 1's score.

        Args:
            features: embedding: what the projection head makes, of length 1; backbone: the pooled last feature map
                before it.
        """
        card = model.card
        return cls(
            _OpenSetNetwork(model, features),
            image_size=card.image_size,
            mean=card.mean,
            std=card.std,
            layer=model.encoder.stages[-1],
        )

    def with_gallery(self, images: Tensor, labels: Tensor, k: int = 10) -> FeatureModel:
        """The same features, with `gallery_logits` over those of `images` (N, H, W, C), `labels` (N,), as logits."""
        network = _GalleryNetwork(self.network, self(images).features.to(self.device), labels.to(self.device), k)
        return FeatureModel(
            network,
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            layer=self.layer,
            batch_size=self.batch_size,
        )

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 images (M, H, W, C) as pixels (M, C, h, w) in [0, 1], at the model's size, on its device."""
        channels = len(self.mean)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != channels:
            raise ValueError(
                f"images must be uint8 of shape (M, H, W, {channels}), got {images.dtype} of shape {tuple(images.shape)}"
            )
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        return render_plain(images.to(self.device), size=self.image_size, **plain)

    def outputs(self, pixels: Tensor) -> Outputs:
        """Outputs of pixels (M, C, h, w) in [0, 1], with gradient."""
        mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        result = self.network((pixels - mean) / std)
        features, logits = (result, None) if isinstance(result, Tensor) else result
        return Outputs(features.float(), None if logits is None else logits.float())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Outputs of uint8 images (M, H, W, C) of any size, M ≥ 1, batch by batch, on the CPU."""
        parts = [self.outputs(self.pixels(part)) for part in images.split(self.batch_size)]
        features, logits = zip(*parts)
        return Outputs(torch.cat(features).cpu(), None if logits[0] is None else torch.cat(logits).cpu())


class Data(Protocol):
    """Images by partition: "train", "test_known", "test_unknown". `data_pipeline.loader.Partitions` is one, a dict of
    batches another."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Batch: ...


class Subject:
    """A model and the images it is measured on. What it makes of a partition is computed once."""

    def __init__(self, model: FeatureModel, data: Data, class_names: Sequence[str] = ()) -> None:
        """`class_names` are those of the known classes, in label order; only reading official corrupted images needs
        them."""
        self.model, self.data, self.class_names = model, data, tuple(class_names)
        self._outputs: dict[str, Outputs] = {}

    def __contains__(self, partition: str) -> bool:
        return partition in self.data

    def batch(self, partition: str) -> Batch:
        if partition not in self.data:
            raise InputError(f"this data has no {partition} images: choose a protocol that has, or another task")
        return self.data[partition]

    def labels(self, partition: str) -> np.ndarray:
        """(M,) int64, -1 for unknown."""
        return self.batch(partition).labels.cpu().numpy()

    def outputs(self, partition: str) -> Outputs:
        if partition not in self._outputs:
            self._outputs[partition] = self.model(self.batch(partition).images)
        return self._outputs[partition]

    def logits(self, partition: str) -> Tensor:
        return need_logits(self.outputs(partition))


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found.

    Attributes:
        numbers: by name; parts of a name are separated by "/".
        intervals: confidence intervals of some of the numbers.
        arrays: what plots and further computations need, by name; each evaluator says which.
    """

    numbers: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def prefixed(self, prefix: str) -> Evaluation:
        """The same under names that begin with `prefix` and "/"."""
        parts: list[Mapping] = [self.numbers, self.intervals, self.arrays]
        return Evaluation(*({f"{prefix}/{name}": value for name, value in part.items()} for part in parts))


@runtime_checkable
class Evaluator(Protocol):
    """Built from its configuration, which it is, and called with what it measures."""

    def __call__(self, subject: Subject) -> Evaluation:
        """Raises `InputError` if the subject lacks what it takes: a partition, logits, a layer."""
        ...


def need_logits(outputs: Outputs) -> Tensor:
    """The logits, or an `InputError` that says how to get some."""
    if outputs.logits is None:
        raise InputError("this model has features but no logits: give it classes with FeatureModel.with_gallery")
    return outputs.logits


def gallery_logits(features: Tensor, gallery: Sequence[Tensor], k: int) -> Tensor:
    """Logits (M, C): algorithm 1's class scores as mean similarities over τ, s_c / (k τ). With gradient.

    Args:
        features: (M, D).
        gallery: for each class its features (N_c, D), of length 1, N_c ≥ k.
    """
    directions = F.normalize(features, dim=1)
    scores = [(directions @ members.T).topk(k).values.mean(dim=1) for members in gallery]
    return torch.stack(scores, dim=1) / TEMPERATURE


def _by_class(gallery: Tensor, labels: Tensor, k: int) -> list[Tensor]:
    counts = torch.bincount(labels)
    if len(counts) == 0 or int(counts.min()) < k:
        raise InputError(f"a class has fewer than k = {k} gallery images: use a smaller k")
    return [F.normalize(gallery[labels == label], dim=1) for label in range(len(counts))]


class _OpenSetNetwork(nn.Module):
    def __init__(self, model: OpenSetModel, features: Features) -> None:
        super().__init__()
        self.encoder, self.features, self.k = model.encoder, features, model.card.k
        self.gallery = _by_class(model.gallery, model.gallery_labels, self.k)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encoder(views, ["conv5_2"])
        logits = gallery_logits(encoded.embeddings, self.gallery, self.k)
        backbone = encoded.maps["conv5_2"].mean(dim=(2, 3))
        return encoded.embeddings if self.features == "embedding" else backbone, logits


class _GalleryNetwork(nn.Module):
    def __init__(self, network: nn.Module, gallery: Tensor, labels: Tensor, k: int) -> None:
        super().__init__()
        self.network, self.k = network, k
        self.gallery = _by_class(gallery, labels, k)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        result = self.network(views)
        features = result if isinstance(result, Tensor) else result[0]
        return features, gallery_logits(features, self.gallery, self.k)
