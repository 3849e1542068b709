"""Misreadings of pyramid pooling and its gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import Changes, Function
from reference import batch_norm as bn
from reference import bilinear_resize as resize
from reference import pointwise_conv as pointwise
from reference import pyramid_pooling as pooling
from reference.batch_norm import Array
from reference.pointwise_conv import ConvNorm


def _spans(spans: Callable[[int, int], list[tuple[int, int]]]) -> Changes:
    """Means over other spans: a function of the size and the window."""

    def change(original: Function) -> Function:
        def matrix(size: int, grid: int, *, variant: str, pooling_size: int | None = None) -> Array:
            rows = spans(size, pooling.window_size(size, grid, pooling_size))
            inside = np.array([(np.arange(size) >= start) & (np.arange(size) < stop) for start, stop in rows])
            means: Array = inside / inside.sum(axis=1, keepdims=True)
            return means

        return matrix

    return {"pyramid_pooling.pooling_matrix": change}


def _same_spans(size: int, window: int) -> list[tuple[int, int]]:
    starts = [i - (window - 1) // 2 for i in range(size)]
    return [(max(start, 0), min(start + window, size)) for start in starts]


def _floor(size: int, grid: int, pooling_size: int | None = None) -> int:
    return max((size if pooling_size is None else pooling_size) // grid, 1)


def _rounded(size: int, grid: int, pooling_size: int | None = None) -> int:
    return max(round((size if pooling_size is None else pooling_size) / grid), 1)


def _matrices_of(read: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Changes:
    """The two matrices of means for another grid and pooling_size: a function of x, grid and pooling_size."""

    def change(original: Function) -> Function:
        def matrices(x: Array, grid_size: Any, variant: str, pooling_size: Any) -> tuple[Array, Array]:
            grid, pinned = read(x, grid_size, pooling_size)
            matrices: tuple[Array, Array] = original(x, grid, variant, pinned)
            return matrices

        return matrices

    return {"pyramid_pooling._matrices": change}


def _windows_swapped(original: Function) -> Function:
    def matrices(x: Array, grid_size: Any, variant: Any, pooling_size: Any) -> tuple[Array, Array]:
        height, width = pooling_size or x.shape[2:]
        windows = pooling.window_size(width, grid_size[1]), pooling.window_size(height, grid_size[0])
        return original(x, (1, 1), variant, windows)  # type: ignore[no-any-return]

    return matrices


def _resized_before(end: Function) -> Callable[[Function], Function]:
    """The means are convolved; `end` is the rest, a function of the result, norm, training and the resize."""

    def change(original: Function) -> Function:
        def pooled(
            x: Array, weights: ConvNorm[Array], *, grid_size: Any, training: bool, pooling_size: Any = None, **_: Any
        ) -> Array:
            rows, columns = pooling._matrices(x, grid_size, "sliding_window", pooling_size)
            convolved = pointwise.pointwise_conv(rows @ x @ columns.T, weights.weight)
            value: Array = end(convolved, weights.norm, training, lambda y: resize.bilinear_resize(y, x.shape[2:]))
            return value

        return pooled

    return change


def _maxima(original: Function) -> Function:
    def pooled(
        x: Array, weights: ConvNorm[Array], *, grid_size: Any, training: bool, pooling_size: Any = None, **_: Any
    ) -> Array:
        windows = [
            pooling.window_size(x.shape[2 + i], grid_size[i], None if pooling_size is None else pooling_size[i])
            for i in range(2)
        ]
        maxima = np.lib.stride_tricks.sliding_window_view(x, windows, axis=(2, 3)).max(axis=(-2, -1))
        return resize.bilinear_resize(pointwise.conv1x1(maxima, weights, training=training), x.shape[2:])

    return pooled


POOLING = (
    Misreading(
        "window_rounded_down",
        "pooling",
        "with a window of floor(H / grid_h) x floor(W / grid_w)",
        "the window is rounded up",
        {"pyramid_pooling.window_size": lambda f: _floor},
    ),
    Misreading(
        "window_rounded_to_nearest",
        "pooling",
        "with a window of round(H / grid_h) x round(W / grid_w), rounded to nearest",
        "the window is rounded up",
        {"pyramid_pooling.window_size": lambda f: _rounded},
    ),
    Misreading(
        "one_window_too_few",
        "pooling",
        "without the last window of each row and column",
        "a window fits at H - window + 1 positions",
        _spans(lambda size, window: [(start, start + window) for start in range(size - window)]),
    ),
    Misreading(
        "grid_cells",
        "pooling",
        "with one mean per grid cell, the paper's words",
        "the authors' code slides a window over the map, with stride 1",
        {"pyramid_pooling.pooling_matrix": lambda f: lambda *a, **o: f(*a, **(o | {"variant": "grid_cells"}))},
    ),
    Misreading(
        "windows_side_by_side",
        "pooling",
        "with windows side by side, as far as whole ones fit",
        "the window moves by one position at a time",
        _spans(lambda size, window: [(start, start + window) for start in range(0, size - window + 1, window)]),
    ),
    Misreading(
        "window_over_the_border",
        "pooling",
        "with a mean for every position, of what of the window lies inside of the map ('SAME')",
        "the window never goes over the border ('VALID'), and a resize follows",
        _spans(_same_spans),
    ),
    Misreading(
        "grid_swapped",
        "pooling",
        "with the grid read as (width, height)",
        "grids are (grid_h, grid_w)",
        _matrices_of(lambda x, grid, pinned: (grid[::-1], pinned)),
    ),
    Misreading(
        "window_swapped",
        "pooling",
        "with the window's height and width swapped",
        "it has ceil(H / grid_h) rows and ceil(W / grid_w) columns",
        {"pyramid_pooling._matrices": _windows_swapped},
    ),
    Misreading(
        "grid_is_the_window",
        "pooling",
        "with the grid as the size of the window",
        "the window is ceil(H / grid_h) x ceil(W / grid_w)",
        _matrices_of(lambda x, grid, pinned: ((1, 1), grid)),
    ),
    Misreading(
        "pooling_size_ignored",
        "pooling",
        "with the window computed from the map",
        "where `pooling_size` is given, the window follows that",
        _matrices_of(lambda x, grid, pinned: (grid, None)),
    ),
    Misreading(
        "map_size_swapped",
        "pooling",
        "with a window of ceil(W / grid_h) x ceil(H / grid_w)",
        "its rows come from the map's height, its columns from the width: ceil(H / grid_h) x ceil(W / grid_w)",
        _matrices_of(lambda x, grid, pinned: (grid, (pinned or x.shape[2:])[::-1])),
    ),
    Misreading(
        "pooling_size_swapped",
        "pooling",
        "with `pooling_size` read as (width, height)",
        "it is (height, width)",
        _matrices_of(lambda x, grid, pinned: (grid, pinned and pinned[::-1])),
    ),
    Misreading(
        "resized_before_relu",
        "pooling",
        "with the resize before the ReLU",
        "convolution, batch norm and ReLU come before the resize",
        {
            "pyramid_pooling.pyramid_pooling": _resized_before(
                lambda y, norm, training, resized: np.maximum(resized(bn.batch_norm(y, norm, training=training)), 0.0)
            )
        },
    ),
    Misreading(
        "resized_before_norm",
        "pooling",
        "with the resize before convolution or batch norm",
        "convolution, batch norm and ReLU come before the resize",
        {
            "pyramid_pooling.pyramid_pooling": _resized_before(
                lambda y, norm, training, resized: bn.batch_norm_relu(resized(y), norm, training=training)
            )
        },
    ),
    Misreading(
        "maxima_for_means",
        "pooling",
        "with the maximum of each window",
        "a pooling of the cell takes the mean",
        {"pyramid_pooling.pyramid_pooling": _maxima},
    ),
)


def _window_area(x: Array, grid_size: tuple[int, int], pooling_size: tuple[int, int] | None) -> int:
    pinned = pooling_size or (None, None)
    return int(np.prod([pooling.window_size(x.shape[2 + i], grid_size[i], pinned[i]) for i in range(2)]))


def _undivided(original: Function) -> Function:
    def backward(g: Array, x: Array, weights: Any, *, grid_size: Any, pooling_size: Any = None, **options: Any) -> Any:
        grad_x, grad_weights = original(g, x, weights, grid_size=grid_size, pooling_size=pooling_size, **options)
        return _window_area(x, grid_size, pooling_size) * grad_x, grad_weights

    return backward


POOLING_GRADIENT = (
    Misreading(
        "means_not_divided",
        "pooling_gradient",
        "where each mean hands its whole gradient to every position of its window",
        "each gets an equal share: the gradient divided by the window's size",
        {"pyramid_pooling.pyramid_pooling_backward": _undivided},
    ),
)
