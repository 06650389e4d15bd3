"""The kernel of `uniforms` against its PyTorch body, bit by bit; see `tests.triton_support` for how these run."""

from __future__ import annotations

import pytest
import torch

from data_pipeline import counter_rng
from data_pipeline.counter_rng_kernels import uniforms
from tests.triton_support import DEVICE


@pytest.mark.parametrize("seed", [0, 1, 16, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("epoch", [0, 1, 599])
def test_equal_bits_for_any_seed_and_epoch(seed, epoch):
    indices = torch.tensor([0, 1, 7, 2**31, 2**32 + 3, 2**40, 28_499], device=DEVICE)
    expected = counter_rng._uniforms_in_pytorch(seed, epoch, indices, 2, 31)
    assert torch.equal(uniforms(seed, epoch, indices, 2, 31), expected)


@pytest.mark.parametrize("rows", [0, 1, 67])
@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("stream", [counter_rng.Stream.FIRST_VIEW, counter_rng.Stream.SHUFFLE])
def test_equal_bits_for_any_shape_and_purpose(rows, count, stream):
    indices = torch.arange(rows, device=DEVICE) * 31
    drawn = uniforms(7, 3, indices, stream, count)
    assert drawn.shape == (rows, count) and drawn.dtype == torch.float32
    assert torch.equal(drawn, counter_rng._uniforms_in_pytorch(7, 3, indices, stream, count))


def test_indices_of_every_second_place():
    indices = torch.arange(20, device=DEVICE)
    assert torch.equal(uniforms(5, 0, indices[::2], 0, 4), uniforms(5, 0, indices, 0, 4)[::2])
