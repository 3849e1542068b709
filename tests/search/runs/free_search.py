"""A search without work, for tests of faults: many small processes, or this one, and what each trial has to come to."""

import json
import time
from contextlib import closing, suppress

from reference.cell import Cell
from search.cells.history import History
from search.cells.sampler import CellSampler, PaperSampler
from search.cells.space import SearchSpace, cell_hash, load_cell
from search.interrupts import sigterm_is_ctrl_c
from search.runs.store import SearchPlan, Store, Told

SPACE = SearchSpace(2)
LEASE = 2.0  # seconds; longer than any pause of a process that is alive
NAME, IDENTITY = "a search without work", "{}"


def sampler() -> CellSampler:
    return PaperSampler(SPACE, seed=0, lag=8)


def score(cell: Cell, number: int) -> float | None:
    """The score of a cell as this trial, which follows from both, as that of a real one does; one in sixteen has none."""
    digits = f"{cell_hash(cell)}{number}"
    return None if digits[0] == "0" else int(digits[1:], 16) % 10**6 / 10**6


def expected(trials: int) -> list[tuple[int, Cell, float | None]]:
    """Number, cell and score of each trial, one after the other and without a store."""
    history, proposer, found = History(), sampler(), []
    for number in range(trials):
        cell = proposer.propose(number, history)
        history.propose(number, cell.to_json(), SPACE.canonical_form(cell).to_json())
        found.append((number, cell, of_cell := score(cell, number)))
        if of_cell is not None:
            history.finish(number, of_cell)
    return found


def search(url: str, trials: int) -> None:
    """Work on the search until nothing is left to do, as one of any number of processes."""
    with sigterm_is_ctrl_c(), suppress(KeyboardInterrupt), closing(Store(url, NAME, IDENTITY, lease=LEASE, beat=LEASE / 8)) as store:
        plan = SearchPlan(trials, {"linear": load_cell("linear")}, 2, 0)
        while not store.is_finished(plan):
            claim = store.claim(plan, SPACE, sampler())
            if claim is None:
                time.sleep(0.02)
                continue
            time.sleep(0.005)
            of_cell = score(claim.cell, claim.key.number)
            if of_cell is None:
                store.tell_failure(claim.key, "bad luck")
            else:
                head = json.dumps(claim.key).encode()
                store.tell(claim.key, Told(of_cell, 1, "{}", "[]", head))
