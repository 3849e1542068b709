"""What a network predicts at each pixel: its dense task, one object with labels, outputs, loss, scores and pictures.

`segmentation.py` predicts a class, `depth.py` a distance. Every data set has its task, and all else asks that object:
features, training, search and reports work for any task, and none of them knows which one it has.

Arrays here: a label is (H, W), `labels` are (N, H, W), `outputs` are what a head gives, (N, K, h, w) for K names of outputs.
How outputs are resized to the labels' size, by `align_corners`, follows from the grid of the features (`reference/grid.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from search.settings import TaskName

RGB = tuple[int, int, int]
Label = NDArray[Any]  # (H, W), of the task's `label_dtype`
UNLABELLED_COLOUR: RGB = (255, 255, 255)  # greys and black may be classes' colours


@dataclass(frozen=True)
class Measure:
    """A number that says how good predictions are; `key` is its name in files, and its unit "%" stands for a share in 0..1."""

    name: str
    key: str
    unit: str = "%"
    in_tables: bool = False  # beside the score, in tables of cells
    colour: RGB | None = None

    @property
    def heading(self) -> str:
        return f"{self.name} {self.unit}".strip()

    def number(self, value: float | None) -> str:
        """The value without its unit, which the heading has; a dash where there is none.

        >>> Measure("mIOU", "mean_iou").number(0.5), Measure("RMSE", "rmse", "m").number(0.5), Measure("a", "a").number(None)
        ('50.00', '0.500', '–')
        """
        if value is None or np.isnan(value):
            return "–"
        return f"{100 * value:.2f}" if self.unit == "%" else f"{value:.3f}"

    def text(self, value: float | None) -> str:
        """The value with its unit."""
        return f"{self.number(value)} {self.unit}".strip()


@dataclass(frozen=True)
class Scores:
    """How good predictions of a whole split are.

    `score` is what a search maximises, in 0..1, NaN without any labelled pixel. `details` are the values of the task's
    `details`, None where there is none.
    """

    score: float
    details: tuple[float | None, ...]

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> "Scores":
        """Read what JSON has of `dataclasses.asdict`. Raises KeyError and TypeError for anything else."""
        return cls(content["score"], tuple(content["details"]))


class DenseTask(Protocol):
    """One dense task. It holds what descriptions of files keep (`describe`), such as the names of classes."""

    @property
    def name(self) -> TaskName: ...

    # Labels

    @property
    def label_dtype(self) -> np.dtype[Any]: ...

    def unlabelled(self, size: tuple[int, int]) -> Label:
        """A label (H, W) that says nothing of any pixel."""

    def is_labelled(self, labels: Tensor) -> Tensor:
        """Which pixels count: bool, of the labels' shape."""

    def at_scale(self, label: Label, scale: float) -> Label:
        """What the same pixels are labelled in a picture that is enlarged by `scale`."""

    @property
    def bins(self) -> tuple[str, ...]:
        """What the pixels of labels are counted by, for people who check their data."""

    @property
    def bins_heading(self) -> str: ...

    def histogram(self, label: Label) -> NDArray[np.int64]:
        """The number of pixels of each of the `bins`, and last of those that are not labelled."""

    # Outputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """A name for each channel that a head gives."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs (N, K, H, W), or their mean over scales, -> predictions (N, H, W), in the values of labels."""

    def to_average(self, outputs: Tensor, scale: float) -> Tensor:
        """Outputs for a picture enlarged by `scale` -> what may be averaged with those at other scales: (N, K, H, W)."""

    # Loss

    def loss(self, outputs: Tensor, labels: Tensor, *, align_corners: bool = True) -> Tensor:
        """The mean over labelled pixels, (), after the outputs are resized to the labels' size; 0 without any."""

    def hardest(self, outputs: Tensor, labels: Tensor, share: float, *, align_corners: bool = True) -> Tensor:
        """The labels, without all pixels whose loss is not among the largest `share` of all pixels."""

    def weighted(self, weights: tuple[float, ...] | None) -> "DenseTask":
        """The same task, with each class's pixels multiplied by its weight in the loss; with None, all weigh the same.

        Raises InputError unless labels are classes, and there is a weight for each.
        """

    def balanced(self, count: Callable[[], NDArray[np.int64]]) -> tuple[float, ...]:
        """Weights by which the pixels of every class weigh the same in all; `count` gives the `histogram` of all labels.

        Raises InputError unless labels are classes, before anything is counted, and where no pixel is labelled.
        """

    # Scores

    @property
    def score(self) -> Measure: ...
    @property
    def details(self) -> tuple[Measure, ...]: ...
    @property
    def details_heading(self) -> str: ...

    def count(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """What the scores follow from: sums over pixels, to be added over pictures and devices. Both are (N, H, W)."""

    def count_upsampled(self, outputs: Tensor, labels: Tensor, *, align_corners: bool = True) -> Tensor:
        """The same of outputs that are yet to be resized to the labels' size."""

    def scores(self, totals: NDArray[Any]) -> Scores:
        """The scores of what was counted."""

    def named(self, scores: Scores) -> dict[str, Any]:
        """The scores by their names in files, as JSON has it."""

    def facts(self, totals: NDArray[Any]) -> dict[str, Any]:
        """All that is known of a split's predictions, as JSON has it."""

    def table(self, totals: NDArray[Any]) -> str:
        """The same, for people."""

    # Pictures

    @property
    def is_transparent(self) -> bool:
        """Whether colours are laid over the picture, because alone they would not tell what is what."""

    def colours(self, maps: Sequence[Label]) -> list[NDArray[np.uint8]]:
        """Labels or predictions as pictures (H, W, 3), the same colour for the same value in all of them."""

    def legend(self, maps: Sequence[Label]) -> list[tuple[str, RGB]]:
        """What the colours of these maps mean, as far as they occur."""

    def encoded(self, prediction: Label) -> Image.Image:
        """A prediction as a label file of the data set would have it."""

    # Files

    def describe(self) -> dict[str, Any]:
        """What `restored_task` needs, as JSON has it."""

    @property
    def only_drawn(self) -> tuple[str, ...]:
        """Fields of `describe` on which nothing but pictures depends."""


def restored_task(description: Mapping[str, Any]) -> DenseTask:
    """The task that `describe` described, perhaps among other things. Raises KeyError where it describes none.

    >>> restored_task({"class_names": ["road", "car"], "cell": []}).outputs
    ('road', 'car')
    """
    from search.dense_tasks.depth import Depth
    from search.dense_tasks.segmentation import Segmentation

    if "depth_scale" in description:
        return Depth(float(description["depth_scale"]))
    palette = np.array(description["palette"], np.uint8) if "palette" in description else None
    return Segmentation(tuple(description["class_names"]), palette)


def totals_of_nothing(task: DenseTask) -> Tensor:
    """What the task counts of no pixel at all, on the CPU: where a sum begins."""
    nothing = torch.from_numpy(task.unlabelled((1, 1)))[None]
    return task.count(nothing, nothing)


def measures_beside(task: DenseTask) -> list[Measure]:
    """The details that tables of cells show beside the score."""
    return [measure for measure in task.details if measure.in_tables]


def details_beside(task: DenseTask, trainings: Sequence[Scores]) -> list[float | None]:
    """The means over trainings of `measures_beside`, None where there is none."""
    places = [place for place, measure in enumerate(task.details) if measure.in_tables]
    shown = [Scores(scores.score, tuple(scores.details[place] for place in places)) for scores in trainings]
    return mean_details(shown) or [None] * len(places)


def mean_details(trainings: Sequence[Scores]) -> list[float | None]:
    """The mean of each detail over those trainings that have it, None where none has; empty without any training.

    >>> mean_details([Scores(0.5, (0.2, None)), Scores(0.5, (0.4, None))])
    [0.30000000000000004, None]
    """
    columns = zip(*(scores.details for scores in trainings), strict=True)
    present = [[value for value in column if value is not None] for column in columns]
    return [float(np.mean(values)) if values else None for values in present]
