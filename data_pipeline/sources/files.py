"""Images that are files, in a folder or in a zip: which are taken, and the source that reads them."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.sources.source import EncodedSource, digest


class FileSource(EncodedSource):
    """One image a file."""

    def __init__(
        self,
        files: Files,
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
        return digest(self.class_names, self.labels.tobytes(), versions)

    def describe(self, index: int) -> str:
        return self._files.describe(self._names[index])

    def _read(self, index: int) -> bytes:
        return self._files.read(self._names[index])


class Files(Protocol):
    """Files by name, the name being a path with slashes, relative to where they all lie."""

    def images_in(self, folder: str) -> list[str]:
        """Names of the image files in this folder and below it, sorted."""

    def read(self, name: str) -> bytes: ...

    def version(self, name: str) -> tuple[int, int]:
        """Two numbers that change when the file does."""

    def describe(self, name: str) -> str: ...


class FolderFiles:
    """Files below a folder."""

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


class ZipFiles:
    """Files in a zip, below its folder `top`, or at once in one that was made without that folder."""

    def __init__(self, path: Path, top: str) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is not a complete zip file; delete it and get it again") from error
        prefix = f"{top}/" if any(each.filename.startswith(f"{top}/") for each in members) else ""
        self._members = {
            each.filename.removeprefix(prefix): each for each in members if each.filename.startswith(prefix)
        }

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
