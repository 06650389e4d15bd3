"""The pieces of a Triton kernel that say where a patch lies and what it shows; `data_pipeline.patch` has the equations.

They check the values that they read where `CHECKED` is among the options of the launch: one that is wrong stops the
process at its next synchronisation, and no launch is spent on the question.

Images are H×W, patches height×width, P of them an image; `centers` points at the places (y, x) of one image.
"""

import triton
import triton.language as tl

# Of assertions, those written here and not one on every sum of integers.
CHECKED = {"debug": True, "sanitize_overflow": False}


@triton.jit
def check_partner(chosen, N):
    """Of the image that a patch shows."""
    tl.device_assert((chosen >= 0) & (chosen < N), "partner has an index out of range; set it within 0 to N - 1")


@triton.jit
def patch_side(ratio, SIZE: tl.constexpr):
    """⌊γ·SIZE + ½⌋, at least 1 and at most SIZE."""
    tl.device_assert((ratio > 0) & (ratio <= 1), "gamma has a value out of range; set it within (0, 1]")
    return tl.minimum(tl.maximum(tl.floor(ratio * SIZE + 0.5), 1.0), SIZE).to(tl.int32)


@triton.jit
def corner(centers, p, height, width, H: tl.constexpr, W: tl.constexpr):
    """Top and left of patch p."""
    y, x = tl.load(centers + 2 * p).to(tl.float32), tl.load(centers + 2 * p + 1).to(tl.float32)
    finite = (tl.abs(y) < float("inf")) & (tl.abs(x) < float("inf"))
    tl.device_assert(finite, "centers has a place that is not finite; give one within [0, 1] for each patch")
    top = tl.floor(y * H - height.to(tl.float32) * 0.5 + 0.5)
    left = tl.floor(x * W - width.to(tl.float32) * 0.5 + 0.5)
    # Clamped before they become integers, which have no room for every float.
    top = tl.minimum(tl.maximum(top, 0.0), (H - height).to(tl.float32)).to(tl.int32)
    left = tl.minimum(tl.maximum(left, 0.0), (W - width).to(tl.float32)).to(tl.int32)
    return top, left


@triton.jit
def covered(y, x, first, P, centers, height, width, H: tl.constexpr, W: tl.constexpr):
    """Whether one of the patches first, …, P − 1 covers (y, x)."""
    is_covered = (y < 0) & (x < 0)
    for p in range(first, P):
        top, left = corner(centers, p, height, width, H, W)
        is_covered |= (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return is_covered
