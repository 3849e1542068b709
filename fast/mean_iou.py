"""`reference/mean_iou.py` on PyTorch: the counting. Scores of a counted matrix are the reference's own functions."""

import torch
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.kernels import backend_for
from fast.upsampled_cross_entropy import check_labels
from reference.upsampled_cross_entropy import IGNORE_INDEX


def confusion_matrix(predictions: Tensor, labels: Tensor, *, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count pixels by (label, prediction): two integer tensors of one shape -> (K, K), int64, on their device."""
    labelled = labels != ignore_index
    pairs = labels[labelled].long() * num_classes + predictions[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def upsampled_confusion_matrix(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Resize logits: (N, K, h, w) to labels: (N, H, W), take the best class, count -> (K, K).

    Kernels do this, or PyTorch one image at a time, so the full-size logits of a batch never exist.
    """
    check_labels(logits, labels, ignore_index)
    if backend := backend_for(logits):
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return backend.upsampled_confusion_matrix(precise.contiguous(), labels, ignore_index)
    num_classes = logits.shape[1]
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=logits.device)
    for logit, label in zip(logits, labels, strict=True):
        predictions = bilinear_resize(logit[None].float(), (label.shape[0], label.shape[1])).argmax(dim=1)  # (1, H, W)
        total += confusion_matrix(predictions[0], label, num_classes=num_classes, ignore_index=ignore_index)
    return total
