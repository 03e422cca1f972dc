"""The embedded digits, brains and hippocampi, what they are taken from, and random pairs."""

import gzip
import hashlib
import importlib.util
import itertools
import os
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from reglib.data import datasets
from reglib.data.datasets import (
    HIPPOCAMPUS_BOXES,
    HIPPOCAMPUS_SHAPE,
    SHARED_STRUCTURES,
    colin27,
    hippocampus,
    mni152,
    mnist,
    same_label_pairs,
)
from reglib.data.nifti import Image, write_image
from reglib.geometry.fields import integrate
from reglib.geometry.sampling import warp, warp_labels
from reglib.objectives.metrics import dice, folding
from reglib.objectives.similarity import ncc

SCRIPT = Path(__file__).resolve().parents[1] / "data_scripts" / "make_samples.py"
spec = importlib.util.spec_from_file_location("make_samples", SCRIPT)
make_samples = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_samples)

#: SHA-256 of the embedded images, as bytes in their order.
SHA256 = {
    "train": "c6aa175e058d8ef3a96fb00bfccdb5549d00e147e72c47b79c3a0907d44d7d89",
    "test": "6973118ee26132cec5e8bca46303f598e8d7f3fd72a7056c43f828e761c432f0",
}
#: SHA-256 of the voxels of the embedded brains, images before labels.
BRAINS_SHA256 = {
    ("colin27", 2): "0eda964938d08dbae5f052fd14dedb9154d07aceb3783f9db5d47967fbb8543f",
    ("colin27", 3): "3e2715b3aaef22d18de2babb41e6800a142cdc75641e043caf77c3f807e76181",
    ("mni152", 2): "ac53e385aaf16c22048cf8612641cc4b80b460a08bea12c68238922bf270fc3b",
    ("mni152", 3): "7d30e8a5c2cb97ef6dc6b32466da57b97784bedd6fe1a4bb01743e877fdec623",
}
#: SHA-256 of the boxes around hippocampi, images before labels.
BOXES_SHA256 = "cc453f10d5729e00b7a16939f83ef840cc6d351ad37bf38376411bd8d93e1a19"
MIRROR = Path(os.environ.get("REGLIB_DATA", "")) / "mnist"
CROPS = Path(os.environ.get("REGLIB_DATA", "")) / "hippocampus"


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


# --- Brains ---------------------------------------------------------------------------------


def centre_in_mm(labels, number):
    """Centre of mass of a structure in world millimetres."""
    voxels = torch.nonzero(labels.tensor[0, 0] == number).double().mean(0)
    return labels.affine[:-1, :-1] @ voxels + labels.affine[:-1, -1]


@pytest.mark.parametrize(("read", "structures"), [(colin27, 116), (mni152, 43)])
@pytest.mark.parametrize(("dimensions", "spacing"), [(2, 1), (3, 2)])
def test_a_brain_is_an_image_with_labels_on_its_grid(read, structures, dimensions, spacing):
    image, labels, names = read(dimensions=dimensions)
    assert image.tensor.dtype == torch.float32
    assert labels.tensor.dtype == torch.int64
    assert image.tensor.shape == labels.tensor.shape
    assert image.tensor.ndim == 2 + dimensions
    assert image.affine.equal(labels.affine)
    assert image.spacing == (spacing,) * dimensions
    assert image.orientation == "RAS"[:dimensions]
    assert image.tensor.min() == 0
    assert 0.5 < image.tensor.max() <= 1
    assert len(names) == structures
    found = set(labels.tensor.unique().tolist()) - {0}
    assert found == set(names) if dimensions == 3 else found < set(names)


@pytest.mark.parametrize(("read", "column"), [(colin27, 0), (mni152, 1)])
def test_left_is_left_and_names_say_so(read, column):
    _, labels, names = read()
    for structure, numbers in SHARED_STRUCTURES.items():
        side, name = structure.split()
        assert name in names[numbers[column]].lower()
        assert ("L" if side == "left" else "R") in (
            names[numbers[column]][0],
            names[numbers[column]][-1],
        )
        assert (centre_in_mm(labels, numbers[column])[0] < 0) == (side == "left")


def test_the_two_brains_share_a_world_but_not_a_grid():
    """Both are in MNI space: their structures lie within the 6 mm by which brains differ there."""
    moving, fixed = colin27(), mni152()
    assert moving.image.tensor.shape != fixed.image.tensor.shape
    assert not moving.image.affine.equal(fixed.image.affine)
    for a, b in SHARED_STRUCTURES.values():
        apart = centre_in_mm(moving.labels, a) - centre_in_mm(fixed.labels, b)
        assert 0 < apart.norm() < 6


@pytest.mark.parametrize("read", [colin27, mni152])
def test_the_slice_is_the_volume_two_millimetres_up(read):
    """SciPy samples the volume where the pixels of the slice are.

    Filtered and unfiltered values differ, yet a shift by a pixel would lower the correlation
    of 0.99 by more than 0.01.
    """
    plane, volume = read(dimensions=2), read()
    grid = np.indices(plane.image.tensor.shape[2:]).reshape(2, -1)
    world = plane.image.affine[:2, :2].numpy() @ grid + plane.image.affine[:2, 2:].numpy()
    world = np.vstack([world, np.full(grid.shape[1], 2.0)])
    affine = np.linalg.inv(volume.image.affine.numpy())
    voxels = affine[:3, :3] @ world + affine[:3, 3:]
    values = map_coordinates(volume.image.tensor[0, 0].numpy(), voxels, order=1)
    correlation = np.corrcoef(values, plane.image.tensor.flatten())[0, 1]
    assert correlation > 0.99
    for axis in (0, 1):
        moved = voxels + 0.5 * np.eye(3)[:, axis : axis + 1]
        values = map_coordinates(volume.image.tensor[0, 0].numpy(), moved, order=1)
        assert np.corrcoef(values, plane.image.tensor.flatten())[0, 1] < correlation - 0.003


def test_tissues_lie_where_the_labels_say():
    """On T1-weighted images white matter is brighter than cortex, and cortex than ventricles."""
    for dimensions in (2, 3):
        image, labels, _ = mni152(dimensions=dimensions)
        for ventricle, cortex, white in ((4, 3, 2), (43, 42, 41)):
            means = [image.tensor[labels.tensor == n].mean() for n in (ventricle, cortex, white)]
            assert means[0] < 0.9 * means[1] < 0.9 * 0.9 * means[2]


@pytest.mark.parametrize("read", [colin27, mni152])
def test_a_brain_has_two_or_three_dimensions(read):
    with pytest.raises(ValueError, match=r"dimensions: wanted 2 or 3, got 4"):
        read(dimensions=4)


def test_the_samples_are_small():
    """All that is embedded stays within 8 MB, the two brains within 4 MB."""
    folder = Path(datasets.__file__).parent / "samples"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) <= 8e6
    assert sum(size for name, size in sizes.items() if name != "mnist.npz") <= 4e6


# --- Hippocampi -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def population():
    return hippocampus(count=8, generator=torch.Generator().manual_seed(0))


def boxes():
    """The embedded boxes and their labels."""
    with np.load(Path(datasets.__file__).parent / "samples" / "hippocampus.npz") as arrays:
        return arrays["images"], arrays["labels"]


def test_the_population_shows_the_boxes_in_turn(population):
    images, labels, names, members, velocities = population
    assert images.shape == labels.shape == (8, 1, *HIPPOCAMPUS_SHAPE)
    assert velocities.shape == (8, 3, *HIPPOCAMPUS_SHAPE)
    assert images.dtype == velocities.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert members == 2 * HIPPOCAMPUS_BOXES
    assert names == {1: "hippocampus", 2: "amygdala"}
    for image, marked in zip(images, labels, strict=True):
        assert image.min() == 0
        assert image.max() == 1
        assert set(marked.unique().tolist()) == {0, 1, 2}
    assert len(hippocampus(count=1).images) == 1


def test_the_generator_decides_the_population(population):
    again = hippocampus(count=3, generator=torch.Generator().manual_seed(0))
    assert again.images.equal(population.images[:3])
    assert again.velocities.equal(population.velocities[:3])
    other = hippocampus(count=3, generator=torch.Generator().manual_seed(1))
    assert not other.images.equal(again.images)


def test_a_member_shows_its_box_through_its_velocity(population):
    """Against SciPy: labels voxel by voxel, but for ties; grey values up to contrast and noise."""
    images, labels = boxes()
    for n in range(2):
        there = (
            np.indices(HIPPOCAMPUS_SHAPE)
            + 4
            + integrate(population.velocities[n : n + 1])[0].numpy()
        )
        expected = map_coordinates(labels[n], there, order=0, mode="nearest")
        assert (population.labels[n, 0].numpy() == expected).mean() > 0.9999
        grey = map_coordinates(images[n].astype(float), there, order=1, mode="nearest")
        correlation = np.corrcoef(grey.ravel(), population.images[n, 0].numpy().ravel())[0, 1]
        assert 0.8 < correlation < 0.999


def test_the_true_field_brings_two_members_of_a_box_together(population):
    """Labels are sampled twice, to the nearest voxel: that leaves 0.9 of thin structures."""
    for moving, fixed in ((0, 4), (6, 2)):
        u = population.field(moving, fixed)
        assert u.shape == (1, 3, *HIPPOCAMPUS_SHAPE)
        assert float(folding(u)) == 0
        m, f = (population.labels[k : k + 1] for k in (moving, fixed))
        image, other = (population.images[k : k + 1] for k in (moving, fixed))
        before, after, wrong = (
            dice(x, f, labels=[1, 2]).mean() for x in (m, warp_labels(m, u), warp_labels(m, -u))
        )
        assert after > 0.9
        assert before < 0.85
        assert wrong < before
        assert ncc(warp(image, u), other) < 0.7 * ncc(image, other)


def test_the_members_of_the_population_are_apart(population):
    """About as far as real hippocampi are whose crops have a common middle: Dice 0.5 to 0.7."""
    whole = (population.labels == 1).long()
    overlaps = [
        float(dice(whole[i : i + 1], whole[j : j + 1], labels=[1]))
        for i in range(8)
        for j in range(i)
    ]
    assert 0.45 < np.mean(overlaps) < 0.75


def test_the_right_boxes_are_mirrored():
    """The template is symmetric: its boxes are one, up to where the labels put the middle."""
    images, labels = boxes()
    assert HIPPOCAMPUS_BOXES[2:] == ("mni152 left", "mni152 right")
    left = images[2][8:-8, 8:-8, 8:-8].ravel()

    def best(right):
        """The largest correlation at a shift of up to two voxels."""
        shifted = (np.roll(right, s, (0, 1, 2)) for s in itertools.product(range(-2, 3), repeat=3))
        return max(np.corrcoef(left, x[8:-8, 8:-8, 8:-8].ravel())[0, 1] for x in shifted)

    assert best(images[3]) > 0.98
    assert best(images[3][::-1]) < 0.7
    for marked in labels:
        # The amygdala lies in front of the hippocampus.
        centres = [np.argwhere(marked == k).mean(0) for k in (1, 2)]
        assert centres[1][1] > centres[0][1] + 10


@pytest.fixture
def crops(tmp_path, monkeypatch):
    """A mirror of three crops, of which one is too large, with labels that count their voxels."""
    rng = np.random.default_rng(0)
    shapes = {"hippocampus_001": (35, 51, 36), "hippocampus_002": (51, 66, 48)}
    shapes["hippocampus_010"] = (48, 64, 47)
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "hippocampus" / part).mkdir(parents=True)
    values = {}
    for name, shape in shapes.items():
        image = rng.uniform(50, 9000, shape).astype(np.float32)
        labels = rng.integers(0, 3, shape).astype(np.uint8)
        for part, array in (("imagesTr", image), ("labelsTr", labels)):
            tensor = torch.from_numpy(array)[None, None]
            path = tmp_path / "hippocampus" / part / f"{name}.nii.gz"
            write_image(path, Image(tensor, torch.eye(4, dtype=torch.float64)))
        values[name] = image, labels
    monkeypatch.setenv("REGLIB_DATA", str(tmp_path))
    return values


def middle(array, mode):
    """Cropped or padded to the shape of the boxes, by NumPy."""
    for axis, n in enumerate(HIPPOCAMPUS_SHAPE):
        size = array.shape[axis]
        if size > n:
            array = np.take(array, range((size - n) // 2, (size - n) // 2 + n), axis)
        pad = [(0, 0)] * 3
        missing = max(n - size, 0)
        pad[axis] = (missing // 2, missing - missing // 2)
        array = np.pad(array, pad, mode)
    return array


def test_real_crops_are_cropped_or_padded_and_never_resampled(crops):
    found = hippocampus(origin="msd")
    assert found.members == tuple(crops)
    assert found.names == {1: "anterior", 2: "posterior"}
    assert found.velocities is None
    assert found.images.shape == found.labels.shape == (3, 1, *HIPPOCAMPUS_SHAPE)
    for n, (image, labels) in enumerate(crops.values()):
        assert (found.labels[n, 0].numpy() == middle(labels, "constant")).all()
        low, high = image.min(), np.percentile(image.astype(float), 99)
        expected = np.clip((image.astype(float) - low) / (high - low), 0, 1)
        np.testing.assert_allclose(found.images[n, 0].numpy(), middle(expected, "edge"), atol=1e-6)
    some = hippocampus(origin="msd", members=["hippocampus_010", "hippocampus_001"])
    assert some.members == ("hippocampus_010", "hippocampus_001")
    assert some.images.equal(found.images[[2, 0]])


def test_the_boxes_cut_no_real_label():
    """Where the crops are at hand, every labelled voxel of the first ones is kept."""
    names = sorted(path.name.split(".")[0] for path in (CROPS / "labelsTr").glob("*.nii.gz"))[:20]
    for name in names:
        kept = hippocampus(origin="msd", members=[name]).labels
        source = datasets.read_labels(CROPS / "labelsTr" / f"{name}.nii.gz").tensor
        assert kept.flatten().bincount()[1:].equal(source.flatten().bincount()[1:])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"origin": "adni"}, ValueError, "origin: wanted one of 'embedded', 'msd', got 'adni'"),
        ({"count": 0}, ValueError, "count: wanted at least 1"),
        ({"count": 2.5}, TypeError, "count"),
        ({"members": ["hippocampus_001"]}, ValueError, "members: wanted None"),
        ({"generator": 3}, TypeError, "generator"),
        ({"origin": "msd", "count": 2}, ValueError, "count, generator: wanted None"),
        ({"origin": "msd", "generator": torch.Generator()}, ValueError, "count, generator"),
        ({"origin": "msd", "members": ["hippocampus_003"]}, ValueError, "hippocampus_003"),
        ({"origin": "msd", "members": []}, ValueError, "members"),
    ],
)
def test_wrong_wishes_for_hippocampi_are_refused(crops, arguments, error, words):
    with pytest.raises(error, match=words):
        hippocampus(**arguments)


def test_no_truth_is_known_between_boxes_or_of_real_crops(population, crops):
    with pytest.raises(ValueError, match="got colin27 left and mni152 left"):
        population.field(0, 2)
    with pytest.raises(ValueError, match="got hippocampus_001 and hippocampus_001"):
        hippocampus(origin="msd").field(0, 0)


# --- The script that made them --------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 31), (18, 21, 30)], ids=str)
def test_halving_keeps_places_and_removes_what_would_alias(size):
    """A voxel kept has the world coordinates it had, and waves too short for it are gone.

    Of a wave of two voxels the filter leaves twice exp(-(pi sigma)^2 / 2), as its frequency and
    the mirror image of that fall together: 0.057 of the amplitude of 100.
    """
    d = len(size)
    affine = np.eye(d + 1)
    affine[:d, d] = np.arange(d) - 7.5
    labels = np.arange(np.prod(size)).reshape(size)
    last = np.indices(size)[-1]
    wave = np.rint(100 + 100 * np.cos(np.pi * last))
    slow = np.rint(100 + 100 * np.cos(2 * np.pi * last / 24))
    smooth, kept, coarse = make_samples.halve(wave, labels, affine)
    for index in ((0,) * d, (2, 5, 7)[:d]):
        source = tuple(2 * i for i in index)
        assert kept[index] == labels[source]
        np.testing.assert_allclose(coarse @ [*index, 1], affine @ [*source, 1], atol=1e-12)
    inner = (slice(2, -2),) * d
    np.testing.assert_allclose(smooth[inner], 106, atol=1)
    np.testing.assert_allclose(
        make_samples.halve(slow, labels, affine)[0][inner],
        slow[(slice(None, None, 2),) * d][inner],
        atol=5,
    )


def test_cutting_keeps_places():
    image = np.zeros((30, 41), np.uint8)
    labels = np.zeros_like(image)
    image[12:20, 11:30] = 1
    labels[11, 30] = 5
    affine = np.array([[2.0, 0, -10], [0, 2.0, 3], [0, 0, 1]])
    small, kept, place = make_samples.cut(image, labels, affine)
    assert small.shape == (20 - 11 + 2 * 4, 31 - 11 + 2 * 4)
    assert kept[4, 23] == 5
    np.testing.assert_allclose(place @ [4, 23, 1], affine @ [11, 30, 1])


def test_the_embedded_brains_are_the_ones_the_script_made():
    """Of the voxels, by their checksums: the compression of the files may differ elsewhere."""
    for (name, dimensions), wanted in BRAINS_SHA256.items():
        brain = getattr(datasets, name)(dimensions=dimensions)
        voxels = (
            as_bytes(brain.image.tensor).tobytes() + as_bytes(brain.labels.tensor / 255).tobytes()
        )
        assert hashlib.sha256(voxels).hexdigest() == wanted


def test_the_embedded_boxes_are_the_ones_the_script_made():
    digest = hashlib.sha256(b"".join(array.tobytes() for array in boxes()))
    assert digest.hexdigest() == BOXES_SHA256


@pytest.mark.parametrize("mirror", [False, True])
def test_a_box_lies_around_its_first_structure(mirror):
    """56 x 72 x 56 voxels about the middle of label 7; of the others, what is asked for."""
    image = np.arange(70 * 80 * 75, dtype=np.int64).reshape(70, 80, 75)
    labels = np.zeros(image.shape, np.uint8)
    labels[31:40, 30:47, 35:40] = 7
    labels[33, 50, 36] = 9
    labels[20, 40, 40] = 3
    box, marked = make_samples.hippocampus_box(image, labels, (7, 9), mirror=mirror)
    assert box.shape == marked.shape == (56, 72, 56)
    if mirror:
        box, marked = box[::-1], marked[::-1]
    # The middle of 31 ... 39 is 35, and comes to lie at 28, the middle of 56.
    assert box[0, 0, 0] == image[35 - 28, 38 - 36, 37 - 28]
    assert (marked == 1).sum() == 9 * 17 * 5
    assert np.argwhere(marked == 2).tolist() == [[33 - 7, 50 - 2, 36 - 9]]
    with pytest.raises(ValueError, match="image: wanted a box"):
        make_samples.hippocampus_box(image[:60], labels[:60], (7, 9), mirror=mirror)
