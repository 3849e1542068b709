"""The jobs of a run in a database: a file of SQLite, which one process uses, or a server, such as PostgreSQL, for any number.

A job is a trial of the search, or a comparison: a known cell, or the best one again, with one seed. Its row says what it came
to, and what people and samplers look for is in columns of its own, so that no question reads what it does not ask for:
results are read for reports alone, loss curves of what is drawn.

Why not Optuna's own tables: there a trial is some thirty rows, each of its parameters and attributes is a transaction, and
an ask looks at all trials; a lost trial comes back under another number, and so with another seed. So Optuna's studies are
written from here (`search.runs.mirror`), for people, and a search never reads them.

Every process claims jobs, evaluates them and tells. What must not go wrong:

- *A job is finished once.* Telling changes a row that is still running, or nothing.
- *Cells do not depend on how many processes there are.* Jobs are claimed under a lock on the row of the run, so trial n is
  proposed when the cells of all trials before it are known, and once the results that its sampler may look at are there. If
  one of them does the same, its score is waited for: trained once more, with other random numbers, it would get another.
- *Nothing is lost with a process.* Each has a row with a counter, its heartbeat. One that stands still while that of the
  observer moves for `LEASE` seconds is taken for dead, and its jobs are claimed again. No clock decides anything, and while
  the server is away, all hearts stand still. A process that was only slow goes on, and whoever tells a job first is right:
  both results are the same.
- *A connection or a server that goes away is waited for*, and what was being done is done again; each change is either there
  or not.

This module needs no PyTorch, so many small processes can use it.
"""

import json
import os
import platform
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError

from reference.cell import Cell
from search.cells.history import History
from search.cells.space import SearchSpace
from search.errors import InputError
from search.interrupts import stop_waits

SCHEMA = 1  # version of the tables
SEARCH = ""  # the name of the search's trials; comparisons have that of their cell
FOUND = "trial "  # before the number of a trial: the name of the search's best cell among the compared ones
BEST_HEAD = "best"  # name under which a run keeps the head of its best cell
BEAT, LEASE = 5.0, 60.0  # seconds between two heartbeats; without one for so long, a process is taken for dead
_COPYING = 1.0  # seconds of a claim in which trials are finished as copies of others
PATIENCE = 600.0  # seconds for which an absent server is waited for
_LIBPQ = ("psycopg", "psycopg2")  # drivers that are told by libpq's words when a connection is lost

RUNNING, COMPLETE, FAILED = "running", "complete", "failed"

_tables = sa.MetaData()
_runs = sa.Table(
    "dpc_runs",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("schema", sa.Integer, nullable=False),
    sa.Column("identity", sa.Text, nullable=False),  # JSON
    sa.Column("revision", sa.BigInteger, nullable=False),  # of the last change of a job; changes are one after the other
)
_jobs = sa.Table(
    "dpc_jobs",
    _tables,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # of the trial, or the comparison's seed
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),  # of the run, when this row was changed
    sa.Column("owner", sa.String(40), nullable=False),  # the process that evaluates it, or did
    sa.Column("score", sa.Float),
    sa.Column("multiply_adds", sa.BigInteger),
    sa.Column("duplicate_of", sa.Integer),
    sa.Column("started", sa.Float, nullable=False),  # seconds since 1970, for people
    sa.Column("finished", sa.Float),
    sa.Column("cell", sa.Text, nullable=False),  # JSON
    sa.Column("form", sa.Text, nullable=False),  # JSON of the canonical form in the space
    sa.Column("failure", sa.Text),
    sa.Column("result", sa.Text),  # JSON
    sa.Index("dpc_jobs_by_revision", "run", "revision"),
)
_curves = sa.Table(
    "dpc_curves",  # beside the jobs, because nobody reads them all
    _tables,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("curve", sa.Text, nullable=False),  # JSON
)
_heads = sa.Table(
    "dpc_heads",
    _tables,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),  # a safetensors file
)
_mirrors = sa.Table("dpc_mirrors", _tables, sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True))  # to lock
_processes = sa.Table(
    "dpc_processes",
    _tables,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("workers", sa.Integer, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("started", sa.Float, nullable=False),  # seconds since 1970, for people
)

_is_trial, _is_comparison = _jobs.c.name == SEARCH, _jobs.c.name > SEARCH  # for ">" an index knows where they begin
_Value = TypeVar("_Value")


class Key(NamedTuple):
    """Which job: `name` is `SEARCH` and `number` the trial's, or the name of a compared cell and the seed."""

    name: str
    number: int


class Claim(NamedTuple):
    """A job that this process is to evaluate; one that another process had claimed is taken over."""

    key: Key
    cell: Cell
    is_taken_over: bool = False


@dataclass(frozen=True)
class Told:
    """What a job came to; `head` is the content of a file of the trained head, `curve` and `result` are JSON."""

    score: float
    multiply_adds: int
    result: str
    curve: str
    head: bytes | None = None


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


@dataclass(frozen=True)
class Process:
    """A process that works on a run."""

    id: str
    host: str
    pid: int
    workers: int
    started: float  # seconds since 1970
    jobs: int  # that it is evaluating


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


@dataclass
class _State:
    """What this process knows of the jobs, up to a revision."""

    revision: int = 0
    history: History = field(default_factory=History)
    originals: dict[str, int] = field(default_factory=dict)  # form of a cell -> the trial that has its score, or will
    best: tuple[float, int] | None = None  # score and number of the best trial; of equal ones the first
    cells: dict[Key, str] = field(default_factory=dict)  # of jobs that run
    owners: dict[Key, str] = field(default_factory=dict)  # of jobs that run
    compared: dict[Key, str] = field(default_factory=dict)  # comparisons that are begun or finished: their cells as JSON
    finished: set[int] = field(default_factory=set)  # numbers of finished trials, from `finished_below` on
    finished_below: int = 0  # all trials below it are finished
    failed: int = 0
    next: int = 0  # number of the next trial: the lowest without a cell

    @property
    def num_finished(self) -> int:
        return self.finished_below + len(self.finished)


class Store:
    """The jobs of the run `name`. One process of an SQLite file must keep others out (`search.folder.Folder.locked`).

    `identity` is JSON: what all results of the run depend on. A run that is begun has the jobs of `begun`, if it is given.
    Raises InputError for a run of another version, and SQLAlchemyError if the database cannot be used.
    """

    def __init__(
        self,
        url: str,
        name: str,
        identity: str,
        begun: "Begun | None" = None,
        *,
        lease: float = LEASE,
        beat: float = BEAT,
    ) -> None:
        self.name = name
        self.is_server = is_server(url)
        self.id = uuid.uuid4().hex
        self.state = _State()
        self.engine = _engine(url, lease)
        self._beat, self._beats_of_lease = beat, lease / beat
        self._mine: set[Key] = set()  # jobs that this process knows to be its own
        self._watched: dict[str, _Watched] = {}
        self._beats = 0  # of this process
        self._closing = threading.Event()
        with _disposed_on_error(self.engine):
            self._run, self.identity = _begin(self.engine, name, identity, begun or Begun())
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
            return claim

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
                change.connection.execute(_curves.insert().values(run=self._run, **key._asdict(), **curve))
                name = _head_to_keep(key, told.score, before)
                if name is not None and told.head is not None:
                    which = (_heads.c.run == self._run) & (_heads.c.name == name)
                    change.connection.execute(_heads.delete().where(which))
                    change.connection.execute(
                        _heads.insert().values(run=self._run, name=name, revision=change.revision, content=told.head)
                    )
            return True

        return self._told(key, tell)

    def tell_failure(self, key: Key, reason: str) -> bool:
        """Finish a job without a score, for this reason. False if another process has finished it already."""

        def tell() -> bool:
            with self._locked() as change:
                return self._finish(change, key, {"state": FAILED, "failure": reason})

        return self._told(key, tell)

    def keeps_head(self, key: Key, score: float) -> bool:
        """Whether `tell` will keep the head of a job with this score, as far as this process knows."""
        return _head_to_keep(key, score, self.state.best) is not None

    def new_heads(self, after: int) -> list[tuple[str, bytes, int]]:
        """Heads that were kept after a revision: name, content, and the revision of each."""

        def read() -> list[tuple[str, bytes, int]]:
            of_run = (_heads.c.run == self._run) & (_heads.c.revision > after)
            query = sa.select(_heads.c.name, _heads.c.content, _heads.c.revision).where(of_run).order_by(_heads.c.revision)
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
        return all_tried and not self._at_work(plan) and next(self._comparisons(plan), None) is None

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
                change.connection.execute(_jobs.update().where(self._is(orphan)).values(values))
                return Claim(orphan, Cell.from_json(state.cells[orphan]), state.owners[orphan] != self.id)
            known = next(self._comparisons(plan, with_best=False), None)
            if known is not None:
                return self._start(change, *known, form="")
            number = state.next
            if number < plan.trials and state.finished_below >= sampler.visible_before(number):
                cell = sampler.propose(number, state.history)
                form = space.canonical_form(cell).to_json()
                original = state.originals.get(form)
                if original is None:
                    return self._start(change, Key(SEARCH, number), cell, form)
                if Key(SEARCH, original) in state.owners:
                    return None
                self._copy(change, number, cell, form, original)
                return _Copied()
            again = next(self._comparisons(plan), None) if state.finished_below >= plan.trials else None
            return None if again is None else self._start(change, *again, form="")

    def _comparisons(self, plan: SearchPlan, *, with_best: bool = True) -> Iterator[tuple[Key, Cell]]:
        """Those that are not begun: of the known cells, and once all trials are finished, of the best.

        Raises InputError for a known cell that was another one before.
        """
        cells = dict(plan.compare)
        if with_best and self.state.best is not None:
            number = self.state.best[1]
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
        columns = _jobs.c.score, _jobs.c.multiply_adds, _jobs.c.result
        same = change.connection.execute(sa.select(*columns).where(self._is(Key(SEARCH, original)))).one()._asdict()
        same |= {"state": COMPLETE, "finished": time.time(), "duplicate_of": original}
        self._insert(change, Key(SEARCH, number), cell, form, **same)

    def _insert(self, change: "_Change", key: Key, cell: Cell, form: str, **values: Any) -> None:
        row = {"run": self._run, **key._asdict(), "revision": change.revision, "owner": self.id, "started": time.time()}
        change.connection.execute(_jobs.insert().values(**row, cell=cell.to_json(), form=form, **values))

    def _finish(self, change: "_Change", key: Key, values: dict[str, Any]) -> bool:
        values = {**values, "owner": self.id, "revision": change.revision, "finished": time.time()}
        is_running = self._is(key) & (_jobs.c.state == RUNNING)
        return change.connection.execute(_jobs.update().where(is_running).values(values)).rowcount == 1

    def _is(self, key: Key) -> sa.ColumnElement[bool]:
        return (_jobs.c.run == self._run) & (_jobs.c.name == key.name) & (_jobs.c.number == key.number)

    # What others do

    def _at_work(self, plan: SearchPlan) -> dict[Key, str]:
        """The jobs of the plan that run, and their processes: others may have been told to try more trials."""
        return {key: owner for key, owner in self.state.owners.items() if key.name != SEARCH or key.number < plan.trials}

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
        query = sa.select(_processes.c.id, _processes.c.beat).where(_processes.c.run == self._run)
        beats = {row.id: row.beat for row in connection.execute(query)}
        self._watched = {
            owner: seen if (seen := self._watched.get(owner)) and seen.beat == beat else _Watched(beat, now)
            for owner, beat in beats.items()
        }
        for owner, seen in list(self._watched.items()):
            if now - seen.since >= self._beats_of_lease and owner != self.id:
                connection.execute(_processes.delete().where((_processes.c.run == self._run) & (_processes.c.id == owner)))
                del self._watched[owner]
        return self._watched.keys() - {self.id}

    def _sync(self, connection: sa.Connection) -> None:
        columns = [
            _jobs.c[name] for name in ("name", "number", "state", "revision", "owner", "score", "duplicate_of", "cell", "form")
        ]
        changed = (_jobs.c.run == self._run) & (_jobs.c.revision > self.state.revision)
        for row in connection.execute(sa.select(*columns).where(changed).order_by(_jobs.c.revision, _jobs.c.number)):
            self._apply(row)

    def _apply(self, row: Any) -> None:
        state, key = self.state, Key(row.name, row.number)
        state.revision = max(state.revision, row.revision)
        if row.state == RUNNING:
            state.owners[key], state.cells[key] = row.owner, row.cell
        else:
            state.owners.pop(key, None)
            state.cells.pop(key, None)
        if key.name != SEARCH:
            state.compared[key] = row.cell
            return
        state.history.propose(key.number, row.cell, row.form)
        while state.next in state.history:  # runs of earlier versions may lack a number
            state.next += 1
        if row.duplicate_of is None:
            state.originals.setdefault(row.form, key.number)
        if row.state == RUNNING:
            return
        if row.state == FAILED:
            state.failed += 1
            if state.originals[row.form] == key.number:
                del state.originals[row.form]  # the next one of this form is tried
        else:
            state.history.finish(key.number, row.score)
            if state.best is None or (-row.score, key.number) < (-state.best[0], state.best[1]):
                state.best = row.score, key.number
        state.finished.add(key.number)
        while state.finished_below in state.finished:
            state.finished.remove(state.finished_below)
            state.finished_below += 1

    # The database

    @contextmanager
    def _locked(self) -> Iterator["_Change"]:
        """A transaction that no other process of the run can meet, with all that they did known."""
        with self.engine.execution_options(immediate=True).begin() as connection:
            query = sa.select(_runs.c.revision).where(_runs.c.id == self._run).with_for_update()
            before = connection.execute(query).scalar_one()
            self._sync(connection)
            change = _Change(connection, before + 1)
            yield change
            if change.is_made:
                connection.execute(_runs.update().where(_runs.c.id == self._run).values(revision=before + 1))

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
            mine = (_processes.c.run == self._run) & (_processes.c.id == self.id)
            if not connection.execute(_processes.update().where(mine).values(who)).rowcount:
                row = {"run": self._run, "id": self.id, "beat": 0, "started": time.time()}
                connection.execute(_processes.insert().values(row | who))

    def _keep_beating(self) -> None:
        mine = (_processes.c.run == self._run) & (_processes.c.id == self.id)
        while not self._closing.wait(self._beat):
            try:
                with self.engine.begin() as connection:
                    beat = _processes.update().where(mine).values(beat=_processes.c.beat + 1)
                    is_there = connection.execute(beat).rowcount
                if not is_there:  # others took it for dead
                    self._register(self._workers)
                self._beats += 1
            except DBAPIError:
                continue  # the server is away: the process that is to claim or tell waits for it

    def _delete_processes(self, process: str | None = None) -> None:
        which = _processes.c.run == self._run
        with self.engine.begin() as connection:
            connection.execute(_processes.delete().where(which if process is None else which & (_processes.c.id == process)))


@dataclass(frozen=True)
class Row:
    """A finished job as it was told, without its curve."""

    key: Key
    state: str
    cell: str
    form: str
    score: float | None
    multiply_adds: int | None
    duplicate_of: int | None
    failure: str | None
    result: str | None
    finished: float | None  # seconds since 1970


@dataclass(frozen=True)
class Begun:
    """Jobs that were done elsewhere, with their loss curves; those that were only begun there are claimed here."""

    rows: Sequence[Row] = ()
    curves: Mapping[Key, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """What the jobs of a run have come to: trials with a score and without, finished comparisons, and more."""

    complete: int
    failed: int
    comparisons: int
    lately: int  # trials finished since a time
    best: tuple[int, float] | None  # number and score of the best trial
    reasons: Counter[str]  # why jobs failed, and how many


_COLUMNS = [column.name for column in fields(Row) if column.name != "key"]


class Reader:
    """Reads the jobs of a run, also while processes work on it. Raises KeyError if there is no run of this name."""

    def __init__(self, url: str, name: str, store: Store | None = None) -> None:
        self._engine = _engine(url) if store is None else store.engine  # with its connections
        with _disposed_on_error(self._engine), self._engine.connect() as connection:
            if not sa.inspect(connection).has_table(_runs.name):
                raise KeyError(name)
            self._run = _id_of(connection, name)

    def close(self) -> None:
        self._engine.dispose()

    def identity(self) -> dict[str, Any]:
        """What the run was begun with."""
        with self._engine.connect() as connection:
            text = connection.execute(sa.select(_runs.c.identity).where(_runs.c.id == self._run)).scalar_one()
        return dict(json.loads(text))

    def finished(self, *, search: bool, after: int = -1, at_most: int | None = None) -> list[Row]:
        """The finished trials numbered above `after`, in order, or the finished comparisons as they were begun."""
        columns = [_jobs.c[name] for name in _COLUMNS]
        of_run = (_jobs.c.run == self._run) & (_jobs.c.state != RUNNING) & (_jobs.c.number > after)
        of_run &= _is_trial if search else _is_comparison
        order = (_jobs.c.number,) if search else (_jobs.c.started, _jobs.c.name, _jobs.c.number)
        query = sa.select(_jobs.c.name, _jobs.c.number, *columns).where(of_run).order_by(*order).limit(at_most)
        with self._engine.connect() as connection:
            return [Row(Key(name, number), *values) for name, number, *values in connection.execute(query)]

    def num_finished(self, *, search: bool) -> int:
        """The number of finished trials, or of finished comparisons."""
        of_run = (_jobs.c.run == self._run) & (_jobs.c.state != RUNNING)
        of_run &= _is_trial if search else _is_comparison
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(_jobs).where(of_run)).scalar_one())

    @contextmanager
    def alone(self, *, writes: bool) -> Iterator[sa.Connection | None]:
        """A transaction that one process of this run has at a time, or None if another one has it.

        One that does not write itself keeps out all runs of the database, and lets other connections write.
        """
        with self._engine.execution_options(immediate=writes).begin() as connection:
            query = sa.select(_mirrors.c.run).where(_mirrors.c.run == self._run).with_for_update(skip_locked=True)
            is_file = self._engine.dialect.name == "sqlite"  # which has one process
            is_alone = is_file or connection.execute(query).one_or_none() is not None
            if is_alone and not (is_file or writes):
                connection.execute(sa.text(f"LOCK TABLE {_mirrors.name} IN SHARE ROW EXCLUSIVE MODE"))
            yield connection if is_alone else None

    def counts(self, lately: float) -> "Counts":
        """What the jobs have come to; `lately` is a time, in seconds since 1970."""
        of_run, is_told = _jobs.c.run == self._run, _jobs.c.state != RUNNING
        number = sa.func.count()
        by_state = sa.select(_jobs.c.state, number).where(of_run & _is_trial).group_by(_jobs.c.state)
        best = sa.select(_jobs.c.number, _jobs.c.score).where(of_run & _is_trial & (_jobs.c.state == COMPLETE))
        reasons = (
            sa.select(_jobs.c.failure, number).where(of_run & _is_trial & (_jobs.c.state == FAILED)).group_by(_jobs.c.failure)
        )
        with self._engine.connect() as connection:

            def counted(condition: sa.ColumnElement[bool]) -> int:
                return int(connection.execute(sa.select(number).select_from(_jobs).where(of_run & condition)).scalar_one())

            states = {str(state): int(count) for state, count in connection.execute(by_state)}
            found = connection.execute(best.order_by(_jobs.c.score.desc(), _jobs.c.number).limit(1)).one_or_none()
            return Counts(
                complete=states.get(COMPLETE, 0),
                failed=states.get(FAILED, 0),
                comparisons=counted(_is_comparison & is_told),
                lately=counted(_is_trial & is_told & (_jobs.c.finished > lately)),
                best=None if found is None else (found.number, found.score),
                reasons=Counter({str(reason): int(times) for reason, times in connection.execute(reasons)}),
            )

    def running(self) -> list[tuple[Key, str, float]]:
        """Jobs that are being evaluated, or were when their process died: the process and since when."""
        query = sa.select(_jobs.c.name, _jobs.c.number, _jobs.c.owner, _jobs.c.started)
        query = query.where((_jobs.c.run == self._run) & (_jobs.c.state == RUNNING)).order_by(_jobs.c.name, _jobs.c.number)
        with self._engine.connect() as connection:
            return [(Key(row.name, row.number), row.owner, row.started) for row in connection.execute(query)]

    def curve(self, key: Key) -> str | None:
        """The loss curve of a job as JSON; None if it has none."""
        which = (_curves.c.run == self._run) & (_curves.c.name == key.name) & (_curves.c.number == key.number)
        with self._engine.connect() as connection:
            curve: str | None = connection.execute(sa.select(_curves.c.curve).where(which)).scalar()
        return curve

    def processes(self) -> list[Process]:
        """Those that work on the run."""
        jobs = sa.select(_jobs.c.owner, sa.func.count().label("jobs"))
        jobs = jobs.where((_jobs.c.run == self._run) & (_jobs.c.state == RUNNING)).group_by(_jobs.c.owner)
        query = sa.select(_processes).where(_processes.c.run == self._run).order_by(_processes.c.started)
        with self._engine.connect() as connection:
            count = {row.owner: row.jobs for row in connection.execute(jobs)}
            return [
                Process(row.id, row.host, row.pid, row.workers, row.started, count.get(row.id, 0))
                for row in connection.execute(query)
            ]


def shown(url: str) -> str:
    """The URL as it may be read by others, without a password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except ArgumentError:  # it is none
        return url


def has_password(url: str) -> bool:
    """Whether a password stands in the URL."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError:  # no URL, as is said where it is used
        return False
    return parsed.password is not None or "password" in parsed.query


def _sleep(seconds: float) -> None:
    """Wait for so long, or until Ctrl-C is pressed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop_waits():
        time.sleep(0.1)


def require_answer(url: str) -> None:
    """Raise SQLAlchemyError if the database does not answer, and InputError for one of another kind."""
    engine = _engine(url)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def is_server(url: str) -> bool:
    """Whether several processes may work on this database: not on a file."""
    return not url.startswith("sqlite")


def _head_to_keep(key: Key, score: float, best: tuple[float, int] | None) -> str | None:
    """The name under which the head of this job is kept; None if it is not."""
    if key.name != SEARCH:
        return head_name(key.name) if key.number == 0 else None
    return BEST_HEAD if best is None or (-score, key.number) < (-best[0], best[1]) else None


def head_name(compared: str) -> str:
    """The name under which a run keeps the head of a compared cell."""
    return f"{compared.replace(' ', '_')}_seed0"


def _begin(engine: sa.Engine, name: str, identity: str, begun: Begun) -> tuple[int, str]:
    """The number of the run of this name, which is begun if there is none, and its identity."""
    for _ in range(5):  # several processes may begin at once
        try:
            _tables.create_all(engine)
            with engine.begin() as connection:
                found = connection.execute(sa.select(_runs.c.id).where(_runs.c.name == name)).scalar()
                if found is None:
                    row = {"name": name, "schema": SCHEMA, "identity": identity, "revision": 1}
                    connection.execute(_runs.insert().values(row))
                    connection.execute(_mirrors.insert().values(run=_id_of(connection, name)))
                    _fill(connection, _id_of(connection, name), begun)
                number = _id_of(connection, name)
                return number, str(connection.execute(sa.select(_runs.c.identity).where(_runs.c.id == number)).scalar_one())
        except (IntegrityError, ProgrammingError) as error:  # the other was first
            last = error
            time.sleep(0.2)
    raise last


def _fill(connection: sa.Connection, run: int, begun: Begun) -> None:
    started = {"run": run, "revision": 1, "owner": ""}
    jobs = [
        started | row.key._asdict() | {name: getattr(row, name) for name in _COLUMNS} | {"started": float(position)}
        for position, row in enumerate(begun.rows)  # of when they were begun, only the order is known
    ]
    curves = [{"run": run, **key._asdict(), "curve": curve} for key, curve in begun.curves.items()]
    for table, values in ((_jobs, jobs), (_curves, curves)):
        if values:
            connection.execute(table.insert(), values)


def _id_of(connection: sa.Connection, name: str) -> int:
    query = sa.select(_runs.c.id, _runs.c.schema).where(_runs.c.name == name)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise KeyError(name)
    if row.schema != SCHEMA:
        raise InputError(f"run {name} is of another version of this project: give another `out`")
    return int(row.id)


def _engine(url: str, lease: float = LEASE) -> sa.Engine:
    """Of SQLite, transactions begin when they say so, and one that is to write keeps others from writing at once.

    PostgreSQL ends a transaction, and with it the locks, of a process that does nothing for the lease in the middle of it,
    because it was suspended, or its machine is gone. Raises InputError for another database, and for SQLite in memory.
    """
    parsed = sa.make_url(url)
    if (kind := parsed.get_backend_name()) not in ("sqlite", "postgresql"):
        raise InputError(f"`storage` is of {kind}: give the URL of PostgreSQL (postgresql+psycopg://…) or of an SQLite file")
    if is_server(url):
        return _engine_of_server(parsed, lease)
    if parsed.database in (None, "", ":memory:"):
        raise InputError(f"`storage` {url} is in memory: give an SQLite file, such as sqlite:///study.db")
    engine = sa.create_engine(url, connect_args={"timeout": 60})

    @sa.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def _disposed_on_error(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


def _engine_of_server(url: sa.URL, lease: float) -> sa.Engine:
    limits = {"connect_timeout": 10, "tcp_user_timeout": int(1000 * lease)} if url.get_driver_name() in _LIBPQ else {}
    limits = {name: value for name, value in limits.items() if name not in url.query}
    engine = sa.create_engine(
        url,
        connect_args=limits,
        isolation_level="READ COMMITTED",  # whatever the server's default is
        pool_size=1,  # a server has few connections: those beyond one are closed when they are not needed
        max_overflow=-1,
    )

    @sa.event.listens_for(engine, "connect")
    def limit_transactions(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = {int(1000 * lease)}")
        connection.commit()

    return engine
