"""Orders that are functions of (seed, epoch), shards that are disjoint and complete, and no thread left behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions, ResidentLoader, StreamLoader, load_all, open_loader, rank_order

CPU = torch.device("cpu")
KINDS = [StreamLoader, ResidentLoader]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_images_of_their_indices(kind, digits):
    everything = load_all(digits, "train", device=CPU)
    loader = kind(Partitions(digits, CPU), 100, seed=3)
    seen = []
    for batch in loader.epoch(5):
        assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
        assert torch.equal(batch.images, everything.images[batch.indices])
        assert torch.equal(batch.labels, everything.labels[batch.indices])
        seen += batch.indices.tolist()
    assert len(seen) == len(set(seen)) == 100 * len(loader) == 600


def test_both_loaders_give_the_same_batches_in_every_epoch(digits):
    stream, resident = (kind(Partitions(digits, CPU), 64, seed=1) for kind in KINDS)
    epochs = []
    for number in (0, 1, 0):
        pairs = list(zip(stream.epoch(number), resident.epoch(number)))
        assert len(pairs) == len(stream)
        for a, b in pairs:
            assert all(torch.equal(x, y) for x, y in zip(a, b))
        epochs.append(torch.cat([a.indices for a, _ in pairs]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_every_global_batch(kind, digits):
    alone = [batch.indices for batch in kind(Partitions(digits, CPU), 96, seed=2).epoch(4)]
    for world_size in (2, 3, 4):
        ranks = [
            [
                batch.indices
                for batch in kind(
                    Partitions(digits, CPU), 96 // world_size, seed=2, rank=rank, world_size=world_size
                ).epoch(4)
            ]
            for rank in range(world_size)
        ]
        together = [torch.cat(parts) for parts in zip(*ranks)]
        assert all(torch.equal(a, b) for a, b in zip(alone, together)) and len(alone) == len(together)


def test_what_is_left_over_changes_from_epoch_to_epoch():
    kept = [set(rank_order(10, 4, seed=0, epoch=e, rank=0, world_size=1).ravel().tolist()) for e in range(40)]
    assert all(len(images) == 8 for images in kept)
    assert set.union(*({*range(10)} - images for images in kept)) == set(range(10))


def test_seeds_give_different_orders():
    first, second = (rank_order(100, 10, seed=s, epoch=0, rank=0, world_size=1) for s in (0, 1))
    assert not np.array_equal(first, second)


def test_abandoned_epochs_leave_no_thread(digits):
    loader = StreamLoader(Partitions(digits, CPU), 32)
    next(loader.epoch(0))
    before = threading.active_count()
    for number in range(200):
        for batch in loader.epoch(number):
            assert len(batch.labels) == 32
            break
    assert threading.active_count() <= before


def test_an_abandoned_epoch_does_not_disturb_the_next(digits):
    loader, everything = (
        StreamLoader(Partitions(digits, CPU), 32),
        load_all(digits, "train", device=CPU),
    )
    for number in range(5):
        batches = loader.epoch(number)
        kept = [next(batches), next(batches)]
        batches.close()
        for batch in [*kept, *loader.epoch(number)]:
            assert torch.equal(batch.images, everything.images[batch.indices])


def test_the_cache_is_chosen_by_memory(digits, monkeypatch):
    assert isinstance(open_loader(Partitions(digits, CPU), 32), ResidentLoader)
    monkeypatch.setattr("data_pipeline.loader._free_memory", lambda device: 1000)
    assert isinstance(open_loader(Partitions(digits, CPU), 32), StreamLoader)
    assert isinstance(open_loader(Partitions(digits, CPU), 32, cache="resident"), ResidentLoader)


def test_small_partitions_are_decoded_once(digits, monkeypatch):
    partitions = Partitions(digits, CPU)
    assert partitions["test_known"] is partitions["test_known"]
    assert "test_unknown" in partitions and "else" not in partitions
    monkeypatch.setattr("data_pipeline.loader._free_memory", lambda device: 1000)
    first, second = partitions["train"], partitions["train"]
    assert first is not second and torch.equal(first.images, second.images)


def test_what_the_device_has_no_room_for_comes_to_the_host(digits, monkeypatch):
    partitions = Partitions(digits, torch.device("meta"))
    partitions._kept["test_known"] = kept = load_all(digits, "test_known", device=CPU)
    monkeypatch.setattr("data_pipeline.loader._free_memory", lambda device: 1000)
    assert partitions.on_device_or_host("train").images.device == CPU
    assert partitions.on_device_or_host("test_known") is kept


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_images_than_a_batch_is_refused(kind, digits):
    with pytest.raises(InputError, match="690 training images do not fill one batch of 700: set --batch-size"):
        kind(Partitions(digits, CPU), 350, world_size=2)
