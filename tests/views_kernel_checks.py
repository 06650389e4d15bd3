"""The Triton body of `render_views` against torchvision, one image at a time, and against the loop of GradMix.

Run by tests/test_views_kernels.py, in Triton's interpreter or on a GPU: see tests/triton_support.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

from data_pipeline import views_kernels as kernels
from data_pipeline.views import ORDERS, ViewConfig, ViewParameters, draw_parameters, render_view
from tests.loops import naive_gradmix
from tests.test_views import MEAN, STD, random_images, torchvision_view
from tests.triton_support import DEVICE
from trainer.gradmix import gradmix_views

# Absolute; and relative, by one unit in the last place, since two right results may be rounded to neighbours. The first
# is for torchvision, whose hue differs from ours by rounding, which little colour makes large.
VIEW_TOLERANCE = {
    torch.float32: (2e-4, 0.0),
    torch.bfloat16: (1e-3, torch.finfo(torch.bfloat16).eps),
    torch.float16: (1e-3, torch.finfo(torch.float16).eps),
}
PATCH_TOLERANCE = {**VIEW_TOLERANCE, torch.float32: (1e-5, 0.0)}


def assert_near(actual, expected, tolerance):
    absolute, relative = tolerance[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=absolute, rtol=relative)


def draw(config: ViewConfig, images, seed: int = 0) -> list[ViewParameters]:
    """The parameters of both views."""
    index = torch.arange(len(images))
    return [draw_parameters(config, tuple(images.shape[1:3]), index, seed=seed, epoch=1, view=view) for view in (0, 1)]


def rendered(images, first, second, size, dtype=torch.float32, patches=(None, None, None)):
    """The kernel's views in blocks, of arguments on the CPU."""
    channels = images.shape[3]
    arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), (images, first, second, patches))
    images, first, second, patches = arguments
    views = kernels.render_views(images, first, second, size, MEAN[:channels], STD[:channels], dtype, *patches)
    assert views.dtype == dtype and views.is_contiguous(memory_format=torch.channels_last)
    return views.cpu().split(len(images))


def expected_view(images, parameters, size, dtype=torch.float32):
    channels = images.shape[3]
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    views = [(torchvision_view(image, parameters, i, size) - mean) / std for i, image in enumerate(images)]
    return torch.stack(views).to(dtype)


def check(images, first, second, size, dtype, patches):
    """All three blocks; the mixed view is what GradMix makes of the first as it came out."""
    views = rendered(images, first, second, size, dtype, patches)
    for view, parameters in zip(views, (first, second)):
        assert_near(view, expected_view(images, parameters, size, dtype), VIEW_TOLERANCE)
    partner, centers, gamma = patches
    gamma = gamma if isinstance(gamma, torch.Tensor) else [gamma] * len(images)
    assert_near(views[2], naive_gradmix(views[0], partner, centers, gamma), PATCH_TOLERANCE)


def patches(n, num_patches, gamma):
    centers = torch.rand(n, num_patches, 2, generator=torch.Generator().manual_seed(num_patches))
    return torch.arange(n).roll(1), centers, gamma


# Prime and odd sides, taller and wider than long, smaller and larger than the view: nothing hides in round numbers.
@pytest.mark.parametrize(
    ("source", "size", "channels", "rotation", "num_patches", "dtype"),
    [
        ((17, 13), 11, 3, 0.0, 1, torch.float32),
        ((7, 11), 16, 1, 0.0, 2, torch.float32),
        ((31, 23), 19, 3, 40.0, 3, torch.float32),
        ((17, 13), 11, 1, 0.0, 1, torch.bfloat16),
        ((7, 11), 16, 3, 40.0, 2, torch.bfloat16),
        ((17, 13), 11, 3, 0.0, 3, torch.float16),
        ((7, 11), 16, 1, 40.0, 2, torch.float16),
    ],
)
def test_views_equal_torchvision_and_the_loop(source, size, channels, rotation, num_patches, dtype):
    images = random_images(3, *source, channels)
    first, second = draw(ViewConfig(rotation=rotation), images)
    for gamma in (0.45, torch.tensor([0.1, 0.3, 0.9])):
        check(images, first, second, size, dtype, patches(3, num_patches, gamma))


def test_without_patches_there_are_two_blocks_and_they_are_the_same():
    images = random_images(3, 9, 12)
    first, second = draw(ViewConfig(rotation=5), images)
    both = rendered(images, first, second, 13)
    three = rendered(images, first, second, 13, patches=patches(3, 1, 0.3))
    assert len(both) == 2 and torch.equal(both[0], three[0]) and torch.equal(both[1], three[1])


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float32), (1, torch.bfloat16)])
def test_a_view_of_several_tiles_is_the_same(channels, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_WHOLE", 16)
    monkeypatch.setattr(kernels, "TILE", 16)
    images = random_images(2, 29, 41, channels)
    first, second = draw(ViewConfig(jitter=1.0), images)
    check(images, first, second, 37, dtype, patches(2, 2, torch.tensor([0.15, 0.95])))


@pytest.mark.parametrize("size", [5, 23])
def test_crops_of_one_pixel_and_at_every_border(size):
    boxes = [
        (0, 0, 1, 1),
        (8, 6, 1, 1),
        (4, 3, 1, 1),
        (0, 0, 9, 7),
        (0, 0, 3, 7),
        (6, 0, 3, 7),
        (0, 0, 9, 2),
        (0, 5, 9, 2),
    ]
    images = random_images(8, 9, 7)
    first, second = (
        parameters._replace(
            box=torch.tensor(boxes), geometry=parameters.geometry._replace(flip=torch.arange(8) % 2 == 0)
        )
        for parameters in draw(ViewConfig(), images)
    )
    check(images, first, second, size, torch.float32, patches(8, 1, 0.5))


def test_every_order_of_the_jitter():
    images = random_images(1, 8, 8).expand(len(ORDERS), -1, -1, -1)
    first, second = draw(ViewConfig(jitter=1.0, grayscale=0.0), images)
    first = first._replace(order=torch.arange(len(ORDERS)))
    view, _ = rendered(images, first, second, 8)
    assert_near(view, expected_view(images, first, 8), VIEW_TOLERANCE)


@pytest.mark.parametrize("gamma", [1e-6, 0.999, 1.0])
def test_patches_at_corners_and_sizes_at_their_bounds(gamma):
    images = random_images(5, 9, 11)
    first, second = draw(ViewConfig(), images)
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]]).unsqueeze(1)
    check(images, first, second, 11, torch.float32, (torch.arange(5).roll(2), corners, gamma))


def test_no_augmentation_gives_the_image_back():
    images = random_images(3, 17, 17)
    config = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, grayscale=0)
    first, _ = draw(config, images)
    view, _ = rendered(images, first, first, 17)
    plain = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    torch.testing.assert_close(view, plain, atol=1e-6, rtol=1e-6)


def test_a_view_does_not_depend_on_its_batch():
    images = random_images(6, 12, 10)
    first, second = draw(ViewConfig(), images)
    partner, centers, gamma = patches(6, 2, torch.linspace(0.1, 0.9, 6))
    views = rendered(images, first, second, 9, patches=(partner, centers, gamma))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    arguments = (images, first, second, centers, gamma)
    images, first, second, centers, gamma = tree_map_only(torch.Tensor, lambda tensor: tensor[order], arguments)
    permuted = rendered(images, first, second, 9, patches=(order.argsort()[partner[order]], centers, gamma))
    assert all(torch.equal(mixed, view[order]) for mixed, view in zip(permuted, views))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_both_bodies_agree(seed, gamma):
    images = random_images(2, 11, 14)
    first, second = draw(ViewConfig(rotation=10), images, seed)
    partner = torch.tensor([1, 0])
    centers = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(seed))
    views = rendered(images, first, second, 10, patches=(partner, centers, gamma))
    for view, parameters in zip(views, (first, second)):
        pytorch = render_view(images, parameters, size=10, mean=MEAN, std=STD)
        torch.testing.assert_close(view, pytorch, atol=1e-4, rtol=0)
    torch.testing.assert_close(views[2], gradmix_views(views[0], partner, centers, gamma), atol=1e-5, rtol=0)
