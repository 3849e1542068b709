"""Successive halving: cells are compared on rungs, first after few iterations, and only the best go on to the next rung.

- `halving` (Jamieson and Talwalkar, AISTATS 2016, https://arxiv.org/abs/1502.07943): the best of a rung go on once all its
  cells are there.
- `asha` (Li et al., MLSys 2020, https://arxiv.org/abs/1810.05934): a cell goes on as soon as it is among the best of those
  that are there.
- `pasha` (Bohdal et al., ICLR 2023, https://arxiv.org/abs/2207.06940): asha on the lowest rungs alone; one more is used
  whenever the two uppermost disagree about the order of the cells.

The jobs of a search, which are new trials and trials that go on, form one sequence. Job n is a function of the jobs before it
and of the results of those before n − lag, so any number of processes makes the same jobs. When nothing more follows from
these, the results of all jobs so far are waited for. Once all trials have begun, rungs are cut from the lowest up, and of one
with too few cells for a cut the best goes on: so at last, at least one cell has been trained in full.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.cells.history import History
from search.errors import InputError

Rule = Literal["halving", "asha", "pasha"]
REDUCTION = 4
LEAST, _MOST_RUNGS = 20, 4  # iterations on the lowest rung, and rungs, where they are chosen

_NOISE = 0.9  # quantile of the differences between cells whose order is taken for noise (PASHA, section 4.2)


@dataclass(frozen=True)
class Halving:
    """How a search is cut short. Raises InputError for rungs that cannot work."""

    rule: Rule
    rungs: tuple[int, ...]  # iterations, ascending; the last one is a whole training
    reduction: int = REDUCTION  # one of so many cells goes on
    lag: int = 0  # the results of so many latest jobs are ignored

    def __post_init__(self) -> None:
        if len(self.rungs) < 2 or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 1:
            cuts = " ".join(map(str, self.rungs[:-1])) or "none"
            raise InputError(
                f"`rungs` must be iterations in ascending order, below the {self.rungs[-1]} of a whole training, got {cuts}"
            )

    @property
    def top(self) -> int:
        """The number of the highest rung."""
        return len(self.rungs) - 1

    @property
    def longest(self) -> float:
        """How many times as long as the mean job the longest one takes, in a long search in which all cells take as long."""
        iterations = np.diff((0, *self.rungs))
        shares = float(self.reduction) ** -np.arange(len(iterations))
        return float(iterations.max() * shares.sum() / (iterations * shares).sum())


def chosen_rungs(iterations: int, reduction: int) -> tuple[int, ...]:
    """Rungs for trainings of so many iterations: each has `reduction` times those of the one below it, but at least twice as
    many. () if none fits.

    >>> chosen_rungs(1000, 4), chosen_rungs(30_000, 4), chosen_rungs(30, 4)
    ((62, 250), (468, 1875, 7500), ())
    """
    factors = [max(2, reduction) ** power for power in range(1, _MOST_RUNGS)]
    return tuple(iterations // factor for factor in reversed(factors) if iterations // factor >= LEAST)


class Step(NamedTuple):
    """The next job of a search: a new trial, or trial `number` goes on to `rung`."""

    number: int | None
    rung: int
    bound: int  # it follows from the results of the jobs before this one


class Nothing(Enum):
    """There is no next job: not before others are finished, or for good."""

    YET = "results are waited for"
    MORE = "all cells have got as far as they should"


class Seen(NamedTuple):
    """A result that the next jobs depend on: of a trial on a rung; a copy's is that of its original. None: it failed."""

    number: int
    rung: int
    score: float | None
    copy_of: int | None = None


class Rungs:
    """The jobs of a search so far, and which one is next. Jobs are numbered as they begin, and may finish in any order."""

    def __init__(self, halving: Halving) -> None:
        self.halving = halving
        self._jobs: list[tuple[int, int]] = []  # trial and rung
        self._results: dict[int, Seen] = {}  # by job, those that are not seen yet
        self._finished_below = 0  # all jobs before it are finished
        self._seen_below = 0  # the results of the jobs before it count
        self._seen: list[Seen] = []  # and were not taken yet
        self._trials = 0
        self._begun, self._finished = Counter[int](), Counter[int]()  # jobs by rung
        self._scored = Counter[int]()  # the same, of those with a score
        self._ended = Counter[int]()  # the same, of those whose results count
        count = len(halving.rungs)
        self._ranked: list[list[tuple[float, int]]] = [[] for _ in range(count)]  # (−score, trial), of those that count
        self._scores: list[dict[int, float]] = [{} for _ in range(count)]  # the same, by trial
        self._waiting: list[list[tuple[float, int]]] = [[] for _ in range(count)]  # of these, those that have not gone on
        self._swaps = _Swaps()  # of the cells on the uppermost rung in use
        self._cap = 1 if halving.rule == "pasha" else halving.top  # trials go on up to this rung

    def __len__(self) -> int:
        return len(self._jobs)

    def begin(self, number: int, rung: int, bound: int) -> None:
        """The next job is begun."""
        self._see(bound)
        self._jobs.append((number, rung))
        self._begun[rung] += 1
        if rung == 0:
            self._trials = max(self._trials, number + 1)
        else:
            _remove(self._waiting[rung - 1], (-self._scores[rung - 1][number], number))

    def finish(self, job: int, score: float | None, copy_of: int | None = None) -> None:
        """A job has a score, or has failed; that of a copy does not count, because its original's does."""
        if job >= self._finished_below and job not in self._results:
            rung = self._jobs[job][1]
            self._finished[rung] += 1
            self._scored[rung] += score is not None
            self._results[job] = Seen(*self._jobs[job], score, copy_of)
            while self._finished_below in self._results and self._finished_below < len(self._jobs):
                self._finished_below += 1

    def next(self, trials: int) -> Step | Nothing:
        """The next job of a search of so many trials."""
        job, before = len(self._jobs), max(self._seen_below, len(self._jobs) - self.halving.lag)
        for bound in (before, job):
            if self._finished_below < bound:
                return Nothing.YET
            self._see(bound)
            promoted = self._promotion(are_all_begun=self._trials >= trials)
            if promoted is not None:
                return Step(*promoted, bound)
            if self._trials < trials:
                return Step(None, 0, bound)
        return Nothing.MORE

    def take_seen(self) -> list[Seen]:
        """The results that the next job depends on and the jobs before it did not, in order."""
        taken, self._seen = self._seen, []
        return taken

    def show_seen(self, history: History) -> None:
        """Let a sampler's history have what `take_seen` returns."""
        for seen in self.take_seen():
            if seen.copy_of is not None:
                history.copy(seen.number, seen.copy_of)
            elif seen.score is not None:
                history.finish(seen.number, seen.score, seen.rung)
            else:
                history.withdraw(seen.number)

    def scored(self) -> list[int]:
        """How many cells have a score on each rung that is reached, without copies."""
        return [self._scored[rung] for rung in sorted(self._scored)]

    def share(self, trials: int) -> float:
        """How much of the work of so many trials is done, in iterations, as far as one can know: more may go on than usual."""
        iterations = np.diff((0, *self.halving.rungs))
        usual = float((iterations * float(self.halving.reduction) ** -np.arange(len(iterations))).sum())  # of a trial
        done, running = (
            sum(number[rung] * int(each) for rung, each in enumerate(iterations))
            for number in (self._finished, self._begun - self._finished)
        )
        left = running + usual * (trials - self._trials)
        return done / max(usual * trials, done + left)

    def place(self, rung: int, score: float) -> int:
        """How many cells on a rung are better than this score and have not gone on, of those that count."""
        return bisect_left(self._waiting[rung], (-score, -1))

    # Seeing

    def _see(self, bound: int) -> None:
        for job in range(self._seen_below, bound):
            seen = self._results.pop(job)
            self._seen.append(seen)
            self._ended[seen.rung] += 1
            if seen.copy_of is None:
                self._count(seen.number, seen.rung, seen.score)
        self._seen_below = max(self._seen_below, bound)

    def _count(self, number: int, rung: int, score: float | None) -> None:
        if score is None:
            for lower in range(rung):
                _remove(self._ranked[lower], (-self._scores[lower].pop(number), number))
            self._swaps = _Swaps()
            return
        insort(self._ranked[rung], (-score, number))
        insort(self._waiting[rung], (-score, number))
        self._scores[rung][number] = score
        if self.halving.rule == "pasha" and rung == self._cap < self.halving.top and not self._agree():
            self._cap += 1
            self._swaps = _Swaps()

    def _agree(self) -> bool:
        """Whether the two uppermost rungs in use have the same order of cells, but for differences within the noise."""
        lower = self._scores[self._cap - 1]
        above = [number for _, number in self._ranked[self._cap]]
        below = sorted(above, key=lambda number: (-lower[number], number))
        if above == below:
            return True
        for number in above:
            if number not in self._swaps.numbers:
                self._swaps.add(number, [scores[number] for scores in self._scores[: self._cap + 1]])
        noise = self._swaps.noise()
        return all(abs(lower[one] - lower[other]) <= noise for one, other in zip(above, below, strict=True))

    # Choosing

    def _promotion(self, *, are_all_begun: bool) -> tuple[int, int] | None:
        """The trial that goes on, and to which rung: from the uppermost rung that has one (ASHA), or else at a cut."""
        at_once = () if self.halving.rule == "halving" else reversed(range(self._cap))
        for rung in at_once:
            if (number := self._best(rung, least=0)) is not None:
                return number, rung + 1
        for rung in range(self.halving.top):
            if not are_all_begun or self._ended[rung] < self._begun[rung]:
                return None
            if (number := self._best(rung, least=1)) is not None:
                return number, rung + 1
        return None

    def _best(self, rung: int, least: int) -> int | None:
        """The best trial of those on a rung that should go on, and have not."""
        ranked, waiting = self._ranked[rung], self._waiting[rung]
        wanted = max(least, len(ranked) // self.halving.reduction if rung < self._cap else 0)
        return waiting[0][1] if wanted and waiting and waiting[0] <= ranked[wanted - 1] else None


class _Swaps:
    """Pairs of cells that have changed places and back again from rung to rung (PASHA, section 4.2); each is compared once."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self._curves: NDArray[np.float64] | None = None  # (N, rungs)
        self._differences = np.zeros(0)  # of such pairs on the uppermost rung

    def add(self, number: int, curve: Sequence[float]) -> None:
        """One more cell, with its score on each rung."""
        self.numbers.add(number)
        row = np.array(curve)[None]
        if self._curves is None:
            self._curves = row
            return
        signs = np.sign(self._curves - row)
        has_swapped = (signs[:, 1:] * signs[:, :-1] < 0).sum(axis=1) >= 2
        self._differences = np.append(self._differences, np.abs(self._curves - row)[has_swapped, -1])
        self._curves = np.concatenate((self._curves, row))

    def noise(self) -> float:
        """What two such cells differ by."""
        return float(np.quantile(self._differences, _NOISE)) if len(self._differences) else 0.0


def _remove(ordered: list[tuple[float, int]], entry: tuple[float, int]) -> None:
    del ordered[bisect_left(ordered, entry)]
