"""The cost of a cell against the paper's Table 1 and against what PyTorch itself counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import Cell
from reference.pyramid_pooling import PoolingVariant
from search.cells.cost import Cost, cell_cost
from search.cells.space import load_cell
from tests.strategies import cells

CITYSCAPES = (65, 129)  # features of a 1025 × 2049 image at output stride 16
MOBILENET, XCEPTION = 320, 2048  # channels of the paper's two backbones


@pytest.mark.parametrize(("channels", "parameters"), [(MOBILENET, 356_160), (XCEPTION, 814_080)])
def test_parameters_of_the_published_cell(channels: int, parameters: int) -> None:
    assert cell_cost(load_cell("dpc"), channels, CITYSCAPES).total.parameters == parameters


@pytest.mark.parametrize(
    ("name", "channels", "multiply_adds"),
    [("aspp", MOBILENET, 2.82e9), ("dpc", MOBILENET, 3.00e9), ("aspp", XCEPTION, 18.12e9), ("dpc", XCEPTION, 6.84e9)],
)
def test_multiply_adds_are_within_a_percent_of_table_1(name: str, channels: int, multiply_adds: float) -> None:
    assert cell_cost(load_cell(name), channels, CITYSCAPES).total.multiply_adds == pytest.approx(multiply_adds, rel=0.01)


def test_parameters_by_hand() -> None:
    cell = Cell.from_json(
        '[{"op": "conv", "kernel": 3, "rate": [1, 6], "input": -1}, {"op": "conv", "kernel": 1, "input": 0},'
        ' {"op": "pyramid_pooling", "grid_size": [2, 4], "input": -1}]'
    )
    cost = cell_cost(cell, 10, (7, 9), branch_channels=4, cell_channels=3)
    assert [branch.parameters for branch in cost.branches] == [9 * 10 + 10 * 4, 4 * 4, 10 * 4]
    assert [branch.multiply_adds for branch in cost.branches[:2]] == [(90 + 40) * 63, 16 * 63]
    assert cost.projection == Cost(3 * 4 * 3, 3 * 4 * 3 * 63)
    assert cost.total == cost.branches[0] + cost.branches[1] + cost.branches[2]


def test_a_mean_per_grid_cell_costs_one_product_per_cell() -> None:
    cell = Cell.from_json('[{"op": "pyramid_pooling", "grid_size": [2, 4], "input": -1}]')
    assert cell_cost(cell, 10, (7, 9), branch_channels=4, pooling="grid_cells").total == Cost(40, 40 * 2 * 4)
    assert cell_cost(cell, 10, (7, 9), branch_channels=4).total == Cost(40, 40 * (7 - 4 + 1) * (9 - 3 + 1))
    assert cell_cost(cell, 10, (7, 9), branch_channels=4, pooling_size=(4, 4)).total == Cost(40, 40 * (7 - 2 + 1) * 9)


def test_a_cell_without_branches_costs_nothing() -> None:
    cost = cell_cost(Cell(()), (10, 20), (7, 9))
    assert (cost.total, cost.projection) == (Cost(0, 0), Cost(0, 0))


@given(
    cell=cells(max_branches=6, num_inputs=3),
    in_channels=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    branch_channels=st.integers(1, 8),
)
def test_parameters_are_those_of_the_module(cell: Cell, in_channels: tuple[int, ...], branch_channels: int) -> None:
    module = DensePredictionCell(cell, in_channels, branch_channels=branch_channels, cell_channels=5)
    cost = cell_cost(cell, in_channels, (3, 4), branch_channels=branch_channels, cell_channels=5)
    counted = {name: p.numel() for name, p in module.named_parameters() if p.ndim == 4}  # convolutions
    assert cost.projection.parameters == counted.pop("projection.weight")
    for i, branch in enumerate(cost.branches):
        assert branch.parameters == sum(count for name, count in counted.items() if name.startswith(f"branches.{i}."))
    assert cost.total.parameters == sum(counted.values())


@given(
    cell=cells(max_branches=4),
    size=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    in_channels=st.integers(1, 20),
    output_stride=st.sampled_from((8, 16)),
    pooling=st.sampled_from([("sliding_window", None), ("sliding_window", (2, 2)), ("grid_cells", None)]),
)
def test_multiply_adds_are_those_that_pytorch_counts(
    cell: Cell,
    size: tuple[int, int],
    in_channels: int,
    output_stride: int,
    pooling: tuple[PoolingVariant, tuple[int, int] | None],
) -> None:
    variant, pooling_size = pooling
    options: dict[str, Any] = {"branch_channels": 6, "cell_channels": 5, "pooling": variant, "pooling_size": pooling_size}
    module = DensePredictionCell(cell, in_channels, output_stride=output_stride, **options).eval()
    whole, branches = conv_multiply_adds(module, torch.zeros(1, in_channels, *size))
    cost = cell_cost(cell, in_channels, size, **options)
    assert branches == [branch.multiply_adds for branch in cost.branches]
    assert whole == cost.total.multiply_adds + cost.projection.multiply_adds


@torch.inference_mode()
def conv_multiply_adds(module: DensePredictionCell, features: torch.Tensor) -> tuple[int, list[int]]:
    """Of the cell as it is, kernels or not, and of each branch."""

    def count(counts: dict[Any, int]) -> int:
        return sum(counts.values()) // 2

    with FlopCounterMode(display=False) as counter:
        module(features)
    counts = counter.get_flop_counts()
    name = type(module).__name__
    return count(counts[name]), [count(counts.get(f"{name}.branches.{i}", {})) for i in range(len(module.branches))]
