"""Data sets by name: a small sample travels with the package, the full set is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reglib.checks import check_choice, check_image, check_positive_int, check_tensor
from reglib.data.assets import fetch
from reglib.data.nifti import Image, read_image, read_labels
from reglib.geometry.fields import compose, integrate, upsample_field
from reglib.geometry.grid import sample
from reglib.geometry.sampling import transform_grid
from reglib.synth import gaussian_diffeomorphism, perlin_noise

#: MD5 of the official MNIST files, uncompressed.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

#: Structures that the labels of :func:`colin27` and of :func:`mni152` both name, and their numbers
#: there. The two protocols draw them differently, so no registration makes them overlap fully.
SHARED_STRUCTURES = {
    "left hippocampus": (37, 17),
    "right hippocampus": (38, 53),
    "left amygdala": (41, 18),
    "right amygdala": (42, 54),
    "left caudate": (71, 11),
    "right caudate": (72, 50),
    "left putamen": (73, 12),
    "right putamen": (74, 51),
    "left pallidum": (75, 13),
    "right pallidum": (76, 52),
    "left thalamus": (77, 10),
    "right thalamus": (78, 49),
}

#: Of the images that :func:`hippocampus` gives; axes point to the right, to the front and up.
HIPPOCAMPUS_SHAPE = (48, 64, 48)

#: Share of the voxels of an image of :func:`hippocampus` below the intensity that becomes 1.
HIPPOCAMPUS_QUANTILE = 0.99

#: What the embedded boxes show, in the order of the file. Each is larger than
#: ``HIPPOCAMPUS_SHAPE`` by four voxels at every face.
HIPPOCAMPUS_BOXES = ("colin27 left", "colin27 right", "mni152 left", "mni152 right")

# How the embedded population varies. Of velocities: how many voxels they are smooth at, and the
# longest vector of the most deformed member. Of grey values between 0 and 1: the logarithms of the
# largest power and of the largest smooth factor, and the standard deviation of the noise.
_SIGMA, _AMPLITUDE, _GAMMA, _BIAS, _NOISE = 8.0, 7.0, 0.35, 0.3, 0.02


class Brain(NamedTuple):
    """A brain without skull, and where its structures are.

    Attributes:
        image: ``(1, 1, *S)``, float32, intensities in [0, 1].
        labels: ``(1, 1, *S)``, int64, on the grid of the image; 0 is no structure.
        names: what each label means.
    """

    image: Image
    labels: Image
    names: dict[int, str]


def colin27(*, dimensions: int = 3) -> Brain:
    """Colin27: the head of one man, the average of 27 T1-weighted scans, with the AAL labels.

    Embedded in the package, without skull, in MNI space. 116 structures were drawn on this brain
    by hand.

    Args:
        dimensions: 3 for the volume with a spacing of 2 mm, ``(1, 1, 91, 109, 91)``; 2 for the
            axial slice 2 mm above the origin with a spacing of 1 mm, ``(1, 1, 181, 217)``. The
            axes point to the right, to the front and up.

    Returns:
        Image, labels and their names.

    Raises:
        ValueError: if ``dimensions`` is neither 2 nor 3.

    Image: Holmes et al., J. Comput. Assist. Tomogr. 1998, doi:10.1097/00004728-199803000-00032,
    copyright McConnell Brain Imaging Centre, Montreal Neurological Institute, free to use with the
    notice in NOTICE. Labels: Tzourio-Mazoyer et al., NeuroImage 2002, doi:10.1006/nimg.2001.0978.
    Both as in MRIcron (BSD-3-Clause).
    """
    return _brain("colin27", dimensions)


def mni152(*, dimensions: int = 3) -> Brain:
    """MNI152: the symmetric nonlinear average of 152 heads (2009a), with labels of FreeSurfer.

    Embedded in the package, without skull. The labels are FreeSurfer's of an average brain of the
    same space, made for another release of the template (MNI152NLin6Asym): they follow this one to
    about 2 mm. The parcels of the cortex are one label for each side.

    Args:
        dimensions: 3 for the volume with a spacing of 2 mm, ``(1, 1, 83, 100, 83)``; 2 for the
            axial slice 2 mm above the origin with a spacing of 1 mm, ``(1, 1, 159, 197)``. The
            axes point to the right, to the front and up.

    Returns:
        Image, labels and their names.

    Raises:
        ValueError: if ``dimensions`` is neither 2 nor 3.

    Image: Fonov et al., NeuroImage 2011, doi:10.1016/j.neuroimage.2010.07.033, copyright McConnell
    Brain Imaging Centre, Montreal Neurological Institute, free to use with the notice in NOTICE;
    as in nilearn (BSD-3-Clause). Labels: as in nibabies (Apache-2.0); Fischl et al., Neuron 2002,
    doi:10.1016/S0896-6273(02)00569-X.
    """
    return _brain("mni152", dimensions)


def _brain(name: str, dimensions: int) -> Brain:
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions: wanted 2 or 3, got {dimensions!r}")
    part = "2mm" if dimensions == 3 else "slice"
    samples = resources.files("reglib.data") / "samples"
    with resources.as_file(samples / f"{name}_{part}_t1.nii.gz") as path:
        image = read_image(path)
    with resources.as_file(samples / f"{name}_{part}_labels.nii.gz") as path:
        labels = read_labels(path)
    names = json.loads((samples / "label_names.json").read_text(encoding="utf-8"))[name]
    return Brain(
        Image(image.tensor / 255, image.affine), labels, {int(n): s for n, s in names.items()}
    )


class Hippocampi(NamedTuple):
    """A population of boxes around one hippocampus each, 1 mm a voxel.

    Attributes:
        images: ``(N, 1, 48, 64, 48)``, float32, intensities in [0, 1], each scaled by itself.
        labels: ``(N, 1, 48, 64, 48)``, int64; 0 is no structure.
        names: what each label means.
        members: where each comes from: one of ``HIPPOCAMPUS_BOXES``, or the name of a crop.
        velocities: ``(N, 3, 48, 64, 48)`` in voxels, of the embedded population: a member shows
            at x what its box shows at exp(v)(x). ``None`` where nobody knows.
    """

    images: Tensor
    labels: Tensor
    names: dict[int, str]
    members: tuple[str, ...]
    velocities: Tensor | None

    def field(self, moving: int, fixed: int) -> Tensor:
        """The true field between two members of one box: exp(-v_moving) after exp(v_fixed).

        Args:
            moving: index of a member.
            fixed: index of another one.

        Returns:
            Displacement ``(1, 3, 48, 64, 48)`` in voxels, fixed to moving.

        Raises:
            ValueError: if they are not of one box, or the truth is not known.
        """
        if self.velocities is None or self.members[moving] != self.members[fixed]:
            raise ValueError(
                "moving, fixed: wanted two members of one embedded box, "
                f"got {self.members[moving]} and {self.members[fixed]}"
            )
        back = integrate(-self.velocities[moving].unsqueeze(0))
        return compose(back, integrate(self.velocities[fixed].unsqueeze(0)))


def hippocampus(
    *,
    origin: str = "embedded",
    count: int | None = None,
    members: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> Hippocampi:
    """Hippocampi in boxes of 48 x 64 x 48 voxels of 1 mm, cropped or padded, never resampled.

    ``"embedded"``: a population made of four boxes that travel with the package, both sides of
    Colin27 and of MNI152 2009a, the right ones mirrored. The members show the boxes in turn, each
    through a random diffeomorphism and with random contrast, bias and noise, so that between two
    members of one box the truth is known (:meth:`Hippocampi.field`). Between Colin27, with the AAL
    labels, and MNI152, with FreeSurfer's, it is not: two brains, drawn by two protocols.

    ``"msd"``: the crops of the Medical Segmentation Decathlon that
    :func:`reglib.data.assets.fetch` gives. Each was cut around its structure, and the middle of the
    crop comes to lie in the middle of the box: that brings hippocampi together before anything is
    registered. Where a crop is smaller, its outermost voxels are repeated: a black frame would be
    the strongest edge of the image. All crops look like left hippocampi: whether some were mirrored
    and both sides of one person occur, the files do not tell. (The boxes of 32 x 48 x 48 of
    Li and Fan, arXiv:1709.00799, would cut most of these crops; these cut none.)

    Args:
        origin: ``"embedded"`` or ``"msd"``.
        count: members of the embedded population; ``None`` for 32.
        members: names of crops of ``"msd"``, such as ``"hippocampus_004"``; ``None`` for all.
        generator: source of randomness of the embedded population, on the CPU; torch's own if
            ``None``.

    Returns:
        Images, labels, their names and what is known about them. The labels are hippocampus and
        amygdala (``"embedded"``), or the anterior and the posterior part of the hippocampus
        (``"msd"``).

    Raises:
        TypeError, ValueError: if an argument does not fit the origin, or a crop is unknown.
        OSError: if the real crops are wanted and can be neither found nor downloaded.

    Embedded: sources and licences as :func:`colin27` and :func:`mni152`. Decathlon: Simpson et al.,
    arXiv:1902.09063; Antonelli et al., Nat. Commun. 2022, doi:10.1038/s41467-022-30695-9;
    CC BY-SA 4.0.
    """
    check_choice(origin, "origin", ("embedded", "msd"))
    if origin == "msd":
        if count is not None or generator is not None:
            raise ValueError("count, generator: wanted None for the real crops, got others")
        return _decathlon(members)
    if members is not None:
        raise ValueError(f"members: wanted None for the embedded population, got {members!r}")
    count = 32 if count is None else count
    check_positive_int(count, "count")
    sample_file = resources.files("reglib.data") / "samples" / "hippocampus.npz"
    with sample_file.open("rb") as file, np.load(file) as arrays:
        boxes = [torch.from_numpy(arrays[part]).unsqueeze(1) for part in ("images", "labels")]
    turns = [n % len(HIPPOCAMPUS_BOXES) for n in range(count)]
    found = [_variant(boxes[0][n : n + 1], boxes[1][n : n + 1], generator) for n in turns]
    images, labels, velocities = (torch.cat(parts) for parts in zip(*found, strict=True))
    names = {1: "hippocampus", 2: "amygdala"}
    return Hippocampi(images, labels, names, tuple(HIPPOCAMPUS_BOXES[n] for n in turns), velocities)


def _variant(
    box: Tensor, labels: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A box of bytes and its labels, deformed, the image in another contrast; the velocity."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    # At half the resolution, which is enough for what is so smooth, in an eighth of the time.
    half = tuple(n // 2 for n in HIPPOCAMPUS_SHAPE)
    amplitude = uniform(_AMPLITUDE / 2, _AMPLITUDE) / 2
    drawn = gaussian_diffeomorphism(
        half, sigma=_SIGMA / 2, amplitude=amplitude, generator=generator
    )
    velocity = upsample_field(drawn.velocity, 2, HIPPOCAMPUS_SHAPE)
    margin = (box.shape[2] - HIPPOCAMPUS_SHAPE[0]) // 2
    there = transform_grid(integrate(velocity)) + margin
    image = sample(box.float() / 255, there).pow(math.exp(uniform(-_GAMMA, _GAMMA)))
    bias = perlin_noise(HIPPOCAMPUS_SHAPE, cell=40.0, generator=generator)
    image = image * (_BIAS * bias / bias.abs().max()).exp()
    image = image + _NOISE * torch.randn(image.shape, generator=generator)
    marked = sample(labels.float(), there, mode="nearest").long()
    return _normalised(image), marked, velocity


def _decathlon(members: Sequence[str] | None) -> Hippocampi:
    folder = fetch("hippocampus")
    known = sorted(path.name.split(".")[0] for path in (folder / "imagesTr").glob("*.nii.gz"))
    wanted = tuple(known if members is None else members)
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise ValueError(f"members: wanted names of crops, such as {known[0]}, got {unknown}")
    images, labels = [], []
    for name in wanted:
        image = read_image(folder / "imagesTr" / f"{name}.nii.gz").tensor
        images.append(_crop_or_pad(_normalised(image), HIPPOCAMPUS_SHAPE, "replicate"))
        marked = read_labels(folder / "labelsTr" / f"{name}.nii.gz").tensor
        labels.append(_crop_or_pad(marked, HIPPOCAMPUS_SHAPE, "constant"))
    names = {1: "anterior", 2: "posterior"}
    return Hippocampi(torch.cat(images), torch.cat(labels), names, wanted, None)


def _normalised(image: Tensor) -> Tensor:
    """Least value to 0, 99th percentile to 1, clipped: one bright voxel must not set the scale."""
    low, high = image.min(), torch.quantile(image.double(), HIPPOCAMPUS_QUANTILE).to(image)
    return ((image - low) / (high - low)).clamp(0, 1)


def _crop_or_pad(image: Tensor, shape: Sequence[int], mode: str) -> Tensor:
    """The middle of a volume ``(B, C, *T)`` in the middle of ``shape``; ``mode`` as of torch's pad.

    Where the sizes differ by an odd number, the odd voxel is added or lost at the end.
    """
    missing = []
    for axis, n in enumerate(shape, start=2):
        size = image.shape[axis]
        image = image.narrow(axis, max(size - n, 0) // 2, min(size, n))
        missing.append(max(n - size, 0))
    # The last axis comes first.
    sides = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
    return F.pad(image, sides, mode=mode)


def mnist(
    split: str, *, full: bool = False, root: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Handwritten digits, 28 x 28 pixels.

    The embedded sample holds 400 digits of each class of the official training set (the first
    ones, in their order) and 100 of each class of the official test set.

    Args:
        split: ``"train"`` or ``"test"``.
        full: the whole set (60,000 and 10,000) instead of the sample (4,000 and 1,000).
        root: folder with the four official files of the whole set; ``None`` for the one that
            :func:`reglib.data.assets.fetch` gives, which downloads them once.

    Returns:
        Images ``(N, 1, 28, 28)`` in [0, 1], float32, and digits ``(N,)``, int64.

    Raises:
        ValueError: if ``split`` is neither word, or a file is not the official one.
        OSError: if the whole set is wanted and can be neither found nor downloaded.

    LeCun et al., Proc. IEEE 1998, doi:10.1109/5.726791. CC BY-SA 3.0.
    """
    check_choice(split, "split", ("train", "test"))
    if full:
        images, digits = _full_mnist(split, root)
    else:
        sample = resources.files("reglib.data") / "samples" / "mnist.npz"
        with sample.open("rb") as file, np.load(file) as arrays:
            images, digits = arrays[f"{split}_images"], arrays[f"{split}_digits"]
    return torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(digits).long()


def _full_mnist(split: str, root: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    folder = fetch("mnist") if root is None else Path(root)
    prefix = "train" if split == "train" else "t10k"
    return (
        _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
        _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
    )


def _read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes after comparing it with the official one."""
    wanted = MNIST_MD5[path.name.removesuffix(".gz")]
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: wanted a complete gzip file, got {error}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != wanted:
        raise ValueError(f"{path}: wanted the official file with MD5 {wanted}, got MD5 {found}")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def same_label_pairs(
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of random pairs of different images that share a label.

    Args:
        images: ``(N, C, *S)``.
        labels: ``(N,)``, one integer per image.
        batch_size: pairs per batch.
        generator: source of randomness, on the CPU; torch's own if ``None``.

    Yields:
        (moving, fixed), each ``(batch_size, C, *S)``.

    Raises:
        TypeError, ValueError: if the inputs do not fit, or a label has a single member.
    """
    check_image(images, "images")
    check_positive_int(batch_size, "batch_size")
    check_tensor(labels, "labels")
    if labels.is_floating_point():
        raise TypeError(f"labels: wanted integers, got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: wanted one per image, shape ({images.shape[0]},), got {tuple(labels.shape)}"
        )
    members = {int(v): torch.nonzero(labels == v).flatten() for v in set(labels.tolist())}
    lonely = [v for v, m in members.items() if len(m) < 2]
    if lonely:
        raise ValueError(f"labels: wanted at least two images of each label, got one of {lonely}")
    return _pair_stream(images, labels, members, batch_size, generator)


def _pair_stream(
    images: Tensor,
    labels: Tensor,
    members: dict[int, Tensor],
    batch_size: int,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        fixed = torch.randint(len(images), (batch_size,), generator=generator)
        moving = torch.empty_like(fixed)
        for k, i in enumerate(fixed):
            same = members[int(labels[i])]
            # Drawn from the others: the same image twice would be a pair without a task.
            others = same[same != i]
            moving[k] = others[torch.randint(len(others), (1,), generator=generator)]
        yield images[moving], images[fixed]
