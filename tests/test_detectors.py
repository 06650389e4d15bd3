"""Detectors against their formulas written out, and the one place where their sign is turned."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import weibull_min

from data_pipeline.errors import InputError
from trainer.evaluation.detectors import WITHOUT_FITTING, DetectorName, Outputs, fit_detector

NAMES = get_args(DetectorName)
CLASSES, DIMENSIONS = 4, 9


@pytest.fixture(scope="module")
def train():
    """Features around four means, and logits that are an affine map of them."""
    rng = np.random.default_rng(0)
    means = 4 * rng.normal(size=(CLASSES, DIMENSIONS))
    weight, bias = means, -0.5 * (means**2).sum(axis=1)
    labels = np.arange(240) % CLASSES

    def outputs(features) -> Outputs:
        logits = 0.1 * (features @ weight.T + bias)
        return Outputs(torch.tensor(features).float(), torch.tensor(logits).float())

    known = outputs(means[labels] + rng.normal(size=(240, DIMENSIONS)))
    test_known = outputs(means[labels[:60]] + rng.normal(size=(60, DIMENSIONS)))
    # Between the means, where no class is.
    unknown = outputs(means.mean(axis=0) + rng.normal(size=(50, DIMENSIONS)))
    return known, labels, test_known, unknown


def score(name, train, outputs):
    return fit_detector(name, None if name in WITHOUT_FITTING else (train[0], train[1]))(outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_score_means_more_known(train, name):
    known, unknown = score(name, train, train[2]), score(name, train, train[3])
    assert known.shape == (60,) and known.dtype == np.float64 and np.isfinite(known).all()
    assert np.median(known) > np.median(unknown)
    # OpenMax gives the unknown class what it takes from the logits, which is little where they are near 0.
    assert np.mean(known[:, None] > unknown) > (0.75 if name == "openmax" else 0.9)


def test_scores_of_logits(train):
    logits = train[2].logits.double().numpy()
    np.testing.assert_allclose(score("max_logit", train, train[2]), logits.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(score("max_softmax", train, train[2]), softmax(logits, axis=1).max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(score("energy", train, train[2]), logsumexp(logits, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", WITHOUT_FITTING)
def test_sure_answers_are_told_apart(name):
    """Similarities over τ = 0.05 are as far apart as 30, where a probability is 1 to seven digits."""
    logits = torch.zeros(12, CLASSES)
    logits[:, 0] = torch.arange(18.0, 30.0)
    scores = fit_detector(name, None)(Outputs(logits, logits))
    assert (np.diff(scores) > 0).all()


def test_scores_of_features(train):
    known, labels, test, _ = train
    train_features, features = known.features.double().numpy(), test.features.double().numpy()

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    distances = np.linalg.norm(unit(features)[:, None] - unit(train_features), axis=2)
    np.testing.assert_allclose(score("knn", train, test), -np.sort(distances, axis=1)[:, 49], rtol=1e-4)

    means = np.stack([train_features[labels == c].mean(axis=0) for c in range(CLASSES)])
    centred = train_features - means[labels]
    precision = np.linalg.inv(centred.T @ centred)
    squared = [[(x - m) @ precision @ (x - m) for m in means] for x in features]
    # The library halves the squared distance, and does not divide the covariance by the number of images.
    np.testing.assert_allclose(score("mahalanobis", train, test), -np.min(squared, axis=1) / 2, rtol=1e-3)


def test_vim_has_the_last_layer_of_the_network(train):
    known, _, test, _ = train
    columns = np.c_[known.features.double().numpy(), np.ones(240)]
    map_ = np.linalg.lstsq(columns, known.logits.double().numpy(), rcond=None)[0]
    weight, bias = map_[:-1].T, map_[-1]
    origin = -np.linalg.pinv(weight) @ bias
    centred = known.features.double().numpy() - origin
    values, vectors = np.linalg.eigh(centred.T @ centred)
    rest = vectors[:, np.argsort(values)[: DIMENSIONS - CLASSES]]
    alpha = known.logits.double().numpy().max(axis=1).mean() / np.linalg.norm(centred @ rest, axis=1).mean()
    virtual = alpha * np.linalg.norm((test.features.double().numpy() - origin) @ rest, axis=1)
    expected = logsumexp(test.logits.double().numpy(), axis=1) - virtual
    np.testing.assert_allclose(score("vim", train, test), expected, rtol=1e-3, atol=1e-3)


def test_openmax_is_minus_the_probability_of_the_unknown_class(train):
    known = score("openmax", train, train[2])
    assert ((known >= -1) & (known <= 0)).all()
    far = Outputs(train[2].features, train[2].logits * 5)
    assert score("openmax", train, far).mean() < known.mean()


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_other_images(train, name):
    known, labels, test_known, unknown = train
    score = fit_detector(name, (known, labels))
    for outputs in (test_known, unknown):
        together = score(outputs)
        alone = [score(Outputs(*(column[i : i + 1] for column in outputs)))[0] for i in range(len(together))]
        np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def naive_openmax(train, labels, test, tail, alpha):
    """Algorithms 1 and 2 of Bendale & Boult (2016), with Euclidean distances, one image and class after the other."""
    right = train.argmax(axis=1) == labels
    centres, models = [], []
    for c in range(CLASSES):
        own = train[right & (labels == c)]
        if len(own) < tail:
            own = train[labels == c]
        centres.append(own.mean(axis=0))
        distances = np.sort(np.linalg.norm(own - centres[c], axis=1))[-tail:]
        # LibMR shifts the tail to begin at 10,000.
        shift = 10_000 - distances.min()
        models.append((shift, weibull_min.fit(distances + shift, floc=0)))
    scores = []
    for row in test:
        revised, unknown = row.copy(), 0.0
        for rank, c in enumerate(np.argsort(-row)[:alpha]):
            shift, parameters = models[c]
            outside = weibull_min.cdf(np.linalg.norm(row - centres[c]) + shift, *parameters)
            revised[c] = row[c] * (1 - (alpha - rank) / alpha * outside)
            unknown += row[c] - revised[c]
        scores.append(-softmax(np.r_[unknown, revised])[0])
    return np.array(scores)


def test_openmax_is_fitted_to_images_classified_right(train):
    known, labels, test_known, unknown = train
    labels = labels.copy()
    labels[:8] = (labels[:8] + 1) % CLASSES  # wrong now
    # Of class 1, fewer than the tail of 25 images remain right.
    labels[(labels == 1).nonzero()[0][:40]] = 2
    labels[(labels == 3).nonzero()[0][:30]] = 1
    right = known.logits.numpy().argmax(axis=1) == labels
    assert [np.sum(labels[right] == c) < 25 for c in range(CLASSES)] == [False, True, False, False]
    test = torch.cat([test_known.logits, unknown.logits])
    found = fit_detector("openmax", (known, labels))(Outputs(test, test))
    assert np.bincount(labels).min() > 25
    expected = naive_openmax(known.logits.double().numpy(), labels, test.double().numpy(), 25, CLASSES)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_features_alone(train):
    bare = [Outputs(outputs.features, None) for outputs in (train[0], train[2])]
    for name in ("knn", "mahalanobis"):
        np.testing.assert_array_equal(fit_detector(name, (bare[0], train[1]))(bare[1]), score(name, train, train[2]))
    for name in ("openmax", "vim"):
        with pytest.raises(InputError, match="no logits"):
            fit_detector(name, (bare[0], train[1]))
    with pytest.raises(InputError, match="no logits"):
        fit_detector("energy", None)(bare[1])


def test_scores_that_are_not_finite(train):
    endless = Outputs(train[2].features, torch.full_like(train[2].logits, torch.inf))
    with pytest.raises(InputError, match="energy has scores that are not finite"):
        fit_detector("energy", None)(endless)


def test_bad_names_and_missing_images():
    with pytest.raises(InputError, match="unknown detector 'odin'; known: max_softmax"):
        fit_detector("odin", None)
    with pytest.raises(InputError, match="knn needs training images"):
        fit_detector("knn", None)
