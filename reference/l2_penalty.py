"""The L2 penalty, the weight decay of SGD: half the sum of squares of all weights that decay, added to the loss.

    penalty = (λ / 2) · Σ w²,     ∂penalty/∂w = λ · w,     λ = `weight_decay`

The weights of convolutions decay, the classifier's too, but no depthwise ones; nor do a batch norm's scale and offset, nor
biases. Source: slim's `l2_regularizer` with the `weight_decay` of research/deeplab/train.py; `weights_regularizer=None` of the
depthwise convolutions in `split_separable_conv2d`, research/deeplab/core/utils.py.

With AdamW the same weights decay, but not by a term of the loss: each step takes λ · learning rate · w off them, beside what
Adam makes of the loss's gradient (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
"""

from typing import Any, TypeAlias, TypeVar

import numpy as np

from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm

Weights: TypeAlias = "Array | tuple[Weights, ...]"  # a container of weights is a named tuple; several are a tuple
WeightsT = TypeVar("WeightsT", bound=Weights)


def l2_penalty(weights: Weights, *, weight_decay: float) -> float:
    """Of a container of weights, or of several in a tuple; an array by itself is a weight that decays, as the classifier's.
    Its bias does not: leave it out.

    >>> from reference.pointwise_conv import ConvNorm
    >>> norm = BatchNorm(*np.full((4, 1), 9.0))  # does not decay
    >>> l2_penalty((ConvNorm(np.array([[2.0], [1.0]]), norm), np.array([3.0])), weight_decay=0.5)  # 1/4 · (4 + 1 + 9)
    3.5
    """
    match weights:
        case BatchNorm():
            return 0.0
        case SeparableConv(_, pointwise):
            return l2_penalty(pointwise, weight_decay=weight_decay)
        case tuple():
            return sum((l2_penalty(each, weight_decay=weight_decay) for each in weights), 0.0)
        case _:
            return weight_decay / 2 * float(np.square(weights).sum())


def l2_penalty_backward(weights: WeightsT, *, weight_decay: float) -> WeightsT:
    """Gradient for all weights, in their own container: 0 for those that do not decay."""
    gradient: WeightsT = _gradient(weights, weight_decay)
    return gradient


def _gradient(weights: Any, decay: float) -> Any:
    match weights:
        case BatchNorm():
            return BatchNorm(*map(np.zeros_like, weights))
        case SeparableConv(depthwise, pointwise):
            return SeparableConv(_gradient(depthwise, 0.0), _gradient(pointwise, decay))
        case tuple():
            gradients = [_gradient(each, decay) for each in weights]
            return type(weights)(*gradients) if hasattr(weights, "_fields") else tuple(gradients)
        case _:
            return decay * weights
