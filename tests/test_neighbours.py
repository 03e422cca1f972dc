"""Attention that keeps nothing per neighbour: against the plain form, and in its memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reglib.methods import neighbours as lean

SHAPES = {2: (7, 5), 3: (5, 4, 6)}


@dataclass
class Case:
    """Random points that look at a random grid, some of them from far outside."""

    query: Tensor
    features: Tensor
    place: Tensor
    centre: Tensor
    shift: Tensor | None
    frequencies: Tensor
    size: int
    reach: float | None

    def leaves(self) -> list[Tensor]:
        """What is differentiated."""
        found = [self.query, self.features, self.centre]
        return [*found, self.shift] if self.shift is not None else found

    def neighbours(self, shape) -> lean.Neighbours:
        """As the library is asked."""
        return lean.Neighbours(
            self.features, shape, self.place, self.centre, self.size, self.shift, self.reach
        )


def case(d: int, batch: int, size: int, *, moved: bool, reach: float | None) -> Case:
    generator = torch.Generator().manual_seed(10 * d + batch + size)
    shape, points, channels = SHAPES[d], 23, 6

    def draw(*sizes: int) -> Tensor:
        found = torch.randn(*sizes, generator=generator, dtype=torch.float64)
        return found.requires_grad_()

    spread = torch.tensor(shape, dtype=torch.float64)
    place = (torch.rand(batch, points, d, generator=generator, dtype=torch.float64) * 1.6 - 0.3) * (
        spread - 1
    )
    centre = (place + 0.3 * draw(batch, points, d)).detach().requires_grad_()
    return Case(
        draw(batch, points, channels),
        draw(batch, math.prod(shape), channels),
        place,
        centre,
        draw(batch, math.prod(shape), d) if moved else None,
        torch.randn(d, channels // 2, generator=generator, dtype=torch.float64) * 0.2,
        size,
        reach,
    )


def plain(c: Case, shape) -> Tensor:
    """Every point and every neighbour by itself: softmax over a list of nodes."""
    d, rows = len(shape), []
    steps = [k - (c.size - 1) // 2 for k in range(c.size)]
    for b, p in itertools.product(range(c.query.shape[0]), range(c.query.shape[1])):
        at = c.place[b, p]
        first = at.round() if c.size % 2 else at.floor()
        first = torch.stack(
            [
                f.clamp(0, n - 1 if c.size % 2 else max(n - 2, 0))
                for f, n in zip(first, shape, strict=True)
            ]
        )
        seen = []
        for step in itertools.product(steps, repeat=d):
            node = [int(f) + s for f, s in zip(first, step, strict=True)]
            if any(not 0 <= i < n for i, n in zip(node, shape, strict=True)):
                continue
            flat = 0
            for i, n in zip(node, shape, strict=True):
                flat = flat * n + i
            position = torch.tensor(node, dtype=torch.float64)
            if c.shift is not None:
                position = position + c.shift[b, flat]
            r = position - c.centre[b, p]
            if c.reach is not None:
                r = r.clamp(-c.reach, c.reach)
            angle = 2 * math.pi * r @ c.frequencies
            seen.append(c.features[b, flat] + torch.cat([angle.sin(), angle.cos()]))
        x = torch.stack(seen)
        rows.append((x @ c.query[b, p]).softmax(0) @ x)
    return torch.stack(rows).view(c.query.shape)


every_case = pytest.mark.parametrize(
    ("d", "batch", "size", "moved", "reach"),
    [
        (2, 1, 2, True, None),
        (2, 2, 3, False, 3.0),
        (2, 3, 4, True, 1.0),
        (3, 1, 3, True, None),
        (3, 2, 2, False, 2.0),
        (3, 3, 5, False, 5.0),
    ],
)


@every_case
@pytest.mark.parametrize("part", [None, 50])
def test_values_and_gradients_are_those_of_the_plain_form(
    d, batch, size, moved, reach, part, monkeypatch
):
    """In float64 both add the same numbers in another order; parts of one point or of all alike."""
    if part is not None:
        monkeypatch.setitem(lean._PART, "cpu", part)
    c, shape = case(d, batch, size, moved=moved, reach=reach), SHAPES[d]
    ours = lean.attend(c.query, c.neighbours(shape), c.frequencies)
    theirs = plain(c, shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    towards = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad((ours * towards).sum(), c.leaves())
    expected = torch.autograd.grad((theirs * towards).sum(), c.leaves())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("d", [2, 3])
def test_the_gradient_is_that_of_finite_differences(d):
    """Away from where a point changes its neighbours, which no gradient knows of."""
    c, shape = case(d, 1, 2, moved=True, reach=None), SHAPES[d]

    def function(query, features, centre, shift):
        n = lean.Neighbours(features, shape, c.place, centre, c.size, shift)
        return lean.attend(query, n, c.frequencies)

    assert torch.autograd.gradcheck(function, c.leaves(), fast_mode=True)


@pytest.mark.parametrize("d", [2, 3])
def test_in_single_precision_it_stays_close_to_the_double(d):
    c, shape = case(d, 2, 3, moved=True, reach=None), SHAPES[d]
    theirs = lean.attend(c.query, c.neighbours(shape), c.frequencies)
    single = Case(
        *(None if x is None else x.detach().float() for x in list(vars(c).values())[:6]), 3, None
    )
    ours = lean.attend(single.query, single.neighbours(shape), single.frequencies)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", [2, 3])
def test_the_gradient_is_not_rounded_where_the_backward_pass_runs_under_autocast(d):
    """The same bits as without: bfloat16 has 8 bits, and to mix it with float32 is an error."""
    c, shape = case(d, 2, 3, moved=True, reach=None), SHAPES[d]
    single = Case(
        *(None if x is None else x.detach().float() for x in list(vars(c).values())[:6]), 3, None
    )
    leaves = [x.requires_grad_() for x in single.leaves()]

    def gradients() -> tuple[Tensor, ...]:
        found = lean.attend(single.query, single.neighbours(shape), single.frequencies)
        return torch.autograd.grad(found.square().sum(), leaves)

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_pair_gives_in_a_batch_what_it_gives_alone():
    c, shape = case(2, 3, 3, moved=True, reach=None), SHAPES[2]
    together = lean.attend(c.query, c.neighbours(shape), c.frequencies)
    for b in range(3):
        own = [x[b : b + 1] for x in (c.features, c.place, c.centre, c.shift)]
        n = lean.Neighbours(own[0], shape, own[1], own[2], c.size, own[3])
        alone = lean.attend(c.query[b : b + 1], n, c.frequencies)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-14)


def test_nothing_of_the_size_of_all_neighbours_is_kept():
    """What autograd stores for the backward pass, in numbers per point: a few, not K times C."""
    shape, channels, size = (16, 16, 16), 8, 3
    stored = []

    def pack(x: Tensor) -> Tensor:
        stored.append(x.numel())
        return x

    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape)
    query, features = torch.randn(2, 1, count, channels, generator=generator)
    place = 15 * torch.rand(1, count, 3, generator=generator)
    leaves = [x.requires_grad_() for x in (query, features)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        n = lean.Neighbours(leaves[1], shape, place, place, size)
        lean.attend(leaves[0], n, torch.randn(3, channels // 2, generator=generator))
    # Query, features, place twice and the first nodes; all neighbours would be 27 x 8 a point.
    assert sum(stored) < 40 * count
