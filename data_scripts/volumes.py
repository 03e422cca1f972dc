"""What the scripts on volumes of two modalities share: configurations, measures and tables.

inr_t1t2.py and abdomen_mrct.py are run, not this. Processes and records are those of
benchmark_classical.py: every configuration is given the same two NIfTI files, without masks, and
gives back a displacement field, from which everything is measured alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import benchmark_classical
import peers
import torch
from benchmark_classical import regularity
from benchmark_record import DRAWS, UNREGISTERED, Row, compare, interval, key
from inr_zurich import settings_of
from torch import Tensor

from reglib.data.nifti import Image
from reglib.geometry.affine import whole_field
from reglib.geometry.sampling import warp_labels
from reglib.methods.classical import Affine, Velocity
from reglib.methods.inr import INR, CoordinateSettings
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.metrics import dice
from reglib.objectives.mind import mind, mind_features
from reglib.objectives.similarity import mse, mutual_information

# --- Configurations -------------------------------------------------------------------------

#: SimpleITK: cells of 60 mm, then 30 and 15. Chosen on the same pair as ``NETWORKS`` below: what
#: stopped sooner, or had finer cells, was further from the truth.
BSPLINE: dict[str, Any] = {
    "coarsest_cell_mm": 60.0,
    "bins": 64,
    "sampling": 0.25,
    "shrink": [4, 2, 1],
    "sigma_voxels": [2.0, 1.0, 0.0],
    "iterations": 100,
    "accuracy": 1e-5,
}
PEERS: dict[str, dict[str, Any]] = {
    "ANTsPy SyN MI": peers.CONFIGURATIONS["ANTsPy SyN MI, full resolution"],
    "SimpleITK affine + B-spline, MI": {
        "package": "SimpleITK",
        "affine": peers.AFFINE,
        "bspline": BSPLINE,
    },
}

#: The networks begin where an affine registration ends: in a volume a search from far away is dear,
#: and brains and bellies lie where scanners put them. Granularity, learning rates and when all
#: levels count are the best of five that were tried on one development pair of inr_t1t2.py.
NETWORKS = INR(
    modality="multi",
    rigid=False,
    image=CoordinateSettings(table=2**17, coarse_to_fine=0.5),
    motion=CoordinateSettings(0, 0.1, width=32, coarse_to_fine=0.5, lr=1e-3),
    steps=1_000,
    coordinates=8_192,
    bound=0.2,
)


@dataclass(frozen=True)
class Described:
    """A method that is given both images' MIND descriptors, twelve channels, in their place.

    Of descriptors there is one modality: the networks then store and compare what T1 and T2 have in
    common, which is no part of the paper.

    Attributes:
        method: sees the descriptors.
    """

    method: INR

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Run the method."""
        moving, fixed = (mind_features(image) for image in (pair.moving, pair.fixed))
        yield from self.method(dataclasses.replace(pair, moving=moving, fixed=fixed))


#: Ours: methods one after another.
METHODS: dict[str, list[Any]] = {
    "reglib affine, MI": [Affine(mutual_information)],
    "reglib affine, MI + velocity, MIND": [Affine(mutual_information), Velocity(mind)],
    "reglib affine, MI + INR": [Affine(mutual_information), NETWORKS],
    "reglib affine, MI + INR of MIND": [
        Affine(mutual_information),
        Described(dataclasses.replace(NETWORKS, modality="single", similarity=mse)),
    ],
}
CONFIGURATIONS = PEERS | {name: settings_of(methods) for name, methods in METHODS.items()}

PROTOCOL = {
    "seconds": "wall clock of the call that registers, imports warm, no files read; ANTsPy writes "
    "its transforms and makes both warped images within the call.",
    "threads": peers.THREADS,
    "cap_seconds": benchmark_classical.CAP,
    "dice": "moving labels warped once, nearest, from the displacement field that came back; mean "
    "over structures, then over pairs; a pair that failed or took too long counts as unregistered.",
    "folding": "share of the fixed grid's voxels where the whole transform has a determinant of at "
    "most 0; folding_inside without two voxels at each face.",
    "interval": f"95 %, percentile bootstrap, {DRAWS} draws of whole clusters; pairs of different "
    "clusters share no patient.",
    "above": "by how much ours is better than each of the rest, on the pairs that both have: Dice "
    "or millimetres.",
}


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    return next(methods for methods in METHODS.values() if settings_of(methods) == settings)


run_reglib = functools.partial(benchmark_classical.run_reglib, methods_of=methods_of)


# --- Measuring ------------------------------------------------------------------------------


class Case(NamedTuple):
    """A pair by name; cases of different clusters share no patient."""

    set: str
    moving: str
    fixed: str
    cluster: int


class Loaded(NamedTuple):
    """A case in memory, and what is known about it.

    Attributes:
        moving: image.
        fixed: image.
        structures: names of the labels 1, 2 and so on.
        moving_labels: ``(1, 1, *T)``.
        fixed_labels: ``(1, 1, *S)``.
        truth: the whole displacement ``(1, 3, *S)``, fixed to moving, in voxels of the fixed grid.
        inside: where it counts, ``(1, 1, *S)``, boolean.
    """

    moving: Image
    fixed: Image
    structures: Sequence[str] = ()
    moving_labels: Tensor | None = None
    fixed_labels: Tensor | None = None
    truth: Tensor | None = None
    inside: Tensor | None = None


def measure(case: Loaded, u: Tensor) -> dict[str, Any]:
    """Everything about a whole transform ``x + u(x)``, in voxels of the fixed grid."""
    found: dict[str, Any] = {}
    if case.truth is not None:
        found |= displacement_error(case, u)
    if case.structures:
        labels = warped_labels(case, u)
        overlap = dice(labels, case.fixed_labels, labels=range(1, len(case.structures) + 1))[0]
        found |= {
            "mean_dice": round(float(overlap.nanmean()), 5),
            "dice": [None if math.isnan(x) else round(x, 4) for x in overlap.tolist()],
        }
    return found | regularity(u)


def warped_labels(case: Loaded, u: Tensor) -> Tensor:
    """The moving labels on the fixed grid, nearest."""
    world = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    field = whole_field(world, u, case.fixed.affine, case.moving.affine)
    return warp_labels(case.moving_labels, field)


def displacement_error(case: Loaded, u: Tensor) -> dict[str, float]:
    """Mm between where ``u`` and the truth lead: mean, 95th percentile and largest, inside."""
    spacing = case.fixed.affine[:3, :3].norm(dim=0).to(u)
    apart = ((u - case.truth) * spacing.view(1, 3, 1, 1, 1)).norm(dim=1, keepdim=True)
    values = apart[case.inside].double()
    return {
        "error": round(float(values.mean()), 4),
        "error_95": round(float(torch.quantile(values, 0.95)), 4),
        "error_largest": round(float(values.max()), 3),
    }


# --- The tables -----------------------------------------------------------------------------


def score_of(rows: Sequence[Row]) -> str:
    """What configurations are compared by: the error where the truth is known, else Dice."""
    return "error" if any("error" in row for row in rows) else "mean_dice"


def summarise(rows: Sequence[Row], ours: Collection[str]) -> dict[str, Any]:
    """Of every set and configuration; and by how much ``ours`` are better than each of the rest.

    A pair without a transform counts as it was before registration.
    """
    before = {key(r)[:3]: r for r in rows if r["configuration"] == UNREGISTERED}
    tables: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        first = before[key(row)[:3]]
        filled = {name: first[name] for name in measures([first])} | row
        tables.setdefault(row["set"], {}).setdefault(row["configuration"], []).append(filled)
    return {
        "summary": {
            one: {name: summarise_one(found) for name, found in table.items()}
            for one, table in tables.items()
        },
        "above": {
            one: {
                name: {other: better(table[name], table[other]) for other in table if other != name}
                for name in table
                if name in ours
            }
            for one, table in tables.items()
        },
    }


#: What a row may say of a transform, in the order of the tables.
MEASURES = (
    "error",
    "error_95",
    "mean_dice",
    "weighted_dice",
    "hd95",
    "folding",
    "folding_inside",
    "ndv",
)


def measures(rows: Sequence[Row]) -> list[str]:
    """Which of them there are."""
    return [name for name in MEASURES if any(row.get(name) is not None for row in rows)]


def summarise_one(rows: Sequence[Row]) -> dict[str, Any]:
    """One configuration on the pairs of one set."""
    score = score_of(rows)
    seconds = [row["seconds"] for row in rows]
    values = [row[score] for row in rows]

    def mean(name: str) -> float:
        there = [row[name] for row in rows if row.get(name) is not None]
        return float(f"{statistics.fmean(there):.5g}")

    return {
        "pairs": len(rows),
        "failed": sum(row["failed"] is not None or row["timed_out"] for row in rows),
        **{name: mean(name) for name in measures(rows)},
        "interval": interval(values, [row["cluster"] for row in rows]),
        "seconds": round(statistics.fmean(seconds), 3),
        "seconds_largest": max(seconds),
    }


def better(ours: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """The mean gain on the pairs that both have, positive where ours is better."""
    name = score_of(ours)
    sign = -1 if name == "error" else 1
    return compare(ours, other, name, lambda row: sign * row[name])


def table(content: dict[str, Any]) -> str:
    """The summary for the terminal; shares of folded voxels and volume in percent."""
    lines = []
    for name, configurations in content["summary"].items():
        columns = [c for c in MEASURES if any(c in s for s in configurations.values())]
        titles = [f"{c}%" if c in MEASURES[-3:] else c for c in columns]
        lines += ["", f"{name:36}" + "".join(f"{t:>16}" for t in titles) + f"{'s':>9} failed"]
        for configuration, s in configurations.items():
            cells = [
                s.get(c, math.nan) * (100 if c in MEASURES[-3:] else 1)  # shares
                for c in columns
            ]
            lines.append(
                f"{configuration:36}"
                + "".join(f"{cell:16.4f}" for cell in cells)
                + f"{s['seconds']:9.2f} {s['failed']:3d}/{s['pairs']}"
            )
    return "\n".join(lines)


# --- The run --------------------------------------------------------------------------------

#: :func:`benchmark_classical.register_all` with the measures and tables of this module.
register_all = functools.partial(
    benchmark_classical.register_all, measure=measure, summary=summarise, show=table
)
