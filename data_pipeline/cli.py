"""What every command line entry does the same way: parse a configuration, log, and answer bad input with one line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro
from rich.console import Console

from data_pipeline.errors import InputError

Config = TypeVar("Config")

WIDTH = 140
"""Columns of a table where no terminal says how many there are."""
EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75
"""The work was put away in good order because the system asked for it: the same command goes on with it."""
EXIT_INTERRUPTED = 130


class Preempted(BaseException):
    """The system, or with Ctrl-C a person, asked this process to end; its work is saved, and it has said so."""

    def __init__(self, status: int = EXIT_REQUEUE) -> None:
        super().__init__(status)
        self.status = status


def console(*, quiet: bool = False) -> Console:
    """What a command prints to."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(soft_wrap=True, width=width, quiet=quiet)


_ends_process = False


def ends_process() -> bool:
    """Whether what runs is a command, whose process ends with it; elsewhere, in a notebook say, others go on in it."""
    return _ends_process


@contextmanager
def on_signals(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within the block these signals call `handler`. After it they do what they did before; but where a command was
    `Preempted` they do nothing any more: whoever hurries it, as launchers do, must not change its status."""
    handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    except Preempted:
        if ends_process():
            handlers = dict.fromkeys(handlers, signal.SIG_IGN)
        raise
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


def run(main: Callable[[], None]) -> None:
    """Run `main` and end the process: 0, 2 with one line on standard error for an `InputError`, 75 when preempted, 130
    after Ctrl-C."""
    global _ends_process
    _ends_process = True
    try:
        main()
    except InputError as error:
        # What all ranks find wrong is said once.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        # The reader, such as `head`, has had enough; nothing may be written when the interpreter ends, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Preempted as preempted:
        sys.exit(preempted.status)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _ends_process = False


def parse(
    config: type[Config],
    *,
    prog: str,
    description: str,
    default: Config | None = None,
    args: Sequence[str] | None = None,
) -> Config:
    """`config` from the command line; flags, help, units and defaults come from the dataclass and its docstrings."""
    options = {} if default is None else {"default": default}
    # Of a field that may be one of several configurations, the default's alone has flags.
    settled = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(config, prog=prog, description=description, args=args, config=settled, **options)
