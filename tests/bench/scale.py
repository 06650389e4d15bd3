"""What a training step costs on many ranks: bytes sent, bytes held, operations. The formulas, and what is measured.

    python -m tests.bench.scale                    the formulas for 8, 64 and 1024 ranks
    python -m tests.bench.scale --data data        the formulas beside what a step on 1, 2 and 4 gloo ranks does

As root, `unshare --net sh -c "ip link set lo up; ..."` around the second keeps other traffic out of the last column.

Symbols: R ranks, B images of a step over all ranks, n = B/R of them on each, V views of an image (3 with GradMix, else
2), D the embedding's length, P weights, L batch-norm layers with C channels together, N training images, p peaks of an
image, S the image's side in pixels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.beton import find_build
from data_pipeline.loader import Partitions
from tests.ranks import on_ranks
from trainer import losses
from trainer.config import EncoderConfig, OptimizerConfig, TrainConfig
from trainer.distributed import world_size
from trainer.encoder import Encoder
from trainer.engine import join_ranks
from trainer.recipes import recipe
from trainer.step import Trainer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the costs are functions of."""

    ranks: int
    batch: int
    images: int
    side: int
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    image_channels: int = 3
    views: int = 3
    peaks: int = 1
    zero: int = 0
    bucket: int = 500_000_000
    """Gradients that ZeRO has room for at a time (reduce_bucket_size); this is DeepSpeed's default."""

    @property
    def own(self) -> int:
        """n"""
        return self.batch // self.ranks

    @property
    def weights(self) -> int:
        """P"""
        return sum(weight.numel() for weight in self._encoder().parameters())

    @property
    def channels(self) -> int:
        """C"""
        return sum(m.num_features for m in self._encoder().modules() if isinstance(m, nn.BatchNorm2d))

    @property
    def layers(self) -> int:
        """L"""
        return sum(isinstance(module, nn.BatchNorm2d) for module in self._encoder().modules())

    def _encoder(self) -> Encoder:
        with torch.device("meta"):
            return Encoder(self.encoder, self.image_channels)


def sent(at: Setting) -> dict[str, float]:
    """Bytes that each rank sends in a step, where collectives go round a ring.

    Gathering s bytes of each rank sends (R−1)·s, summing S bytes into parts (R−1)/R·S, and into every rank twice that.
    """
    others, share = at.ranks - 1, (at.ranks - 1) / at.ranks
    embeddings = 4 * at.views * at.own * at.encoder.embedding_dim
    return {
        "embeddings": 2 * others * embeddings,  # gathered; their gradients summed into parts
        "labels": others * 8 * at.own,
        "batch norm": 2 * others * 8 * at.channels,  # means and variances, likewise
        "gradients": 2 * share * 4 * at.weights,
        "ZeRO's weights": share * 4 * at.weights if at.zero else 0.0,
        "ZeRO's norm of the gradients": 2 * share * 4 if at.zero else 0.0,
    }


def collectives(at: Setting) -> int:
    """How many a step has, where one bucket holds all gradients."""
    return 2 * at.layers + (6 if at.zero else 4)


def sent_in_an_epoch(at: Setting) -> float:
    """Bytes that each rank sends at an epoch's end, so that all know the peaks."""
    return 2 * (at.ranks - 1) / at.ranks * 4 * (2 * at.peaks + 1) * at.images


def held(at: Setting) -> dict[str, float]:
    """Bytes that each rank holds at the most, in float32; the last three were found by measuring."""
    state = 4 + 4 + 8 if not at.zero else 4 + 4 + 12 / at.ranks
    return {
        "weights, gradients, Adam": state * at.weights,
        "ZeRO's bucket": 4.0 * at.bucket if at.zero else 0.0,
        "resident images": (at.image_channels * at.side**2 + 16) * at.images,
        "peak store": (8 * at.peaks + 1) * at.images,
        "embeddings of all ranks": 4 * 4 * at.views * at.batch * at.encoder.embedding_dim,  # gradients, copies
        "similarities": similarity_bytes(at),
        "activations": ACTIVATIONS[at.encoder.architecture] * at.views * at.own * at.encoder.width * at.side**2,
    }


ACTIVATIONS = {"resnet18": 77.0, "resnet34": 127.0, "resnet50": 415.0}
"""Bytes that a view needs for each channel of the first stage and pixel, with the small stem, in float32."""


def similarity_bytes(at: Setting) -> float:
    """Of anchors with all keys, as many at a time as `losses.MOST_AT_ONCE` allows: never (2B)² on any rank."""
    pairs = (2 * at.own) * (2 * at.batch)
    # All at once, the graphs of three losses wait for the backward pass; in parts, one part of one loss is there.
    return 28.0 * pairs if pairs <= losses.MOST_AT_ONCE else 24.0 * losses.MOST_AT_ONCE


def operations(at: Setting) -> dict[str, float]:
    """Floating-point operations of a step on each rank: forward, and twice as much backward."""
    view = torch.empty(1, at.image_channels, at.side, at.side, device="meta")
    encoder = at._encoder().eval()
    with FlopCounterMode(display=False) as counter:
        encoder(view)
    pairs = (2 * at.own) * (2 * at.batch)
    passes = 3 if pairs <= losses.MOST_AT_ONCE else 4  # in parts, the backward pass computes them again
    return {
        "encoder": 3.0 * at.views * at.own * counter.get_total_flops(),
        "similarities": at.views * passes * 2.0 * pairs * at.encoder.embedding_dim,  # of V losses
    }


class Collectives(TorchDispatchMode):
    """Adds up what collectives send within this context, by what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            sizes = [
                [leaf.numel() * leaf.element_size() for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)]
                for arg in args
            ]
            sizes = [part for part in sizes if part]
            others, share = world_size() - 1, (world_size() - 1) / world_size()
            count = {
                "allgather_base": lambda: others * sum(sizes[1]),
                "reduce_scatter_base": lambda: share * sum(sizes[1]),
                "allreduce": lambda: 2 * share * sum(sizes[0]),
            }[name]()  # another collective than these is news: let it be a KeyError
            self.calls += 1
            self.bytes[name] = self.bytes.get(name, 0.0) + count
        return function(*args, **(kwargs or {}))


def peak_bytes(events: profile) -> int:
    """The most that was allocated at a time within a profile of memory, beyond what there was before."""
    now = most = 0
    for event in sorted(events.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(config: TrainConfig, steps: int = 3) -> dict[str, Any]:
    """On a rank: bytes sent by a step and by the peaks, the most memory a step adds, its operations and its time."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    trainer = Trainer(config, Partitions(find_build(config.data, config.protocol, config.split), join_ranks()))
    batches = trainer.loader.epoch(0)
    trainer.train_step(next(batches), 0, 0)  # the optimizer makes its memory
    batch = next(batches)
    with Collectives() as step:
        trainer.train_step(batch, 0, 1)
    with Collectives() as epoch:
        trainer.peaks.synchronise()
    with profile(profile_memory=True, use_kineto=True) as memory:
        trainer.train_step(batch, 0, 1)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(batch, 0, 1)
    dist.barrier()
    before, started = _loopback(), time.perf_counter()
    for _ in range(steps):
        trainer.train_step(batch, 0, 1)
    dist.barrier()
    return {
        "sent": step.bytes,
        "calls": step.calls,
        "epoch": sum(epoch.bytes.values()),
        "peak": peak_bytes(memory),
        "state": sum(t.numel() * t.element_size() for t in _state(trainer)),
        "operations": counter.get_total_flops(),
        "seconds": (time.perf_counter() - started) / steps,
        "wire": (_loopback() - before) / steps / world_size(),
    }


def _state(trainer: Trainer) -> list[Tensor]:
    weights = list(trainer.engine.module.parameters())
    remembered = [leaf for leaf in tree_leaves(dict(trainer.engine.optimizer.state)) if isinstance(leaf, Tensor)]
    return [*weights, *weights, *(leaf for leaf in remembered if leaf.dim() > 0)]


def _loopback() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def main() -> None:
    console = Console(soft_wrap=True)
    if "--data" in sys.argv:
        show_measured(console, Path(sys.argv[sys.argv.index("--data") + 1]))
    else:
        show_formulas(console)


def show_formulas(console: Console) -> None:
    """CIFAR-10's recipe at 64 images a rank."""
    table = Table(title="CIFAR-10, ResNet-18, 32 pixels, D = 128, 3 views, 64 images a rank; each rank, float32")
    settings = [Setting(ranks=ranks, batch=64 * ranks, images=28_500, side=32) for ranks in (8, 64, 1024)]
    for name in ("", *(f"{at.ranks} ranks\nbatch {at.batch:,}" for at in settings)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for title, unit, costs in (
        ("step sends", "MB", [sent(at) for at in settings]),
        ("epoch sends", "MB", [{"peaks": sent_in_an_epoch(at)} for at in settings]),
        ("holds", "MB", [held(at) for at in settings]),
        ("step computes", "GFLOP", [operations(at) for at in settings]),
    ):
        for name in costs[0]:
            table.add_row(f"{title}: {name}", *(_scaled(cost[name], unit) for cost in costs))
        if len(costs[0]) > 1:
            table.add_row(f"{title}: in all", *(_scaled(sum(cost.values()), unit) for cost in costs), end_section=True)
    console.print(table)


def _scaled(value: float, unit: str) -> str:
    return f"{value / (1e9 if unit == 'GFLOP' else 1e6):,.2f} {unit}"


def small(data: Path, protocol: str = "digits", **changes: Any) -> TrainConfig:
    """A training configuration that is quick to measure."""
    return dataclasses.replace(
        recipe(protocol), data=data, batch_size=96, encoder=EncoderConfig(width=8, hidden_dim=64, embedding_dim=32),
        optimizer=OptimizerConfig(), **changes,
    )  # fmt: skip


def setting_of(config: TrainConfig, ranks: int, zero: int = 0, bucket: int = 0) -> Setting:
    build = find_build(config.data, config.protocol, config.split)
    return Setting(
        ranks=ranks, batch=config.batch_size, images=build.record("train").count, side=build.manifest.image_size,
        encoder=config.encoder, image_channels=build.manifest.channels, zero=zero,
        bucket=bucket,
    )  # fmt: skip


def show_measured(console: Console, data: Path) -> None:
    table = Table(title="digits, ResNet-18 of width 8, 16 pixels, D = 32, batch 96; bytes that each rank sends")
    for name in ("ranks", "ZeRO", "step", "counted", "on the wire", "epoch's end", "counted", "step takes"):
        table.add_column(name, justify="right", no_wrap=True)
    for ranks, zero in ((1, 0), (2, 0), (2, 1), (4, 0), (4, 1)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "deepspeed.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": zero}}))
            config = small(data, deepspeed_config=path)
            found = on_ranks(measure, ranks, config)[0]
        at = setting_of(config, ranks, zero)
        table.add_row(
            str(ranks), str(zero), f"{sum(sent(at).values()):,.0f}", f"{sum(found['sent'].values()):,.0f}",
            f"{found['wire']:,.0f}", f"{sent_in_an_epoch(at):,.0f}", f"{found['epoch']:,.0f}",
            f"{found['seconds']:.2f} s",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
