import html
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Curve
from numpy.typing import NDArray

from reference.cell import RATES, Branch, Cell, Operation
from search.cli import InputError
from search.diagram import (
    Box,
    DiagramSettings,
    cell_svg,
    layout_cell,
    operation_label,
    receptive_field_svg,
    structural_receptive_field,
    write_diagram,
)
from search.space import SearchSpace, load_cell


def random_cell(num_branches: int, seed: int) -> Cell:
    return SearchSpace(num_branches).sample(np.random.default_rng(seed))


cells = st.builds(random_cell, st.integers(1, 10), st.integers(0, 2**32 - 1))


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
    boxes = [layout.feature, layout.projection, *layout.branches]
    assert not any(overlap(first, second) for first, second in combinations(boxes, 2))
    for box in boxes:
        assert 0 <= box.x - box.width / 2 < box.x + box.width / 2 <= layout.width
        assert 0 <= box.bottom < box.top <= layout.height


@given(cells)
def test_arrows_join_what_the_cell_joins_and_run_through_no_box(cell: Cell) -> None:
    layout = layout_cell(cell)
    boxes = [layout.feature, layout.projection, *layout.branches]
    assert len(layout.arrows) == 2 * len(cell.branches)
    for i, branch in enumerate(cell.branches):
        source = layout.feature if branch.input_index < 0 else layout.branches[branch.input_index]
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
def test_every_branch_is_labelled_once(cell: Cell) -> None:
    labels = [line for branch in cell.branches for line in operation_label(branch.operation).split(", ")]
    assert texts(cell_svg(cell)) == Counter([*labels, "feature F", "concat + 1×1"])


def test_labels() -> None:
    assert operation_label(Operation("conv1x1")) == "1×1 conv"
    assert operation_label(Operation("pyramid_pooling", grid_size=(2, 4))) == "pyramid pooling, 2×4"


@given(st.sampled_from(RATES), st.sampled_from(RATES))
def test_one_atrous_convolution_reads_nine_positions(rate_h: int, rate_w: int) -> None:
    field = structural_receptive_field(Cell((Branch(-1, Operation("atrous_separable_conv", rate=(rate_h, rate_w))),)), 43)
    expected = {(21 + i * rate_h, 21 + j * rate_w) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert set(map(tuple, np.argwhere(field).tolist())) == expected
    assert set(field[field > 0]) == {1.0}


def test_published_cell_sees_25_rows_and_27_columns_around() -> None:
    field = structural_receptive_field(load_cell("dpc"), 65)
    rows, columns = np.nonzero(field)
    assert (rows.min() - 32, rows.max() - 32) == (-25, 25)  # 1 + 18 + 6
    assert (columns.min() - 32, columns.max() - 32) == (-27, 27)  # 6 + 21
    assert field.sum() == 9 + 9**2 + 9**3 + 9**2 + 9**2  # paths through branches 0, 1, 2, 3 and 4
    np.testing.assert_array_equal(field, field[::-1, ::-1])


def test_global_pooling_sees_everything_equally() -> None:
    field = structural_receptive_field(Cell((Branch(-1, Operation("pyramid_pooling", grid_size=(1, 1))),)), 9)
    np.testing.assert_allclose(field, 1 / 81, rtol=1e-12)


def test_paths_end_at_the_border_of_the_map() -> None:
    conv = Operation("atrous_separable_conv", rate=(2, 2))
    field = structural_receptive_field(Cell((Branch(-1, conv), Branch(0, conv))), 3)  # only the centre tap stays inside
    np.testing.assert_array_equal(field, [[0, 0, 0], [0, 2, 0], [0, 0, 0]])


@pytest.mark.parametrize("size", [0, 4, -1])
def test_a_map_without_a_centre_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be odd and at least 1, so that the map has a centre, got {size}"):
        structural_receptive_field(load_cell("dpc"), size)


def test_svg_stands_alone_and_is_reproducible() -> None:
    cell = load_cell("aspp")
    for svg in (cell_svg(cell), receptive_field_svg(cell)):
        assert svg.startswith('<svg role="img" aria-label="')
        assert "<metadata" not in svg
        assert not re.search(r'(href|src)="(?!data:|#)', svg)
    assert cell_svg(cell) == cell_svg(cell)


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_command_writes_the_picture(tmp_path: Path, suffix: str, magic: bytes) -> None:
    output = tmp_path / f"cell{suffix}"
    write_diagram(DiagramSettings("dpc", output))
    assert output.read_bytes().startswith(magic)
    if suffix == ".svg":
        assert texts(output.read_text(encoding="utf-8"))["rate 18×15"] == 1


def test_command_reads_a_cell_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(random_cell(3, 0).to_json(), encoding="utf-8")
    write_diagram(DiagramSettings(str(tmp_path / "mine.json"), tmp_path / "mine.png"))
    assert (tmp_path / "mine.png").exists()


@pytest.mark.parametrize(
    ("cell", "output", "message"),
    [
        ("dpc", "cell.bmp", "ends in .svg, .png or .pdf"),
        ("dpc", "no/such/cell.svg", "cannot be written"),
        ("x", "x.svg", "'x'"),
    ],
)
def test_command_refuses_bad_input(tmp_path: Path, cell: str, output: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        write_diagram(DiagramSettings(cell, tmp_path / output))
    assert list(tmp_path.iterdir()) == []
