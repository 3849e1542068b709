"""What breaks while a search runs, one fault at a time: its jobs come to what they would have come to."""

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psycopg
import pytest

from reference.cell import Cell
from search.runs.store import Reader
from tests.search.runs.free_search import NAME, Finished, expected, search

TRIALS = 24


def found(url: str) -> Finished:
    """Cell and score of all jobs, all of which are finished."""
    with closing(Reader(url, NAME)) as reader:
        assert reader.running() == []
        rows = reader.finished(search=True) + reader.finished(search=False)
    assert len(rows) == len({row.key for row in rows})
    return {row.key: (Cell.from_json(row.cell), row.score) for row in rows}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Optuna leaves a connection open if one breaks
@pytest.mark.parametrize("is_written", [True, False], ids=["written", "not_written"])
def test_a_connection_that_breaks_during_a_commit_loses_no_job(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """Nobody can tell then whether the change is there."""
    commit, rng, broken = psycopg.Connection.commit, np.random.default_rng(0), []

    def break_some(connection: psycopg.Connection) -> None:
        is_in_transaction = connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE
        if is_in_transaction and rng.random() < 0.15:
            if is_written:
                commit(connection)
            connection.close()
            broken.append(connection)
            raise psycopg.OperationalError("the connection is lost")
        commit(connection)

    search(database, 0, tmp_path, tmp_path / "log")  # makes the tables
    monkeypatch.setattr(psycopg.Connection, "commit", break_some)
    search(database, TRIALS, tmp_path, tmp_path / "log")
    monkeypatch.undo()
    assert len(broken) > 5
    assert found(database) == expected(TRIALS)


def test_no_time_of_day_decides_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of machines differ, and are set; so a run is the same by a clock that jumps to and fro."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(time, "time", lambda: float(rng.uniform(0, 4e9)))
    search(url := f"sqlite:///{tmp_path / 'study.db'}", TRIALS, tmp_path, tmp_path / "log")
    monkeypatch.undo()
    assert found(url) == expected(TRIALS)
