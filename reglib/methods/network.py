"""A network as a method: its input contract is met, and its field is brought back.

Weights say in their card what they were trained on, under ``"input"``: ``channels``; ``range``,
the least and the largest intensity; ``quantile``, the share of an image's voxels that lie within
it, while the brightest ones are clipped to its end (1 where it is missing); ``size_multiple``; and,
where they matter, ``orientation`` (such as ``"RAS"``) and ``spacing`` (mm per voxel along those
axes); ``tells_spacing``, true for a network that works with any spacing and wants to know it, as
its keyword ``spacing``; ``size``, for a network that knows one field of view only (beside
``spacing``): its voxels along those axes, laid around the middle of what is bright in the moving
image, seen through the pair's own transform. Whatever a pair is, it is resampled to that, run
through the network, and the field is carried back to the fixed grid; beyond a field of view of one
``size`` it stays as it is at the edge, and the report says so where a percent or more of what is
bright in a fixed image lies there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reglib.checks import check_field, check_finite, check_numbers, check_positive_int, check_shape
from reglib.data.conform import conform_grid, resample
from reglib.geometry.affine import affine_field
from reglib.geometry.fields import carry_field, compose, invert_points
from reglib.geometry.grid import no_autocast, sample
from reglib.geometry.sampling import transform_grid
from reglib.methods.pair import Iterate, Pair

_PLACING = ("orientation", "spacing", "size_multiple", "size")
_KNOWN = ("channels", "range", "quantile", "tells_spacing", *_PLACING)
#: Bright is what exceeds the least intensity by this share of how far the quantile after it, of all
#: voxels that exceed it, does. It begins and ends with planes that have this share of the fullest
#: one's bright voxels. So specks in a volume do not count, however bright.
BRIGHT, BRIGHTEST, FULL = 0.1, 0.99, 0.01
#: The report says how much of what is bright in a fixed image lies beyond the field of view, in
#: whole percents: from the first of them on.
NOTED = 0.01


class Network:
    """The method that calls ``network(moving, fixed)`` once.

    It starts from the pair's own transform: the network sees the moving image through it, and
    finds what remains. (With ``size`` in the contract there is a call for each pair of a batch.) A
    module is evaluated in its own precision and without dropout, whatever mode it was left in.

    Args:
        network: takes ``moving`` and ``fixed``, both ``(B, C, *S)`` on one grid, and returns a
            displacement ``(B, D, *S)`` in voxels, or an object whose ``field`` is one.
        contract: what it takes, with the keys named above; ``None`` reads ``network.card["input"]``
            where that exists, and else leaves the images as they are.

    Raises:
        TypeError, ValueError: if ``network`` cannot be called or the contract is malformed.
    """

    def __init__(
        self, network: Callable[..., Any], contract: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(network):
            raise TypeError(f"network: wanted a callable, got {type(network).__name__}")
        if contract is None:
            contract = (getattr(network, "card", None) or {}).get("input", {})
        if not isinstance(contract, Mapping):
            raise TypeError(f"contract: wanted a mapping, got {contract!r}")
        unknown = sorted(contract.keys() - set(_KNOWN))
        if unknown:
            raise ValueError(f"contract: wanted keys out of {', '.join(_KNOWN)}, got {unknown}")
        self.network = network
        self.contract = dict(contract)
        multiple = self.contract.get("size_multiple", 1)
        check_positive_int(multiple, "size_multiple")
        if "size" in self.contract:
            check_shape(self.contract["size"], (2, 3), "size")
            if any(n % multiple for n in self.contract["size"]):
                raise ValueError(
                    f"size: wanted multiples of size_multiple, {multiple}, "
                    f"got {self.contract['size']}"
                )
        limits = check_numbers(self.contract.get("range", (0.0, 1.0)), "range")
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"range: wanted two ascending numbers, got {limits}")
        [quantile] = check_numbers([self.contract.get("quantile", 1.0)], "quantile")
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile: wanted a number above 0 and at most 1, got {quantile}")
        if not isinstance(self.contract.get("tells_spacing", False), bool):
            raise TypeError(
                f"tells_spacing: wanted true or false, got {self.contract['tells_spacing']!r}"
            )
        if "quantile" in self.contract and "range" not in self.contract:
            raise ValueError("quantile: wanted a range beside it, got none")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Run the network; yields once."""
        yield self._run(pair)

    @torch.no_grad()
    def _run(self, pair: Pair) -> Iterate:
        weight = self._check(pair)
        shape = tuple(pair.fixed.shape[2:])
        affine, new_shape = conform_grid(
            pair.fixed_affine,
            shape,
            orientation=self.contract.get("orientation"),
            spacing=self.contract.get("spacing"),
            multiple=self.contract.get("size_multiple", 1),
        )
        places: list[tuple[slice, Tensor, tuple[int, ...]]] = [(slice(None), affine, new_shape)]
        lost = 0.0
        if "size" in self.contract:
            # Each pair by itself: heads lie at different places.
            views = [self._field_of_view(pair, n, affine) for n in range(len(pair.fixed))]
            places = [(slice(n, n + 1), *view) for n, view in enumerate(views)]
            images = zip(pair.fixed, views, strict=True)
            lost = max(_beyond(image, pair.fixed_affine, *view) for image, view in images)
        found = torch.cat([self._found(pair, *place, weight) for place in places])
        total = compose(pair.field, found)
        return Iterate(
            stage="network",
            terms={},
            active=torch.zeros(len(found), dtype=torch.bool),
            transform=lambda: (pair.affine, total),
            notes=self._notes(pair, *places[0][1:], lost),
        )

    def _field_of_view(
        self, pair: Pair, item: int, affine: Tensor
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The one that the network knows, with the steps of ``affine``: its affine and size."""
        d = len(affine) - 1
        size = tuple(self.contract["size"])
        check_shape(size, (d,), "size")
        middle = torch.cat([_middle(pair.moving[item].amax(0)), torch.ones(1).double()])
        fixed = pair.fixed_affine
        voxel = torch.linalg.solve(pair.affine[item] @ fixed, pair.moving_affine @ middle)[:d]
        if bool(pair.field[item].any()):
            u = pair.field[item : item + 1]
            voxel = invert_points(voxel.to(u).view(1, 1, d), u).fixed_points[0, 0].to(voxel)
        # Steps in voxels of the fixed grid, whose axes are parallel: one number a column.
        steps = torch.linalg.solve(fixed[:d, :d], affine[:d, :d])
        axes = steps.abs().argmax(0)
        step = steps[axes, range(d)]
        # The outermost voxels begin where voxels of the fixed grid do, whatever margin these have.
        first = step.sign() * voxel[axes] - step.abs() * (voxel.new_tensor(size) - 1) / 2
        inset = (step.abs() - 1) / 2
        first = (first - inset + 0.5 + 1e-3).floor() + inset
        corner = torch.empty_like(voxel)
        corner[axes] = step.sign() * first
        new = affine.clone()
        new[:d, d] = fixed[:d, :d] @ corner + fixed[:d, d]
        return new, size

    def _found(
        self,
        pair: Pair,
        items: slice,
        affine: Tensor,
        new_shape: tuple[int, ...],
        weight: Tensor | None,
    ) -> Tensor:
        """What the network finds of some pairs on its grid, on the fixed grid."""
        start = None
        if bool(pair.field[items].any()):
            start = _read_on(pair.field[items], pair.fixed_affine, affine, new_shape)
        fixed = self._brought(pair.fixed[items], pair.fixed_affine, affine, new_shape)
        moving = self._brought(
            pair.moving[items],
            pair.moving_affine,
            affine,
            new_shape,
            matrix=pair.affine[items],
            field=start,
        )
        if weight is not None:
            moving, fixed = moving.to(weight.dtype), fixed.to(weight.dtype)
        told: dict[str, Any] = {}
        if self.contract.get("tells_spacing", False):
            told["spacing"] = affine[:-1, :-1].norm(dim=0).tolist()
        with _evaluating(self.network):
            out = self.network(moving, fixed, **told)
        field = out if isinstance(out, Tensor) else out.field
        check_field(field, "network's field")
        if tuple(field.shape[2:]) != new_shape or len(field) != len(fixed):
            raise ValueError(
                f"network: wanted a field for {len(fixed)} pair(s) on a grid of {new_shape}, "
                f"got shape {tuple(field.shape)}"
            )
        check_finite(field, "network's field")
        shape = tuple(pair.fixed.shape[2:])
        if "size" in self.contract:
            return _read_on(field.to(pair.field), affine, pair.fixed_affine, shape)
        return carry_field(field.to(pair.field), affine, pair.fixed_affine, shape)

    def _check(self, pair: Pair) -> Tensor | None:
        """Raise unless the network can take the images; one of its weights, if it has any."""
        channels = self.contract.get("channels", pair.fixed.shape[1])
        if pair.fixed.shape[1] != channels:
            raise ValueError(
                f"moving, fixed: wanted images of {channels} channel(s) for this network, "
                f"got {pair.fixed.shape[1]}"
            )
        if not isinstance(self.network, nn.Module):
            return None
        weights = (p for p in self.network.parameters() if p.is_floating_point())
        weight = next(weights, None)
        if weight is not None and weight.device != pair.fixed.device:
            raise ValueError(
                f"network: wanted it on {pair.fixed.device}, where the images are, "
                f"got it on {weight.device}"
            )
        return weight

    def _brought(
        self,
        image: Tensor,
        affine: Tensor,
        new_affine: Tensor,
        new_shape: Sequence[int],
        *,
        matrix: Tensor | None = None,
        field: Tensor | None = None,
    ) -> Tensor:
        """An image in the contract's intensities on its grid, the least of them around it."""
        low, scaled = 0.0, image
        if "range" in self.contract:
            # Each image's own, over all channels.
            low, high = self.contract["range"]
            least, largest = self._ends(image.flatten(1))
            view = (-1, *(1,) * (image.ndim - 1))
            extent = (largest - least).where(largest > least, torch.ones_like(least))
            shares = ((image - least.view(view)) / extent.view(view)).clamp(max=1)
            scaled = shares * (high - low)
        return resample(scaled, affine, new_affine, new_shape, matrix=matrix, field=field) + low

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The intensities ``(B,)`` that become the ends of ``range``, of voxels ``(B, N)``."""
        least, largest = values.aminmax(dim=1)
        if "quantile" in self.contract:
            # Not torch.quantile, which refuses large volumes.
            rank = math.ceil(self.contract["quantile"] * values.shape[1])
            found = values.kthvalue(rank, 1).values
            # Where nearly all of an image is background, its extremes are all there is.
            largest = found.where(found > least, largest)
        return least, largest

    def _notes(
        self, pair: Pair, affine: Tensor, new_shape: Sequence[int], lost: float
    ) -> tuple[str, ...]:
        """What was done to the images, for the report.

        ``lost`` is the largest share of what is bright in a fixed image that lies beyond its field
        of view.
        """
        shape = tuple(pair.fixed.shape[2:])
        notes = []
        if "range" in self.contract:
            low, high = self.contract["range"]
            quantile = self.contract.get("quantile", 1.0)
            clipped = f", those above the quantile {quantile:g} clipped" if quantile < 1 else ""
            notes.append(f"intensities of each image scaled to {low:g} .. {high:g}{clipped}")
        kind = ", ".join(f"{k} {self.contract[k]}" for k in _PLACING if k in self.contract)
        if "size" in self.contract:
            notes.append(
                f"the network knows one field of view, {_size(new_shape)} ({kind}), laid "
                "around what is bright in each moving image; beyond, the field is that at its edge"
            )
            if lost >= NOTED:
                one = "in the fixed image" if len(pair.fixed) == 1 else "in a fixed image"
                most = "" if len(pair.fixed) == 1 else "up to "
                notes.append(
                    f"{most}{lost:.0%} of what is bright {one} lies beyond the field of view"
                )
        elif shape == tuple(new_shape) and torch.equal(affine, pair.fixed_affine):
            notes.append("fixed grid as the network takes it")
        else:
            notes.append(
                f"fixed grid {_size(shape)} brought to {_size(new_shape)} for the network "
                f"({kind}), the least intensity around it; its field brought back"
            )
        masks = [m for m in ("moving", "fixed") if getattr(pair, f"{m}_mask") is not None]
        if masks:
            notes.append(f"the network does not use the {' and '.join(masks)} mask")
        return tuple(notes)


@contextlib.contextmanager
def _evaluating(network: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode inside, the mode of every part as it was afterwards."""
    parts = network.modules() if isinstance(network, nn.Module) else ()
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _bright(image: Tensor) -> Tensor:
    """Where an image is bright, bool; everywhere if it is the same everywhere."""
    least = image.min()
    above = image[image > least]
    if not len(above):
        return torch.ones_like(image, dtype=torch.bool)
    brightest = above.kthvalue(math.ceil(BRIGHTEST * len(above))).values
    return image >= least + BRIGHT * (brightest - least)


def _middle(image: Tensor) -> Tensor:
    """Of what is bright in an image ``(*S)``: its voxel ``(D,)``, float64 on the CPU."""
    bright, found = _bright(image), []
    for axis in range(image.ndim):
        others = [k for k in range(image.ndim) if k != axis]
        counts = bright.sum(others)
        planes = (counts >= FULL * counts.max()).nonzero()
        found.append(float(planes[0] + planes[-1]) / 2)
    return torch.tensor(found, dtype=torch.float64)


def _beyond(image: Tensor, affine: Tensor, view: Tensor, size: Sequence[int]) -> float:
    """Share of what is bright in an image ``(C, *S)`` that lies beyond a field of view.

    Their axes are parallel.
    """
    d = len(size)
    matrix = torch.linalg.solve(affine, view)
    borders = torch.stack((torch.full((d,), -0.5), torch.tensor(size) - 0.5)).to(matrix)
    borders = borders @ matrix[:d, :d].mT + matrix[:d, d]
    first, last = borders.amin(0).ceil().int(), borders.amax(0).floor().int()
    bright = _bright(image.amax(0))
    seen = bright[tuple(slice(max(a, 0), max(b + 1, 0)) for a, b in zip(first, last, strict=True))]
    return 1 - float(seen.sum() / bright.sum())


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _read_on(field: Tensor, affine: Tensor, new_affine: Tensor, new_shape: Sequence[int]) -> Tensor:
    """A field read on another grid and in its voxels, clamped outside.

    Not :func:`reglib.geometry.fields.carry_field`: a straight line is no guess for a wide margin.
    """
    d = field.shape[1]
    identity = torch.eye(d + 1, dtype=torch.float64, device=field.device).unsqueeze(0)
    there = transform_grid(affine_field(identity, new_affine, affine, new_shape).to(field))
    read = sample(field, there.expand(len(field), *there.shape[1:]))
    linear = torch.linalg.solve(new_affine[:d, :d], affine[:d, :d]).to(read)
    with no_autocast(read):
        return torch.einsum("ij,bj...->bi...", linear, read)
