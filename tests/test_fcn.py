"""FCN: its arithmetic and its loss against plain forms, its training, and its use on a pair."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn

from reglib.data import datasets
from reglib.geometry.sampling import warp, warp_labels
from reglib.geometry.smoothing import gaussian_smooth
from reglib.methods import fcn
from reglib.methods.classical import Velocity
from reglib.methods.network import Network
from reglib.methods.pair import Iterate
from reglib.objectives.metrics import dice
from reglib.objectives.similarity import ncc
from reglib.registration import register
from reglib.synth import gaussian_diffeomorphism
from reglib.training import fit
from reglib.weights import save_weights

SHAPES = {2: (16, 24), 3: (8, 16, 24)}
SMALL = {2: (8, 12, 16), 3: (4, 6, 8)}

#: Voxels of the images per voxel of each resolution, finest first.
FACTORS = {"paper": [1, 2, 4], "no pooling": [1], "interpolated": [1], "composed": [1, 4, 8]}

AnyFCN = fcn.FCN | fcn.ComposedFCN


def new(name: str, dimensions: int, channels: tuple[int, ...], pool: int = 2) -> AnyFCN:
    """A network of one of the presets, or ours."""
    torch.manual_seed(0)
    if name == "composed":
        widths = {"channels": channels, "decoder_channels": channels}
        return fcn.ComposedFCN(fcn.ComposedSettings(dimensions, pool=pool, **widths))
    return fcn.FCN(replace(fcn.PRESETS[name], dimensions=dimensions, channels=channels))


def small(name: str = "paper", dimensions: int = 2) -> AnyFCN:
    """A narrow network whose regression layers are large enough to move things."""
    network = new(name, dimensions, SMALL[dimensions])
    for layer in network.regressions:
        nn.init.normal_(layer.conv.weight, std=0.05)
    return network.eval()


def images(
    dimensions: int, batch: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A moving and a fixed image of smooth noise."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.rand(2 * batch, 1, *SHAPES[dimensions], generator=generator)
    x = gaussian_smooth(x, 1.0)
    x = (x - x.amin()) / (x.amax() - x.amin())
    return x[:batch].to(dtype), x[batch:].to(dtype)


every_network = pytest.mark.parametrize("name", FACTORS)
both_dimensions = pytest.mark.parametrize("dimensions", [2, 3])


# --- The network ------------------------------------------------------------------------------


def sizes_by_the_book(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Output size of a convolution, pooling or transposed convolution, from its definition."""

    def along(value: object, axis: int) -> int:
        return int(value[axis]) if isinstance(value, tuple) else int(value)

    out = []
    for axis, n in enumerate(shape):
        k, s, p = (along(getattr(layer, x), axis) for x in ("kernel_size", "stride", "padding"))
        if isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
            out.append((n - 1) * s - 2 * p + k + along(layer.output_padding, axis))
        else:
            out.append((n + 2 * p - k) // s + 1)
    return tuple(out)


def test_the_layers_are_those_of_the_paper() -> None:
    """For its images of 32 x 48 x 48: channels, sizes and order as the text gives them."""
    network, seen = fcn.FCN().eval(), []
    kinds = (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert output.shape[2:] == sizes_by_the_book(layer, tuple(inputs[0].shape[2:]))
        assert all(k in (3, (3, 3, 3)) for k in [layer.kernel_size])
        seen.append((type(layer).__name__, output.shape[1], output.shape[2]))

    for layer in network.modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(note)
    x = torch.rand(1, 1, 32, 48, 48)
    with torch.no_grad():
        output = network(x, x.flip(2))
    assert seen == [
        ("Conv3d", 32, 32),
        ("MaxPool3d", 32, 16),
        ("Conv3d", 64, 16),
        ("MaxPool3d", 64, 8),
        ("Conv3d", 128, 8),
        ("Conv3d", 3, 8),
        ("ConvTranspose3d", 64, 16),
        ("Conv3d", 64, 16),
        ("Conv3d", 3, 16),
        ("ConvTranspose3d", 32, 32),
        ("Conv3d", 3, 32),
    ]
    assert [level.field.shape[2:] for level in output.levels] == [
        (32, 48, 48),
        (16, 24, 24),
        (8, 12, 12),
    ]
    weights = 27 * (2 * 32 + 32 * 64 + 64 * 128 + 128 * 64 + 64 * 64 + 64 * 32)
    regressions = sum(27 * c * 3 + 3 for c in (128, 64, 32))
    norms = 2 * (32 + 64 + 128 + 64 + 64 + 32)
    assert sum(p.numel() for p in network.parameters()) == weights + regressions + norms


@every_network
@both_dimensions
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_field_is_on_the_grid_of_the_images(name: str, dimensions: int, batch: int) -> None:
    network = small(name, dimensions)
    moving, fixed = images(dimensions, batch)
    output = network(moving, fixed)
    assert output.field.shape == (batch, dimensions, *SHAPES[dimensions])
    assert output.levels[0].field is output.field
    assert [level.factor for level in output.levels] == FACTORS[name]
    for factor, field in output.levels:
        assert field.shape[2:] == tuple(n // factor for n in SHAPES[dimensions])


@every_network
@both_dimensions
@pytest.mark.parametrize("training", [True, False])
def test_a_new_network_is_close_to_the_identity(name: str, dimensions: int, training: bool) -> None:
    channels = (32, 64, 128) if name != "composed" else (16, 32, 32)
    network = new(name, dimensions, channels).train(training)
    output = network(*images(dimensions, 2))
    for factor, field in output.levels:
        assert 0 < factor * float(field.detach().abs().max()) < 1e-3  # voxels of the images


@every_network
@both_dimensions
def test_a_pair_gives_in_a_batch_what_it_gives_alone(name: str, dimensions: int) -> None:
    """In evaluation mode; in training BatchNorm looks at the batch, and InstanceNorm does not."""
    network = small(name, dimensions)
    moving, fixed = images(dimensions, 3)
    for training in (False, True) if name == "composed" else (False,):
        network.train(training)
        together = network(moving, fixed).field
        for i in range(3):
            alone = network(moving[i : i + 1], fixed[i : i + 1]).field
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_batch_norm_in_training_does_look_at_the_batch() -> None:
    network, (moving, fixed) = small().train(), images(2, 3)
    together = network(moving, fixed).field[:1]
    assert (together - network(moving[:1], fixed[:1]).field).abs().max() > 1e-2


@every_network
@both_dimensions
def test_every_weight_is_trained(name: str, dimensions: int) -> None:
    network = small(name, dimensions).train()
    moving, fixed = images(dimensions, 2)
    terms = fcn.objective(network(moving, fixed), moving, fixed)
    torch.stack(tuple(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_network
@both_dimensions
def test_half_precision_is_safe(name: str, dimensions: int) -> None:
    """Under autocast fields stay float32, the loss finite, and both close to what they were."""
    network, (moving, fixed) = small(name, dimensions), images(dimensions, 2)
    plain = network(moving, fixed).field
    double = small(name, dimensions).double()
    assert double(moving.double(), fixed.double()).field.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for cast in (torch.float32, torch.bfloat16):
            mixed = network(moving.to(cast), fixed.to(cast))
            assert all(level.field.dtype == torch.float32 for level in mixed.levels)
        loss = sum(fcn.objective(network(moving, fixed), moving, fixed).values())
        assert loss.dtype == torch.float32
    # Features have three digits, and their errors add up over six layers.
    assert (network_field(network, moving, fixed) - plain).norm() < 0.1 * plain.norm()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def network_field(network: fcn.FCN, moving: Tensor, fixed: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        return network(moving, fixed).field


# --- Plain forms ------------------------------------------------------------------------------


def read(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Components ``(C, *S)`` at places ``(D, *T)``, linear, clamped: SciPy."""
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in field])


def upsampled(field: np.ndarray, factor: int) -> np.ndarray:
    """To the grid that was pooled by ``factor``: nodes at ``factor i + (factor - 1) / 2``."""
    axes = [range(n) for n in field.shape[1:]]
    fine = np.indices([factor * n for n in field.shape[1:]])
    at = np.moveaxis((fine - (factor - 1) / 2) / factor, 0, -1)
    return factor * np.stack(
        [RegularGridInterpolator(axes, c, bounds_error=False, fill_value=None)(at) for c in field]
    )


def pooled(image: np.ndarray, factor: int) -> np.ndarray:
    """Means over cells, by a loop."""
    shape = [n // factor for n in image.shape]
    out = np.empty(shape)
    for i in itertools.product(*map(range, shape)):
        out[i] = image[tuple(slice(factor * k, factor * (k + 1)) for k in i)].mean()
    return out


@both_dimensions
def test_the_coarse_field_is_interpolated_linearly(dimensions: int) -> None:
    network = small("interpolated", dimensions).double()
    coarse: list[Tensor] = []
    network.regressions[-1].register_forward_hook(lambda *a: coarse.append(a[-1]))
    field = network(*images(dimensions, 2, torch.float64)).field
    for i in range(2):
        expected = upsampled(coarse[0][i].detach().numpy(), 4)
        np.testing.assert_allclose(field[i].detach().numpy(), expected, atol=1e-10)


@both_dimensions
def test_composed_levels_go_on_from_one_another(dimensions: int) -> None:
    """Features warped, velocities integrated and fields composed by SciPy, level by level."""
    network = small("composed", dimensions).double()
    velocities: list[Tensor] = []
    given: list[Tensor] = []
    features: list[Tensor] = []
    for layer in network.regressions:
        layer.register_forward_hook(lambda *a: velocities.append(a[-1].detach()))
    for layer in network.decoder:
        layer.register_forward_hook(lambda *a: given.append(a[1][0].detach()))
    for layer in network.encoder:
        layer.register_forward_hook(lambda *a: features.append(a[-1].detach()))
    moving, fixed = images(dimensions, 2, torch.float64)
    output = network(moving, fixed)
    levels, features = output.levels[::-1], features[::-1]  # coarsest first, as the decoder
    for b in range(2):
        u = None
        for velocity, level, x, both in zip(velocities, levels, given, features, strict=True):
            step = velocity[b].numpy() / 2**5
            grid = np.indices(step.shape[1:])
            for _ in range(5):
                step = step + read(step, grid + step)
            seen, still = both[b].numpy(), both[2 + b].numpy()
            if u is None:
                u = step
            else:
                before = upsampled(u, 2)
                seen = read(seen, grid + before)
                u = step + read(before, grid + step)
            channels = len(seen)
            np.testing.assert_allclose(x[b, :channels].numpy(), seen, atol=1e-10)
            np.testing.assert_allclose(x[b, channels : 2 * channels].numpy(), still, atol=1e-10)
            expected = upsampled(u, 2) if level.factor == 1 else u
            np.testing.assert_allclose(level.field[b].detach().numpy(), expected, atol=1e-9)


@both_dimensions
def test_the_encoder_sees_one_image_at_a_time(dimensions: int) -> None:
    """Averaged over cells, the moving ones first."""
    network, pair = small("composed", dimensions).double(), images(dimensions, 2, torch.float64)
    given: list[Tensor] = []
    network.encoder[0].register_forward_hook(lambda *a: given.append(a[1][0]))
    network(*pair)
    for x, image in zip(given[0], torch.cat(pair), strict=True):
        np.testing.assert_allclose(x[0].numpy(), pooled(image[0].numpy(), 2), atol=1e-12)


def plain_total_variation(u: np.ndarray, smoothing: float) -> float:
    """Mean over axes of the mean rounded length of forward differences, by a loop."""
    d, means = len(u), []
    for axis in range(d):
        total, count = 0.0, 0
        for i in itertools.product(*map(range, u.shape[1:])):
            if i[axis] + 1 < u.shape[axis + 1]:
                j = tuple(k + (a == axis) for a, k in enumerate(i))
                for c in range(d):
                    g = u[(c, *j)] - u[(c, *i)]
                    total += math.sqrt(g * g + smoothing) - math.sqrt(smoothing)
                    count += 1
        means.append(total / count)
    return sum(means) / d


@both_dimensions
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_objective_equals_plain_loops(dimensions: int, batch: int) -> None:
    """Weights 1, 0.6 and 0.3 of correlation and total variation, on images averaged over cells."""
    generator = torch.Generator().manual_seed(batch)
    moving, fixed = images(dimensions, batch, torch.float64)
    levels = tuple(
        fcn.Level(s, torch.randn(batch, dimensions, *shape, generator=generator).double())
        for s in (1, 2, 4)
        for shape in [tuple(n // s for n in SHAPES[dimensions])]
    )
    output = fcn.Output(levels[0].field, levels)
    terms = fcn.objective(output, moving, fixed, regularity_weight=0.2, reduction="none")
    for b in range(batch):
        similarity = regularity = 0.0
        for (factor, field), weight in zip(levels, (1.0, 0.6, 0.3), strict=True):
            m, f = (pooled(x[b, 0].numpy(), factor) for x in (moving, fixed))
            u = field[b].numpy()
            warped = read(m[None], np.indices(u.shape[1:]) + u)
            r = np.corrcoef(warped.ravel(), f.ravel())[0, 1]
            similarity += weight * (1 - r)
            regularity += weight * 0.2 * plain_total_variation(u, 1e-6)
        assert float(terms["similarity"][b]) == pytest.approx(similarity, abs=1e-8)
        assert float(terms["regularity"][b]) == pytest.approx(regularity, abs=1e-8)
    mean = fcn.objective(output, moving, fixed, torch.ones(1), regularity_weight=0.2)
    for name, values in terms.items():
        torch.testing.assert_close(mean[name], values.mean())


def test_the_final_field_alone_may_be_supervised() -> None:
    network, (moving, fixed) = small(), images(2, 2)
    output = network(moving, fixed)
    terms = fcn.objective(output, moving, fixed, level_weights=(1, 0, 0))
    expected = ncc(warp(moving, output.field), fixed)
    torch.testing.assert_close(terms["similarity"], expected)


# --- Training ---------------------------------------------------------------------------------


def textures(count: int, generator: torch.Generator, size: int = 32) -> Tensor:
    x = gaussian_smooth(torch.rand(count, 1, size, size, generator=generator), 2.0)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


class RandomPairs:
    """An endless stream: textures, and the same through a random diffeomorphism of 3 voxels."""

    def __init__(self, seed: int, *, batch: int = 8) -> None:
        self.generator, self.batch = torch.Generator().manual_seed(seed), batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            moving = textures(self.batch, self.generator)
            u = gaussian_diffeomorphism(
                (32, 32), batch=self.batch, sigma=6.0, amplitude=3.0, generator=self.generator
            ).field
            yield moving, warp(moving, u)


@functools.cache
def trained(name: str) -> tuple[AnyFCN, list[float]]:
    network = new(name, 2, (8, 16, 16), pool=1)
    history = fit(network, RandomPairs(0), fcn.objective, steps=100, lr=3e-3, progress=False)
    return network, history["loss"]


@every_network
def test_a_short_training_registers_unseen_pairs(name: str) -> None:
    """The controls are fields of other pairs: they align nothing."""
    moving, fixed = next(iter(RandomPairs(1, batch=32)))
    network, loss = trained(name)
    assert np.mean(loss[-10:]) < 0.8 * np.mean(loss[:10])
    with torch.no_grad():
        field = network(moving, fixed).field
        swapped = network(moving.roll(1, 0), fixed).field
    before = float(ncc(moving, fixed))
    assert float(ncc(warp(moving, field), fixed)) < 0.75 * before
    assert float(ncc(warp(moving, swapped), fixed)) > before
    assert float(ncc(warp(moving, field.roll(1, 0)), fixed)) > before


# --- Training is registration -----------------------------------------------------------------


def shifted_pair() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two textures, their translated copies, unrelated ones, and the true fields."""
    generator = torch.Generator().manual_seed(0)
    moving, unrelated = textures(2, generator), textures(2, generator)
    shift = torch.tensor([[2.0, -1.5], [-1.0, 2.5]]).view(2, 2, 1, 1).expand(-1, -1, 32, 32)
    return moving, warp(moving, shift), unrelated, shift


@pytest.mark.parametrize("name", ["paper", "composed"])
def test_a_new_network_registers_a_pair_and_a_control_does_not(name: str) -> None:
    moving, fixed, unrelated, shift = shifted_pair()
    network = new(name, 2, (8, 16, 16)).train()
    state = copy.deepcopy(network.state_dict())
    loss = functools.partial(fcn.objective, regularity_weight=0.1)
    method = fcn.Instance(network, loss, steps=100, lr=5e-3)

    def error(image: Tensor) -> float:
        field = register(image, fixed, method, progress=False).field
        return float((field - shift)[..., 6:-6, 6:-6].norm(dim=1).mean())

    # The shifts are 2.6 voxels long.
    assert error(moving) < 0.8
    assert error(unrelated) > 2.0
    for key, value in network.state_dict().items():
        assert value.equal(state[key]), key
    assert network.training
    assert all(p.grad is None for p in network.parameters())


def test_going_on_from_trained_weights_fits_better_than_either_alone() -> None:
    network, _ = trained("composed")
    moving, fixed = next(iter(RandomPairs(2, batch=2)))
    torch.manual_seed(1)
    untrained = fcn.ComposedFCN(network.settings)
    steps = {"steps": 5, "lr": 1e-3}
    losses = {
        name: float(ncc(register(moving, fixed, method, progress=False).warped, fixed))
        for name, method in {
            "one pass": network,
            "continued": fcn.Instance(network, **steps),
            "new": fcn.Instance(untrained, **steps),
        }.items()
    }
    assert losses["continued"] < 0.7 * losses["one pass"]
    assert losses["continued"] < 0.7 * losses["new"]


def test_an_instance_is_a_method() -> None:
    """Terms per pair, the best field of each, notes, and images that the network cannot take."""
    network = small("composed")
    moving, fixed = images(2, 3)
    moving, fixed = (100 * x[..., :13, :19].double() for x in (moving, fixed))
    seen: list[Iterate] = []
    method = fcn.Instance(network, steps=4, lr=1e-2)
    found = register(moving, fixed, method, progress=False, callback=seen.append)
    assert found.field.shape == (3, 2, 13, 19)
    assert found.field.dtype == torch.float64
    [stage] = found.history[1]
    assert len(found.history[1][stage]["similarity"]) == 4
    assert any("13 x 19 brought to 16 x 24" in note for note in found.settings["notes"])
    losses = torch.stack([sum(i.terms.values()) for i in seen])
    assert losses.shape == (4, 3)
    assert (losses[1:] != losses[:-1]).all()
    # The field of the lowest loss is kept for each pair: it is one that the network has shown.
    fields = [i.transform()[1] for i in seen]
    best = losses.argmin(0)
    for b in range(3):
        assert found.field[b].equal(fields[int(best[b])][b])
    # What a step has given, later steps do not change.
    assert not fields[0].equal(fields[-1])
    again = register(moving, fixed, method, progress=False)
    assert again.field.equal(found.field)


def test_the_report_names_the_network_of_an_instance() -> None:
    """By the card of its weights, not by the hundred lines that torch would print."""
    network = small("composed")
    network.card = {"trained_on": "nothing"}
    [method] = register(*images(2, 1), fcn.Instance(network, steps=1)).settings["method"]
    named = {"name": "ComposedFCN", "weights": {"trained_on": "nothing"}}
    assert method["settings"]["network"] == named


def test_the_first_state_of_an_instance_is_one_forward_pass() -> None:
    network = small("composed")
    moving, fixed = images(2, 2)
    once = register(moving, fixed, network, progress=False).field
    first = register(moving, fixed, fcn.Instance(network, steps=1), progress=False).field
    torch.testing.assert_close(first, once, atol=1e-5, rtol=0)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    def broken(*_: object, reduction: str) -> dict[str, Tensor]:
        return {"similarity": torch.full((2,), math.nan)}

    method = fcn.Instance(small(), loss=broken, steps=3)
    with pytest.raises(FloatingPointError, match="step 0"):
        register(*images(2, 2), method, progress=False)


def test_a_velocity_after_a_network_starts_from_its_field() -> None:
    """And ends at another place than one that starts from nothing, with a better fit."""
    network, _ = trained("composed")
    moving, fixed = next(iter(RandomPairs(4, batch=2)))
    once = register(moving, fixed, network, progress=False)
    fields: list[Tensor] = []
    chain = [Network(network), Velocity(levels=[1.0], steps=10, similarity=ncc)]
    refined = register(
        moving, fixed, chain, progress=False, callback=lambda i: fields.append(i.transform()[1])
    )
    assert len(fields) == 11
    # The first velocity is 0: nothing but the field of the network.
    torch.testing.assert_close(fields[1], once.field, atol=1e-5, rtol=0)
    alone = register(moving, fixed, chain[1], progress=False)
    losses = [float(ncc(found.warped, fixed)) for found in (refined, once, alone)]
    assert losses[0] < 0.5 * losses[1]
    assert losses[0] < 0.9 * losses[2]


# --- Bad input, and files -----------------------------------------------------------------------

GOOD = torch.rand(1, 1, 16, 24)


@pytest.mark.parametrize(
    ("name", "moving", "fixed", "error", "words"),
    [
        ("paper", GOOD[..., :-1], GOOD[..., :-1], ValueError, ["moving", "multiples of 4"]),
        ("interpolated", GOOD[..., :-2], GOOD[..., :-2], ValueError, ["multiples of 4"]),
        ("composed", GOOD[..., :12], GOOD[..., :12], ValueError, ["moving", "multiples of 8"]),
        ("composed", GOOD[..., :8, :8], GOOD[..., :8, :8], ValueError, ["more than one voxel"]),
        ("paper", GOOD, GOOD[..., :8], ValueError, ["moving, fixed"]),
        ("paper", GOOD.expand(-1, 2, -1, -1), GOOD, ValueError, ["moving", "(1, 2, 16, 24)"]),
        ("paper", GOOD[..., None], GOOD, ValueError, ["moving", "2 spatial axes"]),
        ("paper", GOOD, GOOD * math.nan, ValueError, ["fixed", "NaN"]),
        ("paper", GOOD.double(), GOOD, TypeError, ["moving", "float64"]),
        ("paper", (255 * GOOD).byte(), GOOD, TypeError, ["moving", "uint8"]),
        ("paper", GOOD.numpy(), GOOD, TypeError, ["moving", "ndarray"]),
    ],
)
def test_bad_images_are_refused_at_the_door(name, moving, fixed, error, words) -> None:
    with pytest.raises(error) as caught:
        small(name)(moving, fixed)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "word"),
    [
        (fcn.Settings, {"dimensions": 4}, ValueError, "dimensions"),
        (fcn.Settings, {"inputs": 0}, ValueError, "inputs"),
        (fcn.Settings, {"channels": 32}, ValueError, "channels"),
        (fcn.Settings, {"channels": (32,)}, ValueError, "channels"),
        (fcn.Settings, {"channels": (32, 0)}, ValueError, "channels"),
        (fcn.Settings, {"channels": (32, "64")}, TypeError, "channels"),
        (fcn.Settings, {"norm": "layer"}, ValueError, "norm"),
        (fcn.Settings, {"max_pooling": False}, ValueError, "decoder"),
        (fcn.ComposedSettings, {"dimensions": 1}, ValueError, "dimensions"),
        (fcn.ComposedSettings, {"inputs": 1.0}, TypeError, "inputs"),
        (fcn.ComposedSettings, {"pool": 1.5}, TypeError, "pool"),
        (fcn.ComposedSettings, {"squarings": 0}, ValueError, "squarings"),
        (fcn.ComposedSettings, {"channels": (8, 8)}, ValueError, "decoder_channels: wanted 2"),
        (fcn.ComposedSettings, {"decoder_channels": "wide"}, TypeError, "decoder_channels"),
    ],
)
def test_bad_settings_are_refused(kind, settings, error, word) -> None:
    with pytest.raises(error, match=word):
        kind(**settings)


def test_the_objective_refuses_a_wrong_number_of_weights() -> None:
    moving, fixed = images(2, 1)
    output = small()(moving, fixed)
    with pytest.raises(ValueError, match="level_weights: wanted 3"):
        fcn.objective(output, moving, fixed, level_weights=(1.0, 0.6))
    with pytest.raises(TypeError, match="regularity_weight"):
        fcn.objective(output, moving, fixed, regularity_weight="1")


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"network": lambda moving, fixed: moving}, TypeError, "network"),
        ({"loss": None}, TypeError, "loss"),
        ({"steps": 0}, ValueError, "steps"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"lr": "fast"}, ValueError, "lr"),
    ],
)
def test_bad_settings_of_an_instance_are_refused(changes, error, word) -> None:
    with pytest.raises(error, match=word):
        fcn.Instance(**{"network": small(), **changes})


def test_an_instance_refuses_a_network_with_one_field_of_view() -> None:
    network = small()
    network.card = {"input": {"size": [16, 16]}}
    with pytest.raises(
        ValueError, match=r"network: wanted one .* any size, got one for \[16, 16\]"
    ):
        register(*images(2, 1), fcn.Instance(network, steps=1), progress=False)


def test_an_instance_refuses_images_of_other_channels() -> None:
    method = fcn.Instance(small(), steps=1)
    with pytest.raises(ValueError, match="1 channel"):
        register(torch.rand(1, 2, 16, 24), torch.rand(1, 2, 16, 24), method, progress=False)


@every_network
def test_weights_survive_a_round_trip(name: str, tmp_path) -> None:
    network, path = small(name), tmp_path / "network.safetensors"
    moving, fixed = images(2, 2)
    network.train()
    network(moving, fixed)  # the statistics of BatchNorm are weights too
    network.eval()
    fcn.save(network, path, card={"trained_on": "nothing", "method": "overwritten"})
    again = fcn.load(path)
    assert again.settings == network.settings
    assert again.card["trained_on"] == "nothing"
    assert again.card["input"]["size_multiple"] == network.settings.size_multiple
    assert not again.training
    assert torch.equal(again(moving, fixed).field, network(moving, fixed).field)
    fcn.save(again, path, card={})
    assert fcn.load(path).card["trained_on"] == "nothing"
    fcn.save(copy.deepcopy(network).half(), path, card={})
    halved = fcn.load(path)
    assert next(halved.parameters()).dtype == torch.float32
    # Half precision has a relative error of 5e-4 a weight.
    difference = halved(moving, fixed).field - network(moving, fixed).field
    assert difference.norm() < 0.02 * network(moving, fixed).field.norm()
    assert [p.name for p in tmp_path.iterdir()] == ["network.safetensors"]


def test_broken_weight_files_are_refused(tmp_path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="safetensors"):
        fcn.load(path)
    with pytest.raises(OSError, match="missing"):
        fcn.load(tmp_path / "missing.safetensors")
    network = small()
    for card in (
        {"method": "other"},
        {"method": "fcn"},
        {"method": "fcn", "settings": {"no_such": 1}},
        {"method": "fcn", "settings": asdict(replace(network.settings, channels=(4, 6)))},
    ):
        save_weights(network, path, card)
        with pytest.raises(ValueError, match=f"path: wanted .* {path}"):
            fcn.load(path)


def test_the_network_that_travels_registers_boxes_of_brains_it_has_not_seen() -> None:
    """Overlap rises for every pair and the known field is nearer; the pair's way back does neither.

    The two boxes are from other brains and other programs than the 150 it was trained on, so this
    asks for half of what was measured when it was embedded: 0.07 of Dice and 0.7 voxels.
    """
    network = fcn.load_pretrained()
    assert not network.training
    generator = torch.Generator().manual_seed(41)
    members = datasets.hippocampus(count=8, generator=generator)
    gained, nearer = [], []
    for a, b in ((0, 4), (1, 5), (2, 6), (3, 7)):
        moving, fixed = members.images[a : a + 1], members.images[b : b + 1]
        truth, inside = members.field(a, b), members.labels[b : b + 1] == 1
        with torch.no_grad():
            found, back = network(moving, fixed).field, network(fixed, moving).field
        overlap, error = [], []
        for u in (torch.zeros_like(found), found, back):
            warped_labels = warp_labels(members.labels[a : a + 1], u)
            overlap.append(dice(warped_labels, members.labels[b : b + 1], labels=[1]).item())
            error.append((u - truth).norm(dim=1, keepdim=True)[inside].mean().item())
        assert overlap[2] < overlap[0]
        assert error[2] > error[0]
        gained.append(overlap[1] - overlap[0])
        nearer.append(error[0] - error[1])
    assert min(gained) > 0.025, gained
    assert sum(gained) / 4 > 0.035, gained
    assert sum(nearer) / 4 > 0.3, nearer


def test_the_network_that_travels_says_where_it_comes_from() -> None:
    """Below 2 MB in half precision, with a model card beside it; the seed and steps in the file."""
    path = Path(str(resources.files("reglib.methods"))) / fcn.WEIGHTS
    assert len(path.read_bytes()) < 2 * 2**20
    assert "Antonelli" in path.with_suffix(".md").read_text(encoding="utf-8")
    card = fcn.load_pretrained().card
    assert card["training"]["steps"] > 0
    assert card["input"]["spacing"] == [1.0, 1.0, 1.0]
    assert {"trained_on", "licence", "seed", "seconds", "provenance", "script"} <= card.keys()
