"""Which classes are known, which are unknown, and which images serve for what.

A protocol is data, not code: a `ClassSplit` names the classes, four `Partition`s say which images of which dataset go
where, and a hash over all of it travels with every file, run and model, so that two numbers are only ever compared when
they were measured on the same split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_pipeline.errors import InputError, unknown_name

if TYPE_CHECKING:
    from data_pipeline.sources import Source

ClassId = int | str
"""A class of a dataset: its label id or its name. Published splits use ids, custom ones names."""

Subset = Literal["train", "test"]

UNKNOWN = "unknown"
"""The answer of a model to an image of no known class."""

PARTITIONS = ("train", "calibration", "test_known", "test_unknown")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a dataset's images look like once they are stored.

    `mean` and `std` are per channel, of pixel values scaled to [0, 1]. `calibration_share` is the share of each known
    class's training images that is kept out of training to set the rejection threshold.
    """

    image_size: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    calibration_share: float = 0.05


_CIFAR = DatasetInfo(image_size=32, channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_IMAGENET = DatasetInfo(image_size=64, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

DATASETS: dict[str, DatasetInfo] = {
    # 1,347 training images in all: a twentieth of one class would be seven images, too few to set a threshold by.
    "digits": DatasetInfo(image_size=16, channels=1, mean=(0.3053,), std=(0.3500,), calibration_share=0.15),
    "mnist": DatasetInfo(image_size=32, channels=1, mean=(0.1307,), std=(0.3081,)),
    "svhn": DatasetInfo(image_size=32, channels=3, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tinyimagenet": _IMAGENET,
    "custom": _IMAGENET,
}


@dataclass(frozen=True, kw_only=True)
class ClassSplit:
    """The known classes of `dataset` and the unknown classes of `unknown_dataset`, in label order.

    `pool` says where all images come from: "official" takes training images from the dataset's training set and test
    images from its test set; "train" takes everything from the training images, which is what keeps a hyperparameter
    search away from the test set (see `Protocol.pseudo_open`).
    """

    dataset: str
    known: tuple[ClassId, ...]
    unknown: tuple[ClassId, ...] = ()
    unknown_dataset: str = ""
    pool: Literal["official", "train"] = "official"
    train_images: int | None = None
    """Use only so many training images, the same number of each class; None: all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unknown_dataset", self.unknown_dataset or self.dataset)
        if len(self.known) < 2:
            raise InputError(
                f"{len(self.known)} known class given; open set recognition needs at least two: name more known classes"
            )
        if self.train_images is not None and self.train_images < 2 * len(self.known):
            raise InputError(
                f"{self.train_images} training images for {len(self.known)} classes; use at least two for each class"
            )
        for kind, classes in (("known", self.known), ("unknown", self.unknown)):
            if len(set(classes)) != len(classes):
                raise InputError(f"a class is listed twice among the {kind} classes {list(classes)}: list each once")
        if UNKNOWN in self.known:
            raise InputError(f"a known class is called {UNKNOWN!r}, which is the answer for unknown images: rename it")
        both = set(self.known) & set(self.unknown)
        if both and self.dataset == self.unknown_dataset:
            raise InputError(f"classes {sorted(map(str, both))} are both known and unknown: remove them from one side")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A selection of labelled images: some classes of one subset of one dataset, and a share of each class.

    `share` is a half-open interval of [0, 1): each class's images are put in a fixed random order that depends on
    nothing but the class, and those between the two fractions are taken. Disjoint intervals give disjoint sets of
    images.
    """

    dataset: str
    subset: Subset
    classes: tuple[ClassId, ...]
    known: bool
    share: tuple[float, float] = (0.0, 1.0)
    per_class: int | None = None
    """At most so many images of each class; None: all."""

    def select(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """The partition's images in `source`: (indices (n,), labels (n,)), both int64, indices ascending.

        A known image's label is its class's place in `classes`; every unknown image's label is -1.

        Raises:
            InputError: a class is not in the source, or has too few images there.
        """
        indices, labels = [], []
        for place, class_id in enumerate(self.classes):
            label = _label_of(class_id, source.class_names)
            members = np.flatnonzero(source.labels == label)
            if len(members) == 0:
                raise InputError(
                    f"class {class_id!r} has no {self.subset} image in the {self.dataset} data: "
                    "add some, give a --root that holds it, or leave the class out"
                )
            members = np.random.default_rng([0, label]).permutation(members)
            low, high = (round(bound * len(members)) for bound in self.share)
            chosen = members[low:high][: self.per_class]
            if len(chosen) == 0:
                raise InputError(
                    f"class {class_id!r} has {len(members)} {self.subset} images, too few to be shared out "
                    f"between training and what is held out: give it {self._least()} or more, or leave the class out"
                )
            indices.append(chosen)
            labels.append(np.full(len(chosen), place if self.known else -1))
        order = np.argsort(np.concatenate(indices))
        return np.concatenate(indices)[order].astype(np.int64), np.concatenate(labels)[order].astype(np.int64)

    def _least(self) -> int:
        """The number of images of a class from which on its share always holds one."""
        low, high = self.share
        return next(n for n in range(1, 1000) if all(round(high * m) > round(low * m) for m in range(n, n + 100)))


@dataclass(frozen=True)
class Protocol:
    """An open set recognition experiment: `Protocol("cifar10", 0)` is the first published CIFAR-10 split.

    Attributes:
        name: one of `protocol_names()`, or "custom" together with `classes`.
        split: which of the published splits, from 0.
        classes: the class split itself; looked up from `name` and `split` unless given.
    """

    name: str
    split: int = 0
    classes: ClassSplit = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.classes is None:
            object.__setattr__(self, "classes", _published(self.name, self.split))

    @property
    def known(self) -> tuple[ClassId, ...]:
        return self.classes.known

    @property
    def unknown(self) -> tuple[ClassId, ...]:
        return self.classes.unknown

    @property
    def info(self) -> DatasetInfo:
        return DATASETS[self.classes.dataset]

    @property
    def openness(self) -> float:
        """1 − √(I / S) with I training classes and S test classes (the paper's section 4.1); 0 is closed set."""
        return 1.0 - math.sqrt(len(self.known) / (len(self.known) + len(self.unknown)))

    @property
    def train(self) -> Partition:
        """Images the encoder learns from, and later the gallery that test images are compared with."""
        limit = self.classes.train_images
        return dataclasses.replace(
            self._known("train", (0.0, self._bounds[0])), per_class=limit and limit // len(self.known)
        )

    @property
    def calibration(self) -> Partition:
        """Known images kept out of training; they set the rejection threshold and nothing else."""
        return self._known("train", self._bounds)

    @property
    def test_known(self) -> Partition:
        if self.classes.pool == "train":
            return self._known("train", (self._bounds[1], 1.0))
        return self._known("test", (0.0, 1.0))

    @property
    def test_unknown(self) -> Partition:
        subset, share = ("train", (self._bounds[1], 1.0)) if self.classes.pool == "train" else ("test", (0.0, 1.0))
        return Partition(
            dataset=self.classes.unknown_dataset, subset=subset, classes=self.unknown, known=False, share=share
        )

    @property
    def partitions(self) -> dict[str, Partition]:
        """The partitions by name, those without classes (no unknown class was named) left out."""
        parts = {name: getattr(self, name) for name in PARTITIONS}
        return {name: part for name, part in parts.items() if part.classes}

    @property
    def split_hash(self) -> str:
        """16 hexadecimal digits that change whenever any image changes its role."""
        parts = {name: asdict(part) for name, part in self.partitions.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def pseudo_open(self, seed: int) -> Protocol:
        """The known classes split again into pseudo-known and pseudo-unknown, using training images only.

        Hyperparameters chosen on it have never seen a real unknown class or a test image. A third of the known classes
        (at least one, and leaving at least two) become pseudo-unknown; which, depends on `seed`.
        """
        if seed < 0:
            raise InputError(f"the seed of a pseudo-open split is {seed}; set --pseudo-open to 0 or more")
        if len(self.known) < 3:
            raise InputError(
                f"protocol {self.name} has {len(self.known)} known classes; a pseudo-open split needs at least three"
            )
        order = np.random.default_rng([seed, self.split]).permutation(len(self.known))
        count = min(max(len(self.known) // 3, 1), len(self.known) - 2)
        pseudo_unknown = set(order[:count].tolist())
        return Protocol(
            f"{self.name}-pseudo{seed}",
            self.split,
            ClassSplit(
                dataset=self.classes.dataset,
                known=tuple(c for i, c in enumerate(self.known) if i not in pseudo_unknown),
                unknown=tuple(c for i, c in enumerate(self.known) if i in pseudo_unknown),
                pool="train",
                train_images=self.classes.train_images,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        classes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.classes).items()}
        return {"name": self.name, "split": self.split, "classes": classes}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Protocol:
        classes = {k: tuple(v) if isinstance(v, list) else v for k, v in record["classes"].items()}
        return cls(record["name"], record["split"], ClassSplit(**classes))

    @property
    def _bounds(self) -> tuple[float, float]:
        """Where the calibration share of a class's training images begins and ends."""
        end = 1.0 if self.classes.pool == "official" else 0.8
        return end - self.info.calibration_share, end

    def _known(self, subset: Subset, share: tuple[float, float]) -> Partition:
        return Partition(dataset=self.classes.dataset, subset=subset, classes=self.known, known=True, share=share)


def custom_protocol(known: Sequence[str], class_names: Sequence[str]) -> Protocol:
    """A protocol over the user's own classes: `known` as named, every other class of `class_names` unknown."""
    missing = [name for name in known if name not in class_names]
    if missing:
        raise InputError(
            f"known class {missing[0]!r} is not in the data; its classes: {', '.join(class_names)}: correct --known"
        )
    unknown = tuple(name for name in class_names if name not in known)
    return Protocol("custom", 0, ClassSplit(dataset="custom", known=tuple(known), unknown=unknown))


def protocol_names() -> tuple[str, ...]:
    """Every protocol that needs nothing but its name and split."""
    return tuple(_registry())


def split_count(name: str) -> int:
    """How many published splits the protocol has."""
    if name not in _registry():
        raise unknown_name("protocol", name, (*protocol_names(), "custom"))
    return len(_registry()[name])


@cache
def _registry() -> dict[str, tuple[ClassSplit, ...]]:
    published = json.loads(resources.files("data_pipeline").joinpath("osr_splits.json").read_text("utf-8"))
    # The digits splits are this project's own: known classes drawn once with numpy's default_rng(2024) and frozen here.
    digits = ((0, 2, 3, 5, 7, 9), (1, 2, 4, 5, 6, 9), (1, 5, 6, 7, 8, 9), (1, 4, 5, 6, 7, 8), (0, 1, 3, 5, 7, 9))
    registry = {"digits": tuple(_rest_unknown("digits", known, 10) for known in digits)}
    for name, dataset, total in (
        ("mnist", "mnist", 10),
        ("svhn", "svhn", 10),
        ("cifar10", "cifar10", 10),
        ("tinyimagenet", "tinyimagenet", 200),
    ):
        registry[name] = tuple(_rest_unknown(dataset, known, total) for known in published[name]["known"])
    for name in ("cifar+10", "cifar+50"):
        registry[name] = tuple(
            ClassSplit(dataset="cifar10", known=tuple(known), unknown=tuple(unknown), unknown_dataset="cifar100")
            for known, unknown in zip(published[name]["known"], published[name]["unknown_cifar100"])
        )
    # Closed-set protocols (the paper's table 3) and out-of-distribution ones (table 4) know every class.
    for name, dataset, total in (
        ("cifar10-closed", "cifar10", 10),
        ("cifar100-closed", "cifar100", 100),
        ("tinyimagenet-closed", "tinyimagenet", 100),
        ("tinyimagenet-all", "tinyimagenet", 200),  # what its figure 5 trains and probes on
    ):
        registry[name] = (ClassSplit(dataset=dataset, known=tuple(range(total))),)
    for name, outside, total in (("cifar10-ood-cifar100", "cifar100", 100), ("cifar10-ood-svhn", "svhn", 10)):
        registry[name] = (
            ClassSplit(dataset="cifar10", known=tuple(range(10)), unknown=tuple(range(total)), unknown_dataset=outside),
        )
    return registry


def _rest_unknown(dataset: str, known: Sequence[int], total: int) -> ClassSplit:
    return ClassSplit(
        dataset=dataset, known=tuple(known), unknown=tuple(label for label in range(total) if label not in known)
    )


def _published(name: str, split: int) -> ClassSplit:
    count = split_count(name)
    if not 0 <= split < count:
        raise InputError(f"protocol {name} has splits 0 to {count - 1}, not {split}: choose one of these")
    return _registry()[name][split]


def _label_of(class_id: ClassId, class_names: Sequence[str]) -> int:
    if isinstance(class_id, str):
        if class_id not in class_names:
            raise InputError(f"class {class_id!r} is not in the data; its classes: {', '.join(class_names)}")
        return list(class_names).index(class_id)
    if not 0 <= class_id < len(class_names):
        raise InputError(f"class {class_id} is not in the data, which has {len(class_names)} classes")
    return class_id
