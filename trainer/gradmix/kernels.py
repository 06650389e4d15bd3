"""The GradMix operations as Triton kernels, one launch each, that of the patches from `data_pipeline.patch_kernels`.

Both are bound by memory: what counts is that every value is read once, in the order in which it lies in memory, and
that nothing but the result is written. The launchers allocate their results and nothing else.

Shapes: N images, P peaks; a feature map has K channels of h×w. Places are (y, x) in [0, 1].
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from data_pipeline import patch_kernels
from trainer.gradmix import reference
from trainer.gradmix.reference import finest_shape, memory_format, nearness

# Values of a feature map that a program has in flight, and cells of the largest whose map fits into its registers.
MAP_BLOCK, LARGEST_MAP = 4096, 16384


def gradmix_views(images: Tensor, partner: Tensor, centers: Tensor, gamma: float | Tensor) -> Tensor:
    """See `trainer.gradmix.gradmix_views`; images that are neither contiguous nor channels_last are copied first."""
    images = _dense(images)
    mixed = torch.empty_like(images, memory_format=memory_format(images))
    patch_kernels.mix_views(mixed, images, partner, centers, gamma)
    return mixed


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
