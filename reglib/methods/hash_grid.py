"""Multi-resolution hash encoding: features at the vertices of grids, from coarse to fine.

A coordinate is described by the features around it, interpolated on each of several grids and
written one after the other. A grid whose vertices all fit into a table has an entry for each of
them (a *dense* level); of a finer one, vertices that hash to the same entry share it (a *hashed*
level). Müller et al., ACM Trans. Graph. 2022, doi:10.1145/3528223.3530127.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reglib.checks import check_numbers, check_points, check_positive_int, check_shape, check_tensor
from reglib.geometry.grid import no_autocast, sample

#: What the indices of a vertex are multiplied by before they are combined (section 3 of the paper).
PRIMES = (1, 2654435761, 805459861)

#: Of ``torch.compile``, where hashed levels are compiled.
BACKEND = "inductor"


def resolutions(
    coarsest: Sequence[int], finest: Sequence[int], levels: int
) -> tuple[tuple[int, ...], ...]:
    """Cells along each axis at every level, in geometric progression (2 and 3).

    ``N_j = floor(N_coarsest b^j)`` with ``b = (N_finest / N_coarsest)^(1 / (levels - 1))``, along
    each axis by itself. A single level is the coarsest.

    Args:
        coarsest: cells along each axis, two or three axes.
        finest: the same, nowhere fewer.
        levels: their number.

    Returns:
        Cells along each axis, coarsest level first.

    Raises:
        TypeError, ValueError: if the numbers are not positive integers or do not ascend.
    """
    check_shape(coarsest, (2, 3), "coarsest")
    check_shape(finest, (len(coarsest),), "finest")
    check_positive_int(levels, "levels")
    if any(b < a for a, b in zip(coarsest, finest, strict=True)):
        raise ValueError(f"finest: wanted at least {tuple(coarsest)}, got {tuple(finest)}")

    def along(low: int, high: int, level: int) -> int:
        # What rounding takes off a whole number must not take off a whole cell.
        growth = (high / low) ** (level / max(levels - 1, 1))
        return math.floor(low * growth * (1 + 1e-12))

    pairs = [(int(a), int(b)) for a, b in zip(coarsest, finest, strict=True)]
    return tuple(tuple(along(a, b, j) for a, b in pairs) for j in range(levels))


def window(progress: float, levels: int) -> Tensor:
    """How much each level counts, from coarse to fine.

    ``w_j = (1 - cos(pi clip(progress levels - j, 0, 1))) / 2``: none at 0, all fully at 1, and in
    between one level after the other fades in.

    Args:
        progress: alpha, from 0 to 1; what is larger counts as 1.
        levels: their number.

    Returns:
        Weights ``(levels,)``, float32, on the CPU.

    Raises:
        TypeError, ValueError: if ``progress`` is no number of at least 0 or ``levels`` no positive
            integer.

    Park et al. (Nerfies), ICCV 2021, doi:10.1109/ICCV48922.2021.00581.
    """
    [progress] = check_numbers([progress], "progress")
    if not progress >= 0:
        raise ValueError(f"progress: wanted at least 0, got {progress}")
    check_positive_int(levels, "levels")
    ramp = (min(progress, 1.0) * levels - torch.arange(levels, dtype=torch.float64)).clamp(0, 1)
    return (0.5 * (1 - torch.cos(math.pi * ramp))).float()


class HashGrid(nn.Module):
    """Features of coordinates, interpolated on grids of several resolutions.

    Dense levels are exact: they are linear interpolation of a tensor of features. On hashed levels
    vertices that collide share their features, and training decides whom these serve. Vertices lie
    at both ends of every axis, so that N cells have N + 1 of them.

    Args:
        coarsest: cells along each axis of the first level, two or three axes.
        finest: cells along each axis of the last level.
        levels: their number; in between as :func:`resolutions` says.
        features: of each vertex.
        table: entries of a level at most; a level of more vertices is hashed.
        copies: so many encodings side by side, one for each sample of a batch; all begin with the
            same features.
        scale: features begin uniformly distributed between minus and plus this.
        generator: source of randomness, on the CPU; torch's own if ``None``.
        compiled: evaluate hashed levels by ``torch.compile``, which makes few kernels of their many
            steps. The first evaluation takes seconds to minutes, and on a CPU a C++ compiler.

    Raises:
        TypeError, ValueError: if an argument is malformed.
    """

    #: Cells along each axis at every level, coarsest first.
    resolutions: tuple[tuple[int, ...], ...]

    def __init__(
        self,
        coarsest: Sequence[int],
        finest: Sequence[int],
        *,
        levels: int = 8,
        features: int = 2,
        table: int = 2**16,
        copies: int = 1,
        scale: float = 1e-4,
        generator: torch.Generator | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        for value, name in ((features, "features"), (table, "table"), (copies, "copies")):
            check_positive_int(value, name)
        [scale] = check_numbers([scale], "scale")
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale: wanted a number of at least 0, got {scale}")
        self.resolutions = resolutions(coarsest, finest, levels)
        self.copies, self.table, self.features = copies, table, features
        if not isinstance(compiled, bool):
            raise TypeError(f"compiled: wanted True or False, got {compiled!r}")
        self.compiled = compiled
        tables = []
        for cells in self.resolutions:
            dense = not self._is_hashed(cells)
            # A dense level has the axes of its grid, so that it can be sampled as an image.
            shape = tuple(n + 1 for n in cells) if dense else (table,)
            values = scale * (2 * torch.rand((1, features, *shape), generator=generator) - 1)
            tables.append(nn.Parameter(values.repeat(copies, *(1,) * (values.ndim - 1))))
        #: Tensors of each level, ``(copies, features, *(N + 1))`` or ``(copies, features, table)``.
        self.tables = nn.ParameterList(tables)

    def _is_hashed(self, cells: Sequence[int]) -> bool:
        return math.prod(n + 1 for n in cells) > self.table

    @property
    def hashed(self) -> tuple[bool, ...]:
        """Which levels are hashed, coarsest first."""
        return tuple(self._is_hashed(cells) for cells in self.resolutions)

    def collisions(self) -> tuple[int, ...]:
        """For each level, how many vertices there are beyond the entries that they use.

        0 where a level is dense: there every vertex has an entry to itself.
        """
        found = []
        for cells, hashed in zip(self.resolutions, self.hashed, strict=True):
            if not hashed:
                found.append(0)
                continue
            used = torch.zeros(self.table, dtype=torch.bool)
            rest = torch.cartesian_prod(*(torch.arange(n + 1) for n in cells[1:]))
            rest = rest.view(len(rest), -1)
            for first in range(cells[0] + 1):  # one layer at a time: a volume has many vertices
                vertices = torch.cat([torch.full((len(rest), 1), first), rest], 1)
                used[_hash(vertices, self.table)] = True
            found.append(math.prod(n + 1 for n in cells) - int(used.sum()))
        return tuple(found)

    def forward(self, points: Tensor, weights: Tensor | None = None) -> Tensor:
        """Describe every point by its features.

        Computed in the dtype of the features, also under autocast.

        Args:
            points: ``(B, N, D)``, from 0 to 1 between the ends of every axis; clamped to that.
                B is the number of copies, or any if there is one.
            weights: ``(levels,)``, what the features of each level are multiplied by, such as
                those of :func:`window`; ``None`` for 1. Levels of weight 0 are not evaluated.

        Returns:
            ``(B, N, levels * features)``, coarsest level first. Differentiable with respect to the
            features and, within the cells, the points.

        Raises:
            TypeError, ValueError: if an argument is not of this form.
        """
        check_points(points, "points", len(self.resolutions[0]))
        if self.copies not in (1, len(points)):
            raise ValueError(f"points: wanted a batch of {self.copies}, got {len(points)}")
        scales = [1.0] * len(self.tables) if weights is None else self._checked(weights)
        first = next(iter(self.tables))
        with no_autocast(points):
            inside = points.to(first.dtype).clamp(0, 1)
            levels = []
            for cells, values, scale in zip(self.resolutions, self.tables, scales, strict=True):
                if scale == 0:
                    level = inside.new_zeros(len(inside), self.features, inside.shape[1])
                else:
                    read = self._reader(cells)
                    expanded = values.expand(len(inside), *values.shape[1:])
                    level = scale * read(expanded, inside, inside.new_tensor(cells))
                levels.append(level)
            return torch.cat(levels, 1).mT

    def _reader(self, cells: Sequence[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if not self._is_hashed(cells):
            return _dense_level
        return _compiled(BACKEND) if self.compiled else _hashed_level

    def _checked(self, weights: Tensor) -> list[float]:
        check_tensor(weights, "weights")
        if weights.shape != (len(self.tables),):
            raise ValueError(
                f"weights: wanted one per level, ({len(self.tables)},), got {tuple(weights.shape)}"
            )
        return [float(w) for w in weights.tolist()]


def _dense_level(values: Tensor, points: Tensor, cells: Tensor) -> Tensor:
    """Interpolate ``(B, F, *(N + 1))`` at ``(B, N, D)`` between 0 and 1: ``(B, F, N)``."""
    b, n, d = points.shape
    coords = (points * cells).mT.reshape(b, d, n, *(1,) * (d - 1))
    return sample(values, coords).reshape(b, -1, n)


def _hashed_level(values: Tensor, points: Tensor, cells: Tensor) -> Tensor:
    """Interpolate the entries ``(B, F, T)`` of the vertices around every point: ``(B, F, N)``."""
    b, n, d = points.shape
    place = points * cells
    # The far end belongs to the last cell.
    corner = torch.minimum(place.detach().floor(), cells - 1)
    part = (place - corner).unsqueeze(2)
    steps = torch.cartesian_prod(*[torch.arange(2, device=points.device)] * d)
    entries = _hash(corner.long().unsqueeze(2) + steps, values.shape[2])
    share = torch.where(steps == 1, part, 1 - part).prod(3)
    # Points may be a view of a grid whose axes come first.
    index = entries.reshape(b, 1, -1).expand(b, values.shape[1], -1)
    around = values.gather(2, index).view(b, -1, n, 2**d)
    return (around * share.unsqueeze(1)).sum(3)


@functools.cache
def _compiled(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Of any number of points: the cells of a level come as a tensor, so that one serves all.
    return torch.compile(_hashed_level, dynamic=True, backend=backend)


def _hash(vertices: Tensor, table: int) -> Tensor:
    """Entries of vertices ``(..., D)``: products with primes, combined by exclusive or."""
    # Indices below 2**20 keep the products within 64 bits; of a power of two only the low bits
    # count, as in the 32-bit arithmetic of the paper.
    mixed = vertices[..., 0] * PRIMES[0]
    for axis in range(1, vertices.shape[-1]):
        mixed = mixed ^ (vertices[..., axis] * PRIMES[axis])
    return mixed % table
