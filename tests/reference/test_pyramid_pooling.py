import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, signal

from reference.batch_norm import EPS, Array
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant, pooling_matrix, pyramid_pooling, pyramid_pooling_backward, window_size
from tests.reference.directional_derivative import assert_gradient
from tests.reference.test_bilinear_resize import scipy_resize
from tests.strategies import map_sizes, random_pointwise, rng_seeds

ROUNDING = 1e-12  # float64 means of at most 144 values of order 1, one product, one interpolation

VARIANTS: tuple[PoolingVariant, ...] = ("sliding_window", "grid_cells")
GRIDS = st.tuples(st.integers(1, 10), st.integers(1, 10))
both_variants = pytest.mark.parametrize("variant", VARIANTS)


def pool(x: Array, grid_size: tuple[int, int], variant: PoolingVariant) -> Array:
    rows, columns = (pooling_matrix(s, g, variant=variant) for s, g in zip(x.shape[2:], grid_size, strict=True))
    return rows @ x @ columns.T


def pinned_sizes(size: int, grid: int) -> st.SearchStrategy[int]:
    """Sizes whose window fits the map: ceil(pinned / grid) <= size."""
    return st.integers(1, size * grid)


def test_windows_of_the_authors_code() -> None:
    """Kernels observed in a run of it: ceil(map / grid) for crops 513 and 193×137 at output stride 16 (maps 33, 12×9)."""
    assert [window_size(33, grid) for grid in (1, 2, 4, 8)] == [33, 17, 9, 5]
    assert [pooling_matrix(33, grid, variant="sliding_window").shape[0] for grid in (1, 2, 4, 8)] == [1, 17, 25, 29]
    assert (window_size(12, 4), window_size(9, 2)) == (3, 5)
    assert window_size(3, 8) == 1  # a grid finer than the map: every pixel is its own window


def test_pinned_size_fixes_the_window() -> None:
    assert window_size(65, 4, pooling_size=33) == 9
    assert pooling_matrix(65, 4, variant="sliding_window", pooling_size=33).shape == (57, 65)


def test_grid_cells_hand_values() -> None:
    thirds = pooling_matrix(
        7, 3, variant="grid_cells"
    )  # floor(7i/3) to ceil(7(i+1)/3): cells overlap where 3 does not divide 7
    assert [np.flatnonzero(row).tolist() for row in thirds] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert [np.flatnonzero(row).tolist() for row in pooling_matrix(2, 4, variant="grid_cells")] == [[0], [0], [1], [1]]


def test_hand_value() -> None:
    """Grid 1×2 on one row 1 3 5: windows of 2 give means 2 4; doubled 4 8; back on three pixels 4 6 8."""
    weights = random_pointwise(1, 1, np.random.default_rng(0))
    neutral = weights.norm._replace(
        scale=np.ones(1), offset=np.zeros(1), running_mean=np.zeros(1), running_var=np.ones(1) - EPS
    )
    x = np.array([1.0, 3.0, 5.0]).reshape(1, 1, 1, 3)
    output = pyramid_pooling(x, ConvNorm(np.full((1, 1, 1, 1), 2.0), neutral), grid_size=(1, 2), training=False)
    np.testing.assert_allclose(output.ravel(), [4.0, 6.0, 8.0], rtol=0, atol=ROUNDING)


@given(map_sizes(), GRIDS, rng_seeds())
def test_sliding_window_means_equal_scipy(size: tuple[int, int], grid_size: tuple[int, int], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((1, 2, *size))
    window = -(-size[0] // grid_size[0]), -(-size[1] // grid_size[1])
    box = np.ones(window) / (window[0] * window[1])
    expected = np.array([[signal.correlate2d(m, box, mode="valid") for m in image] for image in x])
    np.testing.assert_allclose(pool(x, grid_size, "sliding_window"), expected, rtol=0, atol=ROUNDING)


@given(map_sizes(), GRIDS, rng_seeds())
def test_grid_cell_means_equal_scipy(size: tuple[int, int], grid_size: tuple[int, int], seed: int) -> None:
    """A cell that spans real coordinates [i·S/g, (i+1)·S/g) averages every pixel that it touches."""
    x = np.random.default_rng(seed).standard_normal((1, 1, *size))
    touched = [
        np.array([[p < (i + 1) * s / g - 1e-9 and p + 1 > i * s / g + 1e-9 for p in range(s)] for i in range(g)])
        for s, g in zip(size, grid_size, strict=True)
    ]
    expected = [[ndimage.mean(x[0, 0], np.outer(row, column), 1) for column in touched[1]] for row in touched[0]]
    np.testing.assert_allclose(pool(x, grid_size, "grid_cells")[0, 0], expected, rtol=0, atol=ROUNDING)


@given(map_sizes(), GRIDS, st.data(), rng_seeds())
def test_whole_operation_equals_scipy(
    size: tuple[int, int], grid_size: tuple[int, int], data: st.DataObject, seed: int
) -> None:
    """Inference, sliding windows of a pinned size: window means, a product per pixel, BN by its formula, ReLU, resize."""
    pinned = data.draw(pinned_sizes(size[0], grid_size[0])), data.draw(pinned_sizes(size[1], grid_size[1]))
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((2, 3, *size)), random_pointwise(3, 4, rng)
    window = -(-pinned[0] // grid_size[0]), -(-pinned[1] // grid_size[1])
    box = np.ones(window) / (window[0] * window[1])
    means = np.array([[signal.correlate2d(m, box, mode="valid") for m in image] for image in x])
    raw = np.tensordot(weights.weight[:, :, 0, 0], means, axes=(1, 1)).swapaxes(0, 1)
    scale, offset, mean, var = (values[:, None, None] for values in weights.norm)
    expected = scipy_resize(np.maximum(scale * (raw - mean) / np.sqrt(var + EPS) + offset, 0.0), size)
    actual = pyramid_pooling(x, weights, grid_size=grid_size, training=False, pooling_size=pinned)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING)


@both_variants
@given(st.integers(1, 40), st.integers(1, 10))
def test_rows_are_means(variant: PoolingVariant, size: int, grid: int) -> None:
    """Non-negative weights that sum to 1 keep constant maps; every pixel is read by some row."""
    matrix = pooling_matrix(size, grid, variant=variant)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=0, atol=ROUNDING)
    assert np.all(matrix >= 0.0)
    assert np.all(matrix.any(axis=0))


@both_variants
@given(map_sizes(), GRIDS, st.floats(-3.0, 3.0), rng_seeds())
def test_constant_maps_stay_constant(
    variant: PoolingVariant, size: tuple[int, int], grid_size: tuple[int, int], value: float, seed: int
) -> None:
    weights = random_pointwise(1, 2, np.random.default_rng(seed))
    x = np.full((1, 1, *size), value)
    output = pyramid_pooling(x, weights, grid_size=grid_size, training=False, variant=variant)
    np.testing.assert_allclose(output, np.broadcast_to(output[:, :, :1, :1], output.shape), rtol=0, atol=ROUNDING)


@given(map_sizes(), rng_seeds())
def test_variants_agree_on_grid_1x1(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((2, 3, *size)), random_pointwise(3, 2, rng)
    one, other = (pyramid_pooling(x, weights, grid_size=(1, 1), training=True, variant=variant) for variant in VARIANTS)
    assert np.array_equal(one, other)


@both_variants
@given(map_sizes(), GRIDS, st.integers(1, 2), st.booleans(), st.data(), rng_seeds())
def test_gradient(
    variant: PoolingVariant,
    size: tuple[int, int],
    grid_size: tuple[int, int],
    batch: int,
    training: bool,
    data: st.DataObject,
    seed: int,
) -> None:
    fitting = st.tuples(pinned_sizes(size[0], grid_size[0]), pinned_sizes(size[1], grid_size[1]))
    pinned = data.draw(st.none() | fitting) if variant == "sliding_window" else None
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((batch, 3, *size)), random_pointwise(3, 4, rng)
    grad_output = rng.standard_normal((batch, 4, *size))

    def forward(x: Array, weights: ConvNorm[Array]) -> Array:
        return pyramid_pooling(x, weights, grid_size=grid_size, training=training, variant=variant, pooling_size=pinned)

    gradients = pyramid_pooling_backward(
        grad_output, x, weights, grid_size=grid_size, training=training, variant=variant, pooling_size=pinned
    )
    assert_gradient(forward, (x, weights), gradients, grad_output, rng)


def test_window_larger_than_the_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window of 9 .* must be 1 to the map's 8"):
        window_size(8, 1, pooling_size=9)
    with pytest.raises(ValueError, match=r"window of 9 .* must be 1 to the map's 8"):
        pooling_matrix(8, 1, variant="sliding_window", pooling_size=9)


def test_unknown_variant_is_refused() -> None:
    weights = random_pointwise(1, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="variant must be sliding_window or grid_cells, got 'max'"):
        pyramid_pooling(np.zeros((1, 1, 2, 2)), weights, grid_size=(1, 1), training=False, variant="max")  # type: ignore[arg-type]
