"""S_M(τ) against a loop, and maps whose values are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.errors import InputError
from data_pipeline.views import ViewConfig
from tests.feature_models import batch_of, colour_data, colour_model, open_set_model
from trainer.evaluation.attribution_maps import Coverage, activated_share
from trainer.evaluation.evaluators import TEMPERATURE, FeatureModel, Subject

# Views that are the image itself.
PLAIN = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (7, 2, 9)])
def test_the_share_equals_the_loop(shape):
    maps = torch.rand(*shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    thresholds = [0.0, 0.1, 0.35, 0.9, 1.0]
    result = activated_share(maps, thresholds)
    for i, rows in enumerate(maps.tolist()):
        for j, threshold in enumerate(torch.tensor(thresholds).tolist()):
            above = sum(value > threshold for row in rows for value in row)
            assert result[i, j] == pytest.approx(above / (shape[1] * shape[2]))


def test_maps_are_those_of_the_loss_written_out():
    """Layer and features of the colour model: A is the pixels, z the means of the channels scaled to length 1."""
    images = colour_data()["test_known"].images[:6]
    maps = Coverage(views=PLAIN).maps(colour_model(), images, torch.arange(6))
    pixels = (images.permute(0, 3, 1, 2) / 255).double().requires_grad_()
    z = F.normalize(pixels.mean(dim=(2, 3)), dim=1)
    views = torch.cat([z, z.detach()])
    total = 0.0
    for i in range(12):
        similarity = views[i] @ views.T / TEMPERATURE
        others = [k for k in range(12) if k != i]
        total = total - similarity[(i + 6) % 12] + torch.logsumexp(similarity[others], dim=0)
    (gradient,) = torch.autograd.grad(total / 12, pixels)
    expected = (gradient.clamp(min=0) * pixels).sum(dim=1).clamp(min=0).detach()
    torch.testing.assert_close(maps.double(), expected, atol=1e-7, rtol=1e-3)
    assert maps.max() > 0


def test_the_evaluator_averages_over_whole_batches():
    evaluator = Coverage(batch_size=8, max_images=None, examples=3, thresholds=5, lowest=1e-6, highest=1e-2)
    subject = Subject(colour_model(), colour_data())
    result = evaluator(subject)
    batch = subject.batch("test_known")
    maps = torch.cat(
        [evaluator.maps(subject.model, batch.images[i : i + 8], batch.indices[i : i + 8]) for i in (0, 8, 16)]
    )
    np.testing.assert_allclose(result.arrays["threshold"], [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    share = [(maps.numpy() > threshold).mean() for threshold in np.float32(result.arrays["threshold"])]
    np.testing.assert_allclose(result.arrays["activated_share"], share, rtol=1e-5)
    assert result.numbers == pytest.approx(
        {
            "activated_share": np.mean(share),
            "activated_share/1e-06": share[0],
            "activated_share/1e-04": share[2],
            "activated_share/1e-02": share[4],
        }
    )
    assert result.arrays["images"].shape == (3, 8, 8, 3) and result.arrays["maps"].shape == (3, 8, 8)
    np.testing.assert_array_equal(result.arrays["maps"], maps[:3])
    assert (np.diff(result.arrays["activated_share"]) <= 0).all()
    assert result.tested == 24  # three whole batches


def test_thresholds_that_round_alike_have_numbers_of_their_own():
    result = Coverage(max_images=5, lowest=1e-5, highest=1.2e-5, thresholds=4)(Subject(colour_model(), colour_data()))
    share = result.arrays["activated_share"]
    assert {name: value for name, value in result.numbers.items() if "/" in name} == pytest.approx(
        {"activated_share/1e-05": share[0], "activated_share/1.13e-05": share[2], "activated_share/1.20e-05": share[3]}
    )


def test_fewer_images_than_a_batch():
    result = Coverage(max_images=5)(Subject(colour_model(), colour_data()))
    assert result.arrays["images"].shape[0] == result.tested == 5 and 0 <= result.numbers["activated_share"] <= 1


def test_a_model_of_this_project():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 1)).astype(np.uint8)
    subject = Subject(FeatureModel.of(open_set_model()), {"test_known": batch_of(images, np.arange(8) % 6)})
    result = Coverage()(subject)
    assert result.arrays["maps"].shape == (8, 2, 2) and (result.arrays["maps"] >= 0).all()
    assert all(parameter.grad is None for parameter in subject.model.network.parameters())


def test_maps_that_are_not_finite():
    maps = torch.rand(5, 2, 2)
    maps[1, 0, 1], maps[3, 1, 0] = torch.nan, torch.inf
    with pytest.raises(InputError, match="2 of 5 images have attribution maps that are not finite"):
        activated_share(maps, [0.5])


def test_one_image_has_nothing_to_be_contrasted_with():
    data = colour_data()
    data["test_known"] = type(data["test_known"])(*(column[:1] for column in data["test_known"]))
    with pytest.raises(InputError, match="got 1: give 2 or more"):
        Coverage()(Subject(colour_model(), data))


def test_bad_configurations():
    for options in ({"lowest": 0.0}, {"highest": 1e-6}, {"thresholds": 1}, {"batch_size": 1}, {"max_images": 1}):
        with pytest.raises(InputError, match=r"attribution\."):
            Coverage(**options)
