"""3×3 atrous separable convolution: a dilated 3×3 filter per channel, then a pointwise convolution.

    depthwise   y[n, c, h, w] = Σ_{i,j ∈ {-1,0,1}}  weight[c, i, j] · x[n, c, h + i·rate_h, w + j·rate_w]   (zero outside)
    separable   ReLU(BN(pointwise(ReLU(BN(depthwise(x))))))

64 of the paper's 81 operations (section 3.1): rates (rate_h, rate_w), each from {1, 3, 6, 9, 12, 15, 18, 21}. The batch norm
and ReLU *between* the two convolutions are in the authors' code (`split_separable_conv2d`, research/deeplab/core/utils.py),
not in the paper's text, and absent from many other libraries' "separable convolution".
"""

from collections.abc import Iterator
from typing import Generic, NamedTuple

import numpy as np

from reference.batch_norm import Array, ArrayT, batch_norm_relu, batch_norm_relu_backward
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward


class SeparableConv(NamedTuple, Generic[ArrayT]):
    """Weights of the separable pair; also the container of their gradients."""

    depthwise: ConvNorm[ArrayT]  # weight (C_in, 1, 3, 3)
    pointwise: ConvNorm[ArrayT]  # weight (C_out, C_in, 1, 1)


def depthwise_conv(x: Array, weight: Array, *, rate: tuple[int, int]) -> Array:
    """x: (N, C, H, W), weight: (C, 1, 3, 3) -> (N, C, H, W). Raises ValueError for other shapes or a rate below 1.

    >>> x = np.array([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 1, 1, 5)
    >>> depthwise_conv(x, np.ones((1, 1, 3, 3)), rate=(1, 2)).ravel()  # x[w-2] + x[w] + x[w+2]
    array([ 5., 10., 21., 10., 20.])
    """
    if x.ndim != 4 or weight.shape != (x.shape[1], 1, 3, 3) or min(rate) < 1:
        raise ValueError(
            f"depthwise_conv needs x: (N, C, H, W), weight: (C, 1, 3, 3), rate >= 1: {x.shape}, {weight.shape}, {rate}"
        )
    padded = _pad(x, rate)  # (N, C, H + 2·rate_h, W + 2·rate_w)
    output = np.zeros(x.shape, dtype=np.float64)
    for i, j, window in _taps(x.shape, rate):
        output += weight[:, 0, i, j][:, None, None] * padded[window]
    return output


def depthwise_conv_backward(grad_output: Array, x: Array, weight: Array, *, rate: tuple[int, int]) -> tuple[Array, Array]:
    """Gradients for x: (N, C, H, W) and weight: (C, 1, 3, 3), given grad_output: (N, C, H, W)."""
    padded = _pad(x, rate)
    grad_padded = np.zeros_like(padded)
    grad_weight = np.zeros(weight.shape, dtype=np.float64)
    for i, j, window in _taps(x.shape, rate):
        grad_padded[window] += weight[:, 0, i, j][:, None, None] * grad_output
        grad_weight[:, 0, i, j] = (grad_output * padded[window]).sum(axis=(0, 2, 3))
    return _crop(grad_padded, rate), grad_weight


def atrous_separable_conv(x: Array, weights: SeparableConv[Array], *, rate: tuple[int, int], training: bool) -> Array:
    """Depthwise, BN, ReLU, pointwise, BN, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    middle = batch_norm_relu(depthwise_conv(x, weights.depthwise.weight, rate=rate), weights.depthwise.norm, training=training)
    return conv1x1(middle, weights.pointwise, training=training)


def atrous_separable_conv_backward(
    grad_output: Array, x: Array, weights: SeparableConv[Array], *, rate: tuple[int, int], training: bool
) -> tuple[Array, SeparableConv[Array]]:
    """Gradients for x and the weights of `atrous_separable_conv`."""
    raw = depthwise_conv(x, weights.depthwise.weight, rate=rate)  # (N, C_in, H, W)
    middle = batch_norm_relu(raw, weights.depthwise.norm, training=training)
    grad_middle, grad_pointwise = conv1x1_backward(grad_output, middle, weights.pointwise, training=training)
    grad_raw, grad_norm = batch_norm_relu_backward(grad_middle, raw, weights.depthwise.norm, training=training)
    grad_x, grad_weight = depthwise_conv_backward(grad_raw, x, weights.depthwise.weight, rate=rate)
    return grad_x, SeparableConv(ConvNorm(grad_weight, grad_norm), grad_pointwise)


def _taps(shape: tuple[int, ...], rate: tuple[int, int]) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """The nine taps: kernel row, kernel column, and the window of the padded map that this tap reads."""
    height, width = shape[2:]
    for i in range(3):
        for j in range(3):
            top, left = i * rate[0], j * rate[1]
            yield i, j, (slice(None), slice(None), slice(top, top + height), slice(left, left + width))


def _pad(x: Array, rate: tuple[int, int]) -> Array:
    return np.pad(x.astype(np.float64), ((0, 0), (0, 0), (rate[0], rate[0]), (rate[1], rate[1])))


def _crop(padded: Array, rate: tuple[int, int]) -> Array:
    return padded[:, :, rate[0] : -rate[0], rate[1] : -rate[1]]
