"""Run the next pending job of ``data_scripts/gpu_jobs`` (started by ``make gpu``).

A job is a JSON file; its name orders the queue. See ``gpu_jobs/README.md`` for the format. Only the
standard library is imported here: the job's own script decides what it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BadJob(Exception):
    """A job file that cannot be run."""


@dataclass(frozen=True)
class Job:
    """One file of the queue."""

    name: str
    script: Path
    settings: dict[str, Any]
    results: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job and check everything that can be checked before hours are spent."""
        entries = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(entries) - {"script", "settings", "results", "about"}
        if unknown:
            raise BadJob(f"{path}: unknown entries {sorted(unknown)}")
        script = Path(entries.get("script", ""))
        if not script.is_file():
            raise BadJob(f"{path}: script: there is no file {script}")
        settings = entries.get("settings", {})
        if not isinstance(settings, dict):
            raise BadJob(f"{path}: settings: wanted an object, got {settings!r}")
        return cls(path.stem, script, settings, tuple(map(Path, entries.get("results", ()))))

    def is_done(self, folders: list[Path]) -> bool:
        """Whether its results are in the repository, or a folder holds its mark of completion."""
        if self.results and all(path.is_file() for path in self.results):
            return True
        return any(_settings_in(folder / "done.json") == self.settings for folder in folders)


def _settings_in(record: Path) -> dict[str, Any] | None:
    if not record.is_file():
        return None
    settings: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["settings"]
    return settings


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)


def prepare(job: Job, folder: Path, earlier: Path) -> None:
    """Make the job's folder, with what an earlier attempt with the same settings left."""
    if folder != earlier and not folder.exists() and earlier.is_dir():
        shutil.copytree(earlier, folder)
    if folder.exists() and _settings_in(folder / "job.json") != job.settings:
        # A checkpoint of other settings must not be mistaken for one of these.
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "job.json", {"settings": job.settings})


def run(job: Job, folder: Path) -> int:
    """Run the job's script as a process of its own and mark it done when it exits with 0."""
    settings = folder / "settings.json"
    _write(settings, job.settings)
    command = [sys.executable, str(job.script), "--settings", str(settings), "--out", str(folder)]
    print(f"{job.name}: running {job.script}, output in {folder}", flush=True)
    # The scripts import reglib; on a borrowed machine it need not be installed.
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    seconds = time.perf_counter() - start
    if code != 0:
        print(
            f"{job.name}: stopped with exit code {code} after {seconds:.1f} s; "
            "the next call resumes it",
            file=sys.stderr,
        )
        return 1
    _write(folder / "done.json", {"settings": job.settings, "seconds": seconds})
    print(f"{job.name}: done in {seconds:.1f} s", flush=True)
    return 0


def main() -> int:
    """Run one job; 0 when it or the whole queue is done, 1 when it failed, 2 when it is bad."""
    parser = argparse.ArgumentParser(description="Run the next pending GPU job.")
    parser.add_argument("--jobs", type=Path, default=Path("data_scripts/gpu_jobs"))
    arguments = parser.parse_args()
    local, out = Path("gpu_out"), Path(os.environ.get("OUT") or "gpu_out")
    try:
        for path in sorted(arguments.jobs.glob("*.json")):
            job = Job.read(path)
            if not job.is_done([local / job.name, out / job.name]):
                prepare(job, out / job.name, local / job.name)
                return run(job, out / job.name)
    except BadJob as error:
        print(f"gpu_queue: {error}", file=sys.stderr)
        return 2
    print("no pending job")
    return 0


if __name__ == "__main__":
    sys.exit(main())
