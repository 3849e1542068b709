from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.pyramid_pooling import pyramid_pooling
from reference import pyramid_pooling as reference
from reference.pyramid_pooling import PoolingVariant
from tests.fast.against_reference import LAYOUTS, Layout, check, every_device, single_values_allowed, to_tensors
from tests.strategies import map_sizes, random_pointwise, rng_seeds

PAIR = reference.pyramid_pooling, reference.pyramid_pooling_backward
GRIDS = st.tuples(st.integers(1, 10), st.integers(1, 10))


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ["sliding_window", "grid_cells"])
@given(map_sizes(), st.integers(1, 2), GRIDS, st.sampled_from(LAYOUTS), rng_seeds())
def test_equals_reference(
    device: str,
    variant: PoolingVariant,
    training: bool,
    size: tuple[int, int],
    batch: int,
    grid_size: tuple[int, int],
    layout: Layout,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((batch, 3, *size)), random_pointwise(3, 4, rng)
    check(pyramid_pooling, PAIR, inputs, rng, device, layout, grid_size=grid_size, training=training, variant=variant)


@single_values_allowed
@every_device
@given(map_sizes(), GRIDS, st.data(), st.booleans(), rng_seeds())
def test_equals_reference_with_pinned_pooling_size(
    device: str, size: tuple[int, int], grid_size: tuple[int, int], data: st.DataObject, training: bool, seed: int
) -> None:
    """Any pinned size whose window, ceil(pinned / grid), fits the map; larger than the map too."""
    pinned = tuple(data.draw(st.integers(1, s * g)) for s, g in zip(size, grid_size, strict=True))
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((2, 3, *size)), random_pointwise(3, 4, rng)
    check(pyramid_pooling, PAIR, inputs, rng, device, grid_size=grid_size, training=training, pooling_size=pinned)


def test_window_that_exceeds_the_map_is_refused() -> None:
    weights = to_tensors(random_pointwise(3, 4, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"window of 9 .* must be 1 to the map's 5"):
        pyramid_pooling(torch.zeros(1, 3, 5, 5).double(), weights, grid_size=(1, 1), training=False, pooling_size=(9, 5))


def test_trains_after_inference_of_the_same_size() -> None:
    """What is kept between calls must not remember that it was made without gradients."""
    rng = np.random.default_rng(0)
    x, weights = to_tensors((rng.standard_normal((2, 3, 11, 13)), random_pointwise(3, 4, rng)))
    arguments: dict[str, Any] = {"grid_size": (2, 4), "training": True}
    with torch.inference_mode():
        pyramid_pooling(x, weights, **arguments)
    pyramid_pooling(x, weights, **arguments).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
