"""Tolerances that follow from the arithmetic instead of a guess.

The truth is the reference's float64 result, the yardstick what plain PyTorch makes of the same inputs in the same dtype. The
fast path may be twice as far from the truth as the yardstick, plus a floor for what rounding alone does: a yardstick that is
exact by luck should not condemn it.
"""

import numpy as np
import torch

from reference.batch_norm import Array

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative to the largest |expected|


def assert_within_budget(actual: Array, expected: Array, yardstick: Array, dtype: torch.dtype) -> None:
    """The three of one shape; largest and root-mean-square error are held to 2 · the yardstick's + the floor of `dtype`.

    A NaN or an infinity in `actual` fails, and in the others too: they would make any error look small.
    """
    assert actual.shape == expected.shape == yardstick.shape
    for name, array in (("actual", actual), ("expected", expected), ("yardstick", yardstick)):
        assert np.isfinite(array).all(), f"{name} is not finite everywhere"
    floor = FLOOR[dtype] * np.abs(expected).max()
    fast_error, baseline_error = actual - expected, yardstick - expected
    for name, size in (("max", np.abs(fast_error).max()), ("RMS", _rms(fast_error))):
        baseline = np.abs(baseline_error).max() if name == "max" else _rms(baseline_error)
        budget = 2.0 * baseline + floor
        assert size <= budget, f"{name} error {size:.3g} exceeds its budget {budget:.3g}: 2 x {baseline:.3g} + {floor:.3g}"


def _rms(error: Array) -> float:
    return float(np.sqrt(np.mean(error**2)))
