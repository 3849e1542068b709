"""The lag of a search: none waits for a slow cell, and a run that was begun keeps its own."""

import heapq
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search.pipeline
from search.cells.sampler import LAG
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace
from search.folder import Folder
from search.pipeline import SearchSettings
from search.runs.halving import Halving, Rungs, Step
from search.runs.lag import SLACK
from search.settings import scored

PAPER = SearchSettings()
RUNGS = (62, 250, 1000)
CUT_SHORT = {"early_stopping": "asha", "rungs": RUNGS[:-1], "reduction_factor": 4, "trials": 28_000}


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


def idle(workers: int, trials: int, lag: int, durations: list[float], scores: Any) -> float:
    """The share of time for which workers stand idle while trials are left to begin; cells take `durations` an iteration.

    A trial that goes on takes as long as the iterations that it still has to do.
    """
    rungs = Rungs(Halving("asha", RUNGS, lag=lag))
    running: list[tuple[float, int, float]] = []
    free, now, begun, waited = workers, 0.0, 0, 0.0
    while begun < trials:
        while free and isinstance(step := rungs.next(trials), Step):
            number = begun if step.number is None else step.number
            begun += step.number is None
            rungs.begin(number, step.rung, step.bound)
            stretch = RUNGS[step.rung] - (RUNGS[step.rung - 1] if step.rung else 0)
            end = now + stretch * durations[number % len(durations)]
            heapq.heappush(running, (end, len(rungs) - 1, scores.random()))
            free -= 1
        end, job, score = heapq.heappop(running)
        waited += free * (end - now)
        now = end
        rungs.finish(job, score)
        free += 1
    return waited / (workers * now)


@given(workers=st.integers(2, 12), scores=st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_cells_that_are_trained_in_full_hold_up_few_others(workers: int, scores: Any) -> None:
    slack = math.ceil(2 * Halving("asha", RUNGS).longest)
    speeds = [scores.uniform(1.0, 2.0) for _ in range(50)]
    assert idle(workers, 40 * workers, slack * workers, speeds, scores) < 0.05


def test_with_the_least_lag_cells_that_are_trained_in_full_hold_up_others() -> None:
    assert idle(5, 200, 4, [1.0], random.Random(0)) > 0.2


def begun(directory: Path, search: SearchSettings) -> SearchSettings:
    Folder(directory).begin(scored(search), "a command")
    return search


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
        ({"workers": 6, **CUT_SHORT}, 13 * 6, "lag 78 for 6 cells at a time"),
        ({"workers": 6, "sampler": "random", **CUT_SHORT}, 13 * 6, "lag 78 for 6 cells at a time"),
        ({"workers": 6, **CUT_SHORT, "trials": 200}, 50, "lag 50 for 6 cells at a time"),
        ({"workers": 6, **CUT_SHORT, "trials": 20}, 24, "lag 24 for 6 cells at a time"),
        ({"workers": 4, "sampler": "random", **CUT_SHORT}, LAG, ""),
    ],
)
def test_a_new_run_gets_a_lag_for_its_workers_unless_one_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], lag: int, said: str
) -> None:
    assert replace(PAPER, **change).with_lag(tmp_path, "cpu", 1000) == replace(PAPER, **(change | {"lag": lag}))
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert bool(err) == bool(said)


@pytest.mark.parametrize("lag", [0, 4, 24])
def test_a_run_that_goes_on_keeps_its_lag(tmp_path: Path, capsys: pytest.CaptureFixture[str], lag: int) -> None:
    before = begun(tmp_path, replace(PAPER, lag=lag))
    now = replace(PAPER, workers=10).with_lag(tmp_path, "cpu", 1000)
    assert scored(now) == scored(before)
    assert now.most_at_once == lag + 1
    err = capsys.readouterr().err
    assert err == (
        ""
        if lag == 24
        else f"{lag + 1} of 10 cells are evaluated at a time, because this run waits for all but the {lag} latest (its lag)\n"
    )


def test_a_run_whose_lag_was_the_default_before_it_could_be_left_out_goes_on(tmp_path: Path) -> None:
    Folder(tmp_path).begin(scored(PAPER) | {"lag": 4}, "a command")
    Folder(tmp_path).check(scored(PAPER.with_lag(tmp_path, "cpu", 1000)))


def test_auto_counts_the_cluster_where_the_sampler_looks_back_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.pipeline, "count_workers", lambda settings, device: 16)
    auto = replace(PAPER, workers="auto")
    assert auto.with_lag(tmp_path, "cpu", 1000).lag == 64
    monkeypatch.setattr(search.pipeline, "count_workers", lambda settings, device: pytest.fail("it needs not to be known"))
    uniform = replace(auto, sampler="random").with_lag(tmp_path, "cpu", 1000)
    assert (uniform.lag, uniform.most_at_once) == (LAG, None)
