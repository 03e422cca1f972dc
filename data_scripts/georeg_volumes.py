"""GeoReg for whole brains: the network that travels with the package, and what it is worth.

    REGLIB_DATA=FOLDER python data_scripts/brains.py              # volumes -> one file
    python data_scripts/georeg_volumes.py train                   # five hours, two threads
    python data_scripts/georeg_volumes.py embed                   # weights -> reglib/
    REGLIB_DATA=FOLDER python data_scripts/georeg_volumes.py test

For development there are

    python data_scripts/georeg_volumes.py calibrate               # how many steps to train
    python data_scripts/georeg_volumes.py test --split tuning

of which the latter takes other subjects and writes nothing into results/. Leave the machine alone
during calibrate and test: seconds count. What ``make gpu`` trained comes in with

    python data_scripts/georeg_volumes.py add gpu_out/FOLDER

The network sees brains of IXI at 4 mm, 40 x 48 x 40. It is trained as "GeoReg, varied" of
georeg_synthetic.py is on slices: on brains that are turned, magnified, shifted and deformed at
random, onto themselves and onto each other, as other scanners might show them. From the network
for slices it differs in this:

- Its two coarsest levels are told how the images were deformed, besides comparing these; the finer
  ones compare only. It is a departure from the paper, whose networks are never told: of turns about
  three axes there are many more than about one, and time is short.
- At the coarsest level every point sees all of both images (the bottleneck of the released code),
  and steps once, before a level that steps twice.
- Voxels are twice as large, so there are four levels; channels are those that keep the file below
  1 MiB; pairs come by twos, at half the learning rate.

It has as many steps as fit into 75 minutes of two threads on the machine that
georeg_volumes_steps.json names; looking at tuning pairs comes on top. Beside it VoxelMorph and our
composed FCN are trained for as long, on the same pairs (georeg_volumes_others_steps.json), and are
told as much: the latter at its resolutions of 4 and 8 voxels, of the former's only field the means
over so many. GeoReg has three fields at the finer of these and one at the other; that is how they
count. (VoxelMorph takes sizes that are multiples of 16; of what it sees a third is the 0 that is
added.)

``test`` registers volumes of 2 mm, as their owner would, through reglib.registration.register,
which brings them to 4 mm, in the field of view that the network knows, and the field back (or has
them at 2 mm, for networks that a GPU trained: georeg_volumes_networks.py):

- every test subject, deformed by a known field, with noise: six of each family of the synthetic
  table (georeg_synthetic.py), in space, two at each strength;
- ``T1 to T1``: in groups of three, every subject is moving to the next.

Each configuration sees the test pairs once; ``runs`` is the ledger. What is measured goes into
build/georeg_volumes/ at once, and a stopped run continues there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import georeg_synthetic_networks as synthetic
import georeg_volumes_networks as networks
import peers
import torch
import volumes
from benchmark_classical import CAP, Case, chosen, known_or_stop, register_all, run_reglib
from benchmark_record import Record
from brains import ixi_structures
from fcn_networks import places
from georeg_subjects import T1, Loaded, measure, summarise
from georeg_synthetic import PIXELS
from georeg_synthetic import PROTOCOL as SYNTHETIC
from georeg_synthetic_networks import CELLS, Cell, load, pair_of
from georeg_volumes_networks import POOLED
from inr_zurich import settings_of
from provenance import ROOT
from table_networks import trained
from trainings import configuration, table_parser

from reglib.data.nifti import Image
from reglib.geometry.sampling import warp_labels
from reglib.methods import georeg
from reglib.methods.classical import Affine, Velocity
from reglib.methods.network import Network
from reglib.weights import load_weights

WORK = networks.WORK
RESULTS = ROOT / "results" / "georeg_volumes.json"
NAME = "brain_volumes"
WEIGHTS = ROOT / "reglib" / "methods" / georeg.WEIGHTS.format(NAME)

#: mm per voxel of the volumes; axes go to the right, the front and up.
VOXEL = 2.0
AFFINE = torch.diag(torch.tensor([VOXEL, VOXEL, VOXEL, 1.0], dtype=torch.float64))


PROTOCOL: dict[str, Any] = {
    "pairs": "every subject deformed, those of a family at its three strengths alike; and everyone "
    "onto the next in groups of 3, all aligned affinely to MNI152 as the data are.",
    "amounts": synthetic.AMOUNTS,
    "families": SYNTHETIC["families"],
    "noise": synthetic.NOISE,
    "error": SYNTHETIC["endpoint_error"],
    "mean_dice": f"of structures that have {PIXELS} voxels or more in both images; labels warped "
    "nearest; a pair that failed or took too long counts as unregistered.",
    "hd95": "of the same, mean, in voxels of 2 mm; a structure that the transform leaves nowhere "
    "counts with the diagonal of the image.",
    "folding": "share of voxels with a determinant of at most 0; folding_inside without two at "
    "each side; ndv: volume that is turned over, as a share.",
    "tuning_error": "of training: the same error in voxels that the network sees, mean over one "
    f"tuning pair of each cell, every {synthetic.VALIDATE_EVERY} steps.",
    "seconds": "wall clock of the call that registers, imports warm, no files read.",
    "interval": "95 %, percentile bootstrap over subjects, or over groups of three.",
    "above": "by how much ours is better than each of the rest: Dice, or voxels of error where the "
    "truth is known.",
    "threads": peers.THREADS,
    "cap_seconds": CAP,
}


# --- The networks -----------------------------------------------------------------------------


def embed() -> None:
    """Put the network where it travels with the package."""
    script = "data_scripts/georeg_volumes.py embed"
    # Its bottleneck goes by where in the image things are.
    size = [n // POOLED for n in load("tuning", 3).images.shape[2:]]
    path = networks.TRAININGS.weights("GeoReg", 0)
    synthetic.embed_as(WEIGHTS, path, "RAS", POOLED * VOXEL, script, size=size)


# --- Configurations ---------------------------------------------------------------------------

#: Ours: methods one after another; the network comes before those of GeoReg.
METHODS: dict[str, list[Any]] = {
    "reglib affine + velocity": [Affine(), Velocity()],
    "GeoReg": [],
    "GeoReg, then velocity": [Velocity(levels=(4.0, 2.0, 1.0))],
}
PEERS = ("ANTsPy SyN MI, default", "SimpleITK affine + demons")


def configurations() -> dict[str, dict[str, Any]]:
    """Peers, the classical way, the network that travels, the others, and those of 2 mm if any."""
    found = {name: peers.CONFIGURATIONS[name] for name in PEERS}
    weights = configuration(WEIGHTS, training=card().get("training"))
    for name, methods in METHODS.items():
        own = settings_of(methods)
        found[name] = own | weights if name.startswith("GeoReg") else own
    known = {run["network"] for run in networks.TRAININGS.records()}
    finer = [name for name in networks.FINE if name in known]
    for name in (*networks.NETWORKS, *finer):
        if name != "GeoReg":
            found[name] = settings_of([]) | networks.TRAININGS.configuration(name, 0)
    return found


#: What the table says about it.
OF_TRAINING = ("network", "seed", "training", "seconds", "parameters", "tuning_error")
OF_TRAINING += ("tuning_error_before", "provenance")


def card() -> dict[str, Any]:
    """What the network that travels says about itself; nothing where there is none."""
    return load_weights(WEIGHTS)[1] if WEIGHTS.exists() else {}


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    own = {key: value for key, value in settings.items() if key in settings_of([])}
    methods = next(methods for methods in METHODS.values() if settings_of(methods) == own)
    if "weights" in settings:
        # All see what the one that travels has in its card, in voxels of their own.
        pooled = settings["training"].get("pooled", 1)
        size = [n * POOLED // pooled for n in card()["input"]["size"]]
        seen = card()["input"] | {"spacing": [VOXEL * pooled] * 3, "size": size}
        return [Network(trained(str(ROOT / settings["weights"])), seen), *methods]
    return methods


# --- Pairs ------------------------------------------------------------------------------------


def cell_of(place: int, count: int) -> Cell:
    """How a subject, given its place among so many, is deformed: cells are spread evenly."""
    return CELLS[(2 * place + 1) * len(CELLS) // (2 * count)]


def cases(part: str) -> list[Case]:
    """The pairs of a part: every subject deformed, by families, and every subject onto another."""
    names = load(part, 3).subjects
    count = len(names)
    found = [Case(cell_of(n, count).family, name, name, n) for n, name in enumerate(names)]
    every = enumerate(places(count))
    return found + [Case(T1, names[m], names[f], n // 3) for n, (m, f) in every]


def load_pair(case: Case, part: str) -> Loaded:
    """A pair of the table."""
    members, structures = load(part, 3), len(ixi_structures())
    moving, fixed = (members.subjects.index(name) for name in (case.moving, case.fixed))
    labels = members.labels[moving : moving + 1].long()
    if case.set == T1:
        images = [Image(members.images[n : n + 1], AFFINE) for n in (moving, fixed)]
        return Loaded(*images, structures, labels, members.labels[fixed : fixed + 1].long(), None)
    truth = pair_of(part, moving, cell_of(moving, len(members.subjects)), 3)
    images = [Image(x, AFFINE) for x in (truth.moving, truth.fixed)]
    return Loaded(*images, structures, labels, warp_labels(labels, truth.field), truth)


# --- The table --------------------------------------------------------------------------------


def test(part: str, only: Sequence[str] | None, again: Sequence[str]) -> None:
    """Register and measure."""
    final, every = part == "test", configurations()
    wanted = chosen(part, every, only, again)
    if not WEIGHTS.exists():
        raise SystemExit("run the command embed first: all see images as the card says")
    others = (run for run in networks.TRAININGS.records() if run["network"] != "GeoReg")
    trainings = [card(), *others]
    record = Record(WORK / f"{part}.json", part, RESULTS if final else None)
    record.forget(again)
    register_all(
        record,
        cases(part),
        every if final else wanted,
        functools.partial(load_pair, part=part),
        __file__,
        WORK,
        measure=measure,
        only=list(wanted),
        head={
            "script": "data_scripts/georeg_volumes.py",
            "protocol": PROTOCOL,
            "training": [{key: run[key] for key in OF_TRAINING} for run in trainings],
        },
        summary=summarise,
        show=volumes.table,
    )


def main() -> None:
    """Parse the command line."""
    parser, commands, judge = table_parser(__doc__, networks.NETWORKS, "tuning")
    commands.add_parser("embed")
    commands.add_parser("add").add_argument("folder", type=Path)
    judge.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": functools.partial(run_reglib, methods_of=methods_of)})
        return
    if options.command == "calibrate":
        networks.calibrate()
    elif options.command == "train":
        known_or_stop(options.names, networks.NETWORKS, "network")
        networks.train_all(options.names or list(networks.NETWORKS))
    elif options.command == "add":
        networks.TRAININGS.bring_home(options.folder, networks.FINE)
    elif options.command == "embed":
        embed()
    elif options.command == "test":
        test(options.split, options.only, options.again)
    else:
        parser.error("wanted a command: train, embed, test, calibrate or add")


if __name__ == "__main__":
    main()
