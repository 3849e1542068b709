"""The studies for people are written by Optuna's tables; here they are held to what Optuna's functions write."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection

from search.cells.sampler import cell_from_params
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace
from search.runs.store import Store
from search.runs.study import Study
from search.runs.tables import FAILED, SEARCH, Begun, Key, Row
from tests.search.runs.free_search import NAME, SPACE, TASK, expected, multiply_adds, search

TRIALS = 40
PARTS = ("search", "comparison")
USED = ("trials", "trial_values", "trial_params", "trial_user_attributes")
TABLES = (*USED, "trial_system_attributes", "trial_intermediate_values")


def rows(path: Path) -> list[tuple[str, list[tuple[str, Any]]]]:
    """All rows of Optuna's tables of trials, with the trial's number and study in place of ids, and without times."""
    found = []
    with closing(sqlite3.connect(path)) as connection:
        for table in TABLES:
            trial = "" if table == "trials" else "JOIN trials USING (trial_id)"
            cursor = connection.execute(f"SELECT * FROM {table} {trial}")
            names = [name for name, *_ in cursor.description]
            for row in cursor:
                kept = [
                    each for each in zip(names, row, strict=True) if each[0] == "study_id" or not _is_of_its_writing(each[0])
                ]
                found.append((table, kept))
    return sorted(found, key=repr)


def _is_of_its_writing(column: str) -> bool:
    return (column.endswith("_id") and column != "study_id") or column.startswith("datetime")


def test_optuna_writes_the_same_rows_of_the_trials_that_it_reads(tmp_path: Path) -> None:
    ours, optunas = (f"sqlite:///{tmp_path / name}" for name in ("ours.db", "optunas.db"))
    search(ours, TRIALS, tmp_path, tmp_path / "log")
    for part in PARTS:
        study = optuna.load_study(study_name=f"{NAME} {part}", storage=ours)
        optuna.create_study(study_name=study.study_name, storage=optunas, direction="maximize").add_trials(study.trials)
    written = rows(tmp_path / "ours.db")
    assert Counter(table for table, _ in written)["trials"] == TRIALS + 4
    assert {table for table, _ in written} == set(USED)
    assert written == rows(tmp_path / "optunas.db")


def test_optuna_writes_the_same_rows_of_two_objectives(tmp_path: Path) -> None:
    """And a search that is interrupted has the cells of one that is not: each follows from all values before."""
    ours, optunas = (f"sqlite:///{tmp_path / name}" for name in ("ours.db", "optunas.db"))
    for trials in (29, TRIALS):
        search(ours, trials, tmp_path, tmp_path / "log", cost="multiply_adds")
    for part in PARTS:
        study = optuna.load_study(study_name=f"{NAME} {part}", storage=ours)
        assert study.metric_names == ["mIOU", "multiply-adds"]
        assert study.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
        optuna.create_study(study_name=study.study_name, storage=optunas, directions=study.directions).add_trials(study.trials)
    assert rows(tmp_path / "ours.db") == rows(tmp_path / "optunas.db")
    by_trial = {trial.number: trial for trial in optuna.load_study(study_name=f"{NAME} search", storage=ours).trials}
    for key, (cell, score) in expected(TRIALS, "multiply_adds").items():
        if key.name == SEARCH:
            assert cell_from_params(by_trial[key.number].params, SPACE) == cell
            values = None if score is None else [score, multiply_adds(cell)]
            assert by_trial[key.number].values == values
    assert expected(TRIALS).keys() != expected(TRIALS, "multiply_adds").keys()  # another cell is scored again


def test_many_trials_at_once_are_shown(tmp_path: Path) -> None:
    """More than SQLite keeps in memory: then it writes before the end of the transaction, and locks out other connections."""
    url, space, rng = f"sqlite:///{tmp_path / 'study.db'}", SearchSpace(5), np.random.default_rng(0)
    cells = [space.sample(rng).to_json() for _ in range(600)]
    told = [Row(Key(SEARCH, i), FAILED, cell, cell, None, None, None, "bad luck", None, 1.0) for i, cell in enumerate(cells)]
    with closing(Store(url, NAME, "{}", Begun(told))) as store:
        Study(tmp_path, url, store, TASK, space, PaperSampler(space, seed=0), lambda head: b"").close()
    assert len(optuna.load_study(study_name=f"{NAME} search", storage=url).trials) == 600
