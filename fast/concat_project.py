"""`reference/concat_project.py` on PyTorch. Dropout draws its mask from PyTorch's generator."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.pointwise_conv import conv1x1
from reference.pointwise_conv import ConvNorm


def dropout(x: Tensor, *, rate: float) -> Tensor:
    """Zero a share `rate` of the elements at random and scale the others by 1 / (1 − rate); any shape, same shape."""
    if rate == 0.0 or x.device.type != "cpu" or torch.compiler.is_compiling():  # no compiler traces random_
        return F.dropout(x, rate)
    # On a CPU drawing random numbers is the cost; 16 bits each, four from one draw, are enough for a rate and 2× quicker.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(rate * 2**16) - 2**15
    return torch.where(keep, x * (1.0 / (1.0 - rate)), 0.0)


def concat_project(
    branches: Sequence[Tensor],
    weights: ConvNorm[Tensor],
    *,
    training: bool,
    dropout_rate: float = 0.0,
    momentum: float = MOMENTUM,
) -> Tensor:
    """B maps (N, C, H, W) -> (N, C_out, H, W); a dropout_rate above 0 drops out, whatever `training` says of the norm."""
    concat = torch.cat(tuple(branches), dim=1)  # (N, B·C, H, W)
    return conv1x1(dropout(concat, rate=dropout_rate), weights, training=training, momentum=momentum)
