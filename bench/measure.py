"""Measure one job: check all providers, then time them. A provider that fails or is wrong gets a row that says so.

A kernel with an illegal memory access breaks the GPU's context for its whole process. So a job is measured in a `Worker`; a
provider that breaks it is left out when the job is measured again in a new one.
"""

import functools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.accuracy import Error, budget, error_of
from bench.cases import DTYPES, EAGER, OURS, Case, Provider, Workload
from bench.results import FAILED, OK, WRONG, Row, with_ratio
from bench.roofline import Roofs
from bench.suites import Job
from bench.timing import CacheFlush, Clock, FirstCall, Samples, first_call, interleaved, prepared, warm_up_calls
from bench.worker import OutOfTime, Say, Worker, WorkerLost, WorkFailed, has_lost_its_device
from search.reports.turns import Summary, back_to_back_ms, in_turns, synchronise

BACK_TO_BACK_MS = 300.0  # how long a provider's calls without a wait between them last, together


@dataclass
class Trial:
    """The results of a provider so far."""

    provider: Provider
    error: Error | None = None  # against the reference, with what was allowed
    allowed: float | None = None
    status: str = OK
    note: str = ""
    workload: Workload | None = None
    samples: Samples = Samples([], [])
    back_to_back: float | None = None  # milliseconds a call
    first: FirstCall | None = None

    def fail(self, error: Exception) -> None:
        """Record an exception as the result of this provider alone."""
        lines = str(error).strip().splitlines() or [""]
        self.status, self.note, self.workload = FAILED, f"{type(error).__name__}: {lines[0][:160]}", None

    def judge(self, error: Error, allowed: float, against: str) -> None:
        """Mark it as wrong if it differs from `against` by more than allowed; it is timed all the same."""
        if not error.rms <= allowed:  # nor NaN
            self.status = WRONG
            self.note = f"RMS error {error.rms:.2g} against {against}, allowed {allowed:.2g}"


def measure_apart(
    worker: Worker, job: Job, device: torch.device, rounds: int, roofs: Roofs, seed: int, limit_s: float | None = None
) -> list[Row]:
    """Run `measure` in a separate process; if a provider breaks it, run it again without that provider.

    Raises OutOfTime after `limit_s` seconds.
    """
    broken: list[Trial] = []
    end = None if limit_s is None else time.monotonic() + limit_s
    while True:
        left = tuple(provider for provider in job.providers if provider not in [trial.provider for trial in broken])
        at_work: list[str] = []
        try:
            arguments = (replace(job, providers=left), str(device), rounds, roofs, seed, torch.get_num_threads())
            rest_s = None if end is None else max(0.0, end - time.monotonic())
            rows = worker(_measure, *arguments, limit_s=rest_s, say=at_work.append) if left else []
        except OutOfTime as error:
            raise OutOfTime(f"{error}, while {at_work[-1]} was at work" if at_work else str(error)) from None
        except (WorkFailed, WorkerLost) as error:
            blamed = next((provider for provider in left if provider.name in at_work[-1:]), left[0])
            broken.append(Trial(blamed, status=FAILED, note=str(error)[:200]))
        else:
            order = [provider.name for provider in job.providers]
            rows += [row_of(job, trial, device, roofs, rounds) for trial in broken]
            return sorted(rows, key=lambda row: order.index(row.provider))


def _measure(job: Job, device_name: str, rounds: int, roofs: Roofs, seed: int, threads: int, say: Say) -> list[Row]:
    return measure(job, prepared(device_name, threads), rounds, roofs, seed, say)


def measure(
    job: Job, device: torch.device, rounds: int, roofs: Roofs, seed: int, say: Say = lambda provider: None
) -> list[Row]:
    """The rows of a job, one per provider, with our ratio to the best other in it; `say` hears the name of who is at work."""
    torch.compiler.reset()  # each case meets the compiler afresh: past a few shapes it would give up and stay eager
    attempt = Attempt(job, device, say)
    attempt.check_against_reference()
    rng = np.random.default_rng(seed)
    # Whole iterations on a CPU: our training step tells its process to keep freed memory, which must not help the others.
    if device.type == "cpu" and job.case.suite == "proxy":
        attempt.check_at_full_size()
        attempt.drop_workloads()
        attempt.time_in_own_processes(rounds, rng)
    else:
        attempt.prepare()
        attempt.check_at_full_size()
        attempt.time_here(rounds, rng)
        attempt.drop_workloads()
    attempt.measure_first_calls()
    return with_ratio([row_of(job, trial, device, roofs, rounds) for trial in attempt.trials])


class Attempt:
    """A job in this process: what is known of each of its providers so far."""

    def __init__(self, job: Job, device: torch.device, say: Say) -> None:
        self.trials = [Trial(provider) for provider in job.providers]
        self._job, self._case, self._dtype, self._device, self._say = job, job.case, job.dtype, device, say

    def check_against_reference(self) -> None:
        """The small case by everybody, against `reference/`; eager PyTorch's error is the yardstick for ours.

        But for compilers that the full size can check: compiling twice takes hours where a case is compiled for each of many.
        """
        small = self._case.small()
        truth = small.truth(self._dtype)
        yardstick: Error | None = None
        for trial in self._eager_first():
            if trial.provider.compile_mode and self._has_no_chance():
                continue
            workload = self._warm(small, trial, calls=1)
            if workload is None:
                continue
            trial.error = error_of(workload.parts(), truth)
            if trial.provider == EAGER:
                yardstick = trial.error
            trial.allowed = budget(self._dtype, yardstick if trial.provider.is_ours else None)
            trial.judge(trial.error, trial.allowed, "the reference")
        torch.compiler.reset()

    def prepare(self) -> None:
        """Build and warm up what is timed."""
        for trial in self._running():
            trial.workload = self._warm(self._case, trial, warm_up_calls(self._device))

    def check_at_full_size(self) -> None:
        """Everybody against eager PyTorch at the size that is timed.

        Where chance has a part, that is the case without it, for ours alone: a compiler would have to compile once more.
        """
        case, expected = self._case.without_chance(), None
        for trial in self._eager_first():
            takes_part = self._has_no_chance() or trial.provider in (EAGER, OURS)
            if case is None or trial.status != OK or not takes_part:
                continue
            workload = trial.workload if self._has_no_chance() else self._warm(case, trial, calls=1)
            if workload is None:
                continue
            if trial.provider == EAGER:
                expected = workload.parts()
            elif expected is not None:
                trial.judge(error_of(workload.parts(), expected), budget(self._dtype), "eager at full size")

    def time_here(self, rounds: int, rng: np.random.Generator) -> None:
        """Cold and warm; whole iterations on a GPU, of which a training makes thousands, back to back as well."""
        running = {trial.provider.name: trial for trial in self._running()}
        calls = {name: trial.workload for name, trial in running.items() if trial.workload}
        clock = Clock(self._device, launches_count=self._case.launches_count)
        for name, samples in interleaved(calls, rounds, clock, CacheFlush(self._device), rng, self._say).items():
            running[name].samples = samples
        if self._device.type == "cuda" and self._case.repeats:
            for name, milliseconds in in_turns({name: self._many(running[name]) for name in calls}, 3, rng).items():
                running[name].back_to_back = statistics.median(milliseconds)

    def _many(self, trial: Trial) -> Callable[[], float]:
        """Calls with no wait between them, as many as last for a while -> milliseconds a call."""
        count = max(3, round(BACK_TO_BACK_MS / statistics.median(trial.samples.cold)))

        def turn() -> float:
            assert trial.workload is not None
            self._say(trial.provider.name)
            return back_to_back_ms(trial.workload, self._device, count)

        return turn

    def time_in_own_processes(self, rounds: int, rng: np.random.Generator) -> None:
        """Each provider's calls in a process of its own, still in turns."""
        running = {trial.provider.name: trial for trial in self._running()}
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker()) for name in running}
            for name, worker in workers.items():
                self._say(name)
                worker(_hold, self._case, running[name].provider, self._dtype, str(self._device), torch.get_num_threads())
            remote = {name: functools.partial(worker, _time_held) for name, worker in workers.items()}
            for name, samples in interleaved(remote, rounds, _own_milliseconds, lambda: None, rng, self._say).items():
                running[name].samples = samples

    def measure_first_calls(self) -> None:
        """Theirs who are to be measured in a fresh process. Where that fails, first call and memory stay empty."""
        for trial in self._running():
            if trial.provider in self._job.in_fresh_process:
                try:
                    trial.first = in_fresh_process(self._case, trial.provider, self._dtype, self._device)
                except (WorkFailed, WorkerLost) as error:
                    trial.note = f"fresh process: {error}"[:160]

    def drop_workloads(self) -> None:
        """Other processes need the memory."""
        for trial in self.trials:
            trial.workload = None

    def _running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status != FAILED]

    def _eager_first(self) -> list[Trial]:
        """The others are held to what eager PyTorch makes."""
        return sorted(self.trials, key=lambda trial: trial.provider != EAGER)

    def _has_no_chance(self) -> bool:
        return self._case.without_chance() == self._case

    def _warm(self, case: Case, trial: Trial, calls: int) -> Workload | None:
        """The provider's workload past its first calls; None if it fails, whatever its compiler or kernel throws."""
        self._say(trial.provider.name)
        try:
            workload = warmed(case, trial.provider, self._dtype, self._device, calls)
        except Exception as error:
            if has_lost_its_device():  # for all who come behind, too
                raise
            trial.fail(error)
            return None
        return workload


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


def row_of(job: Job, trial: Trial, device: torch.device, roofs: Roofs, rounds: int) -> Row:
    """The results of a provider as one row."""
    case = job.case
    cost = case.cost(DTYPES[job.dtype].itemsize)
    times = Summary.of(trial.samples.cold) if trial.samples.cold else None
    warm = Summary.of(trial.samples.warm) if trial.samples.warm else None
    memory = trial.first.peak_memory_bytes if trial.first else None
    channels_last = trial.provider.memory_format(device) == torch.channels_last
    return Row(
        suite=case.suite,
        case=case.name,
        mode=case.mode,
        provider=trial.provider.name,
        memory_format="channels-last" if channels_last else "NCHW",
        dtype=job.dtype,
        shape=case.shape,
        status=trial.status,
        median_ms=times and times.median,
        p20_ms=times and times.p20,
        p80_ms=times and times.p80,
        warm_median_ms=warm.median if warm and times and warm.differs_from(times) else None,
        back_to_back_ms=trial.back_to_back,
        first_call_s=trial.first and trial.first.seconds,
        peak_memory_mb=None if memory is None else memory / 1e6,
        bytes=cost.bytes if cost else None,
        flops=cost.flops if cost else None,
        percent_of_roof=roofs.percent(cost, job.dtype, times.median) if times and trial.status == OK else None,
        max_error=trial.error and trial.error.maximum,
        rms_error=trial.error and trial.error.rms,
        rounds=rounds if times else 0,
        note=trial.note,
    )
