"""Images, labels and displacement fields on disk: the only file that knows mm and orientation.

In memory an image keeps the array order of its file. Its ``affine`` says where the voxels are: it
maps voxel coordinates (component ``c`` along array axis ``c``) to world millimetres, whose axes
point to the right, to the front and up (RAS, as in NIfTI). Fields on disk are ITK's: millimetres
along axes that point to the left, to the back and up (LPS).

A plane image lives in a world of its own with the first two of these axes. Pictures (PNG, JPEG,
TIFF) get the geometry that ITK gives them: the first pixel at the origin, rows going to the back,
columns to the left.
"""

from __future__ import annotations

import gzip
import io
import warnings
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import torch
from nibabel.imageglobals import LoggingOutputSuppressor
from numpy.typing import NDArray
from torch import Tensor

from reglib.checks import (
    check_affine,
    check_choice,
    check_field,
    check_finite,
    check_image,
    check_points,
    check_tensor,
)
from reglib.data.files import write_bytes
from reglib.geometry.sampling import transform_grid

NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}

# NIfTI's codes (nifti1.h). ITK writes and reads displacements in LPS under the first; it takes
# those under the second to be in RAS.
_VECTOR, _DISPLACEMENT_VECTOR = 1007, 1006
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_MM_PER_INCH = 25.4
_STORED = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.float32,
    torch.float64,
)
_PICTURE_GEOMETRY = {
    "PNG": "spacing 1, rows to the back, columns to the left, origin 0",
    "JPEG": "whole dots per inch, rows to the back, columns to the left, origin 0",
    "TIFF": "rows to the back, columns to the left, origin 0",
}
# From about 2e-4 on, ITK refuses axes that are not at right angles.
_SHEAR_LIMIT = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class Image:
    """An image or a label map, and where its voxels are.

    Attributes:
        tensor: ``(1, C, *S)``, two or three spatial axes, in the array order of the file.
        affine: ``(D+1, D+1)``, voxel coordinates to world mm (RAS); stored as float64 on the CPU.

    Raises:
        TypeError, ValueError: unless the two belong together.
    """

    tensor: Tensor
    affine: Tensor

    def __post_init__(self) -> None:
        check_image(self.tensor, "tensor", floating=False)
        if self.tensor.shape[0] != 1:
            raise ValueError(f"tensor: wanted a single image, got {self.tensor.shape[0]}")
        affine = check_affine(self.affine, "affine", self.tensor.ndim - 2)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbouring voxel centres, mm per voxel, axis order."""
        return tuple(self.affine[:-1, :-1].norm(dim=0).tolist())

    @property
    def orientation(self) -> str:
        """Where the array axes point, to the nearest letter, as ``"RAS"`` or ``"PR"``."""
        return "".join(nib.aff2axcodes(self.affine.numpy(), ("LR", "PA", "IS")))

    def to(self, device: torch.device | str) -> Image:
        """The same with its tensor on a device; the affine stays where it is."""
        return Image(self.tensor.to(device), self.affine)

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.tensor.shape[1:]))
        spacing = " x ".join(f"{s:.4g}" for s in self.spacing)
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"Image({sizes} {dtype}, {spacing} mm, {self.orientation})"


# --- Points ---------------------------------------------------------------------------------


def to_lps(dimensions: int) -> Tensor:
    """Signs ``(D,)`` that turn RAS vectors into LPS ones, and back; float64."""
    return torch.tensor([-1.0, -1.0, 1.0][:dimensions], dtype=torch.float64)


def voxel_to_world(points: Tensor, affine: Tensor, *, space: str = "ras") -> Tensor:
    """Millimetres of points given in voxels.

    Args:
        points: ``(B, N, D)`` in voxels, axis order.
        affine: ``(D+1, D+1)`` of the image that the voxels belong to, voxels to mm (RAS).
        space: ``"ras"`` (NIfTI, nibabel, FreeSurfer) or ``"lps"`` (ITK, ANTs, DICOM).

    Returns:
        ``(B, N, D)`` in mm, dtype and device of ``points``.

    Raises:
        TypeError, ValueError: if the arguments do not fit.
    """
    check_choice(space, "space", ("ras", "lps"))
    d = _dimensions(points)
    matrix = check_affine(affine, "affine", d)
    # On the CPU, as not every device has float64.
    world = points.cpu().double() @ matrix[:d, :d].T + matrix[:d, d]
    return (world * to_lps(d) if space == "lps" else world).to(points)


def world_to_voxel(points: Tensor, affine: Tensor, *, space: str = "ras") -> Tensor:
    """Voxel coordinates of points ``(B, N, D)`` in mm: the inverse of :func:`voxel_to_world`."""
    check_choice(space, "space", ("ras", "lps"))
    d = _dimensions(points)
    inverse = torch.linalg.inv(check_affine(affine, "affine", d))
    world = points.cpu().double()
    if space == "lps":
        world = world * to_lps(d)
    return (world @ inverse[:d, :d].T + inverse[:d, d]).to(points)


def _dimensions(points: Tensor) -> int:
    check_tensor(points, "points")
    d = points.shape[-1] if points.ndim else 0
    check_points(points, "points", d if d in (2, 3) else 3)
    return d


# --- Images ---------------------------------------------------------------------------------


def read_image(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    nonfinite: float | None = None,
) -> Image:
    """Read a NIfTI file (``.nii``, ``.nii.gz``) or a picture (PNG, JPEG, TIFF).

    The array order of the file is kept; trailing axes of one voxel are dropped (182 x 218 x 182 x 1
    is a volume, 64 x 64 x 1 a plane image). Voxel values are the file's, after its own scaling.
    Pictures have their colours as channels. A rotation noted in a photo is not applied, as in ITK.

    Args:
        path: the file.
        dtype: floating-point type of the tensor; ``None`` keeps the type of the file (float64
            where the header scales values).
        nonfinite: what NaN and infinite voxels become; ``None`` refuses them.

    Returns:
        The image, ``(1, C, *S)`` with its affine.

    Raises:
        OSError: if the file cannot be read.
        TypeError: if ``dtype`` is an integer type (see :func:`read_labels`).
        ValueError: if the file holds no single finite image, or is damaged.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: wanted a floating-point torch.dtype or None, got {dtype}")
    values, affine = _read(Path(path))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = np.count_nonzero(~np.isfinite(values))
        if nonfinite is None:
            raise ValueError(
                f"{path}: wanted finite voxels, got {bad} NaN or infinite of {values.size}; "
                "nonfinite=0.0 would replace them"
            )
        values = np.where(np.isfinite(values), values, values.dtype.type(nonfinite))
    tensor = torch.from_numpy(values).unsqueeze(0)
    if dtype is not None:
        tensor = tensor.to(dtype)
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: wanted voxels that fit into {dtype}, "
                f"got {values.min():g} to {values.max():g}"
            )
    return Image(tensor, torch.from_numpy(affine))


def read_labels(path: str | Path) -> Image:
    """Read a label map; labels are whole numbers, however the file stores them.

    In a picture with a palette the labels are the indices into the palette.

    Args:
        path: NIfTI file or picture with a single channel.

    Returns:
        The labels, ``(1, 1, *S)``, int64, with their affine.

    Raises:
        OSError: if the file cannot be read.
        ValueError: as :func:`read_image`, and if a voxel is no whole number.
    """
    values, affine = _read(Path(path), palette=False)
    if values.shape[0] != 1:
        raise ValueError(f"{path}: wanted labels in one channel, got {values.shape[0]} channels")
    if values.dtype.kind == "f":
        bad = np.count_nonzero(~(np.isfinite(values) & (values == np.round(values))))
        if bad:
            raise ValueError(
                f"{path}: wanted whole numbers as labels, got {bad} other voxels of {values.size}"
            )
    return Image(torch.from_numpy(values.astype(np.int64)).unsqueeze(0), torch.from_numpy(affine))


def write_image(path: str | Path, image: Image, *, dtype: torch.dtype | None = None) -> None:
    """Write an image or a label map; the suffix chooses the format. Nothing is lost on the way.

    NIfTI stores the tensor's own type (64-bit integers in the smallest of uint8, int16, int32 and
    int64 that holds them, as few programs read int64). A picture stores the smallest type that
    holds every value exactly, and only a geometry that ITK will give it back. JPEG compresses with
    loss, by nature. The file appears whole or not at all.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.png``, ``.jpg``, ``.jpeg``, ``.tif`` or ``.tiff``.
        image: the image; several channels only in a picture (3 are colours, 2 and 4 have alpha).
        dtype: store as this type instead. Real numbers are rounded and clipped to integers;
            integers that do not fit raise.

    Raises:
        OSError: if the file cannot be written.
        TypeError, ValueError: if the format cannot hold the image.
    """
    if not isinstance(image, Image):
        raise TypeError(f"image: wanted an Image, got {type(image).__name__}")
    values = _as_numpy(image.tensor[0], dtype)
    if values.dtype.kind == "f":
        check_finite(image.tensor, "image")
    path = Path(path)
    affine = image.affine.numpy()
    if _suffix(path) in PICTURE_FORMATS:
        write_bytes(path, _picture_bytes(path, values, affine, chosen=dtype is not None))
        return
    if values.shape[0] != 1:
        raise ValueError(f"image: wanted one channel for a NIfTI file, got {values.shape[0]}")
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8 and dtype is None:
        values = _smallest(values, ("u1", "i2", "i4", values.dtype.str))
    write_bytes(path, _nifti_bytes(path, values[0], affine))


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for suffix in (*NIFTI_SUFFIXES, *PICTURE_FORMATS):
        if name.endswith(suffix):
            return suffix
    wanted = ", ".join((*NIFTI_SUFFIXES, *PICTURE_FORMATS))
    raise ValueError(f"{path}: wanted a name that ends with one of {wanted}")


def _read(path: Path, *, palette: bool = True) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Values ``(C, *S)`` in native byte order, and the affine."""
    if _suffix(path) in PICTURE_FORMATS:
        return _read_picture(path, palette)
    header, raw = _read_nifti(path)
    shape = raw.shape
    if prod(shape) == 0:
        raise ValueError(f"{path}: wanted a voxel or more along every axis, got shape {shape}")
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    shape += (1,) * (2 - len(shape))
    if len(shape) > 3:
        vectors = int(header["intent_code"]) in (_VECTOR, _DISPLACEMENT_VECTOR)
        raise ValueError(
            f"{path}: wanted a single volume or plane, got shape {shape}"
            + (", a displacement field (see read_field)" if vectors else "; take one volume of it")
        )
    values = _scaled(path, header, raw).reshape(shape)
    return np.ascontiguousarray(values)[np.newaxis], _read_affine(path, header, shape)


def _as_numpy(tensor: Tensor, dtype: torch.dtype | None) -> NDArray[Any]:
    """The values as an array that a file can hold, converted if ``dtype`` says so."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        raise TypeError(f"image: wanted real numbers, got {tensor.dtype}")
    if dtype is not None and dtype not in _STORED:
        names = ", ".join(str(t) for t in _STORED)
        raise TypeError(f"dtype: wanted one of {names}, got {dtype}")
    if dtype is not None and dtype.is_floating_point:
        tensor = tensor.to(dtype)
    elif dtype is not None:
        limits = torch.iinfo(dtype)
        if tensor.is_floating_point():
            check_finite(tensor, "image")
            tensor = tensor.double().round().clamp(limits.min, limits.max)
        values = tensor.numpy()  # torch has no extremes of uint16
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"dtype: wanted a type that holds {low} to {high}, got {dtype}")
        tensor = tensor.to(dtype)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    return tensor.numpy()


def _smallest(values: NDArray[Any], types: tuple[str, ...]) -> NDArray[Any]:
    """The values in the first of ``types`` that holds each of them exactly, else unchanged."""
    for name in types:
        kind = np.dtype(name)
        if kind.kind == "f":
            fits = kind == values.dtype or bool((values.astype(kind) == values).all())
        else:
            limits = np.iinfo(kind)
            fits = bool(values.min() >= limits.min and values.max() <= limits.max)
            fits = fits and (values.dtype.kind != "f" or bool((values == np.round(values)).all()))
        if fits:
            return values.astype(kind)
    return values


# --- Fields ---------------------------------------------------------------------------------


def write_field(
    path: str | Path,
    field: Tensor,
    fixed_affine: Tensor,
    *,
    moving_affine: Tensor | None = None,
) -> None:
    """Write phi(x) = x + u(x) as a displacement field that ITK, ANTs and 3D Slicer apply as it is.

    On disk a vector at each fixed voxel leads, in mm (LPS), from the place of the voxel in the
    world to the place in the moving image that is read there (or where a landmark goes). It is
    stored as float64 if ``field`` is, else as float32. The file appears whole or not at all.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        field: displacement ``(1, D, *S)`` on the fixed grid, in voxels.
        fixed_affine: ``(D+1, D+1)``, voxels of the fixed image to mm (RAS).
        moving_affine: the same of the moving image, if ``x + u(x)`` is in voxels of *its* grid;
            ``None`` if it is in voxels of the fixed grid.

    Raises:
        OSError: if the file cannot be written.
        TypeError, ValueError: if the arguments do not fit, or ITK could not read the result: its
            grids have axes at right angles, and the last of them more than one voxel.
    """
    path = Path(path)
    if _suffix(path) not in NIFTI_SUFFIXES:
        raise ValueError(f"{path}: wanted a name that ends with .nii or .nii.gz for a field")
    check_field(field, "field")
    if field.shape[0] != 1:
        raise ValueError(f"field: wanted a single field, got {field.shape[0]}")
    if field.shape[-1] == 1:
        raise ValueError(
            "field: wanted more than one voxel along the last axis (ITK would read a field of "
            f"fewer dimensions), got spatial shape {tuple(field.shape[2:])}"
        )
    check_finite(field, "field")
    d = field.shape[1]
    fixed = check_affine(fixed_affine, "fixed_affine", d)
    shear = _shear(fixed.numpy())
    if shear > _SHEAR_LIMIT:
        raise ValueError(
            "fixed_affine: wanted axes at right angles, as ITK reads no others, got axes whose "
            f"cosine is {shear:.2g}; resample the fixed image first"
        )
    u = field.detach().cpu().double()
    if moving_affine is None:
        vectors = torch.einsum("ij,bj...->bi...", fixed[:d, :d], u)
    else:
        moving = check_affine(moving_affine, "moving_affine", d)
        vectors = _apply(moving, transform_grid(u)) - _apply(
            fixed, transform_grid(torch.zeros_like(u))
        )
    vectors = vectors * to_lps(d).view(1, d, *(1,) * d)
    # The axes of a file are three of space, one of time, then the components.
    values = vectors[0].movedim(0, -1).numpy()
    values = values.reshape(*field.shape[2:], *(1,) * (4 - d), d)
    stored = np.float64 if field.dtype == torch.float64 else np.float32
    write_bytes(path, _nifti_bytes(path, values.astype(stored), fixed.numpy(), vectors=True))


def read_field(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read a displacement field in ITK's format, as written by :func:`write_field`, ITK or ANTs.

    Args:
        path: NIfTI file with a vector per voxel, in mm.

    Returns:
        The displacement ``(1, D, *S)`` in voxels of its own (the fixed) grid, float64 if the file
        is, else float32; and the affine ``(D+1, D+1)`` of that grid, voxels to mm (RAS).

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no such field, or is damaged.
    """
    path = Path(path)
    if _suffix(path) not in NIFTI_SUFFIXES:
        raise ValueError(f"{path}: wanted a name that ends with .nii or .nii.gz for a field")
    header, raw = _read_nifti(path)
    d = raw.shape[4] if raw.ndim == 5 else 0
    intent = int(header["intent_code"])
    # NiftyReg writes positions or RAS vectors under the same code, with a name of its own.
    foreign = str(header["intent_name"].item(), "latin-1").startswith("NREG")
    plane = raw.ndim == 5 and raw.shape[2] == 1
    fits = raw.ndim == 5 and raw.shape[3] == 1 and d == (2 if plane else 3)
    if foreign or not fits or intent not in (_VECTOR, _DISPLACEMENT_VECTOR):
        raise ValueError(
            f"{path}: wanted a displacement field as ITK writes it, (X, Y, Z, 1, 3) or "
            f"(X, Y, 1, 1, 2) with intent {_VECTOR}, got {raw.shape} with intent {intent}"
            + (" of NiftyReg" if foreign else "")
        )
    shape = raw.shape[:d]
    if prod(shape) == 0:
        raise ValueError(f"{path}: wanted a voxel or more along every axis, got shape {shape}")
    values = _scaled(path, header, raw)
    affine = torch.from_numpy(_read_affine(path, header, shape))
    vectors = torch.from_numpy(values.reshape(*shape, d).astype(np.float64)).movedim(-1, 0)
    check_finite(vectors, str(path))
    if intent == _VECTOR:
        vectors = vectors * to_lps(d).view(d, *(1,) * d)
    u = torch.einsum("ij,j...->i...", torch.linalg.inv(affine[:d, :d]), vectors).unsqueeze(0)
    return u.contiguous().to(torch.float64 if values.dtype == np.float64 else torch.float32), affine


def _apply(affine: Tensor, coords: Tensor) -> Tensor:
    """Map coordinates ``(1, D, *S)`` through an affine."""
    d = coords.shape[1]
    shift = affine[:d, d].view(1, d, *(1,) * d)
    return torch.einsum("ij,bj...->bi...", affine[:d, :d], coords) + shift


# --- NIfTI ----------------------------------------------------------------------------------


def _read_nifti(path: Path) -> tuple[nib.Nifti1Header, NDArray[Any]]:
    """The header and the voxels as they are stored, before any scaling."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: wanted a complete gzip file, got a damaged one") from error
    # The size of the header, in either byte order, tells the two versions apart.
    second = content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    magic = content[4:7] if second else content[344:347]
    if magic != (b"n+2" if second else b"n+1"):
        raise ValueError(f"{path}: wanted a NIfTI file with header and voxels, got something else")
    try:
        with LoggingOutputSuppressor():  # nibabel reports what it mends
            header = kind.from_fileobj(io.BytesIO(content))
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header.get_data_offset())
        header.get_slope_inter()
    # A broken header raises whatever the field that is wrong happens to cause.
    except Exception as error:
        raise ValueError(f"{path}: wanted a sound NIfTI header, got {error}") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind_found = "colours" if dtype.fields else str(dtype)
        raise ValueError(f"{path}: wanted voxels that are real numbers, got {kind_found}")
    if min(shape, default=0) < 0 or offset < 0:
        raise ValueError(f"{path}: wanted a sound NIfTI header, got shape {shape}")
    wanted, found = prod(shape) * dtype.itemsize, max(len(content) - offset, 0)
    if found < wanted:
        raise ValueError(
            f"{path}: wanted {wanted} bytes of voxels for shape {shape}, got {found}: "
            "the file is truncated"
        )
    raw = np.frombuffer(content, dtype, prod(shape), offset).reshape(shape, order="F")
    return header, raw


def _scaled(path: Path, header: nib.Nifti1Header, raw: NDArray[Any]) -> NDArray[Any]:
    """The voxel values after the scaling of the header, in native byte order."""
    slope, inter = header.get_slope_inter()
    if slope is None or (slope, inter) == (1.0, 0.0):
        return raw.astype(raw.dtype.newbyteorder("="))
    if not np.isfinite(inter):
        raise ValueError(f"{path}: wanted a finite scl_inter, got {inter}")
    return raw.astype(np.float64) * slope + inter


def _read_affine(
    path: Path, header: nib.Nifti1Header, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """The affine of a header, for a grid of two or three axes."""
    zooms = np.ones(3)
    sizes = np.asarray(header["pixdim"], np.float64)[1:4]
    zooms[: len(sizes)] = np.where(np.isfinite(sizes) & (sizes != 0), abs(sizes), 1.0)
    sform = header.get_sform() if header["sform_code"] > 0 else None
    try:
        qform = header.get_qform() if header["qform_code"] > 0 else None
    except ValueError as error:  # numbers that are no quaternion
        if sform is None:
            raise ValueError(f"{path}: wanted a sound qform, got {error}") from error
        qform = None
    # A file without either form knows no orientation. ITK takes its axes for left, back, up; the
    # standard and nibabel each say otherwise, but a field for this image shall apply in ITK.
    unknown = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
    form = unknown if sform is None and qform is None else qform if sform is None else sform
    matrix: NDArray[np.float64] = np.array(form, np.float64)
    if sform is not None:
        _warn_if_ambiguous(path, sform, qform, zooms, shape)
    unit = int(header["xyzt_units"]) & 7
    matrix[:3] *= _MM_PER_UNIT.get(unit, 1.0)
    if len(shape) == 2:
        matrix = _plane_affine(path, matrix)
    check_affine(matrix, str(path), len(shape))
    return matrix


def _warn_if_ambiguous(
    path: Path,
    sform: NDArray[np.float64],
    qform: NDArray[np.float64] | None,
    zooms: NDArray[np.float64],
    shape: tuple[int, ...],
) -> None:
    """Warn where ITK, which also looks at the qform and the voxel sizes, may read otherwise."""
    norms = np.linalg.norm(sform[:3, :3], axis=0)
    resized = sform.copy()
    resized[:3, :3] *= np.divide(zooms, norms, out=np.ones(3), where=norms > 0)
    last = np.array([*(n - 1 for n in shape), 0, 0])[:3]
    corners = np.array([[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)]).T
    others = [resized] if qform is None else [resized, qform]
    apart = max(float(np.linalg.norm(((o - sform) @ corners)[:3], axis=0).max()) for o in others)
    # The quaternion of a qform is good to 1e-3 at worst, near half a turn.
    extent = float(np.linalg.norm(sform[:3, :3] @ last))
    if apart > max(0.1 * zooms.min(), 1e-3 * extent):
        warnings.warn(
            f"{path}: the sform, the qform and the voxel sizes in the header place a corner of the "
            f"image up to {apart:.3g} mm apart; the sform is used, ITK and ANTs may use the others",
            stacklevel=4,
        )


def _plane_affine(path: Path, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The geometry of a slice within its own plane, ``(3, 3)``.

    For an axial slice these are the rows of the first two world axes. Any other plane is turned
    onto the nearest pair of world axes: distances and angles stay, the place of the plane is lost.
    """
    normal = np.cross(matrix[:3, 0], matrix[:3, 1])
    length = float(np.linalg.norm(normal))
    if not 0 < length < np.inf:  # the caller says what is wrong with it
        return np.delete(np.delete(matrix, 2, axis=0), 2, axis=1)
    normal /= length
    k = int(abs(normal).argmax())
    pole = np.zeros(3)
    pole[k] = np.sign(normal[k])
    if abs(normal[2]) < 1 - 1e-6:
        warnings.warn(
            f"{path}: this slice is not axial; its spacing and its place within its own plane are "
            "kept, the place of the plane in the world is not",
            stacklevel=4,
        )
    # The smallest rotation of the normal to the pole (Rodrigues' formula).
    axis = np.cross(normal, pole)
    cross = np.cross(np.eye(3), axis)
    turn = np.eye(3) + cross + cross @ cross / (1 + normal @ pole)
    plane = np.delete(turn @ matrix[:3, [0, 1, 3]], k, axis=0)
    return np.vstack([plane, [0.0, 0.0, 1.0]])


def _shear(affine: NDArray[np.float64]) -> float:
    """The largest cosine between two axes; 0 if all are at right angles."""
    axes = affine[:-1, :-1] / np.linalg.norm(affine[:-1, :-1], axis=0)
    return float(abs(axes.T @ axes - np.eye(len(axes))).max())


def _nifti_bytes(
    path: Path, values: NDArray[Any], affine: NDArray[np.float64], *, vectors: bool = False
) -> bytes:
    """A NIfTI file with both forms set, so that every reader finds the same geometry."""
    d = len(affine) - 1
    matrix = np.eye(4)
    matrix[:d, :d], matrix[:d, 3] = affine[:d, :d], affine[:d, d]
    try:
        nifti = nib.Nifti1Image(values, matrix, dtype=values.dtype)
    except nib.spatialimages.HeaderDataError as error:
        raise ValueError(
            f"{path}: wanted at most 32767 voxels along an axis, got {error}"
        ) from error
    # A qform has no shear. ITK would silently prefer it, so then only the sform is given.
    nifti.set_qform(matrix, code=0 if _shear(affine) > _SHEAR_LIMIT else 1)
    nifti.set_sform(matrix, code=1)
    nifti.header.set_xyzt_units("mm")
    if vectors:
        nifti.header.set_intent(_VECTOR)
    content: bytes = nifti.to_bytes()
    # Level 1: a head is 2 % larger than at level 9, in a third of the time. The time of writing is
    # left out, so that the same image gives the same file.
    return gzip.compress(content, 1, mtime=0) if _suffix(path) == ".nii.gz" else content


# --- Pictures -------------------------------------------------------------------------------


def _read_picture(path: Path, palette: bool) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Values ``(C, H, W)`` and affine; ``palette`` turns indices into the colours they mean."""
    content = io.BytesIO(path.read_bytes())
    try:
        with PIL.Image.open(content, formats=sorted(set(PICTURE_FORMATS.values()))) as picture:
            _check_faithful(picture)
            spacing = _picture_spacing(picture)
            pixels: PIL.Image.Image = picture
            if palette and picture.mode == "P":
                pixels = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
            elif palette and picture.mode == "1":
                pixels = picture.convert("L")
            values = np.asarray(pixels)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path}: wanted a PNG, JPEG or TIFF, got something else") from error
    # As for headers: what Pillow raises for a damaged file has no common base.
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    native = np.dtype(np.uint8) if values.dtype == bool else values.dtype.newbyteorder("=")
    channels = values[np.newaxis] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    # A copy, as Pillow lends out its pixels for reading only.
    return np.array(channels, native, order="C"), _picture_affine(spacing)


def _check_faithful(picture: PIL.Image.Image) -> None:
    """Raise ``ValueError`` where Pillow would drop pages, bits or signs without a word."""
    frames = getattr(picture, "n_frames", 1)
    if frames != 1:
        raise ValueError(f"wanted a single picture, got {frames} pages")
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I", "F")
    # How the bits lie in the file: 16 bits of colour become 8, float64 becomes float32, ...
    tiles = getattr(picture, "tile", [])
    layout = tiles[0].args if tiles else ""
    layout = layout if isinstance(layout, str) else str(layout[0])
    lost = layout.startswith(("RGB;16", "RGBA;16", "RGBX;16", "LA;16", "F;64", "I;32N", "I;32BN"))
    tags = getattr(picture, "tag_v2", {})
    signed_bytes = tags.get(339) == (2,) and tags.get(258) == (8,)
    if lost or signed_bytes or picture.mode not in modes:
        raise ValueError(
            "wanted grey values (uint8, uint16, int16, int32 or float32) or 8-bit colours, got "
            + ("signed bytes" if signed_bytes else f"pixels {layout or picture.mode}")
        )


def _picture_spacing(picture: PIL.Image.Image) -> tuple[float, float]:
    """Mm between rows and between columns, as ITK has them: never from a PNG."""
    tag = getattr(picture, "tag_v2", {}).get(296) if picture.format == "TIFF" else None
    per_inch = tag in (2, 3) or (
        picture.format == "JPEG" and picture.info.get("jfif_unit") in (1, 2)
    )
    dots = [float(n) for n in picture.info.get("dpi", (0, 0))]
    if not per_inch or min(dots) <= 0:
        return 1.0, 1.0
    return _MM_PER_INCH / dots[1], _MM_PER_INCH / dots[0]


def _picture_affine(spacing: tuple[float, float]) -> NDArray[np.float64]:
    """Rows go to the back and columns to the left, from an origin of 0."""
    return np.array([[0.0, -spacing[1], 0.0], [-spacing[0], 0.0, 0.0], [0.0, 0.0, 1.0]])


def _picture_bytes(
    path: Path, values: NDArray[Any], affine: NDArray[np.float64], *, chosen: bool
) -> bytes:
    kind = PICTURE_FORMATS[_suffix(path)]
    channels = (1, 3) if kind == "JPEG" else (1, 2, 3, 4)
    if values.ndim != 3 or values.shape[0] not in channels:
        raise ValueError(
            f"image: wanted a plane image with {' or '.join(map(str, channels))} channels for "
            f"{kind}, got (C, *S) = {values.shape}"
        )
    spacing = tuple(np.linalg.norm(affine[:2, :2], axis=0))
    options: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    kept = np.array_equal(affine, _picture_affine((1.0, 1.0)))
    if not kept and kind != "PNG":
        dots = (_MM_PER_INCH / spacing[1], _MM_PER_INCH / spacing[0])
        options["dpi"] = dots
        whole = np.allclose(dots, np.round(dots), rtol=1e-6, atol=0) and max(dots) < 65536
        kept = np.allclose(affine, _picture_affine(spacing), rtol=0, atol=1e-6 * min(spacing))
        kept = kept and (kind == "TIFF" or whole)
    if not kept:
        raise ValueError(
            f"affine: wanted a geometry that {kind} can hold ({_PICTURE_GEOMETRY[kind]}), "
            f"got {affine.tolist()}; NIfTI holds any"
        )
    grey = {"PNG": ("u1", "u2"), "JPEG": ("u1",), "TIFF": ("u1", "u2", "i4", "f4")}[kind]
    types = grey if values.shape[0] == 1 else ("u1",)
    stored = values if chosen else _smallest(values, types)
    if stored.dtype not in [np.dtype(t) for t in types]:
        names = " or ".join(np.dtype(t).name for t in types)
        raise ValueError(
            f"image: wanted values that {kind} can hold as {names}, got {values.dtype} from "
            f"{values.min()} to {values.max()}; dtype=torch.uint8 would round and clip"
        )
    pixels = stored[0] if values.shape[0] == 1 else np.moveaxis(stored, 0, -1)
    content = io.BytesIO()
    try:
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(content, kind, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: wanted a size that {kind} can hold, got: {error}") from error
    return content.getvalue()
