"""Names of methods and settings: the only place where words become functions."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
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
    INR = "inr"
    GEOREG = "georeg"
    FCN = "fcn"
    DIP = "dip"


class Transform(StrEnum):
    """What kinds of transform there are to be found."""

    RIGID = "rigid"
    AFFINE = "affine"
    DEFORMABLE = "deformable"


class Modality(StrEnum):
    """What ``--modality`` takes."""

    SINGLE = "single"
    MULTI = "multi"


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
        settings: of the method itself, by name; ``weights`` is a file, ``pretrained`` the name of
            a network of the package.
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
        weights: the file of the network's weights; ``None`` for those of the package, or none.
    """

    methods: list[Method | nn.Module]
    dimensions: tuple[int, ...]
    start: Start
    weights: Path | None = None


class _Loaded(NamedTuple):
    """A trained network, and how many axes its images have."""

    network: nn.Module
    dimensions: int


class _Kind(NamedTuple):
    """A method: how it is made, what it finds, and what it starts from unless told otherwise.

    What finds something else ``also`` is told which in its settings. What has weights says how they
    are read, from a file or out of the package, where there may be several: the first of the names
    in ``pretrained`` is taken unless another is asked for.
    """

    make: Callable[[dict[str, Any], nn.Module | None], Method | nn.Module]
    finds: Transform
    start: Start = Start.NONE
    starts: tuple[Start, ...] = tuple(Start)
    compares: bool = True
    load: Callable[[str | None, str | None], _Loaded] | None = None
    also: tuple[Transform, ...] = ()
    pretrained: tuple[str, ...] = ()


def _rigid(settings: dict[str, Any], _: nn.Module | None = None) -> Method:
    from reglib.methods.classical import Rigid

    return _made(Rigid, settings)


def _affine(settings: dict[str, Any], _: nn.Module | None = None) -> Method:
    from reglib.methods.classical import Affine

    return _made(Affine, settings)


def _displacement(settings: dict[str, Any], _: nn.Module | None) -> Method:
    from reglib.methods.classical import Displacement

    return _made(Displacement, settings)


def _velocity(settings: dict[str, Any], _: nn.Module | None) -> Method:
    from reglib.methods.classical import Velocity

    return _made(Velocity, settings)


def _bspline(settings: dict[str, Any], _: nn.Module | None) -> Method:
    from reglib.methods.classical import BSpline

    return _made(BSpline, settings)


def _inr(settings: dict[str, Any], _: nn.Module | None) -> Method:
    import torch

    from reglib.methods.inr import PRESETS

    deformable = settings.pop("transform") is Transform.DEFORMABLE
    fitting = [name for name, preset in PRESETS.items() if preset.rigid is not deformable]
    name = settings.pop("preset", "deformable" if deformable else "robust")
    if name not in fitting:
        raise ValueError(f"preset: wanted one of {', '.join(fitting)}, got {name}")
    preset = PRESETS[name]
    # That of --seed: plans are made under it.
    values = _typed(type(preset), {"seed": torch.initial_seed()} | settings)
    if "similarity" in values and preset.search is not None:
        values["search"] = dataclasses.replace(preset.search, similarity=values["similarity"])
    return dataclasses.replace(preset, **values)


def _georeg(settings: dict[str, Any], network: nn.Module | None) -> nn.Module:
    assert network is not None
    if settings:
        raise ValueError(f"wanted none, as it is trained already, got {', '.join(settings)}")
    return network


def _load_georeg(path: str | None, name: str | None) -> _Loaded:
    from reglib.methods import georeg

    own = name or GEOREG_NETWORKS[0]
    network = georeg.load_pretrained(own) if path is None else georeg.load(path)
    return _Loaded(network, network.dimensions)


def _fcn(settings: dict[str, Any], network: nn.Module | None) -> Method | nn.Module:
    """The network as it is, or, given a number of steps, trained on the pair as well."""
    from reglib.methods.fcn import ComposedFCN, Instance

    assert network is not None
    if not settings:
        return network
    known = ("steps", "lr", "regularity_weight")
    unknown = [x for x in settings if x not in known and not callable(settings[x])]
    if unknown:
        raise ValueError(f"wanted settings out of {', '.join(known)}, got {', '.join(unknown)}")
    if "steps" not in settings:
        raise ValueError(
            "wanted steps=N as well, as the network is trained on the pair only then, "
            f"got {', '.join(settings)}"
        )
    values = {name: _value(x, "number") for name, x in settings.items()}
    card: Any = network.card
    words = fcn_loss_words(isinstance(network, ComposedFCN)) | card.get("loss", {})
    own = {name: values.pop(name) for name in ("similarity", "regularity_weight") if name in values}
    return Instance(network, fcn_loss(words | own), **values)


def _load_fcn(path: str | None, _: str | None) -> _Loaded:
    from reglib.methods import fcn

    network = fcn.load_pretrained() if path is None else fcn.load(path)
    return _Loaded(network, network.settings.dimensions)


def _dip(settings: dict[str, Any], _: nn.Module | None) -> Method:
    """A preset, and what differs from it."""
    import torch

    from reglib.methods.dip import DIP, PRESETS

    preset = settings.pop("preset", "fast")
    if preset not in PRESETS:
        raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {preset}")
    own = {f.name: getattr(PRESETS[preset], f.name) for f in dataclasses.fields(DIP)}
    own["seed"] = torch.initial_seed()  # what is planned is planned under the seed of the request
    return _made(DIP, own | settings)


def fcn_loss_words(composed: bool) -> dict[str, Any]:
    """The loss that an FCN is trained with unless told otherwise, as JSON values.

    Args:
        composed: whether it is a :class:`reglib.methods.fcn.ComposedFCN`; else the paper's, the
            weight of whose regularity is not stated there.
    """
    if composed:
        return {"similarity": "lncc", "regularity": "diffusion", "regularity_weight": 1.0}
    return {"similarity": "ncc", "regularity": "total_variation", "regularity_weight": 0.03}


def fcn_loss(words: Mapping[str, Any]) -> Callable[..., dict[str, torch.Tensor]]:
    """The loss of an FCN that names mean.

    Args:
        words: as of :func:`reglib.cli.methods.fcn_loss_words`; the similarity may be a function.

    Raises:
        TypeError, ValueError: if a name is none, or the weight is no number of at least 0.
    """
    from reglib.checks import check_numbers
    from reglib.methods.fcn import objective
    from reglib.objectives import regularity

    similarity, smooth = words["similarity"], words["regularity"]
    regularities = {
        "total_variation": regularity.total_variation,
        "diffusion": regularity.diffusion,
    }
    if smooth not in regularities:
        raise ValueError(f"regularity: wanted one of {', '.join(regularities)}, got {smooth!r}")
    [weight] = check_numbers([words["regularity_weight"]], "regularity_weight")
    if not 0 <= weight < math.inf:
        raise ValueError(f"regularity_weight: wanted a number of at least 0, got {weight}")
    if not callable(similarity):
        similarity = similarity_function(Similarity(similarity))
    return functools.partial(
        objective,
        similarity=similarity,
        regularity=regularities[smooth],
        regularity_weight=weight,
    )


def _made(method: type[T], settings: dict[str, Any]) -> T:
    """A method with settings, of which those that were typed in are text."""
    return method(**_typed(method, settings))


def _typed(method: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method with what their text means.

    A similarity that is the method's own default is that with the default's windows.
    """
    known = {f.name: str(f.type) for f in dataclasses.fields(method)}
    unknown = [name for name in settings if name not in known]
    if unknown:
        # Neither functions nor networks can be typed in.
        functions = ("similarity", "regularity", "network", "image", "motion", "search")
        words = [name for name in known if name not in functions]
        raise ValueError(f"wanted settings out of {', '.join(words)}, got {', '.join(unknown)}")
    found = {name: _value(x, known[name]) for name, x in settings.items()}
    default = getattr(method, "similarity", None)
    if isinstance(default, functools.partial) and found.get("similarity") is default.func:
        found["similarity"] = default
    return found


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


#: As in :data:`reglib.methods.georeg.PRETRAINED`, which takes a second to import.
GEOREG_NETWORKS = ("mnist", "brain_slices", "brain_volumes")

METHODS: dict[Name, _Kind] = {
    Name.RIGID: _Kind(_rigid, Transform.RIGID, starts=(Start.NONE,)),
    Name.AFFINE: _Kind(_affine, Transform.AFFINE, starts=(Start.NONE, Start.RIGID)),
    Name.DISPLACEMENT: _Kind(_displacement, Transform.DEFORMABLE, Start.AFFINE),
    Name.SVF: _Kind(_velocity, Transform.DEFORMABLE, Start.AFFINE),
    Name.BSPLINE: _Kind(_bspline, Transform.DEFORMABLE, Start.AFFINE),
    Name.INR: _Kind(_inr, Transform.RIGID, also=(Transform.DEFORMABLE,)),
    Name.GEOREG: _Kind(
        _georeg,
        Transform.DEFORMABLE,
        compares=False,
        load=_load_georeg,
        pretrained=GEOREG_NETWORKS,
    ),
    Name.FCN: _Kind(_fcn, Transform.DEFORMABLE, load=_load_fcn),
    Name.DIP: _Kind(_dip, Transform.DEFORMABLE, Start.AFFINE),
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
        OSError, ValueError: if a file of weights cannot be read, or does not hold the network.
    """
    name, kind = wish.method, METHODS[wish.method]
    if wish.transform not in (None, kind.finds, *kind.also):
        others = ", ".join(n for n, k in METHODS.items() if wish.transform in (k.finds, *k.also))
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
    settings: dict[str, Any] = dict(_split(text) for text in wish.settings)
    if "modality" in settings and name is not Name.INR:
        raise typer.BadParameter(
            f"wanted none for the method {name}, got {settings['modality']}",
            param_hint="--modality",
        )
    methods: list[Method | nn.Module] = []
    if start is not Start.NONE:
        # Images of different kinds need a measure that allows for it from the beginning.
        other_kind = wish.similarity in (Similarity.MI, Similarity.MIND)
        other_kind |= settings.get("modality") == Modality.MULTI
        first = {"similarity": similarity_function(Similarity.MI)} if other_kind else {}
        methods.append((_rigid if start is Start.RIGID else _affine)(first))
    weights = settings.pop("weights", None)
    if weights is not None and kind.load is None:
        raise typer.BadParameter(
            f"wanted none for the method {name}, which has none, got {weights}",
            param_hint="--weights",
        )
    pretrained = settings.pop("pretrained", None)
    if pretrained is not None and (pretrained not in kind.pretrained or weights is not None):
        choices = " or ".join(kind.pretrained) or "none"
        raise typer.BadParameter(
            f"pretrained: wanted {choices} for the method {name}, and no weights beside it, "
            f"got {pretrained}",
            param_hint="--set",
        )
    if wish.similarity is not None:
        if not kind.compares:
            raise typer.BadParameter(
                f"wanted none for the method {name}, which is trained already, "
                f"got {wish.similarity}",
                param_hint="--similarity",
            )
        settings["similarity"] = similarity_function(wish.similarity)
    if kind.also:
        settings["transform"] = wish.transform or kind.finds
    loaded = None if kind.load is None else kind.load(weights, pretrained)
    network = None if loaded is None else loaded.network.to(device)
    try:
        methods.append(kind.make(settings, network))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"method {name}: {error}", param_hint="--set") from error
    dimensions = (2, 3) if loaded is None else (loaded.dimensions,)
    return Plan(methods, dimensions, start, None if weights is None else Path(weights))


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
