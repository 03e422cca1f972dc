"""reglib: deformable image registration in PyTorch, and the executable book that teaches it.

A transform is a tensor, an operation is a function. The conventions (axis order, units,
direction) are stated on the book's conventions page and hold in every function.
"""

__version__ = "0.1.0"

#: Address of the repository: badges, set-up cells and links are checked against this constant.
REPOSITORY = "https://github.com/reglib/reglib"

#: What ``pip install`` takes on a machine without reglib (used by the notebooks' set-up cells).
INSTALL_SOURCE = f"reglib @ git+{REPOSITORY}"
