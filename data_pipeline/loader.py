"""From an FFCV file to batches on the device: images uint8, labels and indices. FFCV decodes; the rest happens there.

The order of an epoch is a function of (seed, epoch) alone, and a rank's batches are its slice of every global batch:
the global batch of a step holds the same images on any number of ranks.

Two loaders with one interface: `StreamLoader` decodes every epoch from the file, `ResidentLoader` decodes once and
keeps the images on the device, where an epoch is nothing but indexing.
"""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.beton import Build
from data_pipeline.errors import InputError

Cache = Literal["auto", "resident", "stream"]

_RESIDENT_SHARE = 0.25
_DECODE_BATCH = 512


class Batch(NamedTuple):
    """N images on the device.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) int64, the place of the class in the manifest's `class_names`, -1 for unknown.
        indices: (N,) int64, the place of the image in its file.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order (count,) int64 in which the images of this epoch come."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def rank_order(count: int, batch_size: int, *, seed: int, epoch: int, rank: int, world_size: int) -> np.ndarray:
    """One rank's part (steps, batch_size) of the epoch: its slice of every global batch.

    A global batch is `batch_size · world_size` consecutive images of the epoch's order; the images left over at the end
    sit this epoch out, other ones each time.
    """
    global_batch = batch_size * world_size
    steps = count // global_batch
    order = epoch_order(count, seed, epoch)[: steps * global_batch]
    return order.reshape(steps, world_size, batch_size)[:, rank]


class Partitions:
    """A build's partitions as batches on a device: `partitions["train"]` has all training images, in the file's order.

    Each is decoded when it is first asked for, by `workers` threads, and kept if it takes at most a quarter of the
    memory that is free on the device then; else it is decoded again the next time.
    """

    def __init__(self, build: Build, device: torch.device, workers: int = 1) -> None:
        self.build, self.device, self.workers = build, device, workers
        self._kept: dict[str, Batch] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.build

    def __getitem__(self, name: str) -> Batch:
        if name in self._kept:
            return self._kept[name]
        keep = self.fits(name)
        batch = load_all(self.build, name, device=self.device, workers=self.workers)
        if keep:
            self._kept[name] = batch
        return batch

    def on_device_or_host(self, name: str) -> Batch:
        """The partition on the device where it `fits`, else in the host's memory, to be taken over piece by piece."""
        if self.fits(name):
            return self[name]
        return load_all(self.build, name, device=torch.device("cpu"), workers=self.workers)

    def fits(self, name: str) -> bool:
        """Whether the partition is small beside the device's free memory, or is there already."""
        manifest = self.build.manifest
        needed = self.build.record(name).count * (manifest.image_size**2 * manifest.channels + 16)
        return name in self._kept or needed <= _RESIDENT_SHARE * _free_memory(self.device)


class Loader(ABC):
    """Shuffled training batches of one rank. `len(loader)` is the number of steps in an epoch."""

    def __init__(
        self,
        partitions: Partitions,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        """`batch_size` is of each rank; an epoch has a multiple of `accumulation` batches. The other arguments are
        `rank_order`'s."""
        self.count, self.batch_size = partitions.build.record("train").count, batch_size
        self.device = partitions.device
        self.seed, self.rank, self.world_size, self.accumulation = seed, rank, world_size, accumulation
        if len(self) == 0:
            raise InputError(
                f"{self.count} training images do not fill one batch of {batch_size * world_size * accumulation}: "
                f"set --batch-size to at most {self.count}"
            )
        self._open(partitions)

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size * self.accumulation) * self.accumulation

    @abstractmethod
    def _open(self, partitions: Partitions) -> None:
        """Make the training images ready to be read."""

    @abstractmethod
    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, from 0, beginning with that of step `first_step`. Leaving early is fine."""

    def _order(self, number: int, first_step: int) -> np.ndarray:
        order = rank_order(
            self.count, self.batch_size, seed=self.seed, epoch=number, rank=self.rank, world_size=self.world_size
        )
        return order[first_step : len(self)]


class StreamLoader(Loader):
    """Decodes from the file every epoch, a few batches ahead."""

    def _open(self, partitions: Partitions) -> None:
        self._file = _FFCVFile(partitions.build, "train", self.batch_size, self.device, partitions.workers)

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        return self._file.read(self._order(number, first_step).ravel())


class ResidentLoader(Loader):
    """Decodes the file once and keeps it on the device: (H·W·C + 16) bytes an image."""

    def _open(self, partitions: Partitions) -> None:
        self._data = partitions["train"]

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        # One transfer for the whole epoch; after it no step waits for the host.
        for chosen in torch.from_numpy(self._order(number, first_step)).to(self.device, non_blocking=True):
            yield Batch(self._data.images[chosen], self._data.labels[chosen], chosen)


def open_loader(
    partitions: Partitions,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    cache: Cache = "auto",
) -> Loader:
    """Training batches of a build, `batch_size` images on each rank.

    Args:
        accumulation: how many of them make one step of the optimizer; an epoch has no part of a step.
        cache: keep the decoded images on the device, stream them, or decide: resident if they take at most a quarter of
            the memory that is free there. An export is always resident.
    """
    build = partitions.build
    exported = build.manifest.storage != "ffcv"
    if exported and cache == "stream":
        raise InputError(
            f"{build.folder} is an export, which is read whole: leave out --cache stream, or build it here"
        )
    if cache == "auto":
        cache = "resident" if exported or partitions.fits("train") else "stream"
    kind = ResidentLoader if cache == "resident" else StreamLoader
    return kind(partitions, batch_size, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation)


def load_all(build: Build, partition: str, *, device: torch.device, workers: int = 1) -> Batch:
    """All images of a partition, in the file's order, as one batch on the device."""
    count = build.record(partition).count
    if build.manifest.storage == "safetensors":
        file = load_file(build.file(partition), device=str(device))
        return Batch(file["images"], file["labels"], torch.arange(count, device=device))
    whole, done = None, 0
    for batch in _FFCVFile(build, partition, min(_DECODE_BATCH, count), device, workers).read(np.arange(count)):
        if whole is None:  # of their final size at once: joined at the end, they would be held twice
            whole = Batch(*(part.new_empty((count, *part.shape[1:])) for part in batch))
        for place, part in zip(whole, batch):
            place[done : done + len(part)] = part
        done += len(batch.images)
    return whole


class _FFCVFile:
    """An FFCV loader that reads the images it is asked for, in that order, and leaves no thread behind."""

    def __init__(self, build: Build, partition: str, batch_size: int, device: torch.device, workers: int) -> None:
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader as FFCVLoader
        from ffcv.loader import OrderOption
        from ffcv.transforms import Squeeze, ToTensor

        self._device = device
        self._channels = build.manifest.channels
        self._loader = FFCVLoader(
            str(build.file(partition)),
            batch_size=batch_size,
            num_workers=workers,
            # The page cache serves every process on the machine; FFCV's own cache would hold a copy for each.
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={
                "image": [SimpleRGBImageDecoder(), ToTensor()],
                "label": [IntDecoder(), ToTensor(), Squeeze(1)],
                "index": [IntDecoder(), ToTensor(), Squeeze(1)],
            },
        )

    def read(self, order: np.ndarray) -> Iterator[Batch]:
        # FFCV's sequential order takes its indices as they are, so that any order can be asked for.
        self._loader.traversal_order.indices = order
        self._loader.first_traversal_order = order
        iterator = iter(self._loader)
        try:
            for images, labels, indices in iterator:
                # FFCV reuses its buffers a few batches later; what leaves here is the caller's own.
                yield Batch(
                    _take(images[..., : self._channels], self._device),
                    _take(labels, self._device),
                    _take(indices, self._device),
                )
        finally:
            _close(iterator)


def _take(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    # From pinned memory, so that the host does not wait for the device; its allocator keeps it until the copy is done.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _close(iterator) -> None:
    """End FFCV's epoch thread; its own `close` leaves that of an abandoned epoch waiting for a reader (ffcv #345)."""
    iterator.iter_ixes = iter(())
    iterator.close()
    while iterator.is_alive():
        # Make room for what the thread wants to hand over last, so that it can end.
        try:
            iterator.output_queue.get(timeout=0.01)
        except queue.Empty:
            continue
    iterator.join()
    iterator.closed = True


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
