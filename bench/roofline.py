"""The limits of this machine (its roof), measured in the same run: how fast it copies and multiplies matrices."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.cases import DTYPES
from bench.costs import Cost
from bench.timing import last_level_cache_bytes
from fast.pointwise_conv import pointwise_conv
from search.reports.turns import synchronise


@dataclass(frozen=True)
class Roofs:
    """The highest rates seen: of a copy (bytes read plus bytes written) and of a matrix product (operations)."""

    copy_gb_per_s: float
    matrix_gflops: Mapping[str, float]  # by dtype

    def floor_ms(self, cost: Cost, dtype: str) -> float:
        """The shortest time that the roofs allow; no version of the case can be much faster."""
        return max(cost.bytes / self.copy_gb_per_s, cost.flops / self.matrix_gflops[dtype]) * 1e-6

    def percent(self, cost: Cost | None, dtype: str, milliseconds: float) -> float | None:
        """The percentage of the roof that was reached; None if no cost is stated."""
        unknown = cost is None or dtype not in self.matrix_gflops or math.isnan(self.copy_gb_per_s)
        return None if unknown or cost is None else 100 * self.floor_ms(cost, dtype) / milliseconds

    def with_number(self, number: Mapping[str, Any]) -> "Roofs":
        """These roofs with a number of `measure_roofs`; other numbers are ignored."""
        if number.get("roof") == "copy":
            return replace(self, copy_gb_per_s=number["gb_per_s"])
        if number.get("roof") == "matrix product":
            return replace(self, matrix_gflops={**self.matrix_gflops, number["dtype"]: number["gflops"]})
        return self


NO_ROOFS = Roofs(math.nan, {})  # none known yet


def measure_roofs(device: torch.device, dtypes: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Time large copies and a few square products by the library, on a CPU also our 1×1 convolution: the best of each."""
    copy_bytes = max(4 * last_level_cache_bytes(device), 1 << (30 if device.type == "cuda" else 27))
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield {"roof": "copy", "gb_per_s": 2 * copy_bytes / _best_seconds(lambda: target.copy_(source), device) / 1e9}
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    for dtype in dtypes:
        rates = [_matrix_gflops(size, dtype, device) for size in sizes]
        if device.type == "cpu":  # ours may be faster there; on a GPU no roof shall depend on our own kernels
            rates.append(_pointwise_gflops(dtype, device))
        yield {"roof": "matrix product", "dtype": dtype, "gflops": max(rates)}


def _matrix_gflops(size: int, dtype: str, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # on a GPU TF32, PyTorch's default for convolutions
    try:
        return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device) / 1e9
    finally:
        torch.set_float32_matmul_precision(precision)


def _pointwise_gflops(dtype: str, device: torch.device) -> float:
    x = torch.randn(8, 512, 64, 64, device=device).to(DTYPES[dtype])
    weight = torch.randn(512, 512, 1, 1, device=device).to(DTYPES[dtype])
    with torch.no_grad():
        return 2 * 512 * x.numel() / _best_seconds(lambda: pointwise_conv(x, weight), device) / 1e9


def _best_seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of a few calls after a warm-up: a roof is the best that is possible."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
