"""Recent scores against those of the calibration images: distances written out; images that changed, and did not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.loader import load_all
from tests.models import write_images
from trainer import drift as drift_module
from trainer.drift import EXIT_MOVED, DriftConfig, check, compare_scores

QUIET = Console(quiet=True)


def shares_at(scores, values):
    return np.array([np.mean(scores <= value) for value in values])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (13, 50), (101, 17)])
def test_distances(n, m):
    generator = np.random.default_rng(n)
    reference, recent = generator.normal(size=n).round(1), generator.normal(0.5, 2, size=m).round(1)
    found = compare_scores(reference, recent, threshold=0.3)
    values = np.unique(np.concatenate([reference, recent]))
    gaps = np.abs(shares_at(reference, values) - shares_at(recent, values))
    assert found.statistic == pytest.approx(gaps.max())
    assert found.distance == pytest.approx(float((gaps[:-1] * np.diff(values)).sum()), abs=1e-12)
    assert found.reference_accepted == np.mean(reference >= 0.3) and found.recent_accepted == np.mean(recent >= 0.3)
    assert found.recent_accepted_low <= found.recent_accepted <= found.recent_accepted_high


def test_the_p_value_is_right_under_the_null():
    generator = np.random.default_rng(0)
    p_values = [compare_scores(generator.normal(size=80), generator.normal(size=60), 0.0).p_value for _ in range(300)]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.05)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_calibration_images_themselves_have_not_moved(saved, digits, tmp_path, capsys):
    images = load_all(digits, "calibration", device=torch.device("cpu")).images
    write_images(tmp_path / "same", images)
    (tmp_path / "same" / "broken.png").touch()
    found, moved = check(
        DriftConfig(model=saved, paths=(str(tmp_path / "same"),), out=tmp_path / "drift.json"), Console()
    )
    assert not moved and found.statistic == 0 and found.p_value == 1 and found.unreadable == 1
    assert found.recent_accepted == found.reference_accepted and found.recent_images == len(images)
    assert json.loads((tmp_path / "drift.json").read_text())["moved"] is False
    printed = capsys.readouterr().out
    assert "No sign that the scores have moved" in printed and "1 files could not be read" in printed


def test_inverted_images_have_moved(saved, digits, tmp_path, monkeypatch):
    images = load_all(digits, "calibration", device=torch.device("cpu")).images
    write_images(tmp_path / "inverted", 255 - images)
    arguments = ["drift", "--model", saved, str(tmp_path / "inverted")]
    monkeypatch.setattr("sys.argv", arguments)
    drift_module.main()
    monkeypatch.setattr("sys.argv", [*arguments, "--fail"])
    with pytest.raises(SystemExit) as ended:
        drift_module.main()
    assert ended.value.code == EXIT_MOVED


def test_bad_input(saved, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match="none of the 1 files is a readable image"):
        check(DriftConfig(model=saved, paths=(str(tmp_path / "text.png"),)), QUIET)
    with pytest.raises(InputError, match="no image is named"):
        DriftConfig(model=saved, paths=())
    with pytest.raises(InputError, match="significance"):
        DriftConfig(model=saved, paths=("a",), significance=0.0)
