"""The limits of this machine (its roof), measured in the same run: how fast it copies and multiplies matrices."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from bench.cases import DTYPES
from bench.costs import Cost
from bench.load import LIMIT_PERCENT, Others
from bench.timing import last_level_cache_bytes
from fast.pointwise_conv import pointwise_conv
from search.turns import synchronise


@dataclass(frozen=True)
class Roofs:
    """The highest rates seen: of a copy (bytes read plus bytes written) and of a matrix product (operations)."""

    copy_gb_per_s: float
    matrix_gflops: Mapping[str, float]  # by dtype
    unstable: Mapping[str, str] = field(default_factory=dict)  # reason, by "copy" or dtype: no percentage is made with it

    def floor_ms(self, cost: Cost, dtype: str) -> float:
        """The shortest time that the roofs allow; no version of the case can be much faster."""
        return max(cost.bytes / self.copy_gb_per_s, cost.flops / self.matrix_gflops[dtype]) * 1e-6

    def percent(self, cost: Cost | None, dtype: str, milliseconds: float) -> float | None:
        """The percentage of the roof that was reached; None if no cost is stated, or a roof is not known or not stable."""
        unknown = dtype not in self.matrix_gflops or math.isnan(self.copy_gb_per_s) or {"copy", dtype} & self.unstable.keys()
        return None if unknown or cost is None else 100 * self.floor_ms(cost, dtype) / milliseconds

    def with_number(self, number: Mapping[str, Any]) -> "Roofs":
        """These roofs with a number of `measure_roofs`; other numbers are ignored."""
        unstable = dict(self.unstable)
        if reason := number.get("unstable"):
            unstable[number.get("dtype", "copy")] = reason
        if number.get("roof") == "copy":
            return replace(self, copy_gb_per_s=number["gb_per_s"], unstable=unstable)
        if number.get("roof") == "matrix product":
            gflops = {**self.matrix_gflops, number["dtype"]: number["gflops"]}
            return replace(self, matrix_gflops=gflops, unstable=unstable)
        return self


NO_ROOFS = Roofs(math.nan, {})  # none known yet
_CALLS = 7
_SPREAD_PERCENT = 10.0  # as pyperf, which calls a benchmark unstable whose times vary by more


def measure_roofs(device: torch.device, dtypes: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Time large copies and a few square products by the library, on a CPU also our 1×1 convolution: the best of each.

    A roof says so if it is `unstable`, and why.
    """
    copy_bytes = max(4 * last_level_cache_bytes(device), 1 << (30 if device.type == "cuda" else 27))
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate, doubt = _best_rate([(2 * copy_bytes, lambda: target.copy_(source))], device)
    yield {"roof": "copy", "gb_per_s": rate, **doubt}
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    precision = torch.get_float32_matmul_precision()
    for dtype in dtypes:
        calls = [_matrix_product(size, dtype, device) for size in sizes]
        if device.type == "cpu":  # ours may be faster there; on a GPU no roof shall depend on our own kernels
            calls.append(_pointwise(dtype, device))
        torch.set_float32_matmul_precision("high")  # on a GPU TF32, PyTorch's default for convolutions
        try:
            rate, doubt = _best_rate(calls, device)
        finally:
            torch.set_float32_matmul_precision(precision)
        yield {"roof": "matrix product", "dtype": dtype, "gflops": rate, **doubt}


Call = tuple[float, Callable[[], object]]  # bytes or operations, and what moves or computes them


def _matrix_product(size: int, dtype: str, device: torch.device) -> Call:
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3, lambda: torch.mm(a, b, out=out)


def _pointwise(dtype: str, device: torch.device) -> Call:
    x = torch.randn(8, 512, 64, 64, device=device).to(DTYPES[dtype])
    weight = torch.randn(512, 512, 1, 1, device=device).to(DTYPES[dtype])
    return 2 * 512 * x.numel(), torch.no_grad()(lambda: pointwise_conv(x, weight))


def _best_rate(calls: Iterable[Call], device: torch.device) -> tuple[float, dict[str, str]]:
    """The highest rate in 10⁹ per second, as a roof is the best that is possible; and why it is not stable, if it is not."""
    with Others() as others:
        rates = [[work / seconds / 1e9 for seconds in _seconds(call, device)] for work, call in calls]
    best = max(rates, key=max)
    return max(best), instability(best, None if device.type == "cuda" else others.percent)


def instability(rates: Sequence[float], others_percent: float | None) -> dict[str, str]:
    """Why a roof cannot be trusted that has these rates; empty if it can.

    >>> instability([10.0, 9.8, 9.5], 1.0), instability([10.0, 8.0, 7.0], None)
    ({}, {'unstable': 'the best of 3 calls is 25 % quicker than their median'})
    """
    excess = 100 * (max(rates) / median(rates) - 1)
    if others_percent is not None and others_percent > LIMIT_PERCENT:
        return {"unstable": f"others used {others_percent:.0f} % of the processor"}
    if excess > _SPREAD_PERCENT:
        return {"unstable": f"the best of {len(rates)} calls is {excess:.0f} % quicker than their median"}
    return {}


def _seconds(call: Callable[[], object], device: torch.device) -> list[float]:
    """Of some calls after a warm-up."""
    times = []
    for _ in range(_CALLS + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return times[1:]
