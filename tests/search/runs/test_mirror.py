"""The studies for people are written by Optuna's tables; here they are held to what Optuna's functions write."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna

from tests.search.runs.free_search import NAME, search

TRIALS = 40
PARTS = ("search", "comparison")


def rows(path: Path) -> dict[str, list[Any]]:
    """All rows of Optuna's tables, without when they were written."""
    with closing(sqlite3.connect(path)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        tables = [name for name in names if not name.startswith("dpc_")]
        connection.row_factory = lambda cursor, row: {
            column[0]: value for column, value in zip(cursor.description, row, strict=True) if "datetime" not in column[0]
        }
        return {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}


def test_optuna_writes_the_same_rows_of_the_trials_that_it_reads(tmp_path: Path) -> None:
    ours, optunas = (f"sqlite:///{tmp_path / name}" for name in ("ours.db", "optunas.db"))
    search(ours, TRIALS, tmp_path, tmp_path / "log")
    for part in PARTS:
        study = optuna.load_study(study_name=f"{NAME} {part}", storage=ours)
        copy = optuna.create_study(study_name=study.study_name, storage=optunas, direction="maximize")
        copy.set_metric_names(study.metric_names or [])
    for part in PARTS:
        study, copy = (optuna.load_study(study_name=f"{NAME} {part}", storage=url) for url in (ours, optunas))
        copy.add_trials(study.trials)
    assert len(optuna.load_study(study_name=f"{NAME} {PARTS[0]}", storage=optunas).trials) == TRIALS
    assert rows(tmp_path / "ours.db") == rows(tmp_path / "optunas.db")
