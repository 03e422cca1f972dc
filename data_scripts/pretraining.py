"""Random-image pretraining of TransMorph, and what it buys on brains (Chen et al., MIDL 2025).

    python data_scripts/brains.py                       # once: the brains as one file
    python data_scripts/pretraining.py --size cpu       # every run that is missing, one per core
    python data_scripts/pretraining.py --size cpu --tune
    python data_scripts/pretraining.py --embed          # the encoder of seed 0 into the package

A run is *pretraining* (``pretrain-VARIANT-SEED``) or *fine-tuning*
(``finetune-VARIANT-PERCENT-SEED``): the training subject nearest to the training mean is moving,
every other training subject fixed. Sizes and steps are in pretraining.json. Images are averaged
over ``pooled`` voxels of 2 mm; every Dice is that of the labels at 2 mm.

Each run sees the test subjects once, at its end, with the weights that were best on the validation
subjects; ``--tune`` tries learning rates on the validation subjects only, with other seeds. Every
run keeps a checkpoint and goes on from it; its record is written when it is done. What is done is
not done again, and results/pretraining_SIZE.json is made of all records.

As a job of ``make gpu`` the script is called with ``--settings FILE --out FOLDER``: ``size`` and
``runs``, a list of names; and ``after``, the jobs whose pretrained weights they start from.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from brains import ROOT, Brains, ixi_structures, load
from provenance import provenance, write_json
from torch import Tensor, nn
from trainings import Stream

from reglib.data.files import write_bytes
from reglib.geometry.fields import upsample_field
from reglib.geometry.sampling import warp_labels
from reglib.geometry.smoothing import pool
from reglib.methods import pretraining, transmorph
from reglib.objectives.metrics import dice, folding, ndv
from reglib.objectives.similarity import lncc
from reglib.synth import RandomPairs
from reglib.training import fit, warm_up
from reglib.weights import load_weights, save_weights

SIZES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
WORK = ROOT / "build" / "pretraining"
#: The encoder that travels with the package.
EMBEDDED = ROOT / "reglib" / "methods" / "weights" / "random-shapes-tiny" / "encoder.safetensors"
STRUCTURES = len(ixi_structures())
#: Learning rates that ``--tune`` tries, and the seed that no other run has.
RATES = (7e-4, 2e-3, 4e-3)
TUNING_SEED = 1000


# --- Runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: ``kind`` pretrain or finetune, and how."""

    kind: str
    variant: str
    seed: int
    percent: int = 100
    lr: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        parts = [self.kind, self.variant]
        parts += [str(self.percent)] if self.kind == "finetune" else []
        parts += [f"lr{self.lr:g}"] if self.lr is not None else []
        return "-".join([*parts, str(self.seed)])

    @classmethod
    def parse(cls, name: str) -> Run:
        """The run of a name."""
        kind, variant, *rest = name.split("-")
        percent = int(rest[0]) if kind == "finetune" else 100
        return cls(kind, variant, int(rest[-1]), percent)


#: What is pretrained, and how. ``whole``: no light decoders; the whole network learns from random
#: pairs, and all of it is kept. ``brains``: the subjects themselves instead of random shapes.
VARIANTS = ("kl", "whole", "no_kl", "released_kl", "dice", "brains")


def runs_of(size: dict[str, Any]) -> list[Run]:
    """All runs of a size, in the order in which they matter."""
    found = [Run("pretrain", variant, seed) for seed in size["seeds"] for variant in VARIANTS[:2]]
    found += [
        Run("finetune", variant, seed, round(100 * fraction))
        for fraction in size["fractions"]
        for seed in size["seeds"]
        for variant in ("scratch", *VARIANTS[:2])
    ]
    for variant in VARIANTS[2:]:
        for seed in size["ablation_seeds"]:
            found += [Run("pretrain", variant, seed), Run("finetune", variant, seed)]
    return found


# --- Pairs ----------------------------------------------------------------------------------


class BrainPairs(Stream):
    """An endless stream of the atlas and a random subject; with ``flip`` each axis at random.

    Without an atlas, two random subjects.
    """

    def __init__(self, fixed: Tensor, atlas: Tensor | None, seed: int, *, flip: bool) -> None:
        super().__init__(seed)
        self.fixed, self.atlas, self.flip = fixed, atlas, flip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            two = torch.randperm(len(self.fixed), generator=self.generator)[:2]
            turned = (torch.rand(3, generator=self.generator) < 0.5).tolist()
            axes = [axis + 2 for axis in range(3) if self.flip and turned[axis]]
            fixed = self.fixed[two[:1]]
            moving = self.fixed[two[1:]] if self.atlas is None else self.atlas
            yield moving.flip(axes), fixed.flip(axes)


@functools.cache
def brains(part: str) -> Brains:
    """A part of the data, read once a process."""
    return load(part)


@functools.cache
def atlas_index() -> int:
    """The training subject whose image is nearest to the training mean."""
    images = brains("train").images
    return int((images - images.mean(0)).square().flatten(1).mean(1).argmin())


def subjects_of(run: Run) -> list[int]:
    """Training subjects of a run: those of a smaller share are among those of a larger one."""
    order = torch.randperm(len(brains("train").images), generator=_generator(run.seed)).tolist()
    order.remove(atlas_index())
    return order[: max(1, round(run.percent / 100 * len(order)))]


def _generator(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# --- Networks -------------------------------------------------------------------------------


def new_network(size: dict[str, Any], seed: int) -> transmorph.TransMorph:
    """The registration network, untrained."""
    torch.manual_seed(seed)
    return transmorph.TransMorph(transmorph.PRESETS[size["preset"]])


def take_encoder(network: transmorph.TransMorph, state: Mapping[str, Tensor]) -> None:
    """Give a network the encoder that was pretrained; nothing else changes."""
    given = transmorph.Encoder(network.settings)
    given.load_state_dict(state)
    pretraining.transfer(given, network)


def pretraining_network(
    size: dict[str, Any], run: Run
) -> tuple[nn.Module, Callable[..., dict[str, Tensor]]]:
    """What a variant trains, and its objective."""
    network = new_network(size, run.seed)
    if run.variant == "whole":
        return network, finetuning_objective(size)
    kl = {"kl": "consistent", "released_kl": "released", "dice": "consistent"}.get(run.variant)
    if run.variant == "brains":
        kl = "consistent"
    objective = pretraining.dice_objective if run.variant == "dice" else pretraining.objective
    return pretraining.PretrainingNetwork(network.encoder), functools.partial(objective, kl=kl)


def finetuning_objective(size: dict[str, Any]) -> Callable[..., dict[str, Tensor]]:
    """Local correlation and diffusion."""
    similarity = functools.partial(lncc, window=size["window"])
    return functools.partial(transmorph.objective, similarity=similarity)


# --- Measuring ------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    network: nn.Module, size: dict[str, Any], part: str, device: str, *, full: bool
) -> dict[str, Any]:
    """The atlas registered to every subject of a part: Dice by subject and structure, at 2 mm."""
    some, moving = brains(part), brains("train")
    index = atlas_index()
    labels = moving.labels[index : index + 1].to(device)
    images = [x.to(device) for x in (moving.images[index : index + 1], some.images)]
    atlas, fixed = (pool(x, size["pooled"]) for x in images)
    shape = tuple(labels.shape[2:])
    found: dict[str, Any] = {"dice": [], "folding": [], "ndv": [], "seconds": []}
    network.eval()
    for n in range(len(fixed)):
        begin = time.perf_counter()
        field = network(atlas, fixed[n : n + 1]).field
        if device != "cpu":
            torch.cuda.synchronize()
        found["seconds"].append(round(time.perf_counter() - begin, 4))
        if size["pooled"] > 1:
            field = upsample_field(field, size["pooled"], shape)
        carried = warp_labels(labels, field)
        true = some.labels[n : n + 1].to(device)
        overlap = dice(carried, true, labels=range(1, STRUCTURES + 1))[0]
        found["dice"].append([round(x, 4) for x in overlap.tolist()])
        if full:
            found["folding"].append(float(f"{folding(field).item():.4g}"))
            found["ndv"].append(float(f"{ndv(field).item():.4g}"))
    return found if full else {"dice": found["dice"]}


def mean_dice(found: dict[str, Any]) -> float:
    """Mean over subjects and structures."""
    return float(torch.tensor(found["dice"]).nanmean())


# --- Training -------------------------------------------------------------------------------


def pretrain(run: Run, size: dict[str, Any], folder: Path, device: str) -> dict[str, Any]:
    """Pretrain, and keep the encoder (or the whole network)."""
    network, objective = pretraining_network(size, run)
    network.to(device)
    images = brains("train").images
    shape = tuple(n // size["pooled"] for n in images.shape[2:])
    pairs: BrainPairs | RandomPairs
    if run.variant == "brains":
        fixed = pool(images, size["pooled"]).to(device)
        pairs = BrainPairs(fixed, None, run.seed, flip=size["flip"])
    else:
        pairs = RandomPairs(
            shape,
            generator=_generator(run.seed, device),
            cell=size["cell"],
            batch=size["pretrain"]["batch"],
        )
    settings = size["pretrain"]
    history = fit(
        network,
        pairs,
        objective,
        steps=settings["steps"],
        lr=settings["lr"],
        optimiser=torch.optim.AdamW,
        schedule=warm_up,
        checkpoint=folder / f"{run.name}.checkpoint",
        progress=False,
    )
    whole = run.variant == "whole"
    kept = network if whole else network.encoder
    save_weights(kept, folder / f"{run.name}.safetensors", {"run": run.name})
    every = max(1, settings["steps"] // 100)
    names = [k for k in history if k not in ("step", "seconds", "validation")]
    record = {"seconds": round(history["seconds"][-1], 1), "curve_every": every}
    record["curve"] = {k: [round(v, 5) for v in history[k][::every]] for k in names}
    if whole:
        # The paper's control, random images alone: no brain seen.
        record["test"] = measure(network, size, "test", device, full=True)
    return record


def finetune(
    run: Run, size: dict[str, Any], folder: Path, device: str, *, test: bool = True
) -> dict[str, Any]:
    """Fine-tune from a pretrained encoder, or from scratch; measured once on the test subjects."""
    network = new_network(size, run.seed)
    if run.variant != "scratch":
        source = Run("pretrain", run.variant, run.seed % TUNING_SEED)
        state, _ = load_weights(folder / f"{source.name}.safetensors")
        if run.variant == "whole":
            network.load_state_dict(state)
        else:
            take_encoder(network, state)
    network.to(device)
    train, index = brains("train"), atlas_index()
    subjects = subjects_of(run)
    fixed = pool(train.images[subjects], size["pooled"]).to(device)
    atlas = pool(train.images[index : index + 1], size["pooled"]).to(device)
    settings = size["finetune"]
    history = fit(
        network,
        BrainPairs(fixed, atlas, run.seed, flip=size["flip"]),
        finetuning_objective(size),
        steps=settings["steps"],
        lr=run.lr or settings["lr"],
        optimiser=functools.partial(torch.optim.Adam, amsgrad=True),
        schedule=warm_up,
        checkpoint=folder / f"{run.name}.checkpoint",
        validate=lambda net: 1 - mean_dice(measure(net, size, "validation", device, full=False)),
        validate_every=settings["validate_every"],
        patience=settings["steps"],  # never stops early, but keeps the best weights
        progress=False,
    )
    curve = [round(1 - v, 5) for v in history["validation"] if v == v]
    record: dict[str, Any] = {
        "subjects": len(subjects),
        "seconds": round(history["seconds"][-1], 1),
        "validation_every": settings["validate_every"],
        "validation": curve,
    }
    save_weights(network, folder / f"{run.name}.safetensors", {"run": run.name})
    if test:
        record["test"] = measure(network, size, "test", device, full=True)
    return record


def do(run: Run, name: str, folder: Path, threads: int | None = None) -> dict[str, Any]:
    """One run, from its checkpoint if there is one; its record is on disk afterwards."""
    if threads is not None:
        torch.set_num_threads(threads)
    path = folder / f"{run.name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    size, device = SIZES[name], "cuda" if torch.cuda.is_available() else "cpu"
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if run.kind == "pretrain":
        record = pretrain(run, size, folder, device)
    else:
        record = finetune(run, size, folder, device, test=run.seed < TUNING_SEED)
    head = {"run": run.name, "kind": run.kind, "variant": run.variant, "seed": run.seed}
    if run.kind == "finetune":
        head |= {"percent": run.percent, "lr": run.lr or size["finetune"]["lr"]}
    record = head | {"started": started} | record | {"provenance": provenance()}
    write_json(path, record)
    (folder / f"{run.name}.checkpoint").unlink(missing_ok=True)
    return record


# --- All of them ----------------------------------------------------------------------------


def take_weights(earlier: str, folder: Path) -> None:
    """Copy what another job of the queue has pretrained, from gpu_out or from beside this job."""
    for place in (folder.parent / earlier, ROOT / "gpu_out" / earlier):
        found = sorted(place.glob("pretrain-*.safetensors"))
        if found:
            folder.mkdir(parents=True, exist_ok=True)
            for path in found:
                write_bytes(folder / path.name, path.read_bytes())
            return
    raise SystemExit(f"the weights of job {earlier} are missing: bring gpu_out/{earlier} along")


def do_all(runs: list[Run], name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Every run that is missing, one a core; those that need a pretrained encoder come after it."""
    workers = multiprocessing.get_context("spawn")
    for kind in ("pretrain", "finetune"):
        with ProcessPoolExecutor(os.cpu_count(), mp_context=workers) as pool_of:
            todo = [run for run in runs if run.kind == kind]
            futures = [pool_of.submit(do, run, name, folder, 1) for run in todo]
            for future in as_completed(futures):
                record = future.result()
                found = [*record.get("validation", [])]
                best = f"best validation Dice {max(found):.4f}" if found else ""
                print(record["run"], f"{record['seconds']:.0f} s", best, flush=True)
                yield record


def collect(name: str, folder: Path, path: Path, runs: list[Run]) -> None:
    """Write the results file of what is there, in the order of ``runs``."""
    records = [
        json.loads(file.read_text())
        for file in (folder / f"{run.name}.json" for run in runs)
        if file.exists()
    ]
    train = brains("train")
    head = {
        "script": f"data_scripts/pretraining.py --size {name}",
        "settings": SIZES[name],
        "atlas": train.subjects[atlas_index()],
        "structures": list(ixi_structures()),
        "test_subjects": brains("test").subjects,
        "missing": len(runs) - len(records),
    }
    write_json(path, head | {"runs": records})


def embed(folder: Path) -> None:
    """Put the encoder that random images taught into the package."""
    run = Run("pretrain", "kl", 0)
    state, _ = load_weights(folder / f"{run.name}.safetensors")
    record = json.loads((folder / f"{run.name}.json").read_text())
    encoder = transmorph.Encoder(transmorph.PRESETS[SIZES["cpu"]["preset"]])
    encoder.load_state_dict(state)
    card = {
        "trained_on": "pairs of random shapes (reglib.synth.RandomPairs); no image of anything",
        "licence": "Apache-2.0",
        "script": "data_scripts/pretraining.py --embed",
        "run": run.name,
        "cell": SIZES["cpu"]["cell"],
        "training": SIZES["cpu"]["pretrain"],
    }
    card |= {key: record[key] for key in ("seconds", "provenance")}
    EMBEDDED.parent.mkdir(exist_ok=True)
    transmorph.save(encoder, EMBEDDED, card=card)
    print(f"{EMBEDDED.relative_to(ROOT)}: {EMBEDDED.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--tune", action="store_true", help="learning rates, validation only")
    parser.add_argument("--most", type=int, help="at most so many of the runs, in their order")
    parser.add_argument("--embed", action="store_true", help="the encoder into the package")
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    provenance()  # that of the start: the tree may change while networks train
    if options.settings is not None:
        job = json.loads(options.settings.read_text())
        for earlier in job.get("after", []):
            take_weights(earlier, options.out)
        for name in job["runs"]:
            do(Run.parse(name), job["size"], options.out)
        return
    if options.embed:
        embed(WORK / "cpu")
        return
    if "command" in SIZES[options.size]:
        about, command = (SIZES[options.size][key] for key in ("about", "command"))
        raise SystemExit(f"size {options.size}: {about}; pretrain with\n{command}")
    folder, results = WORK / options.size, ROOT / "results"
    if options.tune:
        runs = [
            Run("finetune", variant, TUNING_SEED, lr=lr)
            for variant in ("scratch", *VARIANTS[:2])
            for lr in RATES
        ]
        path = results / f"pretraining_{options.size}_tuning.json"
        before = [Run("pretrain", variant, 0) for variant in VARIANTS[:2]]
    else:
        runs = runs_of(SIZES[options.size])[: options.most]
        path, before = results / f"pretraining_{options.size}.json", []
    for _ in do_all([*before, *runs], options.size, folder):
        collect(options.size, folder, path, runs)


if __name__ == "__main__":
    main()
