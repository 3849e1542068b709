"""Several workers: the same cells and scores as one, whoever finishes first."""

import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import search.runs.search
from fast.train_step import EAGER_ITERATIONS
from reference.cell import Cell
from search.cells.sampler import LAG
from search.cells.samplers import SAMPLER_NAMES, create_sampler
from search.cells.space import SearchSpace, canonical_form, cell_hash, load_cell, load_cells
from search.dense_tasks import Measure, Scores
from search.dense_tasks.segmentation import Segmentation
from search.random import RandomSettings
from search.runs.reader import Reader
from search.runs.search import Search
from search.runs.store import SearchPlan, Store
from search.runs.study import Study
from search.runs.tables import Row
from search.runs.workers import InProcess, InTurns, Job, Outcome, evaluate, open_workers, outcomes
from search.settings import WorkerSettings, known
from search.tasks.proxy import NotFiniteError, ProxyResult, ProxyTask, Stretch
from tests.fast.against_reference import every_device
from tests.search.runs.small_tasks import PROXY, create_task

SETTINGS = RandomSettings(trials=25, branches=2)


def score(cell: Cell) -> ProxyResult:
    return ProxyResult(Scores(int(cell_hash(cell), 16) / 16**12, (0.5, None)), ((1, 2.0),), 1, 2, 3.0, 4)


class Shuffled:
    """Workers without work: a cell's score follows from the cell, and any job in flight may be the next to finish."""

    def __init__(self, capacity: int, seed: int = 0, interrupt_at: int = -1) -> None:
        self.capacity = capacity
        self._rng = np.random.default_rng(seed)
        self._jobs: list[Job] = []
        self._waits = iter(range(10**6))
        self._interrupt_at = interrupt_at

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        assert len(self._jobs) <= self.capacity

    def wait(self, timeout: float | None = None) -> Outcome[ProxyResult]:
        if next(self._waits) == self._interrupt_at:
            raise KeyboardInterrupt
        job = self._jobs.pop(self._rng.integers(len(self._jobs)))
        if cell_hash(job.cell).endswith("0"):  # one of sixteen
            return Outcome(job, failure="bad luck")
        return Outcome(job, score(job.cell))

    def close(self) -> None:
        """Nothing to stop."""


class UnshownStudy(Study):
    """A run of which people see nothing."""

    def show(self) -> None:
        """No file, and no study of Optuna's."""


@contextmanager
def open_study(directory: Path, settings: RandomSettings = SETTINGS) -> Iterator[Study]:
    """On an SQLite file, which is held as a search holds its folder."""
    space, url = SearchSpace(settings.branches), f"sqlite:///{directory}/study.db"
    sampler = create_sampler(settings.sampler, space, settings.seed, lag=LAG)
    store, task = Store(url, "run", "{}"), Segmentation(("one", "two"))
    with closing(UnshownStudy(directory, url, store, task, space, sampler, lambda head: b"")) as study:
        yield study


def searched(workers: Shuffled, directory: Path, settings: RandomSettings = SETTINGS) -> list[Row]:
    """The finished trials, without who finished them when."""
    plan = SearchPlan(known(settings.trials), load_cells(settings.compare), settings.comparison_seeds, settings.seed)
    with open_study(directory, settings) as study:
        Search(study, workers, plan, Measure("mIOU", "mean_iou")).run()
    with closing(Reader(f"sqlite:///{directory}/study.db", "run")) as reader:
        return [replace(row, finished=None) for row in reader.finished(search=True)]


def cells(rows: list[Row]) -> list[Cell]:
    return [Cell.from_json(row.cell) for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return searched(Shuffled(1), tmp_path_factory.mktemp("alone"))


def test_the_search_is_worth_comparing(alone: list[Row]) -> None:
    assert [row.key.number for row in alone] == list(range(known(SETTINGS.trials)))
    assert len({canonical_form(cell) for cell in cells(alone)}) == SETTINGS.trials
    assert 0 < sum(row.failure is not None for row in alone) < 10
    neighbours = {cell for cell in cells(alone) for cell in SearchSpace(2).neighbours(cell)}
    assert sum(cell in neighbours for cell in cells(alone)) > 5  # some are near the best, which depends on the scores


@pytest.mark.parametrize("capacity", [2, 3, 5, 8])
def test_cells_and_scores_do_not_depend_on_the_workers(alone: list[Row], capacity: int, tmp_path: Path) -> None:
    for seed in range(2):
        (tmp_path / f"{seed}").mkdir()
        assert searched(Shuffled(capacity, seed), tmp_path / f"{seed}") == alone


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("interrupt_at", [1, 2, 9, 26])
def test_an_interrupted_search_goes_on_with_any_number_of_workers(
    alone: list[Row], capacity: int, interrupt_at: int, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        searched(Shuffled(3, interrupt_at=interrupt_at), tmp_path)
    assert searched(Shuffled(capacity), tmp_path) == alone


class Mortal(Shuffled):
    """Workers that are all lost after each outcome; others start while one waits."""

    def wait(self, timeout: float | None = None) -> Any:
        if self.capacity == 0:
            assert not self._jobs
            self.capacity = 2
            return None
        outcome = super().wait(timeout)
        self.capacity = len(self._jobs)
        return outcome


def test_a_search_whose_workers_are_all_lost_goes_on_with_others(
    alone: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("it sleeps, and nobody starts others"))
    monkeypatch.setattr(search.runs.search, "time", clock)
    assert searched(Mortal(2), tmp_path) == alone


class Crowded(Shuffled):
    """The first two tries of every cell, and all of each tenth one, find a GPU full."""

    tried: Counter[Any]

    def wait(self, timeout: float | None = None) -> Outcome[ProxyResult]:
        outcome = super().wait(timeout)
        self.tried[outcome.job.key] += 1
        is_full = self.tried[outcome.job.key] < 3 or outcome.job.key in ("trial 5", "trial 15")
        return Outcome(outcome.job, failure="out of GPU memory", is_passing=True) if is_full else outcome


def test_a_cell_is_tried_again_if_the_machine_may_be_why_it_failed(alone: list[Row], tmp_path: Path) -> None:
    workers = Crowded(3)
    workers.tried = Counter()
    rows = searched(workers, tmp_path)
    assert set(workers.tried.values()) == {3}
    assert [row.key.number for row in rows if row.failure == "out of GPU memory"] == [5, 15]
    assert [row.cell for row in rows[:6]] == [row.cell for row in alone[:6]]


@pytest.mark.parametrize("sampler", [name for name in SAMPLER_NAMES if name != "paper"])
def test_other_samplers_run_with_workers(sampler: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, sampler=sampler, trials=12)
    rows = searched(Shuffled(3), tmp_path, settings)
    assert [row.key.number for row in rows] == list(range(12))


def test_equal_cells_are_evaluated_once_in_a_space_that_is_used_up(tmp_path: Path) -> None:
    settings = replace(SETTINGS, branches=1, trials=90)  # of 81 cells
    rows = searched(Shuffled(1), tmp_path, settings)
    assert len(rows) == 90
    scored = [row for row in rows if row.score is not None]
    first = {row.cell: row.key.number for row in reversed(scored)}
    for row in scored:
        assert row.duplicate_of == (None if first[row.cell] == row.key.number else first[row.cell])


# Evaluating


JOBS = [Job(i, load_cell(name), (0, i)) for i, name in enumerate(("aspp", "dpc", "psp", "dpc"))]


def measured(outcome: Outcome[ProxyResult]) -> ProxyResult:
    assert outcome.result is not None
    return replace(outcome.result, seconds=0.0, peak_memory_bytes=0)


class Raising:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def evaluate(self, *_: object) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "failure", "is_passing"),
    [
        (NotFiniteError("the loss was nan"), "the loss was nan", False),
        (torch.OutOfMemoryError("tried 3 GiB\nmore"), "out of GPU memory: tried 3 GiB", True),
    ],
)
def test_what_belongs_to_a_cell_is_a_failure(error: Exception, failure: str, is_passing: bool) -> None:
    task: Any = Raising(error)
    assert evaluate(task, JOBS[0]) == Outcome(JOBS[0], failure=failure, is_passing=is_passing)


def test_a_bug_is_not_a_failure_of_a_cell() -> None:
    task: Any = Raising(IndexError("a bug"))
    with pytest.raises(IndexError, match="a bug"):
        evaluate(task, JOBS[0])


def test_in_process_evaluates_in_order_and_tells_its_progress() -> None:
    steps: list[tuple[int, int]] = []
    workers = InProcess(create_task(), lambda job, iteration: steps.append((job.key, iteration)))
    for job in JOBS[:2]:
        workers.submit(job)
    assert [workers.wait().job for _ in range(2)] == JOBS[:2]
    assert steps == [(key, iteration) for key in (0, 1) for iteration in (1, 2, 3)]


class Tide:
    """Workers whose number changes whenever one waits; the job submitted last ends first, but not at every wait."""

    def __init__(self, capacities: list[int]) -> None:
        self._capacities = iter(capacities)
        self.capacity = next(self._capacities)
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        assert len(self._jobs) < self.capacity
        self._jobs.append(job)

    def wait(self, timeout: float | None = None) -> Outcome[str] | None:
        assert timeout is not None  # or nobody would see that there are more
        self.capacity = next(self._capacities, 1)
        return Outcome(self._jobs.pop(), "done") if self._jobs and self.capacity != 2 else None

    def close(self) -> None:
        """Nothing to stop."""


@given(capacities=st.lists(st.integers(0, 4), min_size=1, max_size=30), count=st.integers(0, 12))
def test_every_job_has_one_outcome_while_the_number_of_workers_changes(capacities: list[int], count: int) -> None:
    jobs = [Job(key, JOBS[0].cell, (0,)) for key in range(count)]
    assert sorted(outcome.job.key for outcome in outcomes(Tide(capacities), jobs)) == list(range(count))


# In turns


@every_device
@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_jobs_in_turns_give_the_same_results_as_one_after_the_other(capacity: int, device: str) -> None:
    """To the last bit, heads included, whoever else draws random numbers meanwhile; on a GPU by replayed graphs."""
    task = create_task(replace(PROXY, iterations=EAGER_ITERATIONS + 4), device)
    alone = {job.key: evaluate(task, job) for job in JOBS}

    def draw(job: Job, iteration: int) -> None:
        torch.rand(iteration)

    workers = InTurns(task, capacity, torch.device(device), draw)
    together = {outcome.job.key: outcome for outcome in outcomes(workers, JOBS)}
    assert together.keys() == alone.keys()
    for key, outcome in together.items():
        assert measured(outcome) == measured(alone[key])
        head, head_alone = outcome.head, alone[key].head
        assert head is not None
        assert head_alone is not None
        torch.testing.assert_close(head.state_dict(), head_alone.state_dict(), rtol=0, atol=0)


def parts_of(jobs: list[Job], until: int, befores: dict[Any, Outcome[Any]] | None = None) -> list[Job]:
    """The next part of each job's training, from the outcome of the one before."""
    return [job._replace(stretch=Stretch(until, befores[job.key].state if befores else None)) for job in jobs]


def assert_same_end(found: dict[Any, Outcome[ProxyResult]], expected: dict[Any, Outcome[ProxyResult]]) -> None:
    """Of trainings that are over: results, heads to the last bit, and no state."""
    assert found.keys() == expected.keys()
    for key, outcome in found.items():
        assert measured(outcome) == measured(expected[key])
        head, other = outcome.head, expected[key].head
        assert head is not None
        assert other is not None
        torch.testing.assert_close(head.state_dict(), other.state_dict(), rtol=0, atol=0)
        assert outcome.state is None


@every_device
def test_any_worker_goes_on_where_another_stood(device: str) -> None:
    """One after the other or in turns; each has a task of its own."""
    iterations = EAGER_ITERATIONS + 4

    def new_task() -> ProxyTask:
        return create_task(replace(PROXY, iterations=iterations), device)

    def in_turns(jobs: list[Job]) -> dict[Any, Outcome[ProxyResult]]:
        return {o.job.key: o for o in outcomes(InTurns(new_task(), 3, torch.device(device), lambda job, step: None), jobs)}

    def in_process(jobs: list[Job]) -> dict[Any, Outcome[ProxyResult]]:
        return {o.job.key: o for o in outcomes(InProcess(new_task(), lambda job, step: steps.append(step)), jobs)}

    steps: list[int] = []
    whole = {job.key: evaluate(new_task(), job) for job in JOBS}
    for first, second in ((in_process, in_turns), (in_turns, in_process)):
        steps.clear()
        halves = first(parts_of(JOBS, 3))
        assert all(outcome.state is not None and outcome.head is not None for outcome in halves.values())
        assert all(len(measured(outcome).loss_curve) == 3 for outcome in halves.values())
        assert_same_end(second(parts_of(JOBS, iterations, halves)), whole)
        expected = range(1, 4) if first is in_process else range(4, iterations + 1)
        assert steps == [*expected] * len(JOBS)


def test_a_part_that_fails_has_no_state() -> None:
    task = create_task(replace(PROXY, learning_rate=1e30))
    outcome = evaluate(task, JOBS[0]._replace(stretch=Stretch(2)))
    assert "try a lower learning rate" in (outcome.failure or "")
    assert outcome.state is None
    assert outcome.result is None


class Countdown:
    """A task whose evaluation lasts as many iterations as its cell has branches, and notes who worked when."""

    def __init__(self, fails: dict[int, Exception]) -> None:
        self.fails = fails
        self.worked: list[int] = []

    def evaluation(
        self, cell: Cell, seed: tuple[int, ...], stretch: Stretch | None = None
    ) -> Generator[int, None, tuple[str, None, None]]:
        for iteration in range(1, len(cell.branches) + 1):
            self.worked.append(seed[1])
            if seed[1] in self.fails and iteration == 2:
                raise self.fails[seed[1]]
            yield iteration
        return f"{seed[1]} done", None, None


def jobs_of(*lengths: int) -> list[Job]:
    branches = load_cell("aspp").branches
    return [Job(i, Cell(branches[:length]), (0, i)) for i, length in enumerate(lengths)]


def test_every_job_has_its_turn_and_the_first_to_end_is_returned() -> None:
    task: Any = Countdown({})
    followed: list[tuple[int, int]] = []
    workers = InTurns(task, 2, torch.device("cpu"), lambda job, iteration: followed.append((job.key, iteration)))
    ended = [outcome.job.key for outcome in outcomes(workers, jobs_of(3, 1, 2))]
    assert task.worked == [0, 1, 0, 0, 2, 2]
    assert ended == [1, 0, 2]
    assert followed == [(0, 1), (0, 2), (0, 3), (2, 2)]  # the oldest, in its bar


def test_a_job_that_fails_costs_no_other() -> None:
    task: Any = Countdown({0: NotFiniteError("the loss was nan"), 2: torch.OutOfMemoryError("tried 3 GiB")})
    workers = InTurns(task, 3, torch.device("cpu"), lambda job, iteration: None)
    by_key = {outcome.job.key: outcome for outcome in outcomes(workers, jobs_of(3, 3, 3, 2))}
    assert [by_key[key].failure for key in range(4)] == ["the loss was nan", None, "out of GPU memory: tried 3 GiB", None]
    assert [by_key[key].result for key in (1, 3)] == ["1 done", "3 done"]


def test_a_bug_in_a_job_is_raised() -> None:
    task: Any = Countdown({0: IndexError("a bug")})
    workers = InTurns(task, 2, torch.device("cpu"), lambda job, iteration: None)
    with pytest.raises(IndexError, match="a bug"):
        list(outcomes(workers, jobs_of(3, 3)))


def test_workers_in_turns_are_opened_for_one_gpu() -> None:
    with open_workers(create_task, WorkerSettings(), "cpu", 3, in_turns=3) as workers:
        assert isinstance(workers, InTurns)
        assert workers.capacity == 3
