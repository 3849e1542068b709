"""The charts of a run's page: the scores of all cells, progress, cost and loss. A dot says on hover whose it is.

Of more trials than a browser shows at once, the dots are one picture, over which the best stand as dots of their own.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from reference.cell import Cell
from search.cells.pareto import pareto_front
from search.reports.diagram import INK, Titles, figure_svg, shortened, show_grid, style_axes
from search.reports.page import quantity
from search.reports.rungs import is_in_full, iterations_of, trained_longest
from search.reports.scatter import label_best
from search.runs.study import Run, TrialRecord, comparison_label
from search.runs.tables import FOUND
from search.tasks.proxy import CostKind, ProxyResult

SEARCH_COLOUR = "#4a7fd0"
CUT_SHORT_COLOUR = "#9aa3b0"  # of cells not trained in full
# Of compared cells, in turn: Okabe and Ito's colours, which differ for every kind of colour vision, and a brown.
_COLOURS = ("#e69f00", "#cc79a7", "#d55e00", "#009e73", INK, "#8b5e3c")
_MARKERS = ("D", "s", "^", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))  # of lines; the next one where the colours begin again
_Chart = tuple[str, Callable[..., Titles], str]  # heading, what draws it, caption
KNOWN_LABELS = {"linear": "Linear", "mlp": "MLP", "aspp": "ASPP", "psp": "PSP", "dpc": "Published DPC"}
_MOST_DOTS = 1000  # of a run's trials: in both charts together half a megabyte of the page
_BEST_DOTS = 100  # that a run of more shows, beside those on a chart's line
_COST_AXES = {"multiply_adds": (1e9, "multiply-adds (10⁹)"), "latency": (1, "latency (multiple of the published cell's)")}
_LEGEND_CHARACTERS = 76  # in a row, with six for each line or dot


@dataclass(frozen=True)
class Group:
    """One cell with its proxy scores, one per seed, and how it is drawn."""

    name: str
    cell: Cell
    results: tuple[ProxyResult, ...]
    colour: str
    marker: str
    dashes: Any  # a line style of matplotlib

    @property
    def label(self) -> str:
        return comparison_label(self.name, KNOWN_LABELS)

    @property
    def label_and_seeds(self) -> str:
        """With the number of its scores."""
        return f"{self.label} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{len(self.results)})"

    @property
    def is_found(self) -> bool:
        """Whether it is the search's best cell, scored again."""
        return self.name.startswith(FOUND)

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.results]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    def cost(self, kind: CostKind) -> float:
        """The mean over seeds: latencies are measured anew with each."""
        return float(np.mean([result.cost(kind) for result in self.results]))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


def groups_of(run: Run) -> list[Group]:
    """The compared cells, in the order in which they were first scored."""
    names = dict.fromkeys(record.name for record in run.baselines)
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle([dashes for dashes in _DASHES for _ in _COLOURS]), strict=False)
    groups = []
    for name, look in zip(names, looks, strict=False):
        same = [record for record in run.baselines if record.name == name]
        groups.append(Group(name, same[0].cell, tuple(record.result for record in same), *look))
    return groups


def draw_charts(run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Draw the distinct cells, best first, and the compared ones: heading, caption and SVG element of each chart."""
    if not best:
        return
    has_spread = any(group.std is not None for group in groups)
    compared, grey = trained_longest(best), ""
    of_cells, each = "Scores of all cells", "Each distinct cell once"
    if run.rungs:
        of_cells = f"Scores of the cells {_how_long(run, best)}"
        each = f"{len(compared):,} of {len(best):,} distinct cells, each once"
    if len(compared) < len(best):
        grey = " Grey: scores after fewer iterations."
    charts: tuple[_Chart, ...] = (
        (
            of_cells,
            _draw_distribution,
            each + ("; bands show ± one standard deviation over seeds." if has_spread else "."),
        ),
        (
            "Progress of the search",
            _draw_progress,
            "Dots are trials, the best with their numbers; the line is the best so far. Point at "
            f"{_pointed(run)} to see its cell.{grey}",
        ),
        (
            "Score against cost",
            partial(_draw_cost, kind="multiply_adds"),
            "Multiply-adds of the cell for one validation image; the line joins the Pareto front of the two. "
            f"{_pointed(run).capitalize()} names its cell, too.{grey}",
        ),
        *_of_latency(run),
        ("Training loss", _draw_loss, "The best cell, and every seed of the cells beside it; running means."),
    )
    for heading, draw, caption in charts:
        yield drawn_chart(heading, caption, partial(draw, run=run, best=best, groups=groups))


def _of_latency(run: Run) -> list[_Chart]:
    if run.cost_kind != "latency":
        return []
    caption = (
        "The cell alone, for one validation image, measured right after its training, in turns with the published cell, which "
        "is at 1. The line joins the Pareto front of the two. Without known cells that take less than half of the fastest "
        "one's time."
    )
    return [("Score against latency", partial(_draw_cost, kind="latency"), caption)]


def drawn_chart(heading: str, caption: str, draw: Callable[[Axes], Titles]) -> dict[str, Any]:
    """Heading, caption and SVG element of a chart."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    show_grid(axes)
    titles = draw(axes)
    _draw_legend(figure, axes)
    return {"heading": heading, "caption": caption, "svg": Markup(figure_svg(figure, heading, titles))}


def _how_long(run: Run, best: Sequence[TrialRecord]) -> str:
    """How long the cells that went furthest were trained, in words."""
    if is_in_full(run, best[0]):
        return "trained in full"
    return f"trained longest so far, {iterations_of(run, best[0]):,} iterations"


def _draw_legend(figure: Figure, axes: Axes) -> None:
    """As many columns as the longest name allows; each further row makes the picture higher."""
    handles, names = axes.get_legend_handles_labels()
    labels = [shortened(name) for name in names]
    columns = int(np.clip(_LEGEND_CHARACTERS // (max(map(len, labels)) + 6), 1, 4))
    rows = -(-len(labels) // columns)
    figure.set_size_inches(5.2, 3.3 + 0.17 * (rows - 1))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, fontsize=8, frameon=False, labelcolor=INK, columnspacing=1.2
    )


def _draw_distribution(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Titles:
    scores = [100 * record.score for record in trained_longest(best) if record.score is not None]
    bins = np.histogram_bin_edges(scores, bins=int(np.clip(2 * np.sqrt(len(scores)), 1, 60)))
    axes.hist(scores, bins=list(bins), color=SEARCH_COLOUR, edgecolor="none", rwidth=0.94, label="search")
    for group in groups:
        axes.axvline(100 * group.mean, color=group.colour, linewidth=1.8, linestyle=group.dashes, label=group.label)
        if group.std is not None:
            axes.axvspan(100 * (group.mean - group.std), 100 * (group.mean + group.std), color=group.colour, alpha=0.15, lw=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"{run.task.score.name} (%)", ylabel="cells")
    return {}


class _Dot(NamedTuple):
    """A trial with its place in a chart."""

    record: TrialRecord
    x: float
    y: float  # its score in percent

    @property
    def place(self) -> tuple[float, float]:
        return self.x, self.y


def _draw_progress(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Titles:
    dots = [_Dot(record, record.number, 100 * record.score) for record in run.trials if record.score is not None]
    rises = _front_line([dot.place for dot in dots if dot.record.rung == best[0].rung])
    last = max(record.number for record in run.trials)
    numbers, best_so_far = zip(*rises, (last, rises[-1][1]), strict=True)
    axes.step(numbers, best_so_far, where="post", color=SEARCH_COLOUR, lw=1.8, label=_best_so_far(run, best))
    for group in groups:
        axes.axhline(100 * group.mean, color=group.colour, linewidth=1.5, linestyle=group.dashes, label=group.label)
    titles = _draw_trials(axes, run, dots, best, rises)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlim=(-0.03 * last - 0.5, 1.03 * last + 0.5), xlabel="trial", ylabel=f"{run.task.score.name} (%)")
    compared = trained_longest(best)
    names = [(record.number, 100 * record.score, f"{record.number}") for record in compared if record.score is not None]
    label_best(axes, names)
    return titles


def _best_so_far(run: Run, best: Sequence[TrialRecord]) -> str:
    if not run.rungs:
        return "best so far"
    return "best so far in full" if is_in_full(run, best[0]) else f"best so far after {iterations_of(run, best[0]):,}"


def _draw_cost(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group], kind: CostKind) -> Titles:
    unit, label = _COST_AXES[kind]
    if kind == "latency":  # those of a layer or two would press all others into a corner
        fastest = min(record.cost(kind) for record in best)
        groups = [group for group in groups if group.cost(kind) >= fastest / 2]
    dots = [_Dot(record, record.cost(kind) / unit, 100 * record.score) for record in best if record.score is not None]
    compared = [dot for dot in dots if dot.record.rung == best[0].rung]
    front = _front_line([dot.place for dot in compared])
    axes.plot(*zip(*front, strict=True), "-", color=SEARCH_COLOUR, linewidth=1.2)
    titles = _draw_trials(axes, run, dots, best, front, label="search")
    for number, group in enumerate(groups):
        cost, score = group.cost(kind) / unit, 100 * group.mean
        spread = None if group.std is None else 100 * group.std
        gid = f"compared{number}"
        look: dict[str, Any] = {"color": group.colour, "markersize": 6, "capsize": 3, "zorder": 4}
        axes.errorbar(cost, score, yerr=spread, fmt=group.marker, label=group.label, gid=gid, **look)
        titles[gid] = [f"{group.label}: {score:.2f} %\n{group.cell}"]
    axes.set(xlabel=label, ylabel=f"{run.task.score.name} (%)")
    label_best(axes, [(*dot.place, f"{dot.record.number}") for dot in compared])
    return titles


def _draw_trials(
    axes: Axes,
    run: Run,
    dots: Sequence[_Dot],
    best: Sequence[TrialRecord],
    line: Collection[tuple[float, float]],
    label: str | None = None,
) -> dict[str, list[str]]:
    """Draw all dots; their titles, or those of the best and of the places on the chart's line where there are too many."""
    shorter = [dot for dot in dots if dot.record.rung < best[0].rung]
    titles = _draw_shorter(axes, run, shorter) if shorter else {}
    dots = [dot for dot in dots if dot.record.rung == best[0].rung]
    look: dict[str, Any] = {"color": SEARCH_COLOUR, "markeredgewidth": 0}
    if _is_crowded(run):
        axes.plot(*_places(dots), "o", alpha=0.25, markersize=2, zorder=1, rasterized=True, **look)
        shown, places = {record.number for record in best[:_BEST_DOTS]}, set(line)
        dots = [dot for dot in dots if dot.record.number in shown or dot.place in places]
    axes.plot(*_places(dots), "o", alpha=0.6, markersize=4.5, gid="trials", zorder=3, label=label, **look)
    return titles | {"trials": [_title(run, dot.record) for dot in dots]}


def _draw_shorter(axes: Axes, run: Run, dots: Sequence[_Dot]) -> dict[str, list[str]]:
    """Draw the dots of cells that were trained for fewer iterations, small and grey; their titles, if not too many."""
    look: dict[str, Any] = {"color": CUT_SHORT_COLOUR, "markeredgewidth": 0}
    axes.plot([], [], "o", markersize=3, label="fewer iterations", **look)
    if _is_crowded(run):
        axes.plot(*_places(dots), "o", alpha=0.25, markersize=2, zorder=0.9, rasterized=True, **look)
        return {}
    axes.plot(*_places(dots), "o", alpha=0.6, markersize=3, gid="shorter", zorder=2, **look)
    return {"shorter": [_title(run, dot.record) for dot in dots]}


def _places(dots: Sequence[_Dot]) -> tuple[list[float], list[float]]:
    return [dot.x for dot in dots], [dot.y for dot in dots]


def _is_crowded(run: Run) -> bool:
    """Whether there are too many dots for one element each."""
    return len(run.trials) > _MOST_DOTS


def _pointed(run: Run) -> str:
    """Which dots have a title."""
    return f"a larger dot (the best {_BEST_DOTS} and the line's)" if _is_crowded(run) else "a dot"


def _title(run: Run, record: TrialRecord) -> str:
    """What a trial's dot says on hover."""
    assert record.score is not None  # it has a dot
    assert record.multiply_adds is not None
    score, cost = run.task.score.text(record.score), f"{quantity(record.multiply_adds)} multiply-adds"
    if run.cost_kind == "latency":
        cost += f", latency {record.cost(run.cost_kind):.2f}"
    after = f" after {iterations_of(run, record):,} iterations" if run.rungs else ""
    return f"trial {record.number}: {run.task.score.name} {score}{after}, {cost}\n{record.cell}"


def _front_line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (x, y), by x, that no other one with a lower or equal x beats in y."""
    return [points[place] for place in reversed(pareto_front([(y, -x) for x, y in points]))]


def _draw_loss(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Titles:
    for group in groups:
        for k, again in enumerate(record for record in run.baselines if record.name == group.name):
            label = group.label if k == 0 else None
            axes.plot(*_smooth(run.curve(again)), linestyle=group.dashes, color=group.colour, lw=1.1, label=label, alpha=0.8)
    for record in best[:1]:
        axes.plot(*_smooth(run.curve(record)), color=SEARCH_COLOUR, lw=2, label=f"best, trial {record.number}")
    axes.set(xlabel="iteration", ylabel="loss (per pixel)")
    return {}


def _smooth(curve: Sequence[tuple[int, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Running mean over 1/25 of the curve: iterations and losses."""
    points = np.array(curve, dtype=np.float64).reshape(-1, 2)
    window = max(1, len(points) // 25)
    if not len(points):
        return points[:, 0], points[:, 1]
    kernel = np.full(window, 1.0 / window)
    return np.convolve(points[:, 0], kernel, "valid"), np.convolve(points[:, 1], kernel, "valid")
