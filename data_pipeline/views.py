"""SimCLR views, batched on the device: random resized crop, flip, rotation, colour jitter, grayscale, normalise.

Every image has its own parameters, drawn by a counter-based generator from (seed, epoch, image index, view): a view
does not depend on the rank, the batch or the order in which images come. The geometry that made a view comes with the
parameters, so that a place found in the view can be put on the source image and from there into the next epoch's view.

`render_views` is one operation with two bodies of the same results, the Triton kernels of `views_kernels` and the plain
PyTorch below; `data_pipeline.dispatch` says which runs. It is registered with torch.library, so that torch.compile
takes it whole, and has no gradient.

Shapes: N images, C channels, source H×W, view h×w, P points per image. Points are (y, x), each in [0, 1].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.counter_rng import Stream, uniforms
from data_pipeline.dispatch import use_triton
from data_pipeline.errors import InputError
from data_pipeline.patch import check_patch_values, check_patches, paste_patches, require_device, require_floats
from data_pipeline.resample import resample, resample_weights

_CROP_ATTEMPTS = 10
_DRAWS = 2 * _CROP_ATTEMPTS + 11
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
_IDENTITY = (1.0, 1.0, 1.0, 0.0)
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The augmentation; the defaults are SimCLR's for small images without blur."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the crop, as a share of the image; within (0, 1]."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width : height of the crop; above 0."""
    flip: float = 0.5
    """Probability of a horizontal flip, 0 to 1."""
    rotation: float = 0.0
    """Largest rotation to either side, degrees, 0 to 180."""
    brightness: float = 0.4
    """Brightness factor is drawn from 1 ± this; 0 to 1."""
    contrast: float = 0.4
    """Contrast factor is drawn from 1 ± this; 0 to 1."""
    saturation: float = 0.4
    """Saturation factor is drawn from 1 ± this; 0 to 1. Needs three channels, like hue and grayscale."""
    hue: float = 0.1
    """Hue is shifted by up to this part of the colour circle; 0 to 0.5."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed, 0 to 1."""
    grayscale: float = 0.2
    """Probability that colour is removed, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"views.scale is {self.scale}; set it to two ascending numbers within (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"views.ratio is {self.ratio}; set it to two ascending numbers above 0")
        limits = {"rotation": 180.0, "hue": 0.5}
        for name in ("flip", "rotation", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale"):
            value, limit = getattr(self, name), limits.get(name, 1.0)
            if not 0 <= value <= limit:
                raise InputError(f"views.{name} is {value}; set it within 0 to {limit:g}")


class Geometry(NamedTuple):
    """How each view was cut: rotate the source about its centre, take a box, flip it.

    Attributes:
        box: (N, 4) float32, top, left, height and width as shares of the source.
        flip: (N,) bool.
        angle: (N,) float32, radians, counter-clockwise as seen on the screen; None where nothing is rotated.
        aspect: source width / height.
    """

    box: Tensor
    flip: Tensor
    angle: Tensor | None
    aspect: float

    def to_view(self, points: Tensor) -> Tensor:
        """Source points (N, P, 2) in view coordinates; those outside of the crop are clamped to its edge."""
        y, x = self._rotate(points, 1.0).unbind(2)
        top, left, height, width = (edge.unsqueeze(1) for edge in self.box.unbind(1))
        y, x = (y - top) / height, (x - left) / width
        x = torch.where(self.flip.unsqueeze(1), 1.0 - x, x)
        return torch.stack((y, x), dim=2).clamp(0.0, 1.0)

    def to_source(self, points: Tensor) -> Tensor:
        """View points (N, P, 2) in source coordinates, clamped to the source."""
        y, x = points.unbind(2)
        x = torch.where(self.flip.unsqueeze(1), 1.0 - x, x)
        top, left, height, width = (edge.unsqueeze(1) for edge in self.box.unbind(1))
        return self._rotate(torch.stack((top + y * height, left + x * width), dim=2), -1.0).clamp(0.0, 1.0)

    def _rotate(self, points: Tensor, direction: float) -> Tensor:
        if self.angle is None:
            return points
        sine, cosine = torch.sin(self.angle * direction).unsqueeze(1), torch.cos(self.angle).unsqueeze(1)
        y, x = points[..., 0] - 0.5, (points[..., 1] - 0.5) * self.aspect
        return torch.stack((y * cosine - x * sine + 0.5, (y * sine + x * cosine) / self.aspect + 0.5), dim=2)


class ViewParameters(NamedTuple):
    """Everything random about one view of N images.

    Attributes:
        geometry: where the view lies in its source.
        box: (N, 4) int64, the crop's top, left, height and width in source pixels.
        factors: (N, 4) float32, brightness, contrast and saturation factors and hue shift; (1, 1, 1, 0) leaves the
            image as it is.
        order: (N,) int64, the order in which these four are applied, as a place in `ORDERS`.
        gray: (N,) bool, whether colour is removed.
    """

    geometry: Geometry
    box: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor


def draw_parameters(
    config: ViewConfig, source_size: tuple[int, int], indices: Tensor, *, seed: int, epoch: int, view: int
) -> ViewParameters:
    """The parameters of view `view` (0: the first, 1: the second) of the images `indices` (N,) int64 in this epoch."""
    draws = uniforms(seed, epoch, indices, stream=Stream(view), count=_DRAWS)
    box = _draw_crop(config, source_size, draws[:, : 2 * _CROP_ATTEMPTS + 2])
    rest = draws[:, 2 * _CROP_ATTEMPTS + 2 :]
    flip, angle, jitter, brightness, contrast, saturation, hue, order, gray = rest.unbind(1)
    factors = (
        1.0 + config.brightness * (2.0 * brightness - 1.0),
        1.0 + config.contrast * (2.0 * contrast - 1.0),
        1.0 + config.saturation * (2.0 * saturation - 1.0),
        config.hue * (2.0 * hue - 1.0),
    )
    changes = jitter < config.jitter
    height, width = source_size
    # Numbers enter as numbers: a tensor of them made here would be a copy to the device that the host waits for.
    geometry = Geometry(
        box=torch.stack([edge / size for edge, size in zip(box.unbind(1), (height, width) * 2)], dim=1),
        flip=flip < config.flip,
        angle=math.radians(config.rotation) * (2.0 * angle - 1.0) if config.rotation else None,
        aspect=width / height,
    )
    return ViewParameters(
        geometry=geometry,
        box=box,
        factors=torch.stack([torch.where(changes, *pair) for pair in zip(factors, _IDENTITY)], dim=1),
        order=(order * len(ORDERS)).long(),
        gray=gray < config.grayscale,
    )


def render_views(
    images: Tensor,
    first: ViewParameters,
    second: ViewParameters,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    partner: Tensor | None = None,
    centers: Tensor | None = None,
    gamma: float | Tensor | None = None,
) -> Tensor:
    """Both views of each image, on CUDA in one launch, and with `partner`, `centers` and `gamma` the mixed view x̃ too,
    in a second one.

        rows i, N + i        x¹ᵢ and x²ᵢ, image i as `first` and `second` say (see `render_view`)
        row 2N + i           x̃ᵢ = x¹ᵢ with square patches that show the whole of x¹ₚ, p the partner of i, resized with
                             antialiasing (see `data_pipeline.patch`)

    Args:
        images: uint8 (N, H, W, C), C 1 or 3.
        first, second: parameters of N views each; both rotate or neither does.
        size: h = w, pixels, 1 or more.
        mean, std: per channel, of pixel values in [0, 1].
        dtype: float32, bfloat16 or float16.
        partner: (N,) int64 within 0 to N − 1.
        centers: (N, P, 2) float, places (y, x) in [0, 1] of the first view.
        gamma: side of the patch as a share of the view's side, in (0, 1]; a number or (N,) float.

    Returns: (2N, C, size, size), with patches (3N, C, size, size), in channels_last.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. Values on a GPU are checked there, so that
            the host does not wait; what is wrong with them then stops the process at its next synchronisation.
    """
    number, per_image = (1.0, gamma) if isinstance(gamma, Tensor) else (gamma, None)
    return torch.ops.gradmix.render_views(
        images, _pack(first), _pack(second), size, mean, std, dtype, partner, centers, number, per_image
    )


def render_view(
    images: Tensor,
    parameters: ViewParameters,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One view of each image, in plain PyTorch: uint8 (N, H, W, C) to (N, C, size, size) in channels_last, normalised.

    `mean` and `std` are per channel of pixel values in [0, 1].
    """
    view = empty_views(images, len(images), size, dtype)
    _render(view, _pixels(images), parameters, mean, std)
    return view


def render_plain(
    images: Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole image, resized if need be and normalised, as a trained model sees it. Shapes as in `render_view`."""
    pixels = _pixels(images)
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    view = empty_views(images, len(images), size, dtype)
    view.copy_(_normalise(pixels, mean, std))
    return view


@torch.library.custom_op("gradmix::render_views", mutates_args=())
def _render_views(
    images: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    partner: Tensor | None,
    centers: Tensor | None,
    gamma: float | None,
    gammas: Tensor | None,
) -> Tensor:
    side = gamma if gammas is None else gammas
    _check(images, first, second, size, mean, std, dtype, partner, centers, side)
    if partner is not None:
        check_patch_values(partner, centers, side)
    body = _render_in_pytorch
    if use_triton(images):
        # Here, since it imports Triton, which a machine without a GPU need not have.
        from data_pipeline.views_kernels import render_views as body
    aspect = images.shape[2] / images.shape[1]
    return body(images, _unpack(first, aspect), _unpack(second, aspect), size, mean, std, dtype, partner, centers, side)


@_render_views.register_fake
def _(
    images: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    partner: Tensor | None,
    centers: Tensor | None,
    gamma: float | None,
    gammas: Tensor | None,
) -> Tensor:
    side = gamma if gammas is None else gammas
    _check(images, first, second, size, mean, std, dtype, partner, centers, side)
    return empty_views(images, (2 if partner is None else 3) * len(images), size, dtype)


def _check(
    images: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    partner: Tensor | None,
    centers: Tensor | None,
    gamma: float | Tensor | None,
) -> None:
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"images is {shape} {images.dtype}; give (N, H, W, 1 or 3) torch.uint8, nothing of it empty")
    if len(first) != len(second):
        raise ValueError("one of first and second has angles; let both views rotate or neither")
    for name, tensors in (("first", first), ("second", second)):
        for tensor in tensors:
            if len(tensor) != len(images):
                raise ValueError(f"{name} has parameters of {len(tensor)} views; give {len(images)}, one an image")
            require_device(name, tensor, images.device)
    if size < 1:
        raise ValueError(f"size is {size}; set it to 1 or more")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != shape[3]:
            raise ValueError(f"{name} has {len(values)} values; give {shape[3]}, one a channel")
    require_floats("dtype", dtype)
    if len({argument is None for argument in (partner, centers, gamma)}) == 2:
        raise ValueError("some of partner, centers and gamma are None; give all three or none")
    if partner is not None:
        check_patches(images, partner, centers, gamma)


def _pack(parameters: ViewParameters) -> list[Tensor]:
    """The tensors of the parameters, since an operation takes nothing but tensors and numbers."""
    (box, flip, angle, _), *rest = parameters
    return [box, flip, *rest] if angle is None else [box, flip, *rest, angle]


def _unpack(tensors: Sequence[Tensor], aspect: float) -> ViewParameters:
    box, flip, *rest = tensors
    return ViewParameters(Geometry(box, flip, rest[4] if len(rest) > 4 else None, aspect), *rest[:4])


def _render_in_pytorch(
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
    n, pixels = len(images), _pixels(images)
    views = empty_views(images, (2 if partner is None else 3) * n, size, dtype)
    _render(views[:n], pixels, first, mean, std)
    _render(views[n : 2 * n], pixels, second, mean, std)
    if partner is not None:
        views[2 * n :] = views[:n]
        paste_patches(views[2 * n :], views[:n], partner, centers, gamma)
    return views


def _render(
    view: Tensor, pixels: Tensor, parameters: ViewParameters, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write into `view` what `parameters` make of `pixels` (N, C, H, W) in [0, 1]."""
    geometry, (top, left, height, width) = parameters.geometry, parameters.box.unbind(1)
    if geometry.angle is not None:
        pixels = _rotate(pixels, geometry.angle, geometry.aspect)
    rows = resample_weights(top, height, pixels.shape[2], view.shape[2])
    columns = resample_weights(left, width, pixels.shape[3], view.shape[3])
    columns = torch.where(geometry.flip.view(-1, 1, 1), columns.flip(1), columns)
    view.copy_(_normalise(_jitter(resample(pixels, rows, columns), parameters), mean, std))


def _pixels(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div_(255.0)


def empty_views(images: Tensor, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """Room for `count` views (count, C, size, size) of images (N, H, W, C), where the images are."""
    shape = (count, images.shape[3], size, size)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _draw_crop(config: ViewConfig, source_size: tuple[int, int], draws: Tensor) -> Tensor:
    """Boxes (N, 4) int64 by the rule of torchvision's RandomResizedCrop: the first of ten proposals that fits."""
    height, width = source_size
    area_draw, ratio_draw = draws[:, : 2 * _CROP_ATTEMPTS].view(-1, _CROP_ATTEMPTS, 2).unbind(2)
    area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * area_draw)
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = torch.exp(low + (high - low) * ratio_draw)
    box_width, box_height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (box_width >= 1) & (box_width <= width) & (box_height >= 1) & (box_height <= height)
    # The smallest number of those that fit: argmax may return a later one when it is compiled.
    attempts = torch.arange(_CROP_ATTEMPTS, device=draws.device)
    first = torch.where(fits, attempts, _CROP_ATTEMPTS - 1).amin(dim=1, keepdim=True)
    box_height, box_width = box_height.gather(1, first).squeeze(1), box_width.gather(1, first).squeeze(1)
    # Where no proposal fits, the largest centred box whose ratio is allowed.
    found, source_ratio = fits.any(dim=1), width / height
    fallback_width = min(width, round(height * config.ratio[1])) if source_ratio > config.ratio[1] else width
    fallback_height = min(height, round(width / config.ratio[0])) if source_ratio < config.ratio[0] else height
    box_height = torch.where(found, box_height, torch.full_like(box_height, fallback_height))
    box_width = torch.where(found, box_width, torch.full_like(box_width, fallback_width))
    place = torch.where(found.unsqueeze(1), draws[:, 2 * _CROP_ATTEMPTS :], torch.full_like(draws[:, :2], 0.5))
    top = (place[:, 0] * (height - box_height + 1)).floor()
    left = (place[:, 1] * (width - box_width + 1)).floor()
    return torch.stack((top, left, box_height, box_width), dim=1).long()


def _rotate(pixels: Tensor, angle: Tensor, aspect: float) -> Tensor:
    sine, cosine, zero = torch.sin(angle), torch.cos(angle), torch.zeros_like(angle)
    # grid_sample asks where each output pixel comes from, in units of half a side: the inverse rotation.
    inverse = torch.stack((cosine, -sine / aspect, zero, sine * aspect, cosine, zero), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(inverse, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _jitter(view: Tensor, parameters: ViewParameters) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, then grayscale; changes `view`.

    Of the four places in the order, one after the other, the images with the same change there are changed together:
    each image is only touched by what changes it. On a GPU, the host waits to learn which these are.
    """
    changes = [_change_brightness, _change_contrast]
    if view.shape[1] == 3:  # one channel has neither saturation nor hue
        changes += [_change_saturation, _shift_hue]
    order = _constant(ORDERS, view.device)[parameters.order]
    for place in order.unbind(1):
        for kind, change in enumerate(changes):
            factor = parameters.factors[:, kind]
            chosen = ((place == kind) & (factor != _IDENTITY[kind])).nonzero().squeeze(1)
            view.index_copy_(0, chosen, change(view[chosen], factor[chosen].view(-1, 1, 1, 1)))
    if view.shape[1] == 3:
        chosen = parameters.gray.nonzero().squeeze(1)
        view.index_copy_(0, chosen, _gray(view[chosen]).expand(-1, 3, -1, -1))
    return view


def _change_brightness(view: Tensor, factor: Tensor) -> Tensor:
    return view.mul_(factor).clamp_(0.0, 1.0)


def _change_contrast(view: Tensor, factor: Tensor) -> Tensor:
    return _blend(view, _gray(view).mean(dim=(1, 2, 3), keepdim=True), factor)


def _change_saturation(view: Tensor, factor: Tensor) -> Tensor:
    return _blend(view, _gray(view), factor)


def _blend(view: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return view.mul_(factor).add_((1.0 - factor) * other).clamp_(0.0, 1.0)


def _gray(view: Tensor) -> Tensor:
    if view.shape[1] == 1:
        return view
    red, green, blue = view.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _shift_hue(view: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` (N, 1, 1, 1) of the circle; value and saturation stay.

    In HSV each channel is value·(1 − saturation·m), with m a trapezoid of the hue: the channels are rebuilt from the
    new hue without the usual six cases.
    """
    value, low = view.amax(dim=1), view.amin(dim=1)
    chroma = value - low
    red, green, blue = view.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        ((green - blue) / safe) % 6.0,
        torch.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    hue = hue + 6.0 * shift.squeeze(1)
    for channel, offset in zip((red, green, blue), (5.0, 3.0, 1.0)):
        place = (offset + hue) % 6.0
        torch.sub(value, torch.minimum(place, 4.0 - place).clamp_(0.0, 1.0).mul_(chroma), out=channel)
    return view


def _normalise(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(view − mean) / std, in place."""
    mean, std = (_constant(tuple(values), view.device).view(1, -1, 1, 1) for values in (mean, std))
    return view.sub_(mean).div_(std)


@functools.cache
def _constant(values: tuple, device: torch.device) -> Tensor:
    """`values` on the device, copied there once and not at every step."""
    return torch.tensor(values, device=device)
