"""The scripts of T1 against T2 in 3-D and what they share, on phantoms (about 15 s).

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
from torch import Tensor

from reglib.data.datasets import mni152
from reglib.data.nifti import Image, read_field, voxel_to_world, write_field, write_image
from reglib.geometry.sampling import warp
from reglib.methods.classical import Affine, Rigid
from reglib.methods.inr import INR, CoordinateSettings
from reglib.methods.pair import Iterate
from reglib.objectives.mind import mind_features
from reglib.objectives.similarity import mse
from reglib.registration import register

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("inr_t1t2")
    volumes = importlib.import_module("volumes")
    benchmark = importlib.import_module("benchmark_classical")
    records = importlib.import_module("benchmark_record")
    peers = importlib.import_module("peers")
    brains = importlib.import_module("brains")
    samples = importlib.import_module("make_samples")
    provenance = importlib.import_module("provenance")
finally:
    sys.path.remove(str(SCRIPTS))

#: A grid of 2 mm in a corner of that of the files, which has 1 mm and another handedness.
PLACE = script.Grid(
    torch.tensor(
        [[2.0, 0, 0, -25], [0, 2, 0, -30], [0, 0, 2, -23], [0, 0, 0, 1]], dtype=torch.float64
    ),
    (26, 30, 24),
)
FILES = script.Grid(
    torch.tensor(
        [[-1.0, 0, 0, 40], [0, 1, 0, -45], [0, 0, 1, -36], [0, 0, 0, 1]], dtype=torch.float64
    ),
    (80, 90, 72),
)


def head(place: object, modality: int) -> Image:
    """A ball of waves of 15 mm and longer, of two contrasts; a function of mm."""
    voxels = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in place.shape))
    mm = voxel_to_world(voxels.unsqueeze(0), place.affine)[0]
    waves = (mm / 4).sin().sum(1) + (mm[:, 0] * mm[:, 1] / 120).cos() + (mm[:, 2] / 3).cos()
    values = 0.5 + 0.1 * waves
    values = values if modality == 1 else 1 - values**1.5
    ball = (mm.norm(dim=1) < 21).double()
    return Image((values * ball).view(1, 1, *place.shape).float(), place.affine)


@pytest.fixture(scope="module")
def pair() -> object:
    generator = torch.Generator().manual_seed(1)
    return script.deform(head(FILES, 1), head(FILES, 2), PLACE, generator)


# --- Labels ---------------------------------------------------------------------------------


def test_the_table_has_the_structures_of_the_brains_and_ids_that_exist() -> None:
    table = script.structures()
    assert {name: set(one.muse) for name, one in table.items()} == {
        name: set(ids) for name, ids in brains.ixi_structures().items()
    }
    for protocol in ("wmparc", "muse"):
        every = [n for one in table.values() for n in getattr(one, protocol)]
        assert len(every) == len(set(every))
    # Parcels are numbered by thousands, from which FreeSurfer's names are known.
    known = mni152()
    there = set(known.labels.tensor.unique().tolist())
    for name, one in table.items():
        for n in one.wmparc:
            label = samples.DEEP_WHITE_MATTER.get(n, samples.THOUSANDS.get(n // 1000, n))
            assert label in there
            words = samples.FREESURFER[label].lower().replace("-", " ")
            plain = words.replace("3rd", "third").replace("4th", "fourth")
            assert all(word in plain.replace("ventraldc", "ventral dc") for word in name.split()
                       if word != "DC"), (name, words)  # fmt: skip
            if n >= 1000:
                assert n in (5001, 5002) or n % 1000 in {*range(1, 36)} - {4}


def test_cells_of_the_table_by_hand() -> None:
    assert script.numbers("7") == (7,)
    assert script.numbers("3-5 9") == (3, 4, 5, 9)
    assert script.numbers("3-7/2 20-21") == (3, 5, 7, 20, 21)
    with pytest.raises(ValueError, match="got '7-'"):
        script.numbers("1 7-")


def test_labels_of_both_protocols_get_the_same_numbers() -> None:
    table = script.structures()
    for protocol in ("wmparc", "muse"):
        last = torch.tensor([getattr(one, protocol)[-1] for one in table.values()])
        labels = torch.cat([last, torch.tensor([0, 3])]).view(1, 1, 1, 1, -1)
        found = script.numbered(labels, protocol).flatten().tolist()
        assert found == [*range(1, 30), 0, 0]
        with pytest.raises(ValueError, match=r"none of \['left cortex'\]"):
            script.numbered(labels.where(labels != last[-1], 0), protocol)


# --- Pairs ----------------------------------------------------------------------------------


def test_development_and_test_share_nobody() -> None:
    found = {split: script.cases(split) for split in ("test", "tuning")}
    assert [sum(c.set == s for c in found["test"]) for s in ("deformed", "atlas")] == [6, 10]
    assert len({c[:3] for c in found["test"]}) == 16
    people = [{c.moving.partition(" ")[0] for c in cases} for cases in found.values()]
    assert not people[0] & people[1]
    splits = json.loads(script.SPLITS.read_text())["ixi_2mm"]
    assert people[0] <= {*splits["test"], *script.PATIENTS["test"]}
    assert len({c.cluster for c in found["test"] if c.set == "deformed"}) == 2
    assert len(script.cases("tuning", 1)) == 2


def test_the_moving_image_shows_at_the_truth_what_t2_shows(pair) -> None:
    """To a tenth of the range: linear interpolation at 2 mm blurs waves and the edge of the ball.

    The opposite displacement is three times as wrong, and so is none.
    """
    still = brains.scaled(
        script.resample(head(FILES, 2).tensor, FILES.affine, PLACE.affine, PLACE.shape)
    )

    def error(u: Tensor) -> float:
        return float((warp(pair.moving.tensor, u) - still)[pair.inside].square().mean().sqrt())

    right = error(pair.truth)
    assert right < 0.06
    assert error(-pair.truth) > 3 * right
    assert error(torch.zeros_like(pair.truth)) > 3 * right


def test_deformations_are_long_smooth_and_their_own(pair) -> None:
    lengths = 2 * pair.truth.norm(dim=1)
    assert 5 < float(lengths.max()) <= script.LONGEST
    assert volumes.regularity(pair.truth)["folding"] == 0
    assert not pair.inside[..., 0, 0, 0].any()  # no brain in a corner
    other = script.deform(head(FILES, 1), head(FILES, 2), PLACE, torch.Generator().manual_seed(2))
    assert float((other.truth - pair.truth).norm(dim=1).mean()) > 0.5
    oblong = torch.diag(torch.tensor([2.0, 2, 3, 1], dtype=torch.float64))
    with pytest.raises(ValueError, match="one spacing"):
        script.deform(
            head(FILES, 1),
            head(FILES, 2),
            script.Grid(oblong, (8, 8, 8)),
            torch.Generator().manual_seed(0),
        )


def test_pairs_are_read_from_files_of_the_real_layout(tmp_path, monkeypatch, uncached) -> None:
    """Both kinds; labels of the template and of a brain come to the same numbers and places."""
    monkeypatch.setattr(script, "fetch", lambda name: tmp_path / name)
    table = script.structures()
    shape = (20, 29, 18)
    small = script.Grid(PLACE.affine, shape)
    fine = script.Grid(small.affine @ torch.diag(torch.tensor([0.5, 0.5, 0.5, 1.0]).double()),
                       tuple(2 * n for n in shape))  # fmt: skip

    def slabs(place: object, protocol: str, width: int) -> Image:
        ids = [getattr(one, protocol)[0] for one in table.values()]
        index = torch.arange(place.shape[1]).div(width, rounding_mode="floor")
        values = torch.tensor(ids)[index].view(1, 1, 1, -1, 1).expand(1, 1, *place.shape)
        return Image(values.to(torch.int32), place.affine)

    parcels = "tpl-MNI152NLin6Asym_res-01_desc-avgwmparc_dseg.nii.gz"
    brain = script.cases("tuning")[-1].moving
    files = {
        "ixi_2mm/mni152_t1_2mm.nii.gz": head(small, 1),
        f"ixi_2mm/t1_brain/{brain}.nii.gz": head(small, 1),
        f"ixi_2mm/dlmuse/{brain}.nii.gz": slabs(small, "muse", 1),
        "mni152_t1_t2/MNI152_T1_1mm_brain.nii.gz": head(fine, 1),
        "mni152_t1_t2/MNI152_T2_1mm_brain.nii.gz": head(fine, 2),
        f"mni152_t1_t2/{parcels}": slabs(fine, "wmparc", 2),
        "open_ms/patient07_t1.nii.gz": head(fine, 1),
        "open_ms/patient07_t2.nii.gz": head(fine, 2),
    }
    for name, image in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / name, image)
    uncached(script.grid, script.template)
    atlas = script.load(script.Case("atlas", brain, script.TEMPLATE, 0))
    assert atlas.structures == list(table)
    assert torch.equal(atlas.moving_labels, atlas.fixed_labels)
    still = torch.zeros(1, 3, *shape)
    assert script.volumes.measure(atlas, still)["mean_dice"] == 1
    shifted = still.clone()
    shifted[:, 1] = 1
    assert script.volumes.measure(atlas, shifted)["mean_dice"] == 0
    every = [
        script.load(next(c for c in script.cases(split) if c.set == "deformed"))
        for split in ("test", "tuning")
    ]
    for case in every:
        assert case.fixed.tensor.shape[2:] == case.truth.shape[2:] == shape
        assert case.inside.any()
    assert not torch.equal(every[0].truth, every[1].truth)


# --- Measuring ------------------------------------------------------------------------------


def test_the_truth_has_no_error_and_nothing_its_length(pair) -> None:
    assert volumes.measure(pair, pair.truth)["error"] == 0
    found = volumes.measure(pair, torch.zeros_like(pair.truth))
    lengths = 2 * pair.truth.norm(dim=1, keepdim=True)[pair.inside]
    assert found["error"] == pytest.approx(float(lengths.mean()), abs=1e-3)
    assert found["error_largest"] == pytest.approx(float(lengths.max()), abs=1e-3)
    assert found["error"] < found["error_95"] < found["error_largest"]
    assert "mean_dice" not in found


def test_millimetres_count_and_what_lies_outside_does_not() -> None:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    image = Image(torch.zeros(1, 1, 6, 6, 6), affine)
    inside = torch.zeros(1, 1, 6, 6, 6, dtype=torch.bool)
    inside[..., :3] = True
    u = torch.tensor([1.0, 1.0, 1.0]).view(1, 3, 1, 1, 1).repeat(1, 1, 6, 6, 6)
    u[..., 3:] = 100
    case = volumes.Loaded(image, image, truth=torch.zeros_like(u), inside=inside)
    found = volumes.displacement_error(case, u)
    assert list(found.values()) == pytest.approx([14**0.5] * 3, abs=1e-3)


def test_folds_are_seen() -> None:
    u = torch.zeros(1, 3, 8, 8, 8)
    u[:, 0, 4] = 3  # the neighbours overtake each other
    assert volumes.regularity(u)["folding"] > 0
    assert volumes.regularity(u)["ndv"] > 0
    assert set(volumes.regularity(torch.zeros_like(u)).values()) == {0}


# --- Configurations -------------------------------------------------------------------------


def test_settings_survive_json_and_lead_back_to_their_methods() -> None:
    assert json.loads(json.dumps(volumes.CONFIGURATIONS)) == volumes.CONFIGURATIONS
    assert len(volumes.CONFIGURATIONS) == len(volumes.PEERS) + len(volumes.METHODS)
    for methods in volumes.METHODS.values():
        settings = json.loads(json.dumps(volumes.settings_of(methods)))
        assert volumes.methods_of(settings) == methods
    networks = volumes.NETWORKS
    assert networks.modality == "multi"
    assert not networks.rigid
    assert networks.coordinates < 80 * 96 * 80


def test_networks_on_descriptors_undo_a_known_deformation(pair) -> None:
    """By a fifth in 200 steps; of one modality, whose contrasts are two."""
    small = INR(
        rigid=False,
        image=CoordinateSettings(levels=4, width=32),
        motion=CoordinateSettings(0, 0.1, levels=4, width=16, lr=2e-3),
        steps=200,
        coordinates=2_048,
        similarity=mse,
    )
    found = register(pair.moving, pair.fixed, volumes.Described(small), progress=False)
    fields = found.whole_field(), torch.zeros_like(found.whole_field())
    after, before = (volumes.measure(pair, u)["error"] for u in fields)
    assert after < 0.8 * before, (after, before)


def test_descriptors_stand_in_for_the_images_alone(pair) -> None:
    seen = []

    def method(given):
        seen.append(given)
        active = torch.ones(1, dtype=torch.bool)
        yield Iterate("look", {}, active, lambda: (given.affine, given.field))

    described = volumes.Described(method)
    found = register(
        pair.moving, pair.fixed, described, progress=False, fixed_mask=pair.inside.float()
    )
    [given] = seen
    assert torch.equal(given.moving, mind_features(pair.moving.tensor))
    assert torch.equal(given.fixed, mind_features(pair.fixed.tensor))
    assert given.fixed.shape[1] == 12
    assert torch.equal(given.fixed_mask, pair.inside.float())
    assert found.warped.shape == pair.fixed.tensor.shape  # the images again


@pytest.fixture
def files(pair, tmp_path) -> dict[str, str]:
    paths = {part: str(tmp_path / f"{part}.nii.gz") for part in ("moving", "fixed", "field")}
    for part in ("moving", "fixed"):
        write_image(paths[part], getattr(pair, part))
    return paths


def test_a_b_spline_of_simpleitk_undoes_a_known_deformation(pair, files) -> None:
    """By a tenth better than the affine map, which fits much of a field as smooth as this."""
    known = volumes.PEERS["SimpleITK affine + B-spline, MI"]
    small = {"coarsest_cell_mm": 16.0, "shrink": [2, 1], "sigma_voxels": [1.0, 0.0]}
    errors = [volumes.measure(pair, torch.zeros_like(pair.truth))["error"]]
    for extra in ({}, {"bspline": known["bspline"] | small | {"sampling": 1.0}}):
        settings = {"package": "SimpleITK", "affine": known["affine"]} | extra
        watch = peers.run_simpleitk(*files.values(), settings)
        assert watch.seconds > 0
        errors.append(benchmark.measure_file(pair, Path(files["field"]), volumes.measure)["error"])
    before, affine, spline = errors
    assert affine < before / 2
    assert spline < 0.9 * affine


def test_ours_registers_in_its_process(pair, files, monkeypatch) -> None:
    quick = INR(
        modality="multi",
        rigid=False,
        image=CoordinateSettings(levels=3, width=16),
        motion=CoordinateSettings(0, 0.1, levels=3, width=16, lr=1e-3),
        steps=3,
        coordinates=512,
    )
    methods = [Affine(levels=[8.0], steps=2), quick]
    monkeypatch.setitem(volumes.METHODS, "quick", methods)
    watch = volumes.run_reglib(*files.values(), volumes.settings_of(methods))
    assert watch.seconds > 0
    u, affine = read_field(files["field"])
    assert u.shape == pair.truth.shape
    torch.testing.assert_close(affine, PLACE.affine)


# --- The run --------------------------------------------------------------------------------

SETTINGS = {
    "ours": volumes.settings_of([Rigid()]),
    "peer": {"package": "SimpleITK"},
}


@pytest.fixture
def run(tmp_path, fake_workers, pair):
    """``register_all`` with workers that know half of the truth, or fail, and no processes."""
    log: list[str] = []
    still = torch.zeros_like(pair.truth)
    labels = (pair.fixed.tensor > 0.4).long()
    labelled = pair._replace(
        truth=None, inside=None, structures=["bright"], moving_labels=labels, fixed_labels=labels
    )

    def register(worker, name, settings):
        log.append(name)
        if len(log) == run.dies_at:
            raise SystemExit("no such package")
        if name == "peer":
            return {"error": "no good"}
        write_field(worker.files["field"], pair.truth / 2, PLACE.affine)
        return {"seconds": 0.5, "cpu_seconds": 0.5}

    fake_workers(benchmark, register)
    everything = [
        script.Case("deformed", "a t2", "a t1", 0),
        script.Case("deformed", "b t2", "b t1", 1),
        script.Case("atlas", "c", "template", 0),
    ]

    def run(only=None):
        finished = tmp_path / "results.json"
        record = records.Record(tmp_path / "rows.json", "toy", finished)
        volumes.register_all(
            record,
            everything,
            SETTINGS,
            lambda case: pair if case.set == "deformed" else labelled,
            __file__,
            tmp_path,
            head={"script": "toy"},
            only=only,
        )
        return json.loads(finished.read_text()) if finished.exists() else None

    run.log, run.dies_at, run.before = log, 0, volumes.measure(pair, still)["error"]
    return run


def test_every_pair_is_measured_once_and_less_error_is_better(run) -> None:
    found = run()
    assert found["complete"]
    assert found["script"] == "toy"
    assert len(found["rows"]) == 3 * 3
    assert len(run.log) == 6
    one = found["summary"]["deformed"]
    assert one["ours"]["error"] == pytest.approx(run.before / 2, rel=0.01)
    # A failed pair counts as it was before.
    assert one["peer"]["failed"] == 2
    assert one["peer"]["error"] == one["unregistered"]["error"] == pytest.approx(run.before, 1e-3)
    assert "mean_dice" not in one["ours"]
    gain = found["above"]["deformed"]["ours"]["peer"]
    assert gain["error"] == pytest.approx(run.before / 2, rel=0.01)
    assert gain["pairs"] == 2
    assert found["above"]["atlas"]["ours"]["unregistered"]["mean_dice"] < 0
    assert found["summary"]["atlas"]["unregistered"]["mean_dice"] == 1
    assert list(found["above"]["atlas"]) == ["ours"]
    before = len(run.log)
    assert run() == found
    assert len(run.log) == before


def test_a_stopped_run_goes_on(run) -> None:
    run.dies_at = 4
    with pytest.raises(SystemExit, match="no such package"):
        run()
    run.dies_at = 0
    found = run()
    assert len(run.log) == 4 + 3
    assert len(found["runs"]) == 2


def test_some_configurations_alone_are_no_results(run, capsys) -> None:
    assert run(only=["ours"]) is None
    assert "3 registrations are missing" in capsys.readouterr().out
    assert set(run.log) == {"ours"}
    assert run()["complete"]


def test_the_command_line_refuses_what_would_spoil_the_test(monkeypatch) -> None:
    with pytest.raises(SystemExit):
        script.main(["--pairs", "1"])
    monkeypatch.setattr(provenance, "provenance", lambda: {"uncommitted_changes": True})
    with pytest.raises(SystemExit, match="commit"):
        script.main([])
    with pytest.raises(SystemExit, match="no such configuration"):
        script.main(["--split", "tuning", "--only", "magic"])
