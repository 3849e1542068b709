"""A run on disk: its settings, trials and results, and how it continues after an interruption.

Its folder holds `settings.json`, and an Optuna storage (`study.db`, SQLite, or any database by URL) with two studies: the
search, one trial per cell, and the comparison, one trial per known or winning cell and seed. Each trial has its cell and its
result as attributes, so the run is complete without any other file: whole as system attributes, which dashboards do not show,
and what people look for as user attributes. One process writes; a file lock, which ends with its process, keeps a second one
out. A trial that was interrupted is still RUNNING in the study and is evaluated again, as the same trial.
"""

import json
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from reference.cell import GRID_SIZES, RATES, Cell
from reference.dense_prediction_cell import rate_multiplier_for
from reference.grid import Grid
from search.cells.reach import FeatureMaps
from search.cells.space import SearchSpace, canonical_form
from search.commands import spelled
from search.dense_tasks import DenseTask, Scores, details_beside, measures_beside, restored_task
from search.errors import InputError
from search.folder import Folder
from search.interrupts import ctrl_c_waits
from search.settings import (
    BackboneSettings,
    DataSettings,
    FeatureSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    plain,
    restored,
)
from search.tasks.proxy import ProxyResult


@dataclass(frozen=True)
class TrialRecord:
    """One cell of the search, finished: with a result, or a failure and its reason."""

    number: int
    cell: Cell
    result: ProxyResult | None
    failure: str | None
    duplicate_of: int | None

    @property
    def score(self) -> float | None:
        return self.result.score if self.result else None

    @property
    def multiply_adds(self) -> int | None:
        return self.result.multiply_adds if self.result else None


@dataclass(frozen=True)
class BaselineRecord:
    """A known cell ("linear", "dpc"), or the search's best again ("trial 7"), scored by the same proxy with its own seed."""

    name: str
    seed: int
    cell: Cell
    result: ProxyResult


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run's data, features and cells, as they were given; its cells are trained again with these."""

    data: DataSettings
    backbone: BackboneSettings
    features: FeatureSettings
    head: HeadSettings
    machine: MachineSettings
    loss: LossSettings = LossSettings()

    @classmethod
    def restored(cls, content: dict[str, Any]) -> "RunSettings":
        """Read what `plain` made of it."""
        return cls(
            restored(DataSettings, content["data"]),
            restored(BackboneSettings, content["backbone"]),
            restored(FeatureSettings, content["features"]),
            restored(HeadSettings, content["head"]),
            restored(MachineSettings, content["machine"]),
            restored(LossSettings, content.get("loss", {})),  # earlier runs had none
        )


@dataclass(frozen=True)
class Run:
    """All that a finished or interrupted run holds."""

    directory: Path
    identity: dict[str, Any]  # the settings that its scores depend on
    command: str
    task: DenseTask
    settings: RunSettings
    space: SearchSpace
    trials: list[TrialRecord]  # finished ones, by number
    baselines: list[BaselineRecord]

    def curve(self, record: TrialRecord | BaselineRecord) -> tuple[tuple[int, float], ...]:
        """The training loss of a scored cell: (iteration, loss)."""
        return record.result.loss_curve if record.result else ()


FOUND = "trial "  # before the number of a trial: the name of the search's best cell among the compared ones


def comparison_label(name: str, known: Mapping[str, str] | None = None) -> str:
    """The printed name of a compared cell; for a found one it says that the search had scored it before."""
    return f"{name} again" if name.startswith(FOUND) else (known or {}).get(name, name)


class Study:
    """The two Optuna studies of a run, for the process that writes. They must exist if no sampler is given."""

    @ctrl_c_waits()
    def __init__(
        self, directory: Path, url: str, run_id: str, task: DenseTask, sampler: optuna.samplers.BaseSampler | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory = directory
        self._task = task
        self._storage = optuna.storages.RDBStorage(url)
        create = partial(optuna.create_study, direction="maximize", load_if_exists=True)
        opened: Callable[..., optuna.Study] = optuna.load_study if sampler is None else create
        self.search = opened(storage=self._storage, study_name=f"{run_id} search", sampler=sampler)
        random = optuna.samplers.RandomSampler()
        self.comparison = opened(storage=self._storage, study_name=f"{run_id} comparison", sampler=random)
        if sampler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                for study in (self.search, self.comparison):  # also of a run that was begun without
                    study.set_metric_names([task.score.name])

    @ctrl_c_waits()
    def unfinished(self) -> list[optuna.Trial]:
        """Trials of the search that an earlier process left behind, by number."""
        return [self._revive(self.search, frozen) for frozen in _with_state(self.search, TrialState.RUNNING)]

    @ctrl_c_waits()
    def tell(self, study: optuna.Study, number: int, cell: Cell, result: ProxyResult, **attributes: Any) -> None:
        """Record a result: all attributes first, the state last, so that a trial is either complete or will be done again."""
        whole = {"cell": json.loads(cell.to_json()), "result": asdict(result)}
        self._set_attributes(study, number, attributes | self._shown(cell, result), whole)
        study.tell(number, result.score)

    @ctrl_c_waits()
    def tell_failure(self, number: int, cell: Cell, reason: str) -> None:
        """Record that a cell of the search has no score, and why."""
        shown, whole = {"cell": str(cell), "failure": reason}, {"cell": json.loads(cell.to_json())}
        self._set_attributes(self.search, number, shown, whole)
        self.search.tell(number, state=TrialState.FAIL)

    @ctrl_c_waits()
    def tell_comparison_failure(self, number: int, name: str, seed: int, reason: str) -> None:
        """Record that a comparison has no score, and why; it is not tried again."""
        self._set_attributes(self.comparison, number, {"name": name, "seed": seed, "failure": reason})
        self.comparison.tell(number, state=TrialState.FAIL)

    @ctrl_c_waits()
    def compared(self, name: str) -> set[int]:
        """The seeds with which `name` was scored or has failed; an interrupted comparison does not count."""
        told = [_attributes(frozen) for frozen in _with_state(self.comparison, TrialState.COMPLETE)]
        failed = map(_attributes, _with_state(self.comparison, TrialState.FAIL))
        told += [attributes for attributes in failed if "failure" in attributes]
        return {attributes["seed"] for attributes in told if attributes["name"] == name}

    @ctrl_c_waits()
    def discard_unfinished_comparisons(self) -> None:
        """Close comparison trials that an earlier process left unfinished; they hold nothing before they are told."""
        for frozen in _with_state(self.comparison, TrialState.RUNNING):
            self.comparison.tell(frozen.number, state=TrialState.FAIL)

    @ctrl_c_waits()
    def records(self) -> list[TrialRecord]:
        finished = _with_state(self.search, TrialState.COMPLETE, TrialState.FAIL)
        return [_trial_record(frozen) for frozen in finished if "cell" in _attributes(frozen)]

    @ctrl_c_waits()
    def baselines(self) -> list[BaselineRecord]:
        records = []
        for frozen in _with_state(self.comparison, TrialState.COMPLETE):
            attributes = _attributes(frozen)
            cell, result = _cell(attributes), _result(attributes["result"])
            records.append(BaselineRecord(attributes["name"], attributes["seed"], cell, result))
        return records

    def _revive(self, study: optuna.Study, frozen: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(study, frozen._trial_id)  # parameters that its sampler had not proposed yet are proposed now

    def _shown(self, cell: Cell, result: ProxyResult) -> dict[str, Any]:
        """What a dashboard shows of a scored cell, beside the score."""
        measures, values = measures_beside(self._task), details_beside(self._task, [result.scores])
        beside = {measure.heading: value for measure, value in zip(measures, values, strict=True)}
        cost = {"parameters": result.parameters, "multiply-adds": result.multiply_adds}
        return {"cell": str(cell), **beside, **cost, "seconds": round(result.seconds, 1)}

    def _set_attributes(
        self, study: optuna.Study, number: int, shown: Mapping[str, Any], whole: Mapping[str, Any] | None = None
    ) -> None:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        for key, value in shown.items():
            self._storage.set_trial_user_attr(trial_id, key, value)
        for key, value in (whole or {}).items():
            self._storage.set_trial_system_attr(trial_id, key, value)


@contextmanager
def open_run(
    directory: Path,
    identity: dict[str, Any],
    sampler: optuna.samplers.BaseSampler,
    *,
    storage: str | None,
    command: str,
    task: DenseTask,
    settings: RunSettings,
    space: SearchSpace,
    defaults: Mapping[str, Any],
) -> Iterator[Study]:
    """Begin a run or continue it; `defaults` as in `Folder.check`.

    Raises InputError for other settings, a second process, or an unwritable folder.
    """
    url = _storage_url(directory, storage)
    folder = Folder(directory)
    try:
        with folder.locked():
            before = folder.description()
            run_id = _run_id(folder, before) if before else _new_id(directory)
            description = {"id": run_id, "storage": storage, "settings": plain(asdict(settings))}
            description |= task.describe() | {"space": plain(asdict(space))}
            folder.begin(identity, command, defaults=defaults, **description)
            yield Study(directory, url, run_id, task, sampler)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
        raise InputError(f"the study {url} cannot be used ({_first_line(error)}): check `storage` and the disk") from error
    except OSError as error:
        raise InputError(f"cannot write {directory} ({error}): give another `out`, or make room and run again") from error


def load_run(directory: Path) -> Run:
    """Read a run, also while another process writes it. Raises InputError for a folder that is none."""
    description = Folder(directory, remedy="give the folder of a search that this version began").description()
    if description is None:
        raise InputError(f"{directory} is not a run (no settings.json): give the folder of a run of `{spelled('random')}`")
    try:
        run_id, url = str(description["id"]), _storage_url(directory, description["storage"])
        identity, command = dict(description["identity"]), str(description["command"])
        task = restored_task(description)
        settings = RunSettings.restored(description["settings"])
        space = _restored_space(description["space"]) if "space" in description else _earlier_space(identity)
    except (OSError, ValueError, KeyError, TypeError) as error:
        path = directory / "settings.json"
        raise InputError(f"{path} is damaged ({error}): delete the run {directory} and start it again") from error
    try:
        study = _study_of(directory, url, run_id, task)
        trials, baselines = study.records(), study.baselines()
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the study of {directory} cannot be read: {_first_line(error)}") from error
    return Run(directory, identity, command, task, settings, space, trials, baselines)


def _restored_space(content: dict[str, Any]) -> SearchSpace:
    """Read what `plain` made of a space."""
    maps = content["maps"] and restored(FeatureMaps, content["maps"])
    num_inputs = content.get("num_inputs", 1)  # earlier runs had one
    return SearchSpace(content["num_branches"], tuple(content["rates"]), tuple(content["grid_sizes"]), maps, num_inputs)


def _earlier_space(identity: Mapping[str, Any]) -> SearchSpace:
    """The space of a run that was begun before spaces were written down: the paper's, on maps of these sizes."""
    grid = Grid(identity["output_stride"])
    whole, crop = (
        grid.features((height, width))
        for height, width in (identity["image_size"], identity["crop_size"] or identity["image_size"])
    )
    maps = FeatureMaps(whole, crop, rate_multiplier_for(grid.stride), identity["pooling"])
    return SearchSpace(identity["branches"], RATES, GRID_SIZES, maps)


def _new_id(directory: Path) -> str:
    """The name of a run's studies: that of its folder, for people, and what tells it apart in a shared database."""
    return f"{directory.absolute().name} {uuid.uuid4().hex[:8]}"


def _run_id(folder: Folder, description: dict[str, Any]) -> str:
    if "id" not in description:
        raise InputError(f"{folder.path / 'settings.json'} is damaged ('id'): delete the run {folder.path} and start it again")
    return str(description["id"])


def _study_of(directory: Path, url: str, run_id: str, task: DenseTask) -> Study:
    """Open the existing study. Opening an absent SQLite file would create it, so that is refused."""
    file = url.removeprefix("sqlite:///")
    if file != url and not Path(file).is_file():
        raise InputError(f"the study of {directory} is not at {file}: copy that file too, or begin where it is named from")
    return Study(directory, url, run_id, task)


def ranked(records: list[TrialRecord]) -> list[TrialRecord]:
    """The distinct cells that have a score, best first; of equal cells, scored by several workers, the first."""
    first: dict[Cell, TrialRecord] = {}
    for record in records:
        if record.result is not None and record.duplicate_of is None:
            first.setdefault(canonical_form(record.cell), record)
    return sorted(first.values(), key=lambda record: -record.result.score if record.result else 0.0)


def _storage_url(directory: Path, storage: str | None) -> str:
    """The URL of the storage; by default of the file beside the settings, also if the folder was moved."""
    return storage or f"sqlite:///{directory.absolute() / 'study.db'}"


def _with_state(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return sorted(study.get_trials(deepcopy=False, states=states), key=lambda frozen: frozen.number)


def _trial_record(frozen: FrozenTrial) -> TrialRecord:
    attributes = _attributes(frozen)
    result = _result(attributes["result"]) if frozen.state == TrialState.COMPLETE else None
    return TrialRecord(frozen.number, _cell(attributes), result, attributes.get("failure"), attributes.get("duplicate_of"))


def _attributes(frozen: FrozenTrial) -> dict[str, Any]:
    """All attributes of a trial; the whole cell and result are user attributes of runs that an earlier version began."""
    return frozen.user_attrs | frozen.system_attrs


def _cell(attributes: dict[str, Any]) -> Cell:
    return Cell.from_json(json.dumps(attributes["cell"]))


def _result(fields: dict[str, Any]) -> ProxyResult:
    curve = tuple((iteration, loss) for iteration, loss in fields["loss_curve"])
    return ProxyResult(**{**fields, "scores": Scores.restored(fields["scores"]), "loss_curve": curve})


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
