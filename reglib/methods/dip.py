"""DIP: a convolutional network that is fitted to one pair, and is all the regularisation there is.

The displacement is what a network with random weights makes of noise, and the weights are what is
optimised: ``min over theta of mean |moving(x + f_theta(z)) - fixed(x)|``, by Adam, with no
regulariser. Such a network gives smooth fields with few steps and rough ones only with many, so it
takes up what is coarse first. Nothing is learnt from other pairs.

The network is the hourglass with skip connections of the deep image prior: convolutions that halve
the size, then interpolation that doubles it again, and at every scale a few channels that are led
past all that is coarser.

**Normalisation.** BatchNorm in training mode, given a batch of one, normalises each feature map by
the mean and variance of that map: it is InstanceNorm. Here every pair has weights of its own, so
every pair is a batch of one, in company too. As no convolution but the last then says anything by
its scale, the last alone decides how large the first field is. It is shrunk until that field is no
longer than ``START`` voxels along any axis: the start is close to the identity, and does not fold.

**When to stop.** After many steps the network fits what no smooth field explains: the similarity
goes on rising while the field begins to fold. Folding can be seen without knowing the truth. Of
the fields on the way, averaged exponentially, the one of the lowest loss among those that fold in
no more than a given share of the voxels is kept, and a pair stops when that has not become better
for a while (:class:`DIP`).

Laves, Ihler and Ortmaier, "Deformable medical image registration using a randomly-initialized CNN
as regularization prior", MIDL 2019, arXiv:1908.00788. Ulyanov, Vedaldi and Lempitsky, "Deep image
prior", CVPR 2018, doi:10.1109/CVPR.2018.00984. No code of the first was released: what its text
leaves open (network, learning rate, number of steps, unit of the displacement) is as in the second,
or chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reglib.checks import check_choice, check_numbers, check_positive_int, check_shape
from reglib.geometry.affine import whole_field
from reglib.geometry.fields import compose, integrate, upsample_field
from reglib.geometry.grid import no_autocast
from reglib.geometry.sampling import warp
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import mae

#: Of (warped, fixed), with ``weight`` and ``reduction="none"``: ``(B,)``, lower is better.
Similarity = Callable[..., Tensor]

#: Voxels: the longest first displacement along any axis.
START = 0.25

#: Standard deviation of the noise that the network is given.
NOISE = 0.1

#: Steps between two looks at the averaged field.
LOOK = 10

#: An axis is halved only as long as it keeps so many nodes: statistics of fewer say nothing.
NODES = 4

#: A field under which less than this share of what counted at first still counts is not kept.
COVERED = 0.5

_CONV = {2: F.conv2d, 3: F.conv3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


def _check_number(value: float, name: str, least: float, most: float = math.inf) -> float:
    [number] = check_numbers([value], name)
    if not least <= number <= most or number == math.inf:
        raise ValueError(f"{name}: wanted a number from {least:g} to {most:g}, got {value!r}")
    return number


# --- The network ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What an :class:`Hourglass` is made of. The defaults are small; ``PAPER`` has the paper's.

    Attributes:
        channels: of each scale, finest first; each is half as large as the one before.
        skips: channels that are led past what is coarser, one for each scale; 0 for none.
        inputs: channels of the noise.
        norm: ``"instance"``, or ``"none"``, which leaves a factor and an offset per channel.
        std: standard deviation of the weights at first; ``None`` is that of He et al.,
            ``sqrt(2 / inputs of the convolution)``.

    Raises:
        TypeError, ValueError: if the settings do not fit together.
    """

    channels: Sequence[int] = (16, 32, 32, 32, 32)
    skips: Sequence[int] = (4, 4, 4, 4, 4)
    inputs: int = 16
    norm: str = "instance"
    std: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("channels", "skips"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise TypeError(f"{name}: wanted one integer or more, got {values!r}")
            for value in values:
                if name == "channels" or value != 0:
                    check_positive_int(value, name)
            object.__setattr__(self, name, tuple(int(value) for value in values))
        if len(self.skips) != len(self.channels):
            raise ValueError(
                f"skips: wanted {len(self.channels)}, one for each scale, got {self.skips}"
            )
        check_positive_int(self.inputs, "inputs")
        check_choice(self.norm, "norm", ("instance", "none"))
        if self.std is not None and _check_number(self.std, "std", 0) == 0:
            raise ValueError("std: wanted a positive number or None, got 0")


#: As in the deep image prior; the paper's ``N(0, 0.01)`` is read as a variance.
PAPER = Settings(channels=(128,) * 5, skips=(4,) * 5, inputs=32, std=0.1)


def halvings(size: int, scales: int) -> int:
    """How often an axis of ``size`` nodes is halved: at most ``scales`` times, to 4 nodes or more.

    It is padded to a multiple of 2 to that power.
    """
    count = 0
    while count < scales and -(-size // 2 ** (count + 1)) >= NODES:
        count += 1
    return count


class _Convolution(nn.Module):
    """A convolution with weights of its own for each copy; reflected at the border.

    The copies lie side by side as the groups of one convolution. What all copies share, an input
    of batch 1, is convolved once, with the weights of all.
    """

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        outputs: int,
        kernel: int,
        copies: int,
        std: float | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        shape = (outputs, inputs, *(kernel,) * dimensions)
        if std is None:
            std = math.sqrt(2 / math.prod(shape[1:]))
        weight = std * torch.randn(shape, generator=generator)
        self.weight = nn.Parameter(weight.repeat(copies, *(1,) * len(shape)).view(copies, *shape))

    def forward(self, x: Tensor, stride: Sequence[int] | None = None) -> Tensor:
        """``(copies, inputs, *S)``, or one for all, to ``(copies, outputs, *T)``."""
        copies, outputs = self.weight.shape[:2]
        d = x.ndim - 2
        margin = self.weight.shape[-1] // 2
        groups = len(x)
        if margin:
            x = F.pad(x, (margin,) * (2 * d), mode="reflect")
        out: Tensor = _CONV[d](
            x.reshape(1, -1, *x.shape[2:]),
            self.weight.flatten(0, 1),
            stride=tuple(stride or (1,) * d),
            groups=groups,
        )
        return out.view(copies, outputs, *out.shape[2:])


class _Norm(nn.Module):
    """Each feature map by its own mean and variance, then a factor and an offset of each."""

    def __init__(self, channels: int, copies: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.factor = nn.Parameter(torch.ones(copies, channels))
        self.offset = nn.Parameter(torch.zeros(copies, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(copies, channels, *S)``."""
        if self.norm == "none":
            view = (*x.shape[:2], *(1,) * (x.ndim - 2))
            return x * self.factor.view(view) + self.offset.view(view)
        # BatchNorm of a batch of one that has the channels of all copies.
        out = F.batch_norm(
            x.reshape(1, -1, *x.shape[2:]),
            None,
            None,
            self.factor.flatten(),
            self.offset.flatten(),
            training=True,
        )
        return out.view(x.shape)


class _Block(nn.Module):
    """A convolution, a normalisation and a leaky ReLU."""

    def __init__(self, conv: _Convolution, norm: _Norm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor, stride: Sequence[int] | None = None) -> Tensor:
        """``(copies, inputs, *S)`` to ``(copies, outputs, *T)``."""
        return F.leaky_relu(self.norm(self.conv(x, stride)), 0.2)


class _Scale(nn.Module):
    """What happens at one scale, before and after all that is coarser."""

    def __init__(
        self,
        block: Callable[[int, int, int], _Block],
        norm: Callable[[int], _Norm],
        inputs: int,
        channels: int,
        skip: int,
        coarser: int,
    ) -> None:
        super().__init__()
        self.skip = block(inputs, skip, 1) if skip else None
        self.shrink, self.look = block(inputs, channels, 3), block(channels, channels, 3)
        self.norm = norm(skip + coarser)
        self.join, self.mix = block(skip + coarser, channels, 3), block(channels, channels, 1)


class Hourglass(nn.Module):
    """Noise to vectors: down and up again, with skip connections; many copies side by side.

    Sizes that do not halve are padded, and the margin is cut off; an axis with few nodes is halved
    less often, and scales that would halve none are left out.

    Args:
        settings: what it is made of.
        shape: spatial shape ``S`` of what it returns, two or three axes.
        outputs: channels of what it returns.
        copies: so many networks with weights of their own; all begin alike.
        generator: source of randomness, on the CPU; torch's own if ``None``.

    Raises:
        TypeError, ValueError: if ``shape`` or a number is malformed.
    """

    def __init__(
        self,
        settings: Settings,
        shape: Sequence[int],
        outputs: int,
        *,
        copies: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_shape(shape, (2, 3))
        check_positive_int(outputs, "outputs")
        check_positive_int(copies, "copies")
        self.settings, self.shape = settings, tuple(int(n) for n in shape)
        scales, d = len(settings.channels), len(self.shape)
        self.halvings = tuple(halvings(n, scales) for n in self.shape)
        #: Spatial shape of the noise. Two nodes are the fewest that can be reflected.
        self.padded = tuple(
            max(-(-n // 2**h) * 2**h, 2) for n, h in zip(self.shape, self.halvings, strict=True)
        )
        scales = max(*self.halvings, 1)

        def convolution(inputs: int, outputs: int, kernel: int) -> _Convolution:
            return _Convolution(d, inputs, outputs, kernel, copies, settings.std, generator)

        def norm(channels: int) -> _Norm:
            return _Norm(channels, copies, settings.norm)

        def block(inputs: int, outputs: int, kernel: int) -> _Block:
            return _Block(convolution(inputs, outputs, kernel), norm(outputs))

        widths = [*settings.channels[:scales], settings.channels[scales - 1]]
        self.scales = nn.ModuleList(
            _Scale(block, norm, inputs, channels, skip, coarser)
            for inputs, channels, skip, coarser in zip(
                (settings.inputs, *widths[:-2]),
                widths[:-1],
                settings.skips[:scales],
                widths[1:],
                strict=True,
            )
        )
        self.head = convolution(widths[0], outputs, 1)
        self.offset = nn.Parameter(torch.zeros(copies, outputs))

    def forward(self, z: Tensor) -> Tensor:
        """Noise ``(copies, inputs, *padded)``, or one for all, to ``(copies, outputs, *S)``.

        Raises:
            ValueError: if ``z`` has another shape.
        """
        copies = len(self.offset)
        wanted = (self.settings.inputs, *self.padded)
        if tuple(z.shape[1:]) != wanted or len(z) not in (1, copies):
            raise ValueError(
                f"z: wanted shape {(copies, *wanted)} or {(1, *wanted)}, got {tuple(z.shape)}"
            )
        x = self._through(0, z)
        with no_autocast(x):
            x = self.head(x.to(self.head.weight.dtype))
            x = x + self.offset.view(*x.shape[:2], *(1,) * (x.ndim - 2))
        for axis, (n, padded) in enumerate(zip(self.shape, self.padded, strict=True), start=2):
            x = x.narrow(axis, (padded - n) // 2, n)
        return x

    def _through(self, number: int, x: Tensor) -> Tensor:
        """Down through the scales from ``number`` on, and up again to the size of ``x``."""
        scale = self.scales[number]
        assert isinstance(scale, _Scale)
        deep = scale.look(scale.shrink(x, [2 if number < h else 1 for h in self.halvings]))
        if number + 1 < len(self.scales):
            deep = self._through(number + 1, deep)
        size = tuple(x.shape[2:])
        deep = F.interpolate(deep, size=size, mode=_LINEAR[len(size)], align_corners=False)
        both = deep if scale.skip is None else torch.cat([scale.skip(x), deep], 1)
        return scale.mix(scale.join(scale.norm(both)))


# --- The method -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DIP:
    """The method that fits a new network to each pair; the network is the regularisation.

    Every pair of a batch has weights of its own. All begin alike and see the same noise, so that a
    pair gives in a batch what it gives alone, and many pairs take less time together. Images may
    have several channels. Each channel is scaled to 0 .. 1 by the range that both images have in
    common. Masks weigh the voxels, and what the moving image does not cover does not count. A is
    kept as the pair has it, and what the pair has been displaced by before stays, underneath.

    Every 10 steps the average of the fields so far is looked at. The first candidate is no
    displacement at all; a later one takes its place if its loss is lower and it folds in no more
    than ``folding`` of the voxels. No truth is needed for that. A pair stops when the loss of what
    is kept has not fallen by the share ``tolerance`` of its first value within ``patience`` steps;
    the pairs that are left go on.

    Attributes:
        network: what it is made of.
        input_mode: what the network is given, the same for all pairs. ``"fixed"`` is drawn once,
            ``"fixed+noise"`` has fresh noise added in every step, ``"resample"`` is drawn anew in
            every step. In the last the network knows where it is by the borders alone, which is
            slow.
        noise: standard deviation of the added noise, as a share of that of the input.
        scale: voxels of displacement where the network gives 1.
        pool: voxels of the fixed grid between two nodes of the network, between which the field is
            linear.
        squarings: of :func:`reglib.geometry.fields.integrate`, if what the network gives shall be
            a velocity: the field then hardly folds, whatever the network does. 0 (the paper's)
            takes it for the displacement.
        similarity: of (warped, fixed), ``weight``, ``reduction``; lower is better. The mean
            absolute error is the paper's.
        regularity: of (field in voxels), ``spacing`` in mm, ``reduction``; for comparison.
        regularity_weight: of the regularity in the loss; 0 (the paper's) leaves it out.
        steps: at most so many.
        lr: learning rate of Adam.
        averaging: share of the past in the exponential average of the field; 0 takes every field
            as it is.
        folding: share of the voxels in which a field that is kept may fold; ``None`` for any.
        tolerance: see above; 0 stops when nothing better was found.
        patience: steps; ``None`` goes on to the last.
        seed: of the weights and the noise.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    network: Settings = field(default_factory=Settings)
    input_mode: str = "fixed"
    noise: float = 0.3
    scale: float = 2.0
    pool: int = 4
    squarings: int = 5
    similarity: Similarity = mae
    regularity: Similarity = diffusion
    regularity_weight: float = 0.0
    steps: int = 500
    lr: float = 2e-3
    averaging: float = 0.9
    folding: float | None = 2e-4
    tolerance: float = 2e-3
    patience: int | None = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.network, Settings):
            raise TypeError(f"network: wanted Settings, got {type(self.network).__name__}")
        check_choice(self.input_mode, "input_mode", ("fixed", "fixed+noise", "resample"))
        for name in ("scale", "lr"):
            if _check_number(getattr(self, name), name, 0) == 0:
                raise ValueError(f"{name}: wanted a positive number, got 0")
        for name in ("noise", "regularity_weight", "tolerance"):
            _check_number(getattr(self, name), name, 0)
        for name in ("similarity", "regularity"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: wanted a function, got {getattr(self, name)!r}")
        for name in ("pool", "steps"):
            check_positive_int(getattr(self, name), name)
        if self.squarings != 0:
            check_positive_int(self.squarings, "squarings")
        if _check_number(self.averaging, "averaging", 0, 1) == 1:
            raise ValueError("averaging: wanted less than 1, got 1")
        if self.folding is not None:
            _check_number(self.folding, "folding", 0, 1)
        if self.patience is not None:
            check_positive_int(self.patience, "patience")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        generator = torch.Generator().manual_seed(self.seed)
        prior = Prior(self, tuple(pair.fixed.shape[2:]), len(pair.fixed), generator).to(pair.fixed)
        sight = _Sight(self, pair)
        with torch.no_grad():
            kept = _Kept(self, torch.zeros_like(pair.field), sight)
        optimiser = torch.optim.Adam(prior.parameters(), lr=self.lr)
        average = torch.zeros_like(pair.field)
        for step in range(1, self.steps + 1):
            u = prior()
            terms, _ = sight.terms(u)
            loss = torch.stack(list(terms.values())).sum(0)
            if not bool(loss.detach().isfinite().all()):
                raise FloatingPointError(f"loss: {loss.tolist()} at step {step - 1}")
            optimiser.zero_grad()
            torch.autograd.backward(loss.sum())
            optimiser.step()
            average.lerp_(u.detach(), 1 - self.averaging)
            active = kept.active
            if step % LOOK == 0 or step == self.steps:
                with torch.no_grad():
                    # Weights of the average sum to 1 from the first step on.
                    kept.look(average / (1 - self.averaging**step), step)
            yield Iterate(
                stage="network prior",
                terms={name: term.detach() for name, term in terms.items()},
                active=active,
                transform=partial(_transform, pair, kept.field),
                notes=kept.notes,
            )
            if not bool(kept.active.any()):
                break


#: ``"paper"``: everything at full resolution, the input drawn anew in every step, no regard to
#: folding. Learning rate, number of steps and scale, which the text does not give, are ours (the
#: scale is a tenth of half the size of an image of 256 voxels), and the average is that of later
#: code by the same author. ``"fast"``: the defaults, a velocity at a quarter of the resolution.
PRESETS: dict[str, DIP] = {
    "paper": DIP(
        network=PAPER,
        input_mode="resample",
        scale=12.75,
        pool=1,
        squarings=0,
        steps=2_000,
        lr=1e-3,
        averaging=0.99,
        folding=None,
        patience=None,
    ),
    "fast": DIP(),
}


class Prior(nn.Module):
    """The displacement as a function of the weights of a network: it is given noise of its own.

    Args:
        method: settings.
        shape: spatial shape ``S`` of the fixed image, two or three axes.
        copies: pairs.
        generator: source of randomness, on the CPU.
    """

    noise: Tensor
    reach: Tensor

    def __init__(
        self, method: DIP, shape: Sequence[int], copies: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.method, self.shape, self.generator = method, tuple(shape), generator
        d, pool = len(self.shape), method.pool
        nodes = [-(-n // pool) for n in self.shape]
        self.network = Hourglass(method.network, nodes, d, copies=copies, generator=generator)
        self.register_buffer("noise", self._draw())
        # Voxels of the nodes' own grid; along an axis of one voxel there is nowhere to go.
        reach = [method.scale / pool if n > 1 else 0.0 for n in self.shape]
        self.register_buffer("reach", torch.tensor(reach).view(1, d, *(1,) * d))
        with torch.no_grad():
            longest = float(self._field(self.noise, squarings=0).abs().max())
            if longest > START:
                self.network.head.weight.mul_(START / longest)

    def _draw(self) -> Tensor:
        """Noise for all copies, ``(1, inputs, *padded)``."""
        shape = (1, self.method.network.inputs, *self.network.padded)
        return NOISE * torch.randn(shape, generator=self.generator)

    def _field(self, z: Tensor, squarings: int) -> Tensor:
        u = self.network(z) * self.reach
        if squarings:
            u = integrate(u, steps=squarings)
        return u if self.method.pool == 1 else upsample_field(u, self.method.pool, self.shape)

    def forward(self) -> Tensor:
        """The next displacement, ``(copies, D, *S)`` in voxels."""
        z = self.noise
        if self.method.input_mode == "fixed+noise":
            z = z + self.method.noise * self._draw().to(z)
        elif self.method.input_mode == "resample":
            z = self._draw().to(z)
        return self._field(z, self.method.squarings)


class _Sight:
    """The images of a pair, and what is said of a displacement."""

    def __init__(self, method: DIP, pair: Pair) -> None:
        self.method, self.pair = method, pair
        self.moving, self.fixed = _scaled(pair)
        self.matrix = pair.affine.to(pair.field)
        self.before = pair.field if bool(pair.field.any()) else None
        self.spacing = tuple(pair.fixed_affine[:-1, :-1].norm(dim=0).tolist())
        self.inside = pair.moving_mask
        if self.inside is None:
            self.inside = torch.ones_like(pair.moving[:, :1])

    def terms(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the loss, ``(B,)`` each, and how much counts, ``(B,)``."""
        pair, method = self.pair, self.method
        whole = u if self.before is None else compose(self.before, u)
        whole = whole_field(self.matrix, whole, pair.fixed_affine, pair.moving_affine)
        warped = warp(self.moving, whole)
        with torch.no_grad():
            assert self.inside is not None
            weight = warp(self.inside, whole, padding="zeros")
            if pair.fixed_mask is not None:
                weight = weight * pair.fixed_mask
        terms = {
            "similarity": method.similarity(warped, self.fixed, weight=weight, reduction="none")
        }
        if method.regularity_weight > 0:
            rough = method.regularity(u, spacing=self.spacing, reduction="none")
            terms["regularity"] = method.regularity_weight * rough
        return terms, weight.flatten(1).sum(1)


class _Kept:
    """The best displacement so far of every pair, and which pairs still look for a better one."""

    def __init__(self, method: DIP, still: Tensor, sight: _Sight) -> None:
        self.method, self.sight = method, sight
        self.field = still
        terms, self.covered = sight.terms(still)
        self.loss = torch.stack(list(terms.values())).sum(0)
        if not bool(self.loss.isfinite().all()):
            raise FloatingPointError(f"loss: {self.loss.tolist()} without a displacement")
        self.first = self.loss.abs().clamp(min=1e-6)
        # What is kept is compared with what it was when it last fell visibly.
        self.reference, self.since = self.loss, torch.zeros_like(self.loss)
        self.active = torch.ones(len(still), dtype=torch.bool, device=still.device)
        self.steps = torch.zeros_like(self.loss)
        self.notes: tuple[str, ...] = ()

    def look(self, u: Tensor, step: int) -> None:
        """Keep a displacement where it is better, and stop the pairs that wait in vain."""
        terms, covered = self.sight.terms(u)
        loss = torch.stack(list(terms.values())).sum(0)
        better = (loss < self.loss) & self.active & (covered >= COVERED * self.covered)
        if self.method.folding is not None:
            better &= folding(u) <= self.method.folding
        self.loss = torch.where(better, loss, self.loss)
        self.field = torch.where(better.view(-1, *(1,) * (u.ndim - 1)), u, self.field)
        self.steps = self.steps.masked_fill(better, step)
        fell = self.loss < self.reference - self.method.tolerance * self.first
        self.reference = torch.where(fell, self.loss, self.reference)
        self.since = self.since.masked_fill(fell, step)
        if self.method.patience is not None:
            self.active = self.active & (step - self.since < self.method.patience)
        kept = ", ".join(f"{n:.0f}" for n in self.steps.tolist())
        self.notes = (f"kept the average of the fields up to step {kept} of {step}",)


def _transform(pair: Pair, u: Tensor) -> tuple[Tensor, Tensor]:
    """A as it was, and u after what was there before."""
    return pair.affine, compose(pair.field, u) if bool(pair.field.any()) else u


def _scaled(pair: Pair) -> tuple[Tensor, Tensor]:
    """Every channel of both images between 0 and 1 by their common range, and 0 if it is constant.

    What a mask leaves out has no say, and is clamped.
    """
    lows, highs = [], []
    for image, mask in ((pair.moving, pair.moving_mask), (pair.fixed, pair.fixed_mask)):
        least = largest = image.flatten(2)
        if mask is not None:
            absent = mask.flatten(2) <= 0
            least, largest = (least.masked_fill(absent, x) for x in (math.inf, -math.inf))
        lows.append(least.amin(2))
        highs.append(largest.amax(2))
    low, high = torch.minimum(*lows), torch.maximum(*highs)
    rounding = 8 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    flat = high - low <= rounding
    view = (*low.shape, *(1,) * (pair.fixed.ndim - 2))
    extent = (high - low).masked_fill(flat, math.inf).view(view)
    moving, fixed = (((x - low.view(view)) / extent).clamp(0, 1) for x in (pair.moving, pair.fixed))
    return moving, fixed
