"""Distances between the surfaces of labels."""

from itertools import product

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from surface_distance import (
    compute_robust_hausdorff,
    compute_surface_distances,
    lookup_tables,
)

from reglib.objectives.surface import _surface_elements, assd, hd95

SHAPES = [(26, 31), (16, 19, 14)]
SPACINGS = {2: [None, (0.7, 2.5)], 3: [None, (0.7, 2.5, 1.3)]}
CASES = [(shape, spacing) for shape in SHAPES for spacing in SPACINGS[len(shape)]]


def blobs(shape, batch=3, seed=0, sigma=2.0):
    """Smooth label maps with the labels 0 to 3; those of two seeds overlap in part."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).standard_normal((batch, 1, *shape))
    noise = common + 0.5 * rng.standard_normal((batch, 1, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 0, *(sigma,) * len(shape)))
    return torch.from_numpy(np.digitize(smooth, np.quantile(smooth, [0.5, 0.7, 0.85])))


def reference_hd95(a, b, spacing):
    """The package's figure; it fails under NumPy 2 where a mask is empty."""
    assert a.any()
    assert b.any()
    return compute_robust_hausdorff(compute_surface_distances(a, b, spacing), 95)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 2.5, 1.3), (4, 0.5, 0.5)], ids=str)
def test_areas_of_the_surface_elements_equal_the_package(spacing):
    """Every neighbourhood of 2 x 2 x 2 voxels, by the bits of the package's own kernel."""
    table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    corners = list(product((0, 1), repeat=3))
    bits = [int(lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL[c]) for c in corners]
    stretch = np.prod(spacing) / np.array(spacing)
    for code, vectors in enumerate(_surface_elements(3)):
        theirs = sum(bit for k, bit in enumerate(bits) if code >> k & 1)
        area = np.linalg.norm(vectors * stretch, axis=1).sum()
        np.testing.assert_allclose(area, table[theirs], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", [(1, 1), (0.7, 2.5)], ids=str)
def test_lengths_of_the_contour_elements_equal_the_package(spacing):
    table = lookup_tables.create_table_neighbour_code_to_contour_length(spacing)
    kernel = lookup_tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL
    bits = [int(kernel[c]) for c in product((0, 1), repeat=2)]
    for code, vectors in enumerate(_surface_elements(2)):
        theirs = sum(bit for k, bit in enumerate(bits) if code >> k & 1)
        length = np.linalg.norm(vectors * spacing[::-1], axis=1).sum()
        np.testing.assert_allclose(length, table[theirs], rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "spacing"), CASES, ids=str)
def test_hd95_equals_surface_distance(shape, spacing, batch):
    """Labels reach the border of the image, where the package closes the surface, too."""
    warped, fixed = blobs(shape, batch, 1), blobs(shape, batch, 2)
    ours = hd95(warped, fixed, labels=[0, 1, 2, 3], spacing=spacing)
    assert ours.shape == (batch, 4)
    mm = spacing or (1.0,) * len(shape)
    for i, k in np.ndindex(batch, 4):
        expected = reference_hd95((fixed[i, 0] == k).numpy(), (warped[i, 0] == k).numpy(), mm)
        np.testing.assert_allclose(ours[i, k].item(), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(7, 9), (6, 5, 7)], ids=str)
def test_hd95_of_noise_equals_surface_distance(shape, seed):
    """Every neighbourhood occurs, single voxels and holes included."""
    rng = np.random.default_rng(seed)
    warped, fixed = torch.from_numpy(rng.random((2, 1, 1, *shape)) < rng.uniform(0.1, 0.6)).int()
    spacing = tuple(rng.uniform(0.3, 3, len(shape)))
    expected = reference_hd95(fixed[0, 0].bool().numpy(), warped[0, 0].bool().numpy(), spacing)
    ours = hd95(warped, fixed, labels=[1], spacing=spacing).item()
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "spacing"), CASES, ids=str)
def test_assd_equals_monai(shape, spacing, batch):
    monai = pytest.importorskip("monai.metrics")
    warped, fixed = blobs(shape, batch, 1), blobs(shape, batch, 2)
    ours = assd(warped, fixed, labels=[1, 2, 3], spacing=spacing)

    def one_hot(x):
        return torch.cat([x == k for k in range(4)], 1).float()

    expected = monai.compute_average_surface_distance(
        one_hot(warped), one_hot(fixed), symmetric=True, spacing=spacing
    )
    torch.testing.assert_close(ours, expected.to(ours), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "spacing"), CASES, ids=str)
def test_assd_equals_all_pairs_of_boundary_voxels_found_by_itk(shape, spacing):
    warped, fixed = blobs(shape, 1, 1), blobs(shape, 1, 2)
    mm = np.array(spacing or (1.0,) * len(shape))

    def boundary(x):
        """Contour voxels of ITK, whose image is padded so that the border counts as one."""
        itk = sitk.GetImageFromArray(np.pad((x[0, 0] == 2).numpy(), 1).astype(np.uint8))
        contour = sitk.GetArrayFromImage(sitk.BinaryContour(itk, fullyConnected=False))
        return np.argwhere(contour) * mm

    pairs = cdist(boundary(warped), boundary(fixed))
    expected = np.concatenate([pairs.min(0), pairs.min(1)]).mean()
    ours = assd(warped, fixed, labels=[2], spacing=spacing).item()
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("measure", [hd95, assd])
def test_equal_labels_are_at_distance_zero_and_order_does_not_matter(measure, shape, batch):
    a, b = blobs(shape, batch, 1), blobs(shape, batch, 2)
    assert measure(a, a, labels=[1, 2, 3]).equal(torch.zeros(batch, 3))
    assert measure(a, b, labels=[1, 3]).equal(measure(b, a, labels=[1, 3]))


@pytest.mark.parametrize("d", [2, 3])
def test_parallel_planes_by_hand(d):
    """Two slabs that end 3 voxels of 0.5 mm apart, seen from a label that fills the rest."""
    shape = (20, 8, 8)[:d]
    warped, fixed = torch.zeros(2, 1, 1, *shape, dtype=torch.long)
    warped[:, :, 8:] = 1
    fixed[:, :, 11:] = 1
    spacing = (0.5, 1.0, 1.0)[:d]
    assert hd95(warped, fixed, labels=[1], spacing=spacing).item() == 1.5
    # A single voxel against its neighbour two further: both surfaces are small cubes.
    dot, other = torch.zeros(2, 1, 1, *shape, dtype=torch.long)
    dot[(0, 0, *(3,) * d)] = 1
    other[(0, 0, 5, *(3,) * (d - 1))] = 1
    assert assd(dot, other, labels=[1], spacing=spacing).item() == 1
    assert hd95(dot, other, labels=[1], spacing=spacing).item() == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("measure", [hd95, assd])
def test_absent_labels(measure, shape):
    """In one map only: infinitely far. In neither: nothing to measure."""
    some, none = torch.zeros(2, 1, 1, *shape, dtype=torch.long)
    some[0, 0, 4:6, 4:7] = 5
    found = measure(torch.cat([some, none, some]), torch.cat([none, some, some]), labels=[5, 9])
    assert found[:, 0].tolist() == [np.inf, np.inf, 0]
    assert found[:, 1].isnan().all()


@pytest.mark.parametrize("measure", [hd95, assd])
def test_thin_images_and_other_dtypes(measure):
    a = torch.tensor([0, 1, 1, 0, 0, 0]).view(1, 1, 1, 6)
    b = torch.tensor([0, 0, 0, 1, 1, 0]).view(1, 1, 1, 6)
    expected = measure(a, b, labels=[1])
    for dtype in (torch.uint8, torch.float32, torch.bool):
        assert measure(a.to(dtype), b.to(dtype), labels=[1]).equal(expected)
