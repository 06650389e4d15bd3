"""Checkpoints of a training run: written whole or not at all, the newest few kept, resumed exactly.

    runs/demo/checkpoints/epoch-0010/engine/              DeepSpeed's own: weights, optimizer, schedule
                                     encoder.safetensors  weights alone, readable anywhere
                                     peaks.safetensors    where each image gets its next patch
                                     state.json           epochs done, the configuration's identity, time spent

Random numbers need no saving: they are functions of the seed, the epoch and the image.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from data_pipeline.errors import InputError
from data_pipeline.files import read_json, write_json
from trainer.attribution import PeakStore
from trainer.distributed import rank
from trainer.encoder import save_encoder

_ENGINE = "engine"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come (`state.json`)."""

    epochs_done: int
    train_seconds: float
    identity: dict[str, Any]


def save(run_dir: Path, engine: Any, peaks: PeakStore, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint after `progress.epochs_done` epochs and drop all but the newest `keep`. All ranks call it."""
    final = run_dir / "checkpoints" / f"epoch-{progress.epochs_done:04d}"
    partial = final.with_name(f".{final.name}.partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    engine.save_checkpoint(str(partial), tag=_ENGINE)
    _barrier()
    if rank() == 0:
        save_encoder(engine.module, partial / "encoder.safetensors")
        save_file({"places": peaks.places}, partial / "peaks.safetensors")
        write_json(partial / "state.json", asdict(progress))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _complete(run_dir)[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return next(reversed(_complete(run_dir)), None)


def load(folder: Path, engine: Any, peaks: PeakStore, identity: dict[str, Any]) -> Progress:
    """Continue from a checkpoint; raises `InputError`, naming what differs, if it is of another configuration."""
    progress = Progress(**read_json(folder / "state.json", "checkpoint state"))
    different = sorted(
        name for name in progress.identity.keys() | identity.keys() if progress.identity.get(name) != identity.get(name)
    )
    if different:
        raise InputError(
            f"{folder} is a checkpoint of another configuration ({', '.join(different)} differ): "
            "give the same options, another --run-dir, or --restart to begin again"
        )
    engine.load_checkpoint(str(folder), tag=_ENGINE)
    peaks.places.copy_(load_file(folder / "peaks.safetensors")["places"])
    return progress


def discard(run_dir: Path) -> None:
    """Remove every checkpoint of a run folder."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _complete(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "checkpoints").glob("epoch-*") if (path / "state.json").is_file())


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
