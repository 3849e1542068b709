"""The cases to measure. A case has its inputs, its cost, its truth from `reference/`, and each provider's workload."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, assert_never, cast

import numpy as np
import torch
from torch import Tensor, nn

from bench.costs import Cost, MapSize, Mode, cell_cost, depthwise_cost, loss_cost, operation_cost
from bench.plain_torch import (
    PlainCell,
    UpsampledConfusion,
    UpsampledLoss,
    operation_module,
    randomise,
)
from fast import kernels
from fast.atrous_separable_conv import atrous_separable_conv, depthwise_conv
from fast.dense_prediction_cell import DensePredictionCell, load_reference_weights
from fast.mean_iou import upsampled_confusion_matrix
from fast.pointwise_conv import conv1x1
from fast.pyramid_pooling import pyramid_pooling
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.atrous_separable_conv import SeparableConv
from reference.atrous_separable_conv import depthwise_conv as reference_depthwise_conv
from reference.atrous_separable_conv import depthwise_conv_backward as reference_depthwise_conv_backward
from reference.batch_norm import Array, BatchNorm
from reference.bilinear_resize import bilinear_resize
from reference.cell import AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.concat_project import DROPOUT_RATE
from reference.dense_prediction_cell import (
    BranchOptions,
    apply_operation,
    apply_operation_backward,
    dense_prediction_cell,
    dense_prediction_cell_backward,
)
from reference.mean_iou import confusion_matrix
from reference.pointwise_conv import ConvNorm
from reference.upsampled_cross_entropy import (
    IGNORE_INDEX,
    upsampled_cross_entropy_backward,
)
from reference.upsampled_cross_entropy import (
    upsampled_cross_entropy as reference_upsampled_cross_entropy,
)

Suite = Literal["proxy", "loss", "search", "cell", "ops"]
SUITES: tuple[Suite, ...] = ("proxy", "loss", "search", "cell", "ops")  # most important first, longest last

DType = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Parts = dict[str, list[Tensor]]  # the results of a call by kind: "output", "gradients", ...
Truth = dict[str, list[Array]]

SEED = 1809_04184  # the paper's number at arXiv


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: ours, or one of PyTorch's."""

    name: str
    channels_last: bool = False
    compile_mode: str | None = None  # of torch.compile
    is_ours: bool = False
    uses_kernels: bool = True  # ours only

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """Memory format of the maps: for torch.compile the one that suits the device, for ours that of its kernels."""
        if self.is_ours:
            backend = kernels.backend_for(torch.empty(1, device=device)) if self.uses_kernels else None
            return torch.contiguous_format if backend is None else backend.memory_format
        wide = self.channels_last or (self.compile_mode is not None and device.type == "cuda")
        return torch.channels_last if wide else torch.contiguous_format


OURS = Provider("ours", is_ours=True)
OURS_WITHOUT_KERNELS = Provider("ours without kernels", is_ours=True, uses_kernels=False)
EAGER = Provider("eager")
EAGER_CHANNELS_LAST = Provider("eager channels-last", channels_last=True)
COMPILE = Provider("torch.compile", compile_mode="default")
COMPILE_MAX = Provider("torch.compile max-autotune", compile_mode="max-autotune")
PROVIDERS = (OURS, EAGER, EAGER_CHANNELS_LAST, COMPILE, COMPILE_MAX)


class Workload(ABC):
    """One provider's computation of one case: call it to compute, then read its results."""

    @abstractmethod
    def __call__(self) -> None: ...

    @abstractmethod
    def parts(self) -> Parts:
        """The results of the last call, by kind."""

    def drop(self) -> None:  # noqa: B027  # most have nothing to release
        """Release the results of the last call, so that memory can be measured from here."""


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """Something that every provider computes from the same inputs."""

    suite: Suite
    name: str
    mode: Mode

    launches_count: bool = True
    """On a GPU: whether the time that a user waits is measured, with launches, instead of the device's busy time."""
    repeats: bool = False
    """Whether a long run consists of many such calls, one after the other."""

    @property
    @abstractmethod
    def shape(self) -> str: ...

    @abstractmethod
    def cost(self, element_bytes: int) -> Cost | None:
        """The counted cost; None if no lower limit is stated."""

    def without_chance(self) -> Self | None:
        """The same case without dropout and crops, so that all providers compute the same numbers; None if impossible."""
        return self

    @abstractmethod
    def small(self) -> Self:
        """The same case without randomness, at a size that the reference computes quickly."""

    @abstractmethod
    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        """A provider's workload; all have the same inputs and weights."""

    @abstractmethod
    def truth(self, dtype: str) -> Truth:
        """The expected `workload(...).parts()`, in float64, for inputs that `dtype` represents exactly."""


class ModuleWorkload(Workload):
    """Forward pass of a module, and in training the backward pass."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        weights: Callable[[], Any],
        case: Case,
        provider: Provider,
        dtype: str,
        *,
        needs_input_gradient: bool = True,
    ) -> None:
        self._is_training = case.mode == "training"
        self._provider, self._dtype, self._device = provider, dtype, inputs[0].device
        memory_format = provider.memory_format(self._device)
        self._module = module.to(self._device).train(self._is_training)
        if not provider.is_ours and memory_format == torch.channels_last:
            self._module = self._module.to(memory_format=memory_format)
        first = inputs[0].to(memory_format=memory_format).requires_grad_(self._is_training and needs_input_gradient)
        self._inputs = (first, *inputs[1:])
        self._weights = weights
        mode = provider.compile_mode
        self._function = torch.compile(self._module, mode=mode, dynamic=False) if mode else self._module
        self._output: Tensor | None = None
        self._cotangent: Tensor | None = None

    def __call__(self) -> None:
        if self._provider.compile_mode:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        self.drop()
        with ExitStack() as stack:
            for context in contexts(self._provider, self._dtype, self._device):
                stack.enter_context(context)
            if not self._is_training:
                stack.enter_context(torch.inference_mode())
            output = self._function(*self._inputs)
        if self._is_training:
            if self._cotangent is None:  # in the memory layout of the tensor that it is the gradient of
                drawn = normal(tuple(output.shape), SEED + 1, self._device).to(output.dtype)
                self._cotangent = torch.empty_like(output.detach()).copy_(drawn)
            output.backward(self._cotangent)
        self._output = output.detach()

    def parts(self) -> Parts:
        assert self._output is not None, "called first"
        if not self._is_training:
            return {"output": [self._output]}
        leaves = [*(tensor for tensor in self._inputs if tensor.requires_grad), *trainable(self._weights())]
        return {"output": [self._output], "gradients": [_gradient(leaf) for leaf in leaves]}

    def drop(self) -> None:
        self._output = None
        self._module.zero_grad(set_to_none=True)
        for tensor in self._inputs:
            tensor.grad = None


def contexts(provider: Provider, dtype: str, device: torch.device) -> list[AbstractContextManager[Any]]:
    """Contexts for a provider: autocast below float32, and no kernels of ours for the others."""
    entered: list[AbstractContextManager[Any]] = []
    if dtype != "float32":
        entered.append(torch.autocast(device.type, DTYPES[dtype]))
    if provider.is_ours and not provider.uses_kernels:
        entered.append(kernels.using(None))
    return entered


class OursFromWeights(nn.Module):
    """A function of `fast/` that computes with the parameters of the baseline's module."""

    def __init__(self, owner: nn.Module, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.owner = owner
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.owner)


@dataclass(frozen=True, kw_only=True)
class MapCase(Case):
    """A case whose input is a map (batch, in_channels, height, width)."""

    batch: int
    in_channels: int
    channels: int
    height: int
    width: int

    @property
    def shape(self) -> str:
        return f"{self.batch}×{self.in_channels}×{self.height}×{self.width}"

    def size(self, element_bytes: int) -> MapSize:
        """The map's size, as the cost functions take it."""
        return MapSize(self.batch, self.height, self.width, element_bytes)

    def small(self) -> Self:
        # At 25 × 27, taps of the largest rate, 21, still fall inside the map along both axes.
        return replace(self, batch=2, in_channels=20, channels=16, height=25, width=27)

    def features(self, dtype: str, device: torch.device | None = None) -> Tensor:
        """The input, (batch, in_channels, height, width)."""
        drawn = normal((self.batch, self.in_channels, self.height, self.width), SEED, device)
        return drawn.to(DTYPES[dtype])

    def cotangent(self, dtype: str) -> Array:
        """The gradient of the output, as the workload draws it."""
        return array(normal((self.batch, self.channels, self.height, self.width), SEED + 1).to(DTYPES[dtype]))


@dataclass(frozen=True, kw_only=True)
class OperationCase(MapCase):
    """One of the 81 operations."""

    operation: Operation
    launches_count: bool = False

    def cost(self, element_bytes: int) -> Cost:
        return operation_cost(self.operation, self.size(element_bytes), self.in_channels, self.channels, self.mode)

    def plain(self) -> nn.Module:
        module = operation_module(self.operation, self.in_channels, self.channels)
        randomise(module, SEED)
        return module

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        plain = cast(Any, self.plain())
        module = OursFromWeights(plain, self._ours) if provider.is_ours else plain
        return ModuleWorkload(module, [self.features(dtype, device)], plain.weights, self, provider, dtype)

    def _ours(self, x: Tensor, owner: nn.Module) -> Tensor:
        weights, training = cast(Any, owner).weights(), self.mode == "training"
        match self.operation:
            case Conv1x1():
                return conv1x1(x, weights, training=training)
            case AtrousSeparableConv(rate):
                return atrous_separable_conv(x, weights, rate=rate, training=training)
            case PyramidPooling(grid_size):
                return pyramid_pooling(x, weights, grid_size=grid_size, training=training)
            case _:
                assert_never(self.operation)

    def truth(self, dtype: str) -> Truth:
        x, weights = array(self.features(dtype)), arrays(cast(Any, self.plain()).weights())
        options = BranchOptions(training=self.mode == "training")
        output = apply_operation(x, self.operation, weights, options)
        if not options.training:
            return {"output": [output]}
        cotangent = self.cotangent(dtype)
        grad_x, grad_weights = apply_operation_backward(cotangent, x, self.operation, weights, options)
        return {"output": [output], "gradients": [grad_x, *trainable(grad_weights)]}


@dataclass(frozen=True, kw_only=True)
class DepthwiseCase(MapCase):
    """The dilated depthwise convolution alone."""

    rate: tuple[int, int]
    launches_count: bool = False

    def small(self) -> Self:
        small = super().small()
        return replace(small, channels=small.in_channels)

    def cost(self, element_bytes: int) -> Cost:
        return depthwise_cost(self.size(element_bytes), self.channels, self.mode)

    def plain(self) -> nn.Conv2d:
        conv = nn.Conv2d(
            self.channels, self.channels, 3, padding=self.rate, dilation=self.rate, groups=self.channels, bias=False
        )
        randomise(conv, SEED)
        return conv

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        plain = self.plain()
        module = OursFromWeights(plain, self._ours) if provider.is_ours else plain
        return ModuleWorkload(module, [self.features(dtype, device)], lambda: (plain.weight,), self, provider, dtype)

    def _ours(self, x: Tensor, owner: nn.Module) -> Tensor:
        return depthwise_conv(x, cast(nn.Conv2d, owner).weight, rate=self.rate)

    def truth(self, dtype: str) -> Truth:
        x, weight = array(self.features(dtype)), array(self.plain().weight)
        output = reference_depthwise_conv(x, weight, rate=self.rate)
        if self.mode == "inference":
            return {"output": [output]}
        cotangent = self.cotangent(dtype)
        grad_x, grad_weight = reference_depthwise_conv_backward(cotangent, x, weight, rate=self.rate)
        return {"output": [output], "gradients": [grad_x, grad_weight]}


@dataclass(frozen=True, kw_only=True)
class CellCase(MapCase):
    """A whole cell on fixed features: in training as in a search, or in inference as in a network."""

    cell: Cell
    dropout_rate: float = DROPOUT_RATE

    def without_chance(self) -> Self:
        return replace(self, dropout_rate=0.0) if self.mode == "training" else self

    def small(self) -> Self:
        return replace(super().small(), dropout_rate=0.0)

    def cost(self, element_bytes: int) -> Cost:
        return cell_cost(self.cell, self.size(element_bytes), self.in_channels, self.channels, self.mode)

    def plain(self) -> PlainCell:
        module = PlainCell(self.cell, self.in_channels, self.channels, self.dropout_rate)
        randomise(module, SEED)
        return module

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        module: PlainCell | DensePredictionCell = self.plain()
        if provider.is_ours:
            module = ours_from_plain(cast(PlainCell, module), self.cell, self.in_channels, self.channels, self.dropout_rate)
        inputs = [self.features(dtype, device)]
        return ModuleWorkload(module, inputs, module.weights, self, provider, dtype, needs_input_gradient=False)

    def truth(self, dtype: str) -> Truth:
        assert not self.dropout_rate or self.mode == "inference", "chance has no truth"
        x, weights = array(self.features(dtype)), arrays(self.plain().weights())
        options = BranchOptions(training=self.mode == "training")
        output = dense_prediction_cell(x, self.cell, weights, options)
        if not options.training:
            return {"output": [output]}
        _, grad_weights = dense_prediction_cell_backward(self.cotangent(dtype), x, self.cell, weights, options)
        return {"output": [output], "gradients": trainable(grad_weights)}


def ours_from_plain(plain: PlainCell, cell: Cell, in_channels: int, channels: int, dropout_rate: float) -> DensePredictionCell:
    """Our cell with the baseline's weights."""
    module = DensePredictionCell(
        cell, in_channels, branch_channels=channels, cell_channels=channels, dropout_rate=dropout_rate
    )
    load_reference_weights(module, arrays(plain.weights()))
    return module


@dataclass(frozen=True, kw_only=True)
class LossCase(Case):
    """Training: the loss of small logits under large labels, and its gradient. Inference: the confusion matrix."""

    batch: int
    num_classes: int
    size: tuple[int, int]
    label_size: tuple[int, int]
    launches_count: bool = False

    @property
    def shape(self) -> str:
        small, large = ("{}×{}".format(*size) for size in (self.size, self.label_size))
        return f"{self.batch}×{self.num_classes}×{small} -> {large}"

    def cost(self, element_bytes: int) -> Cost:
        size = MapSize(self.batch, *self.size, element_bytes)
        return loss_cost(size, self.num_classes, self.label_size, self.mode)

    def small(self) -> Self:
        return replace(self, batch=2, size=(7, 9), label_size=(97, 129))

    def logits(self, dtype: str, device: torch.device | None = None) -> Tensor:
        """(batch, num_classes, height, width)."""
        return 3 * normal((self.batch, self.num_classes, *self.size), SEED, device).to(DTYPES[dtype])

    def labels(self, device: torch.device | None = None) -> Tensor:
        """(batch, height, width), uint8; about a tenth is ignored."""
        return draw_labels((self.batch, *self.label_size), self.num_classes, device)

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        is_loss = self.mode == "training"
        module: nn.Module = UpsampledLoss() if is_loss else UpsampledConfusion()
        if provider.is_ours:
            module = _OfLogits(upsampled_cross_entropy if is_loss else upsampled_confusion_matrix)
        inputs = [self.logits(dtype, device), self.labels(device)]
        return ModuleWorkload(module, inputs, lambda: (), self, provider, dtype)

    def truth(self, dtype: str) -> Truth:
        logits, labels = array(self.logits(dtype)), self.labels().numpy()
        if self.mode == "inference":
            predictions = bilinear_resize(logits, self.label_size).argmax(axis=1)
            counts = confusion_matrix(predictions, labels, num_classes=self.num_classes)
            return {"output": [counts.astype(np.float64)]}
        loss = np.array(reference_upsampled_cross_entropy(logits, labels))
        cotangent = float(normal((), SEED + 1))  # the loss's, as the workload draws it
        return {"output": [loss], "gradients": [cotangent * upsampled_cross_entropy_backward(logits, labels)]}


class _OfLogits(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.function(logits, labels)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, torch.nan) if leaf.grad is None else leaf.grad  # a result without one of these is wrong


def normal(shape: tuple[int, ...], seed: int, device: torch.device | None = None) -> Tensor:
    """Standard normal, float32, the same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device or "cpu")


def draw_labels(shape: tuple[int, ...], num_classes: int, device: torch.device | None = None) -> Tensor:
    """Draw labels of `shape` (N, H, W), uint8: classes in blocks of 16 pixels, some of them ignored."""
    generator = torch.Generator().manual_seed(SEED + 2)
    blocks = [-(-extent // 16) for extent in shape[1:]]
    classes = torch.randint(num_classes, (shape[0], *blocks), generator=generator)
    classes[torch.rand(classes.shape, generator=generator) < 0.1] = IGNORE_INDEX
    pixels = classes.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)[:, : shape[1], : shape[2]]
    return pixels.to(torch.uint8).contiguous().to(device or "cpu")


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
