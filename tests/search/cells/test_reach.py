"""Operations that count as one do the same, to the last digit, forward and backward; those that count as two do not."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fast.dense_prediction_cell import DensePredictionCell, decays
from fast.kernels import using
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array
from reference.cell import (
    BACKBONE_FEATURE,
    OPERATIONS,
    AtrousSeparableConv,
    Branch,
    Cell,
    Conv1x1,
    Operation,
    PyramidPooling,
)
from reference.dense_prediction_cell import BranchOptions, BranchWeights, apply_operation, apply_operation_backward
from reference.pyramid_pooling import PoolingVariant
from search.cells.cost import cell_cost
from search.cells.reach import FeatureMaps, Size
from tests.strategies import map_sizes, operations, random_pointwise, random_separable, rng_seeds

WHO_COMPUTES: dict[str, Callable[[], AbstractContextManager[None]]] = {"kernels": nullcontext, "PyTorch": lambda: using(None)}


def feature_maps() -> st.SearchStrategy[FeatureMaps]:
    """Small ones, on which much is out of reach."""
    multipliers, variants = st.sampled_from((1, 2)), st.sampled_from(get_args(PoolingVariant))
    return st.builds(FeatureMaps, map_sizes(), map_sizes(), multipliers, variants)


def single(operation: Operation) -> Cell:
    return Cell((Branch(BACKBONE_FEATURE, operation),))


def options_on(maps: FeatureMaps, *, training: bool = True) -> BranchOptions:
    return BranchOptions(training, maps.rate_multiplier, maps.pooling)


def weights_for(operation: Operation, rng: np.random.Generator) -> BranchWeights[Array]:
    return random_separable(2, 3, rng) if isinstance(operation, AtrousSeparableConv) else random_pointwise(2, 3, rng)


def flat(nested: Any) -> list[Array]:
    return [array for part in nested for array in flat(part)] if isinstance(nested, tuple) else [nested]


@given(operations(), feature_maps(), st.booleans(), rng_seeds())
def test_the_smallest_operation_is_the_same_in_the_reference(
    operation: Operation, maps: FeatureMaps, training: bool, seed: int
) -> None:
    smallest, options, rng = maps.smallest(operation), options_on(maps, training=training), np.random.default_rng(seed)
    weights = weights_for(operation, rng)
    for size in (maps.validation, maps.training):
        x, grad_output = rng.standard_normal((2, 2, *size)), rng.standard_normal((2, 3, *size))
        expected = apply_operation(x, operation, weights, options)
        np.testing.assert_array_equal(apply_operation(x, smallest, weights, options), expected)
        gradients = [apply_operation_backward(grad_output, x, op, weights, options) for op in (operation, smallest)]
        for actual, wanted in zip(*map(flat, gradients), strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("who", WHO_COMPUTES)
@given(operations(), feature_maps(), rng_seeds())
def test_the_smallest_operation_is_the_same_in_the_fast_path(
    who: str, operation: Operation, maps: FeatureMaps, seed: int
) -> None:
    for size in (maps.validation, maps.training):
        expected, actual = (outputs_and_gradients(op, maps, size, who, seed) for op in (operation, maps.smallest(operation)))
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected))


def outputs_and_gradients(operation: Operation, maps: FeatureMaps, size: Size, who: str, seed: int) -> list[Tensor]:
    """Of a cell of this operation in training: its output, the running statistics, the gradients of features and weights."""
    torch.manual_seed(seed)
    stride = 16 // maps.rate_multiplier
    module = DensePredictionCell(
        single(operation), 2, branch_channels=4, cell_channels=4, output_stride=stride, dropout_rate=0.0, pooling=maps.pooling
    )
    x, grad_output = torch.randn(2, 2, *size, requires_grad=True), torch.randn(2, 4, *size)
    with WHO_COMPUTES[who]():
        y = module(x)
        y.backward(grad_output)
    gradients = [cast(Tensor, tensor.grad) for tensor in (x, *module.parameters())]
    return [y, *module.buffers(), *gradients]


@given(operations(), feature_maps())
def test_the_smallest_operation_is_its_own_and_costs_the_same(operation: Operation, maps: FeatureMaps) -> None:
    smallest = maps.smallest(operation)
    assert maps.smallest(smallest) == smallest
    for size in (maps.validation, maps.training):
        costs = [cell_cost(single(op), 2, size, pooling=maps.pooling) for op in (operation, smallest)]
        assert costs[0] == costs[1]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 4), (8, 8), (17, 9)])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_all_other_operations_differ(size: Size, multiplier: int) -> None:
    maps = FeatureMaps(size, size, multiplier)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2, *size))
    separable, pointwise = random_separable(2, 3, rng), random_pointwise(2, 3, rng)
    different = set(map(maps.smallest, OPERATIONS))
    for is_separable, weights in ((True, separable), (False, pointwise)):  # other weights are another operation anyway
        outputs = [
            apply_operation(x, operation, weights, options_on(maps, training=False))
            for operation in different
            if isinstance(operation, AtrousSeparableConv) == is_separable
        ]
        assert not any(np.array_equal(one, other) for one, other in combinations(outputs, 2))


@pytest.mark.parametrize(
    ("maps", "operation", "smallest"),
    [
        (FeatureMaps((17, 17), (17, 17)), AtrousSeparableConv((18, 9)), AtrousSeparableConv((17, 9))),
        (FeatureMaps((17, 17), (17, 17)), AtrousSeparableConv((16, 16)), AtrousSeparableConv((16, 16))),
        (FeatureMaps((17, 33), (17, 33), 2), AtrousSeparableConv((9, 18)), AtrousSeparableConv((9, 17))),
        (FeatureMaps((17, 17), (9, 9)), AtrousSeparableConv((12, 18)), AtrousSeparableConv((12, 17))),  # trained or not
        (FeatureMaps((9, 9), (17, 17)), AtrousSeparableConv((12, 18)), AtrousSeparableConv((12, 17))),
        (FeatureMaps((17, 17), (17, 17)), PyramidPooling((7, 8)), PyramidPooling((6, 6))),  # windows of 3
        (FeatureMaps((17, 17), (13, 17)), PyramidPooling((7, 8)), PyramidPooling((7, 6))),  # in crops of 13 rows: of 2
        (FeatureMaps((8, 8), (8, 8)), PyramidPooling((8, 8)), Conv1x1()),
        (FeatureMaps((8, 9), (8, 9)), PyramidPooling((8, 8)), PyramidPooling((8, 5))),
        (FeatureMaps((8, 8), (8, 8), 1, "grid_cells"), PyramidPooling((8, 8)), Conv1x1()),
        (FeatureMaps((8, 8), (5, 8), 1, "grid_cells"), PyramidPooling((8, 8)), PyramidPooling((8, 8))),
        (FeatureMaps((4, 4), (4, 4), 1, "grid_cells"), PyramidPooling((8, 8)), PyramidPooling((8, 8))),  # at another cost
        (FeatureMaps((8, 8), (8, 8), 1, "sliding_window", (16, 16)), PyramidPooling((8, 8)), PyramidPooling((8, 8))),
    ],
)
def test_smallest_by_hand(maps: FeatureMaps, operation: Operation, smallest: Operation) -> None:
    assert maps.smallest(operation) == smallest


def test_taps_out_of_reach_keep_their_initial_weights() -> None:
    torch.manual_seed(0)
    module = DensePredictionCell(single(AtrousSeparableConv((18, 9))), 2, branch_channels=4, cell_channels=4)
    module(torch.randn(2, 2, 17, 17)).square().sum().backward()
    depthwise = dict(module.named_parameters())["branches.0.depthwise.weight"]
    weights = cast(SeparableConv[Tensor], module.weights().branches[0])
    assert weights.depthwise.weight is depthwise
    assert not decays(module)["branches.0.depthwise.weight"]
    assert depthwise.grad is not None
    assert not depthwise.grad[:, :, [0, 2]].any()
    assert depthwise.grad[:, :, 1].all()


def test_remarks_name_the_branch_and_the_axes() -> None:
    operations = (AtrousSeparableConv((18, 9)), Conv1x1(), AtrousSeparableConv((15, 21)), PyramidPooling((8, 1)))
    cell = Cell(tuple(Branch(BACKBONE_FEATURE, operation) for operation in operations))
    assert FeatureMaps((17, 17), (13, 8)).cell_remarks(cell) == [
        "out of reach on the 17×17 map: rate 18×9 of branch 0 (height); rate 15×21 of branch 2 (width)",
        "out of reach in the 13×8 training crops: rate 18×9 of branch 0 (width); rate 15×21 of branch 2 (height)",
    ]
    assert FeatureMaps((5, 17), (5, 17)).cell_remarks(cell) == [
        "out of reach on the 5×17 map: rate 18×9 of branch 0, grid 8×1 of branch 3 (height); "
        "rate 15×21 of branch 2 (height and width)"
    ]
    assert FeatureMaps((33, 33), (33, 33)).cell_remarks(cell) == []
    assert FeatureMaps((4, 33), (4, 33), pooling="grid_cells").remarks([("grid 8", PyramidPooling((8, 8)))]) == [
        "out of reach on the 4×33 map: grid 8 (height)"  # each feature is a mean, twice
    ]
