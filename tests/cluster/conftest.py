"""What the tests of several ways of launching are compared with."""

from __future__ import annotations

import pytest
import torch

from tests.cluster.training import train_alone


@pytest.fixture(scope="session")
def alone(digits, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights that one process trains."""
    return train_alone(digits, tmp_path_factory.mktemp("alone"))
