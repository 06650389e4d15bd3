"""One FFCV file from the images of a source: fitted to a square, three channels, in the order they are asked for.

Three fields per sample: `image` (size, size, 3) uint8, `label` int64 (-1 for unknown) and `index`, its place in the
file, which is the name by which training remembers what it learned about an image.
"""

from __future__ import annotations

import ctypes
import errno
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import Value
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.images import fit
from data_pipeline.sources import Source

WriteMode = Literal["raw", "jpg", "smart"]

_SMALL_PAGE = 1 << 21
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


def write_ffcv(
    path: Path,
    source: Source,
    indices: np.ndarray,
    labels: np.ndarray,
    encoding: Encoding,
    progress: Callable[[int], None],
) -> None:
    """Write the images `indices` (n,) of `source` with their `labels` (n,); `progress` hears how many are written.

    Raises:
        InputError: an image cannot be read.
        OSError: the disk is full.
    """
    # Closed here: left to the garbage collector, the pool could be shut down by a thread that it waits for.
    with closing(_decode_ahead(source, indices, encoding.image_size)) as images:
        _write(path, images, labels, encoding, progress)


def _stored(image: np.ndarray, size: int) -> np.ndarray:
    """What is stored of uint8 (H, W, C): its centre square as (size, size, 3)."""
    image = fit(image, size)
    # FFCV stores three channels; the loader gives grey images their one back.
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def _decode_ahead(source: Source, indices: Iterable[int], size: int) -> Iterator[np.ndarray]:
    """Decoded and fitted images in order, a few threads ahead of the writer (Pillow decodes without the GIL)."""
    pool = ThreadPoolExecutor(_DECODE_THREADS)
    pending: deque = deque()
    try:
        for index in indices:
            pending.append(pool.submit(lambda index=int(index): _stored(source[index][0], size)))
            if len(pending) >= _DECODE_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write(
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
