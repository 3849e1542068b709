"""The page of a run, `report.html` in its folder, which needs no other file."""

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from fast.checkpoint import load_context
from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import Cell
from reference.dense_prediction_cell import BranchOptions, rate_multiplier_for
from search.dense_tasks import DenseTask, Label, details_beside, mean_details, measures_beside
from search.errors import InputError
from search.reports.cells import draw_pictures
from search.reports.diagram import INK, figure_svg, show_grid, style_axes
from search.reports.latency import Latencies, measure_latencies
from search.reports.page import percent, write_page
from search.reports.predictions import laid_over
from search.runs.search import BEST_HEAD, head_name
from search.runs.study import FOUND, Run, TrialRecord, comparison_label, ranked
from search.tasks.proxy import ProxyResult

_TOP, _DRAWN_BEST, _DRAWN_WORST = 10, 3, 2
_TRIAL_COLOUR, _BEST_COLOUR = "#4a7fd0", "#cf3f4f"
_GROUP_COLOURS, _OWN_COLOUR = {"aspp": "#d9822b", "dpc": "#8e62c8"}, "#3d8f5f"
_EXAMPLE_SIDE = 640  # pixels, at most


@dataclass(frozen=True)
class Group:
    """One cell with its proxy scores, one per seed."""

    name: str
    cell: Cell
    results: tuple[ProxyResult, ...]

    @property
    def label(self) -> str:
        return comparison_label(self.name, {"aspp": "ASPP", "dpc": "Published DPC"})

    @property
    def is_found(self) -> bool:
        """Whether it is the search's best cell, scored again."""
        return self.name.startswith(FOUND)

    @property
    def colour(self) -> str:
        return _BEST_COLOUR if self.is_found else _GROUP_COLOURS.get(self.name, _OWN_COLOUR)

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.results]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Row:
    """One line of the table of cells. `beside` are details that belong in it."""

    label: str
    score: str
    beside: list[str]
    cell: Cell
    result: ProxyResult
    is_compared: bool


def write_report(run: Run, device: str | None = None) -> Path:
    """Write `report.html` into the run's folder, whole or not at all; returns its path.

    Given a device, and if the run has a trained head (which says what features it reads), latencies are measured on that
    device. Raises InputError if the page cannot be written, or a file of the run is damaged.
    """
    path = run.directory / "report.html"
    write_page(path, "report.html.jinja", _content(run, device))
    return path


def _content(run: Run, device: str | None) -> dict[str, Any]:
    best, groups = ranked(run.trials), _groups(run)
    trained = _trained_cells(run, best, groups)
    rows = list(_rows(run.task, best, groups))
    maps = _example_maps(run)
    fair = next((group for group in groups if best and group.name == f"trial {best[0].number}"), None)
    return {
        "run": run,
        "best": best[0] if best else None,
        "distinct": len(best),
        "failures": [record for record in run.trials if record.failure is not None],
        "duplicates": sum(record.duplicate_of is not None for record in run.trials),
        "known": [group for group in groups if not group.is_found],
        "fair": fair,  # the best of many is partly luck; its second score is not
        "compared_score": fair.mean if fair else best[0].result.score if best and best[0].result else None,
        "spread": _spread,
        "charts": list(_charts(run, best, groups)),
        "drawings": list(_drawings(run, best, groups, trained)),
        "rows": rows,
        "latencies": _latencies(run, rows, trained, device) if device and trained and rows else None,
        "beside": measures_beside(run.task),
        "detail_columns": _detail_columns(best, groups),
        "examples": list(_example_pictures(maps, run.task)),
        "legend": run.task.legend([each for example in maps for each in example.maps.values()]) if maps else [],
        "hexadecimal": "#{:02x}{:02x}{:02x}".format,
    }


def _groups(run: Run) -> list[Group]:
    names = dict.fromkeys(record.name for record in run.baselines)
    records = {name: [record for record in run.baselines if record.name == name] for name in names}
    return [Group(name, same[0].cell, tuple(record.result for record in same)) for name, same in records.items()]


def _spread(group: Group) -> str:
    std = "" if group.std is None else f" ± {100 * group.std:.2f}"
    return f"{100 * group.mean:.2f}{std} %"


def _rows(task: DenseTask, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Iterator[Row]:
    for record in best[:_TOP]:
        result = record.result
        assert result is not None  # it is ranked
        beside = _beside(task, [result])
        yield Row(f"trial {record.number}", percent(result.score), beside, record.cell, result, False)
    for group in groups:
        label = f"{group.label} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{len(group.results)})"
        yield Row(label, _spread(group), _beside(task, group.results), group.cell, group.results[0], True)


def _beside(task: DenseTask, results: Sequence[ProxyResult]) -> list[str]:
    """Means of the details that belong in a table of cells."""
    shown = measures_beside(task)
    values = details_beside(task, [result.scores for result in results])
    return [measure.number(value) for measure, value in zip(shown, values, strict=True)]


def _trained_cells(run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> dict[str, DensePredictionCell]:
    """Cells of which the run has kept trained heads: its best, as "best", and the compared ones, by name."""
    cells = {group.name: (head_name(group.name), group.cell) for group in groups}
    if best:
        cells["best"] = (BEST_HEAD, best[0].cell)
    contexts = {}
    for name, (file, cell) in cells.items():
        path = run.directory / "heads" / f"{file}.safetensors"
        if path.exists():
            try:
                context = load_context(path)
            except ValueError as error:
                raise InputError(f"{error}: delete it; the report does without") from error
            if context.cell == cell:  # the head is written before the score, so after a crash it may belong to another cell
                contexts[name] = context
    return contexts


def _drawings(
    run: Run, best: Sequence[TrialRecord], groups: Sequence[Group], trained: Mapping[str, DensePredictionCell]
) -> Iterator[dict[str, Any]]:
    multiplier = rate_multiplier_for(run.identity.get("output_stride", 16))
    options = BranchOptions(False, multiplier, run.identity.get("pooling", "sliding_window"))
    worst_from = max(_DRAWN_BEST, len(best) - _DRAWN_WORST)
    for rank, record in enumerate(best):
        if record.result and (rank < _DRAWN_BEST or rank >= worst_from):
            place = f"No. {rank + 1} of {len(best)}" + (", among the worst" if rank >= worst_from else "")
            yield {
                "heading": percent(record.result.score),
                "place": place,
                "name": f"trial {record.number}",
                "pictures": draw_pictures(record.cell, options, trained.get("best") if rank == 0 else None),
            }
    for group in groups:
        if best and group.name in trained and group.name != f"trial {best[0].number}":
            yield {
                "heading": percent(group.results[0].score),
                "place": f"{group.label}, seed 0",
                "name": "beside the search",
                "pictures": draw_pictures(group.cell, options, trained[group.name]),
            }


def _latencies(run: Run, rows: Sequence[Row], trained: Mapping[str, DensePredictionCell], device: str) -> Latencies:
    """Measure the latencies of the cells in the table, on features like those of a validation image."""
    one = next(iter(trained.values()))  # all heads of a run have the same channels and options
    cells = {
        row.label: DensePredictionCell(
            row.cell,
            one.in_channels,
            branch_channels=one.branch_channels,
            cell_channels=one.cell_channels,
            output_stride=one.output_stride,
            pooling=one.pooling,
            pooling_size=one.pooling_size,
        )
        for row in rows
    }
    height, width = (-(-extent // one.output_stride) for extent in run.identity["image_size"])
    return measure_latencies(cells, (height, width), device=device)


def _detail_columns(best: Sequence[TrialRecord], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Details of the scores of the best cell and of each group, as means over seeds."""
    columns = []
    if best and best[0].result:
        columns.append({"label": f"trial {best[0].number}", "details": best[0].result.scores.details})
    for group in groups:
        columns.append({"label": group.label, "details": mean_details([result.scores for result in group.results])})
    return columns


def _charts(run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    if not best:
        return
    has_spread = any(group.std is not None for group in groups)
    charts = (
        (
            "Scores of all cells",
            _draw_distribution,
            "Each distinct cell once" + ("; bands show ± one standard deviation over seeds." if has_spread else "."),
        ),
        ("Progress of the search", _draw_progress, "Dots are trials, the line is the best so far."),
        (
            "Score against cost",
            _draw_cost,
            "Multiply-adds of the cell for one validation image; the line joins the Pareto front.",
        ),
        ("Training loss", _draw_loss, "The best cell, and every seed of the cells beside it; running means."),
    )
    for heading, draw, caption in charts:
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        style_axes(axes)
        show_grid(axes)
        draw(axes, run, best, groups)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=4, fontsize=8, frameon=False, labelcolor=INK, columnspacing=1.2
        )
        yield {"heading": heading, "caption": caption, "svg": Markup(figure_svg(figure, heading))}


def _draw_distribution(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> None:
    scores = [100 * record.result.score for record in best if record.result]
    bins = np.histogram_bin_edges(scores, bins=int(np.clip(2 * np.sqrt(len(scores)), 1, 60)))
    axes.hist(scores, bins=list(bins), color=_TRIAL_COLOUR, edgecolor="none", rwidth=0.94, label="search")
    for group in groups:
        axes.axvline(100 * group.mean, color=group.colour, linewidth=1.8, label=group.label)
        if group.std is not None:
            axes.axvspan(100 * (group.mean - group.std), 100 * (group.mean + group.std), color=group.colour, alpha=0.15, lw=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"{run.task.score.name} (%)", ylabel="cells")


def _draw_progress(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> None:
    scored = [(record.number, 100 * record.result.score) for record in run.trials if record.result]
    numbers, scores = zip(*scored, strict=True)
    axes.plot(numbers, scores, "o", color=_TRIAL_COLOUR, alpha=0.6, markersize=4, markeredgewidth=0)
    last = max(record.number for record in run.trials)
    best_so_far = np.maximum.accumulate(scores)
    axes.step(
        [*numbers, last], [*best_so_far, best_so_far[-1]], where="post", color=_TRIAL_COLOUR, lw=1.8, label="best so far"
    )
    for group in groups:
        axes.axhline(100 * group.mean, color=group.colour, linewidth=1.5, linestyle=(0, (4, 2)), label=group.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=f"{run.task.score.name} (%)")


def _draw_cost(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> None:
    points = sorted((record.result.multiply_adds / 1e9, 100 * record.result.score) for record in best if record.result)
    costs, scores = zip(*points, strict=True)
    axes.plot(costs, scores, "o", color=_TRIAL_COLOUR, alpha=0.6, markersize=4.5, markeredgewidth=0, label="search")
    front = pareto_front(points)
    axes.plot(*zip(*front, strict=True), "o-", color=_TRIAL_COLOUR, markersize=4.5, linewidth=1.2)
    for group in groups:
        axes.errorbar(
            group.results[0].multiply_adds / 1e9,
            100 * group.mean,
            yerr=None if group.std is None else 100 * group.std,
            fmt="D",
            color=group.colour,
            markersize=6,
            capsize=3,
            label=group.label,
        )
    axes.set(xlabel="multiply-adds (10⁹)", ylabel=f"{run.task.score.name} (%)")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, score), by cost, for which no other point is as cheap and better, or cheaper and as good.

    >>> pareto_front([(2.0, 0.5), (1.0, 0.4), (3.0, 0.5), (1.0, 0.3)])
    [(1.0, 0.4), (2.0, 0.5)]
    """
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _draw_loss(axes: Axes, run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> None:
    for group in groups:
        for k, result in enumerate(group.results):
            axes.plot(
                *_smooth(result.loss_curve), color=group.colour, lw=1.1, label=group.label if k == 0 else None, alpha=0.8
            )
    for record in best[:1]:
        assert record.result is not None  # it is ranked
        axes.plot(*_smooth(record.result.loss_curve), color=_TRIAL_COLOUR, lw=2, label=f"best, trial {record.number}")
    axes.set(xlabel="iteration", ylabel="loss (per pixel)")


def _smooth(curve: Sequence[tuple[int, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Running mean over 1/25 of the curve: iterations and losses."""
    points = np.array(curve, dtype=np.float64).reshape(-1, 2)
    window = max(1, len(points) // 25)
    if not len(points):
        return points[:, 0], points[:, 1]
    kernel = np.full(window, 1.0 / window)
    return np.convolve(points[:, 0], kernel, "valid"), np.convolve(points[:, 1], kernel, "valid")


@dataclass(frozen=True)
class Example:
    """A validation picture, and by title its label and predictions."""

    image: NDArray[np.uint8]
    maps: dict[str, Label]


def _example_maps(run: Run) -> list[Example]:
    """The examples that the search has kept."""
    path = run.directory / "examples.npz"
    if not path.exists():
        return []
    try:
        with np.load(path) as arrays:
            return list(_examples(dict(arrays)))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): delete it; the search writes it again") from error


def _examples(arrays: dict[str, NDArray[Any]]) -> Iterator[Example]:
    titles = {"best": "best cell", "aspp": "ASPP", "dpc": "Published DPC"}
    for row in range(sum(key.startswith("image_") for key in arrays)):
        prefix = f"prediction_{row}/"
        models = sorted(
            (key.removeprefix(prefix) for key in arrays if key.startswith(prefix)),
            key=lambda model: (model not in titles, list(titles).index(model) if model in titles else 0, model),
        )
        maps = {"label": arrays[f"label_{row}"], **{titles.get(model, model): arrays[prefix + model] for model in models}}
        yield Example(arrays[f"image_{row}"], maps)


def _example_pictures(examples: Sequence[Example], task: DenseTask) -> Iterator[list[dict[str, str]]]:
    """For each example its picture, and its maps in colours that mean the same in all examples."""
    coloured = iter(task.colours([each for example in examples for each in example.maps.values()]))
    for example in examples:
        drawn = {title: laid_over(example.image, next(coloured), task) for title in example.maps}
        pictures = {"image": Image.fromarray(example.image), **drawn}
        yield [{"title": title, "uri": _data_uri(picture)} for title, picture in pictures.items()]


def _data_uri(picture: Image.Image) -> str:
    picture.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
