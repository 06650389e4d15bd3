"""`python -m trainer.train`, `deepspeed --module trainer.train`: train an encoder, measure it, register the model.

One step, from top to bottom: two views of each image; a third with a patch over the place that was most activated when
the image came last; one forward pass of all three; the loss; one backward pass, whose gradients also say where the next
patch goes.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Sequence
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
from data_pipeline.beton import find_build, read_manifest
from data_pipeline.errors import InputError
from data_pipeline.loader import Batch, Loader, open_loader
from data_pipeline.protocols import Protocol
from data_pipeline.run_folder import NullRunFolder, RunFolder, source_commit
from data_pipeline.views import ViewParameters, draw_parameters, render_views
from trainer import checkpoint
from trainer.attribution import PeakStore, first_view_gradients, frozen_statistics, peaks, random_places
from trainer.batch_norm import synchronise
from trainer.config import TrainConfig, recipe
from trainer.distributed import mean_over_ranks, rank, world_size
from trainer.encoder import Encoder, load_encoder
from trainer.engine import join_ranks, make_engine, micro_batch_size, read_deepspeed_config
from trainer.evaluate import build_model, evaluate_open_set, metrics_table
from trainer.losses import Objective, objective
from trainer.mixing import Mixed, draw_gamma, mix, partners
from trainer.registry import register
from trainer.tracking import JournalTracker, NullTracker, Tracker, check_store, discard_journal, resolve_uri

LOSS_PARTS = Objective._fields


class Trainer:
    """Everything one training run holds: data, views, engine, peaks."""

    def __init__(self, config: TrainConfig, protocol: Protocol, folder: Path, device: torch.device) -> None:
        self.config, self.protocol, self.device = config, protocol, device
        deepspeed_config = read_deepspeed_config(config.deepspeed_config, device)
        micro_batch = micro_batch_size(config.batch_size, world_size(), deepspeed_config)
        self.loader: Loader = open_loader(
            folder / "train.beton",
            micro_batch,
            device=device,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            workers=config.workers,
            cache=config.cache,
        )
        manifest = self.loader.manifest
        self.image_size = manifest.image_size
        self.peaks = PeakStore(manifest.count, config.mixing.num_patches, device)

        torch.manual_seed(config.seed)  # initial weights; all other random numbers are functions of their place
        encoder = Encoder(config.encoder, manifest.channels)
        if config.init_from is not None:
            load_encoder(encoder, config.init_from)
        if config.batch_norm == "global" and world_size() > 1:
            encoder = synchronise(encoder, device)
        accumulation = deepspeed_config.get("gradient_accumulation_steps", 1)
        steps_per_epoch = len(self.loader) / accumulation
        self.engine = make_engine(
            encoder.to(device),
            config.optimizer,
            deepspeed_config,
            micro_batch=micro_batch,
            total_steps=round(steps_per_epoch * config.total_epochs),
            warmup_steps=round(steps_per_epoch * config.optimizer.warmup_epochs),
        )
        self.dtype = next(self.engine.module.parameters()).dtype

    def train_step(self, batch: Batch, epoch: int, step: int) -> Tensor:
        """One forward, backward and update; returns the loss parts (4,) in the order of `LOSS_PARTS`, on the device."""
        mixing, settings = self.config.mixing, self.config.objective_at(epoch)
        mixes = mixing.kind != "none" and settings.lam > 0
        layers = mixing.layers if mixes and mixing.uses_peaks else ()
        first, second = self.parameters(batch, epoch, 0), self.parameters(batch, epoch, 1)
        if mixes:
            views, mixed = self.mixed_views(batch, first, second, epoch, step)
        else:
            views, mixed = self.render(batch, first, second), None
        retain = layers if mixing.peaks_from == "previous_epoch" else ()
        encoded = self.engine(views, retain)
        for feature_map in encoded.maps.values():
            feature_map.retain_grad()
        losses = objective(
            encoded.embeddings,
            batch.labels,
            mixed and mixed.gamma,
            settings,
            share=mixed and mixed.share,
            partner=mixed and mixed.partner,
        )
        self.engine.backward(losses.total)
        if retain:
            found = peaks(*first_view_gradients(encoded.maps, len(batch.images)), mixing)
            self.peaks.update(batch.indices, first.geometry.to_source(found))
        self.engine.step()
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
        info = self.protocol.info
        return render_views(
            batch.images,
            first,
            second,
            size=self.image_size,
            mean=info.mean,
            std=info.std,
            dtype=self.dtype,
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
            found = self.same_step_peaks(batch, views, epoch)
            centers = torch.where(found.isnan(), random_places(batch.indices, mixing.num_patches, **draw), found)
        mixed = mix(views[:n], batch.indices, centers, mixing, step=step, **draw)
        return torch.cat([views, mixed.views]), mixed

    def same_step_peaks(self, batch: Batch, views: Tensor, epoch: int) -> Tensor:
        """Peaks (N, P, 2) of the first of the views (2N, C, h, w) by an extra pass that changes neither gradients nor
        statistics."""
        mixing, encoder = self.config.mixing, self.engine.module
        with frozen_statistics(encoder):
            encoded = encoder(views, mixing.layers)
            losses = objective(encoded.embeddings, batch.labels, None, self.config.objective_at(epoch))
            maps = list(encoded.maps.values())
            gradients = torch.autograd.grad(losses.total, maps)
        n = len(batch.images)
        return peaks([a.detach()[:n] for a in maps], [g[:n] for g in gradients], mixing)


class LossLog:
    """Loss parts of the steps since the last reading, kept on the device so that no step waits for the host."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._rows: list[Tensor] = []

    def add(self, parts: Tensor) -> None:
        self._rows.append(parts)

    def read(self, epoch: int, step: int) -> dict[str, float]:
        """The mean of each part over ranks and steps; `step` is the newest step's number.

        Raises:
            InputError: a loss was not finite; names the step, the parts and the checkpoint to go back to.
        """
        rows = mean_over_ranks(torch.stack(self._rows)).cpu()
        first_step = step - len(self._rows) + 1
        self._rows.clear()
        for number, row in enumerate(rows):
            if not row.isfinite().all():
                parts = ", ".join(f"{name} {value:g}" for name, value in zip(LOSS_PARTS, row.tolist()))
                last = checkpoint.latest(self._run_dir)
                raise InputError(
                    f"the loss is not finite in epoch {epoch}, step {first_step + number} ({parts}): "
                    f"lower --optimizer.learning-rate; the last good checkpoint is {last or 'none'}"
                )
        return dict(zip(LOSS_PARTS, rows.mean(dim=0).tolist()))


def run_training(trainer: Trainer, run: RunFolder | NullRunFolder, tracker: Tracker, folder: Path) -> float:
    """All epochs that are not done yet, with their checkpoints; returns the seconds spent training."""
    config, loader = trainer.config, trainer.loader
    done, seconds = resume(trainer, run)
    losses = LossLog(run.path)
    with progress_bar(run.console) as bar:
        task = bar.add_task("", total=config.total_epochs * len(loader), completed=done * len(loader), losses="")
        for epoch in range(done, config.total_epochs):
            started, parts = time.perf_counter(), {}
            for step, batch in enumerate(loader.epoch(epoch)):
                losses.add(trainer.train_step(batch, epoch, step))
                if (step + 1) % config.log_every == 0 or step + 1 == len(loader):
                    parts = losses.read(epoch, step)
                    rate = (step + 1) * config.batch_size / (time.perf_counter() - started)
                    bar.update(
                        task,
                        completed=epoch * len(loader) + step + 1,
                        description=f"epoch {epoch + 1}/{config.total_epochs}",
                        losses=f"{loss_line(parts)}  {rate:,.0f} images/s",
                    )
            trainer.peaks.synchronise()
            took = time.perf_counter() - started
            seconds += took
            images = len(loader) * loader.batch_size * world_size()
            record = {**parts, "images_per_second": images / took, "learning_rate": trainer.engine.get_lr()[0]}
            tracker.log({f"train/{name}": value for name, value in record.items()}, epoch + 1)
            run.log_progress(
                f"epoch {epoch + 1}/{config.total_epochs}  {loss_line(parts)}  {images / took:,.0f} images/s"
            )
            if due(epoch, config.checkpoint_every, config.total_epochs):
                progress = checkpoint.Progress(epochs_done=epoch + 1, train_seconds=seconds, identity=config.identity)
                checkpoint.save(run.path, trainer.engine, trainer.peaks, progress, keep=config.keep_checkpoints)
            if config.evaluate_every and (epoch + 1) % config.evaluate_every == 0 and rank() == 0:
                log_evaluation(trainer, tracker, folder, epoch + 1)
    return seconds


def resume(trainer: Trainer, run: RunFolder | NullRunFolder) -> tuple[int, float]:
    """Epochs already done and the seconds they took, after loading the newest checkpoint if there is one."""
    newest = checkpoint.latest(run.path)
    if newest is None:
        return 0, 0.0
    progress = checkpoint.load(newest, trainer.engine, trainer.peaks, trainer.config.identity)
    run.log(f"going on from {newest}: {progress.epochs_done} of {trainer.config.total_epochs} epochs are done")
    return progress.epochs_done, progress.train_seconds


def loss_line(parts: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in parts.items())


def due(epoch: int, every: int, total: int) -> bool:
    return (epoch + 1) % every == 0 or epoch + 1 == total


def log_evaluation(trainer: Trainer, tracker: Tracker, folder: Path, epoch: int) -> None:
    model = build_model(portable_encoder(trainer), folder, trainer.config, trainer.protocol)
    result = evaluate_open_set(model, folder, trainer.config.ks, trainer.config.workers)
    tracker.log(flat_metrics(result), epoch)


def portable_encoder(trainer: Trainer) -> Encoder:
    """A float32 copy of the encoder outside of the engine."""
    encoder = Encoder(trainer.config.encoder, trainer.loader.manifest.channels)
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


def finish(trainer: Trainer, run: RunFolder, tracker: Tracker, folder: Path, seconds: float) -> None:
    """Build the model, measure it, save it and write `metrics.json`; the first rank's work."""
    config = trainer.config
    model = build_model(portable_encoder(trainer), folder, config, trainer.protocol)
    result = evaluate_open_set(model, folder, config.ks, config.workers)
    model.save(run.path / "model")
    tracker.log(flat_metrics(result), config.total_epochs)
    run.write_metrics(
        {
            **result,
            "k": config.k,
            "threshold": model.card.threshold,
            "epochs": config.total_epochs,
            "train_images": trainer.loader.manifest.count,
            "train_seconds": seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
    if run.console is not None:
        run.console.print(metrics_table(result, f"{trainer.protocol.name}, split {trainer.protocol.split} (percent)"))


def train(config: TrainConfig, console: Console | None) -> None:
    """The whole run, on every rank; the first one keeps the records."""
    protocol, folder = find_build(config.data, config.protocol, config.split)
    smallest = min(read_manifest(folder / "train.beton").class_counts)
    if config.k > smallest:
        raise InputError(f"k is {config.k}, but a class has only {smallest} training images: set --k to at most that")
    uri = resolve_uri(config.tracking.uri)
    device = join_ranks()
    if rank() == 0 and not config.tracking.offline:
        check_store(uri)
    run = open_run(config, protocol, console) if rank() == 0 else NullRunFolder(config.folder)
    if run.metrics() is not None:
        run.log(f"{run.path} holds this run, finished: add --restart to train again, or see its metrics.json")
        return
    trainer = Trainer(config, protocol, folder, device)
    run.log(
        f"{protocol.name}, split {protocol.split}: {trainer.loader.manifest.count:,} training images of "
        f"{len(protocol.known)} classes, {len(trainer.loader)} steps an epoch, {world_size()} x {device.type}"
    )
    tracker = open_tracker(config, run, uri)
    try:
        seconds = run_training(trainer, run, tracker, folder)
        if rank() == 0:
            finish(trainer, run, tracker, folder, seconds)
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.close("FINISHED")
    if rank() == 0 and not config.tracking.offline:
        version = register(run.path, config.model_name, config.tracking.alias)
        alias = f" as @{config.tracking.alias}" if config.tracking.alias else ""
        run.log(f"registered {config.model_name} version {version}{alias} in {uri}")
    run.log(f"written to {run.path}")


def open_run(config: TrainConfig, protocol: Protocol, console: Console | None) -> RunFolder:
    """The run folder, holding this configuration; raises `InputError` if it holds another one's work."""
    run = RunFolder(config.folder, console)
    if config.restart:
        checkpoint.discard(run.path)
        discard_journal(run.path)
        run.clear()
    earlier = run.config()
    if earlier is not None and earlier["hash"] != config.hash and (run.metrics() or checkpoint.latest(run.path)):
        raise InputError(
            f"{run.path} holds a run of another configuration: name another --run-dir, or add --restart to discard it"
        )
    record = {"config": config.to_dict(), "hash": config.hash, "split_hash": protocol.split_hash}
    run.write_config({**record, "commit": source_commit(), "versions": versions()})
    return run


def open_tracker(config: TrainConfig, run: RunFolder | NullRunFolder, uri: str) -> Tracker:
    if rank() != 0:
        return NullTracker()
    tracking = config.tracking
    return JournalTracker(run.path, uri=uri, experiment=tracking.experiment, offline=tracking.offline)


def versions() -> dict[str, str]:
    """What this run was computed with."""
    packages = ("torch", "torchvision", "deepspeed", "ffcv", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


@dataclass(frozen=True)
class _Launch:
    """The options that are read before the others."""

    protocol: str = "digits"
    """Protocol, which chooses the defaults of everything else."""
    local_rank: int = 0
    """Given by the deepspeed launcher; the environment says the same."""


def parse_config(args: Sequence[str]) -> TrainConfig:
    """The configuration from the command line: the protocol's recipe, with what was given replaced."""
    launch, rest = tyro.cli(_Launch, args=args, return_unknown_args=True, add_help=False)
    return cli.parse(
        TrainConfig,
        prog="python -m trainer.train",
        description=f"Train an encoder, measure it and register the model. Defaults shown: recipe {launch.protocol}.",
        default=recipe(launch.protocol),
        args=rest,
    )


def main() -> None:
    train(parse_config(sys.argv[1:]), Console(soft_wrap=True))


if __name__ == "__main__":
    cli.run(main)
