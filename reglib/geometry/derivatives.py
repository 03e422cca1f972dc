"""Finite differences of images and fields: gradient, Jacobian, determinants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import check_field, check_image, check_spacing


def gradient(x: Tensor, *, spacing: Sequence[float] | None = None) -> Tensor:
    """Central differences inside, one-sided ones at the border.

    Args:
        x: ``(B, C, *S)``, floating point.
        spacing: mm per voxel, axis order; ``None`` gives derivatives per voxel.

    Returns:
        ``(B, C, D, *S)``: component ``[:, c, a]`` is the derivative of channel c along axis a
        (0 along an axis of one voxel).

    Raises:
        TypeError, ValueError: if ``x`` is no image or ``spacing`` does not fit it.
    """
    check_image(x, "x")
    step = check_spacing(spacing, x.ndim - 2)
    parts = [
        torch.gradient(x, spacing=step[axis], dim=axis + 2)[0]
        if x.shape[axis + 2] > 1
        else torch.zeros_like(x)
        for axis in range(x.ndim - 2)
    ]
    return torch.stack(parts, dim=2)


def jacobian(field: Tensor) -> Tensor:
    """``J[b, i, j] = d phi_i / d x_j`` of phi(x) = x + u(x), per voxel; the identity gives I.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.

    Returns:
        ``(B, D, D, *S)``.

    Raises:
        TypeError, ValueError: if ``field`` is no field.
    """
    check_field(field, "field")
    d = field.shape[1]
    eye = torch.eye(d, dtype=field.dtype, device=field.device)
    return gradient(field) + eye.view(1, d, d, *(1,) * d)


def _det(columns: Sequence[Tensor]) -> Tensor:
    """Determinant of 2 or 3 column vectors ``(B, D, ...)``, over axis 1."""
    if len(columns) == 2:
        a, b = columns
        return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    a, b, c = columns
    return (a * torch.linalg.cross(b, c, dim=1)).sum(1)


def jacobian_det(field: Tensor) -> Tensor:
    """Determinant det J of phi(x) = x + u(x): 1 for the identity, at most 0 where space folds.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.

    Returns:
        ``(B, *S)``.

    Raises:
        TypeError, ValueError: if ``field`` is no field.
    """
    return _det(jacobian(field).unbind(2))


def digital_determinants(field: Tensor) -> Tensor:
    """The finite-difference determinants whose positivity makes a field digitally diffeomorphic.

    In 3-D ten per voxel: the eight one-sided ones (every choice of forward or backward along each
    axis) and two "star" determinants of the tetrahedra that the corners leave over, 2 at the
    identity. In 2-D the four one-sided ones, which cover the plane by themselves. Beyond the
    border the field is clamped.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.

    Returns:
        ``(B, K, *S)``, K = 4 in 2-D and 10 in 3-D.

    Raises:
        TypeError, ValueError: if ``field`` is no field.

    Liu et al., IJCV 2024, doi:10.1007/s11263-024-02047-1.
    """
    check_field(field, "field")
    shape = field.shape[2:]
    d = len(shape)
    u = F.pad(field, (1, 1) * d, mode="replicate")

    def edge(*offsets: int) -> Tensor:
        """phi(x + offsets) - phi(x) at every voxel x."""
        there = tuple(slice(1 + o, 1 + o + n) for o, n in zip(offsets, shape, strict=True))
        step = torch.tensor(offsets, dtype=field.dtype, device=field.device)
        return u[(slice(None), slice(None), *there)] - field + step.view(1, d, *(1,) * d)

    def one_sided(axis: int, sign: int) -> Tensor:
        return sign * edge(*(sign if a == axis else 0 for a in range(d)))

    dets = [
        _det([one_sided(axis, sign) for axis, sign in enumerate(signs)])
        for signs in product((1, -1), repeat=d)
    ]
    if d == 3:
        # Backward star (ij, ik, jk) and forward star (ij, jk, ik): this order makes both +2.
        dets.append(_det([edge(-1, -1, 0), edge(-1, 0, -1), edge(0, -1, -1)]))
        dets.append(_det([edge(1, 1, 0), edge(0, 1, 1), edge(1, 0, 1)]))
    return torch.stack(dets, dim=1)
