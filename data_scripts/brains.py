"""IXI brains at 2 mm as arrays, for scripts that train where only torch and NumPy are.

    REGLIB_DATA=FOLDER python data_scripts/brains.py

writes build/brains/ixi_2mm.npz: the images of every part of splits.json as bytes, and their 29
structures numbered from 1. It stays out of the repository, as the data do; a job on another
machine takes it along.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ROOT / "data_scripts" / "splits.json"
PACKED = ROOT / "build" / "brains" / "ixi_2mm.npz"


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
    from reglib.data.files import write_bytes
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
    memory = io.BytesIO()
    np.savez_compressed(memory, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, memory.getvalue())
    print(f"{path}: {len(arrays) // 2} brains, {len(memory.getvalue()) / 2**20:.1f} MiB")


def load(part: str, path: Path = PACKED) -> Brains:
    """The brains of a part of splits.json, in its order."""
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing: run data_scripts/brains.py first")
    subjects = list(json.loads(SPLITS.read_text())["ixi_2mm"][part])
    with np.load(path) as file:
        images = np.stack([file[f"{name}/image"] for name in subjects])
        labels = np.stack([file[f"{name}/labels"] for name in subjects])
    return Brains(
        subjects,
        torch.from_numpy(images).unsqueeze(1).float() / 255,
        torch.from_numpy(labels).unsqueeze(1),
    )


if __name__ == "__main__":
    pack()
