"""GeoReg on MNIST: the embedded weights, and the ablation that the notebook draws.

    python data_scripts/georeg_mnist.py weights     # the network that travels with the package
    python data_scripts/georeg_mnist.py sweep       # learning rate and step time of each variant
    python data_scripts/georeg_mnist.py ablation    # every variant and seed, once on the test set

Data: the embedded sample (4,000 digits of the official training set, 1,000 of the test set). The
last 50 training digits of each class are kept apart for validation, and every setting is chosen on
them: ``sweep`` takes the learning rate of each variant with the best correlation there. In the
ablation every variant gets the same time: its number of steps is the time over the CPU time of a
step on one thread, as ``sweep`` measured it for all variants in turn. Runs that are already in the
results file are not repeated, and runs of other settings are never mixed with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data import datasets
from reglib.geometry.sampling import warp
from reglib.methods import georeg
from reglib.objectives import metrics, similarity
from reglib.training import fit

BATCH = 32
REGULARITY = (1.0, 0.5, 0.25)  # finest level first
RATES = (1e-3, 2e-3, 4e-3)
VALIDATION = 50  # digits of each class
RESULTS = ROOT / "results"
WEIGHTS = Path(georeg.__file__).parent / georeg.WEIGHTS.format("mnist")

supervise = functools.partial(georeg.objective, regularity_weight=REGULARITY)
final_only = functools.partial(supervise, deep_supervision=False)
# A U-Net has one resolution, and there the same objective.
one_level = functools.partial(georeg.objective, regularity_weight=REGULARITY[:1])


class UNet(nn.Module):
    """MONAI's VoxelMorph U-Net over the concatenated pair: pooled twice, wider where coarser."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from monai.networks.nets import VoxelMorphUNet

        self.unet = VoxelMorphUNet(
            spatial_dims=2,
            in_channels=2,
            unet_out_channels=width,
            channels=(width, width, 3 * width, 3 * width),
            final_conv_channels=(width // 2,) * 2,
        )
        *_, last = (m for m in self.unet.modules() if isinstance(m, nn.Conv2d))
        nn.init.normal_(last.weight, std=1e-5)  # starts near the identity, as VoxelMorph does
        nn.init.zeros_(last.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> georeg.Output:
        """The field, as the only stage of an output that GeoReg's objective understands."""
        field = self.unet(torch.cat([moving, fixed], 1))
        return georeg.Output(field, (georeg.Stage(0, 1, field),))


def count(network: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in network.parameters())


def unet_like(network: nn.Module) -> UNet:
    """The U-Net whose number of parameters is nearest to that of ``network``."""
    return UNet(min(range(24, 49), key=lambda w: abs(count(UNet(w)) - count(network))))


VARIANTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "GeoReg": (georeg.GeoReg, supervise),
    "linear interpolation": (lambda: georeg.GeoReg(interpolation=0), supervise),
    "feature warping": (lambda: georeg.GeoReg(interpolation=0, warp_features=True), supervise),
    "no deep supervision": (georeg.GeoReg, final_only),
    "U-Net": (lambda: unet_like(georeg.GeoReg()), one_level),
}


def split_train() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation digits of the embedded training sample."""
    images, digits = datasets.mnist("train")
    held = torch.cat([torch.nonzero(digits == d).flatten()[-VALIDATION:] for d in range(10)])
    mask = torch.ones(len(digits), dtype=torch.bool)
    mask[held] = False
    return (images[mask], digits[mask]), (images[held], digits[held])


def pairs_in_order(images: Tensor, digits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each image as fixed once, with the next of its class as moving: moving, fixed, digit."""
    moving = torch.empty(len(digits), dtype=torch.long)
    for d in digits.unique():
        members = torch.nonzero(digits == d).flatten()
        moving[members] = members.roll(-1)
    return images[moving], images, digits


def training_pairs(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The endless stream of training pairs of one seed."""
    generator = torch.Generator().manual_seed(seed)
    images, digits = split_train()[0]
    return datasets.same_label_pairs(images, digits, batch_size=BATCH, generator=generator)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``(B, 1, H, W)`` over a mask, per pair; NaN where the mask is empty."""
    return (values * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def measure(output: georeg.Output, moving: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """Per-pair measures of the final field, and of what each level adds, one value per pair."""
    warped, field = warp(moving, output.field), output.field
    strokes = fixed > 0.3
    values = {
        "ncc": 1 - similarity.ncc(warped, fixed, reduction="none"),
        "soft_dice": 1 - similarity.soft_dice(warped, fixed, reduction="none"),
        "folding": metrics.folding(field),
        "nda": metrics.nda(field),
    }
    before = torch.zeros_like(field)
    levels = sorted({stage.level for stage in output.stages}, reverse=True)
    coarsest = field
    for level in levels:
        last = [stage for stage in output.stages if stage.level == level][-1]
        after = georeg.to_full_resolution(last, fixed.shape[2:])
        added = after - before
        length = added.norm(dim=1, keepdim=True)
        values |= {
            f"level {level}: displacement on strokes": masked_mean(length, strokes),
            f"level {level}: strokes moved a pixel": masked_mean(length >= 1, strokes),
            f"level {level}: affine share": metrics.affine_share(added),
            f"level {level}: spectral centroid": metrics.spectral_centroid(added),
            f"level {level}: ncc": 1 - similarity.ncc(warp(moving, after), fixed, reduction="none"),
        }
        coarsest, before = (after if level == levels[0] else coarsest), after
    # Second differences exist inside only; background is farther than 3 pixels from any stroke.
    second = field[..., 2:, 1:-1] + field[..., :-2, 1:-1] - 2 * field[..., 1:-1, 1:-1]
    other = field[..., 1:-1, 2:] + field[..., 1:-1, :-2] - 2 * field[..., 1:-1, 1:-1]
    rough = (second.square() + other.square()).sum(1, keepdim=True)
    seen = torch.maximum(fixed, warped) > 0.1
    near = (F.max_pool2d(seen.float(), 7, stride=1, padding=3) > 0)[..., 1:-1, 1:-1]
    length = field.square().sum(1, keepdim=True)[..., 1:-1, 1:-1]
    rest = (field - coarsest).square().sum(1, keepdim=True)[..., 1:-1, 1:-1]
    for name, mask in (("background", ~near), ("near strokes", near)):
        values |= {
            f"{name}: displacement": masked_mean(length.sqrt(), mask),
            f"{name}: roughness": masked_mean(rough, mask),
            f"{name}: explained by the coarsest level": 1
            - masked_mean(rest, mask) / masked_mean(length, mask),
        }
    return values


@torch.no_grad()
def evaluate(network: nn.Module, moving: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """The measures of many pairs, a hundred at a time."""
    batches = zip(moving.split(100), fixed.split(100), strict=True)
    parts = [measure(network(m, f), m, f) for m, f in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def by_digit(values: Tensor, digits: Tensor) -> list[float]:
    """Mean over the pairs of each digit, 0 to 9: the clusters of every interval."""
    return [round(float(values[digits == d].nanmean()), 6) for d in range(10)]


def means(network: nn.Module, pairs: tuple[Tensor, ...]) -> dict[str, float]:
    """Mean of the measures that the curves show."""
    network.eval()
    values = evaluate(network, *pairs[:2])
    network.train()
    return {k: round(float(values[k].mean()), 5) for k in ("ncc", "soft_dice", "folding", "nda")}


def watched(
    network: nn.Module, seed: int, every: int, curve: list[dict[str, float]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training pairs; every so many steps the network is measured on the validation pairs."""
    validation = pairs_in_order(*split_train()[1])
    for step, batch in enumerate(training_pairs(seed)):
        if step and step % every == 0:
            start = time.process_time()
            curve.append({"step": step} | means(network, validation))
            curve[-1]["seconds"] = round(time.process_time() - start, 3)
        yield batch


def train(variant: str, seed: int, lr: float, steps: int) -> tuple[nn.Module, dict[str, Any]]:
    """One network, and how it came about."""
    torch.set_num_threads(1)
    make, objective = VARIANTS[variant]
    torch.manual_seed(seed)
    network = make()
    curve: list[dict[str, float]] = []
    cpu = time.process_time()
    pairs = watched(network, seed, max(1, steps // 4), curve)
    fit(network, pairs, objective, steps=steps, lr=lr, progress=False)
    cpu = time.process_time() - cpu - sum(point["seconds"] for point in curve)
    curve.append({"step": steps} | means(network, pairs_in_order(*split_train()[1])))
    settings = {"lr": lr, "steps": steps, "batch": BATCH, "regularity_weight": REGULARITY}
    return network, {
        "variant": variant,
        "seed": seed,
        "settings": settings,
        "parameters": count(network),
        "seconds": round(cpu, 1),
        "validation": curve,
    }


def step_seconds(rounds: int = 5, steps: int = 8) -> dict[str, float]:
    """CPU seconds of a training step of each variant on one thread: the median of some rounds."""
    torch.set_num_threads(1)
    networks = {variant: make() for variant, (make, _) in VARIANTS.items()}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds + 1):
        for variant, network in networks.items():
            start = time.process_time()
            fit(network, training_pairs(0), VARIANTS[variant][1], steps=steps, progress=False)
            times[variant].append((time.process_time() - start) / steps)
    return {variant: statistics.median(values[1:]) for variant, values in times.items()}


def sweep_run(variant: str, seed: int, lr: float, steps: int) -> dict[str, Any]:
    """One run of the sweep: validation only."""
    return train(variant, seed, lr, steps)[1]


def test_run(variant: str, seed: int, lr: float, steps: int) -> dict[str, Any]:
    """One run of the ablation, measured once on the test pairs."""
    network, record = train(variant, seed, lr, steps)
    moving, fixed, digits = pairs_in_order(*datasets.mnist("test"))
    values = evaluate(network, moving, fixed)
    test = {name: by_digit(value, digits) for name, value in values.items()}
    return record | {"test": test}


def task_of(run: dict[str, Any]) -> tuple[str, int, float, int]:
    """The arguments of a run that is done."""
    return run["variant"], run["seed"], run["settings"]["lr"], run["settings"]["steps"]


def run_missing(
    path: Path,
    head: dict[str, Any],
    run: Callable[..., dict[str, Any]],
    tasks: list[tuple[str, int, float, int]],
) -> None:
    """Run the tasks that ``path`` does not hold, one per core; the file grows run by run."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {task_of(r) for r in runs}
    if not done <= set(tasks):
        raise SystemExit(f"{path}: holds runs of other settings; move it away first")
    workers = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=workers) as pool:
        futures = [pool.submit(run, *task) for task in tasks if task not in done]
        for future in as_completed(futures):
            record = future.result() | {"provenance": provenance()}
            runs = sorted([*runs, record], key=lambda r: tasks.index(task_of(r)))
            write_json(path, head | {"runs": runs})
            print(f"{len(runs)}/{len(tasks)}", *task_of(record), record["validation"][-1])


def sweep(seconds: float) -> None:
    """Learning rates on the validation digits, and the step time of every variant."""
    path = RESULTS / "georeg_mnist_sweep.json"
    times = json.loads(path.read_text())["step_seconds"] if path.exists() else step_seconds()
    head = {"script": "data_scripts/georeg_mnist.py sweep", "step_seconds": times}
    tasks = [(v, 0, lr, round(seconds / times[v])) for v in VARIANTS for lr in RATES]
    run_missing(path, head, sweep_run, tasks)


def ablation(seconds: float, seeds: int) -> None:
    """Every variant and seed at its best learning rate, for the same time, on the test pairs."""
    swept = json.loads((RESULTS / "georeg_mnist_sweep.json").read_text())
    rates = {
        variant: max(
            (run for run in swept["runs"] if run["variant"] == variant),
            key=lambda run: run["validation"][-1]["ncc"],
        )["settings"]["lr"]
        for variant in VARIANTS
    }
    moving, fixed, digits = pairs_in_order(*datasets.mnist("test"))
    unregistered = {
        "ncc": by_digit(1 - similarity.ncc(moving, fixed, reduction="none"), digits),
        "soft_dice": by_digit(1 - similarity.soft_dice(moving, fixed, reduction="none"), digits),
    }
    head = {
        "script": "data_scripts/georeg_mnist.py ablation",
        "seconds_budget": seconds,
        "unregistered": unregistered,
    }
    tasks = [
        (variant, seed, rates[variant], round(seconds / swept["step_seconds"][variant]))
        for seed in range(seeds)
        for variant in VARIANTS
    ]
    run_missing(RESULTS / "georeg_mnist_ablation.json", head, test_run, tasks)


def weights(steps: int, seed: int) -> None:
    """Train the network that travels with the package, and keep its curves."""
    lr = 2e-3
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = georeg.GeoReg()
    validation = [{"step": 0} | means(network, pairs_in_order(*split_train()[1]))]
    start, cpu = time.perf_counter(), time.process_time()
    history = fit(network, watched(network, seed, 100, validation), supervise, steps=steps, lr=lr)
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    validation.append({"step": steps} | means(network, pairs_in_order(*split_train()[1])))
    settings = {"lr": lr, "steps": steps, "batch": BATCH, "regularity_weight": REGULARITY}
    record = {
        "script": f"data_scripts/georeg_mnist.py weights --steps {steps} --seed {seed}",
        "seed": seed,
        "settings": settings,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "provenance": provenance(),
    }
    card = {
        "trained_on": "MNIST, 3,500 digits of the official training set, pairs of the same digit",
        "licence": "weights: Apache-2.0; data: CC BY-SA 3.0 (LeCun and Cortes)",
        "input": {"channels": 1, "range": [0, 1], "size_multiple": network.size_multiple},
    }
    WEIGHTS.parent.mkdir(exist_ok=True)
    georeg.save(network, WEIGHTS, card=card | record)
    every = max(1, steps // 300)
    curve = {k: [round(v, 5) for v in values[::every]] for k, values in history.items()}
    curves = {"curve_every": every, "curve": curve, "validation": validation}
    write_json(RESULTS / "georeg_mnist_training.json", record | curves)
    print(validation[-1], seconds)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    long = commands.add_parser("weights")
    long.add_argument("--steps", type=int, default=3000)
    long.add_argument("--seed", type=int, default=0)
    choose = commands.add_parser("sweep")
    choose.add_argument("--seconds", type=float, default=40.0)
    compare = commands.add_parser("ablation")
    compare.add_argument("--seconds", type=float, default=200.0)
    compare.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    provenance()  # that of the start: the tree may change while networks train
    if options.command == "weights":
        weights(options.steps, options.seed)
    elif options.command == "sweep":
        sweep(options.seconds)
    else:
        ablation(options.seconds, options.seeds)


if __name__ == "__main__":
    main()
