"""Images as users bring and want them: colours, integer types, pictures, transforms on disk."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reglib.data.nifti import Image
    from reglib.registration import Registration

# ITU-R BT.601, as Pillow's own conversion to grey.
_LUMINANCE = (0.299, 0.587, 0.114)

#: How far apart voxels may be, in mm, and still be said to lie at the same place.
SAME_PLACE = 1e-3


def read(path: Path, nonfinite: float | None = None) -> tuple[Image, torch.dtype | None]:
    """Read an image for computing.

    Args:
        path: NIfTI file or picture.
        nonfinite: what NaN and infinite voxels become; ``None`` refuses them.

    Returns:
        The image, float32, all channels; and the integer type of the file, ``None`` if it holds
        real numbers.

    Raises:
        OSError, ValueError: as :func:`reglib.data.nifti.read_image`.
    """
    import torch

    from reglib.checks import check_finite
    from reglib.data.nifti import read_image

    try:
        image = read_image(path, dtype=None, nonfinite=nonfinite)
    except ValueError as error:  # in the words of the command line
        raise ValueError(str(error).replace("nonfinite=0.0", "--nonfinite 0")) from error
    kind = image.tensor.dtype
    tensor = image.tensor.to(torch.float32)
    check_finite(tensor, str(path))  # what does not fit into float32 is infinite now
    image = dataclasses.replace(image, tensor=tensor)
    if kind.is_floating_point:
        return image, None
    # Nothing that has passed through float32 needs the wider types.
    return image, kind if kind.itemsize <= 2 else torch.int32


def luminance(image: Image) -> Image:
    """One channel of an image: that which it has, or the brightness of its colours, without alpha.

    Args:
        image: ``(1, C, *S)`` with C = 1, or as in a picture: 2 grey and alpha, 3 RGB, 4 RGBA.

    Returns:
        ``(1, 1, *S)``.
    """
    channels = image.tensor
    if channels.shape[1] < 3:
        return dataclasses.replace(image, tensor=channels[:, :1])
    weights = channels.new_tensor(_LUMINANCE).view(1, 3, *(1,) * (channels.ndim - 2))
    grey = (channels[:, :3] * weights).sum(1, keepdim=True)
    return dataclasses.replace(image, tensor=grey)


def write_on_grid(
    folder: Path, stem: str, image: Image, *, picture: bool, kind: torch.dtype | None = None
) -> Path:
    """Write an image under a name whose suffix says what could hold it without loss.

    Args:
        folder: where.
        stem: the name without suffix.
        image: what to write.
        picture: whether it lies on the grid of a picture; then PNG and TIFF are tried first.
        kind: integer type to round to; ``None`` stores the values as they are.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be written.
        ValueError: if nothing holds it.
    """
    from reglib.data.nifti import write_image

    for suffix in (".png", ".tif") if picture else ():
        path = folder / f"{stem}{suffix}"
        try:
            write_image(path, image, dtype=kind)
        except (TypeError, ValueError):  # this format does not hold it
            continue
        return path
    path = folder / f"{stem}.nii.gz"
    write_image(path, image, dtype=kind)
    return path


def read_transform(path: Path) -> Registration:
    """Read a folder of ``reglib register``, or a displacement field as ITK and ANTs write it.

    Raises:
        OSError, ValueError: if there is neither.
    """
    from reglib.data.nifti import read_field
    from reglib.registration import Registration

    if path.is_dir():
        return Registration.load(path)
    if not path.exists():
        raise FileNotFoundError(
            errno.ENOENT,
            "wanted a folder of 'reglib register' or a field (.nii, .nii.gz)",
            str(path),
        )
    return from_field(*read_field(path))


def from_field(u: Tensor, affine: Tensor) -> Registration:
    """The registration that a field file holds.

    It does not say where the voxels of the moving image are: those of the fixed image are put in
    their place, which is right for images and for points in mm.

    Args:
        u: ``(1, D, *S)`` in voxels of its grid.
        affine: ``(D+1, D+1)`` of that grid.
    """
    import torch

    from reglib.registration import Registration

    return Registration(
        affine=torch.eye(len(affine), dtype=torch.float64).unsqueeze(0),
        field=u,
        fixed_affine=affine,
        moving_affine=affine,
        moving_shape=tuple(u.shape[2:]),
        history=({},),
    )


def check_grid(
    image: Image, shape: tuple[int, ...], affine: Tensor, names: tuple[str, str]
) -> None:
    """Raise ``ValueError`` unless the voxels of ``image`` are those of a grid.

    Args:
        image: the image.
        shape: spatial shape of the grid.
        affine: ``(D+1, D+1)``, its voxels to world mm.
        names: of the grid and of the image, for the message.
    """
    import torch

    found = tuple(image.tensor.shape[2:])
    if found != shape:
        raise ValueError(
            f"{names[0]}, {names[1]}: wanted the same grid, got shapes {shape} and {found}"
        )
    corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1.0]) for n in shape)).double()
    apart = (image.affine - affine)[:-1]
    worst = float((corners @ apart[:, :-1].T + apart[:, -1]).norm(dim=1).max())
    if worst > SAME_PLACE:
        raise ValueError(
            f"{names[0]}, {names[1]}: wanted the same grid, got corners that are {worst:.3g} mm "
            "apart"
        )
