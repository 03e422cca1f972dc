"""The networks of the hippocampus table, and how they are trained: see fcn_hippocampus.py.

    make gpu

trains the paper's network as the paper does, 10,000 steps of 64 pairs, from a job that names
network, steps and batch. Nothing but torch, numpy, safetensors and the library is imported.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import trainings
from provenance import ROOT, write_npz
from table_networks import AnyNetwork, UNet, save
from torch import Tensor, nn
from trainings import Stream, Trainings

from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import fcn
from reglib.objectives.metrics import dice
from reglib.objectives.regularity import diffusion, total_variation
from reglib.objectives.similarity import lncc, ncc
from reglib.training import fit
from reglib.weights import load_weights

SPLITS = ROOT / "data_scripts" / "splits.json"
WORK = ROOT / "build" / "fcn_hippocampus"
PACKED = WORK / "hippocampus.npz"
TRAININGS = Trainings(WORK, ROOT / "data_scripts" / "fcn_steps.json")
#: What was done to the images, for whoever brings others: see ``hippocampus(origin="msd")``.
PREPARED = {"quantile": 0.99, "orientation": "RAS", "spacing": [1.0, 1.0, 1.0]}
SEEDS = (0, 1, 2)
#: Between two looks at the validation pairs.
VALIDATE_EVERY = 100


# --- Data -----------------------------------------------------------------------------------


class Members(NamedTuple):
    """Boxes of one part of the split: float32 images in [0, 1], int64 labels, ``(N, 1, *S)``."""

    names: list[str]
    images: Tensor
    labels: Tensor


def pack() -> None:
    """Read the volumes of every part and write one compressed file of bytes."""
    # Here, as machines that only train have no reader of images.
    from reglib.data.datasets import hippocampus

    parts = json.loads(SPLITS.read_text())["hippocampus"]
    arrays: dict[str, np.ndarray] = {}
    for part, names in parts.items():
        population = hippocampus(origin="msd", members=names)
        arrays[f"{part}/images"] = (255 * population.images).round().byte().numpy()
        arrays[f"{part}/labels"] = population.labels.byte().numpy()
    write_npz(PACKED, **arrays)
    print(f"{PACKED}: {PACKED.stat().st_size / 2**20:.1f} MiB")


@functools.cache
def load(part: str) -> Members:
    """The members of a part of the split, in its order."""
    if not PACKED.is_file():
        raise SystemExit(f"{PACKED.name} is missing: run the command pack first")
    names = list(json.loads(SPLITS.read_text())["hippocampus"][part])
    with np.load(PACKED) as file:
        images, labels = (torch.from_numpy(file[f"{part}/{kind}"]) for kind in ("images", "labels"))
    return Members(names, images.float() / 255, labels.long())


class RandomPairs(Stream):
    """An endless stream of pairs of different members."""

    def __init__(self, images: Tensor, batch: int, seed: int) -> None:
        super().__init__(seed)
        self.images, self.batch = images, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.images)
        while True:
            fixed = torch.randint(n, (self.batch,), generator=self.generator)
            others = torch.randint(1, n, (self.batch,), generator=self.generator)
            yield self.images[(fixed + others) % n], self.images[fixed]


def places(count: int) -> list[tuple[int, int]]:
    """In groups of three, everyone is moving to the next, and the last to the first.

    Returns:
        Moving and fixed, as places among so many members; what is left over is in no pair.
    """
    return [(3 * g + k, 3 * g + (k + 1) % 3) for g in range(count // 3) for k in range(3)]


def pairs_of(part: str) -> tuple[Tensor, ...]:
    """The pairs of a part as tensors: moving, fixed, moving labels, fixed labels."""
    members = load(part)
    moving, fixed = map(list, zip(*places(len(members.names)), strict=True))
    images, labels = members.images, members.labels
    return images[moving], images[fixed], labels[moving], labels[fixed]


# --- Networks -------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """How a network is made and trained; every value is JSON but the functions."""

    kind: str
    objective: dict[str, Any]
    lr: float
    batch: int
    seeds: Sequence[int] = SEEDS
    longer: int = 1  #: times the steps of the calibration

    def network(self) -> AnyNetwork:
        """A new one."""
        if self.kind == "VoxelMorph":
            return UNet()
        return fcn.ComposedFCN() if self.kind == "composed" else fcn.FCN(fcn.PRESETS[self.kind])

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        objective = trainings.named(self.objective)
        return {"kind": self.kind, "objective": objective, "lr": self.lr, "batch": self.batch}


AS_THE_PAPER: dict[str, Any] = {
    "similarity": ncc,
    "regularity": total_variation,
    "regularity_weight": 0.03,
}
LOCAL: dict[str, Any] = {"similarity": lncc, "regularity": diffusion, "regularity_weight": 1.0}

NETWORKS: dict[str, Recipe] = {
    "FCN": Recipe("paper", AS_THE_PAPER, 1e-3, 4),
    "FCN, no pooling": Recipe("no pooling", AS_THE_PAPER, 1e-3, 1, SEEDS[:1]),
    "FCN, interpolated": Recipe("interpolated", AS_THE_PAPER, 1e-3, 4, SEEDS[:1]),
    "FCN, composed": Recipe("composed", LOCAL, 1e-3, 2),
    "MONAI VoxelMorph": Recipe("VoxelMorph", LOCAL, 1e-3, 2),
    "FCN, composed, longer": Recipe("composed", LOCAL, 1e-3, 2, SEEDS[:1], longer=2),
}
#: Which of them travels with the package, and where.
EMBEDDED = "FCN, composed, longer"
WEIGHTS = ROOT / "reglib" / "methods" / fcn.WEIGHTS


def registering(name: str, seed: int) -> Path:
    """Where the weights lie that are measured: of the embedded network, in the package."""
    return WEIGHTS if name == EMBEDDED else TRAININGS.weights(name, seed)


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


def calibrate() -> None:
    """Measure a step of every network and write how many the time allows."""

    def step_of(recipe: Recipe) -> Callable[[], object]:
        network, images = recipe.network(), load("train").images
        objective = functools.partial(fcn.objective, **recipe.objective)
        return lambda: fit(
            network,
            RandomPairs(images, recipe.batch, 0),
            objective,
            steps=1,
            lr=recipe.lr,
            progress=False,
        )

    # What is trained for longer takes steps of the same length.
    each = {name: recipe for name, recipe in NETWORKS.items() if recipe.longer == 1}
    TRAININGS.calibrate({name: step_of(recipe) for name, recipe in each.items()})


def steps_of(name: str) -> int:
    """Of a network's training."""
    recipe, steps = NETWORKS[name], TRAININGS.steps()
    # Of the network that takes steps of the same length.
    alike = (recipe.kind, recipe.batch)
    [same] = [one for one in steps if (NETWORKS[one].kind, NETWORKS[one].batch) == alike]
    return recipe.longer * steps[same]


def train(
    name: str, seed: int, steps: int, *, batch: int | None = None, path: Path | None = None
) -> dict[str, Any]:
    """Train one network and write its weights; goes on from its checkpoint.

    Args:
        name: of the network.
        seed: of its first weights and of the pairs.
        steps: of the optimiser.
        batch: pairs of a step; ``None`` for those of the recipe.
        path: of the weights; ``None`` for their place in build/.
    """
    recipe, path = NETWORKS[name], path or TRAININGS.weights(name, seed)
    recipe, device = recipe._replace(batch=batch or recipe.batch), trainings.begin(seed)
    network = recipe.network().to(device)
    network.card["input"] |= PREPARED
    validation = [x.to(device) for x in pairs_of("validation")]
    images = load("train").images.to(device)
    found, scores = trainings.learn(
        network,
        RandomPairs(images, recipe.batch, seed),
        functools.partial(fcn.objective, **recipe.objective),
        path,
        steps=steps,
        lr=recipe.lr,
        validate=lambda network: -overlap(network, validation),
        every=VALIDATE_EVERY,
    )
    some = images[:51]
    record: dict[str, Any] = {"network": name, "seed": seed}
    record |= {"settings": recipe.settings() | {"steps": found.pop("steps")}} | found
    record["ncc"] = {
        "train": correlation(network, some[1:], some[:-1]),
        "validation": correlation(network, *validation[:2]),
    }
    record |= {"dice_every": VALIDATE_EVERY, "dice": [-x for x in scores]}
    # The card's own settings are the network's.
    others = ("loss", "dice", "dice_every", "settings")
    card = {key: value for key, value in record.items() if key not in others} | {
        "training": record["settings"],
        "loss": recipe.settings()["objective"],
        "trained_on": "150 crops of the Medical Segmentation Decathlon, Task04 (splits.json)",
        "licence": "weights: Apache-2.0; data: CC BY-SA 4.0 (Simpson et al., arXiv:1902.09063)",
    }
    save(network, path, card)
    return record


def embed() -> None:
    """Put the network that travels with the package there, in half precision."""
    path = TRAININGS.weights(EMBEDDED, NETWORKS[EMBEDDED].seeds[0])
    network = fcn.load(path)
    card = network.card | {"script": "data_scripts/fcn_hippocampus.py embed"}
    fcn.save(network.half(), WEIGHTS, card=card)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 2**20:.2f} MiB")


def embedded_record() -> dict[str, Any]:
    """Of the training of the network that travels with the package, as its card has it."""
    card = load_weights(WEIGHTS)[1]
    names = ("network", "seed", "seconds", "parameters", "ncc", "provenance")
    return {name: card[name] for name in names} | {"settings": card["training"]}


def train_all(names: Sequence[str]) -> None:
    """Train what is missing."""
    seeds = {name: NETWORKS[name].seeds for name in names}
    TRAININGS.train_missing(train, trainings.tasks(seeds, steps_of), "dice")


if __name__ == "__main__":
    TRAININGS.do_job(train, __doc__)
