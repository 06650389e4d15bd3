"""One cell of a table of the paper: its images, its training, what its measures find."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import torch
from rich.console import Console

from data_pipeline.beton import Build, folder_name, read_build
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError
from data_pipeline.ffcv_writer import Encoding
from data_pipeline.files import read_json, replacing, sha256, write_json
from data_pipeline.loader import Partitions
from data_pipeline.protocols import Protocol
from data_pipeline.run_folder import source_commit
from data_pipeline.sources import SOURCE_KINDS
from trainer import checkpoint
from trainer.distributed import from_first_rank
from trainer.encoder import load_encoder
from trainer.evaluation.evaluators import Evaluation, FeatureModel, Features, Subject
from trainer.registry import OpenSetModel
from trainer.reproduce.experiments import Measure
from trainer.reproduce.plan import ARRAYS, Cell, ReproduceConfig
from trainer.train import train

NO_COMMIT = "not in a checkout"


class Data:
    """The images of each protocol: built by the first rank unless they are there, decoded once for cells in a row."""

    def __init__(self, config: ReproduceConfig, device: torch.device, console: Console) -> None:
        self.config, self.device, self.console = config, device, console
        self._latest: Partitions | None = None
        self._missing: dict[Protocol, InputError] = {}

    def of(self, protocol: Protocol) -> Partitions:
        """Raises `InputError` if they are not to be had; the reason is found out once."""
        if protocol in self._missing:
            raise self._missing[protocol]
        if self._latest is None or self._latest.build.protocol != protocol:
            self._latest = None  # frees its images
            try:
                made = from_first_rank(lambda: self._find(protocol))
            except InputError as error:
                self._missing[protocol] = error
                raise
            self._latest = Partitions(made, self.device, self.config.workers)
        return self._latest

    def _find(self, protocol: Protocol) -> Build:
        config = self.config
        try:
            made = read_build(config.data / folder_name(protocol, Encoding(image_size=protocol.info.image_size)))
            made.check_complete()
            if made.manifest.split_hash == protocol.split_hash:
                return made
        except InputError:
            pass  # not there, or not whole
        bundled = SOURCE_KINDS[protocol.classes.dataset][0] == "bundled"
        wanted = BuildConfig(
            protocol=protocol.name,
            split=protocol.split,
            source=None if bundled else config.source,
            root=config.root,
            out=config.data,
            train_images=protocol.classes.train_images,
        )
        return build(wanted, self.console)


def compute(cell: Cell, partitions: Partitions, console: Console) -> None:
    """Train one cell, unless that is done, and measure it; its numbers go to evaluation.json."""
    # Somebody who watches sees a progress bar; the epochs of all cells would bury the table in a file.
    shown = console if console.is_terminal else None
    from_first_rank(lambda: (cell.folder / "evaluation.json").unlink(missing_ok=True))
    try:
        train(dataclasses.replace(cell.config, data=partitions.build.folder), shown, partitions)
    except InputError as error:
        raise type(error)(f"{error} (what has no option here is set in trainer/recipes.py)") from error
    from_first_rank(lambda: measure(cell, partitions))


def measure(cell: Cell, partitions: Partitions) -> None:
    run = cell.config.folder
    try:
        model = OpenSetModel.load(run / "model", partitions.device)
    except InputError as error:
        raise InputError(
            f"{run} is finished, but has lost its model: remove it to have it trained anew ({error})"
        ) from error

    @cache
    def subject(logits: str, features: Features | None) -> Subject:
        """Shared by the measures that ask for the same, so that every image goes through the model once."""
        shown = FeatureModel.of(model, features)
        # Without a classifier, a model's own logits are those of its gallery.
        if logits == "gallery" and model.encoder.classifier is not None:
            train = partitions["train"]
            shown = shown.with_gallery(train.images, train.labels, model.card.k)
        protocol = partitions.build.protocol
        return Subject(shown, partitions, classes=protocol.known, class_names=model.card.class_names)

    found, tested = Evaluation({}), {}
    for name, wanted in cell.variant.measures.items():
        evaluation = wanted.evaluator(subject(wanted.logits, wanted.features))
        tested[name] = evaluation.tested
        if wanted.course:
            evaluation = joined(evaluation, course_of(wanted, cell, model, partitions))
        found = joined(found, evaluation.prefixed(name))
    with replacing(cell.folder / ARRAYS) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **found.arrays)
    trained, asked = read_json(run / "metrics.json", "metrics"), read_json(run / "config.json", "configuration")
    versions = asked["versions"]
    record = {
        "request": cell.request,
        "trained_in": str(run),
        "arrays": sha256(cell.folder / ARRAYS),
        "numbers": found.numbers,
        "intervals": {name: [interval.low, interval.high] for name, interval in found.intervals.items()},
        "epochs": trained["epochs"],
        "train_images": trained["train_images"],
        "test_images": tested,
        "train_seconds": trained["train_seconds"],
        "commit": asked["commit"] or NO_COMMIT,
        "measured_by": source_commit() or NO_COMMIT,
        "hardware": asked["hardware"],
        "versions": f"Python {versions['python']}, torch {versions['torch']}",
    }
    write_json(cell.folder / "evaluation.json", record)
    # The model is kept; the states on the way to it, with the optimizer's memory, have served.
    checkpoint.discard(run)


def course_of(wanted: Measure, cell: Cell, model: OpenSetModel, partitions: Partitions) -> Evaluation:
    """What the evaluator finds at the end of each stretch: arrays course/epoch (T,) and course/NUMBER (T,). Requests to
    stop may have left checkpoints between them."""
    rows: list[dict[str, float]] = []
    every, last = cell.config.checkpoint_every, cell.config.total_epochs
    for epoch, weights in checkpoint.encoders(cell.config.folder).items():
        if epoch % every and epoch != last:
            continue
        load_encoder(model.encoder, weights)
        numbers = wanted.evaluator(Subject(FeatureModel.of(model, wanted.features), partitions)).numbers
        rows.append({"epoch": epoch, **numbers})
    if not rows:
        # --restart would discard every cell of the table.
        raise InputError(
            f"{cell.config.folder} was measured before, and its checkpoints are gone: remove it to have it trained anew"
        )
    load_encoder(model.encoder, cell.config.folder / "model" / "encoder.safetensors")
    return Evaluation({}, arrays={f"course/{name}": np.array([row[name] for row in rows]) for name in rows[0]})


def joined(one: Evaluation, other: Evaluation) -> Evaluation:
    return Evaluation(
        {**one.numbers, **other.numbers}, {**one.intervals, **other.intervals}, {**one.arrays, **other.arrays}
    )


def evaluation_of(cell: Cell, measure_name: str) -> Evaluation:
    """What a finished cell's measure found."""
    prefix = f"{measure_name}/"
    with np.load(cell.folder / ARRAYS) as stored:
        arrays = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
    numbers = cell.record()["numbers"]
    return Evaluation({n.removeprefix(prefix): v for n, v in numbers.items() if n.startswith(prefix)}, arrays=arrays)
