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
from search.datasets.labels import ColourReader, LabelReader, storage
from search.dense_tasks import RGB, Label
from search.dense_tasks.segmentation import Segmentation

_LEAST_SIDE = 32  # pixels; in a smaller label everything is thin
_LEAST_EDGES = 100  # of a label, for a rate that says something


@dataclass(frozen=True)
class LabelFacts:
    """What one label shows. Of depths, and where labels are not public, `pixels` alone.

    `pixels`: by the task's bins, and last those that are not labelled. `values`: pixels by value as the file has it.
    `edges`: pairs of neighbours whose values differ. `lone`: labelled pixels, by value, that lie in their row or column
    between two other values; where classes have an extent, these are few. `form`: how the file stores values. `shown`: the
    colour in which its palette shows each value, of those that no other value has.
    """

    pixels: NDArray[np.int64]
    values: Mapping[int, int] = field(default_factory=dict)
    edges: int = 0
    lone: Mapping[int, int] = field(default_factory=dict)
    form: str = ""
    shown: Mapping[int, RGB] = field(default_factory=dict)


@dataclass
class SplitFacts:
    """The facts of those labels of a split that were looked at. Indices are pictures'."""

    dataset: Dataset
    pixels: NDArray[np.int64] = field(init=False)
    values: Counter[int] = field(default_factory=Counter)
    lone: Counter[int] = field(default_factory=Counter)
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
        if facts.form:
            self.forms.setdefault(facts.form, []).append(index)
        for value, colour in facts.shown.items():
            self.shown.setdefault(value, {}).setdefault(colour, []).append(index)
        if facts.edges >= _LEAST_EDGES:
            self.rates[index] = sum(facts.lone.values()) / facts.edges

    @property
    def name(self) -> str:
        """The split, and how much of it was looked at, if that is not all."""
        split, total = self.dataset.split, len(self.dataset)
        return split if self.looked == total else f"{split} (in {self.looked} of {total:,} labels)"

    @property
    def reader(self) -> LabelReader | None:
        """What says which class a value means, where labels are numbers in files."""
        reader = getattr(self.dataset, "read_label", None)
        return reader if isinstance(reader, LabelReader) else None

    def label(self, index: int) -> str:
        """A label's name for people."""
        return f"label {label_path(self.dataset, index) or f'{index} of {self.dataset.split}'}"


def label_facts(dataset: Dataset, index: int, label: Label | None = None) -> LabelFacts:
    """The facts of one label, which is given if it was read before. Raises InputError for one that cannot be used."""
    path = label_path(dataset, index)
    is_public = not isinstance(dataset, FileDataset) or path is not None
    if not isinstance(dataset.task, Segmentation) or not is_public:
        return LabelFacts(dataset.task.histogram(label_of(dataset, index) if label is None else label))
    reader, values = getattr(dataset, "read_label", None), None
    if isinstance(reader, LabelReader) and path is not None:
        values = reader.values(path)
        label = reader.meaning(values, path) if label is None else label
    label = label_of(dataset, index) if label is None else label
    pixels = dataset.task.histogram(label)
    if isinstance(reader, ColourReader) and path is not None:
        return LabelFacts(pixels, {}, *_thin(reader.values(path), _is_meant(label, reader)))
    values = label if values is None else values
    counted = _counted(values)
    edges, lone = _thin(values, _is_meant(label, reader))
    return LabelFacts(pixels, counted, edges, lone, *_stored(path, counted))


def refused_facts(dataset: Dataset, index: int) -> LabelFacts:
    """Those of a label that was refused: nothing is labelled, but its values may tell why. InputError if it has none."""
    reader, path = getattr(dataset, "read_label", None), label_path(dataset, index)
    values = _counted(reader.values(path)) if isinstance(reader, LabelReader) and path is not None else {}
    return LabelFacts(np.zeros(len(dataset.task.bins) + 1, np.int64), values)


def label_path(dataset: Dataset, index: int) -> Path | None:
    """The file of a label; None if there is none."""
    return dataset.pairs[index].label if isinstance(dataset, FileDataset) else None


def _is_meant(label: Label, reader: object) -> NDArray[np.bool_]:
    """Where a value could be a class that is not there: not where it is void, unless any value that means nothing is."""
    ignores_others = isinstance(reader, LabelReader | ColourReader) and reader.ignores_others
    return np.ones(label.shape, bool) if ignores_others else label != IGNORE_INDEX


def _counted(values: NDArray[Any]) -> dict[int, int]:
    counts = np.bincount(values.ravel())
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def _thin(values: NDArray[Any], meant: NDArray[np.bool_]) -> tuple[int, dict[int, int]]:
    """The edges, and the lone pixels by value, of those that are meant to be of a class."""
    if min(values.shape) < _LEAST_SIDE:
        return 0, {}
    lone = np.zeros(values.shape, bool)
    edges = 0
    for v, of_axis in ((values, lone), (values.T, lone.T)):
        differs = v[1:] != v[:-1]
        edges += int(differs.sum())
        of_axis[1:-1] |= differs[:-1] & differs[1:] & (v[2:] != v[:-2])
    found, counts = np.unique(values[lone & meant], return_counts=True)  # numbers of colours are too large to count by place
    return edges, dict(zip(found.tolist(), counts.tolist(), strict=True))


def _stored(path: Path | None, values: Mapping[int, int]) -> tuple[str, dict[int, RGB]]:
    """How the label's file stores its values, and the colours of those that a palette tells apart."""
    if path is None:
        return "", {}
    form, palette = storage(path)
    colours = {value: palette[value] for value in values if value < len(palette)}
    alone = Counter(colours.values())
    return form, {value: colour for value, colour in colours.items() if alone[colour] == 1}
