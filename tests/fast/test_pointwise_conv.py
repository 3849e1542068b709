import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast.pointwise_conv import conv1x1, pointwise_conv
from reference import pointwise_conv as reference
from tests.fast.against_reference import LAYOUTS, Layout, check, every_device, single_values_allowed
from tests.strategies import map_sizes, random_pointwise, rng_seeds

CHANNELS = st.integers(1, 6)


@every_device
@given(map_sizes(), CHANNELS, CHANNELS, st.integers(1, 3), st.sampled_from(LAYOUTS), rng_seeds())
def test_pointwise_conv_equals_reference(
    device: str, size: tuple[int, int], in_channels: int, out_channels: int, batch: int, layout: Layout, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((batch, in_channels, *size)), rng.standard_normal((out_channels, in_channels, 1, 1))
    check(pointwise_conv, (reference.pointwise_conv, reference.pointwise_conv_backward), inputs, rng, device, layout)


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@given(map_sizes(), CHANNELS, CHANNELS, st.integers(1, 3), st.sampled_from(LAYOUTS), rng_seeds())
def test_conv1x1_equals_reference(
    device: str,
    training: bool,
    size: tuple[int, int],
    in_channels: int,
    out_channels: int,
    batch: int,
    layout: Layout,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((batch, in_channels, *size)), random_pointwise(in_channels, out_channels, rng)
    check(conv1x1, (reference.conv1x1, reference.conv1x1_backward), inputs, rng, device, layout, training=training)
