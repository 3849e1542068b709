"""Predictions of a network for whole pictures, and their mIOU on a whole split (`reference/mean_iou.py`).

Every picture is predicted whole, at its own size, padded at the bottom and right with the mean pixel to stride·k + 1 pixels,
as the authors pad 1024 × 2048 to 1025 × 2049. Padded pixels are not scored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.mean_iou import confusion_matrix
from fast.segmentation import SegmentationNetwork, predict_scales
from reference.mean_iou import class_iou, mean_iou
from search.datasets import Dataset


@dataclass(frozen=True)
class Scores:
    """Scores of a split: `mean_iou` in 0..1, NaN without labelled pixels; a class that never occurs is None."""

    mean_iou: float
    class_iou: tuple[float | None, ...]

    @classmethod
    def of(cls, confusion: NDArray[np.int64]) -> "Scores":
        """Scores of a confusion matrix (K, K), which counts pixels by (label, prediction)."""
        by_class = (float(iou) for iou in class_iou(confusion))
        return cls(mean_iou(confusion), tuple(None if math.isnan(iou) else iou for iou in by_class))


@torch.no_grad()
def predict_classes(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    pad_to: tuple[int, int] | None = None,
) -> Tensor:
    """The best class per pixel: image (H, W, 3) -> (H, W) int64, on the network's device."""
    height, width = image.shape[:2]
    mean, stride = network.backbone.mean, network.backbone.output_stride
    rounded = tuple(-(-(extent - 1) // stride) * stride + 1 for extent in (height, width))
    size = pad_to or (rounded[0], rounded[1])
    padded = mean.expand(1, 3, *size).clone()
    padded[0, :, :height, :width] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(mean.device)
    if tuple(scales) == (1.0,) and not flip:  # the softmax would not change the choice
        scores = bilinear_resize(network(padded).float(), size)
    else:
        scores = predict_scales(network, padded, scales=scales, flip=flip)
    return scores.argmax(dim=1)[0, :height, :width]


def count_pixels(
    network: SegmentationNetwork,
    dataset: Dataset,
    *,
    indices: Sequence[int] | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> Tensor:
    """Confusion matrix (K, K) of a data set's pictures, at one scale, on the network's device."""
    classes = len(dataset.class_names)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=network.backbone.mean.device)
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        predicted = predict_classes(network, sample.image)
        total += confusion_matrix(predicted, torch.from_numpy(sample.label).to(predicted.device), num_classes=classes)
        on_picture()
    return total
