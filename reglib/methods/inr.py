"""INR: two coordinate networks that are trained on one pair and on nothing else.

An image network f stores images as a function of coordinates, a motion network g says where each
coordinate comes from. Both are small networks behind a multi-resolution grid of features
(:mod:`reglib.methods.hash_grid`), and both start from nothing.

In the paper f stores the *fixed* image and g lives on the grid of the transformed one:
``sum |f(x) - I_fixed(x)|^2 + |f(x + g(x)) - I_transformed(x)|^2`` (equation 2), so that g maps the
transformed image to the fixed one. Here f stores the *moving* image and g lives on the *fixed*
grid, which is the same formula with the names exchanged::

    mean_y |f(y) - moving(y)|^2 + mean_x |f(x + g(x)) - fixed(x)|^2

and ``x + g(x)`` maps fixed to moving, as everywhere in this library. There is no similarity and no
regulariser. What moves g is that f is limited, and one scene is cheaper to store than two. Of one
modality, both terms read the same outputs of f; of two, each term has outputs of its own, and they
share the features.

How fine the grid of g is decides what it can do: with one cell over the whole image it is nearly
global (rigid), with more cells it deforms.

**The loss does not show a failure.** Where g carries the fixed image to a place that the moving one
leaves free, f stores both, and the loss is as low as that of the solution. Against that
``PRESETS["robust"]`` has, and ``PRESETS["paper"]`` has not:

- a start from a search (:class:`reglib.methods.search.Search`), whose similarity has no part in the
  training. It decides again in the end between the starts and what they have become;
- a wait: g stands still until f has stored something. A step of Adam is as long for noise as for a
  cause, and a g that has drifted off does not come back;
- a g whose rotations are learnt as fast as its translations: features of the size of 1 before a
  last layer of zeros, instead of features of nearly 0;
- bounded motion.

With every result comes a :func:`reglib.methods.search.confidence`.

Nguyen, Cao and Waller, ISBI 2025, arXiv:2411.02672. Figures that the text does not give are those
of the authors' earlier code of the same design (Cao et al., neural space-time model).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reglib.checks import check_choice, check_number, check_points, check_positive_int
from reglib.data.nifti import voxel_to_world
from reglib.geometry.affine import affine_field, whole_field
from reglib.geometry.fields import compose
from reglib.geometry.grid import identity_grid, no_autocast
from reglib.geometry.procrustes import fit_rigid
from reglib.geometry.sampling import transform_grid, warp_points
from reglib.methods.classical import Similarity
from reglib.methods.hash_grid import HashGrid, window
from reglib.methods.pair import Iterate, Pair
from reglib.methods.search import Search, comparison, confidence, confidence_note
from reglib.objectives.mind import mind

#: Points at which the motion network is read at once, and to which a rigid transform is fitted.
CHUNK = 65_536


# --- The networks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CoordinateSettings:
    """What a :class:`CoordinateNetwork` is made of, and how it is trained.

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
        coarse_to_fine: share of the training after which all levels count; 0 counts all at once.
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
    coarse_to_fine: float = 0.8
    lr: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("levels", "features", "table", "depth", "width"):
            check_positive_int(getattr(self, name), name)
        check_number(self.coarsest, "coarsest", 0, 1)
        check_number(self.finest, "finest", self.coarsest, 1)
        check_number(self.scale, "scale", 0)
        check_number(self.margin, "margin", 0)
        check_number(self.coarse_to_fine, "coarse_to_fine", 0, 1)
        check_number(self.lr, "lr", positive=True)

    def cells(self, share: float, shape: Sequence[int]) -> tuple[int, ...]:
        """Cells along each axis, given how many there are per voxel; at least one."""
        return tuple(max(1, round(share * (1 + 2 * self.margin) * n)) for n in shape)

    def progress(self, done: float) -> float:
        """How far from coarse (0) to fine (1), given the share of the training that is done."""
        return min(done / self.coarse_to_fine, 1.0) if self.coarse_to_fine > 0 else 1.0


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
        compiled: as in :class:`reglib.methods.hash_grid.HashGrid`.
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
        compiled: bool = False,
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
            compiled=compiled,
        )
        inputs = settings.levels * settings.features
        self.layers = Layers(
            (inputs, *[settings.width] * settings.depth, outputs),
            activation=activation,
            copies=copies,
            generator=generator,
        )

    def forward(self, points: Tensor, done: float = 1.0) -> Tensor:
        """Evaluate at points; what lies beyond the margin is read at its end.

        Args:
            points: ``(B, N, D)`` in voxels; B is the number of copies.
            done: share of the training that is done, which decides how much each level counts.

        Returns:
            ``(B, N, outputs)``.
        """
        check_points(points, "points", len(self.last))
        margin, levels = self.settings.margin, self.settings.levels
        with no_autocast(points):
            unit = (points / points.new_tensor(self.last) + margin) / (1 + 2 * margin)
            return self.layers(self.grid(unit, window(self.settings.progress(done), levels)))

    def covers(self, points: Tensor) -> Tensor:
        """Whether points ``(B, N, D)`` lie within image and margin, ``(B, N)``."""
        last = points.new_tensor(self.last)
        beyond = self.settings.margin * last + 1e-3
        return ((points >= -beyond) & (points <= last + beyond)).all(2)


# --- The method -------------------------------------------------------------------------------


@dataclass(frozen=True)
class INR:
    """The method that trains an image network and a motion network on each pair.

    Every pair of a batch has networks of its own, all of which begin alike and see the same
    coordinates, so that a pair gives in a batch what it gives alone.

    With a search, its best ends are where the networks start, side by side, and ``similarity``
    chooses in the end among these starts and what they have become. A stage ``"choice"`` of the
    history holds the result's similarity and its :func:`reglib.methods.search.confidence`.

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
        wait: share of the steps before the motion begins.
        coordinates: of each image in every step, drawn at random; ``None`` takes all voxels.
        bound: longest motion along each axis, as a share of the image's size; ``None`` for no
            bound.
        search: gives the starts; ``None`` starts where the pair does.
        starts: how many of the search's ends are trained.
        similarity: judges results; of (warped, fixed), ``weight``, ``reduction``; lower is better.
        seed: of the networks and the coordinates.
        compiled: evaluate hashed levels by ``torch.compile``, as in
            :class:`reglib.methods.hash_grid.HashGrid`: for long trainings of volumes on a GPU.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    modality: str = "single"
    rigid: bool = True
    image: CoordinateSettings = field(default_factory=CoordinateSettings)
    motion: CoordinateSettings = field(
        default_factory=lambda: CoordinateSettings(
            0, 0, width=32, scale=1.0, coarse_to_fine=0, lr=3e-4
        )
    )
    steps: int = 500
    wait: float = 0.2
    coordinates: int | None = 4_096
    bound: float | None = 0.3
    search: Search | None = None
    starts: int = 1
    similarity: Similarity = mind
    seed: int = 0
    compiled: bool = False

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
        check_number(self.wait, "wait", 0, 1)
        if self.bound is not None and check_number(self.bound, "bound", 0) == 0:
            raise ValueError("bound: wanted a positive number or None, got 0")
        if self.search is not None and not isinstance(self.search, Search):
            raise TypeError(f"search: wanted a Search or None, got {type(self.search).__name__}")
        found = 1 if self.search is None else self.search.kept
        if self.starts > found:
            raise ValueError(
                f"starts: wanted at most {found}, which a search keeps, got {self.starts}"
            )
        if not callable(self.similarity):
            raise TypeError(f"similarity: wanted a function of two images, got {self.similarity!r}")
        if not isinstance(self.compiled, bool):
            raise TypeError(f"compiled: wanted True or False, got {self.compiled!r}")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Train; yields after every step, and once more for the choice."""
        starts = pair.affine.unsqueeze(0)
        if self.search is not None:
            starts = self.search.best(pair).affine[: self.starts]
        training = _Training(self, pair, starts)
        active = torch.ones(len(pair.fixed), dtype=torch.bool, device=pair.fixed.device)

        def transform() -> tuple[Tensor, Tensor]:
            chosen = _choose(self, pair, starts, training.motions())
            return chosen.affine, chosen.field

        for _ in range(self.steps):
            yield Iterate("training", training.step(), active, transform)
        chosen = _choose(self, pair, starts, training.motions())
        clear = confidence(self.similarity, pair, chosen.affine, chosen.field)
        terms = {"similarity": chosen.loss, "confidence": clear}
        notes = [confidence_note(clear)]
        if self.rigid:
            text = ", ".join(f"{r:.3g}" for r in chosen.residual.tolist())
            notes.append(
                f"rigid: the transform closest to the motion, which was {text} mm away from it "
                "(root mean square)"
            )
        yield Iterate("choice", terms, active, lambda: (chosen.affine, chosen.field), tuple(notes))


#: ``"paper"``: the paper gives no numbers. Levels, features, table, widths, resolutions, margin,
#: learning rates, their decay and when all levels count are those of the authors' earlier code of
#: the same design. Ours: a thousand steps of its 500 to 5,000; coordinates drawn in every step,
#: where it takes all, which costs eight times as much for an image of 300 x 300; the last layer of
#: the motion network begins at 0, and features on both sides of 0. ``"robust"``: begins where a
#: search ends, and keeps what is better. ``"deformable"``: one cell of motion for about twenty
#: voxels.
#:
#: :meta hide-value:
PRESETS = {
    "paper": INR(
        image=CoordinateSettings(width=128, margin=0.5, lr=5e-3),
        motion=CoordinateSettings(0, 0, width=32, lr=5e-5),
        steps=1_000,
        wait=0.0,
        coordinates=16_384,
        bound=None,
    ),
    "robust": INR(steps=200, bound=0.1, search=Search()),
    "deformable": INR(
        rigid=False,
        motion=CoordinateSettings(0, 0.05, width=32, lr=1e-3),
        bound=0.1,
        search=Search(),
    ),
}


class _Training:
    """The networks of all starts of all pairs, what they learn, and their optimiser.

    Copy ``k B + b`` of the networks is that of start k and pair b.
    """

    def __init__(self, method: INR, pair: Pair, starts: Tensor) -> None:
        self.method, self.pair, self.count, self.done = method, pair, len(starts), 0
        self.generator = torch.Generator().manual_seed(method.seed)
        d, channels = pair.fixed.ndim - 2, pair.fixed.shape[1]
        copies = self.count * len(pair.fixed)
        shapes = tuple(pair.moving.shape[2:]), tuple(pair.fixed.shape[2:])
        outputs = channels * (2 if method.modality == "multi" else 1)
        self.image, self.motion = (
            CoordinateNetwork(
                settings,
                shape,
                n,
                activation=activation,
                copies=copies,
                generator=self.generator,
                compiled=method.compiled,
            ).to(pair.fixed)
            for settings, shape, n, activation in (
                (method.image, shapes[0], outputs, nn.functional.gelu),
                (method.motion, shapes[1], d, nn.functional.elu),
            )
        )
        nn.init.zeros_(self.motion.layers.weights[-1])  # no motion, whatever the features
        self.optimiser = torch.optim.Adam(
            [
                {"params": self.image.parameters(), "lr": method.image.lr},
                {"params": self.motion.parameters(), "lr": method.motion.lr},
            ],
            betas=(0.9, 0.99),
            eps=1e-15,
        )
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(
            self.optimiser, 0.1 ** (1 / method.steps)
        )
        self.places = [
            identity_grid(shape, dtype=pair.fixed.dtype, device=pair.fixed.device).flatten(2).mT
            for shape in shapes
        ]
        self.values = [x.flatten(2).mT for x in _scaled(pair, alike=method.modality == "single")]
        self.weights = [
            None if mask is None else mask.flatten(2).mT
            for mask in (pair.moving_mask, pair.fixed_mask)
        ]
        voxels = torch.linalg.solve(pair.moving_affine, starts.flatten(0, 1) @ pair.fixed_affine)
        self.voxels = voxels.to(pair.fixed)
        self.before = pair.field.repeat(self.count, *(1,) * (d + 1)) if _has_field(pair) else None
        self.size = pair.fixed.new_tensor(shapes[1])

    def displacement(self, points: Tensor, done: float = 1.0) -> Tensor:
        """The motion at points ``(copies, N, D)`` of the fixed grid, in its voxels."""
        out = self.motion(points, done)
        if self.method.bound is not None:
            # Not a hyperbolic tangent: what has come to the bound must find back.
            out = out / (1 + out.abs() / self.method.bound)
        return self.size * out

    def reached(self, points: Tensor, done: float) -> Tensor:
        """Where points of the fixed grid come to lie in the moving one, in its voxels."""
        moved = points + self.displacement(points, done)
        if self.before is not None:
            moved = warp_points(moved, self.before)
        with no_autocast(moved):
            return moved @ self.voxels[:, :-1, :-1].mT + self.voxels[:, None, :-1, -1]

    def step(self) -> dict[str, Tensor]:
        """Train one step; the terms of the loss at its beginning, of the best start, ``(B,)``."""
        # The first step is the first of N, not the zeroth: with no level at all nothing is learnt.
        done = (self.done + 1) / self.method.steps
        (here, moving, moving_weight), (x, fixed, fixed_weight) = self._draw(0), self._draw(1)
        there = self.reached(x, done)
        channels = moving.shape[2]
        stored = self.image(here, done)[..., :channels]
        rendered = self.image(there, done)[..., -channels:]
        inside = self.image.covers(there.detach()).to(there).unsqueeze(2)
        shown = inside if fixed_weight is None else inside * fixed_weight
        terms = {
            "moving": _mean_square(stored - moving, moving_weight),
            "fixed": _mean_square(rendered - fixed, shown),
        }
        loss = torch.stack(list(terms.values())).sum(0)
        if not bool(loss.detach().isfinite().all()):
            raise FloatingPointError(f"loss: {loss.tolist()} at step {self.done}")
        self.optimiser.zero_grad()
        torch.autograd.backward(loss.sum())
        if self.done < self.method.wait * self.method.steps:
            for p in self.motion.parameters():
                p.grad = None  # Adam passes over it, and remembers nothing of it
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        best = loss.detach().view(self.count, -1).argmin(0, keepdim=True)
        return {
            name: term.detach().view(self.count, -1).gather(0, best)[0]
            for name, term in terms.items()
        }

    def _draw(self, side: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Points of the moving (0) or the fixed image (1), intensities and weights, per copy."""
        points, values, weights = self.places[side], self.values[side], self.weights[side]
        wanted, n = self.method.coordinates, points.shape[1]
        if wanted is not None and wanted < n:
            # All pairs see the same coordinates: none depends on its neighbours in the batch.
            index = torch.randint(n, (wanted,), generator=self.generator).to(points.device)
            points, values = points[:, index], values[:, index]
            weights = None if weights is None else weights[:, index]
        copies = self.count * len(values)
        return (
            points.expand(copies, *points.shape[1:]),
            values.repeat(self.count, 1, 1),
            None if weights is None else weights.repeat(self.count, 1, 1),
        )

    @torch.no_grad()
    def motions(self) -> Tensor:
        """The motion on the whole fixed grid, ``(starts, B, D, *S)``, in its voxels."""
        copies = self.count * len(self.pair.fixed)
        parts = [
            self.displacement(part.expand(copies, *part.shape[1:]))
            for part in torch.split(self.places[1], max(CHUNK // copies, 1), 1)
        ]
        u = torch.cat(parts, 1).mT
        return u.reshape(self.count, -1, u.shape[1], *self.pair.fixed.shape[2:])


def _has_field(pair: Pair) -> bool:
    return bool(pair.field.any())


def _mean_square(difference: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean over points, sum over channels: ``(copies, N, C)`` to ``(copies,)``."""
    square = difference.square().sum(2)
    if weight is None:
        return square.mean(1)
    share = weight[..., 0]
    return (share * square).sum(1) / share.sum(1).clamp(min=1e-6)


def _scaled(pair: Pair, *, alike: bool) -> tuple[Tensor, Tensor]:
    """Both images between 0 and 1, scaled by their common range or each by its own.

    What a mask leaves out has no say, and may come to lie outside.
    """
    images, ranges = (pair.moving, pair.fixed), []
    for image, mask in zip(images, (pair.moving_mask, pair.fixed_mask), strict=True):
        absent = torch.zeros_like(image[:, :1]) if mask is None else mask == 0
        low, high = (
            image.masked_fill(absent.bool(), end).flatten(1) for end in (math.inf, -math.inf)
        )
        ranges.append((low.amin(1), high.amax(1)))
    if alike:
        (low_m, high_m), (low_f, high_f) = ranges
        ranges = [(torch.minimum(low_m, low_f), torch.maximum(high_m, high_f))] * 2
    scaled = []
    for image, (low, high) in zip(images, ranges, strict=True):
        extent = (high - low).where(high > low, torch.ones_like(high))
        view = (-1, *(1,) * (image.ndim - 1))
        scaled.append((image - low.view(view)) / extent.view(view))
    return scaled[0], scaled[1]


# --- The choice -------------------------------------------------------------------------------


class _Option(NamedTuple):
    """A transform of each pair of a batch; what was not rigid in it, mm; and its similarity."""

    affine: Tensor
    field: Tensor
    residual: Tensor
    loss: Tensor


def _choose(method: INR, pair: Pair, starts: Tensor, motions: Tensor) -> _Option:
    """For each pair the best of what its starts have become and, after a search, of the starts."""
    compare = comparison(method.similarity, pair)
    still = torch.zeros(len(pair.fixed), dtype=torch.float64)
    options = []
    for start, motion in zip(starts, motions, strict=True):
        affine, residual = start, still
        field = compose(pair.field, motion) if _has_field(pair) else motion
        if method.rigid:
            change, residual = _closest_rigid(pair, start, field, motion)
            field = pair.field
            if _has_field(pair):
                shape = pair.fixed.shape[2:]
                turned = affine_field(change, pair.fixed_affine, pair.fixed_affine, shape)
                field = compose(pair.field, turned.to(field))
            else:
                affine = start @ change
        options.append(_Option(affine, field, residual, compare(affine, field)))
        if method.search is not None:
            options.append(_Option(start, pair.field, still, compare(start, pair.field)))
    best = torch.stack([option.loss for option in options]).argmin(0).tolist()
    return _Option(
        *(
            torch.stack([parts[k][b] for b, k in enumerate(best)])
            for parts in zip(*options, strict=True)
        )
    )


def _closest_rigid(
    pair: Pair, affine: Tensor, field: Tensor, motion: Tensor
) -> tuple[Tensor, Tensor]:
    """The rigid transform closest to ``x + motion(x)``, in mm, and how far away it is.

    Points that ``field``, of which the motion is the first part, carries out of the moving image
    were not trained, and do not count unless nearly all are.

    Returns:
        ``(B, D+1, D+1)``, float64 on the CPU, and root mean squares ``(B,)``.
    """
    whole = whole_field(affine, field, pair.fixed_affine, pair.moving_affine)
    last = whole.new_tensor(pair.moving.shape[2:]) - 1
    there = transform_grid(whole).flatten(2).mT
    inside = ((there >= 0) & (there <= last)).all(2)
    still, moved = (transform_grid(u).flatten(2).mT for u in (torch.zeros_like(motion), motion))
    matrices, residuals = [], []
    for b, within in enumerate(inside):
        enough = int(within.sum()) > len(within) // 10
        keep = (within if enough else torch.ones_like(within)).nonzero().flatten()
        keep = keep[:: max(len(keep) // CHUNK, 1)]
        fit = fit_rigid(
            *(
                voxel_to_world(points[b : b + 1, keep].double().cpu(), pair.fixed_affine)
                for points in (still, moved)
            )
        )
        matrices.append(fit.matrix)
        residuals.append(fit.residual.square().mean().sqrt())
    return torch.cat(matrices), torch.stack(residuals)
