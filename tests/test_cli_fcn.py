"""``reglib train fcn`` and ``reglib register --method fcn``: the library's training and methods."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from reglib.cli import main, registering
from reglib.cli.methods import Name, Wish
from reglib.data.conform import conform
from reglib.data.datasets import hippocampus, same_label_pairs
from reglib.data.nifti import Image, read_field, read_image, write_image
from reglib.methods import fcn
from reglib.methods.network import Network
from reglib.objectives.regularity import diffusion, total_variation
from reglib.objectives.similarity import lncc, mse, ncc
from reglib.registration import register
from reglib.synth import random_pair
from reglib.training import fit
from reglib.weights import load_weights

SHAPE = (16, 24, 16)
#: Boxes of hippocampi have 16 x 24 x 16 voxels then.
COARSE = ("--spacing", 3, 3, 3)


def call(*words: object) -> int:
    return main([str(word) for word in words])


def train(*words: object) -> int:
    return call("train", "fcn", *words, "--device", "cpu")


def narrow(dimensions: int = 3, *, composed: bool = False) -> fcn.FCN | fcn.ComposedFCN:
    """A small network that moves things."""
    torch.manual_seed(0)
    widths = (4, 6, 8)
    network: fcn.FCN | fcn.ComposedFCN = fcn.FCN(fcn.Settings(dimensions, 1, widths))
    if composed:
        network = fcn.ComposedFCN(fcn.ComposedSettings(dimensions, 1, widths, widths))
    for layer in network.regressions:
        nn.init.normal_(layer.conv.weight, std=0.05)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the statistics of one look
    x = torch.rand(2, 1, *SHAPE[:dimensions], generator=torch.Generator().manual_seed(0))
    network.train()(x, x.flip(0))
    return network.eval()


@pytest.fixture
def volumes(tmp_path: Path) -> list[Path]:
    """A moving and a fixed volume of random shapes, voxels of 2 mm, in a folder of their own."""
    made = random_pair(SHAPE, cell=8, generator=torch.Generator().manual_seed(3))
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    (tmp_path / "volumes").mkdir()
    paths = [tmp_path / "volumes" / f"{name}.nii.gz" for name in ("moving", "fixed")]
    for path, image in zip(paths, (made.moving, made.fixed), strict=True):
        write_image(path, Image(200 * image + 17, affine))
    return paths


def weights_in(folder: Path, name: str = "own", **options: bool) -> Path:
    """Of a small network."""
    path = folder / f"{name}.safetensors"
    fcn.save(narrow(**options), path, card={"trained_on": "nothing"})
    return path


# --- Training -----------------------------------------------------------------------------------


def by_hand(preset: str, loss: dict[str, object], seed: int = 7) -> nn.Module:
    """Three steps on four members of the population at 3 mm, by the library's own calls."""
    torch.manual_seed(seed)
    network = fcn.ComposedFCN() if preset == "composed" else fcn.FCN(fcn.PRESETS[preset])
    population = hippocampus(count=4, generator=torch.Generator().manual_seed(seed))
    boxes = [
        conform(Image(x, torch.eye(4)), spacing=(3, 3, 3), multiple=8).tensor
        for x in population.images.split(1)
    ]
    pairs = same_label_pairs(
        torch.cat(boxes),
        torch.zeros(4, dtype=torch.long),
        batch_size=2,
        generator=torch.Generator().manual_seed(seed),
    )
    objective = functools.partial(fcn.objective, **loss)
    fit(network, pairs, objective, steps=3, lr=2e-3, progress=False)
    return network


@pytest.mark.parametrize(
    ("preset", "loss", "words"),
    [
        (
            "composed",
            {"similarity": lncc, "regularity": diffusion, "regularity_weight": 1.0},
            (),
        ),
        (
            "paper",
            {"similarity": mse, "regularity": total_variation, "regularity_weight": 0.1},
            ("--similarity", "mse", "--regularity-weight", 0.1),
        ),
    ],
)
def test_the_command_is_the_library_s_training(tmp_path, preset, loss, words):
    """On the embedded population at 3 mm, to the bit, with the loss that the words mean."""
    out = tmp_path / "a" / "own.safetensors"
    own = ("--count", 4, "--steps", 3, "--lr", 2e-3, "--seed", 7, "--preset", preset, *words)
    assert train("--out", out, *COARSE, *own) == 0
    found = fcn.load(out)
    for name, wanted in by_hand(preset, loss).state_dict().items():
        assert torch.equal(found.state_dict()[name], wanted), name
    card = found.card
    assert card["shape"] == list(SHAPE)
    assert card["input"]["size_multiple"] == found.settings.size_multiple
    assert (card["input"]["orientation"], card["input"]["spacing"]) == ("RAS", [3, 3, 3])
    assert card["input"]["quantile"] == 0.99  # as the population was scaled
    assert (card["steps"], card["batch"], card["seed"]) == (3, 2, 7)
    assert card["loss"]["regularity_weight"] == loss["regularity_weight"]
    assert "4 random variants" in card["trained_on"]
    with open(out.with_suffix(".csv"), newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    # What is done leaves no checkpoint.
    assert sorted(p.name for p in out.parent.iterdir()) == ["own.csv", "own.safetensors"]


def test_it_goes_on_where_it_was_stopped(tmp_path, volumes, monkeypatch):
    """A folder of two images: pairs that were used are drawn again, and the bits are the same."""
    words = (volumes[0].parent, "--preset", "paper", "--steps", 4, "--every", 2)
    assert train(*words, "--out", tmp_path / "whole.safetensors") == 0
    plain, calls = fcn.objective, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the power is gone")
        return plain(*arguments, **options)

    out = tmp_path / "parts.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(fcn, "objective", dies)
        assert train(*words, "--out", out) == 1
    assert not out.exists()
    assert out.with_suffix(".checkpoint.safetensors").exists()
    assert train(*words, "--out", out) == 0
    whole, parts = (load_weights(tmp_path / f"{x}.safetensors")[0] for x in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not out.with_suffix(".checkpoint.safetensors").exists()
    assert str(volumes[0]) not in json.dumps(fcn.load(out).card)


@pytest.mark.parametrize("options", [(), ("--shape", 24, 16, 8)])
def test_images_are_trained_on_as_they_will_be_registered(tmp_path, monkeypatch, options):
    """The moving image of a registration, on the grid of the first one, with other voxels."""
    affine = torch.tensor(
        [[0, -1.5, 0, 9], [2, 0, 0, 3], [0, 0, 1, -4], [0, 0, 0, 1]], dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    sizes = {"a": (17, 22, 16), "b": (20, 18, 14)}
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in sizes.items():
        placed = affine.clone()
        placed[:3, 3] += torch.tensor([1.3, -2.0, 0.4]) * (name == "b")
        x = 50 * torch.rand(1, 1, *size, generator=generator) - 20
        write_image(folder / f"{name}.nii.gz", Image(x, placed))
    seen: list[Tensor] = []

    def keep(images: Tensor, *arguments: object, **keywords: object) -> object:
        seen.append(images)
        return same_label_pairs(images, *arguments, **keywords)

    monkeypatch.setattr("reglib.data.datasets.same_label_pairs", keep)
    out = tmp_path / "own.safetensors"
    assert train(folder, "--preset", "paper", "--steps", 1, "--out", out, *options) == 0
    shown: list[Tensor] = []

    def look(moving: Tensor, fixed: Tensor) -> Tensor:
        shown.extend((fixed, moving))
        return torch.zeros(1, 3, *fixed.shape[2:])

    first, second = (read_image(folder / f"{name}.nii.gz") for name in sizes)
    register(second, first, Network(look, fcn.load(out).card["input"]), progress=False)
    wanted = torch.cat(shown)
    assert wanted.shape[2:] == (20, 24, 16)  # a voxel or two added on both sides
    if options:
        # Axis 0 grows by seven voxels, the others lose six and eight: the first image, by hand.
        whole = first.tensor - first.tensor.min()
        inner = (whole / whole.max())[..., 3:19, 4:12]
        wanted = nn.functional.pad(inner, (0, 0, 0, 0, 4, 3))
        seen[0] = seen[0][:1]
    torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preset", ["composed", "paper", "no-pooling", "interpolated"])
def test_every_network_is_trained_in_the_plane_too(tmp_path, preset):
    generator = np.random.default_rng(0)
    for name in "abc":
        pixels = generator.integers(0, 255, (16, 24), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    out = tmp_path / "own.safetensors"
    assert train(*paths, "--out", out, "--preset", preset, "--steps", 1, "--batch", 3) == 0
    found = fcn.load(out)
    assert found.settings.dimensions == 2
    assert isinstance(found, fcn.ComposedFCN) == (preset == "composed")
    if preset != "composed":
        plain = fcn.PRESETS[preset.replace("-", " ")]
        assert found.settings.max_pooling == plain.max_pooling
        assert found.settings.decoder == plain.decoder
    words = ("--weights", out, "--out", tmp_path / "r", "--quiet")
    assert call("register", *paths[:2], "--method", "fcn", *words) == 0


def test_a_limit_of_time_ends_a_training(tmp_path, volumes):
    out = tmp_path / "own.safetensors"
    words = ("--seconds", 0.5, "--preset", "interpolated")
    assert train(*volumes, "--out", out, *words) == 0
    assert 1 <= fcn.load(out).card["steps"] < 1000


def test_bad_words_leave_nothing(tmp_path, volumes, capsys):
    out = tmp_path / "out" / "own.safetensors"
    flat = tmp_path / "flat.nii.gz"
    write_image(flat, Image(torch.ones(1, 1, *SHAPE), torch.eye(4)))
    plane = tmp_path / "plane.png"
    PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(plane)
    far = tmp_path / "far.nii.gz"
    moved = torch.eye(4, dtype=torch.float64)
    moved[0, 3] = 500
    write_image(far, Image(read_image(volumes[0]).tensor, moved))
    (tmp_path / "empty").mkdir()
    for code, words, hint in (
        (1, ("--shape", 16, 20, 16), "multiples of 8, got (16, 20, 16)"),
        (1, ("--shape", 16, 0, 16), "--shape: wanted multiples of 8"),
        (1, (volumes[0],), "IMAGES: wanted two or more, got 1"),
        (1, (tmp_path / "empty",), "empty: wanted .nii or .nii.gz files"),
        (1, (*volumes, tmp_path / "no.nii"), "no.nii: No such file"),
        (1, (*volumes, flat), "flat.nii.gz: wanted contrast where"),
        (1, (*volumes, far), "far.nii.gz: wanted contrast where"),
        (1, (*volumes, plane), "plane.png: wanted 3 axes as"),
        (1, (plane, plane, "--shape", 16, 16, 16), "--shape: wanted volumes"),
        (1, ("--regularity-weight", "nan"), "regularity_weight"),
        (2, (*volumes, "--data", "msd"), "either IMAGES or --data"),
        (2, ("--preset", "huge"), "--preset"),
        (2, ("--steps", 0), "--steps"),
        (2, ("--count", 1), "--count"),
    ):
        assert train("--out", out, *words) == code, words
        assert hint in " ".join(capsys.readouterr().err.split()), words
    assert train() == 2
    assert train("--out", tmp_path / "out" / "own.pt") == 2
    assert ".safetensors" in capsys.readouterr().err
    assert not out.parent.exists()


# --- Registering --------------------------------------------------------------------------------


@pytest.mark.parametrize("composed", [False, True])
def test_weights_of_a_file_register_as_in_the_library(tmp_path, volumes, composed):
    path = weights_in(tmp_path, composed=composed)
    words = ("--method", "fcn", "--weights", path, "--out", tmp_path / "r", "--quiet")
    assert call("register", *volumes, *words) == 0
    wanted = register(*(read_image(p) for p in volumes), fcn.load(path), progress=False)
    found, _ = read_field(tmp_path / "r" / "field.nii.gz")
    assert wanted.field.abs().max() > 0.1
    # Millimetres in single precision in between.
    torch.testing.assert_close(found, wanted.field, atol=1e-4, rtol=0)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["method"][0]["name"] == ("composed fcn" if composed else "fcn")
    assert report["options"]["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("card", "words", "loss"),
    [
        ({}, (), {"similarity": lncc, "regularity": diffusion, "regularity_weight": 1.0}),
        (
            {"loss": {"similarity": "ncc", "regularity": "total_variation"}},
            ("--set", "regularity_weight=0.2"),
            {"similarity": ncc, "regularity": total_variation, "regularity_weight": 0.2},
        ),
        (
            {"loss": {"regularity_weight": 0.5}},
            ("--similarity", "mse", "--set", "lr=0.003"),
            {"similarity": mse, "regularity": diffusion, "regularity_weight": 0.5},
        ),
    ],
)
def test_training_goes_on_on_the_pair(tmp_path, volumes, card, words, loss):
    """With the loss that the card names, unless told otherwise; the file stays as it is."""
    path = tmp_path / "own.safetensors"
    fcn.save(narrow(composed=True), path, card=card)
    before = path.read_bytes()
    all_words = ("--method", "fcn", "--set", "steps=4", *words, "--weights", path, "--quiet")
    assert call("register", *volumes, *all_words, "--out", tmp_path / "r") == 0
    lr = 3e-3 if "lr=0.003" in words else 1e-3
    method = fcn.Instance(fcn.load(path), functools.partial(fcn.objective, **loss), 4, lr)
    wanted = register(*(read_image(p) for p in volumes), method, progress=False).field
    found, _ = read_field(tmp_path / "r" / "field.nii.gz")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    once = register(*(read_image(p) for p in volumes), fcn.load(path), progress=False).field
    assert (found - once).abs().max() > 1e-2
    assert path.read_bytes() == before


def test_an_affine_map_may_come_first(tmp_path, volumes):
    words = ("--method", "fcn", "--start", "affine", "--weights", weights_in(tmp_path), "--quiet")
    assert call("register", *volumes, *words, "--out", tmp_path / "r") == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [m["name"] for m in report["method"]] == ["Affine", "fcn"]


def test_the_package_s_own_weights_are_the_default(tmp_path, volumes, monkeypatch, capsys):
    words = ("--method", "fcn", "--quiet", "--out", tmp_path / "r")
    monkeypatch.setattr(fcn, "WEIGHTS", "weights/none.safetensors")
    assert call("register", *volumes, *words) == 1
    assert "reglib train fcn" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"weights/none\.safetensors"):
        fcn.load_pretrained()
    monkeypatch.setattr(fcn, "WEIGHTS", str(weights_in(tmp_path)))
    assert call("register", *volumes, *words) == 0
    found, wanted = fcn.load_pretrained(), narrow()
    assert not found.training
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    field, _ = read_field(tmp_path / "r" / "field.nii.gz")
    images = (read_image(p) for p in volumes)
    wanted_field = register(*images, found, progress=False).field
    torch.testing.assert_close(field, wanted_field, atol=1e-4, rtol=0)


def test_words_that_do_not_fit(tmp_path, volumes, capsys):
    path = weights_in(tmp_path)
    flat = weights_in(tmp_path, "plane", dimensions=2)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    fcn.save(narrow(), tmp_path / "odd.safetensors", card={"loss": {"similarity": "magic"}})
    for code, words, hint in (
        (2, ("--method", "svf", "--weights", path), "--weights: wanted none for the method svf"),
        (2, ("--method", "fcn", "--weights", path, "--set", "lr=0.1"), "wanted steps=N as well"),
        (2, ("--method", "fcn", "--weights", path, "--similarity", "ncc"), "steps=N as well"),
        (2, ("--method", "fcn", "--weights", path, "--set", "levels=4"), "got levels"),
        (2, ("--method", "fcn", "--weights", path, "--set", "steps=many"), "steps: wanted"),
        (2, ("--method", "fcn", "--weights", path, "--set", "similarity=ncc"), "got similarity"),
        (
            2,
            ("--method", "fcn", "--weights", tmp_path / "odd.safetensors", "--set", "steps=2"),
            "magic",
        ),
        (2, ("--method", "georeg", "--set", "steps=3"), "trained already"),
        (1, ("--method", "fcn", "--weights", tmp_path / "no.safetensors"), "no.safetensors"),
        (1, ("--method", "fcn", "--weights", broken), "wanted a safetensors file"),
        (1, ("--method", "georeg", "--weights", path), "wanted weights of method 'georeg'"),
        (1, ("--method", "fcn", "--weights", flat), "wanted images of 2 axes"),
    ):
        assert call("register", *volumes, *words, "--out", tmp_path / "r") == code, words
        assert hint in " ".join(capsys.readouterr().err.split()), words
    assert not (tmp_path / "r").exists()


def test_other_weights_are_other_options(tmp_path, monkeypatch):
    """So that ``--pairs`` does not keep what other weights found; where they lie does not count."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [weights_in(tmp_path / "one"), weights_in(tmp_path / "two", composed=True)]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(paths[0].read_bytes())
    options = []
    for path in (*paths, copy, None):
        monkeypatch.setattr(fcn, "WEIGHTS", str(paths[0]))
        settings = () if path is None else (f"weights={path}",)
        request = registering.Request(Wish(Name.FCN, settings=settings))
        planned = registering.plan_of(request, torch.device("cpu"))
        options.append(registering.options_of(request, planned))
    assert options[0] == options[2] != options[1]
    assert "weights" not in options[3]
