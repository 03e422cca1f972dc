"""Checks at the door: every error names the argument, what came and what was wanted."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from torch import Tensor


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{type(x).__name__} of {x.dtype} and shape {tuple(x.shape)}"
    return f"{type(x).__name__} ({reprlib.repr(x)})"


def check_tensor(x: Tensor, name: str) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {_describe(x)}")


def check_image(x: Tensor, name: str, *, floating: bool = True) -> None:
    """Raise unless ``x`` is a batched image ``(B, C, *S)`` with two or three spatial axes."""
    check_tensor(x, name)
    if x.ndim not in (4, 5):
        raise ValueError(
            f"{name}: wanted a batched image (B, C, H, W) or (B, C, D, H, W), got {_describe(x)}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name}: wanted a voxel or more along every axis, got {_describe(x)}")
    if floating and not x.is_floating_point():
        raise TypeError(f"{name}: wanted a floating-point image, got {_describe(x)}")


def check_field(u: Tensor, name: str) -> None:
    """Raise unless ``u`` is a batched vector field ``(B, D, *S)`` with D = number of axes in S."""
    check_image(u, name)
    if u.shape[1] != u.ndim - 2:
        raise ValueError(
            f"{name}: wanted a field (B, D, *S) with D = {u.ndim - 2} components "
            f"for {u.ndim - 2} spatial axes, got {_describe(u)}"
        )


def check_points(points: Tensor, name: str, dimensions: int) -> None:
    """Raise unless ``points`` is ``(B, N, D)`` with D = ``dimensions``."""
    check_tensor(points, name)
    if points.ndim != 3 or points.shape[2] != dimensions or 0 in points.shape:
        raise ValueError(
            f"{name}: wanted one point or more, (B, N, D) with D = {dimensions}, "
            f"got {_describe(points)}"
        )
    if not points.is_floating_point():
        raise TypeError(f"{name}: wanted floating-point coordinates, got {_describe(points)}")


def check_batch(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raise unless two batched tensors have the same batch size and number of axes."""
    if a.shape[0] != b.shape[0] or a.ndim != b.ndim:
        raise ValueError(
            f"{names[0]}, {names[1]}: wanted the same batch size and number of axes, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def check_same_shape(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raise unless two tensors have the same shape."""
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]}, {names[1]}: wanted the same shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def check_weight(weight: Tensor, image: Tensor, name: str = "weight") -> None:
    """Raise unless ``weight`` is ``(B, 1, *S)`` on the grid of ``image``."""
    check_tensor(weight, name)
    if weight.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(
            f"{name}: wanted shape {(image.shape[0], 1, *image.shape[2:])}, got {_describe(weight)}"
        )
    if weight.is_complex():
        raise TypeError(f"{name}: wanted real numbers or booleans, got {_describe(weight)}")


def check_finite(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` if ``x`` holds NaN or infinity."""
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise ValueError(f"{name}: wanted finite values, got {bad} NaN or infinite of {x.numel()}")


def check_positive_int(value: int, name: str) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: wanted an integer, got {_describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: wanted at least 1, got {value}")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(map(repr, choices))}, got {value!r}")


def check_numbers(values: object, name: str) -> tuple[float, ...]:
    """Return ``values`` as a tuple of floats; raise ``TypeError`` unless they are numbers."""
    if not isinstance(values, Iterable) or not all(isinstance(v, Real) for v in values):
        raise TypeError(f"{name}: wanted a sequence of numbers, got {_describe(values)}")
    return tuple(float(v) for v in values)


def check_shape(shape: Sequence[int], dimensions: Sequence[int], name: str = "shape") -> None:
    """Raise unless ``shape`` is a sequence of positive integers, one of ``dimensions`` long."""
    wanted = f"{name}: wanted {' or '.join(map(str, dimensions))} positive integers"
    if not isinstance(shape, Sequence) or not all(isinstance(n, Integral) for n in shape):
        raise TypeError(f"{wanted}, got {_describe(shape)}")
    if len(shape) not in dimensions or any(n < 1 for n in shape):
        raise ValueError(f"{wanted}, got {tuple(shape)}")


def check_spacing(spacing: Sequence[float] | None, dimensions: int) -> tuple[float, ...]:
    """Return ``spacing`` (mm per voxel, axis order) as a tuple; ``None`` means 1 everywhere."""
    if spacing is None:
        return (1.0,) * dimensions
    values = check_numbers(spacing, "spacing")
    if len(values) != dimensions or not all(0 < s < math.inf for s in values):
        raise ValueError(f"spacing: wanted {dimensions} positive numbers, got {values}")
    return values
