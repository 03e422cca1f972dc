"""The embedded digits, the full set they are taken from, and pairs of the same label."""

import gzip
import hashlib
import os
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from reglib.data import datasets
from reglib.data.datasets import mnist, same_label_pairs

#: SHA-256 of the embedded images, as bytes in their order.
SHA256 = {
    "train": "c6aa175e058d8ef3a96fb00bfccdb5549d00e147e72c47b79c3a0907d44d7d89",
    "test": "6973118ee26132cec5e8bca46303f598e8d7f3fd72a7056c43f828e761c432f0",
}
MIRROR = Path(os.environ.get("REGLIB_DATA", "")) / "mnist"


def as_bytes(images):
    return (images * 255).round().to(torch.uint8).numpy()


def write_idx(folder, name, array):
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def small_mirror(tmp_path, monkeypatch):
    """A mirror of five digits a split whose checksums pass for official."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in datasets.MNIST_MD5:
        shape = (5, 28, 28) if "images" in name else (5,)
        content = rng.integers(0, 10, shape)
        monkeypatch.setitem(datasets.MNIST_MD5, name, write_idx(folder, name, content))
    monkeypatch.setenv("REGLIB_DATA", str(tmp_path))
    return folder


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 100)])
def test_the_embedded_digits_are_balanced(split, per_class):
    images, digits = mnist(split)
    assert images.shape == (10 * per_class, 1, 28, 28)
    assert images.dtype == torch.float32
    assert digits.dtype == torch.int64
    assert images.min() == 0
    assert images.max() == 1
    assert digits.bincount().tolist() == [per_class] * 10


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 100)])
def test_the_embedded_digits_are_the_first_of_each_class(split, per_class):
    """By their checksum, and by the official set itself where it is at hand."""
    images, digits = mnist(split)
    assert hashlib.sha256(as_bytes(images).tobytes()).hexdigest() == SHA256[split]
    if MIRROR.is_dir():
        all_images, all_digits = mnist(split, full=True)
        assert len(all_digits) == {"train": 60_000, "test": 10_000}[split]
        first = [torch.nonzero(all_digits == d).flatten()[:per_class] for d in range(10)]
        keep = torch.cat(first).sort().values
        assert digits.equal(all_digits[keep])
        assert images.equal(all_images[keep])


def test_a_mirror_is_read_and_checked(small_mirror):
    images, digits = mnist("train", full=True)
    assert images.shape == (5, 1, 28, 28)
    assert images.max() <= 9 / 255
    assert len(digits) == 5


def test_a_wrong_checksum_names_the_file(small_mirror):
    write_idx(small_mirror, "t10k-images-idx3-ubyte", np.zeros((5, 28, 28)))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz: wanted the official file"):
        mnist("test", full=True)
    mnist("train", full=True)


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"<html>", lambda b: b""])
def test_a_damaged_download_names_the_file(small_mirror, damage):
    path = small_mirror / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: wanted"):
        mnist("train", full=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 5), (4, 5, 6)], ids=str)
def test_pairs_share_a_label_and_are_never_one_image(batch_size, size):
    """Every image holds its own index, so that it can be told apart."""
    labels = torch.tensor([0, 0, 7, 7, 7, -1, -1])
    index = torch.arange(7.0).view(7, *(1,) * (len(size) + 1))
    images = index.expand(7, 2, *size)
    stream = same_label_pairs(
        images, labels, batch_size=batch_size, generator=torch.Generator().manual_seed(0)
    )
    seen = set()
    for moving, fixed in islice(stream, 200):
        assert moving.shape == fixed.shape == (batch_size, 2, *size)
        i, j = (x.flatten(1)[:, 0].long() for x in (moving, fixed))
        assert labels[i].equal(labels[j])
        assert i.ne(j).all()
        seen |= set(zip(i.tolist(), j.tolist(), strict=True))
    assert len(seen) == 2 + 6 + 2


def test_the_generator_decides_the_pairs():
    images, digits = mnist("test")

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        stream = same_label_pairs(images, digits, batch_size=4, generator=generator)
        return torch.stack([torch.cat(pair) for pair in islice(stream, 3)])

    assert batches(0).equal(batches(0))
    assert not batches(0).equal(batches(1))
