"""Regularisers against closed forms, plain NumPy and MONAI."""

import numpy as np
import pytest
import torch

from reglib.geometry.grid import identity_grid
from reglib.objectives.regularity import bending, diffusion, total_variation

SHAPES = [(8, 7), (6, 7, 5)]
ALL = [diffusion, total_variation, bending]


def random_field(shape, batch=2):
    return torch.from_numpy(np.random.default_rng(0).random((batch, len(shape), *shape)))


def linear_field(shape):
    """Component i is sum_j M_ij x_j, with M_ij = 0.1 (i + 1) - 0.05 j."""
    d = len(shape)
    matrix = torch.tensor([[0.1 * (i + 1) - 0.05 * j for j in range(d)] for i in range(d)])
    matrix = matrix.double()
    return torch.einsum(
        "ij,bj...->bi...", matrix, identity_grid(shape, dtype=torch.float64)
    ), matrix


def quadratic_field(shape):
    """u_0 = 0.05 x_0^2 + 0.02 x_0 x_1, u_1 = 0.03 x_1^2."""
    x = identity_grid(shape, dtype=torch.float64)
    u = torch.zeros_like(x)
    u[:, 0] = 0.05 * x[:, 0] ** 2 + 0.02 * x[:, 0] * x[:, 1]
    u[:, 1] = 0.03 * x[:, 1] ** 2
    return u


def plain(field, spacing, penalty):
    """Mean of ``penalty`` over neighbours, components and axes, one sample, in NumPy."""
    values = []
    for axis, step in enumerate(spacing):
        mm = field * np.array(spacing).reshape(-1, *(1,) * len(spacing))
        values.append(penalty(np.diff(mm, axis=axis + 1) / step).mean())
    return np.mean(values)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_order_terms_equal_plain_numpy(shape, spacing):
    u, step = random_field(shape), spacing[: len(shape)]
    d = diffusion(u, spacing=step, reduction="none")
    tv = total_variation(u, spacing=step, smoothing=1e-12, reduction="none")
    for i in range(2):
        np.testing.assert_allclose(d[i].item(), plain(u[i].numpy(), step, np.square), rtol=1e-10)
        np.testing.assert_allclose(tv[i].item(), plain(u[i].numpy(), step, np.abs), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_fields(shape):
    u, matrix = linear_field(shape)
    torch.testing.assert_close(diffusion(u), matrix.square().mean())
    torch.testing.assert_close(
        total_variation(u, smoothing=1e-14), matrix.abs().mean(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(bending(u), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bending_of_a_quadratic(shape):
    """Second derivatives 0.1 and 0.06, mixed 0.02 counted twice, averaged over components."""
    expected = (0.1**2 + 2 * 0.02**2 + 0.06**2) / len(shape)
    torch.testing.assert_close(bending(quadratic_field(shape)).item(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_millimetres(shape):
    """Isotropic voxels of s mm: first derivatives keep their value, second ones lose a factor s."""
    u = random_field(shape)
    mm = (2.0,) * len(shape)
    torch.testing.assert_close(diffusion(u, spacing=mm), diffusion(u))
    torch.testing.assert_close(total_variation(u, spacing=mm), total_variation(u))
    torch.testing.assert_close(bending(u, spacing=mm), bending(u) / 4)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_monai_agrees_where_the_stencils_are_exact():
    """MONAI takes central differences; on linear and quadratic fields every stencil is exact."""
    losses = pytest.importorskip("monai.losses")
    for shape in SHAPES:
        u, _ = linear_field(shape)
        # MONAI adds up over the axes, we average.
        torch.testing.assert_close(len(shape) * diffusion(u), losses.DiffusionLoss()(u))
        u = quadratic_field(shape)
        torch.testing.assert_close(bending(u), losses.BendingEnergyLoss()(u))


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("function", ALL)
def test_translations_cost_nothing(function, shape, batch):
    u = torch.full((batch, len(shape), *shape), 1e4)
    assert function(u).item() == 0
    assert function(u, reduction="none").equal(torch.zeros(batch))


@pytest.mark.parametrize("function", ALL)
def test_the_weight_keeps_its_meaning_on_a_finer_grid(function):
    """The same field in mm on a grid of half the spacing costs the same, to first order."""

    def wave(n):
        x = 20 * identity_grid((n, n), dtype=torch.float64) / (n - 1)
        return torch.sin(x / 3) * (n - 1) / 20

    coarse = function(wave(101), spacing=(0.2, 0.2))
    fine = function(wave(201), spacing=(0.1, 0.1))
    torch.testing.assert_close(fine, coarse, rtol=0.03, atol=0)


@pytest.mark.parametrize("function", ALL)
def test_half_precision_is_accumulated_in_float32(function):
    u = random_field((12, 10)).to(torch.bfloat16)
    out = function(u)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), function(u.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("function", ALL)
def test_gradients_with_respect_to_the_field(function, shape):
    u = random_field(shape).requires_grad_()
    assert torch.autograd.gradcheck(function, (u,))
    assert torch.autograd.gradgradcheck(function, (u,), fast_mode=True)


def test_total_variation_has_a_gradient_at_zero():
    u = torch.zeros(1, 2, 4, 4, requires_grad=True)
    total_variation(u).backward()
    assert u.grad.eq(0).all()
