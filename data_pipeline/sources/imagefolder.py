"""Folders of images, one for each class."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.sources.files import FileSource, FolderFiles
from data_pipeline.sources.source import Source, Subset

_TEST_FOLDERS = ("test", "val", "valid", "validation")


def open_imagefolder(root: Path, subset: Subset, channels: Literal[1, 3]) -> Source:
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

    files = FolderFiles(root)
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
    source = FileSource(files, names, class_names, np.array(labels), channels)
    source.empty_classes = tuple(sorted(folders - set(class_names)))
    return source


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") % 5 == 0
