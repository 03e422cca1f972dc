"""One training loop for every network of the library, and weights on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from reglib.checks import check_positive_int
from reglib.data.files import write_bytes

#: What a network returns, the moving and the fixed image -> named terms of the loss.
Objective = Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]


def fit(
    network: nn.Module,
    pairs: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = 1e-3,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train ``network`` in place on a stream of pairs: Adam on the sum of the objective's terms.

    Stops at whichever comes first of ``steps``, ``seconds`` and the end of ``pairs``.

    Args:
        network: called as ``network(moving, fixed)``; its parameters are changed.
        pairs: batches of (moving, fixed), each ``(B, C, *S)``, on the network's device.
        objective: ``objective(output, moving, fixed)`` -> terms of the loss, scalars by name.
        steps: number of optimiser steps; ``None`` for no limit.
        seconds: wall-clock limit; ``None`` for no limit. The learning rate then falls with the
            time that is spent instead of the steps that are done.
        lr: initial learning rate; it falls to 0 along a half cosine when a limit is set.
        progress: show a progress bar with the loss.

    Returns:
        One list per term, plus ``"loss"`` (their sum) and ``"seconds"`` since the start, with one
        entry per step.

    Raises:
        TypeError, ValueError: if a limit or ``lr`` is not positive, ``pairs`` is empty, or a term
            is called ``"loss"`` or ``"seconds"``.
        FloatingPointError: if the loss or its gradient is NaN or infinite; the parameters are
            those before the step that would have spoilt them.
    """
    if steps is not None:
        check_positive_int(steps, "steps")
    for name, value in (("seconds", seconds), ("lr", lr)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: wanted a positive number, got {value!r}")
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    history: dict[str, list[float]] = {}
    start = time.perf_counter()
    network.train()
    with tqdm(total=steps, disable=not progress, unit="step") as bar:
        # The steps come first: zip must not take a pair from a stream that it will not use.
        for step, (moving, fixed) in zip(range(steps) if steps else count(), pairs, strict=False):
            elapsed = time.perf_counter() - start
            spent = max(step / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
            if spent >= 1:
                break
            for group in optimiser.param_groups:
                group["lr"] = lr * _half_cosine(spent)
            terms = dict(objective(network(moving, fixed), moving, fixed))
            if terms.keys() & {"loss", "seconds"}:
                raise ValueError(
                    "objective: 'loss' and 'seconds' are columns of the history; "
                    f"wanted other names for its terms, got {list(terms)}"
                )
            loss = torch.stack(tuple(terms.values())).sum()
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            value = loss.item()
            size = torch.nn.utils.get_total_norm(
                [p.grad for p in network.parameters() if p.grad is not None]
            )
            if not (math.isfinite(value) and math.isfinite(size.item())):
                raise FloatingPointError(
                    f"loss: {value}, gradient of length {size.item()} at step {step} "
                    f"({ {k: v.item() for k, v in terms.items()} })"
                )
            optimiser.step()
            for name, term in terms.items():
                history.setdefault(name, []).append(term.item())
            history.setdefault("loss", []).append(value)
            history.setdefault("seconds", []).append(time.perf_counter() - start)
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
    network.eval()
    if not history:
        raise ValueError("pairs: wanted at least one (moving, fixed) batch, got none")
    return history


def _half_cosine(spent: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * spent))


def save_weights(network: nn.Module, path: str | Path, card: Mapping[str, object]) -> None:
    """Write a network's tensors and a card of JSON values as one safetensors file, atomically.

    Args:
        network: any module.
        path: file to write; an existing one is replaced.
        card: what a reader must know; every value must be JSON.

    Raises:
        OSError: if the file cannot be written; nothing is left behind.
        TypeError: if the card is not JSON.
    """
    metadata = {key: json.dumps(value) for key, value in card.items()}
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_bytes(path, save(state, metadata))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and card from a file of :func:`save_weights`.

    Args:
        path: a safetensors file.

    Returns:
        Tensors by name, on the CPU, and the card.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            card = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except SafetensorError as error:
        raise ValueError(f"path: wanted a safetensors file, got {path} ({error})") from error
    return state, card
