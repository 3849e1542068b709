"""Draws the picture of a run, one row per suite."""

import math
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from bench.cases import COMPILE, COMPILE_MAX, EAGER, EAGER_CHANNELS_LAST, OURS, OURS_WITHOUT_KERNELS, SUITES, Suite
from bench.report import Group, in_ms, rate_ratios
from bench.results import Results, Row, ours, ratio, right
from bench.targets import cells_per_hour, is_separable
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
_MODE_COLOURS = {"training": "#cf3f4f", "inference": "#4a7fd0"}
_DTYPES = ("bfloat16", "float16", "float32")  # the first of these dtypes that a run has is drawn
_WIDTH = 11.0  # inches
_MANY_RATES = 16  # with at least this many rates, they are drawn as a map


class _Panel(NamedTuple):
    """One pair of axes: who draws it, of what, and how high it is in inches."""

    draw: Callable[[Axes, list[Group]], None]
    groups: list[Group]
    title: str
    height: float


def draw(path: Path, results: Results) -> None:
    """Write the picture, whole or not at all."""
    strips = [strip for suite in SUITES if (groups := _drawn(results, suite)) for strip in _strips(suite, groups)]
    heights = [max(panel.height for panel in strip) for strip in strips]
    figure = Figure(figsize=(_WIDTH, 0.6 + sum(heights)), layout="constrained")
    env = results.environment
    figure.suptitle(f"{env.device} · {env.timestamp[:10]} · {env.commit}", color=INK, fontsize=11, ha="left", x=0.01)
    parts = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=heights)[:, 0] if strips else ()
    for part, strip in zip(parts, strips, strict=True):
        for panel, ax in zip(strip, part.subplots(1, len(strip), squeeze=False)[0], strict=True):
            ax.set_title(f"{panel.title} · {panel.groups[0][0].dtype}", loc="left", fontsize=10, color=INK)
            style_axes(ax)
            panel.draw(ax, panel.groups)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_whole(path, buffer.getvalue())


def _drawn(results: Results, suite: Suite) -> list[Group]:
    """The suite's cases in one dtype, those that have a time."""
    timed = [group for group in results.groups(suite) if right(group)]
    dtype = next((dtype for dtype in _DTYPES if any(group[0].dtype == dtype for group in timed)), "")
    return [group for group in timed if group[0].dtype == dtype]


def _strips(suite: Suite, groups: list[Group]) -> Iterator[list[_Panel]]:
    """Panels that stand side by side."""
    if suite == "ops":
        yield from _operations(groups)
    elif suite == "cell":
        if compared := [group for group in groups if ratio(group)]:
            yield [_dot_panel("Cells", compared)]
    else:
        title = {"loss": "Loss", "proxy": "Proxy iteration", "search": "Search"}[suite]
        yield [_Panel(_times, groups, title, 0.9 + sum(0.26 * len(right(group)) + 0.15 for group in groups))]


def _operations(groups: list[Group]) -> Iterator[list[_Panel]]:
    """A map of ratios for each size and mode that has many rates; below, dots for the other cases, a column for each size."""
    maps, mapped = [], set()
    for (shape, mode, dtype), ratios in sorted(rate_ratios(groups).items()):
        if len(ratios) >= _MANY_RATES:
            chosen = [g for g in groups if is_separable(g[0]) and _key(g) == (shape, mode, dtype)]
            mapped |= {group[0].key for group in chosen}
            maps.append(_Panel(_heatmap, chosen, f"Separable, {mode}, {shape}: best other time / ours", 4.6))
    yield from (maps[i : i + 2] for i in range(0, len(maps), 2))
    rest = [group for group in groups if ratio(group) and group[0].key not in mapped]
    shapes = dict.fromkeys(group[0].shape for group in rest)
    if shapes:
        yield [_dot_panel(f"Operations, {shape}", [group for group in rest if group[0].shape == shape]) for shape in shapes]


def _key(group: Group) -> tuple[str, str, str]:
    return (group[0].shape, group[0].mode, group[0].dtype)


def _heatmap(ax: Axes, groups: list[Group]) -> None:
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


def _dot_panel(title: str, groups: list[Group]) -> _Panel:
    names = {group[0].case for group in groups}
    return _Panel(_dots, groups, f"{title}: best other time / ours", 1.1 + 0.24 * len(names))


def _dots(ax: Axes, groups: list[Group]) -> None:
    """A line per case, a dot per mode."""
    names = list(dict.fromkeys(group[0].case for group in groups))
    values = [ratio(group) or math.nan for group in groups]
    for group, value in zip(groups, values, strict=True):
        mode = group[0].mode
        place, colour = names.index(group[0].case) + (0.17 if mode == "training" else -0.17), _MODE_COLOURS[mode]
        ax.plot([1.0, value], [place, place], color=colour, linewidth=1.2, alpha=0.5)
        ax.plot(value, place, "o", color=colour, markersize=4.5)
        _write(ax, f"{value:.2f}", (value, place), is_left=value < 1)
    ax.axvline(1.0, color=INK, linewidth=1.0)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log", base=2)
    _plain_ticks(ax, values)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("right of the line: ours is quicker (blue: inference, red: training)")
    show_grid(ax, "x")


def _write(ax: Axes, text: str, place: tuple[float, float], *, is_left: bool = False) -> None:
    """Beside a point."""
    side: dict[str, Any] = {"xytext": (-6 if is_left else 6, 0), "ha": "right" if is_left else "left"}
    ax.annotate(text, place, **side, textcoords="offset points", va="center", fontsize=7.5, color=INK)


def _plain_ticks(ax: Axes, values: Sequence[float]) -> None:
    low, high = math.floor(math.log2(min(*values, 1.0))), math.ceil(math.log2(max(*values, 1.0)) + 0.3)
    ticks = [2.0**k for k in range(low, high + 1)]
    ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(2.0**low / 1.05, 2.0**high)


def _times(ax: Axes, groups: list[Group]) -> None:
    """Median with the 20th and 80th percentile, a bar per provider."""
    labels, position = [], 0.0
    for group in groups:
        for row in right(group):
            p20, median, p80 = row.p20_ms or 0.0, row.median_ms or 0.0, row.p80_ms or 0.0
            error = [[max(0.0, median - p20)], [max(0.0, p80 - median)]]
            colour = _COLOURS.get(row.provider, "#999999")
            ax.barh(position, median, height=0.78, color=colour, xerr=error, ecolor=INK, capsize=2)
            _write(ax, _in_words(row, group), (p80, position))
            labels.append((position, f"{row.case}: {row.provider}"))
            position += 1.0
        position += 0.6
    ax.set_yticks(*zip(*labels, strict=True))
    ax.invert_yaxis()
    ax.margins(x=0.22)
    ax.set_xlim(left=0)
    ax.set_xlabel("milliseconds")
    show_grid(ax, "x")


def _in_words(row: Row, group: Group) -> str:
    text = f"{in_ms(row.median_ms)} ms"
    if row.suite == "search":
        text += f", {cells_per_hour(row):,.0f} cells per hour"
    value = ratio(group)
    return f"{text}, {value:.2f}× the best other" if value and row is ours(group) else text
