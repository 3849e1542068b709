"""A run of limited minutes: what matters most comes first, each stage in its own process, each number saved at once.

For a machine that one has for minutes and cannot reach meanwhile. An illegal memory access, a hang or the end of the time
costs only the stage in which it happens, and nothing that was measured before. `python bench/run.py --minutes 8 --out DIR`.
"""

import csv
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity

import fast.train_step
from bench.cases import (
    COMPILE,
    COMPILE_MAX,
    EAGER,
    EAGER_CHANNELS_LAST,
    OURS,
    Case,
    DepthwiseCase,
    DType,
    OperationCase,
    Provider,
    Workload,
)
from bench.launch_trial import launched_by, precision_of_a_gpu, triton_cache
from bench.measure import Attempt, empty_row, measure_apart, note_times, warmed
from bench.results import DONE, NOT_CHECKED, OUT_OF_TIME, Row, write_table
from bench.roofline import Roofs, measure_roofs
from bench.suites import PAPER, Job, Planner, Scale, rate_of, supported_dtypes
from bench.timing import CacheFlush, Clock, Samples, interleaved, last_level_cache_bytes, prepared, warm_up_calls
from bench.training_cases import NewCellCase, SearchCase
from bench.worker import OutOfTime, Say, Worker, WorkerLost, WorkFailed
from fast import kernels
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from search.reports.turns import Summary, back_to_back_ms, synchronise

ROOT = Path(__file__).parents[1]
PREDICTIONS = Path(__file__).parent / "predictions"
EAGERS = (EAGER, EAGER_CHANNELS_LAST)
RATES = ((6, 21), (1, 1))  # far and dense reads, for convolutions only
REPLAYS = 3
GPU_TESTS = ("tests/fast/kernels/test_triton_on_gpu.py", "tests/fast/test_train_step.py")
EVERY_KIND = Cell(  # of branch, each input normed or not, one map read twice
    (
        Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate=(1, 6))),
        Branch(0, AtrousSeparableConv(rate=(3, 1))),
        Branch(0, Conv1x1()),
        Branch(1, PyramidPooling(grid_size=(2, 4))),
        Branch(BACKBONE_FEATURE, Conv1x1()),
    )
)
NCU_METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "dram__bytes.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
)


@dataclass(frozen=True)
class Run:
    """The settings that every stage gets."""

    device_name: str
    threads: int
    rounds: int
    roofs: Roofs
    stem: Path  # beginning of the names of the run's files: <folder>/<date>-<commit>

    def prepare(self) -> torch.device:
        """The device, in a stage's process."""
        return prepared(self.device_name, self.threads)

    def file(self, ending: str) -> Path:
        """<stem>-<ending>"""
        return self.stem.with_name(f"{self.stem.name}-{ending}")


@dataclass(frozen=True)
class Stage:
    """Jobs of the benchmark, or a function of (run, *jobs, say), stopped after `limit_s` seconds."""

    name: str
    limit_s: float
    jobs: tuple[Job, ...] = ()
    function: Callable[..., None] | None = None


def plan_stages(device: torch.device, scale: Scale) -> Iterator[Stage]:
    """The stages, most important first. On a GPU those that need no other compiler should be done in four minutes."""
    first, *others = supported_dtypes(device)[0][:2]
    planner = Planner(scale, device, quick=False, full=False)
    step = {dtype: _jobs([scale.proxy], dtype) for dtype in (first, *others)}
    yield Stage("roofs", 60, function=roofs)
    tiny = replace(scale.proxy, cell=EVERY_KIND).small()
    for dtype in (first, *others):
        yield Stage(f"tiny cell, {dtype}", 90, (Job(tiny, dtype, (EAGER, OURS), ()),), tiny_cell)
    yield Stage(f"iteration, {first}", 120, step[first], iteration)
    yield Stage(f"profile, {first}", 60, step[first], profile)
    if device.type == "cuda":
        yield Stage(f"graph beside calls, {first}", 45, step[first], graph_beside_calls)
    yield Stage("loss", 60, _jobs(planner.cases(["loss"]), first))
    for kind, name in ((DepthwiseCase, "depthwise"), (OperationCase, "separable")):
        cases = [case for case in planner.cases(["ops"]) if isinstance(case, kind) and rate_of(case) in RATES]
        for shape in dict.fromkeys(case.shape for case in cases):
            yield Stage(f"{name}, {shape}", 75, _jobs([case for case in cases if case.shape == shape], first))
    yield Stage(f"iteration beside eager, {first}", 75, step[first])
    for dtype in others:
        yield Stage(f"iteration, {dtype}", 90, step[dtype], iteration)
        yield Stage(f"profile, {dtype}", 60, step[dtype], profile)
        yield Stage(f"iteration beside eager, {dtype}", 75, step[dtype])
    if device.type == "cuda":
        yield Stage("tests", 150, function=gpu_tests)
    for compiler, limit_s in ((COMPILE, 120), (COMPILE_MAX, 180)):
        yield Stage(f"iteration beside {compiler.name}", limit_s, _jobs([scale.proxy], first, (EAGER, compiler)))
    if device.type == "cuda":
        yield Stage(f"counters, {first}", 120, step[first], counters)
    _, new_cell = planner.cases(["proxy"])
    yield Stage("first iteration of new cells", 60, (planner.job(new_cell, first),))
    yield Stage("search", 120, (planner.job(scale.search, first),))


def _jobs(cases: Iterable[Case], dtype: DType, others: tuple[Provider, ...] = EAGERS) -> tuple[Job, ...]:
    return tuple(Job(case, dtype, (OURS, *others), in_fresh_process=()) for case in cases)


Hear = Callable[[dict[str, Any] | Row], None]


def run_stages(
    stages: Sequence[Stage],
    run_now: Callable[[], Run],
    end: float,
    hear: Callable[[str, dict[str, Any] | Row], None],
    log: Path,
) -> None:
    """Run the stages that fit in before `end` on the monotonic clock.

    `run_now` gives the settings of a stage, with what is known by then. `hear` gets each number and row with its stage's
    name, and after each stage how it ended.
    """
    on_gpu = run_now().device_name != "cpu"
    with Worker(preload="bench.stages", log=log, ahead=on_gpu) as worker:
        for stage in stages:
            start, cached, said = time.monotonic(), kernels_in_cache(), partial(hear, stage.name)
            limit_s = min(stage.limit_s, end - start)
            if limit_s < 5:
                said({"status": OUT_OF_TIME, "seconds": 0.0})
                continue
            status = run_stage(stage, run_now(), worker, limit_s, said)
            compiled = {"kernels_compiled": kernels_in_cache() - cached} if on_gpu else {}
            said({**status, "seconds": round(time.monotonic() - start, 1), **compiled})


def run_stage(stage: Stage, run: Run, worker: Worker, limit_s: float, said: Hear) -> dict[str, str]:
    """In a fresh process, for `limit_s` seconds at most -> how it ended."""
    try:
        if stage.function is not None:
            worker.fresh()(stage.function, run, *stage.jobs, limit_s=limit_s, say=said)
        else:
            measure_jobs(stage.jobs, run, worker, time.monotonic() + limit_s, said)
    except OutOfTime as error:
        return {"status": OUT_OF_TIME, "note": str(error)}
    except (WorkFailed, WorkerLost) as error:
        return {"status": str(error)}
    return {"status": DONE}


def kernels_in_cache() -> int:
    """Number of kernels in Triton's cache."""
    return sum(1 for _ in triton_cache().glob("*/*.cubin"))


def measure_jobs(jobs: Sequence[Job], run: Run, worker: Worker, end: float, say: Hear) -> None:
    """Each job's rows, until `end` on the monotonic clock; no job takes more than one and a half of its share in it."""
    worker.fresh()
    device, late = torch.device(run.device_name), list[str]()
    for number, job in enumerate(jobs):
        left_s = end - time.monotonic()
        if left_s < 1:
            late += [f"no time left for {len(jobs) - number} of {len(jobs)} cases"]
            break
        limit_s = min(left_s, max(15.0, 1.5 * left_s / (len(jobs) - number)))
        try:
            for row in measure_apart(worker, job, device, run.rounds, run.roofs, number, limit_s=limit_s):
                say(row)
        except OutOfTime as error:
            late.append(f"{job.case.name}, {job.case.mode}: {error}")
    if late:
        raise OutOfTime("; ".join(late))


def roofs(run: Run, say: Say) -> None:
    """Measure copy bandwidth and matrix product rates; for a GPU also read `nvidia-smi` and time a small kernel."""
    device = run.prepare()
    if device.type == "cuda":
        say(gpu_state())
    measure_roofs(device, supported_dtypes(device)[0][:2], quick=True, say=say)
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
    """Compare one training step of a small cell with every kind of branch, ours and eager PyTorch's, with `reference/`."""
    attempt = Attempt(job, run.prepare(), lambda provider: say({"at_work": provider}))
    attempt.check_against_reference()
    for provider, row in attempt.rows.items():
        errors = {"rms_error": row.rms_error, "allowed": attempt.allowed.get(provider), "largest_error": row.max_error}
        known = {} if row.rms_error is None else errors
        say({"provider": provider.name, "result": row.status, "note": row.note, **known})


def iteration(run: Run, job: Job, say: Say) -> None:
    """Measure our training step: first call, calls back to back, memory, cold calls; each is reported when it is known."""
    device = run.prepare()
    on_gpu = device.type == "cuda"
    workload, before = job.case.workload(OURS, job.dtype, device), torch.cuda.memory_allocated(device) if on_gpu else 0
    row = replace(empty_row(job, OURS, device), status=NOT_CHECKED)  # until the stage beside eager
    row.first_call_s, row.back_to_back_ms = say_calls(workload, device, say)
    if on_gpu:
        row.peak_memory_mb = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        say({"peak_memory_mb": row.peak_memory_mb, "reserved_mb": torch.cuda.max_memory_reserved(device) / 1e6})
    say(replace(row))
    note_times(row, cold_samples(workload, device, run.rounds, launches_count=True), run.roofs)
    say({"cold_ms_with_launches": row.median_ms})
    say(row)
    if on_gpu:
        of_the_device = cold_samples(workload, device, run.rounds, launches_count=False)
        say({"cold_ms_of_the_device": Summary.of(of_the_device.cold).median})
        for _ in range(500):  # launched, not waited for
            workload()
        say({"while_it_runs": True, **gpu_state()})


def say_calls(workload: Workload, device: torch.device, say: Say) -> tuple[float, float]:
    """Seconds of the first call, and milliseconds of the many with no wait between them."""
    first_call_s = back_to_back_ms(workload, device, 1) / 1e3
    say({"first_call_s": first_call_s})
    for call in range(2, 2 + warm_up_calls(device)):  # on a GPU one of them captures the graph
        say({"call": call, "ms": back_to_back_ms(workload, device, 1)})
    step_ms = 0.0
    for calls in (50, 500) if device.type == "cuda" else (3,):
        step_ms = back_to_back_ms(workload, device, calls)
        say({"calls_back_to_back": calls, "ms": step_ms, "loss": float(workload.parts()["output"][0])})
    return first_call_s, step_ms


def cold_samples(workload: Workload, device: torch.device, rounds: int, *, launches_count: bool) -> Samples:
    """Our calls with flushed caches."""
    clock, rng = Clock(device, launches_count=launches_count), np.random.default_rng(0)
    return interleaved({OURS.name: workload}, rounds, clock, CacheFlush(device), rng)[OURS.name]


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


def _loss_of(workload: Workload) -> float:
    workload()
    return float(workload.parts()["output"][0])


class Prediction(NamedTuple):
    """The counted cost of one launch of a kernel."""

    of: str
    us: float


class Kernel(NamedTuple):
    """One launch of an iteration, in the order of running; on a CPU all calls of one PyTorch operation."""

    kernel: str
    of: str  # the map or the sum, if it was counted
    launches: float
    us: float
    idle_us: float  # of the GPU before it
    predicted_us: float | None


def profile(run: Run, job: Job, say: Say) -> None:
    """Profile an iteration: every kernel in order with its microseconds, beside the prediction for an H200."""
    device, dtype = run.prepare(), job.dtype
    workload = warmed(job.case, OURS, dtype, device, 1 + warm_up_calls(device))
    profiler = recorded(workload, device)
    profiler.export_chrome_trace(str(run.file(f"profile-{dtype}.trace.json.gz")))  # with grids, registers, shared memory
    found = kernels_of_gpu(profiler, dtype) if device.type == "cuda" else by_operation(profiler.key_averages())
    write_table(run.file(f"profile-{dtype}.csv"), Kernel._fields, found)
    launches = sum(kernel.launches for kernel in found)
    say({"launches": launches, "busy_us": sum(k.us for k in found), "idle_us": sum(k.idle_us for k in found)})
    totals: dict[str, list[Kernel]] = {}
    for kernel in found:
        totals.setdefault(kernel.kernel, []).append(kernel)
    for name, group in sorted(totals.items(), key=lambda item: -sum(kernel.us for kernel in item[1])):
        known = [kernel.predicted_us for kernel in group if kernel.predicted_us is not None]
        numbers = {"launches": sum(k.launches for k in group), "us": sum(k.us for k in group)}
        say({"kernel": name, **numbers, "predicted_us": sum(known) or None})


def recorded(workload: Workload, device: torch.device) -> Any:
    """PyTorch's profiler behind REPLAYS calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(REPLAYS):
            workload()
        synchronise(device)
    return profiler


def kernels_of_gpu(profiler: Any, dtype: str) -> list[Kernel]:
    """What ran on the GPU in an iteration, in order. Raises RuntimeError if the profiler saw nothing of it."""
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    if not events:
        raise RuntimeError("the profiler saw no kernel of the GPU")
    return in_order([(e.name, e.time_range.start, e.time_range.end) for e in events], predictions(dtype))


def in_order(spans: Sequence[tuple[str, float, float]], predicted: Mapping[str, Sequence[Prediction]]) -> list[Kernel]:
    """(name, start, end in microseconds) of REPLAYS equal replays -> the median of each kernel, in order.

    The k-th launch of a kernel gets the k-th prediction. Raises ValueError if the replays differ.
    """
    spans = sorted(spans, key=lambda span: span[1])
    count = len(spans) // REPLAYS
    replays = [spans[k * count : (k + 1) * count] for k in range(REPLAYS)]
    if len({tuple(name for name, _, _ in replay) for replay in replays}) > 1 or len(spans) % REPLAYS:
        counts = Counter(name for name, _, _ in spans)
        raise ValueError(f"{REPLAYS} replays are not alike: {counts.most_common(5)} and so on")
    found, seen = [], Counter[str]()
    for i, (name, _, _) in enumerate(replays[0]):
        us = statistics.median(replay[i][2] - replay[i][1] for replay in replays)
        idle = statistics.median(max(0.0, replay[i][1] - replay[i - 1][2]) for replay in replays) if i else 0.0
        known = predicted.get(name, ())
        counted = known[seen[name]] if seen[name] < len(known) else None
        found.append(Kernel(name, counted.of if counted else "", 1, us, idle, counted and counted.us))
        seen[name] += 1
    return found


def by_operation(averages: Iterable[Any]) -> list[Kernel]:
    """On a CPU: each PyTorch operation with its own time per iteration, longest first."""
    found = [Kernel(e.key, "", e.count / REPLAYS, e.self_cpu_time_total / REPLAYS, 0.0, None) for e in averages]
    return sorted(found, key=lambda kernel: -kernel.us)


def predictions(dtype: str) -> dict[str, list[Prediction]]:
    """The predictions for each kernel's launches, in order; bench/predictions/README.md says how they were counted."""
    path, predicted = PREDICTIONS / f"iteration-{dtype}.csv", dict[str, list[Prediction]]()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                predicted.setdefault(line["kernel"], []).append(Prediction(line["of"], float(line["predicted_us"])))
    return predicted


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


def counters(run: Run, job: Job, say: Say) -> None:
    """Read Nsight Compute's counters of each kernel of an iteration without a graph, if it is installed and permitted."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        say({"skipped": "ncu is not installed"})
        return
    command = [ncu, "--clock-control", "none", "--metrics", ",".join(NCU_METRICS), "--csv", "--page", "raw"]
    command += ["--profile-from-start", "off", sys.executable, "-m", "bench.stages", run.device_name, job.dtype]
    path = run.file(f"counters-{job.dtype}.csv")
    with path.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file).returncode
    say({"file": path.name, "lines": len(path.read_text(encoding="utf-8").splitlines()), "ncu_exit_code": code})


def compile_kernels(architecture: int, stages: Iterable[Stage]) -> int:
    """Compile into Triton's cache all that the stages launch on a GPU of sm_<architecture>, without one -> number of kernels.

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
        for case, dtype in dict.fromkeys(pair for stage in stages for pair in _cases_of(stage)):
            case.workload(OURS, dtype, device)()
    return len(compiled)


def _cases_of(stage: Stage) -> Iterator[tuple[Case, DType]]:
    """The cases of a stage's jobs, at every size at which ours computes them."""
    for case, dtype in ((job.case, job.dtype) for job in stage.jobs):
        if not isinstance(case, NewCellCase | SearchCase):
            sizes = [case.small(), case.without_chance(), case]
            yield from ((sized, dtype) for sized in dict.fromkeys(sizes) if sized is not None)


def one_iteration(device_name: str, dtype: DType) -> None:
    """Run two iterations of the paper's size without a graph; a profiler may record the second, from `cudaProfilerStart`."""
    device = prepared(device_name, torch.get_num_threads())
    workload = PAPER.proxy.workload(OURS, dtype, device)
    workload()
    synchronise(device)
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    workload()
    synchronise(device)
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    one_iteration(sys.argv[1], cast(DType, sys.argv[2]))
