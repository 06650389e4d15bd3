"""`python -m trainer.calibrate`: how sure a model's threshold is, and another one without training again.

The threshold is a quantile of the scores of n held-out known images, which the model keeps. So few images leave doubt
about it: about the quantile itself, and about the share of known images that will be accepted from now on.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from data_pipeline import cli
from data_pipeline.beton import find_split
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from data_pipeline.protocols import Protocol
from trainer.config import check_alias
from trainer.open_set import calibrate_threshold
from trainer.registry import OpenSetModel, find_version, load_model, log_version, move_alias
from trainer.tracking import resolve_uri

if TYPE_CHECKING:  # MLflow takes seconds to import
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold and what is known about it from the held-out images it was set by."""

    threshold: float
    low: float
    """Lower end of the confidence interval of the quantile; −inf where so few images do not bound it."""
    high: float
    accepted: float
    """Share of the held-out images that it accepts."""
    accepted_low: float
    """The share of new known images that it accepts lies within accepted_low and accepted_high."""
    accepted_high: float
    images: int


def calibrate(scores: Tensor, accept: float, confidence: float = 0.95) -> Calibration:
    """The threshold that accepts the share `accept` of the held-out known images with `scores` (n,), and its intervals.

    Neither interval assumes anything about the distribution of scores. That of the quantile is between two of the
    scores, whose ranks are binomial (Conover 1999, "Practical Nonparametric Statistics", 3.2). The share p that the
    m-th largest of n scores accepts of new images is distributed as Beta(m, n + 1 − m), where scores are not tied
    (Vovk 2012, "Conditional validity of inductive conformal predictors").
    """
    threshold = calibrate_threshold(scores, accept)
    return known_threshold(scores, accept, threshold, confidence)


def known_threshold(scores: Tensor, accept: float, threshold: float, confidence: float = 0.95) -> Calibration:
    """What the held-out `scores` say about a `threshold` that was set to accept the share `accept` of them."""
    from scipy import stats

    n, values = len(scores), scores.double().numpy()
    low, high = float("-inf"), threshold
    if accept < 1:  # of a share of all, the quantile is the least score there can be, which only has an upper bound
        low, high = stats.quantile_test(values, p=1.0 - accept).confidence_interval(confidence)
    accepted = int((values >= threshold).sum())
    share_low, share_high = stats.beta.interval(confidence, accepted, n + 1 - accepted)
    return Calibration(
        threshold=threshold,
        low=float("-inf") if math.isnan(low) else float(low),
        high=float("inf") if math.isnan(high) else float(high),
        accepted=accepted / n,
        accepted_low=float(share_low),
        accepted_high=float(share_high),
        images=n,
    )


def calibration_scores(model: OpenSetModel, data: Path) -> Tensor:
    """The scores that the model keeps; for a model of an earlier version, those of its calibration images in `data`.

    Raises:
        InputError: it keeps none, and there is no build of its split in `data`.
    """
    if model.calibration_scores is not None:
        return model.calibration_scores
    try:
        build = find_split(data, Protocol.from_dict(model.card.protocol))
    except InputError as error:
        raise InputError(f"this model was saved before models kept their calibration scores, and {error}") from error
    images = Partitions(build, model.device)["calibration"].images
    return model.score(images, [model.card.k]).scores.squeeze(1).cpu()


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Which model's threshold to look at, and which share it shall accept from now on."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    target_accept: float | None = None
    """Register a new version whose threshold accepts this share of held-out known images; within (0, 1]. Default: only
    say what there is."""
    alias: str = ""
    """Alias that is moved to the new version; empty for none."""
    confidence: float = 0.95
    """Confidence of the intervals; within (0, 1)."""
    data: Path = Path("data")
    """Data folder; only needed for models that were saved before they kept their calibration scores."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""

    def __post_init__(self) -> None:
        check_alias(self.alias)
        if self.target_accept is not None and not 0 < self.target_accept <= 1:
            raise InputError(f"target-accept is {self.target_accept}; set it within (0, 1]")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; set it within (0, 1)")
        if self.target_accept is not None and not self.model.startswith("models:/"):
            raise InputError("a new threshold makes a new version: give --model models:/NAME@ALIAS, not a folder")


def run(config: CalibrateConfig, console: Console) -> tuple[Calibration, str | None]:
    """Describe the model's threshold; with a target set another. Returns the last one and its version, if it is new."""
    uri, source = config.model, None
    if config.target_accept is not None:
        # An alias may move meanwhile: from here on it is this version.
        source = find_version(config.model, config.tracking_uri)
        uri = f"models:/{source.name}/{source.version}"
    model = load_model(uri, config.tracking_uri)
    scores = calibration_scores(model, config.data)
    card = model.card
    now = known_threshold(scores, card.accept, card.threshold, config.confidence)
    console.print(describe(f"{config.model}, set to accept {card.accept:.2%}", now, config.confidence), highlight=False)
    if config.target_accept is None or source is None:
        return now, None
    new = calibrate(scores, config.target_accept, config.confidence)
    console.print(describe(f"to accept {config.target_accept:.2%}", new, config.confidence), highlight=False)
    if new.accepted == 1.0 and config.target_accept < 1.0:
        console.print(
            f"{new.images} images cannot tell a share of {config.target_accept:.2%} from all: the threshold is the "
            "lowest score there was",
            highlight=False,
        )
    name, version = register_threshold(config, model, source, scores, new.threshold)
    console.print(f"registered {name} version {version}" + (f" as @{config.alias}" if config.alias else ""))
    return new, version


def register_threshold(
    config: CalibrateConfig, model: OpenSetModel, source: ModelVersion, scores: Tensor, threshold: float
) -> tuple[str, str]:
    """The model with another threshold as a new version, belonging to the run of `source`, the one it comes from."""
    import mlflow
    from mlflow.tracking import MlflowClient

    assert config.target_accept is not None
    store = resolve_uri(config.tracking_uri)
    card = dataclasses.replace(model.card, threshold=threshold, accept=config.target_accept)
    recalibrated = OpenSetModel(
        card, model.encoder, model.gallery, model.gallery_labels, model.gallery_ids, scores.to(torch.float32)
    )
    mlflow.set_tracking_uri(store)
    client = MlflowClient(store)
    with tempfile.TemporaryDirectory() as folder:
        recalibrated.save(Path(folder) / "model")
        version = log_version(Path(folder) / "model", source.name, source.run_id, card)
    tags = {"split_hash": card.split_hash, "recalibrated_from": str(source.version), "accept": f"{card.accept:g}"}
    for key, value in tags.items():
        client.set_model_version_tag(source.name, version, key, value)
    if config.alias:
        why = f"version {source.version} recalibrated to accept {card.accept:g}"
        move_alias(client, source.name, config.alias, version, why)
    return source.name, version


def describe(what: str, found: Calibration, confidence: float) -> str:
    return (
        f"{what}: threshold {found.threshold:.4f}, {confidence:.0%} interval {found.low:.4f} to {found.high:.4f}\n"
        f"  accepts {found.accepted:.2%} of {found.images} held-out known images; of new ones "
        f"{found.accepted_low:.2%} to {found.accepted_high:.2%}"
    )


def main() -> None:
    config = cli.parse(
        CalibrateConfig,
        prog="python -m trainer.calibrate",
        description="Say how sure a model's threshold is, or set another one without training again.",
    )
    run(config, cli.console())


if __name__ == "__main__":
    cli.run(main)
