"""Rates against closed forms; against tables of the authors in `tests/search/training/test_optimizer.py`."""

import math

import pytest
import torch

from fast.learning_rate import LearningRate, Schedule


def rates(**settings: object) -> list[float]:
    rate = LearningRate(**{"initial": 0.3, "iterations": 10} | settings)  # type: ignore[arg-type]
    return [float(each) for each in rate.after(torch.arange(13, dtype=torch.float64))]


def test_poly_and_cosine_are_their_closed_forms() -> None:
    """To rounding of float64; behind the last iteration the rate stays 0."""
    assert rates() == pytest.approx([0.3 * (1 - t / 10) ** 0.9 for t in range(10)] + [0.0] * 3, rel=1e-12)
    cosine = [0.15 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert rates(schedule="cosine") == pytest.approx(cosine + [0.0] * 3, rel=1e-12)
    assert rates(schedule="cosine")[0] == 0.3
    assert rates(schedule="cosine")[10] == 0.0


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_a_warm_up_rises_evenly_from_0_and_the_rest_falls_as_it_would_alone(schedule: Schedule) -> None:
    warmed = rates(schedule=schedule, warmup_iterations=4)
    assert warmed[:5] == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3], rel=1e-12)
    assert warmed[4:] == rates(schedule=schedule, iterations=6)[:9]


def test_a_slow_start_has_its_own_rate() -> None:
    slow = rates(slow_start_iterations=4, slow_start_rate=0.01)
    assert slow[:4] == [0.01] * 4
    assert slow[4:] == rates(iterations=6)[:9]


def test_integers_give_a_table_in_float32() -> None:
    rate = LearningRate(initial=0.3, iterations=10, schedule="cosine", warmup_iterations=4)
    table = rate.after(torch.arange(13))
    assert table.dtype == torch.float32
    exact = rates(schedule="cosine", warmup_iterations=4)
    assert table.tolist() == pytest.approx(exact, rel=1e-5, abs=1e-7)  # of float32, where 1 - cos is small
