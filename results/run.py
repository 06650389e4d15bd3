"""`python -m results.run PLAN.json --data DATA --out FOLDER`: the trainings of a plan, a small JSON file for each.

They run in one process, one after the other, and share the decoded images and what torch.compile made. One whose file
is there is not run again. A plan is a list of `{"name": …, "args": "…"}`, the args those of `trainer.train`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from data_pipeline import cli
from data_pipeline.beton import find_build
from data_pipeline.files import read_json, write_json
from data_pipeline.loader import Partitions
from trainer.config import TrainConfig
from trainer.engine import join_ranks
from trainer.recognition import build_model, evaluate_open_set
from trainer.registry import load_model
from trainer.train import parse_config, train


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Which trainings, on which data, and where to."""

    plan: Annotated[Path, tyro.conf.Positional]
    """JSON file with the list of trainings."""
    data: Path = Path("data")
    """Data folder that holds the builds or exports."""
    out: Path = Path("results")
    """Folder of the JSON files."""
    work: Path = Path("runs/results")
    """Folder of the run folders."""
    seconds: float = float("inf")
    """Start no training that, if it takes as long as the longest before it, would end later than so many seconds."""


class Runner:
    """Trains and measures, one configuration after the other, in this process."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.device, self.console = config, join_ranks(), cli.console()
        self._started, self._longest = time.perf_counter(), 0.0
        self._partitions: tuple[tuple[str, int], Partitions] | None = None
        config.out.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, arguments: str) -> dict[str, Any] | None:
        """What is kept of the run (`record`), after writing it; None if there is no time left for it."""
        path = self.config.out / f"{name}.json"
        if path.exists():
            return read_json(path, "result")
        begun = time.perf_counter()
        if begun - self._started + self._longest > self.config.seconds:
            self.console.print(f"{name}: no time left")
            return None
        given = [*arguments.split(), "--data", str(self.config.data), "--tracking.offline"]
        config = dataclasses.replace(parse_config(given), run_dir=self.config.work / name)
        partitions = self._open(config.protocol, config.split)
        train(config, None, partitions)
        # On the features below the head as well, whichever of the two the model itself compares.
        encoder = load_model(str(config.folder / "model"), device=self.device).encoder
        model = build_model(encoder, partitions, dataclasses.replace(config, score_on="backbone"))
        backbone = evaluate_open_set(model, partitions, config.ks)
        took = time.perf_counter() - begun
        self._longest = max(self._longest, took)
        kept = {**record(config), "on_backbone": backbone, "wall_seconds": took}
        write_json(path, kept)
        kept = read_json(path, "result")
        self.console.print(f"{name}: {took:.1f} s, trained {kept['train_seconds']:.1f} s, {summary(kept)}")
        return kept

    def _open(self, protocol: str, split: int) -> Partitions:
        """The images of one build at a time."""
        if self._partitions is None or self._partitions[0] != (protocol, split):
            build = find_build(self.config.data, protocol, split)
            self._partitions = (protocol, split), Partitions(build, self.device)
        return self._partitions[1]


def record(config: TrainConfig) -> dict[str, Any]:
    """What is kept of a finished run."""
    written = read_json(config.folder / "config.json", "configuration")
    epochs = map(json.loads, (config.folder / "journal.jsonl").read_text().splitlines())
    curve = [epoch["metrics"] for epoch in epochs if "train/total" in epoch["metrics"]]
    return {
        **read_json(config.folder / "metrics.json", "metrics"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        **{key: written[key] for key in ("split_hash", "commit", "versions", "config")},
        "curve": [{name.removeprefix("train/"): round(value, 4) for name, value in epoch.items()} for epoch in curve],
    }


def summary(kept: dict[str, Any]) -> str:
    return "  ".join(
        f"{where} AUROC {' '.join(f'{k}:{100 * v:.2f}' for k, v in result['auroc'].items())} "
        f"accuracy {100 * max(result['closed_set_accuracy'].values()):.2f}"
        for where, result in (("embedding", kept), ("backbone", kept["on_backbone"]))
    )


def main() -> None:
    config = cli.parse(RunConfig, prog="python -m results.run", description=__doc__.split("\n")[0])
    plan, run = read_json(config.plan, "plan"), Runner(config)
    for entry in plan:
        run(entry["name"], entry["args"])


if __name__ == "__main__":
    cli.run(main)
