"""The table between subjects: the phantom's truth, contrasts, pairs, one training, arithmetic.

Recipes, peers and the processes of the benchmark are tested with the synthetic table and with the
benchmark. About 15 s on one core.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reglib.data.nifti import read_field, read_image, write_field, write_image
from reglib.geometry.sampling import warp, warp_labels
from reglib.objectives.metrics import folding

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("georeg_subjects")
    networks = importlib.import_module("georeg_subjects_networks")
    synthetic = importlib.import_module("georeg_synthetic_networks")
    phantom = importlib.import_module("oct_phantom")
    benchmark = importlib.import_module("benchmark_classical")
    records = importlib.import_module("benchmark_record")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (32, 48)
PLANES = len(synthetic.TRAINING_PLANES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- The phantom ----------------------------------------------------------------------------


def test_piecewise_is_what_numpy_interpolates():
    knots = torch.tensor([[0.0, 1.0, 4.0], [-2.0, 0.0, 0.5]])
    values = torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, 3.0]])
    x = torch.linspace(-3, 5, 41).expand(2, -1)
    found = phantom.piecewise(x, knots, values)
    expected = [np.interp(*(np.asarray(part[k]) for part in (x, knots, values))) for k in (0, 1)]
    torch.testing.assert_close(found, torch.tensor(np.stack(expected), dtype=torch.float32))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_truth_of_the_phantom_carries_its_layers(count):
    pair = phantom.scans(count, generator(count))
    for part in pair[:4]:
        assert part.shape == (count, 1, *phantom.SHAPE)
    assert pair.field.shape == (count, 2, *phantom.SHAPE)
    assert not pair.field[:, 1].any()  # along depth only
    assert set(pair.fixed_labels.unique().tolist()) == set(range(1 + len(phantom.LAYERS)))
    carried = warp_labels(pair.moving_labels, pair.field)
    # Boundaries lie between pixels: where one rounds to the other side, a pixel differs.
    inside = pair.fixed_labels > 0
    assert (carried == pair.fixed_labels)[inside].float().mean() > 0.92
    assert float(folding(pair.field).max()) == 0
    for images in (pair.moving, pair.fixed):
        assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_layers_only_become_thinner_and_speckle_is_drawn_anew():
    pair = phantom.scans(8, generator())
    counts = [
        torch.stack([(labels == n).sum((1, 2, 3)) for n in range(1, 1 + len(phantom.LAYERS))])
        for labels in (pair.moving_labels, pair.fixed_labels)
    ]
    before, after = (count / phantom.SHAPE[1] for count in counts)  # pixels of thickness
    assert (after <= before + 0.5).all()
    assert (after >= (1 - phantom.THINNING) * before - 0.5).all()
    shifts = pair.field[:, 0].mean((1, 2)).abs()
    assert float(shifts.max()) > 10  # more than a layer
    # Where the truth is undone, what is left are two draws of speckle, of a quarter of the signal.
    inside = pair.fixed_labels > 0
    apart = (warp(pair.moving, pair.field) - pair.fixed)[inside]
    assert float(apart.std()) > 0.25 * float(pair.fixed[inside].mean())
    assert torch.equal(phantom.scans(8, generator()).moving, pair.moving)


# --- Pairs ----------------------------------------------------------------------------------


def test_a_remapped_t1_is_dark_where_there_was_nothing_and_brightest_where_there_was_fluid():
    values = torch.linspace(0, 1, 101).view(1, 1, 1, -1).expand(2, 1, 3, -1)
    found = networks.remapped(values)
    expected = np.interp(values[0, 0, 0], list(networks.CURVE), list(networks.CURVE.values()))
    torch.testing.assert_close(found[1, 0, 2], torch.tensor(expected, dtype=torch.float32))
    assert float(found[..., 0].max()) == 0
    assert 0.25 < float(values[0, 0, 0, int(found[0, 0, 0].argmax())]) < 0.45
    fluid, grey, white = (float(found[0, 0, 0, n]) for n in (35, 57, 80))
    assert fluid > grey > white


@pytest.fixture
def members(monkeypatch, tmp_path, uncached):
    """Heads told apart by their brightness in place of the brains: 4 to train, 6 and 6."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1)
    x = (places - torch.tensor([(n - 1) / 2 for n in SHAPE])) / torch.tensor(SHAPE)
    r = x.norm(dim=-1)
    labels = (r < 0.42).byte() + (r < 0.2).byte()

    def load(part):
        count = 4 * PLANES if part == "training" else 6
        bright = 0.5 + 0.5 * torch.arange(count).view(-1, 1, 1, 1) / count
        images = bright * (labels / 2)[None, None]
        names = [f"{part} {n}" for n in range(count)]
        return synthetic.Brains(names, images, labels.expand(count, 1, *SHAPE))

    for module in (script, networks):
        monkeypatch.setattr(module, "load", load)
    own = networks.Trainings(tmp_path, tmp_path / "steps.json", 450.0)
    monkeypatch.setattr(networks, "TRAININGS", own)
    monkeypatch.setattr(script, "WORK", tmp_path)
    uncached(script.trained)
    return load


def test_training_pairs_are_of_two_subjects_in_one_plane_and_half_are_remapped(members):
    images = members("training").images
    stream = networks.SubjectPairs(images, PLANES, 3, seed=1)
    level = {float(image.max()): divmod(n, PLANES) for n, image in enumerate(images)}
    taken, remapped, drawn = iter(stream), 0, 60
    for _ in range(drawn // 3):
        for moving, fixed in zip(*next(taken), strict=True):
            known = level.get(float(fixed.max()))
            remapped += known is None
            if known is not None:
                subject, plane = level[float(moving.max())]
                assert known[0] != subject
                assert known[1] == plane
            # What is remapped is dark where the other is, but for noise.
            assert float(fixed[..., 0, 0].max()) < 0.15
    # Binomial(60, 1/2): beyond four standard deviations once in 16,000 seeds.
    assert abs(remapped - drawn / 2) < 4 * (drawn / 4) ** 0.5
    state = stream.state_dict()
    after = next(taken)
    stream.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(after, next(iter(stream)), strict=True))


def test_cases_of_different_clusters_share_nobody_and_tuning_has_no_patients(members):
    found = script.cases(networks.BRAINS, "test")
    assert len(set(found)) == len(found) == 6 + 6 + 2 * 5 * 2
    assert {case.set for case in found} == {script.T1, script.T2, script.KNOWN}
    for one in (script.T1, script.T2):
        own = [case for case in found if case.set == one]
        people = {n: {p for c in own if c.cluster == n for p in c[1:3]} for n in (0, 1)}
        assert [len(p) for p in people.values()] == [3, 3]
        assert not people[0] & people[1]
    tuning = script.cases(networks.BRAINS, "tuning")
    assert {case.set for case in tuning} == {script.T1, script.T2}
    assert len(script.cases(networks.LAYERS, "test")) == networks.LAYER_PAIRS["test"]
    first, again, other = (
        script.load_pair(script.cases(networks.LAYERS, part)[0], part)
        for part in ("test", "test", "tuning")
    )
    assert torch.equal(first.moving.tensor, again.moving.tensor)
    assert not torch.equal(first.moving.tensor, other.moving.tensor)


def test_pairs_are_of_the_contrasts_that_their_set_names(members):
    t1, t2 = (
        script.load_pair(next(c for c in script.cases("brains", "test") if c.set == one), "test")
        for one in (script.T1, script.T2)
    )
    images = members("test").images
    assert torch.equal(t1.fixed.tensor, images[1:2])
    assert torch.equal(t1.moving.tensor, images[:1])
    assert torch.equal(t2.moving.tensor, images[:1])
    apart = t2.fixed.tensor - networks.remapped(images[1:2])
    assert 0 < float(apart.abs().max()) < 6 * synthetic.NOISE
    assert t2.truth is None


def test_the_known_pair_is_a_t2_deformed_by_the_truth_and_a_t1_that_is_not(monkeypatch):
    t2 = torch.rand(1, 1, 80, 96, 52, generator=generator()) + 0.2
    t2[:, :, :8] = 0
    t2 = t2.clamp(0, 1)
    monkeypatch.setattr(script, "patient_volumes", lambda patient: (1 - t2, t2))
    pair = script.known_pair("patient19 t1 42 1")
    assert torch.equal(pair.moving.tensor, 1 - t2[..., 42])
    again = warp(t2[..., 42], pair.truth.field, padding="zeros")
    off = (pair.fixed.tensor - again).abs()
    assert float(off.max()) < 6 * synthetic.NOISE
    assert script.measure(pair, pair.truth.field)["error"] == 0
    assert script.measure(pair, 0 * pair.truth.field)["error"] > 1
    other = script.known_pair("patient19 t1 42 0")
    assert not torch.equal(other.truth.field, pair.truth.field)


# --- Networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GeoReg", "FCN, composed, layers"])
def test_a_trained_network_comes_back_from_its_file_and_registers(members, monkeypatch, name):
    small = {
        "GeoReg": {"channels": [4, 6], "neighbourhoods": [2, 3], "iterations": [1, 1]}
        | {"interpolation": 2},
        "FCN, composed": {"channels": [4, 6], "decoder_channels": [4, 6]},
    }
    recipes = {
        method: networks.RECIPES[method]._replace(settings=own, batch=2)
        for method, own in small.items()
    }
    recipes["GeoReg"] = recipes["GeoReg"]._replace(objective={"regularity_weight": 0.1})
    monkeypatch.setattr(networks, "RECIPES", recipes)
    kind = networks.NETWORKS[name][1]
    record = networks.train(name, 0, 2)
    assert json.loads(json.dumps(record)) == record
    assert len(record["tuning_dice"]) == 1
    assert 0 < record["tuning_dice"][0] <= 1
    path = networks.TRAININGS.weights(name, 0)
    network = script.trained(str(path))
    assert network.card["training"] == record["training"]
    case = script.cases(kind, "test")[0]
    pair = script.load_pair(case, "test")
    files = {part: script.WORK / f"{part}.nii.gz" for part in ("moving", "fixed", "field")}
    for part, image in (("moving", pair.moving), ("fixed", pair.fixed)):
        write_image(files[part], image)
    settings = {"weights": str(path)}
    script.run_reglib(*map(str, files.values()), settings, methods_of=script.methods_of)
    with torch.no_grad():
        expected = network(pair.moving.tensor, pair.fixed.tensor).field
    found = read_field(files["field"])[0].float()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    row = script.measure(pair, found)
    assert ("error" in row) == (kind == networks.LAYERS)
    assert 0 <= row["mean_dice"] <= 1


def test_no_pairs_without_everything_trained_and_none_of_unknown_names(members, monkeypatch):
    with pytest.raises(SystemExit, match="not trained yet"):
        script.asked_for(None, [])
    for words in (["test", "--only", "nobody"], ["train", "nobody"]):
        monkeypatch.setattr(sys, "argv", ["georeg_subjects.py", *words])
        with pytest.raises(SystemExit, match="no such configuration"):
            script.main()
    assert not list(script.WORK.glob("*tuning.json"))


def test_every_configuration_is_json_and_is_registered_by_what_it_names(members):
    for kind in script.RESULTS:
        found = script.configurations(kind)
        assert json.loads(json.dumps(found)) == found
        for name, methods in script.METHODS.items():
            assert script.methods_of(found[name]) == methods
        own = {script.method_of(name) for name, settings in found.items() if "weights" in settings}
        assert own == {name for name, (_, k) in networks.NETWORKS.items() if k == kind}
    brains, layers = (script.configurations(kind) for kind in script.RESULTS)
    assert set(brains) & set(layers) == {*script.METHODS, *script.PEERS}


# --- The table ------------------------------------------------------------------------------


def test_the_tuning_table_is_measured_from_what_workers_leave(members, fake_workers, capsys):
    """All that the script does but the registrations themselves: the field is 0."""
    wanted = {name: {"package": "SimpleITK"} for name in ("peer", "other")}

    def register(worker, name, settings):
        assert len(worker.warm) == 2
        shape = read_image(worker.files["fixed"]).tensor.shape[2:]
        write_field(worker.files["field"], torch.zeros(1, 2, *shape), script.AFFINE)
        return {"seconds": 0.5, "cpu_seconds": 0.5}

    fake_workers(benchmark, register)
    for kind, least in ((networks.BRAINS, 0.1), (networks.LAYERS, 0.0)):
        script.test(kind, "tuning", wanted, [])
        rows = json.loads((script.WORK / f"{kind}_tuning.json").read_text())["rows"]
        assert len(rows) == 3 * len(script.cases(kind, "tuning"))
        assert len({row["mean_dice"] for row in rows if row["moving"] == rows[0]["moving"]}) <= 2
        assert min(row["mean_dice"] for row in rows) >= least
    told = capsys.readouterr().out
    assert "T1 to T2" in told
    assert "layers" in told


def rows_of(**scores: list[float | None]) -> list[dict]:
    """Made-up rows of one set: the Dice of each configuration, None where it failed."""
    rows = []
    for name, values in scores.items():
        for n, x in enumerate(values):
            row = {"set": "T1 to T1", "moving": f"m{n}", "fixed": f"f{n}", "cluster": n}
            row |= {"configuration": name, "seconds": 0.5, "timed_out": False}
            row |= {"failed": "broken"} if x is None else {"failed": None, "mean_dice": x}
            rows.append(row)
    return rows


def test_seeds_are_averaged_before_anything_is_compared():
    scores = {
        records.UNREGISTERED: [0.5, 0.6],
        "GeoReg, seed 0": [0.7, 0.8],
        "GeoReg, seed 1": [0.9, None],
        "ANTs": [0.6, 0.7],
    }
    rows = script.over_seeds(rows_of(**scores))
    means = {(row["configuration"], row["moving"]): row["mean_dice"] for row in rows}
    assert means["GeoReg", "m0"] == pytest.approx(0.8)
    assert means["GeoReg", "m1"] == pytest.approx((0.8 + 0.6) / 2)  # as unregistered
    assert len(rows) == 3 * 2
    found = script.summarise(rows_of(**scores), ["GeoReg, seed 0", "GeoReg, seed 1"])
    table = found["summary"]["T1 to T1"]
    assert table["GeoReg"]["mean_dice"] == pytest.approx(0.75)
    assert table["GeoReg"]["failed"] == 1
    assert table["ANTs"]["failed"] == 0
    gain = found["above"]["T1 to T1"]["GeoReg"]["ANTs"]
    assert gain["mean_dice"] == pytest.approx(0.1)
    assert gain["pairs"] == 2
    assert "GeoReg" in script.volumes.table(found)
