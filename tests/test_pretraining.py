"""Pretraining: the loss against torch.distributions, and an encoder that is handed on whole."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_divergence

from reglib import synth
from reglib.geometry.fields import upsample_field
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import pretraining, transmorph
from reglib.methods.fcn import FCN
from reglib.methods.fcn import Settings as FCNSettings
from reglib.methods.georeg import GeoReg
from reglib.methods.network import Network
from reglib.methods.pretraining import Gaussian, Output, PretrainingNetwork
from reglib.methods.transmorph import PRESETS, Settings, TransMorph
from reglib.objectives.metrics import dice
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc, mse
from reglib.registration import register
from reglib.training import fit

SMALL = Settings(
    window=(6, 8),
    patch=2,
    channels=8,
    depths=(1, 1),
    heads=(2, 4),
    drop_path=0.0,
    time_steps=1,
    norm="instance",
)
SETTINGS = {2: SMALL, 3: dataclasses.replace(SMALL, window=(3, 2, 4))}
SHAPES = {2: (16, 24), 3: (16, 24, 8)}


def small_fcn(dimensions: int = 2) -> FCN:
    return FCN(FCNSettings(dimensions=dimensions, channels=(4, 6, 8)))


def build(dimensions: int = 2, kind: str = "transmorph") -> PretrainingNetwork:
    torch.manual_seed(0)
    if kind == "georeg":
        encoder = pretraining.georeg_encoder(GeoReg(dimensions=dimensions, channels=(4, 6, 8)))
        return PretrainingNetwork(encoder, features=8)
    if kind == "fcn":
        return PretrainingNetwork(pretraining.fcn_encoder(small_fcn(dimensions)), features=8)
    return PretrainingNetwork(transmorph.Encoder(SETTINGS[dimensions]), features=8)


def moved(dimensions: int = 2, kind: str = "transmorph") -> PretrainingNetwork:
    """Heads whose means and variances differ from voxel to voxel, in evaluation mode."""
    network = build(dimensions, kind)
    for head in (*network.heads, network.ensemble_head):
        nn.init.normal_(head.mean.weight, std=0.1)
        nn.init.normal_(head.log_variance.weight, std=0.05)
        nn.init.constant_(head.log_variance.bias, -2.0)
    return network.eval()


def images(dimensions: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 1, *SHAPES[dimensions], generator=generator)


def gaussian(seed: int, factor: int = 2) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, 2, 2, 4, 5, generator=generator, dtype=torch.float64)
    return Gaussian(mean, log_variance - 1, factor)


# --- The network --------------------------------------------------------------------------------


def test_the_paper_s_decoders_have_the_paper_s_size() -> None:
    encoder = transmorph.Encoder(PRESETS["paper"])
    network = PretrainingNetwork(encoder)
    whole, own = (sum(p.numel() for p in m.parameters()) for m in (network, encoder))
    assert whole - own == 321_528
    # Coarsest first, all ending at half of the pooled images' resolution.
    assert [d.factor for d in network.decoders] == [8, 4, 2]
    assert network.factor == 4


@pytest.mark.parametrize("kind", ["transmorph", "georeg", "fcn"])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_stage_gives_a_field_and_a_variance_at_full_resolution(
    kind, dimensions, batch
) -> None:
    network = moved(dimensions, kind)
    x = images(dimensions, batch)
    output = network(x, x.flip(2))
    assert len(output.stages) == len(network.encoder.strides)
    shape = (batch, dimensions, *SHAPES[dimensions])
    for part in (output.ensemble, *output.stages):
        assert part.field.shape == part.variance.shape == shape
        assert part.variance.min() > 0
        expected = upsample_field(part.mean, part.factor, SHAPES[dimensions])
        torch.testing.assert_close(part.field, expected)
    assert output.field.equal(output.ensemble.field)


def test_variances_are_in_voxels_squared_of_the_images() -> None:
    """At the nodes: those of a level pooled by 3 are voxels 1, 4, 7 ..."""
    part = gaussian(0, factor=3)
    nodes = (..., slice(1, None, 3), slice(1, None, 3))
    torch.testing.assert_close(part.variance[nodes], 9 * part.log_variance.exp())
    torch.testing.assert_close(part.field[nodes], 3 * part.mean)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_it_starts_at_the_identity_and_almost_certain_of_it(dimensions) -> None:
    network = build(dimensions).eval()
    x = images(dimensions)
    output = network(x, x.flip(2))
    for part in (output.ensemble, *output.stages):
        assert part.field.norm(dim=1).max() < 0.01  # voxels
        torch.testing.assert_close(
            part.log_variance, torch.full_like(part.mean, -10), atol=1e-6, rtol=0
        )


def test_the_ensemble_reads_the_sum_of_the_decoders_features() -> None:
    network, seen = moved(), []
    for decoder in network.decoders:
        decoder.register_forward_hook(lambda _, inputs, out: seen.append(out))
    output = network(images(2), images(2).flip(2))
    expected = network.ensemble_head(sum(seen), network.factor)
    torch.testing.assert_close(output.ensemble.mean, expected.mean)
    for head, features, stage in zip(network.heads, seen, output.stages, strict=True):
        torch.testing.assert_close(head(features, network.factor).mean, stage.mean)


def test_samples_have_the_mean_and_the_variance_of_the_gaussian() -> None:
    part, generator = gaussian(0, factor=3), torch.Generator().manual_seed(0)
    draws = torch.stack([part.sample(generator) for _ in range(4000)])
    nodes = (..., slice(1, None, 3), slice(1, None, 3))
    spread = part.variance[nodes].sqrt()
    # Of 80 numbers the worst is 3.5 standard errors off: 0.056 of the spread, 8 % of the variance.
    error = (draws.mean(0) - part.field)[nodes] / spread
    assert error.abs().max() < 0.07
    ratio = draws.var(0)[nodes] / part.variance[nodes]
    assert (ratio - 1).abs().max() < 0.1


def test_the_field_is_drawn_in_training_and_the_generator_decides() -> None:
    network, x = moved().train(), images(2)

    def field(seed: int) -> Tensor:
        network.generator = torch.Generator().manual_seed(seed)
        return network(x, x.flip(2)).field

    before = torch.get_rng_state()
    first = network.ensemble_head  # its Gaussian, drawn by hand
    output = network.eval()(x, x.flip(2))
    network.train()
    assert field(3).equal(output.ensemble.sample(torch.Generator().manual_seed(3)))
    assert not field(3).equal(field(4))
    assert torch.get_rng_state().equal(before)
    network.generator = None
    torch.manual_seed(3)
    assert network(x, x.flip(2)).field.equal(field(3))
    assert first is network.ensemble_head


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["transmorph", "georeg", "fcn"])
def test_a_pair_gives_in_a_batch_what_it_gives_alone(dimensions, kind) -> None:
    network = moved(dimensions, kind)
    moving, fixed = images(dimensions, 3), images(dimensions, 3).flip(2)
    together = network(moving, fixed)
    for i in range(3):
        alone = network(moving[i : i + 1], fixed[i : i + 1])
        torch.testing.assert_close(together.field[i : i + 1], alone.field, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(together.stages, alone.stages, strict=True):
            torch.testing.assert_close(
                ours.log_variance[i : i + 1], theirs.log_variance, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("kind", ["transmorph", "georeg", "fcn"])
@pytest.mark.parametrize("kl", ["consistent", "released"])
def test_every_weight_is_trained(kind, kl) -> None:
    network = moved(2, kind).train()
    moving, fixed = images(2, 2), images(2, 2).flip(2)
    terms = pretraining.objective(network(moving, fixed), moving, fixed, kl=kl, kl_weight=1.0)
    torch.stack(tuple(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # InstanceNorm takes off what a bias before it adds.
        assert parameter.grad.abs().max() > 0 or name.endswith(("first.bias", "second.bias")), name


def test_an_adapted_encoder_gives_both_images_features_coarsest_first() -> None:
    network = GeoReg(channels=(4, 6, 8)).eval()
    encoder = pretraining.georeg_encoder(network)
    assert (encoder.channels, encoder.strides) == ((16, 12, 8), (4, 2, 1))
    moving, fixed = images(2, 2), images(2, 2).flip(2)
    maps = encoder(moving, fixed)
    expected = zip(network.encoder(moving), network.encoder(fixed), strict=True)
    for ours, theirs in zip(maps, reversed(list(expected)), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs, 1))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_an_fcn_s_encoder_gives_what_its_deconvolutions_begin_with(dimensions) -> None:
    network = small_fcn(dimensions).eval()
    encoder = pretraining.fcn_encoder(network)
    assert (encoder.dimensions, encoder.inputs) == (dimensions, 1)
    assert (encoder.channels, encoder.strides) == ((8, 6, 4), (4, 2, 1))
    moving, fixed = images(dimensions, 2), images(dimensions, 2).flip(2)
    seen = []
    for conv in network.convs:
        conv.register_forward_hook(lambda _, inputs, out: seen.append(out))
    network(moving, fixed)
    expected, seen = seen, []
    maps = encoder(moving, fixed)
    for ours, theirs in zip(maps, reversed(expected), strict=True):
        assert ours.equal(theirs)
    for ours, stride in zip(maps, encoder.strides, strict=True):
        assert ours.shape[2:] == tuple(n // stride for n in SHAPES[dimensions])
    whole = FCN(FCNSettings(dimensions=2, channels=(4, 6), max_pooling=False, decoder=False))
    assert pretraining.fcn_encoder(whole).strides == (1, 1)


def test_the_field_keeps_its_precision_under_autocast() -> None:
    network, x = moved(), images(2, 2)
    plain = network(x, x.flip(2)).field
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(x, x.flip(2))
    assert mixed.field.dtype == mixed.ensemble.log_variance.dtype == torch.float32
    assert (mixed.field - plain).abs().mean() < 0.05 * plain.abs().mean()


def test_register_takes_it_as_it_is() -> None:
    x = torch.rand(1, 1, 21, 30)
    assert register(x, x.flip(2), Network(moved())).field.shape == (1, 2, 21, 30)


# --- The loss -----------------------------------------------------------------------------------


def test_the_divergence_is_that_of_torch_distributions() -> None:
    p, q = gaussian(0), gaussian(1)
    one, other = (Normal(x.mean, (0.5 * x.log_variance).exp()) for x in (p, q))
    expected = reference_divergence(one, other).mean()
    torch.testing.assert_close(pretraining.kl_divergence(p, q), expected)
    assert pretraining.kl_divergence(p, p) == 0
    assert abs(pretraining.kl_divergence(q, p) - expected) > 0.01  # the direction matters


def test_the_divergence_is_the_expected_difference_of_log_densities() -> None:
    """Monte Carlo: p is drawn through the sampling of the network, so its variance is meant."""
    p, q = gaussian(0, factor=1), gaussian(1, factor=1)
    generator = torch.Generator().manual_seed(0)

    def log_density(x: Gaussian, at: Tensor) -> Tensor:
        variance = x.variance
        return -0.5 * ((at - x.mean) ** 2 / variance + variance.log())

    draws = [p.sample(generator) for _ in range(4000)]
    estimates = torch.stack([(log_density(p, y) - log_density(q, y)).mean() for y in draws])
    error = estimates.std() / math.sqrt(len(draws))
    assert abs(estimates.mean() - pretraining.kl_divergence(p, q)) < 4 * error
    assert error < 0.02 * estimates.mean()


def test_the_divergence_does_not_depend_on_the_unit_of_length() -> None:
    p, q = gaussian(0), gaussian(1)
    tripled = [Gaussian(3 * x.mean, x.log_variance + 2 * math.log(3), 2) for x in (p, q)]
    expected = pretraining.kl_divergence(p, q)
    torch.testing.assert_close(pretraining.kl_divergence(*tripled), expected)


def test_the_divergence_of_near_equals_keeps_its_digits() -> None:
    p = Gaussian(torch.zeros(1, 2, 4, 5), torch.full((1, 2, 4, 5), -10.0), 2)
    q = p._replace(log_variance=p.log_variance + 1e-3)
    # x^2 / 4 for variances that differ by a factor e^x.
    assert float(pretraining.kl_divergence(p, q)) == pytest.approx(2.5e-7, rel=2e-3)


def test_the_released_form_takes_the_log_variance_for_that_of_the_deviation() -> None:
    p, q = gaussian(0), gaussian(1)
    one, other = (Normal(x.mean, x.log_variance.exp()) for x in (p, q))
    expected = reference_divergence(one, other).mean()
    torch.testing.assert_close(pretraining.released_kl_divergence(p, q), expected)


def some_output(weight: float = 1.0) -> Output:
    stages = tuple(gaussian(k) for k in range(1, 4))
    ensemble = gaussian(0)
    return Output(weight * ensemble.field, ensemble, stages)


def test_the_loss_is_equation_1() -> None:
    output = some_output()
    moving, fixed = torch.rand(2, 2, 1, 8, 10, dtype=torch.float64)
    terms = pretraining.objective(output, moving, fixed, moving, fixed)
    assert list(terms) == ["similarity", "regularity", "kl"]
    warped = warp(moving, output.field)
    expected = lncc(warped, fixed, window=9, sigma=2.0)
    torch.testing.assert_close(terms["similarity"], expected)
    torch.testing.assert_close(terms["regularity"], diffusion(output.field))

    def normal(x: Gaussian) -> Normal:
        return Normal(x.mean, x.log_variance.exp().sqrt())

    to_stages = [reference_divergence(normal(output.ensemble), normal(s)) for s in output.stages]
    torch.testing.assert_close(terms["kl"], 2e-3 * torch.stack(to_stages).mean())


def test_the_released_loss_goes_the_other_way_round() -> None:
    output = some_output()
    moving, fixed = torch.rand(2, 2, 1, 8, 10, dtype=torch.float64)
    terms = pretraining.objective(
        output, moving, fixed, kl="released", similarity=mse, regularity_weight=0.5
    )

    def normal(x: Gaussian) -> Normal:
        return Normal(x.mean, x.log_variance.exp())

    from_stages = [reference_divergence(normal(s), normal(output.ensemble)) for s in output.stages]
    torch.testing.assert_close(terms["kl"], 1e-7 * torch.stack(from_stages).mean())
    torch.testing.assert_close(terms["similarity"], mse(warp(moving, output.field), fixed))
    torch.testing.assert_close(terms["regularity"], 0.5 * diffusion(output.field))
    weighed = pretraining.objective(output, moving, fixed, kl="released", kl_weight=1.0)
    torch.testing.assert_close(weighed["kl"], 1e7 * terms["kl"])
    assert "kl" not in pretraining.objective(output, moving, fixed, kl=None)
    with pytest.raises(ValueError, match="kl: wanted one of 'consistent', 'released'"):
        pretraining.objective(output, moving, fixed, kl="paper")


@pytest.mark.parametrize(("kl", "strength"), [("consistent", 22.0), ("released", 24.3)])
def test_both_forms_pull_equally_at_first(kl, strength) -> None:
    """At log-variance -10, a disagreement of 1 voxel."""
    zero = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
    stage, ensemble = (Gaussian(zero + x, zero - 10, 2) for x in (1, 0))
    image = torch.rand(1, 1, 8, 10, dtype=torch.float64)
    terms = pretraining.objective(
        Output(ensemble.field, ensemble, (stage,)), image, image, similarity=mse, kl=kl
    )
    assert float(terms["kl"]) == pytest.approx(strength, rel=0.01)


def test_dice_is_that_of_labels_warped_one_by_one() -> None:
    output = some_output(0.5)
    generator = torch.Generator().manual_seed(0)
    moving_labels, fixed_labels = torch.randint(0, 4, (2, 2, 1, 8, 10), generator=generator)
    image = torch.rand(2, 1, 8, 10, dtype=torch.float64)
    terms = pretraining.dice_objective(
        output, image, image, moving_labels, fixed_labels, image, count=5, kl=None
    )
    losses = []
    for b, label in itertools.product(range(2), range(4)):
        share = warp((moving_labels == label).double(), output.field)[b]
        there = (fixed_labels == label).double()[b]
        losses.append(1 - 2 * (share * there).sum() / (share.sum() + there.sum()))
    # Label 4 is nowhere and costs nothing.
    torch.testing.assert_close(terms["similarity"], torch.stack(losses).sum() / (2 * 5))
    torch.testing.assert_close(terms["regularity"], diffusion(output.field))
    full = pretraining.dice_objective(output, image, image, moving_labels, fixed_labels)
    expected = pretraining.objective(output, image, image, similarity=mse)["kl"]
    torch.testing.assert_close(full["kl"], expected)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.full((2, 1, 8, 10), 16), ValueError),
        (torch.full((2, 1, 8, 10), -1), ValueError),
        (torch.full((2, 1, 8, 10), 0.5), ValueError),
        (torch.zeros(2, 1, 8, 9), ValueError),
        (torch.zeros(2, 2, 8, 10), ValueError),
        (torch.zeros(2, 1, 8, 10).numpy(), TypeError),
    ],
)
@pytest.mark.parametrize("name", ["moving_labels", "fixed_labels"])
def test_bad_labels_are_refused(labels, error, name) -> None:
    good = dict.fromkeys(("moving_labels", "fixed_labels"), torch.zeros(2, 1, 8, 10))
    image = torch.rand(2, 1, 8, 10, dtype=torch.float64)
    with pytest.raises(error, match=f"^{name}: wanted"):
        pretraining.dice_objective(some_output(), image, image, **good | {name: labels})


# --- Training and transfer ----------------------------------------------------------------------


def overlaps(network: nn.Module) -> tuple[float, float, float, Output]:
    """Dice on unseen pairs: without registration, with it, with the field of another pair."""
    generator = torch.Generator().manual_seed(1)
    unseen = synth.random_pair((32, 48), batch=32, cell=16, generator=generator)
    with torch.no_grad():
        output = network(unseen.moving, unseen.fixed)
    fields = torch.zeros_like(output.field), output.field, output.field.roll(1, 0)
    values = []
    for u in fields:
        warped = warp_labels(unseen.moving_labels, u, padding="border")
        values.append(float(dice(warped, unseen.fixed_labels, labels=range(16)).nanmean()))
    return values[0], values[1], values[2], output


@pytest.mark.parametrize(
    ("kind", "objective", "steps", "lr"),
    [
        ("transmorph", pretraining.objective, 200, 5e-3),
        ("transmorph", functools.partial(pretraining.dice_objective, kl=None), 160, 7e-3),
        ("georeg", functools.partial(pretraining.objective, kl=None), 80, 1e-2),
        ("fcn", functools.partial(pretraining.objective, kl=None), 80, 1e-2),
    ],
    ids=["images", "labels", "georeg", "fcn"],
)
def test_pretraining_teaches_it_to_register_unseen_pairs(
    kind, objective, steps, lr, train_on_shapes
) -> None:
    torch.manual_seed(0)
    if kind == "georeg":
        other = GeoReg(channels=(8, 8), neighbourhoods=(3, 3), iterations=(1, 1))
        network = PretrainingNetwork(pretraining.georeg_encoder(other), features=8)
    elif kind == "fcn":
        third = FCN(FCNSettings(dimensions=2, channels=(8, 8)))
        network = PretrainingNetwork(pretraining.fcn_encoder(third), features=8)
    else:
        network = PretrainingNetwork(transmorph.Encoder(dataclasses.replace(SMALL, channels=16)))
    train_on_shapes(network, objective, (32, 48), steps=steps, lr=lr)
    identity, found, foreign, _ = overlaps(network)
    # 0.61 before; 0.67 to 0.69 afterwards. Control: the field of another pair only harms.
    assert found > identity + 0.03
    assert foreign < identity


@pytest.mark.parametrize("kl", ["consistent", "released", None])
def test_fit_lowers_the_loss(kl) -> None:
    """As users call it, on one pair."""
    network = build()
    pair = synth.random_pair((16, 24), batch=2, generator=torch.Generator().manual_seed(0))
    objective = functools.partial(pretraining.objective, kl=kl)
    pairs = itertools.repeat((pair.moving, pair.fixed))
    history = fit(network, pairs, objective, steps=30, lr=1e-3, progress=False)
    assert {"similarity", "regularity"} | ({"kl"} if kl else set()) <= set(history)
    assert history["loss"][-1] < history["loss"][0] - 0.01


def test_a_stage_that_cannot_agree_says_so_by_its_variance() -> None:
    """KL(ensemble || stage) is least where the stage's variance is s_ens + (m_ens - m_k)^2."""
    ensemble, stage = gaussian(0), gaussian(1)
    best = (ensemble.log_variance.exp() + (ensemble.mean - stage.mean).square()).log()
    best.requires_grad_()
    value = pretraining.kl_divergence(ensemble, stage._replace(log_variance=best))
    assert torch.autograd.grad(value, best)[0].abs().max() < 1e-12


NETWORKS = {
    "transmorph": lambda: TransMorph(SMALL),
    "georeg": lambda: GeoReg(channels=(4, 6, 8)),
    "fcn": small_fcn,
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_transfer_copies_the_whole_encoder_and_nothing_else(kind) -> None:
    pretrained, network = build(2, kind), NETWORKS[kind]()
    before = copy.deepcopy(network.state_dict())
    encoder = pretrained.encoder if kind == "transmorph" else pretrained.encoder.encoder
    part = "convs" if kind == "fcn" else "encoder"
    if kind == "fcn":  # what BatchNorm has seen goes along
        pretrained.train()(images(2, 2), images(2, 2).flip(2))
    written = pretraining.transfer(pretrained, network)
    assert written == sorted(f"{part}.{name}" for name in encoder.state_dict())
    for name, tensor in network.state_dict().items():
        if name in written:
            assert tensor.equal(encoder.state_dict()[name.removeprefix(f"{part}.")]), name
        else:
            assert tensor.equal(before[name]), name
    # A copy: what is trained on is the network's own, all of it.
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    assert not next(encoder.parameters()).equal(next(getattr(network, part).parameters()))
    assert all(p.requires_grad for p in network.parameters())


def test_transfer_from_an_encoder_in_half_precision() -> None:
    encoder, network = transmorph.Encoder(SMALL), TransMorph(SMALL)
    pretraining.transfer(copy.deepcopy(encoder).half(), network)
    for name, tensor in network.encoder.state_dict().items():
        assert tensor.equal(encoder.state_dict()[name].half().float()), name


def tied() -> nn.Module:
    network = TransMorph(SMALL)
    network.tied = network.encoder.embed.weight  # one tensor, two names
    return network


def spoilt() -> PretrainingNetwork:
    network = build()
    with torch.no_grad():
        network.encoder.embed.bias[0] = math.nan
    return network


@pytest.mark.parametrize(
    ("pretrained", "network", "words"),
    [
        (build, lambda: GeoReg(), "network: wanted an encoder with the tensors"),
        (build, small_fcn, "network: wanted an encoder with the tensors"),
        (build, lambda: TransMorph(dataclasses.replace(SMALL, channels=16)), "another shape"),
        (build, lambda: TransMorph(dataclasses.replace(SMALL, depths=(1, 2))), "missing, further"),
        (build, lambda: nn.Linear(2, 2), "network: wanted a module with an encoder, got Linear"),
        (build, tied, "shares no tensor with the rest, got .*tied"),
        (spoilt, lambda: TransMorph(SMALL), "embed.bias: wanted finite"),
    ],
)
def test_transfer_refuses_what_it_cannot_do_whole(pretrained, network, words) -> None:
    network = network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=words):
        pretraining.transfer(pretrained(), network)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(before[name]), name


# --- At the door --------------------------------------------------------------------------------

GOOD = torch.rand(1, 1, 16, 24)


@pytest.mark.parametrize(
    ("moving", "fixed", "error", "words"),
    [
        (GOOD[..., :20], GOOD[..., :20], ValueError, ["moving", "multiples of 8", "(16, 20)"]),
        (GOOD[..., :8, :8], GOOD[..., :8, :8], ValueError, ["moving", "16 along an axis"]),
        (GOOD.expand(-1, 2, -1, -1), GOOD, ValueError, ["moving", "(1, 2, 16, 24)"]),
        (GOOD, GOOD[..., :16], ValueError, ["moving, fixed"]),
        (GOOD, GOOD * math.inf, ValueError, ["fixed", "384 NaN or infinite"]),
        (GOOD.double(), GOOD.double(), TypeError, ["moving", "float32"]),
        (GOOD[0], GOOD, ValueError, ["moving", "(1, 16, 24)"]),
        (GOOD.long(), GOOD, TypeError, ["moving", "int64"]),
    ],
)
def test_bad_images_are_refused_at_the_door(moving, fixed, error, words) -> None:
    with pytest.raises(error) as caught:
        moved()(moving, fixed)
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_encoder_of_pairs_is_refused() -> None:
    with pytest.raises(TypeError, match=r"encoder: wanted .* got Linear without dimensions"):
        PretrainingNetwork(nn.Linear(2, 2))
    encoder = transmorph.Encoder(SMALL)
    with pytest.raises(ValueError, match="features"):
        PretrainingNetwork(encoder, features=0)
    for strides in ((8,), (4, 8), (8, 3)):
        encoder.strides = strides
        with pytest.raises(ValueError, match="encoder: wanted one stride per map"):
            PretrainingNetwork(encoder)


def test_light_decoders_are_two_convolutions_and_an_interpolation() -> None:
    torch.manual_seed(0)
    decoder, x = pretraining.LightDecoder(3, 4, 6, 2), torch.rand(2, 4, 3, 4, 5)
    norm = nn.InstanceNorm3d(6)
    expected = F.leaky_relu(norm(decoder.first(x)), 0.01)
    expected = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)(expected)
    expected = F.leaky_relu(norm(decoder.second(expected)), 0.01)
    torch.testing.assert_close(decoder(x), expected)


def test_the_embedded_encoder_fits_the_tiny_network_and_answers_to_its_images() -> None:
    encoder = pretraining.load_pretrained()
    network = transmorph.TransMorph(transmorph.PRESETS["tiny"])
    written = pretraining.transfer(encoder, network)
    assert len(written) == len(network.encoder.state_dict())
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 1, 1, 40, 48, 40, generator=generator)
    with torch.no_grad():
        maps = [network.encoder.eval()(*pair) for pair in ((moving, fixed), (fixed, moving))]
    assert [x.shape[2:] for x in maps[0]] == [(5, 6, 5), (10, 12, 10), (20, 24, 20)]
    assert all(x.std() > 0.1 for x in maps[0])  # every stage sees something
    assert not any(torch.allclose(*both) for both in zip(*maps, strict=True))


def test_weights_that_are_no_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'random-shapes-tiny'"):
        pretraining.load_pretrained("random-shapes-small")
