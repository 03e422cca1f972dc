from __future__ import annotations

import pytest

import reglib
from reglib.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"reglib {reglib.__version__}\n"


def test_without_a_command_it_says_what_is_planned(capsys):
    assert main([]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "planned" in line
    assert reglib.REPOSITORY in line


@pytest.mark.parametrize("arguments", [["register"], ["--nonsense"]])
def test_a_word_it_does_not_know_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: reglib" in capsys.readouterr().err
