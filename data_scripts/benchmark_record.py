"""Rows of a benchmark: kept on disk while they are measured, each test pair once, then summed up.

A row is one configuration on one pair: ``set``, ``moving``, ``fixed``, ``cluster``,
``configuration``, ``seconds``, ``cpu_seconds``, ``timed_out``, ``failed``, and, where there is a
transform, ``mean_dice`` and what else was measured.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import os
import re
import statistics
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, provenance, write_json

UNREGISTERED = "unregistered"
#: Of the bootstrap.
DRAWS = 10_000

#: Names of environment variables that change the speed of threads.
THREADED = re.compile(r"(G?OMP|KMP|MKL)_")

Row = dict[str, Any]
#: Set, moving, fixed, configuration.
Key = tuple[str, ...]


def key(row: Row) -> Key:
    """What makes a row the only one of its kind."""
    return row["set"], row["moving"], row["fixed"], row["configuration"]


@functools.cache
def fingerprint() -> str:
    """Of the library's code: rows of one configuration must come from one version of it.

    What the script had not imported when it asked first does not count, so that a run of many hours
    may go on after a change of another method.
    """
    library = (ROOT / "reglib").resolve()
    known = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name).resolve() for name in known if name}
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_relative_to(library)):
        digest.update(path.relative_to(library).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Record:
    """The rows measured so far, their configurations, and the ledger of the runs.

    Args:
        path: where they are kept until nothing is missing; read if it is there.
        split: the part of the splits that the pairs are from.
        finished: where the whole goes in the end, and what is begun from where ``path`` is not
            there; ``None`` keeps it at ``path``.
    """

    def __init__(self, path: Path, split: str, finished: Path | None = None) -> None:
        self.path, self.split, self.finished = path, split, finished
        self.configurations: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.lock = threading.Lock()
        for known in (path, finished):
            if known is not None and known.exists():
                content = json.loads(known.read_text())
                if content["split"] != split:
                    raise SystemExit(f"{known}: wanted the split {split}")
                self.configurations = content["configurations"]
                self.runs, self.rows = content["runs"], content["rows"]
                break

    @property
    def done(self) -> set[Key]:
        """What has been measured."""
        return {key(row) for row in self.rows}

    def forget(self, names: Collection[str]) -> None:
        """Drop the rows of some configurations; the ledger keeps that they were measured."""
        self.rows = [row for row in self.rows if row["configuration"] not in names]
        self.configurations = {n: s for n, s in self.configurations.items() if n not in names}

    def begin(self, configurations: dict[str, dict[str, Any]], tasks: Collection[Key]) -> None:
        """Check that what is missing of ``tasks`` may stand beside what is there; open a run.

        Raises:
            SystemExit: if a configuration was measured with other settings, or in part with another
                version of the library.
        """
        missing = {task[3] for task in set(tasks) - self.done}
        for name, settings in configurations.items():
            now = dict(settings)
            if settings["package"] == "reglib":
                now["code"] = fingerprint()
            known = self.configurations.setdefault(name, now)
            same_settings = {**known, "code": None} == {**now, "code": None}
            if not same_settings or (name in missing and known != now):
                raise SystemExit(
                    f"{name}: measured before, with other settings or another version of the "
                    "library; give it a new name, or measure all of it with --again"
                )
        self.runs.append(
            {
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "measured": {},
                "seconds": 0.0,
                "provenance": provenance(),
                # Whoever changes how threads wait changes the seconds.
                "environment": {n: v for n, v in sorted(os.environ.items()) if THREADED.match(n)},
            }
        )

    def add(self, row: Row) -> None:
        """Keep a row, on disk at once; several threads may."""
        with self.lock:
            run, name = self.runs[-1], row["configuration"]
            run["measured"][name] = run["measured"].get(name, 0) + 1
            run["seconds"] = round(run["seconds"] + row["seconds"], 3)
            self.rows.append(row | {"run": len(self.runs) - 1})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"complete": False} | self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "configurations": self.configurations,
            "runs": self.runs,
            "rows": self.rows,
        }

    def finish(
        self,
        pairs: Sequence[Key],
        configurations: Sequence[str],
        head: dict[str, Any],
        *,
        skipped: Collection[Key] = (),
        summary: Callable[[Sequence[Row], Collection[str]], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """The whole, in the order of ``pairs`` and ``configurations``, with its summary.

        ``skipped`` need not be there; ``summary`` is given the rows and which configurations are
        ours, and is :func:`summarise` if ``None``.

        It is written to ``finished``, and ``path`` removed, if there is one. ``head`` goes before
        it, and may say that it is not ``complete`` where more is to come.

        Raises:
            ValueError: if a row is missing.
        """
        names = [UNREGISTERED, *configurations]
        missing = {(*pair, name) for pair in pairs for name in names} - self.done
        missing -= set(skipped)
        if missing:
            raise ValueError(f"wanted every row, got none of {sorted(missing)}")
        places = {pair: n for n, pair in enumerate(pairs)}
        order = {name: n for n, name in enumerate(names)}
        rows = [row for row in self.rows if key(row)[:3] in places]
        rows.sort(key=lambda r: (places[key(r)[:3]], order.get(r["configuration"], len(order))))
        # A run that found nothing left to measure has seen nothing.
        kept = [n for n, run in enumerate(self.runs) if run["measured"]]
        whole = {"complete": True} | head | self._content()
        whole["runs"] = [self.runs[n] for n in kept]
        whole["rows"] = [row | {"run": kept.index(row["run"])} for row in rows]
        ours = [n for n, s in self.configurations.items() if s["package"] == "reglib"]
        whole |= (summary or summarise)(whole["rows"], ours)
        if self.finished is not None:
            write_json(self.finished, whole)
            self.path.unlink(missing_ok=True)
        return whole


# --- Statistics -----------------------------------------------------------------------------


def interval(values: Sequence[float], clusters: Sequence[int], seed: int = 0) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean: whole clusters are drawn.

    Args:
        values: one for each pair.
        clusters: of each pair; pairs of different clusters share no subject.
        seed: of the draws.

    Returns:
        Lower and upper end; ``None`` for a single cluster.
    """
    names = sorted(set(clusters))
    if len(names) < 2:
        return None
    x = torch.tensor(values, dtype=torch.float64)
    at = torch.tensor([names.index(cluster) for cluster in clusters])
    sums = x.new_zeros(len(names)).index_add_(0, at, x)
    sizes = x.new_zeros(len(names)).index_add_(0, at, torch.ones_like(x))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(names), (DRAWS, len(names)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    ends = torch.quantile(means, means.new_tensor([0.025, 0.975]))
    return [round(x, 4) for x in ends.tolist()]


def summarise(rows: Sequence[Row], ours: Collection[str]) -> dict[str, Any]:
    """Of each set: every configuration, and how far the Dice of ``ours`` is above each of the rest.

    A pair without a transform counts with its Dice before registration.
    """
    before = {
        key(row)[:3]: row["mean_dice"] for row in rows if row["configuration"] == UNREGISTERED
    }
    tables: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        row = row | {"before": before[key(row)[:3]]}
        tables.setdefault(row["set"], {}).setdefault(row["configuration"], []).append(row)
    summary = {
        name: {configuration: summarise_one(found) for configuration, found in table.items()}
        for name, table in tables.items()
    }
    above = {
        name: {
            one: {other: compare(table[one], table[other]) for other in table if other not in ours}
            for one in table
            if one in ours
        }
        for name, table in tables.items()
    }
    return {"summary": summary, "above": above}


def score(row: Row) -> float:
    """The Dice that counts: before registration, where there is none after it."""
    found: float = row.get("mean_dice", row["before"])
    return found


def summarise_one(rows: Sequence[Row]) -> dict[str, Any]:
    """One configuration on the pairs of one set."""
    found = [row for row in rows if "mean_dice" in row]
    scores, seconds = [score(row) for row in rows], [row["seconds"] for row in rows]
    names = ("ncc", "lncc", "folding", "folding_inside", "ndv")
    means = {
        name: float(f"{statistics.fmean(row[name] for row in found):.4g}") if found else None
        for name in names
    }
    return {
        "pairs": len(rows),
        "timed_out": sum(row["timed_out"] for row in rows),
        "failed": sum(row["failed"] is not None for row in rows),
        "worse_than_before": sum(row["mean_dice"] < row["before"] for row in found),
        "dice": round(statistics.fmean(scores), 4),
        "dice_median": round(statistics.median(scores), 4),
        "dice_interval": interval(scores, [row["cluster"] for row in rows]),
        "seconds": round(statistics.fmean(seconds), 3),
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_largest": max(seconds),
        "cpu_seconds": round(statistics.fmean([r["cpu_seconds"] for r in found] or [0.0]), 3),
        **means,
        "folding_largest": max((row["folding"] for row in found), default=None),
    }


def differences(
    ours: Sequence[Row], other: Sequence[Row], value: Callable[[Row], float]
) -> tuple[list[float], list[int]]:
    """How far the value of ours is above that of the other, pair by pair, and the clusters.

    Pairs that only one of the two has are left out.
    """
    theirs = {key(row)[:3]: value(row) for row in other}
    both = [row for row in ours if key(row)[:3] in theirs]
    return [value(row) - theirs[key(row)[:3]] for row in both], [row["cluster"] for row in both]


def compare(
    ours: Sequence[Row],
    other: Sequence[Row],
    name: str = "dice",
    value: Callable[[Row], float] = score,
) -> dict[str, Any]:
    """The mean of :func:`differences`, called ``name``, with its interval."""
    gain, clusters = differences(ours, other, value)
    return {
        "pairs": len(gain),
        name: round(statistics.fmean(gain), 4) if gain else None,
        "interval": interval(gain, clusters),
    }


def estimate(tasks: Iterable[Key], rows: Iterable[Row], others: Iterable[Row] = ()) -> float:
    """Minutes that tasks will take, by the seconds of rows like them and two more to measure.

    Where ``rows`` have none like a task, ``others`` are asked, and then 10 seconds assumed.
    """

    def times(known: Iterable[Row]) -> dict[Key, float]:
        table: dict[Key, list[float]] = {}
        for row in known:
            table.setdefault((row["set"], row["configuration"]), []).append(row["seconds"])
        return {kind: statistics.fmean(seconds) for kind, seconds in table.items()}

    found = times(others) | times(rows)
    return sum(found.get((task[0], task[3]), 10.0) + 2 for task in tasks) / 60


# --- Seeds ----------------------------------------------------------------------------------


def method_of(name: str) -> str:
    """What a configuration is a seed of."""
    return name.rpartition(", seed ")[0] or name


def over_seeds(rows: Sequence[Row], name: str) -> list[Row]:
    """One row for each pair of one method; its value called ``name`` is the mean over seeds."""
    pairs: dict[Key, list[Row]] = {}
    for row in rows:
        pairs.setdefault(key(row)[:3], []).append(row)
    return [own[0] | {name: statistics.fmean(r[name] for r in own)} for own in pairs.values()]


def of_each_seed(rows: Sequence[Row], name: str) -> list[float]:
    """The mean value called ``name`` of every configuration."""
    seeds: dict[str, list[float]] = {}
    for row in rows:
        seeds.setdefault(row["configuration"], []).append(row[name])
    return [float(f"{statistics.fmean(own):.4g}") for own in seeds.values()]


def table(content: dict[str, Any]) -> str:
    """The summary for the terminal; ``bad``: timed out, failed, or worse than before."""
    lines = []
    for name, configurations in content["summary"].items():
        lines += ["", name]
        lines += [f"{'':34}  dice median     interval       s   CPU s folding%    NDV%  bad"]
        for configuration, s in configurations.items():
            low, high = s["dice_interval"] or (math.nan, math.nan)
            bad = s["timed_out"] + s["failed"] + s["worse_than_before"]
            shares = [math.nan if s[x] is None else 100 * s[x] for x in ("folding", "ndv")]
            lines.append(
                f"{configuration:34} {s['dice']:5.3f}  {s['dice_median']:5.3f}"
                f" {low:5.3f}, {high:5.3f}{s['seconds']:8.2f}{s['cpu_seconds']:8.2f}"
                f" {shares[0]:8.4f}{shares[1]:8.4f} {bad:2d}/{s['pairs']}"
            )
    return "\n".join(lines)
