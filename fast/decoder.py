"""The decoder of DeepLabv3+ as a PyTorch module; `reference/decoder.py` defines what it computes."""

from typing import cast

import torch
from torch import Tensor, nn

from fast.conv_norm import NormLayer, conv_norm, conv_norm_relu, conv_weights, live_conv
from fast.dense_prediction_cell import SeparableBranch
from fast.fusion import check_traceable, fuses, refuse_script
from fast.kernels import NormedMap, operations_for, value
from reference.decoder import LOW_LEVEL_CHANNELS, RATE, DecoderWeights


class Decoder(nn.Module):
    """Context (N, channels, h, w) and a low-level map (N, low_level_channels, H, W) -> (N, channels, H, W), any sizes.

    `norm_layer` is that of `DensePredictionCell`.

    >>> decoder = Decoder(low_level_channels=144)
    >>> decoder(torch.zeros(2, 256, 9, 9), torch.zeros(2, 144, 33, 33)).shape
    torch.Size([2, 256, 33, 33])
    """

    def __init__(
        self,
        low_level_channels: int,
        *,
        channels: int = 256,
        projected_channels: int = LOW_LEVEL_CHANNELS,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.low_level_channels, self.channels, self.projected_channels = low_level_channels, channels, projected_channels
        self.projection = conv_norm(low_level_channels, projected_channels, norm_layer)
        self.refinement = nn.ModuleList(
            SeparableBranch(in_channels, channels, RATE, norm_layer)
            for in_channels in (channels + projected_channels, channels)
        )

    __prepare_scriptable__ = refuse_script

    def forward(self, context: Tensor, low_level: Tensor, *, align_corners: bool = True) -> Tensor:
        check_traceable(low_level)
        if fuses(low_level, {"projection": self.projection}):
            low = value(operations_for(low_level).pointwise_conv([NormedMap(low_level)], *live_conv(self.projection)))
        else:
            low = conv_norm_relu(low_level, self.projection)
        resized = operations_for(context).resize(NormedMap(context), (low.shape[2], low.shape[3]), align_corners)
        x = torch.cat((resized, low), dim=1)  # (N, 256 + 48, H, W)
        for branch in self.refinement:
            x = branch(x)
        return x

    def weights(self) -> DecoderWeights[Tensor]:
        """The live parameters and statistics, in the reference's containers."""
        refinement = (cast(SeparableBranch, branch).weights() for branch in self.refinement)
        return DecoderWeights(conv_weights(self.projection), tuple(refinement))
