"""From batched tensors to the 2-D arrays that are drawn: one sample, one slice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reglib.checks import check_field, check_finite, check_image
from reglib.geometry.grid import identity_grid


def image_planes(
    images: Mapping[str, Tensor], index: int, axis: int | None, position: int | None
) -> dict[str, NDArray[np.float64]]:
    """Check images ``(B, 1, *S)`` of one shape and return one slice of one sample of each."""
    for name, tensor in images.items():
        check_image(tensor, name, floating=False)
        if tensor.shape[1] != 1:
            raise ValueError(
                f"{name}: wanted one channel, (B, 1, *S), got {tuple(tensor.shape)}; "
                "choose channel c as image[:, c : c + 1]"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in images.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(images)}: wanted the same shape, got {shapes}")
    return {
        name: cut(select(tensor, name, index)[0].cpu().double().numpy(), axis, position)
        for name, tensor in images.items()
    }


def phi_planes(
    field: Tensor, index: int, axis: int | None, position: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """In-plane ``x`` (rows, columns) and ``u(x)`` (rows, columns) of one sample."""
    check_field(field, "field")
    u = select(field, "field", index).cpu().double().numpy()
    x = identity_grid(field.shape[2:])[0].double().numpy()
    kept = [c for c in range(len(u)) if len(u) == 2 or c != axis]
    y_at, x_at = (cut(x[c], axis, position) for c in kept)
    y_by, x_by = (cut(u[c], axis, position) for c in kept)
    return y_at, x_at, y_by, x_by


def select(tensor: Tensor, name: str, index: int) -> Tensor:
    """Return sample ``index`` without its batch axis, detached and known to be finite."""
    if not 0 <= index < tensor.shape[0]:
        raise ValueError(
            f"index: wanted 0 to {tensor.shape[0] - 1} for {tensor.shape[0]} samples of {name}, "
            f"got {index}"
        )
    sample = tensor[index].detach()
    check_finite(sample, name)
    return sample


def cut(array: NDArray[np.float64], axis: int | None, position: int | None) -> NDArray[np.float64]:
    """Return the slice ``position`` (the middle one if ``None``) across ``axis`` of a volume."""
    if array.ndim == 2:
        if axis is not None or position is not None:
            raise ValueError(
                f"axis, position: wanted None for 2-D data, got axis={axis}, position={position}"
            )
        return array
    if axis not in (0, 1, 2):
        raise ValueError(f"axis: wanted 0, 1 or 2 to cut a slice of 3-D data, got {axis}")
    size = array.shape[axis]
    position = size // 2 if position is None else position
    if not 0 <= position < size:
        raise ValueError(f"position: wanted 0 to {size - 1} along axis {axis}, got {position}")
    return np.asarray(np.take(array, position, axis=axis))
