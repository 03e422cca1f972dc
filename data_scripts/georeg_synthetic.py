"""GeoReg's table of large synthetic deformations, on real brains whose deformation is known.

    REGLIB_DATA=FOLDER python data_scripts/brains.py              # volumes -> one file
    python data_scripts/georeg_synthetic.py train [NAME ...]      # every network and seed
    python data_scripts/georeg_synthetic.py test                  # every configuration, once

Without a command the last two run. For development there are

    python data_scripts/georeg_synthetic.py calibrate             # how many steps to train
    python data_scripts/georeg_synthetic.py explore               # other forms, tuning pairs
    python data_scripts/georeg_synthetic.py test --split tuning --pairs 2
    python data_scripts/georeg_synthetic.py embed                 # a network -> reglib/

of which the third takes other subjects and writes nothing into results/. Leave the machine alone
during calibrate and test: seconds count.

The paper (Sideri-Lampretsa et al., arXiv:2412.13294) has such a table; its numbers are lost, so
these are ours. Pairs: an axial slice of a brain of IXI (2 mm, 80 x 96) is moving; fixed is the same
slice warped by a random field, with noise added. The field is the truth: a fractal ("Brownian")
field, to which a rotation, a scaling of each axis, a translation or all of them are added, at three
strengths, without any affine alignment before. Where an affine part grows with the strength, the
fractal field stays as it is at the first. georeg_synthetic_networks.py says how much each
strength is, as in the released code: uniform between minus and plus the amount.

Networks, one of each kind and seed for all families, are trained on the mixture of all cells, on
slices of training subjects, on one thread; each has as many steps as 7.5 minutes of one thread
allowed on the machine that georeg_synthetic_steps.json names. But "GeoReg, varied", which travels
with the package (``embed``), was trained four times as long, and on pairs of two people as well,
as other scanners might show them. A stopped training goes on from its checkpoint. GeoReg's settings
were chosen on tuning subjects; VoxelMorph and FCN have losses and learning rates of
fcn_networks.py, which were chosen on hippocampi.

``test`` has peers (peers.py), our classical method and the networks register the same NIfTI files
in processes of their own, with two threads, and measures everything from the fields that come
back. Each configuration sees the test pairs once; ``runs`` is the ledger. What is measured goes
into build/georeg_synthetic/ at once, and a stopped run continues there.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import georeg_synthetic_networks as networks
import peers
import torch
from benchmark_classical import CAP, Case, chosen, known_or_stop, register_all, run_reglib
from benchmark_record import (
    UNREGISTERED,
    Record,
    Row,
    compare,
    interval,
    key,
    method_of,
    of_each_seed,
    over_seeds,
)
from brains import ixi_structures
from georeg_synthetic_networks import CELLS, SEEDS, Cell, Pairs, load, pair_of
from provenance import ROOT
from table_networks import trained
from torch import Tensor
from trainings import table_parser

from reglib.data.nifti import Image
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp_labels
from reglib.methods import classical
from reglib.methods.network import Network
from reglib.objectives.metrics import dice, folding
from reglib.objectives.surface import hd95

WORK = networks.WORK
RESULTS = ROOT / "results" / "georeg_synthetic.json"
#: Pairs of each cell, of different subjects; the next cell goes on with the next ones.
PER_CELL = 20
#: Voxels of 1: all lengths are in voxels, of 2 mm.
AFFINE = torch.eye(3, dtype=torch.float64)
#: Structures of fewer pixels in either image are not measured.
PIXELS = 20

PROTOCOL: dict[str, Any] = {
    "pairs": f"{PER_CELL} of each cell; the subjects of the part of splits.json in turn.",
    "amounts": networks.AMOUNTS,
    "families": "what grows with the strength; the rest is 0, but for the Brownian field, which is "
    "in every family, at least with its first amount.",
    "noise": networks.NOISE,
    "endpoint_error": "mean distance from the true field, in voxels of 2 mm, where the fixed grid "
    "shows the brain and the true field stays in the image; a pair that failed or took too long "
    "counts as unregistered.",
    "hd95": "of structures that have 20 pixels or more in both images, mean, in voxels; one that "
    "the transform leaves nowhere counts with the diagonal of the image.",
    "folding": "share of pixels with a determinant of at most 0, where endpoint_error is measured; "
    "folding_everywhere on the whole grid; folding_of_truth: of the true field.",
    "seconds": "wall clock of the call that registers, imports warm, no files read.",
    "interval": "95 %, percentile bootstrap over subjects.",
    "threads": peers.THREADS,
    "cap_seconds": CAP,
}
#: Of the paper's table, and not in ours.
ABSENT = {
    "LapIRN": "not implemented here",
    "TransMorph": "in the library, but not trained for this table",
    "D-PRNet": "not implemented here",
    "RCN": "not implemented here",
    "FourierNet": "not implemented here",
}


# --- Configurations ---------------------------------------------------------------------------

#: What goes on from the field of a network on the pair, from its first seed.
CONTINUED: dict[str, dict[str, Any]] = {"GeoReg": {"Velocity": {"levels": [4.0, 2.0, 1.0]}}}
ANTS = ("ANTsPy SyN MI, default", "ANTsPy SyN CC, full resolution")


def configurations() -> dict[str, dict[str, Any]]:
    """Peers, our classical method, and every network and seed."""
    found = {name: peers.CONFIGURATIONS[name] for name in (*ANTS, "SimpleITK affine + demons")}
    found["SimpleITK demons"] = {"package": "SimpleITK", "demons": peers.DEMONS}
    methods: dict[str, dict[str, Any]] = {
        "reglib velocity": {"Velocity": {}},
        "reglib affine + velocity": {"Affine": {}, "Velocity": {}},
    }
    for name, own in methods.items():
        found[name] = {"package": "reglib", "methods": own}
    for name, recipe in networks.NETWORKS.items():
        for seed in recipe.seeds:
            found[f"{name}, seed {seed}"] = networks.TRAININGS.configuration(name, seed)
    for name, own in CONTINUED.items():
        found[f"{name}, then velocity"] = found[f"{name}, seed {SEEDS[0]}"] | {"methods": own}
    return found


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    methods: list[Any] = []
    if "weights" in settings:
        methods.append(Network(trained(str(ROOT / settings["weights"]))))
    named = settings.get("methods", {})
    return methods + [getattr(classical, name)(**own) for name, own in named.items()]


def artificial_pair() -> tuple[Image, Image]:
    """Waves, and the same 1.5 voxels further along: something to warm up with."""
    x = identity_grid((80, 96))

    def image(shift: float) -> Image:
        a, b = (x[:, :1] + shift) / 9, x[:, 1:] / 7
        return Image((a.sin() + b.cos() + (a + b).sin()) / 6 + 0.5, AFFINE)

    return image(1.5), image(0.0)


# --- Pairs ------------------------------------------------------------------------------------


class Known(NamedTuple):
    """A pair in memory, and the truth about it; labels are numbered in the order of the names."""

    structures: list[str]
    moving: Image
    fixed: Image
    moving_labels: Tensor
    fixed_labels: Tensor
    truth: Pairs


def cases(part: str, count: int | None = None) -> list[Case]:
    """The pairs of a part, at most so many of each cell; a subject is a cluster."""
    subjects = load(part).subjects
    each = min(PER_CELL, len(subjects))
    found = []
    for number, cell in enumerate(CELLS):
        places = [(each * number + k) % len(subjects) for k in range(each)]
        found += [Case(cell.name, subjects[p], subjects[p], p) for p in places[:count]]
    return found


def load_pair(case: Case, part: str) -> Known:
    """A pair of the table."""
    members = load(part)
    cell = Cell(case.set[:-2], int(case.set[-1]))
    truth = pair_of(part, case.cluster, cell)
    labels = members.labels[case.cluster : case.cluster + 1].long()
    images = (Image(x, AFFINE) for x in (truth.moving, truth.fixed))
    return Known(list(ixi_structures()), *images, labels, warp_labels(labels, truth.field), truth)


# --- Measuring --------------------------------------------------------------------------------


def measure(pair: Known, u: Tensor) -> dict[str, Any]:
    """Everything about a displacement ``(1, 2, H, W)`` in voxels."""
    u, truth = u.float(), pair.truth
    mask = truth.mask.to(u)
    values = {
        "endpoint_error": networks.endpoint_error(u, truth),
        "folding": folding(u, mask=mask),
        "folding_everywhere": folding(u),
        "folding_of_truth": folding(truth.field, mask=mask),
    }
    found: dict[str, Any] = {name: float(f"{float(x):.5g}") for name, x in values.items()}
    return found | overlap(u, pair.moving_labels, pair.fixed_labels, len(pair.structures))


def overlap(u: Tensor, moving: Tensor, fixed: Tensor, count: int) -> dict[str, Any]:
    """Dice and HD95 of structures that both images have enough of.

    Args:
        u: displacement ``(1, D, *S)`` in pixels.
        moving: labels from 1 to ``count``, ``(1, 1, *S)``.
        fixed: likewise.
        count: structures.
    """
    warped = warp_labels(moving, u)
    counts = [torch.bincount(x.flatten(), minlength=1 + count)[1:] for x in (moving, fixed)]
    seen = [1 + n for n, (a, b) in enumerate(zip(*counts, strict=True)) if min(a, b) >= PIXELS]
    if not seen:
        return {"structures": 0, "hd95": None, "mean_dice": None}
    apart = hd95(warped, fixed, labels=seen)
    apart = apart.nan_to_num(posinf=math.hypot(*u.shape[2:]))
    return {
        "structures": len(seen),
        "hd95": round(float(apart.mean()), 4),
        "mean_dice": round(float(dice(warped, fixed, labels=seen).mean()), 5),
    }


MEASURES = (
    "endpoint_error",
    "hd95",
    "mean_dice",
    "folding",
    "folding_everywhere",
    "folding_of_truth",
    "seconds",
)


def means(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one method in one cell: means over pairs, and over seeds where it has several."""
    found: dict[str, Any] = {"pairs": len({key(row)[:3] for row in rows})}
    for name in MEASURES:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = float(f"{statistics.fmean(values):.4g}") if values else None
    errors = [row["endpoint_error"] for row in rows]
    found["interval"] = interval(errors, [row["cluster"] for row in rows])
    found["folding_largest"] = max(row["folding"] for row in rows)
    found["failed"] = sum(row["timed_out"] or row["failed"] is not None for row in rows)
    seeds = of_each_seed(rows, "endpoint_error")
    return found | ({"seeds": seeds} if len(seeds) > 1 else {})


def error_of(row: Row) -> float:
    """What is compared."""
    return float(row["endpoint_error"])


def summarise(rows: Sequence[Row], ours: Collection[str] = ()) -> dict[str, Any]:
    """Every cell and method, and what was to be reached."""
    still = {key(row)[:3]: row for row in rows if row["configuration"] == UNREGISTERED}
    tables: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        # A pair without a field counts as unregistered.
        whole = row if "endpoint_error" in row else still[key(row)[:3]] | row
        own = tables.setdefault(row["set"], {})
        own.setdefault(method_of(row["configuration"]), []).append(whole)
    cells = {
        cell: {name: means(found) for name, found in table.items()}
        for cell, table in tables.items()
    }
    below = {
        cell: {
            name: averaged(table["GeoReg"], found)
            for name, found in table.items()
            if name != "GeoReg"
        }
        for cell, table in tables.items()
        if "GeoReg" in table
    }
    return {"cells": cells, "georeg_minus": below, "goals": goals(cells)}


def averaged(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """How far the end-point error of one is above that of another, seeds averaged first."""
    each = (over_seeds(rows, "endpoint_error") for rows in (one, other))
    return compare(*each, "endpoint_error", error_of)


def goals(cells: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What was to be reached in each cell, and whether it was; nothing that was not measured.

    At the two larger strengths: half of the end-point error of the best network that is no GeoReg,
    half of that of each other form of GeoReg, and less than that of each SyN. Everywhere: folding
    below 0.1 % and below that of every network that may fold. What was trained for longer is no
    rival.
    """
    recipes = networks.NETWORKS
    others = [name for name in recipes if name != "GeoReg" and recipes[name].longer is None]
    kin = [name for name in others if networks.NETWORKS[name].kind == "georeg"]
    found: list[dict[str, Any]] = []

    def note(cell: str, what: str, value: float, wanted: float) -> None:
        found.append(
            {"cell": cell, "what": what, "value": value, "wanted": wanted, "met": value < wanted}
        )

    for cell, table in cells.items():
        if "GeoReg" not in table:
            continue
        error, folds = (table["GeoReg"][name] for name in ("endpoint_error", "folding"))
        there = [name for name in others if name in table]
        if int(cell[-1]) > 1:
            strangers = [name for name in there if name not in kin]
            best = sorted(strangers, key=lambda name: table[name]["endpoint_error"])[:1]
            for name in best + [name for name in kin if name in there]:
                half = table[name]["endpoint_error"] / 2
                note(cell, f"end-point error, half of {name}", error, half)
            for name in ANTS:
                if name in table:
                    wanted = table[name]["endpoint_error"]
                    note(cell, f"end-point error of {name}", error, wanted)
        note(cell, "folding", folds, 1e-3)
        for name in there:
            if name not in networks.DIFFEOMORPHIC:
                note(cell, f"folding of {name}", folds, table[name]["folding"])
    return found


def lines(cells: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The table for the terminal: mean end-point errors, and folding over all cells."""
    names = list(dict.fromkeys(name for table in cells.values() for name in table))
    found = [" " * 32 + "".join(f"{cell:>14}" for cell in cells) + f"{'folding %':>12}"]
    for name in names:
        own = [table.get(name) for table in cells.values()]
        errors = [f"{x['endpoint_error']:14.2f}" if x else f"{'':14}" for x in own]
        share = 100 * statistics.fmean(x["folding"] for x in own if x)
        found.append(f"{name:32}" + "".join(errors) + f"{share:12.4f}")
    return found


def table(content: dict[str, Any]) -> str:
    """The summary for the terminal."""
    return "\n".join([*lines(content["cells"]), *map(str, content["goals"])])


# --- The table --------------------------------------------------------------------------------


def test(part: str, pairs: int | None, only: Sequence[str] | None, again: Sequence[str]) -> None:
    """Register and measure."""
    final, every = part == "test", configurations()
    wanted = chosen(part, every, only, again)
    record = Record(WORK / f"{part}.json", part, RESULTS if final else None)
    record.forget(again)
    register_all(
        record,
        cases(part, pairs),
        every if final else wanted,
        functools.partial(load_pair, part=part),
        __file__,
        WORK,
        measure=measure,
        warm=artificial_pair(),
        only=list(wanted),
        head=head(),
        summary=summarise,
        show=table,
    )


def head() -> dict[str, Any]:
    """What the results begin with."""
    return {
        "script": "data_scripts/georeg_synthetic.py",
        "protocol": PROTOCOL,
        "absent": ABSENT,
        "training": networks.TRAININGS.records(),
    }


def main() -> None:
    """Parse the command line."""
    parser, commands, judge = table_parser(__doc__, networks.NETWORKS, "tuning")
    commands.add_parser("embed")
    commands.add_parser("explore")
    judge.add_argument("--pairs", type=int, help="at most so many of each cell (tuning)")
    judge.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": functools.partial(run_reglib, methods_of=methods_of)})
        return
    if options.command == "calibrate":
        networks.calibrate()
    if options.command == "embed":
        networks.embed()
    if options.command == "explore":
        networks.explore()
    if options.command in ("train", None):
        names = getattr(options, "names", None) or list(networks.NETWORKS)
        known_or_stop(names, networks.NETWORKS, "network")
        networks.train_all(names)
    if options.command in ("test", None):
        part, pairs = getattr(options, "split", "test"), getattr(options, "pairs", None)
        if part == "test" and pairs is not None:
            parser.error("--pairs: the test pairs are measured all together")
        test(part, pairs, getattr(options, "only", None), getattr(options, "again", []))


if __name__ == "__main__":
    main()
