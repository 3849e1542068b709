"""The yardstick: a cell as anyone would write it with `torch.nn.functional` alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import EPS, BatchNorm
from reference.cell import BACKBONE_FEATURE, Cell, Operation
from reference.dense_prediction_cell import BranchOptions, CellWeights
from reference.pointwise_conv import ConvNorm


def plain_cell(features: Tensor, weights: CellWeights[Tensor], cell: Cell, options: BranchOptions) -> Tensor:
    maps = {BACKBONE_FEATURE: features}
    for i, branch in enumerate(cell.branches):
        maps[i] = plain_operation(maps[branch.input_index], weights.branches[i], branch.operation, options)
    return _conv_norm_relu(torch.cat([maps[i] for i in range(len(cell.branches))], dim=1), weights.projection, options)


def plain_operation(
    x: Tensor, weights: ConvNorm[Tensor] | SeparableConv[Tensor], operation: Operation, options: BranchOptions
) -> Tensor:
    if isinstance(weights, SeparableConv):
        assert operation.rate is not None
        rate = (operation.rate[0] * options.rate_multiplier, operation.rate[1] * options.rate_multiplier)
        middle = _conv_norm_relu(x, weights.depthwise, options, padding=rate, dilation=rate, groups=x.shape[1])
        return _conv_norm_relu(middle, weights.pointwise, options)
    if operation.grid_size is None:
        return _conv_norm_relu(x, weights, options)
    if options.pooling == "grid_cells":
        means = F.adaptive_avg_pool2d(x, operation.grid_size)
    else:
        pooling_size = options.pooling_size or x.shape[2:]
        window = [-(-size // grid) for size, grid in zip(pooling_size, operation.grid_size, strict=True)]
        means = F.avg_pool2d(x, window, stride=1)
    return F.interpolate(_conv_norm_relu(means, weights, options), x.shape[2:], mode="bilinear", align_corners=True)


def _conv_norm_relu(x: Tensor, weights: ConvNorm[Tensor], options: BranchOptions, **convolution: Any) -> Tensor:
    return F.relu(_batch_norm(F.conv2d(x, weights.weight, **convolution), weights.norm, options.training))


def _batch_norm(x: Tensor, norm: BatchNorm[Tensor], training: bool) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.scale, norm.offset, training, MOMENTUM, EPS)
