"""Pretraining of a registration encoder: every stage guesses the field, and all must agree.

Chen et al., MIDL 2025, arXiv:2505.24167, "Pretraining deformable image registration networks with
random images". A light decoder at each stage of an encoder, and one head more on the sum of their
features (the ensemble), each predict a Gaussian of the displacement at every voxel. The loss is
equation 1: the dissimilarity of warped and fixed image and the roughness of the ensemble's field,
and a Kullback-Leibler divergence that pulls stages and ensemble together. Afterwards the decoders
are thrown away and ``transfer`` copies the encoder into a registration network.

The random images are those of :func:`reglib.synth.random_pair`. An encoder is any module that is
called with a moving and a fixed image, ``(B, inputs, *S)`` each, gives a list of feature maps,
coarsest first, and says in its attributes ``dimensions`` and ``inputs`` what it takes, and in
``channels`` and ``strides``, coarsest first, what its maps are (a stride is voxels of the images
per voxel of the map): :class:`reglib.methods.transmorph.Encoder` is one, ``BothImages`` makes
one of an encoder that sees one image at a time, ``georeg_encoder`` and ``fcn_encoder`` make one of
what those networks begin with.

The released code (C) differs from the paper (P) in ways that matter here:

- In P the divergence is that of the stages from the ensemble, KL(ensemble || stage), in C the
  other way round, and C takes for the logarithm of the standard deviation what its sampling takes
  for the logarithm of the variance: ``kl="consistent"`` and ``kl="released"`` of
  ``objective``, each with its own weight.
- C has weight 0.5 for the roughness where the images are 224 voxels a side, P 1 throughout.
- C draws a field for every stage and uses the ensemble's only; only that is drawn here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reglib.checks import check_choice, check_finite, check_image, check_positive_int
from reglib.geometry.fields import upsample_field
from reglib.geometry.grid import no_autocast
from reglib.geometry.sampling import warp
from reglib.methods.georeg import GeoReg
from reglib.methods.transmorph import (
    Encoder,
    check_images,
    convolve,
    load_encoder,
    upsample_features,
)
from reglib.objectives.regularity import diffusion
from reglib.objectives.similarity import lncc, soft_dice

if TYPE_CHECKING:  # it can read files, for which a machine that only trains may lack packages
    from reglib.methods.fcn import FCN

#: The forms of the divergence, and the weight eta of each. With both, at the initial variance, a
#: stage that is 1 voxel of the decoders' grid away from the ensemble costs about 23.
KL_WEIGHTS = {"consistent": 2e-3, "released": 1e-7}

#: Weighted by a Gaussian within 9 voxels, as in the released code's pretraining.
gaussian_lncc = functools.partial(lncc, window=9, sigma=2.0)


class Gaussian(NamedTuple):
    """A distribution of displacements: independent at every voxel and for every component.

    Decoders work on a coarse grid, where ``factor`` voxels of the images make one of theirs; the
    properties and ``sample`` are on the grid of the images and in its voxels.
    """

    mean: Tensor  #: displacement ``(B, D, *S / factor)`` on the decoders' grid, in its voxels
    log_variance: Tensor  #: natural logarithm, of the same shape, in voxels squared of that grid
    factor: int  #: voxels of the images per voxel of the decoders' grid, along each axis

    @property
    def field(self) -> Tensor:
        """The mean, ``(B, D, *S)`` in voxels."""
        return self._carry(self.mean)

    @property
    def variance(self) -> Tensor:
        """Of every component, ``(B, D, *S)`` in voxels squared; interpolated between the nodes."""
        variance = upsample_features(self.log_variance.exp(), self.factor)
        return self.factor**2 * variance

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One field ``(B, D, *S)`` in voxels, drawn on the decoders' grid and interpolated.

        Args:
            generator: source of randomness; ``None`` for torch's own.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self._carry(self.mean + (0.5 * self.log_variance).exp() * noise)

    def _carry(self, field: Tensor) -> Tensor:
        shape = [self.factor * n for n in field.shape[2:]]
        return upsample_field(field, self.factor, shape)


class Output(NamedTuple):
    """What the pretraining network returns."""

    field: Tensor  #: of the ensemble ``(B, D, *S)``, in voxels; drawn in training, else its mean
    ensemble: Gaussian  #: from the sum of all decoders' features
    stages: tuple[Gaussian, ...]  #: one per stage of the encoder, coarsest first


class LightDecoder(nn.Module):
    """Two convolutions with InstanceNorm and LeakyReLU, and an interpolation in between."""

    def __init__(self, dimensions: int, inputs: int, features: int, factor: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.factor = factor
        self.first = conv(inputs, features, 3, padding=1)
        self.second = conv(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, inputs, *T)`` -> ``(B, features, *factor * T)``."""
        x = convolve(x, self.first.weight, self.first.bias)
        x = F.leaky_relu(F.instance_norm(x), 0.01)
        if self.factor > 1:
            x = upsample_features(x, self.factor)
        x = convolve(x, self.second.weight, self.second.bias)
        return F.leaky_relu(F.instance_norm(x), 0.01)


class GaussianHead(nn.Module):
    """Mean and log-variance by one convolution each; at first about 0 and -10 everywhere."""

    def __init__(self, dimensions: int, features: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.mean = conv(features, dimensions, 3, padding=1)
        self.log_variance = conv(features, dimensions, 3, padding=1)
        for head, std, bias in ((self.mean, 1e-5, 0.0), (self.log_variance, 1e-10, -10.0)):
            nn.init.normal_(head.weight, std=std)
            assert head.bias is not None
            nn.init.constant_(head.bias, bias)

    def forward(self, x: Tensor, factor: int) -> Gaussian:
        """Features ``(B, features, *T)`` -> the Gaussian on that grid."""
        with no_autocast(x):  # fields keep their precision
            x = x.to(self.mean.weight.dtype)
            mean = convolve(x, self.mean.weight, self.mean.bias)
            log_variance = convolve(x, self.log_variance.weight, self.log_variance.bias)
            return Gaussian(mean, log_variance, factor)


class PretrainingNetwork(nn.Module):
    """An encoder with a light decoder and a Gaussian head at every stage.

    The decoders end at half the stride of the encoder's finest map, but not below one voxel. In
    training the field is drawn, from the attribute ``generator`` (``None``: torch's own); in
    evaluation it is the mean. Begin with a learning rate that rises over a tenth of the steps or so
    (``schedule`` of :func:`reglib.training.fit`): a Swin encoder may learn nothing otherwise.

    Args:
        encoder: as described at the top of this module. It is used, not copied.
        features: channels of the decoders.

    Raises:
        TypeError: if the encoder does not say what it takes and gives.
        ValueError: if its strides do not belong together.
    """

    def __init__(self, encoder: nn.Module, *, features: int = 16) -> None:
        super().__init__()
        missing = [
            a for a in ("dimensions", "inputs", "channels", "strides") if not hasattr(encoder, a)
        ]
        if not isinstance(encoder, nn.Module) or missing:
            raise TypeError(
                f"encoder: wanted a module with dimensions, inputs, channels and strides, "
                f"got {type(encoder).__name__} without {', '.join(missing)}"
            )
        check_positive_int(features, "features")
        about: Any = encoder
        d, strides = int(about.dimensions), tuple(about.strides)
        self.factor = max(strides[-1] // 2, 1)
        if len(strides) != len(about.channels) or any(
            coarse % fine for coarse, fine in itertools.pairwise((*strides, self.factor))
        ):
            raise ValueError(
                f"encoder: wanted one stride per map, coarsest first, each a multiple of the next, "
                f"got strides {strides} for channels {tuple(about.channels)}"
            )
        self.dimensions, self.inputs, self.size_multiple = d, int(about.inputs), strides[0]
        #: What :class:`reglib.methods.network.Network` must bring the images to.
        self.card: dict[str, Any] = {
            "input": {
                "channels": self.inputs,
                "range": [0.0, 1.0],
                "size_multiple": self.size_multiple,
            }
        }
        self.generator: torch.Generator | None = None
        self.encoder = encoder
        self.decoders = nn.ModuleList(
            LightDecoder(d, c, features, s // self.factor)
            for c, s in zip(about.channels, strides, strict=True)
        )
        self.heads = nn.ModuleList(GaussianHead(d, features) for _ in strides)
        self.ensemble_head = GaussianHead(d, features)

    def forward(self, moving: Tensor, fixed: Tensor) -> Output:
        """Register each moving image to its fixed one.

        Args:
            moving: ``(B, inputs, *S)``, floating point, sizes multiples of ``size_multiple``, two
                voxels or more of the coarsest map.
            fixed: of the same shape.

        Returns:
            The ensemble's field, and the Gaussians of the ensemble and of every stage.

        Raises:
            TypeError, ValueError: if an image is not what the network can take.
        """
        check_images(
            moving,
            fixed,
            dimensions=self.dimensions,
            inputs=self.inputs,
            multiple=self.size_multiple,
            weight=self.ensemble_head.mean.weight,
        )
        if all(n == self.size_multiple for n in moving.shape[2:]):
            raise ValueError(
                f"moving: wanted more than one voxel in the coarsest map, that is, sizes of "
                f"{2 * self.size_multiple} along an axis or more, got {tuple(moving.shape[2:])}"
            )
        maps = self.encoder(moving, fixed)
        features = [decode(x) for decode, x in zip(self.decoders, maps, strict=True)]
        stages = [head(x, self.factor) for head, x in zip(self.heads, features, strict=True)]
        ensemble = self.ensemble_head(torch.stack(features).sum(0), self.factor)
        field = ensemble.sample(self.generator) if self.training else ensemble.field
        return Output(field, ensemble, tuple(stages))


class BothImages(nn.Module):
    """An encoder of pairs from one that sees an image at a time: both maps, concatenated.

    Args:
        encoder: called with ``(B, inputs, *S)``; gives a list of feature maps, finest first.
        dimensions: spatial axes.
        inputs: channels of an image.
        channels: of the encoder's maps, finest first.
        strides: voxels of the image per voxel of each map, finest first.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        dimensions: int,
        inputs: int,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.encoder, self.dimensions, self.inputs = encoder, dimensions, inputs
        self.channels = tuple(2 * c for c in reversed(channels))
        self.strides = tuple(reversed(strides))

    def forward(self, moving: Tensor, fixed: Tensor) -> list[Tensor]:
        """Images ``(B, inputs, *S)`` -> maps of both, coarsest first."""
        maps = self.encoder(torch.cat([moving, fixed]))
        return [torch.cat(x.chunk(2), 1) for x in reversed(maps)]


def georeg_encoder(network: GeoReg) -> BothImages:
    """The encoder of a GeoReg network, for pretraining. It is used, not copied."""
    settings: dict[str, Any] = network.settings
    channels = tuple(settings["channels"])
    return BothImages(
        network.encoder,
        dimensions=network.dimensions,
        inputs=network.inputs,
        channels=channels,
        strides=tuple(2**level for level in range(len(channels))),
    )


class StackedImages(nn.Module):
    """The convolutions of an FCN with their poolings: both images are the channels of one."""

    def __init__(self, network: FCN) -> None:
        super().__init__()
        settings = network.settings
        step = 2 if settings.max_pooling else 1
        self.encoder, self.shrink = network.convs, network.shrink
        self.dimensions, self.inputs = settings.dimensions, settings.inputs
        #: Of the feature maps, coarsest first.
        self.channels = tuple(reversed(settings.channels))
        #: Voxels of the images per voxel of a feature map, coarsest first.
        self.strides = tuple(step**level for level in reversed(range(len(self.channels))))

    def forward(self, moving: Tensor, fixed: Tensor) -> list[Tensor]:
        """Images ``(B, inputs, *S)`` -> maps ``(B, channels[k], *S / strides[k])``."""
        maps = [torch.cat([moving, fixed], 1)]
        for number, look in enumerate(self.encoder):
            maps.append(look(self.shrink(maps[-1]) if number else maps[-1]))
        return maps[:0:-1]


def fcn_encoder(network: FCN) -> StackedImages:
    """The convolutions of an FCN before its deconvolutions, for pretraining. Used, not copied."""
    return StackedImages(network)


# --- The loss ---------------------------------------------------------------------------------


def kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q), averaged over voxels, components and the batch.

    ``(log s_q - log s_p + (s_p + (m_p - m_q)^2) / s_q - 1) / 2`` with means m and variances s. It
    does not depend on the unit of length.

    Args:
        p: on the same grid as ``q``.
        q: from which p is to differ little.

    Returns:
        A scalar, 0 if both are equal.
    """
    log_ratio = q.log_variance - p.log_variance
    distance = (p.mean - q.mean).square() * (-q.log_variance).exp()
    # (e^x - 1) - x with x = -log_ratio: expm1 keeps the digits where p and q are almost equal.
    return 0.5 * (torch.expm1(-log_ratio) + log_ratio + distance).mean()


def released_kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """What the released code computes: KL(p || q) as if l were the logarithm of the deviation.

    With the log-variances l, ``l_q - l_p + (exp(2 l_p) + (m_p - m_q)^2) / (2 exp(2 l_q)) - 1 / 2``.
    It depends on the unit of length: here that is a voxel of the decoders' grid, as there.

    Args:
        p: on the same grid as ``q``.
        q: from which p is to differ little.

    Returns:
        A scalar, 0 if both are equal.
    """
    doubled = (x._replace(log_variance=2 * x.log_variance) for x in (p, q))
    return kl_divergence(*doubled)


def _divergence(output: Output, kl: str | None, weight: float | None) -> dict[str, Tensor]:
    """The last term of equation 1, averaged over the stages; nothing if ``kl`` is ``None``."""
    if kl is None:
        return {}
    check_choice(kl, "kl", tuple(KL_WEIGHTS))
    eta = KL_WEIGHTS[kl] if weight is None else weight
    if kl == "consistent":
        parts = [kl_divergence(output.ensemble, stage) for stage in output.stages]
    else:
        parts = [released_kl_divergence(stage, output.ensemble) for stage in output.stages]
    return {"kl": eta * torch.stack(parts).mean()}


def objective(
    output: Output,
    moving: Tensor,
    fixed: Tensor,
    *extras: Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor] = gaussian_lncc,
    regularity_weight: float = 1.0,
    kl: str | None = "consistent",
    kl_weight: float | None = None,
) -> dict[str, Tensor]:
    """Equation 1: ``similarity + lambda diffusion + eta KL``.

    Args:
        output: of the network.
        moving: ``(B, C, *S)``.
        fixed: ``(B, C, *S)``.
        extras: whatever else the stream of pairs holds; not used.
        similarity: dissimilarity of warped and fixed image.
        regularity_weight: lambda, for the ensemble's field in voxels.
        kl: ``"consistent"``, the paper's KL(ensemble || stage) of variances; ``"released"``, the
            released code's form; ``None`` for no such term.
        kl_weight: eta; ``None`` for ``KL_WEIGHTS``.

    Returns:
        Terms ``"similarity"``, ``"regularity"`` and, unless ``kl`` is ``None``, ``"kl"``.

    Raises:
        ValueError: if ``kl`` is none of these.
    """
    return {
        "similarity": similarity(warp(moving, output.field), fixed),
        "regularity": regularity_weight * diffusion(output.field),
        **_divergence(output, kl, kl_weight),
    }


def dice_objective(
    output: Output,
    moving: Tensor,
    fixed: Tensor,
    moving_labels: Tensor,
    fixed_labels: Tensor,
    *extras: Tensor,
    count: int = 16,
    regularity_weight: float = 1.0,
    kl: str | None = "consistent",
    kl_weight: float | None = None,
) -> dict[str, Tensor]:
    """Equation 1 with the soft Dice of the labels in place of the images' similarity.

    The labels' one-hot maps are warped linearly; a label that is in neither map costs nothing.

    Args:
        output: of the network.
        moving: not used.
        fixed: not used.
        moving_labels: ``(B, 1, *S)``, whole numbers from 0 to ``count - 1``.
        fixed_labels: likewise.
        extras: whatever else the stream of pairs holds; not used.
        count: number of labels.
        regularity_weight: as in ``objective``.
        kl: as in ``objective``.
        kl_weight: as in ``objective``.

    Returns:
        Terms ``"similarity"``, ``"regularity"`` and, unless ``kl`` is ``None``, ``"kl"``.

    Raises:
        TypeError, ValueError: if the labels are not as described, or ``kl`` is unknown.
    """
    check_positive_int(count, "count")
    shape = (len(output.field), 1, *output.field.shape[2:])
    maps = []
    for name, labels in (("moving_labels", moving_labels), ("fixed_labels", fixed_labels)):
        check_image(labels, name, floating=False)
        if labels.shape != shape:
            raise ValueError(f"{name}: wanted shape {shape}, got {tuple(labels.shape)}")
        low, high = (float(x) for x in labels.aminmax())
        if low < 0 or high >= count or bool((labels != labels.long()).any()):
            raise ValueError(
                f"{name}: wanted whole numbers from 0 to {count - 1}, got some from {low:g} to "
                f"{high:g}"
            )
        one_hot = F.one_hot(labels.squeeze(1).long(), count).movedim(-1, 1)
        maps.append(one_hot.to(output.field.dtype))
    return {
        "similarity": soft_dice(warp(maps[0], output.field), maps[1]),
        "regularity": regularity_weight * diffusion(output.field),
        **_divergence(output, kl, kl_weight),
    }


# --- What remains -----------------------------------------------------------------------------


@torch.no_grad()
def transfer(pretrained: nn.Module, network: nn.Module) -> list[str]:
    """Copy the weights of a pretrained encoder into a network; all of them, and nothing else.

    Args:
        pretrained: a ``PretrainingNetwork``, or an encoder.
        network: has an ``encoder`` of the same settings, or is an FCN, whose encoder are its
            ``convs``. Its other weights stay as they are, and all of them can be trained.

    Returns:
        The names of the tensors of ``network`` that were written.

    Raises:
        ValueError: if the encoders do not have the same tensors, one holds NaN or infinity, or a
            tensor of the network's encoder is also part of something else. Nothing is written then.
    """
    given = pretrained.encoder if isinstance(pretrained, PretrainingNetwork) else pretrained
    if isinstance(given, BothImages | StackedImages):
        given = given.encoder
    part = "encoder" if hasattr(network, "encoder") else "convs"
    wanted = getattr(network, part, None)
    if not isinstance(wanted, nn.Module):
        raise ValueError(
            f"network: wanted a module with an encoder, got {type(network).__name__} without"
        )
    new, old = given.state_dict(), wanted.state_dict()
    differing = sorted(
        name
        for name in new.keys() | old.keys()
        if name not in new or name not in old or new[name].shape != old[name].shape
    )
    if differing or not new:
        raise ValueError(
            f"network: wanted an encoder with the tensors of the pretrained one, got "
            f"{len(differing)} that are missing, further or of another shape "
            f"({', '.join(differing[:3])}{' ...' if len(differing) > 3 else ''})"
        )
    for name, tensor in new.items():
        check_finite(tensor, f"pretrained's {name}")
    written = {f"{part}.{name}" for name in new}
    own = {tensor.data_ptr() for tensor in old.values() if tensor.numel()}
    shared = [
        name
        for name, tensor in network.state_dict().items()
        if name not in written and tensor.data_ptr() in own
    ]
    if shared:
        raise ValueError(
            f"network: wanted an encoder that shares no tensor with the rest, got {shared}"
        )
    wanted.load_state_dict(new)
    return sorted(written)


def load_pretrained(name: str = "random-shapes-tiny") -> Encoder:
    """An encoder of TransMorph that learned from random shapes, for ``transfer``.

    Args:
        name: of :func:`reglib.data.assets.available`; ``"random-shapes-tiny"`` (the preset
            ``"tiny"``, for voxels of 4 mm or so) travels with the package.

    Returns:
        The encoder in evaluation mode and single precision, on the CPU.

    Raises:
        ValueError: if there are no such weights.
    """
    from reglib.data.assets import fetch

    path = fetch(name) / "encoder.safetensors"
    if not path.is_file():
        raise ValueError(f"name: wanted weights of an encoder, got the data set {name!r}")
    return load_encoder(path)
