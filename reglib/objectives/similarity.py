"""Image dissimilarities: how far the warped image is from the fixed one. Lower is better.

Each is computed per sample and channel, then averaged over channels; pair ``i`` of a batch gives
what it gives alone. ``weight`` ``(B, 1, *S)`` says how much each voxel counts: a voxel of weight 0
has no influence whatever. Statistics are accumulated in float32 (float64 for float64 input) with
autocast off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reglib.checks import check_choice, check_image, check_same_shape, check_weight
from reglib.geometry.grid import no_autocast
from reglib.geometry.smoothing import box_sum, check_window, gaussian_sum

#: Local variances below this share of the whole image's variance count as flat.
FLAT = 1e-5

#: So do those below this many roundings of the local mean square, which hold no valid digit.
ROUNDINGS = 64


def reduce_batch(values: Tensor, reduction: str) -> Tensor:
    """Average ``(B, C, ...)`` over all but the batch, and over that too if ``"mean"``."""
    check_choice(reduction, "reduction", ("mean", "none"))
    per_sample = values.flatten(1).mean(1)
    return per_sample.mean() if reduction == "mean" else per_sample


def _prepare(
    warped: Tensor, fixed: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the inputs and raise them to one dtype of at least single precision.

    Where the weight is 0 the images are set to 0: not even NaN gets through.
    """
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    check_same_shape(warped, fixed, ("warped", "fixed"))
    work = torch.promote_types(torch.promote_types(warped.dtype, fixed.dtype), torch.float32)
    if weight is not None:
        check_weight(weight, fixed)
        weight = weight.to(work)
        warped, fixed = (x.where(weight > 0, torch.zeros_like(x)) for x in (warped, fixed))
    return warped.to(work), fixed.to(work), weight


def _mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean over space, keeping the axes: ``(B, C, 1, ...)``; 0 where all weights are 0."""
    axes = tuple(range(2, x.ndim))
    if weight is None:
        return x.mean(axes, keepdim=True)
    total = weight.sum(axes, keepdim=True)
    return (weight * x).sum(axes, keepdim=True) / total.where(total > 0, torch.ones_like(total))


def _centre(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The image minus its mean, and its variance ``(B, C, 1, ...)``, never quite 0.

    The mean is taken off twice: the first pass of an image offset by 1e4 leaves a rounding error.
    """
    for _ in range(2):
        x = x - _mean(x, weight)
    return x, _mean(x.square(), weight).clamp(min=1e-12)


def mae(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Mean absolute error, ``mean |w - f|``.

    Args:
        warped: ``(B, C, *S)``, floating point.
        fixed: of the same shape.
        weight: ``(B, 1, *S)``, non-negative; ``None`` counts every voxel once.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``.

    Raises:
        TypeError, ValueError: if the inputs are no images of one shape, or ``weight`` does not fit.
    """
    w, f, weight = _prepare(warped, fixed, weight)
    with no_autocast(w):
        return reduce_batch(_mean((w - f).abs(), weight), reduction)


def mse(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Mean squared error, mean (w - f)^2. Arguments, result and errors as :func:`mae`."""
    w, f, weight = _prepare(warped, fixed, weight)
    with no_autocast(w):
        return reduce_batch(_mean((w - f).square(), weight), reduction)


def ncc(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """1 - r, with r the correlation coefficient over the whole image: 0 best, 2 worst.

    A constant image has r = 0. Arguments, result and errors as :func:`mae`.
    """
    w, f, weight = _prepare(warped, fixed, weight)
    with no_autocast(w):
        w, variance_w = _centre(w, weight)
        f, variance_f = _centre(f, weight)
        r = _mean(w * f, weight) * variance_w.rsqrt() * variance_f.rsqrt()
        return reduce_batch(1 - r, reduction)


class _LocalCorrelation(torch.autograd.Function):
    """Squared local correlation, with its backward pass written out: under half the memory.

    With E the local mean: c = E[wf] - E[w] E[f], a = E[ww] - E[w]^2, b likewise, and
    cc2 = c^2 / (max(a, floor_w) max(b, floor_f)). ``local_sum`` must be a symmetric operator;
    the floors are constants, raised to the rounding error of a and b: without that, a few bright
    voxels in a dark image give cc2 in the thousands.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        f: Tensor,
        floor_w: Tensor,
        floor_f: Tensor,
        weight: Tensor | None,
        local_sum: Callable[[Tensor], Tensor],
    ) -> Tensor:
        share = local_sum(torch.ones_like(f[:1, :1]) if weight is None else weight)
        share = share.clamp_(min=1e-6).reciprocal_()

        def local_mean(x: Tensor) -> Tensor:
            return local_sum(x if weight is None else weight * x).mul_(share)

        def local_variance(x: Tensor, mean: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
            square = local_mean(x.square())
            floor = torch.maximum(square * (ROUNDINGS * torch.finfo(x.dtype).eps), floor)
            variance = square.sub_(mean.square())
            flat = variance <= floor
            return torch.maximum(variance, floor, out=variance), flat

        mean_w, mean_f = local_mean(w), local_mean(f)
        a, flat_w = local_variance(w, mean_w, floor_w)
        b, flat_f = local_variance(f, mean_f, floor_f)
        c = local_mean(w * f).sub_(mean_w * mean_f)
        by_w, by_f = c.div(a), c.div_(b)
        cc2 = by_w * by_f
        # d cc2 / dc = 2 slope; d cc2 / da = -slope by_w, and 0 where the floor holds.
        slope = torch.div(by_w, b, out=b).mul_(share)
        by_w.masked_fill_(flat_w, 0)
        saved_by_f = by_f.masked_fill_(flat_f, 0) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(w, f, weight, mean_w, mean_f, slope, by_w, saved_by_f)
        ctx.local_sum = local_sum
        return cc2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # PyTorch's once_differentiable would take this gradient for a constant, silently.
            raise RuntimeError("lncc: it has no second derivative, got create_graph=True")
        w, f, weight, mean_w, mean_f, slope, by_w, by_f = ctx.saved_tensors

        def one_side(x: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor, by_x: Tensor) -> Tensor:
            dc = 2 * slope * grad
            out = ctx.local_sum(dc).mul_(y)
            da = (dc * by_x).mul_(-0.5)
            out.addcmul_(x, ctx.local_sum(da), value=2)
            out.sub_(ctx.local_sum(dc.mul_(mean_y).addcmul_(da, mean_x, value=2)))
            return out if weight is None else out.mul_(weight)

        grad_w = one_side(w, f, mean_w, mean_f, by_w) if ctx.needs_input_grad[0] else None
        grad_f = one_side(f, w, mean_f, mean_w, by_f) if ctx.needs_input_grad[1] else None
        return grad_w, grad_f, None, None, None, None


def lncc(
    warped: Tensor,
    fixed: Tensor,
    *,
    window: int = 9,
    sigma: float | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """1 - mean(cc^2), with cc the correlation coefficient within a window around each voxel.

    0 is best, 1 is worst. Windows are cut off at the border and count only the voxels they hold.
    Local variances are clamped from below at ``FLAT`` times the variance of the whole image, so
    flat regions give cc = 0 and never NaN, whatever the intensity scale.

    Args:
        warped: ``(B, C, *S)``, floating point.
        fixed: of the same shape.
        window: odd side length of the window in voxels.
        sigma: ``None`` for a box; otherwise the voxels of the window are weighted by a Gaussian
            of this standard deviation in voxels.
        weight: ``(B, 1, *S)``, non-negative; enters the local statistics and the mean over voxels.
            A constant: no gradient flows to it.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``.

    Raises:
        TypeError, ValueError: if the inputs are no images of one shape, ``weight`` does not fit,
            ``window`` is not an odd positive integer or ``sigma`` not positive.
    """
    w, f, weight = _prepare(warped, fixed, weight)
    check_window(window)
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma: wanted a positive number of voxels, got {sigma!r}")

    def local_sum(x: Tensor) -> Tensor:
        return box_sum(x, window) if sigma is None else gaussian_sum(x, sigma, window // 2)

    if weight is not None:
        # Relative to the largest, so that its scale does not matter to the clamp of local sums.
        largest = weight.detach().amax(tuple(range(1, weight.ndim)), keepdim=True)
        weight = weight.detach() / largest.where(largest > 0, torch.ones_like(largest))
    with no_autocast(w):
        w, variance_w = _centre(w, weight)
        f, variance_f = _centre(f, weight)
        floors = (FLAT * variance_w).detach(), (FLAT * variance_f).detach()
        cc2 = _LocalCorrelation.apply(w, f, *floors, weight, local_sum)
        return reduce_batch(1 - _mean(cc2, weight), reduction)


def soft_dice(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """1 - 2 sum(w f) / sum(w + f) per channel, for label probabilities in [0, 1].

    A channel that is empty in both gives 0. Arguments, result and errors as :func:`mae`.
    """
    w, f, weight = _prepare(warped, fixed, weight)
    with no_autocast(w):
        overlap, total = 2 * _mean(w * f, weight), _mean(w + f, weight)
        empty = total <= 0
        score = overlap / total.where(~empty, torch.ones_like(total))
        return reduce_batch(1 - score.where(~empty, torch.ones_like(score)), reduction)
