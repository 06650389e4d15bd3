"""What all commands have in common."""

from __future__ import annotations

import pytest

from data_pipeline import cli
from data_pipeline.errors import InputError


def test_bad_input_is_one_line_and_a_process_that_goes_on_is_not_one_that_ends(capsys):
    def fail() -> None:
        assert cli.ends_process()
        raise InputError("k is 0; set it to 1 or more")

    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: k is 0; set it to 1 or more\n"
    assert not cli.ends_process()


def test_tables_are_wide_where_no_terminal_says_how_wide_it_is(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.console().width == cli.WIDTH
    monkeypatch.setenv("COLUMNS", "90")
    assert cli.console().width == 90
