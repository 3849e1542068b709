"""One job: check everybody, then time those who are right. A provider that fails or is wrong gets a row that says so."""

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.accuracy import Error, budget, error_of
from bench.cases import DTYPES, EAGER, OURS, Case, Provider, Workload
from bench.results import FAILED, OK, WRONG, Row, ratio
from bench.roofline import Roofs
from bench.suites import Job
from bench.timing import CacheFlush, Clock, FirstCall, Samples, Summary, first_call, interleaved, synchronise, warm_up_calls

FirstCallMeter = Callable[[Case, Provider, str, torch.device], FirstCall]


@dataclass
class Trial:
    """What is known of a provider so far."""

    provider: Provider
    error: Error | None = None
    status: str = OK
    note: str = ""
    workload: Workload | None = None
    samples: Samples = field(default_factory=Samples)
    first: FirstCall | None = None

    @property
    def is_right(self) -> bool:
        return self.status == OK

    def fail(self, error: Exception) -> None:
        """An exception is a result too: of this provider alone."""
        lines = str(error).strip().splitlines() or [""]
        self.status, self.note, self.workload = FAILED, f"{type(error).__name__}: {lines[0][:160]}", None

    def judge(self, error: Error, allowed: float, against: str) -> None:
        """Wrong if further than allowed from `against`."""
        if not error.rms <= allowed:  # nor NaN
            self.status, self.workload = WRONG, None
            self.note = f"RMS error {error.rms:.2g} against {against}, allowed {allowed:.2g}"


def measure(
    job: Job,
    device: torch.device,
    rounds: int,
    roofs: Roofs,
    *,
    rng: np.random.Generator,
    measure_first_call: FirstCallMeter,
    flush: Callable[[], None] | None = None,
) -> list[Row]:
    """The rows of a job, one per provider, with our ratio to the best other in it."""
    trials = [Trial(provider) for provider in job.providers]
    torch.compiler.reset()  # each case meets the compiler afresh: past a few shapes it would give up and stay eager
    check_against_reference(job, trials, device)
    own_processes = in_own_processes(job.case, device)
    if not own_processes:
        prepare(job, trials, device)
    check_at_full_size(job, trials, device)
    right = {trial.provider.name: trial for trial in trials if trial.is_right}
    calls = {name: trial.workload for name, trial in right.items() if trial.workload}
    with ExitStack() as processes:
        if own_processes:
            for trial in right.values():
                trial.workload = None  # the memory is theirs
            remote = {
                name: processes.enter_context(OwnProcess(job.case, trial.provider, job.dtype, device))
                for name, trial in right.items()
            }
            timed = interleaved(remote, rounds, _own_milliseconds, flush or (lambda: None), rng)
        else:
            clock = Clock(device, launches_count=job.case.launches_count)
            timed = interleaved(calls, rounds, clock, flush or CacheFlush(device), rng)
    for name, samples in timed.items():
        right[name].samples = samples
    for trial in trials:
        trial.workload = None  # the fresh process needs the memory
    for trial in (trial for trial in right.values() if trial.provider in job.in_fresh_process):
        try:
            trial.first = measure_first_call(job.case, trial.provider, job.dtype, device)
        except Exception as error:  # its times stand; memory and first call stay empty
            trial.note = f"fresh process: {type(error).__name__}: {error}"[:160]
    return _rows(job, trials, device, roofs, rounds)


def check_against_reference(job: Job, trials: list[Trial], device: torch.device) -> None:
    """The small case by everybody, against `reference/`; eager PyTorch's error is the yardstick for ours.

    But for compilers that the full size can check: compiling twice takes hours where a case is compiled for each of many.
    """
    small = job.case.small()
    truth = small.truth(job.dtype)
    yardstick: Error | None = None
    for trial in _eager_first(trials):
        if trial.provider.compile_mode and job.case.without_chance() == job.case:
            continue
        workload = _warm(small, trial, job.dtype, device, calls=1)
        if workload is None:
            continue
        trial.error = error_of(workload.parts(), truth)
        if trial.provider == EAGER:
            yardstick = trial.error
        trial.judge(trial.error, budget(job.dtype, yardstick if trial.provider.is_ours else None), "the reference")
    torch.compiler.reset()


def prepare(job: Job, trials: list[Trial], device: torch.device) -> None:
    """Build and warm up what is timed."""
    for trial in trials:
        if trial.is_right:
            trial.workload = _warm(job.case, trial, job.dtype, device)


def check_at_full_size(job: Job, trials: list[Trial], device: torch.device) -> None:
    """Everybody against eager PyTorch at the size that is timed.

    Where chance has a part, that is the case without it, for ours alone: a compiler would have to compile once more.
    """
    case = job.case.without_chance()
    expected = None
    for trial in _eager_first(trials):
        if case is None or not trial.is_right or (case != job.case and trial.provider not in (EAGER, OURS)):
            continue
        workload = trial.workload if case == job.case else _warm(case, trial, job.dtype, device, calls=1)
        if workload is None:
            continue
        parts = workload.parts()
        if trial.provider == EAGER:
            expected = parts
        elif expected is not None:
            trial.judge(error_of(parts, expected), budget(job.dtype), "eager at full size")


def _eager_first(trials: list[Trial]) -> list[Trial]:
    """The others are held to what eager PyTorch makes."""
    return sorted(trials, key=lambda trial: trial.provider != EAGER)


def _warm(case: Case, trial: Trial, dtype: str, device: torch.device, calls: int | None = None) -> Workload | None:
    """The provider's workload past its first calls; None if it fails, whatever its compiler or kernel throws."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's compilers; what they compute is checked
            workload = case.workload(trial.provider, dtype, device)
            for _ in range(calls or warm_up_calls(device)):
                workload()
            synchronise(device)
    except Exception as error:
        trial.fail(error)
        return None
    return workload


def in_own_processes(case: Case, device: torch.device) -> bool:
    """Whole training iterations on a CPU: our step tells its process to keep freed memory, which must not help the others."""
    return device.type == "cpu" and case.suite == "proxy"


class OwnProcess:
    """A provider's workload in a process of its own; a call makes it run once there, and gives the milliseconds."""

    def __init__(self, case: Case, provider: Provider, dtype: str, device: torch.device) -> None:
        arguments = (case, provider, dtype, str(device), torch.get_num_threads())
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(1, context, initializer=_hold, initargs=arguments)

    def __enter__(self) -> Callable[[], Any]:
        self()  # built, and past its first calls
        return self

    def __call__(self) -> float:
        return self._executor.submit(_time_held).result()

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown()


def _own_milliseconds(call: Callable[[], Any]) -> float:
    milliseconds: float = call()
    return milliseconds


_held: list[tuple[Workload, CacheFlush, Clock]] = []


def _hold(case: Case, provider: Provider, dtype: str, device_name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workload = case.workload(provider, dtype, device)
        for _ in range(warm_up_calls(device)):
            workload()
    _held.append((workload, CacheFlush(device), Clock(device, launches_count=case.launches_count)))


def _time_held() -> float:
    workload, flush, clock = _held[0]
    flush()
    return clock(workload)


def in_fresh_process(case: Case, provider: Provider, dtype: str, device: torch.device) -> FirstCall:
    """`first_call` in an interpreter that has done nothing else, and that finds no compiler's cache."""
    context = multiprocessing.get_context("spawn")
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    with ExitStack() as stack:
        folders = {name: stack.enter_context(tempfile.TemporaryDirectory()) for name in caches}
        stack.enter_context(mock.patch.dict(os.environ, folders))
        executor = stack.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=context))
        return executor.submit(first_call, case, provider, dtype, str(device), torch.get_num_threads()).result()


def _rows(job: Job, trials: list[Trial], device: torch.device, roofs: Roofs, rounds: int) -> list[Row]:
    case = job.case
    cost = case.cost(DTYPES[job.dtype].itemsize)
    rows = []
    for trial in trials:
        times = Summary.of(trial.samples.cold) if trial.samples.cold else None
        warm = Summary.of(trial.samples.warm) if trial.samples.warm else None
        memory = trial.first.peak_memory_bytes if trial.first else None
        channels_last = trial.provider.memory_format(device) == torch.channels_last
        row = Row(
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
            first_call_s=trial.first and trial.first.seconds,
            peak_memory_mb=None if memory is None else memory / 1e6,
            bytes=cost.bytes if cost else None,
            flops=cost.flops if cost else None,
            percent_of_roof=times and roofs.percent(cost, job.dtype, times.median),
            max_error=trial.error and trial.error.maximum,
            rms_error=trial.error and trial.error.rms,
            rounds=rounds if times else 0,
            note=trial.note,
        )
        rows.append(row)
    return _with_ratio(rows)


def _with_ratio(rows: list[Row]) -> list[Row]:
    value = ratio(rows)
    return [replace(row, ratio_to_best_other=value) if row.provider == OURS.name and row.median_ms else row for row in rows]
