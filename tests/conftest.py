"""What tests share: one thread per process, so that parallel workers do not fight for cores, and the built digits."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from data_pipeline.beton import Build
from data_pipeline.build import BuildConfig, build


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Build:
    """The FFCV files of digits, split 0."""
    return build(BuildConfig(protocol="digits", out=tmp_path_factory.mktemp("data")), Console(quiet=True))
