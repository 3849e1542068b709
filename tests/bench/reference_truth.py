"""What `reference/` says that a case of the benchmark computes."""

from typing import Any, cast

import numpy as np
from torch import Tensor

from bench.cases import DTYPES, SEED, Case, CellCase, DepthwiseCase, LossCase, MapCase, OperationCase, normal
from bench.training_cases import WEIGHT_DECAY, ProxyCase
from reference import dense_prediction_cell as cells
from reference.atrous_separable_conv import SeparableConv, depthwise_conv, depthwise_conv_backward
from reference.batch_norm import Array, BatchNorm
from reference.bilinear_resize import bilinear_resize
from reference.l2_penalty import l2_penalty_backward
from reference.mean_iou import confusion_matrix
from reference.pointwise_conv import ConvNorm, pointwise_conv, pointwise_conv_backward
from reference.upsampled_cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_backward

Truth = dict[str, list[Array]]


def reference_truth(case: Case, dtype: str) -> Truth:
    """`case.truth(dtype)`, by NumPy."""
    match case:
        case ProxyCase():
            return first_update(case)
        case LossCase():
            return loss(case, dtype)
        case MapCase():
            return map_and_gradients(case, dtype)
        case _:
            raise TypeError(f"the reference has no {type(case).__name__}")


def map_and_gradients(case: MapCase, dtype: str) -> Truth:
    """The output, and in training the gradients for the cotangent that the workload draws."""
    x, plain = array(case.features(dtype)), cast(Any, case.plain())
    options = cells.BranchOptions(case.is_training)
    weights = array(plain.weight) if isinstance(case, DepthwiseCase) else arrays(plain.weights())
    output = forward(case, x, weights, options)
    if not case.is_training:
        return {"output": [output]}
    cotangent = array(normal(output.shape, SEED + 1).to(DTYPES[dtype]))
    return {"output": [output], "gradients": backward(case, cotangent, x, weights, options)}


def forward(case: MapCase, x: Array, weights: Any, options: cells.BranchOptions) -> Array:
    match case:
        case OperationCase(operation=operation):
            return cells.apply_operation(x, operation, weights, options)
        case DepthwiseCase(rate=rate):
            return depthwise_conv(x, weights, rate=rate)
        case CellCase(cell=cell):
            assert not case.dropout_rate or not case.is_training, "chance has no truth"
            return cells.dense_prediction_cell(x, cell, weights, options)
        case _:
            raise TypeError(type(case).__name__)


def backward(case: MapCase, cotangent: Array, x: Array, weights: Any, options: cells.BranchOptions) -> list[Array]:
    match case:
        case OperationCase(operation=operation):
            return trainable(cells.apply_operation_backward(cotangent, x, operation, weights, options))
        case DepthwiseCase(rate=rate):
            return [*depthwise_conv_backward(cotangent, x, weights, rate=rate)]
        case CellCase(cell=cell):  # a backbone's features have no gradient
            return trainable(cells.dense_prediction_cell_backward(cotangent, x, cell, weights, options)[1])
        case _:
            raise TypeError(type(case).__name__)


def loss(case: LossCase, dtype: str) -> Truth:
    small, classes = case.data(dtype)
    logits, labels = array(small), classes.numpy()
    if not case.is_training:
        predictions = bilinear_resize(logits, case.label_size, align_corners=case.align_corners).argmax(axis=1)
        return {"output": [confusion_matrix(predictions, labels, num_classes=case.num_classes).astype(np.float64)]}
    cotangent = float(normal((), SEED + 1).to(DTYPES[dtype]))
    gradient = cotangent * upsampled_cross_entropy_backward(logits, labels, align_corners=case.align_corners)
    output = np.array(upsampled_cross_entropy(logits, labels, align_corners=case.align_corners))
    return {"output": [output], "gradients": [gradient]}


def first_update(case: ProxyCase) -> Truth:
    """The loss, and the first update: the learning rate times the gradient with weight decay."""
    assert (case.images, case.margin, case.dropout_rate) == (1, 0, 0.0), "chance has no truth"
    plain = case.plain()
    weights, matrix, bias = arrays(plain.context.weights()), array(plain.classifier.weight), plain.classifier.bias
    features, labels = (tensor.expand(case.batch, *tensor.shape[1:]) for tensor in case.data())
    x, targets, options = array(features), labels.numpy(), cells.BranchOptions(training=True)

    context = cells.dense_prediction_cell(x, case.cell, weights, options)
    logits = pointwise_conv(context, matrix) + array(cast(Tensor, bias))[:, None, None]
    align_corners = case.grid.align_corners
    grad_logits = upsampled_cross_entropy_backward(logits, targets, align_corners=align_corners)
    grad_context, grad_matrix = pointwise_conv_backward(grad_logits, context, matrix)
    _, grad_weights = cells.dense_prediction_cell_backward(grad_context, x, case.cell, weights, options)
    decay_weights, decay_matrix = l2_penalty_backward((weights, matrix), weight_decay=WEIGHT_DECAY)
    gradients = [
        *(gradient + decay for gradient, decay in zip(trainable(grad_weights), trainable(decay_weights), strict=True)),
        grad_matrix + decay_matrix,
        grad_logits.sum(axis=(0, 2, 3)),  # the bias does not decay
    ]
    updates = [-case.learning_rate * gradient for gradient in gradients]
    output = np.array(upsampled_cross_entropy(logits, targets, align_corners=align_corners))
    return {"output": [output], "gradients": updates}


def array(tensor: Tensor) -> Array:
    """The tensor as a float64 array."""
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def arrays(tree: Any) -> Any:
    """The same container with float64 arrays instead of tensors."""
    if isinstance(tree, Tensor):
        return array(tree)
    children = [arrays(child) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def trainable(tree: Any) -> list[Any]:
    """The leaves of a container of weights or gradients, in order, without running statistics."""
    if isinstance(tree, BatchNorm):
        return [tree.scale, tree.offset]
    if isinstance(tree, ConvNorm | SeparableConv | tuple):
        return [leaf for child in tree for leaf in trainable(child)]
    return [tree]
