"""A whole configuration for each protocol and method.

A protocol's recipe is a function of nothing; a variant of it is `dataclasses.replace`, and so is a method: what it
makes of a protocol's recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from data_pipeline.errors import unknown_name
from data_pipeline.views import ViewConfig
from trainer.config import (
    ARPLConfig,
    CrossEntropyConfig,
    EncoderConfig,
    MixingConfig,
    MoCoConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

# Views that keep a digit the digit it is: no flip, no colour.
_UPRIGHT = ViewConfig(
    scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, rotation=5.0, jitter=0.0, grayscale=0.0,
    brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
)  # fmt: skip


def _digits() -> TrainConfig:
    """scikit-learn's digits at 16 pixels with a quarter-width network: about a minute on 2 CPU cores.

    python -m trainer.train --protocol digits --split 0
    """
    return TrainConfig(
        protocol="digits",
        epochs=30,
        batch_size=115,
        encoder=EncoderConfig(width=16, hidden_dim=128, embedding_dim=64),
        views=dataclasses.replace(_UPRIGHT, scale=(0.6, 1.0), rotation=10.0, jitter=0.8, brightness=0.4, contrast=0.4),
        ks=(1, 5, 10, 50),
    )


def _mnist() -> TrainConfig:
    """The paper's MNIST setting: rotation by up to 5°, no mixing, θ = 1, λ = 3, 10 epochs; published AUROC 99.8.

    python -m trainer.train --protocol mnist --split 0
    """
    return TrainConfig(
        protocol="mnist",
        epochs=10,
        objective=ObjectiveConfig(theta=1.0, lam=3.0),
        mixing=MixingConfig(kind="none"),
        views=_UPRIGHT,
        ks=(1, 5, 10, 50, 200),
    )


def _svhn() -> TrainConfig:
    """The paper's SVHN setting, 300 epochs; published AUROC 94.7. Digits are not flipped.

    deepspeed --module trainer.train --protocol svhn --split 0
    """
    return TrainConfig(protocol="svhn", epochs=300, views=ViewConfig(flip=0.0), ks=(1, 5, 10, 50, 200))


def _cifar() -> TrainConfig:
    """The paper's CIFAR-10 setting, θ = 1, λ = 1.2, 600 epochs; published AUROC 91.33 (CIFAR+10 98.62, CIFAR+50 97.64).

    The published long schedule is --phases 600:0:1 10:1:1.2.

    deepspeed --module trainer.train --protocol cifar10 --split 0
    """
    return TrainConfig(protocol="cifar10", epochs=600, ks=(1, 5, 10, 50, 200))


def _tinyimagenet() -> TrainConfig:
    """The paper's TinyImageNet setting at 64 pixels, 600 epochs; published AUROC 81.92.

    deepspeed --module trainer.train --protocol tinyimagenet --split 0
    """
    return TrainConfig(protocol="tinyimagenet", epochs=600, ks=(1, 5, 10, 50, 200))


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits": _digits,
    "mnist": _mnist,
    "svhn": _svhn,
    "cifar10": _cifar,
    "cifar+10": _cifar,
    "cifar+50": _cifar,
    "cifar10-closed": _cifar,
    "cifar100-closed": _cifar,
    "cifar10-ood-cifar100": _cifar,
    "cifar10-ood-svhn": _cifar,
    "tinyimagenet": _tinyimagenet,
    "tinyimagenet-closed": _tinyimagenet,
    "tinyimagenet-all": _tinyimagenet,
    "custom": _tinyimagenet,
}


def _gradmix(base: TrainConfig) -> TrainConfig:
    """The paper's method: eq. 8 with the protocol's mixing."""
    return base


def _supcon_simclr(base: TrainConfig) -> TrainConfig:
    """Eq. 3, without a mixed view; published (table 1): CIFAR-10 88.75, TinyImageNet 77.48."""
    return dataclasses.replace(base, mixing=MixingConfig(kind="none"))


def _supcon(base: TrainConfig) -> TrainConfig:
    """Eq. 2 alone; published (table 1): CIFAR-10 67.15, TinyImageNet 72.97."""
    objective = dataclasses.replace(base.objective, theta=1.0, lam=0.0)
    return dataclasses.replace(_supcon_simclr(base), objective=objective)


def _simclr(base: TrainConfig) -> TrainConfig:
    """Eq. 1 alone: no label is used."""
    objective = dataclasses.replace(base.objective, theta=0.0, lam=1.0)
    return dataclasses.replace(_supcon_simclr(base), objective=objective)


def _moco(base: TrainConfig) -> TrainConfig:
    """MoCo with the paper's queue of 8,196 and momentum of 0.999, without mixing; --mixing.kind gradmix adds it."""
    return dataclasses.replace(_supcon_simclr(base), objective=MoCoConfig())


def _cross_entropy(base: TrainConfig) -> TrainConfig:
    """The tuned closed-set classifier of Vaze et al. 2022 ("a good closed-set classifier is all you need").

    600 epochs (digits, which they do not have: as many as the recipe's), batch 128, SGD with a cosine from 0.1 to 0,
    warm-up, weight decay 1e-4; TinyImageNet at 0.01 with label smoothing 0.9. In place of their RandAugment it sees the
    protocol's own two views of each image, as the other methods do, one cosine replaces their two restarts, and the
    network is the encoder's in place of their VGG32. Their maximum logit score reaches 83.0 AUROC on TinyImageNet.
    """
    tiny = base.protocol.startswith("tinyimagenet")
    return dataclasses.replace(
        base,
        objective=CrossEntropyConfig(label_smoothing=0.9 if tiny else 0.0),
        **_classifiers_schedule(base, 0.01 if tiny else 0.1),
    )


def _arpl(base: TrainConfig) -> TrainConfig:
    """ARPL as Vaze et al. 2022 tuned it: `_cross_entropy`'s schedule, TinyImageNet at 0.001 with label smoothing 0.9.

    Published (table 2, by the authors of ARPL): CIFAR-10 90.1, TinyImageNet 76.2.
    """
    tiny = base.protocol.startswith("tinyimagenet")
    return dataclasses.replace(
        base,
        objective=ARPLConfig(label_smoothing=0.9 if tiny else 0.0),
        **_classifiers_schedule(base, 0.001 if tiny else 0.1),
    )


def _classifiers_schedule(base: TrainConfig, learning_rate: float) -> dict[str, Any]:
    """Mixing, length, batch size and optimizer of the two classifiers."""
    epochs = base.epochs if base.protocol.startswith("digits") else 600
    return {
        "epochs": epochs,
        "mixing": MixingConfig(kind="none"),
        "batch_size": min(base.batch_size, 128),
        "optimizer": OptimizerConfig(
            name="sgd",
            learning_rate=learning_rate,
            final_share=0.0,
            warmup_epochs=epochs / 30,
            weight_decay=1e-4,
        ),
    }


METHODS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "gradmix": _gradmix,
    "supcon+simclr": _supcon_simclr,
    "supcon": _supcon,
    "simclr": _simclr,
    "moco": _moco,
    "cross_entropy": _cross_entropy,
    "arpl": _arpl,
}


def recipe(protocol: str, method: str = "gradmix") -> TrainConfig:
    """The defaults of a method on a protocol.

    A pseudo-open protocol ("cifar10-pseudo0") has the defaults of the one it came from.
    """
    base = protocol.rsplit("-pseudo", 1)[0]
    if base not in RECIPES:
        raise unknown_name("protocol", protocol, RECIPES)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    return dataclasses.replace(METHODS[method](dataclasses.replace(RECIPES[base](), protocol=protocol)), method=method)
