"""Trials of earlier sweeps, out of MLflow, for a search to start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipeline.errors import InputError
from tuning.config import SweepConfig
from tuning.space import SearchSpace


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
