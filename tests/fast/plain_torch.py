"""What tests need besides the plain network of `bench/plain_torch.py`: it on given weights, and a plain decoder."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from bench.plain_torch import ConvNormReLU, PlainBranch, PlainCell
from reference.atrous_separable_conv import SeparableConv
from reference.cell import AtrousSeparableConv, Cell
from reference.decoder import DecoderWeights
from reference.dense_prediction_cell import BranchOptions, CellWeights


def plain_cell(features: Tensor, weights: CellWeights[Tensor], cell: Cell, options: BranchOptions) -> Tensor:
    """The plain cell with these tensors as its parameters and statistics; the latter change in training."""
    assert options.rate_multiplier == 1
    assert options.pooling_size is None
    cell_channels, concatenated = weights.projection.weight.shape[:2]
    sizes = (features.shape[1], concatenated // len(cell.branches), cell_channels)
    module = PlainCell(cell, *sizes, pooling=options.pooling).train(options.training)
    names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    output: Tensor = functional_call(module, dict(zip(names, tree_leaves(weights), strict=True)), (features,))
    return output


class PlainDecoder(nn.Module):
    """`fast.decoder.Decoder` with its keys."""

    def __init__(self, low_level_channels: int, channels: int, projected_channels: int) -> None:
        super().__init__()
        separable = AtrousSeparableConv(rate=(1, 1))
        self.projection = ConvNormReLU(low_level_channels, projected_channels)
        self.refinement = nn.Sequential(
            *(PlainBranch(separable, width, channels) for width in (channels + projected_channels, channels))
        )

    def forward(self, context: Tensor, low_level: Tensor) -> Tensor:
        low = self.projection(low_level)
        resized = F.interpolate(context, low.shape[2:], mode="bilinear", align_corners=True)
        output: Tensor = self.refinement(torch.cat((resized, low), dim=1))
        return output

    def weights(self) -> DecoderWeights[Tensor]:
        """The live parameters and statistics, in the reference's containers."""
        refinement = (cast(SeparableConv[Tensor], cast(PlainBranch, branch).weights()) for branch in self.refinement)
        return DecoderWeights(self.projection.weights(), tuple(refinement))
