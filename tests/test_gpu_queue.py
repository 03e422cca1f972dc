"""The queue of long jobs, driven with a job that takes no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUEUE = Path(__file__).resolve().parents[1] / "data_scripts" / "gpu_queue.py"

# Counts to `goal`, writes a checkpoint at each step, and dies at `die_at` when it starts from 0.
SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--settings", type=pathlib.Path)
parser.add_argument("--out", type=pathlib.Path)
arguments = parser.parse_args()
settings = json.loads(arguments.settings.read_text())
checkpoint = arguments.out / "checkpoint.json"
begin = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
print("from", begin)
for step in range(begin, settings["goal"]):
    if begin == 0 and step == settings.get("die_at"):
        raise SystemExit(3)
    checkpoint.write_text(json.dumps(step + 1))
(arguments.out / "result.json").write_text(json.dumps(settings["goal"]))
"""


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "count.py").write_text(SCRIPT)
    return tmp_path


def add_job(project: Path, name: str, **entries: object) -> None:
    job = {"script": "count.py", "settings": {"goal": 5}} | entries
    (project / "jobs" / f"{name}.json").write_text(json.dumps(job))


def run(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "OUT"}
    return subprocess.run(
        [sys.executable, str(QUEUE), "--jobs", "jobs"],
        cwd=project,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def test_an_empty_queue_is_no_error(project):
    done = run(project)
    assert done.returncode == 0
    assert done.stdout.strip() == "no pending job"


def test_jobs_run_in_order_of_name_one_per_call(project):
    add_job(project, "b_second")
    add_job(project, "a_first")
    for name in ("a_first", "b_second"):
        done = run(project)
        assert done.returncode == 0, done.stderr
        assert f"{name}: running" in done.stdout
        record = json.loads((project / "gpu_out" / name / "done.json").read_text())
        assert record["seconds"] > 0
        assert record["settings"] == {"goal": 5}
    assert run(project).stdout.strip() == "no pending job"


def test_a_job_that_died_stays_first_and_resumes(project):
    add_job(project, "a_fragile", settings={"goal": 5, "die_at": 3})
    add_job(project, "b_other")
    died = run(project)
    assert died.returncode == 1
    assert "exit code 3" in died.stderr
    assert not (project / "gpu_out" / "a_fragile" / "done.json").exists()
    again = run(project)
    assert again.returncode == 0
    assert "from 3" in again.stdout
    assert json.loads((project / "gpu_out" / "a_fragile" / "result.json").read_text()) == 5


def test_out_names_the_folder_and_an_earlier_checkpoint_is_carried_over(project):
    add_job(project, "a_fragile", settings={"goal": 5, "die_at": 2})
    assert run(project).returncode == 1
    out = project / "elsewhere"
    out.mkdir()
    again = run(project, OUT=str(out))
    assert again.returncode == 0
    assert "from 2" in again.stdout
    assert (out / "a_fragile" / "done.json").is_file()


def test_changed_settings_start_afresh(project):
    add_job(project, "a", settings={"goal": 5, "die_at": 2})
    assert run(project).returncode == 1
    add_job(project, "a", settings={"goal": 3})
    changed = run(project)
    assert changed.returncode == 0
    assert "from 0" in changed.stdout
    add_job(project, "a", settings={"goal": 4})
    assert "a: running" in run(project).stdout


def test_a_script_can_import_what_lies_in_the_root(project):
    (project / "library.py").touch()
    (project / "imports.py").write_text("import library")
    add_job(project, "a", script="imports.py")
    assert run(project).returncode == 0


def test_committed_results_count_as_done(project):
    (project / "results").mkdir()
    (project / "results" / "a.json").write_text("{}")
    add_job(project, "a", results=["results/a.json"])
    assert run(project).stdout.strip() == "no pending job"


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"script": "absent.py"}, "absent.py"),
        ({"settings": [1]}, "settings"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_a_bad_job_is_named(project, entries, word):
    add_job(project, "a_bad", **entries)
    done = run(project)
    assert done.returncode == 2
    assert "a_bad" in done.stderr
    assert word in done.stderr
