"""Layer sums, the memory of peaks, and the frozen statistics of the extra pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trainer.attribution import PeakStore, attribution, frozen_statistics, peaks, random_places
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


def test_the_store_gives_back_what_it_was_told_and_chance_otherwise():
    store = PeakStore(10, 2, torch.device("cpu"))
    told = torch.rand(3, 2, 2)
    store.update(torch.tensor([7, 2, 5]), told)
    looked = store.lookup(torch.tensor([5, 0, 7]), seed=1, epoch=4)
    assert torch.equal(looked[0], told[2]) and torch.equal(looked[2], told[0])
    assert torch.equal(looked[1:2], random_places(torch.tensor([0]), 2, seed=1, epoch=4))
    assert ((looked >= 0) & (looked < 1)).all()
    store.update(torch.tensor([5]), torch.full((1, 2, 2), torch.nan))
    assert not torch.equal(store.lookup(torch.tensor([5]), seed=1, epoch=4)[0], told[2])


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
