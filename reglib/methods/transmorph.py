"""TransMorph: a Swin transformer reads both images, and time steps compose a velocity field.

Chen et al., Medical Image Analysis 2022, doi:10.1016/j.media.2022.102615, in the variant with time
steps and three stages that Chen et al., MIDL 2025, arXiv:2505.24167, pretrain. Swin: Liu et al.,
ICCV 2021, arXiv:2103.14030. Written for 2-D and 3-D alike.

The two images, pooled, are cut into patches; blocks of attention within windows, shifted in every
other block, make features of them, each stage at half the resolution of the one before. A decoder
brings these to half the pooled grid. From there, step after step, a small network looks at the
warped and the fixed image and adds a velocity. Where it departs from the released code (C):

- Tokens that fill up the last window are seen by none (C lets tokens attend to the zeros), and
  along an axis that one window covers there is no shift.
- The feature maps of the pooled images lie at the nodes of a pyramid level (in C the convolution
  after ``AvgPool(3, stride=2)`` sees them half a voxel away).
- What the time steps share is interpolated once, and two maps are convolved one by one and added
  instead of being concatenated: the same numbers in less memory.
- Heads start ten times as small, so that what twelve of them add up to is no thousandth of a voxel.
- The field is not cut off at 100 voxels.

As in C, the field that the time steps compose warps the moving image as it is, and is taken for a
velocity and integrated in the end.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reglib.checks import (
    check_choice,
    check_finite,
    check_image,
    check_positive_int,
    check_same_shape,
)
from reglib.geometry.fields import compose, integrate, upsample_field
from reglib.geometry.grid import no_autocast
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import pool
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc
from reglib.weights import load_weights, save_weights


@dataclass(frozen=True)
class Settings:
    """What a network is made of. The defaults are the paper's, for 160 x 192 x 224 voxels.

    Attributes:
        window: tokens along each axis that attend to each other; one number per spatial axis.
        inputs: channels of each image.
        pool: the images are averaged over so many voxels a side before the network sees them.
        patch: voxels of the pooled images along each axis of a token: 2, 4, 8 ...
        channels: of the first stage; twice as many in each further one.
        depths: blocks of each stage, finest first; their number is the number of stages.
        heads: of the attention in each stage.
        expansion: hidden channels of a block's MLP, in multiples of its channels.
        drop_path: share of the samples that skip the last block in training (stochastic depth,
            arXiv:1603.09382); it rises linearly from 0 in the first.
        features: channels from which a time step reads its velocity.
        time_steps: how many velocities are composed.
        squarings: of the final integration.
        norm: ``"batch"`` or ``"instance"``, after the convolutions of the images (the other
            convolutions have InstanceNorm).

    Raises:
        TypeError, ValueError: if the settings do not fit together.
    """

    window: tuple[int, ...] = (2, 3, 3)
    inputs: int = 1
    pool: int = 2
    patch: int = 4
    channels: int = 96
    depths: tuple[int, ...] = (4, 4, 5)
    heads: tuple[int, ...] = (8, 8, 8)
    expansion: int = 4
    drop_path: float = 0.3
    features: int = 16
    time_steps: int = 12
    squarings: int = 7
    norm: str = "batch"

    def __post_init__(self) -> None:
        for name in ("window", "depths", "heads"):
            # A tuple again after a round trip through JSON.
            object.__setattr__(self, name, _counts(getattr(self, name), name))
        for name in ("inputs", "pool", "patch", "channels", "expansion", "features"):
            check_positive_int(getattr(self, name), name)
        for name in ("time_steps", "squarings"):
            check_positive_int(getattr(self, name), name)
        check_choice(self.norm, "norm", ("batch", "instance"))
        if len(self.window) not in (2, 3):
            raise ValueError(f"window: wanted 2 or 3 numbers, one per axis, got {self.window}")
        if len(self.heads) != len(self.depths):
            raise ValueError(
                f"heads: wanted {len(self.depths)} numbers, one per stage, got {self.heads}"
            )
        if self.patch < 2 or self.patch & (self.patch - 1):
            raise ValueError(f"patch: wanted 2, 4, 8 or a higher power of 2, got {self.patch}")
        if self.channels % (self.patch // 2):
            raise ValueError(
                f"channels: wanted a multiple of {self.patch // 2}, which the decoder divides it "
                f"by, got {self.channels}"
            )
        for stage, heads in enumerate(self.heads):
            if self.channels * 2**stage % heads:
                raise ValueError(
                    f"heads: wanted divisors of the channels, {self.channels * 2**stage} in stage "
                    f"{stage}, got {heads}"
                )
        if not isinstance(self.drop_path, Real):
            raise TypeError(f"drop_path: wanted a number, got {self.drop_path!r}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: wanted a number from 0 to below 1, got {self.drop_path}")

    @property
    def dimensions(self) -> int:
        """How many spatial axes the images have."""
        return len(self.window)

    @property
    def size_multiple(self) -> int:
        """Every spatial size must be a multiple of this."""
        return self.pool * self.patch * 2 ** (len(self.depths) - 1)


def _counts(values: Sequence[int], name: str) -> tuple[int, ...]:
    """Return ``values`` as a tuple; raise unless they are one or more integers of at least 1."""
    if not isinstance(values, Sequence) or not all(isinstance(v, Integral) for v in values):
        raise TypeError(f"{name}: wanted integers, got {values!r}")
    if not values or min(values) < 1:
        raise ValueError(f"{name}: wanted one or more integers of at least 1, got {values!r}")
    return tuple(int(v) for v in values)


#: ``paper`` is for 160 x 192 x 224 voxels of 1 mm, ``small`` for brains of 80 x 96 x 80 voxels of
#: 2 mm or so, ``tiny`` for 40 x 48 x 40 voxels of 4 mm on a CPU.
PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    "small": Settings(
        window=(5, 6, 5),
        patch=2,
        channels=24,
        depths=(2, 2, 3),
        heads=(2, 4, 8),
        drop_path=0.1,
    ),
    "tiny": Settings(
        window=(5, 6, 5),
        pool=1,
        patch=2,
        channels=16,
        depths=(2, 2, 2),
        heads=(2, 4, 8),
        drop_path=0.0,
        features=8,
        time_steps=2,
        norm="instance",
    ),
}


#: Up to so many numbers, channels times all axes but the last, PyTorch convolves one volume slowly.
NATIVE = 20480


class Output(NamedTuple):
    """What TransMorph returns.

    ``field`` is ``integrate(velocity)`` carried to the fixed grid by
    :func:`reglib.geometry.fields.upsample_field`; the same of ``-velocity`` is its inverse.
    """

    field: Tensor  #: displacement ``(B, D, *S)`` on the fixed grid, in voxels
    velocity: Tensor  #: stationary velocity ``(B, D, *S / pool)``, in voxels of the pooled grid


# --- The encoder ------------------------------------------------------------------------------


def _split(x: Tensor, window: Sequence[int]) -> Tensor:
    """``(B, *S, C)`` -> ``(B, W, N, C)``: W windows of N tokens each; they must tile the grid."""
    d, parts = len(window), []
    for n, w in zip(x.shape[1:-1], window, strict=True):
        parts += [n // w, w]
    order = [0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1]
    tiles = x.reshape(len(x), *parts, x.shape[-1]).permute(order)
    return tiles.reshape(len(x), math.prod(parts[::2]), math.prod(window), x.shape[-1])


def _join(windows: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Undo ``_split``: ``(B, W, N, C)`` -> ``(B, *S, C)``."""
    d = len(window)
    counts = [n // w for n, w in zip(shape, window, strict=True)]
    tiles = windows.reshape(len(windows), *counts, *window, windows.shape[-1])
    order = [0, *(k for axis in range(d) for k in (1 + axis, 1 + d + axis)), 2 * d + 1]
    return tiles.permute(order).reshape(len(windows), *shape, windows.shape[-1])


def relative_index(
    window: Sequence[int], table: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """``(N, N)``: the row of the bias table for the token i that asks and the token j it sees.

    The table holds the differences i - j of a window of ``table`` tokens, the last axis fastest.
    """
    tokens = torch.cartesian_prod(*(torch.arange(w, device=device) for w in window))
    index = torch.zeros(len(tokens), len(tokens), dtype=torch.long, device=device)
    for axis, w in enumerate(table):
        along = tokens[:, axis]
        index = index * (2 * w - 1) + along.unsqueeze(1) - along + w - 1
    return index


class _View(NamedTuple):
    """How the blocks of a stage cut a grid into windows: the same for all that shift alike."""

    window: tuple[int, ...]
    shift: tuple[int, ...]
    padded: tuple[int, ...]  # sizes after padding to whole windows
    rows: Tensor  # (N, N), of the bias table
    apart: Tensor | None  # (W, N, N), True where i must not see j; None if all see all


def _view(
    shape: Sequence[int], wanted: Sequence[int], shifted: bool, device: torch.device
) -> _View:
    """Windows of at most ``wanted`` tokens a side; shifted by half a window in odd blocks."""
    window = tuple(min(w, n) for w, n in zip(wanted, shape, strict=True))
    shift = tuple(w // 2 if shifted and w < n else 0 for w, n in zip(window, shape, strict=True))
    padded = tuple(-(-n // w) * w for w, n in zip(window, shape, strict=True))
    index = relative_index(window, wanted, device)
    if not any(shift) and padded == tuple(shape):
        return _View(window, shift, padded, index, None)
    # Tokens that the shift brought round from the other end are 1, what fills up the grid is 2:
    # only tokens of one kind along every axis see each other, so none is left without any.
    kinds = torch.zeros((1, *padded, 1), dtype=torch.long, device=device)
    for axis, (n, s, size) in enumerate(zip(shape, shift, padded, strict=True)):
        place = torch.arange(size, device=device) + s
        kind = (place >= size).long().masked_fill(place % size >= n, 2)
        kinds = kinds * 3 + kind.view(-1, *(1,) * (len(padded) - axis))
    kinds = _split(kinds, window)[0]
    return _View(window, shift, padded, index, kinds != kinds.transpose(1, 2))


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of a window, with a learned bias per displacement.

    softmax(q_i . k_j / sqrt(c) + b(i - j)): the table b has ``2 w - 1`` entries along an axis of
    w tokens, for each head.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), heads))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, windows: Tensor, index: Tensor, apart: Tensor | None = None) -> Tensor:
        """``(B, W, N, C)`` -> ``(B, W, N, C)``.

        Args:
            windows: tokens.
            index: ``(N, N)``, the row of the table for every pair of tokens.
            apart: ``(W, N, N)``, True where the first must not see the second.
        """
        x = self.queries_keys_values(windows).unflatten(-1, (3, self.heads, -1))
        q, k, v = x.permute(3, 0, 1, 4, 2, 5)
        bias = self.bias[index].permute(2, 0, 1).to(q.dtype)
        if apart is not None:
            bias = bias.masked_fill(apart.unsqueeze(1), -math.inf)
        # The bias has no batch: it is broadcast, and without a mask not even repeated per window.
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(seen.transpose(2, 3).flatten(3))


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)), on tokens ``(B, *T, C)``.

    Args:
        channels: of the tokens, C.
        heads: of the attention.
        window: tokens along each axis of a window.
        expansion: hidden channels of the MLP in multiples of C.
        drop: share of the samples that skip each of the two branches in training.
    """

    def __init__(
        self, channels: int, heads: int, window: Sequence[int], *, expansion: int, drop: float
    ) -> None:
        super().__init__()
        self.drop = drop
        self.norm_attention = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)
        self.norm_mix = nn.LayerNorm(channels)
        self.mix = nn.Sequential(
            nn.Linear(channels, expansion * channels),
            nn.GELU(),
            nn.Linear(expansion * channels, channels),
        )

    def weights(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """What the two branches of each sample count, ``(2, B, 1, ...)``: 0 or 1 / (1 - drop)."""
        if not self.training or self.drop == 0:
            return None
        device = x.device if generator is None else generator.device
        draws = torch.rand(2, len(x), generator=generator, device=device).to(x)
        kept = (draws >= self.drop).to(x) / (1 - self.drop)
        return kept.view(2, -1, *(1,) * (x.ndim - 1))

    def forward(self, x: Tensor, view: _View, weights: Tensor | None = None) -> Tensor:
        """Tokens ``(B, *T, C)`` -> tokens ``(B, *T, C)``."""
        step = self._attend(self.norm_attention(x), view)
        x = x + (step if weights is None else weights[0] * step)
        step = self.mix(self.norm_mix(x))
        return x + (step if weights is None else weights[1] * step)

    def _attend(self, x: Tensor, view: _View) -> Tensor:
        shape = x.shape[1:-1]
        axes = tuple(range(1, 1 + len(shape)))
        missing = [m - n for m, n in zip(view.padded, shape, strict=True)]
        if any(missing):
            # F.pad counts from the last axis, here that of the channels.
            x = F.pad(x, [0, 0, *(k for m in reversed(missing) for k in (0, m))])
        if any(view.shift):
            x = x.roll([-s for s in view.shift], axes)
        windows = self.attention(_split(x, view.window), view.rows, view.apart)
        x = _join(windows, view.window, view.padded)
        if any(view.shift):
            x = x.roll(view.shift, axes)
        for axis, n in zip(axes, shape, strict=True):
            x = x.narrow(axis, 0, n)
        return x


class PatchMerging(nn.Module):
    """Every cell of 2 tokens a side becomes one: LayerNorm, then a linear map to 2 C channels."""

    def __init__(self, dimensions: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2**dimensions * channels)
        self.reduce = nn.Linear(2**dimensions * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *T, C)`` -> ``(B, *T / 2, 2 C)``."""
        shape = x.shape[1:-1]
        cells = _split(x, (2,) * len(shape)).flatten(2)
        return self.reduce(self.norm(cells)).unflatten(1, [n // 2 for n in shape])


class Encoder(nn.Module):
    """The Swin encoder: feature maps of a pair, one per stage.

    It draws random numbers only where blocks are dropped in training, from its attribute
    ``generator`` (``None``: torch's own).

    Args:
        settings: what it is made of.
        checkpointing: keep only what enters each block, and compute the rest again in the
            backward pass: the same numbers in less memory and more time.
    """

    def __init__(self, settings: Settings, *, checkpointing: bool = False) -> None:
        super().__init__()
        d, stages = settings.dimensions, len(settings.depths)
        channels = [settings.channels * 2**s for s in range(stages)]
        self.settings, self.checkpointing = settings, checkpointing
        self.generator: torch.Generator | None = None
        #: Spatial axes, and channels of each image.
        self.dimensions, self.inputs = d, settings.inputs
        #: Of the feature maps, coarsest first.
        self.channels = tuple(reversed(channels))
        #: Voxels of the images per voxel of a feature map, coarsest first.
        self.strides = tuple(settings.pool * settings.patch * 2**s for s in range(stages))[::-1]
        conv = nn.Conv2d if d == 2 else nn.Conv3d
        self.embed = conv(2 * settings.inputs, channels[0], settings.patch, stride=settings.patch)
        self.norm_embedded = nn.LayerNorm(channels[0])
        drops = iter(torch.linspace(0, settings.drop_path, sum(settings.depths)).tolist())
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(c, h, settings.window, expansion=settings.expansion, drop=next(drops))
                for _ in range(depth)
            )
            for c, h, depth in zip(channels, settings.heads, settings.depths, strict=True)
        )
        self.merges = nn.ModuleList(PatchMerging(d, c) for c in channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)

    def forward(self, moving: Tensor, fixed: Tensor) -> list[Tensor]:
        """Images ``(B, inputs, *S)`` -> features ``(B, channels[k], *S / strides[k])``."""
        both = pool(torch.cat([moving, fixed], 1), self.settings.pool)
        x = self.norm_embedded(self.embed(both).movedim(1, -1))
        features: list[Tensor] = []
        for stage, norm in enumerate(self.norms):
            if stage:
                x = self.merges[stage - 1](x)
            views = [_view(x.shape[1:-1], self.settings.window, s, x.device) for s in (False, True)]
            for i, block in enumerate(cast(nn.ModuleList, self.stages[stage])):
                x = _run(
                    self, block, x, views[i % 2], cast(Block, block).weights(x, self.generator)
                )
            features.append(norm(x).movedim(-1, 1))
        return features[::-1]


def _run(owner: nn.Module, module: nn.Module, *inputs: Any) -> Any:
    """``module(*inputs)``, kept for the backward pass or, if ``owner.checkpointing``, redone."""
    if not (owner.checkpointing and torch.is_grad_enabled()):
        return module(*inputs)
    # No randomness inside: what is dropped has been drawn outside. The second pass must not count
    # for the running statistics again.
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), _untracked(module)),
    )


@contextlib.contextmanager
def _untracked(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training uses the statistics of the batch and remembers nothing."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    before = [
        (norm, norm.momentum, cast(Tensor, norm.num_batches_tracked).clone()) for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            cast(Tensor, norm.num_batches_tracked).copy_(count)


# --- The decoder ------------------------------------------------------------------------------


def upsample_features(x: Tensor, factor: int) -> Tensor:
    """Feature maps ``(B, C, *T)`` on the grid of ``(B, C, *factor * T)`` that was pooled to theirs.

    Linear between the nodes, and constant beyond the outermost ones: features, unlike fields, do
    not go on.
    """
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with a kernel of 3 voxels a side and zeros outside.

    Args:
        x: ``(B, C, *S)``.
        weight: ``(outputs, C, 3, ...)``.
        bias: ``(outputs,)``, or ``None``.

    Returns:
        ``(B, outputs, *S)``.
    """
    if x.ndim == 4:
        return F.conv2d(x, weight, bias, padding=1)
    if x.device.type == "cpu" and len(x) == 1 and math.prod(x.shape[1:4]) <= NATIVE:
        # On a CPU PyTorch takes its own code for one small volume, and oneDNN's for two, which
        # needs a third of the time and less for both of them.
        return F.conv3d(x.expand(2, *x.shape[1:]), weight, bias, padding=1)[:1]
    return F.conv3d(x, weight, bias, padding=1)


def _conv(
    dimensions: int, inputs: int, outputs: int, *, bias: bool = False
) -> nn.Conv2d | nn.Conv3d:
    conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return conv(inputs, outputs, 3, padding=1, bias=bias)


class Look(nn.Module):
    """What a convolution sees in the two images, normalised: ``(B, 2 C, *S)`` to features."""

    def __init__(self, dimensions: int, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        two, three = {
            "batch": (nn.BatchNorm2d, nn.BatchNorm3d),
            "instance": (nn.InstanceNorm2d, nn.InstanceNorm3d),
        }[norm]
        self.conv = _conv(dimensions, inputs, outputs)
        self.norm = two(outputs) if dimensions == 2 else three(outputs)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Images ``(B, C, *S)`` -> ``(B, outputs, *S)``."""
        x = convolve(torch.cat([moving, fixed], 1), self.conv.weight)
        return F.leaky_relu(self.norm(x), 0.01, inplace=True)


class Fusion(nn.Module):
    """Two convolutions of two maps on one grid, each with InstanceNorm and LeakyReLU."""

    def __init__(self, dimensions: int, deep: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.deep = deep
        self.first = _conv(dimensions, deep + skip, outputs)
        self.second = _conv(dimensions, outputs, outputs)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """``(B, deep, *S)`` and ``(B, skip, *S)`` -> ``(B, outputs, *S)``."""
        # The convolution of the concatenation is the sum of the convolutions.
        weight = self.first.weight
        x = convolve(deep, weight[:, : self.deep]) + convolve(skip, weight[:, self.deep :])
        x = F.leaky_relu(F.instance_norm(x), 0.01, inplace=True)
        x = convolve(x, self.second.weight)
        return F.leaky_relu(F.instance_norm(x), 0.01, inplace=True)


class TimeStep(nn.Module):
    """The velocity that is to be added, from what the images look like now."""

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__()
        d = settings.dimensions
        self.look = Look(d, 2 * settings.inputs, width, settings.norm)
        self.fuse = Fusion(d, width, width, settings.features)
        self.head = _conv(d, settings.features, d, bias=True)
        nn.init.normal_(self.head.weight, std=1e-6)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, deep: Tensor, warped: Tensor, fixed: Tensor) -> Tensor:
        """Decoded features and the images as they are now -> a velocity ``(B, D, *S)``, voxels."""
        x = self.fuse(deep, self.look(warped, fixed))
        with no_autocast(x):
            return convolve(x.to(self.head.weight.dtype), self.head.weight, self.head.bias)


class TransMorph(nn.Module):
    """The registration network: encoder, decoder and time steps.

    A new network leaves everything where it is, to 0.001 voxel. Train it with a learning rate that
    rises first, over a tenth of the steps or so (``schedule`` of :func:`reglib.training.fit`): from
    one that starts high its encoder may not learn anything.

    Its ``card`` says what it takes, for :class:`reglib.methods.network.Network`: change
    ``card["input"]`` if it is trained on other intensities than 0 to 1, or on one orientation and
    spacing.

    Args:
        settings: what it is made of, such as ``PRESETS["tiny"]``.
        checkpointing: keep only what enters each block and time step, and compute the rest again
            in the backward pass: the same numbers in less memory and more time.

    Raises:
        TypeError: if ``settings`` is no ``Settings``.
    """

    def __init__(self, settings: Settings, *, checkpointing: bool = False) -> None:
        super().__init__()
        if not isinstance(settings, Settings):
            raise TypeError(f"settings: wanted Settings, got {settings!r}")
        self.settings, self.checkpointing = settings, checkpointing
        #: What users of the network must know; of a new one, its input only.
        self.card: dict[str, Any] = {"input": input_contract(settings)}
        d, norm = settings.dimensions, settings.norm
        self.encoder = Encoder(settings, checkpointing=checkpointing)
        self.fusions, self.looks = nn.ModuleList(), nn.ModuleList()
        for deep, skip in itertools.pairwise(self.encoder.channels):
            self.fusions.append(Fusion(d, deep, skip, skip))
        width, self.factors = settings.channels, []
        factor = settings.patch // 2
        while factor > 1:
            self.factors.append(factor)
            self.looks.append(Look(d, 2 * settings.inputs, width // 2, norm))
            self.fusions.append(Fusion(d, width, width // 2, width // 2))
            width, factor = width // 2, factor // 2
        self.steps = nn.ModuleList(TimeStep(settings, width) for _ in range(settings.time_steps))

    def forward(self, moving: Tensor, fixed: Tensor) -> Output:
        """Register each moving image to its fixed one.

        Args:
            moving: ``(B, inputs, *S)``, floating point, sizes multiples of
                ``settings.size_multiple``.
            fixed: of the same shape.

        Returns:
            The field on the fixed grid and the velocity it was integrated from.

        Raises:
            TypeError, ValueError: if an image is not what the network can take.
        """
        check_images(
            moving,
            fixed,
            dimensions=self.settings.dimensions,
            inputs=self.settings.inputs,
            multiple=self.settings.size_multiple,
            weight=self.encoder.embed.weight,
        )
        features = self.encoder(moving, fixed)
        moving_level, fixed_level = (pool(x, self.settings.pool) for x in (moving, fixed))
        # Further skips than the encoder's: what convolutions see in the images themselves.
        seen = (
            look(pool(moving_level, f), pool(fixed_level, f))
            for look, f in zip(self.looks, self.factors, strict=True)
        )
        x = features[0]
        for fuse, skip in zip(self.fusions, itertools.chain(features[1:], seen), strict=True):
            x = fuse(upsample_features(x, 2), skip)
        deep = upsample_features(x, 2)
        velocity: Tensor | None = None
        warped = moving_level
        for step in self.steps:
            if velocity is not None:
                warped = warp(moving_level, velocity)
            found = _run(self, step, deep, warped, fixed_level)
            velocity = found if velocity is None else compose(found, velocity)
        assert velocity is not None  # there is a time step at least
        field = integrate(velocity, steps=self.settings.squarings)
        if self.settings.pool > 1:
            field = upsample_field(field, self.settings.pool, moving.shape[2:])
        return Output(field, velocity)


def input_contract(settings: Settings) -> dict[str, Any]:
    """What :class:`reglib.methods.network.Network` must bring the images to: ``card["input"]``."""
    return {
        "channels": settings.inputs,
        "range": [0.0, 1.0],
        "size_multiple": settings.size_multiple,
    }


def check_images(
    moving: Tensor, fixed: Tensor, *, dimensions: int, inputs: int, multiple: int, weight: Tensor
) -> None:
    """Raise unless a network can take a pair.

    Args:
        moving: wanted as ``(B, inputs, *S)``, finite.
        fixed: wanted of the same shape.
        dimensions: wanted number of spatial axes.
        inputs: wanted number of channels.
        multiple: what every spatial size must be a multiple of.
        weight: one of the network's, whose dtype and device the images must have.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"network: wanted weights in float32 or float64 (autocast lowers the precision where "
            f"that is safe), got {weight.dtype}"
        )
    for name, image in (("moving", moving), ("fixed", fixed)):
        check_image(image, name)
        if image.ndim - 2 != dimensions or image.shape[1] != inputs:
            raise ValueError(
                f"{name}: wanted (B, {inputs}, *S) with {dimensions} spatial axes, "
                f"got {tuple(image.shape)}"
            )
        if any(n % multiple for n in image.shape[2:]):
            raise ValueError(
                f"{name}: wanted sizes that are multiples of {multiple} (reglib.register pads), "
                f"got {tuple(image.shape[2:])}"
            )
        if image.device != weight.device:
            raise ValueError(f"{name}: wanted it on {weight.device}, got {image.device}")
        if image.dtype != weight.dtype and not torch.is_autocast_enabled(image.device.type):
            raise TypeError(f"{name}: wanted {weight.dtype} like the weights, got {image.dtype}")
        check_finite(image, name)
    check_same_shape(moving, fixed, ("moving", "fixed"))


def objective(
    output: Output,
    moving: Tensor,
    fixed: Tensor,
    *extras: Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor] = lncc,
    regularity: Callable[[Tensor], Tensor] = diffusion,
    regularity_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The loss of fine-tuning: ``similarity + lambda regularity`` of the field.

    Args:
        output: of the network.
        moving: ``(B, C, *S)``.
        fixed: ``(B, C, *S)``.
        extras: whatever else the stream of pairs holds; not used.
        similarity: dissimilarity of warped and fixed image.
        regularity: roughness of a field, in voxels.
        regularity_weight: lambda.

    Returns:
        Terms ``"similarity"`` and ``"regularity"``.
    """
    return {
        "similarity": similarity(warp(moving, output.field), fixed),
        "regularity": regularity_weight * regularity(output.field),
    }


# --- Files ------------------------------------------------------------------------------------


def save(module: TransMorph | Encoder, path: str | Path, *, card: Mapping[str, object]) -> None:
    """Write weights and settings of a network, or of an encoder alone, as one safetensors file.

    A copy in half precision (``copy.deepcopy(encoder).half()``) makes a file of half the size;
    whoever reads it computes in single precision again.

    Args:
        module: the network or the encoder.
        path: file to write; an existing one is replaced, and never half-written.
        card: what users of the weights must know (data, intensity range, training), JSON values;
            ``method`` and ``settings`` are added, and ``input`` if it is missing.

    Raises:
        OSError: if the file cannot be written.
    """
    own = {"method": _method(type(module)), "settings": asdict(module.settings)}
    known = module.card if isinstance(module, TransMorph) else {}
    given = {"input": input_contract(module.settings)} | known | dict(card)
    save_weights(module, path, given | own)


def load(path: str | Path, *, checkpointing: bool = False) -> TransMorph:
    """Read a network written by ``save``.

    Args:
        path: a safetensors file.
        checkpointing: as in ``TransMorph``.

    Returns:
        The network in evaluation mode and single precision, on the CPU; its ``card`` is everything
        the file says.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file, or does not hold such a network.
    """
    network, card = _load(path, TransMorph, checkpointing)
    network.card = card
    return network


def load_encoder(path: str | Path, *, checkpointing: bool = False) -> Encoder:
    """Read an encoder written by ``save``. Arguments, result and errors as ``load``."""
    return _load(path, Encoder, checkpointing)[0]


def _method(kind: type[nn.Module]) -> str:
    return "transmorph" if kind is TransMorph else "transmorph encoder"


_M = TypeVar("_M", TransMorph, Encoder)


def _load(path: str | Path, kind: type[_M], checkpointing: bool) -> tuple[_M, dict[str, Any]]:
    state, card = load_weights(path)
    if card.get("method") != _method(kind):
        raise ValueError(
            f"path: wanted weights of method {_method(kind)!r}, got {card.get('method')!r} "
            f"in {path}"
        )
    try:
        module = kind(Settings(**card["settings"]), checkpointing=checkpointing)
        module.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path: wanted a TransMorph network, got {path} ({error})") from error
    return module.eval(), card
