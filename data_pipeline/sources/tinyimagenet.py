"""TinyImageNet as its authors publish it, a folder or a zip."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.sources.files import Files, FileSource, FolderFiles, ZipFiles
from data_pipeline.sources.source import Source, Subset, one_line

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_TOP = "tiny-imagenet-200"  # the one folder of the official zip


def open_tinyimagenet(root: Path, subset: Subset, channels: Literal[1, 3]) -> Source:
    """The official folder or zip, downloaded when neither is there; "test" is its validation set, because the official
    test images have no labels."""
    files = _find_files(root)
    class_names = sorted(_read_text(files, "wnids.txt").split())
    if subset == "train":
        class_of = {name: name.split("/")[1] for name in files.images_in("train")}
    else:
        lines = _read_text(files, "val/val_annotations.txt").splitlines()
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
    return FileSource(files, list(class_of), class_names, labels, channels)


def _find_files(root: Path) -> Files:
    for folder in (root, root / _TOP):
        if (folder / "wnids.txt").is_file():
            return FolderFiles(folder)
    archive = root if root.is_file() else root / "tiny-imagenet-200.zip"
    if not archive.exists():
        _download(root)
    return ZipFiles(archive, _TOP)


def _download(root: Path) -> None:
    from torchvision.datasets.utils import download_url

    try:
        download_url(_URL, root, md5=_MD5)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{root} has neither wnids.txt, tiny-imagenet-200/wnids.txt nor tiny-imagenet-200.zip, and to download "
            f"{_URL} failed ({one_line(error)}); put one of them there, or connect to the network"
        ) from error


def _read_text(files: Files, name: str) -> str:
    try:
        return files.read(name).decode()
    except (KeyError, FileNotFoundError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{files.describe(name)} is missing or damaged; unpack or download TinyImageNet again"
        ) from error
