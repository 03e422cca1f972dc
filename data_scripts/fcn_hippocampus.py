"""Li and Fan's table on real hippocampi: FCN and its variants beside peers, on the same pairs.

    REGLIB_DATA=FOLDER python data_scripts/fcn_hippocampus.py pack    # volumes -> one file
    python data_scripts/fcn_hippocampus.py train [NAME ...]           # every network and seed
    python data_scripts/fcn_hippocampus.py test                       # every configuration, once

    python data_scripts/fcn_hippocampus.py test --split validation --pairs 3

is for development: other pairs, nothing in results/. Without a command all three run.

Data: 200 crops of the Medical Segmentation Decathlon, Task04 (CC BY-SA 4.0), in the committed split
of 150, 20 and 30, cropped or padded to 48 x 64 x 48 voxels of 1 mm about the middle of the crop,
each scaled by itself. Every crop was cut around its structure, so the middle knows already where
the hippocampus is; both sides of one person may occur, in different parts of the split too, as the
files do not tell (all crops look like left ones). Everyone, peers included, is given these boxes.

Networks are trained on pairs of different training members, each for the same time on one thread,
as many at once as there are cores; a run that was stopped goes on from its checkpoint. Those that
``NETWORKS`` names are compared; every setting was chosen on validation members. Test pairs: the 30
members in groups of three, in each of which everyone is moving to the next.

``test`` has the peers of peers.py and ours register the same NIfTI files in processes of their own,
with two threads, and measures everything from the fields that come back. Each configuration sees
the test pairs once; ``runs`` is the ledger. What is measured goes into build/fcn_hippocampus/ at
once, and a stopped run continues there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_classical
import numpy as np
import peers
import torch
from benchmark_classical import Case, Loaded, Workers, run_reglib
from benchmark_record import UNREGISTERED, Record, Row, key, table
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data.datasets import hippocampus
from reglib.data.nifti import Image
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import classical, fcn
from reglib.methods.network import Network
from reglib.objectives.metrics import dice
from reglib.objectives.regularity import diffusion, total_variation
from reglib.objectives.similarity import lncc, ncc
from reglib.objectives.surface import hd95
from reglib.training import fit
from reglib.weights import load_weights, save_weights

SPLITS = ROOT / "data_scripts" / "splits.json"
WORK = ROOT / "build" / "fcn_hippocampus"
PACKED = WORK / "hippocampus.npz"
TRAINING = WORK / "training.json"
RESULTS = ROOT / "results" / "fcn_hippocampus.json"
SEEDS = (0, 1, 2)
#: Of the training of each network, on one thread.
SECONDS = 600.0
#: Between two looks at the validation pairs.
VALIDATE_EVERY = 100


# --- Data -----------------------------------------------------------------------------------


class Members(NamedTuple):
    """Boxes of one part of the split: float32 images in [0, 1], int64 labels, ``(N, 1, *S)``."""

    names: list[str]
    images: Tensor
    labels: Tensor


def pack(path: Path = PACKED) -> None:
    """Read the volumes of every part and write one compressed file of bytes."""
    parts = json.loads(SPLITS.read_text())["hippocampus"]
    arrays: dict[str, np.ndarray] = {}
    for part, names in parts.items():
        population = hippocampus(origin="msd", members=names)
        arrays[f"{part}/images"] = (255 * population.images).round().byte().numpy()
        arrays[f"{part}/labels"] = population.labels.byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, path)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


@functools.cache
def load(part: str) -> Members:
    """The members of a part of the split, in its order."""
    if not PACKED.is_file():
        raise SystemExit(f"{PACKED.name} is missing: run the command pack first")
    names = list(json.loads(SPLITS.read_text())["hippocampus"][part])
    with np.load(PACKED) as file:
        images, labels = (torch.from_numpy(file[f"{part}/{kind}"]) for kind in ("images", "labels"))
    return Members(names, images.float() / 255, labels.long())


class RandomPairs:
    """An endless stream of pairs of different members.

    It says where it is and can be put there again, for a training that is resumed.
    """

    def __init__(self, images: Tensor, batch: int, seed: int) -> None:
        self.images, self.batch = images, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.images)
        while True:
            fixed = torch.randint(n, (self.batch,), generator=self.generator)
            others = torch.randint(1, n, (self.batch,), generator=self.generator)
            yield self.images[(fixed + others) % n], self.images[fixed]

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])


def cases(members: Sequence[str]) -> list[Case]:
    """In groups of three, everyone is moving to the next, and the last to the first."""
    found = []
    for cluster in range(len(members) // 3):
        group = members[3 * cluster : 3 * cluster + 3]
        for k, moving in enumerate(group):
            found.append(Case("hippocampus", moving, group[(k + 1) % 3], cluster))
    return found


def pairs_of(part: str) -> tuple[Tensor, ...]:
    """The pairs of ``cases`` as tensors: moving, fixed, moving labels, fixed labels."""
    members = load(part)
    place = {name: n for n, name in enumerate(members.names)}
    found = cases(members.names)
    moving, fixed = ([place[getattr(c, x)] for c in found] for x in ("moving", "fixed"))
    return (
        members.images[moving],
        members.images[fixed],
        members.labels[moving],
        (members.labels[fixed]),
    )


# --- Networks -------------------------------------------------------------------------------


class UNet(nn.Module):
    """MONAI's VoxelMorph as it comes: a U-Net, and its velocity integrated at half resolution."""

    def __init__(self) -> None:
        super().__init__()
        from monai.networks.nets import VoxelMorph

        self.voxelmorph = VoxelMorph()
        self.card: dict[str, Any] = {
            "input": {"channels": 1, "range": [0.0, 1.0], "size_multiple": 16}
        }

    def forward(self, moving: Tensor, fixed: Tensor) -> fcn.Output:
        """The field, as the only level of an output that the objective of FCN understands."""
        field = self.voxelmorph(moving, fixed)[1]
        return fcn.Output(field, (fcn.Level(1, field),))


class Recipe(NamedTuple):
    """How a network is made and trained; every value is JSON but the functions."""

    kind: str
    objective: dict[str, Any]
    lr: float
    batch: int

    def network(self) -> nn.Module:
        """A new one."""
        if self.kind == "VoxelMorph":
            return UNet()
        return fcn.ComposedFCN() if self.kind == "composed" else fcn.FCN(fcn.PRESETS[self.kind])

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        named = {k: getattr(v, "__name__", v) for k, v in self.objective.items()}
        return self._asdict() | {"objective": named, "seconds": SECONDS}


AS_THE_PAPER: dict[str, Any] = {
    "similarity": ncc,
    "regularity": total_variation,
    "regularity_weight": 0.03,
}
LOCAL: dict[str, Any] = {"similarity": lncc, "regularity": diffusion, "regularity_weight": 1.0}

NETWORKS: dict[str, Recipe] = {
    "FCN": Recipe("paper", AS_THE_PAPER, 1e-3, 4),
    "FCN, no pooling": Recipe("no pooling", AS_THE_PAPER, 1e-3, 1),
    "FCN, interpolated": Recipe("interpolated", AS_THE_PAPER, 1e-3, 4),
    "FCN, composed": Recipe("composed", LOCAL, 1e-3, 2),
    "MONAI VoxelMorph": Recipe("VoxelMorph", LOCAL, 1e-3, 2),
}


def weights_of(name: str, seed: int) -> Path:
    """Where a trained network lies."""
    return WORK / f"{name.lower().replace(', ', '_').replace(' ', '_')}_{seed}.safetensors"


@torch.no_grad()
def correlation(network: nn.Module, moving: Tensor, fixed: Tensor) -> float:
    """Mean correlation of the warped and the fixed images: figure 2 of the paper."""
    pairs = zip(moving.split(1), fixed.split(1), strict=True)
    values = [1 - float(ncc(warp(m, network(m, f).field), f)) for m, f in pairs]
    return round(statistics.fmean(values), 5)


@torch.no_grad()
def overlap(network: nn.Module, pairs: Sequence[Tensor]) -> float:
    """Mean Dice of the whole hippocampus."""
    values = []
    for moving, fixed, *labels in zip(*(x.split(1) for x in pairs), strict=True):
        field = network(moving, fixed).field
        values.append(whole_dice(warp_labels(labels[0], field), labels[1]))
    return round(statistics.fmean(values), 5)


def whole_dice(warped_labels: Tensor, fixed_labels: Tensor) -> float:
    """Dice of both parts together, of one pair."""
    masks = [(labels > 0).long() for labels in (warped_labels, fixed_labels)]
    return float(dice(*masks, labels=[1]))


def train(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train one network and write its weights; goes on from its checkpoint."""
    torch.set_num_threads(1)
    recipe, path = NETWORKS[name], weights_of(name, seed)
    torch.manual_seed(seed)
    network = recipe.network()
    validation = pairs_of("validation")
    history = fit(
        network,
        RandomPairs(load("train").images, recipe.batch, seed),
        functools.partial(fcn.objective, **recipe.objective),
        seconds=seconds,
        lr=recipe.lr,
        checkpoint=path.with_suffix(".checkpoint"),
        every=VALIDATE_EVERY,
        validate=lambda network: -overlap(network, validation),
        validate_every=VALIDATE_EVERY,
        progress=False,
    )
    images = load("train").images[:51]
    record = {
        "network": name,
        "seed": seed,
        "settings": recipe.settings() | {"seconds": seconds},
        "steps": len(history["loss"]),
        "parameters": sum(p.numel() for p in network.parameters()),
        "ncc": {
            "train": correlation(network, images[1:], images[:-1]),
            "validation": correlation(network, *validation[:2]),
        },
        "dice_every": VALIDATE_EVERY,
        "dice": [round(-x, 4) for x in history["validation"] if not math.isnan(x)],
        "loss": [round(statistics.fmean(x), 5) for x in _parts(history["loss"], 100)],
        "provenance": provenance(),
    }
    card = record | {
        "trained_on": "150 crops of the Medical Segmentation Decathlon, Task04 (splits.json)",
        "licence": "weights: Apache-2.0; data: CC BY-SA 4.0 (Simpson et al., arXiv:1902.09063)",
    }
    if isinstance(network, (fcn.FCN, fcn.ComposedFCN)):
        fcn.save(network, path, card=card)
    else:
        save_weights(network, path, card | {"method": "monai", "input": UNet().card["input"]})
    return record


def _parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    size = max(1, len(values) // count)
    return [values[k : k + size] for k in range(0, len(values), size)]


def train_all(names: Sequence[str], seeds: Sequence[int], seconds: float) -> None:
    """Train what is missing, one per core; results go into build/ network by network."""
    path = WORK / "training.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(r["network"], r["seed"]) for r in runs if r["settings"]["seconds"] == seconds}
    tasks = [(n, s) for s in seeds for n in names if (n, s) not in done]
    workers = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=workers) as executor:
        futures = [executor.submit(train, *task, seconds) for task in tasks]
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            same = (record["network"], record["seed"])
            runs = [r for r in runs if (r["network"], r["seed"]) != same] + [record]
            write_json(path, runs)
            print(f"{number}/{len(tasks)}", *same, record["steps"], record["dice"][-1])


@functools.cache
def trained(path: str) -> nn.Module:
    """A network from its file."""
    state, card = load_weights(path)
    if card["method"] != "monai":
        return fcn.load(path)
    network = UNet()
    network.load_state_dict(state)
    return network.eval()


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
    for name in NETWORKS:
        for seed in SEEDS:
            path = weights_of(name, seed)
            own = {"package": "reglib", "weights": str(path.relative_to(ROOT))}
            own["sha256"] = digest(path)
            own["training"] = NETWORKS[name].settings()
            found[f"{name}, seed {seed}"] = own
            if name in ("FCN", "FCN, composed") and seed == SEEDS[0]:
                for words, methods in CONTINUED.items():
                    found[f"{name}, {words}"] = own | {"methods": methods}
    return found


def digest(path: Path) -> str | None:
    """Of a file, if it is there: whoever trains again has another configuration."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


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


def test(part: str, pairs: int | None, only: Sequence[str] | None) -> None:
    """Register and measure."""
    final = part == "test"
    if final and provenance()["uncommitted_changes"]:
        raise SystemExit("commit reglib/ and data_scripts/ first: results name a commit")
    everything = cases(load(part).names)[:pairs]
    all_of_them = configurations()
    wanted = {name: all_of_them[name] for name in all_of_them if only is None or name in only}
    untrained = [name for name, s in wanted.items() if "weights" in s and s["sha256"] is None]
    if untrained:
        raise SystemExit(f"not trained yet: {untrained}")
    record = Record(WORK / f"{part}.json", part, RESULTS if final else None)
    tasks = {(*case[:3], name) for case in everything for name in [UNREGISTERED, *wanted]}
    record.begin(wanted, tasks)
    print(f"{len(tasks - record.done)} of {len(tasks)} registrations")
    print(f"load of this machine now: {os.getloadavg()[0]:.1f} (wanted: near 0)", flush=True)
    python = benchmark_classical.make_environment()
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(python, Path(folder), __file__, WORK) as workers,
    ):
        benchmark_classical.measure_all(
            record,
            everything,
            wanted,
            workers.files,
            workers.register,
            load=functools.partial(loaded, part=part),
            measure=measure,
        )
    names = list(all_of_them if final else wanted)
    the_pairs = [case[:3] for case in everything]
    missing = {(*pair, name) for pair in the_pairs for name in names} - record.done
    if missing:
        print(f"{len(missing)} registrations are missing: no {RESULTS.name} is written")
        return
    head = {
        "script": "data_scripts/fcn_hippocampus.py",
        "protocol": __doc__,
        "training": json.loads(TRAINING.read_text()) if TRAINING.exists() else [],
        "parts": extra_means([row for row in record.rows if key(row)[:3] in the_pairs]),
    }
    print(table(record.finish(the_pairs, names, head)))
    for name, means in head["parts"].items():
        print(f"{name:44}", means)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("pack")
    learn = commands.add_parser("train")
    learn.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    learn.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    learn.add_argument("--seconds", type=float, default=SECONDS)
    judge = commands.add_parser("test")
    judge.add_argument("--split", choices=("test", "validation"), default="test")
    judge.add_argument("--pairs", type=int, help="at most so many (validation)")
    judge.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": functools.partial(run_reglib, methods_of=methods_of)})
        return
    if options.command == "pack" or (options.command is None and not PACKED.exists()):
        pack()
    if options.command in ("train", None):
        names = getattr(options, "names", None) or list(NETWORKS)
        unknown = set(names) - set(NETWORKS)
        if unknown:
            raise SystemExit(f"no such network: {sorted(unknown)}; one of {list(NETWORKS)}")
        train_all(names, getattr(options, "seeds", SEEDS), getattr(options, "seconds", SECONDS))
    if options.command in ("test", None):
        part = getattr(options, "split", "test")
        pairs = getattr(options, "pairs", None)
        if part == "test" and pairs is not None:
            parser.error("--pairs: the test pairs are measured all together")
        test(part, pairs, getattr(options, "only", None))


if __name__ == "__main__":
    main()
