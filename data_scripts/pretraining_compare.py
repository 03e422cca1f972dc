"""The fine-tuned TransMorph beside peers and the library's own optimisation, on real brains.

    REGLIB_DATA=FOLDER python data_scripts/brains.py         # once: IXI as one file
    REGLIB_DATA=FOLDER python data_scripts/brains.py malf    # once: the external test
    python data_scripts/pretraining.py --size cpu            # the networks
    python data_scripts/pretraining_compare.py

registers the atlas of pretraining.py to every test subject of IXI and to every brain of malf and
writes results/pretraining_cpu_compare.json. Leave the machine alone meanwhile: seconds count.

    python data_scripts/pretraining_compare.py --split validation --subjects 2 --candidates

is for development: validation subjects, nothing in results/. ``--candidates`` measures every way of
going on from the field of a network, of which the test sees only the one that ``CHOSEN`` names.

Processes, clocks and records are those of benchmark_classical.py: everyone is given the same two
NIfTI files in a process of its own with two threads, and everything is measured from the field that
comes back. Weights are read, and a small artificial pair is registered, before the clock starts.
Each configuration sees the test subjects once; ``runs`` is the ledger. What is measured goes into
build/pretraining_compare/ at once, and a stopped run continues there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmark_classical
import peers
import pretraining
import torch
from benchmark_classical import Case, Loaded, Workers, measure_all, run_reglib
from benchmark_record import UNREGISTERED, Record, Row, compare, differences, key, score, table
from brains import Brains, ixi_structures, load, load_malf
from provenance import ROOT, committed_or_stop, write_json
from scipy.stats import wilcoxon
from torch import Tensor, nn
from trainings import configuration, trained_or_stop

from reglib.data.nifti import Image
from reglib.geometry.fields import upsample_field
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import pool
from reglib.methods import classical, transmorph
from reglib.methods.fcn import Instance
from reglib.methods.network import Network
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc
from reglib.weights import load_weights

WORK = ROOT / "build" / "pretraining_compare"

#: The grid of all brains: voxels of 2 mm. Where its first voxel lies matters to nobody.
AFFINE = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))

PEERS = (
    "SimpleITK affine + demons",
    "ConvexAdam",
    "ANTsPy SyN CC, full resolution",
)
SETS = ("ixi_2mm", "malf")
OWN = ("reglib affine + velocity", "reglib affine + velocity, fast")

#: Fine-tuned networks, by what they began with, and the names of their runs in pretraining.py.
NETWORKS = {
    "TransMorph, from scratch": "finetune-scratch-100-0",
    "TransMorph, encoder pretrained": "finetune-kl-100-0",
    "TransMorph, all pretrained": "finetune-whole-100-0",
}

#: What may go on from the field of a network: classes and what is not their default. ``Instance``
#: trains a copy of the network on the pair instead.
CONTINUATIONS: dict[str, dict[str, Any]] = {
    "velocity, 2 mm, 10 steps": {"Velocity": {"levels": [2.0], "steps": 10, "lr": 0.3}},
    "velocity, 2 mm, 20 steps": {"Velocity": {"levels": [2.0], "steps": 20, "lr": 0.3}},
    "velocity, 2 mm, 30 steps": {"Velocity": {"levels": [2.0], "steps": 30, "lr": 0.3}},
    "velocity, 4 and 2 mm, 10 steps": {"Velocity": {"levels": [4.0, 2.0], "steps": 10, "lr": 0.5}},
    "velocity, 4 and 2 mm, 20 steps": {"Velocity": {"levels": [4.0, 2.0], "steps": 20, "lr": 0.3}},
    "velocity, 4 and 2 mm, 30 steps": {"Velocity": {"levels": [4.0, 2.0], "steps": 30, "lr": 0.3}},
    "velocity, 4 and 2 mm, 40 steps": {"Velocity": {"levels": [4.0, 2.0], "steps": 40, "lr": 0.3}},
    "velocity, 4 and 2 mm, 20 steps, half as smooth": {
        "Velocity": {"levels": [4.0, 2.0], "steps": 20, "lr": 0.3, "regularity_weight": 0.25}
    },
    "velocity, 4 and 2 mm, 20 steps, twice as smooth": {
        "Velocity": {"levels": [4.0, 2.0], "steps": 20, "lr": 0.3, "regularity_weight": 1.0}
    },
    "velocity of every voxel, 2 mm, 20 steps": {
        "Velocity": {"levels": [2.0], "nodes": 1.0, "steps": 20, "lr": 0.3}
    },
    "velocity of every voxel, 4 and 2 mm, 20 steps": {
        "Velocity": {"levels": [4.0, 2.0], "nodes": 1.0, "steps": 20, "lr": 0.3}
    },
    "velocity of every voxel, 4 and 2 mm, 30 steps": {
        "Velocity": {"levels": [4.0, 2.0], "nodes": 1.0, "steps": 30, "lr": 0.3}
    },
    "displacement, 2 mm, 20 steps": {"Displacement": {"levels": [2.0], "steps": 20, "lr": 0.3}},
    "training on the pair, 20 steps": {"Instance": {"steps": 20, "lr": 3e-4}},
}
CHOSEN = "velocity, 4 and 2 mm, 20 steps"

#: The goals of the pretraining, for a fine-tuned network beside the peer with the largest Dice.
WANTED = {
    "one forward pass": {"dice_above_at_least": 0.0, "seconds_ratio_at_most": 0.1},
    "optimised on the pair": {"dice_above_at_least": 0.02},
    "ndv_below": 1e-4,
}

PROTOCOL = {
    "pairs": "the atlas, a training subject of IXI, is moving; every subject of a set is fixed. "
    "Clusters of the intervals are the subjects: they hold for this atlas.",
    "ixi_2mm": "images at 2 mm, affinely aligned to MNI152, labels by DLMUSE.",
    "malf": "OASIS-1, MICCAI 2012 challenge, labels drawn by hand: another scanner and another "
    "protocol than the atlas's. Aligned to MNI152 at 2 mm by the library's Affine, labels carried "
    "nearest. All 29 structures exist, cerebral white matter as 44 and 45. CC BY-NC: measures "
    "only.",
    "networks": "one forward pass, no affine registration before it: all brains are aligned.",
    "p": "Wilcoxon's signed-rank test of the subjects' mean Dice, two-sided, not corrected for the "
    "number of comparisons.",
} | {
    name: benchmark_classical.PROTOCOL[name]
    for name in ("input", "dice", "seconds", "threads", "cap_seconds", "folding", "interval")
}


# --- Networks -------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A network that sees both images averaged over ``factor`` voxels; its field is brought back.

    ``card["input"]`` is that of the network, its size multiple that of the unpooled images, so
    :class:`reglib.methods.network.Network` runs it on any pair.
    """

    def __init__(self, network: transmorph.TransMorph, factor: int) -> None:
        super().__init__()
        self.network, self.factor = network, factor
        taken: dict[str, Any] = dict(network.card["input"])
        taken["size_multiple"] = factor * taken.get("size_multiple", 1)
        self.card: dict[str, Any] = {"method": "transmorph", "pooled": factor, "input": taken}

    def forward(self, moving: Tensor, fixed: Tensor) -> transmorph.Output:
        """The field ``(B, D, *S)`` on the unpooled grid; the velocity stays as it was found."""
        output = self.network(pool(moving, self.factor), pool(fixed, self.factor))
        field = output.field
        if self.factor > 1:
            field = upsample_field(field, self.factor, moving.shape[2:])
        return transmorph.Output(field, output.velocity)


@functools.cache
def trained(path: str, size: str) -> Pooled:
    """A network that pretraining.py has written, from its file."""
    settings = pretraining.SIZES[size]
    network = transmorph.TransMorph(transmorph.PRESETS[settings["preset"]])
    network.load_state_dict(load_weights(path)[0])
    return Pooled(network, settings["pooled"]).eval()


def pair_objective(
    output: transmorph.Output, moving: Tensor, fixed: Tensor, *, reduction: str = "mean"
) -> dict[str, Tensor]:
    """The loss of fine-tuning with the window of :mod:`reglib.methods.classical`."""
    warped = warp(moving, output.field)
    return {
        "similarity": lncc(warped, fixed, window=5, reduction=reduction),
        "regularity": diffusion(output.field, reduction=reduction),
    }


# --- Configurations -------------------------------------------------------------------------


def configurations(size: str, weights: Path, goes_on: Sequence[str]) -> dict[str, Any]:
    """Those that every set is registered with.

    Args:
        size: of the networks.
        weights: their folder.
        goes_on: which of ``CONTINUATIONS`` follow a network.
    """
    every = benchmark_classical.CONFIGURATIONS
    found = {one: every[one] for one in (*PEERS, *OWN)}
    for network, run in NETWORKS.items():
        path = weights / f"{run}.safetensors"
        found[network] = own = configuration(path, size=size)
        for words in goes_on:
            found[f"{network}, then {words}"] = own | {"methods": CONTINUATIONS[words]}
    for words in goes_on:
        if "Instance" not in CONTINUATIONS[words]:
            # What the network adds: the same from where it began.
            methods = {"package": "reglib", "methods": CONTINUATIONS[words]}
            found[f"reglib {words}, no network"] = methods
    return found


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    methods: list[Any] = []
    if "weights" in settings:
        methods = [Network(trained(str(ROOT / settings["weights"]), settings["size"]))]
    for name, own in settings.get("methods", {}).items():
        if name == "Instance":
            # Its first state is the forward pass.
            methods = [Instance(methods[0].network, pair_objective, **own)]
        else:
            methods.append(getattr(classical, name)(**own))
    return methods


# --- Pairs ----------------------------------------------------------------------------------


@functools.cache
def members(name: str, split: str) -> Brains:
    """The subjects that the atlas is registered to."""
    return load_malf() if name == "malf" else load(split)


def atlas() -> tuple[str, Tensor, Tensor]:
    """Name, image and labels of the moving brain."""
    train, n = pretraining.brains("train"), pretraining.atlas_index()
    return train.subjects[n], train.images[n : n + 1], train.labels[n : n + 1]


def cases(name: str, split: str, subjects: int | None = None) -> list[Case]:
    """The atlas to each subject; at most so many. Every subject is a cluster of its own."""
    fixed = members(name, split).subjects[:subjects]
    return [Case(name, atlas()[0], subject, n) for n, subject in enumerate(fixed)]


def loaded(case: Case, split: str) -> Loaded:
    """A pair in memory."""
    some = members(case.set, split)
    n = some.subjects.index(case.fixed)
    _, moving, labels = atlas()
    fixed, fixed_labels = some.images[n : n + 1], some.labels[n : n + 1]
    images = Image(moving, AFFINE), Image(fixed, AFFINE)
    return Loaded(list(ixi_structures()), *images, labels, fixed_labels)


# --- Statistics -----------------------------------------------------------------------------


def by_configuration(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one set, each with its Dice before registration."""
    first = [row for row in rows if row["configuration"] == UNREGISTERED]
    before = {key(row)[:3]: row["mean_dice"] for row in first}
    found: dict[str, list[Row]] = {}
    for row in rows:
        row = row | {"before": before[key(row)[:3]]}
        found.setdefault(row["configuration"], []).append(row)
    return found


def signed_rank(differences: Sequence[float]) -> float:
    """P of Wilcoxon's signed-rank test, two-sided; 1 where nothing differs."""
    if not any(differences):
        return 1.0
    return float(f"{wilcoxon(differences).pvalue:.3g}")


def beside(ours: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """How far the Dice of ``ours`` is above that of ``other``, on the subjects that both have.

    Returns:
        ``dice``, the mean difference, and its ``interval``; on how many ``subjects`` ours is
        ``better`` and ``worse``; ``p``.
    """
    gain, _ = differences(ours, other, score)
    counts = {"better": sum(x > 0 for x in gain), "worse": sum(x < 0 for x in gain)}
    found = compare(ours, other)
    return {"subjects": found.pop("pairs")} | found | counts | {"p": signed_rank(gain)}


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every two configurations of one set: ``one`` beside ``other``."""
    tables = by_configuration(rows)
    return [
        {"one": one, "other": other} | beside(tables[one], tables[other])
        for one, other in itertools.combinations(tables, 2)
    ]


def goals(rows: Sequence[Row], rivals: Sequence[str]) -> dict[str, Any]:
    """What the goals of the pretraining ask for, as numbers; what is ``WANTED`` is beside them.

    Args:
        rows: of one set.
        rivals: the peers among its configurations.

    Returns:
        The peer with the largest Dice; of each network the forward pass and what goes on from it,
        beside every peer. ``seconds_ratio`` is the mean of their seconds over that of the peer's.
    """
    tables = by_configuration(rows)
    means = {name: statistics.fmean(map(score, tables[name])) for name in rivals}

    def numbers(name: str) -> dict[str, Any]:
        own = tables[name]
        ndv = [row["ndv"] for row in own if "ndv" in row]
        others = {
            rival: beside(own, tables[rival])
            | {"seconds_ratio": round(seconds(own) / seconds(tables[rival]), 4)}
            for rival in rivals
        }
        return {
            "dice": round(statistics.fmean(map(score, own)), 4),
            "ndv": float(f"{statistics.fmean(ndv):.4g}") if ndv else None,
            "beside": others,
        }

    return {
        "wanted": WANTED,
        "best_peer": max(means, key=lambda name: means[name]),
        "networks": {
            name: {
                "one forward pass": numbers(name),
                "optimised on the pair": numbers(f"{name}, then {CHOSEN}"),
            }
            for name in NETWORKS
        },
    }


def seconds(rows: Sequence[Row]) -> float:
    """The mean of a configuration."""
    return statistics.fmean(row["seconds"] for row in rows)


# --- The run --------------------------------------------------------------------------------


def results_of(size: str) -> Path:
    """Where the whole goes in the end."""
    return ROOT / "results" / f"pretraining_{size}_compare.json"


def record_of(name: str, split: str, size: str) -> Record:
    """The rows of a set; those that are finished are begun from."""
    path, finished = WORK / f"{size}_{name}_{split}.json", results_of(size)
    if split == "test" and not path.exists() and finished.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(finished.read_text())["sets"][name])
    return Record(path, split)


def compare_all(options: argparse.Namespace) -> None:
    """Register, measure, and write the results when nothing is missing."""
    final = options.split == "test"
    weights = options.weights or ROOT / "build" / "pretraining" / options.size
    goes_on = list(CONTINUATIONS) if options.candidates else [CHOSEN]
    all_of_them = configurations(options.size, weights, goes_on)
    wanted = {n: s for n, s in all_of_them.items() if n in (options.only or all_of_them)}
    trained_or_stop(wanted)
    sets = SETS if final else SETS[:1]
    python, wholes = benchmark_classical.make_environment(), {}
    print(f"load of this machine now: {os.getloadavg()[0]:.1f} (wanted: near 0)", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(python, Path(folder), __file__, WORK) as workers,
    ):
        for name in sets:
            everything = cases(name, options.split, options.subjects)
            record = record_of(name, options.split, options.size)
            record.forget(options.again)
            pairs = [case[:3] for case in everything]
            record.begin(wanted, {(*p, n) for p in pairs for n in [UNREGISTERED, *wanted]})
            read = functools.partial(loaded, split=options.split)
            measure_all(record, everything, wanted, workers.files, workers.register, load=read)
            names = all_of_them if final else wanted
            missing = {(*p, n) for p in pairs for n in names} - record.done
            if missing:
                print(f"{len(missing)} registrations of {name} are missing")
                continue
            wholes[name] = record.finish(pairs, list(names), {})
            print(table(wholes[name]), flush=True)
    if not final or len(wholes) < len(sets):
        return
    head = {
        "script": f"data_scripts/pretraining_compare.py --size {options.size}",
        "protocol": PROTOCOL,
        "versions": benchmark_classical.versions(python),
        "structures": list(ixi_structures()),
        "goals": {name: goals(whole["rows"], PEERS) for name, whole in wholes.items()},
    }
    for name, whole in wholes.items():
        whole["comparisons"] = comparisons(whole["rows"])
        del whole["above"]  # a part of the comparisons
        print(name, json.dumps(head["goals"][name], indent=1))
    write_json(results_of(options.size), head | {"sets": wholes})


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=("cpu", "small"), default="cpu")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--subjects", type=int, help="at most so many (validation)")
    parser.add_argument("--candidates", action="store_true", help="all of CONTINUATIONS")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="others (validation)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": functools.partial(run_reglib, methods_of=methods_of)})
        return
    if options.split == "test":
        if options.subjects is not None or options.candidates or options.weights is not None:
            parser.error("--subjects, --candidates, --weights: for the validation subjects")
        committed_or_stop()
    compare_all(options)


if __name__ == "__main__":
    main()
