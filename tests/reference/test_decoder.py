import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm
from reference.decoder import DecoderWeights, decoder, decoder_backward
from reference.pointwise_conv import ConvNorm
from tests.reference.directional_derivative import assert_gradient
from tests.strategies import map_sizes, random_decoder_weights, rng_seeds

CHANNELS, LOW_LEVEL_CHANNELS, PROJECTED_CHANNELS = 3, 4, 2


def neutral(channels: int) -> BatchNorm[Array]:
    one, zero = np.ones(channels), np.zeros(channels)
    return BatchNorm(scale=one, offset=zero, running_mean=zero, running_var=one - 1e-5)


def separable(taps: list[Array], pointwise: list[list[float]]) -> SeparableConv[Array]:
    """Without any effect of the batch norms; taps: 3×3 of each channel."""
    weight = np.array(pointwise)[:, :, None, None]
    return SeparableConv(ConvNorm(np.stack(taps)[:, None], neutral(len(taps))), ConvNorm(weight, neutral(len(weight))))


@pytest.mark.parametrize(
    ("align_corners", "resized", "expected"),
    [
        (True, [0.0, 2.0, 4.0, 6.0], [2402.0, 3806.0, 3012.0, 1810.0]),
        (False, [0.0, 1.5, 4.5, 6.0], [2401.5, 3806.0, 3012.0, 1810.5]),
    ],
)
def test_hand_value(align_corners: bool, resized: list[float], expected: list[float]) -> None:
    """Two features of context, 0 and 6, over a low-level row of 1, 5, 0 and 2, which is doubled by the projection.

    The first convolution takes resized + 100 · the sum of three neighbours, 12, 12, 14 and 4; the second again sums of three.
    """
    middle, ones = np.pad([[1.0]], 1), np.ones((3, 3))
    weights = DecoderWeights(
        projection=ConvNorm(np.full((1, 1, 1, 1), 2.0), neutral(1)),
        refinement=(separable([middle, ones], [[1.0, 100.0]]), separable([ones], [[1.0]])),
    )
    context, low_level = np.array([0.0, 6.0]).reshape(1, 1, 1, 2), np.array([1.0, 5.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    output = decoder(context, low_level, weights, training=False, align_corners=align_corners)
    np.testing.assert_allclose(output.ravel(), expected, rtol=1e-13)
    first = np.array(resized) + 100.0 * np.array([12.0, 12.0, 14.0, 4.0])
    assert np.convolve(first, np.ones(3), "same").tolist() == expected


def draw(
    context_size: tuple[int, int], low_level_size: tuple[int, int], rng: np.random.Generator
) -> tuple[Array, Array, DecoderWeights[Array]]:
    weights = random_decoder_weights(CHANNELS, LOW_LEVEL_CHANNELS, PROJECTED_CHANNELS, rng)
    context = rng.standard_normal((2, CHANNELS, *context_size))
    return context, rng.standard_normal((2, LOW_LEVEL_CHANNELS, *low_level_size)), weights


@given(map_sizes(5), map_sizes(8), st.booleans(), st.booleans(), rng_seeds())
def test_gradient(
    context_size: tuple[int, int], low_level_size: tuple[int, int], training: bool, align_corners: bool, seed: int
) -> None:
    """Of both maps and of all weights, each compared with its own norm; with maps smaller and larger than the other."""
    rng = np.random.default_rng(seed)
    context, low_level, weights = draw(context_size, low_level_size, rng)
    grad_output = rng.standard_normal((2, CHANNELS, *low_level_size))

    def forward(context: Array, low_level: Array, weights: DecoderWeights[Array]) -> Array:
        return decoder(context, low_level, weights, training=training, align_corners=align_corners)

    grad_context, grad_low_level, grad_weights = decoder_backward(
        grad_output, context, low_level, weights, training=training, align_corners=align_corners
    )
    assert_gradient(lambda x: forward(x, low_level, weights), (context,), (grad_context,), grad_output, rng)
    assert_gradient(lambda x: forward(context, x, weights), (low_level,), (grad_low_level,), grad_output, rng)
    assert_gradient(lambda *w: forward(context, low_level, DecoderWeights(*w)), weights, grad_weights, grad_output, rng)


@given(map_sizes(6), map_sizes(8), st.booleans(), rng_seeds())
def test_output_lies_on_the_low_level_map(
    context_size: tuple[int, int], low_level_size: tuple[int, int], training: bool, seed: int
) -> None:
    """Context of that map's own size is not resized, so corners do not matter then."""
    rng = np.random.default_rng(seed)
    context, low_level, weights = draw(context_size, low_level_size, rng)
    output = decoder(context, low_level, weights, training=training)
    assert output.shape == (2, CHANNELS, *low_level_size)
    assert output.dtype == np.float64
    assert (output >= 0.0).all()
    fitting, _, _ = draw(low_level_size, low_level_size, rng)
    aligned, not_aligned = (
        decoder(fitting, low_level, weights, training=False, align_corners=align_corners) for align_corners in (True, False)
    )
    np.testing.assert_allclose(aligned, not_aligned, rtol=0, atol=1e-12)  # positions that are whole numbers up to rounding


@pytest.mark.parametrize("shape", [(1, LOW_LEVEL_CHANNELS, 3, 3), (LOW_LEVEL_CHANNELS, 3, 3)])
def test_maps_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    context, _, weights = draw((2, 2), (3, 3), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"decoder needs context: .* and low_level: .*, got \(2, 3, 2, 2\), "):
        decoder(context, np.zeros(shape), weights, training=False)
