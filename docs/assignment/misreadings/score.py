"""Misreadings of predictions and of the score."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.loss import softmax
from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.misreadings.resize import aligned
from docs.assignment.mutation import Changes, Function
from reference import mean_iou as score
from reference.batch_norm import Array
from reference.upsampled_cross_entropy import IGNORE_INDEX


def _iou(union: Callable[[Any, Any, Any], Any], factor: float = 1.0) -> Changes:
    """Another share per class: the intersection over a function of intersection, labels and predictions."""

    def class_iou(confusion: Any) -> Array:
        agreed = np.diagonal(confusion).astype(np.float64)
        whole = union(agreed, confusion.sum(axis=1), confusion.sum(axis=0))
        iou: Array = np.divide(factor * agreed, whole, out=np.full(len(agreed), np.nan), where=whole > 0)
        return iou

    return {"mean_iou.class_iou": lambda f: class_iou}


def _mean_of(chosen: Callable[[Any, Any], Any]) -> Changes:
    """Another mean of the classes' IoU: a function of them and of the confusion matrix."""
    return {"mean_iou.mean_iou": lambda f: lambda confusion: float(chosen(score.class_iou(confusion), confusion))}


def _ignored_counted(original: Function) -> Function:
    def counted(predictions: Any, labels: Any, *, num_classes: int) -> Any:
        return original(predictions, np.where(labels == IGNORE_INDEX, 0, labels), num_classes=num_classes)

    return counted


SCORE = (
    Misreading(
        "argmax_before_resize",
        "score",
        "with the argmax before the resize",
        "the logits are resized, then the largest one is taken",
        {
            "expected.predicted_labels": lambda f: (
                lambda logits, size: logits.argmax(axis=1)[
                    :, *np.ix_(*(np.rint(_down(logits, size, i)).astype(int) for i in range(2)))
                ]
            )
        },
    ),
    Misreading(
        "probabilities_resized_for_argmax",
        "score",
        "with softmax before the resize",
        "the logits are resized",
        {"expected.predicted_labels": lambda f: lambda logits, size: f(softmax(logits), size)},
    ),
    Misreading(
        "labels_and_predictions_swapped",
        "score",
        "with the matrix transposed",
        "its rows are labels, its columns are predictions",
        {"mean_iou.confusion_matrix": lambda f: lambda *a, **o: f(*a, **o).T},
    ),
    Misreading(
        "ignored_counted_as_class_0",
        "score",
        "where pixels without a label count as class 0",
        "they count nowhere",
        {"mean_iou.confusion_matrix": _ignored_counted},
    ),
    Misreading(
        "absent_classes_are_0",
        "score",
        "with 0 for a class that does not occur",
        "it is left out of the mean",
        _mean_of(lambda iou, confusion: np.nan_to_num(iou, nan=0.0).mean()),
    ),
    Misreading(
        "absent_classes_are_1",
        "score",
        "with 1 for a class that does not occur",
        "it is left out of the mean",
        _mean_of(lambda iou, confusion: np.nan_to_num(iou, nan=1.0).mean()),
    ),
    Misreading(
        "percent",
        "score",
        "in percent",
        "mIOU is a number in 0..1",
        _mean_of(lambda iou, confusion: 100.0 * np.nanmean(iou)),
    ),
    Misreading(
        "only_labelled_classes",
        "score",
        "with the mean over classes that occur in the labels",
        "a class that occurs in the predictions alone counts too, as 0",
        _mean_of(lambda iou, confusion: iou[confusion.sum(axis=1) > 0].mean()),
    ),
    Misreading(
        "intersection_counted_twice",
        "score",
        "with the intersection counted twice in the union",
        "it is subtracted once",
        _iou(lambda agreed, labels, predictions: labels + predictions),
    ),
    Misreading(
        "dice",
        "score",
        "with the Dice score (F1) of each class",
        "IoU divides by the union",
        _iou(lambda agreed, labels, predictions: labels + predictions, 2.0),
    ),
    Misreading(
        "class_accuracy",
        "score",
        "with the share of each class's labels that were found",
        "IoU divides by the union, in which wrong predictions are too",
        _iou(lambda agreed, labels, predictions: labels),
    ),
    Misreading(
        "pixel_accuracy",
        "score",
        "with the share of pixels that are right",
        "mIOU is the mean of the classes' IoU",
        _mean_of(lambda iou, confusion: np.trace(confusion) / confusion.sum()),
    ),
)


def _down(logits: Array, size: tuple[int, int], i: int) -> Array:
    return aligned(logits.shape[2 + i], size[i])
