"""What every method of registration is given, and what it gives back at every step.

A method is a callable that takes a :class:`Pair` and yields an :class:`Iterate` per step: its loop
stays in its own file, while progress bar, callback, history and interruption are the business of
:func:`reglib.registration.register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from reglib.geometry.affine import whole_field
from reglib.geometry.sampling import warp


@dataclass(frozen=True, eq=False)
class Pair:
    """A batch of pairs, checked: images, where their voxels are, and where to start.

    Attributes:
        moving: ``(B, C, *T)``, float32 or float64, finite.
        fixed: ``(B, C, *S)``, same dtype and device.
        moving_affine: ``(D+1, D+1)``, voxels of the moving image to world mm; float64 on the CPU.
        fixed_affine: the same of the fixed image.
        moving_mask: ``(B, 1, *T)``, how much each voxel counts, or ``None``.
        fixed_mask: ``(B, 1, *S)``, or ``None``.
        affine: ``(B, D+1, D+1)``, A to start from, world mm, fixed to moving; float64 on the CPU.
        field: ``(B, D, *S)``, u to start from, voxels of the fixed grid.
    """

    moving: Tensor
    fixed: Tensor
    moving_affine: Tensor
    fixed_affine: Tensor
    moving_mask: Tensor | None
    fixed_mask: Tensor | None
    affine: Tensor
    field: Tensor

    def warped(self) -> Tensor:
        """The moving image through the transform to start from, ``(B, C, *S)``."""
        return warp(self.moving, self.whole_field())

    def whole_field(self) -> Tensor:
        """The transform to start from as one field to the moving voxels, ``(B, D, *S)``."""
        matrix = self.affine.to(self.field.device)
        return whole_field(matrix, self.field, self.fixed_affine, self.moving_affine)


class Iterate(NamedTuple):
    """The state of a method after one step.

    Attributes:
        stage: what is being optimised, such as ``"affine, 4 mm"``.
        terms: terms of the loss by name, ``(B,)`` each, at the step's beginning; may be empty.
        active: ``(B,)``, which pairs are still being optimised: the terms of the others are stale.
        transform: gives the best ``(affine, field)`` so far, shaped as in :class:`Pair`; later
            steps do not change what it has given.
        notes: sentences for the report, such as how the images were converted.
    """

    stage: str
    terms: Mapping[str, Tensor]
    active: Tensor
    transform: Callable[[], tuple[Tensor, Tensor]]
    notes: tuple[str, ...] = ()


#: Takes a pair (first step to last) and yields the state after each step, at least once.
Method = Callable[[Pair], Iterator[Iterate]]
