"""The network for whole brains and its table: pairs, training, what travels, arithmetic.

Processes and records are tested with the benchmark, the summary with the tables of slices. About
10 s on one core.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from reglib.data.nifti import read_field, write_image
from reglib.geometry.fields import upsample_field
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import georeg

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("georeg_volumes")
    networks = importlib.import_module("georeg_synthetic_networks")
    records = importlib.import_module("benchmark_record")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (16, 24, 32)
NAMES = [f"subject {n}" for n in range(30)]


def load(part: str, dimensions: int = 2):
    """Balls in place of brains, their halves as structures."""
    assert dimensions == 3
    names = NAMES if part == "test" else NAMES[:3]
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1)
    x = (places - torch.tensor([0.45 * n for n in SHAPE])) / torch.tensor(SHAPE)
    ball = (1 - (x.norm(dim=-1) / 0.4) ** 2).clamp(0, 1)[None, None]
    shades = 1 - torch.arange(len(names)).view(-1, 1, 1, 1, 1) / 60
    labels = (ball > 0).byte() * (1 + (x[..., 0] > 0).byte())
    return networks.Brains(names, ball * shades, labels.expand(len(names), 1, *SHAPE))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A network of two levels that is trained for two steps."""
    for module in (script, networks):
        monkeypatch.setattr(module, "load", load)
    settings = {"channels": [2, 4], "neighbourhoods": [0, 3], "iterations": [0, 1]}
    recipe = script.NETWORKS["GeoReg"]
    recipe = recipe._replace(
        settings=recipe.settings | settings | {"interpolation": [2]},
        objective={"similarity": networks.lncc_of_five, "regularity_weight": [1.0, 0.5]},
    )
    monkeypatch.setattr(script, "NETWORKS", {"GeoReg": recipe})
    own = script.Trainings(tmp_path / "new", tmp_path / "steps.json")
    own.calibration.write_text(json.dumps({"steps": {"GeoReg": 2}}))
    monkeypatch.setattr(script, "TRAININGS", own)
    monkeypatch.setattr(script, "WORK", tmp_path)
    monkeypatch.setattr(script, "WEIGHTS", tmp_path / "embedded.safetensors")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.json")
    script.trained.cache_clear()
    yield
    script.trained.cache_clear()


def test_every_subject_is_deformed_once_and_moves_once(small):
    found = script.cases("test")
    deformed = [case for case in found if case.set != script.T1]
    assert [case.set for case in deformed[::2]] == [cell.name for cell in networks.CELLS]
    assert [case.set for case in deformed[1::2]] == [cell.name for cell in networks.CELLS]
    assert sorted(case.moving for case in deformed) == sorted(NAMES)
    assert all(case.moving == case.fixed for case in deformed)
    onto_others = found[len(deformed) :]
    assert [case.moving for case in onto_others] == NAMES
    assert sorted(case.fixed for case in onto_others) == sorted(NAMES)
    assert all(case.moving != case.fixed for case in onto_others)
    # Nobody is in two clusters.
    of = {(name, case.cluster) for case in onto_others for name in (case.moving, case.fixed)}
    assert len(of) == len(NAMES)


def test_with_few_subjects_only_some_cells_have_a_pair(small):
    found = script.cases("tuning")
    assert [case.set for case in found] == [cell.name for cell in networks.CELLS[:3]] + [
        script.T1
    ] * 3


def test_the_truth_carries_image_and_labels(small):
    case = script.cases("test")[-40]
    pair = script.load_pair(case, "test")
    again = warp(pair.moving.tensor, pair.truth.field, padding="zeros")
    # Noise has a standard deviation of 0.02.
    assert float((pair.fixed.tensor - again).abs().max()) < 6 * networks.NOISE
    assert torch.equal(pair.fixed_labels, warp_labels(pair.moving_labels, pair.truth.field))
    found = script.measure(pair, pair.truth.field)
    assert found["error"] == 0
    assert found["mean_dice"] == 1


def test_two_people_have_labels_and_no_truth(small):
    case = script.cases("test")[-1]
    pair = script.load_pair(case, "test")
    members = load("test", 3)
    assert pair.truth is None
    for image, labels, name in (
        (pair.moving, pair.moving_labels, case.moving),
        (pair.fixed, pair.fixed_labels, case.fixed),
    ):
        place = NAMES.index(name)
        assert torch.equal(image.tensor[0], members.images[place])
        assert torch.equal(labels[0], members.labels[place].long())
        assert image.spacing == (2.0, 2.0, 2.0)
    assert "error" not in script.measure(pair, torch.zeros(1, 3, *SHAPE))


def test_what_is_trained_on_has_voxels_of_twice_the_size(small):
    moving, fixed = next(iter(networks.stream(script.NETWORKS["GeoReg"], 0, "cpu")))
    assert moving.shape == fixed.shape == (1, 1, *(n // 2 for n in SHAPE))


def test_the_network_that_travels_is_the_trained_one_and_brings_volumes_to_4_mm(small, tmp_path):
    """Through ``register`` it finds what it finds of the means of 2 x 2 x 2 voxels."""
    with pytest.raises(SystemExit, match="not trained yet"):
        script.test("tuning", ["GeoReg"], [])
    record = script.train("GeoReg", 0, 2)
    script.TRAININGS.log.write_text(json.dumps([record]))
    script.embed()
    assert record["training"]["steps"] == 2
    assert record["training"]["pooled"] == 2
    trained = georeg.load(script.TRAININGS.weights("GeoReg", 0))
    embedded = georeg.load(script.WEIGHTS)
    for name, value in trained.state_dict().items():
        assert torch.equal(embedded.state_dict()[name], value.half().float())
    said = {"range": [0.0, 1.0], "orientation": "RAS", "spacing": [4.0] * 3}
    assert embedded.card["input"] == trained.card["input"] | said

    configurations = script.configurations()
    for name in script.METHODS:
        script.methods_of(configurations[name])
    pair = script.load_pair(script.cases("test")[-1], "test")
    files = {part: tmp_path / f"{part}.nii.gz" for part in ("moving", "fixed", "field")}
    for part, image in (("moving", pair.moving), ("fixed", pair.fixed)):
        write_image(files[part], image)
    settings = configurations["GeoReg"] | {"weights": str(script.WEIGHTS)}
    script.run_reglib(*map(str, files.values()), settings, methods_of=script.methods_of)
    found = read_field(files["field"])[0].float()
    assert found.shape == (1, 3, *SHAPE)
    pooled = [
        torch.nn.functional.avg_pool3d(image.tensor, 2) for image in (pair.moving, pair.fixed)
    ]
    with torch.no_grad():
        coarse = embedded(*((x - x.min()) / (x.max() - x.min()) for x in pooled)).field
    wanted = upsample_field(coarse, 2, SHAPE)
    inside = (slice(None), slice(None), *(slice(4, -4),) * 3)
    assert (found - wanted)[inside].norm(dim=1).mean() < 0.25


def test_no_table_of_unknown_names(small):
    with pytest.raises(SystemExit, match="no such configuration"):
        script.test("tuning", ["nobody"], [])
    with pytest.raises(SystemExit, match="no such configuration"):
        script.test("tuning", None, ["nobody"])
