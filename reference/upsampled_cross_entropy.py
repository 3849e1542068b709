"""Softmax cross-entropy of logits resized to the labels' size, averaged over the labelled pixels.

    loss = − (1 / |L|) · Σ_{p ∈ L}  w[label_p] · log softmax(resize(logits))[label_p, p],     L = {p: label_p ≠ `ignore_index`}

The weights w of the classes are 1 unless given. They are not in the denominator, so weights of 2 double the loss; PyTorch's
`F.cross_entropy(weight=w)` divides by the sum of the pixels' weights instead. Without any labelled pixel the loss is 0. The
labels keep their full size: the logits are resized, not the labels, with corners aligned or not (`bilinear_resize.py`).
Source: `add_softmax_cross_entropy_loss_for_each_scale` in research/deeplab/utils/train_utils.py (`upsample_logits=True`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward

IGNORE_INDEX = 255


def upsampled_cross_entropy(
    logits: Array,
    labels: NDArray[np.integer],
    *,
    class_weights: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> float:
    """logits: (N, K, h, w), labels: (N, H, W) in 0..K-1 or ignore_index, class_weights: (K,) -> the mean loss in nats.

    >>> logits = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1)  # probabilities 1/4 and 3/4
    >>> round(float(np.exp(-upsampled_cross_entropy(logits, np.array([[[1, 255]]])))), 6)
    0.75
    >>> round(float(np.exp(-upsampled_cross_entropy(logits, np.array([[[1, 255]]]), class_weights=np.array([9.0, 2.0])))), 6)
    0.5625
    """
    losses = pixel_losses(logits, labels, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners)
    return float(losses.sum() / max((labels != ignore_index).sum(), 1))


def upsampled_cross_entropy_backward(
    logits: Array,
    labels: NDArray[np.integer],
    *,
    class_weights: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> Array:
    """Gradient of the loss for logits: (N, K, h, w)."""
    log_probability, labelled = _log_softmax(logits, labels, ignore_index, align_corners)
    one_hot = labels[:, None] == np.arange(logits.shape[1])[:, None, None]  # (N, K, H, W)
    weight = _pixel_weights(logits, labels, labelled, class_weights)
    grad_upsampled = (np.exp(log_probability) - one_hot) * weight[:, None] / max(labelled.sum(), 1)
    return bilinear_resize_backward(grad_upsampled, (logits.shape[2], logits.shape[3]), align_corners=align_corners)


def pixel_losses(
    logits: Array,
    labels: NDArray[np.integer],
    *,
    class_weights: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> Array:
    """Arguments of `upsampled_cross_entropy` -> the loss of each pixel times its class's weight: (N, H, W), 0 if ignored."""
    log_probability, labelled = _log_softmax(logits, labels, ignore_index, align_corners)
    target = np.where(labelled, labels, 0)[:, None]  # (N, 1, H, W)
    surprise = -np.take_along_axis(log_probability, target, axis=1)[:, 0]  # (N, H, W)
    weight = _pixel_weights(logits, labels, labelled, class_weights)
    losses: Array = surprise * weight
    return losses


def _pixel_weights(
    logits: Array, labels: NDArray[np.integer], labelled: NDArray[np.bool_], class_weights: Array | None
) -> NDArray[Any]:
    """The weight of each pixel's class, 0 where it is not labelled: (N, H, W)."""
    if class_weights is None:
        return labelled
    classes = logits.shape[1]
    if class_weights.shape != (classes,) or not (np.isfinite(class_weights) & (class_weights >= 0)).all():
        raise ValueError(f"needs a class weight of 0 or more for each of {classes} classes, got {class_weights.tolist()}")
    return np.where(labelled, class_weights[np.where(labelled, labels, 0)], 0.0)


def _log_softmax(
    logits: Array, labels: NDArray[np.integer], ignore_index: int, align_corners: bool
) -> tuple[Array, NDArray[np.bool_]]:
    """Log-probabilities at the labels' size: (N, K, H, W), and which pixels are labelled: (N, H, W)."""
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(f"needs logits: (N, K, h, w) and labels: (N, H, W), got {logits.shape}, {labels.shape}")
    labelled = labels != ignore_index
    wrong = labels[labelled & ((labels < 0) | (labels >= logits.shape[1]))]
    if wrong.size:
        raise ValueError(f"label {wrong[0]} is neither 0 to {logits.shape[1] - 1} nor ignore_index {ignore_index}")
    upsampled = bilinear_resize(logits, (labels.shape[1], labels.shape[2]), align_corners=align_corners)
    shifted = upsampled - upsampled.max(axis=1, keepdims=True)  # no overflow in exp
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), labelled
