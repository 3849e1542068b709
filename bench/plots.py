"""Draws the picture of a run: times as bars, ratios to the best other provider as maps by rate and as dots by case."""

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from bench.cases import COMPILE, COMPILE_MAX, EAGER, EAGER_CHANNELS_LAST, OURS, OURS_WITHOUT_KERNELS
from bench.report import Group, in_digits, tables_of
from bench.results import Results, ours, ratio, right
from bench.targets import cells_per_hour
from reference.cell import RATES
from search.files import write_whole
from search.reports.diagram import INK, show_grid, style_axes

_COLOURS = {
    OURS.name: "#cf3f4f",
    EAGER.name: "#4a7fd0",
    EAGER_CHANNELS_LAST.name: "#86aee3",
    COMPILE.name: "#8e62c8",
    COMPILE_MAX.name: "#b998e0",
    OURS_WITHOUT_KERNELS.name: "#d9822b",
}
_MODES = {"inference": ("#4a7fd0", -0.17), "training": ("#e69f00", 0.17)}  # colour of a dot, and how far below its line
_DTYPES = ("bfloat16", "float16", "float32")  # the first of these dtypes that a suite has is drawn
_MANY_RATES = 16  # with at least this many rates, they are drawn as a map

Drawing = Callable[[Axes, list[Group]], float]  # draws cases and returns how many inches high the axes shall be
Panel = tuple[Drawing, str]  # a pair of axes: who draws it, and its title


def draw(path: Path, results: Results) -> None:
    """Write the picture, whole or not at all."""
    panels = _panels(results)
    strips: list[list[Panel]] = [[panel] for panel in panels if panel[0] is _bars]
    for drawing in (_map, _dots):  # two side by side
        alike = [panel for panel in panels if panel[0] is drawing]
        strips += [alike[k : k + 2] for k in range(0, len(alike), 2)]
    figure = Figure(layout="constrained")
    grid = figure.add_gridspec(max(1, len(strips)), 2)
    heights = [0.0] * grid.nrows
    for k, strip in enumerate(strips):
        for column, (draw_panel, title) in enumerate(strip):
            ax = figure.add_subplot(grid[k, column if len(strip) == 2 else slice(None)])
            ax.set_title(title, loc="left", fontsize=10, color=INK)
            style_axes(ax)
            heights[k] = max(heights[k], draw_panel(ax, panels[draw_panel, title]))
    grid.set_height_ratios(heights)
    if not panels:
        figure.text(0.01, 0.2, "Nothing here could be compared: rows.csv says why, case by case.", color=INK, fontsize=10)
    figure.set_size_inches(11.0, 0.6 + (sum(heights) or 0.4))
    env = results.environment
    about = f"{env.device} · {env.timestamp[:10]} · {env.commit} · ratios: best other time / ours"
    figure.suptitle(about, color=INK, fontsize=11, ha="left", x=0.01)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_whole(path, buffer.getvalue())


def _panels(results: Results) -> dict[Panel, list[Group]]:
    """Which cases each panel shows: those of a table that have a time or, where ratios are drawn, a ratio."""
    dtypes: dict[str, str] = {}  # by suite
    for row in right(results.rows):
        dtypes[row.suite] = min(row.dtype, dtypes.get(row.suite, row.dtype), key=_DTYPES.index)
    panels: dict[Panel, list[Group]] = {}
    for title, kinds in tables_of(results).items():
        for (kind, mode), cases in kinds.items():
            first = cases[0][0]
            panel: Panel = (_bars if first.suite in ("proxy", "loss", "search", "features", "study") else _dots), title
            if kind == "sep3x3" and len(cases) >= _MANY_RATES:
                panel = _map, f"{title}: {kind}, {mode}"
            drawn = [rows for rows in cases if (right(rows) if panel[0] is _bars else ratio(rows))]
            if drawn and first.dtype == dtypes[first.suite]:
                panels.setdefault(panel, []).extend(drawn)
    return panels


def _map(ax: Axes, groups: list[Group]) -> float:
    """The ratios of separable convolutions, by rate."""
    values = np.full((len(RATES), len(RATES)), math.nan)
    for rows in groups:
        i, j = (RATES.index(int(rate)) for rate in rows[0].case.removeprefix("sep3x3 ").split("x"))
        values[i, j] = ratio(rows)
        ax.text(j, i, f"{values[i, j]:.1f}", ha="center", va="center", fontsize=7.5, color="#222222")
    largest = max(2.0, float(np.nanmax(values)))
    ax.imshow(np.log2(values), cmap="RdYlGn", norm=TwoSlopeNorm(0.0, -1.0, math.log2(largest)))
    ticks = range(len(RATES))
    ax.set(xticks=ticks, yticks=ticks, xticklabels=RATES, yticklabels=RATES, xlabel="rate, width", ylabel="rate, height")
    ax.spines[:].set_visible(False)
    return 4.6


def _dots(ax: Axes, groups: list[Group]) -> float:
    """A line per case, with a dot for the ratio of each mode."""
    names = list(dict.fromkeys(rows[0].case for rows in groups))
    for rows in groups:
        colour, below = _MODES[rows[0].mode]
        value, place = ratio(rows) or math.nan, names.index(rows[0].case) + below
        ax.plot([1.0, value], [place, place], "o-", markevery=[1], color=colour, linewidth=0.8, markersize=4.5)
        _write(ax, f"{value:.2f}", max(value, 1.0), place)
    ax.axvline(1.0, color=INK, linewidth=1.0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}×")
    ax.margins(x=0.12)
    ax.set_xlabel("right: ours is quicker (blue: inference, orange: training)")
    show_grid(ax, "x")
    return 1.1 + 0.24 * len(names)


def _bars(ax: Axes, groups: list[Group]) -> float:
    """The median of each provider, with the 20th and 80th percentile."""
    labels: dict[float, str] = {}  # by place
    for number, rows in enumerate(groups):
        for row in right(rows):
            place, median = len(labels) + 0.6 * number, row.median_ms or 0.0
            span = [row.p20_ms or median, row.p80_ms or median]
            labels[place] = f"{row.case}: {row.provider}"
            ax.barh(place, median, height=0.78, color=_COLOURS.get(row.provider, "#999999"))
            ax.plot(span, [place, place], color=INK, marker="|")
            text = f"{in_digits(median)} ms"
            if row.suite == "search":
                text += f", {cells_per_hour(row):,.0f} cells per hour"
            if row is ours(rows) and (value := ratio(rows)):
                text += f", {value:.2f}× the best other"
            _write(ax, text, span[1], place)
    ax.set_yticks([*labels], [*labels.values()])
    ax.invert_yaxis()
    ax.margins(x=0.22)
    ax.set_xlim(left=0)
    ax.set_xlabel("milliseconds")
    show_grid(ax, "x")
    return 0.9 + 0.26 * len(labels) + 0.15 * len(groups)


def _write(ax: Axes, text: str, x: float, y: float) -> None:
    """To the right of a point."""
    ax.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK)
