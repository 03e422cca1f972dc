"""B-spline lattices against SimpleITK, SciPy and a plain loop, and what must be exact."""

from itertools import product

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.interpolate import BSpline

from reglib.geometry.bspline import (
    bspline_field,
    cubic_weights,
    fit_lattice,
    lattice_shape,
    quadratic_weights,
    refine_lattice,
)
from reglib.geometry.fields import downsample_field
from reglib.geometry.smoothing import pool

#: Shapes and strides: equal and not, grids that end between, on and right after a control point.
GRIDS = [
    ((9, 12), 4),
    ((11, 8), (2, 5)),
    ((1, 7), (3, 1)),
    ((6, 7, 9), 3),
    ((5, 9, 6), (4, 2, 1)),
    ((3, 4, 2), 7),
]
EVEN = [((9, 12), 4), ((11, 8), (2, 6)), ((5, 9, 6), (4, 1, 2)), ((6, 7, 3), 8), ((1, 4), 2)]


def strides_of(shape, stride):
    return (stride,) * len(shape) if isinstance(stride, int) else stride


def random_lattice(shape, stride, batch=2, dtype=torch.float64):
    rng = np.random.default_rng(0)
    lattice = rng.normal(size=(3, len(shape), *lattice_shape(shape, stride)))[:batch]
    return torch.from_numpy(lattice).to(dtype)


def spline(lattice, positions, strides):
    """The field of a lattice ``(B, D, *L)`` at a grid of real positions, by SciPy."""
    out = np.asarray(lattice)
    for axis, (x, s) in enumerate(zip(positions, strides, strict=True), start=2):
        # SciPy wants a cell: one voxel has none, and the fourth control point no weight there.
        points = np.moveaxis(out, axis, 0)
        points = np.concatenate([points, np.zeros((max(4 - len(points), 0), *points.shape[1:]))])
        # The basis function of control point k begins at s (k - 3) and has its centre at s (k - 1).
        knots = s * (np.arange(len(points) + 4) - 3.0)
        out = np.moveaxis(BSpline(knots, points, 3)(x), 0, axis)
    return out


@pytest.mark.parametrize(("shape", "stride"), GRIDS, ids=str)
def test_the_field_is_that_of_scipy(shape, stride):
    lattice = random_lattice(shape, stride)
    expected = spline(lattice, [np.arange(n) for n in shape], strides_of(shape, stride))
    ours = bspline_field(lattice, shape, stride)
    assert ours.shape == (2, len(shape), *shape)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "stride"), [g for g in GRIDS if 1 not in g[0]], ids=str
)  # ITK has no mesh without a cell
def test_the_field_is_that_of_simpleitk(shape, stride, dtype):
    """Axis k of ITK is axis k here; its coefficients run along the first axis fastest."""
    lattice = random_lattice(shape, stride, batch=1, dtype=dtype)
    strides, mesh = strides_of(shape, stride), [n - 3 for n in lattice.shape[2:]]
    transform = sitk.BSplineTransform(len(shape), 3)
    transform.SetTransformDomainOrigin([0.0] * len(shape))
    transform.SetTransformDomainMeshSize(mesh)
    transform.SetTransformDomainPhysicalDimensions(
        [float(m * s) for m, s in zip(mesh, strides, strict=True)]
    )
    coefficients = [c.numpy().astype(float).flatten(order="F") for c in lattice[0]]
    transform.SetParameters(np.concatenate(coefficients).tolist())
    ours = bspline_field(lattice, shape, stride)[0].numpy()
    for at in np.ndindex(*shape):
        moved = transform.TransformPoint([float(i) for i in at])
        np.testing.assert_allclose(ours[:, *at], np.subtract(moved, at), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "stride"), [((6, 5), (3, 2)), ((3, 4, 5), 2)], ids=str)
def test_the_field_is_the_sum_over_all_control_points(shape, stride):
    """The textbook: each at stride (k - 1), times the cubic B-spline of the distance."""

    def bump(x):
        x = abs(x)
        return 2 / 3 - x**2 + x**3 / 2 if x < 1 else max(2 - x, 0) ** 3 / 6

    lattice = random_lattice(shape, stride, batch=1)
    expected = np.zeros((1, len(shape), *shape))
    for at, k in product(np.ndindex(*shape), np.ndindex(*lattice.shape[2:])):
        weights = [
            bump(i / s - (j - 1)) for i, j, s in zip(at, k, strides_of(shape, stride), strict=True)
        ]
        expected[:, :, *at] += lattice[:, :, *k].numpy() * np.prod(weights)
    ours = bspline_field(lattice, shape, stride)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "stride"), GRIDS, ids=str)
def test_a_product_of_cubic_polynomials_is_met_exactly_to_the_last_voxel(shape, stride):
    """Control points hold f - s^2 f'' / 6 at their places: exact up to the third degree."""
    polynomials = [np.polynomial.Polynomial([1.0, -0.5, 0.2, -0.01 * (a + 1)]) for a in range(3)]
    lattice = np.ones((1, len(shape), *lattice_shape(shape, stride)))
    expected = np.ones((1, len(shape), *shape))
    for axis, (f, s) in enumerate(zip(polynomials, strides_of(shape, stride), strict=False)):
        view = [-1 if a == axis + 2 else 1 for a in range(lattice.ndim)]
        k = s * (np.arange(lattice.shape[axis + 2]) - 1.0)
        lattice = lattice * (f(k) - s**2 / 6 * f.deriv(2)(k)).reshape(view)
        expected = expected * f(np.arange(shape[axis])).reshape(view)
    ours = bspline_field(torch.from_numpy(lattice), shape, stride)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "stride"), GRIDS, ids=str)
def test_the_lattice_has_no_point_too_few_and_none_too_many(shape, stride):
    """A constant lattice gives that constant everywhere, and every point moves some voxel."""
    points = lattice_shape(shape, stride)
    ones = torch.ones(1, len(shape), *points, dtype=torch.float64)
    field = bspline_field(ones, shape, stride)
    torch.testing.assert_close(field, torch.ones_like(field))
    assert bspline_field(0 * ones, shape, stride).eq(0).all()
    lattice = torch.zeros_like(ones).requires_grad_()
    bspline_field(lattice, shape, stride).sum().backward()
    assert (lattice.grad > 0).all()
    assert lattice_shape(shape, strides_of(shape, stride)) == points


@pytest.mark.parametrize(("shape", "stride"), EVEN, ids=str)
def test_half_the_stride_gives_the_same_field(shape, stride):
    lattice = random_lattice(shape, stride)
    halves = [max(s // 2, 1) for s in strides_of(shape, stride)]
    finer = refine_lattice(lattice, shape, stride)
    assert tuple(finer.shape[2:]) == lattice_shape(shape, halves)
    torch.testing.assert_close(
        bspline_field(finer, shape, halves),
        bspline_field(lattice, shape, stride),
        rtol=0,
        atol=1e-12,
    )
    again = refine_lattice(lattice.float(), shape, stride)
    assert again.dtype == torch.float32


def test_a_lattice_can_be_refined_to_a_stride_of_one_voxel():
    shape, lattice = (9, 14), random_lattice((9, 14), 8)
    expected = bspline_field(lattice, shape, 8)
    for stride in (8, 4, 2):
        lattice = refine_lattice(lattice, shape, stride)
    torch.testing.assert_close(bspline_field(lattice, shape, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize(("shape", "stride"), GRIDS, ids=str)
def test_a_pyramid_level_reads_the_same_spline_at_its_nodes(shape, stride, factor):
    """Node i sits at factor i + (factor - 1) / 2; vectors are in the level's voxels."""
    lattice, strides = random_lattice(shape, stride), strides_of(shape, stride)
    nodes = [factor * np.arange(-(-n // factor)) + (factor - 1) / 2 for n in shape]
    ends = [s * (n - 3) for n, s in zip(lattice.shape[2:], strides, strict=True)]
    ours = bspline_field(lattice, shape, stride, factor=factor).numpy()
    assert ours.shape[2:] == pool(torch.zeros(1, 1, *shape), factor).shape[2:]
    inside = [x[x <= end] for x, end in zip(nodes, ends, strict=True)]
    expected = spline(lattice, inside, strides) / factor
    there = (..., *(slice(len(x)) for x in inside))
    np.testing.assert_allclose(ours[there], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize(("shape", "stride"), GRIDS, ids=str)
def test_a_linear_field_is_linear_on_every_level(shape, stride, factor):
    """Also where the last node of the level lies beyond the last voxel, and the last cell."""
    strides = strides_of(shape, stride)
    slopes = np.arange(1, len(shape) ** 2 + 1).reshape(len(shape), len(shape)) / 10
    k = [
        s * (np.arange(n) - 1.0) for n, s in zip(lattice_shape(shape, stride), strides, strict=True)
    ]
    control = np.einsum("ca,a...->c...", slopes, np.array(np.meshgrid(*k, indexing="ij"))) + 1
    voxels = np.einsum("ca,a...->c...", slopes, np.indices(shape)) + 1
    lattice, field = (torch.from_numpy(x)[None] for x in (control, voxels))
    level = bspline_field(lattice, shape, stride, factor=factor)
    single = [n == 1 for n in shape]
    if not any(single):  # along one voxel, a dense field has no slope to go on with
        torch.testing.assert_close(level, downsample_field(field, factor), rtol=0, atol=1e-12)
    x = np.stack(
        np.meshgrid(
            *(factor * np.arange(n) + (factor - 1) / 2 for n in level.shape[2:]), indexing="ij"
        )
    )
    expected = (np.einsum("ca,a...->c...", slopes, x) + 1) / factor
    np.testing.assert_allclose(level[0].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "stride"), [((9, 12), 4), ((11, 8), (2, 5)), ((6, 5, 7), 3)])
def test_a_fitted_lattice_is_the_least_squares_solution(shape, stride):
    """By numpy.linalg.lstsq on the matrix of the whole problem, one column per control point."""
    points = lattice_shape(shape, stride)
    columns = torch.eye(int(np.prod(points)), dtype=torch.float64).reshape(-1, *points)
    d = len(shape)
    lattices = columns.unsqueeze(1).expand(-1, d, *points)
    design = bspline_field(lattices, shape, stride)[:, 0].flatten(1).T.numpy()
    field = torch.from_numpy(np.random.default_rng(1).normal(size=(2, d, *shape)))
    ours = fit_lattice(field, stride)
    expected, *_ = np.linalg.lstsq(design, field.flatten(2).reshape(2 * d, -1).T.numpy())
    np.testing.assert_allclose(
        ours.flatten(2).reshape(2 * d, -1).T.numpy(), expected, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize(("shape", "stride"), GRIDS, ids=str)
def test_the_field_of_a_lattice_is_fitted_exactly(shape, stride):
    field = bspline_field(random_lattice(shape, stride), shape, stride)
    again = bspline_field(fit_lattice(field, stride), shape, stride)
    torch.testing.assert_close(again, field, rtol=0, atol=1e-9)
    single = bspline_field(fit_lattice(field.float(), stride), shape, stride)
    torch.testing.assert_close(single.double(), field, rtol=0, atol=1e-3)


def test_window_weights_are_the_splines_and_their_derivatives():
    t = torch.linspace(0, 1, 101, dtype=torch.float64).requires_grad_()
    cubic, quadratic = cubic_weights(t), quadratic_weights(t)
    for degree, weights in ((3, cubic), (2, quadratic)):
        element = BSpline.basis_element(np.arange(degree + 2.0), extrapolate=False)
        for k, w in enumerate(weights):
            expected = np.nan_to_num(element(t.detach().numpy() + degree - k))
            np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=1e-14)
            assert (w >= 0).all()
        torch.testing.assert_close(sum(weights), torch.ones_like(t))
    c = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    [slope] = torch.autograd.grad((torch.stack(cubic, 1) @ c).sum(), t)
    torch.testing.assert_close(slope, torch.stack(quadratic, 1).detach() @ c.diff())


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "stride"), EVEN[:3], ids=str)
def test_a_batch_gives_what_its_samples_give_alone(shape, stride, batch):
    lattices = random_lattice(shape, stride, batch)
    fields = bspline_field(lattices, shape, stride)
    for function, x in [
        (lambda x: bspline_field(x, shape, stride, factor=2), lattices),
        (lambda x: refine_lattice(x, shape, stride), lattices),
        (lambda x: fit_lattice(x, stride), fields),
    ]:
        together = function(x)
        assert len(together) == batch
        for i in range(batch):
            torch.testing.assert_close(together[i : i + 1], function(x[i : i + 1]))


@pytest.mark.parametrize(("shape", "stride"), [((5, 4), (2, 4)), ((3, 4, 2), 2)], ids=str)
def test_gradients_and_second_gradients(shape, stride):
    lattice = random_lattice(shape, stride, batch=1).requires_grad_()
    field = torch.rand(1, len(shape), *shape, dtype=torch.float64).requires_grad_()
    for function, x in [
        (lambda x: bspline_field(x, shape, stride), lattice),
        (lambda x: bspline_field(x, shape, stride, factor=2), lattice),
        (lambda x: refine_lattice(x, shape, stride), lattice),
        (lambda x: fit_lattice(x, stride), field),
    ]:
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x) ** 2, (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_not_round_the_field_nor_the_gradient(dtype):
    """bfloat16 would move a voxel at 100 by half a voxel."""
    shape, stride = (30, 40), 5
    lattice = 20 * random_lattice(shape, stride, dtype=dtype)
    exact = lattice.double().requires_grad_()
    expected = bspline_field(exact, shape, stride)
    weights = torch.rand_like(expected)
    (expected * weights).sum().backward()
    lattice.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        field = bspline_field(lattice, shape, stride)
        (field * weights).sum().backward()
    assert field.dtype == lattice.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(field.double(), expected, rtol=2 * eps, atol=4e-5)
    torch.testing.assert_close(lattice.grad.double(), exact.grad, rtol=8 * eps, atol=8 * eps)


def test_bad_input():
    lattice = random_lattice((9, 12), 4)
    with pytest.raises(
        ValueError, match=r"^lattice: wanted \(5, 6\) control points .* got \(5, 7\)"
    ):
        bspline_field(torch.rand(1, 2, 5, 7), (9, 12), 4)
    with pytest.raises(ValueError, match=r"^lattice: wanted a field \(B, D, \*S\)"):
        bspline_field(torch.rand(1, 3, 5, 6), (9, 12), 4)
    with pytest.raises(TypeError, match=r"^lattice: wanted a torch\.Tensor, got"):
        refine_lattice(lattice.numpy(), (9, 12), 4)
    with pytest.raises(ValueError, match=r"^shape: wanted 2 positive integers, got \(9, 12, 3\)"):
        bspline_field(lattice, (9, 12, 3), 4)
    with pytest.raises(TypeError, match=r"^stride: wanted an integer, got float"):
        bspline_field(lattice, (9, 12), 4.0)
    with pytest.raises(TypeError, match=r"^stride: wanted an integer, got NoneType"):
        lattice_shape((9, 12), None)
    with pytest.raises(ValueError, match=r"^stride: wanted at least 1, got 0"):
        lattice_shape((9, 12), (4, 0))
    with pytest.raises(
        ValueError, match=r"^stride: wanted an integer or 2 of them, got \(4, 4, 4\)"
    ):
        fit_lattice(torch.rand(1, 2, 9, 12), (4, 4, 4))
    with pytest.raises(ValueError, match=r"^stride: wanted even numbers .* got \(4, 3\)"):
        refine_lattice(random_lattice((9, 12), (4, 3)), (9, 12), (4, 3))
    with pytest.raises(ValueError, match=r"^factor: wanted at least 1, got 0"):
        bspline_field(lattice, (9, 12), 4, factor=0)
    with pytest.raises(ValueError, match=r"^field: wanted a field"):
        fit_lattice(torch.rand(1, 1, 9, 12), 4)
    with pytest.raises(ValueError, match=r"^shape: wanted 2 or 3 positive integers"):
        lattice_shape((9,), 4)
