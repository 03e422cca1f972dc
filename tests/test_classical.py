"""Rigid, affine and deformable registration by optimisation.

The images are functions of millimetres, evaluated on each grid: a known transform is known exactly,
and nothing of the library has a part in making a pair. Grids differ in size, spacing, orientation
and handedness.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from reglib.geometry.derivatives import jacobian_det
from reglib.geometry.fields import compose, integrate
from reglib.geometry.sampling import transform_grid
from reglib.methods.classical import Affine, BSpline, Displacement, Rigid, Velocity, preferred
from reglib.methods.pair import Iterate, Pair
from reglib.methods.search import comparison
from reglib.objectives.mind import mind
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc, mse, mutual_information, ncc
from reglib.registration import register

DIMENSIONS = [2, 3]
FIXED_SHAPE, MOVING_SHAPE = (26, 22, 20), (20, 28, 24)
FIXED_SPACING, MOVING_SPACING = (2.0, 2.5, 3.0), (3.0, 2.0, 2.2)
DEFORMED_SHAPE = {2: (40, 34), 3: (32, 28, 18)}
SIMILARITIES = {"mse": mse, "ncc": ncc, "lncc": lncc, "mi": mutual_information, "mind": mind}

#: Without trials of starts, which look at levels of their own.
UNTRIED = [functools.partial(method, initialise="none") for method in (Rigid, Affine)]

#: Deformable fields are recovered with these weights of the regularity (diffusion).
WEIGHTS = {"mse": 0.1, "ncc": 0.05, "lncc": 0.3, "mind": 0.1}


# --- Worlds with known truth ----------------------------------------------------------------


def rotation(d, angles):
    """Rotations in every plane of two axes, one after the other."""
    out = torch.eye(d, dtype=torch.float64)
    planes = [(0, 1), (1, 2), (0, 2)][: d * (d - 1) // 2]
    for (a, b), angle in zip(planes, angles, strict=False):
        turn = torch.eye(d, dtype=torch.float64)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[b, a], turn[a, b] = math.sin(angle), -math.sin(angle)
        out = turn @ out
    return out


def homogeneous(linear, offset):
    d = len(offset)
    out = torch.eye(d + 1, dtype=torch.float64)
    out[:d, :d], out[:d, d] = linear, torch.as_tensor(offset, dtype=torch.float64)
    return out


def grid(spacing, shape, *, turn=0.0, mirror=False, order=None):
    """A grid around the origin of the world: voxels to mm."""
    d = len(shape)
    axes = rotation(d, [turn, -turn, turn / 2])
    if order is not None:
        axes = axes[:, list(order)]
    linear = axes * torch.tensor(spacing, dtype=torch.float64)
    if (torch.linalg.det(linear) < 0) != mirror:
        linear[:, 0] *= -1
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    return homogeneous(linear, -linear @ middle)


def places(affine, shape):
    """Where every voxel is, ``(N, D)`` in mm."""
    d = len(shape)
    voxels = torch.from_numpy(np.indices(shape).reshape(d, -1).T.astype(float))
    return voxels @ affine[:d, :d].T + affine[:d, d]


def apply(matrix, points):
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def draw(world, points, shape):
    return world(points).reshape(1, 1, *shape).float()


def blobs(d, seed=0):
    """Thirty bright blobs within an ellipsoid of different axes, dark around: a small brain."""
    rng = np.random.default_rng(seed)
    axes = np.array([22.0, 16.0, 12.0][:d])
    centres = torch.from_numpy(rng.uniform(-1, 1, (30, d)) * axes)
    widths = torch.from_numpy(rng.uniform(3.5, 7, 30))
    heights = torch.from_numpy(rng.uniform(0.3, 1.3, 30))

    def world(points):
        far = (points.unsqueeze(-2) - centres).square().sum(-1)
        return (heights * (-far / (2 * widths**2)).exp()).sum(-1)

    return world


def waves(d, seed=0):
    """24 plane waves of 9 to 22 mm: texture everywhere."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((24, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    k = torch.from_numpy(directions * 2 * np.pi / rng.uniform(9, 22, (24, 1)))
    phase = torch.from_numpy(rng.uniform(0, 2 * np.pi, 24))
    return lambda points: torch.cos(points @ k.T + phase).sum(-1) / 24**0.5


def true_matrix(d, kind, *, angles=(0.2, -0.15, 0.1), offset=(4.0, -3.0, 5.0)):
    """A rotation and a translation; "affine" adds magnifications and shears."""
    linear = rotation(d, angles)
    if kind == "affine":
        upper = torch.diag(torch.tensor([1.1, 0.92, 1.05][:d], dtype=torch.float64))
        upper[0, 1] = 0.08
        if d == 3:
            upper[0, 2], upper[1, 2] = -0.05, 0.06
        linear = linear @ upper
    return homogeneous(linear, offset[:d])


def linear_pair(d, matrix, world, *, centre=0.0):
    """Moving and fixed image, their grids, on grids that have nothing in common."""
    shape, moving_shape = FIXED_SHAPE[:d], MOVING_SHAPE[:d]
    fixed_affine = grid(FIXED_SPACING[:d], shape, turn=0.3)
    moving_affine = grid(
        MOVING_SPACING[:d], moving_shape, turn=-0.2, mirror=True, order=(1, 0, 2)[:d]
    )
    moving_affine[:d, d] += centre
    fixed = draw(world, apply(matrix, places(fixed_affine, shape)), shape)
    moving = draw(world, places(moving_affine, moving_shape), moving_shape)
    return moving, fixed, {"moving_affine": moving_affine, "fixed_affine": fixed_affine}


def corner_error(found, truth, affine, shape):
    """How far two transforms disagree at the worst corner of the fixed grid, in mm."""
    d = len(shape)
    corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1.0]).double() for n in shape))
    corners = corners @ affine[:d, :d].T + affine[:d, d]
    return float((apply(found, corners) - apply(truth, corners)).norm(dim=1).max())


def error_of(registration, truth):
    return corner_error(
        registration.affine[0], truth, registration.fixed_affine, registration.field.shape[2:]
    )


def run(moving, fixed, method, **options):
    return register(moving, fixed, method, progress=False, **options)


@functools.cache
def recovered(d, kind, similarity):
    """What Rigid or Affine finds of a transform of its own kind."""
    moving, fixed, grids = linear_pair(d, true_matrix(d, kind), blobs(d))
    method = {"rigid": Rigid, "affine": Affine}[kind]
    return run(moving, fixed, method(similarity=SIMILARITIES[similarity]), **grids)


# --- Rigid and affine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "kind", "similarity"),
    [(2, k, s) for k in ("rigid", "affine") for s in SIMILARITIES]
    + [(3, "rigid", s) for s in ("mse", "ncc", "lncc")]
    + [(3, "affine", s) for s in SIMILARITIES],
)
def test_known_transforms_are_recovered_in_mm(d, kind, similarity):
    """An eighth of the finest voxel (2 mm) for six parameters, a quarter for twelve.

    The corners are twice as far from the middle as the blobs, so errors of scale and shear count
    double there. Mutual information counts 10,000 voxels in 1024 bins: half a voxel.
    """
    truth = true_matrix(d, kind)
    tolerance = {"rigid": 0.25, "affine": 0.5}[kind] * (2 if similarity == "mi" else 1)
    found = recovered(d, kind, similarity)
    assert corner_error(torch.eye(d + 1).double(), truth, found.fixed_affine, FIXED_SHAPE[:d]) > 8
    assert error_of(found, truth) < tolerance
    assert not found.field.any()


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_wrong_model_and_the_wrong_image_do_not_pass(d, similarity):
    """The same tolerances tell: Rigid finds no shear, and nothing is found between strangers."""
    truth = true_matrix(d, "affine")
    method = Rigid(similarity=SIMILARITIES[similarity])
    moving, fixed, grids = linear_pair(d, truth, blobs(d))
    assert error_of(run(moving, fixed, method, **grids), truth) > 3
    stranger, _, _ = linear_pair(d, truth, blobs(d, seed=9))
    assert error_of(run(stranger, fixed, method, **grids), truth) > 3


@pytest.mark.parametrize("d", DIMENSIONS)
def test_rigid_is_rigid_in_mm(d):
    """To the rounding of float64, though spacings are unequal and the moving grid is mirrored."""
    for similarity in ("mse", "ncc", "lncc"):
        linear = recovered(d, "rigid", similarity).affine[0, :d, :d]
        torch.testing.assert_close(
            linear.T @ linear, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12
        )
        assert torch.linalg.det(linear) > 0
    sheared = recovered(d, "affine", "ncc").affine[0, :d, :d]
    assert (sheared.T @ sheared - torch.eye(d)).abs().max() > 0.1


def itk_image(image, affine):
    """The world is ours: ITK's points are mm as they are, in the order of our axes."""
    d = image.ndim - 2
    out = sitk.GetImageFromArray(image[0, 0].permute(*reversed(range(d))).contiguous().numpy())
    spacing = affine[:d, :d].norm(dim=0)
    out.SetSpacing(spacing.tolist())
    out.SetDirection((affine[:d, :d] / spacing).flatten().tolist())
    out.SetOrigin(affine[:d, d].tolist())
    return out


def itk_registration(moving, fixed, grids, kind):
    """SimpleITK's regular-step descent over the same levels, by correlation."""
    d = fixed.ndim - 2
    fixed_image = itk_image(fixed, grids["fixed_affine"])
    moving_image = itk_image(moving, grids["moving_affine"])
    rigid = sitk.Euler2DTransform() if d == 2 else sitk.Euler3DTransform()
    start = sitk.CenteredTransformInitializer(
        fixed_image,
        moving_image,
        rigid if kind == "rigid" else sitk.AffineTransform(d),
        sitk.CenteredTransformInitializerFilter.MOMENTS,
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-5, 400, gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1.0, 0.0])
    method.SetInitialTransform(start, inPlace=False)
    found = method.Execute(fixed_image, moving_image)
    origin = np.array(found.TransformPoint([0.0] * d))
    columns = [np.array(found.TransformPoint(row)) - origin for row in np.eye(d).tolist()]
    return homogeneous(torch.from_numpy(np.stack(columns, 1)), origin.tolist())


@pytest.mark.parametrize("kind", ["rigid", "affine"])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_simpleitk_finds_the_same(d, kind):
    """Half a voxel at the corners: two optimisers, two ways to smooth, one transform."""
    truth = true_matrix(d, kind)
    moving, fixed, grids = linear_pair(d, truth, blobs(d))
    itk = itk_registration(moving, fixed, grids, kind)
    ours = recovered(d, kind, "ncc").affine[0]
    assert corner_error(itk, truth, grids["fixed_affine"], FIXED_SHAPE[:d]) < 1
    assert corner_error(ours, itk, grids["fixed_affine"], FIXED_SHAPE[:d]) < 1


@pytest.mark.parametrize("degrees", [40, 65, 90])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_moments_find_images_that_are_far_apart_and_turned(d, degrees):
    """The images are 100 mm apart, with no voxel in common; without moments they stay lost."""
    offset = [80.0, -40.0, 60.0][:d]
    angles = [math.radians(degrees), 0.3, -0.2]
    truth = true_matrix(d, "rigid", angles=angles, offset=offset)
    small = blobs(d)
    away = torch.tensor(offset, dtype=torch.float64)
    moving, fixed, grids = linear_pair(d, truth, lambda p: small(p - away), centre=away)
    assert error_of(run(moving, fixed, Rigid(), **grids), truth) < 0.25
    lost = run(moving, fixed, Rigid(initialise="none", steps=5), **grids)
    assert error_of(lost, truth) > 50


def test_half_a_turn_in_the_plane():
    """Principal axes have no sign: the start is one of two turns, and never a mirror image."""
    truth = true_matrix(2, "rigid", angles=[math.pi])
    moving, fixed, grids = linear_pair(2, truth, blobs(2))
    found = run(moving, fixed, Rigid(), **grids)
    assert error_of(found, truth) < 0.25
    assert torch.linalg.det(found.affine[0, :2, :2]) > 0


@pytest.mark.parametrize("method", [Rigid(), Affine()], ids=["rigid", "affine"])
@pytest.mark.parametrize(("d", "shade"), [(2, 0.2), (3, 0.4)])
def test_a_start_that_fits_best_from_afar_alone_is_not_chosen(d, shade, method):
    """One image is bright on the left, the other on the right, which half a turn would explain.

    The grain within, of 4 to 9 mm, shows the truth; voxels of 4 mm hardly show the grain.
    """
    axes = torch.tensor([24.0, 17.0, 14.0][:d]).double()
    grain = waves(d)

    def head(points, slope):
        radius = (points / axes).square().sum(-1)
        inside = torch.sigmoid(8 * (1 - radius))
        return inside * (1.5 + slope * points[:, 0] / axes[0] + 0.5 * grain(2.4 * points))

    shape = (64, 48, 42)[:d]
    affine = grid((1.0, 1.0, 1.0)[:d], shape)
    at = places(affine, shape)
    truth = true_matrix(d, "rigid", angles=(0.1, -0.08, 0.05))
    fixed = draw(lambda p: head(p, shade), apply(truth, at), shape)
    moving = draw(lambda p: head(p, -shade), at, shape)

    still = torch.zeros(1, d, *shape)
    pair = Pair(moving, fixed, affine, affine, None, None, torch.eye(d + 1).double()[None], still)
    # On voxels of 4 mm, where the choice was once made, half a turn fits better.
    compare = comparison(ncc, pair, voxels=math.prod(shape) // 4**d)
    upright, upside = compare(truth[None], still), compare((half_turn(d) @ truth)[None], still)
    assert upside < upright
    grids = {"moving_affine": affine, "fixed_affine": affine}
    assert error_of(run(moving, fixed, method, **grids), truth) < 1


def half_turn(d):
    """In the plane of the first two axes, about the origin."""
    return homogeneous(rotation(d, [math.pi]), [0.0] * d)


@pytest.mark.parametrize(
    ("d", "slope", "turns"), [(2, 0.3, False), (2, 0.6, True), (3, 0.5, False), (3, 0.8, True)]
)
def test_half_a_turn_has_to_pay(d, slope, turns):
    """Two heads, alike and bright on opposite sides: which way up are they?

    From either start the same method goes down two levels. Half a turn ends with a lower loss each
    time: by less than 15 % of the other where it is refused, by more where it is taken.
    """
    axes = torch.tensor([24.0, 17.0, 14.0][:d]).double()
    common = waves(d)

    def head(points, slope, own):
        inside = torch.sigmoid(8 * (1 - (points / axes).square().sum(-1)))
        grain = 0.5 * own(1.6 * points) + 0.4 * common(1.6 * points)
        return inside * (1.5 + slope * points[:, 0] / axes[0] + grain)

    shape = (60, 44, 36)[:d]
    affine = grid((1.0, 1.0, 1.0)[:d], shape)
    at = places(affine, shape)
    fixed = draw(lambda p: head(p, slope, waves(d, 3)), at, shape)
    moving = draw(lambda p: head(p, -slope, waves(d, 4)), at, shape)
    grids = {"moving_affine": affine, "fixed_affine": affine}
    plain = Rigid(initialise="none", levels=(4.0, 2.0))
    starts = (None, half_turn(d)[None])
    ends = [run(moving, fixed, plain, start=start, **grids).history[0] for start in starts]
    upright, upside = (min(end["rigid, 2 mm"]["similarity"]) for end in ends)
    gain = (upright - upside) / upright
    assert gain > 0.15 if turns else 0 < gain < 0.15
    assert (run(moving, fixed, Rigid(), **grids).affine[0, 0, 0] < 0) == turns


def test_the_rule_of_preference():
    """Written out: losses of all kinds of sign, ends where nothing meets, ties."""
    inf = math.inf
    for losses, turned, wanted in (
        ([0.30, 0.27], [0, 1], 0),  # 10 % better: not enough
        ([0.30, 0.25], [0, 1], 1),  # 17 %
        ([-0.60, -0.66], [0, 1], 0),  # mutual information falls below 0
        ([-0.60, -0.70], [0, 1], 1),
        ([0.27, 0.30], [1, 0], 1),  # whichever comes first
        ([inf, 0.25], [0, 1], 1),  # where the header leads nowhere, a turn costs nothing
        ([0.30, inf], [0, 1], 0),
        ([inf, inf], [0, 1], 0),
        ([0.30002, 0.30], [0, 0], 0),  # a tie
        ([0.31, 0.30], [0, 0], 1),
        ([0.30, 0.29], [1, 1], 1),
    ):
        assert preferred(torch.tensor(losses), torch.tensor(turned).bool()) == wanted, losses


@pytest.mark.parametrize("d", DIMENSIONS)
def test_every_pair_of_a_batch_has_a_start_of_its_own(d):
    """Upright, upside down, and with a start that is given; with masks. As alone, to 1e-4 mm."""
    upright, upside = true_matrix(d, "rigid"), true_matrix(d, "rigid") @ half_turn(d)
    truths = [upright, upside, upright]
    pairs = [linear_pair(d, truth, blobs(d, seed)) for seed, truth in enumerate(truths)]
    moving, fixed = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    masks = [(image > 0.05).float() for image in (moving, fixed)]
    start = torch.eye(d + 1).double().repeat(3, 1, 1)
    start[2] = homogeneous(rotation(d, [0.1]), [1.0] * d)
    names = ("moving_mask", "fixed_mask")

    def register_some(some):
        kept = {name: mask[some] for name, mask in zip(names, masks, strict=True)}
        return run(
            moving[some], fixed[some], Rigid(steps=8), start=start[some], **kept, **pairs[0][2]
        )

    together = register_some(slice(None)).affine
    for n in range(3):
        alone = register_some(slice(n, n + 1)).affine[0]
        torch.testing.assert_close(together[n], alone, rtol=0, atol=1e-4)
    turned = torch.tensor([False, True, False])
    assert (together[:, 0, 0] < 0).equal(turned)


def first_step(iterate):
    return True


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("method", [Rigid(), Affine()], ids=["rigid", "affine"])
def test_a_start_that_is_given_is_kept(d, method):
    """Stopped before the first move: A is the start, not the centres of mass that fit better."""
    truth = true_matrix(d, "rigid")
    moving, fixed, grids = linear_pair(d, truth, blobs(d))
    start = homogeneous(1.1 * rotation(d, [0.4]), [9.0, 9.0, 9.0][:d]).unsqueeze(0)
    kept = run(moving, fixed, method, start=start, callback=first_step, **grids)
    torch.testing.assert_close(kept.affine, start, rtol=0, atol=1e-5)
    chosen = run(moving, fixed, method, callback=first_step, **grids)
    assert error_of(chosen, truth) < 0.8 * error_of(kept, truth)


def given_field(field):
    """A method that has found a field already."""

    def method(pair):
        active = torch.ones(len(pair.field), dtype=torch.bool)
        yield Iterate("given", {}, active, lambda: (pair.affine, field))

    return method


def test_affine_after_a_displacement_keeps_both():
    """A(x + u(x)): with u known A is found, and no other start is chosen, though u moves far."""
    shape = (40, 36)
    affine = grid((1.0, 1.2), shape, turn=0.2)
    truth = true_matrix(2, "affine", angles=[0.05], offset=[1.0, -1.0])
    u = torch.zeros(1, 2, *shape)
    u[:, 0], u[:, 1] = 6, torch.linspace(-3, 3, shape[0]).view(-1, 1)
    points = places(affine, shape) + u[0].flatten(1).T.double() @ affine[:2, :2].T
    world = blobs(2)
    fixed = draw(world, apply(truth, points), shape)
    moving = draw(world, places(affine, shape), shape)
    grids = {"moving_affine": affine, "fixed_affine": affine}
    found = run(moving, fixed, [given_field(u), Affine()], **grids)
    assert found.field.equal(u)
    assert error_of(found, truth) < 0.5
    assert error_of(run(moving, fixed, Affine(), **grids), truth) > 3


@pytest.mark.parametrize("method", [Rigid, Affine])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_identity_in_identity_out(d, method):
    """Exactly: no state can be better than a perfect one. Rounded losses might be, but are not."""
    moving, _, grids = linear_pair(d, torch.eye(d + 1).double(), blobs(d))
    affine = grids["moving_affine"]
    found = run(moving, moving, method(), moving_affine=affine, fixed_affine=affine)
    eye = torch.eye(d + 1, dtype=torch.float64)
    torch.testing.assert_close(found.affine[0], eye, rtol=0, atol=1e-9)


# --- Deformable -----------------------------------------------------------------------------


def wave_displacement(d, size=3.0, length=70.0):
    """A smooth displacement in mm, as a function of mm."""

    def displacement(points):
        parts = [
            torch.sin(2 * math.pi * points[:, (c + 1) % d] / length + c)
            * torch.cos(2 * math.pi * points[:, c] / (1.4 * length))
            for c in range(d)
        ]
        return size * torch.stack(parts, 1)

    return displacement


def deformed_pair(d, displacement, world=None, *, matrix=None):
    """Moving, fixed, grids and the true field in voxels of the fixed grid."""
    world = waves(d) if world is None else world
    shape = DEFORMED_SHAPE[d]
    affine = grid((1.0, 1.3, 2.0)[:d], shape, turn=0.2)
    here = places(affine, shape)
    vectors = displacement(here)
    there = here + vectors if matrix is None else apply(matrix, here + vectors)
    moving, fixed = draw(world, here, shape), draw(world, there, shape)
    truth = (vectors @ torch.linalg.inv(affine[:d, :d]).T).T.reshape(1, d, *shape).float()
    return moving, fixed, {"moving_affine": affine, "fixed_affine": affine}, truth


def mean_error(field, truth, margin=4):
    """Mean length of the difference in voxels, but for a border whose content may have left."""
    inside = (..., *(slice(margin, -margin),) * truth.shape[1])
    return float((field - truth).norm(dim=1)[inside].mean())


DEFORMABLE = {
    "every voxel": Displacement,
    "displacement": functools.partial(Displacement, nodes=2.0),
    "velocity": Velocity,
    "symmetric": functools.partial(Velocity, symmetric=True),
    "B-spline": BSpline,
}


def deformable(model, similarity, **settings):
    return DEFORMABLE[model](
        SIMILARITIES[similarity], regularity_weight=WEIGHTS[similarity], **settings
    )


@pytest.mark.parametrize(
    ("d", "model", "similarity"),
    [(2, m, s) for m in DEFORMABLE for s in ("mse", "lncc")]
    + [(2, m, s) for m in ("displacement", "velocity") for s in ("ncc", "mind")]
    + [(3, m, "lncc") for m in DEFORMABLE],
)
def test_smooth_fields_are_recovered(d, model, similarity):
    """From over 2 voxels to a quarter of one, where the texture has 5 to 20 voxels a wave.

    Half a voxel where every voxel moves on its own: single ones are lost to another wave.
    """
    moving, fixed, grids, truth = deformed_pair(d, wave_displacement(d))
    found = run(moving, fixed, deformable(model, similarity), **grids)
    assert mean_error(0 * truth, truth) > 2
    assert mean_error(found.field, truth) < (0.5 if model == "every voxel" else 0.25)
    assert found.affine[0].equal(torch.eye(d + 1).double())


@pytest.mark.parametrize("model", DEFORMABLE)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_no_field_is_recovered_from_a_stranger(d, model):
    _, fixed, grids, truth = deformed_pair(d, wave_displacement(d))
    stranger, _, _, _ = deformed_pair(d, wave_displacement(d), waves(d, seed=7))
    found = run(stranger, fixed, deformable(model, "mse", steps=20), **grids)
    assert mean_error(found.field, truth) > 1


@pytest.mark.parametrize("model", DEFORMABLE)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_identical_images_stay_where_they_are(d, model):
    moving, _, grids, _ = deformed_pair(d, wave_displacement(d))
    found = run(moving, moving, deformable(model, "lncc"), **grids)
    assert not found.field.any()


class Recorded:
    """A regularity that keeps every field it is asked about."""

    def __init__(self):
        self.fields = []

    def __call__(self, field, **options):
        self.fields.append(field.detach().clone())
        return diffusion(field, **options)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_exp_of_minus_v_is_the_inverse_of_what_is_found(d):
    """It misses by a twelfth of the way on average, what interpolating the fields costs.

    Minus the displacement misses by more than twice as much.
    """
    moving, fixed, grids, _ = deformed_pair(d, wave_displacement(d))
    recorded = Recorded()
    method = Velocity(mse, recorded, regularity_weight=0.1, levels=(4.0, 2.0), steps=40)
    found = run(moving, fixed, method, **grids)
    # The best state is the one of the smallest loss; its velocity lies on nodes 4 mm apart.
    terms = found.history[0]["velocity, 2 mm"]
    losses = [a + b for a, b in zip(terms["similarity"], terms["regularity"], strict=True)]
    velocity = recorded.fields[-len(losses) :][int(np.argmin(losses))]
    there, back = integrate(velocity, steps=5), integrate(-velocity, steps=5)
    inside = (..., *(slice(2, -2),) * d)
    way = there[inside].norm(dim=1).mean()
    assert way > 0.3
    miss = compose(there, back)[inside].norm(dim=1).mean()
    assert miss < way / 12
    assert (there + back)[inside].norm(dim=1).mean() > 2 * miss
    assert jacobian_det(found.field).min() > 0
    assert found.ndv == 0


@pytest.mark.parametrize("d", DIMENSIONS)
def test_a_velocity_hardly_folds_where_displacements_tear(d):
    """Between strangers, with little regularity: what is left is owed to interpolation."""
    _, fixed, grids, _ = deformed_pair(d, wave_displacement(d))
    moving, _, _, _ = deformed_pair(d, wave_displacement(d), waves(d, seed=7))
    settings = {"levels": (2.0,), "regularity_weight": 0.3, "steps": 40}
    torn = run(moving, fixed, Displacement(mse, **settings), **grids)
    found = run(moving, fixed, Velocity(mse, **settings), **grids)
    assert torn.folding > 0.1
    assert found.folding < 0.05 * torn.folding
    assert found.ndv < 0.05 * torn.ndv


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_symmetric_gives_the_inverse_when_the_images_change_places(d, masked):
    """To 0.15 voxels of 2 on average, the price of interpolating coarse and unfinished fields.

    Three times that, or more, where the fixed image is favoured.
    """
    shape = DEFORMED_SHAPE[d]
    moving, fixed, grids, _ = deformed_pair(d, wave_displacement(d))
    there, back = {}, {}
    if masked:
        masks = torch.ones(2, 1, *shape)
        masks[0, :, :6], masks[1, :, -9:] = 0, 0
        there = {"moving_mask": masks[:1], "fixed_mask": masks[1:]}
        back = {"moving_mask": masks[1:], "fixed_mask": masks[:1]}

    def miss(symmetric):
        method = Velocity(
            mse, regularity_weight=0.1, levels=(4.0, 2.0), steps=20, symmetric=symmetric
        )
        a = run(moving, fixed, method, **there, **grids).field
        b = run(fixed, moving, method, **back, **grids).field
        return mean_error(compose(a, b), torch.zeros_like(a))

    miss_symmetric = miss(True)
    assert miss_symmetric < 0.15
    assert miss(False) > 3 * miss_symmetric


@pytest.mark.parametrize(("d", "model"), [(2, m) for m in DEFORMABLE] + [(3, "velocity")])
def test_after_an_affine_start_a_is_kept(d, model):
    """phi(x) = A(x + u(x)): u is found underneath A, in voxels of the fixed grid."""
    matrix = true_matrix(d, "affine", offset=[8.0, -6.0, 4.0])
    moving, fixed, grids, truth = deformed_pair(d, wave_displacement(d, 2.0), matrix=matrix)
    start = matrix.unsqueeze(0)
    found = run(moving, fixed, deformable(model, "lncc"), start=start, **grids)
    assert found.affine.equal(start)
    # Half of the fixed image has left the moving one: what is still inside counts.
    points = transform_grid(found.whole_field())
    last = torch.tensor(fixed.shape[2:]).view(1, d, *(1,) * d) - 1
    inside = ((points > 3) & (points < last - 3)).all(1)
    miss = (found.field - truth).norm(dim=1)
    assert inside.float().mean() > 0.2
    assert miss[inside].mean() < 0.5
    assert truth.norm(dim=1)[inside].mean() > 1


@pytest.mark.parametrize("model", DEFORMABLE)
def test_after_another_displacement_both_are_composed(model):
    """u0 leads 14 mm far, beyond the reach of any level: what is found goes underneath it."""
    moving, fixed, grids, truth = deformed_pair(
        2, lambda p: wave_displacement(2, 1.5)(p) + torch.tensor([14.0, 0.0])
    )
    far = torch.linalg.inv(grids["fixed_affine"][:2, :2]) @ torch.tensor([14.0, 0.0]).double()
    u0 = far.float().view(1, 2, 1, 1).expand_as(truth)
    found = run(moving, fixed, [given_field(u0), deformable(model, "mse")], **grids)
    margin = 16
    assert mean_error(u0, truth, margin) > 0.7
    assert mean_error(found.field, truth, margin) < 0.3
    if model == "velocity":
        alone = run(moving, fixed, deformable(model, "mse"), **grids)
        assert mean_error(alone.field, truth, margin) > 2


# --- Batches --------------------------------------------------------------------------------


BATCHED = {
    "rigid": Rigid(),
    "affine": Affine(lncc),
    "displacement": Displacement(mse, regularity_weight=0.1),
    "velocity": Velocity(regularity_weight=0.3),
    "symmetric": Velocity(ncc, regularity_weight=0.05, symmetric=True),
    "B-spline": BSpline(mse, regularity_weight=0.1),
}


@pytest.mark.parametrize("method", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize(("d", "batch"), [(2, 1), (3, 2), (2, 3)])
def test_a_pair_of_a_batch_gives_what_it_gives_alone(d, batch, method):
    """With its own history and its own stop. To 1e-4 mm or voxels after eight steps.

    In the end to 2e-3, the losses too: Adam divides by the size of the gradient, so roundings
    grow where there is hardly any. The pairs are differently far apart, the last one not at all:
    it stops first.
    """
    parts = [deformed_pair(d, wave_displacement(d, 2.0 * (batch - 1 - i))) for i in range(batch)]
    small = (slice(None), slice(None), *(slice(0, 18),) * d)
    moving, fixed = (torch.cat([p[k][small] for p in parts]) for k in (0, 1))
    method = dataclasses.replace(method, steps=30, levels=(4.0, 2.0))

    def eighth_and_last(moving, fixed):
        seen = []

        def note(iterate):
            if len(seen) < 9:
                seen.append(iterate.transform() if len(seen) == 8 else None)

        last = run(moving, fixed, method, callback=note)
        return (*seen[-1], last)

    early_affine, early_field, both = eighth_and_last(moving, fixed)
    assert len(both) == batch
    lengths = set()
    for i in range(batch):
        affine, field, alone = eighth_and_last(moving[i : i + 1], fixed[i : i + 1])
        torch.testing.assert_close(early_affine[i : i + 1], affine, rtol=0, atol=1e-4)
        torch.testing.assert_close(early_field[i : i + 1], field, rtol=0, atol=1e-4)
        torch.testing.assert_close(both[i].affine, alone.affine, rtol=0, atol=2e-3)
        torch.testing.assert_close(both[i].field, alone.field, rtol=0, atol=2e-3)
        assert both.history[i].keys() == alone.history[0].keys()
        for stage, terms in alone.history[0].items():
            for name, values in terms.items():
                assert both.history[i][stage][name] == pytest.approx(values, abs=2e-3)
        lengths.add(sum(len(t["similarity"]) for t in alone.history[0].values()))
    assert len(lengths) > 1 or batch == 1


# --- Masks ----------------------------------------------------------------------------------


def half_space(affine, shape, limit):
    """1 where the first coordinate of the world is less than ``limit``."""
    return (places(affine, shape)[:, 0] < limit).reshape(1, 1, *shape).float()


MASKED = {
    "rigid": Rigid(),
    "affine mse": Affine(mse),
    "displacement": Displacement(),
    "velocity": Velocity(mse),
    "symmetric": Velocity(symmetric=True),
    "B-spline": BSpline(ncc),
}


@pytest.mark.parametrize("method", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_what_lies_outside_a_mask_has_no_influence(d, method):
    """Not a bit, at any level: coarse voxels are averages of voxels within the mask."""
    moving, fixed, grids = linear_pair(d, true_matrix(d, "rigid"), blobs(d))
    moving_mask = half_space(grids["moving_affine"], MOVING_SHAPE[:d], 14.0)
    fixed_mask = half_space(grids["fixed_affine"], FIXED_SHAPE[:d], 9.0)
    method = dataclasses.replace(method, steps=12)
    options = {"moving_mask": moving_mask, "fixed_mask": fixed_mask, **grids}
    clean = run(moving, fixed, method, **options)
    noise = torch.Generator().manual_seed(0)
    spoilt = [
        x.where(mask > 0, 1e6 * torch.randn(x.shape, generator=noise))
        for x, mask in ((moving, moving_mask), (fixed, fixed_mask))
    ]
    found = run(*spoilt, method, **options)
    assert found.affine.equal(clean.affine)
    assert found.field.equal(clean.field)
    assert found.history == clean.history
    without = run(*spoilt, method, **grids)
    assert not (without.affine.equal(clean.affine) and without.field.equal(clean.field))


@pytest.mark.parametrize("name", ["moving_mask", "fixed_mask"])
def test_nan_is_refused_at_the_door_masked_or_not(name):
    moving, fixed, grids = linear_pair(2, true_matrix(2, "rigid"), blobs(2))
    image = {"moving_mask": moving, "fixed_mask": fixed}[name]
    mask = torch.ones_like(image)
    mask[..., 0, 0] = 0
    image[..., 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name[:-5]}: wanted finite values"):
        run(moving, fixed, Rigid(), **{name: mask}, **grids)


@pytest.mark.parametrize("which", ["moving_mask", "fixed_mask"])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_a_mask_leads_to_the_right_answer(d, which):
    """A bright object that has moved by itself: counted, it leads astray; masked, it does not."""
    truth = true_matrix(d, "rigid")
    moving, fixed, grids = linear_pair(d, truth, blobs(d))
    image = {"moving_mask": moving, "fixed_mask": fixed}[which]
    thing = torch.zeros_like(image)
    thing[(..., slice(2, 9), *(slice(3, 9),) * (d - 1))] = 1
    image += 6 * thing
    method = Rigid(mse, initialise="none")
    assert error_of(run(moving, fixed, method, **grids), truth) > 3
    found = run(moving, fixed, method, **{which: 1 - thing}, **grids)
    assert error_of(found, truth) < 0.5


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_edge_of_a_mask_is_not_seen(d):
    """Right through the blobs, and in another place in each image: the answer hardly changes."""
    truth = true_matrix(d, "rigid")
    moving, fixed, grids = linear_pair(d, truth, blobs(d))
    masks = {
        "moving_mask": half_space(grids["moving_affine"], MOVING_SHAPE[:d], 10.0),
        "fixed_mask": half_space(grids["fixed_affine"], FIXED_SHAPE[:d], 2.0),
    }
    for similarity in (mse, ncc, lncc):
        assert error_of(run(moving, fixed, Rigid(similarity), **masks, **grids), truth) < 0.5


@pytest.mark.parametrize("small", ["moving", "fixed"])
def test_a_small_image_finds_its_place_in_a_large_one(small):
    """Where it is already, roughly: that it covers a tenth of the other is no fault of the start.

    Centres of mass would lead away, as the large image shows more.
    """
    truth = true_matrix(3, "rigid", angles=[0.05, -0.05, 0.0], offset=[1.5, -1.0, 1.0])
    moving, fixed, grids = linear_pair(3, truth, blobs(3))
    image = {"moving": moving, "fixed": fixed}[small]
    first = (4, 9, 8) if small == "moving" else (9, 8, 6)
    image = image[(..., *(slice(n, n + 10) for n in first))]
    corner = torch.tensor([*first, 1], dtype=torch.float64)
    grids[f"{small}_affine"] = grids[f"{small}_affine"].clone()
    grids[f"{small}_affine"][:, 3] = grids[f"{small}_affine"] @ corner
    pair = {"moving": moving, "fixed": fixed, small: image}
    stay = run(**pair, method=Rigid(), callback=first_step, **grids)
    assert stay.affine[0].equal(torch.eye(4).double())
    assert error_of(run(**pair, method=Rigid(), **grids), truth) < 1


# --- Levels, history, stops -----------------------------------------------------------------


class Watched:
    """A similarity that keeps the shapes it sees, in the order of their first appearance."""

    def __init__(self, similarity=ncc):
        self.shapes, self.similarity = [], similarity

    def __call__(self, warped, fixed, **options):
        assert warped.shape == fixed.shape
        if fixed.shape[2:] not in self.shapes:
            self.shapes.append(fixed.shape[2:])
        return self.similarity(warped, fixed, **options)


def shapes_seen(method, shape, spacing, **settings):
    watched = Watched()
    image = draw(waves(len(shape)), places(grid(spacing, shape), shape), shape)
    affine = grid(spacing, shape)
    run(
        image,
        image,
        method(watched, steps=1, **settings),
        moving_affine=affine,
        fixed_affine=affine,
    )
    return [tuple(s) for s in watched.shapes]


@pytest.mark.parametrize("method", [*UNTRIED, Displacement, Velocity, BSpline])
def test_levels_are_in_mm(method):
    """Voxels of at least so many mm, axes that are coarser stay: 1 x 1 x 5 mm, twelve slices."""
    shape, spacing = (48, 40, 12), (1.0, 1.0, 5.0)
    seen = shapes_seen(method, shape, spacing, levels=(4.0, 2.0, 1.0))
    assert seen == [(12, 10, 12), (24, 20, 12), (48, 40, 12)]
    assert shapes_seen(method, shape, spacing, levels=(6.0,)) == [(8, 8, 10)]
    assert shapes_seen(method, shape, spacing) == seen


@pytest.mark.parametrize("method", [Rigid, Displacement, Velocity, BSpline])
def test_few_slices_do_not_cost_the_coarse_levels(method):
    """No axis comes down to fewer than eight voxels; the others still do."""
    wanted = [(12, 10, 5), (24, 20, 5), (48, 40, 5)]
    for thickness in (5.0, 1.0):
        assert shapes_seen(method, (48, 40, 5), (1.0, 1.0, thickness)) == wanted
    assert shapes_seen(method, (12, 9), (1.0, 1.0)) == [(12, 9)]


def test_rigid_and_affine_need_no_more_than_100000_voxels():
    shape = (60, 50, 50)
    [*_, finest] = shapes_seen(Rigid, shape, (1.0, 1.0, 1.0))
    assert 70_000 < math.prod(finest) <= 110_000
    assert shapes_seen(Displacement, shape, (1.0, 1.0, 1.0))[-1] == shape


def test_the_history_names_stages_and_terms():
    moving, fixed, grids = linear_pair(2, true_matrix(2, "affine"), blobs(2))
    methods = [Affine(levels=(4.0, 2.0), steps=8), Velocity(levels=(4.0,), steps=5)]
    [history] = run(moving, fixed, methods, **grids).history
    assert list(history) == ["rigid, 4 mm", "affine, 4 mm", "affine, 2 mm", "velocity, 4 mm"]
    assert [list(terms) for terms in history.values()] == 3 * [["similarity"]] + [
        ["similarity", "regularity"]
    ]
    assert [len(terms["similarity"]) for terms in history.values()] == [8, 8, 8, 5]
    assert history["velocity, 4 mm"]["regularity"][0] == 0
    stages = [terms["similarity"] for terms in history.values()]
    # Each stage begins with the best state of the one before.
    assert stages[1][0] == pytest.approx(min(stages[0]), abs=1e-5)
    assert min(stages[1]) < stages[0][0]


@pytest.mark.parametrize("method", BATCHED.values(), ids=BATCHED)
def test_a_callback_stops_and_the_best_state_counts(method):
    moving, fixed, grids, _ = deformed_pair(2, wave_displacement(2))
    kept = []

    def stop(iterate):
        kept.append(iterate.transform())
        return len(kept) == 7

    found = run(moving, fixed, dataclasses.replace(method, lr=0.1), callback=stop, **grids)
    assert sum(len(t["similarity"]) for t in found.history[0].values()) == 7
    affine, field = kept[-1]
    assert found.affine.equal(affine)
    assert found.field.equal(field)
    # What has been given before has not been changed by later steps.
    first_affine, first_field = kept[0]
    assert not (first_affine.equal(affine) and first_field.equal(field))
    assert not first_field.any()


def test_a_plateau_ends_a_level_and_tolerance_says_what_one_is():
    moving, fixed, grids, _ = deformed_pair(2, wave_displacement(2))

    def steps(**settings):
        method = Velocity(mse, regularity_weight=0.1, levels=(2.0,), steps=100, **settings)
        [terms] = run(moving, fixed, method, **grids).history[0].values()
        return len(terms["similarity"])

    assert steps(tolerance=0.5) < steps(tolerance=0.01) < steps(tolerance=1e-3) < 100


@pytest.mark.parametrize("method", [Affine, Displacement, Velocity, BSpline])
def test_a_loss_that_is_not_finite_raises(method):
    moving, fixed, grids = linear_pair(2, true_matrix(2, "rigid"), blobs(2))
    calls = []

    def broken(warped, fixed, **options):
        calls.append(1)
        return mse(warped, fixed, **options) * (math.nan if len(calls) > 9 else 1)

    with pytest.raises(FloatingPointError, match="loss"):
        run(moving, fixed, method(broken), **grids)


def test_a_start_that_is_not_begun_with_stops_nobody():
    """A similarity that breaks for one of several pairs at a time, as trials of starts are."""
    moving, fixed, grids = linear_pair(2, true_matrix(2, "rigid"), blobs(2))

    def broken(warped, fixed, **options):
        return mse(warped, fixed, **options) * (
            math.nan if len(warped) > 1 and warped.requires_grad else 1
        )

    found = run(moving, fixed, Rigid(broken), **grids)
    assert error_of(found, true_matrix(2, "rigid")) < 0.25


@pytest.mark.parametrize("method", BATCHED.values(), ids=BATCHED)
def test_two_runs_give_the_same_bits(method):
    """Without any generator: nothing is random."""
    moving, fixed, grids = linear_pair(3, true_matrix(3, "affine"), blobs(3))
    method = dataclasses.replace(method, steps=6)
    a, b = (run(moving, fixed, method, **grids) for _ in range(2))
    assert a.affine.equal(b.affine)
    assert a.field.equal(b.field)
    assert a.warped.equal(b.warped)
    assert a.history == b.history


# --- Unusual images -------------------------------------------------------------------------


@pytest.mark.parametrize("method", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_several_channels(channels, method):
    """Colours of one scene: all of them lead to the same transform."""
    matrix = true_matrix(2, "rigid", angles=[0.05], offset=[1.5, -1.0])
    pairs = [linear_pair(2, matrix, blobs(2, seed=s)) for s in range(channels)]
    moving, fixed = (torch.cat([p[k] for p in pairs], 1) for k in (0, 1))
    grids = pairs[0][2]
    found = run(moving, fixed, dataclasses.replace(method, steps=30), **grids)
    before = run(moving, fixed, given_field(0 * found.field), **grids)
    error = [float((r.warped - fixed).square().mean()) for r in (before, found)]
    assert found.warped.shape == fixed.shape
    assert error[1] < 0.3 * error[0]


@pytest.mark.parametrize("method", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("shape", [(5, 24, 20), (24, 5, 20), (24, 20, 1), (5, 30), (3, 3)], ids=str)
def test_thin_images(shape, method):
    d = len(shape)
    affine = grid((2.0,) * d, shape)
    world, here = blobs(d), places(affine, shape)
    moving = draw(world, here, shape)
    fixed = draw(world, here + 1.0, shape)
    method = dataclasses.replace(method, steps=12)
    found = run(moving, fixed, method, moving_affine=affine, fixed_affine=affine)
    assert found.field.shape == (1, d, *shape)
    assert found.field.isfinite().all()
    assert mse(found.warped, fixed) <= mse(moving, fixed)


@pytest.mark.parametrize("method", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize(("d", "value"), [(2, 0.1), (2, 1e4), (3, 0.1)])
def test_images_without_contrast_change_nothing(d, value, method):
    """Exactly: roundings of a constant shall not be taken for something to align."""
    image, _, grids = linear_pair(d, torch.eye(d + 1).double(), blobs(d))
    affine = grids["moving_affine"]
    constant = torch.full_like(image, value)
    method = dataclasses.replace(method, steps=8)
    for moving, fixed in ((constant, constant), (constant, image), (image, constant)):
        if fixed is constant and moving is image and method.similarity is mse:
            continue  # here the images do grow more alike as the moving one leaves
        found = run(moving, fixed, method, moving_affine=affine, fixed_affine=affine)
        assert found.affine[0].equal(torch.eye(d + 1).double())
        assert not found.field.any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4])
def test_the_scale_of_intensities_does_not_matter(scale):
    """Mean squares of both images times 1e-4 or 30,000, and 500 added: tolerances stay the same."""
    truth = true_matrix(2, "rigid")
    moving, fixed, grids = linear_pair(2, truth, blobs(2))
    offset = 500 if scale > 1 else 0
    found = run(moving * scale + offset, fixed * scale + offset, Rigid(mse), **grids)
    assert error_of(found, truth) < 0.25


def test_equal_intensities_stay_equal_whatever_else_is_seen():
    """The moving image shows more: normalised on its own, mean squares would pull it in."""
    truth = true_matrix(2, "affine")
    moving, fixed, grids = linear_pair(2, truth, blobs(2))
    pad = 12
    moving = torch.nn.functional.pad(moving, (pad,) * 4)
    wide = grids["moving_affine"].clone()
    wide[:2, 2] -= wide[:2, :2] @ torch.tensor([pad, pad]).double()
    found = run(moving, fixed, Affine(mse), fixed_affine=grids["fixed_affine"], moving_affine=wide)
    assert error_of(found, truth) < 0.5


def test_float64_images_are_registered_in_float64():
    truth = true_matrix(2, "rigid")
    moving, fixed, grids = linear_pair(2, truth, blobs(2))
    found = run(moving.double(), fixed.double(), [Rigid(), Velocity(steps=5)], **grids)
    assert found.field.dtype == torch.float64
    assert error_of(found, truth) < 0.25


# --- Bad settings ---------------------------------------------------------------------------


ALL = [Rigid, Affine, Displacement, Velocity, BSpline]


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("similarity", "ncc", TypeError),
        ("levels", (), ValueError),
        ("levels", (4.0, 0.0), ValueError),
        ("levels", (math.inf,), ValueError),
        ("levels", 4.0, TypeError),
        ("levels", "42", TypeError),
        ("steps", 0, ValueError),
        ("steps", 2.5, TypeError),
        ("lr", 0.0, ValueError),
        ("lr", -1.0, ValueError),
        ("lr", math.nan, ValueError),
        ("lr", "fast", TypeError),
        ("tolerance", -1e-3, ValueError),
        ("tolerance", math.inf, ValueError),
        ("tolerance", None, TypeError),
    ],
)
def test_bad_settings_are_named(method, setting, value, error):
    with pytest.raises(error, match=f"^{setting}: wanted"):
        method(**{setting: value})


@pytest.mark.parametrize("method", [Rigid, Affine])
def test_bad_starts_are_named(method):
    with pytest.raises(ValueError, match=r"^initialise: wanted one of"):
        method(initialise="centre")


@pytest.mark.parametrize("method", [Displacement, Velocity, BSpline])
@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("regularity", "diffusion", TypeError),
        ("regularity_weight", -1.0, ValueError),
        ("regularity_weight", math.nan, ValueError),
        ("regularity_weight", "much", TypeError),
        ("nodes", 0, ValueError),
        ("nodes", "2", TypeError),
    ],
)
def test_bad_settings_of_deformable_methods_are_named(method, setting, value, error):
    with pytest.raises(error, match=f"^{setting}: wanted"):
        method(**{setting: value})


def test_bad_settings_of_one_model_are_named():
    with pytest.raises(ValueError, match=r"^squarings: wanted"):
        Velocity(squarings=0)
    with pytest.raises(TypeError, match=r"^nodes: wanted"):
        BSpline(nodes=2.5)
