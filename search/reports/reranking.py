"""Results of a re-ranking: the cells by end-to-end score beside their proxy rank, as table, CSV and picture."""

import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reference.cell import Cell
from search.cells.pareto import pareto_front
from search.dense_tasks import DenseTask, Measure, Scores, details_beside, measures_beside
from search.files import write_text
from search.reports.page import quantity
from search.reports.rank_correlation import MIN_POINTS, RankCorrelation, rank_correlation, ties
from search.reports.scatter import Point, Scatter, write_scatters
from search.tasks.end_to_end import EndToEndResult, Failed
from search.tasks.proxy import COST_NAMES, CostKind


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
    seeds: tuple[int, ...]  # which trainings the results are of
    test_scores: Mapping[str, tuple[float, ...]]  # of the results, on each test split; none until all of them have one
    final_rank: int | None = None

    @property
    def is_scored(self) -> bool:
        """Whether it has a score. A cell that failed with any seed has none: its mean would lack the worst result."""
        return bool(self.results) and not self.failures

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.results]

    def by_seed(self, split: str | None = None) -> dict[int, float]:
        """The scores that count by their seed; those on a test split if it is given, nothing until all are made."""
        scores = self.scores if split is None else self.test_scores[split]
        return dict(zip(self.seeds, scores, strict=bool(scores)))

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores)) if self.results else math.nan


@dataclass(frozen=True)
class Trainings:
    """A candidate's trainings, one per seed; None for one that is not finished. `folder` is that of the first.

    `test_scores` are those on test splits, by the split's name; None for one that is not made.
    """

    candidate: Candidate
    outcomes: Sequence[EndToEndResult | Failed | None]
    folder: Path
    test_scores: Mapping[str, Sequence[Scores | None]] = field(default_factory=dict)

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
    counted = [
        k
        for k, outcome in enumerate(trainings.outcomes)
        if isinstance(outcome, EndToEndResult) and (of_all or k in (seeds or ()))
    ]
    tested = {split: [scores[k] for k in counted] for split, scores in trainings.test_scores.items()}
    return Reranked(
        candidate=trainings.candidate,
        results=tuple(outcome for k in counted if isinstance(outcome := trainings.outcomes[k], EndToEndResult)),
        failures=tuple(failed.reason for failed in trainings.failures),
        finished=sum(outcome is not None for outcome in trainings.outcomes),
        folder=trainings.folder,
        seeds=tuple(counted),
        test_scores={
            split: tuple(each.score for each in scores if each) if all(scores) else () for split, scores in tested.items()
        },
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
    if splits := _splits(rows):
        is_whole = all(row.test_scores[split] for row in rows if row.is_scored for split in splits)
        lacking = "" if is_whole else " (scores are missing; the same command makes them)"
        print(f"\ntest splits, which choose nothing: {', '.join(splits)}{lacking}")
    print(_differences(found[0], rows, task.score), end="")
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
    splits = _splits(rows)
    lines = [
        f"{'':{width}} {'proxy':>{wide}} {'final':>20}{''.join(f' {split:>14}' for split in splits)}",
        f"{'':{width}} {'rank':>5}{trained} {score.heading:>{narrow}} {'rank':>5} {score.heading:>14}"
        f"{''.join(f' {score.heading:>{max(14, len(split))}}' for split in splits)} {'params':>9} {'multiply-adds':>13} "
        f"{'seconds':>8}  cell",
    ]
    for row in rows:
        candidate = row.candidate
        proxy = f"{100 * np.mean(candidate.proxy_scores):.2f}" if candidate.proxy_scores else "–"
        final, cost = "failed" if row.failures else "–", f"{'–':>9} {'–':>13} {'–':>8}"
        if row.is_scored:
            final, first = _spread(row.scores), row.results[0]
            cost = f"{first.parameters:>9,} {quantity(first.multiply_adds):>13} {first.seconds:>8.1f}"
        trained = f" {candidate.proxy_iterations:>10,}" if has_rungs else ""
        ranks = f"{candidate.proxy_rank or '–':>5}{trained} {proxy:>{narrow}} {row.final_rank or '–':>5}"
        tested = "".join(
            f" {_spread(row.test_scores[split]) if row.is_scored else '–':>{max(14, len(split))}}" for split in splits
        )
        lines.append(f"{candidate.name:{width}} {ranks} {final:>14}{tested} {cost}  {candidate.cell}")
    return "\n".join(lines)


def _splits(rows: list[Reranked]) -> tuple[str, ...]:
    """The names of the test splits."""
    return tuple(rows[0].test_scores)


def _mean(scores: Sequence[float]) -> float | None:
    return float(np.mean(scores)) if scores else None


def _std(scores: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None for a single score."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def _spread(scores: Sequence[float], sign: str = "") -> str:
    """The mean of scores, or with a `sign` of differences, and of several the standard deviation; a dash for none."""
    mean, std = _mean(scores), _std(scores)
    if mean is None:
        return "–"
    return f"{100 * mean:{sign}.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _differences(best: Reranked, rows: list[Reranked], score: Measure) -> str:
    """By how much the best cell of the search is better than each known one, of the trainings with equal seeds, as a table."""
    known = [row for row in rows if row.candidate.proxy_rank is None and row.is_scored]
    if not known:
        return ""
    splits = _splits(rows)
    width = max(len(row.candidate.name) for row in known)
    count = len(best.seeds)
    spread = f" ± standard deviation of {count} seeds" if count > 1 else ", of one seed, so nothing says how much is noise"
    lines = [
        f"\n{best.candidate.name}, whose final score has chosen it, less each known cell, in points of {score.name}{spread}:",
        f"{'than':{width}} {'final':>14}{''.join(f' {split:>14}' for split in splits)}",
    ]
    for row in known:
        cells = [f"{_spread(_lead(best, row), '+'):>14}"]
        cells += [f"{_spread(_lead(best, row, split), '+'):>{max(14, len(split))}}" for split in splits]
        lines.append(" ".join([f"{row.candidate.name:{width}}", *cells]))
    return "\n".join(lines) + "\n"


def _lead(best: Reranked, row: Reranked, split: str | None = None) -> list[float]:
    """By how much the best cell's score is higher than another's, for each seed that both have; on a test split if given."""
    ours, theirs = best.by_seed(split), row.by_seed(split)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


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
    test_columns = (f"test_{split}_{name}" for split in _splits(rows) for name in (key, "std"))
    has_rungs = _has_rungs(rows)
    trained = ["proxy_iterations"] if has_rungs else []
    kinds = _cost_kinds(rows)
    second = [column for kind in kinds for column in (f"proxy_{kind}", "is_on_front")]
    columns = ["proxy_rank", *trained, f"proxy_{key}", *second, *final_columns, *more_columns]
    writer.writerow(["name", *columns, *test_columns, "folder", "cell"])
    front = _front(rows)
    for row in rows:
        candidate, first = row.candidate, row.results[0] if row.results else None
        proxy = float(np.mean(candidate.proxy_scores)) if candidate.proxy_scores else None
        final = [_mean(row.scores), _std(row.scores), len(row.results)]
        cost: list[Any] = [first.parameters, first.multiply_adds, first.seconds] if first else [None] * 3
        cell = json.dumps(json.loads(candidate.cell.to_json()))
        costs = [candidate.cost and candidate.cost[1], candidate.name in front] if kinds else []
        trained_for = [candidate.proxy_iterations] if has_rungs else []
        ranks = [candidate.proxy_rank, *trained_for, proxy, *costs, row.final_rank]
        more = details_beside(task, [result.scores for result in row.results])
        tested: list[float | None] = []
        for scores in row.test_scores.values():
            tested += [_mean(scores), _std(scores)]
        writer.writerow(
            [candidate.name, *ranks, *final, "; ".join(row.failures), *cost, *more, *tested, row.folder.name, cell]
        )
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
