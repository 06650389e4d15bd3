"""The losses: SimCLR (eq. 1), SupCon (eq. 2), the objective (eq. 8), and classifiers'. Pure functions of tensors.

Shapes: N images on this rank, R ranks, D the embedding's length. Embeddings have length 1, so that a product is a
cosine similarity. Every anchor of this rank sees the keys of all ranks; what comes back is this rank's mean, and the
mean over ranks of these means, as of their gradients, is what one rank computes on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.config import ARPLConfig, CrossEntropyConfig, MoCoConfig, ObjectiveConfig
from trainer.distributed import gather, rank, world_size

MOST_AT_ONCE = 1 << 26
"""Similarities that exist at a time, and in a handful of intermediates as many: 256 MiB each in float32."""


class Objective(NamedTuple):
    """Equation 8 and its parts, scalars: total = θ·supcon + λ·(simclr + gradmix), gradmix already times γ²."""

    total: Tensor
    supcon: Tensor
    simclr: Tensor
    gradmix: Tensor


def simclr_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent over two views of each image, (N, D) each: the mean over the 2N anchors i with their other view j of

    −log( exp(zᵢ·zⱼ/τ) / Σ_{k≠i} exp(zᵢ·zₖ/τ) )                                                          (eq. 1)
    """
    views = torch.stack((first, second))
    return _pair_losses(views, _gather_views(views), temperature).mean()


def supcon_loss(embeddings: Tensor, labels: Tensor, temperature: float, denominator: str = "negatives") -> Tensor:
    """Supervised contrastive loss of V views of each image: the mean over the V·N anchors i of

        1/|P(i)| Σ_{p∈P(i)} −log( exp(zᵢ·z_p/τ) / Σ_{k∈K(i)} exp(zᵢ·zₖ/τ) )                                  (eq. 2)

    P(i) is everyone else of the anchor's class. K(i) is the images of other classes ("negatives", eq. 2), or everyone
    but the anchor ("all", Khosla et al. 2020). An anchor for which P or K is empty contributes 0.

    Args:
        embeddings: (V, N, D).
        labels: (N,) int64.
    """
    return _supcon_loss(embeddings, _gather_views(embeddings), labels, temperature, denominator)


def _supcon_loss(views: Tensor, keys: Tensor, labels: Tensor, temperature: float, denominator: str) -> Tensor:
    """`supcon_loss` of views (V, N, D) among keys (V, R·N, D)."""
    keys = keys.flatten(0, 1)
    key_labels = gather(labels).flatten().repeat(len(views))

    def losses(anchors: Tensor, anchor_labels: Tensor, places: Tensor) -> Tensor:
        similarity = anchors @ keys.T / temperature
        same_class = anchor_labels.unsqueeze(1) == key_labels.unsqueeze(0)
        itself = _at(places, len(keys))
        positive = same_class & ~itself
        in_denominator = ~same_class if denominator == "negatives" else ~itself
        usable = positive.any(dim=1) & in_denominator.any(dim=1)
        # A row without any key would make log(0); it is computed over all keys and then left out.
        masked = torch.where(in_denominator | ~usable.unsqueeze(1), similarity, -torch.inf)
        mean_positive = torch.where(positive, similarity, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
        return torch.where(usable, masked.logsumexp(dim=1) - mean_positive, 0.0)

    places = _own_places(len(views), len(labels), keys.device)
    return _by_rows(losses, len(keys), views.flatten(0, 1), labels.repeat(len(views)), places).mean()


def objective(
    embeddings: Tensor,
    labels: Tensor,
    gamma: float | Tensor | None,
    config: ObjectiveConfig,
    *,
    share: Tensor | None = None,
    partner: Tensor | None = None,
) -> Objective:
    """Equation 8: L = θ·L_supcon + λ·(L_simclr + γ²·L_simclr(z², z̃)).

    Args:
        embeddings: (3N, D) in blocks: all x¹, all x², all x̃; or (2N, D) without mixing.
        labels: (N,) int64.
        gamma: side of the patch as a share of the image's side, a number, () or one per image (N,); None without
            mixing.
        share, partner: for views that are mixtures of two images, as Mixup's: share (N,) of the own image, and the
            place (N,) of the other one on this rank. The mixed view's positives are then both images, weighted.
    """
    views = embeddings.view(-1, len(labels), embeddings.shape[1])
    keys = _gather_views(views)
    zero = embeddings.new_zeros(())
    supcon = simclr = gradmix = zero
    if config.theta > 0:
        supcon = _supcon_loss(views[:2], keys[:2], labels, config.temperature, config.denominator)
    if config.lam > 0:
        simclr = _pair_losses(views[:2], keys[:2], config.temperature).mean()
        if len(views) == 3:
            pairs = [(1, 2)] if config.anchors == "other" else [(1, 2), (0, 2)]
            losses = [
                _pair_losses(_pick(views, pair), _pick(keys, pair), config.temperature, share, partner)
                for pair in pairs
            ]
            gradmix = (gamma**2 * torch.stack(losses).mean(dim=0)).mean()
    return Objective(config.theta * supcon + config.lam * (simclr + gradmix), supcon, simclr, gradmix)


class MomentumObjective(NamedTuple):
    """MoCo's loss and its parts, scalars: total = moco + gradmix, gradmix already times γ²."""

    total: Tensor
    moco: Tensor
    gradmix: Tensor


def momentum_objective(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    gamma: float | Tensor | None,
    config: MoCoConfig,
    *,
    share: Tensor | None = None,
    partner: Tensor | None = None,
) -> MomentumObjective:
    """Momentum contrast (He et al. 2020), with the mixed view weighed as in eq. 8: ℓ(z¹) + γ²·ℓ(z̃), each the mean over
    the images i of

        −log( exp(qᵢ·kᵢ/τ) / (exp(qᵢ·kᵢ/τ) + Σ_{z∈queue} exp(qᵢ·z/τ)) )

    Args:
        queries: (2N, D) in blocks: all x¹, all x̃; or (N, D) without mixing.
        keys: (N, D) of x², by the key encoder.
        queue: (Q, D), keys of earlier steps.
        gamma, share, partner: as for `objective`.
    """
    views = queries.view(-1, len(keys), queries.shape[1])

    def losses(view: Tensor, positives: Tensor) -> Tensor:
        own = (view * positives).sum(dim=1, keepdim=True)
        return F.cross_entropy(
            torch.cat([own, view @ queue.T], dim=1) / config.temperature,
            torch.zeros(len(view), dtype=torch.int64, device=view.device),
            reduction="none",
        )

    moco = losses(views[0], keys).mean()
    gradmix = queries.new_zeros(())
    if len(views) == 2:
        mixed = losses(views[1], keys)
        if share is not None:
            mixed = share * mixed + (1.0 - share) * losses(views[1], keys[partner])
        gradmix = (gamma**2 * mixed).mean()
    return MomentumObjective(moco + gradmix, moco, gradmix)


class CrossEntropy(NamedTuple):
    """The closed-set classifier's loss, a scalar."""

    total: Tensor


def cross_entropy(logits: Tensor, labels: Tensor, config: CrossEntropyConfig) -> CrossEntropy:
    """The mean over the V·N views, with C classes and the share ε of label smoothing, of

        −Σ_c q_c log softmax(logits)_c,  q_c = (1 − ε)[c = label] + ε/C

    Args:
        logits: (V·N, C) in blocks: all first views, all second ones, ...
        labels: (N,) int64.
    """
    targets = labels.repeat(len(logits) // len(labels))
    return CrossEntropy(F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing))


class ReciprocalLoss(NamedTuple):
    """ARPL's loss and its parts, scalars: total = classification + λ·open_space."""

    total: Tensor
    classification: Tensor
    open_space: Tensor


def reciprocal_loss(logits: Tensor, margins: Tensor, labels: Tensor, config: ARPLConfig) -> ReciprocalLoss:
    """Adversarial reciprocal point learning (Chen et al. 2021): the mean over the V·N views, of class y each, of

        cross_entropy(logits / T) + λ·max(margin_y + 1, 0)

    with the logits ‖x − pₖ‖²/D − x·pₖ and margins ‖x − pₖ‖²/D − R of `trainer.encoder.ReciprocalPoints`. The 1 is in
    the authors' program; their equation leaves it out, which moves R by 1: another loss while R is learnt from 0.

    Args:
        logits, margins: (V·N, C) in blocks: all first views, all second ones, ...
        labels: (N,) int64.
    """
    targets = labels.repeat(len(logits) // len(labels))
    classification = F.cross_entropy(logits / config.temperature, targets, label_smoothing=config.label_smoothing)
    open_space = (margins.gather(1, targets.unsqueeze(1)) + 1.0).relu().mean()
    return ReciprocalLoss(classification + config.weight * open_space, classification, open_space)


def _pick(views: Tensor, pair: tuple[int, int]) -> Tensor:
    """Two of the views (V, N, D). Indexing with a list would copy it to the device, and the host would wait."""
    return torch.stack([views[number] for number in pair])


def _gather_views(views: Tensor) -> Tensor:
    """(V, N, D) of all ranks as (V, R·N, D): within a view, rank after rank."""
    return gather(views).transpose(0, 1).flatten(1, 2)


def _pair_losses(
    views: Tensor, keys: Tensor, temperature: float, share: Tensor | None = None, partner: Tensor | None = None
) -> Tensor:
    """NT-Xent of each image (N,), the mean of its two directions, for views (2, N, D) among keys (2, R·N, D).

    With `share` s and `partner` p, view 2 of image i is a mixture: its pair is image i's view 1 to the share sᵢ, and
    image pᵢ's to the share 1 − sᵢ.
    """
    n, keys = views.shape[1], keys.flatten(0, 1)

    def log_sums(anchors: Tensor, places: Tensor) -> Tensor:
        similarity = anchors @ keys.T / temperature
        return similarity.masked_fill(_at(places, len(keys)), -torch.inf).logsumexp(dim=1)

    # log Σ exp of each anchor (2, N), and the similarity of each image's own pair (N,)
    places = _own_places(2, n, views.device)
    log_sum = _by_rows(log_sums, len(keys), views.flatten(0, 1), places).view(2, n)
    own = (views[0] * views[1]).sum(dim=1) / temperature
    losses = log_sum.mean(dim=0) - own
    if share is None:
        return losses
    other = (views[0, partner] * views[1]).sum(dim=1) / temperature
    other_losses = (log_sum[0, partner] + log_sum[1]) / 2 - other
    return share * losses + (1.0 - share) * other_losses


def _own_places(num_views: int, n: int, device: torch.device) -> Tensor:
    """(V·N,): where the anchors of this rank stand themselves among the keys of all ranks.

    For two views, two ranks and two images, on rank 1:      keys   x¹ of rank 0, 1   x² of rank 0, 1
                                                             x¹        . .   # .         . .   . .
                                                                       . .   . #         . .   . .
                                                             x²        . .   . .         . .   # .
                                                                       . .   . .         . .   . #
    """
    anchor = torch.arange(num_views * n, device=device)
    return anchor // n * (n * world_size()) + rank() * n + anchor % n


def _at(places: Tensor, count: int) -> Tensor:
    """(A, count) bool: true in each row at its place (A,) alone."""
    return places.unsqueeze(1) == torch.arange(count, device=places.device).unsqueeze(0)


def _by_rows(function: Callable[..., Tensor], num_keys: int, *anchors: Tensor) -> Tensor:
    """`function(*anchors)` (A,), for so many anchors at a time that their similarities number at most `MOST_AT_ONCE`.

    Where that is not all of them, the backward pass computes the similarities again, and no matrix of all anchors and
    keys ever exists.
    """
    rows = max(MOST_AT_ONCE // num_keys, 1)
    if len(anchors[0]) <= rows:
        return function(*anchors)
    parts = zip(*(column.split(rows) for column in anchors))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
