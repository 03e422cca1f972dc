"""What scripts that measure seconds share: medians, peak memory, and a results file by device.

Such a script has a name for its file, a head that says what it measures, and runs: one a device.
On the machine of ``make gpu`` it is given ``--settings FILE --out FOLDER`` and writes its file into
that folder; ``--add FILE`` puts what came back into results/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, provenance, write_json


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each call, all in turn, ``repeats`` times after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            synchronise(device)
            begin = time.perf_counter()
            call()
            synchronise(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


def alone(call: Callable[..., Any], *arguments: object) -> Any:
    """The call's result, from a process of its own: what others held does not count as its."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(call, *arguments).result()


def peak_memory(device: str) -> int:
    """Bytes: the most that was allocated on a GPU, else the most that this process ever held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def rounded(seconds: float) -> float:
    """Four digits."""
    return float(f"{seconds:.4g}")


def run_of(device: str, begin: float, load: float, **content: Any) -> dict[str, Any]:
    """A record: device, seconds since ``begin``, load of the machine before, and provenance."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - _since(begin))),
        "seconds": round(_since(begin), 1),
        "load_before": round(load, 2),
        **content,
        "provenance": provenance(),
    }


def _since(begin: float) -> float:
    return time.perf_counter() - begin


def load() -> float:
    """Processes that wanted a core in the last minute; above 0.5 or so, others were at work."""
    return os.getloadavg()[0]


def add(path: Path, head: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Put a run into a results file, in place of an earlier one of the same device."""
    others = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [other for other in others if other["device"] != run["device"]]
    write_json(path, {**head, "runs": sorted([*runs, run], key=lambda one: one["device"] != "cpu")})


class DeviceRun:
    """One device's run of a script that measures seconds, and the results file it goes into.

    Adds ``--add``, ``--settings`` and ``--out`` to the parser and parses; ``--add`` puts the runs
    of another machine's record into results/ and ends the program.

    Attributes:
        options: as parsed.
        job: the settings of a job of ``make gpu``, or None.
        device: ``"cuda"`` for a job on a machine that has it, else ``"cpu"``.
        rows: what an earlier run of the same job has measured.
        path: the results file.
        provenance: of this run.
    """

    def __init__(self, parser: argparse.ArgumentParser, name: str, head: Mapping[str, Any]) -> None:
        parser.add_argument("--add", type=Path, help="put another machine's record into results/")
        parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
        parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
        self.options, self.head = parser.parse_args(), head
        self.path, self.device = ROOT / "results" / name, "cpu"
        self.job: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        if self.options.add is not None:
            for run in json.loads(self.options.add.read_text())["runs"]:
                add(self.path, head, run)
            parser.exit()
        if self.options.settings is not None:
            self.job = json.loads(self.options.settings.read_text())
            self.path = self.options.out / name
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
            if self.path.exists():
                self.rows = json.loads(self.path.read_text())["runs"][0].get("rows", [])
        # Without the history a commit is told by the environment: better to fail before.
        self.provenance = provenance()
        self.begin, self.load = time.perf_counter(), load()

    def write(self, **content: Any) -> None:
        """Put this device's run, with that content, into the file."""
        add(self.path, self.head, run_of(self.device, self.begin, self.load, **content))
