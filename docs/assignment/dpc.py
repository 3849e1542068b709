"""The Dense Prediction Cell, to be written by you, in NumPy. `python docs/assignment/check.py` says how far you are.

A map is a float64 array of shape (N, C, H, W): images, channels, rows, columns. Sizes, rates and grids are (height, width).
No function changes its arguments, and all results are float64 but where integers are asked for. README.md beside this file has
the steps, and what to read for each.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EPS = 1e-5  # ε of every batch norm
DROPOUT_RATE = 0.1  # the share of the concatenation that is dropped in training
IGNORE_LABEL = 255  # pixels without a label


# Containers: given, leave them as they are. The gradients of weights are returned in the same containers as the weights.


class BatchNorm(NamedTuple):
    """Parameters and running statistics. In gradients the running statistics are constants: put anything there, say 0."""

    scale: Any  # (C,)
    offset: Any  # (C,)
    running_mean: Any  # (C,)
    running_var: Any  # (C,)


class ConvNorm(NamedTuple):
    """A convolution without bias, and the batch norm behind it."""

    weight: Any  # (C_out, C_in, 1, 1) of a 1×1 convolution, (C, 1, 3, 3) of a depthwise one
    norm: Any  # BatchNorm


class SeparableConv(NamedTuple):
    """The weights of an atrous separable convolution."""

    depthwise: Any  # ConvNorm, weight (C_in, 1, 3, 3), norm over C_in
    pointwise: Any  # ConvNorm, weight (C_out, C_in, 1, 1), norm over C_out


class CellWeights(NamedTuple):
    """The weights of a whole cell."""

    branches: Any  # tuple, one for each branch: ConvNorm or SeparableConv
    projection: Any  # ConvNorm, weight (C_cell, B · C_branch, 1, 1)


class Branch(NamedTuple):
    """One branch of a cell: what it computes, and of which map."""

    operation: str  # "conv1x1", "atrous_separable_conv" or "pyramid_pooling"
    size: tuple[int, int]  # the rate of a separable convolution, the grid of a pooling; (1, 1) for conv1x1
    input_index: int  # -1: the features; i: the output of branch i


# 1. Batch norm and ReLU


def batch_norm(x: Array, norm: BatchNorm, *, training: bool) -> Array:
    """x: (N, C, H, W) -> (N, C, H, W): normalised per channel, then scaled and offset.

    training=True: by mean and biased variance of x itself, over N, H and W. training=False: by the running statistics, and so
    also in training where x has one value per channel (N = H = W = 1; two images of 1 × 1 have two values). ε is EPS.
    """
    raise NotImplementedError


def batch_norm_relu(x: Array, norm: BatchNorm, *, training: bool) -> Array:
    """Batch norm, then ReLU: (N, C, H, W) -> (N, C, H, W)."""
    raise NotImplementedError


def updated_running_statistics(x: Array, norm: BatchNorm, *, momentum: float) -> BatchNorm:
    """The norm after a training step on x: (N, C, H, W). Scale and offset stay; `norm._replace(running_mean=...)` helps.

    `momentum` is the share of the new, as in PyTorch. The running variance takes the unbiased variance of x. Where x has one
    value per channel, nothing changes.
    """
    raise NotImplementedError


# 2. 1×1 convolution


def pointwise_conv(x: Array, weight: Array) -> Array:
    """x: (N, C_in, H, W), weight: (C_out, C_in, 1, 1) -> (N, C_out, H, W): weight[o, c] from channel c to channel o."""
    raise NotImplementedError


def conv1x1(x: Array, weights: ConvNorm, *, training: bool) -> Array:
    """Pointwise convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""
    raise NotImplementedError


# 3. Depthwise convolution


def depthwise_conv(x: Array, weight: Array, *, rate: tuple[int, int]) -> Array:
    """x: (N, C, H, W), weight: (C, 1, 3, 3), rate: (rate_h, rate_w) -> (N, C, H, W). Outside the map all values are 0.

    weight[c, 0, 0, 0] is of the tap above and to the left: y[h, w] reads x[h − rate_h, w − rate_w] by it.
    """
    raise NotImplementedError


# 4. The separable pair


def atrous_separable_conv(x: Array, weights: SeparableConv, *, rate: tuple[int, int], training: bool) -> Array:
    """x: (N, C_in, H, W) -> (N, C_out, H, W)."""
    raise NotImplementedError


# 5. Bilinear resize


def bilinear_resize(x: Array, size: tuple[int, int]) -> Array:
    """x: (N, C, H, W) -> (N, C, *size), with aligned corners. A single output along an axis reads position 0.

    This is the only grid of the assignment: pooling, loss and predictions resize with it.
    """
    raise NotImplementedError


# 6. Pyramid pooling


def pyramid_pooling(
    x: Array,
    weights: ConvNorm,
    *,
    grid_size: tuple[int, int],
    training: bool,
    pooling_size: tuple[int, int] | None = None,
) -> Array:
    """x: (N, C_in, H, W) -> (N, C_out, H, W), as the authors' code has it: means of a sliding window.

    `pooling_size` is the height and width from which the window is computed; None: those of x. Raises ValueError where the
    window has more rows or columns than x.
    """
    raise NotImplementedError


# 7. Concatenate and project


def concat_project(
    branches: list[Array], weights: ConvNorm, *, training: bool, dropout_keep: NDArray[np.bool_] | None = None
) -> Array:
    """B maps (N, C, H, W) -> (N, C_cell, H, W).

    dropout_keep: (N, B · C, H, W), True where an element of the concatenation is kept; None: there is no dropout. The rate is
    DROPOUT_RATE, whatever share of the mask is True. training=False: there is no dropout, and a mask is ignored.
    """
    raise NotImplementedError


# 8. The whole cell


def read_cell(text: str) -> list[Branch]:
    """The branches of a cell in the authors' JSON.

    Every branch is an object with "op", "input" and more: {"op": "conv", "kernel": 3, "rate": [h, w], "input": -1},
    {"op": "conv", "kernel": 1, "input": 0}, {"op": "pyramid_pooling", "grid_size": [h, w], "input": 1}. A kernel may also be
    written as [1, 1] or [3, 3]. Raises ValueError where the input of branch i is not one of -1, 0, ..., i - 1: there is one
    map of features, so there are no inputs -2, -3. No other error is asked for, and kernel 1 comes without a rate.
    """
    raise NotImplementedError


def dense_prediction_cell(
    features: Array,
    cell: list[Branch],
    weights: CellWeights,
    *,
    training: bool,
    rate_multiplier: int = 1,
    pooling_size: tuple[int, int] | None = None,
    dropout_keep: NDArray[np.bool_] | None = None,
) -> Array:
    """features: (N, C_in, H, W) -> (N, C_cell, H, W). Every rate is multiplied by `rate_multiplier`, 2 at output stride 8.

    `pooling_size` and `dropout_keep` are handed on to the functions above.
    """
    raise NotImplementedError


# 9. The loss


def upsampled_cross_entropy(logits: Array, labels: NDArray[np.integer]) -> float:
    """logits: (N, K, h, w), labels: (N, H, W) in 0..K-1 or IGNORE_LABEL -> the mean loss of the labelled pixels, in nats.

    The logits are resized to (H, W) by your `bilinear_resize`. Where no pixel is labelled, the loss and its gradient are 0.
    """
    raise NotImplementedError


# 10. The score


def predicted_labels(logits: Array, size: tuple[int, int]) -> NDArray[np.int64]:
    """logits: (N, K, h, w) -> the most probable class of each pixel: (N, *size), integers.

    The logits are resized by your `bilinear_resize`.
    """
    raise NotImplementedError


def confusion_matrix(predictions: NDArray[np.integer], labels: NDArray[np.integer], *, num_classes: int) -> NDArray[np.int64]:
    """Two arrays of one shape -> (K, K), integers: entry [label, prediction] counts pixels. IGNORE_LABEL counts nowhere."""
    raise NotImplementedError


def mean_iou(confusion: NDArray[np.int64]) -> float:
    """confusion: (K, K) -> mIOU in 0..1, the mean over the classes that occur in labels or predictions.

    It is never called where no class occurs, so return there what you like.
    """
    raise NotImplementedError


# 11. to 18. Gradients. grad_output is ∂L/∂output, and has the output's shape.


def batch_norm_backward(grad_output: Array, x: Array, norm: BatchNorm, *, training: bool) -> tuple[Array, BatchNorm]:
    """Gradients for x: (N, C, H, W), and for scale and offset: (C,) each, in a BatchNorm.

    The same rule as in `batch_norm` for one value per channel: the running statistics, which are constants.
    """
    raise NotImplementedError


def batch_norm_relu_backward(grad_output: Array, x: Array, norm: BatchNorm, *, training: bool) -> tuple[Array, BatchNorm]:
    """Gradients for x and norm, through the ReLU too. x is what came into `batch_norm_relu`.

    The ReLU passes no gradient where its input is exactly 0.
    """
    raise NotImplementedError


def pointwise_conv_backward(grad_output: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """Gradients for x: (N, C_in, H, W) and weight: (C_out, C_in, 1, 1), given grad_output: (N, C_out, H, W)."""
    raise NotImplementedError


def conv1x1_backward(grad_output: Array, x: Array, weights: ConvNorm, *, training: bool) -> tuple[Array, ConvNorm]:
    """Gradients for x and the weights of `conv1x1`."""
    raise NotImplementedError


def depthwise_conv_backward(grad_output: Array, x: Array, weight: Array, *, rate: tuple[int, int]) -> tuple[Array, Array]:
    """Gradients for x: (N, C, H, W) and weight: (C, 1, 3, 3)."""
    raise NotImplementedError


def atrous_separable_conv_backward(
    grad_output: Array, x: Array, weights: SeparableConv, *, rate: tuple[int, int], training: bool
) -> tuple[Array, SeparableConv]:
    """Gradients for x and the weights of `atrous_separable_conv`."""
    raise NotImplementedError


def bilinear_resize_backward(grad_output: Array, size: tuple[int, int]) -> Array:
    """The gradient for an input of (N, C, *size), given grad_output: (N, C, H_out, W_out)."""
    raise NotImplementedError


def pyramid_pooling_backward(
    grad_output: Array,
    x: Array,
    weights: ConvNorm,
    *,
    grid_size: tuple[int, int],
    training: bool,
    pooling_size: tuple[int, int] | None = None,
) -> tuple[Array, ConvNorm]:
    """Gradients for x and the weights of `pyramid_pooling`."""
    raise NotImplementedError


def concat_project_backward(
    grad_output: Array,
    branches: list[Array],
    weights: ConvNorm,
    *,
    training: bool,
    dropout_keep: NDArray[np.bool_] | None = None,
) -> tuple[list[Array], ConvNorm]:
    """Gradients for each branch, a list of (N, C, H, W), and for the weights of `concat_project`."""
    raise NotImplementedError


def upsampled_cross_entropy_backward(logits: Array, labels: NDArray[np.integer]) -> Array:
    """The gradient of the loss for logits: (N, K, h, w)."""
    raise NotImplementedError


# 19. The gradient of the whole cell


def dense_prediction_cell_backward(
    grad_output: Array,
    features: Array,
    cell: list[Branch],
    weights: CellWeights,
    *,
    training: bool,
    rate_multiplier: int = 1,
    pooling_size: tuple[int, int] | None = None,
    dropout_keep: NDArray[np.bool_] | None = None,
) -> tuple[Array, CellWeights]:
    """Gradients for features: (N, C_in, H, W) and all weights, given grad_output: (N, C_cell, H, W)."""
    raise NotImplementedError


# 20. The published cell: a training step of the authors' own code


def updated_cell_statistics(
    features: Array,
    cell: list[Branch],
    weights: CellWeights,
    *,
    momentum: float,
    rate_multiplier: int = 1,
    pooling_size: tuple[int, int] | None = None,
) -> CellWeights:
    """The weights after a training step without an optimiser: the running statistics of every batch norm have moved.

    As in dense_prediction_cell(training=True) without a mask: no dropout. Statistics are of what comes *into* each batch norm,
    in a pooling of the convolved means before the resize.
    """
    raise NotImplementedError
