"""How long cells take on this machine, for one image: the median over rounds of turns, and the 20th and 80th percentiles."""

import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fast.dense_prediction_cell import DensePredictionCell
from search.reports.turns import Summary, back_to_back_ms, in_turns

ROUNDS = 20
_SHORTEST_MS = 2.0  # calls shorter than this are timed several at a time


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call with one image, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


@dataclass(frozen=True)
class Latencies:
    """Several cells', by name, and what they hold for."""

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
    where = torch.device(device)
    try:
        with torch.inference_mode(), torch.cuda.device(where) if where.type == "cuda" else nullcontext():
            turns = {name: _turn(cell.to(where).eval(), feature_size, where) for name, cell in cells.items()}
            samples = in_turns(turns, ROUNDS, np.random.default_rng(seed), seconds=seconds)
    finally:
        for cell in cells.values():
            cell.cpu()
    latencies = {name: Latency(*Summary.of(values)) for name, values in samples.items()}
    return Latencies(latencies, device_label(where), feature_size)


def device_label(device: torch.device) -> str:
    """The device's name; for a CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads != 1 else ''}"


def _turn(cell: DensePredictionCell, feature_size: tuple[int, int], device: torch.device) -> Callable[[], float]:
    """Times calls for a few milliseconds -> milliseconds a call."""
    features = torch.rand(1, cell.in_channels, *feature_size, device=device)
    clock = partial(back_to_back_ms, lambda: cell(features), device)
    clock(1)  # compiles kernels, if any
    return partial(clock, max(1, round(_SHORTEST_MS / max(clock(1), 1e-3))))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name there
        return platform.processor() or platform.machine()
