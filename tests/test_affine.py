"""Rigid and affine transforms in world millimetres."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from reglib.geometry.affine import (
    affine_field,
    affine_matrix,
    affine_parameters,
    grid_centre,
    rigid_matrix,
    transform_points,
    whole_field,
)
from reglib.geometry.derivatives import jacobian, jacobian_det
from reglib.geometry.sampling import transform_grid, warp, warp_points

DIMENSIONS = [2, 3]
SHAPES = {2: (9, 7), 3: (6, 8, 5)}


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)


def parameters(d, batch=2, size=0.3, seed=0):
    """Rotation, translation, log-scales and shears of moderate size; every sample differs."""
    planes = d * (d - 1) // 2
    rotation, shears = (
        size * rand(batch, planes, seed=seed),
        size * rand(batch, planes, seed=seed + 1),
    )
    return (
        rotation,
        10 * rand(batch, d, seed=seed + 2),
        size * rand(batch, d, seed=seed + 3),
        shears,
    )


def oblique_affine(d, seed=0, handed=1):
    """Unequal spacing, rotated axes, an origin far away; mirrored if ``handed`` is -1."""
    spacing = torch.tensor([0.8, 1.5, 3.0][:d], dtype=torch.float64)
    spacing[0] *= handed
    turn = rigid_matrix(
        rand(1, d * (d - 1) // 2, seed=seed), torch.zeros(1, d).double(), centre=torch.zeros(1, d)
    )
    affine = turn[0].clone()
    affine[:d, :d] *= spacing
    affine[:d, d] = 100 * rand(d, seed=seed + 1)
    return affine


def homogeneous(linear, offset):
    out = np.eye(len(offset) + 1)
    out[:-1, :-1], out[:-1, -1] = linear, offset
    return out


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_zeros_are_exactly_the_identity(d, batch):
    planes = d * (d - 1) // 2
    centre = 100 * rand(1, d, dtype=torch.float32)
    eye = torch.eye(d + 1).expand(batch, -1, -1)
    still = torch.zeros(batch, d)
    turn = torch.zeros(batch, planes)
    assert rigid_matrix(turn, still, centre=centre).equal(eye)
    assert affine_matrix(turn, still, log_scales=still, shears=turn, centre=centre).equal(eye)
    affine = oblique_affine(d)
    field = affine_field(eye, affine, affine, SHAPES[d])
    assert field.shape == (batch, d, *SHAPES[d])
    assert field.dtype == torch.float32
    torch.testing.assert_close(field, torch.zeros_like(field), rtol=0, atol=1e-6)


def test_a_quarter_turn_by_hand():
    """Positive angles turn the first axis towards the second; about z in 3-D: the same."""
    quarter = torch.tensor([[math.pi / 2]], dtype=torch.float64)
    centre = torch.tensor([[10.0, 20.0]], dtype=torch.float64)
    shift = torch.tensor([[0.0, 5.0]], dtype=torch.float64)
    matrix = rigid_matrix(quarter, shift, centre=centre)
    moved = transform_points(torch.tensor([[[13.0, 20.0], [10.0, 20.0]]]).double(), matrix)
    torch.testing.assert_close(moved, torch.tensor([[[10.0, 28.0], [10.0, 25.0]]]).double())
    vector = torch.tensor([[0, 0, math.pi / 2]], dtype=torch.float64)
    still = torch.zeros(1, 3, dtype=torch.float64)
    turned = transform_points(
        torch.eye(3).double()[None], rigid_matrix(vector, still, centre=still)
    )
    expected = torch.tensor([[[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]]).double()
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rotations_equal_scipy_and_itk(batch):
    vectors, shift, centre = (
        2 * rand(batch, 3),
        20 * rand(batch, 3, seed=1),
        50 * rand(batch, 3, seed=2),
    )
    matrix = rigid_matrix(vectors, shift, centre=centre)
    expected = Rotation.from_rotvec(vectors.numpy()).as_matrix()
    np.testing.assert_allclose(matrix[:, :3, :3].numpy(), expected, rtol=0, atol=1e-12)
    point = rand(batch, 1, 3, seed=3)
    for i in range(batch):
        itk = sitk.VersorRigid3DTransform()
        itk.SetCenter(centre[i].tolist())
        itk.SetTranslation(shift[i].tolist())
        angle = vectors[i].norm().item()
        itk.SetRotation((vectors[i] / angle).tolist(), angle)
        ours = transform_points(point[i : i + 1], matrix[i : i + 1])[0, 0]
        np.testing.assert_allclose(ours, itk.TransformPoint(point[i, 0].tolist()), atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_rigid_keeps_distances_and_orientation(d, batch):
    rotation, translation, _, _ = parameters(d, batch, size=3.0)
    matrix = rigid_matrix(rotation, translation, centre=rand(1, d))
    turn = matrix[:, :d, :d]
    eye = torch.eye(d, dtype=torch.float64).expand(batch, -1, -1)
    torch.testing.assert_close(turn @ turn.transpose(1, 2), eye)
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(batch, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_affine_is_scale_then_shear_then_rotation_about_the_centre(d, batch):
    rotation, translation, log_scales, shears = parameters(d, batch)
    centre = 50 * rand(batch, d, seed=9)
    ours = affine_matrix(rotation, translation, log_scales=log_scales, shears=shears, centre=centre)
    turn = rigid_matrix(rotation, torch.zeros_like(translation), centre=torch.zeros_like(centre))
    for i in range(batch):
        k = np.eye(d)
        k[np.triu_indices(d, 1)] = shears[i]
        linear = turn[i, :d, :d].numpy() @ k @ np.diag(np.exp(log_scales[i].numpy()))
        c, t = centre[i].numpy(), translation[i].numpy()
        np.testing.assert_allclose(ours[i], homogeneous(linear, c + t - linear @ c), atol=1e-10)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_parameters_and_matrix_are_there_and_back(d, batch):
    rotation, translation, log_scales, shears = parameters(d, batch, size=1.2)
    centre = 50 * rand(1, d, seed=9)
    matrix = affine_matrix(
        rotation, translation, log_scales=log_scales, shears=shears, centre=centre
    )
    found = affine_parameters(matrix, centre=centre)
    torch.testing.assert_close(
        found, (rotation, translation, log_scales, shears), atol=1e-9, rtol=0
    )
    assert affine_parameters(matrix.float(), centre=centre).rotation.dtype == torch.float32


def test_a_half_turn_has_parameters():
    for axis in torch.eye(3, dtype=torch.float64):
        vector = (math.pi - 1e-9) * axis[None]
        still = torch.zeros(1, 3, dtype=torch.float64)
        matrix = rigid_matrix(vector, still, centre=still)
        found = affine_parameters(matrix, centre=still).rotation
        torch.testing.assert_close(found, vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("handed", [1, -1])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_grid_centre_is_the_middle_voxel_in_mm(d, handed):
    affine = oblique_affine(d, handed=handed)
    middle = np.array([(n - 1) / 2 for n in SHAPES[d]] + [1.0])
    np.testing.assert_allclose(grid_centre(affine, SHAPES[d])[0], (affine.numpy() @ middle)[:d])
    corners = torch.tensor([[0.0] * d, [n - 1.0 for n in SHAPES[d]]], dtype=torch.float64)
    ends = transform_points(corners[None], affine[None])
    torch.testing.assert_close(grid_centre(affine, SHAPES[d]), ends.mean(1))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("handed", [1, -1])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_field_goes_through_both_worlds(d, handed, batch):
    """Voxel by voxel: M_moving^-1 A M_fixed x, for grids of different spacing and orientation."""
    rotation, translation, log_scales, shears = parameters(d, batch)
    matrix = affine_matrix(
        rotation, translation, log_scales=log_scales, shears=shears, centre=rand(1, d)
    )
    fixed, moving = oblique_affine(d), oblique_affine(d, seed=5, handed=handed)
    field = affine_field(matrix, fixed, moving, SHAPES[d])
    x = np.indices(SHAPES[d]).reshape(d, -1)
    x = np.vstack([x, np.ones(x.shape[1])])
    for i in range(batch):
        expected = np.linalg.inv(moving.numpy()) @ matrix[i].numpy() @ fixed.numpy() @ x
        phi = transform_grid(field)[i].flatten(1).numpy()
        np.testing.assert_allclose(phi, expected[:d], rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_single_precision_loses_no_thousandth_of_a_voxel(d):
    rotation, translation, _, _ = parameters(d, 2)
    matrix = rigid_matrix(rotation, translation, centre=100 * rand(1, d))
    fixed, moving = oblique_affine(d), oblique_affine(d, seed=5)
    exact = affine_field(matrix, fixed, moving, SHAPES[d])
    single = affine_field(matrix.float(), fixed, moving, SHAPES[d])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_rigid_is_rigid_in_mm_and_not_in_voxels(d):
    """On a grid of 0.8 x 1.5 (x 3) mm the field of a rotation keeps volumes, but not lengths."""
    rotation = torch.full((1, d * (d - 1) // 2), 0.5, dtype=torch.float64)
    affine = torch.diag(torch.tensor([0.8, 1.5, 3.0][:d] + [1.0], dtype=torch.float64))
    centre = grid_centre(affine, SHAPES[d])
    matrix = rigid_matrix(rotation, torch.zeros_like(centre), centre=centre)
    field = affine_field(matrix, affine, affine, SHAPES[d])
    det = jacobian_det(field)
    torch.testing.assert_close(det, torch.ones_like(det))
    voxels = jacobian(field)[0].flatten(2)[..., 0]
    assert (voxels @ voxels.T - torch.eye(d)).abs().max() > 0.3
    mm = affine[:d, :d] @ voxels @ affine[:d, :d].inverse()
    torch.testing.assert_close(mm @ mm.T, torch.eye(d, dtype=torch.float64))


@pytest.mark.parametrize("handed", [1, -1])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_warping_with_the_field_equals_itk(d, handed):
    """ITK resamples an image with its own geometry through an affine transform in mm."""
    moving_shape = (11, 12, 9)[:d]
    image = torch.rand(1, 1, *moving_shape, generator=torch.Generator().manual_seed(0)).double()
    fixed, moving = oblique_affine(d), oblique_affine(d, seed=0, handed=handed)
    moving[:d, d] = fixed[:d, d] + 1
    rotation, translation, log_scales, shears = parameters(d, 1, size=0.05)
    # The middle of one grid goes to the middle of the other, a little aside.
    centre = grid_centre(fixed, SHAPES[d])
    shift = grid_centre(moving, moving_shape) - centre + translation / 20
    matrix = affine_matrix(rotation, shift, log_scales=log_scales, shears=shears, centre=centre)

    def geometry(itk, affine):
        """Array axis a of ours is axis a of ITK: its arrays are reversed."""
        size = affine[:d, :d].norm(dim=0)
        itk.SetSpacing(size.tolist())
        itk.SetDirection((affine[:d, :d] / size).flatten().tolist())
        itk.SetOrigin(affine[:d, d].tolist())
        return itk

    def as_itk(x):
        return sitk.GetImageFromArray(np.ascontiguousarray(x.numpy().transpose()))

    transform = sitk.AffineTransform(d)
    transform.SetMatrix(matrix[0, :d, :d].flatten().tolist())
    transform.SetTranslation(matrix[0, :d, d].tolist())
    resampled = sitk.Resample(
        geometry(as_itk(image[0, 0]), moving),
        geometry(as_itk(torch.zeros(SHAPES[d])), fixed),
        transform,
        sitk.sitkLinear,
        -1.0,
        sitk.sitkFloat64,
    )
    expected = sitk.GetArrayFromImage(resampled).transpose()
    field = affine_field(matrix, fixed, moving, SHAPES[d])
    at = transform_grid(field)
    last = torch.tensor(moving_shape).view(1, d, *(1,) * d) - 1
    inside = ((at > 0) & (at < last)).all(1)[0].numpy()
    assert inside.sum() > 30
    ours = warp(image, field)[0, 0].numpy()
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=0, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_points_through_the_field_are_points_through_the_matrix(d, batch):
    rotation, translation, _, _ = parameters(d, batch)
    matrix = rigid_matrix(rotation, translation, centre=rand(1, d))
    fixed, moving = oblique_affine(d), oblique_affine(d, seed=5, handed=-1)
    field = affine_field(matrix, fixed, moving, SHAPES[d])
    voxels = 2 + rand(batch, 4, d)
    through_mm = transform_points(transform_points(voxels, fixed[None]), matrix)
    back = transform_points(through_mm, moving.inverse()[None])
    torch.testing.assert_close(warp_points(voxels, field), back, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 0.3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_gradients_with_respect_to_every_parameter_zeros_included(d, size):
    inputs = [(size * x).requires_grad_() for x in parameters(d, 2)]
    centre = rand(1, d)
    fixed, moving = oblique_affine(d), oblique_affine(d, seed=5)

    def field(rotation, translation, log_scales, shears):
        matrix = affine_matrix(
            rotation, translation, log_scales=log_scales, shears=shears, centre=centre
        )
        return affine_field(matrix, fixed, moving, (3, 2, 4)[:d])

    assert torch.autograd.gradcheck(field, inputs)
    points = rand(2, 3, d, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r, t, p: transform_points(p, rigid_matrix(r, t, centre=centre)),
        (inputs[0], inputs[1], points),
    )


@pytest.mark.parametrize("d", DIMENSIONS)
def test_half_precision_parameters_give_single_precision_matrices(d):
    rotation, translation, log_scales, shears = (x.half() for x in parameters(d))
    matrix = affine_matrix(
        rotation, translation, log_scales=log_scales, shears=shears, centre=torch.zeros(1, d)
    )
    assert matrix.dtype == torch.float32


# --- whole_field ----------------------------------------------------------------------------


def whole_pair(d, batch=2, dtype=torch.float64, matrices=None):
    """A matrix, a field and two grids, for phi(x) = A(x + u(x))."""
    rotation, translation, log_scales, shears = parameters(d, matrices or batch)
    matrix = affine_matrix(
        rotation, translation, log_scales=log_scales, shears=shears, centre=rand(1, d)
    )
    u = 2 * rand(batch, d, *SHAPES[d], seed=7)
    fixed, moving = oblique_affine(d), oblique_affine(d, seed=5, handed=-1)
    return matrix.to(dtype), u.to(dtype), fixed, moving


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_whole_field_is_voxel_field_mm_matrix_mm_voxel(d, batch, shared):
    """A plain loop over voxels with homogeneous matrices in NumPy; float64, so to rounding."""
    matrix, u, fixed, moving = whole_pair(d, batch, matrices=1 if shared else batch)
    whole = whole_field(matrix, u, fixed, moving)
    assert whole.shape == u.shape
    fixed, moving, a = fixed.numpy(), moving.numpy(), matrix.numpy()
    expected = np.zeros(u.shape)
    for b in range(batch):
        for x in np.ndindex(*SHAPES[d]):
            voxel = np.append(np.array(x) + u[(b, slice(None), *x)].numpy(), 1.0)
            world = a[0 if shared else b] @ fixed @ voxel
            expected[(b, slice(None), *x)] = np.linalg.inv(moving) @ world @ np.eye(d + 1, d) - x
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_whole_field_of_one_part_is_that_part(d):
    """Without u it is the affine field; without A on one grid it is u itself, to the last bit."""
    matrix, u, fixed, moving = whole_pair(d)
    still = whole_field(matrix, torch.zeros_like(u), fixed, moving)
    torch.testing.assert_close(still, affine_field(matrix, fixed, moving, SHAPES[d]))
    eye = torch.eye(d + 1).expand(2, -1, -1)
    plain = torch.diag(torch.tensor([2.0, 0.5, 4.0][:d] + [1.0]))
    assert whole_field(eye, u, plain, plain).equal(u)
    torch.testing.assert_close(whole_field(eye, u, fixed, fixed), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_whole_field_is_computed_for_each_pair_alone(d):
    matrix, u, fixed, moving = whole_pair(d, 3)
    whole = whole_field(matrix, u, fixed, moving)
    for i in range(3):
        alone = whole_field(matrix[i : i + 1], u[i : i + 1], fixed, moving)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_gradients_of_the_whole_field_reach_matrix_and_field(d):
    matrix, u, fixed, moving = whole_pair(d)
    free, small = matrix[:, :d].clone().requires_grad_(), u[(..., *(slice(2),) * d)].clone()
    small.requires_grad_()

    def whole(free, small):
        # The last row of a homogeneous matrix is no parameter.
        return whole_field(torch.cat([free, matrix[:, d:]], 1), small, fixed, moving)

    assert torch.autograd.gradcheck(whole, (free, small))


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_whole_field_is_not_rounded_under_autocast(d):
    """bfloat16 has 8 bits: at 100 mm half a millimetre would be lost."""
    matrix, u, fixed, moving = whole_pair(d, dtype=torch.float32)
    plain = whole_field(matrix, u, fixed, moving)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = whole_field(matrix, u, fixed, moving)
    assert plain.dtype == cast.dtype == torch.float32
    assert cast.equal(plain)
    exact = whole_field(matrix.double(), u.double(), fixed, moving)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "field", "result"),
    [
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float32),
    ],
)
def test_the_whole_field_has_the_precision_of_the_field(matrix, field, result):
    a, u, fixed, moving = whole_pair(2)
    assert whole_field(a.to(matrix), u.to(field), fixed, moving).dtype == result


def test_parts_of_a_whole_field_that_do_not_fit_are_refused():
    matrix, u, fixed, moving = whole_pair(3)
    for bad in (
        (matrix[0], u, fixed, moving),
        (matrix[:, :3, :3], u, fixed, moving),
        (torch.cat([matrix, matrix]), u, fixed, moving),
        (torch.zeros_like(matrix), u, fixed, moving),
        (matrix, u[:, :2], fixed, moving),
        (matrix, u, fixed[:3, :3], moving),
        (matrix, u, fixed, torch.zeros(4, 4)),
    ):
        with pytest.raises(ValueError, match="wanted"):
            whole_field(*bad)
    with pytest.raises(TypeError, match="field: wanted"):
        whole_field(matrix, u.long(), fixed, moving)
