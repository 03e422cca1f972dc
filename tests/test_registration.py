"""Registrations and what is made of them, against SimpleITK, NumPy and hand-written methods.

Files hold geometry and float32 fields with 24 bits: about 1e-5 mm at 100 mm. Tolerances against
ITK are those asked for: 1e-4 of the intensity range, 1e-3 mm, 0.05 voxels for an inverse.
"""

import contextlib
import errno
import functools
import json
import math
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import nn

from reglib.data.nifti import (
    Image,
    read_field,
    read_image,
    voxel_to_world,
    world_to_voxel,
    write_field,
    write_image,
)
from reglib.geometry.affine import affine_field
from reglib.geometry.fields import compose
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import transform_grid, warp, warp_points
from reglib.geometry.smoothing import gaussian_smooth
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.metrics import folding, nda, ndv
from reglib.objectives.similarity import mse
from reglib.registration import Registration, register

FILES = {"field.nii.gz", "affine.mat", "residual_field.nii.gz", "report.json"}
#: fixed shape, moving shape; then per grid: turn (degrees), spacing, mirrored axis, axis order.
CASES = {
    "2D same": ((17, 14), (17, 14), *[((0, 0, 0), (1, 1, 1), None, (0, 1, 2))] * 2),
    "2D other": (
        (17, 14),
        (20, 25),
        ((0, 0, 15), (0.9, 1.6, 1), None, (1, 0, 2)),
        ((0, 0, -20), (1.2, 0.7, 1), 0, (0, 1, 2)),
    ),
    "3D same": ((11, 13, 9), (11, 13, 9), *[((0, 0, 0), (1, 1, 1), None, (0, 1, 2))] * 2),
    "3D oblique": (
        (11, 13, 9),
        (18, 16, 21),
        ((10, -20, 30), (0.9, 2.0, 1.4), None, (0, 1, 2)),
        ((-5, 12, 8), (1.5, 0.8, 1.1), None, (0, 1, 2)),
    ),
    "3D left-handed": (
        (11, 13, 9),
        (16, 21, 15),
        ((25, 5, -15), (1.5, 0.8, 2), 0, (0, 1, 2)),
        ((0, 0, 0), (1, 1, 1), 2, (1, 0, 2)),
    ),
    "3D sagittal": (
        (9, 11, 13),
        (17, 20, 14),
        ((4, 3, -2), (1, 1.2, 0.7), 2, (1, 2, 0)),
        ((10, -20, 30), (0.8, 0.8, 1.3), 1, (2, 0, 1)),
    ),
}
cases = pytest.mark.parametrize("case", CASES)


def make_affine(shape, turn, spacing, mirrored, order, middle):
    """Voxels to mm (RAS), the middle of the grid at ``middle``."""
    d = len(shape)
    turn = turn if d == 3 else (0, 0, turn[2])
    linear = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()[:d, :d]
    linear = linear[:, [k for k in order if k < d]] * np.array(spacing)[:d]
    if mirrored is not None:
        linear[:, mirrored] *= -1
    affine = np.eye(d + 1)
    affine[:d, :d] = linear
    affine[:d, d] = np.array(middle)[:d] - linear @ ((np.array(shape) - 1) / 2)
    return torch.from_numpy(affine)


def smooth_image(shape, seed=0, batch=1, dtype=torch.float32):
    """Some waves, range about 2."""
    rng = np.random.default_rng(seed)
    x = np.indices(shape)
    images = [
        sum(
            np.sin(np.tensordot(rng.uniform(-0.5, 0.5, len(shape)), x, 1) + p)
            for p in rng.uniform(0, 6, 4)
        )
        for _ in range(batch)
    ]
    return torch.from_numpy(np.stack(images)[:, None]).to(dtype)


def smooth_field(shape, size=1.0, sigma=2.0, seed=1, batch=1, dtype=torch.float64):
    """Gaussian-smoothed noise; its largest component is ``size`` voxels."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, len(shape), *shape, generator=generator, dtype=torch.float64)
    u = gaussian_smooth(noise, sigma)
    return (size * u / u.abs().amax(tuple(range(1, u.ndim)), keepdim=True)).to(dtype)


def some_affine(d, seed=0, batch=1):
    """A little of everything about the middle of the fixed image, world mm."""
    rng = np.random.default_rng(seed)
    matrix = np.tile(np.eye(d + 1), (batch, 1, 1))
    matrix[:, :d, :d] += rng.uniform(-0.08, 0.08, (batch, d, d))
    centre = np.array([40, -55, 20])[:d]
    matrix[:, :d, d] = centre - matrix[:, :d, :d] @ centre + rng.uniform(-3, 3, (batch, d))
    return torch.from_numpy(matrix)


def make(case, *, dtype=torch.float64, size=1.0, sigma=2.0, batch=1, seed=0):
    """A registration between the grids of a case: its moving image lies where A puts the fixed."""
    shape, moving_shape, fixed_grid, moving_grid = CASES[case]
    d = len(shape)
    matrix = some_affine(d, seed, batch)
    middle = np.array([40.0, -55, 20])[:d]
    there = (matrix[0].numpy() @ np.append(middle, 1))[:d]
    return Registration(
        affine=matrix,
        field=smooth_field(shape, size, sigma, batch=batch, dtype=dtype, seed=seed + 1),
        fixed_affine=make_affine(shape, *fixed_grid, middle),
        moving_affine=make_affine(moving_shape, *moving_grid, there),
        moving_shape=moving_shape,
        history=({"one": {"loss": [3.0, 2.0]}},) * batch,
        seconds=1.5,
        settings={"method": [], "notes": []},
    )


def phi(r, moving_affine=None):
    """Where every fixed voxel comes from, in moving voxels ``(B, *S, D)``: plain NumPy."""
    target = (r.moving_affine if moving_affine is None else moving_affine).numpy()
    x = np.moveaxis(np.indices(r.field.shape[2:]) + r.field.double().numpy(), 1, -1)
    d = x.shape[-1]
    out = []
    for a, points in zip(r.affine.numpy(), x, strict=True):
        m = np.linalg.inv(target) @ a @ r.fixed_affine.numpy()
        out.append(points @ m[:d, :d].T + m[:d, d])
    return np.stack(out)


def well_inside(at, shape, margin=1e-3):
    """Where phi stays within voxel centres: beyond, ITK has its own rule."""
    mask = ((at >= margin) & (at <= np.array(shape) - 1 - margin)).all(-1)
    assert mask.mean() > 0.3
    return mask


def itk_field(path):
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def itk_resample(moving_path, fixed_path, transform, interpolator=sitk.sitkLinear):
    """ITK's warped image in the array order of our tensors (its arrays are reversed)."""
    moving = sitk.ReadImage(str(moving_path), sitk.sitkFloat64)
    fixed = sitk.ReadImage(str(fixed_path), sitk.sitkFloat64)
    out = sitk.Resample(moving, fixed, transform, interpolator, 0.0, sitk.sitkFloat64)
    return sitk.GetArrayFromImage(out).T


def random_points(shape, n=40, margin=0.0, seed=2):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(1, n, len(shape), generator=generator, dtype=torch.float64)
    return margin + share * (torch.tensor(shape, dtype=torch.float64) - 1 - 2 * margin)


# --- phi against ITK ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@cases
def test_itk_warps_with_what_is_saved_as_apply_does(case, dtype, tmp_path):
    """With field.nii.gz alone, and with affine.mat after residual_field.nii.gz."""
    r = make(case, dtype=dtype)
    moving = smooth_image(r.moving_shape, dtype=torch.float64)
    r.save(tmp_path)
    write_image(tmp_path / "moving.nii.gz", Image(moving, r.moving_affine))
    grid = Image(torch.zeros(1, 1, *r.field.shape[2:]), r.fixed_affine)
    write_image(tmp_path / "fixed.nii.gz", grid)
    affine = sitk.ReadTransform(str(tmp_path / "affine.mat"))
    # ITK applies the last of a composite first.
    parts = sitk.CompositeTransform([affine, itk_field(tmp_path / "residual_field.nii.gz")])
    mask = well_inside(phi(r)[0], r.moving_shape)
    ours = r.apply(moving)[0, 0].numpy()
    for transform in (itk_field(tmp_path / "field.nii.gz"), parts):
        itk = itk_resample(tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz", transform)
        spread = float(moving.max() - moving.min())
        np.testing.assert_allclose(ours[mask], itk[mask], rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize("batch", [1, 2, 3])
@cases
def test_apply_samples_the_moving_voxels_once_where_phi_says(case, batch):
    """SciPy reads the moving voxels at phi, written out in NumPy; border repeated or zeros."""
    r = make(case, batch=batch)
    moving = smooth_image(r.moving_shape, batch=batch, dtype=torch.float64)
    at = phi(r)
    np.testing.assert_allclose(
        r.whole_field() + identity_grid(r.field.shape[2:], dtype=torch.float64),
        np.moveaxis(at, -1, 1),
        rtol=0,
        atol=1e-9,
    )
    for padding, mode in (("border", "nearest"), ("zeros", "grid-constant")):
        ours = r.apply(moving, padding=padding)
        for b in range(batch):
            expected = ndimage.map_coordinates(
                moving[b, 0].numpy(), np.moveaxis(at[b], -1, 0), order=1, mode=mode
            )
            np.testing.assert_allclose(ours[b, 0], expected, rtol=0, atol=1e-9)
            alone = r[b].apply(moving[b : b + 1], padding=padding)
            torch.testing.assert_close(alone[0], ours[b], rtol=0, atol=1e-9)
    assert r.apply(moving).equal(r.apply(moving, padding="border"))


@cases
def test_an_image_of_another_grid_is_pulled_back_through_its_own_affine(case, tmp_path):
    """Of the moving world, but with other voxels: ITK with the same field says the same."""
    r = make(case)
    d = len(r.moving_shape)
    shape = tuple(n + 9 for n in r.moving_shape)
    middle = r.moving_affine.numpy() @ np.append((np.array(r.moving_shape) - 1) / 2, 1)
    affine = make_affine(shape, (15, -5, 25), (0.8, 1.1, 0.9), 1, (1, 0, 2), middle[:d])
    image = Image(smooth_image(shape, 5), affine)
    found = r.apply(image)
    assert found.affine.equal(r.fixed_affine)
    r.save(tmp_path)
    write_image(tmp_path / "other.nii.gz", image)
    write_image(tmp_path / "fixed.nii.gz", Image(torch.zeros_like(found.tensor), r.fixed_affine))
    itk = itk_resample(
        tmp_path / "other.nii.gz", tmp_path / "fixed.nii.gz", itk_field(tmp_path / "field.nii.gz")
    )
    mask = well_inside(phi(r, affine)[0], shape)
    np.testing.assert_allclose(found.tensor[0, 0].numpy()[mask], itk[mask], rtol=0, atol=2e-4)
    own = Image(smooth_image(r.moving_shape), r.moving_affine)
    torch.testing.assert_close(r.apply(own).tensor, r.apply(own.tensor))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.float32],
    ids=str,
)
@pytest.mark.parametrize("case", ["2D other", "3D oblique"])
def test_labels_keep_their_type_and_none_is_invented(case, dtype):
    r = make(case)
    rng = np.random.default_rng(0)
    choices = [0, 1] if dtype == torch.bool else [0, 3, 7, 200]
    labels = torch.from_numpy(rng.choice(choices, (1, 1, *r.moving_shape))).to(dtype)
    for mode in ("nearest", "linear"):
        found = r.apply_labels(labels, mode=mode)
        assert found.dtype == dtype
        assert set(found.double().unique().tolist()) <= set(map(float, choices))
        placed = r.apply_labels(Image(labels, r.moving_affine), mode=mode)
        assert placed.affine.equal(r.fixed_affine)
        assert placed.tensor.equal(found)
    at = phi(r)[0]
    nearest = np.floor(at + 0.5).astype(int)
    clear = (abs(at - np.floor(at) - 0.5) > 1e-6).all(-1)
    outside = ((nearest < 0) | (nearest >= np.array(r.moving_shape))).any(-1)
    clipped = np.clip(nearest, 0, np.array(r.moving_shape) - 1)
    expected = labels[0, 0].double().numpy()[tuple(np.moveaxis(clipped, -1, 0))]
    expected[outside] = 0
    found = r.apply_labels(labels)[0, 0].double().numpy()
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_labels_beyond_single_precision_survive():
    r = make("3D same")
    labels = torch.full((1, 1, *r.moving_shape), 2**24 + 1)
    assert r.apply_labels(labels).unique().tolist() in ([2**24 + 1], [0, 2**24 + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", ["voxel", "ras", "lps"])
@cases
def test_itk_moves_points_as_we_do(case, space, dtype, tmp_path):
    """Fixed to moving, between voxels too; through the whole field and through its parts.

    Between voxels the whole field is linear where A(x + u(x)) is: the same map.
    """
    r = make(case, dtype=dtype)
    r.save(tmp_path)
    x = random_points(r.field.shape[2:])
    lps = voxel_to_world(x, r.fixed_affine, space="lps")
    given = {"voxel": x, "lps": lps, "ras": voxel_to_world(x, r.fixed_affine)}[space]
    found = r.apply_points(given, space=space)
    assert found.dtype == torch.float64
    if space == "voxel":
        found = voxel_to_world(found, r.moving_affine, space="lps")
    elif space == "ras":
        found = found * torch.tensor([-1.0, -1, 1][: x.shape[2]])
    affine = sitk.ReadTransform(str(tmp_path / "affine.mat"))
    parts = sitk.CompositeTransform([affine, itk_field(tmp_path / "residual_field.nii.gz")])
    for transform in (itk_field(tmp_path / "field.nii.gz"), parts):
        itk = [transform.TransformPoint(p) for p in lps[0].tolist()]
        np.testing.assert_allclose(found[0], itk, rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("space", ["voxel", "ras", "lps"])
@pytest.mark.parametrize("case", ["2D other", "3D sagittal"])
def test_points_of_a_batch_travel_each_with_its_own_pair(case, space, batch):
    r = make(case, batch=batch)
    x = random_points(r.field.shape[2:]).repeat(batch, 1, 1)
    x = x if space == "voxel" else voxel_to_world(x, r.fixed_affine, space=space)
    there = r.apply_points(x, space=space)
    back = r.apply_points_inverse(there, space=space)
    for b in range(batch):
        one = slice(b, b + 1)
        assert r[b].apply_points(x[one], space=space).equal(there[one])
        torch.testing.assert_close(
            r[b].apply_points_inverse(there[one], space=space), back[one], rtol=0, atol=1e-9
        )
    torch.testing.assert_close(back, x, rtol=0, atol=1e-2)


# --- The inverse ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", ["voxel", "ras", "lps"])
@cases
def test_points_come_back(case, space, dtype):
    """0.001 voxels is what is promised; turned into mm or moving voxels that is less than 0.01."""
    r = make(case, dtype=dtype, size=1.5)
    # Also from outside the fixed grid, where u goes on as at its border.
    x = random_points(r.field.shape[2:], margin=-2.0)
    x = x if space == "voxel" else voxel_to_world(x, r.fixed_affine, space=space)
    moved = r.apply_points(x, space=space)
    back = r.apply_points_inverse(moved, space=space)
    torch.testing.assert_close(r.apply_points(back, space=space), moved, rtol=0, atol=1e-2)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-2)
    assert r.apply_points_inverse(moved.float(), space=space).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@cases
def test_itk_carries_points_back_with_the_inverse_file(case, dtype, tmp_path):
    """Moving voxel -> fixed -> moving: within 0.05 voxels of the fixed grid, to the border."""
    r = make(case, dtype=dtype, sigma=3.0, size=1.5)
    r.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["inverse"] == "inverse_field.nii.gz"
    back = itk_field(tmp_path / "inverse_field.nii.gz")
    y = identity_grid(r.moving_shape, dtype=torch.float64).flatten(2).mT
    lps = voxel_to_world(y, r.moving_affine, space="lps")
    # Points on the last voxel of a grid count as outside for ITK by rounding: nudge them inwards.
    middle = lps.mean(1, keepdim=True)
    lps = middle + (1 - 1e-6) * (lps - middle)
    found = torch.tensor([back.TransformPoint(p) for p in lps[0].tolist()]).double()[None]
    voxels = world_to_voxel(found, r.fixed_affine, space="lps")
    last = torch.tensor(r.field.shape[2:]) - 1
    inside = ((voxels >= 0) & (voxels <= last)).all(2)
    assert inside.double().mean() > 0.1
    again = r.apply_points(found, space="lps")
    spacing = float(r.fixed_affine[:-1, :-1].norm(dim=0).min())
    missed = (again - lps).norm(dim=2)[inside]
    # The affine magnifies by 1.1 at most.
    assert float(missed.max()) < 0.05 * 1.1 * spacing


@cases
def test_the_inverse_field_is_exact_at_every_moving_voxel(case):
    """Also near the border, where an inverse read off the fixed grid would be clamped."""
    r = make(case, size=1.8)
    back = r.inverse_field()
    assert back.shape == (1, len(r.moving_shape), *r.moving_shape)
    y = identity_grid(r.moving_shape, dtype=torch.float64)
    psi = (y + back).flatten(2).mT
    again = r.apply_points(psi)
    scale = float(np.linalg.norm(phi_linear(r), 2))
    assert float((again - y.flatten(2).mT).norm(dim=2).max()) < 2e-3 * max(scale, 1)


def phi_linear(r):
    """Voxels of the fixed grid to voxels of the moving one, without u."""
    d = len(r.moving_shape)
    a = np.linalg.inv(r.moving_affine.numpy()) @ r.affine[0].numpy() @ r.fixed_affine.numpy()
    return a[:d, :d]


@pytest.mark.parametrize("batch", [2, 3])
def test_the_inverse_of_a_batch_is_that_of_each_pair(batch):
    r = make("2D other", batch=batch)
    together = r.inverse_field()
    for b in range(batch):
        torch.testing.assert_close(r[b].inverse_field()[0], together[b], rtol=0, atol=1e-9)


def test_without_a_field_the_inverse_is_the_inverse_matrix():
    """Also where the moving image lies wholly outside the fixed one."""
    r = make("3D oblique", size=0.0)
    for shift in (0.0, 500.0):
        moving_affine = r.moving_affine.clone()
        moving_affine[:3, 3] += shift
        far = Registration(
            r.affine, r.field, r.fixed_affine, moving_affine, r.moving_shape, settings={}
        )
        expected = affine_field(
            torch.linalg.inv(r.affine), moving_affine, r.fixed_affine, r.moving_shape
        )
        torch.testing.assert_close(far.inverse_field(), expected, rtol=0, atol=1e-9)


def folded(case="2D same", size=6.0):
    r = make(case, size=size, sigma=1.5)
    assert float(r.folding) > 0
    return r


@pytest.mark.parametrize("case", ["2D same", "2D other", "3D oblique"])
def test_a_field_that_folds_has_no_inverse_and_the_report_says_so(case, tmp_path):
    """And a file from before does not stay behind."""
    make(case).save(tmp_path)
    assert (tmp_path / "inverse_field.nii.gz").exists()
    r = folded(case)
    with pytest.raises(ValueError, match=r"an inverse, got one that folds \(0\.\d+ of its voxels"):
        r.inverse_field()
    r.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["inverse"].startswith("none (field: wanted one that has an inverse")
    assert report["folding"] == pytest.approx(float(r.folding))
    assert report["ndv"] > 0


def test_a_fold_of_a_single_voxel_is_a_fold():
    """Every moving voxel can still be reached, but not from one place only."""
    u = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    u[0, 0, 6, 6] = -1.5
    eye = torch.eye(3)
    r = Registration(eye[None], u, eye, eye, (12, 12))
    with pytest.raises(ValueError, match="folds"):
        r.inverse_field()


def test_one_fold_in_ten_thousand_voxels_is_let_pass():
    """A little of one cell turned over; the inverse reaches every voxel all the same."""
    u = torch.zeros(1, 2, 150, 150, dtype=torch.float64)
    u[0, 0, 75, 75] = -1.05
    eye = torch.eye(3)
    r = Registration(eye[None], u, eye, eye, (150, 150))
    assert 0 < max(float(r.folding), float(r.ndv)) <= 1e-4
    back = r.inverse_field()
    there = warp_points(transform_grid(back).flatten(2).mT, u)
    grid = transform_grid(torch.zeros_like(u)).flatten(2).mT
    torch.testing.assert_close(there, grid, rtol=0, atol=1e-3)


def test_points_of_an_overlap_are_found_on_one_side_of_it():
    """x + u(x) pushes the two halves of the image over each other."""
    x = torch.arange(12, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 1, 12, 6)
    u = torch.cat([torch.where(x < 6, 2.0, -2.0), torch.zeros_like(x)], 1)
    eye = torch.eye(3)
    r = Registration(eye[None], u, eye, eye, (12, 6))
    overlap = torch.tensor([[[5.0, 3.0], [6.0, 2.0], [5.5, 3.5]]]).double()
    back = r.apply_points_inverse(overlap)
    torch.testing.assert_close(r.apply_points(back), overlap, rtol=0, atol=1e-3)


def test_a_turn_in_the_field_is_followed_back():
    """By 70 degrees about the middle: full steps would circle round the answer."""
    eye, shape, angle = torch.eye(3), (12, 12), math.radians(70)
    linear = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()
    x = identity_grid(shape, dtype=torch.float64) - 5.5
    u = torch.einsum("ij,bj...->bi...", linear - torch.eye(2), x)
    r = Registration(eye[None], u, eye, eye, shape)
    points = random_points(shape, margin=3.0)
    expected = (points - 5.5) @ linear + 5.5
    torch.testing.assert_close(r.apply_points_inverse(points), expected, rtol=0, atol=2e-3)
    back = r.inverse_field()[..., 3:9, 3:9]
    exact = torch.einsum("ij,bj...->bi...", linear.T - torch.eye(2), x)[..., 3:9, 3:9]
    torch.testing.assert_close(back, exact, rtol=0, atol=2e-3)


def test_a_steep_shear_has_an_inverse_that_is_not_found():
    """It folds nowhere, but no step of the iteration helps: an error, no nonsense.

    As A, where it belongs, it is inverted exactly.
    """
    eye, shape = torch.eye(3), (12, 12)
    linear = torch.tensor([[1.0, 3], [-1, 1]]).double()
    x = identity_grid(shape, dtype=torch.float64) - 5.5
    u = torch.einsum("ij,bj...->bi...", linear - torch.eye(2), x)
    r = Registration(eye[None], u, eye, eye, shape)
    assert float(r.folding) == float(r.ndv) == 0
    points = torch.tensor([[[6.5, 6.0], [5.5, 5.5]]]).double()
    with pytest.raises(ValueError, match=r"moving_points: wanted points whose .* got 1 of 2 that"):
        r.apply_points_inverse(points)
    with pytest.raises(ValueError, match="its inverse misses by"):
        r.inverse_field()
    matrix = torch.eye(3).double()[None].clone()
    matrix[0, :2, :2], matrix[0, :2, 2] = linear, 5.5 - linear.sum(1) * 5.5
    as_affine = Registration(matrix, 0 * u, eye, eye, shape)
    expected = (points - 5.5) @ torch.linalg.inv(linear).T + 5.5
    torch.testing.assert_close(as_affine.apply_points_inverse(points), expected)
    back = torch.einsum("ij,bj...->bi...", torch.linalg.inv(linear) - torch.eye(2), x)
    torch.testing.assert_close(as_affine.inverse_field(), back, rtol=0, atol=1e-9)


def test_points_of_a_folded_field_are_mostly_found():
    """Each is the image of a known point; those that fail to be found are few."""
    r = folded(size=5.0)
    x = random_points((17, 14), n=100)
    there = r.apply_points(x)
    found = 0
    for i in range(100):
        with contextlib.suppress(ValueError):
            back = r.apply_points_inverse(there[:, i : i + 1])
            torch.testing.assert_close(r.apply_points(back), there[:, i : i + 1], rtol=0, atol=1e-3)
            found += 1
    assert found >= 95


# --- On disk --------------------------------------------------------------------------------


def strict(path):
    """What the file says, if it is JSON by the letter."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@cases
def test_what_is_saved_is_loaded(case, dtype, tmp_path):
    """To the bits of the files: vectors in the field's precision, geometry in float32."""
    r = make(case, dtype=dtype)
    r.save(tmp_path / "new" / "folder")
    loaded = Registration.load(str(tmp_path / "new" / "folder"))
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {
        *FILES,
        "inverse_field.nii.gz",
    }
    assert loaded.field.dtype == dtype
    torch.testing.assert_close(loaded.field, r.field, rtol=1e-6, atol=1e-6)
    assert loaded.affine.equal(r.affine)
    torch.testing.assert_close(loaded.fixed_affine, r.fixed_affine, rtol=1e-6, atol=1e-5)
    assert loaded.moving_affine.equal(r.moving_affine)
    assert loaded.moving_shape == r.moving_shape
    assert loaded.warped is None
    assert loaded.history == r.history
    assert (loaded.seconds, loaded.peak_memory, loaded.interrupted) == (1.5, None, False)
    assert loaded.settings == r.settings
    moving = smooth_image(r.moving_shape, dtype=torch.float64)
    torch.testing.assert_close(loaded.apply(moving), r.apply(moving), rtol=0, atol=1e-4)
    x = random_points(r.field.shape[2:])
    torch.testing.assert_close(loaded.apply_points(x), r.apply_points(x), rtol=0, atol=1e-4)
    u, _ = read_field(tmp_path / "new" / "folder" / "residual_field.nii.gz")
    assert u.equal(loaded.field)


def test_what_is_loaded_can_be_saved_and_loaded_again(tmp_path):
    r = make("3D oblique", dtype=torch.float32)
    r.save(tmp_path)
    once = Registration.load(tmp_path)
    once.save(tmp_path)
    twice = Registration.load(tmp_path)
    torch.testing.assert_close(twice.field, once.field, rtol=0, atol=1e-6)
    assert once.report() == twice.report()


def test_the_report_is_strict_and_complete(tmp_path):
    """NaN and infinity are no JSON: they become null, and NaN again in the history."""
    moving, fixed = smooth_image((9, 8), 1), smooth_image((9, 8), 2)
    method = Steps(losses=[[3.0], [math.nan], [math.inf], [1.0]], extra=(math.inf, torch.eye(2)))
    mask = torch.ones(1, 1, 9, 8)
    start = torch.eye(3)[None].clone()
    start[0, 0, 2] = 0.5
    r = register(moving, fixed, method, fixed_mask=mask, start=start)
    assert r.history[0]["toy"]["loss"][0] == 3
    assert math.isnan(r.history[0]["toy"]["loss"][1])
    r.save(tmp_path)
    report = strict(tmp_path / "report.json")
    assert report["history"]["toy"]["loss"] == [3.0, None, None, 1.0]
    [described] = report["method"]
    assert described["name"] == "Steps"
    assert described["settings"]["extra"] == [None, [[1.0, 0.0], [0.0, 1.0]]]
    assert described["settings"]["similarity"] == {"name": "mse", "settings": {"reduction": "none"}}
    assert report["environment"] == {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    assert report["masks"] == ["fixed"]
    assert report["started"] == "given affine"
    assert report["affine_ras_mm"] == start[0].tolist()
    assert report["fixed"] == report["moving"]
    assert report["fixed"] == {
        "shape": [9, 8],
        "spacing": [1.0, 1.0],
        "orientation": "RA",
        "affine": torch.eye(3).tolist(),
    }
    assert report["seconds"] > 0
    assert report["peak_memory"] > 1e7
    assert report["interrupted"] is False
    assert report["inverse"] == "inverse_field.nii.gz"
    assert (report["folding"], report["ndv"]) == (0, 0)
    assert report["reglib"]
    assert {*r.report(), "inverse"} == set(report)
    loaded = Registration.load(tmp_path)
    assert [math.isnan(x) for x in loaded.history[0]["toy"]["loss"]] == [False, True, True, False]


def test_a_batch_is_indexed_before_it_is_saved(tmp_path):
    r = make("2D other", batch=3)
    assert len(r) == 3
    for refused in (r.report, lambda: r.save(tmp_path / "a")):
        with pytest.raises(ValueError, match="single pair, got a batch of 3; index"):
            refused()
    assert not (tmp_path / "a").exists()
    assert [len(one) for one in r] == [1, 1, 1]
    assert r[-1].field.equal(r.field[2:])
    assert r[1].affine.equal(r.affine[1:2])
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"index: wanted less than 3, got {i}"):
            r[i]
    r[2].save(tmp_path / "c")
    torch.testing.assert_close(
        Registration.load(tmp_path / "c").field, r.field[2:], rtol=0, atol=1e-6
    )
    assert r[0].history == r.history[:1]
    assert repr(r) == "Registration(3 x 17 x 14, 1.5 s)"


def test_folding_and_ndv_are_those_of_the_metrics():
    plane, volume = folded("2D same"), folded("3D oblique")
    assert plane.folding.equal(folding(plane.field))
    assert plane.ndv.equal(nda(plane.field))
    assert volume.ndv.equal(ndv(volume.field))


@pytest.fixture
def saved(tmp_path):
    make("3D oblique").save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(FILES - {"field.nii.gz"}))
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Registration.load(saved)


def test_the_files_for_others_are_not_needed(saved):
    (saved / "field.nii.gz").unlink()
    (saved / "inverse_field.nii.gz").unlink()
    Registration.load(saved)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Registration.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted(FILES - {"field.nii.gz"}))
@pytest.mark.parametrize("keep", [0, 20, 90])
def test_a_damaged_file_is_named(saved, name, keep):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Registration.load(saved)


def changed(report, *keys, value):
    inner = report
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return report


@pytest.mark.parametrize(
    "change",
    [
        lambda r: [],
        lambda r: {},
        lambda r: changed(r, "moving", value=None),
        lambda r: changed(r, "moving", "affine", value=[[1, 2], [3]]),
        lambda r: changed(r, "moving", "affine", value="x"),
        lambda r: changed(r, "moving", "affine", value=np.eye(3).tolist()),
        lambda r: changed(r, "moving", "shape", value=[4, 5]),
        lambda r: changed(r, "moving", "shape", value=[4, 5, 0]),
        lambda r: changed(r, "moving", "shape", value="abc"),
        lambda r: changed(r, "seconds", value=None),
        lambda r: changed(r, "peak_memory", value="much"),
        lambda r: changed(r, "history", value=[1]),
        lambda r: changed(r, "history", value={"a": 3}),
        lambda r: changed(r, "history", value={"a": {"b": ["x"]}}),
    ],
)
def test_a_report_that_is_none_is_named(saved, change):
    report = strict(saved / "report.json")
    (saved / "report.json").write_text(json.dumps(change(report)))
    with pytest.raises(ValueError, match=r"report\.json: wanted a report of reglib"):
        Registration.load(saved)


@pytest.mark.parametrize("name", ["affine.mat", "residual_field.nii.gz"])
@pytest.mark.parametrize("other", ["3D left-handed", "3D same", "2D other"])
def test_files_of_another_registration_are_noticed(saved, name, other, tmp_path_factory):
    """A folder put together from two runs would apply, and be wrong."""
    elsewhere = tmp_path_factory.mktemp("other")
    make(other, seed=4).save(elsewhere)
    shutil.copy(elsewhere / name, saved / name)
    with pytest.raises(ValueError, match=rf"{name}: wanted what report\.json describes"):
        Registration.load(saved)


@contextlib.contextmanager
def full_disk():
    """The system stops writing after 4 kB of any file, as a full disk does in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_disk_that_fills_up_leaves_the_old_transform_whole(saved):
    """All of it: a new field beside an old affine would be worse than none."""
    before = contents(saved)
    r = make("3D sagittal", seed=3)
    with full_disk(), pytest.raises(OSError, match="nothing was written") as caught:
        r.save(saved)
    assert caught.value.errno == errno.EFBIG
    assert str(saved) in str(caught.value)
    assert "part" not in str(caught.value)
    assert contents(saved) == before


def test_a_disk_that_fills_up_leaves_no_new_folder(tmp_path):
    r = make("3D sagittal")
    with full_disk(), pytest.raises(OSError, match="nothing was written"):
        r.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["field.nii.gz", "affine.mat", "inverse_field.nii.gz"])
@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()], ids=repr
)
def test_nothing_changes_where_writing_fails(saved, failing, error, monkeypatch):
    before, replace = contents(saved), os.replace

    def fail(source, target):
        if Path(target).name == failing and Path(source).suffix == ".part":
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        make("3D oblique", seed=5).save(saved)
    assert contents(saved) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    r = make("2D same")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"nothing was written: '.*file'"):
        r.save(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"nothing was written: '.*inner'"):
        r.save(tmp_path / "file" / "inner")
    (tmp_path / "locked").mkdir()

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)  # a mode would not stop root
    with pytest.raises(PermissionError, match=r"nothing was written: '.*locked'"):
        r.save(tmp_path / "locked")
    assert contents(tmp_path / "locked") == {} if (tmp_path / "locked").is_dir() else False


def test_a_grid_that_itk_cannot_hold_is_refused_whole(tmp_path):
    """A sheared fixed grid has no ITK file at all; a sheared moving grid only no inverse."""
    r = make("3D same")
    sheared = r.fixed_affine.clone()
    sheared[0, 1] = 0.3
    bad = Registration(r.affine, r.field, sheared, r.moving_affine, r.moving_shape)
    with pytest.raises(ValueError, match="right angles"):
        bad.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    fine = Registration(r.affine, r.field, r.fixed_affine, sheared, r.moving_shape)
    fine.save(tmp_path / "b")
    report = strict(tmp_path / "b" / "report.json")
    assert report["inverse"].startswith("not written on the moving grid (")
    assert {p.name for p in (tmp_path / "b").iterdir()} == FILES
    moving = smooth_image(r.moving_shape)
    loaded = Registration.load(tmp_path / "b")
    torch.testing.assert_close(loaded.apply(moving), fine.apply(moving), rtol=0, atol=1e-4)


def test_a_field_of_nan_is_not_written(tmp_path):
    r = make("2D same")
    bad = Registration(
        r.affine, r.field * math.nan, r.fixed_affine, r.moving_affine, r.moving_shape
    )
    with pytest.raises(ValueError, match="field: wanted finite values"):
        bad.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- What does not belong to a registration -------------------------------------------------


def test_parts_that_do_not_belong_together_make_no_registration():
    r = make("3D oblique")
    parts = {
        "affine": r.affine,
        "field": r.field,
        "fixed_affine": r.fixed_affine,
        "moving_affine": r.moving_affine,
        "moving_shape": r.moving_shape,
    }
    for name, bad in (
        ("affine", torch.eye(4)),
        ("affine", torch.eye(4).expand(2, 4, 4)),
        ("affine", torch.eye(3)[None]),
        ("field", r.field[:, :2]),
        ("fixed_affine", torch.eye(3)),
        ("moving_affine", torch.zeros(4, 4)),
        ("moving_shape", (4, 5)),
        ("moving_shape", (4, 5, 0)),
        ("history", ({}, {})),
    ):
        with pytest.raises(ValueError, match=f"{name}: wanted"):
            Registration(**parts | {name: bad})


def test_images_that_do_not_belong_to_it_are_refused():
    r = make("3D oblique", batch=2)
    shape = r.moving_shape
    good = torch.zeros(2, 1, *shape)
    one = Image(torch.zeros(1, 1, *shape), r.moving_affine)
    for bad, error, sentence in (
        (good.long(), TypeError, "image: wanted a floating-point image"),
        (good[:1], ValueError, "image, field: wanted the same batch size"),
        (good[..., 1:], ValueError, "image: wanted the moving grid of .* may have a grid of its"),
        (good[..., 0], ValueError, "wanted the same batch size and number of axes"),
        (good.to("meta"), ValueError, "image: wanted it on cpu, like the field, got meta"),
        (one, ValueError, "a tensor for a batch of 2, got a single Image; index"),
        ("a.nii", TypeError, r"image: wanted a torch\.Tensor"),
    ):
        with pytest.raises(error, match=sentence):
            r.apply(bad)
    plane = Image(torch.zeros(1, 1, 5, 6), torch.eye(3))
    with pytest.raises(ValueError, match="image: wanted 3 spatial axes"):
        r[0].apply(plane)
    with pytest.raises(TypeError, match="floating-point"):
        r[0].apply(Image(one.tensor.long(), one.affine))
    with pytest.raises(ValueError, match="padding"):
        r.apply(good, padding="wrap")
    with pytest.raises(ValueError, match="mode"):
        r.apply_labels(good, mode="cubic")
    with pytest.raises(ValueError, match="labels: wanted the moving grid"):
        r.apply_labels(good[:, :, 1:])


@pytest.mark.parametrize("method", ["apply_points", "apply_points_inverse"])
def test_points_that_do_not_belong_to_it_are_refused(method):
    r = make("3D oblique")
    move, name = getattr(r, method), "fixed" if method == "apply_points" else "moving"
    for points, space, error, sentence in (
        (torch.zeros(1, 4, 2), "voxel", ValueError, f"{name}_points: wanted one point or more"),
        (torch.zeros(4, 3), "voxel", ValueError, "wanted one point or more"),
        (torch.zeros(1, 0, 3), "ras", ValueError, "wanted one point or more"),
        (torch.zeros(2, 4, 3), "ras", ValueError, r"wanted points of 1 pair\(s\), got 2"),
        (torch.zeros(1, 4, 3, dtype=int), "lps", TypeError, "floating-point"),
        (torch.full((1, 4, 3), torch.nan), "lps", ValueError, "wanted finite values"),
        (torch.zeros(1, 4, 3), "mm", ValueError, "space: wanted one of 'voxel', 'ras', 'lps'"),
    ):
        with pytest.raises(error, match=sentence):
            move(points, space=space)


# --- register -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A method of toy steps: step k moves everything k voxels along the first axis.

    ``losses[k]`` are those of the pairs; a pair stops after the number of its steps in ``stops``.
    """

    losses: object = ((3.0,), (2.0,), (1.0,))
    stops: tuple = ()
    extra: object = None
    stage: str = "toy"
    interrupt: int | None = None
    similarity: object = functools.partial(mse, reduction="none")

    def __call__(self, pair):
        for k, losses in enumerate(self.losses):
            if k == self.interrupt:
                raise KeyboardInterrupt
            stops = torch.tensor(self.stops or [len(self.losses)] * len(pair.field))
            u = pair.field.clone()
            u[:, 0] += k + 1
            yield Iterate(
                self.stage,
                {"loss": torch.tensor(losses)},
                k < stops,
                lambda u=u: (pair.affine, u),
                (f"{self.stage} was here",),
            )


def pair_of(d=2, batch=1, dtype=torch.float32):
    shape = (9, 8, 7)[:d]
    return smooth_image(shape, 1, batch, dtype), smooth_image(shape, 2, batch, dtype)


def spy(pairs):
    """A method that remembers what it was given and leaves it as it is."""

    def method(pair):
        pairs.append(pair)
        active = torch.zeros(len(pair.field), dtype=bool)
        yield Iterate("spy", {}, active, lambda: (pair.affine, pair.field))

    return method


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_a_method_is_given_a_checked_pair(d, batch):
    moving, fixed = pair_of(d, batch, torch.float16)
    pairs = []
    r = register(moving, fixed, spy(pairs))
    [pair] = pairs
    assert isinstance(pair, Pair)
    assert pair.moving.dtype == pair.fixed.dtype == pair.field.dtype == torch.float32
    assert pair.affine.dtype == pair.fixed_affine.dtype == torch.float64
    assert pair.affine.equal(torch.eye(d + 1).double().expand(batch, -1, -1))
    assert pair.moving_affine.equal(torch.eye(d + 1).double())
    assert pair.moving_mask is None
    assert pair.fixed_mask is None
    assert not pair.field.any()
    torch.testing.assert_close(r.warped, moving.float())
    torch.testing.assert_close(pair.warped(), r.warped)
    assert r.history == ({},) * batch


def test_images_bring_their_affines_and_tensors_take_theirs():
    case = make("3D oblique")
    moving = Image(smooth_image(case.moving_shape), case.moving_affine)
    fixed = Image(smooth_image(case.field.shape[2:]), case.fixed_affine)
    pairs = []
    as_images = register(moving, fixed, spy(pairs), start=case.affine.float())
    as_tensors = register(
        moving.tensor,
        fixed.tensor,
        spy(pairs),
        moving_affine=moving.affine,
        fixed_affine=fixed.affine.numpy(),
        start=case.affine.float(),
    )
    mixed = register(moving, fixed.tensor, spy(pairs), fixed_affine=fixed.affine)
    for pair in pairs:
        assert pair.moving_affine.equal(moving.affine)
        assert pair.fixed_affine.equal(fixed.affine)
    assert as_images.warped.equal(as_tensors.warped)
    assert as_images.warped.shape == fixed.tensor.shape
    # A start of single precision is that matrix, not another.
    assert as_images.affine.equal(case.affine.float().double())
    there = affine_field(case.affine.float(), fixed.affine, moving.affine, fixed.tensor.shape[2:])
    torch.testing.assert_close(as_images.warped, warp(moving.tensor, there), rtol=0, atol=1e-4)
    # Without a start they meet in world mm.
    there = affine_field(torch.eye(4)[None], fixed.affine, moving.affine, fixed.tensor.shape[2:])
    torch.testing.assert_close(mixed.warped, warp(moving.tensor, there), rtol=0, atol=1e-4)
    assert as_images.moving_shape == case.moving_shape


@pytest.mark.parametrize("kind", [bool, torch.float32, torch.uint8, Image])
def test_masks_reach_the_method_as_weights(kind):
    moving, fixed = pair_of(3)
    masks = [(torch.rand_like(x) > 0.5).float() for x in (moving, fixed)]
    placed = torch.diag(torch.tensor([2.0, 1, 1, 1]).double())
    affines = {"moving_affine": placed, "fixed_affine": torch.eye(4)}
    given = (
        [m.to(kind) for m in masks]
        if kind is not Image
        else [
            Image(masks[0], placed + 1e-6 * torch.eye(4, 4).roll(3, 1).triu(1)),
            Image(masks[1], torch.eye(4)),
        ]
    )
    pairs = []
    r = register(moving, fixed, spy(pairs), moving_mask=given[0], fixed_mask=given[1], **affines)
    assert pairs[0].moving_mask.equal(masks[0])
    assert pairs[0].fixed_mask.equal(masks[1])
    assert pairs[0].fixed_mask.dtype == torch.float32
    assert r.settings["masks"] == ["moving", "fixed"]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_pair_has_its_own_history_and_stop(batch):
    """The terms of a pair that has stopped are stale and stay out of its history."""
    losses = [[10.0 * b + k for b in range(batch)] for k in range(4)]
    stops = (2, 4, 1)[:batch]
    r = register(*pair_of(2, batch), Steps(losses=losses, stops=stops))
    for b in range(batch):
        expected = [10.0 * b + k for k in range(stops[b])]
        assert r.history[b] == {"toy": {"loss": expected}}
        assert r[b].history == (r.history[b],)
    assert r.field[:, 0].unique().tolist() == [4]


@pytest.mark.parametrize("kind", [list, tuple])
def test_methods_in_a_row_start_from_what_was_found(kind):
    moving, fixed = pair_of()
    pairs = []
    r = register(moving, fixed, kind([Steps(stage="a"), spy(pairs), Steps(stage="b")]))
    assert pairs[0].field[:, 0].unique().tolist() == [3]
    assert r.field[:, 0].unique().tolist() == [6]
    assert list(r.history[0]) == ["a", "b"]
    assert r.settings["notes"] == ["a was here", "b was here"]
    assert [m["name"] for m in r.settings["method"]] == ["Steps", "method", "Steps"]
    expected = warp(moving, r.field)
    torch.testing.assert_close(r.warped, expected)


class Zero(nn.Module):
    def forward(self, moving, fixed):
        return torch.full_like(fixed, 0.25).repeat(1, 2, 1, 1)


def test_networks_and_methods_mix():
    r = register(*pair_of(), [Steps(), Zero()])
    u = torch.tensor([3.25, 0.25]).view(1, 2, 1, 1).expand(1, 2, 9, 8)
    torch.testing.assert_close(r.field, u)
    assert r.settings["method"][1]["name"] == "Zero"
    alone = register(*pair_of(), Zero())
    torch.testing.assert_close(r.field, compose(u - 0.25, alone.field))


def test_the_callback_sees_every_step_and_stops_its_method():
    seen = []

    def callback(iterate):
        seen.append((iterate.stage, float(iterate.terms["loss"])))
        return iterate.stage == "a" and len(seen) == 2

    r = register(*pair_of(), [Steps(stage="a"), Steps(stage="b")], callback=callback)
    assert seen == [("a", 3), ("a", 2), ("b", 3), ("b", 2), ("b", 1)]
    assert r.history[0] == {"a": {"loss": [3, 2]}, "b": {"loss": [3, 2, 1]}}
    # Two steps of the first, three of the second.
    assert r.field[:, 0].unique().tolist() == [5]
    assert not r.interrupted


def test_an_error_in_the_callback_is_the_users():
    def callback(iterate):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        register(*pair_of(), Steps(), callback=callback)


def test_an_interrupt_returns_the_best_so_far_and_ends_the_row(tmp_path):
    pairs = []
    r = register(*pair_of(), [Steps(stage="a", interrupt=2), spy(pairs)])
    assert r.interrupted
    assert pairs == []
    assert r.field[:, 0].unique().tolist() == [2]
    assert r.history[0] == {"a": {"loss": [3, 2]}}
    assert r.settings["notes"] == ["a was here"]
    assert repr(r).endswith("interrupted)")
    r.save(tmp_path)
    assert strict(tmp_path / "report.json")["interrupted"] is True
    assert Registration.load(tmp_path).interrupted
    torch.testing.assert_close(r.warped, warp(pair_of()[0], r.field))


def test_an_interrupt_before_any_step_is_raised():
    with pytest.raises(KeyboardInterrupt):
        register(*pair_of(), Steps(interrupt=0))


def test_an_interrupt_before_the_first_step_of_a_later_method_keeps_what_was_found():
    r = register(*pair_of(), [Steps(stage="a"), Steps(stage="b", interrupt=0)])
    assert r.interrupted
    assert r.field[:, 0].unique().tolist() == [3]
    assert list(r.history[0]) == ["a"]


def test_an_interrupt_from_the_callback_counts_as_well():
    def callback(iterate):
        raise KeyboardInterrupt

    r = register(*pair_of(), Steps(), callback=callback)
    assert r.interrupted
    assert r.field[:, 0].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [
        (None, False, False),
        (None, True, True),
        (True, False, True),
        (False, True, False),
        (False, False, False),
    ],
)
def test_progress_is_shown_when_asked_or_on_a_terminal(
    progress, terminal, shown, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    register(*pair_of(), Steps(), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("3step" in err and "toy" in err and "loss=1.0000" in err) if shown else err == ""


# --- register: bad input --------------------------------------------------------------------


def call(**changes):
    moving, fixed = pair_of()
    arguments = {"moving": moving, "fixed": fixed, "method": Steps()} | changes
    return register(**arguments)


image = functools.partial(torch.ones, (1, 1, 9, 8))


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"moving": "a.nii"}, TypeError, r"moving: wanted a torch\.Tensor, got str"),
        ({"fixed": np.ones((1, 1, 9, 8))}, TypeError, "fixed: wanted a"),
        ({"moving": torch.ones(9, 8)}, ValueError, "moving: wanted a batched image"),
        ({"moving": torch.ones(1, 1, 9, 8, 7)}, ValueError, "same batch size and number of axes"),
        (
            {"moving": image().repeat(2, 1, 1, 1)},
            ValueError,
            "moving, fixed: wanted the same batch",
        ),
        ({"moving": image().repeat(1, 2, 1, 1)}, ValueError, "channels, got 2 and 1"),
        ({"moving": image(dtype=torch.uint8)}, TypeError, "moving: wanted a floating-point image"),
        ({"fixed": image(dtype=torch.complex64)}, TypeError, "fixed: wanted a floating-point"),
        ({"fixed": torch.ones(1, 1, 0, 8)}, ValueError, "fixed: wanted a voxel or more"),
        ({"fixed": image() * math.nan}, ValueError, "fixed: wanted finite values, got 72 NaN"),
        ({"moving": image() * math.inf}, ValueError, "moving: wanted finite values"),
        ({"moving": image(device="meta")}, ValueError, "both on one device, got meta and cpu"),
        ({"moving_affine": torch.eye(4)}, ValueError, "moving_affine: wanted a 3 x 3 matrix"),
        ({"fixed_affine": torch.zeros(3, 3)}, ValueError, "fixed_affine: wanted"),
        ({"fixed_affine": [[1]]}, TypeError, "fixed_affine: wanted"),
        (
            {"moving": Image(image(), torch.eye(3)), "moving_affine": torch.eye(3)},
            ValueError,
            "moving_affine: wanted None beside an Image",
        ),
        ({"moving_mask": torch.ones(1, 1, 9, 7)}, ValueError, "moving_mask: wanted shape"),
        ({"fixed_mask": image().repeat(1, 2, 1, 1)}, ValueError, "fixed_mask: wanted shape"),
        ({"fixed_mask": image() - 2}, ValueError, "fixed_mask: wanted weights of at least 0"),
        ({"moving_mask": image() * 0}, ValueError, "moving_mask: wanted weights .* not all 0"),
        ({"moving_mask": image() * math.nan}, ValueError, "moving_mask: wanted finite"),
        ({"moving_mask": image() * 1j}, TypeError, "moving_mask: wanted real numbers"),
        ({"moving_mask": "m.nii"}, TypeError, "moving_mask: wanted a torch"),
        (
            {"fixed_mask": Image(image(), torch.diag(torch.tensor([2.0, 1, 1])))},
            ValueError,
            "fixed_mask: wanted the grid of its image, got one placed elsewhere",
        ),
        (
            {"fixed_mask": Image(torch.ones(1, 1, 9, 8, 2), torch.eye(4))},
            ValueError,
            "fixed_mask: wanted the grid of its image",
        ),
        ({"start": torch.eye(3)}, ValueError, "start: wanted homogeneous matrices"),
        ({"start": torch.eye(4)[None]}, ValueError, "start: wanted"),
        ({"start": torch.eye(3).expand(2, 3, 3)}, ValueError, "start: wanted a batch of 1"),
        ({"start": torch.zeros(1, 3, 3)}, ValueError, "start: wanted"),
        ({"start": torch.eye(3, dtype=int)[None]}, TypeError, "start: wanted a floating-point"),
        ({"callback": 3}, TypeError, "callback: wanted a function"),
        ({"method": None}, TypeError, "method: wanted a method, a network"),
        ({"method": "affine"}, TypeError, "method: wanted a method, a network"),
        ({"method": []}, TypeError, "method: wanted a method, a network"),
        ({"method": [Steps(), 3]}, TypeError, "method: wanted a method, a network"),
        (
            {"method": Steps},
            TypeError,
            r"method: wanted an instance, Steps\(\.\.\.\), got the class",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        call(**changes)


def one_step(field=None, affine=None, terms=None, active=None):
    """A method of one step, wrong in one respect."""

    def method(pair):
        yield Iterate(
            "x",
            {} if terms is None else terms,
            torch.ones(1, dtype=bool) if active is None else active,
            lambda: (
                pair.affine if affine is None else affine,
                pair.field if field is None else field,
            ),
        )

    return method


@pytest.mark.parametrize(
    ("method", "error", "sentence"),
    [
        (lambda pair: iter(()), ValueError, "method: wanted at least one step, got none"),
        (lambda pair: None, TypeError, "yields an Iterate per step, got NoneType"),
        (lambda pair: pair.field, TypeError, "yields an Iterate per step, got Tensor"),
        (lambda pair: [pair.field], TypeError, "yields an Iterate per step, got Tensor"),
        (one_step(torch.zeros(1, 2, 4, 4)), ValueError, "method: wanted a field of shape"),
        (one_step(torch.zeros(1, 3, 9, 8)), ValueError, "method's field: wanted a field"),
        (one_step(torch.zeros(1, 2, 9, 8) / 0), ValueError, "method's field: wanted finite"),
        (one_step(affine=torch.eye(3)), ValueError, "method's affine: wanted homogeneous"),
        (one_step(affine=torch.eye(4)[None]), ValueError, "method's affine: wanted"),
        (one_step(affine=torch.zeros(1, 3, 3)), ValueError, "method's affine: wanted"),
        (
            one_step(terms={"loss": torch.tensor(1.0)}),
            ValueError,
            r"'loss' of shape \(1,\), got \(\)",
        ),
        (one_step(terms={"loss": 1.0}), ValueError, r"'loss' of shape \(1,\), got float"),
        (one_step(active=torch.ones(2, dtype=bool)), ValueError, r"'active' of shape \(1,\)"),
    ],
)
def test_a_method_that_breaks_its_contract_is_named(method, error, sentence):
    with pytest.raises(error, match=sentence):
        call(method=method)


def test_what_a_method_finds_takes_the_precision_of_the_pair():
    """A method may compute in half or double precision; the registration stays as the images."""
    field = torch.full((1, 2, 9, 8), 0.5)
    for dtype in (torch.bfloat16, torch.float64):
        r = call(method=one_step(field.to(dtype).requires_grad_()))
        assert r.field.dtype == torch.float32
        assert r.field.equal(field)
        assert not r.field.requires_grad


def test_a_saved_field_is_what_write_field_makes_of_it(tmp_path):
    """field.nii.gz is phi as one displacement: byte for byte, so nothing depends on the day."""
    r = make("3D left-handed", dtype=torch.float32)
    r.save(tmp_path / "a")
    write_field(
        tmp_path / "b.nii.gz", r.whole_field(), r.fixed_affine, moving_affine=r.moving_affine
    )
    assert (tmp_path / "a" / "field.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_from_two_files_to_a_transform_that_itk_applies(tmp_path):
    """As a user would: read, register, save, load, apply, and ITK agrees with all of it."""
    case = make("3D sagittal")
    write_image(
        tmp_path / "moving.nii.gz", Image(smooth_image(case.moving_shape), case.moving_affine)
    )
    write_image(
        tmp_path / "fixed.nii.gz", Image(smooth_image(case.field.shape[2:], 3), case.fixed_affine)
    )
    moving, fixed = (read_image(tmp_path / f"{n}.nii.gz") for n in ("moving", "fixed"))
    r = register(moving, fixed, Steps(losses=((1.0,),)), start=case.affine)
    r.save(tmp_path / "out")
    loaded = Registration.load(tmp_path / "out")
    again = loaded.apply(read_image(tmp_path / "moving.nii.gz"))
    torch.testing.assert_close(again.tensor, r.warped, rtol=0, atol=1e-4)
    itk = itk_resample(
        tmp_path / "moving.nii.gz",
        tmp_path / "fixed.nii.gz",
        itk_field(tmp_path / "out" / "field.nii.gz"),
    )
    mask = well_inside(phi(r)[0], case.moving_shape)
    np.testing.assert_allclose(r.warped[0, 0].numpy()[mask], itk[mask], rtol=0, atol=2e-4)
