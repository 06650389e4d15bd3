"""The one exception that stands for "you can fix this": bad input, missing data, unreachable services.

Every command line entry turns an `InputError` into one line on standard error and exit status 2; anything else that
escapes is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class InputError(Exception):
    """What the user gave cannot be used. The message is one line and names the remedy."""


def unknown_name(kind: str, name: object, known: Iterable[object]) -> InputError:
    """An `InputError` for a name that is not registered, listing the names that are."""
    return InputError(f"unknown {kind} {name!r}; known: {', '.join(str(item) for item in known)}")
