"""What a point of GeoReg attends to: the weights behind every step that moves it.

A point is moved by what it sees around the place that it has come to. How much each node there
counts is a number that can be drawn: what the paper's title calls interpretable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reglib.checks import check_points
from reglib.methods.georeg import GeoReg, Interpolation, NeighbourAttention, Refinement, Stage
from reglib.methods.neighbours import Neighbours, written_out


class Look(NamedTuple):
    """What points attended to in one step, all positions in voxels of the images.

    Attributes:
        level: 0 is the finest.
        iteration: 0 for the interpolation that a level starts from, then 1, 2, ...
        points: ``(B, N, D)``, the points of the level's fixed grid that are nearest to those asked
            about.
        centre: ``(B, N, D)``, where each of them looked from: where it had been moved to.
        nodes: ``(B, N, K, D)``, what it looked at: nodes of the moving image's grid; in an
            interpolation, points of the coarser fixed grid, where they had been moved to.
        weights: ``(B, N, K)``, how much each counts; they sum to 1, and are 0 beyond the border.
        step: ``(B, N, D)``, how far the point moved in consequence. In an interpolation this comes
            on top of what it inherits from the coarser level.
    """

    level: int
    iteration: int
    points: Tensor
    centre: Tensor
    nodes: Tensor
    weights: Tensor
    step: Tensor

    @property
    def name(self) -> str:
        """As in :class:`reglib.methods.georeg.Stage`."""
        return Stage(self.level, self.iteration, self.points).name


@torch.no_grad()
def attention_of(
    network: GeoReg,
    moving: Tensor,
    fixed: Tensor,
    points: Tensor,
    *,
    spacing: Sequence[float] | None = None,
) -> tuple[Look, ...]:
    """Register a pair, and tell what some points of the fixed image attended to on the way.

    Args:
        network: GeoReg; its linear interpolations and its bottleneck look at no neighbours and are
            left out.
        moving: ``(B, inputs, *S)``, as the network takes them.
        fixed: of the same shape.
        points: ``(B, N, D)``, voxels of the fixed images, or ``(1, N, D)`` for all of them.
        spacing: as in :meth:`reglib.methods.georeg.GeoReg.forward`.

    Returns:
        A look for each interpolation and each refinement, coarsest first.

    Raises:
        TypeError, ValueError: as :meth:`reglib.methods.georeg.GeoReg.forward`, or if ``points``
            are malformed or outside of the image, or the network warps its features: it then sees
            no nodes of the moving image.

    Equations 4 to 7 of Sideri-Lampretsa et al., arXiv:2412.13294.
    """
    network.check(fixed, "fixed")  # the network looks at ``moving`` before it does anything
    check_points(points, "points", network.dimensions)
    if len(points) not in (1, len(fixed)):
        wanted = " or ".join(map(str, sorted({1, len(fixed)})))
        raise ValueError(f"points: wanted a batch of {wanted}, got {len(points)}")
    last = torch.tensor([n - 1 for n in fixed.shape[2:]], device=points.device)
    if not bool(((points >= 0) & (points <= last)).all()):
        raise ValueError(f"points: wanted voxels from 0 to {last.tolist()}, got some outside")
    if any(isinstance(m, Refinement) and m.warp_features for m in network.refinements):
        raise ValueError(
            "network: wanted one that looks at features where they are, got one that warps them"
        )
    found: list[Look] = []
    seen: dict[int, int] = {}
    handles = []

    def note(
        level: int, module: nn.Module, inputs: tuple[Tensor, Neighbours, Tensor | None], out: Tensor
    ) -> None:
        assert isinstance(module, NeighbourAttention)
        iteration = seen.get(level, 0)
        found.append(_look(level, iteration, module, inputs, out, points, fixed.shape[2:]))
        seen[level] = iteration + 1

    for level, refinement in enumerate(network.refinements):
        interpolation = (
            network.interpolations[level] if level < len(network.interpolations) else None
        )
        if not isinstance(interpolation, Interpolation):
            seen[level] = 1  # refinements count from 1
        for one in (interpolation, refinement):
            if isinstance(one, Interpolation | Refinement):
                hook = functools.partial(note, level)
                handles.append(one.attention.register_forward_hook(hook))
    try:
        network(moving, fixed, spacing=spacing)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _look(
    level: int,
    iteration: int,
    module: NeighbourAttention,
    inputs: tuple[Tensor, Neighbours, Tensor | None],
    out: Tensor,
    points: Tensor,
    shape: Sequence[int],
) -> Look:
    """One step's look at ``points`` ``(1 or B, N, D)``, from what its attention was called with."""
    features, around, spacing = inputs
    rows = torch.arange(len(features), device=features.device).unsqueeze(1)
    sizes = [n // 2**level for n in shape]
    last = torch.tensor([n - 1 for n in sizes], device=features.device)
    here = ((points.to(features.device) + 0.5) / 2**level - 0.5).round().long()
    here = here.clamp(min=torch.zeros_like(last), max=last)
    flat = torch.zeros_like(here[..., 0])
    for axis, n in enumerate(sizes):
        flat = flat * n + here[..., axis]

    def at(x: Tensor) -> Tensor:
        return x.expand(len(features), -1, -1)[rows, flat]

    around = around._replace(place=at(around.place), centre=at(around.centre))
    seen = written_out(around, spacing)
    weights, _ = module.plain(at(features), seen.features, seen.relative, seen.inside)
    step = at(out) if spacing is None else at(out) / spacing
    # Interpolations look at the coarser level's grid.
    coarse = level if iteration else level + 1

    def full(x: Tensor, of: int) -> Tensor:
        return (x + 0.5) * 2**of - 0.5

    return Look(
        level,
        iteration,
        full(here.to(around.place), level).expand(len(features), -1, -1),
        full(around.centre, coarse),
        full(seen.nodes, coarse),
        weights,
        step * 2**level,
    )
