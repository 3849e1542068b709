"""How long cells take on this machine for one image, measured in turns, so that a slow machine slows all of them.

`torch.utils.benchmark` warms up, sets the threads and waits for the device. A round times every cell once, in a new order;
reported are the median over rounds and the 20th and 80th percentiles.
"""

import logging
import platform
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fast.dense_prediction_cell import DensePredictionCell

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

ROUNDS = 20
_SHORTEST_SECONDS = 2e-3  # calls shorter than this are timed several at a time


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call with one image, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


@dataclass(frozen=True)
class Latencies:
    """Latencies of several cells by name, and the device and map for which they hold."""

    by_name: dict[str, Latency]
    device: str  # its name, and the number of threads of a CPU
    feature_size: tuple[int, int]


def measure_latencies(
    cells: Mapping[str, DensePredictionCell],
    feature_size: tuple[int, int],
    *,
    device: str = "cpu",
    seconds: float = 30.0,
    seed: int = 0,
) -> Latencies:
    """Time every cell, in evaluation mode and float32, on one map of (h, w) = `feature_size`.

    No round begins after `seconds`, but there are at least three. The modules are moved to `device` and back to the CPU, and
    stay in evaluation mode.
    """
    on_gpu = torch.device(device).type == "cuda"
    try:
        # The timer waits only for the current device.
        with torch.inference_mode(), torch.cuda.device(device) if on_gpu else nullcontext():
            timers = {name: _timer(cell.to(device).eval(), feature_size) for name, cell in cells.items()}
            samples = _in_turns(timers, seconds, np.random.default_rng(seed))
    finally:
        for cell in cells.values():
            cell.cpu()
    latencies = {name: _summary(values) for name, values in samples.items()}
    return Latencies(latencies, device_label(torch.device(device)), feature_size)


def device_label(device: torch.device) -> str:
    """The device's name; for a CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads != 1 else ''}"


def _timer(cell: DensePredictionCell, feature_size: tuple[int, int]) -> "Timer":
    # Here, and silently: on a machine with CUDA's compiler but no GPU, its import logs a warning about CUDA_HOME.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    device = next(cell.parameters()).device
    names = {"cell": cell, "features": torch.rand(1, cell.in_channels, *feature_size, device=device)}
    return Timer("cell(features)", globals=names, num_threads=torch.get_num_threads())


def _in_turns(timers: Mapping[str, "Timer"], seconds: float, rng: np.random.Generator) -> dict[str, list[float]]:
    """Time each cell in each round, in milliseconds."""
    counts = {name: _calls_per_turn(timer) for name, timer in timers.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for i in rng.permutation(len(timers)):
            name = list(timers)[i]
            samples[name].append(1e3 * timers[name].timeit(counts[name]).mean)
    return samples


def _calls_per_turn(timer: "Timer") -> int:
    timer.timeit(1)  # compiles kernels, if there are any
    return max(1, round(_SHORTEST_SECONDS / max(timer.timeit(1).mean, 1e-6)))


def _summary(samples: list[float]) -> Latency:
    p20, median, p80 = (float(value) for value in np.percentile(samples, (20, 50, 80)))
    return Latency(median, p20, p80)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name there
        return platform.processor() or platform.machine()
