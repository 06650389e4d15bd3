"""Views against torchvision's transforms, one image at a time, and geometry against pixels that can be found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from data_pipeline.views import (
    ORDERS,
    Geometry,
    ViewConfig,
    draw_parameters,
    render_plain,
    render_view,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def random_images(n: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, height, width, channels), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def torchvision_view(image: torch.Tensor, parameters, i: int, size: int) -> torch.Tensor:
    """The same view through torchvision, from one uint8 (H, W, C) image."""
    x = image.permute(2, 0, 1).float() / 255
    if parameters.geometry.angle is not None:
        x = V.rotate(x, math.degrees(parameters.geometry.angle[i]), V.InterpolationMode.BILINEAR)
    top, left, height, width = parameters.box[i].tolist()
    x = V.resized_crop(x, top, left, height, width, [size, size], antialias=True)
    if parameters.geometry.flip[i]:
        x = V.horizontal_flip(x)
    brightness, contrast, saturation, hue = parameters.factors[i].tolist()
    changes = [
        lambda v: V.adjust_brightness(v, brightness),
        lambda v: V.adjust_contrast(v, contrast),
        lambda v: V.adjust_saturation(v, saturation) if len(v) == 3 else v,
        lambda v: V.adjust_hue(v, hue) if len(v) == 3 else v,
    ]
    for change in ORDERS[parameters.order[i]]:
        x = changes[change](x)
    if parameters.gray[i] and len(x) == 3:
        x = V.rgb_to_grayscale(x, num_output_channels=3)
    return x


@pytest.mark.parametrize(("height", "width", "size", "channels"), [(32, 32, 32, 3), (37, 23, 19, 3), (9, 31, 13, 1)])
@pytest.mark.parametrize("rotation", [0.0, 40.0])
def test_views_equal_torchvisions_transforms(height, width, size, channels, rotation):
    images = random_images(48, height, width, channels)
    config = ViewConfig(rotation=rotation)
    parameters = draw_parameters(config, (height, width), torch.arange(48), seed=7, epoch=3, view=1)
    mean, std = (0.4,) * channels, (0.2,) * channels
    views = render_view(images, parameters, size=size, mean=mean, std=std)
    assert views.is_contiguous(memory_format=torch.channels_last)
    for i in range(48):
        expected = (torchvision_view(images[i], parameters, i, size) - 0.4) / 0.2
        torch.testing.assert_close(views[i], expected, atol=2e-4, rtol=0, msg=lambda m, i=i: f"image {i}: {m}")


def test_every_order_of_the_jitter_occurs_and_agrees():
    images = random_images(1, 16, 16).expand(24, -1, -1, -1)
    drawn = draw_parameters(ViewConfig(jitter=1.0), (16, 16), torch.arange(24), seed=0, epoch=0, view=0)
    parameters = drawn._replace(order=torch.arange(24))
    views = render_view(images, parameters, size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    for i in range(24):
        torch.testing.assert_close(views[i], torchvision_view(images[i], parameters, i, 16), atol=1e-4, rtol=0)


def test_no_augmentation_gives_the_image_back_exactly():
    images = random_images(5, 17, 17)
    config = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, grayscale=0)
    parameters = draw_parameters(config, (17, 17), torch.arange(5), seed=0, epoch=0, view=0)
    view = render_view(images, parameters, size=17, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(view, images.permute(0, 3, 1, 2) / 255, atol=0, rtol=1e-6)
    torch.testing.assert_close(view, render_plain(images, size=17, mean=(0.0,) * 3, std=(1.0,) * 3), atol=0, rtol=1e-6)


def test_a_view_depends_on_its_own_key_only():
    images = random_images(8, 20, 20)

    def render(chosen: list[int], seed: int = 1, epoch: int = 2, view: int = 0) -> torch.Tensor:
        index = torch.tensor(chosen)
        parameters = draw_parameters(ViewConfig(), (20, 20), index, seed=seed, epoch=epoch, view=view)
        return render_view(images[index], parameters, size=20, mean=MEAN, std=STD)

    whole = render(list(range(8)))
    torch.testing.assert_close(whole[[6, 1]], render([6, 1]), atol=1e-6, rtol=0)
    for other in (render(list(range(8)), seed=2), render(list(range(8)), epoch=3), render(list(range(8)), view=1)):
        assert all((whole[i] - other[i]).abs().max() > 1e-3 for i in range(8))


def test_crops_have_the_distribution_of_random_resized_crop():
    n = 20_000
    parameters = draw_parameters(ViewConfig(), (32, 32), torch.arange(n), seed=5, epoch=0, view=0)
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, 32, 32)
    reference = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    ours = parameters.box.numpy()
    for column in range(4):
        for quantile in (0.1, 0.5, 0.9):
            assert abs(np.quantile(ours[:, column], quantile) - np.quantile(reference[:, column], quantile)) <= 1
        assert abs(ours[:, column].mean() - reference[:, column].mean()) < 0.25
    assert (ours[:, 0] + ours[:, 2]).max() == 32 and ours.min() == 0


def test_probabilities_and_ranges_are_as_configured():
    n = 20_000
    p = draw_parameters(ViewConfig(rotation=5), (32, 32), torch.arange(n), seed=1, epoch=1, view=0)
    jittered = (p.factors != torch.tensor([1.0, 1, 1, 0])).any(1)
    assert abs(p.geometry.flip.float().mean() - 0.5) < 0.02
    assert abs(jittered.float().mean() - 0.8) < 0.02
    assert abs(p.gray.float().mean() - 0.2) < 0.02
    assert p.factors[:, :3].min() >= 0.6 and p.factors[:, :3].max() <= 1.4
    assert p.factors[:, 3].abs().max() <= 0.1
    assert 4.5 < math.degrees(p.geometry.angle.abs().max()) <= 5
    assert torch.bincount(p.order, minlength=24).min() > n / 24 * 0.8


@pytest.mark.parametrize("config", [ViewConfig(), ViewConfig(rotation=40), ViewConfig(rotation=25, flip=1.0)])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_geometry_says_where_a_source_pixel_went(config, height, width):
    """A bright blob in the source is found in the view where `to_view` says, and brought back by `to_source`."""
    n, size = 200, 64
    generator = torch.Generator().manual_seed(3)
    place = 0.2 + 0.6 * torch.rand((n, 1, 2), generator=generator)
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    distance = ((y.view(1, -1, 1) - place[:, :, :1]) * height) ** 2 + (
        (x.view(1, 1, -1) - place[:, :, 1:]) * width
    ) ** 2
    images = (255 * torch.exp(-distance / 4)).to(torch.uint8).unsqueeze(3)
    p = draw_parameters(config, (height, width), torch.arange(n), seed=2, epoch=0, view=0)
    view = render_view(
        images, p._replace(factors=torch.tensor([[1.0, 1, 1, 0]] * n)), size=size, mean=(0.0,), std=(1.0,)
    )
    predicted = p.geometry.to_view(place)
    inside = ((predicted > 0.08) & (predicted < 0.92)).all(dim=2).squeeze(1)
    assert inside.sum() > 60
    flat = view[:, 0].flatten(1).argmax(1)
    found = torch.stack((flat // size, flat % size), 1) + 0.5
    error = (found / size - predicted.squeeze(1))[inside].abs() * size
    assert error.max() < 3.0
    torch.testing.assert_close(p.geometry.to_source(predicted)[inside], place[inside], atol=1e-5, rtol=0)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000))
def test_points_survive_the_round_trip_or_stay_on_the_crops_edge(y, x, index):
    p = draw_parameters(ViewConfig(rotation=10), (32, 48), torch.tensor([index]), seed=0, epoch=0, view=0)
    point = torch.tensor([[[y, x]]])
    seen = p.geometry.to_view(point)
    assert ((seen >= 0) & (seen <= 1)).all()
    if ((seen > 1e-4) & (seen < 1 - 1e-4)).all():
        torch.testing.assert_close(p.geometry.to_source(seen), point, atol=1e-5, rtol=0)


def test_view_points_survive_the_round_trip_without_rotation():
    p = draw_parameters(ViewConfig(), (32, 32), torch.arange(500), seed=0, epoch=0, view=0)
    points = torch.rand(500, 3, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(p.geometry.to_view(p.geometry.to_source(points)), points, atol=1e-5, rtol=0)


def test_a_point_outside_the_crop_is_clamped_to_its_edge():
    geometry = Geometry(torch.tensor([[0.5, 0.5, 0.25, 0.25]]), torch.tensor([False]), None, 1.0)
    assert geometry.to_view(torch.tensor([[[0.1, 0.6]]])).tolist() == [[[0.0, pytest.approx(0.4)]]]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"hue": 0.6}, "hue"),
        ({"rotation": -1}, "rotation"),
    ],
)
def test_a_wrong_range_names_the_field(wrong, field):
    with pytest.raises(InputError, match=f"views.{field}"):
        ViewConfig(**wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_a_cast_of_the_same_view(dtype):
    images = random_images(4, 16, 16)
    p = draw_parameters(ViewConfig(), (16, 16), torch.arange(4), seed=0, epoch=0, view=0)
    full = render_view(images, p, size=16, mean=MEAN, std=STD)
    assert torch.equal(render_view(images, p, size=16, mean=MEAN, std=STD, dtype=dtype), full.to(dtype))
