"""The Dense Prediction Cell as a PyTorch module; `reference/dense_prediction_cell.py` defines what it computes."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias, assert_never, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fast.batch_norm import live, live_batch_norm
from fast.conv_norm import NormLayer, conv_norm, conv_norm_relu, conv_weights, live_conv, new_norm, normed
from fast.fusion import check_traceable, fuses, refuse_script
from fast.hub import HubModule
from fast.kernels import NormedMap, operations_for, value
from fast.pyramid_pooling import pool
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.concat_project import DROPOUT_RATE
from reference.dense_prediction_cell import CellWeights, rate_multiplier_for
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant


class DensePredictionCell(HubModule):
    """A cell with weights: features (N, in_channels, H, W) -> (N, cell_channels, H, W), any H and W from 1 up.

    For several layers of a backbone `in_channels` are the channels of each, which follow each other in the features: a branch
    with input −1 reads the first, with −2 the second, and so on. `input_channels` keeps them, and the attribute `in_channels`
    is their sum. A cell without branches is `norm`, the batch norm of all features, and `cell_channels` is then `in_channels`.

    Rates are as searched at output stride 16 and double at 8 (`output_stride`). `pooling` and `pooling_size` are those of
    `reference/pyramid_pooling.py`. Initial weights follow the authors (research/deeplab/core/dense_prediction_cell.py).
    `norm_layer` makes the norm of each convolution from its channels: `nn.BatchNorm2d` with PyTorch's momentum,
    `fast.batch_norm.authors_norm` with the authors', or any other. Submodules may be hooked, replaced and frozen as in any
    module; they are then called one by one, and `fast.explain(cell, features)` says so. Raises ValueError for an argument that
    no forward pass could use, naming it and its value.

    >>> from reference.cell import Cell
    >>> cell = Cell.from_json('[{"op": "conv", "kernel": 3, "rate": [1, 6], "input": -1}]')
    >>> DensePredictionCell(cell, in_channels=320)(torch.zeros(2, 320, 33, 33)).shape
    torch.Size([2, 256, 33, 33])
    """

    def __init__(
        self,
        cell: Cell,
        in_channels: int | Sequence[int],
        *,
        branch_channels: int = 256,
        cell_channels: int = 256,
        output_stride: int = 16,
        dropout_rate: float = DROPOUT_RATE,
        pooling: PoolingVariant = "sliding_window",
        pooling_size: tuple[int, int] | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"cell must be a Cell, as Cell.load and Cell.from_json give, got {cell!r}")
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be at least 0 and below 1, got {dropout_rate}")
        self.input_channels = tuple(in_channels) if isinstance(in_channels, Sequence) else (in_channels,)
        for channels in self.input_channels or (0,):
            _check_channels(in_channels=channels)
        _check_channels(branch_channels=branch_channels, cell_channels=cell_channels)
        _check_pooling(pooling, pooling_size)
        self.cell = cell
        self.in_channels, self.branch_channels = sum(self.input_channels), branch_channels
        self.cell_channels = cell_channels if cell.branches else self.in_channels
        self.output_stride = output_stride
        self.pooling: PoolingVariant = pooling
        self.pooling_size = pooling_size
        inputs = [branch.input_index for branch in cell.branches]
        self._readers = Counter(inputs + list(range(len(inputs))))  # of each map: branches, and the projection of all branches
        multiplier = rate_multiplier_for(output_stride)
        self.branches = nn.ModuleList()
        channels_read = cell.channels_read(self.input_channels, branch_channels)
        for branch, channels in zip(cell.branches, channels_read, strict=True):
            self.branches.append(
                _branch(branch.operation, channels, branch_channels, multiplier, pooling, pooling_size, norm_layer)
            )
        self.dropout = nn.Dropout(dropout_rate)  # of what is projected
        if cell.branches:
            self.projection = conv_norm(len(cell.branches) * branch_channels, cell_channels, norm_layer)
        else:
            self.norm = new_norm(norm_layer, self.in_channels)

    __prepare_scriptable__ = refuse_script

    def forward(self, features: Tensor) -> Tensor:
        check_traceable(features)
        self._check_shape(features)
        if fuses(features, self._modules):
            return value(self.lazy(features))
        if not self.cell.branches:
            return normed(features, self.norm)
        maps = self._inputs(features)
        for i, (branch, module) in enumerate(zip(self.cell.branches, self.branches, strict=True)):
            maps[i] = module(maps[branch.input_index])
        return conv_norm_relu(self.dropout(torch.cat([maps[i] for i in range(len(self.branches))], dim=1)), self.projection)

    def lazy(self, features: Tensor) -> NormedMap:
        """The output of the submodules, fused, with its norm not yet applied, for callers that apply it on load."""
        self._check_shape(features)
        if not self.cell.branches:
            norm = live(self.norm)  # half precision would lose its small gradients
            return NormedMap(live_batch_norm(features.to(norm.tensors.scale.dtype), norm))
        operations = operations_for(features)
        maps = {}  # each as often as it is read
        for i, x in self._inputs(features).items():
            if readers := self._readers[i]:
                dense = operations.dense(NormedMap(x))  # here once, not in every branch that reads it
                maps[i] = operations.fan_out(dense, readers)
        for i, (branch, module) in enumerate(zip(self.cell.branches, self.branches, strict=True)):
            maps[i] = operations.fan_out(cast(_BranchModule, module).lazy(maps[branch.input_index].pop()), self._readers[i])
        dropout_rate = self.dropout.p if self.dropout.training else 0.0
        branches = [maps[i].pop() for i in range(len(self.branches))]
        return operations.pointwise_conv(branches, *live_conv(self.projection), dropout_rate=dropout_rate)

    def pin_pooling(self, pooling_size: tuple[int, int] | None) -> None:
        """Change `pooling_size`: the windows of pyramid pooling are those of a map of this size, or with None of each map."""
        _check_pooling(self.pooling, pooling_size)
        self.pooling_size = pooling_size
        for branch in self.branches:
            if isinstance(branch, _PoolingBranch):
                branch.pooling["pooling_size"] = pooling_size

    def weights(self) -> CellWeights[Tensor]:
        """The live parameters and statistics, in the reference's containers."""
        branches = (cast(_BranchModule, branch) for branch in self.branches)
        output = conv_weights(self.projection) if self.cell.branches else live(self.norm).tensors
        return CellWeights(tuple(branch.weights() for branch in branches), output)

    def _inputs(self, features: Tensor) -> dict[int, Tensor]:
        """The layers in the features by the index under which branches read them: −1, −2 and so on."""
        several = len(self.input_channels) > 1
        layers = torch.split(features, list(self.input_channels), dim=1) if several else (features,)
        return {BACKBONE_FEATURE - k: layer for k, layer in enumerate(layers)}

    def _check_shape(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise ValueError(f"cell needs features: (N, {self.in_channels}, H, W), got {tuple(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"cell needs features of floating point, got {features.dtype}")

    def extra_repr(self) -> str:
        return f"{self.cell}, output_stride={self.output_stride}"


def decays(module: nn.Module) -> dict[str, bool]:
    """Names of all parameters, each with whether it decays: all but depthwise weights, norms and biases (deeplab).

    Nor does what else is no weight of a layer, such as the position embeddings of a transformer.
    """
    exempt = set[str]()
    for name, child in module.named_modules():
        match child:
            case SeparableBranch():
                exempt.add(f"{name}.depthwise".removeprefix("."))
            case nn.Conv2d() | DensePredictionCell():
                exempt.add(f"{name}.norm".removeprefix("."))  # of any kind; not every one has a norm
        if isinstance(child, nn.Conv2d) and 1 < child.groups == child.in_channels:  # a backbone's depthwise
            exempt.add(name)
    return {
        name: name.endswith("weight") and parameter.ndim > 1 and name.rpartition(".")[0] not in exempt
        for name, parameter in module.named_parameters()
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


class _Conv1x1Branch(nn.Module):
    def __init__(self, in_channels: int, channels: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.pointwise = conv_norm(in_channels, channels, norm_layer)

    def weights(self) -> ConvNorm[Tensor]:
        return conv_weights(self.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x, self._modules):
            return value(self.lazy(NormedMap(x)))
        return conv_norm_relu(x, self.pointwise)

    def lazy(self, x: NormedMap) -> NormedMap:
        return operations_for(x.raw).pointwise_conv([x], *live_conv(self.pointwise))


class _PoolingBranch(nn.Module):
    def __init__(self, in_channels: int, channels: int, norm_layer: NormLayer, **pooling: Any) -> None:
        super().__init__()
        self.pointwise = conv_norm(in_channels, channels, norm_layer)
        self.pooling = pooling

    def weights(self) -> ConvNorm[Tensor]:
        return conv_weights(self.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x, self._modules):
            return value(self.lazy(NormedMap(x)))
        operations = operations_for(x)
        means = operations.pooling_means(NormedMap(x), **self.pooling)
        return operations.resize(NormedMap(conv_norm_relu(means, self.pointwise)), (x.shape[2], x.shape[3]))

    def lazy(self, x: NormedMap) -> NormedMap:
        return NormedMap(pool(x, live_conv(self.pointwise), **self.pooling))


class SeparableBranch(nn.Module):
    """An atrous separable convolution at a fixed rate: (N, in_channels, H, W) -> (N, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, rate: tuple[int, int], norm_layer: NormLayer) -> None:
        super().__init__()
        self.depthwise = conv_norm(in_channels, in_channels, norm_layer, rate=rate, truncated_normal_std=0.33)
        self.pointwise = conv_norm(in_channels, channels, norm_layer, truncated_normal_std=0.06)

    def weights(self) -> SeparableConv[Tensor]:
        return SeparableConv(conv_weights(self.depthwise), conv_weights(self.pointwise))

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x, self._modules):
            return value(self.lazy(NormedMap(x)))
        return conv_norm_relu(conv_norm_relu(x, self.depthwise), self.pointwise)

    def lazy(self, x: NormedMap) -> NormedMap:
        """The same of a map whose norm may not yet be applied, fused."""
        convs = live_conv(self.depthwise), live_conv(self.pointwise)
        rate = cast(tuple[int, int], self.depthwise.dilation)
        return operations_for(x.raw).separable_conv(x, *convs, rate=rate)


_BranchModule: TypeAlias = _Conv1x1Branch | _PoolingBranch | SeparableBranch


def _branch(
    operation: Operation,
    in_channels: int,
    channels: int,
    multiplier: int,
    variant: PoolingVariant,
    pooling_size: tuple[int, int] | None,
    norm_layer: NormLayer,
) -> _BranchModule:
    match operation:
        case Conv1x1():
            return _Conv1x1Branch(in_channels, channels, norm_layer)
        case AtrousSeparableConv():
            return SeparableBranch(in_channels, channels, operation.rate_times(multiplier), norm_layer)
        case PyramidPooling(grid_size):
            pooling = {"grid_size": grid_size, "variant": variant, "pooling_size": pooling_size}
            return _PoolingBranch(in_channels, channels, norm_layer, **pooling)
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
