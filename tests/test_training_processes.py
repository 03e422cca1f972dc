"""Trainings that are killed, and trainings in two processes at once.

This file is also the program of the child processes: ``python FILE kills FOLDER`` and
``python FILE pairs FOLDER``, each started once and writing what it has seen as JSON.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from torch import nn

from reglib.methods import georeg
from reglib.training import fit
from reglib.weights import load_state, load_weights, save_state

NUMBER = 2  # processes that train together
BATCH = 4  # pairs in all of them


class Network(nn.Module):
    """A small network with the use of random numbers, for images of 6 x 7 pixels."""

    def __init__(self, norm, drop=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(drop),
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            norm(4),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 2, 3, padding=1),
        )

    def forward(self, moving, fixed):
        return self.layers(torch.cat([moving, fixed], 1))


instance_norm = partial(nn.InstanceNorm2d, affine=True)


def seeded(norm, drop=0.0, seed=0):
    torch.manual_seed(seed)
    return Network(norm, drop)


def small_georeg():
    torch.manual_seed(0)
    settings = {"channels": (4, 8), "neighbourhoods": (3, 3), "iterations": (1, 1)}
    return georeg.GeoReg(**settings)


def stream(rank=0, number=1):
    """The same endless stream for all, of which each process takes its part of every batch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        moving, fixed = torch.rand(2, BATCH, 1, 6, 7, generator=generator)
        yield moving[rank::number], fixed[rank::number]


def distances(field, moving, fixed):
    return {"first": (field[:, :1] - fixed).square().mean(), "second": field.square().mean()}


class FailsAt:
    """An objective that does something bad at one of its calls."""

    def __init__(self, call, deed):
        self.calls, self.call, self.deed = count(), call, deed

    def __call__(self, *arguments):
        terms = distances(*arguments)
        if next(self.calls) == self.call:
            terms |= self.deed() or {}
        return terms


def stop():
    raise RuntimeError("stopped")


def state_of(network):
    return {name: tensor.tolist() for name, tensor in network.state_dict().items()}


# --- Killed at any moment ---------------------------------------------------------------------


class Pairs:
    """A stream that knows where it stands."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        while True:
            yield tuple(torch.rand(2, BATCH, 1, 6, 7, generator=self.generator))

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


KINDS = {
    "with a state": (Pairs, {"precision": "bfloat16"}),
    "drawn again": (stream, {"accumulate": 2, "clip": 0.5}),
}
STEPS = 150


def train(kind, path, seed):
    """The call that is killed and made again; its result lies beside the checkpoint."""
    make_pairs, options = KINDS[kind]
    network = seeded(nn.BatchNorm2d, 0.2, seed)
    options |= {"checkpoint": path, "steps": STEPS, "every": 3, "log": path.with_suffix(".csv")}
    options |= {"validate": lambda network: (network.layers[4].bias - 0.2).norm(), "patience": 99}
    history = fit(network, make_pairs(), distances, lr=1e-2, progress=False, **options)
    del history["seconds"]
    result = {"network": network.state_dict(), "history": history}
    save_state(path.with_suffix(".result"), result)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(function, calls):
    """``function``, but one of its calls is the end."""

    def deadly(*arguments, **options):
        if next(calls) == 0:
            kill()
        return function(*arguments, **options)

    return deadly


def kill_after(function, calls):
    def deadly(*arguments, **options):
        result = function(*arguments, **options)
        if next(calls) == 0:
            kill()
        return result

    return deadly


class HalfWritten:
    """A file that dies with half of its content."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        kill()


def arm(place):
    """Make this process die at a place of the code, some times after it was first there."""
    import reglib.checkpoint
    import reglib.data.files

    calls = count(-4)
    if place == "before the file takes its name":
        os.replace = kill_before(os.replace, calls)
    elif place == "after the file took its name":
        os.replace = kill_after(os.replace, calls)
    elif place == "half of the file":

        def half(*arguments):
            file = open(*arguments)  # noqa: SIM115
            return HalfWritten(file) if next(calls) == 0 else file

        reglib.data.files.open = half
    elif place == "between step and history":
        torch.optim.Adam.step = kill_after(torch.optim.Adam.step, calls)
    elif place == "in the validation":
        reglib.checkpoint.Run.validate = kill_after(reglib.checkpoint.Run.validate, calls)


PLACES = [
    "before the file takes its name",
    "after the file took its name",
    "half of the file",
    "between step and history",
    "in the validation",
]


def child_of(kind, path, seed, place=""):
    """Fork a process that trains; this one has not used autograd, which does not survive a fork."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            arm(place)
            train(kind, path, seed)
            status = 0
        finally:
            os._exit(status)
    return pid


def status_of(pid):
    """0 or the number of the exit, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_kills(folder):
    """Train once in peace, and once with deaths at random moments and at chosen places."""
    import torch._dynamo  # the optimisers import it, which takes longer than a training here

    torch.set_num_threads(1)
    moments, seen = random.Random(0), {}
    for kind in KINDS:
        name = kind.replace(" ", "_")
        start = time.perf_counter()
        assert status_of(child_of(kind, folder / f"{name}_whole", 0)) == 0
        duration = time.perf_counter() - start
        path, deaths, positions = folder / f"{name}_killed", [], []
        for life, place in enumerate([*PLACES, "", "", "", ""]):
            log, done = path.with_suffix(".csv"), positions[-1] if positions else 0
            log.unlink(missing_ok=True)
            pid = child_of(kind, path, life, place)
            if not place:
                # Some steps on, and then at any moment within the next few.
                while not log.exists() or log.read_text().count("\n") < done + moments.randint(
                    3, 15
                ):
                    time.sleep(0.001)
                time.sleep(moments.uniform(0, 5) * duration / STEPS)
                os.kill(pid, signal.SIGKILL)
            deaths.append(status_of(pid))
            # Whatever lies there can be read.
            positions.append(len(load_state(path)["history"]["loss"]) if path.exists() else 0)
        last = status_of(child_of(kind, path, len(deaths)))
        seen[kind] = {"deaths": deaths, "positions": positions, "last": last}
    (folder / "seen.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    start_child("kills", folder)
    return folder, json.loads((folder / "seen.json").read_text())


def start_child(mode, folder):
    command = [sys.executable, __file__, mode, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_with_the_bits_of_one_that_was_left_in_peace(killed, kind):
    folder, seen = killed
    assert seen[kind]["deaths"][: len(PLACES)] == [-signal.SIGKILL] * len(PLACES)
    assert seen[kind]["deaths"].count(-signal.SIGKILL) > len(PLACES), "a random moment as well"
    # It got on, and never fell back.
    assert 0 < seen[kind]["positions"][0] < STEPS
    assert seen[kind]["positions"] == sorted(seen[kind]["positions"])
    assert seen[kind]["last"] == 0
    name = kind.replace(" ", "_")
    whole, other = (load_state(folder / f"{name}_{how}.result") for how in ("whole", "killed"))
    assert repr(whole["history"]) == repr(other["history"])
    assert whole["network"].keys() == other["network"].keys()
    for key, tensor in whole["network"].items():
        assert tensor.equal(other["network"][key]), key


def test_the_log_of_a_killed_training_is_that_of_one_that_was_left_in_peace(killed):
    folder, _ = killed
    for kind in KINDS:
        tables = []
        for how in ("whole", "killed"):
            text = (folder / f"{kind.replace(' ', '_')}_{how}.csv").read_text()
            # The fifth column is the time.
            tables.append([line.split(",")[:4] + line.split(",")[5:] for line in text.split()])
        assert tables[0] == tables[1]
        assert len(tables[0]) == STEPS + 1


# --- Two processes ----------------------------------------------------------------------------


def run_pairs(folder):
    """All scenarios of two processes, in one launch."""
    from lightning_fabric import Fabric

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fabric = Fabric(accelerator="cpu", devices=NUMBER, strategy="ddp")
    fabric.launch()
    rank, seen = fabric.global_rank, {}

    def train(network, objective=distances, pairs=None, **options):
        """A training's outcome: history, weights, and how it ended."""
        pairs = stream(rank, NUMBER) if pairs is None else pairs
        torch.manual_seed(10 + rank)
        ended, history = "", {}
        try:
            options = {"steps": 8, "lr": 1e-2, "progress": False} | options
            history = fit(network, pairs, objective, fabric=fabric, **options)
        except (RuntimeError, FloatingPointError, KeyboardInterrupt) as error:
            ended = f"{type(error).__name__}: {error}"
        return {"history": history, "network": state_of(network), "ended": ended}

    # The second process begins with other weights; those of the first must count.
    seen["together"] = train(seeded(instance_norm, seed=rank))
    seen["accumulated"] = train(seeded(instance_norm), accumulate=2, clip=0.3)
    seen["half precision"] = train(seeded(instance_norm), precision="float16")
    seen["batch norm"] = train(seeded(nn.BatchNorm2d), steps=1)

    pairs = ((m[..., :6], f[..., :6]) for m, f in stream(rank, NUMBER))
    options = {"pairs": pairs, "steps": 3, "accumulate": 2}
    seen["GeoReg"] = train(small_georeg(), georeg.objective, **options)

    path = folder / "run.safetensors"
    seen["dropout"] = train(seeded(instance_norm, 0.3))
    options = {"checkpoint": path, "every": 2, "log": folder / "log.csv"}
    seen["stopped"] = train(seeded(instance_norm, 0.3), FailsAt(5, stop), **options)
    fabric.barrier()
    seen["resumed"] = train(seeded(instance_norm, 0.3, seed=5), **options)

    few = islice(stream(rank, NUMBER), 5 - 2 * rank)
    seen["unequal ends"] = train(seeded(instance_norm), pairs=few)
    seen["time"] = train(seeded(instance_norm), steps=None, seconds=0.3)
    before = seeded(instance_norm, seed=rank)
    seen["before"] = {"network": state_of(before)}
    deed = (lambda: {"first": torch.tensor(torch.nan)}) if rank else (lambda: None)
    seen["broken"] = train(before, FailsAt(0, deed))
    interrupt = (lambda: os.kill(os.getpid(), signal.SIGINT)) if rank else (lambda: None)
    seen["interrupted"] = train(seeded(instance_norm), FailsAt(3, interrupt))
    seen["validated"] = train(seeded(instance_norm), validate=lambda network: rank, every=4)
    (folder / f"seen_{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    start_child("pairs", folder)
    return [json.loads((folder / f"seen_{r}.json").read_text()) for r in range(NUMBER)], folder


def alone(network, **options):
    history = fit(network, stream(), distances, lr=1e-2, progress=False, **{"steps": 8} | options)
    return history, state_of(network)


def flat(state):
    return torch.cat([torch.tensor(v).flatten() for v in state.values()])


@pytest.mark.parametrize(
    ("scenario", "options", "tolerance"),
    [
        ("together", {}, 1e-5),
        ("accumulated", {"accumulate": 2, "clip": 0.3}, 1e-5),
        # Rounding to 11 bits differs with the batch.
        ("half precision", {"precision": "float16"}, 1e-3),
    ],
)
def test_two_processes_do_what_one_does_with_the_doubled_batch(both, scenario, options, tolerance):
    seen, _ = both
    history, weights = alone(seeded(instance_norm), **options)
    for process in seen:
        for name in ("first", "second", "loss"):
            assert process[scenario]["history"][name] == pytest.approx(history[name], abs=tolerance)
        assert flat(process[scenario]["network"]).allclose(flat(weights), atol=10 * tolerance)
    assert max(history["loss"]) - min(history["loss"]) > 100 * tolerance
    assert seen[0][scenario]["network"] == seen[1][scenario]["network"]


def test_a_network_of_the_library_with_its_own_output_trains_in_two_processes(both):
    seen, _ = both
    network = small_georeg()
    pairs = ((m[..., :6], f[..., :6]) for m, f in stream())
    options = {"steps": 3, "accumulate": 2, "lr": 1e-2, "progress": False}
    history = fit(network, pairs, georeg.objective, **options)
    for process in seen:
        assert process["GeoReg"]["history"]["loss"] == pytest.approx(history["loss"], abs=1e-5)
    assert len(set(history["loss"])) == 3


def test_batch_norm_normalises_the_part_of_each_process(both):
    """As the docstring of fit says: the loss differs, the running statistics are the first's."""
    seen, _ = both
    moving, fixed = next(stream(0, NUMBER))
    part = seeded(nn.BatchNorm2d)
    part(moving, fixed)
    mean = part.layers[2].running_mean
    assert torch.tensor(seen[0]["batch norm"]["network"]["layers.2.running_mean"]).allclose(mean)
    history, state = alone(seeded(nn.BatchNorm2d), steps=1)
    assert not torch.tensor(state["layers.2.running_mean"]).allclose(mean, rtol=1e-3)
    assert abs(seen[0]["batch norm"]["history"]["loss"][0] - history["loss"][0]) > 1e-5


def test_two_processes_resume_to_the_bit_each_with_its_own_random_numbers(both):
    seen, folder = both
    for process in seen:
        assert process["stopped"]["ended"] == "RuntimeError: stopped"
        assert process["resumed"]["network"] == process["dropout"]["network"]
        assert process["resumed"]["history"]["loss"] == process["dropout"]["history"]["loss"]
    assert process["resumed"]["network"] != process["stopped"]["network"]
    one, other = load_state(folder / "run.safetensors")["processes"]
    assert not one["cpu"].equal(other["cpu"])
    lines = (folder / "log.csv").read_text().split()
    assert len(lines) == 9, "the first process writes, and only it"


def test_a_checkpoint_of_two_processes_is_refused_by_one(both):
    _, folder = both
    path = folder / "run.safetensors"
    with pytest.raises(ValueError, match=r"number of processes \(2 there, 1 here\)"):
        alone(seeded(instance_norm, 0.3), checkpoint=path)
    tensors, _ = load_weights(path)
    assert "network/layers.1.weight" in tensors


def test_all_processes_stop_together(both):
    seen, _ = both
    assert [len(p["unequal ends"]["history"]["loss"]) for p in seen] == [3, 3]
    one, other = (p["time"]["history"] for p in seen)
    assert len(one["loss"]) == len(other["loss"]) > 0
    assert [p["interrupted"]["ended"] for p in seen] == ["KeyboardInterrupt: after 4 steps"] * 2
    for process in seen:
        assert process["broken"]["ended"].startswith("FloatingPointError: loss: nan")
        # The second process began with the weights of the first.
        assert process["broken"]["network"] == seen[0]["before"]["network"]


def test_the_validation_is_the_mean_of_the_processes(both):
    seen, _ = both
    for process in seen:
        column = process["validated"]["history"]["validation"]
        assert [v for v in column if v == v] == [0.5, 0.5]


def test_one_process_of_a_fabric_is_one_without(tmp_path):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    path = tmp_path / "run.safetensors"
    options = {"fabric": fabric, "checkpoint": path, "every": 3, "accumulate": 2}
    _, state = alone(seeded(instance_norm), **options)
    assert state == alone(seeded(instance_norm), accumulate=2)[1]


if __name__ == "__main__":
    {"kills": run_kills, "pairs": run_pairs}[sys.argv[1]](Path(sys.argv[2]))
