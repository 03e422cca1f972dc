"""Make the data that travels with the package: reglib/data/samples/.

    python data_scripts/make_samples.py [SAMPLE ...] [--root FOLDER] [--packages FOLDER]

of mnist, brains, hippocampi and sentinel2; all if none is named.

mnist: the official files (``--root``, or what ``reglib.data.assets.fetch`` gives), of which the
first 400 digits of each class of the training set and the first 100 of each class of
the test set are kept, in their original order. CC BY-SA 3.0, see NOTICE.

brains: the subject Colin27 with the AAL labels, from Debian's mricron-data, and the template
MNI152 2009a with FreeSurfer's labels, from the Python packages nilearn and nibabies, as fetch
gives them; ``--packages`` names a folder where the packages lie or come to lie. Both brains are
without skull and are stored

* as volumes with a spacing of 2 mm: a Gaussian filter of sigma 0.85 mm (whose full width at half
  maximum is the new spacing), then every second voxel along each axis, so that each voxel kept
  stays where it was in the world; of the label maps every second voxel as it is;
* as the axial slice 2 mm above the origin, with the spacing of 1 mm of the source, unfiltered.

Colin27 keeps the field of view of its source; MNI152, the grid that others come to, is cut to the
brain and a margin of 8 mm.

hippocampi: boxes of 56 x 72 x 56 voxels of 1 mm around the left and the right hippocampus of both
brains, unfiltered, from the same packages. The right ones are mirrored along their first axis; of
the labels, hippocampus (1) and amygdala (2) of the box's side are kept. Whoever deforms a box has
four voxels at every face to take from. The files depend on the packages alone.

sentinel2: the patch of four bands at 10 m that comes with the Python package spyndex, 300 x 300
pixels, unaltered.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from reglib.data import datasets
from reglib.data.assets import fetch
from reglib.data.files import write_bytes
from reglib.data.nifti import Image, write_image

SAMPLES = Path(datasets.__file__).parent / "samples"

#: The labels of FreeSurfer that the MNI152 sample keeps.
FREESURFER = {
    2: "Left-Cerebral-White-Matter",
    3: "Left-Cerebral-Cortex",
    4: "Left-Lateral-Ventricle",
    5: "Left-Inf-Lat-Vent",
    7: "Left-Cerebellum-White-Matter",
    8: "Left-Cerebellum-Cortex",
    10: "Left-Thalamus",
    11: "Left-Caudate",
    12: "Left-Putamen",
    13: "Left-Pallidum",
    14: "3rd-Ventricle",
    15: "4th-Ventricle",
    16: "Brain-Stem",
    17: "Left-Hippocampus",
    18: "Left-Amygdala",
    24: "CSF",
    26: "Left-Accumbens-area",
    28: "Left-VentralDC",
    30: "Left-vessel",
    31: "Left-choroid-plexus",
    41: "Right-Cerebral-White-Matter",
    42: "Right-Cerebral-Cortex",
    43: "Right-Lateral-Ventricle",
    44: "Right-Inf-Lat-Vent",
    46: "Right-Cerebellum-White-Matter",
    47: "Right-Cerebellum-Cortex",
    49: "Right-Thalamus",
    50: "Right-Caudate",
    51: "Right-Putamen",
    52: "Right-Pallidum",
    53: "Right-Hippocampus",
    54: "Right-Amygdala",
    58: "Right-Accumbens-area",
    60: "Right-VentralDC",
    62: "Right-vessel",
    63: "Right-choroid-plexus",
    72: "5th-Ventricle",
    85: "Optic-Chiasm",
    251: "CC_Posterior",
    252: "CC_Mid_Posterior",
    253: "CC_Central",
    254: "CC_Mid_Anterior",
    255: "CC_Anterior",
}
# Parcels of cortex and of white matter become one label for each side. FreeSurfer numbers them by
# thousands; 5001 and 5002 are white matter that belongs to no parcel.
THOUSANDS = {1: 3, 2: 42, 3: 2, 4: 41}
DEEP_WHITE_MATTER = {5001: 2, 5002: 41}

STEP = 2
SIGMA = STEP / math.sqrt(8 * math.log(2))
SLICE_HEIGHT = 2.0
MARGIN = 8.0
# Beyond the width of a sulcus: the published skull-stripped Colin27 is cut down into the sulci,
# the template is not.
CLOSING = 4
# Of the boxes around hippocampi, at every face.
BOX_MARGIN = 4


# --- MNIST ----------------------------------------------------------------------------------


def first_of_each_class(digits: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first ``count`` members of each class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(digits == d)[:count] for d in range(10)]))


def save_reproducibly(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz whose bytes depend on the arrays alone (numpy stamps the time of day)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED)


def make_mnist(root: Path | None) -> None:
    """Write mnist.npz."""
    arrays = {}
    for split, count in (("train", 400), ("test", 100)):
        images, digits = datasets.mnist(split, full=True, root=root)
        keep = first_of_each_class(digits.numpy(), count)
        arrays[f"{split}_images"] = (images[keep, 0] * 255).round().byte().numpy()
        arrays[f"{split}_digits"] = digits[keep].byte().numpy()
        print(split, arrays[f"{split}_images"].shape)
    save_reproducibly(SAMPLES / "mnist.npz", arrays)
    print(SAMPLES / "mnist.npz", (SAMPLES / "mnist.npz").stat().st_size, "bytes")


# --- Brains ---------------------------------------------------------------------------------


def nifti_from(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a NIfTI file, turned so that its axes are RAS."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).reshape(image.shape[:3]), image.affine


def closed(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask after a closing with a ball of ``radius`` voxels, its holes filled."""
    ball = np.sum((np.indices((2 * radius + 1,) * 3) - radius) ** 2, axis=0) <= radius**2
    padded = np.pad(mask, radius)
    inside = tuple(slice(radius, -radius) for _ in range(3))
    return ndimage.binary_fill_holes(ndimage.binary_closing(padded, ball))[inside]


def halve(image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, ...]:
    """Every second voxel of the filtered image and of the labels; the affine that fits them."""
    smooth = ndimage.gaussian_filter(image.astype(np.float64), SIGMA, truncate=5, mode="nearest")
    every = (slice(None, None, STEP),) * image.ndim
    coarse = affine @ np.diag([STEP] * image.ndim + [1.0])
    return np.rint(smooth[every]).astype(np.uint8), labels[every], coarse


def cut(image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, ...]:
    """What lies within the margin around the brain, as far as the image goes."""
    margin = round(MARGIN / np.linalg.norm(affine[:, 0]))
    corner, slices = [], []
    for axis, size in enumerate(image.shape):
        others = tuple(a for a in range(image.ndim) if a != axis)
        used = np.flatnonzero(((image > 0) | (labels > 0)).any(axis=others))
        first, last = max(used[0] - margin, 0), min(used[-1] + margin, size - 1)
        corner.append(first)
        slices.append(slice(first, last + 1))
    shift = np.eye(image.ndim + 1)
    shift[:-1, -1] = corner
    return image[tuple(slices)], labels[tuple(slices)], affine @ shift


def axial(image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, ...]:
    """The slice at ``SLICE_HEIGHT`` mm, and where its pixels are along the first two axes."""
    k = round((SLICE_HEIGHT - affine[2, 3]) / affine[2, 2])
    return image[:, :, k], labels[:, :, k], np.delete(np.delete(affine, 2, axis=0), 2, axis=1)


def colin27(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """Image without skull, AAL labels, affine and the names of the labels, at 1 mm."""
    head, affine = nifti_from(folder / "ch2.nii.gz")
    stripped, _ = nifti_from(folder / "ch2bet.nii.gz")
    labels, _ = nifti_from(folder / "aal.nii.gz")
    text = (folder / "aal.nii.txt").read_text()
    brain = closed((stripped > 0) | (labels > 0), CLOSING)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return head * brain, labels, affine, {int(number): name for number, name, *_ in lines}


def mni152(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """Template without skull, FreeSurfer's labels on its grid, affine, names, at 1 mm."""
    image, affine = nifti_from(folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    parcels = "tpl-MNI152NLin6Asym_res-01_desc-avgwmparc_dseg.nii.gz"
    source, place = nifti_from(folder / parcels)
    source = source.astype(np.int64)
    kept = np.zeros_like(source)
    for number in np.unique(source):
        name = DEEP_WHITE_MATTER.get(number, THOUSANDS.get(number // 1000, number))
        if name in FREESURFER:
            kept[source == number] = name
    # Both grids have 1 mm and voxels at whole millimetres, so no label is interpolated.
    start = np.rint(place[:3, 3] - affine[:3, 3]).astype(int)
    labels = np.zeros(image.shape, np.uint8)
    labels[tuple(slice(s, s + n) for s, n in zip(start, kept.shape, strict=True))] = kept
    # The labels were made for another template of the same space; none may lie beside this brain.
    return image, labels * (image > 0), affine, FREESURFER


def write_brain(name: str, image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> None:
    """Write an image and its labels as compressed NIfTI files."""
    for part, values in (("t1", image), ("labels", labels)):
        path = SAMPLES / f"{name}_{part}.nii.gz"
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.uint8))[None, None]
        write_image(path, Image(tensor, torch.from_numpy(affine)))
        # These files travel with every installation, so they get the highest compression.
        write_bytes(path, gzip.compress(gzip.decompress(path.read_bytes()), 9, mtime=0))
        print(path, values.shape, affine[:-1, -1], path.stat().st_size, "bytes")


def make_brains(packages: Path | None) -> None:
    """Write the two brains, volumes and slices, and the names of their labels."""
    names = {}
    for name, read, source in (
        ("colin27", colin27, "colin27"),
        ("mni152", mni152, "mni152_2009a"),
    ):
        *brain, numbered = read(fetch(source, downloads=packages))
        numbers = sorted(set(np.unique(brain[1]).tolist()) - {0})
        names[name] = {number: numbered[number] for number in numbers}
        for part, smaller in (("2mm", halve(*brain)), ("slice", axial(*brain))):
            write_brain(f"{name}_{part}", *(cut(*smaller) if name == "mni152" else smaller))
    write_bytes(SAMPLES / "label_names.json", (json.dumps(names, indent=1) + "\n").encode())


# --- Hippocampi -----------------------------------------------------------------------------


def hippocampus_box(
    image: np.ndarray, labels: np.ndarray, numbers: tuple[int, ...], *, mirror: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The box whose middle is that of the first structure, and its labels, ``numbers`` from 1."""
    shape = [n + 2 * BOX_MARGIN for n in datasets.HIPPOCAMPUS_SHAPE]
    places = np.argwhere(labels == numbers[0])
    start = (places.min(0) + places.max(0) + 1) // 2 - np.array(shape) // 2
    box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    if min(start) < 0 or image[box].shape != tuple(shape):
        raise ValueError(f"image: wanted a box of {shape} from {start} on, got {image.shape}")
    marked = np.zeros(shape, np.uint8)
    for value, number in enumerate(numbers, 1):
        marked[labels[box] == number] = value
    return (image[box][::-1], marked[::-1]) if mirror else (image[box], marked)


def make_hippocampi(packages: Path | None) -> None:
    """Write hippocampus.npz."""
    boxes = []
    for column, (read, source) in enumerate(((colin27, "colin27"), (mni152, "mni152_2009a"))):
        image, labels, _, _ = read(fetch(source, downloads=packages))
        for side in ("left", "right"):
            numbers = tuple(
                datasets.SHARED_STRUCTURES[f"{side} {structure}"][column]
                for structure in ("hippocampus", "amygdala")
            )
            boxes.append(hippocampus_box(image, labels, numbers, mirror=side == "right"))
    images, labels = (np.stack(parts).astype(np.uint8) for parts in zip(*boxes, strict=True))
    path = SAMPLES / "hippocampus.npz"
    save_reproducibly(path, {"images": images, "labels": labels})
    print(path, images.shape, path.stat().st_size, "bytes")


# --- Sentinel-2 -----------------------------------------------------------------------------


def make_sentinel2(packages: Path | None) -> None:
    """Write sentinel2.npz."""
    with np.load(fetch("sentinel2", downloads=packages) / "sentinel2_300x300.npz") as arrays:
        data, bands = arrays["data"], arrays["bands"]
    path = SAMPLES / "sentinel2.npz"
    save_reproducibly(path, {"data": data, "bands": bands})
    print(path, data.shape, path.stat().st_size, "bytes")


def main() -> None:
    """Write the samples asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    samples = ("mnist", "brains", "hippocampi", "sentinel2")
    parser.add_argument(
        "samples", nargs="*", metavar="SAMPLE", help=f"{', '.join(samples)}; all if none"
    )
    parser.add_argument("--root", type=Path, help="folder with the four files of MNIST")
    parser.add_argument("--packages", type=Path, help="folder of the packages")
    arguments = parser.parse_args()
    unknown = set(arguments.samples) - set(samples)
    if unknown:
        parser.error(f"wanted some of {', '.join(samples)}, got {', '.join(sorted(unknown))}")
    wanted = arguments.samples or samples
    if "mnist" in wanted:
        make_mnist(arguments.root)
    if "brains" in wanted:
        make_brains(arguments.packages)
    if "hippocampi" in wanted:
        make_hippocampi(arguments.packages)
    if "sentinel2" in wanted:
        make_sentinel2(arguments.packages)


if __name__ == "__main__":
    main()
