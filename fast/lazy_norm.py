"""Convolutions with their batch norm on the kernels of `fast/kernels`, differentiable: maps stay raw until they are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.batch_norm import MOMENTUM, uses_batch_statistics
from fast.kernels import Backend, Dropout, Folded, NormedMap, Unfolded, backend_for
from reference.batch_norm import EPS, BatchNorm
from reference.pointwise_conv import ConvNorm


@dataclass(frozen=True)
class Depthwise:
    """3×3, one filter a channel."""

    rate: tuple[int, int]


@dataclass(frozen=True)
class Pointwise:
    """1×1 over all channels of one or several maps."""

    dropout: Dropout | None = None


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
    return x._replace(raw=x.raw.contiguous(memory_format=backend.memory_format))


def conv_norm(
    backend: Backend,
    conv: Depthwise | Pointwise,
    maps: Sequence[NormedMap],
    weight: Tensor,
    norm: BatchNorm[Tensor] | None,
    *,
    training: bool = False,
    momentum: float = MOMENTUM,
) -> NormedMap:
    """A convolution and its norm with ReLU, not yet applied; without a norm the raw output alone."""
    check_shapes(conv, maps, weight)
    training = norm is not None and uses_batch_statistics(maps[0].raw, training)
    tensors = [tensor for x in maps for tensor in dense(x, backend)]
    result: Any = _ConvNorm.apply(backend, conv, training, momentum, weight.contiguous(), *(norm or [None] * 4), *tensors)
    return NormedMap(*result) if norm else NormedMap(result)


def check_shapes(conv: Depthwise | Pointwise, maps: Sequence[NormedMap], weight: Tensor) -> None:
    """A kernel sees addresses alone. Raises ValueError where the weight or the maps' sizes do not fit."""
    channels, sizes = sum(x.raw.shape[1] for x in maps), {(x.raw.shape[0], *x.raw.shape[2:]) for x in maps}
    depthwise = isinstance(conv, Depthwise)
    fits = weight.shape == (channels, 1, 3, 3) if depthwise else weight.ndim == 4 and weight.shape[1:] == (channels, 1, 1)
    if not fits or len(sizes) != 1 or (isinstance(conv, Depthwise) and min(conv.rate) < 1):
        shapes = [tuple(x.raw.shape) for x in maps]
        raise ValueError(f"{conv} of maps {shapes} does not fit the weight {tuple(weight.shape)}")


def is_inference(*tensors: Tensor | NormedMap | ConvNorm[Tensor], training: bool) -> bool:
    """Whether norms are frozen and no gradient is asked for, of any of these or what is inside."""
    return not training and not (torch.is_grad_enabled() and any(map(_requires_grad, tensors)))


def _requires_grad(tree: Any) -> bool:
    return tree.requires_grad if isinstance(tree, Tensor) else any(leaf is not None and _requires_grad(leaf) for leaf in tree)


def frozen(norm: BatchNorm[Tensor], raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, (C,) each, of a norm that uses its running statistics on maps like raw."""
    scale, offset, *_ = _frozen(norm, raw)
    return scale, offset


class _ConvNorm(torch.autograd.Function):
    """Forward gives raw, scale, offset; backward gets the gradients of all three and hands them on."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        conv: Depthwise | Pointwise,
        training: bool,
        momentum: float,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *tensors: Tensor | None,
    ) -> Any:
        maps = _maps(tensors)
        batch, _, height, width = maps[0].raw.shape
        count = batch * height * width
        if isinstance(conv, Depthwise):
            raw, moments = backend.depthwise_forward(maps[0], weight, conv.rate, statistics=training)
        else:
            raw, moments = backend.pointwise_forward(maps, weight, conv.dropout, statistics=training)
        folded = None
        if gamma is not None:
            norm: BatchNorm[Any] = BatchNorm(gamma, beta, running_mean, running_var)
            folded = backend.fold(moments, norm, count=count, momentum=momentum, eps=EPS) if training else _frozen(norm, raw)
        ctx.backend, ctx.conv, ctx.count, ctx.training = backend, conv, count, training
        ctx.autocast = torch.is_autocast_enabled(raw.device.type), torch.get_autocast_dtype(raw.device.type)
        ctx.save_for_backward(weight, gamma, raw, *(folded or [None] * 4), *tensors)
        ctx.set_materialize_grads(False)
        return raw if folded is None else (raw, folded.scale, folded.offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        weight, gamma, raw, *rest = ctx.saved_tensors
        folded, maps = (None if rest[0] is None else Folded(*rest[:4])), _maps(rest[4:])
        grad = _given(grads[0], raw)
        unfolded = None
        if folded is not None:
            grad_scale, grad_offset = _given(grads[1], folded.scale), _given(grads[2], folded.offset)
            unfolded = ctx.backend.unfold(grad_scale, grad_offset, folded, gamma, count=ctx.count)
        need_input = [ctx.needs_input_grad[9 + 3 * i] for i in range(len(maps))]
        grad = grad.contiguous(memory_format=ctx.backend.memory_format)
        through_statistics = unfolded if ctx.training else None
        with torch.autocast(raw.device.type, ctx.autocast[1], enabled=ctx.autocast[0]):
            grad_maps, grad_weight = _backward(ctx.backend, ctx.conv, grad, raw, through_statistics, maps, weight, need_input)
        grad_norm = (None, None) if unfolded is None else (unfolded.gamma.to(gamma.dtype), unfolded.beta.to(gamma.dtype))
        tensors = [tensor for x in grad_maps for tensor in (x or (None, None, None))]
        return None, None, None, None, grad_weight, *grad_norm, None, None, *tensors


def _backward(
    backend: Backend,
    conv: Depthwise | Pointwise,
    grad: Tensor,
    raw: Tensor,
    unfolded: Unfolded | None,
    maps: list[NormedMap],
    weight: Tensor,
    need_input: list[bool],
) -> tuple[list[NormedMap | None], Tensor]:
    if isinstance(conv, Pointwise):
        return backend.pointwise_backward(grad, raw, unfolded, maps, weight, conv.dropout, need_input=need_input)
    grad_map, grad_weight = backend.depthwise_backward(
        grad, raw, unfolded, maps[0], weight, conv.rate, need_input=need_input[0]
    )
    return [grad_map], grad_weight


def plane_product(backend: Backend, x: NormedMap, rows: Tensor, columns: Tensor) -> Tensor:
    """P · X · Qᵀ for every plane X of the value: (N, C, H, W), rows P: (R, H), columns Q: (S, W) -> (N, C, R, S)."""
    result: Tensor = _PlaneProduct.apply(backend, rows, columns, *dense(x, backend))
    return result


class _PlaneProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, rows: Tensor, columns: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(rows, columns, *tensors)
        (x,) = _maps(tensors)
        return backend.plane_product(x, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, columns, *tensors = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.backend.memory_format)
        grad_value = ctx.backend.plane_product(NormedMap(grad), rows.T.contiguous(), columns.T.contiguous())
        return None, None, None, *ctx.backend.normalise_backward(grad_value, *_maps(tensors))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, raw: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(raw, scale, offset)
        return backend.normalise(NormedMap(raw, scale, offset))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous(memory_format=ctx.backend.memory_format)
        return None, *ctx.backend.normalise_backward(grad, NormedMap(*ctx.saved_tensors))


def _maps(tensors: Sequence[Tensor | None]) -> list[NormedMap]:
    return [NormedMap(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]  # type: ignore[arg-type]  # raw is never None


def _frozen(norm: BatchNorm[Tensor], raw: Tensor) -> Folded:
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    gamma, beta, mean, var = (tensor.to(dtype) for tensor in norm)
    inv_std = (var + EPS).rsqrt()
    return Folded(gamma * inv_std, beta - mean * gamma * inv_std, mean, inv_std)


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
