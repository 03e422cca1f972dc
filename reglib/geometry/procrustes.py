"""Transforms fitted to pairs of corresponding points, by least squares in world millimetres."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import check_finite, check_points, check_same_shape, check_tensor
from reglib.geometry.affine import about, raise_precision, transform_points
from reglib.geometry.grid import no_autocast


class PointFit(NamedTuple):
    """A transform fitted to pairs of points.

    ``matrix`` is ``(B, D + 1, D + 1)``, mm, fixed to moving; ``residual`` ``(B, N)`` is the
    distance in mm that is left between each mapped fixed point and its moving partner.
    """

    matrix: Tensor
    residual: Tensor


def _centred(fixed_points: Tensor, moving_points: Tensor) -> tuple[Tensor, Tensor]:
    """Check the points of a fit and return them in float64, about their centroids."""
    check_tensor(fixed_points, "fixed_points")
    flat = fixed_points.ndim == 3 and fixed_points.shape[2] == 2
    check_points(fixed_points, "fixed_points", 2 if flat else 3)
    check_points(moving_points, "moving_points", 2 if flat else 3)
    check_same_shape(fixed_points, moving_points, ("fixed_points", "moving_points"))
    check_finite(fixed_points, "fixed_points")
    check_finite(moving_points, "moving_points")
    fixed, moving = fixed_points.double(), moving_points.double()
    return fixed - fixed.mean(1, keepdim=True), moving - moving.mean(1, keepdim=True)


def _check_spread(points: Tensor, name: str, directions: int, wanted: str) -> None:
    """Raise unless the points ``(B, N, D)`` spread along so many directions, beyond rounding."""
    exact = points.detach().double()
    # N points spread along fewer than N directions; zeros below them make the others show.
    spread = torch.linalg.svdvals(F.pad(exact - exact.mean(1, keepdim=True), (0, 0, 0, directions)))
    rounding = torch.finfo(points.dtype).eps * exact.norm(dim=(1, 2))
    good = spread[:, directions - 1] > 1e-6 * spread[:, 0] + 4 * rounding
    if not bool(good.all()):
        bad = (~good).nonzero().flatten().tolist()
        raise ValueError(f"{name}: wanted {wanted}, got others in samples {bad}")


def _fit(linear: Tensor, fixed_points: Tensor, moving_points: Tensor) -> PointFit:
    """Let ``linear`` take centroid to centroid, and measure what is left."""
    work = raise_precision(fixed_points, moving_points)[0].dtype
    fixed, moving = fixed_points.double(), moving_points.double()
    centre = fixed.mean(1)
    matrix = about(centre, linear, moving.mean(1) - centre)
    residual = (transform_points(fixed, matrix) - moving).norm(dim=2)
    return PointFit(matrix.to(work), residual.to(work))


def fit_affine(fixed_points: Tensor, moving_points: Tensor) -> PointFit:
    """The affine transform that takes the fixed points closest to the moving ones.

    Least squares: the sum of squared distances ``|A(p) - q|^2`` is smallest.

    Args:
        fixed_points: ``(B, N, D)`` in mm, N > D and not all in one plane (2-D: on one line).
        moving_points: their partners, ``(B, N, D)`` in mm.

    Returns:
        Matrix (fixed to moving) and distances left.

    Raises:
        TypeError, ValueError: if the points are not of this form or do not determine the matrix.
    """
    fixed, moving = _centred(fixed_points, moving_points)
    d = fixed.shape[2]
    wanted = f"{d + 1} points or more, not all {'in one plane' if d == 3 else 'on one line'}"
    _check_spread(fixed_points, "fixed_points", d, wanted)
    with no_autocast(fixed):
        linear = torch.linalg.lstsq(fixed, moving).solution.transpose(1, 2)
        return _fit(linear, fixed_points, moving_points)


def fit_rigid(fixed_points: Tensor, moving_points: Tensor, *, scale: bool = False) -> PointFit:
    """The rotation and translation that take the fixed points closest to the moving ones.

    The rotation is proper: points given as a mirror image are not mirrored.

    Args:
        fixed_points: ``(B, N, D)`` in mm, at least D points (3-D: not all on one line).
        moving_points: their partners, ``(B, N, D)`` in mm.
        scale: also fit one magnification (a similarity transform).

    Returns:
        Matrix (fixed to moving) and distances left.

    Raises:
        TypeError, ValueError: if the points are not of this form or do not determine the rotation.

    Umeyama, IEEE TPAMI 1991, doi:10.1109/34.88573.
    """
    fixed, moving = _centred(fixed_points, moving_points)
    d = fixed.shape[2]
    wanted = f"{d} points or more, not all {'on one line' if d == 3 else 'in one place'}"
    _check_spread(fixed_points, "fixed_points", d - 1, wanted)
    _check_spread(moving_points, "moving_points", d - 1, wanted)
    with no_autocast(fixed):
        u, strength, vh = torch.linalg.svd(moving.transpose(1, 2) @ fixed)
        # The weakest direction follows from the others, as the rotation keeps the orientation.
        sign = torch.ones_like(strength)
        sign[:, -1] = torch.linalg.det(u @ vh).sign()
        linear = u @ (sign.unsqueeze(2) * vh)
        if scale:
            size = (strength * sign).sum(1) / fixed.square().sum((1, 2))
            linear = linear * size.view(-1, 1, 1)
        return _fit(linear, fixed_points, moving_points)
