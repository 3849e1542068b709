"""The lag of a search: none waits for a slow cell, and a run that was begun keeps its own."""

import heapq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import search.pipeline
from search.cells.sampler import LAG
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace
from search.folder import Folder
from search.pipeline import SLACK, SearchSettings
from search.settings import scored

PAPER = SearchSettings()


def waited(durations: list[float], trials: int, lag: int) -> list[int]:
    """The trials for which a worker had to wait, where worker i takes `durations[i]` for each."""
    sampler = PaperSampler(SearchSpace(), seed=0, lag=lag)
    finished, waits = set[int](), []
    running: list[tuple[float, int, int]] = []
    free = list(range(len(durations)))
    now, number = 0.0, 0
    while number < trials:
        while free and number < trials and finished.issuperset(range(sampler.visible_before(number))):
            worker = free.pop()
            heapq.heappush(running, (now + durations[worker], number, worker))
            number += 1
        if free and number < trials:
            waits.append(number)
        now, done, worker = heapq.heappop(running)
        finished.add(done)
        free.append(worker)
    return waits


@given(workers=st.integers(2, 24), speeds=st.randoms(use_true_random=False), factor=st.floats(1.0, 3.0))
def test_a_worker_three_times_as_slow_leaves_no_other_idle(workers: int, speeds: Any, factor: float) -> None:
    durations = [factor] + [speeds.uniform(1.0, 1.1) for _ in range(workers - 1)]
    assert waited(durations, trials=8 * workers, lag=SLACK * workers) == []


def test_with_the_least_lag_all_wait_for_a_slow_worker() -> None:
    assert waited([3.0] + [1.0] * 4, trials=40, lag=4) != []


def begun(directory: Path, settings: SearchSettings) -> SearchSettings:
    Folder(directory).begin(scored(settings), "a command")
    return settings


@pytest.mark.parametrize(
    ("change", "lag", "said"),
    [
        ({}, LAG, ""),
        ({"workers": LAG + 1}, LAG, ""),
        ({"workers": LAG + 2}, SLACK * (LAG + 2), "lag 24 for 6 cells at a time"),
        ({"cells_per_gpu": 8}, 32, "lag 32 for 8 cells at a time"),
        ({"workers": 64, "sampler": "random"}, LAG, ""),
        ({"workers": 3, "lag": 0}, 0, "1 of 3 cells are evaluated at a time"),
        ({"workers": 9, "lag": 7}, 7, "8 of 9 cells are evaluated at a time"),
        ({"workers": 9, "lag": 8}, 8, ""),
    ],
)
def test_a_new_run_gets_a_lag_for_its_workers_unless_one_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], lag: int, said: str
) -> None:
    assert replace(PAPER, **change).with_lag(tmp_path, "cpu") == replace(PAPER, **(change | {"lag": lag}))
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert bool(err) == bool(said)


@pytest.mark.parametrize("lag", [0, 4, 24])
def test_a_run_that_goes_on_keeps_its_lag(tmp_path: Path, capsys: pytest.CaptureFixture[str], lag: int) -> None:
    before = begun(tmp_path, replace(PAPER, lag=lag))
    now = replace(PAPER, workers=10).with_lag(tmp_path, "cpu")
    assert scored(now) == scored(before)
    assert now.most_at_once == lag + 1
    err = capsys.readouterr().err
    assert err == (
        ""
        if lag == 24
        else f"{lag + 1} of 10 cells are evaluated at a time, because the sampler of this run "
        f"waits for all but the {lag} latest (its lag)\n"
    )


def test_a_run_whose_lag_was_the_default_before_it_could_be_left_out_goes_on(tmp_path: Path) -> None:
    Folder(tmp_path).begin(scored(PAPER) | {"lag": 4}, "a command")
    Folder(tmp_path).check(scored(PAPER.with_lag(tmp_path, "cpu")))


def test_auto_counts_the_cluster_where_the_sampler_looks_back_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.pipeline, "count_workers", lambda settings, device: 16)
    auto = replace(PAPER, workers="auto")
    assert auto.with_lag(tmp_path, "cpu").lag == 64
    monkeypatch.setattr(search.pipeline, "count_workers", lambda settings, device: pytest.fail("it needs not to be known"))
    random = replace(auto, sampler="random").with_lag(tmp_path, "cpu")
    assert (random.lag, random.most_at_once) == (LAG, None)
