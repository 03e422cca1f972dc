"""Laves, Ihler and Ortmaier's table on brains of TCGA-LGG: DIP beside SimpleITK, ANTs and ours.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py

registers the middle slices of consecutive test patients and writes results/dip_lgg.json. Leave the
machine alone meanwhile: seconds count. A stopped run goes on where it was, at the next pair. The
paper's network, which takes hours, comes last: the file is written before it, and says what is
missing, and again when nothing is. Called once more with ``--only DIP``, a run that was stopped in
between writes what there is.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --split tuning --pairs 2

is for development: other patients, nothing in results/.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --sensitivity

measures DIP on every other pair of tuning patients, one setting changed at a time, and how long
pairs take side by side (leave the machine alone meanwhile: that is the last but one part), and the
paper's network in both precisions, and writes results/dip_lgg_sensitivity.json.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --pack
    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --add gpu_out/800_dip_lgg

writes what dip_lgg_job.py needs to put the paper's network through all pairs on a GPU, and measures
what comes back.

Pairs: patient i is moving to patient i + 1, in the order of the committed split, which is by
patient; T1 and FLAIR are registered apart, so that everyone sees the same. Where the T1 of one is a
copy of its FLAIR the pair is in a set of its own. Everyone, peers included, is given the moving
image as the library's Affine has placed it, and measured from the displacement field that comes
back. If that placement changes, all has to be measured anew: ``--again`` then takes the names of
all configurations, and "unregistered".

SimpleITK does what the paper says of its baseline, with the settings of SimpleITK's own example of
a displacement field, but for the affine part, which is done. "DIP" optimises SSIM, by which it is
judged here; "DIP, mean absolute error" optimises what the paper does, with the same network. The
paper's network takes many minutes a pair on a CPU: it convolves in bfloat16, which halves them, has
no cap, and sees ten pairs of T1 with noise that is drawn anew in every step, as the paper says, and
two of them with noise that is kept but for a little that is added, as in the deep image prior.
Processes, clocks and records are those of benchmark_classical.py. Each configuration sees the test
pairs once; ``runs`` is the ledger.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from benchmark_classical import (
    CAP,
    SPLITS,
    Case,
    Loaded,
    Register,
    Workers,
    known_or_stop,
    make_environment,
    measure_all,
    regularity,
    run_reglib,
    versions,
)
from benchmark_record import (
    UNREGISTERED,
    Key,
    Record,
    Row,
    compare,
    differences,
    fingerprint,
    key,
)
from brains import scaled
from dip_lgg_job import PACKED, RECORD, computing_in, dip_of, fields_in, pairs_and_digest
from provenance import ROOT, committed_or_stop, provenance, write_json, write_npz
from scipy import ndimage
from torch import Tensor

from reglib.data.assets import fetch
from reglib.data.nifti import Image, read_image
from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp, warp_labels
from reglib.methods import classical
from reglib.objectives import similarity
from reglib.objectives.metrics import dice, jacobian_statistics, ssim
from reglib.registration import register

WORK = ROOT / "build" / "dip_lgg"
RESULTS = ROOT / "results" / "dip_lgg.json"
SENSITIVITY = ROOT / "results" / "dip_lgg_sensitivity.json"

CHANNELS = ("T1", "FLAIR")
STRUCTURES = ["head", "tumour"]
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
    "splits.json; set 'T1 copies': the T1 of one of the two is a copy of its FLAIR.",
    "input": "each channel: least value to 0, 99th percentile to 1, clipped; 256 x 256; the moving "
    "image resampled once by reglib's Affine (both channels, correlation), alike for all.",
    "ssim": "Gaussian window of 11 voxels, data range 1, mean over the whole slice, of the moving "
    "image warped by the field that came back; a pair that failed counts as unregistered.",
    "masks": "head: either channel above 0.05, largest part, holes filled; tumour: as published. "
    "Warped nearest. Tumours of two patients do not correspond: tumour_area is the area of the "
    "warped mask over that of the moving one.",
    "mean_dice": "of the head masks.",
    "interval": f"95 %, percentile bootstrap, blocks of {BLOCK} consecutive pairs are drawn whole; "
    "neighbouring blocks share a patient.",
    "threads": peers.THREADS,
    "cap_seconds": CAP,
}


# --- Configurations -------------------------------------------------------------------------

#: SimpleITK's example of a displacement field, at full resolution in the end.
ITK: dict[str, Any] = {
    "radius": 4,
    "shrink": [3, 2, 1],
    "sigma_mm": [2, 1, 1],
    "variance_update": 0.0,
    "variance_total": 1.5,
    "learning_rate": 1.0,
    "iterations": 300,
}

ANTS: dict[str, Any] = {
    "type_of_transform": "SyNOnly",
    "syn_metric": "CC",
    "syn_sampling": 2,
    "reg_iterations": [100, 100, 50],
}

#: What stands in the table for DIP; chosen on tuning pairs.
CHOSEN: dict[str, Any] = {"preset": "fast", "similarity": "dssim", "pool": 8}
#: The paper's network: as its text says, and with noise that stays but for a little that is added.
PAPERS: dict[str, dict[str, Any]] = {
    name: {"package": "reglib", "dip": {"preset": "paper"} | change, "autocast": "bfloat16"}
    for name, change in (
        ("DIP, paper", {}),
        ("DIP, paper, noise kept", {"input_mode": "fixed+noise"}),
    )
}
#: Of the pairs that each of them sees on a CPU, where one takes more than ten minutes.
LISTED = {"DIP, paper": 10, "DIP, paper, noise kept": 2}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SimpleITK displacement field": {"package": "SimpleITK", "displacement": ITK},
    "ANTsPy SyN CC": {"package": "antspyx", "seed": 0, "registration": ANTS},
    "reglib velocity": {"package": "reglib", "methods": {"Velocity": {}}},
    "DIP": {"package": "reglib", "dip": CHOSEN},
    "DIP, mean absolute error": {"package": "reglib", "dip": CHOSEN | {"similarity": "mae"}},
} | PAPERS

#: What is measured in both precisions: the beginning of what the paper's network does.
PRECISION: dict[str, Any] = {"preset": "paper", "steps": 200, "patience": None}

#: What differs from ``CHOSEN``, one thing at a time.
CHANGES: dict[str, dict[str, Any]] = {
    "as chosen": {},
    **{name: {"similarity": name} for name in ("mae", "ncc", "lncc")},
    **{f"learning rate {lr:g}": {"lr": lr} for lr in (5e-4, 1e-3, 4e-3, 1e-2)},
    **{f"scale {s:g}": {"scale": s} for s in (0.5, 1.0, 4.0, 12.75)},
    **{f"input {mode}": {"input_mode": mode} for mode in ("fixed+noise", "resample")},
    # Of nodes every eight voxels of 256 there are 32: they can be halved three times.
    "1 scale of 3": {"network": {"channels": [16], "skips": [4]}},
    "2 scales of 3": {"network": {"channels": [16, 32], "skips": [4, 4]}},
    "no skips": {"network": {"skips": [0] * 5}},
    **{f"nodes every {p} voxels": {"pool": p} for p in (2, 4, 16)},
    **{f"{n} steps": {"steps": n, "patience": None} for n in (100, 1000)},
    "displacement": {"squarings": 0},
    "no regard to folding": {"folding": None, "patience": None},
    "diffusion 0.01": {"regularity_weight": 0.01},
}


def methods_of(settings: dict[str, Any]) -> list[Any]:
    """What :func:`reglib.registration.register` is given."""
    if "dip" in settings:
        return [dip_of(settings["dip"])]
    return [getattr(classical, name)(**own) for name, own in settings["methods"].items()]


run_ours = functools.partial(run_reglib, methods_of=methods_of)


def run_here(files: dict[str, Path], name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Register what lies in ``files`` in this process, however long it takes."""
    with computing_in(settings.get("autocast")):
        watch = run_ours(*(str(files[part]) for part in ("moving", "fixed", "field")), settings)
    return {"seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds}


def artificial_pair() -> tuple[Image, Image]:
    """Waves, and the same 1.5 voxels further along: something to warm up with."""
    x = identity_grid((72, 64))

    def image(shift: float) -> Image:
        a, b = (x[:, :1] + shift) / 9, x[:, 1:] / 7
        return Image((a.sin() + b.cos() + (a + b).sin()) / 6 + 0.5, AFFINE)

    return image(1.5), image(0.0)


# --- Pairs ----------------------------------------------------------------------------------


@functools.cache
def index() -> dict[str, dict[str, str]]:
    """What index.csv says of the middle slice of every patient."""
    with open(fetch("lgg") / "index.csv", newline="") as file:
        return {row["patient"]: row for row in csv.DictReader(file) if row["kind"] == "mid"}


def pairs_of(patients: Sequence[str], copies: set[str]) -> list[Case]:
    """Every patient to the next; pairs that a patient of ``copies`` takes part in lie apart."""
    found = []
    for n, (moving, fixed) in enumerate(itertools.pairwise(patients)):
        t1 = "T1 copies" if {moving, fixed} & copies else "T1"
        found += [Case(name, moving, fixed, n // BLOCK) for name in (t1, "FLAIR")]
    return found


def cases(split: str) -> list[Case]:
    """The pairs of a part of the split."""
    copies = {name for name, row in index().items() if row["has_pre_contrast"] != "1"}
    return pairs_of(json.loads(SPLITS.read_text())["lgg"][split], copies)


def listed(everything: Sequence[Case], count: int = 10) -> list[Case]:
    """So many of the ten that the paper's own network sees on a CPU."""
    found = [case for case in everything if case.set == "T1"]
    ten = found[:: max(len(found) // 10, 1)][:10]
    return ten[:: max(len(ten) // count, 1)][:count]


def load_slice(patient: str) -> tuple[Tensor, Tensor]:
    """A patient's middle slice, T1 and FLAIR, and masks of head and tumour: ``(1, 2, H, W)``."""
    row, folder = index()[patient], fetch("lgg") / "png"
    colours = read_image(folder / row["image"]).tensor
    image = torch.cat([scaled(colours[:, c : c + 1]) for c in range(len(CHANNELS))], 1)
    tumour = read_image(folder / row["mask"]).tensor[:, :1] > 0
    return image, torch.cat([head_mask(image), tumour], 1).long()


def head_mask(image: Tensor) -> Tensor:
    """Where either channel shows something: the largest part, holes filled, ``(1, 1, H, W)``."""
    bright = (image > 0.05).any(1)[0].numpy()
    parts, count = ndimage.label(ndimage.binary_opening(bright, iterations=2))
    if count:
        sizes = ndimage.sum_labels(bright, parts, range(1, count + 1))
        bright = parts == 1 + int(sizes.argmax())
    return torch.from_numpy(ndimage.binary_fill_holes(bright))[None, None]


@functools.lru_cache(maxsize=64)
def placed(moving: str, fixed: str) -> Loaded:
    """A pair in both channels, its moving side placed by an affine transform."""
    (image, masks), (fixed_image, fixed_masks) = load_slice(moving), load_slice(fixed)
    found = register(image, fixed_image, classical.Affine(), progress=False)
    assert found.warped is not None
    images = Image(found.warped, AFFINE), Image(fixed_image, AFFINE)
    return Loaded(STRUCTURES, *images, found.apply_labels(masks), fixed_masks)


def load(case: Case) -> Loaded:
    """A pair in the channel of its set."""
    both = placed(case.moving, case.fixed)
    c = CHANNELS.index(case.set.split()[0])
    images = (Image(one.tensor[:, c : c + 1], AFFINE) for one in (both.moving, both.fixed))
    return Loaded(STRUCTURES, *images, both.moving_labels, both.fixed_labels)


# --- Measuring ------------------------------------------------------------------------------


def measure(pair: Loaded, u: Tensor) -> dict[str, Any]:
    """Everything about a displacement ``(1, 2, H, W)`` in voxels."""
    fixed, u = pair.fixed.tensor, u.float()
    warped, masks = warp(pair.moving.tensor, u), warp_labels(pair.moving_labels, u)
    weight = pair.fixed_labels[:, :1].to(fixed)
    head, tumour = (
        float(dice(masks[:, k : k + 1], pair.fixed_labels[:, k : k + 1], labels=[1]))
        for k in (0, 1)
    )
    before, after = (int(x[:, 1].sum()) for x in (pair.moving_labels, masks))
    absent = before == 0 or not bool(pair.fixed_labels[:, 1].any())
    determinant = jacobian_statistics(u)
    values = {
        "ssim": ssim(warped, fixed, data_range=1.0),
        "ncc": similarity.ncc(warped, fixed, weight=weight),
        "lncc": similarity.lncc(warped, fixed, weight=weight),
        "det_mean": determinant.mean,
        "det_std": determinant.std,
        "mean_dice": head,
    }
    found = {name: float(f"{float(value):.5g}") for name, value in values.items()}
    return (
        found
        | regularity(u)
        | {
            "tumour_dice": None if absent else round(tumour, 4),
            "tumour_area": round(after / before, 4) if before else None,
        }
    )


MEASURES = ("ssim", "det_mean", "det_std", "folding", "ndv", "mean_dice", "tumour_dice") + (
    "tumour_area",
    "seconds",
)


def means(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean and standard deviation of every measure, where there is one."""
    found: dict[str, Any] = {"pairs": len(rows)}
    for name in MEASURES:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = [float(f"{x:.4g}") for x in (statistics.fmean(values), spread)]
    found["folding_largest"] = max(row["folding"] for row in rows)
    return found


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each set and configuration: means, and how far its SSIM is above that of each other.

    A pair without a field counts as unregistered.
    """
    still = {key(row)[:3]: row for row in rows if row["configuration"] == UNREGISTERED}
    tables: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        whole = row if "ssim" in row else still[key(row)[:3]] | row
        tables.setdefault(row["set"], {}).setdefault(row["configuration"], []).append(whole)
    return {
        name: {
            one: means(own)
            | {"failed": sum(row["timed_out"] or row["failed"] is not None for row in own)}
            | {"above": {other: above(own, table[other]) for other in table if other != one}}
            for one, own in table.items()
        }
        for name, table in tables.items()
    }


def ssim_of(row: Row) -> float:
    """What is compared."""
    return float(row["ssim"])


def above(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """How far the SSIM of one is above that of another, on the pairs that both have."""
    gain, _ = differences(one, other, ssim_of)
    found = compare(one, other, "ssim", ssim_of)
    return found | {"better": sum(x > 0 for x in gain)}


def line(name: str, row: dict[str, Any]) -> str:
    """A row of a table for the terminal."""

    def get(measure: str, place: int = 0) -> float:
        return float(row[measure][place]) if measure in row else float("nan")

    return (
        f"{name:30} {row['pairs']:3d}  SSIM {get('ssim'):5.3f} ± {get('ssim', 1):5.3f}  "
        f"det {get('det_mean'):5.3f} ± {get('det_mean', 1):5.3f}  folding {get('folding'):8.2e}  "
        f"NDA {get('ndv'):8.2e}  head {get('mean_dice'):5.3f}  tumour {get('tumour_dice'):5.3f}  "
        f"{get('seconds'):7.2f} s"
    )


# --- The table ------------------------------------------------------------------------------


def parts(
    everything: Sequence[Case], names: Sequence[str]
) -> list[tuple[list[Case], dict[str, dict[str, Any]]]]:
    """Who sees which pairs: the paper's network, last, those that are listed."""
    quick = {name: CONFIGURATIONS[name] for name in names if name not in PAPERS}
    slow = [name for name in names if name in PAPERS]
    return [
        (list(everything), quick),
        *((listed(everything, LISTED[name]), {name: CONFIGURATIONS[name]}) for name in slow),
    ]


def tasks(cases: Sequence[Case], names: Sequence[str]) -> set[Key]:
    """The rows that are wanted, without registration among them."""
    return {(*case[:3], name) for case in cases for name in (UNREGISTERED, *names)}


def table(split: str, pairs: int | None, only: Sequence[str] | None, again: Sequence[str]) -> None:
    """Register and measure; write the results before the paper's network, and after it."""
    everything = cases(split)[: None if pairs is None else 2 * pairs]
    wanted = [name for name in CONFIGURATIONS if only is None or name in only]
    record = Record(WORK / f"{split}.json", split, RESULTS if split == "test" else None)
    record.forget(again)
    if UNREGISTERED in again:  # other pairs: what was measured elsewhere is of those before
        record.forget(set(record.configurations) - set(CONFIGURATIONS))
    python = make_environment()
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(python, Path(folder), __file__, WORK, warm=artificial_pair()) as workers,
    ):
        here = functools.partial(run_here, workers.files)
        for some, own in parts(everything, wanted):
            if not own:
                continue
            run: Register = here if own.keys() <= PAPERS.keys() else workers.register
            left = tasks(some, list(own)) - record.done
            print(f"{len(left)} registrations; load of this machine now: ", end="")
            print(f"{os.getloadavg()[0]:.1f} (wanted: near 0)", flush=True)
            record.begin(own, left)
            measure_all(record, some, own, workers.files, run, load=load, measure=measure)
            for name, rows in summarise(record.rows).items():
                print(f"\n{name}", *(line(*row) for row in rows.items()), sep="\n")
            if split == "test":
                write(record, everything, python)


def write(record: Record, everything: Sequence[Case], python: Path) -> None:
    """The results, unless more than the paper's network is missing; they say how much of it is."""
    missing = Counter(
        task[3]
        for some, own in parts(everything, list(CONFIGURATIONS))
        for task in tasks(some, list(own)) - record.done
    )
    if set(missing) - set(PAPERS):
        print(f"missing, so that nothing is written: {dict(missing)}")
        return
    head = {"script": "data_scripts/dip_lgg.py", "protocol": PROTOCOL}
    head |= {"versions": versions(python)}
    head |= {"complete": not missing, "missing": dict(missing)}
    head |= {"paper": PAPER, "sets": summarise(record.rows)}
    names = [name for name in CONFIGURATIONS if name not in PAPERS]
    record.finish([case[:3] for case in everything], names, head)
    print(f"written: {RESULTS}", *(f"missing: {n} of {name}" for name, n in missing.items()))


def pack() -> None:
    """Write the test pairs, placed, into one file for machines that only have torch."""
    pairs = [load(case) for case in cases("test")]
    arrays = {
        part: (65535 * torch.cat([getattr(pair, part).tensor for pair in pairs]))
        .round()
        .numpy()
        .astype(np.uint16)
        for part in ("moving", "fixed")
    }
    write_npz(PACKED, **arrays)
    print(f"{PACKED}: {len(pairs)} pairs, {PACKED.stat().st_size / 2**20:.1f} MiB")


def add(folder: Path) -> None:
    """Measure the fields of a finished job, and put them into the results under its own name.

    No table may be measured meanwhile.
    """
    known = json.loads((folder / RECORD).read_text())
    everything, fields, name = cases("test"), fields_in(folder), known["job"]["name"]
    if not len(everything) == len(fields) == len(known["seconds"]):
        raise SystemExit(f"{folder}: wanted {len(everything)} fields, got {len(fields)}")
    if known["pairs"] != pairs_and_digest()[1]:
        raise SystemExit(f"{folder}: its pairs are others than those of {PACKED.name}")
    if name in CONFIGURATIONS:
        raise SystemExit(f"{folder}: {name!r} is measured here; give the job another name")
    rows = []
    times = zip(known["seconds"], known["cpu_seconds"], strict=True)
    for case, u, (seconds, busy) in zip(everything, fields.split(1), times, strict=True):
        row: Row = case._asdict() | {"configuration": name, "seconds": seconds}
        row |= {"cpu_seconds": busy, "timed_out": False, "failed": None}
        rows.append(row | measure(load(case), u))
    record = Record(WORK / "test.json", "test", RESULTS)
    record.forget([name])
    made = known["job"]["settings"] | {"package": "reglib", "batch": known["job"]["batch"]}
    record.begin({name: made}, tasks(everything, [name]))
    # The code is that of the machines, whose commits are told, not of this one.
    del record.configurations[name]["code"]
    record.configurations[name]["machines"] = known["machines"]
    for row in rows:
        record.add(row)
    write(record, everything, make_environment())


# --- What settings are worth ----------------------------------------------------------------


def together(
    pairs: Sequence[Loaded], settings: dict[str, Any], autocast: str | None = None
) -> dict[str, Any]:
    """Means over pairs that are registered as one batch, each with a network of its own."""
    images = (torch.cat([getattr(p, part).tensor for p in pairs]) for part in ("moving", "fixed"))
    begin = time.perf_counter()
    with computing_in(autocast):
        found = register(*images, dip_of(settings), progress=False)
    seconds = (time.perf_counter() - begin) / len(pairs)
    rows = [
        measure(pair, u) | {"seconds": seconds}
        for pair, u in zip(pairs, found.field.split(1), strict=True)
    ]
    return means(rows)


def sensitivity() -> None:
    """DIP on tuning pairs, T1 and FLAIR at once: settings, and pairs side by side."""
    chosen = [case for case in cases("tuning") if case.set == "T1"][::2]
    pairs = [placed(case.moving, case.fixed) for case in chosen]
    path, code = WORK / "sensitivity.json", fingerprint()
    done = json.loads(path.read_text()) if path.exists() else {}
    if done.get("code") != code:  # another version
        done = {"code": code, "settings": {}, "batches": {}, "precision": {}}
    todo = [("settings", name, pairs, CHOSEN | change) for name, change in CHANGES.items()]
    todo += [("batches", str(n), pairs[:n], CHOSEN | {"patience": None}) for n in (1, 2, 4, 8)]
    todo += [("precision", name, pairs[:1], PRECISION) for name in ("bfloat16", "float32")]
    WORK.mkdir(parents=True, exist_ok=True)
    for part, name, some, settings in todo:
        if done[part].get(name, {}).get("of") != settings:
            autocast = name if part == "precision" and name != "float32" else None
            done[part][name] = together(some, settings, autocast) | {"of": settings}
            write_json(path, done)
        print(line(name, done[part][name]), flush=True)
    head = {"script": "data_scripts/dip_lgg.py --sensitivity", "split": "tuning"}
    head |= {"chosen": CHOSEN, "provenance": provenance()}
    for part, name, _, _ in todo:
        # The seconds of side by side are the question; the rest need not have the machine alone.
        row = {k: v for k, v in done[part][name].items() if part == "batches" or k != "seconds"}
        head.setdefault(part, {})[name] = row
    write_json(SENSITIVITY, head)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--pairs", type=int, help="at most so many (tuning)")
    parser.add_argument("--sensitivity", action="store_true", help="what settings are worth")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    parser.add_argument("--pack", action="store_true", help="for a job of make gpu")
    parser.add_argument("--add", type=Path, metavar="FOLDER", help="what such a job left")
    options = parser.parse_args()
    if options.serve:
        peers.serve({"reglib": run_ours})
        return
    torch.set_num_threads(peers.THREADS)
    known_or_stop(options.only or [], CONFIGURATIONS)
    known_or_stop(options.again, [*CONFIGURATIONS, UNREGISTERED])
    if options.split == "test" and options.pairs is not None:
        parser.error("--pairs: the test pairs are measured all together")
    if options.split == "test":
        committed_or_stop()
    if options.pack:
        pack()
    elif options.add is not None:
        add(options.add)
    elif options.sensitivity:
        sensitivity()
    else:
        table(options.split, options.pairs, options.only, options.again)


if __name__ == "__main__":
    main()
