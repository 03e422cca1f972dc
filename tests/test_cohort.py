"""Many pairs: each result is that of a single registration, and nothing that is done gets lost.

The oracle is the single registration, by the command and by the function; NumPy computes the
measures. Images are small and plane, settings coarse. The workers are processes of their own,
started once for most tests; those that are killed were started here.
"""

import csv
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import distributed
import nibabel as nib
import numpy as np
import PIL.Image
import psutil
import pytest
import torch

from reglib import cohort
from reglib.cli import main
from reglib.cohort import CohortPair, check_names, read_pairs, register_cohort, settings_of
from reglib.data.nifti import read_image
from reglib.methods.classical import Displacement, Rigid
from reglib.methods.georeg import load_pretrained
from reglib.methods.pair import Iterate
from reglib.objectives.similarity import lncc
from reglib.registration import Registration, register

SHAPE = (22, 26)
QUICK = ["--method", "displacement", "--start", "none", "--set", "steps=6", "--set", "levels=4,2"]
QUICK += ["--quiet"]
#: What tells the time, or of the cohort.
OWN = {"report.json", "report.png", "pair.json"}


def blob(shift, spread=1.0):
    """An image and labels of a lopsided body."""
    i, j = np.indices(SHAPE) - np.array(shift)[:, None, None]
    outer = np.exp(-((((i - 11) / 7) ** 2 + ((j - 13) / (8 * spread)) ** 2) ** 2))
    inner = np.exp(-((((i - 9) / 3) ** 2 + ((j - 15) / 4) ** 2) ** 2))
    return outer + 0.7 * inner, 1 * (outer > 0.4) + 1 * (inner > 0.4)


def save(path, values, dtype=np.float32):
    nib.save(nib.Nifti1Image(values.astype(dtype), np.diag([1.5, 2.0, 1.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A fixed image, four moving ones, and their labels and masks."""
    folder = tmp_path_factory.mktemp("data")
    image, labels = blob((0, 0))
    save(folder / "fixed.nii.gz", image)
    save(folder / "fixed_labels.nii.gz", labels, np.uint8)
    save(folder / "fixed_mask.nii.gz", image > 0.01, np.uint8)
    for k, (shift, spread) in enumerate([((1, -2), 1), ((-2, 1), 1.1), ((2, 2), 0.9), ((0, 3), 1)]):
        image, labels = blob(shift, spread)
        save(folder / f"m{k}.nii.gz", 100 * image)
        save(folder / f"labels{k}.nii.gz", labels, np.uint8)
        save(folder / f"mask{k}.nii.gz", image > 0.01, np.uint8)
    return folder


@pytest.fixture
def own(data, tmp_path):
    """A copy of the data that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def table(folder, names=range(4), header="moving,fixed", row="m{}.nii.gz,fixed.nii.gz"):
    path = folder / "pairs.csv"
    path.write_text("\n".join([header, *(row.format(*[k] * row.count("{}")) for k in names), ""]))
    return path


@pytest.fixture(scope="module")
def client():
    """Two processes; pairs wait on them, and those that were on two that died are given up."""
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    settings = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.worker-saturation": "inf",
        "distributed.nanny.pre-spawn-environ": {"MALLOC_TRIM_THRESHOLD_": None},
    }
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "env": environment}
    with (
        cohort._environment({}),  # dask sets some for all processes to come
        dask.config.set(settings),
        distributed.LocalCluster(dashboard_address=None, silence_logs=50, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def address(client):
    return client.scheduler_info()["address"]


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a call."""
    capsys.readouterr()
    code = main(["register", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(path):
    with open(path, newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def contents(folder):
    """Every file below a folder, and when it was written."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def states(outcomes):
    return [outcome.state for outcome in outcomes]


def pairs_of(folder, names=range(4)):
    fixed = folder / "fixed.nii.gz"
    return [CohortPair(f"m{k}", folder / f"m{k}.nii.gz", fixed) for k in names]


# --- A pair is what it is alone -------------------------------------------------------------


def test_every_pair_has_the_bits_of_the_single_command(own, address, tmp_path, capsys):
    """With one thread each; the report's own command is the single one. Masks and labels too."""
    roles = ("moving_mask", "fixed_mask", "moving_labels", "fixed_labels")
    lines = [
        f"name,moving,fixed,{','.join(roles)}",
        "plain,m0.nii.gz,fixed.nii.gz,,,,",
        "masks,m1.nii.gz,fixed.nii.gz,mask1.nii.gz,fixed_mask.nii.gz,,",
        "labels,m2.nii.gz,fixed.nii.gz,,,labels2.nii.gz,fixed_labels.nii.gz",
    ]
    path = own / "pairs.csv"
    path.write_text("\n".join(lines))
    given = ("--seed", 3, "--label-mode", "linear", "--scheduler", address)
    out = tmp_path / "out"
    assert run(capsys, "--pairs", path, "--out", out, *QUICK, *given) == (0, "", "")
    assert {p.name for p in out.iterdir()} == {"plain", "masks", "labels", "summary.csv"}
    for name in ("plain", "masks", "labels"):
        report = json.loads((out / name / "report.json").read_text())
        assert report["environment"]["threads"] == torch.get_num_threads() == 1
        words = report["command"][1:]
        single = tmp_path / "single" / name
        words[words.index("--out") + 1] = str(single)
        assert main([*words, "--quiet"]) == 0
        found = {p.name: p.read_bytes() for p in (out / name).iterdir()}
        wanted = {p.name: p.read_bytes() for p in single.iterdir()}
        assert found.keys() - wanted.keys() == {"pair.json"}
        assert wanted.keys() - found.keys() == set()
        assert {"field.nii.gz", "warped.nii.gz"} <= wanted.keys() - OWN
        assert (name == "labels") == ("warped_labels.nii.gz" in wanted)
        for file in wanted.keys() - OWN:
            assert found[file] == wanted[file], (name, file)
        other = json.loads(wanted["report.json"])
        for key in ("command", "seconds", "peak_memory", "timings"):
            del report[key], other[key]
        assert report == other

    # With the words of the cohort, by hand.
    images = (own / "m1.nii.gz", own / "fixed.nii.gz")
    masks = (f"--moving-mask={own / 'mask1.nii.gz'}", f"--fixed-mask={own / 'fixed_mask.nii.gz'}")
    hand = tmp_path / "hand"
    assert run(capsys, *images, *masks, *QUICK, "--seed", 3, "--out", hand) == (0, "", "")
    for file in ("field.nii.gz", "warped.nii.gz"):
        assert (hand / file).read_bytes() == (out / "masks" / file).read_bytes(), file
    # Negative control: the masks matter.
    unmasked = register(*map(read_image, images), Displacement(steps=6, levels=(4, 2)))
    unmasked.save(hand)
    field = (hand / "field.nii.gz").read_bytes()
    assert field != (out / "masks" / "field.nii.gz").read_bytes()


def test_the_function_gives_what_register_gives(data, client, tmp_path):
    """And the measures are those of NumPy; Dice improves."""
    files = {
        "fixed_mask": data / "fixed_mask.nii.gz",
        "moving_labels": data / "labels0.nii.gz",
        "fixed_labels": data / "fixed_labels.nii.gz",
    }
    pair = pairs_of(data, [0])[0]._replace(**files)
    method = Displacement(steps=6, levels=(4, 2))
    [outcome] = register_cohort([pair], method, tmp_path / "out", client=client)
    assert outcome.state == "done"
    folder = tmp_path / "out" / "m0"
    moving, fixed, mask = (read_image(p) for p in (pair.moving, pair.fixed, pair.fixed_mask))
    alone = register(moving, fixed, method, fixed_mask=mask)
    alone.save(tmp_path / "alone")
    for name in ("field.nii.gz", "residual_field.nii.gz", "affine.mat"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert Registration.load(folder).settings["method"] == alone.settings["method"]

    warped, target = (nib.load(folder / "warped.nii.gz").get_fdata(), fixed.tensor[0, 0].numpy())
    inside = mask.tensor[0, 0].numpy() > 0
    wanted = 1 - np.corrcoef(warped[inside], target[inside])[0, 1]
    labels = [nib.load(p).get_fdata() for p in (pair.moving_labels, pair.fixed_labels)]
    labels.append(nib.load(folder / "warped_labels.nii.gz").get_fdata())
    before, after = (
        np.mean([2 * ((x == k) & (labels[1] == k)).sum() / ((x == k).sum() + (labels[1] == k).sum())
                 for k in (1, 2)])
        for x in (labels[0], labels[2])
    )  # fmt: skip
    measures = outcome.measures
    assert measures.similarity == pytest.approx(wanted, abs=1e-5)  # single precision
    assert measures.dice_before == pytest.approx(before, abs=1e-6)
    assert measures.dice == pytest.approx(after, abs=1e-6)
    assert after > before + 0.05
    assert measures.folding == pytest.approx(float(alone.folding), abs=1e-7)
    assert measures.ndv == pytest.approx(float(alone.ndv), abs=1e-7)
    row = rows(tmp_path / "out" / "summary.csv")["m0"]
    assert list(row) == ["name", "state", *measures._fields]
    assert row["state"] == "done"
    for name, value in measures._asdict().items():
        assert float(row[name]) == pytest.approx(value, rel=1e-5), name


def test_networks_travel_with_their_weights(data, client, tmp_path):
    network = load_pretrained()
    [outcome] = register_cohort(pairs_of(data, [1]), network, tmp_path / "a", client=client)
    register(*(read_image(p) for p in outcome.pair[1:3]), network).save(tmp_path / "alone")
    for name in ("field.nii.gz", "residual_field.nii.gz"):
        found = (tmp_path / "a" / "m1" / name).read_bytes()
        assert found == (tmp_path / "alone" / name).read_bytes()
    # Its weights are settings.
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match=r"1 of 1 pairs, such as m1 \(weights\.0: "):
        register_cohort(pairs_of(data, [1]), network, tmp_path / "a", client=client)


def counting():
    """A method that moves one voxel further each time that it is called."""

    class Counter:
        calls = 0

        def __call__(self, pair):
            self.calls += 1
            u = torch.full_like(pair.field, float(self.calls))
            active = torch.ones(1, dtype=torch.bool)
            yield Iterate("stage", {}, active, lambda: (pair.affine, u))

    return Counter()


def test_a_pair_finds_nothing_that_another_has_left(data, client, tmp_path):
    """Four pairs on two workers: each is the first."""
    outcomes = register_cohort(pairs_of(data), counting(), tmp_path, client=client)
    assert states(outcomes) == ["done"] * 4
    for k in range(4):
        assert bool((Registration.load(tmp_path / f"m{k}").field == 1).all())


# --- Going on -------------------------------------------------------------------------------


METHOD = Rigid(steps=3, levels=(4,))


def test_what_is_done_is_not_done_again(own, client, tmp_path):
    """Not a byte is written but the tables; a smaller table has fewer rows."""
    pairs, out = pairs_of(own), tmp_path / "out"
    first = register_cohort(pairs[:3], METHOD, out, client=client)
    assert states(first) == ["done"] * 3
    before = contents(out)
    second = register_cohort(pairs, METHOD, out, client=client)
    assert states(second) == ["kept"] * 3 + ["done"]
    assert [o.measures for o in second[:3]] == [o.measures for o in first]
    after = contents(out)
    assert {p: after[p] for p in before if p.name != "summary.csv"} == {
        p: content for p, content in before.items() if p.name != "summary.csv"
    }
    assert list(rows(out / "summary.csv")) == ["m0", "m1", "m2", "m3"]
    assert {row["state"] for row in rows(out / "summary.csv").values()} == {"done"}

    # Touched but the same, and moved to another place: the content counts.
    (own / "m1.nii.gz").touch()
    elsewhere = Path(shutil.copytree(own, tmp_path / "elsewhere"))
    assert states(register_cohort(pairs_of(elsewhere), METHOD, out, client=client)) == ["kept"] * 4


def test_other_settings_stop_the_run_and_other_files_a_pair(own, client, tmp_path):
    """Nothing is replaced but by force, and then only what has changed."""
    pairs, out = pairs_of(own, range(3)), tmp_path / "out"
    register_cohort(pairs, METHOD, out, client=client)
    before = contents(out)
    other = dataclasses.replace(METHOD, steps=4)
    with pytest.raises(ValueError, match=r"3 of 3 pairs, such as m0 \(method\.0\..*3, now 4\)"):
        register_cohort(pairs, other, out, client=client)
    with pytest.raises(ValueError, match=r"similarity: ncc, now mse"):
        register_cohort(
            pairs, METHOD, out, client=client, similarity=importlib.import_module(
                "reglib.objectives.similarity"
            ).mse,
        )  # fmt: skip
    assert contents(out) == before

    save(own / "m1.nii.gz", 100 * blob((3, 3))[0])
    outcomes = register_cohort(pairs, METHOD, out, client=client)
    assert states(outcomes) == ["kept", "failed", "kept"]
    assert re.search(r"m1: made from other files \(moving\)", outcomes[1].reason)
    assert rows(out / "summary.csv")["m1"]["state"] == "failed"
    assert rows(out / "summary.csv")["m1"]["similarity"] == ""
    assert {p: c for p, c in contents(out).items() if p.suffix != ".csv"} == {
        p: c for p, c in before.items() if p.suffix != ".csv"
    }
    forced = register_cohort(pairs, METHOD, out, client=client, force=True)
    assert states(forced) == ["kept", "done", "kept"]
    assert not (out / "failed.csv").exists()
    everything = register_cohort(pairs, other, out, client=client, force=True)
    assert states(everything) == ["done"] * 3
    assert Registration.load(out / "m0").settings["method"][0]["settings"]["steps"] == 4
    assert not (out / ".parts").exists()


def test_a_damaged_folder_is_made_anew_and_a_foreign_one_left_alone(own, client, tmp_path):
    pairs, out = pairs_of(own), tmp_path / "out"
    register_cohort(pairs, METHOD, out, client=client)
    field = (out / "m0" / "field.nii.gz").read_bytes()
    (out / "m0" / "field.nii.gz").write_bytes(b"")  # as after a loss of power
    (out / "m1" / "pair.json").write_text("{")
    (out / "m2" / "warped.nii.gz").unlink()
    (out / "m2" / "thesis.txt").write_text("years of work")
    shutil.rmtree(out / "m3")
    (out / "m3").write_text("a file")
    for force in (False, True):
        outcomes = register_cohort(pairs, METHOD, out, client=client, force=force)
        assert states(outcomes) == ["kept" if force else "done", "failed", "failed", "failed"]
        assert (out / "m0" / "field.nii.gz").read_bytes() == field
        for outcome, hint in zip(
            outcomes[1:], ["got affine.mat", "got thesis.txt", "got a file"], strict=True
        ):
            assert hint in outcome.reason
        assert (out / "m2" / "thesis.txt").read_text() == "years of work"
        assert (out / "m3").read_text() == "a file"


def test_what_a_killed_process_has_left_is_cleared(data, client, tmp_path):
    """Killed between the two renamings, the old result stands aside: it comes back."""
    pairs = pairs_of(data, range(2))
    register_cohort(pairs, METHOD, tmp_path, client=client)
    before = contents(tmp_path / "m0")
    (tmp_path / ".parts" / "0123456789ab.new.m0").mkdir(parents=True)
    (tmp_path / ".parts" / "0123456789ab.new.m0" / "warped.nii.gz").write_text("half")
    (tmp_path / "m0").rename(tmp_path / ".parts" / "0123456789ab.old.m0")
    (tmp_path / ".parts" / "0123456789ab.new.m1").mkdir()
    assert states(register_cohort(pairs, METHOD, tmp_path, client=client)) == ["kept"] * 2
    assert contents(tmp_path / "m0") == before
    other = dataclasses.replace(METHOD, steps=4)
    register_cohort(pairs, other, tmp_path, client=client, force=True)
    names = {"m0", "m1", "summary.csv"}
    assert {p.name for p in tmp_path.iterdir()} - {".parts"} == names
    assert not (tmp_path / ".parts").exists()


# --- What goes wrong ------------------------------------------------------------------------


def test_a_bad_pair_does_not_stop_the_rest(own, address, tmp_path, capsys):
    """One of each kind among good ones; mended, only these are done."""
    values = 100 * blob((1, 1))[0]
    save(own / "flat.nii.gz", np.ones(SHAPE))
    (own / "text.nii.gz").write_text("this is no image")
    (own / "cut.nii.gz").write_bytes((own / "m0.nii.gz").read_bytes()[:-40])
    save(own / "nan.nii.gz", np.where(values > 99, np.nan, values))
    save(own / "volume.nii.gz", np.random.default_rng(0).uniform(0, 1, (6, 7, 8)))
    names = ["m0", "gone", "flat", "text", "cut", "nan", "volume", "m3"]
    path = table(own, names, row="{}.nii.gz,fixed.nii.gz", header="moving,fixed")
    out = tmp_path / "out"
    words = ("--pairs", path, "--out", out, *QUICK, "--scheduler", address)
    code, text, err = run(capsys, *words)
    assert (code, text) == (1, "")
    assert err == f"Error: 6 of 8 pairs failed; {out / 'failed.csv'} says why\n"
    reasons = {name: row["reason"] for name, row in rows(out / "failed.csv").items()}
    hints = {
        "gone": "gone.nii.gz: No such file",
        "flat": "MOVING: wanted an image with contrast",
        "text": "text.nii.gz: ",
        "cut": "cut.nii.gz: .*gzip",
        "nan": "nan.nii.gz: wanted finite voxels, .*--nonfinite 0 would",
        "volume": "both plane or both volumes",
    }
    assert list(reasons) == [f"{name}_to_fixed" for name in hints]
    for name, hint in hints.items():
        assert re.search(hint, reasons[f"{name}_to_fixed"]), reasons
    assert rows(out / "failed.csv")["gone_to_fixed"]["moving"] == str(own / "gone.nii.gz")
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"m0_to_fixed", "m3_to_fixed"}
    summary = rows(out / "summary.csv")
    assert [row["state"] for row in summary.values()] == ["done", *["failed"] * 6, "done"]

    before = contents(out / "m0_to_fixed")
    for name in ("gone", "flat", "text", "cut", "nan", "volume"):
        save(own / f"{name}.nii.gz", values)
    loud = [word for word in words if word != "--quiet"]
    code, text, err = run(capsys, *loud)
    assert (code, err) == (0, "")
    assert text == f"8 of 8 pairs registered, 2 of them before\nWritten: {out / 'summary.csv'}\n"
    assert not (out / "failed.csv").exists()
    assert contents(out / "m0_to_fixed") == before


def test_a_full_disk_is_a_reason_and_leaves_nothing(data, client, tmp_path):
    def full():
        def work(pair, folder):
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device", str(folder / "half"))

        return work

    pairs = pairs_of(data, [0])
    [outcome] = cohort.run_cohort(pairs, full(), tmp_path, settings={}, client=client)
    assert outcome.reason == f"{tmp_path / 'm0' / 'half'}: No space left on device"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["failed.csv", "summary.csv"]


def test_two_that_do_the_same_pair_agree(data, client, tmp_path):
    """A worker that was taken for dead is swept away, and the other's result is whole."""

    def slow(here):
        def work(pair, folder):
            (folder / "warped.nii.gz").write_text("whole")
            (here / "started").touch()
            while not (here / "go").exists():
                time.sleep(0.01)
            folder.mkdir(exist_ok=True)
            (folder / "rest").write_text("half")
            return cohort.Measures(1.0, 0.5, 0.0, 0.0)

        return work

    def other():
        def work(pair, folder):
            (folder / "warped.nii.gz").write_text("whole")
            (folder / "rest").write_text("whole")
            return cohort.Measures(2.0, 0.5, 0.0, float("nan"))

        return work

    pairs, found = pairs_of(data, [0]), []
    given = {"settings": {"a": 1}, "client": client}
    late = threading.Thread(
        target=lambda: found.extend(
            cohort.run_cohort(pairs, slow(tmp_path), tmp_path / "out", **given)
        )
    )
    late.start()
    wait_for((tmp_path / "started").exists)
    assert states(cohort.run_cohort(pairs, other(), tmp_path / "out", **given)) == ["done"]
    (tmp_path / "go").touch()
    late.join(30)
    assert states(found) == ["kept"]
    assert found[0].measures == cohort.Measures(2.0, 0.5, 0.0, None)
    assert (tmp_path / "out" / "m0" / "rest").read_text() == "whole"
    assert not (tmp_path / "out" / ".parts").exists()


# --- Killed and interrupted -----------------------------------------------------------------


def wait_for(condition, seconds=100.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def dies_once(marker):
    """A method that says which process it is in, and waits to be killed: the first time only."""

    def method(pair):
        try:
            with open(marker, "x") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(60)
        except FileExistsError:
            pass
        u = torch.full_like(pair.field, 0.5)
        yield Iterate("stage", {}, torch.ones(1, dtype=torch.bool), lambda: (pair.affine, u))

    return method


def test_a_killed_worker_loses_nothing(data, client, tmp_path):
    marker, out = tmp_path / "marker", tmp_path / "out"
    killed = []

    def kill():
        wait_for(lambda: marker.exists() and marker.read_text().endswith("\n"))
        killed.append(int(marker.read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    ours = set(client.run(os.getpid).values())
    killer.start()
    outcomes = register_cohort(pairs_of(data), dies_once(marker), out, client=client)
    killer.join()
    assert killed[0] in ours
    assert states(outcomes) == ["done"] * 4
    assert sorted(p.name for p in out.iterdir()) == ["m0", "m1", "m2", "m3", "summary.csv"]
    for pair in pairs_of(data):
        images = (read_image(path) for path in pair[1:3])
        register(*images, dies_once(marker)).save(tmp_path / "alone" / pair.name)
        for name in ("field.nii.gz", "residual_field.nii.gz", "affine.mat"):
            wanted = (tmp_path / "alone" / pair.name / name).read_bytes()
            assert (out / pair.name / name).read_bytes() == wanted, (pair.name, name)


def deadly():
    """A method that an image of more than 1000 kills."""

    def method(pair):
        if pair.moving.max() > 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Iterate("s", {}, torch.ones(1, dtype=torch.bool), lambda: (pair.affine, pair.field))

    return method


def test_a_pair_that_kills_its_workers_is_given_up(own, client, tmp_path):
    """And not those that waited beside it."""
    save(own / "m0.nii.gz", 2000 * blob((1, 1))[0])
    pairs = pairs_of(own) + [p._replace(name=f"again {p.name}") for p in pairs_of(own, [1, 2, 3])]
    outcomes = register_cohort(pairs, deadly(), tmp_path / "out", client=client)
    assert states(outcomes) == ["failed", *["done"] * 6]
    assert outcomes[0].reason.startswith("the process died every time")
    assert rows(tmp_path / "out" / "failed.csv")["m0"]["reason"] == outcomes[0].reason
    assert not (tmp_path / "out" / "m0").exists()


def start(*words):
    """The command in a session of its own, as a terminal has it, with two workers."""
    program = str(Path(sys.executable).with_name("reglib"))
    command = [program, "register", *map(str, words), "--workers", "2", "--threads", "1"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        # Shells start background jobs with Ctrl-C ignored, and this would pass on to the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ready(out):
    return {p.name for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")}


def test_the_command_survives_a_killed_worker_and_ctrl_c(data, address, tmp_path, capsys):
    """Worker killed after the first pair, Ctrl-C after the second, then the same command goes on.

    The pairs that were done stay as they were, and four that differ have the bits of the single
    function.
    """
    path, count = tmp_path / "pairs.csv", 48  # so many that some are left at Ctrl-C
    lines = [f"p{k},{data}/m{k % 4}.nii.gz,{data}/fixed.nii.gz" for k in range(count)]
    path.write_text("\n".join(["name,moving,fixed", *lines]))
    # The network is quick, so most of the time goes into reading, writing and drawing.
    out, words = tmp_path / "out", ["--pairs", path, "--method", "georeg"]
    process = start(*words, "--out", out)
    try:
        wait_for(lambda: out.exists() and len(ready(out)) >= 1)
        os.killpg(process.pid, signal.SIGSTOP)  # looking around takes a while on a busy machine
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        at_kill = len(ready(out))
        os.killpg(process.pid, signal.SIGCONT)
        wait_for(lambda: len(ready(out)) >= at_kill + 1)
        os.killpg(process.pid, signal.SIGINT)
        text, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 1, text + err
    assert text == ""
    goes_on = "the same command goes on from there"
    assert err == f"Interrupted: what is done stays in {out}; {goes_on}.\n"
    assert all(not child.is_running() for child in workers)
    done = ready(out)
    assert 0 < at_kill < len(done) < count
    summary = rows(out / "summary.csv")
    assert {name for name, row in summary.items() if row["state"] == "done"} == done
    assert {row["state"] for row in summary.values()} == {"done", "open"}
    assert not (out / ".parts").exists()
    before = {name: contents(out / name) for name in done}

    code, text, err = run(capsys, *words, "--out", out, "--scheduler", address)
    assert (code, err) == (0, "")
    assert text.startswith(f"{count} of {count} pairs registered, {len(done)} of them before\n")
    assert {name: contents(out / name) for name in done} == before
    network = load_pretrained()
    for k in range(4):
        images = (read_image(data / f"{name}.nii.gz") for name in (f"m{k % 4}", "fixed"))
        register(*images, network).save(tmp_path / "alone" / f"p{k}")
        for name in ("field.nii.gz", "residual_field.nii.gz", "affine.mat"):
            wanted = (tmp_path / "alone" / f"p{k}" / name).read_bytes()
            assert (out / f"p{k}" / name).read_bytes() == wanted, (k, name)
        report = json.loads((out / f"p{k}" / "report.json").read_text())
        assert report["environment"]["threads"] == 1


# --- Tables and words -----------------------------------------------------------------------


def test_paths_are_relative_to_the_table(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    text = "\ufeffFixed, MOVING ,moving_mask\n../b.nii.gz,a.x.nii,\n\n/c/b.png,d/a.NII.GZ,m.nii\n"
    Path("lists/pairs.csv").write_text(text, encoding="utf-8")
    first, second = read_pairs("lists/pairs.csv")
    folder = tmp_path / "lists"
    assert first == CohortPair("a.x_to_b", folder / "a.x.nii", folder / "../b.nii.gz")
    assert second == CohortPair(
        "a_to_b", folder / "d/a.NII.GZ", Path("/c/b.png"), moving_mask=folder / "m.nii"
    )
    assert second.files().keys() == {"moving", "fixed", "moving_mask"}


TABLES = {
    "empty": ("", "an empty file"),
    "no pairs": ("moving,fixed\n", "one pair or more"),
    "other columns": ("a,b\n1,2\n", "moving and fixed"),
    "twice": ("moving,fixed,moving\na,b,c\n", "each once"),
    "no fixed": ("moving,fixed\na.nii,\n", "line 2: wanted a file for fixed"),
    "ragged": ("moving,fixed\na,b\n\na,b,c\n", "line 4: wanted 2 cells"),
    "labels of one": ("moving,fixed,fixed_labels\na,b,c\n", "moving_labels beside"),
    "same name": ("moving,fixed\na/x.nii,f.nii\nb/x.nii.gz,f.nii\n", "'x_to_f'"),
    "same but for case": ("name,moving,fixed\np,a,b\nP,c,b\n", "a name of its own"),
    "no name": ("name,moving,fixed\n../p,a,b\n", "'../p'"),
    "hidden": ("name,moving,fixed\n.parts,a,b\n", "'.parts'"),
    "a table": ("name,moving,fixed\nSummary.csv,a,b\n", "a table is called"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_are_none(name, tmp_path, capsys):
    text, hint = TABLES[name]
    (tmp_path / "pairs.csv").write_text(text)
    given = ("--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "out", *QUICK)
    code, out, err = run(capsys, *given)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"Error: .*pairs\.csv.*{re.escape(hint)}.*\n", err), err
    assert not (tmp_path / "out").exists()


def test_columns_that_mean_nothing_are_named(data, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("moving,fixed,age,fixed_msk\na,b,3,c\n")
    with pytest.warns(UserWarning, match=r"not used: the columns age, fixed_msk"):
        read_pairs(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="wanted a CSV file"):
        read_pairs(path)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "no.csv")


PAIRS = ["--pairs", "p.csv"]
MISUSE = {
    "nothing": ([], "--pairs, got no MOVING"),
    "one": (["a.nii"], "got no FIXED"),
    "both": (["a.nii", "b.nii", *PAIRS], "got both"),
    "labels": ([*PAIRS, "--moving-labels", "l.nii"], "in a column moving_labels"),
    "workers": (["a.nii", "b.nii", "--workers", "2"], "with --pairs only"),
    "scheduler": (["a.nii", "b.nii", "--scheduler", "tcp://h:1"], "with --pairs only"),
    "no workers": ([*PAIRS, "--workers", "0"], "--workers"),
    "workers of others": ([*PAIRS, "--scheduler", "tcp://h:1", "--threads", "2"], "--threads"),
    "setting": ([*PAIRS, "--set", "stpes=3"], "steps"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told_before_anything_is_read(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, hint = MISUSE[name]
    code, out, err = run(capsys, *arguments, "--method", "rigid", "--out", "o")
    assert (code, out) == (2, "")
    assert hint in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_windows_of_the_similarity_are_part_of_the_settings(own, client, tmp_path):
    """Columns of a table never mix two measures."""
    pairs, out = pairs_of(own, [0]), tmp_path / "out"
    five, nine = (functools.partial(lncc, window=n) for n in (5, 9))
    register_cohort(pairs, METHOD, out, client=client, similarity=five)
    assert states(register_cohort(pairs, METHOD, out, client=client, similarity=five)) == ["kept"]
    with pytest.raises(ValueError, match=r"similarity.*window.*5.*, now .*9"):
        register_cohort(pairs, METHOD, out, client=client, similarity=nine)


def test_a_picture_in_colours_is_refused_before_it_is_registered(own, client, tmp_path):
    PIL.Image.new("RGB", (20, 24)).save(own / "m0.png")
    [pair] = pairs_of(own, [0])
    pair = pair._replace(moving=own / "m0.png")
    [outcome] = register_cohort([pair], METHOD, tmp_path / "out", client=client)
    assert outcome.state == "failed"
    assert re.search(r"m0\.png: wanted an image in grey, got one of 3 channels", outcome.reason)


def test_a_scheduler_that_is_not_there(data, tmp_path, capsys):
    given = ("--pairs", table(Path(shutil.copytree(data, tmp_path / "d"))), *QUICK)
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        words = ("--out", tmp_path / "o", "--scheduler", "tcp://127.0.0.1:1")
        code, _, err = run(capsys, *given, *words)
    assert code == 1
    assert not (tmp_path / "o").exists()
    assert re.fullmatch(r"Error: .*tcp://127\.0\.0\.1:1.*\n", err), err


def test_bad_arguments_are_named(data, client, tmp_path):
    pairs, locked = pairs_of(data, [0]), threading.Lock()
    for error, match, given in (
        (TypeError, "pairs: wanted", {"pairs": []}),
        (TypeError, "pairs: wanted", {"pairs": [("a", "b")]}),
        (TypeError, "method: wanted", {"method": Rigid}),
        (TypeError, "method: wanted", {"method": []}),
        (TypeError, "method: .*pickled", {"method": lambda pair: locked}),
        (TypeError, "similarity: wanted", {"similarity": "ncc"}),
        (TypeError, "client: wanted", {"client": 3}),
        (ValueError, "workers: wanted None", {"workers": 2}),
        (ValueError, "threads: wanted at least 1", {"client": None, "threads": 0}),
        (ValueError, "a name of its own", {"pairs": pairs * 2}),
    ):
        chosen = {"pairs": pairs, "method": METHOD, "client": client} | given
        with pytest.raises(error, match=match):
            register_cohort(chosen.pop("pairs"), chosen.pop("method"), tmp_path / "o", **chosen)
    assert list(tmp_path.iterdir()) == []
    check_names(["a", "a.b", "sub-01 T1w"])


def test_settings_are_json_and_tell_methods_apart():
    first = settings_of([METHOD, load_pretrained()])
    assert json.loads(json.dumps(first)) == first
    assert first == settings_of([METHOD, load_pretrained()])
    assert first != settings_of([dataclasses.replace(METHOD, steps=4), load_pretrained()])
    network = load_pretrained()
    with torch.no_grad():
        list(network.parameters())[-1].view(-1)[0] += 1e-3
    assert first["method"] == settings_of([METHOD, network])["method"]
    assert first["weights"] != settings_of([METHOD, network])["weights"]


def test_without_dask_it_says_what_to_install(data, tmp_path, monkeypatch, capsys):
    """And importing the module does not ask for it."""
    code = "import sys, reglib.cohort, reglib.cli.cohort; "
    check = "assert not {'dask', 'distributed', 'cloudpickle'} & set(sys.modules); print('light')"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert done.stdout == "light\n", done.stderr
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r'pip install "reglib\[scale\]"'):
        register_cohort(pairs_of(data), METHOD, tmp_path)
    given = ("--pairs", table(Path(shutil.copytree(data, tmp_path / "d"))), *QUICK)
    code, out, err = run(capsys, *given, "--out", tmp_path / "o")
    assert (code, out) == (1, "")
    assert re.fullmatch(r'Error: .*pip install "reglib\[scale\]"\n', err)
    assert not (tmp_path / "o").exists()


def test_the_environment_is_as_it_was(data, tmp_path):
    """What dask sets for its workers slows the allocation of memory in all later processes."""
    before = dict(os.environ)
    assert "MALLOC_TRIM_THRESHOLD_" not in before
    register_cohort(pairs_of(data, [1]), METHOD, tmp_path / "out", workers=1, threads=1)
    assert dict(os.environ) == before
