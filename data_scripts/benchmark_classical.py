"""The classical methods beside their peers, on the same pairs, in the same run.

    REGLIB_DATA=FOLDER python data_scripts/benchmark_classical.py

makes the peers' environment (build/peers, from requirements-peers.txt) and writes
results/benchmark_classical.json. Leave the machine alone meanwhile: seconds are compared.

    REGLIB_DATA=FOLDER python data_scripts/benchmark_classical.py --split validation --pairs 2

is for development: other pairs, nothing in results/.

Every configuration (peers.py holds those of the peers) is given the same two NIfTI files and gives
back a displacement field; labels are warped and everything is measured here, from that file, alike
for all. A process of its own for each package, two threads and two cores, one process at work at a
time. Only the call that registers is timed: files are read and modules are imported before, and a
small artificial pair goes through every configuration first. Who takes longer than the cap is
ended.

Each configuration sees the test pairs once; ``runs`` in the results is the ledger of who was
measured when. What is measured goes into build/benchmark_classical/ at once: a stopped run
continues there, and the results are written when nothing is missing. Whoever measures a
configuration again (``--again NAME``) finds both times in the ledger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from benchmark_record import DRAWS, UNREGISTERED, Record, Row, estimate, key, summarise, table
from brains import ixi_structures, relabel, scaled
from provenance import ROOT, committed_or_stop
from torch import Tensor
from trainings import trained_or_stop

from reglib.data import datasets
from reglib.data.assets import fetch
from reglib.data.nifti import Image, read_field, read_image, read_labels, write_field, write_image
from reglib.geometry.affine import whole_field
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import classical
from reglib.objectives.metrics import dice, folding, nda, ndv
from reglib.objectives.similarity import lncc, ncc
from reglib.registration import register

REQUIREMENTS = ROOT / "data_scripts" / "requirements-peers.txt"
SPLITS = ROOT / "data_scripts" / "splits.json"
WORK = ROOT / "build" / "benchmark_classical"
RESULTS = ROOT / "results" / "benchmark_classical.json"

#: Seconds that a pair may take.
CAP = 600.0
#: Voxels at each face that ``folding_inside`` leaves out, as Learn2Reg does.
MARGIN = 2

#: Ours: classes of :mod:`reglib.methods.classical`, one after another, and what is not the default.
OURS: dict[str, dict[str, Any]] = {
    name: {"package": "reglib", "methods": methods}
    for name, methods in {
        "reglib affine": {"Affine": {}},
        "reglib affine + displacement": {"Affine": {}, "Displacement": {}},
        "reglib affine + velocity": {"Affine": {}, "Velocity": {}},
        "reglib affine + velocity, fast": {
            "Affine": {"levels": [4.0], "steps": 20},
            "Velocity": {"steps": 8, "lr": 0.3, "squarings": 4},
        },
        "reglib affine + B-spline": {"Affine": {}, "BSpline": {}},
    }.items()
}
CONFIGURATIONS = OURS | peers.CONFIGURATIONS

PROTOCOL = {
    "pairs": "the members of a part of splits.json in their order, in groups that share no member: "
    "of two (ixi_2mm) or three (hippocampus); in a group each is moving to the next as fixed. "
    "Clusters of the intervals are the groups.",
    "input": "NIfTI, least value to 0 and 99th percentile to 1, clipped; grids as they are.",
    "dice": "moving labels warped once, nearest, from the displacement field that came back; mean "
    "over structures, then over pairs; a pair that failed or took too long counts as unregistered.",
    "seconds": "wall clock of the call that registers, imports warm, no files read; ANTsPy writes "
    "its transforms and makes both warped images within the call.",
    "threads": peers.THREADS,
    "cap_seconds": CAP,
    "folding": "share of the fixed grid's voxels where the whole transform has a determinant of at "
    "most 0; folding_inside without two voxels at each face.",
    "similarity": "ncc and lncc (9 voxels) as losses, where the fixed image is not 0.",
    "interval": f"95 %, percentile bootstrap over clusters, {DRAWS} draws.",
}


# --- Pairs ----------------------------------------------------------------------------------


class Set(NamedTuple):
    """A set of labelled images: folders, structures and how pairs are made of its members."""

    images: str
    labels: str
    structures: dict[str, tuple[int, ...]]
    group: int
    pairs: int


SETS = {
    "ixi_2mm": Set("t1_brain", "dlmuse", ixi_structures(), 2, 10),
    "hippocampus": Set("imagesTr", "labelsTr", {"anterior": (1,), "posterior": (2,)}, 3, 20),
}
COLIN = "colin27_mni152"
STRUCTURES = {name: list(s.structures) for name, s in SETS.items()} | {
    COLIN: list(datasets.SHARED_STRUCTURES)
}


class Case(NamedTuple):
    """A pair by name; cases of different clusters share no subject."""

    set: str
    moving: str
    fixed: str
    cluster: int


def grouped(name: str, members: Sequence[str], size: int) -> Iterator[Case]:
    """Pairs within groups of ``size`` members: each to the next."""
    for cluster in range(len(members) // size):
        group = members[cluster * size : (cluster + 1) * size]
        for moving, fixed in itertools.pairwise(group):
            yield Case(name, moving, fixed, cluster)


def cases(split: str, pairs: int | None = None) -> list[Case]:
    """The pairs of a split, at most ``pairs`` of each set, and Colin27 to MNI152."""
    parts = json.loads(SPLITS.read_text())
    found = []
    for name, one in SETS.items():
        all_pairs = list(grouped(name, parts[name][split], one.group))
        found += all_pairs[: one.pairs if pairs is None else min(pairs, one.pairs)]
    return [*found, Case(COLIN, "colin27", "mni152", 0)]


class Loaded(NamedTuple):
    """A case in memory: labels are numbered from 1 in the order of ``structures``."""

    structures: list[str]
    moving: Image
    fixed: Image
    moving_labels: Tensor
    fixed_labels: Tensor


def load(case: Case) -> Loaded:
    """Read a case."""
    if case.set == COLIN:
        brains = datasets.colin27(), datasets.mni152()
        images = [Image(scaled(brain.image.tensor), brain.image.affine) for brain in brains]
        ids = zip(*datasets.SHARED_STRUCTURES.values(), strict=True)
        labels = [
            relabel(brain.labels.tensor, [(n,) for n in numbers])
            for brain, numbers in zip(brains, ids, strict=True)
        ]
        return Loaded(STRUCTURES[case.set], *images, *labels)
    one, folder = SETS[case.set], fetch(case.set)
    members = (case.moving, case.fixed)
    images = [read_image(folder / one.images / f"{m}.nii.gz") for m in members]
    images = [Image(scaled(image.tensor), image.affine) for image in images]
    maps = [read_labels(folder / one.labels / f"{m}.nii.gz") for m in members]
    for image, labelled in zip(images, maps, strict=True):
        if not torch.allclose(image.affine, labelled.affine, atol=1e-3):
            raise ValueError(f"{case}: image and labels lie in different places")
    return Loaded(
        STRUCTURES[case.set], *images, *(relabel(x.tensor, one.structures.values()) for x in maps)
    )


# --- Measuring ------------------------------------------------------------------------------


def measure(case: Loaded, u: Tensor) -> dict[str, Any]:
    """Everything about a whole transform ``x + u(x)``, in voxels of the fixed grid."""
    world = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    field = whole_field(world, u, case.fixed.affine, case.moving.affine)
    labels = warp_labels(case.moving_labels, field)
    warped, fixed = warp(case.moving.tensor, field), case.fixed.tensor
    overlap = dice(labels, case.fixed_labels, labels=range(1, len(case.structures) + 1))[0]
    weight = (fixed > 0).to(fixed)
    values = {
        "ncc": ncc(warped, fixed, weight=weight),
        "lncc": lncc(warped, fixed, weight=weight),
    }
    return {
        "mean_dice": round(float(overlap.nanmean()), 5),
        "dice": [None if math.isnan(x) else round(x, 4) for x in overlap.tolist()],
        **{name: float(f"{float(value):.5g}") for name, value in values.items()},
        **regularity(u),
    }


def regularity(u: Tensor) -> dict[str, float]:
    """Shares of the voxels that fold, and non-diffeomorphic volume (area, in the plane)."""
    inside = torch.zeros_like(u[:, :1])
    inside[(..., *(slice(MARGIN, -MARGIN),) * u.shape[1])] = 1
    values = {
        "folding": folding(u),
        "folding_inside": folding(u, mask=inside),
        "ndv": ndv(u) if u.shape[1] == 3 else nda(u),
    }
    return {name: float(f"{float(value):.5g}") for name, value in values.items()}


Measure = Callable[[Loaded, Tensor], dict[str, Any]]


def measure_file(case: Loaded, path: Path, measure: Measure = measure) -> dict[str, Any]:
    """The same of a field on disk, which must lie on the fixed grid."""
    u, affine = read_field(path)
    same = u.shape[2:] == case.fixed.tensor.shape[2:]
    if not same or not torch.allclose(affine, case.fixed.affine, atol=1e-3):
        raise ValueError(f"{path.name}: wanted a field on the fixed grid, got another")
    return measure(case, u)


# --- Processes ------------------------------------------------------------------------------


def make_environment(folder: Path = ROOT / "build" / "peers") -> Path:
    """The interpreter of the peers; made again when requirements-peers.txt has changed."""
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    wanted = REQUIREMENTS.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-r", REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """Of the peers' packages, by the interpreter of their environment."""
    command = [python, peers.__file__, "versions"]
    found: dict[str, str] = json.loads(
        subprocess.run(command, capture_output=True, check=True).stdout
    )
    return found


class Worker:
    """A process that registers pairs on demand; it is ended when it takes too long.

    ``place`` says which of several, whose threads have cores of their own, it is.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        threads: int | None = None,
        place: int = 0,
    ) -> None:
        threads = threads or peers.THREADS
        names = ("OMP", "MKL", "OPENBLAS")
        limits = {f"{name}_NUM_THREADS": str(threads) for name in names}
        limits["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
        limits["REGLIB_PLACE"] = str(place)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | limits | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        self.warm: set[str] = set()
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                bufsize=0,
                start_new_session=True,  # who is interrupted by hand is not a failure
            )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer; ``timed_out`` or ``error`` in it where there is none."""
        process, answer = self.process, b""
        assert process.stdin is not None
        assert process.stdout is not None
        end = time.monotonic() + seconds
        try:
            process.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            return {"error": f"the process ended with code {process.wait()}"}
        while not answer.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.end()
                return {"timed_out": True}
            piece = process.stdout.read(1 << 16)
            if not piece:
                return {"error": f"the process ended with code {process.wait()}"}
            answer += piece
        found: dict[str, Any] = json.loads(answer)
        return found

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def end(self) -> None:
        """End this process, and no other."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Workers:
    """A worker for each package, started when it is first needed and again after its end.

    Ours is served by ``script``, when it is called with ``--serve``; all write to ``logs``. The
    pair ``warm`` (:func:`artificial_pair` if ``None``) goes through every configuration first;
    threads and place are those of a worker.
    """

    def __init__(
        self,
        peers_python: Path,
        folder: Path,
        script: str = __file__,
        logs: Path = WORK,
        *,
        warm: tuple[Image, Image] | None = None,
        threads: int | None = None,
        place: int = 0,
    ) -> None:
        self.threads, self.place = threads, place
        self.python, self.script, self.logs = peers_python, script, logs
        self.running: dict[str, Worker] = {}
        names = {"moving": "moving.nii", "fixed": "fixed.nii", "field": "field.nii.gz"}
        self.files = {part: folder / name for part, name in names.items()}
        self.warm_files = {part: folder / f"warm_{name}" for part, name in names.items()}
        for name, image in zip(("moving", "fixed"), warm or artificial_pair(), strict=True):
            write_image(self.warm_files[name], image)

    def worker(self, package: str) -> Worker:
        """The worker of a package."""
        found = self.running.get(package)
        if found is None or not found.alive:
            script = Path(self.script if package == "reglib" else peers.__file__).resolve()
            python = sys.executable if package == "reglib" else self.python
            command = [python, script, *(["--serve"] if package == "reglib" else [])]
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self.logs / f"{package}.log"
            found = Worker(command, log, threads=self.threads, place=self.place)
            self.running[package] = found
        return found

    def register(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Register the pair that lies in ``files``; the field comes to lie there too."""
        worker = self.worker(settings["package"])
        if name not in worker.warm:
            answer = worker.ask(request(settings, self.warm_files), CAP)
            if "seconds" not in answer:
                # A package that does not run is no result.
                raise SystemExit(f"{name}: the artificial pair was not registered: {answer}")
            worker.warm.add(name)
        return worker.ask(request(settings, self.files), CAP)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.running.values():
            if worker.alive:
                worker.end()


def request(settings: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """What a worker is asked."""
    return {"settings": settings} | {name: str(path) for name, path in files.items()}


def artificial_pair() -> tuple[Image, Image]:
    """Blobs, and the same 1.5 voxels further along the first axis: something to warm up with."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([18.0, 20.0, 16.0]) + 9 * torch.randn(20, 3, generator=generator)
    x = identity_grid((36, 40, 32))
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))

    def image(shift: float) -> Image:
        total = torch.zeros_like(x[:, :1])
        for n, centre in enumerate(centres):
            place = (centre + torch.tensor([shift, 0.0, 0.0])).view(1, 3, 1, 1, 1)
            apart = (x - place).square().sum(1, keepdim=True)
            total += (0.4 + n / 20) * (-apart / 20).exp()
        return Image(scaled(total), affine)

    return image(1.5), image(0.0)


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    return [getattr(classical, name)(**own) for name, own in settings["methods"].items()]


def run_reglib(
    moving: str,
    fixed: str,
    field: str,
    settings: dict[str, Any],
    methods_of: Callable[[dict[str, Any]], list[Any]] = methods_of,
) -> peers.Watch:
    """Ours, in a process of its own like the peers; weights are read before the clock starts."""
    m, f = read_image(moving), read_image(fixed)
    methods = methods_of(settings)
    with peers.Watch() as watch:
        found = register(m, f, methods, progress=False)
    write_field(field, found.whole_field(), f.affine, moving_affine=m.affine)
    return watch


# --- The run --------------------------------------------------------------------------------

Register = Callable[[str, dict[str, Any]], dict[str, Any]]


def measure_all(
    record: Record,
    everything: Sequence[Case],
    configurations: dict[str, dict[str, Any]],
    files: dict[str, Path],
    run: Register,
    known: Sequence[Row] = (),
    *,
    load: Callable[[Case], Loaded] = load,
    measure: Measure = measure,
) -> None:
    """Measure what ``record`` does not hold: pair by pair, one configuration after another.

    Args:
        record: keeps every row at once.
        everything: the pairs.
        configurations: settings by name.
        files: where ``moving`` and ``fixed`` go, and where ``field`` comes to lie.
        run: registers what lies there, given a name and settings.
        known: rows to estimate the time from.
        load: reads a case.
        measure: what is to be known about a transform.
    """
    names = [UNREGISTERED, *configurations]
    left = {(*case[:3], name) for case in everything for name in names} - record.done
    for case in everything:
        todo = [name for name in names if (*case[:3], name) in left]
        if not todo:
            continue
        pair = load(case)
        for part, image in (("moving", pair.moving), ("fixed", pair.fixed)):
            write_image(files[part], image)
        for name in todo:
            minutes = estimate(left, record.rows, known)
            print(f"{minutes:5.0f} min left: {' '.join(case[:3])}, {name}", flush=True)
            row: Row = case._asdict() | {"configuration": name}
            row |= {"load": round(os.getloadavg()[0], 2)}
            row |= {"seconds": 0.0, "cpu_seconds": 0.0, "timed_out": False, "failed": None}
            if name == UNREGISTERED:
                shape = pair.fixed.tensor.shape[2:]
                row |= measure(pair, torch.zeros(1, len(shape), *shape))
            else:
                files["field"].unlink(missing_ok=True)
                answer = run(name, configurations[name])
                row |= outcome(pair, answer, files["field"], measure)
            record.add(row)
            left.discard(key(row))


def outcome(
    case: Loaded, answer: dict[str, Any], field: Path, measure: Measure = measure
) -> dict[str, Any]:
    """What a row says of a registration that was answered so."""
    if answer.get("timed_out"):
        return {"seconds": CAP, "cpu_seconds": None, "timed_out": True}
    if "error" in answer:
        return {"cpu_seconds": None, "failed": answer["error"]}
    times = {part: round(answer[part], 4) for part in ("seconds", "cpu_seconds")}
    times |= answer.get("notes", {})
    try:
        return times | measure_file(case, field, measure)
    except (OSError, ValueError) as error:
        return times | {"failed": f"{type(error).__name__}: {error}"}


def known_or_stop(
    names: Iterable[str], known: Collection[str], kind: str = "configuration"
) -> None:
    """Stop unless there are configurations, or what else ``kind`` says, of these names."""
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"no such {kind}: {sorted(unknown)}; one of {list(known)}")


def chosen(
    part: str,
    every: dict[str, dict[str, Any]],
    only: Collection[str] | None,
    again: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """The configurations that are asked for, out of all; stops where they cannot be measured.

    Args:
        part: of the split; what sees ``"test"`` has to be committed.
        every: all configurations of a table.
        only: names of those to measure; ``None`` for all. Before registration everything is
            measured anyway.
        again: names of those to measure anew.
    """
    if part == "test":
        committed_or_stop()
    known_or_stop([*(only or []), *again], [*every, UNREGISTERED])
    wanted = {name: own for name, own in every.items() if only is None or name in only}
    trained_or_stop(wanted)
    return wanted


def register_all(
    record: Record,
    everything: Sequence[Case],
    configurations: dict[str, dict[str, Any]],
    load: Callable[[Case], Any],
    script: str,
    work: Path,
    *,
    measure: Callable[[Any, Tensor], dict[str, Any]] = measure,
    warm: tuple[Image, Image] | None = None,
    known: Sequence[Row] = (),
    only: Collection[str] | None = None,
    head: dict[str, Any] | None = None,
    summary: Callable[[Sequence[Row], Collection[str]], dict[str, Any]] = summarise,
    show: Callable[[dict[str, Any]], str] = table,
) -> dict[str, Any] | None:
    """Measure what ``record`` does not hold, and sum up if nothing is missing then.

    Args:
        record: keeps every row at once.
        everything: the pairs.
        configurations: settings by name, of all that there should be.
        load: reads a case.
        script: serves ours when it is called with ``--serve``.
        work: where the processes write their logs.
        measure: what is to be known about a transform.
        warm: what goes through every configuration first, see :class:`Workers`.
        known: rows to estimate the time from.
        only: run these configurations; ``None`` for all.
        head: see :func:`sum_up`, as of the next two.
        summary: of rows, given the names of ours.
        show: the summary for the terminal.

    Returns:
        The whole with its summary, or ``None`` if something is missing.
    """
    wanted = {n: s for n, s in configurations.items() if only is None or n in only}
    tasks = {(*case[:3], name) for case in everything for name in [UNREGISTERED, *wanted]}
    record.begin(wanted, tasks)
    left = tasks - record.done
    minutes = estimate(left, record.rows, known)
    print(f"{len(left)} of {len(tasks)} registrations, about {minutes:.0f} minutes")
    print(f"load of this machine now: {os.getloadavg()[0]:.1f} (wanted: near 0)", flush=True)
    python = make_environment()
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(python, Path(folder), script, work, warm=warm) as workers,
    ):
        measure_all(
            record,
            everything,
            wanted,
            workers.files,
            workers.register,
            known,
            load=load,
            measure=measure,
        )
    names = list(configurations)
    return sum_up(record, everything, names, python, head=head, summary=summary, show=show)


def sum_up(
    record: Record,
    everything: Sequence[Case],
    names: Sequence[str],
    python: Path,
    *,
    head: dict[str, Any] | None = None,
    summary: Callable[[Sequence[Row], Collection[str]], dict[str, Any]] = summarise,
    show: Callable[[dict[str, Any]], str] = table,
) -> dict[str, Any] | None:
    """Print the table, and finish the record if nothing is missing.

    Args:
        record: with what is measured.
        everything: the pairs.
        names: of the configurations that there should be.
        python: the interpreter of the peers.
        head: what the results begin with.
        summary: of rows, given the names of ours.
        show: the summary for the terminal.

    Returns:
        The whole with its summary, or ``None`` if something is missing.
    """
    pairs = [case[:3] for case in everything]
    missing = {(*pair, name) for pair in pairs for name in names} - record.done
    if missing:
        print(f"{len(missing)} registrations are missing: no results are written")
        print(show(summary(record.rows, ())))
        return None
    head = (head or {}) | {"versions": versions(python)}
    found = record.finish(pairs, names, head, summary=summary)
    print(show(found))
    return found


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--pairs", type=int, help="at most so many of each set (validation)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": run_reglib})
        return
    test = options.split == "test"
    if test and options.pairs is not None:
        parser.error("--pairs: the test pairs are measured all together")
    if test:
        committed_or_stop()
    wanted = options.only or list(CONFIGURATIONS)
    known_or_stop([*wanted, *options.again], CONFIGURATIONS)
    configurations = {name: CONFIGURATIONS[name] for name in CONFIGURATIONS if name in wanted}

    everything = cases(options.split, options.pairs)
    record = Record(WORK / f"{options.split}.json", options.split, RESULTS if test else None)
    record.forget(options.again)
    other = WORK / "validation.json"
    register_all(
        record,
        everything,
        CONFIGURATIONS if test else configurations,
        load,
        __file__,
        WORK,
        known=json.loads(other.read_text())["rows"] if test and other.exists() else [],
        only=list(configurations),
        head={
            "script": "data_scripts/benchmark_classical.py",
            "protocol": PROTOCOL,
            "structures": STRUCTURES,
        },
    )


if __name__ == "__main__":
    main()
