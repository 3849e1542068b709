import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reference.mean_iou import class_iou, confusion_matrix, mean_iou
from reference.upsampled_cross_entropy import IGNORE_INDEX
from tests.strategies import map_sizes, rng_seeds

NUM_CLASSES = 5


def random_maps(
    size: tuple[int, int], present: int, rng: np.random.Generator
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Predictions and labels of the first `present` classes; a fifth of the labels is ignored."""
    predictions, labels = rng.integers(0, present, (2, 3, *size))
    return predictions, np.where(rng.random(labels.shape) < 0.2, IGNORE_INDEX, labels)


def slow_mean_iou(predictions: NDArray[np.integer], labels: NDArray[np.integer]) -> float:
    pairs = [(p, t) for p, t in zip(predictions.ravel(), labels.ravel(), strict=True) if t != IGNORE_INDEX]
    scores = []
    for k in range(NUM_CLASSES):
        union = sum(p == k or t == k for p, t in pairs)
        if union:
            scores.append(sum(p == k and t == k for p, t in pairs) / union)
    return sum(scores) / len(scores) if scores else math.nan


@given(map_sizes(8), st.integers(1, NUM_CLASSES), rng_seeds())
def test_equals_a_slow_loop(size: tuple[int, int], present: int, seed: int) -> None:
    predictions, labels = random_maps(size, present, np.random.default_rng(seed))
    actual = mean_iou(confusion_matrix(predictions, labels, num_classes=NUM_CLASSES))
    expected = slow_mean_iou(predictions, labels)
    assert actual == pytest.approx(expected, abs=1e-15, nan_ok=True)  # the same five quotients, added in another order


@given(map_sizes(8), rng_seeds())
def test_confusion_is_additive(size: tuple[int, int], seed: int) -> None:
    predictions, labels = random_maps(size, NUM_CLASSES, np.random.default_rng(seed))
    whole = confusion_matrix(predictions, labels, num_classes=NUM_CLASSES)
    parts = [confusion_matrix(p, t, num_classes=NUM_CLASSES) for p, t in zip(predictions, labels, strict=True)]
    assert np.array_equal(whole, sum(parts))
    assert whole.sum() == np.count_nonzero(labels != IGNORE_INDEX)


@given(map_sizes(8), rng_seeds())
def test_predictions_at_ignored_pixels_are_free(size: tuple[int, int], seed: int) -> None:
    predictions, labels = random_maps(size, NUM_CLASSES, np.random.default_rng(seed))
    garbage = np.where(labels == IGNORE_INDEX, 77, predictions)
    expected = confusion_matrix(predictions, labels, num_classes=NUM_CLASSES)
    assert np.array_equal(confusion_matrix(garbage, labels, num_classes=NUM_CLASSES), expected)


@given(map_sizes(8), rng_seeds())
def test_is_symmetric_and_1_for_a_perfect_prediction(size: tuple[int, int], seed: int) -> None:
    predictions, labels = random_maps(size, NUM_CLASSES, np.random.default_rng(seed))
    confusion = confusion_matrix(predictions, labels, num_classes=NUM_CLASSES)
    assert np.array_equal(class_iou(confusion), class_iou(confusion.T), equal_nan=True)
    perfect = confusion_matrix(predictions, predictions, num_classes=NUM_CLASSES)
    assert mean_iou(perfect) == 1.0


def test_many_classes_in_bytes_do_not_overflow() -> None:
    labels = np.array([200, 3], dtype=np.uint8)
    confusion = confusion_matrix(np.array([150, 3], dtype=np.uint8), labels, num_classes=201)
    assert np.argwhere(confusion).tolist() == [[3, 3], [200, 150]]


def test_nothing_counted_is_nan() -> None:
    assert math.isnan(mean_iou(np.zeros((3, 3), dtype=np.int64)))


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 3], [0, 1], "predictions must be 0 to 2, got 0 to 3"),
        ([0, 1], [0, 3], "labels must be 0 to 2, got 0 to 3"),
        ([0, 1], [-1, 1], "labels must be 0 to 2, got -1 to 1"),
        ([0, 1], [0], "must have one shape"),
    ],
)
def test_bad_input_is_refused(predictions: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(predictions), np.array(labels), num_classes=3)
