"""The published splits as published, and partitions that never share an image."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.protocols import DATASETS, ClassSplit, Protocol, custom_protocol, protocol_names, split_count
from data_pipeline.sources import Source

PUBLISHED = ("mnist", "svhn", "cifar10", "cifar+10", "cifar+50", "tinyimagenet")


class Labels(Source):
    """A source of labels whose images are never looked at."""

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        super().__init__([f"class{label}" for label in range(num_classes)], labels, 1)

    fingerprint = ""

    def describe(self, index: int) -> str:
        return f"image {index}"

    def _pixels(self, index: int) -> np.ndarray:
        raise AssertionError("no image is needed to choose images")


def labels_of(num_classes: int, each: int, seed: int = 0) -> Labels:
    return Labels(np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), each)), num_classes)


@pytest.mark.parametrize(
    ("name", "known", "unknown", "openness"),
    [
        ("mnist", 6, 4, 1 - math.sqrt(6 / 10)),
        ("svhn", 6, 4, 1 - math.sqrt(6 / 10)),
        ("cifar10", 6, 4, 1 - math.sqrt(6 / 10)),
        ("cifar+10", 4, 10, 1 - math.sqrt(4 / 14)),
        ("cifar+50", 4, 50, 1 - math.sqrt(4 / 54)),
        ("tinyimagenet", 20, 180, 1 - math.sqrt(20 / 200)),
        ("digits", 6, 4, 1 - math.sqrt(6 / 10)),
    ],
)
def test_sizes_and_openness(name, known, unknown, openness):
    assert split_count(name) == 5
    for split in range(5):
        protocol = Protocol(name, split)
        assert (len(protocol.known), len(protocol.unknown)) == (known, unknown)
        assert protocol.openness == pytest.approx(openness)


def test_first_splits_are_the_published_ones():
    assert Protocol("mnist", 0).known == (2, 4, 5, 9, 8, 3)
    assert Protocol("svhn", 4).known == (4, 9, 2, 7, 1, 0)
    assert Protocol("cifar10", 0).known == (0, 6, 4, 9, 1, 7)
    assert Protocol("cifar+10", 4).unknown == (33, 2, 3, 97, 46, 21, 64, 63, 88, 43)
    assert Protocol("tinyimagenet", 1).known[:4] == (198, 161, 91, 59)


def test_the_splits_of_a_protocol_differ_and_so_do_their_hashes():
    hashes = {Protocol(name, split).split_hash for name in protocol_names() for split in range(split_count(name))}
    assert len(hashes) == sum(split_count(name) for name in protocol_names())


def test_a_hash_is_the_same_on_every_machine():
    # Frozen: a change here means that earlier files and runs no longer compare.
    assert Protocol("cifar10", 0).split_hash == "6c9957636e6f2f3e"


def test_closed_set_protocols_have_no_unknown():
    for name, classes in (
        ("cifar10-closed", 10),
        ("cifar100-closed", 100),
        ("tinyimagenet-closed", 100),
        ("tinyimagenet-all", 200),
    ):
        protocol = Protocol(name)
        assert protocol.known == tuple(range(classes)) and protocol.openness == 0
        assert "test_unknown" not in protocol.partitions
    assert Protocol("cifar10-ood-svhn").test_unknown.dataset == "svhn"


def test_partitions_are_disjoint_and_complete():
    protocol = Protocol("cifar10", 0)
    train, test = labels_of(10, 100), labels_of(10, 20, seed=1)
    picked = {
        name: part.select(train if part.subset == "train" else test) for name, part in protocol.partitions.items()
    }
    training = [*picked["train"][0], *picked["calibration"][0]]
    assert len(training) == len(set(training)) == 600
    assert len(picked["calibration"][0]) == round(600 * DATASETS["cifar10"].calibration_share)
    testing = [*picked["test_known"][0], *picked["test_unknown"][0]]
    assert sorted(testing) == list(range(200))
    for name, (indices, labels) in picked.items():
        source = train if protocol.partitions[name].subset == "train" else test
        expected = [protocol.known.index(c) if c in protocol.known else -1 for c in source.labels[indices].tolist()]
        assert labels.tolist() == expected, name


def test_pseudo_open_never_leaves_the_known_training_images():
    for name in PUBLISHED:
        protocol = Protocol(name, 2)
        for seed in range(4):
            pseudo = protocol.pseudo_open(seed)
            assert set(pseudo.known) | set(pseudo.unknown) == set(protocol.known)
            assert not set(pseudo.known) & set(pseudo.unknown) and len(pseudo.known) >= 2 and pseudo.unknown
            assert all(part.subset == "train" for part in pseudo.partitions.values())
            assert all(part.dataset == protocol.classes.dataset for part in pseudo.partitions.values())
            assert set(pseudo.test_unknown.classes) <= set(protocol.known)
    source = labels_of(10, 100)
    parts = [part.select(source)[0] for part in Protocol("cifar10", 0).pseudo_open(0).partitions.values()]
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == len(together)
    assert set(source.labels[together]) <= set(Protocol("cifar10", 0).known)


def test_pseudo_open_depends_on_the_seed():
    protocol = Protocol("tinyimagenet", 0)
    assert protocol.pseudo_open(1) == protocol.pseudo_open(1)
    assert len({protocol.pseudo_open(seed).unknown for seed in range(5)}) > 1


def test_custom_classes_by_name():
    protocol = custom_protocol(["cat", "dog"], ["bird", "cat", "dog", "fish"])
    assert protocol.unknown == ("bird", "fish") and protocol.known == ("cat", "dog")
    with pytest.raises(InputError, match="'cow' is not in the data; its classes: bird, cat"):
        custom_protocol(["cat", "cow"], ["bird", "cat"])


def test_a_protocol_survives_its_record():
    for protocol in (Protocol("cifar+50", 3), Protocol("mnist", 1).pseudo_open(5), custom_protocol(["a", "b"], "abc")):
        assert Protocol.from_dict(protocol.to_dict()) == protocol
        assert Protocol.from_dict(protocol.to_dict()).split_hash == protocol.split_hash


def test_a_limit_takes_the_same_number_of_each_class():
    protocol = Protocol("mnist", 0)
    limited = dataclasses.replace(protocol, classes=dataclasses.replace(protocol.classes, train_images=30))
    source = labels_of(10, 100)
    indices, labels = limited.train.select(source)
    assert np.bincount(labels).tolist() == [5] * 6 and set(indices) < set(protocol.train.select(source)[0])
    assert limited.test_known == protocol.test_known and limited.split_hash != protocol.split_hash


def test_errors_name_the_remedy():
    with pytest.raises(InputError, match="unknown protocol 'cifar11'; known: digits, mnist"):
        Protocol("cifar11")
    with pytest.raises(InputError, match="splits 0 to 4, not 5"):
        Protocol("mnist", 5)
    with pytest.raises(InputError, match="at least two"):
        ClassSplit(dataset="mnist", known=(1,))
    with pytest.raises(InputError, match="listed twice"):
        ClassSplit(dataset="mnist", known=(1, 1, 2))
    with pytest.raises(InputError, match="both known and unknown"):
        ClassSplit(dataset="mnist", known=(1, 2), unknown=(2,))
    with pytest.raises(InputError, match="class 9 has no train image"):
        Protocol("mnist", 0).train.select(Labels(np.array([2, 4, 5]), 10))
    with pytest.raises(InputError, match="at least three"):
        custom_protocol(["a", "b"], "abc").pseudo_open(0)
