"""The script of Learn2Reg's AbdomenMRCT on a phantom that is laid out like the real files."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reglib.data.nifti import Image, read_image, write_field, write_image

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("abdomen_mrct")
    volumes = importlib.import_module("volumes")
    benchmark = importlib.import_module("benchmark_classical")
    provenance = importlib.import_module("provenance")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (24, 20, 22)
AFFINE = torch.tensor(
    [[-2.0, 0, 0, 30], [0, 2, 0, -20], [0, 0, 2, 10], [0, 0, 0, 1]], dtype=torch.float64
)
#: Corners of the organs, and by how many voxels the CT lies further along the second axis.
ORGANS = {1: ((4, 4, 4), 8), 2: ((16, 4, 5), 5), 3: ((4, 14, 14), 3), 4: ((15, 13, 14), 4)}
SHIFT = 2


def organs(shift: int) -> Tensor:
    labels = torch.zeros(1, 1, *SHAPE, dtype=torch.uint8)
    for number, ((i, j, k), side) in ORGANS.items():
        j += shift
        labels[..., i : i + side, j : j + side, k : k + side] = number
    return labels


def write(folder: Path, patient: str, modality: str, *, labelled: bool = True) -> None:
    """The three files of an image: MR as large integers, CT in Hounsfield units."""
    labels = organs(SHIFT if modality == script.MOVING else 0)
    seen = labels.float()
    values = seen * 300 + 100 if modality == script.FIXED else -150 + 150 * (4 - seen)
    mask = torch.ones_like(labels)
    mask[..., :1, :, :] = 0
    files = {"imagesTr": values, "masksTr": mask} | ({"labelsTr": labels} if labelled else {})
    for part, tensor in files.items():
        path = folder / part / f"AbdomenMRCT_{patient}_{modality}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, Image(tensor, AFFINE))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two patients with everything, one without labels, and unpaired scans."""
    found = tmp_path / "AbdomenMRCT"
    for patient in ("0001", "0007"):
        for modality in ("0000", "0001"):
            write(found, patient, modality)
    for modality in ("0000", "0001"):
        write(found, "0009", modality, labelled=False)
    write(found, "0017", "0000")
    write(found, "0060", "0001")
    content = {"name": "AbdomenMRCT", "registration_direction": {"fixed": 0, "moving": 1}}
    (found / "AbdomenMRCT_dataset.json").write_text(json.dumps(content))
    return found


@pytest.fixture
def prepared(folder, tmp_path) -> Path:
    assert script.prepare(folder, tmp_path / "prepared") == ["0001", "0007"]
    return tmp_path / "prepared"


def truth() -> Tensor:
    """Fixed to moving: voxels further along the second axis."""
    u = torch.zeros(1, 3, *SHAPE)
    u[:, 1] = SHIFT
    return u


# --- Preparation ----------------------------------------------------------------------------


def test_pairs_with_labels_are_prepared_ct_moving(folder, prepared) -> None:
    assert [case.cluster for case in script.cases(prepared)] == [1, 7]
    pair = script.load(script.cases(prepared)[0], prepared)
    assert torch.equal(pair.moving_labels, organs(SHIFT).long())
    assert torch.equal(pair.fixed_labels, organs(0).long())
    assert pair.structures == script.STRUCTURES
    torch.testing.assert_close(pair.fixed.affine, AFFINE)
    for image in (pair.moving, pair.fixed):
        assert image.tensor[..., :1, :, :].abs().max() == 0  # what the mask leaves out
        assert (image.tensor.min(), image.tensor.max()) == (0, 1)
    # -150 HU is a tenth of the way from -200 to 300; the background, 450 HU, beyond.
    ct = pair.moving.tensor[:, :, 1:]
    assert ct[organs(SHIFT)[:, :, 1:] == 4].unique().tolist() == pytest.approx([0.1])
    assert ct[organs(SHIFT)[:, :, 1:] == 0].unique().tolist() == [1]
    # Of MR the 99th percentile is 1: background 100, liver 400, and what is brighter is cut off.
    raw = read_image(folder / "imagesTr" / "AbdomenMRCT_0001_0000.nii.gz").tensor
    top = float(torch.quantile(raw.double(), 0.99))
    liver = pair.fixed.tensor[organs(0) == 1].unique().tolist()
    assert liver == pytest.approx([(400 - 100) / (top - 100)])


def test_without_masks_nothing_is_left_out(folder, tmp_path) -> None:
    for path in (folder / "masksTr").iterdir():
        path.unlink()
    script.prepare(folder, tmp_path / "prepared")
    pair = script.load(script.cases(tmp_path / "prepared")[0], tmp_path / "prepared")
    assert pair.moving.tensor[..., 0, 0, 0] == 1


def test_other_folders_and_files_are_refused(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no patient"):
        script.patients(tmp_path)
    with pytest.raises(SystemExit, match="prepare FOLDER"):
        script.cases(tmp_path)
    name = "AbdomenMRCT_0001_0001.nii.gz"
    write_image(folder / "labelsTr" / name, Image(5 * organs(0), AFFINE))
    with pytest.raises(ValueError, match=rf"labelsTr/{name}: wanted labels 1 to 4"):
        script.prepare(folder, tmp_path / "out")
    write_image(folder / "labelsTr" / name, Image(organs(0)[..., :20], AFFINE))
    with pytest.raises(ValueError, match=rf"labelsTr/{name}: wanted the grid"):
        script.prepare(folder, tmp_path / "out")
    path = folder / "AbdomenMRCT_dataset.json"
    path.write_text(json.dumps({"registration_direction": {"fixed": 1, "moving": 0}}))
    with pytest.raises(ValueError, match="first modality to be fixed"):
        script.patients(folder)


# --- Measures -------------------------------------------------------------------------------


def test_the_right_field_is_perfect_and_doing_nothing_is_counted_by_hand(prepared) -> None:
    pair = script.load(script.cases(prepared)[0], prepared)
    right = script.measure(pair, truth())
    assert (right["mean_dice"], right["weighted_dice"], right["hd95"]) == (1, 1, 0)
    still = script.measure(pair, torch.zeros(1, 3, *SHAPE))
    # A cube that is shifted by s of its side n keeps (n - s) / n of its voxels.
    sides = [side for _, side in ORGANS.values()]
    shares = [(n - SHIFT) / n for n in sides]
    assert still["dice"] == pytest.approx(shares, abs=1e-4)
    assert still["mean_dice"] == pytest.approx(sum(shares) / 4, abs=1e-4)
    volumes_of = [n**3 for n in sides]
    wanted = sum(v * d for v, d in zip(volumes_of, shares, strict=True)) / sum(volumes_of)
    assert still["weighted_dice"] == pytest.approx(wanted, abs=1e-4)
    assert still["weighted_dice"] > still["mean_dice"]
    # Faces move by two voxels of 2 mm, and they are more than a twentieth of each surface.
    assert still["hd95_of_each"] == pytest.approx([2.0 * SHIFT] * 4)
    assert still["hd95"] == pytest.approx(2.0 * SHIFT)
    assert still["folding"] == 0


def test_a_lost_organ_has_dice_0_and_no_distance(prepared) -> None:
    pair = script.load(script.cases(prepared)[0], prepared)
    lost = pair._replace(moving_labels=pair.moving_labels.where(pair.moving_labels != 3, 0))
    found = script.measure(lost, truth())
    assert found["dice"] == [1, 1, 0, 1]
    assert found["hd95_of_each"] == [0, 0, None, 0]
    assert found["hd95"] == 0
    assert math.isclose(found["mean_dice"], 0.75)


def test_an_organ_that_neither_map_has_does_not_count(prepared) -> None:
    pair = script.load(script.cases(prepared)[0], prepared)
    maps = {n: getattr(pair, n) for n in ("moving_labels", "fixed_labels")}
    without = pair._replace(**{n: x.where(x != 3, 0) for n, x in maps.items()})
    found = script.measure(without, truth())
    assert found["dice"] == [1, 1, None, 1]
    assert (found["mean_dice"], found["weighted_dice"]) == (1, 1)


# --- The command line -----------------------------------------------------------------------


def test_fields_from_elsewhere_are_scored(prepared, tmp_path) -> None:
    fields = tmp_path / "mine"
    fields.mkdir()
    with pytest.raises(FileNotFoundError, match="got none"):
        script.score(prepared, fields)
    write_field(fields / "0007.nii.gz", truth(), AFFINE)
    found = script.score(prepared, fields)
    assert len(found["rows"]) == 2
    assert found["summary"]["abdomen"]["mine"]["weighted_dice"] == 1
    assert found["above"]["abdomen"]["mine"]["unregistered"]["mean_dice"] > 0.3
    text = volumes.table(found)
    assert "weighted_dice" in text
    assert "hd95" in text
    write_field(fields / "0001.nii.gz", truth()[..., :20], AFFINE)
    with pytest.raises(ValueError, match="fixed grid"):
        script.score(prepared, fields)


def test_prepare_run_and_results(folder, tmp_path, monkeypatch, fake_workers, capsys) -> None:
    """All verbs in a row; the workers know the truth."""
    monkeypatch.setattr(script, "WORK", tmp_path / "work")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(provenance, "provenance", lambda: {"uncommitted_changes": False})
    monkeypatch.setattr(benchmark, "CAP", benchmark.CAP)  # the script sets its own

    def register(worker, name, settings):
        assert worker.script.name == "abdomen_mrct.py"
        assert read_image(worker.files["fixed"]).tensor.shape[2:] == SHAPE
        write_field(worker.files["field"], truth(), AFFINE)
        return {"seconds": 0.5, "cpu_seconds": 0.5}

    fake_workers(benchmark, register)
    script.main(["prepare", str(folder)])
    assert "0001, 0007" in capsys.readouterr().out
    script.main(["run"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"]
    assert found["script"] == "data_scripts/abdomen_mrct.py"
    assert len(found["rows"]) == 2 * (1 + len(volumes.CONFIGURATIONS))
    one = found["summary"]["abdomen"]
    assert all(one[name]["mean_dice"] == 1 for name in volumes.CONFIGURATIONS)
    assert one["unregistered"]["hd95"] == 4
    script.main([])
    assert "prepare" in capsys.readouterr().out
    monkeypatch.setattr(provenance, "provenance", lambda: {"uncommitted_changes": True})
    with pytest.raises(SystemExit, match="commit"):
        script.main(["run"])
