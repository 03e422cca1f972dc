"""Rigid registration from far away: many starts are compared, and the best of them are followed.

Gradients lead to the nearest optimum. Where the images lie several structures apart that is a wrong
one, so the space of rotations and translations is looked through first, at a resolution at which
hundreds of comparisons take a second or two. :func:`confidence` says whether a result stands out
from what lies around it, which no loss does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.checks import check_numbers, check_positive_int
from reglib.geometry.affine import grid_centre, rigid_matrix
from reglib.geometry.fields import carry_field
from reglib.methods.classical import (
    AFFINE_VOXELS,
    Rigid,
    Similarity,
    distinct,
    level_sizes,
    loss_of,
    make_level,
    normalised,
)
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.mind import mind

#: Starts are compared on grids of at most so many voxels, and so are displaced results.
COARSE_VOXELS = 4_096

#: So many of them at a time.
AT_ONCE = 64

#: Displaced copies of a result that its similarity is compared with, and how far they go, as shares
#: of the image.
DISPLACED, NEAREST, FARTHEST = 96, 0.06, 0.25

#: A result of at least this :func:`confidence` is taken for right. On the tuning patches of the
#: Zurich chapter right ends of a search have 0.33 and more by MIND, wrong ones 0.27 and less.
SURE = 0.3


class Found(NamedTuple):
    """What a search ends with, best first.

    Attributes:
        affine: ``(K, B, D+1, D+1)``, world mm, float64 on the CPU.
        loss: the similarity of each, ``(K, B)``.
    """

    affine: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Search:
    """Rotation and translation in millimetres, sought around where the pair starts.

    Rigid changes of the start, spread evenly over a box (Sobol's sequence, the first is no change),
    are compared at a coarse level. From the best that differ
    :class:`reglib.methods.classical.Rigid` descends, side by side, over two levels. A stage
    ``"search"`` of the history holds the similarity of the best end and its :func:`confidence`. A
    finer Rigid may follow.

    Attributes:
        similarity: of (warped, fixed), ``weight``, ``reduction``; lower is better.
        rotation: largest component of the rotations, in radians, about the middle of the fixed
            image.
        translation: largest translation along each axis, as a share of the image's size.
        candidates: how many changes are compared.
        kept: how many are followed.
        steps: of each descent at either level; 0 leaves the candidates as they are.
        seed: of the sequence.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    similarity: Similarity = mind
    rotation: float = math.radians(30)
    translation: float = 0.15
    candidates: int = 512
    kept: int = 8
    steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.similarity):
            raise TypeError(f"similarity: wanted a function of two images, got {self.similarity!r}")
        for name, most in (("rotation", math.pi), ("translation", 1.0)):
            [value] = check_numbers([getattr(self, name)], name)
            if not 0 <= value <= most:
                raise ValueError(f"{name}: wanted a number from 0 to {most:.4g}, got {value}")
        for name in ("candidates", "kept"):
            check_positive_int(getattr(self, name), name)
        if self.steps != 0:
            check_positive_int(self.steps, "steps")
        if self.candidates < self.kept:
            raise ValueError(
                f"candidates: wanted at least {self.kept}, which are kept, got {self.candidates}"
            )

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Search; yields once."""
        found = self.best(pair)
        affine = found.affine[0]
        terms = {
            "similarity": found.loss[0],
            "confidence": confidence(self.similarity, pair, affine, pair.field),
        }
        active = torch.ones(len(affine), dtype=torch.bool)
        notes = (confidence_note(terms["confidence"]),)
        yield Iterate("search", terms, active, lambda: (affine, pair.field), notes)

    def best(self, pair: Pair) -> Found:
        """The ends of all that are followed, of each pair of a batch by itself.

        Args:
            pair: where to start from; its field stays underneath.
        """
        found = [self._follow(_one(pair, b)) for b in range(len(pair.fixed))]
        return Found(*(torch.stack(parts, 1) for parts in zip(*found, strict=True)))

    def _follow(self, pair: Pair) -> Found:
        """The same of a single pair, without the axis of the batch."""
        d = pair.fixed.ndim - 2
        turns = d * (d - 1) // 2
        # Sobol's engine takes a seed of its own and leaves torch's randomness alone.
        engine = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
            turns + d, scramble=True, seed=self.seed
        )
        draws = 2 * engine.draw(self.candidates, dtype=torch.float64) - 1
        draws[0] = 0
        starts = pair.affine @ _moves(
            pair, self.rotation * draws[:, :turns], self.translation * draws[:, turns:]
        )
        size = level_sizes(pair, None, voxels=COARSE_VOXELS)[-1]
        whole = normalised(pair)
        losses = _losses(self.similarity, whole, size, starts)
        best = distinct(starts, losses, pair.fixed.shape[2:], pair.fixed_affine, self.kept)
        # Where too few differ, the next best fill the places left.
        others = [k for k in losses.argsort(stable=True).tolist() if k not in best]
        chosen = starts[[*best, *others][: self.kept]]
        if self.steps:
            levels = (size, size / 2)
            level = make_level(whole, levels[-1]).copies(0, self.kept)
            u = carry_field(pair.field, pair.fixed_affine, level.fixed_affine, level.shape)
            small = Pair(
                level.moving,
                level.fixed,
                level.moving_affine,
                level.fixed_affine,
                level.moving_mask,
                level.fixed_mask,
                chosen,
                u.expand(self.kept, *u.shape[1:]),
            )
            rigid = Rigid(self.similarity, levels=levels, steps=self.steps, initialise="none")
            *_, last = rigid(small)
            chosen = last.transform()[0]
        finest = level_sizes(pair, None, voxels=AFFINE_VOXELS)[-1]
        losses = _losses(self.similarity, whole, finest, chosen)
        order = losses.argsort(stable=True)
        return Found(chosen[order], losses[order])


def comparison(
    similarity: Similarity, pair: Pair, *, voxels: int = AFFINE_VOXELS
) -> Callable[[Tensor, Tensor], Tensor]:
    """What compares transforms of a pair, at one resolution.

    Args:
        similarity: of (warped, fixed), ``weight``, ``reduction``; lower is better.
        pair: the images; where it starts does not matter.
        voxels: of the fixed grid at most; both images are resampled to it.

    Returns:
        A function of A, ``(B, D+1, D+1)``, and u, ``(B, D, *S)`` on the pair's fixed grid, that
        gives ``(B,)`` on the CPU; infinite where the images hardly meet.
    """
    level = make_level(normalised(pair), level_sizes(pair, None, voxels=voxels)[-1])

    @torch.no_grad()
    def compare(affine: Tensor, field: Tensor) -> Tensor:
        u = carry_field(field, pair.fixed_affine, level.fixed_affine, level.shape)
        return loss_of(level, affine, u, similarity)

    return compare


@torch.no_grad()
def confidence(similarity: Similarity, pair: Pair, affine: Tensor, field: Tensor) -> Tensor:
    """Whether a result stands out from copies of it that are displaced: from -1 to 1.

    The copies are turned and shifted at random by 6 to 25 % of the image. Of the way from the
    typical copy (the median) up to the result, the confidence is the part that even the best copy
    has not gone: near 1 where the result stands alone, near 0 where some copy is as good, negative
    where one is better. From ``SURE`` on a result is taken for right.

    Args:
        similarity: of (warped, fixed), ``weight``, ``reduction``; lower is better.
        pair: the images.
        affine: A of the result, ``(B, D+1, D+1)``, world mm.
        field: u of the result, ``(B, D, *S)``, voxels of the fixed grid.

    Returns:
        ``(B,)`` on the CPU; 0 where nothing can be compared.
    """
    d = pair.fixed.ndim - 2
    turns = d * (d - 1) // 2
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn((DISPLACED, turns + d), dtype=torch.float64, generator=generator)
    draws /= draws.norm(dim=1, keepdim=True)
    length = torch.rand((DISPLACED, 1), dtype=torch.float64, generator=generator)
    length = NEAREST + (FARTHEST - NEAREST) * length
    # A turn by an angle moves the corners by about half of it, as a share of the image.
    moves = _moves(pair, 2 * length * draws[:, :turns], length * draws[:, turns:])
    size = level_sizes(pair, None, voxels=COARSE_VOXELS)[-1]
    values = []
    for b in range(len(affine)):
        one = _one(pair, b, field)
        matrices = torch.cat([affine[b : b + 1], affine[b] @ moves])
        losses = _losses(similarity, normalised(one), size, matrices)
        others = losses[1:][losses[1:].isfinite()]
        if not len(others) or not bool(losses[0].isfinite()):
            values.append(losses.new_zeros(()))
            continue
        whole, part = others.median() - losses[0], others.min() - losses[0]
        # Where the typical copy is better than the result there is no way up to it.
        clear = part / whole if whole > 0 else part.sign()
        values.append(clear.clamp(-1, 1))
    return torch.stack(values)


def confidence_note(values: Tensor) -> str:
    """A sentence for the report."""
    text = ", ".join(f"{value:.2f}" for value in values.tolist())
    return f"confidence (1 stands alone, from {SURE:g} on it is sure, 0 is one of many): {text}"


# --- Parts ----------------------------------------------------------------------------------


def _one(pair: Pair, b: int, field: Tensor | None = None) -> Pair:
    """One pair of a batch, with another field if one is given."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[b : b + 1]

    return Pair(
        pair.moving[b : b + 1],
        pair.fixed[b : b + 1],
        pair.moving_affine,
        pair.fixed_affine,
        part(pair.moving_mask),
        part(pair.fixed_mask),
        pair.affine[b : b + 1],
        (pair.field if field is None else field)[b : b + 1],
    )


@torch.no_grad()
def _losses(similarity: Similarity, pair: Pair, size: float, matrices: Tensor) -> Tensor:
    """The similarity of a single normalised pair through many matrices at a level, ``(N,)``."""
    level = make_level(pair, size)
    u = carry_field(pair.field, pair.fixed_affine, level.fixed_affine, level.shape)
    return torch.cat(
        [
            loss_of(level.copies(0, len(part)), part, u.expand(len(part), *u.shape[1:]), similarity)
            for part in torch.split(matrices, AT_ONCE)
        ]
    )


def _moves(pair: Pair, rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotations about the middle of the fixed image, and shares of its size: ``(N, D+1, D+1)``."""
    shape = tuple(pair.fixed.shape[2:])
    size = pair.fixed_affine[:-1, :-1] * pair.fixed_affine.new_tensor(shape)
    return rigid_matrix(
        rotation, translation @ size.T, centre=grid_centre(pair.fixed_affine, shape)
    )
