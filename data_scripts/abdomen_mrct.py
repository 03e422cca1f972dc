"""CT to MR of one abdomen, Learn2Reg's AbdomenMRCT: the paper's table 3 for whoever has the data.

    python data_scripts/abdomen_mrct.py prepare FOLDER
    python data_scripts/abdomen_mrct.py run
    python data_scripts/abdomen_mrct.py score FIELDS

The images are not ours to give: they are at https://learn2reg.grand-challenge.org/Datasets/ (paired
scans of TCIA; Hering et al., IEEE TMI 2023, doi:10.1109/TMI.2022.3213983). FOLDER holds them as
they come, 2 mm, 192 x 160 x 192:

    imagesTr/AbdomenMRCT_0001_0000.nii.gz    MR, fixed (of patient 1)
    imagesTr/AbdomenMRCT_0001_0001.nii.gz    CT, moving
    labelsTr/, masksTr/                      under the same names
    AbdomenMRCT_dataset.json                 says which is fixed, and which pairs are for validation

*prepare* takes the patients of whom there are both images with labels (the paper: eight), checks
that they are as expected, brings intensities to 0 .. 1 (MR from 0 to its 99th percentile, CT from
-200 to 300 HU) and what masks leave out to 0. *run* registers every pair with every configuration
of volumes.py and writes results/abdomen_mrct.json; a stopped run continues. *score* measures fields
from elsewhere: FIELDS/0001.nii.gz and so on, ITK displacement fields on the fixed grid.

Measured are the Dice of liver, spleen and both kidneys and its mean (``mean_dice``), its mean
weighted by the number of voxels that the fixed label map gives to each (``weighted_dice``; the
paper's weights are not known, nor are its figures), and HD95 in mm as Learn2Reg defines it. Nothing
was tuned on these images: we have not seen them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmark_classical
import peers
import torch
import volumes
from benchmark_classical import known_or_stop, measure_file, regularity
from benchmark_record import UNREGISTERED, Record, Row
from brains import scaled
from provenance import ROOT, committed_or_stop
from torch import Tensor
from volumes import CONFIGURATIONS, Case, Loaded, register_all, run_reglib, summarise, table

from reglib.data.nifti import Image, read_image, read_labels, write_image
from reglib.objectives.metrics import dice
from reglib.objectives.surface import hd95

WORK = ROOT / "build" / "abdomen_mrct"
RESULTS = ROOT / "results" / "abdomen_mrct.json"

FIXED, MOVING = "0000", "0001"
#: In the order of their labels, from 1.
STRUCTURES = ("liver", "spleen", "right kidney", "left kidney")
#: Seconds that a pair may take.
CAP = 3600.0
#: Hounsfield units that become 0 and 1.
WINDOW = (-200.0, 300.0)
NAME = re.compile(r"AbdomenMRCT_(\d{4})_(0000|0001)\.nii\.gz")

PROTOCOL = volumes.PROTOCOL | {
    "pairs": "Learn2Reg AbdomenMRCT, patients with both images and labels; CT moving, MR fixed.",
    "intensities": f"MR 0 to its 99th percentile, CT {WINDOW} HU; what masks leave out is 0.",
    "weighted_dice": "weights: voxels of each label in the fixed map.",
    "hd95": "mm, mean over the structures that both maps have; Learn2Reg's definition.",
    "cap_seconds": CAP,
}


# --- Preparation ----------------------------------------------------------------------------


def patients(folder: Path) -> list[str]:
    """Those of whom there are both images and both label maps.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the dataset's JSON has another image fixed.
    """

    def members(part: str) -> set[tuple[str, str]]:
        matches = (NAME.fullmatch(path.name) for path in (folder / part).glob("*.nii.gz"))
        return {(m[1], m[2]) for m in matches if m}

    known = members("imagesTr") & members("labelsTr")
    found = sorted(n for n, modality in known if modality == FIXED and (n, MOVING) in known)
    if not found:
        raise FileNotFoundError(
            f"{folder}: wanted imagesTr and labelsTr with AbdomenMRCT_0001_0000.nii.gz and so on, "
            "got no patient with two images and two label maps"
        )
    path = folder / "AbdomenMRCT_dataset.json"
    if path.exists():
        direction = json.loads(path.read_text()).get("registration_direction")
        if direction not in (None, {"fixed": 0, "moving": 1}):
            raise ValueError(f"{path}: wanted the first modality to be fixed, got {direction}")
    return found


def read(folder: Path, patient: str, modality: str) -> tuple[Image, Image]:
    """An image from 0 to 1 and its labels, on one grid.

    Raises:
        ValueError: if they are not on one grid, or there are other labels than those of
            ``STRUCTURES``.
    """
    name = f"AbdomenMRCT_{patient}_{modality}.nii.gz"
    image, labels = read_image(folder / "imagesTr" / name), read_labels(folder / "labelsTr" / name)
    _check_grid(image, labels, f"labelsTr/{name}")
    numbers = labels.tensor.unique().tolist()
    if not set(numbers) <= set(range(len(STRUCTURES) + 1)) or len(numbers) < 2:
        raise ValueError(f"labelsTr/{name}: wanted labels 1 to {len(STRUCTURES)}, got {numbers}")
    if modality == FIXED:
        values = scaled(image.tensor.clamp(min=0))
    else:
        low, high = WINDOW
        values = ((image.tensor - low) / (high - low)).clamp(0, 1)
    path = folder / "masksTr" / name
    if path.exists():
        mask = read_labels(path)
        _check_grid(image, mask, f"masksTr/{name}")
        values = values * (mask.tensor > 0)
    return Image(values, image.affine), labels


def _check_grid(image: Image, other: Image, name: str) -> None:
    same = image.tensor.shape == other.tensor.shape
    if not same or not torch.allclose(image.affine, other.affine, atol=1e-3):
        raise ValueError(f"{name}: wanted the grid of the image, got another")


def prepare(folder: Path, out: Path) -> list[str]:
    """Write ``out/PATIENT/{moving,fixed}[_labels].nii.gz``; the patients."""
    found = patients(folder)
    for patient in found:
        (out / patient).mkdir(parents=True, exist_ok=True)
        for part, modality in (("moving", MOVING), ("fixed", FIXED)):
            image, labels = read(folder, patient, modality)
            write_image(out / patient / f"{part}.nii.gz", image)
            smaller = Image(labels.tensor.to(torch.uint8), labels.affine)
            write_image(out / patient / f"{part}_labels.nii.gz", smaller)
    return found


# --- Pairs and measures ---------------------------------------------------------------------


def cases(prepared: Path) -> list[Case]:
    """All prepared pairs.

    Raises:
        SystemExit: if there are none.
    """
    found = sorted(path.parent.name for path in prepared.glob("*/fixed_labels.nii.gz"))
    if not found:
        raise SystemExit("nothing is prepared: run data_scripts/abdomen_mrct.py prepare FOLDER")
    return [Case("abdomen", f"{p} CT", f"{p} MR", int(p)) for p in found]


def load(case: Case, prepared: Path) -> Loaded:
    """Read a prepared pair."""
    folder = prepared / f"{case.cluster:04d}"
    images = [read_image(folder / f"{part}.nii.gz") for part in ("moving", "fixed")]
    maps = [read_labels(folder / f"{part}_labels.nii.gz").tensor for part in ("moving", "fixed")]
    return Loaded(*images, STRUCTURES, *maps)


def measure(case: Loaded, u: Tensor) -> dict[str, Any]:
    """Dice, weighted Dice, HD95 and folding of a whole transform in voxels."""
    assert case.fixed_labels is not None
    every = range(1, len(STRUCTURES) + 1)
    labels = volumes.warped_labels(case, u)
    overlap = dice(labels, case.fixed_labels, labels=every)[0].double()
    spacing = case.fixed.affine[:3, :3].norm(dim=0).tolist()
    far = hd95(labels, case.fixed_labels, labels=every, spacing=spacing)[0].double()
    return {
        "mean_dice": round(float(overlap.nanmean()), 5),
        "weighted_dice": round(weighted(overlap, case.fixed_labels), 5),
        "hd95": _number(far[far.isfinite()].mean()),
        "dice": [_number(x) for x in overlap],
        "hd95_of_each": [_number(x) for x in far],
    } | regularity(u)


def weighted(overlap: Tensor, fixed_labels: Tensor) -> float:
    """Dice of each label from 1, weighted by how many voxels the fixed map gives to it."""
    counts = torch.bincount(fixed_labels.flatten().long(), minlength=len(overlap) + 1)
    share = counts[1 : len(overlap) + 1].double()
    # A label that neither map has is no number, and has no weight.
    return float((share * overlap.nan_to_num()).sum() / share.sum())


def _number(x: Tensor) -> float | None:
    value = float(x)
    return round(value, 4) if math.isfinite(value) else None


def score(prepared: Path, fields: Path) -> dict[str, Any]:
    """Rows and summary of the fields of a folder, ``PATIENT.nii.gz``, beside doing nothing.

    Raises:
        FileNotFoundError: if there is none.
    """
    rows: list[Row] = []
    for case in cases(prepared):
        path = fields / f"{case.cluster:04d}.nii.gz"
        if not path.exists():
            continue
        pair = load(case, prepared)
        still = torch.zeros(1, 3, *pair.fixed.tensor.shape[2:])
        plain = {"seconds": 0.0, "timed_out": False, "failed": None} | case._asdict()
        rows.append({"configuration": UNREGISTERED} | plain | measure(pair, still))
        found = measure_file(pair, path, measure)  # type: ignore[arg-type]
        rows.append({"configuration": fields.name} | plain | found)
    if not rows:
        raise FileNotFoundError(f"{fields}: wanted fields named 0001.nii.gz and so on, got none")
    return {"rows": rows} | summarise(rows, [fields.name])


# --- The command line -----------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("prepare").add_argument("folder", type=Path)
    run = verbs.add_parser("run")
    run.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    run.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew")
    verbs.add_parser("score").add_argument("fields", type=Path)
    options = parser.parse_args(words)
    prepared = WORK / "prepared"
    if options.serve:
        peers.serve({"reglib": run_reglib})
    elif options.verb == "prepare":
        print(f"prepared: {', '.join(prepare(options.folder, prepared))}")
    elif options.verb == "score":
        print(table(score(prepared, options.fields)))
    elif options.verb == "run":
        committed_or_stop()
        known_or_stop([*(options.only or []), *options.again], CONFIGURATIONS)
        benchmark_classical.CAP = CAP
        record = Record(WORK / "rows.json", "test", RESULTS)
        record.forget(options.again)
        register_all(
            record,
            cases(prepared),
            CONFIGURATIONS,
            lambda case: load(case, prepared),
            __file__,
            WORK,
            measure=measure,
            head={"script": "data_scripts/abdomen_mrct.py", "protocol": PROTOCOL},
            only=options.only,
        )
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
