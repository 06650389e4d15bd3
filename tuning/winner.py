"""The best trial's values, trained once on all known classes and measured on the real unknowns; who is champion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from data_pipeline.beton import Build
from data_pipeline.errors import InputError
from data_pipeline.files import read_json
from trainer.config import TrainConfig
from trainer.promotion import Measurement, Metric, promote
from trainer.registry import find_version
from trainer.tracking import Link
from trainer.train import train
from tuning.config import SweepConfig
from tuning.space import SearchSpace
from tuning.trial import TrialSettings


def train_winner(
    config: SweepConfig,
    space: SearchSpace,
    best: Mapping[str, Any],
    build: Build,
    settings: TrialSettings,
    console: Console,
) -> dict[str, Any]:
    """Train the `best` trial's values on all known classes, measure them on the real unknowns, and keep the model if it
    beats the champion. `build` is the protocol's own."""
    base = dataclasses.replace(config.base, protocol=config.protocol, split=config.split)
    smallest = min(build.record("train").class_counts)
    winner = dataclasses.replace(
        space.apply(base, best["values"]),
        epochs=config.final_epochs or base.epochs,
        phases=(),  # which would take the place of the θ and λ that were found
        data=build.folder,
        # Its own folder: another one may win when failed trials are tried again.
        run_dir=config.path / f"winner-{best['trial']}",
        k=min(int(best["k"]), smallest),
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
