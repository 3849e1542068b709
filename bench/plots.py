"""Draws the picture of a run, one row per suite."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure

from bench.cases import COMPILE, COMPILE_MAX, EAGER, EAGER_CHANNELS_LAST, OURS, OURS_WITHOUT_KERNELS, Suite
from bench.report import cells_per_hour, rate_ratios
from bench.results import Results, Row, best_other, ours, ratio, right
from reference.cell import RATES
from search.reports.diagram import INK, show_grid, style_axes

_COLOURS = {
    OURS.name: "#cf3f4f",
    EAGER.name: "#4a7fd0",
    EAGER_CHANNELS_LAST.name: "#86aee3",
    COMPILE.name: "#8e62c8",
    COMPILE_MAX.name: "#b998e0",
    OURS_WITHOUT_KERNELS.name: "#d9822b",
}
_MODE_COLOURS = {"training": "#cf3f4f", "inference": "#4a7fd0"}
_DTYPES = ("bfloat16", "float16", "float32")  # the first of these dtypes that a run has is drawn
_WIDTH = 11.0  # inches
_MANY_RATES = 16  # with at least this many rates, they are drawn as a map


def draw(path: Path, results: Results) -> None:
    """Write the picture, whole or not at all."""
    strips = [strip for suite in _DRAWERS if (groups := _drawn(results, suite)) for strip in _DRAWERS[suite](groups) if strip]
    figure = Figure(
        figsize=(_WIDTH, 0.6 + sum(max(panel.height for panel in strip) for strip in strips)), layout="constrained"
    )
    env = results.environment
    figure.suptitle(f"{env.device} · {env.timestamp[:10]} · {env.commit}", color=INK, fontsize=11, ha="left", x=0.01)
    if strips:
        heights = [max(panel.height for panel in strip) for strip in strips]
        parts = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, strip in zip(parts, strips, strict=True):
            _draw_strip(part, strip)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=130)
    partial.replace(path)


class _Panel:
    """One pair of axes: the function that draws it, its data, and its height in inches."""

    def __init__(self, draw: Callable[[Axes, list[list[Row]]], None], groups: list[list[Row]], title: str, height: float):
        self.draw, self.groups, self.title, self.height = draw, groups, title, height


def _draw_strip(part: SubFigure, strip: Sequence[_Panel]) -> None:
    axes = part.subplots(1, len(strip), squeeze=False)[0]
    for panel, ax in zip(strip, axes, strict=True):
        ax.set_title(f"{panel.title} · {panel.groups[0][0].dtype}", loc="left", fontsize=10, color=INK)
        style_axes(ax)
        panel.draw(ax, panel.groups)


def _drawn(results: Results, suite: Suite) -> list[list[Row]]:
    """The suite's cases that have a time, in one dtype."""
    timed = [group for group in results.groups(suite) if right(group)]
    dtype = next((dtype for dtype in _DTYPES if any(group[0].dtype == dtype for group in timed)), "")
    return [group for group in timed if group[0].dtype == dtype]


def _ops(groups: list[list[Row]]) -> list[list[_Panel]]:
    """A map of ratios for each size and mode with many rates; below it dots for the other cases, a column per size."""
    mapped = {key for key, ratios in rate_ratios(groups).items() if len(ratios) >= _MANY_RATES}
    maps = []
    for shape, mode, dtype in sorted(mapped):
        chosen = [group for group in groups if _key(group) == (shape, mode, dtype)]
        maps.append(_Panel(_heatmap, chosen, f"Separable, {mode}, {shape}: best other time / ours", 4.6))
    rest = [g for g in groups if ratio(g) and not (_key(g) in mapped and g[0].case.startswith("sep3x3"))]
    dots = []
    for shape in dict.fromkeys(group[0].shape for group in rest):
        chosen = [group for group in rest if group[0].shape == shape]
        names = {group[0].case for group in chosen}
        dots.append(_Panel(_dots, chosen, f"Operations, {shape}: best other time / ours", 1.1 + 0.24 * len(names)))
    return [maps[i : i + 2] for i in range(0, len(maps), 2)] + [dots]


def _key(group: list[Row]) -> tuple[str, str, str]:
    return (group[0].shape, group[0].mode, group[0].dtype)


def _heatmap(ax: Axes, groups: list[list[Row]]) -> None:
    (ratios,) = rate_ratios(groups).values()
    values = np.array([[ratios.get((h, w), math.nan) for w in RATES] for h in RATES])
    largest = max(2.0, float(np.nanmax(values)))
    ax.imshow(np.log2(values), cmap="RdYlGn", norm=TwoSlopeNorm(0.0, -1.0, math.log2(largest)))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7.5, color="#222222")
    ax.set_xticks(range(len(RATES)), [str(rate) for rate in RATES])
    ax.set_yticks(range(len(RATES)), [str(rate) for rate in RATES])
    ax.spines[:].set_visible(False)
    ax.set(xlabel="rate, width", ylabel="rate, height")


def _dots(ax: Axes, groups: list[list[Row]]) -> None:
    names = list(dict.fromkeys(group[0].case for group in groups))
    values = []
    for group in groups:
        value, mode, place = ratio(group) or math.nan, group[0].mode, float(names.index(group[0].case))
        place += 0.17 if mode == "training" else -0.17
        ax.plot([1.0, value], [place, place], color=_MODE_COLOURS[mode], linewidth=1.2, alpha=0.5)
        ax.plot(value, place, "o", color=_MODE_COLOURS[mode], markersize=4.5)
        side = 6 if value >= 1 else -6
        ax.annotate(
            f"{value:.2f}",
            (value, place),
            (side, 0),
            textcoords="offset points",
            va="center",
            ha="left" if side > 0 else "right",
            fontsize=7,
            color=INK,
        )
        values.append(value)
    ax.axvline(1.0, color=INK, linewidth=1.0)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log", base=2)
    _plain_ticks(ax, values)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("right of the line: ours is quicker (blue: inference, red: training)")
    show_grid(ax, "x")


def _plain_ticks(ax: Axes, values: Sequence[float]) -> None:
    low, high = math.floor(math.log2(min(*values, 1.0))), math.ceil(math.log2(max(*values, 1.0)) + 0.3)
    ticks = [2.0**k for k in range(low, high + 1)]
    ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(2.0**low / 1.05, 2.0**high)


def _times(ax: Axes, groups: list[list[Row]]) -> None:
    """Median with the 20th and 80th percentile, a bar per provider."""
    labels, position = [], 0.0
    for group in groups:
        best = best_other(group)
        for row in right(group):
            _bar(ax, position, row, row.median_ms or 0.0, (row.p20_ms or 0.0, row.p80_ms or 0.0))
            text = f"{row.median_ms:.4g} ms"
            mine, value = ours(group), ratio(group)
            if row is mine and best and value:
                text += f", {value:.2f}× the best other"
            ax.annotate(
                text, (row.p80_ms or 0.0, position), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK
            )
            labels.append((position, f"{row.case}: {row.provider}"))
            position += 1.0
        position += 0.6
    _finish_bars(ax, labels, "milliseconds")


def _cells_per_hour(ax: Axes, groups: list[list[Row]]) -> None:
    labels, position = [], 0.0
    for group in groups:
        for row in right(group):
            value = cells_per_hour(row)
            scale = value * (row.median_ms or 0.0)
            _bar(ax, position, row, value, (scale / (row.p80_ms or 1.0), scale / (row.p20_ms or 1.0)))
            end = scale / (row.p20_ms or 1.0)
            ax.annotate(f"{value:,.0f}", (end, position), (5, 0), textcoords="offset points", va="center", fontsize=8)
            labels.append((position, row.provider))
            position += 1.0
    _finish_bars(ax, labels, f"cells per hour ({groups[0][0].shape})")


def _bar(ax: Axes, position: float, row: Row, value: float, spread: tuple[float, float]) -> None:
    error = [[max(0.0, value - spread[0])], [max(0.0, spread[1] - value)]]
    ax.barh(position, value, height=0.78, color=_COLOURS.get(row.provider, "#999999"), xerr=error, ecolor=INK, capsize=2)


def _finish_bars(ax: Axes, labels: Sequence[tuple[float, str]], quantity: str) -> None:
    ax.set_yticks([position for position, _ in labels], [label for _, label in labels])
    ax.invert_yaxis()
    ax.margins(x=0.22)
    ax.set_xlim(left=0)
    ax.set_xlabel(quantity)
    show_grid(ax, "x")


def _bars(groups: list[list[Row]]) -> float:
    return 0.9 + sum(0.26 * len(right(group)) + 0.15 for group in groups)


def _cells(ax: Axes, groups: list[list[Row]]) -> None:
    """A dot per cell; named cells have a ring."""
    points = [(mine.median_ms or 0.0, value, mine) for group in groups if (mine := ours(group)) and (value := ratio(group))]
    for mode, colour in _MODE_COLOURS.items():
        times, ratios = (
            [ms for ms, _, row in points if row.mode == mode],
            [value for _, value, row in points if row.mode == mode],
        )
        if times:
            ax.scatter(times, ratios, color=colour, s=26, alpha=0.75, edgecolor="none", label=mode)
    named = [point for point in points if not point[2].case.startswith("random")]
    for i, (ms, value, row) in enumerate(named):
        ax.scatter(ms, value, s=52, facecolor="none", edgecolor=INK, linewidth=1.0)
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkB": 4.0}
        place = (0, -24 if i % 2 else 24)  # the published cells lie close together
        ax.annotate(
            row.case,
            (ms, value),
            place,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=INK,
            arrowprops=line,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    ax.axhline(1.0, color=INK, linewidth=1.0)
    ax.set_ylim(0, max([1.0, *(value for _, value, _ in points)]) * 1.2)
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.margins(x=0.08)
    ax.set_xlabel("ours, milliseconds")
    show_grid(ax, "y")
    ax.legend(frameon=False, fontsize=8, loc="lower right")


_DRAWERS: dict[Suite, Callable[[list[list[Row]]], list[list[_Panel]]]] = {
    "ops": _ops,
    "loss": lambda groups: [[_Panel(_times, groups, "Loss", _bars(groups))]],
    "cell": lambda groups: [[_Panel(_cells, groups, "Cells: best other time / ours", 3.4)]],
    "proxy": lambda groups: [[_Panel(_times, groups, "Proxy iteration", _bars(groups))]],
    "search": lambda groups: [[_Panel(_cells_per_hour, groups, "Search", _bars(groups))]],
}
