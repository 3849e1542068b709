"""Batch normalisation over (N, H, W), per channel, and the ReLU that follows it everywhere in the cell.

    y = scale · (x − mean) / √(var + eps) + offset

`training=True` takes mean and *biased* variance from the batch; `training=False` takes the running ones. Running statistics
follow r ← (1 − momentum) · r + momentum · batch, with the *unbiased* variance, as in PyTorch; TensorFlow's decay is
1 − momentum (the authors use 0.9997). Source: research/deeplab/core/utils.py and slim's batch_norm.

A batch with one value per channel (a 1×1 map, batch 1) has no statistics: the running ones are used and do not change.
"""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ArrayT = TypeVar("ArrayT")  # the NumPy reference and the PyTorch fast path share the containers of weights

EPS = 1e-5  # the authors' epsilon in cell, ASPP and decoder


class BatchNorm(NamedTuple, Generic[ArrayT]):
    """Parameters and running statistics of one batch norm; also the container of their gradients."""

    scale: ArrayT  # (C,)
    offset: ArrayT  # (C,)
    running_mean: ArrayT  # (C,), no gradient
    running_var: ArrayT  # (C,), no gradient


def batch_norm(x: Array, norm: BatchNorm[Array], *, training: bool, eps: float = EPS) -> Array:
    """Normalise x: (N, C, H, W) -> (N, C, H, W).

    >>> x = np.array([1.0, 3.0]).reshape(1, 1, 1, 2)
    >>> norm = BatchNorm(*map(np.array, ([2.0], [10.0], [0.0], [1.0])))
    >>> batch_norm(x, norm, training=True, eps=0.0).ravel()  # mean 2, standard deviation 1
    array([ 8., 12.])
    """
    normalised, _ = _normalise(x, norm, training, eps)
    return _per_channel(norm.scale) * normalised + _per_channel(norm.offset)


def batch_norm_backward(
    grad_output: Array, x: Array, norm: BatchNorm[Array], *, training: bool, eps: float = EPS
) -> tuple[Array, BatchNorm[Array]]:
    """Gradients for x and for scale and offset; the running statistics are constants, so their gradient is zero."""
    normalised, deviation = _normalise(x, norm, training, eps)
    grad_scale = (grad_output * normalised).sum(axis=(0, 2, 3))
    grad_offset = grad_output.sum(axis=(0, 2, 3))
    grad_normalised = grad_output * _per_channel(norm.scale)  # (N, C, H, W)
    if _uses_batch_statistics(x, training):  # mean and variance depend on x too
        mean = grad_normalised.mean(axis=(0, 2, 3), keepdims=True)
        correlation = (grad_normalised * normalised).mean(axis=(0, 2, 3), keepdims=True)
        grad_normalised = grad_normalised - mean - normalised * correlation
    zero = np.zeros_like(grad_scale)
    return grad_normalised / deviation, BatchNorm(grad_scale, grad_offset, zero, zero)


def updated_running_statistics(x: Array, norm: BatchNorm[Array], *, momentum: float) -> BatchNorm[Array]:
    """The norm after one training step on x: (N, C, H, W).

    >>> x = np.array([1.0, 3.0]).reshape(1, 1, 1, 2)
    >>> norm = BatchNorm(*map(np.array, ([2.0], [10.0], [0.0], [1.0])))
    >>> after = updated_running_statistics(x, norm, momentum=0.5)
    >>> after.running_mean, after.running_var  # batch: mean 2, unbiased variance 2
    (array([1.]), array([1.5]))
    """
    if not _uses_batch_statistics(x, training=True):
        return norm
    mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3), ddof=1)
    return norm._replace(
        running_mean=(1 - momentum) * norm.running_mean + momentum * mean,
        running_var=(1 - momentum) * norm.running_var + momentum * var,
    )


def batch_norm_relu(x: Array, norm: BatchNorm[Array], *, training: bool) -> Array:
    """max(batch_norm(x), 0), the end of every convolution of the cell; (N, C, H, W) -> (N, C, H, W)."""
    return np.maximum(batch_norm(x, norm, training=training), 0.0)


def batch_norm_relu_backward(
    grad_output: Array, x: Array, norm: BatchNorm[Array], *, training: bool
) -> tuple[Array, BatchNorm[Array]]:
    """Gradients for x and norm; the ReLU passes gradient where its input is positive."""
    positive = batch_norm(x, norm, training=training) > 0.0
    return batch_norm_backward(grad_output * positive, x, norm, training=training)


def _normalise(x: Array, norm: BatchNorm[Array], training: bool, eps: float) -> tuple[Array, Array]:
    if x.ndim != 4 or x.shape[1] != norm.scale.shape[0]:
        raise ValueError(f"batch norm of {norm.scale.shape[0]} channels needs x: (N, C, H, W), got {x.shape}")
    x = x.astype(np.float64)
    if _uses_batch_statistics(x, training):
        mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    else:
        mean, var = norm.running_mean, norm.running_var
    deviation = np.sqrt(_per_channel(var) + eps)
    return (x - _per_channel(mean)) / deviation, deviation


def _uses_batch_statistics(x: Array, training: bool) -> bool:
    return training and x.size // x.shape[1] > 1


def _per_channel(values: Array) -> Array:
    return values.astype(np.float64).reshape(1, -1, 1, 1)
