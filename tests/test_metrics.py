"""Overlap and folding as they are reported."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import fft
from skimage.metrics import structural_similarity

from reglib.geometry.derivatives import jacobian_det
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp_points
from reglib.objectives.metrics import (
    affine_share,
    dice,
    folding,
    jacobian_statistics,
    nda,
    ndv,
    spectral_centroid,
    ssim,
    tre,
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


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_tre_is_the_distance_in_mm(d, batch):
    rng = np.random.default_rng(0)
    warped, moving = rng.normal(0, 9, (2, batch, 5, d))
    spacing = (0.5, 2.0, 3.0)[:d]
    expected = np.sqrt((((warped - moving) * spacing) ** 2).sum(2))
    points = torch.from_numpy(warped), torch.from_numpy(moving)
    each = tre(*points, spacing=spacing, reduction="none")
    np.testing.assert_allclose(each.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(tre(*points, spacing=spacing).numpy(), expected.mean(1), rtol=1e-6)
    mm = (x * torch.tensor(spacing) for x in points)
    torch.testing.assert_close(tre(*mm), tre(*points, spacing=spacing))
    assert tre(points[0], points[0]).equal(torch.zeros(batch))


def test_tre_of_landmarks_that_the_field_carries_by_hand():
    """A field of (3, -4) pixels and landmarks that really moved by (3, 0): 4 pixels of 0.5 mm."""
    field = torch.tensor([3.0, -4.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    fixed_points = torch.tensor([[[2.0, 5.0], [1.0, 7.0]]])
    moving_points = fixed_points + torch.tensor([3.0, 0.0])
    error = tre(warp_points(fixed_points, field), moving_points, spacing=(2.0, 0.5))
    torch.testing.assert_close(error, torch.tensor([2.0]))


IMAGE_SHAPES = [(17, 22), (14, 12, 15)]


def image_pair(shape, batch=3, channels=2, scale=1.0):
    rng = np.random.default_rng(0)
    fixed = rng.random((batch, channels, *shape))
    warped = 0.7 * fixed + 0.3 * rng.random(fixed.shape)
    return torch.from_numpy(scale * warped), torch.from_numpy(scale * fixed)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
def test_ssim_equals_scikit_image(shape, batch, data_range):
    warped, fixed = image_pair(shape, batch, scale=data_range)
    ours = ssim(warped, fixed, data_range=data_range)
    assert ours.shape == (batch,)
    for i in range(batch):
        expected = structural_similarity(
            warped[i].numpy(),
            fixed[i].numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=data_range,
            channel_axis=0,
        )
        assert 0.3 < expected < 0.99
        np.testing.assert_allclose(ours[i].item(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (7, 1.0)])
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
def test_ssim_equals_monai(shape, window, sigma):
    monai = pytest.importorskip("monai.metrics")
    warped, fixed = image_pair(shape, channels=1)
    reference = monai.SSIMMetric(len(shape), win_size=window, kernel_sigma=sigma, data_range=1.0)
    expected = reference(warped.float(), fixed.float())[:, 0]
    ours = ssim(warped, fixed, data_range=1.0, window=window, sigma=sigma)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
def test_ssim_of_an_image_with_itself_is_one(shape, dtype):
    """Bright and nearly flat: in single precision the variances would be negative."""
    _, fixed = image_pair(shape)
    bright = (1000 + 0.01 * fixed).to(dtype)
    torch.testing.assert_close(ssim(bright, bright, data_range=1.0), torch.ones(3))
    assert ssim(fixed, 1 - fixed, data_range=1.0).lt(0).all()


def test_ssim_needs_images_that_hold_a_window():
    small = torch.rand(1, 1, 20, 10)
    with pytest.raises(ValueError, match=r"^window: wanted at most 10 voxels .* got 11$"):
        ssim(small, small, data_range=1.0)
    assert ssim(small, small, data_range=1.0, window=9).item() == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jacobian_statistics_equal_numpy(shape, batch, masked):
    u = random_field(shape, 0.5, batch)
    mask = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (batch, 1, *shape)))
    found = jacobian_statistics(u, mask=mask if masked else None)
    inside = mask[:, 0] > 0 if masked else torch.ones(batch, *shape, dtype=torch.bool)
    assert found.folding.max() > 0
    for i in range(batch):
        det = jacobian_det(u)[i][inside[i]].numpy()
        log = np.log(det[det > 0])
        expected = [det.min(), det.max(), det.mean(), det.std(), log.mean(), log.std()]
        ours = [x[i].item() for x in found]
        np.testing.assert_allclose(ours, [*expected, (det <= 0).mean()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(19, 17), (12, 13, 11)], ids=str)
def test_jacobian_statistics_equal_itk_in_the_interior(shape):
    u = random_field(shape, 0.2, batch=1)
    vectors = np.ascontiguousarray(np.moveaxis(u[0].numpy()[::-1], 0, -1))
    itk = sitk.DisplacementFieldJacobianDeterminant(sitk.GetImageFromArray(vectors, isVector=True))
    inner = tuple(slice(1, n - 1) for n in shape)
    det = sitk.GetArrayFromImage(itk)[inner].astype(np.float64)
    mask = torch.zeros(1, 1, *shape)
    mask[(..., *inner)] = 1
    found = jacobian_statistics(u, mask=mask)
    expected = [det.min(), det.max(), det.mean(), det.std()]
    np.testing.assert_allclose([x.item() for x in found[:4]], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jacobian_statistics_of_a_magnification(shape):
    """x -> 1.5 x everywhere: det = 1.5^D; the identity: 1."""
    x = identity_grid(shape)
    found = jacobian_statistics(torch.cat([0 * x, 0.5 * x]))
    d = len(shape)
    for measured in found[:3]:
        torch.testing.assert_close(measured, torch.tensor([1.0, 1.5**d]))
    torch.testing.assert_close(found.log_mean, torch.tensor([0.0, d * np.log(1.5)]).float())
    for zero in (found.std, found.log_std, found.folding):
        torch.testing.assert_close(zero, torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jacobian_statistics_hide_nothing(shape):
    """Sample 0 is broken, sample 1 has an empty mask, sample 2 folds everywhere."""
    u = torch.zeros(3, len(shape), *shape)
    u[0, 0, 3, 3] = torch.nan
    u[2, 0] = -2 * identity_grid(shape)[0, 0]
    mask = torch.ones(3, 1, *shape)
    mask[1] = 0
    found = jacobian_statistics(u, mask=mask)
    for measured in found:
        assert measured[:2].isnan().all()
    assert found.min[2] == found.max[2] == found.mean[2] == -1
    assert found.folding[2] == 1
    assert found.log_mean[2].isnan()
