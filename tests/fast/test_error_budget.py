"""The budget itself: it lets the yardstick's own errors pass, and nothing that is larger, biased or not finite."""

import numpy as np
import pytest
import torch

from reference.batch_norm import Array
from tests.fast.error_budget import FLOOR, assert_within_budget

EXPECTED = [np.random.default_rng(seed).standard_normal((4, 5)) for seed in range(9)]
every_dtype = pytest.mark.parametrize("dtype", FLOOR, ids=str)


def with_error(relative: float) -> list[Array]:
    """The largest value of each draw is off."""
    return [e + relative * np.abs(e).max() * (np.abs(e) == np.abs(e).max()) for e in EXPECTED]


@every_dtype
def test_floor_and_twice_the_yardstick_pass(dtype: torch.dtype) -> None:
    assert_within_budget(with_error(0.9 * FLOOR[dtype]), EXPECTED, EXPECTED, dtype)
    assert_within_budget(with_error(20.5 * FLOOR[dtype]), EXPECTED, with_error(10 * FLOOR[dtype]), dtype)


@every_dtype
def test_more_fails(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(with_error(1.1 * FLOOR[dtype]), EXPECTED, EXPECTED, dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(with_error(21.5 * FLOOR[dtype]), EXPECTED, with_error(10 * FLOOR[dtype]), dtype)


def test_small_errors_everywhere_fail_where_the_yardstick_has_one() -> None:
    """Their largest is the yardstick's; their root mean square is not."""
    yardstick = with_error(1e-4)
    everywhere = [e + 1e-4 * np.abs(e).max() for e in EXPECTED]
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(everywhere, EXPECTED, yardstick, torch.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_value_in_one_draw_fails(bad: float) -> None:
    poisoned = [*EXPECTED[:-1], np.where(EXPECTED[-1] == EXPECTED[-1].max(), bad, EXPECTED[-1])]
    cases = ((poisoned, EXPECTED, EXPECTED), (EXPECTED, EXPECTED, poisoned), (EXPECTED, poisoned, EXPECTED))
    for actual, expected, yardstick in cases:
        with pytest.raises(AssertionError, match="finite"):
            assert_within_budget(actual, expected, yardstick, torch.float32)
