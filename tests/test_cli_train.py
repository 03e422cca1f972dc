"""``reglib train pretrain``: the same training as the library's, resumed, refused, in processes."""

from __future__ import annotations

import csv
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reglib.cli import main, training
from reglib.methods import pretraining, transmorph
from reglib.synth import RandomPairs
from reglib.training import fit, warm_up
from reglib.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--shape", "16", "24", "16")


def pretrain(*words: object) -> int:
    return main(["train", "pretrain", *map(str, words), "--device", "cpu"])


@pytest.mark.parametrize("loss", ["lncc", "dice"])
def test_the_command_is_the_library_s_training(tmp_path, loss):
    words = ("--steps", 3, "--lr", 1e-3, "--seed", 7, "--batch", 2, "--loss", loss)
    assert pretrain("--out", tmp_path / "a", *SMALL, *words, "--kl", "none") == 0
    found = transmorph.load_encoder(tmp_path / "a" / training.ENCODER)

    torch.manual_seed(7)
    encoder = transmorph.Encoder(transmorph.PRESETS["tiny"])
    network = pretraining.PretrainingNetwork(encoder)
    make = pretraining.dice_objective if loss == "dice" else pretraining.objective
    fit(
        network,
        RandomPairs((16, 24, 16), generator=torch.Generator().manual_seed(7), batch=2, cell=16 / 5),
        functools.partial(make, kl=None),
        steps=3,
        lr=1e-3,
        optimiser=torch.optim.AdamW,
        schedule=warm_up,
        progress=False,
    )
    for name, wanted in encoder.state_dict().items():
        assert torch.equal(found.state_dict()[name], wanted), name
    _, card = load_weights(tmp_path / "a" / training.ENCODER)
    assert card["steps"] == 3
    assert card["shape"] == [16, 24, 16]
    assert "no image" in card["trained_on"]
    with open(tmp_path / "a" / training.LOG, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    # What is done leaves no checkpoint.
    assert not (tmp_path / "a" / training.CHECKPOINT).exists()


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*SMALL, "--steps", 4, "--every", 2)
    assert pretrain("--out", whole, *words) == 0

    plain = pretraining.objective
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the power is gone")
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "objective", dies)
        assert pretrain("--out", parts, *words) == 1
    assert (parts / training.CHECKPOINT).exists()
    assert not (parts / training.ENCODER).exists()
    assert pretrain("--out", parts, *words) == 0
    a, b = (load_weights(folder / training.ENCODER)[0] for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bad_words_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain("--out", out, "--shape", "16", "20", "16") == 1
    assert "multiples of 8, got (16, 20, 16)" in capsys.readouterr().err
    assert pretrain("--out", out, "--preset", "huge") == 2
    assert pretrain("--out", out, "--steps", 0) == 2
    assert pretrain() == 2
    assert not out.exists()


def test_several_processes_need_their_engine(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert pretrain("--out", tmp_path / "out", "--devices", 2) == 1
    assert "reglib[scale]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes_train_one_encoder(tmp_path):
    """The card counts the pairs of both."""
    words = ["--out", tmp_path, *SMALL, "--steps", 2, "--devices", 2, "--device", "cpu"]
    command = [sys.executable, "-m", "reglib", "train", "pretrain", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    encoder, card = load_weights(tmp_path / training.ENCODER)
    assert card["batch"] == 2
    assert all(tensor.isfinite().all() for tensor in encoder.values())
