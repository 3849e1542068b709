"""Average spatial pyramid pooling: local means, a 1×1 convolution on them, and a bilinear resize back to the map's size.

16 of the paper's 81 operations (section 3.1): grids (grid_h, grid_w), each from {1, 2, 4, 8}. Two variants differ in the
means:

- `sliding_window`, the authors' code (`pyramid_pooling` in research/deeplab/core/dense_prediction_cell.py) and the default
  here: a dense average with stride 1 and no padding, over windows of ceil(H / grid_h) × ceil(W / grid_w);
- `grid_cells`, the paper's words: one mean per cell of a grid_h × grid_w grid. Cell i covers rows floor(i·H / g) to
  ceil((i+1)·H / g).

Along one axis either is a matrix P of means, so with the resize matrix R (bilinear_resize.py):  Y = resize(ReLU(BN(conv(P X
Qᵀ)))). Convolution, batch norm and ReLU come *before* the resize, so they cost next to nothing.
"""

from typing import Literal

import numpy as np

from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward

PoolingVariant = Literal["sliding_window", "grid_cells"]


def window_size(size: int, grid: int, pooling_size: int | None = None) -> int:
    """Length of the sliding window along one axis, ceil(pooling_size / grid).

    `pooling_size` is the map's own size unless it is pinned, for instance to the size seen in training (the authors'
    `image_pooling_crop_size`). Raises ValueError if it is below 1 or gives a window that exceeds the map.

    >>> [window_size(33, grid) for grid in (1, 2, 4, 8)]  # crop 513 at output stride 16
    [33, 17, 9, 5]
    """
    window = -(-(size if pooling_size is None else pooling_size) // grid)
    if not 1 <= window <= size:
        raise ValueError(
            f"pooling window of {window} (pooling_size {pooling_size}, grid {grid}) must be 1 to the map's {size}"
        )
    return window


def pooling_matrix(size: int, grid: int, *, variant: PoolingVariant, pooling_size: int | None = None) -> Array:
    """The matrix (out, size) of means along one axis; `pooling_size`, as in `window_size`, fixes the sliding window only.

    >>> pooling_matrix(4, 2, variant="sliding_window")
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0.5, 0.5, 0. ],
           [0. , 0. , 0.5, 0.5]])
    >>> pooling_matrix(4, 2, variant="grid_cells")
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])
    """
    if variant == "grid_cells":
        spans = [(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]
    else:
        window = window_size(size, grid, pooling_size)
        spans = [(start, start + window) for start in range(size - window + 1)]
    matrix = np.zeros((len(spans), size), dtype=np.float64)
    for row, (start, stop) in enumerate(spans):
        matrix[row, start:stop] = 1.0 / (stop - start)
    return matrix


def pyramid_pooling(
    x: Array,
    weights: ConvNorm[Array],
    *,
    grid_size: tuple[int, int],
    training: bool,
    variant: PoolingVariant = "sliding_window",
    pooling_size: tuple[int, int] | None = None,
) -> Array:
    """Means, conv1x1 (with BN and ReLU), resize back: (N, C_in, H, W) -> (N, C_out, H, W)."""
    rows, columns = _matrices(x, grid_size, variant, pooling_size)
    return bilinear_resize(conv1x1(rows @ x @ columns.T, weights, training=training), (x.shape[2], x.shape[3]))


def pyramid_pooling_backward(
    grad_output: Array,
    x: Array,
    weights: ConvNorm[Array],
    *,
    grid_size: tuple[int, int],
    training: bool,
    variant: PoolingVariant = "sliding_window",
    pooling_size: tuple[int, int] | None = None,
) -> tuple[Array, ConvNorm[Array]]:
    """Gradients for x and the weights of `pyramid_pooling`."""
    rows, columns = _matrices(x, grid_size, variant, pooling_size)
    means = rows @ x @ columns.T  # (N, C_in, pooled_h, pooled_w)
    grad_conv = bilinear_resize_backward(grad_output, (rows.shape[0], columns.shape[0]))
    grad_means, grad_weights = conv1x1_backward(grad_conv, means, weights, training=training)
    return rows.T @ grad_means @ columns, grad_weights


def _matrices(
    x: Array, grid_size: tuple[int, int], variant: PoolingVariant, pooling_size: tuple[int, int] | None
) -> tuple[Array, Array]:
    if variant not in ("sliding_window", "grid_cells"):
        raise ValueError(f"pooling variant must be sliding_window or grid_cells, got {variant!r}")
    pin_h, pin_w = pooling_size or (None, None)
    return (
        pooling_matrix(x.shape[2], grid_size[0], variant=variant, pooling_size=pin_h),
        pooling_matrix(x.shape[3], grid_size[1], variant=variant, pooling_size=pin_w),
    )
