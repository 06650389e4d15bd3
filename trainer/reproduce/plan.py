"""What `trainer.reproduce` is asked, and the cells of a table that it comes to: one for each model to measure.

Tables overlap: SupCon + SimCLR on a split of CIFAR-10 stands in five of them. What is trained alike on one protocol is
trained once, in a run folder that is named after everything that decides it, whichever table comes first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_pipeline.errors import InputError, unknown_name
from data_pipeline.files import read_json, sha256
from data_pipeline.protocols import Protocol, split_count
from trainer.config import TrackingConfig, TrainConfig
from trainer.evaluation.robustness import CommonCorruptions
from trainer.reproduce.budget import BUDGETS
from trainer.reproduce.experiments import ALIASES, Experiment, Variant, experiment


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
    corrupted_root: Path | None = None
    """For table5: folder of the official CIFAR-10-C or Tiny-ImageNet-C, or of both in sub-folders of these names, all
    images of which are read at every budget. Default: generate the corruptions."""
    folder: Path = Path("reproductions")
    """Where tables go, below EXPERIMENT/BUDGET, and the runs that they share, below trainings."""
    dry_run: bool = False
    """Say what would be done and about how long it takes, and do nothing."""
    restart: bool = False
    """Discard what the table's cells hold, also the runs that other tables share, and compute everything again."""
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
            if name == "custom":
                raise InputError("custom is for images of your own: use trainer.train and trainer.evaluate for them")
            split_count(name)
        known = [variant.name for variant in experiment(self.experiment).variants]
        for name in self.variants:
            if name not in known:
                raise unknown_name("variant", name, known)
        if self.corrupted_root is not None and not any(map(_has_corruptions, experiment(self.experiment).variants)):
            raise InputError(f"{self.experiment} measures no corruptions: leave --corrupted-root out")
        if self.corrupted_root is not None and not self.corrupted_root.is_dir():
            raise InputError(f"there is no folder {self.corrupted_root}: correct --corrupted-root")
        if min((*self.splits, *self.seeds), default=0) < 0:
            raise InputError("a split or a seed is below 0: set --splits and --seeds to 0 or more")

    @property
    def command(self) -> str:
        """What decides the table, as it is typed."""
        lists = {name: getattr(self, name) for name in ("protocols", "splits", "seeds", "variants")}
        chosen = [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items() if values]
        if self.corrupted_root is not None:
            chosen.append(f"--corrupted-root {self.corrupted_root}")
        return " ".join(["python -m trainer.reproduce", self.experiment, *chosen, f"--budget {self.budget}"])

    @property
    def path(self) -> Path:
        """The table's own folder."""
        return self.folder / self.experiment / self.budget

    @property
    def trainings(self) -> Path:
        """The run folders, of all tables."""
        return self.folder / "trainings"


@dataclass(frozen=True)
class Cell:
    """One model to train and measure. Its `config` says how it is trained, in a run folder that cells of other tables
    may share; what is measured goes to a folder of its own."""

    variant: Variant
    protocol: Protocol
    config: TrainConfig
    table: Path
    """The table's folder."""
    shown: frozenset[str] = frozenset()
    """The numbers that the table has of it."""

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.protocol.name}-{self.config.split}-seed{self.config.seed}"

    @property
    def folder(self) -> Path:
        """Where its numbers are."""
        return self.table / self.name

    @property
    def is_trained(self) -> bool:
        """Whether this or another cell has its model."""
        return (self.config.folder / "metrics.json").is_file()

    @property
    def request(self) -> dict[str, Any]:
        """What decides its numbers; a cell with other ones is computed again."""
        return {
            "training": self.config.folder.name,
            "measures": {name: repr(measure) for name, measure in self.variant.measures.items()},
        }

    def record(self) -> dict[str, Any] | None:
        """Its numbers, if they were found earlier and all that they were found with is there, whole."""
        try:
            record = read_json(self.folder / "evaluation.json", "evaluation")
            whole = (
                isinstance(record, dict)
                and record.keys() >= _RECORDED
                and record["request"] == self.request
                # Those of an earlier version may lack one.
                and record["numbers"].keys() >= self.shown
                and record["arrays"] == sha256(self.folder / ARRAYS)
            )
        except (InputError, OSError, AttributeError):
            return None
        return record if whole else None


ARRAYS = "arrays.npz"
"""Beside `evaluation.json`: what a cell's pictures are drawn from."""
_RECORDED = {
    "request", "arrays", "numbers", "intervals", "epochs", "train_images", "test_images", "train_seconds", "commit",
    "measured_by", "hardware", "versions",
}  # fmt: skip
"""What a finished cell's `evaluation.json` says."""


def training_name(config: TrainConfig, protocol: Protocol) -> str:
    """Of a run folder: the same for trainings that do and leave the same, and for no others."""
    left = ("k", "ks", "accept", "score_on", "compile", "init_from", "checkpoint_every", "keep_checkpoints")
    decides = {
        **config.identity,
        **{name: getattr(config, name) for name in left},
        "deepspeed": _deepspeed_content(config),
        "split_hash": protocol.split_hash,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    return f"{protocol.name}-{config.split}-seed{config.seed}-{digest[:12]}"


def _deepspeed_content(config: TrainConfig) -> str | None:
    path = config.deepspeed_config
    return path and hashlib.sha256(path.read_bytes()).hexdigest()


def plan(config: ReproduceConfig) -> list[Cell]:
    """Every cell, so that what was computed when time runs out covers all rows of the first split."""
    chosen, budget = experiment(config.experiment), BUDGETS[config.budget]
    variants = [budget.measured(v) for v in chosen.variants if not config.variants or v.name in config.variants]
    protocols = config.protocols or chosen.protocols
    cells = []
    for seed in config.seeds or chosen.seeds:
        for split in config.splits or range(max(map(split_count, protocols))):
            for name in protocols:
                if split >= split_count(name) and not config.splits:
                    continue  # this protocol has fewer than another
                full = Protocol(name, split)
                if not full.unknown and any(variant.needs_unknown for variant in variants):
                    raise InputError(
                        f"{name} has no unknown class, and {config.experiment} measures how those are told: "
                        f"name another protocol, such as {chosen.protocols[0]}"
                    )
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
                        deepspeed_config=config.deepspeed_config,
                        workers=config.workers,
                        tracking=config.tracking,
                    )
                    protocol = dataclasses.replace(full, classes=classes)
                    run_dir = config.trainings / training_name(trained, protocol)
                    cells.append(
                        Cell(
                            _with_official_files(variant, protocol, config.corrupted_root),
                            protocol,
                            dataclasses.replace(trained, run_dir=run_dir),
                            table=config.path,
                            shown=numbers_shown(chosen, variant),
                        )
                    )
    return cells


def numbers_shown(chosen: Experiment, variant: Variant) -> frozenset[str]:
    rows = [row for row in chosen.rows if row.variant == variant.name]
    return frozenset(column.of(row) for row in rows for column in chosen.columns)


_OFFICIAL = {"cifar10": "CIFAR-10-C", "tinyimagenet": "Tiny-ImageNet-C"}
"""What the archive of a dataset's corrupted test images unpacks to."""


def _has_corruptions(variant: Variant) -> bool:
    return any(isinstance(each.evaluator, CommonCorruptions) for each in variant.measures.values())


def _with_official_files(variant: Variant, protocol: Protocol, root: Path | None) -> Variant:
    """`variant`, its corruptions read from below `root` if that is given, and of all images, as those files are."""
    if root is None:
        return variant
    folder = root / _OFFICIAL.get(protocol.classes.dataset, "")
    changes = {"corrupted_root": folder if folder.is_dir() else root, "max_images": None}
    measures = {
        name: dataclasses.replace(each, evaluator=dataclasses.replace(each.evaluator, **changes))
        if isinstance(each.evaluator, CommonCorruptions)
        else each
        for name, each in variant.measures.items()
    }
    return dataclasses.replace(variant, measures=measures)
