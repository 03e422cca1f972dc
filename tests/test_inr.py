"""INR: its networks against plain forms, and what it finds where the truth is known (about 45 s).

The images are functions of millimetres, evaluated on each grid: a known transform is known exactly.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.data.nifti import voxel_to_world
from reglib.geometry.affine import grid_centre, rigid_matrix, transform_points, whole_field
from reglib.geometry.procrustes import fit_rigid
from reglib.geometry.sampling import transform_grid
from reglib.methods import hash_grid
from reglib.methods.inr import INR, PRESETS, CoordinateNetwork, CoordinateSettings, Layers
from reglib.methods.pair import Iterate
from reglib.methods.search import SURE, Search
from reglib.registration import Registration, register

both_dimensions = pytest.mark.parametrize("dimensions", [2, 3])
both_modalities = pytest.mark.parametrize("modality", ["single", "multi"])

#: Sizes and spacings of the fixed and the moving grid.
FIXED = {2: ((36, 32), (1.0, 1.2)), 3: ((16, 18, 14), (1.0, 1.0, 1.3))}
MOVING = {2: ((40, 36), (1.1, 1.0)), 3: ((18, 16, 19), (1.0, 1.2, 1.0))}

#: Small and fast networks for a rigid motion.
IMAGE = CoordinateSettings(
    coarsest=0.15, finest=0.5, levels=3, width=32, coarse_to_fine=0.5, lr=2e-2
)
MOTION = CoordinateSettings(
    coarsest=0, finest=0, levels=4, width=16, scale=1.0, coarse_to_fine=0, lr=2e-3
)
TINY = INR(image=IMAGE, motion=MOTION, steps=120, coordinates=512)


def grid(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Tensor:
    """Voxels to mm, the middle of the grid at the origin."""
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    affine[:-1, -1] = -affine[:-1, :-1] @ middle
    return affine


def world(dimensions: int, batch: int = 0) -> object:
    """A sum of plane waves of 6 (3-D: 9) to 25 mm in all directions, a function of mm, 0 .. 1."""
    rng = np.random.default_rng(batch)
    directions = rng.normal(size=(40, dimensions))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = torch.from_numpy(2 * np.pi * directions / rng.uniform(3 * dimensions, 25, (40, 1)))
    phases = torch.from_numpy(rng.uniform(0, 2 * np.pi, 40))

    def look(points: Tensor) -> Tensor:
        return torch.sigmoid((points @ waves.T + phases).cos().sum(-1) / 3)

    return look


def places(affine: Tensor, shape: tuple[int, ...]) -> Tensor:
    voxels = torch.cartesian_prod(*(torch.arange(float(n), dtype=torch.float64) for n in shape))
    return voxel_to_world(voxels.unsqueeze(0), affine)


def contrast(image: Tensor, modality: str) -> Tensor:
    """Of a second modality, bright is dark, and not in proportion."""
    return image if modality == "single" else 1 - image**1.5


class Known:
    """A pair and the map of mm, fixed to moving, that was put into it."""

    def __init__(
        self, dimensions: int, phi: object, *, modality: str = "single", batch: int = 0
    ) -> None:
        self.affines, self.shapes, images = [], [], []
        for (shape, spacing), through, kind in (
            (MOVING[dimensions], None, "single"),
            (FIXED[dimensions], phi, modality),
        ):
            affine = grid(shape, spacing)
            points = places(affine, shape)
            values = world(dimensions, batch)(points if through is None else through(points))
            images.append(contrast(values, kind).reshape(1, 1, *shape).float())
            self.affines.append(affine)
            self.shapes.append(shape)
        self.moving, self.fixed = images
        self.phi = phi

    def register(self, method: INR, **options: object) -> Registration:
        return register(
            self.moving,
            self.fixed,
            method,
            moving_affine=self.affines[0],
            fixed_affine=self.affines[1],
            progress=False,
            **options,
        )

    def error(self, found: Registration | None = None) -> float:
        """Mean distance in mm from the truth over all fixed voxels that lie in the moving image."""
        points = places(self.affines[1], self.shapes[1])
        wanted = self.phi(points)
        if found is None:
            reached = points
        else:
            still = torch.linalg.inv(self.affines[1])
            voxels = transform_points(points, still.unsqueeze(0)).to(found.field)
            reached = found.apply_points(voxels).double()
            reached = voxel_to_world(reached, self.affines[0])
        last = torch.tensor(self.shapes[0]) - 1
        there = transform_points(wanted, torch.linalg.inv(self.affines[0]).unsqueeze(0))
        inside = ((there >= 0) & (there <= last)).all(2)
        return float((reached - wanted).norm(dim=2)[inside].mean())


def turned(dimensions: int, degrees: float, shift: float) -> object:
    """A rigid map of mm about the origin."""
    rotation = torch.zeros(1, 1 if dimensions == 2 else 3, dtype=torch.float64)
    rotation[0, -1] = math.radians(degrees)
    translation = torch.full((1, dimensions), shift, dtype=torch.float64)
    translation[0, 0] *= -1
    matrix = rigid_matrix(rotation, translation, centre=torch.zeros(1, dimensions).double())
    return lambda points: transform_points(points, matrix)


def bent(points: Tensor) -> Tensor:
    """A smooth displacement of up to 2 mm along both axes."""
    push = torch.exp(-points.square().sum(-1, keepdim=True) / (2 * 9.0**2))
    return points + push * torch.tensor([2.0, -1.5], dtype=torch.float64)


# --- The networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_layers_are_linear_maps_with_activations_between(copies: int) -> None:
    """Against torch's own linear function, each copy with its own weights, to rounding."""
    generator = torch.Generator().manual_seed(0)
    layers = Layers((3, 8, 5, 2), activation=F.elu, copies=copies, generator=generator)
    with torch.no_grad():
        for p in layers.parameters():
            p += torch.rand(p.shape, generator=generator)
    x = torch.rand(copies, 7, 3, generator=generator)
    found = layers(x)
    for b in range(copies):
        y = x[b]
        for number, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
            y = F.linear(F.elu(y) if number else y, weight[b].T, bias[b, 0])
        torch.testing.assert_close(found[b], y)


@both_dimensions
def test_a_coordinate_network_is_a_grid_and_layers(dimensions: int) -> None:
    """Of voxels scaled to 0 .. 1 with the margin; at progress 0 it is the same everywhere."""
    shape, _ = FIXED[dimensions]
    settings = CoordinateSettings(levels=3, margin=0.5, coarsest=0.1, width=8)
    network = CoordinateNetwork(
        settings, shape, 2, activation=F.gelu, generator=torch.Generator().manual_seed(0)
    )
    assert network.grid.resolutions[0] == tuple(max(1, round(0.2 * n)) for n in shape)
    with torch.no_grad():
        for p in network.grid.parameters():
            p.mul_(1e4)
    points = torch.rand(1, 9, dimensions) * torch.tensor(shape)
    unit = (points / (torch.tensor(shape) - 1) + 0.5) / 2
    torch.testing.assert_close(network(points), network.layers(network.grid(unit)))
    start, end = network(points, 0.0).detach(), network(points).detach()
    assert float((start - start[:, :1]).abs().max()) == 0
    assert float((end - end[:, :1]).abs().max()) > 0
    ends = torch.tensor(
        [[[-1.0] * dimensions, [0.0] * dimensions, [2.0 * max(shape)] * dimensions]]
    )
    assert network.covers(ends).tolist() == [[True, True, False]]


def test_granularity_is_cells_per_voxel() -> None:
    """From one cell over the whole image to one for each voxel."""
    settings = CoordinateSettings(coarsest=0, finest=1)
    assert settings.cells(0, (300, 200)) == (1, 1)
    assert settings.cells(0.05, (300, 200)) == (15, 10)
    assert settings.cells(1, (30, 20, 10)) == (30, 20, 10)


# --- What it finds ----------------------------------------------------------------------------


@both_dimensions
@both_modalities
def test_a_rigid_motion_is_recovered(dimensions: int, modality: str) -> None:
    """To a third of a mm, from 1.2 mm and more; and the result says that it is sure.

    With the motion held still (a learning rate of nothing) the error stays, and the confidence is
    lower.
    """
    shift = 1.2 if dimensions == 2 else 0.8
    pair = Known(dimensions, turned(dimensions, 4, shift), modality=modality)
    method = replace(TINY, modality=modality, steps=240 if modality == "multi" else 120)
    found = pair.register(method)
    assert pair.error() > 1.2
    assert pair.error(found) < 0.33
    linear = found.affine[:, :-1, :-1]
    torch.testing.assert_close(linear @ linear.mT, torch.eye(dimensions).double().unsqueeze(0))
    assert not found.field.any()
    still = pair.register(replace(method, motion=replace(MOTION, lr=1e-12), steps=5))
    assert pair.error(still) > 0.95 * pair.error()
    sure, unsure = (r.history[0]["choice"]["confidence"][0] for r in (found, still))
    assert sure > (SURE if dimensions == 2 else 0.2)
    assert sure > unsure


@both_modalities
def test_a_deformation_is_recovered(modality: str) -> None:
    """To a third of what it was, without a regulariser; one cell of motion cannot follow."""
    pair = Known(2, bent, modality=modality)
    fine = replace(MOTION, coarsest=0.05, finest=0.15, scale=1e-4)
    method = replace(TINY, modality=modality, rigid=False, motion=fine, steps=150)
    found = pair.register(method)
    assert pair.error(found) < 0.33 * pair.error()
    assert bool(found.field.any())
    stiff = pair.register(replace(method, motion=MOTION, rigid=True))
    assert pair.error(stiff) > 1.5 * pair.error(found)


@pytest.mark.parametrize(
    ("modality", "degrees", "shift", "before", "on", "off"),
    [("single", 12, 4.0, 5.6, 1.5, 3.0), ("multi", 8, 1.0, 2.2, 1.1, 2.1)],
)
def test_far_motions_need_coarse_to_fine(
    modality: str, degrees: float, shift: float, before: float, on: float, off: float
) -> None:
    """With all levels from the start, a fine image network stores both images where they are.

    Mean errors in mm before, with coarse to fine at most, and without it at least. Of one modality
    the motion is 16 % of the image; of two, with all levels nothing moves at all.
    """
    pair = Known(2, turned(2, degrees, shift), modality=modality)
    far = modality == "single"
    image = replace(
        IMAGE, coarsest=0.1 if far else 0.06, finest=0.9, levels=5 if far else 6, coarse_to_fine=0.8
    )
    motion = replace(MOTION, lr=2e-3 if far else 1e-3)
    method = replace(TINY, modality=modality, image=image, motion=motion, steps=200 if far else 300)
    assert pair.error() > before
    assert pair.error(pair.register(method)) < on
    at_once = replace(method, image=replace(image, coarse_to_fine=0))
    assert pair.error(pair.register(at_once)) > off


def test_all_voxels_at_every_step() -> None:
    """As in the paper: no coordinates are drawn."""
    pair = Known(2, turned(2, 3, 1.0))
    found = pair.register(replace(TINY, coordinates=None))
    assert pair.error(found) < 0.25


def test_compiled_it_finds_the_same(monkeypatch) -> None:
    """Hashed levels as one graph: the same field to 1e-3 voxels after twenty steps."""
    monkeypatch.setattr(hash_grid, "BACKEND", "aot_eager")
    known = Known(2, turned(2, 4, 2.0))
    image = CoordinateSettings(finest=1.0, table=64)
    plain, compiled = (
        known.register(INR(rigid=False, image=image, steps=20, compiled=c)).field
        for c in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-3)


def test_several_starts_find_what_one_does_not() -> None:
    """30 degrees are beyond one start. Of two that a search gives undescended, one leads there.

    The choice takes it, and the confidence tells the two results apart.
    """
    pair = Known(2, turned(2, 30, 0.0))
    one = pair.register(TINY)
    search = Search(steps=0, candidates=60, kept=2, rotation=math.radians(40), translation=0.02)
    found = pair.register(replace(TINY, search=search, starts=2, steps=80))
    assert pair.error(one) > 2
    assert pair.error(found) < 0.5
    choices = [r.history[0]["choice"] for r in (one, found)]
    assert choices[1]["confidence"][0] > SURE > choices[0]["confidence"][0]
    assert choices[1]["similarity"][0] < choices[0]["similarity"][0]


def test_after_a_search_the_better_of_start_and_result_is_kept() -> None:
    """A motion that runs away is not taken: the result is the search's own."""
    pair = Known(2, turned(2, 20, 1.0))
    search = Search(candidates=60, kept=2, steps=20)
    wild = replace(TINY, search=search, steps=10, wait=0.0, motion=replace(MOTION, lr=1.0))
    found, alone = pair.register(wild), pair.register(search)
    torch.testing.assert_close(found.affine, alone.affine)
    assert pair.error(found) < 1
    free = pair.register([search, replace(wild, search=None)])
    assert pair.error(free) > 2


@both_dimensions
def test_an_image_onto_itself_stays_where_it_is(dimensions: int) -> None:
    """To a fifth of a voxel: the points drawn in the last steps leave that much."""
    pair = Known(dimensions, lambda points: points)
    found = register(pair.fixed, pair.fixed, TINY, progress=False)
    whole = whole_field(found.affine, found.field, found.fixed_affine, found.moving_affine)
    assert float(whole.norm(dim=1).mean()) < 0.2


# --- Its contract -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
@both_dimensions
@both_modalities
def test_a_pair_of_a_batch_gives_what_it_gives_alone(
    batch: int, dimensions: int, modality: str
) -> None:
    """To 1e-3 voxels after five steps: what is left is the order of sums."""
    pairs = [Known(dimensions, turned(dimensions, b, 0.5), batch=b) for b in range(batch)]
    moving, fixed = (torch.cat([getattr(p, n) for p in pairs]) for n in ("moving", "fixed"))
    search = Search(candidates=4, kept=2, steps=0)
    method = replace(TINY, steps=5, starts=2, search=search, modality=modality, rigid=False)
    together = register(moving, fixed, method, progress=False)
    assert together.field.shape == (batch, dimensions, *FIXED[dimensions][0])
    for b in range(batch):
        alone = register(moving[b : b + 1], fixed[b : b + 1], method, progress=False)
        torch.testing.assert_close(together.affine[b : b + 1], alone.affine)
        torch.testing.assert_close(together.field[b : b + 1], alone.field, atol=1e-3, rtol=0)


@both_dimensions
def test_the_rigid_result_is_the_fit_of_the_motion(dimensions: int) -> None:
    """By the library's Procrustes, in mm on a grid of unequal spacing; the residual is noted."""
    pair = Known(dimensions, turned(dimensions, 3, 1.0))
    method = replace(TINY, steps=10)
    rigid, free = (pair.register(replace(method, rigid=r)) for r in (True, False))
    points = places(pair.affines[1], pair.shapes[1])
    voxels = transform_grid(free.field).flatten(2).mT.double()
    moved = voxel_to_world(voxels, pair.affines[1])
    there = transform_points(moved, torch.linalg.inv(pair.affines[0]).unsqueeze(0))
    inside = ((there >= 0) & (there <= torch.tensor(pair.shapes[0]) - 1)).all(2)[0]
    fit = fit_rigid(points[:, inside], moved[:, inside])
    torch.testing.assert_close(rigid.affine, fit.matrix, atol=1e-5, rtol=0)
    [note] = [n for n in rigid.settings["notes"] if n.startswith("rigid")]
    noted = float(note.split("which was ")[1].split(" mm")[0])
    assert noted == pytest.approx(float(fit.residual.square().mean().sqrt()), rel=0.02, abs=1e-4)


def test_the_motion_is_bounded() -> None:
    """A motion network that runs away stops at the bound, along each axis."""
    pair = Known(2, turned(2, 4, 1.2))
    wild = replace(TINY, rigid=False, bound=0.05, steps=15, motion=replace(MOTION, lr=1.0))
    found = pair.register(wild).field.abs().amax((0, 2, 3))
    limit = 0.05 * torch.tensor(FIXED[2][0])
    assert bool((found <= limit).all())
    free = pair.register(replace(wild, bound=None)).field.abs().amax((0, 2, 3))
    assert bool((free > limit).all())


@pytest.mark.parametrize("rigid", [True, False])
def test_it_goes_on_from_what_was_found_before(rigid: bool) -> None:
    """A motion network that stands still returns the transform it was given, to 1e-4 voxels."""
    pair = Known(2, bent)
    field = torch.zeros(1, 2, *FIXED[2][0])
    field[:, 0] = torch.linspace(-1, 1, FIXED[2][0][1])
    start = rigid_matrix(
        torch.tensor([[0.05]]).double(),
        torch.tensor([[1.0, -0.5]]).double(),
        centre=grid_centre(pair.affines[1], pair.shapes[1]),
    )

    def before(p: object) -> object:
        active = torch.ones(1, dtype=torch.bool)
        yield Iterate("before", {}, active, lambda: (start, field))

    still = replace(TINY, rigid=rigid, steps=2, motion=replace(MOTION, lr=1e-12))
    found = pair.register([before, still])
    wanted = whole_field(start, field, pair.affines[1], pair.affines[0])
    torch.testing.assert_close(found.whole_field(), wanted, atol=1e-4, rtol=0)


def test_what_the_masks_leave_out_has_no_influence() -> None:
    """Other intensities there change nothing."""
    pair = Known(2, turned(2, 3, 1.0))
    masks, spoilt = [], []
    for image in (pair.moving, pair.fixed):
        mask = torch.ones_like(image)
        mask[..., :6] = 0
        other = image.clone()
        other[..., :6] = 50 * image[..., :6].flip(2) - 20
        masks.append(mask)
        spoilt.append(other)
    method = replace(TINY, steps=5, rigid=False)
    options = {"moving_mask": masks[0], "fixed_mask": masks[1], "progress": False}
    first = register(pair.moving, pair.fixed, method, **options)
    second = register(*spoilt, method, **options)
    torch.testing.assert_close(first.field, second.field)


def test_the_seed_decides() -> None:
    """Identical bits for one seed, others for another; torch's own randomness is left alone."""
    pair = Known(2, turned(2, 3, 1.0))
    method = replace(TINY, steps=3, rigid=False)
    state = torch.get_rng_state()
    first, second = (pair.register(method) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.field, second.field)
    assert not torch.equal(first.field, pair.register(replace(method, seed=1)).field)


def test_channels_and_precision_follow_the_images() -> None:
    """Two channels of double precision, both modalities of outputs."""
    pair = Known(2, turned(2, 3, 1.0))
    moving, fixed = (torch.cat([x, 1 - x], 1).double() for x in (pair.moving, pair.fixed))
    for modality in ("single", "multi"):
        found = register(moving, fixed, replace(TINY, steps=2, modality=modality), progress=False)
        assert found.field.dtype == torch.float64
        assert found.warped.shape == fixed.shape


def test_images_without_contrast_leave_everything_in_place() -> None:
    flat = torch.full((1, 1, 12, 12), 3.0)
    found = register(flat, flat, replace(TINY, steps=3), progress=False)
    assert bool(found.affine.isfinite().all())
    assert abs(found.history[0]["choice"]["confidence"][0]) < 1e-3


def test_it_stops_when_told_to_and_reports() -> None:
    """The state so far is returned, the history has each step, and the report is JSON."""
    pair = Known(2, turned(2, 3, 1.0))
    seen: list[Iterate] = []
    found = pair.register(TINY, callback=lambda i: seen.append(i) or len(seen) == 3)
    assert found.history[0].keys() == {"training"}
    assert [len(found.history[0]["training"][t]) for t in ("moving", "fixed")] == [3, 3]
    whole = pair.register(replace(TINY, steps=2))
    assert whole.history[0].keys() == {"training", "choice"}
    assert whole.history[0]["choice"].keys() == {"similarity", "confidence"}
    assert any(n.startswith("confidence") for n in whole.settings["notes"])
    settings = json.loads(json.dumps(whole.settings))["method"][0]["settings"]
    assert settings["image"]["settings"]["width"] == 32


def test_presets_are_methods() -> None:
    """The paper's has none of what makes the other robust."""
    paper, robust = PRESETS["paper"], PRESETS["robust"]
    assert (paper.search, paper.bound, paper.wait) == (None, None, 0)
    assert paper.motion.coarse_to_fine == paper.image.coarse_to_fine > 0
    assert robust.search is not None
    assert robust.bound is not None
    pair = Known(2, turned(2, 3, 1.0))
    quick = Search(candidates=4, kept=2, steps=1)
    for method in (replace(paper, steps=1), replace(robust, steps=1, search=quick)):
        assert pair.register(method).affine.shape == (1, 3, 3)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    pair = Known(2, turned(2, 3, 1.0))
    with pytest.raises(FloatingPointError, match="loss"):
        pair.register(replace(TINY, image=replace(IMAGE, lr=1e30)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"modality": "both"}, ValueError, "modality"),
        ({"wait": -0.1}, ValueError, "wait"),
        ({"image": {}}, TypeError, "image: wanted CoordinateSettings"),
        ({"motion": None}, TypeError, "motion: wanted CoordinateSettings"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"coordinates": 0}, ValueError, "coordinates"),
        ({"bound": 0}, ValueError, "bound: wanted a positive number or None"),
        ({"bound": "far"}, TypeError, "bound"),
        ({"starts": 0}, ValueError, "starts"),
        ({"starts": 2}, ValueError, "starts: wanted at most 1"),
        ({"starts": 9, "search": Search()}, ValueError, "starts: wanted at most 8"),
        ({"search": 3}, TypeError, "search: wanted a Search or None"),
        ({"similarity": "mi"}, TypeError, "similarity"),
        ({"compiled": "yes"}, TypeError, "compiled: wanted True or False, got 'yes'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        INR(**change)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"coarsest": -0.1}, ValueError, "coarsest"),
        ({"coarsest": 0.5, "finest": 0.4}, ValueError, "finest: wanted a number from 0.5 to 1"),
        ({"finest": 2}, ValueError, "finest"),
        ({"levels": 0}, ValueError, "levels"),
        ({"width": 2.0}, TypeError, "width"),
        ({"depth": 0}, ValueError, "depth"),
        ({"margin": math.inf}, ValueError, "margin"),
        ({"coarse_to_fine": 1.1}, ValueError, "coarse_to_fine: wanted a number from 0 to 1"),
        ({"lr": 0}, ValueError, "lr: wanted a positive number"),
        ({"lr": "fast"}, TypeError, "lr"),
    ],
)
def test_bad_networks_are_named(change: dict[str, object], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        CoordinateSettings(**change)
