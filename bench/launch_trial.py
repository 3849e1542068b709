"""What `bench/tune.py` runs in separate processes: compiling a launch without the GPU, and comparing two launches on it."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.accuracy import ONE_DRAW, error_of
from bench.cases import Parts
from bench.kernel_calls import DTYPES, Call, Inputs, calls_of
from bench.timing import CacheFlush
from fast.kernels import triton as kernels
from fast.kernels.triton.launches import DEFAULT, Key, Launch
from search.reports.turns import Summary

ROUNDS = 20
# For one program (CUDA programming guide, compute capabilities); 86, 89 and 120 are consumer GPUs.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_REDUCTIONS = ("fold_kernel", "sum_partials_kernel")
_QUEUED_CYCLES = 4_000_000  # about 2 ms, longer than the host needs to launch two calls


def triton_cache() -> Path:
    """The folder of Triton's compiled kernels: one folder for each kernel, and some for their launchers."""
    return Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()


class Comparison(NamedTuple):
    """A candidate beside the best launch so far: microseconds of all their calls in an iteration."""

    error: float  # the largest, relative to the largest value of the counted launch
    limit: float
    best: Summary
    candidate: Summary

    @property
    def is_better(self) -> bool:
        """Whether the candidate is faster by more than the spread."""
        return self.candidate.median < self.best.median and self.best.differs_from(self.candidate)


def compiled(key: Key, launch: Launch, architecture: int) -> dict[str, int]:
    """Compile the kernel of `key` for each of its calls; return the largest use of each resource.

    With the counted launch, the other kernels of these calls are compiled too, because every comparison needs them.
    """
    from fast.kernels.triton import compilation  # Triton is not available on every system

    compilation.choose_absent_gpu(architecture)
    rows: list[dict[str, int]] = []

    def compile_only(kernel: Any, *arguments: Any, **constants: Any) -> None:
        is_own = kernel.fn.__name__ == f"{key[0]}_kernel"
        if is_own or launch == DEFAULT[key]:
            binary = compilation.compiled(kernel, *arguments, **constants)
            rows.extend([compilation.usage(binary)] if is_own else [])

    with launched_by(compile_only), own_table() as table, precision_of_a_gpu():
        table[key] = launch
        for call in calls_of(key, Inputs(torch.device("cpu"), drawn=False)):
            call.prepare()()
    return {resource: max(row[resource] for row in rows) for resource in rows[0]}


def compared(key: Key, best: Launch, candidate: Launch, device_name: str) -> Comparison:
    """Time the calls of `key` with both launches in turns, and compare the candidate's results with the counted launch's.

    Both add up the same products of the same rounded numbers, in another order. So float32 may differ by what TF32's
    accumulators cut off, and bfloat16 by the last bit of the result.
    """
    device = torch.device(device_name)
    torch.cuda.set_device(device)
    prepared = _prepared(key, device_name)
    limit = ONE_DRAW.floor["float32" if DTYPES[key[1]] == torch.float32 else "bfloat16"]
    with own_table() as table:
        table[key] = candidate
        error = max(error_of(_results(call), expected).maximum for _, call, expected in prepared)
        totals = {launch: np.zeros(ROUNDS) for launch in (best, candidate)}
        if error <= limit:
            for times, call, _ in prepared:
                for launch, samples in _microseconds(key, call, table, [best, candidate], device).items():
                    totals[launch] += times * np.array(samples)
    return Comparison(error, limit, Summary.of(list(totals[best])), Summary.of(list(totals[candidate])))


@functools.lru_cache(maxsize=1)
def _prepared(key: Key, device_name: str) -> list[tuple[int, Call, Parts]]:
    """Each call on random numbers: how often it is made, the call, and its results with the counted launches."""
    torch.manual_seed(0)
    calls = [(call.times, call.prepare()) for call in calls_of(key, Inputs(torch.device(device_name), drawn=True))]
    with own_table():
        return [(times, call, _results(call)) for times, call in calls]


def _results(call: Call) -> Parts:
    return {str(i): [tensor] for i, tensor in enumerate(_tensors(call()))}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            yield from _tensors(child)


def _microseconds(
    key: Key, call: Call, table: dict[Key, Launch], launches: list[Launch], device: torch.device
) -> dict[Launch, list[float]]:
    """The kernel of `key`, with the small one right behind it that adds up what its tiles leave: cold, in turns."""
    flush, rng, launch_for_real = CacheFlush(device), np.random.default_rng(0), kernels._launch
    before = ""

    def launch_own(kernel: Any, *arguments: Any, **constants: Any) -> None:
        nonlocal before
        name = kernel.fn.__name__
        if name == f"{key[0]}_kernel" or (name in _REDUCTIONS and before == f"{key[0]}_kernel"):
            launch_for_real(kernel, *arguments, **constants)
        before = name

    events: dict[Launch, list[Any]] = {launch: [] for launch in launches}
    with launched_by(launch_own):
        for launch in launches:  # loads the compiled kernels
            table[key] = launch
            call()
        for _ in range(ROUNDS):
            torch.cuda._sleep(_QUEUED_CYCLES)  # type: ignore[no-untyped-call]  # no gap between launches is counted
            for i in rng.permutation(len(launches)):
                table[key] = launches[i]
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                flush()
                start.record()
                call()
                end.record()
                events[launches[i]].append((start, end))
    torch.cuda.synchronize(device)
    return {launch: [1e3 * start.elapsed_time(end) for start, end in pairs] for launch, pairs in events.items()}


@contextlib.contextmanager
def launched_by(function: Any) -> Iterator[None]:
    """Inside, the backend passes each launch to `function`: kernel, programs, launch, arguments, constants."""
    with mock.patch.object(kernels, "_launch", function):
        yield


@contextlib.contextmanager
def own_table() -> Iterator[dict[Key, Launch]]:
    """Inside, the backend uses the table that this yields: a copy of the counted one, which the caller may change."""
    table = dict(DEFAULT)

    def table_for(device: torch.device) -> dict[Key, Launch]:
        return table

    with mock.patch.object(kernels, "table_for", table_for):
        yield table


@contextlib.contextmanager
def precision_of_a_gpu() -> Iterator[None]:
    """Inside, float32 maps on the CPU are multiplied as on a GPU by PyTorch's default, in TF32."""

    def input_precision(x: Tensor) -> str:
        return "tf32" if x.dtype == torch.float32 else "ieee"

    with mock.patch.object(kernels, "_input_precision", input_precision):
        yield
