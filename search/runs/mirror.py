"""The finished jobs of a run as two Optuna studies in the same database, for people: dashboards, plots, `optuna.load_study`.

The store (`search.runs.store`) is what a search reads and writes; nothing here is read again. Trials come in the order of
their numbers, which are the same in both, so a slow cell holds back those after it. Where a search is cut short, a trial has
the score of its last rung, and those of all as intermediate values; as long as it is not trained in full, it is pruned.
Studies of these names that are no such copies are those of an earlier version, whose content the store has taken over: copies
take their place.

Rows are written by Optuna's own tables and not by its functions: those take a transaction for every trial, so that a process
that dies, or is suspended while another one does its work, would leave a trial out or write it twice. Besides, they take fifty
times as long. A test holds what is written to what Optuna writes.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from itertools import count, takewhile
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from reference.cell import Cell
from search.cells.sampler import distributions_of, params_of_cell
from search.cells.space import SearchSpace
from search.dense_tasks import DenseTask, Scores, details_beside, measures_beside
from search.errors import InputError
from search.runs.reader import Reader
from search.runs.tables import FAILED, SEARCH, Key, Row, cost_in
from search.tasks.proxy import COST_NAMES

_COPY = "copy of the table", "dpc_jobs"  # a user attribute of these studies
_JOBS = "jobs of the search in it"  # a user attribute of the study of a search that is cut short
_AT_ONCE = 500  # trials in a transaction; it may take a second


class Mirror:
    """The studies `<name> search` and `<name> comparison`, which are made if they are not there.

    `rungs` are the iterations of each, if the search is cut short; `cost_kind` is the second objective, if there is one.
    Raises InputError if Optuna cannot use its tables there.
    """

    def __init__(
        self,
        url: str,
        name: str,
        task: DenseTask,
        space: SearchSpace,
        rungs: tuple[int, ...] = (),
        cost_kind: str | None = None,
    ) -> None:
        self._task, self._space, self._rungs, self._cost_kind = task, space, rungs, cost_kind
        self._in_full: set[int] = set()  # of the trials at hand, those with a score on the last rung
        self._distributions = {name: (each, distribution_to_json(each)) for name, each in distributions_of(space).items()}
        with optunas_storage(url, name) as storage:
            self._search, self._comparison = (self._open(storage, f"{name} {part}") for part in ("search", "comparison"))

    def is_there(self, connection: sa.Connection) -> bool:
        """Whether both studies are there: anybody may delete one in a dashboard."""
        query = sa.select(sa.func.count()).where(models.StudyModel.study_id.in_((self._search, self._comparison)))
        return int(connection.execute(query).scalar_one()) == 2

    def update(self, connection: sa.Connection, reader: Reader) -> bool:
        """Add what was finished since, or a part of it, in the transaction of `Reader.alone`; returns whether it was all."""
        with Session(connection, join_transaction_mode="rollback_only") as session:
            first = self._count(session, self._search)
            rows = reader.finished(search=True, after=first - 1, at_most=_AT_ONCE)
            in_order = [row for row, number in takewhile(lambda each: each[0].key.number == each[1], zip(rows, count(first)))]
            # All is read before a row is written: many rows lock a file of SQLite, also for the reader.
            self._find_in_full(reader, in_order)
            first_compared, compared = self._count(session, self._comparison), list[Row]()
            if first_compared < reader.num_finished(search=False):
                there = self._compared(session)
                compared = [row for row in reader.finished(search=False) if row.key not in there]
            self._add(session, self._search, first, in_order)
            is_all = not self._rungs or self._go_on(session, reader, first + len(in_order))
            self._add(session, self._comparison, first_compared, compared)
            session.commit()
        return len(in_order) < _AT_ONCE and is_all

    def _go_on(self, session: Session, reader: Reader, trials: int) -> bool:
        """Add results of rungs to the first `trials`, which are there; returns whether it was all."""
        attribute = models.StudyUserAttributeModel
        of_study = (attribute.study_id == self._search) & (attribute.key == _JOBS)
        there = session.execute(sa.select(attribute).where(of_study)).scalar_one_or_none()
        done = 0 if there is None else int(json.loads(str(there.value_json)))
        jobs = list(takewhile(lambda job: job[0] < trials, reader.logged(done, _AT_ONCE)))
        if not jobs:
            return True
        changed = reader.finished(search=True, of=[number for number, rung, _ in jobs if rung > 0])
        self._find_in_full(reader, changed)
        trial = models.TrialModel
        numbers = sorted({number for number, *_ in jobs} | {row.key.number for row in changed})
        query = sa.select(trial).where((trial.study_id == self._search) & trial.number.in_(numbers))
        trials_of = {int(each.number): each for each in session.execute(query).scalars()}
        for row in changed:
            if row.key.number in trials_of:  # a copy may not be there yet
                self._rewrite(session, trials_of[row.key.number], row)
        finite = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
        for number, rung, score in jobs:
            if score is not None:
                value = {"step": self._rungs[rung], "intermediate_value": score, "intermediate_value_type": finite}
                session.add(models.TrialIntermediateValueModel(trial_id=trials_of[number].trial_id, **value))
        if there is None:
            session.add(attribute(study_id=self._search, key=_JOBS, value_json=json.dumps(len(jobs))))
        else:
            there.value_json = json.dumps(done + len(jobs))
        return len(jobs) < _AT_ONCE

    def _find_in_full(self, reader: Reader, rows: Iterable[Row]) -> None:
        """Learn which of these trials are trained in full, before they are written."""
        if self._rungs and (originals := {_original(row) for row in rows}):
            self._in_full = reader.scored_on(len(self._rungs) - 1, originals)

    def _rewrite(self, session: Session, trial: models.TrialModel, row: Row) -> None:
        """Give a trial what it has come to by now."""
        for table in (models.TrialValueModel, models.TrialUserAttributeModel):
            session.execute(sa.delete(table).where(table.trial_id == trial.trial_id))
        now = self._trial(self._search, row.key.number, row)
        trial.state, trial.datetime_start, trial.datetime_complete = now.state, now.datetime_start, now.datetime_complete
        parts = self._parts(int(trial.trial_id), row)
        session.add_all(part for part in parts if not isinstance(part, models.TrialParamModel))

    def _open(self, storage: optuna.storages.RDBStorage, name: str) -> int:
        with suppress(KeyError):
            before = optuna.load_study(study_name=name, storage=storage)
            if _COPY in before.user_attrs.items():
                return before._study_id
            _delete(storage, before._study_id)
        costs = [] if self._cost_kind is None else [COST_NAMES[self._cost_kind]]
        directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * len(costs)
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([self._task.score.name, *costs])
        study.set_user_attr(*_COPY)  # at last: one that is not whole is made anew
        return study._study_id

    def _count(self, session: Session, study: int) -> int:
        query = sa.select(sa.func.count()).select_from(models.TrialModel).where(models.TrialModel.study_id == study)
        return int(session.execute(query).scalar_one())

    def _compared(self, session: Session) -> set[Key]:
        """The comparisons that are there."""
        attribute = models.TrialUserAttributeModel
        query = sa.select(attribute.trial_id, attribute.key, attribute.value_json).join(models.TrialModel)
        query = query.where((models.TrialModel.study_id == self._comparison) & attribute.key.in_(("name", "seed")))
        found: dict[int, dict[str, Any]] = {}
        for trial, key, value in session.execute(query):
            found.setdefault(trial, {})[key] = json.loads(value)
        return {Key(each["name"], each["seed"]) for each in found.values()}

    def _add(self, session: Session, study: int, first: int, rows: Iterable[Row]) -> None:
        """Add these rows as the trials numbered from `first` on."""
        trials = [(self._trial(study, number, row), row) for number, row in enumerate(rows, first)]
        session.add_all(trial for trial, _ in trials)
        session.flush()  # they get their ids
        for trial, row in trials:
            session.add_all(self._parts(int(trial.trial_id), row))

    def _trial(self, study: int, number: int, row: Row) -> models.TrialModel:
        state = TrialState.COMPLETE
        if row.state == FAILED:
            state = TrialState.FAIL
        elif self._rungs and row.key.name == SEARCH and _original(row) not in self._in_full:
            state = TrialState.PRUNED
        finished = datetime.fromtimestamp(row.finished or 0)  # as Optuna has it: local, without a zone
        seconds = json.loads(row.result)["seconds"] if row.result and row.duplicate_of is None else 0
        start = finished - timedelta(seconds=seconds)
        return models.TrialModel(study_id=study, number=number, state=state, datetime_start=start, datetime_complete=finished)

    def _parts(self, trial: int, row: Row) -> Iterable[models.BaseModel]:
        finite = models.TrialValueModel.TrialValueType.FINITE
        for objective, value in enumerate(self._values(row)):
            yield models.TrialValueModel(trial_id=trial, objective=objective, value=value, value_type=finite)
        params = params_of_cell(Cell.from_json(row.cell), self._space) if row.key.name == SEARCH else {}
        for name, choice in params.items():
            distribution, text = self._distributions[name]
            internal = distribution.to_internal_repr(choice)
            yield models.TrialParamModel(trial_id=trial, param_name=name, param_value=internal, distribution_json=text)
        for key, value in self._attributes(row).items():
            yield models.TrialUserAttributeModel(trial_id=trial, key=key, value_json=json.dumps(value))

    def _values(self, row: Row) -> list[float]:
        """One for each objective; none of a trial that failed."""
        if row.score is None or row.result is None:
            return []
        return [row.score] if self._cost_kind is None else [row.score, cost_in(row.result, self._cost_kind)]

    def _attributes(self, row: Row) -> dict[str, Any]:
        """What a dashboard shows of a job, beside the score."""
        shown: dict[str, Any] = {} if row.key.name == SEARCH else {"name": row.key.name, "seed": row.key.number}
        shown["cell"] = str(Cell.from_json(row.cell))
        if row.duplicate_of is not None:
            shown["duplicate_of"] = row.duplicate_of
        if row.state == FAILED:
            shown["failure"] = row.failure
        if row.result is not None:
            shown |= self._measured(json.loads(row.result))
        return shown

    def _measured(self, result: Mapping[str, Any]) -> dict[str, Any]:
        measures, values = measures_beside(self._task), details_beside(self._task, [Scores.restored(result["scores"])])
        beside = {measure.heading: value for measure, value in zip(measures, values, strict=True)}
        cost = {"parameters": result["parameters"], "multiply-adds": result["multiply_adds"]}
        if result.get("latency") is not None:
            cost["latency"] = result["latency"]
        return {**beside, **cost, "seconds": round(result["seconds"], 1)}


@contextmanager
def optunas_storage(url: str, name: str) -> Iterator[optuna.storages.RDBStorage]:
    """Optuna's tables in this database, which are made if they are not there; no connection outlasts the block.

    Raises InputError if its version has other tables.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(url)
    except RuntimeError as error:
        raise InputError(f"the studies of {name} are of another version of Optuna: install that one ({error})") from error
    try:
        yield storage
    finally:
        storage.remove_session()  # which has a connection of its own
        storage.engine.dispose()


def _original(row: Row) -> int:
    return row.key.number if row.duplicate_of is None else row.duplicate_of


def _delete(storage: optuna.storages.RDBStorage, study: int) -> None:
    """Delete a study at once; Optuna would read all of it before."""
    trials = sa.select(models.TrialModel.trial_id).where(models.TrialModel.study_id == study)
    with storage.engine.begin() as connection:
        for table in reversed(models.BaseModel.metadata.sorted_tables):  # those that refer to others come first
            if "study_id" in table.c:
                connection.execute(table.delete().where(table.c.study_id == study))
            elif "trial_id" in table.c:
                connection.execute(table.delete().where(table.c.trial_id.in_(trials)))
