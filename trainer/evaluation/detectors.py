"""Detectors of unknown images over features and logits; they are pytorch-ood's.

That library's scores are outlier scores, larger meaning less known. They are negated here, in `fit_detector`, and
nowhere else: everything that leaves this module follows the project's convention, larger means more known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import InputError, unknown_name
from trainer.evaluation.checks import check_labels

if TYPE_CHECKING:
    from pytorch_ood.api import Detector

DetectorName = Literal["max_softmax", "max_logit", "energy", "openmax", "knn", "vim", "mahalanobis"]

WITHOUT_FITTING: tuple[DetectorName, ...] = ("max_softmax", "max_logit", "energy")
"""Detectors that need no training images."""

NEIGHBOURS = 50
"""k of the k-NN detector, its authors' choice for CIFAR-10; fewer where there are fewer training images."""


class Outputs(NamedTuple):
    """What a model makes of M images.

    Attributes:
        features: (M, D) float32.
        logits: (M, C) float32, one for each known class, the larger the likelier; None from a model that knows features
            only.
    """

    features: Tensor
    logits: Tensor | None

    def need_logits(self) -> Tensor:
        """The logits; raises `InputError` if there are none."""
        if self.logits is None:
            raise InputError("this model has features but no logits: give it classes with FeatureModel.with_gallery")
        return self.logits


def fit_detector(name: DetectorName, train: tuple[Outputs, np.ndarray] | None) -> Callable[[Outputs], np.ndarray]:
    """A function from the outputs of M images to their scores (M,) float64; a larger score means more known.

        max_softmax  largest softmax probability (Hendrycks & Gimpel 2017)
        max_logit    largest logit (Vaze et al. 2022); of a model of this project, algorithm 1's score over k·τ
        energy       log-sum-exp of the logits (Liu et al. 2020)
        openmax      -probability of the unknown class (Bendale & Boult 2016), with the library's tail of 25 and α of
                     10, or fewer where a class has fewer images or there are fewer classes; fitted, as its authors do,
                     to training images that are classified right, but to all of a class with fewer such images than
                     the tail
        knn          -distance to the 50th nearest training image, features scaled to length 1 (Sun et al. 2022)
        vim          virtual-logit matching (Wang et al. 2022); its last layer is the affine map from features to logits
                     that fits the training images best, which is the network's own where it has one; its principal
                     space has as many dimensions as there are classes, at most half of the features'
        mahalanobis  -squared distance to the nearest class mean in the metric of the covariance that all classes share
                     (Lee et al. 2018)

    Args:
        train: outputs of the training images, and their labels (N,) from 0; those of `WITHOUT_FITTING` need none.

    Raises:
        InputError: the name is unknown, a detector that needs training images got none, one that needs logits meets
            outputs without, openmax a label that is none of the logits', or, from the function, a score is not finite.
    """
    if name not in get_args(DetectorName):
        raise unknown_name("detector", name, get_args(DetectorName))
    if name not in WITHOUT_FITTING and train is None:
        raise InputError(f"detector {name} needs training images: give data that has them")
    outlier_scores = _outlier_scores(name, train)

    def score(outputs: Outputs) -> np.ndarray:
        with torch.no_grad():
            scores = -outlier_scores(outputs).double().cpu().numpy()
        if not np.isfinite(scores).all():
            raise InputError(f"detector {name} has scores that are not finite for this model: leave it out")
        return scores

    return score


def _outlier_scores(name: DetectorName, train: tuple[Outputs, np.ndarray] | None) -> Callable[[Outputs], Tensor]:
    """The library's score, in which larger means less known."""
    from pytorch_ood import detector as library

    if train is None or name in WITHOUT_FITTING:
        on_logits = {"max_softmax": library.MaxSoftmax, "max_logit": library.MaxLogit, "energy": library.EnergyBased}
        # In 32 bits the largest probability of most sure answers is 1, and they could not be told apart.
        return _of_logits(on_logits[name](None), torch.float64)
    outputs, labels = train[0], torch.from_numpy(np.asarray(train[1], dtype=np.int64))
    if name == "openmax":
        logits = outputs.need_logits()
        check_labels(labels, logits.shape[1], "train images", "the model")
        tail = min(25, int(torch.bincount(labels).min()))
        chosen = _fitted_by_openmax(logits, labels, tail)
        fitted = library.OpenMax(None, tailsize=tail).fit_logits(logits[chosen], labels[chosen])
        return _with_every_class(_of_logits(fitted))
    if name == "knn":
        fitted = library.KNN(None, k=min(NEIGHBOURS, len(labels)))
    elif name == "vim":
        weight, bias = _affine_map(outputs.features, outputs.need_logits())
        dimensions = min(len(weight), outputs.features.shape[1] // 2)
        fitted = library.ViM(None, d=dimensions, w=weight, b=bias)
    else:
        fitted = library.Mahalanobis(None)
    fitted.fit_features(outputs.features, labels)
    return lambda images: fitted.predict_features(images.features)


def _of_logits(detector: Detector, dtype: torch.dtype = torch.float32) -> Callable[[Outputs], Tensor]:
    return lambda images: detector.predict_logits(images.need_logits().to(dtype))


def _fitted_by_openmax(logits: Tensor, labels: Tensor, tail: int) -> Tensor:
    """(N,) bool: the images whose largest logit is their class's; of a class with fewer than `tail` of these, all."""
    right = logits.argmax(dim=1) == labels
    few = torch.bincount(labels[right], minlength=logits.shape[1]) < tail
    return right | few[labels]


def _with_every_class(score: Callable[[Outputs], Tensor]) -> Callable[[Outputs], Tensor]:
    """Puts a row for each class before the logits. The library's OpenMax measures the distance only to classes that are
    the largest of some row it is given, and takes the others to be at distance 0."""

    def of_images(images: Outputs) -> Tensor:
        logits = images.need_logits()
        every = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        return score(Outputs(images.features, torch.cat([every, logits])))[len(every) :]

    return of_images


def _affine_map(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """W (C, D) and b (C,) with the least squares of W f + b - logits over the rows."""
    columns = torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()
    # gelsd finds the smallest solution where a feature is constant or repeats others.
    solution = torch.linalg.lstsq(columns, logits.double(), driver="gelsd").solution.T.float()
    return solution[:, :-1].contiguous(), solution[:, -1].contiguous()
