"""Scatter plots of one score against another, with a dot for each cell (paper, figures 3 and 4b)."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from search.files import write_whole
from search.reports.diagram import INK, show_grid, style_axes
from search.reports.rank_correlation import MIN_POINTS, rank_correlation

_COLOUR, _MARKED_COLOUR = "#4a7fd0", "#cf3f4f"
_SIDE = 4.0  # inches, of one scatter
_DPI = 150


@dataclass(frozen=True)
class Point:
    """One cell: its scores on both axes, as fractions, one for each seed. A label marks it."""

    x: Sequence[float]
    y: Sequence[float]
    label: str | None = None


@dataclass(frozen=True)
class Scatter:
    """One scatter plot: its points, the score's name and axis labels; the axes show percent.

    The default title is ρ of the means with its 95 % bootstrap interval, if there are at least three points.
    """

    points: Sequence[Point]
    score: str
    x_label: str
    y_label: str
    title: str | None = None


def write_scatters(path: Path, scatters: Sequence[Scatter], columns: int = 3) -> None:
    """Write all scatter plots as one picture, at most `columns` in a row, whole or not at all.

    The suffix says how: .png, .svg or .pdf. A dot is the mean over seeds, its bars are one standard deviation. Raises
    ValueError for a score that is not finite.
    """
    columns = min(columns, len(scatters))
    rows = -(-len(scatters) // columns)
    figure = Figure(figsize=(columns * _SIDE, rows * _SIDE), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, scatter in zip(all_axes, scatters, strict=False):
        draw_scatter(axes, scatter)
    for axes in all_axes[len(scatters) :]:
        axes.set_axis_off()
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=_DPI)
    write_whole(path, buffer.getvalue())


def draw_scatter(axes: Axes, scatter: Scatter) -> None:
    """Draw one scatter plot on axes of the caller's figure."""
    style_axes(axes)
    show_grid(axes)
    axes.set(xlabel=f"{scatter.x_label}, {scatter.score} (%)", ylabel=f"{scatter.y_label}, {scatter.score} (%)")
    axes.margins(0.08)
    for point in sorted(scatter.points, key=lambda point: point.label is not None):  # marked ones on top
        _draw_point(axes, point)
    title = scatter.title
    if title is None and len(scatter.points) >= MIN_POINTS:
        x, y = ([float(np.mean(side)) for side in sides] for sides in zip(*((p.x, p.y) for p in scatter.points), strict=True))
        title = str(rank_correlation(x, y))
    axes.set_title(title or "", color=INK, fontsize=10)


def _draw_point(axes: Axes, point: Point) -> None:
    colour = _COLOUR if point.label is None else _MARKED_COLOUR
    x, y = (100 * float(np.mean(side)) for side in (point.x, point.y))
    x_error, y_error = (100 * float(np.std(side, ddof=1)) if len(side) > 1 else None for side in (point.x, point.y))
    axes.errorbar(
        x,
        y,
        xerr=x_error,
        yerr=y_error,
        fmt="o" if point.label is None else "D",
        color=colour,
        ecolor=(colour, 0.35),
        elinewidth=0.9,
        markersize=4.5,
        markeredgewidth=0,
    )
    if point.label is not None:
        text = axes.annotate(point.label, (x, y), (5, -9), textcoords="offset points", fontsize=8, color=colour, zorder=5)
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])  # legible among dots, and covers few
