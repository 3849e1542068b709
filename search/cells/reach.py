"""What the size of a map decides about operations: which of them do the same there, and what lies out of reach.

A 3×3 convolution of rate r reads r rows above and below. On a map of H ≤ r rows these lie beyond its border, where all is
zero: such a rate is *out of reach*, its outer taps add nothing and get no gradient, and all rates of at least H are the same
operation. A pooling over sliding windows of ceil(H / grid) rows is the same for all grids with equal windows; with windows of
one feature along both axes there is nothing to average, and it is the 1×1 convolution.

With `grid_cells`, grids differ in the number of their means, and only a grid of the map's own size is the 1×1 convolution.
(A grid of twice that size has each mean twice and comes to the same output at another cost: it counts as different.)

Equality is that of single operations. Cells that come to the same for another reason, such as a pooling that reads the
constant map of a global pooling, count as different.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from reference.cell import AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.pyramid_pooling import PoolingVariant, window_size

Size = tuple[int, int]  # height and width, in features


@dataclass(frozen=True)
class FeatureMaps:
    """The maps that the cells of a run read: whole ones in validation, crops in training; with what else decides there."""

    validation: Size
    training: Size
    rate_multiplier: int = 1  # as in `reference.dense_prediction_cell.BranchOptions`
    pooling: PoolingVariant = "sliding_window"
    pooling_size: Size | None = None

    def smallest(self, operation: Operation) -> Operation:
        """The operation of the smallest rates or grids that does the same on all these maps, at the same cost.

        >>> print(FeatureMaps((17, 17), (17, 17)).smallest(AtrousSeparableConv(rate=(21, 9))))
        sep3x3 17x9
        """
        match operation:
            case Conv1x1():
                return operation
            case AtrousSeparableConv(rate):
                return AtrousSeparableConv((self._smallest_rate(rate[0], 0), self._smallest_rate(rate[1], 1)))
            case PyramidPooling(grid_size):
                if self.pooling == "grid_cells":
                    return Conv1x1() if all(grid_size == size for size in self._sizes) else operation
                if all(all(self._is_single(grid_size, size)) for size in self._sizes):
                    return Conv1x1()
                return PyramidPooling((self._smallest_grid(grid_size[0], 0), self._smallest_grid(grid_size[1], 1)))
            case _:
                assert_never(operation)

    def remarks(self, named: Iterable[tuple[str, Operation]]) -> list[str]:
        """Which of the named operations are out of reach, and along which axes: at most a sentence for each kind of map.

        >>> maps = FeatureMaps(validation=(17, 33), training=(9, 33))
        >>> maps.remarks([("rate 12×6", AtrousSeparableConv((12, 6))), ("rate 18×6", AtrousSeparableConv((18, 6)))])
        ['out of reach on the 17×33 map: rate 18×6 (height)', 'out of reach in the 9×33 training crops: rate 12×6 (height)']
        """
        on_map, in_crops = [], []
        for name, operation in named:
            whole, crop = (self._out_of_reach(operation, size) for size in self._sizes)
            on_map.append((name, whole))
            in_crops.append((name, (crop[0] and not whole[0], crop[1] and not whole[1])))
        places = {
            f"on the {size_text(self.validation)} map": _by_axes(on_map),
            f"in the {size_text(self.training)} training crops": _by_axes(in_crops),
        }
        return [f"out of reach {place}: {found}" for place, found in places.items() if found]

    def cell_remarks(self, cell: Cell) -> list[str]:
        """`remarks` about the branches of a cell."""
        return self.remarks(
            (f"{_numbers(branch.operation)} of branch {i}", branch.operation) for i, branch in enumerate(cell.branches)
        )

    @property
    def _sizes(self) -> tuple[Size, Size]:
        return self.validation, self.training

    def _smallest_rate(self, rate: int, axis: int) -> int:
        largest = max(size[axis] for size in self._sizes)
        return min(rate, -(-largest // self.rate_multiplier))  # the first that is out of reach

    def _smallest_grid(self, grid: int, axis: int) -> int:
        def windows(grid: int) -> list[int]:
            return [self._window(grid, size, axis) for size in self._sizes]

        return next(smaller for smaller in range(1, grid + 1) if windows(smaller) == windows(grid))

    def _window(self, grid: int, size: Size, axis: int) -> int:
        return window_size((self.pooling_size or size)[axis], grid)

    def _is_single(self, grid_size: tuple[int, int], size: Size) -> tuple[bool, bool]:
        """Along height and width: whether no feature is averaged with another."""
        if self.pooling == "grid_cells":
            return grid_size[0] % size[0] == 0, grid_size[1] % size[1] == 0
        return self._window(grid_size[0], size, 0) == 1, self._window(grid_size[1], size, 1) == 1

    def _out_of_reach(self, operation: Operation, size: Size) -> tuple[bool, bool]:
        """Along height and width: whether a convolution's outer taps, or a pooling's neighbours in a window, are not there."""
        match operation:
            case Conv1x1():
                return False, False
            case AtrousSeparableConv():
                rate = operation.rate_times(self.rate_multiplier)
                return rate[0] >= size[0], rate[1] >= size[1]
            case PyramidPooling(grid_size):
                return self._is_single(grid_size, size)
            case _:
                assert_never(operation)


def size_text(size: Size) -> str:
    """The size of a map as it is written in a sentence."""
    return "{}×{}".format(*size)


def _by_axes(named: Iterable[tuple[str, tuple[bool, bool]]]) -> str:
    """The names of what is out of reach along height, width or both, together for each of these three."""
    groups: dict[str, list[str]] = {}
    for name, (height, width) in named:
        if height or width:
            axes = "height and width" if height and width else "height" if height else "width"
            groups.setdefault(axes, []).append(name)
    return "; ".join(f"{', '.join(names)} ({axes})" for axes, names in groups.items())


def _numbers(operation: Operation) -> str:
    match operation:
        case Conv1x1():
            return str(operation)
        case AtrousSeparableConv(rate):
            return f"rate {size_text(rate)}"
        case PyramidPooling(grid_size):
            return f"grid {size_text(grid_size)}"
        case _:
            assert_never(operation)
