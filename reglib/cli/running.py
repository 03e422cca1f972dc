"""What the commands share: errors in one sentence, warnings without a file name, choices."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, ParamSpec

import typer

from reglib import REPOSITORY

P = ParamSpec("P")

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)
]
Nonfinite = Annotated[
    float | None,
    typer.Option(
        "--nonfinite",
        metavar="VALUE",
        help="What NaN and infinite voxels become; without it they are refused.",
    ),
]


class LabelMode(StrEnum):
    """How label maps are resampled."""

    NEAREST = "nearest"
    LINEAR = "linear"


LabelModes = Annotated[
    LabelMode,
    typer.Option(
        "--label-mode",
        help="How labels are resampled: the nearest voxel, or the label of the largest linear "
        "share, which is smoother. Neither invents labels.",
    ),
]


class Space(StrEnum):
    """What the coordinates of points are."""

    RAS = "ras"
    LPS = "lps"
    VOXEL = "voxel"


SPACE_HELP = (
    "ras (mm; NIfTI, FreeSurfer, Slicer), lps (mm; ITK, ANTs, DICOM), or voxel (array indices of "
    "the file, from 0)."
)

#: What Ctrl-C is answered with, unless there is something to be kept.
NOTHING_WRITTEN = "Interrupted; nothing was written."

# What goes wrong with inputs and machines; anything else is a mistake in the library.
_EXPECTED = (
    *(ValueError, TypeError, OSError, LookupError, RuntimeError, ArithmeticError),
    *(ImportError, MemoryError),
)


def in_sentences(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with an exit code, and with one sentence on stderr if it fails.

    Args:
        command: takes ``debug``, which shows the traceback as well.

    Returns:
        The command; raises ``typer.Exit`` with code 1 if it fails.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _plain_warnings():
                command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say(NOTHING_WRITTEN)
            raise typer.Exit(1) from None
        except BrokenPipeError:
            # The reader of the output, such as `head`, has seen enough. What is left is dropped, or
            # Python would complain once more when it closes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            say(f"Error: {sentence(error)}")
            raise typer.Exit(1) from None

    return run


def sentence(error: Exception) -> str:
    """What an exception says, in one line; the path first if it is about a file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # A KeyError would put its message into quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, _EXPECTED):
        return text
    kind = type(error).__name__
    return f"{kind}: {text}; this is a mistake in reglib, please report it: {REPOSITORY}/issues"


def say(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: object) -> None:
        say(f"Warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"reglib(\.|$)")
        warnings.showwarning = show  # type: ignore[assignment]  # it takes whatever comes
        yield
