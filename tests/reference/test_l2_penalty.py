import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm
from reference.cell import Cell
from reference.dense_prediction_cell import CellWeights
from reference.l2_penalty import Weights, l2_penalty, l2_penalty_backward
from reference.pointwise_conv import ConvNorm
from search.cells.space import load_cell
from tests.reference.directional_derivative import assert_gradient, leaves
from tests.strategies import cells, random_cell_weights, random_decoder_weights, rng_seeds


def network_weights(cell: Cell, rng: np.random.Generator) -> tuple[Weights, ...]:
    """Of a cell, a decoder and a classifier."""
    weights = random_cell_weights(cell, 3, 4, 5, rng)
    return weights, random_decoder_weights(5, 3, 2, rng), rng.standard_normal((6, 5, 1, 1))


def test_hand_value() -> None:
    """Depthwise weights of 7 and norms of 9 are not in it: 2/2 · (1² + 3² + 4² + 2²)."""
    norm = BatchNorm(*np.full((4, 2), 9.0))
    separable = SeparableConv(ConvNorm(np.full((2, 1, 3, 3), 7.0), norm), ConvNorm(np.array([[1.0, 3.0]]), norm))
    weights = CellWeights((separable, ConvNorm(np.array([[4.0]]), norm)), ConvNorm(np.array([[-2.0]]), norm))
    assert l2_penalty(weights, weight_decay=2.0) == 30.0
    gradient = l2_penalty_backward(weights, weight_decay=2.0)
    assert isinstance(gradient, CellWeights)
    first, _ = gradient.branches
    assert isinstance(first, SeparableConv)
    assert first.pointwise.weight.tolist() == [[2.0, 6.0]]
    assert gradient.projection.weight.tolist() == [[-4.0]]
    assert sum(np.count_nonzero(array) for array in leaves(gradient)) == 4


@given(cells(min_branches=0), st.sampled_from((0.0, 4e-5, 1.0)), rng_seeds())
def test_gradient(cell: Cell, weight_decay: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = network_weights(cell, rng)

    def penalty(*weights: Weights) -> Array:
        return np.asarray(l2_penalty(weights, weight_decay=weight_decay))

    assert_gradient(penalty, weights, l2_penalty_backward(weights, weight_decay=weight_decay), np.ones(()), rng)


def test_a_cell_without_branches_has_no_penalty() -> None:
    assert l2_penalty(random_cell_weights(Cell(()), 3, 4, 5, np.random.default_rng(0)), weight_decay=1.0) == 0.0


def test_as_many_tensors_decay_as_the_authors_regularise() -> None:
    """Of the published cell six: five pointwise convolutions and the projection; with a decoder three more."""
    gradients = l2_penalty_backward(network_weights(load_cell("dpc"), np.random.default_rng(0)), weight_decay=1.0)
    assert [sum(array.any() for array in leaves((part,))) for part in gradients] == [6, 3, 1]


@pytest.mark.parametrize("weight_decay", [0.0, 4e-5])
def test_the_gradient_is_the_weight_times_the_decay(weight_decay: float) -> None:
    rng = np.random.default_rng(0)
    weights = ConvNorm(rng.standard_normal((3, 2, 1, 1)), BatchNorm(*rng.standard_normal((4, 3))))
    gradient = l2_penalty_backward(weights, weight_decay=weight_decay)
    assert np.array_equal(gradient.weight, weight_decay * weights.weight)
    assert not any(array.any() for array in gradient.norm)
