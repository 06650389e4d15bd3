"""`data_pipeline.counter_rng.uniforms` in one launch, where PyTorch's body has a launch for each of some 150 steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 128


@triton.jit(do_not_specialize=["seed", "epoch"])
def _uniforms_kernel(
    draws,
    indices,
    seed,
    epoch,
    counters,
    STREAM: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Each of the `counters` gives four numbers; every row has BLOCKS of them."""
    counter = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    row, block = (counter // BLOCKS).to(tl.int64), counter % BLOCKS
    inside = counter < counters
    index = tl.load(indices + row, mask=inside, other=0)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, tl.zeros_like(low) + epoch.to(tl.uint32), (block + (STREAM << 8)).to(tl.uint32))
    for i in tl.static_range(4):
        place = block * 4 + i
        # 24 bits fill a float32's significand exactly, so 1.0 is never reached.
        draw = (words[i] >> 8).to(tl.float32) * 5.9604644775390625e-08
        tl.store(draws + row * COUNT + place, draw, mask=inside & (place < COUNT))


def uniforms(seed: int, epoch: int, indices: Tensor, stream: int, count: int) -> Tensor:
    """See `data_pipeline.counter_rng.uniforms`."""
    draws = torch.empty((len(indices), count), device=indices.device)
    blocks = triton.cdiv(count, 4)
    counters = len(indices) * blocks
    if counters:
        with torch.cuda.device_of(indices):
            _uniforms_kernel[(triton.cdiv(counters, COUNTERS),)](
                draws,
                indices.to(torch.int64).contiguous(),
                seed,
                epoch,
                counters,
                STREAM=int(stream),
                COUNT=count,
                BLOCKS=blocks,
                COUNTERS=COUNTERS,
            )
    return draws
