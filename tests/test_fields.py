"""Algebra of fields: composition, the exponential, steps between grids."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from reglib.geometry.fields import (
    carry_field,
    compose,
    downsample_field,
    integrate,
    inverse_consistency,
    invert,
    invert_points,
    resize_field_corners,
    upsample_field,
)
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp, warp_points
from reglib.synth import gaussian_diffeomorphism

SHAPES = [(40, 36), (20, 24, 22)]


def smooth_field(shape, largest, *, sigma=4.0, seed=0, batch=1, tapered=False):
    """White noise smoothed to ``sigma`` voxels, its longest vector ``largest`` voxels long."""
    noise = np.random.default_rng(seed).standard_normal((batch, len(shape), *shape))
    u = ndimage.gaussian_filter(noise, (0, 0, *(sigma,) * len(shape)))
    if tapered:
        for axis, n in enumerate(shape):
            window = np.sin(np.pi * np.arange(n) / (n - 1)) ** 2
            u = u * window.reshape(-1, *(1,) * (len(shape) - axis - 1))
    length = np.sqrt((u**2).sum(1, keepdims=True))
    return torch.from_numpy(u * largest / length.max(tuple(range(1, u.ndim)), keepdims=True))


def affine_field(shape, matrix, offset):
    x = identity_grid(shape, dtype=torch.float64)
    d = len(shape)
    return torch.einsum("ij,bj...->bi...", matrix, x) + offset.view(1, d, *(1,) * d)


def random_affine(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d = len(shape)
    matrix = 0.4 * torch.rand(d, d, generator=generator, dtype=torch.float64) - 0.2
    return matrix, torch.rand(d, generator=generator, dtype=torch.float64)


def runge_kutta(velocity, steps=400):
    """Follow the linearly interpolated, border-clamped velocity from every voxel for unit time."""
    start = np.indices(velocity.shape[1:]).astype(float)

    def v(x):
        return np.stack([ndimage.map_coordinates(c, x, order=1, mode="nearest") for c in velocity])

    x, h = start.copy(), 1 / steps
    for _ in range(steps):
        k1 = v(x)
        k2 = v(x + h / 2 * k1)
        k3 = v(x + h / 2 * k2)
        k4 = v(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x - start


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integrate_follows_the_flow_border_included(shape):
    """0.02 voxel: what seven squarings lose by interpolating, for |v| <= 2 and sigma >= 4."""
    velocity = smooth_field(shape, 2.0)
    expected = runge_kutta(velocity[0].numpy())
    assert np.abs(expected - velocity[0].numpy()).max() > 0.1
    np.testing.assert_allclose(integrate(velocity)[0].numpy(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_squarings_change_little(shape):
    velocity = smooth_field(shape, 3.0, tapered=True)
    torch.testing.assert_close(
        integrate(velocity), integrate(velocity, steps=10), rtol=0, atol=0.01
    )


@pytest.mark.parametrize(
    ("shape", "largest", "tolerance"),
    [((64, 60), 1, 0.02), ((64, 60), 3, 0.08), ((24, 26, 22), 1, 0.03), ((24, 26, 22), 3, 0.15)],
)
def test_exp_of_minus_v_undoes_exp_of_v(shape, largest, tolerance):
    """Interpolating the field costs this much: on 24^3, exact flows already miss by 0.09 voxel."""
    velocity = smooth_field(shape, largest, batch=2, tapered=True)
    there, back = integrate(velocity), integrate(-velocity)
    for around in (compose(there, back), compose(back, there)):
        torch.testing.assert_close(around, torch.zeros_like(around), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_constant_velocity_is_a_translation(batch, dtype):
    vector = torch.tensor([1.5, -2.25, 0.5], dtype=dtype).view(1, 3, 1, 1, 1)
    velocity = vector.expand(batch, 3, 5, 6, 4)
    out = integrate(velocity)
    assert out.dtype == dtype
    # Weights of the interpolation add up to 1 but for single-precision rounding.
    torch.testing.assert_close(out, velocity, rtol=0, atol=1e-5)


def test_squarings_are_not_rounded_to_half_precision():
    velocity = smooth_field((40, 36), 2.0).to(torch.bfloat16)
    exact = integrate(velocity.double())
    # bfloat16 keeps 8 bits: one rounding of at most 2 voxels is 0.004, seven would add up.
    torch.testing.assert_close(integrate(velocity).double(), exact, rtol=0, atol=0.005)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compose_with_the_identity(shape):
    u = smooth_field(shape, 3.0, batch=2)
    still = torch.zeros_like(u)
    torch.testing.assert_close(compose(u, still), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(compose(still, u), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_translations_add_up(shape):
    a = torch.ones(2, len(shape), *shape, dtype=torch.float64)
    torch.testing.assert_close(compose(3.5 * a, -1.25 * a), 2.25 * a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compose_of_affine_maps_is_their_matrix_product(shape):
    """phi_a phi_b x = (I + A)((I + B) x + b) + a, which does not commute."""
    eye = torch.eye(len(shape), dtype=torch.float64)
    (ma, ta), (mb, tb) = random_affine(shape, 1), random_affine(shape, 2)
    # About the centre and small, so that half the grid stays inside.
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    ta, tb = ta - ma @ centre, tb - mb @ centre
    a, b = affine_field(shape, ma, ta), affine_field(shape, mb, tb)
    expected = affine_field(shape, (eye + ma) @ (eye + mb) - eye, (eye + ma) @ tb + ta)
    inside = (..., *(slice(n // 4, n - n // 4) for n in shape))
    torch.testing.assert_close(compose(a, b)[inside], expected[inside], rtol=0, atol=1e-10)
    assert (compose(b, a)[inside] - expected[inside]).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_warping_by_the_composition_is_warping_twice(shape):
    """I(phi_a(phi_b(x))): first warp by a, then by b. On a ramp interpolation is exact."""
    a = smooth_field(shape, 2.0, seed=1, tapered=True)
    b = smooth_field(shape, 2.0, seed=2, tapered=True)
    slope = torch.tensor([1.0, -2.0, 0.5][: len(shape)], dtype=torch.float64)
    ramp = affine_field(shape, slope.expand(len(shape), -1), torch.zeros(len(shape)))[:, :1]
    inside = (..., *(slice(3, -3),) * len(shape))
    once = warp(ramp, compose(a, b))
    torch.testing.assert_close(once[inside], warp(warp(ramp, a), b)[inside], rtol=0, atol=1e-10)
    assert (once - warp(warp(ramp, b), a))[inside].abs().max() > 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_points_travel_through_b_then_a(shape):
    a = smooth_field(shape, 2.0, seed=1, tapered=True)
    b = smooth_field(shape, 2.0, seed=2, tapered=True)
    voxels = torch.randint(4, 16, (1, 9, len(shape)), generator=torch.Generator().manual_seed(0))
    points = voxels.double()
    torch.testing.assert_close(
        warp_points(points, compose(a, b)), warp_points(warp_points(points, b), a)
    )


@pytest.mark.parametrize(("largest", "tolerance"), [(1, 0.02), (3, 0.1)])
@pytest.mark.parametrize("shape", [(64, 60), (24, 26, 22)], ids=str)
def test_composition_is_associative_but_for_interpolation(shape, largest, tolerance):
    a, b, c = (smooth_field(shape, largest, seed=s, tapered=True) for s in (1, 2, 3))
    torch.testing.assert_close(
        compose(compose(a, b), c), compose(a, compose(b, c)), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(16, 24), (17, 9), (11, 13, 8), (5, 6, 7)], ids=str)
def test_linear_fields_survive_down_and_up(shape, factor, dtype):
    u = affine_field(shape, *random_affine(shape)).to(dtype).expand(3, -1, *(-1,) * len(shape))
    coarse = downsample_field(u, factor)
    assert coarse.shape[2:] == torch.Size(-(-n // factor) for n in shape)
    torch.testing.assert_close(upsample_field(coarse, factor, shape), u, rtol=0, atol=1e-5)


def test_a_level_of_one_voxel_carries_a_translation():
    u = torch.full((1, 2, 3, 4), 1.5)
    coarse = downsample_field(u, 4)
    assert coarse.shape == (1, 2, 1, 1)
    assert coarse.eq(1.5 / 4).all()
    assert upsample_field(coarse, 4, (3, 4)).equal(u)


def test_an_axis_of_one_voxel_stays():
    u = affine_field((1, 9), *random_affine((1, 9)))
    torch.testing.assert_close(upsample_field(downsample_field(u, 2), 2, (1, 9)), u)
    torch.testing.assert_close(resize_field_corners(u, (1, 17))[..., ::2], u * corners((1, 2)))


def corners(scale):
    return torch.tensor(scale, dtype=torch.float64).view(1, -1, *(1,) * len(scale))


@pytest.mark.parametrize(
    ("shape", "new"), [((5, 9), (9, 17)), ((5, 9), (3, 4)), ((4, 6, 5), (7, 3, 11))], ids=str
)
def test_corner_to_corner_resizing(shape, new):
    """Corner voxels coincide, vectors scale by (N' - 1) / (N - 1); SciPy's zoom does the same."""
    u = torch.from_numpy(np.random.default_rng(0).random((2, len(shape), *shape)))
    ours = resize_field_corners(u, new)
    scale = [(m - 1) / (n - 1) for n, m in zip(shape, new, strict=True)]
    zoom = (1, 1, *(m / n for n, m in zip(shape, new, strict=True)))
    expected = torch.from_numpy(ndimage.zoom(u.numpy(), zoom, order=1)) * corners(scale)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    # phi of the corner is the corner of the new grid plus the vector in its own voxels.
    last = (..., *(-1,) * len(shape))
    torch.testing.assert_close(ours[last], u[last] * torch.tensor(scale, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)], ids=str)
def test_gradients_with_respect_to_every_field(shape):
    """Fractions in [0.2, 0.8]: every voxel looks at the middle of a cell inside the grid."""
    rng = np.random.default_rng(0)
    size = np.array(shape).reshape(-1, *(1,) * len(shape))
    whole = rng.integers(0, size - 1, (2, len(shape), *shape))
    b = torch.from_numpy(whole + rng.uniform(0.2, 0.8, whole.shape) - np.indices(shape))
    a = torch.from_numpy(rng.random((2, len(shape), *shape))).requires_grad_()
    b.requires_grad_()
    small = torch.full_like(a, 0.02).requires_grad_()
    double = [2 * n - 1 for n in shape]
    assert torch.autograd.gradcheck(compose, (a, b), fast_mode=True)
    assert torch.autograd.gradcheck(lambda u: downsample_field(u, 2), (a,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda u: upsample_field(u, 2, double), (a,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda u: resize_field_corners(u, double), (a,), fast_mode=True)
    # One squaring of a nearly constant velocity: no sample comes near a voxel.
    assert torch.autograd.gradcheck(
        lambda v: integrate(0.4 + v * 0.1, steps=1), (small,), fast_mode=True
    )


def interior(shape, margin):
    return (..., *(slice(margin, n - margin) for n in shape))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_identity_is_its_own_inverse(shape, batch):
    still = torch.zeros(batch, len(shape), *shape)
    found = invert(still)
    assert found.field.equal(still)
    assert found.error.equal(torch.zeros(batch))
    assert found.converged.all()
    assert inverse_consistency(still, still).equal(torch.zeros(batch, *shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_translation_is_taken_back(shape):
    u = torch.full((2, len(shape), *shape), 1.5)
    u[1] = 200
    found = invert(u)
    torch.testing.assert_close(found.field, -u)
    # The second sample leaves the grid as a whole: nothing is known about its inverse.
    assert found.error[0] < 1e-3
    assert found.error[1].isnan()
    assert found.converged.tolist() == [True, False]


@pytest.mark.parametrize("handed", [1.0, -0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_inverse_of_an_affine_map_is_that_of_its_matrix(shape, handed):
    """Eigenvalues of u up to 2 and down to -0.6: plain fixed points diverge beyond 1."""
    d = len(shape)
    matrix = torch.diag(torch.tensor([2.0, 0.5, -0.3][:d], dtype=torch.float64)) * handed
    matrix[0, 1], matrix[1, 0] = 0.2, -0.2
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    u = affine_field(shape, matrix, -matrix @ centre)
    eye = torch.eye(d, dtype=torch.float64)
    back = torch.linalg.inv(eye + matrix) - eye
    expected = affine_field(shape, back, -back @ centre)
    found = invert(u, tolerance=1e-6, iterations=200)
    source = identity_grid(shape, dtype=torch.float64) + expected
    last = torch.tensor(shape).view(1, d, *(1,) * d) - 1
    inside = ((source >= 0) & (source <= last)).all(1)[0]
    assert inside.sum() > 20
    torch.testing.assert_close(found.field[..., inside], expected[..., inside], rtol=0, atol=1e-5)
    assert found.converged.all()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "size"), [((64, 60), 3.0), ((24, 26, 22), 2.0)], ids=str)
def test_the_error_is_what_composing_shows(shape, size, batch):
    u = smooth_field(shape, size, batch=batch, tapered=True)
    found = invert(u)
    assert found.converged.all()
    around = inverse_consistency(u, found.field)
    torch.testing.assert_close(around.flatten(1).amax(1), found.error, rtol=0, atol=1e-12)
    assert found.error.max() <= 1e-3
    # The other way round the inverse is read between its voxels, at the price of interpolation.
    assert inverse_consistency(found.field, u).max() < 0.2
    tight = invert(u, tolerance=1e-9)
    assert tight.converged.all()
    assert tight.error.max() <= 1e-9


@pytest.mark.parametrize(("shape", "tolerance"), [((64, 60), 0.08), ((24, 26, 22), 0.15)], ids=str)
def test_the_inverse_of_exp_v_is_exp_of_minus_v(shape, tolerance):
    """To what scaling and squaring itself is off by (see above)."""
    velocity = smooth_field(shape, 3.0, batch=2, tapered=True)
    found = invert(integrate(velocity)).field
    torch.testing.assert_close(found, integrate(-velocity), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("shape", "size"), [((64, 60), 3.0), ((24, 26, 22), 2.0)], ids=str)
def test_the_inverse_equals_itk(shape, size):
    u = smooth_field(shape, size, tapered=True)
    vectors = np.ascontiguousarray(np.moveaxis(u[0].numpy()[::-1], 0, -1))
    itk = sitk.InvertDisplacementField(
        sitk.GetImageFromArray(vectors, isVector=True),
        maximumNumberOfIterations=2000,
        maxErrorToleranceThreshold=1e-6,
        meanErrorToleranceThreshold=1e-9,
    )
    expected = np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0)[::-1]
    ours = invert(u, tolerance=1e-6).field[0].numpy()
    inside = interior(shape, 4)
    assert np.abs(ours[inside]).max() > size / 2
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_folded_map_has_no_inverse_and_that_is_said(shape):
    """Sample 0 is smooth, sample 1 folds a third of the grid over, sample 2 is broken."""
    u = smooth_field(shape, 1.0, batch=3, tapered=True)
    u[1] = smooth_field(shape, 15.0, sigma=2.0)[0]
    u[2, 0, 5, 5] = torch.nan
    found = invert(u)
    assert found.converged.tolist() == [True, False, False]
    assert found.error[1] > 0.5
    assert found.error[2].isnan()
    # The others of a batch change nothing.
    alone = invert(u[:1])
    assert alone.field.equal(found.field[:1])
    assert alone.error.equal(found.error[:1])


def test_too_few_iterations_are_seen():
    u = smooth_field((40, 36), 3.0)
    found = invert(u, iterations=1)
    assert not found.converged.any()
    torch.testing.assert_close(found.field, -u)
    assert (invert(u, iterations=2).error < found.error).all()


def test_the_inverse_keeps_the_dtype_and_no_graph():
    u = smooth_field((20, 16), 1.0).to(torch.bfloat16).requires_grad_()
    found = invert(u)
    assert found.field.dtype == torch.bfloat16
    assert not found.field.requires_grad


@pytest.mark.parametrize(("shape", "spacing"), [((9, 7), (2.0, 0.5)), ((6, 8, 5), (2.0, 0.5, 3.0))])
def test_inverse_consistency_in_mm(shape, spacing):
    """1 voxel there, 3 voxels back: 2 voxels too far along every axis."""
    a = torch.ones(2, len(shape), *shape, dtype=torch.float64)
    miss = inverse_consistency(a, -3 * a, spacing=spacing)
    assert miss.shape == (2, *shape)
    expected = 2 * sum(s**2 for s in spacing) ** 0.5
    torch.testing.assert_close(miss, torch.full_like(miss, expected))


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)], ids=str)
def test_inverse_consistency_has_gradients(shape):
    rng = np.random.default_rng(0)
    size = np.array(shape).reshape(-1, *(1,) * len(shape))
    whole = rng.integers(0, size - 1, (2, len(shape), *shape))
    b = torch.from_numpy(whole + rng.uniform(0.2, 0.8, whole.shape) - np.indices(shape))
    a = torch.from_numpy(rng.random((2, len(shape), *shape)))
    assert torch.autograd.gradcheck(
        inverse_consistency, (a.requires_grad_(), b.requires_grad_()), fast_mode=True
    )


@pytest.mark.parametrize(
    ("shape", "sigma", "amplitude"),
    [((96, 80), 15, 14.0), ((128, 128), 4, 9.0), ((48, 40, 44), 10, 14.0), ((64, 64, 60), 4, 8.0)],
    ids=str,
)
def test_large_turning_diffeomorphisms_are_inverted(shape, sigma, amplitude):
    # det J goes down to 0.15 and vectors turn: full steps zigzag there, and small ones never end.
    generator = torch.Generator().manual_seed(9)
    phi = gaussian_diffeomorphism(
        shape, batch=2, sigma=sigma, amplitude=amplitude, generator=generator
    ).field
    inverse = invert(phi)
    assert inverse.converged.all()
    edge = int(amplitude) + 1
    inside = (slice(None), *(slice(edge, -edge) for _ in shape))
    assert inverse_consistency(phi, inverse.field)[inside].max() < 2e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_points_are_carried_back_to_where_they_came_from(shape):
    u = smooth_field(shape, 3.0, batch=3)
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(shape, dtype=torch.float64) - 1
    points = torch.rand(3, 50, len(shape), generator=generator, dtype=torch.float64) * size
    found = invert_points(warp_points(points, u), u, tolerance=1e-9)
    assert (found.error < 1e-9).all()
    # The field is invertible, so there is one origin; the inverse stretches an error some times.
    torch.testing.assert_close(found.fixed_points, points, rtol=0, atol=1e-7)
    alone = invert_points(warp_points(points, u)[1:2], u[1:2], tolerance=1e-9)
    assert torch.equal(alone.fixed_points[0], found.fixed_points[1])
    still = invert_points(points, torch.zeros_like(u))
    assert torch.equal(still.fixed_points, points)


def test_a_point_of_a_fold_is_found_again_and_one_out_of_reach_is_not():
    # Along the first axis phi is 0, 2, 4, 3, 2, 4, 6, ...: 3.5 has three origins.
    there = torch.tensor([0.0, 2, 4, 3, 2, 4, 6, 7, 8, 9], dtype=torch.float64)
    u = torch.zeros(1, 2, 10, 8, dtype=torch.float64)
    u[0, 0] = (there - torch.arange(10)).unsqueeze(1)
    goal = torch.tensor([[[3.5, 4.0], [4.0, 2.0], [8.5, 3.0]]], dtype=torch.float64)
    found = invert_points(goal, u)
    torch.testing.assert_close(warp_points(found.fixed_points, u), goal, rtol=0, atol=1e-3)
    # A field that takes every voxel to one place reaches no other.
    u[0, 0], u[0, 1] = 5 - torch.arange(10.0).unsqueeze(1), 5 - torch.arange(8.0)
    lost = invert_points(goal[:, :1], u)
    assert lost.error.item() == pytest.approx(((3.5 - 5) ** 2 + (4 - 5) ** 2) ** 0.5)


@pytest.mark.parametrize(
    ("points", "options", "match"),
    [
        (torch.zeros(2, 3, 2), {}, "moving_points, field: wanted the same batch"),
        (torch.zeros(1, 3, 3), {}, "moving_points: wanted"),
        (torch.zeros(1, 3, 2), {"tolerance": 0.0}, "tolerance: wanted"),
        (torch.zeros(1, 3, 2), {"iterations": 0}, "iterations: wanted"),
    ],
)
def test_bad_input_of_invert_points(points, options, match):
    with pytest.raises(ValueError, match=match):
        invert_points(points, torch.zeros(1, 2, 5, 6), **options)


def parallel_grids(d, *, turn=0.4):
    """An oblique grid and one with its axes in another order and direction, offset and finer."""
    angle = torch.tensor(turn, dtype=torch.float64)
    axes = torch.eye(d, dtype=torch.float64)
    axes[:2, :2] = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    old, new = torch.eye(d + 1, dtype=torch.float64), torch.eye(d + 1, dtype=torch.float64)
    old[:d, :d] = axes * torch.tensor([1.5, 2.0, 3.0][:d])
    old[:d, d] = torch.tensor([-40.0, 25.0, 60.0][:d])
    order = [1, 2, 0][:d] if d == 3 else [1, 0]
    new[:d, :d] = axes[:, order] * torch.tensor([-1.1, 0.7, 2.3][:d])
    new[:d, d] = old[:d, d] + axes @ torch.tensor([3.3, 8.1, 5.7][:d], dtype=torch.float64)
    return old, new


def world_field(affine, shape, vectors):
    """A displacement in mm, a function of mm, in voxels of a grid: ``(1, D, *S)``."""
    d = len(shape)
    voxels = torch.from_numpy(np.indices(shape).reshape(d, -1).T.astype(float))
    mm = vectors(voxels @ affine[:d, :d].T + affine[:d, d])
    return torch.linalg.solve(affine[:d, :d], mm.T).reshape(1, d, *shape)


def linear_vectors(d, seed=0):
    matrix = torch.from_numpy(np.random.default_rng(seed).uniform(-0.2, 0.2, (d, d)))
    return lambda mm: mm @ matrix.T + torch.arange(d) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "new_shape"), [((9, 7), (16, 12)), ((6, 5, 7), (7, 9, 4))])
def test_a_linear_field_is_carried_exactly_beyond_the_border_too(shape, new_shape, batch, dtype):
    """The same displacement in mm at every place, axes permuted, flipped and scaled.

    To the rounding of fields of 20 voxels at places 100 voxels from the origin.
    """
    d = len(shape)
    old, new = parallel_grids(d)
    parts = [linear_vectors(d, seed) for seed in range(batch)]
    u = torch.cat([world_field(old, shape, v) for v in parts]).to(dtype)
    expected = torch.cat([world_field(new, new_shape, v) for v in parts])
    carried = carry_field(u, old, new, new_shape)
    assert carried.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(carried.double(), expected, rtol=0, atol=tolerance)
    # Some of the new grid lies beyond the old one.
    corners = torch.tensor([[0.0] * d, [n - 1.0 for n in new_shape]]).double()
    there = torch.linalg.solve(old[:d, :d], (corners @ new[:d, :d].T + (new - old)[:d, d]).T).T
    assert (there < -1).any() or (there > torch.tensor(shape)).any()


@pytest.mark.parametrize(
    ("order", "flips"),
    [((1, 0), (1, 1)), ((0, 1), (-1, 1)), ((2, 0, 1), (1, -1, -1)), ((0, 2, 1), (-1, 1, 1))],
)
def test_turning_the_axes_moves_the_vectors_with_them(order, flips):
    """Node for node the same vector in mm, bit for bit but for signs, and back again."""
    d = len(order)
    shape = (4, 6, 5)[:d]
    old, _ = parallel_grids(d)
    u = torch.from_numpy(np.random.default_rng(0).standard_normal((2, d, *shape)))
    linear = old[:d, list(order)] * torch.tensor(flips)
    first = [0 if f > 0 else shape[a] - 1 for a, f in zip(order, flips, strict=True)]
    new = old.clone()
    new[:d, :d] = linear
    new[:d, d] += old[:d, list(order)] @ torch.tensor(first).double()
    new_shape = [shape[a] for a in order]
    carried = carry_field(u, old, new, new_shape)
    turned = u.permute(0, 1, *(a + 2 for a in order))[:, list(order)]
    turned = turned.flip([c + 2 for c, f in enumerate(flips) if f < 0])
    turned = turned * torch.tensor(flips).view(1, d, *(1,) * d)
    torch.testing.assert_close(carried, turned, rtol=0, atol=1e-12)
    torch.testing.assert_close(carry_field(carried, new, old, shape), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("shape", [(17, 9), (11, 13, 8)], ids=str)
def test_carrying_to_a_pooled_grid_and_back_is_the_step_between_pyramid_levels(shape, factor):
    d = len(shape)
    fine, _ = parallel_grids(d)
    coarse = fine.clone()
    coarse[:d, :d] *= factor
    coarse[:d, d] += fine[:d, :d] @ torch.full((d,), (factor - 1) / 2, dtype=torch.float64)
    u = smooth_field(shape, 2.0, batch=2)
    down = downsample_field(u, factor)
    torch.testing.assert_close(
        carry_field(u, fine, coarse, down.shape[2:]), down, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        carry_field(down, coarse, fine, shape),
        upsample_field(down, factor, shape),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_carried_field_leads_to_the_same_places(shape):
    """Half a voxel apart, a smooth field is what SciPy reads there, in mm; nothing is smoothed."""
    d = len(shape)
    old, _ = parallel_grids(d)
    new = old.clone()
    new[:d, d] += old[:d, :d] @ torch.full((d,), 0.5, dtype=torch.float64)
    u = smooth_field(shape, 3.0)
    new_shape = [n - 1 for n in shape]
    places = np.indices(new_shape) + 0.5
    expected = np.stack([ndimage.map_coordinates(c, places, order=1) for c in u[0].numpy()])
    carried = carry_field(u, old, new, new_shape)
    np.testing.assert_allclose(carried[0].numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", [2, 3])
def test_a_field_is_carried_to_its_own_grid_as_it_is(d):
    old, _ = parallel_grids(d)
    u = torch.ones(1, d, *(3, 4, 5)[:d])
    assert carry_field(u, old, old.clone(), u.shape[2:]) is u


def test_an_axis_of_one_voxel_is_constant_along_itself():
    old = torch.eye(4, dtype=torch.float64)
    new = torch.diag(torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64))
    u = smooth_field((6, 5), 2.0).unsqueeze(-1)
    u = torch.cat([u, torch.ones_like(u[:, :1])], 1)
    carried = carry_field(u, old, new, (6, 5, 3))
    expected = u.expand(-1, -1, -1, -1, 3) * torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(carried, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)], ids=str)
def test_carrying_has_gradients(shape):
    d = len(shape)
    old, new = parallel_grids(d)
    u = torch.from_numpy(np.random.default_rng(0).random((2, d, *shape))).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: carry_field(f, old, new, (4, 3, 5)[:d]), (u,))


def test_what_cannot_be_carried_is_named():
    u = torch.zeros(1, 2, 4, 5)
    eye = torch.eye(3)
    turned = parallel_grids(2)[0]
    slanted = eye.clone()
    slanted[0, 1] = 0.01
    for other in (turned, slanted):
        with pytest.raises(ValueError, match="affine, new_affine: wanted grids with parallel axes"):
            carry_field(u, eye, other, (4, 5))
    with pytest.raises(ValueError, match="new_shape"):
        carry_field(u, eye, eye, (4, 5, 6))
    with pytest.raises(TypeError, match="new_shape"):
        carry_field(u, eye, eye, (4.0, 5.0))
    with pytest.raises(ValueError, match="new_affine: wanted a 3 x 3 matrix"):
        carry_field(u, eye, torch.eye(4), (4, 5))
    with pytest.raises(ValueError, match=r"^affine: wanted axes that span space"):
        carry_field(u, torch.diag(torch.tensor([1.0, 0.0, 1.0])), eye, (4, 5))
    with pytest.raises(ValueError, match="field: wanted a field"):
        carry_field(u[:, :1], eye, eye, (4, 5))
    with pytest.raises(TypeError, match=r"field: wanted a torch\.Tensor"):
        carry_field(u.numpy(), eye, eye, (4, 5))
