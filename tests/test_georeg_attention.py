"""What points of GeoReg attend to, against the network's own stages and attention written out."""

from __future__ import annotations

import pytest
import torch

from reglib.methods import georeg
from reglib.methods.georeg_attention import attention_of

SHAPES = {2: (16, 24), 3: (8, 12, 16)}
POINTS = {2: [[3.0, 5.0], [0.0, 23.0], [15.0, 0.0]], 3: [[3.0, 5.0, 9.0], [7.0, 0.0, 15.0]]}


def network_of(d, **settings):
    """Three narrow levels with weights large enough to move things, in float64."""
    torch.manual_seed(0)
    network = georeg.GeoReg(**{"dimensions": d, "channels": (4, 6, 8)} | settings).double()
    for name, weights in network.named_parameters():
        if name.endswith("head.2.weight"):
            torch.nn.init.normal_(weights, std=0.3)
    return network.eval()


def pair(d, batch):
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(2, batch, 1, *SHAPES[d], generator=generator, dtype=torch.float64)


def points_of(d):
    return torch.tensor([POINTS[d]], dtype=torch.float64)


SETTINGS = [
    {},
    {"iterations": (1, 2, 3), "neighbourhoods": (2, 3, 4)},
    {"spacing": (1.0, 2.0, 0.5)},
    {"interpolation": 3},
]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("d", [2, 3])
def test_steps_are_the_differences_of_the_stages(d, settings, batch):
    """Refinements add their step to the field before them, at the point of the level, to 1e-9."""
    if "spacing" in settings:
        settings = settings | {"spacing": settings["spacing"][:d]}
    network = network_of(d, **settings)
    moving, fixed = pair(d, batch)
    with torch.no_grad():
        stages = network(moving, fixed).stages
    # Other points of every sample, in one call.
    points = torch.cat([points_of(d).roll(b, 1) for b in range(batch)])
    looks = attention_of(network, moving, fixed, points)
    assert [look.name for look in looks] == [stage.name for stage in stages]
    before = None
    for look, stage in zip(looks, stages, strict=True):
        assert look.weights.shape[:2] == (batch, points_of(d).shape[1])
        assert look.nodes.shape == (*look.weights.shape, d)
        assert look.weights.min() >= 0
        torch.testing.assert_close(look.weights.sum(-1), torch.ones_like(look.weights[..., 0]))
        here = ((look.points + 0.5) / 2**look.level - 0.5).long()
        distance = (look.points - points).abs().max()
        assert distance <= 2**look.level / 2  # no other point of the level is nearer
        for b in range(batch):
            for n, x in enumerate(here[b]):
                now = stage.field[(b, slice(None), *x)] * 2**look.level
                if look.iteration:
                    was = torch.zeros_like(now)
                    if before is not None and before.level == look.level:
                        was = before.field[(b, slice(None), *x)] * 2**look.level
                    torch.testing.assert_close(look.step[b, n], now - was, atol=1e-9, rtol=1e-9)
                    where = look.points[b, n] + was
                    torch.testing.assert_close(look.centre[b, n], where, atol=1e-9, rtol=1e-9)
        before = stage


@pytest.mark.parametrize("d", [2, 3])
def test_weights_give_the_step(d):
    """The step made again of the weights and the features of both images by hand, to 1e-9."""
    network = network_of(d)
    moving, fixed = pair(d, 2)
    looks = attention_of(network, moving, fixed, points_of(d))
    coarsest = next(look for look in looks if (look.level, look.iteration) == (2, 1))
    with torch.no_grad():
        ours, theirs = (network.encoder(image)[2] for image in (moving, fixed))
        attention = network.refinements[2].attention
        for b in range(2):
            for n in range(points_of(d).shape[1]):
                at = ((coarsest.points[b, n] + 0.5) / 4 - 0.5).long().tolist()
                centre = (coarsest.centre[b, n] + 0.5) / 4 - 0.5
                total = 0.0
                for node, weight in zip(coarsest.nodes[b, n], coarsest.weights[b, n], strict=True):
                    if not weight:
                        continue
                    place = (node + 0.5) / 4 - 0.5
                    seen = ours[(b, slice(None), *place.round().long().tolist())]
                    total = total + weight * (seen + attention.position(place - centre))
                asked = theirs[(b, slice(None), *at)]
                step = attention.move(asked, attention.value(total))
                torch.testing.assert_close(coarsest.step[b, n], 4 * step, atol=1e-9, rtol=1e-9)


def test_what_has_no_neighbours_is_left_out_and_nothing_is_left_behind():
    network = network_of(
        2, interpolation=0, bottleneck=True, neighbourhoods=(0, 3, 3), iterations=(0, 1, 1)
    )
    moving, fixed = pair(2, 1)
    looks = attention_of(network, moving, fixed, points_of(2))
    assert [look.name for look in looks] == ["level 1, refined 1"]
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("points", "error", "sentence"),
    [
        (torch.zeros(1, 3, 3).double(), ValueError, "points"),
        (torch.tensor([[[16.0, 0.0]]]).double(), ValueError, "points: wanted voxels from 0 to"),
        (torch.zeros(2, 3, 2).double(), ValueError, "points: wanted a batch of 1, got 2"),
        ([[1.0, 2.0]], TypeError, "points"),
    ],
)
def test_bad_points_are_named(points, error, sentence):
    with pytest.raises(error, match=sentence):
        attention_of(network_of(2), *pair(2, 1), points)


def test_a_network_that_warps_features_is_named():
    with pytest.raises(ValueError, match="network: wanted one that looks at features"):
        attention_of(network_of(2, warp_features=True), *pair(2, 1), points_of(2))
