"""Let ANTs apply what ``Registration.save`` writes: the oracle of ``tests/test_itk_affine.py``.

In two steps, as antspyx wants an environment of its own (see ``requirements-oracles.txt``):

    python data_scripts/make_ants_applied.py save
    .venv-oracles/bin/python data_scripts/make_ants_applied.py apply

The first writes the transform of :func:`example` to ``tests/data/ants_applied``, for the moving
image that ``make_ants_field.py`` made. The second has ``antsApplyTransforms`` resample that image
(linear; nearest as labels) through ``field.nii.gz``, and through ``residual_field.nii.gz`` and
``affine.mat``, and carry points (LPS mm) along both; less than 30 KB in all.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from reglib.registration import Registration

DATA = Path(__file__).parents[1] / "tests" / "data"
MOVING, OUT = DATA / "ants" / "moving.nii.gz", DATA / "ants_applied"
SHAPE = (11, 9, 8)
POINTS = [[0.0, 0.0, 0.0], [3.0, -2.0, 4.0], [-5.0, 4.0, -3.5], [6.5, 1.0, 2.0]]


def example() -> Registration:
    """A rotated, stretched and bent transform between oblique grids of opposite handedness."""
    import torch

    from reglib.data.nifti import read_image
    from reglib.geometry.affine import affine_matrix, grid_centre
    from reglib.geometry.grid import identity_grid
    from reglib.registration import Registration

    moving = read_image(MOVING)
    centre = grid_centre(moving.affine, moving.tensor.shape[2:])
    turned = affine_matrix(
        torch.tensor([[0.2, -0.1, 0.3]], dtype=torch.float64),
        torch.tensor([[1.5, -1.0, 0.5]], dtype=torch.float64),
        log_scales=torch.tensor([[0.1, -0.05, 0.0]], dtype=torch.float64),
        shears=torch.tensor([[0.05, 0.0, -0.05]], dtype=torch.float64),
        centre=centre,
    )
    spacing = torch.diag(torch.tensor([2.0, 2.5, 3.0, 1.0], dtype=torch.float64))
    tilt = math.radians(15)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor(
        [[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]]
    )
    fixed_affine = turn @ spacing
    middle = fixed_affine[:3, :3] @ torch.tensor([(n - 1) / 2 for n in SHAPE], dtype=torch.float64)
    fixed_affine[:3, 3] = centre[0] - middle
    x = identity_grid(SHAPE, dtype=torch.float32)
    u = torch.stack([torch.sin(x[:, (c + 1) % 3] / 2 + c) * (1.2 - 0.3 * c) for c in range(3)], 1)
    return Registration(turned, u, fixed_affine, moving.affine, tuple(moving.tensor.shape[2:]))


def apply() -> None:
    """What ANTs makes of the files."""
    import ants
    import pandas as pd

    moving = ants.image_read(str(MOVING))
    field = [str(OUT / "field.nii.gz")]
    # As in what ANTs itself writes: a point of the fixed image goes through the first one first.
    parts = [str(OUT / "residual_field.nii.gz"), str(OUT / "affine.mat")]
    whole = ants.image_read(field[0])
    fixed = ants.from_numpy(
        np.zeros(SHAPE, np.float32),
        origin=whole.origin[:3],
        spacing=whole.spacing[:3],
        direction=whole.direction[:3, :3],
    )
    points = pd.DataFrame(POINTS, columns=["x", "y", "z"])
    for name, transforms in (("field", field), ("parts", parts)):
        for kind, how in (("image", "linear"), ("labels", "nearestNeighbor")):
            out = ants.apply_transforms(fixed, moving, transforms, interpolator=how)
            ants.image_write(out, str(OUT / f"{name}_{kind}.nii.gz"))
        carried = ants.apply_transforms_to_points(3, points, transforms)
        np.savetxt(OUT / f"{name}_points.csv", carried[["x", "y", "z"]].to_numpy(), delimiter=",")
    print(f"antspyx {ants.__version__}")


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("step", choices=("save", "apply"))
    if parser.parse_args().step == "apply":
        apply()
        return
    example().save(OUT)
    # Neither ANTs nor the test needs these.
    for name in ("inverse_field.nii.gz", "report.json"):
        (OUT / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
