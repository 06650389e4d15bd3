"""The paper's tables and figures as data: which models each of them trains, what measures them, what its table shows.

A *variant* is a way to train; `trainer.reproduce` trains it once for each protocol, split and seed. A *row* of a table
is what one measure finds of a variant: a cross-entropy classifier is one variant and several rows, one for each score.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from data_pipeline.errors import unknown_name
from trainer.config import MixingConfig, TrainConfig, recipe
from trainer.evaluators import (
    BootstrapConfig,
    ClosedSet,
    Evaluator,
    IntrinsicDimension,
    OpenSet,
    OutOfDistribution,
)

_NO_BARS = BootstrapConfig(resamples=0)
"""Splits and seeds give the spread."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """An evaluator and the logits that it is shown."""

    evaluator: Evaluator
    logits: Literal["gallery", "classifier"] = "gallery"
    """gallery: algorithm 1's scores of the embeddings, which every model has; classifier: those the network learnt."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train, and by what name what is measured of it."""

    name: str
    config: Callable[[str], TrainConfig]
    """Of a protocol."""
    measures: Mapping[str, Measure]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: the numbers that one measure finds of one variant."""

    label: str
    """As in `published.json`, where that has the row."""
    variant: str
    measure: str = "osr"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of every row; the figures of all but a dimension are shares, shown in percent."""

    number: str
    title: str
    percent: bool = True

    def text(self, value: float) -> str:
        return f"{100 * value if self.percent else value:.2f}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure of the paper, or one that it lacks."""

    title: str
    protocols: tuple[str, ...]
    """The paper's."""
    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...] = (0,)
    splits: tuple[int, ...] | None = None
    """None: all of each protocol."""
    notes: tuple[str, ...] = ()


@cache
def published(experiment: str) -> Mapping[str, Any]:
    """The published `rows` of an experiment, {row: {protocol: {number: value}}}, and `marks`, {row: remark}."""
    text = resources.files("trainer").joinpath("published.json").read_text("utf-8")
    return json.loads(text).get(experiment, {"rows": {}, "marks": {}})


_AUROC = Column(number="auroc", title="AUROC")
_ACCURACY = Column(number="closed_set_accuracy", title="accuracy")
_OPEN_SET = (_AUROC, Column(number="oscr", title="OSCR"), _ACCURACY)
_OSR = {"osr": Measure(evaluator=OpenSet(bootstrap=_NO_BARS))}
_SIX = ("mnist", "svhn", "cifar10", "cifar+10", "cifar+50", "tinyimagenet")
_TWO = ("cifar10", "tinyimagenet")


def _by(evaluator: Callable[..., Evaluator], *detectors: str) -> dict[str, Measure]:
    """A classifier's logits under several detectors, each under its own name."""
    return {
        name: Measure(evaluator=evaluator(detector=name, bootstrap=_NO_BARS), logits="classifier") for name in detectors
    }


def _method(method: str, measures: Mapping[str, Measure]) -> Variant:
    return Variant(name=method, config=lambda protocol: recipe(protocol, method), measures=measures)


def _gradmix_with(name: str, measures: Mapping[str, Measure] = _OSR, **changes: Any) -> Variant:
    """The paper's method with some fields of its mixing replaced. Where a protocol's recipe has no mixing it has."""

    def config(protocol: str) -> TrainConfig:
        base = recipe(protocol)
        mixing = base.mixing if base.mixing.kind != "none" else MixingConfig()
        return dataclasses.replace(base, mixing=dataclasses.replace(mixing, **changes))

    return Variant(name=name, config=config, measures=measures)


def _table1() -> Experiment:
    """Intrinsic dimension and AUROC of SupCon against SupCon + SimCLR."""
    measures = {**_OSR, "dimension": Measure(evaluator=IntrinsicDimension())}
    return Experiment(
        title="Table 1: feature diversity and open set recognition",
        protocols=_TWO,
        variants=(_method("supcon", measures), _method("supcon+simclr", measures)),
        rows=(Row(label="SupCon", variant="supcon"), Row(label="SupCon + SimCLR", variant="supcon+simclr")),
        columns=(
            Column(number="dimension/intrinsic_dimension", title="intrinsic dimension", percent=False),
            *_OPEN_SET,
        ),
        notes=("Intrinsic dimension: TwoNN on the embeddings of the known test images.",),
    )


def _table2() -> Experiment:
    """Open set recognition on six protocols, beside baselines trained in the same run on the same splits."""
    return Experiment(
        title="Table 2: open set recognition",
        protocols=_SIX,
        variants=(
            _method("gradmix", _OSR),
            _method("supcon+simclr", _OSR),
            _method("supcon", _OSR),
            _method("simclr", _OSR),
            _method("cross_entropy", {**_OSR, **_by(OpenSet, "max_softmax", "max_logit", "openmax")}),
            _method("arpl", {**_OSR, **_by(OpenSet, "max_logit")}),
        ),
        rows=(
            Row(label="cross entropy", variant="cross_entropy", measure="max_softmax"),
            Row(label="maximum logit (Vaze et al. 2022)", variant="cross_entropy", measure="max_logit"),
            Row(label="OpenMax", variant="cross_entropy", measure="openmax"),
            Row(label="cross entropy, algorithm 1", variant="cross_entropy"),
            Row(label="ARPL", variant="arpl", measure="max_logit"),
            Row(label="ARPL, algorithm 1", variant="arpl"),
            Row(label="SupCon", variant="supcon"),
            Row(label="SimCLR", variant="simclr"),
            Row(label="SupCon + SimCLR", variant="supcon+simclr"),
            Row(label="GradMix", variant="gradmix"),
        ),
        columns=_OPEN_SET,
        notes=(
            "Cross entropy is the tuned recipe of Vaze et al., stronger than the published row of that name.",
            '"Algorithm 1" scores a classifier\'s features by their nearest training images, as GradMix is scored.',
            "MNIST is trained without mixing, as in the paper: there GradMix is SupCon + SimCLR.",
        ),
    )


def _table3() -> Experiment:
    """Closed-set accuracy with all classes known."""
    accuracy = {"osr": Measure(evaluator=ClosedSet(bootstrap=_NO_BARS))}
    logits = {"osr": Measure(evaluator=ClosedSet(bootstrap=_NO_BARS), logits="classifier")}
    return Experiment(
        title="Table 3: closed-set accuracy",
        protocols=("cifar10-closed", "cifar100-closed", "tinyimagenet-closed"),
        variants=(
            _method("gradmix", accuracy),
            _method("supcon+simclr", accuracy),
            _method("cross_entropy", logits),
            _method("arpl", logits),
        ),
        rows=(
            Row(label="cross entropy", variant="cross_entropy"),
            Row(label="ARPL", variant="arpl"),
            Row(label="SupCon + SimCLR", variant="supcon+simclr"),
            Row(label="GradMix", variant="gradmix"),
        ),
        columns=(_ACCURACY,),
    )


def _table4() -> Experiment:
    """Out-of-distribution detection, CIFAR-10 against CIFAR-100 and SVHN."""
    ood = {"osr": Measure(evaluator=OutOfDistribution(bootstrap=_NO_BARS))}
    return Experiment(
        title="Table 4: out-of-distribution detection",
        protocols=("cifar10-ood-cifar100", "cifar10-ood-svhn"),
        variants=(
            _method("gradmix", ood),
            _method("supcon+simclr", ood),
            _method("cross_entropy", _by(OutOfDistribution, "max_softmax", "max_logit")),
            _method("arpl", _by(OutOfDistribution, "max_logit")),
        ),
        rows=(
            Row(label="cross entropy", variant="cross_entropy", measure="max_softmax"),
            Row(label="cross entropy, maximum logit", variant="cross_entropy", measure="max_logit"),
            Row(label="ARPL", variant="arpl", measure="max_logit"),
            Row(label="SupCon + SimCLR", variant="supcon+simclr"),
            Row(label="GradMix", variant="gradmix"),
        ),
        columns=(
            Column(number="tnr_at_95_tpr", title="TNR"),
            _AUROC,
            Column(number="dtacc", title="DTACC"),
            Column(number="auin", title="AUIN"),
            Column(number="auout", title="AUOUT"),
        ),
    )


def _figure2() -> Experiment:
    """Ways of mixing, with the controls that the paper lacks: a random and the least activated place."""
    variants = {
        "no mixing": Variant(name="none", config=lambda protocol: recipe(protocol, "supcon+simclr"), measures=_OSR),
        **{f"Mixup, α = {a:g}": _gradmix_with(f"mixup-{a:g}", kind="mixup", alpha=a) for a in (0.2, 1.0, 2.0)},
        **{f"CutMix, α = {a:g}": _gradmix_with(f"cutmix-{a:g}", kind="cutmix", alpha=a) for a in (0.2, 1.0, 2.0)},
        "GradMix, Grad-CAM": _gradmix_with("gradcam", attribution="gradcam"),
        "GradMix, LayerCAM": _gradmix_with("layercam"),
        "GradMix, random place": _gradmix_with("random", place="random"),
        "GradMix, least activated place": _gradmix_with("least", place="least"),
    }
    return Experiment(
        title="Figure 2: ways of mixing",
        protocols=_TWO,
        variants=tuple(variants.values()),
        rows=tuple(Row(label=label, variant=variant.name) for label, variant in variants.items()),
        columns=_OPEN_SET,
        notes=(
            "The paper shows bars without figures; it says GradMix is about 3 points of AUROC above no mixing.",
            "A random and the least activated place are controls that the paper does not have.",
        ),
    )


def _figure3() -> Experiment:
    """The layers whose maps say where the patch goes."""
    choices = (
        ("conv3_2",), ("conv4_2",), ("conv5_2",),
        ("conv3_2", "conv4_2"), ("conv4_2", "conv5_2"), ("conv3_2", "conv4_2", "conv5_2"),
    )  # fmt: skip
    variants = {" + ".join(layers): _gradmix_with("+".join(layers), layers=layers) for layers in choices}
    return Experiment(
        title="Figure 3: layers of the activation map",
        protocols=_TWO,
        variants=tuple(variants.values()),
        rows=tuple(Row(label=label, variant=variant.name) for label, variant in variants.items()),
        columns=_OPEN_SET,
        notes=("The paper shows bars without figures, and finds no significant difference.",),
    )


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "figure2": _figure2,
    "figure3": _figure3,
}


def experiment(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]()
