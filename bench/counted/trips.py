"""How often the loops of each kernel are executed, in the order of their addresses in the compiled code.

A kernel that is not named here has no loop. Where programs differ, it is the mean over programs, with the edges of a map left
out. The number of a loop inside another one is that of all its trips together.
"""

from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]  # of a launch, by the kernel's names, constants included


def _of_tiles(a: Arguments) -> int:
    return ceil_div(a["num_tiles"], a["BLOCK_T"])


def _of_outputs(a: Arguments) -> int:
    return ceil_div(a["C_OUT"], a["BLOCK_K"])


def _of_maps(a: Arguments) -> int:
    return sum(ceil_div(channels, a["BLOCK_K"]) for channels in a["channels"])


def _of_cell(a: Arguments) -> list[float]:
    """Strips of a cell's width, and rows of all strips; the last cell has one pixel more than a strip."""
    width, height = (a[f"label_{size}"] / a[f"cells_{size[0]}"] for size in ("width", "height"))
    strips = max(1.0, width / a["BLOCK_X"]) if width % a["BLOCK_X"] < 1 else ceil_div(int(width), a["BLOCK_X"])
    return [strips, strips * height]


TRIPS: dict[str, Callable[[Arguments], list[float]]] = {
    "fold_kernel": lambda a: [_of_tiles(a)] * 2,
    "sum_partials_kernel": lambda a: [_of_tiles(a)],
    "pointwise_forward_kernel": lambda a: [_of_maps(a)],
    "pointwise_input_gradient_kernel": lambda a: [_of_outputs(a)],
    "pointwise_weight_gradient_kernel": lambda a: [ceil_div(a["split_size"], a["BLOCK_K"])],
    "cell_gradients_kernel": _of_cell,
    "separable_inference_kernel": lambda a: [ceil_div(a["C"], a["BLOCK_K"])],
    "mean_loss_kernel": lambda a: [ceil_div(a["cells"], a["BLOCK"])],
}


def trips_of(kernel: str, arguments: Arguments) -> list[float]:
    """A number for each loop of the kernel, launched with these arguments."""
    return TRIPS[kernel](arguments) if kernel in TRIPS else []


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
