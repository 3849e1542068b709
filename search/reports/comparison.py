"""The comparison of ways to search on a table of cells: regret against trials and against computing time.

The regret of a search is how much worse its best cell is than the table's best, both by the mean of all seeds after a whole
training: what the cell is worth, and not the one score by which the search chose it.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from search.files import write_text
from search.reports.charts import drawn_chart
from search.reports.diagram import INK, Titles, save_figure, show_grid, style_axes
from search.reports.page import write_page
from search.reports.rank_correlation import MIN_POINTS, spearman
from search.tabular.replay import Moment, Strategy
from search.tabular.table import CellTable

Searches = Mapping[int, Sequence[Moment]]  # by seed
QUARTILES = (0.25, 0.5, 0.75)
BASELINE = "random"  # the sampler, without early stopping, that all others are compared with
_COLOURS = {
    "paper": "#4a7fd0",
    "random": INK,
    "evolution": "#009e73",
    "local": "#d55e00",
    "predictor": "#cc79a7",
    "tpe": "#e69f00",
}
_SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the trials, at which the tables say where the searches are
_POINTS = 200  # of a line


class Axis(NamedTuple):
    """What regret is drawn against."""

    key: str
    label: str
    of: Callable[[Moment, CellTable], float]


TRIALS = Axis("trials", "trials", lambda moment, table: moment.trials)
TRAININGS = Axis("trainings", "whole trainings", lambda moment, table: moment.iterations / table.iterations[-1])
AXES = (TRIALS, TRAININGS)


@dataclass(frozen=True)
class Summary:
    """The quartiles of the regrets of one kind of searches at each budget, (budgets, 3), and what they took in the median.

    `against` is in how many searches it ended better than the baseline with the same seed, as well, and worse.
    """

    strategy: Strategy
    count: int
    quartiles: Mapping[str, NDArray[np.float64]]  # by the axis
    trainings: float
    seconds: float
    against: tuple[int, int, int] | None


def write_comparison(directory: Path, table: CellTable, found: Mapping[Strategy, Searches], workers: int, command: str) -> str:
    """Write comparison.html, comparison.png and .svg, and summary.csv into the folder; return the text to print."""
    trials = max(moments[-1].trials for searches in found.values() for moments in searches.values())
    budgets = sorted({max(1, round(share * trials)) for share in _SHARES})
    summaries = [_summary(table, strategy, found, budgets) for strategy in found]
    _write_csv(directory / "summary.csv", summaries, budgets)
    figure = _figure(table, found)
    for suffix in ("png", "svg"):
        save_figure(figure, directory / f"comparison.{suffix}", suffix)
    charts = [
        drawn_chart(f"{_of_rule(rule)}, against {axis.label}", _CAPTIONS[axis], partial(_draw, table, found, rule, axis))
        for rule in _rules(found)
        for axis in AXES
    ]
    known = table.provenance.get("settings", {})
    content = {
        "charts": charts,
        "summaries": summaries,
        "budgets": budgets,
        "spread": partial(_spread, scale=_scale(table)),
        "measure": table.measure,
        "command": command,
        "workers": workers,
        "facts": _facts(table),
        "subject": " · ".join(str(known[name]) for name in ("dataset", "backbone") if name in known),
        "pairs": _pairs,
        "iterations": table.iterations,
    }
    write_page(directory / "comparison.html", "comparison.html.jinja", content)
    lines = [*_facts(table), "", *_lines(summaries, budgets, table), "", f"report: {directory / 'comparison.html'}"]
    return "\n".join(lines)


_CAPTIONS = {
    TRIALS: "Lines are medians, bands go from the first to the third quartile. A copy of an earlier cell counts as a trial.",
    TRAININGS: "The same against the iterations of all trainings so far, as multiples of a whole training: without early "
    "stopping as many as trials, but for copies.",
}


def regrets(table: CellTable, searches: Searches, axis: Axis, places: Sequence[float]) -> NDArray[np.float64]:
    """The regret of each search at each place on the axis, (searches, places): nan before the first score."""
    worth = table.means.max() - table.means  # (cells,)
    found = np.full((len(searches), len(places)), np.nan)
    for row, moments in zip(found, searches.values(), strict=True):
        positions = np.array([axis.of(moment, table) for moment in moments])
        last = np.searchsorted(positions, np.asarray(places) + 1e-9, side="right") - 1
        bests = np.array([moment.best for moment in moments])
        row[last >= 0] = worth[bests[last[last >= 0]]]
    return found


def _summary(table: CellTable, strategy: Strategy, found: Mapping[Strategy, Searches], budgets: Sequence[int]) -> Summary:
    searches = found[strategy]
    quartiles = {axis.key: np.quantile(regrets(table, searches, axis, budgets), QUARTILES, axis=0).T for axis in AXES}
    ends = [moments[-1] for moments in searches.values()]
    return Summary(
        strategy,
        len(searches),
        quartiles,
        float(np.median([TRAININGS.of(end, table) for end in ends])),
        float(np.median([end.seconds for end in ends])),
        _against(table, strategy, found),
    )


def _against(table: CellTable, strategy: Strategy, found: Mapping[Strategy, Searches]) -> tuple[int, int, int] | None:
    """How many searches end with a better cell than the baseline with the same seed, as good, and worse."""
    baseline = next((each for each in found if each.name == BASELINE), None)
    if baseline is None or baseline == strategy:
        return None
    seeds = found[strategy].keys() & found[baseline].keys()
    ends = [(found[strategy][seed][-1].best, found[baseline][seed][-1].best) for seed in seeds]
    gains = [table.means[own] - table.means[other] for own, other in ends]
    return sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains), sum(gain < 0 for gain in gains)


def _facts(table: CellTable) -> list[str]:
    """What is to be known of the table to read regrets: its best cell, how much seeds differ, and how early scores tell."""
    measure, last = table.measure, table.scores[:, :, -1]  # (cells, seeds)
    best, median, worst = (measure.text(float(value)) for value in np.quantile(table.means, (1, 0.5, 0)))
    lines = [
        f"{len(table.cells):,} cells, {table.num_seeds} seeds; {measure.name}: best {best}, median {median}, worst {worst}",
        f"best cell: {table.cells[int(table.means.argmax())].cell}",
    ]
    if table.num_seeds > 1:
        noise = float(np.sqrt(last.var(axis=1, ddof=1).mean()))
        error = measure.text(noise / table.num_seeds**0.5)
        lines.append(
            f"standard deviation of one training {measure.text(noise)}, of the mean of {table.num_seeds} {error}: "
            "smaller regrets are not told apart"
        )
    if len(table.cells) < MIN_POINTS:  # of which there is no order to speak of
        return lines
    between = [spearman(list(last[:, i]), list(last[:, j])) for i in range(table.num_seeds) for j in range(i)]
    if between:
        lines.append(f"Spearman's ρ of the order of cells between two seeds: {np.mean(between):.2f}")
    early = []
    for rung, iterations in enumerate(table.iterations[:-1]):
        by_seed = [spearman(list(table.scores[:, seed, rung]), list(last[:, seed])) for seed in range(table.num_seeds)]
        early.append(f"{np.mean(by_seed):.2f} after {iterations:,}")
    return [*lines, f"ρ with the order after all {table.iterations[-1]:,} iterations: {', '.join(early)}"]


# Tables


def _lines(summaries: Sequence[Summary], budgets: Sequence[int], table: CellTable) -> list[str]:
    lines = []
    for axis in AXES:
        lines.append(f"{f'regret after so many {axis.label}':<34}" + "".join(f"{budget:>18}" for budget in budgets))
        for summary in summaries:
            cells = "".join(f"{_spread(row, _scale(table)):>18}" for row in summary.quartiles[axis.key])
            lines.append(f"{summary.strategy.name:<34}{cells}")
        lines.append("")
    lines.append(f"{'at the end':<34}{'searches':>10}{'whole trainings':>18}{'minutes':>10}{'against random':>18}")
    for summary in summaries:
        ends = f"{summary.count:>10}{summary.trainings:>18.1f}{summary.seconds / 60:>10.1f}{_pairs(summary):>18}"
        lines.append(f"{summary.strategy.name:<34}{ends}")
    return [*lines, "", _NOTE.format(measure=table.measure.name)]


_NOTE = (
    "regret in points of {measure}: median (first to third quartile); a search that has ended keeps its last one\n"
    "against random: how many searches end better, the same and worse"
)


def _pairs(summary: Summary) -> str:
    return "–" if summary.against is None else "–".join(map(str, summary.against))


def _scale(table: CellTable) -> float:
    return 100 if table.measure.unit == "%" else 1


def _spread(row: NDArray[np.float64], scale: float) -> str:
    low, median, high = (scale * value for value in row)
    return "–" if np.isnan(median) else f"{median:.2f} ({low:.2f}–{high:.2f})"


def _write_csv(path: Path, summaries: Sequence[Summary], budgets: Sequence[int]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["sampler", "early_stopping", "searches", "against", "budget", "first_quartile", "median", "third_quartile"]
    )
    for summary in summaries:
        kind = summary.strategy.sampler, summary.strategy.rule or "none", summary.count
        for axis in AXES:
            for budget, row in zip(budgets, summary.quartiles[axis.key], strict=True):
                writer.writerow([*kind, axis.key, budget, *("" if np.isnan(value) else f"{value:.6f}" for value in row)])
    write_text(path, text.getvalue())


# Charts


def _rules(found: Mapping[Strategy, Searches]) -> list[str | None]:
    return list(dict.fromkeys(strategy.rule for strategy in found))


def _of_rule(rule: str | None) -> str:
    return "Without early stopping" if rule is None else f"With {rule}"


def _draw(table: CellTable, found: Mapping[Strategy, Searches], rule: str | None, axis: Axis, axes: Axes) -> Titles:
    scale = _scale(table)
    for strategy, searches in found.items():
        is_baseline = rule is not None and strategy.name == BASELINE
        if strategy.rule != rule and not is_baseline:
            continue
        firsts, ends = (max(axis.of(moments[k], table) for moments in searches.values()) for k in (0, -1))
        places = np.geomspace(firsts, max(ends, firsts), _POINTS)
        low, median, high = scale * np.quantile(regrets(table, searches, axis, places.tolist()), QUARTILES, axis=0)
        look: dict[str, Any] = {"color": _COLOURS.get(strategy.sampler, INK)}
        if is_baseline:
            axes.step(places, median, where="post", lw=1.2, ls=(0, (4, 2)), label="random, all in full", **look)
            continue
        axes.step(places, median, where="post", lw=1.6, label=strategy.sampler, **look)
        axes.fill_between(places, low, high, step="post", alpha=0.1, lw=0, **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    medians = [float(np.max(line.get_ydata())) for line in axes.get_lines()]
    axes.set_ylim(0, 1.3 * max(medians, default=0) or 1)  # a band may begin far above
    axes.set(xlabel=axis.label, ylabel=f"regret (points of {table.measure.name})")
    return {}


def _figure(table: CellTable, found: Mapping[Strategy, Searches]) -> Figure:
    """All charts as one picture, a row for each early stopping."""
    rules = _rules(found)
    figure = Figure(figsize=(10.4, 3.1 * len(rules) + 0.4), layout="constrained")
    rows = figure.subplots(len(rules), len(AXES), squeeze=False, sharey=True, sharex="col")
    for row, rule in zip(rows, rules, strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            style_axes(axes)
            show_grid(axes)
            _draw(table, found, rule, axis, axes)
            axes.set_title(_of_rule(rule), fontsize=9, color=INK)
            axes.label_outer()
    lines = {line.get_label(): line for axes in rows.flat for line in axes.get_lines()}
    look = {"fontsize": 8, "frameon": False, "labelcolor": INK}
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=len(lines), **look)
    return figure
