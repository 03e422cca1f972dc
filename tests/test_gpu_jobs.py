"""The committed jobs of ``make gpu``: that they fit together, and two of them with few steps."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main

from reglib.cli import app
from reglib.synth import random_pair

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("pretraining")
    brains = importlib.import_module("brains")
    queue = importlib.import_module("gpu_queue")
finally:
    sys.path.remove(str(SCRIPTS))

JOBS = sorted((SCRIPTS / "gpu_jobs").glob("*.json"))
TRAININGS = [path for path in JOBS if json.loads(path.read_text())["script"].endswith("ining.py")]
#: What comes back from a borrowed machine: so many files, each of so many bytes.
FILES, BYTES = 8, 16 * 2**20


def settings(path: Path) -> dict:
    return json.loads(path.read_text())["settings"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_queue_can_read_a_job(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = queue.Job.read(path)
    assert re.fullmatch(r"\d{3}_\w+", job.name)
    assert json.loads(path.read_text())["about"].endswith(".")


def test_the_trainings_are_all_runs_of_the_size_each_once():
    found = [name for path in TRAININGS for name in settings(path)["runs"]]
    assert len(set(found)) == len(found)
    assert {settings(path)["size"] for path in TRAININGS} == {"small"}
    assert set(found) == {run.name for run in script.runs_of(script.SIZES["small"])}


def test_what_matters_most_comes_first():
    runs = [script.Run.parse(name) for path in TRAININGS for name in settings(path)["runs"]]
    kinds = [
        "pretraining"
        if run.kind == "pretrain" and run.variant == "kl"
        else "further fractions"
        if run.percent in (20, 40, 60, 80)
        else "fractions"
        if run.variant in ("scratch", "kl")
        else "ablations"
        for run in runs
    ]
    assert list(dict.fromkeys(kinds)) == [
        "pretraining",
        "fractions",
        "ablations",
        "further fractions",
    ]
    assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index)


def test_weights_are_there_when_a_job_needs_them():
    made: dict[str, set[str]] = {}
    for path in TRAININGS:
        job = settings(path)
        at_hand = set().union(*(made[earlier] for earlier in job.get("after", [])))
        for run in map(script.Run.parse, job["runs"]):
            if run.kind == "pretrain":
                at_hand.add(run.name)
            elif run.variant != "scratch":
                assert f"pretrain-{run.variant}-{run.seed}" in at_hand
        made[path.stem] = {name for name in job["runs"] if name.startswith("pretrain")}


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_what_a_job_leaves_can_be_brought_home(path):
    """Three files of the queue, a record and weights for each run, and weights that were taken."""
    job = settings(path)
    assert 3 + 2 * len(job["runs"]) + len(job.get("after", [])) <= FILES


def test_weights_of_the_small_size_can_be_brought_home():
    network = script.new_network(script.SIZES["small"], 0)
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters <= 1_200_000
    # Weights and two moments of each.
    assert 3 * 4 * parameters <= 14 * 2**20 < BYTES


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what a job needs, with six small worlds for brains and almost no steps."""
    (tmp_path / "data_scripts").mkdir()
    modules = ("pretraining", "brains", "provenance", "timing", "trainings", "gpu_queue")
    for name in (*(f"{module}.py" for module in modules), "splits.json"):
        shutil.copy(SCRIPTS / name, tmp_path / "data_scripts")
    sizes = json.loads(json.dumps(script.SIZES))
    sizes["small"]["pretrain"]["steps"] = 2
    sizes["small"]["finetune"] |= {"steps": 2, "validate_every": 1}
    (tmp_path / "data_scripts" / "pretraining.json").write_text(json.dumps(sizes))
    splits = {"ixi_2mm": {p: [f"{p}{n}" for n in range(4)] for p in ("train", "validation")}}
    splits["ixi_2mm"]["test"] = ["test0"]
    (tmp_path / "data_scripts" / "splits.json").write_text(json.dumps(splits))
    arrays = {}
    for number, name in enumerate(n for part in splits["ixi_2mm"].values() for n in part):
        generator = torch.Generator().manual_seed(number)
        pair = random_pair((32, 32, 32), cell=8, count=30, generator=generator)
        arrays[f"{name}/image"] = (255 * pair.fixed[0, 0]).byte().numpy()
        arrays[f"{name}/labels"] = pair.fixed_labels[0, 0].byte().numpy()
    packed = tmp_path / brains.PACKED.relative_to(ROOT)
    packed.parent.mkdir(parents=True)
    np.savez(packed, **arrays)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    (tmp_path / "reglib").symlink_to(ROOT / "reglib")
    return tmp_path


def test_jobs_run_one_after_another_and_find_what_was_pretrained(project):
    jobs = project / "data_scripts" / "gpu_jobs"
    jobs.mkdir()
    chosen = [
        JOBS[0].parent / f"{name}.json" for name in ("100_pretrain_kl_0", "200_finetune_005_0")
    ]
    for path in chosen:
        shutil.copy(path, jobs)
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    for path in chosen:
        done = subprocess.run(
            [sys.executable, "data_scripts/gpu_queue.py"],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        folder = project / "gpu_out" / path.stem
        left = [file for file in folder.iterdir() if file.is_file()]
        assert len(left) <= FILES
        assert max(file.stat().st_size for file in left) <= BYTES
        for name in settings(path)["runs"]:
            record = json.loads((folder / f"{name}.json").read_text())
            assert record["run"] == name
            assert record["provenance"]["commit"]
    assert record["subjects"] == 1
    assert len(record["validation"]) == 2
    assert torch.tensor(record["test"]["dice"]).shape == (1, script.STRUCTURES)


def test_a_job_without_the_weights_it_starts_from_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="gpu_out/100_pretrain_kl_0"):
        script.take_weights("100_pretrain_kl_0", tmp_path / "out")


def test_the_largest_size_is_a_command_that_sees_the_papers_pairs(monkeypatch):
    size = script.SIZES["paper"]
    words = size["command"].split()
    assert words[:3] == ["reglib", "train", "pretrain"]
    command = typer.main.get_command(app)
    for name in words[1:3]:
        command = command.commands[name]
    given = command.make_context("pretrain", words[3:]).params
    assert given["preset"].value == size["preset"]
    assert given["lr"] == size["pretrain"]["lr"]
    pairs = given["steps"] * given["devices"] * given["nodes"] * given["batch"]
    assert pairs == size["pretrain"]["steps"] * size["pretrain"]["batch"] == 50 * 3000
    monkeypatch.setattr(sys, "argv", ["pretraining.py", "--size", "paper"])
    with pytest.raises(SystemExit, match="reglib train pretrain"):
        script.main()
