"""Metrics of open set recognition and of out-of-distribution detection.

Scores follow one convention: larger means more known. "Known" images belong to the classes trained on, that is, are
in-distribution; "unknown" ones are not. Every metric is a float in [0, 1], larger being better.
"""

from __future__ import annotations

from collections.abc import Sequence

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
