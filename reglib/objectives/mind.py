"""MIND-SSC: images of different modalities compared by how each resembles itself nearby."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import check_image, check_positive_int
from reglib.geometry.grid import no_autocast
from reglib.geometry.smoothing import box_sum
from reglib.objectives.similarity import prepare_pair, reduce_batch

#: The variance at a voxel is held between these multiples of its mean over the image.
CLAMP = (1e-3, 1e3)

#: Differences of fewer roundings of the largest intensity than this are noise.
ROUNDINGS = 16

#: Descriptors are computed for slabs of about this many, which fit into the cache of a CPU; a GPU
#: wants more to do.
CHUNK, CHUNK_GPU = 2**18, 2**25


class _Pair(NamedTuple):
    """Two channels whose neighbours are the same step apart.

    One image serves both: the differences between the boxes of the padded image that begin at
    ``first`` and at ``second``. After the sum over patches, it holds the two channels in the
    boxes that begin at ``channels``.
    """

    first: list[int]
    second: list[int]
    size: list[int]
    channels: list[list[int]]


class _Layout(NamedTuple):
    """Patches of ``2 radius + 1`` voxels a side in an image padded by ``width``."""

    shape: tuple[int, ...]
    radius: int
    width: int
    pairs: list[_Pair]


def _layout(shape: Sequence[int], radius: int, dilation: int) -> _Layout:
    """For every two axes and both signs: from a to b leads the same step as from -b to -a."""
    check_positive_int(radius, "radius")
    check_positive_int(dilation, "dilation")
    unit = dilation * torch.eye(len(shape), dtype=torch.int64)
    pairs = []
    for axis_a, axis_b in combinations(range(len(shape)), 2):
        for a, b in ((unit[axis_a], unit[axis_b]), (-unit[axis_a], unit[axis_b])):
            shifts = torch.stack([a, -b])
            # The box that the first neighbours of both channels fill, and patches around them.
            low, high = shifts.amin(0).clamp(max=0), shifts.amax(0).clamp(min=0)
            first = low + dilation
            size = torch.tensor(shape) + high - low + 2 * radius
            channels = shifts - low + radius
            pairs.append(
                _Pair(first.tolist(), (first + b - a).tolist(), size.tolist(), channels.tolist())
            )
    return _Layout(tuple(shape), radius, radius + dilation, pairs)


def _box(x: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """The box of ``size`` voxels of ``(B, C, *S)`` that begins at ``start``."""
    cut: tuple[Any, ...] = (..., *(slice(i, i + n) for i, n in zip(start, size, strict=True)))
    return x[cut]


def _pad(x: Tensor, width: int) -> Tensor:
    """Repeat the outermost voxels ``width`` times beyond every border."""
    return F.pad(x, (width, width) * (x.ndim - 2), mode="replicate")


def _unpad(x: Tensor, width: int) -> Tensor:
    """The adjoint of :func:`_pad`: the outermost voxels get what their copies got."""
    for axis in range(2, x.ndim):
        n = x.shape[axis] - 2 * width
        for end, copies in ((width, 0), (width + n - 1, width + n)):
            x.narrow(axis, end, 1).add_(x.narrow(axis, copies, width).sum(axis, keepdim=True))
        x = x.narrow(axis, width, n)
    return x


def _differences(
    image: Tensor, weight: Tensor | None, layout: _Layout
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The differences of each pair of channels, and 1 where both voxels count, else 0."""
    image = _pad(image, layout.width)
    valid = None if weight is None else _pad((weight > 0).to(image), layout.width)
    for first, second, size, _ in layout.pairs:
        both = None
        if valid is not None:
            both = _box(valid, first, size) * _box(valid, second, size)
        yield _box(image, first, size) - _box(image, second, size), both


def _patch_sum(x: Tensor, layout: _Layout) -> Tensor:
    return box_sum(x, 2 * layout.radius + 1)


def _channels(images: Sequence[Tensor], layout: _Layout) -> list[Tensor]:
    """The K channels ``(B, C, *S)``, views of the K / 2 images that hold them."""
    pairs = zip(images, layout.pairs, strict=True)
    return [_box(x, start, layout.shape) for x, pair in pairs for start in pair.channels]


def _patch_distances(image: Tensor, weight: Tensor | None, layout: _Layout) -> list[Tensor]:
    """The squared differences of patches, ``(B, C, *S)`` for each of K channels.

    Summed, as only their ratios count; averaged where not all voxels of a patch do.
    """
    distances = []
    for difference, both in _differences(image, weight, layout):
        square = difference.square_()
        if both is None:
            distance = _patch_sum(square, layout)
        else:
            distance = _patch_sum(square.mul_(both), layout)
            distance.div_(_patch_sum(both, layout).clamp_(min=1))
        distances.append(distance)
    return _channels(distances, layout)


def _slabs(image: Tensor, layout: _Layout) -> list[slice]:
    """Cut ``(B, C, *S)`` along the first axis of S."""
    chunk = CHUNK if image.device.type == "cpu" else CHUNK_GPU
    length, channels = image.shape[2], 2 * len(layout.pairs)
    n = max(chunk * length // (channels * image.numel()), 1)
    return [slice(start, start + n) for start in range(0, length, n)]


def _excess(distances: Sequence[Tensor], rows: slice) -> Tensor:
    """Distances less the least one, ``(B, C, K, *S)``, for a slab."""
    d = torch.stack([x[:, :, rows] for x in distances], 2)
    return d.sub_(d.amin(2, keepdim=True))


class _Measured(NamedTuple):
    """What the descriptors of any slab of an image are computed from, each ``(B, C, *S)``.

    The distances of patches for K channels, one over their variance, and where that is not
    clamped.
    """

    distances: list[Tensor]
    rate: Tensor
    free: Tensor


def _measure(image: Tensor, weight: Tensor | None, layout: _Layout) -> _Measured:
    """Distances of patches and their variance at every voxel of ``(B, C, *S)``."""
    distances = _patch_distances(image, weight, layout)
    variance = torch.empty_like(image)
    for rows in _slabs(image, layout):
        torch.mean(_excess(distances, rows), 2, out=variance[:, :, rows])
    axes = tuple(range(2, image.ndim))
    if weight is None:
        mean = variance.mean(axes, keepdim=True)
    else:
        mean = (_share(weight) * variance).sum(axes, keepdim=True)
    info = torch.finfo(image.dtype)
    noise = (ROUNDINGS * info.eps * image.abs().amax(axes, keepdim=True)).square()
    if weight is None:
        noise *= (2 * layout.radius + 1) ** len(axes)
    lowest, highest = (torch.maximum(bound * mean, noise) for bound in CLAMP)
    clamped = variance.clamp(lowest, highest)
    # Without any difference at all there is nothing to divide.
    rate = clamped.reciprocal().masked_fill_(clamped < info.tiny, 0)
    return _Measured(distances, rate, variance == clamped)


def _share(weight: Tensor) -> Tensor:
    """Weights that sum to 1 over space; all 0 if they are."""
    total = weight.sum(tuple(range(2, weight.ndim)), keepdim=True)
    return weight / total.masked_fill(total == 0, 1)


def _descriptors(image: _Measured, rows: slice) -> Tensor:
    """exp(-distance / variance) for a slab, ``(B, C, K, *S)``."""
    return _excess(image.distances, rows).mul_(image.rate[:, :, None, rows]).neg_().exp_()


def _add_slopes(
    slopes: Sequence[Tensor], s: Tensor, grad: Tensor, rate: Tensor, free: Tensor, rows: slice
) -> None:
    """Add, for a slab, the derivative by the distances, from ``grad`` by the descriptors ``s``."""
    by_excess = grad * s
    # The variance is the mean over channels of the excess, which is -variance log(s).
    log = s.clamp(min=torch.finfo(s.dtype).tiny).log_()
    by_variance = log.mul_(by_excess).mean(2, keepdim=True).mul_(free[:, :, None, rows])
    by_excess.add_(by_variance).mul_(rate[:, :, None, rows]).neg_()
    # The least distance, where the descriptor is 1, is taken off all of them.
    least = (s == 1).to(s)
    share = by_excess.sum(2, keepdim=True).div_(least.sum(2, keepdim=True))
    by_excess.sub_(least.mul_(share))
    for slope, part in zip(slopes, by_excess.unbind(2), strict=True):
        slope[:, :, rows] += part


def _zeros(image: Tensor, layout: _Layout) -> list[Tensor]:
    """The K / 2 images that hold the channels, empty."""
    return [image.new_zeros(*image.shape[:2], *pair.size) for pair in layout.pairs]


def _gradient(
    image: Tensor, weight: Tensor | None, layout: _Layout, slopes: Sequence[Tensor]
) -> Tensor:
    """The derivative by the image, from that by the K / 2 images of patch distances."""
    total = torch.zeros_like(_pad(image, layout.width))
    differences = _differences(image, weight, layout)
    for (difference, both), slope, pair in zip(differences, slopes, layout.pairs, strict=True):
        if both is not None:
            difference.mul_(both)
            slope.div_(_patch_sum(both, layout).clamp_(min=1))
        difference.mul_(_patch_sum(slope, layout))
        _box(total, pair.first, pair.size).add_(difference, alpha=2)
        _box(total, pair.second, pair.size).sub_(difference, alpha=2)
    return _unpad(total, layout.width)


def _check_no_graph(name: str) -> None:
    if torch.is_grad_enabled():
        # PyTorch's once_differentiable would take this gradient for a constant, silently.
        raise RuntimeError(f"{name}: it has no second derivative, got create_graph=True")


class _Features(torch.autograd.Function):
    """The descriptors of an image, ``(B, C, K, *S)``."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor | None, layout: _Layout) -> Tensor:
        measured = _measure(image, weight, layout)
        out = image.new_empty(*image.shape[:2], 2 * len(layout.pairs), *layout.shape)
        for rows in _slabs(image, layout):
            out[:, :, :, rows] = _descriptors(measured, rows)
        ctx.layout = layout
        ctx.save_for_backward(image, weight, out, measured.rate, measured.free)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_no_graph("mind_features")
        image, weight, out, rate, free = ctx.saved_tensors
        slopes = _zeros(image, ctx.layout)
        channels = _channels(slopes, ctx.layout)
        for rows in _slabs(image, ctx.layout):
            slab = (..., rows, *(slice(None),) * (image.ndim - 3))
            _add_slopes(channels, out[slab], grad[slab], rate, free, rows)
        return _gradient(image, weight, ctx.layout, slopes), None, None


class _MeanSquare(torch.autograd.Function):
    """Mean squared difference of the descriptors of two images, ``(B, C)``.

    All descriptors are K times an image, and their gradient is several such. Here those of a slab
    serve the value and the gradient at once and are forgotten: a quarter of the memory, and half
    the time.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, f: Tensor, weight: Tensor | None, layout: _Layout) -> Tensor:
        axes = tuple(range(2, w.ndim))
        share = _share(torch.ones_like(w[:1, :1]) if weight is None else weight)
        images = [_measure(x, weight, layout) for x in (w, f)]
        needed = ctx.needs_input_grad[:2]
        slopes = [_zeros(x, layout) if n else [] for x, n in zip((w, f), needed, strict=True)]
        channels = [_channels(x, layout) if x else [] for x in slopes]
        value = w.new_zeros(w.shape[:2])
        for rows in _slabs(w, layout):
            s_w, s_f = (_descriptors(x, rows) for x in images)
            difference = s_w - s_f
            m = share[:, :, rows]
            value += (difference.square().mean(2) * m).sum(axes)
            grad = difference.mul_(m.unsqueeze(2)).mul_(2 / difference.shape[2])
            for s, x, slope in zip((s_w, s_f), images, channels, strict=True):
                if slope:
                    _add_slopes(slope, s, grad, x.rate, x.free, rows)
                grad.neg_()
        ctx.save_for_backward(
            *(
                _gradient(x, weight, layout, slope) if slope else None
                for x, slope in zip((w, f), slopes, strict=True)
            )
        )
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_no_graph("mind")
        by_w, by_f = (
            None if x is None else x * grad.view(*grad.shape, *(1,) * (x.ndim - 2))
            for x in ctx.saved_tensors
        )
        return by_w, by_f, None, None


def mind_features(
    image: Tensor, *, radius: int = 1, dilation: int = 2, weight: Tensor | None = None
) -> Tensor:
    """Self-similarity context: K numbers in (0, 1] at every voxel that no change of contrast moves.

    The 2 D neighbours at ``dilation`` voxels along the axes are compared two by two, save opposite
    ones: K = 2 D (D - 1) pairs, 12 in 3-D as in the paper, and 4 in 2-D. For the mean squared
    differences D_k of the patches around both neighbours of every pair, the descriptor is
    exp(-(D_k - min D) / V), with V the mean over k of D_k - min D, held between 1/1000 of its
    mean over the image and 1000 times that, as the authors' code has it. The image is continued
    beyond its borders by its outermost voxels.

    Args:
        image: ``(B, C, *S)``, floating point.
        radius: a patch has ``2 radius + 1`` voxels a side.
        dilation: distance of the neighbours in voxels.
        weight: ``(B, 1, *S)``, non-negative: a difference counts if both its voxels have a weight
            above 0, and V's mean over the image is weighted. A constant.

    Returns:
        ``(B, C K, *S)``, float32 (float64 for float64 input). The K numbers of a channel follow
        one another: for each two axes a < b, the pairs (a, b), (-a, -b), (-a, b) and (a, -b).
        A flat neighbourhood gives 1.

    Raises:
        TypeError, ValueError: if ``image`` is no image, ``weight`` does not fit or ``radius`` or
            ``dilation`` is no positive integer.

    Heinrich et al., MICCAI 2013, doi:10.1007/978-3-642-40811-3_24.
    """
    check_image(image, "image")
    x, _, weight = prepare_pair(image, image, weight)
    layout = _layout(x.shape[2:], radius, dilation)
    with no_autocast(x):
        return cast(Tensor, _Features.apply(x, weight, layout)).flatten(1, 2)


def mind(
    warped: Tensor,
    fixed: Tensor,
    *,
    radius: int = 1,
    dilation: int = 2,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared difference of the two images' :func:`mind_features`: 0 best, below 1.

    For images of different modalities, whose structures look alike though their intensities do
    not. Linear changes of brightness and contrast, negatives included, do not matter.

    Args:
        warped: ``(B, C, *S)``, floating point.
        fixed: of the same shape.
        radius: of a patch in voxels, as for :func:`mind_features`.
        dilation: distance of the neighbours in voxels, likewise.
        weight: ``(B, 1, *S)``, non-negative; enters the descriptors, and the mean over voxels.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``(B,)``.

    Raises:
        TypeError, ValueError: if the inputs are no images of one shape, or as
            :func:`mind_features`.
    """
    w, f, weight = prepare_pair(warped, fixed, weight)
    layout = _layout(w.shape[2:], radius, dilation)
    with no_autocast(w):
        return reduce_batch(_MeanSquare.apply(w, f, weight, layout), reduction)
