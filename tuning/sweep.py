"""`python tuning/sweep.py`, `ray submit cluster.yaml tuning/sweep.py -- ...`: search for hyperparameters.

Trials train on pseudo-known classes and are scored on pseudo-unknown ones, all of them known classes of the protocol's
training images. Only the winner is then trained on all known classes, once, and measured on the real unknowns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline import cli
from data_pipeline.beton import Build, find_build
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError
from data_pipeline.files import write_json
from data_pipeline.protocols import Protocol
from data_pipeline.run_folder import RunFolder, source_commit
from trainer.records import as_record, without_password
from trainer.tracking import (
    JournalTracker,
    Link,
    check_store,
    deliver,
    resolve_uri,
    went_through,
)
from tuning.config import SweepConfig, parse_config
from tuning.report import Trial, draw, table_of
from tuning.search import search, trial_folders
from tuning.space import SearchSpace
from tuning.trial import TrialSettings, pseudo_name
from tuning.warm_start import Earlier, earlier_trials
from tuning.winner import train_winner


def sweep(config: SweepConfig, console: Console) -> dict[str, Any]:
    """The whole search; returns what is written to `result.json`."""
    space = SearchSpace.read(config.space, config.trial_config)
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
        # Now, too, since the winner's training may take long.
        handed_over = config.base.tracking.offline or went_through(lambda: hand_over(run.path))
        if config.final_epochs != 0:
            whole = prepare(config, console, None)
            result["final"] = train_winner(config, space, result["best"], whole, settings, console)
            write_json(run.path / "result.json", result)
            handed_over = config.base.tracking.offline or went_through(lambda: hand_over(run.path))
        if not handed_over:
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
            "config": as_record(config),
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


def conclude(
    config: SweepConfig, space: SearchSpace, trials: Sequence[Trial], run: RunFolder, tracker: JournalTracker
) -> dict[str, Any]:
    """Choose the winner, write the table and the pictures."""
    for trial in trials:
        if trial.error:
            run.log(f"trial {trial.name} failed: {trial.error}")
    # One that failed after a good score would fail again where its values are trained for longer.
    scored = [trial for trial in trials if trial.score is not None and not trial.error]
    if not scored:
        said = [trial.error for trial in trials if trial.error]
        why = f"the first said: {said[0]}" if said else "they were stopped before their first one: raise --time-budget"
        raise InputError(f"no trial of {len(trials)} came to a score; {why}")
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


def main() -> None:
    sweep(parse_config(sys.argv[1:]), cli.console())


if __name__ == "__main__":
    cli.run(main)
