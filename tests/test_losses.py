"""Losses against loops written from the equations, closed forms, symmetries, and the same batch over two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ranks import on_ranks
from trainer import losses
from trainer.config import ARPLConfig, CrossEntropyConfig, MoCoConfig, ObjectiveConfig
from trainer.distributed import rank
from trainer.encoder import ReciprocalPoints
from trainer.losses import (
    cross_entropy,
    momentum_objective,
    objective,
    reciprocal_loss,
    simclr_loss,
    supcon_loss,
)

TAU = 0.05


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def naive_simclr(first, second, tau):
    z = [*first.tolist(), *second.tolist()]
    n = len(first)
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        sim = [sum(a * b for a, b in zip(z[i], z[k])) / tau for k in range(2 * n)]
        total -= math.log(math.exp(sim[j]) / sum(math.exp(sim[k]) for k in range(2 * n) if k != i))
    return total / (2 * n)


def naive_supcon(z, labels, tau, denominator):
    z, labels = z.tolist(), labels.tolist()
    total = 0.0
    for i in range(len(z)):
        sim = [sum(a * b for a, b in zip(z[i], z[k])) / tau for k in range(len(z))]
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        others = [k for k in range(len(z)) if (k != i if denominator == "all" else labels[k] != labels[i])]
        if not positives or not others:
            continue
        bottom = sum(math.exp(sim[k]) for k in others)
        total += sum(-math.log(math.exp(sim[p]) / bottom) for p in positives) / len(positives)
    return total / len(z)


@pytest.mark.parametrize(("n", "dim"), [(2, 3), (7, 5), (13, 16)])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_simclr_is_equation_1(n, dim, tau):
    first, second = unit(n, dim), unit(n, dim, seed=1)
    assert simclr_loss(first, second, tau).item() == pytest.approx(naive_simclr(first, second, tau), rel=1e-10)


@pytest.mark.parametrize("denominator", ["negatives", "all"])
@pytest.mark.parametrize(("views", "n", "classes"), [(1, 9, 3), (2, 7, 3), (2, 5, 5), (3, 6, 2)])
def test_supcon_is_equation_2(denominator, views, n, classes):
    z = unit(views, n, 6)
    labels = torch.arange(n) % classes
    expected = naive_supcon(z.flatten(0, 1), labels.repeat(views), 0.1, denominator)
    assert supcon_loss(z, labels, 0.1, denominator).item() == pytest.approx(expected, rel=1e-10)


def test_closed_forms():
    # Every embedding the same: each of the 2N − 1 keys is as likely, so −log(1/(2N − 1)).
    same = torch.ones(5, 1)
    assert simclr_loss(same, same, TAU).item() == pytest.approx(math.log(9), rel=1e-6)
    # Two orthogonal images, views equal: −log(e^{1/τ} / (e^{1/τ} + 2)).
    eye = torch.eye(2, dtype=torch.float64)
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    assert simclr_loss(eye, eye, 0.5).item() == pytest.approx(expected, rel=1e-10)
    # Two classes of two images at the poles: positives 1/τ, two negatives at −1/τ: log 2 − 1/τ − 1/τ.
    poles = torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert supcon_loss(poles, labels, 0.5).item() == pytest.approx(math.log(2) - 4, rel=1e-10)


@pytest.mark.parametrize("denominator", ["negatives", "all"])
def test_the_order_of_images_and_of_views_does_not_matter(denominator):
    z, labels = unit(2, 8, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    torch.testing.assert_close(simclr_loss(z[0], z[1], TAU), simclr_loss(z[1, order], z[0, order], TAU))
    torch.testing.assert_close(
        supcon_loss(z, labels, TAU, denominator), supcon_loss(z[:, order].flip(0), labels[order], TAU, denominator)
    )


@pytest.mark.parametrize("denominator", ["negatives", "all"])
def test_an_anchor_without_positive_or_negative_gives_no_nan(denominator):
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])):
        z = unit(1, 3, 4).requires_grad_()
        loss = supcon_loss(z, labels, TAU, denominator)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()
        assert loss.item() == pytest.approx(naive_supcon(z[0], labels, TAU, denominator), abs=1e-9)


def test_float32_stays_finite_at_the_papers_temperature():
    z = F.normalize(torch.ones(2, 64, 8), dim=2).requires_grad_()
    labels = torch.arange(64) % 4
    total = objective(z.flatten(0, 1), labels, None, ObjectiveConfig()).total
    total.backward()
    assert total.isfinite() and z.grad.isfinite().all()


def test_objective_is_equation_8():
    z, labels, gamma = unit(3, 6, 8), torch.tensor([0, 1, 2, 0, 1, 2]), 0.3
    config = ObjectiveConfig(theta=0.7, lam=1.3, temperature=0.1)
    result = objective(z.flatten(0, 1), labels, gamma, config)
    supcon = naive_supcon(z[:2].flatten(0, 1), labels.repeat(2), 0.1, "negatives")
    simclr, gradmix = naive_simclr(z[0], z[1], 0.1), gamma**2 * naive_simclr(z[1], z[2], 0.1)
    assert result.supcon.item() == pytest.approx(supcon, rel=1e-10)
    assert result.simclr.item() == pytest.approx(simclr, rel=1e-10)
    assert result.gradmix.item() == pytest.approx(gradmix, rel=1e-10)
    assert result.total.item() == pytest.approx(0.7 * supcon + 1.3 * (simclr + gradmix), rel=1e-10)


def test_both_anchors_average_the_two_clean_views():
    z, labels = unit(3, 5, 8), torch.arange(5)
    result = objective(z.flatten(0, 1), labels, 0.5, ObjectiveConfig(anchors="both"))
    expected = 0.25 * (naive_simclr(z[1], z[2], TAU) + naive_simclr(z[0], z[2], TAU)) / 2
    assert result.gradmix.item() == pytest.approx(expected, rel=1e-9)


def test_gamma_per_image_weighs_each_image():
    z, labels = unit(3, 6, 8), torch.arange(6)
    gammas = torch.linspace(0.1, 0.5, 6, dtype=torch.float64)
    config = ObjectiveConfig()
    whole = objective(z.flatten(0, 1), labels, gammas, config).gradmix
    # One image's γ at a time: the weights enter linearly.
    alone = sum(objective(z.flatten(0, 1), labels, gammas * (torch.arange(6) == i), config).gradmix for i in range(6))
    torch.testing.assert_close(whole, alone)
    torch.testing.assert_close(
        objective(z.flatten(0, 1), labels, torch.full((6,), 0.4), config).gradmix,
        objective(z.flatten(0, 1), labels, 0.4, config).gradmix,
    )


def test_without_mixing_and_supervision_it_is_simclr_exactly():
    z, labels = unit(2, 9, 8), torch.arange(9) % 3
    plain = objective(z.flatten(0, 1), labels, None, ObjectiveConfig(theta=0.0, lam=1.0))
    assert plain.total.item() == simclr_loss(z[0], z[1], TAU).item()
    assert plain.supcon.item() == 0 and plain.gradmix.item() == 0


def test_lambda_zero_leaves_supcon_alone():
    z, labels = unit(3, 9, 8), torch.arange(9) % 3
    result = objective(z.flatten(0, 1), labels, 0.3, ObjectiveConfig(theta=2.0, lam=0.0))
    torch.testing.assert_close(result.total, 2 * supcon_loss(z[:2], labels, TAU))
    assert result.simclr.item() == 0 and result.gradmix.item() == 0


def test_a_mixture_has_two_weighted_positives():
    """Mixup's and CutMix's loss: share times the loss towards the own image, the rest towards the partner's."""
    n, tau = 5, 0.2
    z = unit(3, n, 7)
    share = torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    partner = torch.tensor([1, 2, 3, 4, 0])
    result = objective(
        z.flatten(0, 1), torch.arange(n), 1.0, ObjectiveConfig(temperature=tau), share=share, partner=partner
    )
    keys = torch.cat([z[1], z[2]])

    def cross_entropy(anchor: int, positive: int) -> float:
        sim = (keys[anchor] @ keys.T / tau).tolist()
        return math.log(sum(math.exp(s) for k, s in enumerate(sim) if k != anchor)) - sim[positive]

    total = 0.0
    for i in range(n):
        for weight, image in ((share[i].item(), i), (1 - share[i].item(), int(partner[i]))):
            total += weight * 0.5 * (cross_entropy(n + i, image) + cross_entropy(image, n + i))
    assert result.gradmix.item() == pytest.approx(total / n, rel=1e-9)


def test_a_share_of_one_is_no_mixture():
    z, labels = unit(3, 6, 8), torch.arange(6)
    one, partner = torch.ones(6, dtype=torch.float64), torch.tensor([1, 0, 3, 2, 5, 4])
    torch.testing.assert_close(
        objective(z.flatten(0, 1), labels, 0.5, ObjectiveConfig(), share=one, partner=partner).total,
        objective(z.flatten(0, 1), labels, 0.5, ObjectiveConfig()).total,
    )


def _objective_of_a_shard(config: ObjectiveConfig, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss parts and gradient for its n of the images; one process computes all of them."""
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    raw = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight = torch.eye(8, dtype=torch.float64).requires_grad_()
    shard = slice(rank() * n, rank() * n + n) if world > 1 else slice(None)
    z = F.normalize(raw[:, shard] @ weight, dim=2)
    labels = (torch.arange(12) % 5)[shard]
    gammas = torch.linspace(0.1, 0.5, 12, dtype=torch.float64)[shard]
    share = torch.linspace(0.2, 1.0, 12, dtype=torch.float64)[shard]
    partner = torch.arange(z.shape[1]) ^ 1
    result = objective(z.flatten(0, 1), labels, gammas, config, share=share, partner=partner)
    result.total.backward()
    return torch.stack(result).detach(), weight.grad


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("config", [ObjectiveConfig(), ObjectiveConfig(denominator="all", anchors="both")])
def test_ranks_together_compute_what_one_rank_does_on_the_whole_batch(world_size, config):
    whole_loss, whole_gradient = _objective_of_a_shard(config, 12)
    results = on_ranks(_objective_of_a_shard, world_size, config, 12 // world_size)
    losses, gradients = (torch.stack(column).mean(dim=0) for column in zip(*results))
    torch.testing.assert_close(losses, whole_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, whole_gradient, rtol=1e-10, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("config", [ObjectiveConfig(), ObjectiveConfig(denominator="all", anchors="both")])
def test_similarities_in_parts_are_the_same_and_never_whole(config, monkeypatch):
    n, most = 60, 2000
    labels = torch.arange(n) % 4

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor, int]:
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn(3 * n, 8, generator=generator, dtype=torch.float64).requires_grad_()
        with LargestTensor() as largest:
            total = objective(F.normalize(raw, dim=1), labels, 0.3, config).total
            total.backward()
        return total.detach(), raw.grad, largest.elements

    whole, whole_gradient, elements = loss_and_gradient()
    assert elements == (2 * n) ** 2
    monkeypatch.setattr(losses, "MOST_AT_ONCE", most)
    parts, gradient, elements = loss_and_gradient()
    assert elements <= max(most, 3 * n * 8)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-9, atol=1e-12)


def naive_cross_entropy(logits, label, smoothing):
    bottom = math.log(sum(math.exp(value) for value in logits))
    targets = [(1 - smoothing) * (c == label) + smoothing / len(logits) for c in range(len(logits))]
    return -sum(share * (value - bottom) for share, value in zip(targets, logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (7, 5)])
def test_cross_entropy_is_its_equation_over_both_views(n, classes, smoothing):
    logits = 3 * torch.randn(2 * n, classes, dtype=torch.float64)
    labels = torch.arange(n) % classes
    expected = sum(naive_cross_entropy(logits[i].tolist(), int(labels[i % n]), smoothing) for i in range(2 * n))
    found = cross_entropy(logits, labels, CrossEntropyConfig(label_smoothing=smoothing))
    assert found.total.item() == pytest.approx(expected / (2 * n), rel=1e-10)


@pytest.mark.parametrize("radius", [0.0, 0.7])
@pytest.mark.parametrize(("n", "dim", "classes", "smoothing"), [(1, 3, 2, 0.0), (5, 7, 4, 0.9)])
def test_arpl_is_its_equations(n, dim, classes, smoothing, radius):
    """Distances, logits, classification and the bounded open space, one view and one class at a time."""
    torch.manual_seed(n)
    head = ReciprocalPoints(dim, classes)
    with torch.no_grad():
        head.radius.fill_(radius)
        head.points.mul_(10)
    features, labels = torch.randn(2 * n, dim), torch.arange(n) % classes
    config = ARPLConfig(weight=0.3, temperature=2.0, label_smoothing=smoothing)
    result = reciprocal_loss(*head(features), labels, config)
    classification = open_space = 0.0
    for i, x in enumerate(features.tolist()):
        label, logits = int(labels[i % n]), []
        for k, point in enumerate(head.points.tolist()):
            distance = sum((a - b) ** 2 for a, b in zip(x, point)) / dim
            logits.append((distance - sum(a * b for a, b in zip(x, point))) / 2.0)
            open_space += max(distance - radius + 1.0, 0.0) / (2 * n) if k == label else 0.0
        classification += naive_cross_entropy(logits, label, smoothing) / (2 * n)
    assert result.classification.item() == pytest.approx(classification, rel=1e-4)
    assert result.open_space.item() == pytest.approx(open_space, rel=1e-4)
    assert result.total.item() == pytest.approx(classification + 0.3 * open_space, rel=1e-4)
    result.total.backward()
    assert head.points.grad.abs().min() > 0 and head.radius.grad.item() < 0


def test_arpls_open_space_is_that_of_the_authors_program_from_the_start():
    """Which is PyTorch's ranking loss of the learnt radius against the distance, with a margin of 1."""
    torch.manual_seed(0)
    head, features, labels = ReciprocalPoints(7, 4), torch.randn(6, 7), torch.tensor([3, 0, 2])
    assert head.radius.item() == 0
    distance = (features - head.points[labels.repeat(2)]).square().mean(dim=1)
    theirs = torch.nn.MarginRankingLoss(margin=1.0)(head.radius.expand(6), distance, torch.ones(6))
    found = reciprocal_loss(*head(features), labels, ARPLConfig()).open_space
    assert found.item() == pytest.approx(theirs.item(), rel=1e-5) and found.item() > 1


@pytest.mark.parametrize(("n", "dim", "size"), [(2, 3, 5), (7, 4, 13)])
@pytest.mark.parametrize("mixing", ["none", "patch", "share"])
def test_moco_is_its_equation(n, dim, size, mixing):
    queries, keys, queue = unit(1 if mixing == "none" else 2, n, dim), unit(n, dim, seed=1), unit(size, dim, seed=2)
    partner, share = torch.arange(n).roll(1), torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    tau, gamma = 0.2, 0.4

    def loss(query: torch.Tensor, key: torch.Tensor) -> float:
        own = math.exp(sum(a * b for a, b in zip(query.tolist(), key.tolist())) / tau)
        others = [sum(a * b for a, b in zip(query.tolist(), old)) / tau for old in queue.tolist()]
        return -math.log(own / (own + sum(map(math.exp, others))))

    options = {"share": share, "partner": partner} if mixing == "share" else {}
    found = momentum_objective(queries.flatten(0, 1), keys, queue, gamma, MoCoConfig(temperature=tau), **options)
    moco, gradmix = sum(loss(queries[0, i], keys[i]) for i in range(n)) / n, 0.0
    for i in range(n if mixing != "none" else 0):
        own, other = loss(queries[1, i], keys[i]), loss(queries[1, i], keys[partner[i]])
        weighed = share[i].item() * own + (1 - share[i].item()) * other if mixing == "share" else own
        gradmix += gamma**2 * weighed / n
    assert found.moco.item() == pytest.approx(moco, rel=1e-10)
    assert found.gradmix.item() == pytest.approx(gradmix, rel=1e-10)
    assert found.total.item() == pytest.approx(moco + gradmix, rel=1e-10)
