"""Random transforms and images with known truth: noise, shapes, fields and pairs.

Randomness comes from ``generator`` (torch's own one if ``None``; nothing is seeded here), and what
comes out is on the device of the generator, in torch's default dtype. ``batch`` is the number B of
samples, independent of each other, and ``shape`` the spatial shape ``S``, two or three axes.

Fields are in voxels and do not vanish at the border. Lattices of noise have their first node at
voxel 0 and reach beyond the last voxel, so a shape need not be a multiple of their cells. Every
function raises ``TypeError`` or ``ValueError`` if an argument is not what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import (
    check_choice,
    check_numbers,
    check_positive_int,
    check_shape,
    check_tensor,
    check_vectors,
)
from reglib.geometry.affine import affine_matrix
from reglib.geometry.fields import compose, integrate, invert
from reglib.geometry.grid import no_autocast, sample
from reglib.geometry.sampling import transform_grid
from reglib.geometry.smoothing import gaussian_smooth

#: What Chen et al. multiply Perlin noise by (4 to 18 voxels), in cells of 32 voxels.
AMPLITUDES = (4 / 32, 6 / 32, 8 / 32, 14 / 32, 16 / 32, 18 / 32)

#: A CPU samples so many voxels at a time. With all of an image it would mostly wait for memory.
PART = 2**20


class Diffeomorphism(NamedTuple):
    """A velocity and its exponential, both ``(B, D, *S)`` in voxels.

    ``field`` is :func:`reglib.geometry.fields.integrate` of ``velocity``; that of ``-velocity`` is
    its inverse, but for what leaves the grid.
    """

    field: Tensor
    velocity: Tensor


class RandomPair(NamedTuple):
    """Two images of one random world, and the transform between them.

    ``moving`` and ``fixed`` are ``(B, 1, *S)`` in [0, 1], the label maps ``(B, 1, *S)`` int64, and
    ``field`` ``(B, D, *S)`` in voxels maps fixed to moving: ``moving(x + u(x)) = fixed(x)``.
    """

    moving: Tensor
    fixed: Tensor
    moving_labels: Tensor
    fixed_labels: Tensor
    field: Tensor


def _draw(
    distribution: Callable[..., Tensor], *size: int, generator: torch.Generator | None
) -> Tensor:
    if generator is None:
        return distribution(size)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: wanted a torch.Generator or None, got {generator!r}")
    return distribution(size, generator=generator, device=generator.device)


def _check_amounts(*, positive: bool, **amounts: float | Sequence[float]) -> None:
    """Raise unless all are numbers above 0 (``positive``), or at least 0."""
    for name, amount in amounts.items():
        values = check_numbers(amount if isinstance(amount, Sequence) else [amount], name)
        if not values or not all(0 <= x < math.inf and (x or not positive) for x in values):
            wanted = "positive numbers" if positive else "numbers of at least 0"
            raise ValueError(f"{name}: wanted {wanted}, got {amount!r}")


def _nodes(shape: Sequence[int], spacing: float) -> list[int]:
    """How many nodes, ``spacing`` voxels apart from voxel 0 on, reach beyond the last voxel."""
    return [int((n - 1) // spacing) + 2 for n in shape]


def _offsets(
    counts: Sequence[int], stride: float, cell: float, *, shift: float = 0.0
) -> list[Tensor]:
    """Per axis ``(N, R)``: how many cells each of N points is beyond each of R nodes.

    Points are ``stride`` voxels apart, nodes ``cell`` voxels, and the first point is ``shift``
    cells beyond the first node.
    """
    out = []
    for n in counts:
        points = torch.arange(n, dtype=torch.float64, device="cpu") * stride / cell + shift
        out.append(points.unsqueeze(1) - torch.arange(int(points[-1]) + 2, device="cpu"))
    return out


def _hat(offsets: Tensor) -> Tensor:
    """The weights of linear interpolation."""
    return (1 - offsets.abs()).clamp(min=0)


def _contract(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Weighted sums over the nodes: ``(B, C, *R)`` and ``(N, R)`` per axis give ``(B, C, *N)``."""
    with no_autocast(x):
        for axis, w in enumerate(weights, start=2):
            x = (x.movedim(axis, -1) @ w.to(x).T).movedim(-1, axis)
    return x


def _parts(image: Tensor) -> int:
    """In how many parts to sample an image: on a CPU, no larger than its caches hold."""
    return -(-image.numel() // PART) if image.device.type == "cpu" else 1


def _interpolate(x: Tensor, spacing: float, shape: Sequence[int]) -> Tensor:
    """Linear interpolation from nodes ``spacing`` voxels apart to every voxel of ``shape``."""
    return _contract(x, [_hat(o) for o in _offsets(shape, 1, spacing)])


def _perlin(
    batch: int, channels: int, offsets: Sequence[Tensor], generator: torch.Generator | None
) -> Tensor:
    """Perlin noise ``(B, C, *N)`` at N points per axis, ``offsets`` away from the nodes."""
    d, nodes = len(offsets), [o.shape[1] for o in offsets]
    # Normal vectors have no preferred direction.
    gradients = F.normalize(
        _draw(torch.randn, batch, channels, d, *nodes, generator=generator), dim=2
    )
    hats = [_hat(o) for o in offsets]
    fades = [h**3 * (h * (6 * h - 15) + 10) for h in hats]
    ramps = [f * o for f, o in zip(fades, offsets, strict=True)]
    # A ramp is a sum over components; faded, each of them is a product of functions of one axis.
    parts = [
        _contract(gradients[:, :, c], [*fades[:c], ramps[c], *fades[c + 1 :]]) for c in range(d)
    ]
    return torch.stack(parts).sum(0)


def perlin_noise(
    shape: Sequence[int],
    *,
    batch: int = 1,
    channels: int = 1,
    cell: float = 32.0,
    octaves: int = 1,
    persistence: float = 0.5,
    lacunarity: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Perlin noise, or fractal noise of several octaves.

    Every node k of a lattice has a gradient g of length 1 and any direction. At a voxel x, p =
    x / cell, the noise is the sum of the ramps ``g . (p - k)`` of the corners of its cell, each
    weighted by the product over axes of ``t(1 - |p - k|)``, ``t(s) = 6 s^5 - 15 s^4 + 10 s^3``: 0
    at the nodes, with slope g / cell there, and between -sqrt(D) / 2 and sqrt(D) / 2.

    (The package perlin-numpy draws two angles, which in 3-D favours the last axis, and multiplies
    2-D noise by sqrt(2).)

    Args:
        shape: spatial shape ``S``.
        batch: samples B.
        channels: channels C, independent of each other.
        cell: distance of the nodes in voxels.
        octaves: how many noises are added.
        persistence: factor of the amplitude from octave to octave.
        lacunarity: divisor of the cell from octave to octave; if it is an integer, all octaves
            are 0 at the nodes of the first.
        generator: source of randomness.

    Returns:
        ``(B, C, *S)``.

    Perlin, ACM Transactions on Graphics 2002, doi:10.1145/566654.566636.
    """
    check_shape(shape, (2, 3))
    for value, name in ((batch, "batch"), (channels, "channels"), (octaves, "octaves")):
        check_positive_int(value, name)
    _check_amounts(positive=True, cell=cell, lacunarity=lacunarity)
    _check_amounts(positive=False, persistence=persistence)
    noise = [
        persistence**o
        * _perlin(batch, channels, _offsets(shape, 1, cell / lacunarity**o), generator)
        for o in range(octaves)
    ]
    return torch.stack(noise).sum(0)


def random_shapes(
    shape: Sequence[int],
    *,
    batch: int = 1,
    count: int = 16,
    cell: float = 32.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random label map: at every voxel the largest of ``count`` channels of Perlin noise.

    The noise is sampled twice a cell, scaled to [0, 1] and interpolated linearly.

    Args:
        shape: spatial shape ``S``.
        batch: samples B.
        count: channels, and so labels at most.
        cell: distance of the noise's nodes in voxels.
        generator: source of randomness.

    Returns:
        Labels ``(B, 1, *S)``, int64, 0 to ``count - 1``.

    Chen et al., MIDL 2025, arXiv:2505.24167.
    """
    check_shape(shape, (2, 3))
    check_positive_int(batch, "batch")
    check_positive_int(count, "count")
    _check_amounts(positive=True, cell=cell)
    # The released code samples at the nodes and half way between. At the nodes all channels are 0
    # before they are scaled, so one label takes every node of an image. Hence the shift.
    spacing = cell / 2
    points = _offsets(_nodes(shape, spacing), spacing, cell, shift=0.25)
    noise = _perlin(batch, count, points, generator)
    space = tuple(range(2, noise.ndim))
    low, high = noise.amin(space, keepdim=True), noise.amax(space, keepdim=True)
    *first, last = [_hat(o).to(noise) for o in _offsets(shape, 1, spacing)]
    planes = _contract((noise - low) / (high - low), first)
    largest = torch.full((batch, 1, *shape), -1.0, dtype=noise.dtype, device=noise.device)
    labels = torch.zeros_like(largest, dtype=torch.long)
    # One channel after the other: together they would take the memory of ``count`` images.
    for label in range(count):
        with no_autocast(planes):
            channel = planes[:, label : label + 1] @ last.T
        labels.masked_fill_(channel > largest, label)
        torch.maximum(largest, channel, out=largest)
    return labels


def gaussian_diffeomorphism(
    shape: Sequence[int],
    *,
    batch: int = 1,
    sigma: float = 8.0,
    amplitude: float = 6.0,
    generator: torch.Generator | None = None,
) -> Diffeomorphism:
    """The exponential of white noise that a Gaussian has smoothed.

    At a distance of r voxels velocities are correlated by ``exp(-r**2 / (4 sigma**2))``, at the
    border as inside.

    Args:
        shape: spatial shape ``S``.
        batch: samples B.
        sigma: standard deviation of the Gaussian in voxels.
        amplitude: length of a velocity's longest vector in voxels; no displacement is longer.
        generator: source of randomness.
    """
    check_shape(shape, (2, 3))
    check_positive_int(batch, "batch")
    _check_amounts(positive=True, sigma=sigma)
    _check_amounts(positive=False, amplitude=amplitude)
    # As far as the filter reaches: where it repeats border voxels, the noise would be stronger.
    margin = math.ceil(4 * sigma)
    sizes = [n + 2 * margin for n in shape]
    noise = _draw(torch.randn, batch, len(shape), *sizes, generator=generator)
    velocity = gaussian_smooth(noise, sigma, truncate=4.0)
    for axis, n in enumerate(shape, start=2):
        velocity = velocity.narrow(axis, margin, n)
    lengths = torch.linalg.vector_norm(velocity, dim=1, keepdim=True)
    velocity = velocity * (amplitude / lengths.amax(tuple(range(1, lengths.ndim)), keepdim=True))
    return Diffeomorphism(integrate(velocity), velocity)


def _perlin_velocity(
    batch: int,
    counts: Sequence[int],
    spacing: float,
    cell: float,
    amplitudes: Sequence[float],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Noise ``(B, D, *counts)`` at nodes ``spacing`` voxels apart; its amplitudes in voxels."""
    d = len(counts)
    first = _perlin(batch, d, _offsets(counts, spacing, cell), generator)
    second = _perlin(batch, d, _offsets(counts, spacing, cell / 2), generator)
    tosses = _draw(torch.rand, 2, batch, d, *(1,) * d, generator=generator)
    octaves = first + 0.5 * (tosses[0] < 0.5) * second
    index = (tosses[1, :, :1] * len(amplitudes)).long().clamp(max=len(amplitudes) - 1)
    return octaves, cell * torch.tensor(amplitudes, dtype=first.dtype, device=first.device)[index]


def perlin_diffeomorphism(
    shape: Sequence[int],
    *,
    batch: int = 1,
    cell: float = 32.0,
    amplitudes: Sequence[float] = AMPLITUDES,
    generator: torch.Generator | None = None,
) -> Diffeomorphism:
    """The exponential of Perlin noise, of one octave or two: for each component that is a toss.

    Args:
        shape: spatial shape ``S``.
        batch: samples B.
        cell: distance of the first octave's nodes in voxels. At the nodes nothing moves.
        amplitudes: in cells; each sample's noise is multiplied by one of them, all equally likely.
            With the default ones nothing folds.
        generator: source of randomness.

    Chen et al., MIDL 2025, arXiv:2505.24167.
    """
    check_shape(shape, (2, 3))
    check_positive_int(batch, "batch")
    _check_amounts(positive=True, cell=cell)
    _check_amounts(positive=False, amplitudes=amplitudes)
    noise, amplitude = _perlin_velocity(batch, shape, 1, cell, amplitudes, generator)
    velocity = amplitude * noise
    return Diffeomorphism(integrate(velocity), velocity)


def brownian_field(
    shape: Sequence[int],
    *,
    amplitude: float,
    batch: int = 1,
    spacings: Sequence[float] = (16.0, 32.0, 64.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """A fractal field: the mean of white noises on coarse grids, interpolated linearly.

    It cannot fold if ``amplitude < n / (2 D (1 / s_1 + ... + 1 / s_n))`` for n spacings s.

    Args:
        shape: spatial shape ``S``.
        amplitude: all noises are uniform between -``amplitude`` and ``amplitude`` voxels, and so
            bounded is every component of the field. GeoReg has 0.125 in units of half an image,
            which for N voxels is (N - 1) / 16.
        batch: samples B.
        spacings: of the grids' nodes, in voxels.
        generator: source of randomness.

    Returns:
        Displacement ``(B, D, *S)`` in voxels.

    GeoReg: arXiv:2412.13294, released code.
    """
    check_shape(shape, (2, 3))
    check_positive_int(batch, "batch")
    _check_amounts(positive=False, amplitude=amplitude)
    _check_amounts(positive=True, spacings=spacings)
    d = len(shape)
    octaves = [
        _interpolate(_draw(torch.rand, batch, d, *_nodes(shape, s), generator=generator), s, shape)
        for s in spacings
    ]
    return amplitude * (2 * torch.stack(octaves).mean(0) - 1)


def random_affine(
    centre: Tensor,
    *,
    rotation: float,
    translation: float,
    scale: float,
    shear: float = 0.0,
    batch: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Affine maps in world mm whose parameters are uniform around those of the identity.

    :func:`reglib.geometry.affine.affine_field` makes voxel fields of them.

    Args:
        centre: ``(1, D)`` or ``(B, D)`` in mm, such as
            :func:`reglib.geometry.affine.grid_centre` of the fixed image.
        rotation: largest component of the rotation vector, radians.
        translation: largest shift along each world axis, mm.
        scale: magnifications are between ``1 - scale`` and ``1 + scale``; below 1.
        shear: largest shear, mm per mm.
        batch: samples B.
        generator: source of randomness.

    Returns:
        ``(B, D + 1, D + 1)``, world mm, fixed to moving, with dtype and device of ``centre``.
    """
    check_tensor(centre, "centre")
    check_positive_int(batch, "batch")
    d = 2 if centre.shape[-1:] == (2,) else 3
    check_vectors(centre, "centre", (1, batch), d)
    _check_amounts(positive=False, rotation=rotation, translation=translation, shear=shear)
    _check_amounts(positive=False, scale=scale)
    if scale >= 1:
        raise ValueError(f"scale: wanted a number below 1, got {scale!r}")
    turns = d * (d - 1) // 2
    drawn = 2 * _draw(torch.rand, batch, 2 * (d + turns), generator=generator).to(centre) - 1
    rotations, shifts, scales, shears = drawn.tensor_split((turns, turns + d, turns + 2 * d), 1)
    return affine_matrix(
        rotation * rotations,
        translation * shifts,
        log_scales=(scale * scales).log1p(),
        shears=shear * shears,
        centre=centre,
    )


def random_pair(
    shape: Sequence[int],
    *,
    batch: int = 1,
    count: int = 16,
    cell: float = 32.0,
    amplitudes: Sequence[float] = AMPLITUDES,
    scale: str = "before",
    padding: str = "border",
    generator: torch.Generator | None = None,
) -> RandomPair:
    """Random shapes, one grey value per label, deformed in two ways.

    ``moving = world(phi_m)``, ``fixed = world(phi_f)``, and the field between them is that of
    phi_m^-1 after phi_f, all integrated on nodes a twelfth of a cell apart. With default settings
    neither phi_m nor phi_f folds, and the field is right to 0.15 voxel on average, wherever it does
    not leave the grid; being the product of two, it may fold in one voxel of a thousand.

    Args:
        shape: spatial shape ``S``.
        batch: samples B.
        count: labels of the world, see ``random_shapes``.
        cell: distance of the noise's nodes in voxels.
        amplitudes: as in ``perlin_diffeomorphism``, for phi_m and phi_f one each.
        scale: ``"before"`` multiplies velocities by the amplitude; ``"after"`` multiplies fields,
            as the released code does: those fold, and where they do they have no inverse.
        padding: outside the world, ``"border"`` or, as in the released code, ``"zeros"``.
        generator: source of randomness.

    Chen et al., MIDL 2025, arXiv:2505.24167.
    """
    _check_amounts(positive=False, amplitudes=amplitudes)
    check_choice(scale, "scale", ("before", "after"))
    check_choice(padding, "padding", ("border", "zeros"))
    labels = random_shapes(shape, batch=batch, count=count, cell=cell, generator=generator)
    # The paper's range is 25 to 225, from 0 on for label 0.
    grey = _draw(torch.rand, batch, count, generator=generator) * 200 + 25
    grey[:, 0] = (grey[:, 0] - 25) * 225 / 200
    world = grey.gather(1, labels.flatten(1)).view(labels.shape)
    space = tuple(range(1, world.ndim))
    low, high = world.amin(space), world.amax(space)
    grey = (grey - low.unsqueeze(1)) / torch.where(high > low, high - low, 1).unsqueeze(1)
    world = grey.gather(1, labels.flatten(1)).view(labels.shape)

    spacing = max(cell / 12, 1.0)
    nodes = _nodes(shape, spacing)
    noise, amplitude = _perlin_velocity(2 * batch, nodes, spacing, cell, amplitudes, generator)
    if scale == "before":
        velocity = amplitude * noise / spacing
        phi, back = integrate(torch.cat([velocity, -velocity[:batch]])).tensor_split([2 * batch])
    else:
        phi = amplitude * integrate(noise / spacing)
        back = invert(phi[:batch]).field
    views, numbers = [], labels.to(world)
    for u in (phi[:batch], phi[batch:]):
        coords = transform_grid(_interpolate(spacing * u, spacing, shape)).chunk(_parts(world), 2)
        seen = [sample(world, c, padding=padding) for c in coords]
        told = [sample(numbers, c, mode="nearest", padding=padding) for c in coords]
        views.append((torch.cat(seen, 2), torch.cat(told, 2).long()))
    (moving, moving_labels), (fixed, fixed_labels) = views
    field = _interpolate(spacing * compose(back, phi[batch:]), spacing, shape)
    return RandomPair(moving, fixed, moving_labels, fixed_labels, field)


class RandomPairs:
    """An endless stream of :func:`random_pair`, which can be stopped and gone on with.

    ``reglib.training.fit`` keeps its state in the checkpoint.

    Args:
        shape: spatial shape ``S``.
        generator: source of randomness, which the stream shares; the pairs are on its device.
        options: all other arguments of :func:`random_pair`.
    """

    def __init__(self, shape: Sequence[int], *, generator: torch.Generator, **options: Any) -> None:
        check_shape(shape, (2, 3))
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: wanted a torch.Generator, got {generator!r}")
        self.shape, self.generator, self.options = tuple(shape), generator, options

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Moving, fixed and the labels of both, without end."""
        while True:
            pair = random_pair(self.shape, generator=self.generator, **self.options)
            yield pair.moving, pair.fixed, pair.moving_labels, pair.fixed_labels

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there, on a device of the same kind."""
        self.generator.set_state(state["generator"].cpu())
