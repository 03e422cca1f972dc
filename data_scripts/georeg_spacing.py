"""Does GeoReg register anisotropic volumes better when it is told how long their voxels are?

    REGLIB_DATA=FOLDER python data_scripts/brains.py              # volumes -> one file
    python data_scripts/georeg_spacing.py train [NAME ...]        # both networks, every seed
    python data_scripts/georeg_spacing.py test                    # once

Without a command the last two run. For development there are

    python data_scripts/georeg_spacing.py calibrate               # how many steps to train
    python data_scripts/georeg_spacing.py test --split tuning

of which the latter takes other subjects and writes nothing into results/.

The paper (Sideri-Lampretsa et al., arXiv:2412.13294) calls it an interesting avenue to predict in
millimetres. Brains of IXI at 2 mm are deformed by known fields (the family "all" at its first
strength, as in georeg_synthetic.py), and the moving and the fixed image are then taken with thick
slices: voxels are averaged along each axis on its own, to 4, 6, 8 or 12 mm.

Two networks, alike but for one thing: "told" has the length of a voxel along each axis in its
relative coordinates and predicts in millimetres, "untold" counts in voxels. Both are trained on
voxels of 4 or 8 mm, drawn for each axis and each step, for as many steps as 15 minutes of one
thread allowed on the machine that georeg_spacing_steps.json names; regularity counts in millimetres
for both. They are tested on spacings of the training and on others that neither has seen. Results
are millimetres from the truth, per subject.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trainings
from benchmark_classical import chosen, known_or_stop
from benchmark_record import (
    UNREGISTERED,
    Record,
    Row,
    compare,
    interval,
    method_of,
    of_each_seed,
    over_seeds,
)
from georeg_synthetic_networks import SEEDS, Cell, Pairs, deformed, lncc_of_five, load
from provenance import ROOT
from table_networks import save, trained
from torch import Tensor, nn
from torch.nn import functional
from trainings import Stream, Trainings, table_parser

from reglib.methods import georeg
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import bending
from reglib.training import fit

WORK = ROOT / "build" / "georeg_spacing"
RESULTS = ROOT / "results" / "georeg_spacing.json"
TRAININGS = Trainings(WORK, ROOT / "data_scripts" / "georeg_spacing_steps.json", seconds=900.0)
VALIDATE_EVERY = 50

#: mm per voxel of IXI's volumes.
VOXEL = 2.0
#: What deforms them.
CELL = Cell("all", 1)
#: Lengths of a voxel in training, mm, drawn for each axis.
LENGTHS = (4.0, 8.0)
#: Those of the test: of the training first, then others.
SEEN = ((4.0, 4.0, 4.0), (4.0, 4.0, 8.0), (8.0, 4.0, 4.0))
UNSEEN = ((4.0, 4.0, 6.0), (6.0, 4.0, 8.0), (4.0, 4.0, 12.0))
#: What a network is told is in units of this, mm, so that it begins as one that is not told.
UNIT = 4.0

#: Four levels. As in the synthetic table the finest one only interpolates.
GEOREG: dict[str, Any] = {
    "dimensions": 3,
    "channels": [8, 16, 32, 64],
    "neighbourhoods": [0, 3, 3, 5],
    "iterations": [0, 1, 2, 4],
    "interpolation": [0, 2, 2],
    "normalise": True,
    "matching": 2.0,
}
MULTIPLE = 2 ** (len(GEOREG["channels"]) - 1)
REGULARITY_WEIGHT = [1.0, 0.5, 0.2, 0.1]
#: With a rate of 2e-3, as on slices, and single pairs the coarsest level learns nothing.
LR, BATCH = 1e-3, 2
#: Whether a network is told.
NETWORKS = {"told": True, "untold": False}

PROTOCOL: dict[str, Any] = {
    "deformation": CELL.name,
    "spacings": {"seen": SEEN, "unseen": UNSEEN},
    "error": "mean distance from the truth, mm, where the fixed grid shows the brain and the true "
    "field stays in the image.",
    "folding": "share of these voxels with a determinant of at most 0.",
    "interval": "95 %, percentile bootstrap over subjects; seeds are averaged first.",
}


# --- Pairs ------------------------------------------------------------------------------------


class Thick(NamedTuple):
    """A pair with thick slices, ``(B, 1, *S)``, and its truth ``(B, 3, *S)`` in its own voxels."""

    moving: Tensor
    fixed: Tensor
    field: Tensor
    mask: Tensor
    spacing: tuple[float, ...]


def thick(pairs: Pairs, spacing: Sequence[float]) -> Thick:
    """The pair as voxels of that spacing show it, padded to sizes that the networks take.

    Args:
        pairs: with a spacing of 2 mm.
        spacing: mm along each axis, multiples of that; voxels at the end that fill no whole one are
            left out.
    """
    factors = [round(s / VOXEL) for s in spacing]
    pooled = [functional.avg_pool3d(x, factors) for x in (*pairs[:3], pairs.mask.float())]
    margin = [n for size in reversed(pooled[0].shape[2:]) for n in (0, -size % MULTIPLE)]
    moving, fixed, field, mask = (functional.pad(x, margin) for x in pooled)
    field = field / field.new_tensor(factors).view(-1, 1, 1, 1)
    # Where all that was averaged belongs to it.
    return Thick(moving, fixed, field, mask > 1 - 1e-4, tuple(spacing))


def pair_of(part: str, place: int) -> Pairs:
    """The one pair that tuning or test has of a subject, for each spacing, at 2 mm."""
    begin = {"tuning": 6000, "test": 7000}[part]
    image = load(part, 3).images[place : place + 1]
    return deformed(image, [CELL], torch.Generator().manual_seed(begin + place))


class ThickPairs(Stream):
    """An endless stream of deformed brains with thick slices, and their spacing."""

    def __init__(self, images: Tensor, batch: int, seed: int) -> None:
        super().__init__(seed, images.device)
        self.images, self.batch = images, batch

    def __iter__(self) -> Iterator[Any]:
        """Moving, fixed and spacing, without end."""

        def draw(count: int, size: int) -> list[int]:
            found = torch.randint(
                count, (size,), generator=self.generator, device=self.generator.device
            )
            return found.tolist()

        while True:
            images = self.images[draw(len(self.images), self.batch)]
            pairs = deformed(images, [CELL] * self.batch, self.generator)
            pair = thick(pairs, [LENGTHS[n] for n in draw(len(LENGTHS), 3)])
            yield pair.moving, pair.fixed, pair.spacing


# --- Networks ---------------------------------------------------------------------------------


class Registering(nn.Module):
    """GeoReg that is told the spacing of the next pair, or not."""

    def __init__(self, network: georeg.GeoReg, *, told: bool) -> None:
        super().__init__()
        self.network, self.told = network, told
        self.spacing: tuple[float, ...] | None = None

    def forward(self, moving: Tensor, fixed: Tensor) -> georeg.Output:
        """Register."""
        assert self.spacing is not None
        units = [s / UNIT for s in self.spacing] if self.told else None
        return self.network(moving, fixed, spacing=units)


class Announced:
    """Pairs of a stream, each announced to a network before it is shown."""

    def __init__(self, pairs: ThickPairs, network: Registering) -> None:
        self.pairs, self.network = pairs, network
        self.state_dict, self.load_state_dict = pairs.state_dict, pairs.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        """Moving, fixed and spacing, without end."""
        for moving, fixed, spacing in self.pairs:
            self.network.spacing = spacing
            yield moving, fixed, spacing


def objective(
    output: georeg.Output, moving: Tensor, fixed: Tensor, spacing: Sequence[float]
) -> dict[str, Tensor]:
    """What is minimised; bending in units of 4 mm."""
    return georeg.objective(
        output,
        moving,
        fixed,
        similarity=lncc_of_five,
        regularity=functools.partial(bending, spacing=[s / UNIT for s in spacing]),
        regularity_weight=REGULARITY_WEIGHT,
    )


def new(name: str) -> Registering:
    """A network that knows nothing."""
    return Registering(georeg.GeoReg(**GEOREG), told=NETWORKS[name])


def error(field: Tensor, pair: Thick) -> Tensor:
    """Mean distance from the truth within the mask, mm, ``(B,)``."""
    lengths = field.new_tensor(pair.spacing).view(-1, 1, 1, 1)
    apart = torch.linalg.vector_norm((field - pair.field) * lengths, dim=1, keepdim=True)
    return (apart * pair.mask).flatten(1).sum(1) / pair.mask.flatten(1).sum(1)


@torch.no_grad()
def tuning_error(network: Registering, pairs: Sequence[Thick]) -> float:
    """Mean over pairs, mm."""
    found, before = [], network.spacing
    for pair in pairs:
        network.spacing = pair.spacing
        found.append(float(error(network(pair.moving, pair.fixed).field, pair)))
    network.spacing = before
    return statistics.fmean(found)


#: What is timed: spacings differ in what they cost.
EIGHT = "eight steps"


def calibrate() -> None:
    """Measure some steps and write how many of them the time allows."""
    network = new("told")
    pairs = Announced(ThickPairs(load("training", 3).images, BATCH, 0), network)
    step = functools.partial(fit, network, pairs, objective, steps=8, lr=LR, progress=False)
    TRAININGS.calibrate({EIGHT: step})


def steps_of(name: str) -> int:
    """Of the training of either network."""
    return 8 * TRAININGS.steps()[EIGHT]


def train(
    name: str, seed: int, steps: int, *, batch: int = BATCH, path: Path | None = None
) -> dict[str, Any]:
    """Train one network and write its weights; goes on from its checkpoint.

    Args:
        name: of the network.
        seed: of its first weights and of the pairs.
        steps: of the optimiser.
        batch: pairs of a step.
        path: of the weights; ``None`` for their place in build/.

    Returns:
        What is known about the training, JSON.
    """
    path, device = path or TRAININGS.weights(name, seed), trainings.begin(seed)
    network = new(name).to(device)
    images = load("training", 3).images.to(device)
    places = range(len(load("tuning", 3).subjects))
    watched = [thick(pair_of("tuning", n), SEEN[n % len(SEEN)]) for n in places]
    watched = [
        Thick(*(x.to(device) if isinstance(x, Tensor) else x for x in pair)) for pair in watched
    ]
    found, errors = trainings.learn(
        network,
        Announced(ThickPairs(images, batch, seed), network),
        objective,
        path,
        steps=steps,
        lr=LR,
        validate=functools.partial(tuning_error, pairs=watched),
        every=VALIDATE_EVERY,
    )
    record: dict[str, Any] = {"network": name, "seed": seed}
    training = {"steps": found.pop("steps"), "batch": batch, "lr": LR, "settings": GEOREG}
    record |= {"training": training} | found
    record |= {"tuning_every": VALIDATE_EVERY, "tuning_error": errors}
    card = {key: value for key, value in record.items() if key not in ("loss", "tuning_every")} | {
        "input": {"channels": 1, "size_multiple": MULTIPLE},
        "told": NETWORKS[name],
        "trained_on": "IXI, 100 brains (splits.json), deformed at random, voxels of 4 and 8 mm",
        "licence": "weights: Apache-2.0; data: CC BY-SA 3.0 (IXI)",
    }
    save(network.network.cpu(), path, card)
    return record


# --- The table --------------------------------------------------------------------------------


def set_of(spacing: Sequence[float]) -> str:
    """The name of a spacing, such as ``4 x 4 x 8 mm``."""
    return " x ".join(f"{s:g}" for s in spacing) + " mm"


def configurations() -> dict[str, dict[str, Any]]:
    """Every network and seed."""
    return {
        f"{name}, seed {seed}": TRAININGS.configuration(name, seed)
        for name, seed in itertools.product(NETWORKS, SEEDS)
    }


def measure(field: Tensor, pair: Thick) -> dict[str, float]:
    """Of one pair."""
    values = {"error": error(field, pair), "folding": folding(field, mask=pair.mask.float())}
    return {name: float(f"{float(value):.5g}") for name, value in values.items()}


@torch.no_grad()
def registered(name: str, settings: dict[str, Any], pair: Thick) -> Tensor:
    """The field that a configuration finds."""
    if name == UNREGISTERED:
        return torch.zeros_like(pair.field)
    network = Registering(trained(str(ROOT / settings["weights"])), told=name.startswith("told"))
    network.spacing = pair.spacing
    found: Tensor = network(pair.moving, pair.fixed).field
    return found


def test(part: str, only: Collection[str] | None) -> None:
    """Register and measure."""
    final, own = part == "test", configurations()
    wanted = chosen(part, own, only)
    record = Record(WORK / f"{part}.json", part, RESULTS if final else None)
    subjects = load(part, 3).subjects
    known = functools.lru_cache(1)(pair_of)  # of one subject at all spacings
    cases = [
        (set_of(spacing), subject, subject) for spacing in SEEN + UNSEEN for subject in subjects
    ]
    record.begin(wanted, [(*case, name) for case in cases for name in wanted])
    names, done = (UNREGISTERED, *wanted), record.done
    for place, spacing in itertools.product(range(len(subjects)), SEEN + UNSEEN):
        case = (set_of(spacing), subjects[place], subjects[place])
        missing = [name for name in names if (*case, name) not in done]
        if not missing:
            continue
        pair = thick(known(part, place), spacing)
        for name in missing:
            start = time.perf_counter()
            found = measure(registered(name, wanted.get(name, {}), pair), pair)
            row = dict(zip(("set", "moving", "fixed"), case, strict=True))
            row |= {"cluster": place, "configuration": name}
            record.add(row | {"seconds": round(time.perf_counter() - start, 3)} | found)
    if wanted != own:
        print(table(summarise(record.rows)))
        return
    head = {
        "script": "data_scripts/georeg_spacing.py",
        "protocol": PROTOCOL,
        "training": TRAININGS.records(),
    }
    print(table(record.finish(cases, list(own), head, summary=summarise)))


def summarise(rows: Sequence[Row], ours: Collection[str] = ()) -> dict[str, Any]:
    """Of each spacing: both networks, and how much nearer to the truth the told one is."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        own: dict[str, list[Row]] = {}
        for row in rows:
            if row["set"] == name:
                own.setdefault(method_of(row["configuration"]), []).append(row)
        found[name] = {method: means(of_it) for method, of_it in own.items()}
        if NETWORKS.keys() <= own.keys():
            told, untold = (over_seeds(own[method], "error") for method in NETWORKS)
            found[name]["told minus untold"] = compare(
                told, untold, "error", lambda row: float(row["error"])
            )
    return {"spacings": found}


def means(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one method at one spacing, over pairs and seeds."""
    whole = over_seeds(rows, "error")
    found: dict[str, Any] = {
        name: float(f"{statistics.fmean(row[name] for row in rows):.4g}")
        for name in ("error", "folding")
    }
    ends = interval([row["error"] for row in whole], [row["cluster"] for row in whole])
    return found | {"interval": ends, "seeds": of_each_seed(rows, "error")}


def table(content: dict[str, Any]) -> str:
    """The summary for the terminal."""
    lines = [f"{'mm from the truth':18}{'before':>9}{'told':>9}{'untold':>9}  told minus untold"]
    for name, own in content["spacings"].items():
        values = (own.get(x, {}).get("error", math.nan) for x in (UNREGISTERED, *NETWORKS))
        less = own.get("told minus untold", {})
        lines.append(
            f"{name:18}"
            + "".join(f"{v:9.2f}" for v in values)
            + f"  {less.get('error')} {less.get('interval')}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser, _, _ = table_parser(__doc__, NETWORKS, "tuning")
    options = parser.parse_args()
    if options.command == "calibrate":
        calibrate()
    if options.command in ("train", None):
        names = getattr(options, "names", None) or list(NETWORKS)
        known_or_stop(names, NETWORKS)
        every = trainings.tasks(dict.fromkeys(names, SEEDS), steps_of)
        TRAININGS.train_missing(train, every, "tuning_error")
    if options.command in ("test", None):
        test(getattr(options, "split", "test"), getattr(options, "only", None))


if __name__ == "__main__":
    main()
