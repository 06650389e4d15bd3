"""`python -m trainer.train`, `deepspeed --module trainer.train`: train an encoder, measure it, register the model.

The run as a whole: what it is known by, its folder, its records. `trainer.step` is one step of it, `trainer.loop`
the steps one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import tyro
from rich.console import Console

from data_pipeline import cli
from data_pipeline.beton import Build, find_build
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from data_pipeline.run_folder import NullRunFolder, RunFolder, source_commit
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.distributed import from_first_rank, rank, world_size
from trainer.engine import join_ranks, read_deepspeed_config
from trainer.evaluation.report import hardware
from trainer.loop import training_epochs
from trainer.recipes import recipe
from trainer.recognition import build_model, evaluate_open_set, metrics_table
from trainer.records import without_password
from trainer.registry import register
from trainer.roll_call import roll_call
from trainer.step import Trainer
from trainer.tracking import (
    JournalTracker,
    Link,
    NullTracker,
    Tracker,
    check_store,
    discard_journal,
    resolve_uri,
)


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
    with contextlib.closing(run):
        if not finished:
            train_and_measure(config, partitions, run, identity, uri)
        if not config.tracking.offline:
            from_first_rank(lambda: register_once(config, run, uri))
        again = f"{run.path} holds the finished run; --restart would begin it again"
        run.log(again if finished else f"written to {run.path}")


def train_and_measure(
    config: TrainConfig, partitions: Partitions, run: RunFolder | NullRunFolder, identity: dict[str, Any], uri: str
) -> None:
    """From the first step, or the one after the last checkpoint, to `metrics.json`, recorded in MLflow on the way."""
    trainer, build = Trainer(config, partitions), partitions.build
    # Not before everything is known to fit: what the folder holds may be discarded here.
    from_first_rank(lambda: begin(config, run, identity, build.manifest.split_hash))
    run.log(
        f"{build.protocol.name}, split {build.protocol.split}: {trainer.loader.count:,} training images of "
        f"{len(build.protocol.known)} classes, {len(trainer.loader)} steps an epoch, "
        f"{world_size()} x {trainer.device.type}"
    )
    tracker = open_tracker(config, run, uri)
    try:
        seconds = run_training(trainer, run, tracker, identity)
        from_first_rank(lambda: finish(trainer, run, tracker, seconds))
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, cli.Preempted))
        tracker.close("KILLED" if interrupted else "FAILED")
        raise
    tracker.close("FINISHED")


def run_training(trainer: Trainer, run: RunFolder | NullRunFolder, tracker: Tracker, identity: dict[str, Any]) -> float:
    """All epochs, with the evaluations between them; returns the seconds spent training."""
    every, seconds = trainer.config.evaluate_every, 0.0
    for epoch, seconds in training_epochs(trainer, run, tracker, identity):  # noqa: B007
        if every and epoch % every == 0 and epoch < trainer.config.total_epochs:
            from_first_rank(partial(log_evaluation, trainer, tracker, epoch))
    return seconds


def finish(trainer: Trainer, run: RunFolder, tracker: Tracker, seconds: float) -> None:
    """Build the model, measure it, save it and write `metrics.json`; the first rank's work."""
    config, protocol = trainer.config, trainer.build.protocol
    model = build_model(trainer.portable_encoder(), trainer.partitions, config)
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


def log_evaluation(trainer: Trainer, tracker: Tracker, epoch: int) -> None:
    model = build_model(trainer.portable_encoder(), trainer.partitions, trainer.config)
    tracker.log(flat_metrics(evaluate_open_set(model, trainer.partitions, trainer.config.ks)), epoch)


def flat_metrics(result: dict[str, Any]) -> dict[str, float]:
    """{"auroc": {10: 0.9}} as {"test/auroc_k10": 0.9}, for MLflow."""
    flat = {}
    for name, value in result.items():
        if isinstance(value, dict):
            flat.update({f"test/{name}_k{k}": single for k, single in value.items()})
        else:
            flat[f"test/{name}"] = float(value)
    return flat


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
        wanted, had = config.to_dict(), earlier.get("config", {})
        rescored = [name for name in ("score_on", "k", "ks", "accept") if had.get(name, wanted[name]) != wanted[name]]
        if done and rescored:
            raise InputError(
                f"{config.folder} holds the finished run, whose model was made with other {', '.join(rescored)}: "
                "give the same, name another --run-dir, or add --restart to train it anew"
            )
        return done

    finished = from_first_rank(look)
    return opened[0] if opened else NullRunFolder(config.folder), finished


def begin(config: TrainConfig, run: RunFolder, identity: dict[str, Any], split_hash: str) -> None:
    """Note in the run folder what is being trained, and by which commits if not by one; with --restart after discarding
    what it held, and likewise where that was another run that did not come to its first checkpoint."""
    if config.restart or (run.config() or {}).get("identity", identity) != identity:
        checkpoint.discard(run.path)
        discard_journal(run.path)
        shutil.rmtree(run.path / "model", ignore_errors=True)
        run.clear()
    earlier = (run.config() or {}).get("commit", "") if checkpoint.latest(run.path) else ""
    commits = dict.fromkeys(filter(None, (*earlier.split(" then "), source_commit())))
    record = {"config": config.to_dict(), "identity": identity, "split_hash": split_hash}
    run.write_config({**record, "commit": " then ".join(commits), "versions": versions(), "hardware": hardware()})


def register_once(config: TrainConfig, run: RunFolder, uri: str) -> None:
    """Register the finished run's model, unless that is done."""
    link = Link.open(run.path, uri=uri, experiment=config.tracking.experiment)
    # A link without a name is of an earlier version of this project, which registered a run once.
    if link.version is not None and link.model_name in (None, config.model_name):
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
        with contextlib.suppress(metadata.PackageNotFoundError):  # an exported build needs no ffcv
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
        train(config, cli.console())


if __name__ == "__main__":
    cli.run(main)
