"""Which kernels an iteration consists of, how long each takes, and what was predicted for it."""

import csv
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.profiler import ProfilerActivity

from bench.cases import OURS, Case, DType, Job, Workload
from bench.measure import Run, warmed
from bench.results import write_table
from bench.timing import prepared, warm_up_calls
from bench.worker import Say
from search.turns import synchronise

ROOT = Path(__file__).parents[1]
PREDICTIONS = Path(__file__).parent / "predictions"
REPLAYS = 3
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
    profiler.export_chrome_trace(str(run.folder / f"profile-{dtype}.trace.json.gz"))  # with grids, registers, shared memory
    found = kernels_of_gpu(profiler, dtype) if device.type == "cuda" else by_operation(profiler.key_averages())
    write_table(run.folder / f"profile-{dtype}.csv", Kernel._fields, found)
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
    path, predicted = PREDICTIONS / f"dpc-{dtype}.csv", dict[str, list[Prediction]]()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                predicted.setdefault(line["kernel"], []).append(Prediction(line["of"], float(line["predicted_us"])))
    return predicted


def counters(run: Run, job: Job, say: Say) -> None:
    """Read Nsight Compute's counters of each kernel of an iteration, if it is installed and permitted."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        say({"skipped": "ncu is not installed"})
        return
    command = [ncu, "--clock-control", "none", "--metrics", ",".join(NCU_METRICS), "--csv", "--page", "raw"]
    command += ["--profile-from-start", "off", sys.executable, "-m", "bench.profiles", run.device_name, job.dtype]
    path = run.folder / f"counters-{job.dtype}.csv"
    with path.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file).returncode
    say({"file": path.name, "lines": len(path.read_text(encoding="utf-8").splitlines()), "ncu_exit_code": code})


def one_iteration(case: Case, device_name: str, dtype: DType) -> None:
    """Run two iterations without a graph; a profiler may record the second, from `cudaProfilerStart`."""
    device = prepared(device_name, torch.get_num_threads())
    workload = case.workload(OURS, dtype, device)
    workload()
    synchronise(device)
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    workload()
    synchronise(device)
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    from bench.plans import PAPER  # which imports this module

    one_iteration(PAPER.proxy, sys.argv[1], cast(DType, sys.argv[2]))
