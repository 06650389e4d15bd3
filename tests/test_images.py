"""One image on its own: decoded and fitted as a build does it, and refused in one line where it cannot be."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.ffcv_writer import _stored
from data_pipeline.images import decode, fit, from_array, to_uint8


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
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), kind, **options), 3, 7), pixels[:, 2:9])


def test_grey_and_colour_go_into_each_other():
    grey = np.random.default_rng(0).integers(0, 256, (6, 6), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey)), 3, 6), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(from_array(grey, 1, 6)[..., 0], grey)
    colour = np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)
    luma = colour @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(from_array(colour, 1, 6)[..., 0], luma, atol=1)


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
        decode(content, 3, 16)
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
        from_array(array, 3, 16)


def test_a_file_of_a_test_image_is_shown_to_the_model_as_the_build_stored_it():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 3, 16), _stored(pixels, 16))


def odd_images() -> dict[str, Image.Image]:
    """Transparent, 16-bit and turned images, (1201, 901) and larger than what is worked on at a time."""
    generator = np.random.default_rng(0)
    pixels = Image.fromarray(generator.integers(0, 256, (901, 1201, 4), np.uint8), "RGBA")
    palette = pixels.convert("RGB").quantize(64)
    palette.info["transparency"] = bytes(range(0, 256, 4))
    turned = pixels.copy()
    turned.getexif()[0x0112] = 6
    return {
        "RGBA": pixels,
        "LA": pixels.convert("LA"),
        "palette": palette,
        "16 bits": Image.fromarray(generator.integers(0, 1 << 16, (901, 1201), np.uint16)),
        "turned": turned,
    }


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "16 bits", "turned"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_and_16_bit_images_become_what_whole_images_would(kind, channels):
    image = odd_images()[kind]
    content = encoded(image, exif=image.getexif())
    with Image.open(io.BytesIO(content)) as whole:
        if kind == "turned":
            whole = whole.transpose(Image.Transpose.ROTATE_270)
        if kind == "16 bits":
            expected = np.repeat((np.asarray(whole) // 256)[..., None], channels, axis=2).astype(np.uint8)
        else:
            white = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole.convert("RGBA"))
            expected = np.array(white.convert("L" if channels == 1 else "RGB")).reshape(*whole.size[::-1], channels)
    np.testing.assert_array_equal(to_uint8(Image.open(io.BytesIO(content)), channels), expected)
    np.testing.assert_array_equal(decode(content, channels, 32), fit(expected, 32))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {"compress_level": 1}),
        ("PNG", "L", {"compress_level": 1}),
        ("JPEG", "RGB", {"turned": True}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("WEBP", "RGB", {}),
    ],
)
def test_many_large_images_at_a_time_share_memory(kind, mode, options):
    program = """
import io, json, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from data_pipeline.images import decode

def megabytes(what):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(what))
    return int(line.split()[1]) // 1000

def encoded(size):
    image, file = Image.new(mode, (size, size)), io.BytesIO()
    if options.get("turned"):
        image.getexif()[0x0112] = 6
    image.save(file, kind, exif=image.getexif(), **options)
    return file.getvalue()

kind, mode, options = json.loads(sys.argv[1])
decode(encoded(16), 3, 16)
file = encoded(4800)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = megabytes("VmRSS")
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: decode(file, 3, 32), range(8)))
print(megabytes("VmHWM") - before, megabytes("VmRSS") - before)
"""
    asked = [sys.executable, "-c", program, json.dumps([kind, mode, options])]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    most, kept = map(int, done.stdout.split())
    # 23 million pixels: two of 8 bytes, or one of 10 or 16, find room in 400 MB.
    assert most < 450 and kept < 60, done.stdout
