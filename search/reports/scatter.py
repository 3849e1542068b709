"""Scatter plots of one score against another, with a dot for each cell (paper, figures 3 and 4b)."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation

from search.files import write_text, write_whole
from search.reports.diagram import INK, save_figure, shortened, show_grid, style_axes, with_titles
from search.reports.rank_correlation import MIN_POINTS, rank_correlation

_COLOUR, _MARKED_COLOUR = "#4a7fd0", "#d55e00"
_SIDE = 4.0  # inches, of one scatter
_DPI = 150


@dataclass(frozen=True)
class Point:
    """One cell: its scores on both axes, as fractions, one for each seed. A label marks it.

    The name is shown on hover, in an SVG file; the few best on the vertical axis have it written beside them.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str | None = None
    name: str = ""

    @property
    def place(self) -> tuple[float, float]:
        """The means over seeds, in percent."""
        return 100 * float(np.mean(self.x)), 100 * float(np.mean(self.y))


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
    """Write all scatter plots as one picture, at most `columns` in a row, whole or not at all, and as SVG beside it.

    The suffix says how: .png or .pdf. In the SVG a dot's name is shown on hover. A dot is the mean over seeds, its bars are
    one standard deviation. Raises ValueError for a score that is not finite.
    """
    columns = min(columns, len(scatters))
    rows = -(-len(scatters) // columns)
    figure = Figure(figsize=(columns * _SIDE, rows * _SIDE), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    titles: dict[str, list[str]] = {}
    for number, (axes, scatter) in enumerate(zip(all_axes, scatters, strict=False)):
        titles |= draw_scatter(axes, scatter, f"scatter{number}")
    for axes in all_axes[len(scatters) :]:
        axes.set_axis_off()
    buffer, text = BytesIO(), StringIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=_DPI)
    save_figure(figure, text, "svg")
    write_whole(path, buffer.getvalue())
    write_text(path.with_suffix(".svg"), with_titles(text.getvalue(), titles))


def draw_scatter(axes: Axes, scatter: Scatter, prefix: str = "") -> dict[str, list[str]]:
    """Draw one scatter plot on axes of the caller's figure -> the titles of its dots, whose `gid` begins with `prefix`."""
    style_axes(axes)
    show_grid(axes)
    axes.set(xlabel=f"{scatter.x_label}, {scatter.score} (%)", ylabel=f"{scatter.y_label}, {scatter.score} (%)")
    axes.margins(0.08)
    points = sorted(scatter.points, key=lambda point: point.label is not None)  # marked ones on top
    titles: dict[str, list[str]] = {}
    for number, point in enumerate(points):
        gid = f"{prefix}-{number}"
        _draw_point(axes, point, gid)
        x, y = point.place
        titles[gid] = [f"{point.name or point.label or 'cell'}: {x:.2f} %, {y:.2f} %"]
    for point in points:
        if point.label is not None:
            name = _write_beside(axes, shortened(point.label), point.place, below=9, fontsize=8, color=_MARKED_COLOUR)
            name.set_path_effects([withStroke(linewidth=1.5, foreground="white")])  # legible among dots, and covers few
    label_best(axes, [(*point.place, shortened(point.name)) for point in points if point.label is None and point.name])
    title = scatter.title
    if title is None and len(points) >= MIN_POINTS:
        title = str(rank_correlation(*zip(*(point.place for point in scatter.points), strict=True)))
    axes.set_title(title or "", color=INK, fontsize=10)
    return titles


def label_best(axes: Axes, dots: Sequence[tuple[float, float, str]], count: int = 3) -> None:
    """Write their names beside the `count` highest dots, once all is drawn; one that would meet another is left out."""
    scale = [1 / (high - low) for low, high in (axes.get_xlim(), axes.get_ylim())]
    written: list[tuple[float, float]] = []
    for x, y, name in sorted(dots, key=lambda dot: -dot[1])[:count]:
        width = 0.03 + 0.018 * len(name)  # of the axes'; a line of text is 0.06 high
        if all(abs(x - other_x) * scale[0] > width or abs(y - other_y) * scale[1] > 0.06 for other_x, other_y in written):
            written.append((x, y))
            _write_beside(axes, name, (x, y), below=-3, fontsize=7.5, color=INK)


def _write_beside(axes: Axes, name: str, dot: tuple[float, float], *, below: float, **look: Any) -> Annotation:
    """A name to the right of a dot, or to its left where the picture would end."""
    low, high = axes.get_xlim()
    is_right = (dot[0] - low) / (high - low) > 0.6
    offset, side = (-5 if is_right else 5, -below), "right" if is_right else "left"
    return axes.annotate(name, dot, offset, textcoords="offset points", ha=side, zorder=5, **look)


def _draw_point(axes: Axes, point: Point, gid: str) -> None:
    colour = _COLOUR if point.label is None else _MARKED_COLOUR
    x, y = point.place
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
        gid=gid,
    )
