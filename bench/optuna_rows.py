"""Writes finished trials straight into Optuna's tables, as Optuna would: its `add_trials` takes some milliseconds a trial."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState

from reference.cell import Cell
from search.cells.sampler import distributions_of, params_of_cell
from search.cells.space import SearchSpace

_ROWS = 20_000  # inserted at once


class ScoredCell(NamedTuple):
    """A finished trial."""

    cell: Cell
    score: float


def create_filled_study(
    url: str, name: str, space: SearchSpace, trials: Sequence[ScoredCell], attributes: Mapping[str, Any]
) -> None:
    """Make a study of these trials, each with these user attributes, in a database that has no trials yet."""
    storage = optuna.storages.RDBStorage(url)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    with storage.engine.begin() as connection:
        for model, rows in _rows(study._study_id, space, trials, attributes).items():
            for start in range(0, len(rows), _ROWS):
                connection.execute(sa.insert(model), rows[start : start + _ROWS])
    storage.engine.dispose()


def _rows(
    study_id: int, space: SearchSpace, trials: Sequence[ScoredCell], attributes: Mapping[str, Any]
) -> dict[type[Any], list[dict[str, Any]]]:
    """The rows of each table, in the order of numbers: the database gives trial n the id n + 1."""
    now = datetime.now(UTC).replace(tzinfo=None)
    finished = {"study_id": study_id, "state": TrialState.COMPLETE, "_datetime_start_utc": now, "_datetime_complete_utc": now}
    value = {"objective": 0, "value_type": models.TrialValueModel.TrialValueType.FINITE}
    shown = [{"key": key, "value_json": json.dumps(content)} for key, content in attributes.items()]
    of_space: Mapping[str, Any] = distributions_of(space)
    as_json = {name: distribution_to_json(distribution) for name, distribution in of_space.items()}
    index = {name: {choice: float(k) for k, choice in enumerate(d.choices)} for name, d in of_space.items()}

    def params(cell: Cell) -> Iterator[dict[str, Any]]:
        for name, choice in params_of_cell(cell, space).items():
            yield {"param_name": name, "param_value": index[name][choice], "distribution_json": as_json[name]}

    numbered = list(enumerate(trials, start=1))
    return {
        models.TrialModel: [{"number": trial_id - 1, **finished} for trial_id, _ in numbered],
        models.TrialParamModel: [{"trial_id": i, **param} for i, trial in numbered for param in params(trial.cell)],
        models.TrialValueModel: [{"trial_id": i, **value, "value": trial.score} for i, trial in numbered],
        models.TrialUserAttributeModel: [{"trial_id": i, **attribute} for i, _ in numbered for attribute in shown],
    }
