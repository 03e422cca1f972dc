"""Filters and pyramids against SciPy and NumPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from reglib.geometry.smoothing import box_sum, gaussian_smooth, gaussian_sum, pool, pyramid

SHAPES = [(9, 7), (6, 8, 5), (3, 1), (2, 2, 2)]


def random_image(shape, batch=2, channels=3):
    return torch.from_numpy(np.random.default_rng(0).random((batch, channels, *shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [1, 3, 5, 7, 9, 11, 21])
def test_box_sum_equals_scipy(shape, window):
    x = random_image(shape)
    d = len(shape)
    expected = ndimage.uniform_filter(x.numpy(), (1, 1, *(window,) * d), mode="constant")
    np.testing.assert_allclose(box_sum(x, window).numpy(), expected * window**d, atol=1e-10)


def test_box_sums_keep_the_digits_of_dark_regions():
    """A running total in float32 would carry the bright half's rounding, 1e8 * 6e-8, along."""
    x = torch.ones(1, 1, 8, 400)
    x[..., :200] = 1e8
    assert box_sum(x, 5)[0, 0, 3, 210:390].eq(25).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sigma", [0, 0.1, 0.8, 2.0, "per axis"])
def test_gaussian_smooth_equals_scipy(shape, sigma):
    x = random_image(shape)
    per_axis = [1.5, 0.0, 0.7][: len(shape)] if sigma == "per axis" else [sigma] * len(shape)
    ours = gaussian_smooth(x, per_axis if sigma == "per axis" else sigma)
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, *per_axis), mode="nearest")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


def test_gaussian_kernels_may_be_cut_off_earlier():
    x = random_image((12, 9))
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, 2, 2), mode="nearest", truncate=1.5)
    np.testing.assert_allclose(gaussian_smooth(x, 2, truncate=1.5).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian_sum_has_zeros_outside(shape):
    x = random_image(shape)
    ours = gaussian_sum(x, 1.5, 4)
    sigma = (0, 0, *(1.5,) * len(shape))
    radius = (0, 0, *(4,) * len(shape))
    expected = ndimage.gaussian_filter(x.numpy(), sigma, mode="constant", radius=radius)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_smoothing_rounds_once_whatever_the_precision_around(dtype, autocast):
    x = random_image((20, 18)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = gaussian_smooth(x, 2.0)
    assert out.dtype == dtype
    exact = gaussian_smooth(x.double(), 2.0)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 24), (13, 7), (12, 8, 24), (5, 7, 6)], ids=str)
def test_pool_is_the_mean_of_every_cell(shape, factor):
    x = random_image(shape)
    fill = [(0, 0), (0, 0), *((0, -n % factor) for n in shape)]
    padded = np.pad(x.numpy(), fill, mode="edge")
    cells = [v for n in padded.shape[2:] for v in (n // factor, factor)]
    blocks = padded.reshape(*padded.shape[:2], *cells)
    expected = blocks.mean(axis=tuple(range(3, blocks.ndim, 2)))
    np.testing.assert_allclose(pool(x, factor).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("shape", [(24, 36), (13, 6), (9, 6, 11)], ids=str)
def test_level_l_of_a_pyramid_is_pooled_by_factor_to_the_l(shape, factor):
    x = random_image(shape)
    levels = pyramid(x, 3, factor=factor)
    assert len(levels) == 3
    for level, image in enumerate(levels):
        torch.testing.assert_close(image, pool(x, factor**level))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_constants_stay_constant(batch):
    x = torch.full((batch, 2, 9, 7, 5), 3.0)
    torch.testing.assert_close(gaussian_smooth(x, 2), x)
    torch.testing.assert_close(pool(x, 2), x[:, :, :5, :4, :3])


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5)], ids=str)
def test_gradients_and_second_gradients(shape):
    x = random_image(shape, channels=1).requires_grad_()
    functions = {
        "box_sum": lambda x: box_sum(x, 3),
        "gaussian_smooth": lambda x: gaussian_smooth(x, 1.0),
        "gaussian_sum": lambda x: gaussian_sum(x, 1.0, 2),
        "pool": lambda x: pool(x, 2),
    }
    for function in functions.values():
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)
