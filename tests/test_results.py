"""Every number the book quotes says where it came from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from reglib.data.results import read_results

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "results").glob("*.json"))


def seconds(run: dict) -> float:
    """How long a run took: it says so, or what it timed does, of a pair."""
    if "seconds" in run:
        return run["seconds"]
    return sum(row["pairs"] * row["seconds"][0] for row in run["batches"].values())


def provenances(content: dict) -> list[dict]:
    """The record of each run in a file, or in each set of a file."""
    parts = [content] if "runs" in content else content.get("sets", {"": content}).values()
    runs = [run for part in parts for run in part.get("runs", [part])]
    return [run["provenance"] | {"seconds": seconds(run)} for run in runs]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_name_script_commit_hardware_and_seconds(path: Path) -> None:
    content = read_results(path.stem)
    assert content == json.loads(path.read_text())
    assert (ROOT / content["script"].split()[0]).exists()
    for record in provenances(content):
        assert len(record["commit"]) == 40
        assert record["cpu"]
        assert record["torch"]
        assert record["seconds"]
        assert not record["uncommitted_changes"]


@pytest.mark.parametrize(
    ("results", "calibration"),
    [
        (["fcn_hippocampus"], "fcn_steps"),
        (["georeg_synthetic"], "georeg_synthetic_steps"),
        (["georeg_synthetic_tuning"], "georeg_synthetic_explored_steps"),
        (["georeg_subjects", "georeg_layers"], "georeg_subjects_steps"),
        (["georeg_volumes"], "georeg_volumes_steps"),
    ],
)
def test_networks_of_a_table_were_trained_as_calibrated(
    results: list[str], calibration: str
) -> None:
    """Whoever trains them again takes as many steps; those trained for longer have none there."""
    steps = json.loads((ROOT / "data_scripts" / f"{calibration}.json").read_text())["steps"]
    contents = map(read_results, results)
    trained = [run for own in contents for run in own.get("training", own["runs"])]
    found = {run["network"]: run.get("settings", run.get("training"))["steps"] for run in trained}
    assert steps.keys() <= found.keys()
    assert {name: found[name] for name in steps} == steps


def test_missing_results_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_results"):
        read_results("no_such_results")


def test_a_machine_without_the_history_is_told_the_commit(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data_scripts"))
    code = importlib.import_module("provenance").code
    here, _ = code()
    assert len(here) == 40
    monkeypatch.setenv("REGLIB_COMMIT", "0123abcd")
    assert code() == ("0123abcd", False)
    monkeypatch.setenv("REGLIB_COMMIT", "0123abcd+")
    assert code() == ("0123abcd", True)
