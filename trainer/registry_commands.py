"""`python -m trainer.registry`: register a run's model, compare two, promote and demote, show what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from data_pipeline import cli
from trainer import promotion, registry
from trainer.promotion import Measurement, Metric
from trainer.registry import ModelCard

_Measurement = Annotated[Measurement, tyro.conf.arg(name="")]
_USUAL = Measurement()

app = tyro.extras.SubcommandApp()


@app.command
def register(run_dir: tyro.conf.Positional[Path], model_name: str | None = None, alias: str = "champion") -> None:
    """Register the model of a run folder in MLflow, where training could not do it itself.

    Args:
        run_dir: Run folder of a finished training.
        model_name: Name in the registry. Default: METHOD-PROTOCOL.
        alias: Alias that is moved to the new version; empty for none.
    """
    card = ModelCard.read(run_dir / "model" / "model.json")
    name = model_name or f"{card.method}-{card.protocol['name']}"
    version = registry.register(run_dir, name, alias)
    print(f"registered {name} version {version}" + (f" as @{alias}" if alias else ""))


@app.command
def compare(
    champion: tyro.conf.Positional[str],
    challenger: tyro.conf.Positional[str],
    measurement: _Measurement = _USUAL,
) -> None:
    """Measure two models on the same test images: the difference, and its paired bootstrap interval.

    Args:
        champion: models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model.
        challenger: The other one, of the same protocol and split.
    """
    result = promotion.compare(champion, challenger, measurement)
    table = promotion.comparison_table(result, champion, challenger, measurement.confidence)
    cli.console().print(table)


@app.command
def promote(
    champion: tyro.conf.Positional[str],
    challenger: tyro.conf.Positional[str],
    margin: float = 0.01,
    metric: Metric = "auroc",
    measurement: _Measurement = _USUAL,
) -> None:
    """Move an alias to another version if that is not worse; ends with status 1 where it may be.

    Args:
        champion: The alias, models:/NAME@ALIAS.
        challenger: The version that shall carry it, models:/NAME/VERSION or by another alias.
        margin: Not worse means: the interval of the difference lies above minus this; 0.01 is one point of percent.
            0 asks for a challenger that is surely better.
        metric: What is compared.
    """
    console = cli.console()
    if not promotion.promote(champion, challenger, measurement, margin=margin, metric=metric, console=console):
        raise SystemExit(1)


@app.command
def demote(champion: tyro.conf.Positional[str], why: str = "", tracking_uri: str | None = None) -> None:
    """Give an alias back to the version that carried it before.

    Args:
        champion: The alias, models:/NAME@ALIAS.
        why: What the history shall say.
        tracking_uri: MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db.
    """
    print(f"{champion} is version {promotion.demote(champion, why, tracking_uri)} again")


@app.command
def history(name: tyro.conf.Positional[str], tracking_uri: str | None = None) -> None:
    """Show a model's versions and every move of its aliases, as the registry's tags have them.

    Args:
        name: Name of the model, such as gradmix-digits.
        tracking_uri: MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db.
    """
    for table in promotion.history_tables(name.removeprefix("models:/"), tracking_uri):
        cli.console().print(table)


def main() -> None:
    app.cli(
        prog="python -m trainer.registry", description="Register, compare and promote models; see what became of them."
    )
