"""`reference/pointwise_conv.py` on PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM, live_batch_norm
from fast.kernels import NormedMap, backend_for
from fast.lazy_norm import LiveConv, Pointwise, check_shapes, conv_norm, dense, frozen, in_mode, is_inference, value
from reference.pointwise_conv import ConvNorm


def pointwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """x: (N, C_in, H, W), weight: (C_out, C_in, 1, 1) -> (N, C_out, H, W)."""
    return lazy_pointwise_conv(NormedMap(x), weight)


def lazy_pointwise_conv(x: NormedMap, weight: Tensor) -> Tensor:
    """Like `pointwise_conv`, of a map whose norm is applied on load."""
    if backend := backend_for(x.raw):
        return conv_norm(backend, Pointwise(), [x], weight, None).raw
    if x.raw.device.type == "cpu" and x.raw.is_contiguous():  # avoids the library's im2col copies
        return torch.matmul(weight.flatten(1), x.raw.flatten(2)).view(x.raw.shape[0], weight.shape[0], *x.raw.shape[2:])
    return F.conv2d(x.raw, weight)


def conv1x1(x: Tensor, weights: ConvNorm[Tensor], *, training: bool, momentum: float = MOMENTUM) -> Tensor:
    """Pointwise convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    return value(lazy_conv1x1(NormedMap(x), in_mode(weights, training, momentum)))


def lazy_conv1x1(x: NormedMap, conv: LiveConv) -> NormedMap:
    """Like `conv1x1`, on maps whose norm is applied on load."""
    weight, norm = conv
    if backend := backend_for(x.raw):
        if is_inference([x], conv):
            check_shapes(Pointwise(), [x], weight)
            return NormedMap(backend.pointwise_inference([dense(x, backend)], weight.contiguous(), frozen(norm, x.raw)))
        return conv_norm(backend, Pointwise(), [x], weight, norm)
    return NormedMap(F.relu(live_batch_norm(pointwise_conv(x.raw, weight), norm)))
