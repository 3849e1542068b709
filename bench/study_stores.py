"""What keeps the trials of a search: a run of ours, and plain Optuna as anyone would use it.

Each keeps the same of a trial: its cell, its score, its result, and a loss curve of 100 points. A score is a function of the
trial's number, so that nobody can lose one unseen.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa

from bench.optuna_rows import ScoredCell, create_filled_study
from search.cells.reach import FeatureMaps
from search.cells.sampler import suggest_cell
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace
from search.dense_tasks import Scores
from search.dense_tasks.segmentation import Segmentation
from search.folder import Folder
from search.reports.run import write_report
from search.runs.store import SearchPlan, Store
from search.runs.study import RunSettings, Study, load_run, open_run
from search.runs.tables import COMPLETE, SEARCH, Begun, Key, Row
from search.settings import BackboneSettings, DataSettings, FeatureSettings, HeadSettings, MachineSettings, plain
from search.tasks.proxy import ProxyResult

_SPACE = SearchSpace(maps=FeatureMaps(validation=(65, 129), training=(49, 49)))  # the paper's, on Cityscapes
_SEED = 0
_LAG = 63  # of the paper's sampler, enough for 64 processes
_NAME = "search"  # of the run, and of Optuna's study
_CURVE = tuple((300 * k, round(2.5 / (1 + k / 10), 6)) for k in range(100))
_TASK = Segmentation(tuple(f"class {k}" for k in range(19)))
_IDENTITY: dict[str, Any] = {"dataset": "cityscapes", "iterations": 30_000, "crop_size": None, "image_size": [769, 769]}
_SETTINGS = RunSettings(DataSettings(), BackboneSettings(), FeatureSettings(), HeadSettings(), MachineSettings())


def score_of(number: int) -> float:
    """The score of a trial, in 0.3..0.7.

    >>> score_of(0), round(score_of(1), 3)
    (0.3, 0.547)
    """
    return 0.3 + 0.4 * (number * 0.6180339887498949 % 1)


def result_of(number: int) -> ProxyResult:
    """What a trial of the proxy task came to."""
    scores = Scores(score_of(number), tuple(0.5 + k / 100 for k in range(19)))
    return ProxyResult(scores, _CURVE, 804_000, 6 * 10**8 + number * 7919 % 10**9, 12.3, 10**9)


def without_curve(result: ProxyResult) -> dict[str, Any]:
    """The result as JSON has it, beside its loss curve."""
    return {name: value for name, value in asdict(result).items() if name != "loss_curve"}


def drawn_trials(count: int) -> list[ScoredCell]:
    """Trials for a store that is to be filled."""
    rng = np.random.default_rng(_SEED)
    return [ScoredCell(_SPACE.sample(rng), score_of(number)) for number in range(count)]


class Keeper(ABC):
    """Keeps the trials of one search in a database of its own; opens it at its first use, as a process that starts."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._open = ExitStack()

    @abstractmethod
    def fill(self, trials: int) -> None:
        """Put so many finished trials into the empty database, all at once."""

    @abstractmethod
    def ask_and_tell(self) -> None:
        """One trial, from the proposal of its cell to its result on the disk."""

    @abstractmethod
    def load(self) -> Sequence[float | None]:
        """Read all trials as a process that starts: their scores, by number."""

    def report(self) -> int:
        """Write the page of all trials, as a process that starts -> its bytes."""
        raise NotImplementedError("only we have one")

    def close(self) -> None:
        """Close the database, if it is open."""
        self._open.close()


class OurKeeper(Keeper):
    """A run with the paper's sampler, and its mirror for dashboards, as a search writes them."""

    _plan = SearchPlan(trials=10**9, compare={}, comparison_seeds=0, seed=_SEED)

    @cached_property
    def _study(self) -> Study:
        begun = open_run(
            self.folder,
            _IDENTITY,
            PaperSampler(_SPACE, seed=_SEED, lag=_LAG),
            lambda head: b"",
            storage=self.url,
            command="",
            task=_TASK,
            settings=_SETTINGS,
            space=_SPACE,
            defaults={},
        )
        return self._open.enter_context(begun)

    def fill(self, trials: int) -> None:
        drawn = drawn_trials(trials)
        rows = [_row(number, trial) for number, trial in enumerate(drawn)]
        curves = {row.key: json.dumps(_CURVE) for row in rows}
        settings = {"settings": plain(asdict(_SETTINGS)), "space": plain(asdict(_SPACE))}
        Folder(self.folder).begin(_IDENTITY, "", id=_NAME, storage=self.url, **settings, **_TASK.describe())
        Store(self.url, _NAME, json.dumps(_IDENTITY), Begun(rows, curves)).close()
        shown = {"cell": str(drawn[0].cell) if drawn else "", "parameters": 804_000, "multiply-adds": 10**9, "seconds": 12.3}
        create_filled_study(self.url, f"{_NAME} search", _SPACE, drawn, shown)

    def ask_and_tell(self) -> None:
        while (claim := self._study.claim(self._plan)) is None:
            time.sleep(0.002)  # until a trial is finished that the sampler has to know
        self._study.tell(claim.key, result_of(claim.key.number))
        self._study.show()

    def load(self) -> Sequence[float | None]:
        return [record.score for record in load_run(self.folder).trials]

    def report(self) -> int:
        return write_report(load_run(self.folder)).stat().st_size


def _row(number: int, trial: ScoredCell) -> Row:
    result = result_of(number)
    return Row(
        key=Key(SEARCH, number),
        state=COMPLETE,
        cell=trial.cell.to_json(),
        form=_SPACE.canonical_form(trial.cell).to_json(),
        score=trial.score,
        multiply_adds=result.multiply_adds,
        duplicate_of=None,
        failure=None,
        result=json.dumps(without_curve(result)),
        finished=0.0,
    )


class OptunaKeeper(Keeper):
    """Plain Optuna: a study with its random sampler; results and curves are user attributes."""

    def sampler(self) -> optuna.samplers.BaseSampler:
        return optuna.samplers.RandomSampler(_SEED)

    @cached_property
    def _study(self) -> optuna.Study:
        return self._open.enter_context(self._opened())

    @contextmanager
    def _opened(self) -> Iterator[optuna.Study]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.RDBStorage(self.url)
        try:
            yield optuna.load_study(study_name=_NAME, storage=storage, sampler=self.sampler())
        finally:
            storage.engine.dispose()

    def fill(self, trials: int) -> None:
        attributes = {"result": without_curve(result_of(0)), "loss_curve": _CURVE}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        create_filled_study(self.url, _NAME, _SPACE, drawn_trials(trials), attributes)

    def ask_and_tell(self) -> None:
        trial = self._study.ask()
        suggest_cell(trial, _SPACE)
        result = result_of(trial.number)
        trial.set_user_attr("result", without_curve(result))
        trial.set_user_attr("loss_curve", result.loss_curve)
        self._study.tell(trial, result.score)

    def load(self) -> Sequence[float | None]:
        with self._opened() as study:
            return [trial.value for trial in study.get_trials(deepcopy=False)]


class OptunaWithPaperSampler(OptunaKeeper):
    """The same with the paper's sampler in the study, as anyone may use it."""

    def sampler(self) -> optuna.samplers.BaseSampler:
        return PaperSampler(_SPACE, seed=_SEED, lag=_LAG)


def new_database(server: str, name: str) -> str:
    """Make a database on the server, a URL -> the URL of the new one."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return engine.url.set(database=name).render_as_string(hide_password=False)
