"""The tables in which the jobs of runs are, and what a row says.

A job is a trial of the search, or a comparison: a known cell, or the best one again, with one seed. Its row says what it came
to, and what people and samplers look for is in columns of its own, so that no question reads what it does not ask for:
results are read for reports alone, loss curves of what is drawn.

Why not Optuna's own tables: there a trial is some thirty rows, each of its parameters and attributes is a transaction, and
an ask looks at all trials; a lost trial comes back under another number, and so with another seed. So Optuna's studies are
written from here (`search.runs.mirror`), for people, and a search never reads them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, ProgrammingError

from search.errors import InputError

SCHEMA = 1  # version of the tables
SEARCH = ""  # the name of the search's trials; comparisons have that of their cell
FOUND = "trial "  # before the number of a trial: the name of the search's best cell among the compared ones
BEST_HEAD = "best"  # name under which a run keeps the head of its best cell

RUNNING, COMPLETE, FAILED = "running", "complete", "failed"

METADATA = sa.MetaData()
RUNS = sa.Table(
    "dpc_runs",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("schema", sa.Integer, nullable=False),
    sa.Column("identity", sa.Text, nullable=False),  # JSON
    sa.Column("revision", sa.BigInteger, nullable=False),  # of the last change of a job; changes are one after the other
)
JOBS = sa.Table(
    "dpc_jobs",
    METADATA,
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
CURVES = sa.Table(
    "dpc_curves",  # beside the jobs, because nobody reads them all
    METADATA,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("curve", sa.Text, nullable=False),  # JSON
)
RUNGS = sa.Table(
    "dpc_rungs",  # the jobs of a search that is cut short, in order
    METADATA,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("job", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, nullable=False),  # of the trial
    sa.Column("rung", sa.Integer, nullable=False),
    sa.Column("bound", sa.Integer, nullable=False),  # it follows from the results of the jobs before this one
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),  # of the run, when this row was changed
    sa.Column("score", sa.Float),
    sa.Column("copy_of", sa.Integer),  # the trial whose result it has
    sa.Index("dpc_rungs_by_revision", "run", "revision"),
    sa.Index("dpc_rungs_by_trial", "run", "number"),
    sa.Index("dpc_rungs_by_original", "run", "copy_of"),
)
STATES = sa.Table(
    "dpc_states",
    METADATA,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # of the trial
    sa.Column("rung", sa.Integer, nullable=False),  # at whose end it stands
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),  # a safetensors file
)
HEADS = sa.Table(
    "dpc_heads",
    METADATA,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),  # a safetensors file
)
MIRRORS = sa.Table("dpc_mirrors", METADATA, sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True))  # to lock
PROCESSES = sa.Table(
    "dpc_processes",
    METADATA,
    sa.Column("run", sa.ForeignKey("dpc_runs.id"), primary_key=True),
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("workers", sa.Integer, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("started", sa.Float, nullable=False),  # seconds since 1970, for people
)

IS_TRIAL, IS_COMPARISON = JOBS.c.name == SEARCH, JOBS.c.name > SEARCH  # for ">" an index knows where they begin
IS_TOLD = (JOBS.c.state != RUNNING) | JOBS.c.result.is_not(None)  # a trial that goes on has the result of a rung


class Key(NamedTuple):
    """Which job: `name` is `SEARCH` and `number` the trial's, or the name of a compared cell and the seed.

    A trial that goes on is one job on each `rung`.
    """

    name: str
    number: int
    rung: int = 0

    @property
    def row(self) -> dict[str, Any]:
        """The columns that say which row has it."""
        return {"name": self.name, "number": self.number}


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


ROW_COLUMNS = [column.name for column in fields(Row) if column.name != "key"]


@dataclass(frozen=True)
class Begun:
    """Jobs that were done elsewhere, with their loss curves; those that were only begun there are claimed here."""

    rows: Sequence[Row] = ()
    curves: Mapping[Key, str] = field(default_factory=dict)


def head_name(compared: str) -> str:
    """The name under which a run keeps the head of a compared cell."""
    return f"{compared.replace(' ', '_')}_seed0"


def cost_in(result: str, kind: str) -> float:
    """The multiply-adds or the latency in a result, which is JSON."""
    return float(json.loads(result)[kind])


def copies_of(run: int, numbers: Sequence[int]) -> sa.Select[tuple[int]]:
    """Asks for the copies of these trials, where the search is cut short."""
    return sa.select(RUNGS.c.number).where((RUNGS.c.run == run) & RUNGS.c.copy_of.in_(numbers))


def begin_run(engine: sa.Engine, name: str, identity: str, begun: Begun) -> tuple[int, str]:
    """The number of the run of this name, which is begun if there is none, and its identity."""
    for _ in range(5):  # several processes may begin at once
        try:
            METADATA.create_all(engine)
            with engine.begin() as connection:
                found = connection.execute(sa.select(RUNS.c.id).where(RUNS.c.name == name)).scalar()
                if found is None:
                    row = {"name": name, "schema": SCHEMA, "identity": identity, "revision": 1}
                    connection.execute(RUNS.insert().values(row))
                    connection.execute(MIRRORS.insert().values(run=id_of(connection, name)))
                    _fill(connection, id_of(connection, name), begun)
                number = id_of(connection, name)
                return number, str(connection.execute(sa.select(RUNS.c.identity).where(RUNS.c.id == number)).scalar_one())
        except (IntegrityError, ProgrammingError) as error:  # the other was first
            last = error
            time.sleep(0.2)
    raise last


def _fill(connection: sa.Connection, run: int, begun: Begun) -> None:
    started = {"run": run, "revision": 1, "owner": ""}
    jobs = [
        started | row.key.row | {name: getattr(row, name) for name in ROW_COLUMNS} | {"started": float(position)}
        for position, row in enumerate(begun.rows)  # of when they were begun, only the order is known
    ]
    curves = [{"run": run, **key.row, "curve": curve} for key, curve in begun.curves.items()]
    for table, values in ((JOBS, jobs), (CURVES, curves)):
        if values:
            connection.execute(table.insert(), values)


def id_of(connection: sa.Connection, name: str) -> int:
    """The number of the run of this name. Raises KeyError if there is none, InputError if it is of another version."""
    query = sa.select(RUNS.c.id, RUNS.c.schema).where(RUNS.c.name == name)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise KeyError(name)
    if row.schema != SCHEMA:
        raise InputError(f"run {name} is of another version of this project: give another `out`")
    return int(row.id)
