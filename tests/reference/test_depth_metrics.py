import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.batch_norm import Array
from reference.depth_metrics import abs_rel, delta, depth_totals, rmse
from tests.strategies import map_sizes, rng_seeds

ROUNDING = 1e-12  # relative: sums of up to 400 float64 terms, all positive, in another order
UNMEASURED_SHARE = st.sampled_from((0.0, 0.3, 1.0))


def random_maps(size: tuple[int, int], unmeasured_share: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Predictions and depths of two images, mostly from 1 to 20 m, whose ratio is mostly below 2."""
    depths = np.exp(rng.uniform(0.0, 3.0, (2, *size)))
    predictions = depths * np.exp(rng.normal(0.0, 0.4, depths.shape))
    return predictions, np.where(rng.random(depths.shape) < unmeasured_share, np.nan, depths)


def scores(totals: Array) -> list[float]:
    return [rmse(totals), abs_rel(totals), *(delta(totals, power) for power in (1, 2, 3))]


def slow_scores(predictions: Array, depths: Array) -> list[float]:
    pairs = [(p, d) for p, d in zip(predictions.ravel(), depths.ravel(), strict=True) if not math.isnan(d)]
    if not pairs:
        return [math.nan] * 5
    count = len(pairs)
    squares, relative = sum((p - d) ** 2 for p, d in pairs), sum(abs(p - d) / d for p, d in pairs)
    within = [sum(max(p / d, d / p) < threshold for p, d in pairs) for threshold in (1.25, 1.25 * 1.25, 1.25 * 1.25 * 1.25)]
    return [math.sqrt(squares / count), relative / count, *(number / count for number in within)]


@given(map_sizes(), UNMEASURED_SHARE, rng_seeds())
def test_equals_a_slow_loop(size: tuple[int, int], unmeasured: float, seed: int) -> None:
    predictions, depths = random_maps(size, unmeasured, np.random.default_rng(seed))
    expected = slow_scores(predictions, depths)
    assert scores(depth_totals(predictions, depths)) == pytest.approx(expected, rel=ROUNDING, nan_ok=True)


@given(map_sizes(8), UNMEASURED_SHARE, rng_seeds())
def test_totals_are_additive(size: tuple[int, int], unmeasured: float, seed: int) -> None:
    predictions, depths = random_maps(size, unmeasured, np.random.default_rng(seed))
    whole = depth_totals(predictions, depths)
    parts = [depth_totals(p, d) for p, d in zip(predictions, depths, strict=True)]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=ROUNDING, atol=0)
    assert whole[0] == np.count_nonzero(~np.isnan(depths))


@given(map_sizes(8), rng_seeds())
def test_predictions_at_unmeasured_pixels_are_free(size: tuple[int, int], seed: int) -> None:
    predictions, depths = random_maps(size, 0.3, np.random.default_rng(seed))
    garbage = np.where(np.isnan(depths), -7.0, predictions)
    assert np.array_equal(depth_totals(garbage, depths), depth_totals(predictions, depths))


@given(map_sizes(8), rng_seeds())
def test_in_another_unit_of_length(size: tuple[int, int], seed: int) -> None:
    """RMSE has a unit, the others have none. A power of two changes no rounding."""
    predictions, depths = random_maps(size, 0.3, np.random.default_rng(seed))
    first, second = depth_totals(predictions, depths), depth_totals(4.0 * predictions, 4.0 * depths)
    np.testing.assert_array_equal(scores(second), np.multiply(scores(first), [4, 1, 1, 1, 1]))


def test_ratios_count_below_the_threshold_in_both_directions() -> None:
    """Five depths of 1 m, then the other way round: exactly right, just below 1.25, exactly 1.25, exactly 1.25², 1.25³."""
    predictions, depths = np.array([1.0, 1.24, 1.25, 1.5625, 1.953125]), np.ones(5)
    for totals in (depth_totals(predictions, depths), depth_totals(depths, predictions)):
        assert [delta(totals, power) for power in (1, 2, 3)] == [2 / 5, 3 / 5, 4 / 5]


@given(map_sizes(8), rng_seeds())
def test_perfect_prediction(size: tuple[int, int], seed: int) -> None:
    depths, _ = random_maps(size, 0.0, np.random.default_rng(seed))
    assert scores(depth_totals(depths, depths)) == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_pixels_of_all_images_are_pooled() -> None:
    """One image with one pixel, wrong by 3 m, and one with three pixels that are right: √(9 / 4), not (3 + 0) / 2."""
    totals = depth_totals(np.array([4.0]), np.array([1.0])) + depth_totals(np.ones(3), np.ones(3))
    assert rmse(totals) == 1.5


def test_nothing_measured_is_nan() -> None:
    assert np.isnan(scores(depth_totals(np.ones((2, 3)), np.full((2, 3), np.nan)))).all()


def test_half_precision_does_not_overflow() -> None:
    assert rmse(depth_totals(np.array([900.0], dtype=np.float16), np.array([100.0], dtype=np.float16))) == 800.0


def test_a_prediction_that_is_not_a_number_is_no_score() -> None:
    """What a network says that has diverged: it must not look better than another one."""
    totals = depth_totals(np.array([np.nan, 1.0]), np.ones(2))
    assert math.isnan(rmse(totals))
    assert math.isnan(abs_rel(totals))
    assert delta(totals) == 0.5


@pytest.mark.parametrize(
    ("predictions", "depths", "message"),
    [
        ([1.0, 2.0], [1.0], "must have one shape"),
        ([1.0, 2.0], [1.0, 0.0], "a measured depth must be above 0, got 0"),
        ([1.0, 2.0], [-3.0, np.nan], "a measured depth must be above 0, got -3"),
        ([1.0, -2.0], [1.0, 1.0], "a predicted depth must be above 0, got -2"),
    ],
)
def test_bad_input_is_refused(predictions: list[float], depths: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth_totals(np.array(predictions), np.array(depths))


@pytest.mark.parametrize("power", [-1, 0, 4])
def test_other_powers_are_refused(power: int) -> None:
    with pytest.raises(ValueError, match=f"power must be 1, 2 or 3, got {power}"):
        delta(np.ones(6), power)
