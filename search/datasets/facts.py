"""What the labels of a split show, counted in one pass: what the rules of `rules.py` follow from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.datasets import IGNORE_INDEX, Dataset
from search.datasets.counts import label_of
from search.datasets.files import FileDataset
from search.datasets.labels import ColourReader, DepthReader, LabelReader, storage
from search.datasets.pictures import PictureReader
from search.dense_tasks import RGB, Label
from search.dense_tasks.segmentation import Segmentation

_LEAST_SIDE = 32  # pixels; in a smaller label everything is thin
_LEAST_EDGES = 100  # of a label, for a rate that says something


@dataclass(frozen=True)
class LabelFacts:
    """What one label shows. Of depths, and where labels are not public, `pixels` alone.

    `pixels`: by the task's bins, and last those that are not labelled. `values`: pixels by value as the file has it.
    `edges`: pairs of neighbours whose values differ. `lone`: labelled pixels, by value, that lie in their row or column
    between two other values; where classes have an extent, these are few. `lines`: those between others, whether these are two
    or the same. `form`: how the file stores values. `shown`: the
    colour in which its palette shows each value, of those that no other value has.
    """

    pixels: NDArray[np.int64]
    values: Mapping[int, int] = field(default_factory=dict)
    edges: int = 0
    lone: Mapping[int, int] = field(default_factory=dict)
    lines: Mapping[int, int] = field(default_factory=dict)
    form: str = ""
    shown: Mapping[int, RGB] = field(default_factory=dict)


@dataclass
class SplitFacts:
    """The facts of those labels of a split that were looked at. Indices are pictures'."""

    dataset: Dataset
    pixels: NDArray[np.int64] = field(init=False)
    values: Counter[int] = field(default_factory=Counter)
    lone: Counter[int] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    forms: dict[str, list[int]] = field(default_factory=dict)  # form -> the labels that have it
    shown: dict[int, dict[RGB, list[int]]] = field(default_factory=dict)  # value -> colour -> the labels that show it so
    looked: int = 0
    rates: dict[int, float] = field(default_factory=dict)  # label -> lone pixels for each edge, if it has enough of these

    def __post_init__(self) -> None:
        self.pixels = np.zeros(len(self.dataset.task.bins) + 1, np.int64)

    def add(self, index: int, facts: LabelFacts) -> None:
        """Count label `index`."""
        self.looked += 1
        self.pixels += facts.pixels
        self.values.update(facts.values)
        self.lone.update(facts.lone)
        self.lines.update(facts.lines)
        if facts.form:
            self.forms.setdefault(facts.form, []).append(index)
        for value, colour in facts.shown.items():
            self.shown.setdefault(value, {}).setdefault(colour, []).append(index)
        if facts.edges >= _LEAST_EDGES:
            self.rates[index] = sum(facts.lone.values()) / facts.edges

    @property
    def is_sample(self) -> bool:
        return self.looked < len(self.dataset)

    @property
    def name(self) -> str:
        """The split, and how much of it was looked at, if that is not all."""
        split, total = self.dataset.split, len(self.dataset)
        return f"{split} (in {self.looked} of {total:,} labels)" if self.is_sample else split

    @property
    def reader(self) -> LabelReader | None:
        """What says which class a value means, where labels are numbers in files."""
        reader = self.dataset.read_label if isinstance(self.dataset, FileDataset) else None
        return reader if isinstance(reader, LabelReader) else None

    def label(self, index: int) -> str:
        """A label's name for people."""
        return f"label {label_path(self.dataset, index) or f'{index} of {self.dataset.split}'}"


def label_facts(dataset: Dataset, index: int, label: Label | None = None) -> LabelFacts:
    """The facts of one label, which is given if it was read before. Raises InputError for one that cannot be used."""
    source = _source(dataset, index)
    if source is None or not isinstance(dataset.task, Segmentation):
        label = label_of(dataset, index) if label is None else label
        pixels = dataset.task.histogram(label)
        if isinstance(dataset, FileDataset) or not isinstance(dataset.task, Segmentation):
            return LabelFacts(pixels)
        return LabelFacts(pixels, _counted(label), *_thin(label, label != IGNORE_INDEX))
    reader, path, pictures = source
    values = reader.values(path, pictures)
    if label is None:
        label = reader.meaning(values, path) if isinstance(reader, LabelReader) else label_of(dataset, index)
    # A value that means nothing may be of a class that is not there; one that is known to be void is not.
    thin = _thin(values, (label != IGNORE_INDEX) | reader.ignores_others)
    pixels = dataset.task.histogram(label)
    if isinstance(reader, ColourReader):
        return LabelFacts(pixels, {}, *thin)
    counted = _counted(values)
    return LabelFacts(pixels, counted, *thin, *_stored(path, counted))


def refused_facts(dataset: Dataset, index: int) -> LabelFacts:
    """Those of a label that was refused: nothing is labelled, but its values may tell why. InputError if it has none."""
    source = _source(dataset, index)
    values = _counted(source[0].values(*source[1:])) if source and isinstance(source[0], LabelReader) else {}
    return LabelFacts(np.zeros(len(dataset.task.bins) + 1, np.int64), values)


def label_path(dataset: Dataset, index: int) -> Path | None:
    """The file of a label; None if there is none."""
    return dataset.pairs[index].label if isinstance(dataset, FileDataset) else None


def _source(dataset: Dataset, index: int) -> tuple[LabelReader | ColourReader, Path, PictureReader] | None:
    """What reads a label of classes, its file, and what opens that; None if there is no file of classes."""
    path = label_path(dataset, index)
    if path is None or not isinstance(dataset, FileDataset) or isinstance(dataset.read_label, DepthReader):
        return None
    return dataset.read_label, path, dataset.pictures


def _counted(values: NDArray[Any]) -> dict[int, int]:
    counts = np.bincount(values.ravel())
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def _thin(values: NDArray[Any], meant: NDArray[np.bool_]) -> tuple[int, dict[int, int], dict[int, int]]:
    """The edges; by value, of the pixels that are meant to be of a class, the lone ones and those of lines."""
    if min(values.shape) < _LEAST_SIDE:
        return 0, {}, {}
    lone, lines = np.zeros((2, *values.shape), bool)
    edges = 0
    for v, lone_there, lines_there in ((values, lone, lines), (values.T, lone.T, lines.T)):
        differs = v[1:] != v[:-1]
        between = differs[:-1] & differs[1:]
        edges += int(differs.sum())
        lines_there[1:-1] |= between
        lone_there[1:-1] |= between & (v[2:] != v[:-2])
    return edges, _of_each(values[lone & meant]), _of_each(values[lines & meant])


def _of_each(values: NDArray[Any]) -> dict[int, int]:
    """As `_counted`, for numbers of colours, too, which are too large to count by place."""
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _stored(path: Path, values: Mapping[int, int]) -> tuple[str, dict[int, RGB]]:
    """How a label's file stores its values, and the colours of those that a palette tells apart."""
    form, palette = storage(path)
    colours = {value: palette[value] for value in values if value < len(palette)}
    alone = Counter(colours.values())
    return form, {value: colour for value, colour in colours.items() if alone[colour] == 1}
