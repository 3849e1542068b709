"""What a search's trials cost to keep, as cases: our store beside plain Optuna, each in a database of its own."""

import multiprocessing
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch

from bench.cases import OURS, Case, Parts, Provider, Suite, Workload
from bench.costs import Mode
from bench.postgres import postgres, programs

if TYPE_CHECKING:  # which needs Optuna and SQLAlchemy; other suites do not
    from bench.study_stores import Keeper

Database = Literal["SQLite", "PostgreSQL"]
ASK_TELL, LOAD, REPORT, AT_ONCE = "ask + tell", "load", "report", "trials of many processes"
OPTUNA = Provider("Optuna")
OPTUNA_PAPER = Provider("Optuna, paper's sampler")


MOST_OF_OPTUNA = 1000  # trials in a study of many processes, each of which holds them all in its memory
PROCESSES_OF_OPTUNA = 8  # the most; 64 need 14 GB with 1,000 trials, and ours 6 GB with 28,000


class Place(NamedTuple):
    """Where a provider keeps its trials: a database of its own, and a folder."""

    url: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class StudyCase(Case):
    """Something that is done with a search of so many finished trials; what, is the case's name.

    `ASK_TELL` is one trial more, whose cell takes no time; the first one in a fresh process reads what there is. `LOAD` reads
    all trials, and `REPORT` makes the page of them too. `AT_ONCE` is `at_once` trials of so many processes together.
    """

    suite: Suite = "study"
    mode: Mode = "storage"
    seconds: float = 120.0
    trials: int
    database: Database = "SQLite"
    processes: int = 1
    at_once: int = 1
    places: Mapping[str, Place] = field(default_factory=dict)  # of each provider, once they are filled

    @property
    def shape(self) -> str:
        many = f", {self.at_once} by {self.processes} processes" if self.processes > 1 else ""
        return f"{self.trials:,} trials, {self.database}{many}"

    def cost(self, element_bytes: int) -> None:
        return None

    def small(self) -> Self:
        return replace(self, trials=3, database="SQLite", processes=1, at_once=1, places={})

    @contextmanager
    def set_up(self, providers: Sequence[Provider]) -> Iterator[Self]:
        from bench.study_stores import new_database

        with ExitStack() as stack:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-study-")))
            server = stack.enter_context(postgres()) if self.database == "PostgreSQL" else None
            places = dict[str, Place]()
            for number, provider in enumerate(providers):
                folder = root / f"provider{number}"
                folder.mkdir()
                url = f"sqlite:///{folder / 'study.db'}" if server is None else new_database(server, folder.name)
                places[provider.name] = Place(url, folder)
                self._keeper(provider, places[provider.name]).fill(self.trials)
            yield replace(self, places=places)

    def beside(self) -> tuple[Provider, ...]:
        """Who does it. Only we make a page; and many processes of Optuna need too much memory."""
        if self.name == REPORT or (self.processes > 1 and self.trials > MOST_OF_OPTUNA):
            return (OURS,)
        return (OURS, OPTUNA) if self.name == LOAD else (OURS, OPTUNA, OPTUNA_PAPER)

    def _keeper(self, provider: Provider, place: Place) -> "Keeper":
        from bench.study_stores import OptunaKeeper, OptunaWithPaperSampler, OurKeeper

        keepers: dict[Provider, type[Keeper]] = {OURS: OurKeeper, OPTUNA: OptunaKeeper, OPTUNA_PAPER: OptunaWithPaperSampler}
        return keepers[provider](*place)

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        """Kept where `set_up` said, or else in a new place of its own."""
        if provider.name in self.places:
            processes = self.processes if provider.is_ours else min(self.processes, PROCESSES_OF_OPTUNA)
            return _OfStudy(self, self._keeper(provider, self.places[provider.name]), processes)
        stack = ExitStack()
        case = stack.enter_context(self.set_up([provider]))
        workload = case.workload(provider, dtype, device)
        weakref.finalize(workload, stack.close)
        return workload

    def truth(self, dtype: str) -> Parts:
        """The scores, as they depend on the trials' numbers, of those that there were and those that a first call has told."""
        from bench.study_stores import score_of

        told = self.at_once if self.name in (ASK_TELL, AT_ONCE) else 0
        told += self.processes if self.processes > 1 else 0
        return {"output": [torch.tensor([score_of(number) for number in range(self.trials + told)], dtype=torch.float64)]}


@dataclass(frozen=True)
class StudyScale:
    """How many trials are kept."""

    trials: tuple[int, ...]  # finished ones, ascending
    processes: int  # in one study
    at_once: int  # trials of these processes together
    databases: tuple[Database, ...] = ("SQLite", "PostgreSQL")

    def cases(self, device: torch.device) -> Iterator[StudyCase]:
        """Those of all cases that this machine can measure."""
        for case in () if _why_not(device) else self.all_cases():
            if case.database == "SQLite" or programs():
                yield case

    def all_cases(self) -> Iterator[StudyCase]:
        filled = [trials for trials in self.trials if trials]
        for database in self.databases:
            yield from (StudyCase(name=ASK_TELL, trials=trials, database=database) for trials in self.trials)
            yield from (StudyCase(name=LOAD, trials=trials, database=database) for trials in filled)
        yield StudyCase(name=REPORT, trials=self.trials[-1])
        if "PostgreSQL" in self.databases:
            many: dict[str, Any] = {"database": "PostgreSQL", "processes": self.processes, "at_once": self.at_once}
            yield from (StudyCase(name=AT_ONCE, trials=trials, **many) for trials in filled)

    def omissions(self, device: torch.device) -> Iterator[str]:
        """What is left out, and why."""
        if reason := _why_not(device):
            yield f"the suite study: {reason}"
            return
        if "PostgreSQL" in self.databases and not programs():
            yield "studies in PostgreSQL, and those of many processes: it is not installed"
            return
        if self.processes > PROCESSES_OF_OPTUNA:
            yield f"{self.processes} processes of plain Optuna: {PROCESSES_OF_OPTUNA} do their trials, for want of memory"
        if self.trials[-1] > MOST_OF_OPTUNA:
            yield f"many processes of plain Optuna at {self.trials[-1]:,} trials: each would hold all trials in its memory"


def _why_not(device: torch.device) -> str:
    """Why no trials are kept here; "" if they are."""
    if device.type != "cpu":
        return "no GPU takes part, so --device cpu measures it"
    missing = [name for name in ("optuna", "sqlalchemy") if find_spec(name) is None]
    return f"it needs {' and '.join(missing)}" if missing else ""


class _OfStudy(Workload):
    def __init__(self, case: StudyCase, keeper: "Keeper", processes: int) -> None:
        self._case, self._keeper = case, keeper
        self._together = Together(keeper, processes) if processes > 1 else None
        weakref.finalize(self, keeper.close)

    def __call__(self) -> None:
        match self._case.name:
            case _ if self._together:
                self._together(self._case.at_once)
            case str(name) if name in (ASK_TELL, AT_ONCE):
                self._keeper.ask_and_tell()
            case str(name) if name == LOAD:
                self._keeper.load()
            case _:
                self.written_bytes = self._keeper.report()

    def parts(self) -> Parts:
        scores = [float("nan") if score is None else score for score in self._keeper.load()]
        return {"output": [torch.tensor(scores, dtype=torch.float64)]}


class Together:
    """So many processes that wait for trials to do; each has opened the study and done one."""

    def __init__(self, keeper: "Keeper", processes: int) -> None:
        context = multiprocessing.get_context("fork")  # which shares the memory of the libraries
        self._left = context.Value("i", 0)
        pipes = [context.Pipe() for _ in range(processes)]
        self._connections = [ours for ours, _ in pipes]
        workers = [context.Process(target=_work, args=(keeper, theirs, self._left), daemon=True) for _, theirs in pipes]
        for worker in workers:
            worker.start()
        weakref.finalize(self, _end, self._connections, workers)
        self._wait()

    def __call__(self, trials: int) -> None:
        """Do so many trials."""
        self._left.value = trials
        for connection in self._connections:
            connection.send(True)
        self._wait()

    def _wait(self) -> None:
        for connection in self._connections:
            if failure := connection.recv():
                raise RuntimeError(failure)


def _work(keeper: "Keeper", connection: Connection, left: Any) -> None:
    try:
        keeper.ask_and_tell()
        connection.send(None)
        while connection.recv():
            while True:
                with left:
                    left.value -= 1
                    if left.value < 0:
                        break
                keeper.ask_and_tell()
            connection.send(None)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}"[:300])
    finally:
        keeper.close()


def _end(connections: Sequence[Connection], workers: Sequence[Any]) -> None:
    for connection in connections:
        connection.send(False)
    for worker in workers:
        worker.join()
