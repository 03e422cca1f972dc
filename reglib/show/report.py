"""One figure about a registration: before, after, and what the transform does."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from reglib.checks import check_affine, check_batch, check_field, check_image, check_same_shape
from reglib.data.conform import conform_grid, resample
from reglib.geometry.fields import carry_field
from reglib.show import plot

# The axes go down, to the back and to the left: the patient's right is on the left of the picture.
_DISPLAY = {2: "PL", 3: "IPL"}
# What is cut, and which sides are at the top and bottom, left and right.
_PLANES = {
    0: ("axial", "A", "P", "R", "L"),
    1: ("coronal", "S", "I", "R", "L"),
    2: ("sagittal", "S", "I", "A", "P"),
}
_WIDTH = 2.6  # of a panel, in inches


def registration_report(
    moving: Tensor,
    fixed: Tensor,
    warped: Tensor,
    field: Tensor,
    affine: Tensor,
    *,
    index: int = 0,
    title: str = "",
) -> Figure:
    """Draw moving over fixed, warped over fixed, the deformed grid and the Jacobian determinant.

    In the overlays the fixed image is blue, the other one orange: grey where they agree. A volume
    is drawn as its three middle planes, one row each, the right side of the body on the left. Of
    several channels the mean is drawn.

    Args:
        moving: ``(B, C, *S)``, the moving image on the fixed grid before registration.
        fixed: ``(B, C, *S)``, the fixed image.
        warped: ``(B, C, *S)``, the moving image after registration.
        field: displacement ``(B, D, *S)`` in voxels of the fixed grid, whose grid and determinant
            are drawn.
        affine: ``(D+1, D+1)``, voxels of the fixed image to world mm (RAS).
        index: sample of the batch.
        title: text above the figure.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: if the arguments do not belong together.
    """
    images = {"moving": moving, "fixed": fixed, "warped": warped}
    for name, tensor in images.items():
        check_image(tensor, name)
        check_same_shape(tensor[:, :1], fixed[:, :1], (name, "fixed"))
    check_field(field, "field")
    check_batch(fixed, field, ("fixed", "field"))
    check_same_shape(field[:, :1], fixed[:, :1], ("field", "fixed"))
    d = field.shape[1]
    old = check_affine(affine, "affine", d)
    if not 0 <= index < len(field):
        raise ValueError(f"index: wanted 0 to {len(field) - 1}, got {index}")
    new, shape = conform_grid(old, tuple(field.shape[2:]), orientation=_DISPLAY[d])
    grey = [x[index : index + 1].detach().cpu().mean(1, keepdim=True) for x in images.values()]
    u = field[index : index + 1].detach().cpu()
    spacing = new[:-1, :-1].norm(dim=0).tolist()
    extent = [n * s for n, s in zip(shape, spacing, strict=True)]
    planes = [None] if d == 2 else list(_PLANES)
    ratios = []
    for axis in planes:
        height, width = (e for c, e in enumerate(extent) if c != axis)
        ratios.append(min(max(height / width, 0.4), 1.6))
    with plt.style.context(plot.STYLE):
        size = (4 * _WIDTH + 0.6, _WIDTH * sum(ratios) + 0.4 * len(ratios) + 0.5 * bool(title))
        figure = Figure(figsize=size)
        rows = figure.subplots(len(planes), 4, squeeze=False, height_ratios=ratios)
    for axis, row in zip(planes, rows, strict=True):
        before, after, grid, determinant = row
        # As many slices as the derivatives in the middle one need.
        slab, slab_shape, position = new.clone(), list(shape), None
        if axis is not None:
            first = max(shape[axis] // 2 - 1, 0)
            slab[:-1, -1] += first * new[:-1, axis]
            slab_shape[axis] = min(3, shape[axis] - first)
            position = shape[axis] // 2 - first
        at: dict[str, Any] = {"axis": axis, "position": position}
        from_moving, of_fixed, from_warped = (resample(x, old, slab, slab_shape) for x in grey)
        v = carry_field(u, old, slab, slab_shape)
        plot.overlay(from_moving, of_fixed, ax=before, **at)
        plot.overlay(from_warped, of_fixed, ax=after, **at)
        plot.deformed_grid(v, ax=grid, **at)
        plot.jacobian_map(v, ax=determinant, **at)
        height, width = (s for c, s in enumerate(spacing) if c != axis)
        for ax in row:
            ax.set_aspect(height / width)
        for ax in (before, after):
            ax.spines[:].set_visible(False)
        if axis is not None:
            _name_sides(before, axis)
    titles = ("before: moving, fixed", "after: warped, fixed", "deformed grid", "Jacobian")
    for ax, text in zip(rows[0], titles, strict=True):
        ax.set_title(text)
    figure.supxlabel("fixed is blue, moving and warped are orange: grey where they agree", size=9)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def _name_sides(ax: Axes, axis: int) -> None:
    """The name of the plane, and the sides of the body that its borders face."""
    name, top, bottom, left, right = _PLANES[axis]
    ax.set_ylabel(name)
    places = {top: (0.5, 0.97), bottom: (0.5, 0.03), left: (0.03, 0.5), right: (0.97, 0.5)}
    for letter, (x, y) in places.items():
        ax.text(
            *(x, y, letter),
            transform=ax.transAxes,
            color="white",
            fontsize="small",
            path_effects=[withStroke(linewidth=2, foreground="black")],
            horizontalalignment={0.03: "left", 0.5: "center", 0.97: "right"}[x],
            verticalalignment={0.03: "bottom", 0.5: "center", 0.97: "top"}[y],
        )
