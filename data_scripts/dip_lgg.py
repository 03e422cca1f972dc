"""Laves, Ihler and Ortmaier's table on brains of TCGA-LGG: DIP beside ITK, ANTs and ours.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py

registers the middle slices of consecutive test patients and writes results/dip_lgg.json. Leave the
machine alone meanwhile: seconds count.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --split tuning --pairs 2 --sensitivity

is for development: other patients, nothing in results/. ``--sensitivity`` measures DIP with one
setting changed at a time instead, and ``--sensitivity --split tuning`` without ``--pairs`` writes
results/dip_lgg_sensitivity.json.

Pairs: patient i is moving to patient i + 1, in the order of the committed split, which is by
patient. Where the T1 of one is a copy of its FLAIR the pair is in a set of its own. Everyone, peers
included, is given the moving image as the library's Affine has placed it, and measured from the
displacement field that comes back. Peers see one channel, which the name of a configuration says;
DIP can see both.

SimpleITK does what the paper says of its baseline, with the settings of SimpleITK's own example of
a displacement field (METHODS in the book), but for the affine part, which is done. Processes,
clocks and records are those of benchmark_classical.py. Each configuration sees the test pairs once;
``runs`` is the ledger. "DIP, paper" takes many minutes a pair on a CPU: it sees every sixth pair.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_classical
import peers
import torch
from benchmark_classical import MARGIN, Case, Workers, request
from benchmark_record import UNREGISTERED, Record, Row, interval, key
from brains import scaled
from provenance import ROOT, provenance
from scipy import ndimage
from torch import Tensor

from reglib.data.assets import fetch
from reglib.data.nifti import Image, read_field, read_image, write_field, write_image
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import classical, dip
from reglib.objectives.metrics import dice, folding, jacobian_statistics, nda, ssim
from reglib.objectives.similarity import lncc, mae, ncc
from reglib.registration import register

SPLITS = ROOT / "data_scripts" / "splits.json"
WORK = ROOT / "build" / "dip_lgg"
RESULTS = ROOT / "results" / "dip_lgg.json"
SENSITIVITY = ROOT / "results" / "dip_lgg_sensitivity.json"

#: Seconds that a pair may take.
CAP = 7200.0
CHANNELS = ("T1", "FLAIR")
#: Voxels of 1 mm: what they measure matters to nobody.
AFFINE = torch.eye(3, dtype=torch.float64)
#: Pairs in a row that are drawn together for an interval: neighbours share a patient.
BLOCK = 6
#: What the paper says of ITK and of its own method: mean and standard deviation.
PAPER = {
    "ITK": {"ssim": [0.827, 0.096], "det_mean": [1.036, 0.254]},
    "CNN prior": {"ssim": [0.913, 0.051], "det_mean": [1.007, 0.045]},
}

PROTOCOL = {
    "pairs": "middle axial slices of patients that follow one another in the test part of "
    "splits.json; set lgg_copies: the T1 of one of the two is a copy of its FLAIR.",
    "input": "each channel: least value to 0, 99th percentile to 1, clipped; 256 x 256; the moving "
    "image resampled once by reglib's Affine (both channels, correlation), alike for all.",
    "ssim": "Gaussian window of 11 voxels, data range 1, mean over the whole slice and over T1 "
    "and FLAIR, of the moving image warped by the field that came back.",
    "masks": "brain: either channel above 0.05, largest part, holes filled; tumour: as published. "
    "Warped nearest. Tumours of two patients do not correspond: tumour_area is the area of the "
    "warped mask over that of the moving one.",
    "mean_dice": "of the brain masks.",
    "interval": f"95 %, percentile bootstrap, blocks of {BLOCK} consecutive pairs are drawn whole; "
    "neighbouring blocks share a patient.",
    "threads": peers.THREADS,
    "cap_seconds": CAP,
}


# --- Configurations -------------------------------------------------------------------------

#: SimpleITK's example of a displacement field, at full resolution in the end.
ITK_FIELD: dict[str, Any] = {
    "radius": 4,
    "shrink": [3, 2, 1],
    "sigma_mm": [2, 1, 1],
    "variance_update": 0.0,
    "variance_total": 1.5,
    "learning_rate": 1.0,
    "iterations": 300,
}

ANTS: dict[str, Any] = {
    "package": "antspyx",
    "seed": 0,
    "registration": {
        "type_of_transform": "SyNOnly",
        "initial_transform": "identity",
        "syn_metric": "CC",
        "syn_sampling": 2,
        "reg_iterations": [100, 100, 50],
    },
}

#: What stands in the table for DIP; chosen on tuning pairs.
CHOSEN: dict[str, Any] = {"preset": "fast", "pool": 8}
PAPERS = "DIP, paper"


def ours(channel: str, **own: Any) -> dict[str, Any]:
    """A configuration of the library."""
    return {"package": "reglib", "channel": channel} | own


def configurations() -> dict[str, dict[str, Any]]:
    """Those of the table."""
    found: dict[str, dict[str, Any]] = {}
    for channel in CHANNELS:
        itk = {"package": "SimpleITK", "channel": channel, "field": ITK_FIELD}
        found[f"SimpleITK displacement field, {channel}"] = itk
        found[f"ANTsPy SyN CC, {channel}"] = ANTS | {"channel": channel}
    found["reglib displacement"] = ours("both", methods={"Displacement": {}})
    found["reglib velocity"] = ours("both", methods={"Velocity": {}})
    for channel in (*CHANNELS, "both"):
        found[f"DIP, {channel}"] = ours(channel, dip=CHOSEN)
    found[PAPERS] = ours("both", dip={"preset": "paper"})
    return found


def sensitivity() -> dict[str, dict[str, Any]]:
    """DIP as chosen, with one thing changed at a time."""
    changes: dict[str, dict[str, Any]] = {"as chosen": {}}
    changes |= {f"learning rate {lr:g}": {"lr": lr} for lr in (3e-4, 1e-3, 1e-2)}
    changes |= {f"scale {s:g}": {"scale": s} for s in (0.5, 1.0, 4.0, 12.75)}
    changes |= {f"input {m}": {"input_mode": m} for m in ("fixed+noise", "resample")}
    for depth in (1, 2):
        widths = [16, 32][:depth]
        network = {"channels": widths, "skips": [4] * depth}
        changes[f"{depth} scales"] = {"network": network}
    changes["no skips"] = {"network": {"skips": [0] * 5}}
    changes["no normalisation"] = {"network": {"norm": "none", "std": None}}
    changes |= {f"nodes every {p} voxels": {"pool": p} for p in (1, 2, 4)}
    changes |= {f"{n} steps": {"steps": n, "patience": None} for n in (100, 2000)}
    changes["displacement"] = {"squarings": 0}
    changes["no regard to folding"] = {"folding": None, "patience": None}
    changes["diffusion"] = {"regularity_weight": 0.01}
    return {name: ours("both", dip=CHOSEN | change) for name, change in changes.items()}


def dip_of(settings: dict[str, Any]) -> dip.DIP:
    """The method that words mean: a preset, and what differs from it."""
    own = dict(settings)
    method = dip.PRESETS[own.pop("preset")]
    if "network" in own:
        own["network"] = replace(method.network, **own["network"])
    return replace(method, **own)


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    if "dip" in settings:
        return [dip_of(settings["dip"])]
    return [getattr(classical, name)(**own) for name, own in settings["methods"].items()]


# --- Registering ----------------------------------------------------------------------------


def channel_file(folder: Path, part: str, channel: str) -> Path:
    """Where a channel of an image lies; of both channels, the first."""
    return folder / f"{part}_{CHANNELS[0] if channel == 'both' else channel}.nii"


def read_channels(path: str, channel: str) -> Image:
    """An image of one channel, or of both, the first of which lies at ``path``."""
    image = read_image(path)
    if channel != "both":
        return image
    other = Path(path).name.replace(CHANNELS[0], CHANNELS[1])
    second = read_image(Path(path).with_name(other))
    return Image(torch.cat([image.tensor, second.tensor], 1), image.affine)


def run_reglib(moving: str, fixed: str, field: str, settings: dict[str, Any]) -> peers.Watch:
    """Ours, in a process of its own like the peers."""
    m, f = (read_channels(path, settings["channel"]) for path in (moving, fixed))
    methods = methods_of(settings)
    with peers.Watch() as watch:
        found = register(m, f, methods, progress=False)
    write_field(field, found.whole_field(), f.affine, moving_affine=m.affine)
    return watch


def run_itk(moving: str, fixed: str, field: str, settings: dict[str, Any]) -> peers.Watch:
    """The displacement field of the paper's baseline, which goes on from an affine alignment."""
    import SimpleITK as sitk

    own = settings["field"]
    m, f = (sitk.ReadImage(path, sitk.sitkFloat64) for path in (moving, fixed))
    with peers.Watch() as watch:
        still = sitk.TransformToDisplacementField(
            sitk.Transform(f.GetDimension(), sitk.sitkIdentity),
            sitk.sitkVectorFloat64,
            f.GetSize(),
            f.GetOrigin(),
            f.GetSpacing(),
            f.GetDirection(),
        )
        transform = sitk.DisplacementFieldTransform(still)
        transform.SetSmoothingGaussianOnUpdate(
            varianceForUpdateField=own["variance_update"],
            varianceForTotalField=own["variance_total"],
        )
        method = sitk.ImageRegistrationMethod()
        method.SetInitialTransform(transform, inPlace=True)
        method.SetMetricAsANTSNeighborhoodCorrelation(own["radius"])
        method.MetricUseFixedImageGradientFilterOff()
        method.MetricUseMovingImageGradientFilterOff()
        method.SetShrinkFactorsPerLevel(own["shrink"])
        method.SetSmoothingSigmasPerLevel(own["sigma_mm"])
        method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetOptimizerAsGradientDescent(
            learningRate=own["learning_rate"],
            numberOfIterations=own["iterations"],
            estimateLearningRate=method.EachIteration,
        )
        found = method.Execute(f, m)
    peers.sitk_write([found], f, field)
    return watch


class PlaneWorkers(Workers):
    """Workers for plane images of two channels.

    SimpleITK is served by this script too, in a process of its own, as the runner is here; it is
    the package of the project's own environment.
    """

    def __init__(self, peers_python: Path, folder: Path) -> None:
        super().__init__(peers_python, folder, __file__, WORK)
        self.folder, self.warm_folder = folder, folder / "warm"
        self.warm_folder.mkdir()
        write_pair(self.warm_folder, *artificial_pair())

    def worker(self, package: str) -> benchmark_classical.Worker:
        """The worker of a package."""
        if package != "SimpleITK":
            return super().worker(package)
        found = self.running.get(package)
        if found is None or not found.alive:
            own = self.running.pop("reglib", None)
            found = self.running[package] = super().worker("reglib")
            self.running.pop("reglib")
            if own is not None:
                self.running["reglib"] = own
        return found

    def register(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Register the pair that lies in the folder; the field comes to lie there too."""
        worker = self.worker(settings["package"])
        if name not in worker.warm:
            # A few steps warm up as well as all of them.
            few = dict(settings)
            if "dip" in few:
                few["dip"] = few["dip"] | {"steps": 3}
            answer = worker.ask(self.request(few, self.warm_folder), CAP)
            if "seconds" not in answer:
                raise SystemExit(f"{name}: the artificial pair was not registered: {answer}")
            worker.warm.add(name)
        return worker.ask(self.request(settings, self.folder), CAP)

    @staticmethod
    def request(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        """What a worker is asked, about the pair in a folder."""
        files = {
            part: channel_file(folder, part, settings["channel"]) for part in ("moving", "fixed")
        }
        return request(settings, files | {"field": folder / "field.nii.gz"})


def write_pair(folder: Path, moving: Tensor, fixed: Tensor) -> None:
    """A file for each channel of each image."""
    for part, image in (("moving", moving), ("fixed", fixed)):
        for channel, one in zip(CHANNELS, image.split(1, 1), strict=True):
            write_image(channel_file(folder, part, channel), Image(one, AFFINE))


def artificial_pair() -> tuple[Tensor, Tensor]:
    """Waves of two channels, ``(1, 2, 72, 64)``, and the same 1.5 voxels further along."""
    x = identity_grid((72, 64))

    def image(shift: float) -> Tensor:
        a, b = (x[:, :1] + shift) / 9, x[:, 1:] / 7
        return torch.cat([a.sin() + b.cos(), (a + b).sin() - a.cos()], 1) / 4 + 0.5

    return image(1.5), image(0.0)


# --- Pairs ----------------------------------------------------------------------------------


class Slice(NamedTuple):
    """A patient's slice: image ``(1, 2, H, W)``, T1 and FLAIR; mask of the tumour."""

    image: Tensor
    tumour: Tensor


class Loaded(NamedTuple):
    """A pair, the moving side placed by an affine transform; masks are 0 or 1."""

    moving: Tensor
    fixed: Tensor
    moving_masks: Tensor  #: ``(1, 2, H, W)``: brain, tumour
    fixed_masks: Tensor


@functools.cache
def index() -> dict[str, dict[str, str]]:
    """What index.csv says of the middle slice of every patient."""
    with open(fetch("lgg") / "index.csv", newline="") as file:
        return {row["patient"]: row for row in csv.DictReader(file) if row["kind"] == "mid"}


def cases(patients: Sequence[str], copies: set[str]) -> list[Case]:
    """Every patient to the next; pairs that a patient of ``copies`` takes part in lie apart."""
    found = []
    for n, (moving, fixed) in enumerate(itertools.pairwise(patients)):
        name = "lgg_copies" if {moving, fixed} & copies else "lgg"
        found.append(Case(name, moving, fixed, n // BLOCK))
    return found


def all_cases(split: str) -> list[Case]:
    """The pairs of a part of the split."""
    copies = {name for name, row in index().items() if row["has_pre_contrast"] != "1"}
    return cases(json.loads(SPLITS.read_text())["lgg"][split], copies)


def listed(everything: Sequence[Case]) -> list[Case]:
    """Those that the paper's own network sees on a CPU."""
    return [case for case in everything if case.set == "lgg"][::BLOCK]


def load_slice(patient: str) -> Slice:
    """A patient's middle slice."""
    row, folder = index()[patient], fetch("lgg") / "png"
    colours = read_image(folder / row["image"]).tensor
    channels = [scaled(colours[:, c : c + 1]) for c in range(len(CHANNELS))]
    tumour = read_image(folder / row["mask"]).tensor[:, :1]
    return Slice(torch.cat(channels, 1), (tumour > 0).long())


def brain_mask(image: Tensor) -> Tensor:
    """Where either channel shows something: the largest part, holes filled, ``(1, 1, H, W)``."""
    bright = (image > 0.05).any(1)[0].numpy()
    parts, count = ndimage.label(ndimage.binary_opening(bright, iterations=2))
    if count:
        sizes = ndimage.sum_labels(bright, parts, range(1, count + 1))
        bright = parts == 1 + int(sizes.argmax())
    return torch.from_numpy(ndimage.binary_fill_holes(bright)).long()[None, None]


@functools.cache
def load(case: Case) -> Loaded:
    """Read a pair and place its moving side."""
    moving, fixed = load_slice(case.moving), load_slice(case.fixed)
    placed = register(moving.image, fixed.image, classical.Affine(), progress=False)
    masks = [torch.cat([brain_mask(one.image), one.tumour], 1) for one in (moving, fixed)]
    assert placed.warped is not None
    return Loaded(placed.warped, fixed.image, placed.apply_labels(masks[0]), masks[1])


# --- Measuring ------------------------------------------------------------------------------


def measure(pair: Loaded, u: Tensor) -> dict[str, Any]:
    """Everything about a displacement ``(1, 2, H, W)`` in voxels."""
    warped, masks = warp(pair.moving, u), warp_labels(pair.moving_masks, u)
    both = [
        float(ssim(warped[:, c : c + 1], pair.fixed[:, c : c + 1], data_range=1.0))
        for c in range(len(CHANNELS))
    ]
    weight = pair.fixed_masks[:, :1].to(pair.fixed)
    statistics_of = jacobian_statistics(u)
    inside = torch.zeros_like(weight)
    inside[..., MARGIN:-MARGIN, MARGIN:-MARGIN] = 1
    brain, tumour = (
        float(dice(masks[:, k : k + 1], pair.fixed_masks[:, k : k + 1], labels=[1])) for k in (0, 1)
    )
    before, after = (int(x[:, 1].sum()) for x in (pair.moving_masks, masks))
    absent = before == 0 or not bool(pair.fixed_masks[:, 1].any())
    values = {
        "ssim": sum(both) / len(both),
        "ssim_t1": both[0],
        "ssim_flair": both[1],
        "mae": float(mae(warped, pair.fixed)),
        "ncc": float(ncc(warped, pair.fixed, weight=weight)),
        "lncc": float(lncc(warped, pair.fixed, weight=weight)),
        "det_mean": float(statistics_of.mean),
        "det_std": float(statistics_of.std),
        "folding": float(folding(u)),
        "folding_inside": float(folding(u, mask=inside)),
        "ndv": float(nda(u)),
        "mean_dice": brain,
    }
    return {name: float(f"{value:.5g}") for name, value in values.items()} | {
        "tumour_dice": None if absent else round(tumour, 4),
        "tumour_area": round(after / before, 4) if before else None,
    }


def outcome(pair: Loaded, answer: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a row says of a registration that was answered so."""
    if answer.get("timed_out"):
        return {"seconds": CAP, "cpu_seconds": None, "timed_out": True}
    if "error" in answer:
        return {"cpu_seconds": None, "failed": answer["error"]}
    times = {part: round(answer[part], 3) for part in ("seconds", "cpu_seconds")}
    try:
        u, affine = read_field(path)
        same = u.shape[2:] == pair.fixed.shape[2:]
        if not same or not torch.allclose(affine, AFFINE, atol=1e-3):
            raise ValueError(f"{path.name}: wanted a field on the fixed grid, got another")
        return times | measure(pair, u.float())
    except (OSError, ValueError) as error:
        return times | {"failed": f"{type(error).__name__}: {error}"}


def tasks_of(everything: Sequence[Case], names: Sequence[str]) -> list[tuple[Case, str]]:
    """Pair by pair, what is to be measured."""
    few = listed(everything)
    return [
        (case, name)
        for case in everything
        for name in [UNREGISTERED, *names]
        if name != PAPERS or case in few
    ]


def measure_all(
    record: Record,
    tasks: Sequence[tuple[Case, str]],
    wanted: dict[str, dict[str, Any]],
    folder: Path,
    run: Callable[[str, dict[str, Any]], dict[str, Any]],
) -> None:
    """Measure what ``record`` does not hold."""
    left = [(case, name) for case, name in tasks if (*case[:3], name) not in record.done]
    field = folder / "field.nii.gz"
    for number, (case, name) in enumerate(left, 1):
        print(f"{number}/{len(left)} {case.moving} {case.fixed}, {name}", flush=True)
        pair = load(case)
        row: Row = case._asdict() | {"configuration": name}
        row |= {"load": round(os.getloadavg()[0], 2)}
        row |= {"seconds": 0.0, "cpu_seconds": 0.0, "timed_out": False, "failed": None}
        if name == UNREGISTERED:
            row |= measure(pair, torch.zeros(1, 2, *pair.fixed.shape[2:]))
        else:
            write_pair(folder, pair.moving, pair.fixed)
            field.unlink(missing_ok=True)
            row |= outcome(pair, run(name, wanted[name]), field)
        record.add(row)


def together(pairs: Sequence[Loaded], settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of pairs as one batch, each with a network of its own, and what becomes of them."""
    torch.set_num_threads(peers.THREADS)
    moving, fixed = (torch.cat([getattr(p, part) for p in pairs]) for part in ("moving", "fixed"))
    register(*artificial_pair(), dip_of(settings | {"steps": 3}), progress=False)
    begin = time.perf_counter()
    found = register(moving, fixed, dip_of(settings), progress=False)
    seconds = time.perf_counter() - begin
    rows = [measure(p, u) for p, u in zip(pairs, found.whole_field().split(1), strict=True)]
    return {
        "pairs": len(pairs),
        "seconds_a_pair": round(seconds / len(pairs), 3),
        "ssim": round(statistics.fmean(row["ssim"] for row in rows), 4),
    }


# --- Statistics -----------------------------------------------------------------------------

MEASURES = ("ssim", "ssim_t1", "ssim_flair", "mae", "det_mean", "det_std", "folding", "ndv") + (
    "mean_dice",
    "tumour_dice",
    "tumour_area",
    "seconds",
    "cpu_seconds",
)


def by_configuration(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows of each set and configuration; one that has no field counts as unregistered."""
    still = {key(row)[:3]: row for row in rows if row["configuration"] == UNREGISTERED}
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        whole = row if "ssim" in row else still[key(row)[:3]] | row
        found.setdefault(row["set"], {}).setdefault(row["configuration"], []).append(whole)
    return found


def means(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one configuration: mean and standard deviation of every measure, an interval of SSIM."""
    found: dict[str, Any] = {"pairs": len(rows)}
    found["failed"] = sum(row["timed_out"] or row["failed"] is not None for row in rows)
    for name in MEASURES:
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = [float(f"{x:.4g}") for x in (statistics.fmean(values), spread)]
    found["folding_largest"] = max(row["folding"] for row in rows)
    found["ssim_interval"] = interval([r["ssim"] for r in rows], [r["cluster"] for r in rows])
    return found


def above(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """How far the SSIM of one is above that of another, on the pairs that both have."""
    known = {key(row)[:3]: row["ssim"] for row in other}
    both = [row for row in one if key(row)[:3] in known]
    gain = [row["ssim"] - known[key(row)[:3]] for row in both]
    return {
        "pairs": len(gain),
        "ssim": round(statistics.fmean(gain), 4) if gain else None,
        "better": sum(x > 0 for x in gain),
        "interval": interval(gain, [row["cluster"] for row in both]) if gain else None,
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The table of each set, and every configuration of DIP beside all others."""
    tables = by_configuration(rows)
    return {
        name: {
            "table": {configuration: means(own) for configuration, own in table.items()},
            "above": {
                one: {other: above(own, table[other]) for other in table if other != one}
                for one, own in table.items()
                if one.startswith("DIP")
            },
        }
        for name, table in tables.items()
    }


def lines(summary: dict[str, Any]) -> str:
    """The tables for the terminal."""
    text = []
    for name, one in summary.items():
        head = "   n   SSIM           T1  FLAIR  det J           fold %    NDA %  brain  tumour"
        text += ["", name, f"{'':34}{head}     s"]
        for configuration, row in one["table"].items():
            get = functools.partial(_number, row)
            text.append(
                f"{configuration:34}{row['pairs']:4d}  {get('ssim'):5.3f} ± {get('ssim', 1):5.3f}"
                f"  {get('ssim_t1'):5.3f}  {get('ssim_flair'):5.3f}"
                f"  {get('det_mean'):5.3f} ± {get('det_mean', 1):5.3f}"
                f" {100 * get('folding'):8.4f} {100 * get('ndv'):8.4f}"
                f"  {get('mean_dice'):5.3f}  {get('tumour_dice'):5.3f} {get('seconds'):7.2f}"
            )
    return "\n".join(text)


def _number(row: dict[str, Any], name: str, place: int = 0) -> float:
    return float(row[name][place]) if name in row else math.nan


# --- The run --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Register, measure, and write the results when nothing is missing."""
    study, test = options.sensitivity, options.split == "test"
    final = options.pairs is None and (test or study)
    all_of_them = sensitivity() if study else configurations()
    unknown = set(options.only or []) - set(all_of_them)
    if unknown:
        raise SystemExit(f"no such configuration: {sorted(unknown)}; one of {list(all_of_them)}")
    wanted = {n: s for n, s in all_of_them.items() if n in (options.only or all_of_them)}
    everything = all_cases(options.split)
    if options.pairs is not None:
        everything = everything[: options.pairs]
    results = (SENSITIVITY if study else RESULTS) if final else None
    name = "sensitivity" if study else options.split
    record = Record(WORK / f"{name}.json", options.split, results)
    record.forget(options.again)
    tasks = tasks_of(everything, list(wanted))
    record.begin(wanted, {(*case[:3], name) for case, name in tasks})
    print(f"load of this machine now: {os.getloadavg()[0]:.1f} (wanted: near 0)", flush=True)
    python = benchmark_classical.make_environment()
    with tempfile.TemporaryDirectory() as folder, PlaneWorkers(python, Path(folder)) as workers:
        measure_all(record, tasks, wanted, Path(folder), workers.register)
    complete = {(*case[:3], name) for case, name in tasks_of(everything, list(all_of_them))}
    if not final or complete - record.done:
        print(lines(summarise(record.rows)))
        print("development, or something is missing: nothing is written")
        return
    import SimpleITK

    command = [python, peers.__file__, "versions"]
    versions = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    versions |= {"SimpleITK": SimpleITK.Version.VersionString()}
    head: dict[str, Any] = {"script": "data_scripts/dip_lgg.py", "protocol": PROTOCOL}
    head |= {"versions": versions, "paper": PAPER}
    if not study:
        few = [load(case) for case in listed(everything)]
        head["together"] = [together(few[:count], CHOSEN) for count in (1, 2, 5, len(few))]
    names = [n for n in all_of_them if n != PAPERS]
    head["sets"] = summarise(record.rows)
    record.finish([case[:3] for case in everything], names, head)
    print(lines(head["sets"]))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--pairs", type=int, help="at most so many (tuning)")
    parser.add_argument("--sensitivity", action="store_true", help="one setting at a time (tuning)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": run_reglib, "SimpleITK": run_itk})
        return
    if options.split == "test":
        if options.pairs is not None or options.sensitivity:
            parser.error("--pairs, --sensitivity: for the tuning patients")
        if provenance()["uncommitted_changes"]:
            raise SystemExit("commit reglib/ and data_scripts/ first: results name a commit")
    run(options)


if __name__ == "__main__":
    main()
