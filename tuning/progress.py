"""What a person sees of a search that is under way. Apart from `report`, so that only a search imports Ray."""

from __future__ import annotations

from typing import Any

from ray.tune import Callback
from rich.console import Console

from tuning.report import short


class TrialLines(Callback):
    """Prints a line for each trial that ends."""

    def __init__(self) -> None:
        self.ended = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        metrics = trial.last_result or {}
        score = f"AUROC {100 * metrics['auroc']:.2f} after {metrics['epoch']} epochs" if "auroc" in metrics else "-"
        self._print(trial, score)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._print(trial, "failed")

    def _print(self, trial: Any, outcome: str) -> None:
        self.ended += 1
        Console(soft_wrap=True, highlight=False).print(
            f"trial {self.ended}: {trial.trial_id}  {outcome}  {short(trial.config)}", markup=False
        )
