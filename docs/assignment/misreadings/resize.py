"""Misreadings of the bilinear resize and its gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import Function
from reference import bilinear_resize as resize
from reference.batch_norm import Array


def _positions(position: Callable[[int, int], Array]) -> Callable[[Function], Function]:
    """A resize that reads at other positions: a function of the sizes in and out."""

    def change(original: Function) -> Function:
        def taps(in_size: int, out_size: int, *, align_corners: bool = True) -> tuple[Any, Array]:
            at = np.clip(position(in_size, out_size), 0.0, in_size - 1.0)
            return at.astype(np.int64), at - np.floor(at)

        return taps

    return change


def aligned(in_size: int, out_size: int) -> Array:
    """Positions that a resize with aligned corners reads."""
    return np.arange(out_size, dtype=np.float64) * ((in_size - 1) / max(out_size - 1, 1))


RESIZE = (
    Misreading(
        "half_pixel",
        "resize",
        "without aligned corners, at positions (i + 1/2) · in / out - 1/2",
        "the cell aligns corners: i · (in - 1) / (out - 1)",
        {"bilinear_resize.interpolation_taps": _positions(lambda i, o: (np.arange(o) + 0.5) * i / o - 0.5)},
    ),
    Misreading(
        "asymmetric",
        "resize",
        "at positions i · in / out",
        "the cell aligns corners: i · (in - 1) / (out - 1)",
        {"bilinear_resize.interpolation_taps": _positions(lambda i, o: np.arange(o) * i / o)},
    ),
    Misreading(
        "nearest",
        "resize",
        "by taking the nearest position",
        "two neighbours are weighted in each direction",
        {"bilinear_resize.interpolation_taps": _positions(lambda i, o: np.floor(aligned(i, o) + 0.5))},
    ),
    Misreading(
        "nearest_even",
        "resize",
        "by taking the nearest position (of two equally near, the even one, as Python's round does)",
        "two neighbours are weighted in each direction",
        {"bilinear_resize.interpolation_taps": _positions(lambda i, o: np.rint(aligned(i, o)))},
    ),
    Misreading(
        "lower_neighbour",
        "resize",
        "by taking the lower neighbour",
        "two neighbours are weighted in each direction",
        {"bilinear_resize.interpolation_taps": _positions(lambda i, o: np.floor(aligned(i, o) + 1e-9))},
    ),
    Misreading(
        "weights_swapped",
        "resize",
        "with the weights of the two neighbours swapped",
        "the nearer one counts more",
        {
            "bilinear_resize.interpolation_taps": lambda f: (
                lambda *sizes, **o: (f(*sizes, **o)[0], np.where(f(*sizes, **o)[1] > 0, 1.0 - f(*sizes, **o)[1], 0.0))
            )
        },
    ),
)


RESIZE_GRADIENT = (
    Misreading(
        "gradient_resized_down",
        "resize_gradient",
        "by resizing the gradient to the input's size",
        "the transposed matrices hand each output's gradient to the neighbours that it read",
        {
            "bilinear_resize.bilinear_resize_backward": lambda f: (
                lambda g, size, **_: resize.bilinear_resize(g, (size[0], size[1]))
            )
        },
    ),
)
