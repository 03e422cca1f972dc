"""``reglib register --method inr`` (about 15 s)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reglib.cli import main
from reglib.data.nifti import Image, write_image
from reglib.registration import Registration


@pytest.fixture
def planes(tmp_path: Path) -> list[Path]:
    """Waves of two contrasts, the moving ones 3 mm further along the first axis."""
    x = torch.cartesian_prod(*(torch.arange(40.0),) * 2).view(1, 1, 40, 40, 2)
    paths = [tmp_path / f"{name}.nii.gz" for name in ("moving", "fixed")]
    for path, shift, sign in zip(paths, (3.0, 0.0), (1, -1), strict=True):
        a, b = (x - torch.tensor([shift, 0.0])).unbind(-1)
        waves = (a / 3).sin() + (b / 4).cos() + (a * b / 120).sin()
        write_image(path, Image(sign * waves, torch.eye(3)))
    return paths


def register(planes: list[Path], out: Path, *words: object) -> int:
    return main(
        ["register", *map(str, planes), "--method", "inr", "--out", str(out)]
        + ["--device", "cpu", "--quiet", *map(str, words)]
    )


def test_two_modalities_are_registered_rigidly(planes, tmp_path):
    """To half a mm by the search alone, as five steps do no harm; and the report says how."""
    out = tmp_path / "out"
    words = ("--modality", "multi", "--set", "steps=5", "--seed", 3)
    assert register(planes, out, *words) == 0
    found = Registration.load(out)
    assert not found.field.any()
    middle = found.apply_points(torch.tensor([[[20.0, 20.0]]]))
    torch.testing.assert_close(middle[0, 0], torch.tensor([23.0, 20.0]), atol=0.5, rtol=0)
    report = json.loads((out / "report.json").read_text())
    [method] = report["method"]
    settings = method["settings"]
    assert (method["name"], settings["modality"], settings["seed"]) == ("INR", "multi", 3)
    assert settings["steps"] == 5
    assert report["history"].keys() == {"training", "choice"}
    assert any(note.startswith("confidence") for note in report["notes"])


def test_presets_and_transforms_go_together(planes, tmp_path, capsys):
    paper = ("--set", "preset=paper", "--set", "steps=2")
    assert register(planes, tmp_path / "paper", *paper) == 0
    report = json.loads((tmp_path / "paper" / "report.json").read_text())
    assert report["method"][0]["settings"]["search"] is None
    words = ("--transform", "deformable", "--set", "steps=3", "--similarity", "ncc")
    assert register(planes, tmp_path / "bent", *words) == 0
    settings = json.loads((tmp_path / "bent" / "report.json").read_text())["method"][0]["settings"]
    assert settings["rigid"] is False
    assert settings["similarity"] == settings["search"]["settings"]["similarity"] == "ncc"
    capsys.readouterr()
    assert register(planes, tmp_path / "x", *paper, "--transform", "deformable") != 0
    assert "preset: wanted one of deformable, got paper" in " ".join(
        capsys.readouterr().err.split()
    )
    assert register(planes, tmp_path / "x", "--transform", "affine") != 0
    assert "--transform" in capsys.readouterr().err


def test_other_methods_have_no_modality(planes, tmp_path, capsys):
    words = ["register", *map(str, planes), "--method", "rigid", "--out", str(tmp_path / "out")]
    assert main([*words, "--modality", "multi"]) != 0
    assert "--modality" in capsys.readouterr().err
    assert main([*words[:3], "--method", "inr", "--out", words[-1], "--modality", "both"]) != 0
