"""Other encoders pretrained on random images: GeoReg's on digits, FCN's on hippocampi.

    python data_scripts/pretraining_encoders.py

Chen et al. (MIDL 2025) pretrain one encoder, that of TransMorph. Here the same call does it for two
others, in 2-D and in 3-D, and the networks are then trained on few and on all training images, for
the same number of steps from scratch and with the pretrained encoder, from the same first weights
otherwise. All data travel with the package.

*Digits*: the split of georeg_mnist.py, whose sweep on validation digits gives the learning rate.
Curves are those of a fifth of the validation pairs, in between; the last weights see the test pairs
once. *Hippocampi*: the embedded population at 2 mm, 24 members to train, 8 to validate, 8 to test;
members of all parts show the same four boxes, differently deformed, and in every measured pair are
the two sides of one brain, as other brains are labelled by another protocol. The learning rate is
that of the library's ``fit``.

Everything is decided beforehand and once: nothing is tuned, and the variants differ in nothing but
the encoder's first weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from georeg_mnist import pairs_in_order, split_train, supervise
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data import datasets
from reglib.geometry.fields import upsample_field
from reglib.geometry.sampling import warp, warp_labels
from reglib.geometry.smoothing import pool
from reglib.methods import fcn, georeg, pretraining
from reglib.objectives.metrics import dice, folding
from reglib.objectives.similarity import ncc, soft_dice
from reglib.synth import RandomPairs
from reglib.training import fit, warm_up

RESULTS = ROOT / "results" / "pretraining_encoders.json"
SWEEP = ROOT / "results" / "georeg_mnist_sweep.json"
SHARES, SEEDS, VARIANTS = (0.05, 1.0), (0, 1, 2), ("scratch", "pretrained")
#: Of the embedded population: members of train, validation and test.
PARTS = {"train": (0, 24), "validation": (24, 32), "test": (32, 40)}
POOLED = 2


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Problem:
    """A network, what it is trained on, and how it is measured."""

    make: Callable[[], nn.Module]
    encoder: Callable[[Any], nn.Module]
    shape: tuple[int, ...]  #: of the random images
    cell: float
    pretrain_steps: int
    pretrain_batch: int
    objective: Callable[..., dict[str, Tensor]]
    lr: Callable[[], float]
    steps: int
    every: int  #: steps between two points of the curve
    #: How many training images a share of them is.
    images: Callable[[float], int]
    #: Of the share of the training images and the seed: an endless stream.
    pairs: Callable[[float, int], Iterator[tuple[Tensor, Tensor]]]
    #: Of the network and "validation" or "test": a number for every pair, by name.
    measure: Callable[[nn.Module, str], dict[str, Tensor]]


# --- Digits ---------------------------------------------------------------------------------


def digits_of(share: float) -> int:
    """Training images, equally many of each digit."""
    return 10 * max(2, round(share * len(split_train()[0][1]) / 10))


def digit_pairs(share: float, seed: int, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the same digit, from a share of the images of each; a smaller one is in a larger."""
    images, digits = split_train()[0]
    generator = _generator(seed)
    kept = []
    for d in range(10):
        members = torch.nonzero(digits == d).flatten()
        order = torch.randperm(len(members), generator=generator)
        kept.append(members[order[: digits_of(share) // 10]])
    some = torch.cat(kept)
    return datasets.same_label_pairs(
        images[some], digits[some], batch_size=batch, generator=generator
    )


def measure_digits(network: nn.Module, part: str) -> dict[str, Tensor]:
    """Correlation and soft Dice of the grey values, and folding, of every pair."""
    if part == "test":
        moving, fixed, _ = pairs_in_order(*datasets.mnist("test"))
    else:
        moving, fixed, _ = (x[::5] for x in pairs_in_order(*split_train()[1]))
    found: dict[str, list[Tensor]] = {"correlation": [], "dice": [], "folding": []}
    for m, f in zip(moving.split(100), fixed.split(100), strict=True):
        field = network(m, f).field
        warped = warp(m, field)
        found["correlation"].append(1 - ncc(warped, f, reduction="none"))
        found["dice"].append(1 - soft_dice(warped, f, reduction="none"))
        found["folding"].append(folding(field))
    return {name: torch.cat(values) for name, values in found.items()}


def swept_rate() -> float:
    """GeoReg's learning rate with the best correlation on validation digits."""
    runs = json.loads(SWEEP.read_text())["runs"]
    of_georeg = [run for run in runs if run["variant"] == "GeoReg"]
    best = max(of_georeg, key=lambda run: run["validation"][-1]["ncc"])
    return float(best["settings"]["lr"])


# --- Hippocampi -----------------------------------------------------------------------------


@functools.cache
def population() -> tuple[Tensor, Tensor, Tensor]:
    """Images at 1 mm and at 2 mm, and labels at 1 mm, ``(40, 1, *S)``."""
    found = datasets.hippocampus(count=40, generator=_generator(0))
    return found.images, pool(found.images, POOLED), found.labels


def hippocampi_of(share: float) -> int:
    """Training members, three at least."""
    first, last = PARTS["train"]
    return max(3, round(share * (last - first)))


def hippocampus_pairs(share: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Two pairs of different training members at a time."""
    first, last = PARTS["train"]
    generator = _generator(seed)
    order = torch.randperm(last - first, generator=generator)
    some = population()[1][first + order[: hippocampi_of(share)]]
    while True:
        drawn = [torch.randperm(len(some), generator=generator)[:2] for _ in range(2)]
        moving, fixed = torch.stack(drawn, 1)
        yield some[moving], some[fixed]


def measure_hippocampi(network: nn.Module, part: str) -> dict[str, Tensor]:
    """Correlation at 2 mm, mean Dice of hippocampus and amygdala at 1 mm, and folding."""
    first, last = PARTS[part]
    fixed = torch.arange(first, last)
    moving = fixed ^ 1  # boxes come in turn, the two sides of a brain one after the other
    images, coarse, labels = population()
    found: dict[str, list[Tensor]] = {"correlation": [], "dice": [], "folding": []}
    for m, f in zip(moving.split(1), fixed.split(1), strict=True):
        field = network(coarse[m], coarse[f]).field
        found["correlation"].append(1 - ncc(warp(coarse[m], field), coarse[f], reduction="none"))
        field = upsample_field(field, POOLED, images.shape[2:])
        carried = warp_labels(labels[m], field)
        found["dice"].append(dice(carried, labels[f], labels=(1, 2)).mean(1))
        found["folding"].append(folding(field))
    return {name: torch.cat(values) for name, values in found.items()}


class Still(nn.Module):
    """Registers nothing."""

    def forward(self, moving: Tensor, fixed: Tensor) -> fcn.Output:
        """No displacement."""
        field = fixed.new_zeros(len(fixed), fixed.ndim - 2, *fixed.shape[2:])
        return fcn.Output(field, ())


PROBLEMS: dict[str, Problem] = {
    "GeoReg, digits": Problem(
        make=georeg.GeoReg,
        encoder=pretraining.georeg_encoder,
        shape=(28, 28),
        cell=8.0,
        pretrain_steps=400,
        pretrain_batch=8,
        objective=supervise,
        lr=swept_rate,
        steps=100,
        every=20,
        images=digits_of,
        pairs=digit_pairs,
        measure=measure_digits,
    ),
    "FCN, hippocampi": Problem(
        make=fcn.FCN,
        encoder=pretraining.fcn_encoder,
        shape=(24, 32, 24),
        cell=8.0,
        pretrain_steps=150,
        pretrain_batch=2,
        objective=fcn.objective,
        lr=lambda: 1e-3,
        steps=80,
        every=20,
        images=hippocampi_of,
        pairs=hippocampus_pairs,
        measure=measure_hippocampi,
    ),
}


# --- Runs -----------------------------------------------------------------------------------


def pretrain(problem: Problem, seed: int, steps: int) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder pretrained on random images, and how that went."""
    torch.manual_seed(seed)
    network = pretraining.PretrainingNetwork(problem.encoder(problem.make()))
    pairs = RandomPairs(
        problem.shape,
        generator=_generator(seed),
        cell=problem.cell,
        batch=problem.pretrain_batch,
    )
    cpu = time.process_time()
    history = fit(
        network,
        pairs,
        pretraining.objective,
        steps=steps,
        lr=2e-3,
        optimiser=torch.optim.AdamW,
        schedule=warm_up,
        progress=False,
    )
    every = max(1, steps // 50)
    names = [name for name in history if name not in ("step", "seconds")]
    return network, {
        "steps": steps,
        "seconds": round(time.process_time() - cpu, 1),
        "curve_every": every,
        "curve": {name: [round(v, 5) for v in history[name][::every]] for name in names},
    }


def finetune(
    problem: Problem, share: float, seed: int, steps: int, pretrained: nn.Module | None
) -> dict[str, Any]:
    """Train on a share of the images; the curve on validation pairs, and the test pairs once."""
    torch.manual_seed(seed)
    network = problem.make()
    if pretrained is not None:
        pretraining.transfer(pretrained, network)
    curve: list[dict[str, float]] = []

    def look(trained: nn.Module) -> float:
        curve.append(means(problem.measure(trained, "validation")))
        return -curve[-1]["correlation"]

    with torch.no_grad():
        look(network.eval())
    cpu = time.process_time()
    fit(
        network,
        problem.pairs(share, seed),
        problem.objective,
        steps=steps,
        lr=problem.lr(),
        validate=look,
        validate_every=problem.every,
        progress=False,
    )
    seconds = time.process_time() - cpu
    at = [*range(0, steps + 1, problem.every), *([steps] if steps % problem.every else [])]
    with torch.no_grad():
        test = problem.measure(network.eval(), "test")
    return {
        "images": problem.images(share),
        "steps": steps,
        "lr": problem.lr(),
        "seconds": round(seconds, 1),
        "validation": [{"step": n} | point for n, point in zip(at, curve, strict=True)],
        "test": means(test),
    }


def means(values: dict[str, Tensor]) -> dict[str, float]:
    """Over the pairs."""
    return {name: round(float(value.nanmean()), 5) for name, value in values.items()}


def all_runs(shrink: int, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The record of every run; ``shrink`` divides all numbers of steps."""
    for name, problem in PROBLEMS.items():
        for seed in seeds:
            head = {"problem": name, "seed": seed}
            network, record = pretrain(problem, seed, problem.pretrain_steps // shrink)
            yield head | {"run": "pretrain"} | record
            for share in SHARES:
                for variant in VARIANTS:
                    given = network if variant == "pretrained" else None
                    record = finetune(problem, share, seed, problem.steps // shrink, given)
                    yield head | {"run": "train", "variant": variant, "share": share} | record


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shrink", type=int, default=1, help="divides all steps, to try it")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    provenance()  # that of the start: the tree may change while networks train
    torch.set_num_threads(1)
    head = {
        "script": "data_scripts/pretraining_encoders.py",
        "unregistered": {
            name: {part: means(problem.measure(Still(), part)) for part in ("validation", "test")}
            for name, problem in PROBLEMS.items()
        },
    }
    runs: list[dict[str, Any]] = []
    for record in all_runs(options.shrink, tuple(options.seeds)):
        runs.append(record | {"provenance": provenance()})
        write_json(options.out, head | {"runs": runs})
        shown = [record[k] for k in ("problem", "seed", "run", "seconds")]
        print(*shown, *(record.get(k, "") for k in ("variant", "share", "test")), flush=True)


if __name__ == "__main__":
    main()
