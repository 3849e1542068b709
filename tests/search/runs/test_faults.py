"""What breaks while a search runs, one fault at a time: its jobs come to what they would have come to."""

import gc
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psycopg
import pytest
import timm
import torch
from sqlalchemy.exc import OperationalError

from reference.cell import Cell
from search.runs import store
from search.runs.reader import Reader
from search.runs.study import load_run
from tests.search.runs.free_search import NAME, Finished, expected, search
from tests.search.test_random import BACKBONE, write_camvid

ROOT = Path(__file__).parents[3]
TRIALS = 24
PATIENCE = 200  # seconds for a process to do what it is to do


def found(url: str) -> Finished:
    """Cell and score of all jobs, all of which are finished."""
    with closing(Reader(url, NAME)) as reader:
        assert reader.running() == []
        rows = reader.finished(search=True) + reader.finished(search=False)
    assert len(rows) == len({row.key for row in rows})
    return {row.key: (Cell.from_json(row.cell), row.score) for row in rows}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Optuna leaves a connection open if one breaks
@pytest.mark.parametrize("is_written", [True, False], ids=["written", "not_written"])
def test_a_connection_that_breaks_during_a_commit_loses_no_job(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """Nobody can tell then whether the change is there."""
    commit, rng, broken = psycopg.Connection.commit, np.random.default_rng(0), []

    def break_some(connection: psycopg.Connection) -> None:
        is_in_transaction = connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE
        if is_in_transaction and rng.random() < 0.15:
            if is_written:
                commit(connection)
            connection.close()
            broken.append(connection)
            raise psycopg.OperationalError("the connection is lost")
        commit(connection)

    search(database, 0, tmp_path, tmp_path / "log")  # makes the tables
    monkeypatch.setattr(psycopg.Connection, "commit", break_some)
    monkeypatch.setattr(store, "_sleep", lambda seconds: time.sleep(seconds / 100))  # before it tries again
    search(database, TRIALS, tmp_path, tmp_path / "log")
    monkeypatch.undo()
    gc.collect()  # while the warning is ignored
    assert len(broken) > 5
    assert found(database) == expected(TRIALS)


def test_no_time_of_day_decides_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of machines differ, and are set; so a run is the same by a clock that jumps to and fro."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(time, "time", lambda: float(rng.uniform(0, 4e9)))
    search(url := f"sqlite:///{tmp_path / 'study.db'}", TRIALS, tmp_path, tmp_path / "log")
    monkeypatch.undo()
    assert found(url) == expected(TRIALS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB, which may be made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_the_search_which_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{small_disk / 'study.db'}"
    with pytest.raises(OperationalError, match="disk is full"):
        search(url, 400, tmp_path, tmp_path / "log")
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    with closing(Reader(url, NAME)) as reader:
        assert reader.num_finished(search=True) > 0
    search(url, 400, tmp_path, tmp_path / "log")
    assert found(url) == expected(400)


# The command itself


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of a search of six cells that takes seconds."""
    folder = tmp_path_factory.mktemp("camvid")
    write_camvid(folder / "camvid")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model(BACKBONE).state_dict(), folder / "weights.pth")
    values = {"dataset": "camvid", "data-dir": folder / "camvid", "backbone": BACKBONE, "weights": folder / "weights.pth"}
    values |= {"cache-dir": folder / "cache", "device": "cpu", "trials": 6, "iterations": 8, "batch-size": 4, "branches": 2}
    values |= {"branch-channels": 8, "lag": 1, "compare": "linear"}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


Start = Callable[[list[str], Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command, which does not outlive the test."""
    started = []

    def start(flags: list[str], out: Path) -> "subprocess.Popen[str]":
        started.append(_start(flags, out))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE)


def _start(flags: list[str], out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "search.random", *flags, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_AUTH_MODE", None)  # as users start it
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[str]") -> str:
    """What it said on stderr until it ended, which it did in good order."""
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    return error


def wait_for_trials(process: "subprocess.Popen[str]", out: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while trials_in(out) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trials_in(out: Path) -> int:
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{out}/study.db?mode=ro", uri=True)) as connection:
        query = "SELECT count(*) FROM dpc_jobs WHERE name = '' AND state = 'complete'"
        return int(connection.execute(query).fetchone()[0])
    return 0


def cells_and_scores(out: Path) -> list[tuple[object, ...]]:
    run = load_run(out)
    trials = [(record.number, record.cell, record.score, run.curve(record)) for record in run.trials]
    return trials + [(each.name, each.seed, each.cell, each.result.score) for each in run.baselines]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(_start(flags, out))
    return cells_and_scores(out)


def test_a_killed_command_comes_to_the_same_and_a_second_one_beside_it_is_refused(
    start: Start, flags: list[str], undisturbed: list[tuple[object, ...]], tmp_path: Path
) -> None:
    for count in (1, 3):
        process = start(flags, tmp_path / "run")
        wait_for_trials(process, tmp_path / "run", count)
        os.kill(process.pid, signal.SIGSTOP)  # so that it does not finish meanwhile
        if count == 1:
            second = start(flags, tmp_path / "run")
            _, error = second.communicate(timeout=PATIENCE)
            words = r"error: \S+ is in use by another process: .* on a database server \(--storage\) the same command, .*"
            assert re.fullmatch(words, error.splitlines()[-1])
            assert second.returncode == 2
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    finish(start(flags, tmp_path / "run"))
    assert cells_and_scores(tmp_path / "run") == undisturbed


def test_sigterm_stops_a_command_with_workers_of_ray(start: Start, flags: list[str], tmp_path: Path) -> None:
    """Ray has a handler of its own, by which the process would end without a word."""
    process = start([*flags, "--trials", "1000", "--workers", "2"], tmp_path / "run")
    wait_for_trials(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, error
    assert error.endswith("stopped; the same command goes on from here\n")
    assert "Traceback" not in error
