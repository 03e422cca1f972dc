"""The script of the pretraining experiments: its runs, its streams and one run of each kind.

Its networks and objectives are tested with the library.
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reglib.synth import random_pair

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("pretraining")
    brains = importlib.import_module("brains")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (32, 48, 32)


@pytest.fixture(scope="module")
def worlds():
    """Six small worlds of random shapes for every part, with labels up to 29."""
    parts = {}
    for number, part in enumerate(("train", "validation", "test")):
        pair = random_pair(
            SHAPE, batch=6, cell=8, count=30, generator=torch.Generator().manual_seed(number)
        )
        names = [f"{part} {n}" for n in range(6)]
        parts[part] = brains.Brains(names, pair.fixed, pair.fixed_labels.byte())
    return parts


@pytest.fixture
def heads(worlds, monkeypatch, uncached):
    """The script reads those instead of brains."""
    monkeypatch.setattr(script, "brains", worlds.__getitem__)
    uncached(script.atlas_index)
    return worlds


@pytest.fixture
def size():
    """The CPU size with almost no steps."""
    found = json.loads(json.dumps(script.SIZES["cpu"]))
    found["pretrain"]["steps"] = 2
    found["finetune"] |= {"steps": 4, "validate_every": 2}
    return found


@pytest.mark.parametrize("name", list(script.SIZES))
def test_every_run_has_a_name_of_its_own_that_says_what_it_is(name):
    runs = script.runs_of(script.SIZES[name])
    assert len({run.name for run in runs}) == len(runs)
    assert [script.Run.parse(run.name) for run in runs] == runs
    # Whatever a run starts from comes with the others.
    pretrained = {(run.variant, run.seed) for run in runs if run.kind == "pretrain"}
    needed = {(r.variant, r.seed) for r in runs if r.kind == "finetune" and r.variant != "scratch"}
    assert needed == pretrained
    # A comparison needs both sides at every share and seed.
    both = [
        {(r.percent, r.seed) for r in runs if r.kind == "finetune" and r.variant == variant}
        for variant in ("scratch", "kl")
    ]
    assert both[0] == both[1]


def test_less_data_is_part_of_more_and_never_the_atlas(heads):
    atlas = script.atlas_index()
    mean = heads["train"].images.mean(0)
    apart = [float((image - mean).square().mean()) for image in heads["train"].images]
    assert apart[atlas] == min(apart)
    for seed in (0, 1):
        shares = [
            script.subjects_of(script.Run("finetune", "kl", seed, percent))
            for percent in (5, 40, 60, 100)
        ]
        assert [len(s) for s in shares] == [1, 2, 3, 5]
        for less, more in itertools.pairwise(shares):
            assert set(less) <= set(more)
        assert sorted([*shares[-1], atlas]) == list(range(6))


@pytest.mark.parametrize("kind", ["brains", "two brains"])
def test_a_stream_goes_on_where_its_state_was_taken(heads, kind):
    def stream():
        images = heads["train"].images
        return script.BrainPairs(images, images[:1] if kind == "brains" else None, 3, flip=True)

    first = stream()
    pairs = iter(first)
    for _ in range(3):
        next(pairs)
    state = first.state_dict()
    expected = [next(pairs) for _ in range(3)]
    second = stream()
    second.load_state_dict(state)
    for wanted, found in zip(expected, second, strict=False):
        for a, b in zip(wanted, found, strict=True):
            assert torch.equal(a, b)


def test_both_images_of_a_pair_are_flipped_alike(heads):
    images = heads["train"].images
    seen = set()
    stream = script.BrainPairs(images[1:2], images[:1], 0, flip=True)
    for moving, fixed in itertools.islice(stream, 40):
        alike = [
            axes
            for count in range(4)
            for axes in itertools.combinations((2, 3, 4), count)
            if torch.equal(moving, images[:1].flip(axes))
        ]
        assert len(alike) == 1
        assert torch.equal(fixed, images[1:2].flip(alike[0]))
        seen.add(alike[0])
    assert len(seen) == 8
    stream = script.BrainPairs(images[1:2], images[:1], 0, flip=False)
    assert all(torch.equal(moving, images[:1]) for moving, _ in itertools.islice(stream, 40))


@pytest.mark.parametrize("variant", ["scratch", *script.VARIANTS])
def test_every_variant_trains_and_is_measured(heads, size, variant, tmp_path, monkeypatch):
    monkeypatch.setitem(script.SIZES, "cpu", size)
    if variant != "scratch":
        record = script.do(script.Run("pretrain", variant, 0), "cpu", tmp_path)
        assert ("test" in record) == (variant == "whole")
    record = script.do(script.Run("finetune", variant, 0), "cpu", tmp_path)
    assert record["subjects"] == 5
    assert len(record["validation"]) == 2
    assert torch.tensor(record["test"]["dice"]).shape == (6, script.STRUCTURES)
    # Done once: the second call reads the record.
    again = script.do(script.Run("finetune", variant, 0), "cpu", tmp_path)
    assert again == json.loads(json.dumps(record))


def test_the_embedded_file_is_the_pretrained_encoder(heads, size, tmp_path, monkeypatch):
    monkeypatch.setitem(script.SIZES, "cpu", size)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "EMBEDDED", tmp_path / "package" / "encoder.safetensors")
    record = script.do(script.Run("pretrain", "kl", 0), "cpu", tmp_path)
    script.embed(tmp_path)
    found = script.transmorph.load_encoder(script.EMBEDDED).state_dict()
    wanted, _ = script.load_weights(tmp_path / "pretrain-kl-0.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    _, card = script.load_weights(script.EMBEDDED)
    assert card["seconds"] == record["seconds"]
    assert card["training"] == size["pretrain"]


def test_measure_of_a_still_network_is_the_overlap_before(heads, size):
    class Still(torch.nn.Module):
        def forward(self, moving, fixed):
            return script.transmorph.Output(torch.zeros(1, 3, *moving.shape[2:]), moving)

    found = script.measure(Still(), size, "test", "cpu", full=True)
    atlas = heads["train"].labels[script.atlas_index()]
    for values, labels in zip(found["dice"], heads["test"].labels, strict=True):
        for number, value in enumerate(values, 1):
            a, b = atlas == number, labels == number
            if a.any() or b.any():
                plain = 2 * (a & b).sum() / (a.sum() + b.sum())
                assert value == pytest.approx(float(plain), abs=1e-4)  # four digits are kept
    assert found["folding"] == [0.0] * 6


def test_tuning_never_looks_at_the_test_subjects(heads, size, tmp_path, monkeypatch):
    monkeypatch.setitem(script.SIZES, "cpu", size)
    monkeypatch.setattr(
        script, "brains", lambda part: {k: heads[k] for k in ("train", "validation")}[part]
    )
    run = script.Run("finetune", "scratch", script.TUNING_SEED, 100, 1e-3)
    record = script.do(run, "cpu", tmp_path)
    assert "test" not in record
    assert record["lr"] == 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "pretraining",
        "fcn_networks",
        "georeg_synthetic_networks",
        "georeg_subjects_networks",
        "dip_lgg_job",
    ],
)
def test_the_script_runs_where_only_torch_numpy_and_safetensors_are(name):
    """So do jobs on borrowed GPU machines. What they need from torch's own needs is let through."""
    code = f"""
import sys, numpy, safetensors.torch, torch
known = {{name.split(".")[0] for name in sys.modules}} | set(sys.stdlib_module_names)
known |= {{"torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "triton"}}
known |= {{"reglib", "pretraining", "brains", "timing", "provenance", "fcn_networks"}}
known |= {{"georeg_synthetic_networks", "georeg_subjects_networks", "oct_phantom"}}
known |= {{"trainings", "table_networks", "dip_lgg_job"}}

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in known:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
sys.path.insert(0, {str(SCRIPTS)!r})
import {name}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
