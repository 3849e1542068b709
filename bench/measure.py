"""One job: check everybody, then time them. A provider that fails or is wrong gets a row that says so.

A kernel that reads where it must not breaks the GPU's context for its whole process: so a job is measured in a `Worker`, and
whoever breaks it is left out of a second attempt, in a new one.
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
from bench.results import FAILED, OK, WRONG, Row, ratio
from bench.roofline import Roofs
from bench.suites import Job
from bench.timing import (
    CacheFlush,
    Clock,
    FirstCall,
    Samples,
    first_call,
    interleaved,
    prepared,
    warm_up_calls,
)
from bench.worker import OutOfTime, Say, Worker, WorkerLost, Workers, WorkFailed, has_lost_its_device
from search.reports.turns import Summary, back_to_back_ms, synchronise

FirstCallMeter = Callable[[Case, Provider, str, torch.device], FirstCall]
BACK_TO_BACK_MS = 300.0  # how long a provider's calls without a wait between them last, together


@dataclass
class Trial:
    """What is known of a provider so far."""

    provider: Provider
    error: Error | None = None
    status: str = OK
    note: str = ""
    workload: Workload | None = None
    samples: Samples = Samples([], [])
    back_to_back: float | None = None  # milliseconds a call
    first: FirstCall | None = None

    @property
    def runs(self) -> bool:
        return self.status != FAILED

    def fail(self, error: Exception) -> None:
        """An exception is a result too: of this provider alone."""
        lines = str(error).strip().splitlines() or [""]
        self.status, self.note, self.workload = FAILED, f"{type(error).__name__}: {lines[0][:160]}", None

    def judge(self, error: Error, allowed: float, against: str) -> None:
        """Wrong if further than allowed from `against`. How long it takes is worth knowing even so."""
        if not error.rms <= allowed:  # nor NaN
            self.status = WRONG
            self.note = f"RMS error {error.rms:.2g} against {against}, allowed {allowed:.2g}"


def measure_apart(
    workers: Workers,
    job: Job,
    device: torch.device,
    rounds: int,
    roofs: Roofs,
    seed: int,
    limit_s: float | None = None,
) -> list[Row]:
    """`measure` in a process of its own, again without the provider that was at work whenever that process breaks.

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
            rows = workers.living()(_measure, *arguments, limit_s=rest_s, say=at_work.append) if left else []
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
    device = prepared(device_name, threads)
    return measure(job, device, rounds, roofs, seed=seed, measure_first_call=in_fresh_process, say=say)


def measure(
    job: Job,
    device: torch.device,
    rounds: int,
    roofs: Roofs,
    *,
    seed: int,
    measure_first_call: FirstCallMeter,
    flush: Callable[[], None] | None = None,
    say: Say = lambda provider: None,
) -> list[Row]:
    """The rows of a job, one per provider, with our ratio to the best other in it; `say` hears the name of who is at work."""
    trials, rng = [Trial(provider) for provider in job.providers], np.random.default_rng(seed)
    torch.compiler.reset()  # each case meets the compiler afresh: past a few shapes it would give up and stay eager
    check_against_reference(job, trials, device, say)
    own_processes = in_own_processes(job.case, device)
    if not own_processes:
        prepare(job, trials, device, say)
    check_at_full_size(job, trials, device, say)
    if own_processes:
        time_in_own_processes(job, trials, device, rounds, rng, say)
    else:
        time_here(job, trials, device, rounds, rng, flush or CacheFlush(device), say)
    for trial in trials:
        trial.workload = None  # the fresh process needs the memory
    for trial in (trial for trial in trials if trial.runs and trial.provider in job.in_fresh_process):
        try:
            trial.first = measure_first_call(job.case, trial.provider, job.dtype, device)
        except (WorkFailed, WorkerLost) as error:  # its times stand; memory and first call stay empty
            trial.note = f"fresh process: {error}"[:160]
    return _with_ratio([row_of(job, trial, device, roofs, rounds) for trial in trials])


def time_here(
    job: Job,
    trials: list[Trial],
    device: torch.device,
    rounds: int,
    rng: np.random.Generator,
    flush: Callable[[], None],
    say: Say,
) -> None:
    """Cold and warm; whole iterations on a GPU, of which a training makes thousands, back to back as well."""
    running = {trial.provider.name: trial for trial in trials if trial.workload}
    calls = {name: trial.workload for name, trial in running.items() if trial.workload}
    clock = Clock(device, launches_count=job.case.launches_count)
    for name, samples in interleaved(calls, rounds, clock, flush, rng, say).items():
        running[name].samples = samples
    if device.type == "cuda" and job.case.repeats:
        samples_ms: dict[str, list[float]] = {name: [] for name in calls}
        for name in (name for _ in range(3) for name in rng.permutation(list(calls))):
            say(name)
            count = max(3, round(BACK_TO_BACK_MS / statistics.median(running[name].samples.cold)))
            samples_ms[name].append(back_to_back_ms(calls[name], device, count))
        for name, values in samples_ms.items():
            running[name].back_to_back = statistics.median(values)


def time_in_own_processes(
    job: Job, trials: list[Trial], device: torch.device, rounds: int, rng: np.random.Generator, say: Say
) -> None:
    """Each provider's calls in a process of its own, still in turns."""
    running = {trial.provider.name: trial for trial in trials if trial.runs}
    for trial in trials:
        trial.workload = None  # the memory is theirs
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker()) for name in running}
        for name, worker in workers.items():
            say(name)
            worker(_hold, job.case, running[name].provider, job.dtype, str(device), torch.get_num_threads())
        remote = {name: functools.partial(worker, _time_held) for name, worker in workers.items()}
        for name, samples in interleaved(remote, rounds, _own_milliseconds, lambda: None, rng, say).items():
            running[name].samples = samples


def check_against_reference(job: Job, trials: list[Trial], device: torch.device, say: Say) -> None:
    """The small case by everybody, against `reference/`; eager PyTorch's error is the yardstick for ours.

    But for compilers that the full size can check: compiling twice takes hours where a case is compiled for each of many.
    """
    small = job.case.small()
    truth = small.truth(job.dtype)
    yardstick: Error | None = None
    for trial in _eager_first(trials):
        if trial.provider.compile_mode and job.case.without_chance() == job.case:
            continue
        workload = _warm(small, trial, job.dtype, device, say, calls=1)
        if workload is None:
            continue
        trial.error = error_of(workload.parts(), truth)
        if trial.provider == EAGER:
            yardstick = trial.error
        trial.judge(trial.error, budget(job.dtype, yardstick if trial.provider.is_ours else None), "the reference")
    torch.compiler.reset()


def prepare(job: Job, trials: list[Trial], device: torch.device, say: Say) -> None:
    """Build and warm up what is timed."""
    for trial in trials:
        if trial.runs:
            trial.workload = _warm(job.case, trial, job.dtype, device, say)


def check_at_full_size(job: Job, trials: list[Trial], device: torch.device, say: Say) -> None:
    """Everybody against eager PyTorch at the size that is timed.

    Where chance has a part, that is the case without it, for ours alone: a compiler would have to compile once more.
    """
    case = job.case.without_chance()
    expected = None
    for trial in _eager_first(trials):
        if case is None or trial.status != OK or (case != job.case and trial.provider not in (EAGER, OURS)):
            continue
        workload = trial.workload if case == job.case else _warm(case, trial, job.dtype, device, say, calls=1)
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


def _warm(case: Case, trial: Trial, dtype: str, device: torch.device, say: Say, calls: int | None = None) -> Workload | None:
    """The provider's workload past its first calls; None if it fails, whatever its compiler or kernel throws."""
    say(trial.provider.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's compilers; what they compute is checked
            workload = case.workload(trial.provider, dtype, device)
            for _ in range(calls or warm_up_calls(device)):
                workload()
            synchronise(device)
    except Exception as error:
        if has_lost_its_device():  # for all who come behind, too
            raise
        trial.fail(error)
        return None
    return workload


def in_own_processes(case: Case, device: torch.device) -> bool:
    """Whole training iterations on a CPU: our step tells its process to keep freed memory, which must not help the others."""
    return device.type == "cpu" and case.suite == "proxy"


def _own_milliseconds(call: Callable[[], Any]) -> float:
    milliseconds: float = call()
    return milliseconds


_held: list[tuple[Workload, CacheFlush, Clock]] = []


def _hold(case: Case, provider: Provider, dtype: str, device_name: str, threads: int) -> None:
    device = prepared(device_name, threads)
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
    with ExitStack() as stack:
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        folders = {name: stack.enter_context(tempfile.TemporaryDirectory()) for name in caches}
        with mock.patch.dict(os.environ, folders):
            worker = stack.enter_context(Worker(preload="bench.training_cases"))
        first: FirstCall = worker(first_call, case, provider, dtype, str(device), torch.get_num_threads())
        return first


def row_of(job: Job, trial: Trial, device: torch.device, roofs: Roofs, rounds: int) -> Row:
    """What is known of a provider, as a line of the results."""
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


def _with_ratio(rows: list[Row]) -> list[Row]:
    value = ratio(rows)
    return [replace(row, ratio_to_best_other=value) if row.provider == OURS.name else row for row in rows]
