"""Random numbers as a pure function of where they are used: Philox-4x32-10 (Salmon et al., SC 2011) in PyTorch.

There is no generator state to save, restore or keep in step over ranks: the numbers of a sample depend on the seed, the
epoch, the sample's index and the purpose, and on nothing else. `uniforms` has two bodies of the very same results, the
Triton kernel of `counter_rng_kernels` and the plain PyTorch below; `data_pipeline.dispatch` says which runs.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from data_pipeline.dispatch import use_triton

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """The purposes random numbers serve; no two may share a stream."""

    FIRST_VIEW = 0
    SECOND_VIEW = 1
    PLACE = 2
    GAMMA = 3
    CUTMIX_BOX = 4
    SHARE = 5
    TIES = 6
    SHUFFLE = 7


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64 tensors, for each counter (c0, c1, c2, c3) of 32-bit words in int64 tensors."""
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_a, low_a = _product(c0, _ROUND_A)
        high_b, low_b = _product(c2, _ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a word times an odd 32-bit number.

    The product may need all 64 bits and int64 has 63, past which a compiler may assume anything. What is computed is
    the product less (factor >> 1) · 2³², which fits.
    """
    shifted = (word - 2**31) * factor + 2**31
    return (shifted >> 32) + (factor >> 1), shifted & _MASK


def uniforms(seed: int, epoch: int, indices: Tensor, stream: Stream, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, count), one row for each of `indices` (N,) int64.

    `stream` keeps the purposes apart. `seed` is within 0 to 2⁶³ − 1, `epoch` within 0 to 2³¹ − 1.
    """
    return torch.ops.gradmix.uniforms(seed, epoch, indices, stream, count)


@torch.library.custom_op("gradmix::uniforms", mutates_args=())
def _uniforms(seed: int, epoch: int, indices: Tensor, stream: int, count: int) -> Tensor:
    body = _uniforms_in_pytorch
    if use_triton(indices):
        # Here, since it imports Triton, which a machine without a GPU need not have.
        from data_pipeline.counter_rng_kernels import uniforms as body
    return body(seed, epoch, indices, stream, count)


@_uniforms.register_fake
def _(seed: int, epoch: int, indices: Tensor, stream: int, count: int) -> Tensor:
    return torch.empty((len(indices), count), device=indices.device)


def _uniforms_in_pytorch(seed: int, epoch: int, indices: Tensor, stream: int, count: int) -> Tensor:
    blocks = (count + 3) // 4
    index = indices.to(torch.int64).unsqueeze(1)
    block = torch.arange(blocks, device=indices.device).unsqueeze(0)
    words = philox(
        seed,
        (index & _MASK).expand(-1, blocks),
        (index >> 32).expand(-1, blocks),
        torch.full_like(block, epoch).expand(len(indices), -1),
        (block + (stream << 8)).expand(len(indices), -1),
    )
    # 24 bits fill a float32's significand exactly, so 1.0 is never reached.
    return (torch.stack(words, dim=2).flatten(1)[:, :count] >> 8).float() * 2.0**-24
