"""GeoReg on MNIST: the embedded weights, and the ablation that the notebook draws.

    python data_scripts/georeg_mnist.py weights [--steps 3000]
    python data_scripts/georeg_mnist.py ablation [--seconds 100] [--seeds 3]

Data: the embedded sample (4,000 digits of the official training set, 1,000 of the test set). The
last 50 training digits of each class are kept apart for validation: settings were chosen on them.
``ablation`` runs each configuration once per seed on the 1,000 test pairs; runs that are already
in the results file are not repeated. Every network gets the same time: the number of steps is the
time over the measured CPU time of a step on one thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data import datasets
from reglib.geometry.sampling import warp
from reglib.methods import georeg
from reglib.objectives import metrics, similarity
from reglib.objectives.regularity import bending
from reglib.training import fit

BATCH, LR = 32, 2e-3
REGULARITY = (1.0, 0.5, 0.25)  # finest level first
VALIDATION = 50  # digits of each class
ABLATION = ROOT / "results" / "georeg_mnist_ablation.json"
TRAINING = ROOT / "results" / "georeg_mnist_training.json"
WEIGHTS = Path(georeg.__file__).parent / georeg.WEIGHTS

supervise = functools.partial(georeg.objective, regularity_weight=REGULARITY)


class UNet(nn.Module):
    """MONAI's VoxelMorph U-Net over the concatenated pair: pooled twice, as GeoReg is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from monai.networks.nets import VoxelMorphUNet

        self.unet = VoxelMorphUNet(
            spatial_dims=2,
            in_channels=2,
            unet_out_channels=width,
            channels=(width,) * 4,
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
    widths = range(40, 81, 2)
    return UNet(min(widths, key=lambda w: abs(count(UNet(w)) - count(network))))


final_only = functools.partial(supervise, deep_supervision=False)


def unet_objective(output: georeg.Output, moving: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """The same similarity and regularity at the one resolution a U-Net has."""
    return {
        "similarity": similarity.ncc(warp(moving, output.field), fixed),
        "regularity": REGULARITY[0] * bending(output.field),
    }


VARIANTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "GeoReg": (georeg.GeoReg, supervise),
    "linear interpolation": (lambda: georeg.GeoReg(interpolation=0), supervise),
    "feature warping": (lambda: georeg.GeoReg(interpolation=0, warp_features=True), supervise),
    "no deep supervision": (georeg.GeoReg, final_only),
    "U-Net": (lambda: unet_like(georeg.GeoReg()), unet_objective),
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


@torch.no_grad()
def evaluate(network: nn.Module, moving: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """Per-pair measures of the final field, and of what each level adds."""
    measures: dict[str, list[Tensor]] = {}
    for m, f in zip(moving.split(200), fixed.split(200), strict=True):
        output = network(m, f)
        warped = warp(m, output.field)
        values = {
            "ncc": 1 - similarity.ncc(warped, f, reduction="none"),
            "soft_dice": 1 - similarity.soft_dice(warped, f, reduction="none"),
            "folding": metrics.folding(output.field),
            "nda": metrics.nda(output.field),
        }
        before = torch.zeros_like(output.field)
        for level in sorted({stage.level for stage in output.stages}, reverse=True):
            last = [stage for stage in output.stages if stage.level == level][-1]
            after = georeg.to_full_resolution(last, f.shape[2:])
            added = after - before
            values[f"level {level}: mean displacement"] = added.norm(dim=1).flatten(1).mean(1)
            values[f"level {level}: affine share"] = metrics.affine_share(added)
            values[f"level {level}: spectral centroid"] = metrics.spectral_centroid(added)
            values[f"level {level}: ncc"] = 1 - similarity.ncc(warp(m, after), f, reduction="none")
            before = after
        for name, value in values.items():
            measures.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in measures.items()}


def by_digit(values: Tensor, digits: Tensor) -> list[float]:
    """Mean over the pairs of each digit, 0 to 9: the clusters of every interval."""
    return [round(float(values[digits == d].mean()), 6) for d in range(10)]


def step_seconds(variant: str) -> float:
    """CPU seconds of one training step on one thread: the fastest of ten."""
    make, objective = VARIANTS[variant]
    network, pairs, times = make(), training_pairs(0), []
    for _ in range(10):
        start = time.process_time()
        fit(network, pairs, objective, steps=1, progress=False)
        times.append(time.process_time() - start)
    return min(times)


def train_and_test(variant: str, seed: int, seconds: float) -> dict[str, Any]:
    """One run of the ablation."""
    make, objective = VARIANTS[variant]
    steps = round(seconds / step_seconds(variant))
    torch.manual_seed(seed)
    network = make()
    start, cpu = time.perf_counter(), time.process_time()
    history = fit(network, training_pairs(seed), objective, steps=steps, lr=LR)
    spent = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    moving, fixed, digits = pairs_in_order(*datasets.mnist("test"))
    measures = evaluate(network, moving, fixed)
    return {
        "variant": variant,
        "seed": seed,
        "parameters": count(network),
        "steps": steps,
        "seconds_budget": seconds,
        "seconds": {name: round(value, 1) for name, value in spent.items()},
        "final_loss": round(float(np.mean(history["loss"][-50:])), 5),
        "test": {name: by_digit(values, digits) for name, values in measures.items()},
        "provenance": provenance(),
    }


def ablation(seconds: float, seeds: int) -> None:
    """Run what is missing of every variant and seed; the results file grows run by run."""
    moving, fixed, digits = pairs_in_order(*datasets.mnist("test"))
    unregistered = {
        "ncc": by_digit(1 - similarity.ncc(moving, fixed, reduction="none"), digits),
        "soft_dice": by_digit(1 - similarity.soft_dice(moving, fixed, reduction="none"), digits),
    }
    runs = json.loads(ABLATION.read_text())["runs"] if ABLATION.exists() else []
    done = {(run["variant"], run["seed"], run["seconds_budget"]) for run in runs}
    for seed in range(seeds):
        for variant in VARIANTS:
            if (variant, seed, seconds) in done:
                continue
            runs.append(train_and_test(variant, seed, seconds))
            settings = {"batch": BATCH, "lr": LR, "regularity_weight": REGULARITY}
            write_json(
                ABLATION,
                {"script": __file__.removeprefix(f"{ROOT}/"), "settings": settings}
                | {"unregistered": unregistered, "runs": runs},
            )
            test = runs[-1]["test"]
            print(variant, seed, {k: round(float(np.mean(v)), 4) for k, v in test.items()})


def weights(steps: int, seed: int) -> None:
    """Train the network that travels with the package, and keep its curves."""
    torch.manual_seed(seed)
    network = georeg.GeoReg()
    moving, fixed, _ = pairs_in_order(*split_train()[1])
    validation: list[dict[str, float]] = []
    start = time.perf_counter()

    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(training_pairs(seed)):
            if step % 100 == 0:
                validation.append({"step": step} | means(network, moving, fixed))
            yield batch

    history = fit(network, watched(), supervise, steps=steps, lr=LR)
    seconds = time.perf_counter() - start
    validation.append({"step": steps} | means(network, moving, fixed))
    card = {
        "trained_on": "MNIST, 3,500 digits of the official training set, pairs of the same digit",
        "licence": "CC BY-SA 3.0 data (LeCun and Cortes); weights Apache-2.0",
        "input": {"channels": 1, "range": [0, 1], "size_multiple": network.size_multiple},
        "training": {"steps": steps, "seed": seed, "batch": BATCH, "lr": LR, "seconds": seconds},
        "script": "data_scripts/georeg_mnist.py weights",
    }
    WEIGHTS.parent.mkdir(exist_ok=True)
    georeg.save(network, WEIGHTS, card=card | {"provenance": provenance()})
    every = max(1, steps // 300)
    curve = {k: [round(v, 5) for v in values[::every]] for k, values in history.items()}
    record = card | {"seconds": seconds, "curve_every": every, "curve": curve}
    write_json(TRAINING, record | {"validation": validation, "provenance": provenance()})
    print(validation[-1], f"{seconds:.0f} s")


def means(network: nn.Module, moving: Tensor, fixed: Tensor) -> dict[str, float]:
    """Mean of the measures that the curves show, on the validation pairs."""
    network.eval()
    measures = evaluate(network, moving, fixed)
    network.train()
    return {k: round(float(measures[k].mean()), 5) for k in ("ncc", "soft_dice", "folding", "nda")}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("weights")
    train.add_argument("--steps", type=int, default=3000)
    train.add_argument("--seed", type=int, default=0)
    compare = commands.add_parser("ablation")
    compare.add_argument("--seconds", type=float, default=100.0)
    compare.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # two runs side by side take no longer than one
    provenance()  # of the start: the tree may change while networks train
    if options.command == "weights":
        weights(options.steps, options.seed)
    else:
        ablation(options.seconds, options.seeds)


if __name__ == "__main__":
    main()
