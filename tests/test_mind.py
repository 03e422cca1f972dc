"""MIND-SSC descriptors against SciPy, and what must not change them.

What holds for every similarity (weights, autocast, gradients) is tested in test_similarity.py.
"""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter

from reglib.geometry.smoothing import gaussian_smooth
from reglib.objectives import mind as module
from reglib.objectives.mind import mind, mind_features
from reglib.objectives.similarity import mse, ncc

SHAPES = [(9, 11), (6, 7, 8), (1, 5, 3)]
SIZES = [(1, 1), (1, 2), (2, 1), (2, 3)]


def random_image(shape, batch=2, channels=2, seed=0):
    x = np.random.default_rng(seed).random((batch, channels, *shape))
    return torch.from_numpy(x)


def texture(shape, seed=0):
    """Ranks of a smoothed noise in [0, 1]: every intensity is as frequent."""
    x = gaussian_smooth(random_image(shape, 1, 1, seed), 1.5)
    ranks = x.flatten().argsort().argsort().view_as(x).double()
    return ranks / ranks.max()


def descriptors(image, radius, dilation):
    """Of one image ``S``, on a copy whose borders are repeated far enough: ``(K, *S)``."""
    d, width = image.ndim, 2 * dilation + radius + 1
    padded = np.pad(image, width, mode="edge")
    inside = (slice(width, -width),) * d
    distances = []
    for a, b in combinations(range(d), 2):
        for s, t in ((1, 1), (-1, -1), (-1, 1), (1, -1)):
            # Rolling by -n brings x + n to x; what comes in at the ends stays outside.
            one, other = np.roll(padded, -s * dilation, a), np.roll(padded, -t * dilation, b)
            distances.append(uniform_filter((one - other) ** 2, 2 * radius + 1)[inside])
    excess = np.array(distances) - np.min(distances, axis=0)
    variance = excess.mean(0)
    return np.exp(-excess / variance.clip(variance.mean() / 1000, 1000 * variance.mean()))


@pytest.mark.parametrize(("radius", "dilation"), SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_descriptors_are_those_of_scipy_to_the_border(shape, radius, dilation):
    image = random_image(shape)
    ours = mind_features(image, radius=radius, dilation=dilation)
    k = 2 * len(shape) * (len(shape) - 1)
    assert k == {2: 4, 3: 12}[len(shape)]
    assert ours.shape == (2, 2 * k, *shape)
    for b, c in np.ndindex(2, 2):
        expected = descriptors(image[b, c].numpy(), radius, dilation)
        np.testing.assert_allclose(
            ours[b, c * k : (c + 1) * k].numpy(), expected, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_descriptors_are_at_most_1_and_the_closest_pair_has_1(shape):
    features = mind_features(random_image(shape, channels=1))
    assert (features > 0).all()
    assert features.amax(1).eq(1).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 2**17])
@pytest.mark.parametrize("shape", [(9, 11), (6, 5, 7)], ids=str)
def test_mind_is_the_mean_square_of_the_descriptors_whatever_the_slabs(
    shape, chunk, weighted, monkeypatch
):
    """So those of a fixed image can be computed once: value and gradients are the same."""
    w, f = (random_image(shape, seed=s).requires_grad_() for s in (0, 1))
    weight = random_image(shape, channels=1, seed=2).sub(0.5).clamp(0) if weighted else None
    a, b = (mind_features(x, weight=weight) for x in (w, f))
    expected = mse(a, b, weight=weight, reduction="none")
    monkeypatch.setattr(module, "CHUNK", chunk)
    ours = mind(w, f, weight=weight, reduction="none")
    torch.testing.assert_close(ours, expected)
    for x, y in zip(
        torch.autograd.grad(ours.sum(), (w, f)),
        torch.autograd.grad(expected.sum(), (w, f)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
    # Without a gradient for the fixed image, as in a registration.
    alone = mind(w, f.detach(), weight=weight)
    alone.backward()
    torch.testing.assert_close(alone, ours.mean())
    assert f.grad is None


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_brightness_contrast_and_negatives_change_nothing(shape):
    image, other = random_image(shape), random_image(shape, seed=1)
    features = mind_features(image)
    for scale, offset in ((3, -5), (-0.01, 7), (1e6, 0), (1e-12, 0)):
        torch.testing.assert_close(mind_features(scale * image + offset), features)
    torch.testing.assert_close(mind(-3 * image + 1, 0.1 * other), mind(image, other))


@pytest.mark.parametrize("shape", [(40, 30), (30, 14, 13)], ids=str)
def test_a_change_of_contrast_in_one_half_is_seen_at_the_seam_only(shape):
    image = random_image(shape, channels=1)
    image, half = 10 + image, shape[0] // 2
    other = image.clone()
    other[:, :, half:] = 30 - 2 * other[:, :, half:]
    reach = 2 + 1  # dilation and radius
    difference = (mind_features(image) - mind_features(other)).abs().amax(1)
    assert difference[:, : half - reach].max() < 1e-9
    assert difference[:, half + reach :].max() < 1e-9
    assert difference[:, half - reach : half + reach].max() > 0.1


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_gives_what_its_samples_give_alone(shape, batch):
    w, f = random_image(shape, batch), random_image(shape, batch, seed=1)
    together = mind(w, f, reduction="none")
    features = mind_features(w)
    assert together.shape == (batch,)
    for i in range(batch):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], mind(w[one], f[one], reduction="none"))
        torch.testing.assert_close(features[one], mind_features(w[one]))
    torch.testing.assert_close(mind(w, w), torch.zeros((), dtype=torch.float64))


def test_mind_finds_the_shift_between_two_modalities():
    """Dark and bright tissue are both bright in the other one: no correlation at the true shift."""
    fixed = texture((48, 40))
    moving = (2 * fixed - 1).abs().roll(5, 2)
    shifts = range(-10, 11)
    values = [mind(moving.roll(-s, 2), fixed).item() for s in shifts]
    assert shifts[int(np.argmin(values))] == 5
    assert abs(1 - ncc(moving.roll(-5, 2), fixed)) < 0.01


def test_more_noise_is_further_away():
    fixed, noise = texture((40, 36)), random_image((40, 36), 1, 1, seed=3)
    values = [mind(fixed + t * noise, fixed).item() for t in np.linspace(0, 0.2, 9)]
    assert values == sorted(values)
    assert values[0] == 0 < values[1]


@pytest.mark.parametrize("level", [0.0, 1e-30, 0.3, 1e4])
@pytest.mark.parametrize("shape", [(12, 11), (7, 8, 9)], ids=str)
def test_a_constant_image_has_descriptors_of_1_and_a_finite_gradient(shape, level):
    """Also if it is constant but for a rounding here and there, as after a warp."""
    other = random_image(shape, channels=1).float()
    flat = torch.full_like(other, level)
    torch.testing.assert_close(mind_features(flat), torch.ones_like(mind_features(flat)))
    rounded = torch.where(other > 0.5, flat, torch.nextafter(flat, torch.tensor(1e9)))
    assert mind_features(rounded).min() > 0.9
    for image in (flat, rounded):
        w = image.clone().requires_grad_()
        value = mind(w, other)
        value.backward()
        assert 0 < value < 1
        assert w.grad.isfinite().all()
        assert mind(image, flat) < 1e-3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 4)], ids=str)
def test_gradients_of_the_descriptors(shape, weighted):
    image = random_image(shape, 1, 1).requires_grad_()
    weight = random_image(shape, 1, 1, seed=2).sub(0.2).clamp(0) if weighted else None
    for options in ({}, {"dilation": 1}, {"radius": 2, "dilation": 1}):
        function = partial(mind_features, weight=weight, **options)
        assert torch.autograd.gradcheck(function, (image,), fast_mode=True)


def test_gradients_where_the_variance_is_clamped(monkeypatch):
    """By autograd through the formula in 2-D, with bounds (constants) close around the mean."""
    monkeypatch.setattr(module, "CLAMP", (0.95, 1.05))
    image = random_image((7, 6), 1, 1).requires_grad_()
    padded = F.pad(image, (6,) * 4, mode="replicate")
    a, b = ([padded.roll(-s * 2, axis) for s in (1, -1)] for axis in (2, 3))
    pairs = [(a[0], b[0]), (a[1], b[1]), (a[1], b[0]), (a[0], b[1])]
    squares = torch.cat([(p - q).square() for p, q in pairs], 1)
    distances = F.avg_pool2d(squares, 3, 1, 1)[:, :, 6:-6, 6:-6]
    excess = distances - distances.amin(1, keepdim=True)
    variance = excess.mean(1, keepdim=True)
    low, high = (bound * variance.mean().detach() for bound in (0.95, 1.05))
    assert 0 < ((variance > low) & (variance < high)).double().mean() < 0.5
    expected = torch.exp(-excess / variance.clamp(low, high))
    ours = mind_features(image)
    torch.testing.assert_close(ours, expected)
    weights = random_image((7, 6), 1, 4, seed=4)
    gradients = [torch.autograd.grad((x * weights).sum(), image)[0] for x in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_descriptors_are_computed_in_float32_at_least(dtype):
    image = random_image((20, 18)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        features = mind_features(image)
        features.sum().backward()
    assert features.dtype == torch.float32
    assert image.grad.dtype == dtype
    exact = image.detach().double().requires_grad_()
    expected = mind_features(exact)
    expected.sum().backward()
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)
    error = (image.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize(("scale", "offset"), [(1, 1e4), (1e-3, 0), (1e4, 1e5)], ids=str)
def test_descriptors_in_float32_survive_offset_and_scale(scale, offset):
    """At an offset of 1e4 a float32 image itself is rounded to 1e-3 of its range."""
    image = random_image((40, 36))
    ours = mind_features((scale * image + offset).float())
    difference = (ours - mind_features(image)).abs()
    assert difference.max() < 0.1
    assert difference.mean() < 2e-3


def test_bad_input():
    image = random_image((6, 5), 2, 1)
    x = image.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^mind_features: it has no second derivative"):
        torch.autograd.grad(mind_features(x).sum(), x, create_graph=True)
    for function in (mind_features, lambda x, **k: mind(x, x, **k)):
        for name in ("radius", "dilation"):
            with pytest.raises(ValueError, match=rf"^{name}: wanted at least 1, got 0"):
                function(image, **{name: 0})
            with pytest.raises(TypeError, match=rf"^{name}: wanted an integer, got float"):
                function(image, **{name: 1.0})
        with pytest.raises(ValueError, match=r"^weight: wanted shape \(2, 1, 6, 5\)"):
            function(image, weight=torch.ones(1, 1, 6, 5))
    with pytest.raises(ValueError, match=r"^image: wanted a batched image"):
        mind_features(image[0])
    with pytest.raises(TypeError, match=r"^image: wanted a floating-point image"):
        mind_features(image.long())
    with pytest.raises(ValueError, match=r"^warped, fixed: wanted the same shape"):
        mind(image, image[:1])
