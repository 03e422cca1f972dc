"""DIP: its network against PyTorch's own layers, and what it finds, keeps and refuses.

About 40 s on one core.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reglib.data.nifti import Image
from reglib.geometry.affine import whole_field
from reglib.geometry.derivatives import jacobian_det
from reglib.geometry.fields import integrate, upsample_field
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth
from reglib.methods import dip
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import bending, diffusion
from reglib.objectives.similarity import lncc, mae, ncc
from reglib.registration import register
from reglib.synth import gaussian_diffeomorphism

SHAPES = {2: (40, 34), 3: (14, 20, 17)}
MODES = ("fixed", "fixed+noise", "resample")

#: A network of a few channels, for what does not depend on their number.
TINY = dip.Settings(channels=(6, 8, 8), skips=(2, 0, 2), inputs=4)
QUICK = dip.DIP(network=TINY, steps=6, averaging=0.5, pool=2, squarings=0)

both_dimensions = pytest.mark.parametrize("dimensions", [2, 3])


def textures(count: int, shape: tuple[int, ...], seed: int = 0, channels: int = 1) -> Tensor:
    """Smooth noise between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    x = gaussian_smooth(torch.rand(count, channels, *shape, generator=generator), 1.6)
    low, high = (x.flatten(1).amin(1), x.flatten(1).amax(1))
    view = (-1, *(1,) * (x.ndim - 1))
    return (x - low.view(view)) / (high - low).view(view)


@functools.cache
def deformed(dimensions: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Moving images, the fixed ones that a known diffeomorphism makes of them, and its field."""
    shape = SHAPES[dimensions]
    moving = textures(batch, shape)
    generator = torch.Generator().manual_seed(5)
    u = gaussian_diffeomorphism(
        shape, batch=batch, sigma=5.0, amplitude=2.5, generator=generator
    ).field
    return moving, warp(moving, u), u


def pair_of(moving: Tensor, fixed: Tensor) -> Pair:
    d = fixed.ndim - 2
    eye = torch.eye(d + 1, dtype=torch.float64)
    still = fixed.new_zeros(len(fixed), d, *fixed.shape[2:])
    return Pair(moving, fixed, eye, eye, None, None, eye.expand(len(fixed), d + 1, d + 1), still)


def error(field: Tensor, truth: Tensor) -> Tensor:
    """Mean distance in voxels away from the border, of each pair."""
    inside = (..., *(slice(3, -3),) * (truth.ndim - 2))
    return (field - truth)[inside].norm(dim=1).flatten(1).mean(1)


# --- The network ------------------------------------------------------------------------------


class PlainHourglass(nn.Module):
    """The same in PyTorch's own layers, for one copy, as the deep image prior is usually drawn."""

    def __init__(self, settings: dip.Settings, d: int, outputs: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[d]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[d]
        mode = {2: "bilinear", 3: "trilinear"}[d]

        def block(a: int, b: int, kernel: int, stride: int = 1) -> nn.Sequential:
            margin = {"padding": kernel // 2, "padding_mode": "reflect"} if kernel > 1 else {}
            layer = conv(a, b, kernel, stride, bias=False, **margin)
            return nn.Sequential(layer, norm(b), nn.LeakyReLU(0.2))

        def scale(number: int, inputs: int) -> nn.ModuleDict:
            c, s = settings.channels[number], settings.skips[number]
            last = number + 1 == len(settings.channels)
            coarser = c if last else settings.channels[number + 1]
            parts = {"shrink": block(inputs, c, 3, 2), "look": block(c, c, 3)}
            if not last:
                parts["deeper"] = scale(number + 1, c)
            if s:
                parts["skip"] = block(inputs, s, 1)
            parts |= {"up": nn.Upsample(scale_factor=2, mode=mode), "norm": norm(s + coarser)}
            return nn.ModuleDict(parts | {"join": block(s + coarser, c, 3), "mix": block(c, c, 1)})

        self.top = scale(0, settings.inputs)
        self.head = conv(settings.channels[0], outputs, 1)

    def through(self, scale: nn.ModuleDict, x: Tensor) -> Tensor:
        deep = scale["look"](scale["shrink"](x))
        deep = scale["up"](self.through(scale["deeper"], deep) if "deeper" in scale else deep)
        both = torch.cat([scale["skip"](x), deep], 1) if "skip" in scale else deep
        return scale["mix"](scale["join"](scale["norm"](both)))

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.through(self.top, z))


def copy_weights(plain: PlainHourglass, network: dip.Hourglass, copy: int) -> None:
    def norms(norm: nn.Module, own: nn.Module) -> None:
        norm.weight.copy_(own.factor[copy])
        norm.bias.copy_(own.offset[copy])

    scale, own = plain.top, network.inner
    while True:
        blocks = {"shrink": own.down[0], "look": own.down[1], "skip": own.skip}
        blocks |= {"join": own.up[1], "mix": own.up[2]}
        for name, block in blocks.items():
            if block is not None:
                scale[name][0].weight.copy_(block[0].weight[copy])
                norms(scale[name][1], block[1])
        norms(scale["norm"], own.up[0])
        if "deeper" not in scale:
            break
        scale, own = scale["deeper"], own.deeper
    plain.head.weight.copy_(network.head.weight[copy])
    plain.head.bias.copy_(network.offset[copy].flatten())


@both_dimensions
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_every_copy_is_the_network_of_plain_layers(dimensions, copies, shared):
    """BatchNorm in training mode on a batch of one, strided convolutions, doubling, joining."""
    shape = {2: (32, 40), 3: (32, 40, 64)}[dimensions]
    generator = torch.Generator().manual_seed(copies)
    network = dip.Hourglass(TINY, shape, 2, copies=copies, generator=generator).double()
    assert network.padded == shape
    for parameter in network.parameters():  # or all copies were equal
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    z = torch.randn(1 if shared else copies, 4, *shape, generator=generator).double()
    found = network(z)
    assert found.shape == (copies, 2, *shape)
    for copy in range(copies):
        plain = PlainHourglass(TINY, dimensions, 2).double().train()
        copy_weights(plain, network, copy)
        expected = plain(z if shared else z[copy : copy + 1])
        torch.testing.assert_close(found[copy : copy + 1], expected, atol=1e-10, rtol=0)


def test_the_papers_network_has_the_parameters_of_the_deep_image_prior():
    """Five scales of 128 channels and 4 of the skips; convolutions by their sizes, norms by 2."""
    network = dip.Hourglass(dip.PAPER, (256, 256), 2)
    assert network.halvings == (5, 5)
    convolutions = norms = 0
    for inputs in (32, 128, 128, 128, 128):
        convolutions += 9 * inputs * 128 + 9 * 128 * 128 + inputs * 4  # down, down, skip
        convolutions += 9 * 132 * 128 + 128 * 128  # up, and 1 x 1
        norms += 2 * (4 * 128 + 4 + 132)
    head = 128 * 2 + 2
    assert sum(p.numel() for p in network.parameters()) == convolutions + norms + head


@pytest.mark.parametrize(
    ("size", "expected"), [(256, 5), (255, 5), (64, 4), (57, 4), (25, 3), (7, 1), (6, 0), (1, 0)]
)
def test_an_axis_keeps_four_nodes(size, expected):
    """The most halvings, of five, after which ceil(size / 2^h) is at least 4."""
    counts = [h for h in range(6) if np.ceil(size / 2**h) >= 4]
    assert dip._halvings(size, 5) == expected == max(counts, default=0)


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 5), (7, 64), (33, 50), (1, 1, 1), (3, 9, 17), (2, 40, 1)]
)
@pytest.mark.parametrize("copies", [1, 3])
def test_any_size_is_padded_and_cut_back(shape, copies):
    network = dip.Hourglass(TINY, shape, 2, copies=copies)
    z = torch.randn(1, 4, *network.padded)
    out = network(z)
    assert out.shape == (copies, 2, *shape)
    assert out.isfinite().all()
    for n, padded, times in zip(shape, network.padded, network.halvings, strict=True):
        assert padded % 2**times == 0
        assert n <= padded < n + 2 ** max(times, 1)


def test_every_weight_is_trained():
    prior = dip.Prior(QUICK, (48, 40), 2, torch.Generator().manual_seed(0))
    weights = torch.randn(2, 2, 48, 40, generator=torch.Generator().manual_seed(1))
    (prior() * weights).sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        largest = parameter.grad.flatten(1).abs().amax(1)
        assert (largest > 0).all(), name


def test_copies_begin_alike_and_the_spread_of_their_weights_is_as_asked():
    settings = dip.Settings(channels=(32, 32), skips=(4, 4), inputs=32, std=0.07)
    network = dip.Hourglass(settings, (32, 32), 2, copies=2)
    for parameter in network.parameters():
        assert torch.equal(parameter[0], parameter[1])
    # 9216 normal numbers: their standard deviation is known to 0.7 %.
    weight = network.inner.down[1][0].weight[0]
    assert float(weight.detach().std()) == pytest.approx(0.07, rel=0.03)


# --- The start --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 50), (12, 200), (24, 17, 20), (5, 6)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool", [1, 3])
def test_the_first_field_is_within_a_voxel_of_the_identity_and_does_not_fold(shape, mode, pool):
    """With a scale at which, as drawn, it would not be: that is what the last layer is shrunk for.

    The bound holds for the noise that was first drawn; fresh noise is as good as that, not equal.
    """
    method = dip.DIP(network=TINY, input_mode=mode, pool=pool, squarings=0, scale=20.0)
    with torch.no_grad():
        u = dip.Prior(method, shape, 2, torch.Generator().manual_seed(0))()
    limit = dip.START * (1 + 1e-5) if mode == "fixed" else 1.0
    assert 0 < float(u.abs().max()) <= limit
    assert float(folding(u).max()) == 0


def test_as_drawn_the_first_field_of_the_paper_folds():
    """What is said of the start is not so without shrinking (standard deviation 0.1)."""
    method = replace(dip.PRESETS["paper"], network=TINY)
    prior = dip.Prior(method, (64, 50), 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        u = prior()
        drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).std() * 0.1
        u = u * drawn / prior.network.head.weight.std()
    assert float(u.abs().max()) > 1
    assert float(folding(u)) > 0


# --- The field --------------------------------------------------------------------------------


def test_the_scale_is_in_voxels():
    """A network that gives 1 everywhere displaces by that, however coarse the nodes are.

    Not along an axis of one voxel. A constant velocity is that displacement as well.
    """
    for pool, shape in itertools.product((1, 2, 3), ((20, 31), (9, 14, 21), (1, 12))):
        method = dip.DIP(network=TINY, pool=pool, scale=0.2)
        prior = dip.Prior(method, shape, 1, torch.Generator().manual_seed(0))
        with torch.no_grad():
            prior.network.head.weight.zero_()
            prior.network.offset.fill_(1.0)
            u = prior()
        for c, n in enumerate(shape):
            torch.testing.assert_close(u[:, c], torch.full_like(u[:, c], 0.2 if n > 1 else 0.0))


def test_a_velocity_is_integrated_before_it_is_interpolated():
    """And from the same weights, whose field is not the same: a constant velocity would be."""
    for pool in (1, 2):
        method = dip.DIP(network=TINY, pool=pool)
        plain, integrated = (
            dip.Prior(replace(method, squarings=n), (36, 28), 1, torch.Generator().manual_seed(0))
            for n in (0, 5)
        )
        with torch.no_grad():
            assert float(integrated().abs().max()) < 1  # close to the identity as well
            for prior in (plain, integrated):
                prior.network.head.weight.mul_(30)
            v = plain.network(plain.noise) * plain.reach
            expected = upsample_field(integrate(v, steps=5), pool, (36, 28))
            torch.testing.assert_close(integrated(), expected)
            assert float((plain() - expected).abs().max()) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_what_the_network_is_given(mode):
    method = dip.DIP(network=TINY, input_mode=mode, pool=1)
    prior = dip.Prior(method, (64, 64), 2, torch.Generator().manual_seed(0))
    given: list[Tensor] = []
    prior.network.register_forward_hook(lambda *a: given.append(a[1][0]))
    for _ in range(3):
        prior()
    spread = {"fixed": 0.0, "fixed+noise": dip.ADDED, "resample": dip.NOISE}[mode]
    for a, b in itertools.combinations(given, 2):
        # 16384 normal numbers: their standard deviation is known to 0.6 %.
        assert float((a - b).std()) == pytest.approx(2**0.5 * spread, rel=0.03)
        assert a.shape == (1, 4, 64, 64)  # the same for all pairs


def test_the_average_is_an_exponential_one(monkeypatch):
    """Against the sum written out: weights 0.8^(n-k), which sum to 1."""
    fields: list[Tensor] = []
    looks: dict[int, Tensor] = {}
    forward, look = dip.Prior.forward, dip._Kept.look
    monkeypatch.setattr(
        dip.Prior, "forward", lambda self: fields.append(forward(self)) or fields[-1]
    )
    monkeypatch.setattr(
        dip._Kept, "look", lambda self, u, n: looks.update({n: u}) or look(self, u, n)
    )
    moving, fixed, _ = deformed(2)
    method = replace(QUICK, steps=25, averaging=0.8)
    found = register(moving, fixed, method, progress=False)
    assert list(looks) == [10, 20, 25]
    for n, u in looks.items():
        weights = 0.8 ** np.arange(n)[::-1]
        mean = sum(w * f.detach().double() for w, f in zip(weights, fields, strict=False))
        torch.testing.assert_close(u.double(), mean / weights.sum(), atol=1e-5, rtol=0)
    losses = {n: mae(warp(moving, u), fixed, reduction="none") for n, u in looks.items()}
    best = torch.stack(list(losses.values())).argmin(0)
    for b, k in enumerate(best.tolist()):
        torch.testing.assert_close(found.field[b], list(looks.values())[k][b])


# --- Registering ------------------------------------------------------------------------------


@functools.cache
def recovered(dimensions: int, swapped: bool) -> tuple[Tensor, Tensor]:
    """Errors in voxels of three known deformations after registration; swapped: of wrong pairs."""
    moving, fixed, u = deformed(dimensions)
    method = dip.DIP(steps=100, pool=2)
    found = register(moving.roll(1, 0) if swapped else moving, fixed, method, progress=False)
    return error(found.field, u), found.folding


@both_dimensions
def test_a_known_deformation_is_recovered_and_a_control_is_not(dimensions):
    """Within a quarter of a voxel, of one; the control moves to something that is not there."""
    _, _, u = deformed(dimensions)
    before = error(torch.zeros_like(u), u)
    found, folds = recovered(dimensions, False)
    assert before.min() > 0.5
    assert (found < 0.25 * before).all()
    assert (folds <= 2e-4).all()
    control, _ = recovered(dimensions, True)
    assert (control > 0.8 * before).all()


def test_noise_that_is_drawn_anew_is_slow():
    """After as many steps: the network knows its place by the borders alone (METHODS of the paper).

    Fixed noise with a little added is nearly as good as fixed noise.
    """
    moving, fixed, u = (x[:1] for x in deformed(2))
    errors = {}
    for mode in MODES:
        method = dip.DIP(input_mode=mode, steps=60, pool=2, squarings=0)
        errors[mode] = float(error(register(moving, fixed, method, progress=False).field, u))
    before = float(error(torch.zeros_like(u), u))
    assert errors["fixed"] < 0.3 * before
    assert errors["fixed+noise"] < 0.5 * before
    assert errors["resample"] > 2 * errors["fixed+noise"]


@both_dimensions
@pytest.mark.parametrize("mode", ["fixed", "resample"])
def test_a_pair_gives_in_a_batch_what_it_gives_alone(dimensions, mode):
    """In double precision, as roundings grow from step to step."""
    moving, fixed, _ = (x.double() for x in deformed(dimensions))
    method = replace(QUICK, input_mode=mode, steps=12, pool=dimensions - 1)
    together = register(moving, fixed, method, progress=False)
    for batch in (1, 2):
        some = register(moving[1 : 1 + batch], fixed[1 : 1 + batch], method, progress=False)
        for i in range(batch):
            assert float(some.field[i].abs().max()) > 0.05
            torch.testing.assert_close(some.field[i], together.field[1 + i], atol=1e-6, rtol=0)
            assert some.history[i].keys() == together.history[1 + i].keys()
            np.testing.assert_allclose(
                some.history[i]["network prior"]["similarity"],
                together.history[1 + i]["network prior"]["similarity"],
                atol=1e-8,
            )


def test_the_seed_decides():
    moving, fixed, _ = (x[:1] for x in deformed(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (
        register(moving, fixed, replace(QUICK, seed=seed, input_mode="resample"), progress=False)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.field, same.field)
    assert not torch.equal(one.field, other.field)
    assert torch.equal(state, torch.get_rng_state())  # torch's own generator is left alone


@pytest.mark.parametrize("similarity", [mae, ncc, functools.partial(lncc, window=5)])
def test_any_similarity(similarity):
    moving, fixed, u = (x[:1] for x in deformed(2))
    found = register(
        moving, fixed, dip.DIP(similarity=similarity, steps=60, pool=2), progress=False
    )
    assert float(similarity(found.warped, fixed)) < 0.5 * float(similarity(moving, fixed))
    assert float(error(found.field, u)) < 0.5 * float(error(torch.zeros_like(u), u))


def test_several_channels_are_registered_in_one_call_each_by_its_own_scale():
    """The first channel says nothing; the scale of the second does not matter."""
    moving, fixed, u = (x[:1] for x in deformed(2))
    flat = torch.full_like(moving, 3.0)
    method = dip.DIP(steps=60, pool=2, squarings=0)
    alone = register(moving, fixed, method, progress=False)
    pairs = (torch.cat([flat, 1000 * x - 5], 1) for x in (moving, fixed))
    both = register(*pairs, method, progress=False)
    assert float(error(both.field, u)) < 0.4 * float(error(torch.zeros_like(u), u))
    first = [x.history[0]["network prior"]["similarity"][0] for x in (alone, both)]
    assert first[1] == pytest.approx(first[0] / 2, rel=1e-4)  # the mean over channels


def test_a_regulariser_makes_the_field_smoother_and_is_off_by_default():
    moving, fixed, _ = (x[:1] for x in deformed(2))
    method = dip.DIP(steps=60, pool=2, squarings=0)
    plain = register(moving, fixed, method, progress=False)
    assert list(plain.history[0]["network prior"]) == ["similarity"]
    for regularity, weight in ((diffusion, 10.0), (bending, 100.0)):
        own = replace(method, regularity=regularity, regularity_weight=weight)
        smooth = register(moving, fixed, own, progress=False)
        assert float(diffusion(smooth.field)) < 0.5 * float(diffusion(plain.field))
        assert smooth.history[0]["network prior"]["regularity"][5] > 0


def test_terms_of_the_loss_are_those_of_the_present_field():
    """With spacing: the regularity is that of the field in mm."""
    moving, fixed, _ = deformed(2)
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))
    method = replace(QUICK, regularity_weight=0.5, averaging=0.0, steps=10)
    fields: list[Tensor] = []
    own = dip.Prior(method, SHAPES[2], 3, torch.Generator().manual_seed(0))
    fields.append(own().detach())
    pairs = (moving, fixed)
    found = register(*pairs, method, moving_affine=affine, fixed_affine=affine, progress=False)
    rough = 0.5 * diffusion(fields[0], spacing=(2.0, 3.0), reduction="none")
    for b in range(3):
        terms = found.history[b]["network prior"]
        # Both images span the same range here, and the border is clamped: only roundings differ.
        assert terms["regularity"][0] == pytest.approx(float(rough[b]), rel=1e-4)
        assert len(terms["similarity"]) == 10


# --- Where it starts from ---------------------------------------------------------------------


def test_it_goes_on_from_an_affine_in_millimetres():
    """A fixed grid of other spacing and place: what is left of the motion is found, A is kept."""
    shape = (44, 36)
    moving = textures(1, shape, seed=2)
    shift = torch.tensor([3.0, -2.0])
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, 2] = shift.double() * 2.0  # mm
    still = torch.zeros(1, 2, *shape)
    fixed = warp(moving, still + (shift + 0.8).view(1, 2, 1, 1))
    spaced = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    images = [Image(x, spaced) for x in (moving, fixed)]
    found = register(*images, dip.DIP(steps=60, pool=2), start=matrix[None], progress=False)
    assert torch.equal(found.affine[0], matrix)
    assert float(error(found.field, still + 0.8)) < 0.3


class Known:
    """A method that knows a displacement."""

    def __init__(self, field: Tensor) -> None:
        self.field = field

    def __call__(self, pair: Pair):
        nothing = torch.zeros(len(pair.field), dtype=torch.bool)
        yield Iterate("known", {}, nothing, lambda: (pair.affine, self.field))


def test_what_was_displaced_before_stays_underneath():
    """Started from the truth, there is nothing to find; from half of it, the rest is."""
    moving, fixed, u = deformed(2)
    done = register(moving, fixed, [Known(u), replace(QUICK, steps=20)], progress=False)
    torch.testing.assert_close(done.field, u, atol=1e-5, rtol=0)
    half = register(moving, fixed, [Known(u / 2), dip.DIP(steps=60, pool=2)], progress=False)
    assert (error(half.field, u) < 0.5 * error(u / 2, u)).all()
    matrix = half.affine.to(half.field)
    whole = whole_field(matrix, half.field, half.fixed_affine, half.moving_affine)
    torch.testing.assert_close(half.warped, warp(moving, whole))


@pytest.mark.parametrize("side", ["moving", "fixed"])
def test_what_a_mask_leaves_out_has_no_say(side):
    """A bright square in the corner of one image, or anything else there: the result is the same.

    What is left out of the moving image lies where no voxel that counts comes near.
    """
    moving, fixed, _ = (x[:1] for x in deformed(2))
    mask = torch.ones_like(fixed)
    mask[..., :8, :8] = 0
    found = []
    for value in (9.0, -4.0):
        images = {"moving": moving.clone(), "fixed": fixed.clone()}
        images[side][..., :5, :5] = value
        found.append(
            register(**images, method=QUICK, **{f"{side}_mask": mask}, progress=False).field
        )
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
    unmasked = register(**images, method=QUICK, progress=False).field
    assert (unmasked - found[0]).abs().max() > 1e-3


def test_what_the_moving_image_does_not_cover_does_not_count():
    """The loss of the identity, of a moving image of half the size."""
    moving, fixed, _ = deformed(2)
    half = moving[:, :, :20]
    first = register(half, fixed, replace(QUICK, steps=1), progress=False).history
    for b in range(3):
        low, high = (float(x) for x in torch.cat([half[b], fixed[b]], 1).aminmax())
        expected = float((half[b] - fixed[b, :, :20]).abs().mean()) / (high - low)
        found = first[b]["network prior"]["similarity"][0]
        assert found == pytest.approx(expected, rel=0.1)  # the first field moves a little


# --- Stopping ---------------------------------------------------------------------------------


def iterates(moving: Tensor, fixed: Tensor, method: dip.DIP) -> list[Iterate]:
    return list(method(pair_of(moving, fixed)))


def test_a_pair_that_waits_in_vain_stops_and_the_others_go_on():
    """Equal images: nothing is better than no displacement, which is what is kept, exactly."""
    moving, fixed, _ = deformed(2)
    fixed = fixed.clone()
    fixed[1] = moving[1]
    method = dip.DIP(network=TINY, steps=60, patience=20, pool=2)
    steps = iterates(moving, fixed, method)
    active = torch.stack([one.active for one in steps])
    assert active[:20].all()
    assert not active[20:, 1].any()
    assert active[20:30, 0].all()
    field = steps[-1].transform()[1]
    assert not field[1].any()
    assert field[0].any()
    alone = iterates(moving[1:2], moving[1:2], method)
    assert len(alone) == 20
    assert len(iterates(moving, fixed, replace(method, patience=None))) == 60


def test_what_is_kept_and_when_a_pair_stops_against_a_plain_loop(monkeypatch):
    """In double precision; the three stop at different steps, and give in company what alone."""
    moving, fixed, _ = (x.double() for x in deformed(2))
    method = replace(QUICK, steps=80, patience=20, tolerance=0.1, lr=1e-2)
    look, looks = dip._Kept.look, {}
    monkeypatch.setattr(
        dip._Kept, "look", lambda self, u, n: looks.update({n: u}) or look(self, u, n)
    )
    found = register(moving, fixed, method, progress=False)
    company, stops = dict(looks), []
    for b in range(3):
        best = kept_at = since = 0
        first = reference = least = float(mae(moving[b : b + 1], fixed[b : b + 1]))
        for step in sorted(company):
            u = company[step][b : b + 1]
            loss = float(mae(warp(moving[b : b + 1], u), fixed[b : b + 1]))
            if loss < least and float(folding(u)) <= method.folding:
                best, kept_at, least = u, step, loss
            if least < reference - 0.1 * first:
                reference, since = least, step
            if step - since >= 20:
                break
        stops.append(step)
        assert kept_at > 0
        assert torch.equal(found.field[b : b + 1], best)
        assert len(found.history[b]["network prior"]["similarity"]) == step
        alone = register(moving[b : b + 1], fixed[b : b + 1], method, progress=False)
        torch.testing.assert_close(alone.field, best, atol=1e-6, rtol=0)
    assert len(set(stops)) == 3
    assert max(stops) < 80


def test_a_field_that_looks_away_is_not_kept():
    """Where less than half of what counted still counts, the loss of the rest decides nothing.

    Shifted by r of 40 rows, r rows come from outside, and nothing else differs.
    """
    moving = textures(1, (40, 34))
    for rows, kept in ((12, True), (19, True), (21, False), (1000, False)):
        fixed = moving.roll(-rows, 2)
        pair = dip._scaled(pair_of(moving, fixed))
        best = dip._Kept(QUICK, pair)
        u = torch.zeros_like(pair.field)
        u[:, 0] = rows
        best.look(u, 10)
        assert torch.equal(best.field, u if kept else torch.zeros_like(u)), rows


@functools.cache
def overfitted(limit: float | None, squarings: int = 0) -> tuple[Tensor, list[float]]:
    """Field and losses of white noise registered to other white noise, whose prior is no help."""
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 1, 1, 32, 32, generator=generator)
    method = dip.DIP(network=TINY, pool=1, steps=120, folding=limit, patience=None, scale=4.0)
    method = replace(method, averaging=0.5, lr=3e-3, squarings=squarings)
    found = register(moving, fixed, method, progress=False)
    return found.field, found.history[0]["network prior"]["similarity"]


def test_what_is_kept_does_not_fold_whatever_the_loss():
    """The control shows that there was something to prevent; both saw the same losses."""
    (guarded, losses), (free, same) = overfitted(0.0), overfitted(None)
    assert losses == same
    assert losses[-1] < 0.9 * losses[0]
    assert float(jacobian_det(guarded).min()) > 0
    assert float(folding(free)) > 0.01


def test_a_velocity_hardly_folds_whatever_the_loss():
    integrated, _ = overfitted(None, 5)
    free, _ = overfitted(None)
    assert float(integrated.norm(dim=1).mean()) > 0.2  # it did move
    assert float(folding(integrated)) < 0.1 * float(folding(free))


def test_what_was_given_is_not_changed_by_later_steps_and_never_gets_worse():
    moving, fixed, _ = deformed(2, 2)
    method = dip.DIP(network=TINY, steps=40, pool=2)
    seen, kept, losses = [], [], []
    for one in method(pair_of(moving, fixed)):
        field = one.transform()[1]
        seen.append(field)
        kept.append(field.clone())
        losses.append(mae(warp(moving, field), fixed, reduction="none"))
        assert one.active.shape == (2,)
        assert one.terms["similarity"].shape == (2,)
        assert not one.terms["similarity"].requires_grad
    for a, b in zip(seen, kept, strict=True):
        assert torch.equal(a, b)
    table = torch.stack(losses)
    assert (table.diff(dim=0) <= 1e-6).all()
    assert (table[-1] < 0.9 * table[0]).all()


def test_the_report_says_which_step_was_kept():
    moving, fixed, _ = deformed(2, 2)
    found = register(moving, fixed, replace(QUICK, steps=20), progress=False)
    [note] = found.settings["notes"]
    assert note.startswith("kept the average of the fields up to step ")
    assert note.endswith(" of 20")
    equal = register(moving, moving, replace(QUICK, steps=20), progress=False)
    [nothing] = equal.settings["notes"]
    assert nothing.endswith(" 0, 0 of 20 (0: no displacement)")
    [method] = found.settings["method"]
    assert method["name"] == "DIP"
    assert method["settings"]["network"]["settings"]["channels"] == [6, 8, 8]


# --- Input of every kind ----------------------------------------------------------------------


@both_dimensions
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_shapes_dtype_and_determinism(dimensions, batch):
    moving, fixed, _ = (x[:batch] for x in deformed(dimensions))
    found = register(moving, fixed, QUICK, progress=False)
    assert found.field.shape == (batch, dimensions, *SHAPES[dimensions])
    assert found.field.dtype == torch.float32
    again = register(moving, fixed, QUICK, progress=False)
    assert torch.equal(found.field, again.field)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = register(moving, fixed, QUICK, progress=False)
    assert mixed.field.dtype == torch.float32


def test_vectors_are_not_rounded_under_autocast():
    """The last layer is computed in single precision: bfloat16 knows three digits."""
    method = dip.DIP(network=TINY, pool=1, squarings=0)
    prior = dip.Prior(method, (40, 36), 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = prior()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = prior()
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)  # what is before it is rounded
    assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert float((found == found.bfloat16()).float().mean()) < 0.05


def test_channels_are_scaled_by_what_counts_in_both_images():
    moving, fixed = torch.rand(2, 2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    units = torch.tensor([1.0, 1000.0, 0.0]).view(1, 3, 1, 1)  # the last is constant
    mask = torch.ones(2, 1, 8, 9)
    mask[..., 0, 0] = 0
    given = [units * x - 7 for x in (moving, 0.5 * fixed)]
    given[0][..., 0, 0] = 1e6
    pair = dip._scaled(replace(pair_of(*given), moving_mask=mask))
    plain = [x.double().numpy() for x in given]
    for b, c in np.ndindex(2, 2):
        both = np.concatenate([plain[0][b, c].ravel()[1:], plain[1][b, c].ravel()])
        for found, x in zip((pair.moving, pair.fixed), plain, strict=True):
            expected = np.clip((x[b, c] - both.min()) / np.ptp(both), 0, 1)
            np.testing.assert_allclose(found[b, c], expected, atol=1e-3 if c == 0 else 1e-5)
    assert not pair.fixed[:, 2].any()


@pytest.mark.parametrize("shape", [(3, 4), (1, 9), (13, 66), (4, 5, 6), (1, 12, 9)])
def test_tiny_and_odd_images_are_taken(shape):
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 2, 1, *shape, generator=generator)
    for pool in (1, 2):
        found = register(moving, fixed, replace(QUICK, pool=pool, steps=12), progress=False)
        assert found.field.shape == (2, len(shape), *shape)
        assert found.field.isfinite().all()
        for axis, n in enumerate(shape):
            if n == 1:  # there is nowhere to go
                assert not found.field[:, axis].any()


@pytest.mark.parametrize("similarity", [mae, ncc, lncc])
@pytest.mark.parametrize("value", [0.0, 1e4 + 0.1])
def test_constant_images_give_no_displacement(similarity, value):
    flat = torch.full((2, 1, 20, 24), value)
    method = replace(QUICK, similarity=similarity, steps=20)
    assert not register(flat, flat, method, progress=False).field.any()
    textured = textures(2, (20, 24))
    for images in ((flat, textured), (textured, flat)):
        assert register(*images, method, progress=False).field.isfinite().all()


def test_images_of_different_channels_are_refused():
    x = textures(1, (16, 16))
    with pytest.raises(ValueError, match="same number of channels"):
        register(x, torch.cat([x, x], 1), QUICK, progress=False)


def test_a_loss_that_is_not_finite_is_reported():
    def broken(warped: Tensor, fixed: Tensor, **_: object) -> Tensor:
        return (warped - fixed).flatten(1).mean(1) / 0

    x = textures(1, (16, 16))
    with pytest.raises(FloatingPointError, match="loss"):
        register(x, x.flip(2), replace(QUICK, similarity=broken), progress=False)


def test_the_presets_are_methods():
    """Shortened: they differ in what they are made of."""
    moving, fixed, _ = (x[:1] for x in deformed(2))
    assert dip.PRESETS["fast"] == dip.DIP()
    paper = dip.PRESETS["paper"]
    assert paper.network == dip.PAPER
    assert (paper.input_mode, paper.pool, paper.regularity_weight) == ("resample", 1, 0)
    assert paper.similarity is mae
    found = register(moving, fixed, replace(paper, steps=2), progress=False)
    assert found.field.isfinite().all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.steps = 3


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"network": TINY.channels}, TypeError, "network: wanted Settings, got tuple"),
        ({"input_mode": "white"}, ValueError, "input_mode: wanted one of 'fixed'"),
        ({"scale": 0}, ValueError, "scale: wanted a positive number"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"pool": 0}, ValueError, "pool"),
        ({"pool": 1.5}, TypeError, "pool"),
        ({"squarings": -1}, ValueError, "squarings"),
        ({"squarings": 0.5}, TypeError, "squarings"),
        ({"similarity": "mae"}, TypeError, "similarity: wanted a function"),
        ({"regularity": None}, TypeError, "regularity: wanted a function"),
        ({"regularity_weight": -0.1}, ValueError, "regularity_weight"),
        ({"steps": 0}, ValueError, "steps"),
        ({"lr": 0}, ValueError, "lr: wanted a positive number"),
        ({"lr": "fast"}, TypeError, "lr"),
        ({"averaging": 1}, ValueError, "averaging: wanted less than 1"),
        ({"averaging": float("nan")}, ValueError, "averaging"),
        ({"folding": 2}, ValueError, "folding"),
        ({"tolerance": -1}, ValueError, "tolerance"),
        ({"patience": 0}, ValueError, "patience"),
    ],
)
def test_bad_settings_are_named(settings, kind, words):
    with pytest.raises(kind, match=words):
        dip.DIP(**settings)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"channels": ()}, TypeError, "channels"),
        ({"channels": 16}, TypeError, "channels"),
        ({"channels": (16, 0)}, ValueError, "channels"),
        ({"channels": (16, 16)}, ValueError, "skips: wanted 2, one for each scale"),
        ({"skips": (4, 4, -1, 4, 4)}, ValueError, "skips"),
        ({"inputs": 0}, ValueError, "inputs"),
        ({"std": 0}, ValueError, "std: wanted a positive number"),
    ],
)
def test_bad_networks_are_named(settings, kind, words):
    with pytest.raises(kind, match=words):
        dip.Settings(**settings)


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="shape"):
        dip.Hourglass(TINY, (16,), 2)
    with pytest.raises(ValueError, match="copies"):
        dip.Hourglass(TINY, (16, 16), 2, copies=0)
    network = dip.Hourglass(TINY, (16, 16), 2, copies=2)
    for shape in ((3, 4, 16, 16), (2, 5, 16, 16), (2, 4, 16, 15)):
        with pytest.raises(ValueError, match="z: wanted shape"):
            network(torch.zeros(shape))
