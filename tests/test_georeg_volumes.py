"""The network for whole brains and its table: pairs, training, what travels, arithmetic.

Processes and records are tested with the benchmark, the summary with the tables of slices. About
10 s on one core.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from reglib.data.nifti import read_field, write_field, write_image
from reglib.geometry.fields import upsample_field
from reglib.geometry.sampling import warp
from reglib.methods import georeg
from reglib.registration import register

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("georeg_volumes")
    networks = importlib.import_module("georeg_volumes_networks")
    synthetic = importlib.import_module("georeg_synthetic_networks")
    benchmark = importlib.import_module("benchmark_classical")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (16, 24, 32)
NAMES = [f"subject {n}" for n in range(30)]


def load(part: str, dimensions: int = 2):
    """Balls in place of brains, their halves as structures."""
    assert dimensions == 3
    names = NAMES if part == "test" else NAMES[:3]
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1)
    x = (places - torch.tensor([0.47 * n for n in SHAPE])) / torch.tensor(SHAPE)
    ball = (1 - (x.norm(dim=-1) / 0.4) ** 2).clamp(0, 1)[None, None]
    shades = 1 - torch.arange(len(names)).view(-1, 1, 1, 1, 1) / 60
    labels = (ball > 0).byte() * (1 + (x[..., 0] > 0).byte())
    return synthetic.Brains(names, ball * shades, labels.expand(len(names), 1, *SHAPE))


@pytest.fixture
def small(monkeypatch, tmp_path, uncached):
    """Small networks of two levels, on small images."""
    for module in (script, synthetic):
        monkeypatch.setattr(module, "load", load)
    settings = {"channels": [2, 4], "neighbourhoods": [0, 3], "iterations": [0, 1]}
    recipe = networks.NETWORKS["GeoReg"]
    recipe = recipe._replace(
        settings=recipe.settings | settings | {"interpolation": [2]},
        objective={"similarity": synthetic.lncc_of_five, "regularity_weight": [1.0, 0.5]},
        truth=[0.0, 1.0],
    )
    other = networks.NETWORKS["FCN, composed"]
    other = other._replace(settings={"channels": [4, 4], "decoder_channels": [4, 4]})
    every = networks.NETWORKS | {"GeoReg": recipe, "FCN, composed": other}
    monkeypatch.setattr(networks, "NETWORKS", every)
    for name in ("TRAININGS", "OTHERS"):
        own = networks.Trainings(tmp_path / "new", tmp_path / f"{name}.json")
        monkeypatch.setattr(networks, name, own)
    monkeypatch.setattr(script, "WORK", tmp_path)
    monkeypatch.setattr(script, "WEIGHTS", tmp_path / "embedded.safetensors")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.json")
    uncached(script.trained)


def test_every_subject_is_deformed_once_and_moves_once(small):
    found = script.cases("test")
    deformed = [case for case in found if case.set != script.T1]
    for family in synthetic.FAMILIES:
        assert sum(case.set == family for case in deformed) == 6
    cells = [script.cell_of(case.cluster, len(NAMES)) for case in deformed]
    assert Counter(cells) == dict.fromkeys(synthetic.CELLS, 2)
    assert [cell.family for cell in cells] == [case.set for case in deformed]
    assert [case.moving for case in deformed] == [case.fixed for case in deformed] == NAMES
    onto_others = found[len(deformed) :]
    assert [case.moving for case in onto_others] == NAMES
    assert sorted(case.fixed for case in onto_others) == sorted(NAMES)
    assert all(case.moving != case.fixed for case in onto_others)
    # Nobody is in two clusters.
    of = {(name, case.cluster) for case in onto_others for name in (case.moving, case.fixed)}
    assert len(of) == len(NAMES)


@pytest.mark.parametrize("count", [3, 10, 15, 30])
def test_few_subjects_meet_every_family_they_can(count):
    families = Counter(script.cell_of(n, count).family for n in range(count))
    assert max(families.values()) - min(families.values()) <= 1
    assert len(families) == min(count, len(synthetic.FAMILIES))
    strengths = {script.cell_of(n, count).strength for n in range(count)}
    assert {min(synthetic.STRENGTHS), max(synthetic.STRENGTHS)} <= strengths


def test_the_truth_carries_image_and_labels(small):
    case = next(case for case in script.cases("test") if case.set == "translation")
    pair = script.load_pair(case, "test")
    again = warp(pair.moving.tensor, pair.truth.field, padding="zeros")
    # Noise has a standard deviation of 0.02.
    assert float((pair.fixed.tensor - again).abs().max()) < 6 * synthetic.NOISE
    cell = script.cell_of(case.cluster, len(NAMES))
    own = synthetic.pair_of("test", case.cluster, cell, 3)
    assert torch.equal(pair.truth.field, own.field)
    assert not torch.equal(own.field, synthetic.pair_of("test", case.cluster + 1, cell, 3).field)
    # Labels lie where the images are bright, but for noise and the rounding of borders.
    for image, labels in ((pair.moving, pair.moving_labels), (pair.fixed, pair.fixed_labels)):
        bright = image.tensor > 0.1
        assert ((labels > 0) == bright)[bright].float().mean() > 0.98
    # A misfit of 3 and 4 voxels along two axes is one of 5.
    off = torch.tensor([3.0, 0.0, 4.0]).view(1, 3, 1, 1, 1)
    found = [script.measure(pair, pair.truth.field + x) for x in (0, off)]
    assert [own["error"] for own in found] == pytest.approx([0, 5], abs=1e-4)
    assert found[0]["mean_dice"] == 1 > found[1]["mean_dice"]


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
    recipe = networks.NETWORKS["GeoReg"]
    moving, fixed, field, _ = next(iter(synthetic.stream(recipe, 0, "cpu")))
    assert field.shape == (recipe.batch, 3, *(n // 2 for n in SHAPE))
    assert moving.shape == fixed.shape == (recipe.batch, 1, *(n // 2 for n in SHAPE))
    image = load("tuning", 3).images[:1]
    pair = synthetic.pair_of("tuning", 0, synthetic.Cell("all", 3), 3, 2)
    i, j, k = 3, 5, 8
    mean = image[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].mean()
    assert float(pair.moving[0, 0, i, j, k]) == pytest.approx(float(mean), abs=1e-6)
    # The field is in voxels of these images.
    again = warp(pair.moving, pair.field, padding="zeros")
    assert float((pair.fixed - again).abs().max()) < 6 * synthetic.NOISE


def test_the_network_that_travels_is_the_trained_one_and_brings_volumes_to_4_mm(small, tmp_path):
    """Through ``register`` it finds what it finds of the means of 2 x 2 x 2 voxels.

    What is bright lies in the middle, but for a fraction of a voxel, so all is in view. Images are
    brought to 4 mm by smoothing and interpolation, which is not quite the mean: a tenth
    of the motion may differ. A slip of axis or scale would make a third of it or more.
    """
    with pytest.raises(SystemExit, match="not trained yet"):
        script.test("tuning", ["GeoReg"], [])
    record = networks.train("GeoReg", 0, 2)
    # Steps that can be seen: other ones along each axis.
    path = networks.TRAININGS.weights("GeoReg", 0)
    network = georeg.load(path)
    first, _, last = network.refinements[1].head
    with torch.no_grad():
        first.bias[0] = 1
        last.weight[:, 0] = torch.tensor([0.5, -1.0, 1.5])
    georeg.save(network, path, card=network.card)
    script.embed()
    assert record["training"]["steps"] == 2
    assert record["training"]["pooled"] == 2
    trained = georeg.load(networks.TRAININGS.weights("GeoReg", 0))
    embedded = georeg.load(script.WEIGHTS)
    for name, value in trained.state_dict().items():
        assert torch.equal(embedded.state_dict()[name], value.half().float())
    said = {"range": [0.0, 1.0], "orientation": "RAS", "spacing": [4.0] * 3}
    said["size"] = [n // 2 for n in SHAPE]
    assert embedded.card["input"] == trained.card["input"] | said

    configurations = json.loads(json.dumps(script.configurations()))
    kinds = {
        "reglib affine + velocity": ["Affine", "Velocity"],
        "GeoReg": ["Network"],
        "GeoReg, then velocity": ["Network", "Velocity"],
    }
    for name, wanted in kinds.items():
        methods = script.methods_of(configurations[name])
        assert [type(method).__name__ for method in methods] == wanted
    assert configurations["GeoReg"]["training"] == record["training"]
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
    along = wanted[inside].mean((0, 2, 3, 4))
    assert along.abs().min() > 0.5
    assert (along[:, None] - along).abs().add(torch.eye(3)).min() > 0.5
    apart, length = (x[inside].norm(dim=1).mean() for x in (found - wanted, wanted))
    assert apart < length / 10


def test_the_table_holds_every_set_and_who_is_better_by_how_much(small, fake_workers, monkeypatch):
    """Workers that find nothing, and one that finds half a voxel; a few pairs of each set."""
    networks.train("GeoReg", 0, 2)
    script.embed()
    ants = "ANTsPy SyN MI, default"
    every = script.configurations()
    few = script.cases("test")[::5]

    def register(worker, name, settings):
        field = torch.full((1, 3, *SHAPE), 0.5 if "weights" in settings else 0.0)
        write_field(worker.files["field"], field, script.AFFINE)
        return {"seconds": 0.5, "cpu_seconds": 0.5}

    fake_workers(benchmark, register)
    monkeypatch.setattr(script, "configurations", lambda: {n: every[n] for n in (ants, "GeoReg")})
    monkeypatch.setattr(script, "cases", lambda part: few)
    monkeypatch.setattr(benchmark, "committed_or_stop", lambda: None)
    script.test("test", None, [])
    found = json.loads(script.RESULTS.read_text())
    assert set(found["summary"]) == {*synthetic.FAMILIES, script.T1}
    assert len(found["rows"]) == len(few) * 3
    [training] = found["training"]
    assert training["training"]["steps"] == 2
    rows = {(row["set"], row["moving"], row["configuration"]): row for row in found["rows"]}
    for case in few:
        one, other, own = (
            rows[case.set, case.moving, name] for name in ("unregistered", ants, "GeoReg")
        )
        truth = script.load_pair(case, "test").truth
        assert ("error" in own) == (truth is not None) == (case.set != script.T1)
        if truth is not None:
            assert (
                one["error"]
                == other["error"]
                == pytest.approx(float(synthetic.endpoint_error(0 * truth.field, truth)), rel=1e-4)
            )
            assert own["error"] == pytest.approx(
                float(synthetic.endpoint_error(0 * truth.field + 0.5, truth)), rel=1e-4
            )
    mean = {
        name: sum(r["error"] for k, r in rows.items() if k[0] == "Brownian" and k[2] == name)
        / sum(case.set == "Brownian" for case in few)
        for name in (ants, "GeoReg")
    }
    gain = found["above"]["Brownian"]["GeoReg"][ants]
    assert gain["error"] == pytest.approx(mean[ants] - mean["GeoReg"], abs=1e-3)
    assert len(gain["interval"]) == 2


OTHERS = sorted(networks.NETWORKS.keys() - {"GeoReg"})


def test_networks_that_came_later_have_steps_of_their_own(small, capsys):
    """Measured where they are missing."""
    pytest.importorskip("monai")
    allowed = {"limit_seconds": 4500.0, "steps": {"GeoReg": 2}}
    networks.TRAININGS.calibration.write_text(json.dumps(allowed))
    networks.calibrate()
    assert f"kept: {networks.TRAININGS.calibration.name}" in capsys.readouterr().out
    assert json.loads(networks.TRAININGS.calibration.read_text()) == allowed
    assert sorted(networks.OTHERS.steps()) == OTHERS
    assert networks.steps_of("GeoReg") == 2
    assert networks.steps_of("VoxelMorph") == networks.OTHERS.steps()["VoxelMorph"]


@pytest.mark.parametrize("recipes", [networks.NETWORKS, networks.FINE], ids=["4 mm", "2 mm"])
def test_all_networks_are_told_as_much(recipes):
    """GeoReg for every field of a level, the others once for each."""
    [own] = [recipe for recipe in recipes.values() if recipe.kind == "georeg"]
    images = torch.rand(2, 1, 1, 16, 32, 16)
    with torch.no_grad():
        stages = own.network()(*images).stages
    told = [
        sum(own.truth[stage.level] for stage in stages if stage.level == n)
        for n in range(len(own.truth))
    ]
    for recipe in recipes.values():
        assert recipe is own or recipe.truth == told
        # What is left is how it is trained.
        assert recipe._replace(truth=own.truth)[3:] == own[3:]


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_networks_are_trained_and_register_as_the_one_that_travels(name, small):
    """Of images in the form that its card asks for; their records go into the table."""
    if name == "VoxelMorph":
        pytest.importorskip("monai")
    with pytest.raises(SystemExit, match="not trained yet"):
        script.test("tuning", [name], [])
    record = networks.train(name, 0, 2)
    networks.TRAININGS.log.write_text(json.dumps([record]))
    with pytest.raises(SystemExit, match="embed first"):
        script.test("tuning", [name], [])
    networks.train("GeoReg", 0, 1)
    script.embed()
    assert record["tuning_error"][-1] > 0
    assert record["training"]["truth"] == networks.NETWORKS[name].truth
    settings = json.loads(json.dumps(script.configurations()))[name]
    assert settings["training"] == record["training"]
    pair = script.load_pair(script.cases("tuning")[0], "tuning")
    [network] = script.methods_of(settings)
    assert network.contract == script.card()["input"]
    found = register(pair.moving, pair.fixed, network).field
    assert found.shape == (1, 3, *SHAPE)
    assert found.isfinite().all()
    assert 0 < float(found.abs().max()) < 1


@pytest.fixture
def job(small, monkeypatch, tmp_path):
    """Do the job of a small GeoReg at 2 mm, as ``make gpu`` does; its folder."""
    path = SCRIPTS / "gpu_jobs" / "500_volumes_georeg.json"
    settings = json.loads(path.read_text())["settings"]
    recipe = networks.FINE[settings["network"]]
    recipe = recipe._replace(settings=networks.NETWORKS["GeoReg"].settings, truth=[0.0, 1.0])
    recipe = recipe._replace(objective={"similarity": synthetic.lncc_of_five})
    monkeypatch.setitem(networks.FINE, settings["network"], recipe)
    monkeypatch.setattr(synthetic, "VALIDATE_EVERY", 1)
    file, out = tmp_path / "settings.json", tmp_path / "out"
    out.mkdir()

    def run(**changed):
        file.write_text(json.dumps(settings | changed))
        arguments = ["--settings", str(file), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [networks.__file__, *arguments])
        networks.TRAININGS.do_job(networks.train, None)
        return out

    return run


def test_a_job_for_a_gpu_ends_by_time_and_goes_on_where_it_was(job, monkeypatch):
    learn, steps = networks.synthetic.trainings.learn, []

    def stopped(network, pairs, loss, *arguments, **options):
        """Killed in its third step, after two checkpoints."""

        def dies(*images):
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return loss(*images)

        return learn(network, pairs, dies, *arguments, **options)

    monkeypatch.setattr(networks.synthetic.trainings, "learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        job()
    # What it has spent is more than this, so it only ends.
    out = job(seconds=1e-6)
    assert len(steps) == 3
    stem = "georeg_2_mm_0"
    assert sorted(file.name for file in out.iterdir()) == [f"{stem}.json", f"{stem}.safetensors"]
    record = json.loads((out / f"{stem}.json").read_text())
    assert record["training"]["steps"] == 2
    assert "pooled" not in record["training"]


def test_what_a_gpu_trained_comes_home_and_registers_in_its_own_voxels(job, monkeypatch):
    name, out = "GeoReg, 2 mm", job(steps=2)
    networks.train("GeoReg", 0, 1)
    script.embed()
    assert name not in script.configurations()
    monkeypatch.setattr(sys, "argv", [script.__file__, "add", str(out)])
    for _ in range(2):  # the second takes the place of the first
        script.main()
    [record] = networks.TRAININGS.records()
    assert record["network"] == name
    found = json.loads(json.dumps(script.configurations()))[name]
    [network] = script.methods_of(found)
    assert network.contract["spacing"] == [2.0] * 3
    assert network.contract["size"] == list(SHAPE)
    pair = script.load_pair(script.cases("tuning")[0], "tuning")
    field = register(pair.moving, pair.fixed, network).field
    assert field.shape == (1, 3, *SHAPE)
    assert 0 < float(field.abs().max()) < 1


def test_nothing_else_comes_home(job, tmp_path):
    def refused(folder, words):
        with pytest.raises(SystemExit, match=words):
            networks.TRAININGS.bring_home(folder, networks.FINE)
        assert networks.TRAININGS.records() == []

    refused(tmp_path / "nowhere", "wanted one network")
    out = job(steps=1)
    file = out / "georeg_2_mm_0.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"network": "FCN"}))
    refused(out, "wanted a training of one of")
    file.unlink()
    refused(out, "wanted one network and its record")


@pytest.mark.parametrize("name", networks.FINE)
def test_networks_for_a_gpu_take_a_step_and_fit_into_what_can_be_brought_home(name):
    """On images of two voxels at the coarsest level; a checkpoint holds two moments of each weight.

    16 MiB may come, and less than 1 of them is what else is in the file.
    """
    recipe = networks.FINE[name]
    if recipe.kind == "voxelmorph":
        pytest.importorskip("monai")
    assert recipe.pooled == 1
    network, generator = recipe.network(), torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 1, 32, 32, 32, generator=generator)
    truth = torch.ones(1, 3, 32, 32, 32), torch.ones(1, 1, 32, 32, 32)
    terms = recipe.loss()(network(*images), *images, *truth)
    sum(terms.values()).backward()
    assert {"similarity", "regularity", "truth"} <= terms.keys()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(x.isfinite().all() for x in gradients)
    assert any(x.any() for x in gradients)
    parameters = sum(p.numel() for p in network.parameters())
    assert 3 * 4 * parameters < 15 * 2**20


def test_no_table_of_unknown_names(small):
    with pytest.raises(SystemExit, match="no such configuration"):
        script.test("tuning", ["nobody"], [])
    with pytest.raises(SystemExit, match="no such configuration"):
        script.test("tuning", None, ["nobody"])


def test_what_travels_was_trained_as_the_script_says():
    """Steps of the calibration, settings and images of the recipe."""
    found = georeg.load_pretrained(script.NAME).card
    calibration = json.loads((SCRIPTS / "georeg_volumes_steps.json").read_text())
    assert found["training"]["steps"] == calibration["steps"]["GeoReg"]
    recipe = json.loads(json.dumps(networks.NETWORKS["GeoReg"].as_json()))
    assert recipe.items() <= found["training"].items()
    assert found["training"]["dimensions"] == 3
    assert script.WEIGHTS.stat().st_size < 2**20
    assert found["input"]["size"] == [40, 48, 40]
    assert found["input"]["spacing"] == [script.POOLED * script.VOXEL] * 3
    assert found["provenance"]["threads"] == networks.TRAININGS.threads
    assert not found["provenance"]["uncommitted_changes"]
