"""Softmax cross-entropy of logits resized to the labels' size (corners aligned), averaged over the labelled pixels.

    loss = − (1 / |L|) · Σ_{p ∈ L}  log softmax(resize(logits))[label_p, p],     L = pixels whose label is not `ignore_index`

Without any labelled pixel the loss is 0. The labels keep their full size: the logits are resized, not the labels.
Source: `add_softmax_cross_entropy_loss_for_each_scale` in research/deeplab/utils/train_utils.py (`upsample_logits=True`).
"""

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward

IGNORE_INDEX = 255


def upsampled_cross_entropy(logits: Array, labels: NDArray[np.integer], *, ignore_index: int = IGNORE_INDEX) -> float:
    """logits: (N, K, h, w), labels: (N, H, W) in 0..K-1 or ignore_index -> the mean loss in nats.

    >>> logits = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1)  # probabilities 1/4 and 3/4
    >>> round(float(np.exp(-upsampled_cross_entropy(logits, np.array([[[1, 255]]])))), 6)
    0.75
    """
    log_probability, labelled = _log_softmax(logits, labels, ignore_index)
    target = np.where(labelled, labels, 0)[:, None]  # (N, 1, H, W)
    surprise = -np.take_along_axis(log_probability, target, axis=1)[:, 0]  # (N, H, W)
    return float((surprise * labelled).sum() / max(labelled.sum(), 1))


def upsampled_cross_entropy_backward(logits: Array, labels: NDArray[np.integer], *, ignore_index: int = IGNORE_INDEX) -> Array:
    """Gradient of the loss for logits: (N, K, h, w)."""
    log_probability, labelled = _log_softmax(logits, labels, ignore_index)
    one_hot = labels[:, None] == np.arange(logits.shape[1])[:, None, None]  # (N, K, H, W)
    grad_upsampled = (np.exp(log_probability) - one_hot) * labelled[:, None] / max(labelled.sum(), 1)
    return bilinear_resize_backward(grad_upsampled, (logits.shape[2], logits.shape[3]))


def _log_softmax(logits: Array, labels: NDArray[np.integer], ignore_index: int) -> tuple[Array, NDArray[np.bool_]]:
    """Log-probabilities at the labels' size: (N, K, H, W), and which pixels are labelled: (N, H, W)."""
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(f"needs logits: (N, K, h, w) and labels: (N, H, W), got {logits.shape}, {labels.shape}")
    labelled = labels != ignore_index
    wrong = labels[labelled & ((labels < 0) | (labels >= logits.shape[1]))]
    if wrong.size:
        raise ValueError(f"label {wrong[0]} is neither 0 to {logits.shape[1] - 1} nor ignore_index {ignore_index}")
    upsampled = bilinear_resize(logits, (labels.shape[1], labels.shape[2]))
    shifted = upsampled - upsampled.max(axis=1, keepdims=True)  # no overflow in exp
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), labelled
