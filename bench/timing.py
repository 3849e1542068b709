"""Measure time and memory.

Providers take turns (`search/turns.py`). A turn is two calls: one with the caches flushed (cold) and one right behind
it (warm). A call that lasts longer than `LONG_MS` goes through the caches many times by itself and is made once. What a long
training pays is neither: calls back to back, with no wait between them. First call and memory are those of a fresh process.
"""

import ctypes
import gc
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.cases import Case, Provider
from search.turns import back_to_back_ms, in_turns, synchronise

LONG_MS = 300.0
_QUEUED_CYCLES = 20_000_000  # about 10 ms, longer than the host needs to launch any case


class Samples(NamedTuple):
    """Milliseconds of each round; warm ones of short calls alone."""

    cold: list[float]
    warm: list[float]


def interleaved(
    calls: Mapping[str, Callable[[], None]],
    rounds: int,
    clock: Callable[[Callable[[], None]], float],
    flush: Callable[[], None],
    rng: np.random.Generator,
    turn_of: Callable[[str], None] = lambda name: None,
    seconds: float = math.inf,
) -> dict[str, Samples]:
    """Time every call once per round, cold and then warm; `turn_of` hears whose turn it is.

    No round begins after `seconds`, but there are three at least.
    """

    def turn(name: str) -> tuple[float, ...]:
        turn_of(name)
        flush()
        cold = clock(calls[name])
        return (cold, clock(calls[name])) if cold < LONG_MS else (cold,)

    taken = in_turns({name: partial(turn, name) for name in calls}, rounds, rng, seconds=seconds)
    return {
        name: Samples([turn[0] for turn in turns], [turn[1] for turn in turns if len(turn) > 1])
        for name, turns in taken.items()
    }


class Clock:
    """Measures the milliseconds of a call: the device's busy time alone, or the time that a user waits."""

    def __init__(self, device: torch.device, *, launches_count: bool) -> None:
        self._device = device
        self._of_device = device.type == "cuda" and not launches_count

    def __call__(self, call: Callable[[], None]) -> float:
        if self._of_device:
            return self._busy(call)
        return back_to_back_ms(call, self._device, 1)

    def _busy(self, call: Callable[[], None]) -> float:
        """Time with the device waiting until all is launched, so that no gap between two launches is counted."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_QUEUED_CYCLES)  # type: ignore[no-untyped-call]  # PyTorch's own tests hold a stream by it
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


class CacheFlush:
    """Writes a buffer four times as large as the last-level cache."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(4 * last_level_cache_bytes(device), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1)


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache as the driver or the system states it; 64 MiB if neither does."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_kibibytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return 1024 * max(sizes, default=64 * 1024)


def _kibibytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KM])\s*", text)
    return int(match[1]) * {"K": 1, "M": 1024}[match[2]] if match else 0


def prepared(device_name: str, threads: int) -> torch.device:
    """The device, prepared in a process that has not used it yet."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded in its stream
    return device


class FirstCall(NamedTuple):
    """A fresh process's, which has imported everything and holds inputs and weights."""

    seconds: float
    peak_mb: float | None  # of an iteration, above what was used before; None if unknown
    written_mb: float | None = None  # what it has written


def first_call(case: Case, provider: Provider, dtype: str, device_name: str, threads: int) -> FirstCall:
    """Measure the first call; to be run in a fresh process.

    Memory counts from before the first call, so what a step keeps from then on (momentum, buffers, a captured graph's pool)
    is part of it. If that call compiles, it counts from after the call, because a compiler's memory is not an iteration's.
    """
    device = prepared(device_name, threads)
    workload = case.workload(provider, dtype, device)
    gc.collect()
    meter = _MemoryMeter(device)
    seconds = back_to_back_ms(workload, device, 1) / 1e3
    if provider.compile_mode:
        workload.drop()
        gc.collect()
        meter = _MemoryMeter(device)
    for _ in range(warm_up_calls(device)):
        workload()
    synchronise(device)
    peak, written = (None if number is None else number / 1e6 for number in (meter.peak(), workload.written_bytes))
    return FirstCall(seconds, peak, written)


class _MemoryMeter:
    """Peak memory since it was made, above what there was then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # the iteration could use what is kept for it unseen
            trim(0)
        self._resets = _write("/proc/self/clear_refs", "5")
        self._before, self._code_before = _status("VmRSS"), _status("RssFile")

    def peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        if not self._resets or not self._before:  # not Linux
            return None
        code = _status("RssFile") - self._code_before  # pages of libraries that were touched meanwhile are no data
        return max(0, _status("VmHWM") - self._before - code)


def _write(path: str, text: str) -> bool:
    try:
        Path(path).write_text(text)
    except OSError:
        return False
    return True


def _status(field_name: str) -> int:
    """Bytes from /proc/self/status; 0 if there is no such file."""
    try:
        match = re.search(rf"{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def warm_up_calls(device: torch.device) -> int:
    """Number of calls after which compilation and the recording of graphs are done (our step records in its fourth)."""
    return 5 if device.type == "cuda" else 1
