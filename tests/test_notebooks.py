"""Hygiene of the notebooks as they stand in git; `make notebooks` executes them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from reglib import INSTALL_SOURCE, REPOSITORY

ROOT = Path(__file__).resolve().parents[1]
# What a page may install beside the library: a program that opens what the page has written.
EXTRA = {"SimpleITK"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY_NAME = REPOSITORY.removeprefix("https://github.com/")

# Anatomy of a page; each word begins a heading, in this order.
SECTIONS = [
    "See it",
    "Say it",
    "Check it by hand",
    "Build it",
    "Trust it",
    "Run it",
    "Break it",
    "Exercises",
    "What we learned",
    "Next steps",
]


def sources(path: Path, kind: str) -> list[str]:
    """Texts of the cells of one kind."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def prose(path: Path) -> str:
    """All Markdown of a notebook, without what stands in code fences and backticks."""
    text = "\n\n".join(sources(path, "markdown"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


def python_of(cell: str) -> str:
    """A code cell with IPython's magics replaced, so that it parses."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.MULTILINE)


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a notebook imports."""
    found = set()
    for cell in sources(path, "code"):
        for node in ast.walk(ast.parse(python_of(cell))):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "a notebook has no package to import from relatively"
                found.add((node.module or "").split(".")[0])
    return found


def headings(path: Path, level: int) -> list[str]:
    """Headings of one level, without leading numbers."""
    found = re.findall(rf"^{'#' * level} (.+)$", prose(path), flags=re.MULTILINE)
    return [re.sub(r"^[\d.]+\s*", "", text) for text in found]


def test_the_folder_is_flat_and_holds_notebooks_only():
    assert NOTEBOOKS
    others = [p.name for p in (ROOT / "notebooks").iterdir() if p not in NOTEBOOKS]
    assert [name for name in others if name != ".ipynb_checkpoints"] == []


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_name_has_two_digits_and_a_topic(path):
    assert re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem)


def test_no_outputs_and_complete_metadata(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["language_info"]["name"] == "python"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"], "saved widget state is an output"
    for cell in notebook["cells"]:
        assert cell.get("id"), "format 4.5 wants an id in each cell"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert "execution" not in cell["metadata"], "timings of a run"
    assert path.stat().st_size < 200_000


def test_colab_badge_points_to_the_notebook_itself(path):
    links = re.findall(r"\(\s*(https://colab\.research\.google\.com/github/[^)\s]+)\)", prose(path))
    target = f"{REPOSITORY_NAME}/blob/main/notebooks/{path.name}"
    assert links == [f"https://colab.research.google.com/github/{target}"]


def test_set_up_cell_installs_from_the_one_source(path):
    first, *rest = sources(path, "code")
    assert "import reglib" in first
    installs = re.findall(r"^\s*[%!]pip install (.+)$", first, flags=re.MULTILINE)
    assert len(installs) == 1
    assert f'"{INSTALL_SOURCE}"' in installs[0]
    pips = [m for cell in rest for m in re.findall(r"^\s*[%!]pip (.+)$", cell, re.MULTILINE)]
    assert {pip.removeprefix("install -q ") for pip in pips} <= EXTRA


def test_set_up_cells_are_the_same_everywhere():
    assert len({sources(path, "code")[0] for path in NOTEBOOKS}) == 1


def test_links_to_the_repository_use_its_address(path):
    for link in re.findall(r"https://github\.com/[\w.-]+/reglib[^)\s\"']*", prose(path)):
        assert link.startswith(REPOSITORY)
    for link in re.findall(rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([^)#\s]+)", prose(path)):
        assert (ROOT / link).exists(), f"{link} is not in the repository"


def test_no_relative_paths(path):
    links = re.findall(r"\]\(([^)\s]+)", prose(path)) + re.findall(
        r"(?:src|href)=[\"']([^\"']+)", prose(path)
    )
    # On Colab and in an empty folder nothing lies beside the notebook.
    assert [link for link in links if not link.startswith(("https://", "#", "attachment:"))] == []
    for cell in sources(path, "code"):
        assert not re.search(r"[\"'](?:\.\.?/|/(?:home|root|content|tmp|work)/)", cell)


def test_anchors_inside_the_page_exist(path):
    known = {
        re.sub(r"[^\w\s-]", "", text.lower()).strip().replace(" ", "-")
        for level in (1, 2, 3, 4)
        for text in headings(path, level)
    } | set(re.findall(r"<a (?:id|name)=[\"']([^\"']+)", prose(path)))
    for anchor in re.findall(r"\]\(#([^)\s]+)\)", prose(path)):
        assert anchor in known


def test_no_placeholder_is_left(path):
    text = "\n".join(sources(path, "markdown") + sources(path, "code"))
    assert not re.search(
        r"\b(?:YOUR|OWNER|USER|REPO|PATH|NAME|INSERT|REPLACE)_[A-Z]{3,}\b|\bTBD\b|lorem ipsum", text
    )


def test_plain_markdown_only(path):
    text = "\n\n".join(sources(path, "markdown"))
    assert not re.search(r"^\s*(?:`{3,}|:{3,})\{", text, flags=re.MULTILINE), "MyST directive"
    assert not re.search(r"\{[a-z:-]+\}`", text), "MyST role"
    assert not re.search(r"^\s*\([\w-]+\)=\s*$", text, flags=re.MULTILINE), "MyST target"
    assert text.count("<details") == text.count("</details>")
    assert text.count("$$") % 2 == 0


def test_imports_are_packages_that_the_wheel_brings(path):
    import sys

    allowed = {"reglib", "torch", "numpy", "scipy", "matplotlib", "nibabel", "tqdm", "safetensors"}
    allowed |= {"IPython", "ipywidgets", "torchvision"} | EXTRA
    assert imported_packages(path) - allowed - set(sys.stdlib_module_names) == set()


def test_page_anatomy(path):
    assert len(headings(path, 1)) == 1
    second = headings(path, 2)
    found = [next((s for s in SECTIONS if h.startswith(s)), None) for h in second]
    assert [section for section in found if section] == SECTIONS
    text = prose(path)
    assert re.search(r"By the end you can", text)
    verbs = re.findall(r"^(?:[-*]|\d\.) ", text.split("By the end you can", 1)[1], re.MULTILINE)
    assert len(verbs) >= 3, "three verbs: what the reader can do afterwards"


def test_exercises_have_folded_solutions(path):
    text = "\n".join(sources(path, "markdown"))
    tags = [
        tag
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for tag in cell["metadata"].get("tags", [])
    ]
    folded = text.count("<details") + tags.count("hide-input") + tags.count("hide-cell")
    assert folded >= 2


def test_built_mechanism_is_short_and_visible(path):
    """Plotting may be folded away; the cells under *Build it* may not."""
    section = None
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^## (?:[\d.]+\s*)?(.+)$", text, flags=re.MULTILINE):
                section = heading
        elif section and section.startswith("Build it"):
            assert not {"hide-input", "hide-cell", "remove-input"} & set(
                cell["metadata"].get("tags", [])
            )
