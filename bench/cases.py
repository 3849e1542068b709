"""The cases to measure: each has its inputs, its cost, and the workload of each provider."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, assert_never, cast, get_args

import torch
from torch import Tensor, nn

from bench.costs import Cost, MapSize, Mode, cell_cost, depthwise_cost, loss_cost, operation_cost
from bench.plain_torch import PlainBranch, PlainCell, randomise, upsampled_confusion, upsampled_loss
from fast import kernels
from fast.atrous_separable_conv import atrous_separable_conv, depthwise_conv
from fast.batch_norm import authors_norm
from fast.dense_prediction_cell import DensePredictionCell
from fast.mean_iou import upsampled_confusion_matrix
from fast.pointwise_conv import conv1x1
from fast.pyramid_pooling import pyramid_pooling
from fast.train_step import has_fast_bf16
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.cell import AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.concat_project import DROPOUT_RATE
from reference.upsampled_cross_entropy import IGNORE_INDEX

Suite = Literal["proxy", "loss", "search", "features", "study", "cell", "ops"]
SUITES: tuple[Suite, ...] = get_args(Suite)  # most important first, longest last

DType = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Parts = dict[str, list[Tensor]]  # what a call computed, by kind: "output", "gradients"
CPU = torch.device("cpu")

SEED = 1809_04184  # the paper's number at arXiv


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: ours, or one of PyTorch's."""

    name: str
    channels_last: bool = False
    compile_mode: str | None = None  # of torch.compile
    is_ours: bool = False
    uses_kernels: bool = True  # ours only
    in_float64: bool = False  # from inputs that are rounded as the others get them

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """How maps lie in memory: torch.compile gets what suits the device, ours what its kernels want."""
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
IN_FLOAT64 = Provider("eager in float64", in_float64=True)  # what the others are compared with


class Workload(ABC):
    """One provider's computation of one case: call it to compute, then read its results."""

    written_bytes: int | None = None  # size of the page that the last call has written

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
    seconds: float = math.inf
    """No round begins after so long, if each provider has a process of its own; three are made at least."""

    @property
    def is_training(self) -> bool:
        return self.mode == "training"

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
        """The same case without randomness, at a size that is quick in float64 and mostly border."""

    def set_up(self, providers: Sequence[Provider]) -> AbstractContextManager[Self]:
        """The case with what takes long to make and all processes share that time these providers, as long as the block."""
        return nullcontext(self)

    @abstractmethod
    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        """A provider's workload; all have the same inputs and weights."""

    def truth(self, dtype: str) -> Parts:
        """The expected parts of a workload in `dtype`: plain PyTorch in float64; the tests hold it equal to `reference/`."""
        workload = self.workload(IN_FLOAT64, dtype, CPU)
        workload()
        return workload.parts()


@dataclass(frozen=True)
class Job:
    """A case in one dtype, with its providers."""

    case: Case
    dtype: DType
    providers: tuple[Provider, ...]
    in_fresh_process: tuple[Provider, ...] = ()  # providers whose first call and memory are measured too

    @property
    def title(self) -> str:
        """Its name in a run."""
        return f"{self.case.suite}: {self.case.name}, {self.case.mode}, {self.case.shape}, {self.dtype}"


class Computed(nn.Module):
    """A function as a module; `owner` has the parameters that it uses."""

    def __init__(self, function: Callable[..., Tensor], owner: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.owner = function, owner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class ModuleWorkload(Workload):
    """Forward, and in training backward, of a module; the gradients are those of the first input and of all parameters."""

    def __init__(
        self,
        module: nn.Module,
        inputs: list[Tensor],
        case: Case,
        provider: Provider,
        dtype: str,
        *,
        input_has_gradient: bool = True,
    ) -> None:
        self._is_training, self._provider, self._dtype, self._device = case.is_training, provider, dtype, inputs[0].device
        if provider.in_float64:
            module, inputs = module.double(), [inputs[0].double(), *inputs[1:]]
        memory_format = provider.memory_format(self._device)
        self._module = module.to(self._device).train(case.is_training)
        if not provider.is_ours and memory_format == torch.channels_last:
            self._module = self._module.to(memory_format=memory_format)
        first = inputs[0].to(memory_format=memory_format).requires_grad_(case.is_training and input_has_gradient)
        self._inputs = [first, *inputs[1:]]
        mode = provider.compile_mode
        self._function = torch.compile(self._module, mode=mode, dynamic=False) if mode else self._module
        self._output: Tensor | None = None
        self._cotangent: Tensor | None = None

    def __call__(self) -> None:
        self.drop()
        with environment_of(self._provider, self._dtype, self._device), torch.inference_mode(not self._is_training):
            output = self._function(*self._inputs)
        if self._is_training:
            output.backward(self._cotangent_of(output.detach()))
        self._output = output.detach()

    def _cotangent_of(self, output: Tensor) -> Tensor:
        """Normal numbers, the same at every call, in the layout of what they are the gradient of."""
        if self._cotangent is None:
            drawn = normal(tuple(output.shape), SEED + 1, self._device).to(DTYPES[self._dtype])
            self._cotangent = torch.empty_like(output).copy_(drawn)
        return self._cotangent

    def parts(self) -> Parts:
        assert self._output is not None, "called first"
        if not self._is_training:
            return {"output": [self._output]}
        leaves = [*(tensor for tensor in self._inputs if tensor.requires_grad), *self._module.parameters()]
        return {"output": [self._output], "gradients": [_gradient(leaf) for leaf in leaves]}

    def drop(self) -> None:
        self._output = None
        self._module.zero_grad(set_to_none=True)
        for tensor in self._inputs:
            tensor.grad = None


def environment_of(provider: Provider, dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """In here the provider computes: autocast for what is below float32, kernels off for who must not use them."""
    if provider.compile_mode:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    stack = ExitStack()
    if dtype != "float32" and not provider.in_float64:
        stack.enter_context(torch.autocast(device.type, DTYPES[dtype]))
    if provider.is_ours and not provider.uses_kernels:
        stack.enter_context(kernels.using(None))
    return stack


@dataclass(frozen=True, kw_only=True)
class MapCase(Case):
    """A case whose input is a map (batch, in_channels, height, width), and whose parts are told by its kind."""

    batch: int
    in_channels: int
    channels: int
    height: int
    width: int
    input_has_gradient: bool = True

    @abstractmethod
    def plain(self) -> nn.Module:
        """The baseline, with the weights that all share."""

    @abstractmethod
    def ours(self, plain: nn.Module) -> nn.Module:
        """Ours, with the baseline's weights."""

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
        return normal((self.batch, self.in_channels, self.height, self.width), SEED, device).to(DTYPES[dtype])

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        plain = self.plain()
        module, inputs = self.ours(plain) if provider.is_ours else plain, [self.features(dtype, device)]
        return ModuleWorkload(module, inputs, self, provider, dtype, input_has_gradient=self.input_has_gradient)


@dataclass(frozen=True, kw_only=True)
class OperationCase(MapCase):
    """One of the 81 operations."""

    suite: Suite = "ops"
    operation: Operation
    launches_count: bool = False

    def cost(self, element_bytes: int) -> Cost:
        return operation_cost(self.operation, self.size(element_bytes), self.in_channels, self.channels, self.mode)

    def plain(self) -> PlainBranch:
        return randomise(PlainBranch(self.operation, self.in_channels, self.channels), SEED)

    def ours(self, plain: nn.Module) -> nn.Module:
        weights, training = cast(Any, plain).weights, self.is_training
        match self.operation:
            case Conv1x1():
                return Computed(lambda x: conv1x1(x, weights(), training=training), plain)
            case AtrousSeparableConv(rate):
                return Computed(lambda x: atrous_separable_conv(x, weights(), rate=rate, training=training), plain)
            case PyramidPooling(grid_size):
                return Computed(lambda x: pyramid_pooling(x, weights(), grid_size=grid_size, training=training), plain)
            case _:
                assert_never(self.operation)


@dataclass(frozen=True, kw_only=True)
class DepthwiseCase(MapCase):
    """The dilated depthwise convolution alone."""

    suite: Suite = "ops"
    rate: tuple[int, int]
    launches_count: bool = False

    def small(self) -> Self:
        small = super().small()
        return replace(small, channels=small.in_channels)

    def cost(self, element_bytes: int) -> Cost:
        return depthwise_cost(self.size(element_bytes), self.channels, self.mode)

    def plain(self) -> nn.Conv2d:
        channels, rate = self.channels, self.rate
        return randomise(nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False), SEED)

    def ours(self, plain: nn.Module) -> nn.Module:
        return Computed(lambda x: depthwise_conv(x, cast(nn.Conv2d, plain).weight, rate=self.rate), plain)


@dataclass(frozen=True, kw_only=True)
class CellCase(MapCase):
    """A whole cell on fixed features: in training as in a search, or in inference as in a network."""

    suite: Suite = "cell"
    cell: Cell
    dropout_rate: float = DROPOUT_RATE
    input_has_gradient: bool = False  # a backbone's features

    def without_chance(self) -> Self:
        return replace(self, dropout_rate=0.0) if self.is_training else self

    def small(self) -> Self:
        return replace(super().small(), dropout_rate=0.0)

    def cost(self, element_bytes: int) -> Cost:
        return cell_cost(self.cell, self.size(element_bytes), self.in_channels, self.channels, self.mode)

    def plain(self) -> PlainCell:
        return randomise(PlainCell(self.cell, self.in_channels, self.channels, self.channels, self.dropout_rate), SEED)

    def ours(self, plain: nn.Module) -> nn.Module:
        return our_cell(self.cell, self.in_channels, self.channels, self.dropout_rate, plain)


def our_cell(cell: Cell, in_channels: int, channels: int, dropout_rate: float, plain: nn.Module) -> DensePredictionCell:
    """With the baseline's weights."""
    module = DensePredictionCell(
        cell, in_channels, branch_channels=channels, cell_channels=channels, dropout_rate=dropout_rate, norm_layer=authors_norm
    )
    module.load_state_dict(plain.state_dict())
    return module


@dataclass(frozen=True, kw_only=True)
class LossCase(Case):
    """Training: the loss of small logits under large labels, and its gradient. Inference: the confusion matrix."""

    suite: Suite = "loss"
    batch: int
    num_classes: int
    size: tuple[int, int]
    label_size: tuple[int, int]
    align_corners: bool = True
    launches_count: bool = False

    @property
    def shape(self) -> str:
        small, large = ("{}×{}".format(*size) for size in (self.size, self.label_size))
        return f"{self.batch}×{self.num_classes}×{small} -> {large}"

    def cost(self, element_bytes: int) -> Cost:
        return loss_cost(MapSize(self.batch, *self.size, element_bytes), self.num_classes, self.label_size, self.mode)

    def small(self) -> Self:
        return replace(self, batch=2, size=(7, 9), label_size=(97, 129))

    def data(self, dtype: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Logits (batch, num_classes, height, width), and labels (batch, H, W), uint8."""
        logits = 3 * normal((self.batch, self.num_classes, *self.size), SEED, device).to(DTYPES[dtype])
        return logits, draw_labels((self.batch, *self.label_size), self.num_classes, device)

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        ours, plain = (
            (upsampled_cross_entropy, upsampled_loss)
            if self.is_training
            else (upsampled_confusion_matrix, upsampled_confusion)
        )
        module = Computed(partial(ours if provider.is_ours else plain, align_corners=self.align_corners))
        return ModuleWorkload(module, [*self.data(dtype, device)], self, provider, dtype)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, torch.nan) if leaf.grad is None else leaf.grad  # a result without one of these is wrong


def normal(shape: tuple[int, ...], seed: int, device: torch.device | None = None) -> Tensor:
    """Standard normal, float32, the same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device or "cpu")


def draw_labels(shape: tuple[int, ...], num_classes: int, device: torch.device | None = None) -> Tensor:
    """Classes in blocks of 16 pixels, as real labels come; about a tenth of them is ignored: `shape` (N, H, W), uint8."""
    generator = torch.Generator().manual_seed(SEED + 2)
    blocks = [-(-extent // 16) for extent in shape[1:]]
    classes = torch.randint(num_classes, (shape[0], *blocks), generator=generator)
    classes[torch.rand(classes.shape, generator=generator) < 0.1] = IGNORE_INDEX
    pixels = classes.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)[:, : shape[1], : shape[2]]
    return pixels.to(torch.uint8).contiguous().to(device or "cpu")


def rate_of(case: Case) -> tuple[int, int] | None:
    """An atrous convolution's; None for all else."""
    match case:
        case DepthwiseCase(rate=rate) | OperationCase(operation=AtrousSeparableConv(rate)):
            return rate
        case _:
            return None


def supported_dtypes(device: torch.device) -> tuple[tuple[DType, ...], tuple[DType, ...]]:
    """The dtypes that this machine computes natively, most used first, and those that it would emulate."""
    if device.type == "cuda":
        return ("bfloat16", "float32", "float16"), ()
    return (("float32", "bfloat16"), ()) if has_fast_bf16(device) else (("float32",), ("bfloat16",))
