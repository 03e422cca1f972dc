"""Points in CSV files: a header, one point a line, the columns of coordinates found by name."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reglib.cli.running import Space

if TYPE_CHECKING:
    from torch import Tensor

# The last names are those of ANTs, for which the space has to be said.
_COLUMNS = {
    Space.RAS: (("r", "a", "s"), ("x", "y", "z")),
    Space.LPS: (("l", "p", "s"), ("x", "y", "z")),
    Space.VOXEL: (("i", "j", "k"),),
}

POINTS_HELP = (
    "CSV file with a header. The coordinates stand in columns named r,a,s (with --space ras), "
    "l,p,s (--space lps), x,y,z (ras or lps, as --space says) or i,j,k (--space voxel); points of "
    "plane images need the first two. Other columns and the order of the rows are kept."
)


class Table(NamedTuple):
    """A CSV file and the points in it.

    Attributes:
        header: names of the columns.
        rows: cells, as text.
        columns: where the coordinates stand.
        points: ``(1, N, D)``, float64.
    """

    header: list[str]
    rows: list[list[str]]
    columns: list[int]
    points: Tensor


def read_points(path: Path, space: Space, dimensions: int) -> Table:
    """Read points.

    Args:
        path: CSV file; see ``POINTS_HELP``.
        space: what the coordinates are.
        dimensions: how many of them a point has.

    Returns:
        The table.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such table.
    """
    import torch

    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: wanted a CSV file, got {error}") from error
    numbered = [(number, row) for number, row in enumerate(lines, 1) if any(map(str.strip, row))]
    header = [name.strip() for name in numbered[0][1]] if numbered else []
    columns = _find(path, header, space, dimensions)
    rows = [row for _, row in numbered[1:]]
    if not rows:
        raise ValueError(f"{path}: wanted one point or more below the header, got none")
    values = [_numbers(path, number, row, header, columns) for number, row in numbered[1:]]
    return Table(header, rows, columns, torch.tensor([values], dtype=torch.float64))


def write_points(path: Path, table: Table, points: Tensor) -> None:
    """Write a table with other coordinates, ``(1, N, D)``; whole or not at all."""
    from reglib.data.files import write_bytes

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    for row, point in zip(table.rows, points[0].tolist(), strict=True):
        cells = list(row)
        for column, value in zip(table.columns, point, strict=True):
            cells[column] = f"{value:.6f}"
        writer.writerow(cells)
    write_bytes(path, text.getvalue().encode())


def _find(path: Path, header: list[str], space: Space, dimensions: int) -> list[int]:
    lower = [name.lower() for name in header]
    for names in _COLUMNS[space]:
        wanted = names[:dimensions]
        if all(lower.count(name) == 1 for name in wanted):
            return [lower.index(name) for name in wanted]
    choices = " or ".join(",".join(names[:dimensions]) for names in _COLUMNS[space])
    raise ValueError(
        f"{path}: wanted a header with the columns {choices} for --space {space}, "
        f"got {','.join(header) or 'an empty file'}"
    )


def _numbers(
    path: Path, number: int, row: list[str], header: list[str], columns: list[int]
) -> list[float]:
    if len(row) != len(header):
        raise ValueError(
            f"{path}, line {number}: wanted {len(header)} cells as in the header, got {len(row)}"
        )
    cells = [row[column] for column in columns]
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{path}, line {number}: wanted numbers, got {','.join(cells)}")
    return values
