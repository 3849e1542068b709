"""Bilinear resize with aligned corners: the first and last pixels of both maps coincide.

    output pixel i reads position i · (in − 1) / (out − 1), between its two neighbours; a single output pixel reads position 0

Along one axis this is a matrix (out, in) with at most two weights per row, so a map X becomes  Y = R X Cᵀ  and its gradient ∂X
= Rᵀ ∂Y C. Equals `tf.image.resize_bilinear(align_corners=True)` and `F.interpolate(..., align_corners=True)`, which the
authors use for pooled maps, logits and decoder. With corners aligned, feature (i, j) at output stride 16 sits on image pixel
(16i, 16j).
"""

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array


def interpolation_taps(in_size: int, out_size: int) -> tuple[NDArray[np.int64], Array]:
    """For each output along one axis: the lower of the two neighbours it reads, and the weight of the upper one.

    >>> interpolation_taps(2, 3)
    (array([0, 0, 1]), array([0. , 0.5, 0. ]))
    """
    step = (in_size - 1) / (out_size - 1) if out_size > 1 else 0.0
    position = np.arange(out_size, dtype=np.float64) * step
    lower: NDArray[np.int64] = np.minimum(position.astype(np.int64), in_size - 1)
    return lower, position - lower


def interpolation_matrix(in_size: int, out_size: int) -> Array:
    """The matrix (out_size, in_size) of a resize along one axis.

    >>> interpolation_matrix(2, 3)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    lower, fraction = interpolation_taps(in_size, out_size)
    matrix = np.zeros((out_size, in_size), dtype=np.float64)
    rows = np.arange(out_size)
    matrix[rows, lower] += 1.0 - fraction
    matrix[rows, np.minimum(lower + 1, in_size - 1)] += fraction
    return matrix


def bilinear_resize(x: Array, size: tuple[int, int]) -> Array:
    """x: (N, C, H, W) -> (N, C, *size)."""
    rows, columns = interpolation_matrix(x.shape[2], size[0]), interpolation_matrix(x.shape[3], size[1])
    return rows @ x @ columns.T


def bilinear_resize_backward(grad_output: Array, size: tuple[int, int]) -> Array:
    """Gradient for an input of (N, C, *size), given grad_output: (N, C, H_out, W_out)."""
    rows, columns = interpolation_matrix(size[0], grad_output.shape[2]), interpolation_matrix(size[1], grad_output.shape[3])
    return rows.T @ grad_output @ columns
