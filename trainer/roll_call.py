"""Ranks that listen for each other, so that one that dies ends the others within a minute, and they name it.

A collective waits for every rank: without this, a host that loses its network leaves the others waiting for half an
hour. Each rank's sign of life goes through the key-value store at which the ranks met, past the collectives that may
be stuck. The first rank listens for all others, and they listen for it: 3 small requests a rank in `_PERIOD` seconds.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist

from data_pipeline import cli
from trainer.distributed import rank, world_size

_PERIOD = 2.0
"""Seconds between two signs of life."""
_PATIENCE = 40
"""Seconds without any, after which a rank counts as lost: longer than a rank that is compiling may take."""
_HURRY = 10
"""The same when a collective has failed already, so that it is only asked whose fault it was."""
_LEFT = "left"
_VERDICT = "verdict"


@contextmanager
def roll_call() -> Iterator[None]:
    """Within the block, end this process with one line and status 1 if another rank falls silent.

    All ranks enter it together. Who leaves by an exception stops to give signs of life and says why.
    """
    if world_size() == 1:
        yield
        return
    listener = _Listener()
    try:
        yield
    except BaseException as error:
        if _is_broken_collective(error):
            listener.ask_whose_fault()
        expected = isinstance(error, (cli.Preempted, KeyboardInterrupt))
        listener.leave(_LEFT if expected else f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        raise
    listener.leave(_LEFT)


@dataclass
class _Peer:
    """A rank that is listened for: the last it said, and for how many of this process's own seconds it is silent."""

    said: str = ""
    silent: int = 0

    @property
    def host(self) -> str:
        return self.said.partition(" ")[0] or "an unknown host"

    @property
    def last_words(self) -> str:
        """Why it left; empty while it gives signs of life."""
        words = self.said.partition(" ")[2]
        return "" if words.isdecimal() else words


class _Listener:
    def __init__(self) -> None:
        # A connection of its own: the store serves one request of a connection at a time, and some wait for long.
        self._store = dist.PrefixStore("roll-call", dist.distributed_c10d._get_default_store().clone())
        self._host, self._count = socket.gethostname(), 0
        self._gone, self._broken = threading.Event(), threading.Event()
        self._peers = {number: _Peer() for number in (range(1, world_size()) if rank() == 0 else [0])}
        # Apart, since a store on a lost host may never answer.
        self._talker = threading.Thread(target=self._talk, name="roll-call-talk", daemon=True)
        self._talker.start()
        threading.Thread(target=self._judge, name="roll-call-judge", daemon=True).start()

    def leave(self, words: str) -> None:
        self._gone.set()
        self._talker.join(_PERIOD)  # which may be about to say something else
        with suppress(RuntimeError):  # the store went with the first rank
            self._say(words)

    def ask_whose_fault(self) -> None:
        """After a collective failed, wait until it is known which rank is lost, which ends this process."""
        self._broken.set()
        time.sleep(2 * _HURRY)

    def _say(self, words: str) -> None:
        self._store.set(str(rank()), f"{self._host} {words}")

    def _read(self, keys: list[str]) -> list[str]:
        return [value.decode() for value in self._store.multi_get(keys)]

    def _talk(self) -> None:
        with suppress(RuntimeError):  # the first rank is gone, and the store with it
            while not self._gone.is_set():
                self._count += 1
                self._say(str(self._count))
                self._listen()
                if rank() != 0 and self._store.check([_VERDICT]):
                    self._end(self._read([_VERDICT])[0], aloud=False)
                self._gone.wait(_PERIOD)

    def _listen(self) -> None:
        # Reading waits for what nobody has said yet.
        heard = [number for number, peer in self._peers.items() if peer.said or self._store.check([str(number)])]
        for number, said in zip(heard, self._read([str(number) for number in heard]) if heard else ()):
            peer = self._peers[number]
            if said != peer.said:
                peer.said, peer.silent = said, 0

    def _judge(self) -> None:
        # Counted in seconds that this process lived through: a job that was suspended wakes up in peace.
        while not self._gone.wait(1.0):
            for peer in self._peers.values():
                peer.silent += peer.last_words != _LEFT
            # The first to fall silent; others may have stopped because of it.
            number, peer = max(self._peers.items(), key=lambda item: item[1].silent)
            if peer.silent >= (_HURRY if self._broken.is_set() else _PATIENCE):
                self._end(self._verdict(number, peer), aloud=rank() < 2)

    def _verdict(self, number: int, peer: _Peer) -> str:
        if peer.last_words:
            return f"rank {number} on {peer.host} stopped ({peer.last_words})"
        return f"rank {number} on {peer.host} has died, or its host cannot be reached: silent for {peer.silent} s"

    def _end(self, verdict: str, *, aloud: bool) -> None:
        if self._gone.is_set():
            return
        if aloud:
            print(f"error: {verdict}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        if rank() == 0:
            with suppress(RuntimeError):
                self._store.set(_VERDICT, verdict)
            time.sleep(2 * _PERIOD)  # the others read it from the store, which ends with this process
        os._exit(1)


def _is_broken_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
