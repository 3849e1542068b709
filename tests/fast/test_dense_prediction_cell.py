import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fast.batch_norm import MOMENTUM, authors_norm
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell, decays, load_reference_weights, reference_weights
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array
from reference.cell import BACKBONE_FEATURE, OPERATIONS, AtrousSeparableConv, Branch, Cell, Conv1x1, Operation, PyramidPooling
from reference.dense_prediction_cell import (
    BranchOptions,
    CellWeights,
    dense_prediction_cell,
    dense_prediction_cell_backward,
)
from reference.l2_penalty import l2_penalty_backward
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant
from search.cells.space import load_cell
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    Step,
    assert_equal_steps,
    assert_steps_within_budget,
    every_device,
    reference_step,
    rounded,
    single_values_allowed,
    to_tensors,
    torch_step,
)
from tests.fast.plain_torch import plain_cell
from tests.reference.directional_derivative import leaves
from tests.strategies import cells, map_sizes, random_cell_weights, rng_seeds

IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS = 3, 4, 5
VARIANTS = st.sampled_from(("sliding_window", "grid_cells"))

KINDS = (  # one operation of each kind and each shape that differs in its code or its numbers
    Conv1x1(),
    AtrousSeparableConv(rate=(1, 1)),
    AtrousSeparableConv(rate=(6, 3)),
    AtrousSeparableConv(rate=(21, 1)),
    PyramidPooling(grid_size=(1, 1)),
    PyramidPooling(grid_size=(2, 4)),
    PyramidPooling(grid_size=(8, 1)),
)


def single(operation: Operation) -> Cell:
    return Cell((Branch(BACKBONE_FEATURE, operation),))


def small_cell(cell: Cell, options: BranchOptions, in_channels: int | tuple[int, ...] = IN_CHANNELS) -> DensePredictionCell:
    module = DensePredictionCell(
        cell,
        in_channels,
        branch_channels=BRANCH_CHANNELS,
        cell_channels=CELL_CHANNELS,
        output_stride=16 // options.rate_multiplier,
        dropout_rate=0.0,
        pooling=options.pooling,
        pooling_size=options.pooling_size,
        norm_layer=authors_norm,
    )
    return module.train(options.training)


def draw(cell: Cell, size: tuple[int, int], batch: int, seed: int) -> tuple[Array, CellWeights[Array], Array]:
    """Features, weights and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((batch, IN_CHANNELS, *size))
    weights = random_cell_weights(cell, IN_CHANNELS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    return features, weights, rng.standard_normal((batch, CELL_CHANNELS, *size))


def expected_step(
    cell: Cell,
    features: Array,
    weights: CellWeights[Array],
    cotangent: Array,
    options: BranchOptions,
    momentum: float = MOMENTUM,
) -> Step:
    return reference_step(
        lambda x, w: dense_prediction_cell(x, cell, w, options),
        lambda g, x, w: dense_prediction_cell_backward(g, x, cell, w, options),
        (features, weights),
        cotangent,
        momentum=momentum,
    )


def module_step(
    module: DensePredictionCell,
    features: Array,
    weights: CellWeights[Array],
    cotangent: Array,
    layout: Layout = "contiguous",
    autocast: torch.dtype | None = None,
) -> Step:
    """In the dtype and on the device of the module."""
    load_reference_weights(module, weights)
    parameter = next(module.parameters())
    maps = to_tensors(features, parameter.device.type, layout, parameter.dtype)
    return torch_step(lambda x, _: module(x), (maps, module.weights()), cotangent, autocast)


def check(
    cell: Cell, size: tuple[int, int], batch: int, options: BranchOptions, layout: Layout, device: str, seed: int
) -> None:
    features, weights, cotangent = draw(cell, size, batch, seed)
    actual = module_step(small_cell(cell, options).to(device, torch.float64), features, weights, cotangent, layout)
    assert_equal_steps(actual, expected_step(cell, features, weights, cotangent, options))


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@given(cells(), map_sizes(9), st.integers(1, 2), VARIANTS, st.sampled_from((1, 2)), st.sampled_from(LAYOUTS), rng_seeds())
def test_step_equals_reference(
    device: str,
    training: bool,
    cell: Cell,
    size: tuple[int, int],
    batch: int,
    pooling: PoolingVariant,
    rate_multiplier: int,
    layout: Layout,
    seed: int,
) -> None:
    check(cell, size, batch, BranchOptions(training, rate_multiplier, pooling), layout, device, seed)


@single_values_allowed
@every_device
@given(cells(), map_sizes(9), st.data(), st.booleans(), st.sampled_from(LAYOUTS), rng_seeds())
def test_step_equals_reference_with_pinned_pooling_size(
    device: str, cell: Cell, size: tuple[int, int], data: st.DataObject, training: bool, layout: Layout, seed: int
) -> None:
    pinned = data.draw(st.tuples(st.integers(1, size[0]), st.integers(1, size[1])))  # so that every window fits
    check(cell, size, 2, BranchOptions(training, pooling_size=pinned), layout, device, seed)


LAYERS = (IN_CHANNELS, 2, 5)  # channels of several layers of a backbone


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("calls_submodules", [False, True], ids=["fused", "submodules"])
@given(cells(min_branches=0, num_inputs=3), map_sizes(9), st.integers(1, 2), st.sampled_from(LAYOUTS), rng_seeds())
def test_step_of_several_inputs_equals_reference(
    device: str,
    training: bool,
    calls_submodules: bool,
    cell: Cell,
    size: tuple[int, int],
    batch: int,
    layout: Layout,
    seed: int,
) -> None:
    """The layers follow each other in one map; a cell without branches is the norm of them all."""
    rng, options = np.random.default_rng(seed), BranchOptions(training)
    features = rng.standard_normal((batch, sum(LAYERS), *size))
    weights = random_cell_weights(cell, LAYERS, BRANCH_CHANNELS, CELL_CHANNELS, rng)
    cotangent = rng.standard_normal((batch, CELL_CHANNELS if cell.branches else sum(LAYERS), *size))

    def split(x: Array) -> list[Array]:
        return np.split(x, np.cumsum(LAYERS)[:-1], axis=1)

    def backward(g: Array, x: Array, w: CellWeights[Array]) -> tuple[Array, CellWeights[Array]]:
        grad_layers, grad_weights = dense_prediction_cell_backward(g, split(x), cell, w, options)
        return np.concatenate(grad_layers, axis=1), grad_weights

    expected = reference_step(
        lambda x, w: dense_prediction_cell(split(x), cell, w, options), backward, (features, weights), cotangent
    )
    module = small_cell(cell, options, LAYERS).to(device, torch.float64)
    if calls_submodules:
        for child in module.modules():
            if child is not module:
                child.register_forward_hook(lambda *_: None)
    assert_equal_steps(module_step(module, features, weights, cotangent, layout), expected)


def test_a_cell_that_reads_a_layer_that_is_not_there_is_refused() -> None:
    cell = Cell((Branch(-2, Conv1x1()),))
    with pytest.raises(ValueError, match=r"^the cell reads input -2, and the backbone gives 1 layer$"):
        DensePredictionCell(cell, 4)
    assert DensePredictionCell(cell, (4, 3)).input_channels == (4, 3)


def test_a_cell_without_branches_has_as_many_channels_as_it_reads() -> None:
    module = DensePredictionCell(Cell(()), (4, 3), cell_channels=256).train()
    assert (module.in_channels, module.cell_channels) == (7, 7)
    assert not any(decays(module).values())
    x = torch.randn(2, 7, 3, 3)
    assert torch.allclose(module(x).mean((0, 2, 3)), torch.zeros(7), atol=1e-6)  # dropout would move the means


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_half_precision_is_normalised_in_the_norms_own(autocast: torch.dtype | None) -> None:
    """Features of 16 bits, as a cache holds them: their gradients would be too small for 16 bits."""
    module = DensePredictionCell(Cell(()), 3).train()
    x = torch.randn(2, 3, 4, 5).half()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = module(x)
    assert y.dtype == torch.float32
    (y * 1e-8 * torch.arange(y.numel()).view_as(y)).sum().backward()
    assert isinstance(module.norm.weight, torch.Tensor)
    assert module.norm.weight.grad is not None
    assert module.norm.weight.grad.all()


@every_device
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_searchable_operation_equals_reference(device: str, operation: Operation) -> None:
    for training in (False, True):
        check(single(operation), (5, 8), 2, BranchOptions(training), "contiguous", device, seed=0)


@every_device
@pytest.mark.parametrize(
    "options",
    [
        BranchOptions(training=True, rate_multiplier=2),
        BranchOptions(training=False, rate_multiplier=2, pooling="grid_cells"),
        BranchOptions(training=True, pooling_size=(4, 6)),
        BranchOptions(training=False, pooling_size=(6, 4)),
    ],
)
def test_options_reach_the_operations(device: str, options: BranchOptions) -> None:
    """With rates and grids whose undoubled, transposed or unpinned form would read other pixels of this map."""
    separable, pool = AtrousSeparableConv(rate=(1, 3)), PyramidPooling(grid_size=(2, 3))
    cell = Cell((Branch(BACKBONE_FEATURE, separable), Branch(BACKBONE_FEATURE, pool), Branch(0, Conv1x1())))
    check(cell, (8, 11), 2, options, "contiguous", device, seed=0)


@pytest.mark.parametrize("operation", KINDS, ids=str)
def test_momentum_of_the_norms_is_used(operation: Operation) -> None:
    cell, options = single(operation), BranchOptions(training=True)
    features, weights, cotangent = draw(cell, (5, 8), 2, seed=0)
    module = small_cell(cell, options).double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.25
    actual = module_step(module, features, weights, cotangent)
    assert_equal_steps(actual, expected_step(cell, features, weights, cotangent, options, momentum=0.25))


@every_device
@pytest.mark.parametrize("name", ["dpc", "aspp", "psp"])
@pytest.mark.parametrize("training", [False, True])
def test_published_cells_equal_reference(device: str, name: str, training: bool) -> None:
    check(load_cell(name), (9, 13), 2, BranchOptions(training), "contiguous", device, seed=0)


@every_device
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", ["sliding_window", "grid_cells"])
@pytest.mark.parametrize("operation", KINDS, ids=str)
def test_low_precision_is_within_budget(
    device: str, training: bool, autocast: torch.dtype | None, pooling: PoolingVariant, operation: Operation
) -> None:
    cell, options = single(operation), BranchOptions(training, pooling=pooling)
    actual, expected, yardstick = [], [], []
    for seed in range(9):
        features, weights, cotangent = rounded(draw(cell, (9, 13), 4, seed), torch.float32)
        inputs = to_tensors((features, weights), device, dtype=torch.float32)
        module, layout = small_cell(cell, options).to(device), LAYOUTS[seed % len(LAYOUTS)]
        actual.append(module_step(module, features, weights, cotangent, layout, autocast))
        expected.append(expected_step(cell, features, weights, cotangent, options))
        yardstick.append(torch_step(lambda x, w: plain_cell(x, w, cell, options), inputs, cotangent, autocast))
    assert_steps_within_budget(actual, expected, yardstick, autocast or torch.float32)


def test_weights_round_trip() -> None:
    cell = load_cell("dpc")
    _, weights, _ = draw(cell, (1, 1), 1, seed=0)
    module = small_cell(cell, BranchOptions(training=False)).double()
    load_reference_weights(module, weights)
    for actual, expected in zip(leaves(reference_weights(module)), leaves(weights), strict=True):
        assert np.array_equal(actual, expected)


def test_output_stride_beyond_4_to_32_is_refused() -> None:
    with pytest.raises(ValueError, match="output_stride must be 4 to 32, got 33"):
        DensePredictionCell(single(Conv1x1()), IN_CHANNELS, output_stride=33)


@pytest.mark.parametrize("shape", [(1, 4, 5, 5), (3, 5, 5)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    module = DensePredictionCell(single(Conv1x1()), IN_CHANNELS, branch_channels=4)
    with pytest.raises(ValueError, match=r"cell needs features: \(N, 3, H, W\), got"):
        module(torch.zeros(shape))


@given(cells(min_branches=0), st.sampled_from((1, 2, 5)))
def test_what_decays_is_what_the_reference_regularises(cell: Cell, channels: int) -> None:
    """Of a cell, a decoder and a classifier: what the penalty has a gradient for, also where all have one channel."""
    module = DensePredictionCell(cell, channels, branch_channels=channels, cell_channels=channels)
    decoder, classifier = Decoder(channels, channels=channels, projected_channels=channels), nn.Conv2d(channels, channels, 1)
    weights = module.weights(), decoder.weights(), classifier.weight
    gradients = l2_penalty_backward(tree_map(lambda tensor: np.ones(tensor.shape), weights), weight_decay=1.0)
    regularised = {id(tensor): array.all() for tensor, array in zip(tree_leaves(weights), leaves(gradients), strict=True)}
    network = nn.ModuleList((module, decoder, classifier))
    decay = decays(network)
    for name, parameter in network.named_parameters():
        assert decay[name] == regularised.get(id(parameter), False), name  # the classifier's bias is not among the weights


def test_initial_weights_are_the_authors() -> None:
    """Truncated normals of 0.33 and 0.06 for the separable pair, Xavier for the rest, norms neutral."""
    cell = Cell((Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate=(1, 1))), Branch(BACKBONE_FEATURE, Conv1x1())))
    torch.manual_seed(0)
    weights = reference_weights(DensePredictionCell(cell, 500))
    separable, conv = weights.branches
    assert isinstance(separable, SeparableConv)
    assert isinstance(conv, ConvNorm)
    for weight, std in ((separable.depthwise.weight, 0.33), (separable.pointwise.weight, 0.06)):
        assert np.abs(weight).max() <= 2 * std
        assert weight.std() == pytest.approx(0.8796 * std, rel=0.05)  # what truncation at two deviations leaves
    for weight in (conv.weight, weights.projection.weight):
        limit = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
        assert 0.99 * limit < np.abs(weight).max() <= 1.000001 * limit
        assert weight.std() == pytest.approx(limit / 3**0.5, rel=0.05)
    for scale, offset, mean, var in (separable.depthwise.norm, separable.pointwise.norm, conv.norm, weights.projection.norm):
        assert np.all(scale == 1.0)
        assert np.all(var == 1.0)
        assert not offset.any()
        assert not mean.any()


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_dropout_rate_that_keeps_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout_rate must be at least 0 and below 1"):
        DensePredictionCell(Cell((Branch(BACKBONE_FEATURE, Conv1x1()),)), 4, dropout_rate=rate)


@pytest.mark.parametrize("size", [(0, 9), (9, -1), (9,), (9, 9, 9), (4.5, 9), 9, "ab", (True, 9), ()], ids=str)
def test_pooling_size_other_than_height_and_width_is_refused(size: Any) -> None:
    message = f"pooling_size must be (height, width), two integers of at least 1, or None, got {size!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        DensePredictionCell(single(Conv1x1()), 4, pooling_size=size)


def test_pooling_size_without_a_sliding_window_is_refused() -> None:
    message = r"pooling_size pins a sliding window, which grid_cells has not: it must be None, got \(9, 9\)"
    with pytest.raises(ValueError, match=message):
        DensePredictionCell(single(Conv1x1()), 4, pooling="grid_cells", pooling_size=(9, 9))


def test_unknown_pooling_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="pooling must be one of sliding_window, grid_cells, got 'max'"):
        DensePredictionCell(single(Conv1x1()), 4, pooling="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", ["in_channels", "branch_channels", "cell_channels"])
def test_channels_below_1_are_refused(name: str, channels: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {channels}"):
        DensePredictionCell(single(Conv1x1()), **{"in_channels": 4, name: channels})


SMALL = Cell((Branch(BACKBONE_FEATURE, Conv1x1()),))


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("dpc", {}, "cell must be a Cell, as Cell.load and Cell.from_json give, got 'dpc'"),
        (SMALL, {"norm_layer": torch.nn.GroupNorm(2, 4)}, r"norm_layer must make a norm .*, got one: GroupNorm\(2, 4"),
    ],
)
def test_what_is_no_cell_or_no_norm_layer_is_refused(cell: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DensePredictionCell(cell, 4, branch_channels=4, cell_channels=4, **options)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 4, 5, 5), np.float32), "a map must be a tensor, got ndarray$"),
        ([torch.zeros(1, 2, 5, 5)] * 2, r"a map must be a tensor, got list: give several layers as one, torch.cat"),
        (torch.zeros(1, 4, 5, 5, dtype=torch.uint8), "cell needs features of floating point, got torch.uint8"),
    ],
)
def test_what_is_no_map_is_refused(features: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DensePredictionCell(SMALL, 4, branch_channels=4, cell_channels=4)(features)
