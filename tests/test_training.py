"""The training loop: it learns, it stops, it repeats itself, and it fails loudly."""

import math
from itertools import count

import pytest
import torch
from torch import nn

from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp
from reglib.objectives.similarity import mse
from reglib.training import fit, load_weights, save_weights

SHIFTS = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks as small as these lose more by sharing the work than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shift(nn.Module):
    """A tiny network that answers with one translation: where features lie, then a linear map."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(16, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, moving, fixed):
        grid = identity_grid(moving.shape[2:]).flatten(2) - (moving.shape[2] - 1) / 2
        where = [10 * self.features(x).flatten(2) for x in (moving, fixed)]
        centres = torch.cat([w.softmax(2) @ grid[0].T for w in where], 1)
        vector = self.head(centres.flatten(1))
        return vector[:, :, None, None].expand(-1, -1, *moving.shape[2:])


class Field(nn.Module):
    """One field for every pair, as in the optimisation of a single pair."""

    def __init__(self, shape):
        super().__init__()
        self.field = nn.Parameter(torch.zeros(1, 2, *shape))

    def forward(self, moving, fixed):
        return self.field.expand(len(moving), -1, -1, -1)


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1.0))

    def forward(self, moving, fixed):
        return self.value


def blobs(generator, batch=8, size=16):
    """A round spot each, somewhere near the centre."""
    centre = size / 2 + 4 * torch.rand(batch, 2, 1, 1, generator=generator) - 2
    distance = (identity_grid((size, size)) - centre).square().sum(1, keepdim=True)
    return torch.exp(-distance / 8)


def shifted_pairs(seed=0):
    """Images and their translations by a random one of four vectors."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        moving = blobs(generator)
        shift = SHIFTS[torch.randint(4, (len(moving),), generator=generator)]
        yield moving, warp(moving, shift[:, :, None, None].expand(-1, -1, 16, 16))


def similarity(field, moving, fixed):
    return {"mse": mse(warp(moving, field), fixed)}


def shuffled_similarity(field, moving, fixed):
    """The negative control: measured on another pair than the network has seen."""
    return similarity(field, moving.roll(1, 0), fixed.roll(1, 0))


def trained(objective=similarity, steps=120):
    torch.manual_seed(0)
    network = Shift()
    history = fit(network, shifted_pairs(), objective, steps=steps, lr=1e-2, progress=False)
    return network, history


def constant_pairs(n=None):
    return ((torch.zeros(1, 1, 2, 2),) * 2 for _ in (count() if n is None else range(n)))


def value(output, moving, fixed):
    return {"value": output.square()}


def change(history):
    """Mean loss of the last fifth of the steps over that of the first."""
    loss = history["loss"]
    part = len(loss) // 5
    return sum(loss[-part:]) / sum(loss[:part])


def test_it_learns_translations_and_a_shuffled_control_does_not():
    network, history = trained()
    fooled, control = trained(shuffled_similarity)
    assert change(history) < 0.1
    assert change(control) > 0.9
    moving, fixed = next(shifted_pairs(seed=1))
    before = mse(moving, fixed)
    with torch.no_grad():
        assert mse(warp(moving, network(moving, fixed)), fixed) < 0.05 * before
        assert mse(warp(moving, fooled(moving, fixed)), fixed) > 0.9 * before


def test_it_recovers_a_known_field():
    generator = torch.Generator().manual_seed(0)
    moving = blobs(generator, batch=1, size=24)
    truth = torch.zeros(1, 2, 24, 24)
    truth[:, 0], truth[:, 1] = 1.0, -0.5
    pairs = [(moving, warp(moving, truth))] * 200
    network = Field((24, 24))

    def objective(field, moving, fixed):
        roughness = sum(field.diff(dim=a).square().mean() for a in (2, 3))
        return similarity(field, moving, fixed) | {"roughness": roughness}

    fit(network, pairs, objective, lr=5e-2, progress=False)
    error = (network.field - truth).norm(dim=1)[:, 4:-4, 4:-4].mean()
    assert error < 0.25


def test_the_same_seed_gives_the_same_bits():
    (a, first), (b, second) = trained(steps=20), trained(steps=20)
    assert first["loss"] == second["loss"]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.equal(q)


def test_history_has_one_entry_per_step_and_term():
    def objective(output, moving, fixed):
        return {"near": output.square(), "far": (output - 4).square()}

    history = fit(Scalar(), constant_pairs(), objective, steps=7, progress=False)
    assert list(history) == ["near", "far", "loss", "seconds"]
    assert all(len(column) == 7 for column in history.values())
    assert history["loss"] == pytest.approx(
        [a + b for a, b in zip(history["near"], history["far"], strict=True)]
    )
    assert history["seconds"] == sorted(history["seconds"])


@pytest.mark.parametrize(("available", "steps", "done"), [(3, None, 3), (3, 9, 3), (9, 3, 3)])
def test_it_stops_at_the_first_of_steps_and_pairs(available, steps, done):
    history = fit(Scalar(), constant_pairs(available), value, steps=steps, progress=False)
    assert len(history["loss"]) == done


def test_it_takes_no_pair_that_it_does_not_use():
    pairs = constant_pairs(5)
    fit(Scalar(), pairs, value, steps=3, progress=False)
    assert len(list(pairs)) == 2


def test_it_stops_when_the_time_is_up():
    history = fit(Scalar(), constant_pairs(), value, seconds=0.2, progress=False)
    # The last step may begin just before the end; it takes milliseconds.
    assert 0.1 < history["seconds"][-1] < 2
    assert len(history["loss"]) > 1


def test_the_learning_rate_falls_along_a_half_cosine():
    """Adam moves a lone parameter by the learning rate itself while the gradient keeps its sign."""
    network, values = Scalar(), []

    def objective(output, moving, fixed):
        values.append(output.item())
        return {"slope": output}

    fit(network, constant_pairs(), objective, steps=10, lr=1e-2, progress=False)
    taken = [a - b for a, b in zip(values, values[1:] + [network.value.item()], strict=True)]
    expected = [1e-2 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert taken == pytest.approx(expected, rel=1e-2, abs=1e-6)


def not_a_number(output, step):
    return output * torch.nan if step == 3 else output.square()


def infinite_gradient(output, step):
    """The loss is 0 and its gradient infinite: the square root at 0."""
    return (output - output.detach()).sqrt() if step == 3 else output.square()


@pytest.mark.parametrize("term", [not_a_number, infinite_gradient])
def test_a_broken_loss_stops_it_before_the_parameters_are_spoilt(term):
    network, good, steps = Scalar(), Scalar(), count()
    with pytest.raises(FloatingPointError, match=r"loss: .* at step 3 .*'broken'"):
        fit(
            network,
            constant_pairs(),
            lambda output, *pair: {"broken": term(output, next(steps))},
            progress=False,
        )
    fit(good, constant_pairs(3), value, progress=False)
    assert network.value.equal(good.value)


def test_the_network_trains_in_training_mode_and_comes_back_in_evaluation_mode():
    network = Scalar().eval()
    modes = []

    def objective(output, moving, fixed):
        modes.append(network.training)
        return value(output, moving, fixed)

    fit(network, constant_pairs(2), objective, progress=False)
    assert modes == [True, True]
    assert not network.training


def test_the_progress_bar_shows_the_loss_or_nothing(capsys):
    fit(Scalar(), constant_pairs(), value, steps=2, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(Scalar(), constant_pairs(), value, steps=2)
    assert "2/2" in capsys.readouterr().err


def test_weights_and_card_survive_the_disk(tmp_path):
    network, card = Shift(), {"spacing": [1.0, 2.0], "trained on": "blobs", "steps": 3}
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
