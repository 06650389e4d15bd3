"""Metrics against loops written from their definitions, against scikit-learn, and against closed forms."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve, top_k_accuracy_score

from trainer import metrics as measures
from trainer.metrics import (
    auroc,
    bootstrap_interval,
    closed_set_accuracy,
    detection_metrics,
    open_set_metrics,
    oscr,
    oscr_curve,
    top_k_accuracy,
    two_nn,
)
from trainer.open_set import calibrate_threshold

# Few distinct values make ties within and between the groups the rule.
TIED = st.lists(st.integers(-4, 4), min_size=1, max_size=12)
FLOATS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)
SCORES = st.one_of(TIED, FLOATS)
BOTH = "known_scores and known_predictions"
CORRECT = st.lists(st.booleans(), min_size=12, max_size=12)

random = np.random.default_rng(0)
CASES = {
    "random": (random.normal(1, 1, 83), random.normal(0, 1, 131)),
    "tied": (random.integers(0, 6, 61), random.integers(-2, 4, 47)),
    "all equal": (np.ones(7), np.ones(5)),
    "one each": ([0.3], [0.2]),
    "one each, tied": ([0.3], [0.3]),
    "one each, reversed": ([0.2], [0.3]),
    "one known": ([0.5], random.random(31)),
    "one unknown": (random.random(31), [0.5]),
    "separated": (random.random(17) + 2, random.random(19)),
    "reversed": (random.random(17), random.random(19) + 2),
    "known constant": (np.zeros(11), random.normal(size=13)),
    "single precision": (random.normal(size=23).astype(np.float32), random.normal(size=29).astype(np.float32)),
    "half precision": (random.normal(size=300).astype(np.float16), random.normal(size=300).astype(np.float16)),
}
all_cases = pytest.mark.parametrize(("known", "unknown"), list(CASES.values()), ids=list(CASES))


def pairs_won(known, unknown) -> float:
    return sum(1.0 if k > u else 0.5 if k == u else 0.0 for k in known for u in unknown)


def thresholds(known, unknown) -> list[float]:
    """Every threshold that makes a difference, from the one that accepts nothing to the one that accepts all."""
    return [math.inf, *sorted({*known, *unknown}, reverse=True)]


def share(scores, threshold: float) -> float:
    return sum(s >= threshold for s in scores) / len(scores)


def oscr_curve_area(known, correct, unknown) -> float:
    """The trapezoids under CCR over FPR, threshold by threshold."""
    points = []
    for t in thresholds(known, unknown):
        ccr = sum(bool(c) and s >= t for s, c in zip(known, correct)) / len(known)
        points.append((share(unknown, t), ccr))
    return math.fsum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points))


def labelled(known, unknown) -> tuple[np.ndarray, np.ndarray]:
    """Labels (1 = known) and scores in the form that scikit-learn takes."""
    return np.r_[np.ones(len(known)), np.zeros(len(unknown))], np.r_[known, unknown].astype(np.float64)


class TestAuroc:
    @all_cases
    def test_equals_the_pairs_and_scikit_learn(self, known, unknown):
        value = auroc(known, unknown)
        assert type(value) is float
        assert value == pairs_won(known, unknown) / (len(known) * len(unknown))
        assert value == pytest.approx(roc_auc_score(*labelled(known, unknown)), abs=1e-12)

    @given(known=SCORES, unknown=SCORES)
    @settings(max_examples=60, deadline=None)
    def test_exchanging_the_groups_gives_the_complement(self, known, unknown):
        assert auroc(known, unknown) == pytest.approx(1 - auroc(unknown, known), abs=1e-15)

    @given(known=TIED, unknown=TIED)
    @settings(max_examples=60, deadline=None)
    def test_only_the_order_of_scores_matters(self, known, unknown):
        def cubed(scores):
            return [s**3 + s - 1e3 for s in scores]

        assert auroc(cubed(known), cubed(unknown)) == auroc(known, unknown)
        assert auroc(known[::-1], sorted(unknown)) == auroc(known, unknown)

    def test_closed_forms(self):
        assert auroc([2, 3], [0, 1, 1]) == 1.0
        assert auroc([0, 1], [2, 3]) == 0.0
        assert auroc([5, 5, 5], [5, 5]) == 0.5
        assert auroc([1, 2, 3, 4], [1, 2, 3, 4]) == 0.5
        assert auroc([1, 3], [2, 0]) == 0.75

    def test_many_scores(self):
        # A matrix of all pairs would take 80 GB.
        rng = np.random.default_rng(1)
        known, unknown = np.round(rng.normal(0.5, 1, 100_000), 3), np.round(rng.normal(0, 1, 100_000), 3)
        expected = roc_auc_score(*labelled(known, unknown))
        assert auroc(known, unknown) == pytest.approx(expected, abs=1e-12)
        correct = rng.random(100_000) < 0.7
        won = roc_auc_score(*labelled(known[correct], unknown))
        assert oscr(known, correct, unknown) == pytest.approx(won * correct.mean(), abs=1e-12)
        assert detection_metrics(known, unknown)["auroc"] == auroc(known, unknown)


class TestOscr:
    @all_cases
    def test_equals_the_area_under_the_curve(self, known, unknown):
        for probability in (0.0, 0.3, 0.8, 1.0):
            correct = np.random.default_rng(3).random(len(known)) < probability
            value = oscr(known, correct, unknown)
            assert type(value) is float
            assert value == pytest.approx(oscr_curve_area(known, correct, unknown), abs=1e-12)

    @given(known=SCORES, unknown=SCORES, correct=CORRECT)
    @settings(max_examples=100, deadline=None)
    def test_properties(self, known, unknown, correct):
        correct = correct[: len(known)]
        value = oscr(known, correct, unknown)
        assert value == pytest.approx(oscr_curve_area(known, correct, unknown), abs=1e-12)
        assert 0 <= value <= sum(correct) / len(correct)
        assert value <= auroc(known, unknown)
        assert oscr(known, [True] * len(known), unknown) == auroc(known, unknown)
        assert oscr(known, [False] * len(known), unknown) == 0.0

    @given(known=TIED, unknown=TIED, correct=CORRECT)
    @settings(max_examples=60, deadline=None)
    def test_only_the_order_of_scores_matters(self, known, unknown, correct):
        correct = correct[: len(known)]
        cubed = [s**3 + s - 1e3 for s in known], correct, [s**3 + s - 1e3 for s in unknown]
        assert oscr(*cubed) == oscr(known, correct, unknown)
        assert oscr(known[::-1], correct[::-1], unknown[::-1]) == oscr(known, correct, unknown)

    def test_closed_forms(self):
        # Perfectly separated: the closed set accuracy. All tied: half of it, the diagonal up to (1, accuracy).
        assert oscr([2, 3, 4, 5], [True, False, True, True], [0, 1]) == 0.75
        assert oscr([1, 1, 1, 1], [True, False, True, True], [1, 1]) == 0.375
        # Unknown 2 passes after known 3 (CCR 1/2), unknown 0 after known 1, which is wrong: 1/2 · 1/2 + 1/2 · 1/2.
        assert oscr([3, 1], [True, False], [2, 0]) == 0.5
        assert oscr([3, 1], [False, True], [2, 0]) == 0.25


class TestClosedSetAccuracy:
    def test_share(self):
        value = closed_set_accuracy([1, 2, 0, 0], np.array([1, 2, 1, 0]))
        assert value == 0.75
        assert type(value) is float
        assert closed_set_accuracy(torch.tensor([1]), torch.tensor([0])) == 0.0

    @pytest.mark.parametrize(
        ("predictions", "labels", "shapes"),
        [([], [], "(0,) and (0,)"), ([1, 2], [1], "(2,) and (1,)"), ([[1], [2]], [[1], [2]], "(2, 1) and (2, 1)")],
    )
    def test_errors(self, predictions, labels, shapes):
        message = f"predictions and labels must be vectors of one length ≥ 1, got {shapes}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            closed_set_accuracy(predictions, labels)


class TestOpenSetMetrics:
    def test_every_k(self):
        rng = np.random.default_rng(5)
        ks = (1, 5, 50)
        known, unknown = rng.normal(1, 1, (37, 3)), rng.normal(0, 1, (23, 3))
        predictions, labels = rng.integers(0, 2, (37, 3)), rng.integers(0, 2, 37)
        metrics = open_set_metrics(known, predictions, labels, unknown, ks)
        assert list(metrics) == ["auroc", "oscr", "closed_set_accuracy"]
        for j, k in enumerate(ks):
            correct = [p == t for p, t in zip(predictions[:, j], labels)]
            assert metrics["auroc"][k] == pairs_won(known[:, j], unknown[:, j]) / (37 * 23)
            assert metrics["oscr"][k] == pytest.approx(oscr_curve_area(known[:, j], correct, unknown[:, j]), abs=1e-12)
            assert metrics["closed_set_accuracy"][k] == sum(correct) / 37
        for values in metrics.values():
            assert list(values) == list(ks)
            assert all(type(k) is int and type(value) is float for k, value in values.items())

    def test_plain_keys_from_numpy_ks_and_tensors(self):
        ones = torch.ones(2, 1)
        metrics = open_set_metrics(ones, ones.long(), torch.ones(2).long(), ones, np.array([3]))
        assert metrics == {"auroc": {3: 0.5}, "oscr": {3: 0.5}, "closed_set_accuracy": {3: 1.0}}
        assert all(type(k) is int for values in metrics.values() for k in values)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((4, 2), (4, 2), (4,), (3, 1)), "unknown_scores must be (m, 2), got (3, 1)"),
            (((4, 2), (4, 2), (4,), (3,)), "unknown_scores must be (m, 2), got (3,)"),
            (((4, 3), (4, 2), (4,), (3, 2)), f"{BOTH} must be (4, 2), got (4, 3) and (4, 2)"),
            (((4, 2), (4, 1), (4,), (3, 2)), f"{BOTH} must be (4, 2), got (4, 2) and (4, 1)"),
            (((4, 2), (4, 2), (5,), (3, 2)), f"{BOTH} must be (5, 2), got (4, 2) and (4, 2)"),
            (((0, 2), (0, 2), (0,), (3, 2)), "known_scores must be a non-empty vector, got shape (0,)"),
            (((4, 2), (4, 2), (4,), (0, 2)), "unknown_scores must be a non-empty vector, got shape (0,)"),
        ],
    )
    def test_errors(self, shapes, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            open_set_metrics(*map(np.ones, shapes), (1, 5))


class TestDetectionMetrics:
    @all_cases
    def test_equals_the_definitions(self, known, unknown):
        metrics = detection_metrics(known, unknown)
        rates = [(share(known, t), 1 - share(unknown, t)) for t in thresholds(known, unknown)]
        labels, scores = labelled(known, unknown)
        assert list(metrics) == ["tnr_at_95_tpr", "auroc", "dtacc", "auin", "auout"]
        assert metrics == pytest.approx(
            {
                "tnr_at_95_tpr": max(tnr for tpr, tnr in rates if tpr >= 0.95),
                "auroc": roc_auc_score(labels, scores),
                "dtacc": max((tpr + tnr) / 2 for tpr, tnr in rates),
                "auin": average_precision_score(labels, scores),
                "auout": average_precision_score(1 - labels, -scores),
            },
            abs=1e-12,
        )
        assert all(type(value) is float and 0 <= value <= 1 for value in metrics.values())

    @given(known=SCORES, unknown=SCORES)
    @settings(max_examples=100, deadline=None)
    def test_equals_scikit_learn_and_the_serving_threshold(self, known, unknown):
        metrics = detection_metrics(known, unknown)
        labels, scores = labelled(known, unknown)
        false_positives, true_positives, _ = roc_curve(labels, scores, drop_intermediate=False)
        assert metrics["dtacc"] == pytest.approx(((true_positives + 1 - false_positives) / 2).max(), abs=1e-12)
        assert metrics["auin"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert metrics["auout"] == pytest.approx(average_precision_score(1 - labels, -scores), abs=1e-12)
        threshold = calibrate_threshold(torch.tensor(known, dtype=torch.float64), 0.95)
        assert metrics["tnr_at_95_tpr"] == pytest.approx(np.mean(np.array(unknown) < threshold), abs=1e-12)

    def test_closed_forms(self):
        assert set(detection_metrics([2, 3], [0, 1, 1]).values()) == {1.0}
        # Nothing tells the groups apart: rates on the diagonal, precision the share of the positives.
        expected = {"tnr_at_95_tpr": 0.0, "auroc": 0.5, "dtacc": 0.5, "auin": 0.25, "auout": 0.75}
        assert detection_metrics([1.0], [1.0, 1.0, 1.0]) == expected
        reverse = detection_metrics([0, 1], [2, 3])
        assert (reverse["tnr_at_95_tpr"], reverse["auroc"], reverse["dtacc"]) == (0.0, 0.0, 0.5)

    def test_95_percent_exactly(self):
        # 19 of 20 known images are 95 %: the lowest may be rejected, and with it the unknown between it and the rest.
        assert detection_metrics(range(20), [0.5, 0.5, 7.5, 3])["tnr_at_95_tpr"] == 0.5
        assert detection_metrics(range(19), [0.5, 0.5, 7.5, 3])["tnr_at_95_tpr"] == 0.0


class TestCurves:
    @all_cases
    def test_equal_the_rates_at_every_threshold(self, known, unknown):
        correct = np.random.default_rng(3).random(len(known)) < 0.6
        curve, roc = oscr_curve(known, correct, unknown), measures.roc_curve(known, unknown)
        expected = [
            (share(unknown, t), sum(bool(c) and s >= t for s, c in zip(known, correct)) / len(known), share(known, t))
            for t in thresholds(known, unknown)
        ]
        np.testing.assert_allclose(np.stack([curve.x, curve.y, roc.y], axis=1), expected, atol=1e-12)
        assert np.trapezoid(curve.y, curve.x) == pytest.approx(oscr(known, correct, unknown), abs=1e-12)
        assert np.trapezoid(roc.y, roc.x) == pytest.approx(auroc(known, unknown), abs=1e-12)


class TestTopKAccuracy:
    @pytest.mark.parametrize("k", [1, 2, 5, 9])
    @pytest.mark.parametrize("tied", [False, True])
    def test_equals_sorting(self, k, tied):
        rng = np.random.default_rng(k)
        logits, labels = rng.normal(size=(101, 9)), rng.integers(0, 9, 101)
        if tied:
            logits = np.round(logits)
        expected = 0
        for row, label in zip(logits.tolist(), labels.tolist()):
            # A stable sort leaves equal logits in the order of their classes.
            expected += label in sorted(range(9), key=lambda c: -row[c])[:k]
        assert top_k_accuracy(logits, labels, k) == expected / 101
        if not tied and k < 9:
            assert top_k_accuracy(logits, labels, k) == pytest.approx(top_k_accuracy_score(labels, logits, k=k))

    def test_closed_forms(self):
        assert top_k_accuracy(np.zeros((6, 3)), [0, 0, 1, 1, 2, 2], 2) == 4 / 6
        assert top_k_accuracy([[1.0, 2.0]], [0], 1) == 0.0
        assert top_k_accuracy([[1.0, 2.0]], [0], 7) == 1.0

    def test_errors(self):
        for logits, labels, k in (
            ([], [], 1),
            ([[1.0, 2.0]], [0, 1], 1),
            ([[1.0, 2.0]], [0], 0),
            ([[math.nan]], [0], 1),
        ):
            with pytest.raises(ValueError, match="must be"):
                top_k_accuracy(np.array(logits), np.array(labels), k)


class TestBootstrap:
    def test_equals_drawing_in_a_loop(self):
        rng = np.random.default_rng(5)
        known, unknown = rng.normal(1, 1, 40), rng.normal(0, 1, 60)
        interval = bootstrap_interval(lambda i, j: auroc(known[i], unknown[j]), 40, 60, resamples=4000)
        draws = [auroc(rng.choice(known, 40), rng.choice(unknown, 60)) for _ in range(4000)]
        assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=0.01)
        assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=0.01)
        assert interval.deviation == pytest.approx(np.std(draws), rel=0.1)

    def test_an_accuracy_has_the_binomial_deviation(self):
        correct = np.arange(500) < 400
        interval = bootstrap_interval(lambda i: float(correct[i].mean()), 500, resamples=3000)
        assert interval.deviation == pytest.approx(math.sqrt(0.8 * 0.2 / 500), rel=0.1)
        assert interval.low < 0.8 < interval.high

    def test_the_seed_decides_and_more_confidence_is_wider(self):
        values = np.random.default_rng(0).random(50)
        first, again, other, wide = (
            bootstrap_interval(lambda i: float(values[i].mean()), 50, resamples=200, **options)
            for options in ({}, {}, {"seed": 1}, {"confidence": 0.999})
        )
        assert first == again != other
        assert wide.low < first.low and first.high < wide.high

    def test_degenerate_groups(self):
        assert bootstrap_interval(lambda i: 0.5 + i.sum(), 1) == (0.5, 0.5, 0.0)
        constant = bootstrap_interval(lambda i, j: auroc(np.ones(9)[i], np.ones(1)[j]), 9, 1, resamples=50)
        assert constant == (0.5, 0.5, 0.0)


def two_nn_loop(points: np.ndarray, discard: float) -> float:
    """Facco et al.'s recipe, point by point, with the least-squares slope through the origin written out."""
    ratios = []
    for i, point in enumerate(points):
        first, second, *_ = sorted(math.dist(point, other) for j, other in enumerate(points) if j != i)
        ratios.append(second / first)
    kept = sorted(ratios)[: int(len(ratios) * (1 - discard))]
    x = [math.log(ratio) for ratio in kept]
    y = [-math.log(1 - rank / len(ratios)) for rank in range(1, len(kept) + 1)]
    return math.fsum(a * b for a, b in zip(x, y)) / math.fsum(a * a for a in x)


class TestTwoNN:
    @pytest.mark.parametrize(("n", "dimension", "discard"), [(150, 3, 0.1), (97, 11, 0.1), (60, 2, 0.3), (4, 2, 0.1)])
    def test_equals_the_loop(self, n, dimension, discard):
        points = np.random.default_rng(n).normal(size=(n, dimension))
        found = two_nn(points, discard=discard)
        assert found.dimension == pytest.approx(two_nn_loop(points, discard), rel=1e-9)
        assert len(found.log_ratio) == len(found.log_survival) == int(n * (1 - discard))

    @pytest.mark.parametrize("dimension", [1, 2, 4, 8])
    def test_a_flat_manifold_in_many_dimensions(self, dimension):
        rng = np.random.default_rng(dimension)
        points = np.zeros((3000, 40))
        points[:, :dimension] = rng.random((3000, dimension))
        rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
        # Neighbours are nearer than the cube's faces only while dimensions are few, hence the looser side below.
        assert 0.85 * dimension < two_nn(points @ rotation).dimension < 1.1 * dimension

    def test_curved_manifolds(self):
        rng = np.random.default_rng(0)
        angle, height = rng.random(3000) * 9, rng.random(3000) * 9
        swiss_roll = np.stack([(angle + 2) * np.cos(angle), height, (angle + 2) * np.sin(angle)], axis=1)
        assert two_nn(swiss_roll).dimension == pytest.approx(2, rel=0.08)
        sphere = rng.normal(size=(3000, 6))
        sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
        assert two_nn(sphere).dimension == pytest.approx(5, rel=0.1)

    def test_scale_and_repeated_points_change_nothing(self):
        points = np.random.default_rng(1).random((200, 3))
        plain = two_nn(points).dimension
        assert two_nn(1e-4 * points + 5).dimension == pytest.approx(plain, rel=1e-6)
        assert two_nn(np.concatenate([points, points[:50], points[:50]])).dimension == pytest.approx(plain, rel=1e-9)

    def test_too_few_points(self):
        for points in ([[1.0, 2.0], [3.0, 4.0]], np.ones((9, 2)), [[math.nan, 0.0], [1.0, 0.0], [2.0, 0.0]]):
            with pytest.raises(ValueError, match="3 or more distinct rows"):
                two_nn(points)


class TestErrors:
    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ([], "must be a non-empty vector, got shape (0,)"),
            ([[0.5], [0.7]], "must be a non-empty vector, got shape (2, 1)"),
            (0.5, "must be a non-empty vector, got shape ()"),
            ([0.5, math.nan], "must be finite"),
            ([math.inf, 0.5], "must be finite"),
        ],
    )
    @pytest.mark.parametrize(
        "metric", [auroc, detection_metrics, lambda known, unknown: oscr(known, np.ones(2, dtype=bool), unknown)]
    )
    def test_scores(self, metric, values, problem):
        with pytest.raises(ValueError, match=f"^{re.escape(f'known_scores {problem}')}$"):
            metric(values, [0.1, 0.2])
        with pytest.raises(ValueError, match=f"^{re.escape(f'unknown_scores {problem}')}$"):
            metric([0.1, 0.2], values)

    @pytest.mark.parametrize(
        ("correct", "got"), [([0, 1], "int64 of (2,)"), ([True], "bool of (1,)"), ([[True, True]], "bool of (1, 2)")]
    )
    def test_known_correct(self, correct, got):
        message = f"known_correct must be bool of shape (2,), got {got}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            oscr([0.1, 0.2], correct, [0.3])
