"""Digits, and what torchvision reads against tiny stand-ins in the real formats."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from sklearn.datasets import load_digits
from torchvision import datasets

from data_pipeline.sources import open_source
from tests.sources import DIGITS, check, error, random_images, write, write_mnist

pytestmark = pytest.mark.usefixtures("no_network")


def test_digits() -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    for subset, chosen in (("train", np.sort(order[:1347])), ("test", np.sort(order[1347:]))):
        images = (digits.images[chosen] * 255 / 16).round().astype(np.uint8)
        assert images.max() == 255
        check(
            {"kind": None, "dataset": "digits", "subset": subset, "root": None},
            images,
            digits.target[chosen].tolist(),
            DIGITS,
        )


def test_digits_say_which_image(tmp_path: Path) -> None:
    assert open_source("bundled", dataset="digits", subset="test", root=tmp_path).describe(3) == "digits test image 3"


@pytest.mark.parametrize("own_folder", [False, True])
def test_mnist(tmp_path: Path, own_folder: bool) -> None:
    write_mnist(tmp_path / "mnist" if own_folder else tmp_path)
    for subset, count in (("train", 6), ("test", 4)):
        check(
            {"kind": None, "dataset": "mnist", "subset": subset, "root": tmp_path},
            random_images((count, 28, 28), seed=count),
            [0, 2, 4, 6, 8, 0][:count],
            DIGITS,
        )


def test_mnist_damaged(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    message = error(kind=None, dataset="mnist", subset="train", root=tmp_path)
    assert f"{tmp_path / 'MNIST/raw/*-ubyte'} is missing or damaged" in message
    assert "put the files of torchvision's MNIST there" in message


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checksums = {}
    for subset, count in (("train", 5), ("test", 3)):
        images = random_images((count, 32, 32, 3), seed=count)
        digits = np.arange(8, 8 + count) % 10
        path = tmp_path / f"{subset}_32x32.mat"
        # As published: images last axis, and the digit 0 as class 10.
        scipy.io.savemat(
            path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)}
        )
        url, name, _ = datasets.SVHN.split_list[subset]
        checksums[subset] = [url, name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", checksums)
    for subset, count in (("train", 5), ("test", 3)):
        check(
            {"kind": None, "dataset": "svhn", "subset": subset, "root": tmp_path},
            random_images((count, 32, 32, 3), seed=count),
            [8, 9, 0, 1, 2][:count],
            DIGITS,
        )


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, dataset: type[datasets.CIFAR10], names: list[str]) -> None:
    """Batches of 2 images, with torchvision's checksums replaced by theirs."""
    label_key = "labels" if dataset is datasets.CIFAR10 else "fine_labels"

    def dump(name: str, content: dict) -> str:
        path = write(root / dataset.base_folder / name, pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        written = []
        for number, (name, _) in enumerate(getattr(dataset, files)):
            planes = cifar_batch(name).transpose(0, 3, 1, 2).reshape(2, -1)
            written.append([name, dump(name, {"data": planes, label_key: [number, number + 1]})])
        monkeypatch.setattr(dataset, files, written)
    meta = {**dataset.meta, "md5": dump(dataset.meta["filename"], {dataset.meta["key"]: names})}
    monkeypatch.setattr(dataset, "meta", meta)


def cifar_batch(name: str) -> np.ndarray:
    return random_images((2, 32, 32, 3), seed=sum(name.encode()))


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"class {number}" for number in range(10)]
    write_cifar(tmp_path / "cifar10", monkeypatch, datasets.CIFAR10, names)
    opened = {"kind": "torchvision", "dataset": "cifar10", "root": tmp_path}
    images = np.concatenate([cifar_batch(f"data_batch_{number}") for number in range(1, 6)])
    check(opened | {"subset": "train"}, images, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5], tuple(names))
    check(opened | {"subset": "test"}, cifar_batch("test_batch"), [0, 1], tuple(names))
    source = open_source(**opened, subset="train")
    assert source.describe(7) == "cifar10 train image 7"
    source[7][0][:] = 0
    assert (source[7][0] == images[7]).all(), "a caller's change reached the dataset"


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"class {number}" for number in range(100)]
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR100, names)
    opened = {"kind": None, "dataset": "cifar100", "root": tmp_path}
    check(opened | {"subset": "train"}, cifar_batch("train"), [0, 1], tuple(names))
    check(opened | {"subset": "test"}, cifar_batch("test"), [0, 1], tuple(names))


@pytest.mark.parametrize(
    "dataset, looked_for",
    [
        ("mnist", "MNIST/raw/*-ubyte"),
        ("svhn", "test_32x32.mat"),
        ("cifar10", "cifar-10-batches-py/*"),
        ("cifar100", "cifar-100-python/*"),
    ],
)
def test_torchvision_without_data_or_network(dataset: str, looked_for: str, tmp_path: Path) -> None:
    message = error(kind=None, dataset=dataset, subset="test", root=tmp_path)
    assert f"{tmp_path / looked_for} is missing" in message
    assert "no network" in message and "connect to the network" in message
