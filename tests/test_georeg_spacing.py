"""Thick slices: what is averaged, what is told, one training, and the table of both networks.

About 20 s on one core.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reglib.geometry.sampling import warp
from reglib.methods import georeg

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("georeg_spacing")
    synthetic = importlib.import_module("georeg_synthetic_networks")
    records = importlib.import_module("benchmark_record")
    provenance = importlib.import_module("provenance")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (24, 20, 24)
PARTS = {"training": ["a", "b"], "tuning": ["c", "d"], "test": ["e", "f", "g"]}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ball(shape: tuple[int, ...]) -> torch.Tensor:
    """A smooth ball ``(1, 1, *S)`` off the middle, 0 outside."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1)
    x = (places - torch.tensor([0.45 * n for n in shape])) / torch.tensor(shape)
    return (1 - (x.norm(dim=-1) / 0.4) ** 2).clamp(0, 1)[None, None]


@pytest.fixture
def small(monkeypatch, tmp_path, uncached):
    """Balls in place of brains, and networks that learn nothing worth having in no time."""
    asked = []

    def load(part, dimensions=2):
        asked.append(part)
        names = PARTS[part]
        shades = 1 - torch.arange(len(names)).view(-1, 1, 1, 1, 1) / 10
        images = ball(SHAPE) * shades
        return synthetic.Brains(names, images, (images > 0).byte())

    for module in (script, synthetic):
        monkeypatch.setattr(module, "load", load)
    settings = {"channels": [4, 6], "neighbourhoods": [0, 3], "iterations": [0, 1]}
    monkeypatch.setattr(script, "GEOREG", script.GEOREG | settings | {"interpolation": [2]})
    monkeypatch.setattr(script, "REGULARITY_WEIGHT", [0.1, 0.1])
    monkeypatch.setattr(script, "MULTIPLE", 2)
    own = script.Trainings(tmp_path / "new", tmp_path / "steps.json")
    monkeypatch.setattr(script, "TRAININGS", own)
    monkeypatch.setattr(script, "WORK", tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.json")
    uncached(script.trained)
    return asked


def deformed(count: int = 1, shape: tuple[int, ...] = SHAPE, seed: int = 0):
    images = ball(shape).expand(count, -1, *shape)
    return synthetic.deformed(images, [script.CELL] * count, generator(seed))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (4.0, 4.0, 6.0), (8.0, 4.0, 12.0)])
def test_thick_voxels_are_means_of_thin_ones(count, spacing):
    """A plain mean of blocks; sizes that end in a part of a voxel lose it, and are padded."""
    pairs = deformed(count, (26, 21, 25))
    found = script.thick(pairs, spacing)
    factors = [round(s / 2) for s in spacing]
    whole = [n // f for n, f in zip((26, 21, 25), factors, strict=True)]
    block = tuple(slice(0, n) for n in whole)
    for name in ("moving", "fixed", "field"):
        x = getattr(pairs, name).double().numpy()
        for axis, (n, f) in enumerate(zip(whole, factors, strict=True), 2):
            x = np.take(x, range(n * f), axis)
            x = x.reshape(*x.shape[:axis], n, f, *x.shape[axis + 1 :]).mean(axis + 1)
        if name == "field":
            x = x / np.array(factors).reshape(-1, 1, 1, 1)
        own = getattr(found, name)
        np.testing.assert_allclose(own[(..., *block)].numpy(), x, atol=1e-5)
        assert all(n % script.MULTIPLE == 0 for n in own.shape[2:])
        assert float(own.abs().sum()) == pytest.approx(float(np.abs(x).sum()), rel=1e-4)
    assert found.mask.dtype == torch.bool
    assert found.spacing == spacing
    # A thick voxel belongs to the mask if all of its thin ones do.
    assert int(found.mask.sum()) * int(np.prod(factors)) <= int(pairs.mask.sum())


def test_the_truth_of_thick_slices_carries_the_moving_onto_the_fixed_image():
    """Where the ball is smooth, the mean of a warped block is the warped mean, but for a little."""
    pairs = deformed(2, (64, 56, 64))
    for spacing in ((4.0, 4.0, 4.0), (4.0, 8.0, 4.0)):
        pair = script.thick(pairs, spacing)
        before = (pair.moving - pair.fixed).abs()[pair.mask].mean()
        after = (warp(pair.moving, pair.field) - pair.fixed).abs()[pair.mask].mean()
        assert float(after) < 0.25 * float(before)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_error_is_in_millimetres(axis):
    pair = script.thick(deformed(), (4.0, 6.0, 8.0))
    off = pair.field.clone()
    off[:, axis] += 1
    assert float(script.error(off, pair)) == pytest.approx((4.0, 6.0, 8.0)[axis], rel=1e-5)
    assert script.measure(pair.field, pair)["error"] == 0


def test_only_the_network_that_is_told_hears_of_the_spacing(small):
    torch.manual_seed(0)
    inner = georeg.GeoReg(**script.GEOREG).eval()
    for parameter in inner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pair = script.thick(deformed(), (4.0, 4.0, 8.0))
    images = pair.moving, pair.fixed
    told, untold = (script.Registering(inner, told=t) for t in (True, False))
    with torch.no_grad():
        wanted = inner(*images, spacing=(1.0, 1.0, 2.0)).field
        plain = inner(*images).field
        told.spacing = untold.spacing = pair.spacing
        assert torch.equal(told(*images).field, wanted)
        assert torch.equal(untold(*images).field, plain)
        assert not torch.allclose(wanted, plain)
        told.spacing = (4.0, 4.0, 4.0)  # the unit: as if it were not told
        torch.testing.assert_close(told(*images).field, plain)


def test_the_stream_draws_every_length_for_every_axis_and_announces_it(small):
    network = script.new("told")
    pairs = script.Announced(script.ThickPairs(script.load("training").images, 1, 0), network)
    seen = set()
    for _, (moving, fixed, spacing) in zip(range(60), pairs, strict=False):
        assert network.spacing == spacing
        assert moving.shape == fixed.shape
        sizes = [-(-n * 2 // (2 * s)) * 2 for n, s in zip(SHAPE, spacing, strict=True)]
        assert list(moving.shape[2:]) == [int(n) + int(n) % 2 for n in sizes]
        seen.add(spacing)
    assert len(seen) == len(script.LENGTHS) ** 3


def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(small, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "VALIDATE_EVERY", 1)
    whole = script.train("told", 0, 3, path=tmp_path / "a" / "whole.safetensors")
    fit = script.trainings.fit

    def stopped(*arguments, **options):
        looks = []

        def look(network):
            looks.append(network)
            if len(looks) == 2:
                raise KeyboardInterrupt
            return options["validate"](network)

        return fit(*arguments, **(options | {"validate": look}))

    monkeypatch.setattr(script.trainings, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.train("told", 0, 3, path=tmp_path / "a" / "parts.safetensors")
    monkeypatch.setattr(script.trainings, "fit", fit)
    parts = script.train("told", 0, 3, path=tmp_path / "a" / "parts.safetensors")
    assert parts["loss"] == whole["loss"]
    assert parts["tuning_error"] == whole["tuning_error"]
    assert "test" not in small


def test_the_table_has_every_subject_once_and_says_who_is_nearer(small, monkeypatch, capsys):
    """Trained in this process; calibration, training, the test of both parts and the file."""
    script.TRAININGS.calibration.write_text(json.dumps({"steps": {script.EIGHT: 1}}))
    assert script.steps_of("told") == script.steps_of("untold") == 8
    with pytest.raises(SystemExit, match="not trained yet"):
        script.test("tuning", None)
    runs = [script.train(name, seed, 2) for seed in script.SEEDS for name in script.NETWORKS]
    script.TRAININGS.log.write_text(json.dumps(runs))
    with pytest.raises(SystemExit, match="no such configuration"):
        script.test("tuning", ["nobody"])
    script.test("tuning", ["told, seed 0"])
    assert not script.RESULTS.exists()
    clean = {"uncommitted_changes": False, "commit": "c"}
    for module in (provenance, records):
        monkeypatch.setattr(module, "provenance", lambda: clean)
    script.test("test", None)
    content = json.loads(script.RESULTS.read_text())
    spacings, subjects = len(script.SEEN) + len(script.UNSEEN), len(PARTS["test"])
    count = spacings * subjects * (1 + len(script.NETWORKS) * len(script.SEEDS))
    assert len({records.key(row) for row in content["rows"]}) == len(content["rows"]) == count
    assert content["complete"]
    assert list(content["spacings"]) == [script.set_of(s) for s in script.SEEN + script.UNSEEN]
    for own in content["spacings"].values():
        less = own["told minus untold"]
        assert less["pairs"] == subjects
        expected = own["told"]["error"] - own["untold"]["error"]
        assert less["error"] == pytest.approx(expected, abs=0.02)
        assert len(own["told"]["seeds"]) == len(script.SEEDS)
    assert "4 x 4 x 12 mm" in capsys.readouterr().out
    # What was measured is not measured again.
    script.test("test", None)
    assert json.loads(script.RESULTS.read_text())["rows"] == content["rows"]
