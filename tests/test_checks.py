"""Bad input: every public function names the argument, what came and what was wanted."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reglib.checks import check_finite, check_image
from reglib.data.datasets import mnist, same_label_pairs
from reglib.geometry import (
    affine,
    bspline,
    derivatives,
    fields,
    grid,
    procrustes,
    sampling,
    smoothing,
)
from reglib.objectives import evaluation, metrics, mind, regularity, similarity, surface
from reglib.training import fit

IMAGE = torch.rand(2, 1, 6, 5)
FIELD = torch.rand(2, 2, 6, 5)
VOLUME_FIELD = torch.rand(2, 3, 4, 5, 3)
LABELS = torch.ones(2, 1, 6, 5, dtype=torch.long)
WEIGHT = torch.ones(2, 1, 6, 5)
LATTICE = torch.rand(2, 2, 6, 5)
PAIR = {"warped": IMAGE, "fixed": IMAGE, "weight": WEIGHT, "reduction": "none"}
REGULARISER = {"field": FIELD, "spacing": (1.0, 2.0), "reduction": "none"}
PAIRS = [(IMAGE, IMAGE)]
POINTS = torch.tensor([[0.0, 0.0], [9.0, 1.0], [2.0, 8.0], [5.0, 5.0]]).repeat(2, 1, 1)
MATRIX = torch.eye(3).repeat(2, 1, 1)
RIGID = {
    "rotation": torch.zeros(2, 1),
    "translation": torch.zeros(2, 2),
    "centre": torch.zeros(1, 2),
}
SURFACE = {
    "warped_labels": LABELS,
    "fixed_labels": LABELS,
    "labels": [1, 2],
    "spacing": (1.0, 2.0),
}


class Blend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.share = torch.nn.Parameter(torch.zeros(()))

    def forward(self, moving, fixed):
        return torch.lerp(moving, fixed, self.share)


def squared_error(output, moving, fixed):
    return {"error": (output - fixed).square().mean()}


#: A valid call of every public function with arguments; what is not named here has no check.
VALID = {
    grid.identity_grid: {"shape": (6, 5)},
    grid.voxel_to_unit: {"coords": FIELD, "shape": (6, 5)},
    grid.unit_to_voxel: {"coords": FIELD, "shape": (6, 5)},
    grid.sample: {"image": IMAGE, "coords": FIELD, "mode": "linear", "padding": "zeros"},
    sampling.transform_grid: {"field": FIELD},
    sampling.warp: {"image": IMAGE, "field": FIELD, "padding": "zeros"},
    sampling.warp_labels: {"labels": LABELS, "field": FIELD, "mode": "linear", "padding": "border"},
    sampling.warp_points: {"fixed_points": torch.rand(2, 3, 2), "field": FIELD},
    fields.compose: {"a": FIELD, "b": FIELD},
    fields.integrate: {"velocity": FIELD, "steps": 3},
    fields.invert: {"field": FIELD, "iterations": 3, "tolerance": 0.01},
    fields.invert_points: {
        "moving_points": torch.zeros(len(FIELD), 4, 2),
        "field": FIELD,
        "iterations": 3,
        "tolerance": 0.01,
        "retries": 0,
    },
    fields.carry_field: {
        "field": FIELD,
        "affine": torch.eye(3),
        "new_affine": torch.diag(torch.tensor([2.0, 2.0, 1.0])),
        "new_shape": (3, 3),
    },
    fields.inverse_consistency: {"a": FIELD, "b": FIELD, "spacing": (1.0, 2.0)},
    fields.upsample_field: {"field": FIELD, "factor": 2, "shape": (12, 9)},
    fields.downsample_field: {"field": FIELD, "factor": 2},
    fields.resize_field_corners: {"field": FIELD, "shape": (4, 9)},
    derivatives.gradient: {"x": IMAGE, "spacing": (1.0, 2.0)},
    derivatives.jacobian: {"field": FIELD},
    derivatives.jacobian_det: {"field": FIELD},
    derivatives.digital_determinants: {"field": FIELD},
    smoothing.box_sum: {"x": IMAGE, "window": 3},
    smoothing.gaussian_smooth: {"x": IMAGE, "sigma": 1.0, "truncate": 3.0},
    smoothing.pool: {"image": IMAGE, "factor": 2},
    smoothing.pyramid: {"image": IMAGE, "levels": 2, "factor": 2},
    affine.rigid_matrix: RIGID,
    affine.affine_matrix: RIGID | {"log_scales": torch.zeros(2, 2), "shears": torch.zeros(2, 1)},
    affine.affine_parameters: {"matrix": MATRIX, "centre": torch.zeros(1, 2)},
    affine.grid_centre: {"affine": MATRIX[0], "shape": (6, 5)},
    affine.transform_points: {"fixed_points": torch.rand(2, 3, 2), "matrix": MATRIX},
    affine.affine_field: {
        "matrix": MATRIX,
        "fixed_affine": MATRIX[0],
        "moving_affine": MATRIX[0],
        "shape": (6, 5),
    },
    affine.whole_field: {
        "matrix": MATRIX,
        "field": FIELD,
        "fixed_affine": MATRIX[0],
        "moving_affine": MATRIX[0],
    },
    procrustes.fit_affine: {"fixed_points": POINTS, "moving_points": POINTS},
    procrustes.fit_rigid: {"fixed_points": POINTS, "moving_points": POINTS, "scale": True},
    similarity.mae: PAIR,
    similarity.mse: PAIR,
    similarity.ncc: PAIR,
    similarity.lncc: PAIR | {"window": 3, "sigma": 1.0},
    similarity.dssim: PAIR | {"data_range": 1.0, "window": 3, "sigma": 1.0},
    similarity.soft_dice: PAIR,
    similarity.mutual_information: PAIR
    | {"bins": 8, "normalised": False, "warped_range": (0.0, 1.0), "fixed_range": (0.0, 1.0)},
    mind.mind: PAIR | {"radius": 1, "dilation": 2},
    mind.mind_features: {"image": IMAGE, "radius": 1, "dilation": 2, "weight": WEIGHT},
    bspline.lattice_shape: {"shape": (6, 5), "stride": 2},
    bspline.bspline_field: {"lattice": LATTICE, "shape": (6, 5), "stride": 2, "factor": 2},
    bspline.refine_lattice: {"lattice": LATTICE, "shape": (6, 5), "stride": 2},
    bspline.fit_lattice: {"field": FIELD, "stride": 2},
    regularity.diffusion: REGULARISER,
    regularity.total_variation: REGULARISER | {"smoothing": 1e-6},
    regularity.bending: REGULARISER,
    metrics.dice: {"warped_labels": LABELS, "fixed_labels": LABELS, "labels": [1, 2]},
    metrics.tre: {
        "warped_points": POINTS,
        "moving_points": POINTS,
        "spacing": (1.0, 2.0),
        "reduction": "none",
    },
    metrics.ssim: {
        "warped": IMAGE,
        "fixed": IMAGE,
        "data_range": 1.0,
        "window": 3,
        "sigma": 1.0,
    },
    metrics.jacobian_statistics: {"field": FIELD, "mask": WEIGHT},
    surface.hd95: SURFACE,
    surface.assd: SURFACE,
    evaluation.evaluate: {
        "labels": (LABELS, LABELS),
        "points": (POINTS, POINTS),
        "images": None,
        "field": FIELD,
        "mask": WEIGHT,
        "spacing": (1.0, 2.0),
    },
    metrics.affine_share: {"field": FIELD},
    metrics.spectral_centroid: {"field": FIELD},
    metrics.folding: {"field": FIELD, "mask": WEIGHT},
    metrics.nda: {"field": FIELD, "mask": WEIGHT},
    metrics.ndv: {"field": VOLUME_FIELD, "mask": torch.ones(2, 1, 4, 5, 3)},
    same_label_pairs: {
        "images": torch.rand(4, 1, 6, 5),
        "labels": torch.tensor([0, 0, 1, 1]),
        "batch_size": 2,
    },
    mnist: {"split": "test"},
    fit: {
        "network": Blend(),
        "pairs": PAIRS,
        "objective": squared_error,
        "steps": 1,
        "seconds": 9.0,
        "lr": 1e-3,
        "progress": False,
    },
}

NO_TENSOR = [(None, TypeError), (np.ones((2, 2, 6, 5)), TypeError), ([[1.0]], TypeError)]
NO_BATCH = [
    (torch.rand(6, 5), ValueError),
    (torch.rand(2, 6, 5), ValueError),
    (torch.rand(1, 2, 3, 4, 5, 6), ValueError),
    (torch.rand(0, 2, 6, 5), ValueError),
    (torch.rand(2, 2, 6, 0), ValueError),
]
NO_IMAGE = NO_TENSOR + NO_BATCH + [(torch.ones(2, 1, 6, 5, dtype=torch.long), TypeError)]
NO_FIELD = (
    NO_TENSOR
    + NO_BATCH
    + [
        (torch.ones(2, 2, 6, 5, dtype=torch.long), TypeError),
        (torch.rand(2, 3, 6, 5), ValueError),
        (torch.rand(2, 2, 4, 6, 5), ValueError),
    ]
)
#: Fields of a good form whose batch or grid does not fit the other argument.
OTHER_BATCH = [(torch.rand(3, 2, 6, 5), ValueError), (torch.rand(2, 3, 4, 6, 5), ValueError)]
NO_COUNT = [
    (0, ValueError),
    (-1, ValueError),
    (1.5, TypeError),
    ("2", TypeError),
    (True, TypeError),
]
NO_WORD = [("cubic", ValueError), (1, ValueError), (None, ValueError)]
NO_SHAPE = [
    ((6,), ValueError),
    ((6, 5, 4, 3), ValueError),
    ((6, 0), ValueError),
    ((6.0, 5.0), TypeError),
    (6, TypeError),
    ("65", TypeError),
]
NO_SPACING = [
    ((1.0,), ValueError),
    ((1.0, 0.0), ValueError),
    ((1.0, -2.0), ValueError),
    ((1.0, float("nan")), ValueError),
    (1.0, TypeError),
    (("a", "b"), TypeError),
]
NO_RANGE = [
    ((1.0, 0.0), ValueError),
    ((0.0, float("inf")), ValueError),
    ((1.0,), ValueError),
    (torch.zeros(1, 1, 2), ValueError),
    (1.0, TypeError),
]
NO_SIZE = [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError)]
NO_WEIGHT = [
    (torch.ones(2, 2, 6, 5), ValueError),
    (torch.ones(1, 1, 6, 5), ValueError),
    (torch.ones(2, 6, 5), ValueError),
    (np.ones((2, 1, 6, 5)), TypeError),
    (torch.ones(2, 1, 6, 5, dtype=torch.complex64), TypeError),
]
NO_MATRIX = [
    *NO_TENSOR[:1],
    (np.eye(3)[None], TypeError),
    (torch.eye(3), ValueError),
    (torch.eye(5)[None], ValueError),
    (torch.zeros(0, 3, 3), ValueError),
    (torch.ones(2, 2, 3), ValueError),
    (torch.ones(2, 3, 3), ValueError),
    (torch.eye(3, dtype=torch.long)[None], TypeError),
    (torch.diag(torch.tensor([1.0, 0.0, 1.0]))[None], ValueError),
    (torch.diag(torch.tensor([1.0, torch.nan, 1.0]))[None], ValueError),
]
NO_AFFINE = [
    (None, TypeError),
    (MATRIX, ValueError),
    (torch.eye(4), ValueError),
    (torch.ones(3, 3), ValueError),
    (torch.diag(torch.tensor([1.0, 0.0, 1.0])), ValueError),
]
NO_POINTS = [
    *NO_TENSOR,
    (torch.rand(3, 2), ValueError),
    (torch.rand(2, 3, 4), ValueError),
    (torch.rand(2, 0, 2), ValueError),
    (torch.ones(2, 3, 2, dtype=torch.long), TypeError),
]
NO_LABELS = [*NO_TENSOR, (torch.ones(6, 5, dtype=torch.long), ValueError)]
OTHER_IMAGE = [
    (torch.rand(2, 1, 6, 4), ValueError),
    (torch.rand(1, 1, 6, 5), ValueError),
    (torch.rand(2, 2, 6, 5), ValueError),
]
NO_VALUES = [([], ValueError), (1, TypeError), (["a"], TypeError)]
SHAPE_OF = {
    fields.upsample_field: [((12, 8), ValueError), ((12, 9, 2), ValueError)],
    fields.resize_field_corners: [((4, 1), ValueError), ((4, 9, 2), ValueError)],
}

#: Bad values and the error of each, by the argument's name.
BAD = {
    "image": NO_IMAGE,
    "x": NO_IMAGE,
    "warped": NO_IMAGE + OTHER_IMAGE,
    "fixed": NO_IMAGE + OTHER_IMAGE,
    "images": NO_IMAGE,
    "field": NO_FIELD,
    "velocity": NO_FIELD,
    "a": NO_FIELD + OTHER_BATCH,
    "b": NO_FIELD + OTHER_BATCH,
    "fixed_points": [
        *NO_TENSOR,
        (torch.rand(3, 2), ValueError),
        (torch.rand(2, 3, 3), ValueError),
        (torch.rand(2, 0, 2), ValueError),
        (torch.rand(3, 3, 2), ValueError),
        (torch.ones(2, 3, 2, dtype=torch.long), TypeError),
    ],
    "warped_labels": [*NO_LABELS, (LABELS[..., :4], ValueError)],
    "fixed_labels": [*NO_LABELS, (LABELS[..., :4], ValueError)],
    "weight": NO_WEIGHT,
    "mask": NO_WEIGHT,
    "reduction": [*NO_WORD, ("sum", ValueError)],
    "mode": NO_WORD,
    "padding": [*NO_WORD, ("reflection", ValueError)],
    "split": NO_WORD,
    "rotation": [*NO_TENSOR, (torch.zeros(2, 3), ValueError), (torch.zeros(2), ValueError)],
    "translation": [
        *NO_TENSOR,
        (torch.zeros(2), ValueError),
        (torch.zeros(0, 2), ValueError),
        (torch.zeros(2, 4), ValueError),
        (torch.zeros(2, 2, dtype=torch.long), TypeError),
    ],
    "centre": [*NO_TENSOR, (torch.zeros(2), ValueError), (torch.zeros(3, 2), ValueError)],
    "log_scales": [*NO_TENSOR, (torch.zeros(2, 1), ValueError), (torch.zeros(1, 2), ValueError)],
    "shears": [*NO_TENSOR, (torch.zeros(2, 3), ValueError)],
    "matrix": NO_MATRIX,
    "affine": NO_AFFINE,
    "fixed_affine": NO_AFFINE,
    "moving_affine": NO_AFFINE,
    "warped_points": NO_POINTS,
    "moving_points": [*NO_POINTS, (torch.rand(2, 3, 2), ValueError)],
    "iterations": NO_COUNT,
    "tolerance": NO_SIZE,
    "data_range": NO_SIZE,
    "steps": NO_COUNT,
    "factor": NO_COUNT,
    "radius": NO_COUNT,
    "dilation": NO_COUNT,
    "bins": [*NO_COUNT, (3, ValueError)],
    "warped_range": NO_RANGE,
    "fixed_range": NO_RANGE,
    "lattice": [*NO_FIELD, (torch.rand(2, 2, 5, 5), ValueError)],
    "stride": [*NO_COUNT, (None, TypeError), ((2, 2, 2), ValueError), ((2, 0), ValueError)],
    "levels": NO_COUNT,
    "batch_size": NO_COUNT,
    "window": [*NO_COUNT, (4, ValueError)],
    "shape": NO_SHAPE,
    "spacing": NO_SPACING,
    "smoothing": NO_SIZE,
    "seconds": NO_SIZE,
    "lr": NO_SIZE,
    "truncate": NO_SIZE[1:],
    "sigma": NO_SIZE[1:],
}
#: The same argument name with another meaning.
BAD_OF = {
    (grid.sample, "coords"): NO_FIELD + OTHER_BATCH,
    (grid.voxel_to_unit, "coords"): [*NO_TENSOR, (torch.rand(2, 3, 6, 5), ValueError)],
    (grid.unit_to_voxel, "coords"): [*NO_TENSOR, (torch.rand(2), ValueError)],
    (sampling.warp, "field"): NO_FIELD + OTHER_BATCH,
    (sampling.warp_labels, "field"): NO_FIELD + OTHER_BATCH,
    (sampling.warp_labels, "labels"): NO_LABELS,
    (fields.invert_points, "moving_points"): NO_POINTS,
    (sampling.warp_points, "field"): NO_FIELD + OTHER_BATCH[:1],
    (smoothing.gaussian_smooth, "sigma"): [
        (-1.0, ValueError),
        ((1.0,), ValueError),
        ((1.0, -1.0), ValueError),
        ("ab", TypeError),
        (None, TypeError),
    ],
    (similarity.lncc, "sigma"): NO_SIZE,
    (similarity.dssim, "sigma"): NO_SIZE,
    (metrics.dice, "labels"): NO_VALUES,
    (surface.hd95, "labels"): NO_VALUES,
    (surface.assd, "labels"): NO_VALUES,
    (metrics.ssim, "sigma"): NO_SIZE,
    (metrics.ssim, "window"): [*NO_COUNT, (4, ValueError), (7, ValueError)],
    (evaluation.evaluate, "labels"): [(LABELS, TypeError), ((LABELS,), TypeError)],
    (evaluation.evaluate, "points"): [(POINTS, TypeError), ((POINTS,), TypeError)],
    (evaluation.evaluate, "images"): [(IMAGE, TypeError), ((IMAGE,), TypeError)],
    (evaluation.evaluate, "field"): NO_FIELD[1:],
    (procrustes.fit_affine, "fixed_points"): NO_POINTS,
    (procrustes.fit_rigid, "fixed_points"): NO_POINTS,
    (metrics.nda, "field"): [*NO_FIELD, (VOLUME_FIELD, ValueError)],
    (metrics.ndv, "field"): [*NO_TENSOR, *NO_BATCH, (FIELD, ValueError)],
    (metrics.ndv, "mask"): [(torch.ones(2, 1, 5, 4, 3), ValueError)],
    (same_label_pairs, "labels"): [
        (None, TypeError),
        ([0, 0, 1, 1], TypeError),
        (torch.tensor([0, 0, 1]), ValueError),
        (torch.tensor([0, 0, 1, 2]), ValueError),
        (torch.tensor([0.5, 0.5, 1, 1]), TypeError),
    ],
    (fit, "pairs"): [([], ValueError), (iter(()), ValueError)],
    (fit, "objective"): [
        (lambda out, m, f: {"loss": out.mean()}, ValueError),
        (lambda out, m, f: {"seconds": out.mean()}, ValueError),
    ],
}
for _function, _bad in SHAPE_OF.items():
    BAD_OF[_function, "shape"] = NO_SHAPE + _bad

CASES = [
    pytest.param(function, name, value, error, id=f"{function.__name__}-{name}-{i}")
    for function, arguments in VALID.items()
    for name in arguments
    for i, (value, error) in enumerate(BAD_OF.get((function, name), BAD.get(name, [])))
]


@pytest.mark.parametrize("function", VALID, ids=lambda f: f.__name__)
def test_the_call_that_the_others_spoil_is_good(function):
    function(**VALID[function])


@pytest.mark.parametrize(("function", "name", "value", "error"), CASES)
def test_bad_input_is_named(function, name, value, error):
    with pytest.raises(error, match=rf"(^|, ){name}[:,] .*wanted .*got "):
        function(**VALID[function] | {name: value})


def test_no_public_function_is_missing_from_the_table():
    modules = [grid, sampling, fields, derivatives, smoothing, affine, bspline, procrustes]
    modules += [similarity, mind, regularity, metrics, surface, evaluation]
    # Shared between rooms of the library; their callers have checked.
    internal = {"check_window", "gaussian_sum", "prepare_pair", "reduce_batch"}
    internal |= {"cubic_weights", "quadratic_weights"}
    internal |= {"about", "no_autocast", "raise_precision"}
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert function in VALID or name in internal, f"{module.__name__}.{name}"


def test_messages_say_what_came_and_what_was_wanted():
    with pytest.raises(ValueError, match=r"got a float32 tensor of shape \(6, 5\)$"):
        sampling.warp(torch.rand(6, 5), FIELD)
    with pytest.raises(TypeError, match=r"got ndarray of float64 and shape \(2, 1, 6, 5\)$"):
        sampling.warp(np.ones((2, 1, 6, 5)), FIELD)
    with pytest.raises(ValueError, match=r"^image, field: .* \(3, 1, 6, 5\) and \(2, 2, 6, 5\)$"):
        sampling.warp(torch.rand(3, 1, 6, 5), FIELD)
    with pytest.raises(ValueError, match=r"^padding: wanted one of 'border', 'zeros', got 'edge'$"):
        sampling.warp(IMAGE, FIELD, padding="edge")
    with pytest.raises(ValueError, match=r"^x: wanted finite values, got 2 NaN or infinite of 3$"):
        check_finite(torch.tensor([1.0, torch.nan, torch.inf]), "x")


def test_integers_of_numpy_are_integers():
    assert smoothing.pool(IMAGE, np.int64(2)).shape == (2, 1, 3, 3)
    assert grid.identity_grid((np.int64(3), 4)).shape == (1, 2, 3, 4)


@given(st.lists(st.integers(0, 3), min_size=0, max_size=7))
def test_images_have_two_or_three_spatial_axes_and_no_empty_one(shape):
    image = torch.zeros(shape)
    if len(shape) in (4, 5) and all(shape):
        check_image(image, "image")
    else:
        with pytest.raises(ValueError, match=r"^image: wanted .* got a float32 tensor"):
            check_image(image, "image")
