import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast.atrous_separable_conv import atrous_separable_conv, depthwise_conv
from reference import atrous_separable_conv as reference
from tests.fast.against_reference import LAYOUTS, Layout, check, every_device, single_values_allowed
from tests.strategies import map_sizes, random_separable, rng_seeds

RATES = st.tuples(st.integers(1, 24), st.integers(1, 24))
CHANNELS = st.integers(1, 6)


@every_device
@given(map_sizes(), CHANNELS, st.integers(1, 2), RATES, st.sampled_from(LAYOUTS), rng_seeds())
def test_depthwise_conv_equals_reference(
    device: str, size: tuple[int, int], channels: int, batch: int, rate: tuple[int, int], layout: Layout, seed: int
) -> None:
    """Also rates that reach past the whole map."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((batch, channels, *size)), rng.standard_normal((channels, 1, 3, 3))
    pair = reference.depthwise_conv, reference.depthwise_conv_backward
    check(depthwise_conv, pair, inputs, rng, device, layout, rate=rate)


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@given(map_sizes(), CHANNELS, CHANNELS, RATES, st.sampled_from(LAYOUTS), rng_seeds())
def test_atrous_separable_conv_equals_reference(
    device: str,
    training: bool,
    size: tuple[int, int],
    in_channels: int,
    out_channels: int,
    rate: tuple[int, int],
    layout: Layout,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((2, in_channels, *size)), random_separable(in_channels, out_channels, rng)
    pair = reference.atrous_separable_conv, reference.atrous_separable_conv_backward
    check(atrous_separable_conv, pair, inputs, rng, device, layout, rate=rate, training=training)
