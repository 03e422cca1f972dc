"""INR: two coordinate networks that are trained on one pair and on nothing else.

An image network f stores images as a function of coordinates, a motion network g says where each
coordinate comes from. Both are small networks behind a multi-resolution grid of features
(:mod:`reglib.methods.hash_grid`), and both start from nothing.

In the paper f stores the *fixed* image and g lives on the grid of the transformed one:
``sum |f(x) - I_fixed(x)|^2 + |f(x + g(x)) - I_transformed(x)|^2`` (equation 2), so that g maps the
transformed image to the fixed one. Here f stores the *moving* image and g lives on the *fixed*
grid, which is the same formula with the names exchanged::

    sum_y |f(y) - moving(y)|^2 + sum_x |f(x + g(x)) - fixed(x)|^2

and ``x + g(x)`` maps fixed to moving, as everywhere in this library. There is no similarity and no
regulariser. What moves g is that f is limited, and one scene is cheaper to store than two. Of one
modality, both terms read the same outputs of f; of two, each term has outputs of its own, and they
share the features.

How fine the grid of g is decides what it can do: with one cell over the whole image it is nearly
global (rigid), with more cells it deforms.

**The loss does not show a failure.** Where g carries the fixed image to a place that the moving one
leaves free, f stores both, and the loss is as low as that of the solution. Against that
``PRESETS["robust"]`` has, and ``PRESETS["paper"]`` has not:

- a wait: g stands still until f has stored something. A step of Adam is as long for noise as for a
  cause, and a g that has drifted off does not come back;
- a g whose rotations are learnt as fast as its translations: features of the size of 1 before a
  last layer of zeros, instead of features of nearly 0;
- bounded motion, and several starts, among which a similarity that has no part in the training
  chooses (:class:`INR`). It also says how clear the choice was.

Nguyen, Cao and Waller, ISBI 2025, arXiv:2411.02672. Figures that the text does not give are those
of the authors' earlier code of the same design (Cao et al., neural space-time model).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reglib.checks import check_choice, check_numbers, check_points, check_positive_int
from reglib.data.conform import conform_grid, resample
from reglib.data.nifti import voxel_to_world
from reglib.geometry.affine import (
    affine_field,
    grid_centre,
    rigid_matrix,
    transform_points,
    whole_field,
)
from reglib.geometry.fields import compose
from reglib.geometry.grid import identity_grid, no_autocast
from reglib.geometry.procrustes import fit_rigid
from reglib.geometry.sampling import transform_grid, warp, warp_points
from reglib.methods.hash_grid import HashGrid, window
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.mind import mind
from reglib.objectives.similarity import mutual_information

#: Of (warped, fixed), with ``weight`` and ``reduction="none"``: ``(B,)``, lower is better.
Similarity = Callable[..., Tensor]

#: Points at which the motion network is read at once.
CHUNK = 65_536

#: Starts are compared on grids of at most so many voxels, and so are displaced results.
SCREEN_VOXELS = 4_096

#: Displaced copies of a result that its similarity is compared with.
DISPLACED = 32


def _check_number(value: float, name: str, least: float, most: float = math.inf) -> float:
    [number] = check_numbers([value], name)
    if not least <= number <= most or number == math.inf:
        raise ValueError(f"{name}: wanted a number from {least:g} to {most:g}, got {value!r}")
    return number


# --- The networks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CoordinateSettings:
    """What a :class:`CoordinateNetwork` is made of, and how fast it is trained.

    Attributes:
        coarsest: cells per voxel of the coarsest level, from 0 (one cell over the whole image) to
            1 ("original resolution").
        finest: cells per voxel of the finest level, at least ``coarsest``: the granularity.
        levels: of the grid of features.
        features: of each vertex.
        table: entries of a level at most, see :class:`reglib.methods.hash_grid.HashGrid`.
        depth: hidden layers.
        width: of each.
        scale: features begin uniformly distributed between minus and plus this.
        margin: what the grid covers beyond either end of the image, as a share of its size.
        lr: learning rate to start from.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    coarsest: float = 0.05
    finest: float = 0.5
    levels: int = 8
    features: int = 2
    table: int = 2**16
    depth: int = 2
    width: int = 64
    scale: float = 1e-4
    margin: float = 0.0
    lr: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("levels", "features", "table", "depth", "width"):
            check_positive_int(getattr(self, name), name)
        _check_number(self.coarsest, "coarsest", 0, 1)
        _check_number(self.finest, "finest", self.coarsest, 1)
        _check_number(self.scale, "scale", 0)
        _check_number(self.margin, "margin", 0)
        if _check_number(self.lr, "lr", 0) == 0:
            raise ValueError("lr: wanted a positive number, got 0")

    def cells(self, share: float, shape: Sequence[int]) -> tuple[int, ...]:
        """Cells along each axis, given how many there are per voxel; at least one."""
        return tuple(max(1, round(share * (1 + 2 * self.margin) * n)) for n in shape)


class Layers(nn.Module):
    """Fully connected layers, several copies of them side by side.

    Weights are uniform as Glorot and Bengio have it (AISTATS 2010, equation 16), biases 0.

    Args:
        sizes: numbers that go in, those of each hidden layer, and those that come out.
        activation: after each hidden layer.
        copies: one for each sample of a batch; all begin alike.
        generator: source of randomness, on the CPU; torch's own if ``None``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[Tensor], Tensor],
        copies: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in itertools.pairwise(sizes):
            limit = math.sqrt(6 / (a + b))
            weight = limit * (2 * torch.rand((1, a, b), generator=generator) - 1)
            self.weights.append(nn.Parameter(weight.repeat(copies, 1, 1)))
            self.biases.append(nn.Parameter(torch.zeros(copies, 1, b)))

    def forward(self, x: Tensor) -> Tensor:
        """``(copies, N, inputs)`` to ``(copies, N, outputs)``."""
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, self.activation(x) if number else x, weight)
        return x


class CoordinateNetwork(nn.Module):
    """A function of coordinates: features of a hash grid, then a small fully connected network.

    Args:
        settings: what it is made of.
        shape: of the image whose voxels the coordinates count.
        outputs: numbers at each coordinate.
        activation: after each hidden layer.
        copies: so many networks side by side, one for each sample of a batch; all begin alike.
        generator: source of randomness, on the CPU; torch's own if ``None``.
    """

    def __init__(
        self,
        settings: CoordinateSettings,
        shape: Sequence[int],
        outputs: int,
        *,
        activation: Callable[[Tensor], Tensor],
        copies: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.last = [max(n - 1, 1) for n in shape]
        self.grid = HashGrid(
            settings.cells(settings.coarsest, shape),
            settings.cells(settings.finest, shape),
            levels=settings.levels,
            features=settings.features,
            table=settings.table,
            copies=copies,
            scale=settings.scale,
            generator=generator,
        )
        inputs = settings.levels * settings.features
        self.layers = Layers(
            (inputs, *[settings.width] * settings.depth, outputs),
            activation=activation,
            copies=copies,
            generator=generator,
        )

    def forward(self, points: Tensor, progress: float = 1.0) -> Tensor:
        """Evaluate at points; what lies beyond the margin is read at its end.

        Args:
            points: ``(B, N, D)`` in voxels; B is the number of copies.
            progress: from coarse (0) to fine (1), see :func:`reglib.methods.hash_grid.window`.

        Returns:
            ``(B, N, outputs)``.
        """
        check_points(points, "points", len(self.last))
        margin = self.settings.margin
        with no_autocast(points):
            unit = (points / points.new_tensor(self.last) + margin) / (1 + 2 * margin)
            return self.layers(self.grid(unit, window(progress, self.settings.levels)))

    def covers(self, points: Tensor) -> Tensor:
        """Whether points ``(B, N, D)`` lie within image and margin, ``(B, N)``."""
        last = points.new_tensor(self.last)
        beyond = self.settings.margin * last + 1e-3
        return ((points >= -beyond) & (points <= last + beyond)).all(2)


# --- The method -------------------------------------------------------------------------------


def _choice() -> Similarity:
    return partial(mutual_information, normalised=True)


@dataclass(frozen=True)
class INR:
    """The method that trains an image network and a motion network on each pair.

    Every pair of a batch has networks of its own, all of which begin alike and see the same
    coordinates, so that a pair gives in a batch what it gives alone.

    With several starts the pair's own one is tried beside others: random rotations and
    translations, of which the best at a coarse resolution that differ from each other are taken.
    All are trained side by side. Then ``similarity`` chooses among the starts and what they have
    become; a stage ``"choice"`` of the history holds, for each pair:

    - ``similarity``: of the result;
    - ``confidence``: by how many standard deviations the result's similarity is better than that of
      copies displaced at random. A result below about 3 is no better than those;
    - ``agreement``: the share of the starts that ended at the same place, to 2 % of the image.

    Masks weigh the voxels of both terms, and what the moving image does not cover does not count.
    Intensities are scaled to 0 .. 1: both images alike if there is one modality, else each by
    itself.

    Attributes:
        modality: ``"single"`` (both terms read the same outputs of the image network) or
            ``"multi"``.
        rigid: replace the motion by the rigid transform closest to it, in mm; how far it was from
            rigid is noted in the report. It goes with a motion network of one cell.
        image: the image network.
        motion: the motion network. Its last layer begins at 0, and so does the motion.
        steps: of Adam; both learning rates fall to a tenth along an exponential.
        coarse_to_fine: share of the steps after which all levels count; 0 counts all at once.
        wait: share of the steps before the motion begins.
        coordinates: of each image in every step, drawn at random; ``None`` takes all voxels.
        bound: longest motion along each axis, as a share of the image's size; ``None`` for no
            bound.
        starts: how many are trained.
        candidates: among how many random starts they are sought; needed for several starts.
        rotation: largest of the random rotations, in radians, about the middle of the image.
        translation: largest of the random translations along each axis, as a share of the size.
        similarity: chooses; of (warped, fixed), ``weight``, ``reduction``; lower is better.
        seed: of the networks, the coordinates and the random starts.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    modality: str = "single"
    rigid: bool = True
    image: CoordinateSettings = field(default_factory=CoordinateSettings)
    motion: CoordinateSettings = field(
        default_factory=lambda: CoordinateSettings(0, 0, width=32, scale=1.0, lr=3e-4)
    )
    steps: int = 500
    coarse_to_fine: float = 0.8
    wait: float = 0.2
    coordinates: int | None = 4_096
    bound: float | None = 0.3
    starts: int = 1
    candidates: int = 0
    rotation: float = math.radians(20)
    translation: float = 0.1
    similarity: Similarity = field(default_factory=_choice)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.modality, "modality", ("single", "multi"))
        for name in ("image", "motion"):
            if not isinstance(getattr(self, name), CoordinateSettings):
                raise TypeError(
                    f"{name}: wanted CoordinateSettings, got {type(getattr(self, name)).__name__}"
                )
        for name in ("steps", "starts"):
            check_positive_int(getattr(self, name), name)
        if self.coordinates is not None:
            check_positive_int(self.coordinates, "coordinates")
        _check_number(self.coarse_to_fine, "coarse_to_fine", 0, 1)
        _check_number(self.wait, "wait", 0, 1)
        if self.bound is not None and _check_number(self.bound, "bound", 0) == 0:
            raise ValueError("bound: wanted a positive number or None, got 0")
        _check_number(self.candidates, "candidates", 0)
        if self.starts > 1 + self.candidates:
            raise ValueError(
                f"candidates: wanted at least {self.starts - 1} for {self.starts} starts, "
                f"got {self.candidates}"
            )
        _check_number(self.rotation, "rotation", 0, math.pi)
        _check_number(self.translation, "translation", 0)
        if not callable(self.similarity):
            raise TypeError(f"similarity: wanted a function of two images, got {self.similarity!r}")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Train; yields after every step, and once more for the choice."""
        generator = torch.Generator().manual_seed(self.seed)
        screen = _screen(pair)
        starts = _starts(self, pair, screen, generator)
        fit = _Fit(self, pair, starts, generator)
        active = torch.ones(len(pair.fixed), dtype=torch.bool, device=pair.fixed.device)
        for step in range(self.steps):
            terms = fit.step(step)
            yield Iterate(
                "training", terms, active, partial(_transform, self, pair, screen, starts, fit)
            )
        found = _chosen(self, pair, screen, starts, fit)
        yield Iterate("choice", found.terms, active, lambda: found.transform, found.notes)


#: ``"paper"``: as the authors' earlier code of the same design has it, with the smaller of its two
#: numbers of steps; but for a last layer of zeros in the motion network, whose levels, all alike,
#: count from the start. ``"robust"``: three starts, of which one must be near, and MIND to choose.
#: ``"deformable"``: one cell of motion for about twenty voxels, and one start.
PRESETS = {
    "paper": INR(
        image=CoordinateSettings(width=128, margin=0.5, lr=5e-3),
        motion=CoordinateSettings(0, 0, width=32, lr=5e-5),
        steps=1_000,
        wait=0.0,
        coordinates=None,
        bound=None,
    ),
    "robust": INR(starts=3, candidates=512, steps=300, bound=0.1, similarity=mind),
    "deformable": INR(rigid=False, motion=CoordinateSettings(0, 0.05, width=32, lr=1e-3)),
}


class _Fit:
    """The networks of all pairs and starts, their optimisers, and the images they learn."""

    def __init__(self, method: INR, pair: Pair, starts: Tensor, generator: torch.Generator) -> None:
        self.method, self.pair, self.generator = method, pair, generator
        self.count, b = starts.shape[:2]
        d, channels = pair.fixed.ndim - 2, pair.fixed.shape[1]
        copies, device = self.count * b, pair.fixed.device
        outputs = channels * (2 if method.modality == "multi" else 1)
        shapes = tuple(pair.moving.shape[2:]), tuple(pair.fixed.shape[2:])
        make = partial(CoordinateNetwork, copies=copies, generator=generator)
        gelu, elu = nn.functional.gelu, nn.functional.elu
        self.image = make(method.image, shapes[0], outputs, activation=gelu).to(pair.fixed)
        self.motion = make(method.motion, shapes[1], d, activation=elu).to(pair.fixed)
        for p in (self.motion.layers.weights[-1], self.motion.layers.biases[-1]):
            nn.init.zeros_(p)  # no motion to begin with, whatever the features
        groups = [
            {"params": list(network.parameters()), "lr": settings.lr, "start": settings.lr}
            for network, settings in (
                (self.image, method.image),
                (self.motion, method.motion),
            )
        ]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.values = [x.flatten(2).mT for x in _scaled(pair, method.modality == "single")]
        self.masks = [
            None if mask is None else mask.flatten(2).mT
            for mask in (pair.moving_mask, pair.fixed_mask)
        ]
        self.places = [
            identity_grid(shape, dtype=pair.fixed.dtype, device=device).flatten(2).mT
            for shape in shapes
        ]
        matrix = starts.flatten(0, 1).double()
        voxels = torch.linalg.solve(pair.moving_affine, matrix @ pair.fixed_affine)
        self.voxels = voxels.to(pair.fixed)
        self.before = None
        if bool(pair.field.any()):
            self.before = pair.field.repeat(self.count, *(1,) * (pair.field.ndim - 1))
        self.size = pair.fixed.new_tensor(shapes[1])

    def displacement(self, points: Tensor, progress: float = 1.0) -> Tensor:
        """The motion at points ``(copies, N, D)`` of the fixed grid, in its voxels."""
        cells = self.motion.grid.resolutions
        # Levels that are all alike have nothing to go from coarse to fine for.
        out = self.motion(points, progress if cells[0] != cells[-1] else 1.0)
        bound = self.method.bound
        if bound is not None:
            # Not a hyperbolic tangent: what has come to the bound must find back.
            out = out / (1 + out.abs() / bound)
        return self.size * out

    def reached(self, points: Tensor, progress: float) -> Tensor:
        """Where points of the fixed grid come to lie in the moving one, in its voxels."""
        moved = points + self.displacement(points, progress)
        if self.before is not None:
            moved = warp_points(moved, self.before)
        with no_autocast(moved):
            return moved @ self.voxels[:, :-1, :-1].mT + self.voxels[:, None, :-1, -1]

    def step(self, step: int) -> dict[str, Tensor]:
        """Train one step; the terms of the loss at its beginning, least of the starts, ``(B,)``."""
        method = self.method
        # The first step is the first of N, not the zeroth: with no level at all nothing is learnt.
        goal = method.coarse_to_fine * method.steps
        progress = min((step + 1) / goal, 1.0) if goal > 0 else 1.0
        points, values, weights = self._drawn()
        channels = values[0].shape[2]
        stored = self.image(points[0], progress)[..., :channels]
        there = self.reached(points[1], progress)
        rendered = self.image(there, progress)[..., -channels:]
        inside = self.image.covers(there.detach()).to(there).unsqueeze(2)
        shown = inside if weights[1] is None else inside * weights[1]
        terms = {
            "moving": _mean_square(stored - values[0], weights[0]),
            "fixed": _mean_square(rendered - values[1], shown),
        }
        loss = torch.stack(list(terms.values())).sum(0)
        if not bool(loss.detach().isfinite().all()):
            raise FloatingPointError(f"loss: {loss.tolist()} at step {step}")
        for group in self.optimiser.param_groups:
            group["lr"] = group["start"] * 0.1 ** (step / method.steps)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss.sum())
        if step < method.wait * method.steps:
            for p in self.motion.parameters():
                p.grad = None  # Adam passes over it, and remembers nothing of it
        self.optimiser.step()
        table = loss.detach().view(self.count, -1)
        best = table.argmin(0, keepdim=True)
        return {
            name: term.detach().view(self.count, -1).gather(0, best)[0]
            for name, term in terms.items()
        }

    def _drawn(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Points of both images, their intensities and weights, for every copy."""
        points, values, weights = [], [], []
        for place, value, mask in zip(self.places, self.values, self.masks, strict=True):
            n, wanted = place.shape[1], self.method.coordinates
            one, shown, weight = place, value, mask
            if wanted is not None and wanted < n:
                # All pairs see the same coordinates: none depends on its neighbours in the batch.
                index = torch.randint(n, (wanted,), generator=self.generator).to(place.device)
                one, shown = place[:, index], value[:, index]
                weight = None if mask is None else mask[:, index]
            points.append(one.expand(self.count * len(value), *one.shape[1:]))
            values.append(shown.repeat(self.count, 1, 1))
            weights.append(None if weight is None else weight.repeat(self.count, 1, 1))
        return points, values, weights

    @torch.no_grad()
    def fields(self) -> Tensor:
        """The motion on the whole fixed grid, ``(starts, B, D, *S)``, in its voxels."""
        copies = self.count * len(self.pair.fixed)
        parts = [
            self.displacement(part.expand(copies, *part.shape[1:]))
            for part in torch.split(self.places[1], max(CHUNK // copies, 1), 1)
        ]
        u = torch.cat(parts, 1).mT
        return u.reshape(self.count, -1, u.shape[1], *self.pair.fixed.shape[2:])


def _mean_square(difference: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean over points, sum over channels: ``(copies, N, C)`` to ``(copies,)``."""
    square = difference.square().sum(2)
    if weight is None:
        return square.mean(1)
    share = weight[..., 0]
    return (share * square).sum(1) / share.sum(1).clamp(min=1e-6)


def _scaled(pair: Pair, alike: bool) -> tuple[Tensor, Tensor]:
    """Both images between 0 and 1, scaled by their common range or each by its own."""
    ranges = [torch.stack(x.flatten(1).aminmax(dim=1)) for x in (pair.moving, pair.fixed)]
    if alike:
        low = torch.minimum(ranges[0][0], ranges[1][0])
        high = torch.maximum(ranges[0][1], ranges[1][1])
        ranges = [torch.stack((low, high))] * 2
    scaled = []
    for x, (low, high) in zip((pair.moving, pair.fixed), ranges, strict=True):
        view = (-1, *(1,) * (x.ndim - 1))
        extent = (high - low).where(high > low, torch.ones_like(high))
        scaled.append((x - low.view(view)) / extent.view(view))
    return scaled[0], scaled[1]


# --- Starts -----------------------------------------------------------------------------------


def _screen(pair: Pair) -> Pair:
    """The pair on grids of few voxels."""

    def coarse(image: Tensor, affine: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        shape = tuple(image.shape[2:])
        steps = affine[:-1, :-1].norm(dim=0)
        extent = steps * steps.new_tensor(shape)
        size = float(steps.min())
        while float((extent / steps.clamp(min=size)).prod()) > SCREEN_VOXELS:
            size *= 1.1
        return conform_grid(affine, shape, spacing=steps.clamp(min=size).tolist())

    def brought(x: Tensor, old: Tensor, new: Tensor, shape: Sequence[int]) -> Tensor:
        return resample(x, old, new, shape, padding="border")

    moving_affine, moving_shape = coarse(pair.moving, pair.moving_affine)
    fixed_affine, shape = coarse(pair.fixed, pair.fixed_affine)
    masks = [
        None if mask is None else brought(mask, old, new, size)
        for mask, old, new, size in (
            (pair.moving_mask, pair.moving_affine, moving_affine, moving_shape),
            (pair.fixed_mask, pair.fixed_affine, fixed_affine, shape),
        )
    ]
    return Pair(
        moving=brought(pair.moving, pair.moving_affine, moving_affine, moving_shape),
        fixed=brought(pair.fixed, pair.fixed_affine, fixed_affine, shape),
        moving_affine=moving_affine,
        fixed_affine=fixed_affine,
        moving_mask=masks[0],
        fixed_mask=masks[1],
        affine=pair.affine,
        field=_read_field(pair, fixed_affine, shape),
    )


def _read_field(pair: Pair, affine: Tensor, shape: Sequence[int]) -> Tensor:
    """The pair's own field on another grid over the same place, in its voxels."""
    d = len(shape)
    still = torch.eye(d + 1, dtype=torch.float64).unsqueeze(0)
    there = affine_field(still, affine, pair.fixed_affine, shape).to(pair.field)
    read = warp(pair.field, there.expand(len(pair.field), *there.shape[1:]))
    linear = torch.linalg.solve(affine[:d, :d], pair.fixed_affine[:d, :d]).to(read)
    return torch.einsum("ij,bj...->bi...", linear, read)


def _similarities(method: INR, pair: Pair, affine: Tensor, u: Tensor) -> Tensor:
    """Of the pair through other transforms, ``(B,)``; infinite where little of it is left."""
    whole = whole_field(affine.to(u.device), u, pair.fixed_affine, pair.moving_affine)
    warped = warp(pair.moving, whole)
    mask = torch.ones_like(pair.moving[:, :1]) if pair.moving_mask is None else pair.moving_mask
    weight = warp(mask, whole, padding="zeros")
    if pair.fixed_mask is not None:
        weight = weight * pair.fixed_mask
    value = method.similarity(warped, pair.fixed, weight=weight, reduction="none")
    covered = weight.flatten(1).mean(1)
    return value.where(covered > 0.2, torch.full_like(value, math.inf))


def _rigid_moves(pair: Pair, rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotations about the middle of the fixed image, and shares of its size: ``(N, D+1, D+1)``."""
    shape = tuple(pair.fixed.shape[2:])
    d = len(shape)
    size = pair.fixed_affine[:d, :d] * pair.fixed_affine.new_tensor(shape)
    shift = translation.double() @ size.T
    return rigid_matrix(rotation.double(), shift, centre=grid_centre(pair.fixed_affine, shape))


@torch.no_grad()
def _starts(method: INR, pair: Pair, screen: Pair, generator: torch.Generator) -> Tensor:
    """A to start from, ``(starts, B, D+1, D+1)``, world mm; the pair's own comes first."""
    own = pair.affine.unsqueeze(0)
    if method.starts == 1:
        return own
    d = pair.fixed.ndim - 2
    turns = d * (d - 1) // 2
    draws = 2 * torch.rand((method.candidates, turns + d), generator=generator) - 1
    moves = _rigid_moves(
        pair, method.rotation * draws[:, :turns], method.translation * draws[:, turns:]
    )
    table = torch.stack(
        [_similarities(method, screen, pair.affine @ move, screen.field) for move in moves]
    )
    # Two starts less apart than this would end at one place.
    far = 0.5 * method.translation * _length(pair)
    ahead = table.argsort(0)
    picks: list[list[Tensor]] = []
    for b in range(len(pair.fixed)):
        mine: list[Tensor] = []
        rank = ahead[:, b].tolist()
        for index in rank:
            if len(mine) == method.starts - 1:
                break
            if all(_apart(pair, moves[index], other) > far for other in mine):
                mine.append(moves[index])
        # Where the space of starts is small, the next best fill the places that are left.
        mine += [moves[index] for index in rank[: method.starts - 1 - len(mine)]]
        picks.append(mine)
    changes = torch.stack([torch.stack(mine) for mine in picks], 1)
    return torch.cat([own, pair.affine @ changes])


def _length(pair: Pair) -> float:
    """Mean side of the fixed image in mm."""
    steps = pair.fixed_affine[:-1, :-1].norm(dim=0)
    return float((steps * steps.new_tensor(pair.fixed.shape[2:])).mean())


def _apart(pair: Pair, a: Tensor, b: Tensor) -> float:
    """Mean distance in mm between where two matrices take the corners of the fixed image."""
    ends = [torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in pair.fixed.shape[2:]]
    corners = voxel_to_world(torch.cartesian_prod(*ends)[None], pair.fixed_affine)
    first, second = (transform_points(corners, m.unsqueeze(0)) for m in (a, b))
    return float((first - second).norm(dim=2).mean())


# --- The choice -------------------------------------------------------------------------------


class _Result(NamedTuple):
    """What a pair has become."""

    transform: tuple[Tensor, Tensor]
    terms: dict[str, Tensor]
    notes: tuple[str, ...]


def _transform(
    method: INR, pair: Pair, screen: Pair, starts: Tensor, fit: _Fit
) -> tuple[Tensor, Tensor]:
    """Affine and field of the present choice."""
    return _chosen(method, pair, screen, starts, fit).transform


@torch.no_grad()
def _chosen(method: INR, pair: Pair, screen: Pair, starts: Tensor, fit: _Fit) -> _Result:
    """The best of the starts and of what they have become, by the similarity."""
    fields = fit.fields()
    found = [_finished(method, pair, affine, u) for affine, u in zip(starts, fields, strict=True)]
    count = len(found)
    options = [(affine, u) for affine, u, _ in found]
    if count > 1:
        options += [(affine, pair.field) for affine in starts]
    table = torch.stack([_similarities(method, pair, affine, u) for affine, u in options])
    best = table.argmin(0).tolist()
    affine = torch.stack([options[k][0][b] for b, k in enumerate(best)])
    u = torch.stack([options[k][1][b] for b, k in enumerate(best)])
    where = [whole_field(a, v, pair.fixed_affine, pair.moving_affine) for a, v in options[:count]]
    result = whole_field(affine, u, pair.fixed_affine, pair.moving_affine)
    near = 0.02 * sum(pair.moving.shape[2:]) / (pair.moving.ndim - 2)
    close = torch.stack([(w - result).norm(dim=1).flatten(1).mean(1) < near for w in where])
    terms = {
        "similarity": table.min(0).values,
        "confidence": _confidence(method, pair, screen, affine, u),
        "agreement": close.to(table).mean(0),
    }
    notes = []
    if method.rigid:
        residuals = [found[k % count][2][b] if k < count else 0.0 for b, k in enumerate(best)]
        text = ", ".join(f"{r:.3g}" for r in residuals)
        notes.append(
            f"rigid: the transform closest to the motion, which was {text} mm away from it "
            "(root mean square)"
        )
    text = ", ".join(f"{c:.3g}" for c in terms["confidence"].tolist())
    notes.append(f"confidence (standard deviations above displaced copies): {text}")
    return _Result((affine, u), terms, tuple(notes))


def _finished(
    method: INR, pair: Pair, affine: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, list[float]]:
    """Affine and field of one start, and what was not rigid, in mm (root mean square)."""
    before = bool(pair.field.any())
    if not method.rigid:
        return affine, compose(pair.field, u) if before else u, [0.0] * len(u)
    matrices, residuals = [], []
    phi = transform_grid(u).flatten(2).mT
    still = transform_grid(torch.zeros_like(u[:1])).flatten(2).mT
    whole = whole_field(affine.to(u.device), u, pair.fixed_affine, pair.moving_affine)
    reached = transform_grid(whole).flatten(2).mT
    inside = ((reached >= 0) & (reached <= reached.new_tensor(pair.moving.shape[2:]) - 1)).all(2)
    for b in range(len(u)):
        # What left the moving image was not trained; if nearly all did, there is nothing better.
        enough = int(inside[b].sum()) > inside.shape[1] // 10
        keep = (inside[b] if enough else torch.ones_like(inside[b])).nonzero().flatten()
        keep = keep[:: max(len(keep) // CHUNK, 1)]
        points = [
            voxel_to_world(x[:, keep].double().cpu(), pair.fixed_affine)
            for x in (still, phi[b : b + 1])
        ]
        fit = fit_rigid(*points)
        matrices.append(fit.matrix)
        residuals.append(float(fit.residual.square().mean().sqrt()))
    change = torch.cat(matrices)
    if not before:
        return affine @ change, torch.zeros_like(u), residuals
    shape = tuple(u.shape[2:])
    linear = affine_field(change, pair.fixed_affine, pair.fixed_affine, shape).to(u)
    return affine, compose(pair.field, linear), residuals


def _confidence(method: INR, pair: Pair, screen: Pair, affine: Tensor, u: Tensor) -> Tensor:
    """How much better the result is than displaced copies of it, in their standard deviations."""
    generator = torch.Generator().manual_seed(method.seed)
    d = pair.fixed.ndim - 2
    turns = d * (d - 1) // 2
    draws = torch.randn((DISPLACED, turns + d), generator=generator)
    # Far enough to miss (5 % of the image and more), near enough to show the same place.
    draws = draws / draws.norm(dim=1, keepdim=True)
    length = 0.06 + 0.09 * torch.rand((DISPLACED, 1), generator=generator)
    moves = _rigid_moves(pair, 2 * length * draws[:, :turns], length * draws[:, turns:])
    here = screen
    field = _read_field(_with_field(pair, u), screen.fixed_affine, screen.fixed.shape[2:])
    best = _similarities(method, here, affine, field)
    others = torch.stack([_similarities(method, here, affine @ move, field) for move in moves])
    count = others.isfinite().sum(0).clamp(min=2)
    others = others.where(others.isfinite(), torch.full_like(others, math.nan))
    mean = others.nanmean(0)
    spread = ((others - mean).square().nansum(0) / (count - 1)).sqrt()
    clear = (mean - best) / spread.clamp(min=torch.finfo(best.dtype).eps)
    return clear.nan_to_num(0.0, 0.0, 0.0)


def _with_field(pair: Pair, u: Tensor) -> Pair:
    return dataclasses.replace(pair, field=u)
