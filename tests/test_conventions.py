"""One test per rule of the conventions page, by its number."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK as sitk
import torch

import reglib
from reglib.data import nifti
from reglib.data.datasets import same_label_pairs
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
from reglib.objectives import metrics, mind, regularity, similarity, surface

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(5, 8), (4, 7, 6)]
SOURCES = sorted(Path(reglib.__file__).parent.rglob("*.py"))


def inputs(batch, shape, dtype=torch.float64, device="cpu"):
    """Random images, fields, labels, points and weights; every sample of the batch differs."""
    generator = torch.Generator().manual_seed(0)
    d = len(shape)

    def rand(channels, *size):
        x = torch.rand(4, channels, *size, generator=generator, dtype=torch.float64)
        return x[:batch].to(device, dtype)

    return SimpleNamespace(
        moving=rand(2, *shape),
        fixed=rand(2, *shape),
        a=4 * rand(d, *shape) - 2,
        b=4 * rand(d, *shape) - 2,
        labels=(3 * rand(1, *shape)).floor().long(),
        other_labels=(3 * rand(1, *shape)).floor().long(),
        points=4 * rand(5, d),
        weight=rand(1, *shape),
        rotation=rand(d * (d - 1) // 2),
        shift=rand(d),
        shape=shape,
    )


def rigid(x):
    return affine.rigid_matrix(x.rotation, x.shift, centre=torch.ones_like(x.shift))


def stretched(x):
    """An affine matrix, with the same numbers for several parameters."""
    log_scales, centre = x.shift / 2, torch.ones_like(x.shift)
    return affine.affine_matrix(
        x.rotation, x.shift, log_scales=log_scales, shears=x.rotation, centre=centre
    )


def slanted(d):
    """Where the voxels of an image are: unequal spacing and a shear."""
    grid_affine = torch.diag(torch.tensor([0.5, 2.0, 1.5][:d] + [1.0]))
    grid_affine[0, 1], grid_affine[0, d] = 0.3, 7.0
    return grid_affine


def turned_grid(d):
    """A grid of half the spacing, with the axes of the identity swapped and turned over."""
    grid_affine = torch.zeros(d + 1, d + 1)
    grid_affine[:d, :d] = torch.diag(torch.tensor([0.5, -0.5, 0.5][:d])).roll(1, 0)
    grid_affine[d, d] = 1.0
    return grid_affine


def lattice(x):
    """Control points two voxels apart, of every component of ``a``."""
    points = bspline.lattice_shape(x.shape, 2)
    return torch.nn.functional.pad(x.a, (1, 2) * len(x.shape))[(..., *(slice(n) for n in points))]


def double(shape):
    return [2 * n - 1 for n in shape]


#: Every public function of the core that works on a batch: inputs -> a tensor ``(B, ...)``.
FUNCTIONS = {
    "voxel_to_unit": lambda x: grid.voxel_to_unit(x.a, x.shape),
    "unit_to_voxel": lambda x: grid.unit_to_voxel(x.a, x.shape),
    "sample": lambda x: grid.sample(x.moving, x.a),
    "sample nearest": lambda x: grid.sample(x.moving, x.a, mode="nearest", padding="zeros"),
    "transform_grid": lambda x: sampling.transform_grid(x.a),
    "warp": lambda x: sampling.warp(x.moving, x.a),
    "warp zeros": lambda x: sampling.warp(x.moving, x.a, padding="zeros"),
    "warp_points": lambda x: sampling.warp_points(x.points, x.a),
    "compose": lambda x: fields.compose(x.a, x.b),
    "integrate": lambda x: fields.integrate(x.a),
    "upsample_field": lambda x: fields.upsample_field(x.a, 2, double(x.shape)),
    "downsample_field": lambda x: fields.downsample_field(x.a, 2),
    "resize_field_corners": lambda x: fields.resize_field_corners(x.a, double(x.shape)),
    "carry_field": lambda x: fields.carry_field(
        x.a, torch.eye(len(x.shape) + 1), turned_grid(len(x.shape)), double(x.shape)
    ),
    "gradient": lambda x: derivatives.gradient(x.moving),
    "jacobian": lambda x: derivatives.jacobian(x.a),
    "jacobian_det": lambda x: derivatives.jacobian_det(x.a),
    "digital_determinants": lambda x: derivatives.digital_determinants(x.a),
    "invert": lambda x: fields.invert(x.a / 20, tolerance=1e-12).field,
    "invert_points": lambda x: (
        fields.invert_points(
            x.points, x.a / 20, tolerance=1e-12 if x.a.dtype == torch.float64 else 1e-4
        ).fixed_points
    ),
    "inverse_consistency": lambda x: fields.inverse_consistency(x.a, x.b),
    "rigid_matrix": rigid,
    "affine_matrix": stretched,
    "affine_parameters": lambda x: torch.cat(
        affine.affine_parameters(stretched(x), centre=x.shift), 1
    ),
    "transform_points": lambda x: affine.transform_points(x.points, rigid(x)),
    "affine_field": lambda x: affine.affine_field(
        rigid(x), slanted(len(x.shape)), torch.eye(len(x.shape) + 1), x.shape
    ),
    "whole_field": lambda x: affine.whole_field(
        rigid(x), x.a, slanted(len(x.shape)), torch.eye(len(x.shape) + 1)
    ),
    "fit_affine": lambda x: procrustes.fit_affine(x.points, x.points.flip(1)).matrix,
    "fit_rigid": lambda x: procrustes.fit_rigid(x.points, x.points.roll(1, 1), scale=True).matrix,
    "bspline_field": lambda x: bspline.bspline_field(lattice(x), x.shape, 2),
    "bspline_field factor": lambda x: bspline.bspline_field(lattice(x), x.shape, 2, factor=2),
    "refine_lattice": lambda x: bspline.refine_lattice(lattice(x), x.shape, 2),
    "box_sum": lambda x: smoothing.box_sum(x.moving, 3),
    "gaussian_smooth": lambda x: smoothing.gaussian_smooth(x.moving, 1.5),
    "pool": lambda x: smoothing.pool(x.moving, 2),
    "pyramid": lambda x: smoothing.pyramid(x.moving, 2)[1],
    "mae": lambda x: similarity.mae(x.moving, x.fixed, weight=x.weight, reduction="none"),
    "mse": lambda x: similarity.mse(x.moving, x.fixed, weight=x.weight, reduction="none"),
    "ncc": lambda x: similarity.ncc(x.moving, x.fixed, weight=x.weight, reduction="none"),
    "lncc": lambda x: similarity.lncc(x.moving, x.fixed, weight=x.weight, reduction="none"),
    "lncc Gaussian": lambda x: similarity.lncc(x.moving, x.fixed, sigma=2.0, reduction="none"),
    "mutual_information": lambda x: similarity.mutual_information(
        x.moving, x.fixed, bins=8, weight=x.weight, reduction="none"
    ),
    "mind": lambda x: mind.mind(x.moving, x.fixed, weight=x.weight, reduction="none"),
    "mind_features": lambda x: mind.mind_features(x.moving, dilation=1),
    "soft_dice": lambda x: similarity.soft_dice(x.moving, x.fixed, reduction="none"),
    "diffusion": lambda x: regularity.diffusion(x.a, reduction="none"),
    "total_variation": lambda x: regularity.total_variation(x.a, reduction="none"),
    "bending": lambda x: regularity.bending(x.a, reduction="none"),
}
#: Those whose result has a dtype of its own.
REPORTS = {
    "warp_labels": lambda x: sampling.warp_labels(x.labels, x.a),
    "warp_labels linear": lambda x: sampling.warp_labels(x.labels, x.a, mode="linear"),
    "hd95": lambda x: surface.hd95(x.labels, x.other_labels, labels=[0, 1, 2]),
    "assd": lambda x: surface.assd(x.labels, x.other_labels, labels=[0, 1, 2]),
    "tre": lambda x: metrics.tre(x.points, x.points.flip(1)),
    "ssim": lambda x: metrics.ssim(x.moving, x.fixed, data_range=1.0, window=3),
    "jacobian_statistics": lambda x: torch.stack(
        metrics.jacobian_statistics(x.a, mask=x.weight), 1
    ),
    "dice": lambda x: metrics.dice(x.labels, x.other_labels, labels=[0, 1, 2]),
    "affine_share": lambda x: metrics.affine_share(x.a),
    "spectral_centroid": lambda x: metrics.spectral_centroid(x.a),
    "folding": lambda x: metrics.folding(x.a, mask=x.weight),
    "ndv or nda": lambda x: (metrics.nda if len(x.shape) == 2 else metrics.ndv)(x.a),
}


def linear_field(shape, seed=0):
    """A field whose components are affine functions of the voxel, and the voxel coordinates."""
    generator = torch.Generator().manual_seed(seed)
    d = len(shape)
    matrix = 0.4 * torch.rand(d, d, generator=generator, dtype=torch.float64) - 0.2
    offset = torch.rand(d, generator=generator, dtype=torch.float64)
    x = grid.identity_grid(shape, dtype=torch.float64)
    u = torch.einsum("ij,bj...->bi...", matrix, x) + offset.view(1, d, *(1,) * d)
    return u, matrix, offset


def translation(vector, shape, dtype=torch.float64):
    d = len(shape)
    return torch.tensor(vector, dtype=dtype).view(1, d, *(1,) * d).expand(1, d, *shape)


def function_arguments():
    """(file, function name, argument names) of every function of the library."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                spec = node.args
                names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
                yield path.name, getattr(node, "name", "lambda"), names


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*FUNCTIONS, *REPORTS])
def test_rule_1_a_batch_gives_what_its_samples_give_alone(name, shape, batch):
    function = (FUNCTIONS | REPORTS)[name]
    x = inputs(batch, shape)
    together = function(x)
    assert together.shape[0] == batch
    for i in range(batch):
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in vars(x).items()}
        torch.testing.assert_close(
            together[i : i + 1], function(SimpleNamespace(**one)), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES for a in range(len(s))])
def test_rule_2_component_c_belongs_to_array_axis_c(shape, axis):
    x = inputs(1, shape)
    vector = [int(a == axis) for a in range(len(shape))]
    warped = sampling.warp(x.moving, translation(vector, shape))
    inside = shape[axis] - 1
    torch.testing.assert_close(
        warped.narrow(axis + 2, 0, inside), x.moving.narrow(axis + 2, 1, inside)
    )
    index = grid.identity_grid(shape, dtype=torch.float64)
    assert derivatives.gradient(index)[0, axis, axis].eq(1).all()
    assert grid.identity_grid(shape)[(0, axis, *vector)] == 1


def test_rule_2_the_reversal_lives_in_one_file():
    calls = [p.name for p in SOURCES if "grid_sample(" in p.read_text(encoding="utf-8")]
    assert calls == ["grid.py"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_3_vectors_are_in_voxels_of_their_own_grid(shape):
    vector = [2.0, -4.0, 6.0][: len(shape)]
    u = translation(vector, shape)
    half = fields.downsample_field(u, 2)
    torch.testing.assert_close(half, (u / 2)[(..., *(slice(n) for n in half.shape[2:]))])
    # A constant velocity carries every voxel by itself times one unit of time.
    torch.testing.assert_close(fields.integrate(u), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 30), (20, 24, 22)], ids=str)
def test_rule_4_images_are_pulled_back_and_points_travel_from_fixed_to_moving(shape):
    """A blob of the moving image at phi(p) appears in the warped image at p."""
    fixed_point = torch.tensor([[[10.0, 12.0, 11.0][: len(shape)]]], dtype=torch.float64)
    u, _, _ = linear_field(shape)
    moving_point = sampling.warp_points(fixed_point, u)
    x = grid.identity_grid(shape, dtype=torch.float64)

    def blob(centre):
        distance = (x - centre.view(1, -1, *(1,) * len(shape))).square().sum(1, keepdim=True)
        return torch.exp(-distance / 8)

    warped = sampling.warp(blob(moving_point[0, 0]), u)
    assert (moving_point - fixed_point).norm() > 1
    brightest = warped.flatten().argmax()
    expected = blob(fixed_point[0, 0]).flatten().argmax()
    assert brightest == expected
    torch.testing.assert_close(warped.max().item(), 1.0, atol=0.1, rtol=0)


@pytest.mark.parametrize("shape", [(9, 12), (8, 9, 10)], ids=str)
def test_rule_5_compose_is_a_after_b(shape):
    """x -> 1.25 x, then a shift by 1, is not a shift by 1, then x -> 1.25 x."""
    x = grid.identity_grid(shape, dtype=torch.float64)
    shift, scale = torch.ones_like(x), 0.25 * x
    inside = (..., *(slice(0, 5),) * len(shape))
    shift_after_scale = fields.compose(shift, scale)
    scale_after_shift = fields.compose(scale, shift)
    torch.testing.assert_close(shift_after_scale[inside], (1.25 * x + 1 - x)[inside])
    torch.testing.assert_close(scale_after_shift[inside], (1.25 * (x + 1) - x)[inside])


def test_rule_6_moving_comes_before_fixed_and_no_other_words_are_used():
    for file, function, names in function_arguments():
        assert not {"source", "target", "src", "tgt", "template"} & set(names), (file, function)
        first = "moving" if "moving" in names else "warped"
        if {first, "fixed"} <= set(names):
            assert names.index(first) < names.index("fixed"), (file, function)


def test_rule_7_the_outermost_voxel_centres_are_minus_one_and_one():
    shape = (5, 1)
    coords = grid.identity_grid(shape, dtype=torch.float64)
    unit = grid.voxel_to_unit(coords, shape)
    torch.testing.assert_close(
        unit[0, 0, :, 0], torch.tensor([-1, -0.5, 0, 0.5, 1], dtype=torch.float64)
    )
    assert unit[0, 1].eq(0).all()


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 24), (13, 9), (12, 8, 5)], ids=str)
def test_rule_7_pyramid_nodes_and_linear_fields(shape, factor):
    """Node i of a level is the mean position of its cell: s i + (s - 1) / 2."""
    u, matrix, offset = linear_field(shape)
    coarse = fields.downsample_field(u, factor)
    nodes = factor * grid.identity_grid(coarse.shape[2:], dtype=torch.float64) + (factor - 1) / 2
    expected = torch.einsum("ij,bj...->bi...", matrix, nodes)
    expected = (expected + offset.view(1, -1, *(1,) * len(shape))) / factor
    torch.testing.assert_close(coarse, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(fields.upsample_field(coarse, factor, shape), u, rtol=0, atol=1e-5)
    whole = [n - n % factor for n in shape]
    index = grid.identity_grid(whole, dtype=torch.float64)
    pooled = smoothing.pool(index, factor)
    torch.testing.assert_close(pooled, nodes[(..., *(slice(n) for n in pooled.shape[2:]))])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_8_images_clamp_to_the_border_and_masks_are_zero(shape):
    x = inputs(1, shape)
    away = translation([100.0] * len(shape), shape)
    corner = (..., *(slice(-1, None),) * len(shape))
    torch.testing.assert_close(sampling.warp(x.moving, away), x.moving[corner].expand_as(x.moving))
    assert sampling.warp(x.moving, away, padding="zeros").eq(0).all()
    labels = x.labels + 1
    assert sampling.warp_labels(labels, away).eq(0).all()
    assert sampling.warp_labels(labels, away, padding="border").eq(labels[corner]).all()
    # Fields clamp as well: beyond the border, a is its last vector.
    torch.testing.assert_close(fields.compose(x.a, away) - away, x.a[corner].expand_as(x.a))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_9_images_are_interpolated_and_labels_are_not(shape):
    x = inputs(1, shape)
    half = translation([0.5] + [0.0] * (len(shape) - 1), shape)
    n = shape[0] - 1
    mean = (x.moving.narrow(2, 0, n) + x.moving.narrow(2, 1, n)) / 2
    torch.testing.assert_close(sampling.warp(x.moving, half).narrow(2, 0, n), mean)
    labels = 7 * x.labels
    assert set(sampling.warp_labels(labels, x.a).unique().tolist()) <= {0, 7, 14}
    with pytest.raises(TypeError, match="image: wanted a floating-point image"):
        sampling.warp(labels, x.a)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((5, 8), (2.0, 0.5)), ((4, 7, 6), (2.0, 0.5, 4.0))], ids=str
)
def test_rule_10_spacing_is_mm_per_voxel_in_axis_order(shape, spacing):
    mm = grid.identity_grid(shape, dtype=torch.float64) * torch.tensor(spacing).view(
        1, -1, *(1,) * len(shape)
    )
    slopes = derivatives.gradient(mm, spacing=spacing)
    eye = torch.eye(len(shape), dtype=torch.float64).view(1, *2 * (len(shape),), *(1,) * len(shape))
    torch.testing.assert_close(slopes, eye.expand_as(slopes))
    # Component 0 rises by one voxel (spacing[0] mm) per voxel (spacing[1] mm) along axis 1.
    u = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    u[:, 0] = grid.identity_grid(shape, dtype=torch.float64)[:, 1]
    expected = (spacing[0] / spacing[1]) ** 2 / len(shape) ** 2
    torch.testing.assert_close(regularity.diffusion(u, spacing=spacing).item(), expected)


def test_rule_10_fields_on_disk_are_lps_millimetres(tmp_path):
    """One voxel along axis 0 of a grid whose axis 0 points to the left, 3 mm apart."""
    affine = torch.diag(torch.tensor([-3.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    u = torch.zeros(1, 3, 4, 5, 6, dtype=torch.float64)
    u[:, 0] = 1.0
    nifti.write_field(tmp_path / "field.nii.gz", u, affine)
    field = sitk.ReadImage(str(tmp_path / "field.nii.gz"), sitk.sitkVectorFloat64)
    moved = sitk.DisplacementFieldTransform(field).TransformPoint((0.0, 0.0, 0.0))
    assert moved == pytest.approx((3.0, 0.0, 0.0))  # to the left is positive in LPS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_11_rows_of_the_jacobian_are_components_and_columns_axes(shape):
    u, matrix, _ = linear_field(shape)
    jacobian = derivatives.jacobian(u)
    d = len(shape)
    expected = (torch.eye(d) + matrix).view(1, d, d, *(1,) * d)
    torch.testing.assert_close(jacobian, expected.expand_as(jacobian))
    identity = torch.zeros_like(u)
    assert derivatives.jacobian_det(identity).eq(1).all()
    # x -> 0 along axis 0 has det 0 everywhere, which counts as folded.
    flat = identity.clone()
    flat[:, 0] = -grid.identity_grid(shape, dtype=torch.float64)[:, 0]
    assert metrics.folding(flat).item() == 1
    assert metrics.folding(identity).item() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("objective", ["mae", "mse", "ncc", "lncc", "soft_dice"])
def test_rule_12_objectives_are_lower_for_better_and_reduce_over_the_batch(objective, shape):
    function = getattr(similarity, objective)
    x = inputs(3, shape)
    one_hot = (x.moving > 0.5).to(x.moving)
    each = function(one_hot, x.fixed, weight=x.weight, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(function(one_hot, x.fixed, weight=x.weight), each.mean())
    at_best = function(one_hot, one_hot, reduction="none")
    torch.testing.assert_close(at_best, torch.zeros_like(at_best), rtol=0, atol=1e-3)
    assert (each > at_best + 0.1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rule_13_dtype_and_device_follow_the_input(name, shape, dtype, device):
    out = FUNCTIONS[name](inputs(2, shape, dtype, device))
    reference = FUNCTIONS[name](inputs(2, shape))
    assert out.dtype == dtype
    assert out.device.type == device
    # float32 and CUDA against float64 on the CPU. Nearest neighbours have no ties in these inputs.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(out.cpu().double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rule_13_autocast_changes_nothing(name, device):
    x = inputs(1, (5, 200), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = FUNCTIONS[name](x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, FUNCTIONS[name](x), rtol=0, atol=0)


def test_rule_14_the_library_never_seeds_and_generators_decide():
    for path in SOURCES:
        # The command line is a program: it seeds for the time of one command, and restores.
        if "cli" not in path.parts:
            # A generator of one's own is what the rule wants; everybody's is not to be touched.
            text = path.read_text(encoding="utf-8").replace("torch.Generator().manual_seed(", "")
            assert not re.search(r"manual_seed\(|random\.seed\(", text), path.name
    images, labels = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    torch.manual_seed(1)
    before = torch.get_rng_state()

    def first_batch(seed):
        generator = torch.Generator().manual_seed(seed)
        return next(same_label_pairs(images, labels, batch_size=8, generator=generator))

    for a, b in zip(first_batch(5), first_batch(5), strict=True):
        assert a.equal(b)
    assert not first_batch(5)[0].equal(first_batch(6)[0])
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_14_two_runs_give_the_same_bits_on_the_cpu(shape, device):
    def gradients():
        x = inputs(2, shape, torch.float32, device)
        u = x.a.requires_grad_()
        warped = sampling.warp(x.moving, fields.integrate(u))
        loss = similarity.lncc(warped, x.fixed, window=3) + regularity.bending(u)
        return torch.autograd.grad(loss, u)[0]

    # On CUDA the backward pass of grid_sample adds up in any order: single-precision rounding.
    tolerance = 0 if device == "cpu" else 1e-5
    torch.testing.assert_close(gradients(), gradients(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_15_rigid_is_rigid_in_millimetres_and_not_cut_off(shape):
    d = len(shape)
    spacing = torch.tensor([3.0, 1.0, 2.0][:d], dtype=torch.float64)
    image = torch.diag(torch.cat([spacing, torch.ones(1, dtype=torch.float64)]))
    angle = torch.zeros(1, d * (d - 1) // 2, dtype=torch.float64)
    angle[:, -1] = 1.0
    far = torch.full((1, d), 40.0, dtype=torch.float64)
    matrix = affine.rigid_matrix(angle, far, centre=torch.zeros(1, d, dtype=torch.float64))
    field = affine.affine_field(matrix, image, image, shape)
    mm = spacing.view(1, d, *(1,) * d)
    before = (grid.identity_grid(shape, dtype=torch.float64) * mm).flatten(2)[0].T
    after = (sampling.transform_grid(field) * mm).flatten(2)[0].T
    torch.testing.assert_close(torch.pdist(after), torch.pdist(before))
    # Forty millimetres are more than the whole grid: no voxel was held back at the border.
    assert (after - before).norm(dim=1).min() > 20
    voxels = sampling.transform_grid(field).flatten(2)[0].T
    assert not torch.allclose(torch.pdist(voxels), torch.pdist(before) / spacing[0])
