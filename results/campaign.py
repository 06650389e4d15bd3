"""`python -m results.campaign VARIANTS.json --data DATA --out FOLDER --seconds 450`: choose and train in a given time.

First `results.choose` finds a recipe within a quarter of the time; then GradMix and the same without mixing are trained
with it on each split, for as many epochs as fit into what is left, going by the steps of the choice.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from data_pipeline import cli
from data_pipeline.files import read_json
from results.choose import choose
from results.run import RunConfig, Runner
from results.tables import ARMS

# A step without the third view takes about two thirds of one with it, and what comes before and after a training, its
# measurement above all, about as long everywhere.
_STEPS_OF_BOTH_ARMS = 1.7


@dataclass(frozen=True, kw_only=True)
class CampaignConfig(RunConfig):
    """Which variants, on which data and splits, and how long."""

    protocol: str = "cifar10"
    """Protocol of the table."""
    splits: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Its splits, in the order in which they are trained."""


def epochs_that_fit(seconds: float, splits: int, chosen: list[dict[str, Any]]) -> int:
    """Epochs of both arms on so many splits within `seconds`, at least 1.

    Going by finished runs of the choice, `chosen`: the seconds per image of the fastest, which compiled nothing, and
    the seconds beside training of the median one. A protocol has half as many images again as its pseudo-open one.
    """
    per_image = min(run["train_seconds"] / (run["epochs"] * run["train_images"]) for run in chosen)
    beside = sorted(run["wall_seconds"] - run["train_seconds"] for run in chosen)[len(chosen) // 2]
    images = 1.5 * chosen[0]["train_images"]
    left = seconds - splits * len(ARMS) * 1.5 * beside
    return max(int(left / (splits * images * per_image * _STEPS_OF_BOTH_ARMS)), 1)


def campaign(config: CampaignConfig) -> None:
    started = time.perf_counter()
    folder = config.out / "selection"
    selection = dataclasses.replace(config, out=folder, work=config.work / "selection", seconds=config.seconds / 4)
    given, run = read_json(config.plan, "list of variants"), Runner(selection)
    chosen = choose(given, run)
    finished = [read_json(path, "result") for path in sorted(folder.glob("*.json")) if path.stem != "choice"]
    left = config.seconds - (time.perf_counter() - started)
    epochs = epochs_that_fit(left, len(config.splits), finished)
    run.console.print(f"chosen: {chosen or 'the base'}; {left:.0f} s are left for {epochs} epochs")
    # What the base says of protocol, split and epochs is said again: the last one counts.
    common = f"{given['base']} {chosen} --protocol {config.protocol} --epochs {epochs}"
    train = Runner(dataclasses.replace(config, seconds=left))
    for split in config.splits:
        for arm in ARMS:
            train(f"{arm}-split{split}", f"{common} --method {arm} --split {split}")


def main() -> None:
    campaign(cli.parse(CampaignConfig, prog="python -m results.campaign", description=__doc__.split("\n")[0]))


if __name__ == "__main__":
    cli.run(main)
