"""Seconds and memory of training steps, forward passes and registrations, for the cost model.

    python data_scripts/step_times.py                           # writes results/step_times.json
    python data_scripts/step_times.py --sizes cpu --shape 32 48 32 --steps 1    # a trial

Networks, losses and optimisers are those of pretraining.py, sizes those of pretraining.json; every
row is measured in a process of its own, on random pairs that were made before. As a job of
``make gpu`` (``--settings FILE --out FOLDER``) it measures the GPU, with and without bfloat16, and
writes into that folder; ``--add FILE`` puts what came back into results/. Rows are written as they
come, and a job that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pretraining
import torch
from nothing import Nothing
from timing import DeviceRun, alone, in_turn, peak_memory, rounded
from torch import nn

from reglib.synth import RandomPair, random_pair
from reglib.training import fit

NAME = "step_times.json"
#: IXI at 2 mm, of which sizes without a shape of their own are made by averaging.
BRAIN = (80, 96, 80)
STEPS = ("pretraining", "whole network", "fine-tuning")
#: Pairs of the cohort that is timed.
COHORT = 4
#: Shapes of registrations, for voxels of 2 and 1 mm.
REGISTRATIONS = {2: BRAIN, 1: (160, 192, 224)}
HEAD: dict[str, Any] = {
    "script": "data_scripts/step_times.py",
    "protocol": {
        "steps": "reglib.training.fit on random pairs made before; median seconds of the steps "
        "after the first, which warms up; batch as in the settings",
        "pretraining": "encoder with light decoders, consistent KL, AdamW",
        "whole network": "the same pairs, local correlation and diffusion, AdamW",
        "fine-tuning": "one pair a step, local correlation and diffusion, Adam (AMSGrad)",
        "forward": "the whole network in evaluation mode, one pair",
        "random pair": "reglib.synth.random_pair, which every pretraining step needs as well",
        "registration": "reglib.registration.register, Affine and Velocity with default settings, "
        "on a random pair; voxels of 1 mm, or of 2 mm on half the grid",
        "cohort": "what register_cohort adds to a pair (handing out, reading, hashing, measuring, "
        "writing), one worker with one thread: pairs with a method that does nothing",
        "peak_memory": "bytes: allocated on the GPU, or all that the process ever held",
    },
}


@dataclass(frozen=True)
class Task:
    """A row to measure."""

    kind: str
    shape: tuple[int, ...]
    size: str = ""
    precision: str = "float32"


def shape_of(name: str) -> tuple[int, ...]:
    """The voxels of a size."""
    size = pretraining.SIZES[name]
    return tuple(size.get("shape", [n // size["pooled"] for n in BRAIN]))


def tasks(
    parts: list[str],
    sizes: list[str],
    device: str,
    shape: tuple[int, ...] | None,
    voxels: Sequence[int] = (2, 1),
) -> Iterator[Task]:
    """Every row, the short ones first; at one shape for all, if that is given."""
    precisions = ["float32", "bfloat16"] if device == "cuda" else ["float32"]
    if "steps" in parts:
        for name in sizes:
            yield Task("random pair", shape or shape_of(name), name)
            for kind, precision in itertools.product(("forward", *STEPS), precisions):
                yield Task(kind, shape or shape_of(name), name, precision)
    for kind in ("cohort", "registration"):
        if kind in parts:
            for mm in voxels:
                yield Task(kind, shape or REGISTRATIONS[mm])


def _pair(shape: tuple[int, ...], batch: int, device: str) -> RandomPair:
    generator = torch.Generator(device).manual_seed(0)
    return random_pair(shape, batch=batch, cell=min(shape) / 5, generator=generator)


def _step(task: Task, device: str, steps: int) -> dict[str, Any]:
    """A training step."""
    size = pretraining.SIZES[task.size]
    network: nn.Module
    objective: Callable[..., Any]
    if task.kind == "fine-tuning":
        batch = 1
        network = pretraining.new_network(size, 0)
        objective = pretraining.finetuning_objective(size)
        optimiser: Callable[..., Any] = functools.partial(torch.optim.Adam, amsgrad=True)
    else:
        batch = size["pretrain"]["batch"]
        variant = "kl" if task.kind == "pretraining" else "whole"
        run = pretraining.Run("pretrain", variant, 0)
        network, objective = pretraining.pretraining_network(size, run)
        optimiser = torch.optim.AdamW
    pair = _pair(task.shape, batch, device)
    images = (pair.moving, pair.fixed, pair.moving_labels, pair.fixed_labels)
    history = fit(
        network.to(device),
        itertools.repeat(images),
        objective,
        steps=1 + steps,
        lr=1e-4,
        optimiser=optimiser,
        precision=task.precision,
        progress=False,
    )
    ends = history["seconds"]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends))
    return {"seconds": seconds, "batch": batch, "parameters": _count(network)}


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _forward(task: Task, device: str, steps: int) -> dict[str, Any]:
    network = pretraining.new_network(pretraining.SIZES[task.size], 0).to(device).eval()
    pair = _pair(task.shape, 1, device)
    half = task.precision == "bfloat16"
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        found = in_turn({"it": lambda: network(pair.moving, pair.fixed)}, steps, device)
    return {"seconds": found["it"], "batch": 1, "parameters": _count(network)}


def _random_pair(task: Task, device: str, steps: int) -> dict[str, Any]:
    found = in_turn({"it": lambda: _pair(task.shape, 1, device)}, steps, device)
    return {"seconds": found["it"], "batch": 1}


def _voxel(shape: tuple[int, ...]) -> float:
    """The voxel's side in mm: half the shape, twice the voxel."""
    return 2.0 if math.prod(shape) < 4 * math.prod(BRAIN) else 1.0


def _affine(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.diag(torch.tensor([_voxel(shape)] * 3 + [1.0], dtype=torch.float64))


def _registration(task: Task, device: str, steps: int) -> dict[str, Any]:
    # Not at the top: it needs more than a borrowed GPU machine may have.
    from reglib.methods.classical import Affine, Velocity
    from reglib.registration import register

    pair, affine = _pair(task.shape, 1, device), _affine(task.shape)
    found = register(
        pair.moving,
        pair.fixed,
        [Affine(), Velocity()],
        moving_affine=affine,
        fixed_affine=affine,
        progress=False,
    )
    return {"seconds": found.seconds, "method": "affine + velocity", "mm": _voxel(task.shape)}


def _cohort(task: Task, device: str, steps: int) -> dict[str, Any]:
    import distributed

    from reglib.cohort import CohortPair, register_cohort
    from reglib.data.nifti import Image, write_image

    pair, affine = _pair(task.shape, 1, "cpu"), _affine(task.shape)
    seconds = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit=0, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        at = Path(folder)
        for name in ("moving", "fixed"):
            write_image(at / f"{name}.nii.gz", Image(getattr(pair, name), affine))
        # The first pair also waits for the worker's imports.
        for turn, count in enumerate((1, COHORT)):
            rows = [
                CohortPair(str(k), moving=at / "moving.nii.gz", fixed=at / "fixed.nii.gz")
                for k in range(count)
            ]
            begin = time.perf_counter()
            out = register_cohort(rows, Nothing(), at / f"out{turn}", client=client, progress=False)
            seconds = (time.perf_counter() - begin) / count
            assert all(one.state == "done" for one in out), out
    return {"seconds": seconds, "mm": _voxel(task.shape)}


def measure(task: Task, device: str, steps: int) -> dict[str, Any]:
    """One row."""
    special: dict[str, Callable[[Task, str, int], dict[str, Any]]] = {
        "forward": _forward,
        "random pair": _random_pair,
        "registration": _registration,
        "cohort": _cohort,
    }
    found = special.get(task.kind, _step)(task, device, steps)
    seconds = rounded(found.pop("seconds"))
    row = {key: value for key, value in asdict(task).items() if value} | found
    if task.size:
        row["preset"] = pretraining.SIZES[task.size]["preset"]
    # A cohort's pairs are done by other processes.
    memory = {} if task.kind == "cohort" else {"peak_memory": peak_memory(device)}
    return row | {"seconds": seconds} | memory


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return row["kind"], row.get("size", ""), row.get("precision", "float32"), *row["shape"]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = ("steps", "cohort", "registration")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument(
        "--sizes", nargs="+", choices=tuple(pretraining.SIZES), default=list(pretraining.SIZES)
    )
    parser.add_argument("--voxels", type=int, nargs="+", choices=(2, 1), default=[2, 1])
    parser.add_argument("--steps", type=int, default=3, help="measured after the first (paper: 1)")
    parser.add_argument("--shape", type=int, nargs=3, help="a trial with all rows at this shape")
    record = DeviceRun(parser, NAME, HEAD)
    options, job, rows = record.options, record.job, record.rows
    shape = None if options.shape is None else tuple(options.shape)
    trial = shape is not None
    if trial:
        options.voxels = [2]
    if job is not None:
        options.parts, options.sizes, options.steps = job["parts"], job["sizes"], job["steps"]
        options.voxels = job.get("voxels", options.voxels)
        shape, trial = tuple(job["shape"]) if "shape" in job else None, False
    done = [_name(row) for row in rows]
    for task in tasks(options.parts, options.sizes, record.device, shape, options.voxels):
        if _name(asdict(task)) in done:
            continue
        few = record.device == "cpu" and task.size == "paper"
        rows.append(alone(measure, task, record.device, 1 if few else options.steps))
        print(json.dumps(rows[-1]), flush=True)
        if not trial:
            record.write(rows=rows)


if __name__ == "__main__":
    main()
