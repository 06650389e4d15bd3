"""Builds: the FFCV files (.beton) of a protocol, one for each partition, in a folder with a manifest of what they hold.

    data/cifar10-0-32px-raw/train.beton      images, labels, indices
                            calibration.beton  test_known.beton  test_unknown.beton
                            train.names.json (and so on)   what each image was called where it came from
                            manifest.json    split, source, encoding, class names; counts and checksum of each file

A build is made whole under another name and then takes the place of an older one, so that the files of a folder always
belong together: an interrupted build leaves the older one, or none.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.ffcv_writer import Encoding, WriteMode, write_ffcv
from data_pipeline.files import full_disk_is_bad_input, read_json, replacing_folder, sha256, write_json
from data_pipeline.protocols import Partition, Protocol
from data_pipeline.sources import CorruptImageError, Source

MANIFEST = "manifest.json"

_FORMAT = 2
_CHECKSUM_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What one file of a build holds."""

    count: int
    class_counts: tuple[int, ...]
    """Images of each known class, in the order of `class_names`; none for a file of unknown ones."""
    skipped: tuple[str, ...]
    """Images that were left out because they could not be read."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a build is of (`manifest.json`)."""

    format: int
    protocol: dict[str, Any]
    split_hash: str
    sources: dict[str, str]
    """For each partition, the kind of its source and the fingerprint of the images there were."""
    image_size: int
    channels: int
    write_mode: WriteMode
    quality: int
    class_names: tuple[str, ...]
    storage: Literal["ffcv", "safetensors"] = "ffcv"
    """ffcv, or safetensors for what `data_pipeline.export` wrote."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """By partition: train, calibration, test_known and, where there are unknown classes, test_unknown."""

    def same_request(self, other: Manifest) -> bool:
        """Whether both describe the same images stored in the same way, whatever came of it."""
        return dataclasses.replace(self, files={}) == dataclasses.replace(other, files={})


@dataclass(frozen=True)
class Build:
    """A folder of files that belong together. `find_build` and `find_split` make sure that all of them are there."""

    folder: Path
    manifest: Manifest

    @property
    def protocol(self) -> Protocol:
        return Protocol.from_dict(self.manifest.protocol)

    def __contains__(self, partition: str) -> bool:
        return partition in self.manifest.files

    def record(self, partition: str) -> FileRecord:
        return self.manifest.files[partition]

    def file(self, partition: str) -> Path:
        """The partition's file, after making sure that it is the one the manifest describes.

        The size is always compared, the checksum for files up to 1 GiB (a second of reading).

        Raises:
            InputError: it is missing, truncated, damaged or another file, or the whole folder is gone.
        """
        path, record = self._path(partition), self.record(partition)
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"the data folder {self.folder} has disappeared: bring it back; the same command goes on")
        if not path.is_file():
            raise InputError(f"{path} is missing though {MANIFEST} lists it: build it again")
        size = path.stat().st_size
        if size != record.bytes:
            raise InputError(f"{path} has {size} bytes, {MANIFEST} says {record.bytes}: truncated; build it again")
        if size <= _CHECKSUM_LIMIT and sha256(path) != record.sha256:
            raise InputError(f"{path} does not match its checksum in {MANIFEST}: damaged or foreign; build it again")
        return path

    def names(self, partition: str) -> list[str]:
        """What each image was called where it came from, in the file's order; `train[0]` and so on for a build of an
        earlier version, which did not note it."""
        path = self.folder / f"{partition}.names.json"
        if path.is_file():
            return read_json(path, "list of names")
        return [f"{partition}[{index}]" for index in range(self.record(partition).count)]

    def check_complete(self) -> None:
        """Raise `InputError` unless the file of every partition of the protocol is there with its right size."""
        for partition in self.protocol.partitions:
            path = self._path(partition)
            if partition not in self or not path.is_file():
                raise InputError(f"{path} is missing: build the folder again")
            if path.stat().st_size != self.record(partition).bytes:
                raise InputError(f"{path} is not the file that {MANIFEST} describes: build the folder again")

    def _path(self, partition: str) -> Path:
        suffix = "beton" if self.manifest.storage == "ffcv" else self.manifest.storage
        return self.folder / f"{partition}.{suffix}"


def folder_name(protocol: Protocol, encoding: Encoding) -> str:
    """Where a protocol's files go below the data folder; the encoding is in the name since it can change results."""
    # A published split is known by its number; of custom ones, each set of classes is another.
    split = protocol.split_hash[:8] if protocol.classes.dataset == "custom" else str(protocol.split)
    limit = protocol.classes.train_images
    subset = "" if limit is None else f"-{limit}images"
    return f"{protocol.name}-{split}-{encoding.image_size}px-{encoding.name}{subset}"


def read_build(folder: Path) -> Build:
    """The build in `folder`; raises `InputError` when there is none, or one of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: it is unfinished or foreign; build it again")
    record = read_json(path, "manifest")
    try:
        if record["format"] != _FORMAT:
            raise InputError(f"{path} has format {record['format']}, this version reads {_FORMAT}: build it again")
        files = {
            name: FileRecord(**{**file, **{key: tuple(file[key]) for key in ("class_counts", "skipped")}})
            for name, file in record["files"].items()
        }
        manifest = Manifest(**{**record, "class_names": tuple(record["class_names"]), "files": files})
        split_hash = Protocol.from_dict(manifest.protocol).split_hash
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a manifest of this project: build the folder again") from error
    if split_hash != manifest.split_hash:
        raise InputError(f"{path} is of a version that split images in another way: build the folder again")
    return Build(folder, manifest)


def find_build(data: Path, name: str, split: int) -> Build:
    """The build of the protocol of that name and split at or below `data`, all its files there.

    Raises:
        InputError: there is no such build, there are several, or it is not whole.
    """
    builds = _builds(data)
    matching = [b for b in builds if (b.protocol.name, b.protocol.split) == (name, split)]
    if not matching and builds and builds[0].folder == data:
        other = builds[0].protocol
        raise InputError(
            f"{data} holds protocol {other.name}, split {other.split}, not {name}, split {split}: "
            "give the folder of the protocol you mean"
        )
    return _only(
        matching,
        f"protocol {name}, split {split}",
        f"no files of protocol {name}, split {split} in {data}: run python -m data_pipeline.build {_options(name)} "
        f"--split {split} --out {data}",
    )


def find_split(data: Path, protocol: Protocol) -> Build:
    """The build at or below `data` whose files are of the very split `protocol`, whatever their encoding.

    Raises:
        InputError: there is no such build, there are several, or it is not whole.
    """
    return _only(
        [build for build in _builds(data) if build.manifest.split_hash == protocol.split_hash],
        f"the model's split {protocol.split_hash}",
        f"no files in {data} are of the split the model was trained on ({protocol.name}, split {protocol.split}, "
        f"hash {protocol.split_hash}): build them, or correct --data",
    )


def _options(name: str) -> str:
    base, _, seed = name.partition("-pseudo")
    return f"--protocol {base}" + (f" --pseudo-open {seed}" if seed else "")


def _builds(data: Path) -> list[Build]:
    """Every build at or below `data`."""
    if (data / MANIFEST).is_file():
        return [read_build(data)]
    builds = []
    for path in sorted(data.glob(f"[!.]*/{MANIFEST}")):
        try:
            builds.append(read_build(path.parent))
        except InputError:
            continue  # one of many folders; whoever needs it is told to build it
    return builds


def _only(builds: Sequence[Build], what: str, none: str) -> Build:
    if not builds:
        raise InputError(none)
    if len(builds) > 1:
        folders = " or --data ".join(str(build.folder) for build in builds)
        raise InputError(f"{len(builds)} folders hold {what}: choose with --data {folders}")
    builds[0].check_complete()
    return builds[0]


def write_build(
    folder: Path,
    protocol: Protocol,
    sources: Mapping[str, tuple[str, Source]],
    *,
    class_names: Sequence[str],
    encoding: Encoding,
    skip_corrupt: bool = False,
    progress: Callable[[str, int, int], None] = lambda partition, total, done: None,
) -> tuple[Build, bool]:
    """Write the files of `protocol` into `folder` unless equal ones are there; returns the build and whether it did.

    Args:
        sources: for each partition, the kind of its source and the source.
        class_names: of the known classes, in label order.
        skip_corrupt: leave unreadable images out and name them in the manifest, instead of stopping at the first.
        progress: called with a partition, how many images it has, and how many of them are written.

    Raises:
        InputError: an image cannot be read, a class has too few, or the disk is full. What was in `folder` still is.
    """
    parts = protocol.partitions
    chosen = {name: part.select(sources[name][1]) for name, part in parts.items()}
    wanted = Manifest(
        format=_FORMAT,
        protocol=protocol.to_dict(),
        split_hash=protocol.split_hash,
        sources={name: f"{kind} {source.fingerprint}" for name, (kind, source) in sources.items() if name in parts},
        image_size=encoding.image_size,
        channels=protocol.info.channels,
        write_mode=encoding.write_mode,
        quality=encoding.quality,
        class_names=tuple(class_names),
    )
    with _alone(folder):
        there = _existing(folder, wanted, skip_corrupt)
        if there is not None:
            return there, False
        with full_disk_is_bad_input(folder), replacing_folder(folder) as partial:
            files = {}
            for name, part in parts.items():
                report = functools.partial(progress, name, len(chosen[name][0]))
                files[name] = _write_file(
                    partial / f"{name}.beton", part, sources[name][1], *chosen[name], encoding, skip_corrupt, report
                )
            manifest = dataclasses.replace(wanted, files=files)
            write_json(partial / MANIFEST, asdict(manifest))
    return Build(folder, manifest), True


def _write_file(
    path: Path,
    part: Partition,
    source: Source,
    indices: np.ndarray,
    labels: np.ndarray,
    encoding: Encoding,
    skip_corrupt: bool,
    progress: Callable[[int], None],
) -> FileRecord:
    skipped: tuple[str, ...] = ()
    if skip_corrupt:
        indices, labels, skipped = _readable(source, indices, labels, part)
    write_ffcv(path, source, indices, labels, encoding, progress)
    write_json(path.with_suffix(".names.json"), [source.describe(int(index)) for index in indices])
    counts = np.bincount(labels[labels >= 0], minlength=len(part.classes) if part.known else 0)
    return FileRecord(
        count=len(indices),
        class_counts=tuple(counts.tolist()),
        skipped=skipped,
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )


def _existing(folder: Path, wanted: Manifest, skip_corrupt: bool) -> Build | None:
    """The build in `folder` if it is what is wanted, file by file."""
    try:
        build = read_build(folder)
        build.check_complete()
    except (InputError, OSError):
        return None
    left_out = any(record.skipped for record in build.manifest.files.values())
    # Whoever does not allow images to be left out wants to hear that some cannot be read.
    return build if build.manifest.same_request(wanted) and (skip_corrupt or not left_out) else None


def _readable(
    source: Source, indices: np.ndarray, labels: np.ndarray, part: Partition
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The images that can be read, and the names of the others."""
    fine = np.array([_is_readable(source, index) for index in indices], dtype=bool)
    for place, name in enumerate(part.classes if part.known else ()):
        if not (labels[fine] == place).any():
            raise InputError(f"class {name!r} has no {part.subset} image left that can be read: check the data")
    if not fine.any():
        raise InputError(f"no {part.subset} image of the unknown classes can be read: check the data at --root")
    return indices[fine], labels[fine], tuple(source.describe(int(index)) for index in indices[~fine])


def _is_readable(source: Source, index: int) -> bool:
    try:
        source[int(index)]
    except CorruptImageError:
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process builds `folder`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.parent / f".{folder.name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be written to ({error.strerror}): name another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
