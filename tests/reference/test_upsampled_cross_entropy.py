import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

from reference.batch_norm import Array
from reference.upsampled_cross_entropy import IGNORE_INDEX, upsampled_cross_entropy, upsampled_cross_entropy_backward
from tests.reference.directional_derivative import assert_gradient
from tests.reference.test_bilinear_resize import scipy_resize
from tests.strategies import map_sizes, rng_seeds

ROUNDING = 1e-12  # a mean of float64 values of order 1 to 10
NUM_CLASSES = 4
IGNORED_SHARE = st.sampled_from((0.0, 0.3, 0.9))


def random_labels(
    shape: tuple[int, ...], ignored_share: float, rng: np.random.Generator, dtype: type[np.integer] = np.uint8
) -> NDArray[np.integer]:
    return np.where(rng.random(shape) < ignored_share, IGNORE_INDEX, rng.integers(0, NUM_CLASSES, shape)).astype(dtype)


def test_hand_value_on_upsampled_logits() -> None:
    """Logits of class 1: 0 and 2 ln 3, so ln 3 in the middle of three pixels; probabilities of class 1 are 1/2, 3/4, 9/10."""
    logits = np.array([[0.0, 0.0], [0.0, 2 * np.log(3.0)]]).reshape(1, 2, 1, 2)
    loss = upsampled_cross_entropy(logits, np.array([[[0, 1, 0]]]))
    assert loss == pytest.approx(-(np.log(1 / 2) + np.log(3 / 4) + np.log(1 / 10)) / 3, abs=ROUNDING)
    without_last = upsampled_cross_entropy(logits, np.array([[[0, 1, IGNORE_INDEX]]]))
    assert without_last == pytest.approx(-(np.log(1 / 2) + np.log(3 / 4)) / 2, abs=ROUNDING)


def random_weights(rng: np.random.Generator) -> Array:
    """One of them is 0."""
    return rng.permutation([0.0, *rng.uniform(0.1, 5.0, NUM_CLASSES - 1)])


@given(map_sizes(6), map_sizes(), IGNORED_SHARE, st.sampled_from((np.uint8, np.int64)), st.booleans(), rng_seeds())
def test_equals_scipy(
    size: tuple[int, int], label_size: tuple[int, int], ignored: float, dtype: type[np.integer], weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = 3.0 * rng.standard_normal((2, NUM_CLASSES, *size))
    labels = random_labels((2, *label_size), ignored, rng, dtype)
    log_probability = special.log_softmax(scipy_resize(logits, label_size), axis=1)
    n, h, w = np.nonzero(labels != IGNORE_INDEX)
    picked = log_probability[n, labels[n, h, w], h, w]
    weights = random_weights(rng) if weighted else None
    expected = -(picked * (weights[labels[n, h, w]] if weights is not None else 1.0)).sum() / max(len(picked), 1)
    assert upsampled_cross_entropy(logits, labels, class_weights=weights) == pytest.approx(expected, abs=ROUNDING)


@given(map_sizes(6), map_sizes(), IGNORED_SHARE, st.booleans(), rng_seeds())
def test_gradient(size: tuple[int, int], label_size: tuple[int, int], ignored: float, weighted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((2, NUM_CLASSES, *size)), random_labels((2, *label_size), ignored, rng)
    weights = random_weights(rng) if weighted else None
    gradient = upsampled_cross_entropy_backward(logits, labels, class_weights=weights)

    def loss(logits: Array) -> Array:
        return np.asarray(upsampled_cross_entropy(logits, labels, class_weights=weights))

    assert_gradient(loss, (logits,), (gradient,), np.ones(()), rng)
    assert np.abs(gradient.sum(axis=1)).max() <= ROUNDING  # one logit more for all classes changes no probability


@given(map_sizes(), rng_seeds())
def test_ignored_pixels_change_nothing(size: tuple[int, int], seed: int) -> None:
    """Without resize each logit belongs to one pixel: those of ignored pixels are free, and get no gradient."""
    rng = np.random.default_rng(seed)
    labels = random_labels((2, *size), 0.5, rng)
    logits, others = rng.standard_normal((2, 2, NUM_CLASSES, *size))
    ignored = np.broadcast_to((labels == IGNORE_INDEX)[:, None], logits.shape)
    changed = np.where(ignored, others, logits)
    assert upsampled_cross_entropy(logits, labels) == upsampled_cross_entropy(changed, labels)
    assert not upsampled_cross_entropy_backward(logits, labels)[ignored].any()


@given(map_sizes(6), map_sizes(), rng_seeds())
def test_nothing_labelled_costs_nothing(size: tuple[int, int], label_size: tuple[int, int], seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((2, NUM_CLASSES, *size))
    labels = np.full((2, *label_size), IGNORE_INDEX)
    assert upsampled_cross_entropy(logits, labels) == 0.0
    assert not upsampled_cross_entropy_backward(logits, labels).any()


def test_another_ignore_index_may_be_a_class() -> None:
    logits = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1)
    labels = np.array([[[0, 1]]])
    assert upsampled_cross_entropy(logits, labels, ignore_index=0) == pytest.approx(-np.log(3 / 4), abs=ROUNDING)


def test_weights_are_not_in_the_denominator() -> None:
    """By hand: probabilities 1/4 and 3/4, labels 0, 1 and ignored, so two pixels count, whatever their weights are."""
    logits, labels = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1), np.array([[[0, 1, IGNORE_INDEX]]])
    loss = upsampled_cross_entropy(logits, labels, class_weights=np.array([5.0, 2.0]))
    assert loss == pytest.approx((5 * np.log(4) + 2 * np.log(4 / 3)) / 2, abs=ROUNDING)
    without_first = upsampled_cross_entropy(logits, labels, class_weights=np.array([0.0, 2.0]))
    assert without_first == pytest.approx(2 * np.log(4 / 3) / 2, abs=ROUNDING)


@given(map_sizes(6), map_sizes(), IGNORED_SHARE, rng_seeds())
def test_weights_of_one_change_nothing(size: tuple[int, int], label_size: tuple[int, int], ignored: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((2, NUM_CLASSES, *size)), random_labels((2, *label_size), ignored, rng)
    for function in (upsampled_cross_entropy, upsampled_cross_entropy_backward):
        assert np.array_equal(function(logits, labels, class_weights=np.ones(NUM_CLASSES)), function(logits, labels))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, np.nan], [1.0, np.inf, 1.0, 1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="needs a class weight of 0 or more for each of 4 classes, got"):
        upsampled_cross_entropy(np.zeros((1, NUM_CLASSES, 1, 1)), np.array([[[0]]]), class_weights=np.array(weights))


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([1e4, -1e4]).reshape(1, 2, 1, 1)
    assert upsampled_cross_entropy(logits, np.array([[[1]]])) == 2e4
    assert upsampled_cross_entropy_backward(logits, np.array([[[1]]])).ravel().tolist() == [1.0, -1.0]


@pytest.mark.parametrize("label", [NUM_CLASSES, 254, -1])
def test_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label} is neither 0 to 3 nor ignore_index 255"):
        upsampled_cross_entropy(np.zeros((1, NUM_CLASSES, 1, 1)), np.array([[[label, 0]]]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="needs logits"):
        upsampled_cross_entropy(np.zeros((2, NUM_CLASSES, 1, 1)), np.zeros((1, 2, 2), dtype=np.int64))
