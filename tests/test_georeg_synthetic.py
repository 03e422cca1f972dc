"""The table of synthetic deformations: its truth, its cells, one training, and its arithmetic.

Networks, their loss and the processes of the benchmark are tested with the library and with the
benchmark. ANTs stays out. About 30 s on one core.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from reglib.data.nifti import read_field, write_field, write_image
from reglib.data.results import read_results
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import fcn, georeg
from reglib.methods.classical import Velocity
from reglib.objectives.metrics import affine_share, folding
from reglib.training import fit

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("georeg_synthetic")
    networks = importlib.import_module("georeg_synthetic_networks")
    brains = importlib.import_module("brains")
    benchmark = importlib.import_module("benchmark_classical")
    records = importlib.import_module("benchmark_record")
    peers = importlib.import_module("peers")
    tables = importlib.import_module("table_networks")
finally:
    sys.path.remove(str(SCRIPTS))

Cell = networks.Cell
#: Of the packed volumes: all planes that are looked at are there.
VOLUME = (32, 48, 56)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ellipses(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A head with structures in it, its middle in the middle: image and labels, ``(*S)``."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1)
    x = (places - torch.tensor([(n - 1) / 2 for n in shape])) / torch.tensor(shape)
    r = x.norm(dim=-1)
    labels = torch.zeros(shape, dtype=torch.uint8)
    image = torch.zeros(shape)
    for number, (radius, shift) in enumerate(((0.4, 0.0), (0.15, 0.15), (0.12, -0.15)), 1):
        near = (x - torch.tensor([shift, *(0.0,) * (len(shape) - 1)])).norm(dim=-1) < radius
        labels[near] = number
        image[near] = 0.3 * number
    return (image + 0.1 * (20 * r).cos() * (image > 0)).clamp(0, 1), labels


@pytest.fixture
def work(tmp_path, monkeypatch, uncached):
    """An empty folder for what the scripts write, and nothing that was read before."""
    own = networks.Trainings(tmp_path, tmp_path / "steps.json")
    monkeypatch.setattr(networks, "TRAININGS", own)
    monkeypatch.setattr(script, "WORK", tmp_path)
    uncached(networks.load, script.trained)
    return tmp_path


@pytest.fixture
def packed(work, monkeypatch):
    """Small heads in place of the brains: 2 subjects to train, 2 to tune and 3 to test."""
    parts = {"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f", "g"]}
    splits = work / "splits.json"
    splits.write_text(json.dumps({"ixi_2mm": parts}))
    image, labels = ellipses(VOLUME)
    arrays = {}
    for number, name in enumerate(itertools.chain(*parts.values())):
        # Told apart by their brightness, and each plane by its own.
        shade = (0.5 + number / 20) * (0.5 + torch.arange(VOLUME[2]) / 200)
        arrays[f"{name}/image"] = (255 * image * shade).round().byte().numpy()
        arrays[f"{name}/labels"] = labels.numpy()
    np.savez(work / "brains.npz", **arrays)
    monkeypatch.setattr(brains, "SPLITS", splits)
    monkeypatch.setattr(brains, "PACKED", work / "brains.npz")
    # brains.load was defined with the path of its own module.
    whole = brains.load
    monkeypatch.setattr(brains, "load", lambda part: whole(part, work / "brains.npz"))
    return parts, arrays


# --- Deformations ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 48), (12, 16, 14)])
@pytest.mark.parametrize("family", networks.FAMILIES)
def test_every_family_does_what_it_says_at_every_strength(family, shape):
    """Displacements are bounded by the amount, come near to it, and grow with the strength.

    The noise of the first strength, which is in each, is taken off before a look at affine parts.
    """
    d, many = len(shape), 100
    sides = torch.tensor([float(n) for n in shape]).view(1, d, *(1,) * d)
    half = (sides - 1) / 2
    means = []
    for strength in networks.STRENGTHS:
        cell = Cell(family, strength)
        u = networks.deformation(shape, [cell] * many, generator())
        assert u.shape == (many, d, *shape)
        means.append(float(u.norm(dim=1).mean()))
        amount = {part: own[strength - 1] for part, own in networks.AMOUNTS.items()}.get(family)
        if family == "all":
            continue
        largest = u.abs().flatten(2).amax(2)
        if family == "Brownian":
            bound = amount * shape[0] / networks.ACROSS
            assert float(largest.max()) <= bound
            assert float(largest.max()) > 0.6 * bound
            # What is added at nodes is no affine map.
            assert float(affine_share(u).mean()) < 0.9
            continue
        u = u - networks.deformation(shape, [Cell("Brownian", 1)] * many, generator())
        assert float(affine_share(u).min()) == pytest.approx(1, abs=1e-4)
        if family == "translation":
            torch.testing.assert_close(u, u.flatten(2)[..., :1].view(many, d, *(1,) * d) + 0 * u)
            relative = (u / sides).abs().flatten(2).amax(2)
            assert float(relative.max()) <= amount + 1e-6
            assert float(relative.max()) > 0.95 * amount
            assert float(u.mean()) == pytest.approx(0, abs=0.2 * amount * max(shape))
            continue
        # Rotations and scalings are about the middle.
        middle = tuple(n // 2 for n in shape)
        assert float(u[(..., *middle)].abs().max()) < 1.5
        if family == "scaling":
            relative = (u / half).abs().flatten(2).amax(2)
            assert float(relative.max()) == pytest.approx(amount, rel=0.05)
        else:
            jacobian = torch.stack([u.diff(dim=2 + a).flatten(2).mean(2) for a in range(d)], -1)
            matrix = (jacobian + torch.eye(d)).double()
            torch.testing.assert_close(
                matrix @ matrix.mT,
                torch.eye(d, dtype=torch.float64).expand(many, d, d),
                atol=1e-4,
                rtol=0,
            )
            cosine = ((torch.linalg.diagonal(matrix).sum(-1) - (d - 2)) / 2).clamp(-1, 1)
            degrees = torch.rad2deg(cosine.acos())
            # In space the three components together.
            assert float(degrees.max()) <= amount * math.sqrt(d * (d - 1) / 2) + 0.1
            assert float(degrees.max()) > 0.9 * amount
    assert means[0] < means[1] < means[2]


def test_all_is_the_sum_of_the_affine_map_and_the_noise():
    """Of one state of the generator: the cells differ in the amounts alone."""
    shape = (40, 48)
    everything = networks.deformation(shape, [Cell("all", 2)], generator(1))
    noise = networks.deformation(shape, [Cell("Brownian", 2)], generator(1))
    assert float(affine_share(everything - noise)) == pytest.approx(1, abs=1e-4)
    shift = networks.deformation(shape, [Cell("translation", 2)], generator(1))
    shift = shift - networks.deformation(shape, [Cell("Brownian", 1)], generator(1))
    middle = (everything - noise - shift)[..., 19:21, 23:25].mean((2, 3))
    torch.testing.assert_close(middle, torch.zeros(1, 2), atol=1e-4, rtol=0)


def test_cells_have_names_of_their_own_and_tell_their_amounts():
    names = [cell.name for cell in networks.CELLS]
    assert len(set(names)) == len(networks.FAMILIES) * 3 == 15
    found = networks.amounts([Cell("rotation", 3), Cell("all", 1), Cell("scaling", 2)], "rotation")
    assert found.flatten().tolist() == [45.0, 15.0, 0.0]
    cells = [Cell("rotation", 3), Cell("all", 3), Cell("Brownian", 2)]
    assert networks.amounts(cells, "Brownian").flatten().tolist() == [11.0, 22.0, 16.0]


def test_a_pair_is_its_truth_and_noise():
    """Warped by the true field, the moving image is the fixed one but for noise of that size."""
    image = ellipses((40, 48))[0][None, None].expand(15, -1, -1, -1)
    pairs = networks.deformed(image, networks.CELLS, generator())
    assert pairs.moving is image
    warped = warp(image, pairs.field, padding="zeros")
    # Where noise is not clipped.
    rest = (pairs.fixed - warped)[(warped > 0.1) & (warped < 0.9)]
    assert float(rest.mean()) == pytest.approx(0, abs=2e-3)
    assert float(rest.std()) == pytest.approx(networks.NOISE, rel=0.05)
    assert float(pairs.fixed.min()) == 0
    assert float(pairs.fixed.max()) <= 1
    # All but rotations and scalings differ much from the moving image, which is round.
    apart = (pairs.fixed - image).abs().flatten(1).mean(1)
    assert float(apart[9:].min()) > 0.02
    with pytest.raises(ValueError, match="cells: wanted 15"):
        networks.deformed(image, networks.CELLS[:3], generator())


def test_the_mask_is_the_brain_where_phi_stays_in_the_image():
    """By plain lookup of the nearest pixel; the brain reaches up to the border."""
    image = torch.zeros(1, 1, 40, 48)
    image[..., :12, 10:30] = 1.0
    pairs = networks.deformed(image, [Cell("all", 3)], generator())
    phi = pairs.field[0] + torch.stack(
        torch.meshgrid(torch.arange(40), torch.arange(48), indexing="ij")
    )
    within = (phi[0] >= 0) & (phi[0] <= 39) & (phi[1] >= 0) & (phi[1] <= 47)
    i, j = (phi[k].round().long().clamp(0, n) for k, n in enumerate((39, 47)))
    assert torch.equal(pairs.mask[0, 0], within & (image[0, 0][i, j] > 0))
    assert 0 < int(pairs.mask.sum()) < int((image[0, 0][i, j] > 0).sum())
    u = torch.zeros(1, 2, 40, 48)
    u[:, 0] = -5.0
    expected = torch.zeros(1, 1, 40, 48, dtype=torch.bool)
    expected[..., 5:, :] = True
    assert torch.equal(networks.inside(u), expected)
    assert networks.inside(torch.zeros(2, 3, 4, 5, 6)).all()


def test_the_endpoint_error_is_the_mean_distance_within_the_mask():
    pairs = networks.deformed(
        ellipses((40, 48))[0][None, None].expand(2, -1, -1, -1),
        [Cell("rotation", 2), Cell("all", 3)],
        generator(),
    )
    assert networks.endpoint_error(pairs.field, pairs).tolist() == [0.0, 0.0]
    off = pairs.field + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1) * pairs.mask
    torch.testing.assert_close(networks.endpoint_error(off, pairs), torch.tensor([5.0, 5.0]))
    off = pairs.field + 100.0 * ~pairs.mask
    assert networks.endpoint_error(off, pairs).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [{}, {"others": True, "told": True}], ids=str)
def test_the_stream_goes_on_where_it_was_and_has_every_cell(kind):
    images = torch.rand(5, 1, 16, 16)
    stream = networks.DeformedPairs(images, 3, seed=1, **kind)
    taken = iter(stream)
    moving, fixed, *_ = next(taken)
    assert moving.shape == fixed.shape == (3, 1, 16, 16)
    state = stream.state_dict()
    after = next(taken)
    stream.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(after, next(iter(stream)), strict=True))
    drawn = [networks.CELLS[n] for n in torch.cat([stream._draw(15) for _ in range(100)])]
    assert set(drawn) == set(networks.CELLS)


@pytest.mark.parametrize("others", [False, True])
def test_who_is_told_the_truth_sees_the_same_images(others, monkeypatch):
    """And the truth is how the image that the fixed one is of was deformed, by its brightness."""
    monkeypatch.setattr(networks, "varied", lambda images, generator: images)
    shades = torch.tensor([0.4, 0.6, 0.8, 1.0]).view(-1, 1, 1, 1)
    images = shades * ellipses((40, 48))[0]
    plain, told = (
        next(iter(networks.DeformedPairs(images, 8, 7, others=others, told=told)))
        for told in (False, True)
    )
    assert len(plain) == 2
    assert torch.equal(told.moving, plain[0])
    assert torch.equal(told.fixed, plain[1])
    again = torch.stack([warp(x.expand(8, 1, -1, -1), told.field, padding="zeros") for x in images])
    rest = (told.fixed - again).abs().mean((2, 3, 4))
    nearest = images[rest.argmin(0)]
    # The mean of noise is under one standard deviation, and the next image differs by 0.2.
    assert float(rest.amin(0).max()) < networks.NOISE
    assert torch.equal(nearest, told.moving) != others


@pytest.mark.parametrize("shape", [(16, 24), (8, 16, 24)])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_distance_from_the_truth_equals_a_plain_sum_over_points(shape, batch):
    """Two levels of which the coarser one has two fields; block by block.

    The square root is of a square plus 1e-4, so that it is 0.01 at the truth.
    """
    d, g = len(shape), generator()
    field = torch.randn(batch, d, *shape, generator=g)
    mask = torch.rand(batch, 1, *shape, generator=g) > 0.4
    half = [n // 2 for n in shape]
    coarse = [torch.randn(batch, d, *half, generator=g) for _ in range(2)]
    fine = torch.randn(batch, d, *shape, generator=g)
    stages = [
        georeg.Stage(1, 0, coarse[0]),
        georeg.Stage(1, 1, coarse[1]),
        georeg.Stage(0, 0, fine),
    ]
    output = georeg.Output(fine, tuple(stages))
    wanted = {}
    for found, size in ((fine, 1), (coarse[0], 2), (coarse[1], 2)):
        total = count = 0.0
        for place in np.ndindex(batch, *found.shape[2:]):
            block = tuple(slice(size * p, size * p + size) for p in place[1:])
            truth = field[(place[0], slice(None), *block)].flatten(1).mean(1) / size
            share = mask[(place[0], 0, *block)].float().mean()
            apart = found[(place[0], slice(None), *place[1:])] - truth
            total += share * (apart.square().sum() + 1e-4).sqrt()
            count += share
        wanted[size] = wanted.get(size, 0.0) + total / count
    for weights in ((1.0, 0.0), (0.0, 2.0), (3.0, 0.5)):
        found = networks.off_truth(output, field, mask, weights)
        expected = weights[0] * wanted[1] + weights[1] * wanted[2]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # At the truth a gradient that is 0, not nan.
    exact = field.clone().requires_grad_()
    output = georeg.Output(exact, (georeg.Stage(0, 0, exact),))
    least = networks.off_truth(output, field, mask, (1.0,))
    assert least.item() == pytest.approx(0.01)
    least.backward()
    assert exact.grad.abs().max() == 0


@pytest.mark.parametrize("shape", [(24, 16), (16, 8, 24)])
def test_the_means_of_one_field_are_compared_with_those_of_the_truth(shape):
    """Off by 3 voxels of the images along the first axis, and by a ripple that means do not see."""
    field = torch.randn(2, len(shape), *shape, generator=generator())
    checkers = sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij")) % 2
    found = field + (2.0 * checkers - 1)
    found[:, 0] += 3
    mask = torch.ones(2, 1, *shape, dtype=torch.bool)
    output = fcn.Output(found, ())
    total = networks.off_truth(output, field, mask, (0.0, 0.5, 2.0))
    assert float(total) == pytest.approx(0.5 * 3 / 2 + 2 * 3 / 4, rel=1e-3)
    whole = networks.off_truth(output, field, mask, (1.0,))
    rest = len(shape) - 1  # axes along which it is off by the ripple alone
    exact = (math.hypot(4, rest**0.5) + math.hypot(2, rest**0.5)) / 2
    assert float(whole) == pytest.approx(exact, rel=1e-4)  # 1e-4 is added below the root
    at_truth = networks.off_truth(fcn.Output(field, ()), field, mask, (1.0, 1.0))
    assert float(at_truth) == pytest.approx(0.02, rel=1e-3)
    # A field of its own at a resolution, in voxels of that, counts in the place of the means there.
    own = networks.pyramid(field, 2)[1] / 2
    levels = (fcn.Level(1, found), fcn.Level(2, own), fcn.Level(8, own))
    total = networks.off_truth(fcn.Output(found, levels), field, mask, (0.0, 0.5, 2.0))
    assert float(total) == pytest.approx(0.5 * 0.01 + 2 * 3 / 4, rel=1e-3)


def test_the_unet_sees_0_at_the_ends_of_images_of_other_sizes():
    pytest.importorskip("monai")
    torch.manual_seed(0)
    network = tables.UNet(integration=2).eval()
    moving, fixed = torch.rand(2, 1, 1, 20, 16, 24, generator=generator())
    with torch.no_grad():
        found = network(moving, fixed).field
        wide = network(*(torch.nn.functional.pad(x, (0, 8, 0, 0, 0, 12)) for x in (moving, fixed)))
    assert found.shape == (1, 3, 20, 16, 24)
    assert float(found.abs().max()) > 1e-3
    assert torch.equal(found, wide.field[:, :, :20, :, :24])


def test_a_network_is_told_the_truth_beside_comparing_images():
    recipe = networks.NETWORKS["GeoReg"]
    told = recipe._replace(truth=[0.0, 0.0, 0.0, 1.0, 1.0])
    assert "truth" not in recipe.as_json()
    assert told.as_json() == recipe.as_json() | {"truth": told.truth}
    torch.manual_seed(0)
    network = recipe.network()
    images = ellipses((32, 48))[0][None, None].expand(2, -1, -1, -1)
    pairs = networks.deformed(images, [Cell("rotation", 2), Cell("all", 3)], generator())
    output = network(pairs.moving, pairs.fixed)
    by_images = recipe.loss()(output, pairs.moving, pairs.fixed)
    found = told.loss()(output, *pairs)
    assert {name: found[name] for name in by_images} == by_images
    assert found["truth"] == networks.off_truth(output, pairs.field, pairs.mask, told.truth)
    assert found["truth"] > 0.1


# --- Images ---------------------------------------------------------------------------------


def test_parts_are_those_of_the_split_and_no_subject_is_in_two():
    parts = json.loads(brains.SPLITS.read_text())["ixi_2mm"]
    assert set(networks.PARTS.values()) == set(parts)
    assert [len(parts[p]) for p in networks.PARTS.values()] == [100, 10, 30]
    assert len(set(itertools.chain(*parts.values()))) == 140


def test_slices_are_those_of_the_subjects_of_the_part(packed):
    parts, arrays = packed
    for part, own in networks.PARTS.items():
        planes = networks.TRAINING_PLANES if part == "training" else (networks.PLANE,)
        found = networks.load(part)
        assert found.subjects == [name for name in parts[own] for _ in planes]
        assert found.images.shape == (len(found.subjects), 1, *VOLUME[:2])
        for number, (name, plane) in enumerate((n, p) for n in parts[own] for p in planes):
            expected = torch.from_numpy(arrays[f"{name}/image"][:, :, plane]).float() / 255
            torch.testing.assert_close(found.images[number, 0], expected)
            label = torch.from_numpy(arrays[f"{name}/labels"][:, :, plane])
            assert torch.equal(found.labels[number, 0], label)
    volumes = networks.load("tuning", 3)
    assert volumes.images.shape == (2, 1, *VOLUME)
    assert volumes.subjects == parts["validation"]


def test_without_the_volumes_it_says_what_to_do(packed, monkeypatch):
    monkeypatch.setattr(brains, "PACKED", Path("nowhere/ixi_2mm.npz"))
    with pytest.raises(SystemExit, match=r"brains\.py"):
        networks.load("tuning")


def test_pairs_are_the_same_again_and_differ_from_each_other(packed):
    one = networks.pair_of("test", 0, Cell("all", 2))
    again = networks.pair_of("test", 0, Cell("all", 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    fields = [
        networks.pair_of(part, place, cell).field.flatten()
        for part in ("tuning", "test")
        for place in (0, 1)
        for cell in (Cell("all", 2), Cell("all", 3))
    ]
    apart = torch.cdist(torch.stack(fields), torch.stack(fields)) + 1e9 * torch.eye(8)
    assert float(apart.min()) > 1
    watched = networks.tuning_pairs(1)
    assert len(watched.moving) == 15
    assert torch.equal(watched.field[3:4], networks.pair_of("tuning", 1, Cell("rotation", 1)).field)


def test_the_pairs_of_a_part_are_of_its_subjects_in_turn(packed, monkeypatch):
    monkeypatch.setattr(script, "PER_CELL", 2)
    found = script.cases("test")
    assert len({case[:3] for case in found}) == len(found) == 30
    assert [case.moving for case in found[:6]] == ["e", "f", "g", "e", "f", "g"]
    assert [case.cluster for case in found[:3]] == [0, 1, 2]
    assert [case.set for case in found[::2]] == [cell.name for cell in networks.CELLS]
    assert {case.moving for case in script.cases("tuning", 1)} == {"c"}
    pair = script.load_pair(found[-1], "test")
    assert torch.equal(pair.truth.field, networks.pair_of("test", 2, Cell("all", 3)).field)
    assert torch.equal(pair.fixed_labels, warp_labels(pair.moving_labels, pair.truth.field))


# --- Measures -------------------------------------------------------------------------------


def known(strength: int = 1) -> script.Known:
    """A pair of the head, shifted."""
    image, labels = ellipses((40, 48))
    cell = Cell("translation", strength)
    truth = networks.deformed(image[None, None], [cell], generator(3))
    labels = labels.long()[None, None]
    images = (script.Image(x, script.AFFINE) for x in (truth.moving, truth.fixed))
    names = ["head", "one", "other", "absent"]
    return script.Known(names, *images, labels, warp_labels(labels, truth.field), truth)


def test_measures_of_the_truth_and_of_nothing():
    pair = known()
    right = script.measure(pair, pair.truth.field)
    assert right["endpoint_error"] == right["hd95"] == right["folding"] == 0
    assert right["mean_dice"] == 1
    assert right["structures"] == 3
    nothing = script.measure(pair, torch.zeros_like(pair.truth.field))
    lengths = pair.truth.field.norm(dim=1, keepdim=True)[pair.truth.mask]
    assert nothing["endpoint_error"] == pytest.approx(float(lengths.mean()), rel=1e-4)
    # The surfaces of a moved disc are at most the farthest move apart, but for half voxels.
    assert 0.3 * float(lengths.mean()) < nothing["hd95"] <= float(lengths.max()) + 1
    assert nothing["mean_dice"] < 0.95


def test_a_structure_that_is_lost_counts_with_the_diagonal():
    pair = known()
    away = torch.full_like(pair.truth.field, 1000.0)
    assert script.measure(pair, away)["hd95"] == pytest.approx(math.hypot(40, 48), rel=1e-5)
    empty = pair._replace(fixed_labels=torch.zeros_like(pair.fixed_labels))
    found = script.measure(empty, away)
    assert found["hd95"] is found["mean_dice"] is None
    assert found["structures"] == 0


def test_folding_is_counted_in_the_brain_and_on_the_whole_grid():
    pair = known()
    u = pair.truth.field.clone()
    u[..., :4, :] += 5.0 * torch.arange(4).flip(0).view(4, 1)  # folds where no brain is
    found = script.measure(pair, u)
    assert found["folding"] == 0
    assert found["folding_everywhere"] > 0.02
    assert found["folding_of_truth"] == 0
    assert float(folding(u)) == pytest.approx(found["folding_everywhere"], rel=1e-3)


# --- Networks -------------------------------------------------------------------------------


def small_networks() -> dict:
    """The recipes with networks that learn nothing worth having in no time."""
    own = {
        "georeg": {"channels": [4, 6], "neighbourhoods": [2, 3], "iterations": [1, 1]},
        "fcn": {"channels": [4, 6, 8]},
        "composed fcn": {"channels": [4, 6], "decoder_channels": [4, 6]},
        "voxelmorph": {},
    }

    def shrunk(recipe):
        kept = ("warp_features", "integration")
        settings = {k: v for k, v in recipe.settings.items() if k in kept} | own[recipe.kind]
        if recipe.kind == "georeg":
            settings["interpolation"] = 0 if settings.get("warp_features") else 2
        objective = recipe.objective
        if recipe.kind == "georeg":  # of fewer levels
            objective = objective | {"regularity_weight": 0.1, "level_weight": 1.0}
        return recipe._replace(settings=settings, objective=objective, batch=2)

    return {name: shrunk(recipe) for name, recipe in networks.NETWORKS.items()}


@pytest.fixture
def small(packed, monkeypatch):
    """Small networks, and a calibration of three steps for everyone."""
    monkeypatch.setattr(networks, "NETWORKS", small_networks())
    monkeypatch.setattr(networks, "VALIDATED", 1)
    steps = {"steps": dict.fromkeys(networks.NETWORKS, 3)}
    networks.TRAININGS.calibration.write_text(json.dumps(steps))


def test_recipes_make_networks_that_start_near_the_identity_and_have_a_finite_loss():
    pytest.importorskip("monai")
    pairs = networks.deformed(torch.rand(2, 1, 80, 96), networks.CELLS[-2:], generator())
    for name, recipe in networks.NETWORKS.items():
        assert json.loads(json.dumps(recipe.as_json()))["kind"] == recipe.kind
        torch.manual_seed(0)
        network = recipe.network()
        output = network(pairs.moving, pairs.fixed)
        assert output.field.shape == (2, 2, 80, 96)
        # GeoReg's first steps are in voxels of its coarsest level, 16 pixels.
        assert float(output.field.detach().abs().max()) < 3, name
        loss = sum(recipe.loss()(output, pairs.moving, pairs.fixed).values())
        loss.backward()
        assert all(
            p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters()
        ), name


def test_recipes_are_those_that_the_table_was_trained_with():
    """So who trains again makes the same networks."""
    runs = read_results("georeg_synthetic")["training"]
    for run in runs:
        recipe = json.loads(json.dumps(networks.NETWORKS[run["network"]].as_json()))
        assert recipe.items() <= run["training"].items(), run["network"]
        assert run["training"]["dimensions"] == 2
    assert {run["network"] for run in runs} == networks.NETWORKS.keys()


def test_a_calibration_says_how_many_steps_the_limit_allows(small):
    networks.TRAININGS.calibration.unlink()
    with pytest.raises(SystemExit, match="calibrate"):
        networks.TRAININGS.steps()
    networks.calibrate()
    written = json.loads(networks.TRAININGS.calibration.read_text())
    limit = networks.TRAININGS.seconds
    assert written["limit_seconds"] == limit
    for name, seconds in written["measured"]["step_seconds"].items():
        # Two digits of the quotient are kept.
        assert written["steps"][name] == pytest.approx(limit / seconds, rel=0.06)
        assert networks.TRAININGS.steps()[name] == written["steps"][name]


@pytest.mark.parametrize("name", list(networks.NETWORKS))
def test_a_trained_network_comes_back_from_its_file_and_registers(small, name):
    record = networks.train(name, 0, 2)
    assert record["training"]["steps"] == len(record["loss"]) == 2
    assert len(record["tuning_error"]) == 1
    path = networks.TRAININGS.weights(name, 0)
    network = script.trained(str(path))
    assert network.card["seed"] == 0
    assert network.card["training"] == record["training"]
    pair = script.load_pair(script.cases("test")[-1], "test")
    files = {part: script.WORK / f"{part}.nii.gz" for part in ("moving", "fixed", "field")}
    for part, image in (("moving", pair.moving), ("fixed", pair.fixed)):
        write_image(files[part], image)
    watch = script.run_reglib(
        *map(str, files.values()), {"weights": str(path)}, methods_of=script.methods_of
    )
    assert watch.seconds > 0
    with torch.no_grad():
        expected = network(pair.moving.tensor, pair.fixed.tensor).field
    found = read_field(files["field"])[0].float()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    error = script.measure(pair, found)["endpoint_error"]
    assert error == pytest.approx(float(networks.endpoint_error(expected, pair.truth)), rel=1e-2)


def test_the_embedded_network_is_the_trained_one_in_half_precision(small, monkeypatch, work):
    """It says what the images of the table do not: 2 mm, as IXI's axial slices lie."""
    monkeypatch.setattr(networks, "WEIGHTS", work / "embedded.safetensors")
    networks.train(networks.EMBEDDED, 0, 2)
    networks.embed()
    trained = georeg.load(networks.TRAININGS.weights(networks.EMBEDDED, 0))
    embedded = georeg.load(networks.WEIGHTS)
    for name, value in trained.state_dict().items():
        assert torch.equal(embedded.state_dict()[name], value.half().float())
    said = {"range": [0.0, 1.0], "orientation": "RA", "spacing": [2.0, 2.0]}
    assert embedded.card["input"] == trained.card["input"] | said
    assert embedded.card["provenance"] == trained.card["provenance"]


def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(small, monkeypatch, work):
    """After the first of three steps; the checkpoint has the stream of pairs in it.

    Its folder is not there before.
    """
    monkeypatch.setattr(networks, "VALIDATE_EVERY", 1)
    whole = networks.train("GeoReg", 0, 3, path=work / "new" / "whole.safetensors")

    def stopped(network, pairs, loss, **options):
        looks = []

        def look(trained):
            looks.append(trained)
            if len(looks) == 2:
                raise KeyboardInterrupt
            return own_look(trained)

        own_look = options["validate"]
        return fit(network, pairs, loss, **(options | {"validate": look}))

    monkeypatch.setattr(networks.trainings, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        networks.train("GeoReg", 0, 3, path=work / "new" / "parts.safetensors")
    monkeypatch.setattr(networks.trainings, "fit", fit)
    assert not (work / "new" / "parts.safetensors").exists()
    parts = networks.train("GeoReg", 0, 3, path=work / "new" / "parts.safetensors")
    assert parts["loss"] == whole["loss"]
    assert parts["tuning_error"] == whole["tuning_error"]
    one, other = (
        georeg.load(work / "new" / f"{n}.safetensors").state_dict() for n in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_scanners_show_the_same_brain(monkeypatch):
    """Intensities rise with those of the original, where nothing is blurred or shaded."""
    black = networks.varied(torch.zeros(1, 1, 200, 200), generator())
    # Half of the noise is below 0: the rest has a mean of sigma / sqrt(2 pi), 40,000 times drawn.
    assert float(black.mean()) == pytest.approx(networks.NOISE / math.sqrt(2 * math.pi), rel=0.05)
    monkeypatch.setattr(networks, "NOISE", 0.0)
    ramp = torch.linspace(0, 1, 40 * 48).view(1, 1, 40, 48)
    for seed in range(5):
        images = torch.cat([ramp, ramp.flip(2), 0.5 * ramp])
        images[..., :4] = 0
        found = networks.varied(images, generator(seed))
        assert found.shape == images.shape
        assert float(found.min()) >= 0
        torch.testing.assert_close(found.amax((1, 2, 3)), torch.ones(3))
        # A blur of one voxel reaches four.
        assert float(found[..., 0].max()) < 1e-3
        for one, other in zip(images, found, strict=True):
            seen = one[0, 8:-8, 8:-8]
            ranks = stats.spearmanr(seen.flatten(), other[0, 8:-8, 8:-8].flatten())
            # The factor is between 0.7 and 1.3 and differs from place to place.
            assert ranks.statistic > 0.6
    volumes = torch.rand(2, 1, 10, 12, 14)
    assert networks.varied(volumes, generator()).shape == volumes.shape
    assert torch.equal(
        networks.varied(volumes, generator(1)), networks.varied(volumes, generator(1))
    )


def test_every_second_fixed_image_is_of_another_subject_in_the_same_plane(monkeypatch):
    """Each image has a brightness of its own, which tells subject and plane; nothing is varied."""
    monkeypatch.setattr(networks, "varied", lambda images, generator: images)
    monkeypatch.setattr(networks, "NOISE", 0.0)
    subjects, planes = 4, 3
    shades = (1 + torch.arange(subjects * planes)) / 20
    images = shades.view(-1, 1, 1, 1).expand(-1, 1, 40, 48)
    stream = networks.DeformedPairs(images, 4, 0, planes=planes, others=True)
    same = 0
    for _, (moving, fixed) in zip(range(25), stream, strict=False):
        first, second = (torch.round(20 * x.amax((1, 2, 3))).long() - 1 for x in (moving, fixed))
        assert torch.equal(first % planes, second % planes)
        same += int((first == second).sum())
    # Half of 100, and a quarter of the other half; five standard deviations each way.
    assert same == pytest.approx(62.5, abs=24)


def test_a_training_has_the_threads_it_is_given():
    before = torch.get_num_threads()
    try:
        assert [networks.trainings.begin(0, n) for n in (2, 1)] == ["cpu"] * 2
        assert torch.get_num_threads() == 1
        networks.trainings.begin(0, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_trained_for_longer_takes_so_many_times_the_steps_of_another(small):
    name, (like, times) = "GeoReg, varied", networks.NETWORKS["GeoReg, varied"].longer
    assert networks.steps_of(name) == times * networks.steps_of(like) == 3 * times
    assert networks.NETWORKS[name].settings == networks.NETWORKS[like].settings


def test_what_was_tried_stands_beside_georeg_on_tuning_pairs(small, monkeypatch, work):
    """Trained in this process; the table is of tuning pairs alone."""
    name = "finest level refined"
    tried = {name: small_networks()["GeoReg"]}
    monkeypatch.setattr(networks, "EXPLORED", tried)
    monkeypatch.setattr(
        networks, "EXPLORATION", networks.Trainings(work / "explored", work / "explored.json")
    )
    monkeypatch.setattr(networks, "EXPLORED_RESULTS", work / "tuning.json")

    def here(self, train, tasks, quality):
        networks.trainings.write_json(self.log, [train(*task) for task in tasks])

    monkeypatch.setattr(networks.Trainings, "train_missing", here)
    networks.TRAININGS.train_missing(networks.train, [("GeoReg", 0, 2), ("FCN", 0, 2)], "")
    networks.EXPLORATION.calibration.write_text(json.dumps({"steps": {name: 2}}))
    networks.explore()
    content = json.loads((work / "tuning.json").read_text())
    assert [run["network"] for run in content["runs"]] == ["GeoReg", name]
    for run in content["runs"]:
        assert list(run["cells"]) == [cell.name for cell in networks.CELLS]
        mean = np.mean([cell["endpoint_error"] for cell in run["cells"].values()])
        assert run["mean"] == pytest.approx(mean, rel=1e-3)


def test_every_form_that_was_tried_is_a_network():
    for name, recipe in networks.EXPLORED.items():
        assert json.loads(json.dumps(recipe.as_json()))["kind"] == "georeg", name
        network = recipe.network()
        x = torch.rand(1, 1, 32, 32)
        assert recipe.loss()(network(x, x), x, x)["regularity"] >= 0


def test_training_never_looks_at_a_test_subject(small, monkeypatch):
    looked, load = [], networks.load
    monkeypatch.setattr(
        networks, "load", lambda part, *rest: looked.append(part) or load(part, *rest)
    )
    networks.train("FCN, composed", 1, 1)
    assert set(looked) == {"training", "tuning"}


def test_a_job_for_a_gpu_leaves_weights_and_a_record(small, monkeypatch, tmp_path):
    """What ``make gpu`` calls, in space, with one step; the checkpoint is gone when it is done."""
    monkeypatch.setattr(networks, "VALIDATED", 1)
    job = {"network": "GeoReg", "seed": 0, "steps": 1, "batch": 1, "dimensions": 3}
    (tmp_path / "settings.json").write_text(json.dumps(job))
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--settings", str(tmp_path / "settings.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["georeg_synthetic_networks.py", *arguments])
    networks.TRAININGS.do_job(networks.train, None)
    assert sorted(path.name for path in out.iterdir()) == ["georeg_0.json", "georeg_0.safetensors"]
    record = json.loads((out / "georeg_0.json").read_text())
    assert record["training"]["batch"] == 1
    assert record["training"]["dimensions"] == 3
    assert georeg.load(out / "georeg_0.safetensors").dimensions == 3


# --- The table ------------------------------------------------------------------------------


def test_every_configuration_is_json_and_names_what_exists(small, work, monkeypatch):
    found = script.configurations()
    assert json.loads(json.dumps(found)) == found
    assert {own["package"] for own in found.values()} == {"antspyx", "SimpleITK", "reglib"}
    for name, recipe in networks.NETWORKS.items():
        for seed in recipe.seeds:
            assert found[f"{name}, seed {seed}"]["sha256"] is None
            assert script.method_of(f"{name}, seed {seed}") == name
    for name in ("reglib affine + velocity", "GeoReg, then velocity"):
        assert script.method_of(name) == name
    continued = found["GeoReg, then velocity"]
    assert continued["weights"] == found["GeoReg, seed 0"]["weights"]
    [velocity] = script.methods_of({"methods": continued["methods"]})
    assert isinstance(velocity, Velocity)
    methods = script.methods_of(found["reglib velocity"])
    assert methods == [Velocity()]
    for name in (*script.ANTS, "SimpleITK affine + demons"):
        assert found[name] == peers.CONFIGURATIONS[name]
    assert "affine" not in found["SimpleITK demons"]
    assert set(networks.DIFFEOMORPHIC) <= set(networks.NETWORKS)


def test_no_pairs_without_everything_trained_and_none_of_unknown_names(small, work, monkeypatch):
    with pytest.raises(SystemExit, match="not trained yet"):
        script.test("tuning", 1, None, [])
    for given in ((["nobody"], []), (None, ["nobody"])):
        with pytest.raises(SystemExit, match="no such configuration"):
            script.test("tuning", 1, *given)
    assert not (work / "tuning.json").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["test", "--pairs", "1"], "measured all together"),
        (["train", "nobody"], "no such network"),
        (["test", "--split", "training"], "invalid choice"),
    ],
)
def test_bad_commands_are_turned_down(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["georeg_synthetic.py", *words])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert told in f"{stop.value}{capsys.readouterr().err}"


def test_demons_alone_find_a_small_shift(tmp_path):
    """1.5 voxels of waves: away from the border, more than half of the difference is gone."""
    files = {part: tmp_path / f"{part}.nii" for part in ("moving", "fixed")}
    for part, image in zip(files, script.artificial_pair(), strict=True):
        write_image(files[part], image)
    files["field"] = tmp_path / "field.nii.gz"
    settings = {"package": "SimpleITK", "demons": peers.DEMONS}
    peers.run_simpleitk(*map(str, files.values()), settings)
    u, affine = read_field(files["field"])
    assert torch.equal(affine, script.AFFINE)
    moving, fixed = (image.tensor for image in script.artificial_pair())
    after = (warp(moving, u.float()) - fixed)[..., 6:-6, 6:-6].abs().mean()
    assert float(after) < 0.5 * float((moving - fixed)[..., 6:-6, 6:-6].abs().mean())


def sum_up(record, everything, names):
    """As the script does."""
    options = {"head": script.head(), "summary": script.summarise, "show": script.table}
    benchmark.sum_up(record, everything, names, Path(sys.executable), **options)


def test_a_run_is_resumed_and_summed_up(work, tmp_path, monkeypatch):
    """One finds the truth, one is broken: it counts as unregistered."""
    pair = known(2)
    everything = [benchmark.Case("translation 2", name, name, n) for n, name in enumerate("ab")]
    names = {"moving": "moving.nii", "fixed": "fixed.nii", "field": "field.nii.gz"}
    files = {part: tmp_path / name for part, name in names.items()}
    asked = []

    def run(name, settings):
        asked.append(name)
        if name == "broken":
            return {"error": "broken"}
        write_field(files["field"], pair.truth.field, script.AFFINE)
        return {"seconds": 0.5, "cpu_seconds": 1.0}

    wanted = {name: {"package": "none"} for name in ("GeoReg, seed 0", "GeoReg, seed 1", "broken")}
    for _ in range(2):  # the second finds nothing left
        record = records.Record(tmp_path / "rows.json", "test", tmp_path / "whole.json")
        tasks = {(*c[:3], name) for c in everything for name in (records.UNREGISTERED, *wanted)}
        record.begin(wanted, tasks)
        benchmark.measure_all(
            record, everything, wanted, files, run, load=lambda case: pair, measure=script.measure
        )
    assert asked == list(wanted) * 2
    monkeypatch.setattr(benchmark, "versions", lambda python: {})
    sum_up(record, everything, list(wanted))
    whole = json.loads((tmp_path / "whole.json").read_text())
    table = whole["cells"]["translation 2"]
    assert table["GeoReg"]["endpoint_error"] == 0
    assert table["GeoReg"]["seeds"] == [0.0, 0.0]
    assert table["GeoReg"]["pairs"] == 2
    assert table["broken"]["failed"] == 2
    assert table["broken"]["endpoint_error"] == table["unregistered"]["endpoint_error"]
    beside = whole["georeg_minus"]["translation 2"]["broken"]
    assert beside["pairs"] == 2
    assert beside["endpoint_error"] == pytest.approx(-table["broken"]["endpoint_error"], abs=1e-3)
    assert whole["complete"] is True
    assert set(script.ABSENT) == set(whole["absent"])


def test_nothing_is_written_while_a_row_is_missing(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "georeg_synthetic.json")
    record = records.Record(tmp_path / "rows.json", "test", script.RESULTS)
    sum_up(record, [benchmark.Case("all 1", "a", "a", 0)], ["GeoReg, seed 0"])
    assert "1 registrations are missing" in capsys.readouterr().out
    assert not script.RESULTS.exists()


def rows_of(**errors: list[float]) -> list[dict]:
    """Made-up rows of one cell: the end-point errors of each configuration."""
    others = dict.fromkeys(script.MEASURES, 0.0) | {"hd95": 1.0, "mean_dice": 0.5, "seconds": 0.1}
    return [
        {"set": "all 2", "moving": str(n), "fixed": str(n), "cluster": n, "configuration": name}
        | others
        | {"endpoint_error": x, "folding": x / 1e4, "timed_out": False, "failed": None}
        for name, values in errors.items()
        for n, x in enumerate(values)
    ]


def test_goals_compare_with_the_best_other_network_and_with_ants():
    ants, other = script.ANTS
    errors = {
        "unregistered": [9.0, 9.0],
        "GeoReg, seed 0": [1.0, 2.0],
        "GeoReg, seed 1": [2.0, 3.0],
        "GeoReg, feature warping, seed 0": [3.0, 3.0],
        "VoxelMorph, seed 0": [4.0, 6.0],
        "FCN, seed 0": [4.0, 4.5],
        ants: [1.5, 1.5],
        other: [3.0, 3.0],
    }
    summary = script.summarise(rows_of(**errors))
    table = summary["cells"]["all 2"]
    assert table["GeoReg"]["endpoint_error"] == 2.0
    assert table["GeoReg"]["seeds"] == [1.5, 2.5]
    assert summary["georeg_minus"]["all 2"]["VoxelMorph"]["endpoint_error"] == -3.0
    found = {
        goal["what"]: (goal["value"], goal["wanted"], goal["met"]) for goal in summary["goals"]
    }
    assert found == {
        "end-point error, half of FCN": (2.0, 2.125, True),
        "end-point error, half of GeoReg, feature warping": (2.0, 1.5, False),
        f"end-point error of {ants}": (2.0, 1.5, False),
        f"end-point error of {other}": (2.0, 3.0, True),
        "folding": (2e-4, 1e-3, True),
        "folding of FCN": (2e-4, 4.25e-4, True),
        "folding of GeoReg, feature warping": (2e-4, 3e-4, True),
    }
    first = [row | {"set": "all 1"} for row in rows_of(**errors)]
    weak = script.summarise(first)["goals"]
    folds = {"folding", "folding of FCN", "folding of GeoReg, feature warping"}
    assert {goal["what"] for goal in weak} == folds
    for line in script.lines(summary["cells"]):
        assert len(line) == 32 + 14 + 12


def test_georeg_ablation_differs_only_in_how_it_looks():
    own, ablated = (networks.NETWORKS[n] for n in ("GeoReg", "GeoReg, feature warping"))
    changed = {"warp_features", "interpolation"}
    assert {k: v for k, v in own.settings.items() if k not in changed} == {
        k: v for k, v in ablated.settings.items() if k not in changed
    }
    assert own[2:] == ablated[2:]
    assert isinstance(own.network(), georeg.GeoReg)
    assert isinstance(networks.NETWORKS["FCN"].network(), fcn.FCN)
