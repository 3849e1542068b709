"""Convolutions with their batch norm on the kernels of `fast/kernels`, differentiable: maps stay raw until they are loaded."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.batch_norm import LiveNorm, start
from fast.kernels import Backend, Dropout, Folded, NormedMap, Unfolded, backend_for
from reference.pointwise_conv import ConvNorm


@dataclass(frozen=True)
class Depthwise:
    """3×3, one filter a channel."""

    rate: tuple[int, int]


@dataclass(frozen=True)
class Pointwise:
    """1×1 over all channels of one or several maps."""

    dropout: Dropout | None = None


class LiveConv(NamedTuple):
    """A convolution and its norm as they stand in a network."""

    weight: Tensor  # (C_out, C_in, 1, 1) pointwise, (C, 1, 3, 3) depthwise
    norm: LiveNorm


def in_mode(conv: ConvNorm[Tensor], training: bool, momentum: float) -> LiveConv:
    """The weights of a function whose caller says how their norm is to run."""
    return LiveConv(conv.weight, LiveNorm(conv.norm, training, momentum))


def value(x: NormedMap) -> Tensor:
    """relu(scale · raw + offset), differentiable."""
    if x.scale is None:
        return x.raw
    backend = backend_for(x.raw)
    assert backend is not None, "only kernels leave a norm to be applied"
    result: Tensor = _Normalise.apply(backend, *x)
    return result


def dense(x: NormedMap, backend: Backend) -> NormedMap:
    """The same map in the layout that the kernels read."""
    return NormedMap(x.raw.contiguous(memory_format=backend.memory_format), x.scale, x.offset)


def conv_norm(
    backend: Backend, conv: Depthwise | Pointwise, maps: Sequence[NormedMap], weight: Tensor, norm: LiveNorm | None
) -> NormedMap:
    """A convolution and its norm with ReLU, not yet applied; without a norm the raw output alone."""
    check_shapes(conv, maps, weight)
    weight, maps = weight.contiguous(), [dense(x, backend) for x in maps]
    if norm is None:
        raw: Any = _ConvNorm.apply(_Plan(backend, conv), *_Inputs(weight, None, None, maps).flat())
        return NormedMap(raw)
    plan = _Plan(backend, conv, norm, *start(norm, maps[0].raw))
    inputs = _Inputs(weight, norm.tensors.scale, norm.tensors.offset, maps)
    result: Any = _ConvNorm.apply(plan, *inputs.flat())
    return NormedMap(*result)


def check_shapes(conv: Depthwise | Pointwise, maps: Sequence[NormedMap], weight: Tensor) -> None:
    """A kernel sees addresses alone. Raises ValueError where the weight or the maps' sizes do not fit."""
    channels, sizes = sum(x.raw.shape[1] for x in maps), {(x.raw.shape[0], *x.raw.shape[2:]) for x in maps}
    depthwise = isinstance(conv, Depthwise)
    fits = weight.shape == (channels, 1, 3, 3) if depthwise else weight.ndim == 4 and weight.shape[1:] == (channels, 1, 1)
    if not fits or len(sizes) != 1 or (isinstance(conv, Depthwise) and min(conv.rate) < 1):
        shapes = [tuple(x.raw.shape) for x in maps]
        raise ValueError(f"{conv} of maps {shapes} does not fit the weight {tuple(weight.shape)}")


def is_inference(maps: Sequence[NormedMap], *convs: LiveConv) -> bool:
    """Whether all norms are frozen and no gradient is asked for, of any map, weight or norm."""
    if any(conv.norm.training for conv in convs):
        return False
    tensors = [*_flat(maps), *(tensor for conv in convs for tensor in (conv.weight, *conv.norm.tensors))]
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def frozen(norm: LiveNorm, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, (C,) each, of a norm that uses its running statistics on maps like raw."""
    scale, offset, *_ = _frozen(norm, raw)
    return scale, offset


class _Plan(NamedTuple):
    """What `_ConvNorm` is to do, all but the tensors that get gradients."""

    backend: Backend
    conv: Depthwise | Pointwise
    norm: LiveNorm | None = None
    training: bool = False  # and momentum: as `start` says
    momentum: float = 0.0


class _Inputs(NamedTuple):
    """The tensors that `_ConvNorm` takes; also the container of their gradients, and of whether each needs one."""

    weight: Any
    gamma: Any
    beta: Any
    maps: Sequence[Any]  # a NormedMap each, or None

    def flat(self) -> list[Any]:
        """One after the other, as autograd hands them over and takes their gradients back."""
        return [self.weight, self.gamma, self.beta, *_flat(self.maps)]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> "_Inputs":
        """The way back from `flat`."""
        weight, gamma, beta = flat[:3]
        return cls(weight, gamma, beta, _maps(flat[3:]))


class _ConvNorm(torch.autograd.Function):
    """Forward gives raw, scale, offset; backward gets the gradients of all three and hands them on."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> Any:
        backend, conv, norm, training, momentum = plan
        raw, moments = _convolve(backend, conv, _Inputs.of(tensors), statistics=training)
        ctx.plan, ctx.count = plan, raw.shape[0] * raw.shape[2] * raw.shape[3]
        ctx.autocast = torch.is_autocast_enabled(raw.device.type), torch.get_autocast_dtype(raw.device.type)
        ctx.set_materialize_grads(False)
        if norm is None:
            ctx.save_for_backward(raw, None, None, None, None, *tensors)
            return raw
        if training:
            folded = backend.fold(moments, norm.tensors, count=ctx.count, momentum=momentum, eps=norm.eps)
        else:
            folded = _frozen(norm, raw)
        ctx.save_for_backward(raw, *folded, *tensors)
        return raw, folded.scale, folded.offset

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_raw: Tensor | None, grad_scale: Tensor | None = None, grad_offset: Tensor | None = None
    ) -> Any:
        backend, conv, norm, training, _ = ctx.plan
        raw, scale, offset, mean, inv_std, *tensors = ctx.saved_tensors
        inputs, needed = _Inputs.of(tensors), _Inputs.of(ctx.needs_input_grad[1:])  # the first is the plan
        grad_gamma = grad_beta = through_statistics = None
        if norm is not None:
            grads = _given(grad_scale, scale), _given(grad_offset, offset)
            unfolded = backend.unfold(*grads, Folded(scale, offset, mean, inv_std), inputs.gamma, count=ctx.count)
            grad_gamma, grad_beta = unfolded.gamma.to(inputs.gamma.dtype), unfolded.beta.to(inputs.gamma.dtype)
            through_statistics = unfolded if training else None
        grad = _given(grad_raw, raw).contiguous(memory_format=backend.memory_format)
        with _autocast(raw.device.type, *ctx.autocast):
            grad_weight, grad_maps = _convolve_backward(backend, conv, grad, raw, through_statistics, inputs, needed)
        return None, *_Inputs(grad_weight, grad_gamma, grad_beta, grad_maps).flat()


def _convolve(backend: Backend, conv: Depthwise | Pointwise, inputs: _Inputs, *, statistics: bool) -> tuple[Tensor, Any]:
    """Raw output and its moments, or None without `statistics`."""
    if isinstance(conv, Depthwise):
        (x,) = inputs.maps
        return backend.depthwise_forward(x, inputs.weight, conv.rate, statistics=statistics)
    return backend.pointwise_forward(inputs.maps, inputs.weight, conv.dropout, statistics=statistics)


def _convolve_backward(
    backend: Backend,
    conv: Depthwise | Pointwise,
    grad: Tensor,
    raw: Tensor,
    unfolded: Unfolded | None,
    inputs: _Inputs,
    needed: _Inputs,
) -> tuple[Tensor, Sequence[NormedMap | None]]:
    """Gradients of the weight and of the maps that need one, given that of the raw output."""
    if isinstance(conv, Depthwise):
        (x,), (need,) = inputs.maps, needed.maps
        grad_x, grad_weight = backend.depthwise_backward(
            grad, raw, unfolded, x, inputs.weight, conv.rate, need_input=any(need)
        )
        return grad_weight, [grad_x]
    need_input = [any(need) for need in needed.maps]
    grad_maps, grad_weight = backend.pointwise_backward(
        grad, raw, unfolded, inputs.maps, inputs.weight, conv.dropout, need_input=need_input
    )
    return grad_weight, grad_maps


def plane_product(backend: Backend, x: NormedMap, rows: Tensor, columns: Tensor) -> Tensor:
    """P · X · Qᵀ for every plane X of the value: (N, C, H, W), rows P: (R, H), columns Q: (S, W) -> (N, C, R, S)."""
    result: Tensor = _PlaneProduct.apply((backend, rows, columns), *dense(x, backend))
    return result


class _PlaneProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: tuple[Backend, Tensor, Tensor], *tensors: Tensor | None) -> Tensor:
        backend, rows, columns = ctx.plan = plan  # matrices without gradient
        ctx.save_for_backward(*tensors)
        (x,) = _maps(tensors)
        return backend.plane_product(x, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        backend, rows, columns = ctx.plan
        (x,) = _maps(ctx.saved_tensors)
        grad = grad.contiguous(memory_format=backend.memory_format)
        grad_value = backend.plane_product(NormedMap(grad), rows.T.contiguous(), columns.T.contiguous())
        return None, *backend.normalise_backward(grad_value, x)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, *tensors: Tensor | None) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*tensors)
        (x,) = _maps(tensors)
        return backend.normalise(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = _maps(ctx.saved_tensors)
        grad = grad.contiguous(memory_format=ctx.backend.memory_format)
        return None, *ctx.backend.normalise_backward(grad, x)


def _flat(maps: Sequence[NormedMap | None]) -> list[Any]:
    """The three tensors of each map, one after the other."""
    return [tensor for x in maps for tensor in (x or (None, None, None))]


def _maps(flat: Sequence[Any]) -> list[NormedMap]:
    """The way back from `_flat`."""
    return [NormedMap(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _frozen(norm: LiveNorm, raw: Tensor) -> Folded:
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    gamma, beta, mean, var = (tensor.to(dtype) for tensor in norm.tensors)
    inv_std = (var + norm.eps).rsqrt()
    return Folded(gamma * inv_std, beta - mean * gamma * inv_std, mean, inv_std)


def _autocast(device: str, enabled: bool, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The mode of the forward pass, entered only where it differs: entering takes microseconds, as a small product does."""
    differs = enabled or torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled=enabled) if differs else nullcontext()


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
