"""Rigid and affine transforms in world millimetres: parameters, matrices, points, fields.

A matrix is homogeneous, ``(B, D + 1, D + 1)``, acts on column vectors of world coordinates in mm
and maps fixed to moving. Rigid means rigid in mm: on a grid with unequal spacing the same
transform is no rotation of voxels. Where the voxels of an image are is said by its affine
``(D + 1, D + 1)``, voxel -> mm; which world that is (RAS or LPS) does not matter as long as all
agree.

Results are float32, or float64 if the parameters, the matrix or the points are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reglib.checks import (
    check_affine,
    check_field,
    check_matrix,
    check_points,
    check_shape,
    check_tensor,
    check_vectors,
)
from reglib.geometry.grid import no_autocast

#: The planes in which the components of a rotation turn: the first axis towards the second.
_PLANES = {2: ((0, 1),), 3: ((1, 2), (2, 0), (0, 1))}


class AffineParameters(NamedTuple):
    """The arguments of :func:`affine_matrix`, which says their shapes and units."""

    rotation: Tensor
    translation: Tensor
    log_scales: Tensor
    shears: Tensor


def raise_precision(*tensors: Tensor) -> list[Tensor]:
    """All in their common dtype, but at least single precision: mm do not fit into half."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def _check_translation(translation: Tensor) -> tuple[int, int]:
    """The batch size and the number of axes D, which the other parameters must agree with."""
    check_tensor(translation, "translation")
    shape = translation.shape
    if translation.ndim != 2 or shape[0] == 0 or shape[1] not in _PLANES:
        raise ValueError(f"translation: wanted shape (B, 2) or (B, 3), got {tuple(shape)}")
    check_vectors(translation, "translation", shape[:1], shape[1])
    return shape[0], shape[1]


def _rotation_matrix(rotation: Tensor, d: int) -> Tensor:
    """The exponential of the skew matrix of ``rotation``: smooth everywhere, I at 0."""
    generators = rotation.new_zeros(len(_PLANES[d]), d, d)
    for generator, (a, b) in zip(generators, _PLANES[d], strict=True):
        generator[b, a], generator[a, b] = 1, -1
    return torch.linalg.matrix_exp(torch.einsum("br,rij->bij", rotation, generators))


def about(centre: Tensor, linear: Tensor, translation: Tensor) -> Tensor:
    """The homogeneous matrix of ``x -> linear (x - centre) + centre + translation``."""
    moved = (linear @ centre.unsqueeze(2)).squeeze(2)
    offset = translation + (centre - moved)
    b, d = offset.shape
    last = torch.eye(d + 1, dtype=linear.dtype, device=linear.device)[-1].expand(b, 1, d + 1)
    return torch.cat([torch.cat([linear, offset.unsqueeze(2)], 2), last], 1)


def rigid_matrix(rotation: Tensor, translation: Tensor, *, centre: Tensor) -> Tensor:
    """Rotate about ``centre``, then translate: ``A(x) = R (x - c) + c + t``.

    ``R`` is the exponential of the rotation vector. Zeros give the identity, and gradients exist
    everywhere, there included.

    Args:
        rotation: radians. 3-D: ``(B, 3)``, along the axis and as long as the angle, right-hand
            rule. 2-D: ``(B, 1)``, the first axis turns towards the second.
        translation: ``(B, D)`` in mm along the world axes.
        centre: ``(B, D)`` or ``(1, D)`` in mm. The middle of the fixed image
            (:func:`grid_centre`) keeps rotation and translation from pulling at each other.

    Returns:
        ``(B, D + 1, D + 1)``, world mm, fixed to moving.

    Raises:
        TypeError, ValueError: if an argument is no floating-point tensor of its shape.
    """
    b, d = _check_translation(translation)
    check_vectors(rotation, "rotation", (b,), len(_PLANES[d]))
    check_vectors(centre, "centre", (1, b), d)
    rotation, translation = raise_precision(rotation, translation)
    with no_autocast(translation):
        return about(centre.to(translation), _rotation_matrix(rotation, d), translation)


def affine_matrix(
    rotation: Tensor, translation: Tensor, *, log_scales: Tensor, shears: Tensor, centre: Tensor
) -> Tensor:
    """Scale, shear and rotate about ``centre``, then translate: ``A(x) = R K S (x - c) + c + t``.

    ``S`` is diagonal with exp(``log_scales``), ``K`` has ones on the diagonal and ``shears`` above
    it. Every affine map that is no mirror image is given by one set of parameters, but for full
    turns. Zeros give the identity.

    Args:
        rotation: ``(B, 3)`` or, in 2-D, ``(B, 1)``, radians, as in :func:`rigid_matrix`.
        translation: ``(B, D)`` in mm along the world axes.
        log_scales: ``(B, D)``, natural logarithm of the magnification along each world axis.
        shears: ``(B, D (D - 1) / 2)``, mm per mm, the entries (0, 1), (0, 2), (1, 2) of ``K``.
        centre: ``(B, D)`` or ``(1, D)`` in mm.

    Returns:
        ``(B, D + 1, D + 1)``, world mm, fixed to moving.

    Raises:
        TypeError, ValueError: if an argument is no floating-point tensor of its shape.
    """
    b, d = _check_translation(translation)
    check_vectors(rotation, "rotation", (b,), len(_PLANES[d]))
    check_vectors(log_scales, "log_scales", (b,), d)
    check_vectors(shears, "shears", (b,), len(_PLANES[d]))
    check_vectors(centre, "centre", (1, b), d)
    rotation, translation, log_scales, shears = raise_precision(
        rotation, translation, log_scales, shears
    )
    with no_autocast(translation):
        upper = torch.eye(d, dtype=shears.dtype, device=shears.device).repeat(b, 1, 1)
        row, column = torch.triu_indices(d, d, 1).to(shears.device)
        upper[:, row, column] = shears
        scaled = upper * log_scales.exp().unsqueeze(1)
        return about(centre.to(translation), _rotation_matrix(rotation, d) @ scaled, translation)


def affine_parameters(matrix: Tensor, *, centre: Tensor) -> AffineParameters:
    """The parameters of a matrix: what :func:`affine_matrix` makes it of. Not differentiable.

    Args:
        matrix: ``(B, D + 1, D + 1)``, world mm, no mirror image.
        centre: ``(B, D)`` or ``(1, D)`` in mm, the centre that the parameters refer to.

    Returns:
        Rotation (at most pi), translation, log-scales and shears.

    Raises:
        TypeError, ValueError: if ``matrix`` is not homogeneous, singular or a mirror image.
    """
    check_matrix(matrix, "matrix")
    b, d = matrix.shape[0], matrix.shape[1] - 1
    check_vectors(centre, "centre", (1, b), d)
    exact = matrix.detach().double()
    c = centre.detach().to(exact)
    linear = exact[:, :-1, :-1]
    if bool((torch.linalg.det(linear) < 0).any()):
        raise ValueError(f"matrix: wanted no mirror image, got {matrix.tolist()}")
    turn, upper = torch.linalg.qr(linear)
    # QR leaves the signs open: scales are positive.
    sign = upper.diagonal(dim1=1, dim2=2).sign()
    turn, upper = turn * sign.unsqueeze(1), upper * sign.unsqueeze(2)
    scales = upper.diagonal(dim1=1, dim2=2)
    if d == 2:
        rotation = torch.atan2(turn[:, 1, 0], turn[:, 0, 0]).unsqueeze(1)
    else:
        # Late: scripts that train may run where SciPy is not.
        from scipy.spatial.transform import Rotation

        vectors = Rotation.from_matrix(turn.cpu().numpy()).as_rotvec()
        rotation = torch.from_numpy(vectors).to(turn)
    row, column = torch.triu_indices(d, d, 1).to(upper.device)
    shears = (upper / scales.unsqueeze(1))[:, row, column]
    translation = exact[:, :-1, -1] - (c - (linear @ c.unsqueeze(2)).squeeze(2))
    found = AffineParameters(rotation, translation, scales.log(), shears)
    [given] = raise_precision(matrix)
    return AffineParameters(*(x.to(given) for x in found))


def grid_centre(affine: Tensor, shape: Sequence[int]) -> Tensor:
    """The middle of a grid in world mm.

    Args:
        affine: voxel -> world mm, ``(D + 1, D + 1)``.
        shape: spatial shape ``S``.

    Returns:
        ``(1, D)`` in mm, float64 on the CPU.

    Raises:
        TypeError, ValueError: if ``affine`` is no invertible homogeneous matrix for ``shape``.
    """
    check_shape(shape, (2, 3))
    d = len(shape)
    matrix = check_affine(affine, "affine", d)
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=matrix.dtype)
    return (matrix[:d, :d] @ middle + matrix[:d, d]).unsqueeze(0)


def transform_points(fixed_points: Tensor, matrix: Tensor) -> Tensor:
    """Carry points from the fixed to the moving image: ``A(p)``, all in world mm.

    Args:
        fixed_points: ``(B, N, D)`` in mm.
        matrix: ``(B, D + 1, D + 1)`` or ``(1, D + 1, D + 1)``, fixed to moving.

    Returns:
        The corresponding points ``(B, N, D)`` in mm of the moving image.

    Raises:
        TypeError, ValueError: if shapes do not match or ``matrix`` is not homogeneous.
    """
    check_matrix(matrix, "matrix")
    check_points(fixed_points, "fixed_points", matrix.shape[1] - 1)
    if matrix.shape[0] not in (1, fixed_points.shape[0]):
        raise ValueError(
            "fixed_points, matrix: wanted the same batch size or one matrix, "
            f"got {fixed_points.shape[0]} and {matrix.shape[0]}"
        )
    points, matrix = raise_precision(fixed_points, matrix)
    with no_autocast(points):
        return points @ matrix[:, :-1, :-1].transpose(1, 2) + matrix[:, None, :-1, -1]


def affine_field(
    matrix: Tensor, fixed_affine: Tensor, moving_affine: Tensor, shape: Sequence[int]
) -> Tensor:
    """The field of a world transform: fixed voxel -> mm -> ``A`` -> mm -> moving voxel.

    ``warp`` with it samples the moving image on its own grid, whatever the spacing, orientation
    and size of that: ``x + u(x)`` is in voxels of the *moving* grid. So the identity matrix gives
    the field 0 only where both grids are the same.

    Args:
        matrix: ``A``, ``(B, D + 1, D + 1)``, world mm, fixed to moving.
        fixed_affine: fixed voxel -> world mm, ``(D + 1, D + 1)``.
        moving_affine: moving voxel -> world mm, ``(D + 1, D + 1)``.
        shape: spatial shape ``S`` of the fixed grid.

    Returns:
        Displacement ``(B, D, *S)`` in voxels, differentiable with respect to ``matrix``.

    Raises:
        TypeError, ValueError: if a matrix is not homogeneous or singular, or shapes do not match.
    """
    check_shape(shape, (2, 3))
    d = len(shape)
    return _linear_field(_voxel_change(matrix, fixed_affine, moving_affine, d), shape)


def _linear_field(change: Tensor, shape: Sequence[int]) -> Tensor:
    """The field ``change`` times x, of homogeneous voxel coordinates x."""
    d = len(shape)
    with no_autocast(change):
        view = (-1, d, *(1,) * d)
        field = change[:, :-1, -1].reshape(view)
        for axis in reversed(range(d)):
            index = torch.arange(int(shape[axis]), dtype=change.dtype, device=change.device)
            along = index.view(-1, *(1,) * (d - axis - 1))
            field = field + change[:, :-1, axis].reshape(view) * along
        return field


def _voxel_change(
    matrix: Tensor, fixed_affine: Tensor, moving_affine: Tensor, dimensions: int
) -> Tensor:
    """Fixed voxel -> mm -> ``A`` -> mm -> moving voxel, minus the identity: ``(B, D+1, D+1)``."""
    check_matrix(matrix, "matrix", dimensions=(dimensions,))
    fixed = check_affine(fixed_affine, "fixed_affine", dimensions).to(matrix.device)
    moving = check_affine(moving_affine, "moving_affine", dimensions).to(matrix.device)
    with no_autocast(matrix):
        # Offsets of hundreds of mm cancel here, so this product is taken in float64.
        voxels = torch.linalg.solve(moving, matrix.double() @ fixed)
        change = voxels - torch.eye(dimensions + 1, dtype=voxels.dtype, device=voxels.device)
        return change.to(raise_precision(matrix)[0])


def whole_field(
    matrix: Tensor, field: Tensor, fixed_affine: Tensor, moving_affine: Tensor
) -> Tensor:
    """The field of ``phi(x) = A(x + u(x))``: one displacement from fixed to moving voxels.

    ``warp`` with it samples the moving image's own voxels once, as :func:`affine_field` does.

    Args:
        matrix: ``A``, ``(B, D + 1, D + 1)`` or ``(1, D + 1, D + 1)``, world mm, fixed to moving.
        field: ``u``, ``(B, D, *S)`` on the fixed grid, in its voxels.
        fixed_affine: fixed voxel -> world mm, ``(D + 1, D + 1)``.
        moving_affine: moving voxel -> world mm, ``(D + 1, D + 1)``.

    Returns:
        Displacement ``(B, D, *S)``; ``x +`` it is in voxels of the moving grid. Differentiable
        with respect to ``matrix`` and ``field``; dtype of ``field``, but at least float32.

    Raises:
        TypeError, ValueError: if the arguments do not fit.
    """
    check_field(field, "field")
    d = field.shape[1]
    check_matrix(matrix, "matrix", dimensions=(d,), batches=(1, field.shape[0]))
    u = field.to(torch.promote_types(field.dtype, torch.float32))
    change = _voxel_change(matrix.to(u.device), fixed_affine, moving_affine, d)
    base, linear = _linear_field(change, field.shape[2:]), change[:, :d, :d].to(u)
    with no_autocast(u):
        # (1 + linear) u, so that u comes through unchanged where the grids are the same.
        turned = torch.einsum("bij,bj...->bi...", linear.expand(len(u), d, d), u)
        return base.to(u) + u + turned
