"""The script of the lung pair, on a phantom that is laid out like the real files."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates, maximum_filter

from reglib.data.nifti import Image, write_image
from reglib.synth import perlin_noise
from reglib.weights import load_weights, save_weights

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    script = importlib.import_module("lung")
finally:
    sys.path.remove(str(SCRIPTS))

SHAPE = (22, 25, 19)
PLACES = torch.tensor([[5, 6, 7], [11, 12, 9], [16, 18, 12], [8, 17, 6]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A grid on which the phantom has 16 voxels a side, and one thread."""
    monkeypatch.setattr(script, "SPACING", 5.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def displacement(places: np.ndarray) -> np.ndarray:
    """Voxels, from the baseline to the follow-up scan: 2 mm to 6 mm, most in the middle."""
    bulge = np.sin(np.pi * places / (np.array(SHAPE) - 1)).prod(-1)
    return np.stack([0.2 + 0 * bulge, 1.2 * bulge, 0.4 + 1.2 * bulge], -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both scans, masks and points; the follow-up is elsewhere in the world."""
    found = tmp_path_factory.mktemp("data") / "lung_ct"
    found.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = sum(perlin_noise(SHAPE, cell=c, generator=generator)[0, 0].double() for c in (5, 9))
    moving = noise.numpy()
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1).astype(float)
    there = (grid + displacement(grid)).reshape(-1, 3).T
    fixed = map_coordinates(moving, there, order=1, mode="nearest").reshape(SHAPE)
    inside = (np.abs(grid / (np.array(SHAPE) - 1) - 0.5) < 0.4).all(-1)
    for name, values, shift in (("baseline", fixed, 0.0), ("followup", moving, 30.0)):
        affine = torch.diag(torch.tensor([-2.0, -2.0, 3.0, 1.0], dtype=torch.float64))
        affine[2, 3] = shift
        hounsfield = torch.from_numpy(-400 + 1500 * values).float()[None, None]
        write_image(found / f"3DCT_lung_{name}.nii.gz", Image(hounsfield, affine))
        mask = torch.from_numpy(inside.astype(np.uint8))[None, None]
        write_image(found / f"3DCT_lung_{name}_mask.nii.gz", Image(mask, affine))
        places = PLACES.numpy()
        places = places if name == "baseline" else places + displacement(places)
        rows = "".join(" ".join(f"{x:.4f}" for x in p) + "\n" for p in places)
        (found / f"3DCT_lung_{name}.txt").write_text(f"index\n{len(places)}\n{rows}")
    return found


# --- What is read -------------------------------------------------------------------------------


def test_points_are_voxels_of_their_own_scan(folder) -> None:
    moving, fixed = script.load(folder)
    expected = PLACES * torch.tensor([-2.0, -2, 3], dtype=torch.float64)
    torch.testing.assert_close(fixed.points[0], expected)
    apart = moving.points - fixed.points
    u = torch.from_numpy(displacement(PLACES.numpy()))
    expected = u * torch.tensor([-2.0, -2, 3]) + torch.tensor([0.0, 0, 30])
    # The file has four decimals.
    torch.testing.assert_close(apart[0], expected.double(), atol=5e-4, rtol=0)


@pytest.mark.parametrize("text", ["point\n1\n1 2 3\n", "index\n2\n1 2 3\n", "index\n1\n1 2 3 4\n"])
def test_another_file_of_points_is_refused(tmp_path, text) -> None:
    path = tmp_path / "points.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"points.txt: wanted 'index'"):
        script.read_points(path)


def test_intensities_are_windowed_and_masks_grow(folder) -> None:
    moving, fixed = script.load(folder)
    for scan in (moving, fixed):
        assert (scan.image.tensor.min(), scan.image.tensor.max()) == (0, 1)
    # What the phantom holds lies about -400 HU, the middle of the window.
    assert abs(float(moving.image.tensor.mean()) - 0.5) < 0.1
    mask = torch.zeros(1, 1, *SHAPE)
    mask[0, 0, 4, 20, 9] = mask[0, 0, 0, 0, 0] = 1
    expected = maximum_filter(mask[0, 0].numpy(), size=5, mode="constant")
    np.testing.assert_array_equal(script.grown(mask, 2)[0, 0].numpy(), expected)


def test_rows_without_registration_are_distances_of_the_points(folder) -> None:
    moving, fixed = script.load(folder)
    found = script.without(moving, fixed)
    apart = (moving.points - fixed.points)[0]
    expected = apart.norm(dim=1)
    assert found["unregistered"]["points"] == pytest.approx(expected.tolist(), abs=1e-3)
    assert found["unregistered"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-4)
    rest = (apart - apart.mean(0)).norm(dim=1)
    best = found["best translation of the points"]
    assert best["points"] == pytest.approx(rest.tolist(), abs=1e-3)
    assert best["mm"] == pytest.approx(apart.mean(0).tolist(), abs=1e-3)


# --- What is registered -------------------------------------------------------------------------


def optimised(moving, fixed, steps: int = 4) -> tuple:
    network = script.new_network(0, None)
    identity = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    identity[0, 2, 3] = 30.0
    pair = script.coarse(moving, fixed, identity, network)
    return network, pair, script.optimise(network, pair, moving, fixed, steps)


def test_the_network_sees_what_register_would_show_it(folder) -> None:
    moving, fixed = script.load(folder)
    network, pair, _ = optimised(moving, fixed, 1)
    seen = []
    network.register_forward_hook(lambda _, inputs, out: seen.extend(inputs))
    script.run(moving, fixed, [network], start=pair.affine)
    for ours, theirs in zip((pair.moving, pair.fixed), seen, strict=True):
        # register scales each image by its own extremes, which are those of the window.
        torch.testing.assert_close(ours, theirs)


def test_points_measure_and_decide_nothing(folder) -> None:
    moving, fixed = script.load(folder)
    network, _, found = optimised(moving, fixed)
    assert [point["step"] for point in found["curve"]] == [0, 4]
    wrong = script.Scan(moving.image, moving.mask, moving.points + 100)
    other, _, off = optimised(wrong, fixed)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name
    assert off["curve"][0]["mean"] > found["curve"][0]["mean"] + 100
    # Before the first step the network leaves all where the affine put it.
    apart = moving.points - fixed.points - torch.tensor([0.0, 0, 30])
    assert found["curve"][0]["mean"] == pytest.approx(float(apart.norm(dim=2).mean()), abs=0.01)


def test_the_script_writes_a_row_for_every_method(folder, tmp_path, monkeypatch) -> None:
    torch.manual_seed(5)
    encoder = script.transmorph.Encoder(script.transmorph.PRESETS["tiny"])
    save_weights(encoder, tmp_path / "pretrain-kl-0.safetensors", {"run": "a test"})
    own = script.new_network(0, tmp_path / "pretrain-kl-0.safetensors").encoder.state_dict()
    for name, tensor in load_weights(tmp_path / "pretrain-kl-0.safetensors")[0].items():
        assert own[name].equal(tensor), name
    monkeypatch.setenv("REGLIB_DATA", str(folder.parent))
    out = tmp_path / "lung.json"
    arguments = ["--steps", "2", "--seeds", "0", "--weights", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["lung.py", *arguments])
    script.main()
    content = json.loads(out.read_text())
    rows = {row["method"]: row for row in content["rows"]}
    networks = [f"network, {kind}" for kind in ("scratch", "pretrained")]
    both = [name + end for name in networks for end in ("", " + velocity")]
    assert list(rows) == ["affine", "affine + velocity", *both]
    before = content["best translation of the points"]["mean"]
    assert before > 0.8
    for name in ("affine + velocity", *(n for n in both if "velocity" in n)):
        # A third of a voxel along the finest axis; before, a voxel and more along the coarsest.
        assert rows[name]["mean"] < 0.6 * before, name
        assert rows[name]["lncc"] < 0.5 * rows["affine"]["lncc"]
    assert len(content["provenance"]["commit"]) == 40
