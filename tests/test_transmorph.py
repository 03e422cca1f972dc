"""TransMorph: attention against plain loops, its sizes against the paper, and that it registers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reglib import synth
from reglib.geometry.fields import integrate, upsample_field
from reglib.geometry.sampling import warp, warp_labels
from reglib.geometry.smoothing import pool
from reglib.methods import transmorph
from reglib.methods.network import Network
from reglib.methods.transmorph import PRESETS, Settings, TransMorph
from reglib.objectives.metrics import dice
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc
from reglib.registration import register
from reglib.training import fit
from reglib.weights import save_weights

SMALL = Settings(
    window=(3, 2),
    patch=4,
    channels=8,
    depths=(2, 2),
    heads=(2, 4),
    expansion=2,
    features=4,
    time_steps=2,
    drop_path=0.2,
)
SETTINGS = {2: SMALL, 3: dataclasses.replace(SMALL, window=(2, 3, 2), patch=2)}
SHAPES = {2: (32, 48), 3: (16, 24, 8)}


def moved(settings: Settings, *, checkpointing: bool = False) -> TransMorph:
    """A network with heads large enough to move things, in evaluation mode."""
    torch.manual_seed(0)
    network = TransMorph(settings, checkpointing=checkpointing)
    for step in network.steps:
        nn.init.normal_(step.head.weight, std=0.1)
    return network.eval()


def images(dimensions: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 1, *SHAPES[dimensions], generator=generator, dtype=dtype)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- Sizes --------------------------------------------------------------------------------------


def test_the_paper_s_network_has_the_paper_s_size() -> None:
    network = TransMorph(PRESETS["paper"])
    # By hand: 12 C^2 + 10 C and 8 heads of a 3 x 5 x 5 table a block, and so on.
    assert parameters(network.encoder) == 11_853_528
    assert round(parameters(network.encoder) / 1e6, 2) == 11.85
    assert round(parameters(network) / 1e6, 1) == 17.7
    assert network.encoder.channels == (384, 192, 96)
    # Of the pooled images 16, 8 and 4: 5 x 6 x 7, 10 x 12 x 14 and 20 x 24 x 28 of them.
    assert network.encoder.strides == (32, 16, 8)
    assert network.card["input"]["size_multiple"] == 32


def test_the_small_network_and_its_optimiser_fit_into_14_mib() -> None:
    network = TransMorph(PRESETS["small"])
    assert parameters(network) <= 1.2e6
    stored = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    # AdamW keeps two moments of every parameter.
    assert stored + 2 * 4 * parameters(network) <= 14 * 2**20
    assert all(n % network.card["input"]["size_multiple"] == 0 for n in (80, 96, 80))


def test_the_tiny_encoder_is_below_1_mb() -> None:
    network = TransMorph(PRESETS["tiny"])
    stored = network.encoder.state_dict().values()
    assert sum(t.numel() * t.element_size() for t in stored) < 1e6
    assert all(n % network.card["input"]["size_multiple"] == 0 for n in (40, 48, 40))


# --- What comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2])
def test_the_field_is_the_integral_of_the_velocity(dimensions, batch, factor) -> None:
    network = moved(dataclasses.replace(SETTINGS[dimensions], pool=factor))
    x = images(dimensions, batch)
    output = network(x, x.flip(2))
    level = tuple(n // factor for n in SHAPES[dimensions])
    assert output.velocity.shape == (batch, dimensions, *level)
    assert output.field.shape == (batch, dimensions, *SHAPES[dimensions])
    assert output.velocity.abs().max() > 0.1  # voxels
    expected = upsample_field(integrate(output.velocity), factor, SHAPES[dimensions])
    torch.testing.assert_close(output.field, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_training_starts_at_the_identity(name) -> None:
    torch.manual_seed(0)
    settings = dataclasses.replace(PRESETS[name], window=PRESETS[name].window[:2])
    pair = synth.random_pair((96, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        field = TransMorph(settings).eval()(pair.moving, pair.fixed).field
    assert field.norm(dim=1).max() < 1e-3  # voxels


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_pair_gives_in_a_batch_what_it_gives_alone(dimensions) -> None:
    network = moved(SETTINGS[dimensions])
    moving, fixed = images(dimensions, 3), images(dimensions, 3).flip(2)
    together = network(moving, fixed).field
    for i in range(3):
        alone = network(moving[i : i + 1], fixed[i : i + 1]).field
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_every_weight_is_trained(dimensions, norm) -> None:
    network = moved(dataclasses.replace(SETTINGS[dimensions], norm=norm, drop_path=0.0)).train()
    moving, fixed = images(dimensions, 2), images(dimensions, 2).flip(2)
    terms = transmorph.objective(network(moving, fixed), moving, fixed)
    torch.stack(tuple(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_velocity_keeps_its_precision_under_autocast() -> None:
    network, x = moved(SMALL), images(2, 2)
    plain = network(x, x.flip(2)).field
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(x, x.flip(2))
    assert mixed.field.dtype == mixed.velocity.dtype == torch.float32
    # Features have lost their third digit; velocities with so few bits would be multiples of 2^-k.
    assert (mixed.field - plain).abs().mean() < 0.03 * plain.abs().mean()
    assert not mixed.velocity.equal(mixed.velocity.bfloat16().float())
    assert moved(SMALL).double()(x.double(), x.double()).field.dtype == torch.float64


# --- The encoder, token by token ----------------------------------------------------------------

Tokens = dict[tuple[int, ...], Tensor]


def everywhere(shape) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def plain_attention(
    attention: transmorph.WindowAttention, x: Tokens, shape, window, shift
) -> Tokens:
    """Every token sees those that the shifted lattice of windows puts into one box with it."""
    heads, channels = attention.heads, next(iter(x.values())).shape[0]
    lattice = [s if w < n else 0 for s, w, n in zip(shift, window, shape, strict=True)]
    weight = attention.queries_keys_values.weight
    width = channels // heads
    out = {}
    for i in everywhere(shape):
        box = [(p - s) // w for p, s, w in zip(i, lattice, window, strict=True)]
        seen = [
            j
            for j in everywhere(shape)
            if [(p - s) // w for p, s, w in zip(j, lattice, window, strict=True)] == box
        ]
        parts = []
        for h in range(heads):
            rows = [weight[k * channels + h * width :][:width] for k in range(3)]
            logits = []
            for j in seen:
                row = 0
                for a, b, w in zip(i, j, window, strict=True):
                    row = row * (2 * w - 1) + (a - b + w - 1)
                product = (rows[0] @ x[i]) @ (rows[1] @ x[j]) / math.sqrt(width)
                logits.append(product + attention.bias[row, h])
            shares = torch.stack(logits).softmax(0)
            parts.append(sum(s * (rows[2] @ x[j]) for s, j in zip(shares, seen, strict=True)))
        out[i] = attention.out(torch.cat(parts))
    return out


def plain_encoder(encoder: transmorph.Encoder, moving: Tensor, fixed: Tensor) -> list[Tensor]:
    """The encoder for one pair, one token at a time."""
    settings = encoder.settings
    d, p, window = settings.dimensions, settings.patch, settings.window
    both = pool(torch.cat([moving, fixed], 1), settings.pool)[0]
    shape = tuple(n // p for n in both.shape[1:])
    x: Tokens = {}
    for i in everywhere(shape):
        patch = both[(slice(None), *(slice(k * p, (k + 1) * p) for k in i))]
        axes = tuple(range(1, d + 2))
        x[i] = encoder.norm_embedded((encoder.embed.weight * patch).sum(axes) + encoder.embed.bias)
    features = []
    for stage, blocks in enumerate(encoder.stages):
        if stage:
            merge, shape = encoder.merges[stage - 1], tuple(n // 2 for n in shape)
            x = {
                i: merge.reduce(
                    merge.norm(
                        torch.cat(
                            [
                                x[tuple(2 * k + o for k, o in zip(i, corner, strict=True))]
                                for corner in itertools.product((0, 1), repeat=d)
                            ]
                        )
                    )
                )
                for i in everywhere(shape)
            }
        for b, block in enumerate(blocks):
            shift = [w // 2 if b % 2 else 0 for w in window]
            normed = {i: block.norm_attention(v) for i, v in x.items()}
            step = plain_attention(block.attention, normed, shape, window, shift)
            x = {i: v + step[i] for i, v in x.items()}
            x = {i: v + block.mix(block.norm_mix(v)) for i, v in x.items()}
        out = torch.stack([encoder.norms[stage](x[i]) for i in everywhere(shape)], 1)
        features.append(out.view(1, -1, *shape))
    return features[::-1]


@pytest.mark.parametrize(
    ("window", "shape"),
    [
        ((3, 2), (12, 16)),  # windows tile the first stage, and cover an axis of the second
        ((2, 4), (20, 24)),  # neither size of the first stage is a whole number of windows
        ((5, 3), (12, 28)),
        ((2, 3, 2), (8, 8, 12)),
        ((3, 2, 2), (8, 12, 4)),
    ],
)
def test_the_encoder_equals_one_that_goes_token_by_token(window, shape) -> None:
    """Windows, shift, padding, mask, bias, merging, norms and their order, to rounding."""
    torch.manual_seed(0)
    settings = Settings(
        window=window, pool=1, patch=2, channels=4, depths=(2, 2), heads=(2, 2), expansion=2
    )
    encoder = transmorph.Encoder(settings).double().eval()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.5)
    moving, fixed = torch.rand(2, 1, 1, *shape, dtype=torch.float64)
    with torch.no_grad():
        for ours, plain in zip(
            encoder(moving, fixed), plain_encoder(encoder, moving, fixed), strict=True
        ):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_a_window_that_covers_the_image_is_global_attention() -> None:
    """PyTorch's own module is the oracle; shifted blocks then see the same as the others."""
    torch.manual_seed(0)
    settings = Settings(window=(6, 8), pool=1, patch=2, channels=8, depths=(2,), heads=(2,))
    encoder = transmorph.Encoder(settings).double().eval()
    reference = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    moving, fixed = torch.rand(2, 2, 1, 12, 16, dtype=torch.float64)
    block = encoder.stages[0][0]
    tokens = encoder.norm_embedded(encoder.embed(torch.cat([moving, fixed], 1)).movedim(1, -1))
    with torch.no_grad():
        x = tokens.flatten(1, 2)
        for block in encoder.stages[0]:
            block.attention.bias.zero_()
            reference.in_proj_weight.copy_(block.attention.queries_keys_values.weight)
            reference.out_proj.weight.copy_(block.attention.out.weight)
            normed = block.norm_attention(x)
            x = x + reference(normed, normed, normed)[0] + block.attention.out.bias
            x = x + block.mix(block.norm_mix(x))
        expected = encoder.norms[0](x).movedim(1, 2).unflatten(2, (6, 8))
        torch.testing.assert_close(encoder(moving, fixed)[0], expected, rtol=1e-9, atol=1e-9)


def test_the_bias_depends_on_the_displacement_alone() -> None:
    """Without queries, token i sees j by softmax b(i - j): shifting both changes nothing."""
    torch.manual_seed(0)
    attention = transmorph.WindowAttention(4, 1, (2, 3))
    with torch.no_grad():
        attention.queries_keys_values.weight[:4].zero_()
    tokens = list(everywhere((2, 3)))
    index = transmorph.relative_index((2, 3), (2, 3))
    rows: dict[tuple[int, ...], set[int]] = {}
    for (a, i), (b, j) in itertools.product(enumerate(tokens), repeat=2):
        displacement = (i[0] - j[0], i[1] - j[1])
        rows.setdefault(displacement, set()).add(int(index[a, b]))
    # One row each, and every row of the table for one displacement.
    assert all(len(r) == 1 for r in rows.values())
    assert len(set.union(*rows.values())) == len(rows) == len(attention.bias) == 3 * 5


def test_without_a_mask_no_bias_is_repeated_for_windows_or_samples() -> None:
    encoder = transmorph.Encoder(dataclasses.replace(SMALL, drop_path=0.0))
    shapes = []
    original = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor) -> Tensor:
        shapes.append((tuple(q.shape), tuple(attn_mask.shape)))
        return original(q, k, v, attn_mask=attn_mask)

    x = torch.rand(2, 1, 48, 32)  # 6 x 4 tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        encoder(x, x)
    assert shapes[0] == ((2, 4, 2, 6, 4), (2, 6, 6))  # no mask: heads only
    assert shapes[1] == ((2, 4, 2, 6, 4), (4, 2, 6, 6))  # shifted: windows and heads, no batch


# --- The decoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_fusion_is_the_convolution_of_the_concatenation(dimensions) -> None:
    torch.manual_seed(0)
    fusion = transmorph.Fusion(dimensions, 3, 5, 4).double()
    deep, skip = (torch.rand(2, c, *SHAPES[dimensions]).double() for c in (3, 5))
    expected = torch.cat([deep, skip], 1)
    norm = (nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d)(4)
    for conv in (fusion.first, fusion.second):
        expected = F.leaky_relu(norm(conv(expected)), 0.01)
    torch.testing.assert_close(fusion(deep, skip), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [(5, 8), (4, 5, 6), (20, 30, 40)], ids=str)
def test_small_volumes_are_convolved_like_any_others(shape, batch) -> None:
    """The result and every gradient: a single small volume takes another way on a CPU."""
    torch.manual_seed(0)
    conv = (nn.Conv2d if len(shape) == 2 else nn.Conv3d)(4, 3, 3, padding=1).double()
    x, weights = torch.rand(batch, 4, *shape).double(), torch.rand(batch, 3, *shape).double()
    results = []
    for function in (conv, lambda x: transmorph.convolve(x, conv.weight, conv.bias)):
        leaves = [x.clone().requires_grad_(), *conv.parameters()]
        y = function(leaves[0])
        results.append((y, *torch.autograd.grad((weights * y).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_time_steps_compose_what_they_find_in_the_warped_image(dimensions) -> None:
    network = moved(dataclasses.replace(SETTINGS[dimensions], time_steps=3))
    seen: list[tuple[Tensor, ...]] = []
    for step in network.steps:
        step.register_forward_hook(lambda _, inputs, found: seen.append((*inputs, found)))
    moving, fixed = images(dimensions, 2), images(dimensions, 2).flip(2)
    output = network(moving, fixed)
    velocity = torch.zeros_like(output.velocity)
    for deep, warped, level, found in seen:
        assert deep is seen[0][0]  # interpolated once
        torch.testing.assert_close(level, pool(fixed, 2))
        torch.testing.assert_close(warped, warp(pool(moving, 2), velocity))
        velocity = velocity + warp(found, velocity)  # v_t after the field so far
    torch.testing.assert_close(output.velocity, velocity)


def test_features_lie_at_the_nodes_of_a_pyramid_level() -> None:
    """Node i of a level pooled by s is at s i + (s - 1) / 2: linear features stay linear inside."""
    ramp = torch.arange(24.0).view(1, 1, 24, 1) + 3 * torch.arange(16.0)
    for factor in (2, 4):
        again = transmorph.upsample_features(pool(ramp, factor), factor)
        inside = (..., slice(factor, -factor), slice(factor, -factor))
        torch.testing.assert_close(again[inside], ramp[inside], rtol=0, atol=1e-5)


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_checkpointing_changes_no_bit(dimensions) -> None:
    """Outputs, gradients and running statistics, with blocks dropped at random."""
    moving, fixed = images(dimensions, 2), images(dimensions, 2).flip(2)
    results = []
    for checkpointing in (False, True):
        network = moved(SETTINGS[dimensions], checkpointing=checkpointing).train()
        network.encoder.generator = torch.Generator().manual_seed(5)
        output = network(moving, fixed)
        terms = transmorph.objective(output, moving, fixed)
        torch.stack(tuple(terms.values())).sum().backward()
        gradients = {n: p.grad for n, p in network.named_parameters()}
        results.append((output.field, gradients, dict(network.named_buffers())))
    (field, gradients, buffers), (field_again, gradients_again, buffers_again) = results
    assert field.equal(field_again)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.equal(gradients_again[name]), name
    assert any("running_mean" in name for name in buffers)
    for name, buffer in buffers.items():
        assert buffer.equal(buffers_again[name]), name


def test_checkpointing_keeps_less() -> None:
    """What autograd saves, in bytes, before the backward pass."""
    kept = []
    for checkpointing in (False, True):
        network = moved(SETTINGS[3], checkpointing=checkpointing).train()
        sizes: dict[int, int] = {}

        def note(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            output = network(images(3), images(3).flip(2))
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        kept.append(sum(n for pointer, n in sizes.items() if pointer not in own))
        del output
    assert kept[1] < 0.5 * kept[0]


def test_stochastic_depth_rises_linearly_and_keeps_the_mean() -> None:
    encoder = transmorph.Encoder(PRESETS["paper"])
    drops = [block.drop for blocks in encoder.stages for block in blocks]
    torch.testing.assert_close(drops, [0.3 * k / 12 for k in range(13)])
    block = encoder.stages[2][4].train()
    draws = block.weights(torch.zeros(20000, 3, 3), torch.Generator().manual_seed(0))
    assert draws.shape == (2, 20000, 1, 1)
    torch.testing.assert_close(draws.unique(), torch.tensor([0.0, 1 / 0.7]))
    # The mean of 40,000 draws of variance 0.43 is 1 to a standard deviation of 0.0033.
    torch.testing.assert_close(draws.mean(), torch.tensor(1.0), atol=0.015, rtol=0)
    assert block.eval().weights(torch.zeros(4, 3, 3), None) is None


def test_a_dropped_block_is_left_out() -> None:
    torch.manual_seed(0)
    settings = dataclasses.replace(SMALL, depths=(1,), heads=(2,))
    encoder = transmorph.Encoder(settings)
    block, seen = encoder.stages[0][0], []
    block.drop = 1 - 1e-9  # of 2 samples none is kept
    block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    encoder(images(2, 2), images(2, 2))
    assert seen[0][0].equal(seen[0][1])
    encoder.eval()(images(2, 2), images(2, 2))
    assert not seen[1][0].equal(seen[1][1])


def test_the_generator_decides_what_is_dropped() -> None:
    encoder = transmorph.Encoder(dataclasses.replace(SMALL, drop_path=0.5))
    x = images(2, 3)

    def features(seed: int) -> Tensor:
        encoder.generator = torch.Generator().manual_seed(seed)
        return encoder(x, x.flip(2))[0]

    before = torch.get_rng_state()
    assert features(0).equal(features(0))
    assert not features(0).equal(features(1))
    assert torch.get_rng_state().equal(before)


def test_objective_is_similarity_and_regularity_of_the_field() -> None:
    network, moving, fixed = moved(SMALL), images(2, 2), images(2, 2).flip(3)
    output = network(moving, fixed)
    similarity = functools.partial(lncc, window=5)
    terms = transmorph.objective(
        output, moving, fixed, moving, fixed, similarity=similarity, regularity_weight=0.5
    )
    expected = lncc(warp(moving, output.field), fixed, window=5)
    torch.testing.assert_close(terms["similarity"], expected)
    torch.testing.assert_close(terms["regularity"], 0.5 * diffusion(output.field))
    assert transmorph.objective(output, moving, fixed)["regularity"] == 2 * terms["regularity"]


def test_training_on_random_pairs_teaches_it_to_register_unseen_ones(train_on_shapes) -> None:
    torch.manual_seed(0)
    settings = dataclasses.replace(SMALL, window=(6, 8), patch=2, channels=16, depths=(1, 1))
    network = TransMorph(dataclasses.replace(settings, features=16, time_steps=1, norm="instance"))

    def objective(output, moving, fixed, *_labels):
        return transmorph.objective(output, moving, fixed)

    train_on_shapes(network, objective, (48, 64), steps=80, lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    unseen = synth.random_pair((48, 64), batch=32, cell=16, generator=generator)
    with torch.no_grad():
        field = network(unseen.moving, unseen.fixed).field

    def overlap(u: Tensor) -> float:
        warped = warp_labels(unseen.moving_labels, u, padding="border")
        return float(dice(warped, unseen.fixed_labels, labels=range(16)).nanmean())

    # 0.65 before; about 0.74 afterwards. Control: the field of another pair only harms.
    identity = overlap(torch.zeros_like(field))
    assert overlap(field) > identity + 0.06
    assert overlap(field.roll(1, 0)) < identity


def test_fit_lowers_the_loss() -> None:
    """As users call it, on one pair."""
    network = TransMorph(dataclasses.replace(SMALL, drop_path=0.0))
    pair = synth.random_pair((32, 48), batch=2, generator=torch.Generator().manual_seed(0))
    pairs = itertools.repeat((pair.moving, pair.fixed))
    history = fit(network, pairs, transmorph.objective, steps=30, lr=2e-3, progress=False)
    assert history["loss"][-1] < history["loss"][0] - 0.05


# --- At the door, and files ---------------------------------------------------------------------

GOOD = torch.rand(1, 1, 32, 48)


@pytest.mark.parametrize(
    ("moving", "fixed", "error", "words"),
    [
        (GOOD[0], GOOD, ValueError, ["moving", "(1, 32, 48)"]),
        (GOOD, GOOD[..., :32], ValueError, ["moving, fixed", "(1, 1, 32, 32)"]),
        (GOOD, GOOD.expand(2, -1, -1, -1), ValueError, ["moving, fixed"]),
        (GOOD[..., :40], GOOD[..., :40], ValueError, ["moving", "multiples of 16", "(32, 40)"]),
        (GOOD.expand(-1, 3, -1, -1), GOOD, ValueError, ["moving", "(1, 3, 32, 48)"]),
        (GOOD[..., None].expand(-1, -1, -1, -1, 16), GOOD, ValueError, ["moving", "2 spatial"]),
        (GOOD, GOOD * math.nan, ValueError, ["fixed", "1536 NaN"]),
        ((GOOD * 255).byte(), GOOD, TypeError, ["moving", "uint8"]),
        (GOOD.numpy(), GOOD, TypeError, ["moving", "ndarray"]),
        (GOOD.double(), GOOD.double(), TypeError, ["moving", "float32", "float64"]),
        (GOOD[:0], GOOD[:0], ValueError, ["moving", "(0, 1, 32, 48)"]),
    ],
)
def test_bad_images_are_refused_at_the_door(moving, fixed, error, words) -> None:
    with pytest.raises(error) as caught:
        moved(SMALL)(moving, fixed)
    for word in words:
        assert word in str(caught.value)


def test_a_network_in_half_precision_is_refused() -> None:
    with pytest.raises(TypeError, match="autocast"):
        moved(SMALL).half()(GOOD.half(), GOOD.half())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"window": (3,)}, "window"),
        ({"window": 3}, "window"),
        ({"window": (3, 0)}, "window"),
        ({"window": (3.5, 2)}, "window"),
        ({"inputs": 0}, "inputs"),
        ({"pool": 1.5}, "pool"),
        ({"patch": 1}, "patch"),
        ({"patch": 6}, "patch"),
        ({"channels": 9}, "channels"),
        ({"depths": ()}, "depths"),
        ({"depths": (2, 2, 2)}, "heads"),
        ({"heads": (3, 4)}, "heads"),
        ({"expansion": 0}, "expansion"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path": math.nan}, "drop_path"),
        ({"drop_path": "0"}, "drop_path"),
        ({"time_steps": 0}, "time_steps"),
        ({"norm": "layer"}, "norm"),
    ],
)
def test_bad_settings_are_refused(change, word) -> None:
    with pytest.raises((TypeError, ValueError), match=word):
        dataclasses.replace(SMALL, **change)


def test_settings_must_be_settings() -> None:
    with pytest.raises(TypeError, match="settings"):
        TransMorph("tiny")  # type: ignore[arg-type]


def test_register_pads_to_what_the_network_takes() -> None:
    network = moved(SMALL)
    x = torch.rand(1, 1, 37, 42)
    result = register(x, x.flip(2), Network(network))
    assert result.field.shape == (1, 2, 37, 42)
    assert any("size_multiple 16" in note for note in result.settings["notes"])


def test_weights_survive_a_round_trip(tmp_path) -> None:
    network, path = moved(SMALL), tmp_path / "network.safetensors"
    transmorph.save(network, path, card={"trained_on": "nothing", "method": "overwritten"})
    again = transmorph.load(path, checkpointing=True)
    assert again.card["trained_on"] == "nothing"
    assert again.card["input"] == network.card["input"]
    assert again.settings == network.settings
    assert again.checkpointing
    assert not again.training
    x = images(2, 2)
    assert torch.equal(again(x, x.flip(2)).field, network(x, x.flip(2)).field)


def test_an_encoder_in_half_precision_is_read_in_single_precision(tmp_path) -> None:
    encoder, path = moved(SMALL).encoder, tmp_path / "encoder.safetensors"
    transmorph.save(copy.deepcopy(encoder).half(), path, card={})
    again = transmorph.load_encoder(path)
    for name, tensor in again.state_dict().items():
        assert tensor.equal(encoder.state_dict()[name].half().float()), name
    assert path.stat().st_size < 2.2 * parameters(encoder) + 4096


def test_broken_weight_files_are_refused(tmp_path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="safetensors"):
        transmorph.load(path)
    with pytest.raises(OSError, match="missing"):
        transmorph.load(tmp_path / "missing.safetensors")
    transmorph.save(moved(SMALL).encoder, path, card={})
    with pytest.raises(ValueError, match="'transmorph', got 'transmorph encoder'"):
        transmorph.load(path)
    for card in (
        {"method": "transmorph"},
        {"method": "transmorph", "settings": {"no_such": 1}},
        {"method": "transmorph", "settings": {"window": [3, 2]}},
    ):
        save_weights(moved(SMALL), path, card)
        with pytest.raises(ValueError, match=f"path: wanted .* {path}"):
            transmorph.load(path)
