"""Carrying images, labels and points along a displacement field.

A field ``u`` on the fixed grid defines phi(x) = x + u(x), which maps fixed to moving. Images and
labels are pulled back, ``warped(x) = moving(phi(x))``; points travel forward, fixed -> moving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reglib.checks import (
    check_batch,
    check_choice,
    check_field,
    check_finite,
    check_image,
    check_points,
)
from reglib.geometry.grid import identity_grid, sample

#: Shares of labels closer together than this are tied.
TIE = 1e-4


def transform_grid(field: Tensor) -> Tensor:
    """phi(x) = x + u(x) at every voxel: ``(B, D, *S)`` in voxels of the moving grid.

    In float32, or float64 if ``field`` is: lower precision cannot count to the end of an image.
    """
    check_field(field, "field")
    field = field.to(torch.promote_types(field.dtype, torch.float32))
    return identity_grid(field.shape[2:], dtype=field.dtype, device=field.device) + field


def warp(image: Tensor, field: Tensor, *, padding: str = "border") -> Tensor:
    """Pull an image back: ``warped(x) = image(x + u(x))``, linear interpolation.

    Args:
        image: the moving image ``(B, C, *T)``, floating point. ``T`` may differ from ``S``.
        field: displacement ``(B, D, *S)`` on the fixed grid, in voxels.
        padding: outside the moving image, ``"border"`` (default) or ``"zeros"``, as for masks.

    Returns:
        The warped image ``(B, C, *S)`` on the fixed grid.

    Raises:
        TypeError: if an input is not floating point (labels go through :func:`warp_labels`).
        ValueError: if shapes or batch sizes do not match.
    """
    check_image(image, "image")
    check_field(field, "field")
    check_batch(image, field, ("image", "field"))
    return sample(image, transform_grid(field), padding=padding)


def warp_labels(
    labels: Tensor, field: Tensor, *, mode: str = "nearest", padding: str = "zeros"
) -> Tensor:
    """Pull a label map back; no label is invented.

    ``"nearest"`` takes the label of the nearest voxel. ``"linear"`` gives every label the share
    that linear interpolation of its one-hot map would give it, and takes the largest: smoother
    outlines for as many samplings as there are labels. A tie goes to the nearest voxel.

    Args:
        labels: the moving labels ``(B, C, *T)``, any real dtype.
        field: displacement ``(B, D, *S)`` on the fixed grid, in voxels.
        mode: ``"nearest"`` (default) or ``"linear"``.
        padding: outside the moving labels, ``"zeros"`` (default, background) or ``"border"``.

    Returns:
        The warped labels ``(B, C, *S)`` on the fixed grid, dtype of ``labels``.

    Raises:
        TypeError, ValueError: as :func:`warp`.
    """
    check_image(labels, "labels", floating=False)
    check_field(field, "field")
    check_choice(mode, "mode", ("nearest", "linear"))
    check_batch(labels, field, ("labels", "field"))
    # float64 holds every label up to 2**53 exactly.
    values = labels.to(torch.float64)
    out = sample(values, transform_grid(field.double()), mode="nearest", padding=padding)
    if mode == "linear":
        out = _largest_share(values, transform_grid(field), out, padding)
    return out.to(labels.dtype)


def _largest_share(labels: Tensor, coords: Tensor, nearest: Tensor, padding: str) -> Tensor:
    """The label of the largest linear share, one label at a time: no one-hot volume is built."""
    check_finite(labels, "labels")
    out = nearest.clone()
    largest = torch.full_like(nearest, -1, dtype=coords.dtype)
    present = torch.unique(labels).tolist()
    if padding == "zeros" and 0 not in present:
        present.append(0.0)
    for label in present:
        # Outside, zeros mean that the label is 0: background is what no other label claims.
        background = label == 0 and padding == "zeros"
        claimed = (labels != 0) if background else (labels == label)
        share = sample(claimed.to(coords.dtype), coords, padding=padding)
        if background:
            share = 1 - share
        # More than the rounding of the weights: what remains tied falls to the nearest voxel.
        share += TIE * (nearest == label)
        larger = share > largest
        largest = torch.where(larger, share, largest)
        out = out.masked_fill_(larger, label)
    return out


def warp_points(fixed_points: Tensor, field: Tensor) -> Tensor:
    """Carry points from the fixed to the moving image: ``phi(p) = p + u(p)``.

    The field is read by linear interpolation and clamped to its border outside the grid.

    Args:
        fixed_points: ``(B, N, D)`` in voxels of the fixed grid, axis order.
        field: displacement ``(B, D, *S)`` on the fixed grid, in voxels.

    Returns:
        The corresponding points ``(B, N, D)`` in voxels of the moving grid.

    Raises:
        TypeError: if an input is not floating point.
        ValueError: if shapes or batch sizes do not match.
    """
    check_field(field, "field")
    check_points(fixed_points, "fixed_points", field.shape[1])
    if fixed_points.shape[0] != field.shape[0]:
        raise ValueError(
            "fixed_points, field: wanted the same batch size, "
            f"got {fixed_points.shape[0]} and {field.shape[0]}"
        )
    coords = fixed_points.movedim(2, 1)
    shape = (*coords.shape, *(1,) * (field.ndim - 3))
    moved = sample(field, coords.reshape(shape)).reshape(coords.shape)
    return fixed_points + moved.movedim(1, 2)
