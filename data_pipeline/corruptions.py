"""The 15 common corruptions in 5 severities (Hendrycks & Dietterich 2019), made here or read from the official files.

`corrupt` makes them with the published constants: those of CIFAR-10-C for images up to 48 pixels, of Tiny-ImageNet-C up
to 128, and of ImageNet-C above. What it draws is a function of (seed, image, corruption, severity) and of nothing else.

Where it differs from the official files:

    frost      the photographs of frost that are blended in are not at hand. A texture like frost is generated in their
               place and blended with the published weights, so numbers of this corruption are not those of the official
               files.
    all        the random numbers are other ones, and the official Tiny-ImageNet-C was stored as JPEG of quality 85.

A higher severity is further from the clean image, with two exceptions that lie in the published constants: glass blur
moves pixels further or more often but also smooths them, and the affine part of the elastic transform gets smaller.

`read_corrupted` reads CIFAR-10-C's .npy files and Tiny-ImageNet-C's folders.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from data_pipeline.errors import InputError, unknown_name

Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip

CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3, 4, 5)

Pixels = NDArray[np.float64]
"""Images (N, H, W, C) in [0, 1]."""

_CIFAR: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}  # fmt: skip

_TINY: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
    "shot_noise": (250, 100, 50, 30, 15),
    "impulse_noise": (0.01, 0.02, 0.05, 0.08, 0.14),
    "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    "zoom_blur": _CIFAR["zoom_blur"],
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    "frost": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
    "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
    "jpeg_compression": (65, 58, 50, 40, 25),
}  # fmt: skip

# The published elastic constants for 224 pixels are multiples of 244.
_WIDE = 244 / 224
_IMAGENET: dict[str, tuple] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": _TINY["brightness"],
    "contrast": _TINY["contrast"],
    "elastic_transform": (
        (2 * _WIDE, 0.7 * _WIDE, 0.1 * _WIDE), (2 * _WIDE, 0.08 * _WIDE, 0.2 * _WIDE),
        (0.05 * _WIDE, 0.01 * _WIDE, 0.02 * _WIDE), (0.07 * _WIDE, 0.01 * _WIDE, 0.02 * _WIDE),
        (0.12 * _WIDE, 0.01 * _WIDE, 0.02 * _WIDE),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}  # fmt: skip


def constants(corruption: Corruption, severity: int, image_size: int) -> float | tuple:
    """The published constants of a corruption, in the order in which its function below takes them.

    Raises:
        InputError: there is no such corruption or severity.
    """
    if corruption not in CORRUPTIONS:
        raise unknown_name("corruption", corruption, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise InputError(f"severity is {severity}; set it to 1, 2, 3, 4 or 5")
    table = _CIFAR if image_size <= 48 else _TINY if image_size <= 128 else _IMAGENET
    return table[corruption][severity - 1]


def corrupt(
    images: np.ndarray, corruption: Corruption, severity: int, *, indices: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Corrupted images of the same shape, a function of each image, its index, the seed, corruption and severity only.

    Args:
        images: uint8 (N, S, S, C), S at least 8, C 1 or 3.
        severity: 1 to 5.
        indices: (N,) integers from 0, the images' own numbers.

    Raises:
        InputError: there is no such corruption or severity, or images are not square or smaller than 8 pixels.
        ValueError: an array has a wrong shape or dtype.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(indices) != len(images):
        raise ValueError(f"images must be uint8 (N, S, S, 1 or 3) with N indices, got {images.dtype} {images.shape}")
    size = images.shape[1]
    if images.shape[2] != size or size < 8:
        raise InputError(f"images are {size} × {images.shape[2]} pixels: corruptions take square ones of 8 or more")
    values = constants(corruption, severity, size)
    number = CORRUPTIONS.index(corruption)
    generators = [np.random.default_rng([seed, number, severity, int(index)]) for index in indices]
    if not generators:
        return images.copy()
    arguments = values if isinstance(values, tuple) else (values,)
    result = _FUNCTIONS[corruption](images / 255.0, generators, *arguments)
    # The published code truncates; the small number keeps whole levels, 255 · (a / 255) for one, whole.
    return (np.clip(result, 0, 1) * 255 + 1e-6).astype(np.uint8)


# Noise


def _gaussian_noise(x: Pixels, draw: list[np.random.Generator], deviation: float) -> Pixels:
    return x + deviation * np.stack([each.normal(size=x.shape[1:]) for each in draw])


def _shot_noise(x: Pixels, draw: list[np.random.Generator], photons: float) -> Pixels:
    return np.stack([each.poisson(image * photons) for each, image in zip(draw, x)]) / photons


def _impulse_noise(x: Pixels, draw: list[np.random.Generator], share: float) -> Pixels:
    """Each channel of a pixel by itself turns black or white."""
    hit = np.stack([each.random(x.shape[1:]) for each in draw]) < share
    white = np.stack([each.random(x.shape[1:]) for each in draw]) < 0.5
    return np.where(hit, white, x)


# Blur


def _defocus_blur(x: Pixels, draw: list[np.random.Generator], radius: float, softness: float) -> Pixels:
    """Convolution with a disk of this radius, itself blurred by `softness`; pixels."""
    reach = max(8, int(radius))
    y = np.arange(-reach, reach + 1)
    disk = (y[:, None] ** 2 + y**2 <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    kernel = cv2.GaussianBlur(disk / disk.sum(), (side, side), sigmaX=softness)
    return _filter(x, [kernel] * len(x), cv2.BORDER_REFLECT_101)


def _glass_blur(x: Pixels, draw: list[np.random.Generator], sigma: float, reach: int, passes: int) -> Pixels:
    """A Gaussian blur, pixels that take their neighbours' place, and the blur again.

    The published code means to exchange two pixels, but its second assignment reads what the first has written: the
    neighbour stays as it is. The official files are made so, and so is this.
    """
    blurred = (_gaussian(x, sigma) * 255 + 1e-6).astype(np.uint8)
    places = range(x.shape[1] - reach, reach, -1)
    steps = np.stack([each.integers(-reach, reach, size=(passes, len(places), len(places), 2)) for each in draw])
    every = np.arange(len(x))
    for number in range(passes):
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                right, down = steps[:, number, i, j].T
                blurred[:, row, column] = blurred[every, row + down, column + right]
    return _gaussian(blurred / 255.0, sigma)


def _motion_blur(x: Pixels, draw: list[np.random.Generator], radius: float, sigma: float) -> Pixels:
    angles = [each.uniform(-45, 45) for each in draw]
    return np.round(_filter(x, [_streak(radius, sigma, angle) for angle in angles], cv2.BORDER_REPLICATE) * 255) / 255


def _zoom_blur(x: Pixels, draw: list[np.random.Generator], stop: float, step: float) -> Pixels:
    """The mean of the image and of its enlargements by 1, 1 + step, ..., below `stop`."""
    factors, single = np.arange(1, stop, step), x.astype(np.float32)
    total = x.copy()
    for factor in factors:
        total += _enlarge(single, factor)
    return total / (len(factors) + 1)


# Weather


def _snow(
    x: Pixels, draw: list[np.random.Generator],
    mean: float, deviation: float, zoom: float, least: float, radius: float, sigma: float, keep: float,
) -> Pixels:  # fmt: skip
    """Enlarged noise above `least`, blurred along its fall, over an image that is bleached by 1 - keep."""
    flakes = np.stack([each.normal(mean, deviation, size=(*x.shape[1:3], 1)) for each in draw])
    flakes = _enlarge(flakes, zoom)
    flakes[flakes < least] = 0
    flakes = np.floor(np.clip(flakes, 0, 1) * 255) / 255
    streaks = [_streak(radius, sigma, each.uniform(-135, -45)) for each in draw]
    layer = np.round(_filter(flakes, streaks, cv2.BORDER_REPLICATE) * 255) / 255
    grey = x @ np.array([0.299, 0.587, 0.114])[:, None] if x.shape[3] == 3 else x
    bleached = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return bleached + layer + layer[:, ::-1, ::-1]


def _frost(x: Pixels, draw: list[np.random.Generator], keep: float, strength: float) -> Pixels:
    return keep * x + strength * _frost_texture(draw, x.shape[1], x.shape[3])


def _frost_texture(draw: list[np.random.Generator], size: int, channels: int) -> Pixels:
    """Something like frost on a pane, (N, size, size, channels) in [0, 1]: needles of ice along the creases of fractal
    noise, with patches of clear glass, bluish white. It stands in for photographs."""
    scale = 2 * size
    crease = 1 - np.abs(2 * _plasma(draw, scale, 1.6) - 1)
    needles = np.clip(crease, 0, 1) ** 6
    cover = _plasma(draw, scale, 2.5)
    grain = np.stack([each.random((scale, scale)) for each in draw])
    ice = np.clip(0.15 + 0.55 * cover + 0.5 * needles + 0.15 * (grain - 0.5), 0, 1)
    # Twice as fine as the image, then shrunk: needles thinner than a pixel.
    ice = ice.reshape(len(draw), size, 2, size, 2).mean(axis=(2, 4))
    tint = np.array([0.82, 0.92, 1.0]) if channels == 3 else np.array([0.92])
    return ice[..., None] * tint


def _fog(x: Pixels, draw: list[np.random.Generator], strength: float, decay: float) -> Pixels:
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + strength * _plasma(draw, x.shape[1], decay)[..., None]) * brightest / (brightest + strength)


def _brightness(x: Pixels, draw: list[np.random.Generator], more: float) -> Pixels:
    """The value of HSV, which is the largest channel, plus `more`: the others keep their proportion to it."""
    value = x.max(axis=3, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


# Digital


def _contrast(x: Pixels, draw: list[np.random.Generator], share: float) -> Pixels:
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * share + means


def _elastic_transform(
    x: Pixels, draw: list[np.random.Generator], amplitude: float, sigma: float, shift: float
) -> Pixels:
    """A random affine map, then a smooth displacement of each pixel; constants are shares of the image's side."""
    size, channels = x.shape[1], x.shape[3]
    centre, reach = np.float32([size // 2, size // 2]), size // 3
    corners = np.float32([centre + reach, [centre[0] + reach, centre[1] - reach], centre - reach])
    result = np.empty_like(x)
    for image, each, out in zip(x, draw, result):
        moved = corners + each.uniform(-shift * size, shift * size, size=corners.shape).astype(np.float32)
        matrix = cv2.getAffineTransform(corners, moved)
        warped = cv2.warpAffine(
            image.astype(np.float32), matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101
        ).reshape(size, size, channels)
        across, down = (
            ndimage.gaussian_filter(each.uniform(-1, 1, size=(size, size)), sigma * size, mode="reflect", truncate=3)
            * (amplitude * size)
            for _ in range(2)
        )
        rows, columns = np.mgrid[:size, :size]
        for channel in range(channels):
            out[..., channel] = ndimage.map_coordinates(
                warped[..., channel], (rows + down, columns + across), order=1, mode="reflect"
            )
    return result


def _pixelate(x: Pixels, draw: list[np.random.Generator], share: float) -> Pixels:
    size = x.shape[1]
    small = int(size * share)
    return _through_pillow(
        x, lambda image: image.resize((small, small), Image.Resampling.BOX).resize((size, size), Image.Resampling.BOX)
    )


def _jpeg_compression(x: Pixels, draw: list[np.random.Generator], quality: int) -> Pixels:
    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _through_pillow(x, compressed)


_FUNCTIONS: dict[Corruption, Callable[..., Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


# What they are made of


def _gaussian(x: Pixels, sigma: float) -> Pixels:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest", truncate=4)


def _filter(x: Pixels, kernels: Sequence[np.ndarray], border: int) -> Pixels:
    """Each image with its kernel."""
    filtered = [cv2.filter2D(image, -1, kernel, borderType=border) for image, kernel in zip(x, kernels)]
    return np.stack(filtered).reshape(x.shape)


def _streak(radius: float, sigma: float, angle: float) -> NDArray[np.float64]:
    """The kernel with which ImageMagick blurs motion: half a Gaussian over 2·radius + 1 pixels from the centre on, in
    the direction of `angle`, degrees."""
    width = 2 * int(np.ceil(radius)) + 1
    step = np.arange(width)
    weights = np.exp(-(step**2) / (2 * sigma**2))
    across = np.ceil(step * np.cos(np.radians(angle)) - 0.5).astype(int)
    down = np.ceil(step * np.sin(np.radians(angle)) - 0.5).astype(int)
    kernel = np.zeros((2 * width - 1, 2 * width - 1))
    np.add.at(kernel, (width - 1 + down, width - 1 + across), weights / weights.sum())
    return kernel


def _enlarge(x: Pixels, factor: float) -> Pixels:
    """The middle of each image enlarged by `factor` to its old size, corners on corners, bilinear."""
    n, size, _, channels = x.shape
    matrix = _enlargement(size, factor).astype(x.dtype)
    for _ in range(2):
        # Rows, and once they have changed places with the columns, those.
        x = np.matmul(matrix, x.reshape(n, size, size * channels)).reshape(n, size, size, channels).swapaxes(1, 2)
    return x


def _enlargement(size: int, factor: float) -> NDArray[np.float64]:
    """The weights (size, size) with which pixels of one axis enter those of the enlarged axis."""
    taken = int(np.ceil(size / factor))
    top = (size - taken) // 2
    grown = round(taken * factor)
    trim = (grown - size) // 2
    place = (trim + np.arange(size)) * ((taken - 1) / max(grown - 1, 1))
    left = np.minimum(place.astype(int), max(taken - 2, 0))
    matrix = np.zeros((size, size))
    rows = np.arange(size)
    np.add.at(matrix, (rows, top + left), 1 - (place - left))
    np.add.at(matrix, (rows, top + np.minimum(left + 1, taken - 1)), place - left)
    return matrix


def _plasma(draw: list[np.random.Generator], size: int, decay: float) -> NDArray[np.float64]:
    """Fractal noise (N, size, size) in [0, 1] by the diamond-square algorithm on a torus: each new point is the mean of
    its four neighbours plus noise, whose amplitude is divided by decay² whenever the grid gets twice as fine."""
    side = 1 << (size - 1).bit_length()
    heights = np.zeros((len(draw), side, side))
    step, wobble = side, 100.0

    def noisy(total: np.ndarray) -> np.ndarray:
        noise = np.stack([each.uniform(-wobble, wobble, size=total.shape[1:]) for each in draw])
        return total / 4 + wobble * noise

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        rows = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = noisy(rows + np.roll(rows, -1, axis=2))
        middles = heights[:, half::step, half::step]
        above_and_below = middles + np.roll(middles, 1, axis=1)
        beside = corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = noisy(above_and_below + beside)
        left_and_right = middles + np.roll(middles, 1, axis=2)
        beneath = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, ::step] = noisy(left_and_right + beneath)
        step, wobble = half, wobble / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return (heights / heights.max(axis=(1, 2), keepdims=True))[:, :size, :size]


def _through_pillow(x: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    levels = np.round(x * 255).astype(np.uint8)
    images = [Image.fromarray(image if image.shape[2] == 3 else image[..., 0]) for image in levels]
    return np.stack([np.asarray(change(image)) for image in images]).reshape(x.shape) / 255.0


# The official files


def read_corrupted(
    root: Path, corruption: Corruption, severity: int, classes: Sequence[int | str], class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The official corrupted test images of some classes: uint8 (n, H, W, 3), and labels (n,), places in `classes`.

    Args:
        root: the unpacked CIFAR-10-C (with gaussian_noise.npy, ..., labels.npy) or Tiny-ImageNet-C (with folders
            gaussian_noise/1/n01443537/, ...).
        classes: label ids, as CIFAR-10-C's labels.npy has them.
        class_names: their names, as Tiny-ImageNet-C's folders are called.

    Raises:
        InputError: the files are not there, damaged, or without one of the classes.
    """
    constants(corruption, severity, 32)
    if (root / f"{corruption}.npy").is_file():
        return _read_arrays(root, corruption, severity, classes)
    if (root / corruption / str(severity)).is_dir():
        return _read_folders(root / corruption / str(severity), class_names)
    raise InputError(
        f"{root} has neither {corruption}.npy (CIFAR-10-C) nor a folder {corruption}/{severity} (Tiny-ImageNet-C): "
        "unpack the official archive there, or leave --corrupted-root out to generate the corruptions"
    )


def _read_arrays(
    root: Path, corruption: Corruption, severity: int, classes: Sequence[int | str]
) -> tuple[np.ndarray, np.ndarray]:
    try:
        images = np.load(root / f"{corruption}.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(root / "labels.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{root} is not a readable CIFAR-10-C ({error}): unpack the archive again") from error
    # All severities lie one after the other; so do the labels in the published archive.
    count = len(images) // len(SEVERITIES)
    if images.ndim != 4 or images.dtype != np.uint8 or len(labels) not in (count, len(images)) or count == 0:
        raise InputError(
            f"{root} holds {images.dtype} images {images.shape} and {len(labels)} labels, which is no CIFAR-10-C: "
            "unpack the archive again"
        )
    rows, labels = images[(severity - 1) * count : severity * count], labels[:count].astype(np.int64)
    places = np.full(count, -1)
    for place, class_id in enumerate(classes):
        if not np.any(labels == class_id):
            raise InputError(f"class {class_id!r} is not in {root / 'labels.npy'}: it belongs to another data set")
        places[labels == class_id] = place
    return np.ascontiguousarray(rows[places >= 0]), places[places >= 0]


def _read_folders(folder: Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for place, name in enumerate(class_names):
        files = sorted(file for file in (folder / name).glob("*") if file.suffix.lower() in (".jpeg", ".jpg", ".png"))
        if not files:
            raise InputError(f"{folder} has no images of class {name!r}: it belongs to another data set")
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(np.array(image.convert("RGB")))
            except OSError as error:
                raise InputError(f"{file} is corrupt ({error}): unpack the archive again") from error
        labels += [place] * len(files)
    return np.stack(images), np.array(labels, dtype=np.int64)
