"""Which results are right, for the benchmark and for the tests of `fast/`.

A time of a wrong result is shown beside that verdict, and no ratio uses it.

Errors are relative to the largest expected value of their kind (the output, all gradients together). The root mean square
decides, because a ReLU whose input is zero up to rounding may or may not pass the gradient of that element; the largest error
is reported beside it. A wrong tap, border row or statistic causes more than a tenth of the mean square.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.cases import Parts

# Limits for every provider. float32 leaves room for TF32's ten bits of mantissa, which libraries use on a GPU, and for ReLUs
# that flip; bfloat16's eight bits lose 4e-3 at each of the ten roundings of a cell's training step.
LIMIT = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}


class Budget(NamedTuple):
    """What ours may be off: a multiple of plain PyTorch's error, plus a floor by dtype for what rounding alone does."""

    multiple: float
    floor: dict[str, float]

    def allowed(self, dtype: str, yardstick: Any) -> Any:
        """For one error of plain PyTorch's, or an array of them."""
        return self.multiple * yardstick + self.floor[dtype]


# Two right orders of summation differ by luck, by up to five on one small training step, and a ReLU may flip: one draw has
# room for that, its floor is one flipped ReLU among a small case's ten thousand. The median over several draws needs none.
ONE_DRAW = Budget(8.0, {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1e-2})
SEVERAL_DRAWS = Budget(2.0, {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3})


class Error(NamedTuple):
    """The worst error over all kinds of results; infinite if anything is not finite or has another shape."""

    maximum: float
    rms: float


def error_of(actual: Parts, expected: Parts) -> Error:
    """Compare a workload's parts with the truth or with another workload's parts, in float64 on the parts' device."""
    if actual.keys() != expected.keys():
        return Error(np.inf, np.inf)
    errors = [relative_error(_joined(actual[kind]), _joined(expected[kind])) for kind in expected]
    return Error(max(error.maximum for error in errors), max(error.rms for error in errors))


def budget(dtype: str, yardstick: Error | None = None) -> float:
    """The largest RMS error that is accepted; for ours it depends on eager PyTorch's error."""
    limit = LIMIT[dtype]
    return limit if yardstick is None else min(limit, ONE_DRAW.allowed(dtype, yardstick.rms))


def relative_error(actual: Tensor, expected: Tensor) -> Error:
    """Relative to the largest |expected|; both float64."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return Error(np.inf, np.inf)
    expected = expected.to(actual.device)
    scale = float(expected.abs().max()) or 1.0
    difference = (actual - expected).abs_() / scale
    return Error(float(difference.max()), float(difference.square_().mean().sqrt()))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.detach().double().ravel() for part in parts] or [torch.zeros(1).double()])
