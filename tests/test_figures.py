"""The book's drawings: each one that a page shows is drawn, and the pages name real tests."""

import importlib.util
import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("*.md"))


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "book" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_every_drawing_and_no_other(figures):
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = re.findall(r"\{figure\} drawings/(\w+)\.svg", text)
    assert sorted(shown) == sorted(draw.__name__ for draw in figures.DRAWINGS)
    # Whoever cannot see a drawing reads its description.
    assert len(re.findall(r"drawings/\w+\.svg\n:alt: \S", text)) == len(shown)


def test_drawings_are_the_same_bytes_each_time(figures, tmp_path):
    settings = dict(mpl.rcParams)
    once, again = (figures.draw_all(tmp_path / name) for name in ("once", "again"))
    assert dict(mpl.rcParams) == settings
    assert [file.name for file in once] == [f"{draw.__name__}.svg" for draw in figures.DRAWINGS]
    for first, second in zip(once, again, strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert b"<svg" in first.read_bytes()[:1000]


def test_conventions_page_has_every_rule_and_names_its_test():
    page = (ROOT / "book" / "conventions.md").read_text(encoding="utf-8")
    rules = re.split(r"^## (\d+)\. ", page, flags=re.MULTILINE)[1:]
    assert [int(number) for number in rules[::2]] == list(range(1, 16))
    named = {
        number: re.findall(
            r"^Test: `pytest tests/test_conventions\.py -k rule_(\d+)_`$", text, re.MULTILINE
        )
        for number, text in zip(rules[::2], rules[1::2], strict=True)
    }
    tests = (ROOT / "tests" / "test_conventions.py").read_text(encoding="utf-8")
    defined = set(re.findall(r"^def test_rule_(\d+)_", tests, flags=re.MULTILINE))
    assert defined <= set(named)
    for number, found in named.items():
        assert found == ([number] if number in defined else [])


def test_references_are_complete_and_cited_keys_exist():
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf-8").split("\n@")
    keys = set()
    for entry in entries:
        key = re.match(r"@?\w+\{(\w+),", entry).group(1)
        keys.add(key)
        for field in ("author", "title", "year"):
            assert re.search(rf"\b{field} = \{{", entry), f"{key} lacks {field}"
    assert len(keys) == len(entries)
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    cited = {key for group in re.findall(r"\{cite\}`([^`]+)`", text) for key in group.split(",")}
    assert cited <= keys
