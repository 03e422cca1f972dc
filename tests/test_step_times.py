"""Step times: the script that measures them, and the tables and estimates that a page makes."""

from __future__ import annotations

import importlib
import itertools
import json
import operator
import re
import sys
from pathlib import Path

import pytest
from docutils import nodes

from reglib.data.results import read_results

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, BOOK = ROOT / "data_scripts", ROOT / "book"
sys.path[:0] = [str(SCRIPTS), str(BOOK)]
try:
    script = importlib.import_module("step_times")
    costs = importlib.import_module("sphinx_costs")
finally:
    for folder in (SCRIPTS, BOOK):
        sys.path.remove(str(folder))


# --- The script -----------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The script as a job of the queue, at a shape that takes no time; what calls it."""
    settings = {"parts": ["steps"], "sizes": ["cpu"], "steps": 1, "shape": [16, 16, 24]}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(script, "alone", operator.call)
    words = ["--settings", str(tmp_path / "settings.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_times.py", *words])
    script.main()
    return tmp_path / script.NAME


def test_a_job_measures_every_kind_of_step(job):
    content = json.loads(job.read_text())
    [run] = content["runs"]
    assert run["device"] == "cpu"
    assert run["provenance"]["commit"]
    rows = {row["kind"]: row for row in run["rows"]}
    assert rows.keys() == {"random pair", "forward", *script.STEPS}
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["peak_memory"] > 2**20
        assert row["shape"] == [16, 16, 24]
    settings = script.pretraining.SIZES["cpu"]
    assert rows["pretraining"]["batch"] == settings["pretrain"]["batch"]
    assert rows["fine-tuning"]["batch"] == 1
    whole = script.pretraining.new_network(settings, 0)
    parameters = sum(p.numel() for p in whole.parameters())
    for kind in ("forward", "whole network", "fine-tuning"):
        assert rows[kind]["parameters"] == parameters
    assert rows["pretraining"]["parameters"] < parameters


def test_a_job_that_was_stopped_measures_only_what_is_missing(job, capsys):
    content = json.loads(job.read_text())
    rows = content["runs"][0]["rows"]
    content["runs"][0]["rows"] = [row for row in rows if row["kind"] != "forward"]
    job.write_text(json.dumps(content))
    capsys.readouterr()
    script.main()
    measured = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["kind"] for line in measured] == ["forward"]
    again = json.loads(job.read_text())["runs"][0]["rows"]
    assert sorted(row["kind"] for row in again) == sorted(row["kind"] for row in rows)
    assert all(row in again for row in rows if row["kind"] != "forward")


def test_sizes_have_the_shapes_of_their_images():
    assert script.shape_of("cpu") == (40, 48, 40)
    assert script.shape_of("small") == (80, 96, 80)
    assert script.shape_of("paper") == (160, 192, 224)
    for name in script.pretraining.SIZES:
        settings = script.pretraining.transmorph.PRESETS[script.pretraining.SIZES[name]["preset"]]
        assert all(n % settings.size_multiple == 0 for n in script.shape_of(name))


def test_on_a_gpu_there_is_a_row_for_each_precision():
    cpu, gpu = (list(script.tasks(["steps"], ["small"], d, None)) for d in ("cpu", "cuda"))
    assert {task.precision for task in cpu} == {"float32"}
    assert len(gpu) == 1 + 2 * (len(cpu) - 1)
    assert len(set(gpu)) == len(gpu)


@pytest.mark.parametrize("kind", ["registration", "cohort"])
def test_registrations_are_measured_and_a_cohort_adds_something(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # workers import the method from there
    monkeypatch.setattr(script, "COHORT", 1)
    row = script.measure(script.Task(kind, (12, 14, 16)), "cpu", 1)
    assert row["mm"] == 2
    assert row["kind"] == kind
    assert row["seconds"] > 0


# --- The models -----------------------------------------------------------------------------


def test_a_cohort_takes_as_long_as_the_worker_with_most_pairs():
    """Counted out: pairs are dealt to workers like cards."""
    for pairs, workers in ((1, 1), (7, 3), (64, 64), (65, 64), (100_000, 64)):
        hands = [len(range(k, pairs, workers)) for k in range(workers)]
        assert costs.cohort_seconds(pairs, workers, 2.0, 0.5) == max(hands) * 2.5


def test_a_training_sees_all_pairs_and_waits_for_its_gradients():
    # Alone: pairs over batch, no exchange.
    assert costs.training_seconds(1000, 1, 0.5, 2, 10**6) == 500 * 0.5
    # In a ring of N each sends and receives (N - 1) / N of the gradient twice.
    alone, eight = (costs.training_seconds(8000, n, 0.5, 1, 25 * 10**6) for n in (1, 8))
    exchange = 2 * 7 / 8 * 100e6 / costs.BANDWIDTH
    assert eight == pytest.approx(1000 * (0.5 + exchange))
    assert alone / 8 < eight < alone


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0042, "4.2 ms"),
        (0.5, "0.5 s"),
        (42, "42 s"),
        (119, "119 s"),
        (600, "10 min"),
        (36000, "10 h"),
        (864000, "10 d"),
    ],
)
def test_durations_have_two_digits_and_a_unit(seconds, words):
    assert costs.duration(seconds) == words


# --- The tables -----------------------------------------------------------------------------


def made_up() -> dict:
    """Two devices, round figures."""

    def row(kind, seconds, **more):
        head = {"kind": kind, "shape": [80, 96, 80], "precision": "float32", "batch": 1}
        return head | {"seconds": seconds, "peak_memory": 2**30} | more

    def rows(factor):
        size = {"size": "small", "parameters": 10**6}
        return [
            row("random pair", 0.1 * factor, size="small"),
            row("forward", 0.2 * factor, **size),
            row("pretraining", 1.2 * factor, **size | {"batch": 2}),
            row("whole network", 1.0 * factor, **size),
            row("fine-tuning", 1.0 * factor, **size),
        ]

    own = [
        row("cohort", 0.5, mm=2),
        row("registration", 9.5, mm=2, method="affine + velocity"),
    ]
    provenance = {"cpu": "A CPU", "threads": 2, "torch": "2", "commit": "0123456789"}
    provenance["uncommitted_changes"] = False
    about = {"started": "2026-01-02T03:04:05Z", "load_before": 0.1, "provenance": provenance}
    return {
        "runs": [
            about | {"device": "cpu", "rows": rows(1) + own},
            about | {"device": "NVIDIA X", "rows": rows(0.01)},
        ]
    }


@pytest.mark.parametrize("name", costs.TABLES)
def test_every_table_has_its_columns_and_every_device_that_was_measured(name):
    content = made_up()
    columns, rows = costs.TABLES[name](content)
    assert rows
    assert all(len(row) == len(columns) for row in rows)
    text = json.dumps(rows)
    assert ("X" in text) == (name != "registrations")
    del content["runs"][1]
    assert "X" not in json.dumps(costs.TABLES[name](content)[1])
    table = costs.table_node(columns, rows)
    cells = [entry.astext() for entry in table.findall(nodes.entry)]
    assert [x.replace("\u00a0", " ") for x in cells] == [*columns, *itertools.chain(*rows)]
    # Between a number and its unit, and nowhere else, no line is broken.
    assert all(("\u00a0" in x) == bool(re.fullmatch(r"[\d.]+\s\w+", x)) for x in cells)


def test_tables_say_what_was_measured():
    content = made_up()
    assert costs.encoder_only(content)[1][0][-3:] == ["0.6 s", "1 s", "0.60"]
    registration = costs.registrations(content)[1][0]
    assert registration[3:5] == ["9.5 s", "0.5 s"]
    # 1,000 pairs of 10 s on one worker, and so on.
    found = {row[0]: row[3:] for row in costs.cohorts(content)[1] if row[2] == "cpu"}
    assert found["affine + velocity"][:3] == ["2.8 h", "21 min", "2.7 min"]
    assert found["affine + velocity"][3] == "12 d"
    # 75,000 steps of 1.2 s and two random pairs of 0.1 s.
    assert costs.trainings(content)[1][0][4] == costs.duration(75_000 * 1.4)


def test_a_busy_machine_and_uncommitted_changes_are_named():
    run = made_up()["runs"][0]
    assert costs.origin(run) == "A CPU, 2 threads, torch 2, commit 0123456, 2026-01-02"
    run["load_before"] = 3.21
    run["provenance"]["uncommitted_changes"] = True
    assert "with changes" in costs.origin(run)
    assert costs.origin(run).endswith("the machine was busy with other work (load 3.2)")


def test_rows_that_are_missing_are_an_error():
    content = made_up()
    for run in content["runs"]:
        run["rows"] = [row for row in run["rows"] if row["kind"] != "random pair"]
    with pytest.raises(LookupError, match="random pair"):
        costs.trainings(content)


def test_the_page_shows_every_table_from_the_committed_file_and_types_no_seconds():
    page = (BOOK / "scaling.md").read_text(encoding="utf-8")
    named = re.findall(r"```\{costs-table\} (\S+)", page)
    assert sorted(named) == sorted(costs.TABLES)
    content = read_results("step_times")
    for name in named:
        assert costs.TABLES[name](content)[1]
    text = page[page.index("## What it costs") :]
    assert "**These are estimates" in text
    # Only the paper's figures, which are minutes, and the assumption about the network.
    assert not re.search(r"\d\s?(s|ms|seconds|GiB)\b", text.replace("GB/s", ""))
