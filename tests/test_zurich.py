"""The Zurich protocol against scikit-image, in which it was published (about 4 s)."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.transform import SimilarityTransform
from skimage.transform import warp as skimage_warp
from torch import Tensor

from reglib.data import assets, zurich
from reglib.data.zurich import (
    LEVELS,
    SIZE,
    SUCCESS,
    Patches,
    corner_error,
    draw_transforms,
    patches,
    relative_distance,
    transform_patches,
    zurich_protocol,
)
from reglib.geometry.affine import affine_field
from reglib.geometry.sampling import warp

#: SHA-256 of the embedded bands, uint16 in their order: those of the package they come from.
SENTINEL_SHA256 = "8fe73df16a2714d86c0bec81c088d751502fccf616530d2e650e02425f63617c"

every_level = pytest.mark.parametrize("level", LEVELS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 1, size: int = 24) -> Tensor:
    return torch.rand(count, 4, size, size, generator=seeded(count))


def published(angle: float, shift: tuple[float, float], size: int) -> SimilarityTransform:
    """The transform as the published code composes it: coordinates (x, y), the first acts first."""
    centre = np.array((size, size)) / 2 - 0.5
    return (
        SimilarityTransform(translation=shift)
        + SimilarityTransform(translation=-centre)
        + SimilarityTransform(rotation=angle)
        + SimilarityTransform(translation=centre)
    )


def as_published(matrix: Tensor, size: int) -> SimilarityTransform:
    """The published transform of the same angle and translation as one of ours."""
    linear = matrix[:2, :2].numpy()
    angle = math.atan2(linear[0, 1], linear[0, 0])
    centre = np.full(2, (size - 1) / 2)
    shift = np.linalg.solve(linear, matrix[:2, 2].numpy() - centre) + centre
    return published(angle, (shift[1], shift[0]), size)


# --- Transforms -------------------------------------------------------------------------------


@every_level
def test_amounts_lie_within_the_level_and_signs_are_free(level: int) -> None:
    """5 degrees and 7 pixels a level; of 200 draws, all eight combinations of signs occur."""
    found = draw_transforms(level, 200, generator=seeded(level))
    angles, shifts = [], []
    for matrix in found:
        linear = matrix[:2, :2]
        torch.testing.assert_close(linear @ linear.T, torch.eye(2, dtype=torch.float64))
        angles.append(math.degrees(math.atan2(float(linear[0, 1]), float(linear[0, 0]))))
        params = as_published(matrix, SIZE)
        centre = np.full(2, (SIZE - 1) / 2)
        moved = np.linalg.solve(linear.numpy(), matrix[:2, 2].numpy() - centre) + centre
        shifts.append(moved)
        np.testing.assert_allclose(math.degrees(params.rotation), angles[-1], atol=1e-9)
    amounts = np.column_stack([np.array(angles) / 5, np.array(shifts) / 7])
    assert (np.abs(amounts) >= level - 1 - 1e-9).all()
    assert (np.abs(amounts) <= level + 1e-9).all()
    assert len({tuple(row) for row in np.sign(amounts).tolist()}) == 8
    # Uniform: the mean of 600 amounts is within four standard errors of the middle.
    assert abs(np.abs(amounts).mean() - (level - 0.5)) < 4 * math.sqrt(1 / 12 / 600)


@every_level
def test_the_matrix_is_the_published_one_with_its_axes_exchanged(level: int) -> None:
    swap = np.eye(3)[[1, 0, 2]]
    for matrix in draw_transforms(level, 3, size=40, generator=seeded()):
        theirs = swap @ as_published(matrix, 40).params @ swap
        np.testing.assert_allclose(matrix.numpy(), theirs, atol=1e-9)


@every_level
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_images_are_those_of_scikit_image(level: int, batch: int) -> None:
    """Linear, reflected at the border: to 1e-5, what single precision leaves of coordinates."""
    x, transforms = images(batch, 48), draw_transforms(level, batch, size=48, generator=seeded())
    found = transform_patches(x, transforms)
    for image, matrix, mine in zip(x, transforms, found, strict=True):
        theirs = skimage_warp(
            image.double().movedim(0, 2).numpy(), as_published(matrix, 48), mode="reflect", order=1
        )
        np.testing.assert_allclose(mine.movedim(0, 2).numpy(), theirs, atol=1e-5)


def test_the_identity_gives_the_image_and_sizes_may_differ() -> None:
    x = torch.rand(2, 3, 7, 11)
    identity = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    torch.testing.assert_close(transform_patches(x, identity), x)


def test_a_shift_by_more_than_the_image_reflects_again() -> None:
    """2 (N - 1) is the period of the reflection."""
    x = torch.rand(1, 1, 5, 6)
    shift = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    shift[0, 0, 2], shift[0, 1, 2] = 2 * 4, -3 * 2 * 5
    torch.testing.assert_close(transform_patches(x, shift), x, atol=1e-5, rtol=0)


# --- Pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["multi", "single"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_truth_brings_the_moving_image_back(modality: str, batch: int) -> None:
    """A smooth image: interpolated twice and cut to bytes, it is off by less than 0.03.

    Where the truth leads out of the moving image there is nothing to compare.
    """
    axis = torch.linspace(0, 4, 96)
    wave = 0.5 + 0.25 * (axis.sin().view(-1, 1) + (1.3 * axis).cos())
    x = wave.expand(batch, 4, 96, 96)
    pairs = zurich_protocol(x, 2, modality=modality, generator=seeded())
    assert pairs.moving.shape == pairs.fixed.shape == (batch, 1, 96, 96)
    assert torch.equal(pairs.fixed, x[:, 3:])
    pixels = torch.eye(3, dtype=torch.float64)
    field = affine_field(pairs.truth, pixels, pixels, (96, 96)).float()
    inside = warp(torch.ones_like(pairs.moving), field, padding="zeros") > 0.999
    missed = (warp(pairs.moving, field) - pairs.fixed).abs()[inside]
    assert float(missed.max()) < 0.03
    before = (pairs.moving - pairs.fixed).abs().mean()
    assert float(missed.mean()) < 0.1 * float(before)


def test_moving_is_the_grey_value_or_the_infrared() -> None:
    """Grey as OpenCV's conversion has it, of the same transformed bytes."""
    x = images(2)
    multi = zurich_protocol(x, 1, modality="multi", generator=seeded())
    single = zurich_protocol(x, 1, modality="single", generator=seeded())
    torch.testing.assert_close(multi.truth, single.truth)
    moved = transform_patches(x, torch.linalg.inv(multi.truth))
    stored = ((moved * 255 + 1e-3).floor() / 255).double()
    grey = 0.114 * stored[:, :1] + 0.587 * stored[:, 1:2] + 0.299 * stored[:, 2:3]
    torch.testing.assert_close(multi.moving.double(), grey, atol=1e-6, rtol=0)
    torch.testing.assert_close(single.moving.double(), stored[:, 3:], atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_pairs() -> None:
    first, second = (zurich_protocol(images(2), 3, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first.moving, second.moving)
    other = zurich_protocol(images(2), 3, generator=seeded(6))
    assert not torch.equal(first.moving, other.moving)


# --- Error ------------------------------------------------------------------------------------


@every_level
def test_the_error_is_that_of_the_published_code(level: int) -> None:
    """Corners through the transform, back through what was found, compared with the corners."""
    transforms = draw_transforms(level, 3, generator=seeded(level))
    guess = torch.linalg.inv(draw_transforms(level, 3, generator=seeded(9)))
    found = corner_error(guess, torch.linalg.inv(transforms))
    w = SIZE
    corners = np.array([[0, 0], [0, w], [w, w], [w, 0]], float)
    swap = np.eye(3)[[1, 0, 2]]
    for mine, matrix, inverse in zip(found, transforms, guess, strict=True):
        there = as_published(matrix, w)(corners)
        back = (swap @ inverse.numpy() @ swap @ np.column_stack([there, np.ones(4)]).T).T[:, :2]
        np.testing.assert_allclose(
            float(mine), np.linalg.norm(back - corners, axis=1).mean(), atol=1e-9
        )


def test_the_truth_has_no_error_and_the_identity_that_of_doing_nothing() -> None:
    """A shift by (3, 4) pixels misses every corner by 5; 6 of 300 pixels are 2 %."""
    truth = torch.linalg.inv(draw_transforms(4, 3, generator=seeded()))
    assert float(corner_error(truth, truth).max()) < 1e-9
    shift = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    still = shift.clone()
    shift[0, 0, 2], shift[0, 1, 2] = 3, 4
    torch.testing.assert_close(corner_error(still, shift), torch.tensor([5.0]).double())
    torch.testing.assert_close(relative_distance(still, shift), torch.tensor([5 / 300]).double())
    assert pytest.approx(6 / SIZE) == SUCCESS


def test_levels_get_harder() -> None:
    """The initial distance of level 4 reaches 0.27 of the side, as published."""
    still = torch.eye(3, dtype=torch.float64).expand(400, 3, 3)
    initial = []
    for level in LEVELS:
        truth = torch.linalg.inv(draw_transforms(level, 400, generator=seeded(level)))
        initial.append(relative_distance(still, truth))
    means = [float(x.mean()) for x in initial]
    assert means == sorted(means)
    assert 0.25 < float(initial[3].max()) < 0.31
    # Even before any registration some pairs of level 1 are a success.
    assert 0.05 < float((initial[0] <= SUCCESS).double().mean()) < 0.3


# --- Patches ----------------------------------------------------------------------------------


def test_the_embedded_patch_is_that_of_its_package() -> None:
    path = Path(zurich.__file__).parent / "samples" / "sentinel2.npz"
    with np.load(path) as arrays:
        data = np.ascontiguousarray(arrays["data"])
    assert data.shape == (4, 300, 300)
    assert hashlib.sha256(data.tobytes()).hexdigest() == SENTINEL_SHA256


@pytest.mark.parametrize("stretched", [False, True])
def test_patches_are_bytes_from_0_to_1(stretched: bool) -> None:
    """Every band uses the whole range, in steps of 1/255."""
    found = patches(stretched=stretched)
    assert isinstance(found, Patches)
    assert found.images.shape == (1, 4, 300, 300)
    assert len(found.names) == 1
    flat = found.images.flatten(2)
    assert not flat.amin(2).any()
    assert bool((flat.amax(2) == 1).all())
    steps = flat * 255
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("stretched", [False, True])
def test_patches_of_quickbird_are_read_from_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretched: bool
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 256, (2, 300, 300, 4), np.uint8)
        for name in ("globalminmax", "stretched")
    }
    (tmp_path / "quickbird").mkdir()
    np.savez(
        tmp_path / "quickbird" / "patches300_bgrn_uint8.npz", ids=np.array(["a", "b"]), **arrays
    )
    monkeypatch.setenv("REGLIB_DATA", str(tmp_path))
    found = patches("quickbird", stretched=stretched)
    assert found.names == ("a", "b")
    wanted = arrays["stretched" if stretched else "globalminmax"]
    assert np.array_equal((found.images * 255).round().byte().movedim(1, 3).numpy(), wanted)


def test_absent_patches_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REGLIB_DATA", raising=False)
    monkeypatch.setenv("REGLIB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Orfeo ToolBox"):
        patches("quickbird")
    assert "manual" in assets.ASSETS["quickbird"]


# --- Bad input --------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="origin"):
        patches("landsat")
    for level in (0, 5, "1"):
        with pytest.raises(ValueError, match="level: wanted one of"):
            draw_transforms(level)
    with pytest.raises(ValueError, match="count"):
        draw_transforms(1, 0)
    with pytest.raises(ValueError, match="size"):
        draw_transforms(1, size=0)
    with pytest.raises(ValueError, match=r"images: wanted four bands .* got \(1, 3, 24, 24\)"):
        zurich_protocol(images()[:, :3], 1)
    with pytest.raises(ValueError, match="images: wanted four bands"):
        zurich_protocol(images()[:, :, :20], 1)
    with pytest.raises(TypeError, match="images"):
        zurich_protocol(images().long(), 1)
    with pytest.raises(ValueError, match="modality"):
        zurich_protocol(images(), 1, modality="three")
    identity = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    with pytest.raises(ValueError, match="images: wanted two axes"):
        transform_patches(torch.rand(1, 1, 1, 5), identity)
    with pytest.raises(ValueError, match="transforms"):
        transform_patches(images(2), identity)
    with pytest.raises(ValueError, match="matrix: wanted a batch of 1"):
        corner_error(identity.repeat(2, 1, 1), identity)
    with pytest.raises(ValueError, match="truth"):
        corner_error(identity, torch.eye(4).unsqueeze(0))
    with pytest.raises(ValueError, match="size"):
        relative_distance(identity, identity, size=0)
