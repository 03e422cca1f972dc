"""Gradients, Jacobians and determinants against closed forms, NumPy and ITK."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from reglib.geometry.derivatives import digital_determinants, gradient, jacobian, jacobian_det
from reglib.geometry.grid import identity_grid
from reglib.objectives.metrics import folding

SHAPES = [(9, 7), (6, 8, 5)]


def random_field(shape, size=0.6, batch=2, seed=0):
    noise = np.random.default_rng(seed).normal(0, size, (batch, len(shape), *shape))
    return torch.from_numpy(noise)


def affine_field(shape, matrix):
    """u(x) = (matrix - 1)(x - centre)."""
    d = len(shape)
    x = identity_grid(shape, dtype=torch.float64)
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    change = matrix - torch.eye(d, dtype=torch.float64)
    return torch.einsum("ij,bj...->bi...", change, x - centre.view(1, d, *(1,) * d))


def rotation(dimensions, angle):
    """Turns the last two axes."""
    matrix = torch.eye(dimensions, dtype=torch.float64)
    c, s = math.cos(angle), math.sin(angle)
    matrix[-2:, -2:] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return matrix


def inside(shape, border=1):
    return (..., *(slice(border, n - border) for n in shape))


@pytest.mark.parametrize("spacing", [None, (0.5, 2.0, 3.0)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3), (2, 2, 5)], ids=str)
def test_gradient_equals_numpy(shape, spacing):
    x = torch.from_numpy(np.random.default_rng(0).random((2, 3, *shape)))
    step = None if spacing is None else spacing[: len(shape)]
    ours = gradient(x, spacing=step).numpy()
    assert ours.shape == (2, 3, len(shape), *shape)
    axes = tuple(range(2, 2 + len(shape)))
    expected = np.stack(np.gradient(x.numpy(), *(step or (1,) * len(shape)), axis=axes), axis=2)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_gradient_along_an_axis_of_one_voxel_is_zero():
    slopes = gradient(torch.rand(2, 1, 1, 5))
    assert slopes[:, :, 0].eq(0).all()
    assert slopes[:, :, 1].ne(0).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_identity_has_the_unit_jacobian(shape, batch):
    still = torch.zeros(batch, len(shape), *shape)
    eye = torch.eye(len(shape)).view(1, *2 * (len(shape),), *(1,) * len(shape))
    assert jacobian(still).equal(eye.expand(batch, -1, -1, *shape))
    assert jacobian_det(still).equal(torch.ones(batch, *shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotations_keep_volumes_and_scalings_multiply_them(shape):
    d = len(shape)
    turn = rotation(d, 0.7)
    j = jacobian(affine_field(shape, turn))
    torch.testing.assert_close(j, turn.view(1, d, d, *(1,) * d).expand_as(j))
    det = jacobian_det(affine_field(shape, turn))
    torch.testing.assert_close(det, torch.ones_like(det))
    det = jacobian_det(affine_field(shape, 1.3 * turn))
    torch.testing.assert_close(det, torch.full_like(det, 1.3**d))
    mirror = torch.eye(d, dtype=torch.float64)
    mirror[0, 0] = -1
    assert jacobian_det(affine_field(shape, mirror)).lt(0).all()


@pytest.mark.parametrize("shape", [(9, 12), (7, 8, 6)], ids=str)
def test_central_differences_are_exact_on_quadratics(shape):
    x = identity_grid(shape, dtype=torch.float64)
    u = torch.zeros_like(x)
    u[:, 0] = 0.05 * x[:, 0] ** 2 + 0.3 * x[:, 1]
    det = jacobian_det(u)
    expected = 1 + 0.1 * x[:, 0]
    torch.testing.assert_close(det[inside(shape)], expected[inside(shape)])
    # One-sided at the border: the slope half a voxel further in.
    torch.testing.assert_close(det[:, 0], torch.full_like(det[:, 0], 1 + 0.1 * 0.5))


@pytest.mark.parametrize("shape", [(48, 40), (24, 28, 20)], ids=str)
def test_periodic_fields_away_from_the_border(shape):
    """u_i = sin(k x_i): det = prod(1 + k cos(k x_i)), to the error k^3 / 6 of a difference."""
    k = 2 * math.pi / 20
    x = identity_grid(shape, dtype=torch.float64)
    det = jacobian_det(torch.sin(k * x))
    expected = (1 + k * torch.cos(k * x)).prod(1)
    tolerance = len(shape) * (1 + k) ** (len(shape) - 1) * k**3 / 6
    torch.testing.assert_close(det[inside(shape)], expected[inside(shape)], rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_determinants_equal_numpy(shape):
    u = random_field(shape)
    matrices = jacobian(u).movedim((1, 2), (-2, -1)).numpy()
    np.testing.assert_allclose(jacobian_det(u).numpy(), np.linalg.det(matrices), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_determinants_equal_itk_in_the_interior(shape):
    """ITK treats the border otherwise, and orders axes and components x, y, z."""
    u = random_field(shape, batch=1)
    vectors = np.ascontiguousarray(np.moveaxis(u[0].numpy()[::-1], 0, -1))
    image = sitk.GetImageFromArray(vectors, isVector=True)
    itk = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image))
    np.testing.assert_allclose(
        jacobian_det(u)[0].numpy()[inside(shape)], itk[inside(shape)], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(12, 9), (12, 9, 7)], ids=str)
def test_a_known_fold_is_found_where_it_is(shape):
    """phi along axis 0 runs 0 .. 5, 4, 3, 6 ..: it turns back between voxels 5 and 7."""
    u = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    u[:, 0, 6], u[:, 0, 7] = 4 - 6, 3 - 7
    # Central differences see (phi[i+1] - phi[i-1]) / 2: 0 at 5, -1 at 6, 1 at 7.
    folded = jacobian_det(u) <= 0
    rows = folded.flatten(2).any(2)[0].nonzero().flatten()
    assert rows.tolist() == [5, 6]
    torch.testing.assert_close(folding(u).item(), 2 / 12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_digital_determinants_of_the_identity_and_of_scalings(shape):
    """The eight (four) one-sided determinants are 1, the two stars 2; all scale with volume."""
    d = len(shape)
    counts = [1.0] * 4 if d == 2 else [1.0] * 8 + [2.0] * 2
    expected = torch.tensor(counts, dtype=torch.float64).view(1, -1, *(1,) * d)
    still = torch.zeros(2, d, *shape, dtype=torch.float64)
    at_identity = digital_determinants(still)
    assert at_identity.equal(expected.expand_as(at_identity))
    eye = torch.eye(d, dtype=torch.float64)
    for matrix, volume in ((1.5 * eye, 1.5**d), (rotation(d, 0.5), 1.0)):
        found = digital_determinants(affine_field(shape, matrix))[inside(shape)]
        torch.testing.assert_close(found, (volume * expected).expand_as(found))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("function", [gradient, jacobian, jacobian_det, digital_determinants])
def test_gradients_with_respect_to_the_field(function, shape):
    u = random_field(shape).requires_grad_()
    assert torch.autograd.gradcheck(function, (u,), fast_mode=True)
