"""The project's own kernels, in C++ for CPUs (`cpp/`) and in Triton for GPUs, behind one interface.

Kernels pass a map on as the raw output of its convolution with two numbers per channel: its value is
relu(scale · raw + offset). The kernel that loads the map applies them, so no normalised map is ever written. The batch norm
only costs the sums that the convolution takes of its output while that is still in a register or a cache. In the backward
pass, the gradient that flows through a convolution's statistics is slope · raw + intercept per channel, added on load.

    raw = conv(x)   mean, var over (N, H, W)      scale = γ / √(var + ε)    offset = β - mean · scale           (`fold`)
    G = ∂L/∂scale - mean · ∂L/∂offset             ∂L/∂γ = G / √(var + ε)    ∂L/∂β = ∂L/∂offset                  (`unfold`)
    slope = -γ · G / (var + ε)^(3/2) / (N·H·W)    intercept = -scale · ∂L/∂offset / (N·H·W) - slope · mean
"""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from reference.batch_norm import BatchNorm


class NormedMap(NamedTuple):
    """A map whose value is relu(scale · raw + offset), or raw if both are None. Also used for its gradients."""

    raw: Tensor  # (N, C, H, W)
    scale: Tensor | None = None  # (C,), float32, or float64 for a float64 map
    offset: Tensor | None = None  # (C,)


class Folded(NamedTuple):
    """A batch norm in training as two numbers per channel, and what its gradient needs."""

    scale: Tensor  # (C,)
    offset: Tensor  # (C,)
    mean: Tensor  # (C,)
    inv_std: Tensor  # (C,), 1 / √(var + ε)


class Unfolded(NamedTuple):
    """Gradients of a batch norm in training: of its parameters, and of its input through the statistics."""

    slope: Tensor  # (C,)
    intercept: Tensor  # (C,)
    gamma: Tensor  # (C,)
    beta: Tensor  # (C,)


class Dropout(NamedTuple):
    """Which elements of a concatenation are dropped: a function of the seed and of each element's place alone."""

    rate: float  # in (0, 1)
    seed: Tensor  # (1,), int64, on the device: a captured CUDA graph draws a new one at each replay


class Backend(Protocol):
    """The functions of a device's kernels. Maps are dense in `memory_format`; results are the same at every call.

    `moments` has a type of the backend's own: what `fold` needs to know of the sums over (N, H, W).
    """

    memory_format: torch.memory_format

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
        """The map's value after a frozen norm, which is given as scale and offset, (C_out,) each -> (N, C_out, H, W)."""
        ...

    def separable_inference(
        self,
        x: NormedMap,
        depthwise_weight: Tensor,
        depthwise_norm: tuple[Tensor, Tensor],
        rate: tuple[int, int],
        pointwise_weight: Tensor,
        pointwise_norm: tuple[Tensor, Tensor],
    ) -> Tensor:
        """A whole separable convolution with frozen norms, each as scale and offset: (C,) each -> (N, C_out, H, W)."""
        ...

    def fold(self, moments: Any, norm: BatchNorm[Tensor], *, count: int, momentum: float, eps: float) -> Folded:
        """Compute scale and offset from batch statistics over `count` values a channel; update running statistics in place."""
        ...

    def unfold(self, grad_scale: Tensor, grad_offset: Tensor, folded: Folded, gamma: Tensor, *, count: int) -> Unfolded:
        """The backward pass of `fold`."""
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

    def upsampled_cross_entropy(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """logits: (N, K, h, w), labels: (N, H, W) uint8 or int64 -> the mean loss (), and its gradient (N, K, h, w)."""
        ...

    def upsampled_confusion_matrix(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Pixels by (label, best class): (K, K), int64."""
        ...


_AUTOMATIC = "by device"
_chosen: ContextVar[Backend | str | None] = ContextVar("chosen_backend", default=_AUTOMATIC)


@contextlib.contextmanager
def using(backend: Backend | None) -> Iterator[None]:
    """Inside, use these kernels for any device, or with None PyTorch's operations (to compare, or to differentiate twice).

    This holds in the present context: a thread that is started inside chooses by device again. torch.compile always traces
    PyTorch's operations.
    """
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def backend_for(x: Tensor) -> Backend | None:
    """The kernels for maps such as x, or None if PyTorch is to compute: if chosen, when tracing, or without kernels for x."""
    if torch.compiler.is_compiling():  # asked first: torch.compile of torch 2.11 cannot trace a ContextVar
        return None
    chosen = _chosen.get()
    if not isinstance(chosen, str):
        return chosen
    traced = torch._C._get_tracing_state() is not None  # torch.jit.trace, ONNX
    traced = traced or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func, vmap
    if traced or type(x) not in (Tensor, torch.nn.Parameter) or x.numel() == 0:
        return None
    if x.device.type == "cuda" and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = "triton"
    elif x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        name = "cpu"
    else:
        return None
    module = importlib.import_module(f"fast.kernels.{name}")
    return cast(Backend, module) if module.is_available() else None
