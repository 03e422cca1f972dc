"""A phantom of layers under speckle, in place of retinal OCT, for georeg_subjects.py.

The scans that GeoReg's paper (arXiv:2412.13294) follows over time are those of PINNACLE, a study of
age-related macular degeneration whose data are given out on application only (Sutton et al., Eye
2023, doi:10.1038/s41433-022-02097-0). This is no retina, and no figure about it is one about
retinas. It has what makes those scans hard: bands that are thin beside the motion, a large shift
along depth as the head moves, speckle that has nothing to do between two scans, and layers that
have become thinner in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.synth import perlin_noise

#: Depth, the first axis, and width, in pixels.
SHAPE = (128, 96)
#: Names of the layers, their thickness in pixels and how bright they are, from 0 to 1. Above all of
#: them it is dark, below the last it is dim, and dimmer with depth.
LAYERS: dict[str, tuple[float, float]] = {
    "nerve fibres": (7.0, 0.75),
    "ganglion cells": (9.0, 0.5),
    "inner nuclear": (7.0, 0.3),
    "outer plexiform": (5.0, 0.45),
    "outer nuclear": (10.0, 0.2),
    "photoreceptors": (6.0, 0.85),
    "pigment epithelium": (5.0, 1.0),
}
ABOVE, BELOW = 0.04, 0.5
#: Where the first boundary lies, and the most that it is off, pixels of depth.
TOP, WAVES = 42.0, 4.0
#: The most that thickness varies along a layer, as a share.
UNEVEN = 0.25
#: Between two scans, at most: shift and rise along depth in pixels, and the share of its thickness
#: that a layer loses; each is uniform below that.
SHIFT, RISE, THINNING = 25.0, 8.0, 0.5
#: Independent looks that speckle is averaged over.
LOOKS = 4


class Scans(NamedTuple):
    """Pairs ``(B, 1, 128, 96)``; labels number the layers from 1; ``field``: ``(B, 2, 128, 96)``.

    ``field`` is the truth, fixed to moving, in pixels; it has no second component.
    """

    moving: Tensor
    fixed: Tensor
    moving_labels: Tensor
    fixed_labels: Tensor
    field: Tensor


def piecewise(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Linear between knots and constant beyond them.

    Args:
        x: places ``(..., N)``.
        knots: ascending, ``(..., K)``.
        values: at the knots, ``(..., K)``.

    Returns:
        Of the shape of ``x``.
    """
    last = knots.shape[-1] - 1
    place = torch.searchsorted(knots.contiguous(), x.contiguous()).clamp(1, last)
    low, high = (knots.gather(-1, place - k) for k in (1, 0))
    share = ((x - low) / (high - low)).clamp(0, 1)
    below, above = (values.gather(-1, place - k) for k in (1, 0))
    return below + share * (above - below)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Between -1 and 1."""
    return 2 * torch.rand(*shape, generator=generator, device=generator.device) - 1


def _waves(count: int, generator: torch.Generator) -> Tensor:
    """So many smooth curves across the width, within [-1, 1]: ``(count, 96)``."""
    noise = perlin_noise((32, SHAPE[1]), cell=32.0, batch=count, generator=generator)
    curves = noise[:, 0, 16]  # halfway between nodes, where it is 0
    return curves / curves.abs().amax(1, keepdim=True).clamp_min(1e-6)


def _picture(edges: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A scan and its labels ``(B, 1, 128, 96)``, of boundaries ``(B, 96, 8)``."""
    b, device = len(edges), edges.device
    depth = torch.arange(SHAPE[0], dtype=edges.dtype, device=device).expand(b, SHAPE[1], -1)
    band = torch.searchsorted(edges.contiguous(), depth.contiguous(), right=True)
    bright = [ABOVE, *(value for _, value in LAYERS.values()), BELOW]
    mean = torch.tensor(bright, device=device)[band]
    under = (depth - edges[..., -1:]).clamp_min(0)
    mean = mean * (-under / 20).exp()
    # A mean of exponentials: the sum of LOOKS of them is Gamma distributed.
    looks = torch.rand(LOOKS, *mean.shape, generator=generator, device=device)
    speckle = -looks.clamp_min(1e-7).log().mean(0)
    scan = (mean * speckle).sqrt().clamp(0, 1.5) / 1.5
    labels = torch.where(band <= len(LAYERS), band, torch.zeros_like(band))
    return scan.mT.unsqueeze(1), labels.mT.unsqueeze(1)


def scans(count: int, generator: torch.Generator) -> Scans:
    """So many random pairs, on the device of the generator.

    A boundary of the fixed scan lies where that of the moving one lies once shift, rise and
    thinning are undone; between boundaries the truth is linear in depth.
    """
    device, number = generator.device, len(LAYERS)
    thickness = torch.tensor([t for t, _ in LAYERS.values()], device=device)
    waves = _waves(count * (1 + number), generator).view(count, 1 + number, SHAPE[1]).mT
    before = thickness * (1 + UNEVEN * waves[..., 1:])  # (B, 96, 7)
    top = TOP + WAVES * waves[..., :1]
    lost = THINNING * torch.rand(count, 1, number, generator=generator, device=device)
    across = torch.linspace(-0.5, 0.5, SHAPE[1], device=device).view(1, -1, 1)
    shift = SHIFT * _uniform((count, 1, 1), generator)
    moved = shift + RISE * _uniform((count, 1, 1), generator) * across
    moving_edges = torch.cat([top, top + before.cumsum(-1)], -1)
    after = before * (1 - lost)
    fixed_edges = top + moved + torch.cat([torch.zeros_like(top), after.cumsum(-1)], -1)
    depth = torch.arange(SHAPE[0], dtype=top.dtype, device=device).expand(count, SHAPE[1], -1)
    along = piecewise(depth, fixed_edges, moving_edges - fixed_edges).mT.unsqueeze(1)
    (moving, moving_labels), (fixed, fixed_labels) = (
        _picture(edges, generator) for edges in (moving_edges, fixed_edges)
    )
    field = torch.cat([along, torch.zeros_like(along)], 1)
    return Scans(moving, fixed, moving_labels, fixed_labels, field)
