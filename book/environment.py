"""Make the virtual environment: one command, one sentence for everything that can be missing.

Started by the Makefile with whatever ``python3`` the machine has, so this file keeps to syntax
that an old interpreter can parse: it must live long enough to say that it is too old.
"""

from __future__ import print_function

import os
import shutil
import subprocess
import sys

WANTED = (3, 11)
# Measured: 6.5 GB for torch with its CUDA libraries and the book, plus room to unpack.
NEEDED_GB = 8
NETWORK_SIGNS = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "nodename nor servname",
    "Network is unreachable",
    "Connection refused",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "NameResolutionError",
    "Cannot connect to proxy",
)


def stop(sentence):
    """End with one sentence and exit code 1."""
    sys.exit("make: " + sentence)


def run_pip(python, arguments):
    """Run pip with its output shown, and put a failure into one sentence."""
    # Without a network the usual five attempts for every package take minutes.
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--retries", "2"]
    command += arguments
    print("+ pip install " + " ".join(arguments), flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    seen = []
    for line in process.stdout:
        # A second run would otherwise print a hundred lines that say "already there".
        if not line.startswith("Requirement already satisfied"):
            print(line, end="", flush=True)
        seen.append(line)
    if process.wait() == 0:
        return
    output = "".join(seen)
    if "No space left on device" in output:
        stop("the disk is full; the environment needs about %d GB." % NEEDED_GB)
    if any(sign in output for sign in NETWORK_SIGNS):
        stop("the package index could not be reached; check the network or the proxy and rerun.")
    stop("pip failed; its last lines above say why. Running make again continues from here.")


def check_machine(folder):
    """Stop with a sentence when the machine cannot hold the environment."""
    if sys.version_info < WANTED:
        stop(
            "Python %d.%d or newer is needed, but this is %d.%d; try `make PYTHON=python3.12 ...`."
            % (WANTED + tuple(sys.version_info[:2]))
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop(
            "this Python cannot make virtual environments; "
            "on Debian or Ubuntu: sudo apt-get install python3-venv"
        )
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(folder))).free / 1e9
    if free < NEEDED_GB:
        stop("%.1f GB of disk are free here, but about %d GB are needed." % (free, NEEDED_GB))


def unresolved_pins(path):
    """Pins below the line that marks packages to install without their dependencies."""
    with open(path) as lines:
        text = lines.read().split("# --no-deps", 1)[1]
    return [line for line in text.splitlines()[1:] if line and not line.startswith("#")]


def main():
    """Make or complete the environment; arguments: its folder, then constraint files."""
    folder, constraints = sys.argv[1], sys.argv[2:]
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        check_machine(folder)
        print("Making %s (several minutes the first time: torch is large)" % folder, flush=True)
        if subprocess.call([sys.executable, "-m", "venv", folder]) != 0:
            shutil.rmtree(folder, ignore_errors=True)
            stop("making the virtual environment failed; the lines above say why.")
    if subprocess.call([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) != 0:
        stop("%s is damaged; `rm -rf %s` and run make again." % (folder, folder))
    pinned = [word for path in constraints for word in ("-c", path)]
    run_pip(python, ["-e", ".[book,test]"] + pinned)
    run_pip(python, ["--no-deps"] + unresolved_pins("requirements-oracles.txt"))
    with open(os.path.join(folder, ".stamp"), "w"):
        pass


if __name__ == "__main__":
    main()
