"""What a sweep found out: a table of its trials, the importance of each knob, and pictures of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from trainer.evaluation import plots
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
    """Draw importance, parallel_coordinates and slices, as PNG and SVG; returns each knob's importance, 0 to 1.

    Importance is fANOVA's (Hutter et al. 2014): the share of the score's variance that a knob explains. It takes at
    least two trials with different scores; with fewer nothing is drawn.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # In an order of their own, so that a search that was resumed says what one does that was not.
    scored = sorted((trial for trial in trials if trial.score is not None), key=lambda trial: trial.score)
    if len({trial.score for trial in scored}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial in scored:
        distributions = {name: space.distributions[name] for name in trial.values}
        study.add_trial(optuna.trial.create_trial(params=trial.values, distributions=distributions, value=trial.score))
    importance = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    columns = {name: [trial.values[name] for trial in scored] for name in space.distributions}
    scores = [trial.score for trial in scored]
    logarithmic = {name for name, each in space.distributions.items() if getattr(each, "log", False)}
    title = f"{len(scored)} trials"
    figures = {
        "importance": plots.grouped_bars(
            list(importance),
            {"fANOVA": [100 * share for share in importance.values()]},
            title=f"{title}: what the score depends on",
            label="share of its variance (percent)",
        ),
        "parallel_coordinates": plots.parallel_coordinates(
            columns, scores, logarithmic=logarithmic, title=title, label="score"
        ),
        "slices": plots.slices(columns, scores, logarithmic=logarithmic, title=title, label="score"),
    }
    plots.save_figures(figures, folder)
    return dict(importance)


def short(values: Mapping[str, Any]) -> str:
    """Drawn values in one line."""

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name.rpartition('.')[2]} {text(value)}" for name, value in values.items())
