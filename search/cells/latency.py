"""How long cells take on this machine, for one image, measured in turns."""

import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import Cell
from search.cells.space import load_cell
from search.turns import Summary, back_to_back_ms, in_turns

ROUNDS = 20
_SHORTEST_MS = 2.0  # calls shorter than this are timed several at a time
_QUICK = 2.0  # seconds, of a measurement for every cell of a search
_MOST_ROUNDS = 10_000  # in these


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call with one image: the median over all rounds, and the 20th and 80th percentiles."""

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
    samples = _samples(cells, feature_size, where, ROUNDS, seconds, np.random.default_rng(seed))
    latencies = {name: Latency(*Summary.of(values)) for name, values in samples.items()}
    return Latencies(latencies, device_label(where), feature_size)


def relative_latency(module: DensePredictionCell, feature_size: tuple[int, int], device: torch.device) -> float:
    """The time of a cell as a multiple of that of the published cell, with the same channels and options on the same map.

    The median over two seconds of rounds, three at least, in which both take turns: other work on the machine slows both. The
    published cell's is 1, and not measured. Leaves the random numbers of others alone.
    """
    published = load_cell("dpc")
    if module.cell == published:
        return 1.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        cells = {"this": like(module, module.cell), "published": like(module, published)}
        samples = _samples(cells, feature_size, device, _MOST_ROUNDS, _QUICK, np.random.default_rng(0))
    return float(np.median(np.divide(samples["this"], samples["published"])))


def like(module: DensePredictionCell, cell: Cell) -> DensePredictionCell:
    """An untrained module of another cell, with the channels and options of this one."""
    return DensePredictionCell(
        cell,
        module.input_channels,
        branch_channels=module.branch_channels,
        cell_channels=module.branch_channels,  # a cell without branches has as many as it reads
        output_stride=module.output_stride,
        pooling=module.pooling,
        pooling_size=module.pooling_size,
    )


def device_label(device: torch.device) -> str:
    """The device's name; for a CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads != 1 else ''}"


def _samples(
    cells: Mapping[str, DensePredictionCell],
    feature_size: tuple[int, int],
    device: torch.device,
    rounds: int,
    seconds: float,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    """Milliseconds a call of each cell in every round. The modules are then on the CPU."""
    try:
        with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            turns = {name: _turn(cell.to(device).eval(), feature_size, device) for name, cell in cells.items()}
            return in_turns(turns, rounds, rng, seconds=seconds)
    finally:
        for cell in cells.values():
            cell.cpu()


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
