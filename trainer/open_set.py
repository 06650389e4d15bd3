"""Open set recognition from embeddings (algorithm 1 of the GradMix paper).

A test embedding is compared with the training embeddings, the gallery. For each class c the score is the sum of the k
largest cosine similarities to the gallery embeddings of that class,

    s_c(z) = sum of the k largest  <z, g> / (|z| |g|),  g in class c,

the largest s_c is the image's score and its c the prediction. One sign convention holds throughout: a larger score
means more known, and an image is unknown when its score is below the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

UNKNOWN = -1
CHUNK_BYTES = 256 * 2**20


class Scores(NamedTuple):
    """What `score` returns: for M test images and K values of k, the larger score being the more known."""

    scores: Tensor  # (M, K), in [-k, k]
    predictions: Tensor  # (M, K) int64, in [0, C)


@torch.no_grad()
def score(
    test: Tensor, gallery: Tensor, gallery_labels: Tensor, ks: Sequence[int], *, chunk_bytes: int = CHUNK_BYTES
) -> Scores:
    """Score of the best class, and that class, for every test embedding and every k, from one pass over the gallery.

    Embeddings need not be normalised; a zero vector has similarity 0 to everything. float16 and bfloat16 are computed
    in float32. Of classes with equal scores the lowest is predicted.

    Args:
        test: (M, D) embeddings, M ≥ 0.
        gallery: (N, D) embeddings of the known classes' training images, on the device of `test`.
        gallery_labels: (N,) integers 0..C-1, in any order, each at least max(ks) times.
        ks: numbers of neighbours to sum over, each at least 1.
        chunk_bytes: about the most memory to use beyond inputs, outputs and the order of the labels (16 bytes a label).

    Returns:
        `Scores` of shape (M, len(ks)), column j for ks[j]; float32, or float64 if one of the inputs is.

    Raises:
        ValueError: on wrong shapes, non-finite embeddings, labels that are not 0..C-1, a class with fewer than max(ks)
            gallery images, or `ks` or `chunk_bytes` out of range.
    """
    members = _members(test, gallery, gallery_labels, ks)
    predictions = torch.zeros(len(test), len(ks), dtype=torch.int64, device=test.device)
    scores = torch.full(predictions.shape, -torch.inf, dtype=_dtype(test, gallery), device=test.device)
    for rows, label, sums in _class_sums(test, gallery, members, ks, chunk_bytes):
        # Classes come in ascending order, so a strict comparison leaves ties with the lowest one.
        predictions[rows].masked_fill_(sums > scores[rows], label)
        torch.maximum(scores[rows], sums, out=scores[rows])
    return Scores(scores, predictions)


@torch.no_grad()
def class_scores(
    test: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Scores of all classes, (M, C) in [-k, k], for a single k. Arguments and errors are those of `score`."""
    members = _members(test, gallery, gallery_labels, [k])
    scores = torch.empty(len(test), len(members), dtype=_dtype(test, gallery), device=test.device)
    for rows, label, sums in _class_sums(test, gallery, members, [k], chunk_bytes):
        scores[rows, label] = sums[:, 0]
    return scores


class Neighbours(NamedTuple):
    """The nearest gallery images of M test images, nearest first."""

    similarities: Tensor  # (M, n), cosines in [-1, 1]
    rows: Tensor  # (M, n) int64, in [0, N)


@torch.no_grad()
def neighbours(test: Tensor, gallery: Tensor, n: int, *, chunk_bytes: int = CHUNK_BYTES) -> Neighbours:
    """The `n` gallery embeddings of largest cosine similarity to every test embedding, whatever their class.

    Args:
        test: (M, D) embeddings, M ≥ 0.
        gallery: (N, D) embeddings, on the device of `test`.
        n: 0 to N.
        chunk_bytes: about the most memory to use beyond inputs and outputs.

    Raises:
        ValueError: if `n` or a shape is out of range.
    """
    if test.ndim != 2 or gallery.ndim != 2 or test.shape[1] != gallery.shape[1]:
        raise ValueError(f"embeddings must be (rows, D) of one D, got {tuple(test.shape)} and {tuple(gallery.shape)}")
    if not 0 <= n <= len(gallery):
        raise ValueError(f"n must be within 0 to the {len(gallery)} gallery images, got {n}")
    dtype = _dtype(test, gallery)
    similarities = torch.empty(len(test), n, dtype=dtype, device=test.device)
    nearest = torch.empty(len(test), n, dtype=torch.int64, device=test.device)
    if n == 0 or len(test) == 0:
        return Neighbours(similarities, nearest)
    height, width = _tile(test, len(gallery), n, dtype.itemsize, chunk_bytes)
    for start in range(0, len(test), height):
        rows = slice(start, min(start + height, len(test)))
        queries = _unit(test[rows], dtype)
        best, found = queries.new_empty(len(queries), 0), nearest.new_empty(len(queries), 0)
        for first in range(0, len(gallery), width):
            block = _unit(gallery[first : first + width], dtype)
            candidates = torch.cat([best, queries @ block.T], dim=1)
            best, place = candidates.topk(min(n, candidates.shape[1]))
            here = torch.arange(first, first + len(block), device=test.device).expand(len(queries), -1)
            found = torch.cat([found, here], dim=1).gather(1, place)
        similarities[rows], nearest[rows] = best, found
    return Neighbours(similarities, nearest)


def calibrate_threshold(known_scores: Tensor, accept: float = 0.95) -> float:
    """The largest threshold t with #{s ≥ t} / n ≥ accept over the scores of held-out known images.

    It is always one of the scores. Where it is tied, all images that share it are accepted.

    Args:
        known_scores: (n,) scores, n ≥ 1.
        accept: the least share to accept, in (0, 1].

    Raises:
        ValueError: if there are no scores, one is not finite, or `accept` is out of range.
    """
    if known_scores.ndim != 1 or len(known_scores) == 0:
        raise ValueError(f"known_scores must be a non-empty vector, got shape {tuple(known_scores.shape)}")
    if not torch.isfinite(known_scores).all():
        raise ValueError("known_scores must be finite")
    if not 0 < accept <= 1:
        raise ValueError(f"accept must be in (0, 1], got {accept}")
    # Shares are compared as quotients: ceil(accept * n) would round 0.07 * 100 up to 8 images.
    shares = torch.arange(1, len(known_scores) + 1, dtype=torch.float64) / len(known_scores)
    accepted = int((shares < accept).sum()) + 1
    return float(known_scores.sort(descending=True).values[accepted - 1])


def decide(scores: Tensor, predictions: Tensor, threshold: float) -> Tensor:
    """`predictions` with `UNKNOWN` wherever the score is below `threshold`, in the common shape of both.

    Raises:
        ValueError: if the shapes of `scores` and `predictions` differ.
    """
    if scores.shape != predictions.shape:
        raise ValueError(
            f"scores and predictions must have one shape, got {tuple(scores.shape)} and {tuple(predictions.shape)}"
        )
    return predictions.where(scores >= threshold, UNKNOWN)


def _members(test: Tensor, gallery: Tensor, gallery_labels: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """The gallery rows of every class, after checking that these inputs can be scored."""
    for name, embeddings in (("test", test), ("gallery", gallery)):
        if embeddings.ndim != 2 or embeddings.shape[1] == 0:
            raise ValueError(f"{name} embeddings must be (rows, dimensions), got shape {tuple(embeddings.shape)}")
        # The extremes show an infinity or a NaN without isfinite's temporaries, which are as large as the input.
        if embeddings.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(embeddings)):
            raise ValueError(f"{name} embeddings must be finite")
    if test.shape[1] != gallery.shape[1]:
        raise ValueError(f"test has {test.shape[1]} dimensions, the gallery {gallery.shape[1]}")
    if len(gallery) == 0:
        raise ValueError("the gallery is empty")
    if gallery_labels.shape != gallery.shape[:1] or gallery_labels.is_floating_point():
        raise ValueError(
            f"gallery_labels must be {len(gallery)} integers, one per gallery row, "
            f"got shape {tuple(gallery_labels.shape)} of {gallery_labels.dtype}"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be one or more positive integers, got {list(ks)}")

    lowest, highest = (int(extreme) for extreme in torch.aminmax(gallery_labels))
    # N images cannot fill classes above N-1, and the counts below should not be sized by a stray label.
    if lowest < 0 or highest >= len(gallery):
        raise ValueError(f"gallery_labels must be 0..C-1, got {lowest}..{highest} for {len(gallery)} images")
    counts = torch.bincount(gallery_labels).tolist()
    fewest = min(counts)
    smallest = counts.index(fewest)
    if fewest == 0:
        raise ValueError(f"gallery_labels must be 0..C-1 without gaps, but class {smallest} has no gallery image")
    if fewest < max(ks):
        raise ValueError(
            f"class {smallest} has {fewest} gallery images, fewer than k = {max(ks)}: use k of at most {fewest}"
        )
    order = torch.argsort(gallery_labels, stable=True).to(gallery.device)
    return list(order.split(counts))


def _class_sums(
    test: Tensor, gallery: Tensor, members: list[Tensor], ks: Sequence[int], chunk_bytes: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (test rows, class, (rows, K) top-k sums): chunk by chunk, the classes of each in ascending order."""
    k_max = max(ks)
    dtype = _dtype(test, gallery)
    height, width = _tile(test, max(map(len, members)), k_max, dtype.itemsize, chunk_bytes)
    columns = torch.tensor(ks, device=test.device) - 1
    memory = torch.empty(height * (k_max + width), dtype=dtype, device=test.device)

    for start in range(0, len(test), height):
        rows = slice(start, min(start + height, len(test)))
        queries = _unit(test[rows], dtype)
        for label, rows_of_class in enumerate(members):
            top = queries.new_full((len(queries), k_max), -torch.inf)
            for block in rows_of_class.split(width):
                # The best so far stand beside the new similarities, so that one topk also merges the blocks.
                window = memory[: len(queries) * (k_max + len(block))].view(len(queries), -1)
                window[:, :k_max] = top
                torch.mm(queries, _unit(gallery[block], dtype).T, out=window[:, k_max:])
                top = window.topk(k_max).values
            yield rows, label, top.cumsum(dim=1)[:, columns]


def _tile(test: Tensor, largest_class: int, k_max: int, itemsize: int, chunk_bytes: int) -> tuple[int, int]:
    """How many test rows and gallery rows to compare at a time, so that all temporaries fit in `chunk_bytes`.

    A gallery row costs 4 vectors while it is normalised. A test row costs the same, its similarities, and 7 times k_max
    numbers for the best so far (twice), topk's values and 64-bit indices, and their sums.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    rows, dimension = test.shape
    numbers = chunk_bytes // itemsize
    # Near a square, and at most half the memory for gallery rows, so that no side is cut into needlessly many pieces.
    width = max(1, min(largest_class, math.isqrt(numbers), numbers // (8 * dimension)))
    height = max(1, min(rows, (numbers - width * 4 * dimension) // (width + 4 * dimension + 7 * k_max)))
    return height, width


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows scaled to length 1; zero rows stay zero."""
    rows = rows.to(dtype)
    # Dividing by the largest entry first keeps the squares of very large or small entries in the type's range.
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
    return functional.normalize(rows / largest.clamp_min(torch.finfo(dtype).tiny), dim=1)


def _dtype(test: Tensor, gallery: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(test.dtype, gallery.dtype), torch.float32)
