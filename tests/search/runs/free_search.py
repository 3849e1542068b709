"""A search whose cells cost nothing, by the real loop: for tests of faults, by many processes, and what it has to come to."""

import hashlib
import time
from contextlib import ExitStack, closing, redirect_stderr, suppress
from pathlib import Path

from sqlalchemy.exc import OperationalError

from reference.cell import Cell
from search.cells.history import History
from search.cells.sampler import CellSampler
from search.cells.samplers.evolution import EvolutionSampler
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace, cell_hash, load_cell
from search.dense_tasks import Scores
from search.dense_tasks.segmentation import Segmentation
from search.interrupts import sigterm_is_ctrl_c
from search.runs.halving import Halving, Rungs, Step
from search.runs.search import Search
from search.runs.store import SearchPlan, Store
from search.runs.study import Study
from search.runs.tables import FOUND, SEARCH, Key
from search.runs.workers import Job, Outcome
from search.tasks.proxy import CostKind, ProxyResult

SPACE = SearchSpace(2)
TASK = Segmentation(("one", "two"))
NAME = "a search that costs nothing"
LEASE = 1.0  # seconds; longer than any process rests that is alive
HALVING = Halving("asha", (1, 4, 16), 4, lag=8)
_COST = 0.002  # seconds for a cell, so that processes also end in the middle of one

Finished = dict[Key, tuple[Cell, float | None]]  # cell and score of each job; no score if it failed


class FreeWorkers:
    """Workers whose cells have a score that follows from the cell and the seed, as a real one does; one in sixteen fails.

    Where a training goes on, it must have the state that it had: one that is lost would begin anew.
    """

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout: float | None = None) -> Outcome[ProxyResult] | None:
        time.sleep(_COST)
        job = self._jobs.pop()
        until = 0 if job.stretch is None else job.stretch.until
        score = _score(job.cell, job.seed[-1], until)
        if job.stretch is not None and job.stretch.state not in (None, _state(job, _below(until))):
            return Outcome(job, failure="it was given a state of another training")
        if score is None:
            return Outcome(job, failure="bad luck")
        result = ProxyResult(Scores(score, (0.5, None)), ((1, score),), 1, multiply_adds(job.cell), 3.0, 4)
        return Outcome(job, result, state=_state(job, until))

    def close(self) -> None:
        """Nothing to stop."""


def search(
    url: str, trials: int, directory: Path, log: Path, halving: Halving | None = None, cost: CostKind | None = None
) -> None:
    """Work on the search in the database until nothing is left to do; Ctrl-C and SIGTERM end it before."""
    with (
        log.open("a", encoding="utf-8", buffering=1) as said,
        redirect_stderr(said),
        suppress(KeyboardInterrupt),
        sigterm_is_ctrl_c(),
        closing(_open(url, directory, halving, cost)) as study,
    ):
        Search(study, FreeWorkers(), plan(trials), TASK.score).run()


def plan(trials: int) -> SearchPlan:
    return SearchPlan(trials, {"linear": load_cell("linear")}, 2, 0)


def sampler(cost: CostKind | None = None) -> CellSampler:
    return PaperSampler(SPACE, seed=0, lag=8) if cost is None else EvolutionSampler(SPACE, seed=0, lag=8)


def multiply_adds(cell: Cell) -> int:
    return int(cell_hash(cell)[:4], 16)


def expected(trials: int, cost: CostKind | None = None) -> Finished:
    """What comes of the search, one trial after the other, without a store."""
    history, proposer, found = History(), sampler(cost), dict[Key, tuple[Cell, float | None]]()
    for number in range(trials):
        cell = proposer.propose(number, history)
        history.propose(number, cell.to_json(), SPACE.canonical_form(cell).to_json())
        score = _score(cell, number)
        if score is not None:
            history.finish(number, score, others=() if cost is None else (-multiply_adds(cell),))
        found[Key(SEARCH, number)] = cell, score
    best = history.proposed(-max((score, -key.number) for key, (_, score) in found.items() if score is not None)[1])
    for name, cell in {**plan(trials).compare, f"{FOUND}{best.number}": best.cell}.items():
        found |= {Key(name, seed): (cell, _score(cell, seed)) for seed in range(plan(trials).comparison_seeds)}
    return found


def expected_of_halving(trials: int, halving: Halving) -> tuple[Finished, list[tuple[int, int]]]:
    """The same where it is cut short, and its jobs in order: trial and rung."""
    history, proposer, rungs = History(), sampler(), Rungs(halving)
    cells, scores, jobs = dict[int, Cell](), dict[int, tuple[float, ...] | None](), list[tuple[int, int]]()
    while isinstance(step := rungs.next(trials), Step):
        for seen in rungs.take_seen():
            if seen.score is None:
                history.withdraw(seen.number)
            else:
                history.finish(seen.number, seen.score, seen.rung)
        number = len(cells) if step.number is None else step.number
        if step.number is None:
            cells[number] = proposer.propose(number, history)
            history.propose(number, cells[number].to_json(), SPACE.canonical_form(cells[number]).to_json())
        score = _score(cells[number], number, halving.rungs[step.rung])
        before = scores.get(number, ())
        scores[number] = None if score is None or before is None else (*before, score)
        jobs.append((number, step.rung))
        rungs.begin(number, step.rung, step.bound)
        rungs.finish(len(rungs) - 1, score)
    found: Finished = {Key(SEARCH, n): (cells[n], None if each is None else each[-1]) for n, each in scores.items()}
    best = max((len(each), each[-1], -number) for number, each in scores.items() if each is not None)
    for name, cell in {**plan(trials).compare, f"{FOUND}{-best[2]}": cells[-best[2]]}.items():
        found |= {Key(name, seed): (cell, _score(cell, seed)) for seed in range(plan(trials).comparison_seeds)}
    return found, jobs


def _open(url: str, directory: Path, halving: Halving | None, cost: CostKind | None) -> Study:
    while True:
        with ExitStack() as stack, suppress(OperationalError):  # the database is away: who starts a search would try again
            store = Store(url, NAME, "{}", halving=halving, cost_kind=cost, lease=LEASE, beat=LEASE / 10)
            stack.enter_context(closing(store))
            study = Study(directory, url, store, TASK, SPACE, sampler(cost), lambda head: b"", hold=lambda: False)
            stack.pop_all()
            return study
        time.sleep(_COST)


def _below(until: int) -> int:
    """The iterations of the rung below."""
    return HALVING.rungs[HALVING.rungs.index(until) - 1] if until > HALVING.rungs[0] else 0


def _state(job: Job, until: int) -> bytes:
    return f"{cell_hash(job.cell)} {job.seed[-1]} after {until}".encode()


def _score(cell: Cell, seed: int, until: int = 0) -> float | None:
    digits = hashlib.sha256(f"{cell_hash(cell)} {seed}{f' {until}' * bool(until)}".encode()).hexdigest()[:12]
    return None if digits.startswith("0") else int(digits, 16) / 16**12
