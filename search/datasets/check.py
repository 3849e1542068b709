"""Verify a data set's folder before a long run: `python -m search.datasets check <name> --data-dir <folder>`.

Reads every picture of every split and lists all that is wrong: files that are missing or unreadable, images and labels of
different sizes, label values without a meaning, a number of pictures that is not the official one, pictures in more than
one split, palettes whose colours have another order in every file, labels of one class alone. What may be right but hardly is
becomes a warning (`rules.py`). Then it lists each class's share of the labelled pixels.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from search.datasets import IGNORE_INDEX, VALIDATION, Dataset, open_unchecked, split_names
from search.datasets.copies import copies, overlaps
from search.datasets.facts import LabelFacts, SplitFacts, label_facts, label_path, refused_facts
from search.datasets.files import FileDataset, omissions
from search.datasets.labels import ColourReader
from search.datasets.rules import warnings_about
from search.dense_tasks import RGB
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.settings import MAX_MEGAPIXELS, TaskName

Place = tuple[int, int]  # (number of the split, index of the picture)
_NEEDED = ("train", *VALIDATION)  # splits, as far as a data set has them
_DARK = 32  # of 255; 12 bits in 16 come to 15 at most
_CHUNK = 8  # pictures per request to a process


class Verdict(NamedTuple):
    """The result of a check: the tables, notes and warnings to print, and the problems, one sentence each."""

    text: str
    problems: list[str]


class Finding(NamedTuple):
    """The result of reading one picture: its (H, W), what its label shows, any problem, and the image's largest value."""

    size: tuple[int, int] | None
    facts: LabelFacts
    problem: str
    brightest: int = 0

    @property
    def pixels(self) -> NDArray[np.int64]:
        """Pixels by the task's bins, and last those that are not labelled."""
        return self.facts.pixels


def check_folder(
    name: str,
    data_dir: Path | None,
    splits: Sequence[str],
    processes: int,
    task: TaskName | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Verdict:
    """Read the given splits of data set `name`, or else train, val and all others that exist, with the labels for `task`.

    Raises InputError for an unknown data set or split, and if there is nothing to verify.
    """
    datasets, problems, notes = _open_splits(name, data_dir, splits, task, max_megapixels)
    notes += filter(None, map(omissions, datasets))
    for dataset in datasets:
        problems += _list_problems(dataset)
    datasets, absences = _without_absent_labels(datasets)
    problems += absences.values()
    problems += overlaps(datasets)
    findings = _read_all(datasets, processes)
    problems += dict.fromkeys(finding.problem for row in findings for finding in row if finding.problem)
    problems += [text for split, text in _unlabelled(datasets, findings).items() if split not in absences]
    problems += _of_one_class(datasets, findings)
    palettes = _palettes(datasets, findings)
    warnings = _warnings(datasets, findings, with_palettes=not palettes)
    notes += listed("warning", [*warnings, *_dark(datasets, findings), *copies(datasets)])
    tables = [_split_table(datasets, findings), _class_table(datasets, findings)] if datasets else []
    problems = list(dict.fromkeys(problems + palettes))  # each shared picture once
    return Verdict("\n\n".join([*tables, *notes]), problems)


def listed(kind: str, sentences: Sequence[str]) -> list[str]:
    """The sentences as one text, below a heading that counts them; no text for none."""
    heading = f"{len(sentences)} {kind}{'s' if len(sentences) > 1 else ''}:"
    return ["\n".join([heading, *(f"  {sentence}" for sentence in sentences)])] if sentences else []


def _open_splits(
    name: str, data_dir: Path | None, asked: Sequence[str], task: TaskName | None, max_megapixels: float
) -> tuple[list[Dataset], list[str], list[str]]:
    """The splits that exist, problems of those that must exist, and notes about the others."""
    names = split_names(name)
    if unknown := [split for split in asked if split not in names]:
        raise InputError(f"`splits` {' '.join(unknown)} of {name} is unknown; choose from: {' '.join(names)}")
    datasets, problems, notes = [], [], []
    for split in asked or names:
        try:
            datasets.append(open_unchecked(name, split, data_dir, task, max_megapixels))
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
    remedy = ", or correct count in the TOML file" if dataset.description else " from the original data set"
    return [*dataset.faults, f"{count}; restore {dataset.listing} and what belongs to it{remedy}"]


def _without_absent_labels(datasets: list[Dataset]) -> tuple[list[Dataset], dict[str, str]]:
    """The splits, of which those without any label's file have images alone, and the problem of each of these."""
    absences = {d.split: fault for d in datasets if isinstance(d, FileDataset) and (fault := d.absence_of_all_labels())}
    readable = [
        replace(d, pairs=tuple(pair._replace(label=None) for pair in d.pairs))
        if isinstance(d, FileDataset) and d.split in absences
        else d
        for d in datasets
    ]
    return readable, absences


def _unlabelled(datasets: list[Dataset], findings: list[list[Finding]]) -> dict[str, str]:
    """Splits to train and to score on of which no picture has a label, and the problem of each."""
    return {
        dataset.split: f"no pixel of {dataset.split} is labelled: correct its labels, or what says what their values mean"
        for dataset, of_split in zip(datasets, findings, strict=True)
        if dataset.split in _NEEDED and any(f.size for f in of_split) and not sum(int(f.pixels[:-1].sum()) for f in of_split)
    }


def _of_one_class(datasets: list[Dataset], findings: list[list[Finding]]) -> list[str]:
    """A data set whose splits to train and to score on have one of several classes alone: every cell would score 100 %."""
    counted = [f.facts for d, of_split in zip(datasets, findings, strict=True) if d.split in _NEEDED for f in of_split]
    task = datasets[0].task if datasets else None
    if not (isinstance(task, Segmentation) and len(task.class_names) > 1 and counted):
        return []
    *pixels, void = np.sum([facts.pixels for facts in counted], axis=0).tolist()
    present = [name for name, count in zip(task.class_names, pixels, strict=True) if count]
    if len(present) != 1:
        return []
    description = next((dataset.description for dataset in datasets if isinstance(dataset, FileDataset)), None)
    remedy = "correct the labels, or what says what their values mean"
    if any(isinstance(dataset, FileDataset) and isinstance(dataset.read_label, ColourReader) for dataset in datasets):
        remedy += " (transparent pixels do not count)"
    if description and any(IGNORE_INDEX in facts.values for facts in counted):
        remedy = f"correct the labels, or give 255 a class in label_ids of {description}"
    return [f"every labelled pixel is {present[0]}, {100 * void / (sum(pixels) + void):.2f} % are not labelled: {remedy}"]


def _palettes(datasets: list[Dataset], findings: list[list[Finding]]) -> list[str]:
    """Palette pictures of which one shows a value in the colour that another one has for another value."""
    first: dict[RGB, tuple[int, Path | None]] = {}
    for dataset, of_split in zip(datasets, findings, strict=True):
        shown = ((index, *item) for index, finding in enumerate(of_split) for item in finding.facts.shown.items())
        for index, value, colour in shown:
            label = label_path(dataset, index)
            before, other = first.setdefault(colour, (value, label))
            if before != value:
                return [
                    f"label {label} shows the value {value} in the colour {list(colour)}, which is {before} in {other}: the "
                    "palettes have different orders; save all labels with one palette, or give label_colours in a TOML file"
                ]
    return []


def _warnings(datasets: list[Dataset], findings: list[list[Finding]], *, with_palettes: bool) -> list[str]:
    """What the rules say of all labels; nothing of palettes where these are a problem."""
    splits = []
    for dataset, of_split in zip(datasets, findings, strict=True):
        if dataset.split != "trainval":  # whose labels are those of others
            splits.append(SplitFacts(dataset))
            for index, finding in enumerate(of_split):
                facts = finding.facts if with_palettes else replace(finding.facts, shown={})
                splits[-1].add(index, facts)
    train = next((facts for facts in splits if facts.dataset.split.startswith("train")), None)
    val = next((facts for facts in splits if facts.dataset.split in VALIDATION), None)
    return warnings_about(train, val, [facts for facts in splits if facts is not train and facts is not val])


def _dark(datasets: list[Dataset], findings: list[list[Finding]]) -> list[str]:
    """Splits of which no image has anything bright."""
    return [
        f"no image of {dataset.split} has a value above {largest} of 255, as where cameras' 10 or 12 bits are stored in 16: "
        "multiply them by 64 or 16, so that viewers show what is to be seen"
        for dataset, of_split in zip(datasets, findings, strict=True)
        if any(f.size for f in of_split) and (largest := max(f.brightest for f in of_split)) < _DARK
    ]


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
        image, label, _ = dataset[index]
    except InputError as error:
        return Finding(None, _facts_of_refused(dataset, index), str(error))
    return Finding((label.shape[0], label.shape[1]), label_facts(dataset, index, label), "", int(image.max()))


def _facts_of_refused(dataset: Dataset, index: int) -> LabelFacts:
    try:
        return refused_facts(dataset, index)
    except InputError:  # the label is missing or damaged, which is said
        return LabelFacts(np.zeros(len(dataset.task.bins) + 1, np.int64))


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
