"""Images that are files: which are taken, what their pixels are, and what is said of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from tests.sources import by_name, encode, image_folder, random_images, reading_error, write


def one_image(root: Path, name: str, content: bytes, channels: int = 3) -> np.ndarray:
    write(root / "train/a" / name, content)
    return image_folder(root, channels=channels)[0][0]


def test_image_folder_takes_what_pillow_reads(tmp_path: Path) -> None:
    image = encode(random_images((2, 2, 3)), "JPEG")
    for name in ("a.JPG", "b.mpo", "c.webp", "d.pdf", "e.txt", "f", "g.heic"):
        write(tmp_path / "train/cat" / name, image)
    assert by_name(image_folder(tmp_path), tmp_path).keys() == {
        f"train/cat/{name}" for name in ("a.JPG", "b.mpo", "c.webp")
    }


def test_image_folder_exif_orientation(tmp_path: Path) -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 200  # left half bright; orientation 6 asks to turn it clockwise, so that the top half is
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, format in (("1.jpg", "JPEG"), ("1.png", "PNG"), ("1.tif", "TIFF"), ("1.webp", "WEBP")):
        pixels = one_image(tmp_path / format, name, encode(image, format, exif=exif))
        assert pixels.shape == (32, 16, 3)
        assert pixels[:14].min() > 150 and pixels[18:].max() < 50


def test_image_folder_transparency_is_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    assert one_image(tmp_path / "rgba", "1.png", encode(rgba)).tolist() == expected
    assert one_image(tmp_path / "luma", "1.png", encode(rgba), channels=1)[0, :, 0].tolist() == [76, 255, 127]
    la = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert one_image(tmp_path / "la", "1.png", encode(la))[0, :, 0].tolist() == [10, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 200, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert one_image(tmp_path / "palette", "1.png", encode(palette)).tolist() == [[[0, 200, 0], [9, 9, 9]]]
    clear = encode(palette, transparency=1)
    assert one_image(tmp_path / "clear", "1.png", clear).tolist() == [[[0, 200, 0], [255, 255, 255]]]
    assert one_image(tmp_path / "gif", "1.gif", encode(palette, "GIF")).tolist() == [[[0, 200, 0], [9, 9, 9]]]


def test_image_folder_depths_and_colour_spaces(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name, format in (("1.png", "PNG"), ("1.tif", "TIFF"), ("1.pgm", "PPM")):
        for channels in (1, 3):
            pixels = one_image(tmp_path / f"{format}{channels}", name, encode(deep, format), channels)
            assert pixels.tolist() == [[[level] * channels for level in (0, 1, 128, 255)]]
    bilevel = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert one_image(tmp_path / "1", "1.png", encode(bilevel), 1).tolist() == [[[0], [255]]]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for channels, colour in ((3, [255, 0, 0]), (1, [76])):
        pixels = one_image(tmp_path / f"cmyk{channels}", "1.jpg", encode(cmyk, "JPEG", quality=100), channels)
        assert np.abs(pixels[4, 4].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])])
def test_image_folder_pixels_without_a_range(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path / "train/a/1.tif", encode(values, "TIFF"))
    assert "1.tif is corrupt (" in reading_error(image_folder(tmp_path), 0)
    assert "no fixed range" in reading_error(image_folder(tmp_path), 0)


def test_image_folder_corrupt_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_images((64, 64, 3))
    jpeg, png = encode(image, "JPEG"), encode(image)
    broken = {
        "0 truncated.jpg": jpeg[: len(jpeg) // 2],
        "1 truncated.png": png[: len(png) // 2],
        "2 checksum.png": png[:100] + bytes(20) + png[120:],
        "3 text.jpg": b"<html>not found</html>",
        "4 empty.png": b"",
        "5 bomb.png": encode(np.zeros((100, 100), np.uint8)),
    }
    for name, content in broken.items():
        write(tmp_path / "train/a" / name, content)
    write(tmp_path / "train/a/6 good.png", png)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    source = image_folder(tmp_path)
    for index, name in enumerate(broken):
        message = reading_error(source, index)
        assert message.startswith(f"{tmp_path / 'train/a' / name} is corrupt (")
        assert message.endswith("delete or repair it, or pass --skip-corrupt to leave such images out and count them")
    assert "decompression bomb" in reading_error(source, 5)
    assert (source[6][0] == image).all()


def test_image_folder_image_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "train/a/1.png", encode(random_images((2, 2))))
    source = image_folder(tmp_path)
    path.unlink()
    assert reading_error(source, 0, InputError) == (
        f"cannot read {path}: No such file or directory; check the disk and permissions"
    )
