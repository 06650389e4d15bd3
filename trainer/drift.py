"""`python -m trainer.drift`: whether recent images still look to a model like those its threshold was set by.

Known images that come to look different score lower, and more of them are turned away; more unknown ones among them do
the same. The scores of recent images are compared with those of the held-out known images that the model keeps. Unless
the recent images are known to be of known classes, a difference says that something has changed, not what.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.files import write_json
from trainer.calibrate import calibration_scores
from trainer.evaluate import device_by_default
from trainer.predict import find_images, printable, score_files
from trainer.registry import load_model

EXIT_MOVED = 3
"""Exit status with --fail when the scores have moved, for whoever runs it every night."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the scores of recent images lie from those of the held-out known ones, the reference."""

    statistic: float
    """Kolmogorov-Smirnov: the largest distance between the two cumulative distributions, 0 to 1."""
    p_value: float
    """Probability of so large a distance if both were drawn alike."""
    distance: float
    """Wasserstein distance: by how much scores moved on average, in units of the score."""
    reference_images: int
    recent_images: int
    reference_median: float
    recent_median: float
    reference_accepted: float
    """Share of the reference that the threshold accepts."""
    recent_accepted: float
    recent_accepted_low: float
    """The 95 % interval of the share that the threshold accepts now (Wilson)."""
    recent_accepted_high: float
    unreadable: int = 0


def compare_scores(reference: np.ndarray, recent: np.ndarray, threshold: float) -> Drift:
    """The two-sample comparison of scores (n,) and (m,), n and m ≥ 1."""
    from scipy import stats

    reference, recent = np.asarray(reference, np.float64), np.asarray(recent, np.float64)
    test = stats.ks_2samp(reference, recent)
    accepted = int((recent >= threshold).sum())
    interval = stats.binomtest(accepted, len(recent)).proportion_ci(0.95, method="wilson")
    return Drift(
        statistic=float(test.statistic),
        p_value=float(test.pvalue),
        distance=float(stats.wasserstein_distance(reference, recent)),
        reference_images=len(reference),
        recent_images=len(recent),
        reference_median=float(np.median(reference)),
        recent_median=float(np.median(recent)),
        reference_accepted=float((reference >= threshold).mean()),
        recent_accepted=accepted / len(recent),
        recent_accepted_low=float(interval.low),
        recent_accepted_high=float(interval.high),
    )


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Which model to ask about which recent images."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Recent image files, folders (all images below them) or quoted globs."""
    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    significance: float = 0.01
    """Say that scores have moved where chance would do so more rarely than this; within (0, 1)."""
    fail: bool = False
    """End with status 3 if they have."""
    out: Path | None = None
    """Also write the numbers to this JSON file."""
    data: Path = Path("data")
    """Data folder; only needed for models that were saved before they kept their calibration scores."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no image is named: give files, folders or quoted globs")
        if not 0 < self.significance < 1:
            raise InputError(f"significance is {self.significance}; set it within (0, 1)")


def check(config: DriftConfig, console: Console) -> tuple[Drift, bool]:
    """The comparison, and whether the scores have moved; prints both."""
    paths = find_images(config.paths)
    model = load_model(config.model, config.tracking_uri, device_by_default())
    reference = calibration_scores(model, config.data).numpy()
    recent, broken = score_files(model, paths, console)
    if not len(recent):
        raise InputError(f"none of the {len(broken)} files is a readable image: name others")
    drift = dataclasses.replace(compare_scores(reference, recent, model.card.threshold), unreadable=len(broken))
    moved = drift.p_value < config.significance
    if config.out is not None:
        write_json(config.out, {**dataclasses.asdict(drift), "moved": moved, "model": config.model})
    table = Table("", "held-out known images", "recent images", title=f"{config.model}: scores then and now")
    table.add_row("images", f"{drift.reference_images:,}", f"{drift.recent_images:,}")
    table.add_row("median score", f"{drift.reference_median:.3f}", f"{drift.recent_median:.3f}")
    now = f"{drift.recent_accepted:.1%} ({drift.recent_accepted_low:.1%} to {drift.recent_accepted_high:.1%})"
    table.add_row(f"accepted at {model.card.threshold:.3f}", f"{drift.reference_accepted:.1%}", now)
    console.print(table)
    if broken:
        console.print(f"{len(broken)} files could not be read, such as {printable(broken[0])}", markup=False)
    console.print(
        f"{'The scores have moved' if moved else 'No sign that the scores have moved'}: Kolmogorov-Smirnov distance "
        f"{drift.statistic:.3f}, p = {drift.p_value:.2g}; Wasserstein distance {drift.distance:.3f}",
        highlight=False,
    )
    return drift, moved


def main() -> None:
    config = cli.parse(
        DriftConfig,
        prog="python -m trainer.drift",
        description="Compare the scores of recent images with those that the model's threshold was set by.",
    )
    _, moved = check(config, cli.console())
    if moved and config.fail:
        raise SystemExit(EXIT_MOVED)


if __name__ == "__main__":
    cli.run(main)
