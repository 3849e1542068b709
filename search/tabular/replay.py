"""A search replayed on a table of cells: what it would have done, and when, without any training.

The cells are those that the same search would try (`search.runs.store`), with its samplers and its early stopping; the
scores and the seconds are the table's. Each cell has the scores of one of its seeds, drawn for the whole search, because a
search trains it once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.cells.history import History
from search.cells.sampler import LAG
from search.cells.samplers import create_sampler
from search.runs.halving import Halving, Nothing, Rule, Rungs, Step
from search.tabular.table import CellTable

_OF_SEEDS = 0, 1  # names the random numbers that draw each cell's seed: a trial's are named by one number


@dataclass(frozen=True)
class Strategy:
    """How a search chooses cells, and how it is cut short, if it is; its rungs end with a whole training.

    `lag` is how many of the latest results it ignores (`search.runs.lag`).
    """

    sampler: str
    halving: Halving | None = None
    lag: int = LAG

    @property
    def name(self) -> str:
        return self.sampler if self.halving is None else f"{self.sampler} + {self.halving.rule}"

    @property
    def rule(self) -> Rule | None:
        return None if self.halving is None else self.halving.rule


class Moment(NamedTuple):
    """A search when a job ended: its trials with a score, the iterations of all trainings, the time, and the best cell.

    The best is the one that the search would name: trained longest, of these the one with the greatest score.
    """

    trials: int
    iterations: int
    seconds: float
    best: int  # its place in the table


class _Job(NamedTuple):
    """A training that runs; they end in this order."""

    end: float
    number: int  # of the job
    trial: int
    rung: int
    score: float


def replay(table: CellTable, strategy: Strategy, *, trials: int, workers: int, seed: int) -> list[Moment]:
    """Search the table with so many trials and so many workers, which evaluate as many cells at a time.

    Returns the moments at which the best cell became another one, and the last one.
    """
    search = _Search(table, strategy, trials, workers, seed)
    search.run()
    return search.moments


class _Search:
    def __init__(self, table: CellTable, strategy: Strategy, trials: int, workers: int, seed: int) -> None:
        self.moments: list[Moment] = []
        self._table, self._trials, self._workers = table, trials, workers
        self._sampler = create_sampler(strategy.sampler, table.space, seed, lag=strategy.lag)
        self._halving = strategy.halving and replace(strategy.halving, lag=strategy.lag)
        self._rungs = Rungs(self._halving) if self._halving else None
        columns = [table.iterations.index(rung) for rung in self._stops]
        drawn = np.random.default_rng([seed, *_OF_SEEDS]).integers(table.num_seeds, size=len(table.cells))
        cells = np.arange(len(table.cells))
        self._scores: NDArray[np.float64] = table.scores[cells, drawn][:, columns]  # (cells, rungs)
        self._seconds: NDArray[np.float64] = table.seconds[cells, drawn]  # (cells,)
        self._history = History()
        self._places: list[int] = []  # in the table, by trial
        self._originals: dict[int, int] = {}  # the trial that is trained, by place
        self._running: list[_Job] = []  # a heap
        self._scored: set[int] = set()  # trials with a score
        self._scored_below = 0  # all trials below it have one
        self._best = (0, 0.0, 0)  # rung, score and trial, negative but the last: the least is best
        self._now, self._iterations, self._jobs = 0.0, 0, 0

    @property
    def _stops(self) -> Sequence[int]:
        """Iterations at which trainings are scored."""
        return self._halving.rungs if self._halving else self._table.iterations[-1:]

    def run(self) -> None:
        while True:
            while len(self._running) < self._workers and self._begin():
                pass
            if not self._running:
                self._note(is_last=True)
                return
            self._end(heappop(self._running))

    def _begin(self) -> bool:
        """Begin the next job, or finish it as a copy; False if there is none now."""
        step = self._next_step()
        if not isinstance(step, Step):
            return False
        if step.number is not None:
            self._train(step.number, step)
            return True
        trial = len(self._places)
        cell = self._sampler.propose(trial, self._history)
        place = self._table.place_of(cell)
        original = self._originals.get(place)
        if any(job.trial == original and job.rung == 0 for job in self._running):  # its score is waited for
            return False
        self._history.propose(trial, cell.to_json(), self._table.cells[place].cell.to_json())
        self._places.append(place)
        if original is None:
            self._originals[place] = trial
            self._train(trial, step)
        else:
            self._copy(trial, original, step)
        return True

    def _next_step(self) -> Step | Nothing:
        trial = len(self._places)
        if self._rungs is None:
            if trial < self._trials and self._scored_below >= self._sampler.visible_before(trial):
                return Step(None, 0, 0)
            return Nothing.YET
        step = self._rungs.next(self._trials)
        self._rungs.show_seen(self._history)
        return step

    def _train(self, trial: int, step: Step) -> None:
        place, stops = self._places[trial], self._stops
        if self._rungs is not None:
            self._rungs.begin(trial, step.rung, step.bound)
        stretch = stops[step.rung] - (stops[step.rung - 1] if step.rung else 0)
        end = self._now + self._seconds[place] * stretch / self._table.iterations[-1]
        heappush(self._running, _Job(end, self._jobs, trial, step.rung, float(self._scores[place, step.rung])))
        self._jobs += 1

    def _copy(self, trial: int, original: int, step: Step) -> None:
        if self._rungs is not None:
            self._rungs.begin(trial, step.rung, step.bound)
            self._rungs.finish(self._jobs, None, copy_of=original)
        else:
            self._history.copy(trial, original)
        self._jobs += 1
        self._count(trial)

    def _end(self, job: _Job) -> None:
        self._now = job.end
        below = self._stops[job.rung - 1] if job.rung else 0
        self._iterations += self._stops[job.rung] - below
        if self._rungs is not None:
            self._rungs.finish(job.number, job.score)
        else:
            self._history.finish(job.trial, job.score)
        self._count(job.trial)
        order = (-job.rung, -job.score, job.trial)
        if not self.moments or order < self._best:
            self._best = order
            self._note()

    def _count(self, trial: int) -> None:
        self._scored.add(trial)
        while self._scored_below in self._scored:
            self._scored_below += 1

    def _note(self, *, is_last: bool = False) -> None:
        moment = Moment(len(self._scored), self._iterations, self._now, self._places[self._best[-1]])
        if is_last and self.moments and self.moments[-1] == moment:
            return
        self.moments.append(moment)
