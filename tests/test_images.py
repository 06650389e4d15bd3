"""One image on its own: decoded and fitted as a build does it, and refused in one line where it cannot be."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.images import decode, fit, from_array


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with pixels that unpack to it from almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(min(width, 10**6) * 10), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_keep_every_pixel(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), kind, **options), 3), pixels)


def test_grey_and_colour_go_into_each_other():
    grey = np.random.default_rng(0).integers(0, 256, (5, 6), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey)), 3), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(from_array(grey, 1)[..., 0], grey)
    colour = np.random.default_rng(1).integers(0, 256, (5, 6, 3), np.uint8)
    luma = colour @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(from_array(colour, 1)[..., 0], luma, atol=1)


@pytest.mark.parametrize(("height", "width", "channels"), [(9, 20, 3), (20, 9, 1), (8, 8, 3)])
def test_fit_takes_the_centre_square(height, width, channels):
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    np.testing.assert_array_equal(fit(image, side), square)
    doubled = fit(np.full((height, width, channels), 77, np.uint8), 13)
    assert doubled.shape == (13, 13, channels) and (doubled == 77).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image file"),
        (b"hello, this is text", "not an image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file"),
        (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:300], r"a damaged image \("),
        (png_header(20_000, 20_000), "too large .*: send at most 50 million pixels"),
        (png_header(2**31 - 1, 2**31 - 1), "too large"),
    ],
)
def test_what_is_no_image_is_refused(content, message):
    with pytest.raises(InputError, match=message) as caught:
        decode(content, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3)), "not made of whole numbers but of float64"),
        (np.zeros((4, 4), bool), "not made of whole numbers but of bool"),
        (np.array([["a"]]), "not made of whole numbers"),
        (np.full((4, 4), 256), "numbers from 256 to 256"),
        (np.full((4, 4), -1), "numbers from -1 to -1"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((4,), np.uint8), "shape"),
        (np.zeros((0, 4), np.uint8), "shape"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "too large"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, message):
    with pytest.raises(InputError, match=message):
        from_array(array, 3)


def test_a_file_of_a_test_image_is_shown_to_the_model_as_the_build_stored_it():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    from data_pipeline.ffcv_writer import _stored

    np.testing.assert_array_equal(fit(decode(encoded(Image.fromarray(pixels)), 3), 16), _stored(pixels, 16))
