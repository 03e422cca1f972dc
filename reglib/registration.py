"""Register a pair, and what comes out: a transform that is applied, inverted, saved and loaded.

A registration is ``phi(x) = A(x + u(x))``: A in world millimetres, u on the fixed grid. It maps
fixed to moving; images and labels are pulled back through it, points of the fixed image travel
along it. The moving image's own voxels are sampled once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

import reglib
from reglib.checks import (
    check_affine,
    check_batch,
    check_choice,
    check_field,
    check_finite,
    check_image,
    check_matrix,
    check_points,
    check_shape,
    check_weight,
)
from reglib.data.files import write_bytes
from reglib.data.itk_affine import read_affine, write_affine
from reglib.data.nifti import (
    Image,
    read_field,
    to_lps,
    voxel_to_world,
    world_to_voxel,
    write_field,
)
from reglib.geometry.affine import transform_points, whole_field
from reglib.geometry.fields import invert_points
from reglib.geometry.sampling import transform_grid, warp, warp_labels, warp_points
from reglib.methods.network import Network
from reglib.methods.pair import Iterate, Method, Pair
from reglib.objectives.metrics import folding, nda, ndv

#: Terms of the loss step by step, as in ``history["affine, 2 mm"]["similarity"]``.
History = dict[str, dict[str, list[float]]]

#: What :meth:`Registration.save` writes.
FIELD, RESIDUAL, INVERSE = "field.nii.gz", "residual_field.nii.gz", "inverse_field.nii.gz"
AFFINE, REPORT = "affine.mat", "report.json"

# What a report adds to the settings of its registration.
_MEASURED = ("seconds", "peak_memory", "interrupted", "folding", "ndv", "inverse", "history") + (
    "fixed",
    "moving",
    "affine_ras_mm",
)

#: An inverse that misses by more than this many voxels anywhere is none.
INVERSE_TOLERANCE = 0.05

#: A field that folds in more than this share of its voxels has no inverse.
INVERSE_FOLDING = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class Registration:
    """A batch of transforms ``phi(x) = A(x + u(x))``, fixed to moving, and how they came about.

    ``len`` is the batch size; an index gives one pair of it.

    Attributes:
        affine: A, ``(B, D+1, D+1)``, world mm (RAS), float64 on the CPU.
        field: u, ``(B, D, *S)`` on the fixed grid, in its voxels, without A
            (``residual_field.nii.gz`` when saved); :meth:`whole_field` has both.
        fixed_affine: ``(D+1, D+1)``, voxels of the fixed image to world mm.
        moving_affine: the same of the moving image.
        moving_shape: spatial shape ``T`` of the moving image.
        warped: the moving image on the fixed grid, ``(B, C, *S)``; ``None`` after loading.
        history: per pair, the terms of the loss by stage.
        seconds: wall-clock time of the registration of the whole batch.
        peak_memory: bytes: on a GPU the most that was allocated meanwhile, else the most that the
            process has held so far; ``None`` where the system does not say.
        interrupted: whether it was stopped by hand.
        settings: what was run, as JSON values.
    """

    affine: Tensor
    field: Tensor
    fixed_affine: Tensor
    moving_affine: Tensor
    moving_shape: tuple[int, ...]
    warped: Tensor | None = None
    history: tuple[History, ...] = ()
    seconds: float = 0.0
    peak_memory: int | None = None
    interrupted: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_field(self.field, "field")
        b, d = self.field.shape[:2]
        check_matrix(self.affine, "affine", dimensions=(d,), batches=(b,))
        object.__setattr__(self, "affine", self.affine.detach().to("cpu", torch.float64))
        for name in ("fixed_affine", "moving_affine"):
            object.__setattr__(self, name, check_affine(getattr(self, name), name, d))
        check_shape(self.moving_shape, (d,), "moving_shape")
        object.__setattr__(self, "moving_shape", tuple(int(n) for n in self.moving_shape))
        if len(self.history) not in (0, b):
            raise ValueError(f"history: wanted one of each of {b} pair(s), got {len(self.history)}")

    def __len__(self) -> int:
        return len(self.field)

    def __getitem__(self, index: int) -> Registration:
        """One pair of the batch; times and memory are those of the whole."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: wanted less than {len(self)}, got {index}")
        index %= len(self)
        one = slice(index, index + 1)
        return dataclasses.replace(
            self,
            affine=self.affine[one],
            field=self.field[one],
            warped=None if self.warped is None else self.warped[one],
            history=self.history[one],
        )

    def __iter__(self) -> Iterator[Registration]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.field.shape[2:]))
        stopped = ", interrupted" if self.interrupted else ""
        return f"Registration({len(self)} x {sizes}, {self.seconds:.1f} s{stopped})"

    # --- Quality ----------------------------------------------------------------------------

    @functools.cached_property
    def folding(self) -> Tensor:
        """Share of voxels where ``x + u(x)`` folds (determinant at most 0), ``(B,)``."""
        return folding(self.field)

    @functools.cached_property
    def ndv(self) -> Tensor:
        """Non-diffeomorphic volume (area in 2-D) of ``x + u(x)``, as a share, ``(B,)``."""
        return ndv(self.field) if self.field.shape[1] == 3 else nda(self.field)

    # --- The transform ----------------------------------------------------------------------

    def whole_field(self, moving_affine: Tensor | None = None) -> Tensor:
        """The whole of phi as one displacement, for :func:`reglib.geometry.sampling.warp`.

        Args:
            moving_affine: of another image in the moving world, ``(D+1, D+1)``; ``None`` means
                the moving image's own.

        Returns:
            ``(B, D, *S)``; ``x +`` it is in voxels of that image.
        """
        target = self.moving_affine if moving_affine is None else moving_affine
        return whole_field(self.affine, self.field, self.fixed_affine, target)

    def inverse_field(self) -> Tensor:
        """The inverse of phi on the moving grid: from moving voxels to fixed ones.

        Solved for at every moving voxel; beyond the fixed grid u goes on as at its border. There is
        no inverse where ``x + u(x)`` folds in more than one voxel of 10,000, or where some voxel
        that comes from inside the fixed grid cannot be solved for to 0.05 voxels.

        Returns:
            ``(B, D, *T)``; ``y +`` it is in voxels of the fixed grid.

        Raises:
            ValueError: if phi has no inverse.
        """
        u = self.field.detach().to(torch.promote_types(self.field.dtype, torch.float32))
        folds = torch.maximum(self.folding, self.ndv)
        if not bool((folds <= INVERSE_FOLDING).all()):
            raise ValueError(
                f"field: wanted one that has an inverse, got one that folds "
                f"({float(self.folding.max()):.2g} of its voxels, "
                f"non-diffeomorphic volume {float(self.ndv.max()):.2g})"
            )
        back = torch.linalg.inv(self.affine).to(u.device)
        still = u.new_zeros((len(u), u.shape[1], *self.moving_shape))
        goal = transform_grid(whole_field(back, still, self.moving_affine, self.fixed_affine))
        points, miss = invert_points(goal.flatten(2).mT, u, retries=100)
        inside = ((points >= 0) & (points <= u.new_tensor(u.shape[2:]) - 1)).all(2)
        worst = float(miss.where(inside, torch.zeros_like(miss)).max())
        if not worst <= INVERSE_TOLERANCE:
            raise ValueError(
                f"field: wanted one that has an inverse, but its inverse misses by {worst:.3g} "
                "voxels"
            )
        back = points.mT.reshape(still.shape) - transform_grid(still)
        return back.to(self.field.dtype)

    # --- Applying it ------------------------------------------------------------------------

    @overload
    def apply(self, image: Image, *, padding: str = ...) -> Image: ...
    @overload
    def apply(self, image: Tensor, *, padding: str = ...) -> Tensor: ...
    def apply(self, image: Image | Tensor, *, padding: str = "border") -> Image | Tensor:
        """Pull an image of the moving side back to the fixed grid, sampling its voxels once.

        Args:
            image: an ``Image`` anywhere in the moving world, with any grid; or a tensor
                ``(B, C, *T)`` on the moving grid.
            padding: outside it, ``"border"`` (default) or ``"zeros"``.

        Returns:
            An ``Image`` or ``(B, C, *S)``, as was given, on the fixed grid.

        Raises:
            TypeError: if it is not floating point (labels go through :meth:`apply_labels`).
            ValueError: if it does not belong to the moving image.
        """
        tensor, whole = self._prepare(image, "image", floating=True)
        out = warp(tensor, whole, padding=padding)
        return Image(out, self.fixed_affine) if isinstance(image, Image) else out

    @overload
    def apply_labels(self, labels: Image, *, mode: str = ...) -> Image: ...
    @overload
    def apply_labels(self, labels: Tensor, *, mode: str = ...) -> Tensor: ...
    def apply_labels(self, labels: Image | Tensor, *, mode: str = "nearest") -> Image | Tensor:
        """Pull a label map of the moving side back; no label is invented, 0 comes from outside.

        Args:
            labels: an ``Image`` in the moving world, or ``(B, C, *T)`` on the moving grid.
            mode: ``"nearest"`` or ``"linear"``, as in :func:`reglib.geometry.sampling.warp_labels`.

        Returns:
            An ``Image`` or ``(B, C, *S)``, as was given, on the fixed grid, dtype of ``labels``.

        Raises:
            TypeError, ValueError: if they do not belong to the moving image.
        """
        tensor, whole = self._prepare(labels, "labels", floating=False)
        out = warp_labels(tensor, whole, mode=mode)
        return Image(out, self.fixed_affine) if isinstance(labels, Image) else out

    def _prepare(
        self, image: Image | Tensor, name: str, *, floating: bool
    ) -> tuple[Tensor, Tensor]:
        """The tensor on the device of the field, and the field into its voxels."""
        if isinstance(image, Image):
            check_image(image.tensor, name, floating=floating)
            if len(self) != 1:
                raise ValueError(
                    f"{name}: wanted a tensor for a batch of {len(self)}, got a single Image; "
                    "index the registration to take one pair"
                )
            if image.affine.shape != self.moving_affine.shape:
                raise ValueError(
                    f"{name}: wanted {self.field.shape[1]} spatial axes, got {image!r}"
                )
            tensor = image.tensor.to(self.field.device)
            return tensor, self.whole_field(image.affine)
        check_image(image, name, floating=floating)
        check_batch(image, self.field, (name, "field"))
        if image.device != self.field.device:
            raise ValueError(
                f"{name}: wanted it on {self.field.device}, like the field, got {image.device}"
            )
        if tuple(image.shape[2:]) != self.moving_shape:
            raise ValueError(
                f"{name}: wanted the moving grid of {self.moving_shape}, got "
                f"{tuple(image.shape[2:])}; an Image may have a grid of its own"
            )
        return image, self.whole_field()

    def apply_points(self, fixed_points: Tensor, *, space: str = "voxel") -> Tensor:
        """Carry points from the fixed to the moving image: ``phi(p)``.

        Args:
            fixed_points: ``(B, N, D)``, float; in voxels of the fixed image, or in mm.
            space: ``"voxel"``, ``"ras"`` or ``"lps"``: of what is given and what is returned.

        Returns:
            The corresponding points ``(B, N, D)`` of the moving image, in the same space.

        Raises:
            TypeError, ValueError: if they do not fit.
        """
        points = self._to_voxels(fixed_points, "fixed_points", space, self.fixed_affine)
        moved = warp_points(points.to(self.field), self.field)
        world = voxel_to_world(moved.double().cpu(), self.fixed_affine)
        world = transform_points(world, self.affine)
        return _from_world(world, space, self.moving_affine).to(fixed_points)

    def apply_points_inverse(self, moving_points: Tensor, *, space: str = "voxel") -> Tensor:
        """Carry points from the moving to the fixed image: the p with ``phi(p) = q``.

        Each point is solved for on its own, to 0.001 voxels; beyond the fixed grid u goes on as at
        its border. Where phi folds, a point may come from several places, of which one is found.

        Args:
            moving_points: ``(B, N, D)``, float; in voxels of the moving image, or in mm.
            space: ``"voxel"``, ``"ras"`` or ``"lps"``: of what is given and what is returned.

        Returns:
            The corresponding points ``(B, N, D)`` of the fixed image, in the same space.

        Raises:
            TypeError, ValueError: if they do not fit, or no such p is found (phi folds nearby, or
                turns by more than a right angle).
        """
        points = self._to_voxels(moving_points, "moving_points", space, self.moving_affine)
        world = voxel_to_world(points.double().cpu(), self.moving_affine)
        world = transform_points(world, torch.linalg.inv(self.affine))
        goal = world_to_voxel(world, self.fixed_affine)
        u = self.field.detach().double().cpu()
        found, miss = invert_points(goal, u, tolerance=1e-4)
        lost = int((miss > 1e-3).sum())
        if lost:
            raise ValueError(
                f"moving_points: wanted points whose origin can be found, got {lost} of "
                f"{miss.numel()} that are missed by up to {float(miss.max()):.3g} voxels"
            )
        world = voxel_to_world(found, self.fixed_affine)
        return _from_world(world, space, self.fixed_affine).to(moving_points)

    def _to_voxels(self, points: Tensor, name: str, space: str, affine: Tensor) -> Tensor:
        check_choice(space, "space", ("voxel", "ras", "lps"))
        check_points(points, name, self.field.shape[1])
        if len(points) != len(self):
            raise ValueError(f"{name}: wanted points of {len(self)} pair(s), got {len(points)}")
        check_finite(points, name)
        return points if space == "voxel" else world_to_voxel(points, affine, space=space)

    # --- On disk ----------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was run and how it went, as JSON values; one pair only.

        What is not a finite number is ``None``.

        Raises:
            ValueError: if this is a batch.
        """
        self._check_single()
        report = {
            **self.settings,
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "interrupted": self.interrupted,
            "folding": float(self.folding),
            "ndv": float(self.ndv),
            "fixed": describe_grid(self.fixed_affine, self.field.shape[2:]),
            "moving": describe_grid(self.moving_affine, self.moving_shape),
            "affine_ras_mm": self.affine[0].tolist(),
            "history": self.history[0] if self.history else {},
        }
        return {key: _plain(value) for key, value in report.items()}

    def save(self, folder: str | Path) -> None:
        """Write the transform so that ITK, ANTs and 3D Slicer apply it, and this library loads it.

        ``field.nii.gz`` is the whole of phi as one displacement field, what users apply;
        ``affine.mat`` (A) and ``residual_field.nii.gz`` (u) are its parts; ``inverse_field.nii.gz``
        is written where an inverse exists; ``report.json`` says how it came about.

        All of them appear once all are written: where that fails, an older transform in the folder
        stays as it was.

        Args:
            folder: made if it is not there; files of these names are replaced.

        Raises:
            OSError: if a file cannot be written.
            ValueError: if this is a batch (index it), or ITK cannot hold the grid.
        """
        report = self.report()
        folder = Path(folder)
        new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as part:
                names = self._write(Path(part), report)
                for name in names:
                    os.replace(Path(part) / name, folder / name)
                if INVERSE not in names:
                    (folder / INVERSE).unlink(missing_ok=True)
        except BaseException as error:
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if not isinstance(error, OSError):
                raise
            reason = (error.strerror or str(error)).removesuffix(", nothing was written")
            raise OSError(error.errno, f"{reason}, nothing was written", str(folder)) from error

    def _write(self, folder: Path, report: dict[str, Any]) -> list[str]:
        """Write the files of :meth:`save` and name them, the report last."""
        whole = self.whole_field().detach()
        write_field(folder / FIELD, whole, self.fixed_affine, moving_affine=self.moving_affine)
        write_affine(folder / AFFINE, self.affine[0])
        write_field(folder / RESIDUAL, self.field, self.fixed_affine)
        names = [FIELD, AFFINE, RESIDUAL]
        try:
            back = self.inverse_field()
        except ValueError as error:
            report["inverse"] = f"none ({error})"
        else:
            try:
                write_field(
                    folder / INVERSE, back, self.moving_affine, moving_affine=self.fixed_affine
                )
            except ValueError as error:
                reason = str(error).replace("fixed_affine", "moving_affine")
                reason = reason.replace("fixed image", "moving image")
                report["inverse"] = f"not written on the moving grid ({reason})"
            else:
                report["inverse"] = INVERSE
                names.append(INVERSE)
        content = json.dumps(report, indent=1, allow_nan=False)
        write_bytes(folder / REPORT, (content + "\n").encode())
        return [*names, REPORT]

    @staticmethod
    def load(folder: str | Path) -> Registration:
        """Read what :meth:`save` wrote.

        Args:
            folder: of ``affine.mat``, ``residual_field.nii.gz`` and ``report.json``.

        Returns:
            The registration on the CPU; ``warped`` is ``None``.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if a file is not what its name says, or they do not belong together.
        """
        folder = Path(folder)
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            moving_affine = torch.tensor(report["moving"]["affine"], dtype=torch.float64)
            moving_shape = tuple(int(n) for n in report["moving"]["shape"])
            shape = tuple(int(n) for n in report["fixed"]["shape"])
            grid = torch.tensor(report["fixed"]["affine"], dtype=torch.float64)
            noted = torch.tensor(report["affine_ras_mm"], dtype=torch.float64)
            check_affine(moving_affine, "moving affine", len(shape))
            check_shape(moving_shape, (len(shape),), "moving shape")
            history = {
                str(stage): {
                    str(name): [math.nan if x is None else float(x) for x in values]
                    for name, values in terms.items()
                }
                for stage, terms in report["history"].items()
            }
            seconds, memory = float(report["seconds"]), report["peak_memory"]
            memory = None if memory is None else int(memory)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / REPORT}: wanted a report of reglib ({error!r})") from error
        u, fixed_affine = read_field(folder / RESIDUAL)
        affine = read_affine(folder / AFFINE)
        # Files hold the places of voxels in single precision.
        for name, same in (
            (RESIDUAL, tuple(u.shape[2:]) == shape and _close(fixed_affine, grid, 1e-5)),
            (AFFINE, _close(affine, noted, 1e-9)),
        ):
            if not same:
                raise ValueError(f"{folder / name}: wanted what {REPORT} describes, got another")
        return Registration(
            affine=affine.unsqueeze(0),
            field=u,
            fixed_affine=fixed_affine,
            moving_affine=moving_affine,
            moving_shape=moving_shape,
            history=(history,),
            seconds=seconds,
            peak_memory=memory,
            interrupted=bool(report.get("interrupted", False)),
            settings={k: v for k, v in report.items() if k not in _MEASURED},
        )

    def _check_single(self) -> None:
        if len(self) != 1:
            raise ValueError(
                f"wanted a single pair, got a batch of {len(self)}; index the registration"
            )


# --- Registering ----------------------------------------------------------------------------


def register(
    moving: Image | Tensor,
    fixed: Image | Tensor,
    method: Method | nn.Module | Sequence[Method | nn.Module],
    *,
    moving_affine: Tensor | None = None,
    fixed_affine: Tensor | None = None,
    moving_mask: Image | Tensor | None = None,
    fixed_mask: Image | Tensor | None = None,
    start: Tensor | None = None,
    callback: Callable[[Iterate], object] | None = None,
    progress: bool | None = None,
) -> Registration:
    """Find the transform that carries the fixed image's points to the moving image.

    Both images meet through their affines in world mm, whatever their grids. Ctrl-C stops the
    method and returns the best state so far, marked as interrupted. A pair of a batch gives what it
    gives alone, but for rounding, which the hundreds of steps of an optimisation amplify: where the
    images say little, by a voxel in single precision.

    Args:
        moving: an ``Image``, or a batch ``(B, C, *T)``; floating point.
        fixed: an ``Image``, or a batch ``(B, C, *S)``.
        method: what finds the transform, such as ``Affine()`` of
            :mod:`reglib.methods.classical`; a trained network; or several of these, each starting
            from what the one before has found.
        moving_affine: ``(D+1, D+1)``, voxels of a moving tensor to world mm (RAS); ``None`` puts
            voxels 1 mm apart, the first at the origin. An ``Image`` brings its own.
        fixed_affine: the same for a fixed tensor.
        moving_mask: how much each voxel counts, ``(B, 1, *T)`` on the moving grid, at least 0.
        fixed_mask: ``(B, 1, *S)`` on the fixed grid.
        start: A to start from, ``(B, D+1, D+1)``, world mm, fixed to moving; ``None`` is identity.
        callback: called after every step with its :class:`reglib.methods.pair.Iterate`; anything
            true that it returns stops the method it was called from.
        progress: show a progress bar on stderr; ``None`` shows it on a terminal only.

    Returns:
        The transform, the warped image, and how it came about.

    Raises:
        TypeError, ValueError: if an argument is malformed, or images, masks and affines do not
            belong together.
        KeyboardInterrupt: if interrupted before the first step was done.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: wanted a function or None, got {callback!r}")
    pair = _pair(moving, fixed, moving_affine, fixed_affine, moving_mask, fixed_mask, start)
    methods = [m if not isinstance(m, nn.Module) else Network(m) for m in _listed(method)]
    device = pair.fixed.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    history: tuple[History, ...] = tuple({} for _ in range(len(pair.fixed)))
    notes: list[str] = []
    interrupted = False
    # tqdm reads None as: silent unless on a terminal.
    with tqdm(unit="step", disable=None if progress is None else not progress) as bar:
        for number, one in enumerate(methods):
            try:
                pair, interrupted = _run(one, pair, history, notes, callback, bar)
            except KeyboardInterrupt:
                if number == 0:
                    raise
                interrupted = True  # what the methods before have found is kept
            if interrupted:
                break
        warped = pair.warped()
    return Registration(
        affine=pair.affine,
        field=pair.field,
        fixed_affine=pair.fixed_affine,
        moving_affine=pair.moving_affine,
        moving_shape=tuple(pair.moving.shape[2:]),
        warped=warped,
        history=history,
        seconds=time.perf_counter() - begin,
        peak_memory=_peak_memory(device),
        interrupted=interrupted,
        settings={
            "reglib": reglib.__version__,
            "method": [describe_method(m) for m in methods],
            "notes": notes,
            "masks": [
                name
                for name, mask in (("moving", pair.moving_mask), ("fixed", pair.fixed_mask))
                if mask is not None
            ],
            "started": "identity" if start is None else "given affine",
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": _device_name(device),
                "threads": torch.get_num_threads(),
            },
        },
    )


def _run(
    method: Method,
    pair: Pair,
    history: tuple[History, ...],
    notes: list[str],
    callback: Callable[[Iterate], object] | None,
    bar: tqdm,
) -> tuple[Pair, bool]:
    """Run one method to its end, or until it is interrupted: the pair with its new start."""
    last: Iterate | None = None
    interrupted = False
    try:
        steps = method(pair)
        if not isinstance(steps, Iterable) or isinstance(steps, Tensor):
            raise TypeError(
                f"method: wanted one that yields an Iterate per step, got {type(steps).__name__} "
                f"from {method!r}"
            )
        for iterate in steps:
            _check_iterate(iterate, len(pair.field))
            last = iterate
            loss = _record(iterate, history)
            bar.update()
            bar.set_description(iterate.stage, refresh=False)
            if loss is not None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if callback is not None and callback(iterate):
                break
    except KeyboardInterrupt:
        if last is None:
            raise
        interrupted = True
    if last is None:
        raise ValueError(f"method: wanted at least one step, got none from {method!r}")
    notes.extend(last.notes)
    affine, u = last.transform()
    check_matrix(
        affine, "method's affine", dimensions=(pair.field.shape[1],), batches=(len(pair.field),)
    )
    check_field(u, "method's field")
    if u.shape != pair.field.shape:
        raise ValueError(
            f"method: wanted a field of shape {tuple(pair.field.shape)}, got {tuple(u.shape)}"
        )
    check_finite(u, "method's field")
    found = dataclasses.replace(
        pair,
        affine=affine.detach().to("cpu", torch.float64),
        field=u.detach().to(pair.field),
    )
    return found, interrupted


def _check_iterate(iterate: object, batch: int) -> None:
    """Raise unless a method has yielded what its contract says."""
    if not isinstance(iterate, Iterate):
        raise TypeError(
            f"method: wanted one that yields an Iterate per step, got {type(iterate).__name__}"
        )
    for name, value in {**iterate.terms, "active": iterate.active}.items():
        if not isinstance(value, Tensor) or value.shape != (batch,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"method: wanted {name!r} of shape ({batch},), got {shape}")


def _record(iterate: Iterate, history: tuple[History, ...]) -> float | None:
    """Append the terms of those pairs that are still running; their mean loss."""
    if not iterate.terms:
        return None
    table = torch.stack(list(iterate.terms.values())).detach().cpu()
    active = iterate.active.tolist()
    for b, (column, running) in enumerate(zip(table.T.tolist(), active, strict=True)):
        if running:
            stage = history[b].setdefault(iterate.stage, {})
            for name, value in zip(iterate.terms, column, strict=True):
                stage.setdefault(name, []).append(value)
    return float(table.sum(0).mean())


def _listed(method: Method | nn.Module | Sequence[Method | nn.Module]) -> list[Method | nn.Module]:
    methods = list(method) if isinstance(method, Sequence) else [method]
    for m in methods:
        if isinstance(m, type):
            raise TypeError(f"method: wanted an instance, {m.__name__}(...), got the class itself")
    if not methods or not all(callable(m) for m in methods) or isinstance(method, str):
        raise TypeError(f"method: wanted a method, a network, or several in a list, got {method!r}")
    return methods


def _pair(
    moving: Image | Tensor,
    fixed: Image | Tensor,
    moving_affine: Tensor | None,
    fixed_affine: Tensor | None,
    moving_mask: Image | Tensor | None,
    fixed_mask: Image | Tensor | None,
    start: Tensor | None,
) -> Pair:
    """Everything checked, in one dtype and on one device."""
    moving_tensor, moving_affine = _unpack(moving, moving_affine, "moving")
    fixed_tensor, fixed_affine = _unpack(fixed, fixed_affine, "fixed")
    check_batch(moving_tensor, fixed_tensor, ("moving", "fixed"))
    if moving_tensor.shape[1] != fixed_tensor.shape[1]:
        raise ValueError(
            "moving, fixed: wanted the same number of channels, "
            f"got {moving_tensor.shape[1]} and {fixed_tensor.shape[1]}"
        )
    if moving_tensor.device != fixed_tensor.device:
        raise ValueError(
            "moving, fixed: wanted both on one device, "
            f"got {moving_tensor.device} and {fixed_tensor.device}"
        )
    check_finite(moving_tensor, "moving")
    check_finite(fixed_tensor, "fixed")
    work = torch.promote_types(
        torch.promote_types(moving_tensor.dtype, fixed_tensor.dtype), torch.float32
    )
    b, d = len(fixed_tensor), fixed_tensor.ndim - 2
    if start is None:
        matrix = torch.eye(d + 1, dtype=torch.float64).expand(b, d + 1, d + 1)
    else:
        check_matrix(start, "start", dimensions=(d,), batches=(b,))
        matrix = start.detach().to("cpu", torch.float64)
    return Pair(
        moving=moving_tensor.detach().to(work),
        fixed=fixed_tensor.detach().to(work),
        moving_affine=moving_affine,
        fixed_affine=fixed_affine,
        moving_mask=_mask(moving_mask, moving_tensor, moving_affine, "moving_mask", work),
        fixed_mask=_mask(fixed_mask, fixed_tensor, fixed_affine, "fixed_mask", work),
        affine=matrix,
        field=fixed_tensor.new_zeros((b, d, *fixed_tensor.shape[2:]), dtype=work),
    )


def _unpack(image: Image | Tensor, affine: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(image, Image):
        if affine is not None:
            raise ValueError(f"{name}_affine: wanted None beside an Image, which brings its own")
        tensor, affine = image.tensor, image.affine
    else:
        check_image(image, name, floating=False)
        d = image.ndim - 2
        affine = torch.eye(d + 1, dtype=torch.float64) if affine is None else affine
        tensor, affine = image, check_affine(affine, f"{name}_affine", d)
    check_image(tensor, name)
    return tensor, affine


def _mask(
    mask: Image | Tensor | None, image: Tensor, affine: Tensor, name: str, dtype: torch.dtype
) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, Image):
        if mask.affine.shape != affine.shape or not torch.allclose(mask.affine, affine, atol=1e-3):
            raise ValueError(f"{name}: wanted the grid of its image, got one placed elsewhere")
        mask = mask.tensor
    check_weight(mask, image, name)
    weight = mask.to(image.device, dtype)
    check_finite(weight, name)
    if bool((weight < 0).any()) or not bool(weight.flatten(1).any(1).all()):
        raise ValueError(f"{name}: wanted weights of at least 0 that are not all 0")
    return weight


# --- Small things ---------------------------------------------------------------------------


def _from_world(world: Tensor, space: str, affine: Tensor) -> Tensor:
    if space == "voxel":
        return world_to_voxel(world, affine)
    return world if space == "ras" else world * to_lps(world.shape[2])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two matrices are the same, relative to the largest number in them."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def describe_method(method: object) -> dict[str, Any]:
    """Name and settings of a method as JSON values."""
    if isinstance(method, Network):
        return _describe_network(method.network) | {"settings": _plain(method.contract)}
    if dataclasses.is_dataclass(method) and not isinstance(method, type):
        settings = {f.name: _plain(getattr(method, f.name)) for f in dataclasses.fields(method)}
        return {"name": type(method).__name__, "settings": settings}
    if isinstance(method, functools.partial):
        arguments = {str(i): _plain(v) for i, v in enumerate(method.args)}
        return {"name": _name(method.func), "settings": arguments | _plain(method.keywords)}
    return {"name": _name(method), "settings": {}}


def _describe_network(network: object) -> dict[str, Any]:
    """Its name, and the card of its weights."""
    card = getattr(network, "card", None) or {}
    return {"name": str(card.get("method") or _name(network)), "weights": _plain(card)}


def _name(value: object) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _plain(value: Any) -> Any:
    """A setting as JSON: functions by their name, ``None`` for what is not a finite number."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # arrays and their numbers
        return _plain(value.tolist())
    if isinstance(value, functools.partial) or dataclasses.is_dataclass(value):
        return describe_method(value)
    if isinstance(value, nn.Module):
        return _describe_network(value)
    return getattr(value, "__name__", None) or repr(value)


def describe_grid(affine: Tensor, shape: Sequence[int]) -> dict[str, Any]:
    """Shape, spacing (mm), orientation and affine of a grid, as JSON values."""
    placed = Image(torch.zeros((1, 1, *(1,) * len(shape)), dtype=torch.uint8), affine)
    return {
        "shape": list(shape),
        "spacing": [round(s, 9) for s in placed.spacing],
        "orientation": placed.orientation,
        "affine": affine.tolist(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
