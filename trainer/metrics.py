"""Metrics of open set recognition and of out-of-distribution detection, their error bars, and the intrinsic dimension.

Scores follow one convention: larger means more known. "Known" images belong to the classes trained on, that is, are
in-distribution; "unknown" ones are not. Every metric is a float in [0, 1], larger being better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auroc(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Area under the receiver operating characteristic, as the Mann-Whitney statistic: P(s_known > s_unknown) + ½ P(=).

    Args:
        known_scores: (n,) finite scores, n ≥ 1.
        unknown_scores: (m,) finite scores, m ≥ 1.

    Raises:
        ValueError: if an input is empty, not a vector or not finite.
    """
    known = _scores("known_scores", known_scores)
    unknown = _scores("unknown_scores", unknown_scores)
    return _wins(known, unknown) / (len(known) * len(unknown))


def oscr(known_scores: ArrayLike, known_correct: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Area under the open set classification rate curve (Dhamija et al. 2018, "Reducing Network Agnostophobia").

    The curve is CCR(t) against FPR(t) over all thresholds t, joined by straight lines:

        CCR(t) = #{known, classified correctly, s ≥ t} / n        FPR(t) = #{unknown, s ≥ t} / m

    Its area counts the pairs of a correctly classified known and an unknown image in which the known one scores higher,
    ties as half, so it is AUROC when every known image is classified correctly and at most the closed set accuracy.

    Args:
        known_scores: (n,) finite scores, n ≥ 1.
        known_correct: (n,) bool, whether the closed set prediction is right.
        unknown_scores: (m,) finite scores, m ≥ 1.

    Raises:
        ValueError: if an input is empty, not finite or of the wrong shape, or `known_correct` is not bool.
    """
    known = _scores("known_scores", known_scores)
    unknown = _scores("unknown_scores", unknown_scores)
    correct = np.asarray(known_correct)
    if correct.dtype != bool or correct.shape != known.shape:
        raise ValueError(f"known_correct must be bool of shape {known.shape}, got {correct.dtype} of {correct.shape}")
    return _wins(known[correct], unknown) / (len(known) * len(unknown))


def closed_set_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of `predictions` (n,) equal to `labels` (n,).

    Raises:
        ValueError: if they are empty or differ in shape.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or len(predictions) == 0:
        raise ValueError(
            f"predictions and labels must be vectors of one length ≥ 1, got {predictions.shape} and {labels.shape}"
        )
    return float(np.mean(predictions == labels))


def open_set_metrics(
    known_scores: ArrayLike,
    known_predictions: ArrayLike,
    known_labels: ArrayLike,
    unknown_scores: ArrayLike,
    ks: Sequence[int],
) -> dict[str, dict[int, float]]:
    """AUROC, OSCR and closed set accuracy for every k.

    Args:
        known_scores: (n, K) finite scores of the known test images, column j for ks[j].
        known_predictions: (n, K) predicted classes.
        known_labels: (n,) true classes.
        unknown_scores: (m, K) finite scores of the unknown test images.
        ks: the K numbers of neighbours.

    Returns:
        {"auroc": {k: value}, "oscr": {k: value}, "closed_set_accuracy": {k: value}}.

    Raises:
        ValueError: if an input is empty, not finite or of the wrong shape.
    """
    known, unknown = np.asarray(known_scores), np.asarray(unknown_scores)
    predictions, labels = np.asarray(known_predictions), np.asarray(known_labels)
    expected = (*labels.shape, len(ks))
    if known.shape != expected or predictions.shape != expected:
        raise ValueError(
            f"known_scores and known_predictions must be {expected}, got {known.shape} and {predictions.shape}"
        )
    if unknown.ndim != 2 or unknown.shape[1] != len(ks):
        raise ValueError(f"unknown_scores must be (m, {len(ks)}), got {unknown.shape}")
    correct = predictions == labels[:, None]
    columns = [(int(k), j) for j, k in enumerate(ks)]
    return {
        "auroc": {k: auroc(known[:, j], unknown[:, j]) for k, j in columns},
        "oscr": {k: oscr(known[:, j], correct[:, j], unknown[:, j]) for k, j in columns},
        "closed_set_accuracy": {k: closed_set_accuracy(predictions[:, j], labels) for k, j in columns},
    }


def detection_metrics(known_scores: ArrayLike, unknown_scores: ArrayLike) -> dict[str, float]:
    """The five out-of-distribution detection metrics of the GradMix paper's table 4, in their usual definitions.

    With TPR(t) = #{known, s ≥ t} / n and TNR(t) = #{unknown, s < t} / m:

        tnr_at_95_tpr  the largest TNR(t) with TPR(t) ≥ 0.95
        auroc          see `auroc`
        dtacc          max over t of (TPR(t) + TNR(t)) / 2, at least 0.5
        auin           average precision, Σ (recall_i - recall_{i-1}) precision_i, with the known as positives
        auout          the same with the unknown as positives and the scores negated

    (The paper's text divides TN by TP + TN and TP by FP + FN; the rates above are the field's.)

    Args:
        known_scores: (n,) finite scores, n ≥ 1.
        unknown_scores: (m,) finite scores, m ≥ 1.

    Raises:
        ValueError: if an input is empty, not a vector or not finite.
    """
    known = _scores("known_scores", known_scores)
    unknown = _scores("unknown_scores", unknown_scores)
    accepted_known, accepted_unknown = _accepted(known, unknown)
    tpr = accepted_known / len(known)
    tnr = (len(unknown) - accepted_unknown) / len(unknown)
    return {
        "tnr_at_95_tpr": float(tnr[tpr >= 0.95].max()),
        "auroc": auroc(known, unknown),
        "dtacc": float((tpr + tnr).max() / 2),
        "auin": _average_precision(known, unknown),
        "auout": _average_precision(-unknown, -known),
    }


def top_k_accuracy(logits: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Share of images whose label is among the k classes of the largest logits; of equal logits the lower class counts.

    Args:
        logits: (n, C) finite, n ≥ 1.
        labels: (n,) integers 0..C-1.
        k: 1 or more; from C on the accuracy is 1.

    Raises:
        ValueError: if an input is empty, not finite or of the wrong shape, or `k` is below 1.
    """
    values, classes = np.asarray(logits), np.asarray(labels)
    if values.ndim != 2 or len(values) == 0 or classes.shape != values.shape[:1]:
        raise ValueError(f"logits must be (n, C) and labels (n,), n ≥ 1, got {values.shape} and {classes.shape}")
    if k < 1 or not np.isfinite(values).all():
        raise ValueError(f"k must be 1 or more and logits finite, got k = {k}")
    own = np.take_along_axis(values, classes[:, None], axis=1)
    before = np.arange(values.shape[1]) < classes[:, None]
    rank = (values > own).sum(axis=1) + ((values == own) & before).sum(axis=1)
    return float(np.mean(rank < k))


class Curve(NamedTuple):
    """A curve over all thresholds, from the one that accepts nothing to the one that accepts all; (t,) each."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def roc_curve(known_scores: ArrayLike, unknown_scores: ArrayLike) -> Curve:
    """TPR(t), the share of known images with s ≥ t, over FPR(t), that of unknown ones; the area is `auroc`."""
    known = _scores("known_scores", known_scores)
    return oscr_curve(known, np.ones(len(known), dtype=bool), unknown_scores)


def oscr_curve(known_scores: ArrayLike, known_correct: ArrayLike, unknown_scores: ArrayLike) -> Curve:
    """CCR(t) over FPR(t), see `oscr`, which is the area under it."""
    known = _scores("known_scores", known_scores)
    unknown = _scores("unknown_scores", unknown_scores)
    correct = np.asarray(known_correct, dtype=bool)
    _, accepted_unknown, accepted_correct = _accepted(known, unknown, known[correct])
    return Curve(np.r_[0, accepted_unknown] / len(unknown), np.r_[0, accepted_correct] / len(known))


class Interval(NamedTuple):
    """A confidence interval of a metric, and the standard deviation of the metric over the resamples."""

    low: float
    high: float
    deviation: float


def bootstrap_interval(
    metric: Callable[..., float],
    *sizes: int,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over test images (Efron 1979): each group is drawn anew with replacement, by itself.

    The interval is that of other test images from the same source; that of other training runs is wider.

    Args:
        metric: from one vector of places for each group, within 0 to size - 1, to a number:
            `bootstrap_interval(lambda i, j: auroc(known[i], unknown[j]), len(known), len(unknown))`.
        sizes: images in each group, 1 or more.
        resamples: how often to draw, 2 or more.
        confidence: share of the resampled metrics that the interval holds, in (0, 1).
    """
    from scipy.stats import bootstrap

    if max(sizes) == 1:
        # There is nothing else to draw.
        value = metric(*(np.zeros(1, dtype=np.int64) for _ in sizes))
        return Interval(value, value, 0.0)
    # SciPy wants two observations of each group; one of its own size has only itself to draw.
    result = bootstrap(
        tuple(np.arange(size) if size > 1 else np.zeros(2, dtype=np.int64) for size in sizes),
        metric,
        n_resamples=resamples,
        batch=16,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(float(interval.low), float(interval.high), float(result.standard_error))


class IntrinsicDimension(NamedTuple):
    """What `two_nn` finds, and the points its line was fitted to, (p,) each: log μ, and −log(1 − F(μ))."""

    dimension: float
    log_ratio: NDArray[np.float64]
    log_survival: NDArray[np.float64]


def two_nn(points: ArrayLike, *, discard: float = 0.1) -> IntrinsicDimension:
    """Intrinsic dimension by the two nearest neighbours (TwoNN; Facco et al. 2017, Scientific Reports 7:12140).

    The ratio μ = r₂ / r₁ of a point's distances to its second and first neighbour is Pareto distributed with exponent d
    wherever the density is constant up to the second neighbour: F(μ) = 1 − μ⁻ᵈ. So d is the slope through the origin of
    −log(1 − F) over log μ, F being the empirical distribution, without the share `discard` of the largest ratios.

    Equal points count once. The fit is scikit-dimension's.

    Args:
        points: (n, D) finite, at least 3 distinct rows.

    Raises:
        ValueError: if there are fewer, or one is not finite.
    """
    from skdim.id import TwoNN
    from sklearn.neighbors import NearestNeighbors

    distinct = np.unique(np.asarray(points, dtype=np.float64), axis=0)
    if distinct.ndim != 2 or len(distinct) < 3 or not np.isfinite(distinct).all():
        raise ValueError(f"points must be finite, with 3 or more distinct rows, got {distinct.shape}")
    neighbours = NearestNeighbors(n_neighbors=2).fit(distinct).kneighbors(return_distance=False)
    # Again from the differences: the search expands the square, which leaves few digits of a small distance.
    distances = np.linalg.norm(distinct[neighbours] - distinct[:, None], axis=2)
    distances.sort(axis=1)
    fit = TwoNN(discard_fraction=discard, dist=True).fit(distances)
    return IntrinsicDimension(float(fit.dimension_), fit.x_.ravel(), fit.y_.ravel())


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} must be finite")
    return scores


def _wins(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> float:
    """Pairs in which the known score is the larger, ties counted half."""
    ascending = np.sort(unknown)
    twice = np.searchsorted(ascending, known, "left").sum() + np.searchsorted(ascending, known, "right").sum()
    return int(twice) / 2


def _accepted(*groups: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """How many of each group score at least t, for every distinct score t from the largest down."""
    thresholds = np.unique(np.concatenate(groups))[::-1]
    return [len(scores) - np.searchsorted(np.sort(scores), thresholds) for scores in groups]


def _average_precision(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    true, false = _accepted(positives, negatives)
    gained = np.diff(true, prepend=0) / len(positives)
    return float(np.sum(gained * true / (true + false)))
