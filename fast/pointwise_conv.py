"""`reference/pointwise_conv.py` on PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM, batch_norm_relu
from reference.pointwise_conv import ConvNorm


def pointwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """x: (N, C_in, H, W), weight: (C_out, C_in, 1, 1) -> (N, C_out, H, W)."""
    if x.device.type == "cpu" and x.is_contiguous():  # one product per image, without the library's copies into columns
        return torch.matmul(weight.flatten(1), x.flatten(2)).view(x.shape[0], weight.shape[0], *x.shape[2:])
    return F.conv2d(x, weight)


def conv1x1(x: Tensor, weights: ConvNorm[Tensor], *, training: bool, momentum: float = MOMENTUM) -> Tensor:
    """Pointwise convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    return batch_norm_relu(pointwise_conv(x, weights.weight), weights.norm, training=training, momentum=momentum)
