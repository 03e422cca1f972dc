"""Weights and states survive the disk, to the bit, and are whole there or not at all."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from reglib.weights import load_state, load_weights, save_state, save_weights


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1.0))


def test_weights_and_card_survive_the_disk(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 2))
    card = {"spacing": [1.0, 2.0], "trained on": "blobs", "steps": 3}
    path = tmp_path / "shift.safetensors"
    for _ in range(2):
        save_weights(network, path, card)
    state, read = load_weights(path)
    assert read == card
    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert state[name].equal(tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["shift.safetensors"]


def test_a_card_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "shift.safetensors"
    save_weights(Scalar(), path, {"steps": 1})
    with pytest.raises(TypeError):
        save_weights(Scalar(), path, {"steps": object()})
    assert load_weights(path)[1] == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["shift.safetensors"]


def test_a_file_that_holds_no_weights_is_named(tmp_path):
    path = tmp_path / "page.safetensors"
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"^path: wanted a safetensors file, got .*page"):
        load_weights(path)
    with pytest.raises(OSError, match=r"nowhere"):
        load_weights(tmp_path / "nowhere.safetensors")
    # As others write them.
    save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^path: wanted weights with a card, .*page"):
        load_weights(path)


def same(a, b):
    """Equal in kind, order and every bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return type(b) is dict and all(k == m and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def test_a_state_comes_back_in_kind_and_to_the_bit(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "numbers": {"pi": math.pi, "tiny": 5e-324, "nan": math.nan, "inf": -math.inf, "n": 2**60},
        "others": [None, True, "ä/b", (1, (2.0, [])), {}],
        "optimiser": {"state": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}}},
        "shared": [shared, shared.t(), shared[1], shared],
        "dtypes": [
            torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
            torch.tensor([[True], [False]]),
            torch.get_rng_state(),
            torch.zeros(0, 3, dtype=torch.float64),
            torch.tensor(7),
        ],
        # Two keys, one name.
        "alike": {1: torch.zeros(1), "1": torch.ones(1)},
    }
    path = tmp_path / "state.safetensors"
    save_state(path, state)
    assert same(load_state(path), state)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("optimiser/state/1/step") == 4


def test_what_is_read_outlives_the_file(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.ones(1000)})
    read = load_state(path)
    save_state(path, {"x": torch.zeros(1000)})
    with open(path, "r+b") as file:
        file.truncate(0)
    assert read["x"].equal(torch.ones(1000))


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [0, object()]}}, "a/b/1: wanted tensors and JSON values, got object"),
        ({"a": {(1, 2): 0}}, "a: wanted strings or integers as keys"),
    ],
)
def test_what_no_state_can_hold_is_named_and_the_old_file_stays(tmp_path, state, place):
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": 1})
    with pytest.raises(TypeError, match=place):
        save_state(path, state)
    assert load_state(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_weights_are_no_state(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(Scalar(), path, {"state": {"items": []}})
    with pytest.raises(ValueError, match=r"^path: wanted a file that save_state has written, got"):
        load_state(path)
