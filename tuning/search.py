"""All trials of a search, on Ray Tune: who draws their values, who stops them early, and what became of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.run_folder import RunFolder
from trainer.tracking import Link
from tuning.config import SweepConfig
from tuning.nodes import check_shared, connected, nodes_with_cores, preflight
from tuning.report import Trial
from tuning.space import SearchSpace
from tuning.trial import COORDINATOR, TrialSettings, run_trial, run_trial_on_ranks
from tuning.warm_start import Earlier

if TYPE_CHECKING:  # imported where a search starts: --help and wrong input need not wait for it
    from ray.tune import Tuner


def search(config: SweepConfig, settings: TrialSettings, earlier: Sequence[Earlier], run: RunFolder) -> list[Trial]:
    """Run all trials on Ray."""
    from tuning.stopping import preempted_by_signals

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Seconds between two notes of what trials there are, for --resume. By default ten: short trials are over by then.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    if earlier:
        run.log(f"starting from {len(earlier)} trials of earlier sweeps")
    # Trials of several processes that are stopped early free their resources through the dashboard's agents.
    with preempted_by_signals(), connected(config.address, dashboard=config.ranks > 1) as where:
        nodes = nodes_with_cores()
        cpus, gpus = (sum(node["Resources"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
        run.log(f"{where}: {len(nodes)} node{'' if len(nodes) == 1 else 's'}, {cpus:g} CPUs, {gpus:g} GPUs")
        at_once = preflight(config.ranks, config.cpus, config.gpus, [node["Resources"] for node in nodes])
        check_shared(None if settings.tracking.offline else settings.uri, [settings.data, settings.folder], nodes)
        results = make_tuner(config, settings, at_once, earlier).fit()
    trials = [
        Trial(
            name=result.metrics.get("trial_id", Path(result.path).name) if result.metrics else Path(result.path).name,
            values=dict(result.config or {}),
            score=(result.metrics or {}).get("score"),
            metrics={
                key: (result.metrics or {}).get(key) for key in ("auroc", "accuracy", "k", "epoch", "train_seconds")
            },
            error=str(result.error).strip().splitlines()[-1] if result.error else None,
        )
        for result in results
    ]
    close_trials(settings, trials)
    return trials


def make_tuner(config: SweepConfig, settings: TrialSettings, at_once: int, earlier: Sequence[Earlier]) -> Tuner:
    """The search as Ray Tune runs it where `at_once` trials have room; with --resume the one in the sweep folder."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from tuning.progress import TrialLines
    from tuning.stopping import Stopping

    storage = settings.folder / "tune"
    if config.ranks == 1:
        function, resources = run_trial, {"cpu": config.cpus, "gpu": config.gpus}
    else:
        function, resources = run_trial_on_ranks, {"cpu": COORDINATOR}
    trainable = tune.with_resources(tune.with_parameters(function, settings=settings), resources)
    if config.resume and (storage / "search").is_dir():
        # Those that failed go on under their own names: the searcher knows no others.
        return tune.Tuner.restore(
            str(storage / "search"), trainable=trainable, resume_unfinished=True, resume_errored=True
        )
    scheduler = FIFOScheduler()
    if config.early_stopping:
        scheduler = ASHAScheduler(
            time_attr="epoch",
            metric="score",
            mode="max",
            max_t=config.epochs,
            grace_period=min(config.report_every, config.epochs),
        )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher(config, settings.space, earlier),
            scheduler=scheduler,
            num_samples=config.num_samples,
            time_budget_s=config.time_budget and 60 * config.time_budget,
            # Ray Tune sees the function that waits for a trial's processes, not how much they ask for.
            max_concurrent_trials=config.max_concurrent or (at_once if config.ranks > 1 else None),
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=config.ranks == 1,  # imports take longer than a short trial
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[TrialLines(), Stopping()],
            verbose=0,
        ),
    )


def searcher(config: SweepConfig, space: SearchSpace, earlier: Sequence[Earlier]) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler if config.search == "random" else optuna.samplers.TPESampler
    points, scores = [trial.values for trial in earlier], [trial.score for trial in earlier]
    known = {"points_to_evaluate": points, "evaluated_rewards": scores} if earlier else {}
    seed = config.seed + len(earlier)  # lest it draws again what an earlier sweep with this seed began with
    return OptunaSearch(space.distributions, metric="score", mode="max", sampler=sampler(seed=seed), **known)


def close_trials(settings: TrialSettings, trials: Sequence[Trial]) -> None:
    """Note the end of those that had no time to: stopped early, or killed just when they began, and begun anew."""
    ends = {trial.name: "FAILED" if trial.error else "FINISHED" for trial in trials}
    for folder in trial_folders(settings.folder):
        link = Link.read(folder)
        if link.status == "RUNNING":
            link.replaced(status=ends.get(folder.name, "KILLED")).save(folder)


def trial_folders(sweep_folder: Path) -> list[Path]:
    """Of all trials that have begun."""
    return sorted(path.parent for path in sweep_folder.glob("trials/*/mlflow.json"))
