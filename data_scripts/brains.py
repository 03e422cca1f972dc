"""IXI brains at 2 mm as arrays, for scripts that train where only torch and NumPy are.

    REGLIB_DATA=FOLDER python data_scripts/brains.py

writes build/brains/ixi_2mm.npz: the images of every part of splits.json as bytes, and their 29
structures numbered from 1. It stays out of the repository, as the data do; a job on another
machine takes it along.

    REGLIB_DATA=FOLDER python data_scripts/brains.py malf

writes build/brains/malf_2mm.npz: the 18 brains of the MICCAI 2012 challenge (OASIS-1, labels drawn
by hand) on the same grid, for measuring only. Their licence is CC BY-NC: the file stays in build/,
and no picture and no weight is made from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from provenance import write_npz
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ROOT / "data_scripts" / "splits.json"
PACKED = ROOT / "build" / "brains" / "ixi_2mm.npz"
PACKED_MALF = PACKED.with_name("malf_2mm.npz")


class Brains(NamedTuple):
    """Brains on one grid of 2 mm: float32 images in [0, 1] and uint8 labels, both (N, 1, *S)."""

    subjects: list[str]
    images: Tensor
    labels: Tensor


def ixi_structures() -> dict[str, tuple[int, ...]]:
    """29 structures and their MUSE labels."""
    both = {
        "accumbens": (23, 30),
        "amygdala": (31, 32),
        "caudate": (36, 37),
        "cerebellum cortex": (38, 39),
        "cerebellum white matter": (40, 41),
        "hippocampus": (47, 48),
        "lateral ventricle": (51, 52),
        "pallidum": (55, 56),
        "putamen": (57, 58),
        "thalamus": (59, 60),
        "ventral DC": (61, 62),
    }
    found = {"brain stem": (35,), "third ventricle": (4,), "fourth ventricle": (11,)}
    for name, sides in both.items():
        found |= {f"{side} {name}": (n,) for side, n in zip(("right", "left"), sides, strict=True)}
    return found | {
        "right cerebral white matter": tuple(range(81, 95, 2)),
        "left cerebral white matter": tuple(range(82, 95, 2)),
        "right cortex": tuple(range(100, 208, 2)),
        "left cortex": tuple(range(101, 208, 2)),
    }


def malf_structures() -> dict[str, tuple[int, ...]]:
    """The same 29 structures and their labels in the malf set, in the same order.

    All of them are there, and every one of the 18 brains has every structure. The ids are those of
    MUSE but for cerebral white matter, which is 44 (right) and 45 (left) instead of seven lobar
    regions a side. Cortex is made of the 98 ids from 100 to 207 that both sets use.
    """
    own = {"right cerebral white matter": (44,), "left cerebral white matter": (45,)}
    return ixi_structures() | own


def relabel(labels: Tensor, structures: Iterable[tuple[int, ...]]) -> Tensor:
    """Number structures, each made of some labels, from 1; all other labels become 0."""
    table = torch.zeros(int(labels.max()) + 1, dtype=torch.long)
    for number, members in enumerate(structures, 1):
        table[[n for n in members if n < len(table)]] = number
    return table[labels]


def scaled(values: Tensor) -> Tensor:
    """Least value to 0, 99th percentile to 1, clipped: one bright voxel must not set the scale."""
    low, high = values.min(), torch.quantile(values.double(), 0.99).to(values)
    return ((values - low) / (high - low)).clamp(0, 1)


def pack(path: Path = PACKED) -> None:
    """Read the NIfTI files of every part and write one compressed file."""
    from reglib.data.assets import fetch
    from reglib.data.nifti import read_image, read_labels

    folder = fetch("ixi_2mm")
    parts: Mapping[str, Sequence[str]] = json.loads(SPLITS.read_text())["ixi_2mm"]
    arrays: dict[str, np.ndarray] = {}
    structures = list(ixi_structures().values())
    for subjects in parts.values():
        for name in subjects:
            image = scaled(read_image(folder / "t1_brain" / f"{name}.nii.gz").tensor)
            labels = read_labels(folder / "dlmuse" / f"{name}.nii.gz").tensor
            arrays[f"{name}/image"] = (255 * image[0, 0]).round().byte().numpy()
            arrays[f"{name}/labels"] = relabel(labels, structures)[0, 0].byte().numpy()
    _write(path, arrays)


def pack_malf(path: Path = PACKED_MALF) -> None:
    """Bring the malf brains to the grid of IXI's and write one compressed file.

    As IXI's were prepared, each is aligned to MNI152 at 2 mm, here by the library's own affine
    registration; its voxels are sampled once. Images are smoothed to the new voxels, labels
    carried nearest.
    """
    from reglib.data.assets import fetch
    from reglib.data.conform import resample
    from reglib.data.nifti import Image, read_image, read_labels
    from reglib.methods.classical import Affine
    from reglib.registration import register

    folder = fetch("malf")
    grid = read_image(fetch("ixi_2mm") / "mni152_t1_2mm.nii.gz")
    fixed = Image(scaled(grid.tensor), grid.affine)
    shape = tuple(fixed.tensor.shape[2:])
    arrays: dict[str, np.ndarray] = {}
    structures = list(malf_structures().values())
    for file in sorted((folder / "t1_brain").glob("*.nii.gz")):
        name = file.name.removesuffix(".nii.gz")
        moving = read_image(file)
        moving = Image(scaled(moving.tensor), moving.affine)
        labels = read_labels(folder / "labels" / file.name)
        found = register(moving, fixed, Affine(), progress=False)
        image = resample(moving.tensor, moving.affine, fixed.affine, shape, matrix=found.affine)
        carried = found.apply_labels(Image(relabel(labels.tensor, structures), labels.affine))
        arrays[f"{name}/image"] = (255 * scaled(image[0, 0])).round().byte().numpy()
        arrays[f"{name}/labels"] = carried.tensor[0, 0].byte().numpy()
    _write(path, arrays)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_npz(path, **arrays)
    print(f"{path}: {len(arrays) // 2} brains, {path.stat().st_size / 2**20:.1f} MiB")


def load(part: str, path: Path = PACKED) -> Brains:
    """The brains of a part of splits.json, in its order."""
    subjects = list(json.loads(SPLITS.read_text())["ixi_2mm"][part])
    return _read(path, subjects)


def load_malf(path: Path = PACKED_MALF) -> Brains:
    """The malf brains, all of them for testing, in the order of their ids."""
    return _read(path)


def _read(path: Path, subjects: list[str] | None = None) -> Brains:
    """Some brains of a packed file; ``None`` means all."""
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing: run data_scripts/brains.py first")
    with np.load(path) as file:
        if subjects is None:
            subjects = sorted({name.partition("/")[0] for name in file.files})
        images = np.stack([file[f"{name}/image"] for name in subjects])
        labels = np.stack([file[f"{name}/labels"] for name in subjects])
    return Brains(
        subjects,
        torch.from_numpy(images).unsqueeze(1).float() / 255,
        torch.from_numpy(labels).unsqueeze(1),
    )


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["malf"]):
        raise SystemExit(__doc__)
    (pack_malf if sys.argv[1:] else pack)()
