"""The drawings of the book's pages, made with the library itself when the book is built.

``draw_all(folder)`` writes one SVG per drawing: ``rule_01.svg`` to ``rule_15.svg`` for the
conventions page and three for the GeoReg page. ``draw_readme(path)`` draws the picture of the
README. From the command line: ``python book/figures.py FOLDER [README_PICTURE]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from reglib import show
from reglib.geometry.fields import compose, downsample_field, integrate, upsample_field
from reglib.geometry.grid import identity_grid, sample, voxel_to_unit
from reglib.geometry.sampling import warp, warp_labels, warp_points
from reglib.geometry.smoothing import gaussian_smooth
from reglib.objectives.similarity import ncc
from reglib.show.plot import FIXED, FOLD, MOVING, STYLE, WARPED

GREY = "0.55"
LIGHT = "0.88"


# ---------------------------------------------------------------- small parts of several drawings


def open_panels(columns: int, width: float = 5.6, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """A figure with a row of axes."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    return figure, list(axes[0])


def voxel_axes(ax: Axes, shape: tuple[int, int]) -> None:
    """Cells of a 2-D grid with their centres; axis 0 downwards, axis 1 to the right."""
    rows, columns = shape
    ax.set(
        xlim=(-0.5, columns - 0.5),
        ylim=(rows - 0.5, -0.5),
        aspect="equal",
        xticks=range(columns),
        yticks=range(rows),
        xlabel="axis 1",
        ylabel="axis 0",
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for edge in np.arange(columns + 1) - 0.5:
        ax.plot([edge, edge], [-0.5, rows - 0.5], color=LIGHT, linewidth=0.8, zorder=0)
    for edge in np.arange(rows + 1) - 0.5:
        ax.plot([-0.5, columns - 0.5], [edge, edge], color=LIGHT, linewidth=0.8, zorder=0)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow between two (axis 0, axis 1) points, at true length."""
    ax.annotate(
        "",
        xy=(end[1], end[0]),
        xytext=(start[1], start[0]),
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 1.8,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=4,
    )


def dot(ax: Axes, at: tuple[float, float], colour: str, size: float = 36) -> None:
    """A dot at an (axis 0, axis 1) point."""
    ax.scatter([at[1]], [at[0]], color=colour, s=size, zorder=5, clip_on=False)


def constant_field(vector: tuple[float, float], shape: tuple[int, int]) -> Tensor:
    """The same displacement everywhere, ``(1, 2, *S)``."""
    return torch.tensor(vector).view(1, 2, 1, 1).expand(1, 2, *shape).contiguous()


def letter() -> Tensor:
    """A soft letter F, ``(1, 1, 40, 40)``: it has no symmetry, so every mistake shows."""
    picture = torch.zeros(1, 1, 40, 40)
    picture[..., 8:32, 12:17] = 1
    picture[..., 8:13, 12:28] = 1
    picture[..., 18:22, 12:25] = 1
    return gaussian_smooth(picture, 0.8)


def smooth_field(shape: tuple[int, int], sigma: float, largest: float, seed: int) -> Tensor:
    """A random smooth displacement, ``(1, 2, *S)``, whose longest component is ``largest``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 2, *shape, generator=generator)
    field = gaussian_smooth(noise, sigma)
    return field * (largest / field.abs().max())


# ------------------------------------------------------------------------------- the fifteen rules


def rule_01() -> Figure:
    """Images are (B, C, *S)."""
    figure, axes = open_panels(2)
    for ax, spatial, title in zip(
        axes, ("H, W", "D, H, W"), ("(B, C, H, W)", "(B, C, D, H, W)"), strict=True
    ):
        deep = spatial.startswith("D")
        for b in range(2):
            for c in range(2):
                x, y = 3.6 * c, 3.4 * b
                for layer in range(3 if deep else 1, 0, -1):
                    shift = 0.32 * (layer - 1)
                    ax.add_patch(
                        Rectangle(
                            (x + shift, y - shift), 2, 2, facecolor="white", edgecolor=FIXED, lw=1.3
                        )
                    )
                ax.text(x + 1, y + 1, spatial, ha="center", va="center", fontsize=10)
        ax.text(2.8, -1.5, "C: channels →", ha="center")
        ax.text(-1.0, 2.7, "B: samples →", ha="center", va="center", rotation=270)
        ax.set(xlim=(-1.6, 6.6), ylim=(5.8, -2.1), aspect="equal", title=title)
        ax.axis("off")
    return figure


def rule_02() -> Figure:
    """Component c belongs to array axis c."""
    figure, (ax,) = open_panels(1, 4.2, 3.2)
    voxel_axes(ax, (5, 7))
    start, vector = (1.0, 1.0), (2.0, 4.0)
    end = (start[0] + vector[0], start[1] + vector[1])
    arrow(ax, start, (end[0], start[1]), GREY)
    arrow(ax, (end[0], start[1]), end, GREY)
    arrow(ax, start, end, MOVING)
    dot(ax, start, FIXED)
    ax.text(1.15, 0.72, "x = (1, 1)", color=FIXED)
    ax.text(0.88, 2.1, "u[0] = 2", ha="right", color="0.3")
    ax.text(3.0, 3.42, "u[1] = 4", ha="center", color="0.3")
    ax.text(3.4, 1.75, "u = (2, 4)", color=MOVING)
    return figure


def rule_03() -> Figure:
    """Voxels of its own grid."""
    figure, axes = open_panels(2, 5.8, 3.2)
    fine = constant_field((2.0, 4.0), (8, 8))
    coarse = downsample_field(fine, 2)
    for ax, field, at, title in (
        (axes[0], fine, (2, 1), "grid of 8 × 8 voxels"),
        (axes[1], coarse, (1, 1), "the same, pooled by 2"),
    ):
        rows, columns = field.shape[2:]
        voxel_axes(ax, (rows, columns))
        vector = [float(v) for v in field[0, :, at[0], at[1]]]
        arrow(ax, at, (at[0] + vector[0], at[1] + vector[1]), MOVING)
        dot(ax, at, FIXED)
        ax.set_title(title)
        ax.set_xlabel(f"u = ({vector[0]:g}, {vector[1]:g})", color=MOVING)
        ax.set_ylabel("")
    return figure


def rule_04() -> Figure:
    """Pull-back: phi maps fixed to moving."""
    field = constant_field((5.0, 9.0), (40, 40))
    moving = letter()
    figure, (left, right) = open_panels(2, 5.8, 3.2)
    show.image(warp(moving, field), ax=left)
    show.image(moving, ax=right)
    left.set_title("warped, on the fixed grid", color=WARPED)
    right.set_title("moving", color=MOVING)
    x = torch.tensor([[[5.0, 5.5]]])
    phi = warp_points(x, field)[0, 0].tolist()
    start = tuple(x[0, 0].tolist())
    dot(left, start, FIXED)
    left.text(start[1] - 4.6, start[0] - 1.2, "x", color="white", fontsize=11)
    dot(right, start, FIXED, 16)
    dot(right, tuple(phi), WARPED)
    arrow(right, start, tuple(phi), WARPED)
    right.text(0.5, 3.0, "x", color="white", fontsize=11)
    right.text(phi[1] + 0.5, phi[0] - 5.4, "φ(x) = x + u(x)", color=WARPED, fontsize=11)
    return figure


def rule_05() -> Figure:
    """compose(a, b): b first, then a, read where b has arrived."""
    shape = (6, 9)
    x0, x1 = identity_grid(shape)[0]
    b = torch.stack([0 * x0 + 1.0, 0 * x0 + 3.0])[None]
    a = torch.stack([2.4 * (x1 - 1) / 3 - 0.6, 0 * x0 + 2.0])[None]
    start = (1.0, 1.0)
    point = torch.tensor([[start]])
    middle = tuple(warp_points(point, b)[0, 0].tolist())
    end = tuple(warp_points(point, compose(a, b))[0, 0].tolist())
    naive = tuple((warp_points(point, b) + warp_points(point, a) - point)[0, 0].tolist())
    figure, (ax,) = open_panels(1, 5.0, 3.6)
    voxel_axes(ax, shape)
    arrow(ax, start, middle, FIXED)
    arrow(ax, middle, end, WARPED)
    arrow(ax, middle, naive, GREY)
    dot(ax, start, FIXED)
    dot(ax, middle, WARPED)
    ax.text(1.0, 0.6, "x", ha="center", color=FIXED)
    ax.text(1.7, 1.95, "b(x)", color=FIXED)
    ax.text(4.8, 3.2, "a(x + b(x))", color=WARPED, ha="right")
    ax.text(6.2, 1.4, "a(x): a read in\nthe wrong place", color="0.4", va="center")
    return figure


def rule_06() -> Figure:
    """moving, fixed, warped."""
    moving = letter()
    field = smooth_field((40, 40), 5.0, 5.0, seed=3)
    fixed = warp(moving, field)
    return show.pair(moving, fixed, warp(moving, 0.8 * field))


def rule_07() -> Figure:
    """Unit coordinates, and where the nodes of a pyramid level sit."""
    figure, axes = plt.subplots(2, 1, figsize=(5.8, 4.4), height_ratios=(2, 3))
    top, bottom = axes
    size, factor = 8, 2
    rows = identity_grid((size, size))
    voxels = rows[0, 0, :, 0].numpy()
    unit = voxel_to_unit(rows, (size, size))[0, 0, :, 0]
    nodes = factor * np.arange(size // factor) + (factor - 1) / 2
    corners = np.linspace(0, size - 1, size // factor)
    for row, xs, colour, name in (
        (0.0, voxels, FIXED, "8 voxels"),
        (1.0, nodes, WARPED, "pooled by 2"),
        (2.0, corners, GREY, "corner to corner"),
    ):
        top.scatter(xs, [row] * len(xs), color=colour, s=34, zorder=3)
        top.text(-0.6, row, name, ha="right", va="center", color=colour)
    for i, at in enumerate(nodes):
        for child in range(factor):
            top.plot([at, factor * i + child], [1, 0], color=LIGHT, zorder=0)
    for i, at in enumerate(voxels.tolist()):
        top.text(at, -0.45, f"{i}\n{unit[i]:.2f}", ha="center", va="bottom", fontsize=8)
    top.text(-0.6, -0.5, "index\nunit", ha="right", va="bottom", fontsize=8)
    top.set(xlim=(-3.2, size - 0.4), ylim=(2.4, -1.35))
    top.axis("off")

    linear = 0.5 * rows - 1.0
    coarse = downsample_field(linear, factor)
    back = upsample_field(coarse, factor, (size, size))
    naive = factor * torch.nn.functional.interpolate(
        coarse, (size, size), mode="bilinear", align_corners=False
    )
    bottom.plot(voxels, linear[0, 0, :, 0].numpy(), color=FIXED, linewidth=4, alpha=0.35, label="u")
    bottom.plot(
        voxels,
        back[0, 0, :, 0].numpy(),
        "o",
        color=WARPED,
        markersize=5,
        label="down, then up: ours",
    )
    bottom.plot(
        *(voxels, naive[0, 0, :, 0].numpy(), "x"),
        color=FOLD,
        markersize=6,
        label="with clamped borders",
    )
    bottom.set(xlabel="voxel", ylabel="displacement [voxels]")
    bottom.legend()
    return figure


def rule_08() -> Figure:
    """What is read outside the grid."""
    figure, (ax,) = open_panels(1, 5.6, 2.7)
    values = torch.tensor([0.9, 0.6, 0.7, 0.3, 0.5, 0.8])
    image = values.view(1, 1, 1, -1)
    at = torch.linspace(-3, len(values) + 2, 401)
    coords = torch.stack([torch.zeros_like(at), at])[None, :, None]
    for padding, colour, style in (("border", FIXED, "-"), ("zeros", WARPED, "--")):
        read = sample(image, coords, padding=padding)[0, 0, 0]
        ax.plot(at.numpy(), read.numpy(), style, color=colour)
    ax.text(-2.9, 0.95, 'padding="border": images, fields', color=FIXED, va="bottom")
    ax.text(2.5, 0.03, 'padding="zeros": masks, labels', color=WARPED, va="bottom", ha="center")
    ax.plot(range(len(values)), values.numpy(), "o", color="black", zorder=4)
    ax.axvspan(-0.5, len(values) - 0.5, color="0.95", zorder=0)
    ax.set(xlabel="coordinate [voxels]", ylabel="value read", ylim=(-0.05, 1.12))
    return figure


def rule_09() -> Figure:
    """Labels are never averaged."""
    rows, columns = identity_grid((20, 20))[0]
    labels = torch.zeros(1, 1, 20, 20)
    labels[0, 0, (rows - 9.5) ** 2 + (columns - 9.5) ** 2 < 50] = 2
    field = torch.stack([0.25 * (columns - 10), -0.25 * (rows - 10)])[None]
    figure, axes = open_panels(3, 6.0, 2.5)
    blurred = warp(labels, field, padding="zeros")
    invented = ((blurred > 0.5) & (blurred < 1.5)).sum().item()
    for ax, picture, title in (
        (axes[0], labels, "labels 0 and 2"),
        (axes[1], warp_labels(labels, field), "warp_labels: 0 and 2"),
        (axes[2], blurred.round(), f"averaged: {invented} voxels of label 1"),
    ):
        colours = mpl.colors.ListedColormap(["white", FOLD, FIXED])
        ax.imshow(picture[0, 0].numpy(), cmap=colours, vmin=0, vmax=2)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=9)
        ax.spines[:].set(visible=True, color=GREY)
    return figure


def rule_10() -> Figure:
    """A displacement in voxels is another one in millimetres."""
    spacing = (3.0, 1.0)
    figure, axes = open_panels(2, 5.6, 3.2)
    start, vector = (1.0, 1.0), (2.0, 2.0)
    for ax, scale, unit in ((axes[0], (1.0, 1.0), "voxels"), (axes[1], spacing, "mm")):
        rows, columns = 5, 6
        for i in range(rows + 1):
            edge = (i - 0.5) * scale[0]
            ax.plot(np.array([-0.5, columns - 0.5]) * scale[1], [edge, edge], color=LIGHT, zorder=0)
        for j in range(columns + 1):
            edge = (j - 0.5) * scale[1]
            ax.plot([edge, edge], np.array([-0.5, rows - 0.5]) * scale[0], color=LIGHT, zorder=0)
        a = (start[0] * scale[0], start[1] * scale[1])
        b = (a[0] + vector[0] * scale[0], a[1] + vector[1] * scale[1])
        arrow(ax, a, b, MOVING)
        dot(ax, a, FIXED)
        ax.set(
            ylim=((rows - 0.5) * scale[0], -0.5 * scale[0]),
            aspect="equal",
            title=f"({b[0] - a[0]:g}, {b[1] - a[1]:g}) {unit}",
            xlabel=f"axis 1 [{unit}]",
            ylabel=f"axis 0 [{unit}]",
        )
        ax.spines[:].set_visible(False)
    return figure


def rule_11() -> Figure:
    """The Jacobian determinant and where it folds."""
    shape = (28, 28)
    rows, columns = identity_grid(shape)[0]
    bump = torch.exp(-((rows - 13) ** 2 + (columns - 13) ** 2) / 30)
    field = torch.stack([0 * bump, 9 * bump])[None]
    figure, (left, right) = open_panels(2, 6.0, 3.0)
    show.deformed_grid(field, step=2, ax=left)
    show.jacobian_map(field, ax=right)
    left.set_title("grid lines carried by φ")
    right.set_title("det J")
    return figure


def rule_12() -> Figure:
    """Lower is better, and the weight is part of the measure."""
    moving = letter()
    fixed = moving.clone()
    fixed[..., 6:36, 24:29] = 2.2
    weight = torch.ones_like(fixed)
    weight[..., 4:38, 22:31] = 0
    shifts = torch.linspace(-14, 14, 113)
    warped = torch.cat([warp(moving, constant_field((0.0, float(-s)), (40, 40))) for s in shifts])
    fixeds, weights = (t.expand_as(warped).contiguous() for t in (fixed, weight))
    figure, (left, right) = open_panels(2, 6.0, 2.8)
    show.image(fixed, ax=left)
    left.add_patch(Rectangle((21.5, 3.5), 9, 34, fill=False, edgecolor=WARPED, linestyle="--"))
    left.set_title("fixed, with a bright fault")
    for used, colour, name in (
        (None, GREY, "no weight"),
        (weights, WARPED, "weight 0\nin the frame"),
    ):
        values = ncc(warped, fixeds, weight=used, reduction="none")
        right.plot(shifts.numpy(), values.numpy(), color=colour, label=name)
    right.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    right.set(xlabel="shift of moving [voxels]", ylabel="ncc = 1 − r", ylim=(-0.05, None))
    right.legend(fontsize=8)
    return figure


def rule_13() -> Figure:
    """Why coordinates stay in float32."""
    figure, (ax,) = open_panels(1, 5.4, 2.8)
    wanted = torch.linspace(122, 134, 601)
    held = wanted.bfloat16().float()
    ax.plot(wanted.numpy(), wanted.numpy(), color=FIXED, label="float32")
    ax.plot(wanted.numpy(), held.numpy(), color=WARPED, label="bfloat16")
    ax.set(xlabel="coordinate wanted [voxels]", ylabel="coordinate held")
    ax.legend()
    return figure


def rule_14() -> Figure:
    """Randomness has an owner."""
    figure, axes = open_panels(3, 6.0, 2.4)
    for ax, seed, title in zip(
        axes, (0, 0, 1), ("generator, seed 0", "again seed 0", "seed 1"), strict=True
    ):
        show.deformed_grid(integrate(smooth_field((32, 32), 5.0, 4.0, seed)), step=2, ax=ax)
        ax.set_title(title)
    return figure


def rule_15() -> Figure:
    """phi(x) = A(x + u(x)): first the field, then the affine map."""
    shape = (32, 32)
    x = identity_grid(shape)
    u = integrate(smooth_field(shape, 5.0, 4.0, seed=5))
    angle = torch.tensor(0.35)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    centre = 15.5
    bent = x + u
    phi = torch.einsum("ij,bjhw->bihw", turn, bent - centre) + centre
    figure, axes = open_panels(3, 6.0, 2.4)
    for ax, field, title in (
        (axes[0], 0 * u, "x"),
        (axes[1], u, "x + u(x)"),
        (axes[2], phi - x, "A(x + u(x))"),
    ):
        show.deformed_grid(field, step=2, ax=ax)
        ax.set_title(title)
    return figure


# ----------------------------------------------------------------------------- the page on GeoReg


def box(ax: Axes, at: tuple[float, float], text: str, colour: str, width: float = 1.5) -> None:
    """A rounded box centred at (x, y)."""
    height = 0.62
    ax.add_patch(
        FancyBboxPatch(
            (at[0] - width / 2, at[1] - height / 2),
            width,
            height,
            boxstyle="round,pad=0.04",
            facecolor="white",
            edgecolor=colour,
            linewidth=1.6,
        )
    )
    ax.text(*at, text, ha="center", va="center", fontsize=9)


def link(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY
) -> None:
    """A thin arrow between (x, y) points."""
    ax.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "->",
            "color": colour,
            "linewidth": 1.2,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def georeg_levels() -> Figure:
    """The two encoders and the way down from the coarsest level to the finest."""
    figure, (ax,) = open_panels(1, 6.0, 5.0)
    levels = ("28 × 28, 16 channels", "14 × 14, 32 channels", "7 × 7, 64 channels")
    for level in (1, 2, 3):
        ax.add_patch(
            FancyBboxPatch(
                (0.1, -1.6 * level - 0.45),
                3.6,
                0.9,
                boxstyle="round,pad=0.04",
                facecolor="0.94",
                edgecolor="none",
            )
        )
    towers = ((0.9, "moving", MOVING), (2.9, "fixed", FIXED))
    for x, name, colour in towers:
        box(ax, (x, 0), name, colour)
        for level, text in enumerate(levels, start=1):
            y = -1.6 * level
            box(ax, (x, y), text.replace(", ", "\n"), colour)
            link(ax, (x, y + 1.22), (x, y + 0.38), colour)
    ax.text(1.9, -0.8, "one encoder,\nused twice", ha="center", va="center", fontsize=8)
    for level, name in ((3, "coarse"), (2, "middle"), (1, "fine")):
        y = -1.6 * level
        box(ax, (5.6, y), f"τ, repeated\n→ u ({name})", WARPED, 1.7)
        link(ax, (3.78, y), (4.68, y))
        if level > 1:
            box(ax, (7.4, y + 0.8), "δ: next finer\nlevel", "black", 1.5)
            link(ax, (6.5, y + 0.12), (7.2, y + 0.42), WARPED)
            link(ax, (7.2, y + 1.18), (6.5, y + 1.5), WARPED)
    ax.text(1.9, -5.5, "features of both images", ha="center", fontsize=8)
    ax.text(7.4, -0.2, "the loss is taken\nafter every τ and δ", ha="center", fontsize=8)
    box(ax, (5.6, 0), "u and\nwarped", WARPED, 1.7)
    link(ax, (5.6, -1.22), (5.6, -0.38), WARPED)
    ax.text(5.6, -5.45, "start: u = 0", ha="center", fontsize=8)
    link(ax, (5.6, -5.3), (5.6, -5.18), WARPED)
    ax.set(xlim=(0, 8.3), ylim=(-5.7, 0.5))
    ax.axis("off")
    return figure


def georeg_neighbourhood() -> Figure:
    """What one point of the fixed grid sees: the moving features around phi(x)."""
    figure, (left, right) = open_panels(2, 6.0, 3.3)
    shape, query, where = (7, 7), (4, 2), (2.3, 3.7)
    nearest = (round(where[0]), round(where[1]))
    for ax, colour, title in ((left, FIXED, "fixed features"), (right, MOVING, "moving features")):
        rows, columns = np.indices(shape)
        ax.scatter(columns, rows, s=14, color=colour, alpha=0.45)
        ax.set(xlim=(-0.7, 6.7), ylim=(6.7, -0.7), aspect="equal", xticks=[], yticks=[])
        ax.set_title(title, color=colour)
        ax.spines[:].set_visible(False)
    dot(left, query, FIXED, 60)
    left.text(query[1] + 0.3, query[0] + 0.75, "query at x", color=FIXED)
    dot(right, where, WARPED, 60)
    dot(right, query, FIXED, 30)
    right.text(query[1] + 0.2, query[0] + 0.75, "x", color=FIXED)
    arrow(right, query, where, GREY)
    right.text(2.0, 2.75, "u(x)", color="0.3", ha="center")
    right.text(
        where[1] + 0.3,
        where[0] + 0.45,
        "φ(x)",
        zorder=6,
        color=WARPED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            node = (nearest[0] + di, nearest[1] + dj)
            right.scatter([node[1]], [node[0]], s=42, color=MOVING, zorder=3)
            right.plot(
                [where[1], node[1]], [where[0], node[0]], color=WARPED, linewidth=1.0, zorder=2
            )
    return figure


def georeg_inheritance() -> Figure:
    """Why displacements are inherited, not coordinates."""
    size, factor = 8, 2
    x = identity_grid((size, size))
    rest = torch.nn.functional.avg_pool2d(x, factor)
    coordinates = torch.nn.functional.interpolate(
        rest, (size, size), mode="bilinear", align_corners=False
    )
    ours = x + upsample_field(torch.zeros_like(rest), factor, (size, size))
    figure, (ax,) = open_panels(1, 5.4, 3.0)
    ax.plot(
        x[0, 0, :, 0].numpy(),
        ours[0, 0, :, 0].numpy(),
        "o-",
        color=WARPED,
        label="displacements inherited",
    )
    ax.plot(
        *(x[0, 0, :, 0].numpy(), coordinates[0, 0, :, 0].numpy(), "x--"),
        color=FOLD,
        label="coordinates inherited",
    )
    ax.set(xlabel="voxel x of the fine grid", ylabel="φ(x) inherited from u = 0")
    ax.legend()
    return figure


# ------------------------------------------------------------------------------------ the README


def draw_readme(path: Path, *, fixed: int = 283) -> None:
    """Draw a registration by the pretrained GeoReg: the images, and the grid of phi level by level.

    Args:
        path: File to write, PNG.
        fixed: Test digit of the sample; the next one of its class is the moving image.
    """
    from reglib.data.datasets import mnist
    from reglib.methods.georeg import load_pretrained, to_full_resolution

    images, digits = mnist("test")
    same = torch.nonzero(digits == digits[fixed]).flatten()
    moving = images[same[same > fixed][:1]]
    target = images[fixed : fixed + 1]
    with torch.no_grad():
        output = load_pretrained()(moving, target)
    last = {stage.level: to_full_resolution(stage, (28, 28)) for stage in output.stages}
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 6, figsize=(12, 2.3))
        panels = [
            ("moving", moving, MOVING, None),
            ("fixed", target, FIXED, None),
            *(
                (f"φ, level {level} ({28 >> level} × {28 >> level})", moving, MOVING, field)
                for level, field in last.items()
            ),
            ("warped = moving(φ)", warp(moving, output.field), WARPED, None),
        ]
        for ax, (title, picture, colour, field) in zip(axes, panels, strict=True):
            show.image(picture, ax=ax)
            ax.set_title(title)
            ax.spines[:].set(visible=True, color=colour, linewidth=2.5)
            if field is not None:
                show.deformed_grid(field, step=2, ax=ax)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.05)
        plt.close(figure)


DRAWINGS = (
    *(rule_01, rule_02, rule_03, rule_04, rule_05, rule_06, rule_07, rule_08),
    *(rule_09, rule_10, rule_11, rule_12, rule_13, rule_14, rule_15),
    *(georeg_levels, georeg_neighbourhood, georeg_inheritance),
)


def draw_all(folder: Path) -> list[Path]:
    """Write every drawing to ``folder`` as SVG, the same bytes each time, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.style.context(STYLE), mpl.rc_context({"svg.hashsalt": "reglib"}):
        for draw in DRAWINGS:
            file = folder / f"{draw.__name__}.svg"
            figure = draw()
            figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.06)
            plt.close(figure)
            files.append(file)
    return files


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        draw_readme(Path(sys.argv[2]))
