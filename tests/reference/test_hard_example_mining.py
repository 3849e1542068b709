import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import special

from reference.batch_norm import Array
from reference.hard_example_mining import (
    hardest_pixels,
    keep_largest,
    mined_cross_entropy,
    mined_cross_entropy_backward,
    mined_share,
)
from reference.upsampled_cross_entropy import (
    IGNORE_INDEX,
    pixel_losses,
    upsampled_cross_entropy,
    upsampled_cross_entropy_backward,
)
from tests.reference.directional_derivative import assert_gradient
from tests.reference.test_bilinear_resize import scipy_resize
from tests.reference.test_upsampled_cross_entropy import IGNORED_SHARE, NUM_CLASSES, random_labels, random_weights
from tests.strategies import map_sizes, rng_seeds

ROUNDING = 1e-12  # a mean of float64 values of order 1 to 10
SHARES = st.floats(0.0, 1.0)


def test_hand_value() -> None:
    """Probabilities 1/4 and 3/4 of six pixels, one ignored: losses ln 4, ln 4/3 and 0."""
    logits = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1)
    labels = np.array([[[1, 0, 1], [IGNORE_INDEX, 0, 1]]])
    hard, easy = np.log(4), np.log(4 / 3)
    for count, expected in enumerate((0.0, hard, hard, (2 * hard + easy) / 3)):
        assert mined_cross_entropy(logits, labels, count / 6) == pytest.approx(expected, abs=ROUNDING)
    everything = (2 * hard + 3 * easy) / 5  # the ignored one is not counted, whatever the share
    for share in (5 / 6, 1.0):
        assert mined_cross_entropy(logits, labels, share) == pytest.approx(everything, abs=ROUNDING)
    # the two hard ones alone: softmax less one-hot, (1/4 − 1, 3/4)
    gradient = mined_cross_entropy_backward(logits, labels, 2 / 6)
    np.testing.assert_allclose(gradient.ravel(), [-0.75, 0.75], rtol=0, atol=ROUNDING)


@given(map_sizes(6), map_sizes(), IGNORED_SHARE, SHARES, st.booleans(), st.booleans(), rng_seeds())
def test_equals_the_authors_formula(
    size: tuple[int, int],
    label_size: tuple[int, int],
    ignored: float,
    share: float,
    weighted: bool,
    align_corners: bool,
    seed: int,
) -> None:
    """The sum of the k largest losses by how many of them are not 0; losses by SciPy where corners are aligned."""
    rng = np.random.default_rng(seed)
    logits = 3.0 * rng.standard_normal((2, NUM_CLASSES, *size))
    labels = random_labels((2, *label_size), ignored, rng)
    weights = random_weights(rng) if weighted else None
    losses = pixel_losses(logits, labels, class_weights=weights, align_corners=align_corners)
    if align_corners:
        picked = np.where(labels == IGNORE_INDEX, 0, labels)
        log_probability = special.log_softmax(scipy_resize(logits, label_size), axis=1)
        surprise = -np.take_along_axis(log_probability, picked[:, None], axis=1)[:, 0]
        by_scipy = surprise * (1.0 if weights is None else weights[picked]) * (labels != IGNORE_INDEX)
        np.testing.assert_allclose(losses, by_scipy, rtol=0, atol=1e2 * ROUNDING)
    largest = np.sort(losses.ravel())[::-1][: int(share * losses.size)]
    expected = largest.sum() / max(np.count_nonzero(largest), 1)
    actual = mined_cross_entropy(logits, labels, share, class_weights=weights, align_corners=align_corners)
    assert actual == pytest.approx(expected, abs=ROUNDING)


@given(map_sizes(6), map_sizes(), IGNORED_SHARE, SHARES, st.booleans(), st.booleans(), rng_seeds())
def test_gradient(
    size: tuple[int, int],
    label_size: tuple[int, int],
    ignored: float,
    share: float,
    weighted: bool,
    align_corners: bool,
    seed: int,
) -> None:
    """Where no step lets two pixels change places: the loss bends there."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((2, NUM_CLASSES, *size)), random_labels((2, *label_size), ignored, rng)
    weights = random_weights(rng) if weighted else None
    losses = np.sort(pixel_losses(logits, labels, class_weights=weights, align_corners=align_corners), axis=None)
    count = int(share * losses.size)
    kept, left = losses[losses.size - count :], losses[: losses.size - count]
    assume(not kept.any() or not left.size or kept[0] == 0.0 or kept[0] - left[-1] > 1e-3)

    def loss(logits: Array) -> Array:
        return np.asarray(mined_cross_entropy(logits, labels, share, class_weights=weights, align_corners=align_corners))

    gradient = mined_cross_entropy_backward(logits, labels, share, class_weights=weights, align_corners=align_corners)
    assert_gradient(loss, (logits,), (gradient,), np.ones(()), rng)


@given(map_sizes(6), map_sizes(), IGNORED_SHARE, st.booleans(), rng_seeds())
def test_all_pixels_are_the_plain_loss(
    size: tuple[int, int], label_size: tuple[int, int], ignored: float, align_corners: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((2, NUM_CLASSES, *size)), random_labels((2, *label_size), ignored, rng)
    pairs = (
        (mined_cross_entropy, upsampled_cross_entropy),
        (mined_cross_entropy_backward, upsampled_cross_entropy_backward),
    )
    for mined, plain in pairs:
        actual = mined(logits, labels, 1.0, align_corners=align_corners)
        assert np.array_equal(actual, plain(logits, labels, align_corners=align_corners))


def test_a_weight_of_zero_is_in_the_denominator_of_the_plain_loss_alone() -> None:
    """As the authors have it: probabilities 1/4 and 3/4, and class 0 costs nothing."""
    logits, labels, weights = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1), np.array([[[0, 1]]]), np.array([0.0, 1.0])
    assert upsampled_cross_entropy(logits, labels, class_weights=weights) == pytest.approx(np.log(4 / 3) / 2, abs=ROUNDING)
    mined = mined_cross_entropy(logits, labels, 1.0, class_weights=weights)
    assert mined == pytest.approx(np.log(4 / 3), abs=ROUNDING)


def test_ignored_pixels_are_counted_but_never_kept() -> None:
    """Half of eight are four, and only three have a loss."""
    losses = np.array([[[0.5, 0.0, 0.0, 0.0]], [[0.0, 2.0, 1.0, 0.0]]])
    labels = np.where(losses > 0.0, 7, IGNORE_INDEX)
    assert np.array_equal(keep_largest(losses, labels, 0.5, IGNORE_INDEX), labels)
    # over the whole batch: the first picture keeps none of a quarter
    assert (keep_largest(losses, labels, 0.25, IGNORE_INDEX) == 7).tolist() == [[[False] * 4], [[False, True, True, False]]]


def test_of_equal_losses_the_first_are_kept() -> None:
    assert keep_largest(np.ones((1, 2, 2)), np.array([[[1, 2], [3, 4]]]), 0.5, 255).tolist() == [[[1, 2], [255, 255]]]


def test_nan_is_not_hidden() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, NUM_CLASSES, 5, 6)), random_labels((2, 5, 6), 0.3, rng)
    logits[1] = np.nan  # one of two pictures
    assert np.isnan(mined_cross_entropy(logits, labels, 0.25))


@pytest.mark.parametrize(("dtype", "ignore"), [(np.uint8, 255), (np.int64, -1), (np.float32, np.nan)])
def test_labels_keep_their_dtype(dtype: type[np.generic], ignore: float) -> None:
    mined = keep_largest(np.array([[[1.0, 3.0, 2.0]]]), np.array([[[3, 4, 5]]], dtype=dtype), 2 / 3, ignore)
    assert mined.dtype == dtype
    np.testing.assert_array_equal(mined, np.array([[[ignore, 4, 5]]]))


def test_other_pixels_have_no_gradient() -> None:
    """Without resize each logit belongs to one pixel."""
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, NUM_CLASSES, 5, 6)), random_labels((2, 5, 6), 0.3, rng)
    kept = hardest_pixels(logits, labels, 0.25) != IGNORE_INDEX
    assert kept.sum() == 15
    assert np.array_equal(mined_cross_entropy_backward(logits, labels, 0.25).any(axis=1), kept)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="the share of pixels must be 0 to 1, got"):
        mined_cross_entropy(np.zeros((1, NUM_CLASSES, 1, 1)), np.array([[[0]]]), share)


def test_the_share_falls_linearly() -> None:
    assert [mined_share(0.5, i, 4) for i in (0, 2, 4, 9)] == [1.0, 0.75, 0.5, 0.5]
    assert mined_share(0.5, 0, 0) == 0.5
