"""`Operations` on PyTorch's own: autograd differentiates them twice; torch.compile, torch.export and torch.func trace them.

A convolution applies its norm at once, so its map is a value. Maps that come from kernels, their norm not yet applied, are
taken as well. A sliding mean is taken along rows, then along columns: k_h + k_w reads per output instead of k_h · k_w.

Full-size logits of a batch, 360 MB at the paper's proxy size, never exist: one image's band of rows is upsampled, its loss
taken and its gradient sent back to the small logits at once, while the band is in the cache.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import LiveNorm, live_batch_norm
from fast.kernels.interface import LiveConv, NormedMap, check_dropout_rate
from fast.kernels.matrices import resize_matrix
from reference.pyramid_pooling import PoolingVariant, window_size

BAND_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}  # of upsampled logits at a time: in a cache on CPU, in few launches on CUDA


def dense(x: NormedMap) -> NormedMap:
    return x  # PyTorch reads any layout


def value(x: NormedMap) -> Tensor:
    if x.scale is None or x.offset is None:
        return x.raw
    return F.relu(x.scale[:, None, None] * x.raw + x.offset[:, None, None]).to(x.raw.dtype)


def fan_out(x: NormedMap, readers: int) -> list[NormedMap]:
    return [x] * readers  # autograd adds


def depthwise_conv(x: NormedMap, weight: Tensor, norm: LiveNorm | None, *, rate: tuple[int, int]) -> NormedMap:
    return _normed(F.conv2d(value(x), weight, padding=rate, dilation=rate, groups=weight.shape[0]), norm)


def pointwise_conv(
    maps: Sequence[NormedMap], weight: Tensor, norm: LiveNorm | None, *, dropout_rate: float = 0.0
) -> NormedMap:
    check_dropout_rate(dropout_rate)
    values = [value(x) for x in maps]
    x = values[0] if len(values) == 1 else torch.cat(values, dim=1)  # (N, all channels, H, W)
    if dropout_rate > 0.0:
        x = F.dropout(x, dropout_rate)
    if x.device.type == "cpu" and x.is_contiguous():  # without conv2d's copies into columns
        return _normed(torch.matmul(weight.flatten(1), x.flatten(2)).view(x.shape[0], weight.shape[0], *x.shape[2:]), norm)
    return _normed(F.conv2d(x, weight), norm)


def _normed(raw: Tensor, norm: LiveNorm | None) -> NormedMap:
    return NormedMap(raw if norm is None else F.relu(live_batch_norm(raw, norm)))


def separable_conv(x: NormedMap, depthwise: LiveConv, pointwise: LiveConv, *, rate: tuple[int, int]) -> NormedMap:
    return pointwise_conv([depthwise_conv(x, *depthwise, rate=rate)], *pointwise)


def pooling_means(
    x: NormedMap, grid_size: tuple[int, int], variant: PoolingVariant, pooling_size: tuple[int, int] | None
) -> Tensor:
    if variant == "grid_cells":
        return F.adaptive_avg_pool2d(value(x), grid_size)
    pin_h, pin_w = pooling_size or (None, None)
    return _sliding_means(_sliding_means(value(x), 2, grid_size[0], pin_h), 3, grid_size[1], pin_w)


def _sliding_means(x: Tensor, axis: int, grid: int, pooling_size: int | None) -> Tensor:
    if grid == 1 and pooling_size is None:  # a program exported from it serves every size; no window could
        return x.mean(dim=axis, keepdim=True)
    window = window_size(x.shape[axis], grid, pooling_size)
    return F.avg_pool2d(x, (window, 1) if axis == 2 else (1, window), stride=1)


def resize(x: NormedMap, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    return F.interpolate(value(x), size, mode="bilinear", align_corners=align_corners)


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    align_corners: bool = True,
) -> tuple[Tensor, Tensor]:
    height, width = labels.shape[1:]
    rows, columns = (
        resize_matrix(logits.shape[2 + i], (height, width)[i], logits.dtype, logits.device, align_corners) for i in range(2)
    )  # (H, h), (W, w)
    band = band_rows(logits, width)
    total, grad = logits.new_zeros((), dtype=torch.float64), torch.empty_like(logits)
    for n in range(logits.shape[0]):
        wide = logits[n] @ columns.T  # (K, h, W)
        grad_wide = torch.zeros_like(wide)
        for top in range(0, height, band):
            weights = rows[top : top + band]  # (band, h), nonzero only between the feature rows around the band
            first, last = _rows_read(logits.shape[2], height, top, top + weights.shape[0], align_corners)
            weights = weights[:, first:last]
            upsampled, target = weights @ wide[:, first:last], labels[n, top : top + band]
            loss, grad_band = _softmax_cross_entropy(upsampled, target, ignore_index, class_weights)
            total += loss
            grad_wide[:, first:last] += weights.T @ grad_band
        grad[n] = grad_wide @ columns
    count = (labels != ignore_index).sum().clamp(min=1)
    return (total / count).to(logits.dtype), grad.div_(count)


def _rows_read(in_size: int, out_size: int, top: int, end: int, align_corners: bool) -> tuple[int, int]:
    """The first of the rows that a resize reads for outputs top ... end - 1, and the one behind the last."""
    if align_corners:
        first, last = (row * (in_size - 1) // max(out_size - 1, 1) for row in (top, end - 1))
    else:
        first, last = (max(0, ((2 * row + 1) * in_size - out_size) // (2 * out_size)) for row in (top, end - 1))
    return first, min(last + 2, in_size)


def band_rows(logits: Tensor, width: int) -> int:
    """How many rows of logits (N, K, h, w), upsampled to `width`, are made at a time."""
    return max(1, BAND_BYTES.get(logits.device.type, 1 << 22) // (logits.shape[1] * width * logits.element_size()))


def _softmax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient, written over logits: (K, rows, W); labels: (rows, W)."""
    labelled = labels != ignore_index
    target = labels.long().where(labelled, 0)[None]  # (1, rows, W)
    logits -= logits.amax(dim=0)
    chosen = logits.gather(0, target)[0]  # (rows, W)
    total = logits.exp_().sum(dim=0)
    losses, weight = total.log() - chosen, labelled.to(logits.dtype)  # (rows, W)
    if class_weights is not None:
        weight *= class_weights[target[0]]
        losses *= weight
    logits *= weight / total
    logits.scatter_add_(0, target, -weight[None])
    return losses.where(labelled, 0).sum(dtype=torch.float64), logits


def upsampled_confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = True) -> Tensor:
    classes = logits.shape[1]
    total = torch.zeros(classes, classes, dtype=torch.int64, device=logits.device)
    for logit, label in zip(logits, labels, strict=True):  # one image at a time
        size = label.shape[0], label.shape[1]
        predictions = resize(NormedMap(logit[None]), size, align_corners).argmax(dim=1)  # (1, H, W)
        total += confusion_matrix(predictions[0], label, classes, ignore_index)
    return total


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Pixels of two integer tensors of one shape, by (label, prediction): (K, K), int64, on their device."""
    labelled = labels != ignore_index
    pairs = labels[labelled].long() * num_classes + predictions[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
