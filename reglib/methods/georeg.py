"""GeoReg: registration as a geometric learning task on feature points that move in space.

Sideri-Lampretsa et al., "Interpretable deformable image registration: a geometric deep learning
perspective", arXiv:2412.13294. Equation numbers below are the paper's.

Each image becomes a pyramid of feature points by an encoder that never sees the other image. From
coarse to fine, every point of the fixed grid looks at the moving features around phi(x) by an
attention that knows their relative positions, and moves on. Between levels only displacements
travel. Written for 2-D and 3-D alike. Where it departs from the paper (P) or its released code (C):

- Queries sit on the *fixed* grid and neighbourhoods are gathered from the *moving* features, so
  that features and field mean the same thing (P and C say it the other way round, while their
  loss samples the moving image as we do).
- Of the fixed image a point sees its own feature only, whose receptive field the encoder makes.
  Options of C, off by default as in most of its configurations: a second attention, over the fixed
  neighbours, and a coarsest level where every point sees all of both images.
- Neither normalises features, nor lets attention start as their comparison: options of ours, off by
  default.
- After the attention come a skip connection, two LayerNorms and a small MLP before the head, as
  in C; the equations of P end with the head.
- The query is the encoder's feature at every level (P); C carries features from coarse to fine.
- The similarity compares images pooled to each level (P); C samples the full moving image.
- Relative positions are in voxels of the level, so a network does not depend on the image size,
  and are clamped to the size of the neighbourhood. Told the voxel spacing, they and what is
  predicted from them are in millimetres, ``2**level`` of them at each level.
- What a level inherits are displacements, extrapolated linearly at the border.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reglib.checks import (
    check_choice,
    check_finite,
    check_image,
    check_numbers,
    check_positive_int,
    check_same_shape,
    check_spacing,
)
from reglib.geometry.fields import upsample_field
from reglib.geometry.grid import identity_grid, sample
from reglib.geometry.sampling import transform_grid, warp
from reglib.geometry.smoothing import pool, pyramid
from reglib.methods.neighbours import Neighbours, attend, offsets, part_rows
from reglib.objectives.regularity import bending
from reglib.objectives.similarity import ncc
from reglib.weights import load_weights, save_weights

#: With checkpointing the points of a level are done in so many parts, or fewer.
PARTS = 16

#: With checkpointing images are encoded one by one at levels of so many numbers or more. Smaller
#: ones are not, as PyTorch convolves one small volume more slowly than two on a CPU.
ALONE = 2**20

#: Names of the networks that travel with the package, and where they lie, relative to this folder.
#: ``data_scripts/georeg_mnist.py``, ``georeg_synthetic.py`` and ``georeg_volumes.py`` trained them.
PRETRAINED = ("mnist", "brain_slices", "brain_volumes")
WEIGHTS = "weights/georeg_{}.safetensors"


class Stage(NamedTuple):
    """One intermediate transformation, in voxels of its own level."""

    level: int  #: 0 is the finest; a level is pooled by ``2**level``
    iteration: int  #: 0 for the interpolated field a level starts from, then 1, 2, ...
    field: Tensor  #: displacement ``(B, D, *S_level)``

    @property
    def name(self) -> str:
        """What figures call it, such as ``"level 1, refined 2"``."""
        step = f"refined {self.iteration}" if self.iteration else "interpolated"
        return f"level {self.level}, {step}"


class Output(NamedTuple):
    """What GeoReg returns: the final field, and every field on the way to it in order."""

    field: Tensor  #: displacement ``(B, D, *S)`` on the fixed grid, in voxels
    stages: tuple[Stage, ...]


def _again(function: Callable[..., Any], *inputs: Any) -> Any:
    """The result of ``function``, of which only the inputs are kept for the backward pass."""
    # Nothing here is random.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _double_conv(dimensions: int, inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
    hidden = max(inputs, outputs)
    return nn.Sequential(
        conv(inputs, hidden, 3, padding=1),
        nn.ReLU(inplace=True),
        conv(hidden, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Encoder(nn.Module):
    """Feature pyramid of one image: two double convolutions a level, the second residual.

    With ``normalise`` every map of a level has mean 0 and deviation 1, each image by itself, times
    and plus numbers that are learned, when it enters the second.
    """

    def __init__(
        self, dimensions: int, inputs: int, channels: Sequence[int], *, normalise: bool = False
    ) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList(), nn.ModuleList()
        for outputs in channels:
            self.first.append(_double_conv(dimensions, inputs, outputs))
            self.second.append(_double_conv(dimensions, outputs, outputs))
            inputs = outputs
        norm = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
        self.norms = nn.ModuleList(
            norm(outputs, affine=True) if normalise else nn.Identity() for outputs in channels
        )
        self.dimensions, self.channels = dimensions, tuple(channels)
        self.checkpointing = False

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, C, *S)`` -> features ``(B, channels[l], *S_l)``, finest first."""
        features: list[Tensor] = []
        for level in range(len(self.first)):
            x = features[-1] if features else image
            if not (self.checkpointing and torch.is_grad_enabled()):
                features.append(self._level(level, x))
                continue
            # Large images one by one, so that the backward pass holds what one of them needs.
            numbers = x[0, 0].numel() * self.channels[level] // (2**self.dimensions if level else 1)
            images = torch.split(x, 1 if numbers >= ALONE else len(x))
            features.append(torch.cat([_again(self._level, level, one) for one in images]))
        return features

    def _level(self, level: int, x: Tensor) -> Tensor:
        x = self.norms[level](self.first[level](pool(x, 2) if level else x))
        return x + self.second[level](x)


class FourierFeatures(nn.Module):
    """gamma(r) = [sin 2 pi r B, cos 2 pi r B] with a fixed random matrix B.

    Tancik et al., NeurIPS 2020, arXiv:2006.10739.
    """

    frequencies: Tensor

    def __init__(self, dimensions: int, channels: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(dimensions, channels // 2))

    def forward(self, r: Tensor) -> Tensor:
        """Relative positions ``(..., D)`` in voxels of the level -> ``(..., channels)``."""
        # No matrix product: autocast would round the coordinates to half precision.
        angle = sum(r[..., axis, None] * f for axis, f in enumerate(2 * math.pi * self.frequencies))
        return torch.cat([torch.sin(angle), torch.cos(angle)], -1)


def _head(dimensions: int, channels: int, activation: nn.Module) -> nn.Sequential:
    """From features to a displacement, which starts near 0."""
    displacement = nn.Linear(2 * channels, dimensions, bias=False)
    nn.init.xavier_uniform_(displacement.weight, gain=0.01)
    return nn.Sequential(nn.Linear(channels, 2 * channels), activation, displacement)


class NeighbourAttention(nn.Module):
    """Position-aware cross-attention and the head that turns it into a displacement (4 to 7).

    q_i = W_Q f_i, k_ij = W_K (f_j + gamma(r_ij)), v_ij = W_V (f_j + gamma(r_ij)),
    d_i = head(sum_j softmax_j(q_i . k_ij / sqrt(C)) v_ij). Keys and values are never formed per
    neighbour: q . W_K x = (W_K^T q) . x, and the sum over j goes before W_V. What is summed over j
    is :func:`reglib.methods.neighbours.attend`, which keeps nothing per neighbour either;
    :meth:`plain` is the same written out, and gives the weights. Without ``moves`` there is no
    head, and what comes out are features. With ``matching`` above 0, W_Q and W_V start as the
    identity and W_K as so many times the identity: the weights start as a comparison of features,
    the more alike, the larger.
    """

    def __init__(
        self,
        dimensions: int,
        channels: int,
        fourier_scale: float,
        *,
        moves: bool = True,
        matching: float = 0.0,
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.position = FourierFeatures(dimensions, channels, fourier_scale)
        self.query = nn.Linear(channels, channels)
        # A key bias would add the same number to every logit of a point: it has no effect.
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.norm_attention = nn.LayerNorm(channels)
        self.mix = nn.Sequential(
            nn.Linear(channels, 2 * channels),
            nn.ReLU(inplace=True),
            nn.Linear(2 * channels, channels),
        )
        self.norm_mix = nn.LayerNorm(channels)
        self.head: nn.Module = nn.Identity()
        if moves:
            self.head = _head(dimensions, channels, nn.ReLU(inplace=True))
        if matching > 0:
            for layer in (self.query, self.key, self.value):
                nn.init.eye_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            with torch.no_grad():
                self.key.weight.mul_(matching)

    def forward(
        self, points: Tensor, neighbours: Neighbours, spacing: Tensor | None = None
    ) -> Tensor:
        """Displacements ``(B, P, D)`` of points with features ``(B, P, C)``.

        ``spacing`` ``(D,)`` is the length of a voxel along each axis, and displacements are in its
        unit; ``None`` is 1 everywhere.
        """
        frequencies = self.position.frequencies
        if spacing is not None:
            # gamma of a position in millimetres; the positions themselves stay in voxels.
            frequencies = spacing.unsqueeze(1) * frequencies

        def look(points: Tensor, place: Tensor, centre: Tensor) -> Tensor:
            around = neighbours._replace(place=place, centre=centre)
            attended = attend(self._asked(points), around, frequencies)
            return self.move(points, self.value(attended))

        inputs = points, neighbours.place, neighbours.centre
        if not (self.checkpointing and torch.is_grad_enabled()):
            return look(*inputs)
        # Each part adds up a gradient of all that is looked at: not too many of them.
        rows = max(part_rows(points.device, 2 * points.shape[-1]), -(-points.shape[1] // PARTS))
        parts = zip(*(torch.split(x, rows, 1) for x in inputs), strict=True)
        return torch.cat([_again(look, *part) for part in parts], 1)

    def _asked(self, points: Tensor) -> Tensor:
        return self.query(points) @ self.key.weight / math.sqrt(points.shape[-1])

    def plain(
        self, points: Tensor, neighbours: Tensor, relative: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention weights ``(B, P, K)`` and the attended values ``(B, P, C)``.

        Args:
            points: features of the asking points ``(B, P, C)``.
            neighbours: features of their neighbours ``(B, P, K, C)``.
            relative: positions of the neighbours relative to the points ``(B, P, K, D)``.
            inside: ``(B, P, K)``, False for neighbours beyond the border, which get weight 0.
        """
        x = neighbours + self.position(relative)
        # Products and sums: a batched matrix product of such small blocks takes twice the time.
        logits = (x * self._asked(points).unsqueeze(-2)).sum(-1)
        weights = logits.masked_fill(~inside, -math.inf).softmax(-1)
        return weights, self.value((weights.unsqueeze(-1) * x).sum(-2))

    def move(self, points: Tensor, attended: Tensor) -> Tensor:
        """Displacements ``(B, P, D)``, of the points and what they attended to.

        Features ``(B, P, C)`` where there is no head.
        """
        h = self.norm_attention(points + attended)
        return self.head(self.norm_mix(h + self.mix(h)))


def _points(grid: Tensor) -> Tensor:
    """``(B, C, *S)`` -> ``(B, P, C)``."""
    return grid.flatten(2).transpose(1, 2)


def _grid(points: Tensor, shape: Sequence[int]) -> Tensor:
    """``(B, P, C)`` -> ``(B, C, *S)``."""
    return points.transpose(1, 2).reshape(points.shape[0], points.shape[2], *shape)


def _in_voxels(step: Tensor, spacing: Tensor | None) -> Tensor:
    return step if spacing is None else step / spacing


class Refinement(nn.Module):
    """tau: moves every point of the fixed grid by what it sees around phi(x) (2, 4 to 7).

    With ``warp_features`` the moving features are resampled to a grid around phi(x) instead of
    being looked at where they are: what the paper argues against, for comparison.
    """

    def __init__(
        self,
        dimensions: int,
        channels: int,
        size: int,
        fourier_scale: float,
        *,
        warp_features: bool = False,
        matching: float = 0.0,
    ) -> None:
        super().__init__()
        self.size, self.warp_features = size, warp_features
        self.attention = NeighbourAttention(dimensions, channels, fourier_scale, matching=matching)

    def resampled(self, moving: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The moving features on a grid around each point: features, relative positions, inside."""
        steps = offsets(self.size, centre.shape[-1], centre)
        relative = steps.expand(*centre.shape[:2], *steps.shape)
        place = (centre.unsqueeze(-2) + steps).movedim(-1, 1)
        place = place.reshape(*place.shape, *(1,) * (moving.ndim - place.ndim))
        seen = sample(moving, place).flatten(3).movedim(1, -1)
        return seen, relative, torch.ones_like(relative[..., 0], dtype=torch.bool)

    def forward(
        self, moving: Tensor, fixed: Tensor, field: Tensor, spacing: Tensor | None = None
    ) -> Tensor:
        """Features ``(B, C, *S_l)`` of both images and the field so far -> the next field.

        Fields are in voxels whatever the ``spacing`` ``(D,)``, the length of a voxel.
        """
        points, shape, centre = _points(fixed), field.shape[2:], _points(transform_grid(field))
        if self.warp_features:
            seen, relative, inside = self.resampled(moving, centre)
            relative = relative if spacing is None else relative * spacing
            _, attended = self.attention.plain(points, seen, relative, inside)
            step = self.attention.move(points, attended)
        else:
            # A point that has left the image looks at the border; how far it is says the position,
            # kept within a range that training reaches.
            reach = float(self.size)
            around = Neighbours(_points(moving), shape, centre, centre, self.size, reach=reach)
            step = self.attention(points, around, spacing)
        return field + _grid(_in_voxels(step, spacing), shape)


class Siblings(nn.Module):
    """What a point of the fixed image sees around itself in its own image, before it looks across.

    The attention of tau, with queries, keys and values from one image (an option of the released
    code; appendix 6 of the paper: one operation on each image instead of one on both).
    """

    def __init__(self, dimensions: int, channels: int, size: int, fourier_scale: float) -> None:
        super().__init__()
        self.size = size
        self.attention = NeighbourAttention(dimensions, channels, fourier_scale, moves=False)

    def forward(self, fixed: Tensor, spacing: Tensor | None = None) -> Tensor:
        """Features ``(B, C, *S_l)`` of the fixed image -> features that know their neighbours."""
        points, shape = _points(fixed), fixed.shape[2:]
        dtype = torch.promote_types(fixed.dtype, torch.float32)
        place = _points(identity_grid(shape, dtype=dtype, device=fixed.device))
        place = place.expand(len(fixed), -1, -1)
        around = Neighbours(points, shape, place, place, self.size)
        return _grid(self.attention(points, around, spacing), shape)


class Bottleneck(nn.Module):
    """tau where every point sees all of both images, for the coarsest level (an option of C).

    A transformer decoder: attention among the fixed points, then to all moving nodes, each with
    gamma of its place relative to the middle of the image added; no gradient flows to the places.
    The middle makes it depend on where in the image things are, unlike ``Refinement``.
    """

    def __init__(self, dimensions: int, channels: int, fourier_scale: float) -> None:
        super().__init__()
        self.position = FourierFeatures(dimensions, channels, fourier_scale)
        self.decoder = nn.TransformerDecoderLayer(
            channels, 1, 2 * channels, dropout=0.0, batch_first=True
        )
        self.head = _head(dimensions, channels, nn.LeakyReLU(0.1))

    def forward(
        self, moving: Tensor, fixed: Tensor, field: Tensor, spacing: Tensor | None = None
    ) -> Tensor:
        """Features ``(B, C, *S_l)`` of both images and the field so far -> the next field."""
        shape = field.shape[2:]
        rest = _points(identity_grid(shape, dtype=field.dtype, device=field.device))
        # The middle of opposite corners.
        from_middle = rest - rest[:, [0, -1]].mean(1, keepdim=True)
        moved = from_middle + _points(field.detach())
        if spacing is not None:
            from_middle, moved = from_middle * spacing, moved * spacing
        points = _points(fixed) + self.position(moved)
        nodes = _points(moving) + self.position(from_middle)
        step = self.head(self.decoder(points, nodes))
        return field + _grid(_in_voxels(step, spacing), shape)


class Interpolation(nn.Module):
    """delta: the field of a coarse level on the next finer grid, corrected by attention.

    Inherits the displacement by linear interpolation; then each child attends to the parents
    around it, embedded by where they have moved relative to it, and corrects what it inherited.
    Sharp boundaries can so be kept where a linear rule would blur them.
    """

    def __init__(
        self, dimensions: int, parents: int, children: int, size: int, fourier_scale: float
    ) -> None:
        super().__init__()
        self.size = size
        self.match = nn.Linear(parents, children)
        self.attention = NeighbourAttention(dimensions, children, fourier_scale)

    def forward(
        self, children: Tensor, parents: Tensor, field: Tensor, spacing: Tensor | None = None
    ) -> Tensor:
        """Features of the fixed image at both levels and the coarse field -> the fine field."""
        shape, coarse = children.shape[2:], field.shape[2:]
        inherited = upsample_field(field, 2, shape)
        rest = identity_grid(shape, dtype=field.dtype, device=field.device)
        # Positions in voxels of the coarse level: child i sits at (i - 1/2) / 2.
        child = _points((rest - 0.5) / 2).expand(field.shape[0], -1, -1)
        seen = Neighbours(
            self.match(_points(parents)),
            coarse,
            place=child,
            centre=child + _points(inherited) / 2,
            size=self.size,
            shift=_points(field),
        )
        step = self.attention(_points(children), seen, spacing)
        return inherited + _grid(_in_voxels(step, spacing), shape)


def _counts(values: Sequence[int], name: str, length: int | None) -> Sequence[int]:
    """Raise unless ``values`` are ``length`` integers of at least 0 (``None``: one or more)."""
    if not isinstance(values, Sequence) or not all(isinstance(v, Integral) for v in values):
        raise TypeError(f"{name}: wanted integers, one per level, got {values!r}")
    if not values or (length is not None and len(values) != length) or min(values) < 0:
        wanted = "one or more" if length is None else length
        raise ValueError(f"{name}: wanted {wanted} integers of at least 0, got {values!r}")
    return values


#: Settings by name. ``digits`` is the demonstration on MNIST; ``brains 2-D`` and ``brains 3-D`` are
#: the six levels of the paper, with the neighbourhoods of its released code and, in 3-D, the
#: paper's "4 iterations on the two coarsest".
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"dimensions": 2, "channels": (16, 32, 64)},
    "brains 2-D": {
        "dimensions": 2,
        "channels": (16, 32, 32, 64, 64, 128),
        "neighbourhoods": (2, 2, 3, 3, 5, 5),
        "iterations": (1, 1, 1, 1, 1, 1),
        "interpolation": (2, 3, 3, 5, 5),
    },
    "brains 3-D": {
        "dimensions": 3,
        "channels": (16, 32, 32, 64, 64, 128),
        "neighbourhoods": (2, 2, 3, 3, 5, 5),
        "iterations": (1, 1, 1, 2, 4, 4),
        "interpolation": (2, 3, 3, 5, 5),
    },
}


class GeoReg(nn.Module):
    """Coarse-to-fine registration network on continuous coordinates.

    Args:
        dimensions: 2 or 3 spatial axes.
        inputs: channels of each image.
        channels: of the encoder, finest level first; their number is the number of levels. Even.
        neighbourhoods: nodes along each axis that a point looks at, finest level first; 0 skips
            the refinement of a level (interpolation only), which the coarsest cannot do.
        iterations: refinements of each level with shared weights, finest level first; 0 where
            the neighbourhood is 0.
        interpolation: parents along each axis for the learned interpolation, one number or one per
            level but the coarsest, finest first; 0 makes it linear.
        fourier_scale: standard deviation of the Fourier frequencies, in cycles per voxel (per
            millimetre at the finest level where a spacing is given).
        warp_features: resample the moving features at phi(x) instead of attending to them where
            they are (for the ablation).
        siblings: nodes along each axis of its own image that a point looks at before it looks into
            the moving one, one number or one per level, finest first; 0 looks at none.
        bottleneck: let every point of the coarsest level see all of both images, in place of the
            neighbourhood there. Memory and time grow with the square of their number.
        normalise: bring every feature map to mean 0 and deviation 1 (InstanceNorm) on its way
            through its level. Without it what an image shows dies away on the way to the coarse
            levels of many, which then start, and for long remain, blind.
        matching: how sharply the attention of the refinements starts to compare the features of
            both images, which the encoder makes alike; 0 starts with random weights.
        spacing: mm per voxel of the images, axis order, for relative positions and predicted
            displacements in mm; ``None`` counts in voxels. What ``forward`` takes by default.
        checkpointing: keep only the features and fields of each level, and compute the rest again
            in the backward pass: the same to rounding in less memory and more time. It may be set
            and unset later. See also :func:`objective`.

    Raises:
        TypeError, ValueError: if the settings do not fit together.
    """

    def __init__(
        self,
        *,
        dimensions: int = 2,
        inputs: int = 1,
        channels: Sequence[int] = (16, 32, 64),
        neighbourhoods: Sequence[int] = (3, 3, 3),
        iterations: Sequence[int] = (1, 2, 2),
        interpolation: int | Sequence[int] = 2,
        fourier_scale: float = 0.15,
        warp_features: bool = False,
        siblings: int | Sequence[int] = 0,
        bottleneck: bool = False,
        normalise: bool = False,
        matching: float = 0.0,
        spacing: Sequence[float] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if dimensions not in (2, 3):
            raise ValueError(f"dimensions: wanted 2 or 3, got {dimensions!r}")
        check_positive_int(inputs, "inputs")
        levels = len(_counts(channels, "channels", None))
        if any(c < 2 or c % 2 for c in channels):
            raise ValueError(f"channels: wanted even numbers, one per level, got {channels!r}")
        _counts(neighbourhoods, "neighbourhoods", levels)
        _counts(iterations, "iterations", levels)
        if isinstance(interpolation, Sequence):
            parents = list(_counts(interpolation, "interpolation", levels - 1))
        else:
            parents = list(_counts([interpolation], "interpolation", 1)) * (levels - 1)
        if neighbourhoods[-1] == 0 or any(
            (i == 0) != (k == 0) for i, k in zip(iterations, neighbourhoods, strict=True)
        ):
            raise ValueError(
                "neighbourhoods, iterations: wanted both 0 where a level is not refined, neither "
                f"elsewhere, and the coarsest refined, got {neighbourhoods!r} and {iterations!r}"
            )
        if not 0 < fourier_scale < math.inf:
            raise ValueError(f"fourier_scale: wanted a positive number, got {fourier_scale!r}")
        if isinstance(siblings, Sequence):
            around = list(_counts(siblings, "siblings", levels))
        else:
            [size] = _counts([siblings], "siblings", 1)
            around = [size if k else 0 for k in neighbourhoods]
        if any(s and not k for s, k in zip(around, neighbourhoods, strict=True)):
            raise ValueError(
                f"siblings: wanted 0 where a level is not refined, got {siblings!r} with "
                f"neighbourhoods {neighbourhoods!r}"
            )
        for name, on in {"bottleneck": bottleneck, "normalise": normalise}.items():
            if not isinstance(on, bool):
                raise TypeError(f"{name}: wanted True or False, got {on!r}")
        [sharpness] = check_numbers([matching], "matching")
        if not 0 <= sharpness < math.inf:
            raise ValueError(f"matching: wanted a number of at least 0, got {matching!r}")
        #: mm per voxel of the images, or ``None``.
        self.spacing = None if spacing is None else check_spacing(spacing, dimensions)
        #: What a file of weights says about them; empty for a new network.
        self.card: dict[str, Any] = {}
        #: The arguments, to build the same network again.
        self.settings = {
            "dimensions": dimensions,
            "inputs": inputs,
            "channels": list(channels),
            "neighbourhoods": list(neighbourhoods),
            "iterations": list(iterations),
            "interpolation": parents if isinstance(interpolation, Sequence) else interpolation,
            "fourier_scale": fourier_scale,
            "warp_features": warp_features,
        }
        # Where they are off there is no trace of them, as in files from before they existed.
        if any(around):
            self.settings["siblings"] = around
        if bottleneck:
            self.settings["bottleneck"] = True
        if normalise:
            self.settings["normalise"] = True
        if sharpness:
            self.settings["matching"] = sharpness
        if self.spacing is not None:
            self.settings["spacing"] = list(self.spacing)
        self.dimensions, self.inputs, self.iterations = dimensions, inputs, tuple(iterations)
        self.encoder = Encoder(dimensions, inputs, channels, normalise=normalise)
        self.refinements = nn.ModuleList(
            Refinement(
                dimensions, c, k, fourier_scale, warp_features=warp_features, matching=sharpness
            )
            if k
            else nn.Identity()
            for c, k in zip(channels, neighbourhoods, strict=True)
        )
        if bottleneck:
            self.refinements[-1] = Bottleneck(dimensions, channels[-1], fourier_scale)
        self.interpolations = nn.ModuleList(
            Interpolation(dimensions, coarse, fine, k, fourier_scale) if k else nn.Identity()
            for (fine, coarse), k in zip(itertools.pairwise(channels), parents, strict=True)
        )
        self.siblings = nn.ModuleList(
            Siblings(dimensions, c, k, fourier_scale) if k else nn.Identity()
            for c, k in zip(channels, around, strict=True)
        )
        self.checkpointing = checkpointing

    @property
    def checkpointing(self) -> bool:
        """Whether the backward pass computes again what the forward pass has not kept."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Encoder | NeighbourAttention):
                module.checkpointing = on

    @property
    def size_multiple(self) -> int:
        """Every spatial size must be a multiple of this."""
        return 2 ** (len(self.refinements) - 1)

    def check(self, image: Tensor, name: str) -> None:
        """Raise unless the network can take ``image`` ``(B, inputs, *S)``."""
        check_image(image, name)
        if image.ndim - 2 != self.dimensions or image.shape[1] != self.inputs:
            raise ValueError(
                f"{name}: wanted (B, {self.inputs}, *S) with {self.dimensions} spatial axes, "
                f"got {tuple(image.shape)}"
            )
        if any(n % self.size_multiple for n in image.shape[2:]):
            raise ValueError(
                f"{name}: wanted sizes that are multiples of {self.size_multiple}, "
                f"got {tuple(image.shape[2:])}"
            )
        weight = next(self.parameters())
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"network: wanted weights in float32 or float64 (autocast lowers the precision "
                f"where that is safe), got {weight.dtype}"
            )
        if image.device != weight.device:
            raise ValueError(f"{name}: wanted it on {weight.device}, got {image.device}")
        if image.dtype != weight.dtype and not torch.is_autocast_enabled(image.device.type):
            raise TypeError(f"{name}: wanted {weight.dtype} like the weights, got {image.dtype}")
        check_finite(image, name)

    def forward(
        self, moving: Tensor, fixed: Tensor, *, spacing: Sequence[float] | None = None
    ) -> Output:
        """Register each moving image to its fixed one.

        Args:
            moving: ``(B, inputs, *S)``, floating point, sizes multiples of ``size_multiple``.
            fixed: of the same shape.
            spacing: mm per voxel of both, axis order; ``None`` takes the one of the settings. For a
                network that was trained with it: one that has learned to count in voxels does so
                on any grid, and finds less when it is told lengths it has never seen.

        Returns:
            The field on the fixed grid, and every intermediate field by level and iteration, all of
            them in voxels.

        Raises:
            TypeError, ValueError: if an image is not what the network can take, or ``spacing`` not
                one positive number per axis.
        """
        self.check(moving, "moving")
        self.check(fixed, "fixed")
        check_same_shape(moving, fixed, ("moving", "fixed"))
        both = self.encoder(torch.cat([moving, fixed]))
        features = [level.chunk(2) for level in both]  # (moving, fixed), finest first
        coarsest = features[-1][1]
        # Coordinates never fall below single precision, whatever the images and autocast say.
        field = torch.zeros(
            (len(coarsest), self.dimensions, *coarsest.shape[2:]),
            dtype=torch.promote_types(moving.dtype, torch.float32),
            device=coarsest.device,
        )
        unit = self._unit(spacing, field)
        stages: list[Stage] = []
        for level in reversed(range(len(features))):
            moving_features, fixed_features = features[level]
            if level < len(features) - 1:
                delta = self.interpolations[level]
                if isinstance(delta, Interpolation):
                    field = delta(fixed_features, features[level + 1][1], field, unit)
                else:
                    field = upsample_field(field, 2, fixed_features.shape[2:])
                stages.append(Stage(level, 0, field))
            tau, siblings = self.refinements[level], self.siblings[level]
            if isinstance(siblings, Siblings):
                fixed_features = siblings(fixed_features, unit)
            if isinstance(tau, Refinement | Bottleneck):
                for iteration in range(1, self.iterations[level] + 1):
                    field = tau(moving_features, fixed_features, field, unit)
                    stages.append(Stage(level, iteration, field))
        return Output(field, tuple(stages))

    def _unit(self, spacing: Sequence[float] | None, like: Tensor) -> Tensor | None:
        """The length of a voxel along each axis, at every level in a unit of its own."""
        if spacing is None and self.spacing is None:
            return None
        told = self.spacing if spacing is None else check_spacing(spacing, self.dimensions)
        return torch.tensor(told, dtype=like.dtype, device=like.device)


def _per_level(values: Sequence[float] | float, name: str, levels: int) -> tuple[float, ...]:
    """One number per level, finest first."""
    if isinstance(values, Real):
        return (float(values),) * levels
    numbers = check_numbers(values, name)
    if len(numbers) != levels:
        raise ValueError(f"{name}: wanted one number or {levels}, got {values!r}")
    return numbers


def objective(
    output: Output,
    moving: Tensor,
    fixed: Tensor,
    *,
    similarity: Callable[[Tensor, Tensor], Tensor] = ncc,
    regularity: Callable[[Tensor], Tensor] = bending,
    regularity_weight: Sequence[float] | float = 1.0,
    level_weight: Sequence[float] | float = 1.0,
    deep_supervision: bool = True,
    checkpointing: bool = False,
) -> dict[str, Tensor]:
    """Supervise every iterate of every level and every interpolated field (8 to 10).

    The images are pooled to the level of each field. For anisotropic voxels, give ``regularity``
    their spacing (``functools.partial(bending, spacing=...)``): it then counts, like the network,
    in ``2**level`` mm.

    Args:
        output: what :class:`GeoReg` returned.
        moving: ``(B, C, *S)``.
        fixed: of the same shape.
        similarity: of (warped, fixed) -> scalar, lower is better.
        regularity: of a field in voxels of its level -> scalar.
        regularity_weight: lambda, one for all levels or one per level, finest first.
        level_weight: w_l of equation 10, for both terms, likewise.
        deep_supervision: ``False`` looks at the final field only (the control of the ablation).
        checkpointing: compute each term again in the backward pass: the same in less memory.

    Returns:
        Terms ``"similarity"`` and ``"regularity"``, each summed over the supervised fields.

    Raises:
        TypeError, ValueError: if the weights are neither one number nor one per level.
    """
    levels = max(stage.level for stage in output.stages) + 1
    movings, fixeds = pyramid(moving, levels), pyramid(fixed, levels)
    smoothness = _per_level(regularity_weight, "regularity_weight", levels)
    importance = _per_level(level_weight, "level_weight", levels)
    stages = output.stages if deep_supervision else output.stages[-1:]
    terms: dict[str, list[Tensor]] = {"similarity": [], "regularity": []}

    def look(level: int, field: Tensor) -> tuple[Tensor, Tensor]:
        return similarity(warp(movings[level], field), fixeds[level]), regularity(field)

    for level, _, field in stages:
        if checkpointing and torch.is_grad_enabled():
            # Unlike the network, a similarity of the caller's may be random.
            mismatch, roughness = checkpoint(look, level, field, use_reentrant=False)
        else:
            mismatch, roughness = look(level, field)
        terms["similarity"].append(importance[level] * mismatch)
        terms["regularity"].append(importance[level] * smoothness[level] * roughness)
    return {name: torch.stack(values).sum() for name, values in terms.items()}


def to_full_resolution(stage: Stage, shape: Sequence[int]) -> Tensor:
    """A stage's field, interpolated linearly to the grid of the images: ``(B, D, *S)`` voxels."""
    return upsample_field(stage.field, 2**stage.level, shape)


def save(network: GeoReg, path: str | Path, *, card: Mapping[str, object]) -> None:
    """Write weights and settings as one safetensors file.

    Args:
        network: the network.
        path: file to write; an existing one is replaced, and never half-written.
        card: what users of the weights must know (data, intensity range, training), JSON values;
            ``method`` and ``settings`` are added.

    Raises:
        OSError: if the file cannot be written.
    """
    save_weights(network, path, {**card, "method": "georeg", "settings": network.settings})


def load(path: str | Path, *, checkpointing: bool = False) -> GeoReg:
    """Read a network written by :func:`save`.

    Args:
        path: a safetensors file.
        checkpointing: as in :class:`GeoReg`.

    Returns:
        The network in evaluation mode, on the CPU; its ``card`` is everything the file says.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file, or does not hold a GeoReg network.
    """
    state, card = load_weights(path)
    if card.get("method") != "georeg":
        raise ValueError(
            f"path: wanted weights of method 'georeg', got {card.get('method')!r} in {path}"
        )
    try:
        network = GeoReg(**card["settings"], checkpointing=checkpointing)
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path: wanted a GeoReg network, got {path} ({error})") from error
    network.card = card
    return network.eval()


def load_pretrained(name: str = "mnist") -> GeoReg:
    """A network that travels with the package.

    Args:
        name: ``"mnist"``, trained on handwritten digits of 28 x 28 pixels; ``"brain_slices"``,
            trained on axial T1 slices of 2 mm without skull and large deformations of them; or
            ``"brain_volumes"``, likewise on whole brains, 40 x 48 x 40 voxels of 4 mm around the
            middle of the moving one.

    Returns:
        The network in evaluation mode, on the CPU; its ``card`` is everything that is known of it.

    Raises:
        ValueError: if there is none of that name.
    """
    check_choice(name, "name", PRETRAINED)
    with resources.as_file(resources.files("reglib.methods") / WEIGHTS.format(name)) as path:
        return load(path)
