"""Pictures that occur more than once, in two splits or in one: by their paths, and by what their files hold."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from search.datasets import Dataset
from search.datasets.digests import digests
from search.datasets.files import FileDataset, Pair
from search.errors import InputError

_FEW = 3  # labels, of which it says nothing that they are the same


def overlaps(datasets: Sequence[Dataset]) -> list[str]:
    """Sentences about pictures that are both in a split to train on and in one to validate or test on."""
    return [
        f"{first.split} and {second.split} have pictures in common ({len(shared):,}, such as {min(shared)}); "
        "take them out of one"
        for first, second in _apart(datasets)
        if (shared := _images(first) & _images(second))
    ]


def copies(datasets: Sequence[Dataset]) -> list[str]:
    """Sentences about files that are different ones and hold the same: a picture in two splits, or twice with two labels, and
    one label for all pictures.

    Every file is read, unless it was before and has not changed since. Files that are not there are left out.
    """
    held = _held(datasets)
    if held is None:
        return []
    found = [
        f"{text}, so that scores on {second.split} are too good: take them out of one"
        for first, second in _apart(datasets)
        if (text := _in_two_splits(first, second, held))
    ]
    for dataset in datasets:
        if isinstance(dataset, FileDataset) and dataset.split != "trainval":
            found += [text for text in (_one_for_all(dataset, held), _two_labels(dataset, held)) if text]
    return found


def in_common(dataset: Dataset, others: Sequence[Dataset]) -> str:
    """What a split has in common with one of the others, by path or content: the beginning of a sentence; "" if nothing."""
    for other in others:
        is_same = (dataset.name, dataset.split) == (other.name, other.split)
        if not (isinstance(dataset, FileDataset) and isinstance(other, FileDataset)):
            if is_same:
                return f"{dataset.split} is used already"
            continue
        if is_same and _images(dataset) == _images(other):
            return f"{dataset.split} is used already"
        if shared := _images(dataset) & _images(other):
            pictures = f"{len(shared):,} picture{'s' * (len(shared) > 1)}"
            return f"{other.split} and {dataset.split} have {pictures} in common, such as {min(shared)}"
        held = _held([other, dataset])
        if held is not None and (text := _in_two_splits(other, dataset, held)):
            return text
    return ""


def _apart(datasets: Sequence[Dataset]) -> Iterator[tuple[FileDataset, FileDataset]]:
    """The pairs of splits that should have no picture in common; trainval is made of others."""
    of_files = [each for each in datasets if isinstance(each, FileDataset) and each.split != "trainval"]
    for first, second in combinations(of_files, 2):
        if not (first.split.startswith("train") and second.split.startswith("train")):
            yield first, second


def _images(dataset: FileDataset) -> set[Path]:
    return {pair.image for pair in dataset.pairs}


def _held(datasets: Sequence[Dataset]) -> Mapping[Path, str] | None:
    """What each file holds, as a hash; None if a file cannot be read, which is said where it is."""
    held: dict[Path, str] = {}
    for dataset in datasets:
        if isinstance(dataset, FileDataset):
            paths = [path for pair in dataset.pairs for path in pair[1:] if path is not None and path.is_file()]
            try:
                held |= zip(paths, digests(paths, f"content of {dataset.name} {dataset.split}"), strict=True)
            except InputError:
                return None
    return held


def _in_two_splits(first: FileDataset, second: FileDataset, held: Mapping[Path, str]) -> str:
    ours = {held[path]: path for path in _images(first) if path in held}
    theirs = [path for path in sorted(_images(second) - _images(first)) if held.get(path) in ours]
    if not theirs:
        return ""
    example = f"{ours[held[theirs[0]]]} and {theirs[0]}"
    return (
        f"{first.split} and {second.split} have {len(theirs):,} picture{'s' * (len(theirs) > 1)} in common under other names, "
        f"such as {example}"
    )


def _one_for_all(dataset: FileDataset, held: Mapping[Path, str]) -> str:
    labels = [pair.label for pair in dataset.pairs if pair.label is not None]
    images = {held.get(image) for image in _images(dataset)}
    if len(labels) < _FEW or len({held.get(label) for label in labels}) > 1 or len(images) == 1:
        return ""
    return f"all {len(labels):,} labels of {dataset.split} are the same, such as {labels[0]}: give each picture its own"


def _two_labels(dataset: FileDataset, held: Mapping[Path, str]) -> str:
    first: dict[str, Pair] = {}
    for pair in dataset.pairs:
        digest = held.get(pair.image)
        if digest is None or pair.label is None:
            continue
        other = first.setdefault(digest, pair)
        if other.label is not None and held.get(other.label) != held.get(pair.label):
            both = f"{other.image} and {pair.image} of {dataset.split}"
            return f"{both} are the same picture and have different labels: take one out"
    return ""
