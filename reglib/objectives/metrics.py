"""Measures to report, not to train on: overlap of labels, folding and scale of fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reglib.checks import (
    check_field,
    check_image,
    check_numbers,
    check_same_shape,
    check_weight,
)
from reglib.geometry.derivatives import digital_determinants, jacobian_det
from reglib.geometry.grid import identity_grid


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
    check_image(warped_labels, "warped_labels", floating=False)
    check_image(fixed_labels, "fixed_labels", floating=False)
    check_same_shape(warped_labels, fixed_labels, ("warped_labels", "fixed_labels"))
    if warped_labels.shape[1] != 1:
        raise ValueError(
            f"warped_labels: wanted one channel (B, 1, *S), got {tuple(warped_labels.shape)}"
        )
    if not check_numbers(labels, "labels"):
        raise ValueError("labels: wanted at least one label value, got none")
    scores = []
    for value in labels:
        a, b = (warped_labels == value).flatten(1), (fixed_labels == value).flatten(1)
        # Counted in integers: float32 stops counting at 2**24 voxels.
        scores.append(2 * (a & b).sum(1).double() / (a.sum(1) + b.sum(1)))
    return torch.stack(scores, 1).to(torch.get_default_dtype())


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
