"""Checkpoints of a training run: written whole or not at all, the newest few kept, resumed exactly.

    runs/demo/checkpoints/step-000000120/encoder.safetensors    weights and batch-norm statistics, float32
                                         optimizer.safetensors  the optimizer's memory of each weight
                                         peaks.safetensors      where each image gets its next patch
                                         keys.safetensors       with MoCo, its key encoder and queue
                                         state.json             how far the run is, its identity, checksums of the files

Tensors are stored by the name of the weight they belong to, whole, however many ranks and whichever ZeRO stage held
them: a run goes on bit for bit where it was, and to rounding on another number of ranks. Random numbers need no saving:
they are functions of the seed, the epoch and the image.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, read_json, replacing_folder, sha256, write_json
from trainer.distributed import from_first_rank
from trainer.encoder import load_encoder, save_encoder

_STATE = "state.json"


class Memory(Protocol):
    """What a run remembers beside weights and optimizer, the same on every rank."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    epoch: int
    """Epochs that are done."""
    step: int
    """Steps of the next epoch that are done."""
    total_steps: int
    """Steps of all epochs that are done."""
    loss_sums: tuple[float, ...]
    """The loss parts of the `step` steps of the unfinished epoch, added up."""
    epoch_seconds: float
    """Spent on the unfinished epoch."""
    train_seconds: float
    """Spent on the epochs that are done."""


def save(
    run_dir: Path,
    engine: Any,
    memories: Mapping[str, Memory],
    progress: Progress,
    identity: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint and drop old ones: the newest `keep` at the end of an epoch stay, and the newest two wherever
    they are. All ranks call it, between two steps of the optimizer.

    Each of `memories` goes to a file of its name.

    Raises:
        InputError: the weights are not finite, or the disk is full; the earlier checkpoints are still there.
    """
    memory = _optimizer_memory(engine)
    schedule = {name: value for name, value in engine.lr_scheduler.state_dict().items() if name != "lr_lambdas"}
    scaler = _loss_scaler(engine)

    def write() -> Path:
        final = run_dir / "checkpoints" / f"step-{progress.total_steps:09d}"
        bad = [name for name, value in engine.module.state_dict().items() if not value.isfinite().all()]
        if bad:
            epoch = progress.epoch + (progress.step > 0)  # from 1, the one that did it
            raise InputError(
                f"the weights are not finite any more ({bad[0]}, epoch {epoch}): lower "
                f"--optimizer.learning-rate; the last good checkpoint is {latest(run_dir) or 'none'}"
            )
        with full_disk_is_bad_input(final), replacing_folder(final) as partial:
            save_encoder(engine.module, partial / "encoder.safetensors")
            save_file(memory, partial / "optimizer.safetensors")
            for name, each in memories.items():
                save_file(each.state(), partial / f"{name}.safetensors")
            record = {
                "progress": asdict(progress),
                "identity": identity,
                "optimizer_steps": _steps(engine, schedule["last_epoch"]),
                "schedule": schedule,
                "loss_scaler": scaler and scaler[0](),
                "sha256": {path.name: sha256(path) for path in sorted(partial.iterdir())},
            }
            write_json(partial / _STATE, record)
        folders = _all(run_dir)
        kept = {*folders[-min(keep, 2) :], *_at_ends_of_epochs(run_dir)[-keep:]}
        for old in set(folders) - kept:
            shutil.rmtree(old, ignore_errors=True)
        return final

    return from_first_rank(write)


def latest(run_dir: Path, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest checkpoint of a run folder whose files match their checksums; `warn` is told of those that do not."""
    for folder in reversed(_all(run_dir)):
        try:
            checksums = read_json(folder / _STATE, "checkpoint state")["sha256"]
            damaged = [name for name, expected in checksums.items() if sha256(folder / name) != expected]
        except (InputError, OSError, KeyError, TypeError, AttributeError):
            damaged = [_STATE]
        if not damaged:
            return folder
        warn(f"passing over {folder}: {', '.join(damaged)} is damaged or missing")
    return None


def load(folder: Path, engine: Any, memories: Mapping[str, Memory], identity: dict[str, Any]) -> Progress:
    """Continue from a checkpoint; raises `InputError`, naming what differs, if it is of another configuration."""
    record = read_json(folder / _STATE, "checkpoint state")
    theirs = record["identity"]
    different = sorted(name for name in theirs.keys() | identity.keys() if theirs.get(name) != identity.get(name))
    if different:
        raise InputError(
            f"{folder} is a checkpoint of another run ({', '.join(different)} differ): "
            "give the same options and data, another --run-dir, or --restart to begin again"
        )
    load_encoder(engine.module, folder / "encoder.safetensors")
    _remember(engine, load_file(folder / "optimizer.safetensors"), record["optimizer_steps"])
    engine.lr_scheduler.load_state_dict({**record["schedule"], "lr_lambdas": [None]})
    for group, rate in zip(engine.optimizer.param_groups, record["schedule"]["_last_lr"]):
        group["lr"] = rate
    scaler = _loss_scaler(engine)
    if scaler and record["loss_scaler"]:
        scaler[1](record["loss_scaler"])
    for name, each in memories.items():
        each.load_state(load_file(folder / f"{name}.safetensors"))
    return Progress(**{**record["progress"], "loss_sums": tuple(record["progress"]["loss_sums"])})


def encoders(run_dir: Path) -> dict[int, Path]:
    """The encoder's weights at the end of each epoch, from 1, that a checkpoint of the run is kept of."""
    return {_progress(folder)["epoch"]: folder / "encoder.safetensors" for folder in _at_ends_of_epochs(run_dir)}


def discard(run_dir: Path) -> None:
    """Remove every checkpoint of a run folder."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _all(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _at_ends_of_epochs(run_dir: Path) -> list[Path]:
    return [folder for folder in _all(run_dir) if _progress(folder).get("step") == 0]


def _progress(folder: Path) -> dict[str, Any]:
    """How far the run was; empty where that is not readable."""
    try:
        return read_json(folder / _STATE, "checkpoint state")["progress"]
    except (InputError, KeyError, TypeError):
        return {}


def _optimizer_memory(engine: Any) -> dict[str, Tensor]:
    """What the optimizer remembers of each weight, such as "exp_avg/stem.0.weight". All ranks call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    memory = {}
    for name, weight in engine.module.named_parameters():
        for key in _kinds(engine):
            if engine.zero_optimization_stage() == 0:
                value = engine.optimizer.state[weight].get(key)
            else:
                value = safe_get_full_optimizer_state(weight, key)
            if value is None:  # no step was taken yet: float16 begins with some that overflow
                value = torch.zeros_like(weight, dtype=torch.float32)
            # safetensors keeps no memory format.
            memory[f"{key}/{name}"] = value.detach().contiguous()
    return memory


def _steps(engine: Any, scheduled: int) -> int:
    """Those that Adam took: fewer than its schedule counts where some overflowed."""
    if engine.zero_optimization_stage() > 0:
        return scheduled
    return int(next((state["step"] for state in engine.optimizer.state.values() if "step" in state), 0))


def _remember(engine: Any, memory: dict[str, Tensor], steps: int) -> None:
    """Give the optimizer back what it knew after `steps` steps."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    kinds = _kinds(engine)

    def counted(weight: Tensor) -> dict[str, Tensor]:
        # A fused Adam counts where the weights are, and a plain one on the host.
        device = weight.device if engine.optimizer.param_groups[0].get("fused") else "cpu"
        return {"step": torch.tensor(float(steps), device=device)} if "exp_avg" in kinds else {}

    if engine.zero_optimization_stage() == 0:
        for name, weight in engine.module.named_parameters():
            # In the weight's memory format, as the optimizer itself would have it.
            state = {key: torch.empty_like(weight).copy_(memory[f"{key}/{name}"]) for key in kinds}
            engine.optimizer.state[weight] = {**counted(weight), **state}
        return
    zero = engine.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        state = {key: torch.zeros_like(flat) for key in kinds}
        zero.optimizer.state[flat] = {**counted(flat), **state}
    zero._lazy_init_hp_params_optimizer_state()
    for name, weight in engine.module.named_parameters():
        safe_set_full_fp32_param(weight, weight.detach().float())
        for key in kinds:
            safe_set_full_optimizer_state(weight, memory[f"{key}/{name}"].to(weight.device), key)


def _kinds(engine: Any) -> tuple[str, ...]:
    group = engine.optimizer.param_groups[0]
    if "betas" in group:
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["momentum"] > 0 else ()


def _loss_scaler(engine: Any) -> tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]] | None:
    """How to read and set the state of float16's loss scaling; None where there is none."""
    scaler = engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if scaler is not None:
        return scaler.state_dict, scaler.load_state_dict
    if engine.zero_optimization_stage() > 0:
        scaler = engine.optimizer.loss_scaler
        plain = (bool, int, float)
        return lambda: {k: v for k, v in vars(scaler).items() if isinstance(v, plain)}, vars(scaler).update
    return None
