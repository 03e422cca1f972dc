"""The Zurich protocol: how far satellite images of two modalities may be apart and still be found.

An image of the near infrared is fixed; moving is the grey value of the colour bands, or the near
infrared itself, turned and shifted by amounts that four levels make harder. A registration is
judged by where it takes the corners.

Lu, Öfverstedt, Lindblad and Sladoje, PLoS ONE 2022, doi:10.1371/journal.pone.0276196, whose
published code the conventions here follow. Components are in the order of the axes of an array
(row, column), where the paper has them the other way round.
"""

from __future__ import annotations

import math
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reglib.checks import check_choice, check_image, check_matrix, check_positive_int
from reglib.data.assets import fetch
from reglib.geometry.affine import affine_field, transform_points
from reglib.geometry.grid import sample
from reglib.geometry.sampling import transform_grid

#: Each level rotates by up to so many degrees more, and shifts by up to so many pixels more.
ROTATION_STEP, TRANSLATION_STEP = 5.0, 7.0

#: The levels, from the easiest on.
LEVELS = (1, 2, 3, 4)

#: Pixels along each side of a patch.
SIZE = 300

#: A registration succeeds if its relative distance is at most this.
SUCCESS = 0.02

#: What the bands blue, green and red add to grey.
GREY = (0.114, 0.587, 0.299)


class Patches(NamedTuple):
    """Satellite images of one place each.

    Attributes:
        images: ``(N, 4, 300, 300)``, float32, 0 .. 1 in steps of 1/255; bands blue, green, red and
            near infrared.
        names: what each shows.
    """

    images: Tensor
    names: tuple[str, ...]


class ZurichPairs(NamedTuple):
    """Pairs of the protocol and their truth.

    Attributes:
        moving: ``(N, 1, H, W)``, float32, 0 .. 1.
        fixed: of the same shape.
        truth: ``(N, 3, 3)``, float64, voxels of the fixed image to those of the moving one, which
            are mm where no affine says otherwise: what a perfect registration finds.
    """

    moving: Tensor
    fixed: Tensor
    truth: Tensor


def patches(origin: str = "sentinel2", *, stretched: bool = False) -> Patches:
    """Satellite images in four bands.

    ``"sentinel2"`` is one patch at 10 m a pixel that travels with the package. ``"quickbird"`` are
    eleven patches of the sensor of the published protocol; :func:`reglib.data.assets.fetch` finds
    them where a user has put them.

    Args:
        origin: ``"sentinel2"`` or ``"quickbird"``.
        stretched: bands between percentiles and clipped, for more contrast: of Sentinel-2 from the
            2nd to the 98th of each, of QuickBird as stored. By default no value is clipped, as in
            the published images.

    Returns:
        Images and names.

    Raises:
        ValueError: if ``origin`` is neither word.
        FileNotFoundError: if the patches of QuickBird are not there; the message says how to get
            them.

    Sentinel-2: contains modified Copernicus Sentinel data; Montero et al., Sci. Data 2023,
    doi:10.1038/s41597-023-02096-0. QuickBird: test data of the Orfeo ToolBox, imagery DigitalGlobe;
    Grizonnet et al., 2017, doi:10.1186/s40965-017-0031-6.
    """
    check_choice(origin, "origin", ("sentinel2", "quickbird"))
    if origin == "quickbird":
        with np.load(fetch("quickbird") / "patches300_bgrn_uint8.npz") as arrays:
            bytes_ = arrays["stretched" if stretched else "globalminmax"]
            names = tuple(map(str, arrays["ids"].tolist()))
        return Patches(torch.from_numpy(bytes_).movedim(3, 1).float() / 255, names)
    path = resources.files("reglib.data") / "samples" / "sentinel2.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        bands = torch.from_numpy(arrays["data"].astype(np.float32))
    shares = torch.tensor([0.02, 0.98] if stretched else [0.0, 1.0])
    low, high = torch.quantile(bands.flatten(1), shares, dim=1).view(2, 4, 1, 1)
    scaled = ((bands - low) / (high - low)).clamp(0, 1)
    return Patches(_as_bytes(scaled).unsqueeze(0), ("Sentinel-2",))


def _as_bytes(image: Tensor) -> Tensor:
    """What is left of 0 .. 1 in a file of bytes: the published images are such files."""
    return (image * 255).add(1e-3).floor() / 255


def draw_transforms(
    level: int, count: int = 1, *, size: int = SIZE, generator: torch.Generator | None = None
) -> Tensor:
    """Random rigid transforms of one level.

    The angle is uniform between 5 (level - 1) and 5 level degrees, each translation between
    7 (level - 1) and 7 level pixels, and each sign is drawn by itself. The translation comes first,
    then the rotation about the middle of the patch: ``T(x) = R (x + t - c) + c``.

    Args:
        level: 1, 2, 3 or 4.
        count: how many.
        size: pixels along each side of the patch.
        generator: source of randomness, on the CPU; torch's own if ``None``.

    Returns:
        T, ``(count, 3, 3)``, float64, from voxels of the moving (transformed) image to those of the
        image it is taken from.

    Raises:
        TypeError, ValueError: if an argument is malformed.
    """
    if level not in LEVELS:
        raise ValueError(f"level: wanted one of {LEVELS}, got {level!r}")
    check_positive_int(count, "count")
    check_positive_int(size, "size")
    draws = torch.rand((count, 3), dtype=torch.float64, generator=generator)
    signs = 2.0 * torch.randint(2, (count, 3), generator=generator) - 1
    amount = signs * (level - 1 + draws)
    angle, shift = amount[:, 0] * math.radians(ROTATION_STEP), amount[:, 1:] * TRANSLATION_STEP
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([cos, sin, -sin, cos], 1).view(count, 2, 2)
    centre = torch.full((2,), (size - 1) / 2, dtype=torch.float64)
    matrix = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    matrix[:, :2, :2] = linear
    matrix[:, :2, 2] = (linear @ (shift - centre).unsqueeze(2)).squeeze(2) + centre
    return matrix


def transform_patches(images: Tensor, transforms: Tensor) -> Tensor:
    """Images seen through transforms, continued beyond their borders by reflection.

    ``out(x) = image(T(x))``, linear interpolation. The outermost pixels are the mirrors and are not
    repeated.

    Args:
        images: ``(N, C, H, W)``, floating point, at least two pixels along each axis.
        transforms: T, ``(N, 3, 3)``, voxels.

    Returns:
        ``(N, C, H, W)``.

    Raises:
        TypeError, ValueError: if the arguments do not fit.
    """
    check_image(images, "images")
    shape = tuple(images.shape[2:])
    if len(shape) != 2 or min(shape) < 2:
        raise ValueError(f"images: wanted two axes of two pixels or more, got {shape}")
    check_matrix(transforms, "transforms", dimensions=(2,), batches=(len(images),))
    pixels = torch.eye(3, dtype=torch.float64)
    field = affine_field(transforms.double().to(images.device), pixels, pixels, shape)
    there = transform_grid(field)
    last = there.new_tensor([n - 1 for n in shape]).view(1, 2, 1, 1)
    # A triangular wave: 0 .. last and back again.
    folded = last - (there.remainder(2 * last) - last).abs()
    return sample(images, folded.to(torch.promote_types(images.dtype, torch.float32)))


def zurich_protocol(
    images: Tensor,
    level: int,
    *,
    modality: str = "multi",
    generator: torch.Generator | None = None,
) -> ZurichPairs:
    """Pairs of one level, one of each image.

    Fixed is the near infrared as it is. Moving is the grey value of the colour bands, or the near
    infrared, through a random transform, rounded down to bytes as the published files are.

    Args:
        images: ``(N, 4, H, H)``, 0 .. 1; bands blue, green, red and near infrared, such as those of
            :func:`patches`. Repeat an image for several draws of it.
        level: 1, 2, 3 or 4, see :func:`draw_transforms`.
        modality: of the moving image, ``"multi"`` (grey) or ``"single"`` (near infrared).
        generator: source of randomness, on the CPU; torch's own if ``None``.

    Returns:
        Moving, fixed and the truth.

    Raises:
        TypeError, ValueError: if an argument is malformed.
    """
    check_image(images, "images")
    size = images.shape[2]
    if tuple(images.shape[1:]) != (4, size, size):
        raise ValueError(
            f"images: wanted four bands and square patches, (N, 4, H, H), got {tuple(images.shape)}"
        )
    check_choice(modality, "modality", ("multi", "single"))
    transforms = draw_transforms(level, len(images), size=size, generator=generator)
    moved = _as_bytes(transform_patches(images, transforms))
    share = images.new_tensor(GREY).view(1, 3, 1, 1)
    grey = (moved[:, :3] * share).sum(1, keepdim=True)
    moving = grey if modality == "multi" else moved[:, 3:]
    return ZurichPairs(moving, images[:, 3:], torch.linalg.inv(transforms))


def corner_error(matrix: Tensor, truth: Tensor, *, size: int = SIZE) -> Tensor:
    """Mean distance by which a registration misses the four corners of the moving image.

    The corners (0, 0), (0, w), (w, w), (w, 0) of the moving image lie at ``truth^-1`` of them in
    the fixed one; ``matrix`` should take them back.

    Args:
        matrix: what was found, ``(N, 3, 3)``, voxels of the fixed image to those of the moving one.
        truth: the truth, ``(N, 3, 3)``.
        size: w.

    Returns:
        ``(N,)``, pixels, float64.

    Raises:
        TypeError, ValueError: if an argument is no matrix of this form.
    """
    check_matrix(truth, "truth", dimensions=(2,))
    check_matrix(matrix, "matrix", dimensions=(2,), batches=(len(truth),))
    check_positive_int(size, "size")
    w = float(size)
    corners = torch.tensor([[[0, 0], [0, w], [w, w], [w, 0]]], dtype=torch.float64)
    exact = truth.detach().double().cpu()
    places = transform_points(corners.expand(len(exact), 4, 2), torch.linalg.inv(exact))
    back = transform_points(places, matrix.detach().double().cpu())
    return (back - corners).norm(dim=2).mean(1)


def relative_distance(matrix: Tensor, truth: Tensor, *, size: int = SIZE) -> Tensor:
    """:func:`corner_error` as a share of the patch's side; at most ``SUCCESS`` is a success."""
    return corner_error(matrix, truth, size=size) / size
