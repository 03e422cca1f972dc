"""The comparison of the pretrained network: its wrapping, its pairs, its labels, its arithmetic.

Peers and real brains take minutes and stay out; records and processes are tested with the
benchmark that they come from.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

from reglib.data import assets
from reglib.data.nifti import Image, write_field, write_image
from reglib.geometry.fields import upsample_field
from reglib.methods import transmorph
from reglib.methods.network import Network
from reglib.registration import register
from reglib.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("pretraining_compare")
    brains = importlib.import_module("brains")
    records = importlib.import_module("benchmark_record")
finally:
    sys.path.remove(str(SCRIPTS))

#: What the network of 4 mm takes, in voxels of 2 mm; and something smaller.
SHAPE, SMALL = (32, 48, 32), (24, 32, 24)


# --- Wrapping -------------------------------------------------------------------------------


class Shift(nn.Module):
    """Displaces everything by so many of its voxels; remembers what it was shown."""

    def __init__(self, *by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.card = {"input": {"channels": 1, "size_multiple": 4}}

    def forward(self, moving, fixed):
        self.seen = moving, fixed
        field = self.by.view(1, -1, *(1,) * (moving.ndim - 2))
        field = field.expand(len(moving), -1, *moving.shape[2:])
        return transmorph.Output(field, field)


def lively(seed=0, **changes):
    """A tiny network that displaces something: its last layers begin at almost 0."""
    torch.manual_seed(seed)
    settings = {"window": (2, 2, 2), "patch": 2, "channels": 8, "depths": (1, 1), "heads": (2, 2)}
    settings |= {"drop_path": 0.0, "time_steps": 2, "norm": "instance"} | changes
    network = transmorph.TransMorph(transmorph.Settings(**settings))
    with torch.no_grad():
        for parameter in network.steps.parameters():
            parameter.normal_(0, 0.1)
    return network.eval()


@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 8)])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_pooled_network_sees_cell_means_and_moves_by_whole_cells(shape, batch):
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, batch, 1, *shape, generator=generator)
    inner = Shift(*(0.5, -1.0, 0.25)[: len(shape)])
    field = script.Pooled(inner, 2)(moving, fixed).field
    # SciPy's uniform filter of two voxels looks back: its odd voxels are the means of the cells.
    for image, seen in zip((moving, fixed), inner.seen, strict=True):
        for one, small in zip(image[:, 0].numpy(), seen[:, 0].numpy(), strict=True):
            mean = ndimage.uniform_filter(one, 2)[(slice(1, None, 2),) * len(shape)]
            np.testing.assert_allclose(small, mean, atol=1e-6)
    expected = 2 * inner.by.view(1, -1, *(1,) * len(shape)).expand_as(field)
    torch.testing.assert_close(field, expected)


@pytest.mark.parametrize("shape", [(32, 16), (32, 16, 48)])
def test_a_pair_gives_what_it_gives_alone(shape):
    network = script.Pooled(lively(window=(2, 2, 2)[: len(shape)]), 2)
    moving, fixed = torch.rand(2, 3, 1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = network(moving, fixed).field
        alone = [network(m, f).field for m, f in zip(moving.split(1), fixed.split(1), strict=True)]
    assert together.std() > 0.01  # or nothing would be compared
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_a_factor_of_one_leaves_the_network_as_it_is():
    inner = lively()
    moving, fixed = torch.rand(2, 1, 1, 16, 32, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = inner(moving, fixed), script.Pooled(inner, 1)(moving, fixed)
    assert torch.equal(wanted.field, found.field)
    assert script.Pooled(inner, 1).card["input"] == inner.card["input"]


def test_register_runs_a_pooled_network_on_any_size():
    """18 x 21 x 13 voxels become 24 x 24 x 16 around them, and the shift comes back whole."""
    network = script.Pooled(Shift(0.5, 0.0, 0.0), 2)
    assert network.card["input"]["size_multiple"] == 8
    image = torch.rand(1, 1, 18, 21, 13, generator=torch.Generator().manual_seed(3))
    found = register(image, image, network, progress=False)
    assert tuple(network.network.seen[0].shape[2:]) == (12, 12, 8)
    expected = torch.zeros_like(found.field)
    expected[:, 0] = 1.0
    torch.testing.assert_close(found.field, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.warped[:, :, :-1], image[:, :, 1:], atol=1e-5, rtol=0)


def test_the_weights_of_a_run_give_the_field_that_its_script_measures(tmp_path):
    """What pretraining.py measures at 2 mm is the inner field, carried up."""
    size = script.pretraining.SIZES["cpu"]
    network = script.pretraining.new_network(size, 0).eval()
    with torch.no_grad():
        for parameter in network.steps.parameters():
            parameter.normal_(0, 0.05)
    path = tmp_path / "run.safetensors"
    save_weights(network, path, {"run": "finetune-kl-100-0"})
    found = script.trained(str(path), "cpu")
    moving, fixed = torch.rand(2, 1, 1, *SHAPE, generator=torch.Generator().manual_seed(4))
    moving, fixed = ((x - x.min()) / (x.max() - x.min()) for x in (moving, fixed))
    with torch.no_grad():
        small = [script.pool(x, 2) for x in (moving, fixed)]
        wanted = upsample_field(network(*small).field, 2, SHAPE)
    result = register(moving, fixed, Network(found), progress=False)
    assert wanted.std() > 0.01
    torch.testing.assert_close(result.field, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", list(script.CONTINUATIONS))
def test_every_continuation_goes_on_from_where_the_network_was(words, monkeypatch):
    """Blobs 5 voxels apart, of which the network knows 4: three steps find more, and not else."""
    image = torch.rand(1, 1, *SMALL, generator=torch.Generator().manual_seed(5))
    image = torch.from_numpy(ndimage.gaussian_filter(image, (0, 0, 2, 2, 2)))
    image = (image - image.min()) / (image.max() - image.min())
    moving, fixed = (Image(x, script.AFFINE) for x in (image.roll(5, 2), image))
    network = script.Pooled(Shift(2.0, 0.0, 0.0), 2)
    monkeypatch.setattr(script, "trained", lambda path, size: network)
    [(kind, own)] = script.CONTINUATIONS[words].items()
    settings = {"methods": {kind: own | {"steps": 3}}}
    methods = script.methods_of({"weights": "w", "size": "cpu"} | settings)
    found = register(moving, fixed, methods, progress=False)
    forward = register(moving, fixed, Network(network), progress=False)
    torch.testing.assert_close(forward.field[:, 0], torch.full((1, *SMALL), 4.0))

    def loss(registration):
        # The first axis begins with what was rolled in from its end.
        inside = (slice(None), slice(None), slice(6, -6))
        return float(script.lncc(registration.warped[inside], image[inside], window=5))

    assert loss(found) < loss(forward)
    assert float((found.field - forward.field).norm(dim=1).median()) < 1
    if kind != "Instance":
        alone = register(moving, fixed, script.methods_of(settings), progress=False)
        assert loss(found) < loss(alone)


# --- Configurations and pairs ---------------------------------------------------------------


def test_configurations_survive_json_and_have_what_they_start_from(tmp_path):
    found = script.configurations("cpu", tmp_path, list(script.CONTINUATIONS))
    assert json.loads(json.dumps(found)) == found
    assert [n for n, s in found.items() if s["package"] != "reglib"] == list(script.PEERS)
    for settings in found.values():
        # Not trained: nothing there, so the run stops before it starts.
        assert settings.get("sha256") is None
    chosen = script.configurations("cpu", tmp_path, [script.CHOSEN])
    assert all(name in chosen for name in script.NETWORKS)
    assert all(f"{name}, then {script.CHOSEN}" in chosen for name in script.NETWORKS)
    runs = {run.name for run in script.pretraining.runs_of(script.pretraining.SIZES["cpu"])}
    assert set(script.NETWORKS.values()) <= runs


def test_whoever_trains_again_has_another_configuration(tmp_path):
    name, run = next(iter(script.NETWORKS.items()))
    path = tmp_path / f"{run}.safetensors"
    digests = set()
    for seed in (0, 1):
        save_weights(lively(seed), path, {})
        digests.add(script.configurations("cpu", tmp_path, [])[name]["sha256"])
    assert len(digests) == 2
    assert None not in digests


@pytest.fixture
def worlds(monkeypatch, uncached):
    """Blobs instead of brains: an atlas and three subjects for every set and split."""

    def made(seed: int, names: list[str]):
        generator = np.random.default_rng(seed)
        images = ndimage.gaussian_filter(generator.random((len(names), 1, 16, 20, 12)), 2)
        images = (images - images.min()) / (images.max() - images.min())
        labels = torch.from_numpy((images * 29.9).astype(np.uint8))
        return brains.Brains(names, torch.from_numpy(images).float(), labels)

    parts = {n: made(k, [f"{n} {i}" for i in range(3)]) for k, n in enumerate(("test", "malf"))}
    parts["train"] = made(9, ["a", "b"])
    monkeypatch.setattr(script, "load", parts.__getitem__)
    monkeypatch.setattr(script, "load_malf", lambda: parts["malf"])
    monkeypatch.setattr(script.pretraining, "brains", parts.__getitem__)
    monkeypatch.setattr(script.pretraining, "atlas_index", lambda: 1)
    uncached(script.members)
    return parts


def test_the_atlas_is_moving_to_every_subject_of_a_set(worlds):
    for name, part in (("ixi_2mm", "test"), ("malf", "malf")):
        found = script.cases(name, "test")
        assert [c.fixed for c in found] == worlds[part].subjects
        assert {c.moving for c in found} == {"b"}
        assert len({c.cluster for c in found}) == len(found)
        assert script.cases(name, "test", 2) == found[:2]
        pair = script.loaded(found[1], "test")
        assert torch.equal(pair.moving.tensor, worlds["train"].images[1:])
        assert torch.equal(pair.fixed.tensor, worlds[part].images[1:2])
        assert torch.equal(pair.moving_labels, worlds["train"].labels[1:])
        assert torch.equal(pair.fixed_labels, worlds[part].labels[1:2])
        assert len(pair.structures) == 29


def test_each_configuration_is_measured_once_from_the_field_it_leaves(worlds, tmp_path):
    """An identity leaves what was there before; one that fails has no Dice."""
    files = {part: tmp_path / f"{part}.nii.gz" for part in ("moving", "fixed", "field")}
    asked = []

    def run(name, settings):
        asked.append(name)
        if name == "broken":
            return {"error": "broken"}
        still = torch.zeros(1, 3, *worlds["test"].images.shape[2:])
        write_field(files["field"], still, script.AFFINE)
        return {"seconds": 0.5, "cpu_seconds": 1.0}

    everything = script.cases("ixi_2mm", "test")
    wanted = {name: {"package": "none"} for name in ("still", "broken")}
    for _ in range(2):  # the second finds nothing left
        record = records.Record(tmp_path / "rows.json", "test")
        tasks = {(*c[:3], n) for c in everything for n in (records.UNREGISTERED, *wanted)}
        record.begin(wanted, tasks)
        read = functools.partial(script.loaded, split="test")
        script.measure_all(record, everything, wanted, files, run, load=read)
    assert asked == ["still", "broken"] * 3
    whole = record.finish([c[:3] for c in everything], list(wanted), {})
    table = script.by_configuration(whole["rows"])
    for before, still, broken in zip(*table.values(), strict=True):
        assert still["dice"] == before["dice"]
        assert still["folding"] == 0
        assert "dice" not in broken


# --- Statistics -----------------------------------------------------------------------------


def rows_of(**dice: list[float]) -> list[dict]:
    """Made-up rows: the Dice of each configuration on the subjects; every one takes 2 seconds."""
    return [
        {"set": "s", "moving": "a", "fixed": str(n), "cluster": n, "configuration": name}
        | {"mean_dice": value, "seconds": 2.0, "ndv": 0.0}
        for name, values in dice.items()
        for n, value in enumerate(values)
    ]


def test_comparisons_agree_with_scipy_and_plain_arithmetic():
    generator = np.random.default_rng(0)
    dice = {n: generator.normal(0.7, 0.05, 12).tolist() for n in ("unregistered", "a", "b")}
    dice["c"] = list(dice["b"])
    found = script.comparisons(rows_of(**dice))
    assert [(f["one"], f["other"]) for f in found] == list(itertools.combinations(dice, 2))
    for one in found:
        x, y = np.array(dice[one["one"]]), np.array(dice[one["other"]])
        assert one["subjects"] == 12
        assert one["better"] == (x > y).sum()
        assert one["worse"] == (x < y).sum()
        assert one["dice"] == pytest.approx((x - y).mean(), abs=5e-5)  # four digits are kept
        low, high = one["interval"]
        assert low - 1e-4 <= one["dice"] <= high + 1e-4
        if (one["one"], one["other"]) == ("b", "c"):
            assert one["p"] == 1.0
        else:
            assert one["p"] == pytest.approx(stats.wilcoxon(x, y).pvalue, rel=5e-3)


def test_the_signed_rank_test_by_hand():
    """Five differences of one sign: 2 of 32 assignments of signs are as extreme."""
    assert script.signed_rank([0.1, 0.2, 0.3, 0.4, 0.5]) == 0.0625
    assert script.signed_rank([0.0, 0.0]) == 1.0


def test_a_failed_pair_counts_as_unregistered():
    rows = rows_of(unregistered=[0.6, 0.6], a=[0.8, 0.8], b=[0.7, 0.7])
    del rows[3]["mean_dice"]
    found = {(f["one"], f["other"]): f["dice"] for f in script.comparisons(rows)}
    assert found["a", "b"] == pytest.approx((0.1 - 0.1) / 2, abs=1e-4)


def test_goals_are_numbers_beside_the_best_peer():
    dice, seconds, ndv = {}, {}, {}
    for name in script.NETWORKS:
        then = f"{name}, then {script.CHOSEN}"
        dice |= {name: [0.75, 0.8, 0.75], then: [0.8, 0.85, 0.8]}
        seconds |= {name: 0.2, then: 4.0}
        ndv |= {then: 3e-5}
    peers = {"poor": [0.7, 0.6, 0.6], "good": [0.7, 0.8, 0.7]}
    rows = rows_of(unregistered=[0.5, 0.6, 0.5], **peers, **dice)
    for row in rows:
        row["seconds"] = seconds.get(row["configuration"], 2.0)
        row["ndv"] = ndv.get(row["configuration"], 0.0)
    found = script.goals(rows, list(peers))
    assert found["best_peer"] == "good"
    assert found["wanted"] == script.WANTED
    assert list(found["networks"]) == list(script.NETWORKS)
    for one in found["networks"].values():
        forward, optimised = one["one forward pass"], one["optimised on the pair"]
        assert forward["beside"]["good"]["dice"] == pytest.approx(0.1 / 3, abs=1e-4)
        assert forward["beside"]["good"]["seconds_ratio"] == pytest.approx(0.1)
        assert forward["beside"]["good"]["better"] == 2
        assert optimised["beside"]["poor"]["seconds_ratio"] == pytest.approx(2.0)
        assert optimised["ndv"] == 3e-5


# --- malf -----------------------------------------------------------------------------------


def test_malf_has_the_29_structures_by_ids_that_belong_to_one_each():
    ixi, malf = brains.ixi_structures(), brains.malf_structures()
    assert list(malf) == list(ixi)
    different = [name for name in ixi if ixi[name] != malf[name]]
    assert different == ["right cerebral white matter", "left cerebral white matter"]
    ids = [n for members in malf.values() for n in members]
    assert len(ids) == len(set(ids))
    assert {44, 45} <= set(ids)
    assert not {*range(81, 95)} & set(ids)
    # Whatever is in a map, each voxel gets the number of its structure, or 0.
    labels = torch.arange(208).view(1, 1, 8, 26)
    found = brains.relabel(labels, malf.values()).flatten().tolist()
    for number, members in enumerate(malf.values(), 1):
        assert [n for n, value in enumerate(found) if value == number] == sorted(members)


def test_packed_brains_come_back_in_the_order_of_their_ids(tmp_path):
    path = tmp_path / "packed.npz"
    generator = np.random.default_rng(0)
    arrays = {
        f"{name}/{kind}": generator.integers(0, 256, (4, 5, 6)).astype(np.uint8)
        for name in ("1007", "1001")
        for kind in ("image", "labels")
    }
    brains._write(path, arrays)
    found = brains.load_malf(path)
    assert found.subjects == ["1001", "1007"]
    for n, name in enumerate(found.subjects):
        np.testing.assert_allclose(found.images[n, 0] * 255, arrays[f"{name}/image"], atol=1e-4)
        np.testing.assert_array_equal(found.labels[n, 0], arrays[f"{name}/labels"])
    with pytest.raises(SystemExit, match="nowhere"):
        brains.load_malf(tmp_path / "nowhere.npz")


def test_malf_is_brought_to_the_grid_of_ixi(tmp_path, monkeypatch):
    """A brain of ellipsoids at 1 mm, far away and with its first axis turned to the left."""
    shape = (20, 24, 18)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)

    def brain(world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image and malf ids at places in mm from the middle of the brain."""
        r = np.sqrt((world / (17, 21, 15)) ** 2 @ np.ones(3))
        image = 100 / (1 + np.exp(12 * (r - 1)))
        labels = np.where(r < 1, 44, 0)
        for number, middle in ((35, (0, -11, -3)), (47, (9, 7, 2)), (59, (-9, 8, 0))):
            near = np.linalg.norm(world - middle, axis=-1)
            image = image + number * np.exp(-((near / 8) ** 2))
            labels = np.where(near < 8, number, labels)
        return image, labels

    middle = (np.array(shape) - 1) / 2
    mni = np.diag([2.0, 2.0, 2.0, 1.0])
    mni[:3, 3] = -2 * middle
    wanted_image, wanted_labels = brain((places - middle) * 2)
    fine = tuple(2 * n for n in shape)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in fine), indexing="ij"), -1)
    offset = (np.array(fine) - 1) / 2
    image, labels = brain((places - offset) * (-1, 1, 1))
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [30.0, -260.0, -255.0]

    def write(path: Path, values: np.ndarray, matrix: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor = torch.from_numpy(values)[None, None]
        write_image(path, Image(tensor, torch.from_numpy(matrix)))

    write(tmp_path / "ixi_2mm" / "mni152_t1_2mm.nii.gz", wanted_image.astype(np.float32), mni)
    folder = tmp_path / "malf"
    write(folder / "t1_brain" / "1001.nii.gz", image.astype(np.float32), affine)
    write(folder / "labels" / "1001.nii.gz", labels.astype(np.int16), affine)
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / name)
    path = tmp_path / "build" / "malf.npz"
    brains.pack_malf(path)
    found = brains.load_malf(path)
    assert found.images.shape == found.labels.shape == (1, 1, *shape)
    truth = brains.relabel(
        torch.from_numpy(wanted_labels)[None, None], brains.malf_structures().values()
    )
    # Voxels of 2 mm fall between those of 1 mm: labels are off by up to a quarter of a voxel along
    # each axis, which costs balls of 4 voxels radius about 0.75 * 0.43 / 4 = 0.08 of their Dice.
    numbers = sorted(set(truth.unique().tolist()) - {0})
    assert len(numbers) == 4
    overlap = script.benchmark_classical.dice(found.labels, truth.byte(), labels=numbers)
    assert float(overlap.min()) > 0.88
    assert float(found.images.max()) == 1.0
