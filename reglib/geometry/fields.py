"""Algebra of displacement fields ``(B, D, *S)`` in voxels: compose, integrate, invert, resize."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.checks import (
    check_affine,
    check_field,
    check_points,
    check_positive_int,
    check_same_shape,
    check_shape,
    check_spacing,
)
from reglib.geometry.grid import identity_grid, voxel_to_unit
from reglib.geometry.sampling import transform_grid, warp, warp_points


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


class Inverse(NamedTuple):
    """An inverse field and how well it inverts.

    ``field`` is ``(B, D, *S)`` in voxels; ``error`` ``(B,)`` is the largest ``|phi(psi(x)) - x|``
    in voxels over those x whose psi(x) is inside the grid, NaN if there are none; ``converged``
    ``(B,)`` says whether that is within the tolerance.
    """

    field: Tensor
    error: Tensor
    converged: Tensor


@torch.no_grad()
def invert(field: Tensor, *, iterations: int = 100, tolerance: float = 1e-3) -> Inverse:
    """The field of psi with ``phi(psi(x)) = x``, by a damped fixed-point iteration.

    Every voxel follows ``v <- v - s (v + u(x + v))``, where the step ``s`` starts at 1, is halved
    whenever it does not pay off, and grows again, slowly, where it does. Where phi folds, or turns
    by more than a right angle, no step helps: the error stays large, and that is the answer. Only
    voxels that come from inside the grid count, since ``u`` is not known elsewhere (it is clamped).
    No gradient is kept.

    Args:
        field: displacement ``u``, ``(B, D, *S)`` in voxels.
        iterations: at most so many; each samples the field once.
        tolerance: stop a sample when its largest error is below this, in voxels.

    Returns:
        The inverse field, its error and whether it converged, per sample.

    Raises:
        TypeError, ValueError: if ``field`` is no field, ``iterations`` no positive integer or
            ``tolerance`` no positive number.

    Chen et al., Medical Physics 2008, doi:10.1118/1.2816107.
    """
    check_field(field, "field")
    check_positive_int(iterations, "iterations")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: wanted a positive number of voxels, got {tolerance!r}")
    u = field.to(torch.promote_types(field.dtype, torch.float32))
    v = torch.zeros_like(u)
    rest, miss = u, torch.linalg.vector_norm(u, dim=1, keepdim=True)
    step = torch.ones_like(miss)
    for _ in range(iterations):
        # A sample that is done stays as it is, whatever the others of its batch still need.
        going = miss.flatten(1).amax(1).view(-1, *(1,) * (u.ndim - 1)) > tolerance
        if not bool(going.any()):
            break
        trial = v - step * rest
        trial_rest = compose(u, trial)
        trial_miss = torch.linalg.vector_norm(trial_rest, dim=1, keepdim=True)
        better = going & _pays_off(trial_miss, miss, step)
        v, rest = torch.where(better, trial, v), torch.where(better, trial_rest, rest)
        miss, step = torch.where(better, trial_miss, miss), _next_step(step, better)
    outside = voxel_to_unit(transform_grid(v), u.shape[2:]).abs().amax(1, keepdim=True) > 1
    error = miss.masked_fill(outside, -1).flatten(1).amax(1)
    error = torch.where(error < 0, torch.nan, error)
    return Inverse(v.to(field.dtype), error, error <= tolerance)


def _pays_off(trial_miss: Tensor, miss: Tensor, step: Tensor) -> Tensor:
    """Whether a damped step is to be taken: where it makes the error fall enough for its length.

    Any decrease is not enough: where the field turns, full steps go to and fro for ever.
    """
    return trial_miss < (1 - 0.3 * step.square()) * miss


def _next_step(step: Tensor, paid: Tensor) -> Tensor:
    return torch.where(paid, (1.1 * step).clamp(max=1), step / 2)


class PointInverse(NamedTuple):
    """Points and how well they were found.

    ``fixed_points`` is ``(B, N, D)`` in voxels; ``error`` ``(B, N)`` is ``|phi(p) - q|`` in voxels.
    """

    fixed_points: Tensor
    error: Tensor


@torch.no_grad()
def invert_points(
    moving_points: Tensor,
    field: Tensor,
    *,
    iterations: int = 200,
    tolerance: float = 1e-3,
    retries: int | None = None,
) -> PointInverse:
    """Carry points against a field: the p with ``phi(p) = p + u(p) = q``, each solved for alone.

    The iteration of :func:`invert`, from q. A point that it does not find is sought once more from
    the voxels that phi carries closest to q. Where phi folds, several p may have the same q, and
    one of them is found. No gradient is kept.

    Args:
        moving_points: q, ``(B, N, D)`` in voxels of the moving grid.
        field: displacement ``u``, ``(B, D, *S)`` in voxels, clamped outside its grid.
        iterations: at most so many; each samples the field at the points that are still sought.
        tolerance: a point is found when its error is below this, in voxels.
        retries: no second search if more than this many points of a sample are missed; ``None``
            searches for all.

    Returns:
        The points of the fixed grid, dtype of ``moving_points``, and their errors.

    Raises:
        TypeError, ValueError: if the arguments do not fit.
    """
    check_field(field, "field")
    check_points(moving_points, "moving_points", field.shape[1])
    check_positive_int(iterations, "iterations")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: wanted a positive number of voxels, got {tolerance!r}")
    if len(moving_points) != len(field):
        raise ValueError(
            "moving_points, field: wanted the same batch size, "
            f"got {len(moving_points)} and {len(field)}"
        )
    work = torch.promote_types(torch.promote_types(field.dtype, moving_points.dtype), torch.float32)
    u, goals = field.to(work), moving_points.to(field.device, work)
    found, error = torch.empty_like(goals), torch.empty_like(goals[..., 0])
    for i, goal in enumerate(goals):
        one = u[i : i + 1]
        points, miss = _follow(goal, goal, one, iterations, tolerance)
        lost = (miss > tolerance).nonzero().squeeze(1).tolist()
        if 0 < len(lost) <= (len(goal) if retries is None else retries):
            there = transform_grid(one).flatten(2)[0].T
            voxels = identity_grid(one.shape[2:], dtype=work, device=u.device).flatten(2)[0].T
            for k in lost:
                distance = torch.linalg.vector_norm(there - goal[k], dim=1)
                near = voxels[distance.topk(min(9, len(voxels)), largest=False).indices]
                p, m = _follow(near, goal[k].expand_as(near), one, iterations, tolerance)
                points[k], miss[k] = p[m.argmin()], m.min()
        found[i], error[i] = points, miss
    return PointInverse(found.to(moving_points), error)


def _follow(
    start: Tensor, goal: Tensor, u: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """From ``start`` to the p with ``p + u(p) = goal``, ``(N, D)``, and by how much each misses."""

    def rest_at(points: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        rest = warp_points(points.unsqueeze(0), u)[0] - wanted
        return rest, torch.linalg.vector_norm(rest, dim=1)

    found = start.clone()
    rest, miss = rest_at(found, goal)
    step = torch.ones_like(miss)
    going = (miss > tolerance).nonzero().squeeze(1)
    for _ in range(iterations):
        if not len(going):
            break
        trial = found[going] - step[going].unsqueeze(1) * rest[going]
        trial_rest, trial_miss = rest_at(trial, goal[going])
        better = _pays_off(trial_miss, miss[going], step[going])
        step[going] = _next_step(step[going], better)
        closer = going[better]
        found[closer], rest[closer] = trial[better], trial_rest[better]
        miss[closer] = trial_miss[better]
        going = going[miss[going] > tolerance]
    return found, miss


def inverse_consistency(a: Tensor, b: Tensor, *, spacing: Sequence[float] | None = None) -> Tensor:
    """How far there and back misses: the length of ``phi_a(phi_b(x)) - x`` at every voxel.

    Args:
        a: displacement ``(B, D, *S)`` in voxels.
        b: displacement of the same shape, meant to undo ``a``.
        spacing: mm per voxel, axis order, for an error in mm; ``None`` gives voxels.

    Returns:
        ``(B, *S)``, 0 where b undoes a. Near the border, paths that leave the grid follow the
        clamped field.

    Raises:
        TypeError, ValueError: unless both are fields of the same shape and ``spacing`` fits them.
    """
    around = compose(a, b)
    size = torch.tensor(check_spacing(spacing, a.shape[1]), dtype=a.dtype, device=a.device)
    return torch.linalg.vector_norm(around * size.view(1, -1, *(1,) * (a.ndim - 2)), dim=1)


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


def carry_field(
    field: Tensor, affine: Tensor, new_affine: Tensor, new_shape: Sequence[int]
) -> Tensor:
    """Carry a field to another grid whose axes are parallel to those of its own, in any order.

    Between nodes the field is linear, beyond the outermost ones it goes on linearly, and its
    vectors are turned and scaled with the axes: a linear field stays exactly linear.

    Args:
        field: displacement ``(B, D, *T)`` in voxels of its own grid.
        affine: ``(D + 1, D + 1)``, voxels of that grid to world mm.
        new_affine: ``(D + 1, D + 1)``, voxels of the new grid to world mm.
        new_shape: spatial shape ``S`` of the new grid.

    Returns:
        Displacement ``(B, D, *S)`` in voxels of the new grid; ``field`` itself if both are equal.

    Raises:
        TypeError, ValueError: if the arguments do not fit, or the axes are not parallel.
    """
    check_field(field, "field")
    d = field.ndim - 2
    check_shape(new_shape, (d,), "new_shape")
    old, new = check_affine(affine, "affine", d), check_affine(new_affine, "new_affine", d)
    if tuple(new_shape) == tuple(field.shape[2:]) and torch.equal(old, new):
        return field
    voxels = torch.linalg.solve(old, new)
    # Column b: what one step along new axis b does to the old coordinates.
    axes = voxels[:d, :d].abs().argmax(0).tolist()
    steps = [float(voxels[a, b]) for b, a in enumerate(axes)]
    parallel = torch.zeros(d, d, dtype=voxels.dtype)
    parallel[axes, range(d)] = torch.tensor(steps, dtype=voxels.dtype)
    if sorted(axes) != list(range(d)) or not torch.allclose(
        voxels[:d, :d], parallel, rtol=0, atol=1e-6 * max(map(abs, steps))
    ):
        raise ValueError(
            f"affine, new_affine: wanted grids with parallel axes, got {voxels.tolist()}"
        )
    positions = [
        (voxels[a, d] + k * torch.arange(n, dtype=torch.float64)).to(field.device)
        for a, k, n in zip(axes, steps, new_shape, strict=True)
    ]
    turned = field.permute(0, 1, *(a + 2 for a in axes))[:, axes]
    scale = torch.tensor(steps, dtype=field.dtype, device=field.device)
    return _interpolate(turned, positions) / scale.view(1, -1, *(1,) * d)


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
