"""Affine maps in ITK's MATLAB file, against SimpleITK and files written by hand.

Numbers are doubles on both sides, so the tolerance is rounding: 1e-9 mm at 100 mm.
"""

import errno
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.io
import SimpleITK as sitk
import torch

from reglib.data import files
from reglib.data.itk_affine import read_affine, write_affine
from reglib.data.nifti import Image, read_image, read_labels


def random_matrix(d, seed=0):
    """Turned, sheared, scaled, far away; RAS."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(d + 1)
    matrix[:d, :d] += rng.uniform(-0.4, 0.4, (d, d))
    matrix[:d, d] = rng.uniform(-100, 100, d)
    return torch.from_numpy(matrix)


def through(matrix, lps_points):
    """The points through a RAS matrix, in NumPy."""
    d = lps_points.shape[1]
    signs = np.array([-1, -1, 1])[:d]
    ras = np.column_stack([lps_points * signs, np.ones(len(lps_points))])
    return (ras @ np.asarray(matrix).T)[:, :d] * signs


def some_points(d):
    return np.random.default_rng(9).uniform(-120, 120, (20, d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [2, 3])
def test_itk_maps_points_as_our_matrix_does(d, dtype, tmp_path):
    matrix = random_matrix(d).to(dtype)
    write_affine(tmp_path / "a.mat", matrix)
    transform = sitk.ReadTransform(str(tmp_path / "a.mat"))
    assert transform.GetName() == "AffineTransform"
    points = some_points(d)
    itk = [transform.TransformPoint(p) for p in points.tolist()]
    np.testing.assert_allclose(through(matrix.double(), points), itk, rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", [2, 3])
def test_we_read_what_itk_wrote_about_a_centre(d, tmp_path):
    rng = np.random.default_rng(3)
    transform = sitk.AffineTransform(d)
    transform.SetMatrix((np.eye(d) + rng.uniform(-0.3, 0.3, (d, d))).ravel())
    transform.SetTranslation(rng.uniform(-20, 20, d))
    transform.SetCenter(rng.uniform(-90, 90, d))
    sitk.WriteTransform(transform, str(tmp_path / "a.mat"))
    matrix = read_affine(tmp_path / "a.mat")
    assert matrix.dtype == torch.float64
    points = some_points(d)
    itk = [transform.TransformPoint(p) for p in points.tolist()]
    np.testing.assert_allclose(through(matrix, points), itk, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["AffineTransform_float_3_3", "MatrixOffsetTransformBase_double_3_3"]
)
def test_the_other_names_that_ants_gives_an_affine_map_are_read(name, tmp_path):
    """The parameters are the same twelve."""
    matrix = random_matrix(3)
    write_affine(tmp_path / "a.mat", matrix)
    arrays = scipy.io.loadmat(tmp_path / "a.mat")
    kind = np.float32 if "float" in name else np.float64
    values = arrays["AffineTransform_double_3_3"].astype(kind)
    scipy.io.savemat(
        tmp_path / "b.mat", {name: values, "fixed": arrays["fixed"].astype(kind)}, format="4"
    )
    torch.testing.assert_close(read_affine(tmp_path / "b.mat"), matrix, rtol=1e-6, atol=1e-6)
    # ITK itself takes the file, so the test asks what exists.
    assert sitk.ReadTransform(str(tmp_path / "b.mat")).GetDimension() == 3


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parametrize("d", [2, 3])
def test_a_round_trip_loses_nothing(d, kind, tmp_path):
    matrix = random_matrix(d)
    write_affine(str(tmp_path / "a.mat"), matrix if kind is torch.Tensor else matrix.numpy())
    assert read_affine(str(tmp_path / "a.mat")).equal(matrix)


def rigid_of_itk(path):
    sitk.WriteTransform(sitk.Euler3DTransform((0, 0, 0), 0.1, 0.2, 0.3), str(path))


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: p.write_bytes(b""), "wanted an affine transform of ITK"),
        (lambda p: p.write_bytes(b"\0" * 40), "wanted an affine transform of ITK"),
        (
            lambda p: p.write_bytes(np.random.default_rng(0).bytes(300)),
            "wanted an affine transform of ITK",
        ),
        (rigid_of_itk, "got Euler3DTransform_double_3_3"),
        (lambda p: scipy.io.savemat(p, {"fixed": np.zeros((3, 1))}), "got nothing"),
        (lambda p: scipy.io.savemat(p, {"AffineTransform_double_3_3": np.eye(3)}), "'fixed'"),
        (
            lambda p: scipy.io.savemat(
                p, {"AffineTransform_double_3_3": np.ones(10), "fixed": np.zeros(3)}
            ),
            "got 10 numbers about a centre of 3",
        ),
        (
            lambda p: scipy.io.savemat(
                p, {"AffineTransform_double_1_1": np.ones(2), "fixed": np.zeros(1)}
            ),
            "got 2 numbers about a centre of 1",
        ),
        (
            lambda p: scipy.io.savemat(
                p, {"AffineTransform_double_3_3": np.full(12, np.nan), "fixed": np.zeros(3)}
            ),
            "wanted finite numbers",
        ),
        (
            lambda p: scipy.io.savemat(
                p, {"AffineTransform_double_3_3": np.zeros(12), "fixed": np.zeros(3)}
            ),
            "singular",
        ),
    ],
)
def test_a_file_that_holds_no_affine_map_is_named(write, sentence, tmp_path):
    write(tmp_path / "bad.mat")
    with pytest.raises(ValueError, match=r"bad\.mat: ") as caught:
        read_affine(tmp_path / "bad.mat")
    assert sentence in str(caught.value)


def test_a_truncated_file_is_named(tmp_path):
    write_affine(tmp_path / "a.mat", random_matrix(3))
    content = (tmp_path / "a.mat").read_bytes()
    for n in (10, 40, 100, len(content) - 3):
        (tmp_path / "a.mat").write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"a\.mat: wanted an affine transform of ITK"):
            read_affine(tmp_path / "a.mat")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        read_affine(tmp_path / "none.mat")


def test_nothing_but_an_affine_map_is_written(tmp_path):
    for bad in (torch.eye(5), torch.eye(4)[:3], torch.zeros(4, 4), torch.full((4, 4), torch.nan)):
        with pytest.raises(ValueError, match="matrix: wanted"):
            write_affine(tmp_path / "a.mat", bad)
    with pytest.raises(TypeError, match="matrix: wanted"):
        write_affine(tmp_path / "a.mat", [[1.0, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"ends with \.mat"):
        write_affine(tmp_path / "a.txt", torch.eye(4))
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_affine(tmp_path / "a.mat", torch.eye(4))
    old = (tmp_path / "a.mat").read_bytes()

    def fail(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(PermissionError, match=r"nothing was written: '.*a\.mat'"):
        write_affine(tmp_path / "a.mat", random_matrix(3))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [old]


# --- ANTs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["field", "parts"])
def test_ants_applies_what_is_saved_as_we_do(way, tmp_path):
    """Image, labels and points through ``field.nii.gz``, or through the field and ``affine.mat``.

    ANTs fills with 0 what lies outside the moving image, so the image is compared inside.
    """
    path = Path(__file__).parents[1] / "data_scripts" / "make_ants_applied.py"
    spec = importlib.util.spec_from_file_location("make_ants_applied", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    ours = script.example()
    # What ANTs was given is what is saved today.
    ours.save(tmp_path)
    for name in ("field.nii.gz", "residual_field.nii.gz"):
        was, is_now = (nib.load(folder / name).get_fdata() for folder in (script.OUT, tmp_path))
        np.testing.assert_allclose(is_now, was, rtol=0, atol=1e-5)
    moving = read_image(script.MOVING)
    inside = (
        ours.apply(Image(torch.ones_like(moving.tensor), moving.affine), padding="zeros").tensor
        > 1 - 1e-6
    )
    assert inside.float().mean() > 0.5
    theirs = read_image(script.OUT / f"{way}_image.nii.gz").tensor
    # ANTs keeps places in double, fields in single precision: 1e-4 of 200 grey values.
    apart = (ours.apply(moving).tensor - theirs)[inside].abs().max()
    assert apart < 0.02
    labels = read_labels(script.OUT / f"{way}_labels.nii.gz").tensor
    same = ours.apply_labels(Image(moving.tensor.long(), moving.affine)).tensor == labels
    assert same[inside].float().mean() > 0.995  # a tie may fall to either side
    points = torch.tensor([script.POINTS], dtype=torch.float64)
    moved = np.loadtxt(script.OUT / f"{way}_points.csv", delimiter=",")
    np.testing.assert_allclose(ours.apply_points(points, space="lps")[0], moved, rtol=0, atol=1e-3)
