"""Settings of the whole suite, and what several of its files need."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# The tensors of the tests are small: handing them to several threads costs more than it saves,
# and on a loaded machine a hundred times more.
torch.set_num_threads(1)


@pytest.fixture
def fake_workers(monkeypatch):
    """Puts a function in the place of the processes that register pairs for a table.

    It is called as ``register(pair, name, settings)``, where ``pair`` has the files that a worker
    would read and write, ``files``, its ``script`` and its arguments ``warm``. What it gives is
    what a worker answers.
    """

    def install(benchmark, register):
        class Workers:
            def __init__(self, python, folder, file, logs, *, warm):
                files = {part: folder / f"{part}.nii" for part in ("moving", "fixed", "field")}
                self.files = files
                self.pair = SimpleNamespace(files=files, script=Path(file), warm=warm)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def register(self, name, settings):
                return register(self.pair, name, settings)

        monkeypatch.setattr(benchmark, "Workers", Workers)
        monkeypatch.setattr(benchmark, "make_environment", lambda: Path("python"))
        monkeypatch.setattr(benchmark, "versions", lambda python: {})

    return install
