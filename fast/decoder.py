"""The decoder of DeepLabv3+: context on every 16th or 8th pixel, refined with an early map on every 4th.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.1; `refine_by_decoder` in
research/deeplab/model.py. The low-level map is projected to 48 channels, so that it does not outweigh the context; the context
is resized to that map's size; two atrous separable convolutions of rate 1 read both. Batch norm and ReLU follow every
convolution.

    y = separable(separable(concat[resize(context), conv1x1(low_level)]))
"""

import torch
from torch import Tensor, nn

from fast.dense_prediction_cell import ConvNormLayer, SeparableBranch
from fast.kernels import NormedMap, operations_for, value

OUTPUT_STRIDE = 4
LOW_LEVEL_CHANNELS = 48  # after the projection


class Decoder(nn.Module):
    """Context (N, channels, h, w) and a low-level map (N, low_level_channels, H, W) -> (N, channels, H, W), any sizes.

    >>> decoder = Decoder(low_level_channels=144)
    >>> decoder(torch.zeros(2, 256, 9, 9), torch.zeros(2, 144, 33, 33)).shape
    torch.Size([2, 256, 33, 33])
    """

    def __init__(self, low_level_channels: int, *, channels: int = 256, projected_channels: int = LOW_LEVEL_CHANNELS) -> None:
        super().__init__()
        self.low_level_channels, self.channels, self.projected_channels = low_level_channels, channels, projected_channels
        self.projection = ConvNormLayer((projected_channels, low_level_channels, 1, 1))
        self.refinement = nn.ModuleList(
            SeparableBranch(in_channels, channels, (1, 1)) for in_channels in (channels + projected_channels, channels)
        )

    def forward(self, context: Tensor, low_level: Tensor) -> Tensor:
        low = value(operations_for(low_level).pointwise_conv([NormedMap(low_level)], *self.projection.live()))
        resized = operations_for(context).resize(NormedMap(context), (low.shape[2], low.shape[3]))
        x = torch.cat((resized, low), dim=1)  # (N, 256 + 48, H, W)
        for branch in self.refinement:
            x = value(branch(NormedMap(x)))
        return x
