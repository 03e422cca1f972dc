"""Distances between the surfaces of labels: HD95 and ASSD. Computed by SciPy on the CPU.

Several definitions go by these names and differ by a factor of two, so each function says which one
it is and which package computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from reglib.checks import check_label_maps, check_spacing

_Point = tuple[int, ...]
_Mask = NDArray[np.bool_]
_Spacing = tuple[float, ...]


def _contour(
    square: Sequence[_Point], inside: dict[_Point, bool], cut_off: bool
) -> list[tuple[_Point, _Point]]:
    """Segments between the middles of those edges of a square that cross from inside to outside.

    Where both diagonals disagree, the corners whose state is ``cut_off`` are cut off one by one.
    Points are in half voxels, so that the middle of an edge has whole numbers.
    """
    state = [inside[corner] for corner in square]
    middle = [
        tuple(a + b for a, b in zip(p, q, strict=True))
        for p, q in zip(square, [*square[1:], square[0]], strict=True)
    ]
    crossed = [k for k in range(4) if state[k] != state[k - 3]]
    if len(crossed) == 4:
        return [(middle[k - 1], middle[k]) for k in range(4) if state[k] == cut_off]
    return [(middle[crossed[0]], middle[crossed[1]])] if crossed else []


def _loops(segments: Sequence[tuple[_Point, _Point]]) -> list[list[_Point]]:
    """Join segments into closed polygons; every point is the end of two."""
    partners: dict[_Point, list[_Point]] = {}
    for a, b in segments:
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    loops = []
    while partners:
        loop, point = [], next(iter(partners))
        while point in partners:
            loop.append(point)
            a, b = partners.pop(point)
            point = a if a in partners else b
        loops.append(loop)
    return loops


def _triangulate(loop: Sequence[_Point]) -> list[NDArray[np.float64]]:
    """Area vectors of the triangles of a polygon, cut so that their total area is largest."""
    if len(loop) < 3:
        return []
    first, last = np.array(loop[0]), np.array(loop[-1])
    cuts = [
        [
            np.cross(np.array(loop[k]) - first, last - first) / 2,
            *_triangulate(loop[: k + 1]),
            *_triangulate(loop[k:]),
        ]
        for k in range(1, len(loop) - 1)
    ]
    return max(cuts, key=lambda vectors: sum(np.linalg.norm(v) for v in vectors))


@lru_cache
def _surface_elements(d: int) -> tuple[NDArray[np.float64], ...]:
    """For each of the ``2**2**d`` neighbourhoods of a voxel corner, the surface that crosses it.

    The surface runs through the middles of the edges between inside and outside, as in marching
    squares and cubes. On a face where it could run two ways, the rarer state is cut off. Element k
    holds the area vectors ``(M, d)``, in voxels, for the corners whose bits are set in k.
    """
    corners = list(product((0, 1), repeat=d))
    ring = [(0, 0), (0, 1), (1, 1), (1, 0)]
    faces = [[(*c[:axis], side, *c[axis:]) for c in ring] for axis in range(d) for side in (0, 1)]
    elements = []
    for code in range(2 ** len(corners)):
        inside = {corner: bool(code >> k & 1) for k, corner in enumerate(corners)}
        cut_off = 2 * sum(inside.values()) <= len(corners)
        if d == 2:
            segments = _contour(ring, inside, cut_off)
            vectors = [np.array([q[1] - p[1], p[0] - q[0]]) / 2 for p, q in segments]
        else:
            segments = [s for face in faces for s in _contour(face, inside, cut_off)]
            vectors = [v / 4 for loop in _loops(segments) for v in _triangulate(loop)]
        elements.append(np.array(vectors, dtype=np.float64).reshape(-1, d))
    return tuple(elements)


def _distances(a: _Mask, b: _Mask, spacing: _Spacing) -> NDArray[np.float64]:
    """From every marked place of ``a`` to the nearest of ``b``, mm; infinite if ``b`` has none."""
    if not b.any():
        return np.full(int(a.sum()), np.inf)
    distances: NDArray[np.float64] = ndimage.distance_transform_edt(~b, sampling=spacing)[a]
    return distances


def _percentile_95(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    """The distance within which 95 % of the surface lies; infinite without a surface."""
    if not distances.size:
        return np.inf
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas.sum()
    index = min(int(np.searchsorted(share, 0.95)), len(order) - 1)
    return float(distances[order][index])


def _hd95(a: _Mask, b: _Mask, spacing: _Spacing) -> float:
    elements = _surface_elements(a.ndim)
    # A vector along axis c stands for area across all other axes.
    stretch = np.prod(spacing) / np.array(spacing)
    area = np.array([sum(np.linalg.norm(v * stretch) for v in vectors) for vectors in elements])

    def codes(mask: _Mask) -> NDArray[np.int64]:
        """The neighbourhood of every corner between voxels, one more than voxels per axis."""
        padded = np.pad(mask, 1).astype(np.int64)
        code = np.zeros([n + 1 for n in mask.shape], np.int64)
        for bit, corner in enumerate(product((0, 1), repeat=mask.ndim)):
            there = tuple(slice(c, c + n + 1) for c, n in zip(corner, mask.shape, strict=True))
            code |= padded[there] << bit
        return code

    codes_a, codes_b = codes(a), codes(b)
    surface_a, surface_b = ((c > 0) & (c < len(elements) - 1) for c in (codes_a, codes_b))
    return max(
        _percentile_95(_distances(surface_a, surface_b, spacing), area[codes_a[surface_a]]),
        _percentile_95(_distances(surface_b, surface_a, spacing), area[codes_b[surface_b]]),
    )


def _assd(a: _Mask, b: _Mask, spacing: _Spacing) -> float:
    outline_a, outline_b = (mask & ~ndimage.binary_erosion(mask) for mask in (a, b))
    there = _distances(outline_a, outline_b, spacing)
    back = _distances(outline_b, outline_a, spacing)
    return float(np.concatenate([there, back]).mean())


def _per_label(
    measure: Callable[[_Mask, _Mask, _Spacing], float],
    warped_labels: Tensor,
    fixed_labels: Tensor,
    labels: Sequence[int],
    spacing: Sequence[float] | None,
) -> Tensor:
    """``measure`` of every sample and label, ``(B, K)``, within the box around both masks."""
    check_label_maps(warped_labels, fixed_labels, labels)
    size = check_spacing(spacing, warped_labels.ndim - 2)
    rows = []
    for warped, fixed in zip(warped_labels[:, 0].cpu(), fixed_labels[:, 0].cpu(), strict=True):
        row = []
        for value in labels:
            a, b = (warped == value).numpy(), (fixed == value).numpy()
            boxes = ndimage.find_objects((a | b).astype(np.int8))
            row.append(measure(a[boxes[0]], b[boxes[0]], size) if boxes else np.nan)
        rows.append(row)
    return torch.tensor(rows, device=warped_labels.device)


def hd95(
    warped_labels: Tensor,
    fixed_labels: Tensor,
    *,
    labels: Sequence[int],
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """The distance within which 95 % of each surface lies from the other; the larger of the two.

    This is the definition of DeepMind's ``surface-distance`` package (and of Learn2Reg): the
    surface runs half a voxel outside the outermost voxel centres, through the middles of the edges
    between inside and outside, and every element counts by its area. MONAI (the larger of two
    percentiles) and MedPy (one percentile of both directions pooled) count voxels instead: two
    other numbers, larger or smaller.

    Args:
        warped_labels: label map ``(B, 1, *S)``, integers (or floats that hold integers).
        fixed_labels: of the same shape.
        labels: the K label values to measure.
        spacing: mm per voxel, axis order; ``None`` gives voxels.

    Returns:
        ``(B, K)`` in mm, 0 at best. Infinite where a label is absent from one of the maps, NaN
        where it is absent from both.

    Raises:
        TypeError, ValueError: if the inputs are no label maps of one shape, ``labels`` is empty or
            ``spacing`` does not fit.

    Nikolov et al., JMIR 2021, doi:10.2196/26151.
    """
    return _per_label(_hd95, warped_labels, fixed_labels, labels, spacing)


def assd(
    warped_labels: Tensor,
    fixed_labels: Tensor,
    *,
    labels: Sequence[int],
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """Average symmetric surface distance: the mean over all boundary voxels of both labels.

    A boundary voxel has a neighbour (across a face) outside its label; its distance is that to the
    closest boundary voxel of the other label. The same in MONAI (``symmetric=True``) and MedPy.

    Args:
        warped_labels: label map ``(B, 1, *S)``, integers (or floats that hold integers).
        fixed_labels: of the same shape.
        labels: the K label values to measure.
        spacing: mm per voxel, axis order; ``None`` gives voxels.

    Returns:
        ``(B, K)`` in mm, 0 at best. Infinite where a label is absent from one of the maps, NaN
        where it is absent from both.

    Raises:
        TypeError, ValueError: as :func:`hd95`.
    """
    return _per_label(_assd, warped_labels, fixed_labels, labels, spacing)
