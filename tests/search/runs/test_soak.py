"""Two thousand trials by several processes, which are killed at random, as is their database: nothing is lost or done twice."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess

import numpy as np
import sqlalchemy as sa

from reference.cell import Cell
from search.runs.store import Key, Reader
from tests.postgres import Server, running_server
from tests.search.runs import free_search
from tests.search.runs.free_search import COMPARED, NAME, compared, expected

TRIALS, PROCESSES = 2000, 6
FAULTS = {"kill": 24, "terminate": 12, "pause": 6, "cut": 6, "restart": 4, "crash": 4}
_POLL = 0.02  # seconds


class Crowd:
    """Processes that work on one search. Whoever falls is replaced by a new one."""

    def __init__(self, server: Server) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([free_search.__name__])  # so that a new process is there in milliseconds
        self._server, self.url = server, server.create_database()
        self._engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
        self._members = [self._start() for _ in range(PROCESSES)]
        self._paused: list[BaseProcess] = []
        self.ended: list[BaseProcess] = []

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
                process, self._members[index] = self._members[index], self._start()
                _send(process, number)
                (self._paused if fault == "pause" else self.ended).append(process)

    def go_on(self) -> None:
        """Wake the paused processes, whose jobs others may have taken over."""
        for process in self._paused:
            _send(process, signal.SIGCONT)
        self.ended += self._paused
        self._paused = []

    def finished(self) -> int:
        """How many jobs are finished by now, while somebody works on others."""
        assert any(process.is_alive() for process in self._members)
        there = sa.inspect(self._engine).has_table("dpc_jobs")
        return self._query("SELECT count(*) FROM dpc_jobs WHERE state <> 'running'") if there else 0

    def join(self) -> None:
        """Wait until all have ended."""
        self.go_on()
        self.ended += self._members
        for process in self.ended:
            process.join()

    def kill(self) -> None:
        for process in self._members + self._paused + self.ended:
            process.kill()

    def _start(self) -> BaseProcess:
        process = self._context.Process(target=free_search.search, args=(self.url, TRIALS))
        process.start()
        return process

    def _query(self, text: str) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(sa.text(text)).scalar_one())


def _send(process: BaseProcess, number: signal.Signals) -> None:
    if process.is_alive():
        os.kill(process.pid or 0, number)


@contextmanager
def crowd() -> Iterator[Crowd]:
    with running_server() as server:
        members = Crowd(server)
        try:
            yield members
        finally:
            members.kill()


def test_processes_and_their_database_are_killed_and_every_trial_is_as_if_nothing_had_happened() -> None:
    rng = np.random.default_rng(0)
    faults = rng.permutation([fault for fault, times in FAULTS.items() for _ in range(times)])
    with crowd() as members:
        for fault, due in zip(faults, np.linspace(20, TRIALS - 100, len(faults)), strict=True):
            while members.finished() < due:
                time.sleep(_POLL)
            members.go_on()
            members.meet(fault, int(rng.integers(PROCESSES)))
        members.join()
        reader = Reader(members.url, NAME)
        trials, comparisons, running = reader.finished(search=True), reader.finished(search=False), reader.running()
        curves = [reader.curve(row.key) for row in trials]
        reader.close()
    assert Counter(process.exitcode for process in members.ended) == {0: ..., -signal.SIGKILL: FAULTS["kill"]}
