"""Which of two registered models is the better one, how sure that is, and which one carries the alias.

Both models answer for the same test images. The difference of a metric between them is uncertain because the images are
a sample: both are measured again on images drawn from these with replacement, the same for both (the paired bootstrap;
Efron & Tibshirani 1993, "An Introduction to the Bootstrap").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.beton import find_split
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from data_pipeline.protocols import Protocol
from trainer.config import check_alias
from trainer.evaluate import device_by_default
from trainer.metrics import auroc, oscr
from trainer.registry import OpenSetModel, find_version, load_model, move_alias, moves
from trainer.tracking import resolve_uri

Metric = Literal["auroc", "oscr", "accuracy"]
Rate = Literal["accepted", "rejected"]
"""The shares of known images accepted and of unknown ones rejected, each model at its own threshold."""

_NAMES: dict[Metric | Rate, str] = {
    "auroc": "AUROC",
    "oscr": "OSCR",
    "accuracy": "closed-set accuracy",
    "accepted": "known accepted",
    "rejected": "unknown rejected",
}
_LONGEST_WHY = 1000  # MLflow's databases hold a tag of 5,000 characters

# Which of the images each of them is measured on.
_IMAGES: dict[Metric | Rate, tuple[str, ...]] = {
    "auroc": ("known", "unknown"),
    "oscr": ("known", "unknown"),
    "accuracy": ("known",),
    "accepted": ("known",),
    "rejected": ("unknown",),
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What two models are measured on, and how the difference's interval is made."""

    data: Path = Path("data")
    """Data folder that holds the built files, or the folder of one build."""
    confidence: float = 0.95
    """Of the interval; within (0, 1)."""
    resamples: int = 1000
    """How often the test images are drawn anew; 100 or more."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; set it within (0, 1)")
        if self.resamples < 100:
            raise InputError(f"resamples is {self.resamples}; set it to 100 or more")


@dataclass(frozen=True)
class TestScores:
    """What one model says to the test images: scores (n,) and (m,), and whether the nearest class is the right one."""

    known: np.ndarray
    correct: np.ndarray
    unknown: np.ndarray
    threshold: float

    @classmethod
    def of(cls, model: OpenSetModel, partitions: Partitions) -> TestScores:
        known = partitions["test_known"]
        scores, predictions = (part.squeeze(1).cpu() for part in model.score(known.images, [model.card.k]))
        unknown = np.empty(0, np.float32)
        if "test_unknown" in partitions:
            images = partitions["test_unknown"].images
            unknown = model.score(images, [model.card.k]).scores.squeeze(1).cpu().numpy()
        return cls(scores.numpy(), (predictions == known.labels.cpu()).numpy(), unknown, model.card.threshold)

    def metric(self, name: Metric | Rate, known: np.ndarray | None = None, unknown: np.ndarray | None = None) -> float:
        """The metric over the images of these indices; all by default."""
        k = slice(None) if known is None else known
        u = slice(None) if unknown is None else unknown
        if name == "accuracy":
            return float(self.correct[k].mean())
        if name == "accepted":
            return float((self.known[k] >= self.threshold).mean())
        if name == "rejected":
            return float((self.unknown[u] < self.threshold).mean())
        if name == "auroc":
            return auroc(self.known[k], self.unknown[u])
        return oscr(self.known[k], self.correct[k], self.unknown[u])

    def same_scores(self, other: TestScores) -> bool:
        """Whether the two differ in their thresholds at most."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("known", "correct", "unknown")
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of two models on the same images."""

    metric: Metric | Rate
    first: float
    second: float
    low: float
    """Ends of the confidence interval of second − first."""
    high: float

    @property
    def value(self) -> float:
        return self.second - self.first

    def __str__(self) -> str:
        return f"{self.metric} {self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def difference(
    first: TestScores,
    second: TestScores,
    metric: Metric | Rate,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """second − first with its paired bootstrap interval (percentiles).

    Known and unknown images, two or more of each, are drawn apart, so that their numbers stay what they are.
    """
    from scipy.stats import bootstrap

    values = [scores.metric(metric) for scores in (first, second)]
    images = _IMAGES[metric]

    def drawn_difference(*indices: np.ndarray) -> float:
        drawn = dict(zip(images, indices))
        return second.metric(metric, **drawn) - first.metric(metric, **drawn)

    if first.same_scores(second) and (metric in get_args(Metric) or first.threshold == second.threshold):
        low = high = 0.0  # also of the resamples each
    else:
        interval = bootstrap(
            [np.arange(len(getattr(first, name))) for name in images],
            drawn_difference,
            vectorized=False,
            n_resamples=resamples,
            batch=16,  # the indices of all resamples at once would take resamples × images × 8 bytes
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Difference(metric=metric, first=values[0], second=values[1], low=low, high=high)


class Comparison(NamedTuple):
    """Two models measured on `known` and `unknown` test images."""

    differences: dict[str, Difference]
    known: int
    unknown: int
    thresholds: tuple[float, float]
    same_scores: bool
    """Whether the models differ in their thresholds at most."""


def compare(
    first: str,
    second: str,
    measurement: Measurement,
    metrics: Sequence[Metric | Rate] = tuple(_NAMES),
) -> Comparison:
    """Two models, each at its own k and threshold, on the test images of the split that both were trained for.

    Raises:
        InputError: a model or the images are not there, the models are of different splits, or there are no unknown
            test images to measure one of `metrics` by when it is the only one.
    """
    models = [load_model(uri, measurement.tracking_uri, device_by_default()) for uri in (first, second)]
    hashes = [model.card.split_hash for model in models]
    if hashes[0] != hashes[1]:
        raise InputError(
            f"{first} was trained for split {hashes[0]}, {second} for {hashes[1]}: their test images differ; "
            "compare models of one protocol and split"
        )
    partitions = Partitions(find_split(measurement.data, Protocol.from_dict(models[0].card.protocol)), models[0].device)
    scores = [TestScores.of(model, partitions) for model in models]
    if not len(scores[0].unknown):
        metrics = [name for name in metrics if "unknown" not in _IMAGES[name]]
        if not metrics:
            raise InputError("the models' protocol has no unknown class to recognise: use --metric accuracy")
    if min(len(scores[0].known), len(scores[0].unknown) or 2) < 2:
        raise InputError("one test image is too few to compare by: build a protocol with more")
    return Comparison(
        {
            name: difference(*scores, name, confidence=measurement.confidence, resamples=measurement.resamples)
            for name in metrics
        },
        known=len(scores[0].known),
        unknown=len(scores[0].unknown),
        thresholds=(scores[0].threshold, scores[1].threshold),
        same_scores=scores[0].same_scores(scores[1]),
    )


def comparison_table(result: Comparison, first: str, second: str, confidence: float) -> Table:
    images = f"{result.known:,} known and {result.unknown:,} unknown test images, percent"
    title = f"first: {escape(first)}\nsecond: {escape(second)}\n{images}"
    table = Table("", "first", "second", "difference", f"{confidence:.0%} interval", title=title)
    one, other = result.thresholds
    table.caption = f"thresholds {one:.4f} and {other:.4f}"
    if result.same_scores:
        table.caption = "the models answer alike" if one == other else f"only the {table.caption} differ"
    for found in result.differences.values():
        low, high = 100 * found.low, 100 * found.high
        table.add_row(
            _NAMES[found.metric],
            f"{100 * found.first:.2f}",
            f"{100 * found.second:.2f}",
            f"{100 * found.value:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
        )
    return table


def promote(
    champion: str,
    challenger: str,
    measurement: Measurement,
    *,
    margin: float,
    metric: Metric,
    console: Console,
) -> bool:
    """Move the alias of `champion` ("models:/NAME@ALIAS") to `challenger`, a version of the same model, unless it is
    worse; returns whether it was moved.

    Not worse means that the whole confidence interval of the difference lies above −margin (a test of
    non-inferiority). An alias that nobody carries yet goes to the challenger without a comparison.
    """
    from mlflow.tracking import MlflowClient

    if not 0 <= margin < 1:
        raise InputError(f"margin is {margin}; set it within 0 to below 1")
    name, _, alias = champion.removeprefix("models:/").partition("@")
    if not champion.startswith("models:/") or not alias:
        raise InputError(f"{champion} names no alias to move: give models:/NAME@ALIAS")
    check_alias(alias)
    new = find_version(challenger, measurement.tracking_uri)
    client = MlflowClient(resolve_uri(measurement.tracking_uri))
    if new.name != name:
        raise InputError(f"{challenger} is no version of {name}: an alias stays with its model; register it there")
    version, old = str(new.version), client.get_registered_model(name).aliases.get(alias)
    if old is None:
        move_alias(client, name, alias, version, "the first one")
        console.print(f"{name} version {version} is @{alias} now; nobody was before", highlight=False)
        return True
    if str(old) == version:
        raise InputError(f"{challenger} is version {version}, which is @{alias} already: name another challenger")
    rival = f"models:/{name}/{old}"
    result = compare(rival, f"models:/{name}/{version}", measurement, metrics=[metric])
    console.print(comparison_table(result, rival, f"models:/{name}/{version}", measurement.confidence))
    found = result.differences[metric]
    if not found.low > -margin:  # nor where there is no number
        client.set_model_version_tag(name, version, f"{alias}.refused", f"against version {old}: {found}")
        console.print(
            f"version {old} stays @{alias}: version {version} may be worse by {max(0.0, -found.low):.4f} in {metric}, "
            + (f"and the margin is {margin:g}" if margin else "and has to be surely better"),
            highlight=False,
        )
        return False
    if str(client.get_registered_model(name).aliases.get(alias)) != str(old):
        raise InputError(f"@{alias} was moved by somebody else while the models were compared: compare again")
    move_alias(client, name, alias, version, f"{found} against version {old}, margin {margin:g}")
    console.print(f"{name} version {version} is @{alias} now, in place of version {old}", highlight=False)
    return True


def demote(champion: str, why: str, tracking_uri: str | None = None) -> str:
    """Give the alias of "models:/NAME@ALIAS" back to the version that had it before; returns that version.

    Raises:
        InputError: no earlier version is noted, or it is not there any more.
    """
    from mlflow.tracking import MlflowClient

    if len(why) > _LONGEST_WHY:
        raise InputError(f"the reason has {len(why):,} characters; say it in at most {_LONGEST_WHY:,}")
    present = find_version(champion, tracking_uri)
    name, _, alias = champion.removeprefix("models:/").partition("@")
    if not alias:
        raise InputError(f"{champion} names no alias to give back: give models:/NAME@ALIAS")
    client = MlflowClient(resolve_uri(tracking_uri))
    version = str(present.version)
    carriers: list[str] = []
    for move in moves(client, name):
        if move.alias != alias:
            continue
        if move.back and carriers[-1:] == [move.old]:
            carriers.pop()
        elif not move.back:
            if move.old is not None and carriers[-1:] != [move.old]:
                carriers.append(move.old)  # which came by other means than ours, that leave no note
            carriers.append(move.new)
    if carriers[-1:] != [version]:
        carriers.append(version)
    if len(carriers) < 2:
        raise InputError(f"no version of {name} is known to have been @{alias} before {version}: promote one instead")
    before = carriers[-2]
    find_version(f"models:/{name}/{before}", tracking_uri)
    reason = f"version {version} demoted" + (f": {why}" if why else "")
    move_alias(client, name, alias, before, reason, back=True)
    return before


def history_tables(name: str, tracking_uri: str | None = None) -> tuple[Table, Table]:
    """The versions of a model and what is known of each, and every move of an alias."""
    from mlflow.tracking import MlflowClient

    find_any(name, tracking_uri)
    client = MlflowClient(resolve_uri(tracking_uri))
    aliases = client.get_registered_model(name).aliases
    versions = Table("version", "aliases", "AUROC", "split", "comes from", "notes", title=escape(name))
    for record in sorted(client.search_model_versions(f"name='{name}'"), key=lambda each: int(each.version)):
        tags = dict(record.tags)
        carried = ", ".join(f"@{alias}" for alias, version in aliases.items() if str(version) == str(record.version))
        source = f"version {tags['recalibrated_from']}" if "recalibrated_from" in tags else "training"
        notes = [f"accepts {float(tags['accept']):.2%}"] if "accept" in tags else []
        notes += [f"{key.replace('.', ' ')} {tags[key]}" for key in sorted(tags) if key.endswith(".refused")]
        versions.add_row(
            str(record.version), carried, _auroc(client, record.run_id), tags.get("split_hash", "")[:8], source,
            escape("; ".join(notes)),
        )  # fmt: skip
    log = Table("time (UTC)", "alias", "from", "to", "why", title="moves of aliases")
    for move in moves(client, name):
        day, _, clock = move.time.partition("T")
        time = f"{day[:4]}-{day[4:6]}-{day[6:]} {clock[:2]}:{clock[2:4]}:{clock[4:6]}"
        log.add_row(time, f"@{move.alias}", move.old or "", move.new, escape(move.why))
    return versions, log


def find_any(name: str, tracking_uri: str | None) -> None:
    """Raise `InputError` unless there is a model of that name."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from trainer.tracking import check_store

    store = resolve_uri(tracking_uri)
    check_store(store, must_exist=True)
    try:
        MlflowClient(store).get_registered_model(name)
    except MlflowException as error:
        names = [model.name for model in MlflowClient(store).search_registered_models()]
        raise InputError(f"there is no model {name!r}; known: {', '.join(names) or 'none'}") from error


def _auroc(client: object, run_id: str) -> str:
    """AUROC at the run's k as training measured it; "" where it is not known."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)  # type: ignore[attr-defined]
    except MlflowException:
        return ""
    value = run.data.metrics.get(f"test/auroc_k{run.data.params.get('k')}")
    return "" if value is None else f"{100 * value:.2f}"
