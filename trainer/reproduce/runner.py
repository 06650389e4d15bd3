"""`python -m trainer.reproduce table2 --protocols mnist cifar10`: a table or figure of the paper, end to end.

Builds, trains and evaluates what the experiment lists, for every protocol, split and seed, and prints the published
figures beside the measured ones. The same command goes on where it stopped: a finished cell is not computed again, an
unfinished one resumes from its checkpoint, a failed one is tried again. What another table trained already is measured.

    reproductions/table2/short/config.json, log.txt         what was asked, what happened
                               gradmix-cifar10-0-seed0/     each cell's numbers and arrays, and where it was trained
                               report.html, table.*         measured beside published; budget, hardware, commit
                  trainings/cifar10-0-seed0-2f0c64e81b9d/   run folders, of all tables
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.protocols import Protocol
from data_pipeline.run_folder import NullRunFolder, RunFolder, source_commit
from trainer.config import TrackingConfig
from trainer.distributed import SharedError, from_first_rank, world_size
from trainer.encoder import Encoder
from trainer.engine import join_ranks, read_deepspeed_config
from trainer.evaluation.report import Number, TableResult
from trainer.records import as_record, without_password
from trainer.reproduce.budget import BUDGETS
from trainer.reproduce.experiments import EXPERIMENTS, experiment
from trainer.reproduce.measure import Data, compute
from trainer.reproduce.plan import Cell, ReproduceConfig, plan
from trainer.reproduce.tables import duration, numbers_line, write_tables
from trainer.roll_call import roll_call
from trainer.tracking import (
    JournalTracker,
    Link,
    check_store,
    deliver,
    discard_journal,
    resolve_uri,
    went_through,
)


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
    with contextlib.closing(opened(config, console)) as run:
        if config.restart:
            from_first_rank(lambda: discard(cells))
        failed = compute_cells(config, todo, Data(config, device, console), run, console)
        result = from_first_rank(lambda: write_tables(config, cells, failed, console))
        if not config.tracking.offline:
            from_first_rank(lambda: record_table(config, result, run))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(cells)} cells failed; the same command tries them again. First: {failed[0]}"
        )
    return result


def compute_cells(
    config: ReproduceConfig, todo: Sequence[Cell], data: Data, run: RunFolder | NullRunFolder, console: Console
) -> list[str]:
    """Train and measure one after the other; returns a line for each that failed."""
    failed, tracking = [], config.tracking
    for number, cell in enumerate(todo, 1):
        tracking = from_first_rank(partial(answering, config, tracking, run))
        cell = dataclasses.replace(cell, config=dataclasses.replace(cell.config, tracking=tracking))
        run.log(f"[{number}/{len(todo)}] {cell.name}, {config.budget} budget")
        try:
            compute(cell, data.of(cell.protocol), console)
            numbers = from_first_rank(partial(numbers_line, config.experiment, cell))
        except (cli.Preempted, KeyboardInterrupt) as stopped:
            same = "the same command" + (" without --restart" if config.restart else "")
            run.log(f"stopped in {cell.name}: {same} goes on there")
            if isinstance(stopped, KeyboardInterrupt):
                raise cli.Preempted(cli.EXIT_INTERRUPTED) from None
            raise
        except Exception as error:
            if world_size() > 1 and not isinstance(error, SharedError):
                raise  # the other ranks wait for this one, and have to end with it
            failed.append(f"{cell.name}: {error}")
            if not isinstance(error, InputError):
                trace = config.path / f"{cell.name}.error.txt"
                trace.write_text(traceback.format_exc(), encoding="utf-8")
                failed[-1] = f"{cell.name}: {type(error).__name__}: {error} (see {trace})"
            run.log(f"failed, going on with the next: {failed[-1]}")
        else:
            run.log(f"{numbers} ({config.budget} budget)")
            (config.path / f"{cell.name}.error.txt").unlink(missing_ok=True)
    return failed


def answering(config: ReproduceConfig, tracking: TrackingConfig, run: RunFolder | NullRunFolder) -> TrackingConfig:
    """`tracking`, from here on offline if its store does not answer: what is computed is worth more than where it is
    recorded, and can be delivered later."""
    if not tracking.offline:
        try:
            check_store(resolve_uri(tracking.uri))
        except InputError as error:
            later = f"python -m trainer.tracking sync {config.trainings}/* delivers later"
            run.log(f"going on without MLflow; {later} ({error})")
            return dataclasses.replace(tracking, offline=True)
    return tracking


def discard(cells: Sequence[Cell]) -> None:
    """Forget all that the cells hold before anything is computed, so that the same command without --restart goes on
    where this one stops, and no row mixes new numbers with old ones. What another table measured of a run stands.

    Raises:
        InputError: another process is training one of the runs; nothing is discarded.
    """
    runs = {cell.config.folder for cell in cells}
    held = [RunFolder(folder) for folder in sorted(runs) if folder.is_dir()]
    for cell in cells:
        (cell.folder / "evaluation.json").unlink(missing_ok=True)
    for run in held:
        shutil.rmtree(run.path)
        run.close()


def record_table(config: ReproduceConfig, result: TableResult, run: RunFolder) -> None:
    """The table as an MLflow run, its numbers as metrics at the step of how many cells are finished, its files as
    artifacts. The same table goes to the same run again."""
    uri, experiment_name = resolve_uri(config.tracking.uri), config.tracking.experiment
    if config.restart:
        discard_journal(run.path)
    Link.open(run.path, uri=uri, experiment=experiment_name)
    Link.change(run.path, run_name=f"{config.experiment}-{config.budget}")
    tracker = JournalTracker(run.path, uri=uri, experiment=experiment_name, offline=True)
    numbers = {}
    for label, protocol, *values in result.rows:
        for title, value in zip(result.columns[2:], values):
            if isinstance(value, Number) and value.value is not None:
                # MLflow takes no other characters.
                name = f"{protocol}/{label}/{title.removesuffix(' (%)')}"
                numbers[re.sub(r"[^\w\-. /]", "-", name)] = value.value
    if numbers:
        finished = int(result.facts["cells"].split()[0])
        tracker.log(numbers, step=finished)
    tracker.close("FINISHED")
    delivered = answering(config, config.tracking, NullRunFolder(run.path)) == config.tracking and went_through(
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
        folders[0].write_config({"config": as_record(config), "commit": source_commit()})

    from_first_rank(open_folder)
    return folders[0] if folders else NullRunFolder(config.path)


def overview(config: ReproduceConfig, cells: Sequence[Cell], missing: set[str], device: torch.device) -> Table:
    """What will be done, and a rough estimate from one timed step of each network."""
    table = Table(
        "variant", "protocol", "splits x seeds", "finished", "to train", "images", "epochs", "about",
        title=f"{experiment(config.experiment).title}: {len(missing)} of {len(cells)} cells to compute, budget "
        f"{config.budget} ({BUDGETS[config.budget]})",
        caption="To train: without what another row or table trains. Training time alone, from one timed step of each "
        "network on this machine, one process.",
    )  # fmt: skip
    total, groups, runs = 0.0, {}, set[Path]()
    for cell in cells:
        groups.setdefault((cell.variant.name, cell.protocol.name), []).append(cell)
    for (variant, protocol), members in groups.items():
        first, open_ = members[0], [cell for cell in members if cell.name in missing]
        new = {cell.config.folder for cell in open_ if config.restart or not cell.is_trained} - runs
        runs |= new
        images = training_images(first.protocol)
        views = images * first.config.total_epochs * (3 if first.config.mixing.kind != "none" else 2)
        seconds = len(new) * views * seconds_per_view(first, device) if new else 0.0
        total += seconds
        counts = map(str, (len(members), len(members) - len(open_), len(new)))
        table.add_row(variant, protocol, *counts, f"{images:,}", str(first.config.total_epochs), duration(seconds))
    table.add_section()
    counts = map(str, (len(cells), len(cells) - len(missing), len(runs)))
    table.add_row("all", "", *counts, "", "", duration(total))
    return table


_PER_CLASS = {"digits": 134, "mnist": 6000, "svhn": 7326, "cifar10": 5000, "cifar100": 500, "tinyimagenet": 500}


def training_images(protocol: Protocol) -> int:
    """About how many training images the protocol has."""
    low, high = protocol.train.share
    whole = round(_PER_CLASS[protocol.classes.dataset] * (high - low) * len(protocol.known))
    return min(protocol.classes.train_images or whole, whole)


def seconds_per_view(cell: Cell, device: torch.device) -> float:
    """Of a training step, forward and backward, timed once for each network."""
    return _timed(cell.config.encoder, cell.protocol.info.image_size, cell.protocol.info.channels, device)


@cache
def _timed(config: Any, size: int, channels: int, device: torch.device, views: int = 16) -> float:
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


@contextmanager
def ended_in_good_order() -> Iterator[None]:
    """Within the block the system's requests to stop end with the status that says so, also while images are built,
    models are measured or pictures are drawn; training steps have handlers of their own, which write a checkpoint."""

    def stop(number: int, frame: Any) -> None:
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        raise cli.Preempted

    # Several ranks could not all leave a collective for it, and the launcher waits for each.
    with cli.on_signals((signal.SIGTERM, signal.SIGUSR1) if world_size() == 1 else (), stop):
        yield


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
    join_ranks()
    with roll_call(), ended_in_good_order():
        reproduce(config, cli.console(quiet=os.environ.get("RANK", "0") != "0"))
