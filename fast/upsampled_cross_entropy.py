"""`reference/upsampled_cross_entropy.py` on PyTorch: by kernels, or by bands of rows.

Full-size logits of a batch, 360 MB at the paper's proxy size, never exist: a band of one image is upsampled, its loss
computed, and its gradient added to that of the small logits while the band is in the cache. So the gradient is ready with
the loss.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.bilinear_resize import resize_matrix
from fast.kernels import backend_for
from reference.upsampled_cross_entropy import IGNORE_INDEX

BAND_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}  # upsampled logits at a time: fits a CPU's cache, few launches on CUDA


def upsampled_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """logits: (N, K, h, w), labels: (N, H, W) integer in 0..K-1 or ignore_index -> the mean loss in nats.

    Computed in float32, or in float64 if the logits are. Differentiable once.
    """
    check_labels(logits, labels, ignore_index)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    with torch.autocast(logits.device.type, enabled=False):  # its products would be rounded to bf16
        loss: Tensor = _UpsampledCrossEntropy.apply(precise, labels, ignore_index)
    return loss


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raises ValueError unless labels: (N, H, W) belong to logits: (N, K, h, w), on one device, and can hold ignore_index."""
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0] or logits.device != labels.device:
        raise ValueError(
            f"logits: (N, K, h, w) and labels: (N, H, W) on one device are needed, got {tuple(logits.shape)} on "
            f"{logits.device}, {tuple(labels.shape)} on {labels.device}"
        )
    if labels.dtype == torch.uint8 and not 0 <= ignore_index <= 255:
        raise ValueError(f"uint8 labels cannot be ignore_index {ignore_index}: give 0 to 255, or labels as int64")


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        backend = backend_for(logits)
        compute = _by_bands if backend is None else backend.upsampled_cross_entropy
        loss, grad = compute(logits.contiguous(), labels, ignore_index)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None


def _by_bands(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The mean loss and the gradient of the logits."""
    height, width = labels.shape[1:]
    rows, columns = (
        resize_matrix(logits.shape[2 + i], (height, width)[i], logits.dtype, logits.device) for i in range(2)
    )  # (H, h), (W, w)
    band = max(1, BAND_BYTES.get(logits.device.type, 1 << 22) // (logits.shape[1] * width * logits.element_size()))
    total, grad = logits.new_zeros((), dtype=torch.float64), torch.empty_like(logits)
    for n in range(logits.shape[0]):
        wide = logits[n] @ columns.T  # (K, h, W)
        grad_wide = torch.zeros_like(wide)
        for top in range(0, height, band):
            weights = rows[top : top + band]  # (band, h), nonzero only between the feature rows around the band
            first, last = top * (logits.shape[2] - 1) // max(height - 1, 1), logits.shape[2]
            last = min(last, (top + weights.shape[0] - 1) * (logits.shape[2] - 1) // max(height - 1, 1) + 2)
            weights = weights[:, first:last]
            loss, grad_band = _softmax_cross_entropy(weights @ wide[:, first:last], labels[n, top : top + band], ignore_index)
            total += loss
            grad_wide[:, first:last] += weights.T @ grad_band
        grad[n] = grad_wide @ columns
    count = (labels != ignore_index).sum().clamp(min=1)
    return (total / count).to(logits.dtype), grad.div_(count)


def _softmax_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient, written over logits: (K, rows, W); labels: (rows, W)."""
    labelled = labels != ignore_index
    target = labels.long().where(labelled, 0)[None]  # (1, rows, W)
    logits -= logits.amax(dim=0)
    chosen = logits.gather(0, target)[0]  # (rows, W)
    total = logits.exp_().sum(dim=0)
    loss = (total.log() - chosen).where(labelled, 0).sum(dtype=torch.float64)
    logits *= labelled / total
    logits.scatter_add_(0, target, -labelled[None].to(logits.dtype))
    return loss, logits
