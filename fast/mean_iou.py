"""`reference/mean_iou.py` on PyTorch: the counting. Scores of a counted matrix are the reference's own functions."""

import torch
from torch import Tensor

from fast.kernels import library, operations_for
from fast.upsampled_cross_entropy import check_labels
from reference.upsampled_cross_entropy import IGNORE_INDEX


def confusion_matrix(predictions: Tensor, labels: Tensor, *, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count pixels by (label, prediction): two integer tensors of one shape -> (K, K), int64, on their device."""
    return library.confusion_matrix(predictions, labels, num_classes, ignore_index)


def upsampled_confusion_matrix(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, align_corners: bool = True
) -> Tensor:
    """Resize logits: (N, K, h, w) to labels: (N, H, W), take the best class, count -> (K, K).

    By kernels, or one image at a time: full-size logits of a batch never exist. In float32, or in float64 if the logits are.
    """
    check_labels(logits, labels, ignore_index)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return operations_for(precise).upsampled_confusion_matrix(precise, labels, ignore_index, align_corners)
