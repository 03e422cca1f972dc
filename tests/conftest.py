"""Settings of the whole suite, and what several of its files need."""

import math
from pathlib import Path

import pytest
import torch

from reglib import synth

# The tensors of the tests are small: handing them to several threads costs more than it saves,
# and on a loaded machine a hundred times more.
torch.set_num_threads(1)


@pytest.fixture
def fake_workers(monkeypatch):
    """Puts a function in the place of the processes that register pairs for a table.

    It is called as ``register(worker, name, settings)``. A worker has ``files``, which it would
    read and write, its ``script``, and ``warm``, which it was started with. What the function gives
    is what the worker answers.
    """

    def install(benchmark, register):
        class Workers:
            def __init__(self, python, folder, file, logs, *, warm):
                self.files = {part: folder / f"{part}.nii" for part in ("moving", "fixed", "field")}
                self.script, self.warm = Path(file), warm

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def register(self, name, settings):
                return register(self, name, settings)

        monkeypatch.setattr(benchmark, "Workers", Workers)
        monkeypatch.setattr(benchmark, "make_environment", lambda: Path("python"))
        monkeypatch.setattr(benchmark, "versions", lambda python: {})

    return install


@pytest.fixture
def uncached():
    """Empties the caches of functions: when it is called, and when the test is over."""
    emptied = []

    def empty(*functions):
        emptied.extend(functions)
        for function in functions:
            function.cache_clear()

    yield empty
    for function in emptied:
        function.cache_clear()


@pytest.fixture
def train_on_shapes():
    """Trains a network on random pairs of a shape: ``(network, objective, shape, *, steps, lr)``.

    Adam; the learning rate rises for a tenth of the steps, and then falls. The objective is given
    the output, both images and both label maps.
    """

    def train(network, objective, shape, *, steps, lr):
        generator = torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(network.parameters())
        network.train()
        for step in range(steps):
            spent = step / steps
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, 10 * spent + 0.05) * (1 + math.cos(math.pi * spent)) / 2
            pair = synth.random_pair(shape, batch=4, cell=16, generator=generator)
            terms = objective(network(pair.moving, pair.fixed), *pair[:4])
            optimiser.zero_grad()
            torch.stack(tuple(terms.values())).sum().backward()
            optimiser.step()
        network.eval()

    return train
