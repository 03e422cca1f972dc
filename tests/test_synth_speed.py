"""The script that times random pairs, and the plain way to make them that it compares with."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import perlin_numpy
import pytest
import torch

from reglib import synth
from reglib.synth import perlin_noise

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    baseline = importlib.import_module("synth_baseline")
    script = importlib.import_module("synth_speed")
    timing = importlib.import_module("timing")
finally:
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize(("shape", "cell"), [((13, 18), 5), ((7, 9, 8), 3.5)], ids=str)
def test_the_plain_noise_is_the_sum_of_faded_ramps(shape, cell):
    """Voxel by voxel; 1e-12 is the rounding of float64."""
    noise, gradients = baseline.perlin(shape, cell, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(gradients, axis=-1), 1, atol=1e-12)
    for voxel in np.ndindex(shape):
        p = np.array(voxel) / cell
        expected = 0.0
        for corner in itertools.product((0, 1), repeat=len(shape)):
            node = np.floor(p).astype(int) + corner
            near = 1 - np.abs(p - node)
            fade = np.prod(6 * near**5 - 15 * near**4 + 10 * near**3)
            expected += fade * gradients[tuple(node)] @ (p - node)
        assert noise[voxel] == pytest.approx(expected, abs=1e-12)


def test_the_plain_noise_is_distributed_as_perlin_numpys_and_the_librarys():
    """Standard deviations of 60 noises, which are known to 3 %; perlin-numpy's 2-D has sqrt(2)."""
    rng = np.random.default_rng(1)
    plain = np.std([baseline.perlin((32, 32), 8, rng)[0] for _ in range(60)])
    theirs = np.std(
        [perlin_numpy.generate_perlin_noise_2d((32, 32), (4, 4), rng=rng) for _ in range(60)]
    )
    ours = perlin_noise((32, 32), batch=60, cell=8, generator=torch.Generator().manual_seed(0))
    assert plain == pytest.approx(theirs / math.sqrt(2), rel=0.12)
    assert plain == pytest.approx(ours.std().item(), rel=0.12)


@pytest.mark.parametrize("shape", [(20, 26), (16, 20, 18)], ids=str)
def test_a_plain_pair_is_two_views_of_one_world(shape):
    pair = baseline.random_pair(shape, np.random.default_rng(2), cell=8)
    for image in pair:
        assert image.shape == (1, 1, *shape)
        assert image.dtype == torch.float32
    moving, fixed, moving_labels, fixed_labels = pair
    assert not moving.equal(fixed)
    assert 0 <= float(moving.min()) < float(moving.max()) <= 1
    for labels in (moving_labels, fixed_labels):
        assert set(labels.unique().tolist()) <= set(range(16))
    # Where a voxel and its neighbours have one label, the grey value is that of the label.
    greys = {}
    for image, labels in ((moving, moving_labels), (fixed, fixed_labels)):
        inner = torch.ones_like(labels, dtype=torch.bool)
        for axis in range(2, labels.ndim):
            for step in (-2, -1, 1, 2):
                inner &= labels == labels.roll(step, axis)
        for label in labels[inner].unique().tolist():
            greys.setdefault(label, []).append(image[inner & (labels == label)].median().item())
    shared = [found for found in greys.values() if len(found) == 2]
    assert shared
    assert all(a == pytest.approx(b, abs=0.02) for a, b in shared)


def test_a_trial_measures_everything_and_writes_nothing(monkeypatch, capsys):
    path = ROOT / "results" / script.NAME
    before = path.read_bytes() if path.exists() else None
    words = ["--shape", "16", "20", "24", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["synth_speed.py", *words])
    script.main()
    found = json.loads(capsys.readouterr().out)
    assert found["median_seconds"].keys() == {"pair", "samplings", "warps", "baseline"}
    assert all(value > 0 for value in found["median_seconds"].values())
    ratio = found["median_seconds"]["pair"] / found["median_seconds"]["samplings"]
    assert found["pair_over_samplings"] == pytest.approx(ratio, rel=1e-2)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_job_writes_a_record_into_its_folder(tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text(json.dumps({"repeats": 1, "shape": [16, 20, 24]}))
    words = ["--settings", str(tmp_path / "settings.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["synth_speed.py", *words])
    script.main()
    [run] = json.loads((tmp_path / script.NAME).read_text())["runs"]
    assert run["device"] == "cpu"
    assert "baseline" not in run["median_seconds"]
    assert run["provenance"]["commit"]


def test_medians_are_of_the_rounds_after_the_first(monkeypatch):
    clock = iter(range(1000))
    seconds = iter([100, 3, 1, 2])
    now = [0.0]

    def call():
        now[0] += next(seconds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0] + 0 * next(clock))
    assert timing.in_turn({"it": call}, 3) == {"it": 2}


def test_a_device_has_one_record_and_the_cpu_comes_first(tmp_path):
    path = tmp_path / "x.json"
    for device, seconds in (("NVIDIA H200", 1), ("cpu", 2), ("NVIDIA H200", 3)):
        timing.add(path, {"script": "s"}, {"device": device, "seconds": seconds})
    found = json.loads(path.read_text())
    assert found["script"] == "s"
    assert found["runs"] == [
        {"device": "cpu", "seconds": 2},
        {"device": "NVIDIA H200", "seconds": 3},
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(23, 31), (13, 17, 11)], ids=str)
def test_sampling_in_parts_changes_no_bit(shape, batch, monkeypatch):
    def pair():
        return synth.random_pair(
            shape, batch=batch, cell=8, generator=torch.Generator().manual_seed(3)
        )

    monkeypatch.setattr(synth, "PART", 10**9)
    whole = pair()
    for part in (10**9 - 1, 400, 1):
        monkeypatch.setattr(synth, "PART", part)
        for a, b in zip(pair(), whole, strict=True):
            assert a.equal(b)
