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

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reglib.checks import check_choice, check_number, check_positive_int, check_shape
from reglib.geometry.fields import compose, integrate, upsample_field
from reglib.geometry.grid import no_autocast
from reglib.geometry.sampling import warp
from reglib.methods.pair import Iterate, Pair
from reglib.objectives.metrics import folding
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import mae

#: Of (warped, fixed), with ``weight`` and ``reduction="none"``: ``(B,)``, lower is better.
Similarity = Callable[..., Tensor]

#: The longest first displacement along any axis, in voxels.
START = 0.25

#: Standard deviation of the noise that the network is given. What is made of it is normalised, so
#: that a larger one changes hardly anything.
NOISE = 0.1

#: Standard deviation of what ``"fixed+noise"`` adds to it in every step: about a third, as in the
#: deep image prior. (Later code by the first author of the paper adds more than it keeps.)
ADDED = 0.03

#: Steps between two looks at the averaged field.
LOOK = 10

#: An axis is halved only as long as it keeps so many nodes, as statistics of fewer say nothing.
NODES = 4

#: A field under which less than this share of what counted at first still counts is not kept.
COVERED = 0.5

_CONV = {2: F.conv2d, 3: F.conv3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


# --- The network ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What an :class:`Hourglass` is made of. The defaults are small; ``PAPER`` has the paper's.

    Attributes:
        channels: of each scale, finest first; every scale is half as large as the one before.
        skips: channels that are led past what is coarser, one for each scale; 0 for none.
        inputs: channels of the noise.
        std: standard deviation of the weights at first. As every feature map is normalised, it
            says how much a step of the optimisation changes: the larger, the less.

    Raises:
        TypeError, ValueError: if the settings do not fit together.
    """

    channels: Sequence[int] = (16, 32, 32, 32, 32)
    skips: Sequence[int] = (4, 4, 4, 4, 4)
    inputs: int = 16
    std: float = 0.1

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
        check_number(self.std, "std", positive=True)


#: As in the deep image prior; the paper's ``N(0, 0.01)`` is read as a variance.
PAPER = Settings(channels=(128,) * 5, inputs=32)


def _halvings(size: int, scales: int) -> int:
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

    def __init__(self, weight: Tensor, stride: Sequence[int]) -> None:
        super().__init__()
        #: ``(copies, outputs, inputs, *kernel)``
        self.weight = nn.Parameter(weight)
        self.stride, self.margin = tuple(stride), weight.shape[-1] // 2

    def forward(self, x: Tensor) -> Tensor:
        """``(copies, inputs, *S)``, or one for all, to ``(copies, outputs, *T)``."""
        copies, outputs = self.weight.shape[:2]
        d = len(self.stride)
        if self.margin:
            x = F.pad(x, (self.margin,) * (2 * d), mode="reflect")
        out: Tensor = _CONV[d](
            x.reshape(1, -1, *x.shape[2:]),
            self.weight.flatten(0, 1),
            stride=self.stride,
            groups=len(x),
        )
        return out.view(copies, outputs, *out.shape[2:])


class _Norm(nn.Module):
    """Each feature map by its own mean and variance, then a factor and an offset of each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        #: ``(copies, channels)``, as the offset
        self.factor = nn.Parameter(torch.ones(1, channels))
        self.offset = nn.Parameter(torch.zeros(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(copies, channels, *S)``: BatchNorm of one sample that has the channels of all."""
        out = F.batch_norm(
            x.reshape(1, -1, *x.shape[2:]),
            None,
            None,
            self.factor.flatten(),
            self.offset.flatten(),
            training=True,
        )
        return out.view(x.shape)


class _Scale(nn.Module):
    """One scale: down, whatever is coarser, up again, and joined with what was led past."""

    def __init__(
        self, down: nn.Module, deeper: nn.Module, skip: nn.Module | None, up: nn.Module
    ) -> None:
        super().__init__()
        self.down, self.deeper, self.skip, self.up = down, deeper, skip, up

    def forward(self, x: Tensor) -> Tensor:
        """``(copies, inputs, *S)`` to ``(copies, channels, *S)``."""
        size = tuple(x.shape[2:])
        deep = self.deeper(self.down(x))
        deep = F.interpolate(deep, size=size, mode=_LINEAR[len(size)], align_corners=False)
        joined: Tensor = self.up(deep if self.skip is None else torch.cat([self.skip(x), deep], 1))
        return joined


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
        d = len(self.shape)
        self.halvings = tuple(_halvings(n, len(settings.channels)) for n in self.shape)
        #: Spatial shape of the noise. Two nodes are the fewest that can be reflected.
        self.padded = tuple(
            max(-(-n // 2**h) * 2**h, 2) for n, h in zip(self.shape, self.halvings, strict=True)
        )

        def convolution(
            inputs: int, outputs: int, kernel: int, stride: Sequence[int]
        ) -> _Convolution:
            shape = (outputs, inputs, *(kernel,) * d)
            weight = settings.std * torch.randn(shape, generator=generator)
            return _Convolution(weight[None], stride)

        def block(
            inputs: int, outputs: int, kernel: int, stride: Sequence[int] = (1,) * d
        ) -> nn.Sequential:
            conv = convolution(inputs, outputs, kernel, stride)
            return nn.Sequential(conv, _Norm(outputs), nn.LeakyReLU(0.2))

        used = settings.channels[: max(*self.halvings, 1)]
        inner: nn.Module = nn.Identity()
        coarser = used[-1]
        for number, channels in reversed(list(enumerate(used))):
            inputs = used[number - 1] if number else settings.inputs
            skip = settings.skips[number]
            stride = [2 if number < h else 1 for h in self.halvings]
            inner = _Scale(
                down=nn.Sequential(
                    block(inputs, channels, 3, stride), block(channels, channels, 3)
                ),
                deeper=inner,
                skip=block(inputs, skip, 1) if skip else None,
                up=nn.Sequential(
                    _Norm(skip + coarser),
                    block(skip + coarser, channels, 3),
                    block(channels, channels, 1),
                ),
            )
            coarser = channels
        self.inner = inner
        self.head = convolution(used[0], outputs, 1, (1,) * d)
        self.offset = nn.Parameter(torch.zeros(1, outputs, *(1,) * d))
        self.repeat(copies)

    def repeat(self, copies: int) -> None:
        """Become so many copies of the first, with weights of their own from now on."""
        for parameter in self.parameters():
            first = parameter.data[:1]
            parameter.data = first.expand(copies, *first.shape[1:]).clone()

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
        x = self.inner(z)
        with no_autocast(x):
            x = self.head(x.to(self.offset.dtype)) + self.offset
        for axis, (n, padded) in enumerate(zip(self.shape, self.padded, strict=True), start=2):
            x = x.narrow(axis, (padded - n) // 2, n)
        return x


# --- The method -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DIP:
    """The method that fits a new network to each pair; the network is the regularisation.

    Every pair of a batch has weights of its own. All begin alike and see the same noise, so that a
    pair gives in a batch what it gives alone, and many pairs take less time together. Images may
    have several channels. Each channel is scaled to 0 .. 1 by the range that both images have in
    common. Masks weigh the voxels, and what the moving image does not cover does not count. A is
    kept as the pair has it, and what the pair has been displaced by before stays, underneath. A
    loss that is not finite raises ``FloatingPointError``.

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
            check_number(getattr(self, name), name, positive=True)
        for name in ("regularity_weight", "tolerance"):
            check_number(getattr(self, name), name)
        for name in ("similarity", "regularity"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: wanted a function, got {getattr(self, name)!r}")
        for name in ("pool", "steps"):
            check_positive_int(getattr(self, name), name)
        if self.squarings != 0:
            check_positive_int(self.squarings, "squarings")
        check_number(self.averaging, "averaging", most=1)
        if self.averaging == 1:
            raise ValueError("averaging: wanted less than 1, got 1")
        if self.folding is not None:
            check_number(self.folding, "folding", most=1)
        if self.patience is not None:
            check_positive_int(self.patience, "patience")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Optimise; yields after every step."""
        generator = torch.Generator().manual_seed(self.seed)
        prior = Prior(self, tuple(pair.fixed.shape[2:]), len(pair.fixed), generator).to(pair.fixed)
        optimiser = torch.optim.Adam(prior.parameters(), lr=self.lr)
        scaled = _scaled(pair)
        kept = _Kept(self, scaled)
        average = torch.zeros_like(pair.field)
        for step in range(1, self.steps + 1):
            u = prior()
            terms, _ = _terms(self, scaled, u)
            optimiser.zero_grad()
            torch.autograd.backward(_total(terms, step - 1).sum())
            optimiser.step()
            average.lerp_(u.detach(), 1 - self.averaging)
            active = kept.active
            if step % LOOK == 0 or step == self.steps:
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


#: Under ``"paper"`` everything at full resolution, the input drawn anew in every step, no regard to
#: folding. Learning rate, number of steps and scale, which the text does not give, are ours (the
#: scale is a tenth of half the size of an image of 256 voxels), and the average is that of later
#: code by the same author. Under ``"fast"`` the defaults: a velocity, a quarter of the resolution.
PRESETS: dict[str, DIP] = {
    "paper": DIP(
        network=PAPER,
        input_mode="resample",
        scale=12.75,
        pool=1,
        squarings=0,
        steps=1_000,
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

    Raises:
        TypeError, ValueError: if ``shape`` is malformed.
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
        self.network = Hourglass(method.network, nodes, d, generator=generator)
        self.register_buffer("noise", NOISE * self._draw())
        # Voxels of the nodes' own grid; along an axis of one voxel there is nowhere to go.
        reach = [method.scale / pool if n > 1 else 0.0 for n in self.shape]
        self.register_buffer("reach", torch.tensor(reach).view(1, d, *(1,) * d))
        with torch.no_grad():
            longest = float(self._field(self.noise, squarings=0).abs().max())
            if longest > START:
                self.network.head.weight.mul_(START / longest)
        # Only now: a pair in company begins with the very weights with which it begins alone.
        self.network.repeat(copies)

    def _draw(self) -> Tensor:
        """Normal numbers for all copies, ``(1, inputs, *padded)``."""
        shape = (1, self.method.network.inputs, *self.network.padded)
        return torch.randn(shape, generator=self.generator)

    def _field(self, z: Tensor, squarings: int) -> Tensor:
        u = self.network(z) * self.reach
        if squarings:
            u = integrate(u, steps=squarings)
        return u if self.method.pool == 1 else upsample_field(u, self.method.pool, self.shape)

    def forward(self) -> Tensor:
        """The next displacement, ``(copies, D, *S)`` in voxels."""
        z = self.noise
        if self.method.input_mode == "fixed+noise":
            z = z + ADDED * self._draw().to(z)
        elif self.method.input_mode == "resample":
            z = NOISE * self._draw().to(z)
        return self._field(z, self.method.squarings)


class _Kept:
    """The best displacement so far of every pair, and which pairs still look for a better one."""

    @torch.no_grad()
    def __init__(self, method: DIP, pair: Pair) -> None:
        self.method, self.pair = method, pair
        self.field = torch.zeros_like(pair.field)
        terms, self.covered = _terms(method, pair, self.field)
        self.loss = _total(terms, 0)
        # What is kept is compared with what it was when it last fell visibly.
        self.visible = method.tolerance * self.loss.abs().clamp(min=1e-6)
        self.reference, self.since = self.loss, torch.zeros_like(self.loss)
        self.active = torch.ones_like(self.loss, dtype=torch.bool)
        self.steps = torch.zeros_like(self.loss)
        self.notes: tuple[str, ...] = ()

    @torch.no_grad()
    def look(self, u: Tensor, step: int) -> None:
        """Keep a displacement where it is better, and stop the pairs that wait in vain."""
        terms, covered = _terms(self.method, self.pair, u)
        loss = _total(terms, step)
        better = (loss < self.loss) & self.active & (covered >= COVERED * self.covered)
        if self.method.folding is not None:
            better &= folding(u) <= self.method.folding
        self.loss = torch.where(better, loss, self.loss)
        self.field = torch.where(better.view(-1, *(1,) * (u.ndim - 1)), u, self.field)
        self.steps = self.steps.masked_fill(better, step)
        fell = self.loss < self.reference - self.visible
        self.reference = torch.where(fell, self.loss, self.reference)
        self.since = self.since.masked_fill(fell, step)
        if self.method.patience is not None:
            self.active = self.active & (step - self.since < self.method.patience)
        kept = ", ".join(f"{n:.0f}" for n in self.steps.tolist())
        still = " (0: no displacement)" if not bool(self.steps.all()) else ""
        self.notes = (f"kept the average of the fields up to step {kept} of {step}{still}",)


def _terms(method: DIP, pair: Pair, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Terms of the loss of a displacement, ``(B,)`` each, and how much counts, ``(B,)``."""
    whole = dataclasses.replace(pair, field=_after(pair, u)).whole_field()
    mask = torch.ones_like(pair.moving[:, :1]) if pair.moving_mask is None else pair.moving_mask
    with torch.no_grad():
        weight = warp(mask, whole, padding="zeros")
        if pair.fixed_mask is not None:
            weight = weight * pair.fixed_mask
    warped = warp(pair.moving, whole)
    terms = {"similarity": method.similarity(warped, pair.fixed, weight=weight, reduction="none")}
    if method.regularity_weight > 0:
        spacing = pair.fixed_affine[:-1, :-1].norm(dim=0).tolist()
        rough = method.regularity(u, spacing=spacing, reduction="none")
        terms["regularity"] = method.regularity_weight * rough
    return terms, weight.flatten(1).sum(1)


def _total(terms: Mapping[str, Tensor], step: int) -> Tensor:
    """The loss ``(B,)``; raises ``FloatingPointError`` if it is not finite."""
    loss = torch.stack(list(terms.values())).sum(0)
    if not bool(loss.isfinite().all()):
        raise FloatingPointError(f"loss: {loss.tolist()} at step {step}")
    return loss


def _after(pair: Pair, u: Tensor) -> Tensor:
    """U on top of what was there before."""
    return compose(pair.field, u) if bool(pair.field.any()) else u


def _transform(pair: Pair, u: Tensor) -> tuple[Tensor, Tensor]:
    return pair.affine, _after(pair, u)


def _scaled(pair: Pair) -> Pair:
    """Every channel of both images between 0 and 1 by their common range, and 0 if it is constant.

    What a mask leaves out has no say, and is clamped.
    """
    lows, highs = [], []
    for image, mask in ((pair.moving, pair.moving_mask), (pair.fixed, pair.fixed_mask)):
        absent = torch.zeros_like(image[:, :1]) > 0 if mask is None else mask <= 0
        lows.append(image.masked_fill(absent, math.inf).flatten(2).amin(2))
        highs.append(image.masked_fill(absent, -math.inf).flatten(2).amax(2))
    low, high = torch.minimum(*lows), torch.maximum(*highs)
    # Interpolating a constant gives roundings, which are no contrast.
    rounding = 8 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    extent = (high - low).masked_fill(high - low <= rounding, math.inf)
    view = (*low.shape, *(1,) * (pair.fixed.ndim - 2))
    moving, fixed = (
        ((x - low.view(view)) / extent.view(view)).clamp(0, 1) for x in (pair.moving, pair.fixed)
    )
    return dataclasses.replace(pair, moving=moving, fixed=fixed)
