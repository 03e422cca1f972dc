"""A network as a method: its input contract is met, and its field is brought back.

Weights say in their card what they were trained on, under ``"input"``: ``channels``; ``range``,
the least and the largest intensity; ``size_multiple``; and, where they matter, ``orientation``
(such as ``"RAS"``) and ``spacing`` (mm per voxel along those axes). Whatever a pair is, it is
resampled to that, run through the network, and the field is carried back to the fixed grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reglib.checks import check_field, check_finite, check_numbers, check_positive_int
from reglib.data.conform import conform_grid, resample
from reglib.geometry.affine import affine_field
from reglib.geometry.fields import compose
from reglib.geometry.grid import no_autocast, sample
from reglib.geometry.sampling import transform_grid, warp
from reglib.methods.pair import Iterate, Pair

_KNOWN = ("channels", "range", "size_multiple", "orientation", "spacing")


class Network:
    """The method that calls ``network(moving, fixed)`` once.

    It starts from the pair's own transform: the network sees the moving image through it, and
    finds what remains.

    Args:
        network: takes ``moving`` and ``fixed``, both ``(B, C, *S)`` on one grid, and returns a
            displacement ``(B, D, *S)`` in voxels, or an object whose ``field`` is one.
        contract: what it takes, with the keys named above; ``None`` reads ``network.card["input"]``
            where that exists, and else leaves the images as they are.

    Raises:
        TypeError, ValueError: if ``network`` cannot be called or the contract is malformed.
    """

    def __init__(
        self, network: Callable[[Tensor, Tensor], Any], contract: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(network):
            raise TypeError(f"network: wanted a callable, got {type(network).__name__}")
        if contract is None:
            contract = (getattr(network, "card", None) or {}).get("input", {})
        unknown = sorted(contract.keys() - set(_KNOWN))
        if unknown:
            raise ValueError(f"contract: wanted keys out of {', '.join(_KNOWN)}, got {unknown}")
        self.network = network
        self.contract = dict(contract)
        check_positive_int(self.contract.get("size_multiple", 1), "size_multiple")
        limits = check_numbers(self.contract.get("range", (0.0, 1.0)), "range")
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"range: wanted two ascending numbers, got {limits}")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Run the network; yields once."""
        yield self._run(pair)

    @torch.no_grad()
    def _run(self, pair: Pair) -> Iterate:
        channels = self.contract.get("channels", pair.fixed.shape[1])
        if pair.fixed.shape[1] != channels:
            raise ValueError(
                f"moving, fixed: wanted images of {channels} channel(s) for this network, "
                f"got {pair.fixed.shape[1]}"
            )
        shape = tuple(pair.fixed.shape[2:])
        affine, new_shape = conform_grid(
            pair.fixed_affine,
            shape,
            orientation=self.contract.get("orientation"),
            spacing=self.contract.get("spacing"),
            multiple=self.contract.get("size_multiple", 1),
        )
        fixed = resample(self._scaled(pair.fixed), pair.fixed_affine, affine, new_shape)
        moving = self._scaled(pair.moving)
        if bool(pair.field.any()):
            # What is left of the affine grids is the fixed one; only the network sees this image.
            seen = warp(moving, pair.whole_field(), padding="zeros")
            moving = resample(seen, pair.fixed_affine, affine, new_shape)
        else:
            moving = resample(moving, pair.moving_affine, affine, new_shape, matrix=pair.affine)
        out = self.network(moving, fixed)
        field = out if isinstance(out, Tensor) else out.field
        check_field(field, "network's field")
        if tuple(field.shape[2:]) != new_shape or len(field) != len(fixed):
            raise ValueError(
                f"network: wanted a field for {len(fixed)} pair(s) on a grid of {new_shape}, "
                f"got shape {tuple(field.shape)}"
            )
        check_finite(field, "network's field")
        found = _carry(field, affine, pair.fixed_affine, shape).to(pair.field)
        total = compose(pair.field, found)
        return Iterate(
            stage="network",
            terms={},
            active=torch.zeros(len(fixed), dtype=torch.bool),
            transform=lambda: (pair.affine, total),
            notes=self._notes(shape, new_shape, affine, pair.fixed_affine),
        )

    def _scaled(self, image: Tensor) -> Tensor:
        """Each image's own extremes, over all channels, put where the contract wants them."""
        if "range" not in self.contract:
            return image
        low, high = self.contract["range"]
        least, largest = image.flatten(1).aminmax(dim=1)
        view = (-1, *(1,) * (image.ndim - 1))
        extent = (largest - least).where(largest > least, torch.ones_like(least))
        return (image - least.view(view)) / extent.view(view) * (high - low) + low

    def _notes(
        self, shape: Sequence[int], new_shape: Sequence[int], affine: Tensor, fixed_affine: Tensor
    ) -> tuple[str, ...]:
        """What was done to the images, for the report."""
        notes = []
        if "range" in self.contract:
            low, high = self.contract["range"]
            notes.append(f"intensities of each image scaled to {low:g} .. {high:g}")
        if tuple(shape) == tuple(new_shape) and torch.equal(affine, fixed_affine):
            notes.append("fixed grid as the network takes it")
        else:
            kind = [str(self.contract[k]) for k in ("orientation", "spacing") if k in self.contract]
            notes.append(
                f"fixed grid {_size(shape)} brought to {_size(new_shape)} for the network"
                + (f" ({', '.join(kind)})" if kind else " (zeros around it)")
            )
        return tuple(notes)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _carry(field: Tensor, affine: Tensor, new_affine: Tensor, shape: Sequence[int]) -> Tensor:
    """A field given on one grid, read on another and in its voxels; clamped outside the first."""
    if tuple(shape) == tuple(field.shape[2:]) and torch.equal(affine, new_affine):
        return field
    d = field.shape[1]
    identity = torch.eye(d + 1, dtype=torch.float64, device=field.device).unsqueeze(0)
    to_first = affine_field(identity, new_affine, affine, shape).to(field)
    read = sample(field, transform_grid(to_first).expand(len(field), *to_first.shape[1:]))
    linear = torch.linalg.solve(new_affine[:d, :d], affine[:d, :d]).to(read)
    with no_autocast(read):
        return torch.einsum("ij,bj...->bi...", linear, read)
