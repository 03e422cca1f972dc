"""Transforms fitted to points."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from reglib.geometry.affine import affine_matrix, rigid_matrix, transform_points
from reglib.geometry.procrustes import fit_affine, fit_rigid

DIMENSIONS = [2, 3]


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def rigid(d, batch, angle=2.0):
    planes = d * (d - 1) // 2
    return rigid_matrix(
        angle * rand(batch, planes), 30 * rand(batch, d, seed=1), centre=torch.zeros(1, d)
    )


def affine(d, batch):
    planes = d * (d - 1) // 2
    return affine_matrix(
        rand(batch, planes),
        30 * rand(batch, d, seed=1),
        log_scales=0.3 * rand(batch, d, seed=2),
        shears=0.3 * rand(batch, planes, seed=3),
        centre=torch.zeros(1, d),
    )


def points(d, batch, n=12):
    return 80 * rand(batch, n, d, seed=4) + 200


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_exact_points_give_the_matrix_back(d, batch):
    fixed = points(d, batch)
    for truth, fit in (
        (rigid(d, batch), fit_rigid),
        (affine(d, batch), fit_affine),
        (torch.eye(d + 1, dtype=torch.float64).repeat(batch, 1, 1), fit_rigid),
        (torch.eye(d + 1, dtype=torch.float64).repeat(batch, 1, 1), fit_affine),
    ):
        found = fit(fixed, transform_points(fixed, truth))
        torch.testing.assert_close(found.matrix, truth, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.residual, fixed.new_zeros(batch, 12), rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_affine_fit_equals_numpy_least_squares(d, batch):
    fixed, moving = points(d, batch), points(d, batch) + 5 * rand(batch, 12, d, seed=5)
    found = fit_affine(fixed, moving)
    for i in range(batch):
        design = np.hstack([fixed[i].numpy(), np.ones((12, 1))])
        solution = np.linalg.lstsq(design, moving[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found.matrix[i, :d].numpy(), solution.T, atol=1e-9)
        left = np.linalg.norm(design @ solution - moving[i].numpy(), axis=1)
        np.testing.assert_allclose(found.residual[i].numpy(), left, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rigid_fit_equals_scipy_and_itk(batch):
    """With noise, so that there is something to minimise."""
    fixed = points(3, batch)
    moving = transform_points(fixed, rigid(3, batch)) + 5 * rand(batch, 12, 3, seed=5)
    found = fit_rigid(fixed, moving)
    assert found.residual.min() > 0.1
    for i in range(batch):
        f, m = fixed[i].numpy(), moving[i].numpy()
        turn, rssd = Rotation.align_vectors(m - m.mean(0), f - f.mean(0))
        np.testing.assert_allclose(found.matrix[i, :3, :3].numpy(), turn.as_matrix(), atol=1e-7)
        np.testing.assert_allclose(found.residual[i].norm(), rssd, rtol=1e-9)
        itk = sitk.LandmarkBasedTransformInitializer(
            sitk.VersorRigid3DTransform(), f.flatten().tolist(), m.flatten().tolist()
        )
        mapped = np.array([itk.TransformPoint(p.tolist()) for p in f])
        np.testing.assert_allclose(
            transform_points(fixed, found.matrix)[i].numpy(), mapped, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("d", DIMENSIONS)
def test_a_similarity_finds_the_magnification(d):
    truth = rigid(d, 2)
    truth[:, :d, :d] *= 1.7
    fixed = points(d, 2)
    moving = transform_points(fixed, truth)
    torch.testing.assert_close(fit_rigid(fixed, moving, scale=True).matrix, truth)
    assert fit_rigid(fixed, moving).residual.min() > 1


@pytest.mark.parametrize("d", DIMENSIONS)
def test_no_small_step_in_scale_or_angle_is_better(d):
    fixed, noise = points(d, 2), 5 * rand(2, 12, d, seed=5)
    moving = transform_points(fixed, rigid(d, 2)) + noise
    best = fit_rigid(fixed, moving, scale=True).matrix
    centre = transform_points(fixed.mean(1, keepdim=True), best)[:, 0]

    def cost(change):
        return (transform_points(fixed, change @ best) - moving).square().sum((1, 2))

    planes = d * (d - 1) // 2
    still = torch.zeros(2, d, dtype=torch.float64)
    for k in range(planes + 1):
        for sign in (1e-3, -1e-3):
            turn = torch.zeros(2, planes, dtype=torch.float64)
            size = still.clone()
            if k < planes:
                turn[:, k] = sign
            else:
                size += sign
            change = affine_matrix(
                turn, still, log_scales=size, shears=torch.zeros_like(turn), centre=centre
            )
            assert (cost(change) > cost(torch.eye(d + 1, dtype=torch.float64))).all()


@pytest.mark.parametrize("d", DIMENSIONS)
def test_a_mirror_image_is_not_mirrored(d):
    fixed = points(d, 3)
    moving = fixed.clone()
    moving[..., 0] *= -1
    found = fit_rigid(fixed, moving)
    det = torch.linalg.det(found.matrix[:, :d, :d])
    torch.testing.assert_close(det, torch.ones_like(det))
    assert found.residual.max() > 1
    assert torch.linalg.det(fit_affine(fixed, moving).matrix[0, :d, :d]) < 0


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_fewest_points_that_determine_it(d):
    """Points in one plane leave a rigid transform determined, not an affine one."""
    fixed = points(d, 2, n=d)
    truth = rigid(d, 2)
    torch.testing.assert_close(fit_rigid(fixed, transform_points(fixed, truth)).matrix, truth)
    with pytest.raises(ValueError, match=rf"^fixed_points: wanted {d + 1} points or more"):
        fit_affine(fixed, fixed)
    torch.testing.assert_close(
        fit_affine(points(d, 2, d + 1), points(d, 2, d + 1)).matrix,
        torch.eye(d + 1, dtype=torch.float64).repeat(2, 1, 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_points_that_do_not_determine_the_transform_are_refused(d, dtype):
    fixed = points(d, 3, n=9).to(dtype)
    line = fixed.clone()
    # In 3-D a line, in 2-D a single place; only in sample 1.
    line[1] = torch.linspace(0, 1, 9, dtype=dtype).view(9, 1) * (d - 2) * 7 + line[1, :1]
    plane = fixed.clone()
    plane[1, :, -1] = plane[1, :, 0] + 3
    for bad in (line, plane, fixed[:, :1].expand(-1, 9, -1)):
        with pytest.raises(ValueError, match=r"^fixed_points: wanted .* got others in samples"):
            fit_affine(bad, fixed)
    with pytest.raises(ValueError, match=r"^fixed_points: wanted .* samples \[1\]$"):
        fit_rigid(line, fixed)
    with pytest.raises(ValueError, match=r"^moving_points: wanted .* samples \[1\]$"):
        fit_rigid(fixed, line)
    broken = fixed.clone()
    broken[2, 0, 0] = torch.nan
    for fit in (fit_affine, fit_rigid):
        with pytest.raises(ValueError, match=r"^moving_points: wanted finite values, got 1 "):
            fit(fixed, broken)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_single_precision_in_single_precision_out(d):
    fixed = points(d, 1).float()
    found = fit_rigid(fixed, transform_points(fixed, rigid(d, 1).float()))
    assert found.matrix.dtype == found.residual.dtype == torch.float32
    assert found.residual.max() < 1e-3


@pytest.mark.parametrize("d", DIMENSIONS)
def test_gradients_with_respect_to_both_sets_of_points(d):
    fixed, moving = points(d, 2).requires_grad_(), points(d, 2) + 5 * rand(2, 12, d, seed=5)
    moving.requires_grad_()
    for fit in (fit_affine, fit_rigid):
        assert torch.autograd.gradcheck(lambda f, m, fit=fit: fit(f, m).matrix, (fixed, moving))
