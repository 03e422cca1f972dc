"""Algebra of displacement fields ``(B, D, *S)`` in voxels: compose, integrate, change grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reglib.checks import check_field, check_positive_int, check_same_shape, check_shape
from reglib.geometry.sampling import warp


def compose(a: Tensor, b: Tensor) -> Tensor:
    """The field of phi_a after phi_b: ``b(x) + a(x + b(x))``.

    Args:
        a: displacement ``(B, D, *S)`` in voxels, applied second.
        b: displacement of the same shape, applied first.

    Returns:
        Displacement ``(B, D, *S)`` of x -> phi_a(phi_b(x)).

    Raises:
        TypeError, ValueError: unless both are fields of the same shape.
    """
    check_field(a, "a")
    check_field(b, "b")
    check_same_shape(a, b, ("a", "b"))
    return b + warp(a, b)


def integrate(velocity: Tensor, *, steps: int = 7) -> Tensor:
    """exp(v) by scaling and squaring: the displacement after unit time along ``velocity``.

    Args:
        velocity: stationary velocity ``(B, D, *S)``, voxels per unit time.
        steps: number of squarings; the first step is ``v / 2**steps``.

    Returns:
        Displacement ``(B, D, *S)`` in voxels; ``integrate(-v)`` is its approximate inverse.

    Raises:
        TypeError, ValueError: if ``velocity`` is no field or ``steps`` no positive integer.

    Arsigny et al., MICCAI 2006, doi:10.1007/11866565_113.
    """
    check_field(velocity, "velocity")
    check_positive_int(steps, "steps")
    # Half precision would round every one of the squarings.
    field = velocity.to(torch.promote_types(velocity.dtype, torch.float32)) / 2**steps
    for _ in range(steps):
        field = compose(field, field)
    return field.to(velocity.dtype)


def _interpolate_axis(x: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Read ``x`` at real ``positions`` along ``axis``; lines go on straight beyond the ends."""
    n = x.shape[axis]
    left = positions.floor().clamp(0, max(n - 2, 0))
    view = [1] * x.ndim
    view[axis] = -1
    fraction = (positions - left).to(x.dtype).view(view)
    index = left.long()
    lower = x.index_select(axis, index)
    upper = x.index_select(axis, (index + 1).clamp(max=n - 1))
    return lower + fraction * (upper - lower)


def _interpolate(x: Tensor, positions: Sequence[Tensor]) -> Tensor:
    for axis, p in enumerate(positions):
        x = _interpolate_axis(x, p, axis + 2)
    return x


def upsample_field(field: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Carry a field from a pyramid level to the grid it was pooled from.

    Node ``i`` of a level pooled by ``s`` sits at ``s i + (s - 1) / 2`` of the finer grid. Between
    nodes the field is linear, beyond the outermost ones it is extrapolated linearly, and its
    vectors are multiplied by ``s``: a linear field stays exactly linear, borders included.

    Args:
        field: displacement ``(B, D, *T)`` in voxels of the coarse level.
        factor: the pooling factor ``s``.
        shape: spatial shape ``S`` of the finer grid, ``T = ceil(S / s)``.

    Returns:
        Displacement ``(B, D, *S)`` in voxels of the finer grid.

    Raises:
        TypeError, ValueError: if ``field`` is no field or the shapes do not belong together.
    """
    check_field(field, "field")
    check_positive_int(factor, "factor")
    check_shape(shape, (field.ndim - 2,))
    pooled = tuple(-(-n // factor) for n in shape)
    if pooled != tuple(field.shape[2:]):
        raise ValueError(
            f"shape: wanted one that becomes {tuple(field.shape[2:])}, the grid of field, when "
            f"pooled by {factor}, got {tuple(shape)}, which becomes {pooled}"
        )
    positions = [
        (torch.arange(n, device=field.device, dtype=torch.float64) - (factor - 1) / 2) / factor
        for n in shape
    ]
    return _interpolate(field, positions) * factor


def downsample_field(field: Tensor, factor: int) -> Tensor:
    """Carry a field to a pyramid level pooled by ``factor``: read at its nodes, scale the vectors.

    Args:
        field: displacement ``(B, D, *S)`` in voxels of the finer grid.
        factor: the pooling factor ``s``.

    Returns:
        Displacement ``(B, D, *ceil(S / s))`` in voxels of the coarse level.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``factor`` no positive integer.
    """
    check_field(field, "field")
    check_positive_int(factor, "factor")
    positions = [
        torch.arange(-(-n // factor), device=field.device, dtype=torch.float64) * factor
        + (factor - 1) / 2
        for n in field.shape[2:]
    ]
    return _interpolate(field, positions) / factor


def resize_field_corners(field: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a field so that the corner voxel centres of both grids coincide.

    This is *not* the step between pyramid levels (see :func:`upsample_field`): here vectors are
    multiplied by ``(N' - 1) / (N - 1)`` along each axis.

    Args:
        field: displacement ``(B, D, *S)`` in voxels of its own grid.
        shape: new spatial shape ``S'``; an axis of one voxel can only stay one voxel.

    Returns:
        Displacement ``(B, D, *S')`` in voxels of the new grid.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``shape`` does not fit it.
    """
    check_field(field, "field")
    old = field.shape[2:]
    check_shape(shape, (len(old),))
    if any((n == 1) != (m == 1) for n, m in zip(old, shape, strict=True)):
        raise ValueError(
            f"shape: wanted {len(old)} sizes of at least 2 (1 where the field has 1), "
            f"got {tuple(shape)} for a field of spatial shape {tuple(old)}"
        )
    scales = [(m - 1) / (n - 1) if n > 1 else 1.0 for n, m in zip(old, shape, strict=True)]
    positions = [
        torch.arange(m, device=field.device, dtype=torch.float64) / s
        for m, s in zip(shape, scales, strict=True)
    ]
    scale = torch.tensor(scales, dtype=field.dtype, device=field.device)
    return _interpolate(field, positions) * scale.view(1, -1, *(1,) * len(old))
