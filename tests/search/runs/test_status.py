"""How far a search is, read from outside while it runs, after it, and where there is none."""

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from search.errors import InputError
from search.runs.status import status_lines
from search.runs.store import Claim, Store, Told
from search.runs.tables import SEARCH, Key
from search.settings import known
from tests.search.runs.free_search import SPACE, plan, sampler

ROOT = Path(__file__).parents[3]


def claim(store: Store) -> Claim:
    return known(store.claim(plan(20), SPACE, sampler()))


def begun(url: str) -> Store:
    """A store with two comparisons and three trials done, one of which failed, and one in work."""
    store = Store(url, "run", "{}")
    store.register(3)
    for score in (0.5, 0.25, 0.125, 0.75):
        store.tell(claim(store).key, Told(score, 1, "{}", "[]"))
    store.tell_failure(claim(store).key, "the loss was nan")
    assert claim(store).key == Key(SEARCH, 3)
    return store


def test_a_search_on_a_server_is_told_by_the_name_of_its_folder_alone(database: str, tmp_path: Path) -> None:
    with closing(begun(database)):
        of_trials, best, failed, running, process = status_lines(tmp_path / "run", database)
    assert re.fullmatch(r"run: 3 trials are finished, 1 failed; 2 comparisons are made; [\d,]+ trials an hour", of_trials)
    assert best == "best: trial 1, score 0.7500"
    assert failed == "failed 1 ×: the loss was nan"
    assert re.fullmatch(rf"trial 3: with process {os.getpid()} on \S+, begun \d+ s ago", running)
    assert re.fullmatch(rf"process {os.getpid()} on \S+: 3 at a time, since [-\d]+ [:\d]+", process)


def test_a_job_of_a_process_that_left_is_interrupted(database: str, tmp_path: Path) -> None:
    begun(database).close()
    *_, running, process = status_lines(tmp_path / "run", database)
    assert running.startswith("trial 3: interrupted, to be done again, begun ")
    assert process == "no process works on it: the command that began it goes on"


def test_of_two_objectives_the_trials_on_the_front_are_named(database: str, tmp_path: Path) -> None:
    """Comparisons are none, and the last trial is beaten by the first."""

    def front() -> list[str]:
        return [line for line in status_lines(tmp_path / "run", database) if line.startswith("Pareto")]

    with closing(Store(database, "run", '{"second_objective": "latency"}', cost_kind="latency")) as store:
        assert front() == ["Pareto front of score and latency: no cell yet"]
        for score, latency in ((0.9, 0.1), (0.9, 0.1), (0.5, 1.0), (0.6, 2.0), (0.4, 1.0)):
            store.tell(claim(store).key, Told(score, 1, json.dumps({"latency": latency}), "[]"))
        assert front() == ["Pareto front of score and latency: trials 1, 0"]


@pytest.mark.parametrize("storage", ["none", "server"])
def test_where_there_is_no_search_it_says_so(storage: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = request.getfixturevalue("database") if storage == "server" else None
    words = "has no trials yet" if url else r"is not a run \(no settings\.json\)"
    with pytest.raises(InputError, match=words):
        list(status_lines(tmp_path, url))
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_no_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search.random", "--status", "--out", str(tmp_path / "none"), "--dataset", "cityscapes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+/none is not a run \(no settings\.json\): give the folder of .* as --out\n", done.stderr)
