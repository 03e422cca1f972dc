"""A training that is put on disk as it stands and taken up again, in one process or several.

The bookkeeping of :func:`reglib.training.fit`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reglib.weights import load_state, save_state


class Processes:
    """The processes that train one network together; this one alone where there is no Fabric.

    Args:
        fabric: a launched ``lightning_fabric.Fabric``, or ``None``.

    Raises:
        TypeError: if it is neither.
    """

    def __init__(self, fabric: Any) -> None:
        if fabric is not None and not hasattr(fabric, "setup_module"):
            raise TypeError(
                'fabric: wanted a lightning_fabric.Fabric (pip install "reglib[scale]") or None, '
                f"got {type(fabric).__name__}"
            )
        self.fabric = fabric
        self.number = 1 if fabric is None else int(fabric.world_size)
        self.rank = 0 if fabric is None else int(fabric.global_rank)

    def set_up(self, network: nn.Module) -> nn.Module:
        """What is called in the place of ``network``, so that gradients become means."""
        called: nn.Module = network if self.fabric is None else self.fabric.setup_module(network)
        return called

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        if self.fabric is None:
            torch.autograd.backward(loss)
        else:
            self.fabric.backward(loss)

    def exchanging(
        self, called: nn.Module, exchange: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Whether gradients that are added within are exchanged, or wait for those to come."""
        if exchange or self.number == 1:
            return contextlib.nullcontext()
        waiting: contextlib.AbstractContextManager[None] = self.fabric.no_backward_sync(called)
        return waiting

    def sum(self, *values: float) -> list[float]:
        """Sums over the processes, the same in all of them."""
        if self.number == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64, device=self.fabric.device)
        torch.distributed.all_reduce(own)
        total: list[float] = own.tolist()
        return total

    def mean(self, *values: float) -> list[float]:
        """Means over the processes, the same in all of them."""
        return [total / self.number for total in self.sum(*values)]

    def gather(self, value: object) -> list[Any]:
        """The values of all processes, in their order."""
        values: list[Any] = [value] * self.number
        if self.number > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def read(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns in the first process."""
        value = function() if self.rank == 0 else None
        return value if self.number == 1 else self.fabric.broadcast(value)

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.number > 1:
            self.fabric.barrier()


class Run:
    """A training and where it stands; begins where the checkpoint ends.

    Args:
        network: the network, on its device.
        optimiser: of its parameters, new.
        pairs: the batches to train on.
        processes: who trains.
        path: the checkpoint; ``None`` for none.
        accumulate: batches a step.
        precision: of :func:`reglib.training.fit`.
        settings: further ones by name, JSON values.

    Raises:
        ValueError: if the folder of ``path`` does not exist, or the checkpoint is none or belongs
            to another network, optimiser or other settings.
    """

    def __init__(
        self,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        pairs: Iterable[Any],
        processes: Processes,
        path: str | Path | None,
        *,
        accumulate: int,
        precision: str,
        **settings: object,
    ) -> None:
        self.network, self.optimiser, self.pairs = network, optimiser, pairs
        self.processes, self.accumulate = processes, accumulate
        self.device = next(network.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        #: One list per column, one entry per step.
        self.history: dict[str, list[float]] = {}
        #: The lowest validation, its step and its weights.
        self.best: dict[str, Any] | None = None
        #: Step of the last validation, and the number of validations since the lowest.
        self.validated, self.stale = 0, 0
        # A stream that can say where it stands need not be drawn again.
        self._stream: Any = None
        if all(hasattr(pairs, name) for name in ("state_dict", "load_state_dict")):
            self._stream = pairs
        self._settings = _describe(network, optimiser) | {
            "accumulate": accumulate,
            "precision": precision,
            "number of processes": processes.number,
            "state_dict of pairs": self._stream is not None,
            **settings,
        }
        self._path = None if path is None else Path(path)
        if self._path is not None and processes.rank == 0 and not self._path.parent.is_dir():
            raise ValueError(f"checkpoint: wanted a file in a folder that exists, got {path}")
        self._random: dict[str, Any] | None = None
        self._begin = time.perf_counter()
        saved = processes.read(self._read)
        if saved is not None:
            self._restore(saved)
        self._written = (self.step, self.validated)

    @property
    def step(self) -> int:
        """Number of steps that are done."""
        return len(self.history.get("loss", ()))

    @property
    def seconds(self) -> float:
        """Time that was spent, without that between a checkpoint and its resumption."""
        return time.perf_counter() - self._begin

    def batches(self) -> Iterator[Any]:
        """The batches that are still to come."""
        batches, used = iter(self.pairs), self.step * self.accumulate
        if self._stream is None:
            for k in range(used):
                try:
                    next(batches)
                except StopIteration:
                    raise ValueError(
                        f"pairs: wanted the {used} batches again that the checkpoint has seen, "
                        f"got {k}"
                    ) from None
        if self._random is not None:
            # Now and no earlier: drawing pairs again may have drawn random numbers.
            torch.set_rng_state(self._random["cpu"])
            if self._random["cuda"] is not None:
                torch.cuda.set_rng_state(self._random["cuda"], self.device)
        # Not yield from, which would close a caller's generator when this one ends.
        for batch in batches:  # noqa: UP028
            yield batch

    def validate(self, function: Callable[[nn.Module], object], *, keep_best: bool) -> None:
        """Measure the network after the last step; keep its weights if none were better."""
        self.network.eval()
        with torch.no_grad(), torch.random.fork_rng(self._cuda_devices):
            value = function(self.network)
        self.network.train()
        if not isinstance(value, (Real, Tensor)) or (isinstance(value, Tensor) and value.ndim):
            raise TypeError(f"validate: wanted a function that returns a number, got {value!r}")
        if isinstance(value, Tensor):
            value = value.item()
        [mean] = self.processes.mean(float(value))
        self.history["validation"][-1] = mean
        self.validated, self.stale = self.step, self.stale + 1
        if keep_best and not math.isnan(mean) and (not self.best or mean < self.best["value"]):
            weights = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
            self.best = {"value": mean, "step": self.step, "network": weights}
            self.stale = 0

    def save(self) -> None:
        """Write the checkpoint, unless there is no place for it or it holds all this already."""
        if self._path is None or self._written == (self.step, self.validated):
            return
        own = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self._cuda_devices else None,
            "pairs": None if self._stream is None else self._stream.state_dict(),
        }
        each = self.processes.gather(own)
        if self.processes.rank == 0:
            columns = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.history.items()}
            state = {
                "settings": self._settings,
                "seconds": self.seconds,
                "history": columns,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "validated": self.validated,
                "stale": self.stale,
                "processes": each,
            }
            save_state(self._path, state)
        self._written = (self.step, self.validated)
        self.processes.wait()

    @property
    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _read(self) -> dict[str, Any] | None:
        """The content of the checkpoint, if there is one."""
        if self._path is None or not self._path.exists():
            return None
        try:
            saved = load_state(self._path)
        except ValueError as error:
            raise ValueError(f"checkpoint: wanted one that fit has written ({error})") from error
        if "settings" not in saved:
            raise ValueError(f"checkpoint: wanted one that fit has written, got {self._path}")
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written."""
        there, here = saved["settings"], self._settings
        differ = [
            f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
            for key in {**here, **there}
            if there.get(key, "absent") != here.get(key, "absent")
        ]
        if differ:
            more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
            raise ValueError(
                f"checkpoint: wanted one of this training, got {self._path} of another; it differs "
                f"in {', '.join(differ[:4])}{more}"
            )
        self.network.load_state_dict(saved["network"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.scaler.load_state_dict(saved["scaler"])
        self.history = {name: column.tolist() for name, column in saved["history"].items()}
        self.best, self.validated, self.stale = (saved[k] for k in ("best", "validated", "stale"))
        self._begin -= saved["seconds"]
        self._random = saved["processes"][self.processes.rank]
        if self._stream is not None:
            self._stream.load_state_dict(self._random["pairs"])


def _describe(network: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, str]:
    """What network and optimiser must have in common with those of a checkpoint."""
    described = {}
    for name, value in network.state_dict().items():
        kind = type(value).__name__
        if isinstance(value, Tensor):
            kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        described[f"network {name}"] = kind
    described["optimiser"] = type(optimiser).__name__
    for i, group in enumerate(optimiser.param_groups):
        for name, value in group.items():
            content = f"{len(value)} tensors" if name == "params" else repr(value)
            described[f"optimiser {name} {i}"] = content
    return described
