"""Partners, γ and the three ways of mixing."""

from __future__ import annotations

import pytest
import torch

from trainer.config import MixingConfig
from trainer.mixing import PARTNER_GROUP, cutmix, draw_gamma, mix, partners

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [*range(2, 40), 257])
def test_partners_are_a_permutation_without_a_fixed_point(n):
    partner = partners(n, CPU)
    assert sorted(partner.tolist()) == list(range(n))
    assert (partner != torch.arange(n)).all()


def test_a_partner_does_not_depend_on_the_number_of_ranks():
    whole = partners(8 * PARTNER_GROUP, CPU)
    for ranks in (2, 4, 8):
        n = len(whole) // ranks
        assert torch.equal(torch.cat([partners(n, CPU) + rank * n for rank in range(ranks)]), whole)


def test_gamma_is_uniform_in_its_bounds_and_the_same_whoever_asks():
    config = MixingConfig(gamma_min=0.2, gamma_max=0.4)
    index = torch.arange(3)
    drawn = torch.tensor([draw_gamma(config, index, seed=1, epoch=2, step=step) for step in range(4000)])
    assert drawn.min() >= 0.2 and drawn.max() < 0.4
    assert abs(drawn.mean() - 0.3) < 0.003 and abs(drawn.std() - 0.2 / 12**0.5) < 0.002
    assert draw_gamma(config, index + 5, seed=1, epoch=2, step=7) == pytest.approx(drawn[7].item(), abs=1e-6)


def test_gamma_per_sample_follows_the_sample():
    config = MixingConfig(gamma_per="sample")
    index = torch.tensor([9, 4, 11, 70])
    gamma = draw_gamma(config, index, seed=0, epoch=0, step=0)
    assert torch.equal(draw_gamma(config, index.flip(0), seed=0, epoch=0, step=5), gamma.flip(0))
    assert len(set(gamma.tolist())) == 4


def test_gradmix_patches_where_it_is_told():
    views = torch.stack([torch.full((1, 20, 20), float(i)) for i in range(8)])
    centers = torch.full((8, 1, 2), 0.5)
    config = MixingConfig(gamma_min=0.2, gamma_max=0.2)
    mixed = mix(views, torch.arange(8), centers, config, seed=0, epoch=0, step=0)
    assert mixed.gamma == pytest.approx(0.2) and mixed.share is None
    for i in range(8):
        patch = mixed.views[i, 0, 8:12, 8:12]
        torch.testing.assert_close(patch, torch.full((4, 4), float(mixed.partner[i])))
        assert (mixed.views[i] == i).sum() == 400 - 16


def test_mixup_blends_by_one_share():
    views = torch.randn(9, 3, 8, 8)
    mixed = mix(views, torch.arange(9), None, MixingConfig(kind="mixup"), seed=3, epoch=1, step=2)
    share = mixed.share[0].item()
    assert 0 <= share <= 1 and (mixed.share == share).all() and mixed.gamma == 1
    torch.testing.assert_close(mixed.views, share * views + (1 - share) * views[mixed.partner])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_cutmix_shows_the_partners_box_and_reports_what_is_left(share):
    views, partner = torch.randn(6, 3, 17, 23), torch.arange(6).roll(1)
    for step in range(20):
        mixed, left = cutmix(views, partner, share, seed=0, epoch=0, step=step)
        own = (mixed == views).all(dim=1)
        other = (mixed == views[partner]).all(dim=1)
        assert (own ^ other).all()
        torch.testing.assert_close(own.float().mean(dim=(1, 2)), left)
        box = (~own[0]).nonzero()
        if len(box):
            extent = box.amax(dim=0) - box.amin(dim=0) + 1
            assert extent.prod() == len(box)


def test_cutmix_cuts_the_area_it_is_given_unless_the_border_does():
    """1 − share of the image, less what lies outside: the mean over places is a known integral."""
    size, share = 64, 0.75
    side = int((1 - share) ** 0.5 * size) // 2 * 2
    views, partner = torch.randn(2, 1, size, size), torch.tensor([1, 0])
    kept = [cutmix(views, partner, share, seed=0, epoch=0, step=step)[1][0].item() for step in range(600)]
    assert min(kept) == pytest.approx(1 - (side / size) ** 2) == pytest.approx(share)
    # The mean visible length of a box of side s at a uniform centre is s − s²/(4·size) along each axis.
    visible = (side - side**2 / (4 * size)) / size
    assert sum(kept) / len(kept) == pytest.approx(1 - visible**2, abs=0.01)
