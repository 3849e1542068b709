"""Databases for the jobs of a run: a file of SQLite, which one process uses, or a server, such as PostgreSQL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from search.errors import InputError

LEASE = 60.0  # seconds without a heartbeat after which a process is taken for dead
_LIBPQ = ("psycopg", "psycopg2")  # drivers that are told by libpq's words when a connection is lost


def is_server(url: str) -> bool:
    """Whether several processes may work on this database: not on a file."""
    return not url.startswith("sqlite")


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


def require_answer(url: str) -> None:
    """Raise SQLAlchemyError if the database does not answer, and InputError for one of another kind."""
    engine = open_engine(url)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def open_engine(url: str, lease: float = LEASE) -> sa.Engine:
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


@contextmanager
def disposed_on_error(engine: sa.Engine) -> Iterator[None]:
    """Leave no connection behind if what is inside fails."""
    try:
        yield
    except BaseException:
        engine.dispose()
        raise
