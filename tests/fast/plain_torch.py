"""The yardstick: a cell as anyone would write it with `torch.nn` alone, on given weights and as modules with their own."""

from typing import Any, assert_never, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.batch_norm import MOMENTUM
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import EPS, BatchNorm
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.dense_prediction_cell import BranchOptions, BranchWeights, CellWeights
from reference.pointwise_conv import ConvNorm


def plain_cell(features: Tensor, weights: CellWeights[Tensor], cell: Cell, options: BranchOptions) -> Tensor:
    maps = {BACKBONE_FEATURE: features}
    for i, branch in enumerate(cell.branches):
        maps[i] = plain_operation(maps[branch.input_index], weights.branches[i], branch.operation, options)
    return _conv_norm_relu(torch.cat([maps[i] for i in range(len(cell.branches))], dim=1), weights.projection, options)


def plain_operation(x: Tensor, weights: BranchWeights[Tensor], operation: Operation, options: BranchOptions) -> Tensor:
    match operation:
        case Conv1x1():
            return _conv_norm_relu(x, cast(ConvNorm[Tensor], weights), options)
        case AtrousSeparableConv((rate_h, rate_w)):
            depthwise, pointwise = cast(SeparableConv[Tensor], weights)
            rate = (rate_h * options.rate_multiplier, rate_w * options.rate_multiplier)
            middle = _conv_norm_relu(x, depthwise, options, padding=rate, dilation=rate, groups=x.shape[1])
            return _conv_norm_relu(middle, pointwise, options)
        case PyramidPooling(grid_size):
            if options.pooling == "grid_cells":
                means = F.adaptive_avg_pool2d(x, grid_size)
            else:
                pooling_size = options.pooling_size or x.shape[2:]
                window = [-(-size // grid) for size, grid in zip(pooling_size, grid_size, strict=True)]
                means = F.avg_pool2d(x, window, stride=1)
            projected = _conv_norm_relu(means, cast(ConvNorm[Tensor], weights), options)
            return F.interpolate(projected, x.shape[2:], mode="bilinear", align_corners=True)
        case _:
            assert_never(operation)


def _conv_norm_relu(x: Tensor, weights: ConvNorm[Tensor], options: BranchOptions, **convolution: Any) -> Tensor:
    return F.relu(_batch_norm(F.conv2d(x, weights.weight, **convolution), weights.norm, options.training))


def _batch_norm(x: Tensor, norm: BatchNorm[Tensor], training: bool) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.scale, norm.offset, training, MOMENTUM, EPS)


class ConvNormReLU(nn.Conv2d):
    """Convolution, batch norm, ReLU of `torch.nn` alone, with the keys of our layer; `rate` makes it 3×3 and depthwise."""

    def __init__(self, in_channels: int, channels: int, rate: tuple[int, int] | None = None) -> None:
        depthwise: Any = {} if rate is None else {"padding": rate, "dilation": rate, "groups": in_channels}
        super().__init__(in_channels, channels, 1 if rate is None else 3, bias=False, **depthwise)
        self.norm = nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


class PlainBranch(nn.Module):
    """Any of the three operations: (N, C_in, H, W) -> (N, C, H, W)."""

    def __init__(self, operation: Operation, in_channels: int, channels: int) -> None:
        super().__init__()
        self.operation = operation
        if isinstance(operation, AtrousSeparableConv):
            self.depthwise = ConvNormReLU(in_channels, in_channels, operation.rate)
        self.pointwise = ConvNormReLU(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        match self.operation:
            case Conv1x1():
                output: Tensor = self.pointwise(x)
            case AtrousSeparableConv():
                output = self.pointwise(self.depthwise(x))
            case PyramidPooling(grid_size):
                window = [-(-size // grid) for size, grid in zip(x.shape[2:], grid_size, strict=True)]
                means = self.pointwise(F.avg_pool2d(x, window, stride=1))
                output = F.interpolate(means, x.shape[2:], mode="bilinear", align_corners=True)
            case _:
                assert_never(self.operation)
        return output


class PlainCell(nn.Module):
    """A Dense Prediction Cell without dropout, at output stride 16, with the keys of ours."""

    def __init__(self, cell: Cell, in_channels: int, branch_channels: int, cell_channels: int) -> None:
        super().__init__()
        self.cell = cell
        self.branches = nn.ModuleList(
            PlainBranch(
                branch.operation, in_channels if branch.input_index == BACKBONE_FEATURE else branch_channels, branch_channels
            )
            for branch in cell.branches
        )
        self.projection = ConvNormReLU(len(cell.branches) * branch_channels, cell_channels)

    def forward(self, features: Tensor) -> Tensor:
        maps = {BACKBONE_FEATURE: features}
        for i, (branch, module) in enumerate(zip(self.cell.branches, self.branches, strict=True)):
            maps[i] = module(maps[branch.input_index])
        output: Tensor = self.projection(torch.cat([maps[i] for i in range(len(self.branches))], dim=1))
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
