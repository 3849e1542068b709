"""`reference/atrous_separable_conv.py` on PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM, batch_norm_relu
from fast.pointwise_conv import conv1x1
from reference.atrous_separable_conv import SeparableConv


def depthwise_conv(x: Tensor, weight: Tensor, *, rate: tuple[int, int]) -> Tensor:
    """x: (N, C, H, W), weight: (C, 1, 3, 3) -> (N, C, H, W)."""
    return F.conv2d(x, weight, padding=rate, dilation=rate, groups=weight.shape[0])


def atrous_separable_conv(
    x: Tensor, weights: SeparableConv[Tensor], *, rate: tuple[int, int], training: bool, momentum: float = MOMENTUM
) -> Tensor:
    """Depthwise, BN, ReLU, pointwise, BN, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    raw = depthwise_conv(x, weights.depthwise.weight, rate=rate)
    middle = batch_norm_relu(raw, weights.depthwise.norm, training=training, momentum=momentum)
    return conv1x1(middle, weights.pointwise, training=training, momentum=momentum)
