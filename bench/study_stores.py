"""What keeps the trials of a search: plain Optuna as anyone would use it, and the store of `search/runs/`.

Each keeps the same of a trial: its cell, its score, its result, and a loss curve of 100 points. Cells are drawn by whoever
keeps them; a score is a function of the trial's number, so that nobody can lose one unseen.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState

from reference.cell import Cell
from search.cells.sampler import PaperSampler, params_of_cell, suggest_cell
from search.cells.space import SearchSpace
from search.runs.store import COMPLETE, SEARCH, Key, Reader, Row, SearchPlan, Store, Told

CURVE_POINTS = 100
RESULT: dict[str, Any] = {  # as `search.tasks.proxy.ProxyResult`, without score and curve
    "details": [0.5 + k / 100 for k in range(19)],  # a score for each class
    "parameters": 4_512_345,
    "multiply_adds": 12_345_678_901,
    "seconds": 12.3,
    "peak_memory_bytes": 1_234_567_890,
}
LOSS_CURVE = [(300 * k, round(2.5 / (1 + k / 10), 6)) for k in range(CURVE_POINTS)]  # (iteration, loss)
SEED = 0
LAG = 63  # of the paper's sampler, enough for 64 processes
_NAME = "search"  # of the run and of the study
_ROWS = 20_000  # inserted at once


def score_of(number: int) -> float:
    """The score of a trial, in 0.3..0.7.

    >>> score_of(0), round(score_of(1), 3)
    (0.3, 0.547)
    """
    return 0.3 + 0.4 * (number * 0.6180339887498949 % 1)


def _told(number: int) -> Told:
    score = score_of(number)
    return Told(score, RESULT["multiply_adds"], json.dumps(RESULT), json.dumps(LOSS_CURVE))


def drawn_cells(trials: int) -> Iterator[Cell]:
    """Cells for a store that is to be filled."""
    space, rng = SearchSpace(), np.random.default_rng(SEED)
    return (space.sample(rng) for _ in range(trials))


class Keeper(ABC):
    """Keeps the trials of one search in a database of its own; opens it at its first use, as a process that starts."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    @abstractmethod
    def fill(self, trials: int) -> None:
        """Put so many finished trials into the empty database, by another way than one after the other."""

    @abstractmethod
    def ask_and_tell(self) -> None:
        """One trial, from the proposal of its cell to its result on the disk."""

    @abstractmethod
    def load(self) -> Sequence[float | None]:
        """Read all trials as a process that starts: their scores, by number."""

    def report(self) -> int:
        """Write the page of all trials, as a process that starts -> its bytes."""
        raise NotImplementedError("no page of its own")


class OurKeeper(Keeper):
    """The store of a search, with the paper's sampler."""

    _PLAN = SearchPlan(trials=10**9, compare={}, comparison_seeds=0, seed=SEED)

    @cached_property
    def _store(self) -> Store:
        return Store(self.url, _NAME, "{}")

    @cached_property
    def _sampler(self) -> PaperSampler:
        return PaperSampler(SearchSpace(), seed=SEED, lag=LAG)

    def fill(self, trials: int) -> None:
        space, curve = SearchSpace(), json.dumps(LOSS_CURVE)
        rows, curves = list[Row](), dict[Key, str]()
        for number, cell in enumerate(drawn_cells(trials)):
            told, form = _told(number), space.canonical_form(cell).to_json()
            costs = told.score, told.multiply_adds
            rows.append(Row(Key(SEARCH, number), COMPLETE, cell.to_json(), form, *costs, None, None, told.result, 0.0))
            curves[Key(SEARCH, number)] = curve
        store = Store(self.url, _NAME, "{}")
        store.fill(rows, curves)
        store.close()

    def ask_and_tell(self) -> None:
        while (claim := self._store.claim(self._PLAN, SearchSpace(), self._sampler)) is None:
            time.sleep(0.002)  # until a trial is finished that the sampler has to know
        self._store.tell(claim.key, _told(claim.key.number))

    def load(self) -> Sequence[float | None]:
        reader = Reader(self.url, _NAME)
        scores = [row.score for row in reader.finished(search=True)]
        reader.close()
        return scores


class OptunaKeeper(Keeper):
    """Plain Optuna: a study with a sampler; results and curves are user attributes."""

    def sampler(self) -> optuna.samplers.BaseSampler:
        return optuna.samplers.RandomSampler(SEED)

    @cached_property
    def _study(self) -> optuna.Study:
        return self._opened()

    def _opened(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.load_study(study_name=_NAME, storage=self.url, sampler=self.sampler())

    def fill(self, trials: int) -> None:
        """`study.add_trials` would take some milliseconds a trial, so the rows are made here, as Optuna makes them."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        optuna.create_study(study_name=_NAME, storage=self.url, direction="maximize")
        engine = sa.create_engine(self.url)
        with engine.begin() as connection:
            study_id = connection.execute(sa.select(models.StudyModel.study_id)).scalar_one()
            for model, rows in _rows_of(trials, study_id).items():
                for start in range(0, len(rows), _ROWS):
                    connection.execute(sa.insert(model), rows[start : start + _ROWS])
        engine.dispose()

    def ask_and_tell(self) -> None:
        trial = self._study.ask()
        suggest_cell(trial, SearchSpace())
        trial.set_user_attr("result", RESULT)
        trial.set_user_attr("loss_curve", LOSS_CURVE)
        self._study.tell(trial, score_of(trial.number))

    def load(self) -> Sequence[float | None]:
        return [trial.value for trial in self._opened().get_trials(deepcopy=False)]


class OptunaWithPaperSampler(OptunaKeeper):
    """The same with the paper's sampler in the study."""

    def sampler(self) -> optuna.samplers.BaseSampler:
        return PaperSampler(SearchSpace(), seed=SEED, lag=LAG)


def new_database(server: str, name: str) -> str:
    """Make a database on the server, a URL -> the URL of the new one."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return engine.url.set(database=name).render_as_string(hide_password=False)


def _rows_of(trials: int, study_id: int) -> dict[type[Any], list[dict[str, Any]]]:
    """The rows of finished trials in Optuna's tables, whose first ones they are: trial n has the id n + 1."""
    space, now = SearchSpace(), datetime.now(UTC).replace(tzinfo=None)
    space_of = PaperSampler(space, seed=SEED).infer_relative_search_space
    distributions: dict[str, Any] = space_of(optuna.create_study(), optuna.trial.create_trial(value=0.0))
    as_json = {name: distribution_to_json(distribution) for name, distribution in distributions.items()}
    places = {name: {choice: float(k) for k, choice in enumerate(d.choices)} for name, d in distributions.items()}
    attributes = {"result": json.dumps(RESULT), "loss_curve": json.dumps(LOSS_CURVE)}
    rows: dict[type[Any], list[dict[str, Any]]] = {
        model: []
        for model in (models.TrialModel, models.TrialParamModel, models.TrialValueModel, models.TrialUserAttributeModel)
    }
    finished = {"study_id": study_id, "state": TrialState.COMPLETE, "_datetime_start_utc": now, "_datetime_complete_utc": now}
    value_type = models.TrialValueModel.TrialValueType.FINITE
    for number, cell in enumerate(drawn_cells(trials)):
        of_trial = {"trial_id": number + 1}
        rows[models.TrialModel].append({"number": number, **finished})
        rows[models.TrialParamModel] += [
            of_trial | {"param_name": name, "param_value": places[name][choice], "distribution_json": as_json[name]}
            for name, choice in params_of_cell(cell, space).items()
        ]
        value = {"objective": 0, "value": score_of(number), "value_type": value_type}
        rows[models.TrialValueModel].append(of_trial | value)
        rows[models.TrialUserAttributeModel] += [of_trial | {"key": k, "value_json": v} for k, v in attributes.items()]
    return rows
