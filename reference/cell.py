"""The vocabulary: a Dense Prediction Cell (DPC) as immutable data.

A cell is a directed acyclic graph of B branches (paper, section 3.1). Branch i reads one map, either the backbone feature
(`input_index == BACKBONE_FEATURE`) or the output of an earlier branch, and applies one operation. The outputs of *all*
branches are concatenated and projected.

Two things are not the paper's. A cell may read several layers of a backbone: input −1 is the deepest, −2, −3 and so on are the
others, in the order in which they are given. And a cell without branches, which has nothing to concatenate and to project, is
the batch norm of its inputs alone: with a 1×1 classifier behind it, the linear probe of frozen features.

The exchange format is the authors' JSON, unchanged
(`research/deeplab/core/dense_prediction_cell_branch5_top1_cityscapes.json`): a list with one object per branch, `{"op":
"conv", "kernel": 3, "rate": [h, w], "input": i}`, `{"op": "conv", "kernel": 1, "input": i}` or `{"op": "pyramid_pooling",
"grid_size": [h, w], "input": i}`. Sizes are in (height, width) order everywhere.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias, assert_never

BACKBONE_FEATURE = -1
NUM_BRANCHES = 5  # B of the paper
RATES = (1, 3, 6, 9, 12, 15, 18, 21)
GRID_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Conv1x1:
    """The 1×1 convolution."""

    def __str__(self) -> str:
        return "conv1x1"


@dataclass(frozen=True, slots=True)
class AtrousSeparableConv:
    """The 3×3 atrous separable convolution at `rate`, (rate_h, rate_w). Raises ValueError, naming the field.

    >>> print(AtrousSeparableConv(rate=(6, 21)))
    sep3x3 6x21
    >>> AtrousSeparableConv(rate=(0, 1))
    Traceback (most recent call last):
    ValueError: rate must be two integers of at least 1, as [height, width], got (0, 1)
    """

    rate: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", _height_width(self.rate, "rate"))

    def __str__(self) -> str:
        return "sep3x3 {}x{}".format(*self.rate)

    def rate_times(self, multiplier: int) -> tuple[int, int]:
        """The rate at another output stride: `rate_multiplier_for` of reference/dense_prediction_cell.py."""
        return (self.rate[0] * multiplier, self.rate[1] * multiplier)


@dataclass(frozen=True, slots=True)
class PyramidPooling:
    """The pyramid pooling over `grid_size`, (grid_h, grid_w). Raises ValueError, naming the field.

    >>> print(PyramidPooling(grid_size=(4, 4)))
    pool 4x4
    """

    grid_size: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid_size", _height_width(self.grid_size, "grid_size"))

    def __str__(self) -> str:
        return "pool {}x{}".format(*self.grid_size)


# One operation of a branch; each keeps the map's size and ends in batch norm and ReLU, a pooling in the resize behind them.
# Any positive integers are valid here; which of them a search may propose is the business of its search space. Whoever decides
# on an operation does so by `match` and ends in `assert_never`, so that mypy names each place that an operation added here has
# to be taught. `str` of an operation is its name in the databases of searches and must not change.
Operation: TypeAlias = Conv1x1 | AtrousSeparableConv | PyramidPooling


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch: the map it reads (`BACKBONE_FEATURE`, −2 and so on for other layers, or an earlier branch's index) and its
    operation.
    """

    input_index: int
    operation: Operation


@dataclass(frozen=True, slots=True)
class Cell:
    """A Dense Prediction Cell: branches in order; validated, hashable, without weights.

    Raises ValueError, naming the branch and the field, for an input that is not an earlier map.

    >>> cell = Cell.from_json(
    ...     '[{"op": "conv", "kernel": 1, "input": -2}, {"op": "pyramid_pooling", "grid_size": [1, 1], "input": 0}]'
    ... )
    >>> print(cell)
    conv1x1(F2), pool 1x1(0)
    >>> cell.num_inputs
    2
    >>> Cell.from_json(cell.to_json()) == cell
    True
    >>> print(Cell(()))
    norm
    """

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", tuple(self.branches))
        for i, branch in enumerate(self.branches):
            if not _is_int(branch.input_index) or not branch.input_index < i:
                choices = "-1 (the backbone feature), -2 and so on (its other layers)"
                choices += f" or an earlier branch, 0 to {i - 1}" if i else ""
                raise ValueError(f"branch {i}: input must be {choices}, got {branch.input_index!r}")

    def __str__(self) -> str:
        return ", ".join(f"{b.operation}({input_name(b.input_index)})" for b in self.branches) or "norm"

    @property
    def num_inputs(self) -> int:
        """How many layers of a backbone the cell needs, at least 1; one without branches reads all that there are."""
        return max([1, *(-branch.input_index for branch in self.branches)])

    def require_inputs(self, count: int) -> None:
        """Raise ValueError if the cell needs more inputs than so many."""
        if self.num_inputs > count:
            given = "1 layer" if count == 1 else f"{count} layers"
            raise ValueError(f"the cell reads input {-self.num_inputs}, and the backbone gives {given}")

    def channels_read(self, input_channels: Sequence[int], branch_channels: int) -> list[int]:
        """The number of channels that each branch reads. Raises ValueError if the cell needs more inputs than there are."""
        self.require_inputs(len(input_channels))
        indices = (branch.input_index for branch in self.branches)
        return [input_channels[BACKBONE_FEATURE - i] if i < 0 else branch_channels for i in indices]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a cell in the authors' format. Raises ValueError naming the branch and the key."""
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or absurd nesting
            raise ValueError(f"not valid JSON: {error}") from error
        if not isinstance(items, list):
            raise ValueError(f"a cell is a JSON list with one object per branch, got {type(items).__name__}")
        return cls(tuple(_branch_from_json(item, i) for i, item in enumerate(items)))

    def to_json(self) -> str:
        """Write the authors' format, one branch per line."""
        return "[" + ",\n ".join(json.dumps(_branch_to_json(branch)) for branch in self.branches) + "]\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a cell's JSON file. Raises ValueError naming the file, OSError if it cannot be read."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # also a file that is not text
            raise ValueError(f"{path}: {error}") from error


def input_name(input_index: int) -> str:
    """F for the backbone feature, F2, F3 and so on for its other layers, or the number of a branch."""
    if input_index == BACKBONE_FEATURE:
        return "F"
    return f"F{-input_index}" if input_index < 0 else f"{input_index}"


def _branch_from_json(item: Any, i: int) -> Branch:
    if not isinstance(item, Mapping):
        raise ValueError(f"branch {i}: must be a JSON object, got {item!r}")
    kinds = {"conv": {"op", "kernel", "rate", "input"}, "pyramid_pooling": {"op", "grid_size", "input"}}
    op = item.get("op")
    if not isinstance(op, str) or op not in kinds:
        raise ValueError(f'branch {i}: op must be "conv" or "pyramid_pooling", got {op!r}')
    for key in item.keys() - kinds[op]:
        raise ValueError(f"branch {i}: unknown key {key!r} for op {op!r}; known keys are {', '.join(sorted(kinds[op]))}")
    if "input" not in item:
        raise ValueError(f"branch {i}: key 'input' is missing; -1 is the backbone feature, i is branch i")
    try:
        return Branch(item["input"], _operation_from_json(item))
    except ValueError as error:
        raise ValueError(f"branch {i}: {error}") from error


def _operation_from_json(item: Mapping[str, Any]) -> Operation:
    rate: Any = item.get("rate")  # whatever the file says, or None: the operation refuses what is no rate
    grid_size: Any = item.get("grid_size")
    if item["op"] == "pyramid_pooling":
        return PyramidPooling(grid_size)
    kernel = item.get("kernel")
    if kernel in (1, [1, 1]) and _all_ints(kernel):
        if rate not in (None, 1, [1, 1]):  # a rate means nothing to a 1×1 kernel; accept only the neutral one
            raise ValueError(f"rate has no effect on a 1x1 kernel, remove it, got {rate!r}")
        return Conv1x1()
    if kernel in (3, [3, 3]) and _all_ints(kernel):
        return AtrousSeparableConv(rate)
    raise ValueError(f"kernel must be 1 or 3, got {kernel!r}")


def _branch_to_json(branch: Branch) -> dict[str, Any]:
    fields: dict[str, Any]
    match branch.operation:
        case Conv1x1():
            fields = {"kernel": 1, "op": "conv"}
        case AtrousSeparableConv(rate):
            fields = {"kernel": 3, "rate": [*rate], "op": "conv"}
        case PyramidPooling(grid_size):
            fields = {"grid_size": [*grid_size], "op": "pyramid_pooling"}
        case _:
            assert_never(branch.operation)
    return fields | {"input": branch.input_index}


def _height_width(value: Any, field: str) -> tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(_is_int(size) and size >= 1 for size in value):
        return (value[0], value[1])
    raise ValueError(f"{field} must be two integers of at least 1, as [height, width], got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all_ints(value: Any) -> bool:
    return all(map(_is_int, value if isinstance(value, list) else [value]))


def operations_of(rates: Sequence[int], grid_sizes: Sequence[int]) -> tuple[Operation, ...]:
    """The 1×1 convolution, and the atrous convolutions and poolings of all pairs of these rates and grid sizes."""
    return (
        Conv1x1(),
        *(AtrousSeparableConv(rate=(h, w)) for h in rates for w in rates),
        *(PyramidPooling(grid_size=(h, w)) for h in grid_sizes for w in grid_sizes),
    )


# The 81 operations of the paper (section 3.1): 1 + 8·8 + 4·4, in the order that the search's indices refer to.
OPERATIONS = operations_of(RATES, GRID_SIZES)
