"""`reference/atrous_separable_conv.py` on PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM, live_batch_norm
from fast.kernels import NormedMap, backend_for
from fast.lazy_norm import Depthwise, LiveConv, Pointwise, check_shapes, conv_norm, dense, frozen, in_mode, is_inference, value
from fast.pointwise_conv import lazy_conv1x1
from reference.atrous_separable_conv import SeparableConv


def depthwise_conv(x: Tensor, weight: Tensor, *, rate: tuple[int, int]) -> Tensor:
    """x: (N, C, H, W), weight: (C, 1, 3, 3) -> (N, C, H, W)."""
    if backend := backend_for(x):
        return conv_norm(backend, Depthwise(rate), [NormedMap(x)], weight, None).raw
    return F.conv2d(x, weight, padding=rate, dilation=rate, groups=weight.shape[0])


def atrous_separable_conv(
    x: Tensor, weights: SeparableConv[Tensor], *, rate: tuple[int, int], training: bool, momentum: float = MOMENTUM
) -> Tensor:
    """Depthwise, BN, ReLU, pointwise, BN, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    depthwise, pointwise = (in_mode(conv, training, momentum) for conv in weights)
    return value(lazy_atrous_separable_conv(NormedMap(x), depthwise, pointwise, rate=rate))


def lazy_atrous_separable_conv(x: NormedMap, depthwise: LiveConv, pointwise: LiveConv, *, rate: tuple[int, int]) -> NormedMap:
    """Like `atrous_separable_conv`, on maps whose norm is applied on load; each norm runs in its own mode."""
    if backend := backend_for(x.raw):
        if is_inference([x], depthwise, pointwise):
            check_shapes(Depthwise(rate), [x], depthwise.weight)
            check_shapes(Pointwise(), [x], pointwise.weight)
            weights = depthwise.weight.contiguous(), pointwise.weight.contiguous()
            norms = frozen(depthwise.norm, x.raw), frozen(pointwise.norm, x.raw)
            x = dense(x, backend)
            return NormedMap(backend.separable_inference(x, weights[0], norms[0], rate, weights[1], norms[1]))
        middle = conv_norm(backend, Depthwise(rate), [x], *depthwise)
    else:
        raw = depthwise_conv(x.raw, depthwise.weight, rate=rate)
        middle = NormedMap(F.relu(live_batch_norm(raw, depthwise.norm)))
    return lazy_conv1x1(middle, pointwise)
