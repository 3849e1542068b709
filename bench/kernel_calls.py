"""The Triton kernels' calls in a training iteration of the paper's proxy task, one by one: to compile them and to tune them.

The cell is the published one: five separable branches of 256 channels, the projection of all five, the classifier.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast.kernels import Dropout, Folded, NormedMap, Unfolded
from fast.kernels import triton as kernels
from fast.kernels.triton.launches import Key, Size
from reference.batch_norm import EPS, BatchNorm
from reference.concat_project import DROPOUT_RATE
from reference.upsampled_cross_entropy import IGNORE_INDEX

MAP_SIZES: dict[Size, tuple[int, int, int]] = {"small": (8, 49, 49), "large": (16, 97, 97)}  # N, H, W: below and above LARGE
LABEL_SIZE = (769, 769)
CHANNELS, CLASSES, RATE = 256, 19, (6, 21)
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by bytes per value
PROJECTION = (5, CHANNELS, 1)  # maps, output channels, times in an iteration
PRODUCTS = ((1, CHANNELS, 5), PROJECTION, (1, CLASSES, 1))  # branches, projection, classifier

Call = Callable[[], Any]


class KernelCall(NamedTuple):
    """A call of a backend's function: how often it is made in an iteration, and its arguments."""

    kernel: str  # the launch table's key that it stands for; "" if it is compiled only
    times: int  # times in an iteration; 1 for kernels that a training iteration does not have
    prepare: Callable[[], Call]  # allocates the arguments


class Inputs(NamedTuple):
    """Makes arguments on a device: normal numbers, or uninitialised memory for calls that never run."""

    device: torch.device
    drawn: bool

    def tensor(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=self.device, memory_format=memory_format)
        return empty.normal_() if self.drawn else empty

    def raw(self, channels: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        n, height, width = sizes
        return self.tensor(n, channels, height, width, dtype=dtype, memory_format=torch.channels_last)

    def map(self, channels: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> NormedMap:
        return NormedMap(self.raw(channels, sizes, dtype), self.tensor(channels), self.tensor(channels))

    def norm(self) -> BatchNorm[Tensor]:
        return BatchNorm(*(self.tensor(CHANNELS) for _ in range(4)))

    def unfolded(self) -> Unfolded:
        return Unfolded(*(self.tensor(CHANNELS) for _ in range(4)))

    def labels(self, n: int) -> Tensor:
        empty = torch.empty(n, *LABEL_SIZE, dtype=torch.uint8, device=self.device)
        return empty.random_(0, CLASSES) if self.drawn else empty


def calls_of(key: Key, inputs: Inputs) -> list[KernelCall]:
    """The calls whose time decides how a kernel of the launch table is launched."""
    kernel, value_bytes, size = key
    if kernel == "sum_partials":  # its size is that of the sums; small sums come from depthwise weights
        kernel, size = "depthwise_backward" if size == "small" else "pointwise_weight_gradient", "small"
    calls = [*map_calls(DTYPES[value_bytes], MAP_SIZES[size], inputs, PRODUCTS), *other_calls(MAP_SIZES[size], inputs)]
    return [call for call in calls if call.kernel == kernel]


def map_calls(
    dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs, products: Sequence[tuple[int, int, int]]
) -> Iterator[KernelCall]:
    """Calls of all functions of the backend that take maps of (N, H, W) values."""
    yield KernelCall("depthwise_forward", 5, partial(_depthwise_forward, dtype, sizes, inputs))
    yield KernelCall("depthwise_backward", 5, partial(_depthwise_backward, dtype, sizes, inputs))
    for maps, out_channels, times in products:
        shape = (dtype, sizes, inputs, maps, out_channels)
        yield KernelCall("pointwise_forward", times, partial(_pointwise_forward, *shape))
        yield KernelCall("pointwise_weight_gradient", times, partial(_pointwise_backward, *shape, need_input=False))
        yield KernelCall("pointwise_input_gradient", times, partial(_pointwise_backward, *shape, need_input=True))
    yield KernelCall("normalise", 1, partial(_normalise, dtype, sizes, inputs))
    yield KernelCall("normalise_backward", 1, partial(_normalise_backward, dtype, sizes, inputs))
    yield KernelCall("separable_inference", 1, partial(_separable_inference, dtype, sizes, inputs))
    yield KernelCall("", 1, partial(_pointwise_inference, dtype, sizes, inputs))


def other_calls(sizes: tuple[int, int, int], inputs: Inputs) -> Iterator[KernelCall]:
    """Calls that are float32 for maps of any dtype, for logits of (N, h, w)."""
    yield KernelCall("fold", 11, partial(_fold, sizes, inputs))
    yield KernelCall("unfold", 11, partial(_unfold, sizes, inputs))
    for kernel in ("cell_gradients", "mean_loss", "gather_corners"):
        yield KernelCall(kernel, 1, partial(_loss, sizes, inputs))
    yield KernelCall("confusion_matrix", 1, partial(_confusion_matrix, sizes, inputs))


def _depthwise_forward(dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    x, weight, norm = inputs.map(CHANNELS, sizes, dtype), inputs.tensor(CHANNELS, 1, 3, 3), inputs.norm()
    return lambda: _with_folded(*kernels.depthwise_forward(x, weight, RATE, statistics=True), norm)


def _depthwise_backward(dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    x, weight, unfolded = inputs.map(CHANNELS, sizes, dtype), inputs.tensor(CHANNELS, 1, 3, 3), inputs.unfolded()
    grad, raw = (inputs.raw(CHANNELS, sizes, dtype) for _ in range(2))
    return lambda: kernels.depthwise_backward(grad, raw, unfolded, x, weight, RATE, need_input=True)


def _pointwise_forward(
    dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs, number: int, out_channels: int
) -> Call:
    maps, weight, dropout = _product(dtype, sizes, inputs, number, out_channels)
    if out_channels != CHANNELS:  # the classifier has no norm
        return lambda: kernels.pointwise_forward(maps, weight, dropout, statistics=False)
    norm = inputs.norm()
    return lambda: _with_folded(*kernels.pointwise_forward(maps, weight, dropout, statistics=True), norm)


def _pointwise_backward(
    dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs, number: int, out_channels: int, *, need_input: bool
) -> Call:
    maps, weight, dropout = _product(dtype, sizes, inputs, number, out_channels)
    unfolded = inputs.unfolded() if out_channels == CHANNELS else None
    grad, raw = (inputs.raw(out_channels, sizes, dtype) for _ in range(2))
    return lambda: kernels.pointwise_backward(grad, raw, unfolded, maps, weight, dropout, need_input=[need_input] * len(maps))


def _product(
    dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs, number: int, out_channels: int
) -> tuple[list[NormedMap], Tensor, Dropout | None]:
    """Maps, weight and dropout of a 1×1 convolution; several maps are the projection's, which has dropout."""
    maps = [inputs.map(CHANNELS, sizes, dtype) for _ in range(number)]
    dropout = Dropout(DROPOUT_RATE, torch.zeros(1, dtype=torch.int64, device=inputs.device)) if number > 1 else None
    return maps, inputs.tensor(out_channels, number * CHANNELS, 1, 1), dropout


def _with_folded(out: Tensor, moments: Any, norm: BatchNorm[Tensor]) -> tuple[Tensor, Folded]:
    """The output with its folded norm, which can be compared: moments depend on the launch's tiles, it does not."""
    count = out.shape[0] * out.shape[2] * out.shape[3]
    return out, kernels.fold(moments, norm, count=count, momentum=0.0, eps=EPS)


def _normalise(dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    x = inputs.map(CHANNELS, sizes, dtype)
    return lambda: kernels.normalise(x)


def _normalise_backward(dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    x, grad = inputs.map(CHANNELS, sizes, dtype), inputs.raw(CHANNELS, sizes, dtype)
    return lambda: kernels.normalise_backward(grad, x)


def _separable_inference(dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    x, depthwise = inputs.map(CHANNELS, sizes, dtype), inputs.tensor(CHANNELS, 1, 3, 3)
    pointwise, norm = inputs.tensor(CHANNELS, CHANNELS, 1, 1), (inputs.tensor(CHANNELS), inputs.tensor(CHANNELS))
    return lambda: kernels.separable_inference(x, depthwise, norm, RATE, pointwise, norm)


def _pointwise_inference(dtype: torch.dtype, sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    maps, weight, _ = _product(dtype, sizes, inputs, 1, CHANNELS)
    norm = (inputs.tensor(CHANNELS), inputs.tensor(CHANNELS))
    return lambda: kernels.pointwise_inference(maps, weight, norm)


def _fold(sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    count, tile_size = sizes[0] * sizes[1] * sizes[2], 32
    moments = kernels.Moments(inputs.tensor(-(-count // tile_size), 2, CHANNELS).abs_(), tile_size)
    norm = inputs.norm()
    return lambda: kernels.fold(moments, norm, count=count, momentum=0.0, eps=EPS)


def _unfold(sizes: tuple[int, int, int], inputs: Inputs) -> Call:
    count = sizes[0] * sizes[1] * sizes[2]
    grad_scale, grad_offset, gamma, *folded = (inputs.tensor(CHANNELS) for _ in range(7))
    return lambda: kernels.unfold(grad_scale, grad_offset, Folded(*folded), gamma, count=count)


def _loss(sizes: tuple[int, int, int], inputs: Inputs, classes: int = CLASSES) -> Call:
    logits, labels = inputs.tensor(sizes[0], classes, *sizes[1:]), inputs.labels(sizes[0])
    return lambda: kernels.upsampled_cross_entropy(logits, labels, IGNORE_INDEX)


def _confusion_matrix(sizes: tuple[int, int, int], inputs: Inputs, classes: int = CLASSES) -> Call:
    logits, labels = inputs.tensor(sizes[0], classes, *sizes[1:]), inputs.labels(sizes[0])
    return lambda: kernels.upsampled_confusion_matrix(logits, labels, IGNORE_INDEX)
