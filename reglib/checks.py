"""Checks at the door: every error names the argument, what came and what was wanted."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
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


def check_vectors(x: Tensor, name: str, batches: Sequence[int], n: int) -> None:
    """Raise unless ``x`` is floating point and ``(B, n)``, with B one of ``batches``."""
    check_tensor(x, name)
    if x.ndim != 2 or x.shape[0] not in batches or x.shape[1] != n:
        wanted = " or ".join(str((b, n)) for b in sorted(set(batches)))
        raise ValueError(f"{name}: wanted shape {wanted}, got {_describe(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: wanted floating-point numbers, got {_describe(x)}")


def check_label_maps(warped_labels: Tensor, fixed_labels: Tensor, labels: Sequence[int]) -> None:
    """Raise unless both are label maps ``(B, 1, *S)`` of one shape and ``labels`` lists values."""
    check_image(warped_labels, "warped_labels", floating=False)
    check_image(fixed_labels, "fixed_labels", floating=False)
    check_same_shape(warped_labels, fixed_labels, ("warped_labels", "fixed_labels"))
    if warped_labels.shape[1] != 1:
        raise ValueError(
            f"warped_labels: wanted one channel (B, 1, *S), got {_describe(warped_labels)}"
        )
    if not check_numbers(labels, "labels"):
        raise ValueError("labels: wanted at least one label value, got none")


def check_matrix(
    x: Tensor, name: str, *, dimensions: Sequence[int] = (2, 3), batches: Sequence[int] = ()
) -> None:
    """Raise unless ``x`` holds homogeneous matrices ``(B, D + 1, D + 1)``, finite and invertible.

    D must be one of ``dimensions`` and B one of ``batches`` (empty: any).
    """
    check_tensor(x, name)
    if x.ndim != 3 or x.shape[1] != x.shape[2] or x.shape[1] - 1 not in dimensions or 0 in x.shape:
        wanted = " or ".join(f"(B, {d + 1}, {d + 1})" for d in dimensions)
        raise ValueError(f"{name}: wanted homogeneous matrices {wanted}, got {_describe(x)}")
    if batches and x.shape[0] not in batches:
        wanted = " or ".join(map(str, sorted(set(batches))))
        raise ValueError(f"{name}: wanted a batch of {wanted}, got {_describe(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: wanted a floating-point matrix, got {_describe(x)}")
    for matrix in x:
        check_affine(matrix, name, x.shape[1] - 1)


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


def check_number(
    value: object,
    name: str,
    least: float = 0.0,
    most: float = math.inf,
    *,
    positive: bool = False,
) -> float:
    """Return a number from ``least`` to ``most``, finite, and not 0 if it is to be positive."""
    [number] = check_numbers([value], name)
    if not least <= number <= most or number == math.inf or (positive and number == 0):
        wanted = f"a number of at least {least:g}"
        if most < math.inf:
            wanted = f"a number from {least:g} to {most:g}"
        elif positive:
            wanted = "a positive number"
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")
    return number


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


def check_affine(affine: object, name: str, dimensions: int) -> Tensor:
    """Return an affine matrix ``(D+1, D+1)`` as a float64 tensor on the CPU.

    Raises ``TypeError`` unless it is a tensor or an array of real numbers, ``ValueError`` unless
    it is finite, invertible and ends with the row 0 ... 0 1.
    """
    if not isinstance(affine, (Tensor, np.ndarray)):
        raise TypeError(f"{name}: wanted a tensor or an array, got {_describe(affine)}")
    array = affine.detach().cpu().numpy() if isinstance(affine, Tensor) else affine
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: wanted real numbers, got {_describe(affine)}")
    matrix = torch.from_numpy(np.array(array, np.float64, order="C"))
    size = dimensions + 1
    if matrix.shape != (size, size):
        raise ValueError(
            f"{name}: wanted a {size} x {size} matrix for {dimensions} spatial axes, "
            f"got {_describe(affine)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name}: wanted finite numbers, got {matrix.tolist()}")
    if matrix[-1].tolist() != [0.0] * dimensions + [1.0]:
        raise ValueError(f"{name}: wanted 0 ... 0 1 as its last row, got {matrix[-1].tolist()}")
    lengths = matrix[:-1, :-1].norm(dim=0)
    # Independent of the unit: the volume that the axes span, over that of a box of such sides.
    if not bool(lengths.gt(0).all()) or abs(torch.linalg.det(matrix[:-1, :-1] / lengths)) < 1e-6:
        raise ValueError(
            f"{name}: wanted axes that span space, got the singular matrix {matrix.tolist()}"
        )
    return matrix
