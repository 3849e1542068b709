"""The assignment solved by calls of the reference: what docs/assignment/check.py has to accept. It needs NumPy alone."""

from typing import Any

from docs.assignment import expected
from docs.assignment.dpc import Branch
from reference.atrous_separable_conv import (
    SeparableConv,
    atrous_separable_conv,
    atrous_separable_conv_backward,
    depthwise_conv,
    depthwise_conv_backward,
)
from reference.batch_norm import (
    BatchNorm,
    batch_norm,
    batch_norm_backward,
    batch_norm_relu,
    batch_norm_relu_backward,
    updated_running_statistics,
)
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward
from reference.cell import AtrousSeparableConv, Cell, Conv1x1, PyramidPooling
from reference.cell import Branch as ReferenceBranch
from reference.dense_prediction_cell import BranchOptions, CellWeights
from reference.dense_prediction_cell import dense_prediction_cell as whole_cell
from reference.dense_prediction_cell import dense_prediction_cell_backward as whole_cell_backward
from reference.mean_iou import confusion_matrix, mean_iou
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward, pointwise_conv, pointwise_conv_backward
from reference.pyramid_pooling import pyramid_pooling, pyramid_pooling_backward
from reference.upsampled_cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_backward

__all__ = [  # what is as students are asked for it
    "BatchNorm",
    "Branch",
    "CellWeights",
    "ConvNorm",
    "SeparableConv",
    "atrous_separable_conv",
    "atrous_separable_conv_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_relu",
    "batch_norm_relu_backward",
    "bilinear_resize",
    "bilinear_resize_backward",
    "concat_project",
    "concat_project_backward",
    "confusion_matrix",
    "conv1x1",
    "conv1x1_backward",
    "depthwise_conv",
    "depthwise_conv_backward",
    "mean_iou",
    "pointwise_conv",
    "pointwise_conv_backward",
    "pyramid_pooling",
    "pyramid_pooling_backward",
    "updated_running_statistics",
    "upsampled_cross_entropy",
    "upsampled_cross_entropy_backward",
]

KINDS: dict[str, Any] = {
    "conv1x1": lambda size: Conv1x1(),
    "atrous_separable_conv": lambda rate: AtrousSeparableConv(rate=rate),
    "pyramid_pooling": lambda grid: PyramidPooling(grid_size=grid),
}


def reference_cell(branches: list[Branch]) -> Cell:
    return Cell(tuple(ReferenceBranch(each.input_index, KINDS[each.operation](each.size)) for each in branches))


def read_cell(text: str) -> list[Branch]:
    Cell.from_json(text)
    return [Branch(*each) for each in expected.read_cell(text)]


def dense_prediction_cell(features: Any, cell: Any, weights: Any, *, dropout_keep: Any = None, **options: Any) -> Any:
    keep = dropout_keep if options["training"] else None
    return whole_cell(features, reference_cell(cell), weights, BranchOptions(**options), dropout_keep=keep)


def dense_prediction_cell_backward(
    grad_output: Any, features: Any, cell: Any, weights: Any, *, dropout_keep: Any = None, **options: Any
) -> Any:
    arguments = (grad_output, features, reference_cell(cell), weights, BranchOptions(**options))
    return whole_cell_backward(*arguments, dropout_keep=dropout_keep if options["training"] else None)


def concat_project(branches: Any, weights: Any, **options: Any) -> Any:
    return expected.concat_project(branches, weights, **options)


def concat_project_backward(grad_output: Any, branches: Any, weights: Any, **options: Any) -> Any:
    return expected.concat_project_backward(grad_output, branches, weights, **options)


def updated_cell_statistics(features: Any, cell: Any, weights: Any, **options: Any) -> Any:
    return expected.updated_cell_statistics(features, reference_cell(cell), weights, **options)


def predicted_labels(logits: Any, size: tuple[int, int]) -> Any:
    return bilinear_resize(logits, size).argmax(axis=1)
