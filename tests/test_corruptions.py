"""Corruptions: the published constants, each operation against another way to compute it, and the official files."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from data_pipeline import corruptions
from data_pipeline.corruptions import CORRUPTIONS, SEVERITIES, constants, corrupt, read_corrupted
from data_pipeline.errors import InputError


def pictures(count: int, size: int, channels: int = 3) -> np.ndarray:
    """Smooth colours with a few hard edges, as photographs have them."""
    rng = np.random.default_rng(size)
    images = ndimage.gaussian_filter(rng.normal(size=(count, size, size, channels)), (0, size / 16, size / 16, 0))
    images += 0.5 * ndimage.gaussian_filter(rng.normal(size=images.shape), (0, 1, 1, 0))
    for image in images:
        top, left, side = rng.integers(0, size // 2, size=3)
        image[top : top + side, left : left + side] += rng.normal(size=channels) * images.std()
    images = (images - images.min((1, 2), keepdims=True)) / np.ptp(images, axis=(1, 2), keepdims=True)
    return (20 + 215 * images).astype(np.uint8)


def corrupted(images, corruption, severity, seed=0):
    return corrupt(images, corruption, severity, indices=np.arange(len(images)), seed=seed)


def generators(corruption, severity, count, seed=0):
    number = CORRUPTIONS.index(corruption)
    return [np.random.default_rng([seed, number, severity, index]) for index in range(count)]


# The published constants, in the form in which they were published: the elastic transform's are multiples of 32, 64 and
# 244 pixels, the zoom blur's are the arguments of an arithmetic range that begins with 1.
PUBLISHED = {
    32: {
        "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
        "shot_noise": [500, 250, 100, 75, 50],
        "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
        "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        "zoom_blur": [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        "snow": [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
        "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
        "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
        "elastic_transform": [
            (0, 0, 32 * 0.08),
            (32 * 0.05, 32 * 0.2, 32 * 0.07),
            (32 * 0.08, 32 * 0.06, 32 * 0.06),
            (32 * 0.1, 32 * 0.04, 32 * 0.05),
            (32 * 0.1, 32 * 0.03, 32 * 0.03),
        ],
        "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
        "jpeg_compression": [80, 65, 58, 50, 40],
    },
    64: {
        "gaussian_noise": [0.04, 0.08, 0.12, 0.15, 0.18],
        "shot_noise": [250, 100, 50, 30, 15],
        "impulse_noise": [0.01, 0.02, 0.05, 0.08, 0.14],
        "defocus_blur": [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        "glass_blur": [(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
        "motion_blur": [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        "zoom_blur": [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        "snow": [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ],
        "frost": [(1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)],
        "fog": [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
        "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
        "elastic_transform": [
            (0, 0, 64 * 0.08),
            (64 * 0.05, 64 * 0.3, 64 * 0.06),
            (64 * 0.1, 64 * 0.08, 64 * 0.06),
            (64 * 0.1, 64 * 0.03, 64 * 0.03),
            (64 * 0.16, 64 * 0.03, 64 * 0.02),
        ],
        "pixelate": [0.9, 0.8, 0.7, 0.6, 0.5],
        "jpeg_compression": [65, 58, 50, 40, 25],
    },
    224: {
        "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],
        "shot_noise": [60, 25, 12, 5, 3],
        "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],
        "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        "zoom_blur": [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
        "snow": [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        "frost": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
        "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
        "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
        "elastic_transform": [
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ],
        "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],
        "jpeg_compression": [25, 18, 15, 10, 7],
    },
}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_constants_are_the_published_ones(size, corruption):
    for severity, published in zip(SEVERITIES, PUBLISHED[size][corruption], strict=True):
        ours = np.array(constants(corruption, severity, size), dtype=float)
        if corruption == "elastic_transform":
            ours = ours * size
        np.testing.assert_allclose(ours, published, rtol=1e-12)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    "corruption", [each for each in CORRUPTIONS if each not in ("glass_blur", "elastic_transform")]
)
def test_a_higher_severity_is_further_from_the_clean_image(corruption, size):
    """In root mean square; for frost, which darkens what it covers, 1 - correlation."""
    images = pictures(3 * 1024 // size, size)
    distances = []
    for severity in SEVERITIES:
        pairs = list(zip(images / 255.0, corrupted(images, corruption, severity) / 255.0))
        if corruption == "frost":
            distances.append(np.mean([1 - np.corrcoef(clean.ravel(), other.ravel())[0, 1] for clean, other in pairs]))
        else:
            distances.append(np.mean([np.sqrt(np.mean((clean - other) ** 2)) for clean, other in pairs]))
    assert distances[0] > 0
    # Motion blur of CIFAR-10-C has the same width in severities 3 and 4.
    least = 0.97 if corruption == "motion_blur" and size == 32 else 1.0
    for lower, higher in pairwise(distances):
        assert higher > least * lower


@pytest.mark.parametrize("size", [32, 64])
def test_elastic_displacements_grow_where_the_affine_part_is_left_out(size):
    images = pictures(24, size) / 255.0
    distances = []
    for severity in SEVERITIES:
        amplitude, sigma, _ = constants("elastic_transform", severity, size)
        moved = corruptions._elastic_transform(
            images, generators("elastic_transform", severity, 24), amplitude, sigma, 0
        )
        distances.append(np.abs(moved - images).mean())
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert all(lower < higher for lower, higher in pairwise(distances))


@pytest.mark.parametrize("size", [32, 64])
def test_glass_moves_pixels_more_with_more_reach_or_passes(size):
    """Without the smoothing, of which there is more in some lower severity."""
    images = pictures(24, size) / 255.0
    distances = {}
    for _, reach, passes in PUBLISHED[size]["glass_blur"]:
        # The same draws, so that equal constants give equal distances.
        moved = corruptions._glass_blur(images, generators("glass_blur", 1, 24), 1e-3, reach, passes)
        distances[reach, passes] = np.abs(moved - images).mean()
    assert len(distances) >= 2
    for one, distance in distances.items():
        for other, further in distances.items():
            if one != other and one[0] <= other[0] and one[1] <= other[1]:
                assert 0 < 1.1 * distance < further


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (45, 3)])
def test_an_image_is_corrupted_by_itself(corruption, size, channels):
    images = pictures(5, size, channels)
    before = images.copy()
    together = corrupt(images, corruption, 3, indices=np.array([7, 1, 4, 2, 900]), seed=5)
    assert together.dtype == np.uint8 and together.shape == images.shape
    assert np.array_equal(images, before)
    alone = corrupt(images[2:3], corruption, 3, indices=np.array([4]), seed=5)
    np.testing.assert_array_equal(together[2:3], alone)
    if corruption not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):
        for indices, severity, seed in (([3], 3, 5), ([4], 4, 5), ([4], 3, 6)):
            other = corrupt(images[2:3], corruption, severity, indices=np.array(indices), seed=seed)
            assert not np.array_equal(alone, other)


def test_larger_images():
    images = pictures(1, 160)
    for corruption in CORRUPTIONS:
        result = corrupted(images, corruption, 1)
        assert result.shape == images.shape and not np.array_equal(result, images)


class TestNoise:
    def test_gaussian(self):
        grey = np.full((20, 32, 32, 3), 128, np.uint8)
        for severity, deviation in zip(SEVERITIES, PUBLISHED[32]["gaussian_noise"]):
            noise = corrupted(grey, "gaussian_noise", severity) / 255.0 - 128 / 255.0
            assert noise.std() == pytest.approx(deviation, rel=0.02) and abs(noise.mean()) < 0.004

    def test_shot_noise_has_the_variance_of_photons(self):
        for level in (60, 128):
            grey = np.full((20, 32, 32, 3), level, np.uint8)
            noise = corrupted(grey, "shot_noise", 3) / 255.0
            assert noise.mean() == pytest.approx(level / 255, abs=0.004)
            assert noise.var() == pytest.approx(level / 255 / 100, rel=0.05)

    def test_impulses_are_black_and_white_in_equal_parts(self):
        grey = np.full((20, 32, 32, 3), 77, np.uint8)
        for severity, share in zip(SEVERITIES, PUBLISHED[32]["impulse_noise"]):
            result = corrupted(grey, "impulse_noise", severity)
            assert set(np.unique(result)) == {0, 77, 255}
            assert np.mean(result == 0) == pytest.approx(share / 2, rel=0.15)
            assert np.mean(result == 255) == pytest.approx(share / 2, rel=0.15)


class TestBlur:
    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_defocus_is_a_convolution_with_a_soft_disk(self, severity):
        images = pictures(2, 32)
        radius, sigma = PUBLISHED[32]["defocus_blur"][severity - 1]
        disk = np.array([[float(math.hypot(x, y) <= radius) for x in range(-8, 9)] for y in range(-8, 9)])
        gauss = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
        soft = ndimage.convolve(disk / disk.sum(), np.outer(gauss, gauss) / gauss.sum() ** 2, mode="mirror")
        expected = ndimage.convolve(images / 255.0, soft[None, :, :, None], mode="mirror")
        np.testing.assert_allclose(corrupted(images, "defocus_blur", severity), expected * 255, atol=1.01)

    @pytest.mark.parametrize(("size", "severity"), [(32, 2), (32, 5), (64, 4)])
    def test_glass_pixel_by_pixel(self, size, severity):
        images = pictures(3, size)
        sigma, reach, passes = PUBLISHED[size]["glass_blur"][severity - 1]
        result = corrupted(images, "glass_blur", severity)
        for image, draw, out in zip(images, generators("glass_blur", severity, 3), result):
            blurred = ndimage.gaussian_filter(image / 255.0, (sigma, sigma, 0), mode="nearest")
            x = np.uint8(blurred * 255 + 1e-6)
            side = len(range(size - reach, reach, -1))
            steps = draw.integers(-reach, reach, size=(passes, side, side, 2)).tolist()
            for number in range(passes):
                for i, h in enumerate(range(size - reach, reach, -1)):
                    for j, w in enumerate(range(size - reach, reach, -1)):
                        dx, dy = steps[number][i][j]
                        # The published line, whose views make it a copy.
                        x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
            expected = ndimage.gaussian_filter(x / 255.0, (sigma, sigma, 0), mode="nearest")
            np.testing.assert_allclose(out, expected * 255, atol=1.001)

    @pytest.mark.parametrize(("radius", "sigma", "angle"), [(6, 1, 0), (8, 2, 45), (9, 2.5, -30), (14, 12, -120)])
    def test_motion_is_a_walk_of_half_a_gaussian(self, radius, sigma, angle):
        image = pictures(1, 32)[0, :, :, 0].astype(float)
        weights = [math.exp(-(i * i) / (2 * sigma**2)) for i in range(2 * radius + 1)]
        expected = np.zeros_like(image)
        for row in range(32):
            for column in range(32):
                for i, weight in enumerate(weights):
                    y = row + math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                    x = column + math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                    expected[row, column] += weight * image[min(max(y, 0), 31), min(max(x, 0), 31)]
        kernel = corruptions._streak(radius, sigma, angle)
        result = corruptions._filter(image[None, :, :, None], [kernel], corruptions.cv2.BORDER_REPLICATE)
        np.testing.assert_allclose(result[0, :, :, 0], expected / sum(weights), atol=1e-9)

    @pytest.mark.parametrize("factor", [1.0, 1.01, 1.06, 1.17, 1.25, 1.75, 2.25, 4.5])
    @pytest.mark.parametrize("size", [32, 45, 64])
    def test_enlarging_is_scipys_zoom_of_the_middle(self, size, factor):
        images = pictures(2, size) / 255.0
        taken = math.ceil(size / factor)
        top = (size - taken) // 2
        for image, result in zip(images, corruptions._enlarge(images, factor)):
            grown = ndimage.zoom(image[top : top + taken, top : top + taken], (factor, factor, 1), order=1)
            trim = (grown.shape[0] - size) // 2
            np.testing.assert_allclose(result, grown[trim : trim + size, trim : trim + size], atol=1e-6)

    def test_zoom_is_the_mean_over_the_published_factors(self):
        images = pictures(2, 32)
        for severity, (stop, step) in zip(SEVERITIES, PUBLISHED[32]["zoom_blur"]):
            factors = np.arange(1, stop, step)
            total = images / 255.0 + sum(corruptions._enlarge(images / 255.0, factor) for factor in factors)
            expected = total / (len(factors) + 1) * 255
            np.testing.assert_allclose(corrupted(images, "zoom_blur", severity), expected, atol=1.001)


class TestWeather:
    @pytest.mark.parametrize(("size", "decay"), [(8, 3), (16, 1.75)])
    def test_plasma_point_by_point(self, size, decay):
        heights = np.zeros((size, size))
        draw, step, wobble = np.random.default_rng(3), size, 100.0
        while step >= 2:
            half, cells = step // 2, size // step
            for offset_y, offset_x, neighbours in (
                (half, half, [(-half, -half), (-half, half), (half, -half), (half, half)]),
                (0, half, [(-half, 0), (half, 0), (0, -half), (0, half)]),
                (half, 0, [(-half, 0), (half, 0), (0, -half), (0, half)]),
            ):
                noise = draw.uniform(-wobble, wobble, size=(cells, cells))
                for i in range(cells):
                    for j in range(cells):
                        y, x = i * step + offset_y, j * step + offset_x
                        around = [heights[(y + dy) % size, (x + dx) % size] for dy, dx in neighbours]
                        heights[y, x] = sum(around) / 4 + wobble * noise[i, j]
            step, wobble = half, wobble / decay
        expected = (heights - heights.min()) / (heights.max() - heights.min())
        result = corruptions._plasma([np.random.default_rng(3)], size, decay)
        np.testing.assert_allclose(result[0], expected, atol=1e-9)

    def test_fog_keeps_the_brightest_level_and_lifts_the_darkest(self):
        images = pictures(8, 32)
        for severity in SEVERITIES:
            result = corrupted(images, "fog", severity).astype(float)
            assert (result.max(axis=(1, 2, 3)) <= images.max(axis=(1, 2, 3)) + 1).all()
            assert result.std() < images.std()

    def test_snow_only_brightens(self):
        images = pictures(8, 32)
        for severity in SEVERITIES:
            assert (corrupted(images, "snow", severity).astype(int) >= images.astype(int) - 1).all()

    def test_frost_is_blended_with_the_published_weights(self):
        images = pictures(4, 32)
        for severity, (keep, strength) in zip(SEVERITIES, PUBLISHED[32]["frost"]):
            texture = corruptions._frost_texture(generators("frost", severity, 4), 32, 3)
            assert texture.min() >= 0 and texture.max() <= 1 and texture.std() > 0.05
            expected = np.clip(keep * images / 255.0 + strength * texture, 0, 1) * 255
            np.testing.assert_allclose(corrupted(images, "frost", severity), expected, atol=1.001)

    def test_brightness_is_the_value_of_hsv(self):
        images = pictures(4, 32)
        images[0, :4] = 0  # black has no hue
        for severity, more in zip(SEVERITIES, PUBLISHED[32]["brightness"]):
            hsv = rgb_to_hsv(images / 255.0)
            hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)
            np.testing.assert_allclose(corrupted(images, "brightness", severity), hsv_to_rgb(hsv) * 255, atol=1.001)


class TestDigital:
    def test_contrast(self):
        images = pictures(3, 32)
        for severity, share in zip(SEVERITIES, PUBLISHED[32]["contrast"]):
            for image, result in zip(images, corrupted(images, "contrast", severity)):
                for channel in range(3):
                    mean = image[..., channel].mean()
                    expected = (image[..., channel] - mean) * share + mean
                    np.testing.assert_allclose(result[..., channel], expected, atol=1.001)

    @pytest.mark.parametrize("size", [32, 64])
    def test_pixelate_and_jpeg_are_pillows(self, size):
        images = pictures(2, size)
        for severity in SEVERITIES:
            small = int(size * PUBLISHED[size]["pixelate"][severity - 1])
            for image, pixelated, compressed in zip(
                images, corrupted(images, "pixelate", severity), corrupted(images, "jpeg_compression", severity)
            ):
                picture = Image.fromarray(image)
                expected = picture.resize((small, small), Image.Resampling.BOX).resize(
                    (size, size), Image.Resampling.BOX
                )
                np.testing.assert_array_equal(pixelated, np.asarray(expected))
                file = io.BytesIO()
                picture.save(file, "JPEG", quality=PUBLISHED[size]["jpeg_compression"][severity - 1])
                np.testing.assert_array_equal(compressed, np.asarray(Image.open(file)))

    @pytest.mark.parametrize(("size", "severity"), [(32, 1), (32, 3), (32, 5), (64, 4)])
    def test_elastic_pixel_by_pixel(self, size, severity):
        images = pictures(2, size)
        amplitude, sigma, shift = PUBLISHED[size]["elastic_transform"][severity - 1]
        result = corrupted(images, "elastic_transform", severity)
        for image, draw, out in zip(images, generators("elastic_transform", severity, 2), result):
            half, third = size // 2, size // 3
            corners = np.float32(
                [(half + third, half + third), (half + third, half - third), (half - third, half - third)]
            )
            moved = corners + draw.uniform(-shift, shift, size=(3, 2)).astype(np.float32)
            matrix = corruptions.cv2.getAffineTransform(corners, moved)
            x = corruptions.cv2.warpAffine(
                np.float32(image / 255.0), matrix, (size, size), borderMode=corruptions.cv2.BORDER_REFLECT_101
            )
            dx, dy = (
                ndimage.gaussian_filter(draw.uniform(-1, 1, size=(size, size)), sigma, mode="reflect", truncate=3)
                * amplitude
                for _ in range(2)
            )

            def inside(place):
                return -1 - place if place < 0 else 2 * size - 1 - place if place >= size else place

            for row in range(0, size, 5):
                for column in range(0, size, 3):
                    y, x_ = row + dy[row, column], column + dx[row, column]
                    top, left = math.floor(y), math.floor(x_)
                    expected = sum(
                        (1 - abs(y - i)) * (1 - abs(x_ - j)) * x[inside(i), inside(j)]
                        for i in (top, top + 1)
                        for j in (left, left + 1)
                    )
                    np.testing.assert_allclose(out[row, column], expected * 255, atol=1.01)

    def test_elastic_shifts_no_further_than_published(self):
        """A single bright point stays within the affine part's reach and the displacement of a smooth field."""
        images = np.zeros((12, 32, 32, 3), np.uint8)
        images[:, 14:18, 14:18] = 255
        for image in corrupted(images, "elastic_transform", 1):
            centre = np.array(ndimage.center_of_mass(image[..., 0]))
            assert np.abs(centre - 15.5).max() <= 32 * 0.08 + 1 and image.max() > 100


class TestOfficialFiles:
    def test_cifar_10_c(self, tmp_path):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (5 * 8, 32, 32, 3)).astype(np.uint8)
        labels = np.array([3, 0, 1, 3, 2, 0, 9, 1], np.uint8)
        np.save(tmp_path / "fog.npy", images)
        np.save(tmp_path / "labels.npy", np.tile(labels, 5))
        found, places = read_corrupted(tmp_path, "fog", 4, (1, 3), ("automobile", "cat"))
        np.testing.assert_array_equal(found, images[24:32][[0, 2, 3, 7]])
        assert places.tolist() == [1, 0, 1, 0]
        np.save(tmp_path / "labels.npy", labels)
        assert read_corrupted(tmp_path, "fog", 4, (1, 3), ())[1].tolist() == [1, 0, 1, 0]
        with pytest.raises(InputError, match="class 5 is not in"):
            read_corrupted(tmp_path, "fog", 1, (1, 5), ())
        np.save(tmp_path / "labels.npy", labels[:3])
        with pytest.raises(InputError, match="no CIFAR-10-C"):
            read_corrupted(tmp_path, "fog", 1, (1, 3), ())
        (tmp_path / "fog.npy").write_bytes(b"nothing")
        with pytest.raises(InputError, match="not a readable CIFAR-10-C"):
            read_corrupted(tmp_path, "fog", 1, (1, 3), ())

    def test_tiny_imagenet_c(self, tmp_path):
        pictures_of = {"n01": pictures(2, 64), "n02": pictures(1, 64)[:, ::-1]}
        for name, images in pictures_of.items():
            folder = tmp_path / "snow" / "2" / name
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / f"test_{number}.png")
        found, places = read_corrupted(tmp_path, "snow", 2, ("n02", "n01"), ("n02", "n01"))
        assert places.tolist() == [0, 1, 1]
        np.testing.assert_array_equal(found, np.concatenate([pictures_of["n02"], pictures_of["n01"]]))
        with pytest.raises(InputError, match="no images of class 'n03'"):
            read_corrupted(tmp_path, "snow", 2, ("n03",), ("n03",))
        (tmp_path / "snow" / "2" / "n01" / "test_0.png").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"test_0\.png is corrupt"):
            read_corrupted(tmp_path, "snow", 2, ("n01",), ("n01",))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"neither fog\.npy"):
            read_corrupted(tmp_path, "fog", 1, (0,), ("a",))


def test_bad_input():
    images = pictures(1, 32)
    with pytest.raises(InputError, match="unknown corruption 'rain'; known: gaussian_noise"):
        corrupted(images, "rain", 1)
    with pytest.raises(InputError, match="severity is 6"):
        corrupted(images, "fog", 6)
    with pytest.raises(InputError, match="32 × 20 pixels"):
        corrupted(images[:, :, :20], "fog", 1)
    with pytest.raises(ValueError, match="uint8"):
        corrupted(images.astype(np.float32), "fog", 1)
    with pytest.raises(ValueError, match="1 or 3"):
        corrupted(images[..., :2], "fog", 1)
    assert corrupted(images[:0], "fog", 1).shape == (0, 32, 32, 3)
