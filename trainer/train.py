"""`python -m trainer.train`, `deepspeed --module trainer.train`: train an encoder, measure it, register the model.

One step, from top to bottom: two views of each image; a third with a patch over the place that was most activated when
the image came last; one forward pass of all three; the loss; one backward pass, whose gradients also say where the next
patch goes.
"""

from __future__ import annotations

import hashlib
import math
import platform
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_pipeline import cli
from data_pipeline.beton import Build, find_build
from data_pipeline.errors import InputError
from data_pipeline.loader import Batch, Loader, Partitions, open_loader
from data_pipeline.run_folder import NullRunFolder, RunFolder, source_commit
from data_pipeline.views import ViewParameters, draw_parameters, render_views
from trainer import checkpoint
from trainer.attribution import PeakStore, first_view_gradients, frozen_statistics, places, random_places
from trainer.batch_norm import agree_on_statistics, synchronise
from trainer.config import TrainConfig, recipe
from trainer.distributed import from_first_rank, mean_over_ranks, rank, sum_over_ranks, world_size
from trainer.encoder import Encoder, compile_stages, load_encoder
from trainer.engine import autocast_dtype, join_ranks, make_engine, micro_batch_size, read_deepspeed_config
from trainer.evaluation.report import hardware
from trainer.methods import Method, method_of
from trainer.mixing import Mixed, draw_gamma, mix, partners
from trainer.recognition import build_model, evaluate_open_set, metrics_table
from trainer.registry import register
from trainer.roll_call import roll_call
from trainer.tracking import (
    JournalTracker,
    Link,
    NullTracker,
    Tracker,
    check_store,
    discard_journal,
    resolve_uri,
    without_password,
)


class Trainer:
    """Everything one training run holds: data, views, method, engine, peaks."""

    def __init__(self, config: TrainConfig, partitions: Partitions) -> None:
        self.config, self.partitions = config, partitions
        self.build, self.device = partitions.build, partitions.device
        device = self.device
        deepspeed_config = read_deepspeed_config(config.deepspeed_config, device)
        self.autocast_dtype = autocast_dtype(deepspeed_config)
        # A step of the optimizer may take several batches.
        self.accumulation = deepspeed_config.get("gradient_accumulation_steps", 1)
        micro_batch = micro_batch_size(config.batch_size, world_size(), self.accumulation)
        self.loader: Loader = open_loader(
            partitions,
            micro_batch,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            accumulation=self.accumulation,
            cache=config.cache,
        )
        self.peaks = PeakStore(self.loader.count, config.mixing.num_patches, device)

        torch.manual_seed(config.seed)  # initial weights; all other random numbers are functions of their place
        encoder = new_encoder(config, self.build)
        if config.init_from is not None:
            load_encoder(encoder, config.init_from)
        if config.batch_norm == "global" and world_size() > 1:
            encoder = synchronise(encoder, device)
        steps_per_epoch = len(self.loader) / self.accumulation
        self.engine = make_engine(
            encoder.to(device),
            config.optimizer,
            deepspeed_config,
            micro_batch=micro_batch,
            total_steps=round(steps_per_epoch * config.total_epochs),
            warmup_steps=round(steps_per_epoch * config.optimizer.warmup_epochs),
        )
        if config.compile:
            compile_stages(self.engine.module)

        dtype = self.autocast_dtype
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        self.method: Method = method_of(config, lambda: portable_encoder(self), self.autocast)

    @property
    def memories(self) -> dict[str, checkpoint.Memory]:
        """What a checkpoint holds beside the engine."""
        return {"peaks": self.peaks, **self.method.memories}

    def train_step(self, batch: Batch, epoch: int, step: int) -> Tensor:
        """One forward, backward and update; returns the method's loss parts in their order, on the device."""
        mixing, settings = self.config.mixing, self.config.objective_at(epoch)
        mixes = mixing.kind != "none" and settings.takes_mixed_views
        layers = mixing.layers if mixes and mixing.uses_peaks else ()
        first, second = self.parameters(batch, epoch, 0), self.parameters(batch, epoch, 1)
        if mixes:
            views, mixed = self.mixed_views(batch, first, second, epoch, step)
        else:
            views, mixed = self.render(batch, first, second), None
        retain = layers if mixing.peaks_from == "previous_epoch" else ()
        seen, keys = self.method.split(views, len(batch.images), epoch=epoch, step=step)
        encoded = self.engine(seen, retain)
        for feature_map in encoded.maps.values():
            feature_map.retain_grad()
        losses = self.method.losses(encoded, keys, batch.labels, mixed, settings)
        self.engine.backward(losses.total)
        if retain:
            maps = first_view_gradients(encoded.maps, len(batch.images))
            found = places(*maps, mixing, batch.indices, seed=self.config.seed, epoch=epoch)
            self.peaks.update(batch.indices, first.geometry.to_source(found))
        self.engine.step()
        self.method.remember(keys, self.engine.module, updated=(step + 1) % self.accumulation == 0)
        return torch.stack(losses).detach()

    def parameters(self, batch: Batch, epoch: int, number: int) -> ViewParameters:
        """What makes view `number` of each image of the batch."""
        return draw_parameters(
            self.config.views,
            tuple(batch.images.shape[1:3]),
            batch.indices,
            seed=self.config.seed,
            epoch=epoch,
            view=number,
        )

    def render(self, batch: Batch, first: ViewParameters, second: ViewParameters, **patches: Any) -> Tensor:
        """The views of the batch in blocks (2N, C, h, w), or with `patches` as `render_views` takes them (3N, …)."""
        info = self.build.protocol.info
        return render_views(
            batch.images,
            first,
            second,
            size=self.build.manifest.image_size,
            mean=info.mean,
            std=info.std,
            dtype=self.autocast_dtype or torch.float32,
            **patches,
        )

    def mixed_views(
        self, batch: Batch, first: ViewParameters, second: ViewParameters, epoch: int, step: int
    ) -> tuple[Tensor, Mixed]:
        """The views of the batch and the third made from them, in blocks (3N, C, h, w), and how it was mixed."""
        mixing, n, draw = self.config.mixing, len(batch.images), {"seed": self.config.seed, "epoch": epoch}
        same_step = mixing.uses_peaks and mixing.peaks_from == "same_step"
        if mixing.kind == "gradmix" and not same_step:
            if mixing.uses_peaks:
                centers = first.geometry.to_view(self.peaks.lookup(batch.indices, **draw))
            else:
                centers = random_places(batch.indices, mixing.num_patches, **draw)
            partner, gamma = partners(n, self.device), draw_gamma(mixing, batch.indices, step=step, **draw)
            views = self.render(batch, first, second, partner=partner, centers=centers, gamma=gamma)
            return views, Mixed(views[2 * n :], gamma, None, partner)
        views = self.render(batch, first, second)
        centers = None
        if same_step:
            found = self.same_step_peaks(batch, views, epoch, step)
            centers = torch.where(found.isnan(), random_places(batch.indices, mixing.num_patches, **draw), found)
        mixed = mix(views[:n], batch.indices, centers, mixing, step=step, **draw)
        return torch.cat([views, mixed.views]), mixed

    def same_step_peaks(self, batch: Batch, views: Tensor, epoch: int, step: int) -> Tensor:
        """Peaks (N, P, 2) of the first of the views (2N, C, h, w) by an extra pass that changes neither gradients nor
        statistics."""
        mixing, encoder, n = self.config.mixing, self.engine.module, len(batch.images)
        seen, keys = self.method.split(views, n, epoch=epoch, step=step)
        with frozen_statistics(encoder):
            with self.autocast:
                encoded = encoder(seen, mixing.layers)
            losses = self.method.losses(encoded, keys, batch.labels, None, self.config.objective_at(epoch))
            maps = list(encoded.maps.values())
            gradients = torch.autograd.grad(losses.total, maps)
        found = [a.detach()[:n] for a in maps], [g[:n] for g in gradients]
        return places(*found, mixing, batch.indices, seed=self.config.seed, epoch=epoch)


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
            InputError: a loss was not finite; names the step, the parts and the checkpoint to go back to.
        """
        rows = torch.stack(self._rows)
        # One collective for both: the wish is one more column.
        rows = mean_over_ranks(torch.cat([rows, torch.full_like(rows[:, :1], float(wish))], dim=1)).cpu()
        self._rows.clear()
        for row in rows[:, :-1].tolist():
            self.step += 1
            if not all(map(math.isfinite, row)):
                parts = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, row))
                raise InputError(
                    f"the loss is not finite in epoch {self.epoch + 1}, step {self.step} ({parts}): "
                    f"lower --optimizer.learning-rate; the last good checkpoint is {last_checkpoint() or 'none'}"
                )
            self.sums = [total + value for total, value in zip(self.sums, row)]
        means = rows.mean(dim=0).tolist()
        return dict(zip(self.names, means)), means[-1] > 0

    def epoch_means(self) -> dict[str, float]:
        return {name: total / self.step for name, total in zip(self.names, self.sums)}


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
                between_updates = (step + 1) % trainer.accumulation == 0
                alone_and_asked = asked and world_size() == 1 and between_updates
                if not ((step + 1) % config.log_every == 0 or step + 1 == len(loader) or alone_and_asked):
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
                if wish and between_updates and step + 1 < len(loader):
                    keeper.save(epoch, step + 1, losses.sums, earlier + took, seconds, asked)
            trainer.peaks.synchronise()
            took = time.perf_counter() - started
            seconds += earlier + took
            rate = (len(loader) - first_step) * loader.batch_size * world_size() / took
            means = losses.epoch_means()
            record = {**means, "images_per_second": rate, "learning_rate": trainer.engine.get_lr()[0]}
            tracker.log({f"train/{name}": value for name, value in record.items()}, epoch + 1)
            run.log_progress(f"epoch {epoch + 1}/{config.total_epochs}  {loss_line(means)}  {rate:,.0f} images/s")
            progress = START  # of the next epoch
            stop = from_first_rank(lambda: bool(asked)) and epoch + 1 < config.total_epochs
            if due(epoch, config.checkpoint_every, config.total_epochs) or stop:
                keeper.save(epoch + 1, 0, (), 0.0, seconds, asked if stop else [])
            yield epoch + 1, seconds


def run_training(trainer: Trainer, run: RunFolder | NullRunFolder, tracker: Tracker, identity: dict[str, Any]) -> float:
    """All epochs, with the evaluations between them; returns the seconds spent training."""
    every, seconds = trainer.config.evaluate_every, 0.0
    for epoch, seconds in training_epochs(trainer, run, tracker, identity):  # noqa: B007
        if every and epoch % every == 0 and epoch < trainer.config.total_epochs and rank() == 0:
            log_evaluation(trainer, tracker, epoch)
    return seconds


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
        trainer.peaks.synchronise()
        if trainer.config.batch_norm != "global":
            agree_on_statistics(trainer.engine.module)
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

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield asked
    except cli.Preempted:
        # Ranks end one after the other, and launchers hurry those that are left: let them end by themselves.
        if cli.ends_process():
            handlers = dict.fromkeys(handlers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def loss_line(parts: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in parts.items())


def due(epoch: int, every: int, total: int) -> bool:
    return (epoch + 1) % every == 0 or epoch + 1 == total


def log_evaluation(trainer: Trainer, tracker: Tracker, epoch: int) -> None:
    model = build_model(portable_encoder(trainer), trainer.partitions, trainer.config)
    tracker.log(flat_metrics(evaluate_open_set(model, trainer.partitions, trainer.config.ks)), epoch)


def new_encoder(config: TrainConfig, build: Build) -> Encoder:
    """An untrained encoder with what the method needs on top."""
    manifest = build.manifest
    return Encoder(config.encoder, manifest.channels, config.objective.classifier, len(manifest.class_names))


def portable_encoder(trainer: Trainer) -> Encoder:
    """A float32 copy of the encoder outside of the engine."""
    encoder = new_encoder(trainer.config, trainer.build)
    encoder.load_state_dict(trainer.engine.module.state_dict())
    return encoder.to(trainer.device)


def flat_metrics(result: dict[str, Any]) -> dict[str, float]:
    """{"auroc": {10: 0.9}} as {"test/auroc_k10": 0.9}, for MLflow."""
    flat = {}
    for name, value in result.items():
        if isinstance(value, dict):
            flat.update({f"test/{name}_k{k}": single for k, single in value.items()})
        else:
            flat[f"test/{name}"] = float(value)
    return flat


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


def finish(trainer: Trainer, run: RunFolder, tracker: Tracker, seconds: float) -> None:
    """Build the model, measure it, save it and write `metrics.json`; the first rank's work."""
    config, protocol = trainer.config, trainer.build.protocol
    model = build_model(portable_encoder(trainer), trainer.partitions, config)
    result = evaluate_open_set(model, trainer.partitions, config.ks)
    model.save(run.path / "model")
    tracker.log(flat_metrics(result), config.total_epochs)
    run.write_metrics(
        {
            **result,
            "k": config.k,
            "threshold": model.card.threshold,
            "epochs": config.total_epochs,
            "train_images": trainer.loader.count,
            "train_seconds": seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
    if run.console is not None:
        run.console.print(metrics_table(result, f"{protocol.name}, split {protocol.split} (percent)"))
    if "test_unknown" not in trainer.partitions:
        run.log("no class is unknown: AUROC, OSCR and how many unknown images are rejected cannot be measured")


def train(config: TrainConfig, console: Console | None, partitions: Partitions | None = None) -> None:
    """The whole run, on every rank; the first one keeps the records. `partitions`, if given, are those of
    `config.data`, decoded for several runs."""
    device = join_ranks()
    if partitions is None:
        build = from_first_rank(lambda: find_build(config.data, config.protocol, config.split))
        partitions = Partitions(build, device, config.workers)
    build = partitions.build
    smallest = min(build.record("train").class_counts)
    if config.k > smallest:
        raise InputError(f"k is {config.k}, but a class has only {smallest} training images: set --k to at most that")
    uri, identity = resolve_uri(config.tracking.uri), run_identity(config, build, device)
    if not config.tracking.offline:
        from_first_rank(lambda: check_store(uri))
    run, finished = open_run(config, identity, console)
    if not finished:
        trainer = Trainer(config, partitions)
        # Not before everything is known to fit: what the folder holds may be discarded here.
        from_first_rank(lambda: begin(config, run, identity, build.manifest.split_hash))
        run.log(
            f"{build.protocol.name}, split {build.protocol.split}: {trainer.loader.count:,} training images of "
            f"{len(build.protocol.known)} classes, {len(trainer.loader)} steps an epoch, {world_size()} x {device.type}"
        )
        tracker = open_tracker(config, run, uri)
        try:
            seconds = run_training(trainer, run, tracker, identity)
            if rank() == 0:
                finish(trainer, run, tracker, seconds)
        except BaseException as error:
            interrupted = isinstance(error, (KeyboardInterrupt, cli.Preempted))
            tracker.close("KILLED" if interrupted else "FAILED")
            raise
        tracker.close("FINISHED")
    if rank() == 0 and not config.tracking.offline:
        register_once(config, run, uri)
    run.log(
        f"{run.path} holds the finished run; --restart would begin it again" if finished else f"written to {run.path}"
    )


def run_identity(config: TrainConfig, build: Build, device: torch.device) -> dict[str, Any]:
    """Everything that decides what a run computes, but not how many ranks do: a checkpoint fits only an equal one."""
    deepspeed_config = read_deepspeed_config(config.deepspeed_config, device)
    deepspeed_config.pop("zero_optimization", None)  # how memory is shared out
    start = config.init_from
    return {
        **config.identity,
        "split_hash": build.manifest.split_hash,
        "image_size": build.manifest.image_size,
        "train_images": build.record("train").sha256,
        "deepspeed": deepspeed_config,
        "init_from": hashlib.sha256(start.read_bytes()).hexdigest() if start and start.is_file() else str(start),
    }


def open_run(
    config: TrainConfig, identity: dict[str, Any], console: Console | None
) -> tuple[RunFolder | NullRunFolder, bool]:
    """The run folder, and whether it holds this very run, finished; `InputError` if it holds another one's work."""
    opened: list[RunFolder] = []

    def look() -> bool:
        opened.append(RunFolder(config.folder, console))
        earlier = None if config.restart else opened[0].config()
        if earlier is None:
            return False
        done = opened[0].metrics() is not None
        if earlier.get("identity") != identity and (done or checkpoint.latest(config.folder)):
            theirs = earlier.get("identity", {})
            different = [name for name in identity if theirs.get(name) != identity[name]]
            raise InputError(
                f"{config.folder} holds a run of another configuration ({', '.join(different)} differ): "
                "name another --run-dir, or add --restart to discard it"
            )
        return done

    finished = from_first_rank(look)
    return opened[0] if opened else NullRunFolder(config.folder), finished


def begin(config: TrainConfig, run: RunFolder, identity: dict[str, Any], split_hash: str) -> None:
    """Note in the run folder what is being trained; with --restart after discarding what it held."""
    if config.restart:
        checkpoint.discard(run.path)
        discard_journal(run.path)
        shutil.rmtree(run.path / "model", ignore_errors=True)
        run.clear()
    record = {"config": config.to_dict(), "identity": identity, "split_hash": split_hash}
    run.write_config({**record, "commit": source_commit(), "versions": versions(), "hardware": hardware()})


def register_once(config: TrainConfig, run: RunFolder, uri: str) -> None:
    """Register the finished run's model, unless that is done."""
    if Link.open(run.path, uri=uri, experiment=config.tracking.experiment).version is not None:
        return
    version = register(run.path, config.model_name, config.tracking.alias)
    alias = f" as @{config.tracking.alias}" if config.tracking.alias else ""
    run.log(f"registered {config.model_name} version {version}{alias} in {without_password(uri)}")


def open_tracker(config: TrainConfig, run: RunFolder | NullRunFolder, uri: str) -> Tracker:
    if rank() != 0:
        return NullTracker()
    tracking = config.tracking
    return JournalTracker(run.path, uri=uri, experiment=tracking.experiment, offline=tracking.offline)


def versions() -> dict[str, str]:
    """What this run was computed with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "deepspeed", "ffcv", "triton", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # an exported build needs no ffcv
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class _Launch:
    """The options that are read before the others."""

    protocol: str = "digits"
    """Protocol, which chooses the defaults of everything else."""
    method: str = "gradmix"
    """Method, which chooses them too."""
    local_rank: int = 0
    """Given by the deepspeed launcher; the environment says the same."""


def parse_config(args: Sequence[str]) -> TrainConfig:
    """The configuration from the command line: the method's recipe on the protocol, with what was given replaced."""
    launch, rest = tyro.cli(_Launch, args=args, return_unknown_args=True, add_help=False)
    return cli.parse(
        TrainConfig,
        prog="python -m trainer.train",
        description=(
            "Train an encoder, measure it and register the model. "
            f"Options and defaults shown: method {launch.method} on {launch.protocol}."
        ),
        default=recipe(launch.protocol, launch.method),
        args=rest,
    )


def main() -> None:
    config = parse_config(sys.argv[1:])
    join_ranks()
    with roll_call():
        train(config, Console(soft_wrap=True))


if __name__ == "__main__":
    cli.run(main)
