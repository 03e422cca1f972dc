"""Affine transforms on disk, in the MATLAB file that ANTs writes and ITK reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import scipy.io
import torch
from torch import Tensor

from reglib.checks import check_affine
from reglib.data.files import write_bytes
from reglib.data.nifti import to_lps

# ITK's classes whose parameters are a matrix, row by row, and a translation about a centre.
_KINDS = ("AffineTransform_", "MatrixOffsetTransformBase_")


def write_affine(path: str | Path, matrix: Tensor) -> None:
    """Write an affine map of the world as ITK's ``AffineTransform``; whole or not at all.

    Args:
        path: ``.mat``.
        matrix: ``(D+1, D+1)``, world mm (RAS) of the fixed image to that of the moving one.

    Raises:
        OSError: if the file cannot be written.
        TypeError, ValueError: if the name does not end with ``.mat``, or the matrix is not
            homogeneous and invertible.
    """
    path = Path(path)
    if path.suffix != ".mat":
        raise ValueError(f"{path}: wanted a name that ends with .mat")
    d = 2 if getattr(matrix, "shape", None) == (3, 3) else 3
    world = check_affine(matrix, "matrix", d)
    signs = to_lps(d)
    linear = signs.unsqueeze(1) * world[:d, :d] * signs
    # About the origin, so that the translation is the offset.
    values = torch.cat([linear.flatten(), signs * world[:d, d]]).numpy()
    content = io.BytesIO()
    arrays = {f"AffineTransform_double_{d}_{d}": values[:, None], "fixed": np.zeros((d, 1))}
    scipy.io.savemat(content, arrays, format="4")
    write_bytes(path, content.getvalue())


def read_affine(path: str | Path) -> Tensor:
    """Read an affine map that ITK, ANTs or :func:`write_affine` wrote.

    Args:
        path: ``.mat``.

    Returns:
        ``(D+1, D+1)``, world mm (RAS), fixed to moving; float64.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no affine transform of ITK.
    """
    path = Path(path)
    try:
        arrays = scipy.io.loadmat(io.BytesIO(path.read_bytes()))
        names = [key for key in arrays if not key.startswith("__") and key != "fixed"]
        if len(names) != 1 or not names[0].startswith(_KINDS):
            raise ValueError(f"{', '.join(names) or 'nothing'}")
        centre = np.asarray(arrays["fixed"], np.float64).ravel()
        values = np.asarray(arrays[names[0]], np.float64).ravel()
        d = len(centre)
        if d not in (2, 3) or len(values) != d * d + d:
            raise ValueError(f"{len(values)} numbers about a centre of {d}")
        linear = values[: d * d].reshape(d, d)
        offset = values[d * d :] + centre - linear @ centre
        matrix = torch.eye(d + 1, dtype=torch.float64)
        signs = to_lps(d)
        matrix[:d, :d] = signs.unsqueeze(1) * torch.from_numpy(linear) * signs
        matrix[:d, d] = signs * torch.from_numpy(offset)
    # SciPy raises whatever the part that is wrong happens to cause.
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: wanted an affine transform of ITK, got {error}") from error
    return check_affine(matrix, str(path), d)
