"""Seconds of one random pair, beside the samplings that it needs anyway and a plain way to make it.

    python data_scripts/synth_speed.py                      # writes results/synth_speed.json
    python data_scripts/synth_speed.py --shape 40 48 56     # a trial: nothing is written

One process with torch's default threads, 160 x 192 x 224 voxels, all in turn, medians. As a job of
``make gpu`` (``--settings FILE --out FOLDER``) it measures the GPU, and writes into that folder;
``--add FILE`` puts what came back into results/.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import synth_baseline
import torch
from timing import DeviceRun, in_turn, peak_memory, rounded

from reglib.geometry.grid import sample
from reglib.geometry.sampling import transform_grid, warp, warp_labels
from reglib.synth import random_pair

SHAPE = (160, 192, 224)
NAME = "synth_speed.json"
HEAD: dict[str, Any] = {
    "script": "data_scripts/synth_speed.py",
    "protocol": {
        "pair": "reglib.synth.random_pair with its default settings, batch 1, median seconds",
        "samplings": "reglib.geometry.grid.sample of whole images at given coordinates: two linear "
        "(images) and two nearest (labels, as float32)",
        "warps": "the same through reglib.geometry.sampling: two warp and two warp_labels",
        "baseline": "data_scripts/synth_baseline.py: noise in NumPy at every voxel, integration at "
        "full resolution, the same samplings; the field between the images is not computed",
        "cell": "32 voxels, or a fifth of the shortest axis if that is less",
    },
}


def measure(shape: Sequence[int], device: str, repeats: int, baselines: int) -> dict[str, Any]:
    """Median seconds, and their ratios to those of a pair."""
    cell = min(32.0, min(shape) / 5)
    generator = torch.Generator(device).manual_seed(0)
    make = functools.partial(random_pair, shape, cell=cell, generator=generator)
    pair = make()
    coords = transform_grid(pair.field)
    numbers = pair.moving_labels.to(pair.moving)

    def samplings() -> None:
        for _ in range(2):
            sample(pair.moving, coords)
            sample(numbers, coords, mode="nearest")

    def warps() -> None:
        for _ in range(2):
            warp(pair.moving, pair.field)
            warp_labels(pair.moving_labels, pair.field)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = in_turn({"pair": make, "samplings": samplings, "warps": warps}, repeats, device)
    memory = peak_memory(device)
    if baselines:
        rng = np.random.default_rng(0)
        plain = functools.partial(synth_baseline.random_pair, shape, rng, cell=cell)
        begin = time.perf_counter()
        for _ in range(baselines):
            plain()
        found["baseline"] = (time.perf_counter() - begin) / baselines
    return {
        "shape": list(shape),
        "repeats": repeats,
        "baseline_repeats": baselines,
        "median_seconds": {name: rounded(value) for name, value in found.items()},
        "pair_over_samplings": rounded(found["pair"] / found["samplings"]),
        "pair_over_warps": rounded(found["pair"] / found["warps"]),
        **({"baseline_over_pair": rounded(found["baseline"] / found["pair"])} if baselines else {}),
        "peak_memory": memory,
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, help="a trial at this shape")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--baselines", type=int, default=1, help="runs of the plain way")
    record = DeviceRun(parser, NAME, HEAD)
    options = record.options
    shape, repeats, baselines = options.shape, options.repeats, options.baselines
    if record.job is not None:
        shape, repeats, baselines = record.job.get("shape"), record.job["repeats"], 0
    found = measure(tuple(shape or SHAPE), record.device, repeats, baselines)
    print(json.dumps(found, indent=1), flush=True)
    if options.shape is None:
        record.write(**found)


if __name__ == "__main__":
    main()
