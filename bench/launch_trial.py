"""What `bench/tune.py` runs in separate processes: compiling a launch without the GPU, and comparing two launches on it."""

import functools
import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from bench.accuracy import ONE_DRAW, relative_error
from bench.kernel_calls import Call, calls_of
from bench.timing import CacheFlush
from fast.kernels import triton as kernels
from fast.kernels.triton.launches import DEFAULT, Key, Launch, Table
from search.turns import Summary, in_turns

COMPILED, NO_FIT, FAILED, WRONG, BETTER, NOT_BETTER = "compiled", "does not fit", "failed", "WRONG", "better", "not better"
# For one program (CUDA programming guide, compute capabilities); 86, 89 and 120 are consumer GPUs.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# By bytes per value: launches add up the same products of the same rounded numbers, in another order. So bfloat16 may differ
# by the last bit of the result, and float32 by what TF32's accumulators cut off.
LIMITS = {2: ONE_DRAW.floor["bfloat16"], 4: ONE_DRAW.floor["float32"]}
ROUNDS = 20
_REDUCTIONS = ("fold_kernel", "sum_partials_kernel")
_QUEUED_CYCLES = 2_000_000  # about 1 ms, longer than the host needs to launch a call


class Trial(NamedTuple):
    """What became of one candidate: a line of the tuner's journal."""

    key: Key
    launch: Launch
    verdict: str  # one of the above
    best_us: float = 0.0  # all calls of an iteration, with the best launch until then; 0 where it was not measured
    us: float = 0.0  # the same with this launch, in the same turns
    note: str = ""


def triton_cache() -> Path:
    """The folder of Triton's compiled kernels: one folder for each kernel, and some for their launchers."""
    return Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()


def compiled(key: Key, launch: Launch, architecture: int) -> Trial:
    """Compile the kernel of `key` for each of its calls into Triton's cache, and find out whether it fits the GPU.

    With the counted launch, the other kernels of these calls are compiled too, because every comparison needs them.
    """
    from fast.kernels.triton import compilation  # Triton is not available on every system

    compilation.choose_absent_gpu(architecture)
    usages: list[dict[str, int]] = []

    def compile_only(kernel: Any, *arguments: Any, **constants: Any) -> None:
        is_own = kernel.fn.__name__ == f"{key[0]}_kernel"
        if is_own or launch == DEFAULT[key]:
            binary = compilation.compiled(kernel, *arguments, **constants)
            usages.extend([compilation.usage(binary)] if is_own else [])

    with launched_by(compile_only), launched_as(key, launch), precision_of_a_gpu():
        for _, call in calls_of(key, "cpu", drawn=False):
            call()
    misfit = next(filter(None, (why_not(usage, architecture) for usage in usages)), "")
    return Trial(key, launch, NO_FIT if misfit else COMPILED, note=misfit)


def why_not(usage: dict[str, int], architecture: int) -> str:
    """The reason not to measure a compiled kernel, or nothing. Triton itself refuses what does not fit an unknown GPU."""
    spilled = usage.get("stack", 0) + usage.get("local", 0)
    if spilled:
        return f"spills {spilled} bytes per thread"
    too_much = usage["shared"] > SHARED_BYTES.get(architecture, math.inf)
    return f"needs {usage['shared']} bytes of shared memory" if too_much else ""


def compared(key: Key, launch: Launch, best: Launch, device: str) -> Trial:
    """Compare the results of `key`'s calls with the counted launch's; if they are right, time them beside the best launch."""
    torch.cuda.set_device(device)
    prepared = _prepared(key, device)
    with launched_as(key, launch):
        error = _error([call() for _, call, _ in prepared], [expected for _, _, expected in prepared])
    if not error <= LIMITS[key[1]]:
        return Trial(key, launch, WRONG, note=f"error {error:.1e}, limit {LIMITS[key[1]]:.0e}")
    totals = sum(times * _microseconds(key, call, best, launch, device) for times, call, _ in prepared)
    best_time, time = (Summary.of(list(total)) for total in np.asarray(totals))
    return Trial(key, launch, verdict(best_time, time), best_time.median, time.median)


def verdict(best: Summary, candidate: Summary) -> str:
    """Better is only what is quicker by more than the spread."""
    return BETTER if candidate.median < best.median and best.differs_from(candidate) else NOT_BETTER


@functools.lru_cache(maxsize=1)
def _prepared(key: Key, device: str) -> list[tuple[int, Call, Any]]:
    """Each call on random numbers: how often it is made, the call, and its results with the counted launches."""
    torch.manual_seed(0)
    calls = list(calls_of(key, device, drawn=True))
    with launched_as(key, DEFAULT[key]):
        return [(times, call, call()) for times, call in calls]


def _error(results: Any, expected: Any) -> float:
    """The largest, relative to the largest value of its tensor; infinite or NaN if either has a value that is not finite."""
    both = zip(tree_leaves(results), tree_leaves(expected), strict=True)
    return float(np.max([relative_error(x.double(), wanted.double()).maximum for x, wanted in both if wanted is not None]))


def _microseconds(key: Key, call: Call, best: Launch, candidate: Launch, device: str) -> np.ndarray[Any, Any]:
    """The call's times with both launches, cold and in turns: (2, ROUNDS).

    Only the kernel of `key` is launched, and the small one right behind it that adds up what its tiles leave.
    """
    flush, launch_for_real, before = CacheFlush(torch.device(device)), kernels._launch, ""

    def launch_own(kernel: Any, *arguments: Any, **constants: Any) -> None:
        nonlocal before
        name, own = kernel.fn.__name__, f"{key[0]}_kernel"
        if name == own or (name in _REDUCTIONS and before == own):
            launch_for_real(kernel, *arguments, **constants)
        before = name

    def turn(launch: Launch) -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with launched_as(key, launch):
            torch.cuda._sleep(_QUEUED_CYCLES)  # type: ignore[no-untyped-call]  # no gap between launches is counted
            flush()
            start.record()
            call()
            end.record()
        return start, end

    turns = {"best": functools.partial(turn, best), "candidate": functools.partial(turn, candidate)}
    with launched_by(launch_own):
        events = in_turns(turns, 1 + ROUNDS, np.random.default_rng(0))
    torch.cuda.synchronize(device)
    timed = [events[name][1:] for name in turns]  # the first round loads the kernels
    return np.array([[1e3 * start.elapsed_time(end) for start, end in pairs] for pairs in timed])


def launched_by(function: Any) -> AbstractContextManager[object]:
    """Inside, the backend passes each launch to `function`: kernel, programs, launch, arguments, constants."""
    return mock.patch.object(kernels, "_launch", function)


def launched_as(key: Key, launch: Launch) -> AbstractContextManager[object]:
    """Inside, the backend takes this launch for `key`, and the counted ones for all other keys."""
    table = DEFAULT | {key: launch}

    def table_for(device: torch.device) -> Table:
        return table

    return mock.patch.object(kernels, "table_for", table_for)


def precision_of_a_gpu() -> AbstractContextManager[object]:
    """Inside, float32 maps on the CPU are multiplied as on a GPU by PyTorch's default, in TF32."""
    return mock.patch.object(kernels, "_input_precision", lambda x: "tf32" if x.dtype == torch.float32 else "ieee")
