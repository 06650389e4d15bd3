"""The DeepSpeed engine around the encoder: process group, device, optimizer, schedule, precision."""

from __future__ import annotations

import logging
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from data_pipeline.errors import InputError
from data_pipeline.files import read_json
from trainer.config import OptimizerConfig
from trainer.distributed import world_size


def join_ranks() -> torch.device:
    """Join the process group that the launcher describes, or be the only rank; returns this rank's device."""
    # DeepSpeed builds this op for a minute at its first start; it only speeds up collectives on one machine's CPUs.
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _rank_from_slurm()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():
        # The only rank needs no port to meet others at, and so cannot find it taken.
        backend = accelerator.communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
    if device.type != "cpu":
        accelerator.set_device(device.index)
        # Steps repeat few shapes: for each the fastest convolution is looked for once.
        torch.backends.cudnn.benchmark = True
    return device


def _rank_from_slurm() -> None:
    """Take this process's place from srun, which DeepSpeed's slurm launcher calls and which sets names of its own."""
    step = os.environ
    step["RANK"], step["LOCAL_RANK"] = step["SLURM_PROCID"], step["SLURM_LOCALID"]
    step["WORLD_SIZE"] = step["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in step:
        listed = ["scontrol", "show", "hostnames", step["SLURM_STEP_NODELIST"]]
        step["MASTER_ADDR"] = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    step.setdefault("MASTER_PORT", str(20000 + int(step["SLURM_JOB_ID"]) % 20000))


def read_deepspeed_config(path: Path | None, device: torch.device) -> dict[str, Any]:
    """The user's DeepSpeed JSON, or the built-in one: ZeRO 0, bfloat16 on a GPU and float32 on a CPU. Gradients are
    clipped only where a file says so, though DeepSpeed itself would clip them to a norm of 1.

    Batch size, optimizer and schedule belong to the training configuration; a file that sets them is refused. Low
    precision is PyTorch's autocast, whichever section asks for it: weights and batch-norm statistics stay float32.
    """
    if path is None:
        config: dict[str, Any] = {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
        return config if device.type == "cpu" else {**config, "torch_autocast": _autocast("bfloat16")}
    if not path.is_file():
        raise InputError(f"there is no DeepSpeed configuration {path}: correct --deepspeed-config")
    config = read_json(path, "DeepSpeed configuration")
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a DeepSpeed configuration: it must hold a JSON object")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler"):
        if config.get(key, "auto") != "auto":
            raise InputError(f"{path} sets {key}, which --batch-size and --optimizer.* decide: remove it there")
        config.pop(key, None)
    for section in ("bf16", "fp16", "torch_autocast", "zero_optimization"):
        if not isinstance(config.get(section, {}), dict):
            raise InputError(f"{path} sets {section} to {config[section]}; give a JSON object, such as {{...}}")
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if config.pop(section, {}).get("enabled"):
            config["torch_autocast"] = _autocast(dtype)
    dtype = config.get("torch_autocast", {}).get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "float16"):
        raise InputError(f"{path} sets torch_autocast.dtype to {dtype!r}; set it to bfloat16 or float16")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise InputError(
            f"{path} sets ZeRO stage {stage}; set it to 0, 1 or 2: the networks here are too small to be split"
        )
    config.setdefault("gradient_clipping", 0.0)
    accumulation = config.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise InputError(f"{path} sets gradient_accumulation_steps to {accumulation}; set it to 1 or more")
    return config


def _autocast(dtype: str) -> dict[str, Any]:
    return {"enabled": True, "dtype": dtype}


def autocast_dtype(deepspeed_config: dict[str, Any]) -> torch.dtype | None:
    """The low precision that convolutions run in; None for float32 throughout."""
    section = deepspeed_config.get("torch_autocast", {})
    return getattr(torch, section.get("dtype", "bfloat16")) if section.get("enabled") else None


def micro_batch_size(batch_size: int, world_size: int, accumulation: int) -> int:
    """Images that a rank handles at a time, from the batch over all ranks and the accumulated micro-batches."""
    parts = world_size * accumulation
    if batch_size % parts or batch_size // parts < 2:
        raise InputError(
            f"a batch of {batch_size} cannot be split evenly over {parts} parts of two or more images "
            f"({world_size} ranks times {accumulation} micro-batches): set --batch-size to a multiple of {parts}"
        )
    return batch_size // parts


def make_engine(
    encoder: nn.Module,
    config: OptimizerConfig,
    deepspeed_config: dict[str, Any],
    *,
    micro_batch: int,
    total_steps: int,
    warmup_steps: int,
) -> Any:
    """A DeepSpeed engine that trains `encoder` for `total_steps` optimizer steps."""
    import deepspeed

    optimizer = _optimizer(encoder, config)
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch,
        # Ours is a plain PyTorch optimizer by choice, which DeepSpeed otherwise calls untested with ZeRO.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        # Its throughput timer would make the host wait for the device at every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        **deepspeed_config,
    }
    if "torch_autocast" in settings:
        # The gradients of what autocast computes in low precision: ZeRO would also add them up over ranks in it.
        settings["torch_autocast"] = {"lower_precision_safe_modules": [], **settings["torch_autocast"]}
    try:
        engine, *_ = deepspeed.initialize(
            model=encoder,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: LambdaLR(
                wrapped, lambda step: _share(step, config, total_steps, warmup_steps)
            ),
            config=settings,
        )
    except (ValueError, AssertionError, TypeError) as error:  # how it answers a configuration that it does not take
        raise InputError(f"DeepSpeed refuses its configuration ({' '.join(str(error).split())}): correct it") from error
    # DeepSpeed's own makes tensors of numbers on the device, for which the host would wait.
    engine.clip_fp32_gradients = lambda: nn.utils.clip_grad_norm_(
        engine.module.parameters(), engine.gradient_clipping()
    )
    if world_size() == 1 and engine.zero_optimization_stage() == 0:
        # DeepSpeed would copy every gradient into one buffer and back, though there is nothing to add up.
        engine.enable_backward_allreduce = False
    if engine.zero_optimization_stage() == 0:
        # Faster convolutions. Not before `initialize`, which broadcasts weights as contiguous bytes, and not where
        # DeepSpeed keeps the weights as pieces of one flat buffer.
        engine.module.to(memory_format=torch.channels_last)
    return engine


def _optimizer(encoder: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = list(encoder.parameters())
    fused = parameters[0].is_cuda  # one launch for all weights
    # The schedule below multiplies this rate; it is the one place that decides it.
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters,
        fused=fused,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _share(step: int, config: OptimizerConfig, total_steps: int, warmup_steps: int) -> float:
    """The learning rate at `step` as a share of the configured one: up in a line, then half a cosine down."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return config.final_share + (1.0 - config.final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
