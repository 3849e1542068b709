"""Mean intersection over union (mIOU), the paper's score, from a confusion matrix.

    IoU_k = M[k, k] / (Σ_j M[k, j] + Σ_j M[j, k] − M[k, k]),     M[label, prediction] = number of pixels

mIOU is the mean over the classes that occur, in labels or predictions: a class without any pixel is left out, not counted as
0. Ignored pixels count nowhere. Source: `tf.metrics.mean_iou`, as used by research/deeplab/eval.py.
"""

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array
from reference.upsampled_cross_entropy import IGNORE_INDEX


def confusion_matrix(
    predictions: NDArray[np.integer], labels: NDArray[np.integer], *, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> NDArray[np.int64]:
    """predictions and labels, of one shape -> (K, K): how many pixels of each label, a row, have each prediction, a column.

    Add matrices to add images.

    >>> predictions, labels = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 255])
    >>> confusion_matrix(predictions=predictions, labels=labels, num_classes=2)
    array([[1, 1],
           [0, 1]])
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions and labels must have one shape, got {predictions.shape}, {labels.shape}")
    labelled = labels != ignore_index
    pairs = labels[labelled].astype(np.int64), predictions[labelled].astype(np.int64)
    for name, values in zip(("label", "prediction"), pairs, strict=True):
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{name}s must be 0 to {num_classes - 1}, got {values.min()} to {values.max()}")
    return np.bincount(num_classes * pairs[0] + pairs[1], minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(confusion: NDArray[np.int64]) -> Array:
    """confusion: (K, K) -> IoU per class: (K,), in 0..1, NaN for a class that does not occur.

    >>> class_iou(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]]))
    array([0.5       , 0.66666667,        nan])
    """
    intersection = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    iou: Array = np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)
    return iou


def mean_iou(confusion: NDArray[np.int64]) -> float:
    """confusion: (K, K) -> mIOU in 0..1; NaN if no pixel was counted at all.

    >>> mean_iou(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]]))
    0.5833333333333333
    """
    iou = class_iou(confusion)
    occurring = iou[~np.isnan(iou)]
    return float(occurring.mean()) if occurring.size else float("nan")
