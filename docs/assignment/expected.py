"""What is expected of each function of `dpc.py`: the function of that name in `reference/`, called as students are asked to.

Where `dpc.py` asks for more, or for other arguments, than the reference has, the function is here.
"""

from typing import Any, NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from docs.assignment.mutation import Function, replaced
from reference import (
    atrous_separable_conv,
    batch_norm,
    bilinear_resize,
    mean_iou,
    pointwise_conv,
    pyramid_pooling,
    upsampled_cross_entropy,
)
from reference import concat_project as project
from reference import dense_prediction_cell as whole_cell
from reference.batch_norm import Array, BatchNorm
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from reference.dense_prediction_cell import BranchOptions, CellWeights
from reference.pointwise_conv import ConvNorm

FILES = (
    batch_norm,
    pointwise_conv,
    atrous_separable_conv,
    bilinear_resize,
    pyramid_pooling,
    project,
    upsampled_cross_entropy,
    mean_iou,
)


def function(name: str) -> Function:
    """The function that stands for the student's function of this name, as it is at the moment: perhaps replaced."""
    found = globals().get(name)
    if not callable(found):  # else it is one of those below
        found = next(getattr(file, name) for file in FILES if hasattr(file, name))
    return found  # type: ignore[no-any-return]


class ListedBranch(NamedTuple):
    """A branch in the form that students are given: operation, rate or grid, input."""

    operation: str
    size: tuple[int, int]
    input_index: int


def read_cell(text: str) -> list[ListedBranch]:
    """The branches of a cell in the authors' JSON. Raises ValueError also for inputs -2 and so on: students have one map."""
    cell = Cell.from_json(text)
    for i, branch in enumerate(cell.branches):
        if branch.input_index < BACKBONE_FEATURE:
            raise ValueError(f"branch {i}: input must be -1 or an earlier branch, got {branch.input_index}")
    return listed(cell)


def listed(cell: Cell) -> list[ListedBranch]:
    """The branches of a cell."""
    return [ListedBranch(*_operation(branch), branch.input_index) for branch in cell.branches]


def _operation(branch: Branch) -> tuple[str, tuple[int, int]]:
    match branch.operation:
        case Conv1x1():
            return "conv1x1", (1, 1)
        case AtrousSeparableConv(rate):
            return "atrous_separable_conv", rate
        case PyramidPooling(grid_size):
            return "pyramid_pooling", grid_size
        case _:
            assert_never(branch.operation)


def mask(dropout_keep: NDArray[np.bool_] | None, training: bool) -> NDArray[np.bool_] | None:
    """The mask that applies: in inference none, even if one is given."""
    return dropout_keep if training else None


def concat_project(
    branches: list[Array], weights: ConvNorm[Array], *, training: bool, dropout_keep: NDArray[np.bool_] | None = None
) -> Array:
    """Concatenation, dropout in training only, projection."""
    return project.concat_project(branches, weights, training=training, dropout_keep=mask(dropout_keep, training))


def concat_project_backward(
    grad_output: Array,
    branches: list[Array],
    weights: ConvNorm[Array],
    *,
    training: bool,
    dropout_keep: NDArray[np.bool_] | None = None,
) -> tuple[list[Array], ConvNorm[Array]]:
    """Its gradients for the branches and the weights."""
    keep = mask(dropout_keep, training)
    return project.concat_project_backward(grad_output, branches, weights, training=training, dropout_keep=keep)


def dense_prediction_cell(
    features: Array,
    cell: Cell,
    weights: CellWeights[Array],
    *,
    training: bool,
    rate_multiplier: int = 1,
    pooling_size: tuple[int, int] | None = None,
    dropout_keep: NDArray[np.bool_] | None = None,
) -> Array:
    """The whole cell, its options one by one."""
    options = BranchOptions(training, rate_multiplier, pooling_size=pooling_size)
    keep = mask(dropout_keep, training)
    return whole_cell.dense_prediction_cell(features, cell, weights, options, dropout_keep=keep)


def dense_prediction_cell_backward(
    grad_output: Array,
    features: Array,
    cell: Cell,
    weights: CellWeights[Array],
    *,
    training: bool,
    rate_multiplier: int = 1,
    pooling_size: tuple[int, int] | None = None,
    dropout_keep: NDArray[np.bool_] | None = None,
) -> tuple[Array, CellWeights[Array]]:
    """Its gradients for the features and for all weights."""
    options = BranchOptions(training, rate_multiplier, pooling_size=pooling_size)
    keep = mask(dropout_keep, training)
    return whole_cell.dense_prediction_cell_backward(grad_output, features, cell, weights, options, dropout_keep=keep)


def updated_cell_statistics(
    features: Array,
    cell: Cell,
    weights: CellWeights[Array],
    *,
    momentum: float,
    rate_multiplier: int = 1,
    pooling_size: tuple[int, int] | None = None,
) -> CellWeights[Array]:
    """The weights after a training step, in which only the running statistics change: every batch norm is watched.

    What comes into a `batch_norm_relu` counts, not what comes into the `batch_norm` that this calls: a misreading may have a
    ReLU in between.
    """
    updated: list[BatchNorm[Array]] = []
    open_calls: list[BatchNorm[Array]] = []

    def watched(original: Function) -> Function:
        def watching(x: Array, norm: BatchNorm[Array], *, training: bool) -> Array:
            if not open_calls:
                updated.append(batch_norm.updated_running_statistics(x, norm, momentum=momentum))
            open_calls.append(norm)
            try:
                output: Array = original(x, norm, training=training)
            finally:
                open_calls.pop()
            return output

        return watching

    with replaced({"batch_norm.batch_norm": watched, "batch_norm.batch_norm_relu": watched}):
        dense_prediction_cell(
            features, cell, weights, training=True, rate_multiplier=rate_multiplier, pooling_size=pooling_size
        )
    return _with_norms(weights, updated)  # type: ignore[no-any-return]


def _with_norms(tree: Any, norms: list[BatchNorm[Array]]) -> Any:
    """The same weights with these batch norms, in the order of the forward pass."""
    if isinstance(tree, np.ndarray):
        return tree
    if isinstance(tree, BatchNorm):
        return norms.pop(0)
    children = [_with_norms(child, norms) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def predicted_labels(logits: Array, size: tuple[int, int]) -> NDArray[np.int64]:
    """The most probable class of each pixel: argmax after the resize."""
    predicted: NDArray[np.int64] = bilinear_resize.bilinear_resize(logits, size).argmax(axis=1)
    return predicted
