"""What scripts that measure seconds share: medians, peak memory, and a results file by device."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, write_json


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


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--add`` for people, ``--settings`` and ``--out`` for the queue of ``make gpu``."""
    parser.add_argument("--add", type=Path, help="put the record of another machine into results/")
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


def add_all(path: Path, head: Mapping[str, Any], record: Path) -> None:
    """Put the runs of another machine's record into a results file."""
    for run in json.loads(record.read_text())["runs"]:
        add(path, head, run)
