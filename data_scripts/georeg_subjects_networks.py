"""The pairs and the networks of GeoReg's table between subjects, and how they are trained.

See georeg_subjects.py. Nothing but torch, numpy, safetensors and the library is imported, and MONAI
for VoxelMorph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import oct_phantom
import torch
import trainings
from fcn_networks import places
from georeg_synthetic_networks import NETWORKS as RECIPES
from georeg_synthetic_networks import SEEDS, TRAINING_PLANES, load, noisy
from oct_phantom import Scans, piecewise
from provenance import ROOT
from table_networks import save
from torch import Tensor, nn
from trainings import Stream, Trainings

from reglib.geometry.sampling import warp_labels
from reglib.objectives.metrics import dice
from reglib.training import fit

WORK = ROOT / "build" / "georeg_subjects"
TRAININGS = Trainings(WORK, ROOT / "data_scripts" / "georeg_subjects_steps.json", seconds=450.0)
VALIDATE_EVERY = 100
#: What the tuning pairs of each kind begin to be counted from, and the test pairs.
SEED_OF_TUNING, SEED_OF_TEST = 4000, 5000
#: Pairs of layers for tuning and for the test.
LAYER_PAIRS = {"tuning": 10, "test": 30}

#: Recipes of the synthetic table, unchanged; each once for brains and once for layers.
METHODS = ("GeoReg", "VoxelMorph", "FCN, composed")
BRAINS, LAYERS = "brains", "layers"
NETWORKS: dict[str, tuple[str, str]] = {
    name if kind == BRAINS else f"{name}, {kind}": (name, kind)
    for kind in (BRAINS, LAYERS)
    for name in METHODS
}


# --- Pairs ------------------------------------------------------------------------------------

#: A T1 like a T2: intensities in T1 and what is shown in their place, linear in between. Background
#: is 0 in both; fluid is about 0.4 in the T1 of IXI, grey matter 0.6 and white matter 0.8; heights
#: are roughly the medians of MNI152's T2 template in ventricles, cortex and white matter. In
#: training each height but the first is off by up to ``JITTER``.
CURVE = {0.0: 0.0, 0.1: 0.3, 0.35: 1.0, 0.57: 0.76, 0.8: 0.54, 1.0: 0.45}
JITTER = 0.15


def remapped(images: Tensor, heights: Tensor | None = None) -> Tensor:
    """Intensities of a T1 ``(B, 1, *S)`` in [0, 1] through a curve, linear between its knots.

    Args:
        images: in [0, 1].
        heights: of the knots, ``(B, 6)``; ``None`` for ``CURVE``.
    """
    knots = images.new_tensor(list(CURVE)).expand(len(images), -1)
    if heights is None:
        heights = images.new_tensor(list(CURVE.values())).expand_as(knots)
    return piecewise(images.flatten(1), knots, heights).view_as(images)


class SubjectPairs(Stream):
    """An endless stream of slices of two subjects in one plane.

    Each fixed image is as likely a T1 as it is a T1 remapped at random, with noise.

    Args:
        images: ``(subjects * planes, 1, *S)``, all planes of a subject after each other.
        planes: of each subject.
        batch: pairs.
        seed: of the draws.
    """

    def __init__(self, images: Tensor, planes: int, batch: int, seed: int) -> None:
        super().__init__(seed, images.device)
        self.images = images.unflatten(0, (-1, planes))
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Moving and fixed, without end."""
        subjects, planes = self.images.shape[:2]
        device = self.images.device

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (self.batch,), generator=self.generator, device=device)

        usual = torch.tensor(list(CURVE.values()), device=device)
        while True:
            first, plane = draw(0, subjects), draw(0, planes)
            second = (first + draw(1, subjects)) % subjects
            off = torch.rand(self.batch, len(CURVE), generator=self.generator, device=device)
            heights = usual + JITTER * (2 * off - 1) * (usual > 0)  # what is dark stays dark
            fixed = self.images[second, plane]
            other = noisy(remapped(fixed, heights.clamp(0, 1)), self.generator)
            chosen = draw(0, 2).view(-1, 1, 1, 1).bool()
            yield self.images[first, plane], torch.where(chosen, other, fixed)


class LayerPairs(Stream):
    """An endless stream of two scans of the phantom."""

    def __init__(self, batch: int, seed: int, device: str = "cpu") -> None:
        super().__init__(seed, device)
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Moving and fixed, without end."""
        while True:
            pair = oct_phantom.scans(self.batch, self.generator)
            yield pair.moving, pair.fixed


class Labelled(NamedTuple):
    """Pairs and their labels, all ``(B, 1, *S)``."""

    moving: Tensor
    fixed: Tensor
    moving_labels: Tensor
    fixed_labels: Tensor


def subject_pair(part: str, moving: int, fixed: int, *, t2: bool) -> Labelled:
    """Slices of two subjects of tuning or test; ``t2``: the fixed one remapped, with noise."""
    members = load(part)
    images, labels = members.images, members.labels.long()
    target = images[fixed : fixed + 1]
    if t2:
        begin = SEED_OF_TEST if part == "test" else SEED_OF_TUNING
        target = noisy(remapped(target), torch.Generator().manual_seed(begin + fixed))
    move = slice(moving, moving + 1)
    return Labelled(images[move], target, labels[move], labels[fixed : fixed + 1])


def layer_pair(part: str, number: int) -> Scans:
    """One pair of the phantom of tuning or test."""
    begin = SEED_OF_TEST if part == "test" else SEED_OF_TUNING
    return oct_phantom.scans(1, torch.Generator().manual_seed(begin + number))


def tuning_pairs(kind: str) -> Labelled:
    """All tuning pairs: of brains in both contrasts, or of layers."""
    if kind == LAYERS:
        pairs = (layer_pair("tuning", n) for n in range(LAYER_PAIRS["tuning"]))
        found = [Labelled(*pair[:4]) for pair in pairs]
    else:
        every = places(len(load("tuning").subjects))
        found = [subject_pair("tuning", *pair, t2=t2) for pair in every for t2 in (False, True)]
    return Labelled(*map(torch.cat, zip(*found, strict=True)))


# --- Training ---------------------------------------------------------------------------------


def stream(kind: str, batch: int, seed: int, device: str) -> Stream:
    """What a network of that kind is trained on."""
    if kind == LAYERS:
        return LayerPairs(batch, seed, device)
    return SubjectPairs(load("training").images.to(device), len(TRAINING_PLANES), batch, seed)


@torch.no_grad()
def not_overlapping(network: nn.Module, pairs: Labelled) -> float:
    """1 - mean Dice of what both images of a pair show, one pair at a time."""
    scores: list[Tensor] = []
    for moving, fixed, *labels in zip(*(x.split(1) for x in pairs), strict=True):
        there = [set(x.unique().tolist()) for x in labels]
        shown = sorted((there[0] & there[1]) - {0})
        warped = warp_labels(labels[0], network(moving, fixed).field)
        scores.append(dice(warped, labels[1], labels=shown).mean())
    return 1 - float(torch.stack(scores).mean())


def train(
    name: str, seed: int, steps: int, *, batch: int | None = None, path: Path | None = None
) -> dict[str, Any]:
    """Train one network and write its weights; goes on from its checkpoint.

    Args:
        name: of the network, among ``NETWORKS``.
        seed: of its first weights and of the pairs.
        steps: of the optimiser.
        batch: pairs of a step; ``None`` for those of the recipe.
        path: of the weights; ``None`` for their place in build/.

    Returns:
        What is known about the training, JSON.
    """
    method, kind = NETWORKS[name]
    recipe, path = RECIPES[method], path or TRAININGS.weights(name, seed)
    recipe, device = recipe._replace(batch=batch or recipe.batch), trainings.begin(seed)
    network = recipe.network().to(device)
    watched = Labelled(*(x.to(device) for x in tuning_pairs(kind)))
    found, values = trainings.learn(
        network,
        stream(kind, recipe.batch, seed, device),
        recipe.loss(),
        path,
        steps=steps,
        lr=recipe.lr,
        validate=functools.partial(not_overlapping, pairs=watched),
        every=VALIDATE_EVERY,
    )
    record: dict[str, Any] = {"network": name, "seed": seed}
    record |= {"training": recipe.as_json() | {"steps": found.pop("steps")}} | found
    record |= {"tuning_every": VALIDATE_EVERY, "tuning_dice": [round(1 - x, 4) for x in values]}
    of = {
        BRAINS: "slices of IXI, 100 brains at 2 mm (splits.json), half of the fixed remapped",
        LAYERS: "a phantom of layers under speckle (data_scripts/oct_phantom.py)",
    }
    licence = {BRAINS: "; data: CC BY-SA 3.0 (IXI)", LAYERS: ""}
    card = {key: value for key, value in record.items() if key not in ("loss", "tuning_every")} | {
        "input": {"channels": 1, "size_multiple": 16},
        "trained_on": of[kind],
        "licence": f"weights: Apache-2.0{licence[kind]}",
    }
    save(network.cpu(), path, card)
    return record


def calibrate() -> None:
    """Measure a step of every network and write how many the time allows."""

    def step_of(name: str) -> Callable[[], object]:
        method, kind = NETWORKS[name]
        recipe = RECIPES[method]
        network, loss = recipe.network(), recipe.loss()
        pairs = stream(kind, recipe.batch, 0, "cpu")
        return lambda: fit(network, pairs, loss, steps=1, lr=recipe.lr, progress=False)

    TRAININGS.calibrate({name: step_of(name) for name in NETWORKS})


def train_all(names: Sequence[str]) -> None:
    """Train what is missing."""
    every = trainings.tasks(dict.fromkeys(names, SEEDS), TRAININGS.steps().__getitem__)
    TRAININGS.train_missing(train, every, "tuning_dice")


if __name__ == "__main__":
    TRAININGS.do_job(train, __doc__)
