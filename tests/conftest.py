"""Settings of the whole suite, and what several of its files need."""

from pathlib import Path

import pytest
import torch

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
