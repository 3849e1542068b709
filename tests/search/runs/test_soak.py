"""Two thousand trials by several processes that are killed at random, as is their database: nothing is lost or done twice."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy as sa

from reference.cell import Cell
from search.cells.sampler import cell_from_params
from search.runs.halving import Halving
from search.runs.reader import Reader
from search.runs.tables import COMPLETE, SEARCH
from search.tasks.proxy import CostKind
from tests.postgres import Server, running_server
from tests.search.runs import free_search
from tests.search.runs.free_search import HALVING, NAME, SPACE, expected, expected_of_halving

TRIALS, TRIALS_CUT_SHORT, TRIALS_OF_TWO, PROCESSES = 2000, 100, 120, 6
FAULTS = {"kill": 16, "terminate": 8, "pause": 4, "cut": 4, "restart": 3, "crash": 3}
FEWER_FAULTS = {"kill": 3, "terminate": 1, "pause": 1, "crash": 1}
_POLL = 0.05  # seconds


class Crowd:
    """Processes that work on one search. Whoever falls is replaced by a new one. `logs` is for what they say."""

    def __init__(self, server: Server, logs: Path, trials: int, halving: Halving | None, cost: CostKind | None) -> None:
        self._trials, self._kind = trials, (halving, cost)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([free_search.__name__])  # so that a new process is there in milliseconds
        self._server, self.url, self._logs = server, server.create_database(), logs
        self._engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
        self._paused: list[BaseProcess] = []
        self._killed: list[BaseProcess] = []
        self._left: list[BaseProcess] = []  # that end by themselves, sooner or later
        self._members = [self._start() for _ in range(PROCESSES)]

    def meet(self, fault: str, index: int) -> None:
        """Let this happen to the database, or to the process of this index."""
        match fault:
            case "crash":
                self._server.kill()
                self._server.start()
            case "restart":
                self._server.stop()
                self._server.start()
            case "cut":
                self._query("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            case _:
                number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "pause": signal.SIGSTOP}[fault]
                process = self._members[index]
                os.kill(process.pid or 0, number)
                {"kill": self._killed, "terminate": self._left, "pause": self._paused}[fault].append(process)
                self._members[index] = self._start()

    def wake(self) -> None:
        """Let paused processes go on, whose jobs others may have taken over."""
        for process in self._paused:
            os.kill(process.pid or 0, signal.SIGCONT)
        self._left += self._paused
        self._paused = []

    def finished(self) -> int:
        """How many jobs are finished by now, while somebody works on the others."""
        self._check(self._left + self._members)
        assert any(process.is_alive() for process in self._members)
        there = sa.inspect(self._engine).has_table("dpc_jobs")
        return self._query("SELECT count(*) FROM dpc_jobs WHERE state <> 'running' OR result IS NOT NULL") if there else 0

    def join(self) -> None:
        """Wait until all have ended, those that were not killed in good order."""
        self.wake()
        for process in self._left + self._members:
            process.join()
        self._check(self._left + self._members)

    def kill(self) -> None:
        self._engine.dispose()
        for process in self._members + self._paused + self._killed + self._left:
            process.kill()
            process.join()

    def _start(self) -> BaseProcess:
        log = self._logs / f"{len(list(self._logs.iterdir()))}"
        log.touch()
        process = self._context.Process(
            target=free_search.search,
            args=(self.url, self._trials, self._logs / "run", log, *self._kind),
            name=str(log),
        )
        process.start()
        return process

    def _check(self, processes: list[BaseProcess]) -> None:
        """That none ended by an error; one that was told to end before it had begun has the signal's own code."""
        for process in processes:
            assert process.exitcode in {None, 0, -signal.SIGTERM}, Path(process.name).read_text(encoding="utf-8")

    def _query(self, text: str) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(sa.text(text)).scalar_one())


@contextmanager
def crowd(logs: Path, trials: int, halving: Halving | None = None, cost: CostKind | None = None) -> Iterator[Crowd]:
    with running_server() as server:
        members = Crowd(server, logs, trials, halving, cost)
        try:
            yield members
        finally:
            members.kill()


def soak(members: Crowd, faults: Mapping[str, int], until: int) -> None:
    """Let these faults happen in a random order until so many trials are finished, and wait for the end."""
    rng = np.random.default_rng(0)
    order = rng.permutation([fault for fault, times in faults.items() for _ in range(times)])
    for fault, due in zip(order, np.linspace(20, until, len(order)), strict=True):
        while members.finished() < due:
            time.sleep(_POLL)
        members.wake()
        members.meet(fault, int(rng.integers(PROCESSES)))
    members.join()


def test_processes_and_their_database_are_killed_and_every_job_is_finished_once_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    with crowd(tmp_path, TRIALS) as members:
        soak(members, FAULTS, until=TRIALS - 100)
        with closing(Reader(members.url, NAME)) as reader:
            rows, running = reader.finished(search=True) + reader.finished(search=False), reader.running()
            with_curve = {row.key for row in rows if reader.curve(row.key) is not None}
            storage = optuna.storages.RDBStorage(members.url)
            trials = optuna.load_study(study_name=f"{NAME} search", storage=storage).trials
            storage.engine.dispose()
            mirrored = {trial.number: (cell_from_params(trial.params, SPACE), trial.value) for trial in trials}
            assert len(mirrored) == len(trials)
    assert running == []
    assert len(rows) == len({row.key for row in rows})
    assert {row.key: (Cell.from_json(row.cell), row.score) for row in rows} == expected(TRIALS)
    assert mirrored == {key.number: found for key, found in expected(TRIALS).items() if key.name == SEARCH}
    assert with_curve == {row.key for row in rows if row.state == COMPLETE}


def test_a_search_that_is_cut_short_has_the_same_jobs_and_results_whatever_is_killed(tmp_path: Path) -> None:
    with crowd(tmp_path, TRIALS_CUT_SHORT, HALVING) as members:
        soak(members, FEWER_FAULTS, until=TRIALS_CUT_SHORT)
        with closing(Reader(members.url, NAME)) as reader:
            rows, running = reader.finished(search=True) + reader.finished(search=False), reader.running()
            jobs = [(number, rung) for number, rung, _ in reader.logged(0, 10_000)]
    found = {row.key: (Cell.from_json(row.cell), row.score) for row in rows}
    assert running == []
    assert len(rows) == len(found)
    assert (found, jobs) == expected_of_halving(TRIALS_CUT_SHORT, HALVING)


def test_a_search_with_two_objectives_has_the_same_cells_whatever_is_killed(tmp_path: Path) -> None:
    with crowd(tmp_path, TRIALS_OF_TWO, cost="multiply_adds") as members:
        soak(members, FEWER_FAULTS, until=TRIALS_OF_TWO)
        with closing(Reader(members.url, NAME)) as reader:
            rows, running = reader.finished(search=True) + reader.finished(search=False), reader.running()
    assert running == []
    assert len(rows) == len({row.key for row in rows})
    assert {row.key: (Cell.from_json(row.cell), row.score) for row in rows} == expected(TRIALS_OF_TWO, "multiply_adds")
