"""`python -m trainer.evaluate`: measure a model on the test images of the protocol it was trained for.

Scores follow one convention everywhere: larger means more known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
from trainer.config import TrainConfig
from trainer.encoder import Encoder
from trainer.metrics import closed_set_accuracy, open_set_metrics
from trainer.open_set import calibrate_threshold
from trainer.registry import ModelCard, OpenSetModel, load_model

Task = Literal["osr", "closed-set"]


def build_model(encoder: Encoder, partitions: Partitions, config: TrainConfig) -> OpenSetModel:
    """A model from a trained encoder: training images become its gallery, calibration images set its threshold."""
    manifest, protocol = partitions.build.manifest, partitions.build.protocol
    card = ModelCard(
        protocol=protocol.to_dict(),
        split_hash=protocol.split_hash,
        class_names=manifest.class_names,
        encoder=config.encoder,
        image_size=manifest.image_size,
        channels=manifest.channels,
        mean=protocol.info.mean,
        std=protocol.info.std,
        k=config.k,
        threshold=0.0,
        accept=config.accept,
    )
    train = partitions["train"]
    model = OpenSetModel(card, encoder, train.images.new_empty((0, config.encoder.embedding_dim)), train.labels)
    model.gallery_ids = partitions.build.names("train")
    model.gallery = model.embed(train.images)
    scores = model.score(partitions["calibration"].images, [config.k]).scores.squeeze(1)
    model.calibration_scores = scores.cpu()
    model.card = dataclasses.replace(card, threshold=calibrate_threshold(scores, config.accept))
    return model


def evaluate_open_set(model: OpenSetModel, partitions: Partitions, ks: Sequence[int]) -> dict[str, Any]:
    """AUROC, OSCR and closed-set accuracy as {k: value}, and what the threshold does to known and unknown images.

    A protocol without unknown classes has closed-set accuracy only.
    """
    known = partitions["test_known"]
    ks = usable_ks(model, ks)
    scores, predictions = (column.cpu().numpy() for column in model.score(known.images, ks))
    labels = known.labels.cpu().numpy()
    at_k = scores[:, ks.index(model.card.k)]
    result: dict[str, Any] = {"test_known": len(labels), "known_accepted": float((at_k >= model.card.threshold).mean())}
    if "test_unknown" not in partitions:
        accuracy = {k: closed_set_accuracy(predictions[:, column], labels) for column, k in enumerate(ks)}
        return {"closed_set_accuracy": accuracy, **result}
    unknown = partitions["test_unknown"]
    unknown_scores = model.score(unknown.images, ks).scores.cpu().numpy()
    rejected = float((unknown_scores[:, ks.index(model.card.k)] < model.card.threshold).mean())
    metrics = open_set_metrics(scores, predictions, labels, unknown_scores, ks)
    return {**metrics, **result, "test_unknown": len(unknown.labels), "unknown_rejected": rejected}


def usable_ks(model: OpenSetModel, ks: Sequence[int]) -> list[int]:
    """Each k once, ascending, the model's own among them, without those larger than the smallest class's gallery."""
    smallest = int(torch.bincount(model.gallery_labels).min())
    if model.card.k > smallest:
        raise InputError(
            f"k is {model.card.k}, but a class has only {smallest} training images: set --k to at most that"
        )
    return sorted({k for k in (*ks, model.card.k) if k <= smallest})


def metrics_table(result: dict[str, Any], title: str) -> Table:
    """One row for each k; percent."""
    names = {"auroc": "AUROC", "oscr": "OSCR", "closed_set_accuracy": "closed-set accuracy"}
    present = [name for name in names if name in result]
    table = Table("k", *(names[name] for name in present), title=escape(title))
    for k in result["closed_set_accuracy"]:
        table.add_row(str(k), *(f"{100 * result[name][k]:.2f}" for name in present))
    return table


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
    task: Task = "osr"
    """osr: AUROC, OSCR and closed-set accuracy; closed-set: accuracy alone, also where no class is unknown."""
    data: Path = Path("data")
    """Data folder that holds the built files, or the folder of one build."""
    run_dir: Path | None = None
    """Folder for config.json, metrics.json and log.txt. Default: runs/evaluate-TASK-MODEL."""
    ks: tuple[int, ...] = (1, 5, 10, 50, 200)
    """Neighbours per class to report, all from one pass; those larger than a class are left out."""
    examples: int = 0
    """Also show the model's answer to this many test images; 0 or more."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""
    workers: int = 1
    """FFCV decoding threads, 1 or more."""

    def __post_init__(self) -> None:
        if min(self.ks, default=0) < 1:
            raise InputError(f"ks is {self.ks}; set every k to 1 or more")
        if self.examples < 0:
            raise InputError(f"examples is {self.examples}; set it to 0 or more")
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; set it to 1 or more")


def evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    model = load_model(config.model, config.tracking_uri, device_by_default())
    protocol = Protocol.from_dict(model.card.protocol)
    partitions = Partitions(find_split(config.data, protocol), model.device, config.workers)
    if config.task == "osr" and "test_unknown" not in partitions:
        raise InputError(f"protocol {protocol.name} has no unknown class to recognise: use --task closed-set")
    name = config.model.removeprefix("models:/").strip("/").replace("/", "-")
    run = RunFolder(config.run_dir or Path("runs") / f"evaluate-{config.task}-{name}", console)
    record = {key: str(value) for key, value in dataclasses.asdict(config).items()}
    run.write_config({"config": record, "split_hash": protocol.split_hash, "commit": source_commit()})
    result = evaluate_open_set(model, partitions, config.ks)
    if config.task == "closed-set":
        result = {key: result[key] for key in ("closed_set_accuracy", "test_known")}
    run.write_metrics(result)
    title = f"{config.model} on {protocol.name}, split {protocol.split} (percent)"
    console.print(metrics_table(result, title))
    if config.examples:
        console.print(name_examples(model, partitions, config.examples))
    run.log(f"written to {run.path}")
    return result


def main() -> None:
    config = cli.parse(
        EvaluateConfig,
        prog="python -m trainer.evaluate",
        description="Measure a registered model on the test images of its protocol.",
    )
    evaluate(config, Console(soft_wrap=True))


if __name__ == "__main__":
    cli.run(main)
