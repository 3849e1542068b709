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


def _of_cells(a: Arguments) -> list[float]:
    """The classes of the corners; chunks of label pixels, each with its classes twice; no chunk is computed row by row."""
    chunks = ceil_div(a["rows"], a["ROWS"]) * ceil_div(a["columns"], a["COLUMNS"] * a["LANES"])
    row_by_row = [0.0] * 6
    return [ceil_div(a["K"], a["LANES"]), chunks, a["K"] * chunks, *row_by_row, a["K"] * chunks]


def _of_phases(a: Arguments) -> list[float]:
    """Phases of the rate that a program walks down, and the rows of all of them but each one's last."""
    height, rate, segment_rows, groups = a["height"], a["rate_h"], a["segment_rows"], a["groups"]
    phases = rows = 0
    for group in range(groups):
        first = group // a["phase_groups"] * segment_rows
        first_phase = group % a["phase_groups"] * a["program_phases"]
        for phase in range(first_phase, min(first_phase + a["program_phases"], rate, height)):
            own_rows = len(range(phase, height, rate))
            phases += 1
            rows += max(0, min(first + segment_rows, own_rows - 1) - first)
    return [phases / groups, rows / groups]


TRIPS: dict[str, Callable[[Arguments], list[float]]] = {
    "fold_kernel": lambda a: [_of_tiles(a)] * 2,
    "sum_partials_kernel": lambda a: [_of_tiles(a)],
    "pointwise_forward_kernel": lambda a: [_of_maps(a)],
    "pointwise_input_gradient_kernel": lambda a: [_of_outputs(a)],
    "pointwise_weight_gradient_kernel": lambda a: [ceil_div(a["split_size"], a["BLOCK_K"])],
    "cell_gradients_kernel": _of_cells,
    "depthwise_forward_kernel": _of_phases,
    "depthwise_backward_kernel": _of_phases,
    "mean_loss_kernel": lambda a: [ceil_div(a["programs"], a["BLOCK"])],
}


def trips_of(kernel: str, arguments: Arguments) -> list[float]:
    """A number for each loop of the kernel, launched with these arguments."""
    return TRIPS[kernel](arguments) if kernel in TRIPS else []


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
