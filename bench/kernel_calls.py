"""The Triton kernels' calls in a training iteration of the paper's proxy task, by kernel: to compile them and to tune them.

The cell is the published one: five separable branches of 256 channels, the projection of all five, the classifier.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, partialmethod
from typing import Any

import torch
from torch import Tensor

from fast.kernels import Dropout, Folded, NormedMap, Unfolded
from fast.kernels import triton as kernels
from fast.kernels.triton.launches import Key, Size
from reference.batch_norm import EPS, BatchNorm
from reference.concat_project import DROPOUT_RATE
from reference.grid import Grid
from reference.upsampled_cross_entropy import IGNORE_INDEX

MAP_SIZES: dict[Size, tuple[int, int, int]] = {"small": (8, 49, 49), "large": (16, 97, 97)}  # N, H, W: below and above LARGE
LABEL_SIZE = (769, 769)
CHANNELS, CLASSES, RATE = 256, 19, (6, 21)
GRID = Grid(16)  # of features on labels
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by bytes per value
# 1×1 convolutions as (maps, output channels, times in an iteration): the projection, the branches', the classifier.
PRODUCTS = ((5, CHANNELS, 1), (1, CHANNELS, 5), (1, CLASSES, 1))

Call = Callable[[], Any]
Calls = Iterator[tuple[int, Call]]  # times in an iteration, and the call with its arguments, allocated when it is taken


def calls_of(key: Key, device: str, *, drawn: bool) -> Calls:
    """The calls whose time decides how a kernel of the launch table is launched."""
    kernel, value_bytes, size = key
    if kernel == "sum_partials":  # its size is that of the sums; small sums come from depthwise weights
        kernel, size = "depthwise_backward" if size == "small" else "pointwise_weight_gradient", "small"
    calls: Calls = getattr(KernelCalls(DTYPES[value_bytes], MAP_SIZES[size], device, drawn), kernel)()
    return calls


@dataclass(frozen=True)
class KernelCalls:
    """A method for each kernel, with its name in the launch table: the calls of the backend's function that launches it.

    A kernel that a training iteration does not have is called once.
    """

    dtype: torch.dtype  # of maps; logits, moments and norms are float32
    sizes: tuple[int, int, int]  # N, H, W of maps and logits
    device: str
    drawn: bool  # arguments are normal numbers; else uninitialised memory, for calls that never run
    classes: int = CLASSES

    def depthwise_forward(self) -> Calls:
        x, weight, norm = self.map(), self.tensor(CHANNELS, 1, 3, 3), BatchNorm(*self.vectors(4))
        yield 5, partial(self._with_folded, norm, kernels.depthwise_forward, x, weight, RATE)

    def depthwise_backward(self) -> Calls:
        arguments = (self.raw(), self.raw(), Unfolded(*self.vectors(4)), self.map(), self.tensor(CHANNELS, 1, 3, 3), RATE)
        yield 5, partial(kernels.depthwise_backward, *arguments, need_input=True)

    def pointwise_forward(self) -> Calls:
        for number, out_channels, times in PRODUCTS:
            arguments = self.product(number, out_channels)
            if out_channels == CHANNELS:
                norm = BatchNorm(*self.vectors(4))
                yield times, partial(self._with_folded, norm, kernels.pointwise_forward, *arguments)
            else:  # the classifier has no norm
                yield times, partial(kernels.pointwise_forward, *arguments, statistics=False)

    def _pointwise_backward(self, *, need_input: bool) -> Calls:
        for number, out_channels, times in PRODUCTS:
            unfolded = Unfolded(*self.vectors(4)) if out_channels == CHANNELS else None
            arguments = (self.raw(out_channels), self.raw(out_channels), unfolded, *self.product(number, out_channels))
            yield times, partial(kernels.pointwise_backward, *arguments, need_input=[need_input] * number)

    pointwise_weight_gradient = partialmethod(_pointwise_backward, need_input=False)
    pointwise_input_gradient = partialmethod(_pointwise_backward, need_input=True)

    def normalise(self) -> Calls:
        yield 1, partial(kernels.normalise, self.map())

    def normalise_backward(self) -> Calls:
        yield 1, partial(kernels.normalise_backward, self.raw(), self.map())

    def sum_gradients(self) -> Calls:
        for readers, times in ((4, 1), (2, 1)):  # the published cell's two maps with several readers
            yield times, partial(kernels.sum_gradients, [self.map() for _ in range(readers)])

    def fold(self) -> Calls:
        tile_size = 32
        moments = kernels.Moments(self.tensor(-(-self.count // tile_size), 2, CHANNELS).abs_(), tile_size)
        yield 11, partial(self._fold, moments, BatchNorm(*self.vectors(4)))

    def unfold(self) -> Calls:
        grad_scale, grad_offset, gamma, *folded = self.vectors(7)
        yield 11, partial(kernels.unfold, grad_scale, grad_offset, Folded(*folded), gamma, count=self.count)

    def cell_gradients(self) -> Calls:
        yield 1, partial(kernels.upsampled_cross_entropy, *self.logits_and_labels(), IGNORE_INDEX)

    mean_loss = gather_corners = cell_gradients  # a call of the loss launches all three

    def confusion_matrix(self) -> Calls:
        yield 1, partial(kernels.upsampled_confusion_matrix, *self.logits_and_labels(), IGNORE_INDEX)

    def crops(self) -> Calls:
        """Out of the features and labels of four images, eight rows and columns larger than a crop."""
        n, *crop = self.sizes
        images, height, width = 4, crop[0] + 8, crop[1] + 8
        features = self.tensor(images, CHANNELS, height, width, dtype=self.dtype, memory_format=torch.channels_last)
        shape = (images, *GRID.pixels((height, width)))
        labels, draws = self.integers(torch.uint8, *shape), self.integers(torch.int32, 3, n)
        yield 1, partial(kernels.crops, features, labels, draws, (crop[0], crop[1]), GRID, self.dtype)

    def _fold(self, moments: Any, norm: BatchNorm[Tensor]) -> Folded:
        return kernels.fold(moments, norm, count=self.count, momentum=0.0, eps=EPS)

    def _with_folded(self, norm: BatchNorm[Tensor], convolution: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Folded]:
        """The output with its folded norm, which can be compared: moments depend on the launch's tiles, it does not."""
        out, moments = convolution(*arguments, statistics=True)
        return out, self._fold(moments, norm)

    @property
    def count(self) -> int:
        """The positions of a map."""
        n, height, width = self.sizes
        return n * height * width

    def tensor(self, *shape: int, **layout: Any) -> Tensor:
        """float32 and contiguous, unless told otherwise as `torch.empty` is."""
        empty = torch.empty(shape, **({"dtype": torch.float32} | layout), device=self.device)
        return empty.normal_() if self.drawn else empty

    def vectors(self, number: int) -> Any:
        """A tuple of so many values of each channel, as norms and their gradients have them."""
        return tuple(self.tensor(CHANNELS) for _ in range(number))

    def raw(self, channels: int | None = None) -> Tensor:
        n, height, width = self.sizes
        shape = (n, channels or CHANNELS, height, width)
        return self.tensor(*shape, dtype=self.dtype, memory_format=torch.channels_last)

    def map(self) -> NormedMap:
        return NormedMap(self.raw(), *self.vectors(2))

    def product(self, number: int, out_channels: int) -> tuple[list[NormedMap], Tensor, Dropout | None]:
        """Maps, weight and dropout of a 1×1 convolution; several maps are those of the projection, which drops."""
        seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        weight = self.tensor(out_channels, number * CHANNELS, 1, 1)
        return [self.map() for _ in range(number)], weight, Dropout(DROPOUT_RATE, seed) if number > 1 else None

    def logits_and_labels(self) -> tuple[Tensor, Tensor]:
        n, *small = self.sizes
        labels = torch.empty(n, *LABEL_SIZE, dtype=torch.uint8, device=self.device)
        return self.tensor(n, self.classes, *small), labels.random_(0, self.classes) if self.drawn else labels

    def integers(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Each of the dtype's own, but for negative ones, where numbers are drawn."""
        empty = torch.empty(shape, dtype=dtype, device=self.device)
        return empty.random_() if self.drawn else empty
