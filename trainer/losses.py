"""The losses: SimCLR (eq. 1), SupCon (eq. 2) and the objective (eq. 8). Pure functions of tensors.

Shapes: N images on this rank, R ranks, D the embedding's length. Embeddings have length 1, so that a product is a
cosine similarity. Every anchor of this rank sees the keys of all ranks; what comes back is this rank's mean, and the
mean over ranks of these means, as of their gradients, is what one rank computes on the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.distributed import gather, rank, world_size


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
    keys = _gather_views(embeddings).flatten(0, 1)
    key_labels = gather(labels).flatten().repeat(len(embeddings))
    anchors, anchor_labels = embeddings.flatten(0, 1), labels.repeat(len(embeddings))
    similarity = anchors @ keys.T / temperature
    same_class = anchor_labels.unsqueeze(1) == key_labels.unsqueeze(0)
    itself = _self_mask(len(embeddings), len(labels), keys.device)
    positive = same_class & ~itself
    in_denominator = ~same_class if denominator == "negatives" else ~itself
    usable = positive.any(dim=1) & in_denominator.any(dim=1)
    # A row without any key would make log(0); it is computed over all keys and then left out.
    masked = torch.where(in_denominator | ~usable.unsqueeze(1), similarity, -torch.inf)
    mean_positive = torch.where(positive, similarity, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return torch.where(usable, masked.logsumexp(dim=1) - mean_positive, 0.0).mean()


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
        supcon = supcon_loss(views[:2], labels, config.temperature, config.denominator)
    if config.lam > 0:
        simclr = _pair_losses(views[:2], keys[:2], config.temperature).mean()
        if len(views) == 3:
            pairs = [(1, 2)] if config.anchors == "other" else [(1, 2), (0, 2)]
            losses = [
                _pair_losses(views[list(pair)], keys[list(pair)], config.temperature, share, partner) for pair in pairs
            ]
            gradmix = (gamma**2 * torch.stack(losses).mean(dim=0)).mean()
    return Objective(config.theta * supcon + config.lam * (simclr + gradmix), supcon, simclr, gradmix)


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
    n = views.shape[1]
    similarity = views.flatten(0, 1) @ keys.flatten(0, 1).T / temperature
    masked = similarity.masked_fill(_self_mask(2, n, views.device), -torch.inf)
    # log Σ exp of each anchor (2, N), and the similarity of each image's own pair (N,)
    log_sum = masked.logsumexp(dim=1).view(2, n)
    own = (views[0] * views[1]).sum(dim=1) / temperature
    losses = log_sum.mean(dim=0) - own
    if share is None:
        return losses
    other = (views[0, partner] * views[1]).sum(dim=1) / temperature
    other_losses = (log_sum[0, partner] + log_sum[1]) / 2 - other
    return share * losses + (1.0 - share) * other_losses


def _self_mask(num_views: int, n: int, device: torch.device) -> Tensor:
    """(V·N, V·R·N) bool: where an anchor of this rank meets itself among the keys of all ranks.

    For two views, two ranks and two images, on rank 1:      keys   x¹ of rank 0, 1   x² of rank 0, 1
                                                             x¹        . .   # .         . .   . .
                                                                       . .   . #         . .   . .
                                                             x²        . .   . .         . .   # .
                                                                       . .   . .         . .   . #
    """
    total = n * world_size()
    anchor = torch.arange(num_views * n, device=device)
    place = anchor // n * total + rank() * n + anchor % n
    return place.unsqueeze(1) == torch.arange(num_views * total, device=device).unsqueeze(0)
