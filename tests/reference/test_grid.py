"""Grids: sizes there and back, and that a resize from features to pixels leaves each feature where the grid puts it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward
from reference.grid import Grid

GRIDS = st.builds(Grid, st.integers(1, 32), st.booleans())
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(GRIDS, SIZES)
def test_a_map_has_the_picture_that_has_the_map(grid: Grid, features: tuple[int, int]) -> None:
    picture = grid.pixels(features)
    assert grid.features(picture) == features
    assert grid.has(picture)
    assert grid.rounded_up(picture) == picture
    if min(features) > 1:  # one of a single pixel is not what anybody wants to be suggested
        assert grid.nearest(picture) == picture


@given(GRIDS, st.tuples(st.integers(1, 200), st.integers(1, 200)))
def test_rounding_up_adds_less_than_a_feature(grid: Grid, size: tuple[int, int]) -> None:
    rounded = grid.rounded_up(size)
    assert grid.has(rounded)
    assert all(0 <= large - small < grid.stride for large, small in zip(rounded, size, strict=True))
    assert grid.has(size) == (rounded == size)


def test_nothing_lies_on_no_grid() -> None:
    assert not Grid(16).has((0, 17))
    assert not Grid(16, align_corners=False).has((0, 16))


@pytest.mark.parametrize("stride", [0, -16, 3.5])
def test_a_stride_of_no_whole_pixels_is_refused(stride: float) -> None:
    with pytest.raises(ValueError, match=f"stride must be an integer of at least 1, got {stride}"):
        Grid(stride)  # type: ignore[arg-type]


@given(GRIDS, SIZES, st.floats(0.3, 2.5))
def test_a_scaled_picture_of_patches_is_one_of_patches(grid: Grid, features: tuple[int, int], scale: float) -> None:
    picture = grid.pixels(features)
    assert grid.scaled(picture, 1.0) == picture
    if not grid.align_corners:
        assert grid.has(grid.scaled(picture, scale))


@pytest.mark.parametrize(("stride", "align_corners"), [(1, True), (4, True), (5, True), (1, False), (3, False), (4, False)])
def test_a_ramp_of_pixels_is_read_where_features_sit(stride: int, align_corners: bool) -> None:
    """Features whose value is their position in pixels become, at each pixel between them, that pixel's position."""
    grid = Grid(stride, align_corners)
    height, width = grid.pixels((5, 7))
    first = 0.0 if align_corners else (stride - 1) / 2
    rows = first + stride * np.arange(5.0)
    resized = bilinear_resize(np.tile(rows[:, None], (1, 1, 1, 7)), (height, width), align_corners=align_corners)
    expected = np.clip(np.arange(height), rows[0], rows[-1])
    np.testing.assert_allclose(resized[0, 0], np.tile(expected[:, None], (1, width)), atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_gradient_of_a_resize_is_its_transpose(align_corners: bool) -> None:
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(1, 2, 3, 4)), rng.normal(size=(1, 2, 10, 7))
    forward = (bilinear_resize(x, (10, 7), align_corners=align_corners) * grad).sum()
    backward = (x * bilinear_resize_backward(grad, (3, 4), align_corners=align_corners)).sum()
    np.testing.assert_allclose(forward, backward)
