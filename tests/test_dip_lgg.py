"""Laves' table: its pairs, its files, its measures and its arithmetic, without data or peers.

SimpleITK's baseline runs on a small artificial pair; ANTs stays out. About 10 s on one core.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from skimage.metrics import structural_similarity

from reglib.data.nifti import read_field, write_field
from reglib.methods import dip
from reglib.registration import register

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("dip_lgg")
    records = importlib.import_module("benchmark_record")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (40, 44)


def blob(middle: tuple[float, float], radius: float) -> torch.Tensor:
    """A smooth disc, ``(1, 1, H, W)``."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1)
    r = (places - torch.tensor(middle)).float().norm(dim=-1) / radius
    return (1 / (1 + torch.exp(8 * (r - 1))))[None, None]


def pair_of(shift: float = 2.0) -> script.Loaded:
    """A brain and what lies in it, and the same further along the first axis."""

    def side(x: float) -> tuple[torch.Tensor, torch.Tensor]:
        brain, spot = blob((20 + x, 22), 13), blob((17 + x, 20), 4)
        image = torch.cat([0.6 * brain + 0.3 * spot, 0.8 * brain - 0.4 * spot], 1)
        return image, (torch.cat([brain, spot], 1) > 0.5).long()

    (moving, moving_masks), (fixed, fixed_masks) = side(shift), side(0.0)
    return script.Loaded(moving, fixed, moving_masks, fixed_masks)


def moved(pair: script.Loaded, *by: float) -> torch.Tensor:
    u = torch.zeros(1, 2, *SHAPE)
    return u + torch.tensor(by).view(1, 2, 1, 1)


# --- Configurations -------------------------------------------------------------------------


def test_every_configuration_is_json_and_can_be_made():
    for found in (script.configurations(), script.sensitivity()):
        assert json.loads(json.dumps(found)) == found
        for settings in found.values():
            if settings["package"] == "reglib":
                for method in script.methods_of(settings):
                    assert callable(method)


def test_the_table_has_what_the_paper_compares():
    found = script.configurations()
    assert script.dip_of(found[script.PAPERS]["dip"]) == dip.PRESETS["paper"]
    assert script.dip_of(found["DIP, both"]["dip"]) == script.dip_of(script.CHOSEN)
    packages = {settings["package"] for settings in found.values()}
    assert packages == {"SimpleITK", "antspyx", "reglib"}
    assert all(settings["channel"] in ("T1", "FLAIR", "both") for settings in found.values())
    for settings in found.values():  # peers see one channel
        assert settings["package"] == "reglib" or settings["channel"] != "both"


def test_the_sensitivity_study_changes_one_thing_at_a_time():
    found = script.sensitivity()
    methods = {name: script.dip_of(settings["dip"]) for name, settings in found.items()}
    chosen = methods.pop("as chosen")
    assert chosen == script.dip_of(script.CHOSEN)
    for name, method in methods.items():
        assert method != chosen, name
        different = [
            x for x in chosen.__dataclass_fields__ if getattr(method, x) != getattr(chosen, x)
        ]
        assert set(different) - {"patience"} in ({x} for x in chosen.__dataclass_fields__), name


# --- Pairs ----------------------------------------------------------------------------------


def test_every_patient_is_moving_to_the_next_and_copies_lie_apart():
    patients = [f"p{n}" for n in range(9)]
    found = script.cases(patients, {"p2", "other"})
    assert [(c.moving, c.fixed) for c in found] == list(itertools.pairwise(patients))
    assert [c.set for c in found] == ["lgg", "lgg_copies", "lgg_copies"] + ["lgg"] * 5
    assert [c.cluster for c in found] == [0] * 6 + [1] * 2


def test_the_papers_network_sees_every_sixth_pair_and_the_others_see_all():
    everything = script.cases([f"p{n}" for n in range(61)], {"p3"})
    few = script.listed(everything)
    assert len(few) == 10
    assert {c.set for c in few} == {"lgg"}
    tasks = script.tasks_of(everything, ["a", script.PAPERS])
    assert len(tasks) == 2 * 60 + 10
    assert [case for case, name in tasks if name == script.PAPERS] == few


def test_split_and_slices(tmp_path, monkeypatch):
    """Real file formats: colours become T1 and FLAIR, and a mask becomes 0 and 1."""
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
    colours = torch.randint(0, 256, (1, 3, 24, 20), generator=torch.Generator().manual_seed(0))
    tumour = torch.zeros(1, 1, 24, 20)
    tumour[..., 5:9, 4:7] = 255
    picture = colours[0].movedim(0, -1).byte().numpy()
    PIL.Image.fromarray(picture).save(folder / "png" / "0_mid.png")
    PIL.Image.fromarray(tumour[0, 0].byte().numpy()).save(folder / "png" / "0_mask.png")
    monkeypatch.setattr(script, "fetch", lambda name: tmp_path / name)
    script.index.cache_clear()
    try:
        found = script.all_cases("tuning")
        assert len(found) == len(patients) - 1
        assert [c.set for c in found[:3]] == ["lgg_copies", "lgg_copies", "lgg"]
        one = script.load_slice(patients[0])
    finally:
        script.index.cache_clear()
    assert one.image.shape == (1, 2, 24, 20)
    for c in range(2):
        x = colours[0, c].double().numpy()
        top = np.quantile(x, 0.99)
        expected = np.clip((x - x.min()) / (top - x.min()), 0, 1)
        np.testing.assert_allclose(one.image[0, c], expected, atol=1e-6)
    assert torch.equal(one.tumour, (tumour > 0).long())


def test_the_brain_is_the_largest_part_with_its_holes_filled():
    image = torch.zeros(1, 2, *SHAPE)
    image[0, 0, 8:30, 8:30] = 0.5
    image[0, 1, 25:34, 10:20] = 0.5
    expected = (image.amax(1, keepdim=True) > 0).long()
    image[0, :, 14:18, 14:18] = 0  # a hole
    image[0, 0, 2:6, 36:42] = 1.0  # something else
    image[0, 0, 0, 0] = 1.0
    found = script.brain_mask(image)
    # The opening rounds corners off.
    assert float(script.dice(found, expected, labels=[1])) > 0.97
    assert found[0, 0, 15, 15] == 1
    assert not found[0, 0, :7, 35:].any()
    assert not script.brain_mask(torch.zeros(1, 2, *SHAPE)).any()


# --- Measures -------------------------------------------------------------------------------


def test_measures_of_the_truth_and_of_nothing():
    """SSIM by scikit-image; whole voxels, so that nothing is interpolated."""
    pair = pair_of()
    still, truth = (script.measure(pair, moved(pair, by, 0.0)) for by in (0.0, 2.0))
    for c, name in enumerate(("ssim_t1", "ssim_flair")):
        expected = structural_similarity(
            pair.moving[0, c].numpy(),
            pair.fixed[0, c].numpy(),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert still[name] == pytest.approx(expected, abs=2e-4)
        assert truth[name] == pytest.approx(1.0, abs=1e-3)
    assert still["ssim"] == pytest.approx((still["ssim_t1"] + still["ssim_flair"]) / 2, abs=1e-5)
    for name in ("mean_dice", "tumour_dice"):
        assert still[name] < 0.95
        assert truth[name] == 1.0
    assert truth["tumour_area"] == 1.0
    assert truth["mae"] < 1e-3 < still["mae"]
    assert truth["det_mean"] == 1.0
    assert truth["folding"] == truth["ndv"] == 0


def test_shrinking_and_folding_show():
    pair = pair_of(0.0)
    x = torch.arange(SHAPE[0], dtype=torch.float32) - 17
    u = moved(pair, 0.0, 0.0)
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
    none = pair.moving_masks.clone()
    none[:, 1] = 0
    found = script.measure(pair._replace(moving_masks=none), moved(pair, 0.0, 0.0))
    assert found["tumour_dice"] is None
    assert found["tumour_area"] is None
    found = script.measure(pair._replace(fixed_masks=none), moved(pair, 0.0, 0.0))
    assert found["tumour_dice"] is None
    assert found["tumour_area"] == 1.0


# --- Registering ----------------------------------------------------------------------------


def test_files_hold_a_channel_each_and_come_back_together(tmp_path):
    pair = pair_of()
    script.write_pair(tmp_path, pair.moving, pair.fixed)
    for part, image in (("moving", pair.moving), ("fixed", pair.fixed)):
        for channel, expected in (("T1", image[:, :1]), ("FLAIR", image[:, 1:]), ("both", image)):
            path = script.channel_file(tmp_path, part, channel)
            assert torch.equal(script.read_channels(str(path), channel).tensor, expected)


@pytest.mark.parametrize("channel", ["T1", "both"])
def test_ours_leaves_the_field_that_register_finds(tmp_path, channel):
    pair = pair_of()
    script.write_pair(tmp_path, pair.moving, pair.fixed)
    settings = script.ours(channel, dip=script.CHOSEN | {"steps": 12})
    paths = [str(script.channel_file(tmp_path, part, channel)) for part in ("moving", "fixed")]
    field = tmp_path / "field.nii.gz"
    watch = script.run_reglib(*paths, str(field), settings)
    assert watch.seconds > 0
    channels = slice(None) if channel == "both" else slice(1)
    images = (x[:, channels] for x in (pair.moving, pair.fixed))
    expected = register(*images, script.dip_of(settings["dip"]), progress=False).field
    assert expected.any()
    torch.testing.assert_close(read_field(field)[0], expected, atol=1e-5, rtol=0)


def test_the_baseline_finds_the_artificial_shift(tmp_path):
    """1.5 voxels, half of which at least are found away from the border; a channel is enough."""
    pytest.importorskip("SimpleITK")
    moving, fixed = script.artificial_pair()
    script.write_pair(tmp_path, moving, fixed)
    own = script.ITK_FIELD | {"iterations": 40}
    settings = {"package": "SimpleITK", "channel": "T1", "field": own}
    asked = script.PlaneWorkers.request(settings, tmp_path)
    assert asked["moving"].endswith("moving_T1.nii")
    script.run_itk(asked["moving"], asked["fixed"], asked["field"], settings)
    u, affine = read_field(asked["field"])
    assert torch.equal(affine, script.AFFINE)
    assert u.shape == (1, 2, 72, 64)
    error = (moving - fixed).abs().mean()
    after = (script.warp(moving, u.float()) - fixed)[..., 6:-6, 6:-6].abs().mean()
    assert float(after) < 0.5 * float(error)


def test_each_package_has_a_process_and_an_artificial_pair(tmp_path, monkeypatch):
    """Processes that are only named: SimpleITK's is ours, and nobody is started twice."""
    started: list[list[str]] = []

    class Named:
        alive = True

        def __init__(self, command, log):
            started.append([str(word) for word in command])
            self.warm, self.asked = set(), []

        def ask(self, request, seconds):
            self.asked.append(request)
            return {"seconds": 1.0, "cpu_seconds": 1.0}

        def end(self):
            pass

    monkeypatch.setattr(script.benchmark_classical, "Worker", Named)
    monkeypatch.setattr(script, "WORK", tmp_path / "logs")
    found = script.configurations()
    with script.PlaneWorkers(Path("/peers/python"), tmp_path) as workers:
        for name in ("DIP, both", "SimpleITK displacement field, T1", "ANTsPy SyN CC, FLAIR"):
            for _ in range(2):
                workers.register(name, found[name])
        running = dict(workers.running)
    assert len(started) == 3
    assert started[0] == started[1] == [sys.executable, str(SCRIPTS / "dip_lgg.py"), "--serve"]
    assert started[2] == ["/peers/python", str(SCRIPTS / "peers.py")]
    assert set(running) == {"reglib", "SimpleITK", "antspyx"}
    warm, first, second = running["reglib"].asked
    assert warm["settings"]["dip"]["steps"] == 3
    assert Path(warm["moving"]).parent.name == "warm"
    assert Path(warm["moving"]).exists()
    assert first == second
    assert first["settings"] == found["DIP, both"]
    assert first["moving"] == str(tmp_path / "moving_T1.nii")
    assert running["antspyx"].asked[1]["fixed"] == str(tmp_path / "fixed_FLAIR.nii")


def test_each_configuration_is_measured_once_from_the_field_it_leaves(tmp_path, monkeypatch):
    """One finds the truth, one is broken, one leaves a field of another grid."""
    pairs = {"b": pair_of(2.0), "c": pair_of(1.0)}
    monkeypatch.setattr(script, "load", lambda case: pairs[case.fixed])
    everything = script.cases(["a", "b", "c"], set())
    asked = []

    def run(name, settings):
        asked.append(name)
        if name == "broken":
            return {"error": "broken"}
        u = moved(pairs["b"], 2.0, 0.0)
        affine = script.AFFINE * (1 if name == "good" else 2)
        affine[-1, -1] = 1
        write_field(tmp_path / "field.nii.gz", u, affine)
        return {"seconds": 0.5, "cpu_seconds": 1.0}

    wanted = {name: {"package": "none"} for name in ("good", "broken", "elsewhere")}
    for _ in range(2):  # the second finds nothing left
        record = records.Record(tmp_path / "rows.json", "test")
        tasks = script.tasks_of(everything, list(wanted))
        record.begin(wanted, {(*case[:3], name) for case, name in tasks})
        script.measure_all(record, tasks, wanted, tmp_path, run)
    assert asked == ["good", "broken", "elsewhere"] * 2
    whole = record.finish([case[:3] for case in everything], list(wanted), {})
    assert len(whole["rows"]) == 8
    summary = script.summarise(whole["rows"])
    table = summary["lgg"]["table"]
    assert [table[name]["failed"] for name in wanted] == [0, 2, 2]
    for name in ("broken", "elsewhere"):  # they count as unregistered
        assert table[name]["ssim"] == table["unregistered"]["ssim"]
    assert table["good"]["ssim"][0] > table["unregistered"]["ssim"][0]
    assert "good" in script.lines(summary)


def test_pairs_together_give_what_they_give_alone():
    pairs = [pair_of(2.0), pair_of(-1.0)]
    settings = script.CHOSEN | {"steps": 12}
    threads = torch.get_num_threads()
    try:
        both = script.together(pairs, settings)
        alone = [script.together([p], settings)["ssim"] for p in pairs]
    finally:
        torch.set_num_threads(threads)
    assert both["pairs"] == 2
    assert both["seconds_a_pair"] > 0
    assert both["ssim"] == pytest.approx(statistics.fmean(alone), abs=1e-3)


# --- Statistics -----------------------------------------------------------------------------


def rows_of(**ssim: list[float]) -> list[dict]:
    """Made-up rows: the SSIM of each configuration on the pairs."""
    others = dict.fromkeys(script.MEASURES, 0.5) | {"folding": 0.0, "tumour_dice": None}
    return [
        {"set": "lgg", "moving": str(n), "fixed": str(n + 1), "cluster": n // 2}
        | others
        | {"configuration": name, "ssim": value, "timed_out": False, "failed": None}
        for name, values in ssim.items()
        for n, value in enumerate(values)
    ]


def test_means_and_differences_agree_with_plain_arithmetic():
    generator = np.random.default_rng(0)
    values = {n: generator.normal(0.8, 0.05, 12).tolist() for n in ("unregistered", "peer", "DIP")}
    values["DIP, paper"] = values["DIP"][:4]
    found = script.summarise(rows_of(**values))["lgg"]
    for name, x in values.items():
        mean, spread = found["table"][name]["ssim"]
        assert mean == pytest.approx(np.mean(x), abs=5e-5)
        assert spread == pytest.approx(np.std(x, ddof=1), abs=5e-5)
        low, high = found["table"][name]["ssim_interval"]
        assert low <= mean <= high
        assert "tumour_dice" not in found["table"][name]
    assert set(found["above"]) == {"DIP", "DIP, paper"}
    beside = found["above"]["DIP"]["peer"]
    gain = np.array(values["DIP"]) - np.array(values["peer"])
    assert beside["ssim"] == pytest.approx(gain.mean(), abs=5e-5)
    assert beside["better"] == (gain > 0).sum()
    assert beside["pairs"] == 12
    assert found["above"]["DIP, paper"]["peer"]["pairs"] == 4
    # Where one has fewer pairs, the difference is of those that both have.
    assert found["above"]["DIP"]["DIP, paper"]["ssim"] == 0.0


def test_missing_numbers_are_not_a_number():
    assert math.isnan(script._number({}, "ssim"))
    assert functools.partial(script._number, {"ssim": [0.5, 0.1]})("ssim", 1) == 0.1
