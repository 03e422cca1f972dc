"""The encoding of coordinates: interpolation, hashing, clamping and the window (about 2 s)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from reglib.methods import hash_grid
from reglib.methods.hash_grid import PRIMES, HashGrid, resolutions, window

#: Cells along each axis of the coarsest and the finest level.
CELLS = {2: ((2, 3), (8, 12)), 3: ((1, 2, 3), (4, 5, 6))}
both_dimensions = pytest.mark.parametrize("dimensions", [2, 3])


def grid(dimensions: int, *, table: int = 2**16, copies: int = 1, levels: int = 3) -> HashGrid:
    """An encoding in double precision with features of the size of 1."""
    coarsest, finest = CELLS[dimensions]
    generator = torch.Generator().manual_seed(dimensions)
    return HashGrid(
        coarsest,
        finest,
        levels=levels,
        table=table,
        copies=copies,
        scale=1.0,
        generator=generator,
    ).double()


def points(dimensions: int, batch: int = 1, count: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, count, dimensions, dtype=torch.float64, generator=generator)


def entry(vertex: tuple[int, ...], table: int) -> int:
    """The hash of the paper in the arithmetic of Python's integers.

    The paper's are 32 bits wide, which makes no difference to a table of a power of two.
    """
    mixed = 0
    for index, prime in zip(vertex, PRIMES, strict=False):
        mixed ^= index * prime
    if table.bit_count() == 1:
        assert mixed % table == mixed % 2**32 % table
    return mixed % table


def by_loop(encoding: HashGrid, point: Tensor) -> np.ndarray:
    """Every level at one point, from the definition of linear interpolation."""
    out = []
    for cells, hashed, values in zip(
        encoding.resolutions, encoding.hashed, encoding.tables, strict=True
    ):
        features = values[0].detach().numpy()
        place = [min(max(float(p), 0.0), 1.0) * n for p, n in zip(point, cells, strict=True)]
        corner = [min(math.floor(p), n - 1) for p, n in zip(place, cells, strict=True)]
        total = np.zeros(encoding.features)
        for step in itertools.product((0, 1), repeat=len(cells)):
            vertex = tuple(c + s for c, s in zip(corner, step, strict=True))
            share = math.prod(
                p - c if s else 1 - (p - c) for p, c, s in zip(place, corner, step, strict=True)
            )
            index = (entry(vertex, encoding.table),) if hashed else vertex
            total += share * features[(slice(None), *index)]
        out.append(total)
    return np.concatenate(out)


# --- Levels -----------------------------------------------------------------------------------


def test_resolutions_are_a_geometric_progression_along_each_axis() -> None:
    """4 to 32 in four levels doubles, and rounding does not lose the whole numbers on the way."""
    assert resolutions((4, 1), (32, 27), 4) == ((4, 1), (8, 3), (16, 9), (32, 27))
    assert resolutions((5, 5), (5, 5), 3) == ((5, 5),) * 3
    assert resolutions((3, 4, 5), (9, 9, 9), 1) == ((3, 4, 5),)


@pytest.mark.parametrize("levels", [1, 2, 8, 16])
def test_both_ends_of_a_progression_are_met(levels: int) -> None:
    found = resolutions((7, 11, 13), (150, 141, 97), levels)
    assert len(found) == levels
    assert found[0] == (7, 11, 13)
    if levels > 1:
        assert found[-1] == (150, 141, 97)
    assert all(
        b >= a for one, two in itertools.pairwise(found) for a, b in zip(one, two, strict=True)
    )


@both_dimensions
def test_a_level_is_hashed_once_its_vertices_do_not_fit(dimensions: int) -> None:
    """(N + 1)^D vertices fit into a table of just as many entries."""
    encoding = grid(dimensions)
    vertices = [math.prod(n + 1 for n in cells) for cells in encoding.resolutions]
    assert grid(dimensions, table=vertices[1]).hashed == (False, False, True)
    assert grid(dimensions, table=vertices[1] - 1).hashed == (False, True, True)


# --- Interpolation ----------------------------------------------------------------------------


@both_dimensions
def test_a_vertex_gives_its_own_features(dimensions: int) -> None:
    """To rounding: one share is 1 and the others are 0."""
    encoding = grid(dimensions)
    for level, cells in enumerate(encoding.resolutions):
        vertices = torch.cartesian_prod(*(torch.arange(n + 1) for n in cells))
        found = encoding(vertices.double().unsqueeze(0) / torch.tensor(cells))
        wanted = encoding.tables[level][0].flatten(1).T
        torch.testing.assert_close(found[0, :, 2 * level : 2 * level + 2], wanted)


@both_dimensions
def test_dense_levels_interpolate_as_scipy_does(dimensions: int) -> None:
    """To rounding, for each level and feature."""
    encoding, x = grid(dimensions), points(dimensions)
    found = encoding(x)[0].detach().numpy()
    column = 0
    for cells, values in zip(encoding.resolutions, encoding.tables, strict=True):
        axes = [np.linspace(0, 1, n + 1) for n in cells]
        for feature in values[0].detach().numpy():
            wanted = RegularGridInterpolator(axes, feature)(x[0].numpy())
            np.testing.assert_allclose(found[:, column], wanted, atol=1e-12)
            column += 1


@both_dimensions
@pytest.mark.parametrize("table", [2**16, 16, 13])
def test_all_levels_agree_with_a_plain_loop(dimensions: int, table: int) -> None:
    """Dense, and hashed into a table of a power of two or not, border and outside included.

    To rounding.
    """
    encoding = grid(dimensions, table=table)
    x = torch.cat([points(dimensions), torch.ones(1, 1, dimensions), -points(dimensions)], 1)
    x = torch.cat([x, 1 + points(dimensions)], 1).double()
    found = encoding(x)[0].detach().numpy()
    for row, point in zip(found, x[0], strict=True):
        np.testing.assert_allclose(row, by_loop(encoding, point), atol=1e-12)


@both_dimensions
@pytest.mark.parametrize("table", [2**16, 16])
def test_outside_is_the_border(dimensions: int, table: int) -> None:
    """Exactly: coordinates are clamped before anything else."""
    encoding, x = grid(dimensions, table=table), 4 * points(dimensions, count=40) - 1.5
    assert torch.equal(encoding(x), encoding(x.clamp(0, 1)))


@both_dimensions
@pytest.mark.parametrize("table", [2**16, 16])
def test_gradients_to_features_and_points(dimensions: int, table: int) -> None:
    """Against finite differences in double precision; the points lie within cells."""
    encoding = grid(dimensions, table=table, copies=2, levels=2)
    x = points(dimensions, batch=2, count=3).requires_grad_()
    names = [name for name, _ in encoding.named_parameters()]

    def run(x: Tensor, *tables: Tensor) -> Tensor:
        return torch.func.functional_call(encoding, dict(zip(names, tables, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *encoding.parameters()))


@both_dimensions
@pytest.mark.parametrize("table", [2**16, 16])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_copy_describes_its_own_sample(dimensions: int, table: int, batch: int) -> None:
    """Copies begin alike; once they differ, a sample gives what its copy alone gives."""
    encoding, x = grid(dimensions, table=table, copies=batch), points(dimensions, batch)
    single = grid(dimensions, table=table)
    torch.testing.assert_close(encoding(x), single(x))
    with torch.no_grad():
        for values in encoding.parameters():
            values += torch.rand(values.shape, generator=torch.Generator().manual_seed(1))
    found = encoding(x)
    for b in range(batch):
        for mine, values in zip(single.parameters(), encoding.parameters(), strict=True):
            mine.data = values.data[b : b + 1]
        torch.testing.assert_close(found[b : b + 1], single(x[b : b + 1]))


def test_autocast_changes_nothing() -> None:
    """Half precision cannot tell neighbouring cells of a fine level apart."""
    encoding, x = grid(2).float(), points(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoding(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, encoding(x))


# --- Hashing ----------------------------------------------------------------------------------


@both_dimensions
def test_compiled_levels_are_the_same(dimensions: int, monkeypatch) -> None:
    """For any number of points. The graph is compiled as it stands, without a C++ compiler."""
    monkeypatch.setattr(hash_grid, "BACKEND", "aot_eager")
    plain, compiled = (grid(dimensions, table=16, copies=2) for _ in range(2))
    compiled.compiled = True
    assert any(plain.hashed)
    for count in (7, 50, 3):
        found = []
        for encoding in (plain, compiled):
            at = points(dimensions, 2, count).requires_grad_()
            out = encoding(at)
            encoding.zero_grad()
            out.square().sum().backward()
            found.append([out, at.grad, *(table.grad for table in encoding.tables)])
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)


@both_dimensions
def test_collisions_are_counted(dimensions: int) -> None:
    """Vertices less distinct entries, from the paper's hash in plain integers."""
    table = 64
    encoding = grid(dimensions, table=table)
    wanted = []
    for cells, hashed in zip(encoding.resolutions, encoding.hashed, strict=True):
        vertices = list(itertools.product(*(range(n + 1) for n in cells)))
        used = {entry(v, table) for v in vertices}
        wanted.append(len(vertices) - len(used) if hashed else 0)
    assert encoding.collisions() == tuple(wanted)
    assert wanted[-1] > 0


@both_dimensions
@pytest.mark.parametrize("table", [64, 2**16])
def test_points_may_be_a_view_of_a_grid(dimensions: int, table: int) -> None:
    """Hashed or dense, the order in which coordinates lie in memory does not matter."""
    encoding, x = grid(dimensions, table=table), points(dimensions, batch=2)
    view = x.mT.contiguous().mT
    assert not view.is_contiguous()
    assert torch.equal(encoding(view), encoding(x))


def test_hashing_spreads_vertices_over_the_table() -> None:
    """As many vertices as entries thrown at random leave a share of 1/e = 0.368 of them empty.

    The hash is not worse than chance by more than a fifth.
    """
    encoding = HashGrid((127, 128), (127, 128), levels=1, table=2**14)
    [collisions] = encoding.collisions()
    assert collisions / (128 * 129) < 1.2 * 0.368


# --- The window -------------------------------------------------------------------------------


def test_the_window_opens_level_after_level() -> None:
    """Nothing at 0, everything at 1 and beyond; monotone in progress and in the level."""
    assert window(0.0, 5).tolist() == [0.0] * 5
    assert window(1.0, 5).tolist() == [1.0] * 5
    assert window(7.0, 5).tolist() == [1.0] * 5
    table = torch.stack([window(n / 50, 5) for n in range(51)])
    assert bool((table.diff(dim=0) >= 0).all())
    assert bool((table.diff(dim=1) <= 0).all())
    # Half of the way into the third of five levels (a half cosine of 1/2).
    torch.testing.assert_close(window(0.5, 5), torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]))


@both_dimensions
def test_weights_multiply_the_features_of_their_level(dimensions: int) -> None:
    encoding, x = grid(dimensions), points(dimensions)
    full = encoding(x).unflatten(2, (3, 2))
    weighted = encoding(x, torch.tensor([1.0, 0.25, 0.0])).unflatten(2, (3, 2))
    torch.testing.assert_close(weighted[:, :, 0], full[:, :, 0])
    torch.testing.assert_close(weighted[:, :, 1], 0.25 * full[:, :, 1])
    assert not weighted[:, :, 2].any()


# --- Randomness and bad input -----------------------------------------------------------------


def test_the_generator_decides() -> None:
    """The same seed, the same features, up to the scale; torch's own state is left alone."""
    state = torch.get_rng_state()
    first, second = (
        HashGrid((2, 2), (9, 9), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert -1e-4 <= float(a.detach().min()) < 0
        assert 0 < float(a.detach().max()) <= 1e-4


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"coarsest": (2,)}, ValueError, "coarsest: wanted 2 or 3"),
        ({"coarsest": (0, 2)}, ValueError, "coarsest"),
        ({"finest": (4, 4, 4)}, ValueError, "finest: wanted 2"),
        ({"finest": (1, 4)}, ValueError, r"finest: wanted at least \(2, 2\)"),
        ({"levels": 0}, ValueError, "levels"),
        ({"levels": 2.0}, TypeError, "levels"),
        ({"features": 0}, ValueError, "features"),
        ({"table": 0}, ValueError, "table"),
        ({"copies": 0}, ValueError, "copies"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"scale": "small"}, TypeError, "scale"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        HashGrid(**({"coarsest": (2, 2), "finest": (4, 4)} | change))


def test_bad_points_and_weights_are_named() -> None:
    encoding = grid(2, copies=2)
    with pytest.raises(ValueError, match=r"points: .* D = 2"):
        encoding(points(3, 2))
    with pytest.raises(ValueError, match="points: wanted a batch of 2, got 3"):
        encoding(points(2, 3))
    with pytest.raises(TypeError, match="points"):
        encoding(points(2, 2).long())
    with pytest.raises(ValueError, match=r"weights: wanted one per level, \(3,\), got \(2,\)"):
        encoding(points(2, 2), torch.ones(2))
    with pytest.raises(TypeError, match="weights"):
        encoding(points(2, 2), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="progress: wanted at least 0"):
        window(-0.1, 3)
    with pytest.raises(TypeError, match="progress"):
        window("half", 3)
    with pytest.raises(ValueError, match="levels"):
        window(0.5, 0)
