"""Writing files so that a crash, a kill or a full disk leaves either the old file or the new one, never a half."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` only if the block ends well.

    Raises:
        InputError: the disk is full, `path` is a folder, or no file can be made there; nothing was changed.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    partial = _partial(path)
    try:
        with full_disk_is_bad_input(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.touch()
            except OSError as error:
                if _is_full(error):
                    raise
                raise InputError(f"{path} cannot be written ({error.strerror}): name another place") from error
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`; it takes the place of `path` only if the block ends well.

    A kill in the instant of the exchange leaves no folder `path`, never a mixture of the two.
    """
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        outgoing = _partial(path.with_name(path.name + ".old"))
        if path.exists():
            path.rename(outgoing)
        partial.rename(path)
        shutil.rmtree(outgoing, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def full_disk_is_bad_input(path: Path) -> Iterator[None]:
    """What a library makes of a full disk while it writes `path`, as an `InputError`."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise InputError(
                f"the disk is full: {path} was not written; free space there or choose another folder"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    if error is None or isinstance(error, InputError):
        return False
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors and PyTorch raise errors of their own that only say so; PyTorch's archive writer not even that.
    text = str(error)
    said = "No space left on device" in text or "os error 28" in text or "PytorchStreamWriter failed" in text
    return said or _is_full(error.__cause__) or _is_full(error.__context__)


_prepared: set[Path] = set()
"""What this process has begun to write: another of its number, as in a container that was started again, may have been
here before."""


def _partial(path: Path) -> Path:
    """The name under which this process prepares `path`; what processes of this machine left that died is removed."""
    host, own = socket.gethostname(), os.getpid()
    for left in path.parent.glob(f".{path.name}.{host}-*.partial"):
        pid = left.name.removesuffix(".partial").rpartition("-")[2]
        dead = left not in _prepared if pid == str(own) else not Path("/proc", pid).exists()
        if pid.isdecimal() and dead:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{host}-{own}.partial")
    _prepared.add(partial)
    return partial


def write_json(path: Path, record: Any) -> None:
    """`record` as indented JSON, atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    """The JSON in `path`; an unreadable one is an `InputError` that names `what` it should have been."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {what} {path}: correct the path, or make it first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable {what} ({error}): delete it and make it again") from error


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
