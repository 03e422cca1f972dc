"""Sphinx extension: draw the pages' pictures before the pages are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import figures


def draw(app: Any) -> None:
    """Fill ``book/drawings`` of the source folder."""
    figures.draw_all(Path(app.srcdir) / "book" / "drawings")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
