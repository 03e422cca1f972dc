"""``reglib train``: networks trained from the command line, on one process or many."""

from __future__ import annotations

import functools
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from reglib.cli.registering import Device, device_of
from reglib.cli.running import Debug, in_sentences, say

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


class Precision(StrEnum):
    """Of the forward pass."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


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
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pairs a process sees at once.")] = 1,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Batches whose mean gradient makes a step.")
    ] = 1,
    loss: Annotated[Loss, typer.Option("--loss", help="Of the ensemble's field.")] = Loss.LNCC,
    kl: Annotated[
        Divergence, typer.Option("--kl", help="Divergence between stages and ensemble.")
    ] = Divergence.CONSISTENT,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the forward pass (autocast).")
    ] = Precision.FLOAT32,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Compute activations twice instead of keeping them: less memory.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and the images.")] = 0,
    every: Annotated[
        int, typer.Option("--every", min=1, help="Steps between two checkpoints.")
    ] = 500,
    device: Annotated[
        Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
    ] = Device.AUTO,
    devices: Annotated[
        int,
        typer.Option(
            "--devices", min=1, help="Processes on a machine; more than one takes [scale]."
        ),
    ] = 1,
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes", min=1, help="Machines; each is given the same command (srun, torchrun)."
        ),
    ] = 1,
    debug: Debug = False,
) -> None:
    """Pretrain a TransMorph encoder on pairs of random shapes (Chen et al., MIDL 2025).

    No image is needed: the pairs are made while it trains.
    """
    import torch

    from reglib.methods import pretraining, transmorph
    from reglib.synth import RandomPairs
    from reglib.training import fit, warm_up

    place = device_of(device)
    fabric: Any = None
    if devices * nodes > 1:
        fabric = _processes(place.type, devices, nodes)
        place = fabric.device
    rank = 0 if fabric is None else int(fabric.global_rank)
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


def _mean(values: list[float], last: int = 100) -> float:
    return sum(values[-last:]) / len(values[-last:])


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
