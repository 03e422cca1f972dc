"""Li and Fan's table on real hippocampi: FCN and its variants beside peers, on the same pairs.

    REGLIB_DATA=FOLDER python data_scripts/fcn_hippocampus.py pack    # volumes -> one file
    python data_scripts/fcn_hippocampus.py train [NAME ...]           # every network and seed
    python data_scripts/fcn_hippocampus.py test                       # every configuration, once

Without a command these three run. The network that travels with the package, ``EMBEDDED``, is not
trained again for that; for it, and for development, there are

    python data_scripts/fcn_hippocampus.py train "FCN, composed, longer"
    python data_scripts/fcn_hippocampus.py embed                      # weights into the package

    python data_scripts/fcn_hippocampus.py calibrate                  # how many steps to train
    python data_scripts/fcn_hippocampus.py test --split validation --pairs 3

of which the last takes other pairs and writes nothing into results/.

Data: 200 crops of the Medical Segmentation Decathlon, Task04 (CC BY-SA 4.0), in the committed split
of 150, 20 and 30, cropped or padded to 48 x 64 x 48 voxels of 1 mm about the middle of the crop,
each scaled by itself. Every crop was cut around its structure, so the middle knows already where
the hippocampus is; both sides of one person may occur, in different parts of the split too, as the
files do not tell (all crops look like left ones). Everyone, peers included, is given these boxes.

Networks are trained on pairs of different training members, on one thread, as many at once as there
are cores; a run that was stopped goes on from its checkpoint. Each has as many steps as 15 minutes
of one thread allowed on the machine that fcn_steps.json names, so that other machines, and
this one on a busy day, train the same networks. Those of fcn_networks.py are compared, three
seeds of each but of the two variants of the paper's FCN, which have one; ``EMBEDDED`` was trained
for twice the steps, and is measured as the package has it, in half precision. Every setting was
chosen on validation members. Test pairs: the 30 members in groups of three, in each of which
everyone is moving to the next.

``test`` has the peers of peers.py and ours register the same NIfTI files in processes of their own,
with two threads, and measures everything from the fields that come back. Each configuration sees
the test pairs once; ``runs`` is the ledger. What is measured goes into build/fcn_hippocampus/ at
once, and a stopped run continues there.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Sequence
from typing import Any

import benchmark_classical
import benchmark_record
import fcn_networks as networks
import peers
import torch
from benchmark_classical import Case, Loaded, chosen, known_or_stop, register_all, run_reglib
from benchmark_record import Record, Row, summarise
from fcn_networks import EMBEDDED, LOCAL, SEEDS, load, whole_dice
from provenance import ROOT
from table_networks import trained
from torch import Tensor
from trainings import configuration, table_parser

from reglib.data.nifti import Image
from reglib.geometry.sampling import warp_labels
from reglib.methods import classical, fcn
from reglib.methods.network import Network
from reglib.objectives.surface import hd95

WORK = networks.WORK
RESULTS = ROOT / "results" / "fcn_hippocampus.json"


# --- Registering ----------------------------------------------------------------------------

#: The command of the paper: CC of radius 2, SyN[0.25], Gauss[3,0], 100 x 100 x 10.
PAPERS_ANTS: dict[str, Any] = {
    "package": "antspyx",
    "seed": 0,
    "registration": {
        "type_of_transform": "SyN",
        "syn_metric": "CC",
        "syn_sampling": 2,
        "reg_iterations": [100, 100, 10],
        "grad_step": 0.25,
        "flow_sigma": 3,
        "total_sigma": 0,
    },
}

#: Networks that go on on the pair.
GO_ON = ("FCN", "FCN, composed", EMBEDDED)
#: What goes on from the field of a network, on the pair: classes and what is not their default.
CONTINUED = {
    "then velocity": {"Velocity": {"levels": [1.0], "steps": 12, "lr": 0.3}},
    "then training on the pair": {"Instance": {"steps": 20, "lr": 3e-4}},
}


def configurations() -> dict[str, dict[str, Any]]:
    """Peers, and every network and seed; the continued ones start from seed 0."""
    kept = (
        "SimpleITK affine",
        "SimpleITK affine + demons",
        "ConvexAdam",
        "ANTsPy SyN MI, default",
        "ANTsPy SyN CC, full resolution",
    )
    found = {name: peers.CONFIGURATIONS[name] for name in kept}
    found["ANTsPy SyN CC, the paper's command"] = PAPERS_ANTS
    velocity: dict[str, Any] = {"Affine": {}, "Velocity": {}}
    found["reglib affine + velocity"] = {"package": "reglib", "methods": velocity}
    for name, recipe in networks.NETWORKS.items():
        training = recipe.settings() | {"steps": networks.steps_of(name)}
        for seed in recipe.seeds:
            own = configuration(networks.registering(name, seed), training=training)
            found[f"{name}, seed {seed}"] = own
            if name in GO_ON and seed == SEEDS[0]:
                for words, methods in CONTINUED.items():
                    found[f"{name}, {words}"] = own | {"methods": methods}
    return found


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    network = trained(str(ROOT / settings["weights"])) if "weights" in settings else None
    methods: list[Any] = [] if network is None else [Network(network)]
    for name, own in settings.get("methods", {}).items():
        if name == "Instance":
            loss = functools.partial(fcn.objective, **LOCAL)
            methods = [fcn.Instance(network, loss, **own)]  # its first state is the forward pass
        else:
            methods.append(getattr(classical, name)(**own))
    return methods


# --- Measuring ------------------------------------------------------------------------------


def cases(part: str) -> list[Case]:
    """The pairs of a part; each group of three is a cluster."""
    names = load(part).names
    found = enumerate(networks.places(len(names)))
    return [Case("hippocampus", names[m], names[f], n // 3) for n, (m, f) in found]


def loaded(case: Case, part: str) -> Loaded:
    """A pair in memory, voxels of 1 mm."""
    members = load(part)
    m, f = (members.names.index(name) for name in (case.moving, case.fixed))
    affine = torch.eye(4, dtype=torch.float64)
    images = (Image(members.images[k : k + 1], affine) for k in (m, f))
    labels = (members.labels[k : k + 1] for k in (m, f))
    return Loaded(["anterior", "posterior"], *images, *labels)


def measure(case: Loaded, u: Tensor) -> dict[str, Any]:
    """The measures of the benchmark; the Dice that counts is that of the whole hippocampus."""
    row = benchmark_classical.measure(case, u)
    row["anterior"], row["posterior"] = row.pop("dice")
    warped = warp_labels(case.moving_labels, u)
    row["mean_dice"] = round(whole_dice(warped, case.fixed_labels), 5)
    masks = [(labels > 0).long() for labels in (warped, case.fixed_labels)]
    row["hd95"] = round(float(hd95(*masks, labels=[1])), 4)
    return row


def extra_means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each configuration: Dice of both parts, and HD95 in mm."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "hd95" in row:
            found.setdefault(row["configuration"], []).append(row)
    return {
        name: {
            column: round(statistics.fmean(row[column] for row in own), 4)
            for column in ("anterior", "posterior", "hd95")
        }
        for name, own in found.items()
    }


def sums(rows: Sequence[Row], ours: Collection[str]) -> dict[str, Any]:
    """The summary of the benchmark, and what only this table has."""
    return {"parts": extra_means(rows)} | summarise(rows, ours)


def table(content: dict[str, Any]) -> str:
    """The summary for the terminal."""
    parts = [f"{name:44} {means}" for name, means in content["parts"].items()]
    return "\n".join([benchmark_record.table(content), *parts])


def test(part: str, pairs: int | None, only: Sequence[str] | None) -> None:
    """Register and measure."""
    final, every = part == "test", configurations()
    wanted = chosen(part, every, only)
    trainings = [r for r in networks.TRAININGS.records() if r["network"] != EMBEDDED]
    register_all(
        Record(WORK / f"{part}.json", part, RESULTS if final else None),
        cases(part)[:pairs],
        every if final else wanted,
        functools.partial(loaded, part=part),
        __file__,
        WORK,
        measure=measure,
        only=list(wanted),
        head={
            "script": "data_scripts/fcn_hippocampus.py",
            "protocol": __doc__,
            "training": [*trainings, networks.embedded_record()],
        },
        summary=sums,
        show=table,
    )


def main() -> None:
    """Parse the command line."""
    parser, commands, judge = table_parser(__doc__, networks.NETWORKS, "validation")
    for name in ("pack", "embed"):
        commands.add_parser(name)
    judge.add_argument("--pairs", type=int, help="at most so many (validation)")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": functools.partial(run_reglib, methods_of=methods_of)})
        return
    if options.command == "pack" or (options.command is None and not networks.PACKED.exists()):
        networks.pack()
    if options.command in ("calibrate", "embed"):
        {"calibrate": networks.calibrate, "embed": networks.embed}[options.command]()
    if options.command in ("train", None):
        known = list(networks.NETWORKS)
        names = getattr(options, "names", None) or [name for name in known if name != EMBEDDED]
        known_or_stop(names, known, "network")
        networks.train_all(names)
    if options.command in ("test", None):
        part = getattr(options, "split", "test")
        pairs = getattr(options, "pairs", None)
        if part == "test" and pairs is not None:
            parser.error("--pairs: the test pairs are measured all together")
        test(part, pairs, getattr(options, "only", None))


if __name__ == "__main__":
    main()
