"""The machinery behind `make`: what it says when something is missing, and its exit codes."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment() -> ModuleType:
    return load(ROOT / "book" / "environment.py")


def test_an_old_python_is_named(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(environment.sys, "version_info", (3, 8, 18))
    with pytest.raises(SystemExit, match=r"Python 3\.11 or newer is needed, but this is 3\.8"):
        environment.check_machine(str(tmp_path / ".venv"))


def test_a_python_without_venv_is_named(environment, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match="python3-venv"):
        environment.check_machine(str(tmp_path / ".venv"))


def test_a_full_disk_is_named_before_the_download(environment, monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "total used free")(10e9, 9e9, 1e9)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"1\.0 GB of disk are free"):
        environment.check_machine(str(tmp_path / ".venv"))


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("Temporary failure in name resolution", "package index could not be reached"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ResolutionImpossible", "pip failed"),
    ],
)
def test_a_failure_of_pip_ends_in_one_sentence(environment, tmp_path, output, sentence):
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\necho '{output}' >&2\nexit 1\n")
    pip.chmod(0o755)
    with pytest.raises(SystemExit, match=sentence):
        environment.run_pip(str(pip), ["reglib"])


def test_only_the_marked_oracles_go_into_the_environment(environment):
    found = environment.unresolved_pins(str(ROOT / "requirements-oracles.txt"))
    assert found == ["digital-diffeomorphism==1.1.1"]


def write_notebook(path: Path, *cells: str) -> None:
    code = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": text}
        | {"outputs": [], "execution_count": None}
        for i, text in enumerate(cells)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": code, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook))


@pytest.fixture
def project(tmp_path) -> Path:
    """A tiny project with a library of one line, and the script that executes its notebooks."""
    for folder in ("book", "notebooks", "reglib", "results"):
        (tmp_path / folder).mkdir()
    for name in ("execute.py", "notebook_pytest.py"):
        shutil.copy(ROOT / "book" / name, tmp_path / "book")
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "reglib" / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "reglib"\nversion = "0"\n'
    )
    return tmp_path


def execute(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "book" / "execute.py")]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def test_a_notebook_runs_once_per_change_alone_against_the_wheel(project):
    notebook = project / "notebooks" / "01_a.ipynb"
    alone = "import os\nassert os.listdir() == ['01_a.ipynb'], os.listdir()"
    write_notebook(notebook, "import reglib\nprint(reglib.ANSWER)", alone)
    first = execute(project)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1 executed" in first.stdout

    executed = project / "build" / "executed" / "01_a.ipynb"
    cells = json.loads(executed.read_text())["cells"]
    assert "42" in str(cells[0]["outputs"])
    assert "is_relative_to" not in executed.read_text(), "the check of the wheel left a trace"

    again = execute(project)
    assert again.returncode == 0
    assert "0 executed" in again.stdout

    (project / "reglib" / "__init__.py").write_text("ANSWER = 43\n")
    changed = execute(project)
    assert "1 executed" in changed.stdout
    assert "43" in str(json.loads(executed.read_text())["cells"][0]["outputs"])


def test_a_failing_notebook_fails_every_time_and_leaves_no_page(project):
    write_notebook(
        project / "notebooks" / "01_bad.ipynb", "import reglib\nassert reglib.ANSWER < 0"
    )
    for _ in range(2):
        done = execute(project)
        assert done.returncode == 1
        assert "AssertionError" in done.stdout
        assert "failed: 01_bad" in done.stderr
        assert not (project / "build" / "executed" / "01_bad.json").exists()


def test_a_notebook_that_imports_another_reglib_fails(project):
    other = project / "other"
    (other / "reglib").mkdir(parents=True)
    (other / "reglib" / "__init__.py").touch()
    path = f"import sys\nsys.path.insert(0, {str(other)!r})\nimport reglib"
    write_notebook(project / "notebooks" / "01_other.ipynb", path)
    done = execute(project)
    assert done.returncode == 1
    assert "not the built wheel" in done.stdout


def test_two_notebooks_run_side_by_side_on_a_part_of_the_cores_each(project):
    """Each waits for the other, which only works if both run at a time."""
    meet = (
        "import os, pathlib, time, reglib\npathlib.Path('../{0}').touch()\nend = time.time() + 50\n"
    )
    meet += "while not pathlib.Path('../{1}').exists():\n    assert time.time() < end\n"
    meet += "print('threads', os.environ['OMP_NUM_THREADS'])"
    for name, own, other in (("01_a", "a", "b"), ("02_b", "b", "a")):
        write_notebook(project / "notebooks" / f"{name}.ipynb", meet.format(own, other))
    environment = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, str(project / "book" / "execute.py")]
    done = subprocess.run(
        command, env=environment | {"NOTEBOOK_JOBS": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 executed" in done.stdout
    for name in ("01_a", "02_b"):
        page = (project / "build" / "executed" / f"{name}.ipynb").read_text()
        assert f"threads {max((os.cpu_count() or 1) // 2, 1)}" in page


def test_an_interrupt_ends_every_notebook(project):
    """Nobody is left behind who goes on computing."""
    write_notebook(
        project / "notebooks" / "01_slow.ipynb",
        "import os, pathlib, time, reglib\npathlib.Path('../pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)",
    )
    command = [sys.executable, str(project / "book" / "execute.py")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Whoever runs the tests may ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pid = project / "build" / "notebooks" / "pid"
    end = time.monotonic() + 50
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert not (project / "build" / "executed" / "01_slow.json").exists()
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(int(pid.read_text()), 0)
            assert time.monotonic() < end + 20
            time.sleep(0.1)


def test_a_notebook_that_takes_too_long_is_stopped(project):
    """What is said of it is where it hangs, and where the side hangs that waits for it."""
    hangs = "import reglib\ndef hangs():\n    import time\n    time.sleep(60)\nhangs()"
    write_notebook(project / "notebooks" / "01_slow.ipynb", hangs)
    done = execute(project, NOTEBOOK_TIMEOUT="16")
    assert done.returncode == 1
    assert "longer than 16 s" in done.stdout
    kernel, waiting = done.stdout.split("the side that waits for it")
    assert "line 4 in hangs" in kernel
    assert "nb_run.py" in waiting  # nbmake's, which awaits the cell


def test_the_end_of_a_cell_is_noticed_although_a_message_went_out_as_it_came():
    """As it happens where a cell shows a live viewer; nbclient alone waits for its time limit."""
    command = [sys.executable, "-c", MISSED_REPLY, str(ROOT / "book")]
    seconds = {}
    for kind in ("plain", "ours"):
        done = subprocess.run([*command, kind], capture_output=True, text=True, check=True)
        seconds[kind] = float(done.stdout)
    assert seconds["ours"] < 4  # looked for every second
    assert seconds["plain"] > 7, "jupyter_client was mended: book/notebook_pytest.py may go"


# A client waits for a reply, which comes while it is busy and then sends something itself. Prints
# for how many seconds of 8 it waits.
MISSED_REPLY = """
import asyncio, sys, time
import zmq, zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

if sys.argv[2] == "ours":
    sys.path.insert(0, sys.argv[1])
    from notebook_pytest import get_msg
    AsyncZMQSocketChannel.get_msg = get_msg

async def main():
    session = Session(key=b"key")
    kernel = zmq.Context().socket(zmq.ROUTER)
    port = kernel.bind_to_random_port("tcp://127.0.0.1")
    client = zmq.asyncio.Context().socket(zmq.DEALER)
    client.connect(f"tcp://127.0.0.1:{port}")
    session.send(client, "execute_request")
    identity = kernel.recv_multipart()[0]
    start = time.monotonic()
    waiting = asyncio.create_task(AsyncZMQSocketChannel(client, session).get_msg(timeout=8))
    await asyncio.sleep(0.1)
    session.send(kernel, "execute_reply", ident=identity)
    bare = zmq.Socket.shadow(client.underlying)
    while not bare.get(zmq.EVENTS) & zmq.POLLIN:  # looking takes the notice in, as sending does
        time.sleep(0.01)
    session.send(client, "comm_msg")
    assert (await waiting)["header"]["msg_type"] == "execute_reply"
    print(time.monotonic() - start)

asyncio.run(main())
"""
