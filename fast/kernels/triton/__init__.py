"""The Triton kernels in this folder as a `Backend`: checks, allocations, grids and block sizes, but no arithmetic.

Maps are float32, float16 or bfloat16, channels last in memory: (N·H·W, C) to a kernel. Under autocast a convolution
writes autocast's dtype, and its products are taken in it, whatever the map's. Sums, moments and norms are float32. Products of
float32 maps are taken as PyTorch takes those of a convolution: in TF32 where the GPU has it, unless
`torch.backends.cudnn.allow_tf32 = False` or `torch.backends.cudnn.conv.fp32_precision = "ieee"` says otherwise. Nothing here
waits for the device or copies from the host, so everything can be captured in a CUDA graph. Sums over tiles are written to
buffers that a second, small kernel adds up in the order of the tiles, so every call gives the same bits.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast.kernels.interface import Dropout, Folded, NormedMap, Unfolded
from fast.kernels.triton.launches import LARGE, Launch, table_for
from reference.batch_norm import BatchNorm
from reference.grid import Grid

_IS_INSTALLED = importlib.util.find_spec("triton") is not None
if _IS_INSTALLED:
    from fast.kernels.triton.batch_norm import (
        fold_kernel,
        normalise_backward_kernel,
        normalise_kernel,
        sum_partials_kernel,
        unfold_kernel,
    )
    from fast.kernels.triton.crops import crops_kernel
    from fast.kernels.triton.depthwise_conv import depthwise_backward_kernel, depthwise_forward_kernel
    from fast.kernels.triton.gradients import sum_gradients_kernel
    from fast.kernels.triton.pointwise_conv import (
        pointwise_forward_kernel,
        pointwise_gradient_kernel,
        pointwise_input_gradient_kernel,
        pointwise_operands_kernel,
        pointwise_weight_gradient_kernel,
    )
    from fast.kernels.triton.schedule import schedule_kernel
    from fast.kernels.triton.upsampled_confusion_matrix import confusion_matrix_kernel
    from fast.kernels.triton.upsampled_cross_entropy import cell_gradients_kernel, gather_corners_kernel, mean_loss_kernel

# Tiles along the channels from which a launch of its own for g costs less than computing it again for each of them.
_MANY_TILES = 4

# Weights that were rounded in advance, by address, dtype, precision and layout. No context variable: autograd's own thread
# reads it too.
_prepared: dict[tuple[int, torch.dtype, str, bool], Tensor] = {}

name = "Triton kernels"
memory_format = torch.channels_last


class Moments(NamedTuple):
    """Mean and sum of squared deviations of each tile of positions in a convolution's output."""

    partials: Tensor  # (tiles, 2, C), float32
    sizes: Tensor | int  # positions of each tile: (tiles,), float32; or of all but the last, which has what is left


def is_available() -> bool:
    """Whether Triton is installed and PyTorch sees a CUDA device."""
    return _IS_INSTALLED and torch.cuda.is_available()


def supports(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"the Triton kernels compute on an NVIDIA GPU, this map is on {x.device}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"the Triton kernels compute float32, float16 and bfloat16, this map is {dtype}"
    return None if _IS_INSTALLED else "Triton is not installed"


def depthwise_forward(
    x: NormedMap, weight: Tensor, rate: tuple[int, int], *, statistics: bool
) -> tuple[Tensor, Moments | None]:
    _check_depthwise(x, weight, rate)
    raw = _dense(x.raw)
    n, channels, height, width = raw.shape
    out = _empty_map(raw, dtype=_out_dtype(raw))
    launch = _depthwise_launch("depthwise_forward", out)
    tiles_c, plan = _ceil_div(channels, launch.block_n), _row_plan(out, rate[0], launch)
    tiles = _ceil_div(n * width, launch.block_p) * plan.groups
    moments = Moments(_empty(raw, tiles, 2, channels), _empty(raw, tiles)) if statistics else None
    sizes = (n * width, height, width, *rate, *plan, channels)
    _launch(
        depthwise_forward_kernel,
        tiles * tiles_c,
        launch,
        (raw, x.scale, x.offset, weight.contiguous(), out, *(moments or (None, None)), *sizes),
        BLOCK_P=launch.block_p,
        BLOCK_C=launch.block_n,
    )
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
    _check_depthwise(x, weight, rate)
    x_raw = _dense(x.raw)
    n, channels, height, width = x_raw.shape
    launch = _depthwise_launch("depthwise_backward", x_raw)
    tiles_c, plan = _ceil_div(channels, launch.block_n), _row_plan(x_raw, rate[0], launch)
    tiles, rows = _ceil_div(n * width, launch.block_p) * plan.groups, 11 if need_input and x.scale is not None else 9
    grad_x, partials = _empty_map(x_raw) if need_input else None, _empty(x_raw, tiles, rows, channels)
    gradient = (_dense(grad), _dense(raw), *_slope_and_intercept(unfolded))
    sizes = (n * width, height, width, *rate, *plan, channels)
    _launch(
        depthwise_backward_kernel,
        tiles * tiles_c,
        launch,
        (*gradient, x_raw, x.scale, x.offset, weight.contiguous(), grad_x, partials, *sizes),
        ROWS=rows,
        BLOCK_P=launch.block_p,
        BLOCK_C=launch.block_n,
    )
    sums = _sum_partials(partials, interleaved=9)
    grad_weight = sums[: 9 * channels].view_as(weight).to(weight.dtype)
    if grad_x is None:
        return None, grad_weight
    if x.scale is None:
        return NormedMap(grad_x), grad_weight
    return NormedMap(grad_x, *sums[9 * channels :].view(2, channels)), grad_weight


def pointwise_forward(
    maps: Sequence[NormedMap], weight: Tensor, dropout: Dropout | None, *, statistics: bool
) -> tuple[Tensor, Moments | None]:
    return _pointwise_product(_Maps.of(maps, weight, dropout), weight, (None, None), statistics=statistics)


def pointwise_inference(maps: Sequence[NormedMap], weight: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    out, _ = _pointwise_product(_Maps.of(maps, weight, None), weight, _float32(norm), statistics=False)
    return out


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
    gradient = (_dense(grad), _dense(raw), *_slope_and_intercept(unfolded))
    product = _Maps.of(maps, weight, dropout)
    needed = [i for i, need in enumerate(need_input) if need]
    grad_weight, rounded = _pointwise_weight_gradient(gradient, product, weight, need_rounded=bool(needed))
    grad_maps: list[NormedMap | None] = [None] * len(maps)
    if needed:
        for i, grad_map in zip(needed, _pointwise_input_gradient(rounded, product.only(needed), weight), strict=True):
            grad_maps[i] = grad_map
    return grad_maps, grad_weight


@contextlib.contextmanager
def prepared_products(weights: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    like = torch.empty(0, dtype=dtype, device=weights[0].device)
    layouts = [(weight.detach(), transposed) for weight in weights for transposed in (False, True)]
    keys = [(weight.data_ptr(), dtype, _input_precision(like), transposed) for weight, transposed in layouts]
    _prepared.update(zip(keys, _operands(layouts, like), strict=True))
    try:
        yield
    finally:
        for key in keys:
            _prepared.pop(key, None)


def fold(moments: Moments, norm: BatchNorm[Tensor], *, count: int, momentum: float, eps: float) -> Folded:
    (tiles, _, channels), sizes = moments.partials.shape, moments.sizes
    counts, tile_size = (None, sizes) if isinstance(sizes, int) else (sizes, 0)
    folded = _empty(moments.partials, 4, channels)
    parameters = (norm.scale, norm.offset, norm.running_mean, norm.running_var, folded)
    launch = _launch_of("fold", 4, count, folded)
    _launch(
        fold_kernel,
        _ceil_div(channels, launch.block_n),
        launch,
        (moments.partials, counts, *parameters, tiles, tile_size, count, momentum if count > 1 else 0.0, eps, channels),
        BLOCK_T=launch.block_p,
        BLOCK_C=launch.block_n,
    )
    return Folded(*folded)


def unfold(grad_scale: Tensor, grad_offset: Tensor, folded: Folded, gamma: Tensor, *, count: int) -> Unfolded:
    unfolded = _empty(grad_scale, 4, len(gamma))
    sums = (grad_scale.contiguous(), grad_offset.contiguous())
    launch = _launch_of("unfold", 4, count, unfolded)
    _launch(
        unfold_kernel,
        _ceil_div(len(gamma), launch.block_n),
        launch,
        (*sums, folded.scale, folded.mean, folded.inv_std, gamma, unfolded, count, len(gamma)),
        BLOCK_C=launch.block_n,
    )
    return Unfolded(*unfolded)


def normalise(x: NormedMap) -> Tensor:
    if x.scale is None:
        return x.raw.clone(memory_format=memory_format)
    raw = _dense(x.raw)
    launch, out = _map_launch("normalise", raw), _empty_map(raw)
    _launch(
        normalise_kernel,
        _tiles(raw, launch) * _ceil_div(raw.shape[1], launch.block_n),
        launch,
        (raw, x.scale, x.offset, out, _positions(raw), raw.shape[1]),
        BLOCK_P=launch.block_p,
        BLOCK_C=launch.block_n,
    )
    return out


def normalise_backward(grad: Tensor, x: NormedMap) -> NormedMap:
    if x.scale is None:
        return NormedMap(grad)
    raw = _dense(x.raw)
    launch, grad_x, channels = _map_launch("normalise_backward", raw), _empty_map(raw), raw.shape[1]
    partials = _empty(raw, _tiles(raw, launch), 2, channels)
    _launch(
        normalise_backward_kernel,
        len(partials) * _ceil_div(channels, launch.block_n),
        launch,
        (_dense(grad), raw, x.scale, x.offset, grad_x, partials, _positions(raw), channels),
        BLOCK_P=launch.block_p,
        BLOCK_C=launch.block_n,
    )
    return NormedMap(grad_x, *_sum_partials(partials).view(2, channels))


def sum_gradients(grads: Sequence[NormedMap]) -> NormedMap:
    raws = tuple(_dense(grad.raw) for grad in grads)
    total, channels = _empty_map(raws[0]), raws[0].shape[1]
    scales, offsets = (tuple(part) for part in zip(*(grad[1:] for grad in grads), strict=True))
    is_normed = scales[0] is not None
    sums, block_c = _empty(total, 2, channels) if is_normed else None, 256
    launch = _map_launch("sum_gradients", total)
    _launch(
        sum_gradients_kernel,
        _ceil_div(total.numel(), launch.block_p) + (_ceil_div(channels, block_c) if is_normed else 0),
        launch,
        (raws, *((scales, offsets) if is_normed else (None, None)), total, sums, total.numel(), channels),
        BLOCK=launch.block_p,
        BLOCK_C=block_c,
    )
    return NormedMap(total, *([] if sums is None else sums))


def plane_product(x: NormedMap, rows: Tensor, columns: Tensor) -> Tensor:
    # Two products by PyTorch, in float32 as its own switch for them says. PyTorch's own resize and adaptive mean add up
    # their gradients by atomics, so no two trainings of a cell with pyramid pooling would be the same.
    value = _dense(x.raw if x.scale is None else normalise(x))
    n, channels, height, width = value.shape
    dtype = value.dtype if value.dtype == _out_dtype(value) else torch.float32  # that of features is rounded once, after it
    with torch.autocast(value.device.type, enabled=False):
        product = value.permute(0, 2, 3, 1).reshape(n, height, width * channels).float()
        product = torch.matmul(rows, product).view(n * len(rows), width, channels)
        product = torch.matmul(columns, product).view(n, len(rows), len(columns), channels)
    return product.to(dtype).permute(0, 3, 1, 2)


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    align_corners: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss is NaN if a label is neither a class nor ignore_index: raising would have to wait for the device."""
    labels, sizes = _labels_and_sizes(logits, labels, align_corners)
    n, classes, height, width = logits.shape
    if classes * logits.stride(1) >= 2**31:
        raise ValueError(
            f"kernels count logits of an image in 32 bits: {classes} classes {logits.stride(1)} apart are too many"
        )
    # A cell of label pixels begins at each logit, and without aligned corners one before the first.
    beyond = 0 if align_corners or logits.numel() == 0 else 1
    cells, block_k = n * (height + beyond) * (width + beyond), _power_of_two(classes)
    launch = _launch_of("cell_gradients", 4, _positions(logits), logits)
    rows, columns = (_largest_cell(sizes[i], sizes[2 + i], align_corners) for i in range(2))
    tile = _label_tile(rows, columns, launch)
    programs = _ceil_div(cells, tile["CELLS"])
    grad, loss, share = torch.empty_like(logits), logits.new_empty(()), _empty(logits, 1)
    corners, losses = _empty(logits, classes, 4, cells), _empty(logits, programs)
    counts = torch.empty(programs, dtype=torch.int32, device=logits.device)
    pixels = (cells, *sizes, rows, columns)
    _launch(
        cell_gradients_kernel,
        programs,
        launch,
        (logits, labels, class_weights, corners, losses, counts, *pixels, *logits.stride(), ignore_index, classes),
        **tile,
        ALIGN_CORNERS=align_corners,
    )
    launch = _launch_of("mean_loss", 4, _positions(logits), logits)
    _launch(mean_loss_kernel, 1, launch, (losses, counts, loss, share, programs), BLOCK=launch.block_p)
    launch = _launch_of("gather_corners", 4, _positions(logits), logits)
    block_q = max(1, launch.block_p * 32 // block_k)
    _launch(
        gather_corners_kernel,
        _ceil_div(_positions(logits), block_q),
        launch,
        (corners, share, grad, _positions(logits), height, width, *grad.stride(), classes),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        ALIGN_CORNERS=align_corners,
    )
    return loss, grad


def upsampled_confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = True) -> Tensor:
    labels, sizes = _labels_and_sizes(logits, labels, align_corners)
    n, classes = logits.shape[:2]
    cells = [max(size - 1, 1) if align_corners else size + 1 for size in sizes[:2]]  # rows and columns of them
    confusion, block_k = torch.zeros(classes, classes, dtype=torch.int64, device=logits.device), _power_of_two(classes)
    launch = _launch_of("confusion_matrix", 4, _positions(logits), logits)
    _launch(
        confusion_matrix_kernel,
        n * cells[0] * _ceil_div(labels.shape[2], launch.block_p),
        _with_warps_for(block_k, launch),
        (logits, labels, confusion, *sizes, *cells, *logits.stride(), ignore_index, classes),
        BLOCK_K=block_k,
        BLOCK_X=launch.block_p,
        ALIGN_CORNERS=align_corners,
    )
    return confusion


def crops(
    features: Tensor, labels: Tensor, draws: Tensor, crop: tuple[int, int], grid: Grid, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Neither features nor labels are copied to be made dense: they are those of all images."""
    (images, channels, height, width), (crop_h, crop_w) = features.shape, crop
    window, covered = grid.pixels(crop), grid.pixels((height, width))
    if not features.is_contiguous(memory_format=memory_format) or not labels.is_contiguous():
        raise ValueError("crops are cut from features that are channels last, and from contiguous labels")
    if labels.ndim != 3 or len(labels) != images or labels.shape[1] < covered[0] or labels.shape[2] < covered[1]:
        raise ValueError(f"labels: ({images}, >= {covered[0]}, >= {covered[1]}) are needed, got {tuple(labels.shape)}")
    if not (1 <= crop_h <= height and 1 <= crop_w <= width) or images == 0:
        raise ValueError(f"no crop of {crop} fits into features {tuple(features.shape)}")
    if draws.dtype != torch.int32 or draws.ndim != 2 or len(draws) != 3:
        raise ValueError(f"draws: (3, N), int32, are needed, got {tuple(draws.shape)}, {draws.dtype}")
    batch_size = draws.shape[1]
    batch = torch.empty((batch_size, channels, *crop), dtype=dtype, device=features.device, memory_format=memory_format)
    targets = torch.empty((batch_size, *window), dtype=labels.dtype, device=labels.device)
    launch = _launch_of("crops", features.dtype.itemsize, _positions(batch), features)
    vectors = channels % 16 == 0  # else values are loaded one by one, and more at a time would be spilled
    block_c = min(launch.block_n if vectors else max(launch.block_n // 4, 1), _power_of_two(crop_w * channels))
    block_x = min(launch.block_p, _power_of_two(window[1]))
    feature_programs = batch_size * crop_h * _ceil_div(crop_w * channels, block_c)
    sizes = (batch_size, images, height, width, *crop, *labels.shape[1:], *window, grid.stride, channels)
    _launch(
        crops_kernel,
        feature_programs + batch_size * window[0] * _ceil_div(window[1], block_x),
        launch,
        (features, labels, draws.contiguous(), batch, targets, *sizes),
        BLOCK_C=block_c,
        BLOCK_X=block_x,
    )
    return batch, targets


def next_rate(rates: Tensor, done: Tensor, rate: Tensor) -> None:
    _launch(schedule_kernel, 1, Launch(0, 0, 0, 1, 1), (rates, done, rate, len(rates) - 1))


class _Maps(NamedTuple):
    """Several maps, as the arguments of a pointwise kernel."""

    raws: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    channels: tuple[int, ...]
    columns: tuple[int, ...]  # where each map's channels begin in the weight
    normed: tuple[bool, ...]
    dropout: Dropout | None

    @classmethod
    def of(cls, maps: Sequence[NormedMap], weight: Tensor, dropout: Dropout | None) -> "_Maps":
        channels = tuple(x.raw.shape[1] for x in maps)
        if sum(channels) != weight.shape[1] or len({(x.raw.shape[0], *x.raw.shape[2:]) for x in maps}) != 1:
            shapes = [tuple(x.raw.shape) for x in maps]
            raise ValueError(f"maps of one size are needed, with the channels of the weight {tuple(weight.shape)}: {shapes}")
        # Under autocast, features may be mixed with what it wrote, but a kernel chooses between pointers of one type.
        narrowest = min((x.raw for x in maps), key=lambda raw: raw.dtype.itemsize)
        is_mixed = any(x.raw.dtype != narrowest.dtype for x in maps)
        dtype = _out_dtype(narrowest) if is_mixed else narrowest.dtype
        unread = _empty(maps[0].raw, 1)  # an address of the right type, for a map without a norm
        return cls(
            tuple(_dense(x.raw.to(dtype)) for x in maps),
            tuple(unread if x.scale is None else x.scale for x in maps),
            tuple(unread if x.offset is None else x.offset for x in maps),
            channels,
            tuple(sum(channels[:i]) for i in range(len(channels))),
            tuple(x.scale is not None for x in maps),
            dropout,
        )

    def only(self, indices: Sequence[int]) -> "_Maps":
        return self._replace(
            raws=tuple(self.raws[i] for i in indices),
            scales=tuple(self.scales[i] for i in indices),
            offsets=tuple(self.offsets[i] for i in indices),
            channels=tuple(self.channels[i] for i in indices),
            columns=tuple(self.columns[i] for i in indices),
            normed=tuple(self.normed[i] for i in indices),
        )

    def pointers(self) -> tuple[tuple[Any, ...], ...]:
        return self.raws, self.scales, self.offsets, self.channels, self.columns

    @property
    def seed(self) -> Tensor | None:
        return None if self.dropout is None else self.dropout.seed

    def numbers(self) -> tuple[int, int, float]:
        """Bits that say which maps are normalised; the draw of 2¹⁶ below which elements are dropped; the others' factor."""
        bits = sum(normed << b for b, normed in enumerate(self.normed))
        rate = 0.0 if self.dropout is None else self.dropout.rate
        return bits, min(round(rate * 2**16), 2**16 - 1), 1.0 / (1.0 - rate)


def _pointwise_product(
    product: _Maps, weight: Tensor, norm: tuple[Tensor | None, Tensor | None], *, statistics: bool
) -> tuple[Tensor, Moments | None]:
    x, out_channels = product.raws[0], weight.shape[0]
    out = _empty_map(x, out_channels, _out_dtype(x))
    launch = _product_launch("pointwise_forward", out)
    if x.dtype.itemsize > out.dtype.itemsize:  # tiles of wider dtypes take the bytes, and so the registers, of narrow ones
        launch = launch._replace(block_k=max(launch.block_k // 2, 16))
    tiles = _tiles(out, launch)
    block_n, block_k = _block(launch.block_n, out_channels), _block(launch.block_k, *product.channels)
    partials = _empty(x, tiles, 2, out_channels) if statistics else None
    _launch(
        pointwise_forward_kernel,
        tiles * _ceil_div(out_channels, block_n),
        launch,
        (
            *product.pointers(),
            _operand(weight, out),
            product.seed,
            *norm,
            out,
            partials,
            _positions(x),
            *product.numbers(),
            weight.shape[1],
            out_channels,
        ),
        BLOCK_P=launch.block_p,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        WHOLE=_are_multiples(block_n, out_channels) and _are_multiples(block_k, *product.channels),
        INPUT_PRECISION=_input_precision(out),
    )
    return out, None if partials is None else Moments(partials, launch.block_p)


def _pointwise_weight_gradient(
    gradient: tuple[Any, ...], product: _Maps, weight: Tensor, *, need_rounded: bool
) -> tuple[Tensor, Tensor]:
    """The weight's gradient, and that of the raw output as the operand of another product."""
    x, grad = product.raws[0], gradient[0]
    out_channels, in_channels = weight.shape[:2]
    launch = _product_launch("pointwise_weight_gradient", grad)
    if x.dtype.itemsize > grad.dtype.itemsize:  # as for the forward
        launch = launch._replace(block_k=max(launch.block_k // 2, 16))
    elif x.dtype != grad.dtype:  # one conversion more, for which sm_86 has no registers left
        launch = launch._replace(block_p=min(launch.block_p, 128))
    block_o, block_n = _block(launch.block_p, out_channels), _block(launch.block_n, *product.channels)
    column_tiles = sum(_ceil_div(channels, block_n) for channels in product.channels)
    tiles = _ceil_div(out_channels, block_o) * column_tiles
    if gradient[2] is not None and column_tiles >= _MANY_TILES:
        grad, is_rounded = _rounded_gradient(gradient), True
        gradient = (grad, grad, None, None)
    else:
        is_rounded = gradient[2] is None and _input_precision(grad) != "tf32"  # as it comes
    # Rounded down: a few programs more than fit at once would take as long as twice as many.
    splits = min(max(launch.programs // max(tiles, 1), 1), _ceil_div(_positions(x), launch.block_k))
    split_size = _ceil_div(_ceil_div(_positions(x), max(splits, 1)), launch.block_k) * launch.block_k
    splits = _ceil_div(_positions(x), max(split_size, 1))  # without the last part, if it has become empty
    partials = _empty(x, splits, out_channels, in_channels)
    rounded = torch.empty_like(grad) if need_rounded and not is_rounded else None
    _launch(
        pointwise_weight_gradient_kernel,
        splits * tiles,
        launch,
        (
            *gradient,
            *product.pointers(),
            product.seed,
            partials,
            rounded,
            _positions(x),
            *product.numbers(),
            split_size,
            in_channels,
            out_channels,
        ),
        BLOCK_P=block_o,
        BLOCK_N=block_n,
        BLOCK_K=launch.block_k,
        WHOLE=_are_multiples(block_o, out_channels) and _are_multiples(block_n, *product.channels),
        INPUT_PRECISION=_input_precision(grad),
    )
    return _sum_partials(partials).view_as(weight).to(weight.dtype), grad if rounded is None else rounded


def _rounded_gradient(gradient: tuple[Any, ...]) -> Tensor:
    """grad + slope · raw + intercept as an operand: (N, C_out, H, W)."""
    grad = gradient[0]
    rounded, out_channels = torch.empty_like(grad), grad.shape[1]
    launch = _map_launch("normalise", grad)  # which loads, computes and stores about as much
    _launch(
        pointwise_gradient_kernel,
        _tiles(grad, launch) * _ceil_div(out_channels, launch.block_n),
        launch,
        (*gradient, rounded, _positions(grad), out_channels),
        BLOCK_P=launch.block_p,
        BLOCK_N=launch.block_n,
        INPUT_PRECISION=_input_precision(grad),
    )
    return rounded


def _pointwise_input_gradient(rounded: Tensor, product: _Maps, weight: Tensor) -> list[NormedMap]:
    x = product.raws[0]
    out_channels, in_channels = weight.shape[:2]
    launch = _product_launch("pointwise_input_gradient", rounded)
    block_n, block_k = _block(launch.block_n, *product.channels), _block(launch.block_k, out_channels)
    grad_maps, tiles = tuple(_empty_map(raw) for raw in product.raws), _tiles(x, launch)
    partials = _empty(x, tiles, 2, in_channels) if any(product.normed) else None
    _launch(
        pointwise_input_gradient_kernel,
        tiles * sum(_ceil_div(channels, block_n) for channels in product.channels),
        launch,
        (
            rounded,
            *product.pointers(),
            grad_maps,
            _operand(weight, rounded, transposed=True),
            product.seed,
            partials,
            _positions(x),
            *product.numbers(),
            in_channels,
            out_channels,
        ),
        BLOCK_P=launch.block_p,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        WHOLE=_are_multiples(block_k, out_channels) and _are_multiples(block_n, *product.channels),
        INPUT_PRECISION=_input_precision(rounded),
    )
    if partials is None:
        return [NormedMap(grad_map) for grad_map in grad_maps]
    sums = _sum_partials(partials).view(2, in_channels)
    return [
        NormedMap(grad_map, *sums[:, column : column + channels]) if normed else NormedMap(grad_map)
        for grad_map, column, channels, normed in zip(
            grad_maps, product.columns, product.channels, product.normed, strict=True
        )
    ]


def _operand(weight: Tensor, like: Tensor, *, transposed: bool = False) -> Tensor:
    """The weight (C_out, C, 1, 1) as a product with `like` takes it: (C_out, C), or (C, C_out), whose rows are summed over."""
    weight, precision = weight.contiguous(), _input_precision(like)
    prepared = _prepared.get((weight.data_ptr(), like.dtype, precision, transposed))
    if prepared is not None:
        return prepared
    if weight.dtype == like.dtype and precision != "tf32" and not transposed:
        return weight
    (operand,) = _operands([(weight, transposed)], like)
    return operand


def _operands(layouts: Sequence[tuple[Tensor, bool]], like: Tensor) -> list[Tensor]:
    """Each dense weight as an operand, transposed or not, in one launch."""
    weights, transposed = (tuple(part) for part in zip(*layouts, strict=True))
    out_channels, channels = (tuple(weight.shape[axis] for weight in weights) for axis in range(2))
    shapes = [(c, o) if flip else (o, c) for o, c, flip in zip(out_channels, channels, transposed, strict=True)]
    operands = tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes)
    _launch(
        pointwise_operands_kernel,
        sum(_ceil_div(o, 32) * _ceil_div(c, 64) for o, c in zip(out_channels, channels, strict=True)),
        Launch(32, 64, 0, 4, 1),  # too short to be worth tuning
        (weights, operands, channels, out_channels, sum(flip << i for i, flip in enumerate(transposed))),
        BLOCK_O=32,
        BLOCK_C=64,
        INPUT_PRECISION=_input_precision(like),
    )
    return list(operands)


def _sum_partials(partials: Tensor, interleaved: int = 0) -> Tensor:
    """Sum over tiles: (tiles, rows, C) -> (rows · C,), the first `interleaved` rows transposed."""
    tiles, rows, channels = partials.shape
    sums = _empty(partials, rows * channels)
    launch = _launch_of("sum_partials", 4, rows * channels, partials)
    _launch(
        sum_partials_kernel,
        _ceil_div(rows * channels, launch.block_n),
        launch,
        (partials, sums, tiles, interleaved, rows, channels),
        BLOCK_T=launch.block_p,
        BLOCK_C=launch.block_n,
    )
    return sums


def _labels_and_sizes(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Dense labels in a dtype that kernels read; height and width of logits, and of labels."""
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(f"needs logits: (N, K, h, w) and labels: (N, H, W), got {logits.shape}, {labels.shape}")
    if logits.numel() == 0 and labels.numel() > 0:
        raise ValueError(f"no logits, {tuple(logits.shape)}, for labels {tuple(labels.shape)}")
    for size, label_size in zip(logits.shape[2:], labels.shape[1:], strict=True):
        largest = size * label_size if align_corners else 2 * (size + 1) * (label_size + 1)  # of kernels' numerators
        if largest >= 2**31:
            raise ValueError(f"kernels count positions in 32 bits: {size} logits times {label_size} labels are too many")
    labels = labels if labels.dtype == torch.uint8 else labels.to(torch.int64)
    return labels.contiguous(), (*logits.shape[2:], *labels.shape[1:])


class _RowPlan(NamedTuple):
    """How the rows of a map are shared out: each phase of the rate in segments, for each segment the phases in groups."""

    segment_rows: int  # of a phase
    program_phases: int  # that a program walks down in turn
    phase_groups: int
    groups: int  # of rows, each with its own programs for all columns and channels


def _row_plan(x: Tensor, rate_h: int, launch: Launch) -> _RowPlan:
    """The quickest plan for a map, if `launch.programs` run at once."""
    n, channels, height, width = x.shape
    tiles = _ceil_div(n * width, launch.block_p) * _ceil_div(channels, launch.block_n)
    return _quickest_row_plan(height, min(rate_h, max(height, 1)), tiles, max(launch.programs, 1))


@functools.lru_cache(maxsize=1024)
def _quickest_row_plan(height: int, phases: int, tiles: int, programs: int) -> _RowPlan:
    """Of plans with short segments, or several phases to a program, the one whose waves of programs take least time."""
    longest, shortest = _ceil_div(height, phases), height // phases
    plans = [
        _RowPlan(rows, 1, phases, phases * _ceil_div(longest, rows))
        for rows in range(longest, 0, -1)
        if _ceil_div(longest, rows) == _ceil_div(shortest, rows)  # every phase has as many segments
    ]
    for program_phases in range(2, phases + 1):
        groups = _ceil_div(phases, program_phases)
        plans.append(_RowPlan(longest, program_phases, groups, groups))

    def cost(plan: _RowPlan) -> tuple[int, int]:
        """In times of a row: programs begin and end in about six, a phase in one, and a neighbour row is half the work."""
        neighbours = 0 if plan.segment_rows >= longest else 1
        time = 6 + plan.program_phases * (plan.segment_rows + 1 + neighbours)
        return _ceil_div(tiles * plan.groups, programs) * time, plan.groups

    return min(plans, key=cost, default=_RowPlan(1, 1, 1, 0))  # no rows, no programs


def _check_depthwise(x: NormedMap, weight: Tensor, rate: tuple[int, int]) -> None:
    if weight.shape != (x.raw.shape[1], 1, 3, 3) or min(rate) < 1:
        shapes = (tuple(x.raw.shape), tuple(weight.shape))
        raise ValueError(f"a depthwise convolution needs x: (N, C, H, W), weight: (C, 1, 3, 3), rate >= 1: {shapes}, {rate}")


def _slope_and_intercept(unfolded: Unfolded | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if unfolded is None else (unfolded.slope, unfolded.intercept)


def _float32(norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    scale, offset = norm
    return scale.float().contiguous(), offset.float().contiguous()


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format)


def _empty_map(like: Tensor, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    n, own_channels, height, width = like.shape
    shape = (n, own_channels if channels is None else channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def _out_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution's output."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _positions(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _tiles(x: Tensor, launch: Launch) -> int:
    return _ceil_div(_positions(x), launch.block_p)


def _map_launch(kernel: str, x: Tensor) -> Launch:
    return _launch_of(kernel, x.dtype.itemsize, _positions(x), x)


def _product_launch(kernel: str, x: Tensor) -> Launch:
    launch = _map_launch(kernel, x)
    if x.dtype == torch.float32 and _input_precision(x) == "ieee":  # no matrix unit: a thread holds rows of the operands
        return launch._replace(block_p=min(launch.block_p, 64), block_n=min(launch.block_n, 64), block_k=32, warps=8, stages=1)
    return launch


def _depthwise_launch(kernel: str, x: Tensor) -> Launch:
    """Channels that are no multiple of 16 are loaded one by one: the addresses do not fit the table's registers."""
    launch = _map_launch(kernel, x)
    if x.shape[1] % 16 == 0:
        return launch
    return launch._replace(registers=255, programs=launch.programs * launch.registers // 255)


def _launch_of(kernel: str, value_bytes: int, size: int, x: Tensor) -> Launch:
    return table_for(x.device)[kernel, value_bytes, "large" if size >= LARGE else "small"]


def _largest_cell(size: int, label_size: int, align_corners: bool) -> int:
    """The most label pixels from a logit to the next along one axis; one logit with aligned corners has all of them."""
    if not align_corners:
        return _ceil_div(max(label_size, 1), max(size, 1))
    return max(label_size, 1) if size == 1 else _ceil_div(max(label_size - 1, 1), size - 1)


def _label_tile(rows: int, columns: int, launch: Launch) -> dict[str, int]:
    """The tile of `cell_gradients` for cells of at most rows × columns label pixels. The four corners need four lanes."""
    row_block, column_block = (min(max(_power_of_two(size), 4), most) for size, most in ((rows, 16), (columns, 32)))
    per_thread = min(max(launch.block_p // (32 * launch.warps), 1), column_block // 4)
    lanes = column_block // per_thread
    cells = 32 * launch.warps // lanes
    return {"ROWS": row_block, "SERIES": min(row_block, 8), "COLUMNS": per_thread, "CELLS": cells, "LANES": lanes}


def _with_warps_for(classes: int, launch: Launch) -> Launch:
    """The launch of a kernel whose tile has all classes; the table has the warps for 32 classes."""
    return launch._replace(warps=min(max(launch.warps * classes // 32, 1), 16))


def _block(most: int, *sizes: int) -> int:
    """A tile size no larger than needed, and at least the 16 that a matrix unit takes."""
    return min(most, max(16, _power_of_two(max(sizes))))


def _are_multiples(block: int, *sizes: int) -> bool:
    return all(size % block == 0 for size in sizes)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _input_precision(x: Tensor) -> str:
    """Precision of float32 products; other dtypes have one precision only, and one compilation."""
    # Unlike `allow_tf32`, this can be read after either of PyTorch's two interfaces was used to set it.
    convolutions: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    allowed = x.is_cuda and x.dtype == torch.float32 and convolutions == "tf32"
    return "tf32" if allowed and torch.cuda.get_device_capability(x.device) >= (8, 0) else "ieee"  # no Turing GPU has it


def _launch(kernel: Any, programs: int, launch: Launch, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Run `programs` programs on the arguments' device; a·b + c may be rounded once, whatever Triton's default is."""
    if programs == 0:
        return
    flat = (x for argument in arguments for x in (argument if isinstance(argument, tuple) else (argument,)))
    device = next(x.device for x in flat if isinstance(x, Tensor))
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers or None}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **options, enable_fp_fusion=True)
