"""What computes a map must offer: `Operations`, which autograd differentiates; below it, for a device's kernels, `Backend`.

`library.py` has the operations on PyTorch, `differentiable.py` those on any backend's kernels (`cpp/`, `triton/`).

Between kernels a map travels as the raw output of its convolution with two numbers per channel: its value is
relu(scale · raw + offset). Whoever loads it applies them, so a normalised map is never written, and the batch norm costs the
sums that the convolution takes of its output while that is still in a register or a cache. The same on the way back: the
gradient that a convolution gets through its own statistics is slope · raw + intercept per channel, added on load.

    raw = conv(x)   mean, var over (N, H, W)      scale = γ / √(var + ε)    offset = β - mean · scale           (`fold`)
    G = ∂L/∂scale - mean · ∂L/∂offset             ∂L/∂γ = G / √(var + ε)    ∂L/∂β = ∂L/∂offset                  (`unfold`)
    slope = -γ · G / (var + ε)^(3/2) / (N·H·W)    intercept = -scale · ∂L/∂offset / (N·H·W) - slope · mean
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fast.batch_norm import LiveNorm
from reference.batch_norm import BatchNorm
from reference.grid import Grid
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant


class NormedMap(NamedTuple):
    """A map whose value is relu(scale · raw + offset), or raw itself where both are None. Also the container of gradients."""

    raw: Tensor  # (N, C, H, W)
    scale: Tensor | None = None  # (C,), float32, or float64 for a float64 map
    offset: Tensor | None = None  # (C,)


class LiveConv(NamedTuple):
    """A convolution and its norm as they stand in a network."""

    weight: Tensor  # (C_out, C_in, 1, 1) pointwise, (C, 1, 3, 3) depthwise
    norm: LiveNorm


def in_mode(conv: ConvNorm[Tensor], training: bool, momentum: float) -> LiveConv:
    """The weights of a function whose caller says how their norm is to run."""
    return LiveConv(conv.weight, LiveNorm(conv.norm, training, momentum))


class Operations(Protocol):
    """What the files of `fast/` compute maps with. All but the last two are differentiable, by maps, weights and norms.

    A convolution is followed by its norm and ReLU, or with None instead of a norm by nothing. Its result may be a map whose
    norm is not yet applied; `value` applies it. Where a weight or the maps' sizes do not fit, kernels raise ValueError and
    PyTorch raises RuntimeError.
    """

    def dense(self, x: NormedMap) -> NormedMap:
        """The same map in the layout that is read quickest: for one that several convolutions will read."""
        ...

    def value(self, x: NormedMap) -> Tensor:
        """relu(scale · raw + offset): (N, C, H, W)."""
        ...

    def fan_out(self, x: NormedMap, readers: int) -> list[NormedMap]:
        """The same map for each of its readers, whose gradients are added at once where that is quicker."""
        ...

    def depthwise_conv(self, x: NormedMap, weight: Tensor, norm: LiveNorm | None, *, rate: tuple[int, int]) -> NormedMap:
        """3×3, one filter a channel, zero padding: x: (N, C, H, W), weight: (C, 1, 3, 3) -> (N, C, H, W)."""
        ...

    def pointwise_conv(
        self, maps: Sequence[NormedMap], weight: Tensor, norm: LiveNorm | None, *, dropout_rate: float = 0.0
    ) -> NormedMap:
        """1×1 over the channels of all maps (N, C_i, H, W), weight: (C_out, Σ C_i, 1, 1) -> (N, C_out, H, W).

        A dropout_rate above 0 drops out elements of the maps, whatever the norm does. Raises ValueError unless it is below 1.
        """
        ...

    def separable_conv(self, x: NormedMap, depthwise: LiveConv, pointwise: LiveConv, *, rate: tuple[int, int]) -> NormedMap:
        """`depthwise_conv`, then `pointwise_conv`: (N, C, H, W) -> (N, C_out, H, W)."""
        ...

    def pooling_means(
        self, x: NormedMap, grid_size: tuple[int, int], variant: PoolingVariant, pooling_size: tuple[int, int] | None
    ) -> Tensor:
        """The means of `reference/pyramid_pooling.py` before its convolution: (N, C, H, W) -> (N, C, rows, columns)."""
        ...

    def resize(self, x: NormedMap, size: tuple[int, int], align_corners: bool = True) -> Tensor:
        """Bilinear: (N, C, H, W) -> (N, C, *size)."""
        ...

    def upsampled_cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        class_weights: Tensor | None = None,
        align_corners: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """logits: (N, K, h, w), labels: (N, H, W) integer -> the mean loss (), and its gradient (N, K, h, w).

        class_weights: (K,), dense, in the logits' dtype; None weighs all pixels alike.
        """
        ...

    def upsampled_confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = True
    ) -> Tensor:
        """Pixels by (label, best class): (K, K), int64."""
        ...


def check_dropout_rate(rate: float) -> None:
    """Raises ValueError unless 0 <= rate < 1: kept elements grow by 1 / (1 - rate)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate must be at least 0 and below 1, got {rate}")


class Folded(NamedTuple):
    """A batch norm in training, as two numbers per channel, and what its gradient needs."""

    scale: Tensor  # (C,)
    offset: Tensor  # (C,)
    mean: Tensor  # (C,)
    inv_std: Tensor  # (C,), 1 / √(var + ε)


class Unfolded(NamedTuple):
    """Gradients of a batch norm in training: its parameters', and what its input gets through the statistics."""

    slope: Tensor  # (C,)
    intercept: Tensor  # (C,)
    gamma: Tensor  # (C,)
    beta: Tensor  # (C,)


class Dropout(NamedTuple):
    """Which elements of a concatenation are dropped: a function of the seed and of each element's place alone."""

    rate: float  # in (0, 1)
    seed: Tensor  # (1,), int64, on the device: a captured CUDA graph draws a new one at each replay


class Backend(Protocol):
    """What a device's kernels compute. Maps are dense in `memory_format`; results are the same at every call.

    `moments` is the backend's own: whatever `fold` needs to know of the sums over (N, H, W).
    """

    name: str  # for people, in the plural
    memory_format: torch.memory_format

    def supports(self, x: Tensor) -> str | None:
        """None where maps like x can be computed, else the reason why not, in one sentence."""
        ...

    def depthwise_forward(
        self, x: NormedMap, weight: Tensor, rate: tuple[int, int], *, statistics: bool
    ) -> tuple[Tensor, Any]:
        """weight: (C, 1, 3, 3) -> raw output (N, C, H, W) and its moments, or None without `statistics`."""
        ...

    def depthwise_backward(
        self,
        grad: Tensor,
        raw: Tensor,
        unfolded: Unfolded | None,  # None: the norm used running statistics
        x: NormedMap,
        weight: Tensor,
        rate: tuple[int, int],
        *,
        need_input: bool,
    ) -> tuple[NormedMap | None, Tensor]:
        """Gradients of x.raw, x.scale and x.offset, and of the weight, given that of the raw output."""
        ...

    def pointwise_forward(
        self, maps: Sequence[NormedMap], weight: Tensor, dropout: Dropout | None, *, statistics: bool
    ) -> tuple[Tensor, Any]:
        """weight: (C_out, C, 1, 1) for C channels of all maps together, never concatenated -> (N, C_out, H, W), moments."""
        ...

    def pointwise_backward(
        self,
        grad: Tensor,
        raw: Tensor,
        unfolded: Unfolded | None,
        maps: Sequence[NormedMap],
        weight: Tensor,
        dropout: Dropout | None,
        *,
        need_input: Sequence[bool],
    ) -> tuple[list[NormedMap | None], Tensor]:
        """Gradients of each map that needs one, and of the weight."""
        ...

    def pointwise_inference(self, maps: Sequence[NormedMap], weight: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        """The value after a frozen norm, given as scale and offset: (C_out,) each -> (N, C_out, H, W)."""
        ...

    def fold(self, moments: Any, norm: BatchNorm[Tensor], *, count: int, momentum: float, eps: float) -> Folded:
        """Batch statistics over `count` values a channel into scale and offset; moves the running statistics in place."""
        ...

    def unfold(self, grad_scale: Tensor, grad_offset: Tensor, folded: Folded, gamma: Tensor, *, count: int) -> Unfolded:
        """The way back through `fold`."""
        ...

    def normalise(self, x: NormedMap) -> Tensor:
        """The value, relu(scale · raw + offset)."""
        ...

    def normalise_backward(self, grad: Tensor, x: NormedMap) -> NormedMap:
        """Gradients of x.raw, x.scale and x.offset."""
        ...

    def plane_product(self, x: NormedMap, rows: Tensor, columns: Tensor) -> Tensor:
        """P · X · Qᵀ for each plane X of the value: x: (N, C, H, W), rows P: (R, H), columns Q: (S, W) -> (N, C, R, S).

        P and Q are float32, or float64 for a float64 map.
        """
        ...

    def upsampled_cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        class_weights: Tensor | None = None,
        align_corners: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """logits: (N, K, h, w), labels: (N, H, W) uint8 or int64 -> the mean loss (), and its gradient (N, K, h, w).

        class_weights: (K,), dense, in the logits' dtype; None weighs all pixels alike, at no cost.
        """
        ...

    def upsampled_confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = True
    ) -> Tensor:
        """Pixels by (label, best class): (K, K), int64."""
        ...


@runtime_checkable
class GradientSums(Protocol):
    """What adds all gradients of a map at once; some backends have it. Else autograd adds each as it comes, in less memory."""

    def sum_gradients(self, grads: Sequence[NormedMap]) -> NormedMap:
        """The sum of two or more gradients of one map, and of its scale and offset if it has a norm."""
        ...


@runtime_checkable
class IterationKernels(Protocol):
    """What begins an iteration of a training whose host must not wait for the device; some backends have it.

    All numbers that change from one iteration to the next are read from the device, so a captured graph can be replayed.
    """

    def crops(
        self,
        features: Tensor,
        labels: Tensor,
        draws: Tensor,
        crop: tuple[int, int],
        grid: Grid,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Windows of features (images, C, H, W), in the layout of kernels, and of contiguous labels (images, H_px, W_px).

        draws: (3, N), int32, are random numbers of 0 to 2³¹ - 1; the n-th crop is at ⌊draw · limit / 2³¹⌋ for image, top and
        left, in features. -> (N, C, *crop) in `dtype`, and labels (N, *grid.pixels(crop)).
        """
        ...

    def prepared_products(self, weights: Sequence[Tensor], dtype: torch.dtype) -> AbstractContextManager[None]:
        """Inside, 1×1 convolutions in `dtype` with these dense weights (C_out, C, 1, 1) find them rounded, by one launch.

        The weights must not change meanwhile.
        """
        ...

    def next_rate(self, rates: Tensor, done: Tensor, rate: Tensor) -> None:
        """Copy the done-th of all rates, or else the last, to `rate`; count one more.

        rates: (iterations + 1,), float32, done: (), int64, rate: (), float32.
        """
        ...
