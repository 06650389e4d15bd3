"""`python -m trainer.reproduce table2 --protocols mnist cifar10`: a table or figure of the paper, end to end.

Builds, trains and evaluates what the experiment lists, for every protocol, split and seed, and prints the published
figures beside the measured ones. The same command goes on where it stopped: a finished cell is not computed again, an
unfinished one resumes from its checkpoint, a failed one is tried again.

    reproductions/table2/short/config.json, log.txt         what was asked, what happened
                               gradmix-cifar10-0-seed0/     each cell's run folder; evaluation.json has its numbers
                               report.html, table.*         measured beside published; budget, hardware, commit
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from data_pipeline import cli
from data_pipeline.beton import Build, folder_name, read_build
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError, unknown_name
from data_pipeline.ffcv_writer import Encoding
from data_pipeline.files import read_json, replacing, write_json
from data_pipeline.loader import Partitions
from data_pipeline.protocols import Protocol, split_count
from data_pipeline.run_folder import NullRunFolder, RunFolder, source_commit
from data_pipeline.sources import SOURCE_KINDS
from trainer import checkpoint, plots
from trainer.attribution_maps import Coverage
from trainer.config import Phase, TrackingConfig, TrainConfig
from trainer.distributed import from_first_rank, world_size
from trainer.encoder import Encoder, load_encoder
from trainer.engine import join_ranks, read_deepspeed_config
from trainer.evaluators import Evaluation, FeatureModel, Features, Subject
from trainer.experiments import (
    ALIASES,
    EXPERIMENTS,
    REMARKS,
    Column,
    Measure,
    Row,
    Variant,
    experiment,
    published,
)
from trainer.presentation import present
from trainer.registry import OpenSetModel
from trainer.report import Number, TableResult, provenance, write_report
from trainer.robustness import AdversarialAttacks, CommonCorruptions
from trainer.tracking import (
    JournalTracker,
    Link,
    check_store,
    deliver,
    discard_journal,
    resolve_uri,
    went_through,
    without_password,
)
from trainer.train import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = "—"
_WIDTH = 140
"""Columns of a table in a file."""


class Budget(NamedTuple):
    """What a cell may cost at most; None: no limit."""

    epochs: int | None = None
    images: int | None = None
    width: int | None = None
    batch_size: int | None = None
    tested: int | None = None
    """Test images of what takes long: corruptions, attacks, attribution."""

    def applied(self, config: TrainConfig) -> TrainConfig:
        """`config` within this budget; a warm-up keeps its share of the epochs."""
        phases = scaled([Phase.parse(text) for text in config.phases], self.epochs)
        # Phases replace the epochs.
        epochs = config.epochs if phases else _least(self.epochs, config.epochs)
        share = (sum(phase.epochs for phase in phases) or epochs) / config.total_epochs
        warmup = config.optimizer.warmup_epochs * share
        return dataclasses.replace(
            config,
            epochs=epochs,
            phases=tuple(map(str, phases)),
            batch_size=_least(self.batch_size, config.batch_size),
            encoder=dataclasses.replace(config.encoder, width=_least(self.width, config.encoder.width)),
            optimizer=dataclasses.replace(config.optimizer, warmup_epochs=warmup),
        )

    def measured(self, variant: Variant) -> Variant:
        """`variant`, its evaluators within this budget."""
        measures = {}
        for name, wanted in variant.measures.items():
            evaluator = wanted.evaluator
            if self.tested is not None and isinstance(evaluator, (CommonCorruptions, AdversarialAttacks, Coverage)):
                most = self.tested if evaluator.max_images is None else min(self.tested, evaluator.max_images)
                evaluator = dataclasses.replace(evaluator, max_images=most)
            measures[name] = dataclasses.replace(wanted, evaluator=evaluator)
        return dataclasses.replace(variant, measures=measures)

    def train_images(self, protocol: Protocol) -> int | None:
        """Training images to build; at least 20 of each class, since a score sums the 10 nearest."""
        return self.images and max(self.images, 20 * len(protocol.known))

    def __str__(self) -> str:
        limits = {
            f"{self.epochs} epochs": self.epochs,
            f"{self.images} training images": self.images,
            f"width {self.width}": self.width,
            f"batches of {self.batch_size}": self.batch_size,
            f"{self.tested} test images for what takes long": self.tested,
        }
        said = [text for text, limit in limits.items() if limit is not None]
        return f"at most {', '.join(said)}" if said else "nothing is cut short"


BUDGETS = {
    "smoke": Budget(epochs=2, images=600, width=4, batch_size=64, tested=100),
    "short": Budget(epochs=20, images=5000, width=16, batch_size=64, tested=1000),
    "full": Budget(),
}


def scaled(phases: Sequence[Phase], limit: int | None) -> list[Phase]:
    """The phases in their proportions within `limit` epochs, each of 1 epoch at least."""
    total = sum(phase.epochs for phase in phases)
    if limit is None or total <= limit:
        return list(phases)
    epochs = [max(phase.epochs * limit // total, 1) for phase in phases]
    # What rounding left over, or took too much, is the longest phase's.
    longest = epochs.index(max(epochs))
    epochs[longest] = max(epochs[longest] + limit - sum(epochs), 1)
    return [dataclasses.replace(phase, epochs=number) for phase, number in zip(phases, epochs)]


def _least(limit: int | None, value: int) -> int:
    return value if limit is None else min(limit, value)


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which experiment, on what, how thoroughly."""

    experiment: Annotated[str, tyro.conf.Positional]
    """table1 to table5, figure2 to figure6, or beyond."""
    protocols: tuple[str, ...] = ()
    """Protocols to run it on. Default: the paper's."""
    splits: tuple[int, ...] = ()
    """Splits of each protocol, from 0. Default: all that it has."""
    seeds: tuple[int, ...] = ()
    """Training seeds. Default: the experiment's, mostly 0 alone."""
    variants: tuple[str, ...] = ()
    """Which of the experiment's ways to train, as --dry-run lists them. Default: all."""
    budget: Literal["smoke", "short", "full"] = "full"
    """smoke: does it run at all; short: 5,000 images, 20 epochs, a quarter of the width; full: nothing is cut short.
    The table says how long each row was trained, and where the paper leaves that open."""
    data: Path = Path("data")
    """Data folder; what is not built yet is built there."""
    source: str | None = None
    """Where images come from, as for data_pipeline.build."""
    root: Path | None = None
    """Folder of the images, as for data_pipeline.build; several datasets may lie in sub-folders named after them."""
    folder: Path = Path("reproductions")
    """Where run folders and tables go, below EXPERIMENT/BUDGET."""
    dry_run: bool = False
    """Say what would be done and about how long it takes, and do nothing."""
    restart: bool = False
    """Discard what the cells' folders hold and compute everything again."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON, as for trainer.train."""
    workers: int = 1
    """FFCV decoding threads of each rank; 1 or more."""
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment="gradmix-reproduce", alias="", offline=True)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "experiment", ALIASES.get(self.experiment, self.experiment))
        experiment(self.experiment)
        for name in ("protocols", "splits", "seeds", "variants"):
            # A value given twice is one run, not two.
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in self.protocols:
            split_count(name)
        known = [variant.name for variant in experiment(self.experiment).variants]
        for name in self.variants:
            if name not in known:
                raise unknown_name("variant", name, known)
        if min((*self.splits, *self.seeds), default=0) < 0:
            raise InputError("a split or a seed is below 0: set --splits and --seeds to 0 or more")

    @property
    def command(self) -> str:
        """What decides the table, as it is typed."""
        lists = {name: getattr(self, name) for name in ("protocols", "splits", "seeds", "variants")}
        chosen = [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items() if values]
        return " ".join(["python -m trainer.reproduce", self.experiment, *chosen, f"--budget {self.budget}"])

    @property
    def path(self) -> Path:
        return self.folder / self.experiment / self.budget


@dataclass(frozen=True)
class Cell:
    """One model to train and measure."""

    variant: Variant
    protocol: Protocol
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.protocol.name}-{self.config.split}-seed{self.config.seed}"

    @property
    def request(self) -> dict[str, Any]:
        """What decides its numbers; a cell with other ones is computed again."""
        deepspeed = self.config.deepspeed_config
        return {
            "training": self.config.identity,
            "deepspeed": deepspeed and hashlib.sha256(deepspeed.read_bytes()).hexdigest(),
            "measures": {name: repr(measure) for name, measure in self.variant.measures.items()},
            "split_hash": self.protocol.split_hash,
        }

    def record(self) -> dict[str, Any] | None:
        """Its numbers, if they were found earlier and all that they were found with is there, whole."""
        folder = self.config.folder
        try:
            record = read_json(folder / "evaluation.json", "evaluation")
        except InputError:
            return None
        whole = isinstance(record, dict) and record.keys() >= _RECORDED and zipfile.is_zipfile(folder / "arrays.npz")
        return record if whole and record["request"] == self.request else None


_RECORDED = {
    "request", "numbers", "intervals", "epochs", "train_images", "test_images", "train_seconds", "commit", "hardware",
    "versions",
}  # fmt: skip
"""What a finished cell's `evaluation.json` says."""


def plan(config: ReproduceConfig) -> list[Cell]:
    """Every cell, so that what was computed when time runs out covers all rows of the first split."""
    chosen, budget = experiment(config.experiment), BUDGETS[config.budget]
    variants = [budget.measured(v) for v in chosen.variants if not config.variants or v.name in config.variants]
    protocols = config.protocols or chosen.protocols
    cells = []
    for seed in config.seeds or chosen.seeds:
        for split in config.splits or chosen.splits or range(max(map(split_count, protocols))):
            for name in protocols:
                if split >= split_count(name) and not config.splits:
                    continue  # this protocol has fewer than another
                full = Protocol(name, split)
                classes = dataclasses.replace(full.classes, train_images=budget.train_images(full))
                for variant in variants:
                    trained = budget.applied(variant.config(name))
                    stretches = max(each.course for each in variant.measures.values())
                    if stretches:
                        every = max(trained.total_epochs // stretches, 1)
                        trained = dataclasses.replace(
                            trained, checkpoint_every=every, keep_checkpoints=trained.total_epochs
                        )
                    trained = dataclasses.replace(
                        trained,
                        split=split,
                        seed=seed,
                        run_dir=config.path / f"{variant.name}-{name}-{split}-seed{seed}",
                        restart=config.restart,
                        deepspeed_config=config.deepspeed_config,
                        workers=config.workers,
                        tracking=config.tracking,
                    )
                    cells.append(Cell(variant, dataclasses.replace(full, classes=classes), trained))
    return cells


def reproduce(config: ReproduceConfig, console: Console) -> TableResult | None:
    """Compute what is missing; returns the table, or nothing on a dry run.

    Raises:
        InputError: a cell failed; all others were computed, and the table is written without it.
    """
    device = join_ranks()
    read_deepspeed_config(config.deepspeed_config, device)  # says what is wrong with it before anything is done
    cells = plan(config)
    missing = from_first_rank(lambda: {cell.name for cell in cells if config.restart or cell.record() is None})
    todo = [cell for cell in cells if cell.name in missing]
    from_first_rank(lambda: console.print(overview(config, cells, missing, device)))
    if config.dry_run:
        return None
    run = opened(config, console)
    data = Data(config, device, console)
    failed, tracking = [], config.tracking
    for number, cell in enumerate(todo, 1):
        tracking = from_first_rank(partial(answering, tracking, run))
        cell = dataclasses.replace(cell, config=dataclasses.replace(cell.config, tracking=tracking))
        run.log(f"[{number}/{len(todo)}] {cell.name}, {config.budget} budget")
        try:
            found = compute(config.experiment, cell, data.of(cell.protocol), console)
        except cli.Preempted:
            run.log(f"stopped by the system in {cell.name}: the same command goes on there")
            raise
        except InputError as error:
            failed.append(f"{cell.name}: {error}")
        except Exception as error:
            if world_size() > 1:  # the other ranks wait for this one, and have to end with it
                raise
            trace = config.path / f"{cell.name}.error.txt"
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            failed.append(f"{cell.name}: {type(error).__name__}: {error} (see {trace})")
        else:
            run.log(f"{found} ({config.budget} budget)")
            (config.path / f"{cell.name}.error.txt").unlink(missing_ok=True)
            continue
        run.log(f"failed, going on with the next: {failed[-1]}")
    result = from_first_rank(lambda: write_tables(config, cells, failed, console))
    if not config.tracking.offline:
        from_first_rank(lambda: record_table(config, result, run))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(cells)} cells failed; the same command tries them again. First: {failed[0]}"
        )
    return result


def answering(tracking: TrackingConfig, run: RunFolder | NullRunFolder) -> TrackingConfig:
    """`tracking`, from here on offline if its store does not answer: what is computed is worth more than where it is
    recorded, and can be delivered later."""
    if not tracking.offline:
        try:
            check_store(resolve_uri(tracking.uri))
        except InputError as error:
            run.log(f"going on without MLflow; python -m trainer.tracking sync {run.path}/* delivers later ({error})")
            return dataclasses.replace(tracking, offline=True)
    return tracking


def record_table(config: ReproduceConfig, result: TableResult, run: RunFolder) -> None:
    """The table as an MLflow run, its numbers as metrics at the step of how many cells are finished, its files as
    artifacts. The same table goes to the same run again."""
    uri, experiment_name = resolve_uri(config.tracking.uri), config.tracking.experiment
    if config.restart:
        discard_journal(run.path)
    link = Link.open(run.path, uri=uri, experiment=experiment_name)
    link.replaced(run_name=f"{config.experiment}-{config.budget}").save(run.path)
    tracker = JournalTracker(run.path, uri=uri, experiment=experiment_name, offline=True)
    numbers = {}
    for label, protocol, *values in result.rows:
        for title, value in zip(result.columns[2:], values):
            if isinstance(value, Number) and value.value is not None:
                # MLflow takes no other characters.
                numbers[re.sub(r"[^\w\-. /]", "-", f"{protocol}/{label}/{title}")] = value.value
    if numbers:
        finished = int(result.facts["cells"].split()[0])
        tracker.log(numbers, step=finished)
    tracker.close("FINISHED")
    delivered = answering(config.tracking, NullRunFolder(run.path)) == config.tracking and went_through(
        lambda: deliver(run.path)
    )
    run.log(
        f"recorded in {without_password(uri)}, experiment {experiment_name}"
        if delivered
        else f"MLflow at {without_password(uri)} did not take the table: python -m trainer.tracking sync {run.path} "
        "delivers it later"
    )


def opened(config: ReproduceConfig, console: Console) -> RunFolder | NullRunFolder:
    """The experiment's own folder, with what was asked."""
    folders: list[RunFolder] = []

    def open_folder() -> None:
        folders.append(RunFolder(config.path, console))
        asked = {key: str(value) for key, value in dataclasses.asdict(config).items()}
        folders[0].write_config({"config": asked, "commit": source_commit()})

    from_first_rank(open_folder)
    return folders[0] if folders else NullRunFolder(config.path)


def overview(config: ReproduceConfig, cells: Sequence[Cell], missing: set[str], device: torch.device) -> Table:
    """What will be done, and a rough estimate from one timed step of each network."""
    table = Table(
        "variant", "protocol", "splits x seeds", "finished", "images", "epochs", "about",
        title=f"{experiment(config.experiment).title}: {len(missing)} of {len(cells)} cells to compute, budget "
        f"{config.budget} ({BUDGETS[config.budget]})",
        caption="Training time alone, from one timed step of each network on this machine, one process.",
    )  # fmt: skip
    total, groups = 0.0, {}
    for cell in cells:
        groups.setdefault((cell.variant.name, cell.protocol.name), []).append(cell)
    for (variant, protocol), members in groups.items():
        first, open_ = members[0], [cell for cell in members if cell.name in missing]
        images = training_images(first.protocol)
        views = images * first.config.total_epochs * (3 if first.config.mixing.kind != "none" else 2)
        seconds = len(open_) * views * seconds_per_view(first, device) if open_ else 0.0
        total += seconds
        done = len(members) - len(open_)
        epochs = str(first.config.total_epochs)
        table.add_row(variant, protocol, str(len(members)), str(done), f"{images:,}", epochs, duration(seconds))
    table.add_section()
    table.add_row("all", "", str(len(cells)), str(len(cells) - len(missing)), "", "", duration(total))
    return table


_PER_CLASS = {"digits": 134, "mnist": 6000, "svhn": 7326, "cifar10": 5000, "cifar100": 500, "tinyimagenet": 500}


def training_images(protocol: Protocol) -> int:
    """About how many training images the protocol has."""
    low, high = protocol.train.share
    whole = round(_PER_CLASS[protocol.classes.dataset] * (high - low) * len(protocol.known))
    return _least(protocol.classes.train_images, whole)


def seconds_per_view(cell: Cell, device: torch.device) -> float:
    """Of a training step, forward and backward, timed once for each network."""
    return _timed(cell.config.encoder, cell.protocol.info.image_size, cell.protocol.info.channels, device)


@cache
def _timed(config: Any, size: int, channels: int, device: torch.device, views: int = 48) -> float:
    encoder, batch = Encoder(config, channels).to(device), torch.randn(views, channels, size, size, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")
    taken = []
    for _ in range(2):  # the first is slower
        started = time.perf_counter()
        with autocast:
            total = encoder(batch).embeddings.sum()
        total.backward()
        total.item()
        taken.append(time.perf_counter() - started)
    return min(taken) / views


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


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


def compute(name: str, cell: Cell, partitions: Partitions, console: Console) -> str:
    """Train and measure one cell of experiment `name`; its numbers go to evaluation.json. Returns a line about them."""
    # Somebody who watches sees a progress bar; the epochs of all cells would bury the table in a file.
    shown = console if console.is_terminal else None
    if cell.config.restart:
        from_first_rank(lambda: (cell.config.folder / "evaluation.json").unlink(missing_ok=True))
    train(dataclasses.replace(cell.config, data=partitions.build.folder), shown, partitions)

    def measured() -> str:
        measure(cell, partitions)
        return numbers_line(name, cell)

    return from_first_rank(measured)


def measure(cell: Cell, partitions: Partitions) -> None:
    folder = cell.config.folder
    model = OpenSetModel.load(folder / "model", partitions.device)

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
    with replacing(folder / "arrays.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, **found.arrays)
    trained, asked = read_json(folder / "metrics.json", "metrics"), read_json(folder / "config.json", "configuration")
    record = {
        "request": cell.request,
        "numbers": found.numbers,
        "intervals": {name: [interval.low, interval.high] for name, interval in found.intervals.items()},
        "epochs": trained["epochs"],
        "train_images": trained["train_images"],
        "test_images": tested,
        "train_seconds": trained["train_seconds"],
        "commit": asked["commit"] or "not in a checkout",
        "hardware": provenance()["hardware"],
        "versions": provenance()["versions"],
    }
    write_json(folder / "evaluation.json", record)
    # The model is kept; the states on the way to it, with the optimizer's memory, have served.
    checkpoint.discard(folder)


def course_of(wanted: Measure, cell: Cell, model: OpenSetModel, partitions: Partitions) -> Evaluation:
    """What the evaluator finds at the checkpoints that were kept: arrays course/epoch (T,) and course/NUMBER (T,)."""
    rows: list[dict[str, float]] = []
    for epoch, weights in checkpoint.encoders(cell.config.folder).items():
        load_encoder(model.encoder, weights)
        numbers = wanted.evaluator(Subject(FeatureModel.of(model, wanted.features), partitions)).numbers
        rows.append({"epoch": epoch, **numbers})
    if not rows:
        raise InputError(f"{cell.config.folder} was measured before, and its checkpoints are gone: add --restart")
    load_encoder(model.encoder, cell.config.folder / "model" / "encoder.safetensors")
    return Evaluation({}, arrays={f"course/{name}": np.array([row[name] for row in rows]) for name in rows[0]})


def joined(one: Evaluation, other: Evaluation) -> Evaluation:
    return Evaluation(
        {**one.numbers, **other.numbers}, {**one.intervals, **other.intervals}, {**one.arrays, **other.arrays}
    )


def numbers_line(name: str, cell: Cell) -> str:
    """What the table says of a cell alone, for the log."""
    chosen, lines = experiment(name), []
    for row in chosen.rows:
        if row.variant == cell.variant.name:
            found = [f"{column.title} {number_of(column, row, [cell], {}).text}" for column in chosen.columns]
            lines.append(f"{row.label}: {', '.join(found)}")
    return "; ".join(lines)


def write_tables(
    config: ReproduceConfig, cells: Sequence[Cell], failed: Sequence[str], console: Console
) -> TableResult:
    """Print the experiment's table and save it as text, JSON, CSV and a page with pictures."""
    result = table_of(config, cells, failed)
    console.print(result.to_rich())
    for line in (*result.notes, *(f"{name}: {text}" for name, text in result.facts.items())):
        console.print(line, markup=False, highlight=False)
    text = Console(file=StringIO(), width=_WIDTH)
    text.print(result.to_rich())
    with replacing(config.path / "table.txt") as partial:
        partial.write_text(text.file.getvalue(), encoding="utf-8")
    console.print(f"written to {write_report(result, config.path)}", markup=False, highlight=False)
    return result


def table_of(config: ReproduceConfig, cells: Sequence[Cell], failed: Sequence[str] = ()) -> TableResult:
    """Every row of every protocol: those that are published only, in the paper's order, then those that are measured.

    A number is the mean over splits and seeds, its spread their standard deviation.
    """
    chosen, figures = experiment(config.experiment), published(config.experiment)
    theirs = [label for label in figures["rows"] if label not in {row.label for row in chosen.rows}]
    lines: list[tuple[Any, ...]] = []
    for protocol in dict.fromkeys(cell.protocol.name for cell in cells):
        for label in theirs:
            paper = figures["rows"][label].get(protocol)
            if paper is not None:
                found = [Number(value=None, published=paper.get(column.number)) for column in chosen.columns]
                lines.append((label, protocol, *found, None, None, None, None))
        for row in chosen.rows:
            own = cells_of(row, protocol, cells)
            if own:
                paper = figures["rows"].get(row.label, {}).get(protocol, {})
                found = [number_of(column, row, own, paper) for column in chosen.columns]
                lines.append((row.label, protocol, *found, *effort(own)))
    marks = {label: mark for label, mark in figures["marks"].items() if any(line[0] == label for line in lines)}
    done = [record for record in (cell.record() for cell in cells) if record]
    tested: dict[str, dict[str, int]] = {}
    for cell, record in ((cell, cell.record()) for cell in cells):
        if record:
            tested.setdefault(cell.protocol.name, {}).update(record["test_images"])
    units = [f"{column.title} (%)" if column.percent else column.title for column in chosen.columns]
    return TableResult(
        title=chosen.title,
        budget=config.budget,
        caption=f"Budget {config.budget}: {BUDGETS[config.budget]}. Mean ± standard deviation over runs; "
        "published: what the paper prints.",
        columns=("row", "protocol", *units, "runs", "train images", "epochs", "training"),
        rows=tuple((f"{line[0]} *" if line[0] in marks else line[0], *line[1:]) for line in lines),
        notes=(
            *(f"* {label}: {mark}." for label, mark in marks.items()),
            *chosen.notes,
            *intervals_note(lines),
            *schedules(cells),
        ),
        figures=pictures(config.experiment, config.budget, cells),
        facts={
            "command": config.command,
            "test images": "; ".join(f"{name} {counted(by)}" for name, by in tested.items()) or NONE,
            "cells": f"{len(done)} of {len(cells)} finished" + (f", {len(failed)} failed" if failed else ""),
            **{name: "; ".join(sorted({r[name] for r in done})) or NONE for name in ("commit", "hardware", "versions")},
            **{f"failed {number}": text for number, text in enumerate(failed, 1)},
        },
    )


def counted(images: Mapping[str, int]) -> str:
    """How many test images each measure had; one number where all had as many."""
    if len(set(images.values())) == 1:
        return f"{next(iter(images.values())):,}"
    return ", ".join(f"{count:,} ({measure})" for measure, count in images.items())


def schedules(cells: Sequence[Cell]) -> list[str]:
    """How long, and with which weights, the variants are trained on each protocol, and what is known to differ."""
    trained: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        variants = trained.setdefault(schedule_text(cell.config), {}).setdefault(cell.protocol.name, [])
        if cell.variant.name not in variants:
            variants.append(cell.variant.name)
    lines = []
    for text, protocols in trained.items():
        # Protocols whose variants are the same are named together.
        groups: dict[tuple[str, ...], list[str]] = {}
        for protocol, variants in protocols.items():
            groups.setdefault(tuple(variants), []).append(protocol)
        who = "; ".join(f"{', '.join(variants)} on {', '.join(names)}" for variants, names in groups.items())
        lines.append(f"Trained for {text}: {who}.")
    configs = [cell.config for cell in cells]
    return lines + [remark for applies, remark in REMARKS if any(map(applies, configs))]


def schedule_text(config: TrainConfig) -> str:
    """The epochs of each stretch, with θ and λ where the objective has them."""
    stretches = []
    for epochs, objective in config.schedule:
        weights = f" of θ = {objective.theta:g}, λ = {objective.lam:g}" if hasattr(objective, "theta") else ""
        stretches.append(f"{epochs} {'epoch' if epochs == 1 else 'epochs'}{weights}")
    return ", then ".join(stretches)


def intervals_note(lines: Sequence[Sequence[Any]]) -> list[str]:
    """What the intervals are, if there are any."""
    if not any(cell.interval for line in lines for cell in line if isinstance(cell, Number)):
        return []
    return [
        "± is the standard deviation over runs. The interval below a number is of drawing the test images anew: of one "
        "run its 95 % bootstrap interval, of several their mean more and less the mean half-width of their intervals."
    ]


def cells_of(row: Row, protocol: str, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if (cell.variant.name, cell.protocol.name) == (row.variant, protocol)]


def number_of(column: Column, row: Row, cells: Sequence[Cell], paper: Mapping[str, float]) -> Number:
    """Mean and spread of what a row's cells measured, its interval, and what the paper prints.

    The interval of a single cell is its own; of several, the mean more and less the mean half-width of theirs.
    """
    name, scale = column.of(row), 100.0 if column.percent else 1.0
    records = [record for record in (cell.record() for cell in cells) if record]
    values = [scale * record["numbers"][name] for record in records]
    low = high = None
    intervals = [record["intervals"][name] for record in records if name in record["intervals"]]
    if len(intervals) == 1 == len(records):
        low, high = (scale * end for end in intervals[0])
    elif intervals:
        half = statistics.fmean(scale * (high - low) / 2 for low, high in intervals)
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    return Number(
        value=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        low=low,
        high=high,
        published=paper.get(column.number),
    )


def effort(cells: Sequence[Cell]) -> list[str | None]:
    """Runs, training images, epochs and time of a row."""
    records = [record for record in (cell.record() for cell in cells) if record]
    if not records:
        return [f"0 of {len(cells)}", None, None, None]
    runs = str(len(records)) if len(records) == len(cells) else f"{len(records)} of {len(cells)}"
    images = sorted({f"{record['train_images']:,}" for record in records})
    seconds = statistics.fmean(record["train_seconds"] for record in records)
    return [runs, " or ".join(images), str(records[0]["epochs"]), duration(seconds)]


def pictures(name: str, budget: str, cells: Sequence[Cell]) -> dict[str, Figure]:
    """For each protocol: the first column of all rows, what each kind of evaluator has to show of one run of each row,
    and the course of training."""
    chosen, drawn = experiment(name), {}
    for protocol in dict.fromkeys(cell.protocol.name for cell in cells):
        rows = [row for row in chosen.rows if any(cell.record() for cell in cells_of(row, protocol, cells))]
        if rows:
            numbers = numbers_figure(name, rows, protocol, cells)
            others = {column.measure for column in chosen.columns} - {None}
            run, members = same_run(rows, protocol, cells)
            found = {**evaluator_figures(members, others), **course_figures(members)}
            for figure in found.values():
                # Beside the title of a figure of many axes, above that of a single one.
                title = ": ".join(filter(None, (figure.get_suptitle(), f"{protocol}, {run}")))
                figure.suptitle(title, x=0.01, ha="left", fontsize=11)
            for title, figure in {"numbers": numbers, **found}.items():
                mean = "Mean over all runs. " if figure is numbers else ""
                plots.with_note(figure, f"{mean}Budget {budget}.")
                drawn[f"{protocol.replace('+', '-')}_{title}"] = figure
    return drawn


def same_run(rows: Sequence[Row], protocol: str, cells: Sequence[Cell]) -> tuple[str, dict[Row, Cell]]:
    """The split and seed that most of the rows have finished, the first of several, and their cells of it. Rows beside
    each other in one picture are of the same images and start from the same random numbers."""
    runs: dict[tuple[int, int], dict[Row, Cell]] = {}
    for row in rows:
        for cell in cells_of(row, protocol, cells):
            if cell.record():
                runs.setdefault((cell.config.split, cell.config.seed), {})[row] = cell
    # In the plan's order, whichever row came first.
    planned = dict.fromkeys((cell.config.split, cell.config.seed) for cell in cells)
    split, seed = max((run for run in planned if run in runs), key=lambda run: len(runs[run]))
    return f"split {split}, seed {seed}", runs[split, seed]


def numbers_figure(name: str, rows: Sequence[Row], protocol: str, cells: Sequence[Cell]) -> Figure:
    chosen, found = experiment(name), {}
    column = chosen.columns[0]
    for row in rows:
        paper = published(name)["rows"].get(row.label, {}).get(protocol, {})
        found[row.label] = number_of(column, row, cells_of(row, protocol, cells), paper)
    ends = [None if n.spread is None else (n.value - n.spread, n.value + n.spread) for n in found.values()]
    return plots.grouped_points(
        list(found),
        {column.title: [each.value for each in found.values()]},
        errors={column.title: ends} if any(ends) else None,
        published=[each.published for each in found.values()],
        title=f"{chosen.title}: {protocol}",
        label=f"{column.title} (percent)" if column.percent else column.title,
    )


def evaluator_figures(shown: Mapping[Row, Cell], others: set[str]) -> dict[str, Figure]:
    """The rows side by side, one cell of each, by their own measure and by `others`; those of one kind share their
    pictures."""
    kinds: dict[type, dict[str, Evaluation]] = {}
    evaluators = {}
    for row, cell in shown.items():
        for name in {row.measure: None, **dict.fromkeys(others)}:
            evaluator = cell.variant.measures[name].evaluator
            evaluators.setdefault(type(evaluator), evaluator)
            kinds.setdefault(type(evaluator), {})[row.label] = evaluation_of(cell, name)
    figures = {}
    for kind, evaluations in kinds.items():
        for title, figure in present(evaluators[kind], evaluations).figures.items():
            figures[f"{kind.__name__}_{title}"] = figure
    return figures


def evaluation_of(cell: Cell, measure_name: str) -> Evaluation:
    """What a finished cell's measure found."""
    prefix = f"{measure_name}/"
    with np.load(cell.config.folder / "arrays.npz") as stored:
        arrays = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
    numbers = cell.record()["numbers"]
    return Evaluation({n.removeprefix(prefix): v for n, v in numbers.items() if n.startswith(prefix)}, arrays=arrays)


def course_figures(shown: Mapping[Row, Cell]) -> dict[str, Figure]:
    courses: dict[str, dict[str, list[float]]] = {}
    epochs: list[float] = []
    for row, cell in shown.items():
        arrays = evaluation_of(cell, row.measure).arrays
        for name in arrays:
            if name.startswith("course/") and name != "course/epoch":
                epochs = arrays["course/epoch"].tolist()
                courses.setdefault(name.removeprefix("course/"), {})[row.label] = (100 * arrays[name]).tolist()
    return {
        f"course_{name}": plots.lines(
            epochs,
            series,
            title=f"{plain(name)} over training",
            x_label="epochs",
            y_label=f"{plain(name)} (percent)",
            markers=True,
        )
        for name, series in courses.items()
    }


def plain(name: str) -> str:
    return name.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


@dataclass(frozen=True)
class _Launch:
    """The option that is read before the others."""

    local_rank: int = 0
    """Given by the deepspeed launcher; the environment says the same."""


def main() -> None:
    _, rest = tyro.cli(_Launch, return_unknown_args=True, add_help=False)
    config = cli.parse(
        ReproduceConfig,
        args=rest,
        prog="python -m trainer.reproduce",
        description="Compute a table or figure of the paper and show it beside the published one. "
        f"Experiments: {', '.join(EXPERIMENTS)}.",
    )
    width = None if sys.stdout.isatty() else _WIDTH
    reproduce(config, Console(soft_wrap=True, width=width, quiet=os.environ.get("RANK", "0") != "0"))


if __name__ == "__main__":
    cli.run(main)
