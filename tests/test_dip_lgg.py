"""Laves' table: its pairs, its measures and its arithmetic, without data or peers.

SimpleITK's baseline runs on a small artificial pair; ANTs stays out. About 10 s on one core.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from skimage.metrics import structural_similarity

from reglib.data.nifti import Image, read_field, write_field, write_image
from reglib.geometry.sampling import warp
from reglib.methods import dip
from reglib.registration import register

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("dip_lgg")
    job = importlib.import_module("dip_lgg_job")
    benchmark = importlib.import_module("benchmark_classical")
    records = importlib.import_module("benchmark_record")
    peers = importlib.import_module("peers")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (40, 44)
QUICK = {"steps": 12, "pool": 2, "network": {"channels": [6, 8], "skips": [2, 2], "inputs": 4}}


def blob(middle: tuple[float, float], radius: float) -> torch.Tensor:
    """A smooth disc, ``(1, 1, H, W)``."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1)
    r = (places - torch.tensor(middle)).float().norm(dim=-1) / radius
    return (1 / (1 + torch.exp(8 * (r - 1))))[None, None]


def pair_of(shift: float = 2.0) -> benchmark.Loaded:
    """A head and what lies in it in two channels, and the same further along the first axis."""

    def side(x: float) -> tuple[Image, torch.Tensor]:
        brain, spot = blob((20 + x, 22), 13), blob((17 + x, 20), 4)
        image = torch.cat([0.6 * brain + 0.3 * spot, 0.8 * brain - 0.4 * spot], 1)
        return Image(image, script.AFFINE), (torch.cat([brain, spot], 1) > 0.5).long()

    (moving, moving_masks), (fixed, fixed_masks) = side(shift), side(0.0)
    return benchmark.Loaded(script.STRUCTURES, moving, fixed, moving_masks, fixed_masks)


def moved(*by: float) -> torch.Tensor:
    return torch.zeros(1, 2, *SHAPE) + torch.tensor(by).view(1, 2, 1, 1)


# --- Configurations -------------------------------------------------------------------------


def test_the_table_has_what_the_issue_compares_and_says_it_in_json():
    found = script.CONFIGURATIONS
    assert json.loads(json.dumps(found)) == found
    assert json.loads(json.dumps(script.CHANGES)) == script.CHANGES
    assert {settings["package"] for settings in found.values()} == {
        "SimpleITK",
        "antspyx",
        "reglib",
    }
    assert script.methods_of(found["DIP, paper"]) == [dip.PRESETS["paper"]]
    for settings in found.values():
        if settings["package"] == "reglib":
            assert all(map(callable, script.methods_of(settings)))


def test_the_sensitivity_study_changes_one_thing_at_a_time():
    methods = {n: script.dip_of(script.CHOSEN | change) for n, change in script.CHANGES.items()}
    chosen = methods.pop("as chosen")
    assert chosen == script.dip_of(script.CHOSEN)
    for name, method in methods.items():
        names = [f.name for f in fields(method)]
        different = {x for x in names if getattr(method, x) != getattr(chosen, x)}
        # More steps are none if a pair stops before.
        assert len(different - {"patience"}) == 1, name
        if different == {"network"}:  # and what is changed is not a scale that nobody uses
            weights = [
                sum(p.numel() for p in dip.Prior(m, (256, 256), 1, torch.Generator()).parameters())
                for m in (method, chosen)
            ]
            assert weights[0] != weights[1], name


# --- Pairs ----------------------------------------------------------------------------------


def test_every_patient_is_moving_to_the_next_in_both_channels_and_copies_lie_apart():
    patients = [f"p{n}" for n in range(9)]
    found = script.pairs_of(patients, {"p2", "other"})
    t1, flair = found[::2], found[1::2]
    for some in (t1, flair):
        assert [(c.moving, c.fixed) for c in some] == list(itertools.pairwise(patients))
        assert [c.cluster for c in some] == [0] * 6 + [1] * 2
    assert [c.set for c in t1] == ["T1", "T1 copies", "T1 copies"] + ["T1"] * 5
    assert {c.set for c in flair} == {"FLAIR"}
    assert len({c[:3] for c in found}) == len(found)


def test_the_papers_network_sees_ten_pairs_and_two_of_them_with_the_noise_kept():
    for patients in (20, 60):
        everything = script.pairs_of([f"p{n}" for n in range(patients)], {"p3"})
        (all_of_them, quick), (few, own), (fewer, other) = script.parts(
            everything, list(script.CONFIGURATIONS)
        )
        assert all_of_them == everything
        assert [*quick, *own, *other] == list(script.CONFIGURATIONS)
        assert len(set(few)) == 10
        assert {c.set for c in few} == {"T1"}
        assert len(set(fewer)) == 2
        assert set(fewer) < set(few)
        for some in (few, fewer):
            assert some == sorted(some, key=everything.index)


@pytest.fixture
def data(tmp_path, monkeypatch, uncached):
    """Files as they are in the data: of two patients; their colours and tumours."""
    folder = tmp_path / "lgg"
    (folder / "png").mkdir(parents=True)
    patients = json.loads(script.SPLITS.read_text())["lgg"]["tuning"]
    rows = ["patient,kind,image,mask,has_pre_contrast"]
    rows += [
        f"{patient},{kind},{n}_{kind}.png,{n}_mask.png,{int(n != 1)}"
        for n, patient in enumerate(patients)
        for kind in ("tumour", "mid")
    ]
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    found = []
    for n, shift in enumerate((2.0, 0.0)):
        pair = pair_of(shift)
        colours = (255 * torch.cat([pair.moving.tensor, pair.fixed.tensor[:, :1]], 1)).byte()
        tumour = 255 * pair.moving_labels[0, 1].byte()
        PIL.Image.fromarray(colours[0].movedim(0, -1).numpy()).save(folder / f"png/{n}_mid.png")
        PIL.Image.fromarray(tumour.numpy()).save(folder / f"png/{n}_mask.png")
        found.append((colours, tumour))
    monkeypatch.setattr(script, "fetch", lambda name: tmp_path / name)
    uncached(script.index, script.placed)
    return patients, found


def test_slices_become_t1_flair_and_masks(data):
    patients, [(colours, tumour), _] = data
    found = script.cases("tuning")
    assert len(found) == 2 * (len(patients) - 1)
    assert [c.set for c in found[::2][:3]] == ["T1 copies", "T1 copies", "T1"]
    image, masks = script.load_slice(patients[0])
    assert image.shape == masks.shape == (1, 2, *SHAPE)
    for c in range(2):
        x = colours[0, c].double().numpy()
        top = np.quantile(x, 0.99)
        expected = np.clip((x - x.min()) / (top - x.min()), 0, 1)
        np.testing.assert_allclose(image[0, c], expected, atol=1e-6)
    assert torch.equal(masks[0, 1], (tumour > 0).long())


def test_a_pair_is_placed_once_and_seen_in_the_channel_of_its_set(data):
    """The shift of two voxels is found: both channels, and the masks, come to the same place."""
    patients, _ = data
    t1, flair = (
        script.load(benchmark.Case(name, *patients[:2], 0)) for name in ("T1 copies", "FLAIR")
    )
    both = script.placed(*patients[:2])
    for c, one in enumerate((t1, flair)):
        assert torch.equal(one.moving.tensor, both.moving.tensor[:, c : c + 1])
        assert float((one.moving.tensor - one.fixed.tensor).abs().mean()) < 0.01
        assert one.moving_labels is both.moving_labels
    assert script.measure(t1, moved(0.0, 0.0))["mean_dice"] > 0.98
    assert script.measure(t1, moved(2.0, 0.0))["mean_dice"] < 0.95


def test_the_head_is_the_largest_part_with_its_holes_filled():
    image = torch.zeros(1, 2, *SHAPE)
    image[0, 0, 8:30, 8:30] = 0.5
    image[0, 1, 25:34, 10:20] = 0.5
    expected = (image.amax(1, keepdim=True) > 0).long()
    image[0, :, 14:18, 14:18] = 0  # a hole
    image[0, 0, 2:6, 36:42] = 1.0  # something else
    image[0, 0, 0, 0] = 1.0
    found = script.head_mask(image).long()
    # The opening rounds corners off.
    assert float(script.dice(found, expected, labels=[1])) > 0.97
    assert found[0, 0, 15, 15] == 1
    assert not found[0, 0, :7, 35:].any()
    assert not script.head_mask(torch.zeros(1, 2, *SHAPE)).any()


# --- Measures -------------------------------------------------------------------------------


def test_measures_of_the_truth_and_of_nothing():
    """SSIM by scikit-image, mean over channels; whole voxels, so that nothing is interpolated."""
    pair = pair_of()
    still, truth = (script.measure(pair, moved(by, 0.0)) for by in (0.0, 2.0))
    expected = [
        structural_similarity(
            pair.moving.tensor[0, c].numpy(),
            pair.fixed.tensor[0, c].numpy(),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for c in range(2)
    ]
    assert still["ssim"] == pytest.approx(np.mean(expected), abs=2e-4)
    assert truth["ssim"] == pytest.approx(1.0, abs=1e-3)
    for name in ("mean_dice", "tumour_dice"):
        assert still[name] < 0.95
        assert truth[name] == 1.0
    assert truth["tumour_area"] == truth["det_mean"] == 1.0
    assert truth["folding"] == truth["ndv"] == 0


def test_shrinking_and_folding_show():
    pair = pair_of(0.0)
    x = torch.arange(SHAPE[0], dtype=torch.float32) - 17
    u = moved(0.0, 0.0)
    u[:, 0] = x.view(-1, 1)  # twice the distance: half the length
    half = script.measure(pair, u)
    assert half["tumour_area"] == pytest.approx(0.5, abs=0.1)
    assert half["det_mean"] == pytest.approx(2.0, abs=1e-5)
    u[:, 0] = -2 * x.view(-1, 1)
    turned = script.measure(pair, u)
    assert turned["folding"] == turned["folding_inside"] == 1.0
    assert turned["ndv"] > 0.9  # counted in cells, of which there is one less along each axis


def test_a_pair_without_a_tumour_has_no_overlap_of_tumours():
    pair = pair_of()
    none = pair.moving_labels.clone()
    none[:, 1] = 0
    found = script.measure(pair._replace(moving_labels=none), moved(0.0, 0.0))
    assert found["tumour_dice"] is None
    assert found["tumour_area"] is None
    found = script.measure(pair._replace(fixed_labels=none), moved(0.0, 0.0))
    assert found["tumour_dice"] is None
    assert found["tumour_area"] == 1.0


# --- Registering ----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """The artificial pair on disk."""
    found = {part: tmp_path / f"{part}.nii" for part in ("moving", "fixed")}
    for part, image in zip(found, script.artificial_pair(), strict=True):
        write_image(found[part], image)
    return found | {"field": tmp_path / "field.nii.gz"}


def test_ours_leaves_the_field_that_register_finds(files):
    settings = {"package": "reglib", "dip": script.CHOSEN | QUICK}
    assert script.run_here(files, "DIP", settings)["seconds"] > 0
    images = (image.tensor for image in script.artificial_pair())
    expected = register(*images, script.dip_of(settings["dip"]), progress=False).field
    assert expected.any()
    torch.testing.assert_close(read_field(files["field"])[0], expected, atol=1e-5, rtol=0)


def test_the_baseline_finds_the_artificial_shift(files):
    """1.5 voxels: away from the border, more than half of the difference is gone."""
    settings = {"package": "SimpleITK", "displacement": script.ITK | {"iterations": 40}}
    paths = [str(files[part]) for part in ("moving", "fixed", "field")]
    peers.run_simpleitk(*paths, settings)
    u, affine = read_field(files["field"])
    assert torch.equal(affine, script.AFFINE)
    moving, fixed = (image.tensor for image in script.artificial_pair())
    after = (warp(moving, u.float()) - fixed)[..., 6:-6, 6:-6].abs().mean()
    assert float(after) < 0.5 * float((moving - fixed)[..., 6:-6, 6:-6].abs().mean())


def test_a_run_is_resumed_and_summed_up(tmp_path, files, monkeypatch):
    """One finds the truth, one is broken, one leaves a field of another grid."""
    pairs = {"b": pair_of(2.0), "c": pair_of(1.0)}

    def load(case):
        both, c = pairs[case.fixed], script.CHANNELS.index(case.set)
        images = (Image(x.tensor[:, c : c + 1], x.affine) for x in (both.moving, both.fixed))
        return benchmark.Loaded(script.STRUCTURES, *images, *both[3:])

    everything = script.pairs_of(["a", "b", "c"], set())
    asked = []

    def run(name, settings):
        asked.append(name)
        if name == "broken":
            return {"error": "broken"}
        affine = script.AFFINE * (1 if name == "good" else 2)
        affine[-1, -1] = 1
        write_field(files["field"], moved(2.0, 0.0), affine)
        return {"seconds": 0.5, "cpu_seconds": 1.0}

    wanted = {name: {"package": "none"} for name in ("good", "broken", "elsewhere")}
    for _ in range(2):  # the second finds nothing left
        record = records.Record(tmp_path / "rows.json", "test")
        names = [records.UNREGISTERED, *wanted]
        record.begin(wanted, {(*case[:3], name) for case in everything for name in names})
        script.measure_all(
            record, everything, wanted, files, run, load=load, measure=script.measure
        )
    assert asked == ["good", "broken", "elsewhere"] * 4
    whole = record.finish([case[:3] for case in everything], list(wanted), {})
    assert len(whole["rows"]) == 16
    summary = script.summarise(whole["rows"])
    assert set(summary) == {"T1", "FLAIR"}
    for table in summary.values():
        assert [table[name]["failed"] for name in wanted] == [0, 2, 2]
        for name in ("broken", "elsewhere"):  # they count as unregistered
            assert table[name]["ssim"] == table["unregistered"]["ssim"]
        assert table["good"]["ssim"][0] > table["unregistered"]["ssim"][0]
        assert table["good"]["above"]["broken"]["pairs"] == 2
        assert "good" in script.line("good", table["good"])


def test_the_papers_network_comes_last_and_the_results_say_what_is_missing(
    tmp_path, files, monkeypatch
):
    """It is stopped with one pair to go: what is there can be written, and the rest comes later."""
    asked, limit = [], [3]

    class Workers:
        def __init__(self, *_, **__):
            self.files = files

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def register(self, name, settings):
            asked.append(name)
            write_field(files["field"], moved(2.0, 0.0), script.AFFINE)
            return {"seconds": 0.5, "cpu_seconds": 1.0}

    def run_here(_, name, settings):
        if limit[0] == 0:
            raise KeyboardInterrupt
        limit[0] -= 1
        return Workers().register(name, settings)

    def load(case):
        both, c = pair_of(2.0), script.CHANNELS.index(case.set)
        images = (Image(x.tensor[:, c : c + 1], x.affine) for x in (both.moving, both.fixed))
        return benchmark.Loaded(script.STRUCTURES, *images, *both[3:])

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '{}'\n")
    python.chmod(0o755)
    results = tmp_path / "dip_lgg.json"
    for name, value in {
        "Workers": Workers,
        "run_here": run_here,
        "load": load,
        "cases": lambda split: script.pairs_of(["a", "b", "c"], set()),
        "make_environment": lambda: python,
        "WORK": tmp_path / "work",
        "RESULTS": results,
    }.items():
        monkeypatch.setattr(script, name, value)

    def measured():
        whole = json.loads(results.read_text())
        counts = dict.fromkeys(script.CONFIGURATIONS, 0)
        for row in whole["rows"]:
            counts[row["configuration"]] = counts.get(row["configuration"], 0) + 1
        return whole, counts

    script.table("test", None, ["DIP"], [])
    assert not results.exists()  # others than the paper's are missing
    with pytest.raises(KeyboardInterrupt):
        script.table("test", None, None, [])
    quick = [name for name in script.CONFIGURATIONS if name not in script.PAPERS]
    once = dict.fromkeys(quick, 4) | {records.UNREGISTERED: 4}
    whole, counts = measured()
    paper, kept = script.PAPERS
    assert whole["missing"] == {kept: 2}
    assert whole["complete"] is False
    assert counts == once | {paper: 2, kept: 0}
    assert asked[-3:] == [paper, paper, kept]

    script.table("test", None, ["DIP"], [])
    whole, counts = measured()
    done = dict(zip(script.PAPERS, (2, 1), strict=True))
    assert counts == once | done
    assert whole["missing"] == {kept: 1}
    assert whole["complete"] is False
    assert whole["sets"]["T1"]["DIP, paper"]["pairs"] == 2

    limit[0] = 99
    script.table("test", None, None, [])
    whole, counts = measured()
    assert (whole["complete"], whole["missing"]) == (True, {})
    assert counts == once | dict.fromkeys(script.PAPERS, 2)
    assert len(asked) == sum(counts.values()) - 4  # nobody was asked twice
    ledger = [run["measured"] for run in whole["runs"]]
    assert {n: sum(m.get(n, 0) for m in ledger) for n in counts} == counts
    assert not list((tmp_path / "work").glob("test.json"))


def test_a_configuration_may_convolve_in_bfloat16(files):
    """Its field is a little other than in single precision: 8 bits are 0.4 %, of some voxels."""
    settings = {"package": "reglib", "dip": script.CHOSEN | QUICK | {"steps": 20}}
    fields = []
    for name in (None, "bfloat16"):
        script.run_here(files, "DIP", settings | {"autocast": name})
        fields.append(read_field(files["field"])[0])
    single, half = fields
    apart = (single - half).abs().max()
    assert 0 < apart < 0.1 * single.abs().max()
    assert {x["autocast"] for x in script.PAPERS.values()} == {"bfloat16"}


def test_pairs_together_give_what_they_give_alone():
    pairs = [pair_of(2.0), pair_of(-1.0)]
    settings = script.CHOSEN | QUICK
    both = script.together(pairs, settings)
    alone = [script.together([p], settings)["ssim"][0] for p in pairs]
    assert both["pairs"] == 2
    assert both["seconds"][0] > 0
    assert both["ssim"][0] == pytest.approx(np.mean(alone), abs=1e-3)


# --- Statistics -----------------------------------------------------------------------------


def rows_of(**ssim: list[float]) -> list[dict]:
    """Made-up rows: the SSIM of each configuration on the pairs."""
    others = dict.fromkeys(script.MEASURES, 0.5) | {"folding": 0.0, "tumour_dice": None}
    return [
        {"set": "T1", "moving": str(n), "fixed": str(n + 1), "cluster": n // 2}
        | others
        | {"configuration": name, "ssim": value, "timed_out": False, "failed": None}
        for name, values in ssim.items()
        for n, value in enumerate(values)
    ]


def test_means_and_differences_agree_with_plain_arithmetic():
    generator = np.random.default_rng(0)
    values = {n: generator.normal(0.8, 0.05, 12).tolist() for n in ("unregistered", "peer", "DIP")}
    values["paper"] = values["DIP"][:4]
    found = script.summarise(rows_of(**values))["T1"]
    for name, x in values.items():
        mean, spread = found[name]["ssim"]
        assert mean == pytest.approx(np.mean(x), abs=5e-5)
        assert spread == pytest.approx(np.std(x, ddof=1), abs=5e-5)
        assert "tumour_dice" not in found[name]
    beside = found["DIP"]["above"]["peer"]
    gain = np.array(values["DIP"]) - np.array(values["peer"])
    assert beside["ssim"] == pytest.approx(gain.mean(), abs=5e-5)
    assert beside["better"] == (gain > 0).sum()
    low, high = beside["interval"]
    assert low <= beside["ssim"] <= high
    assert found["paper"]["above"]["peer"]["pairs"] == 4
    # Where one has fewer pairs, the difference is of those that both have.
    assert found["DIP"]["above"]["paper"]["ssim"] == 0.0


# --- The job for a GPU ----------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Two pairs in each channel, packed, and a results file with everything that is quick."""
    shifts = {"a": 2.0, "b": 1.0}

    def load(case):
        both, c = pair_of(shifts[case.moving]), script.CHANNELS.index(case.set)
        images = (Image(x.tensor[:, c : c + 1], x.affine) for x in (both.moving, both.fixed))
        return benchmark.Loaded(script.STRUCTURES, *images, *both[3:])

    everything = script.pairs_of(["a", "b", "c"], set())
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '{}'\n")
    python.chmod(0o755)
    for name, value in {
        "load": load,
        "cases": lambda split: everything,
        "make_environment": lambda: python,
        "WORK": tmp_path / "work",
        "RESULTS": tmp_path / "dip_lgg.json",
        "PACKED": tmp_path / "pairs.npz",
        "CONFIGURATIONS": {},
        "PAPERS": {},
    }.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(job, "PACKED", script.PACKED)
    monkeypatch.setattr(job, "IN_A_FILE", 3)
    record = records.Record(tmp_path / "work" / "test.json", "test", script.RESULTS)
    record.begin({}, script.tasks(everything, []))
    for case in everything:
        row = case._asdict() | {"configuration": records.UNREGISTERED, "seconds": 0.0}
        row |= {"cpu_seconds": 0.0, "timed_out": False, "failed": None}
        record.add(row | script.measure(load(case), moved(0.0, 0.0)))
    script.write(record, everything, python)
    script.pack()
    return everything


def test_a_job_leaves_fields_that_are_measured_like_all_others(packed, tmp_path, monkeypatch):
    """Two pairs side by side, four pairs, three in a file; stopped after the first two."""
    out = tmp_path / "out"
    out.mkdir()
    settings = {"dip": {"preset": "fast"} | QUICK}
    wanted = {"name": "DIP elsewhere", "settings": settings, "batch": 2}
    asked, fitted = [], job.fitted

    def stopped(method, moving, fixed):
        asked.append(len(moving))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return fitted(method, moving, fixed)

    monkeypatch.setattr(job, "fitted", stopped)
    with pytest.raises(KeyboardInterrupt):
        job.run(wanted, out)
    with pytest.raises(SystemExit, match="wanted 4 fields, got 2"):
        script.add(out)
    job.run(wanted, out)
    assert asked == [2, 1, 1, 1]  # the third ends its file
    assert sorted(path.name for path in out.iterdir()) == [
        "fields.json",
        "fields_0.npz",
        "fields_1.npz",
    ]
    u = job.fields_in(out)
    for case, one in zip(packed, u.split(1), strict=True):
        pair = script.load(case)
        alone = register(pair.moving, pair.fixed, script.dip_of(settings["dip"]), progress=False)
        # Half a unit, the 16 bits of the images, and what twelve steps make of them.
        torch.testing.assert_close(one, alone.field, atol=job.UNIT, rtol=1e-3)

    script.add(out)
    whole = json.loads(script.RESULTS.read_text())
    rows = [row for row in whole["rows"] if row["configuration"] == "DIP elsewhere"]
    assert [(row["set"], row["moving"]) for row in rows] == [c[:2] for c in packed]
    for row, case, one in zip(rows, packed, u.split(1), strict=True):
        assert row["ssim"] == script.measure(script.load(case), one)["ssim"]
        assert row["seconds"] > 0
    made = whole["configurations"]["DIP elsewhere"]
    assert made["dip"] == settings["dip"]
    assert made["batch"] == 2
    assert [machine["gpu"] for machine in made["machines"]] == [None]
    assert whole["sets"]["T1"]["DIP elsewhere"]["pairs"] == 2
    script.add(out)  # again: in place of the first
    again = json.loads(script.RESULTS.read_text())
    assert len(again["rows"]) == len(whole["rows"])


def test_the_committed_job_is_the_papers_network_and_its_fields_fit_into_what_comes_back():
    content = json.loads((SCRIPTS / "gpu_jobs" / "800_dip_lgg.json").read_text())
    own = script.PAPERS["DIP, paper"]
    assert content["settings"]["settings"] == {name: own[name] for name in ("dip", "autocast")}
    assert content["settings"]["name"] not in script.CONFIGURATIONS
    assert job.IN_A_FILE * 2 * 256 * 256 * 2 < 16 * 2**20
    pairs = len(script.pairs_of(json.loads(script.SPLITS.read_text())["lgg"]["test"], set()))
    assert -(-pairs // job.IN_A_FILE) <= 2


def test_a_field_beyond_its_bits_is_cut_and_other_pairs_are_turned_down(
    packed, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "fitted", lambda _, m, f: torch.full((len(m), 2, *SHAPE), 200.0))
    out = tmp_path / "out"
    out.mkdir()
    wanted = {"name": "far", "settings": {"dip": {"preset": "fast"}}, "batch": 4}
    job.run(wanted, out)
    assert job.fields_in(out).unique().tolist() == [128 - job.UNIT]
    with np.load(job.PACKED) as file:
        arrays = {part: file[part][::-1] for part in file.files}
    np.savez(job.PACKED, **arrays)
    for act in (lambda: job.run(wanted, out), lambda: script.add(out)):
        with pytest.raises(SystemExit, match="other"):
            act()
    job.PACKED.unlink()
    with pytest.raises(SystemExit, match="--pack"):
        job.run(wanted, out)
