"""The script of the paper's tables, on the patch that travels with the package (about 15 s).

The peers live in an environment of their own; SimpleITK, which is also at hand here, stands for
them.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from reglib.data.nifti import read_field, write_field, write_image
from reglib.data.zurich import patches, relative_distance
from reglib.geometry.affine import affine_field
from reglib.methods.inr import INR, CoordinateSettings
from reglib.methods.search import Search

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("inr_zurich")
    benchmark = importlib.import_module("benchmark_classical")
    records = importlib.import_module("benchmark_record")
    peers = importlib.import_module("peers")
finally:
    sys.path.remove(str(SCRIPTS))

VOXELS = torch.eye(3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _sentinel(monkeypatch):
    """Eleven copies of the embedded patch instead of the eleven of QuickBird."""
    monkeypatch.setattr(script, "bands", lambda: patches().images.expand(11, -1, -1, -1))


def field_of(matrix: torch.Tensor) -> torch.Tensor:
    """The displacement of a matrix of voxels on the whole patch."""
    return affine_field(matrix, VOXELS, VOXELS, (300, 300)).float()


# --- Pairs ----------------------------------------------------------------------------------


def test_the_splits_share_no_patch_and_the_paper_sees_one_draw():
    parts = {split: list(script.cases(split)) for split in ("test", "tuning")}
    assert len(parts["test"]) == 2 * 4 * 8 * 5
    assert len(parts["tuning"]) == 2 * 4 * 3 * 5
    assert len({case[:3] for case in parts["test"]}) == len(parts["test"])
    seen = [{case.cluster for case in found} for found in parts.values()]
    assert not seen[0] & seen[1]
    for case in parts["test"]:
        assert script.applies(script.AS_THE_PAPER, case) == (case.draw == 0)
        for name in script.MEAN_SQUARES:
            assert script.applies(name, case) == (case.modality == "single")
        assert script.applies("INR, robust", case)
        assert script.applies(records.UNREGISTERED, case)


def test_both_modalities_see_the_same_transforms_and_draws_differ():
    found = {case[:3]: script.load(case).truth for case in script.cases("tuning", 2)}
    for (name, moving, fixed), truth in found.items():
        if name.startswith("single"):
            other = found[name.replace("single", "multi"), moving, fixed]
            torch.testing.assert_close(truth, other)
    assert len({tuple(truth.flatten().tolist()) for truth in found.values()}) == len(found) / 2


def test_the_truth_has_no_distance_and_nothing_that_of_doing_nothing():
    """To 1e-5 of the side: a field is in single precision."""
    case = next(c for c in script.cases("tuning") if c.level == 3)
    pair = script.load(case)
    right = script.measure(pair, field_of(pair.truth))
    assert right["distance"] < 1e-5
    assert right["success"]
    assert right["fit_residual"] < 1e-3
    still = script.measure(pair, torch.zeros(1, 2, 300, 300))
    wanted = float(relative_distance(VOXELS.unsqueeze(0), pair.truth))
    assert still["distance"] == pytest.approx(wanted, abs=1e-6)
    assert not still["success"]


# --- Configurations -------------------------------------------------------------------------


def test_settings_survive_json_and_lead_back_to_their_methods():
    assert json.loads(json.dumps(script.CONFIGURATIONS)) == script.CONFIGURATIONS
    for name, methods in (script.METHODS | script.GRANULAR).items():
        settings = json.loads(json.dumps(script.settings_of(methods)))
        found = script.methods_of(settings | {"modality": "multi"})
        assert len(found) == len(methods)
        assert all(m.modality == "multi" for m in found if isinstance(m, INR)), name
    finest = [methods[0].image.finest for methods in script.GRANULAR.values()]
    assert finest == list(script.FINEST)


def warm_files(folder: Path) -> dict[str, str]:
    files = {part: str(folder / f"{part}.nii.gz") for part in ("moving", "fixed", "field")}
    for part, image in zip(("moving", "fixed"), script.warm_pair(), strict=True):
        write_image(files[part], image)
    return files


@pytest.mark.parametrize("name", ["SimpleITK rigid, mean squares", "SimpleITK rigid, MI"])
def test_simpleitk_registers_planes(tmp_path, name):
    """0.05 radians and 1.4 pixels of a 40 x 40 image, to a fifth of a pixel; rigidly."""
    files = warm_files(tmp_path)
    peers.run_simpleitk(*files.values(), script.PEERS[name])
    check_warm_field(Path(files["field"]), 0.2)


def check_warm_field(path: Path, tolerance: float) -> None:
    """Whether a field carries the warm pair's fixed image to its moving one."""
    u, affine = read_field(path)
    assert torch.equal(affine, script.AFFINE)
    assert u.shape == (1, 2, 40, 40)
    x = torch.cartesian_prod(*(torch.arange(40.0, dtype=torch.float64),) * 2)
    fit = script.fit_affine(x[None], x[None] + u.double().flatten(2).mT)
    linear = fit.matrix[0, :2, :2]
    torch.testing.assert_close(linear @ linear.T, torch.eye(2).double(), atol=1e-4, rtol=0)
    # The moving image at x shows what the fixed one shows at R x + t, so fixed to moving is back.
    cos, sin = torch.tensor(0.05).double().cos(), torch.tensor(0.05).double().sin()
    turn = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    middle, shift = torch.full((2,), 19.5).double(), torch.tensor([1.0, -1.0]).double()
    wanted = (x - middle - shift) @ turn + middle
    assert float((x + u[0].double().flatten(1).T - wanted).norm(dim=1).mean()) < tolerance


def test_ours_registers_in_its_process_and_says_how_sure_it_is(tmp_path, monkeypatch):
    small = CoordinateSettings(levels=3, width=16)
    quick = INR(image=small, steps=5, search=Search(candidates=32, kept=2, steps=15))
    monkeypatch.setitem(script.METHODS, "quick", [quick])
    files = warm_files(tmp_path)
    settings = script.settings_of([quick]) | {"modality": "single"}
    watch = script.run_reglib(*files.values(), settings)
    assert watch.notes["confidence"] > 0.3
    assert watch.seconds > 0
    check_warm_field(Path(files["field"]), 0.5)


# --- The run --------------------------------------------------------------------------------

SETTINGS = {
    "INR, robust": {"package": "reglib", "n": 1},
    "INR, as the paper": {"package": "reglib", "n": 2},
    "SimpleITK rigid, mean squares": {"package": "SimpleITK"},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``measure_set`` with workers that know the truth, or fail, and no processes."""
    log: list[tuple[str, str, int]] = []

    class Fake:
        def __init__(self, python, folder, file, logs, *, warm, threads, place):
            assert threads == 1
            self.place = place
            names = ("moving", "fixed", "field")
            self.files = {part: folder / f"{part}.nii.gz" for part in names}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def register(self, name, settings):
            assert ("modality" in settings) == (settings["package"] == "reglib")
            log.append((name, settings.get("modality", "single"), self.place))
            if len(log) == run.dies_at:
                raise SystemExit("no such package")
            if name == "SimpleITK rigid, mean squares":
                return {"error": "no good"}
            # Registered as well as level 1 allows: nothing is done.
            write_field(self.files["field"], torch.zeros(1, 2, 300, 300), script.AFFINE)
            return {"seconds": 0.5, "cpu_seconds": 0.5, "notes": {"confidence": 0.5}}

    monkeypatch.setattr(script, "Workers", Fake)
    monkeypatch.setattr(script, "WORK", tmp_path / "work")
    monkeypatch.setattr(benchmark, "make_environment", lambda: Path(sys.executable))
    monkeypatch.setattr(script, "versions", lambda python: {})
    everything = [c for c in script.cases("tuning", 2) if c.level <= 2 and c.cluster != 10]

    def run(jobs=2, only=None, again=()):
        options = script.argparse.Namespace(jobs=jobs, only=only, again=again)
        finished = tmp_path / "results.json"
        script.measure_set("toy", "tuning", everything, SETTINGS, finished, options)
        return json.loads(finished.read_text()) if finished.exists() else None

    run.log, run.dies_at, run.everything = log, 0, everything
    return run


def test_every_pair_is_measured_once_and_the_tables_are_written(run):
    found = run()
    assert found["complete"]
    # 16 pairs; one draw of two for the paper's; one modality of two for mean squares.
    counts = {name: sum(n == name for n, *_ in run.log) for name in SETTINGS}
    assert list(counts.values()) == [16, 8, 8]
    assert len(found["rows"]) == 16 + 32
    assert {place for *_, place in run.log} <= {0, 1}
    one = found["summary"]["single, level 2"]
    assert one["INR, robust"]["pairs"] == 4
    assert one["INR, as the paper"]["pairs"] == 2
    assert one["SimpleITK rigid, mean squares"]["failed"] == 4
    assert one["SimpleITK rigid, mean squares"]["distance"] == one["unregistered"]["distance"]
    assert "SimpleITK rigid, mean squares" not in found["summary"]["multi, level 1"]
    above = found["harder"]["single"]["INR, robust"]
    assert above["unregistered"] == {"pairs": 4, "success": 0.0, "interval": [0.0, 0.0]}
    assert above["INR, as the paper"]["pairs"] == 2
    assert {row.get("confidence") for row in found["rows"]} == {None, 0.5}
    before = len(run.log)
    assert run() == found
    assert len(run.log) == before


def test_a_stopped_run_goes_on(run):
    run.dies_at = 5
    with pytest.raises(SystemExit, match="no such package"):
        run(jobs=1)
    assert len(run.log) == 5
    run.dies_at = 0
    found = run(jobs=2)
    assert len(run.log) == 5 + 28  # the one that was under way is done again, no other
    assert len(found["runs"]) == 2


def test_some_configurations_alone_are_no_results(run, capsys):
    assert run(only=["INR, robust"]) is None
    assert "16 registrations are missing" in capsys.readouterr().out
    assert {name for name, *_ in run.log} == {"INR, robust"}
    assert run()["complete"]
    assert sum(name == "INR, robust" for name, *_ in run.log) == 16


def row(level: int, patch: int, name: str, distance: float, **values) -> dict:
    plain = {"seconds": 1.0, "cpu_seconds": 1.0, "timed_out": False, "failed": None}
    return {
        "set": f"multi, level {level}",
        "moving": f"patch {patch}, draw 0",
        "fixed": f"patch {patch}",
        "cluster": patch,
        "modality": "multi",
        "level": level,
        "configuration": name,
        "distance": distance,
        "success": distance <= 0.02,
    } | plain | values  # fmt: skip


def test_success_and_distance_are_means_and_patches_are_drawn():
    rows = []
    for level in (1, 2, 3):
        for patch, good in ((1, True), (2, False)):
            rows.append(row(level, patch, "unregistered", 0.1 * level))
            rows.append(row(level, patch, "ours", 0.01 if good else 0.06))
            rows.append(row(level, patch, "peer", 0.01 if level == 1 else 0.05))
    found = script.summarise(rows, ["ours"])
    one = found["summary"]["multi, level 2"]["ours"]
    assert one["success"] == 0.5
    assert one["success_interval"] == [0, 1]
    assert one["distance"] == pytest.approx(0.035)
    assert one["distance_sd"] == pytest.approx(0.05 / 2**0.5, abs=1e-5)
    # Level 1, where the peer is better, is not one of the harder ones.
    assert found["harder"]["multi"]["ours"]["peer"] == {
        "pairs": 4, "success": 0.5, "interval": [0, 1],
    }  # fmt: skip
    assert set(found["harder"]["multi"]) == {"ours"}
    assert "multi, level 3" in script.table(found)


def test_what_has_no_transform_counts_as_before():
    rows = [row(2, 1, "unregistered", 0.01), row(2, 1, "peer", 0.3, failed="no good")]
    del rows[1]["distance"], rows[1]["success"]
    found = script.summarise(rows, [])["summary"]["multi, level 2"]["peer"]
    assert (found["distance"], found["success"], found["failed"]) == (0.01, 1, 1)
    assert found["distance_sd"] is None
