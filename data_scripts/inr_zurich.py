"""INR beside its peers on the Zurich protocol: the paper's tables 1 and 2, measured anew.

    REGLIB_DATA=FOLDER python data_scripts/inr_zurich.py

registers every test patch of QuickBird at four levels, five draws each, the near infrared to itself
(single-modal) and the grey value of the colour bands to the near infrared (multi-modal), and writes
results/inr_zurich.json. The settings as close to the paper's as they are known see one draw of each
patch and level. Then it does figure 3 of the paper on the tuning patches: the success of INR over
the granularity of its image network, beside results/inr_zurich.json.

    REGLIB_DATA=FOLDER python data_scripts/inr_zurich.py --split tuning --draws 2

is for development: other patches, nothing in results/.

As in benchmark_classical.py, whose processes and records these are: every configuration is given
the same two files and gives back a displacement field, and everything is measured from that. Here
``--jobs`` pairs are at work at a time, one thread and one core each, so that the seconds are those
of one core. What is measured goes into build/inr_zurich/ at once, and a stopped run continues
there. ``--again NAME`` measures a configuration anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import queue
import statistics
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_classical
import peers
import torch
from benchmark_classical import SPLITS, Workers, known_or_stop, measure_all, versions
from benchmark_record import DRAWS, UNREGISTERED, Record, Row, compare, interval, key
from provenance import ROOT, committed_or_stop
from torch import Tensor

from reglib.data.nifti import Image, read_image, write_field
from reglib.data.zurich import LEVELS, SIZE, SUCCESS, patches, relative_distance, zurich_protocol
from reglib.geometry.affine import rigid_matrix
from reglib.geometry.grid import identity_grid
from reglib.geometry.procrustes import fit_affine
from reglib.methods.classical import Rigid
from reglib.methods.inr import INR, PRESETS
from reglib.methods.search import Search
from reglib.objectives.mind import mind
from reglib.registration import describe_method, register

WORK = ROOT / "build" / "inr_zurich"
RESULTS = ROOT / "results" / "inr_zurich.json"
GRANULARITY = ROOT / "results" / "inr_zurich_granularity.json"

MODALITIES = ("single", "multi")
#: Transforms of every patch and level; the paper's settings see the first ones.
REPEATS, REPEATS_OF_THE_PAPER = 5, 1
#: Seconds that a pair may take.
CAP = 3600.0
#: The levels over which configurations are compared.
HARDER = LEVELS[1:]

#: Millimetres are pixels, and the axes point to the left and to the back, as ITK's do.
AFFINE = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))

# --- Configurations -------------------------------------------------------------------------

#: SimpleITK: from the middle, all pixels; levels and smoothing chosen on the tuning patches, by
#: metric. Of intensities up to 1, mean squares have gradients below the tolerance it comes with.
SITK: dict[str, Any] = {
    "rigid": True,
    "initialise": "geometry",
    "bins": 32,
    "sampling": 1.0,
    "shrink": [4, 2, 1],
    "sigma_voxels": [4.0, 2.0, 1.0],
    "iterations": 200,
    "learning_rate": 1.0,
    "minimum_step": 0.001,
    "relaxation": 0.5,
    "gradient_tolerance": 1e-8,
}


def ants(metric: str) -> dict[str, Any]:
    """``ants.registration`` as it comes, rigid."""
    options = {"type_of_transform": "Rigid", "aff_metric": metric}
    return {"package": "antspyx", "seed": 0, "registration": options}


#: What is only for images of one modality.
MEAN_SQUARES = {
    "ANTsPy rigid, mean squares": ants("meansquares"),
    "SimpleITK rigid, mean squares": {
        "package": "SimpleITK",
        "affine": SITK
        | {"metric": "mean squares", "shrink": [8, 4, 2], "sigma_voxels": [8.0, 4.0, 2.0]},
    },
}
PEERS = MEAN_SQUARES | {
    "ANTsPy rigid, MI": ants("mattes"),
    "SimpleITK rigid, MI": {"package": "SimpleITK", "affine": SITK},
}

#: Ours: methods one after another; INR takes the modality of the pair.
METHODS: dict[str, list[Any]] = {
    "search": [Search(), Rigid(mind, initialise="none")],
    "INR, as the paper": [PRESETS["paper"]],
    "INR, without a search": [INR()],
    "INR, robust": [PRESETS["robust"]],
}
AS_THE_PAPER = "INR, as the paper"

#: Cells per pixel of the image network's finest level.
FINEST = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)


def granular(finest: float) -> INR:
    """The networks alone, without a search, with an image network of a granularity."""
    plain = INR()
    return dataclasses.replace(plain, image=dataclasses.replace(plain.image, finest=finest))


GRANULAR: dict[str, list[Any]] = {f"INR, finest {x:g}": [granular(x)] for x in FINEST}


def settings_of(methods: Sequence[Any]) -> dict[str, Any]:
    """As JSON."""
    return {"package": "reglib", "methods": [describe_method(method) for method in methods]}


CONFIGURATIONS = PEERS | {name: settings_of(methods) for name, methods in METHODS.items()}

PROTOCOL = {
    "pairs": "Lu et al., PLoS ONE 2022, doi:10.1371/journal.pone.0276196, on other images of the "
    "same sensor, 300 x 300, unstretched; both modalities see the same transforms.",
    "distance": "mean distance of the corners from where they should be, over 300 pixels, of the "
    "affine matrix that fits the displacement field; fit_residual, pixels, is how well it does.",
    "success": f"a distance of at most {SUCCESS}; without a transform, that of doing nothing "
    "counts.",
    "seconds": "wall clock of the call that registers, imports warm, no files read.",
    "interval": f"95 %, percentile bootstrap, {DRAWS} draws of whole patches.",
    "harder": f"differences of success over levels {HARDER}, on the pairs that both have.",
    "confidence": "of reglib's, see reglib.methods.search.confidence.",
    "cap_seconds": CAP,
}


# --- Pairs ----------------------------------------------------------------------------------


class Case(NamedTuple):
    """A pair by name; a patch is a cluster."""

    set: str
    moving: str
    fixed: str
    cluster: int
    modality: str
    level: int
    draw: int


class Loaded(NamedTuple):
    """A case in memory; the truth is in voxels, ``(1, 3, 3)``, fixed to moving."""

    moving: Image
    fixed: Image
    truth: Tensor


def cases(split: str, repeats: int = REPEATS) -> Iterator[Case]:
    """The pairs of a split."""
    for modality in MODALITIES:
        for level in LEVELS:
            for patch in json.loads(SPLITS.read_text())["quickbird"][split]:
                for draw in range(repeats):
                    yield Case(
                        f"{modality}, level {level}",
                        f"patch {patch}, draw {draw}",
                        f"patch {patch}",
                        int(patch),
                        modality,
                        level,
                        draw,
                    )


@functools.cache
def bands() -> Tensor:
    """All patches, ``(11, 4, 300, 300)``."""
    return patches("quickbird").images


def load(case: Case) -> Loaded:
    """Make a pair."""
    generator = torch.Generator()
    generator.manual_seed(1000 * case.cluster + 100 * case.level + case.draw)
    image = bands()[case.cluster : case.cluster + 1]
    pair = zurich_protocol(image, case.level, modality=case.modality, generator=generator)
    return Loaded(Image(pair.moving, AFFINE), Image(pair.fixed, AFFINE), pair.truth)


def measure(case: Loaded, u: Tensor) -> dict[str, Any]:
    """The relative distance of a displacement field in voxels."""
    x = identity_grid(u.shape[2:], dtype=torch.float64)
    fit = fit_affine(x.flatten(2).mT, (x + u.double()).flatten(2).mT)
    distance = float(relative_distance(fit.matrix, case.truth, size=SIZE))
    return {
        "distance": round(distance, 6),
        "success": distance <= SUCCESS,
        "fit_residual": round(float(fit.residual.max()), 5),
    }


def warm_pair() -> tuple[Image, Image]:
    """Waves, and the same turned and shifted a little: something to warm up with."""
    x = identity_grid((40, 40), dtype=torch.float64).flatten(2).mT
    turn = rigid_matrix(
        torch.tensor([[0.05]], dtype=torch.float64),
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        centre=torch.full((1, 2), 19.5, dtype=torch.float64),
    )[0]

    def image(points: Tensor) -> Image:
        waves = (points / 3).sin().sum(2) + (points[..., 0] * points[..., 1] / 60).cos()
        return Image(waves.view(1, 1, 40, 40).float(), AFFINE)

    return image(x @ turn[:2, :2].T + turn[:2, 2]), image(x)


# --- Registering ----------------------------------------------------------------------------


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given; settings name a modality besides."""
    known = [*METHODS.values(), *GRANULAR.values()]
    plain = {name: value for name, value in settings.items() if name != "modality"}
    methods = next(methods for methods in known if settings_of(methods) == plain)
    return [
        dataclasses.replace(m, modality=settings["modality"]) if isinstance(m, INR) else m
        for m in methods
    ]


def run_reglib(moving: str, fixed: str, field: str, settings: dict[str, Any]) -> peers.Watch:
    """Ours, in a process of its own like the peers."""
    m, f = read_image(moving), read_image(fixed)
    methods = methods_of(settings)
    with peers.Watch() as watch:
        found = register(m, f, methods, progress=False)
    told = [stage["confidence"] for stage in found.history[0].values() if "confidence" in stage]
    watch.notes = {"confidence": round(told[-1][-1], 3)}
    write_field(field, found.whole_field(), f.affine, moving_affine=m.affine)
    return watch


def applies(name: str, case: Case) -> bool:
    """Whether a configuration is for a pair."""
    if name == AS_THE_PAPER and case.draw >= REPEATS_OF_THE_PAPER:
        return False
    return not (name in MEAN_SQUARES and case.modality == "multi")


def register_all(
    record: Record,
    everything: Sequence[Case],
    configurations: dict[str, dict[str, Any]],
    python: Path,
    jobs: int,
) -> None:
    """Measure what ``record`` does not hold, so many pairs at a time."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in everything:
        waiting.put(case)
    stopped = threading.Event()

    def work(place: int) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            Workers(
                python, Path(folder), __file__, WORK, warm=warm_pair(), threads=1, place=place
            ) as workers,
        ):
            while not waiting.empty():
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return

                def run(
                    name: str, settings: dict[str, Any], modality: str = case.modality
                ) -> dict[str, Any]:
                    ours = {"modality": modality} if settings["package"] == "reglib" else {}
                    answer = workers.register(name, settings | ours)
                    if stopped.is_set():
                        raise KeyboardInterrupt
                    return answer

                chosen = {n: s for n, s in configurations.items() if applies(n, case)}
                measure_all(record, [case], chosen, workers.files, run, load=load, measure=measure)

    with ThreadPoolExecutor(jobs) as executor:
        futures = [executor.submit(work, place) for place in range(jobs)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stopped.set()
            raise


# --- The tables -----------------------------------------------------------------------------


def summarise(rows: Sequence[Row], ours: Collection[str]) -> dict[str, Any]:
    """Of every set and configuration; and how far the success of ``ours`` is above the others'.

    A pair without a transform counts with its distance before registration.
    """
    before = {key(r)[:3]: r for r in rows if r["configuration"] == UNREGISTERED}
    tables: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        first = {name: before[key(row)[:3]][name] for name in ("distance", "success")}
        tables.setdefault(row["set"], {}).setdefault(row["configuration"], []).append(first | row)
    harder: dict[str, dict[str, list[Row]]] = {}
    for table in tables.values():
        for name, found in table.items():
            if found[0]["level"] in HARDER:
                harder.setdefault(found[0]["modality"], {}).setdefault(name, []).extend(found)
    return {
        "summary": {
            one: {name: summarise_one(found) for name, found in table.items()}
            for one, table in tables.items()
        },
        "harder": {
            modality: {
                one: {
                    other: compare(table[one], table[other], "success", succeeded)
                    for other in table
                    if other != one
                }
                for one in table
                if one in ours
            }
            for modality, table in harder.items()
        },
    }


def summarise_one(rows: Sequence[Row]) -> dict[str, Any]:
    """One configuration on the pairs of one set."""
    distances = [row["distance"] for row in rows]
    successes = [succeeded(row) for row in rows]
    seconds = [row["seconds"] for row in rows]
    return {
        "pairs": len(rows),
        "failed": sum(row["failed"] is not None or row["timed_out"] for row in rows),
        "success": round(statistics.fmean(successes), 4),
        "success_interval": interval(successes, [row["cluster"] for row in rows]),
        "distance": round(statistics.fmean(distances), 5),
        "distance_sd": round(statistics.stdev(distances), 5) if len(rows) > 1 else None,
        "distance_median": round(statistics.median(distances), 5),
        "distance_interval": interval(distances, [row["cluster"] for row in rows]),
        "seconds": round(statistics.fmean(seconds), 3),
        "seconds_largest": max(seconds),
    }


def succeeded(row: Row) -> float:
    """1 or 0."""
    return float(row["success"])


def table(content: dict[str, Any]) -> str:
    """The summary for the terminal."""
    lines = []
    for name, configurations in content["summary"].items():
        lines += ["", f"{name:34} success    interval   distance      sd  median       s failed"]
        for configuration, s in configurations.items():
            low, high = s["success_interval"] or (math.nan, math.nan)
            spread = math.nan if s["distance_sd"] is None else s["distance_sd"]
            lines.append(
                f"{configuration:34} {100 * s['success']:6.1f}  {100 * low:5.1f}, {100 * high:5.1f}"
                f" {100 * s['distance']:8.2f}{100 * spread:8.2f}{100 * s['distance_median']:8.2f}"
                f"{s['seconds']:8.2f} {s['failed']:3d}/{s['pairs']}"
            )
    return "\n".join(lines)


# --- The run --------------------------------------------------------------------------------


def measure_set(
    name: str,
    split: str,
    everything: Sequence[Case],
    configurations: dict[str, dict[str, Any]],
    results: Path | None,
    options: argparse.Namespace,
) -> None:
    """Register and measure all pairs, and print the table of it."""
    wanted = configurations
    if options.only is not None:
        wanted = {n: s for n, s in configurations.items() if n in options.only}
    if not wanted:
        return  # --only names configurations of the other set
    record = Record(WORK / f"{name}.json", split, results)
    record.forget(options.again)
    pairs = [case[:3] for case in everything]
    tasks = {
        (*case[:3], n)
        for case in everything
        for n in [UNREGISTERED, *configurations]
        if applies(n, case)
    }
    record.begin(wanted, {task for task in tasks if task[3] in [UNREGISTERED, *wanted]})
    python = benchmark_classical.make_environment()
    register_all(record, everything, wanted, python, options.jobs)
    whole = {(*pair, n) for pair in pairs for n in [UNREGISTERED, *configurations]}
    missing = tasks - record.done
    if missing:
        print(f"{len(missing)} registrations are missing: no results are written")
        print(table(summarise(record.rows, ())))
        return
    head = {"script": "data_scripts/inr_zurich.py", "protocol": PROTOCOL}
    head |= {"versions": versions(python)}
    found = record.finish(
        pairs, list(configurations), head, skipped=whole - tasks, summary=summarise
    )
    print(table(found))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--draws", type=int, default=REPEATS, help="fewer (tuning)")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="only these (tuning)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="pairs at a time")
    parser.add_argument("--granularity", action="store_true", help="figure 3 alone")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        peers.serve({"reglib": run_reglib})
        return
    benchmark_classical.CAP = CAP
    test = options.split == "test"
    if test and (options.draws != REPEATS or tuple(options.levels) != LEVELS):
        parser.error("--draws, --levels: the test pairs are measured all together")
    if test:
        committed_or_stop()
    every = CONFIGURATIONS | {name: settings_of(methods) for name, methods in GRANULAR.items()}
    known_or_stop([*(options.only or []), *options.again], every)
    if not options.granularity:
        everything = [c for c in cases(options.split, options.draws) if c.level in options.levels]
        results = RESULTS if test else None
        measure_set(options.split, options.split, everything, CONFIGURATIONS, results, options)
    if options.granularity or test:
        fewer = [case for case in cases("tuning", 1) if case.level in options.levels]
        own = {name: every[name] for name in GRANULAR}
        results = GRANULARITY if test else None
        measure_set("granularity", "tuning", fewer, own, results, options)


if __name__ == "__main__":
    main()
