import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.atrous_separable_conv import SeparableConv, atrous_separable_conv
from reference.batch_norm import Array, batch_norm
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
from reference.dense_prediction_cell import (
    BranchOptions,
    CellWeights,
    apply_operation,
    branch_outputs,
    dense_prediction_cell,
    dense_prediction_cell_backward,
    rate_multiplier_for,
)
from reference.pointwise_conv import ConvNorm, conv1x1
from reference.pyramid_pooling import PoolingVariant, pyramid_pooling
from tests.reference.directional_derivative import assert_gradient
from tests.strategies import cells, map_sizes, random_cell_weights, random_pointwise, rng_seeds

VARIANTS = st.sampled_from(("sliding_window", "grid_cells"))
IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS = 3, 4, 5


def test_branches_read_their_inputs() -> None:
    """F -> conv (0), 0 -> pool (1), F -> sep (2): the same maps as the operations called by hand; all three concatenated."""
    pool, separable = PyramidPooling(grid_size=(2, 1)), AtrousSeparableConv(rate=(1, 3))
    cell = Cell((Branch(BACKBONE_FEATURE, OPERATIONS[0]), Branch(0, pool), Branch(BACKBONE_FEATURE, separable)))
    rng = np.random.default_rng(0)
    weights, features = (
        random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng),
        rng.standard_normal((2, 3, 5, 7)),
    )
    for_conv, for_pool, for_separable = weights.branches
    assert isinstance(for_conv, ConvNorm)
    assert isinstance(for_pool, ConvNorm)
    assert isinstance(for_separable, SeparableConv)
    first = conv1x1(features, for_conv, training=True)
    second = pyramid_pooling(first, for_pool, grid_size=(2, 1), training=True)
    third = atrous_separable_conv(features, for_separable, rate=(1, 3), training=True)
    actual = branch_outputs(features, cell, weights, BranchOptions(training=True))
    assert all(np.array_equal(a, b) for a, b in zip(actual, (first, second, third), strict=True))
    output = dense_prediction_cell(features, cell, weights, BranchOptions(training=True))
    projected = conv1x1(np.concatenate([first, second, third], axis=1), weights.projection, training=True)
    assert np.array_equal(output, projected)


LAYERS = (IN_CHANNELS, 2, 4)  # channels of several layers of a backbone


@pytest.mark.parametrize("training", [False, True])
@given(cells(min_branches=0, num_inputs=3), map_sizes(5), rng_seeds())
def test_gradient_of_several_inputs(training: bool, cell: Cell, size: tuple[int, int], seed: int) -> None:
    """For each of them, also of those that no branch reads; a cell without branches reads all."""
    rng, options = np.random.default_rng(seed), BranchOptions(training)
    features = [rng.standard_normal((2, channels, *size)) for channels in LAYERS]
    weights = random_cell_weights(cell, LAYERS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    output = dense_prediction_cell(features, cell, weights, options)
    assert output.shape == (2, CELL_CHANNELS if cell.branches else sum(LAYERS), *size)
    grad_output = rng.standard_normal(output.shape)
    grad_features, grad_weights = dense_prediction_cell_backward(grad_output, features, cell, weights, options)
    for index, gradient in zip((-1, -2, -3), grad_features, strict=True):
        is_read = not cell.branches or any(branch.input_index == index for branch in cell.branches)
        assert is_read or not gradient.any()
    assert_gradient(
        lambda *x: dense_prediction_cell(x, cell, weights, options), tuple(features), tuple(grad_features), grad_output, rng
    )
    assert_gradient(
        lambda *w: dense_prediction_cell(features, cell, CellWeights(*w), options), weights, grad_weights, grad_output, rng
    )


def test_branches_read_the_layers_that_they_name() -> None:
    """The second of three: as a cell that reads the one input, when this is that layer."""
    rng, options = np.random.default_rng(0), BranchOptions(training=True)
    features = [rng.standard_normal((2, channels, 3, 4)) for channels in LAYERS]
    cell = Cell((Branch(-2, Conv1x1()), Branch(0, Conv1x1())))
    weights = random_cell_weights(cell, LAYERS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    alone = Cell((Branch(-1, Conv1x1()), Branch(0, Conv1x1())))
    actual = dense_prediction_cell(features, cell, weights, options)
    assert np.array_equal(actual, dense_prediction_cell(features[1], alone, weights, options))
    with pytest.raises(ValueError, match="the cell reads input -2, and the backbone gives 1 layer"):
        dense_prediction_cell(features[1], cell, weights, options)


def test_a_cell_without_branches_is_the_batch_norm_of_all_inputs() -> None:
    """No ReLU, no dropout."""
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((2, channels, 3, 4)) for channels in LAYERS]
    weights = random_cell_weights(Cell(()), LAYERS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    actual = dense_prediction_cell(features, Cell(()), weights, BranchOptions(training=True))
    expected = batch_norm(np.concatenate(features, axis=1), weights.norm, training=True)
    assert np.array_equal(actual, expected)
    assert (actual < 0).any()


@pytest.mark.parametrize(
    "options",
    [
        BranchOptions(training=True, pooling_size=(4, 6)),
        BranchOptions(training=False, pooling_size=(10, 3)),
        BranchOptions(training=False, pooling="grid_cells"),
    ],
)
def test_pooling_options_reach_the_pooling(options: BranchOptions) -> None:
    operation = PyramidPooling(grid_size=(2, 3))
    rng = np.random.default_rng(0)
    features, weights = rng.standard_normal((2, IN_CHANNELS, 5, 7)), random_pointwise(IN_CHANNELS, BRANCH_CHANNELS, rng)
    expected = pyramid_pooling(
        features,
        weights,
        grid_size=(2, 3),
        training=options.training,
        variant=options.pooling,
        pooling_size=options.pooling_size,
    )
    assert np.array_equal(apply_operation(features, operation, weights, options), expected)
    default = apply_operation(features, operation, weights, BranchOptions(options.training))
    assert not np.array_equal(expected, default)


@pytest.mark.parametrize("training", [False, True])
@given(cells(), map_sizes(8), st.integers(1, 2), VARIANTS, st.sampled_from((1, 2)), st.booleans(), rng_seeds())
def test_gradient(
    training: bool,
    cell: Cell,
    size: tuple[int, int],
    batch: int,
    pooling: PoolingVariant,
    rate_multiplier: int,
    with_dropout: bool,
    seed: int,
) -> None:
    options = BranchOptions(training, rate_multiplier, pooling)
    check_gradient(cell, size, batch, options, with_dropout, seed)


@given(cells(), map_sizes(8), st.data(), st.booleans(), rng_seeds())
def test_gradient_with_pinned_pooling_size(
    cell: Cell, size: tuple[int, int], data: st.DataObject, training: bool, seed: int
) -> None:
    pinned = data.draw(st.tuples(st.integers(1, size[0]), st.integers(1, size[1])))  # so that every window fits
    check_gradient(cell, size, 2, BranchOptions(training, pooling_size=pinned), False, seed)


def check_gradient(
    cell: Cell, size: tuple[int, int], batch: int, options: BranchOptions, with_dropout: bool, seed: int
) -> None:
    """Features alone, weights alone, and both: each has its own norm to be compared with."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((batch, IN_CHANNELS, *size))
    weights = random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    grad_output = rng.standard_normal((batch, CELL_CHANNELS, *size))
    keep = rng.random((batch, len(cell.branches) * BRANCH_CHANNELS, *size)) >= 0.3 if with_dropout else None

    def forward(features: Array, weights: CellWeights[Array]) -> Array:
        return dense_prediction_cell(features, cell, weights, options, dropout_keep=keep, dropout_rate=0.3)

    grad_features, grad_weights = dense_prediction_cell_backward(
        grad_output, features, cell, weights, options, dropout_keep=keep, dropout_rate=0.3
    )
    assert_gradient(lambda x: forward(x, weights), (features,), (grad_features,), grad_output, rng)
    assert_gradient(lambda *w: forward(features, CellWeights(*w)), weights, grad_weights, grad_output, rng)


@given(cells(), map_sizes(), rng_seeds())
def test_rate_multiplier_doubles_rates_and_nothing_else(cell: Cell, size: tuple[int, int], seed: int) -> None:
    doubled = Cell(
        tuple(
            Branch(b.input_index, AtrousSeparableConv(rate=(2 * b.operation.rate[0], 2 * b.operation.rate[1])))
            if isinstance(b.operation, AtrousSeparableConv)
            else b
            for b in cell.branches
        )
    )
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((1, IN_CHANNELS, *size))
    weights = random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    actual = dense_prediction_cell(features, cell, weights, BranchOptions(training=False, rate_multiplier=2))
    assert np.array_equal(actual, dense_prediction_cell(features, doubled, weights, BranchOptions(training=False)))


@given(cells(), map_sizes(), st.booleans(), VARIANTS, rng_seeds())
def test_map_size_is_kept_and_inputs_are_left_alone(
    cell: Cell, size: tuple[int, int], training: bool, pooling: PoolingVariant, seed: int
) -> None:
    """Down to 1×1; pinning the pooling to the map's own size is the default; the same call gives the same bits."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((1, IN_CHANNELS, *size))
    weights = random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    features.flags.writeable = False
    output = dense_prediction_cell(features, cell, weights, BranchOptions(training, pooling=pooling))
    pinned = dense_prediction_cell(features, cell, weights, BranchOptions(training, pooling=pooling, pooling_size=size))
    assert output.shape == (1, CELL_CHANNELS, *size)
    assert output.dtype == np.float64
    assert np.array_equal(output, pinned)


@given(cells(min_branches=2), map_sizes(6), rng_seeds())
def test_branch_order_does_not_matter(cell: Cell, size: tuple[int, int], seed: int) -> None:
    """Branches sorted by depth, with the projection's columns moved along, give the same output."""
    depth = [0] * len(cell.branches)
    for i, branch in enumerate(cell.branches):
        depth[i] = 0 if branch.input_index == BACKBONE_FEATURE else depth[branch.input_index] + 1
    order = sorted(range(len(depth)), key=lambda i: depth[i])
    place = {BACKBONE_FEATURE: BACKBONE_FEATURE} | {old: new for new, old in enumerate(order)}
    moved = Cell(tuple(Branch(place[cell.branches[i].input_index], cell.branches[i].operation) for i in order))

    rng = np.random.default_rng(seed)
    features = rng.standard_normal((1, IN_CHANNELS, *size))
    weights = random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    blocks = np.split(weights.projection.weight, len(order), axis=1)
    projection = weights.projection._replace(weight=np.concatenate([blocks[i] for i in order], axis=1))
    moved_weights = CellWeights(tuple(weights.branches[i] for i in order), projection)
    options = BranchOptions(training=False)
    np.testing.assert_allclose(
        dense_prediction_cell(features, moved, moved_weights, options),
        dense_prediction_cell(features, cell, weights, options),
        rtol=0,
        atol=1e-12,  # only the projection's order of summation differs; float64, order 1 to 10
    )


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_searchable_operation_runs_on_one_pixel(operation: Operation) -> None:
    rng = np.random.default_rng(0)
    cell = Cell((Branch(BACKBONE_FEATURE, operation),))
    weights = random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    output = apply_operation(rng.standard_normal((1, 3, 1, 1)), operation, weights.branches[0], BranchOptions(training=True))
    assert output.shape == (1, BRANCH_CHANNELS, 1, 1)
    assert np.isfinite(output).all()


def test_rate_multiplier_for() -> None:
    assert [rate_multiplier_for(stride) for stride in (4, 8, 14, 16, 32)] == [1, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="output_stride must be 4 to 32, got 33"):
        rate_multiplier_for(33)
