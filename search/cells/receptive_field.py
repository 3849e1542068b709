"""Which positions of the backbone's feature map one output of a cell depends on, and how much, in two ways.

- Paths, a property of the graph: how many paths lead from a position to the centre output (`structural_receptive_field`).
- Gradient, a property of trained weights: the effective receptive field of Luo et al., "Understanding the Effective Receptive
  Field in Deep Convolutional Neural Networks", NeurIPS 2016 (`effective_receptive_field`). With y the cell's output at the
  centre, 256 numbers, and x(p) the feature at position p,

      field(p) = √ E ‖∂y / ∂x(p)‖²,   the Frobenius norm

  It says how far y moves if only the feature at p is changed a little. The expectation is over which ReLUs are open. How
  often that is follows from the trained batch norm: its output is γz + β, where z has mean 0 and variance 1 over the
  training data, so if z is normal, the ReLU is open with probability Φ(β / |γ|). Each ReLU is drawn independently; no
  data are needed.

Both end at the border of a finite map, like the cell itself.
"""

from typing import assert_never, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fast.dense_prediction_cell import DensePredictionCell
from reference.atrous_separable_conv import SeparableConv, depthwise_conv
from reference.batch_norm import EPS, BatchNorm
from reference.bilinear_resize import bilinear_resize_backward, interpolation_matrix
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.dense_prediction_cell import BranchOptions, BranchWeights, rate_multiplier_for
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import pooling_matrix
from search.cells.reach import Size, size_text

_SAMPLES = 8  # draws of all ReLUs, each with a random direction of the output
_FROZEN = BranchOptions(training=False)


def structural_receptive_field(
    cell: Cell, size: Size, options: BranchOptions = _FROZEN, *, at: tuple[int, int] | None = None
) -> NDArray[np.float64]:
    """How much each input position adds to one output, summed over branches, on a map of (h, w) = `size`: (h, w).

    The output is the centre, or the one in row and column `at`.
    All weights are one, so a value counts the paths from the input position to the output; a path through a pooling
    counts as its share of the mean. Zeros beyond the map's border cut paths, as in the cell. This is the gradient of the
    cell with unit weights and no batch norm or ReLU. Paths from all layers that it reads count, and a cell without branches
    has the one from its own place. Raises ValueError for a size below 1, and for an output that is not on the map.

    >>> cell = Cell.from_json('[{"op": "conv", "kernel": 3, "rate": [1, 2], "input": -1}]')
    >>> structural_receptive_field(cell, (5, 5))
    array([[0., 0., 0., 0., 0.],
           [1., 0., 1., 0., 1.],
           [1., 0., 1., 0., 1.],
           [1., 0., 1., 0., 1.],
           [0., 0., 0., 0., 0.]])
    """
    _check_size(size)
    row, column = centre_of(size) if at is None else at
    if not (0 <= row < size[0] and 0 <= column < size[1]):
        raise ValueError(f"at must be a row and a column of the {size_text(size)} map, got {at}")
    impulse = np.zeros((1, 1, *size))
    impulse[0, 0, row, column] = 1.0
    inputs = range(-cell.num_inputs, 0)
    at_inputs = np.zeros_like(impulse) if cell.branches else impulse
    grads = {**dict.fromkeys(inputs, at_inputs), **dict.fromkeys(range(len(cell.branches)), impulse)}
    for i, branch in reversed(list(enumerate(cell.branches))):  # all readers of branch i come after it
        grads[branch.input_index] = grads[branch.input_index] + _spread(grads[i], branch.operation, options)
    field: NDArray[np.float64] = sum(grads[i][0, 0] for i in inputs)
    return field


def effective_receptive_field(context: DensePredictionCell, size: Size, *, seed: int = 0) -> NDArray[np.float64]:
    """The gradient's field of the centre output on a map of (h, w) = `size`: (h, w), at least 0.

    The expectation is estimated from a few draws of all ReLUs. ‖·‖² is estimated by the squared gradient of the output's
    product with a vector of random signs, which equals it on average. Raises ValueError for a size below 1.
    """
    _check_size(size)
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(size, dtype=torch.float64)
    row, column = centre_of(size)
    with torch.inference_mode(False), torch.enable_grad():
        linear = _Gated(context, generator)
        for _ in range(_SAMPLES):
            x = torch.zeros(1, context.in_channels, *size, requires_grad=True)  # the same gradient at all positions
            signs = torch.randint(0, 2, (context.cell_channels,), generator=generator) * 2.0 - 1.0
            centre = linear(x)[0, :, row, column]
            (gradient,) = torch.autograd.grad(centre @ signs, x)
            squares += gradient[0].double().square().sum(dim=0)
    return (squares / _SAMPLES).sqrt().numpy()


def options_of(context: DensePredictionCell) -> BranchOptions:
    """The module's settings that `structural_receptive_field` needs besides the cell."""
    return BranchOptions(False, rate_multiplier_for(context.output_stride), context.pooling, context.pooling_size)


def centre_of(size: Size) -> tuple[int, int]:
    """Row and column of the centre output; of the two in the middle of an even number, the second."""
    return size[0] // 2, size[1] // 2


def _check_size(size: Size) -> None:
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) of at least 1 each, got {size}")


def _spread(grad_output: NDArray[np.float64], operation: Operation, options: BranchOptions) -> NDArray[np.float64]:
    """The gradient of one operation with unit weights, (1, 1, h, w) to the same."""
    match operation:
        case Conv1x1():
            return grad_output
        case AtrousSeparableConv():  # nine equal taps: convolution and its gradient are the same
            height, width = grad_output.shape[2:]
            rate_h, rate_w = operation.rate_times(options.rate_multiplier)
            within = min(rate_h, height), min(rate_w, width)  # larger ones are out of reach alike, and would be padded for
            return depthwise_conv(grad_output, np.ones((1, 1, 3, 3)), rate=within)
        case PyramidPooling(grid_size):
            rows, columns = _pooling((grad_output.shape[2], grad_output.shape[3]), grid_size, options)
            grad_means = bilinear_resize_backward(grad_output, (rows.shape[0], columns.shape[0]))
            return rows.T @ grad_means @ columns
        case _:
            assert_never(operation)


def _pooling(size: Size, grid_size: tuple[int, int], options: BranchOptions) -> list[NDArray[np.float64]]:
    """The matrices of means along either axis, (out, extent) each."""
    pins = options.pooling_size or (None, None)
    return [
        pooling_matrix(extent, grid, variant=options.pooling, pooling_size=pin)
        for extent, grid, pin in zip(size, grid_size, pins, strict=True)
    ]


class _Gated:
    """The cell in evaluation mode as a linear map: without offsets, and every ReLU open or closed by chance."""

    def __init__(self, context: DensePredictionCell, generator: torch.Generator) -> None:
        self.cell, self.input_channels = context.cell, context.input_channels
        self.options = options_of(context)
        self.weights = context.weights()
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        if not self.cell.branches:
            gamma, _, _, var = map(_plain, self.weights.norm)
            return x * (gamma / (var + EPS).sqrt())[:, None, None]
        maps = {BACKBONE_FEATURE - k: layer for k, layer in enumerate(torch.split(x, list(self.input_channels), dim=1))}
        for i, (branch, weights) in enumerate(zip(self.cell.branches, self.weights.branches, strict=True)):
            maps[i] = self._branch(maps[branch.input_index], branch.operation, weights)
        concat = torch.cat([maps[i] for i in range(len(self.cell.branches))], dim=1)
        return self._pointwise(concat, self.weights.projection)

    def _branch(self, x: Tensor, operation: Operation, weights: BranchWeights[Tensor]) -> Tensor:
        match operation:
            case Conv1x1():
                return self._pointwise(x, cast(ConvNorm[Tensor], weights))
            case AtrousSeparableConv():
                depthwise, pointwise = cast(SeparableConv[Tensor], weights)
                weight, rate = _plain(depthwise.weight), operation.rate_times(self.options.rate_multiplier)
                spread = F.conv2d(x, weight, padding=rate, dilation=rate, groups=x.shape[1])
                return self._pointwise(self._gate(spread, depthwise.norm), pointwise)
            case PyramidPooling(grid_size):
                return self._pyramid_pooling(x, grid_size, cast(ConvNorm[Tensor], weights))
            case _:
                assert_never(operation)

    def _pyramid_pooling(self, x: Tensor, grid_size: tuple[int, int], weights: ConvNorm[Tensor]) -> Tensor:
        size = (x.shape[2], x.shape[3])
        rows, columns = (torch.from_numpy(matrix).float() for matrix in _pooling(size, grid_size, self.options))
        means = self._pointwise(rows @ x @ columns.T, weights)
        up, across = (torch.from_numpy(interpolation_matrix(means.shape[2 + axis], size[axis])).float() for axis in (0, 1))
        resized: Tensor = up @ means @ across.T
        return resized

    def _pointwise(self, x: Tensor, weights: ConvNorm[Tensor]) -> Tensor:
        return self._gate(F.conv2d(x, _plain(weights.weight)), weights.norm)

    def _gate(self, x: Tensor, norm: BatchNorm[Tensor]) -> Tensor:
        gamma, beta, _, var = map(_plain, norm)
        probability = torch.special.ndtr(beta / gamma.abs().clamp_min(1e-20))  # a channel whose γ is 0 passes nothing on
        is_open = torch.rand(x.shape, generator=self.generator) < probability[:, None, None]
        gated: Tensor = x * (gamma / (var + EPS).sqrt())[:, None, None] * is_open
        return gated


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float()
