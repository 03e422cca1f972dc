"""The report figure: panels where they belong, in the body's orientation and proportions."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from reglib.geometry.derivatives import jacobian_det
from reglib.show.plot import FIXED, WARPED
from reglib.show.report import registration_report

AFFINES = {2: torch.eye(3, dtype=torch.float64), 3: torch.eye(4, dtype=torch.float64)}


def pair(*shape, batch=1, channels=1):
    generator = torch.Generator().manual_seed(0)
    moving, fixed, warped = torch.rand(3, batch, channels, *shape, generator=generator)
    field = torch.rand(batch, len(shape), *shape, generator=generator)
    return moving, fixed, warped, field


def panels(figure):
    """Rows of (before, after, grid, Jacobian), without the colour bars."""
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert len(axes) % 4 == 0
    return [axes[i : i + 4] for i in range(0, len(axes), 4)]


def shown(ax):
    return np.asarray(ax.images[0].get_array())


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(9, 7), (6, 9, 7)])
def test_every_sample_is_drawn_and_nothing_leaks(shape, channels, batch):
    settings, figures = dict(mpl.rcParams), plt.get_fignums()
    images = pair(*shape, batch=batch, channels=channels)
    figure = registration_report(*images, AFFINES[len(shape)], index=batch - 1, title="a title")
    assert isinstance(figure, Figure)
    assert len(panels(figure)) == (1 if len(shape) == 2 else 3)
    assert figure.get_suptitle() == "a title"
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == figures, "the figure belongs to the caller, not to pyplot"
    alone = registration_report(*(x[-1:] for x in images), AFFINES[len(shape)])
    for row, other in zip(panels(figure), panels(alone), strict=True):
        for i in (0, 1, 3):
            np.testing.assert_array_equal(shown(row[i]), shown(other[i]))


# Where the array axes point, and the voxel that is most right, anterior and superior.
@pytest.mark.parametrize(
    ("rows", "corner"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], (6, 8, 4)),  # RAS
        ([[-1, 0, 0], [0, 1, 0], [0, 0, 1]], (0, 8, 4)),  # LAS
        ([[0, 0, 1], [1, 0, 0], [0, -1, 0]], (8, 0, 6)),  # AIR
    ],
)
def test_the_body_is_seen_from_the_front_and_from_below(rows, corner):
    """Right is on the left of the picture, anterior and superior are at the top."""
    sizes = {0: 7, 1: 9, 2: 5}  # of the world axes: right, front, up
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor(rows, dtype=torch.float64)
    shape = [sizes[int(affine[:3, c].abs().argmax())] for c in range(3)]
    assert all(v in (0, n - 1) for v, n in zip(corner, shape, strict=True))
    # A plane each through the middle, marked at the corner that is right, front or up there.
    marked = {}
    for world in range(3):
        voxel = list(corner)
        axis = int(affine[world, :3].abs().argmax())
        voxel[axis] = shape[axis] // 2
        marked[world] = tuple(voxel)
    fixed = torch.zeros(1, 1, *shape)
    for voxel in marked.values():
        fixed[(0, 0, *voxel)] = 1
    empty = torch.zeros(1, 1, *shape)
    figure = registration_report(empty, fixed, empty, torch.zeros(1, 3, *shape), affine)
    for (before, *_), where in zip(panels(figure), ("axial", "coronal", "sagittal"), strict=True):
        assert before.get_ylabel() == where
        brightness = shown(before).sum(-1)
        assert brightness[0, 0] == brightness.max() > 0, where


def test_planes_have_the_proportions_of_the_body():
    affine = torch.diag(torch.tensor([1.0, 2.0, 5.0, 1.0], dtype=torch.float64))
    figure = registration_report(*pair(8, 9, 7), affine)
    for row, aspect in zip(panels(figure), (2 / 1, 5 / 1, 5 / 2), strict=True):
        for ax in row:
            assert ax.get_aspect() == pytest.approx(aspect)


@pytest.mark.parametrize(("d", "flips"), [(2, (-1, 1)), (3, (1, -1, 1))])
def test_the_determinant_does_not_depend_on_how_the_file_lies(d, flips):
    """u = 0.2 x along every axis has det J = 1.2^D everywhere, in any orientation."""
    shape = (9, 7, 6)[:d]
    x = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    affine = torch.diag(torch.tensor([*flips, 1.0], dtype=torch.float64))
    images = pair(*shape)[:3]
    figure = registration_report(*images, 0.2 * x[None], affine)
    for row in panels(figure):
        np.testing.assert_allclose(shown(row[3]), 1.2**d, rtol=1e-5)


def test_folds_are_named():
    x = torch.arange(7.0).expand(9, 7)
    field = torch.stack([torch.zeros(9, 7), -2 * x])[None]
    figure = registration_report(*pair(9, 7)[:3], field, AFFINES[2])
    [legend] = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert "folded" in legend.get_texts()[0].get_text()


def test_bad_input_is_named():
    moving, fixed, warped, field = pair(9, 7)
    with pytest.raises(ValueError, match="moving"):
        registration_report(moving[..., 1:], fixed, warped, field, AFFINES[2])
    with pytest.raises(ValueError, match="warped"):
        registration_report(moving, fixed, warped[0], field, AFFINES[2])
    with pytest.raises(ValueError, match="field"):
        registration_report(moving, fixed, warped, field[..., 1:], AFFINES[2])
    with pytest.raises(ValueError, match="field"):
        registration_report(moving, fixed, warped, field.expand(2, 2, 9, 7), AFFINES[2])
    with pytest.raises(ValueError, match="affine"):
        registration_report(moving, fixed, warped, field, AFFINES[3])
    with pytest.raises(ValueError, match="index"):
        registration_report(moving, fixed, warped, field, AFFINES[2], index=1)


@pytest.mark.parametrize("shape", [(6, 9, 7), (2, 3, 5), (1, 4, 6)])
def test_the_middle_planes_are_those_of_the_whole_volume(shape):
    """Only a few slices are computed; array axes that go down, back and left stay as they are."""
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0] = affine[1, 1] = affine[0, 2] = -1
    affine[3, 3] = 1
    *images, field = pair(*shape)
    figure = registration_report(*images, 0.3 * field, affine)
    whole = jacobian_det(0.3 * field)[0]
    for axis, row in enumerate(panels(figure)):
        wanted = whole.select(axis, shape[axis] // 2).numpy()
        np.testing.assert_allclose(shown(row[3]), wanted, atol=1e-6)
        planes = [x[0, 0].select(axis, shape[axis] // 2).numpy() for x in images]
        moving, fixed, warped = ((p - p.min()) / np.ptp(p) for p in planes)
        for ax, other in zip(row, (moving, warped), strict=False):
            colours = other[..., None] * to_rgb(WARPED) + fixed[..., None] * to_rgb(FIXED)
            np.testing.assert_allclose(shown(ax), colours.clip(0, 1), atol=1e-5)
