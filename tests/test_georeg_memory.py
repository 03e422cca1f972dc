"""The script that measures GeoReg's training step: its naive form, its rows, its judgements."""

from __future__ import annotations

import importlib
import importlib.util
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reglib.data.results import read_results
from reglib.methods import georeg

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("georeg_memory")
    timing = importlib.import_module("timing")
finally:
    sys.path.remove(str(SCRIPTS))

SIZE = (32, 32, 32)
FORMS = [script.NAIVE, script.OURS, script.LEAN, "VoxelMorph (MONAI)"]


@pytest.mark.parametrize("interpolation", [2, 3])
def test_the_naive_form_is_the_same_network(interpolation):
    """Field and gradients in float64: sums in another order."""
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 2, 1, 8, 12, 8, generator=generator).double()
    found = []
    for make in (lambda x: x, script.unfolded):
        torch.manual_seed(0)
        network = georeg.GeoReg(
            dimensions=3, channels=(4, 6, 8), interpolation=interpolation, spacing=(1.0, 2.0, 0.5)
        )
        for name, p in network.named_parameters():
            if name.endswith("head.2.weight"):
                torch.nn.init.normal_(p, std=0.3)
        network = make(network.double())
        field = network(moving, fixed).field
        field.square().sum().backward()
        found.append((field, {name: p.grad for name, p in network.named_parameters()}))
    (field, gradients), (naive, of_naive) = found
    assert any(type(one) is script.Unfolded for one in network.modules())
    torch.testing.assert_close(naive, field, atol=1e-10, rtol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_naive[name], gradient, atol=1e-8, rtol=1e-8, msg=name)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The script as a job of the queue, at a shape that takes no time."""
    (tmp_path / "settings.json").write_text(
        json.dumps({"sizes": [SIZE], "steps": 1, "networks": FORMS})
    )
    monkeypatch.setattr(script, "alone", operator.call)
    words = ["--settings", str(tmp_path / "settings.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["georeg_memory.py", *words])
    script.main()
    return tmp_path / script.NAME


def test_a_job_measures_every_network_and_goes_on_where_it_was(job, capsys):
    content = json.loads(job.read_text())
    [run] = content["runs"]
    assert run["device"] == "cpu"
    assert run["provenance"]["commit"]
    steps = {row["network"]: row for row in run["rows"] if row["kind"] == "step"}
    assert list(steps) == FORMS
    for name, row in steps.items():
        if name.startswith("VoxelMorph") and importlib.util.find_spec("monai") is None:
            assert row["left_out"] == "monai is not installed"
            continue
        assert row["seconds"] > 0
        assert row["parameters"] > 0
        assert row["base_memory"] > 2**20
        assert row["shape"] == row["padded"] == list(SIZE)
    naive, ours = (
        next(row for row in run["rows"] if (row["network"], row["kind"]) == (name, "kept"))
        for name in (script.NAIVE, script.OURS)
    )
    # Who is not concerned keeps the same, and the attention of the finest level much less.
    assert naive["kept"]["encoder"] == ours["kept"]["encoder"]
    part = "interpolation, level 0"
    assert 2 * ours["kept"][part] < naive["kept"][part]
    attentions = [row for row in run["rows"] if row["kind"] == "attention"]
    assert len(attentions) == 2 * 3
    assert {(row["channels"], row["size"]) for row in attentions} == {(16, 2), (32, 3)}
    # Stopped before the last row.
    rows = run["rows"]
    content["runs"][0]["rows"] = rows[:-1]
    job.write_text(json.dumps(content))
    capsys.readouterr()
    script.main()
    measured = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in measured if "kind" in row] == ["attention"]
    again = json.loads(job.read_text())["runs"][0]["rows"]
    assert again[:-1] == rows[:-1]
    assert len(again) == len(rows)


def test_images_are_padded_to_the_multiple_of_the_network():
    names = (script.OURS, script.LEAN, "TransMorph, small")
    for name, multiple in zip(names, (32, 32, 16), strict=True):
        assert script.made(name)[2] == multiple
    assert script._padded((80, 96, 80), 32) == (96, 96, 96)
    assert script._padded((80, 96, 80), 16) == (80, 96, 80)


def row(network, shape, memory=None, seconds=1.0, **more):
    head = {"network": network, "kind": "step", "shape": list(shape), "padded": list(shape)}
    measured = {} if memory is None else {"peak_memory": memory, "seconds": seconds}
    return head | measured | more


def test_what_would_not_fit_is_estimated_and_said_to_be():
    rows = [row(script.NAIVE, SIZE, 10**8), row(script.OURS, SIZE, 10**7)]
    task = script.Task(script.NAIVE, (60, 64, 64))
    found = script.estimated(task, rows, 7 * 10**8)
    assert found["estimated_memory"] == 8 * 10**8
    assert found["padded"] == [64, 64, 64]
    assert found["estimated_from"] == list(SIZE)
    assert "seconds" not in found
    assert "peak_memory" not in found
    assert script.estimated(task, rows, 8 * 10**8) is None
    other = script.Task(script.OURS, (60, 64, 64))
    assert script.estimated(other, rows, 7 * 10**7)["estimated_memory"] == 8 * 10**7
    peer = "VoxelMorph (MONAI)"
    assert (
        script.estimated(script.Task(peer, (60, 64, 64)), [*rows, row(peer, SIZE, 10)], 1) is None
    )
    assert script.estimated(task, [], 1) is None


def test_parts_are_measured_at_a_middle_size_and_large_steps_are_not_profiled():
    sizes = [(n, n, n) for n in (8, 16, 32, 64)]
    for count, middle in ((1, 8), (2, 8), (3, 16), (4, 16)):
        kept = [t for t in script.tasks([script.OURS], sizes[:count]) if t.kind == "kept"]
        assert [task.shape for task in kept] == [(middle,) * 3]
    found = script.measured(lambda: None, lambda: None, "cpu", 1, count=False)
    assert found.keys() == {"seconds", "peak_memory", "base_memory"}


def test_targets_are_judged_by_what_was_measured_alone():
    big = (80, 96, 80)
    rows = [
        row(script.NAIVE, SIZE, 1000, 2.0),
        row(script.OURS, SIZE, 500, 1.0),
        row(script.LEAN, SIZE, 200, 2.5),
        row(script.NAIVE, big, estimated_memory=10**11),
        row(script.LEAN, big, 4 * 10**9 + 1),
        row("VoxelMorph (MONAI)", SIZE, 1),
    ]
    found = script.targets(rows, "cpu")
    by_name = {(one["network"], one["what"]): (one["value"], one["met"]) for one in found}
    memory = "memory over that of the unfolded form"
    seconds = "seconds over those of the unfolded form"
    assert by_name == {
        (script.OURS, memory): (0.5, False),
        (script.OURS, seconds): (0.5, True),
        (script.LEAN, memory): (0.2, True),
        (script.LEAN, seconds): (1.25, False),
        (script.LEAN, "bytes of a step"): (4e9, False),
    }


def test_a_measurement_counts_what_a_step_holds_and_not_what_was_there():
    """In a process of its own, a step that holds 64 MiB and gives them back, above 32 MiB."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import georeg_memory as m\n"
        "held = torch.ones(2**23)\n"
        "step = lambda: torch.ones(2**24).sum()\n"
        "found = m.measured(step, lambda: None, 'cpu', 2)\n"
        "print(found['peak_memory'], found['peak_tensors'])"
    )
    resident, tensors = map(int, script_output(code).split())
    assert 0.95 * 2**26 < resident < 1.3 * 2**26
    assert 2**26 <= tensors < 2**26 + 1000


def script_output(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(SCRIPTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trial_writes_nothing_and_changes_that_are_not_committed_are_refused(monkeypatch, capsys):
    path = ROOT / "results" / script.NAME
    before = path.read_bytes() if path.exists() else None
    monkeypatch.setattr(script, "alone", operator.call)
    words = ["--sizes", "32x32x32", "--networks", script.OURS, "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["georeg_memory.py", *words])
    script.main()
    assert json.loads(capsys.readouterr().out.splitlines()[0])["network"] == script.OURS
    monkeypatch.setattr(sys, "argv", ["georeg_memory.py"])
    monkeypatch.setattr(timing, "provenance", lambda: {"uncommitted_changes": True})
    with pytest.raises(SystemExit, match="not committed"):
        script.main()
    assert (path.read_bytes() if path.exists() else None) == before


def test_the_committed_judgements_follow_from_the_committed_rows():
    content = read_results("georeg_memory")
    assert {key: content[key] for key in script.HEAD} == script.HEAD
    for run in content["runs"]:
        device = "cpu" if run["device"] == "cpu" else "cuda"
        assert run["targets"] == script.targets(run["rows"], device)
        names = [script._name(row) for row in run["rows"]]
        assert len(set(names)) == len(names)
        for row in run["rows"]:
            assert ("peak_memory" in row) == ("seconds" in row)
