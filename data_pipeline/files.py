"""Writing files so that a crash, a kill or a full disk leaves either the old file or the new one, never a half."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` only if the block ends well.

    Raises:
        InputError: the disk is full; nothing was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"the disk is full: {path} was not written; free space there or choose another folder"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """`record` as indented JSON, atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    """The JSON in `path`; an unreadable one is an `InputError` that names `what` it should have been."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable {what} ({error}): delete it and make it again") from error
