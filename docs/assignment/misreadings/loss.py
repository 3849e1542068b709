"""Misreadings of the loss and its gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.misreadings.resize import aligned
from docs.assignment.mutation import Changes, Function
from reference import bilinear_resize as resize
from reference import upsampled_cross_entropy as loss
from reference.batch_norm import Array
from reference.upsampled_cross_entropy import IGNORE_INDEX


def _labelled(labels: Any) -> int:
    return max(int((labels != IGNORE_INDEX).sum()), 1)


def _loss_times(factor: Callable[[Any], float]) -> Changes:
    """Loss and gradient times a function of the labels."""
    return {
        "upsampled_cross_entropy.upsampled_cross_entropy": lambda f: lambda logits, labels: factor(labels) * f(logits, labels),
        "upsampled_cross_entropy.upsampled_cross_entropy_backward": lambda f: (
            lambda logits, labels: factor(labels) * f(logits, labels)
        ),
    }


def _loss_of(read: Callable[[Array, Any], tuple[Array, Any]]) -> Changes:
    """Loss and gradient of other logits or labels."""
    return {
        "upsampled_cross_entropy.upsampled_cross_entropy": lambda f: lambda *given: f(*read(*given)),
        "upsampled_cross_entropy.upsampled_cross_entropy_backward": lambda f: lambda *given: f(*read(*given)),
    }


def _labels_taken_down(logits: Array, labels: Any) -> tuple[Array, Any]:
    rows, columns = (np.rint(aligned(labels.shape[1 + i], logits.shape[2 + i])).astype(int) for i in range(2))
    return logits, labels[:, rows][:, :, columns]


def _per_image(original: Function) -> Function:
    def mean_of_means(logits: Array, labels: Any) -> float:
        return float(np.mean([original(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]))

    return mean_of_means


def _per_image_backward(original: Function) -> Function:
    def backward(logits: Array, labels: Any) -> Array:
        images = range(len(labels))
        return np.concatenate([original(logits[i : i + 1], labels[i : i + 1]) for i in images]) / len(labels)

    return backward


def _probabilities_resized(original: Function) -> Function:
    def log_probability(logits: Array, labels: Any, ignore_index: int, align_corners: bool) -> tuple[Array, Any]:
        with np.errstate(divide="ignore"):
            return np.log(resize.bilinear_resize(softmax(logits), labels.shape[1:])), labels != ignore_index

    return log_probability


def softmax(logits: Array) -> Array:
    """Probabilities of logits: (N, K, ...)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Array = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def _unshifted(original: Function) -> Function:
    def log_probability(logits: Array, labels: Any, ignore_index: int, align_corners: bool) -> tuple[Array, Any]:
        upsampled = resize.bilinear_resize(logits, labels.shape[1:])
        with np.errstate(all="ignore"):
            return np.log(np.exp(upsampled) / np.exp(upsampled).sum(axis=1, keepdims=True)), labels != ignore_index

    return log_probability


LOSS = (
    Misreading(
        "divided_by_all_pixels",
        "loss",
        "by dividing by the number of all pixels",
        "the loss is the mean over the labelled ones",
        _loss_times(lambda labels: _labelled(labels) / labels.size),
    ),
    Misreading(
        "mean_of_images",
        "loss",
        "with the mean over each image first, and then over the images",
        "it is one mean over all labelled pixels",
        {
            "upsampled_cross_entropy.upsampled_cross_entropy": _per_image,
            "upsampled_cross_entropy.upsampled_cross_entropy_backward": _per_image_backward,
        },
    ),
    Misreading(
        "sum_of_pixels",
        "loss",
        "with the sum over the pixels",
        "the loss is the mean over the labelled ones",
        _loss_times(_labelled),
    ),
    Misreading(
        "sum_over_images",
        "loss",
        "by dividing the sum by the number of images",
        "the loss is the mean over the labelled pixels",
        _loss_times(lambda labels: _labelled(labels) / len(labels)),
    ),
    Misreading(
        "bits", "loss", "in bits (logarithm to base 2)", "the unit is the nat", _loss_times(lambda labels: 1.0 / np.log(2.0))
    ),
    Misreading(
        "ignored_are_class_0",
        "loss",
        "where pixels without a label count as class 0",
        "pixels with label 255 are ignored",
        _loss_of(lambda logits, labels: (logits, np.where(labels == IGNORE_INDEX, 0, labels))),
    ),
    Misreading(
        "ignored_summed_as_class_0",
        "loss",
        "where pixels without a label are summed as class 0 (though not counted)",
        "pixels with label 255 are ignored",
        {
            name: lambda f: (
                lambda logits, labels: (
                    f(logits, np.where(labels == IGNORE_INDEX, 0, labels)) * (labels.size / _labelled(labels))
                )
            )
            for name in (
                "upsampled_cross_entropy.upsampled_cross_entropy",
                "upsampled_cross_entropy.upsampled_cross_entropy_backward",
            )
        },
    ),
    Misreading(
        "ignored_are_the_last_class",
        "loss",
        "where pixels without a label count as the last class",
        "pixels with label 255 are ignored",
        _loss_of(lambda logits, labels: (logits, np.where(labels == IGNORE_INDEX, logits.shape[1] - 1, labels))),
    ),
    Misreading(
        "labels_taken_down",
        "loss",
        "with the labels brought to the size of the logits",
        "the logits are resized to the size of the labels",
        _loss_of(_labels_taken_down),
    ),
    Misreading(
        "probabilities_resized",
        "loss",
        "with softmax before the resize",
        "the logits are resized, then comes softmax",
        {"upsampled_cross_entropy._log_softmax": _probabilities_resized},
    ),
    Misreading(
        "no_labels_give_nan",
        "loss",
        "by dividing by 0 where no pixel is labelled",
        "loss and gradient are 0 there",
        _loss_times(lambda labels: 1.0 if (labels != IGNORE_INDEX).any() else np.nan),
    ),
    Misreading(
        "softmax_overflows",
        "loss",
        "where exp overflows",
        "softmax stays the same if the largest logit of each pixel is subtracted first",
        {"upsampled_cross_entropy._log_softmax": _unshifted},
    ),
)


def _loss_gradient(at_full_size: Callable[[Array, Array, Any], Array]) -> Changes:
    """Another gradient at full size: a function of the probabilities, the one-hot labels and which pixels are labelled."""

    def backward(logits: Array, labels: Any) -> Array:
        log_probability, labelled = loss._log_softmax(logits, labels, IGNORE_INDEX, True)
        one_hot = labels[:, None] == np.arange(logits.shape[1])[:, None, None]
        full = at_full_size(np.exp(log_probability), one_hot, labelled[:, None]) / max(labelled.sum(), 1)
        return resize.bilinear_resize_backward(full, logits.shape[2:])

    return {"upsampled_cross_entropy.upsampled_cross_entropy_backward": lambda f: backward}


LOSS_GRADIENT = (
    Misreading(
        "loss_gradient_not_divided",
        "loss_gradient",
        "without dividing by the number of labelled pixels",
        "the loss is a mean, and so its gradient is divided too",
        {
            "upsampled_cross_entropy.upsampled_cross_entropy_backward": lambda f: (
                lambda logits, labels: f(logits, labels) * _labelled(labels)
            )
        },
    ),
    Misreading(
        "loss_gradient_divided_by_all",
        "loss_gradient",
        "by dividing the gradient by the number of all pixels",
        "the loss is the mean over the labelled ones",
        {
            "upsampled_cross_entropy.upsampled_cross_entropy_backward": lambda f: (
                lambda logits, labels: f(logits, labels) * _labelled(labels) / labels.size
            )
        },
    ),
    Misreading(
        "no_one_hot",
        "loss_gradient",
        "without subtracting the one-hot labels",
        "at full size the gradient is p - one-hot label, divided by the number of labelled pixels",
        _loss_gradient(lambda p, one_hot, labelled: p * labelled),
    ),
    Misreading(
        "only_the_labels_class",
        "loss_gradient",
        "with a gradient for the logit of the label alone",
        "softmax gives every class of the pixel a gradient: p - one-hot label",
        _loss_gradient(lambda p, one_hot, labelled: (p - 1.0) * one_hot),
    ),
    Misreading(
        "ignored_have_gradients",
        "loss_gradient",
        "where ignored pixels have a gradient too",
        "it is 0 at ignored pixels",
        _loss_gradient(lambda p, one_hot, labelled: p - one_hot),
    ),
    Misreading(
        "loss_gradient_upside_down",
        "loss_gradient",
        "with the sign turned",
        "it is p - one-hot label",
        _loss_gradient(lambda p, one_hot, labelled: (one_hot - p) * labelled),
    ),
)
