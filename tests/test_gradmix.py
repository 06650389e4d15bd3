"""The GradMix operations against loops written from the paper, one image and one pixel at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loops import naive_gradmix, naive_map
from trainer.gradmix import activation_map, find_peaks, gradmix_views, layercam_peaks

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


# Odd, prime and non-square sizes, one channel and many, so that no stride or block hides behind a round number.
@pytest.mark.parametrize(("n", "channels", "height", "width"), [(5, 3, 32, 32), (3, 1, 17, 31), (2, 7, 13, 5)])
@pytest.mark.parametrize("num_patches", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gamma", [None, 0.02, 0.31, 0.5, 1.0])
def test_views_equal_the_loop(n, channels, height, width, num_patches, dtype, memory_format, gamma):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, channels, height, width, generator=generator).to(dtype, memory_format=memory_format)
    centers = torch.rand(n, num_patches, 2, generator=generator)
    gamma_of_each = 0.1 + 0.5 * torch.rand(n, generator=generator) if gamma is None else torch.full((n,), gamma)
    partner = torch.arange(n).roll(1)
    mixed = gradmix_views(images, partner, centers, gamma_of_each if gamma is None else gamma)
    assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(
        mixed, naive_gradmix(images, partner, centers, gamma_of_each), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gamma", [0.4, torch.full((4,), 0.4)], ids=["number", "tensor"])
@pytest.mark.parametrize("part", ["channels", "rows", "images"])
def test_views_of_a_part_of_a_larger_channels_last_tensor_equal_the_loop(dtype, gamma, part):
    slices = {
        "channels": (slice(None), slice(1, 4)),
        "rows": (..., slice(1, None, 2), slice(None)),
        "images": slice(0, 8, 2),
    }
    shapes = {"channels": (4, 5, 12, 9), "rows": (4, 3, 24, 9), "images": (8, 3, 12, 9)}
    images = torch.randn(shapes[part]).to(dtype, memory_format=torch.channels_last)[slices[part]]
    centers, partner = torch.rand(4, 2, 2), torch.tensor([1, 2, 3, 0])
    expected = naive_gradmix(images, partner, centers, [0.4] * 4)
    mixed = gradmix_views(images, partner, centers, gamma)
    torch.testing.assert_close(mixed, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_number_and_a_tensor_of_it_are_the_same():
    images, centers = torch.randn(4, 3, 16, 16), torch.rand(4, 1, 2)
    partner = torch.tensor([1, 2, 3, 0])
    torch.testing.assert_close(
        gradmix_views(images, partner, centers, 0.3), gradmix_views(images, partner, centers, torch.full((4,), 0.3))
    )


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("gamma", [0.01, 0.1, 0.5, 0.99, 1.0])
def test_patches_stay_inside_and_have_the_area_that_gamma_says(corner, gamma):
    images = torch.stack([torch.zeros(1, 20, 30), torch.ones(1, 20, 30)])
    mixed = gradmix_views(images, torch.tensor([1, 0]), torch.tensor([[corner], [corner]]), gamma)
    height, width = max(1, math.floor(gamma * 20 + 0.5)), max(1, math.floor(gamma * 30 + 0.5))
    assert mixed[0].sum().item() == pytest.approx(height * width, rel=1e-5)
    rows, columns = mixed[0, 0].any(dim=1).nonzero(), mixed[0, 0].any(dim=0).nonzero()
    assert rows.max() - rows.min() + 1 == height and columns.max() - columns.min() + 1 == width


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_outside_of_the_patch_nothing_changes_and_the_batch_order_does_not_matter(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    images, centers = torch.randn(6, 3, 11, 13, generator=generator), torch.rand(6, 1, 2, generator=generator)
    partner = torch.arange(6).roll(2)
    mixed = gradmix_views(images, partner, centers, gamma)
    changed = (mixed != images).any(dim=1).sum(dim=(1, 2))
    assert (changed <= math.floor(gamma * 11 + 0.5) * math.floor(gamma * 13 + 0.5)).all()
    order = torch.randperm(6, generator=generator)
    place = order.argsort()
    permuted = gradmix_views(images[order], place[partner[order]], centers[order], gamma)
    torch.testing.assert_close(permuted, mixed[order])


@pytest.mark.parametrize("kind", ["layercam", "gradcam"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("n", "channels", "height", "width"), [(2, 5, 4, 4), (3, 7, 3, 5), (1, 1, 1, 1)])
def test_maps_are_the_papers_equations(kind, sign, n, channels, height, width):
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(n, channels, height, width, generator=generator)
    gradients = torch.randn(n, channels, height, width, generator=generator)
    torch.testing.assert_close(
        activation_map(maps, gradients, kind, sign), naive_map(maps, gradients, kind, sign), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_peak_is_the_middle_of_the_strongest_cell(dtype):
    maps, gradients = torch.ones(2, 3, 4, 5, dtype=dtype), torch.zeros(2, 3, 4, 5, dtype=dtype)
    gradients[0, 1, 2, 4] = 0.5
    gradients[1, :, 0, 0] = 0.25
    centers, scores = layercam_peaks(maps, gradients)
    assert centers.tolist() == [[[pytest.approx(2.5 / 4), pytest.approx(4.5 / 5)]], [[0.125, pytest.approx(0.1)]]]
    assert scores.tolist() == [[0.5], [0.75]]


def test_further_peaks_do_not_overlap_and_fall_back_on_the_first():
    activation = torch.rand(50, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.01
    centers, scores = find_peaks(activation, num_peaks=4, suppress=0.5)
    for i in range(50):
        places = centers[i].tolist()
        for a in range(4):
            for b in range(a):
                apart = max(abs(places[a][0] - places[b][0]), abs(places[a][1] - places[b][1]))
                assert apart >= 0.5 - 1e-6 or places[a] == places[0]
    assert (scores[:, :-1] >= scores[:, 1:]).float().mean() > 0.9
    # Two cells, 16 wanted: after one peak the rest is suppressed.
    lone, _ = find_peaks(torch.ones(1, 1, 2), num_peaks=16, suppress=0.9)
    assert (lone == lone[:, :1]).all()


def test_of_equal_cells_the_first_wins():
    assert find_peaks(torch.ones(1, 3, 3))[0].tolist() == [[[pytest.approx(1 / 6), pytest.approx(1 / 6)]]]


def test_a_map_that_says_nothing_has_no_place():
    activation = torch.ones(4, 3, 3)
    activation[0] = 0.0
    activation[1, 1, 1] = torch.nan
    activation[2, 0, 0] = torch.inf
    centers, scores = find_peaks(activation)
    assert centers[:3].isnan().all() and not centers[3].isnan().any()
    assert scores[0].item() == 0 and scores[1:3].isnan().all() and scores[3].item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partner": torch.tensor([1, 2])}, "partner has an index out of range; set it within 0 to 1"),
        ({"partner": torch.tensor([-1, 0])}, "partner has an index out of range; set it within 0 to 1"),
        ({"centers": torch.tensor([[[0.5, 0.5]], [[0.5, torch.nan]]])}, "centers has a place that is not finite"),
        ({"centers": torch.tensor([[[torch.inf, 0.5]], [[0.5, 0.5]]])}, "centers has a place that is not finite"),
        ({"centers": torch.tensor([[[-torch.inf, 0.5]], [[0.5, 0.5]]])}, "centers has a place that is not finite"),
        ({"gamma": torch.tensor([0.5, 1.1])}, "gamma has a value out of range"),
        ({"gamma": torch.tensor([0.0, 0.5])}, "gamma has a value out of range"),
        ({"gamma": torch.tensor([0.5, torch.nan])}, "gamma has a value out of range"),
    ],
)
def test_values_that_are_out_of_range_are_refused(change, message):
    images, partner, centers = torch.randn(2, 3, 8, 8), torch.tensor([1, 0]), torch.full((2, 1, 2), 0.5)
    arguments = {"images": images, "partner": partner, "centers": centers, "gamma": torch.full((2,), 0.5)}
    assert gradmix_views(**arguments).isfinite().all()
    with pytest.raises(ValueError, match=message):
        gradmix_views(**(arguments | change))
