"""Networks of the tables: MONAI's U-Net beside the library's own, in files and out of them.

Nothing but torch, numpy, safetensors and the library is imported, and MONAI for its own network.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from reglib.methods import fcn, georeg
from reglib.weights import load_weights, save_weights

#: Sizes that MONAI's U-Net takes are multiples of this.
MULTIPLE = 16


class UNet(nn.Module):
    """MONAI's VoxelMorph, with the channels of its documentation unless others are given.

    Images of other sizes than it takes have 0 added at their ends, and the field is cut there.

    Args:
        dimensions: 2 or 3 spatial axes.
        integration: of the velocity at half resolution, squarings; 0 makes its output the
            displacement.
        near_identity: start with a field near 0; False leaves MONAI's first weights.
        channels: of the U-Net, two a level, finest first; ``None`` for those of the documentation,
            of three levels.
    """

    def __init__(
        self,
        dimensions: int = 3,
        integration: int = 7,
        *,
        near_identity: bool = False,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        from monai.networks.nets import VoxelMorph, VoxelMorphUNet

        backbone = channels and VoxelMorphUNet(dimensions, 2, 32, channels, (16, 16))
        self.voxelmorph = VoxelMorph(backbone, integration, spatial_dims=dimensions)
        if near_identity:
            *_, last = (
                m for m in self.voxelmorph.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)
            )
            nn.init.normal_(last.weight, std=1e-5)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
        self.settings: dict[str, Any] = {"dimensions": dimensions, "integration": integration}
        if channels:
            self.settings["channels"] = list(channels)
        self.card: dict[str, Any] = {
            "input": {"channels": 1, "range": [0.0, 1.0], "size_multiple": MULTIPLE}
        }

    def forward(self, moving: Tensor, fixed: Tensor) -> fcn.Output:
        """The field, as the only level of an output that the objective of FCN understands."""
        shape = moving.shape[2:]
        more = [x for n in reversed(shape) for x in (0, -n % MULTIPLE)]
        field = self.voxelmorph(functional.pad(moving, more), functional.pad(fixed, more))[1]
        field = field[(..., *(slice(n) for n in shape))]
        return fcn.Output(field, (fcn.Level(1, field),))


AnyNetwork = georeg.GeoReg | fcn.FCN | fcn.ComposedFCN | UNet


def save(network: AnyNetwork, path: Path, card: Mapping[str, Any]) -> None:
    """Write weights and settings as one file, with what else the card says."""
    if isinstance(network, UNet):
        own = {"method": "monai", "settings": network.settings}
        save_weights(network, path, network.card | dict(card) | own)
    else:
        (georeg if isinstance(network, georeg.GeoReg) else fcn).save(network, path, card=card)


@functools.cache
def trained(path: str) -> AnyNetwork:
    """A network from its file, in evaluation mode."""
    state, card = load_weights(path)
    if card["method"] == "georeg":
        return georeg.load(path)
    if card["method"] != "monai":
        return fcn.load(path)
    network = UNet(**card.get("settings", {}))  # older files have none
    network.load_state_dict(state)
    network.card = card
    return network.eval()
