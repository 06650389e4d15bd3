"""FFCV files (.beton), one per partition of a protocol, each with a manifest that says what is in it.

    data/cifar10-0-32px-raw/train.beton          images, labels, indices
    data/cifar10-0-32px-raw/train.beton.json     the manifest, written last: without it the file does not count

A file is written under a temporary name, completed, checksummed and renamed, so an interrupted build leaves nothing
that looks whole. Three fields per sample: `image` (H, W, 3) uint8, `label` int64 (-1 for unknown) and `index`, its
place in the file, which is the name by which training remembers what it learned about an image.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import Value
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.files import read_json, replacing, write_json
from data_pipeline.protocols import Protocol
from data_pipeline.sources import CorruptImageError, Source

WriteMode = Literal["raw", "jpg", "smart"]

_FORMAT = 1
_SMALL_PAGE = 1 << 21
_CHECKSUM_LIMIT = 1 << 30
_DECODE_THREADS = 4
_DECODE_AHEAD = 64


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored.

    raw keeps every pixel (3·size² bytes each), jpg compresses, smart compresses the images that raw would store in more
    than `SMART_THRESHOLD` bytes.
    """

    image_size: int
    write_mode: WriteMode = "raw"
    quality: int = 90

    SMART_THRESHOLD = 64 * 64 * 3

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 1024:
            raise InputError(f"image size is {self.image_size}; set it within 8 to 1024 pixels")
        if not 1 <= self.quality <= 100:
            raise InputError(f"jpeg quality is {self.quality}; set it within 1 to 100")

    @property
    def name(self) -> str:
        return self.write_mode if self.write_mode == "raw" else f"{self.write_mode}{self.quality}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a .beton file holds. `bytes` and `sha256` are of the finished file; the rest is what was asked for."""

    format: int
    partition: str
    protocol: dict[str, Any]
    split_hash: str
    source: str
    image_size: int
    channels: int
    write_mode: WriteMode
    quality: int
    class_names: tuple[str, ...]
    count: int
    class_counts: tuple[int, ...]
    """Images of each known class, in the order of `class_names`."""
    skipped: tuple[str, ...] = ()
    bytes: int = 0
    sha256: str = ""

    def same_request(self, other: Manifest) -> bool:
        """Whether both describe the same images stored in the same way, whatever came of it."""

        def request(manifest: Manifest) -> dict[str, Any]:
            outcome = ("count", "class_counts", "skipped", "bytes", "sha256")
            return {name: value for name, value in asdict(manifest).items() if name not in outcome}

        return request(self) == request(other)


def folder_name(protocol: Protocol, encoding: Encoding) -> str:
    """Where a protocol's files go below the data folder; the encoding is in the name since it can change results."""
    limit = protocol.classes.train_images
    subset = "" if limit is None else f"-{limit}images"
    return f"{protocol.name}-{protocol.split}-{encoding.image_size}px-{encoding.name}{subset}"


def manifest_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def read_manifest(beton: Path) -> Manifest:
    """The manifest of a finished file; raises `InputError` when there is none or it is of another kind."""
    path = manifest_path(beton)
    if not path.is_file():
        raise InputError(f"{beton} has no manifest {path.name}: it is unfinished or foreign; build it again")
    record = read_json(path, "manifest")
    try:
        lists = ("class_names", "class_counts", "skipped")
        manifest = Manifest(**{**record, **{name: tuple(record[name]) for name in lists}})
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} is not a manifest of this project: build the file again") from error
    if manifest.format != _FORMAT:
        raise InputError(f"{path} has format {manifest.format}, this version reads {_FORMAT}: build the file again")
    return manifest


def verify(beton: Path) -> Manifest:
    """The manifest of `beton`, after making sure that the file is the one it describes.

    The size is always compared, the checksum for files up to 1 GiB (a second of reading).
    """
    manifest = read_manifest(beton)
    if not beton.is_file():
        raise InputError(f"{beton} is missing though its manifest is there: build it again")
    size = beton.stat().st_size
    if size != manifest.bytes:
        raise InputError(f"{beton} has {size} bytes, its manifest says {manifest.bytes}: truncated; build it again")
    if size <= _CHECKSUM_LIMIT and _sha256(beton) != manifest.sha256:
        raise InputError(f"{beton} does not match the checksum in its manifest: damaged or foreign; build it again")
    return manifest


def find_build(data: Path, name: str, split: int) -> tuple[Protocol, Path]:
    """The protocol of that name and split as it was built at or below `data`, and the folder of its files.

    Raises:
        InputError: there is no such build, or there are several.
    """
    builds = _builds(data)
    matching = [
        folder
        for folder, manifest in builds.items()
        if (manifest.protocol["name"], manifest.protocol["split"]) == (name, split)
    ]
    folder = _only(matching, f"protocol {name}, split {split}")
    if folder is None and data in builds:
        other = builds[data].protocol
        raise InputError(
            f"{data} holds protocol {other['name']}, split {other['split']}, not {name}, split {split}: "
            "give the folder of the protocol you mean"
        )
    if folder is None:
        raise InputError(
            f"no files of protocol {name}, split {split} in {data}: "
            f"run python -m data_pipeline.build --protocol {name} --split {split} --out {data}"
        )
    return Protocol.from_dict(builds[folder].protocol), folder


def find_folder(data: Path, protocol: Protocol) -> Path:
    """The folder at or below `data` whose files are of the very split `protocol`, whatever their encoding.

    Raises:
        InputError: there is no such folder, or there are several.
    """
    matching = [folder for folder, manifest in _builds(data).items() if manifest.split_hash == protocol.split_hash]
    folder = _only(matching, f"the model's split {protocol.split_hash}")
    if folder is None:
        raise InputError(
            f"no files in {data} are of the split the model was trained on "
            f"({protocol.name}, split {protocol.split}, hash {protocol.split_hash}): build them, or correct --data"
        )
    return folder


def _builds(data: Path) -> dict[Path, Manifest]:
    """The manifest of the training images of every build at or below `data`."""
    candidates = [data] if (data / "train.beton.json").is_file() else sorted(data.glob("*/"))
    builds = {}
    for folder in candidates:
        if not (folder / "train.beton.json").is_file():
            continue
        try:
            manifest = read_manifest(folder / "train.beton")
        except InputError:
            if folder == data:
                raise
            continue  # one of many folders; whoever needs it is told to build it
        # A version that split images differently may have built it.
        if Protocol.from_dict(manifest.protocol).split_hash == manifest.split_hash:
            builds[folder] = manifest
    return builds


def _only(folders: Sequence[Path], what: str) -> Path | None:
    if len(folders) > 1:
        raise InputError(
            f"{len(folders)} folders hold {what}: choose with --data {' or --data '.join(map(str, folders))}"
        )
    return folders[0] if folders else None


def write_partition(
    folder: Path,
    partition: str,
    *,
    protocol: Protocol,
    source: Source,
    source_kind: str,
    class_names: Sequence[str],
    encoding: Encoding,
    skip_corrupt: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Manifest, bool]:
    """Write one partition's file unless an equal one is there. Returns its manifest and whether it was written.

    Args:
        progress: called with the number of images written so far.
        skip_corrupt: leave unreadable images out and name them in the manifest, instead of stopping at the first.

    Raises:
        InputError: an image cannot be read, or the disk is full. The earlier file, if any, is still there.
    """
    beton = folder / f"{partition}.beton"
    indices, labels = protocol.partitions[partition].select(source)
    wanted = Manifest(
        format=_FORMAT,
        partition=partition,
        protocol=protocol.to_dict(),
        split_hash=protocol.split_hash,
        source=source_kind,
        image_size=encoding.image_size,
        channels=protocol.info.channels,
        write_mode=encoding.write_mode,
        quality=encoding.quality,
        class_names=tuple(class_names),
        count=len(indices),
        class_counts=_class_counts(labels, class_names),
    )
    if _is_built(beton, wanted):
        return read_manifest(beton), False
    skipped: tuple[str, ...] = ()
    if skip_corrupt:
        readable = np.array([_is_readable(source, index) for index in indices], dtype=bool)
        skipped = tuple(source.describe(int(index)) for index in indices[~readable])
        indices, labels = indices[readable], labels[readable]
    if len(indices) == 0:
        raise InputError(f"partition {partition} of {protocol.name} has no image left: check the data at --root")

    # Closed here: left to the garbage collector, the pool could be shut down by a thread that it waits for.
    with replacing(beton) as partial, closing(_decode_ahead(source, indices, encoding.image_size)) as images:
        _write_ffcv(partial, images, labels, encoding, progress)
        finished = Manifest(
            **{
                **wanted.__dict__,
                "count": len(indices),
                "class_counts": _class_counts(labels, class_names),
                "skipped": skipped,
                "bytes": partial.stat().st_size,
                "sha256": _sha256(partial),
            }
        )
        # From here to the new manifest the file does not count: the old manifest would describe the wrong bytes.
        manifest_path(beton).unlink(missing_ok=True)
    write_json(manifest_path(beton), asdict(finished))
    return finished, True


def _is_built(beton: Path, wanted: Manifest) -> bool:
    try:
        return read_manifest(beton).same_request(wanted) and beton.stat().st_size == read_manifest(beton).bytes
    except (InputError, OSError):
        return False


def _class_counts(labels: np.ndarray, class_names: Sequence[str]) -> tuple[int, ...]:
    return tuple(np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist())


def _is_readable(source: Source, index: int) -> bool:
    try:
        source[int(index)]
    except CorruptImageError:
        return False
    return True


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of uint8 (H, W, C), resized to (size, size, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side != size:
        image = np.asarray(Image.fromarray(image.squeeze()).resize((size, size), Image.Resampling.BILINEAR))
        image = image.reshape(size, size, -1)
    # FFCV stores three channels; the loader gives grey images their one back.
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def _decode_ahead(source: Source, indices: Iterable[int], size: int) -> Iterator[np.ndarray]:
    """Decoded and fitted images in order, a few threads ahead of the writer (Pillow decodes without the GIL)."""
    pool = ThreadPoolExecutor(_DECODE_THREADS)
    pending: deque = deque()
    try:
        for index in indices:
            pending.append(pool.submit(lambda index=int(index): _fit(source[index][0], size)))
            if len(pending) >= _DECODE_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_ffcv(
    path: Path, images: Iterator[np.ndarray], labels: np.ndarray, encoding: Encoding, progress: Callable[[int], None]
) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter

    class InProcessWriter(DatasetWriter):
        """FFCV's writer without its worker processes, whose death it does not notice: it would wait for ever."""

        def _write_common(self, num_samples, queue_content, work_fn, extra_worker_args):
            self.num_samples = num_samples
            self.prepare()
            # With one process the sample table needs no shared memory, and none is left behind by an error.
            table = SimpleNamespace(buf=bytearray(num_samples * self.metadata_type.itemsize))
            self.metadata_sm.close()
            self.metadata_sm.unlink()
            self.metadata_sm = table
            tasks, allocations = queue.SimpleQueue(), queue.SimpleQueue()
            for task in (*queue_content, None):
                tasks.put(task)
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            written = Value(ctypes.c_uint64, 0)
            work_fn(tasks, table, self.metadata_type, self.fields, allocator, written, allocations, *extra_worker_args)
            # FFCV writes unbuffered and does not look at how much the system took: a full disk cuts a page short.
            if path.stat().st_size != allocator.offset + allocator.next_page_allocated.value * self.page_size:
                raise OSError(errno.ENOSPC, "short write")
            self.finalize(allocations.get())

    class Samples:
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[np.ndarray, int, int]:
            progress(index)
            return next(images), int(labels[index]), int(index)

    fields = {
        "image": RGBImageField(
            write_mode=encoding.write_mode, jpeg_quality=encoding.quality, smart_threshold=Encoding.SMART_THRESHOLD
        ),
        "label": IntField(),
        "index": IntField(),
    }
    # A page must hold at least one image; 2 MiB, FFCV's smallest, keeps small files small.
    page_size = max(_SMALL_PAGE, 1 << (3 * encoding.image_size**2).bit_length())
    InProcessWriter(str(path), fields, page_size=page_size).from_indexed_dataset(Samples())
    progress(len(labels))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
