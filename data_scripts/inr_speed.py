"""Seconds and memory of INR on one pair: satellite size, and a volume of 1 mm; compiled and not.

    python data_scripts/inr_speed.py                      # writes results/inr_speed.json
    python data_scripts/inr_speed.py --shape 24 32        # a trial: nothing is written

Pairs are random ones (:mod:`reglib.synth`). Every row is measured in a process of its own, which
registers the pair twice: the first time also compiles, where that is asked for, and warms up. As a
job of ``make gpu`` (``--settings FILE --out FOLDER``) it measures the GPU and writes into that
folder, row by row: one that was stopped goes on. ``--add FILE`` puts what came back into results/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from timing import DeviceRun, alone, peak_memory, rounded, synchronise

from reglib.synth import random_pair

NAME = "inr_speed.json"
#: Tiles of the Zurich protocol; a head at 1 mm.
TILE, HEAD_1MM = (300, 300), (160, 192, 224)
#: Methods by the number of axes; compiled as well where a level of theirs is hashed.
METHODS: dict[int, dict[str, tuple[bool, ...]]] = {
    2: {"robust": (False,), "without a search": (False,), "paper": (False, True)},
    3: {"deformable": (False, True)},
}
HEAD: dict[str, Any] = {
    "script": "data_scripts/inr_speed.py",
    "protocol": {
        "seconds": "wall clock of reglib.registration.register, the second time in its process",
        "first_seconds": "of the first time: with what is compiled and loaded then",
        "peak_memory": "bytes: allocated on the GPU, or all that the process ever held",
        "methods": "reglib.methods.inr.PRESETS; 'without a search' is INR() of the library",
        "compiled": "hashed levels by torch.compile; methods without one are measured as they are",
        "pair": "reglib.synth.random_pair, batch 1; what is found is not judged here",
    },
}


@dataclass(frozen=True)
class Task:
    """A row to measure."""

    method: str
    shape: tuple[int, ...]
    compiled: bool = False


def tasks(shapes: Sequence[tuple[int, ...]]) -> Iterator[Task]:
    """Every row, the short ones first."""
    for shape in sorted(shapes, key=len):
        for method, forms in METHODS[len(shape)].items():
            for compiled in forms:
                yield Task(method, shape, compiled)


def measure(task: Task, device: str) -> dict[str, Any]:
    """One row."""
    row = asdict(task) | {"shape": list(task.shape)}
    try:
        # Not at the top: they need more than a borrowed GPU machine may have.
        from reglib.methods.inr import INR, PRESETS
        from reglib.registration import register
    except ModuleNotFoundError as error:
        return row | {"left_out": f"{error.name} is not installed"}
    method = replace(PRESETS.get(task.method, INR()), compiled=task.compiled)
    generator = torch.Generator(device).manual_seed(0)
    pair = random_pair(task.shape, cell=min(task.shape) / 5, generator=generator)
    seconds = []
    for _ in range(2):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronise(device)
        begin = time.perf_counter()
        register(pair.moving, pair.fixed, method, progress=False)
        synchronise(device)
        seconds.append(rounded(time.perf_counter() - begin))
    times = {"first_seconds": seconds[0], "seconds": seconds[1]}
    return row | times | {"peak_memory": peak_memory(device)}


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return row["method"], row["compiled"], *row["shape"]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", help="a trial at this shape")
    record = DeviceRun(parser, NAME, HEAD)
    shape, rows = record.options.shape, record.rows
    shapes = [TILE, HEAD_1MM] if shape is None else [tuple(shape)]
    if record.job is not None:
        shapes = [tuple(one) for one in record.job["shapes"]]
    done = [_name(row) for row in rows]
    for task in tasks(shapes):
        if _name(asdict(task)) in done:
            continue
        rows.append(alone(measure, task, record.device))
        print(json.dumps(rows[-1]), flush=True)
        if shape is None:
            record.write(rows=rows)


if __name__ == "__main__":
    main()
