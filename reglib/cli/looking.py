"""``reglib info`` and ``reglib fetch``: what a file is, and where data sets are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reglib.cli import images
from reglib.cli.running import Debug, in_sentences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@in_sentences
def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Image, label map, displacement field, weights (.safetensors), or folder of "
            "'reglib register'.",
            show_default=False,
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", show_default=False)
    ] = False,
    debug: Debug = False,
) -> None:
    """Say what a file holds and where its voxels are; of weights, what their card says.

    The axes are those of the file, in its order: for 'LAS' the first goes to the left, the second
    to the front, the third up. The affine maps voxel indices to millimetres (right, front, up).
    """
    found = _folder(path) if path.is_dir() else _file(path)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        lines = [_text(row) for row in value] if name.startswith("affine") else [_text(value)]
        for i, line in enumerate(lines):
            print(f"{name if i == 0 else '':<{width}}  {line}".rstrip())


def _text(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        texts = [_text(v) for v in value]
        return " ".join(f"{t:>10}" for t in texts) if len(texts) > 3 else "  ".join(texts)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _grid(shape: Sequence[int], affine: Tensor) -> dict[str, Any]:
    from reglib.registration import describe_grid

    found = describe_grid(affine, shape)
    del found["affine"]  # comes last, in the order of the command
    return found


def _weights(path: Path) -> dict[str, Any]:
    from reglib.weights import load_weights

    state, card = load_weights(path)
    types = sorted({str(x.dtype).removeprefix("torch.") for x in state.values()})
    return {
        "file": str(path),
        "kind": "weights",
        "tensors": len(state),
        "numbers": sum(x.numel() for x in state.values()),
        "type": ", ".join(types),
        **card,
    }


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return _weights(path)
    from reglib.data.nifti import read_field, read_image

    try:
        image = read_image(path, dtype=None, nonfinite=float("nan"))
    except ValueError as error:
        try:
            u, affine = read_field(path)
        except ValueError:
            raise error from None
        return _field(path, u, affine)
    tensor = image.tensor
    channels = tensor.shape[1]
    grid = _grid(tuple(tensor.shape[2:]), image.affine)
    finite = tensor[tensor.isfinite()] if tensor.is_floating_point() else tensor
    limits = [finite.double().min().item(), finite.double().max().item()] if len(finite) else None
    if limits is not None and not tensor.is_floating_point():
        limits = [int(v) for v in limits]
    return {
        "file": str(path),
        "kind": "image",
        **grid,
        **({"channels": channels} if channels > 1 else {}),
        "type": str(tensor.dtype).removeprefix("torch."),
        "range": limits,
        "nonfinite": tensor.numel() - finite.numel(),
        "affine": image.affine.tolist(),
    }


def _field(path: Path, u: Tensor, affine: Tensor) -> dict[str, Any]:
    d = u.shape[1]
    linear = affine[:d, :d].to(u)
    length = (linear @ u[0].flatten(1)).norm(dim=0)
    transform = images.from_field(u, affine)
    return {
        "file": str(path),
        "kind": "displacement field",
        **_grid(tuple(u.shape[2:]), affine),
        "type": str(u.dtype).removeprefix("torch."),
        "mean length (mm)": float(length.mean()),
        "largest length (mm)": float(length.max()),
        "folding": float(transform.folding),
        "ndv": float(transform.ndv),
        "affine": affine.tolist(),
    }


def _folder(path: Path) -> dict[str, Any]:
    loaded = images.read_transform(path)
    methods = [m.get("name", "") for m in loaded.settings.get("method", [])]
    fixed = _grid(tuple(loaded.field.shape[2:]), loaded.fixed_affine)
    moving = _grid(loaded.moving_shape, loaded.moving_affine)
    return {
        "file": str(path),
        "kind": "registration",
        "method": ", then ".join(methods),
        **{f"fixed {name}": value for name, value in fixed.items()},
        **{f"moving {name}": value for name, value in moving.items()},
        "folding": float(loaded.folding),
        "ndv": float(loaded.ndv),
        "seconds": loaded.seconds,
        "interrupted": loaded.interrupted,
        "files": ", ".join(sorted(p.name for p in path.iterdir())),
        "affine": loaded.affine[0].tolist(),
    }


@in_sentences
def fetch(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Name of a data set.", show_default=False),
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the data sets.", show_default=False)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar.", show_default=False)
    ] = False,
    debug: Debug = False,
) -> None:
    """Download a data set once and print its folder.

    $REGLIB_DATA may name a folder that holds data sets already. What is downloaded goes to
    $REGLIB_CACHE, or to where the system keeps caches.
    """
    if show_list == (name is not None):
        raise typer.BadParameter("wanted either NAME or --list")
    from reglib.data import assets

    if name is None:
        for known, line in assets.available().items():
            print(f"{known:<16}  {line}")
        return
    try:
        assets.describe(name)
    except ValueError as error:  # says which names there are
        raise typer.BadParameter(str(error).removeprefix("name: "), param_hint="NAME") from error
    print(assets.fetch(name, progress=not quiet))
