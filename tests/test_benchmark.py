"""The benchmark of the classical methods: its pairs, its processes, its records, its arithmetic.

The peers themselves live in an environment of their own; SimpleITK, which is also at hand here,
stands for them.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from reglib.data.nifti import Image, read_field, write_field, write_image
from reglib.geometry.affine import rigid_matrix

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    benchmark = importlib.import_module("benchmark_classical")
    records = importlib.import_module("benchmark_record")
    peers = importlib.import_module("peers")
finally:
    sys.path.remove(str(SCRIPTS))


def placed(shape=(20, 24, 22), spacing=(2.0, 1.5, 1.0)) -> torch.Tensor:
    """The affine of a turned, anisotropic grid."""
    turn = rigid_matrix(
        torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64),
        torch.tensor([[5.0, -7.0, 11.0]], dtype=torch.float64),
        centre=torch.zeros(1, 3, dtype=torch.float64),
    )[0]
    return turn @ torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))


# --- Settings -------------------------------------------------------------------------------


def test_requirements_are_exact_and_agree_with_the_other_oracles():
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
        return dict(line.split("==") for line in lines)

    mine, others = pins(benchmark.REQUIREMENTS), pins(ROOT / "requirements-oracles.txt")
    assert mine["antspyx"] == "0.6.3"
    assert mine["convexAdam"] == "0.2.0"
    shared = mine.keys() & others.keys()
    assert shared
    assert all(mine[name] == others[name] for name in shared)
    packages = {s["package"] for s in peers.CONFIGURATIONS.values()}
    assert packages <= mine.keys()
    assert packages == set(peers.RUNNERS)


def test_settings_survive_json_so_that_the_results_say_what_was_run():
    assert json.loads(json.dumps(benchmark.CONFIGURATIONS)) == benchmark.CONFIGURATIONS
    assert not benchmark.OURS.keys() & peers.CONFIGURATIONS.keys()


def test_both_schedules_and_both_metrics_of_syn_are_run():
    found = {
        (r["syn_metric"], tuple(r["reg_iterations"]))
        for s in peers.CONFIGURATIONS.values()
        if (r := s.get("registration"))
    }
    assert found == set(itertools.product(("mattes", "CC"), [(40, 20, 0), (40, 20, 10)]))


def test_the_peers_import_nothing_of_the_library():
    assert "reglib" not in re.findall(
        r"^\s*(?:from|import) (\w+)", Path(peers.__file__).read_text(), re.M
    )


# --- Pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_pairs_come_from_their_split_and_clusters_share_nobody(split):
    parts = json.loads(benchmark.SPLITS.read_text())
    found = benchmark.cases(split)
    assert found == benchmark.cases(split)
    for name, one in benchmark.SETS.items():
        here = [case for case in found if case.set == name]
        assert len({case[:3] for case in here}) == len(here) <= one.pairs
        members: dict[int, set[str]] = {}
        for case in here:
            assert case.moving != case.fixed
            members.setdefault(case.cluster, set()).update((case.moving, case.fixed))
        everyone = [m for cluster in members.values() for m in cluster]
        assert len(everyone) == len(set(everyone))
        assert set(everyone) <= set(parts[name][split])
    if split == "test":
        assert [sum(case.set == name for case in found) for name in benchmark.SETS] == [10, 20]
    assert found[-1][:3] == ("colin27_mni152", "colin27", "mni152")


def test_development_never_touches_a_test_subject():
    tested = {m for case in benchmark.cases("test")[:-1] for m in (case.moving, case.fixed)}
    seen = {m for case in benchmark.cases("validation")[:-1] for m in (case.moving, case.fixed)}
    assert not tested & seen
    assert len(benchmark.cases("validation", 2)) == 2 * len(benchmark.SETS) + 1


def test_29_structures_made_of_labels_that_belong_to_one_each():
    structures = benchmark.SETS["ixi_2mm"].structures
    assert len(structures) == 29
    labels = [n for members in structures.values() for n in members]
    assert len(labels) == len(set(labels))
    assert set(range(100, 208)) <= set(labels)
    assert structures["left hippocampus"] == (48,)
    assert structures["right cerebral white matter"] == (81, 83, 85, 87, 89, 91, 93)


def test_relabel_by_a_plain_loop():
    labels = torch.randint(0, 9, (1, 1, 5, 6, 7), generator=torch.Generator().manual_seed(0))
    structures = [(3,), (1, 8), (40,)]
    found = benchmark.relabel(labels, structures)
    for before, after in zip(labels.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert after == next((k for k, s in enumerate(structures, 1) if before in s), 0)


def test_scaling_does_not_depend_on_the_unit_or_on_one_bright_voxel():
    values = torch.rand(1, 1, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    plain = benchmark.scaled(values)
    assert plain.min() == 0
    assert plain.max() == 1
    torch.testing.assert_close(benchmark.scaled(5000 * values + 70), plain, atol=1e-5, rtol=0)
    bright = values.clone()
    bright[..., 3, 3, 3] = 1000
    # The percentile moves by one voxel of 8,000.
    assert (benchmark.scaled(bright) - plain).abs().median() < 1e-3


# --- Measuring ------------------------------------------------------------------------------


def loaded(shift: tuple[int, int, int]) -> benchmark.Loaded:
    """Three boxes in noise; in the moving image ``shift`` voxels further along each axis."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 20, 24, 22, generator=generator) + 0.1
    labels = torch.zeros(1, 1, 20, 24, 22, dtype=torch.long)
    labels[..., 6:10, 7:12, 6:11] = 1
    labels[..., 10:14, 7:12, 6:11] = 2
    labels[..., 6:14, 12:16, 11:16] = 3
    affine = placed()
    moved = [torch.roll(x, shift, (2, 3, 4)) for x in (image, labels)]
    return benchmark.Loaded(
        ["a", "b", "c"], Image(moved[0], affine), Image(image, affine), moved[1], labels
    )


def constant(shift: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(shift).view(1, 3, 1, 1, 1).expand(1, 3, 20, 24, 22).contiguous()


def test_the_right_field_gives_dice_1_and_its_opposite_does_not():
    case = loaded((2, -1, 3))
    right = benchmark.measure(case, constant((2.0, -1.0, 3.0)))
    assert right["dice"] == [1.0, 1.0, 1.0]
    assert right["mean_dice"] == 1
    assert right["folding"] == right["folding_inside"] == right["ndv"] == 0
    for wrong in ((-2.0, 1.0, -3.0), (0.0, 0.0, 0.0), (3.0, -1.0, 2.0)):
        found = benchmark.measure(case, constant(wrong))
        assert found["mean_dice"] < 0.8
        assert found["ncc"] > right["ncc"] + 0.5


def test_an_absent_structure_is_no_number_and_does_not_enter_the_mean():
    case = loaded((0, 0, 0))._replace(structures=["a", "b", "c", "absent"])
    found = benchmark.measure(case, constant((0.0, 0.0, 0.0)))
    assert found["dice"] == [1, 1, 1, None]
    assert found["mean_dice"] == 1


def test_a_field_on_disk_gives_the_same_and_another_grid_is_refused(tmp_path):
    case = loaded((2, -1, 3))
    path = tmp_path / "field.nii.gz"
    write_field(path, constant((2.0, -1.0, 3.0)), case.fixed.affine)
    assert benchmark.measure_file(case, path)["mean_dice"] == 1
    write_field(path, constant((2.0, -1.0, 3.0)), torch.eye(4))
    with pytest.raises(ValueError, match="on the fixed grid"):
        benchmark.measure_file(case, path)


def test_folds_at_the_faces_alone_are_told_apart():
    u = constant((0.0, 0.0, 0.0))
    u[:, 0, 0] = 4.0  # the first plane lands beyond the third
    found = benchmark.measure(loaded((0, 0, 0)), u)
    assert found["folding"] > 0
    assert found["folding_inside"] == 0


# --- The peers ------------------------------------------------------------------------------


def write_pair(folder: Path) -> dict[str, Path]:
    """The artificial pair on disk."""
    names = {"moving": "moving.nii", "fixed": "fixed.nii", "field": "field.nii.gz"}
    files = {part: folder / name for part, name in names.items()}
    for part, image in zip(("moving", "fixed"), benchmark.artificial_pair(), strict=True):
        write_image(files[part], image)
    return files


def test_voxels_of_a_turned_grid_become_the_field_that_the_library_writes(tmp_path):
    """What convexAdam gives, along the axes of ITK's array, against our own writer."""
    affine = placed()
    u = torch.randn(1, 3, 20, 24, 22, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "image.nii"
    write_image(path, Image(torch.rand(1, 1, 20, 24, 22), affine))
    fixed = sitk.ReadImage(str(path))
    # ITK's array runs k, j, i.
    voxels = u[0].permute(3, 2, 1, 0).flip(-1).double().numpy()
    transform = sitk.DisplacementFieldTransform(peers.sitk_field(voxels, fixed))
    peers.sitk_write([transform], fixed, str(tmp_path / "field.nii.gz"))
    found, grid = read_field(tmp_path / "field.nii.gz")
    torch.testing.assert_close(grid, affine, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, u, atol=1e-4, rtol=0)  # float32 mm on disk


def test_transforms_are_written_as_the_affine_after_the_displacement(tmp_path):
    path = tmp_path / "image.nii"
    write_image(path, Image(torch.rand(1, 1, 9, 8, 7), torch.eye(4)))
    fixed = sitk.ReadImage(str(path))
    u = sitk.GetImageFromArray(np.full((7, 8, 9, 3), (1.0, 0.0, 0.0)), isVector=True)
    u.CopyInformation(fixed)
    scale = sitk.AffineTransform(3)
    scale.Scale(2.0)
    peers.sitk_write([scale, sitk.DisplacementFieldTransform(u)], fixed, str(tmp_path / "f.nii"))
    found, _ = read_field(tmp_path / "f.nii")
    # ITK's first axis points to the left: x -> 2 (x - 1) there, so u = x - 2 at voxel x.
    expected = torch.arange(9.0) - 2
    torch.testing.assert_close(found[0, 0, :, 3, 3], expected, atol=1e-5, rtol=0)


def test_affine_and_demons_register_the_artificial_pair(tmp_path):
    files = write_pair(tmp_path)
    paths = [str(files[part]) for part in ("moving", "fixed", "field")]
    watch = peers.run_simpleitk(*paths, peers.CONFIGURATIONS["SimpleITK affine + demons"])
    assert watch.seconds > 0
    assert watch.cpu_seconds > 0
    moving, fixed = benchmark.artificial_pair()
    blobs = [(image.tensor > 0.5).long() for image in (moving, fixed)]
    case = benchmark.Loaded(["blobs"], moving, fixed, *blobs)
    before = benchmark.measure(case, torch.zeros(1, 3, *fixed.tensor.shape[2:]))
    after = benchmark.measure_file(case, files["field"])
    assert before["mean_dice"] < 0.85
    assert after["mean_dice"] > 0.92  # nearest labels lose half a voxel of 1.5
    assert after["ncc"] < before["ncc"] / 20
    assert after["folding"] == 0
    u, _ = read_field(files["field"])
    middle = u[0, :, 18, 20, 16]
    torch.testing.assert_close(middle, torch.tensor([1.5, 0.0, 0.0]), atol=0.1, rtol=0)


FAKE = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import peers

def run(moving, fixed, field, settings):
    print("noise of a library", flush=True)
    os.write(1, b"noise of C++")
    with peers.Watch() as watch:
        if settings["what"] == "sleep":
            time.sleep(60)
        if settings["what"] == "die":
            os._exit(3)
        if settings["what"] == "raise":
            raise ValueError("no good")
        sum(i * i for i in range(200_000))
    return watch

peers.serve({{"fake": run}})
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(scripts=str(SCRIPTS)))
    found = benchmark.Worker([sys.executable, script], tmp_path / "log")
    yield found
    if found.alive:
        found.end()


def ask(worker, what: str, seconds: float = 30.0) -> dict:
    files = {part: Path(part) for part in ("moving", "fixed", "field")}
    return worker.ask(benchmark.request({"package": "fake", "what": what}, files), seconds)


def test_a_worker_answers_whatever_its_libraries_print(worker):
    for _ in range(2):
        answer = ask(worker, "work")
        assert answer.keys() == {"seconds", "cpu_seconds"}
        assert 0 < answer["seconds"] < 10


def test_an_exception_is_an_answer_and_the_worker_goes_on(worker):
    assert ask(worker, "raise") == {"error": "ValueError: no good"}
    assert "seconds" in ask(worker, "work")


def test_a_worker_that_takes_too_long_is_ended(worker):
    assert "seconds" in ask(worker, "work")
    begin = time.monotonic()
    assert ask(worker, "sleep", 0.5) == {"timed_out": True}
    assert time.monotonic() - begin < 10
    assert not worker.alive


def test_a_worker_that_dies_is_reported(worker):
    assert "ended with code 3" in ask(worker, "die")["error"]
    assert not worker.alive
    assert "error" in ask(worker, "work")


def test_a_package_that_does_not_run_stops_everything(tmp_path, monkeypatch):
    """Rather than seeing every test pair with nothing but failures."""
    monkeypatch.setattr(benchmark, "WORK", tmp_path)
    monkeypatch.setattr(peers, "THREADS", 1)
    workers = benchmark.Workers(Path(sys.executable), tmp_path)
    with workers, pytest.raises(SystemExit, match="broken: the artificial pair"):
        workers.register("broken", {"package": "no such package"})


def test_the_environment_is_made_once_for_each_list_of_requirements(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(benchmark, "REQUIREMENTS", tmp_path / "requirements.txt")
    benchmark.REQUIREMENTS.write_text("a==1\n")
    folder = tmp_path / "peers"

    def run(command, check):
        assert check
        calls.append([str(word) for word in command])
        folder.mkdir(exist_ok=True)
        if "pip" in command and fails:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    fails = True
    with pytest.raises(subprocess.CalledProcessError):
        benchmark.make_environment(folder)
    fails = False
    assert benchmark.make_environment(folder) == folder / "bin" / "python"
    assert len(calls) == 4  # what failed is done again from the start
    benchmark.make_environment(folder)
    assert len(calls) == 4
    benchmark.REQUIREMENTS.write_text("a==2\n")
    benchmark.make_environment(folder)
    assert len(calls) == 6
    assert "--clear" in calls[-2]


def test_both_kinds_of_worker_register_and_are_started_again(tmp_path, monkeypatch):
    """The real processes, with this interpreter for that of the peers."""
    monkeypatch.setattr(benchmark, "WORK", tmp_path / "work")
    monkeypatch.setattr(peers, "THREADS", 1)
    ours = {"package": "reglib", "methods": {"Rigid": {}}}
    theirs = benchmark.CONFIGURATIONS["SimpleITK affine"]
    folder = tmp_path / "files"
    folder.mkdir()
    moving, fixed = benchmark.artificial_pair()
    with benchmark.Workers(Path(sys.executable), folder) as workers:
        for part, image in (("moving", moving), ("fixed", fixed)):
            write_image(workers.files[part], image)
        for settings in (ours, theirs):
            workers.files["field"].unlink(missing_ok=True)
            answer = workers.register("name", settings)
            assert answer["seconds"] > 0
            u, _ = read_field(workers.files["field"])
            # Everything lies 1.5 voxels further in the moving image.
            middle = u[0, :, 18, 20, 16]
            torch.testing.assert_close(middle, torch.tensor([1.5, 0.0, 0.0]), atol=0.3, rtol=0)
        workers.running["SimpleITK"].end()
        again = workers.register("name", theirs)
        assert again["seconds"] > 0
        running = list(workers.running.values())
    assert not any(one.alive for one in running)


# --- Records --------------------------------------------------------------------------------

SETTINGS = {
    "ours": {"package": "reglib", "methods": {"Affine": {}}},
    "peer": {"package": "SimpleITK", "iterations": 7},
}
CASES = [benchmark.Case("toy", f"m{n}", f"f{n}", n) for n in range(3)]
PAIRS = [case[:3] for case in CASES]
TASKS = {(*pair, name) for pair in PAIRS for name in ("unregistered", *SETTINGS)}


def row(pair, cluster: int, name: str, **values) -> dict:
    measured = {"ncc": 0.1, "lncc": 0.2, "folding": 0.0, "folding_inside": 0.0, "ndv": 0.0}
    plain = {"seconds": 1.0, "cpu_seconds": 2.0, "timed_out": False, "failed": None}
    keys = dict(zip(("set", "moving", "fixed"), pair, strict=True))
    found = {**keys, "cluster": cluster, "configuration": name, "mean_dice": 0.5}
    return {k: v for k, v in (found | plain | measured | values).items() if v != "absent"}


@pytest.fixture
def toy(tmp_path):
    """``measure_all`` without images: gives a function that runs it, and what it has registered."""
    calls: list[str] = []
    files = {part: tmp_path / f"{part}.nii" for part in ("moving", "fixed", "field")}

    def register(name: str, settings: dict) -> dict:
        calls.append(name)
        if len(calls) == register.dies_at:
            raise KeyboardInterrupt
        write_field(files["field"], constant((0.0, 0.0, 0.0)), placed())
        return {"seconds": 0.5, "cpu_seconds": 1.0}

    register.dies_at = 0
    path, finished = tmp_path / "part" / "test.json", tmp_path / "results.json"

    def run(settings=SETTINGS, *, again=(), split="test"):
        record = records.Record(path, split, finished)
        record.forget(again)
        record.begin(settings, TASKS)
        benchmark.measure_all(
            record, CASES, settings, files, register, load=lambda case: loaded((0, 0, 0))
        )
        return record.finish(PAIRS, list(settings), {"script": "toy"})

    run.calls, run.register, run.path, run.finished = calls, register, path, finished
    return run


def test_a_stopped_run_goes_on_and_is_never_taken_for_a_whole(toy):
    toy.register.dies_at = 4
    with pytest.raises(KeyboardInterrupt):
        toy()
    assert not toy.finished.exists()
    part = json.loads(toy.path.read_text())
    assert part["complete"] is False
    assert len(part["rows"]) == 5  # 3 registrations and 2 unregistered
    toy.register.dies_at = 0
    whole = toy()
    assert len(toy.calls) == 4 + 3  # the one that was under way is done again, no other
    assert not toy.path.exists()
    assert json.loads(toy.finished.read_text()) == whole
    assert whole["complete"] is True
    assert {records.key(r) for r in whole["rows"]} == TASKS
    assert [r["run"] for r in whole["rows"]] == [0] * 5 + [1] * 4
    measured = [run["measured"] for run in whole["runs"]]
    assert {n: sum(m.get(n, 0) for m in measured) for n in ("unregistered", *SETTINGS)} == {
        "unregistered": 3,
        "ours": 3,
        "peer": 3,
    }
    for run in whole["runs"]:
        assert run["seconds"] > 0
        assert len(run["provenance"]["commit"]) == 40


def test_each_configuration_sees_the_pairs_once(toy):
    first = toy()
    calls = len(toy.calls)
    assert toy() == first  # nothing left to measure, and no entry in the ledger
    assert len(toy.calls) == calls


def test_a_new_configuration_is_measured_alone(toy):
    toy({"ours": SETTINGS["ours"]})
    del toy.calls[:]
    whole = toy()
    assert toy.calls == ["peer"] * 3
    assert [run["measured"] for run in whole["runs"]][1] == {"peer": 3}


def test_changed_settings_need_a_new_name_or_an_entry_in_the_ledger(toy):
    toy()
    changed = copy.deepcopy(SETTINGS)
    changed["peer"]["iterations"] = 8
    with pytest.raises(SystemExit, match="peer: measured before"):
        toy(changed)
    whole = toy(changed, again=["peer"])
    assert whole["configurations"]["peer"]["iterations"] == 8
    assert [run["measured"].get("peer") for run in whole["runs"]] == [3, 3]
    assert len(whole["rows"]) == len(TASKS)


def test_one_configuration_is_of_one_version_of_the_library(toy, monkeypatch):
    toy.register.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        toy()
    monkeypatch.setattr(records, "fingerprint", lambda: "another")
    toy.register.dies_at = 0
    with pytest.raises(SystemExit, match="ours: measured before"):
        toy()
    toy({"peer": SETTINGS["peer"]})  # the peers do not depend on it


def test_a_version_is_of_what_a_script_has_imported(monkeypatch, tmp_path):
    """A change of a method that it does not import leaves what it has measured."""
    library = tmp_path / "reglib"
    library.mkdir()
    files = {name: library / f"{name}.py" for name in ("used", "other")}
    for file in files.values():
        file.write_text("")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "used", SimpleNamespace(__file__=str(files["used"])))
    version = records.fingerprint.__wrapped__
    first = version()
    files["other"].write_text("changed")
    assert version() == first
    files["used"].write_text("changed")
    assert version() != first


def test_a_whole_configuration_stays_when_the_library_changes(toy, monkeypatch):
    first = toy()
    monkeypatch.setattr(records, "fingerprint", lambda: "another")
    assert toy() == first


def test_records_of_another_split_are_refused(toy):
    toy()
    with pytest.raises(SystemExit, match="split"):
        toy(split="validation")


def test_a_record_with_a_gap_is_not_finished(tmp_path):
    record = records.Record(tmp_path / "part.json", "validation")
    record.begin(SETTINGS, TASKS)
    for name in ("unregistered", "ours", "peer"):
        for n, pair in enumerate(PAIRS[: 2 if name == "peer" else 3]):
            record.add(row(pair, n, name))
    with pytest.raises(ValueError, match=r"m2.*peer"):
        record.finish(PAIRS, list(SETTINGS), {})


def test_time_outs_failures_and_bad_files_become_rows(tmp_path):
    case, path = loaded((0, 0, 0)), tmp_path / "field.nii.gz"
    late = benchmark.outcome(case, {"timed_out": True}, path)
    assert late["timed_out"]
    assert late["seconds"] == benchmark.CAP
    assert benchmark.outcome(case, {"error": "no good"}, path)["failed"] == "no good"
    answer = {"seconds": 1.0, "cpu_seconds": 2.0}
    assert "field.nii.gz" in benchmark.outcome(case, answer, path)["failed"]
    write_field(path, constant((0.0, 0.0, 0.0)), case.fixed.affine)
    assert benchmark.outcome(case, answer, path)["mean_dice"] == 1


# --- Arithmetic -----------------------------------------------------------------------------


def test_the_interval_of_many_clusters_is_that_of_the_normal_distribution():
    """Of single pairs the bootstrap's standard error is that of the mean, to a few percent."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = records.interval(x.tolist(), list(range(200)))
    error = float(x.std(correction=0)) / math.sqrt(200)
    assert abs((high - low) / 2 - 1.96 * error) < 0.05 * 1.96 * error
    assert abs((high + low) / 2 - float(x.mean())) < 0.1 * error


def test_copies_inside_a_cluster_do_not_narrow_the_interval():
    x = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    once = records.interval(x, list(range(12)))
    five = records.interval(
        [v for v in x for _ in range(5)], [n for n in range(12) for _ in range(5)]
    )
    alone = records.interval([v for v in x for _ in range(5)], list(range(60)))
    assert five == once
    assert alone[1] - alone[0] < 0.6 * (once[1] - once[0])  # 1 / sqrt(5) of it


def test_the_interval_of_equal_values_is_a_point_and_of_one_cluster_unknown():
    assert records.interval([0.7] * 6, [0, 0, 1, 1, 2, 2]) == [0.7, 0.7]
    assert records.interval([0.1, 0.9], [3, 3]) is None


def test_the_summary_by_hand():
    dice = {
        "unregistered": (0.4, 0.5, 0.6),
        "ours": (0.7, 0.8, 0.9),
        "peer": (0.6, 0.3, "absent"),  # the second worse than before, the third timed out
    }
    rows = [
        row(pair, n, name, mean_dice=value, folding=0.01 * n)
        for name, values in dice.items()
        for n, (pair, value) in enumerate(zip(PAIRS, values, strict=True))
    ]
    rows[-1] |= {"timed_out": True, "seconds": 600.0, "cpu_seconds": None}
    found = records.summarise(rows, ["ours"])
    ours, peer = found["summary"]["toy"]["ours"], found["summary"]["toy"]["peer"]
    assert (ours["dice"], ours["dice_median"], ours["pairs"]) == (0.8, 0.8, 3)
    assert (ours["folding"], ours["folding_largest"]) == (0.01, 0.02)
    # The pair without a transform counts with 0.6, as it was before.
    assert (peer["dice"], peer["dice_median"]) == (0.5, 0.6)
    assert (peer["timed_out"], peer["failed"], peer["worse_than_before"]) == (1, 0, 1)
    assert (peer["seconds"], peer["seconds_median"]) == (pytest.approx(602 / 3, abs=1e-3), 1.0)
    assert peer["folding"] == 0.005
    above = found["above"]["toy"]["ours"]
    assert above.keys() == {"unregistered", "peer"}
    assert above["peer"]["dice"] == 0.3
    assert "peer" in records.table(found)


def test_the_estimate_takes_known_times():
    known = [row(PAIRS[0], 0, "peer", seconds=58.0)]
    others = [row(PAIRS[0], 0, name, seconds=28.0) for name in ("peer", "ours")]
    three = [(*pair, "peer") for pair in PAIRS]
    assert records.estimate(three, known) == pytest.approx(3)
    assert records.estimate(three, known, others) == pytest.approx(3)
    assert records.estimate([(*PAIRS[1], "ours")], known, others) == pytest.approx(0.5)
    assert records.estimate([(*PAIRS[1], "new")], known, others) == pytest.approx(0.2)
