"""Random transforms and images: what is random about them, and what must hold for every draw."""

import math

import numpy as np
import perlin_numpy
import pytest
import torch
from scipy import ndimage, stats

from reglib import synth
from reglib.geometry.affine import affine_field, affine_parameters, grid_centre
from reglib.geometry.derivatives import digital_determinants
from reglib.geometry.fields import compose, integrate, inverse_consistency
from reglib.geometry.grid import voxel_to_unit
from reglib.geometry.sampling import transform_grid, warp, warp_labels
from reglib.objectives.metrics import folding, nda, ndv
from reglib.synth import (
    AMPLITUDES,
    brownian_field,
    gaussian_diffeomorphism,
    perlin_diffeomorphism,
    perlin_noise,
    random_affine,
    random_pair,
    random_shapes,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(33, 47), (20, 25, 31), (1, 9), (5, 1, 6)]

#: Every function, with cells small enough for small grids: shape, batch, generator -> tensors.
FUNCTIONS = {
    "perlin_noise": lambda s, **kw: (perlin_noise(s, channels=2, cell=8, octaves=2, **kw),),
    "random_shapes": lambda s, **kw: (random_shapes(s, cell=8, **kw),),
    "gaussian_diffeomorphism": lambda s, **kw: gaussian_diffeomorphism(s, sigma=2, **kw),
    "perlin_diffeomorphism": lambda s, **kw: perlin_diffeomorphism(s, cell=8, **kw),
    "brownian_field": lambda s, **kw: (brownian_field(s, amplitude=2, spacings=(4, 8.5), **kw),),
    "random_affine": lambda s, generator=None, **kw: (
        random_affine(
            torch.zeros(1, len(s), device=generator.device if generator else None),
            rotation=0.3,
            translation=5,
            scale=0.2,
            shear=0.1,
            generator=generator,
            **kw,
        ),
    ),
    "random_pair": lambda s, **kw: random_pair(s, cell=8, **kw),
}


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def double():
    """Draw and compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def draw(monkeypatch):
    """Replace what is drawn by the tensors of a list, or record it if the list is empty."""
    original, given, drawn = synth._draw, [], []

    def recorded(distribution, *size, generator):
        x = given.pop(0) if given else original(distribution, *size, generator=generator)
        assert x.shape == size
        drawn.append(x)
        return x

    monkeypatch.setattr(synth, "_draw", recorded)
    return given, drawn


@pytest.fixture
def deformations(monkeypatch):
    """The fields of phi_m and phi_f that a random pair was seen through."""
    seen = []
    monkeypatch.setattr(
        synth, "transform_grid", lambda field: (seen.append(field), transform_grid(field))[1]
    )
    return seen


def not_diffeomorphic(field):
    """Folded share of the voxels and non-diffeomorphic volume: 0 for a digital diffeomorphism."""
    return torch.stack([folding(field), (nda if field.shape[1] == 2 else ndv)(field)])


# What holds for all of them.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_devices_and_dtypes(name, shape, batch, device):
    for x in FUNCTIONS[name](shape, batch=batch, generator=seeded(0, device)):
        assert x.shape[0] == batch
        if name != "random_affine":
            assert tuple(x.shape[2:]) == shape
        assert x.device.type == device
        assert x.dtype == torch.float32 or x.dtype == torch.long
        assert x.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_torchs_default_dtype_is_followed(name, shape, double):
    """Labels are whole numbers, an affine map has the dtype of its centre: here all are double."""
    for x in FUNCTIONS[name](shape, generator=seeded()):
        assert x.dtype in (torch.float64, torch.long)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_state_of_the_generator_decides_every_bit(name, shape, device):
    generator = seeded(3, device)
    state, outside = generator.get_state(), torch.get_rng_state()
    first = FUNCTIONS[name](shape, batch=2, generator=generator)
    second = FUNCTIONS[name](shape, batch=2, generator=generator)
    again = FUNCTIONS[name](shape, batch=2, generator=generator.set_state(state))
    for a, b, c in zip(first, second, again, strict=True):
        assert a.equal(c)
        assert not a.equal(b)
        # Samples of one batch differ as well.
        assert not a[0].equal(a[1])
    assert torch.get_rng_state().equal(outside)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_generator_torchs_own_one_is_used(name):
    torch.manual_seed(5)
    first = FUNCTIONS[name]((12, 15))
    torch.manual_seed(5)
    for a, b in zip(first, FUNCTIONS[name]((12, 15)), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_changes_nothing(name, device):
    expected = FUNCTIONS[name]((20, 150), generator=seeded(0, device))
    with torch.autocast(device, torch.bfloat16):
        found = FUNCTIONS[name]((20, 150), generator=seeded(0, device))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.equal(b)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: perlin_noise((9, 11), batch=400, cell=4, generator=g),
        lambda g: gaussian_diffeomorphism((9, 11), batch=400, sigma=1, generator=g).velocity,
        lambda g: perlin_diffeomorphism((9, 11), batch=400, cell=4, generator=g).velocity,
        lambda g: brownian_field((9, 11), batch=400, amplitude=1, generator=g),
    ],
)
def test_samples_and_components_are_independent_and_of_mean_zero(make):
    """Neighbours in the batch, and components: |r| < 5 / sqrt(n) for n independent numbers."""
    x = make(seeded())[..., 1, 2]
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 5 / math.sqrt(len(x))
    if x.shape[1] > 1:
        assert abs(np.corrcoef(x.T)[0, 1]) < 5 / math.sqrt(len(x))
    assert (x.mean(0).abs() < 5 * x.std(0) / math.sqrt(len(x))).all()


# Perlin noise.


class Angles:
    """A NumPy generator for perlin-numpy that returns given angles, as parts of a turn."""

    def __init__(self, angles):
        self.angles = list(angles)

    def uniform(self, size):
        angles = self.angles.pop(0) / (2 * np.pi)
        assert angles.shape == tuple(size)
        return angles


def perlin_of(gradients, shape, cell):
    """The noise that perlin-numpy makes of gradients ``(D, *R)`` of length 1."""
    res = [n // cell for n in shape]
    if len(shape) == 2:
        rng = Angles([np.arctan2(gradients[1], gradients[0])])
        return perlin_numpy.generate_perlin_noise_2d(shape, res, rng=rng) / np.sqrt(2)
    rng = Angles([np.arctan2(gradients[1], gradients[0]), np.arccos(gradients[2])])
    return perlin_numpy.generate_perlin_noise_3d(shape, res, rng=rng)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "cell"), [((48, 64), 16), ((16, 8, 24), 4)], ids=str)
def test_perlin_noise_equals_perlin_numpy(shape, cell, batch, draw, double):
    """Same gradients, same values: to the rounding of float64, angles there and back included."""
    ours = perlin_noise(
        shape,
        batch=batch,
        channels=2,
        cell=cell,
        octaves=3,
        persistence=0.7,
        generator=seeded(batch),
    )
    octaves = [g / g.norm(dim=2, keepdim=True) for g in draw[1]]
    assert len(octaves) == 3
    expected = [
        [
            sum(
                0.7**o * perlin_of(g[b, c].numpy(), shape, cell // 2**o)
                for o, g in enumerate(octaves)
            )
            for c in range(2)
        ]
        for b in range(batch)
    ]
    np.testing.assert_allclose(ours.numpy(), np.array(expected), rtol=0, atol=1e-12)


def radial_power(noise):
    """Power in shells of one cycle per image, and along each axis alone, of ``(B, *S)``."""
    d = noise.ndim - 1
    power = (np.abs(np.fft.fftn(noise, axes=range(1, d + 1))) ** 2).mean(0)
    k = np.sqrt(sum(np.meshgrid(*[np.fft.fftfreq(n, 1 / n) ** 2 for n in power.shape])))
    return ndimage.mean(power, np.round(k), np.arange(1, 9))


@pytest.mark.parametrize("octaves", [1, 2])
@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 32)], ids=str)
def test_the_spectrum_equals_that_of_perlin_numpy(shape, octaves):
    """12 %: a shell of |k| = 1 has few modes; 500 and 80 images leave it uncertain by 3 %."""
    count, cells = (500, 4) if len(shape) == 2 else (80, 4)
    ours = perlin_noise(
        shape, batch=count, cell=shape[0] / cells, octaves=octaves, generator=seeded()
    )
    rng = np.random.default_rng(0)
    make = getattr(perlin_numpy, f"generate_fractal_noise_{len(shape)}d")
    theirs = np.stack([make(shape, (cells,) * len(shape), octaves, rng=rng) for _ in range(count)])
    theirs /= np.sqrt(2) if len(shape) == 2 else 1
    np.testing.assert_allclose(radial_power(ours[:, 0].numpy()), radial_power(theirs), rtol=0.12)


def test_noise_has_no_preferred_axis():
    """Unlike perlin-numpy's in 3-D: its last axis is steeper than the first by 2 to 1 in g^2."""
    ours = perlin_noise((25, 25, 25), batch=60, cell=8, generator=seeded())[:, 0].numpy()
    rng = np.random.default_rng(0)
    make = perlin_numpy.generate_perlin_noise_3d
    theirs = np.stack([make((24, 24, 24), (3, 3, 3), rng=rng) for _ in range(60)])
    slopes, biased = (
        [(np.diff(x, axis=axis) ** 2).mean() for axis in (1, 2, 3)] for x in (ours, theirs)
    )
    np.testing.assert_allclose(slopes, np.mean(slopes), rtol=0.03)
    assert biased[2] > 1.15 * biased[0]


@pytest.mark.parametrize("octaves", [1, 3])
@pytest.mark.parametrize("cell", [8, 10, 2.5])
@pytest.mark.parametrize("shape", [(50, 41), (21, 30, 26), (8, 80)], ids=str)
def test_noise_is_zero_at_the_nodes(shape, cell, octaves):
    """Whether the cells divide the shape or not; the last cell is simply cut off."""
    noise = perlin_noise(shape, batch=2, channels=3, cell=cell, octaves=octaves, generator=seeded())
    whole = int(2 * cell) if cell % 1 else cell
    assert noise[(..., *(slice(None, None, whole),) * len(shape))].eq(0).all()
    assert noise.abs().amax(tuple(range(2, noise.ndim))).gt(0.1).all()


@pytest.mark.parametrize("d", [2, 3])
def test_noise_reaches_its_bound_and_stays_within(d, draw):
    """All gradients of a cell point to its middle: sqrt(D) / 2 there, and less elsewhere."""
    bound = math.sqrt(d) / 2
    gradients = 1.0 - 2 * np.indices((2,) * d)
    draw[0].append(torch.from_numpy(gradients).float()[None, None])
    cell = perlin_noise((8,) * d, cell=8)
    assert cell[(0, 0, *(4,) * d)].item() == pytest.approx(bound, abs=1e-6)
    assert cell.abs().max() <= bound + 1e-6
    many = perlin_noise((16,) * d, batch=20, cell=4, octaves=2, generator=seeded())
    assert many.abs().max() <= 1.5 * bound


# Shapes.


@pytest.mark.parametrize("shape", [(70, 53), (30, 25, 41)], ids=str)
def test_shapes_are_the_largest_of_scaled_channels(shape, draw, monkeypatch):
    """SciPy's interpolation of the noise at nodes 4 voxels apart; 1e-5 is a tie."""
    noises = []
    original = synth._perlin
    monkeypatch.setattr(
        synth, "_perlin", lambda *args: (noises.append(original(*args)), noises[-1])[1]
    )
    labels = random_shapes(shape, batch=2, count=5, cell=8, generator=seeded())
    [noise] = noises
    positions = np.indices(shape) / 4
    for sample, found in zip(noise.double().numpy(), labels, strict=True):
        channels = np.stack(
            [ndimage.map_coordinates((c - c.min()) / np.ptp(c), positions, order=1) for c in sample]
        )
        best, second = np.sort(channels, axis=0)[::-1][:2]
        clear = best - second > 1e-5
        assert clear.mean() > 0.999
        np.testing.assert_array_equal(found[0].numpy()[clear], channels.argmax(0)[clear])


@pytest.mark.parametrize("shape", [(97, 81), (33, 49, 41)], ids=str)
def test_labels_are_used_alike_and_nodes_are_like_other_places(shape):
    """Each of 16 labels fills a sixteenth, and the nodes of an image have many labels."""
    labels = random_shapes(shape, batch=60, cell=16, generator=seeded())
    share = torch.bincount(labels.flatten(), minlength=16) / labels.numel()
    torch.testing.assert_close(share, torch.full((16,), 1 / 16), rtol=0, atol=0.015)
    nodes = labels[(..., *(slice(None, None, 16),) * len(shape))].flatten(1)
    assert min(len(sample.unique()) for sample in nodes) > 5


def test_one_channel_is_one_label_and_a_black_world():
    assert random_shapes((9, 12), count=1).eq(0).all()
    pair = random_pair((9, 12), count=1)
    assert pair.moving.eq(0).all()
    assert pair.fixed.eq(0).all()


# Diffeomorphisms.


@pytest.mark.parametrize("shape", [(40, 50), (16, 20, 18)], ids=str)
def test_gaussian_velocities_are_filtered_noise(shape, draw):
    """SciPy's Gaussian filter of the same noise, cut out of its middle, to single precision."""
    velocity = gaussian_diffeomorphism(
        shape, batch=2, sigma=3, amplitude=5, generator=seeded()
    ).velocity
    [noise] = draw[1]
    d = len(shape)
    expected = ndimage.gaussian_filter(noise.double().numpy(), (0, 0, *(3,) * d))
    inside = (..., *(slice(12, -12),) * d)
    for ours, smooth in zip(velocity.double().numpy(), expected[inside], strict=True):
        smooth *= 5 / np.sqrt((smooth**2).sum(0)).max()
        np.testing.assert_allclose(ours, smooth, rtol=0, atol=5e-6)


def test_gaussian_velocities_have_the_stated_correlation_up_to_the_border():
    """Of 400 samples, 12 % on variances and 0.1 on correlations: four standard errors."""
    v = gaussian_diffeomorphism((40, 40), batch=400, sigma=4, generator=seeded()).velocity
    variance = (v**2).mean((0, 1))
    assert (variance / variance.mean() - 1).abs().max() < 0.3
    assert (variance[0].mean() / variance[20].mean()).item() == pytest.approx(1, abs=0.12)
    for r in (0, 2, 4, 8, 12):
        found = (v[..., : 40 - r] * v[..., r:]).mean() / variance.mean()
        assert found.item() == pytest.approx(math.exp(-(r**2) / 64), abs=0.1)


@pytest.mark.parametrize("amplitude", [0, 1.5, 6])
@pytest.mark.parametrize("shape", [(40, 50), (16, 20, 18)], ids=str)
def test_the_amplitude_bounds_every_displacement(shape, amplitude):
    """Whoever walks for unit time at no more than this speed gets no further."""
    field, velocity = gaussian_diffeomorphism(
        shape, batch=3, sigma=4, amplitude=amplitude, generator=seeded()
    )
    speed = torch.linalg.vector_norm(velocity, dim=1).flatten(1).amax(1)
    torch.testing.assert_close(speed, torch.full((3,), float(amplitude)))
    assert torch.linalg.vector_norm(field, dim=1).max() <= amplitude * (1 + 1e-5)


@pytest.mark.parametrize("make", [gaussian_diffeomorphism, perlin_diffeomorphism])
@pytest.mark.parametrize(("shape", "tolerance"), [((90, 80), 0.15), ((48, 50, 46), 0.3)], ids=str)
def test_the_field_is_the_exponential_and_minus_v_undoes_it(make, shape, tolerance):
    """Interpolation is what misses, more in 3-D; paths that leave the grid do not count."""
    options = {"amplitudes": [8 / 32]} if make is perlin_diffeomorphism else {}
    field, velocity = make(shape, batch=2, generator=seeded(), **options)
    assert field.equal(integrate(velocity))
    # A sample is what it is alone.
    torch.testing.assert_close(field[1:], integrate(velocity[1:]), rtol=0, atol=1e-6)
    inside = (..., *(slice(12, -12),) * len(shape))
    around = inverse_consistency(field, integrate(-velocity))[inside]
    assert field[inside].abs().max() > 2
    assert around.max() < tolerance


@pytest.mark.parametrize(
    ("shape", "batch", "seeds"), [((100, 120), 12, 5), ((36, 33, 39), 1, 8)], ids=str
)
@pytest.mark.parametrize("make", [gaussian_diffeomorphism, perlin_diffeomorphism])
def test_nothing_folds_by_default(make, shape, batch, seeds):
    """60 samples in 2-D and 8 in 3-D, those of Perlin noise at its largest default amplitude."""
    largest = {"amplitudes": AMPLITUDES[-1:]} if make is perlin_diffeomorphism else {}
    for seed in range(seeds):
        field = make(shape, batch=batch, generator=seeded(seed), **largest).field
        folded, volume = not_diffeomorphic(field)
        assert folded.max() == 0
        # In voxels: less than a thousandth of one.
        assert volume.max() * field[0, 0].numel() < 1e-3


@pytest.mark.parametrize("shape", [(100, 120), (44, 40, 48)], ids=str)
def test_a_field_that_is_multiplied_afterwards_folds(shape):
    """The released code's way, 14 to 18 voxels: the reason to multiply the velocity."""
    field = perlin_diffeomorphism(shape, batch=6, amplitudes=[1 / 32], generator=seeded()).field
    assert folding(8 * field).max() == 0
    assert folding(18 * field).mean() > 0.005


def test_perlin_velocities_scale_with_their_cells():
    """Twice the cells, twice the image: twice the velocity at twice the place."""
    small = perlin_diffeomorphism((30, 41), batch=3, cell=16, generator=seeded()).velocity
    large = perlin_diffeomorphism((60, 82), batch=3, cell=32, generator=seeded()).velocity
    torch.testing.assert_close(2 * small, large[..., ::2, ::2])
    assert large[..., ::32, ::32].eq(0).all()


def test_amplitudes_and_octaves_are_drawn_evenly():
    """Of 600 samples: shares within four standard errors, variance 1 + 0.5^2 / 2 of one octave."""
    unit, mixed = (
        perlin_diffeomorphism(
            (17, 17), batch=600, cell=8, amplitudes=a, generator=seeded()
        ).velocity
        for a in ([1.0, 1.0, 1.0], [1.0, 2.0, 4.0])
    )
    factors = mixed.flatten(1).norm(dim=1) / unit.flatten(1).norm(dim=1)
    torch.testing.assert_close(mixed, factors.view(-1, 1, 1, 1) * unit, rtol=1e-5, atol=1e-5)
    for factor in (1, 2, 4):
        share = (factors - factor).abs().lt(1e-4).double().mean()
        assert share.item() == pytest.approx(1 / 3, abs=0.08)
    octave = perlin_noise((17, 17), batch=600, channels=2, cell=8, generator=seeded(1))
    assert ((unit / 8).var() / octave.var()).item() == pytest.approx(1.125, abs=0.03)


# Brownian fields.


@pytest.mark.parametrize("shape", [(70, 53), (20, 25, 31)], ids=str)
def test_brownian_fields_are_the_mean_of_interpolated_noises(shape, draw):
    field = brownian_field(shape, amplitude=3, batch=2, spacings=(4, 8, 20.5), generator=seeded())
    assert len(draw[1]) == 3
    expected = np.zeros(field.shape)
    for spacing, noise in zip((4, 8, 20.5), draw[1], strict=True):
        positions = np.indices(shape) / spacing
        for sample, given in zip(expected, noise.double().numpy(), strict=True):
            for component, x in zip(sample, 2 * given - 1, strict=True):
                component += ndimage.map_coordinates(x, positions, order=1)
    np.testing.assert_allclose(field.numpy(), expected, rtol=0, atol=1e-5)
    assert field.abs().max() <= 3


def test_a_brownian_octave_is_uniform_at_its_nodes():
    field = brownian_field((65, 97), amplitude=4, batch=20, spacings=[16], generator=seeded())
    nodes = field[..., ::16, ::16].flatten()
    assert stats.kstest(nodes.numpy(), stats.uniform(-4, 8).cdf).pvalue > 0.01


@pytest.mark.parametrize("shape", [(20, 17), (12, 17, 20)], ids=str)
def test_the_folding_bound_of_brownian_fields_is_sharp(shape, draw):
    """One node at one end of the range, its neighbours at the other: the steepest there is."""
    d, spacing = len(shape), 8
    bound = spacing / (2 * d)
    noise = torch.zeros(1, d, *[(n - 1) // spacing + 2 for n in shape])
    noise[(..., *(0,) * d)] = 1
    for factor, positive in ((0.99, True), (1.01, False)):
        draw[0].append(noise)
        field = brownian_field(shape, amplitude=factor * bound, spacings=[spacing])
        assert digital_determinants(field)[:, : 2**d].gt(0).all() == positive


@pytest.mark.parametrize("shape", [(150, 120), (40, 36, 44)], ids=str)
def test_brownian_fields_below_the_bound_do_not_fold(shape):
    bound = 3 / (2 * len(shape) * (1 / 16 + 1 / 32 + 1 / 64))
    for seed in range(5):
        field = brownian_field(shape, amplitude=bound, batch=2, generator=seeded(seed))
        assert not_diffeomorphic(field).max() == 0


# Affine maps.


@pytest.mark.parametrize("d", [2, 3])
def test_affine_parameters_are_uniform_within_their_ranges(d):
    """Kolmogorov-Smirnov for every parameter of 300 maps about 300 centres."""
    centre = 100 * torch.rand(300, d, generator=seeded(1), dtype=torch.float64)
    matrix = random_affine(
        centre,
        batch=300,
        rotation=0.4,
        translation=7,
        scale=0.3,
        shear=0.2,
        generator=seeded(),
    )
    assert matrix.dtype == torch.float64
    found = affine_parameters(matrix, centre=centre)
    for values, low, high in (
        (found.rotation, -0.4, 0.4),
        (found.translation, -7, 7),
        (found.log_scales.exp(), 0.7, 1.3),
        (found.shears, -0.2, 0.2),
    ):
        assert low - 1e-6 <= values.min()
        assert values.max() <= high + 1e-6
        for parameter in values.T:
            test = stats.kstest(parameter.numpy(), stats.uniform(low, high - low).cdf)
            assert test.pvalue > 0.01
    correlation = np.corrcoef(torch.cat(found, 1).T.numpy()) - np.eye(d * (d + 1))
    assert np.abs(correlation).max() < 5 / math.sqrt(300)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", [(9, 12), (7, 8, 9)], ids=str)
def test_a_random_affine_map_turns_about_its_centre(shape, batch):
    """Without a translation the middle of the grid stays; without anything the grid does."""
    image = torch.diag(torch.tensor([2.0, 0.5, 1.5][: len(shape)] + [1.0]))
    centre = grid_centre(image, shape)
    still = random_affine(centre, rotation=0, translation=0, scale=0, batch=batch)
    assert still.equal(torch.eye(len(shape) + 1).expand(batch, -1, -1).double())
    turned = random_affine(centre, rotation=1, translation=0, scale=0.5, shear=0.5, batch=batch)
    field = affine_field(turned, image, image, shape)
    middle = torch.cat([centre, torch.ones(1, 1)], 1).to(turned)[0]
    torch.testing.assert_close(turned @ middle, middle.expand(batch, -1))
    assert field.abs().amax(tuple(range(1, field.ndim))).gt(0.1).all()


# Pairs.


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_amplitude_both_images_are_the_world(shape, batch):
    pair = random_pair(shape, batch=batch, cell=8, amplitudes=[0], generator=seeded())
    assert pair.field.eq(0).all()
    assert pair.moving.equal(pair.fixed)
    assert pair.moving_labels.equal(pair.fixed_labels)
    assert pair.moving.shape == pair.moving_labels.shape == (batch, 1, *shape)
    for image, labels in zip(pair.moving, pair.moving_labels, strict=True):
        # To the rounding of coordinates: a voxel is read between its neighbours.
        assert image.min().item() == pytest.approx(0, abs=1e-5)
        assert image.max().item() == pytest.approx(1, abs=1e-5)
        # One label, one grey value.
        assert all(np.ptp(image[labels == label].numpy()) < 1e-5 for label in labels.unique())


def test_grey_values_have_the_papers_range():
    """Label 1 is uniform on [25, 225] and label 0 on [0, 225]: it is darker 125 times in 225.

    Four standard errors of 4000 worlds; were the ranges equal, it would be one in two.
    """
    world = random_pair((6, 6), batch=4000, count=2, cell=4, amplitudes=[0], generator=seeded())
    zero_is_black = [
        bool(image[labels == 0].lt(0.5).all())
        for image, labels in zip(world.fixed, world.fixed_labels, strict=True)
        if len(labels.unique()) == 2
    ]
    assert np.mean(zero_is_black) == pytest.approx(125 / 225, abs=0.035)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("scale", ["before", "after"])
@pytest.mark.parametrize("shape", [(70, 53), (30, 25, 41)], ids=str)
def test_both_images_are_the_world_seen_through_a_field(shape, scale, padding, deformations):
    """SciPy's interpolation of the undeformed world, in the places where phi_m and phi_f look."""
    options = {"batch": 2, "cell": 16, "scale": scale, "padding": padding}
    world = random_pair(shape, **options, amplitudes=[0], generator=seeded())
    deformations.clear()
    pair = random_pair(shape, **options, generator=seeded())
    mode = {"border": "nearest", "zeros": "grid-constant"}[padding]
    views = ((pair.moving, pair.moving_labels), (pair.fixed, pair.fixed_labels))
    for field, (image, labels) in zip(deformations, views, strict=True):
        for k in range(2):
            x = (np.indices(shape) + field[k].numpy()).astype(float)
            expected = ndimage.map_coordinates(world.moving[k, 0].double(), x, order=1, mode=mode)
            np.testing.assert_allclose(image[k, 0], expected, rtol=0, atol=1e-4)
            nearest = ndimage.map_coordinates(
                world.moving_labels[k, 0].double(), x, order=0, mode=mode
            )
            assert (labels[k, 0].numpy() == nearest).mean() > 0.999
        assert field.abs().max() > 1


@pytest.mark.parametrize("shape", [(128, 110), (56, 60, 52)], ids=str)
def test_the_field_of_a_pair_is_known(shape, deformations):
    """phi_m(phi(x)) = phi_f(x), off by what interpolation between the nodes costs."""
    misses = []
    for amplitude in AMPLITUDES:
        deformations.clear()
        pair = random_pair(shape, batch=2, amplitudes=[amplitude], generator=seeded())
        to_moving, to_fixed = deformations
        inside = voxel_to_unit(transform_grid(pair.field), shape).abs().amax(1) <= 1
        miss = torch.linalg.vector_norm(compose(to_moving, pair.field) - to_fixed, dim=1)[inside]
        misses.append(miss.mean().item())
        assert torch.linalg.vector_norm(pair.field, dim=1).mean() > 20 * miss.mean()
        warped = warp(pair.moving, pair.field)
        assert (warped - pair.fixed).abs().mean() < 0.25 * (pair.moving - pair.fixed).abs().mean()
        labels = warp_labels(pair.moving_labels, pair.field, padding="border")
        wrong, wrong_before = (
            (x != pair.fixed_labels).double().mean() for x in (labels, pair.moving_labels)
        )
        assert wrong < 0.5 * wrong_before
    assert np.mean(misses) < 0.15, misses


@pytest.mark.parametrize(
    ("shape", "batch", "seeds"), [((100, 120), 8, 3), ((44, 40, 48), 1, 5)], ids=str
)
def test_pairs_do_not_fold_by_default(shape, batch, seeds, deformations):
    """Not even at the largest amplitude; of the field between them, one voxel in a thousand."""
    for seed in range(seeds):
        pair = random_pair(shape, batch=batch, amplitudes=AMPLITUDES[-1:], generator=seeded(seed))
        for field in deformations:
            folded, volume = not_diffeomorphic(field)
            assert folded.max() == 0
            assert volume.max() < 1e-5
        deformations.clear()
        assert not_diffeomorphic(pair.field).max() < 1e-3


def test_amplitudes_multiply_the_field_afterwards_on_request(deformations):
    """From the same numbers a is a times 1, and folds; before, it is not and does not."""
    for scale in ("before", "after"):
        for amplitude in (1 / 32, 18 / 32):
            random_pair((100, 120), amplitudes=[amplitude], scale=scale, generator=seeded())
    before_1, before_18 = deformations[0], deformations[2]
    after_1, after_18 = deformations[4], deformations[6]
    torch.testing.assert_close(before_1, after_1)
    torch.testing.assert_close(18 * after_1, after_18, rtol=1e-5, atol=1e-5)
    assert (before_18 - after_18).abs().max() > 1
    assert folding(after_18) > 1e-3
    assert folding(before_18) == 0


# Bad arguments.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: perlin_noise((5,)), ValueError, "shape: wanted 2 or 3 positive integers"),
        (lambda: perlin_noise((5, 6.5)), TypeError, "shape: wanted 2 or 3 positive integers"),
        (lambda: perlin_noise((5, 6), cell=0), ValueError, "cell: wanted positive numbers, got 0"),
        (lambda: perlin_noise((5, 6), cell="8"), TypeError, "cell: wanted a sequence of numbers"),
        (lambda: perlin_noise((5, 6), octaves=0), ValueError, "octaves: wanted at least 1"),
        (lambda: perlin_noise((5, 6), channels=1.5), TypeError, "channels: wanted an integer"),
        (lambda: perlin_noise((5, 6), lacunarity=-1), ValueError, "lacunarity: wanted positive"),
        (lambda: perlin_noise((5, 6), persistence=-1), ValueError, "persistence: wanted numbers"),
        (lambda: perlin_noise((5, 6), generator=3), TypeError, "generator: wanted a torch.Gen"),
        (lambda: random_shapes((5, 0)), ValueError, "shape: wanted 2 or 3 positive integers"),
        (lambda: random_shapes((5, 6), count=0), ValueError, "count: wanted at least 1"),
        (lambda: random_shapes((5, 6), batch=0), ValueError, "batch: wanted at least 1"),
        (lambda: random_shapes((5, 6), cell=math.inf), ValueError, "cell: wanted positive"),
        (lambda: gaussian_diffeomorphism((5, 6), sigma=0), ValueError, "sigma: wanted positive"),
        (
            lambda: gaussian_diffeomorphism((5, 6), amplitude=-1),
            ValueError,
            "amplitude: wanted numbers of at least 0, got -1",
        ),
        (lambda: gaussian_diffeomorphism((5, 6), batch=True), TypeError, "batch: wanted an int"),
        (
            lambda: perlin_diffeomorphism((5, 6), amplitudes=[]),
            ValueError,
            "amplitudes: wanted numbers of at least 0",
        ),
        (
            lambda: perlin_diffeomorphism((5, 6), amplitudes=[1, math.nan]),
            ValueError,
            "amplitudes: wanted numbers of at least 0",
        ),
        (lambda: perlin_diffeomorphism((5, 6), cell=-4), ValueError, "cell: wanted positive"),
        (lambda: perlin_diffeomorphism((5, 6), batch=0), ValueError, "batch: wanted at least 1"),
        (
            lambda: brownian_field((5, 6), amplitude=1, spacings=()),
            ValueError,
            "spacings: wanted positive numbers",
        ),
        (lambda: brownian_field((5, 6), amplitude="1"), TypeError, "amplitude: wanted a seq"),
        (lambda: brownian_field((5, 6), amplitude=-1), ValueError, "amplitude: wanted numbers"),
        (lambda: affine(scale=1), ValueError, "scale: wanted a number below 1, got 1"),
        (lambda: affine(rotation=-1), ValueError, "rotation: wanted numbers of at least 0"),
        (lambda: affine(translation=math.inf), ValueError, "translation: wanted numbers"),
        (lambda: affine(shear=-0.1), ValueError, "shear: wanted numbers of at least 0"),
        (lambda: affine(torch.zeros(2, 3)), ValueError, r"centre: wanted shape \(1, 3\)"),
        (lambda: affine(torch.zeros(1, 4)), ValueError, r"centre: wanted shape \(1, 3\)"),
        (lambda: affine([0.0, 0.0]), TypeError, "centre: wanted a torch.Tensor"),
        (lambda: affine(torch.zeros(1, 2).long()), TypeError, "centre: wanted floating-point"),
        (lambda: random_pair((5, 6), scale="both"), ValueError, "scale: wanted one of 'before'"),
        (lambda: random_pair((5, 6), padding="no"), ValueError, "padding: wanted one of"),
        (lambda: random_pair((5, 6), amplitudes=[-1]), ValueError, "amplitudes: wanted numbers"),
        (lambda: random_pair((5, 6), count=0), ValueError, "count: wanted at least 1"),
        (lambda: random_pair(5), TypeError, "shape: wanted 2 or 3 positive integers"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def affine(centre=None, **options):
    centre = torch.zeros(1, 2) if centre is None else centre
    return random_affine(centre, **{"rotation": 0.1, "translation": 1, "scale": 0.1} | options)


def test_a_stream_of_pairs_goes_on_where_its_state_was_taken():
    options = {"batch": 2, "cell": 8.0, "count": 5}
    first, generator = (torch.Generator().manual_seed(3) for _ in range(2))
    stream = synth.RandomPairs((18, 14), generator=first, **options)
    pairs = iter(stream)
    # The pairs of random_pair, one after the other.
    for _ in range(2):
        plain = synth.random_pair((18, 14), generator=generator, **options)
        for found, wanted in zip(next(pairs), plain, strict=False):
            assert torch.equal(found, wanted)
    state = stream.state_dict()
    rest = [next(pairs) for _ in range(2)]
    again = synth.RandomPairs((18, 14), generator=torch.Generator().manual_seed(9), **options)
    again.load_state_dict(state)
    for wanted, found in zip(rest, again, strict=False):
        for a, b in zip(wanted, found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(8,), (4, 5, 6, 7), (0, 3)])
def test_a_stream_of_pairs_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="shape"):
        synth.RandomPairs(shape, generator=torch.Generator())
    with pytest.raises(TypeError, match="generator"):
        synth.RandomPairs((4, 5), generator=3)
