"""Networks behind their input contract, against conversions by nibabel, SciPy and hand.

Fields travel between grids in float32, coordinates up to 30 voxels: 1e-4 voxels. Converted images
agree to 1e-5 of their range.
"""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import nn

from reglib.data import datasets
from reglib.data.conform import conform, conform_grid
from reglib.data.nifti import Image, voxel_to_world
from reglib.geometry.affine import affine_field
from reglib.geometry.fields import compose
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import gaussian_smooth
from reglib.methods import georeg
from reglib.methods.network import Network
from reglib.methods.pair import Iterate
from reglib.registration import Registration, register


def blobs(shape, seed=0, batch=1):
    """Smooth noise, every side of it different."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, *shape, generator=generator)
    return 50 + 400 * gaussian_smooth(noise, 2.0)


def placed(d, orientation, spacing, shape, turn=0.0):
    """An affine of a given orientation about an odd place, turned by some radians."""
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    signs = torch.tensor([1.0 if c in "RAS" else -1.0 for c in orientation], dtype=torch.float64)
    axes = [next(i for i, p in enumerate(("LR", "PA", "IS")) if c in p) for c in orientation]
    affine[:d, :d] = torch.zeros(d, d, dtype=torch.float64)
    for column, (axis, sign, step) in enumerate(zip(axes, signs, spacing, strict=True)):
        affine[axis, column] = sign * step
    if d == 3:
        rotation = Rotation.from_rotvec([0.3 * turn, -turn, 0.5 * turn]).as_matrix()
        affine[:3, :3] = torch.from_numpy(rotation) @ affine[:3, :3]
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    affine[:d, d] = torch.tensor([12.0, -7.0, 3.0][:d]).double() - affine[:d, :d] @ middle
    return affine


class Demons(nn.Module):
    """Some voxels per unit of mismatch along the gradient: the answer depends on both images.

    A bias that differs by axis makes it notice axes that were permuted or flipped.
    """

    def __init__(self, d):
        super().__init__()
        self.step = nn.Parameter(torch.linspace(0.5, 1.0, d).view(1, d, *(1,) * d))

    def forward(self, moving, fixed):
        d = fixed.ndim - 2
        slopes = torch.gradient(fixed[:, 0], dim=list(range(1, d + 1)))
        gradient = torch.stack(slopes, 1)
        scale = gradient.square().sum(1, keepdim=True).amax(tuple(range(1, d + 2)), keepdim=True)
        force = (fixed - moving) * gradient / scale.clamp(min=1e-6).sqrt()
        return gaussian_smooth(12 * self.step * force, 1.0) + self.step.detach() - 0.6


class Recorder:
    """A network that remembers what it saw and finds nothing, or what it is told."""

    def __init__(self, field=None):
        self.field, self.card = field, {}

    def __call__(self, moving, fixed, **told):
        self.moving, self.fixed, self.told = moving, fixed, told
        return (
            torch.zeros_like(fixed).repeat(1, fixed.ndim - 2, *(1,) * (fixed.ndim - 2))
            if (self.field is None)
            else self.field
        )


def scaled(image, low=0.0, high=1.0):
    least, largest = image.flatten(1).aminmax(dim=1)
    view = (-1, *(1,) * (image.ndim - 1))
    share = (image - least.view(view)) / (largest - least).view(view)
    return low + share * (high - low)


def twin(image, spacing=2.0):
    """The image in RAS at 2 mm by nibabel and SciPy, written without the library."""
    canonical = nib.as_closest_canonical(
        nib.Nifti1Image(scaled(image.tensor)[0, 0].numpy(), image.affine.numpy())
    )
    values, affine = canonical.get_fdata(), canonical.affine
    old = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = spacing / old
    shape = np.ceil(np.array(values.shape) / ratio - 1e-6).astype(int)
    first = (np.array(values.shape) - 1) / 2 - (shape - 1) / 2 * ratio
    new = affine.copy()
    new[:3, :3] = affine[:3, :3] * ratio
    new[:3, 3] = affine[:3, :3] @ first + affine[:3, 3]
    sigma = np.sqrt((ratio**2 - 1) / (8 * math.log(2)))
    smooth = ndimage.gaussian_filter(values, sigma, mode="nearest")
    at = np.indices(shape) * ratio.reshape(3, 1, 1, 1) + first.reshape(3, 1, 1, 1)
    small = ndimage.map_coordinates(smooth, at, order=1, mode="grid-constant")
    return Image(torch.from_numpy(small)[None, None].float(), torch.from_numpy(new))


# --- Any image gives what its converted twin gives ------------------------------------------


CONTRACT = {"channels": 1, "range": [0, 1], "size_multiple": 1} | {
    "orientation": "RAS",
    "spacing": [2, 2, 2],
}


def las_pair(turn=0.0):
    """Two LAS images of 1 mm; the moving one on the same grid."""
    shape = (26, 30, 23)
    affine = placed(3, "LAS", (1, 1, 1), shape, turn)
    return [Image(blobs(shape, seed), affine) for seed in (0, 1)]


@pytest.mark.parametrize("turn", [0.0, 0.2])
def test_the_converted_twin_is_converted_alike(turn):
    """What the network is given is what nibabel and SciPy make of the image, and `conform` too."""
    moving, fixed = las_pair(turn)
    seen = Recorder()
    register(moving, fixed, Network(seen, CONTRACT))
    for image, given in ((moving, seen.moving), (fixed, seen.fixed)):
        by_hand = twin(image)
        assert by_hand.orientation == "RAS"
        torch.testing.assert_close(given, by_hand.tensor, rtol=0, atol=1e-5)
        ours = conform(
            Image(scaled(image.tensor), image.affine), orientation="RAS", spacing=(2, 2, 2)
        )
        torch.testing.assert_close(ours.tensor, by_hand.tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.affine, by_hand.affine, rtol=0, atol=1e-9)


@pytest.mark.parametrize("turn", [0.0, 0.2])
def test_an_las_1_mm_image_gives_the_transform_of_its_ras_2_mm_twin(turn):
    """In world mm: at every fixed voxel both carry the point to the same place.

    1e-3 mm inside; the outermost half voxel of the fine grid goes on in a straight line.
    """
    moving, fixed = las_pair(turn)
    network = Demons(3)
    ours = register(moving, fixed, Network(network, CONTRACT))
    twins = [twin(moving), twin(fixed)]
    # The twins are in range, orientation and spacing what the network takes: no contract.
    theirs = register(*twins, Network(network))
    assert theirs.field.shape[2:] == (13, 15, 12)
    assert ours.field.shape[2:] == (26, 30, 23)
    assert float(ours.field.abs().max()) > 1
    voxels = identity_grid(fixed.tensor.shape[2:], dtype=torch.float64)[..., 1:-1, 1:-1, 1:-1]
    world = voxel_to_world(voxels.flatten(2).mT, fixed.affine)
    a, b = (r.apply_points(world, space="ras") for r in (ours, theirs))
    # No constant shift, which would agree by chance: it varies by a hundred tolerances.
    assert float((a - world).std(1).min()) > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_a_permuted_pair_of_unequal_grids_gives_the_same_transform():
    """The moving image in other axes and another size; the fixed one permuted by hand."""
    moving, fixed = las_pair()
    network = Network(Demons(3), CONTRACT)
    plain = register(moving, fixed, network)
    turned = Image(fixed.tensor.permute(0, 1, 4, 2, 3).flip(2), fixed.affine)
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[:, 0], affine[:, 1], affine[:, 2] = -fixed.affine[:, 2], *fixed.affine.T[:2]
    affine[:, 3] = fixed.affine[:, 3] + (turned.tensor.shape[2] - 1) * fixed.affine[:, 2]
    turned = Image(turned.tensor, affine)
    permuted = register(moving, turned, network)
    inner = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    world = voxel_to_world(5 + 13 * inner, fixed.affine)
    a, b = (r.apply_points(world, space="ras") for r in (plain, permuted))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_a_pair_in_a_batch_gets_what_it_gets_alone(d, batch):
    shape = (21, 26, 18)[:d]
    contract = {"range": [0, 1], "size_multiple": 8, "orientation": "PIR" if d == 3 else "PL"}
    moving, fixed = blobs(shape, 0, batch), blobs(shape, 1, batch)
    start = torch.eye(d + 1).repeat(batch, 1, 1)
    start[:, 0, d] = torch.arange(batch)
    network = Network(Demons(d), contract)
    together = register(moving, fixed, network, start=start)
    for i in range(batch):
        one = slice(i, i + 1)
        alone = register(moving[one], fixed[one], network, start=start[one])
        torch.testing.assert_close(alone.field[0], together.field[i], rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.warped[0], together.warped[i], rtol=1e-4, atol=1e-2)


# --- Sizes, intensities, starts -------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (20, 50)])
def test_sizes_are_padded_and_intensities_scaled(low, high):
    """27 x 30 to multiples of 4: 28 x 32, one column in front; around it the least intensity."""
    moving, fixed = blobs((27, 30), 0, 2), blobs((27, 30), 1, 2)
    seen = Recorder()
    found = register(moving, fixed, Network(seen, {"range": [low, high], "size_multiple": 4}))
    for image, given in ((moving, seen.moving), (fixed, seen.fixed)):
        expected = F.pad(scaled(image, low, high), (1, 1, 0, 1), value=low)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * (high - low))
    assert found.field.shape == (2, 2, 27, 30)
    assert found.settings["notes"] == [
        f"intensities of each image scaled to {low} .. {high}",
        "fixed grid 27 x 30 brought to 28 x 32 for the network (size_multiple 4), "
        "the least intensity around it; its field brought back",
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_brightest_voxels_are_clipped_as_the_contract_says(batch):
    """The k-th smallest of all values becomes the end: a sort of each image says which."""
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.randn(2, batch, 2, 10, 12, generator=generator).exp().unbind()
    seen = Recorder(torch.zeros(batch, 2, 10, 12))
    contract = {"range": [-1, 3], "quantile": 0.9, "channels": 2}
    found = register(moving, fixed, Network(seen, contract))
    for image, given in ((moving, seen.moving), (fixed, seen.fixed)):
        for one, own in zip(image, given, strict=True):
            ordered = one.flatten().sort().values
            least, largest = ordered[0], ordered[round(0.9 * len(ordered)) - 1]
            expected = -1 + 4 * ((one - least) / (largest - least)).clamp(max=1)
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    notes = "intensities of each image scaled to -1 .. 3, those above the quantile 0.9 clipped"
    assert notes in found.settings["notes"]


def test_a_small_bright_thing_on_black_keeps_its_extremes():
    """Where the quantile is the background itself, there would be nothing left to see."""
    fixed = torch.zeros(1, 1, 20, 20)
    fixed[..., 5:7, 5:7] = torch.tensor([[2.0, 4], [6, 8]])
    seen = Recorder()
    register(fixed, fixed, Network(seen, {"range": [0, 1], "quantile": 0.9}))
    torch.testing.assert_close(seen.fixed, fixed / 8)


def test_without_a_contract_images_are_left_alone():
    moving, fixed = blobs((13, 17), 0), blobs((13, 17), 1)
    seen = Recorder()
    found = register(moving, fixed, Network(seen))
    assert seen.moving.equal(moving)
    assert seen.fixed.equal(fixed)
    assert found.settings["notes"] == ["fixed grid as the network takes it"]
    torch.testing.assert_close(found.warped, moving)


@pytest.mark.parametrize("d", [2, 3])
def test_the_spacing_is_told_along_the_axes_that_the_network_sees(d):
    """Written as PIR (PL) from axes that lie otherwise: the numbers change places with them."""
    shape, spacing = (8, 9, 10)[:d], (0.7, 2.0, 3.1)[:d]
    affine = placed(d, "LPS"[:d], spacing, shape)
    image, seen = blobs(shape), Recorder()
    contract = {"orientation": "PIR" if d == 3 else "PL", "tells_spacing": True}
    register(image, image, Network(seen, contract), moving_affine=affine, fixed_affine=affine)
    assert seen.told.keys() == {"spacing"}
    assert seen.told["spacing"] == pytest.approx([2.0, 3.1, 0.7] if d == 3 else [2.0, 0.7])
    register(image, image, Network(seen, {}), moving_affine=affine, fixed_affine=affine)
    assert not seen.told


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.8, 2.5)], ids=str)
def test_georeg_is_told_the_spacing_of_the_image(spacing):
    torch.manual_seed(0)
    network = georeg.GeoReg(channels=(4, 6, 8), spacing=(1.0, 1.0)).eval()
    for name, weights in network.named_parameters():
        if name.endswith("head.2.weight"):
            nn.init.normal_(weights, std=0.3)
    moving, fixed = blobs((16, 24), 0), blobs((16, 24), 1)
    affine = placed(2, "RA", spacing, (16, 24))
    method = Network(network, {"tells_spacing": True})
    found = register(moving, fixed, method, moving_affine=affine, fixed_affine=affine)
    with torch.no_grad():
        told = network(moving, fixed, spacing=spacing).field
        untold = network(moving, fixed).field
    torch.testing.assert_close(found.field, told, rtol=0, atol=1e-4)
    assert told.allclose(untold, atol=1e-3) == (spacing == (1.0, 1.0))


def test_a_constant_image_is_the_least_intensity():
    seen = Recorder()
    register(torch.full((1, 1, 8, 8), 7.0), blobs((8, 8)), Network(seen, {"range": [2, 3]}))
    assert seen.moving.unique().tolist() == [2]


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_share_their_scale(channels):
    moving = blobs((8, 9), 3, channels).movedim(0, 1)
    seen = Recorder()
    seen_by = Network(seen, {"range": [0, 1], "channels": channels})
    field = torch.zeros(1, 2, 8, 9)
    seen.field = field
    register(moving, moving.flip(2), seen_by)
    torch.testing.assert_close(seen.moving, (moving - moving.min()) / (moving.max() - moving.min()))


@pytest.mark.parametrize("d", [2, 3])
def test_the_network_sees_the_moving_image_through_the_start(d):
    """The affine start is kept as A; the field is what remains. No scale, so no smoothing."""
    shape, moving_shape = (15, 12, 14)[:d], (20, 18, 16)[:d]
    fixed, moving = blobs(shape, 0), blobs(moving_shape, 1)
    fixed_affine = placed(d, "RAS"[:d], (1,) * d, shape)
    moving_affine = placed(d, "PLS" if d == 3 else "PL", (1,) * d, moving_shape)
    start = torch.eye(d + 1, dtype=torch.float64)[None]
    start[0, :d, d] = torch.tensor([1.3, -0.4, 0.7][:d])
    seen = Recorder(field=0.7 * torch.ones(1, d, *shape))
    found = register(
        moving,
        fixed,
        Network(seen),
        fixed_affine=fixed_affine,
        moving_affine=moving_affine,
        start=start,
    )
    there = affine_field(start, fixed_affine, moving_affine, shape)
    torch.testing.assert_close(seen.moving, warp(moving, there, padding="zeros"), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.affine, start)
    torch.testing.assert_close(found.field, seen.field)


def start_with(field):
    """A method that finds a given field."""

    def method(pair):
        yield Iterate(
            "given", {}, torch.zeros(len(field), dtype=bool), lambda: (pair.affine, field)
        )

    return method


@pytest.mark.parametrize("d", [2, 3])
def test_a_network_after_another_method_finds_what_remains(d):
    """It sees the moving image through A and u, and phi becomes A(u0 after what it finds)."""
    shape, batch = (15, 12, 14)[:d], 2
    moving, fixed = blobs(shape, 0, batch), blobs(shape, 1, batch)
    generator = torch.Generator().manual_seed(0)
    first = gaussian_smooth(torch.randn(batch, d, *shape, generator=generator), 1.5) * 8
    second = gaussian_smooth(torch.randn(batch, d, *shape, generator=generator), 1.5) * 8
    seen = Recorder(field=second)
    found = register(moving, fixed, [start_with(first), Network(seen)])
    torch.testing.assert_close(seen.moving, warp(moving, first, padding="zeros"), rtol=0, atol=1e-2)
    torch.testing.assert_close(found.field, compose(first, second), rtol=0, atol=1e-4)
    # What the network saw, warped by what it found, is the whole: up to a second interpolation.
    again = warp(seen.moving, second)
    inner = (..., *(slice(4, -4),) * d)
    assert float((again - found.warped)[inner].abs().mean()) < 0.1 * float(moving.std())


def test_a_start_field_of_nearly_nothing_is_nearly_no_start_field():
    """Both ways to look at the moving image are one: other grids, spacing and padding included."""
    moving, fixed = las_pair(0.1)
    start = torch.eye(4, dtype=torch.float64)[None]
    start[0, 0, 3], start[0, 1, 0] = 2.0, 0.1
    contract = CONTRACT | {"size_multiple": 8}
    seen = [Recorder(), Recorder()]
    register(moving, fixed, Network(seen[0], contract), start=start)
    tiny = torch.full((1, 3, *fixed.tensor.shape[2:]), 1e-6)
    register(moving, fixed, [start_with(tiny), Network(seen[1], contract)], start=start)
    torch.testing.assert_close(seen[0].moving, seen[1].moving, rtol=0, atol=1e-4)


def test_a_start_field_reaches_the_grid_of_the_network_in_its_voxels():
    """A shift by 2 mm to the left is one voxel of 2 mm along the other direction."""
    moving, fixed = las_pair()
    shift = torch.zeros(1, 3, *fixed.tensor.shape[2:])
    shift[:, 0] = 2.0  # LAS: two voxels to the left
    seen = [Recorder(), Recorder()]
    register(moving, fixed, Network(seen[0], CONTRACT))
    register(moving, fixed, [start_with(shift), Network(seen[1], CONTRACT)])
    torch.testing.assert_close(
        seen[1].moving[:, :, 1:], seen[0].moving[:, :, :-1], rtol=0, atol=1e-4
    )


def test_a_linear_field_comes_back_linear_to_the_border():
    """From 2 mm RAS to 1 mm LAS: half the voxels, components turned, straight on at the edge."""
    _, fixed = las_pair()
    affine, shape = conform_grid(
        fixed.affine, fixed.tensor.shape[2:], **{k: CONTRACT[k] for k in ("orientation", "spacing")}
    )
    linear = torch.tensor([[0.1, 0.02, 0], [0, -0.1, 0.03], [0.05, 0, 0.1]], dtype=torch.float64)

    def displacement(affine, shape):
        """``linear @ world mm``, in voxels of a grid."""
        world = voxel_to_world(identity_grid(shape, dtype=torch.float64).flatten(2).mT, affine)
        vectors = world @ linear.T @ torch.linalg.inv(affine[:3, :3]).T
        return vectors.mT.reshape(1, 3, *shape).float()

    seen = Recorder(field=displacement(affine, shape))
    found = register(fixed, fixed, Network(seen, CONTRACT))
    expected = displacement(fixed.affine, fixed.tensor.shape[2:])
    torch.testing.assert_close(found.field, expected, rtol=0, atol=1e-4)


# --- One field of view ----------------------------------------------------------------------


def things(shape, places, width=7):
    """On black, one bright block of odd width in each image, around a place of its own."""
    images = torch.zeros(len(places), 1, *shape)
    for n, place in enumerate(places):
        half = width // 2
        block = tuple(slice(p - half, p + half + 1) for p in place)
        images[(n, 0, *block)] = torch.rand((width,) * len(shape)) + 0.5
    return images


def by_place(moving, fixed):
    """A network that goes by where in its image things are."""
    shape = moving.shape[2:]
    middle = torch.tensor([(n - 1) / 2 for n in shape]).view(1, -1, *(1,) * len(shape))
    return 0.05 * (identity_grid(shape) - middle) + (moving - fixed)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_the_field_of_view_lies_around_what_is_bright_in_each_moving_image(d, batch):
    """Cut out by hand; where it leaves the image, there is background."""
    torch.manual_seed(0)
    shape, size = (24, 30, 22)[:d], [12, 16, 8][:d]
    places = [[10, 12, 9][:d], [4, 20, 17][:d], [19, 7, 11][:d]][:batch]
    moving, fixed = things(shape, places), torch.rand(batch, 1, *shape)
    seen = []

    def network(*images):
        seen.append(images)
        return by_place(*images)

    contract = {"size": size, "size_multiple": 2}
    found = register(moving, fixed, Network(network, contract))
    assert len(seen) == batch
    for n, place in enumerate(places):
        # Even sizes have no middle voxel: half a voxel up.
        first = [p - k // 2 + 1 for p, k in zip(place, size, strict=True)]
        box = tuple(slice(20 + f, 20 + f + k) for f, k in zip(first, size, strict=True))
        for image, own in ((moving, seen[n][0]), (fixed, seen[n][1])):
            wanted = F.pad(image[n : n + 1], (20,) * 2 * d)[(..., *box)]
            torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
        # Around it the field goes on as it is at its edge.
        field = F.pad(by_place(*seen[n]), (30,) * 2 * d, mode="replicate")
        corner = [30 - f for f in first]
        back = tuple(slice(c, c + k) for c, k in zip(corner, shape, strict=True))
        torch.testing.assert_close(found.field[n : n + 1], field[(..., *back)], rtol=0, atol=1e-4)
        one = slice(n, n + 1)
        alone = register(moving[one], fixed[one], Network(network, contract))
        torch.testing.assert_close(alone.field, found.field[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", [2, 3])
def test_a_wide_margin_changes_nothing(d):
    """Nor does another order of axes, which the contract undoes."""
    torch.manual_seed(0)
    shape, margin = (24, 30, 22)[:d], [3, 9, 0, 14, 7, 2][: 2 * d]
    moving, fixed = things(shape, [[10, 14, 11][:d]]), things(shape, [[12, 13, 11][:d]])
    contract = {"size": [16, 24, 16][:d], "orientation": "RAS"[:d], "spacing": [1.0] * d}
    method = Network(by_place, contract)
    affine = torch.eye(d + 1, dtype=torch.float64)
    wanted = register(Image(moving, affine), Image(fixed, affine), method).field
    wide = [F.pad(x, margin) for x in (moving, fixed)]
    before = margin[::2][::-1]
    corner = affine.clone()
    corner[:d, d] = -torch.tensor(before)
    found = register(*(Image(x, corner) for x in wide), method).field
    inner = (..., *(slice(b, b + n) for b, n in zip(before, shape, strict=True)))
    torch.testing.assert_close(found[inner], wanted, rtol=0, atol=1e-4)
    turned, swapped = [x.transpose(2, 3).flip(2) for x in wide], corner.clone()
    swapped[:d, :2] = corner[:d, [1, 0]]
    swapped[:d, 0] *= -1
    swapped[:d, d] += (wide[0].shape[3] - 1) * corner[:d, 1]
    found = register(*(Image(x, swapped) for x in turned), method).field
    back = found.flip(2).transpose(2, 3)
    back = torch.cat([back[:, 1:2], -back[:, :1], back[:, 2:]], 1)
    torch.testing.assert_close(back[inner], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("d", [2, 3])
def test_the_field_of_view_is_found_in_the_world(d):
    """Grids of other orientation, spacing and origin; a start and a start field of each pair.

    The fixed image's channels are its world coordinates, so the mean of what is seen is the middle
    of the view: within half a voxel of 1 mm of where A and u bring the moving thing. At its corner
    is a spike, around it a dim halo, and elsewhere a background of -3.
    """
    torch.manual_seed(0)
    shape, other, batch = (50, 60, 54)[:d], (30, 26, 34)[:d], 2
    fixed_affine = placed(d, "LPS"[:d], (1.0,) * d, shape)
    moving_affine = placed(d, "AIR" if d == 3 else "AR", (1.5, 0.8, 1.2)[:d], other)
    moving_affine[:d, d] += torch.tensor([300.0, -200.0, 90.0])[:d].double()
    places = [[12, 11, 15][:d], [16, 14, 20][:d]]
    width = 11 if d == 2 else 5  # one in a hundred voxels may be a spike
    moving = things(other, places, width)
    halo = F.max_pool2d(moving, 5, 1, 2) if d == 2 else F.max_pool3d(moving, 5, 1, 2)
    moving = torch.where(moving > 0, moving, 0.05 * halo.roll(2, -1)) * 100 - 3
    for image, place in zip(moving, places, strict=True):
        image[(0, *(p + width // 2 for p in place))] = 5000.0
    grid = identity_grid(shape, dtype=torch.float64)
    world = voxel_to_world(grid.flatten(2).mT, fixed_affine).mT.reshape(1, d, *shape).float()
    starts = torch.eye(d + 1, dtype=torch.float64).repeat(batch, 1, 1)
    starts[:, :d, :d] *= 1.1
    there = [voxel_to_world(torch.tensor([[p]]).double(), moving_affine)[0, 0] for p in places]
    goals = torch.tensor([[10.0, -6.0, 5.0], [14.0, -10.0, 1.0]]).double()[:, :d]
    for start, place, goal in zip(starts, there, goals, strict=True):
        start[:d, d] = place - start[:d, :d] @ goal
    shift = torch.tensor([1.5, -2.0, 0.5][:d]).view(1, d, *(1,) * d).expand(batch, d, *shape)
    contract = {"size": [8, 12, 6][:d], "spacing": [2.0] * d}
    contract["orientation"] = "PIR" if d == 3 else "PR"
    for before, moved in (([], 0 * shift), ([start_with(shift)], shift)):
        seen = []

        def network(moving, fixed, seen=seen):
            seen.append(fixed)
            return fixed.new_zeros(len(fixed), d, *fixed.shape[2:])

        found = register(
            moving.expand(-1, d, *(-1,) * d),
            world.expand(batch, *(-1,) * (d + 1)),
            [*before, Network(network, contract)],
            fixed_affine=fixed_affine,
            moving_affine=moving_affine,
            start=starts,
        )
        for view, goal, u in zip(seen, goals, moved, strict=True):
            assert view.shape[2:] == tuple(contract["size"])
            mm = fixed_affine[:d, :d] @ u.flatten(1)[:, 0].double()
            middle = view[0].flatten(1).mean(1).double()
            assert float((middle - (goal - mm)).abs().max()) < 0.51
            world_axes, steps = ((1, 2, 0), [-2, -2, 2]) if d == 3 else ((1, 0), [-2, 2])
            along = [float(view[0, k].diff(dim=a).mean()) for a, k in enumerate(world_axes)]
            assert along == pytest.approx(steps, abs=1e-3)
        assert "around what is bright in each moving image" in str(found.settings["notes"])


def test_specks_in_a_volume_do_not_move_the_field_of_view():
    torch.manual_seed(0)
    moving = things((40, 60, 32), [[18, 40, 16]], 25)
    fixed = torch.rand(moving.shape)
    dirty = moving.clone()
    dirty[0, 0, 35, 3, 1:3] = 40.0
    seen = [Recorder(), Recorder()]
    for image, network in zip((moving, dirty), seen, strict=True):
        register(image, fixed, Network(network, {"size": [32, 32, 32]}))
    assert torch.equal(seen[0].fixed, seen[1].fixed)


def test_the_field_of_view_follows_the_start():
    """The moving image was taken 100 mm away: a start by so much brings both into view."""
    torch.manual_seed(0)
    moving, fixed = things((24, 30), [[10, 14]]), things((24, 30), [[12, 13]])
    method = Network(by_place, {"size": [16, 24]})
    wanted = register(moving, fixed, method).field
    away = torch.eye(3, dtype=torch.float64)
    away[:2, 2] = torch.tensor([100.0, -40.0])
    found = register(
        Image(moving, away),
        Image(fixed, torch.eye(3, dtype=torch.float64)),
        method,
        start=away[None],
    ).field
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize(
    ("off", "words"), [(0, None), (3, None), (4, None), (5, "2%"), (14, "20%"), (39, "70%")]
)
def test_the_report_says_how_much_of_the_fixed_image_was_not_seen(off, words, d, count):
    """A thing 50 planes wide in a view of 58, with the moving one in its middle.

    Off by 14, 10 of its 50 planes lie beyond. Axes are permuted and flipped, spacing is not the
    same along them; the thing is off along the world's second axis. Noise around it is no part.
    """
    shape = (120, 30, 26)[:d]
    orientation, spacing = ("PSL", (1.0, 1.5, 0.8)) if d == 3 else ("PR", (1.0, 1.5))
    affine = placed(d, orientation, spacing, shape)
    contract = {"size": (12, 29, 16)[:d], "spacing": (3.0, 2.0, 3.0)[:d], "orientation": "RAI"[:d]}
    generator = torch.Generator().manual_seed(0)
    moving, fixed = (0.001 * torch.rand(count, 1, *shape, generator=generator) for _ in range(2))
    rest = (slice(10, 18),) * (d - 1)
    # Most is lost of the first pair, nothing of others; each lies elsewhere.
    for n, (first, away) in enumerate(zip((20, 25, 18), (off, 0, 1), strict=True)):
        for image, place in ((moving, first), (fixed, first + away)):
            if n < count:
                image[(n, 0, slice(place, place + 50), *rest)] = 0.5
    method = Network(Recorder(), contract)
    found = register(moving, fixed, method, moving_affine=affine, fixed_affine=affine)
    notes = [note for note in found.settings["notes"] if "lies beyond the" in note]
    sentence = f"{words} of what is bright in the fixed image lies beyond the field of view"
    if count > 1:
        sentence = "up to " + sentence.replace("the fixed", "a fixed")
    assert notes == ([] if words is None else [sentence])


def test_of_an_image_without_anything_bright_the_middle_is_seen():
    seen = Recorder()
    fixed = torch.arange(20.0).view(1, 1, 20, 1).expand(1, 1, 20, 10)
    register(torch.ones(1, 1, 20, 10), fixed, Network(seen, {"size": [4, 4]}))
    torch.testing.assert_close(seen.fixed[0, 0, :, 0], torch.arange(8.0, 12.0), rtol=0, atol=1e-5)


# --- The network itself ---------------------------------------------------------------------


class Dropping(nn.Module):
    """Batch statistics and dropout: must not be used, changed or left switched."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, moving, fixed):
        assert not torch.is_grad_enabled()
        return self.frozen(self.drop(self.norm(moving - fixed))).repeat(1, 2, 1, 1)


def test_a_network_left_in_training_mode_is_evaluated_and_left_as_it_was():
    network = Dropping().train()
    network.frozen.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    moving, fixed = blobs((9, 8), 0, 2), blobs((9, 8), 1, 2)
    a, b = (register(moving, fixed, network) for _ in range(2))
    assert a.field.equal(b.field)
    assert all(v.equal(before[k]) for k, v in network.state_dict().items())
    assert [network.training, network.drop.training, network.frozen.training] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_images_of_any_precision_reach_the_network_in_its_own(dtype):
    """NumPy's double is what many a user has; float32 weights must take it."""
    images, _ = datasets.mnist("test")
    moving, fixed = images[:2].to(dtype), images[10:12].to(dtype)
    network = georeg.load_pretrained()
    found = register(moving, fixed, network)
    work = torch.promote_types(dtype, torch.float32)
    assert found.field.dtype == found.warped.dtype == work
    expected = network(scaled(moving.float()), scaled(fixed.float())).field
    torch.testing.assert_close(found.field, expected.to(work), rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_georeg_through_register_is_georeg(batch):
    """28 x 28 digits are what its weights take."""
    images, _ = datasets.mnist("test")
    moving, fixed = images[:batch], images[100 : 100 + batch]
    network = georeg.load_pretrained()
    found = register(moving, fixed, network)
    with torch.no_grad():
        field = network(scaled(moving), scaled(fixed)).field
    torch.testing.assert_close(found.field, field, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.warped, warp(moving, field), rtol=0, atol=1e-5)
    assert float(field.abs().max()) > 1


def test_georeg_takes_odd_sizes_padded_and_cropped():
    images, _ = datasets.mnist("test")
    moving = F.pad(images[:2], (1, 1, 0, 0))[:, :, 1:]
    fixed = F.pad(images[100:102], (1, 1, 0, 0))[:, :, 1:]
    assert moving.shape == (2, 1, 27, 30)
    network = georeg.load_pretrained()
    found = register(moving, fixed, network)
    margin = (1, 1, 0, 1)
    with torch.no_grad():
        field = network(*(F.pad(scaled(x), margin) for x in (moving, fixed))).field
    torch.testing.assert_close(found.field, field[:, :, :27, 1:31], rtol=0, atol=1e-4)


def test_georeg_takes_a_picture_as_it_comes(tmp_path):
    """A digit of 0 to 255 whose axes run like a picture's."""
    images, _ = datasets.mnist("test")
    picture = torch.tensor([[0.0, -1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    network = georeg.load_pretrained()
    moving, fixed = (Image(255 * images[i : i + 1], picture) for i in (0, 100))
    found = register(moving, fixed, network)
    plain = register(images[:1], images[100:101], network)
    torch.testing.assert_close(found.field, plain.field, rtol=0, atol=1e-4)
    found.save(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["notes"] == [
        "intensities of each image scaled to 0 .. 1",
        "fixed grid as the network takes it",
    ]
    [method] = report["method"]
    assert method["name"] == "georeg"
    assert method["settings"] == {"channels": 1, "range": [0, 1], "size_multiple": 4}
    assert method["weights"]["provenance"]["commit"]
    assert Registration.load(tmp_path).settings["notes"] == report["notes"]


def test_a_plain_function_is_named_in_the_report():
    def twist(moving, fixed):
        return torch.zeros(1, 2, 8, 8)

    found = register(blobs((8, 8)), blobs((8, 8)), Network(twist))
    assert found.settings["method"][0]["name"] == "twist"


def test_masks_that_a_network_does_not_use_are_mentioned():
    mask = torch.ones(1, 1, 8, 8)
    found = register(
        blobs((8, 8)), blobs((8, 8)), Network(Recorder()), fixed_mask=mask, moving_mask=mask
    )
    assert "the network does not use the moving and fixed mask" in found.settings["notes"]


# --- Bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contract", "error", "sentence"),
    [
        ({"sizes": 4}, ValueError, "contract: wanted keys out of"),
        ([1], TypeError, "contract: wanted a mapping"),
        ({"size_multiple": 0}, ValueError, "size_multiple: wanted at least 1"),
        ({"size_multiple": 2.5}, TypeError, "size_multiple"),
        ({"size": 40}, TypeError, "size: wanted 2 or 3 positive integers, got int"),
        ({"size": [40]}, ValueError, r"size: wanted 2 or 3 positive integers, got \(40,\)"),
        ({"size": [40, 0]}, ValueError, "size: wanted 2 or 3 positive integers"),
        ({"size": [40, 4.5]}, TypeError, "size: wanted 2 or 3 positive integers"),
        (
            {"size": [40, 44], "size_multiple": 8},
            ValueError,
            r"size: wanted multiples of size_multiple, 8, got \[40, 44\]",
        ),
        ({"range": [1, 0]}, ValueError, "range: wanted two ascending numbers"),
        ({"range": [0, 1, 2]}, ValueError, "range"),
        ({"range": "01"}, TypeError, "range"),
        ({"range": [0, 1], "quantile": 0}, ValueError, "quantile: wanted a number above 0"),
        ({"range": [0, 1], "quantile": 99}, ValueError, "quantile: wanted a number above 0"),
        ({"range": [0, 1], "quantile": "all"}, TypeError, "quantile"),
        ({"quantile": 0.99}, ValueError, "quantile: wanted a range beside it"),
        ({"tells_spacing": "mm"}, TypeError, "tells_spacing: wanted true or false, got 'mm'"),
    ],
    ids=str,
)
def test_a_malformed_contract_is_named_at_once(contract, error, sentence):
    with pytest.raises(error, match=sentence):
        Network(Recorder(), contract)
    network = Recorder()
    network.card = {"input": contract}
    with pytest.raises(error, match=sentence):
        Network(network)


def test_what_is_no_network_is_named():
    with pytest.raises(TypeError, match="network: wanted a callable, got int"):
        Network(3)


@pytest.mark.parametrize(
    ("contract", "sentence"),
    [
        ({"channels": 2}, r"wanted images of 2 channel\(s\) for this network, got 1"),
        ({"orientation": "RAS"}, "orientation: wanted one letter of each of LR, PA"),
        ({"spacing": [1, 1, 1]}, "spacing: wanted 2 positive numbers"),
        ({"size": [8, 8, 8]}, "size: wanted 2 positive integers"),
    ],
    ids=str,
)
def test_images_that_a_contract_cannot_take_are_named(contract, sentence):
    with pytest.raises(ValueError, match=sentence):
        register(blobs((8, 8)), blobs((8, 8)), Network(Recorder(), contract))


@pytest.mark.parametrize(
    ("field", "error", "sentence"),
    [
        (torch.zeros(1, 2, 4, 4), ValueError, r"wanted a field for 1 pair\(s\) on a grid of"),
        (torch.zeros(2, 2, 8, 8), ValueError, "wanted a field for 1 pair"),
        (torch.zeros(1, 1, 8, 8), ValueError, "network's field: wanted a field"),
        (torch.full((1, 2, 8, 8), torch.nan), ValueError, "network's field: wanted finite"),
        (torch.zeros(1, 2, 8, 8, dtype=int), TypeError, "network's field"),
    ],
)
def test_an_answer_that_is_no_field_is_named(field, error, sentence):
    with pytest.raises(error, match=sentence):
        register(blobs((8, 8)), blobs((8, 8)), Network(Recorder(field)))


def test_a_network_of_other_dimensions_or_elsewhere_is_named():
    volume = blobs((8, 8, 8))
    with pytest.raises(ValueError, match="2 spatial axes"):
        register(volume, volume, georeg.load_pretrained())
    digits = blobs((8, 8))
    with pytest.raises(ValueError, match="network: wanted it on cpu, where the images are"):
        register(digits, digits, Demons(2).to("meta"))
