"""Measures to report, not to train on: overlap, landmarks, similarity, folding, scale of fields.

Distances between the surfaces of labels are in :mod:`reglib.objectives.surface`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.checks import (
    check_choice,
    check_field,
    check_image,
    check_label_maps,
    check_points,
    check_same_shape,
    check_spacing,
    check_tensor,
    check_weight,
)
from reglib.geometry.derivatives import digital_determinants, jacobian_det
from reglib.geometry.grid import identity_grid
from reglib.geometry.smoothing import check_window, gaussian_sum


def dice(warped_labels: Tensor, fixed_labels: Tensor, *, labels: Sequence[int]) -> Tensor:
    """Overlap ``2 |A and B| / (|A| + |B|)`` of each label.

    Args:
        warped_labels: label map ``(B, 1, *S)``, integers (or floats that hold integers).
        fixed_labels: of the same shape.
        labels: the K label values to measure; the background is usually left out.

    Returns:
        ``(B, K)``, 1 for perfect overlap; NaN where a label is absent from both maps.

    Raises:
        TypeError, ValueError: if the inputs are no label maps of one shape, or ``labels`` is empty.

    Dice, Ecology 1945, doi:10.2307/1932409.
    """
    check_label_maps(warped_labels, fixed_labels, labels)
    scores = []
    for value in labels:
        a, b = (warped_labels == value).flatten(1), (fixed_labels == value).flatten(1)
        # Counted in integers: float32 stops counting at 2**24 voxels.
        scores.append(2 * (a & b).sum(1).double() / (a.sum(1) + b.sum(1)))
    return torch.stack(scores, 1).to(torch.get_default_dtype())


def tre(
    warped_points: Tensor,
    moving_points: Tensor,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Target registration error: how far each mapped fixed landmark is from its moving partner.

    Args:
        warped_points: ``(B, N, D)``, the fixed points after ``warp_points``: in the moving image.
        moving_points: their true places there, ``(B, N, D)`` in the same unit.
        spacing: mm per voxel of the moving grid, axis order, if the points are in voxels; ``None``
            if they are in mm already.
        reduction: ``"mean"`` over the points of each sample, or ``"none"``.

    Returns:
        ``(B,)``, or ``(B, N)`` without reduction; mm.

    Raises:
        TypeError, ValueError: if the points are not of one shape or ``spacing`` does not fit them.
    """
    check_tensor(warped_points, "warped_points")
    flat = warped_points.ndim == 3 and warped_points.shape[2] == 2
    check_points(warped_points, "warped_points", 2 if flat else 3)
    check_points(moving_points, "moving_points", 2 if flat else 3)
    check_same_shape(warped_points, moving_points, ("warped_points", "moving_points"))
    check_choice(reduction, "reduction", ("mean", "none"))
    size = torch.tensor(check_spacing(spacing, warped_points.shape[2]), dtype=torch.float64).to(
        warped_points.device
    )
    distance = ((warped_points.double() - moving_points.double()) * size).norm(dim=2)
    errors = distance.mean(1) if reduction == "mean" else distance
    return errors.to(torch.get_default_dtype())


def ssim(
    warped: Tensor, fixed: Tensor, *, data_range: float, window: int = 11, sigma: float = 1.5
) -> Tensor:
    """Structural similarity with a Gaussian window, mean over those windows that fit inside.

    Constants 0.01 and 0.03, variances divided by N: what scikit-image (``gaussian_weights=True,
    use_sample_covariance=False``), pytorch-msssim and MONAI compute.

    Args:
        warped: ``(B, C, *S)``, at least ``window`` voxels along every axis.
        fixed: image of the same shape.
        data_range: largest minus smallest intensity that the images could have, such as 1 or 255.
        window: odd side length of the window in voxels.
        sigma: standard deviation of its weights in voxels.

    Returns:
        ``(B,)``, mean over channels: 1 for equal images, at least -1. Higher is better.

    Raises:
        TypeError, ValueError: if shapes do not match, the images are smaller than the window, or
            a number is not positive.

    Wang et al., IEEE TIP 2004, doi:10.1109/TIP.2003.819861.
    """
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    check_same_shape(warped, fixed, ("warped", "fixed"))
    check_window(window)
    if min(fixed.shape[2:]) < window:
        raise ValueError(
            f"window: wanted at most {min(fixed.shape[2:])} voxels for images of "
            f"{tuple(fixed.shape)}, got {window}"
        )
    for name, value in (("data_range", data_range), ("sigma", sigma)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: wanted a positive number, got {value!r}")
    radius = window // 2

    def mean(x: Tensor) -> Tensor:
        x = gaussian_sum(x, sigma, radius)
        for axis in range(2, x.ndim):
            x = x.narrow(axis, radius, x.shape[axis] - 2 * radius)
        return x

    x, y = warped.double(), fixed.double()
    mx, my = mean(x), mean(y)
    vx, vy, cxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    index = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.flatten(1).mean(1).to(torch.get_default_dtype())


def _mask_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over space of ``(B, *S)`` values, per sample; NaN where the mask is empty."""
    values = values.flatten(1).double()
    if mask is None:
        mean = values.mean(1)
    else:
        inside = (mask > 0).flatten(1)
        mean = values.where(inside, torch.zeros_like(values)).sum(1) / inside.sum(1)
    return mean.to(torch.get_default_dtype())


def folding(field: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Share of voxels where phi folds: det J <= 0, central differences.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.
        mask: ``(B, 1, *S)``; only voxels with a positive value count.

    Returns:
        ``(B,)`` in [0, 1]; multiply by 100 for a percentage. NaN where the mask is empty or the
        field holds NaN.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``mask`` does not fit it.
    """
    check_field(field, "field")
    if mask is not None:
        check_weight(mask, field, "mask")
    det = jacobian_det(field)
    # Neither comparison holds for NaN: a broken field must not pass for a smooth one.
    return _mask_mean(torch.where(det.isnan(), det, (det <= 0).to(det.dtype)), mask)


class JacobianStatistics(NamedTuple):
    """The determinant of phi over the voxels of each sample, all ``(B,)``.

    ``log_mean`` and ``log_std`` are those of the natural logarithm, over the voxels that do not
    fold; ``folding`` is the share of those that do.
    """

    min: Tensor
    max: Tensor
    mean: Tensor
    std: Tensor
    log_mean: Tensor
    log_std: Tensor
    folding: Tensor


def jacobian_statistics(field: Tensor, *, mask: Tensor | None = None) -> JacobianStatistics:
    """How much phi stretches space: the spread of det J (central differences) and of its log.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.
        mask: ``(B, 1, *S)``; only voxels with a positive value count.

    Returns:
        Minimum, maximum, mean and standard deviation of det J (1 keeps the volume), mean and
        standard deviation of log det J, and :func:`folding`. NaN where the mask is empty or the
        field holds NaN.

    Raises:
        TypeError, ValueError: if ``field`` is no field or ``mask`` does not fit it.
    """
    check_field(field, "field")
    if mask is None:
        mask = torch.ones_like(field[:, :1])
    check_weight(mask, field, "mask")
    det = jacobian_det(field).double()
    inside = mask[:, 0] > 0
    empty = ~inside.flatten(1).any(1)
    # NaN is not folded: it stays, and shows.
    unfolded = inside & ~(det <= 0)
    log = det.where(unfolded, torch.ones_like(det)).log()

    def moments(x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        mean = _mask_mean(x, where.unsqueeze(1))
        spread = (x - mean.view(-1, *(1,) * (x.ndim - 1))).square()
        return mean, _mask_mean(spread, where.unsqueeze(1)).sqrt()

    def extreme(largest: bool) -> Tensor:
        sign = 1 if largest else -1
        found = (sign * det).masked_fill(~inside, -math.inf).flatten(1).amax(1)
        return (sign * found).masked_fill(empty, math.nan).to(torch.get_default_dtype())

    return JacobianStatistics(
        extreme(False),
        extreme(True),
        *moments(det, inside),
        *moments(log, unfolded),
        folding(field, mask=mask),
    )


def _non_diffeomorphic(
    field: Tensor, mask: Tensor | None, dimensions: int, simplex: float
) -> Tensor:
    check_field(field, "field")
    if field.shape[1] != dimensions:
        raise ValueError(f"field: wanted {dimensions} spatial axes, got {tuple(field.shape)}")
    if mask is not None:
        check_weight(mask, field, "mask")
    negative = digital_determinants(field).neg().clamp(min=0)
    return _mask_mean(simplex / 2 * negative.sum(1), mask)


def ndv(field: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Non-diffeomorphic volume of a 3-D field, as a share of the volume.

    Adds up how much volume the ten digital determinants turn inside out, so it sees folds that
    central differences step over. 0 where the field is digitally diffeomorphic (all ten positive).

    Args:
        field: displacement ``(B, 3, D, H, W)`` in voxels; clamped beyond the border.
        mask: ``(B, 1, D, H, W)``; only voxels with a positive value count.

    Returns:
        ``(B,)``, non-negative; multiply by 100 for a percentage. NaN where the mask is empty.

    Raises:
        TypeError, ValueError: if ``field`` is no 3-D field or ``mask`` does not fit it.

    Liu et al., IJCV 2024, doi:10.1007/s11263-024-02047-1.
    """
    return _non_diffeomorphic(field, mask, 3, 1 / 6)


def nda(field: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Non-diffeomorphic area of a 2-D field ``(B, 2, H, W)``: the planar sibling of :func:`ndv`."""
    return _non_diffeomorphic(field, mask, 2, 1 / 2)


def affine_share(field: Tensor) -> Tensor:
    """How much of a field its best affine part explains: 1 - residual / total, sums of squares.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.

    Returns:
        ``(B,)`` in [0, 1]: 1 for an affine field, NaN for a field that is 0 everywhere.

    Raises:
        TypeError, ValueError: if ``field`` is no field.
    """
    check_field(field, "field")
    u = field.flatten(2).transpose(1, 2).double()
    x = identity_grid(field.shape[2:], dtype=u.dtype, device=u.device).flatten(2).transpose(1, 2)
    # An orthonormal basis of the affine functions: constant, and each centred coordinate.
    basis = torch.cat([torch.ones_like(x[..., :1]), x - x.mean(1, keepdim=True)], 2)
    basis = basis / basis.norm(dim=1, keepdim=True).clamp(min=1e-12)
    explained = (basis.transpose(1, 2) @ u).square().sum((1, 2))
    return (explained / u.square().sum((1, 2))).to(torch.get_default_dtype())


def spectral_centroid(field: Tensor) -> Tensor:
    """Mean spatial frequency of a field, weighted by power; its constant part counts as 0.

    The field is mirrored at its borders before the Fourier transform (as in a cosine transform),
    so that opposite borders do not meet in a jump.

    Args:
        field: displacement ``(B, D, *S)`` in voxels.

    Returns:
        ``(B,)`` in cycles per voxel; NaN for a field that is 0 everywhere.

    Raises:
        TypeError, ValueError: if ``field`` is no field.
    """
    check_field(field, "field")
    axes = tuple(range(2, field.ndim))
    even = field.double()
    for axis in axes:
        even = torch.cat([even, even.flip(axis)], axis)
    power = torch.fft.fftn(even, dim=axes).abs().square().sum(1)
    frequencies = [
        torch.fft.fftfreq(n, dtype=power.dtype, device=power.device) for n in even.shape[2:]
    ]
    radius = torch.stack(torch.meshgrid(*frequencies, indexing="ij")).norm(dim=0)
    centroid = (power * radius).flatten(1).sum(1) / power.flatten(1).sum(1)
    return centroid.to(torch.get_default_dtype())
