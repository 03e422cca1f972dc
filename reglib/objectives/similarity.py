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

from reglib.checks import (
    check_choice,
    check_image,
    check_number,
    check_numbers,
    check_positive_int,
    check_same_shape,
    check_weight,
)
from reglib.geometry.bspline import cubic_weights, quadratic_weights
from reglib.geometry.grid import no_autocast
from reglib.geometry.smoothing import box_sum, check_window, gaussian_sum

#: Local variances below this share of the whole image's variance count as flat.
FLAT = 1e-5

#: So do those below this many roundings of the local mean square, which hold no valid digit.
ROUNDINGS = 64

#: Joint histograms take this many voxels at a time. On a CPU they fit into the cache, and into the
#: work of one thread, which then waits for no other; a GPU wants more to do than that.
CHUNK, CHUNK_GPU = 2**15, 2**21


def reduce_batch(values: Tensor, reduction: str) -> Tensor:
    """Average ``(B, C, ...)`` over all but the batch, and over that too if ``"mean"``."""
    check_choice(reduction, "reduction", ("mean", "none"))
    per_sample = values.flatten(1).mean(1)
    return per_sample.mean() if reduction == "mean" else per_sample


def prepare_pair(
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
    w, f, weight = prepare_pair(warped, fixed, weight)
    with no_autocast(w):
        return reduce_batch(_mean((w - f).abs(), weight), reduction)


def mse(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Mean squared error, mean (w - f)^2. Arguments, result and errors as :func:`mae`."""
    w, f, weight = prepare_pair(warped, fixed, weight)
    with no_autocast(w):
        return reduce_batch(_mean((w - f).square(), weight), reduction)


def ncc(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """1 - r, with r the correlation coefficient over the whole image: 0 best, 2 worst.

    A constant image has r = 0. Arguments, result and errors as :func:`mae`.
    """
    w, f, weight = prepare_pair(warped, fixed, weight)
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
    w, f, weight = prepare_pair(warped, fixed, weight)
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


def dssim(
    warped: Tensor,
    fixed: Tensor,
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """1 - mean(SSIM): :func:`reglib.objectives.metrics.ssim` as something to be optimised.

    Windows are cut off at the border and count only the voxels they hold, where the measure leaves
    them out. Whoever optimises it cannot be judged by it alone.

    Args:
        warped: ``(B, C, *S)``, floating point.
        fixed: of the same shape.
        data_range: largest minus smallest intensity that the images could have.
        window: odd side length of the window in voxels.
        sigma: standard deviation of its Gaussian weights in voxels.
        weight: ``(B, 1, *S)``, non-negative; enters the local statistics and the mean over voxels.
            A constant: no gradient flows to it.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``; 0 is best, 2 is worst.

    Raises:
        TypeError, ValueError: if the inputs are no images of one shape, ``weight`` does not fit,
            ``window`` is not an odd positive integer or another number not positive.

    Wang et al., IEEE TIP 2004, doi:10.1109/TIP.2003.819861.
    """
    w, f, weight = prepare_pair(warped, fixed, weight)
    check_window(window)
    check_number(data_range, "data_range", positive=True)
    check_number(sigma, "sigma", positive=True)
    weight = torch.ones_like(w[:, :1]) if weight is None else weight.detach()
    with no_autocast(w):
        total = gaussian_sum(weight, sigma, window // 2)
        total = total.where(total > 0, torch.ones_like(total))

        def mean(x: Tensor) -> Tensor:
            return gaussian_sum(weight * x, sigma, window // 2) / total

        # Variances of what lies far from 0 would be lost in roundings.
        middle_w, middle_f = (_mean(x, weight).detach() for x in (w, f))
        a, b = w - middle_w, f - middle_f
        mean_a, mean_b = mean(a), mean(b)
        variance_w = (mean(a * a) - mean_a * mean_a).clamp(min=0)
        variance_f = (mean(b * b) - mean_b * mean_b).clamp(min=0)
        covariance = mean(a * b) - mean_a * mean_b
        mean_w, mean_f = mean_a + middle_w, mean_b + middle_f
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        light = (2 * mean_w * mean_f + c1) / (mean_w * mean_w + mean_f * mean_f + c1)
        structure = (2 * covariance + c2) / (variance_w + variance_f + c2)
        return reduce_batch(1 - _mean(light * structure, weight), reduction)


def _intensity_range(
    x: Tensor, given: tuple[float, float] | Tensor | None, weight: Tensor | None, name: str
) -> Tensor:
    """The lowest and highest intensity of every sample and channel, ``(B C, 2)``; a constant."""
    if given is not None:
        numbers = given if isinstance(given, Tensor) else check_numbers(given, name)
        limits = torch.as_tensor(numbers, dtype=x.dtype, device=x.device).detach()
        if limits.shape not in ((2,), (*x.shape[:2], 2)):
            raise ValueError(
                f"{name}: wanted (low, high) or a tensor of shape {(*x.shape[:2], 2)}, "
                f"got shape {tuple(limits.shape)}"
            )
        if not bool(limits.isfinite().all() & (limits[..., 0] <= limits[..., 1]).all()):
            raise ValueError(f"{name}: wanted finite numbers with low <= high, got {given}")
        return limits.expand(*x.shape[:2], 2).reshape(-1, 2)
    lowest = highest = x.detach().flatten(2)
    if weight is not None:
        absent = weight.flatten(2) <= 0
        lowest, highest = (lowest.masked_fill(absent, end) for end in (torch.inf, -torch.inf))
    return torch.stack([lowest.amin(2), highest.amax(2)], 2).reshape(-1, 2)


def _low_and_scale(limits: Tensor, bins: int) -> Tensor:
    """The lowest intensity of every row, and bins per intensity: 0 where there is no contrast."""
    low, high = limits.unbind(1)
    info = torch.finfo(limits.dtype)
    least = (ROUNDINGS * info.eps * limits.abs().amax(1)).clamp(min=bins * info.tiny)
    flat = high - low <= least
    scale = (bins - 3) / (high - low).masked_fill(flat, torch.inf)
    return torch.stack([low.masked_fill(flat, 0), scale], 1)


def _chunks(x: Tensor) -> list[slice]:
    """Cut the columns of ``(R, N)``, so that the voxels of one cut are a chunk."""
    n = max((CHUNK if x.device.type == "cpu" else CHUNK_GPU) // len(x), 1)
    return [slice(k, k + n) for k in range(0, x.shape[1], n)]


def _windows(x: Tensor, place: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where intensities ``(R, n)`` lie among the bins: the range's ends at bins 1 and bins - 2.

    Returns the first of the four bins that each window covers, the fraction by which the window
    has moved on towards the next four, and whether the intensity is within the range.
    """
    position = (x - place[:, :1]) * place[:, 1:] + 1
    clamped = position.clamp(1, bins - 2)
    cell = clamped.floor().clamp_(max=bins - 3)
    # NaN becomes some integer: the window is NaN as well, wherever it lies.
    first = cell.long().sub_(1).clamp_(0, bins - 4)
    return first, clamped - cell, position == clamped


def _spline_slope(
    table: Tensor, index: Tensor, along: Tensor, across: Tensor, step: int, other_step: int
) -> Tensor:
    """The slope, along one axis of the bins, of the spline with the coefficients ``table``.

    ``index`` is the first of the 4 x 4 coefficients that count at each voxel, ``step`` their
    distance along that axis; ``along`` and ``across`` are the fractions ``(R, n)``.
    """
    rise = (table[step:] - table[:-step]).to(along.dtype)
    slope = torch.zeros_like(along)
    weights = cubic_weights(across)
    for i, outer in enumerate(quadratic_weights(along)):
        line = torch.zeros_like(slope)
        for j, inner in enumerate(weights):
            there = rise[i * step + j * other_step :].index_select(0, index)
            line.addcmul_(inner, there.view_as(inner))
        slope.addcmul_(outer, line)
    return slope


class _MutualInformation(torch.autograd.Function):
    """(H(w, f) - H(w) - H(f)) / norm of rows ``(R, N)``, with norm 1 or the joint entropy.

    A voxel falls into 4 x 4 bins of its row's joint histogram. Nothing the size of an image is
    kept but the images: both passes go through them in chunks and find the windows anew. In a
    flattened histogram the 16 bins of a voxel lie at fixed distances from their first, so that
    one index serves all. Counts are float64: in float32 the background of a volume fills its bin
    until one more voxel is rounded away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        f: Tensor,
        place_w: Tensor,
        place_f: Tensor,
        weight: Tensor | None,
        bins: int,
        normalised: bool,
    ) -> Tensor:
        rows = len(w)
        row = bins**2 * torch.arange(rows, device=w.device).unsqueeze(1)
        # A complex number holds two neighbouring bins: adding it takes the time of one.
        pairs = torch.zeros(rows * bins**2, dtype=torch.complex128, device=w.device)
        for cut in _chunks(w):
            first_w, t, _ = _windows(w[:, cut], place_w, bins)
            first_f, s, _ = _windows(f[:, cut], place_f, bins)
            index = first_w.mul_(bins).add_(first_f).add_(row).flatten()
            if weight is not None:
                t_weights = [weight[:, cut] * v for v in cubic_weights(t)]
            else:
                t_weights = list(cubic_weights(t))
            s_weights = [v.double() for v in cubic_weights(s)]
            for j in (0, 2):
                pair = torch.complex(s_weights[j], s_weights[j + 1])
                for i, v in enumerate(t_weights):
                    pairs[i * bins + j :].index_add_(0, index, (v * pair).flatten())
        joint = pairs.real.clone()
        joint[1:] += pairs.imag[:-1]

        p = joint.view(rows, bins, bins)
        total = p.sum((1, 2), keepdim=True)
        total = total.masked_fill(total == 0, 1)
        p = p / total
        p_w, p_f = p.sum(2, keepdim=True), p.sum(1, keepdim=True)
        h, h_w, h_f = (
            torch.special.entr(q).flatten(1).sum(1).view(-1, 1, 1) for q in (p, p_w, p_f)
        )
        norm = h.masked_fill(h == 0, 1) if normalised else torch.ones_like(h)
        value = (h - h_w - h_f) / norm
        # The derivative by p; constants are left out, as a window's weights always sum to 1.
        log, log_w, log_f = (q.log().masked_fill_(q == 0, 0) for q in (p, p_w, p_f))
        slope = log_w + log_f - (1 - value if normalised else 1) * log
        ctx.save_for_backward(w, f, place_w, place_f, weight, slope / (norm * total))
        return value.flatten().to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mutual_information: it has no second derivative, got create_graph=True"
            )
        w, f, place_w, place_f, weight, slope = ctx.saved_tensors
        bins = slope.shape[1]
        row = bins**2 * torch.arange(len(w), device=w.device).unsqueeze(1)
        slope = (slope * grad.view(-1, 1, 1)).flatten()
        grad_w, grad_f = (torch.empty_like(w) if n else None for n in ctx.needs_input_grad[:2])
        for cut in _chunks(w):
            first_w, t, inside_w = _windows(w[:, cut], place_w, bins)
            first_f, s, inside_f = _windows(f[:, cut], place_f, bins)
            index = first_w.mul_(bins).add_(first_f).add_(row).flatten()
            sides = (grad_w, t, s, bins, inside_w, place_w), (grad_f, s, t, 1, inside_f, place_f)
            for side, along, across, step, inside, place in sides:
                if side is None:
                    continue
                part = _spline_slope(slope, index, along, across, step, bins + 1 - step)
                if weight is not None:
                    part.mul_(weight[:, cut])
                side[:, cut] = part.mul_(inside).mul_(place[:, 1:])
        return grad_w, grad_f, None, None, None, None, None


def mutual_information(
    warped: Tensor,
    fixed: Tensor,
    *,
    bins: int = 32,
    normalised: bool = False,
    warped_range: tuple[float, float] | Tensor | None = None,
    fixed_range: tuple[float, float] | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Minus the mutual information of the intensities, H(w, f) - H(w) - H(f), in nats.

    0 if one image says nothing about the other, negative otherwise. Every voxel is spread over
    4 x 4 bins of the joint histogram by a cubic B-spline window (Thévenaz and Unser); ITK's
    version (Mattes et al.) has the window for the moving image only, and no derivative by the
    fixed one. The two ends of an image's intensity range lie at the centres of bins 1 and
    ``bins - 2``, so that no window is cut off. A constant image gives 0.

    Args:
        warped: ``(B, C, *S)``, floating point.
        fixed: of the same shape.
        bins: of each axis of the joint histogram, at least 4.
        normalised: give 1 - (H(w) + H(f)) / H(w, f) instead (Studholme et al.), which depends
            less on the overlap: 0 at worst, above -1.
        warped_range: intensities ``(low, high)``, or ``(B, C, 2)``, beyond which all is taken
            for the end of the range, without a gradient; ``None`` takes the image's own where its
            weight is not 0. The range is a constant: where the warped image is to be optimised,
            give that of the moving image, so that the bins stay what they are.
        fixed_range: the same for ``fixed``.
        weight: ``(B, 1, *S)``, non-negative; ``None`` counts every voxel once. A constant.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``.

    Raises:
        TypeError, ValueError: if the inputs are no images of one shape, ``weight`` or a range does
            not fit or ``bins`` is less than 4.

    Thévenaz and Unser, IEEE TIP 2000, doi:10.1109/83.887976. Mattes et al., IEEE TMI 2003,
    doi:10.1109/TMI.2003.809072. Studholme et al., Pattern Recognition 1999,
    doi:10.1016/S0031-3203(98)00091-0.
    """
    w, f, weight = prepare_pair(warped, fixed, weight)
    check_positive_int(bins, "bins")
    if bins < 4:
        raise ValueError(f"bins: wanted at least 4, got {bins}")
    place_w = _low_and_scale(_intensity_range(w, warped_range, weight, "warped_range"), bins)
    place_f = _low_and_scale(_intensity_range(f, fixed_range, weight, "fixed_range"), bins)
    with no_autocast(w):
        rows = [x.reshape(len(place_w), -1) for x in (w, f)]
        if weight is not None:
            weight = weight.detach().expand_as(f).reshape(len(place_w), -1)
        values = _MutualInformation.apply(*rows, place_w, place_f, weight, bins, normalised)
        return reduce_batch(values.view(w.shape[:2]), reduction)


def soft_dice(
    warped: Tensor, fixed: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """1 - 2 sum(w f) / sum(w + f) per channel, for label probabilities in [0, 1].

    A channel that is empty in both gives 0. Arguments, result and errors as :func:`mae`.
    """
    w, f, weight = prepare_pair(warped, fixed, weight)
    with no_autocast(w):
        overlap, total = 2 * _mean(w * f, weight), _mean(w + f, weight)
        empty = total <= 0
        score = overlap / total.where(~empty, torch.ones_like(total))
        return reduce_batch(1 - score.where(~empty, torch.ones_like(score)), reduction)
