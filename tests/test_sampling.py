"""Carrying images, labels and points along a field."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp, warp_labels, warp_points

SHAPES = [(9, 7), (6, 8, 5)]
PADDINGS = {"border": "nearest", "zeros": "grid-constant"}


def random_case(shape, batch=2, size=3.0):
    rng = np.random.default_rng(3)
    image = rng.random((batch, 2, *shape))
    field = rng.uniform(-size, size, (batch, len(shape), *shape))
    return image, field


def scipy_warp(image, field, order, mode):
    at = np.indices(field.shape[2:]) + field
    return np.stack(
        [
            [ndimage.map_coordinates(c, x, order=order, mode=mode, cval=0.0) for c in channels]
            for channels, x in zip(image, at, strict=True)
        ]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_warp_equals_scipy(shape, padding, dtype):
    image, field = random_case(shape)
    ours = warp(
        torch.from_numpy(image).to(dtype), torch.from_numpy(field).to(dtype), padding=padding
    )
    expected = scipy_warp(image, field, 1, PADDINGS[padding])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("image_shape", "field_shape"), [((9, 7), (5, 12)), ((6, 8, 5), (9, 4, 7))]
)
def test_the_moving_image_may_have_another_grid(image_shape, field_shape):
    image, _ = random_case(image_shape)
    _, field = random_case(field_shape)
    ours = warp(torch.from_numpy(image), torch.from_numpy(field))
    np.testing.assert_allclose(
        ours.numpy(), scipy_warp(image, field, 1, "nearest"), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_warp_agrees_with_itk_in_the_interior(shape):
    """ITK has its own rule outside the image, and orders axes and components x, y, z."""
    image, field = random_case(shape, batch=1)
    reference = sitk.GetImageFromArray(image[0, 0])
    vectors = np.moveaxis(field[0][::-1], 0, -1)
    transform = sitk.DisplacementFieldTransform(
        sitk.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)
    )
    itk = sitk.Resample(reference, reference, transform, sitk.sitkLinear, -1.0, sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(itk)
    at = np.indices(shape) + field[0]
    last = np.array(shape).reshape(-1, *(1,) * len(shape)) - 1
    inside = ((at >= 0) & (at <= last)).all(0)
    assert inside.sum() > 20
    ours = warp(torch.from_numpy(image), torch.from_numpy(field))[0, 0].numpy()
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_warp_labels_equals_scipy_away_from_ties(shape, padding, dtype):
    _, field = random_case(shape)
    labels = np.random.default_rng(4).integers(0, 5, (2, 1, *shape))
    fraction = field - np.floor(field)
    field = np.where(np.abs(fraction - 0.5) < 0.01, field + 0.02, field)
    ours = warp_labels(torch.from_numpy(labels).to(dtype), torch.from_numpy(field), padding=padding)
    assert ours.dtype == dtype
    given = torch.from_numpy(labels).to(dtype).double().numpy()
    expected = scipy_warp(given, field, 0, PADDINGS[padding])
    np.testing.assert_array_equal(ours.double().numpy(), expected)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_large_label_numbers_survive(mode):
    labels = torch.tensor([2**24 + 1, 2**31 + 3, 2**53 - 1, 0]).view(1, 1, 2, 2)
    assert warp_labels(labels, torch.zeros(1, 2, 2, 2), mode=mode).equal(labels)


def largest_one_hot_share(labels, field, padding):
    """All one-hot maps at once, warped by SciPy: what the loop over labels must come to."""
    present = np.unique(np.append(labels, 0) if padding == "zeros" else labels)
    at = np.indices(field.shape[2:]) + field
    mode = PADDINGS[padding]
    out = np.empty((len(labels), 1, *field.shape[2:]))
    gap = np.empty(out.shape)
    for b, x in enumerate(at):
        shares = np.stack(
            [
                ndimage.map_coordinates(
                    (labels[b, 0] == k) * 1.0, x, order=1, mode=mode, cval=float(k == 0)
                )
                for k in present
            ]
        )
        out[b, 0] = present[shares.argmax(0)]
        gap[b, 0] = np.diff(np.sort(shares, 0)[-2:], axis=0)[0]
    return out, gap


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("lowest", [0, 1, -2])
def test_linear_labels_take_the_largest_share(shape, padding, dtype, lowest):
    _, field = random_case(shape)
    labels = np.random.default_rng(4).integers(
        max(lowest, 0 if dtype == torch.uint8 else -9), 4, (2, 1, *shape)
    )
    ours = warp_labels(
        torch.from_numpy(labels).to(dtype), torch.from_numpy(field), mode="linear", padding=padding
    )
    assert ours.dtype == dtype
    expected, gap = largest_one_hot_share(labels, field, padding)
    clear = gap > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours.double().numpy()[clear], expected[clear])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
def test_linear_labels_at_voxel_centres_are_exact(shape, batch, padding):
    labels = torch.from_numpy(np.random.default_rng(4).integers(0, 99, (batch, 2, *shape)))
    field = torch.zeros(batch, len(shape), *shape)
    assert warp_labels(labels, field, mode="linear", padding=padding).equal(labels)
    field[:, 0] = 1
    moved = warp_labels(labels, field, mode="linear", padding=padding)
    assert moved[:, :, :-1].equal(labels[:, :, 1:])
    assert moved[:, :, -1:].equal(labels[:, :, -1:] * (padding == "border"))


def test_a_tie_goes_to_the_nearest_voxel():
    """At 0.4 of the way 3 has 0.6; with two voxels of 5 around, three ways tie or nearly."""
    labels = torch.tensor([3, 3, 5, 5]).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    half = torch.zeros(1, 2, 4, 4)
    half[:, 0, 1] = 0.5
    nearest = warp_labels(labels, half)
    assert warp_labels(labels, half, mode="linear").equal(nearest)
    half[:, 0, 1] = 0.4
    assert warp_labels(labels, half, mode="linear")[0, 0, 1].eq(3).all()
    half[:, 0, 1] = 0.6
    assert warp_labels(labels, half, mode="linear")[0, 0, 1].eq(5).all()


def test_a_majority_beats_the_nearest_voxel():
    """Nearest is a lone 1 with a share of 0.36; the three 2 around it hold 0.64 together."""
    labels = torch.tensor([[1, 2], [2, 2]]).view(1, 1, 2, 2)
    field = torch.zeros(1, 2, 2, 2)
    field[0, :, 0, 0] = 0.4
    assert warp_labels(labels, field)[0, 0, 0, 0] == 1
    assert warp_labels(labels, field, mode="linear")[0, 0, 0, 0] == 2


def test_linear_labels_must_be_finite():
    labels = torch.tensor([0.0, 1.0, torch.nan, 2.0]).view(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^labels: wanted finite values, got 1 NaN"):
        warp_labels(labels, torch.zeros(1, 2, 2, 2), mode="linear")


def test_a_landmark_travels_from_fixed_to_moving_by_hand():
    """Voxel (1, 2) of the fixed grid is told to look 2 down and 1 left: the point is (3, 1)."""
    field = torch.zeros(1, 2, 5, 6)
    field[0, :, 1, 2] = torch.tensor([2.0, -1.0])
    fixed_points = torch.tensor([[[1.0, 2.0], [1.0, 2.5], [4.0, 4.0]]])
    expected = torch.tensor([[[3.0, 1.0], [2.0, 2.0], [4.0, 4.0]]])
    torch.testing.assert_close(warp_points(fixed_points, field), expected)
    # The image does the opposite trip: what was at (3, 1) now appears at (1, 2).
    moving = torch.zeros(1, 1, 5, 6)
    moving[0, 0, 3, 1] = 1
    torch.testing.assert_close(warp(moving, field)[0, 0, 1, 2].item(), 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_points_equal_the_interpolated_field_and_itk(shape):
    _, field = random_case(shape, batch=2)
    rng = np.random.default_rng(5)
    points = rng.uniform(0, np.array(shape) - 1.0, (2, 30, len(shape)))
    ours = warp_points(torch.from_numpy(points), torch.from_numpy(field)).numpy()
    for b in range(2):
        vectors = np.ascontiguousarray(np.moveaxis(field[b][::-1], 0, -1))
        transform = sitk.DisplacementFieldTransform(sitk.GetImageFromArray(vectors, isVector=True))
        itk = [transform.TransformPoint(p[::-1].tolist())[::-1] for p in points[b]]
        np.testing.assert_allclose(ours[b], itk, rtol=0, atol=1e-10)


def test_points_outside_take_the_vector_of_the_border():
    _, field = random_case((9, 7), batch=1)
    u = torch.from_numpy(field)
    outside = torch.tensor([[[-4.0, 3.0], [20.0, 9.0]]], dtype=torch.float64)
    moved = warp_points(outside, u) - outside
    torch.testing.assert_close(moved, torch.stack([u[0, :, 0, 3], u[0, :, 8, 6]])[None])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_identity_moves_nothing(shape):
    image, field = random_case(shape, batch=3)
    still = torch.zeros(field.shape)
    images = torch.from_numpy(image).float()
    torch.testing.assert_close(warp(images, still), images, rtol=0, atol=2e-6)
    points = torch.rand(3, 4, len(shape))
    assert warp_points(points, still).equal(points)
    labels = (images * 5).long()
    assert warp_labels(labels, still).equal(labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_fields_are_added_to_exact_coordinates(dtype):
    """x + u in bfloat16 would lose u = 0.25 from voxel 32 on."""
    image = identity_grid((200, 2))[:, :1]
    field = torch.zeros(1, 2, 200, 2)
    field[:, 0] = 0.25
    out = warp(image, field.to(dtype))
    torch.testing.assert_close(out[..., :199, :] - image[..., :199, :], field[:, :1, :199])


@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 6)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_warp_has_gradients_with_respect_to_image_and_field(shape, padding):
    rng = np.random.default_rng(6)
    image = torch.from_numpy(rng.random((2, 1, *shape))).requires_grad_()
    whole = rng.integers(
        0, np.array(shape).reshape(-1, *(1,) * len(shape)) - 1, (2, len(shape), *shape)
    )
    at = whole + rng.uniform(0.2, 0.8, whole.shape)
    field = torch.from_numpy(at - np.indices(shape)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i, u: warp(i, u, padding=padding), (image, field), fast_mode=True
    )


@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 6)], ids=str)
def test_warp_points_has_gradients_with_respect_to_points_and_field(shape):
    rng = np.random.default_rng(7)
    whole = rng.integers(0, np.array(shape) - 1, (2, 4, len(shape)))
    points = torch.from_numpy(whole + rng.uniform(0.2, 0.8, whole.shape)).requires_grad_()
    field = torch.from_numpy(rng.random((2, len(shape), *shape))).requires_grad_()
    assert torch.autograd.gradcheck(warp_points, (points, field), fast_mode=True)
