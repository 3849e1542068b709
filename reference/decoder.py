"""The decoder of DeepLabv3+: context on every 16th or 8th pixel, refined with an early map on every 4th.

    y = separable(separable(concat[resize(context), conv1x1(low_level)]))

The low-level map, an early one of the backbone, is projected to few channels, so that it does not outweigh the context. The
context is resized to that map's size, with corners aligned or not (`bilinear_resize.py`). Two atrous separable convolutions of
rate 1 read both. Batch norm and ReLU follow every convolution.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018, sections
3.1 and 4.1; `refine_by_decoder` in research/deeplab/model.py.
"""

from typing import Generic, NamedTuple

import numpy as np

from reference.atrous_separable_conv import SeparableConv, atrous_separable_conv, atrous_separable_conv_backward
from reference.batch_norm import Array, ArrayT
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward

OUTPUT_STRIDE = 4  # pixels from one position of the low-level map to the next
LOW_LEVEL_CHANNELS = 48  # after the projection; the paper's table 1
RATE = (1, 1)


class DecoderWeights(NamedTuple, Generic[ArrayT]):
    """Weights of a decoder; also the container of their gradients."""

    projection: ConvNorm[ArrayT]  # weight (48, C_low, 1, 1)
    refinement: tuple[SeparableConv[ArrayT], ...]  # two: from 256 + 48 channels to 256, and from 256 to 256


def decoder(
    context: Array, low_level: Array, weights: DecoderWeights[Array], *, training: bool, align_corners: bool = True
) -> Array:
    """context: (N, C, h, w), low_level: (N, C_low, H, W) -> (N, C_out, H, W). Raises ValueError for maps of other shapes."""
    *_, output = _maps(context, low_level, weights, training, align_corners)
    return output


def decoder_backward(
    grad_output: Array,
    context: Array,
    low_level: Array,
    weights: DecoderWeights[Array],
    *,
    training: bool,
    align_corners: bool = True,
) -> tuple[Array, Array, DecoderWeights[Array]]:
    """Gradients for context, low_level and the weights of `decoder`, given grad_output: (N, C_out, H, W)."""
    maps = _maps(context, low_level, weights, training, align_corners)
    grad, grad_refinement = grad_output, []
    for x, separable in zip(reversed(maps[:-1]), reversed(weights.refinement), strict=True):
        grad, grad_separable = atrous_separable_conv_backward(grad, x, separable, rate=RATE, training=training)
        grad_refinement.append(grad_separable)
    grad_resized, grad_low = np.split(grad, [context.shape[1]], axis=1)
    grad_context = bilinear_resize_backward(grad_resized, (context.shape[2], context.shape[3]), align_corners=align_corners)
    grad_low_level, grad_projection = conv1x1_backward(grad_low, low_level, weights.projection, training=training)
    return grad_context, grad_low_level, DecoderWeights(grad_projection, tuple(reversed(grad_refinement)))


def _maps(
    context: Array, low_level: Array, weights: DecoderWeights[Array], training: bool, align_corners: bool
) -> list[Array]:
    """What each separable convolution reads, and the output of the last: all on the low-level map's positions."""
    if context.ndim != 4 or low_level.ndim != 4 or context.shape[0] != low_level.shape[0]:
        shapes = f"{context.shape}, {low_level.shape}"
        raise ValueError(f"decoder needs context: (N, C, h, w) and low_level: (N, C_low, H, W), got {shapes}")
    low = conv1x1(low_level, weights.projection, training=training)
    resized = bilinear_resize(context, (low.shape[2], low.shape[3]), align_corners=align_corners)
    maps = [np.concatenate((resized, low), axis=1)]  # (N, 256 + 48, H, W)
    for separable in weights.refinement:
        maps.append(atrous_separable_conv(maps[-1], separable, rate=RATE, training=training))
    return maps
