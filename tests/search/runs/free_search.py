"""A search whose cells cost nothing, by the real loop: for tests of faults, by many processes, and what it has to come to."""

import hashlib
import time
from contextlib import ExitStack, closing, redirect_stderr, suppress
from pathlib import Path

from sqlalchemy.exc import OperationalError

from reference.cell import Cell
from search.cells.history import History
from search.cells.sampler import CellSampler
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace, cell_hash, load_cell
from search.dense_tasks import Scores
from search.dense_tasks.segmentation import Segmentation
from search.interrupts import sigterm_is_ctrl_c
from search.runs.search import Search
from search.runs.store import FOUND, SEARCH, Key, SearchPlan, Store
from search.runs.study import Study
from search.runs.workers import Job, Outcome
from search.tasks.proxy import ProxyResult

SPACE = SearchSpace(2)
TASK = Segmentation(("one", "two"))
NAME = "a search that costs nothing"
LEASE = 1.0  # seconds; longer than any process rests that is alive
_COST = 0.002  # seconds for a cell, so that processes also end in the middle of one

Finished = dict[Key, tuple[Cell, float | None]]  # cell and score of each job; no score if it failed


class FreeWorkers:
    """Workers whose cells have a score that follows from the cell and the seed, as a real one does; one in sixteen fails."""

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout: float | None = None) -> Outcome[ProxyResult] | None:
        time.sleep(_COST)
        job = self._jobs.pop()
        score = _score(job.cell, job.seed[-1])
        if score is None:
            return Outcome(job, failure="bad luck")
        return Outcome(job, ProxyResult(Scores(score, (0.5, None)), ((1, score),), 1, 2, 3.0, 4))

    def close(self) -> None:
        """Nothing to stop."""


def search(url: str, trials: int, directory: Path, log: Path) -> None:
    """Work on the search in the database until nothing is left to do; Ctrl-C and SIGTERM end it before."""
    with (
        log.open("a", encoding="utf-8", buffering=1) as said,
        redirect_stderr(said),
        sigterm_is_ctrl_c(),
        suppress(KeyboardInterrupt),
        closing(_open(url, directory)) as study,
    ):
        Search(study, FreeWorkers(), plan(trials), TASK.score).run()


def plan(trials: int) -> SearchPlan:
    return SearchPlan(trials, {"linear": load_cell("linear")}, 2, 0)


def sampler() -> CellSampler:
    return PaperSampler(SPACE, seed=0, lag=8)


def expected(trials: int) -> Finished:
    """What comes of the search, one trial after the other, without a store."""
    history, proposer, found = History(), sampler(), dict[Key, tuple[Cell, float | None]]()
    for number in range(trials):
        cell = proposer.propose(number, history)
        history.propose(number, cell.to_json(), SPACE.canonical_form(cell).to_json())
        score = _score(cell, number)
        if score is not None:
            history.finish(number, score)
        found[Key(SEARCH, number)] = cell, score
    best = next(history.best(trials))
    for name, cell in {**plan(trials).compare, f"{FOUND}{best.number}": best.cell}.items():
        found |= {Key(name, seed): (cell, _score(cell, seed)) for seed in range(plan(trials).comparison_seeds)}
    return found


def _open(url: str, directory: Path) -> Study:
    while True:
        with ExitStack() as stack, suppress(OperationalError):  # the database is away: who starts a search would try again
            store = stack.enter_context(closing(Store(url, NAME, "{}", lease=LEASE, beat=LEASE / 10)))
            study = Study(directory, url, store, TASK, SPACE, sampler(), lambda head: b"", hold=lambda: False)
            stack.pop_all()
            return study
        time.sleep(_COST)


def _score(cell: Cell, seed: int) -> float | None:
    digits = hashlib.sha256(f"{cell_hash(cell)} {seed}".encode()).hexdigest()[:12]
    return None if digits.startswith("0") else int(digits, 16) / 16**12
