"""Grids of a wanted orientation, spacing and size, and images resampled onto them.

A network is trained on images of one kind. Whoever has others converts them here, knowingly:
axes are permuted and flipped, never turned, so nothing is interpolated unless the spacing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import nibabel as nib
import torch
from torch import Tensor

from reglib.checks import (
    check_affine,
    check_field,
    check_image,
    check_matrix,
    check_positive_int,
    check_shape,
    check_spacing,
)
from reglib.data.nifti import Image
from reglib.geometry.affine import affine_field, whole_field
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth

_LETTERS = ("LR", "PA", "IS")

#: Spacings closer together than this share of a voxel over the whole image are the same.
_SAME = 1e-3


def conform_grid(
    affine: Tensor,
    shape: Sequence[int],
    *,
    orientation: str | None = None,
    spacing: Sequence[float] | None = None,
    multiple: int = 1,
) -> tuple[Tensor, tuple[int, ...]]:
    """A grid over the same field of view, with axes of a wanted direction, spacing and size.

    Each axis of the new grid is parallel to one of the old. With the same spacing the voxel centres
    coincide; with another both fields of view have the same middle. Sizes are rounded up to the
    next multiple by adding voxels on both sides, one more at the end where their number is odd.

    Args:
        affine: ``(D+1, D+1)`` of the old grid, voxels to world mm (RAS).
        shape: spatial shape of the old grid.
        orientation: where the new axes point, to the nearest letter, such as ``"RAS"`` or ``"PL"``;
            ``None`` keeps the order and direction of the axes.
        spacing: mm per voxel along the *new* axes; ``None`` keeps those of the old ones.
        multiple: every size shall be a multiple of this.

    Returns:
        Affine ``(D+1, D+1)``, float64 on the CPU, and shape of the new grid.

    Raises:
        TypeError, ValueError: if an argument is malformed, or ``orientation`` does not name each
            world axis of the grid once.
    """
    check_shape(shape, (2, 3))
    d = len(shape)
    old = check_affine(affine, "affine", d)
    check_positive_int(multiple, "multiple")
    axes, signs = list(range(d)), [1.0] * d
    if orientation is not None:
        axes, signs = _axes(old, orientation)
    columns = torch.stack([s * old[:d, a] for a, s in zip(axes, signs, strict=True)], 1)
    extent = [int(shape[a]) for a in axes]
    steps = columns.norm(dim=0)
    wanted = steps if spacing is None else steps.new_tensor(check_spacing(spacing, d))
    sizes, first, new_steps = [], [], []
    for n, step, goal in zip(extent, steps.tolist(), wanted.tolist(), strict=True):
        same = abs(goal / step - 1) * n < _SAME
        ratio = 1.0 if same else goal / step
        size = n if same else max(1, math.ceil(n / ratio - _SAME))
        missing = -size % multiple
        # Where the first voxel sits, in voxels of the old axis seen from its own first voxel.
        first.append((n - 1) / 2 - ((size - 1) / 2 + missing // 2) * ratio)
        sizes.append(size + missing)
        new_steps.append(ratio)
    corner = old.new_tensor([0.0 if s > 0 else n - 1.0 for n, s in zip(extent, signs, strict=True)])
    new = torch.eye(d + 1, dtype=old.dtype)
    new[:d, :d] = columns * old.new_tensor(new_steps)
    new[:d, d] = old[:d, d] + old[:d, axes] @ corner + columns @ old.new_tensor(first)
    return new, tuple(sizes)


def _axes(affine: Tensor, orientation: str) -> tuple[list[int], list[float]]:
    """Which old axis each new one runs along, and in which direction."""
    d = affine.shape[0] - 1
    letters = tuple(orientation.upper()) if isinstance(orientation, str) else ()
    pairs = [next((i for i, p in enumerate(_LETTERS[:d]) if c in p), None) for c in letters]
    if sorted(p for p in pairs if p is not None) != list(range(d)) or len(letters) != d:
        raise ValueError(
            f"orientation: wanted one letter of each of {', '.join(_LETTERS[:d])}, "
            f"got {orientation!r}"
        )
    # Rows: old axes; the world axis each follows, and whether along it or against it.
    found = nib.io_orientation(affine.numpy())
    axes = [int(next(i for i in range(d) if int(found[i, 0]) == p)) for p in pairs]
    ahead = [c in ("R", "A", "S") for c in letters]
    signs = [float(found[a, 1]) * (1.0 if up else -1.0) for a, up in zip(axes, ahead, strict=True)]
    return axes, signs


def resample(
    image: Tensor,
    affine: Tensor,
    new_affine: Tensor,
    new_shape: Sequence[int],
    *,
    matrix: Tensor | None = None,
    field: Tensor | None = None,
    padding: str = "zeros",
) -> Tensor:
    """Read an image on another grid, smoothed first where the new voxels are the larger ones.

    The Gaussian that turns an old voxel's point spread into a new one's has the standard deviation
    ``sqrt((k^2 - 1) / (8 ln 2))`` old voxels, where ``k`` is the step of the new grid along the
    old axis, in old voxels (Cardoso et al., MICCAI 2015, doi:10.1007/978-3-319-24571-3_81).

    Args:
        image: ``(B, C, *T)``, floating point.
        affine: ``(D+1, D+1)``, voxels of ``image`` to world mm.
        new_affine: ``(D+1, D+1)``, voxels of the new grid to world mm.
        new_shape: spatial shape ``S`` of the new grid.
        matrix: ``(B, D+1, D+1)``, world mm, from the new grid's world to that of ``image``;
            ``None`` is the identity.
        field: ``(B, D, *S)`` on the new grid, in its voxels, applied before ``matrix``; ``None``
            is 0.
        padding: outside the image, ``"zeros"`` or ``"border"``.

    Returns:
        ``(B, C, *S)``; ``image`` itself where both grids are the same.

    Raises:
        TypeError, ValueError: if the arguments do not fit.
    """
    check_image(image, "image")
    d = image.ndim - 2
    check_shape(new_shape, (d,), "new_shape")
    old, new = check_affine(affine, "affine", d), check_affine(new_affine, "new_affine", d)
    if matrix is None:
        matrix = torch.eye(d + 1, dtype=torch.float64).expand(len(image), d + 1, d + 1)
    check_matrix(matrix, "matrix", dimensions=(d,), batches=(len(image),))
    if field is not None:
        check_field(field, "field")
        if field.shape != (len(image), d, *new_shape):
            raise ValueError(
                f"field: wanted shape {(len(image), d, *new_shape)}, got {tuple(field.shape)}"
            )
    out = []
    for i in range(len(image)):
        one, world = image[i : i + 1], matrix[i : i + 1]
        voxels = torch.linalg.solve(old, world[0].double().cpu() @ new)
        same = tuple(new_shape) == tuple(image.shape[2:]) and _is_identity(voxels)
        if same and field is None:
            out.append(one)
            continue
        steps = voxels[:d, :d].norm(dim=1).tolist()
        sigma = [math.sqrt(max(k * k - 1, 0.0) / (8 * math.log(2))) for k in steps]
        if field is None:
            there = affine_field(world.to(image.device), new, old, new_shape)
        else:
            there = whole_field(world, field[i : i + 1], new, old)
        out.append(warp(gaussian_smooth(one, sigma), there, padding=padding))
    return torch.cat(out)


def _is_identity(voxels: Tensor) -> bool:
    """Whether a map between two grids of some hundred voxels moves none of them visibly."""
    return bool((voxels - torch.eye(len(voxels), dtype=voxels.dtype)).abs().max() < 1e-6)


def conform(
    image: Image,
    *,
    orientation: str | None = None,
    spacing: Sequence[float] | None = None,
    multiple: int = 1,
    padding: str = "zeros",
) -> Image:
    """An image resampled onto :func:`conform_grid` of its own grid.

    Args:
        image: floating point (labels are not interpolated).
        orientation: such as ``"RAS"``; ``None`` keeps the axes.
        spacing: mm per voxel along the new axes; ``None`` keeps it.
        multiple: every size shall be a multiple of this.
        padding: around it, ``"zeros"`` (default, background) or ``"border"``.

    Returns:
        The image on the new grid.

    Raises:
        TypeError, ValueError: if an argument is malformed.
    """
    if not isinstance(image, Image):
        raise TypeError(f"image: wanted an Image, got {type(image).__name__}")
    affine, shape = conform_grid(
        image.affine,
        tuple(image.tensor.shape[2:]),
        orientation=orientation,
        spacing=spacing,
        multiple=multiple,
    )
    new = resample(image.tensor, image.affine, affine, shape, padding=padding)
    return Image(new, affine)
