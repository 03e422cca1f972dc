"""Overlap and folding as they are reported."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from reglib.geometry.grid import identity_grid
from reglib.objectives.metrics import dice, folding, nda, ndv

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
