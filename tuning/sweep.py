"""`python tuning/sweep.py`, `ray submit cluster.yaml tuning/sweep.py -- ...`: search for hyperparameters.

Trials train on pseudo-known classes and are scored on pseudo-unknown ones, all of them known classes of the protocol's
training images. Only the winner is then trained on all known classes, once, and measured on the real unknowns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro
from rich.console import Console

from data_pipeline import cli
from data_pipeline.beton import Build, find_build
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError
from data_pipeline.files import read_json, write_json
from data_pipeline.protocols import Protocol
from data_pipeline.run_folder import RunFolder, source_commit
from trainer.config import TrainConfig, recipe
from trainer.engine import micro_batch_size
from trainer.promotion import Measurement, Metric, promote
from trainer.registry import find_version
from trainer.tracking import (
    JournalTracker,
    Link,
    check_store,
    deliver,
    resolve_uri,
    went_through,
    without_password,
)
from trainer.train import train
from tuning.nodes import check_shared, connected, nodes_with_cores, preflight
from tuning.report import Trial, draw, table_of
from tuning.space import DEFAULT_SPACE, SearchSpace
from tuning.trial import COORDINATOR, TrialSettings, pseudo_name, run_trial, run_trial_on_ranks

if TYPE_CHECKING:  # imported where a search starts: --help and wrong input need not wait for it
    from ray.tune import Tuner


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to search, how long, on what, and what to do with the winner."""

    protocol: str = "digits"
    """Protocol whose known classes are searched on; it also chooses the recipe that --base starts from."""
    split: int = 0
    """Split of the protocol, from 0."""
    space: Path = DEFAULT_SPACE
    """YAML file of what is varied; the default lies beside this script, with reasons."""
    num_samples: int = 24
    """Trials, 1 or more."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the pseudo-open splits that each score is averaged over; 0 or more each."""
    epochs: int = 12
    """Epochs of a trial that is not stopped early; 1 or more."""
    report_every: int = 3
    """Epochs between two scores, at each of which a trial may be stopped; 1 or more."""
    search: Literal["tpe", "random"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator; random: the baseline."""
    early_stopping: bool = True
    """Stop the worse trials early (ASHA)."""
    seed: int = 0
    """Seed of the search; the same seed draws the same first trials."""
    time_budget: float | None = None
    """Start no trial after so many minutes; above 0. Default: no limit."""
    warm_start: tuple[str, ...] = ()
    """MLflow run ids of earlier sweeps of the same split and space, whose trials the search starts from."""

    ranks: int = 1
    """Processes of a trial, 1 or more; to train with several GPUs, on one node or many, one for each."""
    cpus: float = 1.0
    """CPU cores of each process, may be a fraction."""
    gpus: float = 0.0
    """GPUs of each process; a fraction for trials of one: 0.25 lets four trials share a GPU."""
    max_concurrent: int | None = None
    """Trials at the same time, 1 or more. Default: as many as the nodes hold."""
    retries: int = 1
    """How often a failed trial is tried again, going on from its checkpoint; 0 or more."""
    address: str | None = None
    """Ray cluster to use: auto, or HOST:PORT. Default: the one this script is submitted to, else this machine."""

    data: Path = Path("data")
    """Data folder; what is not built yet is built there. On a cluster a path that all nodes share."""
    source: str | None = None
    """Where images come from, as for data_pipeline.build."""
    root: Path | None = None
    """Folder of the images, as for data_pipeline.build."""
    folder: Path | None = None
    """Sweep folder, shared like --data. Default: sweeps/PROTOCOL-SPLIT-seedSEED."""
    resume: bool = False
    """Go on with the sweep in the folder: finished trials stay, others go on from their checkpoints."""
    restart: bool = False
    """Discard what the folder holds."""
    final_epochs: int | None = None
    """Epochs of the winner's own training; 0: leave it out. Default: the recipe's."""
    base: TrainConfig = field(default_factory=TrainConfig)
    """What the drawn values are put into; its names, data and epochs are set by the options above."""

    def __post_init__(self) -> None:
        least_values = {"num_samples": 1, "epochs": 1, "report_every": 1, "ranks": 1, "retries": 0, "split": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; set it to {least} or more")
        if self.final_epochs is not None and self.final_epochs < 0:
            raise InputError(f"final-epochs is {self.final_epochs}; set it to 0 or more")
        if not self.seeds or min(self.seeds) < 0:
            raise InputError(f"seeds is {self.seeds}; name one or more, each 0 or more")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise InputError(f"cpus is {self.cpus} and gpus {self.gpus}; give a trial something to run on")
        if self.ranks > 1 and (self.cpus <= COORDINATOR or self.gpus % 1):
            raise InputError(f"each of {self.ranks} processes needs CPU cores and whole GPUs: set --cpus and --gpus so")
        micro_batch_size(self.base.batch_size, self.ranks, accumulation=1)
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise InputError(f"max-concurrent is {self.max_concurrent}; set it to 1 or more")
        if self.time_budget is not None and self.time_budget <= 0:
            raise InputError(f"time-budget is {self.time_budget}; set it above 0")
        if self.resume and self.restart:
            raise InputError("--resume goes on with a sweep and --restart discards it: give one of them")

    @property
    def path(self) -> Path:
        # Ray changes the working folder of its workers.
        return (self.folder or Path("sweeps") / f"{self.protocol}-{self.split}-seed{self.seed}").resolve()

    @property
    def trial_config(self) -> TrainConfig:
        return dataclasses.replace(
            self.base, protocol=self.protocol, split=self.split, epochs=self.epochs, phases=(), evaluate_every=0
        )


def sweep(config: SweepConfig, console: Console) -> dict[str, Any]:
    """The whole search; returns what is written to `result.json`."""
    space = SearchSpace.read(config.space)
    uri = resolve_uri(config.base.tracking.uri)
    if config.warm_start or not config.base.tracking.offline:
        check_store(uri)
    earlier = earlier_trials(config, space, uri)
    for seed in config.seeds:
        prepare(config, console, seed)
    with contextlib.closing(RunFolder(config.path, console)) as run:
        begin(config, space, run)
        return run_sweep(config, space, uri, earlier, run, console)


def run_sweep(
    config: SweepConfig, space: SearchSpace, uri: str, earlier: Sequence[Earlier], run: RunFolder, console: Console
) -> dict[str, Any]:
    tracker = JournalTracker(
        run.path, uri=uri, experiment=config.base.tracking.experiment, offline=config.base.tracking.offline
    )
    try:
        settings = TrialSettings(
            base=config.trial_config,
            space=space,
            seeds=config.seeds,
            data=config.data.resolve(),
            folder=config.path,
            report_every=config.report_every,
            tracking=config.base.tracking,
            uri=absolute(uri),
            parent=parent_run(run.path, config),
            ranks=config.ranks,
            cpus=config.cpus,
            gpus=config.gpus,
        )
        started = time.perf_counter()
        trials = search(config, settings, earlier, run)
        seconds = time.perf_counter() - started
        trained = sum(trial.metrics["train_seconds"] or 0 for trial in trials)
        run.log(f"{len(trials)} trials in {seconds:,.0f} s, {trained:,.0f} s of training in all")
        tracker.log({"search_seconds": seconds, "train_seconds": trained}, 0)
        result = conclude(config, space, trials, run, tracker)
        handed_over = config.base.tracking.offline or went_through(lambda: hand_over(run.path))
        if config.final_epochs != 0:
            result["final"] = train_winner(config, space, result, settings, console)
            write_json(run.path / "result.json", result)
        if not handed_over and not went_through(lambda: hand_over(run.path)):
            raise InputError(
                f"the sweep is complete in {run.path}, but {without_password(uri)} has not taken all records of it: "
                "when it does again, add --resume to the same command"
            )
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, cli.Preempted))
        if interrupted:
            run.log("stopped: the same command with --resume goes on")
        tracker.close("KILLED" if interrupted else "FAILED")
        raise
    tracker.close("FINISHED")
    run.log(f"written to {run.path}")
    return result


def absolute(uri: str) -> str:
    """Workers run elsewhere: a store in the working folder is named in full."""
    if not uri.startswith("sqlite:///"):
        return uri
    return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"


def prepare(config: SweepConfig, console: Console, seed: int | None) -> Build:
    """The build of a pseudo-open split, or with None of the protocol itself; made if it is not there."""
    name = config.protocol if seed is None else pseudo_name(config.protocol, seed)
    try:
        return find_build(config.data, name, config.split)
    except InputError as error:
        if "no files of protocol" not in str(error) or (config.root is None and config.protocol != "digits"):
            raise
    return build(
        BuildConfig(
            protocol=config.protocol,
            split=config.split,
            pseudo_open=seed,
            source=config.source,
            root=config.root,
            out=config.data,
        ),
        console,
    )


def begin(config: SweepConfig, space: SearchSpace, run: RunFolder) -> None:
    """Write what is asked, having made sure that it is not something else than what the folder holds."""
    protocol = Protocol(config.protocol, config.split) if config.protocol != "custom" else None
    record = {"protocol": config.protocol, "split": config.split, "seeds": list(config.seeds), "epochs": config.epochs}
    # What Ray Tune goes on with as it was begun.
    record |= {"number of trials": config.num_samples, "search": config.search, "early stopping": config.early_stopping}
    record |= {"base": config.trial_config.identity, "space": {n: repr(d) for n, d in space.distributions.items()}}
    earlier = run.config()
    if config.restart or (earlier is not None and not (run.path / "tune" / "search").is_dir()):
        # What was refused before its first trial, for want of cores say, is no sweep to go on with.
        for folder in (*(run.path / name for name in ("trials", "tune", "plots")), *run.path.glob("winner-*")):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("journal.jsonl", "mlflow.json", "result.json"):
            (run.path / name).unlink(missing_ok=True)
        run.clear()
    elif earlier is not None and not config.resume:
        raise InputError(
            f"{run.path} holds a sweep: add --resume to go on with it, --restart to discard it, or --folder"
        )
    elif earlier is not None and earlier["identity"] != json.loads(json.dumps(record)):
        different = [name for name in record if earlier["identity"].get(name) != json.loads(json.dumps(record[name]))]
        raise InputError(f"{run.path} holds a sweep with other {', '.join(different)}: name another --folder")
    run.write_config(
        {
            "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
            "identity": record,
            "split_hash": protocol.split_hash if protocol else "",
            "commit": source_commit(),
        }
    )


def parent_run(folder: Path, config: SweepConfig) -> str | None:
    """The MLflow run of the sweep, made now since its trials are nested in it."""
    if config.base.tracking.offline:
        return None
    deliver(folder)
    return Link.read(folder).run_id


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
        return tune.Tuner.restore(
            str(storage / "search"), trainable=trainable, resume_unfinished=True, restart_errored=True
        )
    scheduler = FIFOScheduler()
    if config.early_stopping:
        scheduler = ASHAScheduler(
            time_attr="epoch", metric="score", mode="max", max_t=config.epochs, grace_period=config.report_every
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


class Earlier(NamedTuple):
    """A trial of an earlier sweep."""

    values: dict[str, Any]
    score: float


def earlier_trials(config: SweepConfig, space: SearchSpace, uri: str) -> list[Earlier]:
    """Those of the sweeps to start from, out of MLflow.

    Raises:
        InputError: there is no such sweep, it was of another split, or it has no trial of this space.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    found: list[Earlier] = []
    for parent in config.warm_start:
        client = MlflowClient(uri)
        try:
            run = client.get_run(parent)
            nested = client.search_runs(
                [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1000
            )
        except MlflowException as error:
            raise InputError(f"there is no MLflow run {parent} to start from: correct --warm-start") from error
        protocol, split = (run.data.params.get(name) for name in ("protocol", "split"))
        if (protocol, split) != (config.protocol, str(config.split)):
            raise InputError(f"MLflow run {parent} is of protocol {protocol}, split {split}: correct --warm-start")
        trials = [
            Earlier(values, trial.data.metrics["pseudo/score"])
            for trial in nested
            if (values := _drawn(space, trial.data.params)) and "pseudo/score" in trial.data.metrics
        ]
        if not trials:
            raise InputError(f"MLflow run {parent} has no trial of this search space: correct --warm-start or --space")
        found += trials
    return found


def _drawn(space: SearchSpace, params: Mapping[str, str]) -> dict[str, Any] | None:
    """The values that a trial with these MLflow parameters had; None if they are not of `space`."""
    texts = {name.removeprefix("search."): text for name, text in params.items() if name.startswith("search.")}
    if texts.keys() != space.distributions.keys():
        return None
    values: dict[str, Any] = {}
    for name, distribution in space.distributions.items():
        if hasattr(distribution, "choices"):
            fitting = [choice for choice in distribution.choices if str(choice) == texts[name]]
        else:
            try:
                number = type(distribution.low)(texts[name])
            except ValueError:
                return None
            fitting = [number] if distribution.low <= number <= distribution.high else []
        if not fitting:
            return None
        values[name] = fitting[0]
    return values


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


def conclude(
    config: SweepConfig, space: SearchSpace, trials: Sequence[Trial], run: RunFolder, tracker: JournalTracker
) -> dict[str, Any]:
    """Choose the winner, write the table and the pictures."""
    for trial in trials:
        if trial.error:
            run.log(f"trial {trial.name} failed: {trial.error}")
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise InputError(f"no trial of {len(trials)} came to a score; the first said: {trials[0].error}")
    # A trial that was stopped early was so for being worse; its score stands all the same.
    best = max(scored, key=lambda trial: trial.score)
    importance = draw(trials, space, run.path / "plots")
    result = {
        "best": {"trial": best.name, "values": best.values, "score": best.score, **best.metrics},
        "importance": importance,
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    write_json(run.path / "result.json", result)
    tracker.log(
        {"best_score": best.score, "trials": len(trials), "failed": sum(t.error is not None for t in trials)}, 0
    )
    if run.console is not None:
        title = f"{config.protocol}, split {config.split}: {len(trials)} trials on pseudo-unknown classes"
        run.console.print(table_of(trials, title))
        for name, share in importance.items():
            run.console.print(f"  importance of {name}: {share:.0%}")
    return result


def hand_over(folder: Path) -> None:
    """Bring MLflow up to date with the trials, and give it the table and the pictures."""
    from mlflow.tracking import MlflowClient

    for trial in trial_folders(folder):
        deliver(trial)
    link = Link.read(folder)
    client = MlflowClient(link.uri)
    client.log_artifact(link.run_id, str(folder / "result.json"))
    if (folder / "plots").is_dir():
        client.log_artifacts(link.run_id, str(folder / "plots"), "plots")


def train_winner(
    config: SweepConfig, space: SearchSpace, result: dict[str, Any], settings: TrialSettings, console: Console
) -> dict[str, Any]:
    """Train the winner on all known classes, measure it on the real unknowns, and keep it if it beats the champion."""
    made = prepare(config, console, None)
    base = dataclasses.replace(config.base, protocol=config.protocol, split=config.split)
    smallest = min(made.record("train").class_counts)
    winner = dataclasses.replace(
        space.apply(base, result["best"]["values"]),
        epochs=config.final_epochs or base.epochs,
        data=made.folder,
        # Its own folder: another one may win when failed trials are tried again.
        run_dir=config.path / f"winner-{result['best']['trial']}",
        k=min(int(result["best"]["k"]), smallest),
        tracking=dataclasses.replace(config.base.tracking, uri=settings.uri, alias="challenger"),
    )
    train(winner, console)
    metrics = read_json(winner.folder / "metrics.json", "metrics")
    final = {"k": winner.k, "run_dir": str(winner.folder)}
    # Where the protocol itself has no unknown class, only the accuracy is there.
    final |= {name: metrics[name][str(winner.k)] for name in ("auroc", "closed_set_accuracy") if name in metrics}
    if not winner.tracking.offline:
        final["alias"] = crown(winner, "auroc" if "auroc" in final else "accuracy", console)
    return final


def crown(winner: TrainConfig, metric: Metric, console: Console) -> str:
    """Make the winner champion if nobody is, or if it is surely better than the present one on the same images; returns
    the alias it carries."""
    version = Link.read(winner.folder).version
    challenger = f"models:/{winner.model_name}/{version}"
    if "champion" in find_version(challenger, winner.tracking.uri).aliases:
        return "champion"  # from before the sweep was interrupted
    try:
        better = promote(
            f"models:/{winner.model_name}@champion",
            challenger,
            Measurement(data=winner.data, tracking_uri=winner.tracking.uri),
            margin=0.0,
            metric=metric,
            console=console,
        )
    except InputError as error:
        console.print(f"the champion stays, the winner is @challenger: {error}", markup=False, highlight=False)
        return "challenger"
    return "champion" if better else "challenger"


@dataclass(frozen=True)
class _Launch:
    """The option that is read before the others."""

    protocol: str = "digits"
    """Protocol, which chooses the recipe."""


def parse_config(args: Sequence[str]) -> SweepConfig:
    launch, rest = tyro.cli(_Launch, args=args, return_unknown_args=True, add_help=False)
    default = SweepConfig(protocol=launch.protocol, base=recipe(launch.protocol))
    return cli.parse(
        SweepConfig,
        prog="python tuning/sweep.py",
        description="Search for hyperparameters on pseudo-unknown classes, then train and register the winner.",
        default=default,
        args=rest,
    )


def main() -> None:
    sweep(parse_config(sys.argv[1:]), Console(soft_wrap=True))


if __name__ == "__main__":
    cli.run(main)
