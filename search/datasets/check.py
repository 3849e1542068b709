"""Verify a data set's folder before a long run: `python -m search.datasets check <name> --data-dir <folder>`.

Reads every picture of every split and lists all that is wrong: files that are missing or unreadable, images and labels of
different sizes, label values without a meaning, a number of pictures that is not the official one, pictures in more than
one split, palettes whose colours have another order in every file, labels of one class alone. Then it lists each class's
share of the labelled pixels.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from search.datasets import VALIDATION, Dataset, open_unchecked, split_names
from search.datasets.files import FileDataset, omissions
from search.datasets.labels import LabelReader, shown_as
from search.dense_tasks import RGB
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.settings import TaskName

Place = tuple[int, int]  # (number of the split, index of the picture)
_NEEDED = ("train", *VALIDATION)  # splits, as far as a data set has them
_CHUNK = 8  # pictures per request to a process


class Verdict(NamedTuple):
    """The result of a check: the tables and notes to print, and the problems, one sentence each."""

    text: str
    problems: list[str]


class Finding(NamedTuple):
    """The result of reading one picture: its (H, W), its pixels by the task's bins, the problem, if any, and its label's
    values by the colours that a palette shows them in.
    """

    size: tuple[int, int] | None
    pixels: NDArray[np.int64]
    problem: str
    shown_as: dict[RGB, int]


def check_folder(
    name: str, data_dir: Path | None, splits: Sequence[str], processes: int, task: TaskName | None = None
) -> Verdict:
    """Read the given splits of data set `name`, or else train, val and all others that exist, with the labels for `task`.

    Raises InputError for an unknown data set or split, and if there is nothing to verify.
    """
    datasets, problems, notes = _open_splits(name, data_dir, splits, task)
    notes += filter(None, map(omissions, datasets))
    for dataset in datasets:
        problems += _list_problems(dataset)
    problems += _overlaps(datasets)
    findings = _read_all(datasets, processes)
    problems += dict.fromkeys(finding.problem for row in findings for finding in row if finding.problem)
    problems += _unlabelled(datasets, findings)
    problems += _of_one_class(datasets, findings)
    problems += _palettes(datasets, findings)
    tables = [_split_table(datasets, findings), _class_table(datasets, findings)] if datasets else []
    return Verdict("\n\n".join([*tables, *notes]), list(dict.fromkeys(problems)))  # each shared picture once


def _open_splits(
    name: str, data_dir: Path | None, asked: Sequence[str], task: TaskName | None
) -> tuple[list[Dataset], list[str], list[str]]:
    """The splits that exist, problems of those that must exist, and notes about the others."""
    names = split_names(name)
    if unknown := [split for split in asked if split not in names]:
        raise InputError(f"`splits` {' '.join(unknown)} of {name} is unknown; choose from: {' '.join(names)}")
    datasets, problems, notes = [], [], []
    for split in asked or names:
        try:
            datasets.append(open_unchecked(name, split, data_dir, task))
        except InputError as error:
            if split in (asked or _NEEDED):
                problems.append(str(error))
            else:
                notes.append(f"{split} is not there ({error})")
    if not datasets and (data_dir is None or not data_dir.is_dir()):
        raise InputError(problems[0])  # nothing to verify: a flag is wrong, not the data
    return datasets, problems, notes


def _list_problems(dataset: Dataset) -> list[str]:
    """Problems of the list of pictures; missing files are found when they are read."""
    if not isinstance(dataset, FileDataset):
        return dataset.problems()
    official = dataset.official_lengths
    if not official or len(dataset) in official:
        return list(dataset.faults)
    count = f"{dataset.split} has {len(dataset):,} instead of {_official(dataset)} pictures"
    return [*dataset.faults, f"{count}; restore {dataset.listing} and what belongs to it from the original data set"]


def _overlaps(datasets: list[Dataset]) -> list[str]:
    """Pictures that are both in a split to train on and in one to validate or test on."""
    names = {
        dataset.split: {pair.image for pair in dataset.pairs}
        for dataset in datasets
        if isinstance(dataset, FileDataset) and dataset.split != "trainval"
    }
    return [
        f"{first} and {second} have pictures in common ({len(shared):,}, such as {min(shared)}); take them out of one"
        for first, second in combinations(names, 2)
        if not (first.startswith("train") and second.startswith("train")) and (shared := names[first] & names[second])
    ]


def _unlabelled(datasets: list[Dataset], findings: list[list[Finding]]) -> list[str]:
    """Splits to train and to score on of which no picture has a label."""
    return [
        f"no pixel of {dataset.split} is labelled: correct its labels, or what says what their values mean"
        for dataset, of_split in zip(datasets, findings, strict=True)
        if dataset.split in _NEEDED and any(f.size for f in of_split) and not sum(int(f.pixels[:-1].sum()) for f in of_split)
    ]


def _of_one_class(datasets: list[Dataset], findings: list[list[Finding]]) -> list[str]:
    """A data set whose splits to train and to score on have one of several classes alone: every cell would score 100 %."""
    counted = [f.pixels for d, of_split in zip(datasets, findings, strict=True) if d.split in _NEEDED for f in of_split]
    task = datasets[0].task if datasets else None
    if not (isinstance(task, Segmentation) and len(task.class_names) > 1 and counted):
        return []
    *pixels, void = np.sum(counted, axis=0).tolist()
    present = [name for name, count in zip(task.class_names, pixels, strict=True) if count]
    if len(present) != 1:
        return []
    remedy = "correct the labels, or what says what their values mean"
    if void:
        remedy += " (255 does not count, unless label_ids of a TOML file gives it a class)"
    return [f"every labelled pixel is {present[0]}, {100 * void / (sum(pixels) + void):.2f} % are not labelled: {remedy}"]


def _palettes(datasets: list[Dataset], findings: list[list[Finding]]) -> list[str]:
    """Palette pictures of which one shows a value in the colour that another one has for another value."""
    first: dict[RGB, tuple[int, Path | None]] = {}
    for dataset, of_split in zip(datasets, findings, strict=True):
        for index, colour, value in ((i, *item) for i, finding in enumerate(of_split) for item in finding.shown_as.items()):
            label = _label_path(dataset, index)
            before, other = first.setdefault(colour, (value, label))
            if before != value:
                return [
                    f"label {label} shows the value {value} in the colour {list(colour)}, which is {before} in {other}: the "
                    "palettes have different orders; save all labels with one palette, or give label_colours in a TOML file"
                ]
    return []


def _read_all(datasets: list[Dataset], processes: int) -> list[list[Finding]]:
    """The finding for each picture of each split; a picture that several splits share is read once."""
    keys = [[_key(dataset, index) for index in range(len(dataset))] for dataset in datasets]
    first: dict[object, Place] = {}
    for row, of_split in enumerate(keys):
        for index, key in enumerate(of_split):
            first.setdefault(key, (row, index))
    with _mapper(datasets, processes) as findings, tqdm(total=len(first), desc="pictures", unit="picture") as bar:
        found = {}
        for key, finding in zip(first, findings(list(first.values())), strict=True):
            found[key] = finding
            bar.update()
    return [[found[key] for key in of_split] for of_split in keys]


def _key(dataset: Dataset, index: int) -> object:
    return dataset.pairs[index] if isinstance(dataset, FileDataset) else (dataset.split, index)


@contextmanager
def _mapper(datasets: list[Dataset], processes: int) -> Iterator[Callable[[list[Place]], Iterator[Finding]]]:
    """A function that maps pairs (number of the split, index) to findings, in this process or in others."""
    if processes == 1:
        yield lambda places: (_examine(datasets[row], index) for row, index in places)
        return
    # Spawned, because a fork of a process that has threads (PyTorch's) may hang.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_process, initargs=(datasets,))
    try:
        yield lambda places: pool.map(_examine_there, places, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that read pictures was killed, perhaps for lack of memory; give fewer `processes`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_opened: list[Dataset] = []  # in each process: the splits it reads from, sent once instead of with each picture


def _start_process(datasets: list[Dataset]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its processes
    _opened.extend(datasets)


def _examine_there(place: Place) -> Finding:
    return _examine(_opened[place[0]], place[1])


def _examine(dataset: Dataset, index: int) -> Finding:
    try:
        label = dataset[index].label
    except InputError as error:
        return Finding(None, np.zeros(len(dataset.task.bins) + 1, np.int64), str(error), {})
    return Finding((label.shape[0], label.shape[1]), dataset.task.histogram(label), "", _shown_as(dataset, index))


def _shown_as(dataset: Dataset, index: int) -> dict[RGB, int]:
    """What the label's palette shows its values in, where values are what counts."""
    path = _label_path(dataset, index)
    if path is None or not (isinstance(dataset, FileDataset) and isinstance(dataset.read_label, LabelReader)):
        return {}
    return shown_as(path)


def _label_path(dataset: Dataset, index: int) -> Path | None:
    return dataset.pairs[index].label if isinstance(dataset, FileDataset) else None


def _split_table(datasets: list[Dataset], findings: list[list[Finding]]) -> str:
    rows = [("split", "pictures", "officially", "height × width", "ignored %")]
    for dataset, of_split in zip(datasets, findings, strict=True):
        pixels = np.sum([finding.pixels for finding in of_split], axis=0)
        sizes = [finding.size for finding in of_split if finding.size]
        extent = " × ".join("–".join(map(str, dict.fromkeys((min(axis), max(axis))))) for axis in zip(*sizes, strict=True))
        ignored = f"{100 * pixels[-1] / pixels.sum():.2f}" if pixels.sum() else "-"
        rows.append((dataset.split, f"{len(dataset):,}", _official(dataset), extent or "-", ignored))
    return _aligned(rows)


def _class_table(datasets: list[Dataset], findings: list[list[Finding]]) -> str:
    """Table of each class's share in the labelled pixels of each split; a split without labels has no column."""
    task = datasets[0].task
    columns = []
    for dataset, of_split in zip(datasets, findings, strict=True):
        pixels = np.sum([finding.pixels for finding in of_split], axis=0)[:-1]
        if pixels.sum():
            columns.append((f"{dataset.split} %", *(f"{100 * share:.2f}" for share in pixels / pixels.sum())))
    rows = zip(("", *map(str, range(len(task.bins)))), (task.bins_heading, *task.bins), *columns, strict=True)
    return _aligned(list(rows))


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Format a table: the first column with letters is left-aligned, the numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = next(i for i, heading in enumerate(rows[0]) if heading)
    lines = [
        "  ".join(
            text.ljust(width) if i == names else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _official(dataset: Dataset) -> str:
    lengths = dataset.official_lengths if isinstance(dataset, FileDataset) else ()
    return " or ".join(f"{length:,}" for length in lengths) or "-"
