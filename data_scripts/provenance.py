"""What every file in results/ says about where it came from."""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from reglib.data.files import write_bytes

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> str:
    """Output of a git command in the repository."""
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code() -> tuple[str, bool]:
    """The commit, and whether anything that computes differs from it.

    A machine without the repository's history is told by ``REGLIB_COMMIT``: what
    ``git describe --always --abbrev=40 --dirty=+`` says where the history is.
    """
    told = os.environ.get("REGLIB_COMMIT")
    if told:
        return told.removesuffix("+"), told.endswith("+")
    changes = git("status", "--porcelain", "--", "reglib", "data_scripts")
    return git("rev-parse", "HEAD"), bool(changes)


@functools.cache
def provenance() -> dict[str, object]:
    """Commit, hardware and versions of this run, as they were when it first asked."""
    commit, changed = code()
    return {
        "commit": commit,
        "uncommitted_changes": changed,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def committed_or_stop() -> None:
    """Stop unless what computes is committed."""
    if provenance()["uncommitted_changes"]:
        raise SystemExit("commit reglib/ and data_scripts/ first: results name a commit")


def write_json(path: Path, content: object) -> None:
    """Write JSON through a temporary file, so that a stopped script leaves the old one whole."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as one compressed file, whole or not at all; makes its folder."""
    memory = io.BytesIO()
    np.savez_compressed(memory, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, memory.getvalue())
