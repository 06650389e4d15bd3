"""The patches of GradMix as a Triton kernel and its launcher; `data_pipeline.patch` has the equations.

It is bound by memory: what counts is that every image is read and written once, in the order in which it lies there.
The kernel checks the values that it reads: one that is wrong stops the process at its next synchronisation, and no
launch is spent on the question.

Shapes: N images, C channels of H×W, P patches of height×width each. Places are (y, x) in [0, 1].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from data_pipeline.patch import largest_patch

# What a thread copies, bytes: enough to hide the time that loads take.
COPIED_BYTES = 64
# Items of a row that a program paints at once, and threads that do it.
LARGEST_ITEMS, LARGEST_THREADS = 256, 128
# Filters of so many pixels are unrolled, their weights kept in registers. Each length is a kernel of its own, so there
# are few.
UNROLLED_TAPS = (4, 6, 8, 12, 16, 24)


@triton.jit
def _gradmix_views_kernel(
    mixed,
    images,
    partner,
    centers,
    gamma,
    N,
    P,
    PLANES: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    DEPTH: tl.constexpr,
    GAMMA_PER_IMAGE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    ITEMS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """`mix_views`: a program copies LINES lines of an image and then paints what patches cover of them. No mask of a
    patch comes between, so that every thread copies 16 bytes at once, and every value has one program.

    In memory an image is PLANES × H lines of W·DEPTH items: PLANES is C where it is contiguous, DEPTH in channels_last.
    """
    BANDS: tl.constexpr = (H + LINES - 1) // LINES
    LINE: tl.constexpr = W * DEPTH
    plane = (tl.program_id(0) // BANDS).to(tl.int64)
    first_line = tl.program_id(0) % BANDS * LINES
    mixed += plane * (H * LINE)
    item = tl.arange(0, BLOCK)
    place = first_line * LINE + item
    inside = (item < LINES * LINE) & (place < H * LINE)
    # Everything that is loaded is on its way before anything is stored: a program waits for memory once.
    values = tl.load(images + plane * (H * LINE) + place, mask=inside)
    n = plane // PLANES
    centers += n * P * 2
    ratio = tl.load(gamma + n).to(tl.float32) if GAMMA_PER_IMAGE else gamma
    height, width = _patch_side(ratio, H), _patch_side(ratio, W)
    chosen = tl.load(partner + n)
    top, left = _corner(centers, 0, height, width, H, W)
    tl.store(mixed + place, values, mask=inside)
    for p in range(P):
        first_row, end_row = tl.maximum(first_line - top, 0), tl.minimum(first_line + LINES - top, height)
        if first_row < end_row:
            # Other threads wrote these places, of the image or of an earlier patch.
            tl.debug_barrier()
            exists = (chosen >= 0) & (chosen < N)
            tl.device_assert(exists, "partner has an index out of range; set it within 0 to N - 1")
            view = images + (chosen * PLANES + plane % PLANES) * (H * LINE)
            patch = mixed + (top * W + left) * DEPTH
            for first_item in range(0, width * DEPTH, ITEMS):
                painted = first_item + tl.arange(0, ITEMS)
                _paint(patch, view, painted, first_row, end_row, height, width, H, W, DEPTH, TAPS)
        top, left = _corner(centers, tl.minimum(p + 1, P - 1), height, width, H, W)


@triton.jit
def _patch_side(ratio, SIZE: tl.constexpr):
    """⌊γ·SIZE + ½⌋, at least 1 and at most SIZE."""
    tl.device_assert((ratio > 0) & (ratio <= 1), "gamma has a value out of range; set it within (0, 1]")
    return tl.minimum(tl.maximum(tl.floor(ratio * SIZE + 0.5), 1.0), SIZE).to(tl.int32)


@triton.jit
def _corner(centers, p, height, width, H: tl.constexpr, W: tl.constexpr):
    """Top and left of patch p of the image with these centers (P, 2)."""
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
def _paint(
    patch,
    view,
    item,
    first_row,
    end_row,
    height,
    width,
    H: tl.constexpr,
    W: tl.constexpr,
    DEPTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Some items of the rows first_row, …, end_row − 1 of a patch.

        patch[r, c] = Σ w(y, r)·w(x, c)·view[y, x] / Σ w(y, r)·w(x, c)
        w(source, output) = max(0, 1 − |(source + ½)·side/SIZE − (output + ½)|)

    All distances are multiplied by 2·SIZE, so that they and the weights are whole numbers and exact. A row y between
    the middles of the patch's rows r − 1 and r has a weight in these two only, together 2·H: it is read and resized
    along x once for both, and the next row of the patch goes on from there.
    """
    column = item // DEPTH
    # No more than this many pixels have a weight. In the last columns they begin earlier, where the weight is 0, so
    # that all are inside of the view.
    AT_ONCE: tl.constexpr = _taps_at_once(W)
    taps = TAPS if TAPS > 0 else tl.minimum(tl.cdiv(2 * W, AT_ONCE * width) * AT_ONCE, W)
    x = tl.minimum(tl.maximum((2 * column - 1) * W + width, 0) // (2 * width), W - taps)
    distance = ((2 * x + 1) * width - (2 * column + 1) * W).to(tl.float32)
    place = view + x * DEPTH + item % DEPTH
    # A total is 1 or more but where nothing is stored: past the last column, and in the row before the first.
    total_x = tl.maximum(_resized_along_x(place, distance, width, taps, W, DEPTH, TAPS, True), 1.0)
    scale_x = 1.0 / total_x
    upper, lower = tl.zeros(item.shape, tl.float32), tl.zeros(item.shape, tl.float32)
    total_upper, total_lower = 0.0, 0.0
    y = tl.maximum((2 * first_row - 1) * H + height, 0) // (2 * height)
    for row in range(first_row, end_row + 1):
        middle = (2 * row + 1) * H
        last = tl.minimum(middle, (2 * H - 1) * height)
        while (2 * y + 1) * height <= last:
            values = _resized_along_x(place + y * (W * DEPTH), distance, width, taps, W, DEPTH, TAPS, False)
            weight = (middle - (2 * y + 1) * height).to(tl.float32)
            upper, lower = tl.fma(values, weight, upper), tl.fma(values, 2.0 * H - weight, lower)
            total_upper += weight
            total_lower += 2.0 * H - weight
            y += 1
        line = patch + (row - 1) * (W * DEPTH)
        resized = upper * (scale_x * (1.0 / tl.maximum(total_upper, 1.0)))
        tl.store(line + item, resized.to(patch.dtype.element_ty), mask=(item < width * DEPTH) & (row > first_row))
        upper, lower = lower, tl.zeros(item.shape, tl.float32)
        total_upper, total_lower = total_lower, 0.0


@triton.jit
def _resized_along_x(
    place, distance, width, taps, W: tl.constexpr, DEPTH: tl.constexpr, TAPS: tl.constexpr, ONLY_WEIGHTS: tl.constexpr
):
    """Σ w(x, c)·view[y, x] over `taps` pixels from `place` on, TAPS where that is not 0; or of the weights alone."""
    total = tl.zeros(distance.shape, tl.float32)
    if TAPS > 0:
        for tap in tl.static_range(TAPS):
            total = _add_tap(total, tap, place, distance, width, W, DEPTH, ONLY_WEIGHTS)
    else:
        AT_ONCE: tl.constexpr = _taps_at_once(W)
        for first in range(0, taps, AT_ONCE):
            for tap in tl.static_range(AT_ONCE):
                total = _add_tap(total, first + tap, place, distance, width, W, DEPTH, ONLY_WEIGHTS)
    return total


@triton.constexpr_function
def _taps_at_once(width):
    """Of a filter that is not unrolled, so many pixels are on their way together; never more than there are."""
    return 4 if width % 4 == 0 else 1


@triton.jit
def _add_tap(total, tap, place, distance, width, W: tl.constexpr, DEPTH: tl.constexpr, ONLY_WEIGHTS: tl.constexpr):
    # From one pixel to the next the distance grows by 2·width.
    weight = tl.maximum(2.0 * W - tl.abs(distance + (2 * width * tap).to(tl.float32)), 0.0)
    if ONLY_WEIGHTS:
        return total + weight
    else:
        return tl.fma(tl.load(place + tap * DEPTH).to(tl.float32), weight, total)


def mix_views(mixed: Tensor, images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> None:
    """Write into `mixed` the images (N, C, H, W) with their patches; both are contiguous or both channels_last. Other
    arguments are those of `data_pipeline.patch.paste_patches`."""
    n, channels, height, width = images.shape
    planes, depth = (channels, 1) if images.is_contiguous() else (1, channels)
    line = width * depth
    items = min(max(triton.next_power_of_2(largest_patch(gamma, width) * depth), 32), LARGEST_ITEMS)
    threads = min(items, LARGEST_THREADS)
    # A band is what the threads that paint a row copy with COPIED_BYTES each.
    lines = max(threads * COPIED_BYTES // (line * images.element_size()), 1)
    bands = triton.cdiv(height, lines)
    lines = triton.cdiv(height, bands)
    with torch.cuda.device_of(images):
        _gradmix_views_kernel[(n * planes * bands,)](
            mixed,
            images,
            partner.contiguous(),
            centers.contiguous(),
            gamma.contiguous() if isinstance(gamma, Tensor) else gamma,
            n,
            centers.shape[1],
            PLANES=planes,
            H=height,
            W=width,
            DEPTH=depth,
            GAMMA_PER_IMAGE=isinstance(gamma, Tensor),
            LINES=lines,
            BLOCK=triton.next_power_of_2(lines * line),
            ITEMS=items,
            TAPS=0 if isinstance(gamma, Tensor) else _most_taps(gamma, width),
            num_warps=threads // 32,
            # A fused multiply-add would round places otherwise than the PyTorch body, at times by a pixel.
            enable_fp_fusion=False,
            # Of assertions, those written here and not one on every sum of integers.
            debug=True,
            sanitize_overflow=False,
        )


def _most_taps(gamma: float, width: int) -> int:
    """How many pixels along x have a weight in a value of the patch, at most; 0 where they are too many to unroll."""
    # The smallest side that the kernel's γ, of 32 bits, may lead to.
    taps = min(triton.cdiv(2 * width, max(int(gamma * width + 0.499), 1)), width)
    return min(next((length for length in UNROLLED_TAPS if length >= taps), 0), width)
