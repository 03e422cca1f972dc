"""Render the book from the notebooks that ``book/execute.py`` executed, and check that it exists.

The sources are assembled in ``build/book-src`` with the executed copies in place of the notebooks,
so that nothing is executed a second time. Sphinx runs with every warning as an error. The pages
go to ``build/html`` only when all of them were rendered; while no input changes, nothing is done.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from execute import BUILD, EXECUTED, ROOT, SITE, digest, files_below

SOURCE = BUILD / "book-src"
HTML = BUILD / "html"

# The badge that notebooks show on GitHub and Colab is on another server; pages use our drawing.
REMOTE_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LOCAL_BADGE = "../book/_static/colab.svg"

# In book/status.md; a plain `jupyter-book build` fills it from its own execution cache.
STATUS_TABLE = "```{nb-exec-table}\n```\n"
STATUS_PACKAGES = (
    "reglib", "torch", "torchvision", "numpy", "scipy", "nibabel", "matplotlib", "jupyter-book",
)  # fmt: skip


def toc_pages() -> list[str]:
    """Names of all pages in ``book/_toc.yml``, without suffix, relative to the root."""

    def walk(node: Any) -> list[str]:
        if isinstance(node, list):
            return [page for item in node for page in walk(item)]
        if isinstance(node, dict):
            own = [node[key] for key in ("root", "file") if key in node]
            return own + [page for item in node.values() for page in walk(item)]
        return []

    return walk(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")))


def commit() -> str:
    """Short name of the commit, marked when the working tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + (" with uncommitted changes" if changes.stdout else "")


def seconds_of(cell: dict[str, Any]) -> float:
    """Seconds that an executed code cell took."""
    times = cell["metadata"].get("execution", {})
    begin, end = times.get("iopub.execute_input"), times.get("shell.execute_reply")
    if begin is None or end is None:
        return 0.0
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def status_tables() -> str:
    """Markdown of the status page: seconds by notebook, then versions and machine."""
    lines = ["| notebook | seconds | cells | slowest cell | executed |", "|---|--:|--:|--:|---|"]
    total = 0.0
    for path in sorted(EXECUTED.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        times = [seconds_of(cell) for cell in cells if cell["cell_type"] == "code"]
        record = json.loads(path.with_suffix(".json").read_text())
        day = datetime.fromtimestamp(record["finished"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        total += record["seconds"]
        lines.append(
            f"| [](../notebooks/{path.name}) | {record['seconds']:.1f} | {len(times)} "
            f"| {max(times, default=0.0):.1f} s | {day} |"
        )
    lines += [f"| all | {total:.1f} | | | |", "", "| what | which |", "|---|---|"]
    lines += [f"| commit | {commit()} |", f"| Python | {platform.python_version()} |"]
    lines += [f"| {name} | {importlib.metadata.version(name)} |" for name in STATUS_PACKAGES]
    lines += [f"| machine | {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores |"]
    return "\n".join(lines) + "\n"


def assemble() -> None:
    """Fill ``build/book-src``: the book's files, the executed notebooks, execution switched off."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    # Not the drawings of an earlier plain build: Sphinx draws them anew.
    leave = shutil.ignore_patterns("__pycache__", "drawings")
    shutil.copytree(ROOT / "book", SOURCE / "book", ignore=leave)
    (SOURCE / "notebooks").mkdir()
    for path in sorted(EXECUTED.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8").replace(REMOTE_BADGE, LOCAL_BADGE)
        (SOURCE / "notebooks" / path.name).write_text(text, encoding="utf-8")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    (SOURCE / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    page = SOURCE / "book" / "status.md"
    text = page.read_text(encoding="utf-8")
    if text.count(STATUS_TABLE) != 1:
        sys.exit(f"book: book/status.md must hold this block once:\n{STATUS_TABLE}")
    page.write_text(text.replace(STATUS_TABLE, status_tables()), encoding="utf-8")


def render() -> None:
    """Run Jupyter Book on the assembled sources and publish its pages to ``build/html``."""
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", str(SOURCE)]
    command += ["--toc", str(SOURCE / "book" / "_toc.yml"), "-n", "-W", "--keep-going", "-q"]
    # Warnings come through; the closing words name a folder that the pages are about to leave.
    jupyter_book = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(SITE)}, stdout=subprocess.PIPE, text=True
    )
    if jupyter_book.returncode != 0:
        print(jupyter_book.stdout)
        sys.exit("book: rendering failed; warnings are treated as errors")
    made = SOURCE / "_build" / "html"
    # Jupyter Book has been seen to exit 0 without a page, so its word is not taken for it.
    missing = [page for page in toc_pages() if not (made / f"{page}.html").is_file()]
    if missing:
        sys.exit(f"book: no page was made for {', '.join(missing)}")
    shutil.rmtree(HTML, ignore_errors=True)
    os.replace(made, HTML)


def main() -> None:
    """Render when an input has changed, then say where the book is."""
    inputs = [
        *files_below(ROOT / "book"),
        *files_below(ROOT / "reglib"),
        *sorted(EXECUTED.glob("*")),
        ROOT / "_config.yml",
    ]
    state = digest(inputs, sys.version, commit())
    stamp = BUILD / "html.digest"
    if HTML.is_dir() and stamp.is_file() and stamp.read_text() == state:
        print("book: unchanged")
    else:
        print("book: rendering ...", flush=True)
        start = time.perf_counter()
        assemble()
        render()
        stamp.write_text(state)
        print(f"book: {len(toc_pages())} pages in {time.perf_counter() - start:.1f} s")
    print(f"book: open {HTML / 'index.html'} in a browser, or run: make serve")


if __name__ == "__main__":
    main()
