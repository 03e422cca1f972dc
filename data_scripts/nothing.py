"""A method of registration that does nothing, for what a cohort costs beside its registrations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from reglib.methods.pair import Iterate, Pair


@dataclass(frozen=True)
class Nothing:
    """Gives back the transform to start from."""

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Yield once."""
        done = torch.zeros(len(pair.fixed), dtype=torch.bool)
        yield Iterate("nothing", {}, done, lambda: (pair.affine, pair.field))
