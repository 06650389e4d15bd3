"""The datasets by name: what can give each, how that is opened, and which classes it must have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from data_pipeline.errors import InputError, unknown_name
from data_pipeline.sources.imagefolder import open_imagefolder
from data_pipeline.sources.in_memory import open_digits, open_torchvision
from data_pipeline.sources.parquet import open_parquet
from data_pipeline.sources.source import Source, Subset
from data_pipeline.sources.tinyimagenet import open_tinyimagenet

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
        return open_digits(subset, channels)
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
        return open_torchvision(folder, dataset, subset, channels)
    if kind == "tinyimagenet":
        return open_tinyimagenet(folder, subset, channels)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; pass --root the folder that holds {dataset}")
    if kind == "parquet":
        return open_parquet(folder, subset, channels)
    return open_imagefolder(folder, subset, channels)


def _own_folder(root: Path, dataset: str, kind: str) -> Path:
    """root/<dataset> where there is one, so that one root can hold several datasets, else root."""
    own = root / dataset
    # A folder root/custom is more likely a class of that name.
    return own if own.is_dir() and (dataset, kind) != ("custom", "imagefolder") else root


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
