"""What tables of trained networks share: steps that fit into a time, trainings and their records.

A script has :class:`Trainings` of its own and a function that trains one network. Nothing but
torch, numpy, safetensors and the library is imported, as machines that only train have no more.
"""

from __future__ import annotations

import abc
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing
import torch
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data.files import write_bytes
from reglib.training import fit

#: Trains a network, given its name, seed and steps and, by keyword, ``path`` and what else a job
#: says; it writes the weights to ``path`` (None: to their own place) and returns a record, JSON,
#: with ``network``, ``seed`` and ``seconds``.
Train = Callable[..., dict[str, Any]]


# --- Streams of pairs -----------------------------------------------------------------------


class Stream(abc.ABC):
    """What draws at random without end, says where it is, and can be put there again.

    So a training that is resumed sees what it would have seen.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    @abc.abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Moving and fixed and what else the objective wants, without end."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"].cpu())


# --- Trainings ------------------------------------------------------------------------------


def named(objective: Mapping[str, Any]) -> dict[str, Any]:
    """An objective's settings as JSON: functions by their names."""
    return {key: getattr(value, "__name__", value) for key, value in objective.items()}


def begin(seed: int, threads: int = 1) -> str:
    """Seed the first weights and say where to train: on a GPU, else on so many threads."""
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(threads)
    return "cpu"


def learn(
    network: nn.Module,
    pairs: Stream,
    loss: Callable[..., dict[str, Tensor]],
    path: Path,
    *,
    steps: int | None,
    lr: float,
    validate: Callable[[Any], float],
    every: int,
    seconds: float | None = None,
) -> tuple[dict[str, Any], list[float]]:
    """Train a network; goes on from the checkpoint beside ``path``.

    Args:
        network: where it is to be trained.
        pairs: what it is trained on, without end.
        loss: of its output, the moving and the fixed image, and what else ``pairs`` give.
        path: of its weights; they are not written. Its folder is made.
        steps: of the optimiser, at most; ``None`` for as many as there is time for.
        lr: learning rate.
        validate: of the network; less is better.
        every: so many steps it is asked, and a checkpoint is written.
        seconds: of the training, at most, with those of ``validate``; ``None`` for no limit.

    Returns:
        What every record of a training holds, with the steps that were taken, and what ``validate``
        said.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = provenance()  # of the code that trains, not of what the files have become by the end
    history = fit(
        network,
        pairs,
        loss,
        steps=steps,
        seconds=seconds,
        lr=lr,
        checkpoint=path.with_suffix(".checkpoint"),
        every=every,
        validate=validate,
        validate_every=every,
        progress=False,
    )
    found = {
        "steps": len(history["loss"]),
        "seconds": round(history["seconds"][-1], 1),
        "parameters": sum(p.numel() for p in network.parameters()),
        "loss": curve(history["loss"]),
        "provenance": begun,
    }
    return found, [round(x, 4) for x in history["validation"] if not math.isnan(x)]


def curve(losses: Sequence[float], count: int = 100) -> list[float]:
    """The losses of all steps as at least so many means of parts, or one for each step.

    Parts are equal but for the last, which may be shorter.
    """
    size = max(1, len(losses) // count)
    parts = (losses[k : k + size] for k in range(0, len(losses), size))
    return [round(statistics.fmean(part), 5) for part in parts]


def tasks(
    seeds: Mapping[str, Sequence[int]], steps_of: Callable[[str], int]
) -> list[tuple[str, int, int]]:
    """Name, seed and steps of every network, all of a seed after each other.

    Args:
        seeds: of each network, by name.
        steps_of: a network's steps, given its name.
    """
    every = sorted({seed for own in seeds.values() for seed in own})
    return [(n, seed, steps_of(n)) for seed in every for n, own in seeds.items() if seed in own]


@dataclass(frozen=True)
class Trainings:
    """The trained networks of a table, each with several seeds.

    Args:
        folder: of weights, checkpoints and ``training.json``.
        calibration: steps of every network, and the measured seconds of a step that they come from.
        seconds: of the training of each network.
        threads: that each has.
    """

    folder: Path
    calibration: Path
    seconds: float = 900.0
    threads: int = 1

    @property
    def log(self) -> Path:
        """The records of the trainings."""
        return self.folder / "training.json"

    def weights(self, name: str, seed: int) -> Path:
        """Where a trained network lies."""
        return (
            self.folder / f"{name.lower().replace(', ', '_').replace(' ', '_')}_{seed}.safetensors"
        )

    def records(self) -> list[dict[str, Any]]:
        """Of the trainings that are finished here."""
        found: list[dict[str, Any]] = json.loads(self.log.read_text()) if self.log.exists() else []
        return found

    def add(self, record: dict[str, Any]) -> None:
        """Put a record of a training among those that are finished, in place of an earlier one."""
        own = record["network"], record["seed"]
        others = [run for run in self.records() if (run["network"], run["seed"]) != own]
        write_json(self.log, [*others, record])

    def configuration(self, name: str, seed: int) -> dict[str, Any]:
        """Settings of a trained network that registers; what is not known is None."""
        known = {(run["network"], run["seed"]): run["training"] for run in self.records()}
        return configuration(self.weights(name, seed), training=known.get((name, seed)))

    def calibrate(self, steps: Mapping[str, Callable[[], object]]) -> None:
        """Measure a step of every network, all in turn, and write how many ``seconds`` allow."""
        torch.set_num_threads(self.threads)
        start, before = time.perf_counter(), timing.load()
        found = timing.in_turn(steps, repeats=5)
        # Two digits.
        allowed = {name: int(float(f"{self.seconds / one:.2g}")) for name, one in found.items()}
        run = timing.run_of("cpu", start, before, step_seconds=found)
        content = {"limit_seconds": self.seconds, "steps": allowed, "measured": run}
        write_json(self.calibration, content)
        print(json.dumps(allowed, indent=1))

    def steps(self) -> dict[str, int]:
        """Of the training of every network that was calibrated."""
        if not self.calibration.is_file():
            raise SystemExit(f"{self.calibration.name} is missing: run the command calibrate first")
        found: dict[str, int] = json.loads(self.calibration.read_text())["steps"]
        return found

    def train_missing(
        self, train: Train, tasks: Sequence[tuple[str, int, int]], quality: str
    ) -> None:
        """Train what is missing, one after the other or as many at once as there are cores for.

        Results go into ``folder`` network by network.

        Args:
            train: trains one network in a process of its own.
            tasks: name, seed and steps of all that there should be.
            quality: the entry of a record whose last value is shown.
        """
        done = {(run["network"], run["seed"]) for run in self.records()}
        missing = [task for task in tasks if task[:2] not in done]
        workers = multiprocessing.get_context("spawn")
        together = max(1, (os.cpu_count() or 1) // self.threads)
        with ProcessPoolExecutor(together, mp_context=workers) as executor:
            futures = [executor.submit(train, *task) for task in missing]
            for number, future in enumerate(as_completed(futures), 1):
                record = future.result()
                self.add(record)
                words = record["network"], record["seed"], record["seconds"], record[quality][-1]
                print(f"{number}/{len(missing)}", *words, flush=True)

    def do_job(self, train: Train, about: str | None) -> None:
        """Do a job of the GPU queue, which names network and seed, steps or seconds, and the rest.

        Weights and record go into its folder.
        """
        job, folder = job_of_queue(about)
        name, seed, steps = job.pop("network"), job.pop("seed"), job.pop("steps", None)
        path = folder / self.weights(name, seed).name
        record = train(name, seed, steps, **job, path=path)
        write_json(path.with_suffix(".json"), record)
        path.with_suffix(".checkpoint").unlink(missing_ok=True)

    def bring_home(self, folder: Path, names: Collection[str]) -> None:
        """Take over weights and record that a job of the GPU queue left in its folder.

        Stops unless both are there, of one of the networks of these names.
        """
        records = [path.with_suffix(".json") for path in sorted(folder.glob("*.safetensors"))]
        if len(records) != 1 or not records[0].is_file():
            raise SystemExit(f"{folder}: wanted one network and its record, as a job leaves them")
        record = json.loads(records[0].read_text())
        if record.get("network") not in names:
            raise SystemExit(f"{records[0]}: wanted a training of one of {list(names)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = records[0].with_suffix(".safetensors").read_bytes()
        write_bytes(self.weights(record["network"], record["seed"]), weights)
        self.add(record)


def job_of_queue(about: str | None) -> tuple[dict[str, Any], Path]:
    """Settings and folder of a job of the GPU queue, from the command line."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--settings", type=Path, required=True, help="of the job")
    parser.add_argument("--out", type=Path, required=True, help="its folder")
    options = parser.parse_args()
    return json.loads(options.settings.read_text()), options.out


# --- What a table is told -------------------------------------------------------------------


def digest(path: Path) -> str | None:
    """Of a file, if it is there: whoever trains again has another configuration."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def configuration(path: Path, **own: Any) -> dict[str, Any]:
    """Settings of a network that registers: its file, and what else is ``own``."""
    weights = {"weights": os.path.relpath(path, ROOT), "sha256": digest(path)}
    return {"package": "reglib"} | own | weights


def trained_or_stop(configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """Stop if the weights of one are missing, or nothing is known about its training."""
    asked = {name: own for name, own in configurations.items() if "weights" in own}
    found = [name for name, own in asked.items() if None in (own["sha256"], own.get("training", 0))]
    if found:
        raise SystemExit(f"not trained yet: {found}")


def table_parser(
    about: str | None, names: Collection[str], other: str
) -> tuple[argparse.ArgumentParser, Any, argparse.ArgumentParser]:
    """The command line that scripts of such tables share.

    Args:
        about: the script's own words.
        names: of the networks.
        other: the part of the split that development looks at.

    Returns:
        The parser, its commands and the command ``test``, for what else a script has.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command")
    learn = commands.add_parser("train")
    learn.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    commands.add_parser("calibrate")
    judge = commands.add_parser("test")
    judge.add_argument("--split", choices=("test", other), default="test")
    judge.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    return parser, commands, judge
