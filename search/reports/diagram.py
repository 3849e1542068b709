"""Pictures of a cell: its graph and the weights of its branches, as in the paper's figure 5, and its receptive field.

A branch reads exactly one map, so the branches form a tree below each layer of the backbone that is read: F, the deepest, or
F2, F3 and so on beside it. That makes the layout simple: a branch is one row below its input, children share the width below
their parent, and every branch with children has a lane to their left for its own arrow to the concatenation. So no arrows
cross, for any cell.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling, input_name
from reference.dense_prediction_cell import BranchOptions
from search.cells.reach import Size
from search.cells.receptive_field import centre_of, effective_receptive_field, structural_receptive_field

Titles = Mapping[str, Sequence[str]]  # of dots, by the `gid` of their artist

INK = "#20242c"  # text and axes; the page's own text colour where a picture stands in a page
_SEARCHED = BranchOptions(training=False)  # output stride 16, the authors' pooling
_FAINTEST = 1e-3  # of the largest gradient: smaller values have one colour

# All in inches at natural size.
BOX_WIDTH, BOX_HEIGHT, BAR_HEIGHT = 1.16, 0.46, 0.34
COLUMN_GAP, LAYER_GAP, LANE_WIDTH, MARGIN = 0.18, 0.38, 0.2, 0.08  # a number stands out of its box by 0.06
FONT_SIZE = 9.0

BAR_COLOURS = ("#e6e8ec", "#7a828f")  # fill and edge, as `operation_colours`
_ARROW_COLOUR = "#7a828f"
_ON_BOXES = "#1b1f27"  # always dark, because the boxes are light


class Box(NamedTuple):
    """A rectangle by its centre and size, y upwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> float:
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        return self.y - self.height / 2


@dataclass(frozen=True)
class CellLayout:
    """Positions of everything, in inches at natural size: bars of the inputs that are read at the top, by the index under
    which branches read them, and of the projection, or of the norm of a cell without branches, at the bottom.
    """

    width: float
    height: float
    inputs: dict[int, Box]
    projection: Box
    branches: tuple[Box, ...]
    arrows: tuple[Curve, ...]


def operation_label(operation: Operation) -> str:
    """The operation in words.

    >>> operation_label(AtrousSeparableConv(rate=(6, 21)))
    '3×3 sep, rate 6×21'
    """
    match operation:
        case Conv1x1():
            return "1×1 conv"
        case AtrousSeparableConv(rate):
            return "3×3 sep, rate {}×{}".format(*rate)
        case PyramidPooling(grid_size):
            return "pyramid pooling, {}×{}".format(*grid_size)
        case _:
            assert_never(operation)


def operation_colours(operation: Operation) -> tuple[str, str]:
    """The fill, light enough for dark text, and the edge of an operation's box."""
    match operation:
        case Conv1x1():
            return "#d9efe4", "#3d9970"
        case AtrousSeparableConv():
            return "#dbe8fb", "#3f74c9"
        case PyramidPooling():
            return "#fde6cf", "#d9822b"
        case _:
            assert_never(operation)


def layout_cell(cell: Cell, num_inputs: int = 1) -> CellLayout:
    """Place boxes and arrows so that no box meets another box or an arrow that is not its own.

    A cell without branches reads all `num_inputs` layers that the backbone gives.
    """
    read = {branch.input_index for branch in cell.branches if branch.input_index < 0}
    inputs = sorted(read, reverse=True) or [BACKBONE_FEATURE - k for k in range(num_inputs)]
    children: dict[int, list[int]] = {i: [] for i in (*inputs, *range(len(cell.branches)))}
    depths = dict.fromkeys(inputs, 0)
    for i, branch in enumerate(cell.branches):
        children[branch.input_index].append(i)
        depths[i] = depths[branch.input_index] + 1
    centres: dict[int, float] = {}
    lanes: dict[int, float] = {}

    def place(i: int, left: float) -> float:
        """Place branch i and all that follows from it, starting at `left`; returns the right end."""
        if not children[i]:
            centres[i] = lanes[i] = left + BOX_WIDTH / 2
            return left + BOX_WIDTH
        lanes[i] = left + LANE_WIDTH / 2
        right = place_row(children[i], left + LANE_WIDTH)
        centres[i] = (centres[children[i][0]] + centres[children[i][-1]]) / 2
        return right

    def place_row(row: list[int], left: float) -> float:
        for i in row:
            left = place(i, left) + COLUMN_GAP
        return left - COLUMN_GAP

    ends = {}  # left and right, of the bar of each input
    left = MARGIN
    for i in inputs:
        ends[i] = (left, place_row(children[i], left) if children[i] else left + BOX_WIDTH)
        left = ends[i][1] + COLUMN_GAP
    width = left - COLUMN_GAP + MARGIN
    layers = max(depths.values())
    height = 2 * (MARGIN + BAR_HEIGHT) + layers * BOX_HEIGHT + (layers + 1) * LAYER_GAP
    first_row = height - MARGIN - BAR_HEIGHT - LAYER_GAP - BOX_HEIGHT / 2
    rows = {i: first_row - (depth - 1) * (BOX_HEIGHT + LAYER_GAP) for i, depth in depths.items()}
    boxes = tuple(Box(centres[i], rows[i], BOX_WIDTH, BOX_HEIGHT) for i in range(len(cell.branches)))
    top = height - MARGIN - BAR_HEIGHT / 2
    bars = {i: Box((left + right) / 2, top, right - left, BAR_HEIGHT) for i, (left, right) in ends.items()}
    projection = Box(width / 2, MARGIN + BAR_HEIGHT / 2, width - 2 * MARGIN, BAR_HEIGHT)

    arrows = []
    for i, (branch, box) in enumerate(zip(cell.branches, boxes, strict=True)):
        source = box._replace(y=top, height=BAR_HEIGHT) if branch.input_index < 0 else boxes[branch.input_index]
        arrows.append(_arrow(source, source.x, box.x, box.top))
        lane_start = box.x if lanes[i] == box.x else box.x - 0.35 * BOX_WIDTH  # apart from the arrows to the children
        arrows.append(_arrow(box, lane_start, lanes[i], projection.top))
    if not cell.branches:
        arrows += [_arrow(bar, bar.x, bar.x, projection.top) for bar in bars.values()]
    return CellLayout(width, height, bars, projection, boxes, tuple(arrows))


def _arrow(source: Box, start: float, x: float, y: float) -> Curve:
    """From (start, below `source`) to (x, y): the turn is made at once, between two layers, and the rest is straight."""
    turned = source.bottom - LAYER_GAP
    if x == start:
        return Curve([(x, source.bottom), (x, y)], [Curve.MOVETO, Curve.LINETO])
    middle = (source.bottom + turned) / 2
    vertices = [(start, source.bottom), (start, middle), (x, middle), (x, turned)]
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    if y < turned - 1e-9:
        vertices.append((x, y))
        codes.append(Curve.LINETO)
    return Curve(vertices, codes)


def draw_cell(cell: Cell, axes: Axes, layers: Sequence[int] = (-1,)) -> None:
    """Draw the cell's graph, top to bottom, as large as `axes` allows. The figure must have its final size.

    Branches have the numbers by which a cell's JSON names them as `input`; there −1 is the feature F, −2 is F2, and so on.
    `layers` are the backbone's layers that these are.
    """
    layout = layout_cell(cell, len(layers))
    axes.set(xlim=(0, layout.width), ylim=(0, layout.height), aspect="equal")
    axes.set_axis_off()
    inches = axes.bbox.transformed(axes.figure.dpi_scale_trans.inverted())
    scale = min(inches.width / layout.width, inches.height / layout.height)
    for curve in layout.arrows:
        arrow = FancyArrowPatch(
            path=curve, arrowstyle="-|>", mutation_scale=8 * scale, linewidth=1.1 * scale, color=_ARROW_COLOUR, capstyle="butt"
        )
        axes.add_patch(arrow)
    for i, bar in layout.inputs.items():
        _draw_box(axes, bar, _input_label(i, layers), BAR_COLOURS, scale)
    for i, (branch, box) in enumerate(zip(cell.branches, layout.branches, strict=True)):
        label = operation_label(branch.operation).replace(", ", "\n")
        _draw_box(axes, box, label, operation_colours(branch.operation), scale)
        _draw_number(axes, i, box, operation_colours(branch.operation), scale)
    _draw_box(axes, layout.projection, "concat + 1×1" if cell.branches else "batch norm", BAR_COLOURS, scale)


def _input_label(index: int, layers: Sequence[int]) -> str:
    """Which feature it is, and of several layers that are known, which one."""
    name = input_name(index)
    known = len(layers) > 1 and -index <= len(layers)
    return f"{name}: layer {layers[-1 - index]}".replace("-", "−") if known else f"feature {name}"


def _draw_box(axes: Axes, box: Box, label: str, colours: tuple[str, str], scale: float) -> None:
    fill, edge = colours
    shape = FancyBboxPatch(
        (box.x - box.width / 2, box.bottom),
        box.width,
        box.height,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=fill,
        edgecolor=edge,
        linewidth=1.1 * scale,
    )
    axes.add_patch(shape)
    size = FONT_SIZE * scale
    axes.text(box.x, box.y, label, ha="center", va="center", fontsize=size, color=_ON_BOXES, linespacing=1.25)


def _draw_number(axes: Axes, number: int, box: Box, colours: tuple[str, str], scale: float) -> None:
    """The branch's number on a corner of its box, where it meets no arrow."""
    x, y, (_, edge) = box.x - box.width / 2 + 0.03, box.top + 0.02, colours
    axes.add_patch(Circle((x, y), 0.085, facecolor="white", edgecolor=edge, linewidth=1.1 * scale))
    size = (FONT_SIZE - 2) * scale
    axes.text(x, y, f"{number}", ha="center", va="center_baseline", fontsize=size, fontweight="bold", color=_ON_BOXES)


def draw_paths(cell: Cell, axes: Axes, size: Size, options: BranchOptions = _SEARCHED) -> None:
    """Draw `structural_receptive_field` on a map of (h, w) = `size`, on a logarithmic colour scale; black is never read."""
    field = structural_receptive_field(cell, size, options)
    floor = field[field > 0].min()
    bar = _draw_field(field, axes, floor, "paths to the centre output")
    if field.max() < 50 * floor:  # only a few powers of ten are marked
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if floor <= tick <= field.max()]
        bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])


def draw_effective_field(context: DensePredictionCell, axes: Axes, size: Size) -> None:
    """Draw `effective_receptive_field` by its largest value, on a logarithmic colour scale; black is never read."""
    field = effective_receptive_field(context, size)
    largest = field.max()
    _draw_field(field / largest if largest > 0 else field, axes, _FAINTEST, "gradient, by its largest")


def _draw_field(field: NDArray[np.float64], axes: Axes, floor: float, label: str) -> Colorbar:
    height, width = field.shape
    row, column = centre_of((height, width))
    image = axes.imshow(
        np.ma.masked_where(field == 0.0, np.maximum(field, floor)),
        norm=LogNorm(floor / 4, max(field.max(), 2 * floor)),  # the least value stands out against black
        cmap=matplotlib.colormaps["inferno"].with_extremes(bad="black"),
        interpolation="nearest",
        extent=(-column - 0.5, width - column - 0.5, height - row - 0.5, -row - 0.5),
    )
    step = _mark_step(max(row, column))
    axes.set_xticks(range(-(column // step) * step, width - column, step))
    axes.set_yticks(range(-(row // step) * step, height - row, step))
    axes.set_xlabel("offset in features", fontsize=FONT_SIZE, color=INK)
    axes.tick_params(labelsize=FONT_SIZE - 1, colors=INK, length=2)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.04, aspect=22)
    bar.set_label(label, fontsize=FONT_SIZE, color=INK)
    bar.ax.tick_params(which="both", labelsize=FONT_SIZE - 1, colors=INK, length=2)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    return bar


def _mark_step(reach: int) -> int:
    """Features between the marks of an axis on which so many lie to each side of the centre."""
    return next((step for step in (1, 2, 5, 10) if reach < 4 * step), 15 * max(1, round(reach / 32)))


def branch_weights(context: DensePredictionCell) -> list[float]:
    """The mean absolute weight with which the projection reads each branch (figure 5b of the paper), in the cell's order."""
    if not context.cell.branches:
        return []
    weight = context.weights().projection.weight.detach().double()  # (cell_channels, B·branch_channels, 1, 1)
    by_branch = weight.view(context.cell_channels, len(context.cell.branches), context.branch_channels)
    means: list[float] = by_branch.abs().mean(dim=(0, 2)).tolist()
    return means


def draw_branch_weights(context: DensePredictionCell, axes: Axes) -> None:
    """A bar per branch, as long as its `branch_weights`, in the colour of its operation."""
    means = branch_weights(context)
    for i, (branch, mean) in enumerate(zip(context.cell.branches, means, strict=True)):
        fill, edge = operation_colours(branch.operation)
        axes.barh(i, mean, height=0.62, color=fill, edgecolor=edge, linewidth=1.1)
        options: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{mean:.3g}", (mean, i), fontsize=FONT_SIZE - 1, color=INK, **options)
    labels = [f"{i}: {operation_label(branch.operation)}" for i, branch in enumerate(context.cell.branches)]
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.set(ylim=(len(means) - 0.5, -0.5), xlim=(0, 1.2 * max(*means, 1e-12)))
    axes.set_xlabel("mean |weight| in the projection", fontsize=FONT_SIZE, color=INK)
    axes.tick_params(labelsize=FONT_SIZE - 1, colors=INK, length=2)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def cell_svg(cell: Cell, layers: Sequence[int] = (-1,)) -> str:
    """The cell's graph as an SVG element for a page; `layers` as in `draw_cell`."""
    return figure_svg(_cell_figure(cell, layers), f"Diagram of the cell {cell}")


def paths_svg(cell: Cell, size: Size, options: BranchOptions = _SEARCHED) -> str:
    """The paths to the centre as an SVG element for a page."""
    figure, axes = _field_figure()
    draw_paths(cell, axes, size, options)
    return figure_svg(figure, f"Paths to the centre through the cell {cell}")


def effective_field_svg(context: DensePredictionCell, size: Size) -> str:
    """The effective receptive field as an SVG element for a page."""
    figure, axes = _field_figure()
    draw_effective_field(context, axes, size)
    return figure_svg(figure, f"Effective receptive field of the trained cell {context.cell}")


def branch_weights_svg(context: DensePredictionCell) -> str:
    """The bars of `branch_weights` as an SVG element for a page."""
    height = 0.55 + 0.27 * len(context.cell.branches)
    figure = Figure(figsize=(5.0, height))
    draw_branch_weights(context, figure.add_axes((0.36, 0.48 / height, 0.62, 1 - 0.52 / height)))
    return figure_svg(figure, f"Mean absolute weight of each branch in the projection of the cell {context.cell}")


def _field_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.3, 2.75))
    return figure, figure.add_axes((0.12, 0.15, 0.81, 0.83))


def style_axes(axes: Axes) -> None:
    """Style a plot's axes: lines at two sides, small numbers, the grid behind everything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    axes.set_axisbelow(True)


def show_grid(axes: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """Faint lines at the ticks."""
    axes.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.6)


def figure_svg(figure: Figure, description: str, titles: Titles | None = None) -> str:
    """A figure as an SVG element that can stand in an HTML page: no prolog, no metadata, ink in the page's text colour.

    `titles` are shown on hover, see `with_titles`.
    """
    buffer = StringIO()
    save_figure(figure, buffer, "svg", transparent=True)
    svg = with_titles(buffer.getvalue(), titles or {})
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1).replace(INK, "currentColor")


def with_titles(svg: str, titles: Titles) -> str:
    """A figure's SVG in which dots have titles, which are shown on hover.

    The keys are the `gid` of artists; the values have a title for each marker, in the order in which they are drawn.
    """
    for gid, names in titles.items():
        start = svg.index(f'<g id="{gid}">')
        left = iter(names)

        def titled(use: re.Match[str], left: Iterator[str] = left) -> str:
            return f"<g><title>{escape(next(left))}</title>{use[0]}</g>"

        svg = svg[:start] + re.sub(r"<use [^>]*/>", titled, svg[start:], count=len(names))
    return svg


def shortened(name: str, limit: int = 28) -> str:
    """A name that fits: of a long one the middle is left out.

    >>> shortened("mobilenetv2_100.ra_in1k_on_camvid", 20), shortened("aspp")
    ('mobilenetv2…n_camvid', 'aspp')
    """
    tail = 2 * limit // 5
    return name if len(name) <= limit else f"{name[: limit - tail - 1]}…{name[-tail:]}"


# Settings and metadata without which two runs do not write the same bytes.
SAME_EACH_TIME: dict[Any, Any] = {"svg.hashsalt": "dense-prediction-cell", "pdf.fonttype": 42}  # 42: PDF brings its font
DATE_IN = {"svg": "Date", "pdf": "CreationDate"}


def save_figure(figure: Figure, target: Path | StringIO, suffix: str, **options: Any) -> None:
    """Write the figure, the same file each time; an SVG keeps its text as text, and so does a PDF, with its font."""
    metadata = {DATE_IN[suffix]: None} if suffix in DATE_IN else None
    with matplotlib.rc_context({"svg.fonttype": "none", **SAME_EACH_TIME}):
        figure.savefig(target, format=suffix, dpi=200, metadata=metadata, **options)


def _cell_figure(cell: Cell, layers: Sequence[int]) -> Figure:
    layout = layout_cell(cell, len(layers))
    figure = Figure(figsize=(layout.width, layout.height))
    draw_cell(cell, figure.add_axes((0, 0, 1, 1)), layers)
    return figure


def cell_and_receptive_field_figure(cell: Cell, size: Size) -> Figure:
    """The graph, and the paths from the backbone's feature beside it, on a map of (h, w) = `size`."""
    layout = layout_cell(cell)
    field_width, field_height, gap = 3.9, 3.4, 0.55
    width, height = layout.width + gap + field_width, max(layout.height, field_height) + 2 * MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")

    def axes_at(left: float, axes_width: float, axes_height: float) -> Axes:
        bottom = (height - axes_height) / 2
        return figure.add_axes((left / width, bottom / height, axes_width / width, axes_height / height))

    draw_cell(cell, axes_at(MARGIN, layout.width, layout.height))
    draw_paths(cell, axes_at(layout.width + gap, field_width - 0.5, field_height - 0.8), size)
    return figure
