"""Weights on disk, and any state of tensors and JSON values: safetensors, never pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from reglib.data.files import write_bytes

#: What the metadata of a file of :func:`reglib.weights.save_state` say it is.
FORMAT = "reglib state 1"


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
    """Read tensors and card from a file of :func:`reglib.weights.save_weights`.

    Args:
        path: a safetensors file.

    Returns:
        Tensors by name, on the CPU, and the card.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file, or no card is in it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            card = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except SafetensorError as error:
        raise ValueError(f"path: wanted a safetensors file, got {path} ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"path: wanted weights with a card, as reglib saves them, got {path}, "
            f"whose metadata are no JSON ({error})"
        ) from error
    return state, card


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors and JSON values, atomically.

    Tensors go into the file as they are, named by their keys joined with ``/``; the rest is JSON in
    its metadata.

    Args:
        path: file to write; an existing one is replaced.
        state: dictionaries with strings or integers as keys.

    Raises:
        OSError: if the file cannot be written; nothing is left behind.
        TypeError: if something in it is neither a tensor nor JSON; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    rest = {key: _without_tensors(value, key, tensors) for key, value in state.items()}
    metadata = {"format": json.dumps(FORMAT), "state": json.dumps(rest)}
    write_bytes(path, save(tensors, metadata))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what :func:`reglib.weights.save_state` has written, to the bit.

    Args:
        path: a file of :func:`reglib.weights.save_state`.

    Returns:
        The state, its tensors on the CPU.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such file.
    """
    tensors, card = load_weights(path)
    if card.get("format") != FORMAT:
        raise ValueError(f"path: wanted a file that save_state has written, got {path}")
    return {key: _with_tensors(value, tensors) for key, value in card["state"].items()}


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``, whose tensors are put into ``tensors``."""
    if isinstance(value, Tensor):
        while name in tensors:  # the keys 1 and "1" give one name
            name += "'"
        # Tensors that share memory are refused by the format, so each gets its own.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"{name}: wanted strings or integers as keys, got {list(value)}")
        # JSON knows strings as keys only; an optimiser counts its parameters.
        items = [[key, _without_tensors(v, f"{name}/{key}", tensors)] for key, v in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: wanted tensors and JSON values, got {type(value).__name__}")


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_without_tensors`."""
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        # Not a view of the file, which may be replaced while the tensor lives on.
        return tensors[content].clone()
    if kind == "tuple":
        return tuple(_with_tensors(v, tensors) for v in content)
    return {key: _with_tensors(v, tensors) for key, v in content}
