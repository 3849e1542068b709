"""The C++ kernels beside this file as a `Backend`: checks, allocations and calls through ctypes, without Python's lock.

Under torch.autocast, pointwise products are PyTorch's, in bf16, for processors with AMX or AVX-512 bf16.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.kernels.cpp import build
from fast.kernels.interface import Dropout, Folded, NormedMap, Unfolded
from reference.batch_norm import BatchNorm
from reference.bilinear_resize import interpolation_taps

name = "C++ kernels"
memory_format = torch.contiguous_format

_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.uint8: "u8", torch.int64: "i64"}


def supports(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the C++ kernels compute on a CPU, this map is on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the C++ kernels compute float32 and float64, this map is {str(x.dtype).removeprefix('torch.')}"
    library = build.library()  # last, as it may have to be compiled
    return library if isinstance(library, str) else None


def depthwise_forward(x: NormedMap, weight: Tensor, rate: tuple[int, int], *, statistics: bool) -> tuple[Tensor, Any]:
    out = torch.empty_like(x.raw)
    moments = _Moments(x.raw, x.raw.shape[1]) if statistics else None
    n, _, height, width = x.raw.shape
    _call("depthwise_forward", x.raw, _map(x, x.raw), weight, n, height, width, *rate, out, *_pointers(moments))
    return out, moments


def depthwise_backward(
    grad: Tensor,
    raw: Tensor,
    unfolded: Unfolded | None,
    x: NormedMap,
    weight: Tensor,
    rate: tuple[int, int],
    *,
    need_input: bool,
) -> tuple[NormedMap | None, Tensor]:
    n, _, height, width = x.raw.shape
    grad_weight, grad_x = torch.empty_like(weight), _empty_gradient(x) if need_input else None
    gradient = _gradient(grad, raw, unfolded)
    _call(
        "depthwise_backward",
        x.raw,
        gradient,
        _map(x, x.raw),
        weight,
        n,
        height,
        width,
        *rate,
        _map_gradient(grad_x),
        grad_weight,
    )
    return grad_x, grad_weight


def pointwise_forward(
    maps: Sequence[NormedMap], weight: Tensor, dropout: Dropout | None, *, statistics: bool
) -> tuple[Tensor, Any]:
    if _products_are_bf16(maps[0].raw):
        return _bf16_pointwise_forward(maps, weight, dropout, statistics=statistics)
    return _pointwise_forward(maps, weight, dropout, None, statistics=statistics)


def pointwise_inference(maps: Sequence[NormedMap], weight: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    if _products_are_bf16(maps[0].raw):
        raw, _ = _bf16_pointwise_forward(maps, weight, None, statistics=False)
        return normalise(NormedMap(raw, *norm))
    out, _ = _pointwise_forward(maps, weight, None, norm, statistics=False)
    return out


def _pointwise_forward(
    maps: Sequence[NormedMap],
    weight: Tensor,
    dropout: Dropout | None,
    norm: tuple[Tensor, Tensor] | None,
    *,
    statistics: bool,
) -> tuple[Tensor, Any]:
    n, _, height, width = maps[0].raw.shape
    out = maps[0].raw.new_empty(n, weight.shape[0], height, width)
    moments = _Moments(out, weight.shape[0]) if statistics else None
    array = _array(_Map, [_map(x, maps[0].raw) for x in maps])
    _call(
        "pointwise_forward",
        out,
        array,
        len(maps),
        weight,
        weight.shape[0],
        n,
        height * width,
        *_dropout(dropout),
        *(norm or (None, None)),
        out,
        *_pointers(moments),
    )
    return out, moments


def pointwise_backward(
    grad: Tensor,
    raw: Tensor,
    unfolded: Unfolded | None,
    maps: Sequence[NormedMap],
    weight: Tensor,
    dropout: Dropout | None,
    *,
    need_input: Sequence[bool],
) -> tuple[list[NormedMap | None], Tensor]:
    if _products_are_bf16(maps[0].raw):
        return _bf16_pointwise_backward(grad, raw, unfolded, maps, weight, dropout, need_input=need_input)
    n, _, height, width = maps[0].raw.shape
    grad_weight = torch.empty_like(weight)
    grad_maps = [_empty_gradient(x) if needed else None for x, needed in zip(maps, need_input, strict=True)]
    _call(
        "pointwise_backward",
        grad,
        _gradient(grad, raw, unfolded),
        _array(_Map, [_map(x, maps[0].raw) for x in maps]),
        len(maps),
        weight,
        weight.shape[0],
        n,
        height * width,
        *_dropout(dropout),
        _array(_MapGradient, [_map_gradient(g) for g in grad_maps]),
        grad_weight,
    )
    return grad_maps, grad_weight


def _products_are_bf16(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _bf16_pointwise_forward(
    maps: Sequence[NormedMap], weight: Tensor, dropout: Dropout | None, *, statistics: bool
) -> tuple[Tensor, Any]:
    n, _, height, width = maps[0].raw.shape
    with torch.autocast("cpu", enabled=False):
        parts = [w.bfloat16() @ x for w, x in zip(_split(weight, maps), _bf16_values(maps, dropout), strict=True)]
        out = torch.stack([part.float() for part in parts]).sum(0).view(n, weight.shape[0], height, width)
        moments = _Moments(out, weight.shape[0]) if statistics else None
        if moments is not None:
            moments.var, moments.mean = torch.var_mean(out, (0, 2, 3), correction=0)
    return out, moments


def _bf16_pointwise_backward(
    grad: Tensor,
    raw: Tensor,
    unfolded: Unfolded | None,
    maps: Sequence[NormedMap],
    weight: Tensor,
    dropout: Dropout | None,
    *,
    need_input: Sequence[bool],
) -> tuple[list[NormedMap | None], Tensor]:
    if unfolded is not None:
        grad = grad + (unfolded.slope[:, None, None] * raw + unfolded.intercept[:, None, None])
    with torch.autocast("cpu", enabled=False):
        g = grad.flatten(2).bfloat16()  # (N, C_out, H·W)
        grad_weights = [(g @ x.mT).float().sum(0) for x in _bf16_values(maps, dropout)]
        grad_maps: list[NormedMap | None] = []
        first = 0
        for x, w, needed in zip(maps, _split(weight, maps), need_input, strict=True):
            grad_map = None
            if needed:
                grad_value = (w.mT.bfloat16() @ g).float().view_as(x.raw)
                grad_map = normalise_backward(
                    normalise(NormedMap(grad_value), dropout, first=first, channels=weight.shape[1]), x
                )
            grad_maps.append(grad_map)
            first += x.raw.shape[1]
    return grad_maps, torch.cat(grad_weights, dim=1).view_as(weight)


def _bf16_values(maps: Sequence[NormedMap], dropout: Dropout | None) -> Iterator[Tensor]:
    """The value of each map after dropout: (N, C, H·W)."""
    first, channels = 0, sum(x.raw.shape[1] for x in maps)
    for x in maps:
        yield normalise(x, dropout, first=first, channels=channels).flatten(2).bfloat16()
        first += x.raw.shape[1]


def _split(weight: Tensor, maps: Sequence[NormedMap]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(weight.flatten(1), [x.raw.shape[1] for x in maps], dim=1)


def fold(moments: "_Moments", norm: BatchNorm[Tensor], *, count: int, momentum: float, eps: float) -> Folded:
    mean, var = moments.mean, moments.var
    inv_std = (var + eps).rsqrt()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    scale = norm.scale.to(mean.dtype) * inv_std
    return Folded(scale, norm.offset.to(mean.dtype) - mean * scale, mean, inv_std)


def unfold(grad_scale: Tensor, grad_offset: Tensor, folded: Folded, gamma: Tensor, *, count: int) -> Unfolded:
    scale, _, mean, inv_std = folded
    centred = grad_scale - mean * grad_offset
    slope = gamma * centred * inv_std**3 / -count
    return Unfolded(slope, scale * grad_offset / -count - slope * mean, centred * inv_std, grad_offset)


def normalise(x: NormedMap, dropout: Dropout | None = None, *, first: int = 0, channels: int = 0) -> Tensor:
    """The map's value; `dropout` is that of channels `first` and on in a concatenation of `channels`."""
    out = torch.empty_like(x.raw)
    size = x.raw.shape[2] * x.raw.shape[3]
    _call("normalise", out, _map(x, x.raw), x.raw.shape[0], size, *_dropout(dropout), first, channels, out)
    return out


def normalise_backward(grad: Tensor, x: NormedMap) -> NormedMap:
    if x.scale is None:
        return NormedMap(grad)
    grad_x = _empty_gradient(x)
    grad_x.raw.copy_(grad)
    _call("normalise_backward", grad, _map(x, grad), x.raw.shape[0], x.raw.shape[2] * x.raw.shape[3], _map_gradient(grad_x))
    return grad_x


def plane_product(x: NormedMap, rows: Tensor, columns: Tensor) -> Tensor:
    n, channels, height, width = x.raw.shape
    out = x.raw.new_empty(n, channels, rows.shape[0], columns.shape[0])
    _call("plane_product", out, _map(x, x.raw), rows, columns, n, height, width, rows.shape[0], columns.shape[0], out)
    return out


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    align_corners: bool = True,
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    grad, loss = torch.empty_like(logits), torch.zeros((), dtype=torch.float64)
    if class_weights is not None:
        _check(class_weights, logits)
    _call_with_labels("upsampled_cross_entropy", logits, labels, ignore_index, align_corners, class_weights, loss, grad)
    return loss.to(logits.dtype), grad


def upsampled_confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = True) -> Tensor:
    logits = logits.contiguous()
    confusion = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.int64)
    _call_with_labels("upsampled_confusion_matrix", logits, labels, ignore_index, align_corners, confusion)
    return confusion


def _call_with_labels(
    name: str, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, *rest: Tensor | None
) -> None:
    n, classes, height, width = logits.shape
    if labels.dtype != torch.uint8:
        labels = labels.to(torch.int64)
    axes = (_axis(height, labels.shape[1], align_corners), _axis(width, labels.shape[2], align_corners))
    arguments = (logits, labels.contiguous(), n, classes, *axes, ignore_index, *rest)
    function = _function(f"{name}_{_SUFFIX[logits.dtype]}_{_SUFFIX[labels.dtype]}", ctypes.c_bool)
    if not function(*map(_argument, arguments), torch.get_num_threads()):
        wrong = sorted(set(labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))].tolist()))
        raise ValueError(f"labels must be 0 to {classes - 1}, or {ignore_index} to be ignored, got {wrong}")


class _Moments:
    """Mean and biased variance per channel, written by a kernel."""

    def __init__(self, like: Tensor, channels: int) -> None:
        self.mean, self.var = like.new_empty(channels), like.new_empty(channels)


# The structs of cpp/maps.h. A struct of pointers owns nothing, so the caller keeps the tensors until the call returns.
class _Map(ctypes.Structure):
    _fields_ = (
        ("raw", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("channels", ctypes.c_long),
    )


class _MapGradient(ctypes.Structure):
    _fields_ = (("raw", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p))


class _Gradient(ctypes.Structure):
    _fields_ = (
        ("grad", ctypes.c_void_p),
        ("raw", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("intercept", ctypes.c_void_p),
    )


class _Axis(ctypes.Structure):
    _fields_ = (
        ("interval", ctypes.c_void_p),
        ("fraction", ctypes.c_void_p),
        ("in_size", ctypes.c_long),
        ("out_size", ctypes.c_long),
    )


def _map(x: NormedMap, like: Tensor) -> _Map:
    for tensor in x:
        if tensor is not None:
            _check(tensor, like)
    return _Map(x.raw.data_ptr(), _address(x.scale), _address(x.offset), x.raw.shape[1])


def _empty_gradient(x: NormedMap) -> NormedMap:
    return NormedMap(*(None if tensor is None else torch.empty_like(tensor) for tensor in x))  # type: ignore[arg-type]


def _map_gradient(x: NormedMap | None) -> _MapGradient:
    return _MapGradient() if x is None else _MapGradient(*(_address(tensor) for tensor in x))


def _gradient(grad: Tensor, raw: Tensor, unfolded: Unfolded | None) -> _Gradient:
    for tensor in (grad, *((raw, *unfolded[:2]) if unfolded else ())):
        _check(tensor, raw)
    slope, intercept = (None, None) if unfolded is None else unfolded[:2]
    return _Gradient(grad.data_ptr(), raw.data_ptr(), _address(slope), _address(intercept))


def _array(struct: Any, items: list[Any]) -> Any:
    return (struct * len(items))(*items)


def _dropout(dropout: Dropout | None) -> tuple[ctypes.c_double, ctypes.c_uint64]:
    rate, seed = (0.0, 0) if dropout is None else (dropout.rate, int(dropout.seed.item()))
    return ctypes.c_double(rate), ctypes.c_uint64(seed)


def _pointers(moments: _Moments | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if moments is None else (moments.mean, moments.var)


@functools.lru_cache(maxsize=64)
def _axis(in_size: int, out_size: int, align_corners: bool) -> _Axis:
    if align_corners:
        low, fraction = interpolation_taps(in_size, out_size, align_corners=True)
    else:  # beyond the outermost inputs the position goes on, as fractions must grow evenly there too
        low, rest = np.divmod((2 * np.arange(out_size) + 1) * in_size - out_size, 2 * out_size)
        fraction = rest / (2 * out_size)
    interval, fraction = np.ascontiguousarray(low + 1, dtype=np.int32), np.ascontiguousarray(fraction)
    axis = _Axis(interval.ctypes.data, fraction.ctypes.data, in_size, out_size)
    axis.arrays = (interval, fraction)  # kept alive as long as the pointers
    return axis


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_long(value) if isinstance(value, int) else value


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    """Call the kernel for like's dtype, on as many threads as PyTorch would use."""
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            _check(tensor, like)
    _function(f"{name}_{_SUFFIX[like.dtype]}")(*map(_argument, arguments), torch.get_num_threads())


def _check(tensor: Tensor, like: Tensor) -> None:
    """Check what a kernel assumes of its tensors, because it only sees their addresses."""
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(f"tensors must share dtype and device: {tensor.dtype} {tensor.device}, {like.dtype} {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"kernels need contiguous tensors, got {tuple(tensor.shape)} with strides {tensor.stride()}")


@functools.cache
def _function(name: str, result: Any = None) -> Any:
    function = getattr(build.library(), name)
    function.restype = result
    return function
