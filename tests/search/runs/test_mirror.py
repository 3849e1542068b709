"""The studies for people are written by Optuna's tables; here they are held to what Optuna's functions write."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace
from search.runs.store import FAILED, SEARCH, Begun, Key, Row, Store
from search.runs.study import Study
from tests.search.runs.free_search import NAME, TASK, search

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


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optuna_writes_the_same_rows_of_the_trials_that_it_reads(tmp_path: Path) -> None:
    ours, optunas = (f"sqlite:///{tmp_path / name}" for name in ("ours.db", "optunas.db"))
    search(ours, TRIALS, tmp_path, tmp_path / "log")
    for part in PARTS:
        study = optuna.load_study(study_name=f"{NAME} {part}", storage=ours)
        copy = optuna.create_study(study_name=study.study_name, storage=optunas, direction="maximize")
        copy.set_metric_names(study.metric_names or [])
        for key, value in study.user_attrs.items():
            copy.set_user_attr(key, value)
    for part in PARTS:
        study, copy = (optuna.load_study(study_name=f"{NAME} {part}", storage=url) for url in (ours, optunas))
        copy.add_trials(study.trials)
    assert len(optuna.load_study(study_name=f"{NAME} {PARTS[0]}", storage=optunas).trials) == TRIALS
    assert rows(tmp_path / "ours.db") == rows(tmp_path / "optunas.db")


def test_many_trials_at_once_are_shown(tmp_path: Path) -> None:
    """More than SQLite keeps in memory: then it writes before the end of the transaction, and locks out other connections."""
    url, space, rng = f"sqlite:///{tmp_path / 'study.db'}", SearchSpace(5), np.random.default_rng(0)
    cells = [space.sample(rng).to_json() for _ in range(600)]
    rows = [Row(Key(SEARCH, i), FAILED, cell, cell, None, None, None, "bad luck", None, 1.0) for i, cell in enumerate(cells)]
    with closing(Store(url, NAME, "{}", Begun(rows))) as store:
        Study(tmp_path, url, store, TASK, space, PaperSampler(space, seed=0), lambda head: b"").close()
    assert len(optuna.load_study(study_name=f"{NAME} search", storage=url).trials) == 600
