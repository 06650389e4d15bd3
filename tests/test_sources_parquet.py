"""Parquet files as Hugging Face `datasets` writes them, in few rows; and the real ones, where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import InputError
from data_pipeline.sources import open_source
from tests.sources import (
    check,
    check_shared_reading,
    encode,
    error,
    parquet_table,
    random_images,
    reading_error,
    write,
    write_parquet,
)

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["grey", "colour"])
@pytest.mark.parametrize("own_folder", [False, True])
def test_parquet(tmp_path: Path, shape: tuple[int, ...], own_folder: bool) -> None:
    folder = tmp_path / "mnist" if own_folder else tmp_path
    images, names = random_images((14, *shape)), ["cat", "dog", "ant"]
    write_parquet(folder / "train-00001-of-00002.parquet", images[8:10], [1, 1], names)
    write_parquet(folder / "train-00000-of-00002.parquet", images[:8], [0, 1, 2, 0, 1, 2, 0, 1], names)
    write_parquet(folder / "test.parquet", images[10:12], [2, 0], names)
    write_parquet(folder / "val.parquet", images[12:], [1, 2], names)
    opened = {"kind": "parquet", "dataset": "mnist", "root": tmp_path}
    check(opened | {"subset": "train"}, images[:10], [0, 1, 2, 0, 1, 2, 0, 1, 1, 1], tuple(names))
    check(opened | {"subset": "test"}, images[10:12], [2, 0], tuple(names))
    source = open_source(**opened, subset="train")
    assert source.describe(7) == "train-00000-of-00002.parquet row 7"
    assert source.describe(9) == "train-00001-of-00002.parquet row 1"
    (folder / "test.parquet").unlink()
    check(opened | {"subset": "test"}, images[12:], [1, 2], tuple(names))
    (folder / "val.parquet").rename(folder / "validation-00000-of-00001.parquet")
    check(opened | {"subset": "test"}, images[12:], [1, 2], tuple(names))


def test_parquet_with_the_columns_of_cifar100(tmp_path: Path) -> None:
    """On the Hugging Face hub, CIFAR-100 calls them img and fine_label, and has a coarse_label besides."""
    images = random_images((2, 4, 4, 3))
    table = parquet_table([encode(image) for image in images], [1, 0], ["a", "b"], "img", "fine_label")
    pq.write_table(table.append_column("coarse_label", pa.array([0, 0])), tmp_path / "test.parquet")
    check({"kind": "parquet", "dataset": "cifar100", "subset": "test", "root": tmp_path}, images, [1, 0], ("a", "b"))


def test_parquet_read_by_threads_forks_and_copies(tmp_path: Path) -> None:
    images = random_images((60, 6, 6, 3))
    write_parquet(tmp_path / "train-0.parquet", images[:40], [0] * 40, ["a"], rows_per_group=7)
    write_parquet(tmp_path / "train-1.parquet", images[40:], [0] * 20, ["a"], rows_per_group=7)
    source = open_source("parquet", dataset="custom", subset="train", root=tmp_path)
    check_shared_reading(source, list(images))


def test_parquet_labels_are_read_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train.parquet", random_images((4, 4, 4)), [0, 1, 1, 0], ["a", "b"])
    asked = []
    read = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, columns=None: asked.append(columns) or read(self, columns=columns)
    )
    source = open_source("parquet", dataset="custom", subset="train", root=tmp_path)
    assert source.labels.tolist() == [0, 1, 1, 0] and asked == [["label"]]


def test_parquet_missing_files(tmp_path: Path) -> None:
    opened = {"kind": "parquet", "dataset": "cifar10", "root": tmp_path}
    assert error(**opened, subset="train") == (
        f"there is no train*.parquet in {tmp_path}; put it there, or pass another --root"
    )
    assert f"there is no test*.parquet or val*.parquet in {tmp_path}" in error(**opened, subset="test")


def test_parquet_wrong_columns(tmp_path: Path) -> None:
    opened = {"kind": "parquet", "dataset": "custom", "subset": "train", "root": tmp_path}
    path = tmp_path / "train.parquet"
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for columns in (
        {"pixels": pa.array([b""]), "label": pa.array([0])},
        {"image": pa.array([None], struct_type), "labels": pa.array([0])},
        {"image": pa.array([b""]), "label": pa.array([0])},
        {"image": pa.array([{"path": "cat.png"}]), "label": pa.array([0])},
        {"image": pa.array([None], struct_type), "label": pa.array(["cat"])},
    ):
        pq.write_table(pa.table(columns), path)
        message = error(**opened)
        assert message.startswith(f"{path} has columns {next(iter(columns))}: ")
        assert "write it with columns image: struct<bytes, path> and label: integer" in message


def test_parquet_class_names(tmp_path: Path) -> None:
    opened = {"kind": "parquet", "dataset": "custom", "subset": "train", "root": tmp_path}
    path = tmp_path / "train-0.parquet"
    table = parquet_table([encode(random_images((4, 4)))] * 3, [0, 1, 0], ["a", "b"])
    unnamed = {"huggingface": json.dumps({"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}})}
    for metadata in (None, {"pandas": "{}"}, unnamed):
        pq.write_table(table.replace_schema_metadata(metadata), path)
        assert f"{path} does not name its classes; write it with Hugging Face datasets" in error(**opened)
    pq.write_table(table, path)
    write_parquet(tmp_path / "train-1.parquet", random_images((1, 4, 4)), [0], ["b", "a"])
    assert f"{tmp_path / 'train-1.parquet'} and train-0.parquet name different classes" in error(**opened)


@pytest.mark.parametrize("label", [-1, 2, None])
def test_parquet_label_out_of_range(tmp_path: Path, label: int | None) -> None:
    write_parquet(tmp_path / "train.parquet", random_images((5, 4, 4)), [0, 1, 1, label, 0], ["a", "b"])
    message = error(kind="parquet", dataset="custom", subset="train", root=tmp_path)
    assert f"{tmp_path / 'train.parquet'} row 3 has label {label}, which is not one of its 2 class names" in message


def test_parquet_damaged_or_empty(tmp_path: Path) -> None:
    opened = {"kind": "parquet", "dataset": "custom", "subset": "train", "root": tmp_path}
    path = write(tmp_path / "train.parquet", b"version https://git-lfs.github.com/spec/v1")
    assert f"{path} is not a readable Parquet file (" in error(**opened)
    write_parquet(path, random_images((0, 4, 4)), [], ["a"])
    assert error(**opened) == f"no images found: {path} has no rows; write it again"


def test_parquet_corrupt_images(tmp_path: Path) -> None:
    good = encode(random_images((32, 32, 3)))
    images = [good, good[: len(good) // 2], b"<html>not found</html>", b"", None, good]
    pq.write_table(parquet_table(images, [0] * 6, ["a"]), tmp_path / "test.parquet", row_group_size=2)
    source = open_source("parquet", dataset="custom", subset="test", root=tmp_path)
    for index in (1, 2, 3, 4):
        message = reading_error(source, index)
        assert message.startswith(f"test.parquet row {index} is corrupt (")
        assert message.endswith("; delete or repair it, or pass --skip-corrupt to leave such images out and count them")
    assert (source[5][0] == source[0][0]).all()
    (tmp_path / "test.parquet").unlink()
    message = reading_error(source, 2, InputError)
    assert message.startswith("cannot read test.parquet row 2: ") and "No such file" in message


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real data beside the repository")
def test_real_parquet_files() -> None:
    for dataset, subset, rows, num_classes in (
        ("mnist", "train", 60000, 10),
        ("mnist", "test", 10000, 10),
        ("cifar10", "train", 50000, 10),
        ("cifar10", "test", 10000, 10),
        ("cifar100", "test", 10000, 100),
        ("tinyimagenet", "test", 10000, 200),
    ):
        source = open_source("parquet", dataset=dataset, subset=subset, root=REAL_DATA)
        assert len(source) == rows and len(source.class_names) == num_classes
        assert np.bincount(source.labels, minlength=num_classes).min() > 0
        image, label = source[rows - 1]
        assert image.shape[2] == 3 and label == source.labels[-1]
