"""``reglib register --method dip`` on pictures and volumes. About 5 s on one core."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from reglib.cli import main
from reglib.data.datasets import mnist
from reglib.data.nifti import Image, read_field, read_image, write_image
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth
from reglib.methods import dip
from reglib.methods.classical import Affine
from reglib.registration import register
from reglib.synth import gaussian_diffeomorphism


def call(*words: object) -> int:
    return main(["register", *map(str, words), "--method", "dip", "--device", "cpu", "--quiet"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two digits of one class as PNG."""
    folder = tmp_path_factory.mktemp("pictures")
    images, labels = mnist("test")
    for name, digit in zip(("m.png", "f.png"), images[labels == 3][:2, 0], strict=True):
        PIL.Image.fromarray((255 * digit).round().byte().numpy()).save(folder / name)
    return folder / "m.png", folder / "f.png"


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """A texture and what a known deformation makes of it, voxels of 2 mm, as NIfTI."""
    folder = tmp_path_factory.mktemp("volumes")
    generator = torch.Generator().manual_seed(0)
    moving = gaussian_smooth(torch.rand(1, 1, 20, 24, 18, generator=generator), 1.6)
    u = gaussian_diffeomorphism((20, 24, 18), sigma=5, amplitude=2, generator=generator).field
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    paths = folder / "m.nii.gz", folder / "f.nii.gz"
    for path, image in zip(paths, (moving, warp(moving, u)), strict=True):
        write_image(path, Image(image, affine))
    return paths


def test_pictures_give_what_the_library_gives(pictures, tmp_path):
    out = tmp_path / "out"
    assert call(*pictures, "--set", "steps=30", "--set", "pool=2", "--out", out) == 0
    images = [read_image(path) for path in pictures]
    methods = [Affine(), dip.DIP(steps=30, pool=2)]
    expected = register(*images, methods, progress=False)
    warped = np.asarray(PIL.Image.open(out / "warped.png"))
    assert warped.dtype == np.uint8
    # Rounded to whole intensities.
    assert abs(warped - expected.warped[0, 0].numpy()).max() <= 0.5 + 0.02
    report = json.loads((out / "report.json").read_text())
    assert [method["name"] for method in report["method"]] == ["Affine", "DIP"]
    assert "network prior" in report["history"]


def test_volumes_and_the_seed(volumes, tmp_path):
    """The same seed gives the same field; the loss falls; A is left out on demand."""
    fields = {}
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        words = ("--start", "none", "--seed", seed, "--set", "steps=40", "--set", "pool=2")
        assert call(*volumes, *words, "--out", tmp_path / name) == 0
        fields[name], _ = read_field(tmp_path / name / "field.nii.gz")
    assert torch.equal(fields["one"], fields["same"])
    assert not torch.equal(fields["one"], fields["other"])
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    [method] = report["method"]
    assert method["settings"]["seed"] == 3
    losses = report["history"]["network prior"]["similarity"]
    assert min(losses) < 0.7 * losses[0]


def test_the_papers_variant_has_a_name(pictures, tmp_path):
    words = ("--set", "preset=paper", "--set", "steps=2", "--similarity", "ncc")
    assert call(*pictures, *words, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    settings = report["method"][1]["settings"]
    assert settings["network"]["settings"]["channels"] == [128] * 5
    assert settings["similarity"] == "ncc"
    expected = replace(dip.PRESETS["paper"], steps=2)
    for name in ("steps", "scale", "pool", "squarings", "input_mode", "averaging", "patience"):
        assert settings[name] == getattr(expected, name), name


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("preset=best", "preset: wanted one of paper, fast, got best"),
        ("depth=3", "wanted settings out of input_mode"),
        ("input_mode=white", "input_mode: wanted one of 'fixed'"),
        ("network=large", "network: wanted Settings, got str"),
    ],
)
def test_what_cannot_be_set_is_named(pictures, tmp_path, capsys, setting, words):
    assert call(*pictures, "--set", setting, "--out", tmp_path / "out") == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
