import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.batch_norm import BatchNorm
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward, pointwise_conv, pointwise_conv_backward
from tests.reference.directional_derivative import assert_gradient
from tests.strategies import map_sizes, random_pointwise, rng_seeds

ROUNDING = 1e-13  # float64 sums of at most a few thousand terms of order 1


def test_hand_value() -> None:
    x = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 1, 2)  # channel 0: 1 2, channel 1: 3 4
    weight = np.array([[1.0, 10.0], [0.0, -1.0], [2.0, 0.0]]).reshape(3, 2, 1, 1)
    assert pointwise_conv(x, weight)[0, :, 0].tolist() == [[31.0, 42.0], [-3.0, -4.0], [2.0, 4.0]]


def test_conv1x1_hand_value() -> None:
    x = np.array([5.0, -5.0]).reshape(1, 1, 1, 2)
    norm = BatchNorm(*map(np.array, ([2.0], [1.0], [10.0], [4.0 - 1e-5])))  # running deviation √(var + eps) = 2
    weights = ConvNorm(np.full((1, 1, 1, 1), 3.0), norm)
    # 15 -> (15 − 10) / 2 · 2 + 1 = 6;  −15 -> −24, cut to 0
    np.testing.assert_allclose(conv1x1(x, weights, training=False).ravel(), [6.0, 0.0], rtol=0, atol=ROUNDING)


@given(map_sizes(), st.integers(1, 5), st.integers(1, 5), rng_seeds())
def test_equals_matrix_product_at_every_pixel(size: tuple[int, int], c_in: int, c_out: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((2, c_in, *size)), rng.standard_normal((c_out, c_in, 1, 1))
    expected = np.stack([[weight[:, :, 0, 0] @ x[n, :, h] for h in range(size[0])] for n in range(2)])  # (N, H, C_out, W)
    np.testing.assert_allclose(pointwise_conv(x, weight), expected.transpose(0, 2, 1, 3), rtol=0, atol=ROUNDING)


@given(map_sizes(), st.integers(1, 5), st.integers(1, 5), rng_seeds())
def test_gradients_are_adjoints(size: tuple[int, int], c_in: int, c_out: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((2, c_in, *size)), rng.standard_normal((c_out, c_in, 1, 1))
    grad_output = rng.standard_normal((2, c_out, *size))
    grad_x, grad_weight = pointwise_conv_backward(grad_output, x, weight)
    inner = np.sum(pointwise_conv(x, weight) * grad_output)
    bound = ROUNDING * np.linalg.norm(x) * np.linalg.norm(weight) * np.linalg.norm(grad_output)  # Cauchy-Schwarz
    assert abs(inner - np.sum(x * grad_x)) <= bound
    assert abs(inner - np.sum(weight * grad_weight)) <= bound


@given(map_sizes(), st.integers(1, 2), st.booleans(), rng_seeds())
def test_conv1x1_gradient(size: tuple[int, int], batch: int, training: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((batch, 3, *size)), random_pointwise(3, 4, rng)
    grad_output = rng.standard_normal((batch, 4, *size))
    gradients = conv1x1_backward(grad_output, x, weights, training=training)
    assert_gradient(lambda x, w: conv1x1(x, w, training=training), (x, weights), gradients, grad_output, rng)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"), [((1, 2, 3, 3), (4, 3, 1, 1)), ((2, 3, 3), (4, 3, 1, 1)), ((1, 3, 2, 2), (4, 3, 3, 3))]
)
def test_wrong_shapes_are_refused(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pointwise_conv needs"):
        pointwise_conv(np.zeros(x_shape), np.zeros(weight_shape))
