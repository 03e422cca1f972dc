"""The peers of benchmark_classical.py: each runs in a process of its own, in their environment.

    build/peers/bin/python data_scripts/peers.py

A server on standard input and output, one JSON object a line. It imports no reglib, only the
package that a request names. Of each pair it is given two NIfTI files; it gives back how long the
registration took and leaves the whole transform beside them as ITK's displacement field, fixed to
moving (an affine part included), for everyone to be measured from the same kind of file.

``CONFIGURATIONS`` holds the exact settings of every peer; what is not named there is the package's
default. Packages and their versions are pinned in requirements-peers.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

#: Of every registration, a peer's or ours, by the environment of its process, which also keeps to
#: as many cores.
THREADS = 2

#: SimpleITK: mutual information of all voxels, from the centres of mass.
AFFINE = {
    "initialise": "moments",
    "bins": 32,
    "sampling": 1.0,
    "shrink": [4, 2],
    "sigma_voxels": [2.0, 1.0],
    "iterations": 100,
    "learning_rate": 1.0,
    "minimum_step": 0.001,
    "relaxation": 0.5,
}

#: Demons, coarse to fine; the field is smoothed after every iteration (standard deviation in voxels
#: of the level). Chosen on validation pairs: the largest Dice that folds less than 0.01 %.
DEMONS = {
    "histogram": {"levels": 256, "points": 10, "threshold_at_mean": True},
    "shrink": [4, 2, 1],
    "iterations": [50, 50, 25],
    "smooth_field_voxels": 1.0,
}

#: What convexAdam 0.2.0 does by itself. No other choice was better on validation pairs in less than
#: several times the seconds.
CONVEX = {
    "mind_r": 1,
    "mind_d": 2,
    "lambda_weight": 1.25,
    "grid_sp": 6,
    "disp_hw": 4,
    "selected_niter": 80,
    "selected_smooth": 0,
    "grid_sp_adam": 2,
    "ic": True,
}


def syn(metric: str, sampling: int, iterations: list[int]) -> dict[str, Any]:
    """``ants.registration`` with SyN: centres of mass, affine (mutual information), then SyN.

    Cross-correlation is asked for in this way too, radius ``sampling``: the function's own "SyNCC"
    takes radius 4 and up to 2,100 iterations a level whatever it is told, which takes many minutes.
    """
    return {
        "package": "antspyx",
        "seed": 0,
        "registration": {
            "type_of_transform": "SyN",
            "syn_metric": metric,
            "syn_sampling": sampling,
            "reg_iterations": iterations,
        },
    }


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ANTsPy SyN MI, default": syn("mattes", 32, [40, 20, 0]),
    "ANTsPy SyN MI, full resolution": syn("mattes", 32, [40, 20, 10]),
    "ANTsPy SyN CC, half resolution": syn("CC", 2, [40, 20, 0]),
    "ANTsPy SyN CC, full resolution": syn("CC", 2, [40, 20, 10]),
    "ConvexAdam": {"package": "convexAdam", "convex_adam": CONVEX},
    "SimpleITK affine + ConvexAdam": {
        "package": "convexAdam",
        "affine": AFFINE,
        "convex_adam": CONVEX,
    },
    "SimpleITK affine": {"package": "SimpleITK", "affine": AFFINE},
    "SimpleITK affine + demons": {"package": "SimpleITK", "affine": AFFINE, "demons": DEMONS},
}


class Watch:
    """Wall-clock and CPU seconds, all threads together, of what is done inside; and notes on it."""

    def __enter__(self) -> Watch:
        self.notes: dict[str, Any] = {}
        self.begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.begin[0]
        self.cpu_seconds = time.process_time() - self.begin[1]


# --- antspyx --------------------------------------------------------------------------------


def run_antspyx(moving: str, fixed: str, field: str, settings: dict[str, Any]) -> Watch:
    """``ants.registration``, which also writes its transforms and both warped images."""
    import ants

    # The function's own random_seed is ignored (0.6.3): only that of the configuration counts.
    ants.config._random_seed = settings["seed"]
    images = {"moving": ants.image_read(moving), "fixed": ants.image_read(fixed)}
    given = settings["registration"]
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        with Watch() as watch:
            found = ants.registration(**images, outprefix=f"{folder}/", **options)
        whole = ants.apply_transforms(
            **images, transformlist=found["fwdtransforms"], compose=f"{folder}/whole_"
        )
        Path(field).write_bytes(Path(whole).read_bytes())
    return watch


# --- SimpleITK ------------------------------------------------------------------------------


def sitk_by_mutual_information(settings: dict[str, Any]) -> Any:
    """A registration by Mattes' mutual information, from coarse to fine, without its optimiser."""
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(settings["bins"])
    if settings["sampling"] < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(settings["sampling"])
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(settings["shrink"])
    method.SetSmoothingSigmasPerLevel(settings["sigma_voxels"])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(False)
    return method


def sitk_affine(moving: Any, fixed: Any, settings: dict[str, Any]) -> Any:
    """Regular-step gradient descent, coarse to fine; Mattes' mutual information unless it says."""
    import SimpleITK as sitk

    d = fixed.GetDimension()
    rigid = sitk.Euler2DTransform() if d == 2 else sitk.Euler3DTransform()
    start = sitk.CenteredTransformInitializer(
        fixed,
        moving,
        rigid if settings.get("rigid") else sitk.AffineTransform(d),
        {
            "moments": sitk.CenteredTransformInitializerFilter.MOMENTS,
            "geometry": sitk.CenteredTransformInitializerFilter.GEOMETRY,
        }[settings["initialise"]],
    )
    method = sitk_by_mutual_information(settings)
    if settings.get("metric") == "mean squares":
        method.SetMetricAsMeanSquares()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=settings["learning_rate"],
        minStep=settings["minimum_step"],
        numberOfIterations=settings["iterations"],
        relaxationFactor=settings["relaxation"],
        gradientMagnitudeTolerance=settings.get("gradient_tolerance", 1e-4),
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=False)
    return method.Execute(fixed, moving)


def sitk_resample(moving: Any, fixed: Any, transform: Any) -> Any:
    """The moving image on the fixed grid; beyond its border it goes on as there."""
    import SimpleITK as sitk

    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(fixed)
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.UseNearestNeighborExtrapolatorOn()
    return resampler.Execute(moving)


def sitk_demons(moving: Any, fixed: Any, settings: dict[str, Any]) -> Any:
    """Symmetric-forces demons from coarse to fine: a displacement field, mm, on the fixed grid."""
    import SimpleITK as sitk

    histogram = settings["histogram"]
    moving = sitk.HistogramMatching(
        moving, fixed, histogram["levels"], histogram["points"], histogram["threshold_at_mean"]
    )
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetSmoothDisplacementField(True)
    demons.SetStandardDeviations(settings["smooth_field_voxels"])
    field = None
    for shrink, iterations in zip(settings["shrink"], settings["iterations"], strict=True):
        pair = [fixed, moving]
        if shrink > 1:
            sigma = [shrink / 2 * s for s in fixed.GetSpacing()]
            factors = [min(shrink, n // 8) or 1 for n in fixed.GetSize()]
            pair = [sitk.Shrink(sitk.SmoothingRecursiveGaussian(x, sigma), factors) for x in pair]
        demons.SetNumberOfIterations(iterations)
        if field is None:
            field = demons.Execute(*pair)
        else:
            field = demons.Execute(*pair, sitk_resample(field, pair[0], sitk.Transform()))
    return field


def sitk_displacement(moving: Any, fixed: Any, settings: dict[str, Any]) -> Any:
    """A displacement field by gradient descent on local correlation, smoothed after every step."""
    import SimpleITK as sitk

    still = sitk.TransformToDisplacementField(
        sitk.Transform(fixed.GetDimension(), sitk.sitkIdentity),
        sitk.sitkVectorFloat64,
        fixed.GetSize(),
        fixed.GetOrigin(),
        fixed.GetSpacing(),
        fixed.GetDirection(),
    )
    transform = sitk.DisplacementFieldTransform(still)
    transform.SetSmoothingGaussianOnUpdate(
        varianceForUpdateField=settings["variance_update"],
        varianceForTotalField=settings["variance_total"],
    )
    method = sitk.ImageRegistrationMethod()
    method.SetInitialTransform(transform, inPlace=True)
    method.SetMetricAsANTSNeighborhoodCorrelation(settings["radius"])
    method.MetricUseFixedImageGradientFilterOff()
    method.SetShrinkFactorsPerLevel(settings["shrink"])
    method.SetSmoothingSigmasPerLevel(settings["sigma_mm"])
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetOptimizerAsGradientDescent(
        learningRate=settings["learning_rate"],
        numberOfIterations=settings["iterations"],
        estimateLearningRate=method.EachIteration,
    )
    return method.Execute(fixed, moving)


def sitk_bspline(moving: Any, fixed: Any, settings: dict[str, Any]) -> Any:
    """Free-form deformation by Mattes' mutual information; every level halves the lattice's cells.

    Rueckert et al., IEEE TMI 1999, doi:10.1109/42.796284.
    """
    import SimpleITK as sitk

    sides = [n * s for n, s in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)]
    cells = [max(round(side / settings["coarsest_cell_mm"]), 1) for side in sides]
    method = sitk_by_mutual_information(settings)
    # Of ITK's L-BFGS this is the one that takes a lattice that grows.
    method.SetOptimizerAsLBFGS2(
        solutionAccuracy=settings["accuracy"],
        numberOfIterations=settings["iterations"],
    )
    method.SetInitialTransformAsBSpline(
        sitk.BSplineTransformInitializer(fixed, cells, order=3),
        inPlace=False,
        scaleFactors=[2**level for level in range(len(settings["shrink"]))],
    )
    return method.Execute(fixed, moving)


def run_simpleitk(moving: str, fixed: str, field: str, settings: dict[str, Any]) -> Watch:
    """Affine, if asked for, and demons or a B-spline after it; or a displacement field."""
    import SimpleITK as sitk

    m, f = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (moving, fixed))
    with Watch() as watch:
        if "displacement" in settings:
            whole = [sitk_displacement(m, f, settings["displacement"])]
        elif "affine" in settings:
            whole = [sitk_affine(m, f, settings["affine"])]
        else:
            whole = [sitk.Transform(f.GetDimension(), sitk.sitkIdentity)]
        if "demons" in settings:
            u = sitk_demons(sitk_resample(m, f, whole[0]), f, settings["demons"])
            whole.append(sitk.DisplacementFieldTransform(sitk.Cast(u, sitk.sitkVectorFloat64)))
        if "bspline" in settings:
            whole.append(sitk_bspline(sitk_resample(m, f, whole[0]), f, settings["bspline"]))
    sitk_write(whole, f, field)
    return watch


def sitk_write(transforms: list[Any], fixed: Any, path: str) -> None:
    """Transforms, of which the last is applied first, as one displacement field."""
    import SimpleITK as sitk

    whole = sitk.TransformToDisplacementField(
        sitk.CompositeTransform(transforms),
        sitk.sitkVectorFloat32,
        fixed.GetSize(),
        fixed.GetOrigin(),
        fixed.GetSpacing(),
        fixed.GetDirection(),
    )
    sitk.WriteImage(whole, path)


# --- convexAdam -----------------------------------------------------------------------------


def run_convexadam(moving: str, fixed: str, field: str, settings: dict[str, Any]) -> Watch:
    """MIND and coupled convex optimisation, then Adam; both images on the fixed grid."""
    import SimpleITK as sitk
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    m, f = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (moving, fixed))
    with Watch() as watch:
        whole = [sitk_affine(m, f, settings["affine"])] if "affine" in settings else []
        placed = sitk_resample(m, f, whole[0] if whole else sitk.Transform())
        found = convex_adam_pt(
            f, placed, dtype=torch.float32, device=torch.device("cpu"), **settings["convex_adam"]
        )
    sitk_write([*whole, sitk.DisplacementFieldTransform(sitk_field(found, f))], f, field)
    return watch


def sitk_field(voxels: Any, fixed: Any) -> Any:
    """Displacements ``(*S, 3)`` in voxels along the axes of the array of ``fixed``, as ITK's."""
    import numpy as np
    import SimpleITK as sitk

    # ITK's axes are those of its arrays in reverse.
    vectors = voxels[..., ::-1] * fixed.GetSpacing() @ np.reshape(fixed.GetDirection(), (3, 3)).T
    u = sitk.GetImageFromArray(np.ascontiguousarray(vectors, np.float64), isVector=True)
    u.CopyInformation(fixed)
    return u


# --- The server -----------------------------------------------------------------------------

Runner = Callable[[str, str, str, dict[str, Any]], Watch]

RUNNERS: dict[str, Runner] = {
    "antspyx": run_antspyx,
    "SimpleITK": run_simpleitk,
    "convexAdam": run_convexadam,
}


@contextlib.contextmanager
def own_output() -> Iterator[int]:
    """The file descriptor of the standard output; what libraries print there goes to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        yield out
    finally:
        os.close(out)


def serve(runners: dict[str, Runner]) -> None:
    """Answer requests until the input ends.

    A request names ``settings``, whose ``package`` chooses the runner, and the files ``moving``,
    ``fixed`` and ``field``. The answer: ``seconds``, ``cpu_seconds`` and ``notes``, or ``error``.
    """
    if hasattr(os, "sched_setaffinity"):
        threads = int(os.environ.get("OMP_NUM_THREADS", THREADS))
        # Of several processes at work at a time, each keeps to cores of its own.
        first = threads * int(os.environ.get("REGLIB_PLACE", 0))
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[first : first + threads] or cores)
    with own_output() as out:
        for line in sys.stdin:
            request = json.loads(line)
            settings = request["settings"]
            paths = [request[name] for name in ("moving", "fixed", "field")]
            answer: dict[str, Any]
            try:
                watch = runners[settings["package"]](*paths, settings)
                answer = {"seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds}
                answer |= {"notes": watch.notes} if watch.notes else {}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(out, (json.dumps(answer) + "\n").encode())


def versions() -> dict[str, str]:
    """Of the packages, and of what their speed depends on."""
    names = ("antspyx", "convexAdam", "SimpleITK", "numpy", "scipy", "nibabel", "torch")
    return {name: version(name) for name in names} | {"python": sys.version.split()[0]}


if __name__ == "__main__":
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
    else:
        serve(RUNNERS)
