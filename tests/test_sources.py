"""Which source is opened for a dataset, and what changes a fingerprint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.sources import open_source
from tests.sources import encode, error, random_images, write, write_mnist, write_parquet

pytestmark = pytest.mark.usefixtures("no_network")


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    assert "unknown dataset 'mnits'; known: digits, mnist, " in error(
        kind=None, dataset="mnits", subset="train", root=tmp_path
    )
    message = error(kind="hdf5", dataset="mnist", subset="train", root=tmp_path)
    assert message == "unknown source of mnist 'hdf5'; known: torchvision, parquet, imagefolder"
    assert "known: train, test" in error(kind=None, dataset="digits", subset="val", root=None)
    assert "1 or 3 channels, not 4" in error(kind=None, dataset="digits", subset="train", root=None, channels=4)


@pytest.mark.parametrize(
    "kind, dataset, able",
    [
        ("bundled", "mnist", "torchvision, parquet, imagefolder"),
        ("torchvision", "tinyimagenet", "tinyimagenet, parquet, imagefolder"),
        ("tinyimagenet", "custom", "imagefolder, parquet"),
    ],
)
def test_a_kind_that_cannot_give_the_dataset_lists_those_that_can(kind: str, dataset: str, able: str) -> None:
    message = error(kind=kind, dataset=dataset, subset="train", root=None)
    assert message == f"source '{kind}' cannot give {dataset}; these can: {able}"


@pytest.mark.parametrize("dataset", ["mnist", "tinyimagenet", "custom"])
def test_a_root_is_needed(dataset: str) -> None:
    assert "needs --root" in error(kind=None, dataset=dataset, subset="train", root=None)


@pytest.mark.parametrize("kind", ["parquet", "imagefolder"])
def test_a_root_that_is_not_there(kind: str, tmp_path: Path) -> None:
    message = error(kind=kind, dataset="mnist", subset="train", root=tmp_path / "nowhere")
    assert f"there is no folder {tmp_path / 'nowhere'}; pass --root" in message


def test_a_root_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "data")
    assert len(open_source(None, dataset="mnist", subset="train", root=Path("~/data"))) == 6


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    message = error(kind=None, dataset="custom", subset="train", root=tmp_path)
    assert message == f"cannot read {tmp_path}: Permission denied; check it and its permissions"


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_the_fingerprint_changes_with_the_images_and_their_labels_only(kind: str, tmp_path: Path) -> None:
    images = random_images((3, 8, 9))

    def fingerprint(folder: str, places: list[int], labels: list[int]) -> str:
        root = tmp_path / folder
        if kind == "imagefolder":
            for number, (place, label) in enumerate(zip(places, labels)):
                write(root / f"train/{'ab'[label]}/{number}.png", encode(images[place]))
        else:
            write_parquet(root / "train.parquet", images[places], labels, ["a", "b"])
        for path in root.rglob("*.p*"):
            os.utime(path, ns=(0, 0))
        return open_source(kind, dataset="custom", subset="train", root=root).fingerprint

    whole = fingerprint("same", [0, 1, 2], [0, 1, 1])
    assert fingerprint("again", [0, 1, 2], [0, 1, 1]) == whole
    assert fingerprint("fewer", [0, 1], [0, 1]) != whole
    assert fingerprint("labels", [0, 1, 2], [0, 0, 1]) != whole
    path = next((tmp_path / "same").rglob("*.p*"))
    os.utime(path, ns=(0, 1))
    assert open_source(kind, dataset="custom", subset="train", root=tmp_path / "same").fingerprint != whole


def test_the_fingerprint_of_arrays_is_of_their_pixels() -> None:
    train, again, test = (open_source(None, dataset="digits", subset=s, root=None) for s in ("train", "train", "test"))
    assert train.fingerprint == again.fingerprint != test.fingerprint
