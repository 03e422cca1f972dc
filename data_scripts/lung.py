"""One patient's two CT scans of the lungs: landmark errors of classical methods and of networks.

    python data_scripts/pretraining.py --size cpu     # the pretrained encoders, or at least those
    python data_scripts/lung.py

The pair is that of elastix's tests, ``lung_ct``: the baseline scan is fixed, the follow-up moving,
and ten points were marked in both. Methods are given intensities from -1000 to 200 HU and the masks
of the lungs, grown by two voxels so that the wall counts too.

There is no second pair, so there is nothing to train on beforehand: a *network* is a tiny
TransMorph that is optimised on the pair itself at 8 mm, after the affine registration, from scratch
or with an encoder that was pretrained on random images, for the same number of steps. What it has
found is then refined at 2.5 mm by the optimisation of a velocity.

Nothing was chosen on this pair: settings are the library's defaults, those of the size ``cpu`` in
pretraining.json and what is written below. The points measure, and decide nothing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretraining import SIZES, WORK, Run, take_encoder
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data.assets import fetch
from reglib.data.conform import conform_grid, resample
from reglib.data.nifti import Image, read_image, read_labels, voxel_to_world, world_to_voxel
from reglib.geometry.affine import transform_points
from reglib.geometry.sampling import warp, warp_points
from reglib.methods import transmorph
from reglib.methods.classical import Affine, Velocity
from reglib.objectives.metrics import folding, tre
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc
from reglib.registration import Registration, register
from reglib.training import fit, warm_up
from reglib.weights import load_weights

RESULTS = ROOT / "results" / "lung.json"
#: Hounsfield units that become 0 and 1.
WINDOW = (-1000.0, 200.0)
#: Voxels by which the masks grow.
MARGIN = 2
#: Mm per voxel that a network sees.
SPACING = 8.0
#: Mm of the levels: on their own, and after a network.
LEVELS, REFINING = (10.0, 5.0, 2.5), (5.0, 2.5)
STEPS, EVERY = 100, 5
SEEDS = (0, 1, 2)
BRAINS = SIZES["cpu"]


@dataclass(frozen=True)
class Scan:
    """A scan of the pair."""

    image: Image  #: intensities from 0 to 1
    mask: Image  #: 1 in the lungs and close by, 0 elsewhere
    points: Tensor  #: ``(1, N, 3)``, mm (RAS), float64


def read_points(path: Path) -> Tensor:
    """Voxel coordinates ``(1, N, 3)`` of a file of elastix's: "index", their number, the points.

    Raises:
        ValueError: if the file is none of these.
    """
    kind, count, *rows = path.read_text().split("\n", 2)
    numbers = [float(x) for x in "".join(rows).split()]
    if kind.strip() != "index" or len(numbers) != 3 * int(count):
        raise ValueError(f"{path}: wanted 'index', a number N and N rows of 3, got another file")
    return torch.tensor(numbers, dtype=torch.float64).view(1, -1, 3)


def grown(mask: Tensor, voxels: int) -> Tensor:
    """Every voxel ``(B, 1, D, H, W)`` that has one of the mask so close, along each axis."""
    return F.max_pool3d((mask > 0).float(), 2 * voxels + 1, stride=1, padding=voxels)


def load(folder: Path) -> tuple[Scan, Scan]:
    """The follow-up scan, moving, and the baseline, fixed."""
    scans = []
    for name in ("followup", "baseline"):
        image = read_image(folder / f"3DCT_lung_{name}.nii.gz")
        mask = read_labels(folder / f"3DCT_lung_{name}_mask.nii.gz")
        low, high = WINDOW
        seen = ((image.tensor - low) / (high - low)).clamp(0, 1)
        places = read_points(folder / f"3DCT_lung_{name}.txt")
        scans.append(
            Scan(
                Image(seen, image.affine),
                Image(grown(mask.tensor, MARGIN), mask.affine),
                voxel_to_world(places, image.affine),
            )
        )
    moving, fixed = scans
    return moving, fixed


# --- Measuring ------------------------------------------------------------------------------


def errors(found: Tensor, moving: Scan) -> dict[str, Any]:
    """Mm from where the fixed points were carried to their partners: each, mean and largest."""
    apart = tre(found, moving.points, reduction="none")[0]
    return {
        "points": [round(x, 3) for x in apart.tolist()],
        "mean": round(float(apart.mean()), 4),
        "largest": round(float(apart.max()), 3),
    }


def mismatch(warped: Tensor, fixed: Scan) -> float:
    """``lncc`` in windows of 5 voxels within the fixed mask; 0 is best."""
    return round(float(lncc(warped, fixed.image.tensor, window=5, weight=fixed.mask.tensor)), 5)


def measure(done: Registration, moving: Scan, fixed: Scan) -> dict[str, Any]:
    """The row of a registration."""
    assert done.warped is not None
    inside = fixed.mask.tensor
    return errors(done.apply_points(fixed.points, space="ras"), moving) | {
        "lncc": mismatch(done.warped, fixed),
        "folding": float(f"{float(folding(done.field, mask=inside)):.3g}"),
        "seconds": round(done.seconds, 1),
    }


def without(moving: Scan, fixed: Scan) -> dict[str, Any]:
    """The rows of no registration, and of the translation that suits the points best."""
    still = resample(
        moving.image.tensor, moving.image.affine, fixed.image.affine, fixed.image.tensor.shape[2:]
    )
    shift = (moving.points - fixed.points).mean(1, keepdim=True)
    return {
        "unregistered": errors(fixed.points, moving) | {"lncc": mismatch(still, fixed)},
        "best translation of the points": errors(fixed.points + shift, moving)
        | {"mm": [round(x, 3) for x in shift.flatten().tolist()]},
    }


# --- Methods --------------------------------------------------------------------------------


def run(
    moving: Scan,
    fixed: Scan,
    methods: Sequence[Any],
    start: Tensor | None = None,
) -> Registration:
    """Register with the masks."""
    return register(
        moving.image,
        fixed.image,
        methods,
        moving_mask=moving.mask,
        fixed_mask=fixed.mask,
        start=start,
        progress=False,
    )


def new_network(seed: int, weights: Path | None) -> transmorph.TransMorph:
    """An untrained network; with ``weights``, its encoder is the pretrained one."""
    torch.manual_seed(seed)
    network = transmorph.TransMorph(transmorph.PRESETS[BRAINS["preset"]])
    network.card["input"]["spacing"] = [SPACING] * 3
    if weights is not None:
        take_encoder(network, load_weights(weights)[0])
    return network


@dataclass(frozen=True)
class Coarse:
    """The pair as the network sees it, the moving image through the affine registration."""

    moving: Tensor
    fixed: Tensor
    mask: Tensor
    grid: Tensor  #: voxels to mm
    affine: Tensor  #: of the registration


def coarse(moving: Scan, fixed: Scan, affine: Tensor, network: transmorph.TransMorph) -> Coarse:
    """Bring the pair to the network's grid, as :class:`reglib.methods.network.Network` does."""
    contract = network.card["input"]
    grid, shape = conform_grid(
        fixed.image.affine,
        tuple(fixed.image.tensor.shape[2:]),
        spacing=contract["spacing"],
        multiple=contract["size_multiple"],
    )
    images = [
        resample(scan.image.tensor, scan.image.affine, grid, shape, matrix=matrix)
        for scan, matrix in ((moving, affine), (fixed, None))
    ]
    mask = resample(fixed.mask.tensor, fixed.mask.affine, grid, shape)
    return Coarse(*images, mask, grid, affine)


def optimise(
    network: transmorph.TransMorph, pair: Coarse, moving: Scan, fixed: Scan, steps: int
) -> dict[str, Any]:
    """Train the network on the pair; its curves."""

    def objective(output: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        similarity = lncc(warp(x, output.field), y, window=BRAINS["window"], weight=pair.mask)
        return {"similarity": similarity, "regularity": diffusion(output.field)}

    begin = world_to_voxel(fixed.points, pair.grid).float()
    curve: list[dict[str, float]] = []

    @torch.no_grad()
    def look(trained: nn.Module) -> float:
        output = trained(pair.moving, pair.fixed)
        reached = voxel_to_world(warp_points(begin, output.field).double(), pair.grid)
        found = errors(transform_points(reached, pair.affine), moving)
        terms = objective(output, pair.moving, pair.fixed)
        curve.append({"mean": found["mean"]} | {k: round(float(v), 5) for k, v in terms.items()})
        return float(sum(terms.values()))

    look(network.eval())
    history = fit(
        network,
        itertools.repeat((pair.moving, pair.fixed)),
        objective,
        steps=steps,
        lr=BRAINS["finetune"]["lr"],
        schedule=warm_up,
        validate=look,
        validate_every=EVERY,
        progress=False,
    )
    at = [*range(0, steps + 1, EVERY), *([steps] if steps % EVERY else [])]
    return {
        "seconds": round(history["seconds"][-1], 1),
        "curve": [{"step": step} | point for step, point in zip(at, curve, strict=True)],
    }


# --- All of it ------------------------------------------------------------------------------


def rows(
    moving: Scan, fixed: Scan, weights: Path, seeds: Sequence[int], steps: int
) -> Iterator[dict[str, Any]]:
    """Every method's row."""
    affine = run(moving, fixed, [Affine()])
    yield {"method": "affine"} | measure(affine, moving, fixed)
    velocity = run(moving, fixed, [Velocity(levels=LEVELS)], start=affine.affine)
    yield {"method": "affine + velocity"} | measure(velocity, moving, fixed)
    for seed in seeds:
        name = Run("pretrain", "kl", seed).name
        for kind, file in (("scratch", None), ("pretrained", weights / f"{name}.safetensors")):
            network = new_network(seed, file)
            pair = coarse(moving, fixed, affine.affine, network)
            trained = optimise(network, pair, moving, fixed, steps)
            head = {"method": f"network, {kind}", "seed": seed, "steps": steps}
            # The seconds of the network's row are those of one forward pass.
            found = run(moving, fixed, [network], start=affine.affine)
            yield head | measure(found, moving, fixed) | {"optimising": trained}
            head["method"] += " + velocity"
            methods = [network, Velocity(levels=REFINING)]
            found = run(moving, fixed, methods, start=affine.affine)
            yield head | measure(found, moving, fixed)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of a network on the pair")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--weights", type=Path, default=WORK / "cpu", help="pretrained encoders")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    provenance()  # that of the start: the tree may change meanwhile
    torch.set_num_threads(1)
    begin = time.perf_counter()
    moving, fixed = load(fetch("lung_ct"))
    head = {
        "script": "data_scripts/lung.py",
        "settings": {
            "window_hu": WINDOW,
            "mask_margin_voxels": MARGIN,
            "spacing_mm": SPACING,
            "levels_mm": LEVELS,
            "refining_mm": REFINING,
            "preset": BRAINS["preset"],
            "lr": BRAINS["finetune"]["lr"],
            "lncc_window": BRAINS["window"],
            "regularity_weight": 1.0,
            "steps": options.steps,
            "every": EVERY,
        },
        **without(moving, fixed),
    }
    done: list[dict[str, Any]] = []
    for row in rows(moving, fixed, options.weights, options.seeds, options.steps):
        done.append(row)
        seconds = round(time.perf_counter() - begin, 1)
        write_json(
            options.out, head | {"seconds": seconds, "provenance": provenance(), "rows": done}
        )
        print(f"{row['method']}: {row['mean']:.2f} mm, lncc {row['lncc']:.4f}", flush=True)


if __name__ == "__main__":
    main()
