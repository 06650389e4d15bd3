"""Ranks: who am I, how many are we, a gather through which gradients flow, and deciding and failing together.

Everything here is what one process alone would do when `torch.distributed` is not initialised.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import InputError

Result = TypeVar("Result")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """1 also for what `from_first_rank` runs: the others take no part in it, and a collective would wait for them."""
    return dist.get_world_size() if dist.is_initialized() and not _alone.get() else 1


def gather(tensor: Tensor) -> Tensor:
    """`tensor` (...) of all ranks, stacked by rank: (R, ...), with gradients.

    In the backward pass a rank receives the sum over ranks of the gradients of its part. If every rank's loss is its
    share of the whole and gradients are averaged over ranks afterwards, as DeepSpeed and DDP do, the result is the
    gradient of the mean of the losses.
    """
    if world_size() == 1:
        return tensor.unsqueeze(0)
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.shape = tensor.shape
        parts = tensor.new_empty(world_size() * tensor.numel())
        dist.all_gather_into_tensor(parts, tensor.flatten())
        return parts.view(-1, *tensor.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(ctx.shape.numel())
        dist.reduce_scatter_tensor(own, gradient.flatten())
        return own.view(ctx.shape)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over ranks, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over ranks, without gradient."""
    return sum_over_ranks(tensor) / world_size()


class SharedError(InputError):
    """One that every rank raises at the same place, so that together they may go on after it."""


def from_first_rank(action: Callable[[], Result]) -> Result:
    """What `action` returns on the first rank, the only one to run it. It may take longer than a collective waits, such
    as a download or an evaluation does.

    Raises:
        SharedError: it raised an `InputError`, or on the other ranks anything else, which the first one raises itself.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if rank() == 0:
        try:
            with _by_itself():
                outcome[0] = action()
        except InputError as error:
            outcome[1] = str(error)
        except Exception as error:
            own, outcome[1] = error, f"the first rank failed ({type(error).__name__}: {error})"
    _wait_for_first_rank()
    dist.broadcast_object_list(outcome)
    if own is not None:
        raise own
    if outcome[1] is not None:
        raise SharedError(outcome[1])
    return outcome[0]


@contextmanager
def _by_itself() -> Iterator[None]:
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


_waits = itertools.count()


def _wait_for_first_rank() -> None:
    """Return on every rank once the first one is here, however late: no collective begins before, which would give up
    after minutes. That the first rank still lives is `trainer.roll_call`'s to say."""
    store, key = dist.PrefixStore("first-rank", dist.distributed_c10d._get_default_store()), str(next(_waits))
    if rank() == 0:
        store.set(key, "")
    pause = 0.001
    while rank() != 0 and not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
