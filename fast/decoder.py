"""The decoder of DeepLabv3+: context on every 16th or 8th pixel, refined with an early map on every 4th.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.1; `refine_by_decoder` in
research/deeplab/model.py. The low-level map is projected to 48 channels, so that it does not outweigh the context; the context
is resized to that map's size, with corners aligned or not (`reference/grid.py`); two atrous separable convolutions of rate 1
read both. Batch norm and ReLU follow every convolution.

    y = separable(separable(concat[resize(context), conv1x1(low_level)]))
"""

import torch
from torch import Tensor, nn

from fast.conv_norm import NormLayer, conv_norm, conv_norm_relu, live_conv
from fast.dense_prediction_cell import SeparableBranch
from fast.fusion import check_traceable, fuses, refuse_script
from fast.kernels import NormedMap, operations_for, value

OUTPUT_STRIDE = 4
LOW_LEVEL_CHANNELS = 48  # after the projection


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
            SeparableBranch(in_channels, channels, (1, 1), norm_layer)
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
