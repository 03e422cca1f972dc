"""The pairs and the networks of GeoReg's synthetic table, and how they are trained.

See georeg_synthetic.py. As a job of ``make gpu`` that names network, seed, steps, batch and
dimensions it trains one of them. Nothing but torch, numpy, safetensors and the library is imported,
and MONAI for VoxelMorph.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import brains
import numpy as np
import torch
import trainings
from oct_phantom import piecewise
from provenance import ROOT, write_json
from table_networks import AnyNetwork, UNet, save, trained
from torch import Tensor, nn
from torch.nn import functional
from trainings import Stream, Trainings

from reglib.geometry.affine import affine_field, affine_matrix, grid_centre
from reglib.geometry.sampling import transform_grid, warp, warp_labels
from reglib.geometry.smoothing import gaussian_smooth, pool, pyramid
from reglib.methods import fcn, georeg
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import diffusion, total_variation
from reglib.objectives.similarity import lncc, ncc
from reglib.synth import brownian_field
from reglib.training import fit

WORK = ROOT / "build" / "georeg_synthetic"
TRAININGS = Trainings(WORK, ROOT / "data_scripts" / "georeg_synthetic_steps.json", seconds=450.0)
SEEDS = (0, 1, 2)
#: The network that travels with the package.
EMBEDDED = "GeoReg, varied"
WEIGHTS = ROOT / "reglib" / "methods" / georeg.WEIGHTS.format("brain_slices")
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
#: What grows with the strength: one part, or all of them. There is noise in each, as in the paper's
#: table, and the least of it where it does not grow.
FAMILIES = (*AMOUNTS, "all")
LEAST = {"Brownian": AMOUNTS["Brownian"][0]}
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
    least = LEAST.get(part, 0.0)
    own = [
        AMOUNTS[part][cell.strength - 1] if cell.family in (part, "all") else least
        for cell in cells
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

    ``fixed = moving(x + u(x))`` and noise, where beyond the image is 0 (of two subjects: the other
    one's image, deformed). ``mask`` is where the fixed grid shows the brain, which implies that
    x + u(x) is in the image.
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


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """With noise, within [0, 1]."""
    noise = torch.randn(images.shape, generator=generator, device=generator.device)
    return (images + NOISE * noise).clamp(0, 1)


def deformed(images: Tensor, cells: Sequence[Cell], generator: torch.Generator) -> Pairs:
    """A pair of every image ``(B, 1, *S)``, deformed at random as its cell says."""
    if len(images) != len(cells):
        raise ValueError(f"cells: wanted {len(images)}, one for each image, got {len(cells)}")
    field = deformation(images.shape[2:], cells, generator)
    fixed = warp(images, field, padding="zeros")
    mask = (warp_labels((images > 0).long(), field) > 0) & inside(field)
    return Pairs(images, noisy(fixed, generator), field, mask)


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as another scanner might show them, in [0, 1]; what is 0 stays dark.

    Intensities go through a curve that rises through four equal parts, up to six times as steeply
    in one as in another; a smooth factor between 0.7 and 1.3 shades them; a Gaussian of up to one
    voxel blurs them. Noise comes last: without it, what a blur leaves around a brain is correlated,
    and a network is paid for filling the background with the brain's rim.

    Args:
        images: ``(B, 1, *S)`` in [0, 1].
        generator: source of randomness.
    """
    b, d, device = len(images), images.ndim - 2, generator.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    rises = 0.2 + draw(b, 4)
    heights = functional.pad(rises.cumsum(1) / rises.sum(1, keepdim=True), (1, 0))
    knots = torch.linspace(0, 1, 5, device=device).expand(b, 5)
    found = piecewise(images.flatten(1), knots, heights).view_as(images)
    mode = "bilinear" if d == 2 else "trilinear"
    shade = functional.interpolate(
        draw(b, 1, *(3,) * d), images.shape[2:], mode=mode, align_corners=True
    )
    found = gaussian_smooth(found * (0.7 + 0.6 * shade), float(draw(1)))
    brightest = found.flatten(1).amax(1).view(b, 1, *(1,) * d)
    return noisy(found / brightest.clamp(min=1e-6), generator)


class DeformedPairs(Stream):
    """An endless stream of images and themselves deformed, all cells equally often.

    Args:
        images: ``(subjects * planes, 1, *S)``, all planes of a subject after each other.
        batch: pairs.
        seed: of the draws.
        planes: of each subject.
        others: every second fixed image is of another subject, in the same plane, and both images
            are :func:`varied`.
        told: also give the truth, and where it is known; of two subjects it is how the fixed one
            was deformed.
    """

    def __init__(
        self,
        images: Tensor,
        batch: int,
        seed: int,
        *,
        planes: int = 1,
        others: bool = False,
        told: bool = False,
    ) -> None:
        super().__init__(seed, images.device)
        self.images, self.batch, self.planes = images, batch, planes
        self.others, self.told = others, told

    def _draw(self, count: int) -> Tensor:
        size, device = (self.batch,), self.images.device
        return torch.randint(count, size, generator=self.generator, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Moving and fixed, without end; as :class:`Pairs` where they are told."""
        count = len(self.images)
        while True:
            place = self._draw(count)
            cells = [CELLS[n] for n in self._draw(len(CELLS)).tolist()]
            if not self.others:
                pairs = deformed(self.images[place], cells, self.generator)
            else:
                away = self.planes * self._draw(count // self.planes) * self._draw(2)
                pairs = deformed(self.images[(place + away) % count], cells, self.generator)
                moving = varied(self.images[place], self.generator)
                pairs = pairs._replace(moving=moving, fixed=varied(pairs.fixed, self.generator))
            yield pairs if self.told else pairs[:2]


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


def pair_of(part: str, place: int, cell: Cell, dimensions: int = 2, pooled: int = 1) -> Pairs:
    """The one pair that tuning or test has of a subject and a cell, ``(1, 1, *S)``.

    The field is in voxels of the images, of 2 mm or of ``pooled`` times as much.
    """
    seed = 1000 * (1 + list(PARTS).index(part)) + len(CELLS) * place + CELLS.index(cell)
    image = pool(load(part, dimensions).images[place : place + 1], pooled)
    return deformed(image, [cell], torch.Generator().manual_seed(seed))


def tuning_pairs(count: int, dimensions: int = 2, pooled: int = 1) -> Pairs:
    """So many tuning pairs of every cell, of all subjects in turn."""
    subjects = len(load("tuning", dimensions).subjects)
    found = [
        pair_of("tuning", (count * number + k) % subjects, cell, dimensions, pooled)
        for number, cell in enumerate(CELLS)
        for k in range(count)
    ]
    return Pairs(*map(torch.cat, zip(*found, strict=True)))


def endpoint_error(field: Tensor, pairs: Pairs) -> Tensor:
    """Mean distance of a field from the truth within the mask, voxels, ``(B,)``."""
    apart = torch.linalg.vector_norm(field - pairs.field, dim=1, keepdim=True)
    return (apart * pairs.mask).flatten(1).sum(1) / pairs.mask.flatten(1).sum(1)


def off_truth(
    output: georeg.Output | fcn.Output, field: Tensor, mask: Tensor, weights: Sequence[float]
) -> Tensor:
    """How far a network's fields are from the truth within the mask, all of them summed.

    Args:
        output: of the network; where one that is not GeoReg has no field of a level, the means of
            its last one count.
        field: the truth, ``(B, D, *S)`` in voxels; levels are compared with its means.
        mask: ``(B, 1, *S)``.
        weights: of the mean distance at each level, in its voxels, finest first.
    """
    truths = [x / 2**level for level, x in enumerate(pyramid(field, len(weights)))]
    masks = pyramid(mask.to(field), len(weights))
    total = field.new_zeros(())
    if isinstance(output, georeg.Output):
        fields = [(level, found) for level, _, found in output.stages]
    else:
        own = {
            2**level: x / 2**level for level, x in enumerate(pyramid(output.field, len(weights)))
        }
        own |= {factor: x for factor, x in output.levels if factor in own}
        fields = [(level, own[2**level]) for level in range(len(weights))]
    for level, found in fields:
        if weights[level]:
            # Its gradient is finite at 0.
            apart = (found - truths[level]).square().sum(1, keepdim=True).add(1e-4).sqrt()
            inside = masks[level]
            total = total + weights[level] * (apart * inside).sum() / inside.sum()
    return total


# --- Networks ---------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """How a network is made and trained; every value is JSON but the functions."""

    kind: str
    settings: dict[str, Any]
    objective: dict[str, Any]
    lr: float
    batch: int
    seeds: Sequence[int] = SEEDS
    longer: tuple[str, int] | None = None  #: so many times the steps of another
    others: bool = False  #: also pairs of two subjects, and as other scanners show them
    dimensions: int = 2
    pooled: int = 1  #: so many voxels of 2 mm along each axis are one
    watched: int | None = None  #: tuning pairs of each cell; None: ``VALIDATED``
    truth: Sequence[float] | None = None  #: what :func:`off_truth` counts at each level, if at all

    def network(self) -> AnyNetwork:
        """A new one."""
        own = {"dimensions": self.dimensions} | self.settings
        if self.kind == "georeg":
            return georeg.GeoReg(**own)
        if self.kind == "voxelmorph":
            return UNet(**own, near_identity=True)
        if self.kind == "composed fcn":
            return fcn.ComposedFCN(fcn.ComposedSettings(**own))
        return fcn.FCN(fcn.Settings(**own))

    def loss(self) -> Callable[..., dict[str, Tensor]]:
        """What is minimised."""
        module = georeg if self.kind == "georeg" else fcn
        by_images = functools.partial(module.objective, **self.objective)
        weights = self.truth
        if weights is None:
            return by_images

        def told(
            output: georeg.Output | fcn.Output,
            moving: Tensor,
            fixed: Tensor,
            field: Tensor,
            mask: Tensor,
        ) -> dict[str, Tensor]:
            terms: dict[str, Tensor] = by_images(output, moving, fixed)
            return terms | {"truth": off_truth(output, field, mask, weights)}

        return told

    def as_json(self) -> dict[str, Any]:
        """The recipe without functions."""
        names = ("kind", "settings", "lr", "batch") + ("others",) * self.others
        names += ("pooled",) * (self.pooled > 1) + ("truth",) * (self.truth is not None)
        found = {name: getattr(self, name) for name in names}
        return found | {"objective": trainings.named(self.objective)}


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
#: The best of what was tried on tuning pairs (``EXPLORED``).
FINER = SUPERVISED | {"level_weight": [4.0, 1.0, 1.0, 1.0, 1.0]}
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
    "GeoReg, varied": Recipe(
        "georeg", GEOREG, FINER, 2e-3, 4, SEEDS[:1], longer=("GeoReg", 4), others=True
    ),
}


def _but(objective: Mapping[str, Any] | None = None, **settings: Any) -> Recipe:
    """GeoReg's recipe with something else."""
    changed = SUPERVISED | dict(objective or {})
    return Recipe("georeg", GEOREG | settings, changed, 2e-3, 4)


#: A refinement of the finest level as well.
FINEST: dict[str, Any] = {"neighbourhoods": [3, 3, 3, 5, 5], "iterations": [1, 1, 2, 3, 2]}
#: What was tried on tuning pairs to bring GeoReg nearer to the truth, in the same time.
EXPLORED: dict[str, Recipe] = {
    "finest level refined": _but(**FINEST),
    "finest level four times": _but(FINER),
    "half the regularity": _but({"regularity_weight": [0.5, 0.25, 0.1, 0.05, 0.025]}),
    "learned interpolation everywhere": _but(interpolation=2),
    "finest level refined, four times": _but(FINER, **FINEST),
    "without the coarsest": _but(
        {"regularity_weight": [1.0, 0.5, 0.2, 0.1]},
        channels=[8, 16, 32, 64],
        neighbourhoods=[0, 3, 3, 5],
        iterations=[0, 1, 2, 4],
        interpolation=[0, 0, 2],
    ),
}
EXPLORATION = Trainings(
    WORK / "explored", ROOT / "data_scripts" / "georeg_synthetic_explored_steps.json", seconds=450.0
)
EXPLORED_RESULTS = ROOT / "results" / "georeg_synthetic_tuning.json"
#: Those whose field is composed of integrated velocities, so that it does not fold.
DIFFEOMORPHIC = ("VoxelMorph", "FCN, composed")


# --- Training ---------------------------------------------------------------------------------


def stream(recipe: Recipe, seed: int, device: str) -> DeformedPairs:
    """What a network is trained on."""
    images = pool(load("training", recipe.dimensions).images, recipe.pooled).to(device)
    planes = len(TRAINING_PLANES) if recipe.dimensions == 2 else 1
    told = recipe.truth is not None
    return DeformedPairs(images, recipe.batch, seed, planes=planes, others=recipe.others, told=told)


def calibrate(recipes: Mapping[str, Recipe] | None = None, own: Trainings | None = None) -> None:
    """Measure a step of every network and write how many the time allows; ``None``: the table's."""

    def step_of(recipe: Recipe) -> Callable[[], object]:
        network, loss = recipe.network(), recipe.loss()
        pairs = stream(recipe, 0, "cpu")
        return lambda: fit(network, pairs, loss, steps=1, lr=recipe.lr, progress=False)

    each = NETWORKS if recipes is None else recipes
    each = {name: recipe for name, recipe in each.items() if recipe.longer is None}
    (own or TRAININGS).calibrate({name: step_of(recipe) for name, recipe in each.items()})


def steps_of(name: str) -> int:
    """Of a network's training."""
    same, times = NETWORKS[name].longer or (name, 1)
    return times * TRAININGS.steps()[same]


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
    recipe, own = (NETWORKS | EXPLORED)[name], EXPLORATION if name in EXPLORED else TRAININGS
    recipe = recipe._replace(batch=batch or recipe.batch, dimensions=dimensions)
    return train_recipe(name, recipe, seed, steps, path or own.weights(name, seed))


def train_recipe(
    name: str,
    recipe: Recipe,
    seed: int,
    steps: int | None,
    path: Path,
    threads: int = 1,
    *,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Train a network of a recipe and write its weights; goes on from its checkpoint.

    Args:
        name: of the network, for the record.
        recipe: how it is made and trained.
        seed: of its first weights and of the pairs.
        steps: of the optimiser, at most; ``None`` for as many as there is time for.
        path: of the weights.
        threads: to train on, where there is no GPU.
        seconds: of the training, at most; ``None`` for no limit.

    Returns:
        What is known about the training, JSON; errors are in voxels of the recipe's images.
    """
    device = trainings.begin(seed, threads)
    network = recipe.network().to(device)
    pairs = tuning_pairs(recipe.watched or VALIDATED, recipe.dimensions, recipe.pooled)
    watched = Pairs(*(x.to(device) for x in pairs))
    found, errors = trainings.learn(
        network,
        stream(recipe, seed, device),
        recipe.loss(),
        path,
        steps=steps,
        seconds=seconds,
        lr=recipe.lr,
        validate=functools.partial(tuning_error, pairs=watched),
        every=VALIDATE_EVERY,
    )
    still = endpoint_error(torch.zeros_like(watched.field), watched).mean()
    training = recipe.as_json() | {"steps": found.pop("steps"), "dimensions": recipe.dimensions}
    record: dict[str, Any] = {"network": name, "seed": seed, "training": training} | found
    record |= {"tuning_every": VALIDATE_EVERY, "tuning_error": errors}
    record["tuning_error_before"] = round(float(still), 4)
    multiple = network.size_multiple if isinstance(network, georeg.GeoReg) else 16
    card = {key: value for key, value in record.items() if key not in ("loss", "tuning_every")} | {
        "input": {"channels": 1, "size_multiple": multiple},
        "trained_on": f"IXI, 100 brains at {2 * recipe.pooled} mm (splits.json), deformed at random"
        + ", onto themselves and each other, as other scanners might show them" * recipe.others,
        "licence": "weights: Apache-2.0; data: CC BY-SA 3.0 (IXI)",
    }
    save(network.cpu(), path, card)
    return record


def embed() -> None:
    """Put the network that travels with the package there."""
    path = TRAININGS.weights(EMBEDDED, NETWORKS[EMBEDDED].seeds[0])
    embed_as(WEIGHTS, path, "RA", 2.0, "data_scripts/georeg_synthetic.py embed")


def embed_as(
    target: Path,
    path: Path,
    orientation: str,
    spacing: float,
    script: str,
    *,
    size: Sequence[int] | None = None,
) -> None:
    """Write a trained GeoReg in half precision, with the form that its images must have.

    Args:
        target: the file to write.
        path: of the weights, which say of their images only what a table needs.
        orientation: of their axes.
        spacing: of these, mm.
        script: the command that does it.
        size: of the one field of view that it knows; ``None`` for any.
    """
    network = georeg.load(path)
    taken: dict[str, Any] = {"range": [0.0, 1.0], "orientation": orientation}
    taken["spacing"] = [spacing] * len(orientation)
    if size is not None:
        taken["size"] = list(size)
    card = network.card | {"input": network.card["input"] | taken, "script": script}
    georeg.save(network.half(), target, card=card)
    print(f"{target}: {target.stat().st_size / 2**20:.2f} MiB")


def train_all(names: Sequence[str]) -> None:
    """Train what is missing."""
    seeds = {name: NETWORKS[name].seeds for name in names}
    TRAININGS.train_missing(train, trainings.tasks(seeds, steps_of), "tuning_error")


@torch.no_grad()
def by_cell(path: Path, pairs: Pairs) -> dict[str, dict[str, float]]:
    """What a trained network gives on the watched pairs of each cell: error and folding."""
    network, found = trained(str(path)), {}
    for number, cell in enumerate(CELLS):
        own = Pairs(*(x[VALIDATED * number :][:VALIDATED] for x in pairs))
        field: Tensor = network(own.moving, own.fixed).field
        values = endpoint_error(field, own), folding(field, mask=own.mask.float())
        error, folds = (float(f"{float(x.mean()):.4g}") for x in values)
        found[cell.name] = {"endpoint_error": error, "folding": folds}
    return found


def explore() -> None:
    """Train what was tried, and write what each gave on tuning pairs, beside GeoReg."""
    if not EXPLORATION.calibration.is_file():
        calibrate(EXPLORED, EXPLORATION)
    every = trainings.tasks(dict.fromkeys(EXPLORED, SEEDS[:1]), EXPLORATION.steps().__getitem__)
    EXPLORATION.train_missing(train, every, "tuning_error")
    pairs, runs = tuning_pairs(VALIDATED), []
    for kept in (TRAININGS, EXPLORATION):
        for run in kept.records():
            if run["training"]["kind"] != "georeg":
                continue
            cells = by_cell(kept.weights(run["network"], run["seed"]), pairs)
            own = {k: v for k, v in run.items() if k != "loss"}
            runs.append(own | {"mean": own["tuning_error"][-1], "cells": cells})
            print(f"{run['network']:34} {run['seed']} {run['tuning_error'][-1]:.3f}")
    about = f"{VALIDATED} tuning pairs of each cell; nothing here has seen a test pair"
    head = {"script": "data_scripts/georeg_synthetic.py explore", "protocol": about}
    write_json(EXPLORED_RESULTS, head | {"runs": runs})


if __name__ == "__main__":
    TRAININGS.do_job(train, __doc__)
