"""Similarities against plain float64 loops, MONAI, and what must not change them."""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.stats import entropy
from scipy.stats.contingency import crosstab

from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import box_sum, gaussian_smooth
from reglib.objectives import similarity
from reglib.objectives.metrics import dice, ssim
from reglib.objectives.mind import mind
from reglib.objectives.similarity import (
    _LocalCorrelation,
    dssim,
    lncc,
    mae,
    mse,
    mutual_information,
    ncc,
    soft_dice,
)

SHAPES = [(8, 8), (6, 7, 5)]
gaussian_lncc = partial(lncc, window=7, sigma=1.5)
#: With the range of the images here: their own would be a constant, whatever its gradient is.
unit_mi = partial(mutual_information, bins=9, warped_range=(0, 1), fixed_range=(0, 1))
#: Every similarity, with a window that fits into the small images here.
ALL = {
    "mae": mae,
    "mse": mse,
    "ncc": ncc,
    "lncc": partial(lncc, window=3),
    "lncc Gaussian": gaussian_lncc,
    "dssim": partial(dssim, window=5),
    "soft_dice": soft_dice,
    "mutual_information": unit_mi,
    "normalised": partial(unit_mi, normalised=True),
    "mind": partial(mind, dilation=1),
}
#: Those whose backward pass is written out, and the name that they give in its error.
ONCE = {
    "lncc": "lncc",
    "lncc Gaussian": "lncc",
    "mutual_information": "mutual_information",
    "normalised": "mutual_information",
    "mind": "mind",
}
CORRELATIONS = {k: ALL[k] for k in ("ncc", "lncc", "lncc Gaussian")}


def pair(shape, batch=2, channels=2, dtype=torch.float64):
    """A random image and a noisy copy of it, both in [0, 1]."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, batch, channels, *shape))
    return torch.from_numpy(a).to(dtype), torch.from_numpy(0.6 * a + 0.4 * b).to(dtype)


def random_weight(shape, batch=2):
    """In [0, 1], with zeros."""
    w = np.random.default_rng(1).uniform(-0.5, 1, (batch, 1, *shape)).clip(0)
    return torch.from_numpy(w)


def windows(shape, window, sigma=None, weight=None):
    """Every voxel, its window cut off at the border, and the weights in it, which sum to 1."""
    weight = np.ones(shape) if weight is None else weight
    for at in np.ndindex(*shape):
        cut = tuple(slice(max(i - window // 2, 0), i + window // 2 + 1) for i in at)
        k = weight[cut]
        if sigma is not None:
            offsets = np.meshgrid(
                *(
                    np.arange(c.start, min(c.stop, n)) - i
                    for c, i, n in zip(cut, at, shape, strict=True)
                ),
                indexing="ij",
            )
            k = k * np.exp(-0.5 * sum(o**2 for o in offsets) / sigma**2)
        if k.sum() > 0:
            yield at, cut, k / k.sum()


def local_correlation(w, f, window, sigma=None, weight=None):
    """cc^2 at every voxel of two images ``S``: a loop over windows."""
    cc2 = np.zeros(w.shape)
    for at, cut, k in windows(w.shape, window, sigma, weight):
        dw, df = w[cut] - (k * w[cut]).sum(), f[cut] - (k * f[cut]).sum()
        variances = (k * dw**2).sum() * (k * df**2).sum()
        cc2[at] = (k * dw * df).sum() ** 2 / variances if variances > 0 else 0
    return cc2


def local_ssim(w, f, window, sigma, weight=None):
    """SSIM at every voxel of two images ``S``, data range 1: a loop over windows."""
    found = np.zeros(w.shape)
    for at, cut, k in windows(w.shape, window, sigma, weight):
        x, y = (k * w[cut]).sum(), (k * f[cut]).sum()
        variances = (k * (w[cut] - x) ** 2).sum() + (k * (f[cut] - y) ** 2).sum()
        covariance = (k * (w[cut] - x) * (f[cut] - y)).sum()
        found[at] = (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4)
        found[at] *= (2 * covariance + 9e-4) / (variances + 9e-4)
    return found


def cubic_spline(x):
    """The cubic B-spline, by its two pieces."""
    x = abs(x)
    return np.where(x < 1, 2 / 3 - x**2 + x**3 / 2, np.clip(2 - x, 0, None) ** 3 / 6)


def joint_distribution(w, f, bins, ranges, m):
    """Parzen windows, voxel by voxel, over all bins; the ranges end at bins 1 and bins - 2."""
    joint = np.zeros((bins, bins))
    for *values, weight in zip(w.ravel(), f.ravel(), m.ravel(), strict=True):
        windows = []
        for x, (low, high) in zip(values, ranges, strict=True):
            at = 1 + (np.clip(x, low, high) - low) / (high - low) * (bins - 3)
            windows.append(cubic_spline(np.arange(bins) - at))
        joint += weight * np.outer(*windows)
    return joint / joint.sum()


def entropies(joint):
    """Of the first, of the second and of both, in nats."""
    return entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint.ravel())


def self_similarity(image, m, radius=1, dilation=1):
    """MIND-SSC ``(K, *S)``: a loop over voxels, the patches at their neighbours, and pairs."""
    d = image.ndim
    neighbours = [s * dilation * np.eye(d, dtype=int)[a] for a in range(d) for s in (1, -1)]
    offsets = np.array(list(product(range(-radius, radius + 1), repeat=d)))
    pairs = [
        (i, j) for i, j in combinations(range(2 * d), 2) if (neighbours[i] + neighbours[j]).any()
    ]
    distances = np.zeros((len(pairs), *image.shape))
    for at in np.ndindex(*image.shape):
        places = [(at + n + offsets).clip(0, np.array(image.shape) - 1).T for n in neighbours]
        patches, weights = ([x[tuple(p)] for p in places] for x in (image, m))
        for k, (i, j) in enumerate(pairs):
            counts = (weights[i] > 0) & (weights[j] > 0)
            squares = (patches[i] - patches[j])[counts] ** 2
            distances[(k, *at)] = squares.mean() if counts.any() else 0
    distances -= distances.min(0)
    variance = distances.mean(0)
    mean = np.average(variance, weights=m)
    return np.exp(-distances / variance.clip(mean / 1000, 1000 * mean))


def plain(name, w, f, m):
    """The similarity of two images ``S`` with weights ``m``, in NumPy."""
    mean = partial(np.average, weights=m)
    if name == "mae":
        return mean(abs(w - f))
    if name == "mse":
        return mean((w - f) ** 2)
    if name == "ncc":
        dw, df = w - mean(w), f - mean(f)
        return 1 - mean(dw * df) / np.sqrt(mean(dw**2) * mean(df**2))
    if name == "soft_dice":
        return 1 - 2 * (m * w * f).sum() / (m * (w + f)).sum()
    if name in ("mutual_information", "normalised"):
        h_w, h_f, h = entropies(joint_distribution(w, f, 9, [(0, 1)] * 2, m))
        return h - h_w - h_f if name == "mutual_information" else 1 - (h_w + h_f) / h
    if name == "mind":
        return mean(((self_similarity(w, m) - self_similarity(f, m)) ** 2).mean(0))
    if name == "dssim":
        return 1 - mean(local_ssim(w, f, 5, 1.5, m))
    window, sigma = (3, None) if name == "lncc" else (7, 1.5)
    return 1 - mean(local_correlation(w, f, window, sigma, m))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_equals_a_plain_loop(name, shape, weighted):
    """float64, so only the order of summation differs; channels are averaged."""
    w, f = pair(shape)
    weight = random_weight(shape) if weighted else None
    ours = ALL[name](w, f, weight=weight, reduction="none")
    m = weight if weighted else torch.ones(2, 1, *shape)
    for i in range(2):
        channels = zip(w[i].numpy(), f[i].numpy(), strict=True)
        expected = np.mean([plain(name, a, b, m[i, 0].numpy()) for a, b in channels])
        np.testing.assert_allclose(ours[i].item(), expected, rtol=1e-9)


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("shape", [(20, 24), (12, 13, 11)], ids=str)
def test_lncc_in_float32_equals_the_loop_in_float64(shape, window):
    w, f = pair(shape, batch=1, channels=1)
    expected = 1 - local_correlation(w[0, 0].numpy(), f[0, 0].numpy(), window).mean()
    ours = lncc(w.float() + 100, f.float() * 1000, window=window)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.item(), expected, rtol=0, atol=1e-4)


def test_the_plain_loop_equals_monai_on_interior_windows():
    """MONAI pads windows with zeros, so that only whole windows are comparable."""
    losses = pytest.importorskip("monai.losses")
    w, f = pair((12, 11, 13), batch=1, channels=1)
    for window in (3, 5):
        reference = losses.LocalNormalizedCrossCorrelationLoss(
            kernel_size=window, reduction="none", smooth_dr=1e-12
        )
        inside = (slice(window // 2, -(window // 2)),) * 3
        cc2 = local_correlation(w[0, 0].numpy(), f[0, 0].numpy(), window)
        np.testing.assert_allclose(
            cc2[inside], -reference(w, f)[0, 0].numpy()[inside], rtol=0, atol=1e-8
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_voxels_of_weight_zero_have_no_influence(name, shape):
    """Not on the value, not on the gradient, whatever they hold; and they get no gradient."""
    function, weight = ALL[name], random_weight(shape)
    outside = (weight == 0).expand(2, 2, *shape)
    assert 0.1 < outside.double().mean() < 0.9

    def value_and_gradient(fill):
        w, f = (x.masked_fill(outside, fill).requires_grad_() for x in pair(shape))
        value = function(w, f, weight=weight)
        return value, *torch.autograd.grad(value, (w, f))

    reference = value_and_gradient(0.5)
    for gradient in reference[1:]:
        assert gradient[outside].eq(0).all()
    for fill in (1e6, torch.inf, torch.nan):
        for a, b in zip(value_and_gradient(fill), reference, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_only_the_ratio_of_weights_counts(name, shape):
    function, (w, f), weight = ALL[name], pair(shape), random_weight(shape)
    ones = torch.ones_like(weight)
    torch.testing.assert_close(function(w, f, weight=ones), function(w, f))
    expected = function(w, f, weight=weight)
    for scale in (1e-8, 1e4):
        torch.testing.assert_close(function(w, f, weight=scale * weight), expected)
    mask = weight > 0
    torch.testing.assert_close(
        function(w, f, weight=mask), function(w, f, weight=mask.to(torch.float64))
    )


@pytest.mark.parametrize("name", ALL)
def test_no_weight_at_all_is_finite(name):
    w, f = (x.requires_grad_() for x in pair((8, 8)))
    value = ALL[name](w, f, weight=torch.zeros(2, 1, 8, 8))
    value.backward()
    assert value.isfinite()
    assert w.grad.eq(0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_two_images_play_the_same_part(name, shape):
    w, f = pair(shape)
    torch.testing.assert_close(ALL[name](w, f), ALL[name](f, w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRELATIONS)
def test_correlations_do_not_see_brightness_and_contrast(name, shape):
    function, (w, f) = CORRELATIONS[name], pair(shape)
    torch.testing.assert_close(function(w, f), function(3 * w - 5, 0.01 * f + 7))
    # Global correlation tells a negative from a positive, squared local correlation does not.
    negative = 2 - function(w, f) if name == "ncc" else function(w, f)
    torch.testing.assert_close(function(-w, f), negative)


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize(("scale", "offset"), [(1, 1e4), (1e-3, 0), (1e4, 0), (1e4, 1e5)], ids=str)
def test_correlations_in_float32_survive_offset_and_scale(name, scale, offset):
    """At an offset of 1e4 a float32 image itself is rounded to 1e-3 of its range."""
    w, f = pair((40, 36), channels=1)
    expected = CORRELATIONS[name](w, f)
    shifted = (scale * w + offset).float().requires_grad_()
    value = CORRELATIONS[name](shifted, (scale * f + offset).float())
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-4)
    value.backward()
    reference = w.clone().requires_grad_()
    CORRELATIONS[name](reference, f).backward()
    difference = scale * shifted.grad.double() - reference.grad
    assert difference.norm() < 1e-2 * reference.grad.norm()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", ["warped", "fixed", "both"])
@pytest.mark.parametrize("level", [0.0, 0.3, 1e4])
def test_constant_images_give_finite_values_and_gradients(name, constant, level):
    w, f = pair((20, 18), dtype=torch.float32)
    w = torch.full_like(w, level) if constant in ("warped", "both") else w
    f = torch.full_like(f, level) if constant in ("fixed", "both") else f
    w.requires_grad_()
    f.requires_grad_()
    value = ALL[name](w, f)
    value.backward()
    assert value.isfinite()
    assert w.grad.isfinite().all()
    assert f.grad.isfinite().all()
    if name in CORRELATIONS:
        torch.testing.assert_close(value.item(), 1.0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", CORRELATIONS)
def test_the_mean_of_a_large_offset_is_taken_off_to_the_last_digit(name):
    """Exact in float32 as 1e6 and 1e6 + 1; one mean of it is wrong by up to 0.03."""
    w, f = ((x > 0.5).float() for x in pair((40, 36), channels=1))
    shifted = CORRELATIONS[name](w + 1e6, f + 1e6)
    torch.testing.assert_close(shifted, CORRELATIONS[name](w, f), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_gradient_where_the_floor_of_the_variances_holds(share):
    """With this share of the windows flat: the variance is a constant there, cc^2 is not."""
    w, f = (x.requires_grad_() for x in pair((6, 7), batch=1, channels=1))

    def local_sum(x):
        return box_sum(x, 3)

    count = local_sum(torch.ones_like(w))
    variances = [local_sum(x**2) / count - (local_sum(x) / count) ** 2 for x in (w, f)]
    floors = [v.detach().quantile(share) * 1.0001 for v in variances]
    assert torch.autograd.gradcheck(
        lambda a, b: _LocalCorrelation.apply(a, b, *floors, None, local_sum), (w, f)
    )


@pytest.mark.parametrize("bright", [1e3, 3e3, 1e5])
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_a_few_bright_voxels_in_a_dark_image(bright, sigma):
    """Metal: variances in its window are rounding errors, which must not count as correlation."""
    rng = np.random.default_rng(0)
    w, f = torch.from_numpy(rng.random((2, 1, 1, 256, 256))).float()
    for x in (w, f):
        x[..., 20:26, 20:26] += bright
    w.requires_grad_()
    value = lncc(w, f, window=3, sigma=sigma)
    value.backward()
    expected = lncc(w.detach().double(), f.double(), window=3, sigma=sigma)
    # The 16 windows within the metal are flat for float32: 16 of 65,536 voxels.
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=3e-4)
    assert w.grad.abs().max() < 1e-3


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_autocast_and_half_precision_are_accumulated_in_float32(name, dtype, inside):
    """The backward pass may run after the autocast region or inside it."""
    w, f = (x.to(dtype) for x in pair((20, 18)))
    exact = w.double().requires_grad_()
    expected = ALL[name](exact, f.double())
    expected.backward()
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = ALL[name](w, f)
        if inside:
            value.backward()
    if not inside:
        value.backward()
    assert value.dtype == torch.float32
    assert w.grad.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
    error = (w.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(32, 31), (24, 25, 26)], ids=str)
def test_dssim_is_the_measure_but_for_the_border(shape):
    """Nothing is to be seen within ten voxels of it, so SSIM is 1 where the measure does not look.

    The measure takes windows that fit: five voxels are missing at every face.
    """
    w, f = (4 * x for x in pair(shape))
    seen = torch.zeros(shape, dtype=w.dtype)
    seen[(slice(10, -10),) * len(shape)] = 1
    share = np.prod([(n - 10) / n for n in shape])
    expected = share * (1 - ssim(seen * w, seen * f, data_range=4.0))
    found = dssim(seen * w, seen * f, data_range=4.0, reduction="none")
    assert (found > 0.001).all()
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_dice_of_hard_labels_is_the_dice_of_the_metrics(shape):
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(0, 3, (2, 1, *shape))) for _ in range(2))
    scores = dice(a, b, labels=[0, 1, 2]).mean(1)
    one_hot = [torch.cat([x == k for k in range(3)], 1).float() for x in (a, b)]
    torch.testing.assert_close(1 - soft_dice(*one_hot, reduction="none"), scores)


def test_a_channel_empty_in_both_is_perfect_overlap():
    w, f = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    w[0, 0, 0], f[0, 0, 1] = 1, 1
    assert soft_dice(w, f).item() == 0.5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_gradients_with_respect_to_both_images(name, shape, weighted):
    weight = random_weight(shape) if weighted else None
    w, f = (x.requires_grad_() for x in pair(shape, channels=1))
    function = partial(ALL[name], weight=weight, reduction="none")
    assert torch.autograd.gradcheck(function, (w, f))
    if name not in ONCE:
        assert torch.autograd.gradgradcheck(function, (w, f), fast_mode=True)


@pytest.mark.parametrize("name", ONCE)
def test_what_has_no_second_gradient_says_so(name):
    w, f = (x.requires_grad_() for x in pair((6, 6)))
    with pytest.raises(RuntimeError, match=rf"^{ONCE[name]}: it has no second derivative"):
        torch.autograd.grad(ALL[name](w, f), w, create_graph=True)


@pytest.mark.parametrize("shape", [(5, 6), (4, 4, 5)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_gradients_with_respect_to_image_and_field(name, shape):
    """Fractions in [0.2, 0.8], inside: linear interpolation has corners at the voxels."""
    rng = np.random.default_rng(2)
    moving, fixed = pair(shape, channels=1)
    size = np.array(shape).reshape(-1, *(1,) * len(shape))
    whole = rng.integers(0, size - 1, (2, len(shape), *shape))
    at = whole + rng.uniform(0.2, 0.8, whole.shape)
    field = torch.from_numpy(at - np.indices(shape)).requires_grad_()
    moving.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, u: ALL[name](warp(m, u), fixed), (moving, field), fast_mode=True
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mutual_information_of_few_levels_is_that_of_their_contingency_table(shape, weighted):
    """Levels four bins apart share no bin: windows add their entropy to both sides, exactly."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 1, 1, *shape))
    b = np.where(rng.random(b.shape) < 0.5, a**2 % 4, b)
    m = rng.integers(0, 4, b.shape) if weighted else np.ones(b.shape, int)
    table = crosstab(np.repeat(a.ravel(), m.ravel()), np.repeat(b.ravel(), m.ravel())).count
    h_a, h_b, h = entropies(table / table.sum())
    ours = mutual_information(
        torch.from_numpy(a * 100.0),
        torch.from_numpy(b / 7),
        bins=4 * 3 + 3,
        warped_range=(0, 300),
        fixed_range=(0, 3 / 7),
        weight=torch.from_numpy(m),
    )
    np.testing.assert_allclose(ours.item(), h - h_a - h_b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 40), (12, 13, 11)], ids=str)
def test_mutual_information_is_that_of_itk_where_the_fixed_image_has_few_levels(shape):
    """ITK bins the fixed image and spreads the moving one over as many bins, plus one at its end.

    The fixed image's window has no part in the value where its levels are four bins apart.
    """
    rng = np.random.default_rng(0)
    warped = rng.random(shape)
    fixed = np.floor(4.999 * (0.7 * warped + 0.3 * rng.random(shape)))
    bins = 4 * 4 + 3
    registration = sitk.ImageRegistrationMethod()
    registration.SetMetricAsMattesMutualInformation(bins + 1)
    registration.SetMetricSamplingStrategy(registration.NONE)
    registration.SetInterpolator(sitk.sitkLinear)
    registration.SetInitialTransform(sitk.Transform(len(shape), sitk.sitkIdentity))
    expected = registration.MetricEvaluate(*map(sitk.GetImageFromArray, (fixed, warped)))
    ours = mutual_information(
        *(torch.from_numpy(x)[None, None] for x in (warped, fixed)), bins=bins
    )
    assert expected < -0.5
    np.testing.assert_allclose(ours.item(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
def test_mutual_information_orders_images_as_monai_does(normalised):
    """Its windows differ, so that only the order is comparable."""
    losses = pytest.importorskip("monai.losses")
    reference = losses.GlobalMutualInformationLoss()
    rng = np.random.default_rng(0)
    fixed, noise = torch.from_numpy(rng.random((2, 1, 1, 20, 18, 16)))
    images = [(1 - t) * (2 * fixed - 1).abs() + t * noise for t in np.linspace(0, 1, 9)]
    ours = [mutual_information(x, fixed, normalised=normalised).item() for x in images]
    theirs = [reference(x, fixed).item() for x in images]
    assert theirs == sorted(theirs)
    assert ours == sorted(ours)
    assert ours[0] < 6 * ours[-1] < 0


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", [(40, 36), (12, 13, 11)], ids=str)
def test_mutual_information_does_not_see_changes_of_intensity(shape, normalised):
    """Linear ones and negatives exactly; monotone ones nearly, where ncc is far off."""
    function = partial(mutual_information, normalised=normalised)
    w, f = pair(shape, channels=1)
    expected = function(w, f)
    torch.testing.assert_close(function(3 * w - 5, 0.01 * f + 7), expected)
    torch.testing.assert_close(function(-w, f), expected)
    torch.testing.assert_close(function(w.exp(), f), expected, rtol=0.1, atol=0)
    # The image and a function of it that is not monotone: correlation finds nothing.
    bent = (w - w.mean()).square()
    assert ncc(bent, w) > 0.9
    assert function(bent, w) < 1.5 * expected


@pytest.mark.parametrize("weighted", [False, True])
def test_the_range_is_the_image_s_own_unless_it_is_given(weighted):
    """Of each sample and channel; as a constant, whichever way it comes."""
    w, f = (x * torch.tensor([1.0, 9.0]).view(1, 2, 1, 1) for x in pair((8, 9)))
    weight = random_weight((8, 9)) if weighted else None
    counts = torch.ones(2, 1, 8, 9, dtype=torch.bool) if weight is None else weight > 0
    ranges = [
        torch.stack(
            [
                x.masked_fill(~counts, torch.inf).flatten(2).amin(2),
                x.masked_fill(~counts, -torch.inf).flatten(2).amax(2),
            ],
            2,
        )
        for x in (w, f)
    ]

    def value_and_gradient(**options):
        images = [x.clone().requires_grad_() for x in (w, f)]
        value = mutual_information(*images, bins=8, weight=weight, **options)
        return value, *torch.autograd.grad(value, images)

    given = value_and_gradient(warped_range=ranges[0], fixed_range=ranges[1])
    for a, b in zip(value_and_gradient(), given, strict=True):
        assert a.equal(b)
    wide = value_and_gradient(warped_range=(-1, 10), fixed_range=(0, 20))
    assert not wide[0].isclose(given[0])


def test_intensities_beyond_the_range_are_its_ends_and_have_no_gradient():
    w, f = (x.requires_grad_() for x in pair((8, 9), channels=1))
    ranges = {"warped_range": (0.2, 0.7), "fixed_range": (0.1, 0.6)}
    value = mutual_information(w, f, bins=8, **ranges)
    clamped = mutual_information(w.clamp(0.2, 0.7), f.clamp(0.1, 0.6), bins=8)
    torch.testing.assert_close(value, clamped)
    grad_w, grad_f = torch.autograd.grad(value, (w, f))
    for x, grad, (low, high) in zip((w, f), (grad_w, grad_f), ranges.values(), strict=True):
        outside = (x < low) | (x > high)
        assert 0.1 < outside.double().mean() < 0.9
        assert grad[outside].eq(0).all()
        assert grad[~outside].ne(0).all()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("level", [0.0, 0.3, 1e4])
@pytest.mark.parametrize("constant", ["warped", "fixed", "both"])
def test_a_constant_image_tells_nothing(constant, level, normalised):
    """Also if it is constant but for a rounding here and there, as after a warp."""
    w, f = pair((20, 18), dtype=torch.float32)
    flat = torch.full_like(w, level)
    rounded = torch.where(w > 0.5, flat, torch.nextafter(flat, torch.tensor(1e9)))
    for image in (flat, rounded):
        a = (image if constant in ("warped", "both") else w).clone().requires_grad_()
        b = (image if constant in ("fixed", "both") else f).clone().requires_grad_()
        value = mutual_information(a, b, normalised=normalised)
        value.backward()
        torch.testing.assert_close(value.item(), 0.0, rtol=0, atol=1e-6)
        assert a.grad.isfinite().all()
        assert b.grad.isfinite().all()
        assert a.grad.abs().max() < 1
        assert b.grad.abs().max() < 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_the_size_of_chunks_does_not_matter(shape, chunk, monkeypatch):
    w, f = (x.requires_grad_() for x in pair(shape))
    weight = random_weight(shape)
    expected = mutual_information(w, f, weight=weight, reduction="none")
    gradients = torch.autograd.grad(expected.sum(), (w, f))
    monkeypatch.setattr(similarity, "CHUNK", chunk)
    value = mutual_information(w, f, weight=weight, reduction="none")
    torch.testing.assert_close(value, expected)
    for a, b in zip(torch.autograd.grad(value.sum(), (w, f)), gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_no_number_spoils_its_own_sample_only(bad):
    w, f = pair((8, 9), dtype=torch.float32)
    expected = mutual_information(w, f, reduction="none")
    w[0, 1, 2, 3] = bad
    value = mutual_information(w, f, reduction="none")
    assert value[0].isnan()
    assert value[1].equal(expected[1])


def test_a_large_background_does_not_swallow_the_voxels_of_its_bin():
    """In float32, 2^24 voxels of one bin are as many as one more: here, eight times fewer."""
    w, f = pair((12, 16), batch=1, channels=1)
    background = torch.full((1, 1, 2**17, 16), 0.1, dtype=torch.float64)
    w, f = (torch.cat([background, x], 2) for x in (w, f))
    ranges = {"warped_range": (0, 1), "fixed_range": (0, 1)}
    expected = mutual_information(w, f, **ranges)
    ours = mutual_information(w.float(), f.float(), **ranges)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)


def test_mutual_information_finds_the_shift_between_two_modalities():
    """Dark and bright tissue are both bright in the other one: no correlation at the true shift."""
    texture = gaussian_smooth(pair((40, 36), batch=1, channels=1)[0], 2.0)
    ranks = texture.flatten().argsort().argsort().view_as(texture).double()
    fixed = ranks / ranks.max()
    moving = (2 * fixed - 1).abs().roll(5, 2)
    shifts = range(-10, 11)
    values = [mutual_information(moving.roll(-s, 2), fixed).item() for s in shifts]
    assert shifts[int(np.argmin(values))] == 5
    correlations = [ncc(moving.roll(-s, 2), fixed).item() for s in shifts]
    assert abs(1 - correlations[15]) < 0.01 < 1 - min(correlations)


@pytest.mark.parametrize("name", ["data_range", "sigma"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_dssim_names_a_number_that_is_not_positive(name, value):
    w, f = pair((12, 12))
    with pytest.raises(ValueError, match=rf"^{name}: wanted a positive number"):
        dssim(w, f, **{name: value})


def test_bad_bins_and_ranges_are_named():
    w, f = pair((6, 5))
    for bins, error in ((3, ValueError), (0, ValueError), (8.0, TypeError)):
        with pytest.raises(error, match=r"^bins: wanted .* got"):
            mutual_information(w, f, bins=bins)
    for given in ((1, 0), (0.0, torch.inf), (torch.nan, 1.0)):
        with pytest.raises(ValueError, match=r"^fixed_range: wanted finite numbers .* got"):
            mutual_information(w, f, fixed_range=given)
    for given in ((1.0,), torch.zeros(2, 2, 3), torch.zeros(1, 2, 2)):
        with pytest.raises(ValueError, match=r"^warped_range: wanted \(low, high\) .* got"):
            mutual_information(w, f, warped_range=given)
    for given in ("ab", 1.0, (None, 1)):
        with pytest.raises(TypeError, match=r"^warped_range: wanted .* got"):
            mutual_information(w, f, warped_range=given)


#: Prints the rise of the peak memory in MB, and the best times in seconds of one or both.
BENCHMARK = """
import json, resource, sys, time
import torch
from reglib.objectives.similarity import lncc, mutual_information
which, measure, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
ours = {"lncc": lncc, "mutual_information": mutual_information}[measure]
functions = {"reglib": ours}
if which == "monai":
    from monai import losses
    theirs = {
        "lncc": losses.LocalNormalizedCrossCorrelationLoss(kernel_size=9),
        "mutual_information": losses.GlobalMutualInformationLoss(num_bins=32),
    }
    functions = {"monai": theirs[measure]} | functions

def step(function, size):
    fixed, warped = torch.rand(2, 1, 1, size, size, size)
    warped.requires_grad_()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    function(warped, fixed).backward()
    seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds

first, *_ = functions.values()
step(first, 16)
memory, seconds = step(first, n)
times = {name: [step(function, n)[1]] for name, function in functions.items()}
times[next(iter(functions))].append(seconds)
times["reglib"] += [step(ours, n)[1] for _ in range(3)]
print(json.dumps({"memory": memory, "times": {k: min(v) for k, v in times.items()}}))
"""


def benchmark(which, measure, size):
    """Run in a fresh process: the peak of resident memory only ever rises."""
    root = Path(__file__).parents[1]
    # One thread each: on a loaded machine, two wait for each other and nothing is comparable.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", BENCHMARK, which, measure, str(size)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("measure", "size", "faster", "smaller"),
    [("lncc", 96, 5, 2), ("mutual_information", 64, 10, 5)],
    ids=["lncc", "mutual_information"],
)
def test_many_times_faster_than_monai_in_a_fraction_of_the_memory(measure, size, faster, smaller):
    """Forward and backward, window 9 and 32 bins; the best of a few, as machines are shared."""
    pytest.importorskip("monai")
    runs = {which: [benchmark(which, measure, size)] for which in ("reglib", "monai")}
    times = runs["monai"][0]["times"]
    assert faster * times["reglib"] < times["monai"]
    while True:
        ours, theirs = (min(r["memory"] for r in runs[k]) for k in ("reglib", "monai"))
        if smaller * ours <= theirs or len(runs["reglib"]) == 3:
            break
        runs["reglib"].append(benchmark("reglib", measure, size))
    assert smaller * ours <= theirs
