"""The training loop: it learns, it stops, it repeats itself, and it fails loudly."""

import contextlib
import csv
import math
import os
import shutil
import signal
import sys
import threading
from functools import partial
from itertools import count, islice

import pytest
import torch
from torch import nn

from reglib.geometry.grid import identity_grid
from reglib.geometry.sampling import warp
from reglib.objectives.similarity import mse
from reglib.training import fit, half_cosine, polynomial, warm_up
from reglib.weights import load_state, load_weights, save_state, save_weights

SHIFTS = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])


@pytest.fixture(autouse=True)
def _ctrl_c():
    """A process in the background may have begun with a deaf ear for it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


# --- The step ---------------------------------------------------------------------------------


class Smooth(nn.Module):
    """A small convolutional network for 2-D or 3-D, normalised per sample."""

    def __init__(self, dimensions=2, norm="InstanceNorm"):
        super().__init__()
        conv = getattr(nn, f"Conv{dimensions}d")
        self.layers = nn.Sequential(
            conv(2, 4, 3, padding=1, bias=False),
            getattr(nn, f"{norm}{dimensions}d")(4),
            nn.LeakyReLU(0.2),
            conv(4, dimensions, 3, padding=1),
        )

    def forward(self, moving, fixed):
        return self.layers(torch.cat([moving, fixed], 1))


def random_pairs(batch, shape=(7, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield tuple(torch.rand(2, batch, 1, *shape, generator=generator))


def two_terms(field, moving, fixed):
    return {"similarity": mse(warp(moving, field), fixed), "size": field.square().mean()}


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize(
    "schedule", [half_cosine, polynomial, warm_up, lambda spent: 1 / (1 + spent)]
)
def test_it_takes_the_steps_of_a_plain_loop(schedule):
    """Torch's own loop with its schedulers and its clipping, to the bit."""
    torch.manual_seed(0)
    network, plain = Smooth(), Smooth()
    plain.load_state_dict(network.state_dict())
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step / 12))
    losses, lengths = [], []
    for moving, fixed in islice(random_pairs(2), 12):
        optimiser.zero_grad()
        loss = sum(two_terms(plain(moving, fixed), moving, fixed).values())
        loss.backward()
        lengths.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.25).item())
        optimiser.step()
        scheduler.step()
        losses.append(loss.item())
    adamw = partial(torch.optim.AdamW, weight_decay=0.1)
    options = {"lr": 1e-2, "optimiser": adamw, "schedule": schedule, "clip": 0.25}
    history = fit(network, random_pairs(2), two_terms, steps=12, progress=False, **options)
    assert min(lengths) < 0.25 < max(lengths), "clipping must matter, and not always"
    assert history["loss"] == losses
    assert weights_of(network).equal(weights_of(plain))


def test_groups_of_parameters_keep_the_ratio_of_their_rates():
    network = nn.Module()
    network.first, network.second = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    network.forward = lambda moving, fixed: network.first + network.second

    def sgd(parameters, lr):
        first, second = parameters
        groups = [{"params": [first]}, {"params": [second], "lr": lr / 10}]
        return torch.optim.SGD(groups, lr=lr)

    fit(
        network,
        constant_pairs(),
        lambda out, *pair: {"sum": out},
        steps=2,
        lr=0.1,
        optimiser=sgd,
        schedule=lambda spent: 1 - spent,
        progress=False,
    )
    assert [p.item() for p in network.parameters()] == pytest.approx([1 - 0.15, 1 - 0.015])


def test_schedules_fall_from_1_to_0():
    for schedule in (half_cosine, polynomial, partial(polynomial, power=2)):
        values = [schedule(k / 100) for k in range(101)]
        assert (values[0], values[-1]) == (1, pytest.approx(0, abs=1e-15))
        assert values == sorted(values, reverse=True)
    assert polynomial(0.75) == 0.25**0.9
    # The line up to the share, and what follows from its own start to its own end.
    assert [warm_up(s) for s in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    rising = partial(warm_up, share=0.5, then=polynomial)
    assert rising(0.25) == 0.5
    assert rising(0.75) == polynomial(0.5)
    assert half_cosine(0.5) == pytest.approx(0.5)


def test_a_batch_hands_what_else_it_holds_to_the_objective():
    labels, weight = torch.ones(1, 1, 2, 2), {"any": "thing"}
    seen = []

    def objective(output, moving, fixed, *extras):
        seen.append(extras)
        return value(output, moving, fixed)

    images = tuple(torch.zeros(2, 1, 1, 2, 2))
    batches = [images, [*images, labels], (*images, labels, weight)]
    fit(Scalar(), batches, objective, progress=False)
    assert seen == [(), (labels,), (labels, weight)]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("dimensions", "shape"), [(2, (7, 6)), (3, (4, 6, 5))])
def test_accumulated_batches_are_one_large_batch(batch, dimensions, shape):
    """Means of means over equal parts; float32 sums in another order differ by 1e-6."""
    torch.manual_seed(0)
    parts, whole = Smooth(dimensions), Smooth(dimensions)
    parts.load_state_dict(whole.state_dict())
    large = list(islice(random_pairs(4 * batch, shape), 5))
    small = [pair for m, f in large for pair in zip(m.split(batch), f.split(batch), strict=True)]
    options = {"optimiser": torch.optim.SGD, "lr": 0.1, "progress": False}
    one = fit(whole, large, two_terms, **options)
    many = fit(parts, small, two_terms, accumulate=4, **options)
    assert len(many["loss"]) == 5
    for name in ("similarity", "size", "loss"):
        assert many[name] == pytest.approx(one[name], rel=1e-5)
    assert weights_of(parts).allclose(weights_of(whole), atol=1e-6)
    assert not weights_of(parts).allclose(weights_of(Smooth(dimensions)), atol=1e-3)


def test_an_incomplete_group_at_the_end_is_left_out():
    network, good = Scalar(), Scalar()
    history = fit(network, constant_pairs(8), value, accumulate=3, progress=False)
    fit(good, constant_pairs(2), value, progress=False)
    assert len(history["loss"]) == 2
    assert network.value.equal(good.value)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_that_of_the_layers_and_nothing_else(precision):
    torch.manual_seed(0)
    network, exact = Smooth(), Smooth()
    exact.load_state_dict(network.state_dict())
    seen = set()

    def objective(field, moving, fixed):
        seen.add(field.dtype)
        terms = two_terms(field, moving, fixed)
        assert terms["similarity"].dtype == torch.float32
        return terms

    options = {"steps": 20, "lr": 1e-2, "progress": False}
    history = fit(network, random_pairs(2), objective, precision=precision, **options)
    reference = fit(exact, random_pairs(2), two_terms, **options)
    assert seen == {getattr(torch, precision)}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    # bfloat16 keeps 8 bits. float16 leaves out some steps at the beginning.
    assert history["loss"][0] == pytest.approx(reference["loss"][0], rel=1e-2)
    assert history["loss"][-1] == pytest.approx(reference["loss"][-1], rel=5e-2)
    assert reference["loss"][-1] < 0.8 * reference["loss"][0]
    assert history["loss"] != reference["loss"]
    assert not torch.is_autocast_enabled("cpu")


def test_float16_leaves_out_the_steps_whose_scaled_gradient_overflows():
    """float16 ends at 65504: 2^13 x 8 is too much, 2^12 x 8 is not, so from 2^16 four are lost."""
    network, values = Scalar(), []

    def objective(output, *pair):
        values.append(output.item())
        return {"steep": 8 * output.half()}

    sgd = {"optimiser": torch.optim.SGD, "lr": 1 / 800, "schedule": lambda spent: 1.0}
    history = fit(network, constant_pairs(8), objective, precision="float16", progress=False, **sgd)
    assert values == pytest.approx([1.0] * 5 + [0.99, 0.98, 0.97])
    assert len(history["loss"]) == 8


def test_float16_is_no_excuse_for_a_gradient_that_is_infinite_at_any_scale():
    network, steps = Scalar(), count()

    def objective(output, *pair):
        next(steps)
        return {"broken": (output - output.detach()).sqrt()}

    with pytest.raises(FloatingPointError, match=r"gradient of length (nan|inf) at step 17"):
        fit(network, constant_pairs(), objective, precision="float16", progress=False)
    assert network.value == 1


# --- Validation -------------------------------------------------------------------------------


class Counter(nn.Module):
    """Its one parameter falls by the learning rate at every step."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, moving, fixed):
        self.seen += self.training
        return self.value


DESCENT = {"optimiser": torch.optim.SGD, "lr": 1.0, "schedule": lambda spent: 1.0}
DESCENT |= {"objective": lambda out, *rest: {"slope": out}, "progress": False}


def parabola(network):
    """Lowest after 5 steps of the counter."""
    assert not network.training
    assert not torch.is_grad_enabled()
    return (network.value + 5).square()


def nans(column):
    return [k + 1 for k, v in enumerate(column) if math.isnan(v)]


def test_validation_only_measures_where_there_is_no_patience():
    network = Counter()
    history = fit(network, constant_pairs(11), validate=parabola, validate_every=4, **DESCENT)
    column = history["validation"]
    assert list(history) == ["slope", "loss", "seconds", "validation"]
    assert [(k + 1, v) for k, v in enumerate(column) if not math.isnan(v)] == [
        (4, 1),
        (8, 9),
        (11, 36),
    ]
    assert (network.value.item(), network.seen.item()) == (-11, 11)


@pytest.mark.parametrize(("patience", "done"), [(1, 6), (2, 8), (3, 10), (9, 20)])
def test_the_best_weights_come_back_whether_patience_ends_or_not(patience, done, capsys):
    network = Counter()
    history = fit(
        network,
        constant_pairs(),
        steps=20,
        validate=parabola,
        validate_every=2,
        patience=patience,
        **DESCENT | {"progress": True},
    )
    # 1 after 4 steps, 1 after 6 (not lower), 9 after 8, ...
    assert len(history["loss"]) == done
    assert (network.value.item(), network.seen.item()) == (-4, 4)
    assert f"kept: step 4 of {done}, lowest validation 1" in capsys.readouterr().out


def test_a_validation_of_nan_is_never_best():
    network, values = Counter(), iter([math.nan, 3.0, math.nan, 5.0])
    history = fit(
        network,
        constant_pairs(),
        validate=lambda network: next(values),
        every=1,
        patience=2,
        **DESCENT,
    )
    assert len(history["loss"]) == 4
    assert nans(history["validation"]) == [1, 3]
    assert network.value == -2


def test_validation_changes_nothing_in_the_training():
    def validate(network):
        return torch.rand(()) + network(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).mean()

    networks = [seeded(0), seeded(0)]
    for network, options in zip(networks, ({}, {"validate": validate, "every": 3}), strict=True):
        torch.manual_seed(1)
        fit(network, random_pairs(2), two_terms, steps=10, progress=False, **options)
    for a, b in zip(*(n.state_dict().values() for n in networks), strict=True):
        assert a.equal(b)


# --- Logs -------------------------------------------------------------------------------------


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def expected_rows(history):
    table = [["step", *history]]
    for k, row in enumerate(zip(*history.values(), strict=True)):
        table.append([str(k + 1), *("" if math.isnan(v) else repr(v) for v in row)])
    return table


def test_a_csv_file_holds_the_history_and_grows_with_it(tmp_path):
    path, seen = tmp_path / "log.csv", []
    path.write_text("of another training\n" * 9)

    def objective(output, moving, fixed):
        seen.append(len(rows_of(path)))
        return value(output, moving, fixed)

    history = fit(
        Scalar(),
        constant_pairs(6),
        objective,
        log=path,
        validate=lambda network: network.value,
        every=4,
        progress=False,
    )
    assert rows_of(path) == expected_rows(history)
    assert nans(history["validation"]) == [1, 2, 3, 5]
    # A row is written when the next step is done.
    assert seen == [0, 0, 2, 3, 4, 5]


def test_a_csv_file_holds_what_was_done_before_a_failure(tmp_path):
    path, steps = tmp_path / "log.csv", count()
    with pytest.raises(FloatingPointError):
        fit(
            Scalar(),
            constant_pairs(),
            lambda output, *pair: {"broken": not_a_number(output, next(steps))},
            log=path,
            progress=False,
        )
    assert [row[0] for row in rows_of(path)] == ["step", "1", "2", "3"]


def curves_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("lost", [False, True])
def test_a_folder_holds_the_history_for_tensorboard(tmp_path, lost):
    def run(stop):
        with_stop = StopsAt(stop, value)
        return fit(
            Scalar(),
            constant_pairs(9),
            with_stop,
            log=tmp_path / "curves",
            checkpoint=tmp_path / "run.safetensors",
            validate=lambda network: network.value,
            validate_every=4,
            every=3,
            progress=False,
        )

    with pytest.raises(Stopped):
        run(5)
    if lost:  # what a kill leaves of the points that were not written yet
        shutil.rmtree(tmp_path / "curves")
    history = run(None)
    for name, points in curves_of(tmp_path / "curves").items():
        wanted = [(k + 1, v) for k, v in enumerate(history[name]) if not math.isnan(v)]
        if name == "seconds":  # those of the steps that were done twice are lost
            points, wanted = [p[0] for p in points], [w[0] for w in wanted]
            assert points == wanted
        else:
            assert points == [(k, pytest.approx(v)) for k, v in wanted], name
    assert curves_of(tmp_path / "curves").keys() == history.keys()


def test_without_tensorboard_a_folder_is_refused_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"^log: wanted .*pip install tensorboard"):
        fit(Scalar(), never(), value, log=tmp_path / "curves", progress=False)


def test_the_progress_bar_names_the_terms(capsys):
    fit(Smooth(), random_pairs(1), two_terms, steps=3)
    shown = capsys.readouterr().err
    assert all(f"{name}=" in shown for name in ("similarity", "size", "loss"))


# --- Checkpoints ------------------------------------------------------------------------------


class RandomPairs:
    """A stream that says where it stands, so that it need not be drawn again to go on.

    What :func:`reglib.training.fit` asks for are the two methods at its end.
    """

    def __init__(self, batch, shape=(7, 6), seed=0, n=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.shape, self.left, self.drawn = batch, shape, n, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.left == 0:
            raise StopIteration
        self.left = None if self.left is None else self.left - 1
        self.drawn += 1
        return tuple(torch.rand(2, self.batch, 1, *self.shape, generator=self.generator))

    def state_dict(self):
        return {"generator": self.generator.get_state(), "left": self.left}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.left = state["left"]


class GloballyRandom:
    """A stream of torch's global generator, which dropout uses as well."""

    def __init__(self, batch, shape=(7, 6)):
        self.batch, self.shape = batch, shape

    def __iter__(self):
        while True:
            yield tuple(torch.rand(2, self.batch, 1, *self.shape))


class Stochastic(Smooth):
    """Buffers that move, and random numbers: BatchNorm, dropout and stochastic depth."""

    def __init__(self, dimensions=2):
        super().__init__(dimensions, "BatchNorm")
        self.drop = nn.Dropout(0.3)

    def forward(self, moving, fixed):
        field = super().forward(self.drop(moving), fixed)
        if self.training and torch.rand(()) < 0.2:
            return 0 * field
        return field


class Stopped(Exception):
    """What StopsAt raises."""


class StopsAt:
    """An objective that fails at one of its calls, as a machine does that is taken away."""

    def __init__(self, stop, objective=two_terms):
        self.stop, self.objective, self.calls = stop, objective, count()

    def __call__(self, *arguments):
        if next(self.calls) == self.stop:
            raise Stopped
        return self.objective(*arguments)


def seeded(seed, dimensions=2):
    torch.manual_seed(seed)
    return Stochastic(dimensions)


def never():
    raise AssertionError("no pair may be drawn")
    yield


def comparable(network, history):
    """All that must agree to the bit."""
    state = {name: tensor.tolist() for name, tensor in network.state_dict().items()}
    return state, {name: repr(column) for name, column in history.items() if name != "seconds"}


def lives(path, make_pairs, stops, dimensions=2, **options):
    """Runs the same call again after each of its deaths; the last life is not stopped."""
    for life, stop in enumerate((*stops, None)):
        # With a checkpoint, the weights and random numbers of the call do not matter.
        seed = life if path is not None and path.exists() else 0
        network = seeded(seed, dimensions)
        torch.manual_seed(100 * seed)
        with contextlib.suppress(Stopped):
            history = fit(
                network,
                make_pairs(),
                StopsAt(stop),
                checkpoint=path,
                lr=1e-2,
                progress=False,
                **options,
            )
    return comparable(network, history)


STREAMS = {
    "with a state": partial(RandomPairs, 2),
    "drawn again": partial(random_pairs, 2),
    "drawn again from the global generator": partial(GloballyRandom, 2),
    "a list": lambda: list(islice(random_pairs(2), 40)),
}
OPTIONS = {
    "plain": {},
    "accumulated, clipped": {"accumulate": 2, "clip": 0.1, "schedule": polynomial},
    "momentum": {"optimiser": partial(torch.optim.SGD, momentum=0.9, nesterov=True)},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16", "optimiser": torch.optim.AdamW},
    "validated": {"validate": lambda network: weights_of(network).norm(), "validate_every": 3},
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(tmp_path, stream, options):
    options = {"steps": 12, "every": 2} | OPTIONS[options]
    make_pairs, path = STREAMS[stream], tmp_path / "run.safetensors"
    whole = lives(None, make_pairs, (), **options)
    assert lives(path, make_pairs, (), **options) == whole
    path.unlink()
    assert lives(path, make_pairs, (0, 7, 1, 6, 5, 3, 3), **options) == whole


def test_volumes_resume_too(tmp_path):
    def make_pairs():
        return RandomPairs(1, (4, 6, 5))

    options = {"steps": 6, "every": 1, "dimensions": 3}
    whole = lives(None, make_pairs, (), **options)
    assert lives(tmp_path / "run.safetensors", make_pairs, (2, 1, 2), **options) == whole


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_and_the_best_weights_survive(tmp_path, patience):
    def run(path, stop):
        network = Counter()
        objective = StopsAt(stop, DESCENT["objective"])
        options = DESCENT | {"objective": objective}
        try:
            fit(
                network,
                constant_pairs(),
                validate=parabola,
                validate_every=2,
                patience=patience,
                checkpoint=path,
                every=3,
                steps=20,
                **options,
            )
        except Stopped:
            return None
        return network.value.item(), network.seen.item(), next(objective.calls)

    whole = run(None, None)
    assert whole == (-4, 4, 4 + 2 * patience)
    path = tmp_path / "run.safetensors"
    for stop in (4, 2, 1):
        assert run(path, stop) is None
    assert run(path, None)[:2] == whole[:2]
    # A run that has ended stays as it is.
    assert run(path, None) == (*whole[:2], 0)


TAMPERED = {
    "random numbers": lambda s: s["processes"][0].update(cpu=torch.Generator().get_state()),
    "stream": lambda s: s["processes"][0]["pairs"].update(generator=torch.Generator().get_state()),
    "moments": lambda s: s["optimiser"]["state"][0]["exp_avg"].mul_(1.01),
    "running statistics": lambda s: s["network"]["layers.1.running_mean"].add_(0.01),
    "weights": lambda s: s["network"]["layers.0.weight"].mul_(1.0001),
}


@pytest.mark.parametrize("part", TAMPERED)
def test_every_part_of_a_checkpoint_matters(tmp_path, part):
    """The negative control of the tests above: what they store does decide the outcome."""
    path = tmp_path / "run.safetensors"
    options = {"steps": 8, "every": 1}
    make_pairs = STREAMS["with a state"]
    whole = lives(None, make_pairs, (), **options)
    with pytest.raises(Stopped):
        fit(
            seeded(0), make_pairs(), StopsAt(5), checkpoint=path, lr=1e-2, progress=False, **options
        )
    state = load_state(path)
    TAMPERED[part](state)
    save_state(path, state)
    assert lives(path, make_pairs, (), steps=8, every=1) != whole


def test_a_stream_with_a_state_is_not_drawn_again_and_others_are(tmp_path):
    drawn = []

    def watched():
        for pair in random_pairs(1):
            drawn.append(pair)
            yield pair

    for stream, again in ((RandomPairs(1), 0), (watched(), 6)):
        path = tmp_path / f"{again}.safetensors"
        options = {"checkpoint": path, "progress": False, "accumulate": 2}
        fit(Smooth(), stream, two_terms, steps=3, **options)
        stream = RandomPairs(1) if again == 0 else watched()
        drawn.clear()
        fit(Smooth(), stream, two_terms, steps=5, **options)
        assert (stream.drawn if again == 0 else len(drawn)) == again + 4
    drawn.clear()
    history = fit(Smooth(), never(), two_terms, steps=5, **options)
    assert len(history["loss"]) == 5


def test_pairs_that_end_before_the_checkpoint_are_named(tmp_path):
    options = {"checkpoint": tmp_path / "run.safetensors", "progress": False}
    fit(Scalar(), constant_pairs(6), value, steps=5, **options)
    with pytest.raises(ValueError, match=r"^pairs: wanted the 5 batches again .* got 4$"):
        fit(Scalar(), constant_pairs(4), value, steps=6, **options)


def test_a_checkpoint_is_one_file_of_safetensors(tmp_path):
    path = tmp_path / "run.safetensors"
    network = seeded(0)
    fit(network, random_pairs(2), two_terms, steps=3, checkpoint=path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    tensors, _ = load_weights(path)
    inside = {k: v for k, v in tensors.items() if k.startswith("network/")}
    assert inside.keys() == {f"network/{k}" for k in network.state_dict()}
    other = seeded(1)
    other.load_state_dict({k.removeprefix("network/"): v for k, v in inside.items()})
    assert weights_of(other).equal(weights_of(network))


def test_a_failing_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    options = {"checkpoint": path, "every": 2, "progress": False}
    fit(Scalar(), constant_pairs(), value, steps=2, **options)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        fit(Scalar(), constant_pairs(), value, steps=9, **options)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


OTHERS = {
    "network": ({"network": Smooth(norm="BatchNorm")}, r"network layers\.1\.weight \(absent there"),
    "width": ({"network": Scalar()}, r"network value \(absent there, float32 \(\) here\)"),
    "optimiser": ({"optimiser": torch.optim.AdamW}, r"optimiser \(Adam there, AdamW here\)"),
    "lr": ({"lr": 2e-3}, r"optimiser lr 0 \(0.001 there, 0.002 here\)"),
    "betas": (
        {"optimiser": partial(torch.optim.Adam, betas=(0.8, 0.9))},
        r"optimiser betas 0 \(\(0.9, 0.999\) there, \(0.8, 0.9\) here\)",
    ),
    "schedule": ({"schedule": polynomial}, r"schedule \(\[1.0, .* there, \[1.0, .* here\)"),
    "accumulate": ({"accumulate": 2}, r"accumulate \(1 there, 2 here\)"),
    "precision": ({"precision": "bfloat16"}, r"precision \(float32 there, bfloat16 here\)"),
    "clip": ({"clip": 1.0}, r"clip \(None there, 1.0 here\)"),
    "pairs": ({"pairs": random_pairs(2)}, r"state_dict of pairs \(True there, False here\)"),
    "validate": ({"validate": lambda network: 0}, r"validate \(False there, True here\)"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_and_kept(tmp_path, other):
    path = tmp_path / "run.safetensors"

    def call(network=None, pairs=None, **options):
        network = network or Smooth()
        pairs = pairs or RandomPairs(2)
        options |= {"checkpoint": path, "steps": 2, "progress": False}
        before = weights_of(network).clone()
        try:
            return fit(network, pairs, two_terms, **options)
        except ValueError:
            assert weights_of(network).equal(before)
            raise

    call()
    kept = path.read_bytes()
    options, message = OTHERS[other]
    with pytest.raises(ValueError, match=rf"^checkpoint: wanted one of this training, .*{message}"):
        call(**options)
    assert path.read_bytes() == kept
    call()


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path):
    path = tmp_path / "file"
    writers = [
        lambda: path.write_text("precious"),
        lambda: save_weights(Scalar(), path, {}),
        lambda: save_state(path, {"x": 1}),
    ]
    for write in writers:
        write()
        kept = path.read_bytes()
        with pytest.raises(ValueError, match=r"^checkpoint: wanted one that fit has written"):
            fit(Scalar(), never(), value, checkpoint=path, progress=False)
        assert path.read_bytes() == kept


def test_what_a_stream_cannot_keep_is_named(tmp_path):
    class Stream(RandomPairs):
        def state_dict(self):
            return {"generator": self.generator}

    with pytest.raises(TypeError, match=r"^processes/0/pairs/generator: wanted tensors and JSON"):
        fit(Smooth(), Stream(1), two_terms, steps=1, checkpoint=tmp_path / "run", progress=False)


def test_time_that_was_spent_before_counts(tmp_path, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    rates = []

    class Second(StopsAt):
        def __call__(self, *arguments):
            terms = super().__call__(*arguments)
            clock["now"] += 1
            return terms

    def sgd(parameters, lr):
        optimiser = torch.optim.SGD(parameters, lr=lr)
        optimiser.register_step_post_hook(
            lambda opt, *rest: rates.append(opt.param_groups[0]["lr"])
        )
        return optimiser

    options = {"seconds": 10.0, "optimiser": sgd, "schedule": lambda spent: 1 - spent, "lr": 1.0}
    options |= {"checkpoint": tmp_path / "run", "every": 2, "progress": False}
    with pytest.raises(Stopped):
        fit(Scalar(), constant_pairs(), Second(5, value), **options)
    clock["now"] += 1000
    history = fit(Scalar(), constant_pairs(), Second(None, value), **options)
    # The checkpoint is that of 4 steps; the fifth was lost, and so was its second.
    assert history["seconds"] == [k + 1.0 for k in range(10)]
    assert rates == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6] + [0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


# --- Ctrl-C -----------------------------------------------------------------------------------


class Interrupts:
    """An objective during which Ctrl-C is pressed some times."""

    def __init__(self, at, times=1):
        self.at, self.times, self.passed = at, times, 0

    def __call__(self, *arguments):
        if self.passed == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
        self.passed += 1
        return two_terms(*arguments)


def test_ctrl_c_finishes_the_step_writes_the_checkpoint_and_goes_on(tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"steps": 9, "lr": 1e-2, "progress": False}
    whole = lives(None, STREAMS["with a state"], (), steps=9)
    network, objective = seeded(0), Interrupts(at=4)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt, match="after 5 steps"):
        fit(network, RandomPairs(2), objective, checkpoint=path, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not network.training
    assert load_weights(path)[0]["network/layers.0.weight"].equal(network.layers[0].weight)
    assert lives(path, STREAMS["with a state"], (), steps=9) == whole


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    path, objective = tmp_path / "run.safetensors", Interrupts(at=3, times=2)
    network = seeded(0)
    with pytest.raises(KeyboardInterrupt):
        fit(network, RandomPairs(2), objective, checkpoint=path, steps=9, progress=False)
    assert objective.passed == 3
    assert not path.exists()
    assert not network.training
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_step_is_not_forgotten(tmp_path):
    path, objective = tmp_path / "run.safetensors", Interrupts(at=1)
    with pytest.raises(KeyboardInterrupt):
        fit(seeded(0), RandomPairs(2), objective, checkpoint=path, steps=2, progress=False)
    assert path.exists()


def test_a_program_that_handles_ctrl_c_itself_and_other_threads_are_left_alone():
    came = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        history = fit(seeded(0), RandomPairs(2), Interrupts(at=1), steps=3, progress=False)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert (len(came), len(history["loss"])) == (1, 3)
    results = []

    def work():
        results.append(fit(seeded(0), RandomPairs(2), two_terms, steps=3, progress=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results[0]["loss"]) == 3


# --- Bad input --------------------------------------------------------------------------------

BAD = [
    ("steps", 0, ValueError),
    ("steps", 2.5, TypeError),
    ("seconds", "long", TypeError),
    ("lr", None, TypeError),
    ("lr", math.nan, ValueError),
    ("clip", 0.0, ValueError),
    ("accumulate", 0, ValueError),
    ("accumulate", None, TypeError),
    ("every", -1, ValueError),
    ("validate_every", 1.0, TypeError),
    ("patience", True, TypeError),
    ("patience", 3, ValueError),
    ("precision", "half", ValueError),
    ("fabric", "ddp", TypeError),
    ("network", nn.Identity(), ValueError),
    ("pairs", [torch.zeros(2, 1, 1, 4, 4)], TypeError),
    ("pairs", [(torch.zeros(1, 1, 4, 4),)], TypeError),
    ("checkpoint", "no/such/folder/run.safetensors", ValueError),
    ("validate", lambda network: None, TypeError),
    ("validate", lambda network: torch.zeros(2), TypeError),
    ("objective", lambda output, *pair: {}, ValueError),
    ("objective", lambda output, *pair: {"value": output.expand(2)}, ValueError),
    ("objective", lambda output, *pair: {"value": 1.0}, ValueError),
    ("objective", lambda output, *pair: {"validation": output}, ValueError),
    ("objective", lambda output, *pair: {"step": output}, ValueError),
]


@pytest.mark.parametrize(("name", "bad", "error"), BAD, ids=lambda x: str(x)[:20])
def test_bad_arguments_are_named(name, bad, error):
    arguments = {"network": Scalar(), "pairs": constant_pairs(2), "objective": value}
    arguments |= {"every": 1, "progress": False, name: bad}
    with pytest.raises(error, match=rf"^{name}: .*wanted .*got "):
        fit(**arguments)


def test_terms_that_come_and_go_are_named():
    calls = count()

    def objective(output, *pair):
        return {"a": output} if next(calls) < 2 else {"b": output}

    with pytest.raises(ValueError, match=r"^objective: wanted the terms \['a'\] .* got \['b'\]"):
        fit(Scalar(), constant_pairs(), objective, progress=False)
