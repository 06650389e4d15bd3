"""Which body of a fused operation runs: Triton's on CUDA, PyTorch's elsewhere or where it is asked for."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_switched_off: ContextVar[bool] = ContextVar("pytorch_body", default=False)


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on `tensor` run their Triton body: on CUDA, with Triton installed and not switched off.

    The switch is `pytorch_body` for a block of code and GRADMIX_PYTORCH_BODY=1 in the environment for a whole process.
    It is looked at whenever an operation runs, in a compiled function too; a CUDA graph replays what it captured.
    """
    if _switched_off.get() or os.environ.get("GRADMIX_PYTORCH_BODY") == "1":
        return False
    return tensor.is_cuda and _triton_installed()


@contextmanager
def pytorch_body() -> Iterator[None]:
    """Within this context, in this thread, operations run their PyTorch body on every device."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
