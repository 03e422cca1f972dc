"""Box and Gaussian filters, and the image pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import check_image, check_numbers, check_positive_int


def _sizes(x: Tensor, axis: int, n: int) -> tuple[int, ...]:
    """The shape of ``x`` with ``n`` along ``axis``."""
    return tuple(n if a == axis else size for a, size in enumerate(x.shape))


def _box_sum_axis(x: Tensor, window: int, axis: int) -> Tensor:
    """Sums of ``window`` neighbours from sums of 1, 2, 4, 8 ...: the window's binary digits."""
    n = x.shape[axis]
    zeros = x.new_zeros(_sizes(x, axis, window // 2))
    partial = torch.cat([zeros, x, zeros], axis)
    # The window is odd: its first voxel is the sum of 1 that it needs.
    out = partial.narrow(axis, 0, n).clone()
    start, width = 1, 1
    while 2 * width <= window:
        m = partial.shape[axis] - width
        partial = partial.narrow(axis, 0, m) + partial.narrow(axis, width, m)
        width *= 2
        if window & width:
            out.add_(partial.narrow(axis, start, n))
            start += width
    return out


class _BoxSum(torch.autograd.Function):
    """Box sums. The operator is symmetric, so it is its own backward pass and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: int) -> Tensor:
        ctx.window = window
        for axis in range(2, x.ndim):
            x = _box_sum_axis(x, window, axis)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return box_sum(grads[0], ctx.window), None


def box_sum(x: Tensor, window: int) -> Tensor:
    """Sum over a centred cube of ``window`` voxels a side, cut off at the border.

    One axis after the other, each by doubling partial sums: log2(window) additions a voxel, and
    no long running total in which a dark region next to a bright one would lose its digits.

    Args:
        x: ``(B, C, *S)``, floating point.
        window: odd side length in voxels.

    Returns:
        ``(B, C, *S)``.

    Raises:
        TypeError, ValueError: if ``x`` is no image or ``window`` no odd positive integer.
    """
    check_image(x, "x")
    check_window(window)
    return cast(Tensor, _BoxSum.apply(x, window))


def check_window(window: int) -> None:
    """Raise unless ``window`` is an odd positive integer."""
    check_positive_int(window, "window")
    if window % 2 == 0:
        raise ValueError(f"window: wanted an odd number of voxels, got {window}")


class _FilterAxis(torch.autograd.Function):
    """Correlation with a symmetric kernel along one axis, zeros outside: its own backward pass.

    Shifted copies are added up. A convolution would round its input where TF32 or autocast is on,
    and local variances do not survive that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, half_kernel: Sequence[float], axis: int) -> Tensor:
        ctx.half_kernel, ctx.axis = half_kernel, axis
        n = x.shape[axis]
        out = x * half_kernel[0]
        for k, weight in enumerate(half_kernel[1:n], start=1):
            out.narrow(axis, k, n - k).add_(x.narrow(axis, 0, n - k), alpha=weight)
            out.narrow(axis, 0, n - k).add_(x.narrow(axis, k, n - k), alpha=weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _filter_axis(grads[0], ctx.half_kernel, ctx.axis), None, None


def _filter_axis(x: Tensor, half_kernel: Sequence[float], axis: int) -> Tensor:
    """Weight ``half_kernel[k]`` for the neighbours at distance k on either side."""
    return cast(Tensor, _FilterAxis.apply(x, half_kernel, axis))


def _half_gaussian(sigma: float, radius: int) -> list[float]:
    """Gaussian weights at 0..radius; those at -radius..radius sum to 1."""
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = 2 * sum(weights) - weights[0]
    return [w / total for w in weights]


def gaussian_sum(x: Tensor, sigma: float, radius: int) -> Tensor:
    """Gaussian-weighted sum ``(B, C, *S)`` within ``radius`` voxels, zeros outside the image."""
    half_kernel = _half_gaussian(sigma, radius)
    for axis in range(2, x.ndim):
        x = _filter_axis(x, half_kernel, axis)
    return x


def gaussian_smooth(x: Tensor, sigma: float | Sequence[float], *, truncate: float = 4.0) -> Tensor:
    """Gaussian smoothing; beyond the border the outermost voxels are repeated.

    Args:
        x: ``(B, C, *S)``, floating point.
        sigma: standard deviation in voxels, one for all axes or one per axis; 0 leaves an axis.
        truncate: kernel radius in standard deviations, as in ``scipy.ndimage.gaussian_filter``.

    Returns:
        ``(B, C, *S)``.

    Raises:
        TypeError, ValueError: if ``x`` is no image, ``sigma`` is negative or of wrong length, or
            ``truncate`` is negative.
    """
    check_image(x, "x")
    sigmas = check_numbers([sigma] * (x.ndim - 2) if isinstance(sigma, Real) else sigma, "sigma")
    if len(sigmas) != x.ndim - 2 or not all(0 <= s < math.inf for s in sigmas):
        raise ValueError(f"sigma: wanted {x.ndim - 2} non-negative numbers, got {sigma!r}")
    if not 0 <= truncate < math.inf:
        raise ValueError(f"truncate: wanted a non-negative number, got {truncate!r}")
    image_dtype = x.dtype
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for axis, s in enumerate(sigmas, start=2):
        radius = int(truncate * s + 0.5)
        if radius == 0:
            continue
        n = x.shape[axis]
        index = torch.arange(-radius, n + radius, device=x.device).clamp(0, n - 1)
        padded = x.index_select(axis, index)
        x = _filter_axis(padded, _half_gaussian(s, radius), axis).narrow(axis, radius, n)
    return x.to(image_dtype)


def pool(image: Tensor, factor: int) -> Tensor:
    """Average over cells of ``factor`` voxels a side: one pyramid level.

    Node ``i`` of the level sits at ``s i + (s - 1) / 2`` of the finer grid. Where ``s`` does not
    divide a size, the outermost voxels are repeated to fill the last cell.

    Args:
        image: ``(B, C, *S)``, floating point.
        factor: the pooling factor ``s``.

    Returns:
        ``(B, C, *ceil(S / s))``.

    Raises:
        TypeError, ValueError: if ``image`` is no image or ``factor`` no positive integer.
    """
    check_image(image, "image")
    check_positive_int(factor, "factor")
    for axis in range(2, image.ndim):
        n = image.shape[axis]
        missing = -n % factor
        if missing:
            last = image.narrow(axis, n - 1, 1)
            image = torch.cat([image, last.expand(*_sizes(image, axis, missing))], axis)
    mean = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    return mean(image, factor)


def pyramid(image: Tensor, levels: int, *, factor: int = 2) -> list[Tensor]:
    """The image and its poolings, finest first: level ``l`` is pooled by ``factor**l``.

    Args:
        image: ``(B, C, *S)``, floating point.
        levels: number of levels, the image itself included.
        factor: pooling factor from one level to the next.

    Returns:
        ``levels`` tensors ``(B, C, *S_l)``.

    Raises:
        TypeError, ValueError: as :func:`pool`.
    """
    check_image(image, "image")
    check_positive_int(levels, "levels")
    check_positive_int(factor, "factor")
    return [image] + [pool(image, factor**level) for level in range(1, levels)]
