"""The command line as a user meets it: files in, files out, exit codes, sentences on stderr.

Oracles are SimpleITK, which applies the fields that were written, NumPy and hashlib. The images are
small and the settings coarse: what is tested is the way of the data, not how well a method does.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk
import torch
import typer
from scipy.spatial.transform import Rotation

import reglib
from reglib.cli import main, methods
from reglib.data.datasets import mnist
from reglib.data.nifti import Image, read_field, read_image, write_field, write_image
from reglib.methods import fcn, georeg
from reglib.methods.georeg import load_pretrained
from reglib.methods.pair import Iterate
from reglib.registration import Registration, register
from reglib.weights import load_weights

FIXED_SHAPE, MOVING_SHAPE = (20, 22, 17), (24, 19, 21)
QUICK = ["--set", "steps=8", "--set", "levels=6,3"]


# --- Images ---------------------------------------------------------------------------------


def oblique(angles, spacing, shape, *, mirrored=None):
    """An affine whose grid has its middle near the origin of the world."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    if mirrored is not None:
        affine[:3, mirrored] *= -1
    affine[:3, 3] = (3, -2, 5) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def world(affine, shape):
    return (
        np.einsum("ij,j...->i...", affine[:3, :3], np.indices(shape))
        + affine[:3, 3, None, None, None]
    )


def body(at):
    """A lopsided blob with an inner structure, as a function of the place in mm."""
    r, a, s = at
    outer = np.exp(-(((r / 16) ** 2 + (a / 12) ** 2 + (s / 14) ** 2) ** 2))
    inner = np.exp(-((((r - 5) / 5) ** 2 + ((a + 2) / 4) ** 2 + ((s - 3) / 6) ** 2) ** 2))
    return outer + 0.7 * inner, 1 * (outer > 0.4) + 1 * (inner > 0.4)


def deformed(at):
    """Where the fixed body has what the moving one has there: some mm aside."""
    return at - np.array([2.0, -1.5, 1.0])[:, None, None, None] * np.cos(at[[1, 2, 0]] / 15)


def save(path, values, affine, dtype):
    nib.save(nib.Nifti1Image(values.astype(dtype), affine), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two bodies with labels, on grids of different spacing, orientation and handedness."""
    folder = tmp_path_factory.mktemp("files")
    fixed = oblique((10, -20, 30), (2.0, 1.7, 2.4), FIXED_SHAPE)
    moving = oblique((-5, 8, 100), (1.5, 2.2, 1.9), MOVING_SHAPE, mirrored=0)
    image, labels = body(world(fixed, FIXED_SHAPE))
    other, other_labels = body(deformed(world(moving, MOVING_SHAPE)))
    return {
        "fixed": save(folder / "fixed.nii.gz", image, fixed, np.float32),
        "fixed_labels": save(folder / "fixed_labels.nii", labels, fixed, np.uint8),
        "fixed_mask": save(folder / "fixed_mask.nii.gz", image >= 0, fixed, np.uint8),
        "moving": save(folder / "moving.nii.gz", 1000 * other, moving, np.int16),
        "moving_labels": save(folder / "moving_labels.nii.gz", other_labels, moving, np.int32),
        "moving_mask": save(folder / "moving_mask.nii", other >= 0, moving, np.float32),
    }


@pytest.fixture(scope="module")
def words(files):
    """What registers them, but for the folder."""
    masks = [f"--{k}-mask={files[f'{k}_mask']}" for k in ("fixed", "moving")]
    labels = [f"--{k}-labels={files[f'{k}_labels']}" for k in ("fixed", "moving")]
    pair = [str(files["moving"]), str(files["fixed"])]
    return ["register", *pair, *labels, *masks, "--method", "displacement", *QUICK]


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """The results."""
    out = tmp_path_factory.mktemp("results") / "a" / "b"
    assert main([*words, "--out", str(out), "--seed", "3", "--quiet"]) == 0
    return out


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a call."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def call(*arguments, **options):
    """The same in a process of its own."""
    command = [str(Path(sys.executable).with_name("reglib")), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def values_of(path):
    return np.asarray(nib.load(path).dataobj)


# --- Results against SimpleITK --------------------------------------------------------------


def itk_resampled(image, field, interpolator):
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    resample = sitk.ResampleImageFilter()
    resample.SetReferenceImage(sitk.ReadImage(str(field)))
    resample.SetTransform(transform)
    resample.SetInterpolator(interpolator)
    resample.SetDefaultPixelValue(-1)
    # ITK's arrays are reversed.
    return sitk.GetArrayFromImage(resample.Execute(image)).T


def test_itk_gets_the_warped_image_from_the_field(files, folder):
    """Integers are rounded, so ITK's real numbers lie within half a unit, and 1e-4 of the range."""
    moving = sitk.ReadImage(str(files["moving"]), sitk.sitkFloat64)
    wanted = itk_resampled(moving, folder / "field.nii.gz", sitk.sitkLinear)
    warped = values_of(folder / "warped.nii.gz")
    inside = wanted >= 0
    assert inside.mean() > 0.3
    assert warped.dtype == np.int16
    assert abs(warped - wanted)[inside].max() <= 0.5 + 1e-4 * np.ptp(warped)


def test_itk_gets_the_warped_labels_from_the_field(files, folder):
    """A voxel in a thousand may lie halfway between two, where rounding decides."""
    moving = sitk.ReadImage(str(files["moving_labels"]))
    wanted = itk_resampled(moving, folder / "field.nii.gz", sitk.sitkNearestNeighbor)
    warped = values_of(folder / "warped_labels.nii.gz")
    inside = wanted >= 0
    assert (warped == wanted)[inside].mean() > 0.999
    assert (warped[~inside] == 0).all()
    assert set(np.unique(warped)) == {0, 1, 2}


def test_itk_moves_points_to_the_same_places(folder, tmp_path, capsys):
    """1e-3 mm: the field is stored in single precision."""
    grid = sitk.ReadImage(str(folder / "field.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(sitk.Image(grid))
    inner = np.random.default_rng(0).uniform(4, 12, (7, 3))
    points = np.array([grid.TransformContinuousIndexToPhysicalPoint(p) for p in inner.tolist()])
    lines = [f'"p, {i}",{a},{b},{c},note {i}' for i, (a, b, c) in enumerate(points)]
    (tmp_path / "p.csv").write_text("\n".join(["name,x,y,z,remark", *lines]))
    for source in (folder, folder / "field.nii.gz"):
        given = ("--points", tmp_path / "p.csv", "--space", "lps", "--from", "fixed")
        code, out, err = run(capsys, "apply", source, *given, "--out", tmp_path / "q.csv")
        assert (code, out, err) == (0, "", "")
        header, *rows = (tmp_path / "q.csv").read_text().splitlines()
        assert header == "name,x,y,z,remark"
        cells = [re.fullmatch(r'"p, (\d)",(.*),(.*),(.*),note \1', row).groups() for row in rows]
        assert [int(c[0]) for c in cells] == list(range(7))
        found = np.array([[float(v) for v in c[1:]] for c in cells])
        wanted = np.array([transform.TransformPoint(p) for p in points.tolist()])
        np.testing.assert_allclose(found, wanted, atol=1e-3)

        # And back: the inverse is solved for to a thousandth of a voxel.
        given = ("--points", tmp_path / "q.csv", "--space", "lps", "--from", "moving")
        assert run(capsys, "apply", source, *given, "--out", tmp_path / "r.csv")[0] == 0
        back = np.loadtxt(tmp_path / "r.csv", delimiter=",", skiprows=1, usecols=(2, 3, 4))
        np.testing.assert_allclose(back, points, atol=5e-3)


# --- The folder -----------------------------------------------------------------------------


def test_the_folder_holds_what_it_should_and_loads(folder):
    names = {p.name for p in folder.iterdir()}
    assert names >= {"warped.nii.gz", "warped_labels.nii.gz", "field.nii.gz", "report.png"}
    assert names >= {"affine.mat", "residual_field.nii.gz", "report.json"}
    assert [p.name for p in folder.parent.iterdir()] == ["b"]
    assert Registration.load(folder).settings["seed"] == 3
    with PIL.Image.open(folder / "report.png") as picture:
        assert min(picture.size) > 300


def test_the_report_says_what_was_run(files, words, folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["command"][:-1] == ["reglib", *words, "--out", str(folder), "--seed", "3"]
    assert report["reglib"] == reglib.__version__
    assert report["seed"] == 3
    assert report["environment"]["threads"] == torch.get_num_threads()
    assert report["environment"]["device"] == "cpu"
    assert [m["name"] for m in report["method"]] == ["Affine", "Displacement"]
    assert report["method"][1]["settings"]["steps"] == 8
    assert report["method"][1]["settings"]["levels"] == [6, 3]
    assert report["timings"].keys() == {"read", "register"}
    assert set(report["files"]) == set(files)
    for name, path in files.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert report["files"][name] == {"name": str(path), "sha256": digest}


def test_what_the_report_says_repeats_the_run(folder, tmp_path):
    """The same words on the same machine give the same bits."""
    again = json.loads((folder / "report.json").read_text())["command"][1:]
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert main(again) == 0
    for name in ("warped.nii.gz", "field.nii.gz", "warped_labels.nii.gz", "affine.mat"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_report_measures_the_labels(files, folder):
    """Dice against NumPy, and better than before."""
    measures = json.loads((folder / "report.json").read_text())["evaluation"]
    warped, fixed = values_of(folder / "warped_labels.nii.gz"), values_of(files["fixed_labels"])
    for label in (1, 2):
        a, b = warped == label, fixed == label
        wanted = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert measures["labels"][str(label)]["dice"] == pytest.approx(wanted, abs=1e-6)
    assert measures["mean"]["dice"] > measures["mean_dice_before"] + 0.05
    assert "surface-distance" in measures["definitions"]["hd95"]


def test_apply_repeats_what_register_wrote(files, folder, tmp_path, capsys):
    """From the folder and from the field alone, which holds the same map in single precision."""
    for source in (folder, folder / "field.nii.gz"):
        out = tmp_path / "w.nii.gz"
        assert run(capsys, "apply", source, files["moving"], "--out", out) == (0, "", "")
        apart = abs(values_of(out).astype(int) - values_of(folder / "warped.nii.gz"))
        assert values_of(out).dtype == np.int16
        assert apart.max() <= 1, "rounded to the other side at most"
        assert (apart > 0).mean() < 0.01
        labels = [source, files["moving_labels"], "--labels", "--out", out]
        assert run(capsys, "apply", *labels)[0] == 0
        same = values_of(out) == values_of(folder / "warped_labels.nii.gz")
        assert same.mean() > 0.999
        np.testing.assert_allclose(nib.load(out).affine, nib.load(files["fixed"]).affine, atol=1e-5)


def test_labels_may_be_resampled_linearly(files, folder, tmp_path, capsys):
    out = tmp_path / "w.nii.gz"
    linear = [files["moving_labels"], "--labels", "--label-mode", "linear", "--out", out]
    assert run(capsys, "apply", folder, *linear)[0] == 0
    labels = Image(
        torch.from_numpy(values_of(files["moving_labels"]).astype(np.int64))[None, None],
        torch.from_numpy(nib.load(files["moving_labels"]).affine),
    )
    wanted = Registration.load(folder).apply_labels(labels, mode="linear")
    np.testing.assert_array_equal(values_of(out), wanted.tensor[0, 0].numpy())
    assert (values_of(out) != values_of(folder / "warped_labels.nii.gz")).any()


def test_an_image_of_its_own_grid_is_carried_along(files, folder, tmp_path, capsys):
    """The moving image shifted into another array: same place, same result."""
    nifti = nib.load(files["moving"])
    cropped = nifti.slicer[2:, 1:, :-1]
    nib.save(cropped, tmp_path / "cropped.nii.gz")
    out = tmp_path / "w.nii.gz"
    given = (tmp_path / "cropped.nii.gz", "--padding", "zeros", "--out", out)
    assert run(capsys, "apply", folder, *given)[0] == 0
    middle = (slice(8, 12),) * 3
    wanted = values_of(folder / "warped.nii.gz")[middle].astype(int)
    assert abs(values_of(out)[middle] - wanted).max() <= 1


def test_an_inverse_field_carries_the_fixed_image_back(files, tmp_path, capsys):
    """An affine map has an inverse, and ITK applies it as it applies the field."""
    given = (files["moving"], files["fixed"], "--method", "affine", "--set", "steps=20")
    assert run(capsys, "register", *given, "--out", tmp_path / "r")[0] == 0
    field = tmp_path / "r" / "inverse_field.nii.gz"
    code, _, _ = run(capsys, "apply", field, files["fixed"], "--out", tmp_path / "w.nii.gz")
    assert code == 0
    fixed = sitk.ReadImage(str(files["fixed"]), sitk.sitkFloat64)
    wanted = itk_resampled(fixed, field, sitk.sitkLinear)
    inside = wanted >= 0
    np.testing.assert_allclose(values_of(tmp_path / "w.nii.gz")[inside], wanted[inside], atol=2e-4)


@pytest.mark.parametrize("method", ["rigid", "affine"])
def test_rigid_and_affine_find_their_kind(files, tmp_path, capsys, method):
    """Volumes keep their size under a rigid map; the affine part comes alone, without a field."""
    out = tmp_path / method
    words = ("--method", method, "--transform", method, "--similarity", "mse", "--out", out)
    code, text, _ = run(capsys, "register", files["moving"], files["fixed"], *words)
    assert code == 0
    assert "folding 0.00%" in text
    loaded = Registration.load(out)
    assert not loaded.field.any()
    linear = loaded.affine[0, :3, :3]
    rigid = torch.allclose(linear @ linear.T, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert rigid == (method == "rigid")
    assert (
        json.loads((out / "report.json").read_text())["method"][0]["settings"]["similarity"]
        == "mse"
    )


@pytest.mark.parametrize(("method", "similarity"), [("svf", "mind"), ("bspline", "mi")])
def test_images_of_different_kinds(files, tmp_path, capsys, method, similarity):
    """What is dark in one and bright in the other still comes together, from the start on."""
    image = nib.load(files["moving"])
    dark = save(tmp_path / "dark.nii.gz", 1000 - values_of(files["moving"]), image.affine, np.int16)
    out = tmp_path / "out"
    labels = [f"--{k}-labels={files[f'{k}_labels']}" for k in ("fixed", "moving")]
    quick = ["--method", method, "--similarity", similarity, "--set", "steps=15", "--out", out]
    code, _, _ = run(capsys, "register", dark, files["fixed"], *labels, *quick)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["method"][0]["settings"]["similarity"] == "mutual_information"
    dice = report["evaluation"]
    assert dice["mean"]["dice"] > dice["mean_dice_before"] + 0.05


# --- Pictures -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """A moving and a fixed digit, uint8."""
    images, labels = mnist("test")
    found = (images[labels == 3][:2, 0] * 255).round().to(torch.uint8)
    return found[0].numpy(), found[1].numpy()


def test_pictures_become_a_picture(digits, tmp_path, capsys):
    """The network's own answer, rounded; ITK reads the same geometry and gets the same picture."""
    for name, pixels in zip(("m.png", "f.png"), digits, strict=True):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    words = ("--method", "georeg", "--transform", "deformable", "--out", tmp_path / "r")
    code, out, err = run(capsys, "register", tmp_path / "m.png", tmp_path / "f.png", *words)
    assert (code, err) == (0, "")
    assert f"Written: {tmp_path / 'r'}" in out
    assert "The network was trained on MNIST, 3,500 digits" in out
    warped = np.asarray(PIL.Image.open(tmp_path / "r" / "warped.png"))
    moving, fixed = (torch.from_numpy(p)[None, None].float() for p in digits)
    wanted = register(moving, fixed, load_pretrained()).warped[0, 0].numpy()
    assert warped.dtype == np.uint8
    # The two ways of the same map meet in single precision, before rounding.
    assert abs(warped - wanted).max() <= 0.5 + 0.02
    field = sitk.ReadImage(str(tmp_path / "r" / "field.nii.gz"), sitk.sitkVectorFloat64)
    itk = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "m.png"), sitk.sitkFloat64),
        sitk.ReadImage(str(tmp_path / "f.png")),
        sitk.DisplacementFieldTransform(field),
    )
    inner = (slice(2, -2),) * 2
    apart = abs(sitk.GetArrayFromImage(itk) - warped)[inner]
    assert apart.max() <= 0.5 + 0.02


def test_a_network_may_start_from_an_affine_map(digits, tmp_path, capsys):
    for name, pixels in zip(("m.png", "f.png"), digits, strict=True):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    words = ("--method", "georeg", "--start", "affine", "--out", tmp_path / "r")
    assert run(capsys, "register", tmp_path / "m.png", tmp_path / "f.png", *words)[0] == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [m["name"] for m in report["method"]] == ["Affine", "georeg"]
    assert report["options"]["start"] == "affine"


def test_colours_are_registered_by_their_brightness_and_kept(digits, tmp_path, capsys):
    """ITU-R BT.601, as Pillow: a grey twin gives the same field, to the rounding of the grey."""
    moving, fixed = digits
    colours = np.stack([moving, moving // 2, 255 - moving], -1)
    PIL.Image.fromarray(colours).save(tmp_path / "colour.png")
    grey = colours @ np.array([0.299, 0.587, 0.114])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])[[1, 0, 2, 3]]
    save(tmp_path / "grey.nii.gz", grey, affine, np.float32)
    PIL.Image.fromarray(fixed).save(tmp_path / "f.png")
    fields = {}
    for name in ("colour.png", "grey.nii.gz"):
        out = tmp_path / f"r {name}"
        words = (tmp_path / name, tmp_path / "f.png", "--method", "georeg", "--out", out)
        code, _, err = run(capsys, "register", *words)
        assert code == 0
        assert ("brightness of its colours" in err) == (name == "colour.png")
        fields[name] = read_field(out / "field.nii.gz")[0]
    torch.testing.assert_close(fields["colour.png"], fields["grey.nii.gz"], atol=1e-3, rtol=0)
    out = tmp_path / "r colour.png"
    warped = np.asarray(PIL.Image.open(out / "warped.png"))
    assert warped.shape == (28, 28, 3)
    # Each colour on its own is the same map of a grey picture.
    PIL.Image.fromarray(colours[..., 2]).save(tmp_path / "blue.png")
    assert run(capsys, "apply", out, tmp_path / "blue.png", "--out", tmp_path / "b.png")[0] == 0
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "b.png")), warped[..., 2])
    # A real image keeps its values on the grid of a picture.
    assert (tmp_path / "r grey.nii.gz" / "warped.tif").exists()
    assert "brightness" in json.loads((out / "report.json").read_text())["notes"][0]


@pytest.mark.parametrize(
    ("suffix", "dtype", "dots", "wanted"),
    [
        (".png", np.uint16, None, "warped.png"),
        (".jpg", np.uint8, (254, 254), "warped.tif"),  # 0.1 mm, which a PNG cannot say
        (".tif", np.float32, None, "warped.tif"),
    ],
)
def test_the_warped_picture_keeps_type_and_geometry(
    digits, tmp_path, capsys, suffix, dtype, dots, wanted
):
    paths = [tmp_path / f"{name}{suffix}" for name in ("m", "f")]
    for path, pixels in zip(paths, digits, strict=True):
        scale = 0.5 if dtype is np.float32 else 200 if dtype is np.uint16 else 1
        picture = PIL.Image.fromarray((pixels * float(scale)).astype(dtype))
        picture.save(path, **({"dpi": dots} if dots else {}))
    code, _, err = run(capsys, "register", *paths, "--method", "georeg", "--out", tmp_path / "r")
    assert (code, err) == (0, "")
    warped = read_image(tmp_path / "r" / wanted, dtype=None)
    assert warped.tensor.numpy().dtype == dtype
    torch.testing.assert_close(warped.affine, read_image(paths[1]).affine)


# --- Evaluate -------------------------------------------------------------------------------


def test_evaluate_says_what_the_report_says(files, folder, capsys):
    labels = (
        "--warped-labels",
        folder / "warped_labels.nii.gz",
        "--fixed-labels",
        files["fixed_labels"],
    )
    code, out, _ = run(capsys, "evaluate", *labels, "--field", folder, "--json")
    assert code == 0
    whole = json.loads((folder / "report.json").read_text())
    report = whole["evaluation"]
    found = json.loads(out)
    for name in ("labels", "mean", "unit"):
        assert found[name] == report[name], name
    # The field went through mm and single precision; no more than a voxel may tip over.
    assert found["folding"] == pytest.approx(whole["folding"], abs=1e-3)
    assert found["ndv"] == pytest.approx(whole["ndv"], abs=1e-5)
    assert found["definitions"].keys() == {"dice", "hd95", "assd", "folding", "ndv"}
    code, out, _ = run(capsys, "evaluate", *labels, "--labels", "2")
    assert code == 0
    assert re.search(r"label +Dice +HD95 \[mm\] +ASSD \[mm\]", out)
    assert "surface-distance" in out
    [row] = re.findall(r"^ +0 +(\d) +([\d.]+) ", out, re.MULTILINE)
    assert row == ("2", f"{report['labels']['2']['dice']:.4g}")


def test_what_is_not_defined_is_null(tmp_path, capsys):
    """A label in one map only has no surface in the other: infinitely far."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for name, label in (("a.nii", 1), ("b.nii", 2)):
        labels = np.zeros((4, 5, 6))
        labels[1:3, 1:3, 1:3] = label
        save(tmp_path / name, labels, affine, np.uint8)
    given = ("--warped-labels", tmp_path / "a.nii", "--fixed-labels", tmp_path / "b.nii", "--json")
    code, out, _ = run(capsys, "evaluate", *given)
    assert code == 0
    found = json.loads(out)
    assert found["labels"]["1"] == {"dice": 0.0, "hd95": None, "assd": None}
    assert found["mean"]["hd95"] is None


@pytest.mark.parametrize("space", ["ras", "lps", "voxel"])
def test_tre_is_the_mean_distance_in_mm(folder, tmp_path, capsys, space):
    """By hand, from the library's own points, which are tested against ITK above."""
    loaded = Registration.load(folder)
    generator = torch.Generator().manual_seed(1)
    p, q = 4 + 8 * torch.rand(2, 1, 5, 3, generator=generator, dtype=torch.float64)

    def place(points, affine):
        return points @ affine[:3, :3].T + affine[:3, 3]

    mapped = place(loaded.apply_points(p), loaded.moving_affine)
    wanted = (mapped - place(q, loaded.moving_affine)).norm(dim=2).mean()
    signs = torch.tensor([-1.0, -1.0, 1.0] if space == "lps" else [1.0, 1.0, 1.0])
    for name, points, affine in (
        ("p.csv", p, loaded.fixed_affine),
        ("q.csv", q, loaded.moving_affine),
    ):
        points = points if space == "voxel" else place(points, affine) * signs
        header = {"ras": "R,A,S", "lps": "l,p,s", "voxel": "i,j,k"}[space]
        rows = [",".join(map(repr, row)) for row in points[0].tolist()]
        (tmp_path / name).write_text("\n".join([header, *rows]), encoding="utf-8-sig")
    given = ("--fixed-points", tmp_path / "p.csv", "--moving-points", tmp_path / "q.csv")
    code, out, _ = run(capsys, "evaluate", "--field", folder, *given, "--space", space, "--json")
    assert code == 0
    assert json.loads(out)["unit"] == "mm"
    assert json.loads(out)["tre"] == pytest.approx(float(wanted), abs=1e-3)
    if space != "voxel":  # without a transform: as far as the points are apart
        apart = (place(p, loaded.fixed_affine) - place(q, loaded.moving_affine)).norm(dim=2).mean()
        code, out, _ = run(capsys, "evaluate", *given, "--space", space, "--json")
        assert code == 0
        assert json.loads(out)["tre"] == pytest.approx(float(apart), abs=1e-3)


def test_evaluate_judges_a_field_of_any_program(tmp_path, capsys):
    """A fold of one column in eight, drawn by hand."""
    u = torch.zeros(1, 2, 6, 8)
    u[0, 1, :, 4] = -3
    write_field(tmp_path / "u.nii.gz", u, torch.eye(3, dtype=torch.float64))
    code, out, _ = run(capsys, "evaluate", "--field", tmp_path / "u.nii.gz", "--json")
    assert code == 0
    # Central differences fold where the fall of 3 voxels comes within two: before it.
    assert json.loads(out)["folding"] == pytest.approx(1 / 8)
    assert json.loads(out)["ndv"] > 0


def test_evaluate_looks_at_a_field_within_a_mask(tmp_path, capsys):
    """The fold of a column of 6 x 8 voxels, seen from 3 columns with it and from 3 without."""
    u = torch.zeros(1, 2, 6, 8)
    u[0, 1, :, 4] = -3
    eye = torch.eye(3, dtype=torch.float64)
    write_field(tmp_path / "u.nii.gz", u, eye)
    for first, wanted in ((2, 1 / 3), (5, 0)):
        mask = torch.zeros(1, 1, 6, 8)
        mask[..., first : first + 3] = 0.5
        write_image(tmp_path / "mask.nii", Image(mask, eye))
        given = ("--field", tmp_path / "u.nii.gz", "--mask", tmp_path / "mask.nii")
        code, out, _ = run(capsys, "evaluate", *given, "--json")
        assert code == 0
        assert json.loads(out)["folding"] == pytest.approx(wanted)
        assert (json.loads(out)["ndv"] > 0) == (wanted > 0)
    write_image(tmp_path / "mask.nii", Image(mask[..., 1:], eye))
    code, _, err = run(capsys, "evaluate", *given)
    assert code == 1
    assert re.search(r"u\.nii\.gz, .*mask\.nii: wanted the same grid", err)


# --- Info and fetch -------------------------------------------------------------------------


def test_info_of_images(files, tmp_path, capsys):
    nifti = nib.load(files["moving"])
    code, out, err = run(capsys, "info", files["moving"], "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["shape"] == list(MOVING_SHAPE)
    np.testing.assert_allclose(found["spacing"], nib.affines.voxel_sizes(nifti.affine), atol=1e-5)
    assert found["orientation"] == "".join(nib.aff2axcodes(nifti.affine))
    assert found["type"] == "int16"
    assert found["range"] == [
        int(values_of(files["moving"]).min()),
        values_of(files["moving"]).max(),
    ]
    np.testing.assert_allclose(found["affine"], nifti.affine, atol=1e-5)
    code, out, _ = run(capsys, "info", files["moving"])
    assert code == 0
    assert re.search(r"^shape +24  19  21$", out, re.MULTILINE)
    assert re.search(rf"^orientation +{found['orientation']}$", out, re.MULTILINE)

    values = np.array([[0.5, np.nan], [np.inf, -1]], np.float32)
    save(tmp_path / "n.nii", values, np.eye(4), np.float32)
    found = json.loads(run(capsys, "info", tmp_path / "n.nii", "--json")[1])
    assert (found["nonfinite"], found["range"]) == (2, [-1.0, 0.5])
    save(tmp_path / "n.nii", np.full((2, 2), np.nan), np.eye(4), np.float32)
    assert json.loads(run(capsys, "info", tmp_path / "n.nii", "--json")[1])["range"] is None


def test_info_of_weights(capsys):
    """What the card says, as it is and in words."""
    path = Path(georeg.__file__).parent / georeg.WEIGHTS.format("brain_volumes")
    state, card = load_weights(path)
    code, out, _ = run(capsys, "info", path, "--json")
    assert code == 0
    found = json.loads(out)
    assert card.items() <= found.items()
    assert found["numbers"] == sum(x.numel() for x in state.values())
    assert found["type"] == "float16"
    code, out, _ = run(capsys, "info", path)
    assert code == 0
    assert re.search(r"trained_on +IXI, 100 brains", out)


def test_info_of_fields_and_folders(folder, capsys):
    code, out, _ = run(capsys, "info", folder / "field.nii.gz", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["kind"] == "displacement field"
    vectors = np.squeeze(values_of(folder / "field.nii.gz"))
    length = np.linalg.norm(vectors, axis=-1)
    assert found["largest length (mm)"] == pytest.approx(length.max(), rel=1e-5)
    assert found["mean length (mm)"] == pytest.approx(length.mean(), rel=1e-5)
    code, out, _ = run(capsys, "info", folder)
    assert code == 0
    assert re.search(r"^method +Affine, then Displacement$", out, re.MULTILINE)
    assert re.search(r"^interrupted +no$", out, re.MULTILINE)
    found = json.loads(run(capsys, "info", folder, "--json")[1])
    assert found["fixed shape"] == list(FIXED_SHAPE)
    assert found["moving shape"] == list(MOVING_SHAPE)


def test_fetch_prints_the_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "hippocampus").mkdir()
    monkeypatch.setenv("REGLIB_DATA", str(tmp_path))
    assert run(capsys, "fetch", "hippocampus") == (0, f"{tmp_path / 'hippocampus'}\n", "")
    code, out, _ = run(capsys, "fetch", "--list")
    assert code == 0
    assert re.search(r"^mnist +\w", out, re.MULTILINE)
    code, _, err = run(capsys, "fetch", "hipocampus")
    assert code == 2
    assert "hippocampus" in err


# --- Help, exit codes, one sentence ---------------------------------------------------------


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"reglib {reglib.__version__}\n", "")


def test_a_reader_that_has_seen_enough_is_no_failure(files):
    reglib_program = Path(sys.executable).with_name("reglib")
    command = f"{reglib_program} info {files['fixed']} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_python_m_is_the_same_program():
    command = [sys.executable, "-m", "reglib", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"reglib {reglib.__version__}\n")


def test_without_a_command_it_shows_its_help(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert out == run(capsys, "--help")[1]
    for command in ("register", "apply", "evaluate", "info", "fetch"):
        assert re.search(rf"^  {command} +\w.*\.$", out, re.MULTILINE), command
        code, text, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"Usage: reglib {command}" in text


def test_help_does_not_wait_for_torch():
    code = "import sys; from reglib.cli import main; main(['register', '--help']); "
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules; print('light')"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("light\n"), done.stderr


def test_exit_codes_of_the_process(files, tmp_path):
    assert call("info", files["fixed"]).returncode == 0
    failed = call("info", tmp_path / "nothing.nii")
    assert failed.returncode == 1
    assert failed.stderr == f"Error: {tmp_path / 'nothing.nii'}: No such file or directory\n"
    assert failed.stdout == ""
    misuse = call("info", "--nonsense")
    assert misuse.returncode == 2
    assert "Usage: reglib info" in misuse.stderr


MISUSE = {
    "unknown command": (["nonsense"], "nonsense"),
    "unknown option": (["--nonsense"], "--nonsense"),
    "no method": (["register", "m.nii", "f.nii", "--out", "o"], "--method"),
    "unknown method": (["register", "m.nii", "f.nii", "--out", "o", "--method", "magic"], "magic"),
    "transform": (["R", "--method", "rigid", "--transform", "deformable"], "displacement"),
    "start": (["R", "--method", "rigid", "--start", "affine"], "--start"),
    "start of affine": (["R", "--method", "affine", "--start", "affine"], "none or rigid"),
    "similarity": (["R", "--method", "georeg", "--similarity", "ncc"], "trained already"),
    "trained": (["R", "--method", "georeg", "--set", "steps=3"], "trained already"),
    "setting": (["R", "--method", "rigid", "--set", "stpes=3"], "steps"),
    "no setting": (["R", "--method", "rigid", "--set", "steps"], "NAME=VALUE"),
    "wrong setting": (["R", "--method", "rigid", "--set", "steps=many"], "steps: wanted"),
    "wrong levels": (["R", "--method", "rigid", "--set", "levels=4,-2"], "levels: wanted"),
    "function": (["R", "--method", "rigid", "--set", "similarity=ncc"], "similarity: wanted"),
    "labels": (["R", "--method", "rigid", "--fixed-labels", "l.nii"], "--moving-labels"),
    "seed": (["R", "--method", "rigid", "--seed", "x"], "--seed"),
    "mask of no field": (
        ["evaluate", "--warped-labels", "a.nii", "--fixed-labels", "b.nii", "--mask", "m.nii"],
        "--field",
    ),
    "nothing to apply to": (["apply", "d", "--out", "o.nii"], "neither"),
    "both": (["apply", "d", "i.nii", "--points", "p.csv", "--out", "o.csv"], "both"),
    "space unsaid": (["P", "--from", "fixed", "--out", "o.csv"], "no default is safe"),
    "side unsaid": (["P", "--space", "ras", "--out", "o.csv"], "no default is safe"),
    "no table": (["P", "--space", "ras", "--from", "fixed", "--out", "o.nii"], ".csv"),
    "points as labels": (
        ["P", "--space", "ras", "--from", "fixed", "--labels", "--out", "o.csv"],
        "--labels",
    ),
    "voxels of a field": (["P", "--space", "voxel", "--from", "fixed", "--out", "o.csv"], "ras"),
    "space of an image": (["apply", "d", "i.nii", "--space", "ras", "--out", "o.nii"], "--space"),
    "labels with loss": (["apply", "d", "l.png", "--labels", "--out", "o.jpg"], "JPEG"),
    "suffix": (["apply", "d", "i.nii", "--out", "o.dcm"], ".nii.gz"),
    "nothing to evaluate": (["evaluate"], "got none"),
    "one of two labels": (["evaluate", "--fixed-labels", "b.nii"], "together"),
    "one of two points": (["evaluate", "--fixed-points", "p.csv"], "together"),
    "space of landmarks": (
        ["evaluate", "--fixed-points", "p.csv", "--moving-points", "q.csv"],
        "--space",
    ),
    "voxels of landmarks": (
        ["evaluate", "--fixed-points", "p", "--moving-points", "q", "--space", "voxel"],
        "folder",
    ),
    "labels of what": (["evaluate", "--field", "d", "--labels", "1"], "--labels"),
    "no numbers": (
        ["evaluate", "--warped-labels", "a", "--fixed-labels", "b", "--labels", "1,x"],
        "commas",
    ),
    "no data set": (["fetch"], "--list"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told_before_anything_is_read(name, tmp_path, capsys, monkeypatch):
    """None of these files exists."""
    monkeypatch.chdir(tmp_path)
    arguments, hint = MISUSE[name]
    shorthand = {"R": ["register", "m.nii", "f.nii", "--out", "o"]}
    shorthand["P"] = ["apply", "u.nii.gz", "--points", "p.csv"]
    arguments = [*shorthand.get(arguments[0], arguments[:1]), *arguments[1:]]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert hint in err
    assert err.startswith("Usage: reglib")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def broken_files(folder):
    """Files that cannot be registered, by name, with what is said about them."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (8, 9, 7))
    good = save(folder / "good.nii.gz", values, np.eye(4), np.float32)
    (folder / "truncated.nii.gz").write_bytes(good.read_bytes()[:-200])
    nib.save(nib.load(good), folder / "whole.nii")
    (folder / "cut.nii").write_bytes((folder / "whole.nii").read_bytes()[:-50])
    (folder / "text.nii").write_text("this is no image, but it is longer than a header" * 20)
    (folder / "text.png").write_text("this is no picture")
    save(folder / "four.nii", rng.uniform(0, 1, (4, 5, 6, 3)), np.eye(4), np.float32)
    values[2, 3, 4] = np.nan
    save(folder / "nan.nii.gz", values, np.eye(4), np.float32)
    save(folder / "empty.nii", np.zeros((0, 5, 6)), np.eye(4), np.float32)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    flat = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), affine)
    flat.header["sform_code"], flat.header["srow_z"] = 1, (1, 0, 0, 0)
    content = bytearray(flat.to_bytes())
    content[312:328] = np.array([1, 0, 0, 0], "<f4").tobytes()  # srow_z = srow_x
    (folder / "singular.nii").write_bytes(content)
    save(folder / "plane.nii", rng.uniform(0, 1, (8, 9)), np.eye(4), np.float32)
    save(folder / "column.nii", rng.uniform(0, 1, (8, 1)), np.eye(4), np.float32)
    save(folder / "flat.nii", np.ones((8, 9)), np.eye(4), np.uint8)
    (folder / "other.xyz").write_text("")
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    save(folder / "sheared.nii", rng.uniform(0, 1, (8, 9, 7)), sheared, np.float32)
    save(folder / "fractions.nii", rng.uniform(0, 1, (8, 9, 7)), np.eye(4), np.float32)
    save(folder / "labels.nii", np.ones((8, 9, 7)), np.eye(4), np.uint8)
    save(folder / "aside.nii", np.ones((8, 9, 7)), np.diag([1, 1, 1.5, 1]), np.uint8)
    save(folder / "small.nii", np.ones((8, 9, 6)), np.eye(4), np.uint8)
    save(folder / "negative.nii", -np.ones((8, 9, 7)), np.eye(4), np.int16)
    (folder / "results").mkdir()
    (folder / "results" / "report.json").write_text("{}")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return broken_files(tmp_path_factory.mktemp("broken"))


LABELS = ["--moving-labels", "labels.nii"]
FAILURES = {
    "missing": (["nothing.nii", "good.nii.gz"], "nothing.nii: No such file"),
    "a folder": (["results", "good.nii.gz"], "results"),
    "truncated gzip": (["truncated.nii.gz", "good.nii.gz"], "truncated.nii.gz: .*complete gzip"),
    "truncated": (["good.nii.gz", "cut.nii"], "cut.nii: .*truncated"),
    "no NIfTI": (["text.nii", "good.nii.gz"], "text.nii: .*NIfTI"),
    "no picture": (["text.png", "good.nii.gz"], "text.png: "),
    "unknown format": (["other.xyz", "good.nii.gz"], "other.xyz: .*ends with"),
    "4-D": (["four.nii", "good.nii.gz"], "four.nii: .*single volume"),
    "not finite": (["nan.nii.gz", "good.nii.gz"], "nan.nii.gz: .*1 NaN"),
    "empty": (["good.nii.gz", "empty.nii"], "empty.nii: .*"),
    "singular": (["singular.nii", "good.nii.gz"], "singular.nii: .*singular"),
    "nothing to be seen": (["good.nii.gz", "labels.nii"], "FIXED: wanted an image with contrast"),
    "a single column": (["column.nii", "column.nii"], "last axis"),
    "plane and volume": (["plane.nii", "good.nii.gz"], "both plane or both volumes"),
    "sheared": (["good.nii.gz", "sheared.nii"], "FIXED: wanted axes at right angles"),
    "fractions": (
        ["good.nii.gz", "good.nii.gz", "--moving-labels", "fractions.nii"],
        "fractions.nii: wanted whole numbers",
    ),
    "plane labels": (
        ["good.nii.gz", "good.nii.gz", "--moving-labels", "flat.nii"],
        "--moving-labels: wanted 3 axes",
    ),
    "labels aside": (
        ["good.nii.gz", "good.nii.gz", *LABELS, "--fixed-labels", "aside.nii"],
        "--fixed-labels: wanted the same grid",
    ),
    "mask of another size": (
        ["good.nii.gz", "good.nii.gz", "--moving-mask", "small.nii"],
        "--moving-mask: wanted the same grid",
    ),
    "negative mask": (
        ["good.nii.gz", "good.nii.gz", "--fixed-mask", "negative.nii"],
        "fixed_mask: wanted weights",
    ),
    "network for planes": (["good.nii.gz", "good.nii.gz", "--method", "georeg"], "2 axes"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_sentence_and_leaves_nothing(name, broken, capsys, monkeypatch):
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    arguments, hint = FAILURES[name]
    method = [] if "--method" in arguments else ["--method", "affine"]
    code, out, err = run(capsys, "register", *arguments, *method, "--out", "out/deep")
    assert code == 1
    assert out == ""
    assert re.fullmatch(rf"Error: .*({hint}).*\n", err), err
    assert sorted(broken.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "options", "hint"),
    [
        ("good.nii.gz", [], "got a file"),
        ("good.nii.gz/below", [], "Not a directory"),
        ("results", [], "--force"),
        ("mine", [], "--force"),
        ("mine", ["--force"], "thesis.txt"),
    ],
)
def test_nothing_is_replaced_unasked(out, options, hint, broken, capsys, monkeypatch):
    monkeypatch.chdir(broken)
    before = {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    words = ("good.nii.gz", "good.nii.gz", "--method", "rigid", "--out", out, *options)
    code, _, err = run(capsys, "register", *words)
    assert code == 1
    assert re.fullmatch(rf"Error: {out}.*{hint}.*\n", err), err
    assert {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()} == before


def test_force_replaces_results_only_when_there_are_new_ones(digits, tmp_path, capsys):
    for name, pixels in zip(("m.png", "f.png"), digits, strict=True):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    pair, out = (tmp_path / "m.png", tmp_path / "f.png"), tmp_path / "r"
    out.mkdir()  # an empty folder is as good as none
    words = ("--method", "georeg", "--out", out)
    assert run(capsys, "register", *pair, *words)[0] == 0
    before = (out / "field.nii.gz").read_bytes()
    missing = run(capsys, "register", tmp_path / "no.png", pair[1], *words, "--force")
    assert missing[0] == 1
    assert (out / "field.nii.gz").read_bytes() == before
    assert run(capsys, "register", *reversed(pair), *words, "--force")[0] == 0
    assert (out / "field.nii.gz").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.png", "m.png", "r"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["apply", "nothing", "good.nii.gz", "--out", "o.nii"], "nothing: .*"),
        (["apply", "good.nii.gz", "good.nii.gz", "--out", "o.nii"], "displacement field"),
        (["apply", "results", "good.nii.gz", "--out", "o.nii"], "report"),
        (["apply", "FIELD", "plane.nii", "--out", "o.nii"], "3 spatial axes"),
        (["apply", "FIELD", "nan.nii.gz", "--out", "o.nii"], "1 NaN.*--nonfinite 0 would"),
        (["apply", "FIELD", "fractions.nii", "--labels", "--out", "o.nii"], "whole numbers"),
        (["apply", "FIELD", "good.nii.gz", "--out", "no/o.nii"], "no/o.nii: No such file"),
        (["apply", "FIELD", "good.nii.gz", "--out", "o.png"], "PNG"),
        (["info", "four.nii"], "four.nii: .*single volume"),
        (["info", "text.png"], "text.png: "),
        (["evaluate", "--warped-labels", "labels.nii", "--fixed-labels", "aside.nii"],
         "labels.nii, aside.nii: wanted the same grid, got corners"),
        (["evaluate", "--warped-labels", "labels.nii", "--fixed-labels", "small.nii"],
         "same grid, got shapes"),
        (["evaluate", "--warped-labels", "labels.nii", "--fixed-labels", "labels.nii",
          "--labels", "1,4"], r"--labels: .*\[4\]"),
        (["evaluate", "--warped-labels", "small.nii", "--fixed-labels", "small.nii",
          "--field", "FIELD"], "same grid"),
    ],
)  # fmt: skip
def test_other_commands_fail_in_a_sentence(arguments, hint, broken, folder, capsys, monkeypatch):
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    arguments = [folder / "field.nii.gz" if a == "FIELD" else a for a in arguments]
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out == ""
    assert re.fullmatch(rf"Error: .*{hint}.*\n", err), err
    assert sorted(broken.rglob("*")) == before


def test_voxels_that_are_not_finite_are_replaced_on_request(broken, folder, tmp_path, capsys):
    """As if the file had held the value."""
    values = values_of(broken / "nan.nii.gz").copy()
    assert np.isnan(values).sum() == 1
    save(tmp_path / "n.nii.gz", np.nan_to_num(values, nan=0.25), np.eye(4), np.float32)
    given = (folder, broken / "nan.nii.gz", "--nonfinite", "0.25", "--out", tmp_path / "a.nii")
    assert run(capsys, "apply", *given)[0] == 0
    assert run(capsys, "apply", folder, tmp_path / "n.nii.gz", "--out", tmp_path / "b.nii")[0] == 0
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


TABLES = {
    "empty": ("", "empty file"),
    "other columns": ("a,b,c\n1,2,3\n", "x,y,z"),
    "another space": ("l,p,s\n1,2,3\n", "r,a,s or x,y,z"),
    "twice": ("x,x,y,z\n1,1,2,3\n", "x,y,z"),
    "no points": ("x,y,z\n", "one point or more"),
    "a word": ("x,y,z\n1,2,3\n\n1,two,3\n", "line 4: wanted numbers, got 1,two,3"),
    "not finite": ("x,y,z\n1,nan,3\n", "line 2: wanted numbers"),
    "ragged": ("x,y,z\n1,2\n", "line 2: wanted 3 cells"),
    "semicolons": ("x;y;z\n1;2;3\n", "x;y;z"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_are_none(name, folder, tmp_path, capsys):
    text, hint = TABLES[name]
    (tmp_path / "p.csv").write_text(text)
    given = ("--points", tmp_path / "p.csv", "--space", "ras", "--from", "fixed")
    code, _, err = run(capsys, "apply", folder, *given, "--out", tmp_path / "q.csv")
    assert code == 1
    assert re.fullmatch(rf"Error: .*p\.csv.*{re.escape(hint)}.*\n", err), err
    assert not (tmp_path / "q.csv").exists()


def test_points_come_back_from_a_fold(tmp_path, capsys):
    """A bounded displacement reaches every place, once or more, so points are always found.

    Within the thousandth of a voxel to which they are solved for; a voxel is 2 mm.
    """
    u = torch.zeros(1, 3, 9, 6, 7)
    u[0, 0] = 3 * torch.sin(torch.arange(9.0)).view(9, 1, 1)
    write_field(tmp_path / "u.nii.gz", u, torch.diag(torch.tensor([2.0, 2, 2, 1])).double())
    (tmp_path / "p.csv").write_text("x,y,z\n8.5,2,3\n3.25,4,5\n-40,90,1\n")
    steps = {"moving": ("p.csv", "q.csv"), "fixed": ("q.csv", "r.csv")}
    for side, (source, target) in steps.items():
        given = ("--points", tmp_path / source, "--space", "ras", "--from", side)
        out = ("--out", tmp_path / target)
        code, text, said = run(capsys, "apply", tmp_path / "u.nii.gz", *given, *out)
        assert (code, text) == (0, "")
        assert ("several origins" in said) == (side == "moving")
    given, back = (
        np.loadtxt(tmp_path / name, delimiter=",", skiprows=1) for name in ("p.csv", "r.csv")
    )
    np.testing.assert_allclose(back, given, atol=2e-3)


def test_plane_points_take_two_columns(tmp_path, capsys):
    """ANTs writes z = 0 for plane images; it is carried along."""
    u = torch.zeros(1, 2, 6, 8)
    u[0, 0] = 2
    affine = torch.diag(torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64))
    write_field(tmp_path / "u.nii.gz", u, affine)
    (tmp_path / "p.csv").write_text("x,y,z,t\n1,2,0,0\n")
    given = ("--points", tmp_path / "p.csv", "--space", "ras", "--from", "fixed")
    out = tmp_path / "q.csv"
    assert run(capsys, "apply", tmp_path / "u.nii.gz", *given, "--out", out)[0] == 0
    assert out.read_text() == "x,y,z,t\n7.000000,2.000000,0,0\n"


# --- Devices, debugging, interrupts ---------------------------------------------------------


def test_a_device_that_is_not_there(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = (files["moving"], files["fixed"], "--method", "rigid", "--device", "cuda")
    code, _, err = run(capsys, "register", *words, "--out", tmp_path / "r")
    assert code == 1
    assert re.fullmatch(r"Error: --device: .*\n", err)


def test_debug_shows_the_traceback(tmp_path, capsys):
    plain = run(capsys, "info", tmp_path / "nothing.nii")
    code, _, err = run(capsys, "info", tmp_path / "nothing.nii", "--debug")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith(plain[2])


def test_a_mistake_of_ours_is_said_to_be_one(files, capsys, monkeypatch):
    def fail(*_):
        raise AssertionError("two\nlines")

    monkeypatch.setattr("reglib.cli.looking._file", fail)
    code, _, err = run(capsys, "info", files["fixed"])
    assert code == 1
    assert re.fullmatch(rf"Error: AssertionError: two lines; .*{reglib.REPOSITORY}/issues\n", err)


def test_a_full_disk_leaves_nothing(digits, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "report.json")

    for name, pixels in zip(("m.png", "f.png"), digits, strict=True):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.setattr("reglib.registration.write_bytes", full)
    words = (tmp_path / "m.png", tmp_path / "f.png", "--method", "georeg", "--out", tmp_path / "r")
    code, out, err = run(capsys, "register", *words)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"Error: .*No space left on device.*\n", err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.png", "m.png"]


class Stopped:
    """A method that is interrupted by hand after its second step, or before the first."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, pair):
        for number in range(self.steps):
            u = torch.full_like(pair.field, number + 1.0)
            active = torch.ones(1, dtype=torch.bool)
            yield Iterate("stage", {}, active, lambda u=u: (pair.affine, u))
        raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupt_keeps_the_best_so_far(steps, files, tmp_path, capsys, monkeypatch):
    kind = methods.METHODS[methods.Name.RIGID]._replace(make=lambda *_: Stopped(steps))
    monkeypatch.setitem(methods.METHODS, methods.Name.RIGID, kind)
    words = (files["moving"], files["fixed"], "--method", "rigid", "--out", tmp_path / "r")
    code, _, err = run(capsys, "register", *words)
    assert code == 1
    if steps:
        assert err == f"Interrupted: {tmp_path / 'r'} holds the best state so far.\n"
        loaded = Registration.load(tmp_path / "r")
        assert loaded.interrupted
        torch.testing.assert_close(loaded.field, torch.full_like(loaded.field, 2))
    else:
        assert err == "Interrupted; nothing was written.\n"
        assert list(tmp_path.iterdir()) == []


def test_a_header_that_contradicts_itself_is_noted(files, tmp_path, capsys):
    nifti = nib.load(files["moving"])
    nifti.set_qform(np.diag([2.0, 2, 2, 1]), code=1)
    nib.save(nifti, tmp_path / "m.nii")
    words = (tmp_path / "m.nii", files["fixed"], "--method", "rigid", "--set", "steps=1")
    code, out, err = run(capsys, "register", *words, "--out", tmp_path / "r", "--quiet")
    assert (code, out) == (0, "")
    assert re.fullmatch(r"Warning: .*m\.nii: the sform, the qform .*\n", err)
    assert "qform" in json.loads((tmp_path / "r" / "report.json").read_text())["notes"][0]
    code, _, err = run(capsys, "info", tmp_path / "m.nii")
    assert code == 0
    assert err.startswith("Warning: ")


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_for_terminals(quiet, digits, tmp_path):
    """Standard error is a terminal here, elsewhere in this file it is not."""
    for name, pixels in zip(("m.png", "f.png"), digits, strict=True):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    words = ["register", "m.png", "f.png", "--method", "georeg", "--out", "r"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("reglib")), *words, *["--quiet"] * quiet],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    seen = bytearray()

    def listen():
        try:
            while part := os.read(ours, 1024):
                seen.extend(part)
        except OSError:  # the other end has closed
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    out, _ = process.communicate()
    listener.join()
    os.close(ours)
    assert process.returncode == 0
    assert (b"step" in seen) != quiet
    assert (b"Written" in out) != quiet


def test_random_numbers_of_others_are_left_alone(digits, tmp_path, capsys):
    for name, pixels in zip(("m.png", "f.png"), digits, strict=True):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    before = torch.get_rng_state()
    words = (tmp_path / "m.png", tmp_path / "f.png", "--method", "georeg", "--out", tmp_path / "r")
    assert run(capsys, "register", *words)[0] == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_every_method_has_a_name(tmp_path):
    """What a method finds and starts from are words of the command line."""
    assert set(methods.METHODS) == set(methods.Name)
    weights = tmp_path / "fcn.safetensors"
    fcn.save(fcn.FCN(fcn.PRESETS["paper"]), weights, card={})
    for name in methods.Name:
        kind = methods.METHODS[name]
        settings = (f"weights={weights}",) if name is methods.Name.FCN else ()
        planned = methods.plan(methods.Wish(name, settings=settings), torch.device("cpu"))
        assert kind.start in kind.starts
        assert planned.start is kind.start
        assert len(planned.methods) == 1 + (kind.start is not methods.Start.NONE)
        assert all(map(callable, planned.methods))
        again = dataclasses.is_dataclass(planned.methods[-1])
        assert again == (kind.load is None)  # a network is run as it is


@pytest.mark.parametrize("name", ["displacement", "svf", "bspline"])
def test_the_default_similarity_may_be_said(name):
    """The word means what stands in the help, windows of five voxels and all."""
    wishes = (methods.Wish(methods.Name(name), similarity=s) for s in (None, "lncc", "mse"))
    found = [methods.plan(wish, torch.device("cpu")).methods[-1] for wish in wishes]
    assert found[0] == found[1] != found[2]
    assert found[0].similarity.keywords == {"window": 5}


def test_the_book_shows_the_help_of_every_command(capsys, monkeypatch):
    """Each once, and word by word what the program prints."""
    book = Path(__file__).resolve().parents[1] / "book"
    monkeypatch.syspath_prepend(str(book))
    page = importlib.import_module("sphinx_commands")
    shown = re.findall(r"```\{command-help\} (.+)", (book / "commands.md").read_text())
    assert shown == list(page.commands())
    for words in shown:
        code, out, _ = run(capsys, *words.split(), "--help")
        assert code == 0
        assert page.help_of(words).split() == out.split()
    with pytest.raises(LookupError, match=r"wanted one of register, .*got 'rgister'"):
        page.help_of("rgister")


def test_a_trained_network_is_chosen_by_its_name(tmp_path):
    """The names that the command line knows are those of the package; the first is the default."""
    assert georeg.PRETRAINED == methods.GEOREG_NETWORKS

    def planned(*settings):
        wish = methods.Wish(methods.Name.GEOREG, settings=settings)
        return methods.plan(wish, torch.device("cpu")).methods[-1]

    for name in (None, *georeg.PRETRAINED):
        words = () if name is None else (f"pretrained={name}",)
        wanted = load_pretrained() if name is None else load_pretrained(name)
        found = planned(*words)
        assert found.card == wanted.card
        for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other)
    known = " or ".join(georeg.PRETRAINED)
    with pytest.raises(typer.BadParameter, match=rf"wanted {known}.*got faces"):
        planned("pretrained=faces")
    georeg.save(load_pretrained(), tmp_path / "own.safetensors", card={})
    with pytest.raises(typer.BadParameter, match="no weights beside it"):
        planned("pretrained=mnist", f"weights={tmp_path / 'own.safetensors'}")
    wish = methods.Wish(methods.Name.SVF, settings=("pretrained=mnist",))
    with pytest.raises(typer.BadParameter, match="wanted none for the method svf"):
        methods.plan(wish, torch.device("cpu"))
