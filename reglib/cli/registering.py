"""``reglib register``: two files in, a folder of results out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from reglib.cli import images
from reglib.cli.evaluating import as_values
from reglib.cli.methods import Modality, Name, Plan, Similarity, Start, Transform, Wish, plan
from reglib.cli.running import Debug, LabelMode, LabelModes, Nonfinite, in_sentences, say

if TYPE_CHECKING:
    import torch

    from reglib.data.nifti import Image
    from reglib.registration import Registration

PICTURE = "report.png"


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Files(NamedTuple):
    """Where everything is."""

    moving: Path
    fixed: Path
    moving_labels: Path | None = None
    fixed_labels: Path | None = None
    moving_mask: Path | None = None
    fixed_mask: Path | None = None


class Request(NamedTuple):
    """What was asked for, whatever the images.

    Attributes:
        wish: the method.
        label_mode: how labels are resampled.
        nonfinite: what NaN and infinite voxels become; ``None`` refuses them.
        device: where to compute.
        seed: of all randomness.
    """

    wish: Wish
    label_mode: LabelMode = LabelMode.NEAREST
    nonfinite: float | None = None
    device: Device = Device.AUTO
    seed: int = 0


class _Inputs(NamedTuple):
    """Everything read: ``moving`` and ``fixed`` in one channel, ``original`` the former in all."""

    original: Image
    kind: torch.dtype | None
    moving: Image
    fixed: Image
    moving_labels: Image | None
    fixed_labels: Image | None
    moving_mask: Image | None
    fixed_mask: Image | None
    notes: list[str]


class Done(NamedTuple):
    """What was found, from what, and what it says of the labels and of itself."""

    result: Registration
    inputs: _Inputs
    measures: dict[str, Any] | None
    summary: list[str]


@in_sentences
def register(
    context: typer.Context,
    method: Annotated[
        Name,
        typer.Option(
            "--method",
            help="rigid and affine: in mm, from coarse to fine. After an affine start, by gradient "
            "descent: displacement, a vector for every voxel; svf, a stationary velocity, which "
            "hardly folds and has an inverse; bspline, a lattice of control points; dip, a "
            "velocity that an untrained network makes of noise (--set preset=paper: a "
            "displacement, as in the paper, which takes long). inr: two coordinate networks, which "
            "find a rigid transform unless --transform deformable is given. Trained networks: "
            "georeg, for grey planes, trained on handwritten digits (--set "
            "pretrained=brain_slices: on axial T1 slices of brains without skull; --set "
            "pretrained=brain_volumes: for volumes, on whole T1 brains without skull); fcn, for "
            "volumes, trained on boxes around the hippocampus.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the results; it appears when all of them are there. With --pairs, of "
            "the tables and of a folder for each pair.",
            show_default=False,
        ),
    ],
    moving: Annotated[
        Path | None,
        typer.Argument(
            metavar="MOVING", help="Image to be brought onto the fixed one.", show_default=False
        ),
    ] = None,
    fixed: Annotated[
        Path | None,
        typer.Argument(metavar="FIXED", help="Image that stays as it is.", show_default=False),
    ] = None,
    moving_labels: Annotated[
        Path | None,
        typer.Option(
            "--moving-labels", metavar="FILE", help="Label map of the moving side, to be warped."
        ),
    ] = None,
    fixed_labels: Annotated[
        Path | None,
        typer.Option(
            "--fixed-labels",
            metavar="FILE",
            help="Label map on the fixed grid; the warped labels are compared with it.",
        ),
    ] = None,
    label_mode: LabelModes = LabelMode.NEAREST,
    moving_mask: Annotated[
        Path | None,
        typer.Option(
            "--moving-mask",
            metavar="FILE",
            help="How much each voxel of the moving image counts, at least 0, on its grid.",
        ),
    ] = None,
    fixed_mask: Annotated[
        Path | None,
        typer.Option("--fixed-mask", metavar="FILE", help="The same for the fixed image."),
    ] = None,
    start: Annotated[
        Start | None,
        typer.Option(
            "--start",
            help="What runs before the method. Default: affine for displacement, svf, bspline "
            "and dip, else none. rigid and affine always look where centres of mass and principal "
            "axes would put the image.",
        ),
    ] = None,
    transform: Annotated[
        Transform | None,
        typer.Option(
            "--transform",
            help="What kind of transform shall be found, for methods that leave the choice; "
            "another is an error.",
        ),
    ] = None,
    modality: Annotated[
        Modality | None,
        typer.Option(
            "--modality",
            help="For inr: whether both images show the same intensities (single, the default) or "
            "not (multi); the same as --set modality=multi.",
        ),
    ] = None,
    similarity: Annotated[
        Similarity | None,
        typer.Option(
            "--similarity",
            help="What the method optimises. Default: ncc for rigid and affine, lncc in windows of "
            "5 voxels for the deformable ones, the mean absolute error for dip. mi and mind are "
            "for images of different kinds; their start takes mi, that of the others ncc. inr: "
            "what its search and its choice go by (mind).",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the method, such as steps=200, levels=8,4,2 (mm) or "
            "regularity_weight=0.5. May be given several times. fcn: steps=N goes on training "
            "the network on the pair, with the loss that it was trained with.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Of a network, such as 'reglib train fcn' writes; the same as --set weights=FILE. "
            "Default: those that come with reglib.",
        ),
    ] = None,
    nonfinite: Nonfinite = None,
    device: Annotated[
        Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
    ] = Device.AUTO,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all randomness.")] = 0,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the results of an earlier run in DIR; with --pairs, those of other "
            "settings or other files.",
            show_default=False,
        ),
    ] = False,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            metavar="CSV",
            help="Register many pairs instead: a table with the columns moving and fixed, and "
            "where wanted name, moving_mask, fixed_mask, moving_labels, fixed_labels; paths are "
            "relative to its folder. What is done already is skipped, what fails is listed.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="With --pairs: how many processes, each with one pair at a time. Default: as many "
            "as the cores allow.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="With --pairs: threads of each process. Default: OMP_NUM_THREADS, else up to 4.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="ADDRESS",
            help="With --pairs: a scheduler of dask.distributed, such as tcp://host:8786, whose "
            "workers see the same files.",
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="No progress bar and no summary.", show_default=False),
    ] = False,
    debug: Debug = False,
) -> None:
    """Register MOVING to FIXED and write everything into DIR.

    Both are NIfTI images of two or three axes, or pictures, of any size, spacing and orientation:
    their headers say where they are. Colours are registered by their brightness.

    \b
    warped.nii.gz         the moving image on the fixed grid, in its own integer type;
                          .png or .tif where the fixed image is a picture
    warped_labels.nii.gz  the same for --moving-labels
    field.nii.gz          the transform as ITK, ANTs and 3D Slicer apply it
    affine.mat, residual_field.nii.gz  its two parts
    inverse_field.nii.gz  its inverse, where there is one
    report.json           what is needed to repeat the run, and how it went
    report.png            before, after, deformed grid, Jacobian determinant

    Ctrl-C ends the search; the best state so far is written, with exit code 1.

    With --pairs this happens for every row of a table, several at a time (needs the extra
    reglib[scale]): each pair has a folder of its own, summary.csv has a row for each, failed.csv
    lists those that failed, with exit code 1. After Ctrl-C the same command goes on.

    \b
    reglib register --pairs pairs.csv --method svf --out DIR --workers 8
    """  # noqa: D301  # \b keeps the lines of a paragraph
    files = _files(
        {
            "moving": moving,
            "fixed": fixed,
            "moving_labels": moving_labels,
            "fixed_labels": fixed_labels,
            "moving_mask": moving_mask,
            "fixed_mask": fixed_mask,
        },
        {"--workers": workers, "--threads": threads, "--scheduler": scheduler},
        pairs,
    )
    words = list(settings or ())
    if weights is not None:
        words.append(f"weights={weights.absolute()}")  # workers may be in another folder
    if modality is not None:
        words.append(f"modality={modality}")
    wish = Wish(method, transform, start, similarity, tuple(words))
    request = Request(wish, label_mode, nonfinite, device, seed)
    if pairs is not None:
        from reglib.cli import cohort

        cohort.register_pairs(
            pairs,
            request,
            out,
            client=scheduler,
            workers=workers,
            threads=threads,
            force=force,
            quiet=quiet,
        )
        return
    assert files is not None
    where = device_of(device)
    planned = plan_of(request, where)
    with _whole_folder(out, force) as folder:
        command = ["reglib", *context.obj]
        done = register_files(files, request, planned, where, folder, command, quiet=quiet)
    if not quiet:
        print("\n".join(done.summary))
        print(f"Written: {out}")
    if done.result.interrupted:
        say(f"Interrupted: {out} holds the best state so far.")
        raise typer.Exit(1)


def register_files(
    files: Files,
    request: Request,
    planned: Plan,
    where: torch.device,
    folder: Path,
    command: list[str],
    *,
    quiet: bool,
    tell: Callable[[str], None] = say,
) -> Done:
    """Register a pair of files and write everything into a folder.

    Args:
        files: where everything is.
        request: what was asked for.
        planned: the methods that this means.
        where: the device that this means.
        folder: of the results; it is there already, and empty.
        command: words that repeat the run, for the report.
        quiet: no progress bar.
        tell: takes warnings, a sentence each.

    Returns:
        What was found.

    Raises:
        OSError, ValueError: if the files do not hold what is needed, or cannot be written.
    """
    from reglib import registration

    begin = time.perf_counter()
    fingerprints = {k: _fingerprint(p) for k, p in files._asdict().items() if p is not None}
    inputs = _read(files, request.nonfinite, tell)
    _check(inputs, planned, request.wish.method, folder)
    read = time.perf_counter()
    with _seeded(request.seed, where):
        result = _register(inputs, planned, where, quiet)
    found = time.perf_counter()
    measures = _write_images(result, inputs, request.label_mode, folder, files.fixed)
    result = dataclasses.replace(
        result,
        settings={
            **result.settings,
            "notes": [*inputs.notes, *result.settings["notes"]],
            "command": command,
            "options": options_of(request, planned) | {"device": request.device},
            "seed": request.seed,
            "files": fingerprints,
            "timings": {"read": read - begin, "register": found - read},
            "evaluation": measures,
        },
    )
    summary = _summary(result, measures)
    title = f"{request.wish.method}: {summary[0]}"
    _write_report_figure(result, inputs, folder / PICTURE, title)
    result.save(folder)
    if not (folder / registration.INVERSE).exists():
        summary.append("No inverse field was written: report.json says why")
    for method in planned.methods:
        card = getattr(getattr(method, "network", method), "card", None) or {}
        if "trained_on" in card:
            summary.append(f"The network was trained on {card['trained_on']}")
    return Done(result, inputs, measures, summary)


# --- Before ---------------------------------------------------------------------------------


def _files(
    given: dict[str, Path | None], running: dict[str, object], pairs: Path | None
) -> Files | None:
    """The files of a single pair, ``None`` for a table of pairs; raise for what does not fit."""
    named = {name: path for name, path in given.items() if path is not None}
    if pairs is not None:
        if named.keys() & {"moving", "fixed"}:
            raise typer.BadParameter("wanted either MOVING and FIXED or --pairs, got both")
        if named:
            column = next(iter(named))
            raise typer.BadParameter(
                f"wanted the files of each pair in a column {column} of the table",
                param_hint=f"--{column.replace('_', '-')}",
            )
        if running["--scheduler"] is not None:
            for name in ("--workers", "--threads"):
                if running[name] is not None:
                    raise typer.BadParameter(
                        "wanted none with --scheduler, which has its own", param_hint=name
                    )
        return None
    for name, value in running.items():
        if value is not None:
            raise typer.BadParameter("wanted it with --pairs only", param_hint=name)
    for name in ("moving", "fixed"):
        if name not in named:
            raise typer.BadParameter(f"wanted MOVING and FIXED, or --pairs, got no {name.upper()}")
    if "fixed_labels" in named and "moving_labels" not in named:
        raise typer.BadParameter(
            "wanted --moving-labels with it, got none", param_hint="--fixed-labels"
        )
    return Files(**named)


def plan_of(request: Request, where: torch.device) -> Plan:
    """The methods that a request means.

    Raises:
        typer.BadParameter: if a method cannot do what is asked of it.
        OSError, ValueError: if a file of weights cannot be read, or does not hold the network.
    """
    with _seeded(request.seed, where):
        return plan(request.wish, where)


def options_of(request: Request, planned: Plan) -> dict[str, Any]:
    """What decides about the results beside methods, seed and files, as JSON values."""
    path = planned.weights
    weights = {} if path is None else {"weights": _fingerprint(path)["sha256"]}
    return {
        "method": request.wish.method,
        "start": planned.start,
        "label_mode": request.label_mode,
        "nonfinite": request.nonfinite,
        **weights,
    }


def device_of(device: Device) -> torch.device:
    """The device that a word means.

    Raises:
        ValueError: if there is none on this machine.
    """
    import torch

    there = torch.cuda.is_available()
    if device is Device.CUDA and not there:
        raise ValueError("--device: wanted a GPU that CUDA can use, got none on this machine")
    return torch.device("cuda" if there and device is not Device.CPU else "cpu")


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, and those of the caller as they were afterwards."""
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _whole_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A hidden folder that takes the name ``folder`` at the end, or is removed."""
    target = Path(os.path.realpath(folder))
    if target.exists():
        _check_replaceable(folder, force)
    above = next(p for p in target.parents if p.exists())
    part, old = (above / f".{secrets.token_hex(6)}.{suffix}" for suffix in ("part", "old"))
    try:
        part.mkdir()
        yield part
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        try:
            part.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if error.filename is not None else part
        if part != named and part not in named.parents:
            raise
        # The name of the part means nothing to the reader.
        reason = (error.strerror or str(error)).removesuffix(", nothing was written")
        raise OSError(error.errno, f"{reason}, nothing was written", str(folder)) from error
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(folder: Path, force: bool) -> None:
    """Raise unless the folder is empty, or holds nothing but results that may be replaced."""
    from reglib import registration

    if not folder.is_dir():
        raise ValueError(f"{folder}: wanted a folder or a new name, got a file")
    found = sorted(p.name for p in folder.iterdir())
    if not found:
        return
    if not force:
        raise ValueError(
            f"{folder}: wanted a new folder, got one with files in it; --force would replace the "
            "results of an earlier run"
        )
    ours = {registration.FIELD, registration.RESIDUAL, registration.INVERSE}
    ours |= {registration.AFFINE, registration.REPORT, PICTURE}
    ours |= {f"{s}{e}" for s in ("warped", "warped_labels") for e in (".nii.gz", ".png", ".tif")}
    others = [name for name in found if name not in ours]
    if others:
        raise ValueError(
            f"{folder}: wanted nothing but the results of an earlier run, got {', '.join(others)}; "
            "nothing was replaced"
        )


def _read(files: Files, nonfinite: float | None, tell: Callable[[str], None]) -> _Inputs:
    from reglib.data.nifti import read_labels

    def colours(path: Path, image: Image) -> list[str]:
        if image.tensor.shape[1] < 3:
            return []
        return [f"{path}: registered by the brightness of its colours"]

    with warnings.catch_warnings(record=True) as caught:
        moving, kind = images.read(files.moving, nonfinite)
        fixed, _ = images.read(files.fixed, nonfinite)
        labels = [
            None if path is None else read_labels(path)
            for path in (files.moving_labels, files.fixed_labels)
        ]
        masks = [
            None if path is None else images.luminance(images.read(path, nonfinite)[0])
            for path in (files.moving_mask, files.fixed_mask)
        ]
    notes = [str(warning.message) for warning in caught]
    for note in notes:
        tell(f"Warning: {note}")
    for note in colours(files.moving, moving) + colours(files.fixed, fixed):
        tell(f"Note: {note}")
        notes.append(note)
    return _Inputs(
        original=moving,
        kind=kind,
        moving=images.luminance(moving),
        fixed=images.luminance(fixed),
        moving_labels=labels[0],
        fixed_labels=labels[1],
        moving_mask=masks[0],
        fixed_mask=masks[1],
        notes=notes,
    )


def _check(inputs: _Inputs, planned: Plan, method: Name, folder: Path) -> None:
    """Raise for what would only come to light when the registration is done."""
    from reglib import registration
    from reglib.data.nifti import write_field

    fixed, moving = inputs.fixed, inputs.moving
    d = fixed.tensor.ndim - 2
    if moving.tensor.ndim - 2 != d:
        raise ValueError(
            f"MOVING, FIXED: wanted both plane or both volumes, got {moving!r} and {fixed!r}"
        )
    if d not in planned.dimensions:
        wanted = " or ".join(map(str, planned.dimensions))
        raise ValueError(
            f"MOVING, FIXED: wanted images of {wanted} axes for the method {method}, got {fixed!r}"
        )
    if inputs.moving_labels is not None and inputs.moving_labels.tensor.ndim - 2 != d:
        raise ValueError(
            f"--moving-labels: wanted {d} axes as the moving image has, "
            f"got {inputs.moving_labels!r}"
        )
    grids = (
        ("FIXED", fixed, "--fixed-labels", inputs.fixed_labels),
        ("FIXED", fixed, "--fixed-mask", inputs.fixed_mask),
        ("MOVING", moving, "--moving-mask", inputs.moving_mask),
    )
    for name, image, other_name, other in grids:
        if other is not None:
            shape = tuple(image.tensor.shape[2:])
            images.check_grid(other, shape, image.affine, (name, other_name))
    for name, image in (("MOVING", moving), ("FIXED", fixed)):
        low, high = image.tensor.aminmax()
        if low == high:
            raise ValueError(f"{name}: wanted an image with contrast, got {low:g} everywhere")
    # A field on the first voxels meets the conditions that the whole one will have to.
    last = fixed.tensor.shape[-1]
    first = [n if last == 1 else min(n, 2) for n in fixed.tensor.shape[2:]]
    small = fixed.tensor.new_zeros(1, d, *first)
    try:
        write_field(folder / registration.FIELD, small, fixed.affine)
    except ValueError as error:
        raise ValueError(str(error).replace("fixed_affine", "FIXED")) from error
    (folder / registration.FIELD).unlink()


# --- Registering and after ------------------------------------------------------------------


def _register(inputs: _Inputs, planned: Plan, device: torch.device, quiet: bool) -> Registration:
    from reglib import registration

    def there(image: Image | None) -> Any:
        return image and image.to(device)

    return registration.register(
        there(inputs.moving),
        there(inputs.fixed),
        planned.methods,
        moving_mask=there(inputs.moving_mask),
        fixed_mask=there(inputs.fixed_mask),
        progress=False if quiet else None,
    )


def _write_images(
    result: Registration, inputs: _Inputs, label_mode: LabelMode, folder: Path, fixed: Path
) -> dict[str, Any] | None:
    """The warped image and labels; measures of the labels where there are some to compare with."""
    from reglib.data.nifti import PICTURE_FORMATS
    from reglib.objectives.evaluation import evaluate
    from reglib.objectives.metrics import dice

    picture = fixed.name.lower().endswith(tuple(PICTURE_FORMATS))
    # Only a picture holds colours.
    warped = result.apply(inputs.original if picture else inputs.moving)
    images.write_on_grid(folder, "warped", warped, picture=picture, kind=inputs.kind)
    if inputs.moving_labels is None:
        return None
    labels = result.apply_labels(inputs.moving_labels, mode=label_mode)
    images.write_on_grid(folder, "warped_labels", labels, picture=picture)
    if inputs.fixed_labels is None:
        return None
    pair = (labels.tensor.cpu(), inputs.fixed_labels.tensor)
    found = evaluate(labels=pair, spacing=inputs.fixed_labels.spacing)
    assert found.labels is not None
    before = _identity(result).apply_labels(inputs.moving_labels, mode=label_mode)
    overlap = dice(before.tensor.cpu(), pair[1], labels=found.labels)
    return {**as_values(found), "mean_dice_before": float(overlap.nanmean())}


def _identity(result: Registration) -> Registration:
    """The transform that leaves every point of the world where it is, on the same grids."""
    import torch

    return dataclasses.replace(
        result,
        affine=torch.eye(result.affine.shape[1], dtype=torch.float64).unsqueeze(0),
        field=torch.zeros_like(result.field),
    )


def _summary(result: Registration, measures: dict[str, Any] | None) -> list[str]:
    text = f"{result.seconds:.1f} s, folding {float(result.folding):.2%}"
    text += f", NDV {float(result.ndv):.2%}"
    if measures is None:
        return [text]
    mean = measures["mean"]
    after = f"Dice {measures['mean_dice_before']:.3f} before, {mean['dice']:.3f} after"
    return [f"{text}, {after}"]


def _write_report_figure(result: Registration, inputs: _Inputs, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    from reglib.data.files import write_bytes
    from reglib.show.report import registration_report

    field = result.field
    if not bool(field.any()):
        # Nothing but the affine part is left to be shown, in voxels of the fixed grid.
        field = result.whole_field(result.fixed_affine)
    # From 0 up, so that beyond its border the moving image is as dark as it ever is.
    tensor = inputs.moving.tensor - inputs.moving.tensor.min()
    moving = dataclasses.replace(inputs.moving, tensor=tensor)
    figure = registration_report(
        _identity(result).apply(moving, padding="zeros").tensor,
        inputs.fixed.tensor,
        result.apply(moving, padding="zeros").tensor,
        field,
        result.fixed_affine,
        title=title,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)  # a process may draw many
    write_bytes(path, content.getvalue())


def _fingerprint(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        return {"name": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
