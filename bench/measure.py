"""Measure one job: check all providers, then time them. A provider that fails or is wrong gets a row that says so.

A kernel with an illegal memory access breaks the GPU's context for its whole process. So a job is measured in a `Worker`; a
provider that breaks it is left out when the job is measured again in a new one.
"""

import functools
import math
import os
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.accuracy import Error, budget, error_of
from bench.cases import DTYPES, EAGER, OURS, Case, Job, Provider, Suite, Workload
from bench.costs import Cost
from bench.estimates import median_interval
from bench.load import Others
from bench.results import ABOVE_ROOF, FAILED, OK, WRONG, Row, with_ratio
from bench.roofline import Roofs
from bench.timing import CacheFlush, Clock, FirstCall, Samples, first_call, interleaved, prepared, warm_up_calls
from bench.worker import OutOfTime, Say, Worker, WorkerLost, WorkFailed, has_lost_its_device
from search.turns import Summary, back_to_back_ms, in_turns, synchronise

BACK_TO_BACK_MS = 300.0  # how long a provider's calls without a wait between them last, together
_BACK_TO_BACK_ROUNDS = 7  # the fewest with an interval

# On a CPU, each provider in a process of its own: our training step tells its process to keep freed memory, which must not
# help the others, and the millions of objects of one study must not slow Python's garbage collector for the other.
_APART: tuple[Suite, ...] = ("proxy", "study")


@dataclass(frozen=True)
class Run:
    """What every measurement of a run shares."""

    device_name: str
    threads: int
    rounds: int
    roofs: Roofs  # as far as they are known
    folder: Path  # of the run

    def prepare(self) -> torch.device:
        """The device, in a process that has not used it yet."""
        return prepared(self.device_name, self.threads)


def measure_apart(worker: Worker, job: Job, run: Run, limit_s: float = math.inf) -> list[Row]:
    """Run `measure` in a separate process; if a provider breaks it, run it again without that provider.

    Raises OutOfTime after `limit_s` seconds.
    """
    broken: list[Row] = []
    end = time.monotonic() + limit_s
    while True:
        left = tuple(provider for provider in job.providers if provider.name not in [row.provider for row in broken])
        at_work: list[str] = []
        try:
            arguments = (replace(job, providers=left), run)
            rows = worker(_measure, *arguments, limit_s=end - time.monotonic(), say=at_work.append) if left else []
        except OutOfTime as error:
            raise OutOfTime(f"{error}, while {at_work[-1]} was at work" if at_work else str(error)) from None
        except (WorkFailed, WorkerLost) as error:
            blamed = next((provider for provider in left if provider.name in at_work[-1:]), left[0])
            row = empty_row(job, blamed, torch.device(run.device_name))
            broken.append(replace(row, status=FAILED, note=str(error)[:200]))
        else:
            order = [provider.name for provider in job.providers]
            return sorted([*rows, *broken], key=lambda row: order.index(row.provider))


def _measure(job: Job, run: Run, say: Say) -> list[Row]:
    return measure(job, run.prepare(), run.rounds, run.roofs, say)


def measure(job: Job, device: torch.device, rounds: int, roofs: Roofs, say: Say = lambda provider: None) -> list[Row]:
    """The rows of a job, one per provider, with our ratio to the best other in it; `say` hears the name of who is at work."""
    torch.compiler.reset()  # each case meets the compiler afresh: past a few shapes it would give up and stay eager
    rng = np.random.default_rng(zlib.crc32(job.title.encode()))  # the order of turns depends on nothing but the job
    with job.case.set_up(job.providers) as case:
        attempt = Attempt(replace(job, case=case), device, say)
        attempt.check_small()
        if device.type == "cpu" and case.suite in _APART:
            attempt.check_at_full_size()
            attempt.workloads.clear()  # other processes need the memory
            attempt.time_in_own_processes(rounds, roofs, rng)
        else:
            attempt.prepare()
            attempt.check_at_full_size()
            attempt.time_here(rounds, roofs, rng)
            attempt.workloads.clear()
        attempt.measure_first_calls()
    return with_ratio([*attempt.rows.values()])


class Attempt:
    """A job in this process: the row of each of its providers, as far as it is known, and the workloads to be timed."""

    def __init__(self, job: Job, device: torch.device, say: Say) -> None:
        self.rows = {provider: empty_row(job, provider, device) for provider in job.providers}
        self.workloads: dict[Provider, Workload] = {}
        self._job, self._case, self._dtype, self._device, self._say = job, job.case, job.dtype, device, say

    def check_small(self) -> None:
        """The small case by everybody, against its truth; eager PyTorch's error is the yardstick for ours.

        Compiled providers are left out if the check at full size covers them, because compiling twice takes hours.
        """
        small = self._case.small()
        truth = small.truth(self._dtype)
        yardstick: Error | None = None
        for provider, row in self._eager_first():
            if provider.compile_mode and self._has_no_chance():
                continue
            workload = self._warm(small, provider, calls=1)
            if workload is None:
                continue
            error = error_of(workload.parts(), truth)
            row.max_error, row.rms_error = error
            if provider == EAGER:
                yardstick = error
            _judge(row, error, budget(self._dtype, yardstick if provider.is_ours else None), "the truth")
        torch.compiler.reset()

    def prepare(self) -> None:
        """Build and warm up what is timed."""
        for provider in self._running():
            if workload := self._warm(self._case, provider, warm_up_calls(self._device)):
                self.workloads[provider] = workload

    def check_at_full_size(self) -> None:
        """Everybody against eager PyTorch at the size that is timed.

        With dropout or random crops, a variant without them is compared, by eager and ours alone.
        """
        case, expected = self._case.without_chance(), None
        for provider, row in self._eager_first():
            takes_part = self._has_no_chance() or provider in (EAGER, OURS)
            if case is None or row.status != OK or not takes_part:
                continue
            workload = self.workloads.get(provider) if self._has_no_chance() else self._warm(case, provider, calls=1)
            if workload is None:
                continue
            if provider == EAGER:
                expected = workload.parts()
            elif expected is not None:
                _judge(row, error_of(workload.parts(), expected), budget(self._dtype), "eager at full size")

    def time_here(self, rounds: int, roofs: Roofs, rng: np.random.Generator) -> None:
        """Cold and warm; whole iterations on a GPU, of which a training makes thousands, back to back as well."""
        running = {provider.name: self.rows[provider] for provider in self.workloads}
        calls = {provider.name: workload for provider, workload in self.workloads.items()}
        clock = Clock(self._device, launches_count=self._case.launches_count)
        with Others() as others:
            samples = interleaved(calls, rounds, clock, CacheFlush(self._device), rng, self._say)
        uses_processor = self._device.type == "cpu" or self._case.launches_count
        for name, row in running.items():
            note_times(row, samples[name], roofs, others.percent if uses_processor else None)
        if self._device.type == "cuda" and self._case.repeats:
            turns = {name: self._many(name, call, running[name].median_ms or 0.0) for name, call in calls.items()}
            for name, milliseconds in in_turns(turns, _BACK_TO_BACK_ROUNDS, rng).items():
                note_steps(running[name], milliseconds)

    def _many(self, name: str, call: Callable[[], None], cold_ms: float) -> Callable[[], float]:
        """Calls with no wait between them, as many as last for a while -> milliseconds a call."""
        count = max(3, round(BACK_TO_BACK_MS / cold_ms))

        def turn() -> float:
            self._say(name)
            return back_to_back_ms(call, self._device, count)

        return turn

    def time_in_own_processes(self, rounds: int, roofs: Roofs, rng: np.random.Generator) -> None:
        """Each provider's calls in a process of its own, still in turns."""
        running = {provider.name: provider for provider in self._running()}
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker()) for name in running}
            for name, worker in workers.items():
                self._say(name)
                worker(_hold, self._case, running[name], self._dtype, str(self._device), torch.get_num_threads())
            remote = {name: functools.partial(worker, _time_held) for name, worker in workers.items()}
            with Others() as others:
                samples = interleaved(remote, rounds, _own_milliseconds, lambda: None, rng, self._say, self._case.seconds)
            for name, provider in running.items():
                note_times(self.rows[provider], samples[name], roofs, others.percent)

    def measure_first_calls(self) -> None:
        """Theirs who are to be measured in a fresh process. Where that fails, first call and memory stay empty."""
        for provider in self._running():
            if provider in self._job.in_fresh_process:
                row = self.rows[provider]
                try:
                    first = in_fresh_process(self._case, provider, self._dtype, self._device)
                    row.first_call_s, row.peak_memory_mb, row.written_mb = first.seconds, first.peak_mb, first.written_mb
                except (WorkFailed, WorkerLost) as error:
                    row.note = f"fresh process: {error}"[:160]

    def _running(self) -> list[Provider]:
        return [provider for provider, row in self.rows.items() if row.status != FAILED]

    def _eager_first(self) -> list[tuple[Provider, Row]]:
        """The others are held to what eager PyTorch makes."""
        return sorted(self.rows.items(), key=lambda item: item[0] != EAGER)

    def _has_no_chance(self) -> bool:
        return self._case.without_chance() == self._case

    def _warm(self, case: Case, provider: Provider, calls: int) -> Workload | None:
        """The provider's workload past its first calls; None if it fails, whatever its compiler or kernel throws."""
        self._say(provider.name)
        try:
            return warmed(case, provider, self._dtype, self._device, calls)
        except Exception as error:
            if has_lost_its_device():  # for all who come behind, too
                raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.rows[provider].status, self.rows[provider].note = FAILED, f"{type(error).__name__}: {first_line[:160]}"
            self.workloads.pop(provider, None)
            return None


def _judge(row: Row, error: Error, allowed: float, against: str) -> None:
    """Mark it as wrong if it differs from `against` by more than allowed; it is timed all the same."""
    if not error.rms <= allowed:  # nor NaN
        row.status, row.note = WRONG, f"RMS error {error.rms:.2g} against {against}, allowed {allowed:.2g}"


def warmed(case: Case, provider: Provider, dtype: str, device: torch.device, calls: int) -> Workload:
    """The workload behind so many calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's compilers; what they compute is checked
        workload = case.workload(provider, dtype, device)
        for _ in range(calls):
            workload()
        synchronise(device)
    return workload


_held: list[tuple[Workload, CacheFlush, Clock]] = []


def _hold(case: Case, provider: Provider, dtype: str, device_name: str, threads: int) -> None:
    device = prepared(device_name, threads)
    workload = warmed(case, provider, dtype, device, warm_up_calls(device))
    _held.append((workload, CacheFlush(device), Clock(device, launches_count=case.launches_count)))


def _own_milliseconds(call: Callable[[], Any]) -> float:
    """A clock for calls that return their time."""
    milliseconds: float = call()
    return milliseconds


def _time_held() -> float:
    workload, flush, clock = _held[0]
    flush()
    return clock(workload)


def in_fresh_process(case: Case, provider: Provider, dtype: str, device: torch.device) -> FirstCall:
    """Run `first_call` in a new interpreter with empty compiler caches."""
    with ExitStack() as stack:
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        folders = {name: stack.enter_context(tempfile.TemporaryDirectory()) for name in caches}
        with mock.patch.dict(os.environ, folders):
            worker = stack.enter_context(Worker(preload="bench.training_cases"))
        first: FirstCall = worker(first_call, case, provider, dtype, str(device), torch.get_num_threads())
        return first


def empty_row(job: Job, provider: Provider, device: torch.device) -> Row:
    """The row of a provider of which nothing is measured yet."""
    case, cost = job.case, job.case.cost(DTYPES[job.dtype].itemsize)
    return Row(
        suite=case.suite,
        case=case.name,
        mode=case.mode,
        provider=provider.name,
        memory_format="channels-last" if provider.memory_format(device) == torch.channels_last else "NCHW",
        dtype=job.dtype,
        shape=case.shape,
        status=OK,
        bytes=cost.bytes if cost else None,
        flops=cost.flops if cost else None,
    )


def note_times(row: Row, samples: Samples, roofs: Roofs, others_percent: float | None) -> None:
    """Write into the row what a provider's turns took, and how much of the processor others used meanwhile."""
    cold = Summary.of(samples.cold)
    row.rounds, (row.median_ms, row.p20_ms, row.p80_ms) = len(samples.cold), cold
    row.median_low_ms, row.median_high_ms = median_interval(samples.cold) or (None, None)
    row.others_percent = others_percent
    if samples.warm and (warm := Summary.of(samples.warm)).differs_from(cold):
        row.warm_median_ms = warm.median
    if row.status == OK and row.bytes is not None and row.flops is not None and not row.is_disturbed:
        cost = Cost(row.bytes, row.flops)
        percent = roofs.percent(cost, row.dtype, cold.median)
        if (least := roofs.percent(cost, row.dtype, row.median_high_ms or cold.p80)) and least > 100:
            row.note = f"{ABOVE_ROOF} ({percent:.0f} %)"
        else:
            row.percent_of_roof = percent


def note_steps(row: Row, milliseconds: Sequence[float]) -> None:
    """Write into the row what a call takes where calls do not wait for each other, measured several times."""
    row.back_to_back_ms = statistics.median(milliseconds)
    row.back_to_back_low_ms, row.back_to_back_high_ms = median_interval(milliseconds) or (None, None)
