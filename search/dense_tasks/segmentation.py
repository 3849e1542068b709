"""Semantic segmentation: one of K classes at each pixel, trained by cross-entropy, scored by mIOU (paper, section 4)."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fast.hard_example_mining import hardest_pixels
from fast.mean_iou import confusion_matrix, upsampled_confusion_matrix
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.mean_iou import class_iou, mean_iou
from reference.upsampled_cross_entropy import IGNORE_INDEX
from search.dense_tasks import RGB, UNLABELLED_COLOUR, Label, Measure, Scores
from search.errors import InputError
from search.settings import TaskName


class Segmentation:
    """Labels are uint8 classes 0 to K − 1, or 255 where a pixel does not count. Outputs are logits, one a class.

    `palette` (K, 3) uint8 RGB has the classes' colours, by default PASCAL VOC's. `label_ids` has the value of each class in
    the data set's own label files, by default its number; if `grey_files`, these files must have no palette. `class_weights`
    are in the loss alone, None unless `weighted` gave them.
    """

    name: TaskName = "segmentation"
    label_dtype = np.dtype(np.uint8)
    bins_heading = "class"
    score = Measure("mIOU", "mean_iou")
    details_heading = "IoU of each class"
    is_transparent = True
    only_drawn = ("palette",)

    def __init__(
        self,
        class_names: tuple[str, ...],
        palette: NDArray[np.uint8] | None = None,
        label_ids: tuple[int, ...] | None = None,
        *,
        grey_files: bool = False,
    ) -> None:
        self.class_names = class_names
        self.palette = voc_palette(len(class_names)) if palette is None else palette
        self.label_ids = tuple(range(len(class_names))) if label_ids is None else label_ids
        self.grey_files = grey_files
        self.class_weights: tuple[float, ...] | None = None

    def unlabelled(self, size: tuple[int, int]) -> Label:
        return np.full(size, IGNORE_INDEX, np.uint8)

    def is_labelled(self, labels: Tensor) -> Tensor:
        return labels != IGNORE_INDEX

    def at_scale(self, label: Label, scale: float) -> Label:
        return label

    @property
    def bins(self) -> tuple[str, ...]:
        return self.class_names

    def histogram(self, label: Label) -> NDArray[np.int64]:
        counts = np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)
        return np.append(counts[: len(self.class_names)], counts[IGNORE_INDEX])

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.class_names

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1)

    def to_average(self, outputs: Tensor, scale: float) -> Tensor:
        return outputs.softmax(dim=1)

    def loss(self, outputs: Tensor, labels: Tensor, *, align_corners: bool = True) -> Tensor:
        weights = _on_device(self.class_weights, outputs.device)
        return upsampled_cross_entropy(outputs, labels, class_weights=weights, align_corners=align_corners)

    def hardest(self, outputs: Tensor, labels: Tensor, share: float, *, align_corners: bool = True) -> Tensor:
        weights = _on_device(self.class_weights, outputs.device)
        return hardest_pixels(outputs, labels, share, class_weights=weights, align_corners=align_corners)

    def weighted(self, weights: tuple[float, ...] | None) -> "Segmentation":
        if weights is not None and len(weights) != len(self.class_names):
            raise InputError(
                f"`class_weights` must be {len(self.class_names)} numbers, one for each class in this order: "
                f"{', '.join(self.class_names)}; got {len(weights)}"
            )
        task = copy.copy(self)
        task.class_weights = weights
        return task

    def balanced(self, count: Callable[[], NDArray[np.int64]]) -> tuple[float, ...]:
        """N / (K · n) for a class of n of the N labelled pixels, where K classes have any; 0 for a class without a pixel.

        So the mean weight of a labelled pixel is 1. Four digits, which people can type.

        >>> Segmentation(("road", "car", "tram")).balanced(lambda: np.array([900, 100, 0, 50]))
        (0.5556, 5.0, 0.0)
        """
        pixels = count()[:-1]
        if not pixels.any():
            raise InputError("`class_weights` balanced needs labels, and no pixel to train on has one: correct `train_split`")
        share = pixels * np.count_nonzero(pixels) / pixels.sum()
        return tuple(float(f"{1 / each:.4g}") if each else 0.0 for each in share)

    @cached_property
    def details(self) -> tuple[Measure, ...]:
        colours = [(int(red), int(green), int(blue)) for red, green, blue in self.palette]
        return tuple(Measure(name, name, colour=colour) for name, colour in zip(self.class_names, colours, strict=True))

    def count(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Pixels by (label, prediction): (K, K), int64."""
        return confusion_matrix(predictions, labels, num_classes=len(self.class_names))

    def count_upsampled(self, outputs: Tensor, labels: Tensor, *, align_corners: bool = True) -> Tensor:
        return upsampled_confusion_matrix(outputs, labels, align_corners=align_corners)

    def scores(self, totals: NDArray[Any]) -> Scores:
        """mIOU, and the IoU of each class, None where a class is neither in the labels nor predicted."""
        confusion = totals.astype(np.int64)
        return Scores(mean_iou(confusion), tuple(None if np.isnan(iou) else float(iou) for iou in class_iou(confusion)))

    def named(self, scores: Scores) -> dict[str, Any]:
        return {
            "mean_iou": None if math.isnan(scores.score) else scores.score,
            "class_iou": dict(zip(self.class_names, scores.details, strict=True)),
        }

    def facts(self, totals: NDArray[Any]) -> dict[str, Any]:
        return self.named(self.scores(totals)) | {"confusion": totals.tolist()}  # rows: label, columns: prediction

    def table(self, totals: NDArray[Any]) -> str:
        """IoU of each class, its share of the labelled pixels, and the mIOU.

        >>> print(Segmentation(("road", "car")).table(np.array([[3, 1], [0, 4]])))
        class     IoU %  pixels %
        road      75.00     50.00
        car       80.00     50.00
        mIOU      77.50
        """
        width = max(len(name) for name in (*self.class_names, "class")) + 2
        scores, pixels = self.scores(totals), totals.sum(axis=1) / max(totals.sum(), 1)
        lines = [f"{'class':{width}} {'IoU %':>7} {'pixels %':>9}"]
        for measure, iou, share in zip(self.details, scores.details, pixels, strict=True):
            lines.append(f"{measure.name:{width}} {measure.number(iou):>7} {100 * share:>9.2f}")
        return "\n".join([*lines, f"{'mIOU':{width}} {self.score.number(scores.score):>7}"])

    def colours(self, maps: Sequence[Label]) -> list[NDArray[np.uint8]]:
        table = np.full((IGNORE_INDEX + 1, 3), UNLABELLED_COLOUR, np.uint8)
        table[: len(self.palette)] = self.palette
        return [table[each] for each in maps]

    def legend(self, maps: Sequence[Label]) -> list[tuple[str, RGB]]:
        """The classes that occur."""
        occurring = {int(value) for each in maps for value in np.unique(each)}
        shown = [(measure.name, measure.colour) for k, measure in enumerate(self.details) if k in occurring]
        unlabelled = [("not labelled", UNLABELLED_COLOUR)] if IGNORE_INDEX in occurring else []
        return [(name, colour) for name, colour in shown if colour is not None] + unlabelled

    def encoded(self, prediction: Label) -> Image.Image:
        """One label id per pixel, with a palette of the classes' colours unless the data set's files have none.

        Ids above 255 need 16 bits, which have no palette.
        """
        largest = max(self.label_ids)
        picture = Image.fromarray(np.array(self.label_ids, np.uint8 if largest < 256 else np.uint16)[prediction])
        if not self.grey_files and largest < 256:
            colours = np.zeros((largest + 1, 3), np.uint8)
            colours[list(self.label_ids)] = self.palette
            picture.putpalette(colours.tobytes())  # turns it into mode P; the numbers stay
        return picture

    def describe(self) -> dict[str, Any]:
        return {"class_names": list(self.class_names), "palette": self.palette.tolist()}


@cache
def _on_device(weights: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    """One tensor (K,) for all calls: a captured CUDA graph cannot copy from the host."""
    return None if weights is None else torch.tensor(weights, device=device)


def default_palette(class_names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Colours for classes that bring none, (K, 3): PASCAL VOC's, whose first one, black, is for a class named background.

    Over a picture, black looks like nothing.

    >>> default_palette(("background", "weed")).tolist(), default_palette(("crop", "weed")).tolist()
    ([[0, 0, 0], [128, 0, 0]], [[128, 0, 0], [0, 128, 0]])
    """
    begins_black = class_names[0].lower() == "background"
    return voc_palette(len(class_names)) if begins_black else voc_palette(len(class_names) + 1)[1:]


def voc_palette(classes: int) -> NDArray[np.uint8]:
    """The colours of PASCAL VOC's devkit, (classes, 3): the bits of a class spread over the high bits of its RGB.

    >>> voc_palette(3).tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    numbers = np.arange(classes)[:, None]
    palette = np.zeros((classes, 3), np.uint8)
    for k in range(3):  # bits 3k, 3k + 1 and 3k + 2 of the class are bit 7 − k of red, green and blue
        palette |= (((numbers >> (3 * k + np.arange(3))) & 1) << (7 - k)).astype(np.uint8)
    palette.flags.writeable = False
    return palette
