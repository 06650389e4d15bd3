"""The linear probe on features whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from data_pipeline.errors import InputError
from data_pipeline.loader import Batch
from trainer.evaluation.evaluators import FeatureModel, Subject
from trainer.evaluation.linear_probe import LinearProbe


class Fixed(FeatureModel):
    """Features that stand in a table; an image is the number of its row."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(torch.nn.Identity(), image_size=8, mean=(0.0,), std=(1.0,))
        self.table = torch.from_numpy(table).float()

    def __call__(self, images):
        from trainer.evaluation.detectors import Outputs

        return Outputs(self.table[images.flatten(1)[:, 0].long()], None)


def subject_of(train, train_labels, test, test_labels) -> Subject:
    def batch(first, labels):
        rows = torch.arange(first, first + len(labels)).view(-1, 1, 1, 1)
        return Batch(rows, torch.from_numpy(labels).long(), torch.arange(len(labels)))

    data = {"train": batch(0, train_labels), "test_known": batch(len(train), test_labels)}
    return Subject(Fixed(np.concatenate([train, test])), data)


def test_separable_classes_are_learnt_whatever_the_scale_of_their_features():
    rng = np.random.default_rng(0)
    centres = 6 * rng.normal(size=(8, 20))
    labels = np.arange(400) % 8
    features = centres[labels] + rng.normal(size=(400, 20))
    scales = np.exp(rng.normal(0, 3, 20))
    for scale in (1.0, scales):
        subject = subject_of((features * scale)[:300], labels[:300], (features * scale)[300:], labels[300:])
        result = LinearProbe(epochs=20, batch_size=64)(subject)
        assert result.numbers == {"top1_accuracy": 1.0, "top5_accuracy": 1.0}
    assert result.arrays["epoch"].tolist() == list(range(1, 21)) and result.tested == 100
    assert result.arrays["train_loss"][-1] < 0.1 * result.arrays["train_loss"][0]


def test_labels_without_relation_stay_at_chance():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(3000, 4)), rng.integers(0, 10, 3000)
    result = LinearProbe(epochs=10)(subject_of(features[:2000], labels[:2000], features[2000:], labels[2000:]))
    assert result.numbers["top1_accuracy"] == pytest.approx(0.1, abs=0.035)
    assert result.numbers["top5_accuracy"] == pytest.approx(0.5, abs=0.06)


def test_features_that_know_five_candidates():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 20, 4000)
    features = np.eye(4)[labels // 5] + 0.01 * rng.normal(size=(4000, 4))
    result = LinearProbe(epochs=10)(subject_of(features[:3000], labels[:3000], features[3000:], labels[3000:]))
    assert result.numbers["top5_accuracy"] == 1.0
    assert result.numbers["top1_accuracy"] == pytest.approx(0.2, abs=0.05)


def test_equals_scikit_learns_logistic_regression():
    rng = np.random.default_rng(3)
    labels = np.arange(1500) % 5
    features = 0.5 * rng.normal(size=(5, 10))[labels] + rng.normal(size=(1500, 10))
    subject = subject_of(features[:1000], labels[:1000], features[1000:], labels[1000:])
    probe = LinearProbe(epochs=60, batch_size=100)
    reference = LogisticRegression(C=np.inf, max_iter=1000).fit(features[:1000], labels[:1000])
    result = probe(subject)
    assert result.numbers["top1_accuracy"] == pytest.approx(reference.score(features[1000:], labels[1000:]), abs=0.012)
    expected = -np.log(reference.predict_proba(features[:1000])[np.arange(1000), labels[:1000]]).mean()
    assert result.arrays["train_loss"][-1] == pytest.approx(expected, rel=0.005)


def test_the_seed_decides():
    rng = np.random.default_rng(4)
    features, labels = rng.normal(size=(200, 6)), np.arange(200) % 3
    subject = subject_of(features[:150], labels[:150], features[150:], labels[150:])
    first, again, other = (LinearProbe(epochs=2, batch_size=16, seed=seed)(subject) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.arrays["train_loss"], again.arrays["train_loss"])
    assert not np.array_equal(first.arrays["train_loss"], other.arrays["train_loss"])


def test_a_feature_that_never_changes_does_no_harm():
    features = np.c_[np.ones(60), np.arange(60) % 2]
    subject = subject_of(features[:40], np.arange(40) % 2, features[40:], np.arange(20) % 2)
    assert LinearProbe(epochs=5, batch_size=8)(subject).numbers["top1_accuracy"] == 1.0


@pytest.mark.parametrize(("train_label", "test_label", "message"), [
    (1, 2, r"1 of 20 test_known images have labels outside of 0 to 1.*training images"),
    (1, -1, r"1 of 20 test_known images have labels outside of 0 to 1.*training images"),
    (-1, 1, r"1 of 40 train images have labels outside of 0 to 1.*training images"),
    (-100, 1, r"1 of 40 train images have labels outside of 0 to 1.*training images"),
])  # fmt: skip
def test_labels_of_no_class(train_label, test_label, message):
    features, train, test = np.random.default_rng(5).normal(size=(60, 4)), np.arange(40) % 2, np.arange(20) % 2
    train[5], test[9] = train_label, test_label
    with pytest.raises(InputError, match=message):
        LinearProbe(epochs=1)(subject_of(features[:40], train, features[40:], test))


def test_bad_configurations():
    for options in (
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(InputError, match=r"probe\."):
            LinearProbe(**options)
