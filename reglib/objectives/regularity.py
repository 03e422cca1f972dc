"""Regularisers of a displacement field ``(B, D, *S)``: smaller is smoother.

Finite differences between neighbouring voxels, averaged over voxels, components and (where it
says so) axes, so that a weight keeps its meaning when the grid changes. With ``spacing`` the field
and its derivatives are in millimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from reglib.checks import check_field, check_spacing
from reglib.objectives.similarity import reduce_batch


def _to_mm(field: Tensor, spacing: Sequence[float] | None) -> tuple[Tensor, tuple[float, ...]]:
    """Check, raise to at least float32 and scale each component to millimetres."""
    check_field(field, "field")
    step = check_spacing(spacing, field.ndim - 2)
    field = field.to(torch.promote_types(field.dtype, torch.float32))
    scale = torch.tensor(step, dtype=field.dtype, device=field.device)
    return field * scale.view(1, -1, *(1,) * len(step)), step


def _forward(x: Tensor, axis: int, step: float) -> Tensor:
    """``(x[i + 1] - x[i]) / step`` along spatial ``axis``: one voxel shorter."""
    return x.diff(dim=axis + 2) / step


def _mean_or_zero(x: Tensor) -> Tensor:
    """Mean per sample ``(B,)``; 0 where an axis is too short to have differences."""
    return x.flatten(1).mean(1) if x.numel() else x.new_zeros(x.shape[0])


def diffusion(
    field: Tensor, *, spacing: Sequence[float] | None = None, reduction: str = "mean"
) -> Tensor:
    """Mean squared first derivative of the field, over voxels, components and axes.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.
        spacing: mm per voxel, axis order; ``None`` stays in voxels.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``; 0 for a translation.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``spacing`` does not fit it.
    """
    u, step = _to_mm(field, spacing)
    parts = [_mean_or_zero(_forward(u, a, s).square()) for a, s in enumerate(step)]
    return reduce_batch(torch.stack(parts, 1), reduction)


def total_variation(
    field: Tensor,
    *,
    spacing: Sequence[float] | None = None,
    smoothing: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Mean absolute first derivative, over voxels, components and axes (anisotropic L1).

    ``|g|`` is rounded to ``sqrt(g^2 + smoothing) - sqrt(smoothing)``, which has a gradient at 0.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.
        spacing: mm per voxel, axis order; ``None`` stays in voxels.
        smoothing: positive; the square of the derivative below which the corner is rounded.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``; 0 for a translation.

    Raises:
        TypeError, ValueError: if ``field`` is no field, ``spacing`` does not fit it or
            ``smoothing`` is not positive.

    Li and Fan 2017, equation 2, arXiv:1709.00799.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing: wanted a positive number, got {smoothing!r}")
    u, step = _to_mm(field, spacing)
    parts = [
        _mean_or_zero((_forward(u, a, s).square() + smoothing).sqrt() - smoothing**0.5)
        for a, s in enumerate(step)
    ]
    return reduce_batch(torch.stack(parts, 1), reduction)


def bending(
    field: Tensor, *, spacing: Sequence[float] | None = None, reduction: str = "mean"
) -> Tensor:
    """Bending energy: squared second derivatives, mixed ones twice, averaged over components.

    Pure derivatives by ``[1, -2, 1]``, mixed ones by the four corners of each cell, both averaged
    over the voxels that have them and summed over the pairs of axes. Affine fields cost nothing.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.
        spacing: mm per voxel, axis order; ``None`` stays in voxels.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``spacing`` does not fit it.

    Rueckert et al., IEEE TMI 1999, doi:10.1109/42.796284.
    """
    u, step = _to_mm(field, spacing)
    total = u.new_zeros(u.shape[0])
    for a, s in enumerate(step):
        total = total + _mean_or_zero(_forward(_forward(u, a, s), a, s).square())
    for a, b in combinations(range(len(step)), 2):
        mixed = _forward(_forward(u, a, step[a]), b, step[b])
        total = total + 2 * _mean_or_zero(mixed.square())
    return reduce_batch(total.unsqueeze(1), reduction)
