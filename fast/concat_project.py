"""`reference/concat_project.py` on PyTorch. Dropout draws from PyTorch's generator: its mask, or with kernels a seed."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.kernels import Dropout, NormedMap, backend_for
from fast.lazy_norm import LiveConv, Pointwise, check_shapes, conv_norm, dense, frozen, in_mode, is_inference, value
from fast.pointwise_conv import lazy_conv1x1
from reference.pointwise_conv import ConvNorm


def concat_project(
    branches: Sequence[Tensor],
    weights: ConvNorm[Tensor],
    *,
    training: bool,
    dropout_rate: float = 0.0,
    momentum: float = MOMENTUM,
) -> Tensor:
    """B maps (N, C, H, W) -> (N, C_out, H, W). Drops out if dropout_rate is above 0; `training` is for the norm alone."""
    maps = [NormedMap(branch) for branch in branches]
    return value(lazy_concat_project(maps, in_mode(weights, training, momentum), dropout_rate=dropout_rate))


def lazy_concat_project(branches: Sequence[NormedMap], conv: LiveConv, *, dropout_rate: float = 0.0) -> NormedMap:
    """Like `concat_project`, on maps whose norm is applied on load; kernels do not concatenate."""
    raw = branches[0].raw
    if backend := backend_for(raw):
        if dropout_rate == 0.0 and is_inference(branches, conv):
            check_shapes(Pointwise(), branches, conv.weight)
            maps = [dense(branch, backend) for branch in branches]
            return NormedMap(backend.pointwise_inference(maps, conv.weight.contiguous(), frozen(conv.norm, raw)))
        dropout = draw_dropout(dropout_rate, raw.device) if dropout_rate > 0.0 else None
        return conv_norm(backend, Pointwise(dropout), branches, *conv)
    concat = torch.cat([branch.raw for branch in branches], dim=1)  # (N, B·C, H, W)
    return lazy_conv1x1(NormedMap(F.dropout(concat, dropout_rate)), conv)


def draw_dropout(rate: float, device: torch.device) -> Dropout:
    """Draw the dropout mask of a call, as a seed for kernels. It is drawn on the device, so a captured graph draws anew.

    Raises ValueError unless 0 < rate < 1: kept elements grow by 1 / (1 - rate).
    """
    if not 0.0 < rate < 1.0:
        raise ValueError(f"a dropout rate must be at least 0 and below 1, got {rate}")
    return Dropout(rate, torch.randint(2**63 - 1, (1,), device=device))
