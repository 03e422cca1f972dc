"""Voxel grids and sampling at coordinates, against SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from reglib.geometry.grid import identity_grid, sample, unit_to_voxel, voxel_to_unit

SHAPES = [(7, 5), (1, 6), (6, 5, 4), (5, 1, 4)]
#: Our words and SciPy's.
PADDINGS = {"border": "nearest", "zeros": "grid-constant"}


def scattered(shape, points, seed=0):
    """A random image, and coordinates ``(1, D, points, 1, ...)`` inside and up to 3 outside."""
    rng = np.random.default_rng(seed)
    image = rng.random((2, 3, *shape))
    low, high = -3.0, np.array(shape).reshape(-1, 1) + 2.0
    coords = rng.uniform(low, high, (2, len(shape), points))
    return image, coords.reshape(2, len(shape), points, *(1,) * (len(shape) - 1))


def scipy_sample(image, coords, order, mode):
    return np.stack(
        [
            [ndimage.map_coordinates(c, x, order=order, mode=mode, cval=0.0) for c in channels]
            for channels, x in zip(image, coords, strict=True)
        ]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identity_grid_holds_the_index_of_every_voxel(shape):
    x = identity_grid(shape, dtype=torch.float64)
    assert x.shape == (1, len(shape), *shape)
    np.testing.assert_array_equal(x[0].numpy(), np.indices(shape))
    assert identity_grid(shape).dtype == torch.get_default_dtype()
    assert identity_grid(shape, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("shape", [(7, 5), (6, 5, 4), (300, 2)], ids=str)
def test_unit_and_voxel_coordinates_are_inverse(shape):
    x = torch.from_numpy(scattered(shape, 40)[1])
    torch.testing.assert_close(unit_to_voxel(voxel_to_unit(x, shape), shape), x)
    corners = voxel_to_unit(identity_grid(shape), shape)
    assert corners.min() == -1
    assert corners.max() == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_linear_sampling_equals_scipy(shape, padding, dtype):
    image, coords = scattered(shape, 200)
    ours = sample(
        torch.from_numpy(image).to(dtype), torch.from_numpy(coords).to(dtype), padding=padding
    )
    expected = scipy_sample(image, coords, 1, PADDINGS[padding])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_nearest_sampling_equals_scipy_away_from_ties(shape, padding):
    image, coords = scattered(shape, 200)
    # Half way between voxels the two libraries round to different sides.
    fraction = coords - np.floor(coords)
    coords = np.where(np.abs(fraction - 0.5) < 0.01, coords + 0.02, coords)
    ours = sample(
        torch.from_numpy(image), torch.from_numpy(coords), mode="nearest", padding=padding
    )
    np.testing.assert_array_equal(ours.numpy(), scipy_sample(image, coords, 0, PADDINGS[padding]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_the_identity_returns_the_image(shape, padding, mode):
    image = torch.from_numpy(scattered(shape, 1)[0]).float()
    x = identity_grid(shape).expand(2, -1, *(-1,) * len(shape))
    # Coordinates pass through [-1, 1] in float32: a few roundings of the voxel index.
    torch.testing.assert_close(
        sample(image, x, mode=mode, padding=padding), image, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("image_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_coordinates_keep_their_fractions_beside_half_precision(image_dtype, autocast):
    """From 128 on bfloat16 coordinates step by a whole voxel; ours must not."""
    image = (torch.arange(300.0) % 2).view(1, 1, 300, 1).expand(1, 1, 300, 2).to(image_dtype)
    coords = identity_grid((300, 2))
    coords[:, 0] += 0.25
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = sample(image, coords)
    assert out.dtype == image_dtype
    # Voxels alternate 0, 1: a quarter of the way is 0.25 and 0.75.
    expected = torch.where(torch.arange(299) % 2 == 0, 0.25, 0.75)
    torch.testing.assert_close(out[0, 0, :299, 0].float(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(7, 5), (6, 5, 4)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_with_respect_to_image_and_coordinates(shape, padding):
    """Fractions in [0.2, 0.8], inside: linear interpolation has corners at the voxels."""
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.random((2, 1, *shape))).requires_grad_()
    size = np.array(shape).reshape(-1, *(1,) * len(shape))
    whole = rng.integers(0, size - 1, (2, len(shape), *(3,) * len(shape)))
    coords = torch.from_numpy(whole + rng.uniform(0.2, 0.8, whole.shape)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i, x: sample(i, x, padding=padding), (image, coords), fast_mode=True
    )
