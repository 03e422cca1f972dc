"""The pairs and the networks of GeoReg's synthetic table, and how they are trained.

See georeg_synthetic.py. As a job of ``make gpu`` that names network, seed, steps, batch and
dimensions it trains one of them. Nothing but torch, numpy, safetensors and the library is imported,
and MONAI for VoxelMorph.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import brains
import numpy as np
import timing
import torch
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.geometry.affine import affine_field, affine_matrix, grid_centre
from reglib.geometry.sampling import transform_grid, warp, warp_labels
from reglib.methods import fcn, georeg
from reglib.objectives.regularity import diffusion, total_variation
from reglib.objectives.similarity import lncc, ncc
from reglib.synth import brownian_field
from reglib.training import fit
from reglib.weights import load_weights, save_weights

WORK = ROOT / "build" / "georeg_synthetic"
TRAINING = WORK / "training.json"
#: Steps of every network, and the measured seconds of a step that they come from.
CALIBRATION = ROOT / "data_scripts" / "georeg_synthetic_steps.json"
SEEDS = (0, 1, 2)
#: Of the training of each network, on one thread.
SECONDS = 900.0
#: Between two looks at the tuning pairs, and how many of each cell are looked at.
VALIDATE_EVERY, VALIDATED = 100, 3
#: What the parts of the table are called in splits.json.
PARTS = {"training": "train", "tuning": "validation", "test": "test"}
#: The axial planes of the grid that training takes slices from, and that of tuning and test.
TRAINING_PLANES, PLANE = tuple(range(34, 51, 2)), 42


# --- Deformations -----------------------------------------------------------------------------

#: Standard deviation of what is added to the fixed image, whose range is [0, 1].
NOISE = 0.02
#: Voxels across of the images that the amplitudes and cells of Brownian noise are told for.
ACROSS = 176
SPACINGS = (16.0, 32.0, 64.0)

#: The most there is of each part at three strengths: voxels of an image of 176, degrees about each
#: axis, and shares: of 1, and of the image's side.
AMOUNTS: dict[str, tuple[float, float, float]] = {
    "Brownian": (11.0, 16.0, 22.0),
    "rotation": (15.0, 30.0, 45.0),
    "scaling": (0.1, 0.2, 0.3),
    "translation": (0.1, 0.2, 0.3),
}
#: One part alone, or all of them.
FAMILIES = (*AMOUNTS, "all")
STRENGTHS = (1, 2, 3)


class Cell(NamedTuple):
    """A family of deformations at one strength, 1 to 3."""

    family: str
    strength: int

    @property
    def name(self) -> str:
        """Such as ``rotation 2``."""
        return f"{self.family} {self.strength}"


CELLS = tuple(Cell(family, strength) for family in FAMILIES for strength in STRENGTHS)


def amounts(cells: Sequence[Cell], part: str) -> Tensor:
    """The most there is of one part in each cell, ``(B, 1)``."""
    own = [
        AMOUNTS[part][cell.strength - 1] if cell.family in (part, "all") else 0.0 for cell in cells
    ]
    return torch.tensor(own).unsqueeze(1)


def deformation(shape: Sequence[int], cells: Sequence[Cell], generator: torch.Generator) -> Tensor:
    """Random fields, one of each cell: an affine map about the middle, and fractal noise added.

    All parameters are uniform between minus and plus their amount: angles about each axis, and
    along each axis magnification less 1, shift in sides of the image and noise.

    Args:
        shape: spatial shape ``S``, two or three axes.
        cells: B of them.
        generator: source of randomness.

    Returns:
        Displacement ``(B, D, *S)`` in voxels, on the device of the generator.
    """
    d, b, device = len(shape), len(cells), generator.device
    turns = d * (d - 1) // 2
    drawn = 2 * torch.rand(b, turns + 2 * d, generator=generator, device=device) - 1
    angles, scales, shifts = drawn.tensor_split((turns, turns + d), 1)

    def most(part: str) -> Tensor:
        return amounts(cells, part).to(drawn)

    grid = torch.eye(d + 1, dtype=torch.float64)
    matrix = affine_matrix(
        torch.deg2rad(most("rotation")) * angles,
        most("translation") * shifts * torch.tensor(shape).to(drawn),
        log_scales=(most("scaling") * scales).log1p(),
        shears=torch.zeros_like(angles),
        centre=grid_centre(grid, shape).to(drawn),
    )
    unit = shape[0] / ACROSS
    noise = brownian_field(
        shape, amplitude=1.0, batch=b, spacings=[unit * s for s in SPACINGS], generator=generator
    )
    amplitude = (unit * most("Brownian")).view(b, *(1,) * (d + 1))
    return affine_field(matrix, grid, grid, shape).to(noise) + amplitude * noise


class Pairs(NamedTuple):
    """Images and the truth between them, ``(B, 1, *S)`` but for ``field``, ``(B, D, *S)``.

    ``fixed = moving(x + u(x))`` and noise, where beyond the image is 0. ``mask`` is where the fixed
    grid shows the brain, which implies that x + u(x) is in the image.
    """

    moving: Tensor
    fixed: Tensor
    field: Tensor
    mask: Tensor


def inside(field: Tensor) -> Tensor:
    """Where phi stays in the image: ``(B, 1, *S)``, bool."""
    phi = transform_grid(field)
    last = phi.new_tensor([n - 1 for n in field.shape[2:]]).view(-1, *(1,) * (field.ndim - 2))
    return ((phi >= 0) & (phi <= last)).all(1, keepdim=True)


def deformed(images: Tensor, cells: Sequence[Cell], generator: torch.Generator) -> Pairs:
    """A pair of every image ``(B, 1, *S)``, deformed at random as its cell says."""
    if len(images) != len(cells):
        raise ValueError(f"cells: wanted {len(images)}, one for each image, got {len(cells)}")
    field = deformation(images.shape[2:], cells, generator)
    fixed = warp(images, field, padding="zeros")
    noise = torch.randn(fixed.shape, generator=generator, device=generator.device)
    mask = (warp_labels((images > 0).long(), field) > 0) & inside(field)
    return Pairs(images, (fixed + NOISE * noise).clamp(0, 1), field, mask)


class DeformedPairs:
    """An endless stream of images and themselves deformed, all cells equally often.

    It says where it is and can be put there again, for a training that is resumed.
    """

    def __init__(self, images: Tensor, batch: int, seed: int) -> None:
        self.images, self.batch = images, batch
        self.generator = torch.Generator(images.device).manual_seed(seed)

    def _draw(self, count: int) -> Tensor:
        size, device = (self.batch,), self.images.device
        return torch.randint(count, size, generator=self.generator, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Moving and fixed, without end."""
        while True:
            images = self.images[self._draw(len(self.images))]
            cells = [CELLS[n] for n in self._draw(len(CELLS)).tolist()]
            pairs = deformed(images, cells, self.generator)
            yield pairs.moving, pairs.fixed

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"].cpu())


# --- Images -----------------------------------------------------------------------------------


class Brains(NamedTuple):
    """Images in [0, 1] and labels, both ``(N, 1, *S)``, of one subject each or several."""

    subjects: list[str]
    images: Tensor
    labels: Tensor


@functools.cache
def load(part: str, dimensions: int = 2) -> Brains:
    """Brains of a part: axial slices, several of each subject for training, or volumes."""
    if dimensions == 3:
        return Brains(*brains.load(PARTS[part]))
    planes = list(TRAINING_PLANES if part == "training" else [PLANE])
    subjects = list(json.loads(brains.SPLITS.read_text())["ixi_2mm"][PARTS[part]])
    if not brains.PACKED.is_file():
        raise SystemExit(f"{brains.PACKED.name} is missing: run data_scripts/brains.py first")

    def slices(file: Mapping[str, np.ndarray], kind: str) -> Tensor:
        each = [file[f"{name}/{kind}"][:, :, planes] for name in subjects]
        return torch.from_numpy(np.stack(each)).movedim(-1, 1).flatten(0, 1).unsqueeze(1)

    with np.load(brains.PACKED) as file:
        images, labels = slices(file, "image"), slices(file, "labels")
    names = [name for name in subjects for _ in planes]
    return Brains(names, images.float() / 255, labels)


def pair_of(part: str, place: int, cell: Cell, dimensions: int = 2) -> Pairs:
    """The one pair that tuning or test has of a subject and a cell."""
    seed = 1000 * (1 + list(PARTS).index(part)) + len(CELLS) * place + CELLS.index(cell)
    image = load(part, dimensions).images[place : place + 1]
    return deformed(image, [cell], torch.Generator().manual_seed(seed))


def tuning_pairs(count: int, dimensions: int = 2) -> Pairs:
    """So many tuning pairs of every cell, of all subjects in turn."""
    subjects = len(load("tuning", dimensions).subjects)
    found = [
        pair_of("tuning", (count * number + k) % subjects, cell, dimensions)
        for number, cell in enumerate(CELLS)
        for k in range(count)
    ]
    return Pairs(*map(torch.cat, zip(*found, strict=True)))


def endpoint_error(field: Tensor, pairs: Pairs) -> Tensor:
    """Mean distance of a field from the truth within the mask, voxels, ``(B,)``."""
    apart = torch.linalg.vector_norm(field - pairs.field, dim=1, keepdim=True)
    return (apart * pairs.mask).flatten(1).sum(1) / pairs.mask.flatten(1).sum(1)


# --- Networks ---------------------------------------------------------------------------------


class UNet(nn.Module):
    """MONAI's VoxelMorph with the channels of its documentation, which starts near the identity.

    Args:
        dimensions: 2 or 3 spatial axes.
        integration: of the velocity, squarings; 0 makes its output the displacement.
    """

    def __init__(self, dimensions: int, integration: int) -> None:
        super().__init__()
        from monai.networks.nets import VoxelMorph

        self.voxelmorph = VoxelMorph(spatial_dims=dimensions, integration_steps=integration)
        *_, last = (m for m in self.voxelmorph.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        nn.init.normal_(last.weight, std=1e-5)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.settings = {"dimensions": dimensions, "integration": integration}
        self.card: dict[str, Any] = {}

    def forward(self, moving: Tensor, fixed: Tensor) -> fcn.Output:
        """The field, as the only level of an output that the objective of FCN understands."""
        field = self.voxelmorph(moving, fixed)[1]
        return fcn.Output(field, (fcn.Level(1, field),))


AnyNetwork = georeg.GeoReg | fcn.FCN | fcn.ComposedFCN | UNet


class Recipe(NamedTuple):
    """How a network is made and trained; every value is JSON but the functions."""

    kind: str
    settings: dict[str, Any]
    objective: dict[str, Any]
    lr: float
    batch: int

    def network(self, dimensions: int) -> AnyNetwork:
        """A new one."""
        own = {"dimensions": dimensions} | self.settings
        if self.kind == "georeg":
            return georeg.GeoReg(**own)
        if self.kind == "voxelmorph":
            return UNet(**own)
        if self.kind == "composed fcn":
            return fcn.ComposedFCN(fcn.ComposedSettings(**own))
        return fcn.FCN(fcn.Settings(**own))

    def loss(self) -> Callable[..., dict[str, Tensor]]:
        """What is minimised."""
        module = georeg if self.kind == "georeg" else fcn
        return functools.partial(module.objective, **self.objective)

    def as_json(self) -> dict[str, Any]:
        """The recipe without functions."""
        named = {k: getattr(v, "__name__", v) for k, v in self.objective.items()}
        return self._asdict() | {"objective": named}


#: Levels of 80 x 96 to 5 x 6 nodes. A point of the coarsest sees 40 pixels each way, and moves
#: twice; the finest only interpolates, as in the released configuration for affine and Brownian
#: deformations. Without the last two it learns nothing in minutes.
GEOREG: dict[str, Any] = {
    "channels": [8, 16, 32, 64, 64],
    "neighbourhoods": [0, 3, 3, 5, 5],
    "iterations": [0, 1, 2, 3, 2],
    "interpolation": [0, 0, 2, 2],
    "normalise": True,
    "matching": 2.0,
}


def lncc_of_five(warped: Tensor, fixed: Tensor) -> Tensor:
    """Local correlation in windows of five voxels of a level: nearly all of the coarsest one."""
    return lncc(warped, fixed, window=5)


#: Bending in voxels of a level counts for more than in those of the images: less on coarse levels.
SUPERVISED: dict[str, Any] = {
    "similarity": lncc_of_five,
    "regularity_weight": [1.0, 0.5, 0.2, 0.1, 0.05],
}
LOCAL: dict[str, Any] = {"similarity": lncc, "regularity": diffusion, "regularity_weight": 1.0}
AS_ITS_PAPER: dict[str, Any] = {
    "similarity": ncc,
    "regularity": total_variation,
    "regularity_weight": 0.03,
}

NETWORKS: dict[str, Recipe] = {
    "GeoReg": Recipe("georeg", GEOREG, SUPERVISED, 2e-3, 4),
    "GeoReg, feature warping": Recipe(
        "georeg", GEOREG | {"interpolation": 0, "warp_features": True}, SUPERVISED, 2e-3, 4
    ),
    "VoxelMorph": Recipe("voxelmorph", {"integration": 7}, LOCAL, 1e-3, 4),
    "VoxelMorph, displacement": Recipe("voxelmorph", {"integration": 0}, LOCAL, 1e-3, 4),
    "FCN": Recipe("fcn", {}, AS_ITS_PAPER, 1e-3, 4),
    "FCN, composed": Recipe("composed fcn", {}, LOCAL, 1e-3, 4),
}
#: Those whose field is composed of integrated velocities, so that it does not fold.
DIFFEOMORPHIC = ("VoxelMorph", "FCN, composed")


def weights_of(name: str, seed: int) -> Path:
    """Where a trained network lies."""
    return WORK / f"{name.lower().replace(', ', '_').replace(' ', '_')}_{seed}.safetensors"


def save(network: AnyNetwork, path: Path, card: Mapping[str, Any]) -> None:
    """Write weights and settings as one file."""
    if isinstance(network, UNet):
        save_weights(network, path, {**card, "method": "monai", "settings": network.settings})
    else:
        (georeg if isinstance(network, georeg.GeoReg) else fcn).save(network, path, card=card)


@functools.cache
def trained(path: str) -> AnyNetwork:
    """A network from its file, in evaluation mode."""
    state, card = load_weights(path)
    if card["method"] == "georeg":
        return georeg.load(path)
    if card["method"] != "monai":
        return fcn.load(path)
    network = UNet(**card["settings"])
    network.load_state_dict(state)
    network.card = card
    return network.eval()


# --- Training ---------------------------------------------------------------------------------


def calibrate() -> None:
    """Measure a step of every network, all in turn, and write how many ``SECONDS`` allow."""
    torch.set_num_threads(1)
    begin, before = time.perf_counter(), timing.load()
    images = load("training").images

    def step_of(recipe: Recipe) -> Callable[[], object]:
        network, loss = recipe.network(2), recipe.loss()
        pairs = DeformedPairs(images, recipe.batch, 0)
        return lambda: fit(network, pairs, loss, steps=1, lr=recipe.lr, progress=False)

    calls = {name: step_of(recipe) for name, recipe in NETWORKS.items()}
    found = timing.in_turn(calls, repeats=5)
    steps = {name: int(float(f"{SECONDS / seconds:.2g}")) for name, seconds in found.items()}
    run = timing.run_of("cpu", begin, before, step_seconds=found)
    write_json(CALIBRATION, {"limit_seconds": SECONDS, "steps": steps, "measured": run})
    print(json.dumps(steps, indent=1))


@functools.cache
def steps_of(name: str) -> int:
    """Of a network's training in the plane."""
    if not CALIBRATION.is_file():
        raise SystemExit(f"{CALIBRATION.name} is missing: run the command calibrate first")
    return int(json.loads(CALIBRATION.read_text())["steps"][name])


@torch.no_grad()
def tuning_error(network: nn.Module, pairs: Pairs) -> float:
    """Mean end-point error of pairs, one at a time: a batch of all would need much memory."""
    each = zip(pairs.moving.split(1), pairs.fixed.split(1), strict=True)
    field = torch.cat([network(*images).field for images in each])
    return float(endpoint_error(field, pairs).mean())


def train(
    name: str,
    seed: int,
    steps: int,
    *,
    batch: int | None = None,
    dimensions: int = 2,
    path: Path | None = None,
) -> dict[str, Any]:
    """Train one network on the mixture of all cells and write its weights.

    It goes on from its checkpoint.

    Args:
        name: of the network.
        seed: of its first weights and of the pairs.
        steps: of the optimiser.
        batch: pairs of a step; ``None`` for those of the recipe.
        dimensions: 2 for slices, 3 for volumes.
        path: of the weights; ``None`` for their place in build/.

    Returns:
        What is known about the training, JSON.
    """
    recipe, path = NETWORKS[name], path or weights_of(name, seed)
    recipe = recipe._replace(batch=batch or recipe.batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = recipe.network(dimensions).to(device)
    images = load("training", dimensions).images.to(device)
    watched = Pairs(*(x.to(device) for x in tuning_pairs(VALIDATED, dimensions)))
    history = fit(
        network,
        DeformedPairs(images, recipe.batch, seed),
        recipe.loss(),
        steps=steps,
        lr=recipe.lr,
        checkpoint=path.with_suffix(".checkpoint"),
        every=VALIDATE_EVERY,
        validate=functools.partial(tuning_error, pairs=watched),
        progress=False,
    )
    still = endpoint_error(torch.zeros_like(watched.field), watched).mean()
    record = {
        "network": name,
        "seed": seed,
        "training": recipe.as_json() | {"steps": steps, "dimensions": dimensions},
        "seconds": round(history["seconds"][-1], 1),
        "parameters": sum(p.numel() for p in network.parameters()),
        "tuning_every": VALIDATE_EVERY,
        "tuning_error": [round(x, 4) for x in history["validation"] if not math.isnan(x)],
        "tuning_error_before": round(float(still), 4),
        "loss": [round(statistics.fmean(part), 5) for part in parts(history["loss"], 100)],
        "provenance": provenance(),
    }
    multiple = {"georeg": 2 ** (len(GEOREG["channels"]) - 1)}.get(recipe.kind, 16)
    card = {key: value for key, value in record.items() if key not in ("loss", "tuning_every")} | {
        "input": {"channels": 1, "size_multiple": multiple},
        "trained_on": "IXI, 100 brains at 2 mm (splits.json), deformed at random",
        "licence": "weights: Apache-2.0; data: CC BY-SA 3.0 (IXI)",
    }
    save(network.cpu(), path, card)
    return record


def parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """About so many parts of equal size, or one for each value."""
    size = max(1, len(values) // count)
    return [values[k : k + size] for k in range(0, len(values), size)]


def records() -> list[dict[str, Any]]:
    """Of the trainings that are finished here."""
    found: list[dict[str, Any]] = json.loads(TRAINING.read_text()) if TRAINING.exists() else []
    return found


def train_all(names: Sequence[str]) -> None:
    """Train what is missing, one per core; results go into build/ network by network."""
    runs = records()
    done = {(run["network"], run["seed"]) for run in runs}
    wanted = [(name, seed) for seed in SEEDS for name in names]
    tasks = [(*task, steps_of(task[0])) for task in wanted if task not in done]
    workers = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=workers) as executor:
        futures = [executor.submit(train, *task) for task in tasks]
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            same = (record["network"], record["seed"])
            runs = [run for run in runs if (run["network"], run["seed"]) != same] + [record]
            write_json(TRAINING, runs)
            error = record["tuning_error"][-1]
            print(f"{number}/{len(tasks)}", *same, record["seconds"], error, flush=True)


def main() -> None:
    """Do a job of the GPU queue."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--settings", type=Path, required=True, help="of the job")
    parser.add_argument("--out", type=Path, required=True, help="its folder")
    options = parser.parse_args()
    job = json.loads(options.settings.read_text())
    path = options.out / weights_of(job["network"], job["seed"]).name
    record = train(
        job["network"],
        job["seed"],
        job["steps"],
        batch=job["batch"],
        dimensions=job["dimensions"],
        path=path,
    )
    path.with_suffix(".checkpoint").unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), record)


if __name__ == "__main__":
    main()
