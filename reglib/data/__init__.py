"""Data: images on disk, samples that travel with the package, and the full sets (``fetch``)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reglib.data.assets import fetch

__all__ = ["fetch"]


def __getattr__(name: str) -> Any:
    """Import ``fetch`` when it is asked for: training on a bare machine needs torch alone."""
    if name != "fetch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reglib.data.assets import fetch

    return fetch
