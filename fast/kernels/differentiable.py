"""`Operations` on the kernels of any `Backend`, differentiable once: maps stay raw until they are loaded."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast.batch_norm import LiveNorm, start
from fast.kernels.interface import Backend, Dropout, Folded, GradientSums, LiveConv, NormedMap, Unfolded, check_dropout_rate
from fast.kernels.matrices import pooling_matrix, resize_matrix
from reference.pyramid_pooling import PoolingVariant

_REMEDY = f"run the forward pass within `{__package__}.using(None)`, whose operations can be differentiated again"

Backward = Callable[..., Any]


def differentiable_once(remedy: str) -> Callable[[Backward], Backward]:
    """For the backward pass of an autograd function that gives one first derivative at a time.

    PyTorch's `once_differentiable` leaves out second derivatives without a word where the incoming gradient is a constant.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _are_batched(grads)):
                raise RuntimeError(f"this is differentiable once, without create_graph=True or batched gradients: {remedy}")
            return backward(ctx, *grads)

        return checked

    return decorate


def _are_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether vmap, or `torch.autograd.functional.jacobian(vectorize=True)`, wants many gradients at once."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None:
        return True
    return any(grad is not None and functorch.is_legacy_batchedtensor(grad) for grad in grads)


class OnKernels:
    """The operations on the kernels of one backend; `interface.Operations` documents what each method does.

    Where norms are frozen and nobody asks for a gradient, a convolution writes its value in one pass.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def dense(self, x: NormedMap) -> NormedMap:
        return NormedMap(x.raw.contiguous(memory_format=self.backend.memory_format), x.scale, x.offset)

    def value(self, x: NormedMap) -> Tensor:
        if x.scale is None:
            return x.raw
        result: Tensor = _Normalise.apply(self.backend, *x)
        return result

    def fan_out(self, x: NormedMap, readers: int) -> list[NormedMap]:
        needs_gradient = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in x)
        if readers < 2 or not needs_gradient or not isinstance(self.backend, GradientSums):
            return [x] * readers
        flat: Any = _FanOut.apply((self.backend, readers), *x)
        return _maps(flat)

    def depthwise_conv(self, x: NormedMap, weight: Tensor, norm: LiveNorm | None, *, rate: tuple[int, int]) -> NormedMap:
        return self._conv_norm(Depthwise(rate), [x], weight, norm)

    def pointwise_conv(
        self, maps: Sequence[NormedMap], weight: Tensor, norm: LiveNorm | None, *, dropout_rate: float = 0.0
    ) -> NormedMap:
        check_dropout_rate(dropout_rate)
        if dropout_rate > 0.0:
            return self._conv_norm(Pointwise(_draw_dropout(dropout_rate, weight.device)), maps, weight, norm)
        if norm is None or not _is_inference(maps, LiveConv(weight, norm)):
            return self._conv_norm(Pointwise(), maps, weight, norm)
        _check_shapes(Pointwise(), maps, weight)
        maps = [self.dense(x) for x in maps]
        return NormedMap(self.backend.pointwise_inference(maps, weight.contiguous(), _scale_and_offset(norm, maps[0])))

    def separable_conv(self, x: NormedMap, depthwise: LiveConv, pointwise: LiveConv, *, rate: tuple[int, int]) -> NormedMap:
        return self.pointwise_conv([self.depthwise_conv(x, *depthwise, rate=rate)], *pointwise)

    def pooling_means(
        self, x: NormedMap, grid_size: tuple[int, int], variant: PoolingVariant, pooling_size: tuple[int, int] | None
    ) -> Tensor:
        like = (torch.promote_types(x.raw.dtype, torch.float32), x.raw.device)
        pins = pooling_size or (None, None)
        rows, columns = (pooling_matrix(x.raw.shape[2 + i], grid_size[i], variant, pins[i], *like) for i in range(2))
        return self._plane_product(x, rows, columns)

    def resize(self, x: NormedMap, size: tuple[int, int], align_corners: bool = True) -> Tensor:
        like = (torch.promote_types(x.raw.dtype, torch.float32), x.raw.device)
        rows, columns = (resize_matrix(x.raw.shape[2 + i], size[i], *like, align_corners) for i in range(2))
        return self._plane_product(x, rows, columns)

    def upsampled_cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        class_weights: Tensor | None = None,
        align_corners: bool = True,
    ) -> tuple[Tensor, Tensor]:
        return self.backend.upsampled_cross_entropy(logits, labels, ignore_index, class_weights, align_corners)

    def upsampled_confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = True
    ) -> Tensor:
        return self.backend.upsampled_confusion_matrix(logits, labels, ignore_index, align_corners)

    def _conv_norm(
        self, conv: "Depthwise | Pointwise", maps: Sequence[NormedMap], weight: Tensor, norm: LiveNorm | None
    ) -> NormedMap:
        """A convolution and its norm with ReLU, not yet applied; without a norm the raw output alone."""
        _check_shapes(conv, maps, weight)
        weight, maps = weight.contiguous(), [self.dense(x) for x in maps]
        if norm is None:
            raw: Any = _ConvNorm.apply(_Plan(self.backend, conv), *_Inputs(weight, None, None, maps).flat())
            return NormedMap(raw)
        plan = _Plan(self.backend, conv, norm, *start(norm, maps[0].raw))
        inputs = _Inputs(weight, norm.tensors.scale, norm.tensors.offset, maps)
        result: Any = _ConvNorm.apply(plan, *inputs.flat())
        return NormedMap(*result)

    def _plane_product(self, x: NormedMap, rows: Tensor, columns: Tensor) -> Tensor:
        """P · X · Qᵀ for every plane X of the value: (N, C, H, W), rows P: (R, H), columns Q: (S, W) -> (N, C, R, S)."""
        result: Tensor = _PlaneProduct.apply((self.backend, rows, columns), *self.dense(x))
        return result


@dataclass(frozen=True)
class Depthwise:
    """3×3, one filter a channel."""

    rate: tuple[int, int]


@dataclass(frozen=True)
class Pointwise:
    """1×1 over all channels of one or several maps."""

    dropout: Dropout | None = None


def _draw_dropout(rate: float, device: torch.device) -> Dropout:
    """A new mask: its seed is drawn on the device, so that a captured graph draws one at each replay."""
    return Dropout(rate, torch.randint(2**63 - 1, (1,), device=device))


def _check_shapes(conv: Depthwise | Pointwise, maps: Sequence[NormedMap], weight: Tensor) -> None:
    """A kernel sees addresses alone. Raises ValueError where the weight or the maps' sizes do not fit."""
    channels, sizes = sum(x.raw.shape[1] for x in maps), {(x.raw.shape[0], *x.raw.shape[2:]) for x in maps}
    depthwise = isinstance(conv, Depthwise)
    fits = weight.shape == (channels, 1, 3, 3) if depthwise else weight.ndim == 4 and weight.shape[1:] == (channels, 1, 1)
    if not fits or len(sizes) != 1 or (isinstance(conv, Depthwise) and min(conv.rate) < 1):
        shapes = [tuple(x.raw.shape) for x in maps]
        raise ValueError(f"{conv} of maps {shapes} does not fit the weight {tuple(weight.shape)}")


def _is_inference(maps: Sequence[NormedMap], *convs: LiveConv) -> bool:
    """Whether all norms are frozen and no gradient is asked for, of any map, weight or norm."""
    if any(conv.norm.training for conv in convs):
        return False
    tensors = [*_flat(maps), *(tensor for conv in convs for tensor in (conv.weight, *conv.norm.tensors))]
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def _scale_and_offset(norm: LiveNorm, x: NormedMap) -> tuple[Tensor, Tensor]:
    """(C,) each, of a norm that uses its running statistics on maps like x."""
    scale, offset, *_ = _frozen(norm, x.raw)
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
    @differentiable_once(_REMEDY)
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


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: tuple[GradientSums, int], *tensors: Tensor | None) -> Any:
        ctx.backend, readers = plan
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.detach() for _ in range(readers) for tensor in tensors)

    @staticmethod
    @differentiable_once(_REMEDY)
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        given = [grad for grad in _maps(grads) if grad.raw is not None]  # a reader gives all three, or came to nothing
        if len(given) < 2:
            return None, *(given[0] if given else (None, None, None))
        return None, *ctx.backend.sum_gradients(given)


class _PlaneProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: tuple[Backend, Tensor, Tensor], *tensors: Tensor | None) -> Tensor:
        backend, rows, columns = ctx.plan = plan  # matrices without gradient
        ctx.save_for_backward(*tensors)
        (x,) = _maps(tensors)
        return backend.plane_product(x, rows, columns)

    @staticmethod
    @differentiable_once(_REMEDY)
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
    @differentiable_once(_REMEDY)
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
