"""The page of a run, `report.html` in its folder, which needs no other file."""

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fast.checkpoint import load_context
from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import Cell
from search.backbones.facts import described_layers
from search.cells.latency import Latencies, like, measure_latencies
from search.datasets import is_named
from search.dense_tasks import DenseTask, Label, details_beside, mean_details, measures_beside
from search.errors import InputError
from search.reports.cells import draw_pictures
from search.reports.charts import KNOWN_LABELS, Group, draw_charts, groups_of
from search.reports.front import MOST_SHOWN, cost_text, front_of, front_rows, num_beaten
from search.reports.in_python import in_python
from search.reports.learning_curves import draw_learning_curves
from search.reports.page import percent, write_page
from search.reports.predictions import laid_over
from search.reports.rungs import cost_of, is_in_full, iterations_of, rungs_of, trained_longest
from search.runs.study import Run, TrialRecord, head_path, ranked
from search.runs.tables import BEST_HEAD, head_name
from search.settings import LossSettings, declared, known
from search.tasks.proxy import COST_NAMES, ProxyResult

_SHARES = {2: "half", 3: "third", 4: "quarter"}
_TOP, _DRAWN_BEST, _DRAWN_WORST = 10, 3, 2
_FAILURES = 50  # that are listed
_EXAMPLE_SIDE = 640  # pixels, at most
_OF_LOSS = declared(LossSettings)  # which only some tasks have; unless given they are not named


@dataclass(frozen=True)
class Row:
    """One line of the table of cells. `beside` are details that belong in it, `remarks` say what is out of reach."""

    label: str
    score: str
    beside: list[str]
    cell: Cell
    remarks: list[str]
    result: ProxyResult
    is_compared: bool
    iterations: int | None = None  # of a run that was cut short


@dataclass(frozen=True)
class Running:
    """What the page says of a search that goes on: to how many trials, and when this was."""

    trials: int
    now: datetime


def write_report(run: Run, device: str | None = None, running: Running | None = None) -> Path:
    """Write `report.html` into the run's folder, whole or not at all; returns its path.

    Given a device, and if the run has a trained head (which says what features it reads), latencies are measured on that
    device. The page of a `running` search loads itself again; so as not to hold up the search, it is without what needs heads,
    and without examples, which are of an earlier end. Raises InputError if the page cannot be written, or a file of the run
    is damaged.
    """
    path = run.directory / "report.html"
    write_page(path, "report.html.jinja", _content(run, device, running))
    return path


def _content(run: Run, device: str | None, running: Running | None) -> dict[str, Any]:
    best, groups = ranked(run.trials), groups_of(run)
    failures = [record for record in run.trials if record.failure is not None]
    trained = {} if running else _trained_cells(run, best, groups)
    rows = list(_rows(run, best, groups))
    examples = [] if running else _example_maps(run)
    fair = next((group for group in groups if best and group.name == f"trial {best[0].number}"), None)
    return {
        "run": run,
        "running": running,
        "in_python": in_python(run) if best and is_named(run.settings.data.dataset) else None,
        "identity": {name: value for name, value in run.identity.items() if value is not None or name not in _OF_LOSS},
        "best": best[0] if best else None,
        "early_stopping": _early_stopping(run, best),
        "front": _front(run, best, groups),
        "distinct": len(best),
        "failed": len(failures),
        "failures": failures[-_FAILURES:],
        "duplicates": sum(record.duplicate_of is not None for record in run.trials),
        "known": [group for group in groups if not group.is_found],
        "fair": fair,  # the best of many is partly luck; its second score is not
        "compared_score": fair.mean if fair else best[0].score if best and is_in_full(run, best[0]) else None,
        "spread": _spread,
        "charts": list(draw_charts(run, best, groups)),
        "drawings": list(_drawings(run, best, groups, trained)),
        "rows": rows,
        "latencies": _latencies(run, rows, trained, device) if device and trained and rows else None,
        "beside": measures_beside(run.task),
        "detail_columns": _detail_columns(run, best, groups),
        "examples": _drawn_examples(examples, run.task),
        "legend": run.task.legend(_all_maps(examples)) if examples else [],
        "hexadecimal": "#{:02x}{:02x}{:02x}".format,
    }


def _early_stopping(run: Run, best: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """What the page says of a search that is cut short, once a cell has a score."""
    if not run.rungs or not best:
        return None
    in_full = trained_longest(best) if is_in_full(run, best[0]) else []
    reduction = int(run.identity["reduction_factor"])
    return {
        "rule": run.identity["early_stopping"],
        "reduction": reduction,
        "share": _SHARES.get(reduction, f"one in {reduction}"),
        "best_in": None if in_full else iterations_of(run, best[0]),
        "in_full": len(in_full),
        "rungs": rungs_of(run),
        "cost": cost_of(run),
        "chart": draw_learning_curves(run, best),
    }


def _front(run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> dict[str, Any] | None:
    """What the page says of a search with two objectives, once a cell has a score."""
    if run.cost_kind is None or not best:
        return None
    front = front_of(run, best)
    rows = front_rows(run, front, groups)
    return {
        "cells": len(front),
        "cost": COST_NAMES[run.cost_kind],
        "rows": rows,
        "beaten": num_beaten(rows),
        "cost_text": partial(cost_text, run.cost_kind),
    }


def _spread(group: Group) -> str:
    std = "" if group.std is None else f" ± {100 * group.std:.2f}"
    return f"{100 * group.mean:.2f}{std} %"


def _rows(run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> Iterator[Row]:
    task, maps = run.task, known(run.space.maps)
    for record in best[:_TOP] if run.cost_kind is None else front_of(run, best, MOST_SHOWN):
        result = record.result
        assert result is not None  # it is ranked
        beside = _beside(task, [result])
        remarks, iterations = maps.cell_remarks(record.cell), iterations_of(run, record) if run.rungs else None
        yield Row(f"trial {record.number}", percent(result.score), beside, record.cell, remarks, result, False, iterations)
    for group in groups:
        beside, remarks = _beside(task, group.results), maps.cell_remarks(group.cell)
        iterations = run.rungs[-1] if run.rungs else None
        yield Row(group.label_and_seeds, _spread(group), beside, group.cell, remarks, group.results[0], True, iterations)


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
        path = head_path(run.directory, file)
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
    maps, layers = known(run.space.maps), described_layers(run.identity)
    worst_from = max(_DRAWN_BEST, len(best) - _DRAWN_WORST)
    for rank, record in enumerate(best):
        if record.score is not None and (rank < _DRAWN_BEST or rank >= worst_from):
            place = f"No. {rank + 1} of {len(best)}" + (", among the worst" if rank >= worst_from else "")
            yield {
                "heading": percent(record.score),
                "place": place,
                "name": _named(run, record),
                "pictures": draw_pictures(record.cell, maps, trained.get("best") if rank == 0 else None, layers),
            }
    for group in groups:
        if best and group.name in trained and group.name != f"trial {best[0].number}":
            yield {
                "heading": percent(group.results[0].score),
                "place": f"{group.label}, seed 0",
                "name": "beside the search",
                "pictures": draw_pictures(group.cell, maps, trained[group.name], layers),
            }


def _latencies(run: Run, rows: Sequence[Row], trained: Mapping[str, DensePredictionCell], device: str) -> Latencies:
    """Measure the latencies of the cells in the table, on features like those of a validation image."""
    one = next(iter(trained.values()))  # all heads of a run have the same channels and options
    cells = {row.label: like(one, row.cell) for row in rows}
    return measure_latencies(cells, known(run.space.maps).validation, device=device)


def _named(run: Run, record: TrialRecord) -> str:
    """A trial, and of one that was not trained in full for how long."""
    after = "" if is_in_full(run, record) else f", {iterations_of(run, record):,} iterations"
    return f"trial {record.number}{after}"


def _detail_columns(run: Run, best: Sequence[TrialRecord], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Details of the scores of the best cell and of each group, as means over seeds."""
    columns = []
    if best and best[0].result:
        columns.append({"label": _named(run, best[0]), "details": best[0].result.scores.details})
    for group in groups:
        columns.append({"label": group.label, "details": mean_details([result.scores for result in group.results])})
    return columns


@dataclass(frozen=True)
class Example:
    """A picture, and by title its label and predictions; none of a picture that was trained on."""

    split: str  # "train" or "val"
    image: NDArray[np.uint8]
    maps: dict[str, Label]


def _example_maps(run: Run) -> list[Example]:
    """The examples that the search has kept."""
    path = run.directory / "examples.npz"
    if not path.exists():
        return []
    try:
        with np.load(path) as arrays:
            return list(_examples(dict(arrays)))  # of versions before labels to train on were kept: without these
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): delete it; the search writes it again") from error


def _examples(arrays: dict[str, NDArray[Any]]) -> Iterator[Example]:
    titles = {"best": "best cell", **KNOWN_LABELS}
    for row in range(sum(key.startswith("train_image_") for key in arrays)):
        yield Example("train", arrays[f"train_image_{row}"], {"label": arrays[f"train_label_{row}"]})
    for row in range(sum(key.startswith("image_") for key in arrays)):
        prefix = f"prediction_{row}/"
        models = sorted(
            (key.removeprefix(prefix) for key in arrays if key.startswith(prefix)),
            key=lambda model: (model not in titles, list(titles).index(model) if model in titles else 0, model),
        )
        maps = {"label": arrays[f"label_{row}"], **{titles.get(model, model): arrays[prefix + model] for model in models}}
        yield Example("val", arrays[f"image_{row}"], maps)


def _all_maps(examples: Sequence[Example]) -> list[Label]:
    return [each for example in examples for each in example.maps.values()]


def _drawn_examples(examples: Sequence[Example], task: DenseTask) -> dict[str, list[list[dict[str, str]]]]:
    """By split, for each example its picture, and its maps in colours that mean the same in all examples."""
    coloured = iter(task.colours(_all_maps(examples)))
    drawn: dict[str, list[list[dict[str, str]]]] = {"train": [], "val": []}
    for example in examples:
        maps = {title: laid_over(example.image, next(coloured), task) for title in example.maps}
        pictures = {"image": Image.fromarray(example.image), **maps}
        drawn[example.split].append([{"title": title, "uri": _data_uri(picture)} for title, picture in pictures.items()])
    return drawn


def _data_uri(picture: Image.Image) -> str:
    picture.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
