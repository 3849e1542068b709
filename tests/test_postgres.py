"""The servers that other tests rely on: what was committed is there after a crash, and databases are apart."""

import pytest
import sqlalchemy as sql

from tests.postgres import Server, running_server


def rows(url: str) -> list[str]:
    engine = sql.create_engine(url)
    with engine.connect() as connection:
        found = [name for (name,) in connection.execute(sql.text("SELECT name FROM kept ORDER BY name"))]
    engine.dispose()
    return found


def write(url: str, name: str) -> None:
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sql.text("CREATE TABLE IF NOT EXISTS kept (name TEXT)"))
        connection.execute(sql.text("INSERT INTO kept VALUES (:name)"), {"name": name})
    engine.dispose()


def test_what_was_committed_survives_a_killed_server() -> None:
    with running_server() as server:
        url = server.create_database()
        for round in range(3):
            write(url, f"before {round}")
            server.kill()
            with pytest.raises(sql.exc.OperationalError):
                rows(url)
            server.start()
        assert rows(url) == ["before 0", "before 1", "before 2"]


def test_each_test_has_a_database_of_its_own(postgres: Server, database: str) -> None:
    write(database, "here")
    write(other := postgres.create_database(), "there")
    assert (rows(database), rows(other)) == (["here"], ["there"])
