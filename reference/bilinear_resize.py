"""Bilinear resize, with or without aligned corners.

    align_corners=True   the first and last pixels of both maps coincide: output pixel i reads position
                         i · (in − 1) / (out − 1), between its two neighbours; a single output pixel reads position 0
    align_corners=False  the outer borders of both maps coincide: output pixel i reads position (i + 1/2) · in / out − 1/2, and
                         where that lies outside of the first and last pixels' middles, that pixel

Along one axis this is a matrix (out, in) with at most two weights per row, so a map X becomes  Y = R X Cᵀ  and its gradient ∂X
= Rᵀ ∂Y C. Equals `tf.image.resize_bilinear(align_corners=True)` and `F.interpolate(..., align_corners=True)`, which the
authors use for pooled maps, logits and decoder. Which of the two belongs to the features of a backbone is the business of
`grid.py`.
"""

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array


def interpolation_taps(in_size: int, out_size: int, *, align_corners: bool = True) -> tuple[NDArray[np.int64], Array]:
    """For each output along one axis: the lower of the two neighbours it reads, and the weight of the upper one.

    >>> interpolation_taps(2, 3)
    (array([0, 0, 1]), array([0. , 0.5, 0. ]))
    >>> interpolation_taps(2, 4, align_corners=False)
    (array([0, 0, 0, 1]), array([0.  , 0.25, 0.75, 0.25]))
    """
    if align_corners:
        step = (in_size - 1) / (out_size - 1) if out_size > 1 else 0.0
        position = np.arange(out_size, dtype=np.float64) * step
    else:
        position = np.maximum((np.arange(out_size) + 0.5) * in_size / out_size - 0.5, 0.0)
    lower: NDArray[np.int64] = np.minimum(position.astype(np.int64), in_size - 1)
    return lower, position - lower


def interpolation_matrix(in_size: int, out_size: int, *, align_corners: bool = True) -> Array:
    """The matrix (out_size, in_size) of a resize along one axis.

    >>> interpolation_matrix(2, 3)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    >>> interpolation_matrix(2, 4, align_corners=False)
    array([[1.  , 0.  ],
           [0.75, 0.25],
           [0.25, 0.75],
           [0.  , 1.  ]])
    """
    lower, fraction = interpolation_taps(in_size, out_size, align_corners=align_corners)
    matrix = np.zeros((out_size, in_size), dtype=np.float64)
    rows = np.arange(out_size)
    matrix[rows, lower] += 1.0 - fraction
    matrix[rows, np.minimum(lower + 1, in_size - 1)] += fraction
    return matrix


def bilinear_resize(x: Array, size: tuple[int, int], *, align_corners: bool = True) -> Array:
    """x: (N, C, H, W) -> (N, C, *size)."""
    rows, columns = (interpolation_matrix(x.shape[2 + i], size[i], align_corners=align_corners) for i in range(2))
    return rows @ x @ columns.T


def bilinear_resize_backward(grad_output: Array, size: tuple[int, int], *, align_corners: bool = True) -> Array:
    """Gradient for an input of (N, C, *size), given grad_output: (N, C, H_out, W_out)."""
    rows, columns = (interpolation_matrix(size[i], grad_output.shape[2 + i], align_corners=align_corners) for i in range(2))
    return rows.T @ grad_output @ columns
