"""`python -m trainer.evaluate`: measure a model on the test images of the protocol it was trained for.

Scores follow one convention everywhere: larger means more known.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import rich.progress
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline import cli
from data_pipeline.beton import find_split
from data_pipeline.errors import InputError
from data_pipeline.loader import Batch, Partitions
from data_pipeline.protocols import UNKNOWN, Protocol
from data_pipeline.run_folder import RunFolder, source_commit
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.detectors import DetectorName
from trainer.evaluation.evaluators import (
    TEMPERATURE,
    BootstrapConfig,
    ClosedSet,
    Detectors,
    Evaluation,
    Evaluator,
    FeatureModel,
    Features,
    IntrinsicDimension,
    OpenSet,
    OutOfDistribution,
    Subject,
    Track,
)
from trainer.evaluation.linear_probe import LinearProbe
from trainer.evaluation.presentation import present
from trainer.evaluation.report import TableResult, provenance, write_report
from trainer.evaluation.robustness import AdversarialAttacks, CommonCorruptions
from trainer.recipes import recipe
from trainer.recognition import evaluate_open_set, metrics_table
from trainer.records import as_record, without_password
from trainer.registry import OpenSetModel, load_model
from trainer.tracking import JournalTracker, discard_journal, resolve_uri

Task = Literal[
    "osr", "closed-set", "ood", "detectors", "corruptions", "linear-probe", "intrinsic-dimension", "attribution",
    "robustness",
]  # fmt: skip


def name_examples(model: OpenSetModel, partitions: Partitions, count: int) -> Table:
    """What the model says to `count` test images, half of them of unknown classes where there are any."""
    parts = [name for name in ("test_known", "test_unknown") if name in partitions]
    table = Table("image", "truth", "answer", "nearest class", "score", "threshold", title="A few test images")
    for name in parts:
        batch = _evenly(partitions[name], count // len(parts))
        answers = model.predict(batch.images)
        for row, (index, label) in enumerate(zip(batch.indices.tolist(), batch.labels.tolist())):
            truth = model.card.class_names[label] if label >= 0 else UNKNOWN
            answer = answers["label"][row]
            colour = "green" if answer == truth else "red"
            table.add_row(
                escape(f"{name}[{index}]"), escape(truth if label >= 0 else f"({truth})"),
                f"[{colour}]{escape(answer)}[/]", escape(answers["class"][row]),
                f"{answers['score'][row]:.3f}", f"{model.card.threshold:.3f}",
            )  # fmt: skip
    return table


def _evenly(batch: Batch, count: int) -> Batch:
    chosen = torch.from_numpy(np.linspace(0, len(batch.labels) - 1, count).round().astype(np.int64))
    return Batch(*(column[chosen.to(column.device)] for column in batch))


def device_by_default() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which model to measure, on what, and how."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    compare: tuple[str, ...] = ()
    """Other models of the same classes to put beside it, in the table and in the pictures."""
    labels: tuple[str, ...] = ()
    """What to call the models in table and pictures, the first one first. Default: their names in the registry, or
    those of their run folders."""
    task: Task = "osr"
    """osr: AUROC, OSCR and closed-set accuracy. closed-set: accuracy alone, also where no class is unknown. ood:
    out-of-distribution metrics. detectors: several scores side by side. corruptions: accuracy drop under the 15 common
    corruptions. linear-probe: a linear classifier on frozen features. intrinsic-dimension: TwoNN. attribution: maps of
    where the model looks. robustness: FGSM and PGD."""
    data: Path = Path("data")
    """Data folder that holds the built files, or the folder of one build."""
    run_dir: Path | None = None
    """Folder for config.json, metrics.json, log.txt, report.html and figures. Default: runs/evaluate-TASK-MODEL."""
    ks: tuple[int, ...] = (1, 5, 10, 50, 200)
    """Neighbours per class that osr and closed-set report, from one pass; those larger than a class are left out."""
    examples: int = 0
    """osr and closed-set: also show the model's answer to this many test images; 0 or more."""
    features: Features | None = None
    """Which features to measure: embedding, of the projection head, or backbone, before it. Default: the backbone for
    linear-probe and for models with a classifier, otherwise the embedding."""
    detector: DetectorName = "max_logit"
    """Score of osr and ood; for models without a classifier, max_logit orders as the score of algorithm 1."""
    detectors: tuple[DetectorName, ...] = get_args(DetectorName)
    """Scores that the task detectors compares."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    dimension: IntrinsicDimension = field(default_factory=IntrinsicDimension)
    corruptions: CommonCorruptions = field(default_factory=CommonCorruptions)
    probe: LinearProbe = field(default_factory=LinearProbe)
    attribution: Coverage = field(default_factory=Coverage)
    attacks: AdversarialAttacks = field(default_factory=AdversarialAttacks)
    tracking_uri: str | None = None
    """MLflow store of models:/ names, where the evaluation is recorded too. Default: MLFLOW_TRACKING_URI, else
    sqlite:///mlruns.db. The evaluation of a model folder is recorded only if this is given."""
    experiment: str = "gradmix-osr"
    """MLflow experiment to record in."""
    workers: int = 1
    """FFCV decoding threads, 1 or more."""

    def __post_init__(self) -> None:
        if min(self.ks, default=0) < 1:
            raise InputError(f"ks is {self.ks}; set every k to 1 or more")
        if self.examples < 0:
            raise InputError(f"examples is {self.examples}; set it to 0 or more")
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; set it to 1 or more")
        if self.labels and len(self.labels) != 1 + len(self.compare):
            raise InputError(
                f"{len(self.labels)} labels for {1 + len(self.compare)} models: give one for each, or none"
            )
        if len(set(self.named)) != len(self.named):
            raise InputError(f"two models are called alike among {list(self.named)}: give them --labels")

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *self.compare)

    @property
    def named(self) -> tuple[str, ...]:
        """A label for each model."""
        return self.labels or tuple(map(_label, self.models))

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / f"evaluate-{self.task}-{_short(self.model)}"

    @property
    def records(self) -> bool:
        """Whether the evaluation becomes an MLflow run."""
        return self.tracking_uri is not None or self.model.startswith("models:/")

    def evaluator(self, protocol: Protocol) -> Evaluator:
        """What measures for this task."""
        views = recipe(protocol.name).views
        return {
            "osr": OpenSet(detector=self.detector, bootstrap=self.bootstrap),
            "closed-set": ClosedSet(bootstrap=self.bootstrap),
            "ood": OutOfDistribution(detector=self.detector, bootstrap=self.bootstrap),
            "detectors": Detectors(names=self.detectors, bootstrap=self.bootstrap),
            "corruptions": dataclasses.replace(self.corruptions, bootstrap=self.bootstrap),
            "linear-probe": self.probe,
            "intrinsic-dimension": self.dimension,
            "attribution": dataclasses.replace(self.attribution, views=views),
            "robustness": self.attacks,
        }[self.task]

    def feature_model(self, model: OpenSetModel) -> FeatureModel:
        return FeatureModel.of(model, self.features or ("backbone" if self.task == "linear-probe" else None))


def _label(model: str) -> str:
    path = Path(model)
    if model.startswith("models:/"):
        return model.removeprefix("models:/")
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _short(model: str) -> str:
    return model.removeprefix("models:/").strip("/").replace("/", "-")


def evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Measure, show, and leave metrics and a report in the run folder; returns what is written to `metrics.json`."""
    models = [load_model(uri, config.tracking_uri, device_by_default()) for uri in config.models]
    for uri, other in zip(config.compare, models[1:]):
        if other.card.split_hash != models[0].card.split_hash:
            raise InputError(
                f"{uri} was trained for protocol {other.card.protocol['name']} on other images than {config.model}: "
                "compare models of the same split"
            )
    build = find_split(config.data, Protocol.from_dict(models[0].card.protocol))
    return measure(config, models, Partitions(build, models[0].device, config.workers), console)


def measure(
    config: EvaluateConfig, models: Sequence[OpenSetModel], partitions: Partitions, console: Console
) -> dict[str, Any]:
    """`evaluate` once models and images are there."""
    started = time.perf_counter()
    model, protocol = models[0], partitions.build.protocol
    if "test_unknown" not in partitions and config.task in ("osr", "ood", "detectors"):
        raise InputError(f"protocol {protocol.name} has no unknown class to recognise: use --task closed-set")
    evaluator = config.evaluator(protocol)
    run = RunFolder(config.folder, console)
    run.write_config({"config": as_record(config), "split_hash": protocol.split_hash, "commit": source_commit()})
    evaluations = {}
    for label, each in zip(config.named, models):
        subject = Subject(
            config.feature_model(each),
            partitions,
            each.card.class_names,
            classes=protocol.known,
            track=_progress(console, label),
        )
        evaluations[label] = evaluator(subject)
    result = _result(config, model, partitions, evaluations)
    run.write_metrics(result)
    report = _report(config, evaluator, protocol, model, evaluations, time.perf_counter() - started)
    if config.task in ("osr", "closed-set"):
        title = f"{config.model} on {protocol.name}, split {protocol.split} (percent)"
        console.print(metrics_table(result, title))
    console.print(report.to_rich())
    for note in report.notes:
        console.print(note, markup=False, highlight=False)
    if config.task in ("osr", "closed-set") and config.examples:
        console.print(name_examples(model, partitions, config.examples))
    run.log(f"report: {write_report(report, run.path)}")
    if config.records:
        _record(config, evaluations, run)
    run.log(f"written to {run.path}")
    run.close()
    return result


def _result(
    config: EvaluateConfig, model: OpenSetModel, partitions: Partitions, evaluations: dict[str, Evaluation]
) -> dict[str, Any]:
    """What `metrics.json` says: of the model itself at the top, of those beside it below "compared"."""
    own, *others = evaluations.values()
    intervals = {name: interval._asdict() for name, interval in own.intervals.items()}
    if config.task in ("osr", "closed-set"):
        result = evaluate_open_set(model, partitions, config.ks)
        if config.task == "closed-set":
            result = {key: result[key] for key in ("closed_set_accuracy", "test_known")}
        result["score"] = dict(own.numbers)
    else:
        result = dict(own.numbers)
    compared = {label: dict(each.numbers) for label, each in zip(config.named[1:], others)}
    return {**result, "intervals": intervals, **({"compared": compared} if compared else {})}


_TITLES: dict[Task, str] = {
    "osr": "Open set recognition",
    "closed-set": "Closed-set accuracy",
    "ood": "Out-of-distribution detection",
    "detectors": "Detectors",
    "corruptions": "Common corruptions",
    "linear-probe": "Linear probe",
    "intrinsic-dimension": "Intrinsic dimension",
    "attribution": "Where the model looks",
    "robustness": "Robustness to attacks",
}


def _report(
    config: EvaluateConfig,
    evaluator: Evaluator,
    protocol: Protocol,
    model: OpenSetModel,
    evaluations: dict[str, Evaluation],
    seconds: float,
) -> TableResult:
    threshold = None
    if config.detector == "max_logit" and model.encoder.classifier is None:
        # Its logits are algorithm 1's class scores over k and τ.
        threshold = model.card.threshold / (model.card.k * TEMPERATURE)
    presentation = present(evaluator, evaluations, threshold=threshold)
    return TableResult(
        title=f"{_TITLES[config.task]}: {protocol.name}, split {protocol.split}",
        caption=presentation.caption,
        columns=presentation.columns,
        rows=presentation.rows,
        notes=presentation.notes,
        figures=presentation.figures,
        facts={
            "models": ", ".join(
                label if label == uri else f"{label} is {uri}" for label, uri in zip(config.named, config.models)
            ),
            "classes": f"{len(protocol.known)} known, {len(protocol.unknown)} unknown",
            "evaluation": f"{evaluator}",
            "seconds": f"{seconds:.0f}",
            **provenance(),
        },
    )


def _record(config: EvaluateConfig, evaluations: dict[str, Evaluation], run: RunFolder) -> None:
    """The evaluation as an MLflow run of its own, with the report as artifacts; a store that fails does no harm."""
    uri = resolve_uri(config.tracking_uri)
    # Another evaluation in the same folder is another run.
    discard_journal(run.path)
    tracker = JournalTracker(run.path, uri=uri, experiment=config.experiment)
    own, *others = evaluations.values()
    numbers = dict(own.numbers)
    for label, each in zip(config.named[1:], others):
        numbers |= each.prefixed(_metric_name(label)).numbers
    tracker.log({f"{config.task}/{name}": value for name, value in numbers.items()}, step=0)
    tracker.close("FINISHED")
    run.log(f"recorded in {without_password(uri)}, experiment {config.experiment}")


def _metric_name(label: str) -> str:
    """`label` without the characters that MLflow does not take in the name of a metric."""
    return re.sub(r"[^\w\-. /]", "-", label)


def _progress(console: Console, label: str) -> Track:
    """A bar on a terminal, nothing elsewhere."""

    def track(items: Iterable[Any], name: str, total: int) -> Iterable[Any]:
        shown = f"{escape(label)}: {name}"
        return rich.progress.track(
            items, shown, total=total, console=console, transient=True, disable=not console.is_terminal
        )

    return track


def main() -> None:
    config = cli.parse(
        EvaluateConfig,
        prog="python -m trainer.evaluate",
        description="Measure a registered model, or several side by side, on the test images of their protocol.",
    )
    evaluate(config, cli.console())


if __name__ == "__main__":
    cli.run(main)
