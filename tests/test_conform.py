"""Grids of a wanted orientation, spacing and size, against nibabel and SciPy.

Coordinates are float64 on both sides: 1e-9 mm. Interpolated images agree to 1e-5 of a range of
about 2, as image and weights are rounded to float32.
"""

import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import conform as nibabel_conform
from scipy import ndimage
from scipy.spatial.transform import Rotation

from reglib.data.conform import conform, conform_grid, resample
from reglib.data.nifti import Image
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp

SHAPES = {2: (11, 14), 3: (10, 13, 8)}
SPACING = (0.8, 1.5, 1.1)


def oblique(d, seed=0, angle=0.2, mirrored=False, order=(0, 1, 2)):
    """Axes turned by up to ``angle`` radians, unequal spacing, an origin far away."""
    rng = np.random.default_rng(seed)
    turn = Rotation.from_rotvec(angle * rng.uniform(-1, 1, 3) / math.sqrt(3)).as_matrix()
    if d == 2:
        turn = Rotation.from_rotvec([0, 0, angle / 2]).as_matrix()[:2, :2]
        order = [k for k in order if k < 2]
    affine = np.eye(d + 1)
    affine[:d, :d] = (turn * np.array(SPACING)[:d])[:, list(order)]
    if mirrored:
        affine[:d, 0] *= -1
    affine[:d, d] = rng.uniform(-80, 80, d)
    return torch.from_numpy(affine)


def waves(shape, seed=0, batch=1, channels=1):
    """A smooth image, range about 2, nowhere symmetric."""
    rng = np.random.default_rng(seed)
    x = np.indices(shape)
    values = [
        sum(
            np.sin(np.tensordot(rng.uniform(-0.5, 0.5, len(shape)), x, 1) + p)
            for p in rng.uniform(0, 6, 3)
        )
        for _ in range(batch * channels)
    ]
    return torch.from_numpy(np.stack(values).reshape(batch, channels, *shape)).float()


def centres(affine, shape):
    """World mm of every voxel centre, ``(*S, D)``."""
    affine = np.asarray(affine)
    d = len(shape)
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:d, :d].T + affine[:d, d]


def all_orientations(d):
    pairs = [("R", "L"), ("A", "P"), ("S", "I")][:d]
    for order in itertools.permutations(range(d)):
        for signs in itertools.product((0, 1), repeat=d):
            yield "".join(pairs[a][s] for a, s in zip(order, signs, strict=True))


# --- The grid -------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)], ids=str)
def test_every_orientation_is_what_nibabel_makes_of_it(order, mirrored):
    """Axes permuted and flipped, nothing interpolated: all 48 in 3-D, to the last voxel."""
    affine = oblique(3, mirrored=mirrored, order=order)
    image = Image(torch.rand(1, 1, *SHAPES[3], generator=torch.Generator().manual_seed(0)), affine)
    nifti = nib.Nifti1Image(image.tensor[0, 0].numpy(), affine.numpy())
    for wanted in all_orientations(3):
        change = ornt_transform(io_orientation(nifti.affine), axcodes2ornt(wanted))
        expected = nifti.as_reoriented(change)
        found = conform(image, orientation=wanted)
        assert found.orientation == wanted
        np.testing.assert_allclose(found.affine, expected.affine, rtol=0, atol=1e-9)
        np.testing.assert_allclose(
            found.tensor[0, 0], np.asarray(expected.dataobj), rtol=0, atol=1e-5
        )


def test_canonical_is_ras():
    affine = oblique(3, mirrored=True, order=(2, 0, 1))
    image = Image(waves(SHAPES[3]), affine)
    expected = nib.as_closest_canonical(nib.Nifti1Image(image.tensor[0, 0].numpy(), affine.numpy()))
    found = conform(image, orientation="RAS")
    np.testing.assert_allclose(found.affine, expected.affine, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.tensor[0, 0], expected.get_fdata(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", list(all_orientations(2)))
def test_every_orientation_of_a_plane(wanted):
    """A pixel keeps its place in the world, so its value is found there."""
    affine = oblique(2)
    image = Image(waves(SHAPES[2]), affine)
    found = conform(image, orientation=wanted)
    assert found.orientation == wanted
    old = {
        tuple(p): v
        for p, v in zip(
            centres(affine, SHAPES[2]).reshape(-1, 2).round(6), image.tensor.flatten(), strict=True
        )
    }
    shape = tuple(found.tensor.shape[2:])
    new = zip(
        centres(found.affine, shape).reshape(-1, 2).round(6), found.tensor.flatten(), strict=True
    )
    assert max(abs(old.pop(tuple(p)) - v) for p, v in new) < 1e-5
    assert not old


@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("orientation", [None, 0, 5])
@pytest.mark.parametrize("d", [2, 3])
def test_with_the_same_spacing_voxel_centres_coincide(d, orientation, multiple):
    affine = oblique(d, mirrored=True)
    wanted = None if orientation is None else list(all_orientations(d))[orientation]
    new, shape = conform_grid(affine, SHAPES[d], orientation=wanted, multiple=multiple)
    assert all(n % multiple == 0 for n in shape)
    assert math.prod(shape) < math.prod(n + multiple for n in SHAPES[d])
    # In voxels of the new grid, old centres are whole numbers within it, all different.
    inverse = np.linalg.inv(new.numpy())
    at = centres(affine, SHAPES[d]).reshape(-1, d) @ inverse[:d, :d].T + inverse[:d, d]
    np.testing.assert_allclose(at, at.round(), rtol=0, atol=1e-9)
    assert (at.round() >= 0).all()
    assert (at.round() < shape).all()
    # What is added lies on both sides, at the end one more at most.
    before, after = at.round().min(0), np.array(shape) - 1 - at.round().max(0)
    assert set(after - before) <= {0, 1}


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.5, 1.0, 0.7), (1.5, 0.8, 3.3)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("d", [2, 3])
def test_with_another_spacing_the_middle_stays_and_the_view_is_covered(d, order, spacing):
    affine = oblique(d, mirrored=True, order=order)
    new, shape = conform_grid(affine, SHAPES[d], orientation="RAS"[:d], spacing=spacing[:d])
    image = Image(torch.zeros(1, 1, *shape), new)
    np.testing.assert_allclose(image.spacing, spacing[:d], rtol=1e-9)
    assert image.orientation == "RAS"[:d]
    middle = [centres(a, s).reshape(-1, d).mean(0) for a, s in ((affine, SHAPES[d]), (new, shape))]
    np.testing.assert_allclose(*middle, rtol=0, atol=1e-9)
    # Axes stay parallel: each new direction is an old one, or its reverse.
    old_steps, new_steps = ((a[:d, :d] / a[:d, :d].norm(dim=0)).numpy() for a in (affine, new))
    np.testing.assert_allclose(np.sort(abs(old_steps.T @ new_steps), 0)[-1], 1, rtol=1e-12)
    # The new view covers the old one and is less than a voxel larger.
    matching = abs(old_steps.T @ new_steps).argmax(0)
    old_view = np.array(
        [n * s for n, s in zip(SHAPES[d], affine[:d, :d].norm(dim=0).tolist(), strict=True)]
    )[matching]
    new_view = np.array([n * s for n, s in zip(shape, spacing, strict=False)])
    slack = (new_view - old_view) / np.array(spacing[:d])
    assert (slack > -2e-3).all(), slack
    assert (slack < 1).all(), slack


def test_a_spacing_that_differs_by_rounding_is_the_same():
    """Headers hold float32: 0.1 mm read back as 0.10000000149 mm must not interpolate."""
    affine = torch.diag(torch.tensor([0.1, 0.1, 0.1, 1.0], dtype=torch.float32)).double()
    new, shape = conform_grid(affine, (180, 200, 160), spacing=(0.1, 0.1, 0.1))
    assert new.equal(affine)
    assert shape == (180, 200, 160)


@pytest.mark.parametrize("d", [2, 3])
def test_a_grid_that_is_right_stays(d):
    affine = oblique(d)
    image = Image(waves(SHAPES[d]), affine)
    same = conform(image, orientation=image.orientation, spacing=image.spacing)
    torch.testing.assert_close(same.affine, affine, rtol=0, atol=1e-12)
    assert same.tensor.equal(image.tensor)
    once = conform(image, orientation="LPI"[:d], spacing=(2.0,) * d, multiple=4)
    twice = conform(once, orientation="LPI"[:d], spacing=(2.0,) * d, multiple=4)
    assert twice.tensor.equal(once.tensor)


def test_large_multiples_of_a_single_voxel():
    """One voxel among eight: three before, four after."""
    new, shape = conform_grid(torch.eye(4), (1, 1, 1), multiple=8)
    assert shape == (8, 8, 8)
    assert new[:3, 3].tolist() == [-3, -3, -3]
    found = conform(Image(torch.ones(1, 1, 1, 1, 1), torch.eye(4)), multiple=8)
    assert found.tensor.nonzero().tolist() == [[0, 0, 3, 3, 3]]


# --- Resampling -----------------------------------------------------------------------------


def scipy_resample(values, affine, new_affine, new_shape, sigma=0.0, matrix=None, mode="zeros"):
    """Smoothed and read at the new voxel centres, all in float64."""
    smooth = ndimage.gaussian_filter(values.astype(np.float64), sigma, mode="nearest")
    a = np.linalg.inv(np.asarray(affine)) @ (np.eye(len(affine)) if matrix is None else matrix)
    a = a @ np.asarray(new_affine)
    at = np.indices(new_shape)
    at = np.tensordot(a[:-1, :-1], at, 1) + a[:-1, -1].reshape(-1, *(1,) * len(new_shape))
    outside = {"zeros": "grid-constant", "border": "nearest"}[mode]
    return ndimage.map_coordinates(smooth, at, order=1, mode=outside)


def point_spread(ratio):
    return math.sqrt(max(ratio**2 - 1, 0) / (8 * math.log(2)))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.1), (0.8, 3.0, 2.4), (0.6, 0.6, 0.6)], ids=str)
@pytest.mark.parametrize("d", [2, 3])
def test_another_spacing_is_smoothing_and_reading(d, spacing, mirrored, padding):
    """Smoothed along the axes whose voxels grow, and only those."""
    affine = oblique(d, mirrored=mirrored)
    image = Image(waves(SHAPES[d]), affine)
    found = conform(image, spacing=spacing[:d], multiple=4, padding=padding)
    ratios = [new / old for new, old in zip(spacing, SPACING[:d], strict=False)]
    expected = scipy_resample(
        image.tensor[0, 0].numpy(),
        affine,
        found.affine,
        found.tensor.shape[2:],
        [point_spread(k) for k in ratios],
        mode=padding,
    )
    np.testing.assert_allclose(found.tensor[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("orientation", "order"), [("SRA", (1, 2, 0)), ("ASR", (2, 0, 1)), ("IPL", (2, 1, 0))]
)
def test_permuted_axes_are_smoothed_by_what_becomes_of_each(orientation, order):
    """``order[a]`` is the new axis that old axis ``a`` (to the right, front, up) becomes."""
    affine = oblique(3)
    image = Image(waves(SHAPES[3]), affine)
    assert image.orientation == "RAS"
    spacing = (1.2, 4.0, 2.0)
    found = conform(image, orientation=orientation, spacing=spacing)
    sigma = [point_spread(spacing[new] / old) for new, old in zip(order, SPACING, strict=True)]
    shape = found.tensor.shape[2:]
    expected = scipy_resample(image.tensor[0, 0].numpy(), affine, found.affine, shape, sigma)
    np.testing.assert_allclose(found.tensor[0, 0], expected, rtol=0, atol=1e-5)


def test_isotropic_2_mm_is_what_nibabel_makes_of_it():
    """nibabel centres the new grid likewise, without smoothing: up to that, the same image."""
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [10, -4, 7]
    smooth = ndimage.gaussian_filter(waves((20, 22, 18))[0, 0].numpy(), 2)
    nifti = nib.Nifti1Image(smooth, affine)
    expected = nibabel_conform(nifti, (10, 11, 9), (2.0, 2.0, 2.0), order=1, orientation="RAS")
    image = Image(torch.from_numpy(smooth)[None, None], torch.from_numpy(affine))
    found = conform(image, orientation="RAS", spacing=(2, 2, 2))
    assert found.tensor.shape[2:] == (10, 11, 9)
    # nibabel's grid may lie half a voxel aside: compare by place in the world.
    ours = scipy_resample(smooth, affine, expected.affine, expected.shape)
    np.testing.assert_allclose(ours, expected.get_fdata(), rtol=0, atol=1e-5)
    apart = np.abs(found.affine.numpy()[:3, 3] - expected.affine[:3, 3])
    assert apart.max() <= 1.0 + 1e-9
    inner = (slice(2, -2),) * 3
    there = scipy_resample(
        found.tensor[0, 0].numpy(), found.affine, expected.affine, expected.shape
    )
    assert abs(there[inner] - expected.get_fdata()[inner]).max() < 0.1 * np.ptp(smooth)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_each_sample_is_read_through_its_own_matrix(d, batch):
    """World mm of the new grid to world mm of the image; a batch gives what each gives alone."""
    affine, new = oblique(d), oblique(d, seed=1, mirrored=True)
    new[:d, d] = affine[:d, d]
    rng = np.random.default_rng(2)
    shape = tuple(n - 2 for n in SHAPES[d])
    matrix = np.tile(np.eye(d + 1), (batch, 1, 1))
    matrix[:, :d] += 0.03 * rng.standard_normal((batch, d, d + 1))
    image = waves(SHAPES[d], batch=batch, channels=2)
    found = resample(image, affine, new, shape, matrix=torch.from_numpy(matrix))
    for b in range(batch):
        a = np.linalg.inv(affine.numpy()) @ matrix[b] @ new.numpy()
        sigma = [point_spread(k) for k in np.linalg.norm(a[:d, :d], axis=1)]
        for c in range(2):
            expected = scipy_resample(
                image[b, c].numpy(), affine, new, shape, sigma, matrix=matrix[b]
            )
            np.testing.assert_allclose(found[b, c], expected, rtol=0, atol=1e-5)
        alone = resample(
            image[b : b + 1], affine, new, shape, matrix=torch.from_numpy(matrix[b : b + 1])
        )
        torch.testing.assert_close(alone[0], found[b], rtol=0, atol=1e-6)


@pytest.mark.parametrize("d", [2, 3])
def test_a_field_is_applied_before_the_matrix(d):
    """Without change of spacing there is no smoothing, and the rest is warp."""
    affine = torch.eye(d + 1, dtype=torch.float64)
    image = waves(SHAPES[d], batch=2)
    field = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, d, *SHAPES[d]))).float()
    moved = affine.clone()
    moved[:d, d] = 2
    found = resample(image, affine, affine, SHAPES[d], field=field, matrix=moved.expand(2, -1, -1))
    torch.testing.assert_close(found, warp(image, field + 2, padding="zeros"), rtol=0, atol=1e-6)
    still = resample(image, affine, affine, SHAPES[d], field=torch.zeros_like(field))
    torch.testing.assert_close(still, image)


def test_a_rotation_is_no_reason_to_smooth():
    affine = np.eye(4)
    new = np.eye(4)
    new[:3, :3] = Rotation.from_rotvec([0.3, -0.2, 0.4]).as_matrix()
    image = waves((12, 12, 12))
    found = resample(image, torch.from_numpy(affine), torch.from_numpy(new), (8, 9, 10))
    expected = scipy_resample(image[0, 0].numpy(), affine, new, (8, 9, 10))
    np.testing.assert_allclose(found[0, 0], expected, rtol=0, atol=1e-5)


def test_halving_the_resolution_does_not_alias():
    """A chequerboard of single voxels has no place at 2 mm: it must become grey."""
    x = identity_grid((24, 24, 24)).sum(1, keepdim=True)
    image = Image((x % 2), torch.eye(4))
    found = conform(image, spacing=(2, 2, 2), padding="border").tensor[..., 2:-2, 2:-2, 2:-2]
    assert (found - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_dtype_and_gradients_are_those_of_the_image(dtype):
    image = waves(SHAPES[3]).to(dtype).requires_grad_()
    new, shape = conform_grid(torch.eye(4), SHAPES[3], spacing=(1.4, 1, 0.8))
    found = resample(image, torch.eye(4), new, shape)
    assert found.dtype == dtype
    found.sum().backward()
    assert image.grad.abs().sum() > 0


# --- Bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"orientation": "RAX"}, ValueError, "orientation: wanted one letter of each of"),
        ({"orientation": "RRS"}, ValueError, "orientation"),
        ({"orientation": "RA"}, ValueError, "orientation"),
        ({"orientation": "RASL"}, ValueError, "orientation"),
        ({"orientation": ""}, ValueError, "orientation"),
        ({"orientation": 3}, ValueError, "orientation"),
        ({"spacing": (1, 1)}, ValueError, "spacing: wanted 3 positive numbers"),
        ({"spacing": (1, 1, 0)}, ValueError, "spacing"),
        ({"spacing": (1, 1, math.nan)}, ValueError, "spacing"),
        ({"spacing": 2.0}, TypeError, "spacing"),
        ({"multiple": 0}, ValueError, "multiple: wanted at least 1"),
        ({"multiple": 1.5}, TypeError, "multiple: wanted an integer"),
        ({"padding": "reflect"}, ValueError, "padding"),
    ],
    ids=str,
)
def test_what_cannot_be_conformed_to_is_named(options, error, sentence):
    image = Image(torch.rand(1, 1, 6, 5, 4), torch.diag(torch.tensor([1.0, 2, 3, 1])))
    options = {"multiple": 4} | options
    with pytest.raises(error, match=sentence):
        conform(image, **options)


def test_what_is_no_image_or_grid_is_named():
    with pytest.raises(TypeError, match="image: wanted an Image, got Tensor"):
        conform(torch.rand(1, 1, 5, 5))
    labels = Image(torch.ones(1, 1, 6, 5, 4, dtype=torch.uint8), torch.eye(4))
    with pytest.raises(TypeError, match="image: wanted a floating-point image"):
        conform(labels, multiple=4)
    with pytest.raises(ValueError, match="affine: wanted a 4 x 4 matrix"):
        conform_grid(torch.eye(3), (4, 5, 6))
    with pytest.raises(ValueError, match=r"affine: .* singular"):
        conform_grid(torch.zeros(4, 4) + torch.diag(torch.tensor([0.0, 0, 0, 1])), (4, 5, 6))
    with pytest.raises(ValueError, match="2 or 3 positive integers"):
        conform_grid(torch.eye(2), (4,))
    image, eye = torch.rand(2, 1, 4, 5), torch.eye(3)
    for options, sentence in (
        ({"new_shape": (4, 5, 6)}, "new_shape"),
        ({"new_affine": torch.eye(4)}, "new_affine"),
        ({"matrix": torch.eye(3).expand(3, 3, 3)}, "matrix: wanted a batch of 2"),
        ({"field": torch.zeros(2, 2, 4, 4)}, r"field: wanted shape \(2, 2, 4, 5\)"),
        ({"field": torch.zeros(1, 2, 4, 5)}, "field: wanted shape"),
    ):
        arguments = {"affine": eye, "new_affine": eye, "new_shape": (4, 5)} | options
        with pytest.raises(ValueError, match=sentence):
            resample(image, **arguments)
