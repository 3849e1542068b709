"""The finished jobs of a run as two Optuna studies in the same database, for people: dashboards, plots, `optuna.load_study`.

The store (`search.runs.store`) is what a search reads and writes; nothing here is read again. Trials come in the order of
their numbers, which are the same in both, so a slow cell holds back those after it.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState, create_trial

from reference.cell import Cell
from search.cells.sampler import distributions_of, params_of_cell
from search.cells.space import SearchSpace
from search.dense_tasks import DenseTask, Scores, details_beside, measures_beside
from search.runs.store import FAILED, SEARCH, Reader, Row


class Mirror:
    """The studies `<name> search` and `<name> comparison`, which are made if they are not there."""

    def __init__(self, url: str, name: str, task: DenseTask, space: SearchSpace) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._task, self._space = task, space
        self._storage = optuna.storages.RDBStorage(url)
        self._search, self._comparison = (self._open(f"{name} {part}") for part in ("search", "comparison"))

    def update(self, reader: Reader) -> None:
        """Add what was finished since. One process at a time (`Reader.alone`)."""
        number = self._count(self._search)
        for row in reader.finished(search=True, after=number - 1):
            if row.key.number != number:
                break
            self._search.add_trial(self._trial(row, params_of_cell(Cell.from_json(row.cell), self._space)))
            number += 1
        if self._count(self._comparison) < reader.num_finished(search=False):
            trials = self._comparison.get_trials(deepcopy=False)
            there = {(trial.user_attrs["name"], trial.user_attrs["seed"]) for trial in trials}
            for row in reader.finished(search=False):
                if row.key not in there:
                    self._comparison.add_trial(self._trial(row, {}))

    def _count(self, study: optuna.Study) -> int:
        """The number of its trials, which Optuna's own functions only tell after reading them all."""
        trials = sa.table("trials", sa.column("study_id"))
        query = sa.select(sa.func.count()).select_from(trials).where(trials.c.study_id == study._study_id)
        with self._storage.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def close(self) -> None:
        self._storage.engine.dispose()

    def _open(self, name: str) -> optuna.Study:
        study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize", load_if_exists=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([self._task.score.name])
        return study

    def _trial(self, row: Row, params: Mapping[str, Any]) -> FrozenTrial:
        shown: dict[str, Any] = {} if row.key.name == SEARCH else {"name": row.key.name, "seed": row.key.number}
        shown["cell"] = str(Cell.from_json(row.cell))
        if row.duplicate_of is not None:
            shown["duplicate_of"] = row.duplicate_of
        if row.state == FAILED:
            shown["failure"] = row.failure
        if row.result is not None:
            shown |= self._shown(json.loads(row.result))
        of_space = distributions_of(self._space)
        return create_trial(
            state=TrialState.FAIL if row.state == FAILED else TrialState.COMPLETE,
            value=row.score,
            params=dict(params),
            distributions={name: of_space[name] for name in params},
            user_attrs=shown,
        )

    def _shown(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What a dashboard shows of a scored cell, beside the score."""
        measures, values = measures_beside(self._task), details_beside(self._task, [Scores.restored(result["scores"])])
        beside = {measure.heading: value for measure, value in zip(measures, values, strict=True)}
        cost = {"parameters": result["parameters"], "multiply-adds": result["multiply_adds"]}
        return {**beside, **cost, "seconds": round(result["seconds"], 1)}
