"""Every source against tiny stand-ins written in the real formats; nothing here touches the network."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from data_pipeline.errors import InputError
from data_pipeline.sources import CorruptImageError, Source, open_source, tinyimagenet

DIGITS = tuple("0123456789")
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601, from the formula: (H, W, 3) to (H, W, 1), before rounding."""
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def check(open_with: dict, images: np.ndarray, labels: list[int], class_names: tuple[str, ...]) -> None:
    """The whole contract, in both channel settings, against images (n, H, W) or (n, H, W, 3)."""
    for channels in (1, 3):
        source = open_source(**open_with, channels=channels)
        assert isinstance(source, Source)
        assert len(source) == len(images)
        assert source.class_names == class_names
        assert source.channels == channels
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == list(labels)
        for index, expected in enumerate(images):
            image, label = source[index]
            assert label == labels[index] and type(label) is int
            assert image.dtype == np.uint8 and image.shape == (*expected.shape[:2], channels)
            assert image.flags.c_contiguous and image.flags.writeable
            if expected.ndim == 2:
                assert (image == expected[..., None]).all()
            elif channels == 3:
                assert (image == expected).all()
            else:
                assert np.abs(image - luma(expected)).max() <= 1
        assert (source[-1][0] == source[len(source) - 1][0]).all()
        with pytest.raises(IndexError):
            source[len(source)]


def error(**open_with: object) -> str:
    """The message of the `InputError` that opening raises, which is one line."""
    with pytest.raises(InputError) as caught:
        open_source(**open_with)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reading_error(source: Source, index: int, kind: type[InputError] = CorruptImageError) -> str:
    with pytest.raises(InputError) as caught:
        source[index]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_shared_reading(source: Source, expected: list[np.ndarray]) -> None:
    """Right images for 8 threads, for 4 forked workers and for a pickled copy, reading here and there."""
    order = np.random.default_rng(0).integers(0, len(source), 40 * len(source)).tolist()
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns far more often than by default, wherever they are
    try:
        with ThreadPoolExecutor(8) as pool:
            images = pool.map(lambda index: source[index][0], order)
            assert all((image == expected[index]).all() for index, image in zip(order, images, strict=True))
    finally:
        sys.setswitchinterval(switch_interval)

    with multiprocessing.get_context("fork").Pool(4, initializer=_adopt, initargs=(source,)) as pool:
        images = pool.map(_read_adopted, order, chunksize=1)
    assert all((image == expected[index]).all() for index, image in zip(order, images, strict=True))

    copy = pickle.loads(pickle.dumps(source))
    assert all((copy[index][0] == wanted).all() for index, wanted in enumerate(expected))


def _adopt(source: Source) -> None:
    global adopted
    adopted = source


def _read_adopted(index: int) -> np.ndarray:
    return adopted[index][0]


# Choosing


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


# Digits


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


# torchvision


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files: magic number with type 8 (uint8) and rank, big-endian sizes, data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path) -> None:
    for name, count in (("train", 6), ("t10k", 4)):
        images = random_images((count, 28, 28), seed=count)
        write(root / f"MNIST/raw/{name}-images-idx3-ubyte", idx(images))
        write(root / f"MNIST/raw/{name}-labels-idx1-ubyte", idx((np.arange(count, dtype=np.uint8) * 2) % 10))


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


# TinyImageNet

WNIDS = [f"n{number:08d}" for number in (1443537, 1629819, 12267677)]


def tiny_image(name: str) -> np.ndarray:
    """64×64 of one colour, so that JPEG keeps it nearly."""
    return np.broadcast_to(random_images((3,), seed=sum(name.encode())), (64, 64, 3))


def write_tinyimagenet(parent: Path, images_per_class: int = 12) -> Path:
    """The folder as the official zip unpacks: classes in no order, boxes beside images, unlabelled test images."""
    root = parent / "tiny-imagenet-200"
    write(root / "wnids.txt", "\n".join(WNIDS[::-1]) + "\n")
    write(root / "words.txt", "".join(f"{wnid}\tsome name\n" for wnid in WNIDS))
    for wnid in WNIDS:
        write(root / f"train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
        for number in range(images_per_class):
            name = f"{wnid}_{number}.JPEG"
            write(root / f"train/{wnid}/images/{name}", encode(tiny_image(name), "JPEG", quality=95))
    annotations = ""
    for number, wnid in enumerate((WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[0])):
        name = f"val_{number}.JPEG"
        write(root / f"val/images/{name}", encode(tiny_image(name), "JPEG", quality=95))
        annotations += f"{name}\t{wnid}\t0\t32\t44\t62\n"
    write(root / "val/val_annotations.txt", annotations)
    write(root / "test/images/test_0.JPEG", encode(tiny_image("test_0.JPEG"), "JPEG"))
    return root


def zip_folder(folder: Path, archive: Path, top: str = "tiny-imagenet-200/") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, top + path.relative_to(folder).as_posix())
    return archive


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder "unpacked" with the unpacked folder in it, and a folder "zipped" with the zip in it."""
    parent = tmp_path_factory.mktemp("tiny")
    folder = write_tinyimagenet(parent / "unpacked")
    (parent / "zipped").mkdir()
    zip_folder(folder, parent / "zipped" / "tiny-imagenet-200.zip")
    return parent


@pytest.mark.parametrize("root", ["unpacked", "unpacked/tiny-imagenet-200", "zipped", "zipped/tiny-imagenet-200.zip"])
def test_tinyimagenet(root: str, tiny: Path) -> None:
    opened = {"kind": None, "dataset": "tinyimagenet", "root": tiny / root}
    train = open_source(**opened, subset="train")
    assert train.class_names == tuple(sorted(WNIDS))
    assert train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    test = open_source(**opened, subset="test")
    assert test.class_names == train.class_names
    assert test.labels.tolist() == [2, 0, 1, 0]
    train_names = sorted(f"{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(12))
    for source, names in ((train, train_names), (test, [f"val_{number}.JPEG" for number in range(4)])):
        for index, name in enumerate(names):
            assert name in source.describe(index)
            image, label = source[index]
            assert label == source.labels[index]
            assert image.shape == (64, 64, 3) and image.dtype == np.uint8
            assert np.abs(image.astype(int) - tiny_image(name)).max() <= 4
    grey, _ = open_source(**opened, subset="test", channels=1)[0]
    assert grey.shape == (64, 64, 1)
    assert np.abs(grey - luma(tiny_image("val_0.JPEG"))).max() <= 4


def test_tinyimagenet_folder_and_zip_give_the_same(tiny: Path) -> None:
    folder, archive = (
        open_source(None, dataset="tinyimagenet", subset="train", root=tiny / name) for name in ("unpacked", "zipped")
    )
    assert (folder.labels == archive.labels).all()
    assert all((folder[index][0] == archive[index][0]).all() for index in range(len(folder)))
    assert folder.describe(0) == str(tiny / f"unpacked/tiny-imagenet-200/train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG")
    assert archive.describe(0) == (
        f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG in {tiny / 'zipped/tiny-imagenet-200.zip'}"
    )


def test_tinyimagenet_zip_without_top_folder(tiny: Path, tmp_path: Path) -> None:
    zip_folder(tiny / "unpacked/tiny-imagenet-200", tmp_path / "tiny-imagenet-200.zip", top="")
    source = open_source(None, dataset="tinyimagenet", subset="test", root=tmp_path)
    assert source.labels.tolist() == [2, 0, 1, 0]
    assert np.abs(source[3][0].astype(int) - tiny_image("val_3.JPEG")).max() <= 4


def test_tinyimagenet_zip_read_by_threads_forks_and_copies(tmp_path: Path) -> None:
    images = random_images((40, 64, 64, 3))
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tiny-imagenet-200/wnids.txt", WNIDS[0])
        for number, image in enumerate(images):
            file.writestr(f"tiny-imagenet-200/train/{WNIDS[0]}/images/{number:02}.png", encode(image))
    source = open_source(None, dataset="tinyimagenet", subset="train", root=tmp_path)
    check_shared_reading(source, list(images))


class Response(io.BytesIO):
    """What `urllib.request.urlopen` gives."""

    def __init__(self, url: str, content: bytes) -> None:
        super().__init__(content)
        self.url, self.length = url, len(content)


def test_tinyimagenet_is_downloaded_and_checked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (tiny / "zipped/tiny-imagenet-200.zip").read_bytes()
    asked = []

    def serve(request: urllib.request.Request) -> Response:
        asked.append(request.full_url)
        return Response(request.full_url, content)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    opened = {"kind": None, "dataset": "tinyimagenet", "subset": "test", "root": tmp_path / "new"}
    message = error(**opened)
    assert set(asked) == {"http://cs231n.stanford.edu/tiny-imagenet-200.zip"}
    assert "File not found or corrupted" in message and "connect to the network" in message
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr(tinyimagenet, "_MD5", hashlib.md5(content).hexdigest())
    assert open_source(**opened).labels.tolist() == [2, 0, 1, 0]


def test_tinyimagenet_without_data_or_network(tmp_path: Path) -> None:
    message = error(kind=None, dataset="tinyimagenet", subset="train", root=tmp_path)
    assert str(tmp_path) in message and "tiny-imagenet-200/wnids.txt" in message and "no network" in message


def test_tinyimagenet_incomplete(tmp_path: Path) -> None:
    folder = write_tinyimagenet(tmp_path, images_per_class=1)
    opened = {"kind": None, "dataset": "tinyimagenet", "root": folder}
    (folder / "val/images/val_2.JPEG").unlink()
    assert f"there is no {folder / 'val/images/val_2.JPEG'}; unpack or" in error(**opened, subset="test")
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn00000000\t0\t0\t1\t1\n")
    assert "'n00000000', the class of test images, is not in" in error(**opened, subset="test")
    (folder / "val/val_annotations.txt").unlink()
    assert f"{folder / 'val/val_annotations.txt'} is missing or damaged; unpack or" in error(**opened, subset="test")
    assert len(open_source(**opened, subset="train")) == 3
    shutil.rmtree(folder / "train")
    assert f"no images found in {folder / 'train'}; unpack or" in error(**opened, subset="train")


def test_tinyimagenet_damaged_zip(tiny: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tiny-imagenet-200.zip"
    opened = {"kind": None, "dataset": "tinyimagenet", "subset": "test", "root": tmp_path}
    whole = (tiny / "zipped/tiny-imagenet-200.zip").read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert error(**opened) == f"{archive} is not a complete zip file; delete it and get it again"
    zip_folder(tiny / "unpacked/tiny-imagenet-200/val", archive, top="tiny-imagenet-200/val/")
    assert f"wnids.txt in {archive} is missing or damaged" in error(**opened)

    archive.write_bytes(whole)
    with zipfile.ZipFile(archive) as file:
        member = file.getinfo("tiny-imagenet-200/val/images/val_1.JPEG")
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    archive.write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    source = open_source(**opened)
    assert "val/images/val_1.JPEG in " in reading_error(source, 1)
    assert source[2][1] == 1
    archive.unlink()
    assert "No such file" in reading_error(source, 2, InputError)


# Parquet


def parquet_table(
    images: list[bytes | None], labels: list, names: list[str], image: str = "image", label: str = "label"
) -> pa.Table:
    """What Hugging Face `datasets` writes."""
    features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), (label, pa.int64())],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": content, "path": None} for content in images]
    return pa.table([pa.array(rows, schema.field(image).type), pa.array(labels, pa.int64())], schema)


def write_parquet(path: Path, images: np.ndarray, labels: list, names: list[str], rows_per_group: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = parquet_table([encode(image) for image in images], labels, names)
    pq.write_table(table, path, row_group_size=rows_per_group)


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


# Image folder


def image_folder(root: Path, subset: str = "train", channels: int = 3) -> Source:
    return open_source("imagefolder", dataset="custom", subset=subset, root=root, channels=channels)


def by_name(source: Source, root: Path) -> dict[str, int]:
    return {Path(source.describe(index)).relative_to(root).as_posix(): index for index in range(len(source))}


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


def one_image(root: Path, name: str, content: bytes, channels: int = 3) -> np.ndarray:
    write(root / "train/a" / name, content)
    return image_folder(root, channels=channels)[0][0]


def test_image_folder_takes_what_pillow_reads(tmp_path: Path) -> None:
    image = encode(random_images((2, 2, 3)), "JPEG")
    for name in ("a.JPG", "b.mpo", "c.webp", "d.pdf", "e.txt", "f", "g.heic"):
        write(tmp_path / "train/cat" / name, image)
    assert by_name(image_folder(tmp_path), tmp_path).keys() == {
        f"train/cat/{name}" for name in ("a.JPG", "b.mpo", "c.webp")
    }


def test_image_folder_exif_orientation(tmp_path: Path) -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 200  # left half bright; orientation 6 asks to turn it clockwise, so that the top half is
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, format in (("1.jpg", "JPEG"), ("1.png", "PNG"), ("1.tif", "TIFF"), ("1.webp", "WEBP")):
        pixels = one_image(tmp_path / format, name, encode(image, format, exif=exif))
        assert pixels.shape == (32, 16, 3)
        assert pixels[:14].min() > 150 and pixels[18:].max() < 50


def test_image_folder_transparency_is_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    assert one_image(tmp_path / "rgba", "1.png", encode(rgba)).tolist() == expected
    assert one_image(tmp_path / "luma", "1.png", encode(rgba), channels=1)[0, :, 0].tolist() == [76, 255, 127]
    la = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert one_image(tmp_path / "la", "1.png", encode(la))[0, :, 0].tolist() == [10, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 200, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert one_image(tmp_path / "palette", "1.png", encode(palette)).tolist() == [[[0, 200, 0], [9, 9, 9]]]
    clear = encode(palette, transparency=1)
    assert one_image(tmp_path / "clear", "1.png", clear).tolist() == [[[0, 200, 0], [255, 255, 255]]]
    assert one_image(tmp_path / "gif", "1.gif", encode(palette, "GIF")).tolist() == [[[0, 200, 0], [9, 9, 9]]]


def test_image_folder_depths_and_colour_spaces(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name, format in (("1.png", "PNG"), ("1.tif", "TIFF"), ("1.pgm", "PPM")):
        for channels in (1, 3):
            pixels = one_image(tmp_path / f"{format}{channels}", name, encode(deep, format), channels)
            assert pixels.tolist() == [[[level] * channels for level in (0, 1, 128, 255)]]
    bilevel = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert one_image(tmp_path / "1", "1.png", encode(bilevel), 1).tolist() == [[[0], [255]]]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for channels, colour in ((3, [255, 0, 0]), (1, [76])):
        pixels = one_image(tmp_path / f"cmyk{channels}", "1.jpg", encode(cmyk, "JPEG", quality=100), channels)
        assert np.abs(pixels[4, 4].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])])
def test_image_folder_pixels_without_a_range(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path / "train/a/1.tif", encode(values, "TIFF"))
    assert "1.tif is corrupt (" in reading_error(image_folder(tmp_path), 0)
    assert "no fixed range" in reading_error(image_folder(tmp_path), 0)


def test_image_folder_corrupt_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_images((64, 64, 3))
    jpeg, png = encode(image, "JPEG"), encode(image)
    broken = {
        "0 truncated.jpg": jpeg[: len(jpeg) // 2],
        "1 truncated.png": png[: len(png) // 2],
        "2 checksum.png": png[:100] + bytes(20) + png[120:],
        "3 text.jpg": b"<html>not found</html>",
        "4 empty.png": b"",
        "5 bomb.png": encode(np.zeros((100, 100), np.uint8)),
    }
    for name, content in broken.items():
        write(tmp_path / "train/a" / name, content)
    write(tmp_path / "train/a/6 good.png", png)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    source = image_folder(tmp_path)
    for index, name in enumerate(broken):
        message = reading_error(source, index)
        assert message.startswith(f"{tmp_path / 'train/a' / name} is corrupt (")
        assert message.endswith("delete or repair it, or pass --skip-corrupt to leave such images out and count them")
    assert "decompression bomb" in reading_error(source, 5)
    assert (source[6][0] == image).all()


def test_image_folder_image_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "train/a/1.png", encode(random_images((2, 2))))
    source = image_folder(tmp_path)
    path.unlink()
    assert reading_error(source, 0, InputError) == (
        f"cannot read {path}: No such file or directory; check the disk and permissions"
    )


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


# The real data, where it lies beside the repository


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
