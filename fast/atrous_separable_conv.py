"""`reference/atrous_separable_conv.py` on PyTorch."""

from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.kernels import NormedMap, in_mode, operations_for, value
from reference.atrous_separable_conv import SeparableConv


def depthwise_conv(x: Tensor, weight: Tensor, *, rate: tuple[int, int]) -> Tensor:
    """x: (N, C, H, W), weight: (C, 1, 3, 3) -> (N, C, H, W)."""
    return operations_for(x).depthwise_conv(NormedMap(x), weight, None, rate=rate).raw


def atrous_separable_conv(
    x: Tensor, weights: SeparableConv[Tensor], *, rate: tuple[int, int], training: bool, momentum: float = MOMENTUM
) -> Tensor:
    """Depthwise, BN, ReLU, pointwise, BN, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    depthwise, pointwise = (in_mode(conv, training, momentum) for conv in weights)
    return value(operations_for(x).separable_conv(NormedMap(x), depthwise, pointwise, rate=rate))
