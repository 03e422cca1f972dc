"""The networks of the table of whole brains, and how they are trained: see georeg_volumes.py.

As a job of ``make gpu`` that names network, seed and seconds (500 to 502) it trains one of those
that see 2 mm; none of their settings was tuned. Nothing but torch, numpy, safetensors and the
library is imported, and MONAI for VoxelMorph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import georeg_synthetic_networks as synthetic
from georeg_synthetic_networks import Recipe, lncc_of_five
from provenance import ROOT
from trainings import Trainings, tasks

WORK = ROOT / "build" / "georeg_volumes"
TRAININGS = Trainings(WORK, ROOT / "data_scripts" / "georeg_volumes_steps.json", 4500.0, threads=2)
#: Of the other networks, which were measured later.
OTHERS = Trainings(WORK, TRAININGS.calibration.with_stem("georeg_volumes_others_steps"), 4500.0, 2)
#: So many voxels of 2 mm along each axis are one for the networks that a CPU trains.
POOLED = 2


def _recipe(
    kind: str,
    settings: dict[str, Any],
    objective: dict[str, Any],
    truth: list[float],
    pooled: int = POOLED,
) -> Recipe:
    """Pairs, learning rate and seed are the same for all."""
    return Recipe(
        kind,
        settings,
        objective,
        1e-3,
        2,
        (0,),
        others=True,
        dimensions=3,
        pooled=pooled,
        watched=1,
        truth=truth,
    )


NETWORKS: dict[str, Recipe] = {
    # Levels of 40 x 48 x 40 to 5 x 6 x 5 nodes. The finest only interpolates.
    "GeoReg": _recipe(
        "georeg",
        {
            "channels": [8, 16, 32, 56],
            "neighbourhoods": [0, 3, 3, 3],
            "iterations": [0, 1, 2, 1],
            "interpolation": [0, 2, 2],
            "bottleneck": True,
            "normalise": True,
            "matching": 2.0,
        },
        {
            "similarity": lncc_of_five,
            "regularity_weight": [1.0, 0.5, 0.2, 0.1],
            "level_weight": [4.0, 1.0, 1.0, 1.0],
        },
        [0.0, 0.0, 1.0, 1.0],
    ),
    "VoxelMorph": _recipe("voxelmorph", {"integration": 7}, synthetic.LOCAL, [0.0, 0.0, 3.0, 1.0]),
    "FCN, composed": _recipe("composed fcn", {}, synthetic.LOCAL, [0.0, 0.0, 3.0, 1.0]),
}

#: For a GPU, at 2 mm: each with one more level, so that the coarsest voxels are as long, and GeoReg
#: with the channels of the network for slices, which has as many levels. What is told or weighed at
#: a level of 4 mm is at that of the same length.
FINE: dict[str, Recipe] = {
    "GeoReg, 2 mm": _recipe(
        "georeg",
        {
            "channels": [16, 32, 32, 64, 64],
            "neighbourhoods": [0, 3, 3, 3, 3],
            "iterations": [0, 1, 2, 2, 1],
            "interpolation": [0, 2, 2, 2],
            "bottleneck": True,
            "normalise": True,
            "matching": 2.0,
        },
        synthetic.FINER,
        [0.0, 0.0, 0.0, 1.0, 1.0],
        1,
    ),
    "FCN, composed, 2 mm": _recipe(
        "composed fcn",
        {"channels": [16, 32, 32, 32], "decoder_channels": [32, 32, 32, 32]},
        synthetic.LOCAL | {"level_weights": [1.0, 0.8, 0.6, 0.3]},
        [0.0, 0.0, 0.0, 3.0, 1.0],
        1,
    ),
    "VoxelMorph, 2 mm": _recipe(
        "voxelmorph",
        {"integration": 7, "channels": [16, 32, 32, 32, 32, 32, 32, 32]},
        synthetic.LOCAL,
        [0.0, 0.0, 0.0, 3.0, 1.0],
        1,
    ),
}


def train(
    name: str,
    seed: int,
    steps: int | None,
    *,
    seconds: float | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Train a network and write its weights; goes on from its checkpoint.

    Args:
        name: of the network.
        seed: of its first weights and of the pairs.
        steps: of the optimiser, at most; ``None`` for as many as there is time for.
        seconds: of the training, at most; ``None`` for no limit.
        path: of the weights; ``None`` for their place in build/.
    """
    path, threads = path or TRAININGS.weights(name, seed), TRAININGS.threads
    recipe = (NETWORKS | FINE)[name]
    return synthetic.train_recipe(name, recipe, seed, steps, path, threads, seconds=seconds)


def trainings_of(name: str) -> Trainings:
    """The trainings whose steps were measured together with a network's."""
    return TRAININGS if name == "GeoReg" else OTHERS


def steps_of(name: str) -> int:
    """Of a network's training."""
    return trainings_of(name).steps()[name]


def calibrate() -> None:
    """Measure the steps of what was not measured yet."""
    for own in (TRAININGS, OTHERS):
        if own.calibration.is_file():
            print(f"kept: {own.calibration.name}; delete it to measure again")
        else:
            recipes = {n: recipe for n, recipe in NETWORKS.items() if trainings_of(n) is own}
            synthetic.calibrate(recipes, own)


def train_all(names: Sequence[str]) -> None:
    """Train what is missing."""
    seeds = {name: NETWORKS[name].seeds for name in names}
    TRAININGS.train_missing(train, tasks(seeds, steps_of), "tuning_error")


if __name__ == "__main__":
    TRAININGS.do_job(train, __doc__)
