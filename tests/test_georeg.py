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
from reglib.geometry.fields import upsample_field
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth, pool
from reglib.methods import georeg, neighbours
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import bending
from reglib.objectives.similarity import mse, ncc
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


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_pair_gives_in_a_batch_what_it_gives_alone(dimensions: int) -> None:
    network = small(dimensions)
    moving, fixed = images(dimensions, 3), images(dimensions, 3).flip(2)
    together = network(moving, fixed).field
    for i in range(3):
        alone = network(moving[i : i + 1], fixed[i : i + 1]).field
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


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
    ],
)
def test_bad_settings_are_refused(settings: dict, word: str) -> None:
    with pytest.raises((TypeError, ValueError), match=word):
        small(**settings)


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
