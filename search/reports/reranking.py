"""Results of a re-ranking: the cells by end-to-end score beside their proxy rank, as table, CSV and picture."""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reference.cell import Cell
from search.cells.pareto import pareto_front
from search.dense_tasks import DenseTask, Measure, details_beside, measures_beside
from search.files import write_text
from search.reports.page import quantity
from search.reports.rank_correlation import MIN_POINTS, RankCorrelation, rank_correlation, ties
from search.reports.scatter import Point, Scatter, write_scatters
from search.tasks.end_to_end import EndToEndResult
from search.tasks.proxy import COST_NAMES, CostKind


@dataclass(frozen=True)
class Failed:
    """A training that failed, and why."""

    reason: str


@dataclass(frozen=True)
class Candidate:
    """A cell to train end to end: one of the search's best, or a known one, which has no rank.

    Of a search that was cut short, scores after fewer iterations than all are not compared with the others.
    """

    name: str
    cell: Cell
    proxy_scores: tuple[float, ...]  # one per seed; none for a known cell that the run did not score
    proxy_rank: int | None
    proxy_iterations: int | None = None  # that the scores are of, where a search was cut short
    is_in_full: bool = True  # they are all that there are
    cost: tuple[CostKind, float] | None = None  # the second objective of a search that had one, as it was there


@dataclass(frozen=True)
class Reranked:
    """A candidate with the results so far: `results` are those that count, `finished` is the number of all."""

    candidate: Candidate
    results: tuple[EndToEndResult, ...]
    failures: tuple[str, ...]
    finished: int
    folder: Path  # that of the first seed's training
    final_rank: int | None = None

    @property
    def is_scored(self) -> bool:
        """Whether it has a score. A cell that failed with any seed has none: its mean would lack the worst result."""
        return bool(self.results) and not self.failures

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.results]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores)) if self.results else math.nan

    @property
    def std(self) -> float:
        return float(np.std(self.scores, ddof=1)) if len(self.results) > 1 else math.nan


@dataclass(frozen=True)
class Trainings:
    """A candidate's trainings, one per seed; None for one that is not finished. `folder` is that of the first."""

    candidate: Candidate
    outcomes: Sequence[EndToEndResult | Failed | None]
    folder: Path

    @property
    def failures(self) -> list[Failed]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Failed)]

    @property
    def has_begun(self) -> bool:
        """Whether some are finished and none has failed, so that its scores can be compared with others'."""
        return any(self.outcomes) and not self.failures


def rank(trainings: Sequence[Trainings]) -> list[Reranked]:
    """Rank the cells, best first, those without a score last; the search's cells are ranked among themselves.

    While trainings are missing, cells with a score are compared by the seeds that all of them have.
    """
    seeds = _seeds_of_all([each for each in trainings if each.has_begun])
    rows = sorted((_row(each, seeds) for each in trainings), key=lambda row: -row.mean if row.is_scored else math.inf)
    found = [row.candidate.name for row in rows if row.candidate.proxy_rank is not None and row.is_scored]
    final_ranks = {name: place for place, name in enumerate(found, start=1)}
    return [replace(row, final_rank=final_ranks.get(row.candidate.name)) for row in rows]


def _seeds_of_all(begun: Sequence[Trainings]) -> set[int] | None:
    """The seeds with which all of these are finished; None, meaning all seeds, if there is no such seed."""
    finished = ({k for k, outcome in enumerate(each.outcomes) if outcome} for each in begun)
    return (set.intersection(*finished) if begun else None) or None


def _row(trainings: Trainings, seeds: set[int] | None) -> Reranked:
    """A row with the results that count: those of the given seeds, or all for a cell that failed."""
    of_all = seeds is None or bool(trainings.failures)
    counted = [outcome for k, outcome in enumerate(trainings.outcomes) if of_all or k in (seeds or ())]
    return Reranked(
        candidate=trainings.candidate,
        results=tuple(outcome for outcome in counted if isinstance(outcome, EndToEndResult)),
        failures=tuple(failed.reason for failed in trainings.failures),
        finished=sum(outcome is not None for outcome in trainings.outcomes),
        folder=trainings.folder,
    )


def correlation(rows: list[Reranked]) -> RankCorrelation | None:
    """Spearman's ρ of proxy and final score over the search's cells, without the known ones; None below three cells.

    Cells that the search did not train in full are left out.
    """
    found = _compared(rows)
    if len(found) < MIN_POINTS:
        return None
    return rank_correlation([row.candidate.proxy_scores[0] for row in found], [row.mean for row in found])


def _compared(rows: list[Reranked]) -> list[Reranked]:
    """The search's cells whose proxy scores can be compared with each other."""
    return [row for row in rows if row.final_rank is not None and row.candidate.is_in_full]


def finish_reranking(directory: Path, rows: list[Reranked], seeds: int, task: DenseTask) -> None:
    """Write the ranks, the picture and the best cell, and print the table. `seeds` is the number of trainings per cell."""
    found = [row for row in rows if row.final_rank is not None]
    if not found:
        failed = sum(len(row.failures) for row in rows)
        print(f"no cell of the search is trained yet ({failed} trainings failed)", file=sys.stderr)
        return
    rho = correlation(rows)
    write_text(directory / "best_cell.json", found[0].candidate.cell.to_json())
    _write_csv(directory / "ranks.csv", rows, task)
    _draw(directory / "scatter.png", rows, rho, task.score)
    print(_table(rows, task.score))
    done, wanted = sum(row.finished for row in rows), len(rows) * seeds
    if done < wanted:
        print(f"\n{done} of {wanted} trainings are done; the same command goes on")
    if warning := ties([row.mean for row in found]):
        print(f"\nwarning: {warning}")
    compared = _compared(rows)
    if shorter := len(found) - len(compared):
        cells = "1 cell" if shorter == 1 else f"{shorter} cells"
        print(f"\npicture and rho are without {cells} that the search did not train in full")
    if rho is None:
        print(f"\nSpearman's rho of proxy and final score takes {MIN_POINTS} cells of the search; here are {len(compared)}")
    else:
        print(f"\nproxy and final score, {rho.count} cells: Spearman's {rho}, with its 95 % bootstrap interval")
    for kind in _cost_kinds(rows):
        print(f"\nPareto front of final {task.score.name} and the search's {COST_NAMES[kind]}: {', '.join(_front(rows))}")
    print(f"\nranks: {directory / 'ranks.csv'}\npicture: {directory / 'scatter.png'} (scatter.svg names each dot)")
    print(f"best cell: {directory / 'best_cell.json'}, {found[0].candidate.name}")
    print(f"its network: {found[0].folder / 'last.safetensors'}")


def _cost_kinds(rows: list[Reranked]) -> set[CostKind]:
    """The second objective of the search, if it had one."""
    return {row.candidate.cost[0] for row in rows if row.candidate.cost is not None}


def _front(rows: list[Reranked]) -> list[str]:
    """Of a search with two objectives the names of the cells that no other one beats in both, the best first."""
    costs = {row.candidate.name: row.candidate.cost[1] for row in rows if row.candidate.cost is not None}
    scored = [row for row in rows if row.is_scored and row.candidate.name in costs]
    front = pareto_front([(row.mean, -costs[row.candidate.name]) for row in scored])
    return [scored[place].candidate.name for place in front]


def _table(rows: list[Reranked], score: Measure) -> str:
    width, narrow = max(len(row.candidate.name) for row in rows), len(score.heading)
    has_rungs = _has_rungs(rows)
    wide, trained = (narrow + 17, f" {'iterations':>10}") if has_rungs else (narrow + 6, "")
    lines = [
        f"{'':{width}} {'proxy':>{wide}} {'final':>20}",
        f"{'':{width}} {'rank':>5}{trained} {score.heading:>{narrow}} {'rank':>5} {score.heading:>14} {'params':>9} "
        f"{'multiply-adds':>13} "
        f"{'seconds':>8}  cell",
    ]
    for row in rows:
        candidate = row.candidate
        proxy = f"{100 * np.mean(candidate.proxy_scores):.2f}" if candidate.proxy_scores else "–"
        final, cost = "failed" if row.failures else "–", f"{'–':>9} {'–':>13} {'–':>8}"
        if row.is_scored:
            spread = f" ± {100 * row.std:.2f}" if len(row.results) > 1 else ""
            final, first = f"{100 * row.mean:.2f}{spread}", row.results[0]
            cost = f"{first.parameters:>9,} {quantity(first.multiply_adds):>13} {first.seconds:>8.1f}"
        trained = f" {candidate.proxy_iterations:>10,}" if has_rungs else ""
        ranks = f"{candidate.proxy_rank or '–':>5}{trained} {proxy:>{narrow}} {row.final_rank or '–':>5}"
        lines.append(f"{candidate.name:{width}} {ranks} {final:>14} {cost}  {candidate.cell}")
    return "\n".join(lines)


def _has_rungs(rows: list[Reranked]) -> bool:
    """Whether the search was cut short."""
    return any(row.candidate.proxy_iterations is not None for row in rows)


def _write_csv(path: Path, rows: list[Reranked], task: DenseTask) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    key, beside = task.score.key, measures_beside(task)
    final_columns = (
        "final_rank",
        f"final_{key}",
        "final_std",
        "seeds",
        "failures",
        "parameters",
        "multiply_adds",
        "seconds",
    )
    more_columns = (f"final_{measure.key}" for measure in beside)
    has_rungs = _has_rungs(rows)
    trained = ["proxy_iterations"] if has_rungs else []
    kinds = _cost_kinds(rows)
    second = [column for kind in kinds for column in (f"proxy_{kind}", "is_on_front")]
    columns = ["proxy_rank", *trained, f"proxy_{key}", *second, *final_columns, *more_columns]
    writer.writerow(["name", *columns, "folder", "cell"])
    front = _front(rows)
    for row in rows:
        candidate, first = row.candidate, row.results[0] if row.results else None
        proxy = float(np.mean(candidate.proxy_scores)) if candidate.proxy_scores else None
        final = [row.mean if row.results else None, row.std if len(row.results) > 1 else None, len(row.results)]
        cost: list[Any] = [first.parameters, first.multiply_adds, first.seconds] if first else [None] * 3
        cell = json.dumps(json.loads(candidate.cell.to_json()))
        costs = [candidate.cost and candidate.cost[1], candidate.name in front] if kinds else []
        trained_for = [candidate.proxy_iterations] if has_rungs else []
        ranks = [candidate.proxy_rank, *trained_for, proxy, *costs, row.final_rank]
        more = details_beside(task, [result.scores for result in row.results])
        writer.writerow([candidate.name, *ranks, *final, "; ".join(row.failures), *cost, *more, row.folder.name, cell])
    write_text(path, text.getvalue())


def _draw(path: Path, rows: list[Reranked], rho: RankCorrelation | None, score: Measure) -> None:
    """Draw figure 4b: a dot for each cell, the known ones marked, and the ρ of the others above.

    Cells that the search did not train in full are left out.
    """
    points = [
        Point(
            row.candidate.proxy_scores,
            row.scores,
            None if row.candidate.proxy_rank else row.candidate.name,
            row.candidate.name,
        )
        for row in rows
        if row.candidate.proxy_scores and row.is_scored and row.candidate.is_in_full
    ]
    write_scatters(
        path, [Scatter(points, score.name, "proxy", "end to end", title=f"cells of the search: {rho}" if rho else "")]
    )
