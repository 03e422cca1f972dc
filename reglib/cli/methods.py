"""Names of methods and settings: the only place where words become functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from reglib.methods.pair import Method

T = TypeVar("T")


class Name(StrEnum):
    """What ``--method`` takes."""

    RIGID = "rigid"
    AFFINE = "affine"
    DISPLACEMENT = "displacement"
    SVF = "svf"
    BSPLINE = "bspline"
    GEOREG = "georeg"


class Transform(StrEnum):
    """What kinds of transform there are to be found."""

    RIGID = "rigid"
    AFFINE = "affine"
    DEFORMABLE = "deformable"


class Start(StrEnum):
    """What may run before the method itself."""

    NONE = "none"
    RIGID = "rigid"
    AFFINE = "affine"


class Similarity(StrEnum):
    """What ``--similarity`` takes."""

    MSE = "mse"
    NCC = "ncc"
    LNCC = "lncc"
    MI = "mi"
    MIND = "mind"


class Wish(NamedTuple):
    """What was asked for; ``None`` leaves it to the method.

    Attributes:
        method: by name.
        transform: kind of transform.
        start: what runs before.
        similarity: of the method itself; what runs before it takes ``mi`` for ``mi`` and ``mind``,
            else its own.
        settings: of the method itself, by name.
    """

    method: Name
    transform: Transform | None = None
    start: Start | None = None
    similarity: Similarity | None = None
    settings: Sequence[str] = ()


class Plan(NamedTuple):
    """Methods in the order in which they run.

    Attributes:
        methods: for :func:`reglib.registration.register`.
        dimensions: of the images that they take.
        start: the name of what runs first.
    """

    methods: list[Method | nn.Module]
    dimensions: tuple[int, ...]
    start: Start


class _Kind(NamedTuple):
    """A method: how it is made, what it finds, and what it starts from unless told otherwise."""

    make: Callable[[dict[str, Any], torch.device], Method | nn.Module]
    finds: Transform
    start: Start = Start.NONE
    starts: tuple[Start, ...] = tuple(Start)
    dimensions: tuple[int, ...] = (2, 3)
    classical: bool = True


def _rigid(settings: dict[str, Any], _: torch.device) -> Method:
    from reglib.methods.classical import Rigid

    return _made(Rigid, settings)


def _affine(settings: dict[str, Any], _: torch.device) -> Method:
    from reglib.methods.classical import Affine

    return _made(Affine, settings)


def _displacement(settings: dict[str, Any], _: torch.device) -> Method:
    from reglib.methods.classical import Displacement

    return _made(Displacement, settings)


def _velocity(settings: dict[str, Any], _: torch.device) -> Method:
    from reglib.methods.classical import Velocity

    return _made(Velocity, settings)


def _bspline(settings: dict[str, Any], _: torch.device) -> Method:
    from reglib.methods.classical import BSpline

    return _made(BSpline, settings)


def _georeg(settings: dict[str, Any], device: torch.device) -> nn.Module:
    from reglib.methods.georeg import load_pretrained

    if settings:
        raise ValueError(f"wanted none, as it is trained already, got {', '.join(settings)}")
    return load_pretrained().to(device)


def _made(method: type[T], settings: dict[str, Any]) -> T:
    """A method with settings, of which those that were typed in are text."""
    known = {f.name: str(f.type) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    unknown = [name for name in settings if name not in known]
    if unknown:
        # Functions cannot be typed in.
        words = [name for name in known if name not in ("similarity", "regularity")]
        raise ValueError(f"wanted settings out of {', '.join(words)}, got {', '.join(unknown)}")
    values = {name: _value(x, known[name]) for name, x in settings.items()}
    return method(**values)


def _value(value: Any, kind: str) -> Any:
    """What a text means for a setting of a type, given by name; anything but text stays."""
    if not isinstance(value, str):
        return value
    if kind.startswith("Sequence"):
        return tuple(_value(part, "number") for part in value.split(","))
    try:
        return json.loads(value)
    except ValueError:
        return value


METHODS: dict[Name, _Kind] = {
    Name.RIGID: _Kind(_rigid, Transform.RIGID, starts=(Start.NONE,)),
    Name.AFFINE: _Kind(_affine, Transform.AFFINE, starts=(Start.NONE, Start.RIGID)),
    Name.DISPLACEMENT: _Kind(_displacement, Transform.DEFORMABLE, Start.AFFINE),
    Name.SVF: _Kind(_velocity, Transform.DEFORMABLE, Start.AFFINE),
    Name.BSPLINE: _Kind(_bspline, Transform.DEFORMABLE, Start.AFFINE),
    Name.GEOREG: _Kind(_georeg, Transform.DEFORMABLE, dimensions=(2,), classical=False),
}


def plan(wish: Wish, device: torch.device) -> Plan:
    """Make the methods that were asked for.

    Args:
        wish: what was asked for.
        device: where networks shall be.

    Returns:
        The methods, and what they take.

    Raises:
        typer.BadParameter: if a method cannot do what is asked of it.
    """
    name, kind = wish.method, METHODS[wish.method]
    if wish.transform not in (None, kind.finds):
        others = ", ".join(n for n, k in METHODS.items() if k.finds is wish.transform)
        raise typer.BadParameter(
            f"wanted {kind.finds}, which is what the method {name} finds, got {wish.transform}"
            f" (found by {others})",
            param_hint="--transform",
        )
    start = kind.start if wish.start is None else wish.start
    if start not in kind.starts:
        choices = " or ".join(kind.starts)
        raise typer.BadParameter(
            f"wanted {choices} for the method {name}, got {start}", param_hint="--start"
        )
    methods: list[Method | nn.Module] = []
    if start is not Start.NONE:
        # Images of different kinds need a measure that allows for it from the beginning.
        other_kind = wish.similarity in (Similarity.MI, Similarity.MIND)
        first = {"similarity": similarity_function(Similarity.MI)} if other_kind else {}
        methods.append((_rigid if start is Start.RIGID else _affine)(first, device))
    settings: dict[str, Any] = dict(_split(text) for text in wish.settings)
    if wish.similarity is not None:
        if not kind.classical:
            raise typer.BadParameter(
                f"wanted none for the method {name}, which is trained already, "
                f"got {wish.similarity}",
                param_hint="--similarity",
            )
        settings["similarity"] = similarity_function(wish.similarity)
    try:
        methods.append(kind.make(settings, device))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"method {name}: {error}", param_hint="--set") from error
    return Plan(methods, kind.dimensions, start)


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"wanted NAME=VALUE, got {text!r}", param_hint="--set")
    return name, value


def similarity_function(name: Similarity) -> Callable[..., torch.Tensor]:
    """The similarity that a word means."""
    from reglib.objectives import mind, similarity

    return {
        Similarity.MSE: similarity.mse,
        Similarity.NCC: similarity.ncc,
        Similarity.LNCC: similarity.lncc,
        Similarity.MI: similarity.mutual_information,
        Similarity.MIND: mind.mind,
    }[name]
