"""The Dense Prediction Cell as a PyTorch module; `reference/dense_prediction_cell.py` defines what it computes."""

from collections import Counter
from itertools import chain
from typing import Any, TypeAlias, assert_never, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fast.batch_norm import MOMENTUM, live
from fast.hub import HubModule
from fast.kernels import LiveConv, NormedMap, operations_for, value
from fast.pyramid_pooling import pool
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import EPS, Array, BatchNorm
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.concat_project import DROPOUT_RATE
from reference.dense_prediction_cell import CellWeights, rate_multiplier_for
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant


class DensePredictionCell(HubModule):
    """A cell with weights: features (N, in_channels, H, W) -> (N, cell_channels, H, W), any H and W from 1 up.

    Rates are as searched at output stride 16 and double at 8 (`output_stride`). `pooling` and `pooling_size` are those of
    `reference/pyramid_pooling.py`. Initial weights follow the authors (research/deeplab/core/dense_prediction_cell.py).
    Raises ValueError for an argument that no forward pass could use, naming it and its value.

    >>> from reference.cell import Cell
    >>> cell = Cell.from_json('[{"op": "conv", "kernel": 3, "rate": [1, 6], "input": -1}]')
    >>> DensePredictionCell(cell, in_channels=320)(torch.zeros(2, 320, 33, 33)).shape
    torch.Size([2, 256, 33, 33])
    """

    def __init__(
        self,
        cell: Cell,
        in_channels: int,
        *,
        branch_channels: int = 256,
        cell_channels: int = 256,
        output_stride: int = 16,
        dropout_rate: float = DROPOUT_RATE,
        pooling: PoolingVariant = "sliding_window",
        pooling_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be at least 0 and below 1, got {dropout_rate}")
        _check_channels(in_channels=in_channels, branch_channels=branch_channels, cell_channels=cell_channels)
        _check_pooling(pooling, pooling_size)
        self.cell = cell
        self.in_channels, self.branch_channels, self.cell_channels = in_channels, branch_channels, cell_channels
        self.output_stride = output_stride
        self.pooling: PoolingVariant = pooling
        self.pooling_size = pooling_size
        inputs = [branch.input_index for branch in cell.branches]
        self._readers = Counter(inputs + list(range(len(inputs))))  # of each map: branches, and the projection of all branches
        multiplier = rate_multiplier_for(output_stride)
        self.branches = nn.ModuleList()
        for branch in cell.branches:
            channels = in_channels if branch.input_index == BACKBONE_FEATURE else branch_channels
            self.branches.append(_branch(branch.operation, channels, branch_channels, multiplier, pooling, pooling_size))
        self.dropout = nn.Dropout(dropout_rate)
        self.projection = ConvNormLayer((cell_channels, len(cell.branches) * branch_channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return value(self.lazy(features))

    def lazy(self, features: Tensor) -> NormedMap:
        """The output with its norm not yet applied, for callers that apply it on load."""
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise ValueError(f"cell needs features: (N, {self.in_channels}, H, W), got {tuple(features.shape)}")
        operations = operations_for(features)
        x = operations.dense(NormedMap(features))  # here once, not in every branch that reads it
        maps = {BACKBONE_FEATURE: operations.fan_out(x, self._readers[BACKBONE_FEATURE])}  # each as often as it is read
        for i, (branch, module) in enumerate(zip(self.cell.branches, self.branches, strict=True)):
            maps[i] = operations.fan_out(module(maps[branch.input_index].pop()), self._readers[i])
        dropout_rate = self.dropout.p if self.dropout.training else 0.0
        branches = [maps[i].pop() for i in range(len(self.branches))]
        return operations.pointwise_conv(branches, *self.projection.live(), dropout_rate=dropout_rate)

    def weights(self) -> CellWeights[Tensor]:
        """The live parameters and statistics, in the reference's containers."""
        branches = (cast(_BranchModule, branch) for branch in self.branches)
        return CellWeights(tuple(branch.weights() for branch in branches), self.projection.weights())

    def extra_repr(self) -> str:
        return f"{self.cell}, output_stride={self.output_stride}"


def decays(module: nn.Module) -> dict[str, bool]:
    """Names of all parameters, each with whether it decays: all but depthwise weights, batch norms and biases (deeplab)."""
    exempt = {name for name, child in module.named_modules() if isinstance(child, nn.BatchNorm2d)}
    exempt |= {f"{name}.depthwise" for name, child in module.named_modules() if isinstance(child, SeparableBranch)}
    convolutions = {name: child for name, child in module.named_modules() if isinstance(child, nn.Conv2d)}
    exempt |= {name for name, conv in convolutions.items() if 1 < conv.groups == conv.in_channels}  # a backbone's depthwise
    return {
        name: not name.endswith(".bias") and name.rpartition(".")[0] not in exempt for name, _ in module.named_parameters()
    }


def reference_weights(module: DensePredictionCell) -> CellWeights[Array]:
    """The module's weights as the containers of float64 arrays that `reference.dense_prediction_cell` takes."""
    weights: CellWeights[Array] = _to_numpy(module.weights())
    return weights


def load_reference_weights(module: DensePredictionCell, weights: CellWeights[Array]) -> None:
    """Copy the reference's arrays into the module, in place."""
    with torch.no_grad():
        for tensor, array in zip(_leaves(module.weights()), _leaves(weights), strict=True):
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))


class ConvNormLayer(nn.Module):
    """Holds the weights of a convolution and of its batch norm; the functions of `fast/` compute."""

    def __init__(self, shape: tuple[int, int, int, int], truncated_normal_std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        if truncated_normal_std is None:
            nn.init.xavier_uniform_(self.weight)
        else:  # TensorFlow truncates at two standard deviations
            std = truncated_normal_std
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        self.norm = nn.BatchNorm2d(shape[0], eps=EPS, momentum=MOMENTUM)

    def weights(self) -> ConvNorm[Tensor]:
        mean, var = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)  # always tracked
        return ConvNorm(self.weight, BatchNorm(self.norm.weight, self.norm.bias, mean, var))

    def live(self) -> LiveConv:
        """The weights with the norm's own mode: it can be frozen while the rest trains, or the other way round."""
        return LiveConv(self.weight, live(self.norm))


class _Conv1x1Branch(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.pointwise = ConvNormLayer((channels, in_channels, 1, 1))

    def weights(self) -> ConvNorm[Tensor]:
        return self.pointwise.weights()

    def forward(self, x: NormedMap) -> NormedMap:
        return operations_for(x.raw).pointwise_conv([x], *self.pointwise.live())


class _PoolingBranch(_Conv1x1Branch):
    def __init__(self, in_channels: int, channels: int, **pooling: Any) -> None:
        super().__init__(in_channels, channels)
        self.pooling = pooling

    def forward(self, x: NormedMap) -> NormedMap:
        return NormedMap(pool(x, self.pointwise.live(), **self.pooling))


class SeparableBranch(nn.Module):
    """Holds the weights of an atrous separable convolution at a fixed rate."""

    def __init__(self, in_channels: int, channels: int, rate: tuple[int, int]) -> None:
        super().__init__()
        self.rate = rate
        self.depthwise = ConvNormLayer((in_channels, 1, 3, 3), truncated_normal_std=0.33)
        self.pointwise = ConvNormLayer((channels, in_channels, 1, 1), truncated_normal_std=0.06)

    def weights(self) -> SeparableConv[Tensor]:
        return SeparableConv(self.depthwise.weights(), self.pointwise.weights())

    def forward(self, x: NormedMap) -> NormedMap:
        return operations_for(x.raw).separable_conv(x, self.depthwise.live(), self.pointwise.live(), rate=self.rate)


_BranchModule: TypeAlias = _Conv1x1Branch | _PoolingBranch | SeparableBranch


def _branch(
    operation: Operation,
    in_channels: int,
    channels: int,
    multiplier: int,
    variant: PoolingVariant,
    pooling_size: tuple[int, int] | None,
) -> _BranchModule:
    match operation:
        case Conv1x1():
            return _Conv1x1Branch(in_channels, channels)
        case AtrousSeparableConv():
            return SeparableBranch(in_channels, channels, operation.rate_times(multiplier))
        case PyramidPooling(grid_size):
            return _PoolingBranch(in_channels, channels, grid_size=grid_size, variant=variant, pooling_size=pooling_size)
        case _:
            assert_never(operation)


def _check_channels(**channels: int) -> None:
    for name, count in channels.items():
        if not _is_count(count):
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")


def _check_pooling(variant: PoolingVariant, pooling_size: tuple[int, int] | None) -> None:
    if variant not in get_args(PoolingVariant):
        raise ValueError(f"pooling must be one of {', '.join(get_args(PoolingVariant))}, got {variant!r}")
    if pooling_size is None:
        return
    if variant != "sliding_window":
        raise ValueError(f"pooling_size pins a sliding window, which {variant} has not: it must be None, got {pooling_size!r}")
    pair = isinstance(pooling_size, tuple) and len(pooling_size) == 2
    if not pair or not all(map(_is_count, pooling_size)):
        raise ValueError(f"pooling_size must be (height, width), two integers of at least 1, or None, got {pooling_size!r}")


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _to_numpy(weights: Any) -> Any:
    if isinstance(weights, Tensor):
        return weights.detach().cpu().double().numpy()
    arrays = map(_to_numpy, weights)
    return type(weights)(*arrays) if hasattr(weights, "_fields") else tuple(arrays)  # a named tuple, or the branches


def _leaves(weights: Any) -> list[Any]:
    return list(chain.from_iterable(map(_leaves, weights))) if isinstance(weights, tuple) else [weights]
