"""One training loop for every network of the library."""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from reglib.checkpoint import Processes, Run
from reglib.checks import check_choice, check_positive_int

#: What a network returns, the moving and the fixed image, and whatever else a batch holds -> named
#: terms of the loss.
Objective = Callable[..., Mapping[str, Tensor]]

#: The share of the training that is spent, from 0 to 1 -> a factor of the learning rate.
Schedule = Callable[[float], float]

#: Columns of the log and the history that are no terms of the loss.
_COLUMNS = ("step", "loss", "seconds", "validation")
_PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_END = object()


def half_cosine(spent: float) -> float:
    """(1 + cos(pi s)) / 2: 1 at the start, 0 at the end.

    Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, without restarts.
    """
    return 0.5 * (1 + math.cos(math.pi * spent))


def polynomial(spent: float, power: float = 0.9) -> float:
    """(1 - s)^p: 1 at the start, 0 at the end; another power through ``functools.partial``.

    Chen et al., "DeepLab", arXiv:1606.00915, whose power is 0.9.
    """
    return (1 - spent) ** power


def warm_up(spent: float, share: float = 0.1, then: Schedule = half_cosine) -> float:
    """0 at the start, rising along a line to 1 at ``share``; from there on ``then``, from its 0.

    What networks with attention need; others through ``functools.partial``.

    Goyal et al., arXiv:1706.02677, section 2.2.
    """
    return spent / share if spent < share else then((spent - share) / (1 - share))


def fit(
    network: nn.Module,
    pairs: Iterable[Sequence[Any]],
    objective: Objective,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = 1e-3,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    schedule: Schedule = half_cosine,
    accumulate: int = 1,
    precision: str = "float32",
    clip: float | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    log: str | Path | None = None,
    fabric: Any = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train ``network`` in place on a stream of pairs, on the sum of the objective's terms.

    Stops at whichever comes first of ``steps``, ``seconds``, the end of ``pairs`` and ``patience``.
    The network comes back in evaluation mode.

    **Resuming.** With ``checkpoint``, a call that finds the file goes on from there, and finds its
    way to the same bits as a run that was never stopped (CPU, same number of threads, no limit of
    ``seconds``), whenever it was killed: the file is replaced whole or not at all. It holds the
    network, the optimiser, the history, torch's global random states (those of dropout and
    stochastic depth) and the state of ``pairs`` where these have ``state_dict()`` and
    ``load_state_dict()``, made of tensors and JSON values; other pairs must come in the same order
    again, and those that were used are drawn and thrown away. Random states of anything else
    (numpy, ``random``, a generator of the objective's own) are not in it. The network's tensors are
    those called ``network/...`` by :func:`reglib.weights.load_weights`. ``steps``, ``seconds`` and
    ``patience`` may be others than before. Time that was spent before counts.

    **Interrupting.** Ctrl-C lets the step that runs come to its end, writes the checkpoint, and
    raises ``KeyboardInterrupt``; the network is that of the last step. A second Ctrl-C does not
    wait, and writes nothing. (Elsewhere than in the main thread, or where the program handles
    SIGINT itself, nothing is changed about that.)

    **Several processes.** Each calls ``fit`` with a launched ``lightning_fabric.Fabric`` of the
    strategy ``"ddp"`` and with pairs of its own, on ``fabric.device``, of equal batch size. The
    gradient, the history and the validation are means over the processes, the first of which
    writes; all stop together. InstanceNorm and LayerNorm give what one process with all the pairs
    would give. BatchNorm does not: each process normalises by the statistics of its own batch, and
    its running statistics are those of the first process (on GPUs,
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)`` makes them those of all). A network
    that leaves parameters unused needs ``DDPStrategy(find_unused_parameters=True)``.

    Args:
        network: called as ``network(moving, fixed)``; its parameters are changed.
        pairs: batches ``(moving, fixed)`` or ``(moving, fixed, *extras)``, images ``(B, C, *S)``,
            on the network's device.
        objective: ``objective(output, moving, fixed, *extras)`` -> terms of the loss, scalars by
            name, the same names at every step; lower is better.
        steps: number of optimiser steps; ``None`` for no limit.
        seconds: wall-clock limit; ``None`` for no limit. The learning rate then falls with the
            time that is spent if that is a larger share than that of the steps.
        lr: learning rate to start from.
        optimiser: called as ``optimiser(parameters, lr=lr)``; a class of ``torch.optim``, or what
            ``functools.partial`` or a function makes of one (parameter groups with their own rates
            keep the ratio of these).
        schedule: factor of the learning rate, given the share of the limits that is spent (0 where
            there is no limit): :func:`reglib.training.half_cosine`,
            :func:`reglib.training.polynomial` or another function.
        accumulate: batches of pairs whose mean gradient makes one step. An incomplete last group is
            left out.
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or ``"float16"``; parameters stay as
            they are. With float16 the loss is scaled, and a step whose scaled gradient overflows is
            left out, but counted, as ``torch.amp.GradScaler`` does it.
        clip: largest length of the gradient; a longer one is shortened to it. ``None`` for any.
        checkpoint: file to resume from and to write; ``None`` for neither.
        every: steps between two checkpoints; one more is written at the end.
        validate: ``validate(network)`` -> one number, lower is better; called in evaluation mode
            without gradients, after every ``validate_every`` steps and after the last. Random
            numbers that it draws do not change the training.
        validate_every: ``None`` means ``every``.
        patience: stop after so many validations in a row without a new lowest value. However the
            training ends, the network then has the weights that were best, and the progress bar
            says which. A NaN is never best. ``None``: the weights of the last step stay.
        log: a ``.csv`` file, one row a step, or a folder for TensorBoard (``pip install
            tensorboard``). A row is written when the next step is done. What is there already is
            replaced, by the same rows where the training is resumed.
        fabric: see above; ``pip install "reglib[scale]"``.
        progress: show a progress bar with the terms of the loss.

    Returns:
        One list per term, plus ``"loss"`` (their sum), ``"seconds"`` since the start and, with
        ``validate``, ``"validation"`` (NaN where there was none), with one entry per step.

    Raises:
        TypeError, ValueError: if an argument is not as above, ``pairs`` is empty, or the checkpoint
            belongs to another training; the message says what differs.
        FloatingPointError: if the loss or its gradient is NaN or infinite; the parameters are
            those before the step that would have spoilt them.
        ImportError: if ``log`` is a folder and TensorBoard is not installed.
        KeyboardInterrupt: see above.
    """
    counts = {"steps": steps, "validate_every": validate_every, "patience": patience}
    for name, count in counts.items():
        if count is not None:
            check_positive_int(count, name)
    check_positive_int(accumulate, "accumulate")
    check_positive_int(every, "every")
    for name, number in {"lr": lr, "seconds": seconds, "clip": clip}.items():
        if number is not None or name == "lr":
            _check_positive(number, name)
    check_choice(precision, "precision", tuple(_PRECISIONS))
    if patience is not None and validate is None:
        raise ValueError("patience: wanted a function validate beside it, got None")
    if next(network.parameters(), None) is None:
        raise ValueError(f"network: wanted parameters to train, got a {type(network).__name__}")
    processes = Processes(fabric)
    called = processes.set_up(network)
    made = optimiser(network.parameters(), lr=lr)
    rates = [group["lr"] for group in made.param_groups]
    run = Run(
        network,
        made,
        pairs,
        processes,
        checkpoint,
        accumulate=accumulate,
        precision=precision,
        clip=clip,
        schedule=[schedule(k / 8) for k in range(8)],
        validate=validate is not None,
    )
    batches, first = run.batches(), processes.rank == 0
    shown = progress and first
    network.train()
    try:
        with (
            _progress(steps, run.step) if shown else contextlib.nullcontext() as bar,
            _logging(log if first else None, run) as log_rows,
            _deferred_interrupt() as interrupted,
        ):
            while not (steps and run.step >= steps) and not (patience and run.stale >= patience):
                elapsed, stop = processes.sum(run.seconds if first else 0.0, interrupted())
                if stop:
                    run.save()
                    raise KeyboardInterrupt(f"after {run.step} steps")
                spent = max(run.step / steps if steps else 0.0, elapsed / seconds if seconds else 0)
                if spent >= 1:
                    break
                for group, rate in zip(made.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(spent)
                terms = _add_gradient(run, called, batches, objective, _PRECISIONS[precision])
                if terms is None:
                    break
                _take_step(run, terms, clip)
                for name, value in (terms | {"seconds": run.seconds}).items():
                    run.history.setdefault(name, []).append(value)
                if validate is not None:
                    run.history.setdefault("validation", []).append(math.nan)
                    if run.step % (validate_every or every) == 0:
                        run.validate(validate, keep_best=patience is not None)
                log_rows(run.step - 1)
                if run.step % every == 0:
                    run.save()
                if bar is not None:
                    bar.set_postfix({k: f"{v:.4f}" for k, v in terms.items()}, refresh=False)
                    bar.update()
            if not run.step:
                raise ValueError("pairs: wanted at least one (moving, fixed) batch, got none")
            if validate is not None and run.validated < run.step:
                run.validate(validate, keep_best=patience is not None)
            run.save()
            if interrupted():
                raise KeyboardInterrupt(f"after {run.step} steps, the last")
            if patience is not None and run.best is not None:
                network.load_state_dict(run.best["network"])
                if bar is not None:
                    value, step = run.best["value"], run.best["step"]
                    bar.write(f"kept: step {step} of {run.step}, lowest validation {value:.4g}")
    finally:
        network.eval()
    return run.history


def _progress(total: int | None, done: int) -> Any:
    """A progress bar; imported late, as trainings on borrowed machines may do without."""
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, unit="step")


def _check_positive(value: object, name: str) -> None:
    """Raise unless ``value`` is a positive number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: wanted a positive number, got {value!r}")
    if not float(value) > 0:
        raise ValueError(f"{name}: wanted a positive number, got {value!r}")


def _add_gradient(
    run: Run,
    called: nn.Module,
    batches: Iterator[Any],
    objective: Objective,
    dtype: torch.dtype | None,
) -> dict[str, float] | None:
    """Leave the gradient of the mean loss of some batches; its terms, or None after the last batch.

    The terms are means, too, and ``"loss"`` is their sum.
    """
    run.optimiser.zero_grad(set_to_none=True)
    means: dict[str, float] = {}
    for part in range(1, run.accumulate + 1):
        batch = next(batches, _END)
        if any(run.processes.sum(batch is _END)):
            return None
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"pairs: wanted batches (moving, fixed, ...), got {type(batch)}")
        moving, fixed, *extras = batch
        with run.processes.exchanging(called, part == run.accumulate):
            with torch.autocast(run.device.type, dtype) if dtype else contextlib.nullcontext():
                terms = dict(objective(called(moving, fixed), moving, fixed, *extras))
                _check_terms(terms, run.history)
                loss = torch.stack(tuple(terms.values())).sum()
            run.processes.backward(run.scaler.scale(loss / run.accumulate))
        for name, term in (terms | {"loss": loss}).items():
            means[name] = means.get(name, 0.0) + term.item() / run.accumulate
    return dict(zip(means, run.processes.mean(*means.values()), strict=True))


def _check_terms(terms: Mapping[str, Any], history: Mapping[str, Any]) -> None:
    """Raise unless an objective's terms are scalars by the names that the history knows."""
    if not terms or any(not isinstance(t, Tensor) or t.ndim for t in terms.values()):
        raise ValueError(f"objective: wanted terms that are scalar tensors, got {terms}")
    if terms.keys() & set(_COLUMNS):
        raise ValueError(
            f"objective: {', '.join(map(repr, _COLUMNS))} are columns of the history; "
            f"wanted other names for its terms, got {list(terms)}"
        )
    known = [name for name in history if name not in _COLUMNS]
    if known and set(known) != terms.keys():
        raise ValueError(f"objective: wanted the terms {known} at every step, got {list(terms)}")


def _take_step(run: Run, terms: Mapping[str, float], clip: float | None) -> None:
    """One step of the optimiser, or FloatingPointError instead of one that spoils the weights."""
    run.scaler.unscale_(run.optimiser)
    gradients = [p.grad for p in run.network.parameters() if p.grad is not None]
    length = torch.nn.utils.get_total_norm(gradients)
    finite = math.isfinite(length.item())
    # Scaled to float16's range a gradient may overflow, but not when nothing scales it up.
    overflow = run.scaler.is_enabled() and run.scaler.get_scale() >= 1
    if not math.isfinite(terms["loss"]) or not (finite or overflow):
        raise FloatingPointError(
            f"loss: {terms['loss']}, gradient of length {length.item()} at step {run.step} "
            f"({ {k: v for k, v in terms.items() if k != 'loss'} })"
        )
    if clip is not None and finite:
        torch.nn.utils.clip_grads_with_norm_(run.network.parameters(), clip, length)
    run.scaler.step(run.optimiser)
    run.scaler.update()


@contextlib.contextmanager
def _logging(path: str | Path | None, run: Run) -> Iterator[Callable[[int], None]]:
    """Give a function that writes the rows up to a step; at the end the rest is written."""
    if path is None:
        yield lambda step: None
        return
    with contextlib.ExitStack() as stack:
        # Those before a resumption are written again: a log may end before or after the checkpoint.
        written = 0
        if Path(path).suffix.lower() == ".csv":
            file = stack.enter_context(open(path, "w", buffering=1, encoding="utf-8", newline=""))
            put = _table(file)
        else:
            put = _curves(path, stack)

        def write(step: int) -> None:
            nonlocal written
            for row in range(written, step):
                put(row + 1, {name: column[row] for name, column in run.history.items()})
            written = max(written, step)

        try:
            yield write
        finally:
            write(run.step)


def _table(file: TextIO) -> Callable[[int, dict[str, float]], None]:
    """Give what writes the rows of a CSV file."""
    writer = csv.writer(file)

    def put(step: int, row: dict[str, float]) -> None:
        if step == 1:
            writer.writerow(["step", *row])
        writer.writerow([step, *("" if math.isnan(value) else value for value in row.values())])

    return put


def _curves(
    folder: str | Path, stack: contextlib.ExitStack
) -> Callable[[int, dict[str, float]], None]:
    """Give what writes the points of TensorBoard's curves, in the place of those that are there."""
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ImportError(
            f"log: wanted a .csv file, or TensorBoard for a folder (pip install tensorboard), "
            f"got {folder} and no TensorBoard"
        ) from error
    writer = tensorboard.SummaryWriter(folder, purge_step=1)
    stack.callback(writer.close)

    def put(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            if not math.isnan(value):
                writer.add_scalar(name, value, step)

    return put


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed; a second one raises at once."""
    came = False

    def wait(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Handlers belong to the main thread, and that of somebody else is left to them.
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, wait)
    try:
        yield lambda: came
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
