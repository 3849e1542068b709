"""Pointwise (1×1) convolution: the same linear map of the channels at every pixel, without bias.

    y[n, o, h, w] = Σ_c  weight[o, c] · x[n, c, h, w]

`conv1x1` is the first of the paper's 81 operations (section 3.1): pointwise convolution, batch norm, ReLU. In the authors'
code (research/deeplab/core/dense_prediction_cell.py) this is `conv` with kernel 1; rates do not apply to it.
"""

from typing import Generic, NamedTuple

import numpy as np

from reference.batch_norm import Array, ArrayT, BatchNorm, batch_norm_relu, batch_norm_relu_backward


class ConvNorm(NamedTuple, Generic[ArrayT]):
    """Weights of a convolution and of the batch norm behind it; also the container of their gradients."""

    weight: ArrayT  # (C_out, C_in, 1, 1) pointwise, (C, 1, 3, 3) depthwise
    norm: BatchNorm[ArrayT]


def pointwise_conv(x: Array, weight: Array) -> Array:
    """x: (N, C_in, H, W), weight: (C_out, C_in, 1, 1) -> (N, C_out, H, W). Raises ValueError if the channels differ.

    >>> x = np.array([1.0, 2.0]).reshape(1, 2, 1, 1)  # one pixel, two channels
    >>> weight = np.array([[10.0, 1.0], [0.0, 3.0]]).reshape(2, 2, 1, 1)
    >>> pointwise_conv(x, weight).ravel()
    array([12.,  6.])
    """
    if x.ndim != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            f"pointwise_conv needs x: (N, C_in, H, W) and weight: (C_out, C_in, 1, 1), got {x.shape}, {weight.shape}"
        )
    output: Array = np.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0], dtype=np.float64, optimize=True)
    return output


def pointwise_conv_backward(grad_output: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """Gradients for x: (N, C_in, H, W) and weight: (C_out, C_in, 1, 1), given grad_output: (N, C_out, H, W)."""
    grad_x = np.einsum("nohw,oc->nchw", grad_output, weight[:, :, 0, 0], dtype=np.float64, optimize=True)
    grad_weight = np.einsum("nohw,nchw->oc", grad_output, x, dtype=np.float64, optimize=True)
    return grad_x, grad_weight[:, :, None, None]


def conv1x1(x: Array, weights: ConvNorm[Array], *, training: bool) -> Array:
    """Pointwise convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    return batch_norm_relu(pointwise_conv(x, weights.weight), weights.norm, training=training)


def conv1x1_backward(
    grad_output: Array, x: Array, weights: ConvNorm[Array], *, training: bool
) -> tuple[Array, ConvNorm[Array]]:
    """Gradients for x and the weights of `conv1x1`."""
    raw = pointwise_conv(x, weights.weight)  # (N, C_out, H, W)
    grad_raw, grad_norm = batch_norm_relu_backward(grad_output, raw, weights.norm, training=training)
    grad_x, grad_weight = pointwise_conv_backward(grad_raw, x, weights.weight)
    return grad_x, ConvNorm(grad_weight, grad_norm)
