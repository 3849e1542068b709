"""`reference/atrous_separable_conv.py` on PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM, batch_norm_relu
from fast.kernels import NormedMap, backend_for
from fast.lazy_norm import Depthwise, Pointwise, check_shapes, conv_norm, dense, frozen, is_inference, value
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
    return value(lazy_atrous_separable_conv(NormedMap(x), weights, rate=rate, training=training, momentum=momentum))


def lazy_atrous_separable_conv(
    x: NormedMap, weights: SeparableConv[Tensor], *, rate: tuple[int, int], training: bool, momentum: float = MOMENTUM
) -> NormedMap:
    """`atrous_separable_conv` from and to maps whose norm is not yet applied."""
    if backend := backend_for(x.raw):
        if is_inference(x, *weights, training=training):
            (depthwise, depthwise_norm), (pointwise, pointwise_norm) = weights
            check_shapes(Depthwise(rate), [x], depthwise)
            check_shapes(Pointwise(), [x], pointwise)
            norms = frozen(depthwise_norm, x.raw), frozen(pointwise_norm, x.raw)
            x = dense(x, backend)
            return NormedMap(
                backend.separable_inference(x, depthwise.contiguous(), norms[0], rate, pointwise.contiguous(), norms[1])
            )
        middle = conv_norm(backend, Depthwise(rate), [x], *weights.depthwise, training=training, momentum=momentum)
    else:
        raw = depthwise_conv(x.raw, weights.depthwise.weight, rate=rate)
        middle = NormedMap(batch_norm_relu(raw, weights.depthwise.norm, training=training, momentum=momentum))
    return lazy_conv1x1(middle, weights.pointwise, training=training, momentum=momentum)
