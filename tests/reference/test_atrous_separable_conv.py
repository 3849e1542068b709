import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from reference.atrous_separable_conv import (
    SeparableConv,
    atrous_separable_conv,
    atrous_separable_conv_backward,
    depthwise_conv,
    depthwise_conv_backward,
)
from reference.batch_norm import Array, BatchNorm
from reference.pointwise_conv import ConvNorm
from tests.reference.directional_derivative import assert_gradient
from tests.strategies import map_sizes, random_separable, rng_seeds

ROUNDING = 1e-13  # float64 sums of nine terms of order 1, and inner products relative to Cauchy-Schwarz


def rates(max_rate: int = 24) -> st.SearchStrategy[tuple[int, int]]:
    """Up to twice the largest map of these tests, so many taps fall outside."""
    return st.tuples(st.integers(1, max_rate), st.integers(1, max_rate))


def scipy_depthwise(x: Array, weight: Array, rate: tuple[int, int]) -> Array:
    """Correlation with the kernel whose taps stand `rate` apart, zeros inserted between and assumed outside."""
    kernel = np.zeros((x.shape[1], 2 * rate[0] + 1, 2 * rate[1] + 1))
    kernel[:, :: rate[0], :: rate[1]] = weight[:, 0]
    return np.array([[ndimage.correlate(m, k, mode="constant") for m, k in zip(image, kernel, strict=True)] for image in x])


def test_hand_value() -> None:
    x = np.arange(1.0, 10.0).reshape(1, 1, 3, 3)  # 1 2 3 / 4 5 6 / 7 8 9
    weight = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 10.0], [0.0, 100.0, 0.0]]).reshape(1, 1, 3, 3)  # centre, right, below
    expected = [[1 + 20 + 400, 2 + 30 + 500, 3 + 600], [4 + 50 + 700, 5 + 60 + 800, 6 + 900], [7 + 80, 8 + 90, 9]]
    assert depthwise_conv(x, weight, rate=(1, 1))[0, 0].tolist() == expected


def test_rate_is_height_then_width() -> None:
    x = np.zeros((1, 1, 7, 7))
    x[0, 0, 3, 3] = 1.0
    rows, columns = np.nonzero(depthwise_conv(x, np.ones((1, 1, 3, 3)), rate=(1, 3))[0, 0])
    assert (sorted(set(rows.tolist())), sorted(set(columns.tolist()))) == ([2, 3, 4], [0, 3, 6])


def test_rate_beyond_the_map_leaves_the_centre_tap() -> None:
    x, weight = np.ones((1, 1, 2, 3)), np.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    assert depthwise_conv(x, weight, rate=(21, 21)).tolist() == (5.0 * x).tolist()


def test_separable_hand_value() -> None:
    """One pixel: depthwise 2·3 = 6, BN −6, ReLU 0; without the ReLU in between the result would be 1 + 5·(−6), cut to 0."""
    identity = [0.0], [1.0 - 1e-5]  # running mean and variance that change nothing
    depthwise = ConvNorm(np.full((1, 1, 3, 3), 2.0), BatchNorm(*map(np.array, ([-1.0], [0.0], *identity))))
    pointwise = ConvNorm(np.full((1, 1, 1, 1), 5.0), BatchNorm(*map(np.array, ([1.0], [1.0], *identity))))
    output = atrous_separable_conv(
        np.full((1, 1, 1, 1), 3.0), SeparableConv(depthwise, pointwise), rate=(1, 1), training=False
    )
    np.testing.assert_allclose(output.ravel(), [1.0], rtol=0, atol=ROUNDING)


@given(map_sizes(), rates(), rng_seeds())
def test_depthwise_equals_scipy(size: tuple[int, int], rate: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((2, 3, *size)), rng.standard_normal((3, 1, 3, 3))
    actual = depthwise_conv(x, weight, rate=rate)
    np.testing.assert_allclose(actual, scipy_depthwise(x, weight, rate), rtol=0, atol=ROUNDING)


@given(map_sizes(), rates(), rng_seeds())
def test_depthwise_is_linear(size: tuple[int, int], rate: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, weight = rng.standard_normal((1, 2, *size)), rng.standard_normal((1, 2, *size)), rng.standard_normal((2, 1, 3, 3))
    whole = depthwise_conv(2.0 * a - b, weight, rate=rate)
    parts = 2.0 * depthwise_conv(a, weight, rate=rate) - depthwise_conv(b, weight, rate=rate)
    np.testing.assert_allclose(whole, parts, rtol=0, atol=ROUNDING)


@given(map_sizes(), rates(), rng_seeds())
def test_depthwise_gradients_are_adjoints(size: tuple[int, int], rate: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, grad_output = (rng.standard_normal(shape) for shape in ((2, 3, *size), (3, 1, 3, 3), (2, 3, *size)))
    grad_x, grad_weight = depthwise_conv_backward(grad_output, x, weight, rate=rate)
    inner = np.sum(depthwise_conv(x, weight, rate=rate) * grad_output)
    bound = ROUNDING * np.linalg.norm(x) * np.linalg.norm(weight) * np.linalg.norm(grad_output)
    assert abs(inner - np.sum(x * grad_x)) <= bound
    assert abs(inner - np.sum(weight * grad_weight)) <= bound


@given(map_sizes(9), rates(12), st.integers(1, 2), st.booleans(), rng_seeds())
def test_separable_gradient(size: tuple[int, int], rate: tuple[int, int], batch: int, training: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((batch, 3, *size)), random_separable(3, 4, rng)
    grad_output = rng.standard_normal((batch, 4, *size))
    gradients = atrous_separable_conv_backward(grad_output, x, weights, rate=rate, training=training)
    assert_gradient(
        lambda x, w: atrous_separable_conv(x, w, rate=rate, training=training), (x, weights), gradients, grad_output, rng
    )


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "rate"),
    [
        ((1, 2, 4, 4), (3, 1, 3, 3), (1, 1)),
        ((1, 2, 4, 4), (2, 1, 5, 5), (1, 1)),
        ((2, 4, 4), (2, 1, 3, 3), (1, 1)),
        ((1, 2, 4, 4), (2, 1, 3, 3), (0, 1)),
    ],
)
def test_wrong_shapes_and_rates_are_refused(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], rate: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="depthwise_conv needs"):
        depthwise_conv(np.zeros(x_shape), np.zeros(weight_shape), rate=rate)
