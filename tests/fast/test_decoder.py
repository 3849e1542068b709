from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fast.decoder import Decoder
from fast.dense_prediction_cell import decays
from reference.atrous_separable_conv import SeparableConv, atrous_separable_conv
from reference.batch_norm import Array, BatchNorm
from reference.bilinear_resize import bilinear_resize
from reference.pointwise_conv import ConvNorm, conv1x1

# Absolute, on maps up to 10: float32 through five convolutions of at most 304 terms, 2e-6 at worst here.
OUTPUT_BOUND = 2e-5


def trained_decoder(low_level_channels: int, channels: int) -> Decoder:
    """With statistics, scales and offsets that are not neutral."""
    torch.manual_seed(0)
    decoder = Decoder(low_level_channels, channels=channels, projected_channels=4)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(cast(Tensor, tensor), 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(cast(Tensor, tensor), std=0.3)
    return decoder.eval()


def conv_norm(decoder: Decoder, name: str) -> ConvNorm[Array]:
    state = {key: value.double().numpy() for key, value in decoder.state_dict().items() if key.startswith(f"{name}.")}
    leaves = ("weight", "bias", "running_mean", "running_var")
    return ConvNorm(state[f"{name}.weight"], BatchNorm(*(state[f"{name}.norm.{leaf}"] for leaf in leaves)))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("context_size", "low_level_size"), [((3, 4), (9, 13)), ((2, 2), (8, 7)), ((1, 1), (1, 1))])
def test_decoder_is_what_its_docstring_says(
    context_size: tuple[int, int], low_level_size: tuple[int, int], align_corners: bool
) -> None:
    decoder = trained_decoder(low_level_channels=7, channels=6)
    context, low_level = torch.randn(2, 6, *context_size), torch.randn(2, 7, *low_level_size)
    with torch.no_grad():
        output = decoder(context, low_level, align_corners=align_corners)
    low = conv1x1(low_level.double().numpy(), conv_norm(decoder, "projection"), training=False)
    resized = bilinear_resize(context.double().numpy(), low_level_size, align_corners=align_corners)
    expected = np.concatenate((resized, low), axis=1)
    for i in range(2):
        weights = SeparableConv(
            conv_norm(decoder, f"refinement.{i}.depthwise"), conv_norm(decoder, f"refinement.{i}.pointwise")
        )
        expected = atrous_separable_conv(expected, weights, rate=(1, 1), training=False)
    np.testing.assert_allclose(output, expected, rtol=0, atol=OUTPUT_BOUND)


def test_gradients_reach_both_inputs_and_all_weights() -> None:
    decoder = Decoder(7, channels=6, projected_channels=4).train()
    context, low_level = torch.randn(2, 6, 3, 3, requires_grad=True), torch.randn(2, 7, 9, 9, requires_grad=True)
    decoder(context, low_level).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (context, low_level, *decoder.parameters()))


def test_weight_decay_spares_depthwise_weights_and_norms() -> None:
    decaying = {name for name, decay in decays(Decoder(7)).items() if decay}
    assert decaying == {"projection.weight", "refinement.0.pointwise.weight", "refinement.1.pointwise.weight"}
