"""GeoReg: its equations against plain forms, and one test for each fault it must not have."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from reglib.data import datasets
from reglib.data.nifti import Image
from reglib.geometry import affine as geometry
from reglib.geometry.fields import upsample_field
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth, pool
from reglib.methods import georeg, neighbours
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import bending
from reglib.objectives.similarity import mse, ncc
from reglib.registration import register
from reglib.training import fit
from reglib.weights import save_weights

SHAPES = {2: (12, 16), 3: (8, 12, 16)}


def small(dimensions: int = 2, **settings: object) -> georeg.GeoReg:
    """A network of three narrow levels with weights large enough to move things."""
    torch.manual_seed(0)
    network = georeg.GeoReg(**{"dimensions": dimensions, "channels": (4, 6, 8)} | settings)
    for name, p in network.named_parameters():
        if name.endswith("head.2.weight"):
            torch.nn.init.normal_(p, std=0.3)
    return network.eval()


def images(dimensions: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 1, *SHAPES[dimensions], generator=generator, dtype=dtype)


def affine_field(shape: tuple[int, ...]) -> Tensor:
    """A random affine displacement, in voxels of a grid of this shape."""
    generator = torch.Generator().manual_seed(1)
    d = len(shape)
    matrix = 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64)
    shift = torch.randn(1, d, *(1,) * d, generator=generator, dtype=torch.float64)
    grid = identity_grid(shape, dtype=torch.float64)
    return torch.einsum("ij,bj...->bi...", matrix, grid) + shift


# --- What comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_stages_have_the_shapes_and_the_order_of_the_decoder(dimensions: int, batch: int) -> None:
    network = small(dimensions, iterations=(1, 2, 3))
    x = images(dimensions, batch)
    output = network(x, x.flip(2))
    order = [(s.level, s.iteration) for s in output.stages]
    assert order == [(2, 1), (2, 2), (2, 3), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]
    for stage in output.stages:
        level_shape = tuple(n // 2**stage.level for n in SHAPES[dimensions])
        assert stage.field.shape == (batch, dimensions, *level_shape)
        full = georeg.to_full_resolution(stage, SHAPES[dimensions])
        assert full.shape == (batch, dimensions, *SHAPES[dimensions])
    assert output.field is output.stages[-1].field
    assert output.stages[3].name == "level 1, interpolated"
    assert output.stages[4].name == "level 1, refined 1"


def test_training_starts_near_the_identity() -> None:
    torch.manual_seed(0)
    x = images(2, 2)
    output = georeg.GeoReg()(x, x.flip(3))
    assert output.field.abs().max() < 0.5  # voxels: the heads start at a hundredth of Xavier


def test_dtype_follows_the_input_and_coordinates_survive_autocast() -> None:
    x = images(2, 2, torch.float64)
    assert small().double()(x, x.flip(2)).field.dtype == torch.float64
    network, x = small(), x.float()
    features, r = georeg.FourierFeatures(2, 8, 0.2), torch.randn(5, 2)
    plain, exact = network(x, x.flip(2)).field, features(r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, rounded = network(x, x.flip(2)).field, features(r)
    assert torch.equal(exact, rounded)
    assert mixed.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x.bfloat16(), x.bfloat16().flip(2)).field.dtype == torch.float32
    # Image features lose their third digit; a point near the middle between two nodes may so
    # look at another neighbourhood, which is why the mean is compared.
    assert (mixed - plain).abs().mean() < 0.03 * plain.abs().mean()


@pytest.mark.parametrize(
    "settings",
    [
        {"neighbourhoods": (0, 3, 3), "iterations": (0, 1, 1)},
        {"interpolation": 0},
        {"interpolation": 3},
        {"neighbourhoods": (2, 2, 4)},
        {"interpolation": 0, "warp_features": True},
    ],
)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_setting_runs_and_trains_every_weight(dimensions: int, settings: dict) -> None:
    network = small(dimensions, **settings)
    moving, fixed = images(dimensions, 2), images(dimensions, 2).flip(2)
    terms = georeg.objective(network(moving, fixed), moving, fixed)
    torch.stack(tuple(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_finest_level_may_be_interpolation_only() -> None:
    network = small(neighbourhoods=(0, 3, 3), iterations=(0, 1, 1))
    x = images(2, 1)
    last = network(x, x.flip(2)).stages[-1]
    assert (last.level, last.iteration) == (0, 0)


# --- The equations ----------------------------------------------------------------------------


def test_attention_equals_keys_and_values_formed_per_neighbour() -> None:
    """Equations 4 to 7 as they stand, with PyTorch's own attention as the oracle."""
    torch.manual_seed(0)
    attention = georeg.NeighbourAttention(2, 8, 0.2).double()
    points, neighbours = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 9, 8).double()
    relative = torch.randn(2, 5, 9, 2).double()
    inside = torch.rand(2, 5, 9) > 0.3
    inside[..., 4] = True
    x = neighbours + attention.position(relative)
    expected = F.scaled_dot_product_attention(
        attention.query(points).unsqueeze(-2),
        attention.key(x),
        attention.value(x),
        attn_mask=inside.unsqueeze(-2),
    ).squeeze(-2)
    weights, values = attention.plain(points, neighbours, relative, inside)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5).double())


def plain_attention(
    attention: georeg.NeighbourAttention, f: Tensor, neighbours: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Equations 4 to 7 for one point, written out: its feature, then (feature, r) of each other."""
    x = [g + attention.position(r) for g, r in neighbours]
    q = attention.query(f)
    logits = torch.stack([q @ attention.key(x_j) / math.sqrt(len(f)) for x_j in x])
    value = sum(a * attention.value(x_j) for a, x_j in zip(logits.softmax(0), x, strict=True))
    h = attention.norm_attention(f + value)
    return attention.head(attention.norm_mix(h + attention.mix(h)))


def nodes_around(place: Tensor, size: int, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The nodes inside the grid among the ``size`` nearest along each axis (even: the cell)."""
    axes = []
    for c, n in zip(place.tolist(), shape, strict=True):
        start = min(max(round(c), 0), n - 1) if size % 2 else min(max(math.floor(c), 0), n - 2)
        first = start - (size - 1) // 2
        axes.append([k for k in range(first, first + size) if 0 <= k < n])
    return itertools.product(*axes)


def spread_heads(module: torch.nn.Module) -> None:
    """Random weights of a size at which every term of the attention shows."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("size", "warp_features"), [(2, False), (3, False), (3, True)])
def test_refinement_equals_a_plain_loop(dimensions: int, size: int, warp_features: bool) -> None:
    torch.manual_seed(0)
    shape = (4, 5, 3)[:dimensions]
    tau = georeg.Refinement(dimensions, 4, size, 0.2, warp_features=warp_features).double()
    spread_heads(tau)
    moving, fixed = torch.randn(2, 2, 4, *shape).double()
    field = 1.5 * torch.randn(2, dimensions, *shape).double()
    field[0, :, 0] -= 6.0  # these points have left the image
    got = tau(moving, fixed, field)
    for b, x in itertools.product(range(2), itertools.product(*map(range, shape))):
        here = (b, slice(None), *x)
        phi = torch.tensor(x).double() + field[here]
        if warp_features:
            offsets = [
                torch.tensor(o).double() for o in itertools.product((-1, 0, 1), repeat=dimensions)
            ]
            image = moving[b].numpy()
            neighbours = []
            for o in offsets:
                at = (phi + o).numpy()[:, None]
                feature = [
                    ndimage.map_coordinates(c, at, order=1, mode="nearest")[0] for c in image
                ]
                neighbours.append((torch.tensor(feature), o))
        else:
            neighbours = [
                (moving[(b, slice(None), *n)], (torch.tensor(n) - phi).clamp(-size, size))
                for n in nodes_around(phi, size, shape)
            ]
        step = plain_attention(tau.attention, fixed[here], neighbours)
        torch.testing.assert_close(got[here], field[here] + step, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("size", [2, 3])
def test_interpolation_equals_a_plain_loop(dimensions: int, size: int) -> None:
    """Also fault 5: relative positions are neighbour minus point in tau and in delta alike."""
    torch.manual_seed(0)
    coarse, fine = (2, 3, 2)[:dimensions], (4, 6, 4)[:dimensions]
    delta = georeg.Interpolation(dimensions, 6, 4, size, 0.2).double()
    spread_heads(delta)
    children, parents = torch.randn(2, 4, *fine).double(), torch.randn(2, 6, *coarse).double()
    field = torch.randn(2, dimensions, *coarse).double()
    got = delta(children, parents, field)
    axes = [range(n) for n in coarse]
    for b, i in itertools.product(range(2), itertools.product(*map(range, fine))):
        here = (b, slice(None), *i)
        place = (torch.tensor(i).double() - 0.5) / 2
        linear = [
            RegularGridInterpolator(axes, u.numpy(), bounds_error=False, fill_value=None)(place)[0]
            for u in field[b]
        ]
        inherited = torch.tensor(linear)  # in voxels of the coarse level
        neighbours = [
            (
                delta.match(parents[(b, slice(None), *n)]),
                torch.tensor(n) + field[(b, slice(None), *n)] - (place + inherited),
            )
            for n in nodes_around(place, size, coarse)
        ]
        step = plain_attention(delta.attention, children[here], neighbours)
        torch.testing.assert_close(got[here], 2 * inherited + step, atol=1e-9, rtol=1e-9)


def test_fourier_features_are_sines_and_cosines_of_relative_position() -> None:
    features = georeg.FourierFeatures(3, 6, 0.5)
    r = torch.randn(4, 3)
    expected = [
        trig(2 * math.pi * sum(float(r[n, a] * features.frequencies[a, c]) for a in range(3)))
        for n in range(4)
        for trig in (math.sin, math.cos)
        for c in range(3)
    ]
    torch.testing.assert_close(features(r).flatten(), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("conv", [F.conv2d, F.conv3d])
def test_convolution_of_a_concatenation_is_a_sum_of_convolutions(conv) -> None:
    """Appendix 6: why the two images may be looked at by separate operations."""
    d = 2 if conv is F.conv2d else 3
    a, b = torch.randn(2, 3, *(6,) * d).double(), torch.randn(2, 4, *(6,) * d).double()
    weight = torch.randn(5, 7, *(3,) * d).double()
    together = conv(torch.cat([a, b], 1), weight)
    apart = conv(a, weight[:, :3]) + conv(b, weight[:, 3:])
    torch.testing.assert_close(together, apart)


def test_objective_sums_similarity_and_regularity_over_every_stage() -> None:
    network, moving, fixed = small(), images(2, 2), images(2, 2).flip(3)
    output = network(moving, fixed)
    weights = (1.0, 0.5, 0.25)
    terms = georeg.objective(output, moving, fixed, regularity_weight=weights)
    similarity = regularity = 0.0
    for level, _, field in output.stages:
        m, f = (pool(x, 2**level) for x in (moving, fixed))
        similarity += ncc(warp(m, field), f).item()
        regularity += weights[level] * bending(field).item()
    assert terms["similarity"].item() == pytest.approx(similarity, rel=1e-5)
    assert terms["regularity"].item() == pytest.approx(regularity, rel=1e-5)
    halved = georeg.objective(output, moving, fixed, level_weight=0.5, regularity_weight=weights)
    for name, value in terms.items():
        assert halved[name].item() == pytest.approx(value.item() / 2)
    last = georeg.objective(output, moving, fixed, deep_supervision=False)
    final = ncc(warp(moving, output.field), fixed)
    assert last["similarity"].item() == pytest.approx(final.item())


# --- Faults of the released code, each beside its faulty form -----------------------------------


def check_padding_is_ignored(weights: Tensor, inside: Tensor) -> None:
    assert (weights[~inside] == 0).all()


def test_neighbours_beyond_the_border_get_no_attention() -> None:
    """Fault 1: a 0/1 float mask is added to the logits and removes nothing."""
    attention = georeg.NeighbourAttention(2, 4, 0.2)
    points, neighbours = torch.randn(1, 3, 4), torch.randn(1, 3, 9, 4)
    relative, inside = torch.randn(1, 3, 9, 2), torch.rand(1, 3, 9) > 0.5
    inside[..., 0] = True
    weights, values = attention.plain(points, neighbours, relative, inside)
    check_padding_is_ignored(weights, inside)
    garbage = neighbours.masked_fill(~inside.unsqueeze(-1), 1e6)
    torch.testing.assert_close(attention.plain(points, garbage, relative, inside)[1], values)

    x = neighbours + attention.position(relative)
    logits = (attention.query(points).unsqueeze(-2) * attention.key(x)).sum(-1) / 2
    faulty = (logits + (~inside).float()).softmax(-1)
    with pytest.raises(AssertionError):
        check_padding_is_ignored(faulty, inside)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_reach_the_neighbours(dimensions: int) -> None:
    """Fault 2: a position encoding under no_grad cuts keys and values off from the encoder."""
    attention = georeg.NeighbourAttention(dimensions, 4, 0.2)
    points, inside = torch.randn(1, 3, 4), torch.ones(1, 3, 5, dtype=torch.bool)

    def check(cut: Callable[[Tensor], Tensor]) -> None:
        neighbours = torch.randn(1, 3, 5, 4, requires_grad=True)
        relative = torch.randn(1, 3, 5, dimensions, requires_grad=True)
        _, attended = attention.plain(points, cut(neighbours), cut(relative), inside)
        attention.move(points, attended).sum().backward()
        for tensor in (neighbours, relative):
            assert tensor.grad is not None
            assert (tensor.grad.abs().amax((0, 1, 3)) > 0).all()

    check(lambda x: x)
    with pytest.raises(AssertionError):
        check(torch.Tensor.detach)  # what no_grad around the sum of the two amounts to


@pytest.mark.parametrize("dimensions", [2, 3])
def test_interpolation_inherits_affine_fields_exactly_up_to_the_border(dimensions: int) -> None:
    """Fault 3: coordinates interpolated with border clamping collapse at the border."""
    delta = georeg.Interpolation(dimensions, 6, 4, 2, 0.2).double()
    torch.nn.init.zeros_(delta.attention.head[2].weight)
    fine = affine_field(SHAPES[dimensions])
    coarse_shape = tuple(n // 2 for n in SHAPES[dimensions])
    coarse = pool(fine, 2) / 2  # exact: the mean of an affine function is its value at the node
    children = torch.randn(1, 4, *SHAPES[dimensions]).double()
    parents = torch.randn(1, 6, *coarse_shape).double()
    torch.testing.assert_close(delta(children, parents, coarse), fine, atol=1e-10, rtol=0)

    mode = "bilinear" if dimensions == 2 else "trilinear"
    place = identity_grid(coarse_shape, dtype=torch.float64) * 2 + 0.5 + 2 * coarse
    faulty = F.interpolate(place, scale_factor=2, mode=mode, align_corners=False)
    faulty = faulty - identity_grid(SHAPES[dimensions], dtype=torch.float64)
    assert (faulty - fine).abs().max() > 0.1


def check_nearest(nodes: Tensor, centre: Tensor) -> None:
    """No grid node left out is nearer than one taken, along one axis of inner points."""
    for taken, c in zip(nodes.tolist(), centre.tolist(), strict=True):
        others = set(range(-5, 50)) - {int(n) for n in taken}
        assert max(abs(n - c) for n in taken) <= min(abs(n - c) for n in others)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_neighbourhood_holds_the_nearest_nodes(size: int, dimensions: int) -> None:
    """Fault 4: even sizes took the parent and the next node for both children of a parent."""
    shape = SHAPES[dimensions]
    rest = torch.arange(2 * shape[0], dtype=torch.float32)
    child = (rest - 0.5) / 2  # children of a level pooled by 2
    centre = child.view(1, -1, 1).expand(1, -1, dimensions)
    nodes, index, inside = neighbours.neighbourhood(centre, size, shape)
    assert nodes.shape == (1, len(child), size**dimensions, dimensions)
    along = nodes[0].view(len(child), size, -1, dimensions)[:, :, 0, 0]
    inner = slice(2, -2)  # one or two nodes from the border
    check_nearest(along[inner], child[inner])
    # At both borders as many nodes lie inside: the rule is symmetric.
    valid = ((along >= 0) & (along < shape[0])).sum(1)
    assert valid[0] == valid[-1]
    every = torch.arange(math.prod(shape)).view(shape)
    for p, k in itertools.product(range(len(child)), range(size**dimensions)):
        node = tuple(int(n) for n in nodes[0, p, k])
        valid = all(0 <= n < m for n, m in zip(node, shape, strict=True))
        assert bool(inside[0, p, k]) == valid
        assert int(index[0, p, k]) == (int(every[node]) if valid else 0)

    faulty = torch.stack([(rest / 2).floor(), (rest / 2).floor() + 1], 1)
    with pytest.raises(AssertionError):
        check_nearest(faulty[inner], child[inner])


def test_points_that_left_the_image_see_its_border() -> None:
    centre = torch.tensor([[[-50.0, 3.2], [99.0, -7.0]]])
    nodes, _, inside = neighbours.neighbourhood(centre, 3, (12, 16))
    assert inside.any(-1).all()
    assert nodes[0, 0].mean(0).tolist() == [0.0, 3.0]
    assert nodes[0, 1].mean(0).tolist() == [11.0, 0.0]


def test_queries_are_fixed_and_neighbours_are_moving_features_around_phi() -> None:
    """Fault 10: the field's point x must look at the moving image around phi(x), not around x."""
    tau = georeg.Refinement(2, 4, 3, 0.2)
    torch.nn.init.normal_(tau.attention.head[2].weight)
    field = torch.zeros(1, 2, 12, 16)
    field[:, 0], field[:, 1] = 2.0, -5.0

    def check(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        fixed = torch.randn(1, 4, 12, 16, requires_grad=True)
        moving = torch.randn(1, 4, 12, 16, requires_grad=True)
        (form(moving, fixed, field) - field)[0, :, 4, 9].sum().backward()
        assert moving.grad is not None
        assert fixed.grad is not None
        seen = torch.nonzero(moving.grad.abs().sum((0, 1)))
        assert seen.amin(0).tolist() == [4 + 2 - 1, 9 - 5 - 1]
        assert seen.amax(0).tolist() == [4 + 2 + 1, 9 - 5 + 1]
        assert torch.nonzero(fixed.grad.abs().sum((0, 1))).tolist() == [[4, 9]]

    check(tau)
    with pytest.raises(AssertionError):
        check(lambda moving, fixed, field: tau(fixed, moving, field))


def test_only_displacements_travel_between_levels() -> None:
    """The finest step depends on coarser levels through the inherited field alone."""
    network = small(iterations=(1, 1, 1))
    x = images(2, 1)
    output = network(x, x.flip(2))
    features = [level.chunk(2) for level in network.encoder(torch.cat([x, x.flip(2)]))]
    (fine_moving, fine_fixed), (_, coarse_fixed) = features[:2]
    inherited = network.interpolations[0](fine_fixed, coarse_fixed, output.stages[-3].field)
    torch.testing.assert_close(inherited, output.stages[-2].field)
    again = network.refinements[0](fine_moving, fine_fixed, inherited)
    torch.testing.assert_close(again, output.field)


# --- What it does -----------------------------------------------------------------------------


def test_shifting_both_images_by_a_coarse_cell_shifts_the_field() -> None:
    network = small(channels=(4, 6), neighbourhoods=(3, 3), iterations=(1, 1))
    canvas = torch.zeros(2, 1, 40, 40)
    canvas[:, :, 14:22, 14:22] = images(2, 2)[:, :, :8, :8]
    moving, fixed = canvas[:1], canvas[1:]
    shifted = network(moving.roll(2, 3), fixed.roll(2, 3)).field
    inside = slice(12, 28)  # farther from the border than the receptive field
    torch.testing.assert_close(
        shifted[..., inside, inside],
        network(moving, fixed).field.roll(2, 3)[..., inside, inside],
        atol=1e-5,
        rtol=1e-5,
    )


def test_optimising_on_a_pair_recovers_a_translation_and_a_control_does_not() -> None:
    generator = torch.Generator().manual_seed(0)

    def texture() -> Tensor:
        x = gaussian_smooth(torch.rand(2, 1, 24, 24, generator=generator), 2.0)
        return (x - x.mean()) / x.std()

    # fixed(x) = moving(x + shift), so the field is the shift itself.
    related, unrelated = texture(), texture()
    shift = torch.tensor([[2.0, -1.5], [-1.0, 2.5]]).view(2, 2, 1, 1)
    fixed = warp(related, shift.expand(-1, -1, 24, 24))
    objective = functools.partial(georeg.objective, regularity_weight=10.0)

    def error(moving: Tensor) -> float:
        torch.manual_seed(0)
        network = georeg.GeoReg(channels=(8, 16, 16), iterations=(1, 1, 2))
        pairs = itertools.repeat((moving, fixed))
        fit(network, pairs, objective, steps=80, lr=2e-3, progress=False)
        with torch.no_grad():
            field = network(moving, fixed).field
        return float((field - shift)[..., 5:-5, 5:-5].norm(dim=1).mean())

    # The shifts are 2.6 voxels long; 0.1 is left where the border hides what came in.
    assert error(related) < 0.3
    assert error(unrelated) > 2.0


def test_pretrained_weights_register_unseen_digits() -> None:
    network = georeg.load_pretrained()
    assert network.card["settings"] == network.settings
    test_images, digits = datasets.mnist("test")
    generator = torch.Generator().manual_seed(0)
    moving, fixed = next(
        datasets.same_label_pairs(test_images, digits, batch_size=100, generator=generator)
    )
    with torch.no_grad():
        field = network(moving, fixed).field
        of_itself = network(fixed, fixed).field
    before, after = float(mse(moving, fixed)), float(mse(warp(moving, field), fixed))
    assert after < 0.35 * before
    assert float(folding(field).mean()) < 0.01
    # A digit registered to itself stays where it is, in comparison.
    assert of_itself.norm(dim=1).mean() < 0.35 * field.norm(dim=1).mean()


def test_no_weights_of_an_unknown_name() -> None:
    wanted = "'mnist', 'brain_slices', 'brain_volumes'"
    with pytest.raises(ValueError, match=f"name: wanted one of {wanted}, got 'faces'"):
        georeg.load_pretrained("faces")


def turned(image: Image, degrees: list[float], shift: list[float]) -> tuple[Image, torch.Tensor]:
    """An image turned about the middle of its grid and shifted by voxels, and the true field."""
    shape, d = image.tensor.shape[2:], len(shift)
    grid = torch.eye(d + 1, dtype=torch.float64)
    matrix = geometry.affine_matrix(
        torch.deg2rad(torch.tensor([degrees])),
        torch.tensor([shift]),
        log_scales=torch.zeros(1, d),
        shears=torch.zeros(1, len(degrees)),
        centre=geometry.grid_centre(grid, shape).float(),
    )
    truth = geometry.affine_field(matrix, grid, grid, shape).float()
    return Image(warp(image.tensor, truth, padding="zeros"), image.affine), truth


def distance(field: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor) -> float:
    """Mean over the voxels inside, in voxels."""
    return float((field - truth).norm(dim=1, keepdim=True)[inside].mean())


@pytest.mark.parametrize(("degrees", "most_folding"), [(20, 0), (-20, 0), (30, 0.005)])
def test_pretrained_weights_turn_a_brain_they_have_never_seen_back(
    degrees: float, most_folding: float
) -> None:
    """A slice of Colin27 of 1 mm, turned and shifted by 20 mm, so that the truth is known.

    Of the displacement a sixth may stay; of subjects of IXI it is a tenth, more is for another
    scanner. It is most where training ended, at 45 degrees.
    """
    image = datasets.colin27(dimensions=2).image
    fixed, truth = turned(image, [degrees], [12.0, -16.0])
    found = register(image, fixed, georeg.load_pretrained("brain_slices"))
    inside = fixed.tensor > 0.1
    before, after = (distance(u, truth, inside) for u in (0 * truth, found.field))
    assert before > 20
    assert after < before / 6
    assert float(folding(found.field, mask=inside.float())) <= most_folding


def test_pretrained_weights_turn_a_whole_brain_they_have_never_seen_back() -> None:
    """All of Colin27, turned about each axis and shifted, so that the truth is known.

    Voxels of 2 mm; the network sees 4 mm. Of the displacement a third may stay. A margin of 60 mm
    on one side changes nothing, as it knows one field of view only.
    """
    image = datasets.colin27().image
    fixed, truth = turned(image, [15.0, -10.0, 20.0], [6.0, -8.0, 4.0])
    found = register(image, fixed, georeg.load_pretrained("brain_volumes"))
    inside = fixed.tensor > 0.05
    before, after = (distance(u, truth, inside) for u in (0 * truth, found.field))
    assert before > 12
    assert after < before / 3
    assert float(folding(found.field, mask=inside.float())) < 0.01
    wide = [Image(F.pad(x.tensor, (0, 30) * 3), x.affine) for x in (image, fixed)]
    again = register(*wide, georeg.load_pretrained("brain_volumes")).field
    inner = (..., *(slice(n) for n in image.tensor.shape[2:]))
    torch.testing.assert_close(again[inner], found.field, rtol=0, atol=1e-3)


# --- Options: spacing, neighbours in the fixed image, the bottleneck, and how it starts -----------

OPTIONS = [
    {"siblings": 3},
    {"siblings": (0, 2, 3)},
    {"bottleneck": True},
    {"normalise": True},
    {"matching": 2.0},
    {"normalise": True, "matching": 2, "interpolation": 0, "warp_features": True},
    {"siblings": 3, "bottleneck": True, "iterations": (1, 1, 3), "spacing": (1.0, 2.5, 0.7)},
]


def fitting(settings: dict, dimensions: int) -> dict:
    """The settings with a spacing of as many numbers as there are axes."""
    if "spacing" in settings:
        return settings | {"spacing": settings["spacing"][:dimensions]}
    return settings


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("settings", OPTIONS)
def test_options_keep_shapes_start_near_the_identity_and_train_every_weight(
    dimensions: int, settings: dict
) -> None:
    settings = fitting(settings, dimensions)
    torch.manual_seed(0)
    network = georeg.GeoReg(dimensions=dimensions, channels=(4, 6, 8), **settings)
    for batch in (1, 2, 3):
        moving, fixed = images(dimensions, batch), images(dimensions, batch).flip(2)
        output = network(moving, fixed)
        plain = georeg.GeoReg(
            dimensions=dimensions, channels=(4, 6, 8), iterations=network.iterations
        )(moving, fixed)
        for stage, usual in zip(output.stages, plain.stages, strict=True):
            assert stage[:2] == usual[:2]
            assert stage.field.shape == usual.field.shape
        # The heads start at a hundredth of Xavier; 0.7 mm a voxel makes a millimetre 1.4 voxels.
        assert output.field.abs().max() < 0.7
    network = small(dimensions, **settings)
    terms = georeg.objective(network(moving, fixed), moving, fixed)
    torch.stack(tuple(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("settings", [{}, OPTIONS[-1]], ids=["plain", "all options"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_pair_gives_in_a_batch_what_it_gives_alone(dimensions: int, settings: dict) -> None:
    network = small(dimensions, **fitting(settings, dimensions))
    moving, fixed = images(dimensions, 3), images(dimensions, 3).flip(2)
    together = network(moving, fixed).field
    for i in range(3):
        alone = network(moving[i : i + 1], fixed[i : i + 1]).field
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_options_add_to_a_network_and_change_nothing_else_of_it() -> None:
    """Weights and files from before the options existed stay as they were."""
    plain, optional = small(), small(siblings=3)
    assert plain.state_dict().keys() < optional.state_dict().keys()
    new = optional.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in new} == {"siblings"}
    torch.manual_seed(0)
    bare = georeg.GeoReg(channels=(4, 6, 8)).state_dict()
    torch.manual_seed(0)
    more = georeg.GeoReg(channels=(4, 6, 8), siblings=3).state_dict()
    assert all(value.equal(more[name]) for name, value in bare.items())
    options = {"siblings", "bottleneck", "normalise", "matching", "spacing", "checkpointing"}
    assert not plain.settings.keys() & options
    normalised = small(normalise=True, matching=2.0)
    new = normalised.state_dict().keys() - plain.state_dict().keys()
    assert {name.rpartition(".")[0] for name in new} == {f"encoder.norms.{n}" for n in range(3)}


def test_normalised_features_tell_images_apart_at_the_coarsest_of_five_levels() -> None:
    """As a share of what they are; without it they are the same to a thousandth."""
    x = torch.rand(4, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    told = []
    for normalise in (False, True):
        torch.manual_seed(0)
        encoder = georeg.GeoReg(
            channels=(8, 8, 16, 16, 16),
            neighbourhoods=5 * (3,),
            iterations=5 * (1,),
            normalise=normalise,
        ).encoder
        coarsest = encoder(x)[-1].detach()
        told.append(float(coarsest.std(0).mean() / coarsest.abs().mean()))
    assert told[0] < 1e-3
    assert told[1] > 0.1


@pytest.mark.parametrize("dimensions", [2, 3])
def test_matching_starts_with_a_comparison_of_features(dimensions: int) -> None:
    """The node whose feature is the point's own counts most; written out it is a softmax."""
    torch.manual_seed(0)
    attention = georeg.NeighbourAttention(dimensions, 8, 0.2, matching=2.0)
    # Of one length: none is more like another than itself.
    features = 4 * torch.nn.functional.normalize(torch.randn(1, 6, 9, 8), dim=-1)
    points = features[:, :, 4]
    relative, inside = torch.zeros(1, 6, 9, dimensions), torch.ones(1, 6, 9, dtype=torch.bool)
    weights, attended = attention.plain(points, features, relative, inside)
    seen = features + attention.position(relative)
    expected = (2 * (points.unsqueeze(2) * seen).sum(-1) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(attended, (expected.unsqueeze(-1) * seen).sum(2))
    assert torch.equal(weights.argmax(-1), torch.full((1, 6), 4))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("size", [2, 3])
def test_siblings_equal_a_plain_loop(dimensions: int, size: int) -> None:
    torch.manual_seed(0)
    shape, spacing = (4, 5, 3)[:dimensions], torch.tensor([1.0, 3.0, 0.5]).double()[:dimensions]
    module = georeg.Siblings(dimensions, 4, size, 0.2).double()
    spread_heads(module)
    fixed = torch.randn(2, 4, *shape).double()
    got = module(fixed, spacing)
    assert got.shape == fixed.shape
    for b, x in itertools.product(range(2), itertools.product(*map(range, shape))):
        here = torch.tensor(x).double()
        around = [
            (fixed[(b, slice(None), *n)], (torch.tensor(n) - here) * spacing)
            for n in nodes_around(here, size, shape)
        ]
        expected = plain_attention(module.attention, fixed[(b, slice(None), *x)], around)
        torch.testing.assert_close(got[(b, slice(None), *x)], expected, atol=1e-9, rtol=1e-9)


def test_siblings_keep_nothing_of_the_size_of_all_neighbours() -> None:
    """Numbers that autograd stores per point: 27 neighbours of 8 channels would be 216."""
    stored: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    module = georeg.Siblings(3, 8, 3, 0.2)
    fixed = torch.randn(1, 8, 12, 12, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = module(fixed)
    assert out.requires_grad
    # Twelve channels-sized tensors or so: query, what was asked, attended, two norms, MLP.
    assert sum(stored.values()) < 130 * 12**3


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_bottleneck_equals_its_attentions_written_out(dimensions: int) -> None:
    torch.manual_seed(0)
    shape, spacing = (3, 4, 2)[:dimensions], torch.tensor([1.0, 2.0, 0.5]).double()[:dimensions]
    module = georeg.Bottleneck(dimensions, 6, 0.2).double()
    spread_heads(module)
    moving, fixed = torch.randn(2, 2, 6, *shape).double()
    field = torch.randn(2, dimensions, *shape).double()
    got = module(moving, fixed, field, spacing)
    layer = module.decoder

    def attention(part: torch.nn.MultiheadAttention, asking: Tensor, seen: Tensor) -> Tensor:
        w, b = part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w[i], b[i]) for i, x in enumerate((asking, seen, seen)))
        return part.out_proj((q @ k.T / math.sqrt(6)).softmax(-1) @ v)

    places = list(itertools.product(*map(range, shape)))
    middle = (torch.tensor(shape).double() - 1) / 2
    for b in range(2):
        points, nodes = [], []
        for place in places:
            here, at = (b, slice(None), *place), torch.tensor(place).double() - middle
            points.append(fixed[here] + module.position((at + field[here]) * spacing))
            nodes.append(moving[here] + module.position(at * spacing))
        x, seen = torch.stack(points), torch.stack(nodes)
        x = layer.norm1(x + attention(layer.self_attn, x, x))
        x = layer.norm2(x + attention(layer.multihead_attn, x, seen))
        x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
        for place, step in zip(places, module.head(x) / spacing, strict=True):
            here = (b, slice(None), *place)
            torch.testing.assert_close(got[here], field[here] + step, atol=1e-9, rtol=1e-9)


def test_in_the_bottleneck_every_point_sees_the_whole_of_both_images() -> None:
    torch.manual_seed(0)
    seen = {}
    for name, tau in (
        ("all", georeg.Bottleneck(2, 4, 0.2)),
        ("near", georeg.Refinement(2, 4, 3, 0.2)),
    ):
        spread_heads(tau)
        moving, fixed = torch.randn(2, 1, 4, 6, 7).unbind()
        moving.requires_grad_()
        fixed.requires_grad_()
        tau(moving, fixed, torch.zeros(1, 2, 6, 7))[0, :, 1, 5].sum().backward()
        seen[name] = [int((x.grad.abs().sum((0, 1)) > 0).sum()) for x in (moving, fixed)]
    assert seen == {"all": [42, 42], "near": [9, 1]}


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"siblings": 3, "bottleneck": True}])
def test_a_spacing_of_one_is_no_spacing_to_the_last_bit(dimensions: int, settings: dict) -> None:
    network = small(dimensions, **settings)
    x = images(dimensions, 2)
    plain = network(x, x.flip(2))
    told = network(x, x.flip(2), spacing=(1,) * dimensions)
    for a, b in zip(plain.stages, told.stages, strict=True):
        assert a.field.equal(b.field)
    other = network(x, x.flip(2), spacing=(1, 3, 1)[:dimensions])
    assert not other.field.equal(plain.field)


def test_the_spacing_of_the_settings_is_used_where_no_other_is_given(tmp_path) -> None:
    x, path = images(2, 2), tmp_path / "network.safetensors"
    network, told = small(), small(spacing=(1.0, 3.0))
    expected = network(x, x.flip(2), spacing=(1.0, 3.0)).field
    assert told(x, x.flip(2)).field.equal(expected)
    assert told(x, x.flip(2), spacing=(1, 1)).field.equal(network(x, x.flip(2)).field)
    georeg.save(told, path, card={})
    assert georeg.load(path)(x, x.flip(2)).field.equal(expected)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("warp_features", [False, True])
def test_with_a_spacing_positions_and_steps_are_in_millimetres(
    dimensions: int, warp_features: bool
) -> None:
    """Both tau and delta against a plain loop that knows millimetres only; fields stay in voxels.

    What tau sees of the moving image are the same nodes, given to the attention in millimetres.
    """
    torch.manual_seed(0)
    spacing = torch.tensor([1.0, 3.0, 0.5]).double()[:dimensions]
    shape, coarse = (4, 6, 4)[:dimensions], (2, 3, 2)[:dimensions]
    tau = georeg.Refinement(dimensions, 4, 3, 0.2, warp_features=warp_features).double()
    delta = georeg.Interpolation(dimensions, 6, 4, 2, 0.2).double()
    spread_heads(tau)
    spread_heads(delta)
    moving, fixed = torch.randn(2, 1, 4, *shape).double()
    field = torch.randn(1, dimensions, *shape).double()
    got = tau(moving, fixed, field, spacing)
    if not warp_features:
        for x in itertools.product(*map(range, shape)):
            phi = torch.tensor(x).double() + field[(0, slice(None), *x)]
            seen = [
                (
                    moving[(0, slice(None), *n)],
                    # Those that left the image are as far as 3 voxels along each axis.
                    (torch.tensor(n) - phi).clamp(-3, 3) * spacing,
                )
                for n in nodes_around(phi, 3, shape)
            ]
            step = plain_attention(tau.attention, fixed[(0, slice(None), *x)], seen) / spacing
            expected = field[(0, slice(None), *x)] + step
            torch.testing.assert_close(got[(0, slice(None), *x)], expected, atol=1e-9, rtol=1e-9)
    else:
        assert not got.allclose(tau(moving, fixed, field))
    parents, below = torch.randn(1, 6, *coarse).double(), torch.randn(1, dimensions, *coarse)
    below = below.double()
    got, inherited = delta(fixed, parents, below, spacing), upsample_field(below, 2, shape)
    for x in itertools.product(*map(range, shape)):
        here, place = (0, slice(None), *x), (torch.tensor(x).double() - 0.5) / 2
        at = place + inherited[here] / 2
        seen = [
            (
                delta.match(parents[(0, slice(None), *n)]),
                (torch.tensor(n) + below[(0, slice(None), *n)] - at) * spacing,
            )
            for n in nodes_around(place, 2, coarse)
        ]
        step = plain_attention(delta.attention, fixed[here], seen) / spacing
        torch.testing.assert_close(got[here], inherited[here] + step, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"siblings": 3}, {"bottleneck": True}])
def test_the_unit_of_the_spacing_is_that_of_frequencies_and_heads(settings: dict) -> None:
    """Lengths in tenths, cycles per tenth and heads ten times as large: the same field."""
    network = small(**settings).double()
    x = images(2, 2, torch.float64)
    expected = network(x, x.flip(2), spacing=(1.0, 3.0)).field
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("frequencies"):
                value.div_(10)
            if name.endswith("head.2.weight"):
                value.mul_(10)
    found = network(x, x.flip(2), spacing=(10.0, 30.0)).field
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"siblings": 3, "bottleneck": True}])
def test_turning_images_weights_and_spacing_turns_the_field(settings: dict) -> None:
    """Component c of a spacing belongs to axis c: with one of another axis this fails."""
    order, spacing = (2, 0, 1), (1.0, 3.0, 0.6)
    network, turned = small(3, **settings).double(), small(3, **settings).double()
    state = turned.state_dict()
    for name, value in network.state_dict().items():
        if name.endswith("frequencies") or name.endswith("head.2.weight"):
            state[name].copy_(value[list(order)])
        elif value.ndim == 5:
            state[name].copy_(value.permute(0, 1, *(2 + a for a in order)))

    def turn(x: Tensor) -> Tensor:
        return x.permute(0, 1, *(2 + a for a in order))

    x = torch.rand(2, 1, 8, 12, 16, generator=torch.Generator().manual_seed(0)).double()
    field = network(x, x.flip(3), spacing=spacing).field
    found = turned(turn(x), turn(x.flip(3)), spacing=[spacing[a] for a in order]).field
    expected = turn(field)[:, list(order)]
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    wrong = turned(turn(x), turn(x.flip(3)), spacing=spacing).field
    assert (wrong - expected).abs().max() > 1e-3


# --- Less memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("settings", [{}, *OPTIONS[-1:]])
@pytest.mark.parametrize("part", [None, 50])
def test_checkpointing_changes_neither_field_nor_gradients(
    dimensions: int, settings: dict, part: int | None, monkeypatch
) -> None:
    """In float64, where sums in another order differ by 1e-12; also with parts of a few points."""
    if part is not None:
        monkeypatch.setitem(neighbours._PART, "cpu", part)
        monkeypatch.setattr(georeg, "ALONE", 100)
    moving, fixed = images(dimensions, 2, torch.float64), images(dimensions, 2, torch.float64)
    moving, fixed = moving[..., :8], fixed.flip(2)[..., :8]
    fields, gradients = [], []
    for on in (False, True):
        network = small(dimensions, **fitting(settings, dimensions), checkpointing=on).double()
        assert network.checkpointing is on
        output = network(moving, fixed)
        terms = georeg.objective(output, moving, fixed, checkpointing=on)
        torch.stack(tuple(terms.values())).sum().backward()
        fields.append(output.field)
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    torch.testing.assert_close(*fields, atol=1e-11, rtol=1e-11)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_refinement_is_that_of_finite_differences(checkpointing: bool) -> None:
    """In features of both images and the field, away from where the neighbours change."""
    torch.manual_seed(0)
    tau = georeg.Refinement(3, 4, 2, 0.2).double()
    spread_heads(tau)
    tau.attention.checkpointing = checkpointing
    shape = (3, 4, 3)
    leaves = [torch.randn(1, 4, *shape).double().requires_grad_() for _ in range(2)]
    leaves.append((0.3 + 0.2 * torch.rand(1, 3, *shape).double()).requires_grad_())
    spacing = torch.tensor([1.0, 2.0, 0.5]).double()
    assert torch.autograd.gradcheck(lambda *x: tau(*x, spacing), leaves, fast_mode=True)


def test_checkpointing_is_close_in_single_precision_and_off_where_nothing_is_trained() -> None:
    moving, fixed = images(3, 2), images(3, 2).flip(3)
    network, lean = small(3), small(3, checkpointing=True)
    expected = network(moving, fixed).field
    torch.testing.assert_close(lean(moving, fixed).field, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert lean(moving, fixed).field.equal(expected)
    lean.checkpointing = False
    assert lean(moving, fixed).field.equal(expected)


def test_checkpointing_keeps_a_third_or_less() -> None:
    """Bytes that the forward pass and the loss have allocated and not given back."""
    moving, fixed = torch.rand(2, 1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    kept = []
    for on in (False, True):
        network = small(3, checkpointing=on)
        with torch.profiler.profile(profile_memory=True) as seen:
            output = network(moving, fixed)
            terms = georeg.objective(output, moving, fixed, checkpointing=on)
        kept.append(sum(event.self_cpu_memory_usage for event in seen.key_averages()))
        assert terms["similarity"].requires_grad
        del output, terms
    assert 0 < 3 * kept[1] < kept[0]


# --- Bad input, and files -----------------------------------------------------------------------

GOOD = torch.rand(1, 1, 12, 16)


@pytest.mark.parametrize(
    ("moving", "fixed", "error", "words"),
    [
        (GOOD[0], GOOD, ValueError, ["moving", "(1, 12, 16)"]),
        (GOOD, GOOD[..., :8], ValueError, ["moving, fixed", "(1, 1, 12, 8)"]),
        (GOOD, GOOD.expand(2, -1, -1, -1), ValueError, ["moving, fixed"]),
        (GOOD[..., :7], GOOD[..., :7], ValueError, ["moving", "multiples of 4"]),
        (GOOD.expand(-1, 3, -1, -1), GOOD, ValueError, ["moving", "(1, 3, 12, 16)"]),
        (GOOD[..., None].expand(-1, -1, -1, -1, 4), GOOD, ValueError, ["moving", "2 spatial"]),
        (GOOD, GOOD * math.nan, ValueError, ["fixed", "192 NaN"]),
        ((GOOD * 255).byte(), GOOD, TypeError, ["moving", "uint8"]),
        (GOOD.numpy(), GOOD, TypeError, ["moving", "ndarray"]),
        (GOOD.double(), GOOD.double(), TypeError, ["moving", "float32", "float64"]),
        (GOOD, GOOD.half(), TypeError, ["fixed", "float16"]),
        (GOOD[:0], GOOD[:0], ValueError, ["moving", "(0, 1, 12, 16)"]),
    ],
)
def test_bad_images_are_refused_at_the_door(moving, fixed, error, words) -> None:
    with pytest.raises(error) as caught:
        small()(moving, fixed)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"channels": 16}, "channels"),
        ({"neighbourhoods": (3.5, 3, 3)}, "neighbourhoods"),
        ({"interpolation": 2.5}, "interpolation"),
        ({"fourier_scale": math.nan}, "fourier_scale"),
        ({"neighbourhoods": (0, 3, 3), "iterations": (1, 1, 1)}, "iterations"),
        ({"dimensions": 4}, "dimensions"),
        ({"inputs": 0}, "inputs"),
        ({"channels": ()}, "channels"),
        ({"channels": (4, 5, 8)}, "channels"),
        ({"neighbourhoods": (3, 3)}, "neighbourhoods"),
        ({"neighbourhoods": (3, 3, 0)}, "neighbourhoods"),
        ({"iterations": (1, 0, 1)}, "iterations"),
        ({"interpolation": -1}, "interpolation"),
        ({"siblings": 2.5}, "siblings"),
        ({"siblings": (3, 3)}, "siblings"),
        ({"siblings": -1}, "siblings"),
        (
            {"siblings": 3 * (3,), "neighbourhoods": (0, 3, 3), "iterations": (0, 1, 1)},
            "siblings",
        ),
        ({"bottleneck": 1}, "bottleneck"),
        ({"normalise": "instance"}, "normalise"),
        ({"matching": -1.0}, "matching"),
        ({"matching": math.inf}, "matching"),
        ({"matching": "yes"}, "matching"),
        ({"spacing": (1.0,)}, "spacing"),
        ({"spacing": (1.0, 0.0)}, "spacing"),
        ({"spacing": "ab"}, "spacing"),
    ],
)
def test_bad_settings_are_refused(settings: dict, word: str) -> None:
    with pytest.raises((TypeError, ValueError), match=word):
        small(**settings)


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, -1.0), (1.0, math.nan), 2.0, "11"])
def test_a_bad_spacing_is_refused(spacing: object) -> None:
    with pytest.raises((TypeError, ValueError), match="spacing"):
        small()(GOOD, GOOD, spacing=spacing)


def test_a_network_in_half_precision_is_refused() -> None:
    with pytest.raises(TypeError, match="autocast"):
        small().half()(GOOD.half(), GOOD.half())


def test_objective_refuses_a_wrong_number_of_weights() -> None:
    x = images(2, 1)
    with pytest.raises(ValueError, match="regularity_weight"):
        georeg.objective(small()(x, x), x, x, regularity_weight=(1.0, 2.0))
    with pytest.raises(TypeError, match="level_weight"):
        georeg.objective(small()(x, x), x, x, level_weight="1")


def test_weights_survive_a_round_trip(tmp_path) -> None:
    network, path = small(interpolation=3), tmp_path / "network.safetensors"
    georeg.save(network, path, card={"trained_on": "nothing", "method": "overwritten"})
    again = georeg.load(path)
    assert again.card["trained_on"] == "nothing"
    assert not again.training
    x = images(2, 2)
    assert torch.equal(again(x, x.flip(2)).field, network(x, x.flip(2)).field)
    assert [p.name for p in tmp_path.iterdir()] == ["network.safetensors"]


def test_broken_weight_files_are_refused(tmp_path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="safetensors"):
        georeg.load(path)
    with pytest.raises(OSError, match="missing"):
        georeg.load(tmp_path / "missing.safetensors")
    for card in (
        {"method": "other"},
        {"method": "georeg"},
        {"method": "georeg", "settings": {"no_such": 1}},
        {"method": "georeg", "settings": {"channels": [4, 6]}},
    ):
        save_weights(small(), path, card)
        with pytest.raises(ValueError, match=f"path: wanted .* {path}"):
            georeg.load(path)


def test_fields_reach_full_resolution_by_the_pyramid_rule() -> None:
    field = affine_field((3, 4))
    stage = georeg.Stage(2, 1, field)
    expected = upsample_field(field, 4, (12, 16))
    torch.testing.assert_close(georeg.to_full_resolution(stage, (12, 16)), expected)
