"""No case is in two parts of a split, and the committed splits are those the script draws."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "data_scripts" / "make_splits.py"
spec = importlib.util.spec_from_file_location("make_splits", SCRIPT)
make_splits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_splits)
COMMITTED = json.loads(make_splits.SPLITS.read_text())


def test_parts_are_disjoint_and_of_the_stated_sizes() -> None:
    for name, sizes in make_splits.SIZES.items():
        parts = COMMITTED[name]
        assert {part: len(cases) for part, cases in parts.items()} == sizes
        everyone = [case for cases in parts.values() for case in cases]
        assert len(set(everyone)) == len(everyone)


def test_committed_splits_are_drawn_by_the_script() -> None:
    data = Path(os.environ.get("REGLIB_DATA", "no such folder"))
    for name, parts in COMMITTED.items():
        everyone = sorted(itertools.chain(*parts.values()), key=lambda case: (len(case), case))
        if (data / name).is_dir():
            assert make_splits.members(data, name) == everyone
        assert make_splits.draw(everyone, make_splits.SIZES[name]) == parts
