"""Overlap and folding as they are reported."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import fft

from reglib.geometry.grid import identity_grid
from reglib.objectives.metrics import (
    affine_share,
    dice,
    folding,
    nda,
    ndv,
    spectral_centroid,
)

SHAPES = [(9, 7), (7, 8, 6)]


def random_field(shape, size=0.6, batch=3):
    noise = np.random.default_rng(0).normal(0, size, (batch, len(shape), *shape))
    return torch.from_numpy(noise)


def digital_volume(field, **options):
    return (nda if field.shape[1] == 2 else ndv)(field, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0.2, 0.6, 2.0])
def test_digital_volume_equals_the_authors_package(shape, masked, size):
    """Over the whole grid, border included; the package works in float32 in places."""
    package = pytest.importorskip("digital_diffeomorphism")
    reference = package.nda if len(shape) == 2 else package.ndv
    u = random_field(shape, size)
    mask = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (3, 1, *shape)))
    ours = digital_volume(u, mask=mask if masked else None)
    for i in range(3):
        # The package adds to its argument in place.
        vectors = np.moveaxis(u[i].numpy(), 0, -1).copy()
        inside = mask[i, 0].numpy() if masked else None
        percent = reference(vectors, mask=inside, is_disp=True)[1]
        np.testing.assert_allclose(100 * ours[i].item(), percent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folded_voxels_equal_the_authors_package_in_the_interior(shape):
    package = pytest.importorskip("digital_diffeomorphism")
    reference = package.nda if len(shape) == 2 else package.ndv
    u = random_field(shape, 1.5, batch=1)
    interior = torch.zeros(1, 1, *shape)
    interior[(..., *(slice(1, -1),) * len(shape))] = 1
    vectors = np.moveaxis(u[0].numpy(), 0, -1).copy()
    percent = reference(vectors, mask=interior[0, 0].numpy(), is_disp=True)[4]
    assert percent > 1
    np.testing.assert_allclose(100 * folding(u, mask=interior).item(), percent, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_smooth_maps_fold_nowhere(shape, batch):
    still = torch.zeros(batch, len(shape), *shape)
    x = identity_grid(shape).expand(batch, -1, *(-1,) * len(shape))
    for u in (still, still + 5, 0.3 * x, -0.3 * x):
        assert folding(u).equal(torch.zeros(batch))
        assert digital_volume(u).equal(torch.zeros(batch))


def test_a_checkerboard_folds_only_digitally():
    """Voxels that jump to and fro are invisible to central differences, not to NDA."""
    u = torch.zeros(1, 2, 12, 12)
    u[:, 0] = 1.5 * (torch.arange(12) % 2).view(12, 1) - 0.75
    inner = torch.zeros(1, 1, 12, 12)
    inner[:, :, 2:-2] = 1
    assert folding(u, mask=inner).item() == 0
    # Every other step is 1 - 1.5 = -0.5 long: two of four determinants, each half a pixel's half.
    torch.testing.assert_close(nda(u, mask=inner).item(), 2 * 0.5 / 4)


def test_masks_choose_the_voxels():
    u = torch.zeros(2, 2, 8, 6)
    u[:, 0] = -2 * identity_grid((8, 6))[:, 0]
    u[:, :, 4:] = u[:, :, 3:4]
    upper, lower = torch.zeros(2, 1, 8, 6), torch.zeros(2, 1, 8, 6)
    upper[:, :, :3], lower[:, :, 5:] = 1, 0.5
    assert folding(u, mask=upper).tolist() == [1, 1]
    assert folding(u, mask=lower).tolist() == [0, 0]
    assert folding(u, mask=torch.zeros(2, 1, 8, 6)).isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_broken_field_does_not_pass_for_a_smooth_one(shape):
    u = torch.zeros(2, len(shape), *shape)
    u[1, 0, 3, 3] = torch.nan
    for found in (folding(u), digital_volume(u)):
        assert found[0] == 0
        assert found[1].isnan()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_dice_equals_itk(shape, dtype):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 3, 1, *shape), dtype=np.uint8)
    labels = [1, 2, 3]
    ours = dice(torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype), labels=labels)
    assert ours.shape == (3, 3)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    for i in range(3):
        overlap.Execute(sitk.GetImageFromArray(a[i, 0]), sitk.GetImageFromArray(b[i, 0]))
        expected = [overlap.GetDiceCoefficient(k) for k in labels]
        np.testing.assert_allclose(ours[i].numpy(), expected, rtol=1e-6)


def test_dice_by_hand():
    warped = torch.tensor([1, 1, 2, 0]).view(1, 1, 2, 2)
    fixed = torch.tensor([1, 2, 2, 0]).view(1, 1, 2, 2)
    scores = dice(warped, fixed, labels=[0, 1, 2, 9])[0]
    torch.testing.assert_close(scores[:3], torch.tensor([1.0, 2 / 3, 2 / 3]))
    assert scores[3].isnan()
    assert dice(fixed, warped, labels=[1]).equal(dice(warped, fixed, labels=[1]))
    assert dice(warped, warped, labels=[1, 2]).eq(1).all()


@pytest.mark.parametrize("shape", [*SHAPES, (1, 6)], ids=str)
def test_affine_share_equals_a_least_squares_fit(shape):
    u = random_field(shape)
    x = np.indices(shape).reshape(len(shape), -1)
    design = np.vstack([np.ones(x.shape[1]), x]).T
    for i in range(3):
        vectors = u[i].flatten(1).numpy().T
        fit = design @ np.linalg.lstsq(design, vectors, rcond=None)[0]
        expected = 1 - ((vectors - fit) ** 2).sum() / (vectors**2).sum()
        np.testing.assert_allclose(affine_share(u)[i].item(), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_fields_are_affine_to_the_full(shape):
    x = identity_grid(shape)
    u = torch.cat([0.3 * x + 1, x.flip(1), torch.ones_like(x), torch.zeros_like(x)])
    share = affine_share(u)
    torch.testing.assert_close(share[:3], torch.ones(3))
    assert share[3].isnan()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectral_centroid_equals_scipy_cosine_transform(shape):
    u = random_field(shape)
    cycles = np.meshgrid(*(np.arange(n) / (2 * n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(c**2 for c in cycles))
    for i in range(3):
        power = fft.dctn(u[i].numpy(), axes=range(1, u.ndim - 1), norm="ortho") ** 2
        expected = (power * radius).sum() / power.sum()
        np.testing.assert_allclose(spectral_centroid(u)[i].item(), expected, rtol=1e-5)


def test_spectral_centroid_of_a_wave_is_its_frequency():
    """A cosine with its crests at the border, 3 half periods in 24 voxels: 1/16 cycle a voxel."""
    wave = torch.cos(torch.pi * 3 * (torch.arange(24) + 0.5) / 24)
    u = torch.stack([wave.expand(9, 24), wave.expand(9, 24)])[None]
    torch.testing.assert_close(spectral_centroid(u), torch.tensor([1 / 16]))
    assert spectral_centroid(torch.ones(1, 2, 9, 24)).abs() < 1e-6
    assert spectral_centroid(torch.zeros(1, 2, 9, 24)).isnan()
