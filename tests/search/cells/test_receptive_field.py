"""What a cell sees: paths by hand, and gradients against PyTorch's of the cell itself."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fast.batch_norm import recompute_statistics
from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import RATES, AtrousSeparableConv, Branch, Cell, PyramidPooling
from reference.dense_prediction_cell import BranchOptions
from search.cells.receptive_field import (
    effective_receptive_field,
    options_of,
    structural_receptive_field,
)
from search.cells.space import load_cell
from tests.strategies import cells, map_sizes, rng_seeds


@given(st.sampled_from(RATES), st.sampled_from(RATES))
def test_one_atrous_convolution_reads_nine_positions(rate_h: int, rate_w: int) -> None:
    field = structural_receptive_field(Cell((Branch(-1, AtrousSeparableConv(rate=(rate_h, rate_w))),)), (43, 43))
    expected = {(21 + i * rate_h, 21 + j * rate_w) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert set(map(tuple, np.argwhere(field).tolist())) == expected
    assert set(field[field > 0]) == {1.0}


def test_published_cell_sees_25_rows_and_27_columns_around() -> None:
    field = structural_receptive_field(load_cell("dpc"), (65, 65))
    rows, columns = np.nonzero(field)
    assert (rows.min() - 32, rows.max() - 32) == (-25, 25)  # 1 + 18 + 6
    assert (columns.min() - 32, columns.max() - 32) == (-27, 27)  # 6 + 21
    assert field.sum() == 9 + 9**2 + 9**3 + 9**2 + 9**2  # paths through branches 0, 1, 2, 3 and 4
    np.testing.assert_array_equal(field, field[::-1, ::-1])


def test_global_pooling_sees_everything_equally() -> None:
    field = structural_receptive_field(Cell((Branch(-1, PyramidPooling(grid_size=(1, 1))),)), (9, 9))
    np.testing.assert_allclose(field, 1 / 81, rtol=1e-12)


def test_paths_end_at_the_border_of_the_map() -> None:
    conv = AtrousSeparableConv(rate=(2, 2))
    field = structural_receptive_field(Cell((Branch(-1, conv), Branch(0, conv))), (3, 3))  # only the centre tap stays inside
    np.testing.assert_array_equal(field, [[0, 0, 0], [0, 2, 0], [0, 0, 0]])


def test_the_field_moves_with_the_output_and_is_cut_at_the_border() -> None:
    dpc = load_cell("dpc")
    middle, moved = (structural_receptive_field(dpc, (81, 81), at=at) for at in ((40, 40), (37, 45)))
    np.testing.assert_array_equal(moved, np.roll(middle, (-3, 5), axis=(0, 1)))  # neither meets a border
    corner = structural_receptive_field(Cell((Branch(-1, AtrousSeparableConv(rate=(2, 3))),)), (5, 7), at=(4, 0))
    assert np.argwhere(corner).tolist() == [[2, 0], [2, 3], [4, 0], [4, 3]]


@pytest.mark.parametrize("at", [(-1, 0), (0, 7), (5, 3)])
def test_an_output_beyond_the_map_is_refused(at: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"at must be a row and a column of the 5×7 map, got {at}")):
        structural_receptive_field(load_cell("dpc"), (5, 7), at=at)


@pytest.mark.parametrize("size", [(0, 3), (4, -1)])
def test_a_map_without_a_centre_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"size must be (height, width) of at least 1 each, got {size}")):
        structural_receptive_field(load_cell("dpc"), size)


def test_rates_double_at_output_stride_8() -> None:
    cell = Cell((Branch(-1, AtrousSeparableConv(rate=(1, 3))),))
    twice = Cell((Branch(-1, AtrousSeparableConv(rate=(2, 6))),))
    at_8 = structural_receptive_field(cell, (15, 15), BranchOptions(training=False, rate_multiplier=2))
    np.testing.assert_array_equal(at_8, structural_receptive_field(twice, (15, 15)))


@pytest.mark.parametrize(
    "options",
    [BranchOptions(False), BranchOptions(False, pooling="grid_cells"), BranchOptions(False, pooling_size=(3, 3))],
)
def test_pooling_reads_as_its_variant_does(options: BranchOptions) -> None:
    cell = Cell((Branch(-1, PyramidPooling(grid_size=(2, 1))),))
    module = DensePredictionCell(
        cell, 1, branch_channels=1, cell_channels=1, pooling=options.pooling, pooling_size=options.pooling_size
    )
    field = structural_receptive_field(cell, (9, 12), options)
    np.testing.assert_array_equal(field > 1e-12, exact_field(opened(module), (9, 12)) > 1e-12)


def opened(module: DensePredictionCell) -> DensePredictionCell:
    """Every ReLU is open, whatever the features: the module is then linear, and no gate is left to chance."""
    with torch.no_grad():
        norms = [child for child in module.modules() if isinstance(child, torch.nn.BatchNorm2d)]
        for i, norm in enumerate(norms):  # far above what negative weights make of those before; gradients do not see it
            norm.bias.fill_(1e3 ** (i + 1))
    return module.eval()


def exact_field(module: DensePredictionCell, size: tuple[int, int]) -> NDArray[np.float64]:
    """The norm of the gradient of each output channel at the centre, added up: no random direction."""
    x = torch.zeros(1, module.in_channels, *size, requires_grad=True)
    centre = module(x)[0, :, size[0] // 2, size[1] // 2]
    gradients = [torch.autograd.grad(channel, x, retain_graph=True)[0][0] for channel in centre]
    squares = torch.stack(gradients).double().square().sum(dim=(0, 1))
    return squares.sqrt().numpy()


def test_paths_from_all_layers_count() -> None:
    conv = AtrousSeparableConv(rate=(1, 1))
    both = structural_receptive_field(Cell((Branch(-1, conv), Branch(-3, PyramidPooling(grid_size=(1, 1))))), (5, 5))
    alone = [
        structural_receptive_field(Cell((Branch(-1, operation),)), (5, 5)) for operation in (conv, PyramidPooling((1, 1)))
    ]
    np.testing.assert_array_equal(both, alone[0] + alone[1])


def test_a_cell_without_branches_sees_the_centre() -> None:
    field = structural_receptive_field(Cell(()), (3, 5))
    assert (field.sum(), field[1, 2]) == (1, 1)
    module = DensePredictionCell(Cell(()), (3, 2)).eval()
    gradient = effective_receptive_field(module, (3, 5))
    assert np.argwhere(gradient).tolist() == [[1, 2]]
    assert gradient[1, 2] == pytest.approx(5**0.5, rel=1e-4)  # of five channels, each divided by √(1 + eps)


@given(
    cell=cells(max_branches=4, num_inputs=2),
    seed=rng_seeds(),
    output_stride=st.sampled_from((8, 16)),
    size=map_sizes(),
)
def test_without_chance_the_field_is_the_modules_own_gradient(
    cell: Cell, seed: int, output_stride: int, size: tuple[int, int]
) -> None:
    """One output channel, so a sign is all that is left of the random direction."""
    torch.manual_seed(seed)
    module = opened(DensePredictionCell(cell, (3, 2), branch_channels=4, cell_channels=1, output_stride=output_stride))
    expected = exact_field(module, size)
    # float32 through up to ten convolutions, in another order
    np.testing.assert_allclose(effective_receptive_field(module, size), expected, rtol=0, atol=1e-4 * expected.max())


def test_random_directions_give_the_norm_over_all_channels() -> None:
    torch.manual_seed(0)
    module = opened(DensePredictionCell(load_cell("dpc"), 8, branch_channels=32, cell_channels=64))
    expected = exact_field(module, (65, 65))
    fields = [effective_receptive_field(module, (65, 65), seed=seed) for seed in range(4)]
    actual = np.sqrt(np.mean(np.square(fields), axis=0))
    # 32 directions: the squared norm, summed over the map, deviates by √(2 / 32) at most, if the rank were one
    assert np.square(actual).sum() == pytest.approx(np.square(expected).sum(), rel=0.25)
    np.testing.assert_array_equal(actual > 0, expected > 0)


def test_gates_open_as_often_as_the_norms_say() -> None:
    """Against the cell's own gradients on noise whose statistics the norms know."""
    torch.manual_seed(0)
    cell = Cell.from_json(
        '[{"op": "conv", "kernel": 3, "rate": [1, 2], "input": -1}, {"op": "conv", "kernel": 1, "input": 0}]'
    )
    module = DensePredictionCell(cell, 16, branch_channels=64, cell_channels=1)
    with torch.no_grad():
        for norm in (child for child in module.modules() if isinstance(child, torch.nn.BatchNorm2d)):
            norm.bias.normal_(0.0, 0.7)
        module.weights().projection.norm.scale.fill_(1.0)
        module.weights().projection.norm.offset.fill_(1e4)  # the one output is open: fewer draws will do
    x = torch.randn(64, 16, 9, 9)
    recompute_statistics(module, [x])
    x.requires_grad_()
    (gradients,) = torch.autograd.grad(module(x)[:, 0, 4, 4].sum(), x)
    expected = gradients.double().square().sum(dim=1).mean(dim=0).sqrt().numpy()
    fields = [effective_receptive_field(module, (9, 9), seed=seed) for seed in range(8)]
    actual = np.sqrt(np.mean(np.square(fields), axis=0))
    assert np.sqrt(np.square(actual).sum() / np.square(expected).sum()) == pytest.approx(1.0, abs=0.2)
    np.testing.assert_array_equal(actual > 0, expected > 0)


def test_closed_gates_hand_on_nothing_and_the_module_stays_as_it_is() -> None:
    module = DensePredictionCell(load_cell("dpc"), 3, branch_channels=4, cell_channels=4)
    with torch.no_grad():
        module.weights().projection.norm.offset.fill_(-1e4)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert not effective_receptive_field(module, (9, 9)).any()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training


def test_the_same_seed_gives_the_same_field() -> None:
    module = DensePredictionCell(load_cell("aspp"), 3, branch_channels=4, cell_channels=4)
    np.testing.assert_array_equal(effective_receptive_field(module, (9, 9)), effective_receptive_field(module, (9, 9)))


def test_a_modules_options_are_its_own() -> None:
    options = options_of(DensePredictionCell(load_cell("aspp"), 3, output_stride=8, pooling_size=(198, 30)))
    assert options == BranchOptions(False, 2, "sliding_window", (198, 30))


def test_doubled_rates_take_as_many_paths_on_a_map_of_twice_the_size() -> None:
    fields = [
        structural_receptive_field(load_cell("dpc"), (size, size), BranchOptions(False, multiplier))
        for size, multiplier in ((65, 1), (129, 2))
    ]
    assert np.count_nonzero(fields[0]) == np.count_nonzero(fields[1]) == 513  # a path of doubled steps for each path


@pytest.mark.parametrize("rate", [33, 10**9, 10**22])
def test_rates_beyond_the_map_are_all_one_middle_tap(rate: int) -> None:
    cell = Cell((Branch(-1, AtrousSeparableConv((rate, 1))),))
    field = structural_receptive_field(cell, (33, 33))
    assert field.sum() == 3
    assert field[16, 15:18].tolist() == [1.0, 1.0, 1.0]
