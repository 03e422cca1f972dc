"""Sphinx extension: ``{costs-table} NAME``, tables of measured seconds and what follows from them.

Everything is read from ``results/step_times.json`` when the page is built. Without that file, or
without a row that a table needs, the build fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from reglib.data.results import read_results

#: Bytes per second that GPUs are assumed to exchange gradients with.
BANDWIDTH = 10e9
#: The paper's pretraining: 50 epochs of 3,000 pairs.
PAIRS = 150_000
COUNTS = (1, 8, 64)
COHORTS = (1_000, 100_000)
STEPS = ("pretraining", "whole network", "fine-tuning", "forward")

Content = dict[str, Any]
#: Columns, and rows of as many cells.
Table = tuple[list[str], list[list[str]]]


# --- The models -------------------------------------------------------------------------------


def cohort_seconds(pairs: int, workers: int, each: float, added: float) -> float:
    """Seconds until the last of ``pairs`` is done.

    Each worker does one pair at a time, which takes ``each`` seconds to register and ``added`` to
    hand out, read and write. Nothing else is waited for.
    """
    return math.ceil(pairs / workers) * (each + added)


def training_seconds(pairs: int, gpus: int, step: float, batch: int, parameters: int) -> float:
    """Seconds of a training that sees so many pairs, some at a time on every GPU.

    After each step of ``step`` seconds, 4 bytes a parameter are averaged over a ring of GPUs with
    ``BANDWIDTH``, during which nothing else is done.
    """
    exchange = 2 * (gpus - 1) / gpus * 4 * parameters / BANDWIDTH
    return math.ceil(pairs / (batch * gpus)) * (step + exchange)


# --- Words ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Two digits and a unit that suits them."""
    for unit, length, below in (("ms", 1e-3, 0.1), ("s", 1, 120), ("min", 60, 7200)):
        if seconds < below:
            return f"{_digits(seconds / length)} {unit}"
    if seconds < 48 * 3600:
        return f"{_digits(seconds / 3600)} h"
    return f"{_digits(seconds / 86400)} d"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _network(row: Content) -> str:
    """The preset, where it is known."""
    return str(row.get("preset", row["size"]))


def _voxels(row: Content) -> str:
    return "×".join(map(str, row["shape"]))


def _all(content: Content, *kinds: str) -> Iterator[tuple[Content, Content]]:
    """Runs and their rows of some kinds; at least one."""
    found = [(run, row) for run in content["runs"] for row in run["rows"] if row["kind"] in kinds]
    if not found:
        raise LookupError(f"results/step_times.json: wanted rows of {', '.join(kinds)}, got none")
    yield from found


def _same(content: Content, device: str, kind: str, **wanted: Any) -> Content | None:
    """The row of a device with these values."""
    for run, row in _all(content, kind):
        if run["device"] == device and all(row.get(k) == v for k, v in wanted.items()):
            return row
    return None


def origin(run: Content) -> str:
    """Where a run was measured, in a sentence."""
    where = run["provenance"]
    device = run["device"]
    if device == "cpu":
        threads = where["threads"]
        device = f"{where['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    words = f"{device}, torch {where['torch']}, commit {where['commit'][:7]}"
    words += " with changes" if where["uncommitted_changes"] else ""
    words += f", {run['started'][:10]}"
    if run["load_before"] > 0.5:
        words += f"; the machine was busy with other work (load {run['load_before']:.1f})"
    return words


# --- Tables -----------------------------------------------------------------------------------


def steps(content: Content) -> Table:
    """What was measured of networks."""
    head = ["preset, voxels", "what", "a step", "of pairs", "memory", "parameters", "device"]
    rows = [
        [
            f"{_network(row)}, {_voxels(row)}",
            row["kind"],
            duration(row["seconds"]),
            str(row["batch"]),
            f"{row['peak_memory'] / 2**30:.1f} GiB",
            f"{row['parameters'] / 1e6:.2f} M",
            _device(run) + ("" if row["precision"] == "float32" else f", {row['precision']}"),
        ]
        for run, row in _all(content, *STEPS)
    ]
    return head, rows


def encoder_only(content: Content) -> Table:
    """Pretraining of the encoder with light decoders, beside that of the whole network."""
    rows = []
    for run, row in _all(content, "pretraining"):
        same = {"size": row["size"], "precision": row["precision"], "shape": row["shape"]}
        whole = _same(content, run["device"], "whole network", **same)
        if whole is not None:
            each, other = (x["seconds"] / x["batch"] for x in (row, whole))
            rows.append(
                [
                    _network(row),
                    _device(run),
                    row["precision"],
                    duration(each),
                    duration(other),
                    f"{each / other:.2f}",
                ]
            )
    return ["preset", "device", "precision", "encoder, a pair", "whole, a pair", "ratio"], rows


def registrations(content: Content) -> Table:
    """What was measured of single registrations, and what a cohort adds to them."""
    rows = []
    for run, row in _all(content, "registration"):
        added = _same(content, run["device"], "cohort", shape=row["shape"])
        rows.append(
            [
                row["method"],
                f"{_voxels(row)}, {row['mm']:g} mm",
                _device(run),
                duration(row["seconds"]),
                duration(added["seconds"]) if added else "",
                f"{row['peak_memory'] / 2**30:.1f} GiB",
            ]
        )
    return ["method", "voxels", "device", "registering", "in a cohort, added", "memory"], rows


def cohorts(content: Content) -> Table:
    """Extrapolated: many pairs on some workers."""
    rows = []
    for run, row in _all(content, "registration", "forward"):
        # What the workers' CPUs add is the same, whatever registers.
        found = [other for _, other in _all(content, "cohort") if other["shape"] == row["shape"]]
        if not found or row.get("precision", "float32") != "float32":
            continue
        name = row.get("method") or f"TransMorph {_network(row)}"
        rows.append(
            [
                name,
                _voxels(row),
                _device(run),
                *(
                    duration(cohort_seconds(pairs, n, row["seconds"], found[0]["seconds"]))
                    for pairs in COHORTS
                    for n in COUNTS
                ),
            ]
        )
    head = ["method", "voxels", "worker"]
    return head + [f"{pairs:,} on {n}" for pairs in COHORTS for n in COUNTS], rows


def trainings(content: Content) -> Table:
    """Extrapolated: the paper's number of pairs on some GPUs."""
    rows = []
    for run, row in _all(content, "pretraining", "whole network"):
        pair = _same(content, run["device"], "random pair", size=row["size"])
        if pair is None:
            raise LookupError(f"wanted a row of random pairs on {run['device']}, {row['size']}")
        step = row["seconds"] + row["batch"] * pair["seconds"]
        rows.append(
            [
                _network(row),
                row["kind"],
                _device(run),
                row["precision"],
                *(
                    duration(training_seconds(PAIRS, n, step, row["batch"], row["parameters"]))
                    for n in COUNTS
                ),
            ]
        )
    return ["preset", "what", "device", "precision", *(f"on {n}" for n in COUNTS)], rows


def origins(content: Content) -> Table:
    """Where all of it was measured."""
    return ["device", "measured on"], [[_device(run), origin(run)] for run in content["runs"]]


def _device(run: Content) -> str:
    return str(run["device"]).removeprefix("NVIDIA ")


TABLES: dict[str, Callable[[Content], Table]] = {
    "steps": steps,
    "encoder-only": encoder_only,
    "registrations": registrations,
    "cohorts": cohorts,
    "trainings": trainings,
    "origins": origins,
}


# --- Sphinx -----------------------------------------------------------------------------------


def table_node(columns: list[str], rows: list[list[str]]) -> nodes.table:
    """A docutils table of plain text."""
    group = nodes.tgroup(cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]
    for part, lines in ((nodes.thead(), [columns]), (nodes.tbody(), rows)):
        for line in lines:
            row = nodes.row()
            # No line is broken between a number and its unit.
            cells = [re.sub(r"^([\d.]+) (\w+)$", "\\1\u00a0\\2", cell) for cell in line]
            row += [nodes.entry("", nodes.paragraph(text=cell)) for cell in cells]
            part += row
        group += part
    table = nodes.table(classes=["colwidths-auto"])
    table += group
    return table


class CostsTable(SphinxDirective):
    """``{costs-table} NAME``, one of ``TABLES``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table, from what was measured."""
        name = self.arguments[0]
        if name not in TABLES:
            raise self.error(f"costs-table: wanted one of {', '.join(TABLES)}, got {name!r}")
        return [table_node(*TABLES[name](read_results("step_times")))]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("costs-table", CostsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
