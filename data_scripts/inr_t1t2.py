"""INR between T1 and T2 brains in 3-D, beside its peers: known deformations, and labels.

    REGLIB_DATA=FOLDER python data_scripts/inr_t1t2.py

writes results/inr_t1t2.json (under two hours on two cores; leave the machine alone meanwhile):

- ``deformed``: the T1 of each of two patients (open_ms) is fixed, the T2 of the same patient, moved
  by a known smooth diffeomorphism of up to 10 mm, is moving. The error is the distance in mm of
  what was found from what is known, inside the brain, three draws each.
- ``atlas``: T1 brains of IXI to the T2 template of MNI152. The Dice of 29 structures, which
  wmparc_muse.csv names in FreeSurfer's numbers (the template) and in MUSE's (the brains). The two
  protocols draw them differently, so no registration makes them overlap fully.

Both on the grid of ixi_2mm, 2 mm.

    REGLIB_DATA=FOLDER python data_scripts/inr_t1t2.py --split tuning --pairs 1

is for development: the two templates of MNI152 instead of a patient's images, brains of the
validation part; nothing in results/.

Processes and records are those of benchmark_classical.py: what is measured goes into
build/inr_t1t2/ at once, and a stopped run continues there. ``--again NAME`` measures a
configuration anew.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
import volumes
from benchmark_classical import SPLITS, known_or_stop
from benchmark_record import Record
from brains import relabel, scaled
from provenance import ROOT, committed_or_stop
from torch import Tensor
from volumes import CONFIGURATIONS, Case, Loaded, register_all, run_reglib

from reglib.data.assets import fetch
from reglib.data.conform import resample
from reglib.data.nifti import Image, read_image, read_labels
from reglib.geometry.affine import affine_field
from reglib.geometry.fields import integrate
from reglib.geometry.sampling import transform_grid, warp_labels
from reglib.synth import gaussian_diffeomorphism

WORK = ROOT / "build" / "inr_t1t2"
RESULTS = ROOT / "results" / "inr_t1t2.json"
TABLE = ROOT / "data_scripts" / "wmparc_muse.csv"

DEFORMED, ATLAS = "deformed", "atlas"
#: Whose T1 and T2 lie on one grid; the templates are for development.
PATIENTS = {"test": ("patient07", "patient19"), "tuning": ("mni152",)}
DRAWS = 3
#: Brains of the part of ``ixi_2mm``, its first ones.
BRAINS = 10
#: The part of splits.json that is for development.
IXI_PARTS = {"test": "test", "tuning": "validation"}
TEMPLATE = "mni152_t2"

#: Of the known deformations, mm: how far velocities are smooth, and the longest of them, which no
#: displacement exceeds.
SMOOTH, LONGEST = 16.0, 10.0

PROTOCOL = volumes.PROTOCOL | {
    "deformed": f"velocities of Gaussian noise (standard deviation {SMOOTH:g} mm), the longest "
    f"{LONGEST:g} mm; T2 is moved and brought from 1 to 2 mm in one interpolation.",
    "error": "mm, where the T1 shows the brain and the truth lies in the moving image: mean of "
    "the voxels' distances, error_95 their 95th percentile, then means over pairs.",
    "atlas": "as benchmark_classical.py brings intensities to 0 .. 1; labels by wmparc_muse.csv.",
    "clusters": f"a patient, or a brain. In {DEFORMED} there are two only: its interval is the "
    "range of two means.",
}


# --- Labels ---------------------------------------------------------------------------------


class Names(NamedTuple):
    """A structure's labels in both protocols."""

    wmparc: tuple[int, ...]
    muse: tuple[int, ...]


def numbers(text: str) -> tuple[int, ...]:
    """Labels of a cell of the table: "7", "3-5", every second of "3-7/2", and several of these.

    Raises:
        ValueError: if it is none of these.
    """
    found: list[int] = []
    for word in text.split():
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?:/(\d+))?)?", word)
        if not match:
            raise ValueError(f"wanted labels such as 7, 3-5 or 3-7/2, got {word!r}")
        first, last, step = match.groups()
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(found)


def structures() -> dict[str, Names]:
    """The table."""
    with open(TABLE, newline="") as file:
        return {
            row["structure"]: Names(numbers(row["wmparc"]), numbers(row["muse"]))
            for row in csv.DictReader(file)
        }


def numbered(labels: Tensor, protocol: str) -> Tensor:
    """Labels of ``"wmparc"`` or ``"muse"`` as the numbers of structures, from 1.

    Raises:
        ValueError: if a structure is not there.
    """
    found = relabel(labels, [getattr(names, protocol) for names in structures().values()])
    there = set(found.unique().tolist())
    absent = [name for n, name in enumerate(structures(), 1) if n not in there]
    if absent:
        raise ValueError(f"labels: wanted all structures, got none of {absent}")
    return found


# --- Pairs ----------------------------------------------------------------------------------


def cases(split: str, pairs: int | None = None) -> list[Case]:
    """The pairs of a split, at most so many of each kind."""
    found = [
        Case(DEFORMED, f"{patient} t2, draw {draw}", f"{patient} t1", number)
        for number, patient in enumerate(PATIENTS[split])
        for draw in range(DRAWS)
    ][:pairs]
    brains = json.loads(SPLITS.read_text())["ixi_2mm"][IXI_PARTS[split]][:BRAINS]
    return [*found, *(Case(ATLAS, b, TEMPLATE, n) for n, b in enumerate(brains[:pairs]))]


class Grid(NamedTuple):
    """Where everything comes to lie."""

    affine: Tensor
    shape: tuple[int, ...]


@functools.cache
def grid() -> Grid:
    """That of ``ixi_2mm``."""
    image = read_image(fetch("ixi_2mm") / "mni152_t1_2mm.nii.gz")
    return Grid(image.affine, tuple(image.tensor.shape[2:]))


def files_of(patient: str) -> tuple[Path, Path]:
    """T1 and T2 of a patient, or of the templates."""
    if patient == "mni152":
        folder = fetch("mni152_t1_t2")
        return folder / "MNI152_T1_1mm_brain.nii.gz", folder / "MNI152_T2_1mm_brain.nii.gz"
    folder = fetch("open_ms")
    return folder / f"{patient}_t1.nii.gz", folder / f"{patient}_t2.nii.gz"


def deform(t1: Image, t2: Image, place: Grid, generator: torch.Generator) -> Loaded:
    """T1 on a grid, T2 moved there, and by what.

    The moving image shows at ``exp(v)(x)`` what T2 shows at x, so the truth is ``exp(v)``, and T2
    is read through ``exp(-v)``.
    """
    size = place.affine[:3, :3].norm(dim=0)
    if not torch.allclose(size, size[:1]):
        raise ValueError(f"place: wanted a grid of one spacing, got {size.tolist()}")
    truth, velocity = gaussian_diffeomorphism(
        place.shape,
        sigma=SMOOTH / float(size[0]),
        amplitude=LONGEST / float(size[0]),
        generator=generator,
    )
    fixed, moving = (
        scaled(resample(image.tensor, image.affine, *place, field=field))
        for image, field in ((t1, None), (t2, integrate(-velocity)))
    )
    there = transform_grid(truth)
    last = there.new_tensor(place.shape).view(1, 3, 1, 1, 1) - 1
    seen = ((there >= 0) & (there <= last)).all(1, keepdim=True)
    brain = resample((t1.tensor > 0).float(), t1.affine, *place) > 0.5
    return Loaded(
        Image(moving, place.affine), Image(fixed, place.affine), truth=truth, inside=seen & brain
    )


@functools.cache
def template() -> tuple[Image, Tensor]:
    """The T2 template and its structures on the grid."""
    folder, place = fetch("mni152_t1_t2"), grid()
    image = read_image(folder / "MNI152_T2_1mm_brain.nii.gz")
    labels = read_labels(folder / "tpl-MNI152NLin6Asym_res-01_desc-avgwmparc_dseg.nii.gz")
    still = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    field = affine_field(still, place.affine, labels.affine, place.shape)
    values = resample(image.tensor, image.affine, *place)
    return (
        Image(scaled(values), place.affine),
        warp_labels(numbered(labels.tensor, "wmparc"), field.float()),
    )


def load(case: Case) -> Loaded:
    """Make or read a pair."""
    if case.set == DEFORMED:
        # Every pair has a deformation of its own, also those of development and test.
        generator = torch.Generator().manual_seed(zlib.crc32(case.moving.encode()))
        t1, t2 = (read_image(path) for path in files_of(case.fixed.removesuffix(" t1")))
        return deform(t1, t2, grid(), generator)
    folder = fetch("ixi_2mm")
    image = read_image(folder / "t1_brain" / f"{case.moving}.nii.gz")
    labels = read_labels(folder / "dlmuse" / f"{case.moving}.nii.gz")
    fixed, fixed_labels = template()
    return Loaded(
        Image(scaled(image.tensor), image.affine),
        fixed,
        list(structures()),
        numbered(labels.tensor, "muse"),
        fixed_labels,
    )


# --- The run --------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--pairs", type=int, help="at most so many of each kind (tuning)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.serve:
        peers.serve({"reglib": run_reglib})
        return
    test = options.split == "test"
    if test and options.pairs is not None:
        parser.error("--pairs: the test pairs are measured all together")
    if test:
        committed_or_stop()
    known_or_stop([*(options.only or []), *options.again], CONFIGURATIONS)
    record = Record(WORK / f"{options.split}.json", options.split, RESULTS if test else None)
    record.forget(options.again)
    head: dict[str, Any] = {"script": "data_scripts/inr_t1t2.py", "protocol": PROTOCOL}
    head |= {"structures": list(structures())}
    everything = cases(options.split, options.pairs)
    register_all(
        record, everything, CONFIGURATIONS, load, __file__, WORK, head=head, only=options.only
    )


if __name__ == "__main__":
    main()
