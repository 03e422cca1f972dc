"""The script that measures the seconds of INR: its rows, its job, its trial."""

from __future__ import annotations

import dataclasses
import importlib
import json
import operator
import sys
from pathlib import Path

import pytest

from reglib.methods import hash_grid, inr

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("inr_speed")
finally:
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def quick(monkeypatch):
    """In this process, with few steps, and graphs that no compiler turns into code."""
    monkeypatch.setattr(script, "alone", operator.call)
    monkeypatch.setattr(hash_grid, "BACKEND", "aot_eager")
    short = {name: dataclasses.replace(one, steps=2) for name, one in inr.PRESETS.items()}
    monkeypatch.setattr(inr, "PRESETS", short)
    monkeypatch.setitem(script.METHODS, 2, {"robust": (False,), "paper": (False, True)})


def hashed(method, shape):
    part = method.image
    cells = part.cells(part.coarsest, shape), part.cells(part.finest, shape)
    return any(hash_grid.HashGrid(*cells, levels=part.levels, table=part.table).hashed)


def test_what_has_a_hashed_level_is_compiled_as_well():
    rows = list(script.tasks([script.TILE, script.HEAD_1MM]))
    assert [row.shape for row in rows] == [script.TILE] * 4 + [script.HEAD_1MM] * 2
    for row in rows:
        method = inr.PRESETS.get(row.method, inr.INR())
        assert hashed(method, row.shape) == (dataclasses.replace(row, compiled=True) in rows)


def test_a_job_measures_every_row_once(tmp_path, monkeypatch, quick, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"shapes": [[24, 32]]}))
    words = ["--settings", str(tmp_path / "settings.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["inr_speed.py", *words])
    script.main()
    path = tmp_path / script.NAME
    [run] = json.loads(path.read_text())["runs"]
    assert run["device"] == "cpu"
    assert [(row["method"], row["compiled"]) for row in run["rows"]] == [
        ("robust", False),
        ("paper", False),
        ("paper", True),
    ]
    for row in run["rows"]:
        assert row["seconds"] > 0
        assert row["first_seconds"] > 0
        assert row["peak_memory"] > 2**20
    content = json.loads(path.read_text())
    content["runs"][0]["rows"].pop()
    path.write_text(json.dumps(content))
    capsys.readouterr()
    script.main()
    [again] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (again["method"], again["compiled"]) == ("paper", True)


def test_a_trial_writes_nothing(monkeypatch, quick, capsys):
    path = ROOT / "results" / script.NAME
    before = path.read_bytes() if path.exists() else None
    monkeypatch.setattr(sys, "argv", ["inr_speed.py", "--shape", "24", "32"])
    script.main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert (path.read_bytes() if path.exists() else None) == before
