"""The jobs of a run in a database, for the processes that work on it (`tables.py` says what a job is, `reader.py` reads them).

Every process claims jobs, evaluates them and tells. What must not go wrong:

- *A job is finished once.* Telling changes a row that is still running, or nothing.
- *Cells do not depend on how many processes there are.* Jobs are claimed under a lock on the row of the run, so trial n is
  proposed when the cells of all trials before it are known, and once the results that its sampler may look at are there. If
  one of them does the same, its score is waited for: trained once more, with other random numbers, it would get another.
- *Where a search is cut short, nor do its rungs* (`search.runs.halving`). A trial that goes on runs again, with its result of
  the last rung in its row. A log has all its jobs in order, and samplers learn results in that order.
- *Nothing is lost with a process.* Each has a row with a counter, its heartbeat. One that stands still while that of the
  observer moves for `LEASE` seconds is taken for dead, and its jobs are claimed again. No clock decides anything, and while
  the server is away, all hearts stand still. A process that was only slow goes on, and whoever tells a job first is right:
  both results are the same, but for a latency, which is measured.
- *A connection or a server that goes away is waited for*, and what was being done is done again; each change is either there
  or not.

This module needs no PyTorch, so many small processes can use it.
"""

import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from reference.cell import Cell
from search.cells.history import History
from search.cells.space import SearchSpace
from search.errors import InputError
from search.interrupts import stop_waits
from search.runs.database import LEASE, disposed_on_error, is_server, open_engine
from search.runs.halving import Halving, Nothing, Rungs, Step
from search.runs.tables import (
    BEST_HEAD,
    COMPLETE,
    CURVES,
    FAILED,
    FOUND,
    HEADS,
    IS_TRIAL,
    JOBS,
    PROCESSES,
    RUNGS,
    RUNNING,
    RUNS,
    SEARCH,
    STATES,
    Begun,
    Key,
    begin_run,
    copies_of,
    cost_in,
    head_name,
)

KEPT_STATES = 100  # of trainings that may go on, the best of each rung; without one, a training begins anew
BEAT = 5.0  # seconds between two heartbeats
_COPYING = 1.0  # seconds of a claim in which trials are finished as copies of others
PATIENCE = 600.0  # seconds for which an absent server is waited for

_Value = TypeVar("_Value")


class Claim(NamedTuple):
    """A job that this process is to evaluate; one that another process had claimed is taken over.

    Where a search is cut short, a trial is trained up to some iterations, from the `state` that it had at its last rung, or
    without one from the beginning.
    """

    key: Key
    cell: Cell
    is_taken_over: bool = False
    until: int | None = None  # iterations
    state: bytes | None = None


@dataclass(frozen=True)
class Told:
    """What a job came to; `head` is the content of a file of the trained head, `curve` and `result` are JSON.

    With `state` its training can go on.
    """

    score: float
    multiply_adds: int
    result: str
    curve: str
    head: bytes | None = None
    state: bytes | None = None


@dataclass(frozen=True)
class SearchPlan:
    """What a search is to do: the number of trials, the known cells to compare with, and the seeds of each comparison."""

    trials: int
    compare: Mapping[str, Cell]
    comparison_seeds: int
    seed: int


class _Copied:
    """A new trial was finished with the score of another one."""


class Proposer(Protocol):
    """What proposes the cells of a search (`search.cells.sampler.CellSampler`)."""

    def visible_before(self, number: int) -> int: ...
    def propose(self, number: int, history: History) -> Cell: ...


class _Change:
    """A change of one job, under the lock of the run; it is one if its revision is asked for."""

    def __init__(self, connection: sa.Connection, revision: int) -> None:
        self.connection, self._revision, self.is_made = connection, revision, False

    @property
    def revision(self) -> int:
        self.is_made = True
        return self._revision


@dataclass
class _Watched:
    beat: int
    since: int  # heartbeat of this process


class Best(NamedTuple):
    """The best trial so far: of those on the highest rung that any has reached."""

    score: float
    number: int
    rung: int = 0

    @property
    def order(self) -> tuple[int, float, int]:
        """The best is the least; of equal ones the first trial."""
        return -self.rung, -self.score, self.number


@dataclass
class _State:
    """What this process knows of the jobs, up to a revision."""

    revision: int = 0
    history: History = field(default_factory=History)
    originals: dict[str, int] = field(default_factory=dict)  # form of a cell -> the trial that has its score, or will
    scored: dict[int, Best] = field(default_factory=dict)  # by trial, without copies, where a search is cut short
    best: Best | None = None
    cells: dict[Key, str] = field(default_factory=dict)  # of jobs that run
    owners: dict[Key, str] = field(default_factory=dict)  # of jobs that run
    compared: dict[Key, str] = field(default_factory=dict)  # comparisons that are begun or finished: their cells as JSON
    finished: set[int] = field(default_factory=set)  # numbers of finished trials, from `finished_below` on
    finished_below: int = 0  # all trials below it are finished
    failures: set[int] = field(default_factory=set)  # numbers of trials
    next: int = 0  # number of the next trial: the lowest without a cell
    rungs: Rungs | None = None  # if the search is cut short
    rungs_revision: int = 0  # up to which they are known
    rung_of: dict[int, int] = field(default_factory=dict)  # the highest one that a trial has begun, above the lowest

    @property
    def num_finished(self) -> int:
        return self.finished_below + len(self.finished)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def key_of(self, name: str, number: int) -> Key:
        """The last job of this row."""
        return Key(name, number, self.rung_of.get(number, 0) if name == SEARCH else 0)


class Store:
    """The jobs of the run `name`. One process of an SQLite file must keep others out (`search.folder.Folder.locked`).

    `identity` is JSON: what all results of the run depend on. A run that is begun has the jobs of `begun`, if it is given.
    `halving` says how the search is cut short, `cost_kind` which value of a result is to be small beside a great score.
    Raises InputError for a run of another version, and SQLAlchemyError if the database cannot be used.
    """

    def __init__(
        self,
        url: str,
        name: str,
        identity: str,
        begun: Begun | None = None,
        *,
        halving: Halving | None = None,
        cost_kind: str | None = None,
        lease: float = LEASE,
        beat: float = BEAT,
    ) -> None:
        self.name, self.cost_kind = name, cost_kind
        self.is_server = is_server(url)
        self.id = uuid.uuid4().hex
        self.state = _State(rungs=None if halving is None else Rungs(halving))
        self.engine = open_engine(url, lease)
        self._beat, self._beats_of_lease = beat, lease / beat
        self._mine: set[Key] = set()  # jobs that this process knows to be its own
        self._watched: dict[str, _Watched] = {}
        self._beats = 0  # of this process
        self._closing = threading.Event()
        with disposed_on_error(self.engine):
            self._run, self.identity = begin_run(self.engine, name, identity, begun or Begun())
        if not self.is_server:
            self._delete_processes()  # none is alive
        self.patiently(lambda: self._register(0))
        self._heart = threading.Thread(target=self._keep_beating, daemon=True, name="heartbeat")
        if self.is_server:
            self._heart.start()

    def close(self) -> None:
        """Give back the jobs that are not finished: others claim them at once."""
        self._closing.set()
        if self._heart.is_alive():
            self._heart.join()
        with suppress(DBAPIError):  # if the server is away, others will take this process for dead
            self._delete_processes(self.id)
        self.engine.dispose()

    # Claiming and telling

    def sync(self) -> _State:
        """Read what other processes have done."""

        def read() -> _State:
            with self.engine.connect() as connection:
                self._sync(connection)
            return self.state

        return self.patiently(read)

    def claim(self, plan: SearchPlan, space: SearchSpace, sampler: Proposer) -> Claim | None:
        """The next job: one of a process that died, a known cell, a new trial, the best cell again. None: nothing now.

        A new trial whose cell does the same as an earlier one is finished with the score of that, and the next is claimed.
        """
        until = time.monotonic() + _COPYING  # in a space that is used up there may be thousands of copies
        while True:
            claim = self.patiently(lambda: self._claim(plan, space, sampler))
            if isinstance(claim, _Copied):
                if time.monotonic() > until:
                    return None
                continue
            if claim is not None:
                self._mine.add(claim.key)  # only now: if no answer came to a commit, its job is an orphan
            return claim and self._with_stretch(claim)

    def tell(self, key: Key, told: Told) -> bool:
        """Finish a job with a score. False if another process has finished it already; nothing is changed then.

        The head is kept if it is of the best trial so far, or of a compared cell with seed 0.
        """
        values = {"score": told.score, "multiply_adds": told.multiply_adds, "result": told.result}
        curve = {"curve": told.curve}

        def tell() -> bool:
            with self._locked() as change:
                before = self.state.best
                if not self._finish(change, key, {"state": COMPLETE, **values}):
                    return False
                if key.rung > 0:
                    which = (CURVES.c.run == self._run) & (CURVES.c.name == key.name) & (CURVES.c.number == key.number)
                    change.connection.execute(CURVES.delete().where(which))
                change.connection.execute(CURVES.insert().values(run=self._run, **key.row, **curve))
                self._keep_state(change.connection, key, told)
                name = _head_to_keep(key, told.score, before)
                if name is not None and told.head is not None:
                    which = (HEADS.c.run == self._run) & (HEADS.c.name == name)
                    change.connection.execute(HEADS.delete().where(which))
                    change.connection.execute(
                        HEADS.insert().values(run=self._run, name=name, revision=change.revision, content=told.head)
                    )
            return True

        return self._told(key, tell)

    def tell_failure(self, key: Key, reason: str) -> bool:
        """Finish a job without a score, for this reason. False if another process has finished it already."""

        def tell() -> bool:
            with self._locked() as change:
                nothing = dict.fromkeys(("score", "multiply_adds", "result"))  # it may have had some, of a lower rung
                if not self._finish(change, key, {"state": FAILED, "failure": reason, **nothing}):
                    return False
                if key.rung > 0:
                    state = (STATES.c.run == self._run) & (STATES.c.number == key.number)
                    change.connection.execute(STATES.delete().where(state))
                return True

        return self._told(key, tell)

    def keeps_head(self, key: Key, score: float) -> bool:
        """Whether `tell` will keep the head of a job with this score, as far as this process knows."""
        return _head_to_keep(key, score, self.state.best) is not None

    def keeps_state(self, key: Key, score: float) -> bool:
        """Whether a trial with this score may go on, as far as this process knows, so that `tell` will keep its state."""
        rungs = self.state.rungs
        if rungs is None or key.name != SEARCH or key.rung == rungs.halving.top:
            return False
        return rungs.place(key.rung, score) < self._kept_states(rungs)

    def new_heads(self, after: int) -> list[tuple[str, bytes, int]]:
        """Heads that were kept after a revision: name, content, and the revision of each."""

        def read() -> list[tuple[str, bytes, int]]:
            of_run = (HEADS.c.run == self._run) & (HEADS.c.revision > after)
            query = sa.select(HEADS.c.name, HEADS.c.content, HEADS.c.revision).where(of_run).order_by(HEADS.c.revision)
            with self.engine.connect() as connection:
                return [(row.name, row.content, row.revision) for row in connection.execute(query)]

        return self.patiently(read)

    def register(self, workers: int) -> None:
        """Say how many jobs this process evaluates at a time."""
        self.patiently(lambda: self._register(workers))

    def is_finished(self, plan: SearchPlan) -> bool:
        """Whether nothing is left to do, as of the last `sync` or `claim`, neither here nor elsewhere."""
        state = self.state
        all_tried = state.finished_below >= plan.trials
        is_cut = state.rungs is None or state.rungs.next(plan.trials) is Nothing.MORE
        return all_tried and is_cut and not self._at_work(plan) and next(self._comparisons(plan), None) is None

    def elsewhere(self) -> tuple[int, int]:
        """How many jobs other processes evaluate, and how many these are, as of the last `sync` or `claim`."""
        others = [owner for owner in self.state.owners.values() if owner != self.id]
        return len(others), len(set(others))

    def _told(self, key: Key, tell: Callable[[], bool]) -> bool:
        is_first = self.patiently(tell)
        self._mine.discard(key)
        self.sync()
        return is_first

    def _claim(self, plan: SearchPlan, space: SearchSpace, sampler: Proposer) -> "Claim | _Copied | None":
        with self._locked() as change:  # which changes one job, as each revision
            state = self.state
            if orphan := self._orphan(change.connection, plan):
                values = {"owner": self.id, "revision": change.revision}
                change.connection.execute(JOBS.update().where(self._is(orphan)).values(values))
                return Claim(orphan, Cell.from_json(state.cells[orphan]), state.owners[orphan] != self.id)
            known = next(self._comparisons(plan, with_best=False), None)
            if known is not None:
                return self._start(change, *known, form="")
            step = self._next_step(plan, sampler)
            if isinstance(step, Step):
                return self._begin_trial(change, step, space, sampler) if step.number is None else self._go_on(change, step)
            again = next(self._comparisons(plan), None) if step is Nothing.MORE else None
            return None if again is None else self._start(change, *again, form="")

    def _next_step(self, plan: SearchPlan, sampler: Proposer) -> Step | Nothing:
        """What the search does next; the history then has all that this may depend on."""
        state = self.state
        if state.rungs is None:
            if state.next < plan.trials and state.finished_below >= sampler.visible_before(state.next):
                return Step(None, 0, 0)
            return Nothing.MORE if state.finished_below >= plan.trials else Nothing.YET
        step = state.rungs.next(plan.trials)
        state.rungs.show_seen(state.history)
        return step

    def _begin_trial(self, change: "_Change", step: Step, space: SearchSpace, sampler: Proposer) -> "Claim | _Copied | None":
        """Begin the next trial, or finish it as a copy; None while the one that it is a copy of has no score yet."""
        number, history = self.state.next, self.state.history
        cell = sampler.propose(number, history)
        form = space.canonical_form(cell).to_json()
        original = self.state.originals.get(form)
        if original is None:
            self._log(change, step, number, state=RUNNING)
            return self._start(change, Key(SEARCH, number), cell, form)
        if Key(SEARCH, original) in self.state.owners:
            return None
        self._log(change, step, number, state=COMPLETE, copy_of=original)
        self._copy(change, number, cell, form, original)
        return _Copied()

    def _go_on(self, change: "_Change", step: Step) -> Claim:
        """A trial goes on to the next rung."""
        assert step.number is not None
        self._log(change, step, step.number, state=RUNNING)
        key = Key(SEARCH, step.number, step.rung)
        values = {"state": RUNNING, "owner": self.id, "revision": change.revision, "started": time.time()}
        change.connection.execute(JOBS.update().where(self._is(key)).values(values))
        return Claim(key, self.state.history.proposed(step.number).cell)

    def _log(self, change: "_Change", step: Step, number: int, **values: Any) -> None:
        if self.state.rungs is not None:
            row = {"run": self._run, "job": len(self.state.rungs), "number": number, "rung": step.rung, "bound": step.bound}
            change.connection.execute(RUNGS.insert().values(**row, revision=change.revision, **values))

    def _with_stretch(self, claim: Claim) -> Claim:
        """With the part of the training that a trial of a search that is cut short is to do."""
        if self.state.rungs is None or claim.key.name != SEARCH:
            return claim
        key, state = claim.key, None
        if key.rung > 0:
            which = (STATES.c.run == self._run) & (STATES.c.number == key.number) & (STATES.c.rung == key.rung - 1)

            def read() -> bytes | None:
                with self.engine.connect() as connection:
                    content: bytes | None = connection.execute(sa.select(STATES.c.content).where(which)).scalar()
                return content

            state = self.patiently(read)
        return claim._replace(until=self.state.rungs.halving.rungs[key.rung], state=state)

    def _kept_states(self, rungs: Rungs) -> int:
        """How many states of a rung are kept: as many as wait for their results to count, at least."""
        return max(KEPT_STATES, rungs.halving.lag)

    def _keep_state(self, connection: sa.Connection, key: Key, told: Told) -> None:
        """Replace the state of a trial by this one, and forget those of the rung that are not among the best."""
        if self.state.rungs is None or key.name != SEARCH:
            return
        of_run = STATES.c.run == self._run
        connection.execute(STATES.delete().where(of_run & (STATES.c.number == key.number)))
        if told.state is not None:
            row = {"run": self._run, "number": key.number, "rung": key.rung, "score": told.score, "content": told.state}
            connection.execute(STATES.insert().values(row))
            of_rung = of_run & (STATES.c.rung == key.rung)
            order = STATES.c.score.desc(), STATES.c.number
            kept = self._kept_states(self.state.rungs)
            worse = connection.execute(sa.select(STATES.c.number).where(of_rung).order_by(*order).offset(kept))
            connection.execute(STATES.delete().where(of_rung & STATES.c.number.in_(worse.scalars().all())))

    def _comparisons(self, plan: SearchPlan, *, with_best: bool = True) -> Iterator[tuple[Key, Cell]]:
        """Those that are not begun: of the known cells, and once all trials are finished, of the best.

        Raises InputError for a known cell that was another one before.
        """
        cells = dict(plan.compare)
        if with_best and self.state.best is not None:
            number = self.state.best.number
            cells[f"{FOUND}{number}"] = self.state.history.proposed(number).cell
        for name, cell in cells.items():
            for seed in range(plan.comparison_seeds):
                before = self.state.compared.get(Key(name, seed))
                if before is None:
                    yield Key(name, seed), cell
                elif name in plan.compare and before != cell.to_json():
                    raise InputError(f"`compare` {name} was another cell when this run compared it: rename the file")

    def _start(self, change: "_Change", key: Key, cell: Cell, form: str) -> Claim:
        self._insert(change, key, cell, form, state=RUNNING)
        return Claim(key, cell)

    def _copy(self, change: "_Change", number: int, cell: Cell, form: str, original: int) -> None:
        """Finish a new trial with the result of another one."""
        columns = JOBS.c.score, JOBS.c.multiply_adds, JOBS.c.result, JOBS.c.failure
        same = change.connection.execute(sa.select(*columns).where(self._is(Key(SEARCH, original)))).one()._asdict()
        state = FAILED if same["result"] is None else COMPLETE  # it may have failed on a later rung
        same |= {"state": state, "finished": time.time(), "duplicate_of": original}
        self._insert(change, Key(SEARCH, number), cell, form, **same)

    def _insert(self, change: "_Change", key: Key, cell: Cell, form: str, **values: Any) -> None:
        row = {"run": self._run, **key.row, "revision": change.revision, "owner": self.id, "started": time.time()}
        change.connection.execute(JOBS.insert().values(**row, cell=cell.to_json(), form=form, **values))

    def _finish(self, change: "_Change", key: Key, values: dict[str, Any]) -> bool:
        if key != self.state.key_of(key.name, key.number):  # others have finished it, and it has gone on since
            return False
        values = {**values, "revision": change.revision}
        ended = {**values, "owner": self.id, "finished": time.time()}
        is_running = self._is(key) & (JOBS.c.state == RUNNING)
        if change.connection.execute(JOBS.update().where(is_running).values(ended)).rowcount != 1:
            return False
        if self.state.rungs is not None and key.name == SEARCH:
            job = (RUNGS.c.run == self._run) & (RUNGS.c.number == key.number) & (RUNGS.c.rung == key.rung)
            logged = {name: values.get(name) for name in ("state", "score", "revision")}
            change.connection.execute(RUNGS.update().where(job).values(logged))
        if key.rung > 0:
            copies = change.connection.execute(copies_of(self._run, [key.number])).scalars().all()
            of_them = (JOBS.c.run == self._run) & IS_TRIAL & JOBS.c.number.in_(copies)
            change.connection.execute(JOBS.update().where(of_them).values(values))
        return True

    def _is(self, key: Key) -> sa.ColumnElement[bool]:
        return (JOBS.c.run == self._run) & (JOBS.c.name == key.name) & (JOBS.c.number == key.number)

    # What others do

    def _at_work(self, plan: SearchPlan) -> dict[Key, str]:
        """The jobs of the plan that run, and their processes: others may have been told to try more trials.

        With early stopping, these count as well: the next job follows from all.
        """
        needs_all = self.state.rungs is not None
        owners = self.state.owners.items()
        return {key: owner for key, owner in owners if needs_all or key.name != SEARCH or key.number < plan.trials}

    def _orphan(self, connection: sa.Connection, plan: SearchPlan) -> Key | None:
        """A job that nobody evaluates: of a process that is gone, or one whose claim this process never got to know."""
        owners = self._at_work(plan)
        others = {owner for owner in owners.values() if owner != self.id}
        alive = self._alive(connection) if others else set()
        orphans = [key for key, owner in owners.items() if owner not in alive and key not in self._mine]
        return min(orphans, default=None)

    def _alive(self, connection: sa.Connection) -> set[str]:
        """The other processes whose counter has moved while ours did for the lease. Those that are not are forgotten."""
        now = self._beats
        query = sa.select(PROCESSES.c.id, PROCESSES.c.beat).where(PROCESSES.c.run == self._run)
        beats = {row.id: row.beat for row in connection.execute(query)}
        self._watched = {
            owner: seen if (seen := self._watched.get(owner)) and seen.beat == beat else _Watched(beat, now)
            for owner, beat in beats.items()
        }
        for owner, seen in list(self._watched.items()):
            if now - seen.since >= self._beats_of_lease and owner != self.id:
                connection.execute(PROCESSES.delete().where((PROCESSES.c.run == self._run) & (PROCESSES.c.id == owner)))
                del self._watched[owner]
        return self._watched.keys() - {self.id}

    def _sync(self, connection: sa.Connection) -> None:
        names = ["name", "number", "state", "revision", "owner", "score", "duplicate_of", "cell", "form"]
        columns = [JOBS.c[name] for name in names + ["result"] * (self.cost_kind is not None)]
        changed = (JOBS.c.run == self._run) & (JOBS.c.revision > self.state.revision)
        query = sa.select(*columns).where(changed).order_by(JOBS.c.revision, JOBS.c.number)
        rows = connection.execute(query).all() if self.state.rungs is not None else connection.execute(query)
        if self.state.rungs is not None:  # read after the rows, so that it has all that they have
            self._sync_rungs(connection, self.state.rungs)
        for row in rows:
            self._apply(row)

    def _sync_rungs(self, connection: sa.Connection, rungs: Rungs) -> None:
        state = self.state
        changed = (RUNGS.c.run == self._run) & (RUNGS.c.revision > state.rungs_revision)
        for row in connection.execute(sa.select(RUNGS).where(changed).order_by(RUNGS.c.job)):
            state.rungs_revision = max(state.rungs_revision, row.revision)
            if row.job == len(rungs):
                rungs.begin(row.number, row.rung, row.bound)
                if row.rung > 0:
                    state.rung_of[row.number] = row.rung
            if row.state != RUNNING:
                rungs.finish(row.job, row.score, row.copy_of)
            if row.score is not None:
                state.scored[row.number] = Best(row.score, row.number, row.rung)

    def _apply(self, row: Any) -> None:
        state, key = self.state, self.state.key_of(row.name, row.number)
        state.revision = max(state.revision, row.revision)
        for rung in range(key.rung + 1):
            state.owners.pop(key._replace(rung=rung), None)
            state.cells.pop(key._replace(rung=rung), None)
        if row.state == RUNNING:
            state.owners[key], state.cells[key] = row.owner, row.cell
        if key.name != SEARCH:
            state.compared[key] = row.cell
            return
        state.history.propose(key.number, row.cell, row.form)
        while state.next in state.history:  # runs of earlier versions may lack a number
            state.next += 1
        if row.duplicate_of is None:
            state.originals.setdefault(row.form, key.number)
        if row.state == RUNNING and row.score is None:
            return
        if row.state == FAILED:
            self._apply_failure(key, row.form)
        elif state.rungs is None:
            others = () if self.cost_kind is None else (-cost_in(row.result, self.cost_kind),)
            state.history.finish(key.number, row.score, others=others)
            state.best = _better(state.best, Best(row.score, key.number))
        elif row.duplicate_of is None:
            state.best = _better(state.best, state.scored[key.number])
        if key.number >= state.finished_below:
            state.finished.add(key.number)
        while state.finished_below in state.finished:
            state.finished.remove(state.finished_below)
            state.finished_below += 1

    def _apply_failure(self, key: Key, form: str) -> None:
        state = self.state
        state.failures.add(key.number)
        if key.rung == 0 and state.originals.get(form) == key.number:
            del state.originals[form]  # the next one of this form is tried
        if state.scored.pop(key.number, None) is not None and state.best is not None and state.best.number == key.number:
            state.best = min(state.scored.values(), key=lambda best: best.order, default=None)

    # The database

    @contextmanager
    def _locked(self) -> Iterator["_Change"]:
        """A transaction that no other process of the run can meet, with all that they did known."""
        with self.engine.execution_options(immediate=True).begin() as connection:
            query = sa.select(RUNS.c.revision).where(RUNS.c.id == self._run).with_for_update()
            before = connection.execute(query).scalar_one()
            self._sync(connection)
            change = _Change(connection, before + 1)
            yield change
            if change.is_made:
                connection.execute(RUNS.update().where(RUNS.c.id == self._run).values(revision=before + 1))

    def patiently(self, work: Callable[[], _Value]) -> _Value:
        """Do this work, and if the server goes away meanwhile, wait and do it again."""
        start, pause, has_told = time.monotonic(), 0.1, False
        while True:
            try:
                done = work()
                if has_told:
                    print("the database answers again", file=sys.stderr)
                return done
            except DBAPIError as error:
                is_away = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
                if not is_away or not self.is_server or time.monotonic() - start > PATIENCE or self._closing.is_set():
                    raise
                if stop_waits():
                    raise KeyboardInterrupt from error
                if pause > 3 and not has_told:
                    has_told = True
                    reason = str(error.orig).strip().splitlines()[0]
                    what = f"it is waited for, {PATIENCE / 60:.0f} minutes at most"
                    print(f"the database does not answer ({reason}): {what}", file=sys.stderr)
                _sleep(pause)
                pause = min(2 * pause, 10.0)

    def _register(self, workers: int) -> None:
        who = {"host": platform.node(), "pid": os.getpid(), "workers": workers}
        self._workers = workers
        with suppress(IntegrityError), self.engine.begin() as connection:  # heart and main thread may both insert it
            mine = (PROCESSES.c.run == self._run) & (PROCESSES.c.id == self.id)
            if not connection.execute(PROCESSES.update().where(mine).values(who)).rowcount:
                row = {"run": self._run, "id": self.id, "beat": 0, "started": time.time()}
                connection.execute(PROCESSES.insert().values(row | who))

    def _keep_beating(self) -> None:
        mine = (PROCESSES.c.run == self._run) & (PROCESSES.c.id == self.id)
        while not self._closing.wait(self._beat):
            try:
                with self.engine.begin() as connection:
                    beat = PROCESSES.update().where(mine).values(beat=PROCESSES.c.beat + 1)
                    is_there = connection.execute(beat).rowcount
                if not is_there:  # others took it for dead
                    self._register(self._workers)
                self._beats += 1
            except DBAPIError:
                continue  # the server is away: the process that is to claim or tell waits for it

    def _delete_processes(self, process: str | None = None) -> None:
        which = PROCESSES.c.run == self._run
        with self.engine.begin() as connection:
            connection.execute(PROCESSES.delete().where(which if process is None else which & (PROCESSES.c.id == process)))


def _sleep(seconds: float) -> None:
    """Wait for so long, or until Ctrl-C is pressed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop_waits():
        time.sleep(0.1)


def _better(one: Best | None, other: Best) -> Best:
    return other if one is None or other.order < one.order else one


def _head_to_keep(key: Key, score: float, best: Best | None) -> str | None:
    """The name under which the head of this job is kept; None if it is not."""
    if key.name != SEARCH:
        return head_name(key.name) if key.number == 0 else None
    told = Best(score, key.number, key.rung)
    return BEST_HEAD if _better(best, told) is told else None
