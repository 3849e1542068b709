"""`reference/pointwise_conv.py` on PyTorch."""

from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.kernels import NormedMap, in_mode, operations_for, value
from reference.pointwise_conv import ConvNorm


def pointwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """x: (N, C_in, H, W), weight: (C_out, C_in, 1, 1) -> (N, C_out, H, W)."""
    return operations_for(x).pointwise_conv([NormedMap(x)], weight, None).raw


def conv1x1(x: Tensor, weights: ConvNorm[Tensor], *, training: bool, momentum: float = MOMENTUM) -> Tensor:
    """Pointwise convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    return value(operations_for(x).pointwise_conv([NormedMap(x)], *in_mode(weights, training, momentum)))
