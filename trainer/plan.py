"""What `trainer.reproduce` is asked, and the cells of a table that it comes to: one for each model to measure."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_pipeline.errors import InputError, unknown_name
from data_pipeline.files import read_json
from data_pipeline.protocols import Protocol, split_count
from trainer.budget import BUDGETS
from trainer.config import TrackingConfig, TrainConfig
from trainer.experiments import ALIASES, Variant, experiment


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which experiment, on what, how thoroughly."""

    experiment: Annotated[str, tyro.conf.Positional]
    """table1 to table5, figure2 to figure6, or beyond."""
    protocols: tuple[str, ...] = ()
    """Protocols to run it on. Default: the paper's."""
    splits: tuple[int, ...] = ()
    """Splits of each protocol, from 0. Default: all that it has."""
    seeds: tuple[int, ...] = ()
    """Training seeds. Default: the experiment's, mostly 0 alone."""
    variants: tuple[str, ...] = ()
    """Which of the experiment's ways to train, as --dry-run lists them. Default: all."""
    budget: Literal["smoke", "short", "full"] = "full"
    """smoke: does it run at all; short: 5,000 images, 20 epochs, a quarter of the width; full: nothing is cut short.
    The table says how long each row was trained, and where the paper leaves that open."""
    data: Path = Path("data")
    """Data folder; what is not built yet is built there."""
    source: str | None = None
    """Where images come from, as for data_pipeline.build."""
    root: Path | None = None
    """Folder of the images, as for data_pipeline.build; several datasets may lie in sub-folders named after them."""
    folder: Path = Path("reproductions")
    """Where run folders and tables go, below EXPERIMENT/BUDGET."""
    dry_run: bool = False
    """Say what would be done and about how long it takes, and do nothing."""
    restart: bool = False
    """Discard what the cells' folders hold and compute everything again."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON, as for trainer.train."""
    workers: int = 1
    """FFCV decoding threads of each rank; 1 or more."""
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment="gradmix-reproduce", alias="", offline=True)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "experiment", ALIASES.get(self.experiment, self.experiment))
        experiment(self.experiment)
        for name in ("protocols", "splits", "seeds", "variants"):
            # A value given twice is one run, not two.
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in self.protocols:
            split_count(name)
        known = [variant.name for variant in experiment(self.experiment).variants]
        for name in self.variants:
            if name not in known:
                raise unknown_name("variant", name, known)
        if min((*self.splits, *self.seeds), default=0) < 0:
            raise InputError("a split or a seed is below 0: set --splits and --seeds to 0 or more")

    @property
    def command(self) -> str:
        """What decides the table, as it is typed."""
        lists = {name: getattr(self, name) for name in ("protocols", "splits", "seeds", "variants")}
        chosen = [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items() if values]
        return " ".join(["python -m trainer.reproduce", self.experiment, *chosen, f"--budget {self.budget}"])

    @property
    def path(self) -> Path:
        return self.folder / self.experiment / self.budget


@dataclass(frozen=True)
class Cell:
    """One model to train and measure."""

    variant: Variant
    protocol: Protocol
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.protocol.name}-{self.config.split}-seed{self.config.seed}"

    @property
    def request(self) -> dict[str, Any]:
        """What decides its numbers; a cell with other ones is computed again."""
        deepspeed = self.config.deepspeed_config
        return {
            "training": self.config.identity,
            "deepspeed": deepspeed and hashlib.sha256(deepspeed.read_bytes()).hexdigest(),
            "measures": {name: repr(measure) for name, measure in self.variant.measures.items()},
            "split_hash": self.protocol.split_hash,
        }

    def record(self) -> dict[str, Any] | None:
        """Its numbers, if they were found earlier and all that they were found with is there, whole."""
        folder = self.config.folder
        try:
            record = read_json(folder / "evaluation.json", "evaluation")
        except InputError:
            return None
        whole = isinstance(record, dict) and record.keys() >= _RECORDED and zipfile.is_zipfile(folder / "arrays.npz")
        return record if whole and record["request"] == self.request else None


_RECORDED = {
    "request", "numbers", "intervals", "epochs", "train_images", "test_images", "train_seconds", "commit", "hardware",
    "versions",
}  # fmt: skip
"""What a finished cell's `evaluation.json` says."""


def plan(config: ReproduceConfig) -> list[Cell]:
    """Every cell, so that what was computed when time runs out covers all rows of the first split."""
    chosen, budget = experiment(config.experiment), BUDGETS[config.budget]
    variants = [budget.measured(v) for v in chosen.variants if not config.variants or v.name in config.variants]
    protocols = config.protocols or chosen.protocols
    cells = []
    for seed in config.seeds or chosen.seeds:
        for split in config.splits or chosen.splits or range(max(map(split_count, protocols))):
            for name in protocols:
                if split >= split_count(name) and not config.splits:
                    continue  # this protocol has fewer than another
                full = Protocol(name, split)
                classes = dataclasses.replace(full.classes, train_images=budget.train_images(full))
                for variant in variants:
                    trained = budget.applied(variant.config(name))
                    stretches = max(each.course for each in variant.measures.values())
                    if stretches:
                        every = max(trained.total_epochs // stretches, 1)
                        trained = dataclasses.replace(
                            trained, checkpoint_every=every, keep_checkpoints=trained.total_epochs
                        )
                    trained = dataclasses.replace(
                        trained,
                        split=split,
                        seed=seed,
                        run_dir=config.path / f"{variant.name}-{name}-{split}-seed{seed}",
                        restart=config.restart,
                        deepspeed_config=config.deepspeed_config,
                        workers=config.workers,
                        tracking=config.tracking,
                    )
                    cells.append(Cell(variant, dataclasses.replace(full, classes=classes), trained))
    return cells
