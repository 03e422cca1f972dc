"""reglib: deformable image registration in PyTorch, and the executable book that teaches it.

A transform is a tensor, an operation is a function. The conventions (axis order, units,
direction) are stated on the book's conventions page and hold in every function.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reglib.data.assets import fetch

__all__ = ["INSTALL_SOURCE", "REPOSITORY", "__version__", "fetch"]
__version__ = "0.1.0"

#: Address of the repository: badges, set-up cells and links are checked against this constant.
REPOSITORY = "https://github.com/reglib/reglib"

#: What ``pip install`` takes on a machine without reglib (used by the notebooks' set-up cells).
INSTALL_SOURCE = f"reglib @ git+{REPOSITORY}"


def __getattr__(name: str) -> Any:
    """Import ``fetch`` when it is asked for: ``import reglib`` itself imports nothing."""
    if name != "fetch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reglib.data.assets import fetch

    return fetch
