"""FCN: one network that predicts the field at three resolutions, all of them supervised.

Li and Fan, "Non-rigid image registration using fully convolutional networks with deep
self-supervision", arXiv:1709.00799. The two images are the channels of one; convolutions and
poolings make features of them, deconvolutions bring these back to full size, and at each of three
resolutions a regression layer predicts the displacement. At each the warped image is compared with
the fixed one. Written for 2-D and 3-D alike.

No code of the paper was released. What its text leaves open, or contradicts, is settled like this:

- Convolutions have stride 1: with the stride of 2 that the text gives to all of them, two
  deconvolutions cannot bring the field back to the size of the images.
- Pooling is by the maximum. The fourth convolution, with 64 kernels, follows the first
  deconvolution. There are no skip connections.
- The loss weights 1, 0.6 and 0.3 are those of the full, the half and the quarter resolution. The
  images of a resolution are averages over cells, the correlation is that of the whole image, and
  the corner of the total variation is rounded.
- Displacements are in voxels of their own resolution. The regression layers start with weights
  close to 0, and so the network close to the identity.

A pooling of three voxels with stride 2 is centred on voxel 2 i of the finer grid, and so is the
deconvolution that undoes it; the nodes of the fields are at 2 i + 1/2 (see
:func:`reglib.geometry.smoothing.pool`). The layers have to learn this half voxel.

``PRESETS`` has the paper's network and the two that it compares it with. :class:`ComposedFCN` is
ours: the same three resolutions and the same loss, but each resolution goes on from what the
coarser ones have found, by a diffeomorphism. What was changed, and why, is said there.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reglib.checks import check_choice, check_numbers, check_positive_int
from reglib.geometry.fields import compose, integrate, upsample_field
from reglib.geometry.grid import no_autocast
from reglib.geometry.sampling import warp
from reglib.geometry.smoothing import pool
from reglib.methods.pair import Iterate, Pair
from reglib.methods.transmorph import check_images, convolve, upsample_features
from reglib.objectives.regularity import total_variation
from reglib.objectives.similarity import ncc
from reglib.weights import load_weights, save_weights

#: Of the resolutions, finest first.
LEVEL_WEIGHTS = (1.0, 0.6, 0.3)

#: The network trained by ``data_scripts/fcn_hippocampus.py``, relative to this folder.
WEIGHTS = "weights/fcn_hippocampus.safetensors"


class Conv3d(nn.Conv3d):
    """A convolution with a kernel of 3, of single small volumes too in a short time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """As :func:`reglib.methods.transmorph.convolve`."""
        return convolve(x, self.weight, self.bias)


_CONV = {2: nn.Conv2d, 3: Conv3d}
_DECONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_NORM: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
}


def _check_images_of(settings: Settings | ComposedSettings) -> None:
    """Raise unless dimensions and inputs of a network are what they should be."""
    if settings.dimensions not in (2, 3):
        raise ValueError(f"dimensions: wanted 2 or 3, got {settings.dimensions!r}")
    check_positive_int(settings.inputs, "inputs")


def _widths(values: Sequence[int], name: str) -> tuple[int, ...]:
    """Return ``values`` as a tuple; raise unless they are two or more integers of at least 1."""
    if not isinstance(values, Sequence) or len(values) < 2:
        raise ValueError(f"{name}: wanted two integers or more, got {values!r}")
    for value in values:
        check_positive_int(value, name)
    return tuple(int(value) for value in values)


# --- The paper's network ----------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What an :class:`FCN` is made of. The defaults are the paper's.

    Attributes:
        dimensions: 2 or 3 spatial axes.
        inputs: channels of each image.
        channels: of the convolutions, finest first; after each but the last is a pooling.
        norm: ``"batch"`` or ``"instance"``, after every convolution and deconvolution.
        max_pooling: ``False`` leaves out the poolings, and then there must be no ``decoder``.
        decoder: ``False`` ends with the field of the last convolution, interpolated to full size.

    Raises:
        TypeError, ValueError: if the settings do not fit together.
    """

    dimensions: int = 3
    inputs: int = 1
    channels: Sequence[int] = (32, 64, 128)
    norm: str = "batch"
    max_pooling: bool = True
    decoder: bool = True

    def __post_init__(self) -> None:
        _check_images_of(self)
        # A tuple again after a round trip through JSON.
        object.__setattr__(self, "channels", _widths(self.channels, "channels"))
        check_choice(self.norm, "norm", tuple(_NORM))
        if self.decoder and not self.max_pooling:
            raise ValueError("decoder: wanted False without max_pooling, which it undoes, got True")

    @property
    def size_multiple(self) -> int:
        """Every spatial size must be a multiple of this."""
        return 2 ** (len(self.channels) - 1) if self.max_pooling else 1


#: The networks of the paper. ``paper`` is what it proposes, with three resolutions. Of the two it
#: is compared with, ``no pooling`` keeps the full resolution throughout, and ``interpolated`` makes
#: the field of the coarsest one as large as the images.
PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    "no pooling": Settings(max_pooling=False, decoder=False),
    "interpolated": Settings(decoder=False),
}


class Level(NamedTuple):
    """The field of one resolution."""

    factor: int  #: voxels of the images per voxel of this resolution, along each axis
    field: Tensor  #: displacement ``(B, D, *S / factor)``, in voxels of this resolution


class Output(NamedTuple):
    """What a network returns."""

    field: Tensor  #: displacement ``(B, D, *S)`` on the fixed grid, in voxels
    levels: tuple[Level, ...]  #: finest first; the field of the first is ``field``


def _at_full_resolution(levels: Sequence[Level], shape: Sequence[int]) -> Output:
    """The output, of levels coarsest first, of which the last is carried to the images' grid."""
    factor, field = levels[-1]
    if factor > 1:
        field = upsample_field(field, factor, shape)
    return Output(field, (Level(1, field), *reversed(levels[:-1])))


def _block(
    dimensions: int, inputs: int, outputs: int, norm: str, *, transposed: bool = False
) -> nn.Sequential:
    """A convolution, or a deconvolution that doubles the size, a normalisation, and a ReLU."""
    layer: nn.Module
    # The normalisation takes the mean off: a bias would have no effect.
    if transposed:
        deconv = _DECONV[dimensions]
        layer = deconv(inputs, outputs, 3, 2, padding=1, output_padding=1, bias=False)
    else:
        layer = _CONV[dimensions](inputs, outputs, 3, padding=1, bias=False)
    normalise = _NORM[norm][dimensions](outputs, affine=True)
    return nn.Sequential(layer, normalise, nn.ReLU(inplace=True))


class Regression(nn.Module):
    """The convolution that predicts a displacement, or a velocity: about 0 at first."""

    def __init__(self, dimensions: int, inputs: int) -> None:
        super().__init__()
        self.conv = _CONV[dimensions](inputs, dimensions, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=1e-6)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, inputs, *T)`` -> vectors ``(B, D, *T)``, in the precision of weights."""
        with no_autocast(x):
            return self.conv(x.to(self.conv.weight.dtype))


class FCN(nn.Module):
    """Fully convolutional registration network with a field at every resolution.

    BatchNorm learns from batches of many pairs, whose statistics it keeps for evaluation; with
    small ones those are poor. InstanceNorm treats every pair alone, in training as in evaluation,
    but takes the mean off every feature map, and with it what could tell a translation.

    Args:
        settings: what it is made of, such as one of ``PRESETS``.
    """

    def __init__(self, settings: Settings = PRESETS["paper"]) -> None:
        super().__init__()
        self.settings = settings
        #: What a file of weights says about them; of a new network, what it takes.
        self.card: dict[str, Any] = {"input": input_contract(settings)}
        d, norm, widths = settings.dimensions, settings.norm, settings.channels
        self.convs = nn.ModuleList(
            _block(d, a, b, norm) for a, b in itertools.pairwise((2 * settings.inputs, *widths))
        )
        self.shrink = _MAX_POOL[d](3, 2, padding=1) if settings.max_pooling else nn.Identity()
        # In the order of the resolutions, finest first; the coarsest has a regression only.
        self.deconvs, self.mixes = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in itertools.pairwise(widths) if settings.decoder else ():
            # The paper has no convolution at full resolution.
            mixed = len(self.mixes) > 0
            self.deconvs.append(_block(d, coarse, fine, norm, transposed=True))
            self.mixes.append(_block(d, fine, fine, norm) if mixed else nn.Identity())
        predicting = widths if settings.decoder else widths[-1:]
        self.regressions = nn.ModuleList(Regression(d, width) for width in predicting)

    def forward(self, moving: Tensor, fixed: Tensor) -> Output:
        """Register each moving image to its fixed one.

        Args:
            moving: ``(B, inputs, *S)``, floating point, sizes multiples of
                ``settings.size_multiple``.
            fixed: of the same shape.

        Returns:
            The field on the fixed grid, and the fields of all resolutions.

        Raises:
            TypeError, ValueError: if an image is not what the network can take.
        """
        _check_pair(moving, fixed, self.settings, next(self.parameters()))
        x = torch.cat([moving, fixed], 1)
        for number, conv in enumerate(self.convs):
            x = conv(self.shrink(x) if number else x)
        levels = [Level(self.settings.size_multiple, self.regressions[-1](x))]
        for level in reversed(range(len(self.deconvs))):
            x = self.mixes[level](self.deconvs[level](x))
            levels.append(Level(2**level, self.regressions[level](x)))
        return _at_full_resolution(levels, fixed.shape[2:])


def _check_pair(
    moving: Tensor, fixed: Tensor, settings: Settings | ComposedSettings, weight: Tensor
) -> None:
    """Raise unless a network of these settings can take the images."""
    multiple = settings.size_multiple
    check_images(
        moving,
        fixed,
        dimensions=settings.dimensions,
        inputs=settings.inputs,
        multiple=multiple,
        weight=weight,
    )
    if all(n == multiple for n in fixed.shape[2:]):
        raise ValueError(
            "moving, fixed: wanted more than one voxel at the coarsest resolution, where each is "
            f"{multiple} voxels a side, got {tuple(fixed.shape[2:])}"
        )


def input_contract(settings: Settings | ComposedSettings) -> dict[str, Any]:
    """What :class:`reglib.methods.network.Network` must bring the images to: ``card["input"]``."""
    return {
        "channels": settings.inputs,
        "range": [0.0, 1.0],
        "size_multiple": settings.size_multiple,
    }


# --- Ours -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComposedSettings:
    """What a :class:`ComposedFCN` is made of.

    Attributes:
        dimensions: 2 or 3 spatial axes.
        inputs: channels of each image.
        channels: of the encoder, finest first; their number is the number of resolutions.
        decoder_channels: of the decoder, as many.
        pool: voxels of the images along each axis of a voxel of the finest resolution.
        squarings: of the integration of a velocity.

    Raises:
        TypeError, ValueError: if the settings do not fit together.
    """

    dimensions: int = 3
    inputs: int = 1
    channels: Sequence[int] = (16, 32, 32)
    decoder_channels: Sequence[int] = (32, 32, 32)
    pool: int = 2
    squarings: int = 5

    def __post_init__(self) -> None:
        _check_images_of(self)
        for name in ("channels", "decoder_channels"):
            object.__setattr__(self, name, _widths(getattr(self, name), name))
        if len(self.decoder_channels) != len(self.channels):
            raise ValueError(
                f"decoder_channels: wanted {len(self.channels)}, one per resolution, "
                f"got {self.decoder_channels}"
            )
        for name in ("pool", "squarings"):
            check_positive_int(getattr(self, name), name)

    @property
    def size_multiple(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(self.pool * 2 ** (len(self.channels) - 1))


class ComposedFCN(nn.Module):
    """Three resolutions that go on from one another, as conventional registration does.

    ``phi = phi_coarse o exp(v_middle) o exp(v_fine)``, each v predicted from features of the fixed
    image and of the moving one *as the coarser resolutions have warped it*. Beside :class:`FCN`:

    - One encoder sees each image alone, so that the moving features can be warped. Features of
      both images together belong to no place of the moving image.
    - A resolution predicts what is left to do, not all over again; the steps are integrated
      velocities, so that their composition does not fold (but for interpolation).
    - Feature maps are averaged and interpolated instead of pooled by the maximum and deconvolved:
      they lie at the nodes of the fields, and there is no checkerboard.
    - The finest resolution is half of that of the images: a field is smoother than what it moves,
      and most of the time goes into the finest grid.
    - InstanceNorm instead of BatchNorm: a pair gives in a batch what it gives alone, and training
      may go on with a single pair.

    Args:
        settings: what it is made of.
    """

    def __init__(self, settings: ComposedSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = ComposedSettings() if settings is None else settings
        #: What a file of weights says about them; of a new network, what it takes.
        self.card: dict[str, Any] = {"input": input_contract(settings)}
        d, widths = settings.dimensions, settings.decoder_channels

        def two(inputs: int, outputs: int) -> nn.Sequential:
            sizes = ((inputs, outputs), (outputs, outputs))
            return nn.Sequential(*(_block(d, a, b, "instance") for a, b in sizes))

        self.encoder = nn.ModuleList(
            two(a, b) for a, b in itertools.pairwise((settings.inputs, *settings.channels))
        )
        self.decoder = nn.ModuleList(
            two(2 * seen + coarser, width)
            for seen, coarser, width in zip(
                settings.channels, (*widths[1:], 0), widths, strict=True
            )
        )
        self.regressions = nn.ModuleList(Regression(d, width) for width in widths)

    def forward(self, moving: Tensor, fixed: Tensor) -> Output:
        """Register each moving image to its fixed one. As :meth:`FCN.forward`.

        The field of each resolution is the composition so far.
        """
        _check_pair(moving, fixed, self.settings, next(self.parameters()))
        factor, squarings = self.settings.pool, self.settings.squarings
        x = pool(torch.cat([moving, fixed]), factor)
        features: list[tuple[Tensor, Tensor]] = []  # (moving, fixed), finest first
        for number, look in enumerate(self.encoder):
            x = look(pool(x, 2) if number else x)
            moving_features, fixed_features = x.chunk(2)
            features.append((moving_features, fixed_features))
        levels: list[Level] = []
        for level in reversed(range(len(features))):
            seen, still = features[level]
            if levels:
                before = upsample_field(levels[-1].field, 2, still.shape[2:])
                x = torch.cat([warp(seen, before), still, upsample_features(x, 2)], 1)
            else:
                x = torch.cat([seen, still], 1)
            x = self.decoder[level](x)
            field = integrate(self.regressions[level](x), steps=squarings)
            if levels:
                field = compose(before, field)
            levels.append(Level(factor * 2**level, field))
        return _at_full_resolution(levels, fixed.shape[2:])


# --- The loss ---------------------------------------------------------------------------------


def objective(
    output: Output,
    moving: Tensor,
    fixed: Tensor,
    *extras: Tensor,
    similarity: Callable[..., Tensor] = ncc,
    regularity: Callable[..., Tensor] = total_variation,
    regularity_weight: float = 0.01,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``sum_l w_l (similarity_l + lambda regularity_l)`` over the resolutions (1 and 2).

    At each resolution both images are averaged over its cells.

    Args:
        output: what the network returned.
        moving: ``(B, C, *S)``.
        fixed: of the same shape.
        extras: whatever else the stream of pairs holds; not used.
        similarity: of (warped, fixed), ``reduction``; lower is better.
        regularity: of (field in voxels of its resolution), ``reduction``; lower is better.
        regularity_weight: lambda.
        level_weights: w, finest first, one per resolution or more; the last ones are left out
            where the network has fewer. ``(1, 0, 0)`` supervises the final field only.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        Terms ``"similarity"`` and ``"regularity"``, each a scalar, or ``(B,)``.

    Raises:
        TypeError, ValueError: if there are not enough weights, or they are no numbers.
    """
    weights = check_numbers(level_weights, "level_weights")
    if len(weights) < len(output.levels):
        raise ValueError(
            f"level_weights: wanted {len(output.levels)}, one per resolution, got {weights}"
        )
    [smoothness] = check_numbers([regularity_weight], "regularity_weight")
    terms: dict[str, list[Tensor]] = {"similarity": [], "regularity": []}
    for (factor, field), weight in zip(output.levels, weights, strict=False):
        warped = warp(pool(moving, factor), field)
        mismatch = similarity(warped, pool(fixed, factor), reduction=reduction)
        terms["similarity"].append(weight * mismatch)
        terms["regularity"].append(weight * smoothness * regularity(field, reduction=reduction))
    return {name: torch.stack(values).sum(0) for name, values in terms.items()}


# --- Training is registration -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Instance:
    """The method that trains a network on the very pairs that are to be registered.

    A copy is trained: the network that is given stays as it is. If it is new, the images alone
    decide ("directly used to register a pair of images"); if it was trained before, it goes on
    from there. The batch is one training set: its pairs share the network and stop together, and a
    pair gives in a batch what it gives alone only by chance. Of each pair the field with its lowest
    loss is kept.

    The copy is in evaluation mode: BatchNorm normalises by the statistics of the training before,
    and in a new network it does not normalise at all. InstanceNorm treats a pair as it was trained.

    Attributes:
        network: new or trained, such as :class:`ComposedFCN`. The images are brought to its
            ``card["input"]``, and the ``field`` of its output back, as by
            :class:`reglib.methods.network.Network`; masks are not used.
        loss: called as ``loss(output, moving, fixed, reduction="none")``, such as
            :func:`objective`; gives terms by name, ``(B,)`` each.
        steps: of Adam.
        lr: learning rate to start from; it falls to 0 along a half cosine.

    Raises:
        TypeError, ValueError: if a setting is malformed.
    """

    network: nn.Module
    loss: Callable[..., Mapping[str, Tensor]] = objective
    steps: int = 100
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module):
            raise TypeError(f"network: wanted a module, got {type(self.network).__name__}")
        if not callable(self.loss):
            raise TypeError(f"loss: wanted a function, got {self.loss!r}")
        check_positive_int(self.steps, "steps")
        if not isinstance(self.lr, Real) or not 0 < self.lr < math.inf:
            raise ValueError(f"lr: wanted a positive number, got {self.lr!r}")

    def __call__(self, pair: Pair) -> Iterator[Iterate]:
        """Train; yields after every step."""
        # Here and below: machines that only train may have no reader of images, which it needs.
        from reglib.methods.network import Network

        network = copy.deepcopy(self.network).eval().requires_grad_()
        contract = Network(network).contract
        moving, fixed, notes = _seen(contract, pair, next(network.parameters()))
        optimiser = torch.optim.Adam(network.parameters(), lr=self.lr)
        best, least = torch.zeros(()), torch.full((len(fixed),), math.inf, device=fixed.device)
        for step in range(self.steps):
            output = network(moving, fixed)
            terms = self.loss(output, moving, fixed, reduction="none")
            loss = torch.stack(list(terms.values())).sum(0)
            value = loss.detach()
            if not bool(value.isfinite().all()):
                raise FloatingPointError(f"loss: {value.tolist()} at step {step}")
            better = (value < least).view(-1, *(1,) * (fixed.ndim - 1))
            best = torch.where(better, output.field.detach(), best)
            least = torch.minimum(value, least)
            for group in optimiser.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            optimiser.zero_grad()
            torch.autograd.backward(loss.mean())
            optimiser.step()
            yield Iterate(
                stage="training on the pair",
                terms={name: term.detach() for name, term in terms.items()},
                active=torch.ones(len(fixed), dtype=torch.bool, device=fixed.device),
                transform=partial(_brought_back, contract, pair, best),
                notes=notes,
            )


def _seen(
    contract: Mapping[str, Any], pair: Pair, weight: Tensor
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The images as a network is given them, in the dtype of its weights, and the notes on that."""
    if "size" in contract:
        raise ValueError(
            f"network: wanted one that takes images of any size, got one for {contract['size']}"
        )
    images: list[Tensor] = []

    def look(moving: Tensor, fixed: Tensor) -> Tensor:
        images.extend((moving.to(weight.dtype), fixed.to(weight.dtype)))
        return fixed.new_zeros(len(fixed), fixed.ndim - 2, *fixed.shape[2:])

    from reglib.methods.network import Network

    [iterate] = Network(look, contract)(pair)
    moving, fixed = images
    return moving, fixed, iterate.notes


def _brought_back(contract: Mapping[str, Any], pair: Pair, field: Tensor) -> tuple[Tensor, Tensor]:
    """The transform, given the field on the network's grid."""
    from reglib.methods.network import Network

    [iterate] = Network(lambda moving, fixed: field, contract)(pair)
    return iterate.transform()


# --- Files ------------------------------------------------------------------------------------


def save(network: FCN | ComposedFCN, path: str | Path, *, card: Mapping[str, object]) -> None:
    """Write weights and settings as one safetensors file.

    A copy in half precision (``copy.deepcopy(network).half()``) makes a file of half the size;
    whoever reads it computes in single precision again.

    Args:
        network: the network.
        path: file to write; an existing one is replaced, and never half-written.
        card: what users of the weights must know (data, intensity range, training), JSON values;
            ``method`` and ``settings`` are added, and ``input`` if it is missing.

    Raises:
        OSError: if the file cannot be written.
    """
    own = {"method": _METHODS[type(network)], "settings": asdict(network.settings)}
    save_weights(network, path, network.card | dict(card) | own)


def load(path: str | Path) -> FCN | ComposedFCN:
    """Read a network written by :func:`save`.

    Args:
        path: a safetensors file.

    Returns:
        The network in evaluation mode and single precision, on the CPU; its ``card`` is everything
        the file says.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file, or does not hold such a network.
    """
    state, card = load_weights(path)
    network: FCN | ComposedFCN
    try:
        if card.get("method") == _METHODS[FCN]:
            network = FCN(Settings(**card["settings"]))
        elif card.get("method") == _METHODS[ComposedFCN]:
            network = ComposedFCN(ComposedSettings(**card["settings"]))
        else:
            raise ValueError(f"wanted weights of method fcn, got {card.get('method')!r}")
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path: wanted an FCN, got {path} ({error})") from error
    network.card = card
    return network.eval()


def load_pretrained() -> FCN | ComposedFCN:
    """The 3-D network trained on hippocampi that travels with the package.

    Returns:
        The network in evaluation mode and single precision, on the CPU; its ``card`` says what it
        was trained on.

    Raises:
        FileNotFoundError: if this package came without its weights.
    """
    weights = resources.files("reglib.methods") / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(
            f"wanted {WEIGHTS} in this package, got a package without it: train a network of your "
            "own ('reglib train fcn') and read it with fcn.load ('--weights' on the command line)"
        )
    with resources.as_file(weights) as path:
        return load(path)


_METHODS: dict[type[nn.Module], str] = {FCN: "fcn", ComposedFCN: "composed fcn"}
