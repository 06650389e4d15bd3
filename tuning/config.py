"""What is asked of a search: every option of `python tuning/sweep.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from data_pipeline import cli
from data_pipeline.errors import InputError
from trainer.config import TrainConfig
from trainer.engine import micro_batch_size
from trainer.recipes import recipe
from tuning.space import DEFAULT_SPACE
from tuning.trial import COORDINATOR


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to search, how long, on what, and what to do with the winner."""

    protocol: str = "digits"
    """Protocol whose known classes are searched on; it also chooses the recipe that --base starts from."""
    split: int = 0
    """Split of the protocol, from 0."""
    space: Path = DEFAULT_SPACE
    """YAML file of what is varied; the default lies beside this script, with reasons."""
    num_samples: int = 24
    """Trials, 1 or more."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the pseudo-open splits that each score is averaged over; 0 or more each."""
    epochs: int = 12
    """Epochs of a trial that is not stopped early; 1 or more."""
    report_every: int = 3
    """Epochs between two scores, at each of which a trial may be stopped; 1 or more."""
    search: Literal["tpe", "random"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator; random: the baseline."""
    early_stopping: bool = True
    """Stop the worse trials early (ASHA)."""
    seed: int = 0
    """Seed of the search; the same seed draws the same first trials."""
    time_budget: float | None = None
    """End the search after so many minutes: what runs then is stopped, its last score stands. Above 0. Default: no
    limit."""
    warm_start: tuple[str, ...] = ()
    """MLflow run ids of earlier sweeps of the same split and space, whose trials the search starts from."""

    ranks: int = 1
    """Processes of a trial, 1 or more; to train with several GPUs, on one node or many, one for each."""
    cpus: float = 1.0
    """CPU cores of each process, may be a fraction."""
    gpus: float = 0.0
    """GPUs of each process; a fraction for trials of one: 0.25 lets four trials share a GPU."""
    max_concurrent: int | None = None
    """Trials at the same time, 1 or more. Default: as many as the nodes hold."""
    retries: int = 1
    """How often a failed trial is tried again, going on from its checkpoint; 0 or more."""
    address: str | None = None
    """Ray cluster to use: auto, or HOST:PORT. Default: the one this script is submitted to, else this machine."""

    data: Path = Path("data")
    """Data folder; what is not built yet is built there. On a cluster a path that all nodes share."""
    source: str | None = None
    """Where images come from, as for data_pipeline.build."""
    root: Path | None = None
    """Folder of the images, as for data_pipeline.build."""
    folder: Path | None = None
    """Sweep folder, shared like --data. Default: sweeps/PROTOCOL-SPLIT-seedSEED."""
    resume: bool = False
    """Go on with the sweep in the folder: finished trials stay, others go on from their checkpoints."""
    restart: bool = False
    """Discard what the folder holds."""
    final_epochs: int | None = None
    """Epochs of the winner's own training; 0: leave it out. Default: the recipe's."""
    base: TrainConfig = field(default_factory=TrainConfig)
    """What the drawn values are put into; its names, data and epochs are set by the options above."""

    def __post_init__(self) -> None:
        least_values = {"num_samples": 1, "epochs": 1, "report_every": 1, "ranks": 1, "retries": 0, "split": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; set it to {least} or more")
        if self.final_epochs is not None and self.final_epochs < 0:
            raise InputError(f"final-epochs is {self.final_epochs}; set it to 0 or more")
        if not self.seeds or min(self.seeds) < 0:
            raise InputError(f"seeds is {self.seeds}; name one or more, each 0 or more")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise InputError(f"cpus is {self.cpus} and gpus {self.gpus}; give a trial something to run on")
        if self.ranks > 1 and (self.cpus <= COORDINATOR or self.gpus % 1):
            raise InputError(f"each of {self.ranks} processes needs CPU cores and whole GPUs: set --cpus and --gpus so")
        micro_batch_size(self.base.batch_size, self.ranks, accumulation=1)
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise InputError(f"max-concurrent is {self.max_concurrent}; set it to 1 or more")
        if self.time_budget is not None and self.time_budget <= 0:
            raise InputError(f"time-budget is {self.time_budget}; set it above 0")
        if self.resume and self.restart:
            raise InputError("--resume goes on with a sweep and --restart discards it: give one of them")

    @property
    def path(self) -> Path:
        # Ray changes the working folder of its workers.
        return (self.folder or Path("sweeps") / f"{self.protocol}-{self.split}-seed{self.seed}").resolve()

    @property
    def trial_config(self) -> TrainConfig:
        return dataclasses.replace(
            self.base, protocol=self.protocol, split=self.split, epochs=self.epochs, phases=(), evaluate_every=0
        )


@dataclass(frozen=True)
class _Base:
    method: str = "gradmix"
    """Method, which chooses it too."""


@dataclass(frozen=True)
class _Launch:
    """The options that are read before the others."""

    protocol: str = "digits"
    """Protocol, which chooses the recipe."""
    base: _Base = field(default_factory=_Base)


def parse_config(args: Sequence[str]) -> SweepConfig:
    launch, rest = tyro.cli(_Launch, args=args, return_unknown_args=True, add_help=False)
    default = SweepConfig(protocol=launch.protocol, base=recipe(launch.protocol, launch.base.method))
    return cli.parse(
        SweepConfig,
        prog="python tuning/sweep.py",
        description="Search for hyperparameters on pseudo-unknown classes, then train and register the winner.",
        default=default,
        args=rest,
    )
