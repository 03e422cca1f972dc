"""All measures of a registration at once, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.checks import check_field, check_image, check_same_shape
from reglib.objectives.metrics import (
    JacobianStatistics,
    dice,
    jacobian_statistics,
    nda,
    ndv,
    ssim,
    tre,
)
from reglib.objectives.surface import assd, hd95


class Evaluation(NamedTuple):
    """What :func:`evaluate` measured; ``None`` where it was not given the means. Prints as a table.

    ``labels`` are the K label values; ``dice``, ``hd95`` and ``assd`` are ``(B, K)``; ``tre``,
    ``ssim``, ``ndv`` and the parts of ``jacobian`` are ``(B,)``. Distances are in ``unit``.
    """

    labels: tuple[int, ...] | None
    dice: Tensor | None
    hd95: Tensor | None
    assd: Tensor | None
    tre: Tensor | None
    ssim: Tensor | None
    jacobian: JacobianStatistics | None
    ndv: Tensor | None
    unit: str

    def __str__(self) -> str:
        """Two tables, by pair and label and by pair, of whatever was measured."""
        overlap = {"Dice": self.dice, f"HD95 [{self.unit}]": self.hd95}
        overlap |= {f"ASSD [{self.unit}]": self.assd}
        pairs = {f"TRE [{self.unit}]": self.tre, "SSIM": self.ssim}
        if self.jacobian is not None:
            j = self.jacobian
            pairs |= {"min det J": j.min, "max det J": j.max, "sd log det J": j.log_std}
            pairs |= {"folding [%]": 100 * j.folding}
        if self.ndv is not None:
            pairs |= {"NDV [%]": 100 * self.ndv}
        tables = []
        if self.labels is not None:
            columns = {name: x.flatten() for name, x in overlap.items() if x is not None}
            batch = len(columns["Dice"]) // len(self.labels)
            keys = [[str(b), str(label)] for b in range(batch) for label in self.labels]
            tables += [_table(["pair", "label"], keys, columns)]
        columns = {name: x for name, x in pairs.items() if x is not None}
        if columns:
            keys = [[str(b)] for b in range(len(next(iter(columns.values()))))]
            tables += [_table(["pair"], keys, columns)]
        return "\n\n".join(tables)


def _table(heads: Sequence[str], keys: Sequence[Sequence[str]], columns: dict[str, Tensor]) -> str:
    """Right-aligned columns with a line of means below if there are several rows."""
    rows = [[*key, *(f"{x[i].item():.4g}" for x in columns.values())] for i, key in enumerate(keys)]
    if len(rows) > 1:
        means = (f"{x.nanmean().item():.4g}" for x in columns.values())
        rows.append(["mean", *[""] * (len(heads) - 1), *means])
    rows.insert(0, [*heads, *columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def evaluate(
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    points: tuple[Tensor, Tensor] | None = None,
    images: tuple[Tensor, Tensor] | None = None,
    field: Tensor | None = None,
    mask: Tensor | None = None,
    spacing: Sequence[float] | None = None,
) -> Evaluation:
    """Measure whatever is given, with the definitions of the single functions.

    Args:
        labels: (warped, fixed) label maps ``(B, 1, *S)``, integers, for ``dice``,
            ``hd95`` (area-weighted surfaces) and ``assd`` (boundary voxels) of every
            label but 0 that occurs.
        points: (warped, moving) landmarks ``(B, N, D)`` for ``tre``: the fixed landmarks
            after ``warp_points``, and their true places. In mm if ``spacing`` is given, else in
            voxels.
        images: (warped, fixed) images ``(B, C, *S)`` for ``ssim``, whose data range is that of
            each fixed image.
        field: displacement ``(B, D, *S)`` in voxels for ``jacobian_statistics`` and NDV (in
            2-D the area, ``nda``).
        mask: ``(B, 1, *S)``; only there is the field looked at.
        spacing: mm per voxel of the fixed grid, axis order, for distances in mm.

    Returns:
        The measures; ``print`` shows them as a table.

    Raises:
        TypeError, ValueError: if nothing is given, or as the single functions.
    """
    given = {"labels": labels, "points": points, "images": images}
    if field is None and all(pair is None for pair in given.values()):
        raise ValueError("labels, points, images, field: wanted at least one of them, got none")
    for name, pair in given.items():
        if pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"{name}: wanted a pair of tensors, got {type(pair).__name__}")
    if field is not None:
        check_field(field, "field")
    values: tuple[int, ...] | None = None
    overlap = hausdorff = surface = None
    if labels is not None:
        values = _label_values(*labels)
        overlap = dice(*labels, labels=values)
        hausdorff = hd95(*labels, labels=values, spacing=spacing)
        surface = assd(*labels, labels=values, spacing=spacing)
    volume = nda if field is not None and field.ndim == 4 else ndv
    found = Evaluation(
        labels=values,
        dice=overlap,
        hd95=hausdorff,
        assd=surface,
        tre=None if points is None else tre(*points),
        ssim=None if images is None else _ssim_each(*images),
        jacobian=None if field is None else jacobian_statistics(field, mask=mask),
        ndv=None if field is None else volume(field, mask=mask),
        unit="voxel" if spacing is None else "mm",
    )
    parts = {"labels": found.dice, "points": found.tre, "images": found.ssim, "field": found.ndv}
    sizes = {name: len(x) for name, x in parts.items() if x is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(sizes)}: wanted the same batch size, got {sizes}")
    return found


def _label_values(warped_labels: Tensor, fixed_labels: Tensor) -> tuple[int, ...]:
    """Every label but 0 that occurs, in order."""
    check_image(warped_labels, "warped_labels", floating=False)
    check_image(fixed_labels, "fixed_labels", floating=False)
    present = {v for x in (warped_labels, fixed_labels) for v in torch.unique(x).tolist()} - {0}
    if not present or not all(float(v).is_integer() for v in present):
        found = sorted(present)[:5]
        raise ValueError(f"labels: wanted integers, not all of them 0, got {found or 'only 0'}")
    return tuple(sorted(map(int, present)))


def _ssim_each(warped: Tensor, fixed: Tensor) -> Tensor:
    """SSIM with the data range of each fixed image."""
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    check_same_shape(warped, fixed, ("warped", "fixed"))
    ranges = (fixed.flatten(1).amax(1) - fixed.flatten(1).amin(1)).tolist()
    if not all(r > 0 for r in ranges):
        raise ValueError(f"fixed: wanted images that are not constant, got data ranges {ranges}")
    return torch.cat(
        [ssim(warped[i : i + 1], fixed[i : i + 1], data_range=r) for i, r in enumerate(ranges)]
    )
