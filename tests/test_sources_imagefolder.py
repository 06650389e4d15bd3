"""Folders of images: which classes, and which images are for training and which for testing."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from data_pipeline.sources import open_source
from tests.sources import by_name, check, encode, error, image_folder, random_images, write


@pytest.mark.parametrize("test_folder", ["test", "val", "valid", "validation"])
def test_image_folder_with_subsets(tmp_path: Path, test_folder: str) -> None:
    images = random_images((5, 6, 4, 3))
    names = ["train/cat/1.png", "train/dog/deep/er/2.PNG", "train/dog/1.bmp", f"{test_folder}/cat/1.png"]
    for name, image in zip([*names, f"{test_folder}/emu/1.tiff"], images):
        write(tmp_path / name, encode(image, {".bmp": "BMP", ".tiff": "TIFF"}.get(Path(name).suffix, "PNG")))
    write(tmp_path / "train/cat/notes.txt", "no image")
    write(tmp_path / "train/cat/._1.png", "what macOS leaves")
    write(tmp_path / "train/.cache/thumb.png", "hidden")
    opened = {"kind": None, "dataset": "custom", "root": tmp_path}
    classes = ("cat", "dog", "emu")
    check(opened | {"subset": "train"}, images[[0, 2, 1]], [0, 1, 1], classes)
    check(opened | {"subset": "test"}, images[[3, 4]], [0, 2], classes)
    assert image_folder(tmp_path).describe(2) == str(tmp_path / "train/dog/deep/er/2.PNG")


def test_image_folder_split_is_stable(tmp_path: Path) -> None:
    content = encode(random_images((2, 2)))
    for number in range(300):
        write(tmp_path / f"{'ab'[number % 2]}/{number}.png", content)
    train, test = (by_name(image_folder(tmp_path, subset), tmp_path) for subset in ("train", "test"))
    assert not train.keys() & test.keys() and len(train) + len(test) == 300
    assert 40 <= len(test) <= 80
    held_out = {
        name
        for name in train.keys() | test.keys()
        if int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % 5 == 0
    }
    assert test.keys() == held_out

    for number in range(300):
        write(tmp_path / f"{'abc'[number % 3]}/new {number}.png", content)
    grown_train, grown_test = (by_name(image_folder(tmp_path, subset), tmp_path) for subset in ("train", "test"))
    assert train.keys() < grown_train.keys() and test.keys() < grown_test.keys()
    copy = tmp_path.parent / "moved elsewhere"
    shutil.copytree(tmp_path, copy)
    assert by_name(image_folder(copy, "test"), copy).keys() == grown_test.keys()
    shutil.rmtree(copy)


def test_image_folder_with_classes_called_train_and_custom(tmp_path: Path) -> None:
    for name in ("car", "custom", "train"):
        for number in range(20):
            write(tmp_path / f"{name}/sub/{number}.png", encode(random_images((2, 2))))
    assert image_folder(tmp_path).class_names == ("car", "custom", "train")


def test_image_folder_of_a_named_dataset_beside_others(tmp_path: Path) -> None:
    for dataset, classes in (("cifar10", "ab"), ("cifar100", "xyz")):
        for name in classes:
            write(tmp_path / f"{dataset}/train/{name}/1.png", encode(random_images((2, 2))))
    source = open_source("imagefolder", dataset="cifar100", subset="train", root=tmp_path)
    assert source.class_names == ("x", "y", "z")


def test_image_folder_without_images(tmp_path: Path) -> None:
    opened = {"kind": None, "dataset": "custom", "root": tmp_path}
    write(tmp_path / "loose.png", encode(random_images((2, 2))))
    assert f"no images found: {tmp_path} has no class folders; put" in error(**opened, subset="train")
    write(tmp_path / "a/photo.heic", "a format that Pillow does not know")
    write(tmp_path / "b/1.png", encode(random_images((2, 2))))
    test = open_source(**opened, subset="test")
    assert len(test) == 1  # by the hash of b/1.png
    assert test.class_names == ("b",) and test.empty_classes == ("a",)
    message = error(**opened, subset="train")
    assert f"no images found for train in {tmp_path}; add some" in message and "make folders train and test" in message


def test_image_folder_without_a_test_folder(tmp_path: Path) -> None:
    write(tmp_path / "train/a/1.png", encode(random_images((2, 2))))
    opened = {"kind": None, "dataset": "custom", "root": tmp_path}
    assert len(open_source(**opened, subset="train")) == 1
    assert f"there is no test or val folder beside {tmp_path / 'train'}" in error(**opened, subset="test")
    write(tmp_path / "test/unlabelled.png", encode(random_images((2, 2))))
    assert f"no images found for test in {tmp_path / 'test'}; add some in class folders" == error(
        **opened, subset="test"
    )
