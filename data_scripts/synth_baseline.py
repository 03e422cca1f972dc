"""A random pair made plainly: noise in NumPy at every voxel, integration at full resolution.

What :func:`reglib.synth.random_pair` is compared with by synth_speed.py. The world, the velocities
and the views are those of Chen et al., MIDL 2025, arXiv:2505.24167; their code computes the noise
on coarser grids, which is left out here as everything else that saves time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reglib.geometry.fields import integrate
from reglib.geometry.grid import sample
from reglib.geometry.sampling import transform_grid

#: The released code's amplitudes in voxels, for cells of 32 voxels.
AMPLITUDES = (4, 6, 8, 14, 16, 18)


def perlin(
    shape: Sequence[int], cell: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Perlin noise at every voxel.

    Args:
        shape: spatial shape ``S``, two or three axes.
        cell: distance of the nodes in voxels.
        rng: source of randomness.

    Returns:
        The noise ``(*S)``, and the gradients of length 1 at the nodes, ``(*R, D)``.

    Perlin, ACM Transactions on Graphics 2002, doi:10.1145/566654.566636.
    """
    places = [np.arange(n) / cell for n in shape]
    cells = [np.floor(p).astype(int) for p in places]
    inside = [p - c for p, c in zip(places, cells, strict=True)]
    fades = [t**3 * (t * (6 * t - 15) + 10) for t in inside]
    gradients = rng.normal(size=(*(c[-1] + 2 for c in cells), len(shape)))
    gradients /= np.linalg.norm(gradients, axis=-1, keepdims=True)
    noise = np.zeros(tuple(shape))
    for corner in itertools.product((0, 1), repeat=len(shape)):
        given = gradients[np.ix_(*(c + k for c, k in zip(cells, corner, strict=True)))]
        offsets = np.ix_(*(t - k for t, k in zip(inside, corner, strict=True)))
        weights = np.ix_(*(f if k else 1 - f for f, k in zip(fades, corner, strict=True)))
        ramp = sum(given[..., axis] * offset for axis, offset in enumerate(offsets))
        for weight in weights:
            ramp = ramp * weight
        noise += ramp
    return noise, gradients


def _tensor(array: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def world(
    shape: Sequence[int], cell: float, rng: np.random.Generator, *, count: int = 16
) -> tuple[Tensor, Tensor]:
    """Random shapes: the grey values in [0, 1] and the labels, both ``(1, 1, *S)`` float32."""
    largest, labels = np.full(tuple(shape), -np.inf), np.zeros(tuple(shape))
    for label in range(count):
        noise, _ = perlin(shape, cell, rng)
        noise = (noise - noise.min()) / (noise.max() - noise.min())
        labels[noise > largest] = label
        largest = np.maximum(noise, largest)
    grey = rng.uniform([0] + [25] * (count - 1), 225)
    image = grey[labels.astype(int)]
    image = (image - image.min()) / (image.max() - image.min())
    return _tensor(image)[None, None], _tensor(labels)[None, None]


def velocity(shape: Sequence[int], cell: float, rng: np.random.Generator) -> Tensor:
    """Perlin noise of one octave or two for each component, ``(1, D, *S)`` in voxels."""
    components = []
    for _ in shape:
        noise, _ = perlin(shape, cell, rng)
        if rng.random() < 0.5:
            noise += 0.5 * perlin(shape, cell / 2, rng)[0]
        components.append(noise)
    return _tensor(rng.choice(AMPLITUDES) * cell / 32 * np.stack(components))[None]


def random_pair(
    shape: Sequence[int], rng: np.random.Generator, *, cell: float = 32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moving and fixed image, and the labels of both, each ``(1, 1, *S)`` float32.

    Less than what the library gives: the field between the two is not computed.
    """
    image, labels = world(shape, cell, rng)
    views = []
    for _ in range(2):
        coords = transform_grid(integrate(velocity(shape, cell, rng)))
        views.append((sample(image, coords), sample(labels, coords, mode="nearest")))
    (moving, moving_labels), (fixed, fixed_labels) = views
    return moving, fixed, moving_labels, fixed_labels
