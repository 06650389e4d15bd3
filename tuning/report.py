"""What a sweep found out: a table of its trials, the importance of each knob, and pictures of both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from tuning.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that is over."""

    name: str
    values: dict[str, Any]
    score: float | None
    """None if it never reported."""
    metrics: dict[str, float]
    error: str | None = None


def table_of(trials: Sequence[Trial], title: str, most: int = 10) -> Table:
    """The best trials, and every failed one."""
    table = Table("trial", "score", "AUROC", "accuracy", "k", "epochs", "values", title=escape(title))
    scored = sorted((t for t in trials if t.score is not None), key=lambda trial: -trial.score)
    for trial in scored[:most]:
        table.add_row(
            trial.name,
            f"{trial.score:.4f}",
            f"{100 * trial.metrics['auroc']:.2f}",
            f"{100 * trial.metrics['accuracy']:.2f}",
            f"{trial.metrics['k']:.0f}",
            f"{trial.metrics['epoch']:.0f}",
            escape(short(trial.values)),
        )
    for trial in trials:
        if trial.error:
            table.add_row(trial.name, "failed", "", "", "", "", escape(short(trial.values)))
    return table


def draw(trials: Sequence[Trial], space: SearchSpace, folder: Path) -> dict[str, float]:
    """Write importance.png, parallel_coordinates.png and slices.png; returns each knob's importance, 0 to 1.

    Importance is fANOVA's (Hutter et al. 2014): the share of the score's variance that a knob explains. It takes at
    least two trials with different scores; with fewer nothing is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as pictures

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        if trial.score is not None:
            distributions = {name: space.distributions[name] for name in trial.values}
            study.add_trial(
                optuna.trial.create_trial(params=trial.values, distributions=distributions, value=trial.score)
            )
    if len({trial.value for trial in study.trials}) < 2:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    importance = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    for name, plot in (
        ("importance", pictures.plot_param_importances),
        ("parallel_coordinates", pictures.plot_parallel_coordinate),
        ("slices", pictures.plot_slice),
    ):
        arguments = {"evaluator": optuna.importance.FanovaImportanceEvaluator(seed=0)} if name == "importance" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            plot(study, **arguments)
        figure = plt.gcf()
        figure.set_size_inches(max(figure.get_size_inches()[0], 10), 5)
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close("all")
    return dict(importance)


def short(values: Mapping[str, Any]) -> str:
    """Drawn values in one line."""

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name.rpartition('.')[2]} {text(value)}" for name, value in values.items())
