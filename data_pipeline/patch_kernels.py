"""The pieces of a Triton kernel that say where a patch lies; `data_pipeline.patch` has the equations.

Images are H×W, patches height×width, P of them an image; `centers` points at the places (y, x) of one image.
"""

import triton
import triton.language as tl


@triton.jit
def patch_side(ratio, SIZE: tl.constexpr):
    """⌊γ·SIZE + ½⌋, at least 1 and at most SIZE."""
    return tl.minimum(tl.maximum(tl.floor(ratio * SIZE + 0.5), 1.0), SIZE).to(tl.int32)


@triton.jit
def corner(centers, p, height, width, H: tl.constexpr, W: tl.constexpr):
    """Top and left of patch p."""
    y, x = tl.load(centers + 2 * p).to(tl.float32), tl.load(centers + 2 * p + 1).to(tl.float32)
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
