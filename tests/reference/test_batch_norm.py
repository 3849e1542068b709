import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reference.batch_norm import (
    EPS,
    BatchNorm,
    batch_norm,
    batch_norm_backward,
    batch_norm_relu,
    batch_norm_relu_backward,
    updated_running_statistics,
)
from tests.reference.directional_derivative import assert_gradient
from tests.strategies import map_sizes, random_batch_norm, rng_seeds

ROUNDING = 1e-11  # float64 values of order 1, divided by a batch's deviation, which two close pixels make as small as √EPS


def test_hand_value_with_running_statistics() -> None:
    norm = BatchNorm(*map(np.array, ([3.0], [1.0], [2.0], [16.0])))  # (x − 2) / 4 · 3 + 1
    x = np.array([2.0, 6.0, -2.0]).reshape(1, 1, 3, 1)
    assert batch_norm(x, norm, training=False, eps=0.0).ravel().tolist() == [1.0, 4.0, -2.0]


def test_hand_value_of_the_relu() -> None:
    norm = BatchNorm(*map(np.array, ([-2.0], [1.0], [0.0], [1.0 - EPS])))
    x = np.array([1.0, 0.0, -3.0]).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(batch_norm_relu(x, norm, training=False).ravel(), [0.0, 1.0, 7.0], rtol=0, atol=ROUNDING)


@given(st.integers(2, 3), map_sizes(), rng_seeds())
def test_training_equals_scipy_zscore(batch: int, size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, norm = 5.0 + 3.0 * rng.standard_normal((batch, 3, *size)), random_batch_norm(3, rng)
    pixels = x.transpose(0, 2, 3, 1).reshape(-1, 3)
    expected = norm.scale * stats.zscore(pixels, ddof=0) + norm.offset
    actual = batch_norm(x, norm, training=True, eps=0.0).transpose(0, 2, 3, 1).reshape(-1, 3)
    deviation = pixels.std(axis=0)  # zscore rounds as ours does, but by the deviation of what may be close pixels
    assert np.all(np.abs(actual - expected) <= 1e-14 * (1 + np.abs(pixels).max() / deviation) ** 2)


@given(st.integers(2, 3), map_sizes(), rng_seeds())
def test_training_output_has_mean_offset_and_deviation_scale(batch: int, size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, norm = 5.0 + 3.0 * rng.standard_normal((batch, 3, *size)), random_batch_norm(3, rng)
    output = batch_norm(x, norm, training=True)
    np.testing.assert_allclose(output.mean(axis=(0, 2, 3)), norm.offset, rtol=0, atol=ROUNDING)
    variance = x.var(axis=(0, 2, 3))
    expected = np.abs(norm.scale) * np.sqrt(variance / (variance + EPS))
    np.testing.assert_allclose(output.std(axis=(0, 2, 3)), expected, rtol=0, atol=ROUNDING)


@given(st.integers(1, 2), map_sizes(), rng_seeds())
def test_inference_inverts_to_its_input(batch: int, size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, norm = rng.standard_normal((batch, 3, *size)), random_batch_norm(3, rng)
    scale, offset, mean, var = (values[:, None, None] for values in norm)
    restored = (batch_norm(x, norm, training=False) - offset) / scale * np.sqrt(var + EPS) + mean
    np.testing.assert_allclose(restored, x, rtol=0, atol=ROUNDING)


@given(st.integers(2, 3), map_sizes(), st.floats(0.0, 1.0), rng_seeds())
def test_running_statistics_move_to_mean_and_unbiased_variance(
    batch: int, size: tuple[int, int], momentum: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, norm = rng.standard_normal((batch, 2, *size)), random_batch_norm(2, rng)
    after = updated_running_statistics(x, norm, momentum=momentum)
    for c in range(2):
        values = x[:, c].ravel().tolist()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert after.running_mean[c] == pytest.approx((1 - momentum) * norm.running_mean[c] + momentum * mean, abs=ROUNDING)
        assert after.running_var[c] == pytest.approx((1 - momentum) * norm.running_var[c] + momentum * variance, abs=ROUNDING)
    assert after.scale is norm.scale
    assert after.offset is norm.offset


@given(rng_seeds())
def test_single_value_per_channel_uses_running_statistics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, norm, grad_output = rng.standard_normal((1, 4, 1, 1)), random_batch_norm(4, rng), rng.standard_normal((1, 4, 1, 1))
    assert np.array_equal(batch_norm(x, norm, training=True), batch_norm(x, norm, training=False))
    grad_training, _ = batch_norm_backward(grad_output, x, norm, training=True)
    grad_inference, _ = batch_norm_backward(grad_output, x, norm, training=False)
    assert np.array_equal(grad_training, grad_inference)
    assert np.all(grad_training != 0.0)
    assert updated_running_statistics(x, norm, momentum=0.5) is norm


@pytest.mark.parametrize("relu", [False, True])
@given(st.integers(1, 3), map_sizes(), st.booleans(), rng_seeds())
def test_gradient(relu: bool, batch: int, size: tuple[int, int], training: bool, seed: int) -> None:
    forward, backward = (batch_norm_relu, batch_norm_relu_backward) if relu else (batch_norm, batch_norm_backward)
    rng = np.random.default_rng(seed)
    x, norm = rng.standard_normal((batch, 3, *size)), random_batch_norm(3, rng)
    grad_output = rng.standard_normal(x.shape)
    gradients = backward(grad_output, x, norm, training=training)
    assert_gradient(lambda x, norm: forward(x, norm, training=training), (x, norm), gradients, grad_output, rng)
    assert not gradients[1].running_mean.any()
    assert not gradients[1].running_var.any()


def test_wrong_channels_are_refused() -> None:
    norm = random_batch_norm(3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"batch norm of 3 channels .* got \(1, 2, 4, 4\)"):
        batch_norm(np.zeros((1, 2, 4, 4)), norm, training=True)
