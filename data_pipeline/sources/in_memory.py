"""Datasets that are read whole: the bundled digits, and MNIST, SVHN and CIFAR by way of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.images import to_uint8
from data_pipeline.sources.source import Source, Subset, digest, one_line


def open_digits(subset: Subset, channels: Literal[1, 3]) -> Source:
    """scikit-learn's 1,797 digits of 8×8. They have no official split: a fixed quarter is "test"."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    num_train = len(order) * 3 // 4
    chosen = np.sort(order[:num_train] if subset == "train" else order[num_train:])
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    class_names = [str(name) for name in digits.target_names]
    return _ArraySource(f"digits {subset}", images, class_names, digits.target[chosen], channels)


def open_torchvision(root: Path, dataset: str, subset: Subset, channels: Literal[1, 3]) -> Source:
    """torchvision's files under root, downloaded into it when they are not there."""
    from torchvision import datasets

    class_name, files = {
        "mnist": ("MNIST", "MNIST/raw/*-ubyte"),
        "svhn": ("SVHN", f"{subset}_32x32.mat"),
        "cifar10": ("CIFAR10", "cifar-10-batches-py/*"),
        "cifar100": ("CIFAR100", "cifar-100-python/*"),
    }[dataset]
    which = {"split": subset} if dataset == "svhn" else {"train": subset == "train"}
    try:
        data: Any = getattr(datasets, class_name)(root, **which, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:  # its ways to say "no network" and "damaged"
        raise InputError(
            f"{root / files} is missing or damaged, and to download it failed ({one_line(error)}); "
            f"put the files of torchvision's {class_name} there, or delete damaged ones and connect to the network"
        ) from error

    digits = [str(digit) for digit in range(10)]
    if dataset == "mnist":
        images, class_names, labels = data.data.numpy(), digits, data.targets.numpy()
    elif dataset == "svhn":
        images, class_names, labels = data.data.transpose(0, 2, 3, 1), digits, data.labels
    else:
        images, class_names, labels = data.data, data.classes, np.array(data.targets)
    return _ArraySource(f"{dataset} {subset}", images, class_names, labels, channels)


class _ArraySource(Source):
    """Images that are in memory: `images` is uint8 (n, H, W) or (n, H, W, 3)."""

    def __init__(
        self, name: str, images: np.ndarray, class_names: Sequence[str], labels: np.ndarray, channels: Literal[1, 3]
    ) -> None:
        super().__init__(class_names, labels, channels)
        self._name = name
        self._images = images

    @property
    def fingerprint(self) -> str:
        return digest(self.class_names, self.labels.tobytes(), np.ascontiguousarray(self._images).data)

    def describe(self, index: int) -> str:
        return f"{self._name} image {index}"

    def _pixels(self, index: int) -> np.ndarray:
        return to_uint8(Image.fromarray(self._images[index]), self.channels)
