"""Let ANTs register two tiny images and keep its field: what ``tests/test_nifti.py`` reads.

Needs antspyx, in an environment of its own (see ``requirements-oracles.txt``):

    .venv-oracles/bin/python data_scripts/make_ants_field.py

Writes ``tests/data/ants/``: ``moving.nii.gz`` (uint8), ``field.nii.gz`` (untouched, as ANTs wrote
it) and ``warped.nii.gz`` (moving, resampled by ``antsApplyTransforms`` onto the fixed grid), less
than 10 KB each. The two grids are oblique and differ in size, spacing and handedness. ANTs is not
deterministic: another run gives another field, which the test must read as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ants
import numpy as np

OUT = Path(__file__).parents[1] / "tests" / "data" / "ants"
FIXED = {"shape": (11, 9, 8), "spacing": (2.0, 2.5, 3.0), "turn": 20.0, "mirror": 1.0}
MOVING = {"shape": (12, 12, 9), "spacing": (1.8, 2.2, 2.6), "turn": -15.0, "mirror": -1.0}


def blob(radii: tuple[float, float, float], shape, spacing, turn: float, mirror: float):
    """An ellipsoid with a soft edge around the world's origin, on a grid centred there (LPS)."""
    c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    tilt = np.deg2rad(10)
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    )
    direction[:, 0] *= mirror
    linear = direction * np.array(spacing)
    origin = -linear @ ((np.array(shape) - 1) / 2)
    places = np.tensordot(linear, np.indices(shape), 1) + origin.reshape(3, 1, 1, 1)
    radius = np.sqrt((places**2 / np.array(radii).reshape(3, 1, 1, 1) ** 2).sum(0))
    values = np.round(200 / (1 + np.exp(6 * (radius - 1))) + places[0] + 20).clip(0, 255)
    return ants.from_numpy(
        values.astype(np.float32),
        origin=origin.tolist(),
        spacing=list(spacing),
        direction=direction,
    )


def main() -> None:
    """Register and write the three files."""
    OUT.mkdir(parents=True, exist_ok=True)
    fixed = blob((7.0, 8.0, 6.0), **FIXED)
    moving = blob((8.5, 6.5, 7.0), **MOVING)
    result = ants.registration(
        fixed, moving, "SyNOnly", syn_metric="meansquares", reg_iterations=(60, 30)
    )
    (warp,) = (t for t in result["fwdtransforms"] if t.endswith("Warp.nii.gz"))
    ants.image_write(moving.clone("unsigned char"), str(OUT / "moving.nii.gz"))
    shutil.copy(warp, OUT / "field.nii.gz")
    warped = ants.apply_transforms(fixed, moving, [warp], interpolator="linear")
    ants.image_write(warped, str(OUT / "warped.nii.gz"))
    largest = float(np.abs(ants.image_read(warp).numpy()).max())
    print(f"antspyx {ants.__version__}: largest displacement {largest:.2f} mm")


if __name__ == "__main__":
    main()
