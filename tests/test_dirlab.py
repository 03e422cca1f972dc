"""The 4DCT script on phantoms: made-up cases with a known deformation, written as the real ones."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from reglib.synth import perlin_noise

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("dirlab")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE, SPACING = (30, 26, 14), (1.0, 1.1, 2.4)
CASES = {n: script.Case(SHAPE, SPACING, 1.45) for n in (1, 2, 6, 7)}
SIZE = {"preset": "tiny", "voxels": 24, "factor": 1, "steps": 60, "lr": 2e-3, "window": 5}
NAMES = {
    1: ("Case1Pack/Images/case1_T{}_s.img", "Case1Pack/ExtremePhases/Case1_300_T{}_xyz.txt"),
    2: ("Case2Pack/Images/case2_T{}-ssm.img", "Case2Pack/ExtremePhases/Case2_300_T{}_xyz.txt"),
    6: ("Case6Pack/Images/case6_T{}.img", "Case6Pack/extremePhases/case6_dirLab300_T{}_xyz.txt"),
    7: ("Case7Deploy/Case7/case7_T{}.img", "Case7Deploy/case7_dirLab300_T{}_xyz.txt"),
}


def displacement(points: np.ndarray) -> np.ndarray:
    """Voxels: most along the last axis and far along all of them, none where they begin.

    A chest breathes like that, least at the top of the lungs.
    """
    far = points / (np.array(SHAPE) - 1)
    depth = np.sin(0.8 * math.pi * far).prod(-1) * far.sum(-1)
    return np.stack([0.8 * depth, -0.6 * depth, 0.8 * depth], -1)


def phantom(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """T50, T00, landmarks of both from 0: what T00 shows at p, T50 shows at p + u(p).

    Real landmarks are whole voxels; those of T50 are between them here, and so without error.
    """
    generator = torch.Generator().manual_seed(number)
    moving = sum(
        perlin_noise(SHAPE, cell=cell, generator=generator)[0, 0].double().numpy()
        for cell in (6.0, 12.0)
    )
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1).astype(float)
    there = grid + displacement(grid)
    fixed = map_coordinates(moving, there.reshape(-1, 3).T, order=1, mode="nearest")
    stored = [np.round(1024 + 400 * x - 400).astype("<i2") for x in (moving, fixed.reshape(SHAPE))]
    low, high = np.array([5, 5, 4]), np.array(SHAPE) - [5, 5, 4]
    draws = torch.rand(60, 3, generator=generator, dtype=torch.float64).numpy()
    points = np.floor(low + draws * (high - low))
    return *stored, np.round(points + displacement(points), 3), points


def write(folder: Path, number: int) -> tuple[Path, Path]:
    """The four files of a case; the image and the landmarks of T00."""
    moving, fixed, moving_points, fixed_points = phantom(number)
    image, text = NAMES[number]
    for phase, stored, points in (("50", moving, moving_points), ("00", fixed, fixed_points)):
        path = folder / image.format(phase)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored.tobytes(order="F"))
        path = folder / text.format(phase)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(f"{x + 1:g}" for x in p) + "\t\n" for p in points))
    return folder / image.format("00"), folder / text.format("00")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("dirlab")
    for number in CASES:
        write(found, number)
    return found


# --- Cases --------------------------------------------------------------------------------------


def test_the_ten_cases_are_those_of_the_official_page_and_of_the_paper() -> None:
    cases = script.CASES
    assert list(cases) == list(range(1, 11))
    assert cases[1] == script.Case((256, 256, 94), (0.97, 0.97, 2.5), 1.14)
    assert cases[5] == script.Case((256, 256, 106), (1.10, 1.10, 2.5), 1.4)
    assert cases[7] == script.Case((512, 512, 136), (0.97, 0.97, 2.5), 1.6)
    assert set(script.TRAIN) | set(script.TEST) == set(cases)
    for case in cases.values():
        # The lungs must lie within 224 voxels: at least 28 cm along every axis, or all of it.
        field_of_view = [n * s for n, s in zip(case.shape, case.spacing, strict=True)]
        assert all(224 * case.target >= min(280, extent) - 30 for extent in field_of_view)


@pytest.mark.parametrize("size", script.SIZES.values(), ids=script.SIZES)
def test_every_size_is_one_that_its_network_takes(size) -> None:
    settings = script.transmorph.PRESETS[size["preset"]]
    assert size["voxels"] % settings.size_multiple == 0
    assert size["voxels"] * size["factor"] == 224


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CASES)
def test_images_and_landmarks_are_found_under_all_their_names(folder, number) -> None:
    scans = script.read(folder, number, CASES[number])
    for ours, theirs in zip(scans, phantom(number), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)  # of what a text rounds


def test_the_first_axis_of_a_raw_file_is_the_fastest(tmp_path) -> None:
    path = tmp_path / "case1_T00_s.img"
    path.write_bytes(np.arange(24, dtype="<i2").tobytes())
    image = script.read_raw(path, (2, 3, 4))
    assert image[1, 0, 0] == 1
    assert image[0, 1, 0] == 2
    assert image[0, 0, 1] == 6


def test_a_file_of_another_size_is_refused(tmp_path) -> None:
    image, _ = write(tmp_path, 1)
    image.write_bytes(image.read_bytes()[:-2])
    wanted = 2 * math.prod(SHAPE)
    with pytest.raises(
        ValueError, match=rf"case1_T00_s.img: wanted {wanted} bytes.*got {wanted - 2}"
    ):
        script.read(tmp_path, 1, CASES[1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2\n3 4\n", "three numbers a line"),
        ("1 2 3\n4 5\n", "three numbers a line"),
        ("one two three\n", "three numbers a line"),
        ("0 2 3\n", "voxels from 1"),
        ("1 2 15\n", "voxels from 1"),
        ("1 2 3\n", "as many landmarks in both"),
    ],
)
def test_malformed_landmarks_are_refused(tmp_path, text, words) -> None:
    _, landmarks = write(tmp_path, 1)
    landmarks.write_text(text)
    with pytest.raises(ValueError, match=words):
        script.read(tmp_path, 1, CASES[1])


def test_missing_and_ambiguous_files_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"case1_T50.*got none"):
        script.read(tmp_path, 1, CASES[1])
    image, _ = write(tmp_path, 1)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / image.name).write_bytes(image.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"got .*copy"):
        script.read(tmp_path, 1, CASES[1])


def test_case_1_is_not_taken_for_case_10(tmp_path) -> None:
    image, _ = write(tmp_path, 1)
    other = tmp_path / "case10_T00.img"
    other.write_bytes(b"")
    assert script.find_image(tmp_path, 1, "00") == image
    assert script.find_image(tmp_path, 10, "00") == other


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_landmarks_that_count_from_the_other_end_are_noticed(folder, axis) -> None:
    scans = script.read(folder, 1, CASES[1])
    # Rounded landmarks are up to half a voxel off, so the scans are not quite the same there.
    assert script.check(scans, 1) > 0.8
    turned = [np.flip(image, axis) for image in scans[:2]]
    with pytest.raises(ValueError, match=rf"case 1: .*axes \[{axis}\] turned round"):
        script.check(script.Scans(*turned, *scans[2:]), 1)


# --- Preparation --------------------------------------------------------------------------------


def test_prepared_landmarks_are_where_their_voxels_came_to_lie() -> None:
    """A blob around a landmark keeps it at its centre of mass; mm between points stay."""
    case, place = CASES[1], np.array([[12.0, 15.0, 6.0]])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1)
    apart = ((grid - place[0]) * SPACING / 3) ** 2
    blob = (24 + 1200 * np.exp(-apart.sum(-1) / 2)).astype("<i2")
    ready = script.prepare(script.Scans(blob, blob, place + 1, place), case, SIZE)
    assert ready.fixed.shape == (1, 1, 24, 24, 24)
    image = ready.fixed[0, 0].double()
    nodes = torch.stack(torch.meshgrid(*(torch.arange(24.0),) * 3, indexing="ij"), -1).double()
    mean = (image[..., None] * nodes).sum((0, 1, 2)) / image.sum()
    torch.testing.assert_close(mean.float(), ready.fixed_points[0, 0], atol=0.05, rtol=0)
    length = math.sqrt(sum(s**2 for s in SPACING))
    torch.testing.assert_close(script.landmark_errors(ready), torch.tensor([length]))
    assert (ready.spacing, ready.outside) == (1.45, 0)


def test_intensities_are_a_window_and_the_grid_s_margin_is_air() -> None:
    scan = np.full(SHAPE, 5000, "<i2")
    point = np.array([[1.0, 1.0, 1.0]])
    ready = script.prepare(script.Scans(scan - 9999, scan, point, point), CASES[1], SIZE)
    assert ready.moving.abs().max() == 0
    middle = ready.fixed[0, 0, 12, 12, 12]
    torch.testing.assert_close(middle, torch.ones(()))
    assert ready.fixed[0, 0, 0, 0, 0] == 0


def test_landmarks_outside_the_grid_are_counted() -> None:
    scan = np.zeros(SHAPE, "<i2")
    points = np.array([[0.0, 0, 0], [15, 13, 7]])
    ready = script.prepare(script.Scans(scan, scan, points, points), CASES[1], SIZE | {"voxels": 8})
    assert ready.outside == 2


def test_flips_take_both_images_and_every_pair_is_seen_once_an_epoch(folder) -> None:
    cases = [script.prepare(script.read(folder, n, CASES[n]), CASES[n], SIZE) for n in (1, 2, 6)]
    pairs = script.Pairs(cases, 0, "cpu")
    stream = iter(pairs)
    seen = []
    for _ in range(3):
        moving, fixed = next(stream)
        [(n, axis)] = [
            (n, axis)
            for n, case in enumerate(cases)
            for axis in (2, 3, 4)
            if moving.flip(axis).equal(case.moving)
        ]
        assert fixed.flip(axis).equal(cases[n].fixed)
        seen.append(n)
    assert sorted(seen) == [0, 1, 2]
    state = pairs.state_dict()
    expected = [next(stream) for _ in range(4)]
    again = script.Pairs(cases, 1, "cpu")
    again.load_state_dict(state)
    for ours, theirs in zip(iter(again), expected, strict=False):
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


# --- All of it ----------------------------------------------------------------------------------


def test_tre_is_known_before_and_falls(folder, tmp_path) -> None:
    [record] = script.run(
        folder,
        SIZE,
        tmp_path,
        tmp_path / "work",
        cases=CASES,
        train_on=(6, 7),
        test_on=(1, 2),
        variants=("scratch",),
        refine=True,
    )
    assert len(record["curve"]) == SIZE["steps"]
    assert record["curve"][-1] < max(record["curve"])
    for number, found in record["cases"].items():
        *_, moving_points, fixed_points = phantom(int(number))
        apart = np.sqrt((((moving_points - fixed_points) * SPACING) ** 2).sum(1))
        assert found["before"]["mean"] == pytest.approx(apart.mean(), abs=1e-3)
        assert found["before"]["std"] == pytest.approx(apart.std(ddof=1), abs=1e-3)
        assert found["outside"] == 0
        # 60 steps on two phantoms teach a little, 2.2 to 2.1 mm; a velocity finds the rest, 0.4 mm
        # or a sixth of a voxel of the files along their coarsest axis.
        assert found["after"]["mean"] < found["before"]["mean"] - 0.05
        assert found["refined"]["mean"] < 0.4 * found["before"]["mean"]


def test_every_variant_is_trained_from_its_own_encoder(folder, tmp_path) -> None:
    encoder = script.transmorph.Encoder(script.transmorph.PRESETS["tiny"])
    script.save_weights(encoder, tmp_path / "pretrain-kl-3.safetensors", {"run": "a test"})
    short = SIZE | {"steps": 1}
    records = list(
        script.run(
            folder,
            short,
            tmp_path,
            tmp_path / "work",
            cases=CASES,
            train_on=(7,),
            test_on=(1,),
            seeds=(3,),
        )
    )
    assert [(r["variant"], r["seed"]) for r in records] == [("scratch", 3), ("kl", 3)]
    for record in records:
        assert list(record["cases"]) == ["1"]
        assert "refined" not in record["cases"]["1"]
        assert (tmp_path / "work" / f"{record['run']}.safetensors").exists()
        assert record["provenance"]["torch"] == torch.__version__


def test_a_pretrained_encoder_goes_in_whole(tmp_path) -> None:
    torch.manual_seed(7)
    encoder = script.transmorph.Encoder(script.transmorph.PRESETS["tiny"])
    path = tmp_path / "pretrain-kl-0.safetensors"
    script.save_weights(encoder, path, {"run": "a test"})
    scratch, given = (script.new_network(SIZE, 0, p) for p in (None, path))
    theirs = encoder.state_dict()
    for name, tensor in given.state_dict().items():
        own = name.removeprefix("encoder.")
        expected = theirs[own] if name.startswith("encoder.") else scratch.state_dict()[name]
        assert tensor.equal(expected), name


def test_check_tells_what_cannot_be_known_without_the_files(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "CASES", CASES)
    monkeypatch.setattr(sys, "argv", ["dirlab.py", str(folder), "--check"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES)
    *_, moving_points, fixed_points = phantom(6)
    apart = np.sqrt((((moving_points - fixed_points) * SPACING) ** 2).sum(1))
    [line] = [line for line in lines if line.startswith("case 6: ")]
    assert f"60 landmarks {apart.mean():.2f} +- {apart.std(ddof=1):.2f} mm apart" in line
    assert "0 outside the grid" in line
