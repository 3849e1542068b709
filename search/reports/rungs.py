"""What there is to say of a search that was cut short: its cells by rung, and what they cost (`search.runs.halving`).

Scores of different rungs are of trainings of different lengths, so only those of one rung are compared with each other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from search.reports.rank_correlation import MIN_POINTS, bootstrap_interval, spearman, ties
from search.runs.study import Run, TrialRecord

_MOST_RESAMPLED = 500  # pairs: of more, the interval is narrow, and takes seconds and gigabytes


@dataclass(frozen=True)
class Agreement:
    """Spearman's ρ of the scores of `cells` on two rungs; None without an order. The interval is as in `RankCorrelation`."""

    cells: int
    rho: float | None = None
    interval: tuple[float, float] | None = None  # of few cells


@dataclass(frozen=True)
class Rung:
    """One rung. `went_on` are those of its cells that were scored on the next one, or `failed` there; the last has no next."""

    iterations: int
    cells: int
    best: tuple[float, int] | None  # score and trial
    went_on: int | None = None
    failed: int = 0
    agreement: Agreement | None = None  # of its scores with those on the next rung


@dataclass(frozen=True)
class Cost:
    """Iterations of all cells with a score, beside those of as many whole trainings."""

    cells: int
    trained: int
    in_full: int

    @property
    def ratio(self) -> float:
        return self.trained / self.in_full


def iterations_of(run: Run, record: TrialRecord) -> int:
    """The iterations after which a trial of a run with rungs has its score."""
    return run.rungs[record.rung]


def is_in_full(run: Run, record: TrialRecord) -> bool:
    """Whether a trial's score is of a whole training."""
    return not run.rungs or record.rung == len(run.rungs) - 1


def trained_longest(best: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Of ranked cells those trained as long as the first: in full, or as far as any came. All, if nothing was cut short."""
    return [record for record in best if record.rung == best[0].rung]


def curves_of(run: Run) -> dict[int, tuple[float, ...]]:
    """By trial, its score on each rung that it reached; without copies, which were not trained."""
    trained = (record.number for record in run.trials if record.duplicate_of is None)
    return {number: scores for number in trained if (scores := run.rung_scores.get(number))}


def rungs_of(run: Run) -> list[Rung]:
    """All rungs, from the lowest; none if nothing was cut short."""
    curves, failed = curves_of(run), {record.number for record in run.trials if record.failure is not None}
    rungs = []
    for rung, iterations in enumerate(run.rungs):
        here = {number: scores for number, scores in curves.items() if len(scores) > rung}
        best = max(((scores[rung], -number) for number, scores in here.items()), default=None)
        shown = None if best is None else (best[0], -best[1])
        if rung == len(run.rungs) - 1:
            rungs.append(Rung(iterations, len(here), shown))
            continue
        both = [scores[rung : rung + 2] for scores in here.values() if len(scores) > rung + 1]
        fell = sum(len(scores) == rung + 1 and number in failed for number, scores in here.items())
        rungs.append(Rung(iterations, len(here), shown, len(both) + fell, fell, _agreement(both)))
    return rungs


def _agreement(pairs: Sequence[Sequence[float]]) -> Agreement:
    if len(pairs) < MIN_POINTS:
        return Agreement(len(pairs))
    lower, upper = zip(*pairs, strict=True)
    rho = spearman(lower, upper)
    if math.isnan(rho):
        return Agreement(len(pairs))
    return Agreement(len(pairs), rho, bootstrap_interval(lower, upper) if len(pairs) <= _MOST_RESAMPLED else None)


def cost_of(run: Run) -> Cost | None:
    """What the cells took; None before the first score. A training that had to begin again, its state lost, counts once."""
    reached = [len(scores) - 1 for scores in curves_of(run).values()]
    if not reached:
        return None
    return Cost(len(reached), sum(run.rungs[rung] for rung in reached), len(reached) * run.rungs[-1])


def ties_of(run: Run, best: Sequence[TrialRecord]) -> Iterator[str]:
    """`ties` among the ranked cells of a run, on each rung by itself."""
    if not run.rungs:
        if warning := ties([record.score for record in best if record.score is not None]):
            yield warning
        return
    curves = [run.rung_scores.get(record.number, ()) for record in best]
    for rung, iterations in enumerate(run.rungs):
        scores = [curve[rung] for curve in curves if len(curve) > rung]
        if scores and (warning := ties(scores)):
            yield f"after {iterations:,} iterations {warning}"
