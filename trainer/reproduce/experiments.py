"""The paper's tables and figures as data: which models each of them trains, what measures them, what its table shows.

A *variant* is a way to train; `trainer.reproduce` trains it once for each protocol, split and seed. A *row* of a table
is what one measure finds of a variant: a cross-entropy classifier is one variant and several rows, one for each score.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any, Literal

from data_pipeline.errors import unknown_name
from trainer.config import Architecture, MixingConfig, TrainConfig
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.evaluators import (
    BootstrapConfig,
    ClosedSet,
    Evaluator,
    Features,
    IntrinsicDimension,
    OpenSet,
    OutOfDistribution,
)
from trainer.evaluation.linear_probe import LinearProbe
from trainer.evaluation.robustness import AdversarialAttacks, CommonCorruptions
from trainer.recipes import recipe

_NO_BARS = BootstrapConfig(resamples=0)
"""Splits and seeds give the spread."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """An evaluator, and which logits and features of the model it is shown."""

    evaluator: Evaluator
    logits: Literal["own", "gallery"] = "own"
    """own: a classifier's are those it learnt, any other model's algorithm 1's scores of its embeddings; gallery:
    algorithm 1's scores for a classifier, too."""
    features: Features | None = None
    """Default: the embedding, but for a classifier, which has none, the backbone's."""
    course: int = 0
    """Measure also the encoder's state after so many equal stretches of training; 0: only what comes out."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train, and by what name what is measured of it."""

    name: str
    config: Callable[[str], TrainConfig]
    """Of a protocol."""
    measures: Mapping[str, Measure]

    @property
    def needs_unknown(self) -> bool:
        """Whether one of its measures is of test images of unknown classes."""
        return any(isinstance(each.evaluator, OpenSet | OutOfDistribution) for each in self.measures.values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: the numbers that one measure finds of one variant."""

    label: str
    """As in `published.json`, where that has the row."""
    variant: str
    measure: str = "osr"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of every row."""

    number: str
    """The evaluator's name for it."""
    title: str
    measure: str | None = None
    """Whose number it is. Default: the row's."""
    percent: bool = True
    """Whether it is a share, shown in percent."""

    def of(self, row: Row) -> str:
        """The number's name among all that is measured of the row's variant."""
        return f"{self.measure or row.measure}/{self.number}"


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
    notes: tuple[str, ...] = ()


@cache
def published(experiment: str) -> Mapping[str, Any]:
    """The published `rows` of an experiment, {row: {protocol: {number: value}}}, and `marks`, {row: remark}."""
    text = resources.files("trainer.reproduce").joinpath("published.json").read_text("utf-8")
    return json.loads(text).get(experiment, {"rows": {}, "marks": {}})


_AUROC = Column(number="auroc", title="AUROC")
_ACCURACY = Column(number="closed_set_accuracy", title="accuracy")
_OPEN_SET = (_AUROC, Column(number="oscr", title="OSCR"), _ACCURACY)
_OSR = {"osr": Measure(evaluator=OpenSet(bootstrap=_NO_BARS), logits="gallery")}
_SIX = ("mnist", "svhn", "cifar10", "cifar+10", "cifar+50", "tinyimagenet")
_TWO = ("cifar10", "tinyimagenet")
_OF_CLASSIFIERS = ("max_softmax", "max_logit", "openmax", "energy", "knn", "vim", "mahalanobis")


def _by(evaluator: Callable[..., Evaluator], *detectors: str) -> dict[str, Measure]:
    """Several detectors, each under its own name."""
    return {name: Measure(evaluator=evaluator(detector=name, bootstrap=_NO_BARS)) for name in detectors}


def _method(method: str, measures: Mapping[str, Measure]) -> Variant:
    return Variant(name=method, config=lambda protocol: recipe(protocol, method), measures=measures)


_CIFAR_PHASES = ("600:0:1", "10:1:1.2")
"""The published CIFAR runs: self-supervised with GradMix for long, then jointly."""


def _as_published(config: TrainConfig) -> TrainConfig:
    """In the published phases where the protocol has some. They are the method's, not the mixing's: what is compared
    with GradMix has them too, so that a table's rows differ in the mixing alone."""
    return dataclasses.replace(config, phases=_CIFAR_PHASES) if config.protocol.startswith("cifar") else config


def _gradmix(measures: Mapping[str, Measure]) -> Variant:
    return Variant(name="gradmix", config=lambda protocol: _as_published(recipe(protocol)), measures=measures)


def _without_mixing(measures: Mapping[str, Measure], name: str = "supcon+simclr") -> Variant:
    """GradMix without its third view."""
    return Variant(
        name=name, config=lambda protocol: _as_published(recipe(protocol, "supcon+simclr")), measures=measures
    )


REMARKS: tuple[tuple[Callable[[TrainConfig], bool], str], ...] = (
    (
        lambda config: config.phases != (),
        "The published CIFAR runs are 600 epochs of θ = 0, λ = 1 with GradMix, then 10 of θ = 1, λ = 1.2. GradMix and "
        "its counterparts without or with other mixing are trained in these phases, within the budget, on all CIFAR "
        "protocols; it is not known whether the published closed-set and out-of-distribution runs were.",
    ),
    (
        lambda config: (
            config.protocol in ("tinyimagenet", "tinyimagenet-closed") and config.objective.classifier is None
        ),
        "For TinyImageNet the paper names no phases, 600 epochs (800 for some runs, without saying which) and no "
        "weights: θ and λ are those of CIFAR-10.",
    ),
    (
        lambda config: config.protocol == "svhn" and config.objective.classifier is None,
        "For SVHN the paper names 300 epochs and neither phases nor weights: θ and λ are those of CIFAR-10.",
    ),
    (
        lambda config: config.protocol == "mnist" and config.method == "gradmix" and config.mixing.kind == "none",
        "MNIST is trained without mixing, as in the paper: there GradMix is SupCon + SimCLR.",
    ),
    (
        lambda config: config.method == "cross_entropy" and config.protocol != "digits",
        "Cross entropy is the tuned recipe of Vaze et al., stronger than the published row of that name.",
    ),
    (
        lambda config: config.objective.classifier is not None and config.protocol != "digits",
        "Cross entropy and ARPL have, within the budget, the schedule of Vaze et al. (2022), but one cosine without "
        "their two restarts, two of the protocol's own views of each image in place of RandAugment, and ResNet-18 in "
        "place of their VGG32.",
    ),
)
"""Of whose training what is said: where it departs from what is published, or the paper leaves it open."""


def _with_mixing(protocol: str) -> TrainConfig:
    """The paper's method. Where a protocol's recipe has no mixing it has."""
    base = _as_published(recipe(protocol))
    return base if base.mixing.kind != "none" else dataclasses.replace(base, mixing=MixingConfig())


def _gradmix_with(name: str, measures: Mapping[str, Measure] = _OSR, **changes: Any) -> Variant:
    """The paper's method with some fields of its mixing replaced."""

    def config(protocol: str) -> TrainConfig:
        base = _with_mixing(protocol)
        return dataclasses.replace(base, mixing=dataclasses.replace(base.mixing, **changes))

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
            Column(number="intrinsic_dimension", title="intrinsic dimension", percent=False, measure="dimension"),
            *_OPEN_SET,
        ),
        notes=(
            "Intrinsic dimension: TwoNN on the embeddings of the known test images.",
            "The paper does not say how long either was trained: both are trained alike, for the whole schedule.",
        ),
    )


def _table2() -> Experiment:
    """Open set recognition on six protocols, beside baselines trained in the same run on the same splits."""
    return Experiment(
        title="Table 2: open set recognition",
        protocols=_SIX,
        variants=(
            _gradmix(_OSR),
            _without_mixing(_OSR),
            _method("supcon", _OSR),
            _method("simclr", _OSR),
            _method("cross_entropy", {**_OSR, **_by(OpenSet, *_OF_CLASSIFIERS)}),
            _method("arpl", {**_OSR, **_by(OpenSet, "max_logit")}),
        ),
        rows=(
            Row(label="cross entropy", variant="cross_entropy", measure="max_softmax"),
            Row(label="maximum logit (Vaze et al. 2022)", variant="cross_entropy", measure="max_logit"),
            Row(label="OpenMax", variant="cross_entropy", measure="openmax"),
            Row(label="cross entropy, energy", variant="cross_entropy", measure="energy"),
            Row(label="cross entropy, k-NN", variant="cross_entropy", measure="knn"),
            Row(label="cross entropy, ViM", variant="cross_entropy", measure="vim"),
            Row(label="cross entropy, Mahalanobis", variant="cross_entropy", measure="mahalanobis"),
            Row(label="cross entropy, algorithm 1", variant="cross_entropy"),
            Row(label="ARPL", variant="arpl", measure="max_logit"),
            Row(label="ARPL, algorithm 1", variant="arpl"),
            Row(label="SupCon", variant="supcon"),
            Row(label="SimCLR", variant="simclr"),
            Row(label="SupCon + SimCLR", variant="supcon+simclr"),
            Row(label="GradMix", variant="gradmix"),
        ),
        columns=_OPEN_SET,
    )


def _table3() -> Experiment:
    """Closed-set accuracy with all classes known."""
    accuracy = {"osr": Measure(evaluator=ClosedSet(bootstrap=_NO_BARS))}
    return Experiment(
        title="Table 3: closed-set accuracy",
        protocols=("cifar10-closed", "cifar100-closed", "tinyimagenet-closed"),
        variants=(
            _gradmix(accuracy),
            _without_mixing(accuracy),
            _method("cross_entropy", accuracy),
            _method("arpl", accuracy),
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
            _gradmix(ood),
            _without_mixing(ood),
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


_WEIGHTS_NOTE = (
    "The mixed view's loss is weighted differently: with GradMix by γ², and its positive is the own image alone; with "
    "Mixup and CutMix by 1, and its positives are both images, by their shares. The rows differ in this, too."
)


def _figure2() -> Experiment:
    """Ways of mixing, with the controls that the paper lacks: a random and the least activated place."""
    variants = {
        "no mixing": _without_mixing(_OSR, "none"),
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
            _WEIGHTS_NOTE,
        ),
        seeds=(0, 1, 2),
    )


def _figure3() -> Experiment:
    """The layers whose maps say where the patch goes."""
    choices = (
        ("conv3_2",), ("conv4_2",), ("conv5_2",),
        ("conv3_2", "conv4_2"), ("conv4_2", "conv5_2"), ("conv3_2", "conv4_2", "conv5_2"),
    )  # fmt: skip
    # Hyphens, since plots show an underscore as a space.
    variants = {
        " + ".join(layers).replace("_", "-"): _gradmix_with("+".join(layers), layers=layers) for layers in choices
    }
    return Experiment(
        title="Figure 3: layers of the activation map",
        protocols=_TWO,
        variants=tuple(variants.values()),
        rows=tuple(Row(label=label, variant=variant.name) for label, variant in variants.items()),
        columns=_OPEN_SET,
        notes=("The paper shows bars without figures, and finds no significant difference.",),
    )


def _table5() -> Experiment:
    """Table 5 and figure 4: what is lost under 15 corruptions in 5 severities, with and without GradMix."""
    measures = {"corruptions": Measure(evaluator=CommonCorruptions(bootstrap=_NO_BARS))}
    severities = [Column(number=f"drop_at_severity/{s}", title=f"drop at {s}") for s in range(1, 6)]
    return Experiment(
        title="Table 5 and figure 4: accuracy lost under common corruptions",
        protocols=("cifar10-closed", "tinyimagenet-closed"),
        variants=(_without_mixing(measures), _gradmix(measures)),
        rows=(
            Row(label="without GradMix", variant="supcon+simclr", measure="corruptions"),
            Row(label="with GradMix", variant="gradmix", measure="corruptions"),
        ),
        columns=(
            Column(number="accuracy_drop", title="mean drop"),
            *severities,
            Column(number="clean_accuracy", title="clean accuracy"),
        ),
        notes=("TinyImageNet's corruptions are measured on the first 100 classes, as in table 3.",),
    )


def _figure5() -> Experiment:
    """Self-supervised learning on all of TinyImageNet, probed by a linear classifier, with its course over training."""
    measures = {"probe": Measure(evaluator=LinearProbe(), features="backbone", course=8)}
    variants, rows = [], []
    for architecture in ("resnet18", "resnet34", "resnet50"):
        for method in ("simclr", "moco"):
            for kind in ("none", "cutmix", "gradmix"):
                name = f"{method}-{architecture}-{kind}"
                config = partial(_self_supervised, method=method, architecture=architecture, kind=kind)
                variants.append(Variant(name=name, config=config, measures=measures))
                label = ", ".join(_NAMES[part] for part in (method, architecture, kind))
                rows.append(Row(label=label, variant=name, measure="probe"))
    return Experiment(
        title="Figure 5: linear probes of self-supervised features",
        protocols=("tinyimagenet-all",),
        variants=tuple(variants),
        rows=tuple(rows),
        columns=(Column(number="top1_accuracy", title="top-1"), Column(number="top5_accuracy", title="top-5")),
        notes=(
            "The paper shows bars without figures: 200 epochs, batches of 256, 128 dimensions, queue 8,196.",
            "The probe is a linear classifier on the pooled features of the last block.",
            _WEIGHTS_NOTE,
        ),
    )


_NAMES = {
    "simclr": "SimCLR", "moco": "MoCo", "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50",
    "none": "no mixing", "cutmix": "CutMix", "gradmix": "GradMix",
}  # fmt: skip


def _self_supervised(protocol: str, *, method: str, architecture: Architecture, kind: str) -> TrainConfig:
    base = recipe(protocol, method)
    return dataclasses.replace(
        base,
        epochs=min(base.epochs, 200),
        encoder=dataclasses.replace(base.encoder, architecture=architecture),
        mixing=MixingConfig(kind=kind),
    )


def _figure6() -> Experiment:
    """Attribution maps, and the share S_M(τ) of them above a threshold, with and without GradMix."""
    measures = {"coverage": Measure(evaluator=Coverage())}
    return Experiment(
        title="Figure 6: how much of an image is gone by",
        protocols=_TWO,
        variants=(_without_mixing(measures), _gradmix(measures)),
        rows=(
            Row(label="without GradMix", variant="supcon+simclr", measure="coverage"),
            Row(label="with GradMix", variant="gradmix", measure="coverage"),
        ),
        columns=(Column(number="activated_share", title="S_M, mean over τ"),),
        notes=("τ from 1e-5 to 1e-3; the paper shows curves without figures, those of GradMix always higher.",),
    )


def _beyond() -> Experiment:
    """What the paper leaves open or for future work: one knob at a time, also under attack, with error bars."""
    measures = {
        "osr": Measure(evaluator=OpenSet()),
        "attacks": Measure(evaluator=AdversarialAttacks(epsilons=(2.0, 8.0))),
    }
    khosla = Variant(
        name="khosla",
        config=lambda protocol: _with_objective(protocol, denominator="all"),
        measures=measures,
    )
    variants = {
        "no mixing": _without_mixing(measures),
        "GradMix as published": _gradmix_with("published", measures),
        "2 patches": _gradmix_with("patches-2", measures, num_patches=2),
        "3 patches": _gradmix_with("patches-3", measures, num_patches=3),
        "gradient of the loss's negative": _gradmix_with("sign", measures, gradient_sign=-1),
        "peaks of the same step": _gradmix_with("same-step", measures, peaks_from="same_step"),
        "γ per image": _gradmix_with("gamma-per-sample", measures, gamma_per="sample"),
        "Khosla et al.'s denominator": khosla,
    }
    return Experiment(
        title="Beyond the paper",
        protocols=_TWO,
        variants=tuple(variants.values()),
        rows=tuple(Row(label=label, variant=variant.name) for label, variant in variants.items()),
        columns=(
            *_OPEN_SET,
            Column(number="fgsm/8/closed_set_accuracy", title="accuracy, FGSM 8/255", measure="attacks"),
            Column(number="pgd/2/closed_set_accuracy", title="accuracy, PGD 2/255", measure="attacks"),
            Column(number="pgd/2/auroc", title="AUROC, PGD 2/255", measure="attacks"),
        ),
        notes=("Each row changes one thing of GradMix as published. FGSM and PGD know the model.",),
    )


def _with_objective(protocol: str, **changes: Any) -> TrainConfig:
    base = _with_mixing(protocol)
    return dataclasses.replace(base, objective=dataclasses.replace(base.objective, **changes))


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "figure2": _figure2,
    "figure3": _figure3,
    "figure5": _figure5,
    "figure6": _figure6,
    "beyond": _beyond,
}
ALIASES = {"figure4": "table5"}
"""Other names of an experiment."""


def experiment(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, (*EXPERIMENTS, *ALIASES))
    return EXPERIMENTS[name]()
