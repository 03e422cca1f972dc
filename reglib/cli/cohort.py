"""``reglib register --pairs``: what ``reglib register`` does to two files, for a whole table."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer

from reglib import cohort
from reglib.cli import registering
from reglib.cli.methods import Similarity, similarity_function
from reglib.cli.registering import Files, Request
from reglib.cli.running import say

if TYPE_CHECKING:
    from reglib.cohort import CohortPair, Measures, Outcome


def register_pairs(
    table: Path,
    request: Request,
    out: Path,
    *,
    client: str | None,
    workers: int | None,
    threads: int | None,
    force: bool,
    quiet: bool,
) -> None:
    """Register every pair of a table as a command of its own would.

    Args:
        table: CSV file; see :func:`reglib.cohort.read_pairs`.
        request: what was asked for.
        out: where the folders of the pairs and the tables go.
        client: address of a scheduler of dask.distributed; ``None`` computes on this machine.
        workers: how many processes on this machine.
        threads: of each of them.
        force: replace results of other settings or inputs.
        quiet: no progress bar and no summary.

    Raises:
        typer.BadParameter: if a method cannot do what is asked of it.
        typer.Exit: with code 1 if a pair failed or Ctrl-C was pressed.
        ImportError, OSError, TypeError, ValueError: as :func:`reglib.cohort.run_cohort`.
    """
    # Workers elsewhere may have the device that this machine lacks.
    where = torch.device("cpu") if client else registering.device_of(request.device)
    planned = registering.plan_of(request, where)
    pairs = cohort.read_pairs(table)
    settings = cohort.settings_of(planned.methods) | {
        "options": registering.options_of(request, planned),
        "seed": request.seed,
        "similarity": _measure(request),
    }
    work = functools.partial(register_pair, request=request, out=os.path.abspath(out))
    try:
        outcomes = cohort.run_cohort(
            pairs,
            work,
            out,
            settings=settings,
            client=client,
            workers=workers,
            threads=threads,
            force=force,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        say(f"Interrupted: what is done stays in {out}; the same command goes on from there.")
        raise typer.Exit(1) from None
    _tell(outcomes, out, quiet)


def register_pair(pair: CohortPair, folder: Path, *, request: Request, out: str) -> Measures:
    """Register one pair into an empty folder; runs on a worker.

    Args:
        pair: its files.
        folder: for the results.
        request: what was asked for.
        out: where the folder will be, under the name of the pair.

    Returns:
        The measures for the table.

    Raises:
        OSError, ValueError: as :func:`reglib.cli.registering.register_files`.
    """
    where = registering.device_of(request.device)
    done = registering.register_files(
        Files(**pair.files()),
        request,
        registering.plan_of(request, where),
        where,
        folder,
        _command(pair, request, Path(out) / pair.name),
        quiet=True,
        tell=lambda _: None,  # the report has them, and says whose they are
    )
    result, inputs = done.result, done.inputs
    assert result.warped is not None
    fixed = inputs.fixed.tensor.to(result.warped)
    weight = None if inputs.fixed_mask is None else inputs.fixed_mask.tensor.to(fixed)
    similarity = similarity_function(_measure(request))(result.warped, fixed, weight=weight)
    found = done.measures
    overlaps = None if found is None else (found["mean_dice_before"], found["mean"]["dice"])
    return cohort.measure(result, similarity, overlaps)


def _measure(request: Request) -> Similarity:
    """What the table calls similarity."""
    return request.wish.similarity or Similarity.NCC


def _command(pair: CohortPair, request: Request, folder: Path) -> list[str]:
    """The words that register this pair alone."""
    wish = request.wish
    words = ["reglib", "register", str(pair.moving), str(pair.fixed), "--out", str(folder)]
    options = {
        **{role: path for role, path in pair.files().items() if role not in ("moving", "fixed")},
        "method": wish.method,
        "transform": wish.transform,
        "start": wish.start,
        "similarity": wish.similarity,
        "label_mode": request.label_mode,
        "nonfinite": request.nonfinite,
        "device": request.device,
        "seed": request.seed,
    }
    for name, value in options.items():
        if value is not None:
            # In one word, so that a value may begin with a minus.
            words.append(f"--{name.replace('_', '-')}={value}")
    return [*words, *(f"--set={setting}" for setting in wish.settings)]


def _tell(outcomes: list[Outcome], out: Path, quiet: bool) -> None:
    states = [outcome.state for outcome in outcomes]
    done, kept, failed = (states.count(state) for state in ("done", "kept", "failed"))
    if not quiet:
        print(f"{done + kept} of {len(outcomes)} pairs registered, {kept} of them before")
        print(f"Written: {out / cohort.SUMMARY}")
    if failed:
        say(f"Error: {failed} of {len(outcomes)} pairs failed; {out / cohort.FAILED} says why")
        raise typer.Exit(1)
