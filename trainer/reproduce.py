"""`python -m trainer.reproduce table2 --protocols mnist cifar10`: a table or figure of the paper, end to end.

Builds, trains and evaluates what the experiment lists, for every protocol, split and seed, and prints the published
figures beside the measured ones. The same command goes on where it stopped: a finished cell is not computed again, an
unfinished one resumes from its checkpoint, a failed one is tried again.

    reproductions/table2/short/config.json, log.txt         what was asked, what happened
                               gradmix-cifar10-0-seed0/     each cell's run folder; evaluation.json has its numbers
                               table.json, table.txt        measured beside published; budget, hardware, commit
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

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
from trainer.config import TrackingConfig, TrainConfig
from trainer.distributed import from_first_rank, world_size
from trainer.encoder import Encoder
from trainer.engine import join_ranks
from trainer.evaluators import FeatureModel, Subject
from trainer.experiments import EXPERIMENTS, Column, Experiment, Row, Variant, experiment, published
from trainer.registry import OpenSetModel
from trainer.train import train

NONE = "—"
_WIDTH = 140
"""Columns of a table in a file."""


class Budget(NamedTuple):
    """What a cell may cost at most; None: as published."""

    epochs: int | None = None
    images: int | None = None
    width: int | None = None
    batch_size: int | None = None

    def applied(self, config: TrainConfig) -> TrainConfig:
        """`config` within this budget; a warm-up keeps its share of the epochs."""
        epochs = _least(self.epochs, config.epochs)
        warmup = config.optimizer.warmup_epochs * epochs / config.epochs
        return dataclasses.replace(
            config,
            epochs=epochs,
            batch_size=_least(self.batch_size, config.batch_size),
            encoder=dataclasses.replace(config.encoder, width=_least(self.width, config.encoder.width)),
            optimizer=dataclasses.replace(config.optimizer, warmup_epochs=warmup),
        )

    def train_images(self, protocol: Protocol) -> int | None:
        """Training images to build; at least 20 of each class, since a score sums the 10 nearest."""
        return self.images and max(self.images, 20 * len(protocol.known))

    def __str__(self) -> str:
        limits = {
            f"{self.epochs} epochs": self.epochs,
            f"{self.images} training images": self.images,
            f"width {self.width}": self.width,
            f"batches of {self.batch_size}": self.batch_size,
        }
        said = [text for text, limit in limits.items() if limit is not None]
        return f"at most {', '.join(said)}" if said else "as published"


BUDGETS = {
    "smoke": Budget(epochs=2, images=600, width=4, batch_size=64),
    "short": Budget(epochs=20, images=5000, width=16, batch_size=64),
    "full": Budget(),
}


def _least(limit: int | None, value: int) -> int:
    return value if limit is None else min(limit, value)


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which experiment, on what, how thoroughly."""

    experiment: Annotated[str, tyro.conf.Positional]
    """table1, table2, table3, table4, figure2 or figure3."""
    protocols: tuple[str, ...] = ()
    """Protocols to run it on. Default: the paper's."""
    splits: tuple[int, ...] = ()
    """Splits of each protocol, from 0. Default: all that it has."""
    seeds: tuple[int, ...] = ()
    """Training seeds. Default: the experiment's, mostly 0 alone."""
    variants: tuple[str, ...] = ()
    """Which of the experiment's ways to train, as --dry-run lists them. Default: all."""
    budget: Literal["smoke", "short", "full"] = "full"
    """smoke: does it run at all; short: 5,000 images, 20 epochs, a quarter of the width; full: as published."""
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
        experiment(self.experiment)
        for name in self.protocols:
            split_count(name)
        known = [variant.name for variant in experiment(self.experiment).variants]
        for name in self.variants:
            if name not in known:
                raise unknown_name("variant", name, known)
        if min((*self.splits, *self.seeds), default=0) < 0:
            raise InputError("a split or a seed is below 0: set --splits and --seeds to 0 or more")

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
        measures = {name: repr(measure) for name, measure in self.variant.measures.items()}
        return {"training": self.config.identity, "measures": measures, "split_hash": self.protocol.split_hash}

    def record(self) -> dict[str, Any] | None:
        """Its numbers, if they were found earlier."""
        path = self.config.folder / "evaluation.json"
        record = read_json(path, "evaluation") if path.is_file() else None
        return record if record and record.get("request") == self.request else None


def plan(config: ReproduceConfig) -> list[Cell]:
    """Every cell, so that what was computed when time runs out covers all rows of the first split."""
    chosen, budget = experiment(config.experiment), BUDGETS[config.budget]
    variants = [v for v in chosen.variants if not config.variants or v.name in config.variants]
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
                    trained = dataclasses.replace(
                        budget.applied(variant.config(name)),
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


def reproduce(config: ReproduceConfig, console: Console) -> dict[str, Any]:
    """Compute what is missing; returns what is written to `table.json`.

    Raises:
        InputError: a cell failed; all others were computed, and the table is written without it.
    """
    device = join_ranks()
    cells = plan(config)
    todo = [cell for cell in cells if config.restart or cell.record() is None]
    console.print(overview(config, cells, todo, device))
    if config.dry_run:
        return {}
    run = opened(config, console)
    data = Data(config, device, console)
    failed = []
    for number, cell in enumerate(todo, 1):
        run.log(f"[{number}/{len(todo)}] {cell.name}")
        try:
            compute(cell, data.of(cell.protocol), console)
        except InputError as error:
            failed.append(f"{cell.name}: {error}")
        except Exception as error:
            if world_size() > 1:  # the other ranks wait for this one, and have to end with it
                raise
            trace = config.path / f"{cell.name}.error.txt"
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            failed.append(f"{cell.name}: {type(error).__name__}: {error} (see {trace})")
        else:
            run.log(numbers_line(cell))
            (config.path / f"{cell.name}.error.txt").unlink(missing_ok=True)
            continue
        run.log(f"failed, going on with the next: {failed[-1]}")
    result = from_first_rank(lambda: write_tables(config, cells, failed, console))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(cells)} cells failed; the same command tries them again. First: {failed[0]}"
        )
    return result


def opened(config: ReproduceConfig, console: Console) -> RunFolder | NullRunFolder:
    """The experiment's own folder, with what was asked."""
    folders: list[RunFolder] = []

    def open_folder() -> None:
        folders.append(RunFolder(config.path, console))
        asked = {key: str(value) for key, value in dataclasses.asdict(config).items()}
        folders[0].write_config({"config": asked, "commit": source_commit()})

    from_first_rank(open_folder)
    return folders[0] if folders else NullRunFolder(config.path)


def overview(config: ReproduceConfig, cells: Sequence[Cell], todo: Sequence[Cell], device: torch.device) -> Table:
    """What will be done, and a rough estimate from one timed step of each network."""
    table = Table(
        "variant", "protocol", "splits x seeds", "finished", "images", "epochs", "about",
        title=f"{experiment(config.experiment).title}: {len(todo)} of {len(cells)} cells to compute, budget "
        f"{config.budget} ({BUDGETS[config.budget]})",
        caption="Training time alone, from one timed step of each network on this machine, one process.",
    )  # fmt: skip
    total, groups = 0.0, {}
    for cell in cells:
        groups.setdefault((cell.variant.name, cell.protocol.name), []).append(cell)
    for (variant, protocol), members in groups.items():
        first, open_ = members[0], [cell for cell in members if cell in todo]
        images = training_images(first.protocol)
        views = images * first.config.total_epochs * (3 if first.config.mixing.kind != "none" else 2)
        seconds = len(open_) * views * seconds_per_view(first, device) if open_ else 0.0
        total += seconds
        done = len(members) - len(open_)
        epochs = str(first.config.total_epochs)
        table.add_row(variant, protocol, str(len(members)), str(done), f"{images:,}", epochs, duration(seconds))
    table.add_section()
    table.add_row("all", "", str(len(cells)), str(len(cells) - len(todo)), "", "", duration(total))
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


def compute(cell: Cell, partitions: Partitions, console: Console) -> None:
    """Train and measure one cell; its numbers go to evaluation.json."""
    # Somebody who watches sees a progress bar; the epochs of all cells would bury the table in a file.
    shown = console if console.is_terminal else None
    train(dataclasses.replace(cell.config, data=partitions.build.folder), shown, partitions)
    from_first_rank(lambda: measure(cell, partitions))


def measure(cell: Cell, partitions: Partitions) -> None:
    folder = cell.config.folder
    model = OpenSetModel.load(folder / "model", partitions.device)
    subjects: dict[str, Subject] = {}
    numbers = {}
    for name, wanted in cell.variant.measures.items():
        if wanted.logits not in subjects:
            shown = FeatureModel.of(model) if wanted.logits == "gallery" else classifier_model(model)
            subjects[wanted.logits] = Subject(shown, partitions, model.card.class_names)
        found = wanted.evaluator(subjects[wanted.logits])
        numbers |= {f"{name}/{number}": value for number, value in found.numbers.items()}
    trained, asked = read_json(folder / "metrics.json", "metrics"), read_json(folder / "config.json", "configuration")
    record = {
        "request": cell.request,
        "numbers": numbers,
        "epochs": trained["epochs"],
        "train_images": trained["train_images"],
        "test_images": {n: partitions.build.record(n).count for n in ("test_known", "test_unknown") if n in partitions},
        "train_seconds": trained["train_seconds"],
        "hardware": hardware(partitions.device),
        "commit": asked["commit"],
        "versions": asked["versions"],
    }
    write_json(folder / "evaluation.json", record)


def classifier_model(model: OpenSetModel) -> FeatureModel:
    """A model with the logits that its network learnt, and the features that these are made of."""

    class Classifier(nn.Module):
        def __init__(self, encoder: Encoder) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            encoded = self.encoder(views, ["conv5_2"])
            return encoded.maps["conv5_2"].mean(dim=(2, 3)), encoded.logits

    card, encoder = model.card, model.encoder
    return FeatureModel(
        Classifier(encoder), image_size=card.image_size, mean=card.mean, std=card.std, layer=encoder.stages[-1]
    )


def hardware(device: torch.device) -> str:
    """What this run computes on, such as "2 x NVIDIA H100" or "1 x AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return f"{world_size()} x {torch.cuda.get_device_name(device)}"
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{world_size()} x {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def write_tables(config: ReproduceConfig, cells: Sequence[Cell], failed: Sequence[str], console: Console) -> dict:
    """Print the experiment's table for each protocol, and save it as JSON and as text."""
    chosen = experiment(config.experiment)
    records = {cell.name: cell.record() for cell in cells}
    done = [record for record in records.values() if record]
    result = {
        "experiment": config.experiment,
        "title": chosen.title,
        "budget": f"{config.budget}: {BUDGETS[config.budget]}",
        "cells": len(cells),
        "finished": len(done),
        "failed": list(failed),
        "hardware": sorted({record["hardware"] for record in done}),
        "commits": sorted({record["commit"] for record in done}),
        "versions": done[0]["versions"] if done else {},
        "notes": list(chosen.notes),
        "protocols": {
            name: protocol_rows(config.experiment, [cell for cell in cells if cell.protocol.name == name])
            for name in dict.fromkeys(cell.protocol.name for cell in cells)
        },
    }
    write_json(config.path / "table.json", result)
    text = Console(file=StringIO(), width=_WIDTH)
    for out in (console, text):
        for name, rows in result["protocols"].items():
            out.print(protocol_table(chosen, config, name, rows))
        for line in remarks(config.experiment, result):
            out.print(line, markup=False, highlight=False)
    with replacing(config.path / "table.txt") as partial:
        partial.write_text(text.file.getvalue(), encoding="utf-8")
    console.print(f"written to {config.path}", markup=False, highlight=False)
    return result


def protocol_rows(name: str, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The rows of one protocol: those that are published only, in the paper's order, then those that are measured."""
    chosen, protocol = experiment(name), cells[0].protocol.name
    figures = published(name)
    named = {row.label for row in chosen.rows}
    rows: list[dict[str, Any]] = [
        {"label": label, "published": columns[protocol], "measured": {}}
        for label, columns in figures["rows"].items()
        if label not in named and protocol in columns
    ]
    variants = {cell.variant.name for cell in cells}
    for row in chosen.rows:
        if row.variant in variants:
            shown = figures["rows"].get(row.label, {}).get(protocol, {})
            rows.append({"label": row.label, "published": shown, **measured_row(row, chosen.columns, cells)})
    for row in rows:
        row["mark"] = figures["marks"].get(row["label"]) if row["published"] else None
    return rows


def measured_row(row: Row, columns: Sequence[Column], cells: Sequence[Cell]) -> dict[str, Any]:
    """Mean and standard deviation over the cells of a row that are finished."""
    own = [cell for cell in cells if cell.variant.name == row.variant]
    records = [record for record in (cell.record() for cell in own) if record]
    values = {column.number: [r["numbers"][full_name(row, column)] for r in records] for column in columns}
    summed: dict[str, Any] = {
        "measured": {
            number: {"mean": statistics.fmean(each), "std": statistics.stdev(each) if len(each) > 1 else None}
            for number, each in values.items()
            if each
        },
        "runs": len(records),
        "of": len(own),
    }
    if records:
        summed |= {name: sorted({record[name] for record in records}) for name in ("epochs", "train_images")}
        summed["test_images"] = records[0]["test_images"]
        summed["train_seconds"] = statistics.fmean(record["train_seconds"] for record in records)
    return summed


def full_name(row: Row, column: Column) -> str:
    """A column's number as the row's measure names it, unless it names a measure of its own."""
    return column.number if "/" in column.number else f"{row.measure}/{column.number}"


def numbers_line(cell: Cell) -> str:
    """What was found of a cell, for the log."""
    numbers = cell.record()["numbers"]
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def protocol_table(chosen: Experiment, config: ReproduceConfig, protocol: str, rows: Sequence[dict]) -> Table:
    """One line a row; beside each number that is published for this protocol, the published one."""
    table = Table(title=f"{chosen.title}: {protocol}, budget {config.budget}", caption=effort(rows))
    table.add_column("", no_wrap=True)
    beside = [
        column for place, column in enumerate(chosen.columns)
        if place == 0 or any(short(column) in row["published"] for row in rows)
    ]  # fmt: skip
    for column in chosen.columns:
        if column in beside:
            table.add_column("paper", justify="right", style="dim")
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    for row in rows:
        line = [escape(row["label"]) + (" *" if row["mark"] else "")]
        for column in chosen.columns:
            if column in beside:
                figure = row["published"].get(short(column))
                line.append(NONE if figure is None else f"{figure:g}")
            line.append(measured_text(column, row["measured"].get(column.number)))
        runs = row.get("runs", 0)
        table.add_row(*line, NONE if not runs else str(runs) if runs == row["of"] else f"{runs} of {row['of']}")
    return table


def short(column: Column) -> str:
    return column.number.rpartition("/")[2]


def measured_text(column: Column, value: dict[str, float | None] | None) -> str:
    if value is None:
        return NONE
    spread = "" if value["std"] is None else f" ± {column.text(value['std'])}"
    return column.text(value["mean"]) + spread


def effort(rows: Sequence[dict[str, Any]]) -> str:
    """What the measured rows of a protocol took and were tested on."""
    done = [row for row in rows if row.get("runs")]
    if not done:
        return "nothing is measured yet"
    images, epochs = (
        " to ".join(f"{value:,}" for value in dict.fromkeys((min(found), max(found))))
        for found in ([value for row in done for value in row[name]] for name in ("train_images", "epochs"))
    )
    seconds = [row["train_seconds"] for row in done]
    tests = " and ".join(f"{n:,} {name.removeprefix('test_')}" for name, n in done[0]["test_images"].items())
    return (
        f"{images} training images, {epochs} epochs, {duration(min(seconds))} to {duration(max(seconds))} of training "
        f"a run; {tests} test images"
    )


def remarks(name: str, result: dict[str, Any]) -> list[str]:
    """What has to be said under a table."""
    marks = {row["label"]: row["mark"] for rows in result["protocols"].values() for row in rows if row["mark"]}
    commits, machines = ", ".join(result["commits"]) or NONE, "; ".join(result["hardware"]) or NONE
    return [
        f"Percent where not said otherwise; mean ± standard deviation over runs. Budget {result['budget']}.",
        f"{result['finished']} of {result['cells']} cells, on {machines}; commit {commits}.",
        *(f"* {label}: {mark}." for label, mark in marks.items()),
        *result["notes"],
        *(f"failed: {text}" for text in result["failed"]),
    ]


def main() -> None:
    config = cli.parse(
        ReproduceConfig,
        prog="python -m trainer.reproduce",
        description="Compute a table or figure of the paper and show it beside the published one. "
        f"Experiments: {', '.join(EXPERIMENTS)}.",
    )
    width = None if sys.stdout.isatty() else _WIDTH
    reproduce(config, Console(soft_wrap=True, width=width, quiet=os.environ.get("RANK", "0") != "0"))


if __name__ == "__main__":
    cli.run(main)
