"""The studies for people are written by Optuna's tables; here they are held to what Optuna's functions write."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna

from tests.search.runs.free_search import NAME, search

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
