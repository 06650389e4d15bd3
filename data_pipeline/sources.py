"""Indexed datasets of (uint8 H×W×C image, label): digits, MNIST, SVHN, CIFAR, TinyImageNet, image folder, Parquet.

`open_source` is the way in. Every source knows all its labels without decoding an image, holds no open file, and may be
read from many threads, forked workers or pickled copies at once.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
import struct
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import InputError, unknown_name
from data_pipeline.images import to_uint8

Subset = Literal["train", "test"]

# What can give each dataset; the first is its default.
SOURCE_KINDS: dict[str, tuple[str, ...]] = {
    "digits": ("bundled", "parquet", "imagefolder"),
    "mnist": ("torchvision", "parquet", "imagefolder"),
    "svhn": ("torchvision", "parquet", "imagefolder"),
    "cifar10": ("torchvision", "parquet", "imagefolder"),
    "cifar100": ("torchvision", "parquet", "imagefolder"),
    "tinyimagenet": ("tinyimagenet", "parquet", "imagefolder"),
    "custom": ("imagefolder", "parquet"),
}


_DIGITS = tuple("0123456789")
# What a dataset's classes are called, or how many there are: files of another dataset are not taken for it.
_CLASSES: dict[str, tuple[str, ...] | int] = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "svhn": _DIGITS,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": 100,
    "tinyimagenet": 200,
}


class CorruptImageError(InputError):
    """One image cannot be decoded; the message names it. Whoever reads many images may leave it out and count it."""


class Source(ABC):
    """A map-style dataset: `source[i]` is (image, label) with the image a fresh uint8 array (H, W, C), C == `channels`,
    and the label an id into `class_names`; `labels` holds all of them, (n,) int64. Grey images are repeated to three
    channels, colour images reduced to luma for one. Reading raises `CorruptImageError` for an image that cannot be
    decoded, `InputError` for one that cannot be read, and `IndexError` outside [-n, n)."""

    def __init__(self, class_names: Sequence[str], labels: np.ndarray, channels: Literal[1, 3]) -> None:
        self.class_names = tuple(class_names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.channels = channels
        # Of an image folder those that hold no image; not among the class names.
        self.empty_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = range(len(self))[index]
        return self._pixels(index), int(self.labels[index])

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images, their labels or their order. No image is decoded."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What to call that image in a message: a file path, or "train.parquet row 17"."""

    @abstractmethod
    def _pixels(self, index: int) -> np.ndarray:
        """The image at 0 <= index < n as uint8 (H, W, C)."""


def open_source(
    kind: str | None, *, dataset: str, subset: Subset, root: Path | None, channels: Literal[1, 3] = 3
) -> Source:
    """Open one subset of a dataset. `kind` is one of `SOURCE_KINDS[dataset]`, None for the first of them; `root` is the
    folder that holds the data, or that has a sub-folder named like the dataset which does ("bundled" needs none). Data
    that torchvision or tinyimagenet does not find there is downloaded into it and checked. Raises `InputError` for an
    unknown name, a kind that cannot give the dataset, and a root that is missing or without the expected data."""
    if dataset not in SOURCE_KINDS:
        raise unknown_name("dataset", dataset, SOURCE_KINDS)
    if subset not in ("train", "test"):
        raise unknown_name("subset", subset, ("train", "test"))
    if channels not in (1, 3):
        raise InputError(f"images have 1 or 3 channels, not {channels!r}; pass one of these")
    if kind is None:
        kind = SOURCE_KINDS[dataset][0]
    if kind not in SOURCE_KINDS[dataset]:
        if not any(kind in kinds for kinds in SOURCE_KINDS.values()):
            raise unknown_name(f"source of {dataset}", kind, SOURCE_KINDS[dataset])
        raise InputError(f"source {kind!r} cannot give {dataset}; these can: {', '.join(SOURCE_KINDS[dataset])}")

    if kind == "bundled":
        return _open_digits(subset, channels)
    if root is None:
        raise InputError(f"{dataset} from {kind} needs --root, the folder that holds the data")
    folder = _own_folder(root.expanduser(), dataset, kind)
    try:
        return _open(folder, kind, dataset, subset, channels)
    except OSError as error:
        place = error.filename or folder
        raise InputError(f"cannot read {place}: {error.strerror or error}; check it and its permissions") from error


def _open(folder: Path, kind: str, dataset: str, subset: Subset, channels: Literal[1, 3]) -> Source:
    if kind == "torchvision":
        return _open_torchvision(folder, dataset, subset, channels)
    if kind == "tinyimagenet":
        return _open_tinyimagenet(folder, subset, channels)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; pass --root the folder that holds {dataset}")
    if kind == "parquet":
        return _open_parquet(folder, subset, channels)
    return _open_imagefolder(folder, subset, channels)


def check_classes(source: Source, dataset: str) -> None:
    """Raise `InputError` if `source` does not have the classes of `dataset`: its labels would mean something else."""
    expected, names = _CLASSES.get(dataset), source.class_names
    if expected is None or expected in (names, len(names)):
        return
    check_not_empty(source, source.empty_classes)
    wanted = f"{expected} classes" if isinstance(expected, int) else f"the classes {', '.join(expected)}"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise InputError(
        f"the data has {len(names)} classes ({shown}), but {dataset} has {wanted}: "
        "correct --root, or use --protocol custom for classes of your own"
    )


def check_not_empty(source: Source, wanted: Iterable[str]) -> None:
    """Raise `InputError` if one of these classes has a folder, but no image in it."""
    empty = sorted(set(wanted) & set(source.empty_classes))
    if empty:
        raise InputError(f"no images found in class folder {empty[0]!r}: add some, or do without this class")


def _own_folder(root: Path, dataset: str, kind: str) -> Path:
    """root/<dataset> where there is one, so that one root can hold several datasets, else root."""
    own = root / dataset
    # A folder root/custom is more likely a class of that name.
    return own if own.is_dir() and (dataset, kind) != ("custom", "imagefolder") else root


def _digest(*parts: Any) -> str:
    """16 hexadecimal digits of bytes, and of anything else by how it is written."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part if isinstance(part, (bytes, memoryview)) else repr(part).encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]


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
        return _digest(self.class_names, self.labels.tobytes(), np.ascontiguousarray(self._images).data)

    def describe(self, index: int) -> str:
        return f"{self._name} image {index}"

    def _pixels(self, index: int) -> np.ndarray:
        return to_uint8(Image.fromarray(self._images[index]), self.channels)


class _EncodedSource(Source):
    """Images that are encoded somewhere, in any format Pillow knows."""

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """The encoded image."""

    def _pixels(self, index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self._read(index))) as image:
                return to_uint8(image, self.channels)
        except Exception as error:  # on damaged bytes, decoders raise almost anything
            name = self.describe(index)
            # Only the system's own errors have a number. Not the image but the disk is at fault then, and leaving out
            # what it holds would hide that.
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"cannot read {name}: {error.strerror}; check the disk and permissions") from error
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else _one_line(error)
            raise CorruptImageError(
                f"{name} is corrupt ({reason}); delete or repair it, "
                "or pass --skip-corrupt to leave such images out and count them"
            ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Digits


def _open_digits(subset: Subset, channels: Literal[1, 3]) -> Source:
    """scikit-learn's 1,797 digits of 8×8. They have no official split: a fixed quarter is "test"."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    num_train = len(order) * 3 // 4
    chosen = np.sort(order[:num_train] if subset == "train" else order[num_train:])
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    class_names = [str(name) for name in digits.target_names]
    return _ArraySource(f"digits {subset}", images, class_names, digits.target[chosen], channels)


# MNIST, SVHN, CIFAR


def _open_torchvision(root: Path, dataset: str, subset: Subset, channels: Literal[1, 3]) -> Source:
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
            f"{root / files} is missing or damaged, and to download it failed ({_one_line(error)}); "
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


# Files in a folder or a zip


class _Files(Protocol):
    """Files by name, the name being a path with slashes, relative to where they all lie."""

    def images_in(self, folder: str) -> list[str]:
        """Names of the image files in this folder and below it, sorted."""

    def read(self, name: str) -> bytes: ...

    def version(self, name: str) -> tuple[int, int]:
        """Two numbers that change when the file does."""

    def describe(self, name: str) -> str: ...


class _FolderFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def images_in(self, folder: str) -> list[str]:
        top = self._root / folder
        return sorted(_images_below(str(top), f"{folder}/")) if top.is_dir() else []

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def version(self, name: str) -> tuple[int, int]:
        stat = (self._root / name).stat()
        return stat.st_size, stat.st_mtime_ns

    def describe(self, name: str) -> str:
        return str(self._root / name)


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder` and below it, in the order of their paths; hidden ones are left out."""
    return [folder / name for name in sorted(_images_below(str(folder), ""))]


def _images_below(folder: str, prefix: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """`above` are the folders that this one lies in: a link that leads back to one of them is not followed."""
    try:
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in above:
            return
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise InputError(f"{folder} cannot be looked into ({error.strerror}): make it readable") from error
    for entry in entries:
        if entry.name.startswith("."):  # also macOS's "._cat.png", which is no image
            continue
        link = entry.is_symlink()  # perhaps to nothing, or to itself: whoever reads it tells of that
        if os.path.isdir(entry.path) if link else entry.is_dir():
            yield from _images_below(entry.path, f"{prefix}{entry.name}/", (*above, (stat.st_dev, stat.st_ino)))
        elif _is_image(entry.name) and (link or entry.is_file()):  # no pipe, which would be waited for
            yield prefix + entry.name


def _is_image(name: str) -> bool:
    # Pillow opens MPO with its JPEG reader; the other formats that it has no reader for, such as PDF, it only writes.
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind in Image.OPEN or kind == "MPO"


class _ZipFiles:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is not a complete zip file; delete it and get it again") from error
        # Names start below the official zip's one folder, or at once in a zip that was made without it.
        top = "tiny-imagenet-200/" if any(each.filename.startswith("tiny-imagenet-200/") for each in members) else ""
        self._members = {each.filename.removeprefix(top): each for each in members if each.filename.startswith(top)}

    def images_in(self, folder: str) -> list[str]:
        return sorted(name for name in self._members if name.startswith(f"{folder}/") and _is_image(name))

    def read(self, name: str) -> bytes:
        member = self._members[name]
        # A handle of its own for every read: threads and forked workers would share the position of an open one. The
        # directory of 120,000 entries is what takes long to open in a zip, and that is read once.
        with open(self._path, "rb") as file:
            file.seek(member.header_offset)
            name_length, extra_length = struct.unpack("<26x2H", file.read(30))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            with zipfile.ZipExtFile(file, "r", member) as content:
                return content.read()

    def version(self, name: str) -> tuple[int, int]:
        return self._members[name].file_size, self._members[name].CRC

    def describe(self, name: str) -> str:
        return f"{name} in {self._path}"


class _FileSource(_EncodedSource):
    """One image a file."""

    def __init__(
        self,
        files: _Files,
        names: Sequence[str],
        class_names: Sequence[str],
        labels: np.ndarray,
        channels: Literal[1, 3],
    ) -> None:
        super().__init__(class_names, labels, channels)
        self._files = files
        self._names = names

    @property
    def fingerprint(self) -> str:
        versions = [(name, self._files.version(name)) for name in self._names]
        return _digest(self.class_names, self.labels.tobytes(), versions)

    def describe(self, index: int) -> str:
        return self._files.describe(self._names[index])

    def _read(self, index: int) -> bytes:
        return self._files.read(self._names[index])


# TinyImageNet

_TINYIMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINYIMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def _open_tinyimagenet(root: Path, subset: Subset, channels: Literal[1, 3]) -> Source:
    """The official folder or zip, downloaded when neither is there; "test" is its validation set, because the official
    test images have no labels."""
    files = _tinyimagenet_files(root)
    class_names = sorted(_tinyimagenet_text(files, "wnids.txt").split())
    if subset == "train":
        class_of = {name: name.split("/")[1] for name in files.images_in("train")}
    else:
        lines = _tinyimagenet_text(files, "val/val_annotations.txt").splitlines()
        rows = [line.split("\t") for line in lines if line]
        class_of = {f"val/images/{row[0]}": "".join(row[1:2]) for row in rows}
        missing = class_of.keys() - set(files.images_in("val"))
        if missing:
            raise InputError(f"there is no {files.describe(min(missing))}; unpack or download TinyImageNet again")
    if not class_of:
        raise InputError(f"no images found in {files.describe(subset)}; unpack or download TinyImageNet again")
    strangers = set(class_of.values()) - set(class_names)
    if strangers:
        raise InputError(
            f"{min(strangers)!r}, the class of {subset} images, is not in {files.describe('wnids.txt')}; "
            "unpack or download TinyImageNet again"
        )
    rank = {name: label for label, name in enumerate(class_names)}
    labels = np.array([rank[wnid] for wnid in class_of.values()])
    return _FileSource(files, list(class_of), class_names, labels, channels)


def _tinyimagenet_files(root: Path) -> _Files:
    for folder in (root, root / "tiny-imagenet-200"):
        if (folder / "wnids.txt").is_file():
            return _FolderFiles(folder)
    archive = root if root.is_file() else root / "tiny-imagenet-200.zip"
    if not archive.exists():
        _download_tinyimagenet(root)
    return _ZipFiles(archive)


def _download_tinyimagenet(root: Path) -> None:
    from torchvision.datasets.utils import download_url

    try:
        download_url(_TINYIMAGENET_URL, root, md5=_TINYIMAGENET_MD5)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{root} has neither wnids.txt, tiny-imagenet-200/wnids.txt nor tiny-imagenet-200.zip, and to download "
            f"{_TINYIMAGENET_URL} failed ({_one_line(error)}); put one of them there, or connect to the network"
        ) from error


def _tinyimagenet_text(files: _Files, name: str) -> str:
    try:
        return files.read(name).decode()
    except (KeyError, FileNotFoundError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{files.describe(name)} is missing or damaged; unpack or download TinyImageNet again"
        ) from error


# Image folder

_TEST_FOLDERS = ("test", "val", "valid", "validation")


def _open_imagefolder(root: Path, subset: Subset, channels: Literal[1, 3]) -> Source:
    """One sub-folder a class, under root or under root/train and root/test. Without such subsets, a hash of its path
    puts about every fifth image into "test", so that adding images moves no other."""
    tops = _subfolders(root)
    test_folder = next((name for name in _TEST_FOLDERS if name in tops), None)
    # A class may be called "train" too: the subset stands beside a test folder, or alone.
    has_subsets = "train" in tops and (test_folder is not None or tops == ["train"])
    prefixes = {"train": "", "test": ""}
    if has_subsets:
        prefixes = {"train": "train/"} | ({"test": f"{test_folder}/"} if test_folder else {})
    if subset not in prefixes:
        train = root / "train"
        raise InputError(f"there is no test or val folder beside {train}; add one, or pass --root {train} to split it")

    files = _FolderFiles(root)
    images = {
        (prefix, name): files.images_in(prefix + name)
        for prefix in set(prefixes.values())
        for name in _subfolders(root / prefix)
    }
    folders = {name for _, name in images}
    if not folders:
        raise InputError(f"no images found: {root} has no class folders; put the images of each class into one")
    class_names = sorted({name for (_, name), found in images.items() if found})

    names, labels = [], []
    for label, class_name in enumerate(class_names):
        for name in images.get((prefixes[subset], class_name), []):
            if has_subsets or _is_held_out(name) == (subset == "test"):
                names.append(name)
                labels.append(label)
    if not names:
        raise InputError(
            f"no images found for {subset} in {root / prefixes[subset]}; add some in class folders"
            + ("" if has_subsets else f", or make folders train and test: a fixed split leaves {subset} empty so far")
        )
    source = _FileSource(files, names, class_names, np.array(labels), channels)
    source.empty_classes = tuple(sorted(folders - set(class_names)))
    return source


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") % 5 == 0


# Parquet

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


def _open_parquet(root: Path, subset: Subset, channels: Literal[1, 3]) -> Source:
    """Files as Hugging Face `datasets` writes them: a column of structs with the encoded image in `bytes`, a column of
    integer labels, and the class names in the metadata. Several files are concatenated in the order of their names."""
    patterns = ["train*.parquet"] if subset == "train" else ["test*.parquet", "val*.parquet"]
    paths = next((found for pattern in patterns if (found := sorted(root.glob(pattern)))), None)
    if paths is None:
        raise InputError(f"there is no {' or '.join(patterns)} in {root}; put it there, or pass another --root")

    class_names: tuple[str, ...] = ()
    labels, groups = [], []
    for path in paths:
        file_class_names, file_labels, file_groups = _inspect_parquet(path)
        if path != paths[0] and file_class_names != class_names:
            raise InputError(f"{path} and {paths[0].name} name different classes; move one of them out of the folder")
        class_names = file_class_names
        labels.append(file_labels)
        groups += file_groups
    source = _ParquetSource(groups, class_names, np.concatenate(labels), channels)
    if not len(source):
        raise InputError(f"no images found: {' and '.join(str(path) for path in paths)} has no rows; write it again")
    return source


class _RowGroup(NamedTuple):
    path: Path
    number: int  # among the row groups of the file
    first_row: int  # in the file
    num_rows: int
    column: str  # of the encoded images


def _inspect_parquet(path: Path) -> tuple[tuple[str, ...], np.ndarray, list[_RowGroup]]:
    """Class names, labels and row groups of one file, without reading its images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image_column = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
            label_column = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
            if (
                image_column is None
                or label_column is None
                or not pa.types.is_struct(schema.field(image_column).type)
                or schema.field(image_column).type.get_field_index("bytes") < 0
                or not pa.types.is_integer(schema.field(label_column).type)
            ):
                raise InputError(
                    f"{path} has columns {', '.join(f'{field.name}: {field.type}' for field in schema)}; write it with "
                    "columns image: struct<bytes, path> and label: integer, as Hugging Face datasets does"
                )
            label_values = file.read(columns=[label_column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({_one_line(error)}); get it again") from error

    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        class_names = tuple(features[label_column]["names"])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} does not name its classes; write it with Hugging Face datasets and {label_column} as a ClassLabel"
        ) from error
    labels = label_values.fill_null(-1).to_numpy()
    strange = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(strange):
        raise InputError(
            f"{path} row {strange[0]} has label {label_values[strange[0]]}, which is not one of its {len(class_names)} "
            "class names; remove such rows, or name all classes"
        )

    num_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    first_rows = [0, *itertools.accumulate(num_rows)]
    groups = [_RowGroup(path, i, first_rows[i], num_rows[i], f"{image_column}.bytes") for i in range(len(num_rows))]
    return class_names, labels, groups


class _PerThread(threading.local):
    """What one thread keeps for itself; a copy in another process starts without it."""

    row_group: tuple[int, Any] = (-1, None)  # its number and its images

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _ParquetSource(_EncodedSource):
    """Rows of Parquet files. Each thread keeps the row group that it read last, so reading in order, or nearly, reads
    each row group once."""

    def __init__(
        self, groups: list[_RowGroup], class_names: Sequence[str], labels: np.ndarray, channels: Literal[1, 3]
    ) -> None:
        super().__init__(class_names, labels, channels)
        self._groups = groups
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self._last = _PerThread()

    @property
    def fingerprint(self) -> str:
        paths = sorted({group.path for group in self._groups})
        versions = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return _digest(self.class_names, self.labels.tobytes(), versions)

    def describe(self, index: int) -> str:
        number, row = self._locate(index)
        group = self._groups[number]
        return f"{group.path.name} row {group.first_row + row}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Which row group, and which row in it."""
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _read(self, index: int) -> bytes:
        number, row = self._locate(index)
        if self._last.row_group[0] != number:
            self._last.row_group = (number, _read_row_group(self._groups[number]))
        _, images = self._last.row_group
        return images[row].as_py() or b""


def _read_row_group(group: _RowGroup) -> Any:
    """The encoded images of one row group, an Arrow array of binary."""
    import pyarrow.parquet as pq

    # In this thread alone: readers run side by side already, and Arrow's pool does not go with a fork.
    with pq.ParquetFile(group.path) as file:
        table = file.read_row_group(group.number, columns=[group.column], use_threads=False)
    return table.flatten().column(0)
