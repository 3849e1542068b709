"""Tolerances that follow from the arithmetic instead of a guess: the budget of `bench/accuracy.py` for several draws.

The truth is the reference's float64 result, the yardstick what plain PyTorch makes of the same inputs in the same dtype. The
fast path may be twice as far from the truth as the yardstick, plus a floor: a yardstick that is exact by luck should not
condemn it. What is wrong on rare inputs only, a median over draws does not see: `assert_equal_steps` finds it in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch

from bench.accuracy import SEVERAL_DRAWS, relative_error
from bench.cases import DTYPES
from reference.batch_norm import Array

FLOOR = {DTYPES[name]: floor for name, floor in SEVERAL_DRAWS.floor.items()}  # relative to the largest |expected|


def assert_within_budget(
    actual: Sequence[Array], expected: Sequence[Array], yardstick: Sequence[Array], dtype: torch.dtype
) -> None:
    """One array per draw, the three of one shape; median over draws of the largest and of the root-mean-square error.

    All errors are relative to the draw's largest |expected|. A NaN or an infinity anywhere fails.
    """
    fast_error, baseline_error = (_median_errors(computed, expected) for computed in (actual, yardstick))
    budget = SEVERAL_DRAWS.allowed(str(dtype).removeprefix("torch."), baseline_error)
    assert (fast_error <= budget).all(), f"(max, RMS) error {fast_error} exceeds {budget}; plain PyTorch's is {baseline_error}"


def _median_errors(computed: Sequence[Array], expected: Sequence[Array]) -> Array:
    assert np.isfinite(np.concatenate([array.ravel() for array in expected])).all(), "the truth is not finite everywhere"
    errors = [relative_error(torch.as_tensor(c), torch.as_tensor(e)) for c, e in zip(computed, expected, strict=True)]
    assert np.isfinite(errors).all(), "not finite everywhere, or of another shape"
    return np.median(errors, axis=0)
