"""What tests share: one thread per process, so that parallel workers do not fight for cores, and the built digits."""

from __future__ import annotations

import urllib.request
from urllib.error import URLError

import pytest
import torch
from rich.console import Console

from data_pipeline.beton import Build
from data_pipeline.build import BuildConfig, build

pytest.register_assert_rewrite("tests.sources")  # so that its asserts, too, show what they compared


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there cannot be downloaded, whatever network this machine has."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Build:
    """The FFCV files of digits, split 0."""
    return build(BuildConfig(protocol="digits", out=tmp_path_factory.mktemp("data")), Console(quiet=True))


@pytest.fixture(scope="session")
def model(digits):
    """A small model of digits, split 0, that nobody may change."""
    from tests.models import small_model

    return small_model(digits)


@pytest.fixture(scope="session")
def store(model, tmp_path_factory) -> str:
    """The URI of an MLflow store that holds `model` as gradmix-digits version 1, @champion."""
    from tests.models import finished_run

    folder = tmp_path_factory.mktemp("store")
    # Artifacts of an SQLite store go to the working folder.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        uri = f"sqlite:///{folder}/store.db"
        finished_run(folder / "run", model, uri)
    return uri
