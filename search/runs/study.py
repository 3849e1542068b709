"""A run on disk: its settings, what its jobs came to, and how it continues after an interruption.

Its folder holds `settings.json`, and `study.db` unless the jobs are on a database server (`search.runs.store`). One process
writes into the folder; a file lock, which ends with its process, keeps others out. On a server they may help it nevertheless:
they claim jobs of the same run, and leave the folder alone.
"""

import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from optuna.exceptions import OptunaError, StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from fast.segmentation import SegmentationHead
from reference.cell import GRID_SIZES, RATES, Cell
from reference.dense_prediction_cell import rate_multiplier_for
from reference.grid import Grid
from search.cells.reach import FeatureMaps
from search.cells.sampler import CellSampler
from search.cells.space import SearchSpace, canonical_form
from search.commands import spelled
from search.dense_tasks import DenseTask, Scores, restored_task
from search.errors import InputError, require_file_name
from search.files import write_whole
from search.folder import Folder, InUseError, differences
from search.interrupts import ctrl_c_waits
from search.runs.database import is_server, require_answer, shown
from search.runs.earlier import EarlierRun
from search.runs.halving import Halving
from search.runs.mirror import Mirror
from search.runs.reader import Reader
from search.runs.store import Claim, SearchPlan, Store, Told
from search.runs.tables import BEST_HEAD, FOUND, RUNNING, SEARCH, Key, Row
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
from search.tasks.proxy import CostKind, ProxyResult

Curve = tuple[tuple[int, float], ...]  # (iteration, training loss)
HEADS = "heads"  # folder in a run's for the heads that are kept


@dataclass(frozen=True)
class TrialRecord:
    """One cell of the search, finished: with a result, or a failure and its reason.

    A run may have many, so its cell and its result are read from JSON where they are asked for. The result has no loss curve,
    which is read by `Run.curve`.
    """

    number: int
    cell_json: str
    form: str  # JSON of the canonical form in the space
    score: float | None
    multiply_adds: int | None
    result_json: str | None
    failure: str | None
    duplicate_of: int | None
    rung: int = 0  # the highest one that it has a score of, if the search is cut short; that is the score

    @classmethod
    def of(cls, number: int, cell: Cell, result: ProxyResult | None, failure: str | None, duplicate_of: int | None) -> Self:
        """A record of this cell and result."""
        cost = None if result is None else result.multiply_adds
        score, content = (None, None) if result is None else (result.score, _result_json(result))
        form = canonical_form(cell).to_json()
        return cls(number, cell.to_json(), form, score, cost, content, failure, duplicate_of)

    @cached_property
    def cell(self) -> Cell:
        return Cell.from_json(self.cell_json)

    @cached_property
    def result(self) -> ProxyResult | None:
        return None if self.result_json is None else _result(self.result_json)

    def cost(self, kind: CostKind) -> float:
        """Multiply-adds or latency of a trial with a score. Raises ValueError for a latency that was not measured."""
        if kind == "multiply_adds" and self.multiply_adds is not None:
            return self.multiply_adds
        assert self.result is not None
        return self.result.cost(kind)


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
    planned: int | None = None  # number of trials that it was to have when it last went on; None if nobody knows
    curves: Mapping[int, Curve] = field(default_factory=dict, compare=False)  # loss curves by trial; may read them when asked
    rungs: tuple[int, ...] = ()  # their iterations, if the search is cut short (`search.runs.halving`); the last are all
    rung_scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # by trial: on each rung that it has reached

    @property
    def cost_kind(self) -> CostKind | None:
        """What its cells are to have little of, beside a great score."""
        found: CostKind | Literal["none"] = self.identity.get("second_objective", "none")  # earlier runs had none
        return None if found == "none" else found

    def curve(self, record: TrialRecord | BaselineRecord) -> Curve:
        """The loss curve of a trial or a comparison; empty if it has none."""
        return self.curves.get(record.number, ()) if isinstance(record, TrialRecord) else record.result.loss_curve


def best_head(directory: Path) -> Path:
    """Where a run keeps the head of its best cell."""
    return head_path(directory, BEST_HEAD)


def head_path(directory: Path, name: str) -> Path:
    """Where a run keeps the head of this name. Raises InputError for a name that would lead out of the folder."""
    return directory / HEADS / f"{require_file_name(name, f'a head of {directory}')}.safetensors"


def comparison_label(name: str, known: Mapping[str, str] | None = None) -> str:
    """The printed name of a compared cell; for a found one it says that the search had scored it before."""
    return f"{name} again" if name.startswith(FOUND) else (known or {}).get(name, name)


class Study:
    """The jobs of a run, for a process that works on them; what people look at is written beside.

    `file_of` makes the content of a head's file. `hold` locks the run's folder and says whether this process may write there.
    """

    @ctrl_c_waits()
    def __init__(
        self,
        directory: Path,
        url: str,
        store: Store,
        task: DenseTask,
        space: SearchSpace,
        sampler: CellSampler,
        file_of: Callable[[SegmentationHead], bytes],
        *,
        hold: Callable[[], bool] = lambda: True,
    ) -> None:
        self.directory = directory
        self._hold = hold
        self.holds_folder = hold()
        self.store = store
        self.sampler = sampler
        self._space, self._file_of = space, file_of
        self._mirror: Mirror | None = None
        rungs = () if store.state.rungs is None else store.state.rungs.halving.rungs
        self._open_mirror = partial(Mirror, url, store.name, task, space, rungs, store.cost_kind)
        self._reader = Reader(url, store.name, store.engine)
        self._heads = 0  # revision up to which the folder has the heads
        self.store.sync()
        self.show()

    @ctrl_c_waits()
    def claim(self, plan: SearchPlan) -> Claim | None:
        """The next job of this process (`Store.claim`)."""
        return self.store.claim(plan, self._space, self.sampler)

    @ctrl_c_waits()
    def tell(self, key: Key, result: ProxyResult, head: SegmentationHead | None = None, state: bytes | None = None) -> bool:
        """Record a result, and its head and the state of its training if they are to be kept (`Store.tell`)."""
        content = self._file_of(head) if head is not None and self.store.keeps_head(key, result.score) else None
        curve, kept = json.dumps(result.loss_curve), state if self.store.keeps_state(key, result.score) else None
        return self.store.tell(key, Told(result.score, result.multiply_adds, _result_json(result), curve, content, kept))

    @ctrl_c_waits()
    def tell_failure(self, key: Key, reason: str) -> bool:
        """Record that a cell has no score, and why; it is not tried again (`Store.tell_failure`)."""
        return self.store.tell_failure(key, reason)

    def show(self) -> None:
        """Write what was finished since into Optuna's studies, and heads into the folder if this process holds it."""
        while not self.store.patiently(self._update_mirror):
            pass
        if self.holds_folder:
            for name, content, revision in self.store.new_heads(self._heads):
                write_whole(head_path(self.directory, name), content)
                self._heads = revision

    @ctrl_c_waits()
    def _update_mirror(self) -> bool:
        """Add to Optuna's studies, or make them; returns whether all is there, or another process is at it."""
        with self._reader.alone(writes=self._mirror is not None) as connection:
            if connection is None:
                return True
            if self._mirror is not None and self._mirror.is_there(connection):
                return self._mirror.update(connection, self._reader)
            if self._mirror is not None:
                self._mirror = None
                return False
            try:
                self._mirror = self._open_mirror()  # by connections of its own
            except StorageInternalError as error:  # Optuna's name for an error of the database
                raise error.__cause__ or error from None
            return False

    def take_folder(self) -> bool:
        """Whether this process writes into the run's folder: that which did may have died."""
        if not self.holds_folder and self._hold():
            self.holds_folder = True
            self.show()
        return self.holds_folder

    def close(self) -> None:
        """Give back unfinished jobs."""
        for part in (self.store, self._reader):
            part.close()


@contextmanager
def open_run(
    directory: Path,
    identity: dict[str, Any],
    sampler: CellSampler,
    file_of: Callable[[SegmentationHead], bytes],
    *,
    storage: str | None,
    command: str,
    task: DenseTask,
    settings: RunSettings,
    space: SearchSpace,
    defaults: Mapping[str, Any],
    trials: int | None = None,
    halving: Halving | None = None,
    cost_kind: CostKind | None = None,
) -> Iterator[Study]:
    """Begin a run or continue it, or help the process that holds its folder, if the jobs are on a server.

    `trials` is what people are told of how many there will be; `defaults` as in `Folder.check`; `halving` says how it is cut
    short, `cost_kind` what cells are to have little of beside a great score. Raises InputError for other settings, a second
    process on a file, or an unwritable folder.
    """
    url = storage_url(directory, storage)
    folder = Folder(directory)
    try:
        with ExitStack() as stack:
            holds_folder = _hold(folder, stack, url)
            before = folder.description()
            name = _run_id(folder, before) if before else new_name(directory, url)
            folder.check(identity, defaults)
            store = stack.enter_context(closing(_open_store(url, name, identity, defaults, space, halving, cost_kind)))
            if before is None and is_server(url) and store.sync().next:
                print(f"the database has a run {name} with these settings, which goes on", file=sys.stderr)
            description = {"id": name, "storage": storage, "settings": plain(asdict(settings)), "trials": trials}
            description |= task.describe() | {"space": plain(asdict(space))}
            description["rungs"] = [] if halving is None else list(halving.rungs)
            begin = partial(folder.begin, identity, command, defaults=defaults, **description)
            if holds_folder:
                begin()  # only now: a folder of a run that is refused would refuse what is right
            else:
                print(f"{directory} is in use: this process helps the one that holds it", file=sys.stderr)

            def hold() -> bool:
                if holds_folder:
                    return True
                if is_held := _hold(folder, stack, url):
                    begin()  # whoever held it may not have got so far
                return is_held

            arguments = directory, url, store, task, space, sampler, file_of
            study = stack.enter_context(closing(Study(*arguments, hold=hold)))
            yield study
    except (SQLAlchemyError, OptunaError, ImportError) as error:
        raise unusable(url, error) from error
    except OSError as error:
        raise InputError(f"cannot write {directory} ({error}): give another `out`, or make room and run again") from error


def identity_before(directory: Path, storage: str | None) -> dict[str, Any] | None:
    """What the run was begun with, here or, of a database server, anywhere; None for a new one.

    Raises InputError if the database cannot be used.
    """
    if before := Folder(directory).description():
        return dict(before["identity"])
    url = storage_url(directory, storage)
    if not is_server(url):
        return None
    try:
        with closing(Reader(url, new_name(directory, url))) as reader:
            return reader.identity()
    except KeyError:
        return None
    except (SQLAlchemyError, ImportError) as error:
        raise unusable(url, error) from error


def unusable(url: str, error: Exception) -> InputError:
    """The error for a database that does not work."""
    return InputError(f"the study {shown(url)} cannot be used ({_first_line(error)}): {_remedy(url)}")


def _remedy(url: str) -> str:
    if not is_server(url):
        return "check `storage` and the disk"
    form = "postgresql+psycopg://user@host/database"
    return f"check that the server answers, `storage` ({form}), and the password in ~/.pgpass or PGPASSWORD"


def require_storage(storage: str | None) -> None:
    """Raise InputError for a database server that cannot be used; of a file, nothing is known before it is there."""
    if storage is not None and is_server(storage):
        try:
            require_answer(storage)
        except (SQLAlchemyError, ImportError) as error:
            raise unusable(storage, error) from error


def _hold(folder: Folder, stack: ExitStack, url: str) -> bool:
    """Lock the folder. False if another process has it, and may be helped."""
    try:
        stack.enter_context(folder.locked())
    except InUseError as error:
        if not is_server(url):
            raise InputError(
                f"{error}; on a database server (`storage`) the same command, typed again, helps the first one"
            ) from error
        return False
    return True


def _open_store(
    url: str,
    name: str,
    identity: dict[str, Any],
    defaults: Mapping[str, Any],
    space: SearchSpace,
    halving: Halving | None,
    cost_kind: CostKind | None,
) -> Store:
    """The run's jobs; those of an earlier version are taken over."""
    shared = {field: value for field, value in identity.items() if field != "storage"}  # which each host may spell its way
    text = json.dumps(shared)
    now = json.loads(text)
    earlier = _earlier_run(url, name, space)
    store = Store(url, name, text, earlier.begun if earlier else None, halving=halving, cost_kind=cost_kind)
    if different := differences(json.loads(store.identity), now, defaults):
        store.close()
        raise InputError(
            f"run {name} in the database was started with {different}: use the same values, or give another `out`"
        )
    return store


def _earlier_run(url: str, name: str, space: SearchSpace) -> EarlierRun | None:
    """A run of an earlier version that is not taken over yet."""
    try:
        Reader(url, name).close()
    except KeyError:
        try:
            return EarlierRun(url, name, space)
        except KeyError:
            return None
    return None


def load_run(directory: Path) -> Run:
    """Read a run, also while processes work on it. Raises InputError for a folder that is none."""
    description = Folder(directory, remedy="give the folder of a search that this version began").description()
    if description is None:
        raise InputError(f"{directory} is not a run (no settings.json): give the folder of a run of `{spelled('random')}`")
    try:
        name, url = str(description["id"]), storage_url(directory, description["storage"])
        identity, command = dict(description["identity"]), str(description["command"])
        task = restored_task(description)
        settings = RunSettings.restored(description["settings"])
        space = restored_space(description["space"]) if "space" in description else _earlier_space(identity)
        rungs = tuple(map(int, description.get("rungs", ())))  # earlier runs had none
    except (OSError, ValueError, KeyError, TypeError) as error:
        path = directory / "settings.json"
        raise InputError(f"{path} is damaged ({error}): delete the run {directory} and start it again") from error
    try:
        require_file(directory, url)
        trials, baselines, curves, rung_scores = _records(url, name, space)
    except InputError:
        raise
    except (SQLAlchemyError, OptunaError, ImportError, ValueError, KeyError, TypeError) as error:
        text = f"the study of {directory} cannot be read ({_first_line(error)})"
        raise InputError(f"{text}: {_remedy(url)}") from error
    planned = description.get("trials")
    return Run(directory, identity, command, task, settings, space, trials, baselines, planned, curves, rungs, rung_scores)


class _Records(NamedTuple):
    trials: list[TrialRecord]
    baselines: list[BaselineRecord]
    curves: Mapping[int, Curve]
    rung_scores: Mapping[int, tuple[float, ...]]


def _records(url: str, name: str, space: SearchSpace) -> _Records:
    if earlier := _earlier_run(url, name, space):
        finished = sorted((row for row in earlier.begun.rows if row.state != RUNNING), key=lambda row: row.key.number)
        of_search = [row for row in finished if row.key.name == SEARCH]
        compared = [(row, earlier.begun.curves.get(row.key)) for row in earlier.begun.rows if row.key.name != SEARCH]
        curves = {key.number: _curve(text) for key, text in earlier.begun.curves.items() if key.name == SEARCH}
        return _Records([_trial_record(row) for row in of_search], _baselines(compared), curves, {})
    with closing(Reader(url, name)) as reader:
        of_search = reader.finished(search=True)
        scores = reader.rung_scores()  # read after the rows: they have no rung that is not there
        compared = [(row, reader.curve(row.key)) for row in reader.finished(search=False)]
    scores |= {row.key.number: scores[row.duplicate_of] for row in of_search if row.duplicate_of in scores}
    trials = [_trial_record(row, scores.get(row.key.number, ())) for row in of_search]
    return _Records(trials, _baselines(compared), _Curves(url, name), scores)


class _Curves(Mapping[int, Curve]):
    """The loss curves of trials, each read when it is asked for; a run may have too many to hold them all."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name

    def __getitem__(self, number: int) -> Curve:
        with closing(Reader(self._url, self._name)) as reader:
            text = reader.curve(Key(SEARCH, number))
        if text is None:
            raise KeyError(number)
        return _curve(text)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[int]:
        with closing(Reader(self._url, self._name)) as reader:
            yield from (row.key.number for row in reader.finished(search=True) if row.result is not None)


def _trial_record(row: Row, rung_scores: tuple[float, ...] = ()) -> TrialRecord:
    rung = max((rung for rung, score in enumerate(rung_scores) if score == row.score), default=0)
    return TrialRecord(
        row.key.number, row.cell, row.form, row.score, row.multiply_adds, row.result, row.failure, row.duplicate_of, rung
    )


def _baselines(compared: list[tuple[Row, str | None]]) -> list[BaselineRecord]:
    return [
        BaselineRecord(row.key.name, row.key.number, Cell.from_json(row.cell), _result(row.result, curve or "[]"))
        for row, curve in compared
        if row.result is not None
    ]


def restored_space(content: dict[str, Any]) -> SearchSpace:
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


def new_name(directory: Path, url: str) -> str:
    """The name of a new run: on a server that of its folder, by which others find it; in a file one that no other has."""
    name = directory.absolute().name
    return name if is_server(url) else f"{name} {uuid.uuid4().hex[:8]}"


def _run_id(folder: Folder, description: dict[str, Any]) -> str:
    if "id" not in description:
        raise InputError(f"{folder.path / 'settings.json'} is damaged ('id'): delete the run {folder.path} and start it again")
    return str(description["id"])


def require_file(directory: Path, url: str) -> None:
    """Refuse an absent SQLite file, which would be created."""
    file = url.removeprefix("sqlite:///")
    if file != url and not Path(file).is_file():
        raise InputError(f"the study of {directory} is not at {file}: copy that file too, or begin where it is named from")


def ranked(records: list[TrialRecord]) -> list[TrialRecord]:
    """The distinct cells that have a score, best first; of equal cells, scored by several workers, the first.

    Where a search is cut short, one that was trained longer is before those that were not: it was better than they were then.
    """
    first: dict[str, TrialRecord] = {}
    for record in records:
        if record.score is not None and record.duplicate_of is None:
            first.setdefault(record.form, record)
    return sorted(first.values(), key=lambda record: (-record.rung, -record.score if record.score is not None else 0.0))


def storage_url(directory: Path, storage: str | None) -> str:
    """The URL of the storage; by default of the file beside the settings, also if the folder was moved."""
    return storage or f"sqlite:///{directory.absolute() / 'study.db'}"


def _result_json(result: ProxyResult) -> str:
    """A result without its loss curve."""
    return json.dumps({name: value for name, value in asdict(result).items() if name != "loss_curve"})


def _result(text: str, curve: str = "[]") -> ProxyResult:
    fields = json.loads(text)
    return ProxyResult(**{**fields, "scores": Scores.restored(fields["scores"]), "loss_curve": _curve(curve)})


def _curve(text: str) -> Curve:
    return tuple((iteration, loss) for iteration, loss in json.loads(text))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
