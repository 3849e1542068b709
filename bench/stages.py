"""What the stages of a run do in a process of their own, besides the benchmark's jobs. Each says its numbers one by one.

A stage is a `Stage`: jobs, or one of the functions here. Its process may break the GPU's context, hang or reach its limit,
and costs only what the stage has not said yet.
"""

import importlib.util
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import fast.train_step
from bench.caching_case import CachingCase
from bench.cases import OURS, Case, DType, Job, Workload, supported_dtypes
from bench.launch_trial import launched_by, precision_of_a_gpu
from bench.load import Others
from bench.measure import Attempt, Run, empty_row, note_steps, note_times
from bench.results import NOT_CHECKED
from bench.roofline import measure_roofs
from bench.timing import CacheFlush, Clock, Samples, interleaved, last_level_cache_bytes, warm_up_calls
from bench.training_cases import NewCellCase, SearchCase
from bench.worker import Say
from fast import kernels
from search.turns import Summary, back_to_back_ms

ROOT = Path(__file__).parents[1]
GPU_TESTS = ("tests/fast/kernels/test_triton_on_gpu.py", "tests/fast/test_train_step.py")


@dataclass(frozen=True)
class Stage:
    """Jobs of the benchmark, or a function of (run, *jobs, say), stopped after `limit_s` seconds.

    A function says rows, and numbers by their names. Some names have a meaning: `roof` (bench/roofline.py), `kernel` (a line
    of a table), `failed_test`, `provider` with `result`; `status` is how the stage ended.
    """

    name: str
    limit_s: float = math.inf
    jobs: tuple[Job, ...] = ()
    function: Callable[..., None] | None = None
    is_case: bool = False  # a single job, which has the process of the stage before it


def roofs(run: Run, say: Say) -> None:
    """Measure copy bandwidth and matrix product rates; for a GPU also read `nvidia-smi` and time a small kernel."""
    device = run.prepare()
    if device.type == "cuda":
        say(gpu_state())
    for roof in measure_roofs(device, supported_dtypes(device)[0]):
        say(roof)
    if device.type == "cuda":
        say({"roof": "copy within the L2 cache", "gb_per_s": cached_copy_gb_per_s(device)})
        x = torch.zeros(1, device=device)
        say({"roof": "smallest node of a graph", "us": node_us(lambda: x.add_(1), device)})


def gpu_state() -> dict[str, Any]:
    """Read driver, clocks, power and what limits them; nothing is set."""
    names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,"
    names += "clocks_event_reasons.active,compute_mode,mig.mode.current"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": str(error)}
    values = (result.stdout.splitlines() or [result.stderr.strip()])[0].split(", ")
    return dict(zip(names.split(","), values, strict=False))


def cached_copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and bytes written, copying a buffer of a quarter of the L2 cache."""
    source = torch.ones(last_level_cache_bytes(device) // 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / node_us(lambda: target.copy_(source), device) / 1e3


def node_us(call: Callable[[], object], device: torch.device, nodes: int = 100) -> float:
    """Microseconds per node, of many such nodes in sequence in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    call()
    with torch.cuda.graph(graph):
        for _ in range(nodes):
            call()
    return 1e3 * back_to_back_ms(graph.replay, device, 20) / nodes


def tiny_cell(run: Run, job: Job, say: Say) -> None:
    """Compare one training step of a small cell with every kind of branch, by each provider, with its truth."""
    attempt = Attempt(job, run.prepare(), lambda provider: say({"at_work": provider}))
    attempt.check_small()
    for provider, row in attempt.rows.items():
        errors = {"rms_error": row.rms_error, "max_error": row.max_error}
        say({"provider": provider.name, "result": row.status, "note": row.note, **errors})


def iteration(run: Run, job: Job, say: Say) -> None:
    """Measure our training step: first call, calls back to back, memory, cold calls; each is reported when it is known."""
    device = run.prepare()
    on_gpu = device.type == "cuda"
    workload, before = job.case.workload(OURS, job.dtype, device), torch.cuda.memory_allocated(device) if on_gpu else 0
    row = replace(empty_row(job, OURS, device), status=NOT_CHECKED)  # until the stage beside eager
    with Others() as others:
        row.first_call_s, steps = say_calls(workload, device, say)
    note_steps(row, steps)
    row.others_percent = others.percent
    if on_gpu:
        row.peak_memory_mb = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        say({"peak_memory_mb": row.peak_memory_mb, "reserved_mb": torch.cuda.max_memory_reserved(device) / 1e6})
    say(replace(row))
    with Others() as others:
        samples = cold_samples(workload, device, run.rounds, launches_count=True)
    note_times(row, samples, run.roofs, max(filter(None, (row.others_percent, others.percent)), default=others.percent))
    say({"cold_ms_with_launches": row.median_ms})
    say(row)
    if on_gpu:
        of_the_device = cold_samples(workload, device, run.rounds, launches_count=False)
        say({"cold_ms_of_the_device": Summary.of(of_the_device.cold).median})
        for _ in range(500):  # launched, not waited for
            workload()
        say({"while_it_runs": True, **gpu_state()})


def say_calls(workload: Workload, device: torch.device, say: Say) -> tuple[float, list[float]]:
    """Seconds of the first call, and milliseconds of the many with no wait between them, on a GPU ten times as many."""
    first_call_s = back_to_back_ms(workload, device, 1) / 1e3
    say({"first_call_s": first_call_s})
    for call in range(2, 2 + warm_up_calls(device)):  # on a GPU one of them captures the graph
        say({"call": call, "ms": back_to_back_ms(workload, device, 1)})
    calls, times = (50, 10) if device.type == "cuda" else (3, 1)
    steps = list[float]()
    for number in range(times):
        steps.append(back_to_back_ms(workload, device, calls))
        if number in (0, times - 1):
            loss = float(workload.parts()["output"][0])
            say({"calls_back_to_back": calls * len(steps), "ms": statistics.fmean(steps), "loss": loss})
    return first_call_s, steps


def cold_samples(workload: Workload, device: torch.device, rounds: int, *, launches_count: bool) -> Samples:
    """Our calls with flushed caches."""
    clock, rng = Clock(device, launches_count=launches_count), np.random.default_rng(0)
    return interleaved({OURS.name: workload}, rounds, clock, CacheFlush(device), rng)[OURS.name]


def both_grids(run: Run, corners: Job, centres: Job, say: Say) -> None:
    """Time our training steps on features at corners and at centres, in turns with flushed caches, and give their ratio."""
    device, rng = run.prepare(), np.random.default_rng(0)
    calls = {name: job.case.workload(OURS, job.dtype, device) for name, job in (("corners", corners), ("centres", centres))}
    for workload in calls.values():
        for _ in range(1 + warm_up_calls(device)):
            workload()
    samples = interleaved(calls, run.rounds, Clock(device, launches_count=True), CacheFlush(device), rng)
    ms = {name: Summary.of(of_grid.cold).median for name, of_grid in samples.items()}
    say({f"{name}_ms": median for name, median in ms.items()})
    say({"centres_by_corners": ms["centres"] / ms["corners"]})


def graph_beside_calls(run: Run, job: Job, say: Say) -> None:
    """Compare the losses of the same steps from the same seed, by the captured graph and call by call: they must agree."""
    device, losses = run.prepare(), []
    for eager_iterations in (fast.train_step.EAGER_ITERATIONS, sys.maxsize):
        torch.manual_seed(0)
        with mock.patch.object(fast.train_step, "EAGER_ITERATIONS", eager_iterations):
            workload = job.case.workload(OURS, job.dtype, device)
            losses.append([_loss_of(workload) for _ in range(8)])
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    say({"largest_difference_of_losses": difference, "by_graph": losses[0], "by_calls": losses[1]})


def cells_in_flight(run: Run, job: Job, say: Say) -> None:
    """Measure the training steps of one to four cells in turns, each on a stream of its own, as a search trains them."""
    device = run.prepare()
    cells: list[tuple[Workload, torch.cuda.Stream]] = []

    def one_step_each() -> None:
        for workload, stream in cells:
            with torch.cuda.stream(stream):
                workload()

    for _ in range(4):
        cells.append((job.case.workload(OURS, job.dtype, device), torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]
        for _ in range(warm_up_calls(device)):  # one of them captures the graph
            one_step_each()
        ms = back_to_back_ms(one_step_each, device, 200)
        say({"cells_in_flight": len(cells), "ms_per_iteration": ms / len(cells)})


def _loss_of(workload: Workload) -> float:
    workload()
    return float(workload.parts()["output"][0])


def gpu_tests(run: Run, say: Say) -> None:
    """Run the tests of `fast/`, first those that need a GPU; report each failure at once, and the counts as they grow."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        say({"skipped": "pytest and hypothesis are not both installed"})
        return
    counts = Counter[str]()
    for paths in (GPU_TESTS, ("tests/fast", *(f"--ignore={path}" for path in GPU_TESTS))):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "bench.pytest_at_once", *paths]
        command += ["-n", "6"] if importlib.util.find_spec("xdist") is not None else []
        code = _count_tests(command, counts, say)
        say(dict(counts) | {"of": paths[0], "pytest_exit_code": code})


def _count_tests(command: Sequence[str], counts: Counter[str], say: Say) -> int:
    environment, said_at = os.environ | {"TRITON_INTERPRET": "0", "HYPOTHESIS_PROFILE": "dev"}, time.monotonic()
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            result = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
            test = re.search(r"\S+::.*?(?=\s+(?:PASSED|FAILED|ERROR|SKIPPED)\b|\s*$)", line)
            if result is None or test is None or line.startswith(("FAILED", "ERROR")):  # failures are repeated at the end
                continue
            counts[result[1].lower()] += 1
            if result[1] in ("FAILED", "ERROR"):
                say({"failed_test": test[0]})
            if time.monotonic() > said_at + 10:
                said_at = time.monotonic()
                say(dict(counts))
    return process.returncode


def compile_kernels(architecture: int, jobs: Iterable[Job]) -> int:
    """Compile into Triton's cache all that the jobs launch on a GPU of sm_<architecture>, without one -> number of kernels.

    Our workloads run on CPU tensors with a launch function that compiles instead. Random cells are left out.
    """
    from fast.kernels import triton
    from fast.kernels.triton import compilation  # Triton is not available on every system

    compilation.choose_absent_gpu(architecture)
    compiled = set()

    def compile_only(*arguments: Any, **constants: Any) -> None:
        compiled.add(compilation.compiled(*arguments, **constants).hash)
        print(f"\r{len(compiled)} kernels", end="", file=sys.stderr, flush=True)

    device = torch.device("cpu")
    with launched_by(compile_only), precision_of_a_gpu(), kernels.using(triton):
        for case, dtype in dict.fromkeys(pair for job in jobs for pair in _sizes_of(job)):
            case.workload(OURS, dtype, device)()
    return len(compiled)


def _sizes_of(job: Job) -> Iterator[tuple[Case, DType]]:
    """The job's case at every size at which ours computes it."""
    if not isinstance(job.case, NewCellCase | SearchCase | CachingCase):
        sizes = [job.case.small(), job.case.without_chance(), job.case]
        yield from ((sized, job.dtype) for sized in dict.fromkeys(sizes) if sized is not None)
