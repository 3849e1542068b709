"""`reference/concat_project.py` on PyTorch. Dropout draws from PyTorch's generator: its mask, or with kernels a seed."""

from collections.abc import Sequence

from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.kernels import NormedMap, in_mode, operations_for, value
from reference.pointwise_conv import ConvNorm


def concat_project(
    branches: Sequence[Tensor],
    weights: ConvNorm[Tensor],
    *,
    training: bool,
    dropout_rate: float = 0.0,
    momentum: float = MOMENTUM,
) -> Tensor:
    """B maps (N, C, H, W) -> (N, C_out, H, W); a dropout_rate above 0 drops out, whatever `training` says of the norm.

    A pointwise convolution of several maps; kernels do not concatenate them. Raises ValueError for a dropout_rate below 0, or
    of 1 and more.
    """
    maps = [NormedMap(branch) for branch in branches]
    conv = in_mode(weights, training, momentum)
    return value(operations_for(branches[0]).pointwise_conv(maps, *conv, dropout_rate=dropout_rate))
