"""Pictures: figures, a player for static pages, a live viewer for notebooks."""

from reglib.show.plot import (
    checkerboard,
    deformed_grid,
    image,
    jacobian_map,
    loss_curve,
    overlay,
    pair,
    quiver,
    use_style,
)
from reglib.show.widgets import Player, player, step_viewer

__all__ = [
    "Player",
    "checkerboard",
    "deformed_grid",
    "image",
    "jacobian_map",
    "loss_curve",
    "overlay",
    "pair",
    "player",
    "quiver",
    "step_viewer",
    "use_style",
]
