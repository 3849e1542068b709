"""`reference/upsampled_cross_entropy.py` on PyTorch. Loss and gradient are made in one pass, without full-size logits."""

from typing import Any

import torch
from torch import Tensor

from fast.kernels import operations_for
from fast.kernels.differentiable import differentiable_once
from reference.upsampled_cross_entropy import IGNORE_INDEX


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> Tensor:
    """logits: (N, K, h, w), labels: (N, H, W) integer in 0..K-1 or ignore_index -> the mean loss in nats.

    class_weights: (K,), on the logits' device, none below 0, multiply the losses of each class's pixels; they are not in the
    denominator, and get no gradient. Computed in float32, or in float64 if the logits are. Differentiable once.
    """
    check_labels(logits, labels, ignore_index)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    weights = None if class_weights is None else fitting_weights(class_weights, precise)
    with torch.autocast(logits.device.type, enabled=False):  # its products would be rounded to bf16
        loss: Tensor = _UpsampledCrossEntropy.apply(precise, labels, ignore_index, weights, align_corners)
    return loss


def fitting_weights(class_weights: Tensor, logits: Tensor) -> Tensor:
    """The weights (K,) as kernels read them, in the logits' dtype. Raises ValueError unless they belong to (N, K, h, w)."""
    if not isinstance(class_weights, Tensor):
        raise ValueError(f"class_weights must be a tensor ({logits.shape[1]},), got a {type(class_weights).__name__}")
    if class_weights.shape != logits.shape[1:2] or class_weights.device != logits.device:
        raise ValueError(
            f"class_weights: ({logits.shape[1]},) on {logits.device} are needed, one for each class of the logits, got "
            f"{tuple(class_weights.shape)} on {class_weights.device}"
        )
    return class_weights.detach().to(logits.dtype).contiguous()


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
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        class_weights: Tensor | None,
        align_corners: bool,
    ) -> Tensor:
        operations = operations_for(logits)
        loss, grad = operations.upsampled_cross_entropy(logits, labels, ignore_index, class_weights, align_corners)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @differentiable_once("take F.cross_entropy of logits that F.interpolate has resized")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None, None
