"""The least cost of a case: bytes that must move (each input read once, each output written once), and operations.

Operations are those of convolutions, two for a multiply-add, as PyTorch's own counter has them; the loss is counted by hand.
Training is one forward and one backward pass: a convolution's product is repeated for the gradient of its weight, and for
that of its input if it is needed. Parameters are float32, for maps of any dtype.

A cell costs the sum of its operations, because each ends in a batch norm, whose statistics in training need the whole map.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, Operation, PyramidPooling
from search.cells.cost import cell_cost as count_cell

Mode = Literal["inference", "training", "storage"]
_PARAMETER_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Bytes read from and written to memory, and floating point operations."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class MapSize:
    """The maps of an operation, (batch, channels, height, width), and the bytes of an element."""

    batch: int
    height: int
    width: int
    element_bytes: int

    @property
    def positions(self) -> int:
        return self.batch * self.height * self.width


def _bytes(size: MapSize, in_channels: int, channels: int, weights: int, mode: Mode, *, need_input: bool) -> int:
    """Bytes of x -> y with `weights` parameters; in training also those of the backward pass."""
    x, y = (size.positions * c * size.element_bytes for c in (in_channels, channels))
    parameters = weights * _PARAMETER_BYTES
    forward = x + y + parameters
    return forward if mode == "inference" else forward + y + x + parameters + parameters + (x if need_input else 0)


def conv_cost(size: MapSize, in_channels: int, channels: int, weights: int, mode: Mode) -> Cost:
    """A convolution of stride 1 with so many weights, whose input has a gradient."""
    moved = _bytes(size, in_channels, channels, weights, mode, need_input=True)
    return Cost(moved, 2 * weights * size.positions * (3 if mode == "training" else 1))


def pointwise_cost(size: MapSize, in_channels: int, channels: int, mode: Mode) -> Cost:
    """A 1×1 convolution."""
    return conv_cost(size, in_channels, channels, in_channels * channels, mode)


def depthwise_cost(size: MapSize, channels: int, mode: Mode) -> Cost:
    """The dilated 3×3 convolution alone."""
    return conv_cost(size, channels, channels, 9 * channels, mode)


def operation_cost(
    operation: Operation, size: MapSize, in_channels: int, channels: int, mode: Mode, *, need_input: bool = True
) -> Cost:
    """One of the 81 operations, as one pass: what lies between its convolutions need not reach the memory."""
    alone, map_size = Cell((Branch(BACKBONE_FEATURE, operation),)), (size.height, size.width)
    (counted,) = count_cell(alone, in_channels, map_size, branch_channels=channels).branches  # for one image
    forward = 2 * size.batch * counted.multiply_adds
    match operation:
        case Conv1x1() | PyramidPooling():
            first = forward
        case AtrousSeparableConv():
            first = depthwise_cost(size, in_channels, "inference").flops
        case _:
            assert_never(operation)
    # Only the first convolution's input may be without a gradient: the way back to its weight leads through the others.
    backward = 0 if mode == "inference" else 2 * forward if need_input else 2 * forward - first
    return Cost(_bytes(size, in_channels, channels, counted.parameters, mode, need_input=need_input), forward + backward)


def cell_cost(cell: Cell, size: MapSize, in_channels: int, channels: int, mode: Mode) -> Cost:
    """All branches and the projection; the backbone's features need no gradient."""
    total = pointwise_cost(size, len(cell.branches) * channels, channels, mode)
    for branch in cell.branches:
        from_backbone = branch.input_index == BACKBONE_FEATURE
        incoming = in_channels if from_backbone else channels
        total += operation_cost(branch.operation, size, incoming, channels, mode, need_input=not from_backbone)
    return total


def loss_cost(size: MapSize, num_classes: int, label_size: tuple[int, int], mode: Mode) -> Cost:
    """Training: the loss and the gradient of the small logits; inference: the confusion matrix.

    Per pixel and class: a linear interpolation (2) and a maximum (1). For the loss also a difference, an exponential and a
    sum, and in the backward pass a product and the interpolation's transpose (2): nine.
    """
    pixels = size.batch * label_size[0] * label_size[1]
    logits = size.positions * num_classes * size.element_bytes
    if mode == "inference":
        return Cost(logits + pixels + 8 * num_classes**2, 3 * num_classes * pixels)
    return Cost(2 * logits + pixels, 9 * num_classes * pixels)


def sgd_cost(parameters: int) -> Cost:
    """SGD with momentum reads parameter, gradient and momentum, and writes parameter and momentum."""
    return Cost(5 * _PARAMETER_BYTES * parameters, 6 * parameters)
