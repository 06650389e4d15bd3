"""One image, from whatever it comes as to what a model is shown: upright, 8 bits a channel, the centre square.

Builds and predictions go the same way, so that an image has the same score in a test set and on its own.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import InputError

MAX_PIXELS = 50_000_000
"""The largest image that `decode` takes: 150 MB once it is decoded."""

# What is read from whoever sends it. Pillow has readers of more, some of which start programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def to_uint8(image: Image.Image, channels: int) -> np.ndarray:
    """Any Pillow image, upright, on white and with 8 bits a channel: uint8 (H, W, channels)."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        image = _from_16_bits(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return np.array(image).reshape(image.height, image.width, channels)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of uint8 (H, W, C), resized to (size, size, C)."""
    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    squeezed = image[..., 0] if channels == 1 else image
    resized = Image.fromarray(squeezed).resize((size, size), Image.Resampling.BILINEAR)
    return np.array(resized).reshape(size, size, channels)


def decode(encoded: bytes, channels: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image (PNG, JPEG, ...) as uint8 (H, W, channels); of several frames the first.

    Its size is read before its pixels are, so that a small file that unpacks to a huge image costs nothing.

    Raises:
        InputError: it is no image of these formats, is damaged, or has more than `max_pixels` pixels. The message goes
            on where "the image is" ends.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(f"{image.width} × {image.height} pixels", max_pixels)
            return to_uint8(image, channels)
    except UnidentifiedImageError as error:
        raise InputError(f"not an image file: send one of {', '.join(_formats())}") from error
    except Image.DecompressionBombError as error:
        raise _too_large("far too many pixels", max_pixels) from error
    except InputError:
        raise
    except Exception as error:  # on damaged bytes, decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"a damaged image ({reason}): save it again") from error


def from_array(array: np.ndarray, channels: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Whole numbers 0 to 255 of shape (H, W), (H, W, 1) or (H, W, 3) as uint8 (H, W, channels).

    Raises:
        InputError: the shape, the type or a value is another, or there are no or more than `max_pixels` pixels. The
            message goes on where "the image is" ends.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise InputError(f"not of an image's shape {array.shape}: send (H, W), (H, W, 1) or (H, W, 3)")
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"not made of whole numbers but of {array.dtype}: send 0 to 255 (uint8)")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise _too_large(f"{array.shape[1]} × {array.shape[0]} pixels", max_pixels)
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise InputError(f"not of 8 bits (numbers from {array.min()} to {array.max()}): send 0 to 255 (uint8)")
        array = array.astype(np.uint8)
    return to_uint8(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array), channels)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _from_16_bits(values: np.ndarray) -> Image.Image:
    """Grey levels 0..65535, which Pillow also gives as 32-bit integers, at 8 bits. Pillow itself would clip them."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("grey levels outside 0..65535 have no fixed range")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _too_large(what: str, max_pixels: int) -> InputError:
    return InputError(f"too large ({what}): send at most {max_pixels / 1e6:g} million pixels")
