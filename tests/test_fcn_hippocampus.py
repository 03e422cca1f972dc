"""The table of the hippocampi: pairs, boxes, recipes, one training, and how networks register.

The networks, their loss and the processes of the benchmark are tested with the library and with the
benchmark.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from reglib.data.datasets import HIPPOCAMPUS_QUANTILE, HIPPOCAMPUS_SHAPE, Hippocampi
from reglib.data.nifti import write_image
from reglib.methods import classical, fcn
from reglib.synth import random_pair

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("fcn_hippocampus")
    networks = importlib.import_module("fcn_networks")
    peers = importlib.import_module("peers")
finally:
    sys.path.remove(str(SCRIPTS))

SPLITS = json.loads(networks.SPLITS.read_text())["hippocampus"]
SHAPE = (16, 24, 16)


@pytest.fixture
def work(tmp_path, monkeypatch, uncached):
    """An empty folder for what the script writes, and nothing that was read before."""
    files = {"PACKED": "boxes.npz", "WEIGHTS": "embedded.safetensors", "WORK": "."}
    for name, file in files.items():
        monkeypatch.setattr(networks, name, tmp_path / file)
    own = networks.Trainings(tmp_path, tmp_path / "steps.json")
    monkeypatch.setattr(networks, "TRAININGS", own)
    monkeypatch.setattr(script, "WORK", tmp_path)
    uncached(networks.load, script.trained)
    return tmp_path


@pytest.fixture
def boxes(work, monkeypatch):
    """Small worlds with two labels in place of the crops, packed."""

    small = {part: names[:6] for part, names in SPLITS.items()}

    def made(*, origin, members):
        assert origin == "msd"
        seed = list(small.values()).index(list(members))
        pair = random_pair(
            SHAPE,
            batch=len(members),
            cell=8,
            count=3,
            generator=torch.Generator().manual_seed(seed),
        )
        names = {1: "anterior", 2: "posterior"}
        return Hippocampi(pair.fixed, pair.fixed_labels.long(), names, tuple(members), None)

    monkeypatch.setattr(networks, "SPLITS", work / "splits.json")
    networks.SPLITS.write_text(json.dumps({"hippocampus": small}))
    monkeypatch.setattr("reglib.data.datasets.hippocampus", made)
    networks.pack()
    return {part: made(origin="msd", members=names) for part, names in small.items()}


def calibrated():
    """A calibration of seven steps for everyone."""
    each = [name for name, recipe in networks.NETWORKS.items() if recipe.longer == 1]
    networks.TRAININGS.calibration.write_text(json.dumps({"steps": dict.fromkeys(each, 7)}))


# --- Data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, 30])
def test_everyone_of_a_part_is_moved_once_and_fixed_once_in_groups_of_three(count):
    found = networks.places(count)
    everyone = list(range(count - count % 3))
    assert sorted(m for m, _ in found) == everyone
    assert sorted(f for _, f in found) == everyone
    assert all(m != f and m // 3 == f // 3 for m, f in found)


def test_cases_name_the_members_and_their_groups(boxes):
    for part, made in boxes.items():
        found = script.cases(part)
        assert [(c.moving, c.fixed) for c in found] == [
            (made.members[m], made.members[f]) for m, f in networks.places(6)
        ]
        assert [c.cluster for c in found] == [0, 0, 0, 1, 1, 1]


def test_boxes_are_packed_as_bytes_in_the_order_of_the_split(boxes):
    for part, made in boxes.items():
        found = script.load(part)
        assert found.names == list(made.members)
        assert torch.equal(found.labels, made.labels)
        # Half a byte, and what float32 rounds.
        torch.testing.assert_close(found.images, made.images, rtol=0, atol=0.5 / 255 + 1e-6)


def test_pairs_are_of_different_members_and_go_on_where_they_were(boxes):
    images = script.load("train").images
    stream = networks.RandomPairs(images, 3, seed=1)
    taken = iter(stream)
    for _ in range(20):
        moving, fixed = next(taken)
        assert moving.shape == (3, 1, *SHAPE)
        assert (moving - fixed).flatten(1).abs().amax(1).min() > 0.1
    state = stream.state_dict()
    after = next(taken)
    stream.load_state_dict(state)
    again = next(iter(stream))
    assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))


# --- Measuring ------------------------------------------------------------------------------


def test_the_measures_of_a_known_shift():
    """Labels three voxels apart along one axis: the right field undoes it; without, HD95 is 3."""
    labels = torch.zeros(1, 1, *HIPPOCAMPUS_SHAPE, dtype=torch.long)
    labels[..., 10:30, 20:30, 15:35] = 1
    labels[..., 10:30, 30:45, 15:35] = 2
    image = script.Image(labels.float() / 2, torch.eye(4, dtype=torch.float64))
    moved = script.Image(image.tensor.roll(3, 2), image.affine)
    case = script.Loaded(["anterior", "posterior"], moved, image, labels.roll(3, 2), labels)
    field = torch.zeros(1, 3, *HIPPOCAMPUS_SHAPE)
    before = script.measure(case, field)
    field[:, 0] = 3
    after = script.measure(case, field)
    assert before["mean_dice"] == pytest.approx(2 * 17 / 40, abs=1e-5)
    assert before["hd95"] == pytest.approx(3, abs=1e-3)
    assert before["anterior"] == pytest.approx(2 * 17 / 40, abs=1e-4)
    for name in ("mean_dice", "anterior", "posterior"):
        assert after[name] == 1
    assert after["hd95"] == 0
    assert after["folding"] == 0


# --- Recipes and networks -------------------------------------------------------------------


def test_every_configuration_is_json_and_names_what_exists(work, monkeypatch):
    calibrated()
    found = script.configurations()
    assert json.loads(json.dumps(found)) == found
    for name, recipe in networks.NETWORKS.items():
        for seed in networks.SEEDS:
            assert (f"{name}, seed {seed}" in found) == (seed in recipe.seeds)
    continued = [own for own in found.values() if own.keys() >= {"weights", "methods"}]
    assert len(continued) == len(script.GO_ON) * len(script.CONTINUED)
    for own in continued:
        for method, settings in own["methods"].items():
            if method != "Instance":
                getattr(classical, method)(**settings)
    for name, own in found.items():
        if own["package"] != "reglib" and name != "ANTsPy SyN CC, the paper's command":
            assert own == peers.CONFIGURATIONS[name]


def small_networks():
    """The recipes with networks that learn nothing worth having in no time."""
    narrow = {"channels": (4, 6, 8)}
    made = {
        "FCN": lambda: fcn.FCN(fcn.Settings(**narrow)),
        "FCN, composed": lambda: fcn.ComposedFCN(
            fcn.ComposedSettings(decoder_channels=(4, 6, 8), pool=1, **narrow)
        ),
    }

    class Small(networks.Recipe):
        """A recipe whose network is small."""

        def network(self):
            """A new one."""
            return made["FCN, composed" if self.kind == "composed" else "FCN"]()

    found = {name: Small(*networks.NETWORKS[name][:4], seeds=(0,)) for name in made}
    return found | {networks.EMBEDDED: found["FCN, composed"]._replace(longer=2)}


def test_a_calibration_says_how_many_steps_the_limit_allows(boxes, monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", small_networks())
    networks.calibrate()
    written = json.loads(networks.TRAININGS.calibration.read_text())
    limit = networks.TRAININGS.seconds
    assert written["limit_seconds"] == limit
    for name, seconds in written["measured"]["step_seconds"].items():
        # Two digits of the quotient are kept.
        assert written["steps"][name] == pytest.approx(limit / seconds, rel=0.06)
        assert networks.steps_of(name) == written["steps"][name]
    assert networks.steps_of(networks.EMBEDDED) == 2 * written["steps"]["FCN, composed"]


@pytest.mark.parametrize("name", ["FCN", "FCN, composed"])
def test_a_trained_network_comes_back_from_its_file_and_registers(boxes, monkeypatch, name):
    monkeypatch.setattr(networks, "NETWORKS", small_networks())
    record = networks.train(name, 0, 2)
    assert record["settings"]["steps"] == 2
    assert len(record["loss"]) == 2
    assert set(record["ncc"]) == {"train", "validation"}
    path = networks.TRAININGS.weights(name, 0)
    network = script.trained(str(path))
    assert network.card["loss"]["similarity"] == ("ncc" if name == "FCN" else "lncc")
    assert network.card["input"]["quantile"] == 0.99
    assert network.card["input"]["orientation"] == "RAS"
    files = {part: script.WORK / f"{part}.nii.gz" for part in ("moving", "fixed", "field")}
    case = script.cases("test")[0]
    pair = script.loaded(case, "test")
    for part, image in (("moving", pair.moving), ("fixed", pair.fixed)):
        write_image(files[part], image)
    for words, methods in (("", {}), *script.CONTINUED.items()):
        settings = {"weights": str(path)} | ({"methods": methods} if methods else {})
        watch = script.run_reglib(*map(str, files.values()), settings, methods_of=script.methods_of)
        found = script.benchmark_classical.measure_file(pair, files["field"], script.measure)
        assert 0 < found["mean_dice"] <= 1, words
        assert watch.seconds > 0


def test_the_embedded_network_is_the_trained_one_in_half_precision(boxes, monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", small_networks())
    record = networks.train(networks.EMBEDDED, 0, 2)
    networks.embed()
    assert networks.registering(networks.EMBEDDED, 0) == networks.WEIGHTS
    assert networks.registering("FCN", 0) == networks.TRAININGS.weights("FCN", 0)
    told = networks.embedded_record()
    assert told == {name: record[name] for name in told}
    trained = script.trained(str(networks.TRAININGS.weights(networks.EMBEDDED, 0)))
    embedded = fcn.load(networks.WEIGHTS)
    for name, value in trained.state_dict().items():
        assert torch.equal(embedded.state_dict()[name], value.half().float())
    assert embedded.card["loss"]["similarity"] == "lncc"
    assert embedded.card["provenance"] == trained.card["provenance"]
    assert {"trained_on", "licence", "seed", "seconds"} <= embedded.card.keys()


def test_no_test_pairs_without_everything_trained(boxes, monkeypatch):
    calibrated()
    with pytest.raises(SystemExit, match="not trained yet"):
        script.test("validation", None, None)
    assert not (script.WORK / "validation.json").exists()


def test_a_job_for_a_gpu_leaves_weights_and_a_record(boxes, monkeypatch, tmp_path):
    """What ``make gpu`` calls, with few steps; the checkpoint is gone when it is done."""
    monkeypatch.setattr(networks, "NETWORKS", small_networks())
    job = {"network": "FCN", "seed": 0, "steps": 2, "batch": 3}
    (tmp_path / "settings.json").write_text(json.dumps(job))
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--settings", str(tmp_path / "settings.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["fcn_networks.py", *arguments])
    networks.TRAININGS.do_job(networks.train, None)
    assert sorted(path.name for path in out.iterdir()) == ["fcn_0.json", "fcn_0.safetensors"]
    record = json.loads((out / "fcn_0.json").read_text())
    assert record["settings"]["batch"] == 3
    assert record["settings"]["steps"] == 2
    assert fcn.load(out / "fcn_0.safetensors").card["seed"] == 0


def test_the_boxes_are_scaled_as_the_cards_say():
    assert networks.PREPARED["quantile"] == HIPPOCAMPUS_QUANTILE
