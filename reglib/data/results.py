"""Measured results that travel with the package: what the scripts in ``data_scripts/`` wrote."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def read_results(name: str) -> dict[str, Any]:
    """Read one file of measured results.

    Args:
        name: file name without ``.json``, such as ``"georeg_mnist_ablation"``.

    Returns:
        What the script wrote, with its own name, commit, hardware and seconds inside.

    Raises:
        FileNotFoundError: if there are no such results.
    """
    package = resources.files("reglib")
    # In the wheel they lie inside the package, in a checkout beside it.
    for path in (package / "results" / f"{name}.json", package / ".." / "results" / f"{name}.json"):
        if path.is_file():
            content: dict[str, Any] = json.loads(path.read_text())
            return content
    raise FileNotFoundError(f"name: no results called {name!r} travel with this package")
