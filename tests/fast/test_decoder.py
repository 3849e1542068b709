from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fast.batch_norm import authors_norm
from fast.decoder import Decoder
from reference.batch_norm import Array
from reference.decoder import DecoderWeights, decoder, decoder_backward
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    Step,
    assert_equal_steps,
    assert_steps_within_budget,
    every_device,
    reference_step,
    rounded,
    single_values_allowed,
    to_tensors,
    torch_step,
)
from tests.fast.plain_torch import PlainDecoder
from tests.reference.directional_derivative import leaves
from tests.strategies import map_sizes, random_decoder_weights, rng_seeds

CHANNELS, LOW_LEVEL_CHANNELS, PROJECTED_CHANNELS = 6, 7, 4


def draw(
    context_size: tuple[int, int], low_level_size: tuple[int, int], batch: int, seed: int
) -> tuple[Array, Array, DecoderWeights[Array], Array]:
    """Context, low-level map, weights and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    context = rng.standard_normal((batch, CHANNELS, *context_size))
    low_level = rng.standard_normal((batch, LOW_LEVEL_CHANNELS, *low_level_size))
    weights = random_decoder_weights(CHANNELS, LOW_LEVEL_CHANNELS, PROJECTED_CHANNELS, rng)
    return context, low_level, weights, rng.standard_normal((batch, CHANNELS, *low_level_size))


def decoder_with(weights: DecoderWeights[Array], *, training: bool) -> Decoder:
    """In float64, with these weights."""
    module = Decoder(
        LOW_LEVEL_CHANNELS, channels=CHANNELS, projected_channels=PROJECTED_CHANNELS, norm_layer=authors_norm
    ).double()
    with torch.no_grad():
        for tensor, array in zip(tree_leaves(module.weights()), leaves(weights), strict=True):
            tensor.copy_(torch.from_numpy(array))
    return module.train(training)


def module_step(
    module: Decoder | PlainDecoder,
    context: Array,
    low_level: Array,
    cotangent: Array,
    layout: Layout = "contiguous",
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Step:
    """In the dtype and on the device of the module."""
    parameter = module.projection.weight
    maps = to_tensors((context, low_level), parameter.device.type, layout, parameter.dtype)

    def forward(context: Tensor, low_level: Tensor, _: object) -> Tensor:
        output: Tensor = module(context, low_level, **options)
        return output

    return torch_step(forward, (*maps, module.weights()), cotangent, autocast)


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("calls_submodules", [False, True], ids=["fused", "submodules"])
@given(map_sizes(6), map_sizes(9), st.integers(1, 2), st.booleans(), st.sampled_from(LAYOUTS), rng_seeds())
def test_step_equals_reference(
    device: str,
    training: bool,
    calls_submodules: bool,
    context_size: tuple[int, int],
    low_level_size: tuple[int, int],
    batch: int,
    align_corners: bool,
    layout: Layout,
    seed: int,
) -> None:
    """Output, gradients of both maps and of all weights, running statistics; context smaller and larger than the other map."""
    context, low_level, weights, cotangent = draw(context_size, low_level_size, batch, seed)
    options: dict[str, Any] = {"align_corners": align_corners}
    expected = reference_step(
        decoder, decoder_backward, (context, low_level, weights), cotangent, training=training, **options
    )
    module = decoder_with(weights, training=training).to(device)
    if calls_submodules:
        for child in module.modules():
            if child is not module:
                child.register_forward_hook(lambda *_: None)
    assert_equal_steps(module_step(module, context, low_level, cotangent, layout, **options), expected)


@every_device
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_is_within_budget(device: str, training: bool, autocast: torch.dtype | None) -> None:
    actual, expected, yardstick = [], [], []
    for seed in range(9):
        context, low_level, weights, cotangent = rounded(draw((3, 4), (9, 13), 4, seed), torch.float32)
        module = decoder_with(weights, training=training).to(device, torch.float32)
        plain = PlainDecoder(LOW_LEVEL_CHANNELS, CHANNELS, PROJECTED_CHANNELS).to(device).train(training)
        plain.load_state_dict(module.state_dict())
        inputs = context, low_level, weights
        expected.append(reference_step(decoder, decoder_backward, inputs, cotangent, training=training))
        layout = LAYOUTS[seed % len(LAYOUTS)]
        actual.append(module_step(module, context, low_level, cotangent, layout, autocast))
        yardstick.append(module_step(plain, context, low_level, cotangent, autocast=autocast))
    assert_steps_within_budget(actual, expected, yardstick, autocast or torch.float32)
