"""Data sets by name: a small sample travels with the package, the full set is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reglib.checks import check_choice, check_image, check_positive_int, check_tensor

#: MD5 of the official MNIST files, uncompressed.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist(
    split: str, *, full: bool = False, root: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Handwritten digits, 28 x 28 pixels.

    The embedded sample holds 400 digits of each class of the official training set (the first
    ones, in their order) and 100 of each class of the official test set.

    Args:
        split: ``"train"`` or ``"test"``.
        full: the whole set (60,000 and 10,000) instead of the sample (4,000 and 1,000): from
            ``$REGLIB_DATA/mnist`` where that folder exists, else through torchvision, which
            downloads it once.
        root: where torchvision keeps the full set; ``~/.cache/reglib`` if ``None``.

    Returns:
        Images ``(N, 1, 28, 28)`` in [0, 1], float32, and digits ``(N,)``, int64.

    Raises:
        ValueError: if ``split`` is neither word, or a file is not the official one.
        ImportError: if the full set is wanted and torchvision is missing.

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
    mirror = Path(os.environ.get("REGLIB_DATA", "")) / "mnist"
    if "REGLIB_DATA" in os.environ and mirror.is_dir():
        prefix = "train" if split == "train" else "t10k"
        return (
            _read_idx(mirror / f"{prefix}-images-idx3-ubyte.gz"),
            _read_idx(mirror / f"{prefix}-labels-idx1-ubyte.gz"),
        )
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ImportError("the full MNIST needs torchvision: pip install 'reglib[book]'") from error
    folder = Path(root) if root is not None else Path.home() / ".cache" / "reglib"
    dataset = MNIST(str(folder), train=split == "train", download=True)
    return dataset.data.numpy(), dataset.targets.numpy()


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
