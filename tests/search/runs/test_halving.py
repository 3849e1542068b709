"""Successive halving: one sequence of jobs for any number of workers, and that of the papers."""

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import InputError
from search.runs.halving import Halving, Nothing, Rule, Rungs, Seen, Step, chosen_rungs
from tests.strategies import rng_seeds

RULES: tuple[Rule, ...] = ("halving", "asha", "pasha")
TrialOnRung = tuple[int, int]


class Result(NamedTuple):
    score: float | None  # None: it fails
    copy_of: int | None = None


_MOST_TRIALS, _MOST_RUNGS = 64, 5


class Cells:
    """What the cells of a search score on each rung; the later rungs agree more or less with the earlier ones.

    `failing` is a share of all jobs, `copies` one of the trials; a score's `noise` is 1 if it is as large as all differences.
    """

    def __init__(self, seed: int, noise: float = 1.0, failing: float = 0.0, copies: float = 0.0, digits: int = 15) -> None:
        rng = np.random.default_rng(seed)
        rungs = _MOST_TRIALS, _MOST_RUNGS
        scores = rng.normal(size=(_MOST_TRIALS, 1)) + noise * rng.normal(size=rungs) / np.arange(1, _MOST_RUNGS + 1)
        self._scores = scores.round(digits).tolist()
        self._fails = (rng.random(rungs) < failing).tolist()
        originals = [None, *rng.integers(np.arange(1, _MOST_TRIALS)).tolist()]
        is_copy = (rng.random(_MOST_TRIALS) < copies).tolist()
        self._copy_of = [original if yes else None for original, yes in zip(originals, is_copy, strict=True)]

    def on(self, trial: int, rung: int) -> Result:
        return Result(None if self._fails[trial][rung] else self.score(trial, rung), self._copy_of[trial])

    def score(self, trial: int, rung: int) -> float:
        return float(self._scores[trial][rung])


def cells(*failing: float, copies: float = 0.3) -> st.SearchStrategy[Cells]:
    """With ties, copies, and these shares of failures."""
    noise = st.sampled_from((0.0, 0.2, 2.0))
    shares = st.sampled_from(failing or (0.0, 0.1, 0.5, 1.0)), st.sampled_from((0.0, copies))
    return st.builds(Cells, rng_seeds(), noise, *shares, st.sampled_from((0, 15)))


def halvings(rules: tuple[Rule, ...] = RULES, max_lag: int = 4, min_rungs: int = 2) -> st.SearchStrategy[Halving]:
    rungs = st.integers(min_rungs, 5).map(lambda count: tuple(range(1, count + 1)))
    return st.builds(Halving, st.sampled_from(rules), rungs, st.integers(1, 4), st.integers(0, max_lag))


@dataclass
class Log:
    """What is written of a search, from which any process can go on."""

    begun: list[tuple[int, int, int]] = field(default_factory=list)  # number, rung, bound
    finished: dict[int, Result] = field(default_factory=dict)  # by job

    @property
    def jobs(self) -> list[TrialOnRung]:
        return [(number, rung) for number, rung, _ in self.begun]

    @property
    def trials(self) -> int:
        return sum(rung == 0 for _, rung in self.jobs)


def simulate(
    rungs: Rungs,
    trials: int,
    result: Callable[[int, int], Result],
    *,
    workers: int = 1,
    seed: int = 0,
    log: Log | None = None,
    on_step: Callable[[Log, Step | Nothing], None] = lambda log, step: None,
) -> Log:
    """Run a search on workers whose jobs take times of their own, of which some are equal, until nothing is left to do."""
    rng, log, clock = np.random.default_rng(seed), log or Log(), 0
    running: list[tuple[int, float, int]] = []  # when it ends, a lot among those that end together, job
    while True:
        step = rungs.next(trials)
        on_step(log, step)
        if isinstance(step, Step) and len(running) < workers:
            number = log.trials if step.number is None else step.number
            heapq.heappush(running, (clock + int(rng.choice((1, 2, 3, 50))), rng.random(), len(log.begun)))
            rungs.begin(number, step.rung, step.bound)
            log.begun.append((number, step.rung, step.bound))
        elif running:
            clock, _, job = heapq.heappop(running)
            log.finished[job] = result(*log.jobs[job])
            rungs.finish(job, *log.finished[job])
        else:
            assert step is Nothing.MORE  # or it would wait for nobody, for ever
            return log


def jobs_of(halving: Halving, trials: int, result: Callable[[int, int], Result]) -> list[TrialOnRung]:
    """One after the other."""
    return simulate(Rungs(halving), trials, result).jobs


# The same jobs, whoever makes them


@given(halvings(), cells(), st.integers(0, 25), st.integers(2, 6), rng_seeds())
def test_any_number_of_workers_at_any_speed_makes_the_same_jobs(
    halving: Halving, cells: Cells, trials: int, workers: int, seed: int
) -> None:
    alone = simulate(Rungs(halving), trials, cells.on)
    together = simulate(Rungs(halving), trials, cells.on, workers=workers, seed=seed)
    assert together.begun == alone.begun
    assert together.finished == alone.finished


@given(halvings(), cells(0.0, 0.2), st.integers(1, 25), rng_seeds())
def test_while_trials_are_left_no_worker_within_the_lag_waits_for_another(
    halving: Halving, cells: Cells, trials: int, seed: int
) -> None:
    """As many as the lag, and one more: until all trials have begun, there is a job as soon as one of them is idle, unless
    the oldest job is later than that.
    """

    def check(log: Log, step: Step | Nothing) -> None:
        oldest = next((job for job in range(len(log.begun)) if job not in log.finished), len(log.begun))
        if log.trials < trials and len(log.begun) - oldest <= halving.lag:
            assert isinstance(step, Step)

    simulate(Rungs(halving), trials, cells.on, workers=halving.lag + 1, seed=seed, on_step=check)


class Follower:
    """Another process, which now and then reads what was written since."""

    def __init__(self, halving: Halving) -> None:
        self.rungs = Rungs(halving)

    def read(self, log: Log) -> None:
        known = len(self.rungs)
        for job in range(len(log.begun)):
            if job >= known:
                self.rungs.begin(*log.begun[job])
            if job in log.finished:
                self.rungs.finish(job, *log.finished[job])


@given(halvings(), cells(), st.integers(1, 12), st.integers(1, 5), rng_seeds())
def test_a_process_that_reads_of_the_jobs_later_would_go_on_as_the_one_that_made_them(
    halving: Halving, cells: Cells, trials: int, workers: int, seed: int
) -> None:
    """At any moment: one that begins then, and one that reads now and then, and asks itself what is next."""
    rng = np.random.default_rng(seed)
    sleepy = Follower(halving)

    def check(log: Log, step: Step | Nothing) -> None:
        late = Follower(halving)
        late.read(log)
        assert late.rungs.next(trials) == step
        if rng.random() < 0.3:
            sleepy.read(log)
            assert sleepy.rungs.next(trials) == step

    simulate(Rungs(halving), trials, cells.on, workers=workers, seed=seed, on_step=check)


@given(halvings(), cells(), st.integers(1, 20), st.integers(1, 5), rng_seeds())
def test_what_a_job_depends_on_is_told_once_in_order_and_no_more_of_it(
    halving: Halving, cells: Cells, trials: int, workers: int, seed: int
) -> None:
    rungs = Rungs(halving)
    seen: list[Seen] = []

    def check(log: Log, step: Step | Nothing) -> None:
        seen.extend(rungs.take_seen())
        assert seen == [Seen(*log.jobs[job], *log.finished[job]) for job in range(len(seen))]
        if isinstance(step, Step):
            assert len(seen) == step.bound >= len(log.begun) - halving.lag

    simulate(rungs, trials, cells.on, workers=workers, seed=seed, on_step=check)


# What any search comes to


def check_the_end(halving: Halving, trials: int, log: Log) -> None:
    assert sorted(number for number, rung in log.jobs if rung == 0) == list(range(trials))
    assert len(set(log.jobs)) == len(log.jobs)
    assert len(log.finished) == len(log.jobs)
    scored = {log.jobs[job] for job, result in log.finished.items() if result.score is not None and result.copy_of is None}
    for place, (number, rung) in enumerate(log.jobs):
        if rung > 0:
            assert (number, rung - 1) in scored
            assert log.jobs.index((number, rung - 1)) < place
    failed = {log.jobs[job][0] for job, result in log.finished.items() if result.score is None}
    originals = {log.jobs[job][0] for job, result in log.finished.items() if result.copy_of is None}
    assert originals <= failed or any((number, halving.top) in scored for number in originals)


@given(halvings(), cells(), st.integers(0, 25), st.integers(0, 25))
def test_a_search_ends_with_a_cell_trained_in_full_and_goes_on_when_more_trials_are_asked_for(
    halving: Halving, cells: Cells, trials: int, more: int
) -> None:
    """Each cell is at most once on a rung, and only after the one below; copies and failed ones go no further."""
    rungs = Rungs(halving)
    log = simulate(rungs, trials, cells.on)
    check_the_end(halving, trials, log)
    so_far = list(log.begun)
    simulate(rungs, trials + more, cells.on, log=log)
    assert log.begun[: len(so_far)] == so_far
    check_the_end(halving, trials + more, log)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("failing_rung", [1, 2])
def test_if_the_best_cell_fails_on_the_next_rung_the_next_best_goes_on(rule: Rule, failing_rung: int) -> None:
    def result(trial: int, rung: int) -> Result:
        return Result(None if (trial, rung) == (0, failing_rung) else 10.0 - trial)

    jobs = jobs_of(Halving(rule, (1, 2, 3), reduction=4), 3, result)
    assert jobs[:3] == [(0, 0), (1, 0), (2, 0)]
    assert jobs[3:] == [(0, rung + 1) for rung in range(failing_rung)] + [(1, 1), (1, 2)]


@pytest.mark.parametrize("rule", ["halving", "asha"])
@given(cells=cells(0.0, copies=0.0), trials=st.integers(1, 12), count=st.integers(2, 4))
def test_a_reduction_of_1_trains_all_cells_in_full(rule: Rule, cells: Cells, trials: int, count: int) -> None:
    jobs = jobs_of(Halving(rule, tuple(range(1, count + 1)), reduction=1), trials, cells.on)
    assert sorted(jobs) == sorted(product(range(trials), range(count)))


@given(halvings(), cells(0.0, 0.3), st.integers(1, 20), rng_seeds())
def test_a_place_counts_the_better_cells_that_are_still_there(halving: Halving, cells: Cells, trials: int, seed: int) -> None:
    rungs = Rungs(halving)

    def check(log: Log, step: Step | Nothing) -> None:
        if not isinstance(step, Step):
            return
        failed = {log.jobs[job][0] for job in range(step.bound) if log.finished[job].score is None}
        for rung in range(halving.top + 1):
            there = {
                log.jobs[job][0]: log.finished[job].score or 0.0
                for job in range(step.bound)
                if log.jobs[job][1] == rung and log.finished[job].copy_of is None and log.jobs[job][0] not in failed
            }
            waiting = [score for number, score in there.items() if (number, rung + 1) not in log.jobs]
            for score in (*there.values(), 0.5):
                assert rungs.place(rung, score) == sum(other > score for other in waiting)

    simulate(rungs, trials, cells.on, workers=2, seed=seed, on_step=check)


# Halving (Jamieson and Talwalkar)


@given(rng_seeds(), st.integers(1, 40), st.integers(2, 5), st.integers(1, 5), st.integers(0, 4))
def test_halving_is_that_of_the_paper(seed: int, trials: int, count: int, reduction: int, lag: int) -> None:
    cells = Cells(seed)
    expected, left = [], list(range(trials))
    for rung in range(count):
        expected += [(number, rung) for number in left]
        by_score = sorted(left, key=lambda number: cells.score(number, rung), reverse=True)
        left = by_score[: max(1, len(left) // reduction)]
    assert jobs_of(Halving("halving", tuple(range(1, count + 1)), reduction, lag), trials, cells.on) == expected


# ASHA (algorithm 2), and PASHA


Scores = dict[int, float]  # by trial


def asynchronously_halved(
    cells: Cells, trials: int, halving: Halving, agree: Callable[[list[Scores]], bool] | None = None
) -> list[TrialOnRung]:
    """The jobs until the last trial has begun; growing from two rungs on while the uppermost do not `agree`."""
    jobs: list[TrialOnRung] = []
    rungs = defaultdict[int, Scores](dict)
    cap = halving.top if agree is None else 1
    while sum(rung == 0 for _, rung in jobs) < trials:
        if len(jobs) > halving.lag:  # one more result is known
            number, rung = jobs[len(jobs) - halving.lag - 1]
            rungs[rung][number] = cells.score(number, rung)
            if agree and rung == cap < halving.top and not agree([rungs[i] for i in range(cap + 1)]):
                cap += 1
        jobs.append(_asha_job(jobs, rungs, cap, halving.reduction))
    return jobs


def _asha_job(jobs: list[TrialOnRung], rungs: dict[int, Scores], cap: int, reduction: int) -> TrialOnRung:
    for rung in range(cap - 1, -1, -1):
        by_score = sorted(rungs[rung], key=lambda number: rungs[rung][number], reverse=True)
        candidates = by_score[: len(by_score) // reduction]
        promotable = [number for number in candidates if (number, rung + 1) not in jobs]
        if promotable:
            return promotable[0], rung + 1
    return sum(rung == 0 for _, rung in jobs), 0


def until_the_last_begins(jobs: list[TrialOnRung], trials: int) -> list[TrialOnRung]:
    return jobs[: jobs.index((trials - 1, 0)) + 1]


@given(halvings(("asha",)), rng_seeds(), st.integers(1, 40))
def test_asha_is_that_of_the_paper(halving: Halving, seed: int, trials: int) -> None:
    """Of results as late as the lag says."""
    cells = Cells(seed)
    found = until_the_last_begins(jobs_of(halving, trials, cells.on), trials)
    assert found == asynchronously_halved(cells, trials, halving)


def agree_as_in_the_paper(rungs: list[Scores]) -> bool:
    """Soft ranks: at each place is a cell that cannot be told from the one of this place on the rung below."""
    lower, upper = rungs[-2:]
    distances = []
    for one, other in combinations(upper, 2):
        ahead = [scores[one] > scores[other] for scores in rungs]
        if any(a != b and b != c for a, b, c in combinations(ahead, 3)):
            distances.append(abs(upper[one] - upper[other]))
    noise = np.percentile(distances, 90) if distances else 0.0
    above = sorted(upper, key=lambda number: upper[number])
    below = sorted(upper, key=lambda number: lower[number])
    return all(abs(lower[a] - lower[b]) <= noise for a, b in zip(above, below, strict=True))


@given(halvings(("pasha",), min_rungs=3), rng_seeds(), st.sampled_from((0.0, 0.02, 0.3, 2.0)), st.integers(1, 40))
def test_pasha_is_that_of_the_paper(halving: Halving, seed: int, noise: float, trials: int) -> None:
    cells = Cells(seed, noise=noise)
    found = until_the_last_begins(jobs_of(halving, trials, cells.on), trials)
    assert found == asynchronously_halved(cells, trials, halving, agree_as_in_the_paper)


@given(rng_seeds(), st.integers(1, 40), st.integers(3, 5), st.integers(2, 4))
def test_pasha_uses_two_rungs_while_they_agree_and_then_trains_the_best_cell_in_full(
    seed: int, trials: int, count: int, reduction: int
) -> None:
    cells = Cells(seed, noise=0.0)
    jobs = jobs_of(Halving("pasha", tuple(range(1, count + 1)), reduction), trials, cells.on)
    best = max(range(trials), key=lambda number: cells.score(number, 0))
    above = [job for job in jobs if job[1] > 1]
    assert above == jobs[len(jobs) - len(above) :] == [(best, rung) for rung in range(2, count)]


def on_four_rungs(*scores: tuple[float, ...]) -> list[TrialOnRung]:
    """The jobs of PASHA before the end, for cells that all go on to each rung in use; scores that are not given are 0."""
    halving, count = Halving("pasha", (1, 2, 3, 4), reduction=1), len(scores)
    padded = [(*curve, 0.0, 0.0, 0.0, 0.0)[:4] for curve in (*scores, ())]
    return until_the_last_begins(jobs_of(halving, count + 1, lambda trial, rung: Result(padded[trial][rung])), count + 1)[:-1]


TWO_RUNGS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_pasha_uses_one_more_rung_when_the_two_uppermost_disagree() -> None:
    assert on_four_rungs((0.5, 0.6), (0.4, 0.5)) == TWO_RUNGS
    three = [*TWO_RUNGS, (1, 2), (0, 2)]  # the better one on the second rung first
    assert on_four_rungs((0.5, 0.6, 0.7), (0.4, 0.7, 0.8)) == three
    assert on_four_rungs((0.5, 0.6, 0.7, 0.8), (0.4, 0.7, 0.6, 0.8))[:6] == three


@pytest.mark.parametrize(("difference", "grows"), [(0.09, True), (0.11, False)])
def test_to_pasha_cells_that_changed_places_twice_differ_by_noise(difference: float, grows: bool) -> None:
    """On the second rung they differ by 0.1; by how much they do on the third is what is taken for noise."""
    jobs = on_four_rungs((0.5, 0.6, 0.7 + difference, 0.9), (0.4, 0.7, 0.7, 0.8))
    assert ((0, 3) in jobs) is grows
    assert jobs[:6] == [*TWO_RUNGS, (1, 2), (0, 2)]


def test_to_pasha_cells_that_changed_places_once_differ_indeed() -> None:
    """Two pairs did, and differ by more on the third rung than on the second."""
    curves = (0.9, 0.5, 0.1), (0.5, 0.9, 0.7), (0.1, 0.8, 0.99)
    assert on_four_rungs(*curves[:2]) == [*TWO_RUNGS, (1, 2), (0, 2)]
    assert (2, 3) in on_four_rungs(*curves)


# Rungs


def test_the_longest_job_is_told_in_mean_jobs() -> None:
    assert Halving("halving", (1, 2), reduction=2).longest == 1  # all jobs are one iteration
    assert Halving("halving", (1, 4), reduction=1).longest == 3 / 2  # as many of 1 as of 3


@given(rng_seeds(), st.sets(st.integers(1, 1000), min_size=2, max_size=4).map(sorted), st.integers(1, 4))
def test_the_longest_job_is_that_of_a_search(seed: int, rungs: list[int], reduction: int) -> None:
    """Of as many trials as can be divided at each cut."""
    halving = Halving("halving", tuple(rungs), reduction)
    parts = np.diff((0, *rungs))
    jobs = jobs_of(halving, reduction ** (len(rungs) - 1), Cells(seed).on)
    lengths = [parts[rung] for _, rung in jobs]
    assert halving.longest == pytest.approx(max(lengths) / np.mean(lengths))


@given(st.integers(1, 100_000), st.integers(1, 10))
def test_chosen_rungs_can_work(iterations: int, reduction: int) -> None:
    rungs = chosen_rungs(iterations, reduction)
    assert all(20 <= rung < iterations for rung in rungs)
    assert (rungs == ()) == (iterations // max(2, reduction) < 20)
    if rungs:
        assert Halving("asha", (*rungs, iterations), reduction).top == len(rungs) <= 3


@pytest.mark.parametrize(
    "rungs", [(1000,), (0, 1000), (-5, 1000), (250, 62, 1000), (62, 62, 1000), (62, 1000, 1000), (2000, 1000)]
)
def test_rungs_that_cannot_work_are_refused(rungs: tuple[int, ...]) -> None:
    cuts = " ".join(map(str, rungs[:-1])) or "none"
    with pytest.raises(InputError, match=f"`rungs` must be iterations in ascending order, below the 1000 .*, got {cuts}$"):
        Halving("asha", rungs)
