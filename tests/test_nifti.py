"""Images and fields on disk, against SimpleITK, a file that ANTs wrote, and themselves.

Files hold their geometry, and float32 fields their vectors, with 24 bits: about 1e-5 mm for
coordinates of 100 mm. Tolerances against other programs are that or what the issue at hand asks
for, 1e-4 of the intensity range and 1e-3 mm.
"""

import contextlib
import errno
import gzip
import os
import resource
import stat
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from reglib.data import files
from reglib.data.nifti import (
    Image,
    read_field,
    read_image,
    read_labels,
    voxel_to_world,
    world_to_voxel,
    write_field,
    write_image,
)
from reglib.geometry.grid import identity_grid, sample
from reglib.geometry.sampling import warp, warp_points

DATA = Path(__file__).parent / "data"
PICTURE_AFFINE = torch.tensor([[0, -1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
#: (oblique angles in degrees, spacing, mirrored axis, axis order, origin)
GEOMETRIES = {
    "identity": ((0, 0, 0), (1, 1, 1), None, (0, 1, 2), (0, 0, 0)),
    "oblique": ((10, -20, 30), (0.9, 2.5, 1.4), None, (0, 1, 2), (40, -55, 20)),
    "left-handed": ((25, 5, -15), (1.5, 0.8, 2), 0, (0, 1, 2), (-12, 30, 7)),
    "sagittal": ((4, 3, -2), (1, 1.2, 0.7), 2, (1, 2, 0), (80, -120, -60)),
    "upside down": ((179.9, 0.05, 180), (1, 2, 3), None, (0, 1, 2), (1, 2, 3)),
}


def make_affine(d, angles=(0, 0, 0), spacing=(1, 1, 1), mirrored=None, order=(0, 1, 2), origin=0):
    """Axes at right angles, turned by ``angles``; in 2-D by the last one."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    if d == 2:
        turn = Rotation.from_euler("z", angles[2], degrees=True).as_matrix()[:2, :2]
        order = [k for k in order if k < 2]
    linear = turn[:, list(order)] * np.array(spacing)[:d]
    if mirrored is not None:
        linear[:, mirrored % d] *= -1
    affine = np.eye(d + 1)
    affine[:d, :d] = linear
    affine[:d, d] = np.broadcast_to(origin, 3)[:d]
    return affine


GRIDS = [
    pytest.param(shape, make_affine(len(shape), *geometry), id=f"{len(shape)}D {name}")
    for shape in ((17, 14), (11, 13, 9))
    for name, geometry in GEOMETRIES.items()
]


def smooth_image(shape, seed=0):
    """Some waves, range about 2; a voxel differs from the next by less than 1."""
    rng = np.random.default_rng(seed)
    x = np.indices(shape)
    waves = [
        np.sin(np.tensordot(rng.uniform(-0.6, 0.6, len(shape)), x, 1) + p)
        for p in rng.uniform(0, 6, 4)
    ]
    return torch.from_numpy(sum(waves)[None, None])


def random_field(shape, size=1.5, seed=1, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-size, size, (1, len(shape), *shape))).to(dtype)


def moving_grid(affine, shape):
    """Another grid over the same part of the world: turned, mirrored, of other spacing and size."""
    d = len(shape)
    norms = np.linalg.norm(affine[:d, :d], axis=0)
    other = make_affine(d, (5, -8, 12), np.array([1.3, 0.7, 1.1]) * norms.mean(), 1)
    other[:d, :d] = affine[:d, :d] / norms @ other[:d, :d]
    moving_shape = tuple(n + 6 for n in shape)
    middle = affine @ np.array([*((n - 1) / 2 for n in shape), 1])
    other[:d, d] = middle[:d] - other[:d, :d] @ ((np.array(moving_shape) - 1) / 2)
    return moving_shape, other


def between_grids(fixed_affine, moving_affine, shape, size=1.0):
    """u with x + u(x) in voxels of the moving grid: the same place of the world, and some noise."""
    d = len(shape)
    matrix = torch.from_numpy(np.linalg.inv(moving_affine) @ fixed_affine)
    x = identity_grid(shape, dtype=torch.float64)
    there = torch.einsum("ij,bj...->bi...", matrix[:d, :d], x)
    there = there + matrix[:d, d].view(1, d, *(1,) * d)
    return there - x + random_field(shape, size)


def itk_transform(path):
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def itk_resample(moving_path, fixed_path, transform):
    """ITK's warped image in the array order of our tensors (its arrays are reversed)."""
    moving = sitk.ReadImage(str(moving_path), sitk.sitkFloat64)
    fixed = sitk.ReadImage(str(fixed_path), sitk.sitkFloat64)
    out = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0, sitk.sitkFloat64)
    return sitk.GetArrayFromImage(out).T


def inside(field, moving_shape, margin=1e-3):
    """Where phi stays within the voxel centres: beyond, ITK has its own rule."""
    at = (identity_grid(field.shape[2:], dtype=field.dtype) + field)[0]
    last = torch.tensor(moving_shape).view(-1, *(1,) * len(moving_shape)) - 1
    mask = ((at >= margin) & (at <= last - margin)).all(0).numpy()
    assert mask.mean() > 0.3
    return mask


# --- Fields against ITK ---------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "affine"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_itk_warps_with_our_field_as_we_do(shape, affine, dtype, tmp_path):
    """Two grids of other size, spacing, direction and handedness; within 1e-4 of the range."""
    moving_shape, moving_affine = moving_grid(affine, shape)
    moving = smooth_image(moving_shape)
    u = between_grids(affine, moving_affine, shape).to(dtype)
    write_image(tmp_path / "moving.nii.gz", Image(moving, torch.from_numpy(moving_affine)))
    write_image(tmp_path / "fixed.nii", Image(torch.zeros(1, 1, *shape), torch.from_numpy(affine)))
    write_field(tmp_path / "field.nii.gz", u, affine, moving_affine=moving_affine)
    itk = itk_resample(
        tmp_path / "moving.nii.gz", tmp_path / "fixed.nii", itk_transform(tmp_path / "field.nii.gz")
    )
    mask = inside(u, moving_shape)
    ours = warp(moving, u)[0, 0].numpy()
    spread = float(moving.max() - moving.min())
    np.testing.assert_allclose(ours[mask], itk[mask], rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize(("shape", "affine"), GRIDS)
def test_itk_moves_points_with_our_field_as_we_do(shape, affine, tmp_path):
    """Fixed -> moving, between voxels too (both interpolate linearly); within 1e-3 mm."""
    _, moving_affine = moving_grid(affine, shape)
    u = between_grids(affine, moving_affine, shape)
    write_field(tmp_path / "field.nii.gz", u.float(), affine, moving_affine=moving_affine)
    transform = itk_transform(tmp_path / "field.nii.gz")
    x = torch.rand(1, 40, len(shape), generator=torch.Generator().manual_seed(2)).double()
    x = x * (torch.tensor(shape) - 1)
    fixed = voxel_to_world(x, torch.from_numpy(affine), space="lps")[0]
    itk = [transform.TransformPoint(p.tolist()) for p in fixed]
    ours = voxel_to_world(warp_points(x, u), torch.from_numpy(moving_affine), space="lps")[0]
    np.testing.assert_allclose(ours, itk, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("shape", "affine"), GRIDS)
@pytest.mark.parametrize("pixels", [sitk.sitkVectorFloat32, sitk.sitkVectorFloat64])
def test_we_warp_with_a_field_that_itk_wrote_as_itk_does(shape, affine, pixels, tmp_path):
    """The field lives on the grid that ITK gives it; both images on that grid."""
    moving = smooth_image(shape)
    write_image(tmp_path / "image.nii", Image(moving, torch.from_numpy(affine)))
    reference = sitk.ReadImage(str(tmp_path / "image.nii"))
    voxel = np.linalg.norm(affine[:-1, :-1], axis=0).min()
    vectors = np.random.default_rng(5).uniform(-voxel, voxel, (*shape[::-1], len(shape)))
    written = sitk.GetImageFromArray(vectors, isVector=True)
    written.CopyInformation(reference)
    sitk.WriteImage(sitk.Cast(written, pixels), str(tmp_path / "field.nii.gz"))
    u, found = read_field(tmp_path / "field.nii.gz")
    assert u.dtype == (torch.float32 if pixels == sitk.sitkVectorFloat32 else torch.float64)
    np.testing.assert_allclose(found, affine, rtol=0, atol=2e-5)
    itk = itk_resample(
        tmp_path / "image.nii", tmp_path / "image.nii", itk_transform(tmp_path / "field.nii.gz")
    )
    mask = inside(u.double(), shape)
    ours = warp(moving, u)[0, 0].numpy()
    spread = float(moving.max() - moving.min())
    np.testing.assert_allclose(ours[mask], itk[mask], rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize("pixel_type", ["png", "tif", "jpg"])
def test_a_field_for_a_picture_applies_in_itk_to_the_picture(pixel_type, tmp_path):
    """A picture has no affine: ours must be the one that ITK invents for it."""
    moving_path, fixed_path = tmp_path / f"moving.{pixel_type}", tmp_path / f"fixed.{pixel_type}"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (19, 26), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(moving_path, dpi=(100, 50))
    PIL.Image.fromarray(pixels[:15, :22]).save(fixed_path, dpi=(200, 200))
    moving, fixed = read_image(moving_path), read_image(fixed_path)
    shape = fixed.tensor.shape[2:]
    assert shape == (15, 22)
    u = between_grids(fixed.affine.numpy(), moving.affine.numpy(), shape)
    write_field(tmp_path / "field.nii", u, fixed.affine, moving_affine=moving.affine)
    transform = itk_transform(tmp_path / "field.nii")
    itk = itk_resample(moving_path, fixed_path, transform).T  # rows are ITK's second axis
    mask = inside(u, moving.tensor.shape[2:])
    ours = warp(moving.tensor.double(), u)[0, 0].numpy()
    np.testing.assert_allclose(ours[mask], itk[mask], rtol=0, atol=1e-4 * 255)


@pytest.mark.parametrize(
    "options", [{}, {"dpi": (300, 150)}, {"resolution_unit": "cm"}, {"resolution_unit": 1}], ids=str
)
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_a_picture_has_the_geometry_that_itk_gives_it(suffix, options, tmp_path):
    if "resolution_unit" in options:
        options = {**options, "x_resolution": 20, "y_resolution": 40}
    PIL.Image.fromarray(np.zeros((5, 8), np.uint8)).save(tmp_path / f"a.{suffix}", **options)
    itk = sitk.ReadImage(str(tmp_path / f"a.{suffix}"))
    image = read_image(tmp_path / f"a.{suffix}")
    assert itk.GetSize() == (8, 5)
    assert itk.GetOrigin() == (0, 0)
    assert itk.GetDirection() == (1, 0, 0, 1)
    np.testing.assert_allclose(image.spacing[::-1], itk.GetSpacing(), rtol=1e-6)
    corner = voxel_to_world(torch.tensor([[[4.0, 7.0]]]), image.affine, space="lps")
    np.testing.assert_allclose(corner[0, 0], itk.TransformIndexToPhysicalPoint((7, 4)), rtol=1e-6)


def test_we_warp_with_a_field_that_ants_wrote_as_ants_does():
    """Written by antspyx 0.6.3 (data_scripts/make_ants_field.py); ANTs keeps float32 throughout."""
    moving = read_image(DATA / "ants" / "moving.nii.gz")
    expected = read_image(DATA / "ants" / "warped.nii.gz")
    u, affine = read_field(DATA / "ants" / "field.nii.gz")
    torch.testing.assert_close(affine, expected.affine)
    assert u.abs().max() > 0.2
    d = 3
    at = (identity_grid(u.shape[2:]) + u).double().reshape(1, d, -1).movedim(1, 2)
    there = world_to_voxel(voxel_to_world(at, affine), moving.affine)
    coords = there.movedim(2, 1).reshape(u.shape)
    ours = sample(moving.tensor.double(), coords)[0, 0].numpy()
    mask = inside(coords - identity_grid(u.shape[2:]), moving.tensor.shape[2:])
    np.testing.assert_allclose(ours[mask], expected.tensor[0, 0][mask], rtol=0, atol=1e-4 * 255)


@pytest.mark.parametrize("intent", [1007, 1006])
def test_vectors_under_the_other_intent_are_in_ras_as_itk_has_it(intent, tmp_path):
    nifti = nib.Nifti1Image(np.ones((3, 4, 5, 1, 3), np.float32), np.eye(4))
    nifti.header["intent_code"] = intent
    nib.save(nifti, tmp_path / "field.nii")
    u, _ = read_field(tmp_path / "field.nii")
    itk = sitk.ReadImage(str(tmp_path / "field.nii")).GetPixel(0, 0, 0)
    lps = u[0, :, 0, 0, 0].numpy() * [-1, -1, 1]
    np.testing.assert_allclose(lps, itk)


# --- Images against ITK ---------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "affine"), GRIDS)
def test_itk_finds_our_images_where_we_put_them(shape, affine, tmp_path):
    write_image(tmp_path / "a.nii.gz", Image(smooth_image(shape).float(), torch.from_numpy(affine)))
    itk = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert itk.GetSize() == shape
    for corner in np.ndindex(*(2,) * len(shape)):
        index = [int(c * (n - 1)) for c, n in zip(corner, shape, strict=True)]
        ours = voxel_to_world(
            torch.tensor([[index]]).double(), torch.from_numpy(affine), space="lps"
        )
        np.testing.assert_allclose(
            ours[0, 0], itk.TransformIndexToPhysicalPoint(index), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(("shape", "affine"), GRIDS)
def test_we_find_images_of_itk_where_it_puts_them(shape, affine, tmp_path):
    d = len(shape)
    itk = sitk.GetImageFromArray(np.arange(np.prod(shape), dtype=np.int16).reshape(shape[::-1]))
    norms = np.linalg.norm(affine[:d, :d], axis=0)
    flips = np.diag([-1, -1, 1][:d])
    itk.SetSpacing(norms.tolist())
    itk.SetDirection((flips @ affine[:d, :d] / norms).ravel().tolist())
    itk.SetOrigin((flips @ affine[:d, d]).tolist())
    sitk.WriteImage(itk, str(tmp_path / "a.nii.gz"))
    image = read_image(tmp_path / "a.nii.gz", dtype=None)
    np.testing.assert_allclose(image.affine, affine, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(image.tensor[0, 0], sitk.GetArrayFromImage(itk).T)


@pytest.mark.parametrize("unit", [0, 1, 2, 3])
def test_metres_and_micrometres_become_mm_as_in_itk(unit, tmp_path):
    nifti = nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), np.diag([1.0, 2, 3, 1]))
    nifti.header["xyzt_units"] = unit
    nib.save(nifti, tmp_path / "a.nii")
    itk = sitk.ReadImage(str(tmp_path / "a.nii"))
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").spacing, itk.GetSpacing(), rtol=1e-6)


def test_without_any_orientation_itk_decides(tmp_path):
    """The standard, nibabel and ITK each read such a file in their own way; fields go to ITK."""
    nifti = nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), None)
    nifti.header["pixdim"][1:4] = [1, 2, 3]
    nifti.header["sform_code"] = nifti.header["qform_code"] = 0
    nib.save(nifti, tmp_path / "a.nii")
    itk = sitk.ReadImage(str(tmp_path / "a.nii"))
    point = voxel_to_world(
        torch.tensor([[[1.0, 2, 3]]]), read_image(tmp_path / "a.nii").affine, space="lps"
    )
    np.testing.assert_allclose(point[0, 0], itk.TransformIndexToPhysicalPoint((1, 2, 3)))


def test_the_qform_counts_where_there_is_no_sform(tmp_path):
    affine = make_affine(3, *GEOMETRIES["sagittal"])
    nifti = nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), None)
    nifti.set_qform(affine, 1)
    nifti.set_sform(None, 0)
    nib.save(nifti, tmp_path / "a.nii")
    # Three of the four numbers of a quaternion are stored, as float32.
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").affine, affine, rtol=0, atol=1e-3)


def test_contradictory_forms_are_reported(tmp_path):
    """ITK takes spacing from the voxel sizes, or the qform; a silent shift would follow."""
    nifti = nib.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.diag([2.0, 2, 2, 1]))
    moved = np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 5
    nifti.set_qform(moved, 1)
    nib.save(nifti, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="5 mm apart; the sform is used"):
        image = read_image(tmp_path / "a.nii")
    assert image.affine[0, 3] == 0


def test_a_sheared_image_is_written_so_that_itk_refuses_instead_of_guessing(tmp_path):
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 1] = 0.25
    write_image(tmp_path / "a.nii", Image(torch.zeros(1, 1, 4, 5, 6), affine))
    torch.testing.assert_close(read_image(tmp_path / "a.nii").affine, affine)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "a.nii"))
    with pytest.raises(ValueError, match="fixed_affine: wanted axes at right angles"):
        write_field(tmp_path / "field.nii", torch.zeros(1, 3, 4, 5, 6), affine)


# --- Shapes and slices ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((5, 6, 7, 1), (5, 6, 7)),
        ((5, 6, 7, 1, 1), (5, 6, 7)),
        ((5, 6, 1), (5, 6)),
        ((5, 6, 1, 1), (5, 6)),
        ((5, 1, 7), (5, 1, 7)),
        ((1, 1, 1), (1, 1)),
        ((5,), (5, 1)),
    ],
    ids=str,
)
def test_trailing_axes_of_one_voxel_are_dropped(stored, expected, tmp_path):
    nib.save(
        nib.Nifti1Image(np.ones(stored, np.float32), np.diag([1.0, 2, 3, 1])), tmp_path / "a.nii"
    )
    image = read_image(tmp_path / "a.nii")
    assert image.tensor.shape == (1, 1, *expected)
    np.testing.assert_allclose(image.spacing, [1, 2, 3][: len(expected)])


def test_an_axial_slice_stays_where_it_is_in_its_plane(tmp_path):
    affine = make_affine(3, (0, 0, 35), (0.8, 1.7, 3), 0, (0, 1, 2), (4, -9, 55))
    nib.save(nib.Nifti1Image(np.ones((6, 7, 1), np.float32), affine), tmp_path / "a.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(image.affine, affine[np.ix_([0, 1, 3], [0, 1, 3])], atol=1e-5)


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 2, 0), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("tilt", [0.0, 17.0])
def test_a_slice_of_any_plane_keeps_its_distances(order, tilt, tmp_path):
    """Gram matrix of the two axes, handedness aside; straight slices keep their two offsets."""
    affine = make_affine(3, (tilt, -tilt, 0), (0.8, 1.7, 3), None, order, (4, -9, 55))
    nib.save(nib.Nifti1Image(np.ones((6, 7, 1), np.float32), affine), tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="not axial"):
        image = read_image(tmp_path / "a.nii")
    plane = image.affine[:2, :2].numpy()
    np.testing.assert_allclose(plane.T @ plane, np.diag([0.8, 1.7]) ** 2, atol=1e-5)
    if tilt == 0:
        kept = sorted(order[:2])
        np.testing.assert_allclose(image.affine[:2, 2], affine[kept, 3], atol=1e-5)


# --- Round trips ----------------------------------------------------------------------------

NUMBERS = {
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "float32": torch.float32,
    "float64": torch.float64,
}
ANGLES = st.floats(-180, 180)
SPACINGS = st.floats(0.05, 20)
few = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def grids(draw, last=1):
    """Shapes, and affines of any direction, order and handedness."""
    d = draw(st.sampled_from([2, 3]))
    shape = [draw(st.integers(1, 6)) for _ in range(d)]
    shape[-1] = max(shape[-1], last)
    affine = make_affine(
        d,
        draw(st.tuples(ANGLES, ANGLES, ANGLES)),
        draw(st.tuples(SPACINGS, SPACINGS, SPACINGS)),
        draw(st.sampled_from([None, 0, 1])),
        draw(st.permutations([0, 1, 2])),
        draw(st.tuples(*[st.floats(-300, 300)] * 3)),
    )
    return tuple(shape), affine


def close_to_float32(actual, expected):
    """A number of the header has 24 bits: 1e-6 of the largest one beside it."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * max(1, abs(expected).max()))


@few
@given(
    grid=grids(last=2), name=st.sampled_from(list(NUMBERS)), seed=st.integers(0, 9), data=st.data()
)
def test_images_come_back_exactly(grid, name, seed, data, tmp_path):
    shape, affine = grid
    rng = np.random.default_rng(seed)
    if name.startswith("float"):
        values = rng.normal(0, 10.0 ** rng.integers(-30, 30), shape).astype(name)
    else:
        limits = np.iinfo(name)
        values = rng.integers(limits.min, limits.max, shape, dtype=name, endpoint=True)
    path = tmp_path / data.draw(st.sampled_from(["a.nii", "a.nii.gz", "A.NII.GZ"]))
    tensor = torch.from_numpy(values)[None, None]
    write_image(path, Image(tensor, torch.from_numpy(affine)))
    image = read_image(path, dtype=None)
    assert image.tensor.dtype == NUMBERS[name]
    assert torch.equal(image.tensor, tensor)
    close_to_float32(image.affine.numpy(), affine)
    assert read_image(path).tensor.dtype == torch.float32
    # nibabel reads the same numbers.
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), values)


@few
@given(
    grid=grids(last=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_fields_come_back(grid, dtype, data, tmp_path):
    """To rounding: mm are stored with 24 bits, and header numbers, too, are rounded to 24."""
    shape, affine = grid
    size = data.draw(st.floats(0, 50))
    u = random_field(shape, size, data.draw(st.integers(0, 9)), dtype)
    write_field(tmp_path / "field.nii.gz", u, affine)
    back, found = read_field(tmp_path / "field.nii.gz")
    assert back.dtype == dtype
    assert back.shape == u.shape
    close_to_float32(found.numpy(), affine)
    # Sizes of a voxel differ by up to 400, so that a rounded mm may be many roundings of a voxel.
    ratio = np.linalg.cond(affine[:-1, :-1])
    torch.testing.assert_close(back, u, rtol=0, atol=1e-6 * ratio * max(size, 1e-3))


@pytest.mark.parametrize(("shape", "affine"), GRIDS)
def test_where_phi_leads_in_the_moving_image_does_not_depend_on_how_it_is_told(
    shape, affine, tmp_path
):
    """In moving voxels with both affines, or in fixed voxels: the same file, up to 1e-4 mm."""
    _, moving_affine = moving_grid(affine, shape)
    u = between_grids(affine, moving_affine, shape)
    write_field(tmp_path / "a.nii", u, affine, moving_affine=moving_affine)
    v, _ = read_field(tmp_path / "a.nii")
    d = len(shape)
    x = identity_grid(shape, dtype=torch.float64).reshape(1, d, -1).movedim(1, 2)
    by_moving = voxel_to_world(warp_points(x, u), torch.from_numpy(moving_affine))
    by_fixed = voxel_to_world(warp_points(x, v.double()), torch.from_numpy(affine))
    torch.testing.assert_close(by_moving, by_fixed, rtol=0, atol=1e-4)


@few
@given(grid=grids(), space=st.sampled_from(["ras", "lps"]), seed=st.integers(0, 9))
def test_points_come_back(grid, space, seed):
    shape, affine = grid
    points = torch.from_numpy(np.random.default_rng(seed).uniform(-50, 50, (2, 5, len(shape))))
    world = voxel_to_world(points, torch.from_numpy(affine), space=space)
    back = world_to_voxel(world, torch.from_numpy(affine), space=space)
    # mm of 300 with 53 bits over a voxel of 0.05 mm.
    torch.testing.assert_close(back, points, rtol=0, atol=1e-9)


def test_world_points_are_nibabels():
    affine = make_affine(3, *GEOMETRIES["oblique"])
    points = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = nib.affines.apply_affine(affine, points[0].numpy())
    ours = voxel_to_world(points, torch.from_numpy(affine))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours[0], expected, rtol=1e-6)
    lps = voxel_to_world(points, torch.from_numpy(affine), space="lps")
    np.testing.assert_allclose(lps[0], expected * [-1, -1, 1], rtol=1e-6)


@pytest.mark.parametrize("scaling", [(0.5, -3.0), (2.0, 0.0), (1.0, 10.0), (0.0, 5.0)], ids=str)
@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.float32], ids=lambda t: t.__name__)
def test_stored_scaling_is_applied(stored, scaling, tmp_path):
    """value = slope * stored + inter; a slope of 0 means none (nifti1.h). Powers of two: exact."""
    values = np.arange(60).reshape(3, 4, 5).astype(stored)
    nifti = nib.Nifti1Image(values, np.eye(4))
    content = bytearray(nifti.to_bytes())
    content[112:120] = np.array(scaling, np.float32).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    slope, inter = scaling if scaling[0] else (1.0, 0.0)
    expected = slope * values.astype(np.float64) + inter
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").tensor[0, 0], expected)
    if scaling[0]:  # ITK adds inter even then
        itk = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii"))).T
        np.testing.assert_allclose(expected, itk)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_and_versions_are_read(kind, order, tmp_path):
    values = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int32).newbyteorder(order))
    nifti = kind(values, np.diag([1.0, 2, 3, 1]), header)
    (tmp_path / "a.nii").write_bytes(nifti.to_bytes())
    image = read_image(tmp_path / "a.nii", dtype=None)
    assert image.tensor.dtype == torch.int32
    np.testing.assert_array_equal(image.tensor[0, 0], values)
    assert image.spacing == (1, 2, 3)


@pytest.mark.parametrize("largest", [200, 30_000, 2**31 - 1, 2**40])
@pytest.mark.parametrize("name", ["labels.nii", "labels.nii.gz"])
def test_labels_come_back_exactly(largest, name, tmp_path):
    labels = torch.tensor([[0, 1, largest], [7, largest - 1, 3]])[None, None]
    write_image(tmp_path / name, Image(labels, torch.eye(3)))
    back = read_labels(tmp_path / name)
    assert back.tensor.dtype == torch.int64
    assert torch.equal(back.tensor, labels)
    size = nib.load(tmp_path / name).get_data_dtype().itemsize
    assert size == {200: 1, 30_000: 2, 2**31 - 1: 4, 2**40: 8}[largest]


def test_labels_may_be_stored_as_real_numbers_that_are_whole(tmp_path):
    write_image(
        tmp_path / "a.nii", Image(torch.tensor([[[[0.0, 2.0], [5.0, -1.0]]]]), torch.eye(3))
    )
    assert read_labels(tmp_path / "a.nii").tensor.flatten().tolist() == [0, 2, 5, -1]
    write_image(tmp_path / "b.nii", Image(torch.tensor([[[[0.0, 0.5], [5.0, 1.5]]]]), torch.eye(3)))
    with pytest.raises(ValueError, match=r"b\.nii: wanted whole numbers as labels, got 2 other"):
        read_labels(tmp_path / "b.nii")


def test_masks_are_stored_as_bytes(tmp_path):
    mask = torch.tensor([[[[True, False], [False, True]]]])
    write_image(tmp_path / "a.nii", Image(mask, torch.eye(3)))
    assert torch.equal(read_labels(tmp_path / "a.nii").tensor.bool(), mask)


def test_reals_become_integers_only_on_demand(tmp_path):
    """Rounded half to even and clipped; integers that do not fit are an error."""
    image = Image(torch.tensor([[[[-3.0, 0.5, 1.5], [2.6, 254.6, 1e9]]]]), torch.eye(3))
    write_image(tmp_path / "a.nii", image, dtype=torch.uint8)
    stored = read_image(tmp_path / "a.nii", dtype=None).tensor
    assert stored.dtype == torch.uint8
    assert stored.flatten().tolist() == [0, 0, 2, 3, 255, 255]
    with pytest.raises(ValueError, match="dtype: wanted a type that holds 0 to 300"):
        write_image(
            tmp_path / "b.nii", Image(torch.tensor([[[[0, 300]]]]), torch.eye(3)), dtype=torch.uint8
        )
    assert not (tmp_path / "b.nii").exists()


# --- Pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
def test_pictures_come_back_exactly(channels, suffix, tmp_path):
    values = torch.randint(0, 256, (1, channels, 6, 9), generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / f"a.{suffix}", Image(values.float(), PICTURE_AFFINE))
    image = read_image(tmp_path / f"a.{suffix}")
    assert torch.equal(image.tensor, values.float())
    assert torch.equal(image.affine, PICTURE_AFFINE)
    if channels != 2:  # ITK adds grey and alpha up
        itk = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"a.{suffix}")))
        np.testing.assert_array_equal(itk.reshape(6, 9, -1), values[0].movedim(0, -1))


@pytest.mark.parametrize(
    ("suffix", "values"),
    [
        ("png", torch.tensor([[0, 65535], [300, 2]], dtype=torch.uint16)),
        ("tif", torch.tensor([[0, 65535], [300, 2]], dtype=torch.uint16)),
        ("tif", torch.tensor([[-5, 2**31 - 1], [300, 2]], dtype=torch.int32)),
        ("tif", torch.tensor([[-0.25, 1e30], [3.0, 0.1]])),
    ],
)
def test_grey_pictures_hold_more_than_bytes(suffix, values, tmp_path):
    write_image(tmp_path / f"a.{suffix}", Image(values[None, None], PICTURE_AFFINE))
    image = read_image(tmp_path / f"a.{suffix}", dtype=None)
    assert image.tensor.dtype == values.dtype
    assert torch.equal(image.tensor[0, 0], values)


def test_a_tiff_keeps_its_spacing(tmp_path):
    affine = torch.tensor([[0, -0.7, 0], [-1.3, 0, 0], [0, 0, 1]], dtype=torch.float64)
    write_image(tmp_path / "a.tif", Image(torch.zeros(1, 1, 4, 5), affine))
    torch.testing.assert_close(read_image(tmp_path / "a.tif").affine, affine, rtol=0, atol=1e-6)


def test_a_jpeg_is_close(tmp_path):
    """Lossy by nature: smooth values come back within 3 of 255."""
    values = (smooth_image((32, 40)) * 30 + 128).round()
    write_image(tmp_path / "a.jpg", Image(values, PICTURE_AFFINE))
    back = read_image(tmp_path / "a.jpg").tensor
    assert (back - values).abs().max() <= 3


def test_a_palette_means_colours_in_an_image_and_labels_in_a_label_map(tmp_path):
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    picture = PIL.Image.frombytes("P", (3, 2), indices.tobytes())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tensor[0, :, 0, 1].tolist() == [255, 0, 0]
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").tensor[0, 0], indices)


def test_black_and_white_is_0_and_255_and_as_labels_0_and_1(tmp_path):
    bits = np.array([[True, False, True], [False, False, True]])
    PIL.Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").tensor[0, 0], bits * 255)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").tensor[0, 0], bits)


# --- What cannot be read --------------------------------------------------------------------


def nifti_content(shape=(4, 5, 6), dtype=np.float32, **header):
    nifti = nib.Nifti1Image(np.ones(shape, dtype), np.eye(4))
    for name, value in header.items():
        nifti.header[name] = value
    return nifti.to_bytes()


def changed(content, at, new):
    return content[:at] + new + content[at + len(new) :]


GZIPPED = gzip.compress(nifti_content())
BAD_FILES = {
    "empty": ("a.nii", b"", "wanted a NIfTI file"),
    "text": ("a.nii", b"hello " * 200, "wanted a NIfTI file"),
    "not even gzip": ("a.nii.gz", b"hello " * 200, "wanted a NIfTI file"),
    "cut gzip": ("a.nii.gz", GZIPPED[:-20], "wanted a complete gzip file"),
    "cut checksum": ("a.nii.gz", GZIPPED[:-3], "wanted a complete gzip file"),
    "damaged gzip": ("a.nii.gz", changed(GZIPPED, -6, b"\0\1"), "wanted a complete gzip file"),
    "cut voxels": ("a.nii", nifti_content()[:-5], "480 bytes of voxels .* got 475: .* truncated"),
    "cut header": ("a.nii", nifti_content()[:200], "wanted a NIfTI file"),
    "header of a pair": ("a.nii", changed(nifti_content(), 344, b"ni1"), "wanted a NIfTI file"),
    "four axes": (
        "a.nii",
        nifti_content((4, 5, 6, 7)),
        r"single volume or plane, got .* one volume",
    ),
    "slices over time": ("a.nii", nifti_content((4, 5, 1, 7)), "single volume or plane"),
    "a field": ("a.nii", nifti_content((4, 5, 6, 1, 3), intent_code=1007), "see read_field"),
    "no voxel": (
        "a.nii",
        changed(nifti_content(), 42, b"\0\0"),
        r"a voxel or more along every axis",
    ),
    "negative size": ("a.nii", changed(nifti_content(), 42, b"\xff\xff"), "sound NIfTI header"),
    "nine axes": ("a.nii", changed(nifti_content(), 40, b"\x09\0"), "sound NIfTI header"),
    "enormous": ("a.nii", changed(nifti_content(), 42, b"\xff\x7f" * 3), "truncated"),
    "complex": ("a.nii", nifti_content(dtype=np.complex64), "real numbers, got complex64"),
    "colours": (
        "a.nii",
        nifti_content(dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]),
        "real numbers, got colours",
    ),
    "unknown type": ("a.nii", changed(nifti_content(), 70, b"\x77\x77"), "sound NIfTI header"),
    "no number in the affine": (
        "a.nii",
        changed(nifti_content(), 280, np.float32("nan").tobytes()),
        "wanted finite numbers",
    ),
    "singular": ("a.nii", changed(nifti_content(), 280, bytes(48)), "singular matrix"),
    "singular plane": ("a.nii", changed(nifti_content((4, 5)), 280, bytes(48)), "singular matrix"),
    "slope": (
        "a.nii",
        changed(nifti_content(), 112, np.float32([1, "nan"]).tobytes()),
        "NIfTI|inter",
    ),
    "no picture": ("a.png", b"hello " * 200, "wanted a PNG, JPEG or TIFF"),
    "no photo": ("a.jpg", b"", "wanted a PNG, JPEG or TIFF"),
    "unknown suffix": ("a.mha", b"", r"a name that ends with one of \.nii, \.nii\.gz, \.png"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("read", [read_image, read_labels])
def test_a_bad_file_is_named_with_what_is_wrong(case, read, tmp_path, capfd):
    name, content, words = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*(?:{words})"):
        read(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def read_or_refuse(path):
    try:
        return read_image(path)
    except ValueError as error:
        return error


@settings(few, max_examples=200)
@given(data=st.data(), suffix=st.sampled_from([".nii", ".nii.gz", ".png", ".tif", ".jpg"]))
def test_a_damaged_file_is_read_or_refused_but_never_crashes(data, suffix, tmp_path):
    """Whatever bytes are changed or cut off; a flipped bit among the voxels may pass."""
    path = tmp_path / f"a{suffix}"
    if ".nii" in suffix:
        content = nifti_content((5, 4, 3), np.int16)
        content = gzip.compress(content) if suffix == ".nii.gz" else content
    else:
        PIL.Image.fromarray(np.arange(60, dtype=np.uint8).reshape(5, 12)).save(path)
        content = path.read_bytes()
    broken = bytearray(content)
    early = st.integers(0, min(400, len(content)) - 1)
    for at in data.draw(st.lists(early, max_size=4)):
        broken[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        broken = broken[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = read_or_refuse(path)
    if isinstance(outcome, Image):
        assert outcome.tensor.isfinite().all()
    else:
        assert str(path) in str(outcome)


def test_a_missing_file_is_named(tmp_path):
    for read in (read_image, read_labels, read_field):
        with pytest.raises(FileNotFoundError, match=r"absent\.nii"):
            read(tmp_path / "absent.nii")
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")


def test_voxels_without_a_value_are_counted_or_replaced(tmp_path):
    values = np.ones((3, 4, 5), np.float32)
    values[0, 0, :2] = np.nan
    values[1, 1, 1] = np.inf
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(
        ValueError, match=r"a\.nii: wanted finite voxels, got 3 NaN or infinite of 60"
    ):
        read_image(tmp_path / "a.nii")
    replaced = read_image(tmp_path / "a.nii", nonfinite=-7).tensor[0, 0].numpy()
    np.testing.assert_array_equal(replaced, np.where(np.isfinite(values), values, -7))
    with pytest.raises(ValueError, match="wanted whole numbers as labels, got 3 other"):
        read_labels(tmp_path / "a.nii")


def test_voxels_that_a_type_cannot_hold_are_no_infinities(tmp_path):
    values = torch.tensor([[[[1e300, 0.0], [-5.0, 1.0]]]], dtype=torch.float64)
    write_image(tmp_path / "a.nii", Image(values, torch.eye(3)))
    assert torch.equal(read_image(tmp_path / "a.nii", dtype=None).tensor, values)
    with pytest.raises(
        ValueError, match=r"a\.nii: wanted voxels that fit into .*, got -5 to 1e\+300"
    ):
        read_image(tmp_path / "a.nii")
    with pytest.raises(TypeError, match=r"dtype: wanted a floating-point torch\.dtype or None"):
        read_image(tmp_path / "a.nii", dtype=torch.uint8)


def write_itk_picture(path, values):
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=values.ndim == 3), str(path))


BAD_PICTURES = {
    "16 bits of colour": (
        "a.png",
        lambda path: write_itk_picture(path, np.full((4, 5, 3), 777, np.uint16)),
        "8-bit colours, got pixels RGB;16B",
    ),
    "16 bits of colour in a TIFF": (
        "a.tif",
        lambda path: write_itk_picture(path, np.full((4, 5, 3), 777, np.uint16)),
        "8-bit colours, got pixels RGB;16",
    ),
    "signed bytes": (
        "a.tif",
        lambda path: write_itk_picture(path, np.full((4, 5), -7, np.int8)),
        "got signed bytes",
    ),
    "uint32": (
        "a.tif",
        lambda path: write_itk_picture(path, np.full((4, 5), 2**31 + 1, np.uint32)),
        "got pixels I;32N",
    ),
    "print colours": (
        "a.tif",
        lambda path: PIL.Image.new("CMYK", (4, 5)).save(path),
        "got pixels CMYK",
    ),
    "pages": (
        "a.tif",
        lambda path: PIL.Image.new("L", (4, 5)).save(
            path, save_all=True, append_images=[PIL.Image.new("L", (4, 5))] * 2
        ),
        "wanted a single picture, got 3 pages",
    ),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_picture_that_would_lose_something_is_refused(case, tmp_path):
    name, write, words = BAD_PICTURES[case]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        read_image(tmp_path / name)


def test_a_cut_picture_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 70), dtype=np.uint8)
    for suffix in ("png", "jpg", "tif"):
        path = tmp_path / f"a.{suffix}"
        PIL.Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(ValueError, match=rf"a\.{suffix}: "):
            read_image(path)


def test_colours_are_no_labels(tmp_path):
    PIL.Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: wanted labels in one channel, got 3"):
        read_labels(tmp_path / "a.png")


BAD_FIELDS = {
    "an image": ("a.nii", nifti_content(), "wanted a displacement field as ITK writes it"),
    "four axes": ("a.nii", nifti_content((4, 5, 6, 3), intent_code=1007), r"got \(4, 5, 6, 3\)"),
    "no intent": ("a.nii", nifti_content((4, 5, 6, 1, 3)), "with intent 0"),
    "a series": ("a.nii", nifti_content((4, 5, 6, 2, 3), intent_code=1007), "displacement field"),
    "two components": ("a.nii", nifti_content((4, 5, 6, 1, 2), intent_code=1007), "field"),
    "three in a plane": ("a.nii", nifti_content((4, 5, 1, 1, 3), intent_code=1007), "field"),
    "FSL": ("a.nii", nifti_content((4, 5, 6, 1, 3), intent_code=2006), "with intent 2006"),
    "NiftyReg": (
        "a.nii",
        nifti_content((4, 5, 6, 1, 3), intent_code=1007, intent_name=b"NREG_TRANS"),
        "of NiftyReg",
    ),
    "no voxel": (
        "a.nii",
        changed(nifti_content((4, 5, 6, 1, 3), intent_code=1007), 42, b"\0\0"),
        "a voxel or more",
    ),
    "no numbers": (
        "a.nii",
        changed(nifti_content((4, 5, 6, 1, 3), intent_code=1007), 352, b"\xff" * 8),
        r"a\.nii: wanted finite values, got 2 NaN",
    ),
    "a picture": ("a.png", b"", r"ends with \.nii or \.nii\.gz for a field"),
    "cut": ("a.nii.gz", GZIPPED[:-20], "wanted a complete gzip file"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_what_is_no_field_is_refused(case, tmp_path):
    name, content, words = BAD_FIELDS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{words}|{words}"):
        read_field(tmp_path / name)


# --- What cannot be written -----------------------------------------------------------------

PLANE = Image(torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(0)), PICTURE_AFFINE)
FLOWS = torch.zeros(1, 3, 4, 5, 6)
SHEARED = torch.tensor([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]])
BAD_ARGUMENTS = {
    "suffix": (lambda p: write_image(p / "a.mha", PLANE), ValueError, "a.mha: wanted a name that"),
    "no image": (
        lambda p: write_image(p / "a.nii", PLANE.tensor),
        TypeError,
        "image: wanted an Image",
    ),
    "NaN": (
        lambda p: write_image(
            p / "a.nii", Image(torch.full((1, 1, 4, 5), torch.nan), torch.eye(3))
        ),
        ValueError,
        "image: wanted finite values, got 20",
    ),
    "complex": (
        lambda p: write_image(p / "a.nii", Image(torch.zeros(1, 1, 4, 5) * 1j, torch.eye(3))),
        TypeError,
        "image: wanted real numbers",
    ),
    "channels": (
        lambda p: write_image(p / "a.nii", Image(torch.zeros(1, 3, 4, 5), torch.eye(3))),
        ValueError,
        "image: wanted one channel for a NIfTI file, got 3",
    ),
    "too long": (
        lambda p: write_image(p / "a.nii", Image(torch.zeros(1, 1, 40000, 2), torch.eye(3))),
        ValueError,
        "at most 32767 voxels along an axis",
    ),
    "a volume as picture": (
        lambda p: write_image(p / "a.png", Image(torch.zeros(1, 1, 4, 5, 6), torch.eye(4))),
        ValueError,
        "image: wanted a plane image with 1 or 2 or 3 or 4 channels for PNG",
    ),
    "alpha in a JPEG": (
        lambda p: write_image(p / "a.jpg", Image(torch.zeros(1, 2, 4, 5), PICTURE_AFFINE)),
        ValueError,
        "1 or 3 channels for JPEG",
    ),
    "a type that no file has": (
        lambda p: write_image(p / "a.nii", PLANE, dtype=torch.bool),
        TypeError,
        "dtype: wanted one of torch.uint8, .* got torch.bool",
    ),
    "NaN rounded": (
        lambda p: write_image(
            p / "a.nii", Image(torch.full((1, 1, 4, 5), torch.nan), torch.eye(3)), dtype=torch.uint8
        ),
        ValueError,
        "image: wanted finite values, got 20",
    ),
    "a complex affine": (
        lambda p: write_field(p / "a.nii", FLOWS, torch.eye(4) * 1j),
        TypeError,
        "fixed_affine: wanted real numbers",
    ),
    "five colours": (
        lambda p: write_image(p / "a.png", Image(torch.zeros(1, 5, 4, 5), PICTURE_AFFINE)),
        ValueError,
        "1 or 2 or 3 or 4 channels for PNG",
    ),
    "reals in a PNG": (
        lambda p: write_image(p / "a.png", PLANE),
        ValueError,
        r"PNG can hold as uint8 or uint16, got float32 .*dtype=torch.uint8 would round",
    ),
    "the wrong type for a PNG": (
        lambda p: write_image(p / "a.png", PLANE, dtype=torch.int32),
        ValueError,
        "got int32",
    ),
    "a geometry in a PNG": (
        lambda p: write_image(p / "a.png", Image(torch.zeros(1, 1, 4, 5), torch.eye(3))),
        ValueError,
        "affine: wanted a geometry that PNG can hold",
    ),
    "a geometry in a TIFF": (
        lambda p: write_image(p / "a.tif", Image(torch.zeros(1, 1, 4, 5), torch.eye(3))),
        ValueError,
        "affine: wanted a geometry that TIFF can hold",
    ),
    "a spacing in a JPEG": (
        lambda p: write_image(
            p / "a.jpg",
            Image(
                torch.zeros(1, 1, 4, 5),
                torch.diag(torch.tensor([0.7, 0.7, 1])) @ PICTURE_AFFINE.float(),
            ),
        ),
        ValueError,
        "affine: wanted a geometry that JPEG can hold",
    ),
    "a field as picture": (
        lambda p: write_field(p / "a.png", FLOWS, torch.eye(4)),
        ValueError,
        r"\.nii or \.nii\.gz for a field",
    ),
    "two fields": (
        lambda p: write_field(p / "a.nii", FLOWS.repeat(2, 1, 1, 1, 1), torch.eye(4)),
        ValueError,
        "field: wanted a single field, got 2",
    ),
    "NaN in a field": (
        lambda p: write_field(p / "a.nii", FLOWS / 0, torch.eye(4)),
        ValueError,
        "field: wanted finite values, got 360",
    ),
    "one slice": (
        lambda p: write_field(p / "a.nii", FLOWS[..., :1], torch.eye(4)),
        ValueError,
        "field: wanted more than one voxel along the last axis",
    ),
    "affine of a plane": (
        lambda p: write_field(p / "a.nii", FLOWS, torch.eye(3)),
        ValueError,
        "fixed_affine: wanted a 4 x 4 matrix",
    ),
    "sheared": (
        lambda p: write_field(p / "a.nii", FLOWS[:, :2, 0], SHEARED),
        ValueError,
        "fixed_affine: wanted axes at right angles",
    ),
    "singular": (
        lambda p: write_field(p / "a.nii", FLOWS, torch.eye(4), moving_affine=torch.zeros(4, 4)),
        ValueError,
        "moving_affine: wanted",
    ),
    "no affine": (
        lambda p: write_field(p / "a.nii", FLOWS, [[1.0]]),
        TypeError,
        "fixed_affine: wanted a tensor or an array",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_is_named_and_leaves_no_file(case, tmp_path):
    call, kind, words = BAD_ARGUMENTS[case]
    with pytest.raises(kind, match=words):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


WRITERS = {
    "image.nii.gz": lambda path: write_image(
        path, Image(torch.rand(1, 1, 40, 50, 6), torch.eye(4))
    ),
    "field.nii": lambda path: write_field(path, torch.rand(1, 3, 20, 20, 10), torch.eye(4)),
    "picture.png": lambda path: write_image(
        path, Image(torch.randint(0, 256, (1, 1, 200, 300)), PICTURE_AFFINE)
    ),
}


@contextlib.contextmanager
def full_disk():
    """The system stops writing after 4 kB of any file, as a full disk does in the middle of one.

    Of any file: pytest's own output is one where it is redirected, so this is held only briefly.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_leaves_the_old_file_whole(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match=f"nothing was written: '.*{name}'"):
        WRITERS[name](path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()]
)
def test_nothing_is_left_where_the_last_step_fails(name, error, tmp_path, monkeypatch):
    def fail(source, target):
        assert Path(source).stat().st_size > 100
        raise error

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(type(error)):
        WRITERS[name](tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_none_is_named(name, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder, kind in (("absent", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(kind, match=f"nothing was written: '.*{folder}/{name}'"):
            WRITERS[name](tmp_path / folder / name)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"nothing was written: '.*{name}'"):
        WRITERS[name](tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["file", name])


def test_a_folder_that_may_not_be_written_is_named():
    """/proc takes files of nobody, not even root's."""
    with pytest.raises(OSError, match=r"nothing was written: '/proc/a\.nii'"):
        write_image("/proc/a.nii", PLANE)


def test_files_have_the_permissions_of_the_users_choice_and_links_stay_links(tmp_path):
    before = os.umask(0o022)
    try:
        write_image(tmp_path / "a.nii", PLANE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.nii").stat().st_mode) == 0o644
    (tmp_path / "link.nii").symlink_to(tmp_path / "a.nii")
    other = Image(PLANE.tensor + 1, PICTURE_AFFINE)
    write_image(tmp_path / "link.nii", other)
    assert (tmp_path / "link.nii").is_symlink()
    assert torch.equal(read_image(tmp_path / "a.nii").tensor, other.tensor)


def test_the_same_image_gives_the_same_bytes(tmp_path):
    write_image(tmp_path / "a.nii.gz", PLANE)
    write_image(tmp_path / "b.nii.gz", PLANE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# --- The container --------------------------------------------------------------------------


def test_an_image_says_what_it_is():
    affine = make_affine(3, spacing=(1, 2, 3), mirrored=0, order=(0, 2, 1))
    image = Image(torch.zeros(1, 1, 4, 5, 6, dtype=torch.int16), affine)
    assert image.affine.dtype == torch.float64
    assert image.spacing == (1, 2, 3)
    assert image.orientation == "LSA"
    assert repr(image) == "Image(1 x 4 x 5 x 6 int16, 1 x 2 x 3 mm, LSA)"
    assert PLANE.orientation == "PL"
    affine[:] = 0
    assert image.spacing == (1, 2, 3)


@pytest.mark.parametrize(
    ("tensor", "affine", "error", "words"),
    [
        (np.zeros((1, 1, 4, 5)), torch.eye(3), TypeError, "tensor: wanted a torch.Tensor"),
        (torch.zeros(4, 5), torch.eye(3), ValueError, "tensor: wanted a batched image"),
        (torch.zeros(2, 1, 4, 5), torch.eye(3), ValueError, "tensor: wanted a single image, got 2"),
        (torch.zeros(1, 1, 0, 5), torch.eye(3), ValueError, "tensor: wanted a voxel or more"),
        (torch.zeros(1, 1, 4, 5), torch.eye(4), ValueError, "affine: wanted a 3 x 3 matrix"),
    ],
)
def test_an_image_is_checked(tensor, affine, error, words):
    with pytest.raises(error, match=words):
        Image(tensor, affine)


@pytest.mark.parametrize("convert", [voxel_to_world, world_to_voxel])
def test_bad_points_are_named(convert):
    with pytest.raises(ValueError, match="space: wanted one of 'ras', 'lps'"):
        convert(torch.zeros(1, 2, 3), torch.eye(4), space="xyz")
    with pytest.raises(ValueError, match=r"points: wanted one point or more"):
        convert(torch.zeros(2, 3), torch.eye(4))
    with pytest.raises(ValueError, match="affine: wanted a 3 x 3 matrix"):
        convert(torch.zeros(1, 2, 2), torch.eye(4))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.png"])
def test_unsigned_16_bits_are_written_as_asked_for(tmp_path, name):
    values = torch.tensor([[[[0, 65535], [300, 2]]]], dtype=torch.int32).to(torch.uint16)
    affine = read_image(_picture(tmp_path)).affine
    write_image(tmp_path / name, Image(values, affine), dtype=torch.uint16)
    found = read_image(tmp_path / name, dtype=None).tensor
    assert found.dtype == torch.uint16
    assert torch.equal(found.int(), values.int())
    with pytest.raises(ValueError, match="wanted a type that holds 0 to 65535"):
        write_image(tmp_path / name, Image(values, affine), dtype=torch.uint8)


def _picture(folder):
    PIL.Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / "grid.png")
    return folder / "grid.png"
