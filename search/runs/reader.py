"""Reads the jobs of a run, also while processes work on it: for reports, people, and the copies that are made for them."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import sqlalchemy as sa

from search.runs.database import disposed_on_error, open_engine
from search.runs.tables import (
    COMPLETE,
    CURVES,
    FAILED,
    IS_COMPARISON,
    IS_TOLD,
    IS_TRIAL,
    JOBS,
    MIRRORS,
    PROCESSES,
    ROW_COLUMNS,
    RUNGS,
    RUNNING,
    RUNS,
    SEARCH,
    Key,
    Row,
    copies_of,
    id_of,
)


@dataclass(frozen=True)
class Process:
    """A process that works on a run."""

    id: str
    host: str
    pid: int
    workers: int
    started: float  # seconds since 1970
    jobs: int  # that it is evaluating


@dataclass(frozen=True)
class Counts:
    """What the jobs of a run have come to: trials with a score and without, finished comparisons, and more."""

    complete: int
    failed: int
    comparisons: int
    lately: int  # trials finished since a time
    best: tuple[int, float] | None  # number and score of the best trial
    reasons: Counter[str]  # why jobs failed, and how many
    rungs: tuple[int, ...] = ()  # trials with a score on each, if the search is cut short


class Reader:
    """Reads the jobs of a run, also while processes work on it. Raises KeyError if there is no run of this name.

    Its connections are those of `engine`, if one is given.
    """

    def __init__(self, url: str, name: str, engine: sa.Engine | None = None) -> None:
        self._engine = open_engine(url) if engine is None else engine
        with disposed_on_error(self._engine), self._engine.connect() as connection:
            tables = sa.inspect(connection).get_table_names()
            if RUNS.name not in tables:
                raise KeyError(name)
            self._has_rungs = RUNGS.name in tables  # not where the last process was of an earlier version
            self._run = id_of(connection, name)

    def close(self) -> None:
        self._engine.dispose()

    def identity(self) -> dict[str, Any]:
        """What the run was begun with."""
        with self._engine.connect() as connection:
            text = connection.execute(sa.select(RUNS.c.identity).where(RUNS.c.id == self._run)).scalar_one()
        return dict(json.loads(text))

    def finished(
        self, *, search: bool, after: int = -1, at_most: int | None = None, of: Sequence[int] | None = None
    ) -> list[Row]:
        """The finished trials numbered above `after`, in order, or the finished comparisons as they were begun.

        A trial that goes on is there with its last result. `of` asks for these trials alone, and their copies.
        """
        columns = [JOBS.c[name] for name in ROW_COLUMNS]
        of_run = (JOBS.c.run == self._run) & IS_TOLD & (JOBS.c.number > after)
        of_run &= IS_TRIAL if search else IS_COMPARISON
        if of is not None:
            of_run &= JOBS.c.number.in_(of) | JOBS.c.number.in_(copies_of(self._run, of))
        order = (JOBS.c.number,) if search else (JOBS.c.started, JOBS.c.name, JOBS.c.number)
        query = sa.select(JOBS.c.name, JOBS.c.number, *columns).where(of_run).order_by(*order).limit(at_most)
        with self._engine.connect() as connection:
            rows = [Row(Key(name, number), *values) for name, number, *values in connection.execute(query)]
        return [replace(row, state=COMPLETE) if row.state == RUNNING else row for row in rows]

    def num_finished(self, *, search: bool) -> int:
        """The number of finished trials, or of finished comparisons."""
        of_run = (JOBS.c.run == self._run) & IS_TOLD
        of_run &= IS_TRIAL if search else IS_COMPARISON
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(JOBS).where(of_run)).scalar_one())

    @contextmanager
    def alone(self, *, writes: bool) -> Iterator[sa.Connection | None]:
        """A transaction that one process of this run has at a time, or None if another one has it.

        One that does not write itself keeps out all runs of the database, and lets other connections write.
        """
        with self._engine.execution_options(immediate=writes).begin() as connection:
            query = sa.select(MIRRORS.c.run).where(MIRRORS.c.run == self._run).with_for_update(skip_locked=True)
            is_file = self._engine.dialect.name == "sqlite"  # which has one process
            is_alone = is_file or connection.execute(query).one_or_none() is not None
            if is_alone and not (is_file or writes):
                connection.execute(sa.text(f"LOCK TABLE {MIRRORS.name} IN SHARE ROW EXCLUSIVE MODE"))
            yield connection if is_alone else None

    def counts(self, lately: float) -> "Counts":
        """What the jobs have come to; `lately` is a time, in seconds since 1970."""
        of_run, number = JOBS.c.run == self._run, sa.func.count()
        is_failed = JOBS.c.state == FAILED
        best = sa.select(JOBS.c.number, JOBS.c.score).where(of_run & IS_TRIAL & JOBS.c.score.is_not(None))
        is_one = (RUNGS.c.run == JOBS.c.run) & (RUNGS.c.number == JOBS.c.number) & RUNGS.c.score.is_not(None)
        by_rung = sa.select(RUNGS.c.rung, number).select_from(JOBS.join(RUNGS, is_one)).where(of_run & IS_TRIAL)
        furthest = best.join(RUNGS, is_one).order_by(RUNGS.c.rung.desc())
        reasons = (
            sa.select(JOBS.c.failure, number).where(of_run & IS_TRIAL & (JOBS.c.state == FAILED)).group_by(JOBS.c.failure)
        )
        with self._engine.connect() as connection:

            def counted(condition: sa.ColumnElement[bool]) -> int:
                return int(connection.execute(sa.select(number).select_from(JOBS).where(of_run & condition)).scalar_one())

            counted_rungs = connection.execute(by_rung.group_by(RUNGS.c.rung)) if self._has_rungs else ()
            rungs = {int(rung): int(count) for rung, count in counted_rungs}
            order = JOBS.c.score.desc(), JOBS.c.number
            found = connection.execute((furthest if rungs else best).order_by(*order).limit(1)).one_or_none()
            return Counts(
                complete=counted(IS_TRIAL & ~is_failed & IS_TOLD),
                failed=counted(IS_TRIAL & is_failed),
                comparisons=counted(IS_COMPARISON & IS_TOLD),
                lately=counted(IS_TRIAL & IS_TOLD & (JOBS.c.finished > lately)),
                rungs=tuple(rungs[rung] for rung in sorted(rungs)),
                best=None if found is None else (found.number, found.score),
                reasons=Counter({str(reason): int(times) for reason, times in connection.execute(reasons)}),
            )

    def running(self) -> list[tuple[Key, str, float]]:
        """Jobs that are being evaluated, or were when their process died: the process and since when."""
        query = sa.select(JOBS.c.name, JOBS.c.number, JOBS.c.owner, JOBS.c.started)
        query = query.where((JOBS.c.run == self._run) & (JOBS.c.state == RUNNING)).order_by(JOBS.c.name, JOBS.c.number)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
            running = (RUNGS.c.run == self._run) & (RUNGS.c.state == RUNNING)
            logged = connection.execute(sa.select(RUNGS.c.number, RUNGS.c.rung).where(running)) if self._has_rungs else ()
            rungs = {row.number: row.rung for row in logged}
        keys = [Key(row.name, row.number, rungs.get(row.number, 0) if row.name == SEARCH else 0) for row in rows]
        return [(key, row.owner, row.started) for key, row in zip(keys, rows, strict=True)]

    def logged(self, first: int, at_most: int) -> list[tuple[int, int, float | None]]:
        """Trial, rung and score of jobs from `first` on, up to one that runs, if the search is cut short; copies have none."""
        if not self._has_rungs:
            return []
        query = sa.select(RUNGS.c.number, RUNGS.c.rung, RUNGS.c.score, RUNGS.c.state)
        query = query.where((RUNGS.c.run == self._run) & (RUNGS.c.job >= first)).order_by(RUNGS.c.job).limit(at_most)
        with self._engine.connect() as connection:
            ended = takewhile(lambda row: row.state != RUNNING, connection.execute(query))
            return [(row.number, row.rung, row.score) for row in ended]

    def scored_on(self, rung: int, of: Collection[int]) -> set[int]:
        """Those of the trials that have a score on this rung, where a search is cut short."""
        is_scored = (RUNGS.c.run == self._run) & (RUNGS.c.rung == rung) & RUNGS.c.score.is_not(None)
        is_scored &= RUNGS.c.number.in_(of)
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(RUNGS.c.number).where(is_scored)).scalars()) if self._has_rungs else set()

    def rung_scores(self) -> dict[int, tuple[float, ...]]:
        """The scores of trials on each rung that they have reached, without copies, where a search is cut short."""
        is_scored = (RUNGS.c.run == self._run) & RUNGS.c.score.is_not(None)
        found: dict[int, tuple[float, ...]] = {}
        if not self._has_rungs:
            return found
        with self._engine.connect() as connection:
            query = sa.select(RUNGS.c.number, RUNGS.c.score).where(is_scored).order_by(RUNGS.c.job)
            for number, score in connection.execute(query):
                found[number] = (*found.get(number, ()), score)
        return found

    def curve(self, key: Key) -> str | None:
        """The loss curve of a job as JSON; None if it has none."""
        which = (CURVES.c.run == self._run) & (CURVES.c.name == key.name) & (CURVES.c.number == key.number)
        with self._engine.connect() as connection:
            curve: str | None = connection.execute(sa.select(CURVES.c.curve).where(which)).scalar()
        return curve

    def processes(self) -> list[Process]:
        """Those that work on the run."""
        jobs = sa.select(JOBS.c.owner, sa.func.count().label("jobs"))
        jobs = jobs.where((JOBS.c.run == self._run) & (JOBS.c.state == RUNNING)).group_by(JOBS.c.owner)
        query = sa.select(PROCESSES).where(PROCESSES.c.run == self._run).order_by(PROCESSES.c.started)
        with self._engine.connect() as connection:
            count = {row.owner: row.jobs for row in connection.execute(jobs)}
            return [
                Process(row.id, row.host, row.pid, row.workers, row.started, count.get(row.id, 0))
                for row in connection.execute(query)
            ]
