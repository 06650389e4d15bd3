"""From a trained encoder to a model with a gallery and a threshold, and what algorithm 1 makes of the test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from trainer.config import TrainConfig
from trainer.encoder import Encoder
from trainer.metrics import closed_set_accuracy, open_set_metrics
from trainer.open_set import calibrate_threshold
from trainer.registry import ModelCard, OpenSetModel


def build_model(encoder: Encoder, partitions: Partitions, config: TrainConfig) -> OpenSetModel:
    """A model from a trained encoder, which it takes over: training images become its gallery, calibration images set
    its threshold."""
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
        method=config.method,
        classifier=config.objective.classifier,
        features=config.score_on,
    )
    if config.score_on == "backbone" and config.objective.classifier is None:
        encoder.drop_head()
    train = partitions.on_device_or_host("train")  # a run whose images are streamed ends here, too
    labels = train.labels.to(partitions.device)
    model = OpenSetModel(card, encoder, labels.new_empty((0, encoder.embedding_dim)), labels)
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
