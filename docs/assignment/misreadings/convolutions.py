"""Misreadings of the 1×1 convolution, the depthwise convolution, the separable pair and their gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading, changed_results
from docs.assignment.mutation import Changes, Function
from reference import atrous_separable_conv as separable
from reference import batch_norm as bn
from reference import pointwise_conv as pointwise
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm
from reference.pointwise_conv import ConvNorm


def _transposed(weight: Array) -> Array:
    return weight.swapaxes(0, 1)


def _transposed_backward(original: Function) -> Function:
    def backward(grad_output: Array, x: Array, weight: Array) -> tuple[Array, Array]:
        grad_x, grad_weight = original(grad_output, x, _transposed(weight))
        return grad_x, _transposed(grad_weight)

    return backward


CONV1X1 = (
    Misreading(
        "weight_transposed",
        "conv1x1",
        "with weight[c, o] from channel c to channel o",
        "the weight's axes are (C_out, C_in, 1, 1): weight[o, c]",
        {
            "pointwise_conv.pointwise_conv": lambda f: lambda x, weight: f(x, _transposed(weight)),
            "pointwise_conv.pointwise_conv_backward": _transposed_backward,
        },
    ),
    Misreading(
        "conv_without_norm",
        "conv1x1",
        "without batch norm between convolution and ReLU",
        "`conv1x1` is convolution, batch norm, ReLU",
        {
            "pointwise_conv.conv1x1": lambda f: (
                lambda x, weights, **_: np.maximum(pointwise.pointwise_conv(x, weights.weight), 0.0)
            )
        },
    ),
)


def _weight_read_as(turned: Callable[[Array], Array], undone: Callable[[Array], Array] | None = None) -> Changes:
    """Depthwise convolution with the 3×3 weights turned; undone by turning them again if nothing else is given."""
    back = undone or turned

    def backward(original: Function) -> Function:
        def changed(g: Array, x: Array, weight: Array, **options: Any) -> tuple[Array, Array]:
            grad_x, grad_weight = original(g, x, turned(weight), **options)
            return grad_x, back(grad_weight)

        return changed

    return {
        "atrous_separable_conv.depthwise_conv": lambda f: lambda x, weight, **o: f(x, turned(weight), **o),
        "atrous_separable_conv.depthwise_conv_backward": backward,
    }


def _rate_read_as(read: Callable[[tuple[int, int]], tuple[int, int]]) -> Changes:
    return {
        "atrous_separable_conv.depthwise_conv": lambda f: lambda x, weight, *, rate: f(x, weight, rate=read(rate)),
        "atrous_separable_conv.depthwise_conv_backward": lambda f: (
            lambda g, x, weight, *, rate: f(g, x, weight, rate=read(rate))
        ),
    }


def _padded_by(mode: Any) -> Changes:
    def padded(original: Function) -> Function:
        return lambda x, rate: np.pad(x, ((0, 0), (0, 0), (rate[0], rate[0]), (rate[1], rate[1])), mode=mode)

    return {"atrous_separable_conv._pad": padded}


def _flipped(weight: Array) -> Array:
    return weight[..., ::-1, ::-1]


DEPTHWISE = (
    Misreading(
        "kernel_flipped",
        "depthwise",
        "with the kernel flipped, as mathematicians' convolution has it",
        "weight[0, 0] is of the tap above and to the left",
        _weight_read_as(_flipped),
    ),
    Misreading(
        "kernel_transposed",
        "depthwise",
        "with the kernel's rows and columns swapped",
        "the weight's axes are (C, 1, kernel rows, kernel columns)",
        _weight_read_as(lambda weight: weight.swapaxes(2, 3)),
    ),
    Misreading(
        "negative_tap_index",
        "depthwise",
        "with tap -1, 0 or 1 as the index into the weight, where -1 is the last one",
        "the tap i · rate away from the centre has the weight of index i + 1",
        _weight_read_as(
            lambda weight: weight[..., [2, 0, 1], :][..., [2, 0, 1]], lambda weight: weight[..., [1, 2, 0], :][..., [1, 2, 0]]
        ),
    ),
    Misreading(
        "rate_swapped",
        "depthwise",
        "with the rate read as (width, height)",
        "rates are (rate_h, rate_w)",
        _rate_read_as(lambda rate: (rate[1], rate[0])),
    ),
    Misreading(
        "rate_ignored",
        "depthwise",
        "at rate 1 x 1",
        "the taps are rate_h rows and rate_w columns apart",
        _rate_read_as(lambda rate: (1, 1)),
    ),
    Misreading(
        "rate_counts_holes",
        "depthwise",
        "with `rate` holes between the taps",
        "the rate is the distance from one tap to the next, so there are rate - 1 holes",
        _rate_read_as(lambda rate: (rate[0] + 1, rate[1] + 1)),
    ),
    Misreading(
        "rate_h_for_both",
        "depthwise",
        "with rate_h for the columns too",
        "columns are rate_w apart",
        _rate_read_as(lambda rate: (rate[0], rate[0])),
    ),
    Misreading(
        "rate_w_for_both",
        "depthwise",
        "with rate_w for the rows too",
        "rows are rate_h apart",
        _rate_read_as(lambda rate: (rate[1], rate[1])),
    ),
    Misreading(
        "edge_padding",
        "depthwise",
        "with the border's values repeated outside of the map",
        "outside all values are 0",
        _padded_by("edge"),
    ),
    Misreading(
        "reflected_padding",
        "depthwise",
        "with the map mirrored at its border",
        "outside all values are 0",
        _padded_by("reflect"),
    ),
    Misreading(
        "wrapped_padding",
        "depthwise",
        "with the map going on at its opposite side, as by np.roll",
        "outside all values are 0",
        _padded_by("wrap"),
    ),
)


def _relu(x: Array, norm: BatchNorm[Array], **options: Any) -> Array:
    return np.maximum(x, 0.0)


def _relu_backward(g: Array, x: Array, norm: BatchNorm[Array], **options: Any) -> tuple[Array, BatchNorm[Array]]:
    return g * (x > 0.0), BatchNorm(*(np.zeros_like(each) for each in norm))


def _nothing_backward(g: Array, x: Array, norm: BatchNorm[Array], **options: Any) -> tuple[Array, BatchNorm[Array]]:
    return g, BatchNorm(*(np.zeros_like(each) for each in norm))


def _middle(forward: Function, backward: Function) -> Changes:
    """The separable pair with something else between its two convolutions."""

    def pair(x: Array, weights: SeparableConv[Array], *, rate: tuple[int, int], training: bool) -> Array:
        raw = separable.depthwise_conv(x, weights.depthwise.weight, rate=rate)
        return pointwise.conv1x1(forward(raw, weights.depthwise.norm, training=training), weights.pointwise, training=training)

    def pair_backward(
        g: Array, x: Array, weights: SeparableConv[Array], *, rate: tuple[int, int], training: bool
    ) -> tuple[Array, SeparableConv[Array]]:
        raw = separable.depthwise_conv(x, weights.depthwise.weight, rate=rate)
        middle = forward(raw, weights.depthwise.norm, training=training)
        grad_middle, grad_pointwise = pointwise.conv1x1_backward(g, middle, weights.pointwise, training=training)
        grad_raw, grad_norm = backward(grad_middle, raw, weights.depthwise.norm, training=training)
        grad_x, grad_weight = separable.depthwise_conv_backward(grad_raw, x, weights.depthwise.weight, rate=rate)
        return grad_x, SeparableConv(ConvNorm(grad_weight, grad_norm), grad_pointwise)

    return {
        "atrous_separable_conv.atrous_separable_conv": lambda f: pair,
        "atrous_separable_conv.atrous_separable_conv_backward": lambda f: pair_backward,
    }


SEPARABLE = (
    Misreading(
        "nothing_in_the_middle",
        "separable",
        "without batch norm and ReLU between the two convolutions",
        "the cell has both there",
        _middle(lambda x, norm, **_: x, _nothing_backward),
    ),
    Misreading(
        "no_relu_in_the_middle",
        "separable",
        "with batch norm but without ReLU between the two convolutions",
        "the cell has both there",
        _middle(
            lambda x, norm, **o: bn.batch_norm(x, norm, **o), lambda g, x, norm, **o: bn.batch_norm_backward(g, x, norm, **o)
        ),
    ),
    Misreading(
        "no_norm_in_the_middle",
        "separable",
        "with ReLU but without batch norm between the two convolutions",
        "the cell has both there",
        _middle(_relu, _relu_backward),
    ),
)


CONVOLUTION_GRADIENTS = (
    Misreading(
        "matrix_not_transposed",
        "conv1x1_gradient",
        "with the weight not transposed in the gradient for x",
        "backwards, weight[o, c] leads from o to c",
        {
            "pointwise_conv.pointwise_conv_backward": changed_results(
                lambda grad_x, g, x, weight: np.einsum("nohw,co->nchw", g, weight[:, :, 0, 0]), None
            )
        },
    ),
    Misreading(
        "weight_gradient_transposed",
        "conv1x1_gradient",
        "with the weight's gradient transposed",
        "it has the weight's axes, (C_out, C_in, 1, 1)",
        {"pointwise_conv.pointwise_conv_backward": changed_results(None, lambda grad, *_: _transposed(grad))},
    ),
    Misreading(
        "weight_gradient_averaged_over_images",
        "conv1x1_gradient",
        "with the weight's gradient averaged over the images",
        "it is a sum over all positions of all images",
        {"pointwise_conv.pointwise_conv_backward": changed_results(None, lambda grad, g, *_: grad / len(g))},
    ),
    Misreading(
        "weight_gradient_averaged",
        "conv1x1_gradient",
        "with the weight's gradient averaged over all positions",
        "it is a sum over all positions of all images",
        {"pointwise_conv.pointwise_conv_backward": changed_results(None, lambda grad, g, *_: grad / g[:, 0].size)},
    ),
    Misreading(
        "taps_not_transposed",
        "depthwise_gradient",
        "by applying the forward convolution to the gradient",
        "each tap adds weight · gradient back into the window that it read, which flips the kernel",
        {
            "atrous_separable_conv.depthwise_conv_backward": lambda f: (
                lambda g, x, weight, *, rate: (f(g, x, _flipped(weight), rate=rate)[0], f(g, x, weight, rate=rate)[1])
            )
        },
    ),
    Misreading(
        "tap_gradients_swapped",
        "depthwise_gradient",
        "with the gradients of opposite taps swapped",
        "a tap's gradient is the sum of gradient · the window that this tap read",
        {"atrous_separable_conv.depthwise_conv_backward": changed_results(None, lambda grad, *_: _flipped(grad))},
    ),
    Misreading(
        "tap_gradients_transposed",
        "depthwise_gradient",
        "with rows and columns of the kernel's gradient swapped",
        "it has the weight's axes, (C, 1, kernel rows, kernel columns)",
        {"atrous_separable_conv.depthwise_conv_backward": changed_results(None, lambda grad, *_: grad.swapaxes(2, 3))},
    ),
    Misreading(
        "tap_gradients_averaged",
        "depthwise_gradient",
        "with the kernel's gradient averaged over the images",
        "it is a sum over all positions of all images",
        {"atrous_separable_conv.depthwise_conv_backward": changed_results(None, lambda grad, g, *_: grad / len(g))},
    ),
    Misreading(
        "middle_relu_has_no_gradient",
        "separable_gradient",
        "without the ReLU between the two convolutions",
        "what lies between them forwards is passed backwards too: ReLU, then batch norm",
        {
            "atrous_separable_conv.atrous_separable_conv_backward": _middle(
                lambda x, norm, **o: bn.batch_norm_relu(x, norm, **o),
                lambda g, x, norm, **o: bn.batch_norm_backward(g, x, norm, **o),
            )["atrous_separable_conv.atrous_separable_conv_backward"]
        },
    ),
)
