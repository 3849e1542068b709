"""Files that a search writes beside its study: best cells, a table of all, labels and predictions to look at, and the page."""

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import load_head
from search.datasets import Dataset, Sample
from search.dense_tasks import details_beside, measures_beside
from search.errors import InputError
from search.files import write_text, write_whole
from search.reports.charts import groups_of
from search.reports.front import MOST_SHOWN, front_of, front_rows, num_beaten
from search.reports.page import quantity
from search.reports.run import Running, write_report
from search.reports.rungs import iterations_of, ties_of
from search.runs.study import Run, TrialRecord, comparison_label, head_path, load_run, ranked
from search.runs.tables import BEST_HEAD, head_name
from search.settings import known
from search.tasks.feature_cache import FeatureCache
from search.tasks.proxy import COST_NAMES

_EXAMPLES = 4
_BETWEEN_PAGES = 60.0  # seconds at least, of a search that is running
_COSTS_BETWEEN_PAGES = 50  # times what the last page took
_TOP = 10  # cells in the table and in best_cells/


def finish_run(
    directory: Path, pictures: Mapping[str, Dataset], val: FeatureCache, compared: Collection[str], timed_on: str | None
) -> None:
    """Write best cells, table, examples and report, with latencies if a device is given; print the table.

    `pictures` are the splits "train" and "val"; `val` has the features of the second.
    """
    run = load_run(directory)
    distinct = ranked(run.trials)
    best = distinct[:_TOP]
    _write_examples(directory, pictures, val, compared)
    _write_csv(directory / "cells.csv", run)
    if run.rungs:
        _write_rungs(directory / "rungs.csv", run)
    if not best:
        failed = sum(record.failure is not None for record in run.trials)
        report = write_report(run)
        way = "the same command goes on with what is left, other settings need another folder"
        print(f"no cell has a score yet ({failed} failed): see {report}; {way}", file=sys.stderr)
        return
    for rank, record in enumerate(best, start=1):
        write_text(directory / "best_cells" / f"rank_{rank:02d}.json", record.cell.to_json())
    if run.cost_kind is not None:
        front, best = front_of(run, distinct), front_of(run, distinct, MOST_SHOWN)
        _write_front(directory, run, front)
    report = write_report(run, timed_on)
    print(_table(run, best))
    if run.cost_kind is not None:
        print(f"\n{_about_front(run, front)}; {directory / 'front.csv'}, {directory / 'front_cells'}")
    for warning in ties_of(run, distinct):
        print(f"\nwarning: {warning}")
    print(f"\nreport: {report}\nbest cell: {directory / 'best_cells' / 'rank_01.json'}")


class ReportRefresher:
    """Writes the page of a search that is running, now and then: `tick` is called whenever there is a moment.

    `read` reads the run, and `trials` is how many it is to have. At most one part in 50 of the time goes into pages.
    """

    def __init__(self, read: Callable[[], Run], trials: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._trials, self._clock = read, trials, clock
        self._due = clock() + _BETWEEN_PAGES
        self._has_warned = False

    def tick(self) -> None:
        """Write the page, if it is time. If it cannot be written, that is said once, and the search goes on."""
        start = self._clock()
        if start < self._due:
            return
        try:
            write_report(self._read(), running=Running(self._trials, datetime.now().astimezone()))
        except InputError as error:
            if not self._has_warned:
                tqdm.write(f"warning: the report is not written while the search runs: {error}", file=sys.stderr)
            self._has_warned = True
        end = self._clock()
        self._due = end + max(_BETWEEN_PAGES, _COSTS_BETWEEN_PAGES * (end - start))


def _table(run: Run, best: list[TrialRecord]) -> str:
    """The best cells and the compared ones; where the search was cut short, with the iterations that a score is of.

    With latencies, where the search minimises them.
    """
    task, has_rungs = run.task, bool(run.rungs)
    rows = [
        (f"trial {record.number}", iterations_of(run, record) if has_rungs else 0, [record.result], record.cell)
        for record in best
        if record.result
    ]
    for name in dict.fromkeys(record.name for record in run.baselines):
        again = [record for record in run.baselines if record.name == name]
        label, iterations = f"{comparison_label(name)} (n={len(again)})", run.rungs[-1] if has_rungs else 0
        rows.append((label, iterations, [record.result for record in again], again[0].cell))
    beside = measures_beside(task)
    headings = "".join(f" {measure.heading:>8}" for measure in beside)
    trained = f" {'iterations':>10}" if has_rungs else ""
    cost = f" {'params':>9} {'multiply-adds':>13}" + (f" {'latency':>7}" if run.cost_kind == "latency" else "")
    lines = [f"{'':20}{trained} {task.score.heading:>14}{headings}{cost} {'seconds':>7}  cell"]
    for label, iterations, results, cell in rows:
        scores = [100 * result.score for result in results]
        spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        mean, first = f"{np.mean(scores):.2f}{spread}", results[0]
        details = details_beside(task, [result.scores for result in results])
        more = "".join(f" {measure.number(value):>8}" for measure, value in zip(beside, details, strict=True))
        cost = f" {first.parameters:>9,} {quantity(first.multiply_adds):>13}"
        if run.cost_kind == "latency":
            cost += f" {np.mean([result.cost('latency') for result in results]):>6.2f}×"
        trained = f" {iterations:>10,}" if has_rungs else ""
        lines.append(f"{label:20}{trained} {mean:>14}{more}{cost} {first.seconds:>7.1f}  {cell}")
    return "\n".join(lines)


def _write_csv(path: Path, run: Run) -> None:
    text, task = io.StringIO(), run.task
    writer = csv.writer(text)
    trained = ["iterations"] if run.rungs else []
    latency = ["latency"] if run.cost_kind == "latency" else []
    score_columns = [*trained, task.score.key, *(measure.key for measure in measures_beside(task))]
    costs = ["parameters", "multiply_adds", *latency, "seconds"]
    writer.writerow(["trial", *score_columns, *costs, "failure", "duplicate_of", "cell"])
    for record in run.trials:
        result = record.result
        iterations = [iterations_of(run, record) if result else None] if run.rungs else []
        scores = [result.score if result else None, *details_beside(task, [result.scores] if result else [])]
        cost = [getattr(result, name) if result else None for name in costs]
        cell = json.dumps(json.loads(record.cell.to_json()))
        writer.writerow([record.number, *iterations, *scores, *cost, record.failure, record.duplicate_of, cell])
    write_text(path, text.getvalue())


def _about_front(run: Run, front: Sequence[TrialRecord]) -> str:
    """How many cells are on the front, and how many of them known cells beat."""
    beaten = num_beaten(front_rows(run, front, groups_of(run)))
    cells = f"{len(front)} cell{'s' if len(front) > 1 else ''}"
    shown = "" if len(front) <= MOST_SHOWN else f", of which {MOST_SHOWN} are above"
    known_better = f", {beaten} of them beaten by known cells in both" if beaten else ""
    return f"Pareto front of {run.task.score.name} and {COST_NAMES[known(run.cost_kind)]}: {cells}{shown}{known_better}"


def _write_front(directory: Path, run: Run, front: Sequence[TrialRecord]) -> None:
    """The Pareto front as a table, the cheapest first, and its cells as files: those that are on it no more are deleted."""
    text = io.StringIO()
    writer = csv.writer(text)
    costs = ["multiply_adds"] + ["latency"] * (run.cost_kind == "latency")
    writer.writerow(["trial", run.task.score.key, "parameters", *costs, "cell"])
    files = {f"trial_{record.number}.json": record for record in front}
    for name, record in files.items():
        write_text(directory / "front_cells" / name, record.cell.to_json())
    for record in reversed(front):
        result, cell = known(record.result), json.dumps(json.loads(record.cell.to_json()))
        writer.writerow([record.number, result.score, result.parameters, *(getattr(result, cost) for cost in costs), cell])
    write_text(directory / "front.csv", text.getvalue())
    for path in (directory / "front_cells").glob("trial_*.json"):
        if path.name not in files:
            path.unlink()


def _write_rungs(path: Path, run: Run) -> None:
    """The scores of each cell on all rungs that it has reached, without copies."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", *run.rungs, "failure", "cell"])
    for record in run.trials:
        if record.duplicate_of is None:
            scores = run.rung_scores.get(record.number, ())
            blank = [None] * (len(run.rungs) - len(scores))
            cell = json.dumps(json.loads(record.cell.to_json()))
            writer.writerow([record.number, *scores, *blank, record.failure, cell])
    write_text(path, text.getvalue())


def _write_examples(directory: Path, pictures: Mapping[str, Dataset], val: FeatureCache, compared: Collection[str]) -> None:
    """A few pictures with labels of both splits, those of the second with predictions, for the report."""
    arrays: dict[str, NDArray[Any]] = {}
    for row, (_, sample) in enumerate(_spread(pictures["train"])):
        arrays |= {f"train_image_{row}": sample.image, f"train_label_{row}": sample.label}
    arrays |= _predictions(directory, pictures["val"], val, compared)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_whole(directory / "examples.npz", buffer.getvalue())


def _spread(dataset: Dataset) -> Iterator[tuple[int, Sample]]:
    """A few pictures from the first to the last, with their indices."""
    for index in np.linspace(0, len(dataset) - 1, min(_EXAMPLES, len(dataset))).round().astype(int).tolist():
        yield index, dataset[index]


@torch.inference_mode()
def _predictions(directory: Path, dataset: Dataset, val: FeatureCache, compared: Collection[str]) -> dict[str, NDArray[Any]]:
    """Validation pictures, their labels, and what the best cell's and the known cells' heads make of them."""
    files = {BEST_HEAD: BEST_HEAD} | {name: head_name(name) for name in compared}
    heads = {name: load_head(path)[0] for name, file in files.items() if (path := head_path(directory, file)).exists()}
    arrays: dict[str, NDArray[Any]] = {}
    for row, (index, sample) in enumerate(_spread(dataset)):
        height, width = sample.label.shape
        arrays |= {f"image_{row}": sample.image, f"label_{row}": sample.label}
        for name, head in heads.items():
            outputs = head(val.features[index : index + 1].float())
            size = val.labels.shape[1], val.labels.shape[2]
            upsampled = bilinear_resize(outputs, size, align_corners=val.grid.align_corners)
            predicted = dataset.task.predict(upsampled)[0, :height, :width].numpy()
            arrays[f"prediction_{row}/{name}"] = predicted.astype(dataset.task.label_dtype)
    return arrays
