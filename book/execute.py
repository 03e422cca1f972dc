"""Execute every notebook once per change: in an empty folder, against the built wheel.

Each notebook is copied to ``build/notebooks/NN_topic/`` and run there by nbmake (in the pytest of
``notebook_pytest.py``), with the wheel unpacked in ``build/site`` first on the path. That is what a
reader on Colab gets: no file beside the notebook and no source tree. A copy that ran to its end
moves to ``build/executed/``, with a record of its seconds and of a hash of everything it was made
from; while the hash stays the same the notebook is not run again, neither for the tests nor for the
book.

Two run side by side, each on half of the cores: most of what a page computes is too small to keep
two cores busy. ``NOTEBOOK_JOBS=1`` runs one after the other on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "book" / "notebook_pytest.py"
BUILD = ROOT / "build"
SITE = BUILD / "site"
EXECUTED = BUILD / "executed"

# Runs in every kernel as it starts. One that hangs says where, whoever holds its lock.
DUMP_STACKS = """
import faulthandler, os
_stacks = open(os.environ["NOTEBOOK_STACKS"], "w")
faulthandler.dump_traceback_later(float(os.environ["NOTEBOOK_DUMP"]), file=_stacks)
del faulthandler, os
"""

# Runs in the kernel after the notebook's first code cell; it leaves no trace in the copy.
ASSERT_WHEEL = """
import pathlib as _p, reglib as _r
assert _p.Path(_r.__file__).is_relative_to({site!r}), "not the built wheel: " + _r.__file__
del _p, _r
"""


def files_below(folder: Path) -> list[Path]:
    """Every file of a folder that is not a by-product, in a fixed order."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def digest(paths: list[Path], *words: str) -> str:
    """Hash the names and contents of files, and a few words beside them."""
    state = hashlib.sha256()
    for path in paths:
        state.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        state.update(path.read_bytes())
    for word in words:
        state.update(f"\0{word}".encode())
    return state.hexdigest()


def library_digest() -> str:
    """Hash of what a notebook runs on: the library, the pinned versions, the Python."""
    return digest(
        [
            *files_below(ROOT / "reglib"),
            *files_below(ROOT / "results"),
            ROOT / "pyproject.toml",
            ROOT / "constraints.txt",
            ROOT / "book" / "execute.py",
            RUNNER,
        ],
        sys.version,
    )


def build_wheel(library: str) -> None:
    """Build the wheel and unpack it into ``build/site``, unless the one there is of this state."""
    stamp = SITE / ".digest"
    if stamp.is_file() and stamp.read_text() == library:
        return
    print("building the wheel", flush=True)
    wheels = BUILD / "wheel"
    for folder in (wheels, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    local = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", str(ROOT), *local, "--no-build-isolation", "--wheel-dir", str(wheels)],
        check=True,
    )
    [wheel] = wheels.glob("reglib-*.whl")
    subprocess.run([*pip, "install", *local, "--target", str(SITE), str(wheel)], check=True)
    stamp.write_text(library)


def kernel_environment(threads: int, stacks: Path, dump: float) -> dict[str, str]:
    """The environment of a notebook: the wheel first, no settings of the person who runs make.

    After ``dump`` seconds its kernel writes the stacks of its threads to the file ``stacks``.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        # The kernel chooses its own plotting backend, and a user's IPython start-up stays out.
        if name not in ("MPLBACKEND", "PYTHONPATH")
    }
    environment["PYTHONPATH"] = str(SITE)
    environment["IPYTHONDIR"] = str(BUILD / "ipython")
    environment |= {"NOTEBOOK_STACKS": str(stacks), "NOTEBOOK_DUMP": str(dump)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    # Threads that wait give their core away: on a busy machine, spinning ones take minutes.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def first_code_cell(notebook: dict[str, Any]) -> dict[str, Any]:
    """The set-up cell."""
    return next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")


class Kernels:
    """The processes that run notebooks now, which end with this one."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.ended = threading.Lock(), False

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """A process in a group of its own.

        Raises:
            KeyboardInterrupt: if all have been ended.
        """
        with self.lock:
            if self.ended:
                raise KeyboardInterrupt
            process = subprocess.Popen(command, text=True, start_new_session=True, **options)
            self.running.add(process)
        return process

    def wait(self, process: subprocess.Popen[str], timeout: float) -> tuple[str, bool]:
        """What a process printed, and whether it had to be stopped."""
        try:
            output, late = process.communicate(timeout=timeout)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, late = "", True
            with contextlib.suppress(subprocess.TimeoutExpired):  # somebody else holds the pipe
                output = process.communicate(timeout=10)[0]
        with self.lock:
            self.running.discard(process)
        return output, late

    def end(self) -> None:
        """Stop all, and start no more."""
        with self.lock:
            self.ended = True
            for process in self.running:
                os.killpg(process.pid, signal.SIGKILL)


def execute(
    source: Path, timeout: float, threads: int, kernels: Kernels
) -> tuple[float, str | None]:
    """Run one notebook; return its seconds and, where it failed, what it printed."""
    folder = BUILD / "notebooks" / source.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy = folder / source.name
    notebook = json.loads(source.read_text(encoding="utf-8"))
    nbmake = first_code_cell(notebook)["metadata"].setdefault("nbmake", {})
    nbmake.setdefault("post_cell_execute", []).append(ASSERT_WHEEL.format(site=str(SITE)))
    copy.write_text(json.dumps(notebook), encoding="utf-8")

    command = [sys.executable, "-P", str(RUNNER), "-q", "--color=no", "-p", "no:cacheprovider"]
    # The settings of our own suite do not apply to a notebook.
    command += ["-c", os.devnull, "--rootdir", str(folder)]
    # Before it is stopped, both sides say where they are; they start later than the clock.
    dump, stacks = max(timeout - 60, timeout / 2), folder.with_suffix(".stacks")
    command += ["-o", f"faulthandler_timeout={dump}"]
    stacks.unlink(missing_ok=True)
    command += ["--nbmake", "--overwrite", "--nbmake-kernel=python3"]
    command += [f"--nbmake-timeout={int(timeout)}", str(copy)]
    start = time.perf_counter()
    process = kernels.start(
        command,
        cwd=folder,
        env=kernel_environment(threads, stacks, dump),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, late = kernels.wait(process, timeout)
    failure = None if process.returncode == 0 else output
    if late:
        kernel = (stacks.read_text() if stacks.is_file() else "") or "it had hardly begun"
        failure = f"stopped: it took longer than {timeout:.0f} s (make NOTEBOOK_TIMEOUT=...)\n"
        failure += f"its kernel after {dump:.0f} s:\n{kernel}\n"
        failure += f"the side that waits for it:\n{output}"
    stacks.unlink(missing_ok=True)
    seconds = time.perf_counter() - start

    if failure is None:
        executed = json.loads(copy.read_text(encoding="utf-8"))
        metadata = first_code_cell(executed)["metadata"]
        metadata["nbmake"]["post_cell_execute"].pop()
        if metadata["nbmake"] == {"post_cell_execute": []}:
            del metadata["nbmake"]
        copy.write_text(json.dumps(executed), encoding="utf-8")
    return seconds, failure


def publish(copy: Path, record: dict[str, Any]) -> None:
    """Move an executed copy to ``build/executed``; its record, written last, makes it valid."""
    EXECUTED.mkdir(parents=True, exist_ok=True)
    os.replace(copy, EXECUTED / copy.name)
    part = EXECUTED / f"{copy.stem}.part"
    part.write_text(json.dumps(record, indent=1))
    os.replace(part, EXECUTED / f"{copy.stem}.json")


def main() -> int:
    """Execute what has changed, print one line per notebook, and exit 1 if any failed."""
    timeout = float(os.environ.get("NOTEBOOK_TIMEOUT", "600"))
    cores = os.cpu_count() or 1
    jobs = max(int(os.environ.get("NOTEBOOK_JOBS", min(cores, 2))), 1)
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not sources:
        print("notebooks/ holds no notebook", file=sys.stderr)
        return 1
    library = library_digest()
    build_wheel(library)
    startup = BUILD / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "stacks.py").write_text(DUMP_STACKS)
    width = max(len(source.stem) for source in sources)
    names = {
        source: f"[{number}/{len(sources)}] {source.stem:<{width}}"
        for number, source in enumerate(sources, 1)
    }
    todo: dict[Path, float] = {}
    states = {source: digest([source], library) for source in sources}
    for source in sources:
        record_file = EXECUTED / f"{source.stem}.json"
        record = json.loads(record_file.read_text()) if record_file.is_file() else {}
        if record.get("digest") == states[source]:
            print(f"{names[source]}  unchanged ({record['seconds']:.1f} s when executed)")
        else:
            record_file.unlink(missing_ok=True)
            todo[source] = record.get("seconds", 0.0)

    kernels, failed = Kernels(), []
    start = time.perf_counter()

    def run(source: Path) -> tuple[float, str | None]:
        last = f", last time {todo[source]:.0f} s" if todo[source] else ""
        print(f"{names[source]}  executing{last} ...", flush=True)
        return execute(source, timeout, max(cores // jobs, 1), kernels)

    # The longest first: by the seconds of last time, or else by its text.
    order = sorted(todo, key=lambda source: (-todo[source], -source.stat().st_size))
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[tuple[float, str | None]], Path] = {
            pool.submit(run, source): source for source in order
        }
        try:
            for future in as_completed(futures):
                source, (seconds, failure) = futures[future], future.result()
                if failure is None:
                    copy = BUILD / "notebooks" / source.stem / source.name
                    record = {"digest": states[source], "seconds": seconds}
                    publish(copy, record | {"finished": time.time()})
                    print(f"{names[source]}  passed  {seconds:6.1f} s", flush=True)
                else:
                    failed.append(source.stem)
                    print(f"{names[source]}  FAILED  {seconds:6.1f} s\n{failure}", flush=True)
        except KeyboardInterrupt:
            kernels.end()
            raise
    total = time.perf_counter() - start
    print(
        f"notebooks: {len(todo)} executed in {total:.1f} s, {len(sources) - len(todo)} unchanged",
        flush=True,
    )
    if failed:
        print(f"notebooks: failed: {', '.join(sorted(failed))}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
