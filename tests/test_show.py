"""Pictures: what is drawn lies where the conventions say, and nothing leaks into matplotlib."""

import base64
import html
import io
import json
import re
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from reglib import show
from reglib.geometry.sampling import warp
from reglib.show import plot


@pytest.fixture(autouse=True)
def _headless():
    mpl.use("agg")
    settings = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == settings


def blob(*shape: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, *shape, generator=generator)


def field(*shape: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, len(shape), *shape, generator=generator)


CUTS = [((6, 9), {}), ((5, 6, 9), {"axis": 0}), ((5, 6, 9), {"axis": 2, "position": 8})]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("shape", "cut"), CUTS)
def test_every_function_draws_every_sample(shape, cut, batch):
    moving, fixed, u = blob(*shape, batch=batch), blob(*shape, batch=batch), field(*shape)
    u = u.expand(batch, *u.shape[1:])
    at = cut | {"index": batch - 1}
    drawn = [
        show.image(moving, **at),
        show.overlay(moving, fixed, **at),
        show.checkerboard(moving, fixed, **at),
        show.deformed_grid(u, **at),
        show.quiver(u, **at),
        show.jacobian_map(u, **at),
    ]
    for ax in drawn:
        assert isinstance(ax, plt.Axes)
        assert ax.get_aspect() in (1.0, "equal")
        bottom, top = ax.get_ylim()
        assert bottom > top, "array axis 0 must point downwards"
        ax.figure.canvas.draw()
    assert len(show.pair(moving, fixed, **at).axes) == 2
    titles = [ax.get_title() for ax in show.pair(moving, fixed, moving, **at).axes]
    assert titles[:4] == ["moving", "fixed", "warped", "warped − fixed"]


def test_image_puts_voxel_centres_at_integers():
    ax = show.image(blob(6, 9))
    assert ax.images[0].get_extent() == [-0.5, 8.5, 5.5, -0.5]


@pytest.mark.parametrize(("axis", "position"), [(0, 1), (1, 3), (2, 0)])
def test_volume_is_cut_across_the_axis_at_the_position(axis, position):
    volume = blob(4, 5, 6, batch=2)
    shown = show.image(volume, index=1, axis=axis, position=position).images[0].get_array()
    np.testing.assert_allclose(shown, volume[1, 0].select(axis, position).numpy())


def test_a_missing_position_is_the_middle():
    volume = blob(4, 5, 7)
    shown = show.image(volume, axis=2).images[0].get_array()
    np.testing.assert_allclose(shown, volume[0, 0, :, :, 3].numpy())


def test_overlay_is_white_where_both_are_bright_and_in_their_colours_elsewhere():
    warped = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).view(1, 1, 1, 4)
    fixed = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).view(1, 1, 1, 4)
    both, only_warped, only_fixed, none = show.overlay(warped, fixed).images[0].get_array()[0]
    np.testing.assert_allclose(both, [1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(only_warped, to_rgb(plot.WARPED), atol=1e-6)
    np.testing.assert_allclose(only_fixed, to_rgb(plot.FIXED), atol=1e-6)
    np.testing.assert_allclose(none, [0, 0, 0])


def test_checkerboard_alternates_from_warped_at_the_origin():
    shape = (1, 1, 4, 6)
    shown = show.checkerboard(torch.ones(shape), torch.zeros(shape), tile=2).images[0].get_array()
    assert shown[0, 0] == 1
    assert shown[0, 2] == 0
    assert shown[2, 0] == 0
    assert shown[2, 2] == 1


def test_deformed_grid_carries_fixed_lines_to_phi():
    u = field(5, 7)
    u[:, 0] += 2.0
    lines = show.deformed_grid(u, step=4).collections[0].get_segments()
    assert len(lines) == 2 + 3  # rows 0, 4 and columns 0, 4, 6: the last line is always drawn
    x = np.arange(7) + u[0, 1, 4].numpy()
    y = 4 + u[0, 0, 4].numpy()
    np.testing.assert_allclose(lines[1], np.stack((x, y), axis=1), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_of_a_volume_field_shows_its_in_plane_components(axis):
    u = torch.zeros(1, 3, 4, 5, 6)
    for component in range(3):
        u[:, component] = 10.0 * (component + 1)
    rows, columns = (c for c in range(3) if c != axis)
    arrows = show.quiver(u, axis=axis, step=1).collections[0]
    assert set(arrows.V) == {10.0 * (rows + 1)}
    assert set(arrows.U) == {10.0 * (columns + 1)}
    first = show.deformed_grid(u, axis=axis, step=1).collections[0].get_segments()[0][0]
    np.testing.assert_allclose(first, [10.0 * (columns + 1), 10.0 * (rows + 1)])


def test_quiver_arrows_have_their_true_length_and_direction():
    u = torch.zeros(1, 2, 5, 7)
    u[:, 0], u[:, 1] = 2.0, -1.0
    arrows = show.quiver(u, step=2).collections[0]
    assert (arrows.angles, arrows.scale_units, arrows.scale) == ("xy", "xy", 1)
    assert set(arrows.V) == {2.0}
    assert set(arrows.U) == {-1.0}
    np.testing.assert_allclose(arrows.get_offsets()[1], [2.0, 0.0])


def test_drawing_over_an_image_keeps_its_view():
    ax = show.image(blob(6, 9))
    view = ax.get_xlim(), ax.get_ylim()
    show.deformed_grid(20 * field(6, 9), ax=ax)
    show.quiver(20 * field(6, 9), ax=ax)
    assert (ax.get_xlim(), ax.get_ylim()) == view


def test_jacobian_map_marks_folds_and_leaves_the_identity_alone():
    still = show.jacobian_map(torch.zeros(1, 2, 6, 9))
    assert not np.ma.getmaskarray(still.images[0].get_array()).any()
    assert still.get_legend() is None

    folded = torch.zeros(1, 2, 8, 8)
    folded[0, 0, 3], folded[0, 0, 5] = 1.5, -1.5
    ax = show.jacobian_map(folded)
    mask = np.ma.getmaskarray(ax.images[0].get_array())
    assert mask[4].all()
    assert not mask[0].any()
    assert "12.5 %" in ax.get_legend().get_texts()[0].get_text()


def test_jacobian_map_of_a_volume_is_the_determinant_in_3d():
    u = torch.zeros(1, 3, 4, 5, 6)
    u[:, 0] = 0.5 * torch.arange(4.0).view(4, 1, 1)
    shown = show.jacobian_map(u, axis=0).images[0].get_array()
    np.testing.assert_allclose(shown, 1.5, atol=1e-6)


def test_loss_curve_draws_each_term_against_the_step():
    ax = show.loss_curve({"similarity": [3.0, 2.0, 1.0], "smoothness": [1.0, 1.0, 2.0]}, log=True)
    assert [line.get_label() for line in ax.lines] == ["similarity", "smoothness"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [1, 2, 3])
    assert ax.get_yscale() == "log"


def test_drawing_accepts_gradients_low_precision_and_masks():
    u = field(6, 9).requires_grad_()
    show.deformed_grid(u)
    show.jacobian_map(u.half())
    show.image(blob(6, 9).bfloat16())
    show.image(blob(6, 9) > 0.5)


def test_use_style_changes_settings_only_when_called():
    with mpl.rc_context():
        mpl.rcParams["axes.spines.top"] = True
        show.use_style()
        assert mpl.rcParams["axes.spines.top"] is False


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: show.image(np.zeros((4, 4))), TypeError, "image.*Tensor"),
        (lambda: show.image(torch.zeros(4, 4)), ValueError, r"image.*\(4, 4\)"),
        (lambda: show.image(torch.zeros(1, 3, 4, 4)), ValueError, "image.*one channel"),
        (lambda: show.image(blob(4, 4), index=1), ValueError, "index"),
        (lambda: show.image(blob(4, 4), axis=0), ValueError, "axis"),
        (lambda: show.image(blob(4, 4, 4)), ValueError, "axis"),
        (lambda: show.image(blob(4, 4, 4), axis=1, position=4), ValueError, "position"),
        (lambda: show.image(blob(4, 4) * float("nan")), ValueError, "image.*NaN"),
        (lambda: show.pair(blob(4, 4), blob(4, 5)), ValueError, "moving, fixed.*same shape"),
        (lambda: show.overlay(blob(4, 4), blob(5, 4)), ValueError, "warped, fixed"),
        (lambda: show.checkerboard(blob(4, 4), blob(4, 4), tile=0), ValueError, "tile"),
        (lambda: show.deformed_grid(blob(4, 4)), ValueError, r"field.*\(1, 1, 4, 4\)"),
        (lambda: show.quiver(field(4, 4), step=0), ValueError, "step"),
        (lambda: show.jacobian_map(torch.zeros(1, 2, 4, 4, 4)), ValueError, "field"),
        (lambda: show.loss_curve({}), ValueError, "history"),
        (lambda: show.loss_curve({"a": []}), ValueError, "history.*'a'"),
        (lambda: show.loss_curve({"a": [-1.0]}, log=True), ValueError, "positive"),
        (lambda: show.player([], []), ValueError, "frames"),
        (lambda: show.player([np.zeros((2, 2))], []), ValueError, "labels"),
        (lambda: show.player(["x"], ["x"]), TypeError, "frames"),
        (lambda: show.player([np.zeros(2)], ["x"]), ValueError, r"frames.*\(2,\)"),
        (lambda: show.player([np.zeros((2, 2))], ["x"], interval=0), ValueError, "interval"),
        (lambda: show.step_viewer(blob(4, 4), blob(4, 4), []), ValueError, "stages"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_player_holds_every_frame_and_escapes_labels():
    frames = [np.full((3, 5), shade) for shade in (0.0, 0.5, 1.0)]
    labels = ["start", "<b>\"half\" & 'more'</b>", "end"]
    text = show.player(frames, labels, interval=0.25)._repr_html_()
    assert 'class="reglib-player"' in text
    assert "<b>" not in text
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', text))
    assert json.loads(html.unescape(data["labels"])) == labels
    assert data["interval"] == "250"
    addresses = json.loads(html.unescape(data["frames"]))
    assert f'<img src="{addresses[0]}"' in text
    for address, frame in zip(addresses, frames, strict=True):
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        shown = plt.imread(io.BytesIO(base64.b64decode(content)))
        assert shown.shape[:2] == (168, 280)  # enlarged 56 times, voxel by voxel
        np.testing.assert_allclose(shown[::56, ::56, 0], frame, atol=1 / 255)


def test_player_takes_figures_closes_them_and_loads_nothing():
    figures = [show.pair(blob(6, 9), blob(6, 9)) for _ in range(2)]
    text = show.player(figures, ["one", "two"])._repr_html_()
    assert not plt.get_fignums()
    assert not re.search(r"https?:|//|@import|\burl\(", re.sub(r"base64,[\w+/=]*", "", text))


def test_step_viewer_redraws_for_each_stage():
    moving, u = blob(6, 9), field(6, 9)
    stages = [("start", torch.zeros_like(u)), ("coarse", u), ("fine", 2 * u)]
    slider, picture = show.step_viewer(moving, warp(moving, u), stages).children
    assert [name for name, _ in slider.options] == ["start", "coarse", "fine"]
    seen = {bytes(picture.value)}
    for stage in (1, 2):
        slider.value = stage
        seen.add(bytes(picture.value))
    assert len(seen) == 3
    assert all(value.startswith(b"\x89PNG") for value in seen)
    assert not plt.get_fignums()


def test_step_viewer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"reglib\[book\]"):
        show.step_viewer(blob(4, 4), blob(4, 4), [("start", field(4, 4))])
