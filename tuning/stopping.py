"""Ctrl-C, SIGTERM and SIGUSR1 in a search: it ends at once, and `--resume` goes on with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback

from data_pipeline.cli import EXIT_INTERRUPTED, EXIT_REQUEUE, Preempted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []


class Stopping(Callback):
    """Takes the signals from Tune, which would return after one as if all trials had been run, and from Ray."""

    def setup(self, *args: Any, **info: Any) -> None:
        # Tune has set its own handlers just before.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    _received.append(number)
    raise KeyboardInterrupt  # the one exception of a handler that Ray's own code passes on


@contextmanager
def preempted_by_signals() -> Iterator[None]:
    """Turns the end that a signal makes of the block into `Preempted`, and leaves the handlers as they were."""
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    _received.clear()
    try:
        yield
    except KeyboardInterrupt as error:
        by_hand = not _received or _received[-1] == signal.SIGINT
        raise Preempted(EXIT_INTERRUPTED if by_hand else EXIT_REQUEUE) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
