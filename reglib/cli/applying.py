"""``reglib apply``: carry an image, labels or points along a transform."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from reglib.cli import images
from reglib.cli.points import POINTS_HELP, read_points, write_points
from reglib.cli.running import (
    SPACE_HELP,
    Debug,
    LabelMode,
    LabelModes,
    Nonfinite,
    Space,
    in_sentences,
    say,
)


class Side(StrEnum):
    """The image that points are given in."""

    FIXED = "fixed"
    MOVING = "moving"


class Padding(StrEnum):
    """What an image is beyond its border."""

    BORDER = "border"
    ZEROS = "zeros"


@in_sentences
def apply(
    transform: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FIELD",
            help="Folder of 'reglib register', or a displacement field (.nii, .nii.gz) as ITK and "
            "ANTs write it.",
            show_default=False,
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE",
            help="Image or label map in the space of the moving image, with any grid; comes out "
            "on the grid of the fixed image.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where the result goes: .nii, .nii.gz, .png, .tif or .jpg; .csv for points. A "
            "file of that name is replaced.",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]  # typer's way to say that it must be given
    labels: Annotated[
        bool, typer.Option("--labels", help="IMAGE is a label map.", show_default=False)
    ] = False,
    label_mode: LabelModes = LabelMode.NEAREST,
    padding: Annotated[
        Padding,
        typer.Option("--padding", help="What an image is beyond its border; labels are 0 there."),
    ] = Padding.BORDER,
    nonfinite: Nonfinite = None,
    points: Annotated[
        Path | None,
        typer.Option(
            "--points", metavar="CSV", help=f"Carry points instead of an image. {POINTS_HELP}"
        ),
    ] = None,
    space: Annotated[
        Space | None,
        typer.Option(
            "--space", help=f"What the coordinates are, going in and coming out: {SPACE_HELP}"
        ),
    ] = None,
    side: Annotated[
        Side | None,
        typer.Option(
            "--from",
            help="The image that the points are given in; they come out in the other one.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Apply a transform to an image, to labels or to points.

    Images and labels of the moving side are pulled back to the fixed grid; their voxels are sampled
    once. Integers stay integers of the same type, rounded. Points go from the fixed to the moving
    image along the transform, or back by solving for each of them.

    \b
    reglib apply DIR t2.nii.gz --out t2_warped.nii.gz
    reglib apply DIR seg.nii.gz --labels --out seg_warped.nii.gz
    reglib apply DIR --points p.csv --space ras --from fixed --out q.csv
    """  # noqa: D301  # \b keeps the lines of a paragraph
    if (image is None) == (points is None):
        got = "neither" if image is None else "both"
        raise typer.BadParameter(f"wanted either IMAGE or --points, got {got}")
    if points is None:
        if space is not None or side is not None:
            raise typer.BadParameter("wanted --space and --from with --points only")
        assert image is not None
        _apply_image(transform, image, out, labels, label_mode, padding, nonfinite)
        return
    if space is None or side is None:
        raise typer.BadParameter("wanted --space and --from with --points, as no default is safe")
    if labels:
        raise typer.BadParameter("wanted --labels with IMAGE only, got --points")
    if out.suffix.lower() != ".csv":
        raise typer.BadParameter(
            f"wanted a name that ends with .csv, got {out}", param_hint="--out"
        )
    if space is Space.VOXEL and not transform.is_dir():
        raise typer.BadParameter(
            "wanted ras or lps, as a field file does not say where the voxels of the moving image "
            "are, got voxel",
            param_hint="--space",
        )
    loaded = images.read_transform(transform)
    table = read_points(points, space, loaded.field.shape[1])
    if side is Side.MOVING and float(loaded.folding) > 0:
        say(
            f"Warning: {transform} folds in {float(loaded.folding):.2%} of its voxels; a point "
            "that comes from a fold has several origins, of which one is given."
        )
    carry = loaded.apply_points if side is Side.FIXED else loaded.apply_points_inverse
    write_points(out, table, carry(table.points, space=space))


def _apply_image(
    transform: Path,
    path: Path,
    out: Path,
    labels: bool,
    label_mode: LabelMode,
    padding: Padding,
    nonfinite: float | None,
) -> None:
    from reglib.data.nifti import NIFTI_SUFFIXES, PICTURE_FORMATS, read_labels, write_image

    suffixes = (*NIFTI_SUFFIXES, *PICTURE_FORMATS)
    if not out.name.lower().endswith(suffixes):
        raise typer.BadParameter(
            f"wanted a name that ends with one of {', '.join(suffixes)}, got {out}",
            param_hint="--out",
        )
    if labels and out.suffix.lower() in (".jpg", ".jpeg"):
        raise typer.BadParameter(
            f"wanted a format that keeps labels, as JPEG does not, got {out}", param_hint="--out"
        )
    loaded = images.read_transform(transform)
    if labels:
        write_image(out, loaded.apply_labels(read_labels(path), mode=label_mode))
        return
    image, kind = images.read(path, nonfinite)
    if not out.name.lower().endswith(tuple(PICTURE_FORMATS)):
        image = images.luminance(image)
    warped = loaded.apply(image, padding=padding)
    write_image(out, warped, dtype=kind)
