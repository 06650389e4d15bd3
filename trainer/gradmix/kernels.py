"""The GradMix operations as Triton kernels, one launch each: a kernel, the pieces it is made of, and its launcher.

Both are bound by memory: what counts is that every value is read once, in the order in which it lies in memory, and
that nothing but the result is written. The launchers allocate their results and nothing else.

Shapes: N images, C channels of H×W, P patches; a feature map has K channels of h×w. Places are (y, x) in [0, 1].
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from data_pipeline.patch import largest_patch
from data_pipeline.patch_kernels import CHECKED, check_partner, corner, patch_side
from trainer.gradmix import reference
from trainer.gradmix.reference import finest_shape, memory_format, nearness

# What a thread copies, bytes: enough to hide the time that loads take.
COPIED_BYTES = 64
# Items of a row that a program paints at once, and threads that do it.
LARGEST_ITEMS, LARGEST_THREADS = 256, 128
# So many pixels of a filter are unrolled, their weights kept in registers.
LARGEST_TAPS = 24
# Values of a feature map that a program has in flight, and cells of the largest whose map fits into its registers.
MAP_BLOCK, LARGEST_MAP = 4096, 16384


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
    """`trainer.gradmix.gradmix_views`: a program copies LINES lines of an image and then paints what patches cover of
    them. Copying needs no mask, so that every thread moves 16 bytes at once, and every value has one program.

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
    height, width = patch_side(ratio, H), patch_side(ratio, W)
    chosen = tl.load(partner + n)
    top, left = corner(centers, 0, height, width, H, W)
    tl.store(mixed + place, values, mask=inside)
    for p in range(P):
        first_row, end_row = tl.maximum(first_line - top, 0), tl.minimum(first_line + LINES - top, height)
        if first_row < end_row:
            # Other threads wrote these places, of the image or of an earlier patch.
            tl.debug_barrier()
            check_partner(chosen, N)
            view = images + (chosen * PLANES + plane % PLANES) * (H * LINE)
            patch = mixed + (top * W + left) * DEPTH
            for first_item in range(0, width * DEPTH, ITEMS):
                painted = first_item + tl.arange(0, ITEMS)
                _paint(patch, view, painted, first_row, end_row, height, width, H, W, DEPTH, TAPS)
        top, left = corner(centers, tl.minimum(p + 1, P - 1), height, width, H, W)


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
    taps = TAPS if TAPS > 0 else tl.minimum(tl.cdiv(2 * W, width), W)
    x = tl.minimum(tl.maximum((2 * column - 1) * W + width, 0) // (2 * width), W - taps)
    distance = ((2 * x + 1) * width - (2 * column + 1) * W).to(tl.float32)
    place = view + x * DEPTH + item % DEPTH
    scale_x = 1.0 / _resized_along_x(place, distance, width, taps, W, DEPTH, TAPS, True)
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
        resized = upper * (scale_x * (1.0 / total_upper))
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
        for tap in range(taps):
            total = _add_tap(total, tap, place, distance, width, W, DEPTH, ONLY_WEIGHTS)
    return total


@triton.jit
def _add_tap(total, tap, place, distance, width, W: tl.constexpr, DEPTH: tl.constexpr, ONLY_WEIGHTS: tl.constexpr):
    # From one pixel to the next the distance grows by 2·width.
    weight = tl.maximum(2.0 * W - tl.abs(distance + (2 * width * tap).to(tl.float32)), 0.0)
    if ONLY_WEIGHTS:
        return total + weight
    else:
        return tl.fma(tl.load(place + tap * DEPTH).to(tl.float32), weight, total)


def gradmix_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> Tensor:
    """See `trainer.gradmix.gradmix_views`; images that are neither contiguous nor channels_last are copied first."""
    n, channels, height, width = images.shape
    layout = memory_format(images)
    images = images.contiguous(memory_format=layout)
    mixed = torch.empty_like(images, memory_format=layout)
    planes, depth = (1, channels) if layout is torch.channels_last else (channels, 1)
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
            **CHECKED,
        )
    return mixed


def _most_taps(gamma: float, width: int) -> int:
    """How many pixels along x have a weight in a value of the patch, at most; 0 where these are too many to unroll."""
    # The smallest side that the kernel's γ, of 32 bits, may lead to.
    taps = min(triton.cdiv(2 * width, max(int(gamma * width + 0.499), 1)), width)
    return taps if taps <= LARGEST_TAPS else 0


@triton.jit
def _layercam_peaks_kernel(
    centers,
    scores,
    maps,
    gradients,
    near_height,
    near_width,
    P,
    LAYERS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    SIGN: tl.constexpr,
    GRADCAM: tl.constexpr,
):
    """`trainer.gradmix.layercam_peaks`: one program for an image, whose whole map stays in registers.

    LAYERS: see `_layer`. CELLS is the block that holds the finest map, HEIGHT × WIDTH.
    """
    n = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    activation = tl.zeros((CELLS,), tl.float32)
    total = 0.0
    for i in tl.static_range(len(LAYERS)):
        layer = _layer_map(maps[i], gradients[i], n, i, LAYERS, SIGN, GRADCAM)
        # The largest value may hide a NaN; the sum does not.
        total += tl.sum(layer, axis=0)
        if len(LAYERS) == 1:
            activation = layer
        else:
            activation += _normalised_and_resized(layer, cell, i, LAYERS, HEIGHT, WIDTH)
    finite = tl.abs(total) < float("inf")
    # Below every value, so that the padding is never the largest.
    remaining = tl.where(cell < HEIGHT * WIDTH, activation, -1.0)
    y, x = _center(cell, HEIGHT, WIDTH)
    first_y, first_x, first_score = 0.0, 0.0, 0.0
    for p in range(P):
        score, best = tl.max(remaining, axis=0, return_indices=True, return_indices_tie_break_left=True)
        peak_y, peak_x = _center(best, HEIGHT, WIDTH)
        stands_again = (p > 0) & (score <= 0)
        score = tl.where(stands_again, first_score, score)
        peak_y = tl.where(stands_again, first_y, peak_y)
        peak_x = tl.where(stands_again, first_x, peak_x)
        first_score = tl.where(p == 0, score, first_score)
        first_y = tl.where(p == 0, peak_y, first_y)
        first_x = tl.where(p == 0, peak_x, first_x)
        says_something = finite & (first_score > 0)
        peak = n * P + p
        tl.store(centers + 2 * peak, tl.where(says_something, peak_y, float("nan")))
        tl.store(centers + 2 * peak + 1, tl.where(says_something, peak_x, float("nan")))
        tl.store(scores + peak, tl.where(finite, score, float("nan")))
        near = (tl.abs(y - peak_y) < near_height) & (tl.abs(x - peak_x) < near_width)
        remaining = tl.where(near, tl.minimum(remaining, 0.0), remaining)


@triton.jit
def _layer_map(maps, gradients, n, i: tl.constexpr, LAYERS: tl.constexpr, SIGN: tl.constexpr, GRADCAM: tl.constexpr):
    """The activation map of layer i: (block of cells,), zero in the padding."""
    K: tl.constexpr = LAYERS[i][0]
    AREA: tl.constexpr = LAYERS[i][1] * LAYERS[i][2]
    CHANNELS: tl.constexpr = LAYERS[i][3]
    CELLS: tl.constexpr = LAYERS[i][4]
    cell = tl.arange(0, CELLS)[None, :]
    # Summed over channels once, at the end: until then no thread waits for another.
    products = tl.zeros((CHANNELS, CELLS), tl.float32)
    for first in range(0, K, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[:, None]
        inside = (channel < K) & (cell < AREA)
        map_place = n * (K * AREA) + channel * LAYERS[i][5] + cell * LAYERS[i][6]
        gradient_place = n * (K * AREA) + channel * LAYERS[i][7] + cell * LAYERS[i][8]
        value = tl.load(maps + map_place, mask=inside, other=0.0).to(tl.float32)
        weight = SIGN * tl.load(gradients + gradient_place, mask=inside, other=0.0).to(tl.float32)
        products += (tl.sum(weight, axis=1)[:, None] / AREA if GRADCAM else _relu(weight)) * value
    return _relu(tl.sum(products, axis=0))


@triton.jit
def _relu(value):
    """Unlike tl.maximum, lets NaN pass."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def _normalised_and_resized(
    layer, cell, i: tl.constexpr, LAYERS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """The map of layer i in [0, 1], bilinearly at the cells of the finest."""
    H: tl.constexpr = LAYERS[i][1]
    W: tl.constexpr = LAYERS[i][2]
    own_cell = tl.arange(0, LAYERS[i][4])
    low = tl.min(tl.where(own_cell < H * W, layer, float("inf")), axis=0)
    high = tl.max(layer, axis=0)
    layer = (layer - low) / tl.maximum(high - low, 1.1754943508222875e-38)
    if H == HEIGHT and W == WIDTH:
        return layer
    else:
        y = tl.maximum((cell // WIDTH + 0.5) * (H / HEIGHT) - 0.5, 0.0)
        x = tl.maximum((cell % WIDTH + 0.5) * (W / WIDTH) - 0.5, 0.0)
        top, left = tl.minimum(y.to(tl.int32), H - 1), tl.minimum(x.to(tl.int32), W - 1)
        bottom, right = tl.minimum(top + 1, H - 1), tl.minimum(left + 1, W - 1)
        y -= top
        x -= left
        upper = tl.gather(layer, top * W + left, 0) * (1.0 - x) + tl.gather(layer, top * W + right, 0) * x
        lower = tl.gather(layer, bottom * W + left, 0) * (1.0 - x) + tl.gather(layer, bottom * W + right, 0) * x
        return upper * (1.0 - y) + lower * y


@triton.jit
def _center(cell, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The middle of a cell, rounded as the PyTorch body rounds it."""
    return tl.div_rn(cell // WIDTH + 0.5, HEIGHT + 0.0), tl.div_rn(cell % WIDTH + 0.5, WIDTH + 0.0)


def layercam_peaks(
    maps: Sequence[Tensor], gradients: Sequence[Tensor], num_peaks: int, kind: str, sign: int, suppress: float
) -> tuple[Tensor, Tensor]:
    """See `trainer.gradmix.layercam_peaks`; what is neither contiguous nor channels_last is copied first."""
    height, width = finest_shape([tuple(layer.shape[2:]) for layer in maps])
    if height * width > LARGEST_MAP:
        return reference.layercam_peaks(maps, gradients, num_peaks, kind, sign, suppress)
    maps, gradients = [_dense(layer) for layer in maps], [_dense(layer) for layer in gradients]
    n, device = len(maps[0]), maps[0].device
    centers = torch.empty((n, num_peaks, 2), device=device)
    scores = torch.empty((n, num_peaks), device=device)
    with torch.cuda.device_of(maps[0]):
        _layercam_peaks_kernel[(n,)](
            centers,
            scores,
            tuple(maps),
            tuple(gradients),
            nearness(suppress, height),
            nearness(suppress, width),
            num_peaks,
            LAYERS=tuple(_layer(a, g) for a, g in zip(maps, gradients)),
            HEIGHT=height,
            WIDTH=width,
            CELLS=triton.next_power_of_2(height * width),
            SIGN=sign,
            GRADCAM=kind == "gradcam",
            num_warps=4 if height * width <= MAP_BLOCK else 16,
        )
    return centers, scores


def _layer(maps: Tensor, gradients: Tensor) -> tuple[int, ...]:
    """K, h, w; how many channels and cells are read at once; strides over channels and cells of map and of gradient."""
    channels, height, width = maps.shape[1:]
    cells = triton.next_power_of_2(height * width)
    block = min(triton.next_power_of_2(channels), max(MAP_BLOCK // cells, 1))
    strides = [(height * width, 1) if layer.is_contiguous() else (1, channels) for layer in (maps, gradients)]
    return channels, height, width, block, cells, *strides[0], *strides[1]


def _dense(layer: Tensor) -> Tensor:
    return layer.contiguous(memory_format=memory_format(layer))
