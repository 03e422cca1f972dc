"""Stepping through pictures: a player for static pages, a live viewer for notebooks."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from reglib.geometry.sampling import warp
from reglib.show import plot

if TYPE_CHECKING:
    from ipywidgets import VBox

# Every script prepares all players that no script has prepared yet. So a page may hold several,
# needs no ids, and works wherever scripts of an output run. Nothing is loaded from elsewhere.
_SCRIPT = """
for (const box of document.querySelectorAll(".reglib-player:not([data-ready])")) {
  box.dataset.ready = "";
  const frames = JSON.parse(box.dataset.frames), labels = JSON.parse(box.dataset.labels);
  const image = box.querySelector("img"), range = box.querySelector("input");
  const label = box.querySelector("output"), [back, play, next] = box.querySelectorAll("button");
  let timer = null;
  const name = (text) => { play.textContent = text; play.setAttribute("aria-label", text); };
  const stop = () => { clearInterval(timer); timer = null; name("Play"); };
  const show = (i) => {
    i = Math.max(0, Math.min(frames.length - 1, i));
    range.value = i;
    image.src = frames[i];
    image.alt = label.textContent = labels[i];
    range.setAttribute("aria-valuetext", labels[i]);
    back.disabled = i === 0;
    next.disabled = i === frames.length - 1;
  };
  const step = (by) => show(Number(range.value) + by);
  const tick = () => { step(1); if (next.disabled) stop(); };
  range.oninput = () => { stop(); step(0); };
  back.onclick = () => { stop(); step(-1); };
  next.onclick = () => { stop(); step(1); };
  play.onclick = () => {
    if (timer) return stop();
    if (next.disabled) show(0);
    name("Pause");
    timer = setInterval(tick, Number(box.dataset.interval));
  };
  show(0);
}
"""


@dataclass(frozen=True)
class Player:
    """Frames as data addresses, their labels and the pause between them in milliseconds."""

    frames: tuple[str, ...]
    labels: tuple[str, ...]
    interval: int

    def _repr_html_(self) -> str:
        button = (
            '<button type="button" aria-label="{}" style="font:inherit;color:inherit;'
            'background:none;border:1px solid;border-radius:4px;padding:.2em .7em">{}</button>'
        )
        buttons = (("Previous frame", "◂"), ("Play", "Play"), ("Next frame", "▸"))
        return (
            '<div class="reglib-player" style="max-width:100%;margin:.5em 0" '
            f'data-frames="{html.escape(json.dumps(self.frames))}" '
            f'data-labels="{html.escape(json.dumps(self.labels))}" '
            f'data-interval="{self.interval}">'
            f'<img src="{self.frames[0]}" alt="{html.escape(self.labels[0])}" '
            'style="display:block;max-width:100%;height:auto;background:white">'
            '<div style="display:flex;flex-wrap:wrap;gap:.5em;align-items:center;padding:.4em 0">'
            f"{''.join(button.format(*names) for names in buttons)}"
            f'<input type="range" min="0" max="{len(self.frames) - 1}" value="0" step="1" '
            'aria-label="frame" style="flex:1 1 8em;min-width:0">'
            f'<output aria-live="polite" style="flex:1 1 100%">{html.escape(self.labels[0])}'
            f"</output></div></div><script>{_SCRIPT}</script>"
        )


def player(
    frames: Sequence[Figure | np.ndarray], labels: Sequence[str], *, interval: float = 0.8
) -> Player:
    """A slider over rendered frames that works in a static page, without kernel or network.

    Args:
        frames: Figures (closed once rendered), or arrays ``(H, W)`` or ``(H, W, 3)`` in [0, 1].
        labels: One line of text per frame.
        interval: Seconds between frames while playing.

    Returns:
        An object that notebooks and the book show as HTML.

    Raises:
        TypeError: If a frame is neither a figure nor an array.
        ValueError: If there is no frame, or not one label per frame, or no positive interval.
    """
    if len(frames) == 0:
        raise ValueError("frames: wanted at least one, got none")
    if isinstance(labels, str) or len(labels) != len(frames):
        raise ValueError(f"labels: wanted one per frame ({len(frames)}), got {labels!r}")
    if not interval > 0:
        raise ValueError(f"interval: wanted a positive number of seconds, got {interval}")
    pictures = [base64.b64encode(_png(frame)).decode() for frame in frames]
    addresses = tuple(f"data:image/png;base64,{picture}" for picture in pictures)
    return Player(addresses, tuple(map(str, labels)), round(1000 * interval))


def step_viewer(
    moving: Tensor,
    fixed: Tensor,
    stages: Sequence[tuple[str, Tensor]],
    *,
    index: int = 0,
    axis: int | None = None,
    position: int | None = None,
) -> VBox:
    """A live slider over named fields: the warped image, its overlay with fixed, the grid of phi.

    It needs a running kernel; :func:`player` does not.

    Args:
        moving: ``(B, 1, *S)``.
        fixed: ``(B, 1, *S)``.
        stages: Name and displacement ``(B, D, *S)`` in voxels of the fixed grid, in order.
        index: Sample of the batch.
        axis: Array axis that the slice cuts across; ``None`` for 2-D images.
        position: Voxel index of the slice along ``axis``; ``None`` takes the middle one.

    Returns:
        The widget; its children are the slider and the picture.

    Raises:
        ImportError: If ipywidgets is missing.
        ValueError: If there is no stage, or shapes do not match.
    """
    if len(stages) == 0:
        raise ValueError("stages: wanted at least one, got none")
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            'step_viewer needs ipywidgets: pip install "reglib[book]"; player works without it'
        ) from error

    def draw(stage: int) -> bytes:
        field = stages[stage][1]
        warped = warp(moving, field)
        with plt.style.context(plot.STYLE):
            figure, (left, middle, right) = plt.subplots(1, 3, figsize=(8.4, 3.1))
        plot.image(warped, index=index, axis=axis, position=position, ax=left)
        plot.overlay(warped, fixed, index=index, axis=axis, position=position, ax=middle)
        plot.image(moving, index=index, axis=axis, position=position, ax=right)
        plot.deformed_grid(field, index=index, axis=axis, position=position, ax=right)
        left.set_title("warped")
        middle.set_title("warped over fixed")
        right.set_title("phi on moving")
        return _png(figure)

    slider = ipywidgets.SelectionSlider(
        options=[(name, i) for i, (name, _) in enumerate(stages)],
        value=0,
        description="stage",
        layout=ipywidgets.Layout(width="90%"),
    )
    picture = ipywidgets.Image(
        value=draw(0), format="png", layout=ipywidgets.Layout(max_width="100%")
    )
    slider.observe(lambda change: setattr(picture, "value", draw(change["new"])), names="value")
    return ipywidgets.VBox([slider, picture])


def _png(frame: Figure | np.ndarray) -> bytes:
    buffer = io.BytesIO()
    if isinstance(frame, Figure):
        frame.savefig(buffer, format="png")
        plt.close(frame)
    elif isinstance(frame, np.ndarray):
        if not (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)):
            raise ValueError(f"frames: wanted arrays (H, W) or (H, W, 3), got {frame.shape}")
        # Small images become legible by repeating voxels, which no browser then blurs.
        enlarged = frame
        for axis in (0, 1):
            enlarged = enlarged.repeat(max(1, 280 // max(frame.shape[:2])), axis=axis)
        imsave(buffer, enlarged, format="png", cmap="gray", vmin=0, vmax=1)
    else:
        raise TypeError(f"frames: wanted figures or arrays, got {type(frame).__name__}")
    return buffer.getvalue()
