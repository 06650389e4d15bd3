"""Resampling matrices against PyTorch's antialiased interpolation of the same box."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.resample import resample, resample_weights

BOXES = [  # top, left, height, width, out height, out width: identity, growing, shrinking, one pixel, mixed
    (0, 0, 17, 23, 17, 23),
    (2, 3, 7, 11, 16, 19),
    (1, 0, 16, 23, 5, 3),
    (4, 4, 1, 1, 8, 8),
    (0, 2, 17, 5, 2, 40),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_equals_antialiased_interpolation_of_the_box(box, channels):
    top, left, height, width, out_height, out_width = box
    images = torch.rand(3, channels, 17, 23, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3)
    rows = resample_weights(top * ones, height * ones, 17, out_height)
    columns = resample_weights(left * ones, width * ones, 23, out_width)
    crop = images[:, :, top : top + height, left : left + width]
    expected = F.interpolate(crop, (out_height, out_width), mode="bilinear", antialias=True)
    torch.testing.assert_close(resample(images, rows, columns), expected, atol=1e-6, rtol=0)


def test_each_image_has_its_own_box():
    images = torch.rand(2, 3, 11, 11)
    start, length = torch.tensor([0, 4]), torch.tensor([11, 5])
    weights = resample_weights(start, length, 11, 7)
    result = resample(images, weights, weights)
    for i, (first, size) in enumerate(zip(start.tolist(), length.tolist())):
        crop = images[i : i + 1, :, first : first + size, first : first + size]
        expected = F.interpolate(crop, (7, 7), mode="bilinear", antialias=True)
        torch.testing.assert_close(result[i : i + 1], expected, atol=1e-6, rtol=0)


def test_rows_sum_to_one_and_stay_in_the_box():
    weights = resample_weights(torch.tensor([3.0]), torch.tensor([4.0]), 13, 29)
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 29))
    assert weights[:, :, :3].abs().max() == 0 and weights[:, :, 7:].abs().max() == 0
