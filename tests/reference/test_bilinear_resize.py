import numpy as np
from hypothesis import given
from scipy import ndimage

from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward, interpolation_matrix
from tests.strategies import map_sizes, rng_seeds

ROUNDING = 1e-13  # four weights that sum to 1, on values of order 1; positions up to 30 are exact to 4e-15


def scipy_resize(x: Array, size: tuple[int, int]) -> Array:
    """Linear interpolation where the corner pixels coincide; a single output pixel reads position 0."""
    axes = [np.linspace(0, n - 1, m) if m > 1 else np.zeros(1) for n, m in zip(x.shape[2:], size, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return np.array([[ndimage.map_coordinates(m, grid, order=1, mode="nearest") for m in image] for image in x])


def test_hand_values() -> None:
    assert interpolation_matrix(3, 5).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    assert interpolation_matrix(5, 3).tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert interpolation_matrix(1, 2).tolist() == [[1], [1]]
    assert interpolation_matrix(3, 1).tolist() == [[1, 0, 0]]  # as TensorFlow: a single pixel reads the first
    corners = np.array([[0.0, 2.0], [4.0, 6.0]]).reshape(1, 1, 2, 2)
    assert bilinear_resize(corners, (3, 3))[0, 0].tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]


def test_features_lie_on_image_pixels_a_stride_apart() -> None:
    """49 features at output stride 16 resized to 769: feature i sits on pixel 16·i."""
    x = np.random.default_rng(0).standard_normal((1, 2, 49, 3))
    np.testing.assert_allclose(bilinear_resize(x, (769, 33))[:, :, ::16, ::16], x, rtol=0, atol=ROUNDING)


@given(map_sizes(), map_sizes(30), rng_seeds())
def test_equals_scipy(in_size: tuple[int, int], out_size: tuple[int, int], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 3, *in_size))
    np.testing.assert_allclose(bilinear_resize(x, out_size), scipy_resize(x, out_size), rtol=0, atol=ROUNDING)


@given(map_sizes(), map_sizes(30), rng_seeds())
def test_gradient_is_the_adjoint(in_size: tuple[int, int], out_size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, grad_output = rng.standard_normal((2, 3, *in_size)), rng.standard_normal((2, 3, *out_size))
    resized, grad_x = bilinear_resize(x, out_size), bilinear_resize_backward(grad_output, in_size)
    assert grad_x.shape == x.shape
    bound = ROUNDING * np.linalg.norm(resized) * np.linalg.norm(grad_output)
    assert abs(np.sum(resized * grad_output) - np.sum(x * grad_x)) <= bound


@given(map_sizes(), map_sizes(30), rng_seeds())
def test_is_linear_and_keeps_constants(in_size: tuple[int, int], out_size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 1, 2, *in_size))
    whole, parts = bilinear_resize(2.0 * a - b, out_size), 2.0 * bilinear_resize(a, out_size) - bilinear_resize(b, out_size)
    np.testing.assert_allclose(whole, parts, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(bilinear_resize(np.full((1, 1, *in_size), 7.0), out_size), 7.0, rtol=0, atol=ROUNDING)


@given(map_sizes(50), rng_seeds())
def test_same_size_is_the_identity(size: tuple[int, int], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((1, 2, *size))
    assert np.array_equal(bilinear_resize(x, size), x)
