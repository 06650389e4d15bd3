"""One trial of a sweep: train on pseudo-known classes, score on pseudo-unknown ones, never see a real unknown.

A trial trains one encoder for each pseudo-open split, epoch by epoch side by side, so that what it reports is always a
mean over splits and the scheduler can stop all of them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.beton import find_build
from data_pipeline.loader import Partitions
from data_pipeline.run_folder import NullRunFolder, RunFolder, source_commit
from trainer.config import TrackingConfig, TrainConfig
from trainer.distributed import from_first_rank, rank
from trainer.engine import join_ranks
from trainer.loop import training_epochs
from trainer.recognition import build_model, evaluate_open_set
from trainer.step import Trainer
from trainer.tracking import JournalTracker, NullTracker, Tracker
from trainer.train import run_identity
from tuning.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What all trials of a sweep share. It travels to the workers, so nothing there depends on their environment."""

    base: TrainConfig
    """The configuration that the drawn values are put into."""
    space: SearchSpace
    seeds: tuple[int, ...]
    """Of the pseudo-open splits that a score is averaged over."""
    data: Path
    folder: Path
    """Of the sweep; each trial has a folder of its own below `trials`."""
    report_every: int
    """Epochs between two reports."""
    tracking: TrackingConfig
    uri: str
    parent: str | None
    """MLflow run of the sweep."""
    ranks: int
    """Processes of a trial."""
    cpus: float
    """CPU cores of each."""
    gpus: float
    """GPUs of each."""


def pseudo_name(protocol: str, seed: int) -> str:
    return f"{protocol}-pseudo{seed}"


# CPU cores of the function that waits for a trial's ranks; each of them asks for so much less.
COORDINATOR = 0.01


def run_trial(values: dict[str, Any], settings: TrialSettings) -> None:
    """Ray Tune's function for a trial of one process."""
    from ray import tune

    train_trial(values, settings, tune.get_context().get_trial_id(), tune.report)


def run_trial_on_ranks(values: dict[str, Any], settings: TrialSettings) -> None:
    """The same for a trial of several processes, on one node or many, which Ray Train starts."""
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
    from ray.tune.integration.ray_train import TuneReportCallback

    # Whoever frees the place of a trial that was stopped early looks for Ray by this variable; without it, it gives up
    # where a second Ray runs on the machine, and the next trial waits for ever.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    trial = tune.get_context().get_trial_id()
    TorchTrainer(
        lambda: train_trial(values, settings, trial, train.report),
        scaling_config=train.ScalingConfig(
            num_workers=settings.ranks,
            use_gpu=settings.gpus > 0,
            resources_per_worker={"CPU": settings.cpus - COORDINATOR, "GPU": settings.gpus},
        ),
        run_config=train.RunConfig(
            name=trial, storage_path=str(settings.folder / "tune" / "ranks"), callbacks=[TuneReportCallback()]
        ),
    ).fit()


def train_trial(
    values: dict[str, Any], settings: TrialSettings, trial: str, report: Callable[[dict[str, Any]], None]
) -> None:
    """Train with the drawn `values`, reporting to Ray from every rank and to MLflow from the first."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", settings.uri)
    config = settings.space.apply(settings.base, values)
    splits = [
        pseudo_split(settings.data, pseudo_name(config.protocol, seed), config.split, config.workers)
        for seed in settings.seeds
    ]
    folder = settings.folder / "trials" / trial
    tracker: Tracker = NullTracker()
    if rank() == 0:
        record = {"config": {**config.to_dict(), "search": values}, "split_hash": splits[0].build.manifest.split_hash}
        RunFolder(folder).write_config({**record, "commit": source_commit()})
        tracker = JournalTracker(
            folder,
            uri=settings.uri,
            experiment=settings.tracking.experiment,
            offline=settings.tracking.offline,
            parent=settings.parent,
        )
    try:
        for epoch, scores in trial_scores(config, splits, folder, settings.report_every):
            tracker.log({f"pseudo/{name}": value for name, value in scores.items()}, epoch)
            report({"epoch": epoch, **scores})
    except BaseException as error:
        # The scheduler stops a trial by SystemExit out of the report: nothing is wrong with it.
        tracker.close("FINISHED" if isinstance(error, SystemExit) else "FAILED")
        raise
    tracker.close("FINISHED")


@functools.lru_cache(maxsize=8)
def pseudo_split(data: Path, name: str, split: int, workers: int) -> Partitions:
    """Decoded once for all trials of a process."""
    return Partitions(find_build(data, name, split), join_ranks(), workers)


def trial_scores(
    config: TrainConfig, splits: Sequence[Partitions], folder: Path, every: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """(epochs done, scores) after every so many epochs and at the end. Where `folder` has checkpoints it goes on from
    them, first with their own score: whoever died after writing them may not have told it to anybody.

    The score is the mean over splits of AUROC on pseudo-unknown classes at the best k, and closed-set accuracy counts
    in the second place: {"score", "auroc", "accuracy", "k", "train_seconds"}.
    """
    trainers: list[Trainer] = []
    runs: list[Iterator[tuple[int, float]]] = []
    with contextlib.ExitStack() as folders:
        for partitions in splits:
            build = partitions.build
            own = dataclasses.replace(
                config, protocol=build.protocol.name, run_dir=folder / build.protocol.name, checkpoint_every=every
            )
            trainers.append(Trainer(own, partitions))
            # A folder of its own: a trial that is tried again goes on from its checkpoint.
            run = RunFolder(own.folder) if rank() == 0 else NullRunFolder(own.folder)
            folders.callback(run.close)
            identity = run_identity(own, build, partitions.device)
            runs.append(training_epochs(trainers[-1], run, NullTracker(), identity))
        done, seconds = [0] * len(runs), [0.0] * len(runs)
        for target in [*range(every, config.total_epochs, every), config.total_epochs]:
            for place, epochs in enumerate(runs):
                while done[place] < target:
                    done[place], seconds[place] = next(epochs)
            if done == [target] * len(done):  # else it was scored before the checkpoint
                scores = from_first_rank(lambda: mean_scores(trainers))
                yield target, {**scores, "train_seconds": sum(seconds)}


def mean_scores(trainers: list[Trainer]) -> dict[str, float]:
    results = []
    for trainer in trainers:
        model = build_model(trainer.portable_encoder(), trainer.partitions, trainer.config)
        results.append(evaluate_open_set(model, trainer.partitions, trainer.config.ks))
    ks = set.intersection(*(set(result["auroc"]) for result in results))
    auroc = {k: sum(result["auroc"][k] for result in results) / len(results) for k in sorted(ks)}
    best = max(auroc, key=auroc.__getitem__)
    accuracy = sum(result["closed_set_accuracy"][best] for result in results) / len(results)
    # A hundredth of the accuracy settles between trials that AUROC cannot tell apart.
    return {"score": auroc[best] + 0.01 * accuracy, "auroc": auroc[best], "accuracy": accuracy, "k": best}
