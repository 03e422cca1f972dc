"""DIP on every pair of the table of dip_lgg.py, as a job of ``make gpu``.

    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --pack      # pairs -> one file
    make gpu
    REGLIB_DATA=FOLDER python data_scripts/dip_lgg.py --add FOLDER

The job names a configuration and how many pairs go side by side. It leaves the fields, in steps of
1/256 voxel, which ``--add`` measures like all others and puts into results/dip_lgg.json. Nothing
but torch, numpy and the library is imported, and what is there is not done again.
"""

from __future__ import annotations

import collections
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import ROOT, provenance, write_json, write_npz
from torch import Tensor
from trainings import job_of_queue

from reglib.methods import dip
from reglib.methods.pair import Pair
from reglib.objectives import similarity

PACKED = ROOT / "build" / "dip_lgg" / "pairs.npz"
#: Of a voxel: fields are kept as 16 bits, and what is longer than 128 voxels as that.
UNIT = 1 / 256
#: Pairs whose fields lie in one file: 16 MiB hold 64 of 256 x 256.
IN_A_FILE = 59
RECORD = "fields.json"


def dip_of(settings: dict[str, Any]) -> dip.DIP:
    """The method that words mean: a preset, and what differs from it."""
    own = dict(settings)
    method = dip.PRESETS[own.pop("preset")]
    if "network" in own:
        own["network"] = replace(method.network, **own["network"])
    if "similarity" in own:
        own["similarity"] = getattr(similarity, own["similarity"])
    return replace(method, **own)


def computing_in(dtype: str | None, device: str = "cpu") -> torch.autocast:
    """Networks within compute in a lower precision, such as ``"bfloat16"``; ``None``: as ever."""
    return torch.autocast(device, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)


def fitted(method: dip.DIP, moving: Tensor, fixed: Tensor) -> Tensor:
    """Displacements ``(B, 2, H, W)`` in voxels, of pairs ``(B, 1, H, W)`` side by side."""
    b, _, *shape = fixed.shape
    affine = torch.eye(1 + len(shape), dtype=torch.float64)
    start = fixed.new_zeros(b, len(shape), *shape)
    still = affine.expand(b, -1, -1)
    pair = Pair(moving, fixed, affine, affine, None, None, still, start)
    [last] = collections.deque(method(pair), maxlen=1)
    return last.transform()[1]


def fields_in(folder: Path) -> Tensor:
    """The fields that a job has left so far, in the order of the pairs: ``(N, 2, H, W)``."""
    found = []
    for path in sorted(folder.glob("fields_*.npz")):
        with np.load(path) as file:
            found.append(torch.from_numpy(file["fields"]).float() * UNIT)
    return torch.cat(found) if found else torch.zeros(0)


def pairs_and_digest() -> tuple[list[Tensor], str]:
    """Moving and fixed images in [0, 1], ``(N, 1, H, W)``, and what tells them from others."""
    if not PACKED.is_file():
        raise SystemExit(f"{PACKED.name} is missing: run data_scripts/dip_lgg.py --pack first")
    with np.load(PACKED) as file:
        arrays = [file[part] for part in ("moving", "fixed")]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
    return [torch.from_numpy(array).float() / 65535 for array in arrays], digest


def run(job: dict[str, Any], folder: Path) -> None:
    """Do what is missing of a job.

    Args:
        job: ``name`` and ``settings`` of the configuration, and ``batch``, pairs side by side.
        folder: where fields and the record go: ``seconds`` and ``cpu_seconds`` are shares of a
            pair in its batch, ``machines`` those that took part.
    """
    images, digest = pairs_and_digest()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings, record = job["settings"], folder / RECORD
    known: dict[str, Any] = {"job": job, "pairs": digest, "seconds": [], "cpu_seconds": []}
    known["machines"] = []
    if record.exists():
        known = json.loads(record.read_text())
        if known["pairs"] != digest:
            raise SystemExit(f"{folder}: begun with other pairs; remove it to begin again")
    if provenance() not in known["machines"]:
        known["machines"].append(provenance())
    done = len(known["seconds"])
    fields = fields_in(folder)[:done]  # a file may be one batch ahead of the record
    stored = (fields / UNIT).round().short().numpy()
    method = dip_of(settings["dip"])
    while done < len(images[0]):
        # A batch does not go beyond its file.
        end = min(done + job["batch"], (done // IN_A_FILE + 1) * IN_A_FILE, len(images[0]))
        some = [x[done:end].to(device) for x in images]
        begin, busy = time.perf_counter(), time.process_time()
        with computing_in(settings.get("autocast"), device):
            found = fitted(method, *some).float().cpu()
        seconds = (time.perf_counter() - begin) / (end - done)
        busy = (time.process_time() - busy) / (end - done)
        new = (found / UNIT).round().clamp(-(2**15), 2**15 - 1).short().numpy()
        stored = np.concatenate([stored, new]) if done else new
        number = done // IN_A_FILE
        write_npz(folder / f"fields_{number}.npz", fields=stored[number * IN_A_FILE : end])
        known["seconds"] += [round(seconds, 3)] * (end - done)
        known["cpu_seconds"] += [round(busy, 3)] * (end - done)
        write_json(record, known)
        done = end
        print(f"{done} of {len(images[0])} pairs, {seconds:.1f} s each", flush=True)


if __name__ == "__main__":
    run(*job_of_queue(__doc__))
