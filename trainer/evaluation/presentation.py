"""What an evaluation looks like: from the evaluations of one or more models to a table and pictures.

There is one function for each kind of evaluator; `present` finds it. Models are rows, named by their labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.evaluation import plots
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.evaluators import (
    ClosedSet,
    Detectors,
    Evaluation,
    Evaluator,
    IntrinsicDimension,
    OpenSet,
    OutOfDistribution,
)
from trainer.evaluation.linear_probe import LinearProbe
from trainer.evaluation.report import Cell, Number
from trainer.evaluation.robustness import AdversarialAttacks, CommonCorruptions
from trainer.metrics import oscr_curve, roc_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Evaluations = Mapping[str, Evaluation]
"""By the model's label."""

NAMES = {
    "auroc": "AUROC",
    "oscr": "OSCR",
    "closed_set_accuracy": "closed-set accuracy",
    "tnr_at_95_tpr": "TNR at 95 % TPR",
    "dtacc": "DTACC",
    "auin": "AUIN",
    "auout": "AUOUT",
    "top5_accuracy": "top-5 accuracy",
    "top1_accuracy": "top-1 accuracy",
}
"""How numbers are called where people read them."""


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """The parts of a `trainer.evaluation.report.TableResult` that come from evaluations."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = "Percent."
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)


def present(
    evaluator: Evaluator, evaluations: Evaluations, *, threshold: float | None = None, note: str = ""
) -> Presentation:
    """Table and pictures of what `evaluator` found for each model.

    Args:
        evaluations: one or more.
        threshold: of a single model's score, to be drawn into its histogram.
        note: printed small below every picture, such as the budget of the models.
    """
    presentation = _PRESENTED[type(evaluator)](evaluator, evaluations)
    figures = dict(presentation.figures)
    if threshold is not None and len(evaluations) == 1 and "scores" in figures:
        (label, evaluation), *_ = evaluations.items()
        figures["scores"] = _histogram(evaluation, label, threshold)
    return dataclasses.replace(
        presentation,
        notes=(*_tested_note(evaluations), *presentation.notes),
        figures={name: plots.with_note(figure, note) for name, figure in figures.items()},
    )


def percent_row(evaluation: Evaluation, names: Sequence[str]) -> tuple[Number, ...]:
    """The numbers of these names, which are shares, in percent, with their intervals."""
    return tuple(Number.percent(evaluation.numbers[name], evaluation.intervals.get(name)) for name in names)


def _table(evaluations: Evaluations, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """Columns and rows of shares."""
    columns = ("model", *(NAMES[name] for name in names))
    return columns, tuple((label, *percent_row(each, names)) for label, each in evaluations.items())


def _named(label: str, evaluations: Evaluations) -> tuple[str, ...]:
    """The cell that says which model a row is of, where there are several."""
    return (label,) if len(evaluations) > 1 else ()


def _histogram(evaluation: Evaluation, label: str, threshold: float | None = None) -> Figure:
    arrays = evaluation.arrays
    return plots.score_histogram(
        arrays["known_scores"], arrays["unknown_scores"], threshold=threshold, title=f"Scores of {label}"
    )


def _score_figures(evaluations: Evaluations) -> dict[str, Figure]:
    """Every model's histogram in one picture, and all ROC curves in another."""
    if len(evaluations) == 1:
        histograms = _histogram(*evaluations.values(), *evaluations)
    else:
        scores = {
            label: (each.arrays["known_scores"], each.arrays["unknown_scores"]) for label, each in evaluations.items()
        }
        histograms = plots.score_histograms_figure(scores)
    curves = {
        label: roc_curve(each.arrays["known_scores"], each.arrays["unknown_scores"])
        for label, each in evaluations.items()
    }
    return {"scores": histograms, "roc": plots.roc_curves(curves)}


def _open_set(evaluator: OpenSet, evaluations: Evaluations) -> Presentation:
    columns, rows = _table(evaluations, ("auroc", "oscr", "closed_set_accuracy"))
    curves = {
        label: oscr_curve(*(each.arrays[name] for name in ("known_scores", "known_correct", "unknown_scores")))
        for label, each in evaluations.items()
    }
    return Presentation(
        columns=columns,
        rows=rows,
        notes=(_score_note(evaluator.detector), *_interval_note(evaluator)),
        figures=_score_figures(evaluations) | {"oscr": plots.oscr_curves(curves)},
    )


def _closed_set(evaluator: ClosedSet, evaluations: Evaluations) -> Presentation:
    names = [
        name
        for name in ("closed_set_accuracy", "top5_accuracy")
        if all(name in e.numbers for e in evaluations.values())
    ]
    columns, rows = _table(evaluations, names)
    return Presentation(columns=columns, rows=rows, notes=_interval_note(evaluator))


def _out_of_distribution(evaluator: OutOfDistribution, evaluations: Evaluations) -> Presentation:
    columns, rows = _table(evaluations, ("tnr_at_95_tpr", "auroc", "dtacc", "auin", "auout"))
    note = (
        "TNR is the share of unknown images turned away where 95 % of the known ones are accepted, DTACC the largest "
        "mean of both shares over all thresholds, AUIN and AUOUT the average precision with known and with unknown "
        "images as positives. The paper's own TNR and DTACC do not fit its AUROC."
    )
    return Presentation(
        columns=columns,
        rows=rows,
        notes=(_score_note(evaluator.detector), note, *_interval_note(evaluator)),
        figures=_score_figures(evaluations),
    )


def _detectors(evaluator: Detectors, evaluations: Evaluations) -> Presentation:
    metrics = ("auroc", "oscr", "tnr_at_95_tpr", "dtacc", "auin", "auout")
    rows = []
    for label, evaluation in evaluations.items():
        for detector in evaluator.names:
            numbers = percent_row(evaluation, [f"{detector}/{metric}" for metric in metrics])
            rows.append((detector.replace("_", " "), *_named(label, evaluations), *numbers))
    series, errors = {}, {}
    for label, evaluation in evaluations.items():
        series[label] = [100 * evaluation.numbers[f"{name}/auroc"] for name in evaluator.names]
        found = [evaluation.intervals.get(f"{name}/auroc") for name in evaluator.names]
        errors[label] = [None if each is None else (100 * each.low, 100 * each.high) for each in found]
    points = plots.grouped_points(
        evaluator.names, series, errors=errors, title="Detectors", label="AUROC (percent)"
    )  # fmt: skip
    return Presentation(
        columns=("detector", *_named("model", evaluations), *(NAMES[metric] for metric in metrics)),
        rows=tuple(rows),
        notes=_interval_note(evaluator),
        figures={"detectors": points},
    )


def _intrinsic_dimension(evaluator: IntrinsicDimension, evaluations: Evaluations) -> Presentation:
    rows, figures = [], {}
    for number, (label, evaluation) in enumerate(evaluations.items(), 1):
        dimension, images = evaluation.numbers["intrinsic_dimension"], evaluation.numbers["images"]
        rows.append((label, Number(value=dimension), Number(value=images, digits=0)))
        figures["fit" if len(evaluations) == 1 else f"fit_{number}"] = plots.two_nn_fit(
            evaluation.arrays["log_ratio"], evaluation.arrays["log_survival"], dimension, title=f"TwoNN, {label}"
        )
    note = f"TwoNN on the features of {evaluator.partition} images, without the tenth with the largest ratios."
    return Presentation(
        columns=("model", "intrinsic dimension", "images"),
        rows=tuple(rows),
        caption="",
        notes=(note,),
        figures=figures,
    )


def _corruptions(evaluator: CommonCorruptions, evaluations: Evaluations) -> Presentation:
    severities = [f"drop_at_severity/{severity}" for severity in evaluator.severities]
    names = ("clean_accuracy", "accuracy_drop", *severities)
    titles = ("clean", "mean drop", *(f"severity {each}" for each in evaluator.severities))
    rows = tuple((label, *percent_row(evaluation, names)) for label, evaluation in evaluations.items())
    drops = {
        label: [100 * evaluation.numbers[f"drop/{name}"] for name in evaluator.corruptions]
        for label, evaluation in evaluations.items()
    }
    bars = plots.grouped_bars(
        evaluator.corruptions, drops, title="Accuracy drop by corruption, mean over severities",
        label="accuracy drop (percentage points)",
    )  # fmt: skip
    first = next(iter(evaluations.values()))
    examples = plots.corruption_examples(first.arrays["examples"], evaluator.corruptions, evaluator.severities)
    if evaluator.corrupted_root is None:
        note = (
            "The corruptions were generated with the published constants and other random numbers. Frost is a "
            "generated texture in place of the published photographs: its numbers are not those of the official files."
        )
    else:
        note = f"The corrupted images are those of the official files in {evaluator.corrupted_root}."
    return Presentation(
        columns=("model", *titles),
        rows=rows,
        caption="Closed-set accuracy of clean images in percent; how many points it drops, by severity.",
        notes=(note, *_interval_note(evaluator)),
        figures={"corruptions": bars, "examples": examples},
    )


def _linear_probe(evaluator: LinearProbe, evaluations: Evaluations) -> Presentation:
    columns, rows = _table(evaluations, ("top1_accuracy", "top5_accuracy"))
    epochs = next(iter(evaluations.values())).arrays["epoch"]
    figures = {
        name: plots.lines(
            epochs,
            {label: 100 * evaluation.arrays[name] for label, evaluation in evaluations.items()},
            title=f"Linear probe, {title}",
            x_label="epoch of the probe",
            y_label=f"{title} accuracy (percent)",
        )
        for name, title in (("top1", "top-1"), ("top5", "top-5"))
    }
    return Presentation(columns=columns, rows=rows, figures=figures)


def _attribution(evaluator: Coverage, evaluations: Evaluations) -> Presentation:
    first = next(iter(evaluations.values()))
    marks = [name for name in first.numbers if name.startswith("activated_share/")]
    columns = ("model", "mean S_M", *(f"S_M({mark.partition('/')[2]})" for mark in marks))
    rows = tuple((label, *percent_row(each, ("activated_share", *marks))) for label, each in evaluations.items())
    curves = {label: each.arrays["activated_share"] for label, each in evaluations.items()}
    figures = {
        "activated_share": plots.lines(
            first.arrays["threshold"], curves, title="Share of the map above τ", x_label="τ", y_label="S_M(τ)",
            logarithmic=True,
        )
    }  # fmt: skip
    if len(first.arrays["images"]):
        maps = {label: each.arrays["maps"] for label, each in evaluations.items()}
        figures["maps"] = plots.attribution_grid(first.arrays["images"], maps)
    note = (
        f"Maps are {evaluator.attribution} of the self-supervised loss over batches of {evaluator.batch_size}; their "
        "values depend on the batch size and on what follows the layer: compare models that were trained alike. In the "
        "pictures each map is scaled to its own largest value."
    )
    return Presentation(columns=columns, rows=rows, notes=(note,), figures=figures)


def _attacks(evaluator: AdversarialAttacks, evaluations: Evaluations) -> Presentation:
    first = next(iter(evaluations.values()))
    cases = ["clean", *(f"{attack}/{epsilon:g}" for attack in evaluator.attacks for epsilon in evaluator.epsilons)]
    metrics = [
        metric
        for metric in ("closed_set_accuracy", "auroc", "auroc_unknown_attacked")
        if f"{cases[-1]}/{metric}" in first.numbers
    ]
    titles = NAMES | {"auroc_unknown_attacked": "AUROC, unknown images attacked"}
    rows = []
    for label, evaluation in evaluations.items():
        for case in cases:
            attack, _, epsilon = case.partition("/")
            numbers = evaluation.numbers
            cells = (Number.percent(numbers[f"{case}/{m}"]) if f"{case}/{m}" in numbers else None for m in metrics)
            name = attack if attack == "clean" else attack.upper()
            rows.append((name, epsilon or "0", *_named(label, evaluations), *cells))
    figures = {}
    for name, title in (("accuracy", "closed-set accuracy"), ("auroc", "AUROC")):
        curves = {
            f"{label}, {attack.upper()}": 100 * evaluation.arrays[f"{name}/{attack}"]
            for label, evaluation in evaluations.items()
            for attack in evaluator.attacks
            if f"{name}/{attack}" in evaluation.arrays
        }
        if curves:
            figures[name] = plots.lines(
                first.arrays["epsilons"], curves, title=f"{title[0].upper()}{title[1:]} under attack",
                x_label="ε, largest change of a pixel (255ths)", y_label=f"{title} (percent)", markers=True,
            )  # fmt: skip
    note = (
        f"PGD makes {evaluator.steps} steps. For accuracy the cross entropy of known images is raised; for AUROC the "
        "score itself is lowered on known and raised on unknown images."
    )
    return Presentation(
        columns=("attack", "ε (255ths)", *_named("model", evaluations), *(titles[metric] for metric in metrics)),
        rows=tuple(rows),
        notes=(note,),
        figures=figures,
    )


def _tested_note(evaluations: Evaluations) -> tuple[str, ...]:
    """How many images were measured, where the evaluations say so."""
    counts = {label: each.tested for label, each in evaluations.items() if each.tested is not None}
    if not counts:
        return ()
    if len(set(counts.values())) == 1:
        return (f"Measured on {next(iter(counts.values())):,} images.",)
    return (f"Measured on {', '.join(f'{count:,} images ({label})' for label, count in counts.items())}.",)


def _score_note(detector: str) -> str:
    same = ", which without a classifier orders as that of algorithm 1" if detector == "max_logit" else ""
    return f"The score is {detector.replace('_', ' ')}{same}; a larger one means more known."


def _interval_note(
    evaluator: OpenSet | ClosedSet | OutOfDistribution | Detectors | CommonCorruptions,
) -> tuple[str, ...]:
    bootstrap = evaluator.bootstrap
    if bootstrap.resamples == 0:
        return ()
    share = f"{100 * bootstrap.confidence:g} %"
    return (
        f"Below a number stands its {share} interval over {bootstrap.resamples:,} bootstrap draws of the test images.",
    )


_PRESENTED: dict[type, Callable[..., Presentation]] = {
    OpenSet: _open_set,
    ClosedSet: _closed_set,
    OutOfDistribution: _out_of_distribution,
    Detectors: _detectors,
    IntrinsicDimension: _intrinsic_dimension,
    CommonCorruptions: _corruptions,
    LinearProbe: _linear_probe,
    Coverage: _attribution,
    AdversarialAttacks: _attacks,
}
