"""Layer sums, the memory of peaks, and the frozen statistics of the extra pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trainer.attribution import PeakStore, attribution, else_random, frozen_statistics, peaks, places, random_places
from trainer.config import MixingConfig


def test_layers_are_normalised_resized_to_the_finest_and_added():
    generator = torch.Generator().manual_seed(0)
    fine, coarse = torch.rand(3, 4, 8, 6, generator=generator), torch.rand(3, 9, 4, 3, generator=generator)
    config = MixingConfig(layers=("conv4_2", "conv5_2"))
    result = attribution([fine, coarse], [torch.ones_like(fine), torch.ones_like(coarse)], config)
    for i in range(3):
        expected = torch.zeros(8, 6)
        for layer in (fine, coarse):
            single = layer[i].sum(dim=0)
            single = (single - single.min()) / (single.max() - single.min())
            expected += F.interpolate(single[None, None], (8, 6), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=1e-5)


def test_a_flat_layer_adds_nothing():
    fine, flat = torch.rand(1, 2, 4, 4), torch.ones(1, 2, 2, 2)
    both = attribution([fine, flat], [torch.ones_like(fine), torch.ones_like(flat)], MixingConfig())
    assert both.isfinite().all() and both.max() == 1


def test_the_sign_switch_turns_the_gradient_round():
    maps = torch.ones(1, 1, 2, 2)
    gradient = torch.tensor([[[[1.0, 0.0], [0.0, -1.0]]]])
    assert peaks([maps], [gradient], MixingConfig(gradient_sign=1)).tolist() == [[[0.25, 0.25]]]
    assert peaks([maps], [gradient], MixingConfig(gradient_sign=-1)).tolist() == [[[0.75, 0.75]]]


def test_the_store_gives_back_what_it_was_told():
    store = PeakStore(10, 2, torch.device("cpu"))
    told = torch.rand(3, 2, 2)
    store.update(torch.tensor([7, 2, 5]), told)
    looked = store.lookup(torch.tensor([5, 0, 7]))
    assert torch.equal(looked[0], told[2]) and torch.equal(looked[2], told[0]) and looked[1].isnan().all()
    store.update(torch.tensor([5]), torch.full((1, 2, 2), torch.nan))
    assert store.lookup(torch.tensor([5])).isnan().all()


def test_a_place_that_is_not_known_is_drawn():
    known = torch.tensor([[[0.2, 0.3], [torch.nan, torch.nan]], [[0.0, 1.0], [0.5, 0.5]]])
    indices = torch.tensor([4, 9])
    centers = else_random(known, indices, seed=1, epoch=4)
    assert torch.equal(centers[0, 1], random_places(indices, 2, seed=1, epoch=4)[0, 1])
    centers[0, 1] = torch.nan
    assert torch.equal(centers.nan_to_num(), known.nan_to_num())


def test_frozen_statistics_normalise_by_the_batch_and_learn_nothing():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    twin.load_state_dict(layer.state_dict())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    batch = torch.randn(5, 3, 8, 8)
    with frozen_statistics(layer):
        output = layer(batch)
    torch.testing.assert_close(output, twin(batch))
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    layer(batch)
    assert not torch.equal(before["1.running_mean"], layer[1].running_mean)


def least(activation: torch.Tensor, config: MixingConfig, **draw) -> torch.Tensor:
    maps = activation.unsqueeze(1)
    return places([maps], [torch.ones_like(maps)], config, torch.arange(len(maps)), **{"seed": 0, "epoch": 0, **draw})


def test_the_least_place_is_the_middle_of_the_cell_with_the_smallest_value():
    activation = torch.rand(40, 3, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    found = least(activation, MixingConfig(place="least"))
    for single, center in zip(activation, found):
        _, y, x = min((value, y, x) for y, row in enumerate(single.tolist()) for x, value in enumerate(row))
        torch.testing.assert_close(center[0], torch.tensor([(y + 0.5) / 3, (x + 0.5) / 5]))
    apart = least(activation, MixingConfig(place="least", num_patches=2, gamma_max=0.4))
    assert torch.equal(apart[:, :1], found) and ((apart[:, 0] - apart[:, 1]).abs().amax(dim=1) > 0.3).all()


def test_of_several_least_places_any_is_drawn_by_the_image():
    activation = torch.zeros(3000, 2, 2)
    activation[:, 0, 1] = 2.0
    found = least(activation, MixingConfig(place="least"))
    cells = (found[:, 0] * 2).long() @ torch.tensor([2, 1])
    counts = torch.bincount(cells, minlength=4)
    assert counts[1] == 0 and (counts[[0, 2, 3]] > 900).all()
    assert torch.equal(found, least(activation, MixingConfig(place="least")))
    assert not torch.equal(found, least(activation, MixingConfig(place="least"), epoch=1))
    assert least(torch.zeros(2, 3, 3), MixingConfig(place="least")).isnan().all()


def test_the_most_activated_place_is_the_peak():
    maps, gradients = [torch.rand(6, 4, 5, 5)], [torch.rand(6, 4, 5, 5)]
    found = places(maps, gradients, MixingConfig(), torch.arange(6), seed=0, epoch=0)
    assert torch.equal(found, peaks(maps, gradients, MixingConfig()))
