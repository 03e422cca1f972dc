"""Make data_scripts/splits.json: who is for training, for tuning and for the test.

    REGLIB_DATA=FOLDER python data_scripts/make_splits.py

Written once, before any setting was tuned on these sets, and not changed since: a test recomputes
it wherever the data are at hand. Drawn by patient (LGG), patch (QuickBird), crop (hippocampus; the
two sides of one person may both occur, and the files do not tell) or subject (IXI).
"""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path

SPLITS = Path(__file__).with_name("splits.json")
SIZES = {
    "lgg": {"tuning": 20, "test": 60},
    "quickbird": {"tuning": 3, "test": 8},
    "hippocampus": {"train": 150, "validation": 20, "test": 30},
    "ixi_2mm": {"train": 100, "validation": 10, "test": 30},
}


def members(folder: Path, name: str) -> list[str]:
    """Every patient, patch, crop or subject of a set, in ascending order."""
    if name == "lgg":
        with open(folder / name / "index.csv", newline="") as file:
            return sorted({row["patient"] for row in csv.DictReader(file)})
    if name == "quickbird":
        return [str(patch) for patch in range(11)]
    images = {"hippocampus": "imagesTr", "ixi_2mm": "t1_brain"}[name]
    return sorted(path.name.split(".")[0] for path in (folder / name / images).glob("*.nii.gz"))


def draw(everyone: list[str], sizes: dict[str, int], seed: int = 0) -> dict[str, list[str]]:
    """Deal a shuffled list out into parts of the given sizes, each in ascending order."""
    if len(everyone) != sum(sizes.values()):
        raise ValueError(f"everyone: wanted {sum(sizes.values())} members, got {len(everyone)}")
    shuffled = random.Random(seed).sample(everyone, len(everyone))
    parts, start = {}, 0
    for name, size in sizes.items():
        part = shuffled[start : start + size]
        parts[name] = sorted(part, key=lambda member: (len(member), member))
        start += size
    return parts


def splits(folder: Path) -> dict[str, dict[str, list[str]]]:
    """All splits, from the data in ``folder``."""
    return {name: draw(members(folder, name), sizes) for name, sizes in SIZES.items()}


if __name__ == "__main__":
    SPLITS.write_text(json.dumps(splits(Path(os.environ["REGLIB_DATA"])), indent=1) + "\n")
