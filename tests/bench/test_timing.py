"""Clocks, turns, and memory."""

import time
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

import bench.timing
from bench.cases import EAGER
from bench.measure import in_fresh_process
from bench.timing import LONG_MS, CacheFlush, Clock, interleaved, last_level_cache_bytes
from search.turns import Summary
from tests.bench.tiny_runs import CPU, SEPARABLE


def test_summary_is_the_median_and_two_percentiles() -> None:
    assert Summary.of([float(value) for value in range(101)]) == Summary(median=50.0, p20=20.0, p80=80.0)


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [((1.0, 0.9, 1.1), (1.15, 1.1, 1.2), False), ((1.0, 0.9, 1.1), (1.5, 1.4, 1.6), True), ((1, 1, 1), (1, 1, 1), False)],
)
def test_summaries_differ_by_more_than_their_spread(
    first: tuple[float, float, float], second: tuple[float, float, float], differ: bool
) -> None:
    assert Summary(*first).differs_from(Summary(*second)) == differ == Summary(*second).differs_from(Summary(*first))


def record_turns(durations: dict[str, float], rounds: int) -> list[str]:
    """The order of flushes and calls, with a clock that knows the durations."""
    log: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    def clock(function: Callable[[], None]) -> float:
        function()
        return durations[log[-1]]

    calls = {name: call(name) for name in durations}
    samples = interleaved(calls, rounds, clock, lambda: log.append("flush"), np.random.default_rng(0))
    for name, duration in durations.items():
        assert samples[name].cold == [duration] * rounds
        assert samples[name].warm == ([] if duration >= LONG_MS else [duration] * rounds)
    return log


def test_every_provider_takes_one_turn_per_round_in_changing_order() -> None:
    log = record_turns({"a": 1.0, "b": 2.0, "c": 3.0}, rounds=20)
    turns = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert all(first == "flush" and second == third != "flush" for first, second, third in turns)
    rounds = [tuple(turn[1] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3  # of 6 orders, 20 draws miss three or more with probability below 1e-2; the seed is fixed


def test_a_long_call_is_made_once() -> None:
    assert record_turns({"long": LONG_MS}, rounds=2) == ["flush", "long", "flush", "long"]


def test_the_clock_reads_milliseconds() -> None:
    assert 20.0 <= Clock(CPU, launches_count=True)(lambda: time.sleep(0.02)) < 2000.0  # a busy machine may oversleep


def test_the_flush_writes_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.timing, "last_level_cache_bytes", lambda device: 1000)
    flush = CacheFlush(CPU)
    flush()
    flush()
    assert flush._buffer.nbytes == 4000
    assert (flush._buffer == 2).all()
    assert last_level_cache_bytes(CPU) >= 1 << 18  # no processor that runs PyTorch has less


def test_the_first_call_of_a_fresh_process() -> None:
    first = in_fresh_process(SEPARABLE, EAGER, "float32", CPU)
    assert first.seconds > 0
    assert first.peak_mb is None or first.peak_mb >= 0
    assert first.written_mb is None


class _Allocating:
    """A workload whose iteration holds 200 MB for a moment."""

    written_bytes = 3_000_000

    def __call__(self) -> None:
        self.total = float(torch.ones(50_000_000).sum())

    def drop(self) -> None: ...


class _AllocatingCase(type(SEPARABLE)):  # type: ignore[misc]
    def workload(self, *_: object) -> _Allocating:
        return _Allocating()


def test_memory_is_the_peak_of_an_iteration() -> None:
    """In a process of its own, as the benchmark has it: what others of this one free meanwhile would count."""
    case = _AllocatingCase(**{field.name: getattr(SEPARABLE, field.name) for field in fields(SEPARABLE)})
    first = in_fresh_process(case, EAGER, "float32", CPU)
    assert first.written_mb == 3.0
    if first.peak_mb is None:
        pytest.skip("this system tells no peak of resident memory")
    assert 190 < first.peak_mb < 260  # what the rest of the process allocates meanwhile is small
