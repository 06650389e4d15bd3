"""Step after step: the losses read now and then, the checkpoints, and the requests to end that are honoured between two
steps."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_pipeline import cli
from data_pipeline.run_folder import NullRunFolder, RunFolder
from trainer import checkpoint
from trainer.distributed import SharedError, from_first_rank, mean_over_ranks, rank, sum_over_ranks, world_size
from trainer.step import Trainer
from trainer.tracking import Tracker


def training_epochs(
    trainer: Trainer, run: RunFolder | NullRunFolder, tracker: Tracker, identity: dict[str, Any]
) -> Iterator[tuple[int, float]]:
    """Train all steps that are not done yet, with their checkpoints. After each epoch, and first for the one that a
    checkpoint was written after, yields how many are done and the seconds that they took.

    Raises:
        Preempted: the system asked the process to end; a checkpoint of this very step is written.
    """
    config, loader = trainer.config, trainer.loader
    keeper = Keeper(trainer, run, identity)
    progress = keeper.resume()
    seconds = progress.train_seconds
    if progress.epoch > 0 and progress.step == 0:  # the end may have come before what follows an epoch was done
        yield progress.epoch, seconds
    with progress_bar(run.console) as bar, requests_to_stop() as asked:
        task = bar.add_task("", total=config.total_epochs * len(loader), losses="")
        for epoch in range(progress.epoch, config.total_epochs):
            losses = LossLog(trainer.method.parts, epoch, progress.step, progress.loss_sums)
            first_step, earlier, started = progress.step, progress.epoch_seconds, time.perf_counter()
            for step, batch in enumerate(loader.epoch(epoch, first_step), first_step):
                losses.add(trainer.train_step(batch, epoch, step))
                updates, rest = divmod(step + 1, trainer.accumulation)
                alone_and_asked = asked and world_size() == 1
                if rest or not (updates % config.log_every == 0 or step + 1 == len(loader) or alone_and_asked):
                    continue
                parts, wish = losses.read(keeper.newest, bool(asked) or keeper.is_due)
                took = time.perf_counter() - started
                rate = (step + 1 - first_step) * loader.batch_size * world_size() / took
                bar.update(
                    task,
                    completed=epoch * len(loader) + step + 1,
                    description=f"epoch {epoch + 1}/{config.total_epochs}",
                    losses=f"{loss_line(parts)}  {rate:,.0f} images/s",
                )
                if wish and step + 1 < len(loader):
                    keeper.save(epoch, step + 1, losses.sums, earlier + took, seconds, asked)
            trainer.synchronise()
            took = time.perf_counter() - started
            seconds += earlier + took
            rate = (len(loader) - first_step) * loader.batch_size * world_size() / took
            means = losses.epoch_means()
            record = {**means, "images_per_second": rate, "learning_rate": trainer.engine.get_lr()[0]}
            tracker.log({f"train/{name}": value for name, value in record.items()}, epoch + 1)
            run.log_progress(f"epoch {epoch + 1}/{config.total_epochs}  {loss_line(means)}  {rate:,.0f} images/s")
            progress = START  # of the next epoch
            if due(epoch, config.checkpoint_every, config.total_epochs) or wish:
                keeper.save(epoch + 1, 0, (), 0.0, seconds, asked)
            yield epoch + 1, seconds


class LossLog:
    """The loss parts of an epoch. They stay on the device until they are read, so that no step waits for the host."""

    def __init__(self, names: Sequence[str], epoch: int, step: int, sums: Sequence[float]) -> None:
        """Continue epoch `epoch`, of which `step` steps are done and their loss parts `names` add up to `sums`."""
        self.names, self.epoch, self.step, self.sums = names, epoch, step, [*sums] or [0.0] * len(names)
        self._rows: list[Tensor] = []

    def add(self, parts: Tensor) -> None:
        self._rows.append(parts)

    def read(self, last_checkpoint: Callable[[], Path | None], wish: bool) -> tuple[dict[str, float], bool]:
        """The mean of each part over ranks and the steps since the last reading, and whether any rank has a `wish`.

        Raises:
            SharedError: a loss was not finite; names the step, the parts and the checkpoint to go back to.
        """
        rows = torch.stack(self._rows)
        # One collective for both: the wish is one more column.
        rows = mean_over_ranks(torch.cat([rows, torch.full_like(rows[:, :1], float(wish))], dim=1)).cpu()
        self._rows.clear()
        for row in rows[:, :-1].tolist():
            self.step += 1
            if not all(map(math.isfinite, row)):
                parts = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, row))
                raise SharedError(
                    f"the loss is not finite in epoch {self.epoch + 1}, step {self.step} ({parts}): "
                    f"lower --optimizer.learning-rate; the last good checkpoint is {last_checkpoint() or 'none'}"
                )
            self.sums = [total + value for total, value in zip(self.sums, row)]
        means = rows.mean(dim=0).tolist()
        return dict(zip(self.names, means)), means[-1] > 0

    def epoch_means(self) -> dict[str, float]:
        return {name: total / self.step for name, total in zip(self.names, self.sums)}


START = checkpoint.Progress(epoch=0, step=0, total_steps=0, loss_sums=(), epoch_seconds=0.0, train_seconds=0.0)


class Keeper:
    """Writes a run's checkpoints and finds the one to go on from."""

    def __init__(self, trainer: Trainer, run: RunFolder | NullRunFolder, identity: dict[str, Any]) -> None:
        self.trainer, self.run, self.identity = trainer, run, identity
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is old; the first rank's clock says so."""
        return rank() == 0 and time.monotonic() - self._saved > 60 * self.trainer.config.checkpoint_minutes

    def newest(self) -> Path | None:
        return checkpoint.latest(self.run.path)

    def resume(self) -> checkpoint.Progress:
        """Load the newest checkpoint, if there is one."""
        newest = from_first_rank(lambda: checkpoint.latest(self.run.path, self.run.log))
        if newest is None:
            return START
        progress = checkpoint.load(newest, self.trainer.engine, self.trainer.memories, self.identity)
        epochs = self.trainer.config.total_epochs
        self.run.log(f"going on from {newest}: {progress.epoch} of {epochs} epochs and {progress.step} steps are done")
        return progress

    def save(
        self, epoch: int, step: int, sums: Sequence[float], epoch_seconds: float, seconds: float, asked: Sequence[str]
    ) -> None:
        """Write a checkpoint after `step` steps of epoch `epoch`; end there if the system `asked` any rank to."""
        trainer = self.trainer
        trainer.synchronise()
        progress = checkpoint.Progress(
            epoch=epoch,
            step=step,
            total_steps=epoch * len(trainer.loader) + step,
            loss_sums=tuple(sums),
            epoch_seconds=epoch_seconds,
            train_seconds=seconds,
        )
        path = checkpoint.save(
            self.run.path,
            trainer.engine,
            trainer.memories,
            progress,
            self.identity,
            keep=trainer.config.keep_checkpoints,
        )
        self._saved = time.monotonic()
        if sum_over_ranks(torch.tensor(float(len(asked)), device=trainer.device)) > 0:
            why = asked[0] if asked else "a signal to another rank"
            self.run.log(f"stopped by {why}: the same command goes on from {path}")
            raise cli.Preempted(cli.EXIT_INTERRUPTED if why == "SIGINT" else cli.EXIT_REQUEUE)


@contextmanager
def requests_to_stop() -> Iterator[list[str]]:
    """The signals by which this process was asked to end; they do nothing else within the block, but that the second
    Ctrl-C does not wait."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if "SIGINT" in asked:
                raise KeyboardInterrupt
            if rank() == 0:
                print("\nwriting a checkpoint after this step; Ctrl-C again does not wait for it", file=sys.stderr)
        asked.append(signal.Signals(number).name)

    # Ranks end one after the other: those that are left are let end by themselves.
    with cli.on_signals((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), note):
        yield asked


def loss_line(parts: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in parts.items())


def due(epoch: int, every: int, total: int) -> bool:
    return (epoch + 1) % every == 0 or epoch + 1 == total


def progress_bar(console: Console | None) -> Progress:
    visible = console is not None and console.is_terminal
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not visible,
    )
