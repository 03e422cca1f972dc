"""Command line: the name ``reglib`` is in place, the commands come with a later release."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from reglib import REPOSITORY, __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; ``None`` reads them from the process.

    Returns:
        Exit code: 0 on success. A usage error raises ``SystemExit`` with code 2.
    """
    parser = argparse.ArgumentParser(
        prog="reglib",
        description="Deformable image registration in PyTorch.",
        epilog=f"Until the commands arrive, use the library from Python: {REPOSITORY}",
    )
    parser.add_argument("--version", action="version", version=f"reglib {__version__}")
    parser.parse_args(arguments)
    print(
        f"reglib {__version__}: the commands register, apply, evaluate, fetch, info and train "
        f"are planned and not in this version; see {REPOSITORY}"
    )
    return 0
