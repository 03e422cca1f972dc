"""The rigid search: what it compares, what it finds, and how sure it is (about 15 s).

Images are functions of millimetres, evaluated on each grid: a known transform is known exactly.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from reglib.data.nifti import voxel_to_world
from reglib.geometry.affine import affine_field, grid_centre, rigid_matrix, transform_points
from reglib.geometry.sampling import warp
from reglib.methods.classical import APART, Rigid
from reglib.methods.pair import Pair
from reglib.methods.search import SURE, Search, comparison, confidence
from reglib.objectives.mind import mind
from reglib.objectives.similarity import mutual_information, ncc
from reglib.registration import register

both_dimensions = pytest.mark.parametrize("dimensions", [2, 3])

#: Sizes and spacings of the fixed and the moving grid.
FIXED = {2: ((44, 40), (1.0, 1.1)), 3: ((18, 16, 20), (1.6, 1.8, 1.5))}
MOVING = {2: ((40, 46), (1.1, 1.0)), 3: ((16, 20, 17), (1.8, 1.5, 1.6))}
FAST = Search(candidates=128, kept=4, steps=25, rotation=math.radians(35))
FAR = dataclasses.replace(FAST, candidates=256, rotation=math.radians(110))


def grid(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Tensor:
    """Voxels to mm, the middle of the grid at the origin."""
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    affine[:-1, -1] = -affine[:-1, :-1] @ middle
    return affine


def look(points: Tensor, seed: int) -> Tensor:
    """A sum of plane waves of 9 to 25 mm in all directions, a function of mm, 0 .. 1."""
    d = points.shape[-1]
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(30, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = torch.from_numpy(2 * np.pi * directions / rng.uniform(9, 25, (30, 1)))
    phases = torch.from_numpy(rng.uniform(0, 2 * np.pi, 30))
    return torch.sigmoid((points @ waves.T + phases).cos().sum(-1) / 2)


def places(affine: Tensor, shape: tuple[int, ...]) -> Tensor:
    voxels = torch.cartesian_prod(*(torch.arange(float(n), dtype=torch.float64) for n in shape))
    return voxel_to_world(voxels.unsqueeze(0), affine)


def truth(dimensions: int, degrees: float, shift: float) -> Tensor:
    """A rigid map of mm about the origin, ``(1, D+1, D+1)``."""
    rotation = torch.zeros(1, 1 if dimensions == 2 else 3, dtype=torch.float64)
    rotation[0, -1] = math.radians(degrees)
    translation = torch.full((1, dimensions), shift, dtype=torch.float64)
    translation[0, 0] *= -1
    return rigid_matrix(rotation, translation, centre=torch.zeros(1, dimensions).double())


def make(dimensions: int, matrices: Tensor, *, other: bool = False) -> Pair:
    """A batch of pairs, one of each matrix (fixed to moving); the start is the identity."""
    b = len(matrices)
    affines, images = [], []
    for (shape, spacing), maps in ((MOVING[dimensions], None), (FIXED[dimensions], matrices)):
        affine = grid(shape, spacing)
        points = places(affine, shape)
        values = torch.cat(
            [look(points if maps is None else transform_points(points, maps[n : n + 1]), n)
             for n in range(b)]
        )  # fmt: skip
        images.append(values.view(b, 1, *shape).float())
        affines.append(affine)
    if other:
        images[1] = 1 - images[1] ** 1.5
    start = torch.eye(dimensions + 1, dtype=torch.float64).expand(b, -1, -1)
    field = torch.zeros(b, dimensions, *FIXED[dimensions][0])
    return Pair(images[0], images[1], *affines, None, None, start, field)


def error(pair: Pair, found: Tensor, matrices: Tensor) -> Tensor:
    """Mean distance in mm over the fixed voxels, ``(B,)``."""
    points = places(pair.fixed_affine, tuple(pair.fixed.shape[2:])).expand(len(found), -1, -1)
    both = (transform_points(points, m) for m in (found, matrices))
    return torch.sub(*both).norm(dim=2).mean(1)


# --- What it compares -------------------------------------------------------------------------


@both_dimensions
@pytest.mark.parametrize("similarity", [mind, ncc])
def test_a_comparison_is_the_similarity_of_the_warped_image(dimensions, similarity) -> None:
    """Against a plain warp; both measures take no note of how images were scaled. To 1e-4."""
    matrices = torch.cat([truth(dimensions, a, s) for a, s in ((5, 1), (-8, 2))])
    pair = make(dimensions, matrices)
    compare = comparison(similarity, pair)
    still = torch.zeros_like(pair.field)
    for matrix in (matrices, torch.eye(dimensions + 1).double().expand(2, -1, -1)):
        u = affine_field(matrix, pair.fixed_affine, pair.moving_affine, pair.fixed.shape[2:])
        weight = warp(torch.ones_like(pair.moving), u.float(), padding="zeros")
        plain = similarity(
            warp(pair.moving, u.float()), pair.fixed, weight=weight, reduction="none"
        )
        torch.testing.assert_close(compare(matrix, still), plain, atol=1e-4, rtol=0)


@both_dimensions
def test_where_images_hardly_meet_there_is_nothing_to_compare(dimensions) -> None:
    pair = make(dimensions, truth(dimensions, 0, 0))
    far = truth(dimensions, 0, 100.0)
    assert comparison(mind, pair)(far, pair.field).tolist() == [math.inf]
    assert confidence(mind, pair, far, pair.field).tolist() == [0]


# --- What it finds ----------------------------------------------------------------------------


@both_dimensions
@pytest.mark.parametrize("other", [False, True])
def test_it_finds_what_a_descent_does_not(dimensions, other) -> None:
    """80 degrees and two mm, of one contrast and of another, to half a mm.

    A descent from the identity ends far away, and the confidence tells the two apart. In a volume
    of 18 voxels a side the nearest copies are not far enough to be told from the result.
    """
    matrix = truth(dimensions, 80, 2.0)
    pair = make(dimensions, matrix, other=other)
    options = {"moving_affine": pair.moving_affine, "fixed_affine": pair.fixed_affine}
    near, far = (
        register(pair.moving, pair.fixed, method, progress=False, **options)
        for method in (Rigid(mind, initialise="none"), FAR)
    )
    assert float(error(pair, near.affine, matrix)) > 10
    assert float(error(pair, far.affine, matrix)) < 0.5
    assert not far.field.any()
    [sure] = far.history[0]["search"]["confidence"]
    [unsure] = confidence(mind, pair, near.affine, near.field).tolist()
    assert sure > (SURE if dimensions == 2 else 0.2) > unsure
    assert any(note.startswith("confidence") for note in far.settings["notes"])


def test_another_similarity_may_be_used() -> None:
    matrix = truth(2, -20, 3)
    pair = make(2, matrix, other=True)
    found = dataclasses.replace(FAST, similarity=mutual_information).best(pair)
    assert float(error(pair, found.affine[0], matrix)) < 0.5


@both_dimensions
def test_ends_come_best_first_and_starts_differ(dimensions) -> None:
    """Without descents they are candidates; the first candidate is the pair's own start."""
    pair = make(dimensions, truth(dimensions, 10, 2))
    raw = dataclasses.replace(FAST, steps=0)
    found = raw.best(pair)
    assert found.affine.shape == (4, 1, dimensions + 1, dimensions + 1)
    assert bool((found.loss.diff(dim=0) >= 0).all())
    compare = comparison(mind, pair)
    for affine, loss in zip(found.affine, found.loss, strict=True):
        torch.testing.assert_close(compare(affine, pair.field), loss, atol=1e-5, rtol=0)
    shape = pair.fixed.shape[2:]
    corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1.0]).double() for n in shape))
    corners = voxel_to_world(corners.unsqueeze(0), pair.fixed_affine)
    sides = [n * s for n, s in zip(*FIXED[dimensions], strict=True)]
    for i in range(4):
        for j in range(i):
            apart = transform_points(corners, found.affine[i])
            apart = apart - transform_points(corners, found.affine[j])
            assert float(apart.norm(dim=2).mean()) > APART * sum(sides) / dimensions
    only = dataclasses.replace(raw, candidates=1, kept=1).best(pair)
    assert torch.equal(only.affine[0], pair.affine)
    descended = FAST.best(pair)
    assert float(descended.loss[0, 0]) < float(found.loss[0, 0])


def test_what_is_kept_is_filled_up_where_the_space_is_small() -> None:
    """Starts that can hardly move are all one, and yet so many as were asked for."""
    pair = make(2, truth(2, 1, 0))
    small = dataclasses.replace(FAST, rotation=0.01, translation=0.001, candidates=8, steps=0)
    assert small.best(pair).affine.shape[0] == 4


# --- Its contract -----------------------------------------------------------------------------


@both_dimensions
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_pair_of_a_batch_gives_what_it_gives_alone(dimensions, batch) -> None:
    """Exactly: pairs are looked at one after another."""
    matrices = torch.cat([truth(dimensions, 4 * n - 6, 1.0) for n in range(batch)])
    pair = make(dimensions, matrices)
    quick = dataclasses.replace(FAST, candidates=8, kept=2, steps=2)
    together = quick.best(pair)
    clear = confidence(mind, pair, together.affine[0], pair.field)
    for b in range(batch):
        one = dataclasses.replace(
            pair,
            moving=pair.moving[b : b + 1],
            fixed=pair.fixed[b : b + 1],
            affine=pair.affine[b : b + 1],
            field=pair.field[b : b + 1],
        )
        alone = quick.best(one)
        assert torch.equal(together.affine[:, b : b + 1], alone.affine)
        assert torch.equal(together.loss[:, b : b + 1], alone.loss)
        own = confidence(mind, one, alone.affine[0], one.field)
        torch.testing.assert_close(clear[b : b + 1], own)


def test_the_field_stays_underneath_and_masks_count() -> None:
    """A displacement found before is kept; what a mask leaves out changes nothing."""
    pair = make(2, truth(2, 6, 1.5))
    field = torch.zeros_like(pair.field)
    field[:, 0] = torch.linspace(-1, 1, field.shape[3])
    before = dataclasses.replace(pair, field=field)
    quick = dataclasses.replace(FAST, candidates=16, kept=2, steps=5)
    [iterate] = quick(before)
    affine, kept = iterate.transform()
    assert kept is field
    assert not torch.equal(affine, quick.best(pair).affine[0])
    mask = torch.ones_like(pair.fixed)
    mask[..., :8] = 0
    spoilt = pair.fixed.clone()
    spoilt[..., :8] = 40.0
    found = [
        quick.best(dataclasses.replace(pair, fixed=fixed, fixed_mask=mask)).affine
        for fixed in (pair.fixed, spoilt)
    ]
    assert torch.equal(*found)


def test_the_seed_decides_and_torchs_randomness_is_left_alone() -> None:
    pair = make(2, truth(2, 6, 1.5))
    raw = dataclasses.replace(FAST, candidates=16, steps=0)
    state = torch.get_rng_state()
    first, second = (raw.best(pair).affine for _ in range(2))
    confidence(mind, pair, pair.affine, pair.field)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, dataclasses.replace(raw, seed=1).best(pair).affine)


def test_images_without_contrast_give_no_confidence() -> None:
    flat = torch.full((1, 1, 12, 12), 3.0)
    found = register(flat, flat, dataclasses.replace(FAST, steps=2), progress=False)
    assert bool(found.affine.isfinite().all())
    assert abs(found.history[0]["search"]["confidence"][0]) < 1e-3


def test_changes_turn_about_the_middle_of_the_fixed_image() -> None:
    """Without translations the middle stays where it is."""
    pair = make(2, truth(2, 6, 1.5))
    found = dataclasses.replace(FAST, translation=0.0, steps=0).best(pair).affine
    middle = grid_centre(pair.fixed_affine, pair.fixed.shape[2:]).unsqueeze(0)
    for affine in found:
        torch.testing.assert_close(transform_points(middle, affine), middle)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"similarity": "mi"}, TypeError, "similarity"),
        ({"rotation": 4.0}, ValueError, "rotation: wanted a number from 0 to 3.142"),
        ({"translation": -0.1}, ValueError, "translation"),
        ({"translation": "far"}, TypeError, "translation"),
        ({"candidates": 0}, ValueError, "candidates"),
        ({"kept": 1.5}, TypeError, "kept"),
        ({"candidates": 3}, ValueError, "candidates: wanted at least 8"),
        ({"steps": -1}, ValueError, "steps"),
    ],
)
def test_bad_settings_are_named(change, kind, text) -> None:
    with pytest.raises(kind, match=text):
        Search(**change)
