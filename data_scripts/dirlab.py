"""Fine-tuning on 4DCT, as Chen et al. (MIDL 2025) do it: DIR-Lab, from scratch and pretrained.

    python data_scripts/dirlab.py FOLDER --check          # are files and landmarks as expected?
    python data_scripts/dirlab.py FOLDER --size small --weights ENCODERS

The images are not ours to give: ask at https://www.dir-lab.com for the ten 4DCT cases (Castillo et
al., Phys. Med. Biol. 54, 2009, doi:10.1088/0031-9155/54/7/001; the cases from 6 on: 55, 2010,
doi:10.1088/0031-9155/55/1/018) and unpack them below FOLDER, in whatever folders they bring. Of
each case are needed the scans T00 (the largest breath) and T50 (the smallest) and the 300 landmarks
of both. ENCODERS holds pretrain-kl-SEED.safetensors of the same size, as pretraining.py writes
them.

T00 is fixed, T50 moving. As in the paper, cases 7 to 10 train and 1 to 6 are tested; images have
224 voxels a side of 1.14 mm (case 1), 1.4 mm (2 to 5) and 1.6 mm; 4 pairs x 400 epochs with Adam
and one flip along a random axis. Not as in the paper: landmarks are carried over as points, not as
centroids of spheres; TRE is that of points between voxels; the last weights are tested once, while
the paper validates on the cases that it reports. What the paper does not say, and is ours: which
scan is fixed, intensities (-1000 to 200 HU), the middle of the scan in the middle of the box, a
learning rate that rises and falls.

Sizes, spacings and the 16 bits are those of the official 4DCT page; the format document there says
that landmarks are voxels counted from 1, at the voxel's centre, along the axes right to left, front
to back and top to bottom. Neither says how the bytes lie in the files. Public loaders read
little-endian signed integers, the first of these axes the fastest, that are HU + 1024. We have not
seen the files, so this is looked at before every training, and by ``--check``: a file must have the
bytes of its case, and both scans must look alike at the landmarks, more than they do with any axis
turned round. ``--check`` prints the range of the stored numbers, and how far apart the landmarks
are, which the paper gives as 3.94, 4.37, 6.98, 9.91, 7.53 and 10.96 mm for cases 1 to 6.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pretraining import WORK, Run, take_encoder
from provenance import ROOT, provenance, write_json
from torch import Tensor, nn

from reglib.data.conform import resample
from reglib.geometry.sampling import warp_points
from reglib.methods import transmorph
from reglib.methods.classical import Velocity
from reglib.methods.network import Network
from reglib.objectives.metrics import folding, ndv
from reglib.objectives.similarity import lncc
from reglib.registration import register
from reglib.training import fit, warm_up
from reglib.weights import load_weights, save_weights

#: Stored numbers that become 0 and 1: -1000 and 200 HU.
WINDOW = (24.0, 1224.0)
TRAIN, TEST = (7, 8, 9, 10), (1, 2, 3, 4, 5, 6)
FIXED, MOVING = "00", "50"
VARIANTS = ("scratch", "kl")


@dataclass(frozen=True)
class Case:
    """A patient: what the raw files do not say themselves, and the grid to work on."""

    shape: tuple[int, ...]  #: voxels, the fastest axis of the file first
    spacing: tuple[float, ...]  #: mm, in the same order
    target: float  #: mm per voxel of the prepared images


def _cases() -> dict[int, Case]:
    slices = (94, 112, 104, 99, 106, 128, 136, 128, 128, 120)
    steps = (0.97, 1.16, 1.15, 1.13, 1.10, 0.97, 0.97, 0.97, 0.97, 0.97)
    targets = (1.14, *(1.4,) * 4, *(1.6,) * 5)
    found = {}
    for n, (count, step, target) in enumerate(zip(slices, steps, targets, strict=True), 1):
        side = 256 if n <= 5 else 512
        found[n] = Case((side, side, count), (step, step, 2.5), target)
    return found


CASES = _cases()

#: ``factor``: voxels of the paper's 224 along each axis that become one.
SIZES: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper", "voxels": 224, "factor": 1, "steps": 1600, "lr": 1e-4},
    "small": {"preset": "small", "voxels": 112, "factor": 2, "steps": 1600, "lr": 4e-4},
    "cpu": {"preset": "tiny", "voxels": 56, "factor": 4, "steps": 400, "lr": 1e-3},
}
for _size, _window in (("paper", 9), ("small", 9), ("cpu", 5)):
    SIZES[_size]["window"] = _window


# --- Files ----------------------------------------------------------------------------------


def find(folder: Path, pattern: str) -> Path:
    """The only file below a folder whose whole name matches, in capitals or not.

    Raises:
        FileNotFoundError: if there is none, or several that differ in name.
    """
    expression = re.compile(pattern, re.IGNORECASE)
    found = sorted(p for p in folder.rglob("*") if p.is_file() and expression.fullmatch(p.name))
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(folder)) for p in found) or "none"
        raise FileNotFoundError(f"{folder}: wanted one file named like {pattern}, got {names}")
    return found[0]


def find_image(folder: Path, number: int, phase: str) -> Path:
    """The raw image of a phase: case1_T00_s.img, case2_T00-ssm.img or case6_T00.img."""
    return find(folder, rf"case{number}_T{phase}([-_]s\w*)?\.img")


def find_landmarks(folder: Path, number: int, phase: str) -> Path:
    """The landmarks of a phase: Case1_300_T00_xyz.txt or case6_dirLab300_T00_xyz.txt."""
    return find(folder, rf"case{number}_(dirLab)?300_T{phase}_xyz\.txt")


def read_raw(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Little-endian int16 without a header; axes in the order of ``shape``, the fastest first.

    Raises:
        ValueError: if the file does not have the size of such an image.
    """
    wanted, came = 2 * int(np.prod(shape)), path.stat().st_size
    if came != wanted:
        sizes = " x ".join(map(str, shape))
        raise ValueError(
            f"{path}: wanted {wanted} bytes, an int16 image of {sizes} voxels, got {came}"
        )
    return np.fromfile(path, dtype="<i2").reshape(tuple(shape), order="F")


def read_landmarks(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Voxel coordinates ``(N, 3)`` from 0, of a text file that counts from 1; axes as ``shape``.

    Raises:
        ValueError: if the file holds anything else than places in the image.
    """
    try:
        points = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: wanted three numbers a line, got others ({error})") from error
    if points.ndim != 2 or points.shape[1:] != (3,) or not len(points):
        raise ValueError(f"{path}: wanted three numbers a line, got shape {points.shape}")
    if points.min() < 1 or (points > np.array(shape)).any():
        raise ValueError(
            f"{path}: wanted voxels from 1 to {tuple(shape)}, got from "
            f"{points.min(0).tolist()} to {points.max(0).tolist()}"
        )
    return points - 1


class Scans(NamedTuple):
    """Both phases of a case as they are stored."""

    moving: np.ndarray
    fixed: np.ndarray
    moving_points: np.ndarray  #: ``(N, 3)``, voxels from 0
    fixed_points: np.ndarray


def read(folder: Path, number: int, case: Case) -> Scans:
    """Both phases of a case and their landmarks.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or is not what it should be.
    """
    phases = (MOVING, FIXED)
    images = [read_raw(find_image(folder, number, phase), case.shape) for phase in phases]
    points = [read_landmarks(find_landmarks(folder, number, phase), case.shape) for phase in phases]
    if points[0].shape != points[1].shape:
        raise ValueError(
            f"case {number}: wanted as many landmarks in both phases, got "
            f"{len(points[0])} and {len(points[1])}"
        )
    return Scans(*images, *points)


def likeness(scans: Scans, turned: Sequence[bool], reach: int = 3) -> float:
    """Mean correlation of the two scans around the landmarks, some axes of these turned round.

    Landmarks nearer than ``reach`` voxels to a border do not count; 0 if none is left.
    """
    last = np.array(scans.fixed.shape) - 1
    around = np.stack(np.meshgrid(*(np.arange(-reach, reach + 1),) * 3), -1).reshape(-1, 3)
    patches = []
    inside = np.ones(len(scans.fixed_points), bool)
    for image, points in (
        (scans.fixed, scans.fixed_points),
        (scans.moving, scans.moving_points),
    ):
        centre = np.where(turned, last - points, points).round().astype(int)
        inside &= ((centre >= reach) & (centre <= last - reach)).all(1)
        at = np.clip(centre[:, None] + around, 0, last)
        patch = np.clip(image[tuple(at.transpose(2, 0, 1))].astype(float), *WINDOW)
        patches.append(patch - patch.mean(1, keepdims=True))
    a, b = patches
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    values = np.divide((a * b).sum(1), norm, out=np.zeros(len(a)), where=norm > 0)[inside]
    return float(values.mean()) if len(values) else 0.0


def check(scans: Scans, number: int) -> float:
    """The likeness of both scans at the landmarks.

    Raises:
        ValueError: if they are clearly more alike with some axis of the landmarks turned round.
    """
    found = {
        turned: likeness(scans, turned) for turned in itertools.product((False, True), repeat=3)
    }
    best, own = max(found, key=found.__getitem__), found[False, False, False]
    if found[best] > own + 0.05:  # a smooth motion of smooth images could be as alike by chance
        axes = [axis for axis, turn in enumerate(best) if turn]
        raise ValueError(
            f"case {number}: wanted scans that look alike at the landmarks, got a correlation of "
            f"{own:.2f}, and {found[best]:.2f} with axes {axes} turned round: file and landmarks "
            f"count differently"
        )
    return own


# --- Preparation ----------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A case on its grid. The world is that of the raw file: mm from its first voxel."""

    moving: Tensor  #: ``(1, 1, *S)``, from 0 to 1
    fixed: Tensor
    moving_points: Tensor  #: ``(1, N, 3)``, voxels of the grid, float32
    fixed_points: Tensor
    spacing: float  #: mm per voxel of the grid
    outside: int  #: landmarks of either phase that are not on the grid


def prepare(scans: Scans, case: Case, size: Mapping[str, Any]) -> Prepared:
    """Resample a case to a cube of voxels of one size about the middle of the scan."""
    spacing, side = case.target * size["factor"], int(size["voxels"])
    steps = torch.tensor(case.spacing, dtype=torch.float64)
    middle = (torch.tensor(case.shape, dtype=torch.float64) - 1) / 2 * steps
    old = torch.diag(torch.cat([steps, torch.ones(1, dtype=torch.float64)]))
    new = torch.eye(4, dtype=torch.float64) * torch.tensor([spacing] * 3 + [1.0])
    new[:3, 3] = middle - (side - 1) / 2 * spacing
    images = []
    for raw in (scans.moving, scans.fixed):
        low, high = WINDOW
        stored = torch.from_numpy(np.ascontiguousarray(raw)).float()
        seen = ((stored - low) / (high - low)).clamp(0, 1)
        images.append(resample(seen[None, None], old, new, (side,) * 3))
    points = [
        ((torch.from_numpy(p) * steps - new[:3, 3]) / spacing).float().unsqueeze(0)
        for p in (scans.moving_points, scans.fixed_points)
    ]
    outside = sum(int(((p < 0) | (p > side - 1)).any(2).sum()) for p in points)
    return Prepared(*images, *points, spacing, outside)


def landmark_errors(case: Prepared, field: Tensor | None = None) -> Tensor:
    """Mm from where a field carries the fixed landmarks to the moving ones, ``(N,)``."""
    reached = case.fixed_points
    if field is not None:
        reached = warp_points(reached, field.to(reached))
    return (reached - case.moving_points).norm(dim=2)[0] * case.spacing


class Pairs:
    """The training pairs in random order, each flipped along a random axis.

    An epoch shows every pair once. It can be stopped and gone on with.
    """

    def __init__(self, cases: Sequence[Prepared], seed: int, device: str) -> None:
        self.pairs = [(c.moving.to(device), c.fixed.to(device)) for c in cases]
        self.generator = torch.Generator().manual_seed(seed)
        self.left: list[int] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            if not self.left:
                self.left = torch.randperm(len(self.pairs), generator=self.generator).tolist()
            moving, fixed = self.pairs[self.left.pop()]
            axis = 2 + int(torch.randint(3, (), generator=self.generator))
            yield moving.flip(axis), fixed.flip(axis)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"generator": self.generator.get_state(), "left": list(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"].cpu())
        self.left = list(state["left"])


# --- Training and testing -------------------------------------------------------------------


def new_network(size: Mapping[str, Any], seed: int, encoder: Path | None) -> transmorph.TransMorph:
    """An untrained network; with ``encoder``, that of its encoder is the pretrained one."""
    torch.manual_seed(seed)
    network = transmorph.TransMorph(transmorph.PRESETS[size["preset"]])
    if encoder is not None:
        take_encoder(network, load_weights(encoder)[0])
    return network


def train(
    network: transmorph.TransMorph,
    cases: Sequence[Prepared],
    size: Mapping[str, Any],
    seed: int,
    checkpoint: Path | None = None,
) -> dict[str, list[float]]:
    """Train the network in place, with the loss of pretraining.py's fine-tuning."""
    similarity = functools.partial(lncc, window=size["window"])
    device = str(next(network.parameters()).device)
    return fit(
        network,
        Pairs(cases, seed, device),
        functools.partial(transmorph.objective, similarity=similarity),
        steps=size["steps"],
        lr=size["lr"],
        optimiser=functools.partial(torch.optim.Adam, amsgrad=True),
        schedule=warm_up,
        checkpoint=checkpoint,
        progress=False,
    )


@torch.no_grad()
def test(network: nn.Module, case: Prepared, refine: bool) -> dict[str, Any]:
    """Register a case: its landmark errors before and after, and after a velocity beside that."""
    device = next(network.parameters()).device
    moving, fixed = case.moving.to(device), case.fixed.to(device)
    network.eval()
    begin = time.perf_counter()
    field = network(moving, fixed).field
    found: dict[str, Any] = {"outside": case.outside, "before": summary(landmark_errors(case))}
    found["after"] = summary(landmark_errors(case, field.cpu()))
    found |= {"seconds": round(time.perf_counter() - begin, 3), "folding": float(folding(field))}
    found["ndv"] = float(ndv(field))
    if refine:
        with torch.enable_grad():
            # Voxels of 1 mm, as far as the method is told: its levels are voxels of the grid.
            both = register(moving, fixed, [Network(network, {}), Velocity()], progress=False)
        found["refined"] = summary(landmark_errors(case, both.field.cpu()))
    return found


def summary(errors: Tensor) -> dict[str, float]:
    """Mean and standard deviation in mm, as these data are reported."""
    return {"mean": round(float(errors.mean()), 4), "std": round(float(errors.std()), 4)}


def run(
    folder: Path,
    size: Mapping[str, Any],
    weights: Path,
    work: Path,
    *,
    cases: Mapping[int, Case] = CASES,
    train_on: Sequence[int] = TRAIN,
    test_on: Sequence[int] = TEST,
    variants: Sequence[str] = VARIANTS,
    seeds: Sequence[int] = (0,),
    refine: bool = False,
) -> Iterator[dict[str, Any]]:
    """Train and test every variant and seed; a record of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    prepared = {}
    for number in (*train_on, *test_on):
        scans = read(folder, number, cases[number])
        check(scans, number)
        prepared[number] = prepare(scans, cases[number], size)
    for seed, variant in itertools.product(seeds, variants):
        encoder = None
        if variant != "scratch":
            encoder = weights / f"{Run('pretrain', variant, seed).name}.safetensors"
        network = new_network(size, seed, encoder).to(device)
        name = f"dirlab-{variant}-{seed}"
        history = train(
            network, [prepared[n] for n in train_on], size, seed, work / f"{name}.checkpoint"
        )
        save_weights(network, work / f"{name}.safetensors", {"run": name})
        every = max(1, size["steps"] // 100)
        yield {
            "run": name,
            "variant": variant,
            "seed": seed,
            "seconds": round(history["seconds"][-1], 1),
            "curve_every": every,
            "curve": [round(x, 5) for x in history["loss"][::every]],
            "cases": {str(n): test(network, prepared[n], refine) for n in test_on},
            "provenance": provenance(),
        }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="below which the cases are unpacked")
    parser.add_argument("--check", action="store_true", help="look at the files, and no more")
    parser.add_argument("--size", choices=tuple(SIZES), default="paper")
    parser.add_argument("--weights", type=Path, help="pretrained encoders of this size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--refine", action="store_true", help="a velocity after the network, too")
    options = parser.parse_args()
    if options.check:
        for number, case in CASES.items():
            scans = read(options.folder, number, case)
            alike, ready = check(scans, number), prepare(scans, case, SIZES["cpu"])
            before = summary(landmark_errors(ready))
            print(
                f"case {number}: stored {scans.fixed.min()} to {scans.fixed.max()}, "
                f"{len(scans.fixed_points)} landmarks {before['mean']:.2f} +- {before['std']:.2f} "
                f"mm apart, {ready.outside} outside the grid, correlation there {alike:.2f}"
            )
        return
    provenance()  # that of the start: the tree may change while networks train
    size, work = SIZES[options.size], WORK / f"dirlab_{options.size}"
    head = {"script": f"data_scripts/dirlab.py FOLDER --size {options.size}", "settings": size}
    runs: list[dict[str, Any]] = []
    for record in run(
        options.folder,
        size,
        options.weights or WORK / options.size,
        work,
        variants=options.variants,
        seeds=options.seeds,
        refine=options.refine,
    ):
        runs.append(record)
        write_json(ROOT / "results" / f"dirlab_{options.size}.json", head | {"runs": runs})
        print(record["run"], {n: c["after"]["mean"] for n, c in record["cases"].items()})


if __name__ == "__main__":
    main()
