"""Registration as optimisation: rigid, affine and deformable, from coarse to fine.

Each method is a frozen set of settings that is called with a pair::

    register(moving, fixed, [Affine(), Velocity()])

Levels are given in millimetres: at a level of 4 mm both images are resampled to voxels of at least
4 mm (axes that are coarser stay as they are, and none comes down to fewer than eight voxels), and
the level's solution is where the next begins.
Every pair of a batch has its own best state and its own stop. Both images of a pair are shifted and
scaled alike, so ``mse`` wants them on one scale of intensities. A loss that is not finite raises
``FloatingPointError``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.checks import check_choice, check_number, check_numbers, check_positive_int
from reglib.data.conform import conform_grid, resample
from reglib.data.nifti import voxel_to_world
from reglib.geometry.affine import (
    about,
    affine_field,
    affine_matrix,
    grid_centre,
    rigid_matrix,
    transform_points,
    whole_field,
)
from reglib.geometry.bspline import bspline_field, fit_lattice
from reglib.geometry.fields import carry_field, compose, integrate
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc, ncc

#: Of (warped, fixed), with ``weight`` and ``reduction="none"``: ``(B,)``, lower is better.
Similarity = Callable[..., Tensor]

#: Affine levels need no more voxels than this, as the parameters are few.
AFFINE_VOXELS = 100_000

#: A start at which the images share less than this of the smaller one is not considered.
LEAST_OVERLAP = 0.5

#: Matrices are one where corners come no farther apart, on average, than this share of the image.
APART = 0.08

#: Steps that each start goes down a level before one of them is chosen.
TRIAL_STEPS = 25

#: A start turned by more than 45 degrees must lead to a loss that is better by this share of the
#: best one without such a turn: most headers are right, and slices of two brains may fit a little
#: better upside down, while a volume that is upside down gains far more.
TURN_GAIN = 0.15

#: Steps until the step size has risen to its full length.
WARM_UP = 5

#: Windows of five voxels show structures that nine blur; and fields fold less.
_LNCC = partial(lncc, window=5)


# --- What all of them share -----------------------------------------------------------------


class Level(NamedTuple):
    """Both images of a pair at one resolution."""

    size: float
    moving: Tensor
    fixed: Tensor
    moving_affine: Tensor
    fixed_affine: Tensor
    moving_mask: Tensor
    fixed_mask: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the fixed image."""
        return tuple(self.fixed.shape[2:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """Mm per voxel of the fixed grid."""
        return tuple(self.fixed_affine[:-1, :-1].norm(dim=0).tolist())

    def copies(self, sample: int, count: int) -> Level:
        """One sample of the batch, so many times."""

        def repeat(x: Tensor) -> Tensor:
            return x[sample : sample + 1].expand(count, *x.shape[1:])

        return self._replace(
            moving=repeat(self.moving),
            fixed=repeat(self.fixed),
            moving_mask=repeat(self.moving_mask),
            fixed_mask=None if self.fixed_mask is None else repeat(self.fixed_mask),
        )

    def look(self, field: Tensor, back: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The warped image, the fixed one (through ``back``), and how much each voxel counts.

        Voxels that an image does not cover do not count, nor does what a mask leaves out.
        """
        warped = warp(self.moving, field)
        fixed = self.fixed if back is None else warp(self.fixed, back)
        with torch.no_grad():
            weight = warp(self.moving_mask, field, padding="zeros")
            if back is not None:
                mask = torch.ones_like(weight) if self.fixed_mask is None else self.fixed_mask
                weight = weight * warp(mask, back, padding="zeros")
            elif self.fixed_mask is not None:
                weight = weight * self.fixed_mask
        return warped, fixed, weight


def normalised(pair: Pair) -> Pair:
    """Both images shifted and scaled alike, to mean 0 and variance 1 between them, per sample.

    So a tolerance means the same for every pair, while equal intensities stay equal whatever else
    either image shows. What a mask leaves out has no say, and an image without contrast becomes 0:
    interpolating any other constant gives roundings, which a correlation would take for contrast.
    """
    shape = (-1, *(1,) * (pair.fixed.ndim - 1))
    images, moments = [], []
    for image, mask in ((pair.moving, pair.moving_mask), (pair.fixed, pair.fixed_mask)):
        weight = torch.ones_like(image[:, :1]) if mask is None else mask
        image = image.where(weight > 0, torch.zeros_like(image))
        axes = tuple(range(1, image.ndim))
        total = weight.sum(axes) * image.shape[1]
        mean = (weight * image).sum(axes) / total
        variance = (weight * (image - mean.view(shape)).square()).sum(axes) / total
        flat = variance <= (8 * torch.finfo(image.dtype).eps * mean).square()
        images.append((image, flat))
        moments.append((mean, variance))
    mean, variance = (sum(m) / 2 for m in zip(*moments, strict=True))
    scale = variance.where(variance > 0, torch.ones_like(variance)).rsqrt()
    moving, fixed = (
        ((x - mean.view(shape)) * scale.view(shape)).masked_fill(flat.view(shape), 0)
        for x, flat in images
    )
    return dataclasses.replace(pair, moving=moving, fixed=fixed)


def _continue(image: Tensor, mask: Tensor, sigma: Sequence[float]) -> Tensor:
    """Go on smoothly where the mask is 0: sampling shall find neither edge nor content there."""
    inside = (mask > 0).to(image)
    share = gaussian_smooth(inside, sigma).clamp(min=1e-6)
    return image.where(inside > 0, gaussian_smooth(image * inside, sigma) / share)


def make_level(pair: Pair, size: float) -> Level:
    """A normalised pair in voxels of at least ``size`` mm."""
    tensors, affines, masks = [], [], []
    for image, affine, mask in (
        (pair.moving, pair.moving_affine, pair.moving_mask),
        (pair.fixed, pair.fixed_affine, pair.fixed_mask),
    ):
        steps = affine[:-1, :-1].norm(dim=0).tolist()
        # Fewer than eight voxels along an axis show nothing.
        spacing = [
            max(s, min(size, n * s / 8)) for s, n in zip(steps, image.shape[2:], strict=True)
        ]
        new_affine, shape = conform_grid(affine, tuple(image.shape[2:]), spacing=spacing)
        if mask is not None:
            image = _continue(image, mask, [max(size / s, 1.0) / 2 for s in steps])
            mask = resample(mask, affine, new_affine, shape)
        tensors.append(resample(image, affine, new_affine, shape, padding="border"))
        affines.append(new_affine)
        masks.append(mask)
    inside = torch.ones_like(tensors[0][:, :1]) if masks[0] is None else masks[0]
    return Level(size, tensors[0], tensors[1], affines[0], affines[1], inside, masks[1])


def level_sizes(pair: Pair, levels: Sequence[float] | None, *, voxels: int | None) -> list[float]:
    """The levels in mm, coarse to fine: those asked for, or three from the finest that is useful.

    ``voxels`` bounds the size of the finest grid.
    """
    if levels is not None:
        return [float(s) for s in levels]
    spacing = pair.fixed_affine[:-1, :-1].norm(dim=0)
    finest = float(spacing.min())
    shape = torch.tensor(pair.fixed.shape[2:], dtype=spacing.dtype)
    extent = shape * spacing
    if voxels is not None:
        while float((extent / spacing.clamp(min=finest)).prod()) > voxels:
            finest *= 1.1
    # A level at which no axis has eight voxels would be none of its own.
    return [s for s in (4 * finest, 2 * finest) if s * 8 <= float(extent.max())] + [finest]


class _Descent:
    """Adam on a tensor with a leading batch axis; every sample stops on its own.

    The step falls to a tenth along a half cosine. A sample stops once its loss has not fallen by
    ``tolerance`` of its first value within ``patience`` steps; its best state is kept.
    """

    def __init__(
        self, start: Tensor, lr: float, steps: int, tolerance: float, patience: int
    ) -> None:
        self.parameters = start.detach().clone().requires_grad_()
        self.best = start.detach().clone()
        self.lr, self.steps, self.tolerance, self.patience = lr, steps, tolerance, patience
        # Adam divides by the root of the mean square: eps must be far below any gradient.
        self.optimiser = torch.optim.Adam([self.parameters], lr=lr, eps=1e-12)
        self.count = 0
        self.active = torch.ones(len(start), dtype=torch.bool, device=start.device)

    def _per_sample(self, flag: Tensor) -> Tensor:
        return flag.view(-1, *(1,) * (self.best.ndim - 1))

    def step(self, loss: Tensor) -> None:
        """Note the loss ``(B,)`` of the present state, and leave it for a better one."""
        value = loss.detach()
        if not bool(value.isfinite().all()):
            raise FloatingPointError(f"loss: {value.tolist()} at step {self.count}")
        if self.count == 0:
            self.loss = torch.full_like(value, math.inf)
            self.first = value.abs().clamp(min=1e-6)
            self.reference, self.since = self.loss.clone(), torch.zeros_like(value)
        better = (value < self.loss) & self.active
        self.loss = torch.where(better, value, self.loss)
        now = self.parameters.detach()
        self.best.copy_(torch.where(self._per_sample(better), now, self.best))
        # The best is compared with what it was when it last fell visibly.
        fell = self.loss < self.reference - self.tolerance * self.first
        self.reference = torch.where(fell, self.loss, self.reference)
        self.since = torch.where(fell, torch.zeros_like(self.since), self.since + 1)
        self.active = self.active & (self.since < self.patience)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss.sum())
        # The first steps of Adam follow signs alone: they are kept short.
        rise = min((self.count + 1) / WARM_UP, 1.0)
        fall = 0.55 + 0.45 * math.cos(math.pi * self.count / self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * rise * fall
        stay = None if bool(self.active.all()) else now.clone()
        self.optimiser.step()
        if stay is not None:
            now.copy_(torch.where(self._per_sample(self.active), now, stay))
        self.count += 1

    @property
    def running(self) -> bool:
        return self.count < self.steps and bool(self.active.any())


def _check_levels(levels: Sequence[float] | None) -> None:
    if levels is None:
        return
    sizes = check_numbers(levels, "levels")
    if not sizes or not all(0 < s < math.inf for s in sizes):
        raise ValueError(f"levels: wanted one size in mm or more, got {levels!r}")


def _check_settings(
    similarity: object, levels: Sequence[float] | None, steps: int, lr: float, tolerance: float
) -> None:
    if not callable(similarity):
        raise TypeError(f"similarity: wanted a function of two images, got {similarity!r}")
    _check_levels(levels)
    check_positive_int(steps, "steps")
    check_number(lr, "lr", positive=True)
    check_number(tolerance, "tolerance")


# --- Rigid and affine -----------------------------------------------------------------------


@dataclass(frozen=True)
class Rigid:
    """Rotation and translation in millimetres.

    Attributes:
        similarity: of (warped, fixed), ``weight``, ``reduction``; lower is better.
        levels: mm, coarse to fine; ``None`` takes three, the finest of them the smallest voxel
            that gives at most 100,000 voxels.
        steps: at most so many steps a level.
        lr: longest step, as a share of the level's size in mm.
        tolerance: a level ends when the loss has not fallen by this share of its first value
            within 20 steps.
        initialise: ``"moments"`` tries the pair's own start, the centres of mass and the principal
            axes: all that differ go a little way down the two coarsest of the levels that ``None``
            takes, and the one that leads to the best fit is begun with. One that turns the image
            by more than 45 degrees must lead to a loss that is lower by 15 %. These trials are
            neither in the history nor shown to a callback. ``"none"`` begins with the pair's own
            start. A start that is not the identity is always kept.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    similarity: Similarity = ncc
    levels: Sequence[float] | None = None
    steps: int = 100
    lr: float = 0.25
    tolerance: float = 1e-4
    initialise: str = "moments"

    def __post_init__(self) -> None:
        _check_settings(self.similarity, self.levels, self.steps, self.lr, self.tolerance)
        check_choice(self.initialise, "initialise", ("moments", "none"))

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        yield from _align(self, pair, rigid=(True,))


@dataclass(frozen=True)
class Affine:
    """Twelve parameters in millimetres (six in 2-D), after a rigid search at the coarsest level.

    Settings and errors as in :class:`Rigid`.
    """

    similarity: Similarity = ncc
    levels: Sequence[float] | None = None
    steps: int = 100
    lr: float = 0.25
    tolerance: float = 1e-4
    initialise: str = "moments"

    def __post_init__(self) -> None:
        _check_settings(self.similarity, self.levels, self.steps, self.lr, self.tolerance)
        check_choice(self.initialise, "initialise", ("moments", "none"))

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        yield from _align(self, pair, rigid=(True, False))


def _align(method: Rigid | Affine, pair: Pair, rigid: tuple[bool, ...]) -> Iterator[Iterate]:
    """Coarse to fine; the coarsest level runs each of ``rigid`` in turn, the others the last."""
    start, pair = pair.affine, normalised(pair)
    made: dict[float, Level] = {}
    identity = torch.eye(start.shape[1], dtype=start.dtype)
    given = [not a.equal(identity) or bool(u.any()) for a, u in zip(start, pair.field, strict=True)]
    if method.initialise == "moments" and not all(given):
        coarse = level_sizes(pair, None, voxels=AFFINE_VOXELS)[:2]
        made = {size: make_level(pair, size) for size in coarse}
        start = _best_start(method, list(made.values()), start, given)
    for number, size in enumerate(level_sizes(pair, method.levels, voxels=AFFINE_VOXELS)):
        level = made[size] if size in made else make_level(pair, size)
        u = carry_field(pair.field, pair.fixed_affine, level.fixed_affine, level.shape)
        for kind in rigid if number == 0 else rigid[-1:]:
            name = f"{'rigid' if kind else 'affine'}, {level.size:.3g} mm"
            for iterate in _descend_affine(method, level, start, u, pair.field, kind, name):
                yield iterate
            start = iterate.transform()[0]


def _descend_affine(
    method: Rigid | Affine,
    level: Level,
    start: Tensor,
    u: Tensor,
    field: Tensor,
    rigid: bool,
    name: str,
) -> Iterator[Iterate]:
    """One level: A = change after start, the change about where the start puts the centre."""
    b, d = u.shape[:2]
    turns = d * (d - 1) // 2
    extent = [n * s for n, s in zip(level.shape, level.spacing, strict=True)]
    # In mm of movement at this distance, so that one step size suits every parameter.
    radius = sum(extent) / (2 * d)
    middle = grid_centre(level.fixed_affine, level.shape).expand(b, 1, d)
    centre = transform_points(middle, start)[:, 0]

    def matrix(parameters: Tensor) -> Tensor:
        p = parameters / radius
        rotation, translation = p[:, :turns], parameters[:, turns : turns + d]
        if rigid:
            change = rigid_matrix(rotation, translation, centre=centre)
        else:
            scales, shears = p[:, turns + d : turns + 2 * d], p[:, turns + 2 * d :]
            change = affine_matrix(
                rotation, translation, log_scales=scales, shears=shears, centre=centre
            )
        return change @ start.to(change)

    zeros = u.new_zeros(b, turns + d if rigid else 2 * (turns + d))
    descent = _Descent(zeros, method.lr * level.size, method.steps, method.tolerance, 20)
    still = not bool(u.any())
    while descent.running:
        active = descent.active
        here = matrix(descent.parameters)
        if still:
            whole = affine_field(here, level.fixed_affine, level.moving_affine, level.shape)
        else:
            whole = whole_field(here, u, level.fixed_affine, level.moving_affine)
        warped, fixed, weight = level.look(whole)
        loss = method.similarity(warped, fixed, weight=weight, reduction="none")
        descent.step(loss)
        yield Iterate(
            name,
            {"similarity": loss.detach()},
            active,
            lambda: (matrix(descent.best.cpu().double()), field),
        )


def loss_of(level: Level, matrix: Tensor, u: Tensor, similarity: Similarity) -> Tensor:
    """The similarity at ``A(x + u(x))``, ``(B,)`` on the CPU; infinite where images hardly meet.

    Args:
        level: at which they are compared.
        matrix: A, ``(B, D+1, D+1)``, world mm.
        u: ``(B, D, *S)`` on the level's fixed grid, in its voxels.
        similarity: of (warped, fixed), ``weight``, ``reduction``.
    """

    def volume(weight: Tensor, affine: Tensor) -> Tensor:
        return (weight > 0).flatten(1).sum(1) * float(torch.linalg.det(affine).abs())

    mask = torch.ones_like(u[:, :1]) if level.fixed_mask is None else level.fixed_mask
    # The smaller of the two cannot cover more of the other.
    smaller = torch.minimum(
        volume(mask, level.fixed_affine), volume(level.moving_mask, level.moving_affine)
    )
    whole = whole_field(matrix.to(u.device), u, level.fixed_affine, level.moving_affine)
    warped, fixed, weight = level.look(whole)
    loss = similarity(warped, fixed, weight=weight, reduction="none")
    overlap = volume(weight, level.fixed_affine) / smaller
    return loss.where(overlap >= LEAST_OVERLAP, torch.full_like(loss, math.inf)).cpu()


def _best_start(
    method: Rigid | Affine, levels: Sequence[Level], own: Tensor, given: Sequence[bool]
) -> Tensor:
    """Of samples whose start is not given, the one that leads to the best fit.

    Their own, the centres of mass, or the principal axes.
    """
    candidates = torch.stack([own, *_moment_starts(levels[0])], 1)
    chosen = [
        starts[0] if kept else _try(method, levels, b, starts)
        for b, (starts, kept) in enumerate(zip(candidates, given, strict=True))
    ]
    return torch.stack(chosen)


def _try(method: Rigid | Affine, levels: Sequence[Level], sample: int, starts: Tensor) -> Tensor:
    """The one of a sample's starts ``(K, D+1, D+1)`` that leads to the best fit.

    At the coarsest level a head is much like a head upside down. So no start is chosen for how it
    fits there: all that differ go down the levels, and their ends are compared. The start is
    returned, not its end, as what follows takes more steps.
    """

    def copies(level: Level, count: int) -> tuple[Level, Tensor]:
        here = level.copies(sample, count)
        return here, here.fixed.new_zeros(count, len(level.shape), *level.shape)

    level, u = copies(levels[0], len(starts))
    losses = loss_of(level, starts, u, method.similarity)
    losses[0] -= 1e-5  # roundings shall not choose another start
    met = losses.isfinite()
    if not bool(met.any()):
        # Where nothing overlaps enough, the centres of mass are the best guess.
        return starts[1]
    starts = starts[met][distinct(starts[met], losses[met], level.shape, level.fixed_affine)]
    if len(starts) == 1:
        return starts[0]
    trial = dataclasses.replace(method, steps=min(method.steps, TRIAL_STEPS))
    ends = starts
    try:
        for one in levels:
            level, u = copies(one, len(ends))
            *_, last = _descend_affine(trial, level, ends, u, u, True, "trial")
            ends = last.transform()[0]
    except FloatingPointError:
        # A start that is not begun with shall stop nobody.
        return starts[0]
    turned = starts[:, :-1, :-1].diagonal(dim1=1, dim2=2).sum(1) < len(u.shape) - 4 + math.sqrt(2)
    return starts[preferred(loss_of(level, ends, u, method.similarity), turned)]


def preferred(losses: Tensor, turned: Tensor) -> int:
    """Which of several starts to begin with.

    Args:
        losses: ``(K,)``, at the end of each; infinite where the images hardly meet.
        turned: ``(K,)``, which of them turn the image by more than 45 degrees.

    Returns:
        The first whose loss is the least but for a thousandth. Those that turn the image need one
        that is lower by ``TURN_GAIN`` of the least of the others.
    """
    straight = losses[~turned & losses.isfinite()]
    if len(straight):
        losses = losses + turned * TURN_GAIN * straight.min().abs()
    least = losses.min()
    return int((losses <= least + 1e-3 * least.abs()).nonzero()[0])


def distinct(
    matrices: Tensor,
    losses: Tensor,
    shape: Sequence[int],
    affine: Tensor,
    count: int | None = None,
) -> list[int]:
    """The best matrices that differ by more than ``APART``.

    Args:
        matrices: ``(K, D+1, D+1)``, world mm.
        losses: ``(K,)``, lower is better.
        shape: of the grid whose corners they move, ``D`` sizes.
        affine: of that grid, ``(D+1, D+1)``, voxels to world mm.
        count: at most so many.

    Returns:
        Their indices, best first.
    """
    ends = [torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in shape]
    corners = voxel_to_world(torch.cartesian_prod(*ends).unsqueeze(0), affine)
    places = transform_points(corners.expand(len(matrices), -1, -1), matrices)
    far = APART * float((affine[:-1, :-1].norm(dim=0) * affine.new_tensor(shape)).mean())
    kept: list[int] = []
    for k in losses.argsort(stable=True).tolist():
        if all(float((places[k] - places[j]).norm(dim=1).mean()) > far for j in kept):
            kept.append(k)
        if len(kept) == count:
            break
    return kept


def _moment_starts(level: Level) -> list[Tensor]:
    """Rigid maps that bring the centres of mass together, and the principal axes."""
    fixed_centre, fixed_axes = _moments(level.fixed, level.fixed_mask, level.fixed_affine)
    moving_centre, moving_axes = _moments(level.moving, level.moving_mask, level.moving_affine)
    d = fixed_centre.shape[1]
    turns = [torch.eye(d, dtype=torch.float64).expand_as(fixed_axes)]
    # The axes have no sign of their own: every choice that is no mirror image.
    for signs in itertools.product((1.0, -1.0), repeat=d):
        if math.prod(signs) > 0:
            flip = torch.diag(torch.tensor(signs, dtype=torch.float64))
            turns.append(moving_axes @ flip @ fixed_axes.mT)
    return [about(fixed_centre, turn, moving_centre - fixed_centre) for turn in turns]


def _moments(image: Tensor, mask: Tensor | None, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass ``(B, D)`` in mm and principal axes ``(B, D, D)`` in columns, float64.

    The axes are right-handed.
    """
    weight = torch.ones_like(image[:, :1]) if mask is None else (mask > 0).to(image)
    mass = (image - image.flatten(1).amin(1).view(-1, *(1,) * (image.ndim - 1))).mean(1) * weight[
        :, 0
    ]
    mass = mass.flatten(1).double().cpu()
    mass = mass + (mass.sum(1, keepdim=True) == 0)  # a constant image has its middle
    mass = mass / mass.sum(1, keepdim=True)
    voxels = identity_grid(image.shape[2:], dtype=torch.float64).flatten(2)[0].T
    world = voxel_to_world(voxels.unsqueeze(0), affine)[0]
    centre = mass @ world
    apart = world - centre.unsqueeze(1)
    covariance = torch.einsum("bn,bni,bnj->bij", mass, apart, apart)
    axes = torch.linalg.eigh(covariance).eigenvectors
    axes[..., 0] *= torch.linalg.det(axes).sign().unsqueeze(1)
    return centre, axes


# --- Deformable -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Displacement:
    """A displacement of every voxel, regularised, by gradient descent from coarse to fine.

    A is kept as the pair has it: put an :class:`Affine` before. Nothing keeps such a field from
    folding but its regularity; a :class:`Velocity` hardly folds, at the price of its integration.

    Attributes:
        similarity: of (warped, fixed), ``weight``, ``reduction``; lower is better. The default is
            local correlation in windows of five voxels.
        regularity: of (field in voxels), ``spacing`` in mm, ``reduction``; lower is better.
        regularity_weight: of the regularity in the loss.
        levels: mm, coarse to fine; ``None`` takes 4, 2 and 1 times the smallest voxel size.
        steps: at most so many steps a level.
        lr: longest step, as a share of a voxel of the level.
        tolerance: a level ends when the loss has not fallen by this share of its first value
            within 10 steps.
        nodes: distance of the nodes between which the field is linear, in voxels of the level.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    similarity: Similarity = _LNCC
    regularity: Similarity = diffusion
    regularity_weight: float = 5.0
    levels: Sequence[float] | None = None
    steps: int = 30
    lr: float = 0.2
    tolerance: float = 1e-3
    nodes: float = 2.0

    def __post_init__(self) -> None:
        _check_deformable(self)

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        yield from _deform(self, pair, "displacement", partial(_Nodes, to_field=lambda u: u))


@dataclass(frozen=True)
class Velocity:
    """A stationary velocity of every voxel: the field is exp(v), which has the inverse exp(-v).

    Settings and errors as in :class:`Displacement`; the regularity is that of the velocity.

    Attributes:
        symmetric: compare both images half way, the moving one through exp(v / 2) and the fixed
            one through exp(-v / 2), so that neither is favoured.
        squarings: of scaling and squaring, :func:`reglib.geometry.fields.integrate`.

    Arsigny et al., MICCAI 2006, doi:10.1007/11866565_113; symmetric as in Avants et al., Medical
    Image Analysis 2008, doi:10.1016/j.media.2007.06.004.
    """

    similarity: Similarity = _LNCC
    regularity: Similarity = diffusion
    regularity_weight: float = 0.5
    levels: Sequence[float] | None = None
    steps: int = 30
    lr: float = 0.2
    tolerance: float = 1e-3
    nodes: float = 2.0
    symmetric: bool = False
    squarings: int = 5

    def __post_init__(self) -> None:
        _check_deformable(self)
        check_positive_int(self.squarings, "squarings")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        model = partial(_Nodes, to_field=partial(integrate, steps=self.squarings))
        yield from _deform(self, pair, "velocity", model, symmetric=self.symmetric)


@dataclass(frozen=True)
class BSpline:
    """A cubic B-spline through a lattice of control points: free-form deformation.

    Settings and errors as in :class:`Displacement`; the regularity is that of the dense field.

    Attributes:
        nodes: distance of the control points, whole voxels of the level.

    Rueckert et al., IEEE TMI 1999, doi:10.1109/42.796284.
    """

    similarity: Similarity = _LNCC
    regularity: Similarity = diffusion
    regularity_weight: float = 1.0
    levels: Sequence[float] | None = None
    steps: int = 30
    lr: float = 0.2
    tolerance: float = 1e-3
    nodes: int = 4

    def __post_init__(self) -> None:
        _check_deformable(self)
        check_positive_int(self.nodes, "nodes")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        yield from _deform(self, pair, "B-spline", _Lattice)


#: A model of deformation at a level: made of the level and the distance of its nodes.
_Model = Callable[["Level", float], "_Nodes | _Lattice"]


class _Nodes:
    """Vectors on a grid of nodes; ``to_field`` makes the displacement of them."""

    def __init__(self, level: Level, nodes: float, to_field: Callable[[Tensor], Tensor]) -> None:
        self.level, self.to_field = level, to_field
        self.apart = [s * nodes for s in level.spacing]
        self.grid, self.shape = conform_grid(level.fixed_affine, level.shape, spacing=self.apart)

    def begin(self, state: Tensor, grid: Tensor) -> Tensor:
        """What is optimised, from the end of the level before."""
        return carry_field(state, grid, self.grid, self.shape)

    def end(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """What the next level begins with, and its grid."""
        return parameters, self.grid

    def field(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The displacement, and its grid."""
        return self.to_field(parameters), self.grid

    def rough(self, parameters: Tensor, field: Tensor, regularity: Similarity) -> Tensor:
        """The regularity of the nodes, ``(B,)``."""
        return regularity(parameters, spacing=self.apart, reduction="none")


class _Lattice:
    """Control points of a B-spline, a whole number of the level's voxels apart."""

    def __init__(self, level: Level, nodes: float) -> None:
        self.level, self.stride = level, int(nodes)

    def begin(self, state: Tensor, grid: Tensor) -> Tensor:
        """The lattice whose field is closest to that of the level before."""
        field = carry_field(state, grid, self.level.fixed_affine, self.level.shape)
        return fit_lattice(field, self.stride)

    def end(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The dense field: a finer lattice is fitted to it."""
        return self.field(parameters)

    def field(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The displacement, and its grid."""
        return bspline_field(parameters, self.level.shape, self.stride), self.level.fixed_affine

    def rough(self, parameters: Tensor, field: Tensor, regularity: Similarity) -> Tensor:
        """The regularity of the dense field, ``(B,)``."""
        return regularity(field, spacing=self.level.spacing, reduction="none")


def _check_deformable(method: Displacement | Velocity | BSpline) -> None:
    _check_settings(method.similarity, method.levels, method.steps, method.lr, method.tolerance)
    if not callable(method.regularity):
        raise TypeError(f"regularity: wanted a function of a field, got {method.regularity!r}")
    check_number(method.regularity_weight, "regularity_weight")
    check_number(method.nodes, "nodes", least=1.0)


def _deform(
    method: Displacement | Velocity | BSpline,
    pair: Pair,
    name: str,
    make: _Model,
    *,
    symmetric: bool = False,
) -> Iterator[Iterate]:
    """Coarse to fine: the model of a level turns what is optimised into its displacement.

    What the pair has been displaced by before stays, underneath: ``A(x + u0(x + u(x)))``.
    """
    pair = normalised(pair)
    matrix = pair.affine.to(pair.field)
    before = pair.field if bool(pair.field.any()) else None
    state, grid = torch.zeros_like(pair.field), pair.fixed_affine
    shape = tuple(pair.fixed.shape[2:])

    def transform(best: Tensor, model: _Nodes | _Lattice) -> tuple[Tensor, Tensor]:
        u = carry_field(*model.field(best), pair.fixed_affine, shape)
        return pair.affine, u.clone() if before is None else compose(before, u)

    for size in level_sizes(pair, method.levels, voxels=None):
        level = make_level(pair, size)
        model = make(level, method.nodes)
        under = None
        if before is not None:
            under = carry_field(before, pair.fixed_affine, level.fixed_affine, level.shape)

        def on_level(p: Tensor, level: Level = level, model: _Nodes | _Lattice = model) -> Tensor:
            return carry_field(*model.field(p), level.fixed_affine, level.shape)

        start = model.begin(state, grid)
        descent = _Descent(start, method.lr, method.steps, method.tolerance, 10)
        while descent.running:
            active, here = descent.active, descent.parameters
            field = on_level(here / 2 if symmetric else here)
            whole = field if under is None else compose(under, field)
            whole = whole_field(matrix, whole, level.fixed_affine, level.moving_affine)
            back = on_level(-here / 2) if symmetric else None
            warped, fixed, weight = level.look(whole, back)
            terms = {
                "similarity": method.similarity(warped, fixed, weight=weight, reduction="none"),
                "regularity": method.regularity_weight
                * model.rough(here, field, method.regularity),
            }
            descent.step(terms["similarity"] + terms["regularity"])
            yield Iterate(
                f"{name}, {size:.3g} mm",
                {key: term.detach() for key, term in terms.items()},
                active,
                partial(transform, descent.best, model),
            )
        state, grid = model.end(descent.best)
