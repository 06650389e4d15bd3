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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import InputError
from data_pipeline.loader import Batch
from data_pipeline.protocols import ClassId
from data_pipeline.views import render_plain
from trainer.config import Features
from trainer.encoder import Encoded
from trainer.evaluation.checks import check_finite, check_labels
from trainer.evaluation.detectors import WITHOUT_FITTING, DetectorName, Outputs, fit_detector
from trainer.metrics import (
    Interval,
    auroc,
    bootstrap_interval,
    detection_metrics,
    oscr,
    top_k_accuracy,
    two_nn,
)
from trainer.registry import OpenSetModel

TEMPERATURE = 0.05
"""τ of the paper: what a mean cosine similarity is divided by to make a logit of it."""


class FeatureModel:
    """A network and how images are shown to it.

    Args:
        network: from normalised views (M, C, h, w) to features (M, D), to a pair of features and logits (M, C), or
            to `Encoded`, as this project's encoders. It is put into evaluation mode.
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
    def of(cls, model: OpenSetModel, features: Features | None = None) -> FeatureModel:
        """A model of this project. Its logits are its classifier's, or without one `gallery_logits` of its embeddings,
        so that the largest of them orders as algorithm 1's score. A training image is in the gallery itself: one of its
        k similarities is 1, which detectors that are fitted to logits of training images see.

        Args:
            features: embedding: what the projection head makes, of length 1; backbone: the pooled last feature map.
                Default: the embedding, but with a classifier, which has no head, the backbone.
        """
        card = model.card
        if features is None:
            features = "embedding" if model.encoder.classifier is None else "backbone"
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
                f"images must be uint8 of shape (M, H, W, {channels}), "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        return render_plain(images.to(self.device), size=self.image_size, **plain)

    def outputs(self, pixels: Tensor) -> Outputs:
        """Outputs of pixels (M, C, h, w) in [0, 1], with gradient."""
        mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return Outputs(*_split(self.network((pixels - mean) / std), len(pixels)))

    def maps(self, pixels: Tensor) -> tuple[Outputs, Tensor]:
        """As `outputs`, and the output (M, K, h', w') of `layer` on the way there, of which gradients can be taken.

        Raises:
            InputError: the model has no `layer`.
        """
        if self.layer is None:
            raise InputError("this model names no layer to look at: give FeatureModel one with layer=")
        caught: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            # Weights may be frozen; what depends on the pixels has a gradient all the same.
            outputs = self.outputs(pixels.detach().requires_grad_())
        finally:
            handle.remove()
        return outputs, caught[-1]

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


Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Goes through what it is given and shows, under a name, how far it is of so many."""


class Subject:
    """A model and the images it is measured on. What it makes of a partition is computed once."""

    def __init__(
        self,
        model: FeatureModel,
        data: Data,
        class_names: Sequence[str] = (),
        *,
        classes: Sequence[ClassId] = (),
        track: Track = lambda items, name, total: items,
    ) -> None:
        """
        Args:
            class_names, classes: the known classes in label order, as their dataset names and numbers them; it takes
                them to read official corrupted images.
            track: shows the progress of evaluators that take long.
        """
        self.model, self.data, self.track = model, data, track
        self.classes, self.class_names = tuple(classes), tuple(class_names)
        self._outputs: dict[str, Outputs] = {}

    def __contains__(self, partition: str) -> bool:
        return partition in self.data

    def batch(self, partition: str) -> Batch:
        """Of 1 image or more; raises `InputError` if the data has none."""
        if partition not in self.data:
            raise InputError(f"this data has no {partition} images: choose a protocol that has, or another task")
        batch = self.data[partition]
        if len(batch.labels) == 0:
            raise InputError(
                f"{partition} has no images: put some into it, or leave it out and choose a task that does without"
            )
        return batch

    def some(self, partition: str, most: int | None) -> Batch:
        """At most so many of a partition's images, chosen at random with seed 0, in the partition's order."""
        batch = self.batch(partition)
        if most is None or most >= len(batch.labels):
            return batch
        chosen = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(batch.labels))[:most]))
        return Batch(*(column[chosen.to(column.device)] for column in batch))

    def labels(self, partition: str) -> np.ndarray:
        """(M,) int64, -1 for unknown."""
        return self.batch(partition).labels.cpu().numpy()

    def outputs(self, partition: str) -> Outputs:
        """What the model makes of a partition; raises `InputError` if it is not finite."""
        if partition not in self._outputs:
            outputs = self.model(self.batch(partition).images)
            for what, made in outputs._asdict().items():
                if made is not None:
                    check_finite(made, what, f"{partition} images")
            self._outputs[partition] = outputs
        return self._outputs[partition]

    def logits(self, partition: str) -> Tensor:
        """(M, C) float32; raises `InputError` if the model has none, or not finite ones."""
        return self.outputs(partition).need_logits()

    def correct(self) -> np.ndarray:
        """(M,) bool: whether the largest logit of a known test image is its class's, see `classified_right`."""
        return classified_right(self.logits("test_known"), self.labels("test_known"), "test_known images")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found.

    Attributes:
        numbers: by name; parts of a name are separated by "/".
        intervals: confidence intervals of some of the numbers.
        arrays: what plots and further computations need, by name; each evaluator says which.
        tested: how many images were measured, known and unknown ones together, each counted once: all of the
            partitions or as many as the evaluator's limit lets through. None: not said.
    """

    numbers: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    tested: int | None = None

    def prefixed(self, prefix: str) -> Evaluation:
        """The same under names that begin with `prefix` and "/"."""
        parts: list[Mapping] = [self.numbers, self.intervals, self.arrays]
        return Evaluation(
            *({f"{prefix}/{name}": value for name, value in part.items()} for part in parts), tested=self.tested
        )


@runtime_checkable
class Evaluator(Protocol):
    """Built from its configuration, which it is, and called with what it measures."""

    def __call__(self, subject: Subject) -> Evaluation:
        """Raises `InputError` if the subject lacks what it takes: a partition with images, logits, a layer, finite
        outputs, labels within the classes that they are compared with."""
        ...


def classified_right(logits: Tensor, labels: np.ndarray, images: str) -> np.ndarray:
    """(M,) bool: whether the largest of an image's finite logits (M, C), on the CPU, is its label's.

    Raises:
        InputError: a label is none of the C classes'. Such images, called `images` then, would count as wrong.
    """
    check_labels(labels, logits.shape[1], images, "the model")
    return logits.argmax(dim=1).numpy() == labels


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
    if k < 1:
        raise InputError(f"k is {k}; set it to 1 or more")
    if len(labels):
        check_labels(labels.cpu(), int(labels.max()) + 1, "gallery images", "the gallery")
    counts = torch.bincount(labels)
    if len(counts) == 0 or int(counts.min()) < k:
        raise InputError(f"a class has fewer than k = {k} gallery images: use a smaller k")
    return [F.normalize(gallery[labels == label], dim=1) for label in range(len(counts))]


def _split(result: Tensor | tuple[Tensor, Tensor | None] | Encoded, count: int) -> tuple[Tensor, Tensor | None]:
    """Features, and logits if there are any, in 32 bits, of whatever a network returns for `count` images; raises
    `InputError` if that is something else, of which some number could often be made all the same."""
    made = (result.embeddings, result.logits) if isinstance(result, Encoded) else result
    parts = [made, None] if isinstance(made, Tensor) else list(made) if isinstance(made, tuple | list) else []
    whole = [part for part in parts if part is not None]
    if (
        len(parts) != 2
        or parts[0] is None
        or not all(isinstance(part, Tensor) and part.ndim == 2 and len(part) == count for part in whole)
    ):
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in whole]
        raise InputError(
            f"the network makes {shapes or type(made).__name__} of {count} images: let it return features "
            f"({count}, D), or a pair of these and of logits ({count}, C)"
        )
    features, logits = parts
    return features.float(), None if logits is None else logits.float()


class _OpenSetNetwork(nn.Module):
    def __init__(self, model: OpenSetModel, features: Features) -> None:
        super().__init__()
        self.encoder, self.features, self.k = model.encoder, features, model.card.k
        self.gallery = None
        if model.encoder.classifier is None:
            self.gallery = _by_class(model.gallery, model.gallery_labels, self.k)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encoder(views, ["conv5_2"])
        logits = encoded.logits
        if self.gallery is not None:
            logits = gallery_logits(encoded.embeddings, self.gallery, self.k)
        backbone = encoded.maps["conv5_2"].mean(dim=(2, 3))
        return encoded.embeddings if self.features == "embedding" else backbone, logits


class _GalleryNetwork(nn.Module):
    def __init__(self, network: nn.Module, gallery: Tensor, labels: Tensor, k: int) -> None:
        super().__init__()
        self.network, self.k = network, k
        self.gallery = _by_class(gallery, labels, k)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        features, _ = _split(self.network(views), len(views))
        return features, gallery_logits(features, self.gallery, self.k)


# Evaluators


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """Error bars by drawing the test images anew."""

    resamples: int = 1000
    """How often to draw; 0 for no error bars, otherwise 2 or more."""
    confidence: float = 0.95
    """Share of the resampled metrics within the error bars, in (0, 1)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.resamples != 0 and self.resamples < 2:
            raise InputError(f"bootstrap.resamples is {self.resamples}; set it to 2 or more, or to 0 for no error bars")
        if not 0 < self.confidence < 1:
            raise InputError(f"bootstrap.confidence is {self.confidence}; set it within (0, 1)")

    def intervals(self, metrics: Mapping[str, tuple[Callable[..., float], tuple[int, ...]]]) -> dict[str, Interval]:
        """By name, the interval of each metric, given with the sizes of its groups; see `bootstrap_interval`."""
        if self.resamples == 0:
            return {}
        options = {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}
        return {name: bootstrap_interval(metric, *sizes, **options) for name, (metric, sizes) in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class ClosedSet:
    """Closed-set accuracy: the share of known test images whose largest logit is their class's.

    Numbers: closed_set_accuracy, and top5_accuracy where there are more than 5 classes.
    """

    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __call__(self, subject: Subject) -> Evaluation:
        logits, correct = subject.logits("test_known").numpy(), subject.correct()
        numbers = {"closed_set_accuracy": float(correct.mean())}
        if logits.shape[1] > 5:
            numbers["top5_accuracy"] = top_k_accuracy(logits, subject.labels("test_known"), 5)
        intervals = self.bootstrap.intervals(
            {"closed_set_accuracy": (lambda i: float(correct[i].mean()), (len(correct),))}
        )
        return Evaluation(numbers, intervals, tested=len(correct))


@dataclass(frozen=True, kw_only=True)
class OpenSet:
    """Open set recognition by the score of one detector.

    Numbers: auroc, oscr, closed_set_accuracy. Arrays: known_scores (n,), known_correct (n,) bool, unknown_scores (m,).
    """

    detector: DetectorName = "max_logit"
    """What scores an image; max_logit of a model of this project orders as algorithm 1's score."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __call__(self, subject: Subject) -> Evaluation:
        correct = subject.correct()
        known, unknown = _scores_of(subject, self.detector)
        numbers = {
            "auroc": auroc(known, unknown),
            "oscr": oscr(known, correct, unknown),
            "closed_set_accuracy": float(correct.mean()),
        }
        both = (len(known), len(unknown))
        intervals = self.bootstrap.intervals(
            {
                "auroc": (lambda i, j: auroc(known[i], unknown[j]), both),
                "oscr": (lambda i, j: oscr(known[i], correct[i], unknown[j]), both),
                "closed_set_accuracy": (lambda i: float(correct[i].mean()), both[:1]),
            }
        )
        arrays = {"known_scores": known, "known_correct": correct, "unknown_scores": unknown}
        return Evaluation(numbers, intervals, arrays, tested=sum(both))


@dataclass(frozen=True, kw_only=True)
class OutOfDistribution:
    """Out-of-distribution detection by the score of one detector: the metrics of the paper's table 4 in their usual
    definitions, see `trainer.metrics.detection_metrics`.

    Numbers: tnr_at_95_tpr, auroc, dtacc, auin, auout. Arrays: known_scores (n,), unknown_scores (m,).
    """

    detector: DetectorName = "max_logit"
    """What scores an image; max_logit of a model of this project orders as algorithm 1's score."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __call__(self, subject: Subject) -> Evaluation:
        known, unknown = _scores_of(subject, self.detector)
        both = (len(known), len(unknown))
        intervals = self.bootstrap.intervals({"auroc": (lambda i, j: auroc(known[i], unknown[j]), both)})
        arrays = {"known_scores": known, "unknown_scores": unknown}
        return Evaluation(detection_metrics(known, unknown), intervals, arrays, tested=sum(both))


@dataclass(frozen=True, kw_only=True)
class Detectors:
    """Several detectors side by side.

    Numbers, for each detector NAME: NAME/auroc, NAME/oscr, NAME/tnr_at_95_tpr, NAME/dtacc, NAME/auin, NAME/auout; and
    closed_set_accuracy, which all share. Arrays: NAME/known_scores (n,), NAME/unknown_scores (m,), known_correct (n,).
    """

    names: tuple[DetectorName, ...] = get_args(DetectorName)
    """Which to compare."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("detectors.names is empty; name at least one detector")

    def __call__(self, subject: Subject) -> Evaluation:
        numbers, intervals, arrays = {}, {}, {}
        for name in self.names:
            osr = OpenSet(detector=name, bootstrap=self.bootstrap)(subject)
            known, correct, unknown = osr.arrays.values()
            numbers[f"{name}/oscr"] = osr.numbers["oscr"]
            for metric, value in detection_metrics(known, unknown).items():
                numbers[f"{name}/{metric}"] = value
            for metric in osr.intervals.keys() & {"auroc", "oscr"}:
                intervals[f"{name}/{metric}"] = osr.intervals[metric]
            arrays |= {f"{name}/known_scores": known, f"{name}/unknown_scores": unknown, "known_correct": correct}
        numbers["closed_set_accuracy"] = float(subject.correct().mean())
        return Evaluation(numbers, intervals, arrays, tested=osr.tested)


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimension:
    """Intrinsic dimension of a partition's features by TwoNN (the paper's table 1), see `trainer.metrics.two_nn`.

    Numbers: intrinsic_dimension (not a share), images. Arrays: log_ratio, log_survival, the points of the fit.
    """

    partition: Literal["train", "test_known", "test_unknown"] = "test_known"
    """Whose images."""
    max_images: int = 20_000
    """At most so many of them, chosen at random with seed 0; 3 or more. Time grows with the square."""

    def __post_init__(self) -> None:
        if self.max_images < 3:
            raise InputError(f"dimension.max-images is {self.max_images}; set it to 3 or more")

    def __call__(self, subject: Subject) -> Evaluation:
        features = subject.outputs(self.partition).features.numpy()
        chosen = np.random.default_rng(0).permutation(len(features))[: self.max_images]
        try:
            found = two_nn(features[chosen])
        except ValueError as error:
            raise InputError(
                f"the features of {len(chosen)} {self.partition} images have no intrinsic dimension ({error}): there "
                "are too few images, or the model tells none of them apart"
            ) from error
        return Evaluation(
            {"intrinsic_dimension": found.dimension, "images": float(len(chosen))},
            arrays={"log_ratio": found.log_ratio, "log_survival": found.log_survival},
            tested=len(chosen),
        )


def _scores_of(subject: Subject, name: DetectorName) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the known (n,) and the unknown (m,) test images."""
    train = None if name in WITHOUT_FITTING else (subject.outputs("train"), subject.labels("train"))
    score = fit_detector(name, train)
    known, unknown = (score(subject.outputs(partition)) for partition in ("test_known", "test_unknown"))
    return known, unknown
