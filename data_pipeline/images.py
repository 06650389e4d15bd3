"""One image, from whatever it comes as to what a model is shown: upright, 8 bits a channel, the centre square.

Builds and predictions go the same way, so that an image has the same score in a test set and on its own.
"""

from __future__ import annotations

import ctypes
import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import InputError

MAX_PIXELS = 50_000_000
"""The largest image that is taken."""

# What is read from whoever sends it. Pillow has readers of more, some of which start programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# What a decoder holds while it fills Pillow's memory, as a multiple of that: whole frames, or all coefficients.
_DECODERS_HOLD = {"WEBP": 3, "AVIF": 3, "JPEG2000": 6, "TIFF": 2, "PPM": 2}

_STRIP_PIXELS = 1 << 18
_WORTH_GIVING_BACK = 1 << 24  # bytes


def to_uint8(image: Image.Image, channels: int) -> np.ndarray:
    """Any Pillow image, upright, on white and with 8 bits a channel: uint8 (H, W, channels)."""
    ImageOps.exif_transpose(image, in_place=True)
    return _part(image, (0, 0, *image.size), channels)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of uint8 (H, W, C), resized to (size, size, C)."""
    height, width, channels = image.shape
    left, top, right, bottom = _centre(width, height)
    image = image[top:bottom, left:right]
    if bottom - top == size:
        return image
    squeezed = image[..., 0] if channels == 1 else image
    resized = Image.fromarray(squeezed).resize((size, size), Image.Resampling.BILINEAR)
    return np.array(resized).reshape(size, size, channels)


def decode(encoded: bytes, channels: int, size: int) -> np.ndarray:
    """The centre square of an encoded image (PNG, JPEG, ...) as uint8 (size, size, channels); the first of its frames.

    Its size is read before its pixels are, so that a small file that unpacks to a huge image costs nothing. Threads
    that decode at a time share what memory the largest PNG takes: who finds too little left waits, and what takes more
    than that by itself is decoded alone.

    Raises:
        InputError: it is no image of these formats, is damaged, or has more than `MAX_PIXELS` pixels. The message goes
            on where "the image is" ends.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(f"{image.width} × {image.height} pixels")
            with _room.taken(image.width * image.height * _bytes_per_pixel(image, channels)):
                return _square(image, channels, size)
    except UnidentifiedImageError as error:
        raise InputError(f"not an image file: send one of {', '.join(_formats())}") from error
    except Image.DecompressionBombError as error:
        raise _too_large("far too many pixels") from error
    except InputError:
        raise
    except Exception as error:  # on damaged bytes, decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"a damaged image ({reason}): save it again") from error


def from_array(array: np.ndarray, channels: int, size: int) -> np.ndarray:
    """The centre square of whole numbers 0 to 255, (H, W), (H, W, 1) or (H, W, 3), as uint8 (size, size, channels).

    Raises:
        InputError: the shape, the type or a value is another, or there are no or more than `MAX_PIXELS` pixels. The
            message goes on where "the image is" ends.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise InputError(f"not of an image's shape {array.shape}: send (H, W), (H, W, 1) or (H, W, 3)")
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"not made of whole numbers but of {array.dtype}: send 0 to 255 (uint8)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large(f"{array.shape[1]} × {array.shape[0]} pixels")
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise InputError(f"not of 8 bits (numbers from {array.min()} to {array.max()}): send 0 to 255 (uint8)")
        array = array.astype(np.uint8)
    return _square(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array), channels, size)


def _square(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """`fit` of `to_uint8`, of which only the centre square is made; closes the image."""
    large = image.width * image.height * 4 >= _WORTH_GIVING_BACK
    ImageOps.exif_transpose(image, in_place=True)
    if large:
        _give_memory_back()  # of the image as it lay
    pixels = _part(image, _centre(*image.size), channels)
    image.close()  # resizing copies the pixels: one set of them goes before
    if large:
        _give_memory_back()
    return fit(pixels, size)


def _centre(width: int, height: int) -> tuple[int, int, int, int]:
    """The centre square: left, top, right, bottom."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _part(image: Image.Image, box: tuple[int, int, int, int], channels: int) -> np.ndarray:
    """What lies within (left, top, right, bottom) as uint8 (H, W, channels).

    Strip by strip: what Pillow makes on the way from transparent or 16-bit pixels takes several times their memory.
    """
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, channels), np.uint8)
    rows = max(1, _STRIP_PIXELS // (right - left))
    for start in range(top, bottom, rows):
        end = min(start + rows, bottom)
        strip = _plain(image.crop((left, start, right, end)), channels)
        pixels[start - top : end - top] = np.asarray(strip).reshape(end - start, right - left, channels)
    return pixels


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Any pixels as L or RGB, on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        image = _from_16_bits(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


class _Room:
    """So many bytes that threads may hold together."""

    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Hold `amount`, or all there is if that is less, as soon as it is free."""
        amount = min(amount, self._total)
        # One waits at a time: who needs much is not passed for ever by those who need little.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: amount <= self._left)
            self._left -= amount
        try:
            yield
        finally:
            if amount >= _WORTH_GIVING_BACK:
                _give_memory_back()
            with self._changed:
                self._left += amount
                self._changed.notify()


_room = _Room(MAX_PIXELS * 8)


def _bytes_per_pixel(image: Image.Image, channels: int) -> int:
    """What `_square` takes at most of an image that is not decoded yet."""
    held = {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(image.mode, 4)
    decoder = 2 if "progressive" in image.info else _DECODERS_HOLD.get(image.format or "", 0)
    # Turning it makes another; a PNG may say only behind its pixels that it has to be turned. Of colours there is an
    # array of 3 bytes, beside the pixels it is made from and then beside the copy of 4 bytes that is resized.
    return max(held * (1 + decoder), 2 * held, 8 if channels == 3 else held + 1)


def _give_memory_back() -> None:
    """Let the C library return free memory to the system; glibc keeps it otherwise, for each thread anew."""
    trim = _c_library_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _c_library_trim() -> ctypes._CFuncPtr | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


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


def _too_large(what: str) -> InputError:
    return InputError(f"too large ({what}): send at most {MAX_PIXELS / 1e6:g} million pixels")
