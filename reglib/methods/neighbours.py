"""Attention of points to the grid nodes around them, with nothing kept per neighbour.

The plain form gathers the features of all neighbours of all points, ``(B, P, K, C)`` numbers, and
reverse-mode differentiation keeps several tensors of that size. Here points are taken a few
thousand at a time, what they look at is formed, used and forgotten, and formed again when the
gradient is wanted: Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174,
for one layer whose gradient is written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reglib.geometry.grid import no_autocast

#: Numbers per tensor that a part of the points may form: about what a cache holds, and on a GPU
#: what keeps it busy.
_PART = {"cpu": 2**19, "cuda": 2**25}


class Neighbours(NamedTuple):
    """What points look at: nodes of a grid."""

    features: Tensor  #: of the nodes ``(B, M, C)``, in the order of the flat grid
    shape: Sequence[int]  #: spatial shape of the grid, of M nodes
    place: Tensor  #: where neighbourhoods are looked for ``(B, P, D)``, voxels of the grid
    centre: Tensor  #: what positions are relative to ``(B, P, D)``
    size: int  #: nodes along each axis
    shift: Tensor | None = None  #: how far each node has moved from the grid ``(B, M, D)``
    reach: float | None = None  #: relative positions are clamped to this, along each axis


def part_rows(device: torch.device, numbers: int) -> int:
    """How many points a part holds, of which each forms so many numbers per tensor."""
    return max(1, _PART.get(device.type, _PART["cpu"]) // numbers)


def offsets(size: int, dimensions: int, like: Tensor) -> Tensor:
    """``(size**D, D)``: 0, 1 along each axis for size 2; -1, 0, 1 for size 3; -1 to 2 for 4."""
    reach = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) // 2
    return torch.cartesian_prod(*(reach,) * dimensions).view(-1, dimensions)


def neighbourhood(place: Tensor, size: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The ``size**D`` grid nodes nearest to each point.

    Odd sizes surround the nearest node, even sizes the cell that encloses the point. A point
    outside the grid is given the neighbourhood of the nearest place inside.

    Args:
        place: points ``(..., D)`` in voxels of the grid.
        size: nodes along each axis.
        shape: spatial shape of the grid.

    Returns:
        Positions of the nodes ``(..., K, D)``, their flat indices ``(..., K)`` (0 where there is no
        node), and whether they lie inside the grid ``(..., K)``.
    """
    last = torch.tensor([n - 1 for n in shape], dtype=place.dtype, device=place.device)
    start = place.round() if size % 2 else place.floor()
    # The last cell starts one node before the last node.
    final = last if size % 2 else (last - 1).clamp(min=0)
    start = start.clamp(min=torch.zeros_like(last), max=final)
    nodes = start.unsqueeze(-2) + offsets(size, len(shape), place)
    inside = ((nodes >= 0) & (nodes <= last)).all(-1)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    stride = torch.tensor(strides, dtype=torch.long, device=place.device)
    return nodes, (nodes.long() * stride).sum(-1) * inside, inside


class Seen(NamedTuple):
    """What points look at, all of it at once: what :func:`attend` forms a part at a time."""

    nodes: Tensor  #: where the neighbours are ``(B, P, K, D)``, voxels of the grid
    features: Tensor  #: ``(B, P, K, C)``
    relative: Tensor  #: positions as the attention takes them ``(B, P, K, D)``
    inside: Tensor  #: whether there is a node ``(B, P, K)``


def written_out(neighbours: Neighbours, spacing: Tensor | None = None) -> Seen:
    """Gather what all points look at.

    Args:
        neighbours: what the points look at.
        spacing: ``(D,)``, what relative positions are multiplied by.
    """
    n = neighbours
    nodes, index, inside = neighbourhood(n.place, n.size, n.shape)
    index = index + n.features.shape[1] * torch.arange(len(index)).to(index).view(-1, 1, 1)
    if n.shift is not None:
        nodes = nodes + F.embedding(index, n.shift.flatten(0, 1))
    relative = nodes - n.centre.unsqueeze(-2)
    if n.reach is not None:
        relative = relative.clamp(-n.reach, n.reach)
    if spacing is not None:
        relative = relative * spacing
    return Seen(nodes, F.embedding(index, n.features.flatten(0, 1)), relative, inside)


def attend(query: Tensor, neighbours: Neighbours, frequencies: Tensor) -> Tensor:
    """``sum_j w_j x_j`` with ``w = softmax_j(q . x_j)`` and ``x_j = f_j + gamma(y_j - c)``.

    ``y_j`` are the positions of the neighbours, and ``gamma(r) = [sin 2 pi r B, cos 2 pi r B]``.
    Differentiable once, in ``query``, features, ``centre`` and ``shift``.

    Args:
        query: ``(B, P, C)``.
        neighbours: what the points look at.
        frequencies: B ``(D, C / 2)``.

    Returns:
        ``(B, P, C)``.
    """
    with no_autocast(query):
        found: Tensor = _Attend.apply(
            query,
            neighbours.features.to(query.dtype),
            neighbours.centre,
            neighbours.shift,
            neighbours.place.detach(),
            2 * math.pi * frequencies,
            neighbours,
        )
    return found


class _Part(NamedTuple):
    """What some points look at."""

    node: Tensor  # flat index in the features of the whole batch
    x: Tensor  # features and codes of the positions
    sin: Tensor
    cos: Tensor
    weights: Tensor
    clamped: Tensor | None  # relative positions whose clamping stops the gradient


class _Attend(torch.autograd.Function):
    """The sum, part by part; the gradient forms each part again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        features: Tensor,
        centre: Tensor,
        shift: Tensor | None,
        place: Tensor,
        frequencies: Tensor,
        neighbours: Neighbours,
    ) -> Tensor:
        ctx.save_for_backward(query, features, centre, shift, place, frequencies)
        ctx.rest = neighbours.shape, neighbours.size, neighbours.reach
        work = _Work(query, features, centre, shift, place, frequencies, ctx.rest)
        out = torch.empty_like(work.query)
        for rows in work.parts():
            part = work.part(rows)
            torch.sum(part.weights.unsqueeze(-1) * part.x, 1, out=out[rows])
        return out.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd leaves autocast on where the caller does.
        with no_autocast(gradient):
            return _Attend._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, features, centre, shift, place, frequencies = ctx.saved_tensors
        work = _Work(query, features, centre, shift, place, frequencies, ctx.rest)
        half = frequencies.shape[1]
        to_query = torch.empty_like(work.query)
        to_features = torch.zeros_like(work.features)
        to_centre = torch.empty_like(work.centre)
        to_shift = None if work.shift is None else torch.zeros_like(work.shift)
        gradients = gradient.reshape(work.query.shape)
        for rows in work.parts():
            part, g, q = work.part(rows), gradients[rows].unsqueeze(1), work.query[rows]
            weights = part.weights
            to_weights = (part.x * g).sum(-1)
            to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
            to_query[rows] = (to_logits.unsqueeze(-1) * part.x).sum(1)
            to_x = weights.unsqueeze(-1) * g + to_logits.unsqueeze(-1) * q.unsqueeze(1)
            index = part.node.flatten()
            to_features.index_add_(0, index, to_x.flatten(0, 1))
            to_angle = to_x[..., :half] * part.cos - to_x[..., half:] * part.sin
            to_relative = to_angle @ frequencies.T
            if part.clamped is not None:
                to_relative = to_relative.masked_fill(part.clamped, 0)
            to_centre[rows] = -to_relative.sum(1)
            if to_shift is not None:
                to_shift.index_add_(0, index, to_relative.flatten(0, 1))
        return (
            to_query.view(query.shape),
            to_features.view(features.shape),
            to_centre.view(centre.shape),
            None if to_shift is None or shift is None else to_shift.view(shift.shape),
            None,
            None,
            None,
        )


class _Work:
    """Points and nodes of the whole batch in one row each, and what some of the points look at."""

    def __init__(
        self,
        query: Tensor,
        features: Tensor,
        centre: Tensor,
        shift: Tensor | None,
        place: Tensor,
        frequencies: Tensor,
        rest: tuple[Sequence[int], int, float | None],
    ) -> None:
        self.shape, self.size, self.reach = rest
        self.points, self.nodes = query.shape[1], features.shape[1]
        # Rows that lie apart in memory, as those of a feature map do, are gathered slowly.
        self.query = query.flatten(0, 1).contiguous()
        self.features = features.flatten(0, 1).contiguous()
        self.centre, self.place = centre.flatten(0, 1), place.flatten(0, 1)
        self.shift = None if shift is None else shift.flatten(0, 1)
        self.frequencies = frequencies

    def parts(self) -> list[slice]:
        """Slices of the points."""
        count, channels = self.query.shape
        rows = part_rows(self.query.device, self.size ** len(self.shape) * channels)
        return [slice(first, first + rows) for first in range(0, count, rows)]

    def part(self, rows: slice) -> _Part:
        """What the points in ``rows`` look at."""
        nodes, index, inside = neighbourhood(self.place[rows], self.size, self.shape)
        number = torch.arange(rows.start, rows.start + len(index), device=index.device)
        index = index + (number // self.points * self.nodes).unsqueeze(1)
        if self.shift is not None:
            nodes = nodes + F.embedding(index, self.shift)
        relative = nodes - self.centre[rows].unsqueeze(1)
        clamped = None
        if self.reach is not None:
            clamped = relative.abs() > self.reach
            relative = relative.clamp(-self.reach, self.reach)
        angle = relative @ self.frequencies
        sin, cos = angle.sin(), angle.cos()
        x = F.embedding(index, self.features)
        half = angle.shape[-1]
        x[..., :half] += sin
        x[..., half:] += cos
        logits = (x * self.query[rows].unsqueeze(1)).sum(-1)
        weights = logits.masked_fill(~inside, -math.inf).softmax(-1)
        return _Part(index, x, sin, cos, weights, clamped)
