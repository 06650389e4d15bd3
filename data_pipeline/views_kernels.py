"""`data_pipeline.views.render_views` as Triton kernels: one for the views, its pieces and its launcher.

A program renders one view of one image, tile by tile, from the uint8 source to finished values, and writes nothing
else. What needs a whole view at once, the mean gray that contrast refers to, comes from the tile where a view is a
single one, and otherwise from a pass of its own. The mixed views are a launch of their own, of the first views as they
were written: rendered again for their patches, they would cost more than they take to read.

Shapes: N images, C channels, source H×W, view SIZE×SIZE. `pixels` are three tensors, red, green and blue; where C is 1,
all three are the one channel. Tiles are (columns, rows): of a layout that nothing else decides, the compiler puts
neighbouring threads along the first axis, and pixels of a row are neighbours in memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from data_pipeline import patch_kernels
from data_pipeline import views as pytorch
from data_pipeline.views import ViewParameters

BRIGHTNESS = tl.constexpr(pytorch.BRIGHTNESS)
CONTRAST = tl.constexpr(pytorch.CONTRAST)
SATURATION = tl.constexpr(pytorch.SATURATION)
HUE = tl.constexpr(pytorch.HUE)
LUMA = tl.constexpr(pytorch.LUMA)
# Side of the largest view that is a single tile, and of the tiles of a larger one; further, registers run out.
LARGEST_WHOLE, TILE = 64, 32
# Pixels of a tile that a thread has, as far as 16 warps allow, and its registers: enough to hide the time that loads
# take, few enough for four programs of 8 warps to share a multiprocessor.
PIXELS_PER_THREAD, REGISTERS = 4, 64


@triton.jit
def _render_views_kernel(
    views,
    images,
    first,
    second,
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    ROTATED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first two blocks of `data_pipeline.views.render_views`: of image n, program 2n renders the view that `first`
    says, program 2n + 1 that of `second`."""
    n = (tl.program_id(0) // 2).to(tl.int64)
    block = tl.program_id(0) % 2
    if block == 1:
        crop, colour = _load_parameters(second, n, ROTATED)
    else:
        crop, colour = _load_parameters(first, n, ROTATED)
    image = images + n * (H * W * C)
    view = views + (block * N + n) * (SIZE * SIZE * C)
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    mean_gray = 0.0
    if TILES > 1 and colour[2] != 1.0:
        for tile in range(TILES * TILES):
            y, x = _tile(tile // TILES, tile % TILES, TILE)
            pixels = _crop(image, crop, y, x, H, W, C, SIZE, ROTATED)
            inside = (x < SIZE)[:, None] & (y < SIZE)[None, :]
            pixels = _jitter(pixels, colour, 0.0, inside, _place(colour, CONTRAST), C, SIZE, False)
            mean_gray += tl.sum(tl.where(inside, _gray(pixels, C), 0.0)) / (SIZE * SIZE)
    for tile in range(TILES * TILES):
        y, x = _tile(tile // TILES, tile % TILES, TILE)
        pixels = _render(image, crop, colour, mean_gray, y, x, H, W, C, SIZE, MEAN, STD, ROTATED, TILES == 1)
        _store(view, pixels, y[None, :], x[:, None], SIZE, C)


@triton.jit
def _load_parameters(parameters, n, ROTATED: tl.constexpr):
    """Of view n: (top, left, height, width, flip, sine, cosine) of its crop and (order, brightness, contrast,
    saturation, hue, gray) of its colours."""
    box, flip, factors, order, gray = parameters[0], parameters[1], parameters[2], parameters[3], parameters[4]
    box += 4 * n
    factors += 4 * n
    angle = tl.load(parameters[5] + n) if ROTATED else 0.0
    crop = (
        tl.load(box).to(tl.float32),
        tl.load(box + 1).to(tl.float32),
        tl.load(box + 2).to(tl.float32),
        tl.load(box + 3).to(tl.float32),
        tl.load(flip + n),
        tl.sin(angle) if ROTATED else 0.0,
        tl.cos(angle) if ROTATED else 1.0,
    )
    colour = (
        tl.load(order + n).to(tl.int32),
        tl.load(factors),
        tl.load(factors + 1),
        tl.load(factors + 2),
        tl.load(factors + 3),
        tl.load(gray + n),
    )
    return crop, colour


@triton.jit
def _tile(tile_y, tile_x, TILE: tl.constexpr):
    """Rows and columns of a tile."""
    return tile_y * TILE + tl.arange(0, TILE), tile_x * TILE + tl.arange(0, TILE)


@triton.jit
def _render(
    image,
    crop,
    colour,
    mean_gray,
    y,
    x,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    ROTATED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Finished pixels of the view at rows y and columns x."""
    inside = (x < SIZE)[:, None] & (y < SIZE)[None, :]
    pixels = _crop(image, crop, y, x, H, W, C, SIZE, ROTATED)
    red, green, blue = _jitter(pixels, colour, mean_gray, inside, 4, C, SIZE, WHOLE)
    if C == 3:
        gray = _gray((red, green, blue), C)
        red, green, blue = (
            tl.where(colour[5], gray, red),
            tl.where(colour[5], gray, green),
            tl.where(colour[5], gray, blue),
        )
    return (
        (red - MEAN[0]) * (1.0 / STD[0]),
        (green - MEAN[C // 2]) * (1.0 / STD[C // 2]),
        (blue - MEAN[C - 1]) * (1.0 / STD[C - 1]),
    )


@triton.jit
def _crop(
    image,
    crop,
    y,
    x,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """The source in [0, 1], rotated, cropped, resized and flipped, at rows y and columns x of the view.

        pixel[y, x] = Σ w(s, y)·w(t, x)·source[s, t] / Σ w(s, y)·w(t, x)

    See `_weight` for w. Outside of the view, pixels are 0.
    """
    top, left, height, width, flip, sine, cosine = crop
    x = tl.where(flip, SIZE - 1 - x, x)
    center_y, steepness_y, first_y = _filter(y, top, height, SIZE)
    center_x, steepness_x, first_x = _filter(x, left, width, SIZE)
    # A filter is open at both ends and at most as wide as two pixels of the view: so many source pixels have a weight.
    TAPS_Y: tl.constexpr = (2 * H + SIZE - 1) // SIZE if H > SIZE else 2
    TAPS_X: tl.constexpr = (2 * W + SIZE - 1) // SIZE if W > SIZE else 2
    red = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
    green, blue = red, red
    total_y = tl.zeros((y.shape[0],), tl.float32)
    total_x = tl.zeros((x.shape[0],), tl.float32)
    for tap_x in tl.static_range(TAPS_X):
        total_x += _weight(first_x + tap_x, center_x, steepness_x, left, width)
    for tap_y in tl.range(TAPS_Y, loop_unroll_factor=2):
        source_y = first_y + tap_y
        weight_y = _weight(source_y, center_y, steepness_y, top, height)
        total_y += weight_y
        for tap_x in tl.static_range(TAPS_X):
            source_x = first_x + tap_x
            weight = _weight(source_x, center_x, steepness_x, left, width)[:, None] * weight_y[None, :]
            if ROTATED:
                pixels = _load_rotated(image, source_y[None, :], source_x[:, None], sine, cosine, H, W, C)
            else:
                pixels = _load_pixels(image, source_y[None, :], source_x[:, None], H, W, C)
            red = tl.fma(weight, pixels[0], red)
            green = tl.fma(weight, pixels[1], green)
            blue = tl.fma(weight, pixels[2], blue)
    # No total of a pixel of the view is below ½.
    scale_x, scale_y = 1.0 / tl.maximum(total_x, 0.25), (1.0 / 255.0) / tl.maximum(total_y, 0.25)
    scale = scale_x[:, None] * scale_y[None, :]
    return red * scale, green * scale, blue * scale


@triton.jit
def _filter(output, start, length, SIZE: tl.constexpr):
    """Where in the source the filters of output pixels lie: center, 1 / half width and first source pixel, when SIZE
    pixels are made of those from `start` on."""
    scale = tl.div_rn(length, SIZE + 0.0)
    center = start + scale * (output + 0.5)
    support = tl.maximum(scale, 1.0)
    return center, 1.0 / support, tl.floor(center - support + 0.5).to(tl.int32)


@triton.jit
def _weight(source, center, steepness, start, length):
    """w(source) = max(0, 1 − |source + ½ − center|·steepness), inside of the crop; see `resample_weights`."""
    middle = source + 0.5
    inside = (middle > start) & (middle < start + length)
    return tl.where(inside, tl.maximum(1.0 - tl.abs(middle - center) * steepness, 0.0), 0.0)


@triton.jit
def _load_pixels(image, y, x, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Source pixels, 0 to 255; outside of the source, where nothing has a weight, those at its border."""
    y, x = tl.minimum(tl.maximum(y, 0), H - 1), tl.minimum(tl.maximum(x, 0), W - 1)
    place = image + (y * W + x) * C
    red = _load_byte(place)
    green, blue = red, red
    if C == 3:
        green, blue = _load_byte(place + 1), _load_byte(place + 2)
    return red, green, blue


@triton.jit
def _load_byte(place):
    """As a float: put into the last bits of 2²³, since a GPU converts integers at a fraction of the rate it adds at."""
    return (tl.load(place).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _load_rotated(image, y, x, sine, cosine, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Pixels (y, x) of the source turned about its centre, bilinearly between those of the source."""
    right, down = x + 0.5 - 0.5 * W, y + 0.5 - 0.5 * H
    source_x = right * cosine - down * sine + (0.5 * W - 0.5)
    source_y = right * sine + down * cosine + (0.5 * H - 0.5)
    left, top = tl.floor(source_x), tl.floor(source_y)
    across, along = source_x - left, source_y - top
    red = tl.zeros(across.shape, tl.float32)
    green, blue = red, red
    for neighbour in tl.static_range(4):
        weight = (along if neighbour // 2 else 1.0 - along) * (across if neighbour % 2 else 1.0 - across)
        y, x = top.to(tl.int32) + neighbour // 2, left.to(tl.int32) + neighbour % 2
        weight = tl.where((y >= 0) & (y < H) & (x >= 0) & (x < W), weight, 0.0)
        pixels = _load_pixels(image, y, x, H, W, C)
        red = tl.fma(weight, pixels[0], red)
        green = tl.fma(weight, pixels[1], green)
        blue = tl.fma(weight, pixels[2], blue)
    return red, green, blue


@triton.jit
def _jitter(pixels, colour, mean_gray, inside, stop, C: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """The first `stop` of brightness, contrast, saturation and hue in the image's own order.

    The mean gray of the view as contrast finds it is `mean_gray`, or where the pixels are the WHOLE view, their own.
    """
    red, green, blue = pixels
    for place in range(stop):
        kind = _kind(colour[0], place)
        if kind == HUE:
            # A shift of zero returns the very same pixels, not the same up to rounding.
            if C == 3 and colour[4] != 0:
                red, green, blue = _shift_hue(red, green, blue, colour[4])
        elif C == 3 or kind != SATURATION:
            factor = tl.where(kind == BRIGHTNESS, colour[1], tl.where(kind == CONTRAST, colour[2], colour[3]))
            if factor != 1.0:
                other = tl.zeros_like(red)
                if kind != BRIGHTNESS:
                    other = _gray((red, green, blue), C)
                    if kind == CONTRAST:
                        if WHOLE:
                            mean_gray = tl.sum(tl.where(inside, other, 0.0)) / (SIZE * SIZE)
                        other = tl.zeros_like(red) + mean_gray
                    other *= 1.0 - factor
                red = _clamp(tl.fma(red, factor, other))
                green = _clamp(tl.fma(green, factor, other))
                blue = _clamp(tl.fma(blue, factor, other))
    return red, green, blue


@triton.jit
def _kind(order, place):
    """What comes at a place (0 to 3) of an order: `ORDERS` lists all permutations alphabetically."""
    first = order // 6
    second = order % 6 // 2
    second += (second >= first).to(tl.int32)
    # Of the two that are left: the smaller and the larger.
    least, most = tl.minimum(first, second), tl.maximum(first, second)
    low = tl.where(least > 0, 0, tl.where(most == 1, 2, 1))
    high = 6 - first - second - low
    later = tl.where((place == 2) == (order % 2 == 0), low, high)
    return tl.where(place == 0, first, tl.where(place == 1, second, later))


@triton.jit
def _place(colour, kind):
    """The place of a change in the image's order."""
    place = 0
    for candidate in tl.static_range(1, 4):
        place = tl.where(_kind(colour[0], candidate) == kind, candidate, place)
    return place


@triton.jit
def _gray(pixels, C: tl.constexpr):
    if C == 1:
        return pixels[0]
    else:
        return tl.fma(pixels[2], LUMA[2], tl.fma(pixels[1], LUMA[1], pixels[0] * LUMA[0]))


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _shift_hue(red, green, blue, shift):
    """See `data_pipeline.views._shift_hue`."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    safe = tl.where(chroma > 0, chroma, 1.0)
    of_red, of_green = value == red, value == green
    difference = tl.where(of_red, green - blue, tl.where(of_green, blue - red, red - green))
    hue = difference / safe + tl.where(of_red, 0.0, tl.where(of_green, 2.0, 4.0)) + 6.0 * shift
    # Of six sectors, from the first on.
    hue = tl.fma(tl.floor(hue * (1.0 / 6.0)), -6.0, hue)
    return (
        _hue_channel(value, chroma, hue + 5.0),
        _hue_channel(value, chroma, hue + 3.0),
        _hue_channel(value, chroma, hue + 1.0),
    )


@triton.jit
def _hue_channel(value, chroma, place):
    place = tl.where(place >= 6.0, place - 6.0, place)
    return tl.fma(-chroma, _clamp(2.0 - tl.abs(place - 2.0)), value)


@triton.jit
def _store(view, pixels, y, x, SIZE: tl.constexpr, C: tl.constexpr):
    """Write pixels to (y, x) of a view in channels_last, cast to its dtype."""
    mask = (y < SIZE) & (x < SIZE)
    for channel in tl.static_range(C):
        tl.store(view + (y * SIZE + x) * C + channel, pixels[channel].to(view.dtype.element_ty), mask=mask)


def render_views(
    images: Tensor,
    first: ViewParameters,
    second: ViewParameters,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    partner: Tensor | None,
    centers: Tensor | None,
    gamma: float | Tensor | None,
) -> Tensor:
    """See `data_pipeline.views.render_views`; tensors that are not contiguous are copied first."""
    n, height, width, channels = images.shape
    blocks = 2 if partner is None else 3
    views = pytorch.empty_views(images, blocks * n, size, dtype)
    tile = max(triton.next_power_of_2(size), 16) if size <= LARGEST_WHOLE else TILE
    with torch.cuda.device_of(images):
        _render_views_kernel[(2 * n,)](
            views,
            images.contiguous(),
            _tensors(first),
            _tensors(second),
            n,
            H=height,
            W=width,
            C=channels,
            SIZE=size,
            MEAN=tuple(mean),
            STD=tuple(std),
            ROTATED=first.geometry.angle is not None,
            TILE=tile,
            num_warps=min(tile * tile // (32 * PIXELS_PER_THREAD), 16),
            maxnreg=REGISTERS,
            # A fused multiply-add would round places otherwise than the PyTorch body, at times by a pixel.
            enable_fp_fusion=False,
        )
    if partner is not None:
        patch_kernels.mix_views(views[2 * n :], views[:n], partner, centers, gamma)
    return views


def _tensors(parameters: ViewParameters) -> tuple[Tensor, ...]:
    """In the order in which `_load_parameters` reads them."""
    (_, flip, angle, _), box, *rest = parameters
    tensors = (box, flip, *rest) if angle is None else (box, flip, *rest, angle)
    return tuple(tensor.contiguous() for tensor in tensors)
