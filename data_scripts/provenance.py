"""What every file in results/ says about where it came from."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from pathlib import Path

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


@functools.cache
def provenance() -> dict[str, object]:
    """Commit, hardware and versions of this run, as they were when it first asked."""
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "reglib", "data_scripts")),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_json(path: Path, content: object) -> None:
    """Write JSON through a temporary file, so that a stopped script leaves the old one whole."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
