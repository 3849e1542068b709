"""Tolerances that follow from the arithmetic instead of a guess.

The truth is the reference's float64 result, the yardstick what plain PyTorch makes of the same inputs in the same dtype. The
fast path may be twice as far from the truth as the yardstick, plus a floor for what rounding alone does: a yardstick that is
exact by luck should not condemn it.

Two correct orders of summation differ by luck too, by a factor of five on one small training step. So several draws are
compared, by the median of their errors. What is wrong on rare inputs only is found in float64, by `assert_equal_steps`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from reference.batch_norm import Array

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative to the largest |expected|


def assert_within_budget(
    actual: Sequence[Array], expected: Sequence[Array], yardstick: Sequence[Array], dtype: torch.dtype
) -> None:
    """One array per draw, the three of one shape; median over draws of the largest and of the root-mean-square error.

    All errors are relative to the draw's largest |expected|. A NaN or an infinity anywhere fails.
    """
    fast_errors = np.array([_relative_errors(a, e) for a, e in zip(actual, expected, strict=True)])
    baseline_errors = np.array([_relative_errors(y, e) for y, e in zip(yardstick, expected, strict=True)])
    fast_error, baseline_error = np.median(fast_errors, axis=0), np.median(baseline_errors, axis=0)
    budget = 2.0 * baseline_error + FLOOR[dtype]
    assert (fast_error <= budget).all(), f"(max, RMS) error {fast_error} exceeds {budget}; plain PyTorch's is {baseline_error}"


def _relative_errors(actual: Array, expected: Array) -> tuple[float, float]:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all(), "not finite everywhere"
    assert np.isfinite(expected).all(), "the truth is not finite everywhere"
    error, scale = actual - expected, np.abs(expected).max() or 1.0
    return float(np.abs(error).max() / scale), float(np.sqrt(np.mean(error**2)) / scale)
