"""Register many pairs: several at a time, each into a folder of its own, resumed where a run ended.

The pairs are handed out by dask.distributed (``pip install "reglib[scale]"``) to processes of this
machine or of a cluster with a common file system. A pair is done when its folder has appeared, and
it appears whole: a run that was stopped, or whose workers were killed, has lost what was under way
and nothing else. What cannot be registered is listed, and the other pairs go on.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reglib.checks import check_positive_int
from reglib.data.files import write_bytes
from reglib.data.nifti import NIFTI_SUFFIXES, Image, read_image, read_labels, write_image
from reglib.geometry.affine import whole_field
from reglib.geometry.sampling import warp_labels
from reglib.methods.network import Network
from reglib.methods.pair import Method
from reglib.objectives.metrics import dice
from reglib.objectives.similarity import ncc
from reglib.registration import Registration, describe_method, register

#: What :func:`run_cohort` writes below its folder, beside the folders of the pairs.
SUMMARY, FAILED = "summary.csv", "failed.csv"

#: What it adds to the folder of a pair, to say what the pair was made from, and its measures.
PAIR = "pair.json"

# Where results lie until they are whole.
_SCRATCH = ".parts"

_REQUIRED = ("moving", "fixed")
_ROLES = (*_REQUIRED, "moving_mask", "fixed_mask", "moving_labels", "fixed_labels")
_COLUMNS = ("name", *_ROLES)

# How often a pair is handed out that its workers did not die of.
_ATTEMPTS = 8

# Seconds between two versions of the tables while pairs are still being registered.
_TABLES_EVERY = 30.0

# Several threads of a worker would share torch's random numbers and matplotlib's state.
_one_at_a_time = threading.Lock()


class CohortPair(NamedTuple):
    """The files of one pair.

    Attributes:
        name: of the folder of its results.
        moving: image to be brought onto the fixed one.
        fixed: image that stays as it is.
        moving_mask: how much each voxel of the moving image counts, on its grid; or ``None``.
        fixed_mask: the same of the fixed image.
        moving_labels: label map of the moving side, to be warped; or ``None``.
        fixed_labels: label map on the fixed grid, which the warped labels are compared with.
    """

    name: str
    moving: Path
    fixed: Path
    moving_mask: Path | None = None
    fixed_mask: Path | None = None
    moving_labels: Path | None = None
    fixed_labels: Path | None = None

    def files(self) -> dict[str, Path]:
        """Those that are given, by what they are."""
        return {role: path for role in _ROLES if (path := getattr(self, role)) is not None}


class Measures(NamedTuple):
    """How the registration of one pair went; what is not a finite number is ``None``.

    Attributes:
        seconds: wall-clock time of the registration itself.
        similarity: of the warped to the fixed image, lower is better.
        folding: share of voxels where the residual ``x + u(x)`` folds.
        ndv: its non-diffeomorphic volume (area in 2-D), as a share.
        dice_before: mean over the labels, of the labels where they lie; ``None`` without labels.
        dice: the same of the warped labels.
    """

    seconds: float | None
    similarity: float | None
    folding: float | None
    ndv: float | None
    dice_before: float | None = None
    dice: float | None = None


class Outcome(NamedTuple):
    """What has become of one pair.

    Attributes:
        pair: its files.
        state: ``"done"`` in this run, ``"kept"`` from an earlier one, ``"failed"``, or ``"open"``
            where the run was stopped before.
        measures: of a result that is done or kept, else ``None``.
        reason: why it failed.
    """

    pair: CohortPair
    state: str
    measures: Measures | None = None
    reason: str = ""


#: Registers a pair and writes the results into an empty folder.
Work = Callable[[CohortPair, Path], Measures]


# --- Which pairs ----------------------------------------------------------------------------


def read_pairs(path: str | Path) -> list[CohortPair]:
    """Read a table of pairs.

    Args:
        path: CSV file in UTF-8 with the columns ``moving`` and ``fixed``, and where wanted
            ``name``, ``moving_mask``, ``fixed_mask``, ``moving_labels``, ``fixed_labels``. Paths
            are relative to the folder of the table; a cell may be empty but in the first two. A
            pair without a name is called after its files: ``MOVING_to_FIXED``.

    Returns:
        The pairs in the order of the rows, with absolute paths.

    Raises:
        OSError: if the table cannot be read.
        ValueError: if it is no such table, names no pair, or two pairs have one name.

    Warns:
        UserWarning: of columns that mean nothing.
    """
    path = Path(path)
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: wanted a CSV file, got {error}") from error
    numbered = [(number, row) for number, row in enumerate(lines, 1) if any(map(str.strip, row))]
    header = [cell.strip().lower() for cell in numbered[0][1]] if numbered else []
    doubled = [name for name, n in Counter(header).items() if n > 1 and name in _COLUMNS]
    if doubled or not set(_REQUIRED) <= set(header):
        raise ValueError(
            f"{path}: wanted a header with the columns moving and fixed, and out of "
            f"{', '.join(c for c in _COLUMNS if c not in _REQUIRED)}, each once, "
            f"got {','.join(header) or 'an empty file'}"
        )
    unused = [name for name in header if name not in _COLUMNS]
    if unused:
        warnings.warn(f"{path}: not used: the columns {', '.join(unused)}", stacklevel=2)
    pairs = [_row(path, number, row, header) for number, row in numbered[1:]]
    if not pairs:
        raise ValueError(f"{path}: wanted one pair or more below the header, got none")
    check_names([pair.name for pair in pairs], str(path))
    return pairs


def _row(path: Path, number: int, row: list[str], header: list[str]) -> CohortPair:
    if len(row) != len(header):
        raise ValueError(
            f"{path}, line {number}: wanted {len(header)} cells as in the header, got {len(row)}"
        )
    cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
    empty = [name for name in _REQUIRED if not cells[name]]
    if empty:
        raise ValueError(f"{path}, line {number}: wanted a file for {empty[0]}, got none")
    # Not resolved: links stay what the user calls the files.
    folder = Path(os.path.abspath(path)).parent
    files = {role: folder / cells[role] for role in _ROLES if cells.get(role)}
    if "fixed_labels" in files and "moving_labels" not in files:
        raise ValueError(f"{path}, line {number}: wanted moving_labels beside fixed_labels")
    name = cells.get("name") or "_to_".join(_stem(files[role]) for role in _REQUIRED)
    return CohortPair(name, **files)


def _stem(path: Path) -> str:
    for suffix in NIFTI_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def check_names(names: Sequence[str], where: str = "pairs") -> None:
    """Raise ``ValueError`` unless each name can be that of a folder, and no two are the same.

    Args:
        names: of the pairs; capital letters make no difference, as not every file system knows one.
        where: what the message begins with.
    """
    for name in names:
        # What some system or other does not allow in the name of a file.
        plain = re.fullmatch(r"[^/\\:*?\"<>|\x00-\x1f]{1,200}", name)
        if not plain or name.startswith(".") or name.endswith((".", " ")):
            raise ValueError(f"{where}: wanted names that a folder can have, got {name!r}")
        if name.lower() in (SUMMARY, FAILED):
            raise ValueError(f"{where}: wanted another name, as a table is called {name!r}")
    shared = [name for name, n in Counter(map(str.casefold, names)).items() if n > 1]
    if shared:
        raise ValueError(
            f"{where}: wanted a name of its own for each pair, got {len(shared)} that several "
            f"have, such as {shared[0]!r}; the column name tells pairs apart"
        )


# --- Registering them -----------------------------------------------------------------------


def register_cohort(
    pairs: str | Path | Iterable[CohortPair],
    method: Method | nn.Module | Sequence[Method | nn.Module],
    folder: str | Path,
    *,
    similarity: Callable[..., Tensor] = ncc,
    device: str | torch.device = "cpu",
    client: Any = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> list[Outcome]:
    """Register many pairs of files with one method, each into a folder of its own.

    A folder holds what :meth:`reglib.registration.Registration.save` writes, ``warped.nii.gz``,
    ``warped_labels.nii.gz`` where there are labels, and ``pair.json``. The transform has the bits
    that :func:`reglib.registration.register` gives with as many threads. Every pair is given a copy
    of the method as it is now, generators included.

    See :func:`run_cohort` for what is skipped, what is refused, and what the tables say. A script
    that starts local workers must do so below ``if __name__ == "__main__":``.

    Args:
        pairs: as :func:`read_pairs` gives them, or the path of such a table.
        method: as in :func:`reglib.registration.register`. It must be possible to pickle it.
        folder: where the results go.
        similarity: what is written as similarity of ``warped`` and ``fixed``; takes ``weight``.
        device: where the images go; networks are brought there.
        client: a ``distributed.Client`` or the address of a scheduler; ``None`` starts workers on
            this machine.
        workers: how many.
        threads: of each.
        force: replace results of other settings or inputs.
        progress: as in :func:`reglib.registration.register`.

    Returns:
        What has become of each pair, in their order.

    Raises:
        ImportError, KeyboardInterrupt, OSError, TypeError, ValueError: as :func:`run_cohort`.
    """
    chosen = read_pairs(pairs) if isinstance(pairs, (str, Path)) else list(pairs)
    methods = list(method) if isinstance(method, Sequence) else [method]
    if not methods or not all(callable(m) and not isinstance(m, type) for m in methods):
        raise TypeError(f"method: wanted a method, a network, or several in a list, got {method!r}")
    if not callable(similarity):
        raise TypeError(f"similarity: wanted a function, got {similarity!r}")
    work = functools.partial(
        _register_files, methods=methods, similarity=similarity, device=torch.device(device)
    )
    return run_cohort(
        chosen,
        work,
        folder,
        settings=settings_of(methods) | {"similarity": _told(similarity)},
        client=client,
        workers=workers,
        threads=threads,
        force=force,
        progress=progress,
    )


def settings_of(methods: Sequence[Method | nn.Module]) -> dict[str, Any]:
    """What tells methods apart, as JSON values.

    Functions are known by their names, networks by their weights as well.

    Args:
        methods: in the order in which they run.

    Returns:
        Names and settings of the methods, and the SHA-256 of their weights.
    """
    # As in the report of a registration.
    described = [describe_method(Network(m) if isinstance(m, nn.Module) else m) for m in methods]
    networks = [m.network if isinstance(m, Network) else m for m in methods]
    weights = [_weights(n) if isinstance(n, nn.Module) else None for n in networks]
    return {"method": described, "weights": weights}


def _told(similarity: Callable[..., Tensor]) -> str | dict[str, Any]:
    """Name of a similarity, and its settings if it has any."""
    described = describe_method(similarity)
    return described if described["settings"] else str(described["name"])


def _weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            # Numpy does not know every type of torch's.
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def _register_files(
    pair: CohortPair,
    folder: Path,
    *,
    methods: Sequence[Method | nn.Module],
    similarity: Callable[..., Tensor],
    device: torch.device,
) -> Measures:
    def there(path: Path | None) -> Image | None:
        if path is None:
            return None
        image = read_image(path)
        channels = image.tensor.shape[1]
        if channels != 1:
            raise ValueError(f"{path}: wanted an image in grey, got one of {channels} channels")
        return image.to(device)

    moving, fixed = there(pair.moving), there(pair.fixed)
    assert moving is not None
    assert fixed is not None
    mask = there(pair.fixed_mask)
    labels = [
        None if path is None else read_labels(path)
        for path in (pair.moving_labels, pair.fixed_labels)
    ]
    result = register(
        moving,
        fixed,
        [m.to(device) if isinstance(m, nn.Module) else m for m in methods],
        moving_mask=there(pair.moving_mask),
        fixed_mask=mask,
        progress=False,
    )
    assert result.warped is not None
    write_image(folder / "warped.nii.gz", Image(result.warped, result.fixed_affine))
    overlaps = _write_labels(result, labels[0], labels[1], folder)
    result.save(folder)
    weight = None if mask is None else mask.tensor.to(fixed.tensor)
    return measure(result, similarity(result.warped, fixed.tensor, weight=weight), overlaps)


def measure(
    result: Registration, similarity: Tensor, overlaps: tuple[float, float] | None = None
) -> Measures:
    """What a table says of a registration.

    Args:
        result: of a single pair.
        similarity: of its warped image, a scalar.
        overlaps: mean Dice of the labels before and after, if there are any.

    Returns:
        The measures.
    """
    before, after = overlaps or (None, None)
    return Measures(
        seconds=result.seconds,
        similarity=float(similarity),
        folding=float(result.folding),
        ndv=float(result.ndv),
        dice_before=before,
        dice=after,
    )


def _write_labels(
    result: Registration, moving: Image | None, fixed: Image | None, folder: Path
) -> tuple[float, float] | None:
    """Write the warped labels; mean Dice before and after, where there are some to compare with."""
    if moving is None:
        return None
    warped = result.apply_labels(moving)
    write_image(folder / "warped_labels.nii.gz", warped)
    if fixed is None:
        return None
    d = result.field.shape[1]
    nothing = whole_field(
        torch.eye(d + 1, dtype=torch.float64).unsqueeze(0),
        torch.zeros_like(result.field, device="cpu"),
        result.fixed_affine,
        moving.affine,
    )
    still = warp_labels(moving.tensor, nothing)
    after, wanted = warped.tensor.cpu(), fixed.tensor
    values = sorted({int(v) for x in (after, wanted) for v in torch.unique(x).tolist()} - {0})
    if not values:
        return None
    # NaN where a label lies outside the fixed image before, and not at all in it.
    first, second = (dice(x, wanted, labels=values).nanmean() for x in (still, after))
    return float(first), float(second)


# --- The run --------------------------------------------------------------------------------


def run_cohort(
    pairs: Sequence[CohortPair],
    work: Work,
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    client: Any = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> list[Outcome]:
    """Do something to every pair, on many workers, once and not again.

    A pair is *kept*, not done again, if its folder is whole and was made with these settings from
    the same files (by their SHA-256). A whole folder of other settings stops the run before it
    starts, one of other files fails that pair alone; with ``force`` both are replaced, each when
    the new one is whole. A folder from which something is missing is made anew, and one that holds
    anything else is never touched. The machine, its number of threads and the versions of the
    libraries are no settings; the reports name them.

    ``summary.csv`` has a row for every pair: name, state (``done``, ``failed``, ``open``) and
    :class:`Measures`. ``failed.csv`` lists those that failed, and why; without any it is not there.

    Args:
        pairs: the pairs.
        work: ``work(pair, folder)`` writes the results into an empty folder.
        folder: where the folders of the pairs go, and the tables.
        settings: what else decides about the results, as JSON values.
        client: a ``distributed.Client``, or the address of a scheduler such as
            ``"tcp://host:8786"``, whose workers see the same files under the same names and have
            this library; one thread each is enough. ``None`` starts workers here, processes with
            one pair at a time each.
        workers: how many; ``None`` fills the cores.
        threads: of each, for computing; ``None`` is what ``OMP_NUM_THREADS`` says, else at most 4.
        force: replace results of other settings or inputs.
        progress: show a progress bar on stderr; ``None`` shows it on a terminal only.

    Returns:
        What has become of each pair, in their order.

    Raises:
        ImportError: without dask.distributed.
        KeyboardInterrupt: if interrupted; what is done stays done, and the tables are written.
        OSError: if a table cannot be written.
        TypeError, ValueError: if an argument is malformed, or there are results of other settings.
    """
    distributed = _distributed()
    pairs = list(pairs)
    if not pairs or not all(isinstance(pair, CohortPair) for pair in pairs):
        raise TypeError("pairs: wanted one CohortPair or more")
    check_names([pair.name for pair in pairs])
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None:
            check_positive_int(value, name)
            if client is not None:
                raise ValueError(f"{name}: wanted None beside a client, which has its own")
    if client is not None and not isinstance(client, (str, distributed.Client)):
        raise TypeError(
            f"client: wanted a distributed.Client or an address, got {type(client).__name__}"
        )
    folder = Path(os.path.abspath(folder))
    wanted: dict[str, Any] = json.loads(json.dumps(dict(settings), allow_nan=False))
    if not force:
        _check_settings(pairs, folder, wanted)
    run = secrets.token_hex(6)
    payload = _pickled((work, wanted, force, run))
    outcomes = {pair.name: Outcome(pair, "open") for pair in pairs}
    begun = False
    try:
        with _local(workers, threads) if client is None else _connected(client) as there:
            folder.mkdir(parents=True, exist_ok=True)
            begun = True
            _collect(there, payload, run, folder, outcomes, progress)
    finally:
        if begun:
            if client is None:  # the workers are gone; those of a client may still be at work
                _tidy(folder, set(outcomes))
            for name, outcome in outcomes.items():
                if outcome.state == "open":  # a run that is stopped has not heard of everything
                    kept = _kept(outcome.pair, folder / name, wanted, None, run)
                    outcomes[name] = kept or outcome
            _write_tables(folder, list(outcomes.values()))
            with contextlib.suppress(OSError):
                (folder / _SCRATCH).rmdir()
    return list(outcomes.values())


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ImportError(
            'wanted dask.distributed for many pairs; get it by: pip install "reglib[scale]"'
        ) from error


def _pickled(payload: object) -> bytes:
    cloudpickle = importlib.import_module("cloudpickle")  # comes with dask
    try:
        content: bytes = cloudpickle.dumps(payload)
    except Exception as error:
        raise TypeError(f"method: wanted one that can be pickled, got {error}") from error
    return content


def _check_settings(pairs: Sequence[CohortPair], folder: Path, settings: dict[str, Any]) -> None:
    """Raise if there are results of other settings."""
    others = {}
    for pair in pairs:
        record = _record(folder / pair.name)
        if record is not None and record["settings"] != settings:
            others[pair.name] = _differences(record["settings"], settings)
    if others:
        name, apart = next(iter(others.items()))
        more = f" and {len(apart) - 3} more" if len(apart) > 3 else ""
        raise ValueError(
            f"{folder}: wanted the settings of the results that are there, got others for "
            f"{len(others)} of {len(pairs)} pairs, such as {name} ({', '.join(apart[:3])}{more}); "
            "another folder keeps both, force replaces the old ones"
        )


def _differences(old: object, new: object, path: str = "") -> list[str]:
    """Where two settings differ, as ``"method.0.steps: 50, now 60"``."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(enumerate(x)) for x in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old}, now {new}"]


@contextlib.contextmanager
def _local(workers: int | None, threads: int | None) -> Iterator[Any]:
    """A client of workers on this machine."""
    distributed, dask = _distributed(), importlib.import_module("dask")
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if threads is None:
        said = os.environ.get("OMP_NUM_THREADS", "")
        fair = max(1, cores // (workers or 1))
        threads = int(said) if said.isdecimal() and int(said) else min(4, fair)
    environment = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    # Workers draw from a thread, which the windows of a screen do not like.
    environment["MPLBACKEND"] = "agg"
    # What a worker that is killed has held of the system is freed; Python would complain of it.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    environment["PYTHONWARNINGS"] = ",".join(filter(None, [os.getenv("PYTHONWARNINGS"), quiet]))
    settings = {
        # Returning every freed block to the system, as dask does otherwise, makes some operations
        # on volumes several times slower, here too once a worker was started.
        "distributed.nanny.pre-spawn-environ": environment | {"MALLOC_TRIM_THRESHOLD_": None},
        # A worker that is killed takes the pairs that wait on it along: none shall.
        "distributed.scheduler.worker-saturation": 1.0,
    }
    with _environment(environment), dask.config.set(settings), contextlib.ExitStack() as stack:
        with _without_interrupts():
            cluster = distributed.LocalCluster(
                n_workers=workers or max(1, cores // threads),
                threads_per_worker=1,
                processes=True,
                # What a pair needs it needs: killing a worker for it would be no help.
                memory_limit=0,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(cluster)
            client = stack.enter_context(distributed.Client(cluster))
        yield client


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C comes afterwards, and never to the threads and processes that are started meanwhile.

    A terminal sends it to the workers as well, and they would die of it before their time. Those
    that are started later in place of others are children of the same threads.
    """
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    # Where it starts by itself, it lets the signal through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _connected(client: Any) -> Iterator[Any]:
    """A client of workers that somebody else has started."""
    if isinstance(client, str):
        with _distributed().Client(client) as own, _connected(own):
            yield own
        return
    if not client.nthreads():
        address = client.scheduler_info()["address"]
        warnings.warn(f"{address} has no workers yet; the pairs wait for some", stacklevel=1)
    yield client


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started meanwhile; whatever is set is undone."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        # Not only these: dask leaves some of its own.
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _collect(
    client: Any,
    payload: bytes,
    run: str,
    folder: Path,
    outcomes: dict[str, Outcome],
    progress: bool | None,
) -> None:
    """Hand out the pairs that are open, and take in what becomes of them."""
    distributed = _distributed()
    # A task of its own: sent once, and sent again if the worker that holds it dies.
    sent = client.submit(_same, payload, key=f"reglib-payload-{run}")

    def submit(name: str) -> Any:
        # One group by the first word, which the scheduler keeps back until a worker is free.
        key = (f"reglib-pair-{run}", name, attempts[name])
        return client.submit(_one, outcomes[name].pair, str(folder), sent, key=key)

    attempts = dict.fromkeys(outcomes, 1)
    futures = {submit(name): name for name in outcomes}
    finished = distributed.as_completed(list(futures), with_results=True, raise_errors=False)
    failed, written = 0, time.monotonic()
    try:
        # tqdm reads None as: silent unless on a terminal.
        with tqdm(
            total=len(futures), unit="pair", disable=None if progress is None else not progress
        ) as bar:
            for future, result in finished:
                name = futures.pop(future)
                future.release()
                if _was_beside(result, folder, name, run) and attempts[name] < _ATTEMPTS:
                    attempts[name] += 1
                    future = submit(name)
                    futures[future] = name
                    finished.add(future)
                    continue
                outcomes[name] = _outcome(result, outcomes[name].pair)
                bar.update()
                failed += outcomes[name].state == "failed"
                if failed:
                    bar.set_postfix(failed=failed, refresh=False)
                if time.monotonic() - written > _TABLES_EVERY:
                    _write_tables(folder, list(outcomes.values()))
                    written = time.monotonic()
    finally:
        if futures:
            client.cancel(list(futures))


def _same(payload: bytes) -> bytes:
    return payload


def _outcome(result: Any, pair: CohortPair) -> Outcome:
    """The outcome of a task, or of that which has kept it from having one."""
    if isinstance(result, Outcome):
        return result
    # An error as sys.exc_info has it; on its own where the scheduler has dropped the task.
    error = result[1] if isinstance(result, tuple) else result
    if _is_killed(result):
        # The message of dask speaks of tasks and dashboards.
        reason = "the process died every time that it came to this pair (out of memory?)"
    elif isinstance(error, Exception):
        reason = _reason(error)
    else:
        reason = f"the scheduler has dropped it ({error!r})"
    return Outcome(pair, "failed", reason=reason)


def _is_killed(result: Any) -> bool:
    killed = _distributed().KilledWorker
    return isinstance(result, tuple) and any(isinstance(part, killed) for part in result)


def _was_beside(result: Any, folder: Path, name: str, run: str) -> bool:
    """Whether a pair is blamed for deaths of workers on which it merely waited.

    The scheduler gives up every pair that was on them; the one that they died of has left a part
    each time.
    """
    parts = _leftovers(folder / _SCRATCH, name) if _is_killed(result) else []
    return _is_killed(result) and sum(part.name.startswith(run) for part in parts) < 2


# --- One pair, on a worker ------------------------------------------------------------------


def _one(pair: CohortPair, folder: str, payload: bytes) -> Outcome:
    """Do one pair, unless it is done. Does not raise."""
    import pickle

    with _one_at_a_time:
        place = Path(folder) / pair.name
        try:
            # Unpickled for every pair, so that none finds what another has left behind.
            return _make(pair, place, *pickle.loads(payload))
        except Exception as error:
            return Outcome(pair, "failed", reason=_reason(error))


def _make(
    pair: CohortPair, place: Path, work: Work, settings: dict[str, Any], force: bool, run: str
) -> Outcome:
    scratch = place.parent / _SCRATCH
    _put_back(scratch, place)
    inputs = {role: _sha256(path) for role, path in pair.files().items()}
    kept = _kept(pair, place, settings, inputs, run)
    if kept is not None:
        return kept
    record = _record(place)
    if record is not None and not force and _is_whole(place, record):
        # The settings are those wanted: the run has seen to that.
        changed = [r for r in _ROLES if record["inputs"].get(r) != inputs.get(r)]
        raise ValueError(
            f"{place}: made from other files ({', '.join(changed)}); another folder or another "
            "name keeps both, force replaces it"
        )
    _check_replaceable(place, record)
    token = f"{run}{secrets.token_hex(6)}"
    part, old = (scratch / f"{token}.{kind}.{pair.name}" for kind in ("new", "old"))
    try:
        part.mkdir(parents=True)
        marker = part / PAIR
        marker.touch()
        measures = _finite(work(pair, part))
        marker.unlink()  # which fails if somebody has swept the part away meanwhile
        wrote = {p.name: p.stat().st_size for p in sorted(part.iterdir())}
        content = {
            "run": run,
            "settings": settings,
            "inputs": inputs,
            "wrote": wrote,
            "measures": measures._asdict(),
        }
        write_bytes(marker, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        _take_place(part, place, old)
    except Exception as error:
        # A worker that was taken for dead, and another in its place, may do the same pair.
        kept = _kept(pair, place, settings, inputs, run)
        if kept is not None:
            return kept
        # The name of the part means nothing to the reader.
        raise RuntimeError(_reason(error).replace(str(part), str(place))) from error
    finally:
        _clear(scratch, pair.name)
    return Outcome(pair, "done", measures)


def _finite(measures: Measures) -> Measures:
    return Measures(*(x if x is not None and math.isfinite(x) else None for x in measures))


def _kept(
    pair: CohortPair,
    place: Path,
    settings: dict[str, Any],
    inputs: dict[str, str] | None,
    run: str,
) -> Outcome | None:
    """The outcome of an earlier attempt, if that is what is wanted; ``None`` asks for no inputs."""
    record = _record(place)
    if record is None or record["settings"] != settings or not _is_whole(place, record):
        return None
    if inputs is not None and record["inputs"] != inputs:
        return None
    # A worker may die with the news of what it has done.
    state = "done" if record.get("run") == run else "kept"
    return Outcome(pair, state, Measures(**record["measures"]))


def _record(place: Path) -> dict[str, Any] | None:
    """What a folder was made from; ``None`` if it does not say."""
    try:
        record = json.loads((place / PAIR).read_text(encoding="utf-8"))
        keys = {"settings": dict, "inputs": dict, "wrote": dict, "measures": dict}
        good = all(isinstance(record[key], kind) for key, kind in keys.items())
        good = good and set(record["measures"]) == set(Measures._fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if good else None


def _is_whole(place: Path, record: dict[str, Any]) -> bool:
    try:
        return all((place / name).stat().st_size == n for name, n in record["wrote"].items())
    except OSError:
        return False


def _check_replaceable(place: Path, record: dict[str, Any] | None) -> None:
    """Raise unless a folder holds nothing but what a run has written."""
    if not place.exists():
        return
    if not place.is_dir():
        raise ValueError(f"{place}: wanted a folder or a new name, got a file")
    ours = set() if record is None else {PAIR, *record["wrote"]}
    others = sorted({p.name for p in place.iterdir()} - ours)
    if others:
        raise ValueError(
            f"{place}: wanted nothing but the results of an earlier run, got "
            f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}; nothing was replaced"
        )


def _take_place(part: Path, place: Path, old: Path) -> None:
    """Give a folder its name; what had it goes aside first and comes back if that fails."""
    if place.exists():
        place.rename(old)
    try:
        part.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise


def _put_back(scratch: Path, place: Path) -> None:
    """Undo what a process that was killed in :func:`_take_place` has left."""
    for path in _leftovers(scratch, place.name):
        if path.name.split(".")[1] == "old" and not place.exists():
            path.rename(place)


def _clear(scratch: Path, name: str) -> None:
    for path in _leftovers(scratch, name):
        shutil.rmtree(path, ignore_errors=True)


def _tidy(folder: Path, names: set[str]) -> None:
    """What is left of these pairs goes away, or back to its place."""
    scratch = folder / _SCRATCH
    for name in {path.name.split(".", 2)[-1] for path in _entries(scratch)} & names:
        _put_back(scratch, folder / name)
        _clear(scratch, name)


def _leftovers(scratch: Path, name: str) -> list[Path]:
    """What this and earlier runs have left of a pair."""
    return [path for path in _entries(scratch) if path.name.split(".", 2)[-1] == name]


def _entries(folder: Path) -> list[Path]:
    """Of a folder that may go away at any time."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- Tables ---------------------------------------------------------------------------------


def _write_tables(folder: Path, outcomes: Sequence[Outcome]) -> None:
    rows: list[list[str]] = [["name", "state", *Measures._fields]]
    for outcome in outcomes:
        state = "done" if outcome.state == "kept" else outcome.state
        values = outcome.measures or [None] * len(Measures._fields)
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        rows.append([outcome.pair.name, state, *cells])
    _write_csv(folder / SUMMARY, rows)
    failed = [
        [outcome.pair.name, str(outcome.pair.moving), str(outcome.pair.fixed), outcome.reason]
        for outcome in outcomes
        if outcome.state == "failed"
    ]
    if failed:
        _write_csv(folder / FAILED, [["name", "moving", "fixed", "reason"], *failed])
    else:
        (folder / FAILED).unlink(missing_ok=True)


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes(path, text.getvalue().encode())
