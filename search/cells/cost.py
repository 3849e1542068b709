"""Parameters and multiply-adds of a cell, counted as the paper's Table 1 counts them.

Only convolution weights count, not batch norms. The 1×1 projection behind the concatenation is given separately, as
`projection`. One multiply-add is two floating point operations. This gives the published cell's 0.36M and 0.81M parameters
exactly, and all four rows of multiply-adds within one percent (the paper's rows themselves follow no single rule).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.pyramid_pooling import PoolingVariant, window_size


@dataclass(frozen=True)
class Cost:
    """Number of weights, and multiply-adds for one image."""

    parameters: int
    multiply_adds: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True)
class CellCost:
    """The cost of each branch, in order, their sum (what Table 1 states), and the projection, which Table 1 leaves out."""

    branches: tuple[Cost, ...]
    projection: Cost

    @property
    def total(self) -> Cost:
        return sum(self.branches, start=Cost(0, 0))


def cell_cost(
    cell: Cell,
    in_channels: int | Sequence[int],
    feature_size: tuple[int, int],
    *,
    branch_channels: int = 256,
    cell_channels: int = 256,
    pooling: PoolingVariant = "sliding_window",
    pooling_size: tuple[int, int] | None = None,
) -> CellCost:
    """Cost of a cell on a feature map of (h, w) = `feature_size`; the other arguments are those of the cell's module.

    A cell without branches has no convolution, and so costs nothing. Raises ValueError for one that needs more inputs.

    >>> from search.cells.space import load_cell
    >>> cell_cost(load_cell("dpc"), 320, (65, 129)).total  # a Cityscapes image at output stride 16
    Cost(parameters=356160, multiply_adds=2986401600)
    """
    branches = []
    input_channels = (in_channels,) if isinstance(in_channels, int) else in_channels
    for branch, channels in zip(cell.branches, cell.channels_read(input_channels, branch_channels), strict=True):
        branches.append(_operation_cost(branch.operation, channels, branch_channels, feature_size, pooling, pooling_size))
    projection = _pointwise_cost(len(branches) * branch_channels, cell_channels, feature_size)  # 0 without branches
    return CellCost(tuple(branches), projection)


def module_cost(context: DensePredictionCell, feature_size: tuple[int, int]) -> CellCost:
    """`cell_cost` of a cell with weights."""
    return cell_cost(
        context.cell,
        context.input_channels,
        feature_size,
        branch_channels=context.branch_channels,
        cell_channels=context.cell_channels,
        pooling=context.pooling,
        pooling_size=context.pooling_size,
    )


def _operation_cost(
    operation: Operation,
    in_channels: int,
    channels: int,
    size: tuple[int, int],
    pooling: PoolingVariant,
    pooling_size: tuple[int, int] | None,
) -> Cost:
    match operation:
        case Conv1x1():
            return _pointwise_cost(in_channels, channels, size)
        case AtrousSeparableConv():
            depthwise = Cost(9 * in_channels, 9 * in_channels * size[0] * size[1])
            return depthwise + _pointwise_cost(in_channels, channels, size)
        case PyramidPooling(grid_size):  # its convolution runs on the pooled map
            return _pointwise_cost(in_channels, channels, _pooled_size(size, grid_size, pooling, pooling_size))
        case _:
            assert_never(operation)


def _pooled_size(
    size: tuple[int, int], grid_size: tuple[int, int], pooling: PoolingVariant, pooling_size: tuple[int, int] | None
) -> tuple[int, int]:
    """The number of means along each of the two axes."""
    if pooling == "grid_cells":
        return grid_size
    pins = pooling_size or (None, None)
    windows = [window_size(extent, grid, pin) for extent, grid, pin in zip(size, grid_size, pins, strict=True)]
    return size[0] - windows[0] + 1, size[1] - windows[1] + 1


def _pointwise_cost(in_channels: int, channels: int, size: tuple[int, int]) -> Cost:
    return Cost(in_channels * channels, in_channels * channels * size[0] * size[1])
