"""The cell's end: concatenate all branch outputs, drop out in training, project with a 1×1 convolution.

    y = ReLU(BN(pointwise(dropout(concat(branches)))))

*All* branches are concatenated, also those that others read, in the order of the cell. Dropout (rate 0.1) zeroes single
elements of the concatenation and scales the rest by 1 / (1 − rate). Source: `build_cell` in
research/deeplab/core/dense_prediction_cell.py.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward

DROPOUT_RATE = 0.1


def dropout(x: Array, keep: NDArray[np.bool_], *, rate: float) -> Array:
    """Zero the elements of x that are not kept, and scale the others so that the expected value stays.

    Its gradient is the same function of grad_output, with the same mask.

    >>> dropout(np.array([1.0, 2.0, 3.0]), np.array([True, False, True]), rate=0.5)
    array([2., 0., 6.])
    """
    return np.where(keep, x / (1.0 - rate), 0.0)


def concat_project(
    branches: Sequence[Array],
    weights: ConvNorm[Array],
    *,
    training: bool,
    dropout_keep: NDArray[np.bool_] | None = None,
    dropout_rate: float = DROPOUT_RATE,
) -> Array:
    """B maps (N, C, H, W) -> (N, C_out, H, W); dropout_keep: (N, B·C, H, W), None for no dropout."""
    return conv1x1(_concat(branches, dropout_keep, dropout_rate), weights, training=training)


def concat_project_backward(
    grad_output: Array,
    branches: Sequence[Array],
    weights: ConvNorm[Array],
    *,
    training: bool,
    dropout_keep: NDArray[np.bool_] | None = None,
    dropout_rate: float = DROPOUT_RATE,
) -> tuple[list[Array], ConvNorm[Array]]:
    """Gradients for each branch: (N, C, H, W), and for the weights of `concat_project`."""
    concat = _concat(branches, dropout_keep, dropout_rate)
    grad_concat, grad_weights = conv1x1_backward(grad_output, concat, weights, training=training)
    if dropout_keep is not None:
        grad_concat = dropout(grad_concat, dropout_keep, rate=dropout_rate)
    boundaries = np.cumsum([branch.shape[1] for branch in branches])[:-1]
    return list(np.split(grad_concat, boundaries, axis=1)), grad_weights


def _concat(branches: Sequence[Array], dropout_keep: NDArray[np.bool_] | None, dropout_rate: float) -> Array:
    concat = np.concatenate(branches, axis=1)  # (N, B·C, H, W)
    return concat if dropout_keep is None else dropout(concat, dropout_keep, rate=dropout_rate)
