"""What labels hold, and how large pictures are, without decoding the images where that is possible."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from reference.grid import Grid
from search.datasets import Dataset
from search.datasets.files import FileDataset
from search.datasets.pictures import picture_size
from search.dense_tasks import Label


def label_of(dataset: Dataset, index: int) -> Label:
    """The label (H, W) of a picture; of files, the label's alone is read. Raises InputError for one that cannot be used."""
    return dataset.label(index) if isinstance(dataset, FileDataset) else dataset[index].label


def label_counts(dataset: Dataset, indices: Iterable[int]) -> NDArray[np.int64]:
    """Pixels of these pictures by the task's bins, and last those that are not labelled: (bins + 1,)."""
    total = np.zeros(len(dataset.task.bins) + 1, np.int64)
    for index in indices:
        total += dataset.task.histogram(label_of(dataset, index))
    return total


def size_for_all(datasets: Sequence[Dataset], grid: Grid) -> tuple[int, int]:
    """The smallest height and width on the grid of features that hold all pictures of these splits."""
    heights, widths = zip(*(size_of(each, index) for each in datasets for index in range(len(each))), strict=True)
    return grid.rounded_up((max(heights), max(widths)))


def size_of(dataset: Dataset, index: int) -> tuple[int, int]:
    """Height and width of a picture; of files, the image's header alone is read. Raises InputError naming the file."""
    if isinstance(dataset, FileDataset):
        return picture_size(dataset.pairs[index].image, dataset.pictures.remedy)
    height, width = dataset[index].label.shape
    return height, width
