"""What is written is there whole or not at all, whatever an earlier process left."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest

from data_pipeline.errors import InputError
from data_pipeline.files import replacing, replacing_folder
from data_pipeline.run_folder import RunFolder


@pytest.mark.parametrize("number", ["its own", "nobody's"])
def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, number):
    """In a container that is started again, the process often has the number of the one before it."""
    pid = {"its own": os.getpid(), "nobody's": 2**22 + 1}[number]
    left = tmp_path / f".step.{socket.gethostname()}-{pid}.partial"
    left.mkdir()
    (left / "half").touch()
    with replacing_folder(tmp_path / "step") as partial:
        (partial / "whole").touch()
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["whole"] and not left.exists()


def test_what_another_process_is_writing_stays(tmp_path):
    theirs = tmp_path / f".step.{socket.gethostname()}-{os.getppid()}.partial"
    theirs.mkdir()
    with replacing_folder(tmp_path / "step"), replacing(tmp_path / "step.json") as file:
        file.write_text("{}")
    assert theirs.exists() and (tmp_path / "step.json").read_text() == "{}"


def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"the disk is full: .*log.txt was not written"):
        run.log("x")


def test_a_folder_that_takes_no_locks_is_not_said_to_be_in_use(tmp_path, monkeypatch):
    held = RunFolder(tmp_path)
    with pytest.raises(InputError, match="another process is writing"):
        RunFolder(tmp_path)
    held.close()

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InputError, match=r"cannot be locked \(No locks available\): name another folder"):
        RunFolder(tmp_path)
