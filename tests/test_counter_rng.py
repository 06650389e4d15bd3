"""Philox against the published known answers, and the independence that everything else relies on."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.counter_rng import philox, uniforms
from tests.triton_support import RecordingKernel, compile_for_hopper, run_checks


def words(seed: int, *counter: int) -> list[int]:
    return [int(word) for word in philox(seed, *(torch.tensor([c]) for c in counter))]


def test_known_answers_of_random123():
    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words(2**64 - 1, ones, ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    # Digits of π, the third vector of the same list.
    key = (0x299F31D0 << 32) | 0xA4093822
    assert words(key, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_numbers_depend_on_the_index_not_on_its_company():
    alone = uniforms(3, 1, torch.tensor([41]), stream=2, count=7)
    together = uniforms(3, 1, torch.tensor([5, 41, 2**33]), stream=2, count=7)
    assert torch.equal(alone[0], together[1])


def test_seed_epoch_stream_and_index_all_matter():
    index = torch.arange(64)
    base = uniforms(0, 0, index, stream=0, count=4)
    for other in (
        uniforms(1, 0, index, stream=0, count=4),
        uniforms(1 << 32, 0, index, stream=0, count=4),
        uniforms(0, 1, index, stream=0, count=4),
        uniforms(0, 0, index, stream=1, count=4),
        uniforms(0, 0, index + (1 << 32), stream=0, count=4),
    ):
        assert (base == other).float().mean() < 0.02


def test_uniform_in_the_half_open_interval():
    draws = uniforms(9, 4, torch.arange(200_000), stream=0, count=5)
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.004
    assert (draws.std(0) - 12**-0.5).abs().max() < 0.003
    correlation = torch.corrcoef(draws.T) - torch.eye(5)
    assert correlation.abs().max() < 0.01


def test_the_kernel_in_tritons_interpreter():
    run_checks("counter_rng_kernel_checks.py", interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_the_gpu():
    run_checks("counter_rng_kernel_checks.py", interpreted=False)


def test_the_kernel_compiles_for_a_gpu(monkeypatch):
    kernels = pytest.importorskip("data_pipeline.counter_rng_kernels")
    recorded = RecordingKernel(kernels._uniforms_kernel)
    monkeypatch.setattr(kernels, "_uniforms_kernel", recorded)
    kernels.uniforms(2**40, 3, torch.arange(50), 1, 31)
    assert compile_for_hopper(recorded, recorded.launches[0]).asm["cubin"]


def test_torch_compile_takes_the_operation_whole():
    compiled = torch.compile(lambda indices, epoch: 2 * uniforms(1, epoch, indices, 0, 5), fullgraph=True)
    assert torch.equal(compiled(torch.arange(9), 4), 2 * uniforms(1, 4, torch.arange(9), 0, 5))
