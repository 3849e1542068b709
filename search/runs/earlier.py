"""Runs of earlier versions, whose jobs were trials of Optuna's studies: all that they held is taken over into the store."""

import json
from collections.abc import Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from reference.cell import Cell
from search.cells.sampler import cell_from_params
from search.cells.space import SearchSpace
from search.runs.mirror import optunas_storage
from search.runs.tables import COMPLETE, FAILED, RUNNING, SEARCH, Begun, Key, Row


class EarlierRun:
    """The finished and interrupted jobs of such a run, and their loss curves. Raises KeyError if there is no such run."""

    def __init__(self, url: str, name: str, space: SearchSpace) -> None:
        names = [f"{name} {part}" for part in ("search", "comparison")]
        _require_studies(url, names)
        self._space = space
        self._curves: dict[Key, str] = {}
        with optunas_storage(url, name) as storage:
            studies = [optuna.load_study(storage=storage, study_name=each) for each in names]
            search, comparison = (study.get_trials(deepcopy=False) for study in studies)
        rows = [row for trial in search if (row := self._row(trial, SEARCH, trial.number))]
        for trial in comparison:
            told = trial.user_attrs | trial.system_attrs
            if "name" in told and (row := self._row(trial, told["name"], told["seed"])) and row.state != RUNNING:
                rows.append(row)
        self.begun = Begun(rows, self._curves)

    def _row(self, trial: FrozenTrial, name: str, number: int) -> Row | None:
        """None for a trial that was killed before it had a cell, and what came of no cell."""
        told: dict[str, Any] = trial.user_attrs | trial.system_attrs
        try:
            is_whole = isinstance(told.get("cell"), list)
            cell = Cell.from_json(json.dumps(told["cell"])) if is_whole else cell_from_params(trial.params, self._space)
        except ValueError:
            return None
        key, form = Key(name, number), self._space.canonical_form(cell).to_json() if name == SEARCH else ""
        when = None if trial.datetime_complete is None else trial.datetime_complete.timestamp()
        result = told.get("result") if trial.state == TrialState.COMPLETE else None
        if result is not None:
            self._curves[key] = json.dumps(result.pop("loss_curve"))
        return Row(
            key=key,
            state=RUNNING if trial.state == TrialState.FAIL and "failure" not in told else _STATES.get(trial.state, RUNNING),
            cell=cell.to_json(),
            form=form,
            score=trial.values[0] if result is not None else None,
            multiply_adds=result["multiply_adds"] if result is not None else None,
            duplicate_of=told.get("duplicate_of"),
            failure=told.get("failure"),
            result=json.dumps(result) if result is not None else None,
            finished=when,
        )


def _require_studies(url: str, names: Sequence[str]) -> None:
    """Raise KeyError if one of these studies is not there. Nothing is written, as Optuna does where it has no tables."""
    query = sa.select(models.StudyModel.study_name).where(models.StudyModel.study_name.in_(names))
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            has_studies = sa.inspect(connection).has_table(models.StudyModel.__tablename__)
            found = set(connection.execute(query).scalars()) if has_studies else set()
    finally:
        engine.dispose()
    if missing := set(names) - found:
        raise KeyError(min(missing))


_STATES = {TrialState.COMPLETE: COMPLETE, TrialState.FAIL: FAILED}
