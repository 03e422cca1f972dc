"""Figures of images and displacement fields.

Every function takes tensors as the library has them, batched, and draws the sample ``index``.
Array axis 0 points downwards, array axis 1 to the right, voxel centres lie at integers, and both
axes have the same scale. A volume is drawn as the slice ``position`` across array ``axis``; of a
3-D field the two in-plane components are drawn. Nothing here changes matplotlib's settings outside
its own calls; :func:`use_style` does so on request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from reglib.checks import check_field, check_positive_int
from reglib.geometry.derivatives import jacobian_det
from reglib.show.planes import cut, image_planes, phi_planes, select

FIXED = "#0077DD"
WARPED = "#FF8822"  # FIXED + WARPED = white, so an overlay is grey where the two agree
MOVING = "#882255"
FOLD = "#E6007E"

STYLE = Path(__file__).with_name("reglib.mplstyle")
_DIFFERENCE = LinearSegmentedColormap.from_list("difference", [FIXED, "white", WARPED])


def use_style() -> None:
    """Apply the library's figure style to everything drawn from now on in this process."""
    plt.style.use(STYLE)


def image(
    image: Tensor,
    *,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one image, or one slice of a volume, in grey.

    Args:
        image: ``(B, 1, *S)``, any intensity unit.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D images.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.
        limits: Intensities drawn black and white; ``None`` takes the least and the greatest.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    plane = image_planes({"image": image}, index, axis, position)["image"]
    with plt.style.context(STYLE):
        ax = _axes(ax)
        _imshow(ax, plane, limits or _limits(plane))
    return ax


def pair(
    moving: Tensor,
    fixed: Tensor,
    warped: Tensor | None = None,
    *,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
) -> Figure:
    """Draw moving and fixed side by side; with ``warped`` also warped and warped minus fixed.

    The images share one grey scale. In the difference, orange says that the warped image is
    brighter, blue that the fixed one is, white that they agree.

    Args:
        moving: ``(B, 1, *S)``.
        fixed: ``(B, 1, *S)``, of the same shape.
        warped: ``(B, 1, *S)``, the moving image on the fixed grid, or ``None``.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D images.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.

    Returns:
        The figure, of two or four panels.
    """
    images = {"moving": moving, "fixed": fixed} | ({} if warped is None else {"warped": warped})
    planes = image_planes(images, index, axis, position)
    limits = _limits(*planes.values())
    colours = {"moving": MOVING, "fixed": FIXED, "warped": WARPED}
    panels = len(planes) + (warped is not None)
    with _figure(panels) as (figure, axes):
        for ax, (name, plane) in zip(axes, planes.items(), strict=False):
            _imshow(ax, plane, limits)
            ax.set_title(name)
            _frame(ax, colours[name])
        if warped is not None:
            span = limits[1] - limits[0]
            shown = axes[-1].imshow(
                planes["warped"] - planes["fixed"], cmap=_DIFFERENCE, vmin=-span, vmax=span
            )
            axes[-1].set(title="warped − fixed", xticks=[], yticks=[])
            _colour_bar(axes[-1], shown)
    return figure


def overlay(
    warped: Tensor,
    fixed: Tensor,
    *,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw warped in orange over fixed in blue: grey to white where the two agree.

    Each image is scaled to its own range. Pass the moving image as ``warped`` to see the pair
    before registration.

    Args:
        warped: ``(B, 1, *S)``, on the fixed grid.
        fixed: ``(B, 1, *S)``, of the same shape.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D images.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    planes = image_planes({"warped": warped, "fixed": fixed}, index, axis, position)
    rgb = np.zeros((1, 1, 3))
    for plane, colour in zip(planes.values(), (WARPED, FIXED), strict=True):
        low, high = _limits(plane)
        rgb = rgb + ((plane - low) / (high - low))[..., None] * np.array(to_rgb(colour))
    with plt.style.context(STYLE):
        ax = _axes(ax)
        ax.imshow(rgb.clip(0, 1))
        ax.set(xticks=[], yticks=[])
    return ax


def checkerboard(
    warped: Tensor,
    fixed: Tensor,
    *,
    tile: int = 4,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw warped and fixed in alternating tiles: contours run on across tiles where they agree.

    Args:
        warped: ``(B, 1, *S)``, on the fixed grid; it has the tile at the origin.
        fixed: ``(B, 1, *S)``, of the same shape.
        tile: Side of a tile in voxels.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D images.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    check_positive_int(tile, "tile")
    planes = image_planes({"warped": warped, "fixed": fixed}, index, axis, position)
    first, second = planes.values()
    rows, columns = np.indices(first.shape) // tile
    with plt.style.context(STYLE):
        ax = _axes(ax)
        _imshow(ax, np.where((rows + columns) % 2 == 0, first, second), _limits(first, second))
    return ax


def deformed_grid(
    field: Tensor,
    *,
    step: int | None = None,
    colour: str = WARPED,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the straight lines of the fixed grid where phi(x) = x + u(x) carries them.

    The curves lie in the space of the moving image: they show where it is sampled. Draw them
    over the moving image by passing the axes of :func:`image`.

    Args:
        field: Displacement u, ``(B, D, *S)``, in voxels, on the fixed grid, fixed to moving.
        step: Voxels from one line to the next; ``None`` gives about 16 lines along the longer side.
        colour: Colour of the lines.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D fields.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    y, x, y_by, x_by = phi_planes(field, index, axis, position)
    y, x = y + y_by, x + x_by
    points = np.stack((x, y), axis=-1)
    step = _step(step, x.shape)
    lines = [points[i] for i in _every(step, x.shape[0])]
    lines += [points[:, j] for j in _every(step, x.shape[1])]
    with plt.style.context(STYLE):
        ax = _axes(ax)
        fresh = not ax.has_data()
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=0.9), autolim=fresh)
        if fresh:
            _voxel_view(ax, x, y)
    return ax


def quiver(
    field: Tensor,
    *,
    step: int | None = None,
    colour: str = MOVING,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw arrows from x to phi(x) = x + u(x), at their true length.

    An arrow starts at a voxel of the fixed grid and ends where the moving image is sampled.

    Args:
        field: Displacement u, ``(B, D, *S)``, in voxels, on the fixed grid, fixed to moving.
        step: Voxels from one arrow to the next; ``None`` gives about 16 along the longer side.
        colour: Colour of the arrows.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D fields.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    planes = phi_planes(field, index, axis, position)
    step = _step(step, planes[0].shape)
    y, x, y_by, x_by = (plane[::step, ::step] for plane in planes)
    with plt.style.context(STYLE):
        ax = _axes(ax)
        fresh = not ax.has_data()
        ax.quiver(
            *(x, y, x_by, y_by),
            angles="xy",
            scale_units="xy",
            scale=1,
            color=colour,
            width=0.006,
        )
        if fresh:
            _voxel_view(ax, np.append(x, x + x_by), np.append(y, y + y_by))
    return ax


def jacobian_map(
    field: Tensor,
    *,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw det(d phi / d x): white is 1, teal shrinks, brown grows, magenta folds (det <= 0).

    The colour scale is always 0 to 2, so that figures compare. The determinant of a volume is the
    one in 3-D, of which a slice is drawn.

    Args:
        field: Displacement u, ``(B, D, *S)``, in voxels, on the fixed grid, fixed to moving.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D fields.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    check_field(field, "field")
    sample = select(field, "field", index)
    determinant = jacobian_det(sample[None].float())[0]
    plane = cut(determinant.cpu().numpy(), axis, position)
    folded = plane <= 0
    with plt.style.context(STYLE):
        ax = _axes(ax)
        cmap = plt.get_cmap("BrBG_r").with_extremes(bad=FOLD)
        shown = ax.imshow(
            np.ma.masked_where(folded, plane), cmap=cmap, norm=CenteredNorm(vcenter=1, halfrange=1)
        )
        ax.set(xticks=[], yticks=[])
        _colour_bar(ax, shown, label="det J", extend="max" if (plane > 2).any() else "neither")
        if folded.any():
            label = f"folded, det J ≤ 0 ({100 * folded.mean():.3g} %)"
            ax.legend(
                handles=[Patch(color=FOLD, label=label)],
                loc="upper center",
                bbox_to_anchor=(0.5, 0.0),
            )
    return ax


def loss_curve(
    history: Mapping[str, Sequence[float]], *, log: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw each term of a training history over the steps; lower is better.

    Args:
        history: Name of a term -> its value at every step.
        log: Logarithmic vertical axis; every value must then be positive.
        ax: Axes to draw into; ``None`` makes a figure.

    Returns:
        The axes.
    """
    if not history:
        raise ValueError("history: wanted at least one term, got none")
    for name, values in history.items():
        if len(values) == 0:
            raise ValueError(f"history[{name!r}]: wanted at least one value, got none")
        if log and min(values) <= 0:
            raise ValueError(
                f"history[{name!r}]: wanted positive values for log=True, got {min(values):.4g}"
            )
    with plt.style.context(STYLE):
        ax = ax or plt.subplots(figsize=(5.0, 3.0))[1]
        for name, values in history.items():
            ax.plot(range(1, len(values) + 1), values, label=name)
        ax.set(xlabel="step", ylabel="loss (lower is better)")
        if log:
            ax.set_yscale("log")
        ax.legend()
    return ax


@contextmanager
def _figure(panels: int) -> Iterator[tuple[Figure, list[Axes]]]:
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(2.4 * panels, 2.7), squeeze=False)
        yield figure, list(axes[0])


def _axes(ax: Axes | None) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=(3.4, 3.4))[1]


def _imshow(ax: Axes, plane: NDArray[np.float64], limits: tuple[float, float]) -> None:
    ax.imshow(plane, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def _frame(ax: Axes, colour: str) -> None:
    ax.spines[:].set(visible=True, color=colour, linewidth=2.5)


def _colour_bar(
    ax: Axes, shown: AxesImage, *, label: str = "", extend: Literal["max", "neither"] = "neither"
) -> None:
    ax.spines[:].set(visible=True, color="0.6")
    ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.04, label=label, extend=extend)


def _voxel_view(ax: Axes, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    ax.set(
        xlim=(x.min() - 0.5, x.max() + 0.5),
        ylim=(y.max() + 0.5, y.min() - 0.5),
        aspect="equal",
        xticks=[],
        yticks=[],
    )
    ax.spines[:].set_visible(False)


def _limits(*planes: NDArray[np.float64]) -> tuple[float, float]:
    low = min(float(plane.min()) for plane in planes)
    high = max(float(plane.max()) for plane in planes)
    return low, high if high > low else low + 1.0


def _step(step: int | None, shape: tuple[int, ...]) -> int:
    if step is None:
        return max(1, round(max(shape) / 16))
    check_positive_int(step, "step")
    return step


def _every(step: int, size: int) -> list[int]:
    # The last line is always drawn, so that the outline of the domain is closed.
    return sorted({*range(0, size, step), size - 1})
