"""Voxel grids and sampling at voxel coordinates: the one place that calls ``grid_sample``.

Coordinates are in voxels of the grid they refer to, component ``c`` along array axis ``c``.
The centre of the first voxel is 0, that of the last is ``N - 1`` (``align_corners=True``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import (
    check_batch,
    check_choice,
    check_field,
    check_image,
    check_shape,
    check_tensor,
)


def identity_grid(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The coordinates of every voxel: ``x[0, c, i, j, ...]`` is the index along axis ``c``.

    Args:
        shape: spatial shape ``S``, two or three axes.
        dtype: of the result; the default floating-point type if ``None``.
        device: of the result.

    Returns:
        Coordinates ``(1, D, *S)`` in voxels.

    Raises:
        TypeError, ValueError: unless ``shape`` is two or three positive integers.
    """
    check_shape(shape, (2, 3))
    dtype = dtype or torch.get_default_dtype()
    axes = [torch.arange(int(n), dtype=dtype, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)


def _last_index(shape: Sequence[int], like: Tensor) -> Tensor:
    """``N - 1`` of each axis, shaped to broadcast over the coordinates ``(B, D, ...)``."""
    check_shape(shape, (2, 3))
    check_tensor(like, "coords")
    if like.ndim < 2 or like.shape[1] != len(shape):
        raise ValueError(
            f"coords: wanted (B, {len(shape)}, ...) for a grid of {tuple(shape)}, "
            f"got shape {tuple(like.shape)}"
        )
    last = torch.tensor([n - 1 for n in shape], dtype=like.dtype, device=like.device)
    return last.view(1, -1, *(1,) * (like.ndim - 2))


def voxel_to_unit(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """Map voxel coordinates to [-1, 1]: ``2 i / (N - 1) - 1``, and 0 along an axis with N = 1.

    Args:
        coords: coordinates ``(B, D, ...)`` in voxels, axis order.
        shape: spatial shape ``S`` of the grid the coordinates refer to.

    Returns:
        Coordinates of the same shape, axis order, -1 and 1 at the outermost voxel centres.

    Raises:
        TypeError, ValueError: if ``coords`` has not one component per axis of ``shape``.
    """
    last = _last_index(shape, coords)
    unit = 2 * coords / last.clamp(min=1) - 1
    return torch.where(last > 0, unit, torch.zeros_like(unit))


def unit_to_voxel(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """Map [-1, 1] coordinates ``(B, D, ...)`` to voxels; the inverse of :func:`voxel_to_unit`."""
    last = _last_index(shape, coords)
    return (coords + 1) / 2 * last


def no_autocast(x: Tensor) -> torch.autocast:
    """A context on the device of ``x`` in which nothing is rounded to half precision."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def sample(
    image: Tensor, coords: Tensor, *, mode: str = "linear", padding: str = "border"
) -> Tensor:
    """Read ``image`` at arbitrary voxel coordinates.

    Computed in float32 (float64 if either input is), with autocast off: bfloat16 coordinates
    step a whole voxel from 128 on.

    Args:
        image: ``(B, C, *S)``, floating point.
        coords: ``(B, D, *T)`` in voxels of the grid of ``image``, axis order; ``T`` has as many
            axes as ``S``.
        mode: ``"linear"`` or ``"nearest"``.
        padding: outside the grid, ``"border"`` repeats the outermost voxels, ``"zeros"`` blends
            to 0 within one voxel (SciPy calls these ``nearest`` and ``grid-constant``).

    Returns:
        ``(B, C, *T)``, of the dtype and on the device of ``image``.

    Raises:
        TypeError: if ``image`` or ``coords`` is no floating-point tensor.
        ValueError: if shapes or batch sizes do not match, or a word is not one of the above.
    """
    check_image(image, "image")
    check_field(coords, "coords")
    check_choice(mode, "mode", ("linear", "nearest"))
    check_choice(padding, "padding", ("border", "zeros"))
    check_batch(image, coords, ("image", "coords"))
    work = torch.promote_types(
        torch.promote_types(image.dtype, coords.dtype), torch.float32
    )  # half precision is raised to float32, float64 stays
    if padding == "zeros":
        # [-1, 1] has no outside along an axis of one voxel: give it empty neighbours.
        single = [axis for axis, n in enumerate(image.shape[2:]) if n == 1]
        pad = [1 if axis in single else 0 for axis in range(image.ndim - 2) for _ in range(2)]
        image = F.pad(image, pad[::-1])
        offset = torch.tensor(pad[::2], dtype=work, device=coords.device)
        coords = coords + offset.view(1, -1, *(1,) * (coords.ndim - 2))
    shape = image.shape[2:]
    with no_autocast(image):
        unit = voxel_to_unit(coords.to(work), shape)
        # grid_sample wants the components last and in reversed axis order.
        grid = unit.movedim(1, -1).flip(-1)
        out = F.grid_sample(
            image.to(work),
            grid,
            mode="bilinear" if mode == "linear" else "nearest",
            padding_mode=padding,
            align_corners=True,
        )
    return out.to(image.dtype)
