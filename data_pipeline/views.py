"""SimCLR views, batched on the device: random resized crop, flip, rotation, colour jitter, grayscale, normalise.

Every image has its own parameters, drawn by a counter-based generator from (seed, epoch, image index, view): a view
does not depend on the rank, the batch or the order in which images come. The geometry that made a view comes back with
it, so that a place found in the view can be put on the source image and from there into the next epoch's view.

Shapes: N images, C channels, source H×W, view h×w, P points per image. Points are (y, x), each in [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.counter_rng import Stream, uniforms
from data_pipeline.errors import InputError
from data_pipeline.resample import resample, resample_weights

_CROP_ATTEMPTS = 10
_DRAWS = 2 * _CROP_ATTEMPTS + 11
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
ORDERS = tuple(itertools.permutations((_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE)))
_HUE_PLACE = torch.tensor([order.index(_HUE) for order in ORDERS])
_BLENDS = torch.tensor([[change for change in order if change != _HUE] for order in ORDERS])
_LUMA = (0.2989, 0.587, 0.114)


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
    factors = torch.stack(
        [
            1.0 + config.brightness * (2.0 * brightness - 1.0),
            1.0 + config.contrast * (2.0 * contrast - 1.0),
            1.0 + config.saturation * (2.0 * saturation - 1.0),
            config.hue * (2.0 * hue - 1.0),
        ],
        dim=1,
    )
    identity = torch.tensor([1.0, 1.0, 1.0, 0.0], device=indices.device)
    height, width = source_size
    geometry = Geometry(
        box=box / torch.tensor([height, width, height, width], device=box.device),
        flip=flip < config.flip,
        angle=math.radians(config.rotation) * (2.0 * angle - 1.0) if config.rotation else None,
        aspect=width / height,
    )
    return ViewParameters(
        geometry=geometry,
        box=box,
        factors=torch.where((jitter < config.jitter).unsqueeze(1), factors, identity),
        order=(order * len(ORDERS)).long(),
        gray=gray < config.grayscale,
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
    """One view of each image: uint8 (N, H, W, C) to (N, C, size, size) in channels_last, normalised.

    `mean` and `std` are per channel of pixel values in [0, 1].
    """
    pixels = images.permute(0, 3, 1, 2).float().div_(255.0)
    geometry, (top, left, height, width) = parameters.geometry, parameters.box.unbind(1)
    if geometry.angle is not None:
        pixels = _rotate(pixels, geometry.angle, geometry.aspect)
    rows = resample_weights(top, height, images.shape[1], size)
    columns = resample_weights(left, width, images.shape[2], size)
    columns = torch.where(geometry.flip.view(-1, 1, 1), columns.flip(1), columns)
    view = resample(pixels, rows, columns)
    view = _jitter(view, parameters)
    return _normalise(view, mean, std, dtype)


def render_plain(
    images: Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole image, resized if need be and normalised, as a trained model sees it. Shapes as in `render_view`."""
    pixels = images.permute(0, 3, 1, 2).float().div_(255.0)
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return _normalise(pixels, mean, std, dtype)


def _draw_crop(config: ViewConfig, source_size: tuple[int, int], draws: Tensor) -> Tensor:
    """Boxes (N, 4) int64 by the rule of torchvision's RandomResizedCrop: the first of ten proposals that fits."""
    height, width = source_size
    area_draw, ratio_draw = draws[:, : 2 * _CROP_ATTEMPTS].view(-1, _CROP_ATTEMPTS, 2).unbind(2)
    area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * area_draw)
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = torch.exp(low + (high - low) * ratio_draw)
    box_width, box_height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (box_width >= 1) & (box_width <= width) & (box_height >= 1) & (box_height <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
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
    """Brightness, contrast, saturation and hue in each image's own order, then grayscale.

    The first three blend the image with black, its mean gray and its own gray. Only the order of the three and the
    place of the hue shift among them matter, so three blends before one hue shift and three after it cover every order:
    each image skips, by a factor of 1, the blends that are not its own.
    """
    colour = view.shape[1] == 3
    hue_place = _HUE_PLACE.to(view.device)[parameters.order]
    blends = _BLENDS.to(view.device)[parameters.order]
    for slot in range(3):
        view = _blend(view, blends[:, slot], parameters.factors, active=slot < hue_place)
    if colour:
        view = _shift_hue(view, parameters.factors[:, _HUE])
    for slot in range(3):
        view = _blend(view, blends[:, slot], parameters.factors, active=slot >= hue_place)
    if colour:
        view = torch.where(parameters.gray.view(-1, 1, 1, 1), _gray(view), view)
    return view


def _blend(view: Tensor, kind: Tensor, factors: Tensor, active: Tensor) -> Tensor:
    colour = view.shape[1] == 3
    gray = _gray(view) if colour else view
    factor = factors.gather(1, kind.unsqueeze(1)).squeeze(1)
    # One channel has no saturation to change.
    changes = active if colour else active & (kind != _SATURATION)
    factor = torch.where(changes, factor, torch.ones_like(factor)).view(-1, 1, 1, 1)
    kind = kind.view(-1, 1, 1, 1)
    partner = torch.where(kind == _SATURATION, gray, gray.mean(dim=(1, 2, 3), keepdim=True))
    partner = torch.where(kind == _BRIGHTNESS, torch.zeros_like(partner), partner)
    return (factor * view + (1.0 - factor) * partner).clamp_(0.0, 1.0)


def _gray(view: Tensor) -> Tensor:
    red, green, blue = view.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _shift_hue(view: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` (N,) of the circle; value and saturation stay.

    In HSV each channel is value·(1 − saturation·m), with m a trapezoid of the hue: the channels are rebuilt from the
    new hue without the usual six cases.
    """
    value, low = view.amax(dim=1), view.amin(dim=1)
    chroma = value - low
    red, green, blue = view.unbind(1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        ((green - blue) / safe) % 6.0,
        torch.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    hue = hue + 6.0 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        place = (offset + hue) % 6.0
        channels.append(value - chroma * torch.minimum(place, 4.0 - place).clamp(0.0, 1.0))
    shifted = torch.stack(channels, dim=1)
    # A shift of zero returns the very same pixels, not the same up to rounding.
    return torch.where((shift == 0).view(-1, 1, 1, 1), view, shifted)


def _normalise(view: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    mean_tensor = torch.tensor(mean, device=view.device).view(1, -1, 1, 1)
    std_tensor = torch.tensor(std, device=view.device).view(1, -1, 1, 1)
    return ((view - mean_tensor) / std_tensor).to(dtype, memory_format=torch.channels_last)
