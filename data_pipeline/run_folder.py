"""The folder where a command leaves what it was asked (`config.json`), what came of it (`metrics.json`) and its log."""

from __future__ import annotations

import fcntl
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, read_json, write_json


@dataclass
class RunFolder:
    """An open run folder; one process at a time holds it. `console` also shows what is logged; None is silent."""

    path: Path
    console: Console | None = None
    _lock: IO[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"run folder {self.path} cannot be made ({error.strerror}): name another") from error
        try:
            self._lock = (self.path / ".lock").open("w")
            # Held until the process ends, however it ends: a crash leaves no stale lock.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing to {self.path}: wait for it or name another folder"
            ) from error
        except OSError as error:
            raise InputError(f"{self.path} cannot be locked ({error.strerror}): name another folder") from error

    def close(self) -> None:
        self._lock.close()

    def config(self) -> dict[str, Any] | None:
        """What the folder's last command was asked; None if it is new."""
        return _read(self.path / "config.json")

    def metrics(self) -> dict[str, Any] | None:
        """What came of it; None if it is not finished."""
        return _read(self.path / "metrics.json")

    def clear(self) -> None:
        """Forget configuration, metrics and log."""
        for name in ("config.json", "metrics.json", "log.txt"):
            (self.path / name).unlink(missing_ok=True)

    def write_config(self, record: dict[str, Any]) -> None:
        write_json(self.path / "config.json", record)

    def write_metrics(self, record: dict[str, Any]) -> None:
        write_json(self.path / "metrics.json", record)

    def log(self, text: str) -> None:
        """One line for the person watching and, with the time, for `log.txt`."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False)
        self._write(text)

    def log_progress(self, text: str) -> None:
        """A line that a person watching a progress bar does not need: for `log.txt`, and for a console without one."""
        if self.console is not None and not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False)
        self._write(text)

    def _write(self, text: str) -> None:
        log = self.path / "log.txt"
        with full_disk_is_bad_input(log), log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


@dataclass
class NullRunFolder:
    """The run folder as every rank but the first sees it: to read from."""

    path: Path
    console: None = None

    def close(self) -> None:
        pass

    def metrics(self) -> dict[str, Any] | None:
        return _read(self.path / "metrics.json")

    def log(self, text: str) -> None:
        pass

    def log_progress(self, text: str) -> None:
        pass


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path, path.stem) if path.is_file() else None


def source_commit() -> str:
    """The commit of the checkout this package runs from, "-dirty" if files differ; "" outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
