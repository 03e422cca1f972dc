"""``reglib evaluate``: measures of a registration, as a table or as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reglib.cli import images
from reglib.cli.points import POINTS_HELP, read_points
from reglib.cli.running import SPACE_HELP, Debug, Space, in_sentences

if TYPE_CHECKING:
    from torch import Tensor

    from reglib.data.nifti import Image
    from reglib.objectives.evaluation import Evaluation
    from reglib.registration import Registration

#: What the names of the measures mean.
DEFINITIONS = {
    "dice": "2 |A and B| / (|A| + |B|) of the voxels of a label",
    "hd95": "95th percentile of the distances of each surface from the other, weighted by area, "
    "the larger of the two (as the surface-distance package)",
    "assd": "mean distance from the other label over the boundary voxels of both",
    "tre": "mean distance of the mapped fixed points from the moving points",
    "folding": "share of voxels where det J <= 0, central differences",
    "ndv": "non-diffeomorphic volume (in 2-D: area) as a share, Liu et al. 2024",
}


@in_sentences
def evaluate(
    warped_labels: Annotated[
        Path | None,
        typer.Option("--warped-labels", metavar="FILE", help="Moving labels on the fixed grid."),
    ] = None,
    fixed_labels: Annotated[
        Path | None,
        typer.Option("--fixed-labels", metavar="FILE", help="Labels of the fixed image."),
    ] = None,
    field: Annotated[
        Path | None,
        typer.Option(
            "--field",
            metavar="DIR|FILE",
            help="Folder of 'reglib register', of which the deformation after the affine part is "
            "judged for folding; or a displacement field of ITK or ANTs, judged as it is.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask",
            metavar="FILE",
            help="Where folding and NDV are looked at, above 0, on the fixed grid.",
        ),
    ] = None,
    fixed_points: Annotated[
        Path | None,
        typer.Option("--fixed-points", metavar="CSV", help=f"Landmarks in fixed. {POINTS_HELP}"),
    ] = None,
    moving_points: Annotated[
        Path | None,
        typer.Option(
            "--moving-points", metavar="CSV", help="The same landmarks in moving, row by row."
        ),
    ] = None,
    space: Annotated[
        Space | None,
        typer.Option("--space", help=f"What the coordinates of points are: {SPACE_HELP}"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="1,2,...", help="Only these labels; else all but 0."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; null is not defined.", show_default=False)
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure the overlap of labels, distances of points, folding.

    Give two label maps for Dice, HD95 and ASSD; a transform for folding and NDV; two files of
    points for TRE, with a transform that carries the fixed points to the moving image, without one
    for the error before registration. Distances are in mm, by the spacing in the headers.

    HD95 is the larger of the two 95th percentiles of the distance of a surface from the other,
    every element of surface counting by its area, as in the surface-distance package. Programs
    that count voxels instead give other numbers.
    """
    if (warped_labels is None) != (fixed_labels is None):
        raise typer.BadParameter("wanted --warped-labels and --fixed-labels together, got one")
    if (fixed_points is None) != (moving_points is None):
        raise typer.BadParameter("wanted --fixed-points and --moving-points together, got one")
    if fixed_points is not None and space is None:
        raise typer.BadParameter(
            "wanted one of ras, lps and voxel with points", param_hint="--space"
        )
    if warped_labels is None and fixed_points is None and field is None:
        raise typer.BadParameter("wanted labels, points or --field, got none")
    if labels is not None and warped_labels is None:
        raise typer.BadParameter(
            "wanted --warped-labels and --fixed-labels with it, got none", param_hint="--labels"
        )
    if mask is not None and field is None:
        raise typer.BadParameter("wanted --field with it, got none", param_hint="--mask")
    wanted = None if labels is None else _numbers(labels)

    from reglib.data.nifti import read_image, read_labels
    from reglib.objectives import evaluation

    given: dict[str, Any] = {"spacing": (1.0,)}  # points are in mm already
    transform = None if field is None else images.read_transform(field)
    if transform is not None:
        given["field"] = transform.field
        if mask is not None:
            inside = read_image(mask)
            shape = tuple(transform.field.shape[2:])
            images.check_grid(inside, shape, transform.fixed_affine, (str(field), str(mask)))
            given["mask"] = (inside.tensor > 0).to(transform.field)
    if warped_labels is not None and fixed_labels is not None:
        pair = (read_labels(warped_labels), read_labels(fixed_labels))
        grids = [(str(warped_labels), tuple(pair[0].tensor.shape[2:]), pair[0].affine)]
        if transform is not None:
            grids += [(str(field), tuple(transform.field.shape[2:]), transform.fixed_affine)]
        for name, shape, affine in grids:
            images.check_grid(pair[1], shape, affine, (name, str(fixed_labels)))
        given |= {"labels": chosen(*pair, wanted), "spacing": pair[1].spacing}
    if fixed_points is not None and moving_points is not None and space is not None:
        if space is Space.VOXEL and (field is None or not field.is_dir()):
            raise typer.BadParameter(
                "wanted ras or lps, or the folder of a registration as --field, as no other says "
                "where the voxels of the moving image are, got voxel",
                param_hint="--space",
            )
        given["points"] = _points(fixed_points, moving_points, space, transform)
    found = evaluation.evaluate(**given)
    if as_json:
        print(json.dumps(as_values(found), indent=1))
    else:
        print(found)
        print(definitions(found))


def chosen(
    warped: Image, fixed: Image, wanted: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Both label maps, with 0 for every label that is not wanted.

    Raises:
        ValueError: if a wanted label occurs in neither.
    """
    import torch

    pair = (warped.tensor, fixed.tensor)
    if wanted is None:
        return pair
    present = {int(v) for x in pair for v in torch.unique(x).tolist()}
    absent = sorted(set(wanted) - present)
    if absent:
        raise ValueError(f"--labels: wanted labels that occur, got {absent}, which do not")
    keep = torch.tensor(wanted)
    first, second = (x.where(torch.isin(x, keep), torch.zeros_like(x)) for x in pair)
    return first, second


def _numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or 0 in values:
        raise typer.BadParameter(
            f"wanted whole numbers but 0 with commas between them, got {text!r}",
            param_hint="--labels",
        )
    return values


def _points(
    fixed_points: Path,
    moving_points: Path,
    space: Space,
    transform: Registration | None,
) -> tuple[Tensor, Tensor]:
    """(warped, moving) points in mm."""
    from reglib.data.nifti import voxel_to_world

    dimensions = _dimensions(fixed_points, space) if transform is None else transform.field.shape[1]
    start = read_points(fixed_points, space, dimensions)
    end = read_points(moving_points, space, dimensions).points
    if start.points.shape != end.shape:
        raise ValueError(
            f"{fixed_points}, {moving_points}: wanted as many points in both, "
            f"got {start.points.shape[1]} and {end.shape[1]}"
        )
    if transform is None:
        return start.points, end
    mapped = transform.apply_points(start.points, space=space)
    if space is Space.VOXEL:
        return (
            voxel_to_world(mapped, transform.moving_affine),
            voxel_to_world(end, transform.moving_affine),
        )
    return mapped, end


def _dimensions(path: Path, space: Space) -> int:
    """3 if the table has three coordinates, else 2."""
    try:
        return int(read_points(path, space, 3).points.shape[2])
    except ValueError:
        return int(read_points(path, space, 2).points.shape[2])


def as_values(found: Evaluation) -> dict[str, Any]:
    """The measures of a single pair as JSON values; ``None`` where one is not defined."""
    out: dict[str, Any] = {"unit": found.unit}
    measures = {"dice": found.dice, "hd95": found.hd95, "assd": found.assd}
    table = {name: x[0].tolist() for name, x in measures.items() if x is not None}
    if found.labels is not None:
        out["labels"] = {
            str(label): {name: _number(values[k]) for name, values in table.items()}
            for k, label in enumerate(found.labels)
        }
        out["mean"] = {name: _number(sum(values) / len(values)) for name, values in table.items()}
    if found.tre is not None:
        out["tre"] = _number(float(found.tre))
    if found.jacobian is not None and found.ndv is not None:
        parts = found.jacobian._asdict()
        out["folding"] = _number(float(parts.pop("folding")))
        out["ndv"] = _number(float(found.ndv))
        out["jacobian"] = {name: _number(float(x)) for name, x in parts.items()}
    out["definitions"] = {name: text for name, text in DEFINITIONS.items() if _has(found, name)}
    return out


def definitions(found: Evaluation) -> str:
    """What the measures of a table mean, a line each."""
    names = {"dice": "Dice"}
    lines = [
        f"{names.get(name, name if name == 'folding' else name.upper())}: {text}"
        for name, text in DEFINITIONS.items()
        if _has(found, name)
    ]
    return "\n" + "\n".join(lines)


def _has(found: Evaluation, name: str) -> bool:
    return getattr(found, "ndv" if name == "folding" else name) is not None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
