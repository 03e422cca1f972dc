"""GeoReg between subjects, between contrasts and on a phantom of layers, beside its peers.

    REGLIB_DATA=FOLDER python data_scripts/brains.py              # volumes -> one file
    python data_scripts/georeg_subjects.py train [NAME ...]       # every network and seed
    REGLIB_DATA=FOLDER python data_scripts/georeg_subjects.py test

Without a command the last two run. For development there are

    python data_scripts/georeg_subjects.py calibrate              # how many steps to train
    python data_scripts/georeg_subjects.py test --split tuning

of which the latter takes other pairs, but of the third set, and writes nothing into results/.
Leave the machine alone during calibrate and test: seconds count.

The paper (Sideri-Lampretsa et al., arXiv:2412.13294) registers brains of different people, T1 to T1
and T1 to T2, and scans of the retina; its numbers are lost, so these are ours. Four sets, all in
the plane:

- ``T1 to T1``: an axial slice of 2 mm of two test subjects of IXI, 80 x 96, aligned affinely to
  MNI152 as the data are. Test subjects are in groups of three, in each of which everyone is moving
  to the next; structures that both slices show are compared.
- ``T1 to T2``: the same, the fixed slice made like a T2 by a curve of intensities, with noise.
- ``T1 to T2, known``: slices of the two patients of open_ms, who have both contrasts on one grid.
  T1 is moving; fixed is T2, deformed as in the synthetic table (Brownian, middle strength), which
  is the truth. No network has seen a real T2.
- ``layers``: a phantom in place of retinal scans, see oct_phantom.py; its truth is known.

Networks, one of each kind and seed for the three sets of brains and one for the layers, are trained
on one thread, for as many steps as 7.5 minutes of it allowed on the machine that
georeg_subjects_steps.json names. Their recipes are those of the synthetic table
(georeg_synthetic_networks.py); nothing was chosen for these sets. A stopped training goes on from
its checkpoint. The layers have a results file of their own.

``test`` has everyone register the same NIfTI files in processes of their own, with two threads, and
measures everything from the fields that come back. Each configuration sees the test pairs once;
``runs`` is the ledger. What is measured goes into build/georeg_subjects/ at once, and a stopped run
continues there.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import georeg_subjects_networks as networks
import oct_phantom
import peers
import torch
import volumes
from benchmark_classical import CAP, Case, known_or_stop, register_all, regularity, run_reglib
from benchmark_record import UNREGISTERED, Record, Row, key, method_of
from brains import ixi_structures, scaled
from fcn_networks import places
from georeg_subjects_networks import BRAINS, LAYERS
from georeg_synthetic import AFFINE, PIXELS, artificial_pair, overlap
from georeg_synthetic_networks import SEEDS, Cell, Pairs, deformed, endpoint_error, load
from inr_zurich import settings_of
from provenance import ROOT, committed_or_stop
from table_networks import trained
from torch import Tensor
from trainings import table_parser, trained_or_stop

from reglib.data.assets import fetch
from reglib.data.conform import resample
from reglib.data.nifti import Image, read_image
from reglib.methods.classical import Affine, Velocity
from reglib.methods.network import Network
from reglib.objectives.mind import mind
from reglib.objectives.similarity import mutual_information

WORK = networks.WORK
#: What networks are trained for, and where the results of it go.
RESULTS = {
    BRAINS: ROOT / "results" / "georeg_subjects.json",
    LAYERS: ROOT / "results" / "georeg_layers.json",
}
T1, T2, KNOWN = "T1 to T1", "T1 to T2", "T1 to T2, known"

#: Of open_ms: patients, axial planes of the grid of IXI, and deformations of each slice.
PATIENTS, PLANES, DRAWS = ("patient07", "patient19"), (34, 38, 42, 46, 50), 2
#: What deforms them.
CELL = Cell("Brownian", 2)

PROTOCOL: dict[str, Any] = {
    "mean_dice": f"of structures that have {PIXELS} pixels or more in both images; labels warped "
    "nearest; a pair that failed or took too long counts as unregistered.",
    "hd95": "of the same, mean, in pixels (of 2 mm, of brains); one that the transform leaves "
    "nowhere counts with the diagonal of the image.",
    "error": "mean distance from the truth, in pixels (of 2 mm, of brains), where the fixed image "
    "shows the brain, or a layer, and the truth stays in the image.",
    "folding": "share of pixels with a determinant of at most 0; folding_inside without two at "
    "each side; ndv: area that is turned over, as a share.",
    "curve": networks.CURVE,
    "seconds": "wall clock of the call that registers, imports warm, no files read.",
    "interval": "95 %, percentile bootstrap: groups of three subjects, patients, or pairs of "
    "layers are drawn whole; seeds of a network are averaged first. Of two patients that is only "
    "the range of their means.",
    "threads": peers.THREADS,
    "cap_seconds": CAP,
}


# --- Configurations ---------------------------------------------------------------------------

#: Ours without training: methods one after another.
METHODS: dict[str, list[Any]] = {
    "reglib affine + velocity": [Affine(), Velocity()],
    "reglib affine, MI + velocity, MIND": [Affine(mutual_information), Velocity(mind)],
}
PEERS: dict[str, dict[str, Any]] = {
    name: peers.CONFIGURATIONS[name]
    for name in (
        "ANTsPy SyN MI, full resolution",
        "ANTsPy SyN CC, full resolution",
        "SimpleITK affine + demons",
    )
}


def configurations(kind: str) -> dict[str, dict[str, Any]]:
    """Peers, ours, and every network and seed that was trained for that kind of images."""
    found = PEERS | {name: settings_of(methods) for name, methods in METHODS.items()}
    named = [name for name, (_, own) in networks.NETWORKS.items() if own == kind]
    for name, seed in itertools.product(named, SEEDS):
        found[f"{name}, seed {seed}"] = networks.TRAININGS.configuration(name, seed)
    return found


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    if "weights" in settings:
        return [Network(trained(str(ROOT / settings["weights"])))]
    return next(methods for methods in METHODS.values() if settings_of(methods) == settings)


# --- Pairs ------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A pair in memory: labels numbered from 1 or none, and the truth or none."""

    moving: Image
    fixed: Image
    structures: int
    moving_labels: Tensor | None
    fixed_labels: Tensor | None
    truth: Pairs | None


def cases(kind: str, part: str) -> list[Case]:
    """The pairs of a part, ``"test"`` or ``"tuning"``; clusters share no person."""
    if kind == LAYERS:
        count = networks.LAYER_PAIRS[part]
        return [Case(LAYERS, f"{n} before", f"{n} after", n) for n in range(count)]
    names = load(part).subjects
    found = [
        Case(one, names[m], names[f], n // 3)
        for one in (T1, T2)
        for n, (m, f) in enumerate(places(len(names)))
    ]
    if part == "test":  # there are no more than these patients
        found += [
            Case(KNOWN, f"{patient} t1 {plane} {draw}", f"{patient} t2 {plane} {draw}", cluster)
            for cluster, patient in enumerate(PATIENTS)
            for plane in PLANES
            for draw in range(DRAWS)
        ]
    return found


@functools.cache
def patient_volumes(patient: str) -> tuple[Tensor, Tensor]:
    """T1 and T2 of a patient on the grid of IXI, in [0, 1], and 0 where there is no brain."""
    grid = read_image(fetch("ixi_2mm") / "mni152_t1_2mm.nii.gz")
    t1, t2 = (read_image(fetch("open_ms") / f"{patient}_{one}.nii.gz") for one in ("t1", "t2"))
    place = grid.affine, tuple(grid.tensor.shape[2:])
    # Resampling smooths: around the brain is a rim that is not quite 0.
    brain = resample((t1.tensor > 0).float(), t1.affine, *place) > 0.5
    found = (scaled(brain * resample(image.tensor, image.affine, *place)) for image in (t1, t2))
    moving, fixed = (brain * image.clamp_min(1e-6) for image in found)
    return moving, fixed


def load_pair(case: Case, part: str) -> Loaded:
    """A pair of the table."""
    if case.set in (T1, T2):
        names = load(part).subjects
        own = networks.subject_pair(
            part, names.index(case.moving), names.index(case.fixed), t2=case.set == T2
        )
        images = (Image(x, AFFINE) for x in own[:2])
        return Loaded(*images, len(ixi_structures()), *own[2:], None)
    if case.set == KNOWN:
        return known_pair(case.moving)
    number = int(case.moving.split()[0])
    scans = networks.layer_pair(part, number)
    truth = Pairs(scans.moving, scans.fixed, scans.field, scans.fixed_labels > 0)
    images = (Image(x, AFFINE) for x in scans[:2])
    labels = (x.long() for x in scans[2:4])
    return Loaded(*images, len(oct_phantom.LAYERS), *labels, truth)


def known_pair(name: str) -> Loaded:
    """A T1 and the T2 of the same slice, moved by what is known."""
    patient, _, plane, draw = name.split()
    t1, t2 = (volume[..., int(plane)] for volume in patient_volumes(patient))
    seed = networks.SEED_OF_TEST + 100 * PATIENTS.index(patient) + 2 * int(plane) + int(draw)
    pairs = deformed(t2, [CELL], torch.Generator().manual_seed(seed))
    truth = pairs._replace(moving=t1)
    return Loaded(Image(t1, AFFINE), Image(pairs.fixed, AFFINE), 0, None, None, truth)


# --- Measuring --------------------------------------------------------------------------------


def measure(pair: Loaded, u: Tensor) -> dict[str, Any]:
    """Everything about a displacement ``(1, D, *S)`` in pixels."""
    u = u.float()
    found: dict[str, Any] = regularity(u)
    if pair.truth is not None:
        found["error"] = float(f"{float(endpoint_error(u, pair.truth)):.5g}")
    if pair.moving_labels is not None:
        assert pair.fixed_labels is not None
        found |= overlap(u, pair.moving_labels, pair.fixed_labels, pair.structures)
    return found


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row of each pair and method: the mean over its seeds; what failed is as unregistered."""
    before = {key(row)[:3]: row for row in rows if row["configuration"] == UNREGISTERED}
    each: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        still = before[key(row)[:3]]
        whole = {name: still[name] for name in volumes.measures([still])} | row
        each.setdefault((*key(row)[:3], method_of(row["configuration"])), []).append(whole)
    found = []
    for (*_, method), own in each.items():
        names = ("seconds", *volumes.measures(own))
        means = {name: statistics.fmean(row[name] for row in own) for name in names}
        failed = [row["failed"] for row in own if row["failed"] is not None]
        means |= {"timed_out": any(row["timed_out"] for row in own)}
        means |= {"failed": failed[0] if failed else None, "configuration": method}
        found.append(own[0] | means)
    return found


def summarise(rows: Sequence[Row], ours: Collection[str] = ()) -> dict[str, Any]:
    """The summary of volumes.py, seeds averaged first."""
    return volumes.summarise(over_seeds(rows), {method_of(name) for name in ours})


# --- The table --------------------------------------------------------------------------------


Configurations = dict[str, dict[str, Any]]


def asked_for(only: Sequence[str] | None, again: Sequence[str]) -> dict[str, Configurations]:
    """What is to run of each kind; stops unless all names are known and all weights there."""
    every = {kind: configurations(kind) for kind in RESULTS}
    known_or_stop([*(only or []), *again], {UNREGISTERED}.union(*every.values()))
    found = {
        kind: {name: own for name, own in each.items() if only is None or name in only}
        for kind, each in every.items()
    }
    for wanted in found.values():
        trained_or_stop(wanted)
    return found


def test(kind: str, part: str, wanted: Configurations, again: Sequence[str]) -> None:
    """Register and measure the configurations that are wanted."""
    final = part == "test"
    if final:
        committed_or_stop()
    record = Record(WORK / f"{kind}_{part}.json", part, RESULTS[kind] if final else None)
    record.forget(again)
    trainings = networks.TRAININGS.records()
    register_all(
        record,
        cases(kind, part),
        configurations(kind) if final else wanted,
        functools.partial(load_pair, part=part),
        __file__,
        WORK,
        measure=measure,
        warm=artificial_pair(),
        only=list(wanted),
        head={
            "script": "data_scripts/georeg_subjects.py",
            "protocol": PROTOCOL,
            "training": [run for run in trainings if networks.NETWORKS[run["network"]][1] == kind],
        },
        summary=summarise,
        show=volumes.table,
    )


def main() -> None:
    """Parse the command line."""
    parser, _, judge = table_parser(__doc__, networks.NETWORKS, "tuning")
    judge.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": functools.partial(run_reglib, methods_of=methods_of)})
        return
    if options.command == "calibrate":
        networks.calibrate()
    if options.command in ("train", None):
        names = getattr(options, "names", None) or list(networks.NETWORKS)
        known_or_stop(names, networks.NETWORKS)
        networks.train_all(names)
    if options.command in ("test", None):
        again = getattr(options, "again", [])
        for kind, wanted in asked_for(getattr(options, "only", None), again).items():
            test(kind, getattr(options, "split", "test"), wanted, again)


if __name__ == "__main__":
    main()
