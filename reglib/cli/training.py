"""``reglib train``: networks trained from the command line, on one process or many."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reglib.cli.methods import Similarity, fcn_loss, fcn_loss_words
from reglib.cli.registering import Device, device_of
from reglib.cli.running import Debug, in_sentences, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reglib.data.nifti import Image
    from reglib.methods.fcn import FCN, ComposedFCN, ComposedSettings, Settings

#: Spatial shapes that the presets are made for; random shapes have cells of a fifth of the shortest
#: axis, the paper's share.
SHAPES = {"tiny": (40, 48, 40), "small": (80, 96, 80), "paper": (160, 192, 224)}

#: What a training writes into its folder.
ENCODER, LOG, CHECKPOINT = "encoder.safetensors", "log.csv", "checkpoint.safetensors"


class Preset(StrEnum):
    """Sizes of TransMorph."""

    TINY = "tiny"
    SMALL = "small"
    PAPER = "paper"


class Loss(StrEnum):
    """What the ensemble's field is judged by."""

    LNCC = "lncc"
    DICE = "dice"


class Divergence(StrEnum):
    """Forms of the divergence between stages and ensemble."""

    CONSISTENT = "consistent"
    RELEASED = "released"
    NONE = "none"


class Architecture(StrEnum):
    """Networks of ``reglib train fcn``."""

    COMPOSED = "composed"
    PAPER = "paper"
    NO_POOLING = "no-pooling"
    INTERPOLATED = "interpolated"


class Data(StrEnum):
    """Populations of hippocampi."""

    EMBEDDED = "embedded"
    MSD = "msd"


class Precision(StrEnum):
    """Of the forward pass."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Accumulate = Annotated[
    int, typer.Option("--accumulate", min=1, help="Batches whose mean gradient makes a step.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Pairs a process sees at once.")]
Precisions = Annotated[
    Precision, typer.Option("--precision", help="Of the forward pass (autocast).")
]
Every = Annotated[int, typer.Option("--every", min=1, help="Steps between two checkpoints.")]
Place = Annotated[
    Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
]
Devices = Annotated[
    int,
    typer.Option("--devices", min=1, help="Processes on a machine; more than one takes [scale]."),
]
Nodes = Annotated[
    int,
    typer.Option(
        "--nodes", min=1, help="Machines; each is given the same command (srun, torchrun)."
    ),
]


@in_sentences
def pretrain(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help=f"Folder of {ENCODER}, {LOG} and, until it is done, {CHECKPOINT}: the same "
            "command goes on from there.",
        ),
    ],
    preset: Annotated[
        Preset, typer.Option("--preset", help="Size of the TransMorph encoder.")
    ] = Preset.TINY,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            "--shape",
            metavar="N N N",
            help="Voxels of the random images. Default: 40 48 40 for tiny, 80 96 80 for small, "
            "160 192 224 for paper.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = 1000,
    lr: Annotated[
        float,
        typer.Option(
            "--lr", help="Highest learning rate: it rises over a tenth of the steps, then falls."
        ),
    ] = 4e-4,
    batch: Batch = 1,
    accumulate: Accumulate = 1,
    loss: Annotated[Loss, typer.Option("--loss", help="Of the ensemble's field.")] = Loss.LNCC,
    kl: Annotated[
        Divergence, typer.Option("--kl", help="Divergence between stages and ensemble.")
    ] = Divergence.CONSISTENT,
    precision: Precisions = Precision.FLOAT32,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Compute activations twice instead of keeping them: less memory.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and the images.")] = 0,
    every: Every = 500,
    device: Place = Device.AUTO,
    devices: Devices = 1,
    nodes: Nodes = 1,
    debug: Debug = False,
) -> None:
    """Pretrain a TransMorph encoder on pairs of random shapes (Chen et al., MIDL 2025).

    No image is needed: the pairs are made while it trains.
    """
    import torch

    from reglib.methods import pretraining, transmorph
    from reglib.synth import RandomPairs
    from reglib.training import fit, warm_up

    place, fabric, rank = _places(device, devices, nodes)
    size = SHAPES[preset.value] if shape is None else shape
    # The weights are the same in every process, the pairs are not.
    torch.manual_seed(seed)
    settings = transmorph.PRESETS[preset.value]
    encoder = transmorph.Encoder(settings, checkpointing=checkpointing)
    network = pretraining.PretrainingNetwork(encoder).to(place)
    if any(n % network.size_multiple for n in size):
        raise ValueError(f"--shape: wanted multiples of {network.size_multiple}, got {size}")
    cell = min(size) / 5
    generator = torch.Generator(place).manual_seed(seed + rank)
    pairs = RandomPairs(size, generator=generator, batch=batch, cell=cell)
    chosen = None if kl is Divergence.NONE else kl.value
    make = pretraining.dice_objective if loss is Loss.DICE else pretraining.objective
    out.mkdir(parents=True, exist_ok=True)
    history = fit(
        network,
        pairs,
        functools.partial(make, kl=chosen),
        steps=steps,
        lr=lr,
        optimiser=torch.optim.AdamW,
        schedule=warm_up,
        accumulate=accumulate,
        precision=precision.value,
        checkpoint=out / CHECKPOINT,
        every=every,
        log=out / LOG,
        fabric=fabric,
    )
    if rank:
        return
    card = {
        "trained_on": "pairs of random shapes (reglib.synth.random_pair); no image",
        "licence": "Apache-2.0",
        "shape": list(size),
        "cell": cell,
        "steps": steps,
        "batch": batch * accumulate * devices * nodes,
        "lr": lr,
        "loss": loss.value,
        "kl": chosen,
        "seed": seed,
        "seconds": round(history["seconds"][-1], 1),
    }
    transmorph.save(encoder.cpu(), out / ENCODER, card=card)
    (out / CHECKPOINT).unlink(missing_ok=True)
    say(f"{out / ENCODER}: loss {_mean(history['loss']):.4f} over the last steps")


@in_sentences
def train_fcn(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File of the weights (.safetensors). Beside it: a log of every step (.csv) and, "
            "until it is done, a checkpoint: the same command goes on from there.",
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGES]...",
            help="Images to train on, two or more: files, or folders of .nii and .nii.gz files. "
            "Without any, --data.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Data | None,
        typer.Option(
            "--data",
            help="Boxes around the hippocampus: random variants of four that come with reglib, or "
            "the crops of the Medical Segmentation Decathlon (fetched). Default: embedded.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=2, help="Members of the embedded population.")
    ] = 32,
    preset: Annotated[
        Architecture,
        typer.Option(
            "--preset",
            help="paper, and the two it was compared with; composed is reglib's own, whose "
            "resolutions go on from one another.",
        ),
    ] = Architecture.COMPOSED,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            "--spacing",
            metavar="MM MM MM",
            help="Of the grid that all images are brought to. Default: that of the first image.",
        ),
    ] = None,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            "--shape",
            metavar="N N N",
            help="Voxels of that grid, about the middle of the first image. Default: all of it.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Optimiser steps. Default: 1000, any number with --seconds."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", help="Time limit of the training. Default: none."),
    ] = None,
    lr: Annotated[
        float, typer.Option("--lr", help="Learning rate to start from; it falls to 0.")
    ] = 1e-3,
    batch: Batch = 2,
    accumulate: Accumulate = 1,
    similarity: Annotated[
        Similarity | None,
        typer.Option("--similarity", help="Default: lncc for composed, ncc for the others."),
    ] = None,
    regularity_weight: Annotated[
        float | None,
        typer.Option(
            "--regularity-weight",
            help="Default: 1 for composed (diffusion), 0.03 for the others (total variation).",
        ),
    ] = None,
    precision: Precisions = Precision.FLOAT32,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the weights, the population and the pairs.")
    ] = 0,
    every: Every = 100,
    device: Place = Device.AUTO,
    devices: Devices = 1,
    nodes: Nodes = 1,
    debug: Debug = False,
) -> None:
    """Train a registration network on pairs of images (Li and Fan, arXiv:1709.00799).

    It learns from random pairs of different images; nothing else is needed. Images meet in world
    mm, as their headers say, on the grid of the first one, each scaled by its own extremes: as
    'reglib register --method fcn --weights FILE' will show them to it.

    \b
    reglib train fcn --seconds 600 --out hippocampi.safetensors
    reglib train fcn FOLDER --spacing 2 2 2 --out own.safetensors
    reglib register MOVING FIXED --method fcn --weights own.safetensors --out DIR
    """  # noqa: D301  # \b keeps the lines of a paragraph
    import torch

    from reglib.data.datasets import HIPPOCAMPUS_QUANTILE, same_label_pairs
    from reglib.data.nifti import Image
    from reglib.methods import fcn
    from reglib.training import fit

    if out.suffix != ".safetensors":
        raise typer.BadParameter(
            f"wanted a name that ends in .safetensors, got {out}", param_hint="--out"
        )
    if images and data is not None:
        raise typer.BadParameter("wanted either IMAGES or --data, got both", param_hint="--data")
    words = fcn_loss_words(preset is Architecture.COMPOSED)
    words |= {} if similarity is None else {"similarity": similarity.value}
    words |= {} if regularity_weight is None else {"regularity_weight": regularity_weight}
    loss = fcn_loss(words)
    place, fabric, rank = _places(device, devices, nodes)
    if images:
        found, origin = _own_images(images), "images of its user"
    else:
        data = data or Data.EMBEDDED
        found, origin = _hippocampi(data, count, seed), _ORIGINS[data]
    settings = _fcn_settings(preset)
    multiple = settings.size_multiple
    if shape is not None and any(n < 1 or n % multiple for n in shape):
        raise ValueError(f"--shape: wanted multiples of {multiple}, got {shape}")
    first = next(found)
    grid, boxes = _on_one_grid(first, found, spacing, shape, multiple)
    # The weights are the same in every process, the pairs are not.
    torch.manual_seed(seed)
    settings = dataclasses.replace(settings, dimensions=boxes.ndim - 2)
    network: FCN | ComposedFCN
    if isinstance(settings, fcn.ComposedSettings):
        network = fcn.ComposedFCN(settings)
    else:
        network = fcn.FCN(settings)
    generator = torch.Generator().manual_seed(seed + rank)
    pairs = same_label_pairs(
        boxes.to(place),
        torch.zeros(len(boxes), dtype=torch.long),
        batch_size=batch,
        generator=generator,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    history = fit(
        network.to(place),
        pairs,
        loss,
        steps=1000 if steps is None and seconds is None else steps,
        seconds=seconds,
        lr=lr,
        accumulate=accumulate,
        precision=precision.value,
        checkpoint=checkpoint,
        every=every,
        log=out.with_suffix(".csv"),
        fabric=fabric,
    )
    if rank:
        return
    placed = Image(boxes[:1], grid)
    # The populations come scaled; images of one's own were scaled by their extremes.
    scaled = {} if images else {"quantile": HIPPOCAMPUS_QUANTILE}
    card = {
        "trained_on": f"random pairs of {len(boxes)} {origin}",
        "licence": "the weights: Apache-2.0 as far as the images allow",
        "input": network.card["input"]
        | scaled
        | {"orientation": placed.orientation, "spacing": [round(s, 6) for s in placed.spacing]},
        "shape": list(boxes.shape[2:]),
        "steps": len(history["loss"]),
        "batch": batch * accumulate * devices * nodes,
        "lr": lr,
        "loss": words,
        "seed": seed,
        "seconds": round(history["seconds"][-1], 1),
    }
    fcn.save(network.cpu(), out, card=card)
    checkpoint.unlink(missing_ok=True)
    say(f"{out}: loss {_mean(history['loss']):.4f} over the last steps")


#: What the populations are, for the card of the weights; whose images users bring is not said.
_ORIGINS = {
    Data.EMBEDDED: "random variants of hippocampi of Colin27 and MNI152 2009a",
    Data.MSD: "hippocampi of the Medical Segmentation Decathlon, Task04 (CC BY-SA 4.0)",
}


def _fcn_settings(preset: Architecture) -> Settings | ComposedSettings:
    from reglib.methods import fcn

    if preset is Architecture.COMPOSED:
        return fcn.ComposedSettings()
    return fcn.PRESETS[preset.value.replace("-", " ")]


def _hippocampi(data: Data, count: int, seed: int) -> Iterator[tuple[str, Image]]:
    """A population as images with names, voxels of 1 mm."""
    import torch

    from reglib.data.datasets import hippocampus
    from reglib.data.nifti import Image

    if data is Data.MSD:
        population = hippocampus(origin="msd")
    else:
        population = hippocampus(count=count, generator=torch.Generator().manual_seed(seed))
    affine = torch.eye(4, dtype=torch.float64)
    for n, name in enumerate(population.members):
        yield name, Image(population.images[n : n + 1], affine)


def _own_images(paths: Sequence[Path]) -> Iterator[tuple[str, Image]]:
    """The images of files and folders one after another, in one channel, each with its path."""
    from reglib.cli import images

    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for end in (".nii", ".nii.gz") for p in path.glob(f"*{end}"))
        if not inside:
            raise ValueError(f"{path}: wanted .nii or .nii.gz files in this folder, got none")
        files += inside
    if len(files) < 2:
        raise ValueError(f"IMAGES: wanted two or more, got {len(files)}")
    for path in files:
        yield str(path), images.luminance(images.read(path)[0])


def _on_one_grid(
    first: tuple[str, Image],
    others: Iterator[tuple[str, Image]],
    spacing: Sequence[float] | None,
    shape: Sequence[int] | None,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """The images as :class:`reglib.methods.network.Network` would show them, on the first's grid.

    Returns:
        Affine ``(D+1, D+1)`` of the grid; images ``(N, 1, *S)`` in [0, 1].
    """
    import torch

    from reglib.data.conform import conform_grid, resample

    name_of_first, image_of_first = first
    size = tuple(image_of_first.tensor.shape[2:])
    if shape is None:
        affine, wanted = conform_grid(
            image_of_first.affine, size, spacing=spacing, multiple=multiple
        )
    else:
        wanted = tuple(shape)
        if len(wanted) != len(size):
            raise ValueError(f"--shape: wanted volumes, got {image_of_first!r}")
        affine, size = conform_grid(image_of_first.affine, size, spacing=spacing)
        # Whole voxels, so that nothing is interpolated that need not be.
        corner = [(n - m) // 2 for n, m in zip(size, wanted, strict=True)]
        affine[:-1, -1] += affine[:-1, :-1] @ affine.new_tensor(corner)
    boxes = []
    for name, image in itertools.chain([first], others):
        if image.tensor.ndim - 2 != len(size):
            raise ValueError(f"{name}: wanted {len(size)} axes as {name_of_first}, got {image!r}")
        low, high = image.tensor.aminmax()
        scaled = (image.tensor - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
        box = resample(scaled, image.affine, affine, wanted)
        if box.min() == box.max():
            raise ValueError(f"{name}: wanted contrast where {name_of_first} lies, got none there")
        boxes.append(box)
    return affine, torch.cat(boxes)


def _mean(values: list[float], last: int = 100) -> float:
    return sum(values[-last:]) / len(values[-last:])


def _places(device: Device, devices: int, nodes: int) -> tuple[torch.device, Any, int]:
    """Where this process computes, the engine of several processes, and which of them it is."""
    place = device_of(device)
    if devices * nodes == 1:
        return place, None, 0
    fabric = _processes(place.type, devices, nodes)
    return fabric.device, fabric, int(fabric.global_rank)


def _processes(kind: str, devices: int, nodes: int) -> Any:
    """The launched Fabric: from here on every process runs the command."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError(
            f"--devices {devices} --nodes {nodes}: wanted one process, or lightning-fabric: "
            'pip install "reglib[scale]"'
        ) from error
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return fabric
