"""The Dense Prediction Cell (paper, section 3.1; `build_cell` in research/deeplab/core/dense_prediction_cell.py).

    maps[-1] = features;   maps[i] = operation_i(maps[input_i]);   y = concat_project(maps[0], ..., maps[B-1])

An option, `rate_multiplier`, multiplies all atrous rates (the authors' `conv_rate_multiplier`); 1×1 convolutions and pooling
grids stay the same. Networks choose it by `rate_multiplier_for`.

Of several layers of a backbone the first is maps[-1], the next maps[-2], and so on. A cell without branches has nothing to
project, and nothing to drop out:  y = BN(concat(maps[-1], maps[-2], ...)), without ReLU.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, assert_never, overload

import numpy as np
from numpy.typing import NDArray

from reference.atrous_separable_conv import SeparableConv, atrous_separable_conv, atrous_separable_conv_backward
from reference.batch_norm import Array, ArrayT, BatchNorm, batch_norm, batch_norm_backward
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.concat_project import DROPOUT_RATE, concat_project, concat_project_backward
from reference.pointwise_conv import ConvNorm, conv1x1, conv1x1_backward
from reference.pyramid_pooling import PoolingVariant, pyramid_pooling, pyramid_pooling_backward

MIN_STRIDE, MAX_STRIDE = 4, 32  # pixels per feature; the paper has 16, and 8 for its last numbers

BranchWeights: TypeAlias = ConvNorm[ArrayT] | SeparableConv[ArrayT]


class CellWeights(NamedTuple, Generic[ArrayT]):
    """Weights of a cell; also the container of their gradients."""

    branches: tuple[BranchWeights[ArrayT], ...]  # in the order of the cell
    output: ConvNorm[ArrayT] | BatchNorm[ArrayT]  # `projection`, or of a cell without branches `norm`

    @property
    def projection(self) -> ConvNorm[ArrayT]:
        """Of a cell with branches, weight: (cell_channels, B·branch_channels, 1, 1)."""
        assert isinstance(self.output, ConvNorm)
        return self.output

    @property
    def norm(self) -> BatchNorm[ArrayT]:
        """Of a cell without branches, over the channels of all its inputs."""
        assert isinstance(self.output, BatchNorm)
        return self.output


class BranchOptions(NamedTuple):
    """Options of a cell's operations, besides the cell and the weights."""

    training: bool
    rate_multiplier: int = 1  # by `rate_multiplier_for`
    pooling: PoolingVariant = "sliding_window"
    pooling_size: tuple[int, int] | None = None  # map size that fixes the pooling windows; None: the map's own


def rate_multiplier_for(output_stride: int) -> int:
    """2 at output stride 8, as in the authors' networks (16 // output_stride), and 1 at any other from 4 to 32.

    Raises ValueError for an output stride outside of these.
    """
    if not MIN_STRIDE <= output_stride <= MAX_STRIDE:
        raise ValueError(f"output_stride must be {MIN_STRIDE} to {MAX_STRIDE}, got {output_stride}")
    return 2 if output_stride == 8 else 1


def dense_prediction_cell(
    features: Array | Sequence[Array],
    cell: Cell,
    weights: CellWeights[Array],
    options: BranchOptions,
    *,
    dropout_keep: NDArray[np.bool_] | None = None,
    dropout_rate: float = DROPOUT_RATE,
) -> Array:
    """features: (N, C_in, H, W), or one such map for each input -> (N, cell_channels, H, W); dropout_keep as in
    `concat_project`.

    A cell without branches has the channels of all its inputs. Raises ValueError for one that needs more inputs.
    """
    if not cell.branches:
        return batch_norm(_concat(features), weights.norm, training=options.training)
    branches = branch_outputs(features, cell, weights, options)
    return concat_project(
        branches, weights.projection, training=options.training, dropout_keep=dropout_keep, dropout_rate=dropout_rate
    )


def branch_outputs(
    features: Array | Sequence[Array], cell: Cell, weights: CellWeights[Array], options: BranchOptions
) -> list[Array]:
    """The maps of all branches, each (N, branch_channels, H, W)."""
    maps = _inputs(features, cell)
    for i, branch in enumerate(cell.branches):
        maps[i] = apply_operation(maps[branch.input_index], branch.operation, weights.branches[i], options)
    return [maps[i] for i in range(len(cell.branches))]


@overload
def dense_prediction_cell_backward(
    grad_output: Array,
    features: Array,
    cell: Cell,
    weights: CellWeights[Array],
    options: BranchOptions,
    *,
    dropout_keep: NDArray[np.bool_] | None = None,
    dropout_rate: float = DROPOUT_RATE,
) -> tuple[Array, CellWeights[Array]]: ...


@overload
def dense_prediction_cell_backward(
    grad_output: Array,
    features: Sequence[Array],
    cell: Cell,
    weights: CellWeights[Array],
    options: BranchOptions,
    *,
    dropout_keep: NDArray[np.bool_] | None = None,
    dropout_rate: float = DROPOUT_RATE,
) -> tuple[list[Array], CellWeights[Array]]: ...


def dense_prediction_cell_backward(
    grad_output: Array,
    features: Array | Sequence[Array],
    cell: Cell,
    weights: CellWeights[Array],
    options: BranchOptions,
    *,
    dropout_keep: NDArray[np.bool_] | None = None,
    dropout_rate: float = DROPOUT_RATE,
) -> tuple[Array | list[Array], CellWeights[Array]]:
    """Gradients for features, one map or several as they were given, and all weights, given grad_output: (N, cell_channels,
    H, W).
    """
    if not cell.branches:
        concat = _concat(features)
        grad_concat, grad_norm = batch_norm_backward(grad_output, concat, weights.norm, training=options.training)
        boundaries = np.cumsum([each.shape[1] for each in _listed(features)])[:-1]
        return _like(features, np.split(grad_concat, boundaries, axis=1)), CellWeights((), grad_norm)
    branches = branch_outputs(features, cell, weights, options)
    grad_branches, grad_projection = concat_project_backward(
        grad_output,
        branches,
        weights.projection,
        training=options.training,
        dropout_keep=dropout_keep,
        dropout_rate=dropout_rate,
    )
    inputs = _inputs(features, cell)
    maps = inputs | dict(enumerate(branches))
    grads = {i: np.zeros(x.shape) for i, x in inputs.items()} | dict(enumerate(grad_branches))
    grad_weights = []
    for i, branch in reversed(list(enumerate(cell.branches))):  # when branch i is reached, all its readers have added theirs
        grad_input, grad_branch = apply_operation_backward(
            grads[i], maps[branch.input_index], branch.operation, weights.branches[i], options
        )
        grads[branch.input_index] = grads[branch.input_index] + grad_input
        grad_weights.append(grad_branch)
    return _like(features, [grads[i] for i in inputs]), CellWeights(tuple(reversed(grad_weights)), grad_projection)


def _inputs(features: Array | Sequence[Array], cell: Cell) -> dict[int, Array]:
    """The inputs by the index under which branches read them: −1, −2 and so on. Raises ValueError if there are too few."""
    inputs = _listed(features)
    cell.require_inputs(len(inputs))
    return {BACKBONE_FEATURE - k: x for k, x in enumerate(inputs)}


def _listed(features: Array | Sequence[Array]) -> list[Array]:
    return [features] if isinstance(features, np.ndarray) else list(features)


def _concat(features: Array | Sequence[Array]) -> Array:
    return np.concatenate(_listed(features), axis=1)  # (N, channels of all inputs, H, W)


def _like(features: Array | Sequence[Array], gradients: list[Array]) -> Array | list[Array]:
    return gradients[0] if isinstance(features, np.ndarray) else gradients


def apply_operation(x: Array, operation: Operation, weights: BranchWeights[Array], options: BranchOptions) -> Array:
    """One of the 81 operations: (N, C_in, H, W) -> (N, C_out, H, W)."""
    forward, _, arguments = _resolve(operation, options)
    return forward(x, weights, **arguments)


def apply_operation_backward(
    grad_output: Array, x: Array, operation: Operation, weights: BranchWeights[Array], options: BranchOptions
) -> tuple[Array, BranchWeights[Array]]:
    """Gradients for x and the weights of `apply_operation`."""
    _, backward, arguments = _resolve(operation, options)
    gradients: tuple[Array, BranchWeights[Array]] = backward(grad_output, x, weights, **arguments)
    return gradients


def _resolve(operation: Operation, options: BranchOptions) -> tuple[Callable[..., Array], Callable[..., Any], dict[str, Any]]:
    """The operation's function, its gradient, and the keyword arguments of both."""
    arguments: dict[str, Any] = {"training": options.training}
    match operation:
        case Conv1x1():
            return conv1x1, conv1x1_backward, arguments
        case AtrousSeparableConv():
            arguments |= {"rate": operation.rate_times(options.rate_multiplier)}
            return atrous_separable_conv, atrous_separable_conv_backward, arguments
        case PyramidPooling(grid_size):
            arguments |= {"grid_size": grid_size, "variant": options.pooling, "pooling_size": options.pooling_size}
            return pyramid_pooling, pyramid_pooling_backward, arguments
        case _:
            assert_never(operation)
