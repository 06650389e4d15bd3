"""Where a registered model is read from, and what that leaves behind."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from tests.models import NAME
from trainer.registry import OpenSetModel, load_model


class Elsewhere(LocalArtifactRepository):
    """elsewhere:/PATH, files that have to be fetched, as those behind a server."""

    def __init__(self, artifact_uri: str, *args, **kwargs) -> None:
        super().__init__(artifact_uri.removeprefix("elsewhere:"), *args, **kwargs)

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        return super().download_artifacts(artifact_path, dst_path or tempfile.mkdtemp())


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """What temporary files are made in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_model_that_was_fetched_leaves_no_copy(store, model, temporary, tmp_path, monkeypatch):
    repositories = artifact_repository_registry._artifact_repository_registry._registry
    monkeypatch.setitem(repositories, "elsewhere", Elsewhere)
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as database:
        database.execute("UPDATE model_versions SET storage_location = 'elsewhere:' || storage_location")
    loaded = load_model(f"models:/{NAME}/1", f"sqlite:///{tmp_path}/copy.db")
    assert not list(temporary.iterdir())
    assert loaded.fingerprint == model.fingerprint and torch.equal(loaded.calibration_scores, model.calibration_scores)
    assert str(temporary) not in Path("/proc/self/maps").read_text()


def test_a_model_of_this_machine_is_read_where_it_lies(store, model, temporary, monkeypatch):
    read, load = [], OpenSetModel.load

    def recorded(folder, device):
        read.append(folder)
        return load(folder, device)

    monkeypatch.setattr(OpenSetModel, "load", recorded)
    assert load_model(f"models:/{NAME}@champion", store).fingerprint == model.fingerprint
    (folder,) = read
    assert folder.is_relative_to(Path(store.removeprefix("sqlite:///")).parent)
    assert mlflow.get_tracking_uri() == store and not list(temporary.iterdir())
