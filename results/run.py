"""`python results/run.py PLAN.json --data DATA --out FOLDER`: the trainings of a plan, a small JSON file for each.

They run in one process, one after the other, and share the decoded images and what torch.compile made. One whose file
is there is not run again. A plan is a list of `{"name": …, "args": "…"}`, the args those of `trainer.train`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline import cli
from data_pipeline.beton import find_build
from data_pipeline.errors import InputError
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
    backbone: bool = False
    """Score also on the features below the projection head."""


def record(config: TrainConfig, seconds: float, features: dict[str, Any] | None) -> dict[str, Any]:
    """What is kept of a finished run."""
    written = read_json(config.folder / "config.json", "configuration")
    lines = (config.folder / "journal.jsonl").read_text().splitlines()
    curve = [line for line in map(json.loads, lines) if "train/total" in line["metrics"]]
    kept = {
        **read_json(config.folder / "metrics.json", "metrics"),
        "wall_seconds": seconds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        **{key: written[key] for key in ("split_hash", "commit", "versions", "config")},
        "curve": [
            {name.removeprefix("train/"): round(value, 4) for name, value in c["metrics"].items()} for c in curve
        ],
    }
    return kept if features is None else {**kept, "on_backbone": features}


def features_result(config: TrainConfig, partitions: Partitions) -> dict[str, Any]:
    """The same measurement on the features below the projection head."""
    encoder = load_model(str(config.folder / "model"), device=partitions.device).encoder
    model = build_model(encoder, partitions, dataclasses.replace(config, score_on="backbone"))
    return evaluate_open_set(model, partitions, config.ks)


def main() -> None:
    config = cli.parse(RunConfig, prog="python results/run.py", description=__doc__.split("\n")[0])
    plan = read_json(config.plan, "plan")
    device, console = join_ranks(), Console(soft_wrap=True)
    opened: dict[tuple[str, int], Partitions] = {}
    started, longest = time.perf_counter(), 0.0
    config.out.mkdir(parents=True, exist_ok=True)
    for entry in plan:
        path = config.out / f"{entry['name']}.json"
        so_far = time.perf_counter() - started
        if path.exists() or so_far + longest > config.seconds:
            console.print(f"{entry['name']}: {'there' if path.exists() else 'no time left'}")
            continue
        arguments = [*entry["args"].split(), "--data", str(config.data), "--tracking.offline"]
        wanted = dataclasses.replace(parse_config(arguments), run_dir=config.work / entry["name"])
        key = (wanted.protocol, wanted.split)
        if key not in opened:
            opened.clear()  # the images of one build at a time
            opened[key] = Partitions(find_build(config.data, *key), device)
        try:
            train(wanted, None, opened[key])
        except InputError as error:
            console.print(f"{entry['name']}: {error}")
            continue
        features = features_result(wanted, opened[key]) if config.backbone else None
        took = time.perf_counter() - started - so_far
        longest = max(longest, took)
        kept = record(wanted, took, features)
        write_json(path, kept)
        console.print(f"{entry['name']}: {took:.1f} s, trained {kept['train_seconds']:.1f} s, {summary(kept)}")


def summary(kept: dict[str, Any]) -> str:
    parts = [f"AUROC {' '.join(f'{k}:{100 * v:.2f}' for k, v in kept['auroc'].items())}"]
    parts.append(f"accuracy {100 * max(kept['closed_set_accuracy'].values()):.2f}")
    if "on_backbone" in kept:
        parts.append(f"backbone {' '.join(f'{k}:{100 * v:.2f}' for k, v in kept['on_backbone']['auroc'].items())}")
    return ", ".join(parts)


if __name__ == "__main__":
    cli.run(main)
