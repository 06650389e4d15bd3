"""A training run that several ways of launching are tried with, and what is left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_pipeline.beton import Build
from tests.cluster.hosts import ROOT

OPTIONS = [
    "--epochs", "4", "--batch-size", "96", "--checkpoint-every", "1", "--log-every", "1", "--encoder.width", "4",
    "--encoder.hidden-dim", "16", "--encoder.embedding-dim", "16", "--optimizer.name", "sgd",
    "--optimizer.learning-rate", "3e-5", "--tracking.offline",
]  # fmt: skip


def options(digits: Build, folder: Path) -> list[str]:
    """Of a run in `folder`."""
    return ["--data", str(digits.folder), "--run-dir", str(folder / "run"), *OPTIONS]


def train_alone(digits: Build, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that one process trains."""
    command = [sys.executable, "-m", "trainer.train", *options(digits, folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, capture_output=True)
    return weights(folder)


def steps_done(folder: Path) -> int:
    records = [json.loads(path.read_text()) for path in folder.glob("run/checkpoints/step-*/state.json")]
    return max((record["progress"]["total_steps"] for record in records), default=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "encoder.safetensors")


def assert_close(trained: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in trained.items():
        # Rounding, which 28 steps at a temperature of 0.05 have made larger.
        torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=2e-2, msg=name)


def rank_processes(folder: Path) -> dict[int, int]:
    """The process of each rank that trains in `folder`, on whichever host, by its number on this machine."""
    found = {}
    listed = subprocess.run(["pgrep", "-f", f"train.*{folder}/run"], capture_output=True, text=True).stdout
    for pid in map(int, listed.split()):
        try:
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            program = Path(f"/proc/{pid}/exe").resolve().name
        except OSError:
            continue  # ended meanwhile
        place = dict(item.split("=", 1) for item in environment if "=" in item)
        number = place.get("RANK") or ("SLURM_STEP_ID" in place and place["SLURM_PROCID"])
        if program.startswith("python") and number:
            found[int(number)] = pid
    return found
