import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference.batch_norm import Array, BatchNorm
from reference.concat_project import DROPOUT_RATE, concat_project, concat_project_backward, dropout
from reference.pointwise_conv import ConvNorm, conv1x1
from tests.reference.directional_derivative import assert_gradient
from tests.strategies import map_sizes, random_pointwise, rng_seeds

ROUNDING = 1e-13  # float64 sums of tens of terms of order 1


def test_hand_value() -> None:
    neutral = BatchNorm(*map(np.array, ([1.0], [0.0], [0.0], [1.0 - 1e-5])))
    weights = ConvNorm(np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1), neutral)
    branches = [np.array([1.0, 2.0]).reshape(1, 2, 1, 1), np.array([3.0]).reshape(1, 1, 1, 1)]  # 2 channels, then 1
    np.testing.assert_allclose(concat_project(branches, weights, training=False).item(), 321.0, rtol=1e-13)
    keep = np.array([True, False, True]).reshape(1, 3, 1, 1)
    dropped = concat_project(branches, weights, training=False, dropout_keep=keep, dropout_rate=0.5)
    np.testing.assert_allclose(dropped.item(), 2.0 + 600.0, rtol=1e-13)  # rounding of a few hundred in float64


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), map_sizes(6), rng_seeds())
def test_is_a_sum_over_branches(channels: list[int], size: tuple[int, int], seed: int) -> None:
    """The projection of a concatenation is the sum of each branch's product with its own columns of the weight."""
    rng = np.random.default_rng(seed)
    branches = [rng.standard_normal((2, c, *size)) for c in channels]
    weights = random_pointwise(sum(channels), 3, rng)
    columns = np.split(weights.weight[:, :, 0, 0], np.cumsum(channels)[:-1], axis=1)
    products = [np.einsum("oc,nchw->nohw", *pair) for pair in zip(columns, branches, strict=True)]
    raw = np.sum(products, axis=0)
    identity = ConvNorm(np.eye(3)[:, :, None, None], weights.norm)
    expected = conv1x1(raw, identity, training=True)
    # Two ways of adding differ by rounding, which batch norm divides by a deviation of at least √1e-5.
    np.testing.assert_allclose(concat_project(branches, weights, training=True), expected, rtol=0, atol=1e3 * ROUNDING)


@given(map_sizes(), st.floats(0.0, 0.9), rng_seeds())
def test_dropout_keeps_or_zeroes(size: tuple[int, int], rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, keep = rng.standard_normal((2, 3, *size)), rng.random((2, 3, *size)) >= rate
    output = dropout(x, keep, rate=rate)
    assert not output[~keep].any()
    np.testing.assert_allclose(output[keep] * (1.0 - rate), x[keep], rtol=ROUNDING)


def test_dropout_keeps_the_expected_value() -> None:
    keep = np.random.default_rng(0).random(10_000) >= DROPOUT_RATE
    # Mean of 10,000 values of deviation √(rate / (1 − rate)) = 1/3: its own deviation is 1/300, and the seed is fixed.
    assert abs(dropout(np.ones(10_000), keep, rate=DROPOUT_RATE).mean() - 1.0) < 4 / 300


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), map_sizes(6), st.booleans(), st.booleans(), rng_seeds())
def test_gradient(channels: list[int], size: tuple[int, int], training: bool, with_dropout: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    branches = tuple(rng.standard_normal((2, c, *size)) for c in channels)
    weights = random_pointwise(sum(channels), 3, rng)
    grad_output = rng.standard_normal((2, 3, *size))
    keep = rng.random((2, sum(channels), *size)) >= 0.3 if with_dropout else None

    def forward(branches: tuple[Array, ...], weights: ConvNorm[Array]) -> Array:
        return concat_project(branches, weights, training=training, dropout_keep=keep, dropout_rate=0.3)

    grad_branches, grad_weights = concat_project_backward(
        grad_output, branches, weights, training=training, dropout_keep=keep, dropout_rate=0.3
    )
    assert_gradient(forward, (branches, weights), (tuple(grad_branches), grad_weights), grad_output, rng)
