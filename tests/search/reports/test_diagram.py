import html
import re
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Curve
from numpy.typing import NDArray

from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import BACKBONE_FEATURE, Branch, Cell, Conv1x1, PyramidPooling
from reference.dense_prediction_cell import BranchOptions
from search.cells.receptive_field import structural_receptive_field
from search.cells.space import SearchSpace, load_cell
from search.reports.diagram import (
    Box,
    branch_weights,
    branch_weights_svg,
    cell_svg,
    draw_branch_weights,
    draw_cell,
    draw_effective_field,
    draw_paths,
    effective_field_svg,
    layout_cell,
    operation_label,
    paths_svg,
)


def random_cell(num_branches: int, seed: int, num_inputs: int = 1) -> Cell:
    return SearchSpace(num_branches, num_inputs=num_inputs).sample(np.random.default_rng(seed))


cells = st.builds(random_cell, st.integers(1, 10), st.integers(0, 2**32 - 1), st.integers(1, 4))


def texts(svg: str) -> Counter[str]:
    return Counter(html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]+)</text>", svg))


def overlap(first: Box, second: Box) -> bool:
    return (
        abs(first.x - second.x) < (first.width + second.width) / 2
        and abs(first.y - second.y) < (first.height + second.height) / 2
    )


def points(curve: Curve) -> NDArray[np.float64]:
    """Points along an arrow, (M, 2), dense enough to meet any box that it runs through."""
    corners = np.asarray(curve.cleaned(curves=False).vertices)[:-1]  # the last one only ends the path
    steps = np.linspace(0, 1, 40)[:, None]
    return np.concatenate([start + steps * (end - start) for start, end in pairwise(corners)])


@given(cells)
def test_boxes_stand_apart_inside_the_picture(cell: Cell) -> None:
    layout = layout_cell(cell)
    boxes = [*layout.inputs.values(), layout.projection, *layout.branches]
    assert not any(overlap(first, second) for first, second in combinations(boxes, 2))
    for box in boxes:
        assert 0 <= box.x - box.width / 2 < box.x + box.width / 2 <= layout.width
        assert 0 <= box.bottom < box.top <= layout.height


@given(cells)
def test_arrows_join_what_the_cell_joins_and_run_through_no_box(cell: Cell) -> None:
    layout = layout_cell(cell)
    boxes = [*layout.inputs.values(), layout.projection, *layout.branches]
    assert len(layout.arrows) == 2 * len(cell.branches)
    for i, branch in enumerate(cell.branches):
        source = {**layout.inputs, **dict(enumerate(layout.branches))}[branch.input_index]
        into, out = layout.arrows[2 * i], layout.arrows[2 * i + 1]
        for curve, start, end in ((into, source, layout.branches[i]), (out, layout.branches[i], layout.projection)):
            (start_x, start_y), (end_x, end_y) = np.asarray(curve.vertices)[[0, -1]]
            assert start_y == pytest.approx(start.bottom)
            assert abs(start_x - start.x) < start.width / 2
            assert end_y == pytest.approx(end.top)
            assert abs(end_x - end.x) < end.width / 2
            for x, y in points(curve):
                assert not any(overlap(Box(x, y, 0, 0), box._replace(height=box.height - 1e-6)) for box in boxes)


@given(st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_arrows_out_of_the_cell_never_share_a_lane(num_branches: int, seed: int) -> None:
    layout = layout_cell(random_cell(num_branches, seed))
    ends = sorted(float(np.asarray(curve.vertices)[-1, 0]) for curve in layout.arrows[1::2])
    assert all(right - left > 0.1 for left, right in pairwise(ends))


@given(cells)
def test_every_branch_is_labelled_and_numbered_once(cell: Cell) -> None:
    numbers = map(str, range(len(cell.branches)))
    labels = [line for branch in cell.branches for line in operation_label(branch.operation).split(", ")]
    read = {branch.input_index for branch in cell.branches if branch.input_index < 0}
    names = {-1: "feature F", -2: "feature F2", -3: "feature F3", -4: "feature F4"}
    assert texts(cell_svg(cell)) == Counter([*numbers, *labels, *(names[i] for i in read), "concat + 1×1"])


def test_layers_that_are_known_are_named() -> None:
    cell = Cell((Branch(-3, Conv1x1()), Branch(-1, Conv1x1())))
    shown = texts(cell_svg(cell, layers=(-1, -4, -7)))
    assert shown.keys() >= {"F: layer −1", "F3: layer −7"}
    assert not any("F2" in text for text in shown)  # which no branch reads


def test_a_cell_without_branches_is_drawn_as_the_norm_of_all_layers() -> None:
    layout = layout_cell(Cell(()), num_inputs=2)
    boxes = [*layout.inputs.values(), layout.projection]
    assert not any(overlap(first, second) for first, second in combinations(boxes, 2))
    assert len(layout.arrows) == 2
    assert texts(cell_svg(Cell(()))) == Counter(["feature F", "batch norm"])
    assert texts(cell_svg(Cell(()), (-1, -2))) == Counter(["F: layer −1", "F2: layer −2", "batch norm"])


def test_each_number_stands_at_its_own_box() -> None:
    cell = load_cell("dpc")
    axes = Figure(figsize=(5, 5)).add_axes((0, 0, 1, 1))
    draw_cell(cell, axes)
    boxes = layout_cell(cell).branches
    places = {int(text.get_text()): text.get_position() for text in axes.texts if text.get_text().isdigit()}
    for number, (x, y) in places.items():
        nearest = min(boxes, key=lambda box: abs(box.x - box.width / 2 - x) + abs(box.top - y))
        assert nearest == boxes[number]
    assert sorted(places) == list(range(5))


def test_labels() -> None:
    assert operation_label(Conv1x1()) == "1×1 conv"
    assert operation_label(PyramidPooling(grid_size=(2, 4))) == "pyramid pooling, 2×4"


def trained_cell() -> DensePredictionCell:
    """The projection reads branch i with weights of ±(i + 1)."""
    context = DensePredictionCell(load_cell("aspp"), 3, branch_channels=4, cell_channels=6)
    with torch.no_grad():
        weight = context.weights().projection.weight.view(6, 5, 4)
        weight.copy_(torch.arange(1.0, 6.0)[None, :, None] * torch.tensor([1.0, -1.0, 1.0, -1.0]))
    return context


def test_branch_weights_are_mean_absolute_ones() -> None:
    assert branch_weights(trained_cell()) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_every_bar_has_its_branch_and_value() -> None:
    drawn = texts(branch_weights_svg(trained_cell()))
    assert all(drawn[label] == 1 for label in ("0: 1×1 conv", "3: 3×3 sep, rate 18×18", "4: pyramid pooling, 1×1"))
    axes = Figure().add_subplot()
    draw_branch_weights(trained_cell(), axes)
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_drawn_fields_are_black_exactly_where_nothing_is_read() -> None:
    cell, size = load_cell("dpc"), (129, 64)
    axes = Figure().add_subplot()
    draw_paths(cell, axes, size, BranchOptions(training=False, rate_multiplier=2))
    drawn = np.ma.getmaskarray(np.ma.asarray(axes.images[0].get_array()))
    np.testing.assert_array_equal(~drawn, structural_receptive_field(cell, size, BranchOptions(False, 2)) > 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 24), (65, 129)])
def test_drawn_fields_have_the_centre_output_at_zero(size: tuple[int, int]) -> None:
    axes = Figure().add_subplot()
    draw_paths(Cell((Branch(BACKBONE_FEATURE, Conv1x1()),)), axes, size)
    (image,) = axes.images
    left, right, bottom, top = image.get_extent()
    row, column = np.argwhere(~np.ma.getmaskarray(np.ma.asarray(image.get_array())))[0]  # the only one that is read
    assert (top + row + 0.5, left + column + 0.5) == (0, 0)
    assert (bottom - top, right - left) == size
    assert 0 in axes.get_xticks()


def test_a_cell_that_hands_on_nothing_is_drawn_black() -> None:
    context = trained_cell()
    with torch.no_grad():
        context.weights().projection.weight.zero_()
    axes = Figure().add_subplot()
    draw_effective_field(context, axes, (17, 17))
    assert np.ma.getmaskarray(np.ma.asarray(axes.images[0].get_array())).all()


def test_svg_stands_alone_and_is_reproducible() -> None:
    cell = load_cell("aspp")
    context = DensePredictionCell(cell, 3, branch_channels=4, cell_channels=4)
    for svg in (
        cell_svg(cell),
        paths_svg(cell, (17, 33)),
        effective_field_svg(context, (17, 33)),
        branch_weights_svg(context),
    ):
        assert svg.startswith('<svg role="img" aria-label="')
        assert "<metadata" not in svg
        assert not re.search(r'(href|src)="(?!data:|#)', svg)
    assert cell_svg(cell) == cell_svg(cell)
