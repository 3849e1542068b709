"""What others take of the processor, and intervals of medians."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from math import comb
from pathlib import Path

import numpy as np
import pytest

import bench.load
from bench.estimates import median_interval
from bench.load import Others

PROC = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells it")


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def own_seconds(work: Callable[[], object]) -> float:
    before = bench.load._cpu_times()
    work()
    after = bench.load._cpu_times()
    assert before is not None
    assert after is not None
    return after.own_s - before.own_s


@PROC
def test_our_own_work_is_not_that_of_others() -> None:
    """Neither this process's nor its children's, also when they have ended."""

    def in_a_child() -> None:
        child = multiprocessing.get_context("fork").Process(target=spin, args=(0.3,))
        child.start()
        child.join()

    assert 0.25 <= own_seconds(lambda: spin(0.3)) < 1.0
    assert 0.25 <= own_seconds(in_a_child) < 1.0


@PROC
def test_the_work_of_a_stranger_is_that_of_others() -> None:
    """Of a process that does not descend from this one, which waits meanwhile."""
    spinning = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    start = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {spinning!r}]).pid)"
    with Others() as others:
        subprocess.run([sys.executable, "-c", start], check=True, stdout=subprocess.PIPE)
        time.sleep(1.0)
    assert others.percent is not None
    assert others.percent > 5.0


def test_a_system_that_does_not_tell_is_no_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.load, "Path", lambda path: Path("nowhere") / path.lstrip("/"))
    with Others() as others:
        pass
    assert others.percent is None


@pytest.mark.parametrize("count", [7, 8, 9, 10, 17, 30])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    rng = np.random.default_rng(count)
    draws = rng.lognormal(0.0, 1.0, (4000, count))
    found = [median_interval(list(draw)) for draw in draws]
    share = np.mean([ends is not None and ends[0] <= 1.0 <= ends[1] for ends in found])
    k = next(k for k in range(count) if 2 * sum(comb(count, j) for j in range(k + 1)) > 0.025 * 2**count)
    exact = 1 - 2 * sum(comb(count, j) for j in range(k)) / 2**count
    assert exact >= 0.975
    assert abs(share - exact) < 0.01  # four standard deviations of a share of 4000


@pytest.mark.parametrize("count", range(7))
def test_fewer_than_seven_rounds_have_no_interval(count: int) -> None:
    assert median_interval([1.0] * count) is None
