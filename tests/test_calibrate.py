"""How sure a threshold is, against binomial sums and simulation; and new versions with other thresholds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console

from data_pipeline.errors import InputError
from tests.models import NAME
from trainer.calibrate import CalibrateConfig, calibrate, calibration_scores, run
from trainer.registry import OpenSetModel, load_model, moves

QUIET = Console(quiet=True)


def at_most(successes: int, trials: int, share: float) -> float:
    """P(X ≤ successes), X binomial, term by term."""
    return math.fsum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes + 1))


def order_statistics(scores: list[float], share: float, confidence: float) -> tuple[float, float]:
    """The interval of the quantile at `share` between two of the sorted scores, straight from the binomial."""
    ascending, n, tail = sorted(scores), len(scores), (1 - confidence) / 2
    lower = [r for r in range(1, n + 1) if at_most(r - 1, n, share) <= tail]
    upper = [s for s in range(1, n + 1) if 1 - at_most(s - 1, n, share) <= tail]
    low = ascending[max(lower) - 1] if lower else -math.inf
    return low, ascending[min(upper) - 1] if upper else math.inf


@pytest.mark.parametrize("n", [1, 7, 40, 121])
@pytest.mark.parametrize("accept", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_that_of_order_statistics(n, accept, confidence):
    scores = torch.from_numpy(np.random.default_rng(n).normal(size=n)).float()
    found = calibrate(scores, accept, confidence)
    expected = order_statistics(scores.double().tolist(), 1 - accept, confidence)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.accepted == (scores >= found.threshold).float().mean() and found.accepted >= accept


def test_intervals_hold_what_they_promise():
    generator = np.random.default_rng(0)
    # Of scores uniform on [0, 1] the quantile at 0.1 is 0.1, and a threshold t accepts 1 − t.
    quantile_inside = share_inside = 0
    for _ in range(250):
        found = calibrate(torch.from_numpy(generator.uniform(size=60)), 0.9, 0.9)
        quantile_inside += found.low <= 0.1 <= found.high
        share_inside += found.accepted_low <= 1 - found.threshold <= found.accepted_high
    assert quantile_inside / 250 >= 0.86
    assert 0.84 <= share_inside / 250 <= 0.96


def test_ties_and_extremes():
    tied = calibrate(torch.ones(100), 0.9)
    assert (tied.threshold, tied.low, tied.high, tied.accepted) == (1.0, 1.0, 1.0, 1.0)
    everything = calibrate(torch.arange(10.0), 1.0)
    assert (everything.threshold, everything.low, everything.accepted) == (0.0, -math.inf, 1.0)
    with pytest.raises(ValueError, match="non-empty"):
        calibrate(torch.empty(0), 0.9)


def test_a_new_threshold_is_a_new_version(store, model, monkeypatch):
    monkeypatch.chdir(Path(store.removeprefix("sqlite:///")).parent)
    config = CalibrateConfig(model=f"models:/{NAME}@champion", target_accept=0.8, alias="careful", tracking_uri=store)
    found, version = run(config, QUIET)
    client = MlflowClient(store)
    record = client.get_model_version(NAME, version)
    assert record.tags["recalibrated_from"] == "1" and record.tags["accept"] == "0.8"
    assert record.run_id == client.get_model_version(NAME, "1").run_id
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"
    assert [(move.alias, move.old, move.new) for move in moves(client, NAME)][-1] == ("careful", None, version)

    new = load_model(f"models:/{NAME}@careful", store)
    assert new.card.threshold == found.threshold > model.card.threshold and new.card.accept == 0.8
    share = (model.calibration_scores >= new.card.threshold).float().mean()
    assert share == pytest.approx(found.accepted) and 0.8 <= share < 0.82
    # Nothing but the threshold differs: the same scores, and so a threshold set back is the old one.
    assert torch.equal(new.gallery, model.gallery) and new.gallery_ids == model.gallery_ids
    assert torch.equal(calibration_scores(new, Path("nowhere")), model.calibration_scores)
    assert calibrate(new.calibration_scores, model.card.accept).threshold == model.card.threshold


def test_an_alias_that_moves_meanwhile_does_not_change_what_is_recalibrated(store, tmp_path, monkeypatch):
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "store.db")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/store.db"
    options = {"tracking_uri": uri, "alias": "moving"}
    _, second = run(CalibrateConfig(model=f"models:/{NAME}@champion", target_accept=0.8, **options), QUIET)
    client = MlflowClient(uri)

    def load_and_move(*arguments):
        loaded = load_model(*arguments)
        client.set_registered_model_alias(NAME, "moving", "1")
        return loaded

    monkeypatch.setattr("trainer.calibrate.load_model", load_and_move)
    _, third = run(CalibrateConfig(model=f"models:/{NAME}@moving", target_accept=0.9, tracking_uri=uri), QUIET)
    assert client.get_model_version(NAME, third).tags["recalibrated_from"] == second != "1"


def test_without_a_target_nothing_is_registered(store):
    before = len(MlflowClient(store).search_model_versions(f"name='{NAME}'"))
    found, version = run(CalibrateConfig(model=f"models:/{NAME}/1", tracking_uri=store), QUIET)
    assert version is None and found.low < found.threshold < found.high
    assert len(MlflowClient(store).search_model_versions(f"name='{NAME}'")) == before


def test_models_that_kept_no_scores_take_them_from_the_build(model, digits, tmp_path):
    old = OpenSetModel(model.card, model.encoder, model.gallery, model.gallery_labels)
    torch.testing.assert_close(calibration_scores(old, digits.folder), model.calibration_scores)
    with pytest.raises(InputError, match="before models kept their calibration scores, and no files in"):
        calibration_scores(old, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_accept": 0.0}, r"within \(0, 1\]"),
        ({"target_accept": 1.1}, r"within \(0, 1\]"),
        ({"confidence": 1.0}, r"within \(0, 1\)"),
        ({"model": "runs/demo/model", "target_accept": 0.9}, "makes a new version"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        CalibrateConfig(**{"model": "models:/a@champion", **options})
