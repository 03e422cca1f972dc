"""Memory and seconds of a training step of GeoReg, with and without every neighbourhood unfolded.

    python data_scripts/georeg_memory.py                      # writes results/georeg_memory.json;
                                                              # half an hour, 8 GB of memory
    python data_scripts/georeg_memory.py --sizes 32x32x32     # a trial: nothing is written

A step is forward pass, loss and backward pass of one random pair. Every row is measured in a
process of its own; what it held after its imports, with network and images made, does not count.
Beside GeoReg's 3-D preset stand MONAI's VoxelMorphUNet, where MONAI is installed, and TransMorph.
Called again, it measures everything again, and writes when all is done. As a job of ``make gpu``
(``--settings FILE --out FOLDER``) it measures the GPU and writes into that folder, row by row: one
that was stopped goes on. ``--add FILE`` puts what came back into results/.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import DeviceRun, alone, in_turn, peak_memory, rounded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reglib.geometry.sampling import warp
from reglib.methods import georeg, transmorph
from reglib.methods.neighbours import Neighbours, written_out
from reglib.objectives.regularity import bending
from reglib.objectives.similarity import ncc

NAME = "georeg_memory.json"
#: Voxels of the images; the last are whole brains at 1 mm.
SIZES = ((32, 32, 32), (64, 64, 64), (80, 96, 80), (160, 192, 160))
#: A step of GeoReg is estimated, not measured, where it would need more bytes than this on a CPU,
#: or than this share of a GPU.
LIMIT, SHARE = 16 * 10**9, 0.9
#: Tensors of a step are counted up to so many voxels: the profiler's own record of the step of a
#: whole brain at 1 mm does not fit into 24 GB.
COUNTED = 10**6
#: What the forms are to reach: bytes of a step at a size on each device.
WANTED = {"cpu": ((80, 96, 80), 4 * 10**9), "cuda": ((160, 192, 160), 24 * 10**9)}
NAIVE, OURS, LEAN = "GeoReg, unfolded", "GeoReg", "GeoReg, checkpointing"
NETWORKS = (
    NAIVE,
    OURS,
    LEAN,
    "VoxelMorph (MONAI)",
    "TransMorph, small",
    "TransMorph, small, checkpointing",
)
HEAD: dict[str, Any] = {
    "script": "data_scripts/georeg_memory.py",
    "protocol": {
        "step": "forward pass, loss and backward pass of one random pair in float32; no optimiser",
        "seconds": "median of the steps after the first, which warms up",
        "peak_memory": "bytes above what the process held before its first step, with modules, "
        "network and images in place: resident (VmHWM - VmRSS of Linux), or allocated on the GPU",
        "base_memory": "bytes that it held then",
        "peak_tensors": "on a CPU, the most bytes of tensors at a time (torch.profiler), without "
        "what libraries take for themselves and what malloc keeps of blocks below 32 MiB; for "
        f"images of at most {COUNTED:,} voxels",
        NAIVE: "preset 'brains 3-D', features and positions of all neighbours of all points "
        "gathered, differentiated by autograd",
        OURS: "the same weights; reglib.methods.neighbours",
        LEAN: "the same with checkpointing=True in the network and in its objective",
        "GeoReg's loss": "reglib.methods.georeg.objective: every field of every level",
        "VoxelMorph (MONAI)": "monai.networks.nets.VoxelMorphUNet with the channels of its "
        "documentation; its field goes into one loss, ncc and bending",
        "TransMorph": "reglib.methods.transmorph, preset 'small', the same loss",
        "attention": "one refinement alone, forward and backward pass, of as many points as the "
        "size has voxels: channels and neighbourhood as named",
        "padded": "sizes of the network's multiple that hold the images; what was measured",
        "kept": "bytes that autograd holds when the forward pass ends, by who put them there",
    },
}


@dataclass(frozen=True)
class Task:
    """A row to measure."""

    network: str
    shape: tuple[int, ...]
    kind: str = "step"
    #: Of an attention alone.
    channels: int = 0
    size: int = 0


# --- The networks -----------------------------------------------------------------------------


class Unfolded(georeg.NeighbourAttention):
    """The same attention in the naive form: all neighbours of all points in one tensor."""

    def forward(
        self, points: Tensor, neighbours: Neighbours, spacing: Tensor | None = None
    ) -> Tensor:
        """Displacements ``(B, P, D)`` of points with features ``(B, P, C)``."""
        seen = written_out(neighbours, spacing)
        moved = self.plain(points, seen.features, seen.relative, seen.inside)[1]
        return self.move(points, moved)


def unfolded(module: nn.Module) -> nn.Module:
    """The module with its attentions in the naive form; the weights stay."""
    for one in module.modules():
        if type(one) is georeg.NeighbourAttention:
            # The naive form adds a method and no state.
            one.__class__ = Unfolded
    return module


def one_loss(field: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
    """For networks that give one field: the terms of GeoReg's objective, once."""
    return ncc(warp(moving, field), fixed) + bending(field)


def _georeg(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], int]:
    lean = name == LEAN
    network = georeg.GeoReg(**georeg.PRESETS["brains 3-D"], checkpointing=lean)
    multiple = network.size_multiple
    if name == NAIVE:
        unfolded(network)

    def loss(moving: Tensor, fixed: Tensor) -> Tensor:
        terms = georeg.objective(network(moving, fixed), moving, fixed, checkpointing=lean)
        return torch.stack(tuple(terms.values())).sum()

    return network, loss, multiple


def _transmorph(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], int]:
    settings = transmorph.PRESETS["small"]
    network = transmorph.TransMorph(settings, checkpointing=name.endswith("checkpointing"))

    def loss(moving: Tensor, fixed: Tensor) -> Tensor:
        return one_loss(network(moving, fixed).field, moving, fixed)

    return network, loss, settings.size_multiple


def _voxelmorph(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], int]:
    # Not at the top: a borrowed GPU machine may not have it.
    from monai.networks.nets import VoxelMorphUNet

    network = VoxelMorphUNet(
        spatial_dims=3,
        in_channels=2,
        unet_out_channels=32,
        channels=(16, 32, 32, 32, 32, 32),
        final_conv_channels=(16, 16),
    )

    def loss(moving: Tensor, fixed: Tensor) -> Tensor:
        return one_loss(network(torch.cat([moving, fixed], 1)), moving, fixed)

    return network, loss, 8


def made(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], int]:
    """A network, its loss of a pair, and what sizes must be multiples of."""
    torch.manual_seed(0)
    kinds = {"GeoReg": _georeg, "VoxelMorph": _voxelmorph, "TransMorph": _transmorph}
    return kinds[name.replace(",", " ").split()[0]](name)


# --- The measurements -------------------------------------------------------------------------


def _resident(key: str) -> int | None:
    """Bytes of this process, now (``VmRSS``) or at most so far (``VmHWM``), where Linux tells."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None


def held(device: str) -> int:
    """Bytes that are held now."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _resident("VmRSS") or peak_memory(device)


def most_held(device: str) -> int:
    """The most bytes that were held. Not ``ru_maxrss``, in which Linux counts the parent's too."""
    return peak_memory(device) if device == "cuda" else _resident("VmHWM") or peak_memory(device)


def most_allocated(step: Callable[[], object]) -> int:
    """The most bytes of tensors on a CPU that a step holds at a time."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def measured(
    step: Callable[[], object],
    clear: Callable[[], object],
    device: str,
    steps: int,
    *,
    count: bool = True,
) -> dict[str, Any]:
    """Seconds and memory of a step, after which the gradients are cleared.

    ``count`` its tensors, too, on a CPU.
    """
    base = held(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = {
        "seconds": rounded(in_turn({"it": step, "clear": clear}, steps, device)["it"]),
        "peak_memory": most_held(device) - base,
        "base_memory": base,
    }
    if device == "cpu" and count:
        found["peak_tensors"] = most_allocated(step)
    return found


def _pair(shape: Sequence[int], device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 1, 1, *shape, generator=generator).to(device)


def _padded(shape: Sequence[int], multiple: int) -> tuple[int, ...]:
    return tuple(math.ceil(n / multiple) * multiple for n in shape)


def measure_step(task: Task, device: str, steps: int) -> dict[str, Any]:
    """A training step of a network."""
    network, loss, multiple = made(task.network)
    shape = _padded(task.shape, multiple)
    network.to(device).train()
    moving, fixed = _pair(shape, device)

    def step() -> None:
        loss(moving, fixed).backward()

    few = math.prod(shape) <= COUNTED
    found = measured(step, network.zero_grad, device, steps, count=few)
    parameters = sum(p.numel() for p in network.parameters())
    return {"padded": list(shape), "parameters": parameters, **found}


def measure_attention(task: Task, device: str, steps: int) -> dict[str, Any]:
    """One refinement alone."""
    torch.manual_seed(0)
    module: nn.Module = georeg.Refinement(3, task.channels, task.size, 0.15)
    if task.network == NAIVE:
        unfolded(module)
    for one in module.modules():
        if isinstance(one, georeg.NeighbourAttention):
            one.checkpointing = task.network == LEAN
    module.to(device)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 1, task.channels, *task.shape, generator=generator).to(device)
    field = torch.randn(1, 3, *task.shape, generator=generator).to(device)
    leaves = [x.detach().requires_grad_() for x in (*features, field)]

    def step() -> None:
        module(*leaves).square().mean().backward()

    def clear() -> None:
        module.zero_grad()
        for leaf in leaves:
            leaf.grad = None

    return measured(step, clear, device, steps)


def measure_kept(task: Task, device: str, steps: int) -> dict[str, Any]:
    """What autograd keeps for the backward pass, by the part of the network that made it."""
    network, loss, multiple = made(task.network)
    shape = _padded(task.shape, multiple)
    network.to(device)
    assert isinstance(network, georeg.GeoReg)
    parts: list[str] = []
    sizes: dict[int, tuple[str, int]] = {}
    kept: list[Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def enter(part: str, *_: object) -> None:
        parts.append(part)

    def leave(*_: object) -> None:
        parts.pop()

    named = {"encoder": network.encoder}
    for level, module in enumerate(network.refinements):
        named[f"refinement, level {level}"] = module
    for level, module in enumerate(network.interpolations):
        named[f"interpolation, level {level}"] = module
    for part, module in named.items():
        module.register_forward_pre_hook(functools.partial(enter, part))
        module.register_forward_hook(leave)

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in sizes:
            sizes[storage.data_ptr()] = parts[-1] if parts else "loss", storage.nbytes()
            # Held, so that its place in memory is not given to another.
            kept.append(x)
        return x

    moving, fixed = _pair(shape, device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss(moving, fixed)
    found: dict[str, int] = {}
    for part, size in sizes.values():
        found[part] = found.get(part, 0) + size
    ordered = sorted(found.items(), key=lambda one: -one[1])
    return {"padded": list(shape), "kept": dict(ordered)}


def measure(task: Task, device: str, steps: int) -> dict[str, Any]:
    """One row."""
    # At its first call checkpoint imports modules of 150 MiB, which are nobody's step.
    checkpoint(torch.neg, torch.ones(1, requires_grad=True), use_reentrant=False)
    row = {key: value for key, value in asdict(task).items() if value}
    row["shape"] = list(task.shape)
    kinds = {"step": measure_step, "attention": measure_attention, "kept": measure_kept}
    try:
        return row | kinds[task.kind](task, device, steps)
    except ModuleNotFoundError as error:
        return row | {"left_out": f"{error.name} is not installed"}
    except torch.cuda.OutOfMemoryError:
        return row | {"left_out": "out of memory"}


# --- All of them ------------------------------------------------------------------------------


def tasks(networks: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> Iterator[Task]:
    """Every row, the small ones first."""
    for shape in sorted(sizes, key=math.prod):
        for name in networks:
            yield Task(name, shape)
    forms = [name for name in (NAIVE, OURS, LEAN) if name in networks]
    middle = sorted(sizes, key=math.prod)[(len(sizes) - 1) // 2]
    for name in forms:
        if name != LEAN:  # what it keeps, it keeps where the hooks of autograd do not see it
            yield Task(name, middle, "kept")
    preset = georeg.PRESETS["brains 3-D"]
    # The finest level, and the finest of those with 3 nodes along each axis on a coarser grid.
    for level in (0, 2):
        shape = tuple(n // 2**level for n in middle)
        size, channels = preset["neighbourhoods"][level], preset["channels"][level]
        for name in forms:
            yield Task(name, shape, "attention", channels, size)


def limit_of(device: str) -> int:
    """More bytes than this are not asked for."""
    if device != "cuda":
        return LIMIT
    return int(SHARE * torch.cuda.get_device_properties(0).total_memory)


def estimated(
    task: Task, rows: Sequence[dict[str, Any]], limit: int, multiple: int = 32
) -> dict[str, Any] | None:
    """In place of a step that would not fit, what it would need: in proportion to the voxels."""
    if task.kind != "step" or task.network not in (NAIVE, OURS, LEAN):
        return None
    earlier = [
        row
        for row in rows
        if (row["network"], row.get("kind")) == (task.network, "step") and "peak_memory" in row
    ]
    if not earlier:
        return None
    last = max(earlier, key=lambda row: math.prod(row["padded"]))
    padded = _padded(task.shape, multiple)
    bytes_wanted = int(last["peak_memory"] * math.prod(padded) / math.prod(last["padded"]))
    if bytes_wanted <= limit:
        return None
    row = {"network": task.network, "shape": list(task.shape), "kind": "step"}
    return row | {
        "padded": list(padded),
        "estimated_memory": bytes_wanted,
        "estimated_from": last["shape"],
        "limit": limit,
    }


def targets(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was; nothing that was not measured."""
    steps = {(row["network"], tuple(row["shape"])): row for row in rows if row["kind"] == "step"}
    found: list[dict[str, Any]] = []

    def note(what: str, shape: Sequence[int], value: float, wanted: float, **more: Any) -> None:
        head = {"what": what, "shape": list(shape)}
        found.append(head | {"value": rounded(value), "wanted": wanted, "met": value <= wanted})
        found[-1].update(more)

    for (name, shape), row in steps.items():
        naive = steps.get((NAIVE, shape), {})
        if name not in (OURS, LEAN) or "seconds" not in naive:
            continue
        share = row["peak_memory"] / naive["peak_memory"]
        note("memory over that of the unfolded form", shape, share, 0.2, network=name)
        if "peak_tensors" in row:
            share = row["peak_tensors"] / naive["peak_tensors"]
            note("tensors over those of the unfolded form", shape, share, 0.2, network=name)
        share = row["seconds"] / naive["seconds"]
        note("seconds over those of the unfolded form", shape, share, 1.0, network=name)
    shape, wanted = WANTED[device]
    for name in (OURS, LEAN):
        row = steps.get((name, shape), {})
        if "peak_memory" in row:
            note("bytes of a step", shape, row["peak_memory"], wanted, network=name)
    return found


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return row["network"], row["kind"], row.get("channels", 0), *row["shape"]


def _size(words: str) -> tuple[int, ...]:
    return tuple(int(n) for n in words.split("x"))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=_size, nargs="+", help="a trial at sizes such as 32x32x32")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="a trial with these")
    parser.add_argument("--steps", type=int, default=3, help="measured after the first")
    record = DeviceRun(parser, NAME, HEAD)
    options, device, rows = record.options, record.device, record.rows
    sizes, networks = options.sizes or SIZES, options.networks or NETWORKS
    trial = options.sizes is not None or options.networks is not None
    if record.job is not None:
        sizes = [tuple(shape) for shape in record.job["sizes"]]
        networks, options.steps = record.job.get("networks", NETWORKS), record.job["steps"]
    elif not trial and record.provenance["uncommitted_changes"]:
        raise SystemExit("reglib/ or data_scripts/ has changes that are not committed")
    done, limit = [_name(row) for row in rows], limit_of(device)
    for task in tasks(networks, sizes):
        if _name(asdict(task)) in done:
            continue
        row = estimated(task, rows, limit)
        rows.append(row or alone(measure, task, device, options.steps))
        print(json.dumps(rows[-1]), flush=True)
        if record.job is not None:
            record.write(rows=rows, targets=targets(rows, device))
    if record.job is None and not trial:
        record.write(rows=rows, targets=targets(rows, device))
    for one in targets(rows, device):
        print(json.dumps(one))


if __name__ == "__main__":
    main()
