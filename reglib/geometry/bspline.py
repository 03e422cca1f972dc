"""Cubic B-splines: free-form deformations from a lattice of control points.

Along every axis, control point ``k`` of a lattice with stride ``s`` sits at voxel ``s (k - 1)`` of
the image grid: one before the first voxel, and one or more beyond the last. The field at a voxel
is a sum over the four control points around it along every axis. Strides are whole voxels, one
for all axes or one per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from reglib.checks import check_field, check_positive_int, check_shape
from reglib.geometry.grid import no_autocast


def quadratic_weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three quadratic B-splines that are not 0 at the fraction ``t`` of a cell.

    Args:
        t: fractions in [0, 1], floating point, any shape.

    Returns:
        Three tensors of the shape of ``t``; they are non-negative and sum to 1. The derivative of
        ``sum c[k] cubic_weights(t)[k]`` is ``sum (c[k + 1] - c[k]) quadratic_weights(t)[k]``.
    """
    first, last = (1 - t).square() / 2, t.square() / 2
    return first, 1 - first - last, last


def cubic_weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four cubic B-splines that are not 0 at the fraction ``t`` of a cell.

    Args:
        t: fractions in [0, 1], floating point, any shape.

    Returns:
        Four tensors of the shape of ``t``, for the knots before, at, after and one beyond the
        cell's beginning; they are non-negative and sum to 1.

    Unser, IEEE Signal Processing Magazine 1999, equation 7, doi:10.1109/79.799930.
    """
    square, rest = t.square(), 1 - t
    first, last = rest.square() * rest / 6, square * t / 6
    second = 3 * last + 2 / 3 - square
    return first, second, 1 - first - second - last, last


def _strides(stride: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One stride per axis."""
    strides = stride if isinstance(stride, Sequence) else (stride,) * dimensions
    for s in strides:
        check_positive_int(s, "stride")
    if len(strides) != dimensions:
        raise ValueError(f"stride: wanted an integer or {dimensions} of them, got {stride!r}")
    return tuple(map(int, strides))


def lattice_shape(shape: Sequence[int], stride: int | Sequence[int]) -> tuple[int, ...]:
    """How many control points a grid needs along every axis: ``ceil((N - 1) / s) + 3``.

    Args:
        shape: spatial shape ``S`` of the image grid, two or three axes.
        stride: voxels from one control point to the next, one for all axes or one per axis.

    Returns:
        The lattice's shape ``L``.

    Raises:
        TypeError, ValueError: unless ``shape`` and ``stride`` are positive integers that fit.
    """
    check_shape(shape, (2, 3))
    strides = _strides(stride, len(shape))
    return tuple(-(-(int(n) - 1) // s) + 3 for n, s in zip(shape, strides, strict=True))


def _check_lattice(lattice: Tensor, shape: Sequence[int], strides: Sequence[int]) -> None:
    check_field(lattice, "lattice")
    check_shape(shape, (lattice.ndim - 2,))
    wanted = lattice_shape(shape, strides)
    if tuple(lattice.shape[2:]) != wanted:
        raise ValueError(
            f"lattice: wanted {wanted} control points for a grid of {tuple(shape)} at stride "
            f"{tuple(strides)}, got {tuple(lattice.shape[2:])}"
        )


def _weights(size: int, stride: int, factor: int) -> Tensor:
    """What every control point adds to every node of one axis: ``(N, L)``, float64."""
    cells = -(-(size - 1) // stride)
    nodes = torch.arange(-(-size // factor), dtype=torch.float64) * factor + (factor - 1) / 2
    # The lattice ends with its last cell, whose end belongs to it.
    inside = nodes.clamp(max=cells * stride) / stride
    cell = inside.floor().clamp(max=max(cells - 1, 0))
    fraction, beyond = inside - cell, nodes / stride - inside
    # Without a cell (one voxel) the fourth control point has no weight and does not exist.
    weights = torch.zeros(len(nodes), max(cells, 1) + 3, dtype=torch.float64)
    columns = cell.long()[:, None] + torch.arange(4)
    weights.scatter_(1, columns, torch.stack(cubic_weights(fraction), 1))
    # Where a pooled cell reaches beyond, the field goes on straight.
    rise = torch.stack(quadratic_weights(fraction), 1) * beyond[:, None]
    weights.scatter_add_(1, columns[:, 1:], rise)
    weights.scatter_add_(1, columns[:, :3], -rise)
    return weights[:, : cells + 3]


class _AlongAxes(torch.autograd.Function):
    """Every spatial axis of ``(B, D, *S)`` times its matrix; the transposes are the way back.

    Neither pass may round to half precision, even if autocast is on when it runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *matrices: Tensor) -> Tensor:
        ctx.matrices = matrices
        with no_autocast(x):
            for axis, matrix in enumerate(matrices, start=2):
                before, after, n = x.shape[:axis], x.shape[axis + 1 :], x.shape[axis]
                # The last axis as rows: one product of matrices, and not a vector per row.
                rows = x.reshape(-1, n, after.numel()) if after else x.reshape(-1, n).T
                y = matrix @ rows
                x = (y if after else y.T).reshape(*before, len(matrix), *after)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = _along_axes(grads[0], [matrix.T for matrix in ctx.matrices])
        return back, *(None for _ in ctx.matrices)


def _along_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply every spatial axis of ``(B, D, *S)`` by its matrix ``(N, S)``."""
    return cast(Tensor, _AlongAxes.apply(x, *matrices))


def bspline_field(
    lattice: Tensor, shape: Sequence[int], stride: int | Sequence[int], *, factor: int = 1
) -> Tensor:
    """The displacement field of a lattice of control points: a cubic free-form deformation.

    Args:
        lattice: displacements of the control points, ``(B, D, *L)`` in voxels of the image grid,
            with ``L`` as of :func:`lattice_shape`. Control point k sits at voxel ``s (k - 1)``.
        shape: spatial shape ``S`` of the image grid.
        stride: voxels from one control point to the next, one for all axes or one per axis.
        factor: give the field on the pyramid level pooled by this factor, read at its nodes
            ``factor i + (factor - 1) / 2`` and in its voxels. Nodes beyond the lattice's last
            cell continue it linearly.

    Returns:
        Displacement ``(B, D, *ceil(S / factor))`` in voxels of that level.

    Raises:
        TypeError, ValueError: if ``lattice`` is no field, ``shape`` or ``stride`` does not fit it
            or ``factor`` is no positive integer.

    Rueckert et al., IEEE TMI 1999, doi:10.1109/42.796284.
    """
    check_field(lattice, "lattice")
    strides = _strides(stride, lattice.ndim - 2)
    _check_lattice(lattice, shape, strides)
    check_positive_int(factor, "factor")
    # In half precision the tensor's own rounding is more than that of the sums.
    work = lattice.to(torch.promote_types(lattice.dtype, torch.float32))
    matrices = [_weights(n, s, factor).to(work) for n, s in zip(shape, strides, strict=True)]
    matrices[0] = matrices[0] / factor
    return _along_axes(work, matrices).to(lattice.dtype)


def refine_lattice(lattice: Tensor, shape: Sequence[int], stride: int | Sequence[int]) -> Tensor:
    """The lattice of half the stride that gives the same field, exactly.

    Old control points become ``(c[k - 1] + 6 c[k] + c[k + 1]) / 8``, those in the middle between
    two of them their mean ``(c[k] + c[k + 1]) / 2``.

    Args:
        lattice: control points ``(B, D, *L)`` of the given ``stride``.
        shape: spatial shape ``S`` of the image grid.
        stride: even, one for all axes or one per axis. An axis of stride 1 stays as it is.

    Returns:
        Control points ``(B, D, *lattice_shape(shape, stride / 2))``.

    Raises:
        TypeError, ValueError: if ``lattice``, ``shape`` and ``stride`` do not fit, or a stride is
            odd and not 1.

    Lane and Riesenfeld, IEEE TPAMI 1980, doi:10.1109/TPAMI.1980.4766968.
    """
    check_field(lattice, "lattice")
    strides = _strides(stride, lattice.ndim - 2)
    _check_lattice(lattice, shape, strides)
    if any(s % 2 and s > 1 for s in strides):
        raise ValueError(f"stride: wanted even numbers of voxels (or 1), got {strides}")
    halves = tuple(s // 2 if s > 1 else 1 for s in strides)
    for axis, n in enumerate(lattice_shape(shape, halves), start=2):
        if strides[axis - 2] == 1:
            continue
        m = lattice.shape[axis]
        middle = (lattice.narrow(axis, 0, m - 1) + lattice.narrow(axis, 1, m - 1)) / 2
        # (c[k - 1] + 6 c[k] + c[k + 1]) / 8 is the mean of c[k] and of the middles beside it.
        beside = (middle.narrow(axis, 0, m - 2) + middle.narrow(axis, 1, m - 2)) / 2
        old = (lattice.narrow(axis, 1, m - 2) + beside) / 2
        ends = middle.narrow(axis, m - 2, 1)
        pairs = torch.stack([middle.narrow(axis, 0, m - 2), old], axis + 1)
        lattice = torch.cat([pairs.flatten(axis, axis + 1), ends], axis).narrow(axis, 0, n)
    return lattice


def fit_lattice(field: Tensor, stride: int | Sequence[int]) -> Tensor:
    """The lattice whose field is closest to a dense one: least squares over all voxels.

    A field that is a spline of this stride is met exactly. Where voxels do not determine a control
    point the smallest is taken; one beyond the border hangs on few voxels, and their noise can
    make it thousands of times as large as the field, without harm to the field itself.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.
        stride: voxels from one control point to the next, one for all axes or one per axis.

    Returns:
        Control points ``(B, D, *lattice_shape(S, stride))`` in voxels.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``stride`` does not fit it.
    """
    check_field(field, "field")
    strides = _strides(stride, field.ndim - 2)
    work = field.to(torch.promote_types(field.dtype, torch.float32))
    # The problem is a product of axes, and so is its pseudo-inverse.
    inverses = [
        torch.linalg.pinv(_weights(n, s, 1)).to(work)
        for n, s in zip(field.shape[2:], strides, strict=True)
    ]
    return _along_axes(work, inverses).to(field.dtype)
