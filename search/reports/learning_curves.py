"""The chart of a search that was cut short: what each cell scored on its rungs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.ticker import NullLocator

from reference.cell import Cell
from search.reports.charts import CUT_SHORT_COLOUR, SEARCH_COLOUR, drawn_chart
from search.reports.diagram import INK, Titles
from search.reports.rungs import curves_of
from search.runs.study import Run, TrialRecord

_COLOURS = (CUT_SHORT_COLOUR, "#d0a03c", "#3fae9d", SEARCH_COLOUR)  # from the lowest rung up; of three, without the second
_MOST_CURVES = 80  # that end on one rung: more are a blot, and each has a title
_ROOM = 0.13  # for the best one's name, of the axis
_LEAST_GAP = 0.07  # between two numbers of iterations on the axis


def draw_learning_curves(run: Run, best: Sequence[TrialRecord]) -> dict[str, Any]:
    """Heading, caption and SVG element of the chart, of a run with ranked cells."""
    ends = _by_last_rung(run)
    caption = "A line is a cell, in the colour of the rung on which it ends, in a dot. Point at the dot to see whose it is."
    if (most := max(map(len, ends))) > _MOST_CURVES:
        caption += f" Of the cells that end on a rung, up to {most:,}, {_MOST_CURVES} are drawn, evenly from best to worst."
    return drawn_chart("Learning curves", caption, lambda axes: _draw(axes, run, best, ends))


def _by_last_rung(run: Run) -> list[list[int]]:
    """The trials whose last score is on each rung, best first."""
    curves = curves_of(run)
    ends: list[list[int]] = [[] for _ in run.rungs]
    for number in sorted(curves, key=lambda number: (-curves[number][-1], number)):
        ends[len(curves[number]) - 1].append(number)
    return ends


def _draw(axes: Axes, run: Run, best: Sequence[TrialRecord], ends: Sequence[Sequence[int]]) -> Titles:
    cells, titles = {record.number: record for record in run.trials}, {}
    for rung, numbers in enumerate(ends):
        if not numbers:
            continue
        chosen = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), _MOST_CURVES)).round().astype(int))
        shown = [numbers[place] for place in chosen.tolist()]
        look: dict[str, Any] = {"color": _colour(run, rung), "alpha": 0.8 if len(shown) < 40 else 0.5}
        lines = [_points(run, run.rung_scores[number]) for number in shown]
        if rung > 0:
            axes.add_collection(LineCollection(lines, linewidths=0.7, zorder=1 + 0.1 * rung, **look))
        gid, last = f"rung{rung}", np.array([line[-1] for line in lines])
        axes.plot(*last.T, "o", markersize=3, markeredgewidth=0, gid=gid, zorder=2 + 0.1 * rung, **look)
        axes.plot([], [], "o-", markersize=3, color=_colour(run, rung), lw=1.2, label=f"{run.rungs[rung]:,} iterations")
        titles[gid] = [_title(run, number, cells[number].cell) for number in shown]
    _draw_best(axes, run, best[0])
    _label_iterations(axes, run)
    axes.set(xlabel="iterations", ylabel=f"{run.task.score.name} (%)")
    return titles


def _draw_best(axes: Axes, run: Run, record: TrialRecord) -> None:
    points = _points(run, run.rung_scores[record.number])
    look: dict[str, Any] = {"color": _colour(run, record.rung), "zorder": 4}
    axes.plot(*points.T, "o-", lw=2.2, markersize=4.5, markeredgewidth=0, label=f"best, trial {record.number}", **look)
    axes.annotate(
        f"{record.number}", points[-1], (6, 0), textcoords="offset points", va="center", fontsize=8, color=INK, zorder=5
    )


def _label_iterations(axes: Axes, run: Run) -> None:
    """Ticks at the rungs on a logarithmic axis, as many as there is room for, always at the last."""
    low, high = np.log(run.rungs[0]), np.log(run.rungs[-1])
    ticks = [run.rungs[-1]]
    for iterations in reversed(run.rungs[:-1]):
        if np.log(ticks[-1]) - np.log(iterations) > _LEAST_GAP * (high - low):
            ticks.append(iterations)
    axes.set_xscale("log")
    axes.set_xlim(np.exp(low - 0.04 * (high - low)), np.exp(high + _ROOM * (high - low)))
    axes.set_xticks(ticks, [f"{iterations:,}" for iterations in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _points(run: Run, scores: Sequence[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Iterations and score in percent, (rungs, 2)."""
    return np.array([(iterations, 100 * score) for iterations, score in zip(run.rungs, scores, strict=False)])


def _colour(run: Run, rung: int) -> str:
    last = len(run.rungs) - 1
    colours = _COLOURS if last > 2 else (_COLOURS[0], *_COLOURS[2:])
    return to_hex(LinearSegmentedColormap.from_list("rungs", colours)(rung / last))


def _title(run: Run, number: int, cell: Cell) -> str:
    """What the end of a curve says on hover."""
    passed = zip(run.rungs, run.rung_scores[number], strict=False)
    scores = ", ".join(f"{run.task.score.text(score)} after {iterations:,}" for iterations, score in passed)
    return f"trial {number}: {run.task.score.name} {scores} iterations\n{cell}"
