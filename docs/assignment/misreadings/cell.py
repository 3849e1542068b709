"""Misreadings of a cell's file, of the whole cell and its gradient."""

from collections.abc import Callable
from typing import Any, assert_never

import numpy as np

from docs.assignment.expected import ListedBranch
from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import Changes, Function
from reference import concat_project as project
from reference import dense_prediction_cell as whole_cell
from reference.batch_norm import Array
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, Operation, PyramidPooling


def _multiplied(rate_or_grid: Callable[[Operation, int], Operation]) -> Changes:
    """Operations read in another way: a function of the operation and the rate multiplier, which then is 1."""

    def change(original: Function) -> Function:
        def resolve(operation: Operation, options: Any) -> Any:
            return original(rate_or_grid(operation, options.rate_multiplier), options._replace(rate_multiplier=1))

        return resolve

    return {"dense_prediction_cell._resolve": change}


def _all_but_rate_1(operation: Operation, multiplier: int) -> Operation:
    match operation:
        case AtrousSeparableConv((rate_h, rate_w)):
            height, width = (rate if rate == 1 else multiplier * rate for rate in (rate_h, rate_w))
            return AtrousSeparableConv(rate=(height, width))
        case Conv1x1() | PyramidPooling():
            return operation
        case _:
            assert_never(operation)


def _grids_too(operation: Operation, multiplier: int) -> Operation:
    match operation:
        case AtrousSeparableConv():
            return AtrousSeparableConv(rate=operation.rate_times(multiplier))
        case PyramidPooling((grid_h, grid_w)):
            return PyramidPooling(grid_size=(multiplier * grid_h, multiplier * grid_w))
        case Conv1x1():
            return operation
        case _:
            assert_never(operation)


def _inputs_read_as(read: Callable[[int, int], int]) -> Changes:
    """A cell whose branches read other maps: a function of the branch's index and its input."""

    def reread(cell: Cell) -> Cell:
        branches = enumerate(cell.branches)
        return Cell(tuple(Branch(read(i, branch.input_index), branch.operation) for i, branch in branches))

    return {
        "dense_prediction_cell.branch_outputs": lambda f: lambda features, cell, *rest: f(features, reread(cell), *rest),
        "dense_prediction_cell.dense_prediction_cell_backward": lambda f: (
            lambda g, features, cell, *rest, **o: f(g, features, reread(cell), *rest, **o)
        ),
    }


def _unread_alone(original: Function) -> Function:
    def cell_output(features: Array, cell: Cell, weights: Any, options: Any, **dropout: Any) -> Array:
        branches = whole_cell.branch_outputs(features, cell, weights, options)
        read = {branch.input_index for branch in cell.branches}
        unread = [np.zeros_like(branch) if i in read else branch for i, branch in enumerate(branches)]
        return project.concat_project(unread, weights.projection, training=options.training, **dropout)

    return cell_output


def _branches_read_as(read: Callable[[ListedBranch], ListedBranch]) -> Changes:
    return {"expected.read_cell": lambda f: lambda text: [read(branch) for branch in f(text)]}


CELL = (
    Misreading(
        "sizes_reversed",
        "cell",
        "with rates and grids read as [width, height]",
        "the JSON has [height, width]",
        _branches_read_as(lambda branch: branch._replace(size=branch.size[::-1])),
    ),
    Misreading(
        "inputs_from_0",
        "cell",
        "with inputs counted from 0 for the features",
        "-1 is the features, i is branch i",
        _branches_read_as(lambda branch: branch._replace(input_index=branch.input_index + 1)),
    ),
    Misreading(
        "no_rate_multiplier",
        "cell",
        "without the rate multiplier",
        "every rate is multiplied by it",
        _multiplied(lambda operation, multiplier: operation),
    ),
    Misreading(
        "rate_1_not_multiplied",
        "cell",
        "with rate 1 left at 1",
        "the multiplier applies to every rate, also to 1",
        _multiplied(_all_but_rate_1),
    ),
    Misreading(
        "grids_multiplied",
        "cell",
        "with the rate multiplier on grids too",
        "pooling grids stay as they are",
        _multiplied(_grids_too),
    ),
    Misreading(
        "previous_map_for_the_features",
        "cell",
        "where input -1 is the last map so far, as in Python's lists",
        "-1 is the features",
        _inputs_read_as(lambda i, index: i - 1 if index == BACKBONE_FEATURE else index),
    ),
    Misreading(
        "all_branches_read_the_features",
        "cell",
        "where every branch reads the features",
        "a branch reads the map that its input names",
        _inputs_read_as(lambda i, index: BACKBONE_FEATURE),
    ),
    Misreading(
        "chain_of_branches",
        "cell",
        "where every branch reads the one before it",
        "a branch reads the map that its input names",
        _inputs_read_as(lambda i, index: i - 1),
    ),
    Misreading(
        "unread_branches_alone",
        "cell",
        "with only those branches in the concatenation that no other branch reads",
        "all branches are concatenated",
        {"dense_prediction_cell.dense_prediction_cell": _unread_alone},
    ),
)


def _accumulated(joined: Callable[[Array, Array, int], Array], *, from_projection: bool = True) -> Changes:
    """The cell's gradient with readers' gradients joined in another way: a function of old, new and the index of the map.

    Without `from_projection`, branches that others read begin at 0.
    """

    def change(original: Function) -> Function:
        def backward(g: Array, features: Array, cell: Cell, weights: Any, options: Any, **dropout: Any) -> Any:
            branches = whole_cell.branch_outputs(features, cell, weights, options)
            grad_branches, grad_projection = project.concat_project_backward(
                g, branches, weights.projection, training=options.training, **dropout
            )
            maps, grads = {BACKBONE_FEATURE: features}, {BACKBONE_FEATURE: np.zeros_like(features)}
            maps, grads = maps | dict(enumerate(branches)), grads | dict(enumerate(grad_branches))
            if not from_projection:
                grads |= {i: np.zeros_like(maps[i]) for i in {branch.input_index for branch in cell.branches}}
            grad_weights = []
            for i, (read, operation) in reversed([(i, (b.input_index, b.operation)) for i, b in enumerate(cell.branches)]):
                grad_input, grad_branch = whole_cell.apply_operation_backward(
                    grads[i], maps[read], operation, weights.branches[i], options
                )
                grads[read] = joined(grads[read], grad_input, read)
                grad_weights.append(grad_branch)
            return grads[BACKBONE_FEATURE], whole_cell.CellWeights(tuple(reversed(grad_weights)), grad_projection)

        return backward

    return {"dense_prediction_cell.dense_prediction_cell_backward": change}


_ALL_ADD_UP = "the gradients of all readers of a map, and of the projection, add up"
CELL_GRADIENT = (
    Misreading(
        "last_reader_wins",
        "cell_gradient",
        "where a reader's gradient for a map replaces what was there",
        _ALL_ADD_UP,
        _accumulated(lambda old, new, read: new),
    ),
    Misreading(
        "last_reader_of_the_features_wins",
        "cell_gradient",
        "where the features have the gradient of one reader alone",
        _ALL_ADD_UP,
        _accumulated(lambda old, new, read: new if read == BACKBONE_FEATURE else old + new),
    ),
    Misreading(
        "readers_do_not_reach_branches",
        "cell_gradient",
        "where branches have the projection's gradient alone, and none of their readers'",
        _ALL_ADD_UP,
        _accumulated(lambda old, new, read: old + new if read == BACKBONE_FEATURE else old),
    ),
    Misreading(
        "projection_forgotten",
        "cell_gradient",
        "where branches that others read have no gradient of the projection",
        _ALL_ADD_UP,
        _accumulated(lambda old, new, read: old + new, from_projection=False),
    ),
)
